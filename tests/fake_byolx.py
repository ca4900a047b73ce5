"""Stands in for `python -m byolx` in tests of sweeps: writes what a run writes, without training.

  python fake_byolx.py SWEEPS_FOLDER sweep ...     as `byolx sweep`, whose runs are fakes as well
  python fake_byolx.py SWEEPS_FOLDER train|eval ...

In the folder: `journal`, lines `begin|end COMMAND WORKDIR` of each run, and `behaviour.json`,
from a part of a workdir's name to what happens there: `seconds` that it takes, `exit` with this code,
`kill` itself. Accuracies are a formula of the config, see `validation` and `test`.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from byolx.runs import config


def validation(cfg) -> float:
  """Best at a rate of 0.1, a little better with weight decay 1e-5, worse with width."""
  value = 0.8 - 0.1 * abs(math.log10(cfg.optim.base_rate) + 1)
  return value + 0.01 * (cfg.optim.weight_decay == 1e-5) - 0.05 * (cfg.model.width - 1)


def test(cfg) -> float:
  """Seed squared per cent above validation less 5 %; retrained, 2 % more."""
  return validation(cfg) - 0.05 + 0.01 * cfg.seed**2 + 0.02 * (cfg.data.validation == "none")


def record(cfg, split, value, **more):
  known = {"task": "classify", "protocol": "linear", "encoder": "online", "labels": 1.0}
  known |= {"step": 100, "commit": "abc", "seed": cfg.seed}
  return {
    **known,
    "split": split,
    "metric": "top1",
    "value": value,
    "interval": None,
    "n": 1,
    **more,
  }


def note(folder: Path, *words) -> None:
  with (folder / "journal").open("a") as journal:
    journal.write(" ".join(map(str, words)) + "\n")


def write(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.with_suffix(".new").write_text(text)
  path.with_suffix(".new").replace(path)


def behave(folder: Path, workdir: Path) -> None:
  path = folder / "behaviour.json"
  told = json.loads(path.read_text()) if path.exists() else {}
  wanted = [what for part, what in told.items() if part in str(workdir)]
  for what in wanted:
    until = time.monotonic() + what.get("seconds", 0)
    while time.monotonic() < until:
      time.sleep(0.02)
    if "say" in what:
      print(what["say"], flush=True)
    if "kill" in what:
      os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in what:
      sys.exit(what["exit"])


def save(signal_number, frame):
  print("saved", flush=True)
  sys.exit(75)


def run(folder: Path, command: str, words: dict[str, str], overrides: list[str]) -> None:
  signal.signal(signal.SIGTERM, save)
  workdir = Path(words["--from" if command == "eval" else "--workdir"])
  note(folder, "begin", command, workdir)
  if command == "train":
    cfg = config.load(words["--config"], overrides)
    write(workdir / "config.json", config.to_json(cfg))
    records = []
  else:
    assert "--test" in words
    cfg = config.from_json((workdir / "config.json").read_text())
    records = json.loads((workdir / "results.json").read_text())
  behave(folder, workdir)
  if command == "train" and cfg.data.validation != "none":
    records.append(record(cfg, "validation", validation(cfg)))
  if command == "eval" or cfg.eval.test:
    records.append(record(cfg, "test", test(cfg)))
  write(workdir / "results.json", json.dumps(records))
  note(folder, "end", command, workdir)


def main() -> int:
  folder, command, *rest = sys.argv[1:]
  overrides = [word for word in rest if word.startswith("--config.")]
  pairs = [word.partition("=") for word in rest if not word.startswith("--config.")]
  words = {name: value for name, _, value in pairs}
  if command != "sweep":
    run(Path(folder), command, words, overrides)
    return 0
  from byolx.core.signals import StoppedError
  from byolx.sweeps import jobs, selection, sweep
  from byolx.sweeps import run as sweep_run

  jobs.BYOLX = (sys.executable, __file__, folder)
  wanted = sweep.build(
    words["--config"],
    overrides,
    [value for name, _, value in pairs if name == "--grid"],
    Path(words["--workdir"]),
    by=selection.parse("top1"),
  )
  try:
    return 1 if sweep_run.run(wanted, int(words.get("--jobs", 1))) else 0
  except StoppedError as error:
    print(f"stopped: {error}", flush=True)
    return 130 if error.by_keyboard else 75


if __name__ == "__main__":
  sys.exit(main())
