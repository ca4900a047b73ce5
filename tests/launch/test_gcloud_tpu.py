"""The TPU launcher against a gcloud that is a script, which fails at each command, or preempts there."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import fake_gcloud
import gcloud_tpu
import pytest
import tpu_run

HERE = Path(__file__).parent
FRESH = {
  "node": None, "queue": None, "labels": {}, "type": "v3-512", "running": False, "starts": 0,
  "log": "", "calls": [], "commands": [], "ends": [], "fail": {}, "preempt": {}, "coming": {},
  "always": "INTERNAL: try again", "other": False,
}  # fmt: skip
ARGUMENTS = (
  "--config=configs/pretrain_imagenet.py:arch=resnet200,width=2",
  "--name=r200",
  "--zone=europe-west4-a",
  "--accelerator_type=v3-512",
  "--workdir=gs://bucket/runs/r200",
  "--config.data.folder=gs://bucket/imagenet",
)
WHOLE = [
  "describe", "describe_queued", "create_queued", "describe", "describe_queued", "describe",
  "install", "mount", "start", "follow", "describe_queued", "delete_queued",
]  # fmt: skip
"""What is called when all goes well."""


class Cloud:
  """A cloud with a state, in a file; launching in it returns the launcher's exit code."""

  def __init__(self, path: Path, root: Path):
    self._path, self._root = path, root
    self.slept: list[float] = []
    self.set()

  def set(self, **changes):
    self._path.write_text(json.dumps({**FRESH, **changes}))

  @property
  def state(self):
    return json.loads(self._path.read_text())

  def launch(self, *more):
    return gcloud_tpu.main([*ARGUMENTS, *more], self._root, self.slept.append)

  def call(self, argv):
    """In this process what the program does: the same code, a hundred times sooner."""
    out, error = io.StringIO(), io.StringIO()
    state = self.state
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
      code = fake_gcloud.run(list(argv), state)
    self._path.write_text(json.dumps(state))
    return tpu_run.Answer(code, out.getvalue(), error.getvalue())

  def stream(self, argv, on_line):
    answer = self.call(argv)
    for line in answer.out.encode().splitlines(keepends=True):
      on_line(line)
    return answer._replace(out="")


@pytest.fixture
def real_cloud(tmp_path, program, monkeypatch, root):
  """Its gcloud is a program on the PATH."""
  text = (HERE / "fake_gcloud.py").read_text()
  program("gcloud", f"#!{sys.executable} -SE\n{text}")
  monkeypatch.setenv("FAKE_STATE", str(tmp_path / "state.json"))
  monkeypatch.chdir(root)
  return Cloud(tmp_path / "state.json", root)


@pytest.fixture
def cloud(real_cloud, monkeypatch):
  """Its gcloud is called in this process."""
  monkeypatch.setattr(tpu_run, "call", real_cloud.call)
  monkeypatch.setattr(tpu_run, "stream", real_cloud.stream)
  return real_cloud


def errors(capsys) -> list[str]:
  return [line for line in capsys.readouterr().err.splitlines() if "error:" in line]


def test_all_goes_well(real_cloud, capsys):
  assert real_cloud.launch() == 0
  assert real_cloud.state["calls"] == WHOLE
  assert real_cloud.state["node"] is None
  out = capsys.readouterr()
  assert out.out == "line 1\n"
  assert out.err.splitlines() == [
    "requesting v3-512 r200",
    "r200: done; results are in gs://bucket/runs/r200",
    "r200 is deleted",
  ]


def test_the_dry_run_of_512_cores_in_full(cloud, capsys, root):
  assert cloud.launch("--dry_run") == 0
  script = capsys.readouterr().out
  commit = subprocess.run(
    ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
  ).stdout.strip()
  assert script == (HERE / "dry_run_r200.sh").read_text().replace("COMMIT", commit)
  assert cloud.state["calls"] == []


def test_the_dry_run_is_a_script_of_the_very_commands_of_a_launch(real_cloud, capsys, program):
  real_cloud.launch("--dry_run")
  script = capsys.readouterr().out
  real_cloud.set(ends=["running", "ended 75", "ended 0"])
  assert real_cloud.launch() == 0
  launched = real_cloud.state["commands"]
  real_cloud.set(ends=["running", "ended 75", "ended 0"])
  program("sleep", "#!/bin/bash\n")
  done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert real_cloud.state["starts"] == 2
  scripted = real_cloud.state["commands"]
  # Following goes on at another byte each time; looking at the queue is the launcher's own.
  for command in scripted:
    assert command in launched
  unscripted = [command for command in launched if command not in scripted]
  assert {shlex.join(command[:5]) for command in unscripted} == {
    "gcloud compute tpus queued-resources describe",
    "gcloud compute tpus tpu-vm ssh",
  }
  assert all("tail --bytes" in command[-1] for command in unscripted if command[4] == "ssh")


