"""decode against Pillow's own conversions, numpy arithmetic, and every kind of broken file."""

import io
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from byolx.data.decode import MAX_PIXELS, DecodeError, decode, is_image_name, read_image

PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((150, 101))
ALPHA = Image.fromarray(np.arange(101 * 150, dtype=np.uint32).reshape(101, 150).astype(np.uint8))


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def with_alpha(image):
  image = image.copy()
  image.putalpha(ALPHA)
  return image


def on_white(rgba):
  """Straight alpha over white, in floating point."""
  pixels, alpha = np.split(np.asarray(rgba).astype(np.float64), [3], axis=2)
  return pixels * (alpha / 255) + 255 * (1 - alpha / 255)


PLAIN = {
  "jpeg": (PHOTO, "JPEG", {"quality": 90}),
  "jpeg 4:4:4": (PHOTO, "JPEG", {"quality": 70, "subsampling": 0}),
  "jpeg 4:2:2": (PHOTO, "JPEG", {"quality": 70, "subsampling": 1}),
  "jpeg progressive": (PHOTO, "JPEG", {"progressive": True, "optimize": True}),
  "jpeg grey": (PHOTO.convert("L"), "JPEG", {}),
  "png": (PHOTO, "PNG", {}),
  "png grey": (PHOTO.convert("L"), "PNG", {}),
  "png palette": (PHOTO.quantize(50), "PNG", {}),
  "png bits": (PHOTO.convert("1"), "PNG", {}),
  "webp": (PHOTO, "WEBP", {"quality": 80}),
  "webp lossless": (PHOTO, "WEBP", {"lossless": True}),
  "bmp": (PHOTO, "BMP", {}),
  "bmp grey": (PHOTO.convert("L"), "BMP", {}),
  "bmp palette": (PHOTO.quantize(16), "BMP", {}),
}


