"""Evaluates pretrained encoders by k-NN and linear probes.

An untrained encoder and raw pixels are measured as baselines.
"""

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
"""Largest number of images in embedding.png, the map of images by their features."""


def compare(task: Task, finished: Finished) -> list[Record]:
  """Measures the online, target and untrained encoders and raw pixels by k-NN and linear probes.

  All processes compute features. Only the process with `finished.writer` fits and measures the probes;
  the other processes wait for the records. Also draws embedding.png, a map of images by their features.

  Args:
    task: task whose `evaluate` measures the online probe, the classifier trained with the encoder.
    finished: the finished run, whose model has `online`, `target` and `probe`.

  Returns:
    The records (entries) of `results.json`. Every process gets them. The list is empty if no held-out
    image is labelled.
  """
  model, writer = finished.model, finished.writer
  encoders = {"online": model.online.encoder}
  if model.target is not None:
    encoders["target"] = model.target.encoder
  encoders["random"] = untrained_encoder(finished)
  extract = functools.partial(
    inference.features, encoders, finished.normalise, mesh=finished.mesh, collect=writer
  )
  split, held_out = finished.held_out
  test = extract(batches=finished.batches(held_out))
  if writer:
    _draw(finished, *test[:2])
  if not distributed.agree(bool((test[1] >= 0).any())):
    print("no labels: nothing to measure; see embedding.png, curves.png")
    return []
  training = extract(batches=finished.batches(training_subset(finished)))
  online_probe = {}
  if model.probe is not None:
    online_probe = inference.measure(task, model, finished.batches(held_out), finished.mesh)
  records = _records(finished, split, training, test, online_probe) if writer else None
  return distributed.agree(records)


def _draw(finished: Finished, test: dict[str, np.ndarray], labels: np.ndarray) -> None:
  """Draws embedding.png, a map of held-out images, and prints the effective rank of their features."""
  features, step = test["online"][:EMBEDDED_IMAGES], finished.facts["step"]
  title = f"{finished.train.name}: held-out images, online encoder, step {step:,}"
  path, classes = finished.workdir / "embedding.png", finished.train.classes
  plots.embedding(features, labels[:EMBEDDED_IMAGES], classes, path, title)
  rank = float(metrics.effective_rank(jnp.asarray(features)))
  print(f"effective rank of the representation: {rank:.1f} of {features.shape[1]}")


def _records(
  finished: Finished, split: str, training: tuple, test: tuple, online_probe: dict[str, float]
) -> list[Record]:
  """Measures features by k-NN and linear probes, and returns the entries of `results.json`.

  Args:
    finished: the finished run.
    split: name of the split of the test features, "validation" or "test".
    training: tuple of the features of the training images (a dict by encoder), their labels and their
      indices.
    test: the same tuple for the held-out images.
    online_probe: metrics of the classifier that was trained with the encoder. They get an entry too. The
      dict is empty if there is no such classifier.
  """
  facts = finished.facts
  common = {"task": facts["task"], "split": split, **facts}
  records = probes.evaluate_features(
    {name: (training[0][name], test[0][name]) for name in test[0]},
    training[1],
    test[1],
    fractions=tuple(finished.config.eval.fractions),
    draws=finished.config.eval.draws,
    **common,
  )
  if online_probe:
    online = {"protocol": "online_probe", "encoder": "online", "labels": 1.0}
    value = {"metric": "top1", "value": online_probe["top1"], "interval": None, "n": 1}
    records.append({**common, **online, **value})
  return records


def untrained_encoder(finished: Finished) -> nnx.Module:
  """Returns the online encoder at step 0, with BatchNorm statistics computed on training images."""
  # By the compiled program of the initial state: without jit it takes several times as long.
  encoder = finished.untrained().online.encoder
  images = finished.batches(training_subset(finished, most=20_000))
  inference.warm_statistics(encoder, finished.normalise, images, finished.mesh)
  return encoder


def training_subset(finished: Finished, most: int = 0) -> base.Source:
  """Returns the training images that the evaluation uses: all of them, or a class-balanced subset.

  If the images have no classes, the subset is evenly spaced in the data set.

  Args:
    finished: finished run, whose `eval.max_train` limits the number of images.
    most: additional limit of the number of images; 0 for no additional limit.
  """
  source = finished.train
  limit = min(filter(None, (most, finished.config.eval.max_train)), default=0)
  if not limit or limit >= len(source):
    return source
  if not source.classes:
    return base.Subset(source, np.linspace(0, len(source) - 1, limit).astype(np.int64))
  limit = max(limit, len(source.classes))
  return base.Subset(source, splits.balanced_subset(source.labels, limit, seed=0))
