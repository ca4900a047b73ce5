"""From a file of `configs/` to a whole config.

A file sets some fields; the others keep the defaults of `byolx.core.fields`. `load` merges file, defaults
and `--config.field=value` overrides, and refuses unknown names and impossible values in one line that
names the field, the value and the choices.
"""

import difflib
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from byolx.core.fields import ENCODER, FIELDS


class ConfigError(ValueError):
  """A field, a value, or a combination of them that cannot run. The message is one line."""


def defaults() -> ConfigDict:
  """A fresh ConfigDict of every field's default."""
  config = ConfigDict()
  for name, field in FIELDS.items():
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
      if group not in node:
        node[group] = ConfigDict()
      node = node[group]
    node[leaf] = field.default
  return config


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Reads `FILE.py[:key=value,...]`, merges it into the defaults, applies overrides, checks values.

  Args:
    path: a config file, with an optional argument for its `get_config` after a colon.
    overrides: `--config.field=value` in the order given.

  Fields of the groups in init.inherit that neither file nor overrides set are those of another run.
  With init.workdir, the fields that go with an encoder (`fields.ENCODER`) are always those of that
  encoder; see `refuse_other_function`. A run that is not there yet gives no fields, and is refused
  when its encoder is read.

  Raises:
    ConfigError: missing file, unknown field or argument, impossible value; file or overrides say of
      an encoder what its checkpoint does not.
  """
  given = _read(path)
  config = merge(given, path)
  for flag in overrides:
    _override(config, flag)
  named = {flag.removeprefix("--config.").partition("=")[0] for flag in overrides}
  named |= flatten(given).keys()
  _inherit(config, named)
  _take_encoder_fields(config, named)
  check(config)
  return config


def of_run(path: str | Path) -> ConfigDict:
  """The config of a run, given its workdir, its folder of checkpoints, or one of these.

  Raises:
    ConfigError: there is none.
  """
  file = _config_file(Path(path))
  if file is None:
    raise ConfigError(f"{path}: expected a workdir of `byolx train`, with a config.json")
  return from_json(file.read_text())


def stored(path: str | Path) -> dict[str, Any] | None:
  """The flat config that goes with a checkpoint, not checked; None where there is none.

  Args:
    path: a workdir, a folder of checkpoints, or one checkpoint.

  Returns:
    The config in the newest record that can be read; without one, that of the workdir's config.json.
  """
  for record in _records(Path(path)):
    try:
      flat = json.loads(record.read_bytes())["record"]["meta"].get("config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      continue  # a damaged checkpoint is named when its arrays are read
    if flat:
      return flatten(flat)
    break
  file = _config_file(Path(path))
  return None if file is None else flatten(json.loads(file.read_text()))


def of_encoder(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a flat config that go with its encoder; missing ones have their defaults."""
  values = {name: FIELDS[name].default for name in ENCODER} | flatten(flat)
  return {name: float(values[name]) if _is_float_field(name) else values[name] for name in ENCODER}


def refuse_other_function(
  here: Mapping[str, Any], there: Mapping[str, Any], task: str, path: str | Path
) -> None:
  """Refuses fields by which an encoder would compute another function of the same weights.

  Pretraining may go on at another views.size; every other task takes the encoder's. model.bn_decay
  counts only where the encoder's running averages are debiased.

  Args:
    here: flat fields of the run, all of them or those that were given.
    there: flat config of the run that trained the encoder.
    task: that of the run.
    path: where the encoder is, for the message.

  Raises:
    ConfigError: fields of `fields.ENCODER` differ; all of them are listed.
  """
  there = of_encoder(there)
  free = {"views.size"} if task == "pretrain" else set()
  free |= set() if there["model.bn_debias"] else {"model.bn_decay"}
  differing = [
    f"{name}: {value!r} there, {here[name]!r} here"
    for name, value in there.items()
    if name in here and name not in free and _plain(here[name]) != _plain(value)
  ]
  if differing:
    raise ConfigError(
      f"init.workdir={path}: its encoder would compute another function here ({'; '.join(differing)});"
      " expected its own values, which are taken where these fields are not given"
    )


