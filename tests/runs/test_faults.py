"""Runs that are killed again and again, by SIGKILL and SIGTERM, at any moment: nothing is lost.

  pytest -m slow tests/runs/test_faults.py

Every run has the same steps as one that nobody disturbs. A checkpoint is written after every other
step, so many of the kills hit a save; others hit the start, the compilation, or the evaluation.
"""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import config_text

from byolx.checkpoints import manager
from byolx.runs import config, experiment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]

ROOT = Path(__file__).parents[2]
KILLS = 25
STEPS = 89


# A step that takes its time, so that there is time to be killed in.
SLOWLY = """
import sys, time
from byolx import cli
from byolx.runs import metrics_log
write = metrics_log.RunLog.write
def later(*arguments):
  time.sleep(0.15)
  write(*arguments)
metrics_log.RunLog.write = later
sys.exit(cli.main(sys.argv[1:]))
"""


@dataclasses.dataclass
class Runs:
  """Starts the same run again and again, as one process or several."""

  path: Path
  workdir: Path
  processes: int
  environment: dict

  def start(self) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", SLOWLY, "train", f"--config={self.path}"]
    command += [f"--workdir={self.workdir}"]
    if self.processes > 1:
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
      command += ["--distributed", f"--coordinator=127.0.0.1:{port}"]
      command += [f"--processes={self.processes}"]
    self.workdir.parent.mkdir(parents=True, exist_ok=True)
    started = []
    for index in range(self.processes):
      one = [*command, f"--process={index}"] if self.processes > 1 else command
      with (self.workdir.parent / f"said_{index}.txt").open("a") as said:
        started.append(subprocess.Popen(one, env=self.environment, stdout=said, stderr=said))
    return started

  def said(self) -> str:
    return "\n".join(path.read_text() for path in self.workdir.parent.glob("said_*.txt"))

  def finish(self) -> None:
    codes = [process.wait(300) for process in self.start()]
    assert codes == [0] * self.processes, self.said()[-3000:]

  def rows(self) -> list[dict]:
    lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
      del row["images_per_second"]
    return found

  def arrays(self) -> list[np.ndarray]:
    exp = experiment.build(config.load(str(self.path), ["--config.mesh.data=2"]))
    abstract = exp.abstract_state
    checkpoints = manager.Checkpoints(self.workdir / "checkpoints")
    state = checkpoints.restore(abstract).state
    checkpoints.close()
    assert int(state.step) == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", [1, 2])
def test_many_kills_change_nothing(processes, compiled, tmp_path):
  path = tmp_path / "tiny.py"
  text = config_text(
    train={"epochs": 6, "batch_size": 96},
    checkpoint={"every_steps": 2},
    log={"every_steps": 1},
    mesh={"data": 2, "cpu_devices": 2 // processes},
  )
  path.write_text(text)
  environment = os.environ | compiled | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  whole = Runs(path, tmp_path / "whole" / "run", processes, environment)
  whole.finish()
  disturbed = Runs(path, tmp_path / "disturbed" / "run", processes, environment)
  chance = random.Random(processes)
  seen = set()
  for kill in range(KILLS):
    compilations = disturbed.said().count("compiled in")
    started = disturbed.start()
    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
    victim = chance.choice(started)
    # Either any time after the start, or soon after training has begun, when saves follow closely.
    wait_until = time.monotonic() + chance.uniform(0.5, 12)
    if kill % 3:
      _wait_for_a_row(disturbed, started, chance.uniform(0, 1.0))
    else:
      while time.monotonic() < wait_until and all(one.poll() is None for one in started):
        time.sleep(0.01)
    joined = disturbed.said().count("compiled in") > compilations
    victim.send_signal(number)
    if not joined:  # whoever waits for the others to come would wait for some minutes
      time.sleep(5)
      for one in started:
        one.kill()
    codes = [one.wait(60) for one in started]
    # Done, saved and to be started again, or killed; never an error of its own.
    assert set(codes) <= {0, 75, -signal.SIGTERM, -signal.SIGKILL}, codes
    seen |= set(codes)
    assert "Traceback" not in disturbed.said(), disturbed.said()[-3000:]
  assert -signal.SIGKILL in seen
  disturbed.finish()
  rows = disturbed.rows()
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert rows == whole.rows()
  for one, other in zip(disturbed.arrays(), whole.arrays(), strict=True):
    np.testing.assert_array_equal(one, other)


def _wait_for_a_row(runs: Runs, started: list[subprocess.Popen], more: float) -> None:
  """Until training has made a row since the start, and then `more` seconds."""
  metrics = runs.workdir / "metrics.jsonl"
  before = time.time()
  while all(one.poll() is None for one in started):
    if metrics.exists() and metrics.stat().st_mtime > before and metrics.stat().st_size:
      time.sleep(more)
      return
    time.sleep(0.01)
