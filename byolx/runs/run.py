"""Executes a whole run in a workdir (output folder): training, evaluation, results and pictures."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
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
from byolx.data.transforms import Random, Transform, empty_rows
from byolx.evaluation.context import Finished
from byolx.models.encoder import Network
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
  network: Network | None = None,
) -> list[Record]:
  """Trains or resumes the run of a workdir, evaluates it, and writes results and pictures.

  Args:
    cfg: config of the run, with all fields.
    workdir: folder of the run.
    kept: store on disk for compiled programs, from `compile_cache.begin`. If it is None, this function
      opens the store.
    images: the user's own images, instead of those of the config group `data`; None for the config's.
    network: the user's own encoder, a function from `nnx.Rngs` to a module; None for the config's
      ResNet.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: the workdir belongs to another config, or values of fields do not fit each other.
    loop.DivergedError: training diverged; the last good checkpoint remains.
    StoppedError: a signal stopped the run; the same call resumes it.
  """
  kept = kept or compile_cache.begin(cfg, workdir, schema.task_source(cfg))
  if not (workdir / "checkpoints").exists():  # a resumed run restores its state
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
  network: Network | None = None,
) -> list[Record]:
  """Trains or resumes one run from Python, evaluates it, and writes results and pictures.

    byolx.train("configs/quickstart.py", "runs/quickstart", ["--config.train.epochs=10"])

  Args:
    fields: config file as `FILE[:ARGS]`, or the values of some fields by group. Other fields have their
      defaults.
    workdir: folder of the run.
    overrides: overrides of fields, each as `--config.FIELD=VALUE`, applied in order.
    images: the user's own images, instead of those of the config group `data`: training, validation and
      test split, each with the attributes of `sources.base.Source`.
    network: the user's own encoder: a function from `nnx.Rngs` to a module with `features` (int),
      which is called as `module(x, train=..., views=...)` on normalised images.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: a field has an impossible value, values do not fit each other, or the workdir belongs to
      another config.
    loop.DivergedError: training diverged; the last good checkpoint remains.
    StoppedError: a signal stopped the run; the same call resumes it.
  """
  workdir = Path(workdir)
  if isinstance(fields, str):
    cfg = config.load(fields, overrides, workdir)
  else:
    cfg = config.complete(ConfigDict(fields), overrides, workdir=workdir)
  return train_run(cfg, workdir, images=images, network=network)


def conclude(exp: Experiment, state: TrainState, workdir: Path) -> list[Record]:
  """Evaluates the model of a finished run, writes `results.json` and pictures, and prints the results.

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    state: state after training.
    workdir: folder of the run.

  Returns:
    The records of `results.json`.

  Raises:
    RuntimeError: an encoder that must stay frozen has changed.
  """
  began, writer = time.monotonic(), distributed.is_writer()
  if writer:
    from byolx.runs import curves  # importing matplotlib takes seconds, and would delay step 1

    rows = metrics_log.read_metrics(workdir / "metrics.jsonl")
    curves.curves(rows, workdir / "curves.png", exp.task.curves)
  distributed.barrier("trained")
  if exp.task.frozen:
    initial_state.check_frozen(state, workdir)
    print("the frozen encoder is unchanged, bit for bit")
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
  """Returns everything that the task needs to evaluate the model of a finished run.

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    state: state after training.
    workdir: folder of the run.
  """
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
  """Evaluates the newest good checkpoint of a workdir again, with the config in this workdir.

  Args:
    workdir: folder of the run.
    test: whether to measure the test images even if the run has eval.test=False.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: the workdir has no config.json or no checkpoint, or the images have changed.
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
  """Trains one run per seed, and averages their records.

  Args:
    cfg: config of the runs, with all fields. The seed in it is not used.
    workdir: folder of all runs. The run of seed N is in `workdir/seed_N`. The records of all seeds and
      their means are written to `workdir/results.json`.
    seeds: seeds of the runs.

  Returns:
    The records of all seeds, then the means.
  """
  records = []
  for seed in seeds:
    seed_config = cfg.copy_and_resolve_references()
    seed_config.seed = seed
    records += train_run(seed_config, workdir / f"seed_{seed}")
  # Validation has a record per learning rate; on the test split, each seed has its selected rate.
  validation = [record for record in records if record["split"] == "validation"]
  others = [record for record in records if record["split"] != "validation"]
  means = results.mean_over_seeds(validation, (*results.KEYS, "rate"))
  means += results.mean_over_seeds(others)
  if distributed.is_writer():
    files.write_atomically(workdir / "results.json", json.dumps(records + means, indent=1) + "\n")
  table = TASKS[cfg.task].table(means)
  print(f"\nMean over seeds {', '.join(map(str, seeds))}\n{table}")
  return records + means


def write_views(
  config: ConfigDict,
  transform: Transform,
  source: base.Source,
  path: Path,
  images: int = SHEET_IMAGES,
  repeats: int = SHEET_REPEATS,
) -> bool:
  """Draws some training images with their augmented views of the first epochs, as a PNG.

  The images are evenly spaced in the data set.

  Args:
    config: config of the run, with all fields.
    transform: transform of the training images. Its uint8 arrays of shape [size, size, 3] are drawn.
    source: training images.
    path: path of the PNG.
    images: number of rows of the picture. Each row shows one image.
    repeats: number of epochs whose views are drawn.

  Returns:
    Whether the PNG was written. It is not written if the transform returns no such array.

  Raises:
    ConfigError: none of the images that were tried can be read.
  """
  preview, stream = transform.preview(), sampler.Stream(config.seed)
  originals, rows, unreadable = [], [], []
  # Three spare images for each row, in case images are unreadable. Every fourth image is tried first,
  # so that these too are evenly spaced.
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
      f"data.folder={config.data.folder}: none of {len(unreadable)} images tried can be read, "
      f"such as {unreadable[0]}; expected images"
    )
  if not rows[0][0]:
    return False
  sheet = contact_sheet.draw_sheet(originals, rows)
  _, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
  files.write_atomically(path, png.tobytes())
  return True


def _pictures(transform: Transform, example: base.Example, random: Random) -> tuple:
  """Applies a transform to an example, and returns its arrays that are square uint8 RGB images.

  Images of another size than the first one are left out.
  """
  rows = empty_rows(transform.arrays)
  transform(example, random, rows)
  arrays = [x for x in rows.values() if isinstance(x, np.ndarray) and x.dtype == np.uint8]
  images = [x for x in arrays if x.ndim == 3 and x.shape[0] == x.shape[1] and x.shape[2] == 3]
  return tuple(x for x in images if x.shape == images[0].shape)
