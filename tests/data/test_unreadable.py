"""Unreadable files: named once, replaced, and when they stop a run."""

import io
import itertools
import logging
import multiprocessing

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from byolx.data.augment.distribution import ViewSpec
from byolx.data.loader import evaluation_batches, evaluation_images, train_batches
from byolx.data.sources.folders import image_folder
from byolx.data.transforms import Centre, Views
from byolx.data.unreadable import MIN_SEEN, TOLERATED, Failure, FailureLog

SPECS = (ViewSpec(), ViewSpec(blur_probability=0.1, solarise_probability=0.2))

# The log


def log_of(records, share):
  return FailureLog("photos", records, share, "another one takes its place")


def failures(*records):
  return [Failure(record, f"{record}.jpg: the file is empty") for record in records]


def indices(*records):
  return np.array(records, np.int32)


def test_every_record_is_named_once(caplog):
  log = log_of(1000, 0.01)
  with caplog.at_level(logging.WARNING, logger="byolx"):
    log.add(indices(1, 2), failures(7, 8))
    log.add(indices(3, 4), failures(8, 7, 9))
  assert [record.getMessage() for record in caplog.records] == [
    f"photos: record {i} cannot be read, another one takes its place: {i}.jpg: the file is empty"
    for i in (7, 8, 9)
  ]


def test_a_few_never_stop_a_run():
  log = log_of(TOLERATED, 0.01)
  log.add(indices(-1), failures(*range(TOLERATED)))


def test_share_is_judged_once_enough_was_seen():
  log = log_of(1000, 0.1)
  bad = range(500, 500 + 2 * TOLERATED)
  log.add(indices(*range(MIN_SEEN - len(bad) - 1)), failures(*bad))  # one record short of MIN_SEEN
  with pytest.raises(ValueError, match=r"photos: 20 of the 100 records seen .* = 0\.1"):
    log.add(indices(300), failures(510))


def test_share_of_a_small_source_is_judged_when_all_was_seen():
  log = log_of(30, 0.1)
  log.add(indices(*range(10)), failures(*range(10, 21)))
  with pytest.raises(ValueError, match="11 of the 30 records seen"):
    log.add(indices(*range(21, 30)), failures(10))


def test_records_seen_again_do_not_count_again():
  log = log_of(10_000, 0.02)
  bad = failures(*range(5000, 5011))
  for _ in range(50):  # 11 of 1011 is under two in a hundred, however often they come
    log.add(indices(*range(1000)), bad)
  with pytest.raises(ValueError, match="11 of the 511 records seen"):
    log_of(10_000, 0.02).add(indices(*range(500)), bad)


def test_limits_of_the_share():
  with pytest.raises(ValueError, match=r"1 of the 2 records seen .* = 0\.0"):
    log_of(1000, 0.0).add(indices(3), failures(5))
  log_of(300, 1.0).add(indices(3), failures(*range(300)))
  for share in (-0.1, 1.1):
    with pytest.raises(ValueError, match=f"data.max_failed_share is {share}; expected 0 to 1"):
      log_of(10, share)


# The pipeline


