"""Whole runs of classifiers on digits, from a pretrained encoder: what is chosen, measured, written."""

import contextlib
import io
import json

import numpy as np
import pytest
from tiny import config_text

from byolx import cli
from byolx.checkpoints import manager, pretrained
from byolx.core.config import ConfigError
from byolx.evaluation import classifiers
from byolx.runs import config, experiment, fit, initial_state, rollbacks
from byolx.runs.images import build_sources

pytestmark = pytest.mark.usefixtures("compiled")

LINEAR = """
from ml_collections import ConfigDict

def get_config():
  config = ConfigDict()
  config.task = "linear"
  config.init = {"inherit": ("data", "views", "model", "eval")}
  config.data = {"validation": "share"}
  config.optim = {"name": "sgd", "rates": (8.0, 0.4), "weight_decay": 0.0, "warmup_epochs": 0.0}
  config.train = {"epochs": 20, "batch_size": 96}
  config.log = {"every_steps": 5}
  config.mesh = {"data": 1}
  return config
"""


def byolx(*arguments):
  """Runs the command in this process: (exit code, stdout, stderr)."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = cli.main([str(argument) for argument in arguments])
  return code, out.getvalue(), err.getvalue()


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pretraining run in `pretrained`, and the config files."""
  folder = tmp_path_factory.mktemp("chain")
  text = config_text(train={"epochs": 2, "batch_size": 96}, mesh={"data": 1})
  (folder / "tiny.py").write_text(text)
  (folder / "linear.py").write_text(LINEAR)
  code, *_ = byolx("train", f"--config={folder}/tiny.py", f"--workdir={folder}/pretrained")
  assert code == 0
  return folder


@pytest.fixture(scope="module")
def linear(folder):
  """A finished linear evaluation: workdir, what was said."""
  workdir = folder / "linear"
  code, out, err = byolx(
    "train",
    f"--config={folder}/linear.py",
    f"--config.init.workdir={folder}/pretrained",
    "--config.eval.predictions=True",
    "--config.eval.bootstrap=2000",
    f"--workdir={workdir}",
  )
  assert code == 0, err
  return workdir, out, err


# Linear evaluation


def test_fields_are_those_of_the_pretraining_run(linear, folder):
  cfg = config.of_run(linear[0])
  before = config.of_run(folder / "pretrained" / "checkpoints")
  assert cfg.model == before.model
  assert cfg.views == before.views
  assert (cfg.eval.resize, cfg.views.size, cfg.data.source) == (8, 8, "digits")
  # What a file sets stays, and other groups are its own.
  assert (cfg.data.validation, cfg.optim.name, cfg.task) == ("share", "sgd", "linear")


def test_the_best_rate_on_validation_images_is_tested_once(linear):
  records = results(linear[0])
  validation = [r for r in records if r["split"] == "validation"]
  test = [r for r in records if r["split"] == "test"]
  assert [(r["rate"], r["metric"]) for r in validation] == [
    (rate, metric) for rate in (8.0, 0.4) for metric in ("top1", "top5")
  ]
  top1 = {r["rate"]: r["value"] for r in validation if r["metric"] == "top1"}
  best = max(top1, key=top1.get)
  assert {r["rate"] for r in records if r["chosen"]} == {best}
  assert [(r["rate"], r["metric"]) for r in test] == [(best, "top1"), (best, "top5")]
  for record in records:
    assert 0 < record["value"] <= 1
    assert record["task"] == record["protocol"] == "linear"
    assert (record["encoder"], record["labels"], record["n"]) == ("online", 1.0, 1)
    assert (record["data"], record["pretrained_on"]) == ("digits", "digits")
    assert record["pretrain"]["byol.projection_size"] == 8
    assert record["devices"] == "1 x cpu"
  # Chance is 0.1.
  assert test[0]["value"] > 0.3
  assert test[1]["value"] > test[0]["value"]


