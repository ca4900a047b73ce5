"""Sources: scikit-learn's and Debian's data as they are, folders in every state."""

import gzip
import logging
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from byolx.data.decode import DecodeError
from byolx.data.sources import (
  FASHION_MNIST_CLASSES,
  FASHION_MNIST_FOLDER,
  Subset,
  digits,
  fashion_mnist,
  image_folder,
)

HAS_FASHION_MNIST = os.path.isdir(FASHION_MNIST_FOLDER)


def write_images(root, names, size=(6, 4)):
  """Files of one colour, which is a function of the name."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())
    Image.new("RGB", size, colour).save(path, "PNG")


def keys(source):
  return [os.path.relpath(source[i].key, source.folder) for i in range(len(source))]


# digits


def test_digits_are_scikit_learns():
  data = load_digits()
  everything = {image.tobytes() + bytes([y]): 0 for image, y in zip(data.images, data.target)}
  for split, size in (("train", 1437), ("test", 360)):
    source = digits(split)
    assert len(source) == len(source.labels) == size
    assert source.classes == tuple("0123456789")
    for i in range(size):
      image, label, key = source[i]
      assert image.shape == (8, 8, 3)
      assert image.dtype == np.uint8
      assert (image == image[..., :1]).all()
      assert label == source.labels[i]
      assert key == f"digits/{i}"
      everything[np.rint(image[..., 0] * (16 / 255)).tobytes() + bytes([label])] += 1
  # Every image in exactly one split (some are there twice, as in the data).
  assert sum(everything.values()) == 1797
  assert all(everything.values())


def test_digits_scale_and_strata():
  image = digits("train")[0].image
  assert set(np.unique(image)) <= {round(x * 255 / 16) for x in range(17)}
  counts = np.bincount(digits("test").labels)
  expected = np.bincount(load_digits().target) * 360 / 1797
  assert (np.abs(counts - expected) < 1).all()
  assert len(digits("test", 0.5)) == 899
  np.testing.assert_array_equal(digits("test").images, digits("test").images)


@pytest.mark.parametrize("make", [digits, lambda split: fashion_mnist("", split)])
def test_unknown_split(make):
  with pytest.raises(ValueError, match="split is 'validation'; expected one of train, test"):
    make("validation")


# fashion_mnist


def write_idx(path, magic, dims, body):
  header = struct.pack(">HBB", *magic) + struct.pack(f">{len(dims)}I", *dims)
  path.write_bytes(gzip.compress(header + body))


@pytest.fixture
def idx_folder(tmp_path):
  """Five training images and their labels."""
  pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
  write_idx(tmp_path / "train-images-idx3-ubyte.gz", (0, 8, 3), (5, 28, 28), pixels.tobytes())
  write_idx(tmp_path / "train-labels-idx1-ubyte.gz", (0, 8, 1), (5,), bytes([3, 1, 4, 1, 9]))
  return tmp_path, pixels


def test_idx_files(idx_folder):
  folder, pixels = idx_folder
  source = fashion_mnist(folder, "train")
  np.testing.assert_array_equal(source.labels, [3, 1, 4, 1, 9])
  np.testing.assert_array_equal(source[2].image, np.repeat(pixels[2][..., None], 3, axis=2))
  assert source.classes[source[4].label] == "Ankle boot"


@pytest.mark.parametrize(
  ("magic", "dims", "size", "message"),
  [
    ((0, 13, 3), (5, 28, 28), 5 * 784, "starts with 00000d03; expected the IDX magic 00000803"),
    ((0, 8, 1), (5,), 5, "starts with 00000801; expected the IDX magic 00000803"),
    ((0, 8, 3), (5, 28, 27), 5 * 28 * 27, r"items of shape \(28, 27\); expected \(28, 28\)"),
    ((0, 8, 3), (6, 28, 28), 5 * 784, "unpacks to 3936 bytes; expected 4720 for shape"),
    ((0, 8, 3), (5, 28, 28), 5 * 784 + 1, "unpacks to 3937 bytes; expected 3936"),
    ((0, 8, 3), (4, 28, 28), 4 * 784, "4 train images and 5 labels"),
    ((0, 8, 3), (), 0, r"items of shape \(0, 0\)"),
  ],
)
def test_wrong_idx_files(idx_folder, magic, dims, size, message):
  folder, _ = idx_folder
  write_idx(folder / "train-images-idx3-ubyte.gz", magic, dims, bytes(size))
  with pytest.raises(ValueError, match=message):
    fashion_mnist(folder, "train")


def test_damaged_and_missing_idx_files(idx_folder):
  folder, _ = idx_folder
  with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz .*install.*data\.folder"):
    fashion_mnist(folder, "test")
  labels = folder / "train-labels-idx1-ubyte.gz"
  write_idx(labels, (0, 8, 1), (5,), bytes([1, 2, 3, 4, 10]))
  with pytest.raises(ValueError, match="a train label is 10; expected classes 0 to 9"):
    fashion_mnist(folder, "train")
  for damaged in (labels.read_bytes()[:-9], b"not gzip", b""):
    labels.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz"):
      fashion_mnist(folder, "train")


if HAS_FASHION_MNIST:  # Debian's package, where it is installed

  @pytest.mark.parametrize(("split", "size"), [("train", 60000), ("test", 10000)])
  def test_fashion_mnist_of_debian(split, size):
    source = fashion_mnist(None, split)
    assert len(source) == size
    assert source.classes == FASHION_MNIST_CLASSES
    np.testing.assert_array_equal(np.bincount(source.labels), [size // 10] * 10)
    assert source[0].image.shape == (28, 28, 3)
    # The data set's published mean and standard deviation.
    pixels = source.images[:: size // 5000] / 255
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [0.2860, 0.3530], atol=0.005)


# image_folder


def test_class_folders(tmp_path):
  names = [f"{c}/{i}.png" for c in ("cat", "ant", "bee") for i in range(10)]
  write_images(tmp_path, [*names, "bee/nested/deep/x.JPEG", "ant/.hidden.png", ".git/a.png"])
  (tmp_path / "ant" / "notes.txt").write_text("text")
  (tmp_path / "LICENSE").write_text("text")
  train, test = (image_folder(tmp_path, split, 0.2) for split in ("train", "test"))
  assert train.classes == test.classes == ("ant", "bee", "cat")
  assert sorted(keys(train) + keys(test)) == sorted([*names, "bee/nested/deep/x.JPEG"])
  assert len(test) == 7  # ceil(0.2 * 31)
  assert sorted(np.bincount(test.labels)) == [2, 2, 3]
  for source in (train, test):
    assert source.labels.dtype == np.int32
    for key, label in zip(keys(source), source.labels):
      assert source.classes[label] == key.split(os.sep)[0]
  image, label, key = train[0]
  np.testing.assert_array_equal(image, Image.open(key).convert("RGB"))
  assert label == train.labels[0]


def test_split_depends_on_names_only(tmp_path):
  names = [f"{c}/{i}.png" for c in "ab" for i in range(15)]
  write_images(tmp_path / "one", names)
  write_images(tmp_path / "elsewhere" / "two", names[::-1], size=(3, 3))
  assert keys(image_folder(tmp_path / "one", "test")) == keys(
    image_folder(tmp_path / "elsewhere" / "two", "test")
  )


def test_flat_folder(tmp_path):
  write_images(tmp_path, [f"{i}.png" for i in range(10)])
  (tmp_path / "empty").mkdir()
  train, test = (image_folder(str(tmp_path), split, 0.3) for split in ("train", "test"))
  assert (len(train), len(test)) == (7, 3)
  assert train.classes == ()
  assert set(train.labels) == set(test.labels) == {-1}


@pytest.mark.parametrize("second", ["val", "test"])
def test_folders_of_splits(tmp_path, second):
  write_images(tmp_path, [f"train/{c}/{i}.png" for c in "abc" for i in range(3)])
  write_images(tmp_path, [f"{second}/{c}/{i}.png" for c in "bc" for i in range(2)])
  train, test = (image_folder(tmp_path, split) for split in ("train", "test"))
  assert keys(train) == [f"{c}/{i}.png" for c in "abc" for i in range(3)]
  assert keys(test) == [f"{c}/{i}.png" for c in "bc" for i in range(2)]
  assert test.classes == train.classes == ("a", "b", "c")
  assert test.labels.tolist() == [1, 1, 2, 2]


def test_unlabelled_test_folder_gives_way_to_val(tmp_path):
  write_images(tmp_path, ["train/a/0.png", "val/a/1.png", "test/2.png"])  # as ImageNet has it
  assert keys(image_folder(tmp_path, "test")) == ["a/1.png"]
  write_images(tmp_path, ["test/a/3.png"])
  assert keys(image_folder(tmp_path, "test")) == ["a/3.png"]


def test_only_a_train_folder_is_entered(tmp_path):
  write_images(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(5)])
  assert image_folder(tmp_path, "train").classes == ("a", "b")
  assert len(image_folder(tmp_path, "test")) == 2


def test_classes_of_the_splits_must_fit(tmp_path):
  write_images(tmp_path, ["train/a/0.png", "val/a/1.png", "val/z/1.png"])
  with pytest.raises(ValueError, match=r"val has the class 'z', which train/ does not have"):
    image_folder(tmp_path, "test")


def test_links_are_followed_once(tmp_path):
  write_images(tmp_path, ["data/a/0.png", "store/1.png"])
  (tmp_path / "data" / "b").symlink_to(tmp_path / "store")
  (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a")
  source = image_folder(tmp_path / "data", "train", 0.0)
  assert keys(source) == ["a/0.png", "b/1.png"]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda root: root / "gone", "gone', which does not exist"),
    (lambda root: root / "file.png", "file.png', which is not a folder"),
    (lambda root: root / "empty", "train split has no image"),
    (lambda root: root / "texts", "train split has no image"),
    (lambda root: "", "data.folder is '', which does not exist"),
  ],
)
def test_wrong_folders(tmp_path, make, message):
  write_images(tmp_path, ["file.png"])
  (tmp_path / "empty").mkdir()
  (tmp_path / "texts" / "a").mkdir(parents=True)
  (tmp_path / "texts" / "a" / "readme.md").write_text("text")
  with pytest.raises(ValueError, match=message) as caught:
    image_folder(make(tmp_path), "train")
  message = str(caught.value)
  assert message.startswith("data.folder is ")
  assert "expected a folder with one subfolder of images per class" in message
  assert "\n" not in message


def test_empty_test_split(tmp_path):
  write_images(tmp_path, ["a/0.png", "b/1.png"])
  assert len(image_folder(tmp_path, "train")) == 2
  with pytest.raises(ValueError, match=r"test split has no image \(2 found, data.test_share 0.2\)"):
    image_folder(tmp_path, "test")


def test_the_log_counts_other_files(tmp_path, caplog):
  write_images(tmp_path, ["a/0.png", "a/1.png", "beside.png"])
  for name in ("a/x.txt", "a/y.TXT", "b.gif"):
    (tmp_path / name).write_text("text")
  with caplog.at_level(logging.INFO, logger="byolx"):
    image_folder(tmp_path, "train", 0.0)
  (record,) = caplog.records
  message = record.getMessage()
  assert "2 images, 1 classes in the train split; 4 other files ignored" in message
  assert "2 .txt" in message
  assert "1 .gif" in message
  assert "1 images beside the class folders" in message


def test_unreadable_files_raise_when_asked_for(tmp_path):
  write_images(tmp_path, ["a/0.png"])
  (tmp_path / "a" / "bad.jpg").write_bytes(b"")
  source = image_folder(tmp_path, "train", 0.0)
  assert source[0].image.shape == (4, 6, 3)
  with pytest.raises(DecodeError, match=r"a/bad\.jpg: the file is empty"):
    source[1]


def test_sources_can_be_pickled(tmp_path, idx_folder):
  write_images(tmp_path / "images", [f"{c}/{i}.png" for c in "ab" for i in range(3)])
  folder, _ = idx_folder
  images = image_folder(tmp_path / "images", "train")
  for source in (images, digits("test"), fashion_mnist(folder, "train")):
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.name, copy.classes, len(copy)) == (source.name, source.classes, len(source))
    np.testing.assert_array_equal(copy.labels, source.labels)
    for i in range(len(source)):
      np.testing.assert_array_equal(copy[i].image, source[i].image)
      assert copy[i][1:] == source[i][1:]


def test_subset():
  source = digits("train")
  subset = Subset(source, np.array([5, 3, 900]))
  assert (len(subset), subset.name, subset.classes) == (3, "digits", source.classes)
  np.testing.assert_array_equal(subset.labels, source.labels[[5, 3, 900]])
  for i, record in enumerate((5, 3, 900)):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(subset))[i].image, source[record].image)
    assert subset[i].label == source.labels[record]