@pytest.mark.parametrize("kind", sorted(set(WHOLE)))
def test_a_passing_failure_of_any_command_is_survived(cloud, kind, capsys):
  cloud.set(fail={kind: ["INTERNAL: try again", "UNAVAILABLE: try again", ""]})
  assert cloud.launch() == 0
  assert cloud.state["node"] is None
  assert cloud.state["starts"] == 1
  assert capsys.readouterr().out == "line 1\n"


@pytest.mark.parametrize(
  ("always", "next_action"),
  [
    ("PERMISSION_DENIED: no", "gcloud projects get-iam-policy"),
    ("You do not currently have an active account selected.", "gcloud auth login"),
    ("INTERNAL: try again", "gcloud compute tpus"),
  ],
)
@pytest.mark.parametrize("kind", sorted(set(WHOLE) - {"follow"}))
def test_a_lasting_failure_of_any_command_ends_with_the_next_action(
  cloud, kind, always, next_action, capsys
):
  cloud.set(fail={kind: ["always"]}, always=always)
  assert cloud.launch() == 1
  said = errors(capsys)
  assert f"{always}; next: {next_action}" in said[-1]
  calls = cloud.state["calls"]
  if kind in ("install", "mount", "start"):
    # Nothing runs, nothing more is paid.
    assert calls[-1] == "delete_queued"
    assert cloud.state["node"] is None
  if kind.startswith("delete"):
    assert "which still costs money" in said[-1]
  most = 5 if always.startswith("INTERNAL") else 1
  assert calls.count(kind) <= 2 * most + 3


def test_a_log_that_cannot_be_had_leaves_the_run_alone_and_says_what_it_costs(cloud, capsys):
  cloud.set(fail={"follow": ["always"]})
  assert cloud.launch() == 75
  [said] = errors(capsys)
  assert "cannot be reached" in said
  assert "may go on, and costs money; next: gcloud compute tpus tpu-vm ssh r200" in said
  assert cloud.state["running"]
  cloud.set(**{**cloud.state, "fail": {}})
  assert cloud.launch() == 0
  assert cloud.state["starts"] == 1


@pytest.mark.parametrize("mode", ["--spot", "--direct"])
@pytest.mark.parametrize("kind", ["install", "mount", "start", "follow"])
def test_a_preemption_at_any_command_is_survived(cloud, kind, mode, capsys):
  cloud.set(preempt={kind: 1})
  assert cloud.launch(mode) == 0
  state = cloud.state
  creates = "create" if mode == "--direct" else "create_queued"
  assert state["calls"].count(creates) == 2
  assert state["node"] is None
  assert state["starts"] == (2 if kind == "follow" else 1)
  assert "deleting it, to request it again" in capsys.readouterr().err


def test_the_log_goes_on_over_connections_stops_and_preemptions(real_cloud, capsys):
  ends = ["running", "broken", "running", "ended 75", "preempted", "lost", "running", "ended 0"]
  real_cloud.set(ends=ends)
  assert real_cloud.launch() == 0
  assert real_cloud.state["starts"] == 4
  # After the preemption it is another machine, with a new log; after the loss it is the same one.
  one, two = [f"line {number}" for number in range(1, 6)], ["line 1", "line 2", "line 3"]
  assert capsys.readouterr().out.splitlines() == one + two


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_run_that_fails_is_not_tried_again_and_paid_no_longer(cloud, code, capsys):
  cloud.set(ends=[f"ended {code}"])
  assert cloud.launch() == code
  said = capsys.readouterr().err
  assert "host-3, exit code 1: byolx: error: process 3: the disk is full" in said
  assert "complete logs are in gs://bucket/runs/r200/logs" in said
  assert cloud.state["node"] is None
  assert cloud.state["starts"] == 1


def test_a_failed_end_shortly_before_the_preemption_shows_is_a_preemption(cloud):
  # The first look after the end finds it preempted.
  cloud.set(ends=["ended 1"], preempt={"describe": 4})
  assert cloud.launch() == 0
  assert cloud.state["starts"] == 2


def test_what_was_asked_to_be_kept_is_kept(cloud, capsys):
  assert cloud.launch("--keep") == 0
  assert cloud.state["node"] == "READY"
  said = capsys.readouterr().err
  assert "costs money; to delete it: gcloud compute tpus queued-resources delete r200" in said
  cloud.set(ends=["ended 1"])
  assert cloud.launch("--keep_on_failure") == 1
  assert cloud.state["node"] == "READY"


