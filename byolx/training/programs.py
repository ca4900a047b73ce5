"""Fast restart: loads a run's compiled programs from disk without tracing or lowering them.

jax's compilation cache finds a program by its lowered text, so jax must trace a program before it
can look it up. This module stores a JSON file, the manifest, beside each of jax's cache entries. A
manifest is found by facts that determine the program and are known at once: config, devices, package
versions, flags, and the source code of byolx. If none of these facts has changed, a restarted run
loads the program in the background while it still imports modules and counts images. The program
also depends on the numbers of images and classes, which are compared once they are known. Without a
matching manifest, programs are traced and compiled as usual.

Loading never unpickles: manifests are JSON, and jax's entries are the compiler's bytes. A manifest
holds the facts, its own checksum and the checksum of jax's entry. A damaged manifest, or one with
other facts, is not used. As with jax's own cache, a person who can write to the folder can run code
in the process, so the folder should belong to the user alone.

This is the only module that uses private attributes of jax's compiled programs.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

# jax's only public function that loads a program without tracing unpickles it. If these private
# modules are not as expected, the program is traced and compiled.
from jax._src import compilation_cache, core
from jax._src.interpreters import pxla
from jax._src.lib import xla_client
from ml_collections import ConfigDict

from byolx.core import config as configs
from byolx.core import files

_log = logging.getLogger("byolx")

NOT_IN_PROGRAMS = (
  *("data.workers", "data.threads", "data.prefetch"),
  *("checkpoint.", "compile.", "eval.", "init.", "log.", "seed"),
)
"""Config fields that no compiled program depends on; a name that ends with a dot stands for all
fields of that group."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "libtpu")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_NOT_FLAGS = (
  "jax_compilation_cache",
  "jax_persistent_cache",
  "jax_explain",
  "jax_log",
  "jax_debug",
)


