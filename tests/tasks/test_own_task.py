"""A protocol outside the package, the example of docs/adding_a_protocol.md: every command takes it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import byolx
from byolx import cli
from byolx.runs import config, schema

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_protocol.md").read_text()
CODE = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
OTHERS = frozenset({"pretrain", "linear", "finetune", "supervised"})


@pytest.fixture
def example(tmp_path):
  """The file, as a stranger saves it; what it registers is gone afterwards."""
  path = tmp_path / "rotation.py"
  path.write_text(CODE)
  yield path
  for name in set(byolx.TASKS) - OTHERS:
    del byolx.TASKS[name]


def rows(workdir):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [
    {name: value for name, value in row.items() if name != "images_per_second"} for row in found
  ]


def test_it_is_one_short_file_that_the_package_does_not_name():
  assert CODE.count("\n") < 120
  sources = "".join(path.read_text() for path in (ROOT / "byolx").rglob("*.py"))
  assert "Rotation" not in sources


def test_its_fields_are_fields_of_every_config(example):
  before = config.fingerprint(config.load(str(ROOT / "configs" / "quickstart.py")))
  made = config.load(f"{example}:epochs=2", ["--config.rotation.smoothing=0.25"])
  assert (made.task, made.rotation.smoothing, made.train.epochs) == ("rotation", 0.25, 2.0)
  assert schema.fields()["rotation.smoothing"].default == 0.0
  with pytest.raises(config.ConfigError, match=r"rotation\.smoothing=2\.0: expected a number"):
    config.load(str(example), ["--config.rotation.smoothing=2"])
  # Registering a task changes no other task's identity.
  assert config.fingerprint(config.load(str(ROOT / "configs" / "quickstart.py"))) == before


def test_trained_killed_resumed_evaluated_reported(example, compiled, tmp_path, capsys):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  often = [
    "--config.checkpoint.every_steps=5",
    "--config.log.every_steps=1",
    "--config.data.workers=1",
  ]
  command = ["train", f"--config={example}:epochs=3", *often]
  assert cli.main([*command, f"--workdir={whole}"]) == 0
  environment = os.environ | compiled | {"PYTHONPATH": str(ROOT)}
  words = [sys.executable, "-m", "byolx", *command, f"--workdir={cut}"]
  with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
    until = time.monotonic() + 240
    while not (cut / "checkpoints" / "10").is_dir() and process.poll() is None:
      assert time.monotonic() < until
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
  assert cli.main([*command, f"--workdir={cut}"]) == 0
  assert rows(whole) == rows(cut)
  assert [record["value"] for record in results(whole)] == [r["value"] for r in results(cut)]
  for name in ("curves.png", "views.png"):
    assert (whole / name).stat().st_size > 1000
  before = results(whole)
  (whole / "results.json").unlink()
  assert cli.main(["eval", f"--from={whole}", f"--tasks={example}"]) == 0
  assert [record["value"] for record in results(whole)] == [record["value"] for record in before]
  capsys.readouterr()
  assert cli.main(["report", str(whole)]) == 0
  (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rotation"))
  assert f"{100 * before[1]['value']:.1f}" in line
  encoder = byolx.load_encoder(whole)
  assert encoder(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, encoder.features)


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def test_eval_without_the_file_says_what_is_missing(example, compiled, tmp_path, capsys):
  workdir = tmp_path / "run"
  assert cli.main(["train", f"--config={example}:epochs=2", f"--workdir={workdir}"]) == 0
  del byolx.TASKS["rotation"]
  assert cli.main(["eval", f"--from={workdir}"]) == 2
  assert "a task that the file of --config or --tasks registers" in capsys.readouterr().err


def test_swept_and_taken_on_by_a_protocol_of_the_package(example, compiled, tmp_path, capsys):
  sweep, linear = tmp_path / "sweep", tmp_path / "linear"
  grid = ["--grid=rotation.smoothing=0,0.5", "--seeds=0,1"]
  command = ["sweep", f"--config={example}:epochs=2", *grid, f"--workdir={sweep}"]
  assert cli.main(command) == 0
  seeds = [record["seed"] for record in results(sweep)]
  assert len(seeds) >= 1
  assert json.loads((sweep / "sweep.json").read_text())
  origin = next((sweep / "final").rglob("config.json")).parent
  init = [f"--config.init.workdir={origin}", "--config.train.epochs=2"]
  path = ROOT / "configs" / "linear.py"
  assert cli.main(["train", f"--config={path}", *init, f"--workdir={linear}"]) == 0
  assert "unchanged, bit for bit" in capsys.readouterr().out
  assert {record["pretrained_on"] for record in results(linear)} == {"digits"}
