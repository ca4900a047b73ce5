"""Programs of a run that a later start takes from disk without tracing or lowering them again.

jax keeps compiled programs by what they compute, which is known only after seconds of tracing. Beside
each of its entries a note is kept here, found by what a program is made from and what is known at once:
config, devices, versions, flags and this package's source as it is on disk. So a start that changes
none of these begins to load while it still imports and counts images, and sees at last whether these
are as many as they were; any other goes on as if there were no notes.

A note is JSON, and jax's entries are the compiler's own bytes: nothing is unpickled. A note holds the
digest of itself and of the entry, and the facts that both were made from: one that is damaged, or
was made from others, is as if it were not there. As jax says of its own folder, who can write into
it can run code: it is meant to be the user's own.

What jax does not say in public about a compiled program is read and rebuilt here, and nowhere else.
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

# jax has no public name for a program that was not traced in this process, but for one that
# unpickles. Whatever is not as expected there means that a program is traced and lowered.
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
"""Fields, or groups of them, that no program depends on; every other field is part of the facts."""
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
  """The programs of one experiment, in jax's folder of compiled programs.

  Args:
    folder: of jax's entries, and of the notes beside them; None keeps nothing.
    facts: what the programs are made from, as JSON takes it.
    devices: of the mesh, in its order.

  What `find` and `compile` get as `late` are facts as well, of those that are known only by then.
  """

  def __init__(self, folder: Path | None, facts: Mapping[str, Any], devices: Sequence[Any]):
    self._folder = folder
    self._facts = json.loads(json.dumps(facts))
    self._devices = tuple(devices)
    self._key = _digest(self._facts)[:32]
    self._loading: dict[str, concurrent.futures.Future] = {}

  def path(self, name: str) -> Path | None:
    """The note on a program, whether it is there or not."""
    return self._folder / f"byolx_{name}-{self._key}.json" if self._folder else None

  def begin(self, name: str) -> None:
    """Begins to load a program in another thread, if it is there and was not begun before."""
    path = self.path(name)
    if name in self._loading or path is None or not path.is_file():
      return
    future: concurrent.futures.Future = concurrent.futures.Future()
    self._loading[name] = future

    def load() -> None:
      try:
        future.set_result(self._load(path))
      except Exception as error:  # of whatever kind: told in `find`, by whoever needs the program
        future.set_exception(error)

    threading.Thread(target=load, name=f"load {name}").start()

  def find(
    self, name: str, arguments: tuple, result: Any, late: Mapping[str, Any]
  ) -> jax.stages.Compiled | None:
    """A program that was kept, or None.

    Args:
      name: of the program.
      arguments: what it takes, as shapes with shardings.
      result: what it returns, or the first part of that: scalars by their names may follow.
      late: see the class.
    """
    self.begin(name)
    future = self._loading.pop(name, None)
    if future is None:
      return None
    try:
      note, executable = future.result()
      _same("images and classes", note["late"], dict(late))
      _same("arguments and results", note["shapes"], _shapes(arguments, result))
      return _rebuild(note, executable, self._devices, arguments, result)
    except Exception as error:
      reason = f"{type(error).__name__}: {error}"
      _log.warning("%s cannot be used (%s); the program is made anew", self.path(name), reason)
      return None

  def compile(
    self,
    name: str,
    lowered: jax.stages.Lowered,
    arguments: tuple,
    result: Any,
    late: Mapping[str, Any],
  ) -> jax.stages.Compiled:
    """Compiles a program and, in another thread, makes a note on it; `arguments` as for `find`."""
    with _entries() as entries:
      compiled = lowered.compile()
    if (path := self.path(name)) is None or not entries:
      return compiled

    def make_note() -> None:
      try:
        note = _describe(compiled, self._devices, arguments, result)
        content = self._entry(entries[-1]).read_bytes()
        note |= {"entry": entries[-1], "sha256": hashlib.sha256(content).hexdigest()}
        note |= {"facts": self._facts, "late": dict(late), "shapes": _shapes(arguments, result)}
        files.write_atomically(path, json.dumps(note | {"digest": _digest(note)}) + "\n")
      except Exception as error:  # the run goes on without; the next one traces again
        _log.info("no note on %s: %s: %s", name, type(error).__name__, error)

    threading.Thread(target=make_note, name=f"note {name}").start()
    return compiled

  def _entry(self, key: str) -> Path:
    return self._folder / f"{key}-cache"

  def _load(self, path: Path) -> tuple[dict, Any]:
    note = json.loads(path.read_text())
    if note.pop("digest") != _digest(note):
      raise ValueError("it is damaged")
    if note["facts"] != self._facts:
      raise ValueError("it was made from another config, other versions or other devices")
    content = self._entry(note["entry"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != note["sha256"]:
      raise ValueError(f"{note['entry']}-cache is not the program that it was")
    plain = compilation_cache.decompress_executable(content)
    program, _ = compilation_cache.extract_executable_and_time(plain)
    devices = xla_client.DeviceList(self._devices)
    executable = self._devices[0].client.deserialize_executable(program, devices)
    return note, executable


@contextlib.contextmanager
def _entries() -> Iterator[list[str]]:
  """The names of jax's entries that are looked for inside, as they come."""
  asked, before = [], compilation_cache.get_cache_key

  def get_cache_key(*arguments: Any, **options: Any) -> str:
    asked.append(before(*arguments, **options))
    return asked[-1]

  compilation_cache.get_cache_key = get_cache_key
  try:
    yield asked
  finally:
    compilation_cache.get_cache_key = before


