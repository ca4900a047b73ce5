"""What saves and restores cost: the caller's time, the step rate meanwhile, memory. Prints figures.

Every measurement is repeated in one process and the middle one counts, as other work may run beside.
"""

import os
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byolx.checkpoints import checksums
from byolx.checkpoints.manager import Checkpoints, Policy
from byolx.core import sharding

ROOT = Path(__file__).parents[2]


def large_state(place, gigabytes=1.05):
  """Shapes as in a wide ResNet: many small arrays, a few large ones; random, so nothing is cheap."""
  shapes = [(3, 3, 512, 512)] * 40 + [(1, 1, 1024, 2048)] * 40 + [(4096, 4096)] * 2
  size = 4 * sum(int(np.prod(shape)) for shape in shapes)
  shapes += [(4096, 1024)] * round((gigabytes * 1e9 - size) / 2**24) + [(512,)] * 400
  rng = np.random.default_rng(0)
  tree = {f"array{i}": rng.standard_normal(s, dtype=np.float32) for i, s in enumerate(shapes)}
  assert sum(x.nbytes for x in tree.values()) >= 1e9 * min(gigabytes, 1)
  return jax.device_put(tree, place)


@pytest.mark.slow
def test_a_save_keeps_its_caller_waiting_for_a_tenth_of_its_time(tmp_path):
  place = sharding.replicated(sharding.make_mesh(2))
  state = large_state(place)
  checkpoints = Checkpoints(tmp_path / "checkpoints", Policy(keep=1))
  shares = []
  for step in range(6):
    began = time.monotonic()
    blocked = checkpoints.save(step, state, {}, {})
    checkpoints.wait()
    whole = time.monotonic() - began
    print(f"blocked {blocked:.3f} s of {whole:.2f} s that a synchronous save takes")
    if step:  # the first one compiles the digests
      shares.append(blocked / whole)
  checkpoints.close()
  began = time.monotonic()
  checksums.digests(state)
  print(f"digests of 1.05 GB: {time.monotonic() - began:.2f} s, in the background")
  print(f"blocked for {statistics.median(shares):.1%} of a synchronous save")
  assert statistics.median(shares) <= 0.10


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_saved(tmp_path):
  mesh = sharding.make_mesh(2)
  place = sharding.replicated(mesh)
  state = large_state(place)
  checkpoints = Checkpoints(tmp_path / "checkpoints", Policy(keep=1))
  images = jax.device_put(
    np.random.default_rng(1).standard_normal((64, 32, 32, 32), dtype=np.float32),
    sharding.by_example(mesh),
  )

  def loss(kernel):
    x = images
    for _ in range(3):
      x = jax.nn.relu(
        jax.lax.conv_general_dilated(
          x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
      )
    return jnp.mean(x**2)

  step = jax.jit(lambda kernel: kernel - 1e-3 * jax.grad(loss)(kernel), donate_argnums=0)
  kernel = jax.device_put(np.full((3, 3, 32, 32), 0.01, np.float32), place)
  ratios = []
  for save in range(6):
    rates = {}
    for phase in ("before", "during", "after"):
      if phase == "during":
        checkpoints.save(save, state, {}, {})
      steps, began = 0, time.monotonic()
      while steps < 20 or (phase == "during" and checkpoints.saving):
        kernel = jax.block_until_ready(step(kernel))
        steps += 1
        if steps == 20 and phase != "during":
          break
      rates[phase] = steps / (time.monotonic() - began)
      if phase == "during":
        print(f"saved during {steps} steps, {time.monotonic() - began:.1f} s", end="; ")
        checkpoints.wait()
    normal = (rates["before"] + rates["after"]) / 2
    print(f"{rates['during']:.1f} steps/s, otherwise {normal:.1f}")
    if save:
      ratios.append(rates["during"] / normal)
  checkpoints.close()
  print(f"step rate during a save: {statistics.median(ratios):.0%} of normal")
  assert statistics.median(ratios) >= 0.70


RESTORE = """
import resource, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax
from byolx.core import sharding
from byolx.checkpoints.manager import Checkpoints
from test_checkpoint_speed import large_state

place = sharding.replicated(sharding.make_mesh({devices}))
like = jax.eval_shape(lambda: {{name: jax.numpy.zeros(s, "float32") for name, s in {shapes!r}.items()}})
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
jax.block_until_ready(jax.device_put(0.0, place))


def resident(field):
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


before = resident("VmRSS")
found = Checkpoints(Path({folder!r})).restore(like)
print(before, resident("VmHWM"), resident("VmRSS"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_restore_does_not_hold_the_state_twice(tmp_path, devices):
  """Peak memory of a process that restores 600 MB, over the size of the state on its devices."""
  state = large_state(sharding.replicated(sharding.make_mesh(1)), 0.6)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, state, {}, {})
  checkpoints.close()
  size = sum(x.nbytes for x in state.values())
  script = textwrap.dedent(RESTORE).format(
    tests=str(ROOT / "tests" / "checkpoints"),
    devices=devices,
    shapes={name: x.shape for name, x in state.items()},
    folder=str(tmp_path / "checkpoints"),
  )
  flags = f"--xla_force_host_platform_device_count={devices}"
  done = subprocess.run(
    [sys.executable, "-c", script],
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  before, peak, after = map(int, done.stdout.split())
  print(
    f"{devices} devices, state of {size / 1e6:.0f} MB on each: {(peak - before) / 1e6:.0f} MB more "
    f"at the peak, {(after - before) / 1e6:.0f} MB at the end; "
    f"{(peak - before) / size / devices:.2f} times what has to be there"
  )
  assert peak - before <= 1.6 * size * devices
