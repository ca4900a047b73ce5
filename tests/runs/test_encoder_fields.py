"""What goes with an encoder: taken from its checkpoint, used from there, and refused where it differs."""

import contextlib
import io
import json
import logging
import shutil
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_text

from byolx import cli
from byolx.checkpoints import manager, pretrained
from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.runs import config, experiment, fit, initial_state, rollbacks, schema, workdir

FIELDS = schema.fields()
ENCODER = schema.encoder_fields()
pytestmark = pytest.mark.usefixtures("compiled")

FUNCTION = {"padding": "torch", "bn_eps": 0.1}
COLOURS = {"mean": (0.3, 0.3, 0.3), "std": (0.4, 0.4, 0.4)}
LINEAR = """
from ml_collections import ConfigDict

def get_config():
  config = ConfigDict()
  config.task = "linear"
  config.data = {"source": "digits", "validation": "share"}
  config.optim = {"name": "sgd", "rates": (8.0, 0.4), "weight_decay": 0.0, "warmup_epochs": 0.0}
  config.train = {"epochs": 2, "batch_size": 96}
  config.mesh = {"data": 1}
  config.eval = {"resize": 8}
  return config
"""
"""A protocol that names nothing of the network, and inherits no groups."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pretraining run in `pretrained`, one checkpoint of it alone in `alone`, and config files."""
  folder = tmp_path_factory.mktemp("encoder")
  settings = {"train": {"epochs": 1, "batch_size": 96}, "mesh": {"data": 1}}
  text = config_text(model=FUNCTION, views=COLOURS, **settings)
  (folder / "tiny.py").write_text(text)
  (folder / "plain.py").write_text(config_text(**settings))
  (folder / "linear.py").write_text(LINEAR)
  cfg = config.load(str(folder / "tiny.py"))
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    workdir.claim(folder / "pretrained", cfg)
    fit.fit(experiment.build(cfg), folder / "pretrained")
  newest = manager.folders_at(folder / "pretrained")[0]
  (folder / "far" / "away").mkdir(parents=True)
  shutil.copytree(newest, folder / "far" / "away" / "alone")
  return folder


def load(folder, *overrides, file="linear.py", start="pretrained"):
  given = [f"init.workdir={folder}/{start}", *overrides]
  return config.load(str(folder / file), [f"--config.{one}" for one in given])


def refusal(folder, *overrides, **where):
  with pytest.raises(ConfigError) as caught:
    load(folder, *overrides, **where)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def without_config(folder, target):
  """A copy of a checkpoint whose record has no config, as an older version would have saved it."""
  shutil.copytree(folder, target)
  file = target / "record" / "record.json"
  record = json.loads(file.read_bytes())["record"]
  del record["meta"]["config"]
  text = json.dumps(record, separators=(",", ":"))
  file.write_text(f'{{"crc32": {zlib.crc32(text.encode())}, "record":\n{text}}}\n')
  return target


def representations(exp, encoder):
  """Of every image of the test split that `exp` evaluates on."""
  (batch, *_) = exp.evaluation_batches(exp.sources.test)
  return np.asarray(encoder(exp.normalise(jnp.asarray(batch["image"])), train=False))


# Which fields


def test_fields_are_those_of_the_evaluated_function():
  assert set(ENCODER) < set(FIELDS)
  assert not any(FIELDS[name].free for name in ENCODER)
  model = {name for name in FIELDS if name.startswith("model.")}
  assert model - set(ENCODER) == {"model.bn_group", "model.bn_last_scale", "model.kernel_init"}
  assert set(ENCODER) - model == {"views.size", "views.mean", "views.std"}


# Taken from the checkpoint


@pytest.mark.parametrize(
  "start", ["pretrained", "pretrained/checkpoints", "pretrained/checkpoints/14", "far/away/alone"]
)
def test_fields_come_from_the_encoder(folder, start):
  cfg = load(folder, start=start)
  before = config.flatten(config.load(str(folder / "tiny.py")))
  flat = config.flatten(cfg)
  for name in ENCODER:
    assert flat[name] == before[name], name
  assert (cfg.model.padding, cfg.model.bn_eps, cfg.views.size) == ("torch", 0.1, 8)
  assert (tuple(cfg.views.mean), tuple(cfg.views.std)) == (COLOURS["mean"], COLOURS["std"])
  # Nothing else does.
  assert cfg.views.view1.jitter_probability == FIELDS["views.view1.jitter_probability"].default


