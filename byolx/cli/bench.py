"""`byolx bench input`: measures how fast this machine loads a config's images."""

import argparse
import dataclasses
import json
from pathlib import Path

from byolx.cli import numbers, options

_BENCH = """\
Measure the input of a config on its own images: the time of each stage in one thread; the limit,
which is the speed of the bare functions on bytes in memory; the speed of the pipeline in this
process and in worker processes; and the number of TPU cores that it can feed. It takes about a
minute, during which nothing else should run on the machine.
"""
_BENCH_MORE = """\
examples:
  byolx bench input --config=configs/image_folder.py --config.data.folder=photos
  byolx bench input --config=configs/pretrain_imagenet.py --config.data.folder=imagenet --json=input.json
"""


def add(command) -> None:
  """Adds the command `byolx bench` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command(
    "bench", _run, "measure the speed of the input", description=_BENCH, epilog=_BENCH_MORE
  )
  sub.add_argument(
    "what", choices=("input",), help="input: reading, decoding, augmenting and transferring images"
  )
  sub.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=options.CONFIG_HELP)
  sub.add_argument(
    "--workers",
    type=numbers.counts,
    help="numbers of worker processes to measure; default: 0, 1 and one per core",
  )
  sub.add_argument(
    "--seconds",
    type=numbers.seconds,
    default=3.0,
    help="seconds per measurement, of which there are about 20; default: 3",
  )
  sub.add_argument(
    "--json", type=Path, metavar="FILE", help="file to which the figures are written as well"
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.core import files
  from byolx.core.machine import usable_cores
  from byolx.planning import input_speed
  from byolx.runs import config

  cfg = config.load(arguments.config, overrides)
  workers = arguments.workers or sorted({0, 1, usable_cores()})
  report = input_speed.measure_input(cfg, workers, arguments.seconds)
  print(report.text())
  if arguments.json:
    text = json.dumps(dataclasses.asdict(report), indent=1)
    files.write_atomically(arguments.json, text + "\n")
  return 0