def test_restarts_have_an_end(cloud, capsys):
  cloud.set(ends=["ended 75"] * 9)
  assert cloud.launch("--max_restarts=2") == 75
  assert cloud.state["starts"] == 3
  assert "3 stops of r200, more than --max_restarts allows; next: " in errors(capsys)[0]
  cloud.set(ends=["preempted"] * 9)
  assert cloud.launch("--max_restarts=2") == 75


def test_the_launcher_killed_at_any_call_finds_what_is_there(cloud, monkeypatch, capsys):
  real_call, real_stream = tpu_run.call, tpu_run.stream
  for last in range(1, len(WHOLE) + 1):
    cloud.set(ends=["running", "ended 0"])
    left = [last]

    def count(left=left):
      left[0] -= 1
      if not left[0]:
        raise KeyboardInterrupt

    def call(argv, count=count):
      count()
      return real_call(argv)

    def stream(argv, on_line, count=count):
      count()
      return real_stream(argv, on_line)

    monkeypatch.setattr(tpu_run, "call", call)
    monkeypatch.setattr(tpu_run, "stream", stream)
    assert cloud.launch() == 130
    assert "the same command shows the run again" in capsys.readouterr().err
    monkeypatch.setattr(tpu_run, "call", real_call)
    monkeypatch.setattr(tpu_run, "stream", real_stream)
    assert cloud.launch() == 0
    assert cloud.state["starts"] == 1
    assert cloud.state["calls"].count("create_queued") == 1
    assert cloud.state["node"] is None


def test_a_ready_tpu_of_another_is_used_but_never_deleted(cloud, capsys):
  cloud.set(node="READY")
  assert cloud.launch() == 0
  assert cloud.state["node"] == "READY"
  assert "was not created by this launcher: it is not deleted" in capsys.readouterr().err
  cloud.set(node="READY", ends=["preempted"])
  assert cloud.launch() == 1
  assert "was not created by this launcher; next: " in errors(capsys)[0]
  assert cloud.state["node"] == "PREEMPTED"


def test_a_tpu_of_another_type_is_not_touched(cloud, capsys):
  cloud.set(node="READY", type="v4-8", labels={"byolx-launch": "r200"})
  assert cloud.launch() == 2
  assert "r200 is a v4-8, expected v3-512; next: another --name" in errors(capsys)[0]
  assert cloud.state["node"] == "READY"


def test_another_run_of_the_same_name_is_not_touched(cloud, capsys):
  cloud.set(node="READY", labels={"byolx-launch": "r200"}, running=True, other=True)
  assert cloud.launch() == 2
  assert "r200 is running another command as r200; next: gcloud" in errors(capsys)[0]
  assert cloud.state["running"]


@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING"])
def test_a_queue_is_waited_for(cloud, state, capsys):
  labels = {"byolx-launch": "r200"}
  after = [state, state, "SUSPENDED" if state == "SUSPENDING" else "ACTIVE"]
  cloud.set(queue=state, labels=labels, coming={"queue": after})
  assert cloud.launch() == 0
  assert capsys.readouterr().err.count(f"r200 is {state}: waiting") == 1
  assert 30.0 in cloud.slept


def test_a_request_that_fails_says_why(cloud, capsys):
  cloud.set(coming={"queue": ["WAITING_FOR_RESOURCES", "FAILED"]})
  assert cloud.launch() == 1
  assert "the request for the TPU failed: no such type; next: " in errors(capsys)[0]


def test_a_full_zone_is_asked_again(cloud, capsys):
  full = "RESOURCE_EXHAUSTED: There is no more capacity in the zone"
  cloud.set(fail={"create": [*[full] * 20, ""]})
  assert cloud.launch("--direct") == 0
  assert capsys.readouterr().err.count("europe-west4-a has no capacity now") == 1


def test_a_stopped_tpu_is_started(cloud):
  cloud.set(node="STOPPED", labels={"byolx-launch": "r200"})
  assert cloud.launch("--direct") == 0
  assert cloud.state["commands"][1][:6] == ["gcloud", "compute", "tpus", "tpu-vm", "start", "r200"]


def test_stop_saves_and_deletes(cloud):
  cloud.set(node="READY", queue="ACTIVE", labels={"byolx-launch": "r200"}, running=True)
  assert cloud.launch("--stop") == 0
  assert cloud.state["calls"][:3] == ["describe", "stop", "settle"]
  assert (cloud.state["node"], cloud.state["queue"]) == (None, None)


