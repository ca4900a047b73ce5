"""Summarises a workdir (the folder of a run) or a checkpoint; arrays are read only to verify them."""

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
from byolx.core.config import flatten, plain


@dataclasses.dataclass(frozen=True)
class Step:
  """Summary of one checkpoint.

  Attributes:
    step: training step of the checkpoint; -1 if it is unknown.
    saved: time of the save, ISO 8601 in UTC; empty if it is unknown.
    bytes: size of all files, in bytes.
    metrics: metrics saved with the checkpoint, by name.
    data: numbers that give the position in the training data from which training resumes, by name.
    problem: description of the damage; empty if no damage was found.
    verified: whether all arrays were read and their checksums matched.
  """

  step: int
  saved: str
  bytes: int
  metrics: dict[str, float]
  data: dict[str, Any]
  problem: str
  verified: bool


@dataclasses.dataclass(frozen=True)
class Page:
  """Summary of a workdir, a folder of checkpoints, or one checkpoint.

  All attributes but `path` and `steps` describe the newest checkpoint whose record (record.json) is
  readable.

  Attributes:
    path: inspected path.
    steps: summaries of the checkpoints, oldest first.
    commit: git commit of the code that saved the checkpoint; empty if it is unknown.
    fingerprint: hash of the config fields on which results depend; empty if it is unknown.
    changes: config fields that are not at their default, each name with the list [default, value].
    parts: one row for each part of the saved state, such as `online encoder`. A row holds the name of
      the part, its number of arrays, its number of values, and a text for remarks, empty here.
    lineage: origin of the encoder that the run started from; None if the run started from random
      weights.
    encoder: config fields with which the encoder must be used, by name; empty if the checkpoint has
      no config.
  """

  path: str
  steps: list[Step]
  commit: str
  fingerprint: str
  changes: dict[str, list[Any]]
  parts: list[tuple[str, int, int, str]]
  lineage: dict[str, Any] | None
  encoder: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def damaged(self) -> bool:
    """Whether any of the checkpoints is damaged."""
    return any(step.problem for step in self.steps)

  def text(self) -> str:
    """Returns the summary as text to print."""
    sections = [
      f"{self.path}\ncommit {self.commit or 'unknown'}, config {self.fingerprint or 'unknown'}",
      "Checkpoints\n" + _table(_step_rows(self.steps)),
      f"Arrays\n{_table(_part_rows(self.parts))}" if self.parts else "",
      _encoder(self.encoder),
      _position(self.steps),
      "Config fields that are not at their default\n" + _changes(self.changes),
      _lineage(self.lineage),
    ]
    return "\n\n".join(filter(None, sections))

  def json(self) -> str:
    """Returns the summary as JSON."""
    return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def inspect(
  path: Path,
  defaults: Mapping[str, Any],
  encoder_fields: Sequence[str] = (),
  verify: bool = False,
) -> Page:
  """Summarises a workdir, a folder of checkpoints, or one checkpoint.

  Args:
    path: folder of the workdir, of the checkpoints, or of one checkpoint.
    defaults: default of every config field, by its dotted name.
    encoder_fields: names of the config fields with which a pretrained encoder must be used.
    verify: whether to read every array and compare its checksum.

  Raises:
    CheckpointError: there is no checkpoint, one has a newer format, or its files are not readable.
  """
  steps, newest = [], None
  for folder in manager.folders_at(path):
    step, record = _summarise(folder, verify)
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
  """Returns the values of the config fields with which an encoder must be used, by name.

  Args:
    flat: config of the checkpoint, by dotted name; if None or empty, the result is empty.
    defaults: default of every field, by dotted name; used for fields that the config does not have.
    names: names of the fields to return.
  """
  if not flat:
    return {}
  values = {**defaults, **flatten(flat)}
  return {name: values[name] for name in names}


def _summarise(folder: Path, verify: bool) -> tuple[Step, dict[str, Any] | None]:
  """Summarises one checkpoint.

  Args:
    folder: folder of the checkpoint.
    verify: whether to read every array and compare its checksum.

  Returns:
    Two values: the summary, and the contents of the checkpoint's record.json. The second is None if
    this file is damaged.
  """
  record, problem = None, ""
  try:
    record = storage.read_record(folder)
    if verify:
      manager.load(folder, _all_arrays)
  except manager.DamagedError as error:
    problem = str(error)
  contents = record or {"time": "", "metrics": {}, "data": {}}
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  number = int(folder.name) if folder.name.isdecimal() else (record or {}).get("step", -1)
  return Step(
    number,
    contents["time"],
    size,
    contents["metrics"],
    contents["data"],
    problem,
    verify and not problem,
  ), record


