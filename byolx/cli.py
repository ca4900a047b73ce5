"""The `byolx` command: train, eval, show-views, prepare, bench, inspect, fields."""

import argparse
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from byolx import numbers

USAGE = 2
FAILED = 1
STOPPED = 75  # EX_TEMPFAIL: start the same command again
INTERRUPTED = 130

_TRAIN = """\
Pretrain an encoder without labels by BYOL, then tell what it learned: k-NN and linear probe at
several shares of the labels, beside the same network untrained and raw pixels.

Start the same command again and the run goes on where it stopped.
"""
_TRAIN_MORE = """\
examples:
  byolx train --config=configs/quickstart.py
  byolx train --config=configs/quickstart.py --seeds=0,1,2
  byolx train --config=configs/image_folder.py --config.data.folder=photos --workdir=runs/photos
  byolx train --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 --config.optim.base_rate=0.3

Every field is listed by `byolx fields`. In the workdir: config.json, metrics.jsonl, tensorboard/,
checkpoints/, results.json, parameters.txt, curves.png, views.png, embedding.png.
"""
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
_BENCH = """\
Measure the input of a config, on its own images: each stage in one thread; the limit, which is
the bare functions on bytes in memory; the pipeline in this process and in worker processes; and
what it can feed. About a minute; leave the machine alone meanwhile.
"""
_BENCH_MORE = """\
examples:
  byolx bench input --config=configs/image_folder.py --config.data.folder=photos
  byolx bench input --config=configs/pretrain_imagenet.py --config.data.folder=imagenet --json=input.json
"""
_CONFIG_HELP = "config file, with arguments after a colon; --config.FIELD=VALUE changes a field"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit code: see the constants above."""
  arguments, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
  logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
  logging.getLogger("byolx").setLevel(logging.INFO)
  _parse_absl_flags()
  # Imported here: `byolx --help` answers without waiting for jax.
  from byolx import distributed
  from byolx.checkpoint import CheckpointError
  from byolx.config import ConfigError
  from byolx.data.failures import TooManyFailuresError
  from byolx.distributed import DistributedError
  from byolx.fit import StoppedError
  from byolx.train import DivergedError

  try:
    code = arguments.run(arguments, overrides)
  except ConfigError as error:
    return _fail(error, USAGE)
  except (CheckpointError, DivergedError, DistributedError, TooManyFailuresError, OSError) as error:
    return _fail(error, FAILED)
  except StoppedError as error:
    return _stop(str(error), INTERRUPTED if error.by_keyboard else STOPPED)
  except KeyboardInterrupt:
    return _stop("stopped by Ctrl-C", INTERRUPTED)
  except Exception as error:
    if distributed.count() > 1:
      distributed.await_reason()
      traceback.print_exc()
      _fail(error, FAILED)
    raise
  distributed.finish()
  return code


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line; argparse would print the usage before it."""

  def error(self, message: str) -> NoReturn:
    self.exit(USAGE, f"byolx: error: {message}; see {self.prog} --help\n")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = _Parser(
    prog="byolx",
    description="BYOL in Flax NNX: pretrain image encoders without labels, and measure them.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name: str, run, summary: str, **texts) -> argparse.ArgumentParser:
    sub = commands.add_parser(
      name,
      help=summary,
      description=texts.get("description", summary),
      epilog=texts.get("epilog"),
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    sub.set_defaults(run=run)
    return sub

  train = command(
    "train", _train, "pretrain an encoder and evaluate it", description=_TRAIN, epilog=_TRAIN_MORE
  )
  train.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=_CONFIG_HELP)
  train.add_argument("--workdir", type=Path, help="default: runs/NAME_OF_CONFIG")
  train.add_argument("--seeds", type=numbers.seeds, help="run once per seed, as 0,1,2, and average")
  _add_distributed(train)

  evaluate = command("eval", _eval, "evaluate the newest checkpoint of a workdir again")
  evaluate.add_argument("--from", dest="workdir", type=Path, required=True, metavar="WORKDIR")
  _add_distributed(evaluate)

  show = command("show-views", _show_views, "write a picture of images and pairs of their views")
  show.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=_CONFIG_HELP)
  show.add_argument("--output", type=Path, default=Path("views.png"), help="default: views.png")
  show.add_argument("--images", type=numbers.count, default=8, help="rows; default: 8")
  show.add_argument(
    "--pairs", type=numbers.count, default=4, help="pairs of views per image; default: 4"
  )

  _add_prepare(command)
  _add_bench(command)
  page = command("inspect", _inspect, "say what a workdir or a checkpoint holds, on one page")
  page.add_argument("path", type=Path, metavar="WORKDIR|CHECKPOINT")
  page.add_argument("--verify", action="store_true", help="read every array, compare digests")
  page.add_argument("--json", type=Path, metavar="FILE", help="write the page there as well")
  command("fields", _fields, "list every config field with its default and meaning")
  arguments, rest = parser.parse_known_args(argv)
  for word in rest:
    if "config" not in arguments or not word.startswith("--config."):
      commands.choices[arguments.command].error(f"unknown argument {word}")
    if "=" not in word:
      parser.error(f"{word}: expected --config.FIELD=VALUE")
  return arguments, rest


