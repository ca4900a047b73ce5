"""Starting a run from another run's encoder: only the encoder's arrays are read from its checkpoint.

Everything else may differ: projector, predictor, heads, optimiser, devices. Every encoder of the new
state (online, target) gets the arrays; what they do not cover stays as it was initialised. The fields
that go with an encoder may not differ, or equal arrays would compute something else: `read` checks them.
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
"""Takes a flat config and the checkpoint that it goes with; raises ConfigError to refuse it."""


@dataclasses.dataclass(frozen=True)
class InitSpec:
  """The config group `init`: what a run takes from another one."""

  workdir: str = field(
    "", "start with the encoder of this run's newest checkpoint, or of this checkpoint; empty: anew"
  )
  encoder: str = field("online", "which of its encoders", one_of("online", "target"))
  inherit: tuple[str, ...] = field(
    (),
    "groups of fields that are taken from another run where this config does not set them",
    each(one_of("data", "views", "model", "eval")),
    free=True,
  )
  like: str = field("", "that run's workdir; empty: init.workdir", free=True)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder of another run.

  Args:
    arrays: by the name that they have inside the encoder.
    lineage: where they come from, as JSON: path, step, encoder, commit, fingerprint, and the
      lineage of that run.
    others: kinds, such as `float32[8, 10]`, of the arrays that were left, by their whole names.
    data: what the run was trained on, see `fit.data_position`.
    config: of the run, flat.
  """

  arrays: dict[str, jax.Array]
  lineage: dict[str, Any]
  others: dict[str, str]
  data: dict[str, Any]
  config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
  """What became of every array: rows of part, arrays, numbers, remark."""

  loaded: list[tuple[str, int, int, str]]
  left: list[tuple[str, int, int, str]]
  missing: list[tuple[str, int, int, str]]

  def text(self) -> str:
    """The table, to be printed."""
    rows = [("", "part", "arrays", "numbers", "")]
    titles = {
      "loaded": self.loaded,
      "left behind": self.left,
      "not there, new": self.missing,
    }
    for title, found in titles.items():
      for number, (part, arrays, size, remark) in enumerate(found or [("nothing", 0, 0, "")]):
        rows.append((title if number == 0 else "", part, f"{arrays:,}", f"{size:,}", remark))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
      f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
      for a, b, c, d, e in rows
    )


def read(
  path: Path, which: str, place: jax.sharding.Sharding, accept: Accept | None = None
) -> Encoder:
  """An encoder of a workdir's newest good checkpoint, or of one checkpoint.

  Args:
    path: a workdir, its folder of checkpoints, or the folder of one.
    which: `online` or `target`.
    place: of the arrays.
    accept: raises where the config that the encoder was trained with does not fit the run that
      starts from it; None where no run does. A checkpoint without a config is only warned about.

  Raises:
    ConfigError: there is no such encoder, or by the run's config it would compute another function.
    checkpoint.CheckpointError: no checkpoint is there, or none is good.
  """
  prefixes: dict[str, str] = {}

  def choose(folder: Path, record: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    if accept is not None:
      _compare(record, folder, accept)
    named = {name: found for name in record["arrays"] if (found := _in_encoder(name))}
    prefixes.update({name: inner for name, (owner, inner) in named.items() if owner == which})
    if not prefixes:
      owners = ", ".join(sorted({owner for owner, _ in named.values()})) or "none"
      raise ConfigError(f"init.encoder={which}: {path} has no such encoder; it has: {owners}")
    return {name: _abstract(record["arrays"][name][0], place) for name in prefixes}

  def load(folder: Path) -> Encoder:
    prefixes.clear()
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
    own = {prefixes[name]: array for name, array in arrays.items()}
    return Encoder(own, lineage, others, record["data"], record["meta"].get("config", {}))

  return manager.first_good(manager.folders_at(path), load)


def apply(state: State, encoder: Encoder) -> tuple[State, Table]:
  """A state whose encoders are this one, each array where the state's own was.

  Raises:
    ConfigError: an encoder of the state has another architecture.
  """
  leaves = storage.named(state)
  places = {name: found for name in leaves if (found := _in_encoder(name))}
  _refuse_other_architecture(
    {inner: storage.kind(leaves[name]) for name, (_, inner) in places.items()},
    {inner: storage.kind(array) for inner, array in encoder.arrays.items()},
    encoder.lineage["path"],
  )
  # Copies: two encoders of a state that is donated cannot share an array.
  copy = jax.jit(
    lambda arrays: {name: jnp.copy(arrays[inner]) for name, (_, inner) in places.items()},
    out_shardings={name: leaves[name].sharding for name in places},
    compiler_options={"xla_backend_optimization_level": 0},
  )
  new = leaves | copy(encoder.arrays)
  loaded = {name: storage.kind(leaves[name]) for name in places}
  missing = {name: storage.kind(leaf) for name, leaf in leaves.items() if name not in places}
  changed = {
    name: f"{encoder.others[name]} there"
    for name, kind in missing.items()
    if encoder.others.get(name, kind) != kind
  }
  table = Table(parts_of(loaded), parts_of(encoder.others), parts_of(missing, changed))
  return jax.tree.unflatten(jax.tree.structure(state), new.values()), table


def arrays_of(state: Any, which: str = "online") -> dict[str, jax.Array]:
  """An encoder's arrays in a state, by the name that they have inside it."""
  named = storage.named(state)
  places = {name: found for name in named if (found := _in_encoder(name))}
  return {inner: named[name] for name, (owner, inner) in places.items() if owner == which}


def _in_encoder(name: str) -> tuple[str, str] | None:
  """Whose encoder an array is part of, and its name in there; None for all other arrays."""
  variables, *parts = name.split(".")
  if variables not in _VARIABLES or "encoder" not in parts[:-1]:
    return None
  at = parts.index("encoder")
  return ".".join(parts[:at]) or "online", ".".join(parts[at + 1 :])


def _abstract(kind: str, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  dtype = jnp.dtype(kind.partition("[")[0])
  return jax.ShapeDtypeStruct(storage.shape_of(kind), dtype, sharding=place)


def _compare(record: Mapping[str, Any], folder: Path, accept: Accept) -> None:
  """Has the config checked that a checkpoint was saved with."""
  there = record["meta"].get("config") or stored(folder)
  if there:
    accept(there, folder)
  else:
    LOG.warning(
      "%s was saved without a config: whether its encoder was trained with the padding, epsilon, input"
      " size and normalisation of this run cannot be checked",
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
  """Rows of part, arrays, numbers and first remark, from the kinds and remarks of named arrays."""
  parts: dict[str, list[str]] = {}
  for name in kinds:
    parts.setdefault(_part(name), []).append(name)
  rows = []
  for part, names in parts.items():
    size = sum(math.prod(storage.shape_of(kinds[name])) for name in names)
    said = [f"{name} is {kinds[name]}, {remarks[name]}" for name in names if name in remarks]
    more = f"; and {len(said) - 1} more" if len(said) > 1 else ""
    rows.append((part, len(names), size, said[0] + more if said else ""))
  return rows


def _part(name: str) -> str:
  """`online encoder`, `predictor`, `opt_state`."""
  first, *parts = name.split(".")
  if first not in _VARIABLES:
    return first
  return " ".join(parts[:2]) if parts[0] in ("online", "target") else parts[0]
