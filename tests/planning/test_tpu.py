"""Facts of TPUs, against each other and against the compiler; names of slices."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from byolx.core.config import ConfigError
from byolx.planning import tpu

ROOT = Path(__file__).parents[2]

# Matrix units of a device, and cells of one.
UNITS = {
  "v2": (1, 128), "v3": (2, 128), "v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256)
}  # fmt: skip


@pytest.mark.parametrize("name", tpu.GENERATIONS)
def test_the_clock_and_the_matrix_units_give_the_peak(name):
  generation = tpu.GENERATIONS[name]
  units, side = UNITS[name]
  assert 2 * units * side**2 * generation.clock_hz == pytest.approx(generation.flops, rel=0.005)


@pytest.mark.parametrize("name", tpu.GENERATIONS)
def test_names_and_topologies_agree(name):
  generation = tpu.GENERATIONS[name]
  for number, size in generation.sizes.items():
    found = tpu.topology(f"{generation.prefix}-{number}")
    assert found == tpu.topology(f"{name}:{size}")
    assert found.chips * generation.counts == number


@pytest.mark.parametrize(
  ("name", "cores", "hosts"),
  [
    ("v2:4x4", 32, 4),
    ("v3-512", 512, 64),
    ("v4-16", 8, 2),
    ("v4:4x4x4", 64, 16),
    ("v5litepod-8", 8, 1),
    ("v5e-16", 16, 4),
    ("v5p-16", 8, 2),
    ("v6e:2x4", 8, 1),
    ("v6e-1", 1, 1),
  ],
)
def test_devices_are_those_of_the_slice(name, cores, hosts):
  found = tpu.topology(name)
  devices = tpu.devices(found)
  assert len(devices) == found.cores == cores
  assert len({device.process_index for device in devices}) == found.hosts == hosts
  assert {device.platform for device in devices} == {"tpu"}


@pytest.mark.parametrize(
  "name", ["v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
)
def test_memory_is_what_the_compiler_allows(name):
  found = tpu.topology(name)
  place = SingleDeviceSharding(tpu.devices(found)[0])
  huge = jax.ShapeDtypeStruct((2**16, 2**20), jnp.bfloat16, sharding=place)
  lowered = jax.jit(lambda x: x + 1).trace(huge).lower(lowering_platforms=("tpu",))
  with pytest.raises(jax.errors.JaxRuntimeError) as raised:
    lowered.compile()
  said = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(raised.value))
  assert found.generation.memory_bytes == pytest.approx(float(said[1]) * 2**30, rel=1e-6)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("v3", "expected chips as in v3:16x16 or v4:4x4x4, or a name such as v2-32, v3-32"),
    ("v9:2x2", "expected one of v2, v3, v4, v5e, v5p, v6e before the colon"),
    ("v3:2x2x2", "expected 2 numbers of chips, as in v3:4x4"),
    ("v4:4x4", "expected 3 numbers of chips, as in v4:2x2x2"),
    ("v3:0x2", "expected 2 numbers of chips"),
    ("v3:2xtwo", "expected 2 numbers of chips"),
    ("v5e:2x2x", "expected 2 numbers of chips"),
    ("v3:3x3", "expected multiples of a host's 2x2 chips; usual are v3:2x2, v3:4x4"),
    ("v3-9", "expected one of v3-8, v3-32, v3-64"),
    ("tpu-8", "or a name such as v2-32"),
    ("", "expected chips as in"),
  ],
)
def test_slices_that_are_none(name, said):
  with pytest.raises(ConfigError) as raised:
    tpu.topology(name)
  assert str(raised.value).startswith(f"--topology={name}: ")
  assert said in str(raised.value)


def test_a_slice_that_libtpu_does_not_know(monkeypatch):
  """What it says becomes one line, after the slice's name."""
  odd = tpu.topology("v4:2x2x1")
  monkeypatch.setitem(odd.generation.options, "chip_config_name", "no_such_config")
  with pytest.raises(
    ConfigError, match=r"^--topology=v4:2x2x1: libtpu [\d.]+ refuses it: .*no_such"
  ) as it:
    tpu.devices(odd)
  assert "\n" not in str(it.value)


def test_without_the_compiler(monkeypatch):
  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", missing)
  with pytest.raises(ConfigError, match=r"pip install 'byolx\[plan\]'"):
    tpu.devices(tpu.topology("v3:2x2"))


def test_an_installed_compiler_is_quiet_where_there_is_no_tpu():
  """jax falls back to the CPU at once, and libtpu's warnings stay away."""
  code = (
    "from byolx.planning import tpu; tpu.quieten(); import jax; print(jax.devices()[0].platform)"
  )
  kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=kept, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "cpu\n"
