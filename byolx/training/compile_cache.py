"""Compiled programs on disk, so that what was compiled once is not compiled again."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from byolx.core import sharding, text
from byolx.core.fields import field
from byolx.training import programs

SECONDS_PER_MEGABYTE = {"cpu": 8.0, "gpu": 15.0, "tpu": 40.0}
"""Compile time of a train step over the size of its lowered text, on one core: measured for ResNets on
a CPU and for TPU v3 ahead of time, within a factor of two; a GPU's is a guess."""

_ours: set[str] = set()


@dataclasses.dataclass(frozen=True)
class CompileSpec:
  """The config group `compile`."""

  cache: str = field(
    "../compiled",
    "folder of compiled programs, seen from the workdir: what was compiled once is not compiled "
    "again; empty: none",
    free=True,
  )


def begin(config: ConfigDict, workdir: Path, source: str = "") -> programs.Kept:
  """The programs of a run, kept in its folder; its step, the slowest of them, begins to load.

  Takes little time, to come before images are read and networks are traced. Errors of the config are
  raised by the functions that build from it.
  """
  keep_in(config.compile.cache, workdir)
  try:
    mesh = sharding.lay_out(sharding.MeshSpec(**config.mesh), sharding.find_devices(config)).mesh
  except ValueError:
    return programs.none()
  kept = programs.of(config, mesh.devices.ravel().tolist(), source)
  kept.begin("step")
  return kept


def keep_in(folder: str, workdir: Path) -> None:
  """From now on keeps every compiled program in a folder, and takes from there what it has.

  A damaged program there is compiled again. jax's own setting (JAX_COMPILATION_CACHE_DIR) wins.

  Args:
    folder: seen from the workdir; empty keeps nothing.
    workdir: of the run.
  """
  set_before = jax.config.jax_compilation_cache_dir
  if set_before is not None and set_before not in _ours:
    return
  path = str((workdir / folder).resolve()) if folder else None
  if path == set_before:
    return
  if path:
    _ours.add(path)
    # The step is one program of many: without the small ones a second start is not much faster.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  _use(path)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
  """Inside, jax keeps no compiled program: those for devices that are not there it could not load."""
  folder = jax.config.jax_compilation_cache_dir
  _use(None)
  try:
    yield
  finally:
    _use(folder)


def _use(folder: str | None) -> None:
  jax.config.update("jax_compilation_cache_dir", folder)
  compilation_cache.reset_cache()


def compile_aloud(
  lowered: jax.stages.Lowered,
  platform: str,
  compile_it: Callable[[jax.stages.Lowered], jax.stages.Compiled] = jax.stages.Lowered.compile,
) -> jax.stages.Compiled:
  """Compiles a train step, and says before how long that usually takes, and how long it took."""
  folder = jax.config.jax_compilation_cache_dir
  kept = f", less if it is in {folder}" if folder else ""
  usual = usual_seconds(lowered, platform)
  wait = f"about {text.duration(usual)}" if usual > 5 else "a few seconds"
  print(f"compiling the step ({wait}{kept}) ...", flush=True)
  began = time.monotonic()
  compiled = compile_it(lowered)
  print(f"compiled in {text.duration(time.monotonic() - began)}", flush=True)
  return compiled


def usual_seconds(lowered: jax.stages.Lowered, platform: str) -> float:
  """Roughly how long a step takes to compile."""
  return len(lowered.as_text()) / 1e6 * SECONDS_PER_MEGABYTE.get(platform, 40.0)
