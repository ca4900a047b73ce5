"""What a workdir or a checkpoint holds, on one page: without its arrays, unless they are verified."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from byolx.checkpoints import manager, pretrained, storage
from byolx.checkpoints.storage import CheckpointError
from byolx.core.config import plain


@dataclasses.dataclass(frozen=True)
class Step:
  """One checkpoint: `problem` is empty unless it is damaged, `verified` if its arrays were read."""

  step: int
  saved: str
  bytes: int
  metrics: dict[str, float]
  data: dict[str, Any]
  problem: str
  verified: bool


@dataclasses.dataclass(frozen=True)
class Page:
  """All that is said; `newest` facts are those of the newest checkpoint whose record is whole."""

  path: str
  steps: list[Step]
  commit: str
  fingerprint: str
  changes: dict[str, list[Any]]
  parts: list[tuple[str, int, int, str]]
  lineage: dict[str, Any] | None
  encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Fields that go with the encoder (`fields.ENCODER`) and their values; empty: not stored."""

  @property
  def damaged(self) -> bool:
    """Whether any checkpoint is."""
    return any(step.problem for step in self.steps)

  def text(self) -> str:
    """The page, to be printed."""
    sections = [
      f"{self.path}\ncommit {self.commit or 'unknown'}, config {self.fingerprint or 'unknown'}",
      "Checkpoints\n" + _table(_step_rows(self.steps)),
      f"Arrays\n{_table(_part_rows(self.parts))}" if self.parts else "",
      _encoder(self.encoder),
      _position(self.steps),
      "Config, where it is not the default\n" + _changes(self.changes),
      _lineage(self.lineage),
    ]
    return "\n\n".join(filter(None, sections))

  def json(self) -> str:
    """The same, to be read by programs."""
    return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def inspect(
  path: Path,
  defaults: Mapping[str, Any],
  encoder_fields: Sequence[str] = (),
  verify: bool = False,
) -> Page:
  """Reads a workdir, a folder of checkpoints, or one checkpoint.

  Args:
    path: where it is.
    defaults: a flat config, to which that of the checkpoint is compared.
    encoder_fields: names of the fields that go with an encoder.
    verify: reads every array too, and compares digests.

  Raises:
    CheckpointError: there is no checkpoint, or one of a newer format.
  """
  steps, newest = [], None
  for folder in manager.folders_at(path):
    step, record = _look_at(folder, verify)
    steps.append(step)
    newest = newest or record
  record = newest or {"arrays": {}, "meta": {}}
  meta = record["meta"]
  kinds = {name: kind for name, (kind, _) in record["arrays"].items()}
  return Page(
    str(path),
    steps[::-1],
    meta.get("commit", ""),
    meta.get("fingerprint", ""),
    _changed(meta.get("config", {}), defaults),
    pretrained.parts_of(kinds),
    meta.get("lineage"),
    _of_encoder(meta.get("config"), defaults, encoder_fields),
  )


def _of_encoder(
  flat: Mapping[str, Any] | None, defaults: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
  """The fields that go with the encoder; none where the checkpoint has no config."""
  return {name: flat.get(name, defaults[name]) for name in names} if flat else {}


def _look_at(folder: Path, verify: bool) -> tuple[Step, dict[str, Any] | None]:
  """A checkpoint, and its record if that is whole."""
  record, problem = None, ""
  try:
    record = storage.read_record(folder)
    if verify:
      manager.load(folder, _all_arrays)
  except manager.DamagedError as error:
    problem = str(error)
  known = record or {"time": "", "metrics": {}, "data": {}}
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  number = int(folder.name) if folder.name.isdecimal() else (record or {}).get("step", -1)
  facts = (known["time"], size, known["metrics"], known["data"])
  return Step(number, *facts, problem, verify and not problem), record


def _all_arrays(record: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  return {
    name: jax.ShapeDtypeStruct(
      storage.shape_of(kind), jnp.dtype(kind.partition("[")[0]), sharding=place
    )
    for name, (kind, _) in record["arrays"].items()
  }


def _changed(flat: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, list[Any]]:
  """`{field: [default, value]}` where they differ; fields of other versions count."""
  return {
    name: [plain(defaults.get(name)), plain(value)]
    for name, value in flat.items()
    if name not in defaults or plain(defaults[name]) != plain(value)
  }


def _step_rows(steps: list[Step]) -> list[list[str]]:
  names = list(dict.fromkeys(name for step in steps for name in step.metrics))
  # A page is not wide enough for everything that is measured.
  names = [name for name in ("loss", "top1", "std", "rank") if name in names] or names[:4]
  rows = [["step", "saved (UTC)", "size", *names, ""]]
  for step in steps:
    numbers = [f"{step.metrics[name]:.4g}" if name in step.metrics else "" for name in names]
    state = f"DAMAGED: {step.problem}" if step.problem else "verified" if step.verified else ""
    saved = step.saved.replace("T", " ").removesuffix("+00:00")
    rows.append([f"{step.step:,}", saved, _size(step.bytes), *numbers, state])
  return rows


def _part_rows(parts: list[tuple[str, int, int, str]]) -> list[list[str]]:
  rows = [["part", "arrays", "numbers"]]
  rows += [[part, f"{arrays:,}", f"{numbers:,}"] for part, arrays, numbers, _ in parts]
  arrays, numbers = (sum(part[i] for part in parts) for i in (1, 2))
  return [*rows, ["all", f"{arrays:,}", f"{numbers:,}"]]


def _table(rows: list[list[str]]) -> str:
  """Numbers to the right; the first and the last column as they come."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width) if i < len(row) - 1 or cell[-1:].isdigit()
      else cell
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )  # fmt: skip


def _encoder(fields: dict[str, Any]) -> str:
  """The fields that go with the encoder, a paragraph for each group; empty lists are left out."""
  groups: dict[str, list[str]] = {}
  for name, value in fields.items():
    group, _, leaf = name.partition(".")
    if value != ():
      groups.setdefault(group, []).append(f"{leaf} {value}")
  paragraphs = [
    textwrap.fill(f"{group}: {', '.join(values)}", 100, subsequent_indent="  ")
    for group, values in groups.items()
  ]
  return "\n".join(["What goes with the encoder", *paragraphs]) if fields else ""


def _position(steps: list[Step]) -> str:
  known = [step for step in steps if step.data]
  if not known:
    return ""
  data = ", ".join(f"{name} {value}" for name, value in known[-1].data.items())
  return f"Data at step {known[-1].step:,}\n{data}"


def _changes(changes: dict[str, list[Any]]) -> str:
  width = max(map(len, changes), default=0)
  lines = [f"{name:<{width}}  {new!r} (not {old!r})" for name, (old, new) in changes.items()]
  return "\n".join(lines) or "nothing"


def _lineage(lineage: dict[str, Any] | None) -> str:
  """Each encoder's origin, and the origin of that."""
  lines = []
  while lineage:
    facts = f"commit {lineage['commit']}, config {lineage['fingerprint']}"
    lines.append(f"{lineage['encoder']} encoder of {lineage['path']} ({facts})")
    lineage = lineage["from"]
  return "Grafted from\n" + "\n".join(lines) if lines else ""


def _size(count: int) -> str:
  for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
    if count >= unit:
      return f"{count / unit:.1f} {name}"
  return f"{count} B"


__all__ = ["CheckpointError", "Page", "Step", "inspect"]
