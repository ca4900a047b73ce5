"""One workdir, from config to results: train, measure what the encoder knows, draw, and write it down."""

import contextlib
import json
import time
from pathlib import Path

import cv2
import numpy as np
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict

from byolx import (
  checkpoint,
  compilations,
  config,
  distributed,
  experiment,
  fit,
  logs,
  overview,
  programs,
  results,
  train,
)
from byolx.config import ConfigError
from byolx.data import decode, making, order, sources, views
from byolx.experiment import Experiment

SHEET_IMAGES, SHEET_PAIRS = 8, 4
SHARED_SECONDS = 60
"""Until a file that one process wrote is seen by the others: network storage remembers for a while."""


def train_run(cfg: ConfigDict, workdir: Path, kept: programs.Kept | None = None) -> list[dict]:
  """Trains (or goes on where the workdir stopped), evaluates, writes results and pictures.

  Args:
    cfg: all fields.
    workdir: of the run.
    kept: its programs, where they have begun to load, see `compilations.begin`.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: the workdir holds a run of another config, or fields do not go together.
    train.DivergedError: a loss that is not finite; the last good checkpoint stays.
  """
  kept = kept or compilations.begin(cfg, workdir)
  if not (workdir / "checkpoints").exists():  # a run that goes on draws no state
    kept.begin("initialise")
  exp = experiment.build(cfg, kept)
  claim(workdir, cfg)
  print(overview.describe(exp, workdir), flush=True)
  if distributed.is_writer():
    every = parameter_overview.get_parameter_overview(
      nnx.to_pure_dict(exp.abstract_params), include_stats=False
    )
    logs.write_atomically(workdir / "parameters.txt", every + "\n")
    write_views(cfg, exp.train_source, workdir / "views.png")
  distributed.barrier("ready")
  state = fit.fit(exp, workdir)
  with fit.Stop(at_once="in the evaluation; the training is finished and saved"):
    return conclude(exp, state, workdir)


def conclude(exp: Experiment, state: train.TrainState, workdir: Path) -> list[dict]:
  """Measures what a finished run has trained; the records of `results.json`."""
  # scikit-learn and matplotlib take seconds that a first step need not wait for.
  from byolx import classification, pretraining

  if exp.config.task == "pretrain":
    return pretraining.conclude(exp, state, workdir)
  return classification.conclude(exp, state, workdir)


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
  compilations.keep_in(cfg.compile.cache, workdir)
  exp = experiment.build(cfg)
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  if checkpoints.latest() is None:
    raise ConfigError(f"--from={workdir}: expected a checkpoint in {workdir / 'checkpoints'}")
  with contextlib.closing(checkpoints):
    state = fit.restore(exp, checkpoints, fit.Rollbacks(workdir))
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
    logs.write_atomically(workdir / "results.json", json.dumps(every + means, indent=1) + "\n")
  from byolx import classification, probe

  table = probe.format_table if cfg.task == "pretrain" else classification.format_table
  print(f"\nMean over seeds {', '.join(map(str, seeds))}\n{table(means)}")
  return every + means


def claim(workdir: Path, cfg: ConfigDict) -> None:
  """Makes the workdir this config's, or refuses one that holds another config's run.

  With several processes, also refuses to go on where they differ in config or workdir.
  """
  path = workdir / "config.json"
  changed = _changed(distributed.agree(config.to_json(cfg)), cfg)
  if changed:
    raise ConfigError(
      f"process 0 has another config ({changed}); give every process the same command"
    )
  if distributed.is_writer():
    changed = path.exists() and _changed(path.read_text(), cfg)
    if changed:
      raise ConfigError(
        f"--workdir={workdir} holds a run of another config ({changed}); "
        "choose another --workdir, or undo the change"
      )
    workdir.mkdir(parents=True, exist_ok=True)
    logs.write_atomically(path, config.to_json(cfg))
  distributed.barrier("claim")
  until = time.monotonic() + SHARED_SECONDS
  while not path.exists():
    if time.monotonic() > until:
      raise ConfigError(
        f"--workdir={workdir}: config.json, which process 0 wrote, is not there; expected a folder "
        "that all processes share"
      )
    time.sleep(1)


def _changed(text: str, cfg: ConfigDict) -> str:
  return "; ".join(config.differences(config.flatten(config.from_json(text)), config.flatten(cfg)))


def write_views(
  cfg: ConfigDict,
  source: sources.Source,
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
  sheet = views.draw_sheet(originals, rows)
  _, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
  logs.write_atomically(path, png.tobytes())


def _views(image, specs, cfg: ConfigDict, record: int, epoch: int) -> tuple[np.ndarray, ...]:
  """The views of an image in an epoch, as the run will see them."""
  size, stream, made = cfg.views.size, order.Stream(cfg.seed), []
  for view, spec in enumerate(specs):
    made.append(np.empty((size, size, 3), np.uint8))
    making.make_view(image, spec, stream, (record, epoch, view), made[-1], cfg.views.antialias)
  return tuple(made)
