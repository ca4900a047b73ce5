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
  processes = jax.process_count()
  of_process = [[] for _ in range(processes)]
  for device in jax.devices():
    of_process[device.process_index].append(device)
  total = len(jax.devices())
  if data > total:
    raise ValueError(f"mesh.data={data}: expected at most the {total} devices there are")
  each, left = divmod(data or total, processes)
  if left or any(len(devices) < each for devices in of_process):
    numbers = ", ".join(str(len(devices)) for devices in of_process)
    raise ValueError(
      f"mesh.data={data}: expected the same number of devices of each of the {processes} processes,"
      f" which have {numbers}"
    )
  chosen = [device for devices in of_process for device in devices[:each]]
  # Not jax.make_mesh: on a TPU pod it may mix the processes' devices.
  mesh = Mesh(np.array(chosen), (DATA,), axis_types=(AxisType.Auto,))
  check_rows([device.process_index for device in chosen])
  return mesh


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
