"""Sets of TensorFlow Datasets in ArrayRecord: made by hand, and by that library where it is."""

import importlib.util
import io
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from sklearn.datasets import load_sample_image

from byolx.data.decode import DecodeError
from byolx.data.sources import tfds as tfds_room
from byolx.data.sources.base import EncodedSource, subset
from byolx.data.sources.tfds import tfds

HAS_TFDS = importlib.util.find_spec("tensorflow_datasets") is not None
CLASSES = ("cat", "dog", "emu")


def picture(number):
  """The bytes of a JPEG: a crop of a photograph."""
  photo = load_sample_image("china.jpg")
  file = io.BytesIO()
  Image.fromarray(photo[3 * number :, 5 * number :][:40, :56]).save(file, "JPEG", quality=95)
  return file.getvalue()


def pixels(data):
  return np.asarray(Image.open(io.BytesIO(data)))


def chunk(number, data):
  """A field of protocol buffers; sizes below 2**21."""
  size = len(data)
  return bytes([number << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + data


def example(features):
  """A tf.Example of bytes and ints."""
  entries = b""
  for key, value in features.items():
    if isinstance(value, int):
      number = bytes([value]) if value >= 0 else b"\xff" * 9 + b"\x01"
      value = chunk(3, chunk(1, number))
    else:
      value = chunk(1, chunk(1, value))
    entries += chunk(1, chunk(1, key.encode()) + chunk(2, value))
  return chunk(1, entries)


def feature(kind, **content):
  return {"pythonClassName": f"tensorflow_datasets.core.features.x_feature.{kind}", **content}


FEATURES = {
  "image": feature("Image", image={"dtype": "uint8"}),
  "label": feature("ClassLabel", classLabel={"numClasses": "3"}),
  "file_name": feature("Text", text={}),
}


def write_set(folder, splits, features=FEATURES, **info):
  """Splits are lists of files, which are lists of records."""
  folder.mkdir(parents=True, exist_ok=True)
  described = []
  for split, shards in splits.items():
    for i, records in enumerate(shards):
      path = folder / f"pets-{split}.array_record-{i:05d}-of-{len(shards):05d}"
      writer = ArrayRecordWriter(str(path), "group_size:1")
      for record in records:
        writer.write(record)
      writer.close()
    lengths = [str(len(records)) for records in shards]
    described.append({"name": split, "shardLengths": lengths})
  info = {"name": "pets", "fileFormat": "array_record", "splits": described} | info
  (folder / "dataset_info.json").write_text(json.dumps(info))
  described = {"pythonClassName": "FeaturesDict", "featuresDict": {"features": features}}
  (folder / "features.json").write_text(json.dumps(described))
  (folder / "label.labels.txt").write_text("\n".join(CLASSES) + "\n")


def record(number, label):
  return example({"file_name": f"p{number}.jpg".encode(), "image": picture(number), "label": label})


@pytest.fixture
def pets(tmp_path):
  """Eight training records in three files, one of them empty; three for validation."""
  train = [[record(i, i % 3) for i in range(5)], [], [record(i, 2) for i in range(5, 8)]]
  write_set(tmp_path, {"train": train, "validation": [[record(i, 1) for i in (8, 9, 10)]]})
  return tmp_path


def test_records(pets):
  train, test = tfds(pets, "train"), tfds(str(pets), "test")
  assert isinstance(train, EncodedSource)
  assert (train.name, train.classes) == ("pets", CLASSES)
  assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 2]
  assert test.labels.tolist() == [1, 1, 1]
  assert list(train.names) == [f"p{i}.jpg" for i in range(8)]
  for source, start in ((train, 0), (test, 8)):
    for i in range(len(source)):
      assert source.encoded(i) == (picture(start + i), f"p{start + i}.jpg")
      np.testing.assert_array_equal(source[i].image, pixels(picture(start + i)))
      assert source[i][1:] == (source.labels[i], f"p{start + i}.jpg")


def test_from_other_processes_and_threads(pets):
  source = tfds(pets, "train")
  source[0]
  for copy in (pickle.loads(pickle.dumps(source)), subset(source, np.arange(8))):
    with ThreadPoolExecutor(4) as pool:
      found = list(pool.map(lambda i, copy=copy: copy.encoded(i % 8), range(200)))
    assert found == [(picture(i % 8), f"p{i % 8}.jpg") for i in range(200)]


def test_test_comes_before_validation_unless_it_has_no_labels(pets):
  for label, names in ((0, ["p11.jpg"]), (-1, ["p8.jpg", "p9.jpg", "p10.jpg"])):
    splits = {"train": [[record(0, 1)]], "test": [[record(11, label)]]}
    write_set(pets, splits | {"validation": [[record(i, 1) for i in (8, 9, 10)]]})
    assert list(tfds(pets, "test").names) == names
  write_set(pets, splits)
  assert tfds(pets, "test").labels.tolist() == [-1]


def test_without_labels_and_names(tmp_path):
  features = {"picture": FEATURES["image"], "note": FEATURES["file_name"]}
  records = [example({"picture": picture(i), "note": b"x"}) for i in range(3)]
  write_set(tmp_path, {"train": [records]}, features)
  source = tfds(tmp_path, "train")
  assert (source.classes, source.labels.tolist()) == ((), [-1, -1, -1])
  assert list(source.names) == ["pets/train/0", "pets/train/1", "pets/train/2"]
  assert source[2].key == "pets/train/2"
  np.testing.assert_array_equal(source[2].image, pixels(picture(2)))


def test_several_images_and_labels(tmp_path):
  features = {"mask": FEATURES["image"], "breed": FEATURES["label"]} | FEATURES
  data = {"image": picture(1), "mask": picture(2), "label": 2, "breed": 1, "file_name": b"a"}
  items = [{"featureKey": "image"}, {"featureKey": "label"}]
  splits = {"train": [[example(data)]]}
  write_set(tmp_path, splits, features, supervisedKeys={"tuple": {"items": items}})
  (example_read,) = tfds(tmp_path, "train")
  np.testing.assert_array_equal(example_read.image, pixels(picture(1)))
  assert example_read.label == 2
  write_set(tmp_path, splits, features)
  with pytest.raises(
    ValueError, match=r"mask \(Image\), breed \(ClassLabel\), .*expected one Image"
  ):
    tfds(tmp_path, "train")


def test_unreadable_records_are_named_when_asked_for(tmp_path):
  broken = example({"file_name": b"cut.jpg", "image": picture(1)[:500], "label": 1})
  without = example({"file_name": b"none.jpg", "label": 1})
  records = [record(0, 0), broken, without, b"\x0a\x05abc", record(4, 2)]
  write_set(tmp_path, {"train": [records]})
  source = tfds(tmp_path, "train")
  assert source.labels.tolist() == [0, 1, 1, -1, 2]
  with pytest.raises(DecodeError, match=r"^cut\.jpg: "):
    source[1]
  with pytest.raises(
    DecodeError, match=r"^none\.jpg: record 2 of .*: no feature 'image'; there are: "
  ):
    source[2]
  with pytest.raises(DecodeError, match=r"00001/3: record 3 of .*: damaged tf.Example: 5 bytes"):
    source[3]
  assert source[4].label == 2


def test_a_damaged_file_loses_few_records(tmp_path):
  path = tmp_path / "pets-train.array_record-00000-of-00001"
  write_set(tmp_path, {"train": [[record(i, 1) for i in range(40)]]})
  data = bytearray(path.read_bytes())
  data[40_000:40_010] = bytes(10)
  path.write_bytes(data)
  source = tfds(tmp_path, "train")
  (lost,) = np.flatnonzero(source.labels < 0)
  assert 0 < lost < 39
  with pytest.raises(
    DecodeError, match=rf"00001/{lost}: record {lost} of .*: the shard is damaged: "
  ):
    source[int(lost)]
  for i in set(range(40)) - {lost}:
    assert source.encoded(i) == (picture(i), f"p{i}.jpg")
    assert source.labels[i] == 1


def test_files_that_go_away_or_are_cut(pets):
  source = tfds(pets, "train")
  path = pets / "pets-train.array_record-00002-of-00003"
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(DecodeError, match=r"p5\.jpg: record 0 of .*: the shard cannot be opened"):
    source[5]
  path.unlink()
  with pytest.raises(DecodeError, match=r"p7\.jpg: record 2 of .*: the shard is missing; expected"):
    source[7]
  with pytest.raises(ValueError, match=r"00002-of-00003 does not exist; expected 3 records in it"):
    tfds(pets, "train")
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match=r"00003 has 0 records; expected 3, as in dataset_info.json"):
    tfds(pets, "train")


