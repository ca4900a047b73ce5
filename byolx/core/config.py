"""What every wing needs of configs: the error, flat names, and the config that goes with a checkpoint.

Fields with their defaults and checks are `byolx.runs.schema`, files and overrides `byolx.runs.config`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
  """A field, a value, or a combination of them that cannot run. The message is one line."""


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Dotted names to values; lists become tuples."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = tuple(value) if isinstance(value, list | tuple) else value
  return flat


def plain(value: Any) -> Any:
  """A tuple as the list that JSON makes of it; any other value as it is."""
  return list(value) if isinstance(value, tuple | list) else value


def stored(path: str | Path) -> dict[str, Any] | None:
  """The flat config that goes with a checkpoint, not checked; None where there is none.

  Args:
    path: a workdir, a folder of checkpoints, or one checkpoint.

  Returns:
    The config in the newest record that can be read; without one, that of the workdir's config.json.

  Raises:
    ConfigError: the config.json is not as a run writes it.
  """
  try:
    for record in _records(Path(path)):
      try:
        flat = json.loads(record.read_bytes())["record"]["meta"].get("config")
      except (OSError, ValueError, KeyError, TypeError, AttributeError):
        continue  # a damaged checkpoint is named when its arrays are read
      if flat:
        return flatten(flat)
      break
    file = file_of(Path(path))
    text = None if file is None else file.read_text()
  except OSError:  # a path that cannot be looked at, such as one whose name is too long
    return None
  try:
    return None if text is None else flatten(json.loads(text))
  except (ValueError, AttributeError):
    raise ConfigError(f"{file}: expected the fields of a run as JSON") from None


def file_of(path: Path) -> Path | None:
  """The config.json of a workdir, of its folder of checkpoints, or of one of these."""
  files = [folder / "config.json" for folder in (path, *path.absolute().parents[:2])]
  return next((file for file in files if file.is_file()), None)


def _records(path: Path) -> list[Path]:
  """The records of a workdir, of a folder of checkpoints, or of one checkpoint; newest first."""
  if (path / "record").is_dir():
    return [path / "record" / "record.json"]
  inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  names = [folder.name for folder in inside.iterdir()] if inside.is_dir() else []
  steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
  return [inside / str(step) / "record" / "record.json" for step in steps]
