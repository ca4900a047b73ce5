"""Prepared sets: read as they were written, by threads and processes; damage is found and named."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from byolx.data.decode import DecodeError, read_image
from byolx.data.prepare import write
from byolx.data.sources import array_record
from byolx.data.sources.base import EncodedSource
from byolx.data.sources.folders import image_folder
from byolx.data.sources.names import Names
from byolx.data.sources.prepared import prepared, verify
from byolx.data.sources.prepared_format import Index, read_index, read_manifest

CLASSES, OF_EACH = ("cat", "dog", "emu"), 14


def write_photographs(folder, classes=CLASSES, count=OF_EACH):
  """Crops of two photographs, so that every file is another."""
  photographs = [Image.fromarray(image) for image in load_sample_images().images]
  for c, name in enumerate(classes):
    (folder / name).mkdir(parents=True)
    for i in range(count):
      corner = 13 * i + 7 * c, 5 * i
      crop = photographs[(i + c) % 2].crop((*corner, corner[0] + 160 + i, corner[1] + 120))
      crop.save(folder / name / f"{i:02d}.jpg", quality=90)
  return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  return write_photographs(tmp_path_factory.mktemp("records") / "photos")


@pytest.fixture(scope="module")
def original(photographs):
  """A set in three shards; tests that damage it take a copy."""
  folder = photographs.parent / "set"
  write.prepare(photographs, folder, write.Options(shards=3))
  return folder


@pytest.fixture
def damaged(original, tmp_path):
  return Path(shutil.copytree(original, tmp_path / "set"))


def shard(folder, number):
  return folder / f"train-{number:05d}-of-00003.array_record"


def flip(path, position, bit=1):
  with open(path, "r+b") as file:
    file.seek(position)
    (old,) = file.read(1)
    file.seek(position)
    file.write(bytes([old ^ bit]))


def position_of(folder, index):
  """The shard of a record, and where in it some of its bytes are."""
  data, _ = prepared(folder, "train", 0.0).encoded(index)
  for number in range(3):
    found = shard(folder, number).read_bytes().find(data[len(data) // 2 :][:50])
    if found >= 0:
      return number, found
  raise AssertionError("the record is in no shard")


def reseal(folder):
  """Makes the digests in dataset.json those of the files, as who tampers with a set would."""
  manifest = json.loads((folder / "dataset.json").read_text())
  for split in manifest["splits"].values():
    for file in (split["index"], *split["shards"]):
      data = (folder / file["file"]).read_bytes()
      file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
  (folder / "dataset.json").write_text(json.dumps(manifest))


# Reading


def test_records_are_the_files(photographs, original):
  source = prepared(original, "train", test_share=0.0)
  files = image_folder(photographs, "train", test_share=0.0)
  assert isinstance(source, EncodedSource)
  assert (len(source), source.classes, source.name) == (3 * OF_EACH, CLASSES, "photos")
  assert list(source.names) == list(files.names)
  np.testing.assert_array_equal(source.labels, files.labels)
  for i, name in enumerate(files.names):
    data, key = source.encoded(i)
    assert key == name
    assert data == (photographs / name).read_bytes()
    image, label, key = source[i]
    assert (label, key) == (files.labels[i], name)
    np.testing.assert_array_equal(image, read_image(photographs / name))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_held_out_share_is_that_of_the_folder(photographs, original, share):
  for split in ("train", "test"):
    expected = image_folder(photographs, split, share)
    source = prepared(original, split, share)
    assert list(source.names) == list(expected.names)
    np.testing.assert_array_equal(source.labels, expected.labels)
    assert source[1].key == expected.names[1]


def test_index_out_of_range(original):
  source = prepared(original, "train", 0.0).source
  assert source.encoded(-1) == source.encoded(len(source) - 1)
  with pytest.raises(IndexError):
    source.encoded(len(source))


def checksums(source):
  return [zlib.crc32(source.encoded(i)[0]) for i in range(len(source))]


def test_another_process_reads_a_pickled_source(original):
  source = prepared(original, "train", 0.0)
  expected = checksums(source)
  assert len(pickle.dumps(source)) < 6000
  assert checksums(pickle.loads(pickle.dumps(source))) == expected
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(checksums, (source,)) == expected


def test_threads_share_a_source(original):
  source = prepared(original, "train", 0.0)
  expected = checksums(source)

  def read(seed):
    order = np.random.default_rng(seed).integers(0, len(source), 1500).tolist()
    return all(zlib.crc32(source.encoded(i)[0]) == expected[i] for i in order)

  with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(read, range(4)))


def test_few_shards_are_open_at_once(original, monkeypatch):
  monkeypatch.setattr(array_record, "MAX_OPEN", 2)
  source = prepared(original, "train", 0.0)
  before = set(os.listdir("/proc/self/fd"))
  expected = [int(crc32) for crc32 in source.source.crc32]
  for _ in range(3):
    assert checksums(source) == expected
  opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before
            if os.path.exists(f"/proc/self/fd/{fd}")]  # fmt: skip
  assert sum(path.endswith(".array_record") for path in opened) == 2


# Damage


def test_verify_finds_nothing_wrong(original):
  seen = []
  assert verify(original, lambda *done: seen.append(done), images=True, threads=2) == []
  assert sum(count for count, _ in seen) == 3 * OF_EACH


def test_a_flipped_bit_is_an_error_that_names_the_record(damaged):
  number, position = position_of(damaged, 20)
  flip(shard(damaged, number), position)
  source = prepared(damaged, "train", 0.0)
  name = source.names[20]
  with pytest.raises(DecodeError) as caught:
    source[20]
  assert str(caught.value).startswith(f"{name}: record 6 of {shard(damaged, number)}: ")
  assert "damaged" in str(caught.value)
  assert "\n" not in str(caught.value)
  for i in set(range(len(source))) - {20}:
    source[i]
  digest, record = verify(damaged)
  assert digest == f"{shard(damaged, number)} is damaged: its sha256 is not the one in dataset.json"
  assert record.startswith(f"{name}: record 6 of {shard(damaged, number)}: ")


def test_no_flipped_bit_gives_other_bytes(damaged):
  """Anywhere in a shard: either the right bytes, or an error; verify finds every one of them."""
  expected = [int(crc32) for crc32 in prepared(damaged, "train", 0.0).source.crc32]
  path, rng = shard(damaged, 1), np.random.default_rng(0)
  size, errors = path.stat().st_size, []
  places = [*rng.integers(0, size, 40), *range(0, 200, 9), *range(size - 65536, size - 65400, 5)]
  for place in places:
    bit = 1 << int(rng.integers(8))
    flip(path, int(place), bit)
    source = prepared(damaged, "train", 0.0)
    for i in range(OF_EACH, 2 * OF_EACH):
      try:
        assert zlib.crc32(source.encoded(i)[0]) == expected[i]
      except DecodeError as error:
        errors.append(str(error))
    assert verify(damaged)
    flip(path, int(place), bit)
  assert len(errors) >= 40
  assert all(str(path) in error for error in errors)
  assert verify(damaged) == []


def test_a_shard_with_other_records_of_the_same_size(damaged):
  """The container is whole, so that only the checksums of the index can tell."""
  from array_record.python.array_record_module import ArrayRecordWriter

  source = prepared(damaged, "train", 0.0)
  data = [bytearray(source.encoded(i)[0]) for i in range(OF_EACH, 2 * OF_EACH)]
  data[3][400] ^= 1
  path = shard(damaged, 1)
  writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  for record in data:
    writer.write(bytes(record))
  writer.close()
  reseal(damaged)
  source = prepared(damaged, "train", 0.0)
  place = f"{source.names[OF_EACH + 3]}: record 3 of {path}: "
  with pytest.raises(DecodeError, match=r"not the bytes that were prepared") as caught:
    source.encoded(OF_EACH + 3)
  assert str(caught.value).startswith(place)
  (problem,) = verify(damaged)
  assert problem.startswith(place)


def test_a_shard_that_is_cut_short_while_it_is_open(damaged):
  source = prepared(damaged, "train", 0.0)
  expected = checksums(source)
  path = shard(damaged, 2)
  os.truncate(path, 2000)
  errors = []
  for i in range(len(source)):
    try:
      assert zlib.crc32(source.encoded(i)[0]) == expected[i]
    except DecodeError as error:
      errors.append(str(error))
  assert len(errors) >= OF_EACH // 2
  assert all(str(path) in error for error in errors)


def test_a_shard_that_vanished_after_opening(damaged):
  source = prepared(damaged, "train", 0.0)
  shard(damaged, 0).unlink()
  with pytest.raises(DecodeError, match=r"record 2 of .*: the shard is missing; expected an Array"):
    source.encoded(2)
  assert source.encoded(2 * OF_EACH)
  shard(damaged, 1).write_bytes(b"no shard")
  with pytest.raises(
    DecodeError, match=r"the shard cannot be opened; expected an ArrayRecord file"
  ):
    source.encoded(OF_EACH)


def test_verify_goes_on_after_a_lost_shard_and_index(damaged):
  shard(damaged, 0).unlink()
  with open(shard(damaged, 2), "ab") as file:
    file.write(b"more")
  size = shard(damaged, 2).stat().st_size
  lost, longer = verify(damaged)
  assert lost.startswith(f"{shard(damaged, 0)}: No such file or directory; expected a file of ")
  assert longer == f"{shard(damaged, 2)} has {size} bytes; expected {size - 4}, as in dataset.json"
  flip(damaged / "train.index.npz", 300)
  assert "train.index.npz is damaged: its sha256" in verify(damaged)[0]
  assert len(verify(damaged)) == 3


def test_verify_can_decode(damaged):
  """A record that is what was written, and no image."""
  from array_record.python.array_record_module import ArrayRecordWriter

  data = [b"no image at all", b"\xff\xd8"]
  writer = ArrayRecordWriter(str(damaged / "x.array_record"), "group_size:1,uncompressed")
  for record in data:
    writer.write(record)
  writer.close()
  crc32 = np.array([zlib.crc32(record) for record in data], np.uint32)
  index = Index(np.array([0, 1], np.int32), crc32, Names.of(["a.jpg", "b.jpg"]))
  (damaged / "train.index.npz").write_bytes(index.to_bytes())
  manifest = json.loads((damaged / "dataset.json").read_text())
  shards = [{"file": "x.array_record", "records": 2, "bytes": 0, "sha256": ""}]
  manifest["splits"]["train"] |= {"records": 2, "shards": shards}
  (damaged / "dataset.json").write_text(json.dumps(manifest))
  reseal(damaged)
  assert verify(damaged) == []
  first, second = verify(damaged, images=True)
  path = damaged / "x.array_record"
  assert first.startswith("a.jpg: not a JPEG, PNG, WebP or BMP file")
  assert first.endswith(f"(record 0 of {path})")
  assert second.startswith("b.jpg: ")
  with pytest.raises(DecodeError, match=r"a\.jpg: not a JPEG"):
    prepared(damaged, "train", 0.0)[0]


# Opening


def test_what_is_no_set(tmp_path):
  with pytest.raises(ValueError, match=r"has no dataset.json; expected a folder written by `byolx"):
    prepared(tmp_path, "train")
  with pytest.raises(ValueError, match=r"has no dataset.json"):
    verify(tmp_path / "nowhere")
  (tmp_path / ".prepare").mkdir()
  with pytest.raises(ValueError, match=r"is an unfinished set, without dataset.json; run the same"):
    prepared(tmp_path, "train")


def test_unknown_split_and_empty_split(original):
  with pytest.raises(ValueError, match=r"split is 'val'; expected one of train, test"):
    prepared(original, "val")
  with pytest.raises(ValueError, match=r"has no record in the test split \(data.test_share 0.0\)"):
    prepared(original, "test", 0.0)


def test_missing_and_shortened_files(damaged):
  os.truncate(shard(damaged, 2), 1000)
  with pytest.raises(ValueError, match=r"train-00002-of-00003\.array_record has 1000 bytes; expec"):
    prepared(damaged, "train")
  shard(damaged, 1).unlink()
  with pytest.raises(ValueError, match=r"train-00001-of-00003.array_record: No such file or dir"):
    prepared(damaged, "train")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda m: m.update(format=2), "has the format 2; expected 1, which this version reads"),
    (lambda m: m.update(format="1"), "has the format '1'; expected 1"),
    (lambda m: m.pop("format"), "is damaged: 'format'"),
    (lambda m: m.pop("classes"), "is damaged: .*classes"),
    (lambda m: m.update(splits={}), "is damaged: the set has no split"),
    (lambda m: m.update(splits=[]), "is damaged: "),
    (lambda m: m["splits"].update(val=m["splits"]["train"]), "split is 'val'"),
    (lambda m: m["splits"]["train"].update(records=41), "do not have 41 records"),
    (lambda m: m["splits"]["train"]["shards"][0].pop("sha256"), "is damaged: .*sha256"),
    (
      lambda m: m["splits"]["train"]["shards"][0].update(file="../photos/cat/00.jpg"),
      "the file '../photos/cat/00.jpg' is not in the set's folder",
    ),
    (
      lambda m: m["splits"]["train"]["index"].update(file="/etc/passwd"),
      "the file '/etc/passwd' is not in the set's folder",
    ),
  ],
)
def test_manifests_that_are_refused(damaged, change, said):
  path = damaged / "dataset.json"
  manifest = json.loads(path.read_text())
  change(manifest)
  path.write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match=said) as caught:
    prepared(damaged, "train")
  assert str(path) in str(caught.value)


def test_a_manifest_that_is_cut_off(damaged):
  path = damaged / "dataset.json"
  path.write_text(path.read_text()[:100])
  with pytest.raises(
    ValueError, match=r"dataset\.json is damaged: .*expected a file of `byolx prepare`"
  ):
    prepared(damaged, "train")


# The index


class Boom:
  """What pickle would run on loading."""

  def __reduce__(self):
    return os.mkdir, (os.environ["BOOM"],)


def arrays(count=3 * OF_EACH):
  names = Names.of(f"{i}.jpg" for i in range(count))
  return {
    "labels": np.zeros(count, np.int32),
    "crc32": np.zeros(count, np.uint32),
    "key_bytes": np.frombuffer(names.buffer, np.uint8),
    "key_ends": names.ends,
  }


@pytest.mark.parametrize(
  "change",
  [
    {"labels": np.zeros(41, np.int32)},
    {"labels": np.full(42, 3, np.int32)},
    {"labels": np.full(42, -2, np.int32)},
    {"labels": np.zeros(42, np.int64)},
    {"crc32": np.zeros((42, 1), np.uint32)},
    {"key_ends": np.arange(42)[::-1].copy()},
    {"key_ends": np.arange(42)},
    {"key_bytes": np.zeros(3, np.uint8)},
  ],
)
def test_indices_that_do_not_fit(damaged, change):
  np.savez(damaged / "train.index.npz", **(arrays() | change))
  reseal(damaged)
  with pytest.raises(
    ValueError, match=r"train\.index\.npz is not an index of 42 records of 3 classes"
  ):
    prepared(damaged, "train")


def test_an_index_is_never_unpickled(damaged, tmp_path, monkeypatch):
  monkeypatch.setenv("BOOM", str(tmp_path / "boom"))
  trap = {"crc32": np.array([Boom()] * 42, object)}
  np.savez(damaged / "train.index.npz", **(arrays() | trap))
  reseal(damaged)
  with pytest.raises(ValueError, match=r"is not an index: Object arrays cannot be loaded"):
    prepared(damaged, "train")
  (damaged / "train.index.npz").write_bytes(pickle.dumps(Boom()))
  reseal(damaged)
  with pytest.raises(ValueError, match=r"is not an index: "):
    prepared(damaged, "train")
  assert not (tmp_path / "boom").exists()


def test_an_index_that_lacks_an_array_or_was_replaced(damaged):
  path = damaged / "train.index.npz"
  flip(path, 200)
  with pytest.raises(ValueError, match=r"is damaged: its sha256 is not the one in dataset.json"):
    prepared(damaged, "train")
  values = arrays()
  del values["crc32"]
  np.savez(path, **values)
  reseal(damaged)
  with pytest.raises(ValueError, match=r"is not an index: .*crc32"):
    prepared(damaged, "train")


def test_an_index_keeps_names_that_are_not_text(tmp_path):
  names = Names.of([os.fsdecode(b"a\xff.jpg"), "", "grün/ß.jpg"])
  index = Index(np.array([-1, 0, 1], np.int32), np.array([0, 2**32 - 1, 7], np.uint32), names)
  data = index.to_bytes()
  assert data == index.to_bytes()
  with np.load(io.BytesIO(data)) as stored:
    assert sorted(stored) == ["crc32", "key_bytes", "key_ends", "labels"]
  (tmp_path / "dataset.json").write_text(json.dumps({
    "format": 1, "name": "x", "byolx": "0", "encode": None, "classes": ["a", "b"],
    "splits": {"train": {
      "records": 3,
      "index": {"file": "i.npz", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
      "shards": [{"file": "s", "records": 3, "bytes": 0, "sha256": ""}],
    }},
  }))  # fmt: skip
  (tmp_path / "i.npz").write_bytes(data)
  manifest = read_manifest(tmp_path)
  found = read_index(tmp_path, manifest.splits["train"], 2)
  assert list(found.names) == list(names)
  np.testing.assert_array_equal(found.crc32, index.crc32)
  np.testing.assert_array_equal(found.labels, index.labels)