def test_everything_is_in_the_workdir(linear):
  workdir, out, err = linear
  names = {path.name for path in workdir.iterdir()}
  assert names >= {
    "config.json", "metrics.jsonl", "checkpoints", "results.json", "curves.png", "views.png",
    "lineage.json", "frozen_encoder.json", "predictions.npz",
  }  # fmt: skip
  assert "1,293 for training, 144 for validation, 360 for the test (digits, 10 classes)" in out
  assert "the frozen encoder is unchanged, bit for bit" in out
  assert "heads     2 in parallel, base rates 8, 0.4" in out
  assert "top-1" in err
  assert "online top-1" not in err


def test_predictions_are_the_numbers_in_detail(linear):
  found = np.load(linear[0] / "predictions.npz", allow_pickle=False)
  top1, top5 = (r for r in results(linear[0]) if r["split"] == "test")
  assert len(found["label"]) == 360
  right = found["classes"][:, 0] == found["label"]
  assert np.mean(right) == pytest.approx(top1["value"])
  assert np.mean((found["classes"] == found["label"][:, None]).any(1)) == pytest.approx(
    top5["value"]
  )
  assert found["name"][3] == f"digits/{found['index'][3]}"
  assert (np.diff(found["probabilities"], axis=1) <= 0).all()
  # The bootstrap's interval is close to the normal one for so many images.
  p = top1["value"]
  assert top1["interval"] == pytest.approx(1.96 * np.sqrt(p * (1 - p) / 360), rel=0.15)


def test_bootstrap_is_that_of_resampled_answers():
  correct = np.random.default_rng(0).random(500) < 0.8
  rng = np.random.default_rng(1)
  means = [rng.choice(correct, 500).mean() for _ in range(4000)]
  low, high = np.percentile(means, [2.5, 97.5])
  found = classifiers.bootstrap_interval(correct, 20_000, seed=0)
  assert found == pytest.approx((high - low) / 2, rel=0.06)
  assert classifiers.bootstrap_interval(np.ones(9, bool), 100, seed=0) == 0


def test_a_frozen_encoder_that_moved_is_named(linear):
  workdir = linear[0]
  cfg = config.of_run(workdir)
  exp = experiment.build(cfg)
  with contextlib.closing(manager.Checkpoints(workdir / "checkpoints")) as checkpoints:
    state = fit.restore(exp, checkpoints, rollbacks.Rollbacks(workdir))
  initial_state.check_frozen(state, workdir)
  assert {name.split(".")[0] for name in pretrained.arrays_of(state)} == {
    "stem",
    "stem_norm",
    "groups",
  }
  model = state.model()
  mean = model.encoder.stem_norm.mean
  mean.set_value(mean[...].at[0].multiply(1 + 1e-6))
  state.rest["encoder"]["stem_norm"]["mean"].set_value(mean[...])
  with pytest.raises(RuntimeError, match=r"stem_norm\.mean.*; expected every bit as it was"):
    initial_state.check_frozen(state, workdir)


def test_test_images_wait_until_they_are_asked_for(folder, linear):
  workdir = folder / "untested"
  command = [f"--config={folder}/linear.py", f"--config.init.workdir={folder}/pretrained"]
  code, out, _ = byolx("train", *command, "--config.eval.test=False", f"--workdir={workdir}")
  assert code == 0
  assert "1,293 for training, 144 held out" in out
  before = results(workdir)
  assert {r["split"] for r in before} == {"validation"}
  assert byolx("eval", f"--from={workdir}", "--test")[0] == 0
  after = results(workdir)
  assert [r for r in after if r["split"] == "validation"] == before
  values = [[r["value"] for r in of if r["split"] == "test"] for of in (after, results(linear[0]))]
  assert values[0] == values[1]


# All of the network


