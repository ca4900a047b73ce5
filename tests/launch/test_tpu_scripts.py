"""What runs on a host of a TPU, run for real by bash, with a home of its own and a script as `byolx`."""

import os
import signal
import subprocess
import time

import pytest
import tpu_scripts
from launching import git

_PYTHON = """#!/bin/bash
echo "python3 $*" >> "$HOME/did"
if [ "$2" = uv ]; then
  pip="${@: -1}/bin/pip"
  mkdir -p "${@: -1}/bin"
  echo 'echo "pip $*" >> "$HOME/did"' > "$pip"
  chmod +x "$pip"
fi
"""


@pytest.fixture
def host(tmp_path):
  """Runs scripts in a home of its own, where `byolx` is the script given; ends what is left."""
  home = tmp_path / "home"
  bin_folder = home / "byolx" / "src" / ".venv" / "bin"
  bin_folder.mkdir(parents=True)

  def run(script: str, byolx: str = "") -> subprocess.CompletedProcess:
    if byolx:
      written = bin_folder / "byolx.new"  # an earlier byolx may be running, and stays as it is
      written.write_text(f"#!/bin/bash\n{byolx}\n")
      written.chmod(0o755)
      written.replace(bin_folder / "byolx")
    env = {**os.environ, "HOME": str(home)}
    return subprocess.run(
      ["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )

  run.home = home
  run.run_folder = home / "byolx" / "runs" / "r"
  yield run
  for file in home.glob("byolx/runs/*/pid"):
    if file.read_text().strip():
      run(f"kill -KILL {file.read_text()}; true")


def start(workdir, *arguments):
  return tpu_scripts.start("r", arguments, str(workdir))


def follow(start_at=1, seconds=20):
  return tpu_scripts.follow("r", start_at, seconds)


def test_a_run_is_followed_to_its_end_and_its_log_is_kept(host, tmp_path):
  byolx = 'printf "%s\\n" "$@"; sleep 0.5; echo later; exit 3'
  assert host(start(tmp_path / "a b", "train", "--x=(1, 2)", "it's"), byolx).returncode == 0
  seen = host(follow())
  assert seen.stdout == "train\n--x=(1, 2)\nit's\nlater\nbyolx-launch: ended 3\n"
  assert seen.returncode == 3
  [log] = (tmp_path / "a b" / "logs").iterdir()
  assert log.read_text() == "train\n--x=(1, 2)\nit's\nlater\n"


def test_a_connection_ends_and_the_next_one_goes_on_where_it_was(host, tmp_path):
  host(start(tmp_path), "echo one; sleep 4; echo two; exit 0")
  first = host(follow(seconds=1))
  assert (first.stdout, first.returncode) == ("one\nbyolx-launch: running\n", tpu_scripts.RUNNING)
  second = host(follow(start_at=1 + len("one\n")))
  assert (second.stdout, second.returncode) == ("two\nbyolx-launch: ended 0\n", 0)


def test_a_long_log_is_shown_from_near_its_end(host, tmp_path):
  host(start(tmp_path), "seq 10000")
  host(follow())
  size = (host.run_folder / "log").stat().st_size
  lines = host(follow(start_at=0)).stdout.splitlines()
  assert lines[0] == f"byolx-launch: from {size - tpu_scripts.TAIL_BYTES + 1}"
  assert lines[-2:] == ["10000", "byolx-launch: ended 0"]


def test_starting_again_does_nothing_while_it_runs_and_after_a_good_end(host, tmp_path):
  byolx = f"echo started >> {tmp_path}/starts; sleep 1; exit 0"
  for _ in range(3):
    assert host(start(tmp_path), byolx).returncode == 0
  host(follow())
  assert host(start(tmp_path), byolx).returncode == 0
  assert (tmp_path / "starts").read_text() == "started\n"


def test_another_command_of_the_same_name_is_refused_while_one_runs(host, tmp_path):
  host(start(tmp_path, "--seed=0"), "sleep 2; echo $1")
  assert host(start(tmp_path, "--seed=1")).returncode == tpu_scripts.OTHER
  host(follow())
  assert host(start(tmp_path, "--seed=1"), "echo $1").returncode == 0
  assert "--seed=1\nbyolx-launch: ended 0" in host(follow()).stdout


@pytest.mark.parametrize("code", [75, 1])
def test_a_run_that_stopped_or_failed_is_started_again(host, tmp_path, code):
  host(start(tmp_path), f"exit {code}")
  assert host(follow()).returncode == code
  host(start(tmp_path), "exit 0")
  assert host(follow()).returncode == 0


def test_stop_reaches_the_run_itself_which_may_save(host, tmp_path):
  byolx = 'trap "echo saved; exit 75" TERM; echo ready; while true; do sleep 0.1; done'
  host(start(tmp_path), byolx)
  while "ready" not in (host.run_folder / "log").read_text():
    time.sleep(0.05)
  assert host(tpu_scripts.stop("r")).returncode == 0
  seen = host(follow())
  assert (seen.stdout, seen.returncode) == ("ready\nsaved\nbyolx-launch: ended 75\n", 75)
  assert host(tpu_scripts.stop("r")).returncode == 0


def test_a_host_that_was_restarted_has_lost_its_run_and_starts_it_again(host, tmp_path):
  host(start(tmp_path), "sleep 60")
  pid = int((host.run_folder / "pid").read_text())
  os.killpg(os.getpgid(pid), signal.SIGKILL)
  seen = host(follow())
  assert (seen.stdout, seen.returncode) == ("byolx-launch: lost\n", tpu_scripts.LOST)
  host(start(tmp_path), "exit 0")
  assert host(follow()).returncode == 0


def test_a_run_that_the_system_kills_has_an_exit_code(host, tmp_path):
  host(start(tmp_path), "kill -KILL $$")
  assert host(follow()).stdout.endswith("byolx-launch: ended 137\n")


def test_following_what_was_never_started_says_lost(host):
  assert host(follow()).stdout == "byolx-launch: lost\n"


def test_settle_waits_for_the_end(host, tmp_path):
  assert host(tpu_scripts.settle("r")).returncode == 0
  host(start(tmp_path), "sleep 1; exit 75")
  assert host(tpu_scripts.settle("r")).returncode == 0
  assert (host.run_folder / "exit").read_text() == "75\n"


def test_settle_ends_what_does_not_end(host, tmp_path):
  host(start(tmp_path), "sleep 60")
  script = tpu_scripts.settle("r").replace("--timeout=120", "--timeout=1")
  assert host(script).returncode == 0
  assert (host.run_folder / "exit").read_text() == "137\n"


def test_errors_name_host_and_exit_code(host, tmp_path):
  host(start(tmp_path), "echo fine; echo 'byolx: error: process 0: bad'; exit 1")
  host(follow())
  hostname = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
  assert host(tpu_scripts.errors("r")).stdout == (
    f"{hostname}, exit code 1: byolx: error: process 0: bad\n"
  )


def test_install_clones_a_commit_once_and_leaves_a_running_one_alone(host, tmp_path, root, program):
  commit = git(root, "rev-parse", "HEAD")
  program("python3", _PYTHON)
  script = tpu_scripts.install(f"file://{root}", commit)
  done = host(script)
  assert done.returncode == 0, done.stderr
  assert (host.home / "byolx" / "src" / "configs" / "quickstart.py").is_file()
  did = (host.home / "did").read_text()
  assert did.splitlines() == [
    "python3 -m pip install --quiet --user uv",
    "python3 -m uv venv --quiet --seed --python=3.11 src/.venv",
    "pip install --quiet ./src[tpu]",
  ]
  assert host(script).returncode == 0
  assert (host.home / "did").read_text() == did
  host(start(tmp_path), "sleep 5")
  (host.home / "byolx" / "src" / "mark").touch()
  other = tpu_scripts.install(f"file://{root}", "0" * 40)
  assert host(other).returncode == 0
  assert (host.home / "byolx" / "src" / "mark").exists()


def test_install_says_no_where_the_commit_cannot_be_had(host, root, program):
  done = host(tpu_scripts.install(f"file://{root}", "0" * 40))
  assert done.returncode != 0
  assert not (host.home / "byolx" / "installed").exists()


def test_buckets_are_mounted_once_each_with_their_options(host, program, tmp_path):
  for name in ("sudo", "gcsfuse"):
    program(name, f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/did\n')
  program("mountpoint", f'#!/bin/bash\ngrep --quiet "gcsfuse.* $2" {tmp_path}/did 2> /dev/null\n')
  work, folder = tpu_scripts.mounted("gs://bucket/runs/r", tpu_scripts.WORK)
  data, images = tpu_scripts.mounted("gs://bucket/imagenet/", tpu_scripts.DATA)
  assert (folder, images) == ("/mnt/byolx/work/bucket/runs/r", "/mnt/byolx/data/bucket/imagenet")
  script = tpu_scripts.mount([work, data], cache_gb=100)
  for _ in range(2):
    done = host(script)
    assert done.returncode == 0, done.stderr
  lines = (tmp_path / "did").read_text().splitlines()
  of_work, of_data = [line for line in lines if line.startswith("gcsfuse")]
  assert of_work.endswith("--enable-streaming-writes=false bucket /mnt/byolx/work/bucket")
  assert "--rename-dir-limit" in of_work
  assert "--metadata-cache-ttl-secs=0 " in of_work
  assert of_data.endswith("--file-cache-cache-file-for-range-read bucket /mnt/byolx/data/bucket")
  assert "-o=ro " in of_data
  assert "--file-cache-max-size-mb=102400 " in of_data
