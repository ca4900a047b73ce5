"""Runs of several real processes with fake CPU devices, as on several hosts."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from tiny import config_text

ROOT = Path(__file__).parent.parent
PEER_TIMEOUT = 5

GLOO = re.compile(r"\[Gloo\]|connected peer ranks|^\d+$")
"""Its lines, also where its threads write into each other's."""

CONFIG = config_text(
  optim={"base_rate": 0.3, "warmup_epochs": 0.2},
  train={"epochs": 0.85, "batch_size": 96},
  checkpoint={"every_epochs": 100.0, "every_steps": 4, "keep": 100},
  log={"every_steps": 1, "every_seconds": 0.0},
  eval={"batch_size": 100, "max_train": 250},
)
"""12 steps; evaluation batches that 4 devices do not divide, the last of them partly empty."""


class Processes:
  """`byolx train` in so many processes, each with its own output.

  Args:
    config: file.
    workdir: that they share.
    count, devices: processes, and devices of each.
    overrides: as `train.epochs=2`, for all of them.
    of_process: more overrides for some.
    env: more environment variables.
  """

  def __init__(
    self, config, workdir, *overrides, count=2, devices=4, of_process=None, env=None, arguments=()
  ):
    self.workdir = workdir
    logs = workdir.parent / f"{workdir.name}_said"
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "PYTHONPATH": str(ROOT),
      **(env or {}),
    }
    self._said = [logs / str(index) for index in range(count)]
    self.all = []
    for index, path in enumerate(self._said):
      own = (of_process or {}).get(index, ())
      command = [
        *(sys.executable, "-m", "byolx", "train", f"--config={config}", f"--workdir={workdir}"),
        *("--distributed", f"--coordinator=127.0.0.1:{port}", f"--processes={count}"),
        *(f"--process={index}", f"--peer_timeout={PEER_TIMEOUT}", *arguments),
        *(f"--config.{override}" for override in (*overrides, *own)),
      ]
      with path.open("wb") as out:
        self.all.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))

  def said(self, index):
    """What a process printed so far, without what gloo and the runtime add."""
    lines = self._said[index].read_text().splitlines()
    return "\n".join(line for line in lines if not GLOO.search(line))

  def wait(self, seconds=240):
    """The exit codes; fails where they take longer."""
    until = time.monotonic() + seconds
    try:
      return [process.wait(max(0.1, until - time.monotonic())) for process in self.all]
    except subprocess.TimeoutExpired:
      said = "\n\n".join(self.said(index) for index in range(len(self.all)))
      raise AssertionError(f"still running after {seconds} s:\n{said}") from None
    finally:
      self.kill()

  def until(self, condition, seconds=240):
    """Waits for a condition while all processes run."""
    end = time.monotonic() + seconds
    while not condition():
      codes = [process.poll() for process in self.all]
      if codes != [None] * len(codes) or time.monotonic() > end:
        said = "\n\n".join(self.said(index) for index in range(len(codes)))
        self.kill()
        raise AssertionError(f"exit codes {codes}:\n{said}")
      time.sleep(0.02)

  def kill(self):
    for process in self.all:
      process.kill()
      process.wait()