def _add_distributed(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--distributed",
    action="store_true",
    help="be one of several processes; enough on TPU pods and in clusters such as SLURM's",
  )
  sub.add_argument(
    "--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens, and"
  )
  sub.add_argument("--processes", type=numbers.count, metavar="N", help="how many there are, and")
  sub.add_argument("--process", type=numbers.index, metavar="I", help="which one this is, from 0")
  sub.add_argument(
    "--peer_timeout",
    type=numbers.seconds,
    default=30.0,
    help="seconds after which a silent process counts as lost; default: 30",
  )


def _add_prepare(command) -> None:
  sub = command(
    "prepare",
    _prepare,
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


def _add_bench(command) -> None:
  sub = command(
    "bench", _bench, "measure how fast images come", description=_BENCH, epilog=_BENCH_MORE
  )
  sub.add_argument("what", choices=("input",), help="input: reading, decoding, views, transfer")
  sub.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=_CONFIG_HELP)
  sub.add_argument(
    "--workers",
    type=numbers.counts,
    help="numbers of worker processes to try; default: 0, 1 and all cores",
  )
  sub.add_argument(
    "--seconds",
    type=numbers.seconds,
    default=3.0,
    help="of each of some 20 measurements; default: 3",
  )
  sub.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")


def _join(arguments: argparse.Namespace) -> None:
  """Joins the other processes, if there are any; then only the writer prints to stdout."""
  from byolx import distributed
  from byolx.config import ConfigError

  where = (arguments.coordinator, arguments.processes, arguments.process)
  if not arguments.distributed:
    if any(value is not None for value in where):
      raise ConfigError("--coordinator, --processes and --process: expected with --distributed")
    return
  try:
    distributed.initialise(*where, peer_timeout=arguments.peer_timeout)
  except ValueError as error:
    raise ConfigError(f"--distributed: {error}") from None
  if distributed.count() > 1:
    logging.basicConfig(format=f"process {distributed.index()}: %(message)s", force=True)
  if not distributed.is_writer():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import config, run

  _join(arguments)
  cfg = config.load(arguments.config, overrides)
  workdir = arguments.workdir or Path("runs") / _stem(arguments.config)
  if arguments.seeds:
    run.pretrain_seeds(cfg, workdir, arguments.seeds)
  else:
    run.pretrain(cfg, workdir)
  return 0


def _eval(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import run

  _join(arguments)
  run.evaluate_run(arguments.workdir)
  return 0


def _show_views(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import config, experiment, run

  cfg = config.load(arguments.config, overrides)
  source, _ = experiment.build_sources(cfg)
  run.write_views(cfg, source, arguments.output, arguments.images, arguments.pairs)
  print(f"wrote {arguments.output}")
  return 0


def _prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import config, prepare
  from byolx.data.shards import Encode
  from byolx.machine import usable_cores

  workers = arguments.workers or usable_cores()
  if arguments.source is not None:
    short_side = arguments.short_side
    options = prepare.Options(
      name=arguments.name,
      shards=arguments.shards,
      shard_mb=arguments.shard_mb,
      encode=Encode(short_side, arguments.quality) if short_side else None,
      workers=workers,
      max_failed_share=arguments.max_failed_share,
    )
    prepare.prepare(arguments.source, arguments.to, options, arguments.test, arguments.test_labels)
  elif not arguments.verify:
    raise config.ConfigError(
      "neither --from nor --verify was given; expected what to prepare, or verify"
    )
  if arguments.verify:
    prepare.verify(arguments.to, workers, arguments.verify == "images")
  return 0


def _bench(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import bench, config, logs
  from byolx.machine import usable_cores

  cfg = config.load(arguments.config, overrides)
  workers = arguments.workers or sorted({0, 1, usable_cores()})
  report = bench.measure_input(cfg, workers, arguments.seconds)
  print(report.text())
  if arguments.json:
    text = json.dumps(dataclasses.asdict(report), indent=1)
    logs.write_atomically(arguments.json, text + "\n")
  return 0


def _inspect(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import inspection, logs

  page = inspection.inspect(arguments.path, arguments.verify)
  print(page.text())
  if arguments.json:
    logs.write_atomically(arguments.json, page.json())
  return FAILED if page.damaged else 0


def _fields(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.fields import FIELDS

  for name, field in FIELDS.items():
    print(f"{name:<34} {field.default!s:<26} {field.meaning}")
  return 0


def _stem(path: str) -> str:
  return Path(path.partition(":")[0]).stem


def _parse_absl_flags() -> None:
  """grain's worker processes read absl's flags, which only an absl main would parse."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _fail(error: Exception, code: int) -> int:
  """Says what is wrong and returns the exit code; with several processes it ends all of them."""
  from byolx import distributed

  print(f"byolx: error: {distributed.prefix()}{error}", file=sys.stderr)
  distributed.leave(code, f"failed: {str(error) or type(error).__name__}")
  return code


def _stop(reason: str, code: int) -> int:
  from byolx import distributed

  more = "the same command goes on from there"
  print(f"\nbyolx: {distributed.prefix()}{reason}; {more}", file=sys.stderr)
  distributed.leave(code, f"ended: {reason}")
  return code
