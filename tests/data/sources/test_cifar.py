"""CIFAR's pickles: read as they are, refused when they ask for anything else than arrays."""

import os
import pickle
import struct

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_image

from byolx.data.sources.cifar import cifar10, cifar100

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def photographs(count, start=0):
  """uint8 [count 32 32 3]: crops of a photograph."""
  photo = load_sample_image("flower.jpg")
  return np.stack(
    [photo[7 * i : 7 * i + 32, 9 * i : 9 * i + 32] for i in range(start, start + count)]
  )


def digit_images(count):
  """uint8 [count 32 32 3] and labels."""
  data = load_digits()
  images = [cv2.resize(image / 16 * 255, (32, 32)).round() for image in data.images[:count]]
  return np.repeat(np.array(images, np.uint8)[..., None], 3, axis=3), data.target[:count].tolist()


def planes(images):
  """CIFAR's rows of 3072 bytes: the red plane, the green plane, the blue plane."""
  return np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in images])


def python2(value):
  """The opcodes with which Python 2 pickles a value by protocol 2; arrays as numpy did then."""
  match value:
    case bool():
      return b"\x88" if value else b"\x89"
    case int():
      return b"J" + struct.pack("<i", value)
    case str():
      return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
    case bytes():
      return b"T" + struct.pack("<i", len(value)) + value
    case tuple():
      return b"(" + b"".join(map(python2, value)) + b"t"
    case list():
      return b"](" + b"".join(map(python2, value)) + b"e"
    case dict():
      return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    case None:
      return b"N"
  dtype = b"cnumpy\ndtype\n" + python2(("u1", 0, 1)) + b"R"
  dtype += python2((3, "|", None, None, None, -1, -1, 0)) + b"b"
  made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + b"U\x01btR"
  state = b"(" + python2(1) + python2(value.shape) + dtype + python2(False)
  return made + state + python2(value.tobytes()) + b"tb"


def dump(path, value):
  path.write_bytes(b"\x80\x02" + python2(value) + b".")


@pytest.fixture
def cifar10_folder(tmp_path):
  folder = tmp_path / "cifar-10-batches-py"
  folder.mkdir()
  dump(
    folder / "batches.meta",
    {"num_cases_per_batch": 4, "label_names": list(CLASSES), "num_vis": 3072},
  )
  for i in range(5):
    data = {"data": planes(photographs(4, 4 * i)), "labels": [i, 9, 0, i + 1], "batch_label": "b"}
    dump(folder / f"data_batch_{i + 1}", {**data, "filenames": ["a.png"] * 4})
  dump(folder / "test_batch", {"data": planes(photographs(3, 20)), "labels": [1, 2, 3]})
  return folder


def test_cifar10(cifar10_folder):
  train, test = cifar10(cifar10_folder, "train"), cifar10(str(cifar10_folder.parent), "test")
  assert (train.name, train.classes) == ("cifar10", CLASSES)
  assert (len(train), len(test)) == (20, 3)
  np.testing.assert_array_equal(train.images, photographs(20))
  np.testing.assert_array_equal(test[2].image, photographs(1, 22)[0])
  assert train.labels.tolist() == [0, 9, 0, 1, 1, 9, 0, 2, 2, 9, 0, 3, 3, 9, 0, 4, 4, 9, 0, 5]
  assert test[1].label == 2
  assert test.names[2] == test[2].key == "cifar10/2"


@pytest.mark.parametrize("write", [dump, lambda path, v: path.write_bytes(pickle.dumps(v, 2))])
def test_cifar100(tmp_path, write):
  """As Python 2 wrote it, and as Python 3 and a new numpy write it."""
  images, labels = digit_images(12)
  fine = [f"digit {i}" for i in range(10)]
  write(tmp_path / "meta", {"fine_label_names": fine, "coarse_label_names": ["odd", "even"]})
  coarse = [label % 2 for label in labels]
  for split, part in (("train", slice(8)), ("test", slice(8, 12))):
    content = {"coarse_labels": coarse[part], "fine_labels": labels[part]}
    write(tmp_path / split, {"data": planes(images[part]), **content})
    source = cifar100(tmp_path, split)
    np.testing.assert_array_equal(source.images, images[part])
    np.testing.assert_array_equal(source.labels, labels[part])
    assert source.classes == tuple(fine)


def test_my_python2_pickles_are_pickles():
  value = {"data": planes(photographs(2)), "labels": [3, 1], "nothing": None, "yes": True}
  read = pickle.loads(b"\x80\x02" + python2(value) + b".", encoding="latin1")
  np.testing.assert_array_equal(read.pop("data"), value.pop("data"))
  assert read == value


# What is refused


class Call:
  """Pickles as a call."""

  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
  ("function", "name"),
  [(os.mkdir, r"posix\.mkdir|nt\.mkdir"), (exec, r"builtins\.exec|__builtin__\.exec")],
)
def test_nothing_runs(cifar10_folder, tmp_path, protocol, function, name):
  target = tmp_path / "was here"
  argument = str(target) if function is os.mkdir else f"import os; os.mkdir({str(target)!r})"
  payload = pickle.dumps({"data": Call(function, argument)}, protocol)
  pickle.loads(payload)
  target.rmdir()  # so it does run elsewhere
  for file in ("test_batch", "batches.meta"):
    (cifar10_folder / file).write_bytes(payload)
    with pytest.raises(
      ValueError, match=rf"{file} refers to ({name}); expected nothing but arrays"
    ):
      cifar10(cifar10_folder, "test")
    assert not target.exists()


