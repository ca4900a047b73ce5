"""Decodes JPEG, PNG, WebP and BMP files, in all variants that occur in data sets.

ImageNet, for example, has CMYK JPEGs, a PNG named `.JPEG` and EXIF-rotated photographs. The result
is always upright uint8 RGB `h w 3`. If decoding fails, the error is always a `DecodeError` that names
the file.

- The format is detected from the first bytes, not from the extension; other formats are refused.
- Grey images are repeated to three channels, palettes are looked up, and 16 bits are scaled to 8
  (round(v / 257)) rather than truncated.
- Transparent images are composited on white.
- CMYK and YCCK are converted without a colour profile, and inverted if Adobe's marker is present.
- The EXIF orientation is applied.
- Of an animation, only the first picture is decoded; of an animated PNG, only its default picture.
- A truncated file is an error, not a partly grey image.

OpenCV decodes plain JPEGs and, if it can, PNGs of 16 bits; Pillow decodes all other files. Both give
identical pixels for the JPEGs that both can decode.
"""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp"})
"""File name extensions of images that can be decoded, in lower case."""

MAX_PIXELS = 2**27
"""Largest number of pixels of an image that is decoded, 134 million (400 MB of RGB)."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_FRAME_MARKERS = frozenset(bytes((0xC0 + n,)) for n in range(16) if n not in (4, 8, 12))
_RGB_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_APNG_CHUNKS = (b"acTL", b"fcTL", b"fdAT")


class DecodeError(ValueError):
  """Error for a file without a readable image. The message is `name: reason`, on one line."""


def is_image_name(name: str) -> bool:
  """Tests whether a file name has the extension of an image file (EXTENSIONS), in upper or lower case."""
  return os.path.splitext(name)[1].lower() in EXTENSIONS


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
  """Reads and decodes one image file.

  Returns:
    RGB pixels 0..255, upright, contiguous and writeable.

  Raises:
    DecodeError: the file cannot be read, or is not a complete image in a supported format.
  """
  return decode(read_file(path), str(path))


def read_file(path: str | Path) -> bytes:
  """Reads the bytes of a file.

  Raises:
    DecodeError: the file cannot be read.
  """
  try:
    with open(path, "rb", buffering=0) as file:
      return file.readall()
  except OSError as error:
    raise DecodeError(f"{path}: {error.strerror or type(error).__name__}") from error


def decode(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes the bytes of one image file.

  Args:
    data: bytes of the file.
    name: name of the file for error messages.

  Returns:
    RGB pixels 0..255, upright, contiguous and writeable.

  Raises:
    DecodeError: the file is empty, truncated, damaged, of another format, or has more than
      MAX_PIXELS pixels.
  """
  if not data:
    raise DecodeError(f"{name}: the file is empty")
  if data.startswith(b"\xff\xd8"):
    read = _jpeg
  elif data.startswith(_PNG_MAGIC):
    read = _png
  elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
    read = _webp
  elif data.startswith(b"BM"):
    read = _bmp
  else:
    raise DecodeError(f"{name}: not a JPEG, PNG, WebP or BMP file (starts with {data[:8]!r})")
  try:
    pixels, exif = read(data)
  except DecodeError as error:
    raise DecodeError(f"{name}: {error}") from None
  except Exception as error:  # damaged files make the decoders raise nearly anything
    reason = " ".join(str(error).split()) or type(error).__name__
    raise DecodeError(f"{name}: {reason}") from error
  return np.require(_upright(pixels, _orientation(exif)), requirements="CW")


# Each reader decodes the bytes of its format. It returns RGB pixels before the EXIF orientation is
# applied, and the EXIF block (b"" if there is none).


def _jpeg(data: bytes) -> tuple[np.ndarray, bytes]:
  data, exif, frame = _jpeg_segments(data)
  # A file without the end marker may be truncated, which OpenCV does not report.
  if _is_plain(frame) and data.rstrip(b"\0").endswith(b"\xff\xd9"):
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _RGB_AS_STORED)
    if pixels is not None:
      return pixels, exif
  image = _opened(JpegImageFile, data)
  image.load()
  if image.mode == "CMYK" and "adobe" not in image.info:
    image = ImageChops.invert(image)  # Pillow inverts all CMYK files, as if they were Adobe's
  return _rgb(image), exif


