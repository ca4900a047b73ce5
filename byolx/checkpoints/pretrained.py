"""Warm start: initialises the encoders of a run with the encoder in another run's checkpoint.

Only the encoder's arrays are read; projector, predictor, heads, optimiser and devices may differ.
Every encoder of the new state (online and target) gets a copy of these arrays; all other arrays
keep their initial values. The config fields with which an encoder must be used have to be equal in
both runs, because with other values the same weights would compute another function.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from byolx.checkpoints import manager, storage
from byolx.core.config import ConfigError, stored
from byolx.core.fields import each, field, one_of
from byolx.core.text import first_few

LOG = logging.getLogger("byolx")

State = TypeVar("State")

_VARIABLES = ("params", "rest")

Accept = Callable[[Mapping[str, Any], Path], None]
"""Function that takes the config that a checkpoint was saved with, as values by dotted name, and
the checkpoint's folder. It raises ConfigError to refuse the checkpoint."""


@dataclasses.dataclass(frozen=True)
class InitSpec:
  """The config group `init`: the encoder and the config fields that a run takes from another run."""

  workdir: str = field(
    "", "workdir or checkpoint of the pretrained encoder to start from; empty: random weights"
  )
  encoder: str = field(
    "online", "encoder of init.workdir to start from", one_of("online", "target")
  )
  inherit: tuple[str, ...] = field(
    (),
    "groups of fields that are copied from another run, except for fields that this config sets",
    each(one_of("data", "views", "model", "eval")),
    free=True,
  )
  like: str = field(
    "", "workdir of the run whose fields are copied; empty: init.workdir", free=True
  )


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder that was read from a checkpoint of another run, the source run.

  Args:
    arrays: the encoder's arrays, by their names inside the encoder, such as `stem.kernel`.
    lineage: origin of the encoder, serialisable as JSON. It has `path` and `step` of the checkpoint,
      `encoder` (online or target), `commit` (of git) and `fingerprint` (hash of the config) of the
      source run. Its key `from` holds the origin of the encoder that the source run started from.
    others: types and shapes, such as `float32[8, 10]`, of all other arrays in the checkpoint, by
      full name.
    data: position of the source run in its training data, with facts such as the number of images.
    config: config of the source run, as values by dotted name; empty if it was not saved.
  """

  arrays: dict[str, jax.Array]
  lineage: dict[str, Any]
  others: dict[str, str]
  data: dict[str, Any]
  config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
  """Summary of a warm start: which arrays were loaded from a checkpoint, and which were not.

  Each attribute is a list of rows, one per part of the state, such as `online encoder`: name of the
  part, number of arrays, number of values, and a remark.

  Attributes:
    loaded: parts of the new state that were loaded from the checkpoint.
    left: parts of the checkpoint that were not loaded.
    missing: parts of the new state that keep their initial values.
  """

  loaded: list[tuple[str, int, int, str]]
  left: list[tuple[str, int, int, str]]
  missing: list[tuple[str, int, int, str]]

  def text(self) -> str:
    """Returns the summary as an aligned table to print."""
    rows = [("", "part", "arrays", "values", "")]
    titles = {"loaded": self.loaded, "not loaded": self.left, "new": self.missing}
    for title, parts in titles.items():
      for number, (part, arrays, size, remark) in enumerate(parts or [("none", 0, 0, "")]):
        rows.append((title if number == 0 else "", part, f"{arrays:,}", f"{size:,}", remark))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
      f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
      for a, b, c, d, e in rows
    )


def read(
  path: Path, which: str, place: jax.sharding.Sharding, accept: Accept | None = None
) -> Encoder:
  """Reads an encoder from the newest undamaged checkpoint of a workdir, or from one checkpoint.

  Args:
    path: folder of the workdir, of its checkpoints, or of one checkpoint.
    which: encoder to read, `online` or `target`.
    place: sharding of the arrays.
    accept: function that takes the checkpoint's config and its folder. It raises ConfigError to
      refuse the checkpoint. If the checkpoint has no config, a warning is logged, and the function
      is not called. None for no check.

  Raises:
    ConfigError: the checkpoint has no such encoder, or `accept` refuses it.
    CheckpointError: there is no checkpoint, or all are damaged.
  """
  inner_names: dict[str, str] = {}

  def choose(folder: Path, record: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    if accept is not None:
      _compare(record, folder, accept)
    named = {name: location for name in record["arrays"] if (location := _in_encoder(name))}
    inner_names.update({name: inner for name, (owner, inner) in named.items() if owner == which})
    if not inner_names:
      owners = ", ".join(sorted({owner for owner, _ in named.values()})) or "none"
      raise ConfigError(f"init.encoder={which}: {path} has no such encoder; it has: {owners}")
    return {name: _abstract(record["arrays"][name][0], place) for name in inner_names}

  def load(folder: Path) -> Encoder:
    inner_names.clear()
    record, arrays = manager.load(folder, functools.partial(choose, folder))
    lineage = {
      "path": str(folder.absolute()),
      "step": record["step"],
      "encoder": which,
      "commit": record["meta"].get("commit"),
      "fingerprint": record["meta"].get("fingerprint"),
      "from": record["meta"].get("lineage"),
    }
    others = {name: kind for name, (kind, _) in record["arrays"].items() if name not in arrays}
    inside = {inner_names[name]: array for name, array in arrays.items()}
    return Encoder(inside, lineage, others, record["data"], record["meta"].get("config", {}))

  return manager.first_good(manager.folders_at(path), load)


def apply(state: State, encoder: Encoder) -> tuple[State, Table]:
  """Replaces the arrays of all encoders in a training state by those of a loaded encoder.

  Args:
    state: training state with one or more encoders.
    encoder: loaded encoder, whose arrays are copied.

  Returns:
    The new state and a summary. Each array of the new state has the sharding that it had in `state`.

  Raises:
    ConfigError: an encoder of the state has another architecture.
  """
  leaves = storage.named(state)
  places = {name: location for name in leaves if (location := _in_encoder(name))}
  _refuse_other_architecture(
    {inner: storage.kind(leaves[name]) for name, (_, inner) in places.items()},
    {inner: storage.kind(array) for inner, array in encoder.arrays.items()},
    encoder.lineage["path"],
  )
  # Copies, because two encoders of a state that is donated cannot share an array.
  copy = jax.jit(
    lambda arrays: {name: jnp.copy(arrays[inner]) for name, (_, inner) in places.items()},
    out_shardings={name: leaves[name].sharding for name in places},
    compiler_options={"xla_backend_optimization_level": 0},
  )
  new = leaves | copy(encoder.arrays)
  loaded = {name: storage.kind(leaves[name]) for name in places}
  missing = {name: storage.kind(leaf) for name, leaf in leaves.items() if name not in places}
  changed = {
    name: f"{encoder.others[name]} in the checkpoint"
    for name, kind in missing.items()
    if encoder.others.get(name, kind) != kind
  }
  table = Table(parts_of(loaded), parts_of(encoder.others), parts_of(missing, changed))
  return jax.tree.unflatten(jax.tree.structure(state), new.values()), table


def arrays_of(state: Any, which: str = "online") -> dict[str, jax.Array]:
  """Returns the arrays of one encoder of a training state, by their names inside the encoder.

  Args:
    state: training state with one or more encoders.
    which: encoder to return, `online` or `target`.
  """
  named = storage.named(state)
  places = {name: location for name in named if (location := _in_encoder(name))}
  return {inner: named[name] for name, (owner, inner) in places.items() if owner == which}


def _in_encoder(name: str) -> tuple[str, str] | None:
  """Returns the name of the encoder that holds an array, and the array's name inside the encoder.

  For `params.target.encoder.stem.kernel`, the result is `("target", "stem.kernel")`. If the model
  has a single encoder, the full name contains no name of an encoder, and the result has `online`.

  Args:
    name: full name of the array in the state.

  Returns:
    The two names; None if the array belongs to no encoder.
  """
  variables, *parts = name.split(".")
  if variables not in _VARIABLES or "encoder" not in parts[:-1]:
    return None
  at = parts.index("encoder")
  return ".".join(parts[:at]) or "online", ".".join(parts[at + 1 :])


def _abstract(kind: str, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  dtype = jnp.dtype(kind.partition("[")[0])
  return jax.ShapeDtypeStruct(storage.shape_of(kind), dtype, sharding=place)


def _compare(record: Mapping[str, Any], folder: Path, accept: Accept) -> None:
  """Checks the config that a checkpoint was saved with; logs a warning if there is no config.

  Args:
    record: record of the checkpoint, the contents of record.json.
    folder: folder of the checkpoint.
    accept: function that takes config and folder, and raises ConfigError to refuse the checkpoint.
  """
  saved = record["meta"].get("config") or stored(folder)
  if saved:
    accept(saved, folder)
  else:
    LOG.warning(
      "%s was saved without a config: cannot check that its encoder was trained with the padding,"
      " epsilon, input size and normalisation of this run",
      folder,
    )


def _refuse_other_architecture(
  here: Mapping[str, str], there: Mapping[str, str], path: str
) -> None:
  differences = [
    f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'no such array')} here"
    for name in here | there
    if here.get(name) != there.get(name)
  ]
  if differences:
    raise ConfigError(
      f"init.workdir: the encoder of {path} has another architecture: {first_few(differences)}"
    )


def parts_of(
  kinds: Mapping[str, str], remarks: Mapping[str, str] = {}
) -> list[tuple[str, int, int, str]]:
  """Counts the arrays and values in each part of a training state, such as `online encoder`.

  Args:
    kinds: types and shapes, such as `float32[8, 10]`, by array name.
    remarks: remarks on some of the arrays, by array name.

  Returns:
    One row for each part: its name, its number of arrays, its number of values, and a text. The
    text holds the first remark on an array of the part, and the number of further remarks. It is
    empty if there is no remark.
  """
  parts: dict[str, list[str]] = {}
  for name in kinds:
    parts.setdefault(_part(name), []).append(name)
  rows = []
  for part, names in parts.items():
    size = sum(math.prod(storage.shape_of(kinds[name])) for name in names)
    lines = [f"{name} is {kinds[name]}, {remarks[name]}" for name in names if name in remarks]
    more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
    rows.append((part, len(names), size, lines[0] + more if lines else ""))
  return rows


def _part(name: str) -> str:
  """Returns the part of the state that an array belongs to, such as `online encoder` or `opt_state`."""
  first, *parts = name.split(".")
  if first not in _VARIABLES:
    return first
  return " ".join(parts[:2]) if parts[0] in ("online", "target") else parts[0]
