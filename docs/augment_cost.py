"""Cost of BYOL's colour changes inside the train step, on a TPU without the TPU, and on the CPU.

  pip install ".[tpu]"
  python docs/augment_cost.py --topology=v3:2x2

The TPU's compiler compiles two programs ahead of time, with `on_device.apply_device` and without it:
from uint8 crops of both views to the output of ResNet's first convolution in bfloat16. "Scheduled" is
the sum of the compiler's estimated cycles for the program's instructions, "roofline" its optimistic
bound; neither has run on a chip. The difference of the two programs is the cost for both views.
"""

import argparse
import importlib.util
import os
import re
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}
os.environ |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from byolx.data.augment.distribution import Draws, ViewSpec, draw
from byolx.data.augment.on_device import apply_device, normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEGAHERTZ = {"v2": 700, "v3": 940}
IMAGES_PER_CORE, SIZE = 8, 224


def batch(n: int) -> tuple[np.ndarray, Draws]:
  """Returns n views of noise, and random numbers of T of Table 6 for each."""
  rng = np.random.default_rng(0)
  views = rng.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)
  return views, Draws(*map(np.stack, zip(*(draw(ViewSpec(), rng, 375, 500) for _ in range(n)))))


def stem(views, draws, kernel, augmented: bool):
  """Computes the first convolution's output from the crops of both views, as `Pretrain` does."""
  if augmented:
    views = [apply_device(view, one, "additive") for view, one in zip(views, draws, strict=True)]
  else:
    views = [view.astype(jnp.float32) / 255 for view in views]
  x = jnp.stack(views, axis=1).reshape(-1, SIZE, SIZE, 3)
  x = normalise(x, MEAN, STD).astype(jnp.bfloat16)
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (2, 2), [(3, 3)] * 2, dimension_numbers=layout)


def compile_ahead(devices, augmented: bool) -> jax.stages.Compiled:
  """Compiles the program for these devices, with `IMAGES_PER_CORE` images on each."""
  mesh = Mesh(np.array(devices).ravel(), ("data",))
  spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))

  def shape_of(x):
    rows = x.shape[0] * mesh.size
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=spread)

  views, draws = jax.tree.map(shape_of, batch(IMAGES_PER_CORE))
  kernel = jax.ShapeDtypeStruct((7, 7, 3, 64), jnp.bfloat16, sharding=whole)
  program = jax.jit(stem, static_argnames="augmented")
  return program.lower([views] * 2, [draws] * 2, kernel, augmented=augmented).compile()


def milliseconds(compiled: jax.stages.Compiled, megahertz: float) -> np.ndarray:
  """Returns scheduled and roofline time of a compiled program, in milliseconds."""
  entry = compiled.as_text().split("\nENTRY ")[1].split("\n}")[0]
  if " while(" in entry:
    raise ValueError("the program has a loop; its body would have to be counted once per turn")
  cycles = sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', entry))
  return np.array([cycles / megahertz / 1e3, compiled.cost_analysis()["optimal_seconds"] * 1e3])


def cpu_milliseconds(n: int = 16, repeats: int = 7) -> float:
  """Measures the time of this machine's CPU for one view, in milliseconds; the fastest repeat."""
  views, draws = batch(n)
  apply = jax.jit(lambda views, draws: apply_device(views, draws, "additive"))
  times = []
  for _ in range(1 + repeats):
    start = time.perf_counter()
    apply(views, draws).block_until_ready()
    times.append(time.perf_counter() - start)
  return min(times[1:]) / n * 1e3


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--topology", default="v3:2x2", help="v3:16x16 is the paper's 512 cores")
  name = parser.parse_args().topology
  kind = name.split(":")[0]
  if kind not in MEGAHERTZ:
    parser.error(f"--topology={name}: its clock is not known; expected {' or '.join(MEGAHERTZ)}")
  if importlib.util.find_spec("libtpu") is None:
    parser.error('the TPU\'s compiler is missing: pip install ".[tpu]"')
  devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  print(f"{name}: {len(devices)} cores, {IMAGES_PER_CORE} images each, two views of {SIZE} pixels")
  with_body, without = (
    milliseconds(compile_ahead(devices, augmented), MEGAHERTZ[kind]) for augmented in (True, False)
  )
  print(f"{'':24}{'scheduled ms':>14}{'roofline ms':>14}")
  rows = {"with the colour work": with_body, "without": without, "difference": with_body - without}
  for title, (scheduled, roofline) in rows.items():
    print(f"{title:24}{scheduled:14.2f}{roofline:14.2f}")
  print(f"this machine's CPU, {os.cpu_count()} cores: {cpu_milliseconds():.1f} ms per view")


if __name__ == "__main__":
  main()
