"""Configs: merging, overrides, what is refused and how it is said, JSON."""

import json
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from byolx.core.config import ConfigError
from byolx.runs import config, schema

FIELDS = schema.fields()
FLOATS = sorted(name for name, field in FIELDS.items() if isinstance(field.default, float))


def value(cfg, name):
  for part in name.split("."):
    cfg = cfg[part]
  return cfg


@pytest.fixture
def file(tmp_path):
  """Writes a config file whose `get_config(SIGNATURE)` has a body; returns its path."""

  def write(body, signature=""):
    path = tmp_path / "mine.py"
    lines = [f"def get_config({signature}):", *(f"  {line}" for line in body.splitlines())]
    path.write_text("from ml_collections import ConfigDict\n" + "\n".join(lines) + "\n")
    return str(path)

  return write


def refusal(path, *overrides):
  """The message of a config that is refused; always one line."""
  with pytest.raises(ConfigError) as caught:
    config.load(path, overrides)
  message = str(caught.value)
  assert "\n" not in message
  return message


# Merging


def test_defaults_hold_every_field_and_are_fresh():
  cfg = config.defaults()
  assert config.flatten(cfg) == {name: field.default for name, field in FIELDS.items()}
  cfg.optim.base_rate = 7.0
  assert config.defaults().optim.base_rate == FIELDS["optim.base_rate"].default
  config.check(config.defaults())


def test_a_file_changes_the_fields_it_names(file):
  cfg = config.load(file('return ConfigDict({"optim": {"base_rate": 0.5}, "seed": 3})'))
  changed = {"optim.base_rate": 0.5, "seed": 3}
  assert config.flatten(cfg) == config.flatten(config.defaults()) | changed


def test_whole_numbers_are_given_to_float_fields(file):
  cfg = config.load(file('return ConfigDict({"train": {"epochs": 3}})'))
  assert cfg.train.epochs == 3.0
  assert isinstance(cfg.train.epochs, float)


def test_a_file_may_compute_with_references(file):
  body = 'c = ConfigDict({"views": {"size": 32}})\nc.eval = {"resize": c.views.get_ref("size") + 4}'
  assert config.load(file(body + "\nreturn c")).eval.resize == 36


# Arguments of files


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [("", (0.1, 2, "sgd")), (":rate=0.3", (0.3, 2, "sgd")), (":name=lars,seed=5", (0.1, 5, "lars"))],
)
def test_arguments_have_the_types_of_their_defaults(file, arguments, expected):
  body = 'return ConfigDict({"seed": seed, "optim": {"base_rate": rate, "name": name}})'
  cfg = config.load(file(body, 'rate=0.1, seed=2, name="sgd"') + arguments)
  assert (cfg.optim.base_rate, cfg.seed, cfg.optim.name) == expected


@pytest.mark.parametrize(
  ("argument", "said"),
  [
    ("rat=1", "mine.py:rat=1: unknown argument; it takes: rate=0.1, seed=2"),
    ("rate", "mine.py:rate: unknown argument; it takes: rate=0.1, seed=2"),
    ("seed=1.5", "mine.py:seed=1.5: expected int for seed"),
    ("rate=fast", "mine.py:rate=fast: expected float for rate"),
  ],
)
def test_wrong_arguments_are_refused_with_the_choices(file, argument, said):
  path = file("return ConfigDict()", "rate=0.1, seed=2")
  assert refusal(f"{path}:{argument}").endswith(said)


def test_a_file_without_arguments_says_so(file):
  assert "unknown argument; it takes: none" in refusal(file("return ConfigDict()") + ":a=1")


def test_what_a_file_says_of_its_arguments_is_passed_on(file):
  path = file('raise ValueError(f"epochs={epochs}: expected one of 1, 2")', "epochs=1")
  assert refusal(f"{path}:epochs=9").endswith("mine.py:epochs=9: epochs=9: expected one of 1, 2")


# Overrides


