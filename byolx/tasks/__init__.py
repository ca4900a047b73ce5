"""Tasks: the training protocols, and the dict `TASKS` of their names.

A user's own task is added to the same dict: `byolx.TASKS["name"] = MyTask`.
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
"""Classes of the training protocols, by the value of the config field `task`."""

BUILT_IN = frozenset(TASKS)
"""Names of the tasks that this package defines."""


def is_users_own(name: str) -> bool:
  """Returns whether a task was added to `TASKS` by the user, outside of this package.

  Args:
    name: name of the task, a value of the config field `task`.
  """
  return name not in BUILT_IN
