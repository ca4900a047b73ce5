"""Cache of compiled programs on disk: a restarted run loads its programs and need not compile them."""

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
"""Rough time to compile a ResNet's train step on one CPU core, by the platform that it is compiled
for, in seconds per megabyte of the lowered program's text. The value for GPUs is a guess."""

_folders_set_here: set[str] = set()


@dataclasses.dataclass(frozen=True)
class CompileSpec:
  """The config group `compile`: the folder of the cache of compiled programs."""

  cache: str = field(
    "../compiled",
    "folder of the cache of compiled programs, relative to the workdir; empty: no cache",
    free=True,
  )


def begin(config: ConfigDict, workdir: Path, source: str = "") -> programs.Kept:
  """Sets up the compile cache of a run and starts loading the compiled train step in the background.

  The call returns at once, so it can be made before images are opened and networks are traced. If the
  config has an invalid mesh, this function raises no error. The error comes later, when the run is
  built.

  Args:
    config: config of the run, with all fields.
    workdir: folder of the run.
    source: checksum of the file that defines the user's own task; empty if the task is built in.

  Returns:
    The store of the run's compiled programs. It is empty if the mesh is invalid.
  """
  keep_in(config.compile.cache, workdir)
  try:
    mesh = sharding.lay_out(sharding.MeshSpec(**config.mesh), sharding.find_devices(config)).mesh
  except ValueError:
    return programs.none()
  stored = programs.of(config, mesh.devices.ravel().tolist(), source)
  stored.begin("step")
  return stored


def keep_in(folder: str, workdir: Path) -> None:
  """Sets the folder where jax stores compiled programs and looks for them.

  A damaged program is compiled again. If the user has set a folder (JAX_COMPILATION_CACHE_DIR), the
  user's setting is left as it is.

  Args:
    folder: path of the cache, relative to the workdir or absolute; empty for no cache.
    workdir: folder of the run.
  """
  current = jax.config.jax_compilation_cache_dir
  if current is not None and current not in _folders_set_here:
    return
  path = str((workdir / folder).resolve()) if folder else None
  if path == current:
    return
  if path:
    _folders_set_here.add(path)
    # A start compiles many small programs too; loading only the step would save little time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  _use(path)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
  """Context manager that turns jax's compilation cache off.

  It is used while programs are compiled for devices that this machine does not have, because jax
  could not load such programs from the cache.
  """
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
  """Compiles a train step; prints the expected time before, and the actual time after.

  Args:
    lowered: train step, lowered by jax but not compiled.
    platform: platform of the devices, `cpu`, `gpu` or `tpu`.
    compile_it: function that compiles the lowered step; by default jax's own.
  """
  folder = jax.config.jax_compilation_cache_dir
  cached = f", less if it is in {folder}" if folder else ""
  usual = usual_seconds(lowered, platform)
  wait = f"about {text.duration(usual)}" if usual > 5 else "a few seconds"
  print(f"compiling the step ({wait}{cached}) ...", flush=True)
  began = time.monotonic()
  compiled = compile_it(lowered)
  print(f"compiled in {text.duration(time.monotonic() - began)}", flush=True)
  return compiled


def usual_seconds(lowered: jax.stages.Lowered, platform: str) -> float:
  """Estimates how long a train step takes to compile, in seconds, from the length of its program text.

  Args:
    lowered: train step, lowered by jax but not compiled.
    platform: platform of the devices, `cpu`, `gpu` or `tpu`; any other counts as `tpu`.
  """
  return len(lowered.as_text()) / 1e6 * SECONDS_PER_MEGABYTE.get(platform, 40.0)
