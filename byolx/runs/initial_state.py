"""Where a run's state comes from: drawn from its seed, with another run's encoder if it asks for one.

Which checkpoint the encoder was taken from stays in the workdir, with a digest of every array: so a
second start takes the same one, and a frozen encoder can be told from one that has moved.
"""

import json
from pathlib import Path
from typing import Any

import jax

from byolx.checkpoints import checksums, pretrained
from byolx.core import distributed, files, sharding, text
from byolx.runs import config
from byolx.runs.experiment import Experiment
from byolx.training.state import TrainState, state_shardings

LINEAGE = "lineage.json"
FROZEN = "frozen_encoder.json"
"""Digests of a frozen encoder's arrays, by name."""


def new_state(exp: Experiment, workdir: Path) -> TrainState:
  """The state at step 0: drawn from the seed, with the encoder of `init.workdir` if that is given.

  Which checkpoint that was is kept in the workdir, so that starting again takes the same one.
  """
  state = exp.initialise()
  init = exp.config.init
  if not init.workdir:
    return state
  before = lineage(workdir)
  source = Path(before["path"] if before else init.workdir)
  place, fits = sharding.replicated(exp.mesh), config.encoder_check(exp.config)
  encoder = pretrained.read(source, init.encoder, place, fits)
  state, table = pretrained.apply(state, encoder)
  state = jax.device_put(state, state_shardings(exp.abstract_state))
  print(f"starting from the {init.encoder} encoder of {encoder.lineage['path']}\n{table.text()}")
  _write(workdir / LINEAGE, encoder.lineage | _facts(encoder))
  if exp.task.frozen:
    _write(workdir / FROZEN, checksums.digests(pretrained.arrays_of(state)))
  return state


def _facts(encoder: pretrained.Encoder) -> dict[str, Any]:
  """What the encoder was trained on, by which config where not the default, and whether to its end."""
  flat = encoder.config
  if not flat or "images" not in encoder.data:
    return {"data": encoder.data.get("source"), "changes": None, "finished": None}
  steps = flat["train.epochs"] * encoder.data["images"] // flat["train.batch_size"]
  return {
    "data": encoder.data["source"],
    "changes": config.changes(flat),
    "finished": encoder.lineage["step"] >= steps,
  }


def _write(path: Path, content: dict[str, Any]) -> None:
  if distributed.is_writer():
    files.write_atomically(path, json.dumps(content, indent=1) + "\n")


def lineage(workdir: Path) -> dict[str, Any] | None:
  """The checkpoint that the run's encoder came from, if it came from one."""
  path = workdir / LINEAGE
  return json.loads(path.read_text()) if path.exists() else None


def check_frozen(state: TrainState, workdir: Path) -> None:
  """Compares the encoder bit by bit with the one that the run started from.

  Raises:
    RuntimeError: parameters or statistics have changed.
  """
  before = json.loads((workdir / FROZEN).read_text())
  after = checksums.digests(pretrained.arrays_of(state))
  changed = [name for name in before | after if before.get(name) != after.get(name)]
  if changed:
    raise RuntimeError(
      f"{workdir}: the frozen encoder is not the one that was loaded: "
      f"{text.first_few(changed)}; expected every bit as it was"
    )
