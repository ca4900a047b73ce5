"""`byolx plan`."""

import argparse
import json
import os
import sys
from pathlib import Path

from byolx.cli import numbers, options

_PLAN = """\
Say whether a config's train step fits a TPU slice, how fast it is, how long the whole schedule takes
and what it costs. The step that `byolx train` runs is compiled by the TPU compiler for the slice,
which need not be there; neither need the images. It takes minutes, once: results are kept.

Several configs or topologies make a table. When a step does not fit, changes are compiled too, from
what costs least to what costs most, until one fits; the exit code is then 1.

Needs libtpu: pip install 'byolx[plan]'.
"""
_PLAN_MORE = """\
examples:
  byolx plan --config=configs/pretrain_imagenet.py --topology=v3:16x16
  byolx plan --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 --topology=v3-512,v4-128 \\
    --price=0.5 --json=plan.json
  byolx plan --config=configs/image_folder.py --images=100000 --classes=20 --topology=v5litepod-8 \\
    --costs=10

Topologies are chips, as v2:4x4, v3:16x16, v4:4x4x4, v5e:4x4, v5p:2x2x4, v6e:2x4, or names such as
v3-512. A core here is a device as jax sees it: a chip on v4 and later, half of one before.
"""


def add(command) -> None:
  """Adds the command; see `byolx.cli.main`."""
  sub = command(
    "plan",
    _run,
    "compile for TPUs that are not there: does it fit, how fast, for how long",
    description=_PLAN,
    epilog=_PLAN_MORE,
  )
  sub.add_argument(
    "--config",
    required=True,
    action="append",
    metavar="FILE[:ARGS]",
    help=f"{options.CONFIG_HELP}; may be given several times",
  )
  sub.add_argument(
    "--topology", required=True, metavar="NAME[,NAME...]", help="slices, such as v3:16x16 or v3-512"
  )
  sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
  sub.add_argument(
    "--images", type=numbers.count, help="training images; default: of the source, where known"
  )
  sub.add_argument("--classes", type=numbers.count, help="likewise")
  sub.add_argument(
    "--efficiency",
    type=numbers.some_share,
    default=0.5,
    help="share of the scheduled speed that a run will reach; default: 0.5",
  )
  sub.add_argument("--price", type=numbers.price, metavar="USD", help="of a core for an hour")
  sub.add_argument(
    "--costs", type=numbers.count, default=0, metavar="N", help="list the N costliest instructions"
  )
  sub.add_argument(
    "--no_search", action="store_true", help="do not look for what fits when a step does not"
  )
  sub.add_argument(
    "--cache",
    metavar="FOLDER",
    help="of earlier results; default: ~/.cache/byolx/plans; empty: compile anew",
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  import jax

  # Nothing runs: an attached TPU or GPU is left to others.
  jax.config.update("jax_platforms", "cpu")
  from byolx.core import files
  from byolx.planning import page, plan, tpu
  from byolx.runs import config

  terms = plan.Terms(
    efficiency=arguments.efficiency,
    price=arguments.price,
    images=arguments.images,
    classes=arguments.classes,
    search=not arguments.no_search,
    cache=_cache(arguments.cache),
  )
  topologies = [tpu.topology(name) for name in arguments.topology.split(",")]
  configs = [(name, config.load(name, overrides)) for name in arguments.config]
  wanted = [
    (name, plan.build(cfg, topology, terms), topology)
    for name, cfg in configs
    for topology in topologies
  ]
  plans = []
  for number, (name, built, topology) in enumerate(wanted, 1):
    if len(wanted) > 1:
      print(f"{number} of {len(wanted)}: {name} on {topology.name}", file=sys.stderr, flush=True)
    plans.append(plan.make(built, name, topology, terms))
  several = len(plans) > 1
  print(page.table(plans) if several else page.page(plans[0], arguments.costs))
  if arguments.json:
    found = [one.json(arguments.costs) for one in plans]
    text = json.dumps(found if several else found[0], indent=1)
    files.write_atomically(arguments.json, text + "\n")
  return 0 if all(one.figures.fits for one in plans) else options.FAILED


def _cache(given: str | None) -> Path | None:
  if given is None:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "byolx" / "plans"
  return Path(given) if given else None
