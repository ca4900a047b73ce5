"""Makes the summary of a run that is printed before step 1.

It lists parameters, memory, devices, images, steps and learning rates.
"""

import math
from pathlib import Path

import jax
from flax import nnx

from byolx.core import sharding, text
from byolx.runs.experiment import Experiment
from byolx.runs.images import Sources
from byolx.runs.trainer import Recipe
from byolx.training import optimizers


def describe(exp: Experiment, workdir: Path) -> str:
  """Returns the summary of a run as text.

  It lists parameters, memory, devices, images, steps and learning rates.

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    workdir: folder of the run.
  """
  c = exp.config
  device = jax.devices()[0]
  source = exp.train_source
  passes = f"{exp.passes} passes of {c.train.batch_size // exp.passes}"
  lines = [
    parameter_table(exp),
    "",
    placement_table(exp),
    "",
    f"devices   {exp.mesh.size} x {device.device_kind}, mesh {dict(exp.mesh.shape)}, "
    f"state {c.mesh.state}, remat {c.train.remat}",
    f"images    {len(source):,} for training, {_held_out(exp.sources)} "
    f"({source.name}, {len(source.classes)} classes)",
    f"encoder   {_encoder(exp)}",
    f"steps     {exp.steps:,} of {c.train.batch_size} images"
    + (f" in {passes}" if exp.passes > 1 else "")
    + f", {c.train.epochs:g} epochs",
    f"rate      {_rates(exp)}; {c.optim.name}",
    *(f"{name:<9} {words}" for name, words in exp.task.summary()),
    f"workdir   {workdir}",
    "",
  ]
  return "\n".join(lines)


def _encoder(exp: Experiment) -> str:
  """Describes the encoder: architecture, width, number of features and compute type.

  The description of the user's own encoder is its name.
  """
  model = exp.config.model
  if exp.network is not None:
    return f"{exp.network}, the user's own"
  return (
    f"{model.arch} {model.width:g}x, {exp.encoder.stages.channels[-1]} features, "
    f"computed in {model.dtype}"
  )


def _held_out(images: Sources) -> str:
  """Describes the held-out images: `5,000 for validation, 10,000 for the test`.

  If there is only one held-out split, the text is `5,000 held out`.
  """
  if images.validation is None or images.test is None:
    return f"{len(images.held_out[1]):,} held out"
  return f"{len(images.validation):,} for validation, {len(images.test):,} for the test"


def _rates(exp: Experiment) -> str:
  o, batch = exp.config.optim, exp.config.train.batch_size
  peak = exp.rate_at(exp.warmup_steps)
  scaled = f" ({(o.rates or [o.base_rate])[0]:g} * {batch} / 256)" if o.batch_scaling else ""
  start = f"0 to {peak:g}{scaled} in {exp.warmup_steps:,} steps, then " if exp.warmup_steps else ""
  start = start or f"{peak:g}{scaled}, "
  return start + ("a cosine to 0" if o.schedule == "cosine" else "constant")


def parameter_table(exp: Experiment) -> str:
  """Returns a table of the trained parameters, with one row per part of the networks.

  The last column counts the parameters without weight decay. With LARS, these have no trust ratio
  either.
  """
  o = exp.config.optim
  head = "no decay, no trust ratio" if o.name == "lars" else "no decay"
  parts: dict[str, list[tuple[int, bool]]] = {}
  for path, variable in nnx.to_flat_state(exp.abstract_params):
    adapted = optimizers.role(variable).adapted or not o.exclude
    parts.setdefault(_part(path), []).append((math.prod(variable.shape), adapted))
  rows = [("trained part", "arrays", "parameters", head)]
  ordered = sorted(parts.items(), key=lambda item: item[0] != "encoder stem")
  everything = [array for arrays in parts.values() for array in arrays]
  for part, arrays in [*ordered, ("all", everything)]:
    excluded = [size for size, adapted in arrays if not adapted]
    numbers = f"{sum(excluded):,} in {len(excluded)} (biases, BatchNorm)" if excluded else "none"
    rows.append((part, f"{len(arrays):,}", f"{sum(size for size, _ in arrays):,}", numbers))
  return text.aligned(rows, right=(1, 2))


def placement_table(recipe: Recipe) -> str:
  """Returns a table of the training state, with one row per part.

  The columns are the bytes in total, the bytes per device, and the number of arrays that are divided
  over devices (sharded).
  """
  state = recipe.abstract_state
  untrained = nnx.filter_state(state.rest, nnx.Param)
  parts = {
    "trained parameters": state.params,
    recipe.task.untrained: untrained,
    "optimiser": state.opt_state,
    "statistics": nnx.filter_state(state.rest, nnx.Not(nnx.Param)),
  }
  parts["all"] = list(parts.values())
  rows = [("state", "bytes", "per device", "sharded")]
  for name, tree in parts.items():
    leaves = jax.tree.leaves(tree)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    held = sharding.held_bytes(tree)
    count = sum(not x.sharding.is_fully_replicated for x in leaves)
    sharded = f"{count:,} of {len(leaves):,} arrays" if count else "none"
    rows.append((name, f"{whole:,}", f"{held:,}", sharded))
  return text.aligned(rows, right=(1, 2))


def _part(path: tuple) -> str:
  """Returns the name of the part to which a parameter belongs, such as `encoder stage 2` or `predictor`.

  Args:
    path: path of the parameter in the model.
  """
  names = [str(name) for name in path]
  if names[0] == "online":
    names = names[1:]
  if names[0] == "encoder":
    if names[1] == "groups":
      return f"encoder stage {int(names[2]) + 1}"
    return "encoder stem" if names[1] in ("stem", "stem_norm") else "encoder"
  return names[0]
