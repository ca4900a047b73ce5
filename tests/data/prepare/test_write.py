"""`byolx prepare`: folders and archives in every state become the same records, or an error."""

import functools
import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from preparing import assert_same, crops, files_of, prepare_tree, run_prepare, write_tree

from byolx import cli
from byolx.data.decode import decode
from byolx.data.prepare import write
from byolx.data.sources.folders import image_folder
from byolx.data.sources.prepared import prepared, read_manifest


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """Two splits with everything that a folder of photographs has in it."""
  root = tmp_path_factory.mktemp("prepare") / "photos"
  write_tree(root / "train", [f"{c}/{i:02d}.jpg" for c in ("cat", "dog", "emu") for i in range(8)])
  write_tree(root / "val", [f"{c}/v{i}.jpg" for c in ("cat", "emu") for i in range(3)])
  dog = root / "train" / "dog"
  whole = (dog / "00.jpg").read_bytes()
  image = Image.open(io.BytesIO(whole))
  image.convert("CMYK").save(dog / "cmyk.JPEG", "JPEG")
  image.save(dog / "png.JPEG", "PNG")
  (dog / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  (dog / "empty.jpg").write_bytes(b"")
  (dog / "text.jpg").write_text("not an image")
  (dog / "notes.txt").write_text("not an image either")
  (dog / ".hidden.jpg").write_text("nor this")
  return root


UNREADABLE = ("train/dog/cut.jpg", "train/dog/empty.jpg", "train/dog/text.jpg")


def tar_of(folder, path, name="."):
  with tarfile.open(path, "w") as tar:
    tar.add(folder, name)
  return path


@pytest.fixture
def byolx(capsys):
  return functools.partial(run_prepare, capsys)


# What comes out


def test_a_set_holds_the_files_of_a_folder(byolx, tree, tmp_path):
  to = tmp_path / "set"
  code, out, err = byolx(*prepare_tree(tree, to, "--shards=4", "--workers=1", "--verify"))
  assert code == 0
  lines = out.splitlines()
  assert lines[0] == "35 images, 0.4 MB, into 5 shards"
  assert lines[1].startswith(f"{to} is prepared: train 26 records in 4 shards, ")
  assert "; test 6 records in 1 shard, " in lines[1]
  assert lines[2] == f"3 inputs left out: see {to / 'unreadable.txt'}"
  assert lines[3].startswith(f"verified {to}: train 26 records in 4 shards, ")
  assert "prepared shard 5/5  32 records  " in err
  assert err.endswith("0 s left\n")
  said = (to / "unreadable.txt").read_text().splitlines()
  assert [line.partition(": ")[0] for line in said] == list(UNREADABLE)
  assert said[1] == "train/dog/empty.jpg: the file is empty"
  for split, folder in (("train", "train"), ("test", "val")):
    files, source = image_folder(tree, split), prepared(to, split)
    kept = [i for i, name in enumerate(files.names) if f"{folder}/{name}" not in UNREADABLE]
    assert list(source.names) == [files.names[i] for i in kept]
    np.testing.assert_array_equal(source.labels, files.labels[kept])
    assert source.classes == files.classes
    for i, name in enumerate(source.names):
      assert source.encoded(i)[0] == (tree / folder / name).read_bytes()
  manifest = read_manifest(to)
  assert (manifest.name, manifest.encode) == ("photos", None)
  sizes = [shard.bytes for shard in manifest.splits["train"].shards]
  assert max(sizes) <= 2 * min(sizes)
  assert files_of(to / ".prepare") == ["plan.json"]


def test_shards_do_not_depend_on_the_workers(byolx, tree, tmp_path):
  for workers in (1, 3):
    given = prepare_tree(tree, tmp_path / f"{workers}", f"--workers={workers}", "--shards=5")
    assert byolx(*given)[0] == 0
  assert_same(tmp_path / "1", tmp_path / "3")


def records_of(folder):
  return [
    (split, source.names[i], int(source.labels[i]), source.encoded(i)[0])
    for split in read_manifest(folder).splits
    for source in [prepared(folder, split, test_share=0.0)]
    for i in range(len(source))
  ]


@pytest.mark.parametrize("around", [".", "photos", "a/b"])
def test_an_archive_gives_the_records_of_its_folder(byolx, tree, tmp_path, around):
  archive = tar_of(tree, tmp_path / "photos.tar", around)
  for source, to in ((tree, "folder"), (archive, "tar")):
    given = prepare_tree(source, tmp_path / to, "--workers=1", "--shards=3")
    assert byolx(*given)[0] == 0
  assert_same(tmp_path / "folder", tmp_path / "tar")


def test_an_archive_of_archives_and_a_flat_one_as_imagenet_has(byolx, tree, tmp_path):
  with tarfile.open(tmp_path / "train.tar", "w") as tar:
    for name in ("cat", "dog", "emu"):
      inner = tar_of(tree / "train" / name, tmp_path / f"{name}.tar")
      tar.add(inner, f"{name}.tar")
  lines = []
  with tarfile.open(tmp_path / "val.tar", "w") as tar:
    for path in sorted((tree / "val").rglob("*.jpg")):
      tar.add(path, f"{path.parent.name}-{path.name}")
      lines.append(f"{path.parent.name}-{path.name} {path.parent.name}")
  (tmp_path / "val.txt").write_text("\n".join(reversed(lines)) + "\n")
  train, test = tmp_path / "train.tar", f"--test={tmp_path / 'val.tar'}"
  code, _, err = byolx(*prepare_tree(train, tmp_path / "set", test))
  assert code == 2
  assert err == (
    f"byolx: error: {tmp_path / 'val.tar'}, the test split, has no class folders, but the training"
    " split has 3 classes; expected --test_labels=FILE with lines `file-name class-name`\n"
  )
  labels = f"--test_labels={tmp_path / 'val.txt'}"
  assert byolx(*prepare_tree(train, tmp_path / "set", test, labels, "--workers=1"))[0] == 0
  assert byolx(*prepare_tree(tree, tmp_path / "folder", "--workers=1"))[0] == 0
  expected = records_of(tmp_path / "folder")
  flat = [name.replace("/", "-") if split == "test" else name for split, name, _, _ in expected]
  found = records_of(tmp_path / "set")
  assert [name for _, name, _, _ in found] == flat
  assert [(s, y, data) for s, _, y, data in found] == [(s, y, data) for s, _, y, data in expected]


def test_a_flat_archive_without_labels(byolx, tree, tmp_path):
  archive = tar_of(tree / "train" / "cat", tmp_path / "cats.tar", "cats")
  assert byolx(f"--from={archive}", f"--to={tmp_path / 'set'}")[0] == 0
  source = prepared(tmp_path / "set", "train", 0.0)
  assert list(source.names) == [f"{i:02d}.jpg" for i in range(8)]
  assert source.classes == ()
  assert (source.labels == -1).all()


def test_an_archive_that_wants_out(byolx, tree, tmp_path):
  archive = tmp_path / "bad.tar"
  with tarfile.open(archive, "w") as tar:
    tar.add(tree / "train" / "cat" / "00.jpg", "cat/00.jpg")
    evil = tar.gettarinfo(tree / "train" / "cat" / "01.jpg", "../../evil.jpg")
    with open(tree / "train" / "cat" / "01.jpg", "rb") as file:
      tar.addfile(evil, file)
    link = tarfile.TarInfo("cat/passwd.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
  before = files_of(tmp_path)
  to = tmp_path / "sets" / "deep" / "set"
  assert byolx(f"--from={archive}", f"--to={to}", "--max_failed_share=0.7")[0] == 0
  assert [name for name in files_of(tmp_path) if not name.startswith("sets/")] == before
  assert [f for f in files_of(tmp_path / "sets") if not f.startswith("deep/set/")] == []
  assert (to / "unreadable.txt").read_text() == (
    "bad.tar/../../evil.jpg: the name leads out of the archive\n"
    "bad.tar/cat/passwd.jpg: a link (to /etc/passwd), which is not followed\n"
  )
  assert len(prepared(to, "train", 0.0)) == 1


def test_smaller_images_are_pillows(byolx, tree, tmp_path):
  folder = tmp_path / "mixed"
  write_tree(folder / "a", ["large.jpg", "tall.jpg"], (330, 240))
  Image.open(folder / "a" / "tall.jpg").rotate(90, expand=True).save(folder / "a" / "tall.jpg")
  write_tree(folder / "a", ["same.jpg"], (160, 120))
  next(crops(1, (300, 200))).convert("RGBA").save(folder / "a" / "transparent.png")
  next(crops(1, (90, 60))).save(folder / "a" / "small.png")
  to = tmp_path / "set"
  given = (f"--from={folder}", f"--to={to}", "--short_side=120", "--quality=90")
  assert byolx(*given)[0] == 0
  source = prepared(to, "train", 0.0)
  for i, name in enumerate(source.names):
    data, original = source.encoded(i)[0], (folder / name).read_bytes()
    if name in ("a/same.jpg", "a/small.png"):
      assert data == original
      continue
    pixels = Image.fromarray(decode(original, name))
    short = min(pixels.size)
    size = (pixels.width * 120 // short, pixels.height * 120 // short)
    expected = io.BytesIO()
    pixels.resize(size, Image.Resampling.BICUBIC).save(expected, "JPEG", quality=90)
    assert data == expected.getvalue()  # Pillow's default is 4:2:0, too
    stored = Image.open(io.BytesIO(data))
    assert (stored.format, stored.size, min(stored.size)) == ("JPEG", size, 120)
    assert [layer[1:3] for layer in stored.layer] == [(2, 2), (1, 1), (1, 1)]
  described = read_manifest(to).encode
  assert (described["short_side"], described["quality"]) == (120, 90)
  assert described["subsampling"] == "4:2:0"


def test_an_image_too_long_for_a_jpeg_is_left_out(byolx, tmp_path):
  folder = write_tree(tmp_path / "a", ["fine.jpg"])
  Image.new("RGB", (140_000, 2)).save(folder / "long.png")
  given = (f"--from={folder}", f"--to={tmp_path / 'set'}", "--short_side=1")
  assert byolx(*given, "--max_failed_share=0.6")[0] == 0
  (line,) = (tmp_path / "set" / "unreadable.txt").read_text().splitlines()
  assert line.startswith("train/long.png: no JPEG of 70000 x 1 pixels: ")


@pytest.mark.parametrize("count", [1, 2, 7, 29])
def test_cuts_are_whole_and_even(count):
  rng = np.random.default_rng(count)
  for sizes in (rng.integers(1, 100, 29), np.ones(29, np.int64), 10 ** rng.integers(0, 7, 29)):
    parts = write._cut(sizes, count)
    assert len(parts) == count
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(29))
    most = max(sizes[part].sum() for part in parts)
    assert most <= sizes.sum() / count + sizes.max() + 1 or count == 29


# What cannot be done


def test_too_many_unreadable_images_publish_nothing(byolx, tree, tmp_path):
  to = tmp_path / "set"
  code, _, err = byolx(f"--from={tree}", f"--to={to}", "--shards=2")
  assert code == 1
  assert err.splitlines()[-1] == (
    f"byolx: error: 3 inputs of 35 were left out so far, see {to / 'unreadable.txt'}; expected at"
    " most a share of --max_failed_share=0.01"
  )
  assert len((to / "unreadable.txt").read_text().splitlines()) == 3
  assert not (to / "dataset.json").exists()
  with pytest.raises(ValueError, match="is an unfinished set"):
    prepared(to, "train")
  assert byolx(*prepare_tree(tree, to, "--shards=2"))[0] == 0


def test_verify_on_its_own(byolx, tree, tmp_path):
  to = tmp_path / "set"
  assert byolx(*prepare_tree(tree, to))[0] == 0
  assert byolx(f"--to={to}", "--verify=images")[0] == 0
  file = to / "test-00000-of-00001.array_record"
  data = bytearray(file.read_bytes())
  data[3000] ^= 1
  file.write_bytes(data)
  code, out, err = byolx(f"--to={to}", "--verify", "--workers=2")
  assert (code, out) == (1, "")
  *_, digest, record, error = err.splitlines()
  assert digest == f"{file} is damaged: its sha256 is not the one in dataset.json"
  assert record.startswith(f"cat/v0.jpg: record 0 of {file}: the shard is damaged: ")
  assert error == f"byolx: error: {to} is damaged: 2 problems, listed above"


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--from={nowhere}", "--to={set}"), "{nowhere} does not exist; expected a folder or a tar"),
    (("--from={empty}", "--to={set}"), "--from is '{empty}', whose train split has no image (0 f"),
    (("--from={tree}", "--to={tree}"), "--to={tree} has other files in it; expected a new or an"),
    (("--from={tree}", "--to={file}"), "--to={file} is not a folder; expected a new or an empty"),
    (("--from={file}", "--to={set}"), "{file}: "),
    (("--from={tree}", "--to={set}", "--shards=30"), "--shards=30: expected at most 29, one per"),
    (("--from={tree}", "--to={set}", "--test={tree}"), "{tree} has a test split of its own; expe"),
    (
      ("--from={tree}/train", "--to={set}", "--test={tree}"),
      "--test={tree} has two splits; expected the images of one",
    ),
    (
      ("--from={tree}", "--to={set}", "--test_labels={file}"),
      "{tree}/val has class folders; expected no --test_labels={file}",
    ),
    (
      ("--from={tree}/train", "--to={set}", "--test_labels={file}"),
      "--test_labels={file} was given, but there is no test split; expected --test as well",
    ),
    (
      ("--from={tree}/val", "--to={set}", "--test={tree}/train"),
      "{tree}/train, the test split, has the class 'dog'; expected some of the 2 classes of the",
    ),
    (
      ("--from={tree}/train", "--to={set}", "--test={tree}/val/cat", "--test_labels={nowhere}"),
      "--test_labels={nowhere}: No such file or directory; expected a file",
    ),
    (
      ("--from={tree}/train", "--to={set}", "--test={tree}/val/cat", "--test_labels={words}"),
      "{words}, line 2: 'v1.jpg'; expected `file-name class-name`",
    ),
    (
      ("--from={tree}/train", "--to={set}", "--test={tree}/val/cat", "--test_labels={few}"),
      "{few} has no line for v1.jpg and 1 others of 3 images; expected lines `file-name class-name`",
    ),
    (("--to={set}",), "neither --from nor --verify was given; expected one of them"),
    (("--to={empty}", "--verify"), "{empty} has no dataset.json; expected a folder written by"),
    (("--from={tree}",), "the following arguments are required: --to; see byolx prepare --help"),
    (("--to=x", "--quality=101"), "--quality: '101': expected a whole number from 1 to 100"),
    (("--to=x", "--max_failed_share=2"), "--max_failed_share: '2': expected a number from 0 to 1"),
    (("--to=x", "--shards=2", "--shard_mb=9"), "--shard_mb: not allowed with argument --shards"),
  ],
)
def test_what_is_refused(byolx, tree, tmp_path, arguments, said):
  paths = {name: tmp_path / name for name in ("nowhere", "empty", "set", "file", "words", "few")}
  paths["tree"] = tree
  paths["empty"].mkdir()
  paths["file"].write_text("neither a folder nor a tar")
  paths["words"].write_text("v0.jpg cat\nv1.jpg\n")
  paths["few"].write_text("v0.jpg cat\n")
  code, out, err = byolx(*(argument.format(**paths) for argument in arguments))
  assert (code, out) == (2, "")
  lines = [line for line in err.splitlines() if line.startswith("byolx: error: ")]
  assert len(lines) == 1
  assert said.format(**paths) in lines[0]
  assert not paths["set"].exists()


def test_help_has_examples_that_parse(byolx):
  code, out, err = byolx("--help")
  assert (code, err) == (0, "")
  text = out.replace("\\\n", " ")
  examples = [line.split()[2:] for line in text.splitlines() if line.startswith("  byolx prepare ")]
  assert len(examples) == 4
  for words in examples:
    arguments, _ = cli._parse(["prepare", *words])
    assert str(arguments.to).startswith("sets/")
