"""What a pretrained encoder knows: k-NN, linear probes and pictures, beside untrained and raw pixels."""

import functools
import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from byolx.core import distributed, files, text
from byolx.data import splits
from byolx.data.sources import base
from byolx.evaluation import inference, metrics, plots, probes
from byolx.runs import curves, metrics_log
from byolx.runs.experiment import Experiment
from byolx.runs.workdir import commit
from byolx.training.state import TrainState

EMBEDDED_IMAGES = 1000


def conclude(exp: Experiment, state: TrainState, workdir: Path) -> list[dict]:
  """Does it know anything? k-NN, linear probe and pictures for four encoders side by side.

  All processes share the work on images; the writer does the rest, and the others wait for its
  records.
  """
  began = time.monotonic()
  writer = distributed.is_writer()
  if writer:
    curves.curves(metrics_log.read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
  distributed.barrier("trained")
  model = state.model()
  encoders = {"online": model.online.encoder}
  if model.target is not None:
    encoders["target"] = model.target.encoder
  encoders["random"] = untrained_encoder(exp)
  extract = functools.partial(
    inference.features, encoders, exp.normalise, mesh=exp.mesh, wanted=writer
  )
  split, held_out = exp.sources.held_out
  test = extract(batches=exp.evaluation_batches(held_out))
  step = int(state.step)
  if writer:
    _draw(exp, step, *test[:2], workdir)
  if not distributed.agree(bool((test[1] >= 0).any())):
    print("no labels: nothing to measure; see embedding.png, curves.png")
    if writer:
      files.write_atomically(workdir / "results.json", "[]\n")
    return []
  training = extract(batches=exp.evaluation_batches(training_subset(exp)))
  measured = {}
  if model.probe is not None:
    batches = exp.evaluation_batches(held_out)
    measured = inference.measure(exp.task, model, batches, exp.mesh)
  records = distributed.agree(
    _records(exp, split, step, training, test, measured) if writer else None
  )
  if writer:
    files.write_atomically(workdir / "results.json", json.dumps(records, indent=1) + "\n")
  print(f"\n{probes.format_table(records)}\n")
  print(f"evaluated in {text.duration(time.monotonic() - began)}; results, curves.png, views.png,")
  print(f"embedding.png and checkpoints are in {workdir}")
  return records


def _draw(
  exp: Experiment, step: int, test: dict[str, np.ndarray], labels: np.ndarray, workdir: Path
) -> None:
  """The test images as the online encoder sees them, and how many dimensions it uses."""
  some = test["online"][:EMBEDDED_IMAGES]
  title = f"{exp.train_source.name}: held-out images, online encoder, step {step:,}"
  path, classes = workdir / "embedding.png", exp.train_source.classes
  plots.embedding(some, labels[:EMBEDDED_IMAGES], classes, path, title)
  rank = float(metrics.effective_rank(jnp.asarray(some)))
  print(f"effective rank of the representation: {rank:.1f} of {some.shape[1]}")


def _records(
  exp: Experiment, split: str, step: int, training: tuple, test: tuple, measured: dict[str, float]
) -> list[dict]:
  """What `results.json` holds, from features and labels, and what the online probe measured."""
  known = {"task": "pretrain", "split": split, "seed": exp.config.seed, "step": step}
  known |= {"config": exp.fingerprint, "commit": commit()}
  records = probes.evaluate_features(
    {name: (training[0][name], test[0][name]) for name in test[0]},
    training[1],
    test[1],
    fractions=tuple(exp.config.eval.fractions),
    draws=exp.config.eval.draws,
    **known,
  )
  if measured:
    online = {"protocol": "online_probe", "encoder": "online", "labels": 1.0}
    value = {"metric": "top1", "value": measured["top1"], "interval": None, "n": 1}
    records.append({**known, **online, **value})
  return records


def untrained_encoder(exp: Experiment) -> nnx.Module:
  """The same network as it was before training, its statistics warmed on the same images."""
  # The very program that made the first state; draw by draw it would take several times as long.
  state = exp.initialise()
  encoder = state.model().online.encoder
  inference.warm_statistics(
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
    return base.Subset(source, np.linspace(0, len(source) - 1, limit).astype(np.int64))
  limit = max(limit, len(source.classes))
  return base.Subset(source, splits.balanced_subset(source.labels, limit, seed=0))
