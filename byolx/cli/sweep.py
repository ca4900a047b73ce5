"""`byolx sweep`."""

import argparse
import sys
from pathlib import Path

from byolx.cli import numbers, options

_SWEEP = """\
Choose hyperparameters on validation images, then look once at the test images, with what was chosen.

Every cell of the grid is a run of its own in WORKDIR/cells, which does not test. The cell with the best
validation value is trained once for each seed in WORKDIR/final and tested; where the cell itself is
such a run, it is tested. With --per, that is done for each value of a field.

Start the same command again and it runs what is missing; with more cells or seeds too.
"""
_SWEEP_MORE = """\
examples:
  byolx sweep --config=FILE --grid=optim.base_rate=0.1,0.2,0.4 --workdir=runs/rates
  byolx sweep --config=configs/semi_supervised_imagenet.py:labels=0.1 --grid=semi_supervised ...
  byolx sweep --config=configs/finetune.py --config.init.workdir=runs/photos --grid=figure4 --jobs=2 ...
  byolx sweep --config=FILE --grid=model.width=1,2 --grid=rate_decay --per=model.width --workdir=runs/w

named grids: table9, seeds, table15_rate, table15_decay, rate_decay, table16, table14_depth,
  table14_size, linear_rates, semi_supervised, figure4, table7; see byolx/sweeps/grids.py.
  `seeds` is for the launchers; here, --seeds does it.

In the workdir: sweep.json (cells, what was chosen and by which values), results.json (the tests),
cells/*/ and final/*/seed_*/ (workdirs of `byolx train`, each with its output in log.txt).
"""


def add(command) -> None:
  """Adds the command; see `byolx.cli.main`."""
  sub = command(
    "sweep",
    _run,
    "choose hyperparameters on validation images, test what was chosen",
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
    help="what cells differ in; several give every combination; lists in brackets: (1,2),(3,4)",
  )
  add(
    "--per",
    action="append",
    default=[],
    metavar="FIELD",
    help="choose and test for each value of this field of the grid; may be given several times",
  )
  add(
    "--select",
    default="top1",
    metavar="METRIC[:KEY=VALUE,...]",
    help="of the validation records; keys: protocol, encoder, labels; default: top1",
  )
  add(
    "--seeds", type=numbers.seeds, default=[], help="of the tests, as 0,1,2; default: the config's"
  )
  add(
    "--retrain",
    action="store_true",
    help="test what was trained on training and validation images together",
  )
  add(
    "--jobs",
    type=numbers.count,
    default=1,
    metavar="N",
    help="runs at once; default: 1, as runs do not share a GPU or TPU",
  )
  add("--dry_run", action="store_true", help="print the commands that would run now, do nothing")
  add("--workdir", type=Path, required=True, help="of the sweep")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  import jax

  # Nothing is computed here: an attached TPU or GPU is left to the runs.
  jax.config.update("jax_platforms", "cpu")
  from byolx.sweeps import run as sweep_run
  from byolx.sweeps import selection, sweep

  wanted = sweep.build(
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
    print("".join(f"{line}\n" for line in sweep_run.missing(wanted)), end="")
    return 0
  failed = sweep_run.run(wanted, arguments.jobs)
  if failed:
    names = ", ".join(run.name for run in failed)
    print(
      f"byolx: error: {len(failed)} of the runs failed ({names}); the same command runs what is "
      "missing, and cells without results may be left out of --grid",
      file=sys.stderr,
    )
  return options.FAILED if failed else 0
