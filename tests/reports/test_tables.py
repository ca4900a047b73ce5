"""What `byolx report` prints: numbers side by side, whole Markdown, files that parse."""

import csv
import io
import json

import pytest
from made_runs import LINEAR, record, run

from byolx.reports import compare, measurements, tables
from byolx.reports.paper import TABLES


def results(path):
  return compare.results(measurements.read([path]))


@pytest.fixture
def seeds(tmp_path):
  """Three seeds of a linear evaluation, top-1 and top-5; a cost of 16 min 40 s each."""
  for seed, value in enumerate((0.70, 0.74, 0.72)):
    of_seed = [record(seed=seed, value=value), record(seed=seed, value=0.9, metric="top5")]
    run(tmp_path / "runs" / str(seed), of_seed, LINEAR | {"seed": seed}, [(1000, 1024.0)])
  return tmp_path / "runs"


def page(number, path, style="text"):
  return tables.table_page(TABLES[number], results(path) if path else [], style)


def rows_of(markdown):
  """Cells of a Markdown table's body."""
  lines = [line for line in markdown.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# Results


def test_results_as_text(seeds):
  text = tables.results_page(results(seeds), "text")
  lines = text.splitlines()
  assert lines[0].split() == [
    "protocol", "data", "encoder", "labels", "metric", "paper", "measured", "n", "config", "commit",
    "cost",
  ]  # fmt: skip
  assert " ".join(lines[2].split()) == (
    "linear imagenet online, ResNet-50 1× 100 % top-1 74.3 (7, 9, 13) 72.0 ± 2.0 3 0123456789ab "
    "fedcba987654 3 × 16 min 40 s on 8 x TPU v3"
  )
  # An interval below a quarter point is left out, as in the paper.
  assert " 91.6 (7, 9) 90.0 3 0123456789ab " in " ".join(lines[3].split())


def test_results_as_csv_and_json_parse_back(seeds):
  found = results(seeds)
  wanted = {"value": 0.72, "interval": 0.02, "n": 3, "paper": 0.743, "seconds": 1000.0}
  first, second = json.loads(tables.results_page(found, "json"))
  assert {key: first[key] for key in wanted} == pytest.approx(wanted)
  assert first["paper_tables"] == ["7", "9", "13"]
  assert first["seeds"] == [0, 1, 2]
  assert first["network"] == "ResNet-50 1×"
  assert (second["metric"], second["interval"]) == ("top5", 0.0)
  first, second = csv.DictReader(io.StringIO(tables.results_page(found, "csv")))
  assert {key: float(first[key]) for key in wanted} == pytest.approx(wanted)
  assert first["paper_tables"] == "7;9;13"
  assert first["seeds"] == "0;1;2"
  assert first["workdirs"] == ";".join(str(seeds / str(seed)) for seed in range(3))
  assert first["step"] == "100000"


def test_no_results_is_an_empty_file():
  assert tables.results_page([], "csv") == "\n"
  assert json.loads(tables.results_page([], "json")) == []


def test_markdown_shows_names_as_they_are(tmp_path):
  odd = record(data="a|b_c*d\\e<f>\n[g]`", devices="2 x cpu")
  run(tmp_path / "a", [odd], rows=[(1, 1.0)])
  text = tables.results_page(results(tmp_path), "markdown")
  row = text.splitlines()[2]
  assert r"| a\|b\_c\*d\\e\<f\> \[g\]\` |" in row
  cells = row.replace(r"\|", "").strip("|").split("|")
  assert len(cells) == 11
  assert cells[-1].strip() == "17 min 04 s on 2 x cpu"
  assert text.splitlines()[1].count("--:") == 2  # labels and n to the right


def test_older_records_leave_cells_empty(tmp_path):
  old = {"task": "pretrain", "protocol": "knn", "split": "test", "metric": "top1", "value": 0.5}
  run(tmp_path / "a", [old], {"data.source": "digits"})
  row = rows_of(tables.results_page(results(tmp_path), "markdown"))[0]
  assert row == ["k-NN", "digits", "ResNet-50 1×", "", "top-1", "", "50.0", "1", "", "", "-"]


# The paper's tables


@pytest.mark.parametrize("number", TABLES)
@pytest.mark.parametrize("style", tables.FORMATS)
def test_every_table_without_a_run(number, style):
  text = page(number, None, style)
  table = TABLES[number]
  measurable = any(table.condition(row, c) for row in table.rows for c in table.columns)
  assert ("not run" in text) == measurable
  if style == "json":
    assert len(json.loads(text)["cells"]) == len(table.rows) * len(table.columns)
  elif style == "csv":
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["paper"] or "nan") for row in rows] == pytest.approx(
      [float("nan") if c.value is None else c.value for row in table.rows for c in row.cells],
      nan_ok=True,
    )
  elif style == "markdown":
    rows = rows_of(text)
    assert len(rows) == len(table.rows)
    assert len({len(row) for row in rows}) == 1
  else:
    assert len(text.splitlines()) >= len(table.rows) + 4


