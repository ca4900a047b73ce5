"""What the compiler says of small programs for TPUs that are not there, and how that is remembered."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from byolx.core.config import ConfigError
from byolx.planning import ahead_of_time, tpu

V3 = tpu.topology("v3:2x2")


def lower(function, *shapes, topology=V3, dtype=jnp.float32):
  place = SingleDeviceSharding(tpu.devices(topology)[0])
  arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
  return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))


def product(a, b):
  return jnp.tanh(a @ b)


@pytest.fixture
def counted(monkeypatch):
  """Programs compiled in this test."""
  times, compile_with_progress = [], ahead_of_time.compile_with_progress

  def counts(lowered, name, size):
    times.append(name)
    return compile_with_progress(lowered, name, size)

  monkeypatch.setattr(ahead_of_time, "compile_with_progress", counts)
  return times


def test_a_product():
  """Multiplications, memory and time against arithmetic."""
  side = 2048
  found = ahead_of_time.figures(
    lower(product, (side, side), (side, side), dtype=jnp.bfloat16), V3, None
  )
  size = 2 * side**2
  assert found.fits
  assert found.flops == pytest.approx(2 * side**3, rel=0.01)
  assert found.argument_bytes == 2 * size
  assert 3 * size <= found.peak_bytes < 3.2 * size
  assert found.bytes_accessed == pytest.approx(3 * size, rel=0.05)
  # Two matrix units of 128 x 128 can do no better.
  assert side**3 / (2 * 128**2) <= found.cycles < 1.5 * side**3 / (2 * 128**2)
  assert found.roofline_seconds >= 2 * side**3 / 61.5e12
  assert (found.jax, found.libtpu) == (jax.__version__, tpu.version())
  assert found.collectives == {}


def test_too_large():
  """The compiler's message for this very version is understood."""
  found = ahead_of_time.figures(lower(lambda x: x + 1, (2**20, 2**14)), V3, None)
  assert not found.fits
  assert found.peak_bytes == 2 * 2**36
  assert found.cycles is None


def test_other_messages_of_a_program_that_is_too_large(monkeypatch):
  said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.11G of 15.48G hbm."

  def fails(*_):
    raise jax.errors.JaxRuntimeError(said)

  monkeypatch.setattr(ahead_of_time, "compile_with_progress", fails)
  found = ahead_of_time.figures(lower(product, (8, 8), (8, 8)), V3, None)
  assert (found.fits, found.peak_bytes) == (False, round(20.11 * 2**30))


def test_what_the_compiler_cannot_do():
  """One line of it."""

  def odd(x):
    return jnp.sum(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3, 3), (1, 1), "SAME") ** 2)

  lowered = lower(jax.grad(odd), (512, 512))
  with pytest.raises(
    ConfigError, match=r"^--topology=v3:2x2: the compiler refuses this step: UNIMPL"
  ):
    ahead_of_time.figures(lowered, V3, None)


def test_a_roofline_below_nothing():
  """A loop whose instructions the compiler rates -1 second: then it is work over peak."""
  topology = tpu.topology("v5e:1x1")

  def scan(weights, x):
    y, kept = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), y), x, weights)
    return y, kept

  lowered = lower(scan, (8, 512, 512), (512, 512), topology=topology)
  assert lowered.compile().cost_analysis()["optimal_seconds"] < 0
  found = ahead_of_time.figures(lowered, topology, None)
  assert found.flops == pytest.approx(8 * 2 * 512**3, rel=0.02)
  work = max(found.flops / 197e12, found.bytes_accessed / 819e9)
  assert found.roofline_seconds == work


# Remembering


def test_it_is_remembered_by_program_and_topology(tmp_path, counted):
  lowered = lower(product, (64, 64), (64, 64))
  first = ahead_of_time.figures(lowered, V3, tmp_path)
  assert ahead_of_time.figures(lower(product, (64, 64), (64, 64)), V3, tmp_path) == first
  assert counted == ["v3:2x2"]
  ahead_of_time.figures(lower(product, (64, 64), (64, 72)), V3, tmp_path)
  assert len(counted) == 2
  v2 = tpu.topology("v2:2x2")
  ahead_of_time.figures(lower(product, (64, 64), (64, 64), topology=v2), v2, tmp_path)
  assert counted[2:] == ["v2:2x2"]
  assert len(list(tmp_path.iterdir())) == 3


def test_it_is_remembered_that_it_does_not_fit(tmp_path, counted):
  for _ in range(2):
    found = ahead_of_time.figures(lower(lambda x: x + 1, (2**20, 2**14)), V3, tmp_path)
    assert not found.fits
  assert len(counted) == 1


def test_another_compiler_is_asked_again(tmp_path, counted, monkeypatch):
  lowered = lower(product, (64, 64), (64, 64))
  ahead_of_time.figures(lowered, V3, tmp_path)
  monkeypatch.setattr(tpu, "version", lambda: "0.0.99")
  assert ahead_of_time.figures(lowered, V3, tmp_path).libtpu == "0.0.99"
  assert len(counted) == 2


@pytest.mark.parametrize("damage", ["cut", "edited", "old", "empty", "of another"])
def test_a_damaged_memory_is_not_trusted(tmp_path, counted, damage):
  lowered = lower(product, (64, 64), (64, 64))
  good = ahead_of_time.figures(lowered, V3, tmp_path)
  (kept,) = tmp_path.iterdir()
  text = kept.read_text()
  whole = json.loads(text)
  kept.write_text(
    {
      "cut": text[: len(text) // 2],
      "edited": json.dumps(whole | {"figures": whole["figures"].replace("true", "false")}),
      "old": json.dumps(whole | {"format": ahead_of_time.FORMAT - 1}),
      "empty": "",
      "of another": json.dumps(whole | {"program": "0" * 32}),
    }[damage]
  )
  again = ahead_of_time.figures(lowered, V3, tmp_path)
  assert len(counted) == 2
  assert (again.fits, again.cycles, again.costs) == (good.fits, good.cycles, good.costs)
  assert ahead_of_time.figures(lowered, V3, tmp_path) == again
  assert len(counted) == 2


# Waiting


def test_a_terminal_sees_how_long_it_takes(monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  ahead_of_time.compile_with_progress(lower(product, (64, 64), (64, 64)), "v3:2x2", 3_000_000)
  said = capsys.readouterr().err
  assert said.startswith("\rcompiling for v3:2x2, usually about 3 minutes; 0:0")
  assert said.endswith("so far\r\x1b[K")


def test_elsewhere_it_is_said_once(capsys):
  ahead_of_time.compile_with_progress(lower(product, (64, 64), (64, 64)), "v3:2x2", 1000)
  assert capsys.readouterr().err == "compiling for v3:2x2, usually less than a minute\n"