@pytest.mark.parametrize(
  ("name", "text", "expected"),
  [
    ("optim.base_rate", "0.25", 0.25),
    ("optim.weight_decay", "1e-4", 1e-4),
    ("train.epochs", "3", 3.0),
    ("train.batch_size", "128", 128),
    ("byol.predictor", "False", False),
    ("byol.predictor", "true", True),
    ("byol.target", "online", "online"),
    ("data.folder", "/a=b, c", "/a=b, c"),
    ("data.folder", "", ""),
    ("model.blocks", "(1,2)", (1, 2)),
    ("model.blocks", "[1, 2]", (1, 2)),
    ("model.blocks", "3", (3,)),
    ("views.view2.crop_area", "(0.5, 1)", (0.5, 1)),
    ("eval.fractions", "(0.1,)", (0.1,)),
  ],
)
def test_overrides_have_the_types_of_their_fields(file, name, text, expected):
  cfg = config.load(file("return ConfigDict()"), [f"--config.{name}={text}"])
  found = value(cfg, name)
  assert found == expected
  assert type(found) is type(FIELDS[name].default)
  assert config.flatten(cfg) == config.flatten(config.defaults()) | {name: expected}


def test_overrides_come_after_the_file_and_the_last_one_counts(file):
  path = file('return ConfigDict({"seed": 1, "optim": {"base_rate": 0.5}})')
  cfg = config.load(path, ["--config.seed=2", "--config.seed=3"])
  assert (cfg.seed, cfg.optim.base_rate) == (3, 0.5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FLOATS), st.floats(1e-6, 0.9))
def test_float_overrides_are_exact(name, number):
  cfg = config.defaults()
  config._override(cfg, f"--config.{name}={number!r}")
  assert value(cfg, name) == number


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("optim.base_rate=-1", "optim.base_rate=-1.0: expected a finite number above 0"),
    ("optim.base_rate=nan", "optim.base_rate=nan: expected a finite number above 0"),
    ("optim.base_rate=fast", "optim.base_rate='fast': expected a number"),
    ("train.epochs=", "train.epochs='': expected a number"),
    ("train.batch_size=1.5", "train.batch_size='1.5': expected a whole number"),
    ("train.batch_size=0", "train.batch_size=0: expected a finite number of at least 1"),
    ("byol.predictor=no!", "byol.predictor='no!': expected True or False"),
    ("byol.tau_base=1.5", "byol.tau_base=1.5: expected a number from 0 to 1"),
    ("byol.target=emma", "byol.target='emma': expected one of ema, stop_gradient, online"),
    (
      "data.source=cifar",
      "'cifar': expected one of digits, fashion_mnist, image_folder, imagenet, places365, cifar10,"
      " cifar100, array_record, tfds",
    ),
    ("data.validation=last", "'last': expected one of none, last_10009, first_10000, share"),
    ("seed=4294967296", "seed=4294967296: expected a number from 0 to 4294967295"),
    ("model.blocks=(1, 2.5)", "model.blocks=(1, 2.5): expected each a whole number of at least 1"),
    ("views.mean=(0.5, 0.5)", "views.mean=(0.5, 0.5): expected 3 values"),
    (
      "views.view1.crop_area=(0.08, 1.5)",
      "expected two numbers in order, from 0.0001 to 1, the whole image",
    ),
    (
      "views.view1.crop_area=(0.9, 0.5)",
      "expected two numbers in order, from 0.0001 to 1, the whole image",
    ),
    (
      "views.view1.crop_area=all",
      "expected two numbers in order, from 0.0001 to 1, the whole image",
    ),
    ("views.view1.blur_sigma=('a', 'b')", "expected values in brackets, such as (0.1, 1.0)"),
  ],
)
def test_impossible_values_are_refused_with_field_value_and_choices(file, override, said):
  message = refusal(file("return ConfigDict()"), f"--config.{override}")
  assert override.partition("=")[0] in message
  assert message.endswith(said)


@pytest.mark.parametrize("word", ["--config.seed", "--seed=1", "config.seed=1", "1"])
def test_what_is_no_override_is_refused(file, word):
  assert refusal(file("return ConfigDict()"), word) == f"{word}: expected --config.FIELD=VALUE"


# Unknown fields


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("optim.base_rat", "unknown field optim.base_rat: did you mean optim.base_rate?"),
    ("byol.predictr", "unknown field byol.predictr: did you mean byol.predictor"),
    ("optim.lr", "expected one of optim.name, optim.base_rate, "),
    ("learning_rate", "expected one of byol, checkpoint, classify, compile, data, "),
    ("optim", "optim is a group of fields; expected one of optim.name, optim.base_rate, "),
    ("views.view1", "views.view1 is a group of fields; expected one of views.view1.crop_pro"),
  ],
)
def test_unknown_fields_are_refused_with_suggestions(file, name, said):
  assert said in refusal(file("return ConfigDict()"), f"--config.{name}=1")
  nested = 1
  for part in reversed(name.split(".")):
    nested = {part: nested}
  assert said in refusal(file(f"return ConfigDict({nested!r})"))


