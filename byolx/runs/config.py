"""Loads configs: defaults, the fields of a config file, and command-line overrides.

A config file sets some fields; the others keep their defaults (`byolx.runs.schema`). `load` merges
the defaults, the file and the `--config.FIELD=VALUE` overrides. It refuses unknown fields and
impossible values with a one-line message that names the field, the value and the choices.

A flat config is a mapping from full field names, such as "train.epochs", to values.
"""

import difflib
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from byolx.core.config import ConfigError, file_of, flatten, plain, stored
from byolx.core.fields import Field
from byolx.runs import schema
from byolx.tasks import TASKS


def defaults() -> ConfigDict:
  """Returns a new ConfigDict in which every field has its default."""
  config = ConfigDict()
  for name, field in schema.fields().items():
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
      if group not in node:
        node[group] = ConfigDict()
      node = node[group]
    node[leaf] = field.default
  return config


def load(path: str, overrides: Sequence[str] = (), workdir: Path | None = None) -> ConfigDict:
  """Loads a config file, applies overrides and checks all values.

  Fields that neither the file nor an override sets can come from another run. With init.inherit, the
  groups of fields named there are copied from the run of init.like or init.workdir. With init.workdir,
  the fields that determine the encoder (`schema.encoder_fields`) are copied from the run that trained
  it, and other values of these fields in the file or an override are refused. If that run does not
  exist yet, the encoder's fields are not copied, and an error is raised later, when the encoder is read.

  Args:
    path: config file, `FILE.py`, or `FILE.py:key=value,...` with arguments of its `get_config`.
    overrides: command-line overrides, each as `--config.FIELD=VALUE`, applied in order.
    workdir: folder of the run. If the other run has been deleted when this run is resumed, the copied
      fields are read from the config.json in this folder.

  Raises:
    ConfigError: the file or the run of init.inherit is missing, a field or argument is unknown, a value
      is impossible, or a field of the encoder has another value than in the run that trained it.
  """
  return complete(_read(path), overrides, path, workdir)


def complete(
  settings: ConfigDict,
  overrides: Sequence[str] = (),
  origin: str = "config",
  workdir: Path | None = None,
) -> ConfigDict:
  """Completes a partial config with the defaults, overrides and fields of another run, and checks it.

  Fields that neither `settings` nor an override sets are copied from another run if init.inherit or
  init.workdir says so (see `load`).

  Args:
    settings: values of some fields, by group.
    overrides: command-line overrides, each as `--config.FIELD=VALUE`, applied in order.
    origin: name of the source of `settings`, for error messages.
    workdir: folder of the run. If the other run has been deleted when this run is resumed, the copied
      fields are read from the config.json in this folder.

  Raises:
    ConfigError: a field is unknown, a value is impossible, the run of init.inherit is missing, or a
      field of the encoder has another value than in the run that trained it.
  """
  config = merge(settings, origin)
  for flag in overrides:
    _override(config, flag)
  explicit = {flag.removeprefix("--config.").partition("=")[0] for flag in overrides}
  explicit |= flatten(settings).keys()
  _inherit(config, explicit, workdir)
  _take_encoder_fields(config, explicit, workdir)
  check(config)
  return config


def of_run(path: str | Path) -> ConfigDict:
  """Reads the config of a run from its config.json.

  Args:
    path: path of the run's workdir, of its folder of checkpoints, or of the folder of one checkpoint.

  Raises:
    ConfigError: the run has no config.json, or the file does not fit this version.
  """
  file = file_of(Path(path))
  if file is None:
    raise ConfigError(f"{path}: expected a workdir of `byolx train`, with a config.json")
  return from_json(file.read_text(), str(file))


