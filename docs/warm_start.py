"""How much sooner a run reaches its first step when its programs were compiled before.

  python docs/warm_start.py

ResNet-50 on 64 x 64 pixels and this machine's CPU: `byolx train` is started twice in new processes,
with two workdirs side by side, so that they share the folder of compiled programs; the second finds
there what the first compiled. Both are timed from the start of the command to the row of step 1 in
`metrics.jsonl`, and then killed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS, MOST_SECONDS = 0.05, 900


def seconds_to_first_step(workdir: Path) -> float:
  """From the start of the command to its first step's row."""
  command = [
    *(sys.executable, "-m", "byolx", "train", f"--workdir={workdir}"),
    f"--config={ROOT / 'configs' / 'pretrain_imagenet.py'}:batch=8",
    *("--config.data.source=digits", "--config.data.workers=0", "--config.views.size=64"),
    *("--config.eval.batch_size=8", "--config.log.every_steps=1"),
  ]
  rows = workdir / "metrics.jsonl"
  began = time.perf_counter()
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as run:
    try:
      while not (rows.exists() and rows.read_text().strip()):
        if run.poll() is not None:
          raise RuntimeError(f"the run ended with {run.returncode} before its first step")
        if time.perf_counter() - began > MOST_SECONDS:
          raise TimeoutError(f"no step within {MOST_SECONDS} seconds")
        time.sleep(POLL_SECONDS)
      return time.perf_counter() - began
    finally:
      run.kill()


def measure() -> dict[str, float]:
  """Seconds of a cold and a warm start, and how much sooner the warm one was."""
  with tempfile.TemporaryDirectory() as folder:
    cold, warm = (seconds_to_first_step(Path(folder) / name) for name in ("cold", "warm"))
  return {"cold_seconds": cold, "warm_seconds": warm, "ratio": cold / warm}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
  arguments = parser.parse_args()
  found = measure()
  print(
    f"cold {found['cold_seconds']:.1f} s, warm {found['warm_seconds']:.1f} s: "
    f"{found['ratio']:.1f} times sooner"
  )
  if arguments.json:
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
