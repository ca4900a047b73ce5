"""BYOL in Flax NNX: pretrain image encoders without labels, and measure what they know.

byolx.load_encoder(path)      a pretrained encoder, without its data set
byolx.train(config, workdir)  one run, with images or an encoder of one's own
byolx.TASKS                   the protocols by name; one's own are added here
byolx.Task, byolx.field       what a protocol inherits from, and how it declares a config field
"""

from typing import Any

from byolx.core.version import VERSION

__version__ = VERSION


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use: `byolx --help` must not wait for jax."""
  match name:
    case "load_encoder":
      from byolx.checkpoints.load import load_encoder as value
    case "train":
      from byolx.runs.run import train as value
    case "TASKS":
      from byolx.tasks import TASKS as value
    case "Task":
      from byolx.training.task import Task as value
    case "field":
      from byolx.core.fields import field as value
    case _:
      raise AttributeError(f"module 'byolx' has no attribute {name!r}")
  return value
