"""Two processes with four devices each are one run: same numbers, one writer, one end."""

import contextlib
import io
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from processes import CONFIG, Processes

from byolx import cli

pytestmark = pytest.mark.usefixtures("compiled")

STEPS = 12
TOLERANCE = 1e-4
"""Of the metrics, relative: sums over devices have another order; 4e-6 was seen."""
RESUME = 75


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A config file."""
  file = tmp_path_factory.mktemp("config") / "tiny.py"
  file.write_text(CONFIG)
  return file


@pytest.fixture(scope="module")
def start(path, compiled):
  """Starts two processes; they end with the tests."""
  started = []

  def begin(workdir, *overrides, **more):
    started.append(Processes(path, workdir, *overrides, env=compiled, **more))
    return started[-1]

  yield begin
  for processes in started:
    processes.kill()


@pytest.fixture(scope="module")
def running(start, tmp_path_factory):
  """A run of two processes with four devices each."""
  return start(tmp_path_factory.mktemp("together") / "run")


@pytest.fixture(scope="module")
def alone(running, path, tmp_path_factory):
  """The workdir of an undisturbed run of one process with eight devices: this one."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  assert train_alone(path, workdir) == 0
  return workdir


@pytest.fixture(scope="module")
def together(running, alone):
  """The undisturbed run of two processes, at its end."""
  assert running.wait() == [0, 0], running.said(0) + running.said(1)
  return running


def train_alone(path, workdir):
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    return cli.main(["train", f"--config={path}", f"--workdir={workdir}"])


def rows(workdir):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for row in found:
    del row["images_per_second"]
  return found


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def same_run(ours, theirs, tolerance):
  assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [*range(1, STEPS + 1)]
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_two_processes_measure_what_one_does(together, alone):
  ours, theirs = rows(together.workdir), rows(alone)
  same_run(ours, theirs, TOLERANCE)
  # Another order of the records would change these far more.
  assert np.ptp([row["loss"] for row in theirs]) > 100 * TOLERANCE


def test_two_processes_evaluate_as_one_does(together, alone):
  ours, theirs = results(together.workdir), results(alone)
  assert {record["encoder"] for record in ours} == {"online", "target", "random", "pixels"}
  for a, b in zip(ours, theirs, strict=True):
    # Two of the 360 test images may change sides where features differ by rounding.
    assert a.pop("value") == pytest.approx(b.pop("value"), abs=2.5 / 360), (a, b)
    assert a == b


def test_only_process_0_writes_and_prints(together, alone):
  names = {path.name for path in alone.iterdir()}
  assert {path.name for path in together.workdir.iterdir()} == names
  assert len(list((together.workdir / "tensorboard").iterdir())) == 1
  assert f"step {STEPS}/{STEPS}" in together.said(0)
  assert "linear probe" in together.said(0)
  assert together.said(1) == ""


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_is_named_and_both_go_on_bit_for_bit(start, together, tmp_path, lost):
  other = 1 - lost
  processes = start(tmp_path / "run", "eval.max_train=20")
  processes.until(lambda: (tmp_path / "run" / "checkpoints" / "4").exists())
  processes.all[lost].kill()
  began = time.monotonic()
  assert processes.wait(60)[other] == RESUME
  assert time.monotonic() - began < 30
  said = [line for line in processes.said(other).splitlines() if line.startswith("byolx: error")]
  assert len(said) == 1, said
  assert re.match(rf"byolx: error: process {other}: process {lost} \(.+\) is lost", said[0])
  again = start(tmp_path / "run", "eval.max_train=20")
  assert again.wait() == [0, 0], again.said(0) + again.said(1)
  assert re.search(r"going on from step (4|8|12) of 12", again.said(0))
  assert rows(tmp_path / "run") == rows(together.workdir)


def test_one_process_goes_on_with_what_two_have_saved(path, together, alone, tmp_path):
  workdir = cut_back(together.workdir, tmp_path / "run")
  assert train_alone(path, workdir) == 0
  same_run(rows(workdir), rows(alone), TOLERANCE)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_has_saved(start, alone, tmp_path):
  workdir = cut_back(alone, tmp_path / "run")
  processes = start(workdir)
  assert processes.wait() == [0, 0], processes.said(0) + processes.said(1)
  assert "going on from step 4 of 12" in processes.said(0)
  same_run(rows(workdir), rows(alone), TOLERANCE)


def cut_back(done, workdir):
  """A copy of a finished run, as it was when step 4 had been saved."""
  shutil.copytree(done, workdir)
  for path in (workdir / "checkpoints").iterdir():
    if path.name != "4":
      shutil.rmtree(path)
  return workdir


def test_a_config_error_in_one_process_ends_both(start, tmp_path):
  folder = f"data.folder={tmp_path / 'gone'}"
  source = ("data.source=image_folder", folder)
  processes = start(tmp_path / "run", of_process={1: source})
  assert processes.wait(60) == [2, 2]
  assert re.search(r"byolx: error: process 1: .*gone", processes.said(1))
  assert re.search(r"byolx: error: process 0: process 1 \(.+\) failed: .*gone", processes.said(0))
  assert "Traceback" not in processes.said(0) + processes.said(1)


@pytest.mark.slow
def test_different_configs_are_refused(start, tmp_path):
  processes = start(tmp_path / "run", of_process={1: ("optim.base_rate=0.4",)})
  assert processes.wait(60) == [2, 2]
  assert "process 0 has another config (optim.base_rate" in processes.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("moment", ["step", "evaluation"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_other_wherever_it_is(start, tmp_path, of, moment, sent):
  """A process that is stopped for ever is as lost as one that is killed."""
  epochs = {"step": 100, "evaluation": 0.85}[moment]
  workdir = tmp_path / "run"
  seen = {"step": workdir / "checkpoints" / "8", "evaluation": workdir / "curves.png"}[moment]
  processes = start(workdir, f"train.epochs={epochs}")
  processes.until(seen.exists)
  processes.all[of].send_signal(sent)
  began = time.monotonic()
  code = processes.all[1 - of].wait(60)
  assert time.monotonic() - began < 30
  assert code == RESUME
  assert re.search(rf"process {of} \(.+\) is lost", processes.said(1 - of))


@pytest.mark.slow
@pytest.mark.parametrize("to", [0, 1])
def test_sigterm_to_one_process_saves_and_stops_both(start, together, tmp_path, to):
  processes = start(tmp_path / "run", "eval.max_train=20")
  processes.until(lambda: "step  2/12" in processes.said(0))
  processes.all[to].send_signal(signal.SIGTERM)
  codes = processes.wait(60)
  if codes != [0, 0]:  # the last step may come before all have agreed
    assert codes == [RESUME, RESUME], processes.said(0) + processes.said(1)
    assert start(tmp_path / "run", "eval.max_train=20").wait() == [0, 0]
  assert rows(tmp_path / "run") == rows(together.workdir)


@pytest.mark.slow
@pytest.mark.parametrize("to", [0, 1])
def test_sigterm_in_the_evaluation_stops_both(start, tmp_path, to):
  processes = start(tmp_path / "run", "eval.max_train=0")
  processes.until((tmp_path / "run" / "curves.png").exists)
  processes.all[to].send_signal(signal.SIGTERM)
  assert processes.wait(60) == [RESUME, RESUME], processes.said(0) + processes.said(1)
  assert f"byolx: process {to}: stopped by SIGTERM in the evaluation" in processes.said(to)
