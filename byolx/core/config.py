"""Configs: the error class, flattening, and the config that is stored with a checkpoint.

The fields with defaults and checks are in `byolx.runs.schema`; config files and overrides are
loaded by `byolx.runs.config`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
  """Raised for an unknown config field, an impossible value, or values that are impossible together.

  The message is one line.
  """


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens a nested config to a dictionary of values by dotted names, such as `optim.name`.

  Lists become tuples.

  Args:
    config: nested config.
    prefix: text put before all names, such as `optim.`.
  """
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = tuple(value) if isinstance(value, list | tuple) else value
  return flat


def plain(value: Any) -> Any:
  """Converts a tuple to a list, as JSON does; returns any other value unchanged."""
  return list(value) if isinstance(value, tuple | list) else value


def stored(path: str | Path) -> dict[str, Any] | None:
  """Reads the config that was stored with a checkpoint, without checking its fields.

  Args:
    path: workdir, folder of checkpoints, or folder of one checkpoint.

  Returns:
    The config as values by dotted name. It is read from the newest readable checkpoint. If this
    checkpoint has no config, or if no checkpoint is readable, the config is read from the workdir's
    config.json. None if this file is missing too.

  Raises:
    ConfigError: the config.json is not a JSON object.
  """
  try:
    for record in _records(Path(path)):
      try:
        flat = json.loads(record.read_bytes())["record"]["meta"].get("config")
      except (OSError, ValueError, KeyError, TypeError, AttributeError):
        continue  # a damaged checkpoint is reported when its arrays are read
      if flat:
        return flatten(flat)
      break
    file = file_of(Path(path))
    text = None if file is None else file.read_text()
  except OSError:  # an impossible path, such as a name that is too long
    return None
  try:
    return None if text is None else flatten(json.loads(text))
  except (ValueError, AttributeError):
    raise ConfigError(f"{file}: expected the fields of a run as JSON") from None


def file_of(path: Path) -> Path | None:
  """Finds the config.json of a workdir.

  Args:
    path: workdir, its folder of checkpoints, or the folder of one checkpoint.

  Returns:
    Path of the file; None if there is none.
  """
  files = [folder / "config.json" for folder in (path, *path.absolute().parents[:2])]
  return next((file for file in files if file.is_file()), None)


def _records(path: Path) -> list[Path]:
  """Returns the paths of the record.json files of checkpoints, those of the latest steps first.

  Args:
    path: workdir, folder of checkpoints, or folder of one checkpoint.
  """
  if (path / "record").is_dir():
    return [path / "record" / "record.json"]
  inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  names = [folder.name for folder in inside.iterdir()] if inside.is_dir() else []
  steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
  return [inside / str(step) / "record" / "record.json" for step in steps]