@pytest.mark.parametrize("variant", PLAIN)
def test_plain_files_equal_pillow(variant):
  image, kind, options = PLAIN[variant]
  data = encoded(image, kind, **options)
  pixels = decode(data, variant)
  assert pixels.dtype == np.uint8
  assert pixels.flags.c_contiguous
  assert pixels.flags.writeable
  np.testing.assert_array_equal(pixels, Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (8000, 10), (10, 8000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_extreme_sizes(kind, size):
  image = PHOTO.resize(size)
  data = encoded(image, kind)
  assert decode(data, "x").shape == (size[1], size[0], 3)
  np.testing.assert_array_equal(decode(data, "x"), Image.open(io.BytesIO(data)).convert("RGB"))


def test_both_jpeg_decoders_agree():
  data = encoded(PHOTO, "JPEG")
  trailing = data + b"bytes after the end"  # not seen by OpenCV: the end marker is not at the end
  np.testing.assert_array_equal(decode(trailing, "x"), decode(data, "x"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
  image = with_alpha(PHOTO if mode == "RGBA" else PHOTO.convert("L"))
  assert image.mode == mode
  difference = decode(encoded(image, "PNG"), "x") - on_white(image.convert("RGBA"))
  assert np.abs(difference).max() <= 1
  lossless = encoded(image.convert("RGBA"), "WEBP", lossless=True, exact=True)
  assert np.abs(decode(lossless, "x") - on_white(image.convert("RGBA"))).max() <= 1


def test_transparent_colours_are_white():
  palette = PHOTO.quantize(8)
  seen = decode(encoded(palette, "PNG", transparency=3), "x")
  index = np.asarray(palette)
  np.testing.assert_array_equal(seen[index == 3], 255)
  np.testing.assert_array_equal(seen[index != 3], np.asarray(palette.convert("RGB"))[index != 3])

  grey = PHOTO.convert("L")
  level = int(np.asarray(grey)[0, 0])
  seen = decode(encoded(grey, "PNG", transparency=level), "x")
  expected = np.where(np.asarray(grey) == level, 255, np.asarray(grey))
  np.testing.assert_array_equal(seen, np.repeat(expected[..., None], 3, 2))

  partial = encoded(palette, "PNG", transparency=bytes(range(0, 240, 30)))
  expected = on_white(Image.open(io.BytesIO(partial)).convert("RGBA"))
  assert np.abs(decode(partial, "x") - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_scaled(channels):
  values = np.random.default_rng(0).integers(0, 65536, (40, 30, channels), dtype=np.uint16)
  values[0, :3] = [[0], [65535], [65407]]  # 65407 = 254.5 * 257 and a bit: 255, truncated 254
  data = cv2.imencode(".png", values[..., [2, 1, 0, 3][:channels] if channels > 1 else [0]])[1]
  exact = values[..., :3] / 257
  if channels == 4:
    alpha = values[..., 3:] / 65535
    exact = exact * alpha + 255 * (1 - alpha)
  expected = np.broadcast_to(np.rint(exact), (40, 30, 3))
  np.testing.assert_array_equal(decode(data.tobytes(), "x"), expected)
  if channels < 4:
    assert decode(data.tobytes(), "x")[0, 2, 0] == 255


def cmyk_file():
  """Four flat 16 x 16 blocks whose CMYK values survive quality 100 almost exactly."""
  values = np.array([[0, 0, 0, 0], [200, 30, 90, 0], [10, 250, 128, 60], [0, 0, 0, 255]])
  pixels = np.repeat(np.repeat(values[None], 16, 0), 16, 1).astype(np.uint8)
  image = Image.frombytes("CMYK", (64, 16), pixels.tobytes())
  data = encoded(image, "JPEG", quality=100, subsampling=0)
  return pixels.astype(np.float64), data


def to_rgb(cmyk):
  return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


def test_cmyk_with_adobe_marker():
  cmyk, data = cmyk_file()
  assert b"Adobe" in data
  assert np.abs(decode(data, "x") - to_rgb(cmyk)).max() <= 3


def test_cmyk_without_adobe_marker_is_not_inverted():
  cmyk, data = cmyk_file()
  marker = data.index(b"\xff\xee")
  length = int.from_bytes(data[marker + 2 : marker + 4], "big")
  plain = data[:marker] + data[marker + 2 + length :]
  assert np.abs(decode(plain, "x") - to_rgb(255 - cmyk)).max() <= 3


def test_ycck():
  cmyk, data = cmyk_file()
  transform = data.index(b"Adobe") + 11
  assert data[transform] == 0
  y, cb, cr, k = np.moveaxis(255 - cmyk, -1, 0)  # as stored: Adobe's values are inverted
  rgb = np.stack([
    y + 1.402 * (cr - 128),
    y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
    y + 1.772 * (cb - 128),
  ], axis=-1).clip(0, 255)  # fmt: skip
  # YCCK is CMYK whose C, M, Y were taken as 255 - R, G, B; and all of it is stored inverted.
  expected = to_rgb(255 - np.concatenate([255 - rgb, k[..., None]], axis=-1))
  ycck = data[:transform] + b"\x02" + data[transform + 1 :]
  assert np.abs(decode(ycck, "x") - expected).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(kind, orientation):
  exif = Image.Exif()
  exif[0x010F] = "a camera"
  exif[0x0112] = orientation
  data = encoded(PHOTO, kind, exif=exif)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
  np.testing.assert_array_equal(decode(data, "x"), upright)


def exif_block(order, kind, value):
  entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value.ljust(4, b"\0")
  header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
  return b"Exif\0\0" + header + struct.pack(order + "H", 1) + entry + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_exif_byte_orders_and_types(order, kind):
  value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], 6)
  data = encoded(PHOTO, "JPEG", exif=exif_block(order, kind, value))
  turned = np.asarray(Image.open(io.BytesIO(encoded(PHOTO, "JPEG"))).rotate(-90, expand=True))
  np.testing.assert_array_equal(decode(data, "x"), turned)


@given(st.binary(max_size=60), st.sampled_from([b"", b"Exif\0\0II*\0", b"Exif\0\0MM\0*"]))
@settings(max_examples=60, deadline=None)
def test_damaged_exif_is_ignored_silently(junk, start):
  data = encoded(PHOTO, "JPEG")
  segment = b"\xff\xe1" + struct.pack(">H", len(start + junk) + 2) + start + junk
  pixels = decode(data[:2] + segment + data[2:], "x")
  assert sorted(pixels.shape) == [3, 101, 150]


def test_out_of_range_orientation_is_upright():
  data = encoded(PHOTO, "JPEG", exif=exif_block("<", 3, struct.pack("<H", 9)))
  np.testing.assert_array_equal(decode(data, "x"), decode(encoded(PHOTO, "JPEG"), "x"))


def png_chunk(name, body):
  return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_animations_give_their_first_picture():
  other = Image.new("RGB", PHOTO.size, "red")
  for kind in ("PNG", "WEBP"):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(PHOTO, kind, save_all=True, append_images=[other], **options)
    np.testing.assert_array_equal(decode(data, kind), PHOTO)
  still = encoded(PHOTO, "PNG")
  invalid = still[:33] + png_chunk(b"acTL", bytes(8)) + still[33:]  # no frames: Pillow would warn
  np.testing.assert_array_equal(decode(invalid, "x"), PHOTO)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_truncated_files(kind, data):
  whole = encoded(PHOTO, kind)
  # The last bytes of a PNG are checksums and the empty end chunk, those of a BMP may be padding.
  cut = data.draw(st.integers(0, len(whole) - (30 if kind in ("PNG", "BMP") else 1)))
  with pytest.raises(DecodeError, match=r"^some file: ."):
    decode(whole[:cut], "some file")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_damaged_files_decode_or_raise_one_error(kind, data):
  damaged = bytearray(encoded(PHOTO.resize((20, 20)), kind))
  for _ in range(3):
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
  try:
    outcome = decode(bytes(damaged), "x")
  except DecodeError as error:
    outcome = str(error)
  assert "\n" not in outcome if isinstance(outcome, str) else outcome.shape[2] == 3


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "empty"),
    (b"just a text, renamed to .jpg", "not a JPEG, PNG, WebP or BMP"),
    (encoded(PHOTO.quantize(4), "GIF"), "not a JPEG, PNG, WebP or BMP"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a JPEG, PNG, WebP or BMP"),
    (b"\xff\xd8", "."),
    (b"\xff\xd8" + bytes(100), "."),
  ],
)
def test_no_image(data, reason):
  with pytest.raises(DecodeError, match=rf"^photos/a\.jpg: .*{reason}"):
    decode(data, "photos/a.jpg")


def bomb(kind):
  """A small file that claims 65000 x 65000 pixels (16383 x 16383 in WebP, its largest)."""
  if kind == "PNG":
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(9)))
  data = bytearray(encoded(PHOTO, kind))
  if kind == "JPEG":
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", 65000, 65000)
  elif kind == "BMP":
    data[18:26] = struct.pack("<ii", 65000, 65000)
  else:
    frame = data.index(b"\x9d\x01\x2a") + 3
    data[frame : frame + 4] = struct.pack("<HH", 16383, 16383)
  return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_decompression_bombs_are_refused(kind):
  # WebP's size is refused by Pillow, before ours could be asked.
  reason = "Image size" if kind == "WEBP" else rf"65000 x 65000 pixels, .* at most {MAX_PIXELS} "
  with pytest.raises(DecodeError, match=f"^x: {reason}"):
    decode(bomb(kind), "x")


