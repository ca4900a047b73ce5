"""`byolx plan`: prints memory, speed, duration and price of training a config on a TPU slice."""

import argparse
import json
import os
import sys
from pathlib import Path

from byolx.cli import numbers, options

_PLAN = """\
Print whether a config's train step fits a TPU slice, its speed, and the duration and price of the
whole schedule. The TPU compiler compiles the step that `byolx train` runs; neither a TPU nor the
images are needed. The first compilation takes minutes; its results are cached.

Several configs or topologies make a table. If a step does not fit, changes of the config are
compiled too, the cheapest first, until one fits; the exit code is then 1.

Needs libtpu: pip install 'byolx[plan]'.
"""
_PLAN_MORE = """\
examples:
  byolx plan --config=configs/pretrain_imagenet.py --topology=v3:16x16
  byolx plan --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 --topology=v3-512,v4-128 \\
    --price=0.5 --json=plan.json
  byolx plan --config=configs/image_folder.py --images=100000 --classes=20 --topology=v5litepod-8 \\
    --costs=10

A topology is a layout of chips, such as v2:4x4, v3:16x16, v4:4x4x4, v5e:4x4, v5p:2x2x4 or v6e:2x4,
or an accelerator type such as v3-512. A core is a device as jax counts them: a chip on v4 and
later, half a chip before.
"""


def add(command) -> None:
  """Adds the command `byolx plan` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command(
    "plan",
    _run,
    "compile for a TPU slice without a TPU: memory, speed, duration and price",
    description=_PLAN,
    epilog=_PLAN_MORE,
  )
  sub.add_argument(
    "--config",
    required=True,
    action="append",
    metavar="FILE[:ARGS]",
    help=f"{options.CONFIG_HELP}; may be repeated",
  )
  sub.add_argument(
    "--topology", required=True, metavar="NAME[,NAME...]", help="slices, such as v3:16x16 or v3-512"
  )
  sub.add_argument(
    "--json", type=Path, metavar="FILE", help="file to which all figures are written as well"
  )
  sub.add_argument(
    "--images", type=numbers.count, help="number of training images; default: that of the source"
  )
  sub.add_argument(
    "--classes", type=numbers.count, help="number of classes; default: that of the source"
  )
  sub.add_argument(
    "--efficiency",
    type=numbers.some_share,
    default=0.5,
    help="share of the scheduled speed that a run is expected to reach; default: 0.5",
  )
  sub.add_argument("--price", type=numbers.price, metavar="USD", help="price of a core-hour")
  sub.add_argument(
    "--costs", type=numbers.count, default=0, metavar="N", help="list the N costliest instructions"
  )
  sub.add_argument(
    "--no_search",
    action="store_true",
    help="if a step does not fit, do not search for changes with which it does",
  )
  sub.add_argument(
    "--cache",
    metavar="FOLDER",
    help="folder of cached results; default: ~/.cache/byolx/plans; empty: no cache",
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  import jax

  # The compiled step does not run, so other processes can use an attached TPU or GPU.
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
  recipes = [
    (name, plan.build(cfg, topology, terms), topology)
    for name, cfg in configs
    for topology in topologies
  ]
  plans = []
  for number, (name, recipe, topology) in enumerate(recipes, 1):
    if len(recipes) > 1:
      print(f"{number} of {len(recipes)}: {name} on {topology.name}", file=sys.stderr, flush=True)
    plans.append(plan.make(recipe, name, topology, terms))
  several = len(plans) > 1
  print(page.table(plans) if several else page.page(plans[0], arguments.costs))
  if arguments.json:
    values = [each.json(arguments.costs) for each in plans]
    text = json.dumps(values if several else values[0], indent=1)
    files.write_atomically(arguments.json, text + "\n")
  return 0 if all(each.figures.fits for each in plans) else options.FAILED


def _cache(folder: str | None) -> Path | None:
  """Returns the folder of cached results. None means that nothing is cached.

  Args:
    folder: value of `--cache`. None selects the default folder, and "" disables the cache.
  """
  if folder is None:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "byolx" / "plans"
  return Path(folder) if folder else None
