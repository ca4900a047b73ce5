"""Trains on Google's Vertex AI with xmanager: one job per run, on GPUs or on a TPU v2 or v3.

Only TPUs of one host machine are possible.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jobs
from jobs import FAILED, Job, xmanager

from byolx.core.config import ConfigError

PROGRAM = "launch/xm_vertex.py"
ROOT = Path(__file__).resolve().parent.parent

_DESCRIPTION = """\
Train on Google's Vertex AI with xmanager: build a container of this folder, and start one job per
run, all at the same time. In the container, a bucket gs://BUCKET is the folder /gcs/BUCKET.

Needs: pip install ".[launch]", docker, `gcloud auth application-default login`, a project, and
GOOGLE_CLOUD_BUCKET_NAME in the environment. For larger TPUs use launch/gcloud_tpu.py.
"""
_EXAMPLES = """\
  python launch/xm_vertex.py --config=configs/pretrain_imagenet.py:epochs=300 --accelerator=tpu_v3=8 \\
    --workdir=gs://bucket/runs/seeds --config.data.folder=gs://bucket/imagenet --grid=seeds --dry_run"""

_EXTRAS = {"tpu_v2": "tpu", "tpu_v3": "tpu", "v100": "gpu", "a100": "gpu", "h100": "gpu"}
"""The optional dependencies of byolx, `tpu` or `gpu`, that each kind of accelerator needs."""

_COUNTS = {"tpu_v2": (8,), "tpu_v3": (8,)}
"""Valid numbers of accelerators per run, by kind; a kind that is missing here allows any number."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Accelerators of one run.

  Args:
    kind: kind of the accelerators by xmanager's name, such as tpu_v3.
    count: number of the accelerators.
  """

  kind: str
  count: int


def accelerator(text: str) -> Accelerator:
  """Parses the kind and the number of a run's accelerators from text such as `tpu_v3=8`.

  Raises:
    ConfigError: the kind is unknown, or Vertex AI does not have this number with xmanager.
  """
  kind, _, count = text.partition("=")
  if kind not in _EXTRAS or not count.isdecimal() or int(count) < 1:
    choices = ", ".join(f"{name}=8" for name in _EXTRAS)
    raise ConfigError(f"--accelerator={text}: expected KIND=COUNT, as {choices}")
  if int(count) not in _COUNTS.get(kind, (int(count),)):
    raise ConfigError(
      f"--accelerator={text}: expected {kind}=8, one host; for more: launch/gcloud_tpu.py"
    )
  return Accelerator(kind, int(count))


def hosted(job: Job) -> Job:
  """Returns a copy of a job with every address gs://BUCKET replaced by the folder /gcs/BUCKET.

  In Vertex AI's containers, that folder shows the bucket.

  Raises:
    ConfigError: the workdir or the folder of the images is not in a bucket.
  """
  fields = job.text_fields()
  if not job.workdir.startswith("gs://"):
    raise ConfigError(f"--workdir={job.workdir}: expected gs://BUCKET/FOLDER")
  if fields["data.source"] != "digits" and not fields["data.folder"].startswith("gs://"):
    raise ConfigError(f"data.folder={fields['data.folder']!r}: expected gs://BUCKET/FOLDER")
  return job.moved(lambda name, address: "/gcs/" + address.removeprefix("gs://"))


def instructions(extra: str) -> list[str]:
  """Returns the lines of the Dockerfile that install byolx, without the first line FROM.

  Args:
    extra: optional dependencies of byolx to install, `tpu` or `gpu`.
  """
  return [
    "RUN apt-get update && apt-get install --yes git",
    "WORKDIR /byolx",
    f"COPY {ROOT.name}/ /byolx",
    f'RUN pip install --no-cache-dir ".[{extra}]"',
  ]


def main(argv: Sequence[str] | None = None) -> int:
  """Trains all runs of a launch on Vertex AI and returns the exit code.

  It is 0 if all runs are done, 1 if one failed, 2 for invalid arguments.

  Args:
    argv: command-line arguments; None for those of this process.
  """
  parser = jobs.parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
  parser.add_argument(
    "--accelerator",
    required=True,
    metavar="KIND=COUNT",
    help=f"accelerator of each run; kinds: {', '.join(_EXTRAS)}",
  )
  arguments, overrides = jobs.parse(parser, sys.argv[1:] if argv is None else argv)
  return jobs.run(PROGRAM, lambda: _launch(arguments, overrides))


def _launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
  requirement = accelerator(arguments.accelerator)
  if not Path(arguments.config.partition(":")[0]).resolve().is_relative_to(ROOT):
    raise ConfigError(
      f"--config={arguments.config}: expected a file in {ROOT}, the container's content"
    )
  runs = [_inside(hosted(job)) for job in jobs.jobs(arguments, overrides)]
  if arguments.dry_run:
    container = {
      "base_image": "python:3.11",
      "instructions": instructions(_EXTRAS[requirement.kind]),
    }
    requirements = {requirement.kind: requirement.count}
    commands = [["byolx", *job.train()] for job in runs]
    actions = {"container": container, "requirements": requirements, "runs": commands}
    print(json.dumps(actions, indent=1))
    return 0
  failed = _run(f"byolx {arguments.grid or 'run'}", runs, requirement)
  for job in failed:
    print(
      f"{PROGRAM}: error: {job.name or 'the run'} failed; next: its log in the Vertex AI console, "
      "then the same command, which goes on where it stopped",
      file=sys.stderr,
    )
  return FAILED if failed else 0


def _run(title: str, runs: Sequence[Job], requirement: Accelerator) -> list[Job]:
  """Starts all runs on Vertex AI, waits for their ends, and returns those that failed.

  Args:
    title: title of xmanager's experiment.
    runs: runs to train.
    requirement: accelerators of each run.
  """
  xm, xm_local = xmanager()
  units = []
  with xm_local.create_experiment(experiment_title=title) as experiment:
    container = xm.python_container(
      executor_spec=xm_local.Vertex.Spec(),
      path=str(ROOT),
      base_image="python:3.11",
      docker_instructions=instructions(_EXTRAS[requirement.kind]),
      entrypoint=xm.CommandList(["cd /byolx", 'byolx "$@"']),
    )
    [executable] = experiment.package([container])
    for job in runs:
      requirements = xm.JobRequirements({requirement.kind: requirement.count})
      executor = xm_local.Vertex(requirements=requirements)
      unit = xm.Job(executable=executable, executor=executor, args=job.train())
      units.append((job, experiment.add(unit)))
    return [job for job, unit in units if not _completed(xm, unit)]


def _completed(xm, unit) -> bool:
  try:
    unit.wait_until_complete().result()
  except xm.ExperimentUnitError:
    return False
  return True


def _inside(job: Job) -> Job:
  """Returns a copy of a job whose config path is relative to the root of the checkout.

  The container has the checkout in its working folder, so the path is valid there.
  """
  name, colon, rest = job.config.partition(":")
  path = Path(name).resolve().relative_to(ROOT).as_posix()
  return dataclasses.replace(job, config=f"{path}{colon}{rest}")


if __name__ == "__main__":
  sys.exit(main())