def change(path, **values):
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda root: change(root / "dataset_info.json", fileFormat="tfrecord"),
      r"prepared as tfrecord; expected .*array_record.* pip install \"byolx\[tfds\]\"",
    ),
    (
      lambda root: (root / "features.json").unlink(),
      r"which has no features\.json; expected a folder that TensorFlow Datasets prepared",
    ),
    (
      lambda root: (root / "features.json").write_text("{"),
      r"features\.json is damaged \(.*\); expected a folder",
    ),
    (lambda root: (root / "features.json").write_text("[]"), r"features\.json holds a list"),
    (
      lambda root: change(root / "features.json", featuresDict={}),
      r"has nothing; expected one Image",
    ),
    (
      lambda root: change(root / "dataset_info.json", splits=[]),
      r"which has the splits none; expected train for the train split",
    ),
    (lambda root: change(root / "dataset_info.json", name=None), r"dataset_info\.json has no name"),
    (
      lambda root: (root / "label.labels.txt").write_text("cat\n"),
      r"has 3 classes and 1 names; expected one each",
    ),
    (
      lambda root: write_set(root, {"train": [[record(0, 3)]]}),
      r"pets: a train label is 3; expected classes 0 to 2",
    ),
  ],
)
def test_wrong_folders(pets, damage, message):
  damage(pets)
  with pytest.raises(ValueError, match=message) as caught:
    tfds(pets, "train")
  assert "\n" not in str(caught.value)