class Kept:
  """Store of the compiled programs of one run, on disk.

  Args:
    folder: folder of jax's cache entries and of their manifests (JSON descriptions); None to store
      nothing.
    facts: values that determine the programs, returned by the function `facts`.
    devices: devices of the mesh, in row-major order.
  """

  def __init__(self, folder: Path | None, facts: Mapping[str, Any], devices: Sequence[Any]):
    self._folder = folder
    self._facts = json.loads(json.dumps(facts))
    self._devices = tuple(devices)
    self._key = _sha256(self._facts)[:32]
    self._loading: dict[str, concurrent.futures.Future] = {}

  def path(self, name: str) -> Path | None:
    """Returns the path of the manifest, the file that describes a compiled program.

    The file may not exist.

    Args:
      name: name of the program, such as `step`.

    Returns:
      The path; None if this store has no folder.
    """
    return self._folder / f"byolx_{name}-{self._key}.json" if self._folder else None

  def begin(self, name: str) -> None:
    """Starts to load a compiled program in another thread; `find` then waits for it and returns it.

    Does nothing if the program is not stored, or if it is being loaded already.

    Args:
      name: name of the program, such as `step`.
    """
    path = self.path(name)
    if name in self._loading or path is None or not path.is_file():
      return
    future: concurrent.futures.Future = concurrent.futures.Future()
    self._loading[name] = future

    def load() -> None:
      try:
        future.set_result(self._load(path))
      except Exception as error:  # reported by `find`
        future.set_exception(error)

    threading.Thread(target=load, name=f"load {name}").start()

  def find(
    self, name: str, arguments: tuple, result: Any, counts: Mapping[str, Any]
  ) -> jax.stages.Compiled | None:
    """Returns a stored compiled program, or None if it is not stored or cannot be used.

    Args:
      name: name of the program, such as `step`.
      arguments: shapes of the program's arguments, as pytrees of `jax.ShapeDtypeStruct` with
        shardings.
      result: shapes of the program's result, in the same form. If the program returns a state and a
        dictionary of scalars, only the shapes of the state are given.
      counts: numbers of images and classes, by name; the program depends on them too.
    """
    self.begin(name)
    future = self._loading.pop(name, None)
    if future is None:
      return None
    try:
      manifest, executable = future.result()
      _require_equal("images and classes", manifest["counts"], dict(counts))
      _require_equal("arguments and results", manifest["shapes"], _shapes(arguments, result))
      return _rebuild(manifest, executable, self._devices, arguments, result)
    except Exception as error:
      reason = f"{type(error).__name__}: {error}"
      _log.warning("%s cannot be used (%s); the program is compiled again", self.path(name), reason)
      return None

  def compile(
    self,
    name: str,
    lowered: jax.stages.Lowered,
    arguments: tuple,
    result: Any,
    counts: Mapping[str, Any],
  ) -> jax.stages.Compiled:
    """Compiles a program and returns it.

    Another thread stores a manifest, a file with which a later run can load the program. Nothing is
    stored if this store has no folder.

    Args:
      name: name of the program, such as `step`.
      lowered: the program, lowered by jax.
      arguments: shapes of the program's arguments, as pytrees of `jax.ShapeDtypeStruct` with
        shardings.
      result: shapes of the program's result, in the same form. If the program returns a state and a
        dictionary of scalars, only the shapes of the state are given.
      counts: numbers of images and classes, by name; the program depends on them too.
    """
    with _entries() as entries:
      compiled = lowered.compile()
    if (path := self.path(name)) is None or not entries:
      return compiled

    def write_manifest() -> None:
      try:
        manifest = _describe(compiled, self._devices, arguments, result)
        content = self._entry(entries[-1]).read_bytes()
        manifest |= {"entry": entries[-1], "sha256": hashlib.sha256(content).hexdigest()}
        manifest |= {"facts": self._facts, "counts": dict(counts)}
        manifest |= {"shapes": _shapes(arguments, result)}
        files.write_atomically(path, json.dumps(manifest | {"checksum": _sha256(manifest)}) + "\n")
      except Exception as error:  # this run needs no manifest; the next one traces again
        _log.info("no manifest of %s: %s: %s", name, type(error).__name__, error)

    threading.Thread(target=write_manifest, name=f"manifest {name}").start()
    return compiled

  def _entry(self, key: str) -> Path:
    return self._folder / f"{key}-cache"

  def _load(self, path: Path) -> tuple[dict, Any]:
    manifest = json.loads(path.read_text())
    if manifest.pop("checksum") != _sha256(manifest):
      raise ValueError("it is damaged")
    if manifest["facts"] != self._facts:
      raise ValueError("it was made from another config, other versions or other devices")
    content = self._entry(manifest["entry"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
      raise ValueError(f"{manifest['entry']}-cache: sha256 mismatch")
    plain = compilation_cache.decompress_executable(content)
    program, _ = compilation_cache.extract_executable_and_time(plain)
    devices = xla_client.DeviceList(self._devices)
    executable = self._devices[0].client.deserialize_executable(program, devices)
    return manifest, executable


@contextlib.contextmanager
def _entries() -> Iterator[list[str]]:
  """Context manager that gives a list, to which the key of each look-up in jax's cache is added."""
  names, original = [], compilation_cache.get_cache_key

  def get_cache_key(*arguments: Any, **options: Any) -> str:
    names.append(original(*arguments, **options))
    return names[-1]

  compilation_cache.get_cache_key = get_cache_key
  try:
    yield names
  finally:
    compilation_cache.get_cache_key = original


def _shapes(arguments: tuple, result: Any) -> str:
  """Returns one checksum of the shapes, types and shardings of a program's arguments and result."""
  leaves = jax.tree.leaves((arguments, result))
  return _sha256([[x.shape, str(x.dtype), str(x.sharding.spec)] for x in leaves])


def _sha256(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def none() -> Kept:
  """Returns an empty store of compiled programs, which neither finds nor stores any."""
  return Kept(None, {}, ())


def of(config: ConfigDict, devices: Sequence[Any], source: str = "") -> Kept:
  """Returns the store of a run's compiled programs, in the folder of jax's compilation cache.

  The store is empty if jax has no local cache folder. It is also empty in a multi-process run,
  because all processes would have to find the same programs.

  Args:
    config: config of the run, with all fields.
    devices: devices of the mesh, in row-major order.
    source: checksum of the user's own code that is traced into the programs; empty if there is
      none.
  """
  folder = jax.config.jax_compilation_cache_dir
  if not folder or "://" in folder or jax.process_count() > 1:
    return none()
  try:
    return Kept(Path(folder), facts(config, devices, source), devices)
  except Exception as error:  # some backends cannot describe their devices
    _log.info("no programs are stored: %s: %s", type(error).__name__, error)
    return none()


def facts(config: ConfigDict, devices: Sequence[Any], source: str = "") -> dict[str, Any]:
  """Returns the values that determine a run's compiled programs, as a dictionary for JSON.

  The numbers of images and classes determine the programs too, but are not included.

  Args:
    config: config of the run, with all fields.
    devices: devices of the mesh, in row-major order.
    source: checksum of the user's own code that is traced into the programs; empty if there is
      none.
  """
  fields = configs.flatten(config)
  first = devices[0]
  return {
    "fields": {
      name: value
      for name, value in fields.items()
      if not any(
        name == entry or (entry[-1] == "." and name.startswith(entry)) for entry in NOT_IN_PROGRAMS
      )
    },
    "devices": [[device.id, device.process_index, device.device_kind] for device in devices],
    "platform": [first.platform, first.client.platform_version, str(_topology(devices))],
    "processor": _processor() if first.platform == "cpu" else "",
    "versions": {name: _version(name) for name in _PACKAGES}
    | {"python": platform.python_version()},
    "source": [SOURCE, source],
    "flags": {name: os.environ.get(name, "") for name in _FLAGS},
    "jax": {
      name: repr(value)
      for name, value in sorted(jax.config.values.items())
      if not name.startswith(_NOT_FLAGS)
    },
  }


def source_checksum(folder: Path) -> str:
  """Returns the SHA-256 over the names and contents of all Python files below a folder."""
  checksum = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    checksum.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
    checksum.update(path.read_bytes())
  return checksum.hexdigest()


SOURCE = source_checksum(Path(__file__).parents[1])
"""Checksum of byolx's source files. It is computed at import, because the files may be edited
during a run."""


def _topology(devices: Sequence[Any]) -> int:
  """Returns jax's fingerprint of the type of the devices and of the connections between them."""
  return xla_client.get_topology_for_devices(list(devices)).fingerprint()


def _processor() -> str:
  """Returns a checksum of the model and the instruction sets of this machine's CPU."""
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
  kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
  return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""


def _describe(
  compiled: jax.stages.Compiled, devices: Sequence[Any], arguments: tuple, result: Any
) -> dict[str, Any]:
  """Returns a description of a compiled program, from which `_rebuild` can make the program again.

  The description is a part of the manifest, the file that is stored beside jax's cache entry.
  `_rebuild` also needs the executable, which the cache entry holds.

  Args:
    compiled: the compiled program.
    devices: devices of the mesh, in row-major order.
    arguments: shapes of the program's arguments, with shardings.
    result: shapes of the program's result, with shardings.

  Raises:
    ValueError: the program that `_rebuild` makes from this description differs from `compiled`.
  """
  executable = compiled._executable
  output = jax.tree.unflatten(compiled.out_tree, executable.out_avals)
  without_scalars = jax.tree.structure(output) == jax.tree.structure(result)
  manifest = {
    "name": executable._unloaded_executable.name,
    "used": sorted(executable._kept_var_idx),
    "donated": [info.donated for info in jax.tree.leaves(compiled.args_info)],
    "scalars": None
    if without_scalars
    else {name: [x.shape, x.dtype.name, x.weak_type] for name, x in output[1].items()},
  }
  manifest = json.loads(json.dumps(manifest))
  rebuilt = _rebuild(manifest, executable.xla_executable, devices, arguments, result)
  for name in ("in_tree", "out_tree"):
    _require_equal(name, getattr(rebuilt, name), getattr(compiled, name))
  new = rebuilt._executable
  for name in ("in_avals", "out_avals", "_in_shardings", "_out_shardings", "_kept_var_idx",
               "_dispatch_in_layouts", "_mut"):  # fmt: skip
    _require_equal(name, _as_tuple(getattr(new, name)), _as_tuple(getattr(executable, name)))
  for name in ("committed", "unordered_effects", "ordered_effects", "host_callbacks", "keepalive"):
    actual, expected = (getattr(x._unloaded_executable, name) for x in (new, executable))
    _require_equal(name, actual or None, expected or None)
  _require_equal("constants", list(compiled._params.const_args), [])
  return manifest


def _as_tuple(value: Any) -> Any:
  return tuple(value) if isinstance(value, Sequence) else value


def _require_equal(name: str, actual: Any, expected: Any) -> None:
  if actual != expected:
    raise ValueError(f"its {name} are {str(actual)[:200]}, expected {str(expected)[:200]}")


def _rebuild(
  manifest: Mapping[str, Any],
  executable: Any,
  devices: Sequence[Any],
  arguments: tuple,
  result: Any,
) -> jax.stages.Compiled:
  """Makes a callable program from an executable that was loaded from jax's cache.

  The program is equal to the one that `lowered.compile()` returned. Its arrays have their default
  layouts in memory.

  Args:
    manifest: description of the program, from `_describe`.
    executable: executable that was loaded from jax's cache.
    devices: devices of the mesh, in row-major order.
    arguments: shapes of the program's arguments, with shardings.
    result: shapes of the program's result, with shardings. If the program returns a state and a
      dictionary of scalars, only the shapes of the state are given.
  """
  inputs, in_tree = jax.tree.flatten((arguments, {}))
  if manifest["scalars"] is not None:
    # The first leaf of a train state is its step, which is replicated, as all scalars are.
    everywhere = jax.tree.leaves(result)[0].sharding
    result = (
      result,
      {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere, weak_type=weak)
        for name, (shape, dtype, weak) in manifest["scalars"].items()
      },
    )
  outputs, out_tree = jax.tree.flatten(result)
  used = [inputs[index] for index in manifest["used"]]
  in_avals, out_avals = _avals(used), _avals(outputs)
  in_layouts, out_layouts = pxla._get_layouts_from_executable(
    executable, (None,) * len(used), (None,) * len(outputs), 0, in_avals, out_avals
  )
  loaded = pxla.UnloadedMeshExecutable(
    xla_executable=executable,
    device_list=xla_client.DeviceList(tuple(devices)),
    backend=devices[0].client,
    input_avals=in_avals,
    input_shardings=[x.sharding for x in used],
    output_avals=out_avals,
    output_shardings=[x.sharding for x in outputs],
    committed=True,
    name=manifest["name"],
    unordered_effects=[],
    ordered_effects=[],
    keepalive=None,
    host_callbacks=[],
    kept_var_idx=set(manifest["used"]),
    mut=None,
    xla_in_layouts=in_layouts,
    dispatch_in_layouts=[None] * len(used),
    xla_out_layouts=out_layouts,
    all_args_info=None,
    pgle_profiler=None,
  ).load()
  infos = [
    jax.stages.ArgInfo(aval, donated)
    for aval, donated in zip(_avals(inputs), manifest["donated"], strict=True)
  ]
  return jax.stages.Compiled(
    loaded, [], jax.tree.unflatten(in_tree, infos), out_tree, no_kwargs=True
  )


def _avals(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[Any]:
  return [core.shaped_abstractify(x) for x in shapes]
