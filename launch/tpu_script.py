"""A plan as a shell script: what the launcher does when nothing goes wrong, command by command."""

import shlex
import textwrap
from collections.abc import Sequence

from jobs import STOPPED
from tpu_plan import Plan
from tpu_scripts import RUNNING


def script(plan: Plan, hosts: int, pack: Sequence[str] = ()) -> str:
  """A bash script that could be run.

  Args:
    plan: what is launched.
    hosts: how many the TPU has.
    pack: the command that packs the commit for upload, if it is uploaded.
  """
  tpu = plan.tpu
  parts = [
    "#!/usr/bin/env bash\n"
    + _comment(
      f"{tpu.name}: {tpu.accelerator_type} ({hosts} hosts) in {tpu.zone}. What launch/gcloud_tpu.py "
      "does, in order, when all goes well. Besides, it tries again what fails, finds what is there "
      "already, and when the TPU is taken away deletes it and begins again from the top."
    )
    + "set -euo pipefail"
  ]
  describe = shlex.join(tpu.describe())
  parts.append(
    _comment("Ask for the TPU, and wait until it is there.")
    + f"{shlex.join(tpu.create())}\n"
    + f'until {describe} |\n  grep --quiet \'"state": "READY"\'\n'
    + f"do sleep {plan.poll:g}; done"
  )
  install = [*([list(pack)] if pack else []), *plan.install()]
  parts.append(
    _comment("Install the commit on all hosts, mount what is gs://, and what --setup says.")
    + "\n\n".join(map(shlex.join, install))
  )
  for number, job in enumerate(plan.jobs):
    start, settle = shlex.join(plan.start(job)), shlex.join(plan.settle(job))
    if number:
      parts.append("if [ $code = 0 ]; then")
    parts.append(
      _comment(f"Start {plan.name(job)} on all hosts.") + f"start() {{\n{start}\n}}\nstart"
    )
    parts.append(
      _comment(
        f"Show the log of worker 0 until the run ends. Exit codes: {RUNNING}: it still runs; "
        f"{STOPPED}: it stopped with everything saved, and the same command goes on; "
        "0: done; else: failed."
      )
      + "while true; do\ncode=0\n"
      + f"{shlex.join(plan.follow(job, 0))} || code=$?\n"
      + f"if [ $code = {STOPPED} ]; then\n{settle}\nstart\n"
      + f"elif [ $code != {RUNNING} ]; then break; fi\ndone"
    )
    if number:
      parts.append("fi")
  parts.append(_last(plan))
  return "\n\n".join(parts) + "\n"


def _last(plan: Plan) -> str:
  tpu = plan.tpu
  delete = shlex.join(tpu.delete_queued() if tpu.queued else tpu.delete())
  if plan.keep:
    return _comment(f"The TPU is kept, and costs money. To delete it: {delete}") + "exit $code"
  if plan.keep_on_failure:
    delete = f"if [ $code = 0 ]; then\n{delete}\nfi"
  return _comment("Delete the TPU.") + f"{delete}\nexit $code"


def _comment(text: str) -> str:
  return "".join(f"# {line}\n" for line in textwrap.wrap(text, 98))
