"""BYOL in Flax NNX: pretrains image encoders without labels, and evaluates their features.

byolx.load_encoder(path)      loads a pretrained encoder, without its data set
byolx.train(config, workdir)  trains and evaluates one run; takes the user's own images or encoder
byolx.TASKS                   training protocols by name; users add their own here
byolx.Task                    base class of a training protocol
byolx.field                   declares a config field of a training protocol
"""

from typing import Any

from byolx.core.version import VERSION

__version__ = VERSION


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use, so that `byolx --help` need not wait for jax."""
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
