"""`byolx report`: what is printed and written, and mistakes answered in one line."""

import csv
import json

import pytest
from made_runs import LINEAR, record, run

from byolx import cli
from byolx.reports.paper import TABLES


@pytest.fixture
def byolx(capsys):
  """Runs the command in this process: (exit code, stdout, stderr)."""

  def call(*arguments):
    try:
      code = cli.main(["report", *map(str, arguments)])
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()

  return call


@pytest.fixture
def runs(tmp_path):
  for seed, value in enumerate((0.70, 0.74)):
    of_seed = [record(seed=seed, value=value)]
    run(tmp_path / "runs" / f"seed_{seed}", of_seed, LINEAR | {"seed": seed}, [(600, 1024.0)])
  return tmp_path / "runs"


def test_results_are_printed(byolx, runs):
  code, out, err = byolx(runs)
  assert (code, err) == (0, "")
  assert "74.3 (7, 9, 13)  72.0 ± 2.0  2  " in out
  assert "2 × 10 min 00 s on 8 x TPU v3" in out


def test_several_workdirs(byolx, runs):
  code, out, _ = byolx(runs / "seed_0", runs / "seed_1")
  assert code == 0
  assert out == byolx(runs)[1]


def test_a_table_needs_no_workdir(byolx):
  code, out, err = byolx("--table=9")
  assert (code, err) == (0, "")
  assert out.startswith("Table 9. Linear evaluation of BYOL on ImageNet using larger encoders")
  assert out.count("not run") == 48


def test_a_table_with_a_workdir(byolx, runs):
  out = byolx(runs, "--table=9", "--format=markdown")[1]
  assert "| ResNet-50 | 1× | 24M | 74.3 | 72.0 ± 2.0 \\[1\\] | 91.6 | not run |" in out


def test_the_list_of_tables(byolx):
  code, out, _ = byolx("--table=list")
  assert code == 0
  assert [line.split()[0] for line in out.splitlines()[2:]] == [*TABLES]


@pytest.mark.parametrize("suffix", ["md", "csv", "json", "txt", "png"])
def test_a_file_is_written_in_the_format_of_its_name(byolx, runs, suffix, tmp_path):
  path = tmp_path / "new" / f"results.{suffix}"
  code, out, err = byolx(runs, f"--output={path}")
  assert (code, out, err) == (0, f"wrote {path}\n", "")
  start = path.read_bytes()[:8]
  if suffix == "png":
    assert start == b"\x89PNG\r\n\x1a\n"
  elif suffix == "json":
    assert json.loads(path.read_text())[0]["value"] == pytest.approx(0.72)
  elif suffix == "csv":
    assert next(csv.DictReader(path.read_text().splitlines()))["n"] == "2"
  else:
    assert start.startswith(b"| proto" if suffix == "md" else b"protocol")


def test_a_figure_and_a_table_at_once(byolx, runs, tmp_path):
  figure, table = tmp_path / "f.png", tmp_path / "t.out"
  code, out, _ = byolx(
    runs, "--table=7", f"--figure={figure}", f"--output={table}", "--format=json"
  )
  assert code == 0
  assert out == f"wrote {figure}\nwrote {table}\n"
  assert json.loads(table.read_text())["table"] == "7"
  assert figure.is_file()


def test_all_shows_what_was_not_chosen(byolx, tmp_path):
  rates = [record(split="validation", rate=r, chosen=r == 0.1) for r in (0.1, 0.2)]
  folder = run(tmp_path / "a", rates)
  code, _, err = byolx(folder)
  assert code == 2
  assert err == (
    f"byolx: error: {folder}: no result on test images; --all also shows those on validation images\n"
  )
  out = byolx(folder, "--all")[1]
  assert "linear, validation, rate 0.1" in out
  assert "linear, validation, not chosen, rate 0.2" in out


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ([], "no WORKDIR was given; expected at least one, or --table=N\n"),
    (["--figure=f.png"], "f.png: no WORKDIR was given; expected at least one\n"),
    (["--output=f.png"], "f.png: no WORKDIR was given; expected at least one\n"),
    (["--table=10"], "--table=10: expected one of 7, 8, 9, 11, 12, 13, 14a, 14b, "),
    (["--table=14"], "21, 22, text; or list"),
    (["--table=9", "--format=html"], "argument --format: invalid choice: 'html'"),
    (
      ["--table=9", "--output=t.html"],
      "--output=t.html: unknown format; expected a name that ends",
    ),
    (["--table=9", "--output=t"], "ends in one of .txt, .md, .csv, .json, .png, or --format"),
    (["x", "--figure=f.pdf"], "--figure=f.pdf: expected a name that ends in .png"),
    (
      ["x", "--output=f.png", "--table=9"],
      "--output=f.png: a figure; expected it without --figure",
    ),
    (["nowhere"], "nowhere, which does not exist: expected a workdir of a run or a sweep"),
    (["--tabel=9"], "unknown argument --tabel=9; see byolx report --help"),
    (["--config.seed=1"], "unknown argument --config.seed=1; see byolx report --help"),
  ],
)
def test_mistakes(byolx, arguments, said):
  code, out, err = byolx(*arguments)
  assert (code, out) == (2, "")
  assert err.startswith("byolx: error: ")
  assert err.count("\n") == 1
  assert said in err


def test_a_run_that_has_not_ended(byolx, tmp_path):
  folder = run(tmp_path / "a", None)
  code, _, err = byolx(folder)
  assert code == 2
  assert err == (
    f"byolx: error: {folder}: no results yet; run `byolx eval --from={folder}`, or let its `byolx "
    "train` finish\n"
  )


def test_help_has_examples_that_parse(byolx):
  out = byolx("--help")[1]
  examples = [line.split()[2:] for line in out.splitlines() if line.startswith("  byolx report ")]
  assert len(examples) >= 4
  for words in examples:
    cli._parse(["report", *words])
  for name in (
    word.partition("=")[2] for words in examples for word in words if "--table=" in word
  ):
    assert name in {*TABLES, "list"}
