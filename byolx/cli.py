"""The `byolx` command: train, eval, show-views, fields."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

USAGE = 2
FAILED = 1

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
_CONFIG_HELP = "config file, with arguments after a colon; --config.FIELD=VALUE changes a field"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit code: 0, 1 where a run failed, 2 where it could not start."""
  arguments, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
  logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
  logging.getLogger("byolx").setLevel(logging.INFO)
  _parse_absl_flags()
  # Imported here: `byolx --help` answers without waiting for jax.
  from byolx.config import ConfigError
  from byolx.data.failures import TooManyFailuresError
  from byolx.train import DivergedError

  try:
    return arguments.run(arguments, overrides)
  except ConfigError as error:
    return _fail(error, USAGE)
  except (DivergedError, TooManyFailuresError, OSError) as error:
    return _fail(error, FAILED)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
    return 130


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
  train.add_argument("--seeds", type=_seeds, help="run once per seed, as 0,1,2, and average")

  evaluate = command("eval", _eval, "evaluate the newest checkpoint of a workdir again")
  evaluate.add_argument("--from", dest="workdir", type=Path, required=True, metavar="WORKDIR")

  show = command("show-views", _show_views, "write a picture of images and pairs of their views")
  show.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=_CONFIG_HELP)
  show.add_argument("--output", type=Path, default=Path("views.png"), help="default: views.png")
  show.add_argument("--images", type=_count, default=8, help="rows; default: 8")
  show.add_argument("--pairs", type=_count, default=4, help="pairs of views per image; default: 4")

  command("fields", _fields, "list every config field with its default and meaning")
  arguments, rest = parser.parse_known_args(argv)
  for word in rest:
    if "config" not in arguments or not word.startswith("--config."):
      commands.choices[arguments.command].error(f"unknown argument {word}")
    if "=" not in word:
      parser.error(f"{word}: expected --config.FIELD=VALUE")
  return arguments, rest


def _seeds(text: str) -> list[int]:
  seeds = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
  if any(not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
    raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers such as 0,1,2")
  return seeds


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
  return int(text)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import config, run

  cfg = config.load(arguments.config, overrides)
  workdir = arguments.workdir or Path("runs") / _stem(arguments.config)
  if arguments.seeds:
    run.pretrain_seeds(cfg, workdir, arguments.seeds)
  else:
    run.pretrain(cfg, workdir)
  return 0


def _eval(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import run

  run.evaluate_run(arguments.workdir)
  return 0


def _show_views(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx import config, experiment, run

  cfg = config.load(arguments.config, overrides)
  source, _ = experiment.build_sources(cfg)
  run.write_views(cfg, source, arguments.output, arguments.images, arguments.pairs)
  print(f"wrote {arguments.output}")
  return 0


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
  print(f"byolx: error: {error}", file=sys.stderr)
  return code
