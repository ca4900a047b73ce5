"""Sweeps with a stand-in for the runs: what is run, what is chosen, what is tested, and what is not."""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_byolx
import pytest

from byolx import cli
from byolx.core.config import ConfigError
from byolx.runs import config
from byolx.sweeps import jobs, selection

FAKE = Path(fake_byolx.__file__)

CONFIG = """
from ml_collections import ConfigDict

def get_config(validation="last_10009"):
  config = ConfigDict()
  config.task = "linear"
  config.data = {"validation": validation}
  return config
"""
RATES = "--grid=optim.base_rate=0.01,0.1,1.0"
BEST = "base-rate-0p1"


class Sweeps:
  """A folder with a sweep's workdir, the journal of its runs, and how they behave."""

  def __init__(self, folder, capsys):
    self.folder, self.workdir, self._capsys = folder, folder / "study", capsys
    self.config = folder / "config.py"
    self.config.write_text(CONFIG)

  def arguments(self, *words):
    return ["sweep", f"--config={self.config}", f"--workdir={self.workdir}", *words]

  def __call__(self, *words):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    code = cli.main(self.arguments(*words))
    return code, *self._capsys.readouterr()

  def start(self, *words):
    """The sweep in a process of its own."""
    command = [sys.executable, str(FAKE), str(self.folder), *self.arguments(*words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

  def behave(self, **told):
    """From a part of a workdir's name, with _ for -, to what happens there."""
    told = {part.replace("_", "-"): what for part, what in told.items()}
    (self.folder / "behaviour.json").write_text(json.dumps(told))

  def journal(self, what="begin"):
    """`COMMAND WORKDIR` of the runs that began, or ended, with workdirs seen from the sweep's."""
    path = self.folder / "journal"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [f"{c} {Path(w).relative_to(self.workdir)}" for kind, c, w in lines if kind == what]

  def await_journal(self, count, what="begin"):
    until = time.monotonic() + 120
    while len(self.journal(what)) < count:
      assert time.monotonic() < until
      time.sleep(0.02)

  def config_of(self, workdir):
    return config.from_json((self.workdir / workdir / "config.json").read_text())

  def read(self, name):
    return json.loads((self.workdir / name).read_text())


@pytest.fixture
def sweeps(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jobs, "BYOLX", (sys.executable, str(FAKE), str(tmp_path)))
  monkeypatch.setattr(jobs, "POLL", 0.02)
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
  return Sweeps(tmp_path, capsys)


# Choosing


def test_the_best_cell_is_chosen_and_it_alone_is_tested(sweeps):
  code, out, err = sweeps(RATES)
  assert (code, err) == (0, "")
  assert sweeps.journal() == [
    "train cells/base-rate-0p01",
    "train cells/base-rate-0p1",
    "train cells/base-rate-1p0",
    "eval cells/base-rate-0p1",
  ]
  splits = {
    path.parent.name: {record["split"] for record in json.loads(path.read_text())}
    for path in sweeps.workdir.glob("cells/*/results.json")
  }
  only = {"validation"}
  tested = {"validation", "test"}
  assert not any(sweeps.config_of(f"cells/{label}").eval.test for label in splits)
  assert splits == {"base-rate-0p01": only, BEST: tested, "base-rate-1p0": only}
  (result,) = sweeps.read("results.json")
  assert result["value"] == pytest.approx(0.75)
  assert result["interval"] is None
  assert (result["n"], result["seed"]) == (1, [0])
  assert result["cell"] == {"optim.base_rate": 0.1}
  assert result["workdir"] == [f"cells/{BEST}"]
  chosen = sweeps.read("sweep.json")["chosen"]["all"]
  assert chosen["label"] == BEST
  assert chosen["validation"] == pytest.approx(
    {"base-rate-0p01": 0.7, "base-rate-0p1": 0.8, "base-rate-1p0": 0.7}
  )
  assert "1/3  base-rate-0p01  validation top1 70.0 %  about " in out
  assert "edge" not in out
  table = out[out.index("group") :].splitlines()
  assert table[0].split() == ["group", "chosen", "validation", "top1", "test", "top1"]
  assert table[1].split() == ["all", BEST, "80.0", "%", "75.0", "%"]


def test_each_value_of_a_field_that_is_studied_apart_has_a_choice_and_a_test(sweeps):
  code, out, _ = sweeps(
    "--grid=model.width=1,2", "--grid=optim.base_rate=0.1,1", "--per=model.width"
  )
  assert code == 0
  results = sweeps.read("results.json")
  assert [
    (r["group"], r["cell"]["model.width"], r["cell"]["optim.base_rate"]) for r in results
  ] == [
    ("width-1p0", 1.0, 0.1),
    ("width-2p0", 2.0, 0.1),
  ]
  assert [r["value"] for r in results] == pytest.approx([0.75, 0.70])
  assert sweeps.journal()[4:] == [
    "eval cells/width-1p0-base-rate-0p1",
    "eval cells/width-2p0-base-rate-0p1",
  ]
  chosen = sweeps.read("sweep.json")["chosen"]
  assert list(chosen["width-2p0"]["validation"]) == [
    "width-2p0-base-rate-0p1",
    "width-2p0-base-rate-1p0",
  ]
  # Width is not compared, so that it has no edge.
  assert "width-1p0: the best is at an edge of the grid: optim.base_rate=0.1, of 0.1 to 1.0" in out
  assert "model.width=" not in out


def test_named_grids_bring_what_is_studied_apart(sweeps, monkeypatch):
  from byolx.sweeps import grids

  cells = grids.product(grids.vary("model.width", (1, 2)), grids.vary("optim.base_rate", (0.1,)))
  monkeypatch.setitem(grids.GRIDS, "widths", grids.Grid(cells, per=("model.width",)))
  assert sweeps("--grid=widths")[0] == 0
  assert list(sweeps.read("sweep.json")["chosen"]) == ["width-1p0", "width-2p0"]


def validations(*values, **more):
  known = {"split": "validation", "metric": "top1", "protocol": "linear", "encoder": "online"}
  return [{**known, "labels": 1.0, "value": value, **more} for value in values]


def test_of_equal_values_the_first_is_the_best_and_what_is_not_finite_the_worst():
  top1, loss = selection.By("top1"), selection.By("loss")
  assert selection.best([0.1, 0.3, 0.3], top1) == 1
  assert selection.best([0.2, 0.1, 0.1], loss) == 1
  assert selection.best([float("nan"), 0.1], top1) == 1
  assert selection.best([float("nan"), 5.0], loss) == 1


def test_of_several_rates_the_chosen_one_speaks_for_the_run_or_else_the_best():
  records = validations(0.3, 0.5, 0.4)
  assert selection.record(records, selection.TOP1, "here")["value"] == 0.5
  flagged = [
    {**record, "rate": rate, "chosen": rate == 3} for rate, record in enumerate(records, 1)
  ]
  assert selection.record(flagged, selection.TOP1, "here")["rate"] == 3


def test_records_of_different_things_are_not_compared():
  records = validations(0.3) + validations(0.9, encoder="random") + validations(1.0, metric="top5")
  with pytest.raises(
    ConfigError, match=r"here: .* differ in encoder; .*encoder=random after a colon"
  ):
    selection.record(records, selection.TOP1, "here")
  by = selection.parse("top1:encoder=online")
  assert selection.record(records, by, "here")["value"] == 0.3
  with pytest.raises(
    ConfigError, match=r"here: no validation record of --select=top9; .*top5:prot"
  ):
    selection.record(records, selection.parse("top9"), "here")
  with pytest.raises(
    ConfigError, match="--select=top1:rate=1: expected METRIC or METRIC:KEY=VALUE"
  ):
    selection.parse("top1:rate=1")


def test_edges_are_of_numeric_fields_that_are_compared():
  cells = [
    {"a": a, "b": b, "c": c, "d": True} for a in (1, 2, 3) for b in "xy" for c in (0.5, 0.25)
  ]
  assert selection.edges(cells[0], cells, ["c"]) == ["a=1, of 1 to 3"]
  assert selection.edges(cells[4], cells) == ["c=0.5, of 0.25 to 0.5"]
  assert selection.edges(cells[4], cells[4:5]) == []


# Testing


def test_results_are_averaged_over_seeds(sweeps):
  code, out, _ = sweeps(RATES, "--seeds=0,1,2")
  assert code == 0
  assert sweeps.journal()[3:] == [
    f"eval cells/{BEST}",
    "train final/all/seed_1",
    "train final/all/seed_2",
  ]
  (result,) = sweeps.read("results.json")
  # 0.75, 0.76 and 0.79 by the formula.
  assert result["value"] == pytest.approx((0.75 + 0.76 + 0.79) / 3)
  assert result["interval"] == pytest.approx(0.02)
  assert (result["n"], result["seed"]) == (3, [0, 1, 2])
  assert result["workdir"] == [f"cells/{BEST}", "final/all/seed_1", "final/all/seed_2"]
  final = sweeps.config_of("final/all/seed_2")
  assert (final.seed, final.optim.base_rate, final.eval.test) == (2, 0.1, True)
  assert final.data.validation == "last_10009"
  assert "76.7 % ± 2.0 %" in out


def test_retraining_takes_the_validation_images_in(sweeps):
  assert sweeps(RATES, "--seeds=0,1", "--retrain")[0] == 0
  assert sweeps.journal()[3:] == ["train final/all/seed_0", "train final/all/seed_1"]
  final = sweeps.config_of("final/all/seed_0")
  assert (final.data.validation, final.seed, final.eval.test) == ("none", 0, True)
  assert final.optim.base_rate == 0.1
  (result,) = sweeps.read("results.json")
  assert result["value"] == pytest.approx((0.77 + 0.78) / 2)
  assert result["interval"] == pytest.approx(0.005)


def test_the_seed_of_the_config_is_that_of_the_test(sweeps):
  assert sweeps(RATES, "--config.seed=3")[0] == 0
  assert sweeps.journal()[3:] == [f"eval cells/{BEST}"]
  assert sweeps.read("results.json")[0]["seed"] == [3]


# Again


def test_the_same_command_again_runs_nothing(sweeps):
  assert sweeps(RATES, "--seeds=0,1")[0] == 0
  before, results = sweeps.journal(), sweeps.read("results.json")
  code, out, _ = sweeps(RATES, "--seeds=0,1")
  assert code == 0
  assert sweeps.journal() == before
  assert sweeps.read("results.json") == results
  assert "3 of 3 runs are already finished" in out
  assert "75.5 % ± 0.5 %" in out


def test_more_cells_and_seeds_run_only_what_is_new(sweeps):
  sweeps("--grid=optim.base_rate=0.01,0.05", "--seeds=1")
  before = len(sweeps.journal())
  code, out, _ = sweeps("--grid=optim.base_rate=0.01,0.05,0.1", "--seeds=1,2")
  assert code == 0
  assert sweeps.journal()[before:] == [
    f"train cells/{BEST}",
    # Seed 1 holds what was the best before.
    f"train final/all/{BEST}/seed_1",
    "train final/all/seed_2",
  ]
  assert "all: the earlier choice was base-rate-0p05, which may have been tested already" in out
  assert sweeps.read("sweep.json")["chosen"]["all"]["before"] == ["base-rate-0p05"]
  (result,) = sweeps.read("results.json")
  assert result["value"] == pytest.approx((0.76 + 0.79) / 2)
  done = len(sweeps.journal())
  assert sweeps("--grid=optim.base_rate=0.01,0.05,0.1", "--seeds=1,2")[0] == 0
  assert len(sweeps.journal()) == done


def test_another_sweep_in_the_workdir_is_refused(sweeps):
  sweeps(RATES)
  before = sweeps.journal()
  for words, said in (
    ([RATES, "--config.train.epochs=7"], "(train.epochs: 1000.0 -> 7.0)"),
    (["--grid=optim.base_rate=0.01,0.1"], "(--grid: without base-rate-1p0, which has results)"),
    ([RATES, "--retrain"], "(--retrain: False -> True)"),
    ([RATES, "--per=optim.base_rate"], "(--per: [] -> ['optim.base_rate'])"),
    ([RATES, "--select=top5"], "(--select: top1 -> top5)"),
    ([RATES, "--seeds=1"], "(--seeds: without 0)"),
    ([RATES, "--seeds=1", "--dry_run"], "(--seeds: without 0)"),
  ):
    code, _, err = sweeps(*words)
    assert code == 2
    assert err == (
      f"byolx: error: --workdir={sweeps.workdir} holds another sweep {said}; choose another "
      "--workdir, or undo the change\n"
    )
  assert sweeps.journal() == before


def test_until_something_is_chosen_it_may_still_change_how(sweeps):
  sweeps.behave(base_rate_1p0={"exit": 1})
  assert sweeps(RATES)[0] == 1
  # The cell that failed may be left out, since it has no results.
  code, _, _ = sweeps("--grid=optim.base_rate=0.01,0.1", "--seeds=1", "--retrain")
  assert code == 0
  assert sweeps.journal()[3:] == ["train final/all/seed_1"]


def test_a_workdir_of_another_run_is_refused(sweeps):
  sweeps(RATES)
  folder = sweeps.workdir / "cells" / "base-rate-0p01"
  other = config.load(str(sweeps.config), ["--config.optim.base_rate=0.02"])
  (folder / "config.json").write_text(config.to_json(other))
  code, _, err = sweeps(RATES)
  assert code == 2
  assert f"{folder} holds a run of another config (optim.base_rate: 0.02 -> 0.01)" in err
  sweeps.workdir = folder
  code, _, err = sweeps(RATES)
  assert code == 2
  assert f"--workdir={folder} is the workdir of a run; expected one of a sweep" in err


# Failures and stops


def test_a_cell_that_fails_does_not_take_the_others_along(sweeps):
  sweeps.behave(base_rate_0p01={"say": "no\nluck", "exit": 1}, base_rate_0p1={"kill": True})
  code, out, err = sweeps(RATES)
  assert code == 1
  assert len(sweeps.journal()) == 3
  assert "base-rate-0p01  failed: exit code 1" in out
  assert "base-rate-0p1  failed: killed by SIGKILL" in out
  assert (
    f"base-rate-0p01: last lines of {sweeps.workdir}/cells/base-rate-0p01/log.txt\n  | no\n  | luck\n"
    in err
  )
  assert err.splitlines()[-1] == (
    "byolx: error: 2 of the runs failed (base-rate-0p01, base-rate-0p1); the same command runs what "
    "is missing, and cells without results may be left out of --grid"
  )
  assert not (sweeps.workdir / "results.json").exists()
  sweeps.behave()
  assert sweeps(RATES)[0] == 0
  assert sweeps.journal()[3:] == [
    "train cells/base-rate-0p01",
    "train cells/base-rate-0p1",
    "eval cells/base-rate-0p1",
  ]


def test_a_run_that_was_stopped_by_others_makes_the_sweep_stop(sweeps):
  sweeps.behave(base_rate_0p01={"exit": 75})
  code, out, err = sweeps(RATES)
  assert code == 75
  assert "base-rate-0p01  stopped; the same command resumes it" in out
  assert "with 2 of 3 runs finished; the same command goes on from there" in err


def test_what_is_compared_has_to_be_there_when_the_first_cell_ends(sweeps):
  code, _, err = sweeps(RATES, "--select=top5")
  assert code == 2
  assert "no validation record of --select=top5; expected one of: top1:protocol=linear" in err
  assert len(sweeps.journal()) == 1
  assert sweeps(RATES)[0] == 0


def test_several_runs_at_once_overlap(sweeps):
  sweeps.behave(base_rate={"seconds": 1.5})
  assert sweeps("--grid=optim.base_rate=0.01,0.1", "--jobs=2")[0] == 0
  kinds = [line.split()[0] for line in (sweeps.folder / "journal").read_text().splitlines()]
  assert kinds == ["begin", "begin", "end", "end", "begin", "end"]


def test_killed_in_the_middle_it_goes_on_and_runs_nothing_twice(sweeps):
  """What was under way when the sweep was killed lives on, and is waited for."""
  sweeps.behave(base_rate_0p1={"seconds": 10})
  process = sweeps.start(RATES)
  sweeps.await_journal(2)
  process.kill()
  process.communicate()
  assert sweeps.journal("end") == ["train cells/base-rate-0p01"]
  code, out, _ = sweeps(RATES)
  assert code == 0
  assert "base-rate-0p1: waiting for an earlier process, which is still running it" in out
  assert sweeps.journal() == [
    "train cells/base-rate-0p01",
    "train cells/base-rate-0p1",
    "train cells/base-rate-1p0",
    "eval cells/base-rate-0p1",
  ]


def test_a_second_sweep_in_the_same_workdir_is_refused(sweeps):
  sweeps.behave(base_rate_0p01={"seconds": 60})
  process = sweeps.start(RATES)
  sweeps.await_journal(1)
  code, _, err = sweeps(RATES)
  assert code == 2
  assert err == f"byolx: error: --workdir={sweeps.workdir}: another process runs a sweep there\n"
  process.terminate()
  process.communicate()
  assert process.returncode == 75


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_the_runs_in_good_order(sweeps, number, code):
  sweeps.behave(base_rate_0p01={"seconds": 60}, base_rate_0p1={"seconds": 60})
  process = sweeps.start(RATES, "--jobs=2")
  sweeps.await_journal(2)
  process.send_signal(number)
  out, _ = process.communicate()
  assert process.returncode == code
  name = signal.Signals(number).name
  assert f"stopped: stopped by {name} with 0 of 3 runs finished" in out
  for label in ("base-rate-0p01", "base-rate-0p1"):
    assert (sweeps.workdir / "cells" / label / "log.txt").read_text().endswith("saved\n")
  assert len(sweeps.journal()) == 2
  sweeps.behave()
  assert sweeps(RATES)[0] == 0
  assert len(sweeps.journal("end")) == 4


# Before anything runs


def test_a_dry_run_prints_what_would_run_now(sweeps):
  command = f"byolx train --config={sweeps.config}"

  def lines(*words):
    code, out, err = sweeps(*words, "--dry_run")
    assert (code, err) == (0, "")
    return out.splitlines()

  words = ["--grid=model.blocks=(1,),(1, 2)", "--seeds=0,1"]
  printed = lines(*words)
  assert not sweeps.workdir.exists()
  assert [shlex.split(line) for line in printed] == [
    [
      *command.split(),
      f"--config.model.blocks={value}",
      "--config.eval.test=False",
      "--config.compile.cache=../../compiled",
      f"--workdir={sweeps.workdir}/cells/{label}",
    ]
    for value, label in (("(1,)", "blocks-1"), ("(1, 2)", "blocks-1-2"))
  ]
  run_lines(sweeps, printed)
  printed = lines(*words)  # both are equal: the first
  assert printed == [
    f"byolx eval --from={sweeps.workdir}/cells/blocks-1 --test",
    f"{command} '--config.model.blocks=(1,)' --config.seed=1 --config.eval.test=True "
    f"--config.compile.cache=../../../compiled --workdir={sweeps.workdir}/final/all/seed_1",
  ]
  run_lines(sweeps, printed)
  assert lines(*words) == []
  before = sweeps.journal()
  assert sweeps(*words)[0] == 0
  assert sweeps.journal() == before


def run_lines(sweeps, lines):
  """The commands of a dry run, as a launcher would run them."""
  for line in lines:
    _, *arguments = shlex.split(line)
    subprocess.run([*jobs.BYOLX, *arguments], check=True)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--grid=optim.base_rat=1,2"], "unknown field optim.base_rat: did you mean optim.base_rate?"),
    (["--grid=table99"], "--grid=table99: unknown grid; expected one of table9, seeds"),
    (
      ["--grid=seeds"],
      "--grid: seed cannot be compared; expected --seeds, the seeds of the final runs",
    ),
    (["--grid=optim.base_rate=1,1.0"], "two cells are called base-rate-1p0; expected different"),
    (
      [RATES, "--per=model.width"],
      "--per=model.width: expected a field of the grid: optim.base_rate",
    ),
    ([RATES, "--config.eval.test=True"], "eval.test is set by the sweep"),
    (
      [RATES, "--config.data.validation=none"],
      "data.validation='none': expected validation images",
    ),
    ([RATES, "--config.optim.base_rat=1"], "unknown field optim.base_rat"),
    (
      [RATES, "--config.optim.rates=(0.1,)"],
      "optim.base_rate has no meaning beside optim.rates=(0.1,)",
    ),
    ([RATES, "--config.task=pretrain"], "task=pretrain: a run with validation images is measured"),
    (
      [RATES, "--config.task=pretrain", "--retrain"],
      "--select=top1: a run of task=pretrain has several records of a metric; expected values of "
      "protocol, encoder, labels",
    ),
    (
      [RATES, "--config.data.labels=0.1", "--retrain"],
      "with a share of the labels, --retrain adds no labels",
    ),
    (["--grid=init.workdir=a/b,a-b"], "two cells are called workdir-a-b"),
    (["--grid=init.workdir=" + "a" * 300], "expected a name of at most 200 letters"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_runs(sweeps, words, said):
  code, _, err = sweeps(*words)
  assert code == 2
  assert said in err
  assert err.count("\n") == 1
  assert not sweeps.workdir.exists()


def test_several_rates_in_one_run_are_one_when_it_is_retrained(sweeps):
  from byolx.sweeps import sweep

  rates = "--config.optim.rates=(0.1, 0.2)"
  wanted = sweep.build(
    str(sweeps.config), [rates], ["model.width=1,2"], sweeps.workdir, seeds=[4], retrain=True
  )
  record = {**validations(0.5)[0], "rate": 0.2}
  choice = sweep.Choice(wanted.cells[0], record, {}, [])
  (final,) = sweep.final_runs(wanted, {"all": choice})["all"]
  assert config.flatten(final.config)["optim.rates"] == (0.2,)
  assert final.config.seed == 4


def test_help_names_every_grid(sweeps):
  from byolx.sweeps import grids

  said = io.StringIO()
  with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
    cli.main(["sweep", "--help"])
  listed = said.getvalue().partition("named grids: ")[2].partition(";")[0]
  assert [name.strip() for name in listed.split(",")] == list(grids.GRIDS)
