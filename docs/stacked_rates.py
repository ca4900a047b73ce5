"""Cost of linear evaluation at five rates compared with one: stacked heads on one forward pass.

  python docs/stacked_rates.py

ResNet-50 on 64 x 64 pixels and this machine's CPU; the train step of `configs/linear_imagenet.py` with
1000 classes. Both steps are compiled first, then run in turn; the result is the ratio of the medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from byolx.core import sharding
from byolx.runs import config, trainer

CONFIG = Path(__file__).parent.parent / "configs" / "linear_imagenet.py"


def step_of(rates: str, batch: int):
  """Compiles a step; returns a function that runs it on its own state and returns the seconds."""
  overrides = {
    "views.size": 64,
    "train.batch_size": batch,
    "optim.rates": rates,
    "init.workdir": "not read here",
  }
  cfg = config.load(str(CONFIG), [f"--config.{name}={value}" for name, value in overrides.items()])
  made = trainer.build(cfg, jax.devices()[:1], images=1_271_158, classes=1000)
  compiled, state = made.lower().compile(), made.initialise()
  rng = np.random.default_rng(0)
  rows = {
    "view1": rng.integers(0, 256, (batch, 64, 64, 3), np.uint8),
    "label": rng.integers(0, 1000, batch, np.int32),
    "index": np.arange(batch, dtype=np.int32),
  }
  rows = sharding.put_batch(rows, made.mesh)

  def step() -> float:
    nonlocal state
    began = time.perf_counter()
    state, scalars = compiled(state, rows, made.step_key)
    jax.block_until_ready((state, scalars))
    return time.perf_counter() - began

  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, default=64, help="images; default: 64")
  parser.add_argument("--rounds", type=int, default=15, help="default: 15")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  steps = {
    "one": step_of("(0.4,)", arguments.batch),
    "five": step_of("(0.4, 0.3, 0.2, 0.1, 0.05)", arguments.batch),
  }
  for step in steps.values():
    step()
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for number in range(arguments.rounds):
    for name in sorted(steps, reverse=bool(number % 2)):
      seconds[name].append(steps[name]())
  one, five = (statistics.median(seconds[name]) for name in ("one", "five"))
  print(
    f"one rate {one:.3f} s, five rates {five:.3f} s a step of {arguments.batch}: {five / one:.3f}"
  )


if __name__ == "__main__":
  main()