@pytest.mark.parametrize(
  "opcodes",
  [
    b"cnumpy\nload\n.",
    b"cnumpy.f2py\nos\n.",
    b"cos\nsystem\nU\x04true\x85R.",
    b"cnumpy\nndarray.__reduce__\n.",
    b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x05rot13tR.",
    b"\x82\x01.",  # an extension of copyreg
    b"U\x01aQ.",  # a persistent id
  ],
)
def test_other_names_are_refused(cifar10_folder, opcodes):
  (cifar10_folder / "test_batch").write_bytes(b"\x80\x02" + opcodes)
  with pytest.raises(ValueError, match=r"test_batch (refers to|is damaged)"):
    cifar10(cifar10_folder, "test")


def test_what_a_pickle_changes_stays_in_it(cifar10_folder):
  """BUILD sets attributes on what it is given, here on the stand-in for `_reconstruct`."""
  good = (cifar10_folder / "test_batch").read_bytes()
  change = b"cnumpy.core.multiarray\n_reconstruct\n(N}(X\x0c\0\0\0__defaults__K\x07\x85utb0"
  for content in (good[:2] + change + good[2:], good):
    (cifar10_folder / "test_batch").write_bytes(content)
    np.testing.assert_array_equal(cifar10(cifar10_folder, "test").images, photographs(3, 20))


GOOD = {"data": planes(photographs(3)), "labels": [1, 2, 3]}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (GOOD | {"labels": [1, 2]}, "holds 3 images and 2 labels"),
    (GOOD | {"labels": [1, 2, 10]}, "labels go from 1 to 10; expected 0 to 9"),
    (GOOD | {"labels": [1, 2, -1]}, "labels go from -1 to 2; expected 0 to 9"),
    (GOOD | {"labels": [1, 2, True]}, "labels is not a list of integers"),
    (GOOD | {"labels": "123"}, "labels is not a list of integers"),
    (
      GOOD | {"data": [1, 2]},
      r"data is not an array of bytes; expected uint8 of shape \(n, 3072\)",
    ),
    (GOOD | {"data": GOOD["data"][:, :-1]}, r"data is of shape \(3, 3071\)"),
    (GOOD | {"data": GOOD["data"].ravel()}, r"data is of shape \(9216,\)"),
    (GOOD | {"data": GOOD["data"][:0]}, r"data is of shape \(0, 3072\)"),
    ({"data": GOOD["data"]}, "has no 'labels'; expected data and labels in it"),
    ([GOOD], "holds a list; expected a dict"),
  ],
)
def test_wrong_contents(cifar10_folder, content, message):
  dump(cifar10_folder / "test_batch", content)
  with pytest.raises(ValueError, match=f"test_batch:? {message}") as caught:
    cifar10(cifar10_folder, "test")
  assert "\n" not in str(caught.value)


def test_arrays_of_other_types_and_sizes(cifar10_folder):
  for array in (GOOD["data"].astype(np.float32), np.array([[{}, []]], object)):
    (cifar10_folder / "test_batch").write_bytes(pickle.dumps(GOOD | {"data": array}, 2))
    with pytest.raises(ValueError, match="data is not an array of bytes"):
      cifar10(cifar10_folder, "test")
  raw = b"\x80\x02" + python2(GOOD) + b"."
  shape = python2((3, 3072))
  assert raw.count(shape) == 1
  for wrong in ((3_000_000, 3072), (-3, -3072), (3,), (3.5, 3072)):
    other = b"(G" + struct.pack(">d", 3.5) + b"Kut" if 3.5 in wrong else python2(wrong)
    (cifar10_folder / "test_batch").write_bytes(raw.replace(shape, other))
    with pytest.raises(ValueError, match="data is not an array of bytes"):
      cifar10(cifar10_folder, "test")


def test_damaged_and_missing_files(cifar10_folder, tmp_path):
  good = (cifar10_folder / "test_batch").read_bytes()
  for damaged in (b"", good[:-1], good[:5000], b"<html>not found</html>", good[40:]):
    (cifar10_folder / "test_batch").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"test_batch (is damaged|holds a|has no|refers to)"):
      cifar10(cifar10_folder, "test")
  (cifar10_folder / "data_batch_3").unlink()
  with pytest.raises(ValueError, match=r"data_batch_3 cannot be read: No such file"):
    cifar10(cifar10_folder, "train")
  for folder in ("", tmp_path / "gone", tmp_path):
    with pytest.raises(
      ValueError, match=r"^data.folder is .*, which has no meta; expected cifar-100-py"
    ):
      cifar100(folder, "train")
  with pytest.raises(ValueError, match="split is 'val'; expected one of train, test"):
    cifar10(cifar10_folder, "val")
