"""`byolx prepare`: writes the images of a data set to a few large files, which load faster."""

import argparse
from pathlib import Path

from byolx.cli import numbers

_PREPARE = """\
Write the images of a data set to a few large files, in which random access is much faster than in
millions of small files. Set data.source=array_record to train from them.

The input is a folder of class folders, a folder of images, or a folder with these in train/ and
test/ (or val/). Uncompressed tar archives of such folders, and ImageNet's archive of archives, are
read without unpacking. Without --short_side every file is stored unchanged. Files that cannot be
decoded are left out and listed in unreadable.txt.

Start the same command again to continue where it stopped. With only --to and --verify, an existing
set is verified.
"""
_PREPARE_MORE = """\
examples:
  byolx prepare --from=photos --to=sets/photos
  byolx prepare --from=ILSVRC2012_img_train.tar --test=ILSVRC2012_img_val.tar \\
    --test_labels=val.txt --to=sets/imagenet --verify
  byolx prepare --from=imagenet --to=sets/imagenet_256 --short_side=256
  byolx prepare --to=sets/imagenet --verify
"""


def add(command) -> None:
  """Adds the command `byolx prepare` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command(
    "prepare",
    _run,
    "write a folder or tar archives of images to a few large files",
    description=_PREPARE,
    epilog=_PREPARE_MORE,
  )
  sub.add_argument(
    "--from",
    dest="source",
    type=Path,
    metavar="FOLDER|TAR",
    help="training images, or the images of all splits",
  )
  sub.add_argument(
    "--test",
    type=Path,
    metavar="FOLDER|TAR",
    help="images of the test split; default: those in --from",
  )
  sub.add_argument(
    "--test_labels",
    type=Path,
    metavar="FILE",
    help="labels of --test, in lines `file-name class-name`",
  )
  sub.add_argument(
    "--to", type=Path, required=True, metavar="FOLDER", help="folder of the prepared set"
  )
  sub.add_argument("--name", default="", help="name of the set; default: the name of --from")
  size = sub.add_mutually_exclusive_group()
  size.add_argument(
    "--shard_mb", type=numbers.count, default=256, help="megabytes of input per shard; default: 256"
  )
  size.add_argument("--shards", type=numbers.count, help="number of shards of the training split")
  sub.add_argument(
    "--short_side",
    type=numbers.count,
    help="reduce larger images to this length of the shorter side, in pixels",
  )
  sub.add_argument(
    "--quality",
    type=numbers.quality,
    default=95,
    help="JPEG quality of the reduced images; default: 95",
  )
  sub.add_argument(
    "--workers", type=numbers.count, help="number of processes; default: one per core"
  )
  sub.add_argument(
    "--max_failed_share",
    type=numbers.share,
    default=0.01,
    help="largest accepted share of unreadable images; default: 0.01",
  )
  sub.add_argument(
    "--verify",
    nargs="?",
    const="bytes",
    choices=("bytes", "images"),
    help="read the set again and compare every byte; `images` also decodes every image",
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.core import config
  from byolx.core.machine import usable_cores
  from byolx.data.prepare import write
  from byolx.data.prepare.shards import Encode

  workers = arguments.workers or usable_cores()
  if arguments.source is not None:
    short_side = arguments.short_side
    options = write.Options(
      name=arguments.name,
      shards=arguments.shards,
      shard_mb=arguments.shard_mb,
      encode=Encode(short_side, arguments.quality) if short_side else None,
      workers=workers,
      max_failed_share=arguments.max_failed_share,
    )
    write.prepare(arguments.source, arguments.to, options, arguments.test, arguments.test_labels)
  elif not arguments.verify:
    raise config.ConfigError("neither --from nor --verify was given; expected one of them")
  if arguments.verify:
    write.verify(arguments.to, workers, arguments.verify == "images")
  return 0
