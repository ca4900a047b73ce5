"""Clock, memory and peak rates of TPU generations, and the devices of a slice for compiling.

A slice is a group of TPU chips that train together; no TPU is needed for compiling. Numbers are per
jax device. A jax device is a core on v2, v3, v5e and v6e. It is a chip on v4 and v5p, whose two
cores work as one. Sources: [docs] cloud.google.com/tpu/docs, the page of each generation; [J20]
Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural networks"; [J23]
Jouppi et al. 2023, "TPU v4". The memory is the limit that libtpu 0.0.52 prints for a program that
does not fit. [units] marks a computed clock: the peak rate divided by the operations of all matrix
units in one cycle (two for each cell). This computation gives the published clocks of v2, v3 and v4.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from byolx.core.config import ConfigError

_GIB = 2**30
_QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v3-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_GOOGLE_VENDOR = "0x1ae0"


@dataclasses.dataclass(frozen=True)
class Generation:
  """A TPU generation, such as v3, with the rates and the memory of one jax device.

  Google names TPUs by accelerator types such as `v3-512`. A topology is a layout of chips, such as
  `16x16`.

  Args:
    name: name of the generation, such as v3.
    clock_hz: clock cycles per second of a core.
    flops: peak bfloat16 operations per second.
    memory_bytes: bytes of memory that a program may use.
    bandwidth: peak bytes per second between memory and core.
    devices_per_chip: number of jax's devices on a chip.
    axes: number of axes of a topology, 2 or 3.
    sizes: usual topology for each number after the dash in an accelerator type.
    prefix: text before the dash in accelerator types, such as `v5litepod`.
    counts: 2 if the number in an accelerator type counts cores, two per chip; 1 if it counts chips.
    options: further options of libtpu for the description of a topology.
  """

  name: str
  clock_hz: float
  flops: float
  memory_bytes: int
  bandwidth: float
  devices_per_chip: int
  axes: int
  sizes: dict[int, str]
  prefix: str
  counts: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_OLD = {8: "2x2", 32: "4x4", 64: "4x8", 128: "8x8", 256: "8x16", 512: "16x16"}
_CUBE = {
  8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
  1024: "8x8x8", 2048: "8x8x16", 4096: "8x16x16",
}  # fmt: skip

GENERATIONS = {
  generation.name: generation
  for generation in (
    # Clock and matrix units (one of 128 x 128 per core): [J20]. 16 GiB and 700 GB/s per chip: [J20].
    Generation("v2", 700e6, 22.9e12, int(7.48 * _GIB), 350e9, 2, 2, _OLD, "v2", 2),
    # Clock: [J20]. 123 TFLOP/s, 32 GiB and 900 GB/s per chip: [docs].
    Generation(
      "v3", 940e6, 61.5e12, int(15.48 * _GIB), 450e9, 2, 2,
      _OLD | {1024: "16x32", 2048: "32x32"}, "v3", 2,
    ),
    # Clock: [J23]. 275 TFLOP/s, 32 GiB and 1200 GB/s per chip: [docs].
    Generation(
      "v4", 1050e6, 275e12, int(30.75 * _GIB), 1200e9, 1, 3, _CUBE, "v4", 2,
      {"chip_config_name": "megacore"},
    ),
    # 197 TFLOP/s, 16 GB and 819 GB/s per chip: [docs]. Clock: [units], four units of 128 x 128.
    Generation("v5e", 1500e6, 197e12, int(15.75 * _GIB), 819e9, 1, 2, _FLAT, "v5litepod", 1),
    # 459 TFLOP/s, 95 GB and 2765 GB/s per chip: [docs]. Clock: [units], two cores with four units of
    # 128 x 128 each.
    Generation(
      "v5p", 1750e6, 459e12, int(95.73 * _GIB), 2765e9, 1, 3,
      _CUBE | {8192: "16x16x16", 12288: "16x16x24"}, "v5p", 2,
    ),
    # 918 TFLOP/s, 32 GB and 1640 GB/s per chip: [docs]. Clock: [units], four units of 256 x 256.
    # [docs] has two units, but libtpu estimates fewer cycles for a product than two units need.
    Generation("v6e", 1750e6, 918e12, int(31.24 * _GIB), 1640e9, 1, 2, _FLAT, "v6e", 1),
  )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
  """A TPU slice, a group of chips that train together.

  Args:
    name: name of the slice, such as v3:16x16.
    generation: generation of the chips.
    shape: number of chips along each axis, such as (16, 16).
  """

  name: str
  generation: Generation
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    """Number of chips of the slice."""
    return math.prod(self.shape)

  @property
  def cores(self) -> int:
    """Number of jax devices of the slice. A v4 or v5p chip is one device, with two cores."""
    return self.chips * self.generation.devices_per_chip

  @property
  def host_shape(self) -> tuple[int, int, int]:
    """Number of chips of one host along each of three axes, usually (2, 2, 1).

    A slice of one chip has one host. A slice of eight v5e or v6e chips has one host with all chips.
    """
    single = self.generation.axes == 2 and self.generation.devices_per_chip == 1
    if self.chips == 1 or (single and self.chips == 8):
      return (*self.shape, *(1,) * (3 - len(self.shape)))
    return (2, 2, 1)

  @property
  def hosts(self) -> int:
    """Number of hosts of the slice. A host is a machine to which some of the chips are attached."""
    return self.chips // math.prod(self.host_shape)


def topology(name: str) -> Topology:
  """Parses the name of a TPU slice and returns the slice.

  The name has a layout of chips, such as `v3:16x16`, or is an accelerator type, such as `v3-512`.

  Raises:
    ConfigError: the generation is unknown, or it has no slice of this size.
  """
  kind, mark, rest = name.partition(":")
  if not mark:
    return _by_accelerator_type(name)
  if kind not in GENERATIONS:
    raise ConfigError(
      f"--topology={name}: expected one of {', '.join(GENERATIONS)} before the colon, as in "
      "v3:16x16, v4:4x4x4, v6e:4x4, or a name such as v3-512"
    )
  generation = GENERATIONS[kind]
  shape = tuple(int(part) for part in rest.split("x") if part.isdecimal())
  if rest != "x".join(map(str, shape)) or len(shape) != generation.axes or 0 in shape:
    raise ConfigError(
      f"--topology={name}: expected {generation.axes} numbers of chips, as in "
      f"{kind}:{generation.sizes[16 if 16 in generation.sizes else 32]}"
    )
  parsed = Topology(name, generation, shape)
  bounds = parsed.host_shape[: generation.axes]
  if any(size % bound for size, bound in zip(shape, bounds, strict=True)):
    usual = ", ".join(f"{kind}:{size}" for size in generation.sizes.values())
    raise ConfigError(
      f"--topology={name}: expected multiples of a host's {'x'.join(map(str, bounds))} chips; "
      f"usual are {usual}"
    )
  return parsed


def _by_accelerator_type(name: str) -> Topology:
  match = re.fullmatch(r"(\w+)-(\d+)", name)
  for generation in GENERATIONS.values():
    if match and match[1] in (generation.prefix, generation.name):
      if size := generation.sizes.get(int(match[2])):
        return topology(f"{generation.name}:{size}")
      names = ", ".join(f"{generation.prefix}-{size}" for size in generation.sizes)
      raise ConfigError(
        f"--topology={name}: expected one of {names}, or chips as in "
        f"{generation.name}:{generation.sizes[32]}"
      )
  names = ", ".join(f"{generation.prefix}-32" for generation in GENERATIONS.values())
  raise ConfigError(
    f"--topology={name}: expected chips as in v3:16x16 or v4:4x4x4, or a name such as {names}"
  )


def devices(slice_: Topology) -> list[Any]:
  """Returns the jax devices of a TPU slice, for compiling programs. No program can run on them.

  Raises:
    ConfigError: libtpu is not installed, or it refuses the slice.
  """
  version()
  # No TPU is opened here, so several processes may load libtpu at the same time.
  for name, value in {**_QUIET, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
    os.environ.setdefault(name, value)
  try:
    described = topologies.get_topology_desc(
      platform="tpu",
      topology_name=slice_.name,
      chips_per_host_bounds=slice_.host_shape,
      **slice_.generation.options,
    )
  except Exception as error:  # errors of jax's own types, and RuntimeError for libtpu's
    reason = str(error).strip().partition("\n")[0]
    raise ConfigError(
      f"--topology={slice_.name}: libtpu {version()} refuses it: {reason}"
    ) from None
  return list(described.devices)


def version() -> str:
  """Returns the version of the installed libtpu, the TPU compiler.

  Raises:
    ConfigError: libtpu is not installed.
  """
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    raise ConfigError(
      "the TPU compiler, libtpu, is not installed; install it with: pip install 'byolx[plan]'"
    ) from None


def quieten() -> None:
  """Keeps libtpu, the TPU compiler, from searching for a TPU and logging errors if it finds none.

  The function must be called before jax looks for devices. It does nothing if libtpu is not
  installed or if the machine may have a TPU.
  """
  if importlib.util.find_spec("libtpu") and not _attached():
    for name, value in _QUIET.items():
      os.environ.setdefault(name, value)


def _attached() -> bool:
  """Returns whether the machine has a PCI device of Google, such as a TPU.

  The result True does not prove a TPU, because Google Cloud machines have network cards of Google.
  """
  vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
  return any(path.read_text().strip() == _GOOGLE_VENDOR for path in vendors)
