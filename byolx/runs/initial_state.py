"""Makes the initial state of a run, with random parameters or the pretrained encoder of another run.

The workdir records which checkpoint the encoder comes from, so a restart loads the same one. For a
frozen encoder it also records the checksum of each array, to check at the end that none has changed.
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
"""Name of the file with the checksum of each array of a frozen encoder."""


def new_state(exp: Experiment, workdir: Path) -> TrainState:
  """Initialises the state from the seed, and loads the encoder of `init.workdir` if that is set.

  The workdir records which checkpoint the encoder comes from, so that a restart loads the same one.

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    workdir: folder of the run.

  Raises:
    ConfigError: the encoder does not exist, or does not fit the run.
    storage.CheckpointError: no checkpoint of the encoder can be read.
  """
  state = exp.initialise()
  init = exp.config.init
  if not init.workdir:
    return state
  recorded = lineage(workdir)
  source = Path(recorded["path"] if recorded else init.workdir)
  place, check = sharding.replicated(exp.mesh), config.encoder_check(exp.config)
  encoder = pretrained.read(source, init.encoder, place, check)
  state, table = pretrained.apply(state, encoder)
  state = jax.device_put(state, state_shardings(exp.abstract_state))
  print(f"starting from the {init.encoder} encoder of {encoder.lineage['path']}\n{table.text()}")
  _write(workdir / LINEAGE, encoder.lineage | _facts(encoder))
  if exp.task.frozen:
    _write(workdir / FROZEN, checksums.digests(pretrained.arrays_of(state)))
  return state


def _facts(encoder: pretrained.Encoder) -> dict[str, Any]:
  """Returns facts about the pretraining of an encoder.

  The keys are data (name of the data set), changes (fields that differ from the defaults) and finished
  (whether the pretraining reached its last step). Unknown facts are None.
  """
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
  """Reads the facts about the checkpoint from which the run's encoder was loaded.

  Returns None for an encoder from scratch.
  """
  path = workdir / LINEAGE
  return json.loads(path.read_text()) if path.exists() else None


def check_frozen(state: TrainState, workdir: Path) -> None:
  """Checks that every bit of the encoder is as it was when the run started.

  Args:
    state: state after training.
    workdir: folder of the run, which has the checksums of the encoder's arrays.

  Raises:
    RuntimeError: parameters or BatchNorm statistics have changed.
  """
  before = json.loads((workdir / FROZEN).read_text())
  after = checksums.digests(pretrained.arrays_of(state))
  changed = [name for name in before | after if before.get(name) != after.get(name)]
  if changed:
    raise RuntimeError(
      f"{workdir}: the frozen encoder has changed: {text.first_few(changed)}; expected every bit "
      "as it was loaded"
    )