def test_an_evaluation_computes_the_function_that_was_trained(folder, tmp_path):
  before = experiment.build(config.load(str(folder / "tiny.py")))
  with contextlib.closing(manager.Checkpoints(folder / "pretrained" / "checkpoints")) as saved:
    trained = fit.restore(before, saved, rollbacks.Rollbacks(tmp_path)).model().online.encoder
  for number, start in enumerate(("pretrained", "far/away/alone")):
    exp = experiment.build(load(folder, start=start))
    (tmp_path / str(number)).mkdir()
    loaded = initial_state.new_state(exp, tmp_path / str(number)).model().encoder
    np.testing.assert_array_equal(representations(exp, loaded), representations(before, trained))
  # The fields matter: by the defaults, the same arrays give other numbers.
  cfg = load(folder)
  cfg.model.padding, cfg.model.bn_eps = "same", 1e-5
  exp = experiment.build(cfg)
  encoder = pretrained.read(folder / "pretrained", "online", sharding.replicated(exp.mesh))
  other = pretrained.apply(exp.initialise(), encoder)[0].model().encoder
  assert np.abs(representations(exp, other) - representations(before, trained)).max() > 0.01


def test_inherited_groups_of_another_run_do_not_change_the_encoder(folder, tmp_path):
  other = config.load(str(folder / "plain.py"))
  (tmp_path / "config.json").write_text(config.to_json(other))
  cfg = load(folder, f"init.like={tmp_path}", "init.inherit=('model','eval')")
  assert (cfg.model.padding, cfg.model.bn_eps) == ("torch", 0.1)
  assert tuple(cfg.eval.fractions) == (1.0,)


def test_groups_are_inherited_from_a_checkpoint_that_lies_alone(folder):
  cfg = load(folder, "init.inherit=('views',)", start="far/away/alone")
  assert cfg.views.view1.jitter_probability == 0.0


@pytest.mark.parametrize("start", ["later", "a" * 300])
def test_a_run_that_is_not_there_yet_gives_no_fields(folder, start):
  cfg = load(folder, start=start)
  assert config.flatten(cfg.model) == config.flatten(config.defaults().model)


def test_a_field_that_an_older_version_did_not_have_is_its_default(folder, tmp_path):
  flat = json.loads((folder / "pretrained" / "config.json").read_text())
  del flat["model.dilation"]
  flat["model.gone"] = 7
  (tmp_path / "config.json").write_text(json.dumps(flat))
  cfg = config.load(str(folder / "linear.py"), [f"--config.init.workdir={tmp_path}"])
  assert (cfg.model.dilation, cfg.model.padding) == (1, "torch")


# Refused


def test_a_file_that_is_no_config_is_refused(folder, tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ConfigError, match=r"config\.json: expected the fields of a run as JSON"):
    config.load(str(folder / "linear.py"), [f"--config.init.workdir={tmp_path}"])


@pytest.mark.parametrize("start", ["pretrained", "far/away/alone"])
def test_other_values_are_refused_field_by_field(folder, start):
  message = refusal(
    folder, "model.padding=same", "model.bn_eps=1e-5", "views.size=12", "views.mean=(0.5,0.5,0.5)",
    "model.channels=(16,)", "model.dtype=float32", start=start,
  )  # fmt: skip
  assert message == (
    f"init.workdir={folder}/{start}: with these fields its encoder would compute another function "
    "(model.channels: (16,), but the encoder has (8,); "
    "model.padding: 'same', but the encoder has 'torch'; "
    "model.bn_eps: 1e-05, but the encoder has 0.1; views.size: 12, but the encoder has 8; "
    "views.mean: (0.5, 0.5, 0.5), but the encoder has (0.3, 0.3, 0.3)); "
    "expected the encoder's values, which are used if they are not set"
  )


@pytest.mark.parametrize("name", [name for name in ENCODER if name != "model.bn_decay"])
def test_every_field_is_refused(name):
  there = config.of_encoder({})
  other = there | {name: "another"}
  with pytest.raises(ConfigError, match=rf"\({name}: 'another', but the encoder has "):
    config.refuse_other_function(other, there, "linear", "runs/a")
  config.refuse_other_function(there, there, "linear", "runs/a")


@pytest.mark.parametrize("debias", [True, False])
def test_the_decay_counts_where_averages_are_debiased(debias):
  there = config.of_encoder({"model.bn_debias": debias})
  other = there | {"model.bn_decay": 0.99}
  with pytest.raises(ConfigError, match="bn_decay") if debias else contextlib.nullcontext():
    config.refuse_other_function(other, there, "finetune", "runs/a")