def value(name: str, text: str) -> Any:
  """What `--config.name=text` sets a field to, in the field's own type.

  Raises:
    ConfigError: unknown field, or a value that it cannot have.
  """
  config = defaults()
  _override(config, f"--config.{name}={text}")
  check(config)
  return flatten(config)[name]


def merge(given: ConfigDict, origin: str) -> ConfigDict:
  """The defaults with the given fields set, each of its default's type."""
  config = defaults()
  for name, value in flatten(given).items():
    if name not in FIELDS:
      raise ConfigError(f"{origin}: {_unknown(name)}")
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
      node = node[group]
    try:
      node[leaf] = float(value) if _is_float_field(name) and isinstance(value, int) else value
    except TypeError:
      raise ConfigError(f"{origin}: {name}={value!r}: expected {_kind(name)}") from None
  return config


def check(config: ConfigDict) -> None:
  """Checks every field by itself; combinations are checked where they are used."""
  for name, value in flatten(config).items():
    try:
      wanted = FIELDS[name].check(value)
    except TypeError:
      wanted = _kind(name)
    if wanted:
      raise ConfigError(f"{name}={value!r}: expected {wanted}")


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Dotted names to values; lists become tuples."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = tuple(value) if isinstance(value, list | tuple) else value
  return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Lines `field: old -> new` of what differs and shapes results; both are flat."""
  names = [name for name in {**old, **new} if name not in FIELDS or not FIELDS[name].free]
  return [
    f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
    for name in names
    if _plain(old.get(name)) != _plain(new.get(name))
  ]


def changes(flat: Mapping[str, Any]) -> dict[str, Any]:
  """What of a flat config is not the default; fields of other versions count."""
  usual = flatten(defaults())
  return {
    name: _plain(value)
    for name, value in flat.items()
    if name not in usual or _plain(usual[name]) != _plain(value)
  }


def fingerprint(config: ConfigDict) -> str:
  """Twelve hex digits that tell configs apart in what shapes results, the seed aside."""
  shaping = {
    name: _plain(value)
    for name, value in flatten(config).items()
    if not FIELDS[name].free and name != "seed"
  }
  return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]


def to_json(config: ConfigDict) -> str:
  """The flat config as JSON, one field a line."""
  return json.dumps(flatten(config), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
  """The config that `to_json` wrote.

  Raises:
    ConfigError: a field that this version does not know, or an impossible value.
  """
  nested = ConfigDict()
  for name, value in json.loads(text).items():
    *groups, leaf = name.split(".")
    node = nested
    for group in groups:
      if group not in node:
        node[group] = ConfigDict()
      node = node[group]
    node[leaf] = tuple(value) if isinstance(value, list) else value
  config = merge(nested, "config.json")
  check(config)
  return config


def _override(config: ConfigDict, flag: str) -> None:
  """Sets one field as `--config.field=value` says, in the field's own type."""
  name, equals, value = flag.removeprefix("--config.").partition("=")
  if not flag.startswith("--config.") or not equals:
    raise ConfigError(f"{flag}: expected --config.FIELD=VALUE")
  if name not in FIELDS:
    raise ConfigError(_unknown(name))
  values, argv = flags.FlagValues(), ["byolx", flag]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, ValueError, TypeError):
    raise ConfigError(f"{name}={value!r}: expected {_kind(name)}") from None


def _inherit(config: ConfigDict, given: Set[str]) -> None:
  """Sets the fields of init.inherit that are not given as the other run has them."""
  run = config.init.like or config.init.workdir
  if not (config.init.inherit and run):
    return
  check(config)
  for name, value in flatten(_config_of(run)).items():
    group, dot, _ = name.partition(".")
    if dot and group in config.init.inherit and name not in given:
      _set(config, name, value)


