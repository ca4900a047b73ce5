"""One workdir, from config to results: train, measure what the encoder knows, draw, and write it down."""

import contextlib
import functools
import json
import time
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict

from byolx import (
  checkpoint,
  compilations,
  config,
  distributed,
  evaluate,
  experiment,
  fit,
  logs,
  metrics,
  overview,
  probe,
  train,
)
from byolx.config import ConfigError
from byolx.data import augment, augment_host, decode, order, sources, splits, views
from byolx.experiment import Experiment

EMBEDDED_IMAGES = 1000
SHEET_IMAGES, SHEET_PAIRS = 8, 4
SHARED_SECONDS = 60
"""Until a file that one process wrote is seen by the others: network storage remembers for a while."""


def pretrain(cfg: ConfigDict, workdir: Path) -> list[dict]:
  """Trains (or goes on where the workdir stopped), evaluates, writes results and pictures.

  Returns:
    The records of `results.json`.

  Raises:
    ConfigError: the workdir holds a run of another config, or fields do not go together.
    train.DivergedError: a loss that is not finite; the last good checkpoint stays.
  """
  compilations.keep_in(cfg.compile.cache, workdir)
  begun = (workdir / "checkpoints").exists()
  exp = experiment.build(cfg, soon=("step",) if begun else ("step", "initialise"))
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


def evaluate_run(workdir: Path) -> list[dict]:
  """Evaluates the newest checkpoint of a workdir again, by the workdir's own config."""
  path = workdir / "config.json"
  if not path.is_file():
    raise ConfigError(f"--from={workdir}: expected a workdir of `byolx train`, with a config.json")
  cfg = config.from_json(path.read_text())
  compilations.keep_in(cfg.compile.cache, workdir)
  exp = experiment.build(cfg)
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  if checkpoints.latest() is None:
    raise ConfigError(f"--from={workdir}: expected a checkpoint in {workdir / 'checkpoints'}")
  with contextlib.closing(checkpoints):
    state = fit.restore(exp, checkpoints, fit.Rollbacks(workdir))
  return conclude(exp, state, workdir)


def pretrain_seeds(cfg: ConfigDict, workdir: Path, seeds: list[int]) -> list[dict]:
  """One run per seed in `workdir/seed_N`; their records and the means over seeds in `workdir`."""
  every = []
  for seed in seeds:
    of_seed = cfg.copy_and_resolve_references()
    of_seed.seed = seed
    every += pretrain(of_seed, workdir / f"seed_{seed}")
  means = mean_over_seeds(every)
  if distributed.is_writer():
    logs.write_atomically(workdir / "results.json", json.dumps(every + means, indent=1) + "\n")
  print(f"\nMean over seeds {', '.join(map(str, seeds))}\n{probe.format_table(means)}")
  return every + means


def mean_over_seeds(records: list[dict]) -> list[dict]:
  """Records that differ only in seed, averaged; `seed` lists them, the interval is over them."""
  groups: dict[tuple, list[dict]] = {}
  for record in records:
    keys = ("task", "protocol", "encoder", "labels", "split", "metric", "step", "commit")
    groups.setdefault(tuple(record[key] for key in keys), []).append(record)
  return [
    {
      **group[0],
      "value": float(np.mean([record["value"] for record in group])),
      "interval": float(np.ptp([record["value"] for record in group]) / 2),
      "n": sum(record["n"] for record in group),
      "seed": [record["seed"] for record in group],
    }
    for group in groups.values()
  ]


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
  """A picture of training images, spread over the set, with pairs of their views as trained on."""
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
    rows.append([_pair(image, specs, cfg, record, epoch) for epoch in range(pairs)])
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


def _pair(image, specs, cfg: ConfigDict, record: int, epoch: int) -> tuple[np.ndarray, ...]:
  """Both views of an image in an epoch, as the run will see them."""
  pair = []
  for view, spec in enumerate(specs):
    generator = order.view_generator(cfg.seed, epoch, record, view)
    draws = augment.draw(spec, generator, *image.shape[:2])
    crop = augment.crop_and_resize(image, draws.crop, cfg.views.size, cfg.views.antialias)
    pair.append(augment_host.apply_host(crop, draws, spec.brightness_rule))
  return tuple(pair)


