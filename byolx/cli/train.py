"""`byolx train`."""

import argparse
from pathlib import Path

from byolx.cli import numbers, options

_TRAIN = """\
Pretrain an encoder without labels by BYOL, then tell what it learned: k-NN and linear probe at
several shares of the labels, beside the same network untrained and raw pixels. Or, by the config's
task, train classifiers: on a frozen encoder, with the encoder it starts from, or from scratch.

Start the same command again and the run goes on where it stopped.
"""
_TRAIN_MORE = """\
examples:
  byolx train --config=configs/quickstart.py
  byolx train --config=configs/quickstart.py --seeds=0,1,2
  byolx train --config=configs/image_folder.py --config.data.folder=photos --workdir=runs/photos
  byolx train --config=configs/linear_imagenet.py --config.init.workdir=runs/pretrain_imagenet ...
  byolx train --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 --config.optim.base_rate=0.3

Every field is listed by `byolx fields`. In the workdir: config.json, metrics.jsonl, tensorboard/,
checkpoints/, results.json, parameters.txt, curves.png, views.png; of pretraining embedding.png; of
an encoder that came from another run lineage.json.
"""


def add(command) -> None:
  """Adds the command; see `byolx.cli.main`."""
  sub = command(
    "train",
    _run,
    "pretrain an encoder or train classifiers",
    description=_TRAIN,
    epilog=_TRAIN_MORE,
  )
  sub.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=options.CONFIG_HELP)
  sub.add_argument("--workdir", type=Path, help="default: runs/NAME_OF_CONFIG")
  sub.add_argument("--seeds", type=numbers.seeds, help="run once per seed, as 0,1,2, and average")
  options.add_distributed(sub)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.runs import config, schema
  from byolx.training import compile_cache

  options.join(arguments)
  cfg = config.load(arguments.config, overrides)
  workdir = arguments.workdir or Path("runs") / _stem(arguments.config)
  kept = None if arguments.seeds else compile_cache.begin(cfg, workdir, schema.task_source(cfg))
  # Imported only now, as all that follows runs while programs load.
  from byolx.runs import run

  if arguments.seeds:
    run.train_seeds(cfg, workdir, arguments.seeds)
  else:
    run.train_run(cfg, workdir, kept)
  return 0


def _stem(path: str) -> str:
  return Path(path.partition(":")[0]).stem
