"""Trains on a Cloud TPU: creates the TPU, installs the code, runs the training, deletes the TPU.

After a preemption the training is started again.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import checkout
import jobs
import tpu_commands
import tpu_script
from jobs import INTERRUPTED, Job
from tpu_plan import Plan
from tpu_run import Launcher, LaunchError

from byolx.cli import numbers
from byolx.core.config import ConfigError
from byolx.planning import tpu

PROGRAM = "launch/gcloud_tpu.py"

_DESCRIPTION = """\
Train on a Cloud TPU of one or more hosts: request the TPU, install this checkout's commit on all
hosts, start `byolx train --distributed`, print its log, restart the run after preemptions until it
is done, and delete the TPU.

The run does not depend on this program. If you end the program and start the same command again, it
finds the TPU and the run and continues to print the log. See docs/launch.md.
"""
_EXAMPLES = """\
  python launch/gcloud_tpu.py --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 \\
    --name=r200 --zone=europe-west4-a --accelerator_type=v3-512 \\
    --workdir=gs://bucket/runs/r200 --config.data.folder=gs://bucket/imagenet --dry_run
  python launch/gcloud_tpu.py --config=configs/pretrain_imagenet.py --grid=seeds --cell=1 \\
    --name=seed1 --spot --zone=us-central2-b --accelerator_type=v4-32 \\
    --workdir=gs://bucket/runs/seeds --config.data.folder=gs://bucket/imagenet
  ... --stop      save and end the run, and delete the TPU"""


def main(
  argv: Sequence[str] | None = None,
  root: Path | None = None,
  sleep: Callable[[float], None] = time.sleep,
) -> int:
  """Starts a training on a Cloud TPU, and prints its log until it ends.

  Args:
    argv: command-line arguments; None for those of this process.
    root: root of the git checkout to launch; None for the checkout that contains this file.
    sleep: function that waits for a number of seconds.

  Returns:
    The exit code: 0 if the training is done, 1 if it failed, 2 for invalid arguments, 75 if the same
    command should be started again, 130 after Ctrl-C.
  """
  parser = _parser()
  arguments, overrides = jobs.parse(parser, sys.argv[1:] if argv is None else argv)
  checkout_root = root or Path(__file__).resolve().parent.parent
  return jobs.run(PROGRAM, lambda: _launch(arguments, overrides, checkout_root, sleep))


def _parser() -> argparse.ArgumentParser:
  parser = jobs.parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
  add = parser.add_argument
  add("--name", required=True, help="name of the TPU; the same name finds it again")
  add("--zone", required=True, help="zone, such as europe-west4-a")
  add(
    "--accelerator_type",
    required=True,
    help="type of the TPU, such as v3-512, v4-32 or v5litepod-16",
  )
  add("--project", default="", help="Google Cloud project; default: gcloud's")
  add("--runtime_version", help="software of the hosts; default: the usual version for the type")
  add(
    "--spot",
    action="store_true",
    help="request a spot TPU, which is cheaper and may be preempted at any time",
  )
  add("--direct", action="store_true", help="create the TPU itself, without a queued resource")
  add("--service_account", default="", help="service account of the hosts; default: the project's")
  add(
    "--create_flag",
    action="append",
    default=[],
    help="further flag of gcloud's create; may be repeated",
  )
  add(
    "--ssh_flag",
    action="append",
    default=[],
    help="further flag of gcloud's ssh, such as --internal-ip; may be repeated",
  )
  add("--repo", help="git address that hosts clone; default: the remote `origin`")
  add("--commit", help="commit to launch; default: HEAD")
  add("--upload", action="store_true", help="copy the commit from this machine, for private code")
  add("--setup", default="", metavar="COMMAND", help="bash command for every host, before the run")
  add(
    "--data_cache_gb",
    type=numbers.index,
    default=0,
    help="GiB of each host's memory for a cache of images from gs://; default: 0",
  )
  add(
    "--cell",
    type=numbers.index,
    metavar="I",
    help="index of the only run of --grid to launch, from 0",
  )
  add(
    "--max_restarts", type=numbers.index, default=50, help="restarts of a run, at most; default: 50"
  )
  add("--keep", action="store_true", help="do not delete the TPU at the end")
  add("--keep_on_failure", action="store_true", help="do not delete the TPU if the run fails")
  add(
    "--poll", type=numbers.seconds, default=30.0, help="seconds between status queries; default: 30"
  )
  add("--stop", action="store_true", help="save and end the run, and delete the TPU")
  return parser


def _launch(
  arguments: argparse.Namespace,
  overrides: list[str],
  root: Path,
  sleep: Callable[[float], None],
) -> int:
  topology = _topology(arguments.accelerator_type)
  with tempfile.TemporaryDirectory() as folder:
    plan = _plan(arguments, overrides, root, Path(folder), topology)
    pack = checkout.archive_command(root, plan.commit, plan.archive) if plan.archive else []
    if arguments.dry_run:
      print(tpu_script.script(plan, topology.hosts, pack), end="")
      return 0
    if not shutil.which("gcloud"):
      raise ConfigError("gcloud is not installed; see https://cloud.google.com/sdk/docs/install")
    if pack:
      subprocess.run(pack, check=True)
    launcher = Launcher(plan, sleep)
    try:
      return launcher.stop() if arguments.stop else launcher.run()
    except LaunchError as error:
      print(f"{PROGRAM}: error: {error}", file=sys.stderr)
      return error.code
    except KeyboardInterrupt:
      print(
        f"\n{PROGRAM}: the run goes on, and the TPU costs money; the same command shows the run "
        "again; with --stop it ends the run and deletes the TPU; to delete the TPU at once: "
        f"{launcher.delete_command()}",
        file=sys.stderr,
      )
      return INTERRUPTED


def _plan(
  arguments: argparse.Namespace,
  overrides: list[str],
  root: Path,
  folder: Path,
  topology: tpu.Topology,
) -> Plan:
  """Checks all arguments and returns the plan of the launch.

  Args:
    arguments: parsed arguments of the launcher.
    overrides: arguments `--config.FIELD=VALUE`.
    root: root of the git checkout to launch.
    folder: temporary folder for the archive of the code.
    topology: TPU slice, such as v3:16x16.

  Raises:
    ConfigError: an argument is not valid.
  """
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", arguments.name):
    raise ConfigError(
      f"--name={arguments.name}: expected at most 40 lower-case letters, digits and dashes, and a "
      "letter first"
    )
  commit = checkout.commit(root, arguments.commit)
  config = checkout.relative_config(root, arguments.config, commit)
  selected = jobs.jobs(arguments, overrides)
  if arguments.cell is not None:
    if arguments.cell >= len(selected):
      raise ConfigError(f"--cell={arguments.cell}: expected 0 to {len(selected) - 1}")
    selected = [selected[arguments.cell]]
  for job in selected:
    _check_folders(job, arguments, topology)
  return Plan(
    tpu=tpu_commands.Tpu(
      name=arguments.name,
      zone=arguments.zone,
      accelerator_type=arguments.accelerator_type,
      runtime_version=arguments.runtime_version or tpu_commands.RUNTIMES[topology.generation.name],
      project=arguments.project,
      queued=not arguments.direct,
      spot=arguments.spot,
      service_account=arguments.service_account,
      create_flags=tuple(arguments.create_flag),
      ssh_flags=tuple(arguments.ssh_flag),
    ),
    jobs=tuple(selected),
    config=config,
    source="" if arguments.upload else checkout.source(root, arguments.repo, commit),
    commit=commit,
    archive=str(folder / f"byolx-{commit}.tar.gz") if arguments.upload else "",
    cache_gb=arguments.data_cache_gb,
    setup=arguments.setup,
    max_restarts=arguments.max_restarts,
    keep=arguments.keep,
    keep_on_failure=arguments.keep_on_failure,
    poll=arguments.poll,
  )


def _topology(accelerator_type: str) -> tpu.Topology:
  try:
    return tpu.topology(accelerator_type)
  except ConfigError as error:
    reason = str(error).replace("--topology=", "--accelerator_type=")
    raise ConfigError(reason) from None


def _check_folders(job: Job, arguments: argparse.Namespace, topology: tpu.Topology) -> None:
  """Checks by their addresses that all hosts of the TPU can use the workdir and the images' folder.

  The workdir must also outlive the TPU.

  Args:
    job: training run to check.
    arguments: parsed arguments of the launcher.
    topology: TPU slice, which gives the number of hosts.

  Raises:
    ConfigError: the workdir or the folder of the images is not valid.
  """
  fields = job.moved(lambda name, address: address).text_fields()
  if not job.workdir.startswith("gs://"):
    permanent = arguments.setup or (arguments.keep and topology.hosts == 1)
    if not job.workdir.startswith("/") or not permanent:
      raise ConfigError(
        f"--workdir={job.workdir}: expected gs://BUCKET/FOLDER, which all {topology.hosts} hosts "
        "share and which outlives the TPU; or an absolute folder and a --setup that mounts it"
      )
  folder = fields["data.folder"]
  usable = folder.startswith("gs://") or (folder.startswith("/") and arguments.setup)
  if fields["data.source"] != "digits" and not usable:
    raise ConfigError(
      f"data.folder={folder!r}: expected gs://BUCKET/FOLDER, or an absolute folder and a --setup "
      "that mounts or fills it on every host"
    )


if __name__ == "__main__":
  sys.exit(main())
