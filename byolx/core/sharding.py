"""The mesh, and every NamedSharding of the library.

With several processes the devices of the mesh are ordered by process, the same number of each: so
the rows of a batch that a process makes, one contiguous block, are those that its devices hold, and
a global batch has the same rows in the same order whatever the number of processes.
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
"""Elements: below it an array is not worth its own exchange. ResNet-50 has 2 % of its parameters in
such; and a stem kernel in pieces made the compiler choose a layout that cost 21 ms of a v3 step."""
MOST_PIECES = 64
"""Devices that share one state where `mesh.fsdp` leaves it open: more would make the pieces of most
kernels smaller than a tile of a TPU's memory, 8 x 128."""

LEAST_IMAGES_PER_CORE = 16


def find_devices(config: ConfigDict) -> list[jax.Device]:
  """All devices; a CPU is as many as the config says or its batches are worth."""
  of_pass = config.train.micro_batch or config.train.batch_size
  split_cpu(of_pass // distributed.count(), config.mesh.cpu_devices)
  return jax.devices()


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


def make_mesh(count: int = 0, fsdp: int = 1, devices: Sequence[Any] = ()) -> Mesh:
  """One mesh with the axes `data` and `fsdp`: a batch is spread over both, a state over `fsdp`.

  Axes are Auto: with the default, Explicit, gathers over the batch axis raise.

  Args:
    count: of devices, the first ones of each process; 0 takes all.
    fsdp: of them, those that share one state, see `in_pieces`; neighbours.
    devices: attached or not; default: all that are attached.

  Raises:
    ValueError: more devices wanted than there are, or they cannot be cut evenly.
  """
  devices = list(devices) or jax.devices()
  chosen = choose_devices(devices, count)
  check_rows([device.process_index for device in chosen])
  if len(chosen) % fsdp:
    raise ValueError(f"mesh.fsdp={fsdp}: expected a divisor of the mesh's {len(chosen)} devices")
  # Not jax.make_mesh: on a TPU pod it may mix the processes' devices.
  return Mesh(np.array(chosen).reshape(-1, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def default_fsdp(devices: int) -> int:
  """The largest divisor of a number of devices, at most MOST_PIECES."""
  return max(n for n in range(1, MOST_PIECES + 1) if devices % n == 0)


def choose_devices(devices: Sequence[Any], count: int) -> list[Any]:
  """The first `count` devices (0: all), in equal shares of the processes, ordered by process.

  Raises:
    ValueError: there are not as many.
  """
  if count > len(devices):
    raise ValueError(f"mesh.data={count}: expected at most the {len(devices)} devices there are")
  processes = sorted({device.process_index for device in devices})
  groups = [[d for d in devices if d.process_index == index] for index in processes]
  each, left = divmod(count or len(devices), len(processes))
  if left or any(len(group) < each for group in groups):
    numbers = ", ".join(str(len(group)) for group in groups)
    raise ValueError(
      f"mesh.data={count}: expected the same number of devices of each of the {len(processes)} "
      f"processes, which have {numbers}"
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
  """The first axis spread over all devices."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def in_pieces(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """An array spread over `fsdp` along the axis where the pieces are largest.

  Small arrays stay whole, and so do those none of whose axes can be divided.
  """
  count = mesh.shape[FSDP]
  divisible = [size if size % count == 0 else 0 for size in shape]
  if count == 1 or math.prod(shape) < LEAST_TO_CUT or not any(divisible):
    return replicated(mesh)
  axis = divisible.index(max(divisible))
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, FSDP))


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """The config group `mesh`."""

  state: str = field(
    "replicated",
    "where the state lives: whole on every device; zero: optimiser, target and gradients in pieces "
    "over mesh.fsdp devices; full: parameters too",
    one_of("replicated", "zero", "full"),
    free=True,
  )
  data: int = field(
    0, "devices over which a batch is spread; 0: all there are", at_least(0), free=True
  )
  fsdp: int = field(
    0,
    "of them, those that share one state in pieces; 0: as many as divide them, at most 64",
    at_least(0),
    free=True,
  )
  cpu_devices: int = field(
    0,
    "devices that a CPU is split into; 0: as many as cores and batch allow",
    at_least(0),
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where a training state lives on a mesh.

  Args:
    mesh: with the axes `data` and `fsdp`.
    state: "replicated": all of it on every device. "zero": parameters on every device; the
      optimiser's state, the target network and gradients in pieces over `fsdp` (as ZeRO, stage 2,
      arXiv:1910.02054). "full": parameters in pieces too, gathered in the compute type for their use.
  """

  mesh: Mesh
  state: str = "replicated"

  def of_params(self, tree: Any) -> Any:
    """Shardings of what is trained, a tree of NamedSharding like the tree of arrays or shapes."""
    return self._of(tree, self.state == "full")

  def of_rest(self, tree: Any) -> Any:
    """Shardings of the target, statistics, the optimiser's state and gradients."""
    return self._of(tree, self.state != "replicated")

  def _of(self, tree: Any, pieces: bool) -> Any:
    whole = replicated(self.mesh)
    return jax.tree.map(lambda x: in_pieces(self.mesh, x.shape) if pieces else whole, tree)


def lay_out(wanted: MeshSpec, devices: Sequence[Any]) -> Layout:
  """The mesh that a config describes, and where the state lives on it.

  Raises:
    ValueError: the devices cannot be cut so.
  """
  if wanted.state == "replicated" and wanted.fsdp > 1:
    raise ValueError(
      f"mesh.fsdp={wanted.fsdp} with mesh.state=replicated: there is nothing to keep in pieces; "
      "expected mesh.state=zero or full"
    )
  fsdp = wanted.fsdp or (
    1 if wanted.state == "replicated" else default_fsdp(wanted.data or len(devices))
  )
  return Layout(make_mesh(wanted.data, fsdp, devices), wanted.state)


def held_bytes(tree: Any) -> int:
  """What each device holds of arrays, or of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


_in_use: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def using(layout: Layout) -> Iterator[None]:
  """Inside, `gathered` and `summed` know where arrays live."""
  token = _in_use.set(layout)
  try:
    yield
  finally:
    _in_use.reset(token)


def gathered(x: Any) -> Any:
  """An array that may be kept in pieces, whole on every device; see `using`."""
  layout = _in_use.get()
  if layout is None or layout.state == "replicated":
    return x
  return jax.lax.with_sharding_constraint(x, replicated(layout.mesh))


def summed(gradient: Callable[..., Any], shape: Sequence[int], *rows: Any) -> Any:
  """The gradient of a weight, summed over all examples, in pieces where weights' gradients are.

  Left to itself, XLA's partitioner sums whole gradients on every device and then cuts them. Here each
  device computes the gradient of its rows, and one reduce-scatter over `fsdp` sums and cuts.

  Args:
    gradient: of rows of examples, a sum over them.
    shape: of the gradient.
    rows: arrays whose first axis is examples, spread by example.
  """
  layout = _in_use.get()
  if layout is None or layout.state == "replicated":
    return gradient(*rows)
  mesh, place = layout.mesh, in_pieces(layout.mesh, shape)
  if FSDP not in place.spec:
    return gradient(*rows)
  axis = place.spec.index(FSDP)

  def of_device(*rows: Any) -> Any:
    total = jax.lax.psum_scatter(gradient(*rows), FSDP, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(total, DATA) if mesh.shape[DATA] > 1 else total

  spread = by_example(mesh).spec
  return jax.shard_map(
    of_device, mesh=mesh, in_specs=(spread,) * len(rows), out_specs=place.spec, check_vma=False
  )(*rows)


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
