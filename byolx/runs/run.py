"""One workdir, from config to results: train, measure what the encoder knows, draw, and write it down."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict

from byolx.checkpoints import manager
from byolx.core import distributed, files, text
from byolx.core.config import ConfigError
from byolx.data import contact_sheet, decode, sampler
from byolx.data.sources import base
from byolx.data.transforms import Random, Transform
from byolx.evaluation.context import Finished
from byolx.runs import (
  config,
  experiment,
  fit,
  initial_state,
  metrics_log,
  results,
  rollbacks,
  schema,
  summary,
)
from byolx.runs.experiment import Experiment
from byolx.runs.images import Sources
from byolx.runs.workdir import claim, commit
from byolx.tasks import TASKS
from byolx.training import compile_cache, programs
from byolx.training.state import TrainState
from byolx.training.task import Record

SHEET_IMAGES, SHEET_REPEATS = 8, 4

PICTURES = ("curves.png", "views.png", "embedding.png")


def train_run(
  cfg: ConfigDict,
  workdir: Path,
  kept: programs.Kept | None = None,
  *,
  images: Sources | None = None,
  network: Callable[[nnx.Rngs], nnx.Module] | None = None,
) -> list[Record]:
  """Trains (or goes on where the workdir stopped), evaluates, writes results and pictures.

  Args:
    cfg: all fields.
    workdir: folder of the run.
    kept: cached programs, where `compile_cache.begin` has begun to load them.
    images: the user's own images instead of those of the group `data`.
    network: the user's own encoder, see `task.Setting`.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: the workdir holds a run of another config, or fields do not go together.
    loop.DivergedError: a loss that is not finite; the last good checkpoint stays.
  """
  kept = kept or compile_cache.begin(cfg, workdir, schema.task_source(cfg))
  if not (workdir / "checkpoints").exists():  # a run that goes on draws no state
    kept.begin("initialise")
  exp = experiment.build(cfg, kept, images, network)
  claim(workdir, cfg)
  print(summary.describe(exp, workdir), flush=True)
  if distributed.is_writer():
    parameters = parameter_overview.get_parameter_overview(
      nnx.to_pure_dict(exp.abstract_params), include_stats=False
    )
    files.write_atomically(workdir / "parameters.txt", parameters + "\n")
    write_views(cfg, exp.task.transform("train"), exp.train_source, workdir / "views.png")
  distributed.barrier("ready")
  state = fit.fit(exp, workdir)
  with fit.Stop(at_once="in the evaluation; the training is finished and saved"):
    return conclude(exp, state, workdir)


def train(
  fields: ConfigDict | Mapping[str, Any] | str,
  workdir: str | Path,
  overrides: Sequence[str] = (),
  *,
  images: Sources | None = None,
  network: Callable[[nnx.Rngs], nnx.Module] | None = None,
) -> list[Record]:
  """One run from Python: trains, or goes on where the workdir stopped, and evaluates.

    byolx.train("configs/quickstart.py", "runs/quickstart", ["--config.train.epochs=10"])

  Args:
    fields: config file `FILE[:ARGS]`, or fields by group; other fields have their defaults.
    workdir: folder of the run.
    overrides: `--config.FIELD=VALUE`, applied in order.
    images: the user's own images instead of those of the group `data`: objects with the attributes
      of `sources.base.Source`, for the training, for choosing and for the test.
    network: the user's own encoder: a function from `nnx.Rngs` to a module with `features` (int),
      called as `module(x, train=..., views=...)` on normalised images.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: a field, or a combination of fields, that cannot run.
  """
  workdir = Path(workdir)
  if isinstance(fields, str):
    cfg = config.load(fields, overrides, workdir)
  else:
    cfg = config.complete(ConfigDict(fields), overrides, workdir=workdir)
  return train_run(cfg, workdir, images=images, network=network)


def conclude(exp: Experiment, state: TrainState, workdir: Path) -> list[Record]:
  """Measures the model of a finished run, writes `results.json` and pictures, prints the table.

  Raises:
    RuntimeError: a frozen encoder is not bit by bit the one that was loaded.
  """
  began, writer = time.monotonic(), distributed.is_writer()
  if writer:
    from byolx.runs import curves  # matplotlib takes seconds that a first step need not wait for

    rows = metrics_log.read_metrics(workdir / "metrics.jsonl")
    curves.curves(rows, workdir / "curves.png", exp.task.curves)
  distributed.barrier("trained")
  if exp.task.frozen:
    initial_state.check_frozen(state, workdir)
    print("the encoder is bit by bit the one that was loaded")
  records = exp.task.conclude(finished(exp, state, workdir))
  if writer:
    files.write_atomically(workdir / "results.json", json.dumps(records, indent=1) + "\n")
  if records:
    duration = text.duration(time.monotonic() - began)
    pictures = [name for name in PICTURES if (workdir / name).exists()]
    print(f"\n{exp.task.table(records)}\n")
    print(f"evaluated in {duration}; results, {', '.join(pictures)}")
    print(f"and checkpoints are in {workdir}")
  return records


def finished(exp: Experiment, state: TrainState, workdir: Path) -> Finished:
  """A finished run, as its task sees it."""
  c = exp.config
  facts = {
    "task": c.task,
    "seed": c.seed,
    "step": int(state.step),
    "config": config.fingerprint(c),
    "commit": commit(),
  }
  return Finished(
    config=c,
    model=state.model(),
    untrained=lambda: exp.initialise().model(),
    mesh=exp.mesh,
    train=exp.train_source,
    validation=exp.sources.validation,
    test=exp.sources.test,
    labels=exp.sources.labels,
    batches=exp.evaluation_batches,
    normalise=exp.normalise,
    workdir=workdir,
    lineage=initial_state.lineage(workdir),
    facts=facts,
    writer=distributed.is_writer(),
  )


def evaluate_run(workdir: Path, test: bool = False) -> list[Record]:
  """Evaluates the newest checkpoint of a workdir again, by the workdir's own config.

  Args:
    workdir: of a run.
    test: measure the test images of a classifier's run that has not looked at them.
  """
  try:
    cfg = config.of_run(workdir)
  except ConfigError as error:
    raise ConfigError(f"--from={error}") from None
  cfg.eval.test = cfg.eval.test or test
  compile_cache.keep_in(cfg.compile.cache, workdir)
  exp = experiment.build(cfg)
  checkpoints = manager.Checkpoints(workdir / "checkpoints")
  if checkpoints.latest() is None:
    raise ConfigError(f"--from={workdir}: expected a checkpoint in {workdir / 'checkpoints'}")
  with contextlib.closing(checkpoints):
    state = fit.restore(exp, checkpoints, rollbacks.Rollbacks(workdir))
  return conclude(exp, state, workdir)


def train_seeds(cfg: ConfigDict, workdir: Path, seeds: list[int]) -> list[Record]:
  """One run per seed in `workdir/seed_N`; their records and the means over seeds in `workdir`."""
  every = []
  for seed in seeds:
    of_seed = cfg.copy_and_resolve_references()
    of_seed.seed = seed
    every += train_run(of_seed, workdir / f"seed_{seed}")
  chosen = [record for record in every if record["split"] != "validation"]
  tried = [record for record in every if record["split"] == "validation"]
  means = results.mean_over_seeds(tried, (*results.KEYS, "rate"))
  means += results.mean_over_seeds(chosen)
  if distributed.is_writer():
    files.write_atomically(workdir / "results.json", json.dumps(every + means, indent=1) + "\n")
  table = TASKS[cfg.task].table(means)
  print(f"\nMean over seeds {', '.join(map(str, seeds))}\n{table}")
  return every + means


def write_views(
  config: ConfigDict,
  transform: Transform,
  source: base.Source,
  path: Path,
  images: int = SHEET_IMAGES,
  repeats: int = SHEET_REPEATS,
) -> None:
  """Draws training images, spread over the set, with their views in the first epochs.

  Args:
    config: all fields.
    transform: training transform; its arrays [size, size, 3] uint8 are drawn.
    source: training images.
    path: file of the PNG.
    images: number of rows.
    repeats: number of epochs.

  Raises:
    ConfigError: no image can be read.
  """
  preview, stream = transform.preview(), sampler.Stream(config.seed)
  originals, rows, unreadable = [], [], []
  # Four times as many as needed; every fourth of them comes first, so that those are spread too.
  spread = np.linspace(0, len(source) - 1, 4 * images, dtype=int).reshape(images, 4)
  for record in dict.fromkeys(spread.T.ravel().tolist()):
    try:
      example = source[record]
    except decode.DecodeError as error:
      unreadable.append(error)
      continue
    places = [Random(stream, record, epoch) for epoch in range(repeats)]
    rows.append([_pictures(preview, example, place) for place in places])
    originals.append(example.image)
    if len(originals) == images:
      break
  if not originals:
    raise ConfigError(
      f"data.folder={config.data.folder}: none of {len(unreadable)} images spread over it can be read, "
      f"such as {unreadable[0]}; expected images"
    )
  sheet = contact_sheet.draw_sheet(originals, rows)
  _, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
  files.write_atomically(path, png.tobytes())


def _pictures(transform: Transform, example: base.Example, random: Random) -> tuple:
  """The pictures that a transform makes of an example."""
  rows = {name: np.empty(array.shape, array.dtype) for name, array in transform.arrays.items()}
  transform(example, random, rows)
  return tuple(x for x in rows.values() if x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3)
