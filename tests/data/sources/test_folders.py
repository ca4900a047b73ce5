"""Image trees in every state: folders of one's own, ImageNet, Places365."""

import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from byolx.data.decode import DecodeError
from byolx.data.sources.base import EncodedSource
from byolx.data.sources.folders import image_folder, imagenet, places365


def write_images(root, names, size=(6, 4)):
  """Files of one colour, which is a function of the name."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())
    Image.new("RGB", size, colour).save(path, "PNG")


def keys(source):
  return [os.path.relpath(source[i].key, source.folder) for i in range(len(source))]


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


def test_an_unlistable_folder_is_named(tmp_path, monkeypatch):
  write_images(tmp_path, ["a/0.png", "b/1.png"])
  scandir = os.scandir

  def refuse(path):
    if os.path.basename(path) == "b":
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(ValueError, match=r"b cannot be listed: Permission denied; expected a folder"):
    image_folder(tmp_path, "train")


def test_many_files_in_order_and_small_when_pickled(tmp_path):
  names = [f"{c:03d}/{i:04d}.jpg" for c in range(40) for i in range(50)]
  for c in range(40):
    (tmp_path / f"{c:03d}").mkdir()
  for name in names[::-1]:
    (tmp_path / name).touch()
  source = image_folder(tmp_path, "train", 0.0)
  assert list(source.names) == names
  np.testing.assert_array_equal(source.labels, np.repeat(np.arange(40), 50))
  assert len(pickle.dumps(source)) < 2000 * (12 + 8 + 4) + 2000
  assert list(image_folder(tmp_path, "train", 0.0).names) == names  # whichever thread was first


# imagenet

TRAIN = ("n01440764", "n01443537", "n02105855")


@pytest.fixture
def imagenet_folder(tmp_path):
  """Crops of a photograph, among them a CMYK JPEG and a PNG named .JPEG."""
  photo = Image.fromarray(load_sample_image("china.jpg"))
  for c, wnid in enumerate(TRAIN):
    for split in ("train", "val"):
      (tmp_path / split / wnid).mkdir(parents=True)
    for i in range(3):
      crop = photo.crop((60 * c, 50 * i, 60 * c + 96, 50 * i + 80))
      crop.save(tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG", quality=95)
    crop.save(tmp_path / "val" / wnid / f"ILSVRC2012_val_0000000{c}.JPEG")
  photo.crop((0, 0, 96, 80)).save(tmp_path / "train" / TRAIN[2] / "n02105855_2933.JPEG", "PNG")
  cmyk = photo.crop((0, 0, 96, 80)).convert("CMYK")
  cmyk.save(tmp_path / "train" / TRAIN[0] / "n01440764_9.JPEG", quality=95)
  return tmp_path


def test_imagenet(imagenet_folder):
  train, test = imagenet(imagenet_folder, "train"), imagenet(str(imagenet_folder), "test")
  assert isinstance(train, EncodedSource)
  assert train.name == test.name == "imagenet"
  assert train.classes == test.classes == TRAIN
  assert train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
  assert test.labels.tolist() == [0, 1, 2]
  assert train.names[0] == "n01440764/n01440764_0.JPEG"
  assert list(test.names) == [f"{c}/ILSVRC2012_val_0000000{i}.JPEG" for i, c in enumerate(TRAIN)]


def test_imagenets_odd_files_decode(imagenet_folder):
  source = imagenet(imagenet_folder, "train")
  photo = load_sample_image("china.jpg")[:80, :96].astype(int)
  odd = {name: i for i, name in enumerate(source.names)}
  np.testing.assert_array_equal(source[odd["n02105855/n02105855_2933.JPEG"]].image, photo)
  cmyk = source[odd["n01440764/n01440764_9.JPEG"]].image
  assert np.abs(cmyk - photo).mean() < 3
  path = imagenet_folder / "train" / source.names[5]
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(DecodeError, match=r"train/n01443537/n01443537_1\.JPEG: ") as caught:
    source[5]
  assert str(caught.value).startswith(str(path))


def test_some_classes_of_imagenet(imagenet_folder):
  (imagenet_folder / "val" / TRAIN[0] / "ILSVRC2012_val_00000000.JPEG").unlink()
  (imagenet_folder / "val" / TRAIN[0]).rmdir()
  source = imagenet(imagenet_folder, "test")
  assert source.labels.tolist() == [1, 2]
  assert source.classes == TRAIN


def rename(root, old, new):
  (root / old).rename(root / new)


def flatten_val(root):
  for path in sorted(root.glob("val/*/*")):
    path.rename(root / "val" / path.name)
    path.parent.rmdir()


@pytest.mark.parametrize(
  ("damage", "split", "message"),
  [
    (
      lambda root: rename(root, "train", "training"),
      "train",
      r"which has no train/ \(found: training, val\); expected a folder with train/<wnid>/",
    ),
    (
      lambda root: rename(root, "val", "validation"),
      "test",
      r"which has no val/ \(found: train, validation\); expected a folder with train/<wnid>/",
    ),
    (
      flatten_val,
      "test",
      r"val has no class folders, but 3 files such as ILSVRC2012_val_00000000\.JPEG; expected the"
      r" images sorted into val/<wnid>/, such as val/n01440764/",
    ),
    (
      lambda root: rename(root, "train/n01443537", "train/goldfish"),
      "train",
      r"train has the folder 'goldfish' \(1 of 3 are not wnids\); expected only wnids .*image_folder",
    ),
    (
      lambda root: rename(root, "val/n01443537", "val/n00000001"),
      "test",
      r"val has the class 'n00000001', which train/ does not have; expected some of its 3 classes",
    ),
    (
      lambda root: [path.unlink() for path in root.glob("train/*/*")],
      "train",
      r"whose train/ has 3 class folders without an image",
    ),
    (lambda root: rename(root, "train", "../gone"), "valid", "split is 'valid'; expected one of"),
  ],
)
def test_wrong_imagenet_folders(imagenet_folder, damage, split, message):
  damage(imagenet_folder)
  with pytest.raises(ValueError, match=message) as caught:
    imagenet(imagenet_folder, split)
  assert "\n" not in str(caught.value)


def test_a_missing_imagenet_folder(tmp_path):
  with pytest.raises(
    ValueError, match=r"data.folder is '', which does not exist; expected a folder"
  ):
    imagenet("", "train")
  (tmp_path / "train").mkdir()
  with pytest.raises(ValueError, match="train has no class folders; expected the images"):
    imagenet(tmp_path, "train")


# places365

TRAIN_LIST = (
  "/a/airfield/00000001.jpg 0\n"
  "/a/airfield/00000002.jpg 0\n"
  "/a/apartment_building/outdoor/00000001.jpg 1\n"
  "/z/zen_garden/00000001.jpg 2\n"
)


@pytest.fixture
def places_folder(tmp_path):
  (tmp_path / "places365_train_standard.txt").write_text(TRAIN_LIST)
  (tmp_path / "places365_val.txt").write_text(
    "Places365_val_00000001.jpg 2\nPlaces365_val_00000002.jpg 0\n"
  )
  write_images(tmp_path, [f"data_256{line.split()[0]}" for line in TRAIN_LIST.splitlines()])
  write_images(tmp_path, [f"val_256/Places365_val_0000000{i}.jpg" for i in (1, 2)])
  return tmp_path


PLACES = ("airfield", "apartment_building/outdoor", "zen_garden")


@pytest.mark.parametrize("with_categories", [False, True])
def test_places365(places_folder, with_categories):
  if with_categories:
    lines = ("/a/airfield 0", "/a/apartment_building/outdoor 1", "/z/zen_garden 2")
    (places_folder / "categories_places365.txt").write_text("\r\n".join(lines) + "\r\n")
    (
      places_folder / "data_256/a/airfield/00000002.jpg"
    ).unlink()  # nothing but the first is looked at
  train, test = places365(places_folder, "train"), places365(places_folder, "test")
  assert train.classes == test.classes == PLACES
  assert train.labels.tolist() == [0, 0, 1, 2]
  assert test.labels.tolist() == [2, 0]
  assert train.names[2] == "a/apartment_building/outdoor/00000001.jpg"
  assert keys(test) == ["Places365_val_00000001.jpg", "Places365_val_00000002.jpg"]
  assert train[3].key == str(places_folder / "data_256/z/zen_garden/00000001.jpg")
  assert train[3].image.shape == test[1].image.shape == (4, 6, 3)


@pytest.mark.parametrize("tree", ["data_large", "data_256_standard", "train", ""])
def test_trees_of_places365(places_folder, tree):
  for folder in (places_folder / "data_256").iterdir():
    (places_folder / tree).mkdir(exist_ok=True)
    folder.rename(places_folder / tree / folder.name)
  assert places365(places_folder, "train")[0].key == str(
    places_folder / tree / "a/airfield/00000001.jpg"
  )


def replace(root, file, text):
  (root / file).write_text(text)


@pytest.mark.parametrize(
  ("damage", "split", "message"),
  [
    (
      lambda root: (root / "places365_val.txt").unlink(),
      "test",
      r"places365_val\.txt cannot be read: No such file or directory; expected the folder of places",
    ),
    (
      lambda root: rename(root, "val_256", "valid"),
      "test",
      r"where places365_val\.txt begins with 'Places365_val_00000001\.jpg', which is not in val_256/,"
      r" val_large/, val/ or the folder itself",
    ),
    (
      lambda root: replace(root, "places365_val.txt", "Places365_val_00000001.jpg 2\nx.jpg\n"),
      "test",
      r"places365_val\.txt, line 2 is 'x\.jpg'; expected a file and a class",
    ),
    (
      lambda root: replace(root, "places365_val.txt", "Places365_val_00000001.jpg 3\n"),
      "test",
      r"places365_val\.txt has the class 3; expected 0 to 2",
    ),
    (
      lambda root: replace(root, "places365_train_standard.txt", "/a/airfield/00000001.jpg 1\n"),
      "train",
      r"places365_train_standard\.txt has no class 0; expected all from 0 to 1",
    ),
    (lambda root: replace(root, "places365_val.txt", ""), "test", r"places365_val\.txt is empty"),
  ],
)
def test_wrong_places365_folders(places_folder, damage, split, message):
  damage(places_folder)
  with pytest.raises(ValueError, match=message) as caught:
    places365(places_folder, split)
  assert "\n" not in str(caught.value)
