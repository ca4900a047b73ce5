"""`byolx prepare`."""

import argparse
from pathlib import Path

from byolx.cli import numbers

_PREPARE = """\
Put the images of a data set into a few large files that are read at random much faster than
millions of small ones: data.source=array_record trains from them.

Give a folder of class folders or of images, or with train/ and test/ (or val/) of these; or plain
tar archives of the same, which are read as they are. ImageNet's archive of archives is understood.
Without --short_side every file is stored as it is. Files that cannot be decoded are listed in
unreadable.txt and left out.

Start the same command again and it goes on where it stopped. With --to and --verify alone, a set
is verified.
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
  """Adds the command; see `byolx.cli.main`."""
  sub = command(
    "prepare",
    _run,
    "put a folder or tar archives of images into a few large files",
    description=_PREPARE,
    epilog=_PREPARE_MORE,
  )
  sub.add_argument(
    "--from", dest="source", type=Path, metavar="FOLDER|TAR", help="training images, or all"
  )
  sub.add_argument(
    "--test",
    type=Path,
    metavar="FOLDER|TAR",
    help="images of the test split; default: as in --from",
  )
  sub.add_argument(
    "--test_labels", type=Path, metavar="FILE", help="lines `file-name class-name` for --test"
  )
  sub.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="of the prepared set")
  sub.add_argument("--name", default="", help="of the set; default: as --from is called")
  size = sub.add_mutually_exclusive_group()
  size.add_argument(
    "--shard_mb", type=numbers.count, default=256, help="input per shard; default: 256"
  )
  size.add_argument("--shards", type=numbers.count, help="shards of the training split")
  sub.add_argument(
    "--short_side",
    type=numbers.count,
    help="make images smaller whose shorter side is longer than this",
  )
  sub.add_argument(
    "--quality", type=numbers.quality, default=95, help="of their JPEGs; default: 95"
  )
  sub.add_argument("--workers", type=numbers.count, help="processes; default: one per core")
  sub.add_argument(
    "--max_failed_share",
    type=numbers.share,
    default=0.01,
    help="of unreadable images; default: 0.01",
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
    raise config.ConfigError(
      "neither --from nor --verify was given; expected what to prepare, or verify"
    )
  if arguments.verify:
    write.verify(arguments.to, workers, arguments.verify == "images")
  return 0