def test_fine_tuning_on_a_share_of_the_labels(folder):
  workdir = folder / "finetuned"
  code, out, err = byolx(
    "train",
    f"--config={folder}/linear.py",
    f"--config.init.workdir={folder}/pretrained",
    "--config.task=finetune",
    "--config.optim.rates=()",
    "--config.optim.base_rate=0.2",
    "--config.data.labels=0.1",
    "--config.train.batch_size=48",
    "--config.train.epochs=10",
    f"--workdir={workdir}",
  )
  assert code == 0, err
  assert "144 for training, 144 for validation, 360 for the test" in out
  assert "training  classifier and encoder; encoder of" in out
  assert {r["labels"] for r in results(workdir)} == {0.1}
  assert {r["task"] for r in results(workdir)} == {"finetune"}
  assert not (workdir / "frozen_encoder.json").exists()


def test_from_scratch_with_randaugment_over_two_seeds(folder):
  workdir = folder / "supervised"
  code, out, err = byolx(
    "train",
    f"--config={folder}/linear.py",
    f"--config.init.like={folder}/pretrained",
    "--config.task=supervised",
    "--config.optim.rates=()",
    "--config.optim.base_rate=0.4",
    "--config.classify.views=randaugment",
    "--config.classify.label_smoothing=0.1",
    "--config.train.epochs=2",
    "--seeds=0,1",
    f"--workdir={workdir}",
  )
  assert code == 0, err
  assert "encoder from scratch" in out
  table = out[out.rindex("Mean over seeds 0, 1") :]
  assert "\ntest " in table
  records = results(workdir)
  means = [r for r in records if isinstance(r["seed"], list)]
  for mean in means:
    of_seed = [
      r["value"]
      for r in records
      if not isinstance(r["seed"], list)
      and (r["split"], r["metric"]) == (mean["split"], mean["metric"])
    ]
    assert len(of_seed) == 2
    assert mean["value"] == pytest.approx(np.mean(of_seed))
    assert mean["interval"] == pytest.approx(np.ptp(of_seed) / 2)
  assert {r["encoder"] for r in means} == {"scratch"}
  assert {r["pretrained_on"] for r in means} == {None}


# What cannot be


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ([], "task=linear without init.workdir: expected the workdir or checkpoint"),
    (
      ["--config.task=supervised", "--config.init.workdir={folder}/pretrained"],
      "it starts from scratch; expected task=finetune, or init.like",
    ),
    (
      ["--config.init.workdir={folder}/pretrained", "--config.data.validation=none",
       "--config.optim.rates=()", "--config.eval.test=False"],
      "nothing would be measured",
    ),
    (["--config.init.workdir={folder}"], "expected a workdir of `byolx train`, with a config.json"),
    (
      ["--config.init.workdir={folder}/pretrained", "--config.model.channels=(16,)"],
      "another function (model.channels: (16,), but the encoder has (8,)); expected",
    ),
    (
      ["--config.init.workdir={folder}/pretrained", "--config.data.label_list={folder}/none.txt"],
      "No such file",
    ),
    (
      ["--config.init.workdir={folder}/pretrained", "--config.data.label_list={folder}/tiny.py"],
      "listed images are missing, such as",
    ),
  ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(folder, tmp_path, overrides, said):
  given = [one.format(folder=folder) for one in overrides]
  code, _, err = byolx("train", f"--config={folder}/linear.py", f"--workdir={tmp_path}/run", *given)
  assert code == 2
  assert said in err
  assert err.count("\n") == 1


def test_a_list_of_labels_is_trained_on_whole(folder):
  whole = build_sources(config.defaults()).train
  cfg = config.load(
    f"{folder}/linear.py",
    [f"--config.init.workdir={folder}/pretrained", f"--config.data.label_list={folder}/list.txt"],
  )
  names = [whole.names[i] for i in range(0, 1437, 3)]
  (folder / "list.txt").write_text("\n".join(names) + "\n")
  images = build_sources(cfg)
  assert list(images.train.names) == names
  assert images.labels == round(479 / 1437, 4)
  assert not set(names) & set(images.validation.names)
  assert 0 < len(images.validation) < 144
  cfg.data.labels = 0.5
  with pytest.raises(ConfigError, match="expected one of them"):
    build_sources(cfg)