def test_the_folder_of_a_version_is_suggested(pets, tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  (root / "pets").mkdir()
  pets.rename(root / "pets" / "1.0.0")
  for folder in (root, root / "pets"):
    with pytest.raises(ValueError, match=r"did you mean .*pets/1\.0\.0\?$"):
      tfds(folder, "train")
  with pytest.raises(ValueError, match="split is 'validation'; expected one of train, test"):
    tfds(root, "validation")


def test_long_reads_are_reported(pets, caplog, monkeypatch):
  monkeypatch.setattr(tfds_room, "_PROGRESS_SECONDS", -1)
  with caplog.at_level(logging.INFO, logger="byolx"):
    tfds(pets, "train")
  said = [record.getMessage() for record in caplog.records]
  assert "pets: labels of 5 of the 8 train records read" in said
  assert said[-1].startswith("pets: 8 images, 3 classes in train; labels read in 0 s")


if HAS_TFDS:  # the library itself writes a set, without TensorFlow, and reads it

  @pytest.mark.filterwarnings("default")
  def test_what_the_library_prepares(tmp_path):
    import tensorflow_datasets

    core, features = tensorflow_datasets.core, tensorflow_datasets.features

    class Pets(core.GeneratorBasedBuilder):
      VERSION = core.Version("1.0.0")

      def _info(self):
        parts = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
        parts |= {"file_name": features.Text(), "size": features.Scalar(np.int64)}
        return core.DatasetInfo(builder=self, features=features.FeaturesDict(parts))

      def _split_generators(self, manager):
        return {
          "train": self._generate_examples(0, 12),
          "validation": self._generate_examples(12, 5),
        }

      def _generate_examples(self, start, count):
        for i in range(start, start + count):
          data = {"image": io.BytesIO(picture(i)), "label": CLASSES[i % 3]}
          yield f"{i}.jpg", {**data, "file_name": f"{i}.jpg", "size": i}

    builder = Pets(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for split, theirs in (("train", "train"), ("test", "validation")):
      source = tfds(tmp_path / "pets" / "1.0.0", split)
      oracle = builder.as_data_source(theirs)
      assert len(source) == len(oracle)
      assert source.classes == CLASSES
      for i in range(len(source)):
        expected = oracle[i]
        np.testing.assert_array_equal(source[i].image, expected["image"])
        assert source[i].label == source.labels[i] == expected["label"]
        assert source[i].key == expected["file_name"].decode()
