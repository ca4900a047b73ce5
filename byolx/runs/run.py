"""One workdir, from config to results: train, measure what the encoder knows, draw, and write it down."""

import contextlib
import json
from pathlib import Path

import cv2
import numpy as np
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict

from byolx.checkpoints import manager
from byolx.core import distributed, files
from byolx.core.config import ConfigError
from byolx.data import batching, contact_sheet, decode, sampler
from byolx.data.sources import base
from byolx.runs import config, experiment, fit, results, rollbacks, summary
from byolx.runs.experiment import Experiment
from byolx.runs.workdir import claim
from byolx.training import compile_cache, programs
from byolx.training.state import TrainState

SHEET_IMAGES, SHEET_PAIRS = 8, 4


def train_run(cfg: ConfigDict, workdir: Path, kept: programs.Kept | None = None) -> list[dict]:
  """Trains (or goes on where the workdir stopped), evaluates, writes results and pictures.

  Args:
    cfg: all fields.
    workdir: of the run.
    kept: its programs, where they have begun to load, see `compile_cache.begin`.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: the workdir holds a run of another config, or fields do not go together.
    loop.DivergedError: a loss that is not finite; the last good checkpoint stays.
  """
  kept = kept or compile_cache.begin(cfg, workdir)
  if not (workdir / "checkpoints").exists():  # a run that goes on draws no state
    kept.begin("initialise")
  exp = experiment.build(cfg, kept)
  claim(workdir, cfg)
  print(summary.describe(exp, workdir), flush=True)
  if distributed.is_writer():
    every = parameter_overview.get_parameter_overview(
      nnx.to_pure_dict(exp.abstract_params), include_stats=False
    )
    files.write_atomically(workdir / "parameters.txt", every + "\n")
    write_views(cfg, exp.train_source, workdir / "views.png")
  distributed.barrier("ready")
  state = fit.fit(exp, workdir)
  with fit.Stop(at_once="in the evaluation; the training is finished and saved"):
    return conclude(exp, state, workdir)


def conclude(exp: Experiment, state: TrainState, workdir: Path) -> list[dict]:
  """Measures what a finished run has trained; the records of `results.json`."""
  # scikit-learn and matplotlib take seconds that a first step need not wait for.
  from byolx.evaluation import classifiers, encoders

  if exp.config.task == "pretrain":
    return encoders.conclude(exp, state, workdir)
  return classifiers.conclude(exp, state, workdir)


def evaluate_run(workdir: Path, test: bool = False) -> list[dict]:
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


def train_seeds(cfg: ConfigDict, workdir: Path, seeds: list[int]) -> list[dict]:
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
  from byolx.evaluation import classifiers, probes

  table = probes.format_table if cfg.task == "pretrain" else classifiers.format_table
  print(f"\nMean over seeds {', '.join(map(str, seeds))}\n{table(means)}")
  return every + means


def write_views(
  cfg: ConfigDict,
  source: base.Source,
  path: Path,
  images: int = SHEET_IMAGES,
  pairs: int = SHEET_PAIRS,
) -> None:
  """A picture of training images, spread over the set, with their views as trained on, epoch by epoch."""
  specs = experiment.build_views(cfg)
  originals, rows, unreadable = [], [], []
  # Four times as many as are wanted; every fourth of them comes first, so that those are spread too.
  spread = np.linspace(0, len(source) - 1, 4 * images, dtype=int).reshape(images, 4)
  for record in dict.fromkeys(spread.T.ravel().tolist()):
    try:
      image = source[record].image
    except decode.DecodeError as error:
      unreadable.append(error)
      continue
    rows.append([_views(image, specs, cfg, record, epoch) for epoch in range(pairs)])
    originals.append(image)
    if len(originals) == images:
      break
  if not originals:
    raise ConfigError(
      f"data.folder={cfg.data.folder}: none of {len(unreadable)} images spread over it can be read, "
      f"such as {unreadable[0]}; expected images"
    )
  sheet = contact_sheet.draw_sheet(originals, rows)
  _, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
  files.write_atomically(path, png.tobytes())


def _views(image, specs, cfg: ConfigDict, record: int, epoch: int) -> tuple[np.ndarray, ...]:
  """The views of an image in an epoch, as the run will see them."""
  size, stream, made = cfg.views.size, sampler.Stream(cfg.seed), []
  for view, spec in enumerate(specs):
    made.append(np.empty((size, size, 3), np.uint8))
    batching.make_view(image, spec, stream, (record, epoch, view), made[-1], cfg.views.antialias)
  return tuple(made)