def _shapes(arguments: tuple, result: Any) -> str:
  """The digest of what a program takes and returns, and where that lives."""
  leaves = jax.tree.leaves((arguments, result))
  return _digest([[x.shape, str(x.dtype), str(x.sharding.spec)] for x in leaves])


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def none() -> Kept:
  """No programs."""
  return Kept(None, {}, ())


def of(config: ConfigDict, devices: Sequence[Any], source: str = "") -> Kept:
  """The programs of an experiment, in the folder that jax has; arguments as for `facts`.

  Several processes keep none: each of them would have to find the same, or none.
  """
  folder = jax.config.jax_compilation_cache_dir
  if not folder or "://" in folder or jax.process_count() > 1:
    return none()
  try:
    return Kept(Path(folder), facts(config, devices, source), devices)
  except Exception as error:  # a backend may not say what it is: then programs are traced, as ever
    _log.info("no programs are kept: %s: %s", type(error).__name__, error)
    return none()


def facts(config: ConfigDict, devices: Sequence[Any], source: str = "") -> dict[str, Any]:
  """What an experiment's programs are made from, but for the number of its images and classes.

  Args:
    config: all fields.
    devices: devices of the mesh, in its order.
    source: digest of the user's own code that the programs are traced from; empty without any.
  """
  fields = configs.flatten(config)
  first = devices[0]
  return {
    "fields": {
      name: value
      for name, value in fields.items()
      if not any(
        name == one or (one[-1] == "." and name.startswith(one)) for one in NOT_IN_PROGRAMS
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


def source_digest(folder: Path) -> str:
  """Of every Python file below a folder, names and contents."""
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


SOURCE = source_digest(Path(__file__).parents[1])
"""Of this package, taken as its code is read: what runs is not what was edited since."""


def _topology(devices: Sequence[Any]) -> int:
  """jax's number for the kind of devices and how they are connected."""
  return xla_client.get_topology_for_devices(list(devices)).fingerprint()


def _processor() -> str:
  """What instructions a program may have been compiled for."""
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
  """What must be known of a program besides jax's entry; raises where `_rebuild` would differ."""
  known = compiled._executable
  rest = jax.tree.unflatten(compiled.out_tree, known.out_avals)
  plain = jax.tree.structure(rest) == jax.tree.structure(result)
  scalars = (
    None if plain else {name: [x.shape, x.dtype.name, x.weak_type] for name, x in rest[1].items()}
  )
  note = {
    "name": known._unloaded_executable.name,
    "used": sorted(known._kept_var_idx),
    "donated": [info.donated for info in jax.tree.leaves(compiled.args_info)],
    "scalars": scalars,
  }
  note = json.loads(json.dumps(note))
  again = _rebuild(note, known.xla_executable, devices, arguments, result)
  for name in ("in_tree", "out_tree"):
    _same(name, getattr(again, name), getattr(compiled, name))
  new = again._executable
  for name in ("in_avals", "out_avals", "_in_shardings", "_out_shardings", "_kept_var_idx",
               "_dispatch_in_layouts", "_mut"):  # fmt: skip
    _same(name, _plain(getattr(new, name)), _plain(getattr(known, name)))
  for name in ("committed", "unordered_effects", "ordered_effects", "host_callbacks", "keepalive"):
    one, other = (getattr(x._unloaded_executable, name) for x in (new, known))
    _same(name, one or None, other or None)
  _same("constants", list(compiled._params.const_args), [])
  return note


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, Sequence) else value


def _same(name: str, one: Any, other: Any) -> None:
  if one != other:
    raise ValueError(
      f"its {name} would not be the same again: {str(one)[:200]}, {str(other)[:200]}"
    )


def _rebuild(
  note: Mapping[str, Any],
  executable: Any,
  devices: Sequence[Any],
  arguments: tuple,
  result: Any,
) -> jax.stages.Compiled:
  """A program as jax would have it after compiling: for arguments and results in default layouts."""
  given, in_tree = jax.tree.flatten((arguments, {}))
  if note["scalars"] is not None:
    everywhere = jax.tree.leaves(result)[0].sharding
    result = (
      result,
      {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere, weak_type=weak)
        for name, (shape, dtype, weak) in note["scalars"].items()
      },
    )
  made, out_tree = jax.tree.flatten(result)
  used = [given[index] for index in note["used"]]
  in_avals, out_avals = _avals(used), _avals(made)
  in_layouts, out_layouts = pxla._get_layouts_from_executable(
    executable, (None,) * len(used), (None,) * len(made), 0, in_avals, out_avals
  )
  loaded = pxla.UnloadedMeshExecutable(
    xla_executable=executable,
    device_list=xla_client.DeviceList(tuple(devices)),
    backend=devices[0].client,
    input_avals=in_avals,
    input_shardings=[x.sharding for x in used],
    output_avals=out_avals,
    output_shardings=[x.sharding for x in made],
    committed=True,
    name=note["name"],
    unordered_effects=[],
    ordered_effects=[],
    keepalive=None,
    host_callbacks=[],
    kept_var_idx=set(note["used"]),
    mut=None,
    xla_in_layouts=in_layouts,
    dispatch_in_layouts=[None] * len(used),
    xla_out_layouts=out_layouts,
    all_args_info=None,
    pgle_profiler=None,
  ).load()
  infos = [
    jax.stages.ArgInfo(aval, donated)
    for aval, donated in zip(_avals(given), note["donated"], strict=True)
  ]
  return jax.stages.Compiled(
    loaded, [], jax.tree.unflatten(in_tree, infos), out_tree, no_kwargs=True
  )


def _avals(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[Any]:
  return [core.shaped_abstractify(x) for x in shapes]
