"""The smallest run that is a run: digits, one residual block, batches of 96."""

_CONFIG = """
from ml_collections import ConfigDict

def get_config():
  view = {"jitter_probability": 0.0, "blur_probability": 0.0, "flip_probability": 0.0}
  config = ConfigDict()
  config.data = {"source": "digits"}
  config.views = {"size": 8, "view1": dict(view), "view2": dict(view)}
  config.model = {
    "arch": "custom", "blocks": (1,), "channels": (8,), "stem": "small", "stem_channels": 8
  }
  config.byol = {"projector_hidden": 16, "predictor_hidden": 16, "projection_size": 8}
  config.eval = {"resize": 8, "fractions": (1.0,)}
"""


def config_text(**groups):
  """The text of a config file; groups of fields are added to, or set in, the tiny run's."""
  groups = {"optim": {"base_rate": 0.3, "warmup_epochs": 0.5}} | groups
  lines = [
    f"  config.{name} = {{**config.get({name!r}, {{}}), **{fields!r}}}\n"
    for name, fields in groups.items()
  ]
  return "".join([_CONFIG, *lines, "  return config\n"])
