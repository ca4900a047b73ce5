"""Speed of the input: measures the figures of docs/input.md, in about five minutes.

  python docs/input_speed.py
  python docs/input_speed.py --only=pillow,scaled

It writes 640 JPEGs of 500 x 375 pixels into a temporary folder (512 of them for training). They are
then in the page cache, so the disk is not measured. Alternatives take turns image by image, because
the speed of a shared machine varies; the pipeline takes turns with the bare functions, see
byolx/planning/input_speed.py. Nothing else should run on the machine.
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import numpy as np
import threadpoolctl
from PIL import Image

from byolx.data.augment.resizing import crop_and_resize
from byolx.data.decode import decode
from byolx.data.prepare import write
from byolx.data.sources.prepared import prepared
from byolx.planning import input_speed
from byolx.runs import config, images

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from photographs import write_jpegs  # noqa: E402

SIZE, COUNT = 224, 640
AS_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def settings(photos: Path, *overrides: str):
  """Returns the config of an ImageNet-like run on the photographs."""
  file = f"{ROOT / 'configs' / 'image_folder.py'}:size={SIZE},arch=resnet50,batch=256"
  overrides = (f"--config.data.folder={photos}", *overrides)
  return config.load(file, list(overrides))


def take_turns(ways: dict[str, Callable], items: Iterable, rounds: int = 5) -> dict[str, float]:
  """Measures the time of one core per item of each way, in milliseconds.

  It is the median over items of the fastest round. All ways process an item before the next item, each
  time in another order. Only the thread's own CPU time counts.
  """
  items, functions = list(items), list(ways.values())
  spent = np.empty((rounds, len(items), len(ways)))
  with threadpoolctl.threadpool_limits(1):
    for turn, (i, item) in itertools.product(range(rounds), enumerate(items)):
      for place in range(len(ways)):
        j = (turn + i + place) % len(ways)
        began = time.thread_time()
        functions[j](item)
        spent[turn, i, j] = time.thread_time() - began
  return dict(zip(ways, 1e3 * np.median(spent.min(axis=0), axis=0), strict=True))


def device(photos: Path) -> None:
  """`byolx bench input`, colours in the step."""
  cfg = settings(photos, "--config.views.placement=device")
  print(input_speed.measure_input(cfg, [0, 1, 2], seconds=3).text())


def host(photos: Path) -> None:
  """`byolx bench input`, colours on the host."""
  cfg = settings(photos, "--config.views.placement=host")
  print(input_speed.measure_input(cfg, [0, 1, 2], seconds=3).text())


def threads(photos: Path) -> None:
  """Threads in one process, which share the interpreter's lock between decoding and resizing."""
  for count in (1, 2, 3):
    cfg = settings(photos, "--config.views.placement=device", f"--config.data.threads={count}")
    (rate,) = input_speed.measure_input(cfg, [0], seconds=2).rates
    print(f"threads={count}, no workers: {rate.images_per_second:6.0f} images/s")


def pillow(photos: Path) -> None:
  """One decode and two views, uint8, without colours: byolx, and the same work with Pillow."""
  cfg = settings(photos)
  work = input_speed.Work.of(cfg, images.build_sources(cfg).train)
  input_speed.batching.one_thread_per_image()

  def ours(antialias: bool):
    def way(i):
      image = decode(work.encoded[i], "")
      return [crop_and_resize(image, drawn.crop, SIZE, antialias) for drawn in work.draws[i]]

    return way

  def with_pillow(i):
    image = Image.open(io.BytesIO(work.encoded[i])).convert("RGB")
    views = []
    for drawn in work.draws[i]:
      top, left, height, width = drawn.crop.tolist()
      box = (left, top, left + width, top + height)
      views.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)))
    return views

  ways = {
    "byolx": ours(antialias=False),
    "byolx, antialias": ours(antialias=True),
    "Pillow (always antialiases)": with_pillow,
  }
  spent = take_turns(ways, range(len(work.encoded)))
  for name, ms in spent.items():
    ratio = spent["Pillow (always antialiases)"] / ms
    print(f"{name:<30}{ms:7.3f} ms{1e3 / ms:8.0f} images/s{ratio:7.2f} x Pillow")


def decoders(photos: Path) -> None:
  """Decoding of bytes to RGB pixels."""

  def with_opencv(flags):
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)

  ways = {
    "byolx (checks, then OpenCV)": lambda data: decode(data, ""),
    "OpenCV": with_opencv(AS_RGB),
    "OpenCV at half the size": with_opencv(cv2.IMREAD_REDUCED_COLOR_2),
    "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
  }
  files = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[:256]]
  for name, ms in take_turns(ways, files).items():
    print(f"{name:<30}{ms:7.3f} ms{1e3 / ms:8.0f} images/s")
  equal = all((decode(data, "") == ways["Pillow"](data)).all() for data in files)
  print(f"byolx and Pillow decode to the same bits: {equal}")


def scaled(photos: Path) -> None:
  """Decoding at half the size: mean difference of a view, in grey levels."""
  files = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[::16]]
  whole, half = np.array([2, 66, 368, 368], np.int32), np.array([1, 33, 184, 184], np.int32)
  print(f"{'view':>8}{'pixels left per pixel needed':>32}{'as it is':>12}{'antialiased':>14}")
  for size in (224, 128, 96, 64, 32):
    differences = []
    for antialias in (False, True):
      levels = []
      for data in files:
        small = cv2.imdecode(
          np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2 | cv2.IMREAD_IGNORE_ORIENTATION
        )
        small = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
        one = crop_and_resize(decode(data, ""), whole, size, antialias)
        other = crop_and_resize(small, half, size, antialias)
        levels.append(np.abs(one.astype(int) - other).mean())
      differences.append(np.mean(levels))
    print(f"{size:>8}{184 / size:>32.1f}{differences[0]:>12.1f}{differences[1]:>14.1f}")


def reading(photos: Path) -> None:
  """Reading of one image's bytes, in random order: from a folder, and from a prepared set."""
  folder = images.build_sources(settings(photos)).train
  with tempfile.TemporaryDirectory() as other:
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
      write.prepare(photos, Path(other) / "set", write.Options(shards=4))
    records = prepared(Path(other) / "set", "train")
    ways = {
      "a folder of files": lambda i: folder.encoded(i),
      "a prepared set": lambda i: records.encoded(i),
      "of which checksum": lambda i: zlib.crc32(files[i]),
    }
    files = [records.encoded(i)[0] for i in range(len(folder))]
    order = np.random.default_rng(0).permutation(len(folder)).tolist()
    for name, ms in take_turns(ways, order).items():
      print(f"{name:<30}{ms:7.3f} ms{1e3 / ms:8.0f} images/s")


SECTIONS = (device, host, threads, pillow, decoders, scaled, reading)


def main():
  names = [section.__name__ for section in SECTIONS]
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--only", default=",".join(names), help=f"some of {', '.join(names)}")
  wanted = parser.parse_args().only.split(",")
  if unknown := set(wanted) - set(names):
    parser.error(f"--only: {', '.join(unknown)}; expected some of {', '.join(names)}")
  with tempfile.TemporaryDirectory() as folder:
    photos = Path(folder)
    size = sum(path.stat().st_size for path in write_jpegs(photos, COUNT))
    print(f"{COUNT} JPEGs of 500 x 375, {size / COUNT / 1e3:.0f} kB each; {os.cpu_count()} cores")
    for section in SECTIONS:
      if section.__name__ in wanted:
        print(f"\n{section.__doc__.splitlines()[0]}\n")
        section(photos)


if __name__ == "__main__":  # worker processes import this file
  main()
