"""JPEG files of real photographs, for tests and benchmarks.

  python tests/photographs.py FOLDER --count=512

Cuts 500 x 375 pieces out of the photographs that scikit-learn and matplotlib ship, each piece
another part, mirrored or not, and writes them as JPEGs of quality 90: of ImageNet's usual size, and
56 kB each. No two are the same. The same arguments give the same files.
"""

import argparse
from pathlib import Path

import cv2
import matplotlib.cbook
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

HEIGHT, WIDTH, QUALITY = 375, 500, 90


def photographs() -> list[np.ndarray]:
  """Three photographs, uint8 RGB of at least 375 x 500: a temple, a flower, a portrait."""
  with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
    portrait = np.asarray(Image.open(file).convert("RGB"))
  return [load_sample_image("china.jpg"), load_sample_image("flower.jpg"), portrait]


def pieces(count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0):
  """Yields `count` different pieces (number of the photograph, uint8 [height, width, 3])."""
  images, rng, seen = photographs(), np.random.default_rng(seed), set()
  while len(seen) < count:
    number = len(seen) % len(images)
    image = images[number]
    top = int(rng.integers(image.shape[0] - height + 1))
    left = int(rng.integers(image.shape[1] - width + 1))
    mirrored = bool(rng.integers(2))
    if (number, top, left, mirrored) in seen:
      continue
    seen.add((number, top, left, mirrored))
    piece = image[top : top + height, left : left + width]
    yield number, piece[:, ::-1] if mirrored else piece


def write_jpegs(
  folder: Path, count: int, height: int = HEIGHT, width: int = WIDTH, quality: int = QUALITY
) -> list[Path]:
  """Writes `count` JPEGs into class folders, one class per photograph; returns their paths."""
  paths = []
  for i, (number, piece) in enumerate(pieces(count, height, width)):
    path = folder / f"photograph_{number}" / f"{i:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    bgr = cv2.cvtColor(np.ascontiguousarray(piece), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    path.write_bytes(data.tobytes())
    paths.append(path)
  return paths


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--count", type=int, default=512)
  arguments = parser.parse_args()
  written = write_jpegs(arguments.folder, arguments.count)
  size = sum(path.stat().st_size for path in written)
  print(f"{len(written)} JPEGs, {size / len(written) / 1e3:.0f} kB each, in {arguments.folder}")