def test_what_a_file_says_is_refused_too(folder):
  assert load(folder, file="plain.py").model.padding == "torch"  # this file does not name it
  (folder / "named.py").write_text(config_text(model={"padding": "same"}, views=COLOURS))
  assert "(model.padding: 'same', but the encoder has 'torch')" in refusal(folder, file="named.py")


def test_pretraining_may_go_on_at_another_size_only(folder):
  cfg = load(folder, "views.size=12", "eval.resize=12", file="tiny.py")
  assert (cfg.task, cfg.views.size, cfg.model.padding) == ("pretrain", 12, "torch")
  assert "(views.mean: (0.5, 0.5, 0.5), but the encoder has (0.3, 0.3, 0.3))" in refusal(
    folder, "views.size=12", "views.mean=(0.5,0.5,0.5)", file="tiny.py"
  )


def test_the_command_refuses_before_anything_is_written(folder, tmp_path, capsys):
  words = [f"--config={folder}/linear.py", f"--config.init.workdir={folder}/pretrained"]
  words += ["--config.model.padding=same", "--config.model.bn_eps=1e-5"]
  assert cli.main(["train", *words, f"--workdir={tmp_path}/run"]) == 2
  said = capsys.readouterr().err
  differing = (
    "model.padding: 'same', but the encoder has 'torch'; model.bn_eps: 1e-05, but the encoder"
  )
  assert f"({differing} has 0.1)" in said
  assert said.count("\n") == 1
  assert not (tmp_path / "run").exists()


# When the arrays are read


def read(path, cfg):
  check = config.encoder_check(cfg)
  return pretrained.read(path, "online", sharding.replicated(sharding.make_mesh(1)), check)


@pytest.mark.parametrize("start", ["pretrained", "far/away/alone"])
def test_the_checkpoint_is_compared_when_it_is_read(folder, start):
  """A config that was not made by `config.load`, or before the run was there."""
  cfg = load(folder)
  assert read(folder / start, cfg).arrays
  cfg.model.padding, cfg.views.std = "same", (0.5, 0.5, 0.5)
  with pytest.raises(ConfigError) as caught:
    read(folder / start, cfg)
  assert (
    "(model.padding: 'same', but the encoder has 'torch'; "
    "views.std: (0.5, 0.5, 0.5), but the encoder has (0.4, 0.4, 0.4))"
  ) in str(caught.value)


def test_a_checkpoint_without_a_config_is_warned_about(folder, tmp_path, caplog):
  cfg = load(folder)
  cfg.model.padding = "same"
  old = without_config(folder / "far" / "away" / "alone", tmp_path / "some" / "where" / "old")
  assert config.stored(old) is None
  with caplog.at_level(logging.WARNING):
    assert read(old, cfg).arrays
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith(f"{old} was saved without a config: ")
  # With a config.json beside it, that one counts.
  shutil.copy(folder / "pretrained" / "config.json", old)
  with pytest.raises(ConfigError, match=r"model\.padding: 'same', but the encoder has 'torch'"):
    read(old, cfg)


def test_the_newest_record_that_can_be_read_counts(folder, tmp_path):
  shutil.copytree(folder / "pretrained", tmp_path / "run")
  (tmp_path / "run" / "config.json").unlink()
  (tmp_path / "run" / "checkpoints" / "99" / "record").mkdir(parents=True)
  (tmp_path / "run" / "checkpoints" / "99" / "record" / "record.json").write_text("{")
  assert config.stored(tmp_path / "run")["model.padding"] == "torch"


def test_a_run_goes_on_after_the_run_that_it_took_its_encoder_from_was_deleted(folder, tmp_path):
  shutil.copytree(folder / "pretrained", tmp_path / "source")
  flags = [f"--config.init.workdir={tmp_path / 'source'}"]
  before = config.load(str(folder / "linear.py"), flags)
  workdir.claim(tmp_path / "run", before)
  shutil.rmtree(tmp_path / "source")
  after = config.load(str(folder / "linear.py"), flags, tmp_path / "run")
  assert config.flatten(after) == config.flatten(before)
  assert after.model.padding == "torch"
  workdir.claim(tmp_path / "run", after)
  # The same command in another workdir has nothing to take the fields from.
  elsewhere = config.load(str(folder / "linear.py"), flags, tmp_path / "other")
  assert elsewhere.model.padding == "same"