def of_encoder(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a flat config that determine what the encoder computes.

  A missing field gets its default.

  Args:
    flat: mapping from field names to values.
  """
  fields, flat = schema.encoder_fields(), flatten(flat)
  return {name: _in_type(flat.get(name, field.default), field) for name, field in fields.items()}


def refuse_other_function(
  run: Mapping[str, Any], pretrained: Mapping[str, Any], task: str, path: str | Path
) -> None:
  """Raises an error if a pretrained encoder would compute other features with the config of a run.

  The fields of `schema.encoder_fields` that are in `run` must be equal, with two exceptions. views.size
  may differ if the task has `own_size`, such as pretraining. model.bn_decay may differ if the encoder's
  running averages are not debiased.

  Args:
    run: fields of the run and their values, all of them or only those that were set explicitly.
    pretrained: config of the run that trained the encoder, as a mapping from field names to values.
    task: name of the run's task.
    path: path of the encoder, for the error message.

  Raises:
    ConfigError: fields of `schema.encoder_fields` differ. The message lists all of them.
  """
  pretrained = of_encoder(pretrained)
  free = {"views.size"} if TASKS[task].own_size else set()
  free |= set() if pretrained["model.bn_debias"] else {"model.bn_decay"}
  differing = [
    f"{name}: {run[name]!r}, but the encoder has {value!r}"
    for name, value in pretrained.items()
    if name in run and name not in free and plain(run[name]) != plain(value)
  ]
  if differing:
    raise ConfigError(
      f"init.workdir={path}: with these fields its encoder would compute another function "
      f"({'; '.join(differing)}); expected the encoder's values, which are used if they are not set"
    )


def encoder_check(run: ConfigDict) -> Callable[[Mapping[str, Any], Path], None]:
  """Returns a function that checks whether a pretrained encoder can be used in a run.

  `pretrained.read` calls the returned function with the config of the run that trained the encoder, and
  the path of the encoder. The returned function raises a ConfigError if the two runs differ in a config
  field that changes what the encoder computes. The docstring of `refuse_other_function` names the
  exceptions.

  Args:
    run: config of the run, with all fields.
  """
  return lambda pretrained, path: refuse_other_function(flatten(run), pretrained, run.task, path)


def value(name: str, text: str) -> Any:
  """Converts the text of an override `--config.NAME=TEXT` to a value of the field's type.

  Args:
    name: name of the field.
    text: text of the value.

  Raises:
    ConfigError: the field is unknown, or the value is impossible.
  """
  config = defaults()
  _override(config, f"--config.{name}={text}")
  check(config)
  return flatten(config)[name]


def merge(settings: ConfigDict, origin: str) -> ConfigDict:
  """Returns a config with all fields: the values of a partial config, and defaults for the other fields.

  Args:
    settings: values of some fields, by group.
    origin: name of the source of `settings`, for error messages.

  Raises:
    ConfigError: a field is unknown, or a value has another type than the default of its field.
  """
  config, fields = defaults(), schema.fields()
  flat = flatten(settings)
  # The task first: if it is unknown, its fields are unknown too, and their error would mislead.
  if (task := flat.get("task")) is not None:
    try:
      _check_field("task", task)
    except ConfigError as error:
      raise ConfigError(f"{origin}: {error}") from None
  for name, value in flat.items():
    if name not in fields:
      raise ConfigError(f"{origin}: {_unknown(name)}")
    try:
      _set(config, name, _in_type(value, fields[name]))
    except TypeError:
      raise ConfigError(f"{origin}: {name}={value!r}: expected {_kind(fields[name])}") from None
  return config


def check(config: ConfigDict) -> None:
  """Checks the value of each field by itself, not whether the values of several fields fit each other.

  Raises:
    ConfigError: a value is impossible.
  """
  for name, value in flatten(config).items():
    _check_field(name, value)


def _check_field(name: str, value: Any) -> None:
  field = schema.fields()[name]
  try:
    expected = field.check(value)
  except TypeError:
    expected = _kind(field)
  if expected:
    raise ConfigError(f"{name}={value!r}: expected {expected}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns the differences of two flat configs, each as a text `field: old -> new`.

  A flat config is a mapping from field names to values. Free fields, on which no result depends, are
  left out.
  """
  fields = schema.fields()
  names = [name for name in {**old, **new} if name not in fields or not fields[name].free]
  return [
    f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
    for name in names
    if plain(old.get(name)) != plain(new.get(name))
  ]


def changes(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a config that differ from their defaults.

  Fields that this version does not have are included.

  Args:
    flat: config as a mapping from field names to values.
  """
  default = flatten(defaults())
  return {
    name: plain(value)
    for name, value in flat.items()
    if name not in default or plain(default[name]) != plain(value)
  }


def fingerprint(config: ConfigDict) -> str:
  """Returns a hash (12 hex digits) of all config fields that can change results, except the seed."""
  fields, others = schema.fields(), schema.other_groups(config.task)
  relevant = {
    name: plain(value)
    for name, value in flatten(config).items()
    if not fields[name].free and name != "seed" and name.partition(".")[0] not in others
  }
  return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def to_json(config: ConfigDict) -> str:
  """Returns a config as JSON, with one line per field and its full name, such as "train.epochs"."""
  return json.dumps(flatten(config), indent=2) + "\n"


def from_json(text: str, origin: str = "config.json") -> ConfigDict:
  """Reads a config from JSON that `to_json` wrote: an object with full field names.

  Args:
    text: JSON of the config.
    origin: name of the file with the text, for error messages.

  Raises:
    ConfigError: the text has a field that this version does not have, or a value is impossible.
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
  config = merge(nested, origin)
  try:
    check(config)
  except ConfigError as error:
    raise ConfigError(f"{origin}: {error}") from None
  return config


def _override(config: ConfigDict, flag: str) -> None:
  """Applies one override `--config.FIELD=VALUE` to a config; the value is converted to the field's type.

  Raises:
    ConfigError: the override has another form, the field is unknown, or the value has another type.
  """
  name, equals, value = flag.removeprefix("--config.").partition("=")
  if not flag.startswith("--config.") or not equals:
    raise ConfigError(f"{flag}: expected --config.FIELD=VALUE")
  fields = schema.fields()
  if name not in fields:
    raise ConfigError(_unknown(name))
  values, argv = flags.FlagValues(), ["byolx", flag]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, ValueError, TypeError):
    raise ConfigError(f"{name}={value!r}: expected {_kind(fields[name])}") from None


def _inherit(config: ConfigDict, explicit: Set[str], workdir: Path | None) -> None:
  """Copies the groups of fields named in init.inherit from the run of init.like or init.workdir.

  Args:
    config: config that is changed.
    explicit: names of the fields that the user has set; they are not copied.
    workdir: folder of the run. If the other run has been deleted, the fields are copied from the
      config.json in this folder.
  """
  run = config.init.like or config.init.workdir
  if not (config.init.inherit and run):
    return
  check(config)
  if stored(run) is None and workdir is not None and (workdir / "config.json").is_file():
    run = str(workdir)
  for name, value in flatten(_config_of(run)).items():
    group, dot, _ = name.partition(".")
    if dot and group in config.init.inherit and name not in explicit:
      _set(config, name, value)


def _take_encoder_fields(config: ConfigDict, explicit: Set[str], workdir: Path | None) -> None:
  """Copies the fields that determine the encoder from the run of init.workdir, which trained it.

  Args:
    config: config that is changed.
    explicit: names of the fields that the user has set; they are not copied.
    workdir: folder of the run. If the run of init.workdir has been deleted, the fields are copied from
      the config.json in this folder.

  Raises:
    ConfigError: a field that the user has set differs from the encoder's.
  """
  if not config.init.workdir:
    return
  check(config)
  pretrained = stored(config.init.workdir)
  if pretrained is None and workdir is not None and (workdir / "config.json").is_file():
    pretrained = stored(workdir)
  if pretrained is None:
    return
  run = {name: value for name, value in flatten(config).items() if name in explicit}
  refuse_other_function(run, pretrained, config.task, config.init.workdir)
  for name, value in of_encoder(pretrained).items():
    if name not in explicit:
      _set(config, name, value)


def _set(config: ConfigDict, name: str, value: Any) -> None:
  *groups, leaf = name.split(".")
  node = config
  for group in groups:
    node = node[group]
  node[leaf] = value


def _config_of(path: str) -> ConfigDict:
  """Reads the config of a run, or the config stored in a checkpoint that is not in a workdir."""
  if file_of(Path(path)) is None and (flat := stored(path)):
    return from_json(json.dumps(flat))
  return of_run(path)


def _kind(field: Field) -> str:
  """Describes the type of a field's values, for error messages."""
  kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
  return kinds.get(type(field.default), "values in brackets, such as (0.1, 1.0)")


def _in_type(value: Any, field: Field) -> Any:
  """Converts an integer value to a float if the field is a float; returns other values as they are."""
  return float(value) if isinstance(field.default, float) and isinstance(value, int) else value


def _unknown(name: str) -> str:
  fields = schema.fields()
  if members := [field for field in fields if field.startswith(f"{name}.")]:
    return f"{name} is a group of fields; expected one of {', '.join(members)}"
  if similar := difflib.get_close_matches(name, fields, n=3, cutoff=0.75):
    return f"unknown field {name}: did you mean {' or '.join(similar)}?"
  group = name.partition(".")[0]
  groups = sorted({field.partition(".")[0] for field in fields})
  choices = [field for field in fields if field.startswith(f"{group}.")] or groups
  return f"unknown field {name}; expected one of {', '.join(choices)}"


def run_file(path: str, flag: str = "--config") -> ModuleType:
  """Imports a Python file by its path: a config file, or a file that registers the user's own task.

  Args:
    path: path of the file.
    flag: name of the command-line argument that gives the path, for error messages.

  Raises:
    ConfigError: the file does not exist, or is not a Python file.
  """
  file = Path(path)
  if not file.is_file():
    files = ", ".join(sorted(str(p) for p in file.parent.glob("*.py"))) or "none in that folder"
    raise ConfigError(f"{flag}={path}: no such file; there are: {files}")
  spec = importlib.util.spec_from_file_location(f"byolx_config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{flag}={path}: expected a Python file with a get_config function")
  module = importlib.util.module_from_spec(spec)
  # dataclasses look up the module in sys.modules while the file runs. It is removed afterwards, so
  # that its classes are pickled by value: worker processes cannot import the module by name.
  sys.modules[spec.name] = module
  try:
    spec.loader.exec_module(module)
  finally:
    del sys.modules[spec.name]
  return module


def _read(path: str) -> ConfigDict:
  """Calls the `get_config` of a config file, and returns its partial config.

  Args:
    path: path of the file, with arguments of `get_config` after a colon: `FILE.py:key=value,...`.

  Raises:
    ConfigError: the file or its `get_config` is missing, or an argument is unknown or invalid.
  """
  name, _, argument = path.partition(":")
  module = run_file(name)
  if not hasattr(module, "get_config"):
    raise ConfigError(f"--config={name}: expected a function get_config in it")
  arguments = _arguments(module.get_config, argument, name)
  try:
    return module.get_config(**arguments)
  except ValueError as error:
    raise ConfigError(f"--config={path}: {error}") from None


def _arguments(function: Callable[..., ConfigDict], text: str, path: str) -> dict[str, Any]:
  """Parses a text such as `arch=resnet200,width=2` to keyword arguments of a function.

  The values are converted to the types of the function's defaults.

  Args:
    function: function that takes the arguments, `get_config` of a config file.
    text: the arguments as text.
    path: path of the config file, for error messages.

  Raises:
    ConfigError: an argument is unknown, or its value has another type than its default.
  """
  parameters = inspect.signature(function).parameters
  arguments = {}
  for part in filter(None, text.split(",")):
    key, equals, value = part.partition("=")
    if not equals or key not in parameters:
      choices = ", ".join(f"{p.name}={p.default}" for p in parameters.values()) or "none"
      raise ConfigError(f"--config={path}:{part}: unknown argument; it takes: {choices}")
    kind = type(parameters[key].default)
    try:
      arguments[key] = kind(value)
    except ValueError:
      raise ConfigError(f"--config={path}:{part}: expected {kind.__name__} for {key}") from None
  return arguments
