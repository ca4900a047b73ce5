"""Storage that goes away: waited for where it may come back, named where it does not."""

import errno
import itertools
import os
import shutil
import threading

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from byolx.data.augment.distribution import ViewSpec
from byolx.data.decode import DecodeError
from byolx.data.loader import train_batches
from byolx.data.prepare import write
from byolx.data.sources import base, retry
from byolx.data.sources.folders import image_folder
from byolx.data.sources.prepared import prepared
from byolx.data.sources.retry import FolderLostError, with_retries
from byolx.data.transforms import Views


@pytest.fixture
def pauses(monkeypatch):
  """Short pauses; the list of those that were made."""
  made = []
  monkeypatch.setattr(retry, "PAUSES", (0.1, 0.2, 0.3))
  monkeypatch.setattr(retry.time, "sleep", made.append)
  return made


def failing(count, number):
  """A read that fails so often with an OSError of this number, then gives 'data'."""
  left = itertools.count(count, -1)

  def read():
    if next(left) <= 0:
      return "data"
    try:
      raise OSError(number, os.strerror(number))
    except OSError as error:
      raise DecodeError(f"a.jpg: {error.strerror}") from error

  return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_passes_is_waited_for(number, pauses, tmp_path, caplog):
  assert with_retries(failing(2, number), str(tmp_path)) == "data"
  assert pauses == [0.1, 0.2]
  assert f"a.jpg: {os.strerror(number)}; retry in 0.2 s" in caplog.text


def test_what_does_not_pass_is_a_bad_record(pauses, tmp_path):
  with pytest.raises(DecodeError, match=r"a\.jpg: Input/output error"):
    with_retries(failing(9, errno.EIO), str(tmp_path))
  assert pauses == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_a_bad_record_is_not_waited_for(number, pauses, tmp_path):
  with pytest.raises(DecodeError):
    with_retries(failing(1, number), str(tmp_path))
  assert pauses == []


@pytest.fixture
def photos(tmp_path):
  image = load_sample_image("flower.jpg")
  for i in range(12):
    path = tmp_path / "photos" / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), image[10 * i : 10 * i + 40, :50])
  return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["folder", "array_record"])
def test_a_folder_that_is_gone_is_named_and_one_that_returns_is_read_on(
  kind, photos, tmp_path, monkeypatch
):
  folder = photos
  if kind == "array_record":
    folder = tmp_path / "set"
    write.prepare(photos, folder, write.Options(shards=12, workers=1))
    monkeypatch.setattr(
      "byolx.data.sources.array_record.MAX_OPEN", 1
    )  # otherwise all stay open, and readable
    source = prepared(folder, "train")
  else:
    source = image_folder(folder, "train")
  before = [source[i].image for i in range(len(source))]
  monkeypatch.setattr(retry, "PAUSES", (0.2, 0.4, 0.8))
  away = tmp_path / "away"
  shutil.move(folder, away)
  timer = threading.Timer(0.5, shutil.move, (away, folder))
  timer.start()
  for i, image in enumerate(before):
    np.testing.assert_array_equal(source[i].image, image)
  timer.join()
  monkeypatch.setattr(retry, "PAUSES", (0.01, 0.02))
  shutil.move(folder, away)
  said = rf"data\.folder {folder} is gone, and did not come back in 0 s"
  with pytest.raises(FolderLostError, match=said):
    [source[i] for i in range(len(source))]
  batches = train_batches(source, Views((ViewSpec(),), 8), 4, 0)
  with batches, pytest.raises(FolderLostError, match="is gone"):
    next(batches)


def test_a_record_that_begins_to_fail_later_is_replaced_from_then_on(photos):
  source = image_folder(photos, "train", 0.0)
  assert isinstance(source, base.FileSource)

  def epochs(count, start):
    with train_batches(
      source, Views((ViewSpec(),), 8), 4, 0, start_step=start, prefetch=0
    ) as batches:
      return [next(batches)["index"].tolist() for _ in range(3 * count)]

  whole = epochs(8, 0)
  record = whole[20][1]
  (photos / source.names[record]).write_bytes(b"")
  later = epochs(2, 18)
  for before, after in zip(whole[18:], later, strict=True):
    for one, other in zip(before, after, strict=True):
      assert (one == other) == (one != record)