def folder_of(path, count, bad=()):
  """Record i of this source is a file of one colour, or an empty file if `bad` holds i."""
  path.mkdir()
  for i in range(count):
    name = path / f"{i:04d}.png"
    if i in bad:
      name.write_bytes(b"")
    else:
      Image.new("RGB", (6, 5), (i % 256, i // 256, 7)).save(name)
  return image_folder(path, "train", 0.0)


def first(count, *args, **kwargs):
  """The first batches, made without a thread, with copies of their arrays."""
  with train_batches(*args, **kwargs, prefetch=0) as batches:
    return [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, count)]


def warnings_of(caplog):
  messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  caplog.clear()
  return messages


@pytest.fixture
def rough_folder(tmp_path):
  """A flat folder of what people have: three files that are no images, five odd ones."""
  photo = Image.fromarray(load_sample_image("china.jpg")).resize((60, 40))

  def save(image, name, kind, **options):
    image.save(tmp_path / name, kind, **options)

  whole = io.BytesIO()
  photo.save(whole, "JPEG")
  (tmp_path / "truncated.jpg").write_bytes(whole.getvalue()[:700])
  (tmp_path / "empty.png").write_bytes(b"")
  (tmp_path / "text.jpg").write_text("hello, this is a text")
  save(photo.convert("CMYK"), "cmyk.JPG", "JPEG")
  save(photo.convert("LA"), "grey_alpha.png", "PNG")
  save(photo.resize((1, 1)), "one.bmp", "BMP")
  save(photo.resize((8000, 10)), "long.webp", "WEBP")
  exif = Image.Exif()
  exif[0x0112] = 6
  save(photo, "rotated.jpeg", "JPEG", exif=exif)
  return image_folder(tmp_path, "train", 0.0)


def test_rough_folder_trains_and_names_bad_files_once(rough_folder, caplog):
  assert len(rough_folder) == 8
  first(6, rough_folder, Views(SPECS, 16), 8, 0)
  messages = warnings_of(caplog)
  assert len(messages) == 3
  for name in ("truncated.jpg", "empty.png", "text.jpg"):
    assert sum(name in message for message in messages) == 1
  images, labels, indices = evaluation_images(rough_folder, Centre(16, 18, "paper"))
  assert len(images) == len(labels) == len(indices) == 5
  messages = warnings_of(caplog)
  assert len(messages) == 3
  assert all("it is left out" in message for message in messages)


def test_worker_processes_change_nothing(rough_folder, caplog):
  views = Views(SPECS, 160, "device")  # large enough for shared memory
  args, kwargs = (rough_folder, views, 4, 3), {"start_step": 5}
  expected = first(7, *args, **kwargs)
  messages = warnings_of(caplog)
  assert len(messages) == 3
  for workers in (1, 2):
    batches = train_batches(*args, **kwargs, workers=workers)
    got = [next(batches) for _ in range(7)]
    assert len(multiprocessing.active_children()) == workers
    batches.close()
    assert not multiprocessing.active_children()
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)  # the arrays outlive the workers
    assert warnings_of(caplog) == messages


def test_replacements_depend_on_seed_and_record_only(tmp_path):
  bad = [3, 11, 30]
  good, broken = (
    first(8, folder_of(tmp_path / name, 40, records), Views(SPECS, 5), 10, 1)
    for name, records in (("good", []), ("broken", bad))
  )
  replaced = {}
  for clean, batch in zip(good, broken):
    assert not np.isin(batch["index"], bad).any()
    same = ~np.isin(clean["index"], bad)
    for key in batch:
      np.testing.assert_array_equal(clean[key][same], batch[key][same])
    for record, other in zip(clean["index"][~same].tolist(), batch["index"][~same].tolist()):
      replaced.setdefault(record, []).append(other)
  assert sorted(replaced) == bad
  assert all(one == other for one, other in replaced.values())  # in both epochs


def test_label_and_pixels_are_those_of_the_replacement(tmp_path):
  for i in range(12):
    path = tmp_path / "ab"[i % 2]
    path.mkdir(exist_ok=True)
    (path / f"{i}.png").write_bytes(b"")
  Image.new("RGB", (6, 5), (9, 9, 9)).save(tmp_path / "b" / "5.png")
  source = image_folder(tmp_path, "train", 0.0)
  (batch,) = first(1, source, Views(SPECS, 4, "device"), 24, 0, max_failed_share=1.0)
  assert {source.files[index] for index in batch["index"]} == {"b/5.png"}
  assert batch["label"].tolist() == [1] * 24
  assert (batch["view1"] == 9).all()
  assert len({float(hue) for hue in batch["draws1"].hue}) == 24  # but draws of their own


def test_too_many_unreadable_files_stop_the_run(tmp_path):
  source = folder_of(tmp_path / "images", 400, range(0, 400, 10))
  with train_batches(source, Views(SPECS, 4), 50, 0, max_failed_share=0.02) as batches:
    with pytest.raises(ValueError, match=r"\d+ of the \d+ records seen .*max_failed_share = 0\.02"):
      list(itertools.islice(batches, 100))
    assert not list(batches)
  assert len(first(16, source, Views(SPECS, 4), 50, 0, max_failed_share=0.2)) == 16


def test_nothing_but_unreadable_files(tmp_path):
  source = folder_of(tmp_path / "three", 3, range(3))
  with pytest.raises(
    ValueError, match=r"3 records in a row cannot be read.*\.png: the file is emp"
  ):
    first(1, source, Views(SPECS, 4), 2, 0)
  with pytest.raises(ValueError, match="no record can be read"):
    evaluation_images(source, Centre(4, 4, "paper"))
  with pytest.raises(ValueError, match="1 records in a row"):
    first(1, folder_of(tmp_path / "one", 1, [0]), Views(SPECS, 4), 2, 0)
  with pytest.raises(ValueError, match="3 of the 3 records seen"):
    list(evaluation_batches(source, Centre(4, 4, "paper"), 8, max_failed_share=0.0))
