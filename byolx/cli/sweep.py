"""`byolx sweep`: chooses hyperparameters on validation images, then tests the choice."""

import argparse
import sys
from pathlib import Path

from byolx.cli import numbers, options

_SWEEP = """\
Choose hyperparameters on validation images, then evaluate the choice once on the test images.

Every cell of the grid is a run in WORKDIR/cells, which is not tested. The cell with the best
validation value is trained once per seed in WORKDIR/final and tested. Without --retrain, the cell's
own seed is not trained again. With --per, each value of a field gets a choice and a test.

Start the same command again to run what is missing, also after adding cells or seeds.
"""
_SWEEP_MORE = """\
examples:
  byolx sweep --config=FILE --grid=optim.base_rate=0.1,0.2,0.4 --workdir=runs/rates
  byolx sweep --config=configs/semi_supervised_imagenet.py:labels=0.1 --grid=semi_supervised ...
  byolx sweep --config=configs/finetune.py --config.init.workdir=runs/photos --grid=figure4 --jobs=2 ...
  byolx sweep --config=FILE --grid=model.width=1,2 --grid=rate_decay --per=model.width --workdir=runs/w

named grids: table9, seeds, table15_rate, table15_decay, rate_decay, table16, table14_depth,
  table14_size, linear_rates, semi_supervised, figure4, table7; see byolx/sweeps/grids.py.
  The grid `seeds` is for the launchers; use --seeds here.

The workdir has sweep.json (cells, choices and their validation values), results.json (test
results), cells/*/ and final/*/seed_*/ (workdirs of `byolx train`, each with its output in log.txt).
"""


def add(command) -> None:
  """Adds the command `byolx sweep` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command(
    "sweep",
    _run,
    "choose hyperparameters on validation images, then test the choice",
    description=_SWEEP,
    epilog=_SWEEP_MORE,
  )
  add = sub.add_argument
  add("--config", required=True, metavar="FILE[:ARGS]", help=options.CONFIG_HELP)
  add(
    "--grid",
    required=True,
    action="append",
    metavar="NAME|FIELD=V1,V2,...",
    help="named grid, or values of a field; several --grid are combined; lists as (1,2),(3,4)",
  )
  add(
    "--per",
    action="append",
    default=[],
    metavar="FIELD",
    help="field of the grid, each value of which gets a choice and a test; may be repeated",
  )
  add(
    "--select",
    default="top1",
    metavar="METRIC[:KEY=VALUE,...]",
    help="metric of the validation records; keys: protocol, encoder, labels; default: top1",
  )
  add(
    "--seeds",
    type=numbers.seeds,
    default=[],
    help="seeds of the tested runs, as 0,1,2; default: the config's",
  )
  add(
    "--retrain",
    action="store_true",
    help="train the tested runs on training and validation images together",
  )
  add(
    "--jobs",
    type=numbers.count,
    default=1,
    metavar="N",
    help="number of runs at once; default: 1, because runs cannot share a GPU or TPU",
  )
  add(
    "--dry_run", action="store_true", help="print the commands of the missing runs, and run nothing"
  )
  add("--workdir", type=Path, required=True, help="folder of the sweep")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  import jax

  # This process computes nothing; only the runs may use an attached TPU or GPU.
  jax.config.update("jax_platforms", "cpu")
  from byolx.sweeps import run as sweep_run
  from byolx.sweeps import selection, sweep

  plan = sweep.build(
    arguments.config,
    overrides,
    arguments.grid,
    arguments.workdir,
    per=arguments.per,
    by=selection.parse(arguments.select),
    seeds=arguments.seeds,
    retrain=arguments.retrain,
  )
  if arguments.dry_run:
    print("".join(f"{line}\n" for line in sweep_run.missing(plan)), end="")
    return 0
  failed = sweep_run.run(plan, arguments.jobs)
  if failed:
    names = ", ".join(run.name for run in failed)
    print(
      f"byolx: error: {len(failed)} of the runs failed ({names}); the same command runs what is "
      "missing, and cells without results may be left out of --grid",
      file=sys.stderr,
    )
  return options.FAILED if failed else 0
