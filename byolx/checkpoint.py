"""Checkpoints: the train state, the data position and facts about the run, by orbax, asynchronously.

One checkpoint holds `state` (every array under its path's name), `data` (where the input stands) and
`meta`. A save that is cut off leaves no step behind; the newest whole one is restored.
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


class Checkpoints:
  """The checkpoints of one run, in `folder`.

  Args:
    folder: made if missing.
    keep: how many of the latest are kept.
  """

  def __init__(self, folder: Path, keep: int = 2):
    # orbax reports every save at level INFO; the run's own log says what a reader needs.
    logging.getLogger("absl").setLevel(logging.ERROR)
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep), enable_async_checkpointing=True
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )

  def latest(self) -> int | None:
    """The newest whole step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: dict[str, Any], meta: dict[str, Any]) -> None:
    """Starts a save and returns once the arrays are copied; the caller may then donate them."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(named(state)),
        data=ocp.args.JsonSave(data),
        meta=ocp.args.JsonSave(meta),
      ),
    )

  def data(self, step: int) -> dict[str, Any]:
    """The data position of a step, without its arrays."""
    return self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

  def restore(self, abstract: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
    """The state of a step (the latest unless given), placed as `abstract` says, and its data position.

    Args:
      abstract: a pytree like the one saved, of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      ValueError: the checkpoint's arrays are not those of `abstract`.
    """
    step = self.latest() if step is None else step
    # Before any array is read: a read that fails half-way leaves others running.
    _refuse_other_arrays(step, self._manager.item_metadata(step)["state"].tree, abstract)
    wanted = named(abstract)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore()),
    )
    leaves = _in_order(restored["state"], abstract)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves), restored["data"]

  def wait(self) -> None:
    """Waits for the save under way, if any."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save under way, if any."""
    self.wait()
    self._manager.close()


def named(tree: Any) -> dict[str, Any]:
  """The arrays of a pytree as a nested dict keyed by their paths."""
  nested: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    node = nested
    *groups, last = _names(path)
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = leaf
  return nested


def _refuse_other_arrays(step: int, stored: Any, wanted: Any) -> None:
  """Raises ValueError unless the two have the same names, shapes and types."""
  there, here = _kinds(stored), _kinds(wanted)
  for name in here | there:
    found, expected = there.get(name, "missing"), here.get(name, "no such array")
    if found != expected:
      raise ValueError(
        f"checkpoint of step {step} holds another model: {name} is {found}, expected {expected}"
      )


def _kinds(tree: Any) -> dict[str, str]:
  """`float32[8, 10]` and the like, by the dotted name of each array."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {".".join(_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat}


def _in_order(nested: dict[str, Any], like: Any) -> list[Any]:
  """The arrays of `named`, in the order of the leaves of `like`."""
  leaves = []
  for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]:
    node = nested
    for name in _names(path):
      node = node[name]
    leaves.append(node)
  return leaves


def _names(path: tuple[Any, ...]) -> list[str]:
  """Path entries as names; the `value` inside each nnx variable says nothing and is left out."""
  names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
  return names[:-1] if len(names) > 1 and names[-1] == "value" else names
