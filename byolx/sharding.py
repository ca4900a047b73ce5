"""The mesh, and every NamedSharding of the library."""

import collections
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from byolx.machine import usable_cores

DATA = "data"
LEAST_IMAGES_PER_CORE = 16


def split_cpu(images: int, wanted: int = 0) -> None:
  """Lets a CPU be several devices, before jax first looks for devices; afterwards it does nothing.

  Small convolutions use a second core better as a second device, each with half of the batch, than
  inside one operation. An `XLA_FLAGS` that sets the number of host devices wins.

  Args:
    images: of one forward pass; the number of devices divides it.
    wanted: number of devices; 0 takes the most that the cores allow, with at least
      LEAST_IMAGES_PER_CORE images each.
  """
  most = min(usable_cores(), images // LEAST_IMAGES_PER_CORE)
  count = wanted or next(n for n in range(max(1, most), 0, -1) if images % n == 0)
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(data: int = 0) -> Mesh:
  """One mesh with the axis `data` over the first `data` devices; 0 takes all.

  Axes are Auto: with the default, Explicit, gathers over the batch axis raise.

  Raises:
    ValueError: more devices wanted than there are.
  """
  devices = jax.devices()
  if data > len(devices):
    raise ValueError(f"mesh.data={data}: expected at most the {len(devices)} devices there are")
  count = data or len(devices)
  return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """The first axis spread over `data`."""
  return NamedSharding(mesh, PartitionSpec(DATA))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Any:
  """Puts each process's rows of a batch on its devices, as global arrays spread by example."""
  sharding = by_example(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def prefetch(batches: Iterator[Any], mesh: Mesh, ahead: int = 2) -> Iterator[Any]:
  """Batches on the mesh, `ahead` of them sent before they are asked for."""
  sent: collections.deque[Any] = collections.deque()
  for batch in batches:
    sent.append(put_batch(batch, mesh))
    if len(sent) > ahead:
      yield sent.popleft()
  yield from sent
