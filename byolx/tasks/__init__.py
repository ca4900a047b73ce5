"""Tasks: the training protocols, one file each, and the only list of their names.

A protocol of one's own enters by the same door: `byolx.TASKS["name"] = MyTask`.
"""

from byolx.tasks.classify import FineTune, Linear, Supervised
from byolx.tasks.pretrain import Pretrain
from byolx.training.task import Task

TASKS: dict[str, type[Task]] = {
  "pretrain": Pretrain,
  "linear": Linear,
  "finetune": FineTune,
  "supervised": Supervised,
}
"""The protocols by the value of the config field `task`."""

BUILT_IN = frozenset(TASKS)
"""The names of this package's own protocols."""
