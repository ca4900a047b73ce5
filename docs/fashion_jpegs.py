"""Writes Fashion-MNIST as a folder of JPEGs, train/CLASS/*.jpg and test/CLASS/*.jpg.

  apt-get install dataset-fashion-mnist
  python docs/fashion_jpegs.py photos --train=3000 --test=1000

With these images the commands for a folder of your own images can be tried.
"""

import argparse
from pathlib import Path

import cv2

from byolx.data import splits
from byolx.data.sources import small


def write(folder: Path, split: str, count: int, side: int) -> None:
  """Enlarges the images of a balanced part of a split and saves them as JPEGs."""
  source = small.fashion_mnist(None, split)
  for index in splits.balanced_subset(source.labels, count, seed=0).tolist():
    image, label, _ = source[index]
    path = folder / split / source.classes[label].replace("/", "_") / f"{index}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), image)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--train", type=int, default=3000, help="images; default: 3000")
  parser.add_argument("--test", type=int, default=1000, help="images; default: 1000")
  parser.add_argument("--side", type=int, default=64, help="pixels; default: 64")
  arguments = parser.parse_args()
  for split, count in (("train", arguments.train), ("test", arguments.test)):
    write(arguments.folder, split, count, arguments.side)


if __name__ == "__main__":
  main()
