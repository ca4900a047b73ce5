"""README and docs: Python blocks run; named files, functions and options exist; links resolve."""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from byolx import cli
from byolx.runs import config, experiment, fit, workdir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
SOURCES = [*ROOT.glob("byolx/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("docs/*.py")]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"\b(?:byolx|configs|docs|launch|tests)/[\w./-]*\.(?:json|md|npz|png|py|sh)\b")
FUNCTIONS = re.compile(r"`(byolx/[\w/]+\.py): ([\w., ]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)")

SHORT = ["--config.train.epochs=0.1", "--config.optim.warmup_epochs=0"]
"""Two steps of configs/quickstart.py."""


def blocks(name, language):
  return [text for kind, text in FENCE.findall(TEXTS[name]) if kind == language]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, compiled):
  """A folder in which runs/quickstart is a short run of README's first command."""
  folder = tmp_path_factory.mktemp("readme")
  run = folder / "runs" / "quickstart"
  cfg = config.load(f"{ROOT / 'configs' / 'quickstart.py'}", SHORT)
  workdir.claim(run, cfg)
  fit.fit(experiment.build(cfg), run)
  return folder


@pytest.mark.parametrize("block", blocks("README.md", "python"))
def test_python_blocks_of_readme_run(block, quickstart, monkeypatch, capsys):
  monkeypatch.chdir(quickstart)
  exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
  assert "(360, 64)" in capsys.readouterr().out


def test_readme_has_the_two_blocks_that_ci_takes_by_number_and_a_python_block():
  train, test = blocks("README.md", "bash")[:2]
  assert "\nbyolx train --config=configs/quickstart.py\n" in train
  assert "pytest" in test
  assert blocks("README.md", "python")


def unknown_files(text):
  return sorted(name for name in set(FILE.findall(text)) if not (ROOT / name).exists())


@pytest.mark.parametrize("name", TEXTS)
def test_files_named_on_a_page_exist(name):
  assert unknown_files(TEXTS[name]) == []


def test_pages_named_in_the_code_exist():
  named = {page for file in SOURCES for page in re.findall(r"docs/\w+\.md", file.read_text())}
  assert sorted(page for page in named if not (ROOT / page).exists()) == []


def anchors(path):
  titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_links_of_a_page_resolve(name):
  page = ROOT / name
  for target, anchor in LINK.findall(TEXTS[name]):
    path = page.parent / target if target else page
    assert path.exists(), target
    assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def defined(path):
  """Functions and classes of a module, and `Class.method`."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    if isinstance(node, ast.ClassDef):
      names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
  return names


@pytest.mark.parametrize(("file", "names"), FUNCTIONS.findall(TEXTS["docs/architecture.md"]))
def test_functions_named_in_the_architecture_are_defined(file, names):
  assert set(names.split(", ")) <= defined(ROOT / file)


def commands():
  """Pairs of a page and the words of each `byolx` command in its blocks."""
  for name, text in TEXTS.items():
    for _, block in FENCE.findall(text):
      for line in re.sub(r"\\\n\s*", "", block).splitlines():
        if line.startswith("byolx "):
          yield name, shlex.split(line, comments=True)[1:]


COMMANDS = list(commands())


@pytest.mark.parametrize(
  ("name", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else x[0]
)
def test_options_of_a_command_exist(name, words):
  with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
    cli.main([words[0], "--help"])
  options = {word.partition("=")[0] for word in words if word.startswith("--")}
  options = {option for option in options if not option.startswith("--config.")}
  assert options <= set(re.findall(r"--\w+", help_text.getvalue())), name


WITH_CONFIG = [
  (name, words) for name, words in COMMANDS if any(x.startswith("--config=configs/") for x in words)
]


@pytest.mark.parametrize(
  ("name", "words"), WITH_CONFIG, ids=lambda x: x if isinstance(x, str) else x[0]
)
def test_configs_of_a_command_load(name, words, quickstart, monkeypatch):
  monkeypatch.chdir(ROOT)
  run = str(quickstart / "runs" / "quickstart")  # stands for every run whose encoder is used
  fields = [
    re.sub(r"(?<=^--config\.init\.)(workdir|like)=.*", rf"\1={run}", word)
    for word in words
    if word.startswith("--config.")
  ]
  for word in words:
    if word.startswith("--config="):
      config.load(word.removeprefix("--config="), fields)