def test_table_7_without_a_run():
  lines = page("7", None).splitlines()
  assert lines[0].startswith("Table 7. Different linear evaluation protocols on ImageNet")
  assert lines[2].split() == [
    "Architecture", "Pre-train", "augmentations", "Logits", "regularization", "Top-1", "measured",
    "Top-5", "measured",
  ]  # fmt: skip
  assert " ".join(lines[7].split()) == "ResNet-50 (1×) ✓ ✓ 74.8 not run 91.8 not run"


def test_table_7_with_three_seeds(seeds):
  text = page("7", seeds)
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert lines[4] == "ResNet-50 (1×) 74.3 72.0 ± 2.0 [1] 91.6 90.0 [1]"
  assert text.count("not run") == 22
  places = ", ".join(str(seeds / str(seed)) for seed in range(3))
  assert lines[-1] == (
    "[1] seeds 0, 1, 2; config 0123456789ab; commit fedcba987654; 3 × 16 min 40 s on 8 x TPU v3; "
    + places
  )


def test_two_results_of_one_number_are_both_shown(tmp_path):
  run(tmp_path / "a", [record(value=0.741)])
  run(tmp_path / "b", [record(value=0.733)], LINEAR | {"classify.head_init": "zeros"})
  text = page("9", tmp_path)
  assert "74.1 [1], 73.3 [2]" in text
  assert "[1] seed 0; " in text
  assert "[2] seed 0; " in text


def test_a_pretraining_that_is_unknown_is_said(tmp_path):
  run(tmp_path / "a", [record(pretrain=None)])
  assert "cost unknown; how its encoder was pretrained is unknown; " in page("9", tmp_path)


@pytest.fixture
def quick(tmp_path):
  """A linear evaluation of one epoch, of an encoder whose statistics saw 64 images."""
  of_run = record(value=0.31, pretrain={"train.micro_batch": 64})
  run(tmp_path / "quick" / "a", [of_run], LINEAR | {"train.epochs": 1.0})
  return tmp_path / "quick"


def test_a_run_off_protocol_is_listed_below_the_table(quick):
  text = page("9", quick)
  assert text.count("not run") == 48
  below = text.split("in Table 7.\n")[1].splitlines()
  assert below[0] == (
    "off protocol: ResNet-50, 1×, 24M, BYOL Top-1: 31.0 [1]; train.epochs: 1 (paper: 80), "
    "pretraining train.micro_batch: 64 (paper: 0)"
  )
  assert below[1].startswith("[1] seed 0; ")
  assert "off protocol: ResNet-50" in page("9", quick, "markdown")
  assert "off protocol" not in page("8", quick)
  assert "31.0" not in page("16", quick).split("G.2")[0]


