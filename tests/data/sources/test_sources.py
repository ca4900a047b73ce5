"""Sources: scikit-learn's and Debian's data as they are; arrays, files and subsets of them."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from byolx.data.decode import DecodeError, decode
from byolx.data.sources.base import ArraySource, EncodedSource, FileSource, Source, Subset, subset
from byolx.data.sources.names import Names
from byolx.data.sources.small import (
  FASHION_MNIST_CLASSES,
  FASHION_MNIST_FOLDER,
  digits,
  fashion_mnist,
)

HAS_FASHION_MNIST = os.path.isdir(FASHION_MNIST_FOLDER)


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


# The kinds of source


@pytest.fixture
def photos(tmp_path):
  """A source of three crops of a photograph, in files of three formats."""
  picture = Image.fromarray(load_sample_image("flower.jpg"))
  for i, extension in enumerate(("png", "jpg", "webp")):
    path = tmp_path / f"class {i % 2}" / f"{i}.{extension}"
    path.parent.mkdir(exist_ok=True)
    picture.crop((40 * i, 30 * i, 40 * i + 64, 30 * i + 48)).save(path)
  files = Names.of(["class 0/0.png", "class 1/1.jpg", "class 0/2.webp"])
  labels = np.array([0, 1, 0], np.int32)
  return FileSource("photos", str(tmp_path), files, labels, ("class 0", "class 1"))


def test_files(photos):
  assert isinstance(photos, Source)
  assert isinstance(photos, EncodedSource)
  assert list(photos.names) == ["class 0/0.png", "class 1/1.jpg", "class 0/2.webp"]
  for i, name in enumerate(photos.names):
    path = os.path.join(photos.folder, name)
    with open(path, "rb") as file:
      assert photos.encoded(i) == (file.read(), path)
    np.testing.assert_array_equal(photos[i].image, decode(*photos.encoded(i)))
    assert photos[i][1:] == (photos.labels[i], path)
  np.testing.assert_array_equal(photos[0].image, load_sample_image("flower.jpg")[:48, :64])


def test_unreadable_files_are_named(photos):
  path = os.path.join(photos.folder, photos.names[1])
  os.truncate(path, os.path.getsize(path) - 200)
  photos.encoded(1)
  with pytest.raises(DecodeError, match=r"^.*class 1/1\.jpg: "):
    photos[1]
  os.remove(path)
  for read in (photos.encoded, photos.__getitem__):
    with pytest.raises(DecodeError, match=r"class 1/1\.jpg: No such file or directory$"):
      read(1)


def test_arrays_grey_and_coloured():
  rgb = load_sample_image("china.jpg")[:40, :48].reshape(2, 20, 48, 3)
  coloured = ArraySource("photo", rgb, np.array([1, 0], np.int32), ("top", "bottom"))
  grey = ArraySource("photo", rgb[..., 1], np.array([1, 0], np.int32), ("top", "bottom"))
  for source in (coloured, grey):
    assert isinstance(source, Source)
    assert not isinstance(source, EncodedSource)
    assert list(source.names) == [source[i].key for i in range(2)] == ["photo/0", "photo/1"]
  np.testing.assert_array_equal(coloured[1].image, rgb[1])
  np.testing.assert_array_equal(grey[1].image, np.stack([rgb[1, ..., 1]] * 3, axis=2))
  for source in (coloured, grey):  # an example may be written to
    source[0].image[:] = 0
    assert source[0].image.any()


def test_sources_can_be_pickled(photos, tmp_path):
  (tmp_path / "idx").mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
  write_idx(tmp_path / "idx/train-images-idx3-ubyte.gz", (0, 8, 3), (5, 28, 28), pixels.tobytes())
  write_idx(tmp_path / "idx/train-labels-idx1-ubyte.gz", (0, 8, 1), (5,), bytes([3, 1, 4, 1, 9]))
  fashion = fashion_mnist(tmp_path / "idx", "train")
  for source in (photos, digits("test"), fashion, subset(photos, np.array([2, 0]))):
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.name, copy.classes, len(copy)) == (source.name, source.classes, len(source))
    np.testing.assert_array_equal(copy.labels, source.labels)
    assert list(copy.names) == list(source.names)
    for i in range(len(source)):
      np.testing.assert_array_equal(copy[i].image, source[i].image)
      assert copy[i][1:] == source[i][1:]


def test_subset():
  source = digits("train")
  chosen = subset(source, np.array([5, 3, 900]))
  assert type(chosen) is Subset
  assert isinstance(chosen, Source)
  assert not isinstance(chosen, EncodedSource)
  assert (len(chosen), chosen.name, chosen.classes) == (3, "digits", source.classes)
  np.testing.assert_array_equal(chosen.labels, source.labels[[5, 3, 900]])
  assert list(chosen.names) == ["digits/5", "digits/3", "digits/900"]
  for i, record in enumerate((5, 3, 900)):
    np.testing.assert_array_equal(chosen[i].image, source[record].image)
    assert chosen[i].label == source.labels[record]


def test_subset_of_encoded_images(photos):
  chosen = subset(subset(photos, np.array([2, 1])), np.array([1]))
  assert isinstance(chosen, EncodedSource)
  assert list(chosen.names) == ["class 1/1.jpg"]
  assert chosen.encoded(0) == photos.encoded(1)
  np.testing.assert_array_equal(chosen[0].image, photos[1].image)
