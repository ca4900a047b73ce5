"""From a file of `configs/` to a whole config.

A file sets some fields; the others keep their defaults (`byolx.runs.schema`). `load` merges file,
defaults and `--config.field=value` overrides, and refuses unknown names and impossible values in one
line that names the field, the value and the choices.
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
  """A fresh ConfigDict of every field's default."""
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
  """Reads `FILE.py[:key=value,...]`, merges it into the defaults, applies overrides, checks values.

  Args:
    path: a config file, with an optional argument for its `get_config` after a colon.
    overrides: `--config.field=value` in the order given.
    workdir: folder of the run: a run that goes on has inherited fields there, also where the run that
      it took them from was deleted since.

  Fields of the groups in init.inherit that neither file nor overrides set are those of another run.
  With init.workdir, the fields that go with an encoder (`schema.encoder_fields`) are always those of that
  encoder; see `refuse_other_function`. A run that is not there yet gives no fields, and is refused
  when its encoder is read.

  Raises:
    ConfigError: missing file, unknown field or argument, impossible value; file or overrides say of
      an encoder what its checkpoint does not.
  """
  return complete(_read(path), overrides, path, workdir)


def complete(
  given: ConfigDict,
  overrides: Sequence[str] = (),
  origin: str = "config",
  workdir: Path | None = None,
) -> ConfigDict:
  """Merges fields into the defaults, applies overrides, takes inherited fields, checks values.

  Args:
    given: some fields, by group.
    overrides: `--config.FIELD=VALUE`, applied in order.
    origin: name of the source of the fields, for messages.
    workdir: see `load`.

  Raises:
    ConfigError: see `load`.
  """
  config = merge(given, origin)
  for flag in overrides:
    _override(config, flag)
  named = {flag.removeprefix("--config.").partition("=")[0] for flag in overrides}
  named |= flatten(given).keys()
  _inherit(config, named, workdir)
  _take_encoder_fields(config, named, workdir)
  check(config)
  return config


def of_run(path: str | Path) -> ConfigDict:
  """The config of a run, given its workdir, its folder of checkpoints, or one of these.

  Raises:
    ConfigError: there is none.
  """
  file = file_of(Path(path))
  if file is None:
    raise ConfigError(f"{path}: expected a workdir of `byolx train`, with a config.json")
  return from_json(file.read_text(), str(file))


