"""The xmanager launchers, with a stand-in that keeps what it is given; and the real one, where it is."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import xm_local
import xm_vertex
from tiny import config_text

from byolx.core.config import ConfigError


class UnitError(RuntimeError):
  """As xmanager's ExperimentUnitError."""


class Experiment:
  """Keeps the jobs; those whose arguments hold `fail` fail; counts how many run at a time."""

  def __init__(self, title):
    self.title, self.packed, self.jobs, self.most, self._now = title, [], [], 0, 0

  def package(self, specs):
    self.packed += specs
    return specs

  def add(self, job):
    self.jobs.append(job)
    return Unit(self, job)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None

  async def __aenter__(self):
    return self

  async def __aexit__(self, *_):
    return None


class Unit:
  def __init__(self, experiment, job):
    self._experiment = experiment
    self._fails = any("0.2" in word for word in [*job.arguments, *job.executable.arguments])

  def __await__(self):
    async def itself():
      return self

    return itself().__await__()

  def wait_until_complete(self):
    return Completion(self._experiment, self._fails)


class Completion:
  def __init__(self, experiment, fails):
    self._experiment, self._fails = experiment, fails

  def result(self):
    if self._fails:
      raise UnitError

  def __await__(self):
    self._experiment._now += 1
    self._experiment.most = max(self._experiment.most, self._experiment._now)
    yield from asyncio.sleep(0.01).__await__()
    self._experiment._now -= 1
    self.result()


def spec(**known):
  return types.SimpleNamespace(**{"arguments": known.pop("args", []), **known})


@pytest.fixture
def made(monkeypatch):
  """The experiments that launchers make."""
  experiments = []

  def create_experiment(experiment_title):
    experiments.append(Experiment(experiment_title))
    return experiments[-1]

  executor = type(
    "Executor", (), {"Spec": str, "__init__": lambda self, **known: vars(self).update(known)}
  )
  xm = types.SimpleNamespace(
    binary=spec, python_container=spec, Job=spec, CommandList=list, JobRequirements=dict,
    ExperimentUnitError=UnitError,
  )  # fmt: skip
  local = types.SimpleNamespace(
    Local=executor, Vertex=executor, create_experiment=create_experiment
  )
  package = types.ModuleType("xmanager")
  package.xm, package.xm_local = xm, local
  monkeypatch.setitem(sys.modules, "xmanager", package)
  return experiments


def test_local_runs_are_the_cells_each_on_cores_of_its_own(made, monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1}, raising=False)
  assert xm_local.main(
    ["--config=configs/quickstart.py", "--workdir=runs/s", "--grid=seeds", "--config.train.epochs=2"]
  ) == 0  # fmt: skip
  [experiment] = made
  assert experiment.title == "byolx seeds"
  assert experiment.most == 2
  commands = [[packed.path, *packed.arguments] for packed in experiment.packed]
  pin = [[shutil.which("taskset"), "--cpu-list", core] for core in ("1", "3")]
  assert [command[:3] for command in commands[:2]] == pin
  for seed, command in enumerate(commands):
    assert command[3:] == [
      sys.executable, "-m", "byolx", "train", "--config=configs/quickstart.py",
      "--config.train.epochs=2", f"--config.seed={seed}", f"--workdir=runs/s/seed-{seed}",
    ]  # fmt: skip


def test_a_local_run_that_fails_is_named_with_its_command(made, capsys):
  arguments = ["--config=configs/quickstart.py", "--workdir=runs/r", "--grid=table15_rate"]
  assert xm_local.main(arguments) == 1
  said = capsys.readouterr().err
  assert said.count("error:") == 1
  assert "error: base-rate-0p2 failed; next: " in said
  assert len(made[0].jobs) == 7


def test_local_dry_run_prints_commands_and_needs_no_xmanager(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "xmanager", None)
  arguments = ["--config=configs/quickstart.py", "--workdir=runs/s", "--grid=seeds"]
  assert xm_local.main([*arguments, "--dry_run"]) == 0
  assert capsys.readouterr().out.count("byolx train --config=configs/quickstart.py") == 3
  assert xm_local.main(arguments) == 2
  assert "install it with: pip install '.[launch]'" in capsys.readouterr().err


