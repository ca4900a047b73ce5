"""`byolx train`: trains the networks of a config and evaluates them."""

import argparse
from pathlib import Path

from byolx.cli import numbers, options

_TRAIN = """\
Pretrain an encoder without labels by BYOL, then evaluate it: k-NN and linear probe at several
shares of the labels, beside the untrained network and raw pixels. Or, depending on the config's
task, train classifiers: on a frozen encoder, by fine-tuning an encoder, or from scratch.

Start the same command again to continue a run where it stopped.
"""
_TRAIN_MORE = """\
examples:
  byolx train --config=configs/quickstart.py
  byolx train --config=configs/quickstart.py --seeds=0,1,2
  byolx train --config=configs/image_folder.py --config.data.folder=photos --workdir=runs/photos
  byolx train --config=configs/linear_imagenet.py --config.init.workdir=runs/pretrain_imagenet ...
  byolx train --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 --config.optim.base_rate=0.3

`byolx fields` lists every field. The workdir has config.json, metrics.jsonl, tensorboard/,
checkpoints/, results.json, parameters.txt, curves.png and views.png; after pretraining also
embedding.png; with an encoder from another run also lineage.json.
"""


def add(command) -> None:
  """Adds the command `byolx train` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command(
    "train",
    _run,
    "pretrain an encoder or train classifiers",
    description=_TRAIN,
    epilog=_TRAIN_MORE,
  )
  sub.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=options.CONFIG_HELP)
  sub.add_argument("--workdir", type=Path, help="folder of the run; default: runs/NAME_OF_CONFIG")
  sub.add_argument(
    "--seeds",
    type=numbers.seeds,
    help="seeds, such as 0,1,2: one run each, and the means of their results",
  )
  options.add_distributed(sub)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.runs import config, schema
  from byolx.training import compile_cache

  options.join(arguments)
  workdir = arguments.workdir or Path("runs") / _stem(arguments.config)
  cfg = config.load(arguments.config, overrides, workdir)
  programs = None if arguments.seeds else compile_cache.begin(cfg, workdir, schema.task_source(cfg))
  # Imported late, because cached programs load meanwhile.
  from byolx.runs import run

  if arguments.seeds:
    run.train_seeds(cfg, workdir, arguments.seeds)
  else:
    run.train_run(cfg, workdir, programs)
  return 0


def _stem(path: str) -> str:
  return Path(path.partition(":")[0]).stem