@settings(deadline=None)
@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_a_dropped_letter_is_found_again(name, data):
  start = name.rfind(".") + 1
  at = data.draw(st.integers(start, len(name) - 1))
  misspelt = name[:at] + name[at + 1 :]
  assume(misspelt not in FIELDS and len(name) - start >= 4)
  assert name in config._unknown(misspelt)


# Files that cannot be read


def test_a_missing_file_is_refused_with_the_files_beside(file, tmp_path):
  file("return ConfigDict()")
  said = refusal(str(tmp_path / "main.py"))
  assert said.startswith(f"--config={tmp_path / 'main.py'}: no such file; there are: ")
  assert said.endswith("mine.py")
  assert "none in that folder" in refusal(str(tmp_path / "nowhere" / "main.py"))


def test_a_file_of_another_kind_is_refused(tmp_path):
  for name, text in (("config.yaml", "seed: 1"), ("empty.py", "")):
    (tmp_path / name).write_text(text)
    assert "get_config" in refusal(str(tmp_path / name))


def test_values_of_another_type_in_a_file_are_refused(file):
  path = file('return ConfigDict({"train": {"batch_size": "many"}})')
  assert refusal(path) == f"{path}: train.batch_size='many': expected a whole number"


# JSON, differences, fingerprint


@st.composite
def configs(draw):
  cfg = config.defaults()
  for name in draw(st.sets(st.sampled_from(FLOATS), max_size=8)):
    *groups, leaf = name.split(".")
    node = cfg
    for group in groups:
      node = node[group]
    number = draw(st.floats(1e-6, 0.5))
    if FIELDS[name].check(number) is None:
      node[leaf] = number
  cfg.model.blocks = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
  cfg.data.folder = draw(st.text(max_size=9))
  cfg.byol.predictor = draw(st.booleans())
  cfg.seed = draw(st.integers(0, 2**32 - 1))
  return cfg


@settings(max_examples=25, deadline=None)
@given(configs())
def test_json_gives_the_config_back(cfg):
  again = config.from_json(config.to_json(cfg))
  assert config.flatten(again) == config.flatten(cfg)
  assert config.to_json(again) == config.to_json(cfg)
  assert config.fingerprint(again) == config.fingerprint(cfg)
  assert config.differences(config.flatten(again), config.flatten(cfg)) == []


def test_json_of_another_version_is_refused():
  flat = json.loads(config.to_json(config.defaults()))
  with pytest.raises(ConfigError, match=r"config\.json: unknown field optim\.base_rat"):
    config.from_json(json.dumps(flat | {"optim.base_rat": 1.0}))
  with pytest.raises(ConfigError, match=r"train\.batch_size=-1: expected"):
    config.from_json(json.dumps(flat | {"train.batch_size": -1}))


def test_differences_name_what_shapes_results():
  old, new = config.defaults(), config.defaults()
  new.optim.base_rate, new.model.blocks = 0.5, (1, 2)
  new.data.folder, new.log.every_steps, new.mesh.data = "elsewhere", 7, 1
  assert config.differences(config.flatten(old), config.flatten(new)) == [
    "model.blocks: () -> (1, 2)",
    "optim.base_rate: 0.2 -> 0.5",
  ]
  assert config.differences({"seed": 1, "gone": 2}, {"seed": 1}) == ["gone: 2 -> None"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FLOATS), st.floats(1e-3, 0.9))
def test_fingerprint_sees_what_shapes_results_only(name, number):
  default = config.fingerprint(config.defaults())
  cfg = config.defaults()
  config._override(cfg, f"--config.{name}={number!r}")
  same = FIELDS[name].free or math.isclose(number, FIELDS[name].default, rel_tol=0)
  assert (config.fingerprint(cfg) == default) == same
  cfg = config.defaults()
  cfg.seed = 5
  assert config.fingerprint(cfg) == default


def test_merge_takes_plain_dicts_and_lists():
  cfg = config.merge(ConfigDict({"model": {"blocks": [1, 2]}}), "here")
  assert tuple(cfg.model.blocks) == (1, 2)
