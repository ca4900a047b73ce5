"""Evaluates trained classifiers: selects one on validation images, and tests it (appendix D).

A head is one linear classifier. A model may have several heads, trained with different learning rates.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byolx.core import files, text
from byolx.data.sources.base import Source
from byolx.evaluation import inference
from byolx.evaluation.context import Finished
from byolx.training.task import Record, Task

METRICS = ("top1", "top5")
_CONFIDENCE = (2.5, 97.5)


def choose_and_test(task: Task, finished: Finished) -> list[Record]:
  """Selects the best head (linear classifier) on the validation images, and tests it.

  Without validation images, the first head is tested. All processes share the work on images. Only the
  process with `finished.writer` writes files.

  Args:
    task: task whose `evaluate` and `predict` return one value per head.
    finished: the finished run, with its model and images.

  Returns:
    The records (entries) of `results.json`: top-1 and top-5 accuracy of each head on the validation
    images, and of the selected head on the test images.
  """
  common, model, optim = _facts(finished), finished.model, finished.config.optim
  rates = tuple(optim.rates) or (optim.base_rate,)
  records, chosen = [], 0
  if finished.validation is not None:
    values = _measure(task, finished, finished.validation)
    chosen = int(np.argmax(values["top1"]))
    for head, rate in enumerate(rates):
      facts = common | {"split": "validation", "rate": rate, "chosen": head == chosen}
      records += [_record(facts, metric, values[metric][head]) for metric in METRICS]
  if finished.test is not None:
    facts = common | {"split": "test", "rate": rates[chosen], "chosen": True}
    values = _measure(task, finished, finished.test)
    intervals = _predict_test(task, finished, model, chosen)
    records += [
      _record(facts, metric, values[metric][chosen], intervals.get(metric)) for metric in METRICS
    ]
  return records


def _measure(task: Task, finished: Finished, source: Source) -> dict[str, np.ndarray]:
  """Computes the metrics of a classifier on a set of images.

  Returns:
    One array per metric, by its name. The array has one value per head (linear classifier).
  """
  return inference.measure(task, finished.model, finished.batches(source), finished.mesh)


def _predict_test(task: Task, finished: Finished, model: Any, head: int) -> dict[str, float]:
  """Predicts the classes of the test images, if eval.predictions or eval.bootstrap is set.

  Writes predictions.npz if eval.predictions is set.

  Returns:
    Half the width of the 95 % interval of each metric, by its name. The dict is empty if eval.bootstrap
    is not set, and in processes that write no files.
  """
  settings, source = finished.config.eval, finished.test
  if not (settings.predictions or settings.bootstrap):
    return {}
  batches = finished.batches(source)
  arrays = inference.predictions(task, model, batches, finished.mesh, collect=finished.writer)
  if not finished.writer:
    return {}
  outputs = {name: x[:, head] for name, x in arrays.items() if name not in ("label", "index")}
  if settings.predictions:
    names = np.array([source.names[int(i)] for i in arrays["index"]])
    images = {"name": names, "label": arrays["label"], "index": arrays["index"]}
    _write_npz(finished.workdir / "predictions.npz", images | outputs)
  if not settings.bootstrap:
    return {}
  ranks = outputs["rank"][arrays["label"] >= 0]
  return {
    metric: bootstrap_interval(ranks < k, settings.bootstrap, finished.config.seed)
    for metric, k in (("top1", 1), ("top5", 5))
  }


def bootstrap_interval(correct: np.ndarray, resamples: int, seed: int) -> float:
  """Computes half the width of the 95 % bootstrap interval of an accuracy, in [0, 0.5].

  The mean of a resample of n boolean values is a binomial number divided by n, so binomial numbers are
  drawn instead of resamples.

  Args:
    correct: whether each prediction is correct, bool [n].
    resamples: number of bootstrap resamples.
    seed: seed of the bootstrap draws.
  """
  n = len(correct)
  means = np.random.default_rng(seed).binomial(n, correct.mean(), resamples) / n
  low, high = np.percentile(means, _CONFIDENCE)
  return float(high - low) / 2


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  files.write_atomically(path, content.getvalue())


def _facts(finished: Finished) -> Record:
  """Returns the keys and values that are the same in all `results.json` entries of a finished run."""
  c, facts, before = finished.config, finished.facts, finished.lineage or {}
  return {
    "task": facts["task"],
    "protocol": facts["task"],
    "encoder": c.init.encoder if c.init.workdir else "scratch",
    "labels": finished.labels,
    "data": finished.train.name,
    **facts,
    "devices": finished.devices,
    "pretrained_on": before.get("data"),
    "pretrain": before.get("changes"),
    "pretrain_step": before.get("step"),
    "pretrain_finished": before.get("finished"),
  }


def _record(
  facts: Mapping[str, Any], metric: str, value: np.floating, interval: float | None = None
) -> dict[str, Any]:
  return {**facts, "metric": metric, "value": float(value), "interval": interval, "n": 1}


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
  """Formats records (entries of `results.json`) as a table with one row per split and learning rate.

  An asterisk marks the learning rate that was selected on the validation images.
  """
  rows = [("split", "rate", *(f"{metric[:3]}-{metric[3:]}" for metric in METRICS))]
  groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
  for record in records:
    groups.setdefault((record["split"], _rate(record)), {})[record["metric"]] = record
  several = len({rate for _, rate in groups}) > 1
  for (split, rate), by_metric in groups.items():
    mark = " *" if several and next(iter(by_metric.values()))["chosen"] is True else ""
    rows.append((split, rate + mark, *(_cell(by_metric.get(metric)) for metric in METRICS)))
  table = text.aligned(rows)
  caption = "accuracy in %" + ("; *: the best on the validation images" if several else "")
  return f"{table}\n{caption}"


def _rate(record: Mapping[str, Any]) -> str:
  """Returns the learning rate of a record (entry) of `results.json` as text.

  A record can be a mean over seeds, and the selected rate can differ between the seeds. Then the text
  lists all these rates, separated by commas.
  """
  rate = record["rate"]
  return ", ".join(f"{value:g}" for value in rate) if isinstance(rate, list) else f"{rate:g}"


def _cell(record: Mapping[str, Any] | None) -> str:
  if record is None:
    return "-"
  tail = f" ± {100 * record['interval']:.1f}" if record["interval"] is not None else ""
  return f"{100 * record['value']:.2f}{tail}"
