"""docs/fidelity.md: the fields that it names exist, and those that the paper leaves open are there."""

import re
from pathlib import Path

import pytest
from test_deviations import FILES, parts

from byolx.reports.paper import settings
from byolx.runs import schema

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
PAGE = (ROOT / "docs" / "fidelity.md").read_text()
NAMED = set(re.findall(r"`([a-z]+(?:\.[a-z0-9_]+)+)`", PAGE))
FIELDS = schema.fields()


def test_every_field_that_the_page_names_exists():
  assert NAMED - set(FIELDS) == set()


def test_every_field_that_the_paper_does_not_state_is_on_the_page():
  left_open = {name for fields in settings.LEFT_OPEN.values() for name in fields}
  not_stated = {name for fields in settings.NOT_STATED.values() for name in fields}
  assert left_open | not_stated <= NAMED


def test_the_page_has_every_deviation_of_the_configs():
  section = PAGE.split("## Deviations of the shipped configs")[1].split("\n## ")[0]
  rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
  assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == set().union(
    *(parts(file)[0] for file in FILES)
  )


@pytest.mark.parametrize("line", [line for line in PAGE.splitlines() if line.startswith("| `")])
def test_a_row_has_as_many_cells_as_its_table(line):
  assert line.count("|") == 5


DEFAULTS = re.findall(
  r"^\| `([a-z]+(?:\.[a-z0-9_]+)+)` \| (True|False|`[a-z_]+`)[ :;,]", PAGE, re.M
)


@pytest.mark.parametrize(("name", "default"), DEFAULTS)
def test_defaults_are_those_of_the_fields(name, default):
  assert str(FIELDS[name].default) == default.strip("`")


def test_most_rows_have_a_default_that_is_checked():
  assert len(DEFAULTS) >= 20
