"""`byolx bench`."""

import argparse
import dataclasses
import json
from pathlib import Path

from byolx.cli import numbers, options

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


def add(command) -> None:
  """Adds the command; see `byolx.cli.main`."""
  sub = command(
    "bench", _run, "measure how fast images come", description=_BENCH, epilog=_BENCH_MORE
  )
  sub.add_argument("what", choices=("input",), help="input: reading, decoding, views, transfer")
  sub.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=options.CONFIG_HELP)
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