def test_a_run_off_protocol_is_no_measured_number_for_programs(quick):
  first = json.loads(page("9", quick, "json"))["cells"][0]
  assert (first["measured"], first["status"]) == ([], "not run")
  assert first["off_protocol"] == pytest.approx([31.0])
  assert first["off_protocol_fields"] == [
    "train.epochs: 1 (paper: 80), pretraining train.micro_batch: 64 (paper: 0)"
  ]
  first = next(csv.DictReader(io.StringIO(page("9", quick, "csv"))))
  assert (first["measured"], float(first["off_protocol"])) == ("", pytest.approx(31.0))
  (one,) = json.loads(tables.results_page(results(quick), "json"))
  assert (one["paper"], one["paper_tables"]) == (None, [])
  assert one["off_protocol"][0] == "train.epochs: 1 (paper: 80)"


def test_a_run_off_protocol_is_marked_among_results(quick):
  lines = tables.results_page(results(quick), "text").splitlines()
  assert " off protocol [1]  " in lines[2]
  assert lines[-1] == (
    "[1] off protocol, so not the paper's 74.3 (7, 9, 13): train.epochs: 1 (paper: 80), pretraining "
    "train.micro_batch: 64 (paper: 0)"
  )


def test_many_fields_off_protocol_are_counted(tmp_path):
  views = {f"views.view{n}.{name}": 0.3 for n in (1, 2) for name in ("hue", "contrast")}
  of_run = record(pretrain=views | {f"optim.{n}": 0.5 for n in ("trust", "momentum")})
  changes = LINEAR | {"train.epochs": 1.0, "train.batch_size": 64, "optim.momentum": 0.0}
  run(tmp_path / "a", [of_run], changes)
  assert page("9", tmp_path).splitlines()[-2].endswith(", and 1 more")


def test_choices_that_the_paper_leaves_open_are_named_with_the_run(tmp_path):
  run(tmp_path / "a", [record(pretrain={"model.dtype": "bfloat16"})])
  text = page("9", tmp_path)
  assert "; left open by the paper: pretraining model.dtype=bfloat16; " in text
  assert "off protocol" not in text


def test_markdown_prints_the_best_bold_and_other_work_empty():
  rows = {row[1]: row for row in rows_of(page("8", None, "markdown"))}
  assert rows["BYOL"][2:] == ["**77.7**", "not run", "**93.9**", "not run"]
  assert rows["SimCLR (repro)"][3] == "not measurable yet"
  assert rows[r"MaxUp \[75\]"][2:] == ["**78.9**", "", "**94.2**", ""]
  assert rows[r"Supervised \[8\]"][4:] == ["-", ""]


def test_columns_that_cannot_be_measured_are_named_below():
  text = page("13", None)
  assert text.splitlines()[2].count("measured") == 2
  assert "not measurable yet, in any row: Food101, CIFAR10, CIFAR100, Birdsnap" in text
  assert "not measurable yet: the whole table" in page("12", None)


def test_numbers_as_the_paper_prints_them():
  assert " 0.01 " in page("21", None)
  assert " 62.8 ± 1.5 " in page("21", None)
  assert "0.399" in page("12", None)
  assert " 79.0 " in page("7", None)
  assert "15.8 ± 13.4" in page("22", None)


def test_a_table_as_csv_and_json_parse_back(seeds):
  cells = json.loads(page("9", seeds, "json"))["cells"]
  first = cells[0]
  assert (first["Architecture"], first["Multiplier"], first["column"]) == (
    "ResNet-50", "1×", "BYOL Top-1",
  )  # fmt: skip
  assert (first["paper"], first["status"], first["unit"]) == (74.3, "measured", "%")
  assert first["measured"] == pytest.approx([72.0])
  assert first["interval"] == pytest.approx([2.0])
  assert cells[2]["status"] == "not run"
  assert cells[4]["status"] == "other work"
  rows = list(csv.DictReader(io.StringIO(page("9", seeds, "csv"))))
  assert len(rows) == 60
  assert float(rows[0]["measured"]) == pytest.approx(72.0)
  assert rows[9]["paper"] == ""


def test_all_tables_in_a_list():
  lines = tables.tables_page().splitlines()
  assert [line.split()[0] for line in lines[2:]] == [*TABLES]
  assert lines[2].split()[:3] == ["7", "24", "24"]
