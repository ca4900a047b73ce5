"""Pretrained encoders: k-NN, linear probes and a map, beside an untrained encoder and raw pixels."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from byolx.core import distributed
from byolx.data import splits
from byolx.data.sources import base
from byolx.evaluation import inference, metrics, plots, probes
from byolx.evaluation.context import Finished
from byolx.training.task import Record, Task

EMBEDDED_IMAGES = 1000


def compare(task: Task, finished: Finished) -> list[Record]:
  """Measures the online, target and untrained encoder and raw pixels by k-NN and linear probes.

  All processes share the work on images; the writer does the rest, and the others wait for its
  records.

  Args:
    task: the task, whose `evaluate` measures the online probe.
    finished: the run, whose model has `online` (with `encoder`), `target` and `probe`.

  Returns:
    Records of `results.json`; none where no held-out image is labelled.
  """
  model, writer = finished.model, finished.writer
  encoders = {"online": model.online.encoder}
  if model.target is not None:
    encoders["target"] = model.target.encoder
  encoders["random"] = untrained_encoder(finished)
  extract = functools.partial(
    inference.features, encoders, finished.normalise, mesh=finished.mesh, wanted=writer
  )
  split, held_out = finished.held_out
  test = extract(batches=finished.batches(held_out))
  if writer:
    _draw(finished, *test[:2])
  if not distributed.agree(bool((test[1] >= 0).any())):
    print("no labels: nothing to measure; see embedding.png, curves.png")
    return []
  training = extract(batches=finished.batches(training_subset(finished)))
  measured = {}
  if model.probe is not None:
    measured = inference.measure(task, model, finished.batches(held_out), finished.mesh)
  return distributed.agree(_records(finished, split, training, test, measured) if writer else None)


def _draw(finished: Finished, test: dict[str, np.ndarray], labels: np.ndarray) -> None:
  """Draws the map of the held-out images, and prints the effective rank of their features."""
  some, step = test["online"][:EMBEDDED_IMAGES], finished.facts["step"]
  title = f"{finished.train.name}: held-out images, online encoder, step {step:,}"
  path, classes = finished.workdir / "embedding.png", finished.train.classes
  plots.embedding(some, labels[:EMBEDDED_IMAGES], classes, path, title)
  rank = float(metrics.effective_rank(jnp.asarray(some)))
  print(f"effective rank of the representation: {rank:.1f} of {some.shape[1]}")


def _records(
  finished: Finished, split: str, training: tuple, test: tuple, measured: dict[str, float]
) -> list[Record]:
  """Records from features and labels, and from the metrics of the online probe."""
  facts = finished.facts
  known = {"task": facts["task"], "split": split, **facts}
  records = probes.evaluate_features(
    {name: (training[0][name], test[0][name]) for name in test[0]},
    training[1],
    test[1],
    fractions=tuple(finished.config.eval.fractions),
    draws=finished.config.eval.draws,
    **known,
  )
  if measured:
    online = {"protocol": "online_probe", "encoder": "online", "labels": 1.0}
    value = {"metric": "top1", "value": measured["top1"], "interval": None, "n": 1}
    records.append({**known, **online, **value})
  return records


def untrained_encoder(finished: Finished) -> nnx.Module:
  """The online encoder before step 1, its statistics taken from the training images."""
  # Made by the very program that made the first state; draw by draw it would take several times as long.
  encoder = finished.untrained().online.encoder
  images = finished.batches(training_subset(finished, most=20_000))
  inference.warm_statistics(encoder, finished.normalise, images, finished.mesh)
  return encoder


def training_subset(finished: Finished, most: int = 0) -> base.Source:
  """The training images that evaluation uses: all, or a seeded balanced subset.

  Args:
    finished: the run; `eval.max_train` limits the number of images.
    most: another limit; 0: none.
  """
  source = finished.train
  limit = min(filter(None, (most, finished.config.eval.max_train)), default=0)
  if not limit or limit >= len(source):
    return source
  if not source.classes:
    return base.Subset(source, np.linspace(0, len(source) - 1, limit).astype(np.int64))
  limit = max(limit, len(source.classes))
  return base.Subset(source, splits.balanced_subset(source.labels, limit, seed=0))
