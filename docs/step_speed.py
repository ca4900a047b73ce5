"""Speed of byolx's train step compared with the same step in plain JAX, on this CPU.

  python docs/step_speed.py
  python docs/step_speed.py --devices=2 --rounds=9

ResNet-50 at 64 x 64, LARS, online probe and monitors, float32. Both sides start from the same
parameters and use the same crops of photographs. First both take three steps, whose results must
agree. Then they take turns, step by step, in alternating order, because the speed of a shared machine
varies. The ratio is the median over pairs. The plain step is `plain_byol.py`. It takes about four
minutes for one number of devices and seven pairs; nothing else should run on the machine.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "docs"), str(ROOT / "tests")]

import plain_byol  # noqa: E402
from photographs import pieces  # noqa: E402

from byolx.core import sharding  # noqa: E402
from byolx.runs import config, trainer  # noqa: E402
from byolx.training.state import TrainState  # noqa: E402
from byolx.training.step import compile_step  # noqa: E402

CLASSES, STEPS = 1000, 1000
AGREE_STEPS = 3
TOLERANCE = 5e-3
"""Largest accepted difference of the two sides, as a share of the distance that the parameters moved.

The difference comes from float32 sums in another order, and 50 layers with normalisation magnify it.
In the gradients of one step, an untrained ResNet-50 magnifies 1e-7 to about 1e-2; with blocks that are
the identity at first (`bn_last_scale=0`), to 1e-5. The program is the same, only its start differs.
"""

OVERRIDES = (
  "--config.model.dtype=float32",
  "--config.model.bn_last_scale=0.0",
  "--config.optim.warmup_epochs=0",
  "--config.train.epochs=1",
  "--config.train.remat=none",
  "--config.mesh.state=replicated",
)


@dataclasses.dataclass
class Side:
  """One implementation: its step, its state, and the time of its preparation.

  Args:
    step: function from state and batch to the new state and scalars.
    state: current state, which each step donates and replaces.
    to_plain: function from the state to parameters, target and averages as plain dicts.
    seconds: seconds of tracing, lowering and compiling, by name.
  """

  step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
  state: Any
  to_plain: Callable[[Any], dict[str, Any]]
  seconds: dict[str, float]

  def advance(self, batch) -> dict[str, jax.Array]:
    """Takes one step and waits for its end."""
    self.state, scalars = jax.block_until_ready(self.step(self.state, batch))
    return scalars


def photograph_views(count: int, size: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Makes a batch: `count` pieces of photographs, whole and their centres, resized to `size`."""
  side, labels, whole, centre = 192, [], [], []
  for number, piece in pieces(count, side, side, seed):
    labels.append(number)
    middle = piece[side // 4 : -side // 4, side // 4 : -side // 4]
    for image, views in ((piece, whole), (middle, centre)):
      image = np.ascontiguousarray(image)
      views.append(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
  return {
    "view1": np.stack(whole),
    "view2": np.stack(centre),
    "label": np.array(labels, np.int32),
  }


def compile_timed(make_step: Callable, *arguments) -> tuple[Callable, dict[str, float]]:
  """Compiles the jitted function of `make_step`; returns it and the seconds of each stage."""
  began = time.perf_counter()
  traced = make_step().trace(*arguments)
  was_traced = time.perf_counter()
  lowered = traced.lower()
  was_lowered = time.perf_counter()
  compiled = lowered.compile()
  spent = was_traced - began, was_lowered - was_traced, time.perf_counter() - was_lowered
  return compiled, dict(zip(("trace", "lower", "compile"), spent, strict=True))


def plain_trees(state: TrainState) -> dict[str, Any]:
  """Returns parameters, target and averages of byolx's state in the form of `plain_byol`, on the host."""
  averages, target = nnx.split_state(state.rest, nnx.BatchStat, ...)
  trees = (nnx.to_pure_dict(jax.device_get(part)) for part in (state.params, target, averages))
  params, target, averages = trees
  return {"params": params, "target": target["target"], "averages": averages}


def build(
  overrides: Sequence[str], devices: Sequence[jax.Device], batch: dict[str, np.ndarray]
) -> tuple[Side, Side, Mesh]:
  """Compiles byolx's side and the plain one, with the same parameters.

  Args:
    overrides: overrides of configs/pretrain_imagenet.py, including views.size and train.batch_size.
    devices: devices over which the batch is spread.
    batch: example batch, for the shapes.
  """
  c = config.load(f"{ROOT / 'configs' / 'pretrain_imagenet.py'}", [*OVERRIDES, *overrides])
  ours = trainer.build(c, devices, STEPS * c.train.batch_size, CLASSES)
  whole, spread = sharding.replicated(ours.mesh), sharding.by_example(ours.mesh)
  placed, key = sharding.put_batch(batch, ours.mesh), jax.device_put(ours.step_key, whole)
  state = ours.initialise()
  begin = jax.device_put(plain_byol.new_state(**plain_trees(state)), whole)
  program, seconds = compile_timed(
    lambda: compile_step(ours.task, ours.tx, ours.layout, passes=ours.passes, remat=c.train.remat),
    state,
    placed,
    key,
  )
  library = Side(lambda state, batch: program(state, batch, key), state, plain_trees, seconds)
  settings = settings_of(ours)
  compiled, seconds = compile_timed(
    lambda: plain_byol.compile_step(settings, whole, spread), begin, placed
  )
  kept = ("params", "target", "averages")
  plain = Side(
    compiled, begin, lambda state: jax.device_get({name: state[name] for name in kept}), seconds
  )
  return library, plain, ours.mesh


def settings_of(ours: trainer.Recipe) -> plain_byol.Settings:
  """Returns the settings of the plain step, from the recipe's config."""
  c = ours.config
  return plain_byol.Settings(
    mean=ours.task.mean,
    std=ours.task.std,
    steps=ours.steps,
    warmup_steps=ours.warmup_steps,
    peak_rate=c.optim.base_rate * c.train.batch_size / 256,
    weight_decay=c.optim.weight_decay,
    momentum=c.optim.momentum,
    trust=c.optim.trust,
    tau_base=c.byol.tau_base,
  )


def disagreement(library: Side, plain: Side, batches: Sequence[Any]) -> dict[str, float]:
  """Takes one step of both sides per batch, and compares the final states.

  Returns:
    By kind of array: the distance between the two sides, as a share of the distance from the start;
    "scalars": the largest relative difference of a logged scalar.
  """
  begin = plain.to_plain(plain.state)
  worst = 0.0
  for batch in batches:
    ours, theirs = (jax.device_get(side.advance(batch)) for side in (library, plain))
    if set(ours) != set(theirs):
      raise ValueError(f"scalars {sorted(ours)} of byolx, {sorted(theirs)} of the plain step")
    gaps = [abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-3) for name in ours]
    worst = max(worst, *map(float, gaps))
  ends = [side.to_plain(side.state) for side in (library, plain)]
  shares = {}
  for kind in begin:
    first, ours, theirs = (jax.tree.leaves(tree[kind]) for tree in (begin, *ends))
    apart, moved = (
      np.sqrt(sum(np.sum(np.square(np.float64(a) - b)) for a, b in zip(theirs, other, strict=True)))
      for other in (ours, first)
    )
    shares[kind] = float(apart / moved)
  return shares | {"scalars": worst}


def take_turns(library: Side, plain: Side, batch, rounds: int) -> np.ndarray:
  """Measures the seconds of steps of both sides in alternating order, as pairs [rounds, 2]."""
  sides = (library, plain)
  seconds = np.empty((rounds, 2))
  for turn in range(rounds):
    for place in range(2):
      j = (turn + place) % 2
      began = time.perf_counter()
      sides[j].advance(batch)
      seconds[turn, j] = time.perf_counter() - began
  return seconds


def measure(devices: Sequence[jax.Device], images: int, size: int, rounds: int) -> float:
  """Prints a table for these devices; returns the ratio of the step times.

  Raises:
    SystemExit: the two sides do not agree.
  """
  batches = [photograph_views(images, size, seed) for seed in range(AGREE_STEPS)]
  overrides = (f"--config.views.size={size}", f"--config.train.batch_size={images}")
  library, plain, mesh = build(overrides, devices, batches[0])
  batches = [sharding.put_batch(batch, mesh) for batch in batches]
  apart = disagreement(library, plain, batches)
  told = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
  print(f"\n{len(devices)} device(s), {images} images of {size} x {size}, two views each")
  print(f"apart after {AGREE_STEPS} steps, as a share of the way: {told}")
  if max(apart.values()) > TOLERANCE:
    sys.exit(f"expected at most {TOLERANCE}: these are not the same step")
  seconds = take_turns(library, plain, batches[0], rounds)
  print(f"{'':10}{'trace s':>9}{'lower s':>9}{'compile s':>11}{'step s':>9}  quartiles")
  for j, (name, side) in enumerate((("byolx", library), ("plain", plain))):
    low, middle, high = np.percentile(seconds[:, j], (25, 50, 75))
    stages = side.seconds
    print(
      f"{name:10}{stages['trace']:9.2f}{stages['lower']:9.2f}{stages['compile']:11.1f}{middle:9.3f}"
      f"  {low:.3f} to {high:.3f}"
    )
  low, middle, high = np.percentile(seconds[:, 0] / seconds[:, 1], (25, 50, 75))
  print(f"byolx / plain, median of {rounds} pairs: {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
  return float(middle)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--devices", default="1,2", help="devices that the CPU is split into")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--size", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=15)
  arguments = parser.parse_args()
  counts = [int(count) for count in arguments.devices.split(",")]
  jax.config.update("jax_num_cpu_devices", max(counts))
  for count in counts:
    measure(jax.devices()[:count], arguments.batch, arguments.size, arguments.rounds)


if __name__ == "__main__":
  main()