def test_large_images_below_the_limit_are_not_refused(monkeypatch):
  monkeypatch.setattr("byolx.data.decode.MAX_PIXELS", PHOTO.width * PHOTO.height)
  data = encoded(PHOTO, "PNG")
  assert decode(data, "x").shape == (101, 150, 3)
  monkeypatch.setattr("byolx.data.decode.MAX_PIXELS", PHOTO.width * PHOTO.height - 1)
  with pytest.raises(DecodeError, match="150 x 101 pixels"):
    decode(data, "x")


def test_errors_of_the_disk(tmp_path):
  with pytest.raises(DecodeError, match=r"gone\.jpg: No such file"):
    read_image(tmp_path / "gone.jpg")
  (tmp_path / "folder.jpg").mkdir()
  with pytest.raises(DecodeError, match=r"folder\.jpg: Is a directory"):
    read_image(str(tmp_path / "folder.jpg"))


def test_content_decides_not_the_extension(tmp_path):
  (tmp_path / "a.JPEG").write_bytes(encoded(PHOTO, "PNG"))
  np.testing.assert_array_equal(read_image(tmp_path / "a.JPEG"), PHOTO)


def test_decode_error_can_be_pickled():
  error = pickle.loads(pickle.dumps(DecodeError("a.jpg: the file is empty")))
  assert isinstance(error, DecodeError)
  assert isinstance(error, ValueError)
  assert str(error) == "a.jpg: the file is empty"


def test_extensions():
  for name in ("a.jpg", "a.JPEG", "b.jpe", "a.b.Png", "x.WEBP", "x.bmp"):
    assert is_image_name(name)
  for name in ("a.gif", "jpg", "a.jpg.txt", "a.tiff", "a"):
    assert not is_image_name(name)