def test_a_grid_runs_cell_after_cell_on_one_tpu_and_stops_at_a_failure(cloud, capsys):
  assert cloud.launch("--grid=seeds") == 0
  assert (cloud.state["calls"].count("create_queued"), cloud.state["starts"]) == (1, 3)
  starts = [command[-1] for command in cloud.state["commands"] if "next.sh" in command[-1]]
  for seed, script in enumerate(starts):
    assert f"--config.seed={seed} " in script
    assert f"--workdir=/mnt/byolx/work/bucket/runs/r200/seed-{seed} " in script
  cloud.set(ends=["ended 0", "ended 1"])
  assert cloud.launch("--grid=seeds") == 1
  assert cloud.state["starts"] == 2
  cloud.set()
  assert cloud.launch("--grid=seeds", "--cell=2") == 0
  [script] = [command[-1] for command in cloud.state["commands"] if "next.sh" in command[-1]]
  assert "--config.seed=2 " in script


def test_private_code_is_uploaded(cloud, root):
  subprocess.run(["git", "-C", root, "remote", "remove", "origin"], check=True)
  assert cloud.launch("--upload") == 0
  calls = cloud.state["calls"]
  assert calls[calls.index("install") - 1] == "scp"
  [copy] = [command for command in cloud.state["commands"] if "scp" in command]
  assert "--worker=all" in copy
  assert copy[5].endswith(".tar.gz")
  assert copy[6] == "r200:"


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--config=configs/none.py"], "--config=configs/none.py: not in commit"),
    (["--config.optim.rat=1"], "unknown field optim.rat"),
    (["--grid=table99"], "--grid=table99: unknown grid"),
    (["--grid=seeds", "--cell=3"], "--cell=3: expected 0 to 2"),
    (["--accelerator_type=v3-500"], "--accelerator_type=v3-500: expected one of v3-8, v3-32"),
    (["--name=R 200"], "--name=R 200: expected at most 40 lower-case letters"),
    (["--workdir=runs/r200"], "--workdir=runs/r200: expected gs://BUCKET/FOLDER"),
    (["--workdir=/home/r200", "--keep"], "which all 64 hosts share"),
    (["--workdir=gs://bucket"], "--workdir=gs://bucket: expected gs://BUCKET/FOLDER"),
    (["--workdir=gs://bucket/a$b"], "expected gs://BUCKET/FOLDER"),
    (["--config.data.folder=imagenet"], "data.folder='imagenet': expected gs://BUCKET/FOLDER"),
    (["--repo=https://me:secret@example.org/x"], "has a user or a token in it"),
    (["--repo=git@example.org:x"], "expected https://..., because hosts have no keys"),
    (["--commit=0123456"], "--commit=0123456: expected a commit"),
    (["--frobnicate"], "unknown argument --frobnicate"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked_for(cloud, more, message, capsys):
  try:
    code = cloud.launch(*more)
  except SystemExit as end:
    code = end.code
  assert code == 2
  said = capsys.readouterr().err
  assert message in said
  assert "secret" not in said
  assert said.count("\n") == 1
  assert cloud.state["calls"] == []


def test_changes_that_would_not_be_launched_are_refused(cloud, root, capsys):
  (root / "configs" / "quickstart.py").write_text("changed = 1\n")
  assert cloud.launch() == 2
  assert "changes are not committed (configs/quickstart.py)" in capsys.readouterr().err
  assert cloud.launch("--commit=HEAD") == 0


def test_a_commit_that_is_not_pushed_is_refused(cloud, root, capsys):
  subprocess.run(["git", "-C", root, "update-ref", "-d", "refs/remotes/origin/main"], check=True)
  assert cloud.launch() == 2
  assert "is on no remote branch; push it first" in capsys.readouterr().err


def test_gcloud_that_is_not_there_is_named(cloud, monkeypatch, capsys, tmp_path):
  (tmp_path / "only").mkdir()
  (tmp_path / "only" / "git").symlink_to("/usr/bin/git")
  monkeypatch.setenv("PATH", str(tmp_path / "only"))
  assert cloud.launch() == 2
  assert "gcloud is not installed; see https://" in capsys.readouterr().err


def test_help_shows_examples():
  script = str(HERE.parents[1] / "launch" / "gcloud_tpu.py")
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, script, "--help"], capture_output=True, text=True, check=True, env=env
  )
  assert "--name=r200 --zone=europe-west4-a --accelerator_type=v3-512" in done.stdout
  assert "table9" in done.stdout
