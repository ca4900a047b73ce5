"""Tasks: the training protocols, and the registry of their names.

A user's own task is registered in the same dict: `byolx.TASKS["name"] = MyTask`.
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
"""Task classes by the value of the config field `task`."""

BUILT_IN = frozenset(TASKS)
"""Names of the tasks of this package."""


def is_users_own(name: str) -> bool:
  """Returns True if a task was added to `TASKS` from outside of this package."""
  return name not in BUILT_IN
