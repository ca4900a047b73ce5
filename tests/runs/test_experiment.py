"""build_sources: every data.source opens its set; data.validation keeps training images apart."""

import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from sklearn.datasets import load_sample_image

from byolx.core.config import ConfigError
from byolx.data import splits
from byolx.data.augment import resizing
from byolx.data.sources.base import EncodedSource
from byolx.runs import config, experiment
from byolx.runs.images import build_sources

WNIDS = ("n01440764", "n01443537", "n01484850")


def settings(**data):
  cfg = config.defaults()
  cfg.data.update(data)
  config.check(cfg)
  return cfg


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
  """10,101 training files, of which one is an image, and three of `val`."""
  root = tmp_path_factory.mktemp("imagenet")
  for wnid in WNIDS:
    for split, count in (("train", 3367), ("val", 1)):
      (root / split / wnid).mkdir(parents=True)
      for i in range(count):
        (root / split / wnid / f"{wnid}_{i}.JPEG").touch()
  first = root / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
  Image.fromarray(load_sample_image("china.jpg")[:64, :80]).save(first, quality=95)
  return root


def test_imagenet_with_its_own_test_split(imagenet):
  train, validation, test, _ = build_sources(settings(source="imagenet", folder=str(imagenet)))
  assert validation is None
  assert (len(train), len(test), train.classes) == (10_101, 3, WNIDS)
  assert train[0].image.shape == (64, 80, 3)


@pytest.mark.parametrize(("rule", "held"), [("last_10009", 10_009), ("first_10000", 10_000)])
@pytest.mark.parametrize("source", ["imagenet", "image_folder"])
def test_validation_images_leave_the_training_images(imagenet, source, rule, held):
  whole = build_sources(settings(source=source, folder=str(imagenet))).train
  given = settings(source=source, folder=str(imagenet), validation=rule)
  images = build_sources(given)
  train, test = images.train, images.validation
  assert images.test is None
  assert images.held_out == ("validation", test)
  assert (len(train), len(test)) == (10_101 - held, held)
  assert sorted([*train.names, *test.names]) == sorted(whole.names)
  expected = splits.imagenet_validation(list(whole.names), rule)[1]
  assert list(test.names) == [whole.names[i] for i in expected.tolist()]
  np.testing.assert_array_equal(test.labels, whole.labels[expected])
  assert isinstance(train, EncodedSource)
  assert train.classes == test.classes == WNIDS


def test_validation_needs_no_val(imagenet):
  (imagenet / "val").rename(imagenet / "elsewhere")
  try:
    build_sources(settings(source="imagenet", folder=str(imagenet), validation="last_10009"))
    with pytest.raises(ConfigError, match="which has no val/"):
      build_sources(settings(source="imagenet", folder=str(imagenet)))
  finally:
    (imagenet / "elsewhere").rename(imagenet / "val")


def test_too_few_images_for_a_validation_set():
  with pytest.raises(
    ConfigError,
    match=r"^data\.validation=last_10009: last_10009 holds out 10009 of 1437 training images;"
    r" expected more than 10009; the rule is ImageNet's \(data\.source=imagenet, ",
  ):
    build_sources(settings(source="digits", validation="last_10009"))


@pytest.mark.parametrize(
  ("source", "said"),
  [
    ("image_folder", "expected a folder with one subfolder of images per class"),
    ("imagenet", "expected a folder with train/<wnid>/"),
    ("places365", "expected the folder of places365_train_standard.txt"),
    ("cifar10", "expected cifar-10-batches-py"),
    ("cifar100", "expected cifar-100-python"),
    ("array_record", "expected a folder written by `byolx prepare`"),
    ("tfds", "expected a folder that TensorFlow Datasets prepared"),
    ("fashion_mnist", "install the package dataset-fashion-mnist"),
  ],
)
def test_a_folder_that_is_something_else(tmp_path, source, said):
  writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
  writer.close()
  folder = tmp_path / "empty" if source == "image_folder" else tmp_path
  with pytest.raises(ConfigError, match=said) as caught:
    build_sources(settings(source=source, folder=str(folder)))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["paper", "reference"])
@pytest.mark.parametrize("antialias", [None, False, True])
def test_evaluation_crops_are_made_as_the_config_says(rule, antialias):
  cfg = config.load(
    "configs/quickstart.py",
    ["--config.views.size=4", "--config.eval.resize=5", f"--config.eval.crop_rule={rule}"]
    + ([] if antialias is None else [f"--config.eval.antialias={antialias}"]),
  )
  exp = experiment.build(cfg)
  with exp.evaluation_batches(exp.sources.test) as batches:
    batch = next(batches)
  for number in (0, 7):
    original = exp.sources.test[number].image
    expected = resizing.evaluation_view(original, 4, 5, rule, bool(antialias))
    np.testing.assert_array_equal(batch["image"][number], expected)
    other = resizing.evaluation_view(original, 4, 5, rule, not antialias)
    assert (batch["image"][number] != other).any()


def test_a_config_from_before_a_field_has_its_default():
  flat = json.loads(config.to_json(config.defaults()))
  del flat["eval.antialias"]
  assert config.from_json(json.dumps(flat)).eval.antialias is False