def of_encoder(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a flat config that go with its encoder; missing ones have their defaults."""
  fields, flat = schema.encoder_fields(), flatten(flat)
  return {name: _in_type(flat.get(name, field.default), field) for name, field in fields.items()}


def refuse_other_function(
  here: Mapping[str, Any], there: Mapping[str, Any], task: str, path: str | Path
) -> None:
  """Refuses fields by which an encoder would compute another function of the same weights.

  A task with `own_size`, such as pretraining, may go on at another views.size; others take the encoder's.
  model.bn_decay counts only where the encoder's running averages are debiased.

  Args:
    here: flat fields of the run, all of them or those that were given.
    there: flat config of the run that trained the encoder.
    task: that of the run.
    path: where the encoder is, for the message.

  Raises:
    ConfigError: fields of `schema.encoder_fields` differ; all of them are listed.
  """
  there = of_encoder(there)
  free = {"views.size"} if TASKS[task].own_size else set()
  free |= set() if there["model.bn_debias"] else {"model.bn_decay"}
  differing = [
    f"{name}: {value!r} there, {here[name]!r} here"
    for name, value in there.items()
    if name in here and name not in free and plain(here[name]) != plain(value)
  ]
  if differing:
    raise ConfigError(
      f"init.workdir={path}: its encoder would compute another function here ({'; '.join(differing)});"
      " expected its own values, which are taken where these fields are not given"
    )


def encoder_check(run: ConfigDict) -> Callable[[Mapping[str, Any], Path], None]:
  """What `pretrained.read` asks of an encoder that a run starts from, see `refuse_other_function`."""
  return lambda there, path: refuse_other_function(flatten(run), there, run.task, path)


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
  config, fields = defaults(), schema.fields()
  flat = flatten(given)
  if (task := flat.get("task")) is not None:  # fields of an unknown task are unknown too
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
  """Checks every field by itself; combinations are checked where they are used."""
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
  """Lines `field: old -> new` of what differs and shapes results; both are flat."""
  fields = schema.fields()
  names = [name for name in {**old, **new} if name not in fields or not fields[name].free]
  return [
    f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
    for name in names
    if plain(old.get(name)) != plain(new.get(name))
  ]


def changes(flat: Mapping[str, Any]) -> dict[str, Any]:
  """What of a flat config is not the default; fields of other versions count."""
  usual = flatten(defaults())
  return {
    name: plain(value)
    for name, value in flat.items()
    if name not in usual or plain(usual[name]) != plain(value)
  }


def fingerprint(config: ConfigDict) -> str:
  """Twelve hex digits that tell configs apart in what shapes results, the seed aside."""
  fields, others = schema.fields(), schema.other_groups(config.task)
  shaping = {
    name: plain(value)
    for name, value in flatten(config).items()
    if not fields[name].free and name != "seed" and name.partition(".")[0] not in others
  }
  return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]


def to_json(config: ConfigDict) -> str:
  """The flat config as JSON, one field a line."""
  return json.dumps(flatten(config), indent=2) + "\n"


def from_json(text: str, origin: str = "config.json") -> ConfigDict:
  """The config that `to_json` wrote.

  Args:
    text: JSON of a flat config.
    origin: file that the text comes from, for messages.

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
  config = merge(nested, origin)
  try:
    check(config)
  except ConfigError as error:
    raise ConfigError(f"{origin}: {error}") from None
  return config


def _override(config: ConfigDict, flag: str) -> None:
  """Sets one field as `--config.field=value` says, in the field's own type."""
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


def _inherit(config: ConfigDict, given: Set[str], workdir: Path | None) -> None:
  """Sets the fields of init.inherit that are not given as the other run has them."""
  run = config.init.like or config.init.workdir
  if not (config.init.inherit and run):
    return
  check(config)
  if stored(run) is None and workdir is not None and (workdir / "config.json").is_file():
    run = str(workdir)
  for name, value in flatten(_config_of(run)).items():
    group, dot, _ = name.partition(".")
    if dot and group in config.init.inherit and name not in given:
      _set(config, name, value)


def _take_encoder_fields(config: ConfigDict, given: Set[str], workdir: Path | None) -> None:
  """Sets the fields that go with the encoder of init.workdir; refuses given ones that differ."""
  if not config.init.workdir:
    return
  check(config)
  there = stored(config.init.workdir)
  if there is None and workdir is not None and (workdir / "config.json").is_file():
    there = stored(workdir)
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


def _config_of(path: str) -> ConfigDict:
  """The config of a run, or of a checkpoint that lies alone."""
  if file_of(Path(path)) is None and (flat := stored(path)):
    return from_json(json.dumps(flat))
  return of_run(path)


def _kind(field: Field) -> str:
  """What a field takes, in words."""
  kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
  return kinds.get(type(field.default), "values in brackets, such as (0.1, 1.0)")


def _in_type(value: Any, field: Field) -> Any:
  """A whole number as a float, where the field is one."""
  return float(value) if isinstance(field.default, float) and isinstance(value, int) else value


def _unknown(name: str) -> str:
  fields = schema.fields()
  if below := [field for field in fields if field.startswith(f"{name}.")]:
    return f"{name} is a group of fields; expected one of {', '.join(below)}"
  if near := difflib.get_close_matches(name, fields, n=3, cutoff=0.75):
    return f"unknown field {name}: did you mean {' or '.join(near)}?"
  group = name.partition(".")[0]
  groups = sorted({field.partition(".")[0] for field in fields})
  choices = [field for field in fields if field.startswith(f"{group}.")] or groups
  return f"unknown field {name}; expected one of {', '.join(choices)}"


def run_file(path: str, flag: str = "--config") -> ModuleType:
  """Runs a Python file: a config, which may register a task of the user's own.

  Args:
    path: the file.
    flag: argument of the command that named it, for messages.

  Raises:
    ConfigError: there is no such file, or it is not Python.
  """
  file = Path(path)
  if not file.is_file():
    beside = ", ".join(sorted(str(p) for p in file.parent.glob("*.py"))) or "none in that folder"
    raise ConfigError(f"{flag}={path}: no such file; there are: {beside}")
  spec = importlib.util.spec_from_file_location(f"byolx_config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{flag}={path}: expected a Python file with a get_config function")
  module = importlib.util.module_from_spec(spec)
  # Classes find their module by name while the file runs. It does not stay there, so that worker
  # processes, which cannot import it, are sent its classes whole.
  sys.modules[spec.name] = module
  try:
    spec.loader.exec_module(module)
  finally:
    del sys.modules[spec.name]
  return module


def _read(path: str) -> ConfigDict:
  """Runs the file's `get_config`, whose signature's defaults type its arguments."""
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