def conclude(exp: Experiment, state: train.TrainState, workdir: Path) -> list[dict]:
  """Does it know anything? k-NN, linear probe and pictures for four encoders side by side.

  All processes share the work on images; the writer does the rest, and the others wait for its
  records.
  """
  from byolx import report  # scikit-learn and matplotlib: seconds that the first step need not wait

  began = time.monotonic()
  writer = distributed.is_writer()
  if writer:
    report.curves(report.read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
  distributed.barrier("trained")
  model = state.model()
  encoders = {"online": model.online.encoder}
  if model.target is not None:
    encoders["target"] = model.target.encoder
  encoders["random"] = untrained_encoder(exp)
  extract = functools.partial(
    evaluate.features, encoders, exp.normalise, mesh=exp.mesh, wanted=writer
  )
  test = extract(batches=exp.evaluation_batches(exp.test_source))
  step = int(state.step)
  if writer:
    _draw(exp, step, *test[:2], workdir)
  if not distributed.agree(bool((test[1] >= 0).any())):
    print("no labels: nothing to measure; see embedding.png, curves.png")
    if writer:
      logs.write_atomically(workdir / "results.json", "[]\n")
    return []
  training = extract(batches=exp.evaluation_batches(training_subset(exp)))
  measured = {}
  if model.probe is not None:
    batches = exp.evaluation_batches(exp.test_source)
    measured = evaluate.measure(exp.task, model, batches, exp.mesh)
  records = distributed.agree(_records(exp, step, training, test, measured) if writer else None)
  if writer:
    logs.write_atomically(workdir / "results.json", json.dumps(records, indent=1) + "\n")
  print(f"\n{probe.format_table(records)}\n")
  print(f"evaluated in {logs.duration(time.monotonic() - began)}; results, curves.png, views.png,")
  print(f"embedding.png and checkpoints are in {workdir}")
  return records


def _draw(
  exp: Experiment, step: int, test: dict[str, np.ndarray], labels: np.ndarray, workdir: Path
) -> None:
  """The test images as the online encoder sees them, and how many dimensions it uses."""
  from byolx import report

  some = test["online"][:EMBEDDED_IMAGES]
  title = f"{exp.train_source.name}: held-out images, online encoder, step {step:,}"
  path, classes = workdir / "embedding.png", exp.test_source.classes
  report.embedding(some, labels[:EMBEDDED_IMAGES], classes, path, title)
  rank = float(metrics.effective_rank(jnp.asarray(some)))
  print(f"effective rank of the representation: {rank:.1f} of {some.shape[1]}")


def _records(
  exp: Experiment, step: int, training: tuple, test: tuple, measured: dict[str, float]
) -> list[dict]:
  """What `results.json` holds, from features and labels, and what the online probe measured."""
  known = {"task": "pretrain", "seed": exp.config.seed, "step": step}
  known |= {"config": config.fingerprint(exp.config), "commit": fit.commit()}
  records = probe.evaluate_features(
    {name: (training[0][name], test[0][name]) for name in test[0]},
    training[1],
    test[1],
    fractions=tuple(exp.config.eval.fractions),
    draws=exp.config.eval.draws,
    **known,
  )
  if measured:
    online = {"protocol": "online_probe", "encoder": "online", "labels": 1.0, "split": "test"}
    value = {"metric": "top1", "value": measured["top1"], "interval": None, "n": 1}
    records.append({**known, **online, **value})
  return records


def untrained_encoder(exp: Experiment) -> nnx.Module:
  """The same network as it was before training, its statistics warmed on the same images."""
  # The very program that made the first state; draw by draw it would take several times as long.
  state = exp.initialise()
  encoder = state.model().online.encoder
  evaluate.warm_statistics(
    encoder, exp.normalise, exp.evaluation_batches(training_subset(exp, most=20_000)), exp.mesh
  )
  return encoder


def training_subset(exp: Experiment, most: int = 0):
  """The training images that evaluation uses: all, or a seeded balanced `eval.max_train`."""
  source = exp.train_source
  limit = min(filter(None, (most, exp.config.eval.max_train)), default=0)
  if not limit or limit >= len(source):
    return source
  if not source.classes:
    return sources.Subset(source, np.linspace(0, len(source) - 1, limit).astype(np.int64))
  limit = max(limit, len(source.classes))
  return sources.Subset(source, splits.balanced_subset(source.labels, limit, seed=0))