def _png(data: bytes) -> tuple[np.ndarray, bytes]:
  data = _still(data)
  image = _opened(PngImageFile, data)
  image.load()  # also checks that the file is complete
  exif = image.info.get("exif", b"")
  if data[24] == 16:  # bit depth; Pillow keeps only the high byte of a colour
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is not None and pixels.dtype == np.uint16:
      return _eight_bits(pixels), exif
  return _rgb(image), exif


def _webp(data: bytes) -> tuple[np.ndarray, bytes]:
  image = _opened(WebPImageFile, data)
  return _rgb(image), image.info.get("exif", b"")


def _bmp(data: bytes) -> tuple[np.ndarray, bytes]:
  return _rgb(_opened(BmpImageFile, data)), b""


def _opened(reader: Callable[[io.BytesIO], Image.Image], data: bytes) -> Image.Image:
  """Opens an image with a Pillow class, which parses only the header.

  Raises:
    DecodeError: the image has more than MAX_PIXELS pixels.
  """
  image = reader(io.BytesIO(data))
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise DecodeError(f"{width} x {height} pixels, expected at most {MAX_PIXELS} in all")
  return image


def _rgb(image: Image.Image) -> np.ndarray:
  """Converts a Pillow image of any mode to RGB pixels; transparent parts are composited on white."""
  if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return np.array(image.convert("RGB"))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
  """Converts uint16 pixels (grey, BGR or BGRA, from OpenCV) to uint8 RGB, composited on white."""
  if pixels.ndim == 2:
    pixels = np.repeat(pixels[..., None], 3, axis=2)
  values = pixels[..., 2::-1].astype(np.float64) / 257
  if pixels.shape[2] == 4:
    alpha = pixels[..., 3:] / np.float64(65535)
    values = values * alpha + 255 * (1 - alpha)
  return np.rint(values).astype(np.uint8)


def _jpeg_segments(data: bytes) -> tuple[bytes, bytes, bytes]:
  """Removes the EXIF segments from a JPEG, and finds its frame header.

  EXIF segments are removed because Pillow parses them on opening, and warns about damaged ones.

  Returns:
    The file without EXIF segments; the contents of the first EXIF segment; and the frame header, which
    starts with the marker ff c0 to ff cf. A missing segment is b"".
  """
  kept, exif, frame, position = [data[:2]], [], b"", 2
  while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
    length = int.from_bytes(data[position + 2 : position + 4], "big")
    segment = data[position : position + 2 + length]
    if segment[1:2] == b"\xe1" and segment[4:10] == b"Exif\0\0":
      exif.append(segment[4:])
    else:
      kept.append(segment)
    if segment[1:2] in _FRAME_MARKERS:
      frame = segment
    position += 2 + length
  if not exif:
    return data, b"", frame
  return b"".join([*kept, data[position:]]), exif[0], frame


def _is_plain(frame: bytes) -> bool:
  """Tests whether a JPEG's frame header has 8 bits, 1 or 3 channels, and at most MAX_PIXELS pixels."""
  if len(frame) < 10:
    return False
  bits, height, width, channels = struct.unpack_from(">BHHB", frame, 4)
  return bits == 8 and channels in (1, 3) and 0 < height * width <= MAX_PIXELS


def _still(data: bytes) -> bytes:
  """Returns a PNG file without the chunks of an animation, so that only the default picture is left."""
  if not any(chunk in data for chunk in _APNG_CHUNKS):
    return data
  kept, position = [data[:8]], 8
  while position < len(data):
    length = int.from_bytes(data[position : position + 4], "big")
    chunk = data[position : position + 12 + length]
    if chunk[4:8] not in _APNG_CHUNKS:
      kept.append(chunk)
    position += 12 + length
  return b"".join(kept)


def _orientation(exif: bytes) -> int:
  """Returns the orientation in an EXIF block, 1 to 8; 1 (upright) if it is missing or damaged."""
  tiff = exif.removeprefix(b"Exif\0\0")
  order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
  if order is None:
    return 1
  try:
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
      tag, kind = struct.unpack_from(order + "HH", tiff, entry)
      if tag == 0x0112:
        (value,) = struct.unpack_from(order + {1: "B", 4: "I"}.get(kind, "H"), tiff, entry + 8)
        return value if 1 <= value <= 8 else 1
  except struct.error:
    pass
  return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Turns pixels upright. `orientation` is the EXIF value, 1 to 8; 1 changes nothing.

  The values 2 to 4 mirror the image or rotate it by 180°. The value 5 transposes it. The values 6 to 8
  transpose it and then mirror it or rotate it by 180°.
  """
  if orientation >= 5:
    pixels = pixels.transpose(1, 0, 2)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return pixels
