"""What trained classifiers know: chosen on validation images, reported on test images (appendix D)."""

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byolx.core import distributed, files, text
from byolx.data.sources.base import Source
from byolx.evaluation import inference
from byolx.runs import curves, initial_state, metrics_log
from byolx.runs.experiment import Experiment
from byolx.runs.workdir import commit
from byolx.training.state import TrainState

METRICS = ("top1", "top5")
_CONFIDENCE = (2.5, 97.5)


def conclude(exp: Experiment, state: TrainState, workdir: Path) -> list[dict[str, Any]]:
  """Chooses the best head on the validation images and measures it on the test images.

  All processes share the work on images; the writer writes.

  Raises:
    RuntimeError: a frozen encoder is not bit by bit the one that was loaded.
  """
  began, writer, c = time.monotonic(), distributed.is_writer(), exp.config
  if writer:
    rows = metrics_log.read_metrics(workdir / "metrics.jsonl")
    curves.curves(rows, workdir / "curves.png", curves.CLASSIFICATION)
  distributed.barrier("trained")
  if exp.task.frozen:
    initial_state.check_frozen(state, workdir)
    print("the encoder is bit by bit the one that was loaded")
  known = _facts(exp, state, workdir)
  rates = tuple(c.optim.rates) or (c.optim.base_rate,)
  model, records, chosen = state.model(), [], 0
  if exp.sources.validation is not None:
    found = _measure(exp, model, exp.sources.validation)
    chosen = int(np.argmax(found["top1"]))
    for head, rate in enumerate(rates):
      about = known | {"split": "validation", "rate": rate, "chosen": head == chosen}
      records += [_record(about, metric, found[metric][head]) for metric in METRICS]
  if exp.sources.test is not None:
    about = known | {"split": "test", "rate": rates[chosen], "chosen": True}
    found = _measure(exp, model, exp.sources.test)
    intervals = _look_closer(exp, model, chosen, workdir)
    records += [
      _record(about, metric, found[metric][chosen], intervals.get(metric)) for metric in METRICS
    ]
  if writer:
    files.write_atomically(workdir / "results.json", json.dumps(records, indent=1) + "\n")
  print(f"\n{format_table(records)}\n")
  print(f"evaluated in {text.duration(time.monotonic() - began)}; results, curves.png, views.png")
  print(f"and checkpoints are in {workdir}")
  return records


def _measure(exp: Experiment, model: Any, source: Source) -> dict[str, np.ndarray]:
  """Every metric of every head."""
  return inference.measure(exp.task, model, exp.evaluation_batches(source), exp.mesh)


def _look_closer(exp: Experiment, model: Any, head: int, workdir: Path) -> dict[str, float]:
  """Writes predictions of the test images, and returns 95 % half-widths by metric, as wanted."""
  wanted = exp.config.eval
  if not (wanted.predictions or wanted.bootstrap):
    return {}
  task, writer = exp.task, distributed.is_writer()
  source = exp.sources.test
  batches = exp.evaluation_batches(source)
  found = inference.predictions(task, model, batches, exp.mesh, wanted=writer)
  if not writer:
    return {}
  own = {name: x[:, head] for name, x in found.items() if name not in ("label", "index")}
  if wanted.predictions:
    names = np.array([source.names[int(i)] for i in found["index"]])
    whole = {"name": names, "label": found["label"], "index": found["index"]}
    _write_npz(workdir / "predictions.npz", whole | own)
  if not wanted.bootstrap:
    return {}
  ranks = own["rank"][found["label"] >= 0]
  return {
    metric: bootstrap_interval(ranks < k, wanted.bootstrap, exp.config.seed)
    for metric, k in (("top1", 1), ("top5", 5))
  }


def bootstrap_interval(correct: np.ndarray, resamples: int, seed: int) -> float:
  """Half the width of the 95 % interval of a share of correct answers, by the bootstrap.

  The mean of n answers drawn anew, with replacement, is a binomial number over n: it is drawn as that.

  Args:
    correct: bool [n].
    resamples: how many.
    seed: of the draws.
  """
  n = len(correct)
  means = np.random.default_rng(seed).binomial(n, correct.mean(), resamples) / n
  low, high = np.percentile(means, _CONFIDENCE)
  return float(high - low) / 2


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  files.write_atomically(path, content.getvalue())


def _facts(exp: Experiment, state: TrainState, workdir: Path) -> dict[str, Any]:
  """What all records of a run have in common."""
  c, before = exp.config, initial_state.lineage(workdir) or {}
  return {
    "task": c.task,
    "protocol": c.task,
    "encoder": c.init.encoder if c.init.workdir else "scratch",
    "labels": exp.sources.labels,
    "data": exp.train_source.name,
    "seed": c.seed,
    "step": int(state.step),
    "config": exp.fingerprint,
    "commit": commit(),
    "devices": f"{exp.mesh.size} x {exp.mesh.devices.flat[0].device_kind}",
    "pretrained_on": before.get("data"),
    "pretrain": before.get("changes"),
    "pretrain_step": before.get("step"),
    "pretrain_finished": before.get("finished"),
  }


def _record(
  known: Mapping[str, Any], metric: str, value: np.floating, interval: float | None = None
) -> dict[str, Any]:
  return {**known, "metric": metric, "value": float(value), "interval": interval, "n": 1}


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
  """Records as a table for a terminal: a row for every split and rate, * for what was chosen."""
  rows = [("split", "rate", *(f"{metric[:3]}-{metric[3:]}" for metric in METRICS))]
  groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
  for record in records:
    groups.setdefault((record["split"], _rate(record)), {})[record["metric"]] = record
  several = len({rate for _, rate in groups}) > 1
  for (split, rate), found in groups.items():
    mark = " *" if several and next(iter(found.values()))["chosen"] is True else ""
    rows.append((split, rate + mark, *(_cell(found.get(metric)) for metric in METRICS)))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
  caption = "accuracy in %" + ("; *: the best on the validation images" if several else "")
  return "\n".join([*(line.rstrip() for line in lines), caption])


def _rate(record: Mapping[str, Any]) -> str:
  """The rate of a record; those of several seeds, where each chose its own."""
  rate = record["rate"]
  return ", ".join(f"{one:g}" for one in rate) if isinstance(rate, list) else f"{rate:g}"


def _cell(record: Mapping[str, Any] | None) -> str:
  if record is None:
    return "-"
  tail = f" ± {100 * record['interval']:.1f}" if record["interval"] is not None else ""
  return f"{100 * record['value']:.2f}{tail}"