def _take_encoder_fields(config: ConfigDict, given: Set[str]) -> None:
  """Sets the fields that go with the encoder of init.workdir; refuses given ones that differ."""
  if not config.init.workdir:
    return
  check(config)
  there = stored(config.init.workdir)
  if there is None:
    return
  here = {name: value for name, value in flatten(config).items() if name in given}
  refuse_other_function(here, there, config.task, config.init.workdir)
  for name, value in of_encoder(there).items():
    if name not in given:
      _set(config, name, value)


def _set(config: ConfigDict, name: str, value: Any) -> None:
  *groups, leaf = name.split(".")
  node = config
  for group in groups:
    node = node[group]
  node[leaf] = value


def _config_file(path: Path) -> Path | None:
  """The config.json of a workdir, of its folder of checkpoints, or of one of these."""
  files = [folder / "config.json" for folder in (path, *path.absolute().parents[:2])]
  return next((file for file in files if file.is_file()), None)


def _config_of(path: str) -> ConfigDict:
  """The config of a run, or of a checkpoint that lies alone."""
  if _config_file(Path(path)) is None and (flat := stored(path)):
    return from_json(json.dumps(flat))
  return of_run(path)


def _records(path: Path) -> list[Path]:
  """The records of a workdir, of a folder of checkpoints, or of one checkpoint; newest first."""
  if (path / "record").is_dir():
    return [path / "record" / "record.json"]
  inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  names = [folder.name for folder in inside.iterdir()] if inside.is_dir() else []
  steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
  return [inside / str(step) / "record" / "record.json" for step in steps]


def _kind(name: str) -> str:
  """What a field takes, in words."""
  kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
  return kinds.get(type(FIELDS[name].default), "values in brackets, such as (0.1, 1.0)")


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple | list) else value


def _is_float_field(name: str) -> bool:
  return isinstance(FIELDS[name].default, float)


def _unknown(name: str) -> str:
  if below := [field for field in FIELDS if field.startswith(f"{name}.")]:
    return f"{name} is a group of fields; expected one of {', '.join(below)}"
  if near := difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.75):
    return f"unknown field {name}: did you mean {' or '.join(near)}?"
  group = name.partition(".")[0]
  groups = sorted({field.partition(".")[0] for field in FIELDS})
  choices = [field for field in FIELDS if field.startswith(f"{group}.")] or groups
  return f"unknown field {name}; expected one of {', '.join(choices)}"


def _read(path: str) -> ConfigDict:
  """Runs the file's `get_config`, whose signature's defaults type its arguments."""
  name, _, argument = path.partition(":")
  file = Path(name)
  if not file.is_file():
    beside = ", ".join(sorted(str(p) for p in file.parent.glob("*.py"))) or "none in that folder"
    raise ConfigError(f"--config={name}: no such file; there are: {beside}")
  spec = importlib.util.spec_from_file_location(f"byolx_config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"--config={name}: expected a Python file with a get_config function")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ConfigError(f"--config={name}: expected a function get_config in it")
  arguments = _arguments(module.get_config, argument, name)
  try:
    return module.get_config(**arguments)
  except ValueError as error:
    raise ConfigError(f"--config={path}: {error}") from None


def _arguments(function: Callable[..., ConfigDict], text: str, path: str) -> dict[str, Any]:
  """`arch=resnet200,width=2` as keyword arguments, typed by the function's defaults."""
  wanted = inspect.signature(function).parameters
  arguments = {}
  for part in filter(None, text.split(",")):
    key, equals, value = part.partition("=")
    if not equals or key not in wanted:
      choices = ", ".join(f"{p.name}={p.default}" for p in wanted.values()) or "none"
      raise ConfigError(f"--config={path}:{part}: unknown argument; it takes: {choices}")
    kind = type(wanted[key].default)
    try:
      arguments[key] = kind(value)
    except ValueError:
      raise ConfigError(f"--config={path}:{part}: expected {kind.__name__} for {key}") from None
  return arguments
