"""Writes a launch as a shell script: the commands that the launcher runs if nothing fails."""

import shlex
import textwrap
from collections.abc import Sequence

from jobs import STOPPED
from tpu_plan import Plan
from tpu_scripts import RUNNING


def script(plan: Plan, hosts: int, pack: Sequence[str] = ()) -> str:
  """Returns a bash script with the commands of a launch, which `--dry_run` prints.

  Args:
    plan: jobs to run, the TPU and other options of the launch.
    hosts: number of host machines of the TPU.
    pack: words of the command that packs the commit into an archive; empty if nothing is uploaded.
  """
  tpu = plan.tpu
  parts = [
    "#!/usr/bin/env bash\n"
    + _comment(
      f"{tpu.name}: {tpu.accelerator_type} ({hosts} hosts) in {tpu.zone}. The commands of "
      "launch/gcloud_tpu.py, in order, if nothing fails. The launcher also retries failed commands, "
      "uses a TPU and a run that exist already, and after a preemption deletes the TPU and starts "
      "again."
    )
    + "set -euo pipefail"
  ]
  describe = shlex.join(tpu.describe())
  parts.append(
    _comment("Request the TPU, and wait until it is ready.")
    + f"{shlex.join(tpu.create())}\n"
    + f'until {describe} |\n  grep --quiet \'"state": "READY"\'\n'
    + f"do sleep {plan.poll:g}; done"
  )
  install = [*([list(pack)] if pack else []), *plan.install()]
  parts.append(
    _comment("Install the commit on all hosts, mount the buckets, and run the command of --setup.")
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
        f"Print the log of worker 0 until the run ends. Exit codes: {RUNNING}: the run goes on; "
        f"{STOPPED}: the run has stopped and saved, and is started again; 0: done; others: failed."
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
    return _comment(f"The TPU is kept and costs money. To delete it: {delete}") + "exit $code"
  if plan.keep_on_failure:
    delete = f"if [ $code = 0 ]; then\n{delete}\nfi"
  return _comment("Delete the TPU.") + f"{delete}\nexit $code"


def _comment(text: str) -> str:
  return "".join(f"# {line}\n" for line in textwrap.wrap(text, 98))
