"""Sharding: the mesh of devices, and how all arrays of the library are placed on it.

The devices of the mesh are ordered by process, with equally many of each process. Each process
loads consecutive rows of the batch, and its own devices hold them. So a global batch has the same
rows in the same order for any number of processes.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from byolx.core import distributed
from byolx.core.fields import at_least, field, one_of
from byolx.core.machine import usable_cores

DATA, FSDP = "data", "fsdp"
LEAST_TO_CUT = 2**16
"""Least number of elements of an array that is sharded over the `fsdp` axis. Smaller arrays are
replicated: their exchange costs more than it saves, and a sharded stem kernel makes the TPU
compiler choose a slow layout (docs/plan.md)."""
MOST_PIECES = 64
"""Largest default number of devices over which a state is sharded. With more, each device's part of
most kernels would be smaller than a tile of a TPU's memory, 8 x 128."""

LEAST_IMAGES_PER_CORE = 16
"""Least number of images of a forward pass for each of the jax devices into which a CPU is split."""


def find_devices(config: ConfigDict) -> list[jax.Device]:
  """Splits a CPU into several jax devices as the config requires, and returns all jax devices."""
  images = config.train.micro_batch or config.train.batch_size
  split_cpu(images // distributed.count(), config.mesh.cpu_devices)
  return jax.devices()


def split_cpu(images: int, devices: int = 0) -> None:
  """Splits a CPU into several jax devices; has no effect once jax has initialised its devices.

  With small convolutions, several devices that each compute a part of the batch are faster than one
  device with several threads per operation. Does nothing if `XLA_FLAGS` sets the number of devices.

  Args:
    images: number of images of one forward pass in this process.
    devices: number of devices; 0 to choose it. The choice is the largest divisor of `images` that is
      at most the number of cores and leaves at least LEAST_IMAGES_PER_CORE images per device. If
      there is no such divisor, it is 1.
  """
  most = min(usable_cores(), images // LEAST_IMAGES_PER_CORE)
  count = devices or next(n for n in range(max(1, most), 0, -1) if images % n == 0)
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(count: int = 0, fsdp: int = 1, devices: Sequence[Any] = ()) -> Mesh:
  """Makes the mesh of devices, with the axes `data` and `fsdp`.

  A batch is sharded over both axes, a train state over `fsdp` (fully sharded data parallelism)
  only. The axes have jax's type Auto, because with the default type, Explicit, gathers over the
  batch axis raise an error.

  Args:
    count: number of devices, equally many of each process; 0 for all.
    fsdp: number of neighbouring devices over which a state is sharded; must divide the number of
      devices.
    devices: devices to choose from, or descriptions of devices that this machine does not have;
      empty for all attached devices.

  Raises:
    ValueError: there are fewer than `count` devices, they are not equally many of each process, or
      their number cannot be divided by `fsdp`.
  """
  devices = list(devices) or jax.devices()
  chosen = choose_devices(devices, count)
  check_rows([device.process_index for device in chosen])
  if len(chosen) % fsdp:
    raise ValueError(f"mesh.fsdp={fsdp}: expected a divisor of the mesh's {len(chosen)} devices")
  # Not jax.make_mesh: on a TPU pod it may mix the processes' devices.
  return Mesh(np.array(chosen).reshape(-1, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def default_fsdp(devices: int) -> int:
  """Returns the largest divisor of the number of devices that is at most MOST_PIECES.

  This is the default of the config field `mesh.fsdp`.
  """
  return max(n for n in range(1, MOST_PIECES + 1) if devices % n == 0)


def choose_devices(devices: Sequence[Any], count: int) -> list[Any]:
  """Returns some of the given devices, equally many of each process, ordered by process.

  Args:
    devices: devices to choose from.
    count: number of devices to choose; 0 for all.

  Raises:
    ValueError: there are fewer than `count` devices, or the processes cannot give equally many.
  """
  if count > len(devices):
    raise ValueError(f"mesh.data={count}: expected at most the {len(devices)} devices there are")
  processes = sorted({device.process_index for device in devices})
  groups = [[d for d in devices if d.process_index == index] for index in processes]
  per_process, rest = divmod(count or len(devices), len(processes))
  if rest or any(len(group) < per_process for group in groups):
    numbers = ", ".join(str(len(group)) for group in groups)
    raise ValueError(
      f"mesh.data={count}: expected the same number of devices of each of the {len(processes)} "
      f"processes, which have {numbers}"
    )
  return [device for group in groups for device in group[:per_process]]


def check_rows(processes: Sequence[int]) -> None:
  """Checks that the devices of a mesh are ordered by process, so that rows of a batch keep their order.

  Args:
    processes: index of the process of each device, in the order of the mesh.

  Raises:
    ValueError: the order is not 0 0 ... 1 1 ..., with equally many devices of each process.
  """
  count = max(processes) + 1
  per_process = len(processes) // count
  if list(processes) != [index for index in range(count) for _ in range(per_process)]:
    raise ValueError(
      f"the mesh has devices of the processes {', '.join(map(str, processes))} in this order; "
      "expected those of process 0 first, then as many of process 1, and so on"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds as a whole."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first axis is divided over all devices."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def in_pieces(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """Returns the sharding that divides an array's largest divisible axis over the mesh axis `fsdp`.

  An axis is divisible if its size is a multiple of the number of devices along `fsdp`. Arrays
  without such an axis, and arrays with fewer than LEAST_TO_CUT elements, are replicated.

  Args:
    mesh: mesh with the axes `data` and `fsdp`.
    shape: shape of the array.
  """
  count = mesh.shape[FSDP]
  divisible = [size if size % count == 0 else 0 for size in shape]
  if count == 1 or math.prod(shape) < LEAST_TO_CUT or not any(divisible):
    return replicated(mesh)
  axis = divisible.index(max(divisible))
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, FSDP))


STATES = ("replicated", "zero", "full")
"""Placements of the train state, ordered by their memory per device, the largest first."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """The config group `mesh`: number of devices, and placement of the train state on them."""

  state: str = field(
    "replicated",
    "placement of the state: replicated, whole on every device; zero, with optimiser state, target and "
    "gradients sharded over mesh.fsdp devices; full, with parameters sharded too",
    one_of(*STATES),
    free=True,
  )
  data: int = field(
    0, "number of devices over which a batch is sharded; 0: all", at_least(0), free=True
  )
  fsdp: int = field(
    0,
    "number of devices over which the state is sharded, a divisor of mesh.data; 0: the largest divisor "
    "up to 64",
    at_least(0),
    free=True,
  )
  cpu_devices: int = field(
    0,
    "number of devices into which a CPU is split; 0: by the numbers of cores and of images",
    at_least(0),
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """Placement of a training state on a mesh of devices.

  Args:
    mesh: mesh with the axes `data` and `fsdp`.
    state: name of the placement. "replicated": every device holds the whole state. "zero": every
      device holds all parameters, but optimiser state, target network and gradients are sharded
      over `fsdp` (as in ZeRO, stage 2, arXiv:1910.02054). "full": parameters are sharded too, and
      gathered in the compute type where they are used.
  """

  mesh: Mesh
  state: str = "replicated"

  def of_params(self, tree: Any) -> Any:
    """Returns the shardings of the trained parameters, as a tree like the given one.

    Args:
      tree: trained parameters, as arrays or shapes.
    """
    return self._of(tree, self.state == "full")

  def of_rest(self, tree: Any) -> Any:
    """Returns the shardings of all arrays other than trained parameters, as a tree like the given one.

    Args:
      tree: arrays or shapes of target network, statistics, optimiser state or gradients.
    """
    return self._of(tree, self.state != "replicated")

  def _of(self, tree: Any, sharded: bool) -> Any:
    whole = replicated(self.mesh)
    return jax.tree.map(lambda x: in_pieces(self.mesh, x.shape) if sharded else whole, tree)


def lay_out(spec: MeshSpec, devices: Sequence[Any]) -> Layout:
  """Makes the mesh of devices that a config requires, and the placement of the train state on it.

  Args:
    spec: config group `mesh`.
    devices: all devices of the run, or descriptions of devices that this machine does not have.

  Raises:
    ValueError: the devices cannot be divided as the config requires.
  """
  if spec.state == "replicated" and spec.fsdp > 1:
    raise ValueError(
      f"mesh.fsdp={spec.fsdp} with mesh.state=replicated: a replicated state is not sharded; "
      "expected mesh.state=zero or full"
    )
  fsdp = spec.fsdp or (1 if spec.state == "replicated" else default_fsdp(spec.data or len(devices)))
  return Layout(make_mesh(spec.data, fsdp, devices), spec.state)


def held_bytes(tree: Any) -> int:
  """Returns the number of bytes that each device holds of a tree of arrays.

  Args:
    tree: arrays, or shapes with shardings.
  """
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


_in_use: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def using(layout: Layout) -> Iterator[None]:
  """Context manager that sets the placement of the train state on the devices.

  Inside of it, `gathered` gathers sharded weights, and `summed` shards their gradients, as that
  placement requires.

  Args:
    layout: placement of the train state on a mesh.
  """
  token = _in_use.set(layout)
  try:
    yield
  finally:
    _in_use.reset(token)


def gathered(x: Any) -> Any:
  """Gathers an array that may be sharded, so that every device holds the whole array.

  The array is gathered only inside of the context `using(layout)`. Outside of it, or if the train
  state is replicated, the array is returned unchanged.
  """
  layout = _in_use.get()
  if layout is None or layout.state == "replicated":
    return x
  return jax.lax.with_sharding_constraint(x, replicated(layout.mesh))


def summed(gradient: Callable[..., Any], shape: Sequence[int], *rows: Any) -> Any:
  """Computes the gradient of a weight, summed over all examples.

  The gradient is sharded as by `in_pieces` if the layout set by `using` shards gradients. Each device
  then computes the gradient of its own rows. One reduce-scatter over `fsdp` sums these gradients and
  leaves a part of the sum on each device. XLA's own partitioner would sum whole gradients on every
  device, and then select each device's part.

  Args:
    gradient: function that takes rows of examples and returns the gradient, summed over these rows.
    shape: shape of the gradient.
    *rows: arguments of `gradient`, arrays whose first axis is sharded by example.
  """
  layout = _in_use.get()
  if layout is None or layout.state == "replicated":
    return gradient(*rows)
  mesh, sharding = layout.mesh, in_pieces(layout.mesh, shape)
  if FSDP not in sharding.spec:
    return gradient(*rows)
  axis = sharding.spec.index(FSDP)

  def sum_and_scatter(*rows: Any) -> Any:
    total = jax.lax.psum_scatter(gradient(*rows), FSDP, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(total, DATA) if mesh.shape[DATA] > 1 else total

  by_row = by_example(mesh).spec
  return jax.shard_map(
    sum_and_scatter,
    mesh=mesh,
    in_specs=(by_row,) * len(rows),
    out_specs=sharding.spec,
    check_vma=False,
  )(*rows)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Any:
  """Makes global arrays, sharded by example, of the rows that each process has loaded.

  Every process puts its rows of the batch on its own devices.

  Args:
    batch: arrays with the rows of this process, by name.
    mesh: mesh of the run.

  Returns:
    Global arrays, which have the rows of all processes, by name.

  Raises:
    ValueError: the devices of the mesh are not ordered by process, so that rows would change their
      order.
  """
  _check_mesh(mesh)
  sharding = by_example(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def prefetch(batches: Iterator[Any], mesh: Mesh, ahead: int = 2) -> Iterator[Any]:
  """Yields batches as arrays on the devices, and sends later batches to the devices in advance.

  Args:
    batches: batches with the rows of this process.
    mesh: mesh of the run.
    ahead: number of batches that are sent in advance.
  """
  sent: collections.deque[Any] = collections.deque()
  for batch in batches:
    sent.append(put_batch(batch, mesh))
    if len(sent) > ahead:
      yield sent.popleft()
  yield from sent


@functools.lru_cache
def _check_mesh(mesh: Mesh) -> None:
  check_rows([device.process_index for device in mesh.devices.ravel()])
