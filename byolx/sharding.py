"""The mesh, and every NamedSharding of the library.

With several processes the devices of the mesh are ordered by process, the same number of each: so
the rows of a batch that a process makes, one contiguous block, are those that its devices hold, and
a global batch has the same rows in the same order whatever the number of processes.
"""

import collections
import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from byolx.machine import usable_cores

DATA = "data"
LEAST_IMAGES_PER_CORE = 16


def split_cpu(images: int, wanted: int = 0) -> None:
  """Lets a CPU be several devices, before jax first looks for devices; afterwards it does nothing.

  Small convolutions use a second core better as a second device, each with half of the batch, than
  inside one operation. An `XLA_FLAGS` that sets the number of host devices wins.

  Args:
    images: of one forward pass in this process; the number of devices divides it.
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
  """One mesh with the axis `data` over `data` devices, the first ones of each process; 0 takes all.

  Axes are Auto: with the default, Explicit, gathers over the batch axis raise.

  Raises:
    ValueError: more devices wanted than there are, or not the same number in every process.
  """
  chosen = choose_devices(jax.devices(), jax.process_count(), data)
  check_rows([device.process_index for device in chosen])
  # Not jax.make_mesh: on a TPU pod it may mix the processes' devices.
  return Mesh(np.array(chosen), (DATA,), axis_types=(AxisType.Auto,))


def choose_devices(devices: Sequence[Any], processes: int, data: int) -> list[Any]:
  """The first `data` devices (0: all), in equal shares of the processes, ordered by process.

  Raises:
    ValueError: there are not as many.
  """
  if data > len(devices):
    raise ValueError(f"mesh.data={data}: expected at most the {len(devices)} devices there are")
  groups = [[d for d in devices if d.process_index == index] for index in range(processes)]
  each, left = divmod(data or len(devices), processes)
  if left or any(len(group) < each for group in groups):
    numbers = ", ".join(str(len(group)) for group in groups)
    raise ValueError(
      f"mesh.data={data}: expected the same number of devices of each of the {processes} processes,"
      f" which have {numbers}"
    )
  return [device for group in groups for device in group[:each]]


def check_rows(processes: Sequence[int]) -> None:
  """Refuses an order of devices, given by their processes, in which rows would change places.

  Raises:
    ValueError: it is not 0 0 ... 1 1 ... with the same number of each.
  """
  count = max(processes) + 1
  each = len(processes) // count
  if list(processes) != [index for index in range(count) for _ in range(each)]:
    raise ValueError(
      f"the mesh has devices of the processes {', '.join(map(str, processes))} in this order; "
      "expected those of process 0 first, then as many of process 1, and so on"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """The first axis spread over `data`."""
  return NamedSharding(mesh, PartitionSpec(DATA))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Any:
  """Puts each process's block of rows on its devices, as global arrays spread by example.

  Raises:
    ValueError: the order of the mesh's devices would give the rows another order.
  """
  _check_mesh(mesh)
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


@functools.lru_cache
def _check_mesh(mesh: Mesh) -> None:
  check_rows([device.process_index for device in mesh.devices.ravel()])