def test_cores_are_shared_out_whole():
  assert xm_local.slots([0, 1, 4, 5, 7], 2) == [[0, 1], [4, 5]]
  with pytest.raises(ConfigError, match="--cores=3: expected at most the 2 of this machine"):
    xm_local.slots([0, 1], 3)


VERTEX = (
  "--config=configs/pretrain_imagenet.py:epochs=300",
  "--workdir=gs://bucket/runs",
  "--config.data.folder=gs://bucket/imagenet",
)


def test_vertex_starts_a_container_for_every_cell(made):
  assert xm_vertex.main([*VERTEX, "--accelerator=tpu_v3=8", "--grid=seeds"]) == 0
  [experiment] = made
  [container] = experiment.packed
  assert container.docker_instructions[-1] == 'RUN pip install --no-cache-dir ".[tpu]"'
  assert container.entrypoint == ["cd /byolx", 'byolx "$@"']
  assert [job.executor.requirements for job in experiment.jobs] == [{"tpu_v3": 8}] * 3
  assert experiment.jobs[1].arguments == [
    "train", "--config=configs/pretrain_imagenet.py:epochs=300", "--config.seed=1",
    "--config.data.folder=/gcs/bucket/imagenet", "--workdir=/gcs/bucket/runs/seed-1",
  ]  # fmt: skip


def test_vertex_names_runs_that_failed(made, capsys):
  assert xm_vertex.main([*VERTEX, "--accelerator=a100=4", "--grid=table15_rate"]) == 1
  assert "error: base-rate-0p2 failed; next: its log" in capsys.readouterr().err


def test_vertex_dry_run_prints_all_it_would_ask_for(capsys):
  assert xm_vertex.main([*VERTEX, "--accelerator=h100=8", "--dry_run"]) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed["requirements"] == {"h100": 8}
  assert printed["container"]["instructions"][-1].endswith('".[gpu]"')
  assert printed["runs"][0][-1] == "--workdir=/gcs/bucket/runs"


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--accelerator=tpu_v4=8"], "--accelerator=tpu_v4=8: expected KIND=COUNT, as tpu_v2=8"),
    (["--accelerator=tpu_v3=32"], "for more: launch/gcloud_tpu.py"),
    (["--accelerator=a100=1", "--workdir=runs"], "--workdir=runs: expected gs://BUCKET/FOLDER"),
    (["--accelerator=a100=1", "--config.data.folder=x"], "data.folder='x': expected gs://"),
    (["--accelerator=a100=1", "--config=/etc/x.py"], "the container's content"),
    (["--accelerator=a100=1", "--grid=nine"], "--grid=nine: unknown grid"),
  ],
)
def test_vertex_refuses_what_cannot_be(more, message, capsys):
  assert xm_vertex.main([*VERTEX, *more]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_real_xmanager_runs_two_side_by_side(tmp_path):
  """With BYOLX_XM_PYTHON, or this Python, where xmanager can be imported."""
  python = os.environ.get("BYOLX_XM_PYTHON", sys.executable)
  if python == sys.executable and importlib.util.find_spec("xmanager") is None:
    pytest.skip("xmanager is not here: pip install '.[launch]', or set BYOLX_XM_PYTHON")
  (tmp_path / "tiny.py").write_text(config_text(train={"epochs": 1.0, "batch_size": 96}))
  arguments = [f"--config={tmp_path}/tiny.py", f"--workdir={tmp_path}/runs", "--grid=seeds"]
  done = subprocess.run(
    [python, xm_local.__file__, *arguments],
    env={**os.environ, "HOME": str(tmp_path), "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  records = [
    json.loads((tmp_path / f"runs/seed-{seed}/results.json").read_text()) for seed in range(3)
  ]
  assert [each[0]["seed"] for each in records] == [0, 1, 2]