def _all_arrays(record: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  return {
    name: jax.ShapeDtypeStruct(
      storage.shape_of(kind), jnp.dtype(kind.partition("[")[0]), sharding=place
    )
    for name, (kind, _) in record["arrays"].items()
  }


def _changed(flat: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, list[Any]]:
  """Returns the config fields that are not at their default, as `{name: [default, value]}`.

  Fields that this version of byolx does not have are included, with None as default.

  Args:
    flat: config of the checkpoint, by dotted name.
    defaults: default of every field of this version.
  """
  return {
    name: [plain(defaults.get(name)), plain(value)]
    for name, value in flat.items()
    if name not in defaults or plain(defaults[name]) != plain(value)
  }


def _step_rows(steps: list[Step]) -> list[list[str]]:
  names = list(dict.fromkeys(name for step in steps for name in step.metrics))
  # The page is too narrow for all metrics.
  names = [name for name in ("loss", "top1", "std", "rank") if name in names] or names[:4]
  rows = [["step", "saved (UTC)", "size", *names, ""]]
  for step in steps:
    numbers = [f"{step.metrics[name]:.4g}" if name in step.metrics else "" for name in names]
    state = f"DAMAGED: {step.problem}" if step.problem else "verified" if step.verified else ""
    saved = step.saved.replace("T", " ").removesuffix("+00:00")
    rows.append([f"{step.step:,}", saved, _size(step.bytes), *numbers, state])
  return rows


def _part_rows(parts: list[tuple[str, int, int, str]]) -> list[list[str]]:
  rows = [["part", "arrays", "values"]]
  rows += [[part, f"{arrays:,}", f"{values:,}"] for part, arrays, values, _ in parts]
  arrays, values = (sum(part[i] for part in parts) for i in (1, 2))
  return [*rows, ["all", f"{arrays:,}", f"{values:,}"]]


def _table(rows: list[list[str]]) -> str:
  """Formats rows of text as a table.

  The first column is aligned to the left, and all others to the right. In the last column, only
  cells that end in a digit are aligned.
  """
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
  """Formats config fields of the encoder, one paragraph per group of fields.

  Fields whose value is an empty tuple are left out.

  Args:
    fields: values by dotted name.
  """
  groups: dict[str, list[str]] = {}
  for name, value in fields.items():
    group, _, leaf = name.partition(".")
    if value != ():
      groups.setdefault(group, []).append(f"{leaf} {value}")
  paragraphs = [
    textwrap.fill(f"{group}: {', '.join(values)}", 100, subsequent_indent="  ")
    for group, values in groups.items()
  ]
  return "\n".join(["Encoder fields", *paragraphs]) if fields else ""


def _position(steps: list[Step]) -> str:
  with_data = [step for step in steps if step.data]
  if not with_data:
    return ""
  data = ", ".join(f"{name} {value}" for name, value in with_data[-1].data.items())
  return f"Data position at step {with_data[-1].step:,}\n{data}"


def _changes(changes: dict[str, list[Any]]) -> str:
  width = max(map(len, changes), default=0)
  lines = [f"{name:<{width}}  {new!r} (default {old!r})" for name, (old, new) in changes.items()]
  return "\n".join(lines) or "none"


def _lineage(lineage: dict[str, Any] | None) -> str:
  """Formats the origin of an encoder as text, with one line for each earlier run, the latest first.

  The text is empty if there is no earlier run.

  Args:
    lineage: origin of the encoder. Its key `from` holds the origin of the previous encoder. None if
      the run started from random weights.
  """
  lines = []
  while lineage:
    facts = f"commit {lineage['commit']}, config {lineage['fingerprint']}"
    lines.append(f"{lineage['encoder']} encoder of {lineage['path']} ({facts})")
    lineage = lineage["from"]
  return "Warm start from\n" + "\n".join(lines) if lines else ""


def _size(count: int) -> str:
  for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
    if count >= unit:
      return f"{count / unit:.1f} {name}"
  return f"{count} B"


__all__ = ["CheckpointError", "Page", "Step", "inspect"]
