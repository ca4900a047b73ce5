"""Tar archives: members where they lie, names that go nowhere, and archives that are not whole."""

import gzip
import io
import lzma
import os
import tarfile

import numpy as np
import pytest

from byolx.data.prepare.tar import list_archive, read_member


def member(name, data=b"", **fields):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for field, value in fields.items():
    setattr(info, field, value)
  return info, io.BytesIO(data)


def write_tar(path, members, format=tarfile.PAX_FORMAT):
  with tarfile.open(path, "w", format=format) as tar:
    for info, data in members:
      tar.addfile(info, data)
  return path


def contents(path):
  return {name: read_member(path, *place) for name, place in list_archive(path).images.items()}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_member_is_found(tmp_path, format):
  rng = np.random.default_rng(0)
  long = "x" * 70 + "/" + "y" * 80
  names = ["a.jpg", "./b/c.PNG", "b//d.webp", f"{long}.jpeg", "b/deep/er/e.bmp"]
  if format != tarfile.USTAR_FORMAT:
    names += ["b/" + "z" * 300 + ".jpg", "b/grün.jpg", os.fsdecode(b"b/\xff.jpg")]
  data = {name: rng.bytes(int(rng.integers(0, 3000))) for name in names}
  path = write_tar(tmp_path / "x.tar", [member(*item) for item in data.items()], format)
  expected = {name.replace("./", "").replace("//", "/"): value for name, value in data.items()}
  assert contents(path) == expected
  archive = list_archive(path)
  assert {"b", "b/deep", "b/deep/er", "x" * 70} <= archive.folders
  assert archive.left_out == []


def test_a_tar_in_the_archive_is_a_folder(tmp_path):
  inner = write_tar(tmp_path / "in.tar", [member("1.JPEG", b"one"), member("sub/2.JPEG", b"two")])
  deeper = write_tar(tmp_path / "deep.tar", [member("in.tar", inner.read_bytes())])
  path = write_tar(
    tmp_path / "x.tar",
    [
      member("n01440764.tar", inner.read_bytes()),
      member("train/n2.tar", inner.read_bytes()),
      member("n3.tar", deeper.read_bytes()),
    ],
  )
  assert contents(path) == {
    "n01440764/1.JPEG": b"one",
    "n01440764/sub/2.JPEG": b"two",
    "train/n2/1.JPEG": b"one",
    "train/n2/sub/2.JPEG": b"two",
  }
  archive = list_archive(path)
  assert archive.folders == {
    "n01440764",
    "n01440764/sub",
    "train",
    "train/n2",
    "train/n2/sub",
    "n3",
  }
  assert archive.ignored == {".tar": 1}


def test_names_links_and_devices_are_not_followed(tmp_path):
  inner = write_tar(tmp_path / "in.tar", [member("../up.jpg", b"x"), member("fine.jpg", b"x")])
  path = write_tar(
    tmp_path / "x.tar",
    [
      member("../../etc/evil.jpg", b"x"),
      member("/etc/evil.jpg", b"x"),
      member("a/../../evil.jpg", b"x"),
      member("a/sym.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
      member("a/hard.jpg", type=tarfile.LNKTYPE, linkname="a/fine.jpg"),
      member("a/null.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
      member("a/pipe.jpg", type=tarfile.FIFOTYPE),
      member("a/two\nlines.jpg", type=tarfile.SYMTYPE, linkname="b\nc"),
      member("n1.tar", inner.read_bytes()),
      member("a/fine.jpg", b"fine"),
    ],
  )
  assert contents(path) == {"a/fine.jpg": b"fine", "n1/fine.jpg": b"x"}
  assert list_archive(path).left_out == [
    "../../etc/evil.jpg: the name leads out of the archive",
    "/etc/evil.jpg: the name leads out of the archive",
    "a/../../evil.jpg: the name leads out of the archive",
    "a/sym.jpg: a link (to /etc/passwd), which is not followed",
    "a/hard.jpg: a link (to a/fine.jpg), which is not followed",
    "a/null.jpg: neither a file nor a folder",
    "a/pipe.jpg: neither a file nor a folder",
    "a/two\\nlines.jpg: a link (to b\\nc), which is not followed",
    "n1.tar/../up.jpg: the name leads out of the archive",
  ]


def test_hidden_files_other_files_and_duplicates(tmp_path):
  path = write_tar(
    tmp_path / "x.tar",
    [
      member("a/1.jpg", b"old"),
      member("a/.hidden.jpg", b"x"),
      member(".git/2.jpg", b"x"),
      member("a/._1.jpg", b"resource fork"),
      member("a/notes.TXT", b"x"),
      member("README", b"x"),
      member("empty", type=tarfile.DIRTYPE),
      member("./a/1.jpg", b"newer"),
    ],
  )
  assert contents(path) == {"a/1.jpg": b"newer"}
  archive = list_archive(path)
  assert archive.left_out == ["a/1.jpg: replaced by a later member of this name"]
  assert archive.ignored == {".txt": 1, "without extension": 1}
  assert archive.folders == {"a", "empty"}


@pytest.mark.parametrize(
  ("compress", "kind"), [(gzip.compress, "gzip"), (lzma.compress, "xz")], ids=["gzip", "xz"]
)
def test_compressed_archives_are_refused(tmp_path, compress, kind):
  plain = write_tar(tmp_path / "x.tar", [member("a.jpg", b"x")]).read_bytes()
  path = tmp_path / "x.tar.z"
  path.write_bytes(compress(plain))
  with pytest.raises(ValueError, match=rf"x.tar.z is compressed \({kind}\).*decompress it first"):
    list_archive(path)
  outer = write_tar(tmp_path / "outer.tar", [member("n1.tar", compress(plain))])
  with pytest.raises(ValueError, match=rf"outer.tar/n1.tar is compressed \({kind}\)"):
    list_archive(outer)


def test_what_is_no_tar(tmp_path):
  path = tmp_path / "x.tar"
  for data in (b"", b"no tar", bytes(100), b"x" * 5000):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar"):
      list_archive(path)
  with pytest.raises(OSError, match="No such file"):
    list_archive(tmp_path / "missing.tar")


def test_a_tar_that_is_cut_short_is_refused_wherever_it_ends(tmp_path):
  rng = np.random.default_rng(1)
  members = [member(f"{i}.jpg", rng.bytes(700 + 300 * i)) for i in range(6)]
  path = write_tar(tmp_path / "x.tar", members)
  whole = path.read_bytes()
  images = list_archive(path).images
  end = max(-(-(offset + size) // 512) * 512 for offset, size in images.values())
  for length in sorted({*rng.integers(1, end, 60).tolist(), *range(512, end + 1, 512)}):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"x\.tar"):
      list_archive(path)


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
  path = write_tar(tmp_path / "x.tar", [member(f"{i}.jpg", b"x" * 600) for i in range(5)])
  data = bytearray(path.read_bytes())
  third = list_archive(path).images["3.jpg"][0] - 512
  data[third + 10] ^= 255
  path.write_bytes(data)
  with pytest.raises(ValueError, match=rf"is damaged or cut short at byte {third}; expected the"):
    list_archive(path)


def test_an_archive_that_shrank_after_it_was_listed(tmp_path):
  path = write_tar(tmp_path / "x.tar", [member("a.jpg", b"x" * 5000)])
  offset, size = list_archive(path).images["a.jpg"]
  os.truncate(path, offset + 100)
  with pytest.raises(OSError, match="the archive ends after 100 of 5000 bytes"):
    read_member(path, offset, size)
