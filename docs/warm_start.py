"""Time until the first step of a run, without and with compiled programs of an earlier run.

  python docs/warm_start.py

ResNet-50 on 64 x 64 pixels and this machine's CPU. `byolx train` is started twice in new processes, with
two workdirs side by side, which share the folder of compiled programs: the second run loads what the
first one compiled. Both are timed from the start of the command to the start of step 1, and to its end,
which is its row in `metrics.jsonl`. Then they are killed. The step itself takes the same two seconds in
both; XLA also prepares kernels in the first step of a process.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY = ("compiled in ", "the step was compiled in an earlier start")
"""Beginnings of the line that a run prints directly before step 1."""


@dataclasses.dataclass
class Start:
  """Seconds from the start of a command.

  Args:
    begins: seconds until program, state and first batch are ready, and step 1 begins.
    ends: seconds until the row of step 1 is in `metrics.jsonl`.
  """

  begins: float
  ends: float


def start(workdir: Path) -> Start:
  """Starts a run in a new process, and kills it after its first step."""
  command = [
    *(sys.executable, "-m", "byolx", "train", f"--workdir={workdir}"),
    f"--config={ROOT / 'configs' / 'pretrain_imagenet.py'}:batch=8",
    *("--config.data.source=digits", "--config.data.workers=0", "--config.views.size=64"),
    *("--config.eval.batch_size=8", "--config.log.every_steps=1"),
  ]
  rows = workdir / "metrics.jsonl"
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  began = time.perf_counter()
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
    try:
      if not any(line.startswith(READY) for line in run.stdout):
        raise RuntimeError(f"the run ended with {run.wait()} before its first step")
      begins = time.perf_counter() - began
      while not (rows.exists() and rows.read_text().strip()):
        if run.poll() is not None:
          raise RuntimeError(f"the run ended with {run.returncode} in its first step")
        time.sleep(0.02)
      return Start(begins, time.perf_counter() - began)
    finally:
      run.kill()


def measure() -> dict[str, dict[str, float]]:
  """Measures a cold and a warm start, in seconds, and the ratio of the two."""
  with tempfile.TemporaryDirectory() as folder:
    cold, warm = (start(Path(folder) / name) for name in ("cold", "warm"))
  found = {"cold": dataclasses.asdict(cold), "warm": dataclasses.asdict(warm)}
  ratio = {name: found["cold"][name] / found["warm"][name] for name in found["cold"]}
  return found | {"ratio": ratio}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
  arguments = parser.parse_args()
  found = measure()
  for name in found["ratio"]:
    cold, warm, ratio = (found[kind][name] for kind in ("cold", "warm", "ratio"))
    print(f"step 1 {name}: cold {cold:.1f} s, warm {warm:.1f} s, {ratio:.1f} times sooner")
  if arguments.json:
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
