"""Records of workdirs, their means over seeds, and which number of the paper they are."""

import json
import logging
from pathlib import Path

import pytest
from made_runs import FINETUNE, LINEAR, SUPERVISED, fields, record, run, sweep

from byolx.core.config import ConfigError
from byolx.reports import compare, measurements
from byolx.reports.paper import TABLES

DOCS = Path(__file__).parents[2] / "docs"
ABLATION = {
  "byol.tau_base": 0.99, "optim.base_rate": 0.3, "optim.weight_decay": 1e-6, "train.epochs": 300.0,
}  # fmt: skip


def read(*paths, every=False):
  return compare.results(measurements.read(paths, every), every)


def tables(result):
  """Numbers of the tables that have a result, and what they have."""
  return [(table.number, cell.value) for table, _, cell in compare.in_paper(result)]


# Reading


def test_a_run(tmp_path):
  folder = run(tmp_path / "a", [record()], rows=[(50, 1024.0), (100, 512.0)])
  (one,) = measurements.read([folder])
  assert one.record == record()
  assert one.workdirs == (folder,)
  assert one.config == json.loads((folder / "config.json").read_text())
  # 50 steps of 1024 images at 1024 a second, then 50 at 512.
  assert one.seconds == 50 + 100


@pytest.mark.parametrize("rows", [(), [(50, 0.0)], [(50, None)]])
def test_an_unknown_cost(tmp_path, rows):
  (one,) = measurements.read([run(tmp_path / "a", [record()], rows=rows)])
  assert one.seconds is None


def test_a_last_line_that_was_cut_off_counts_for_nothing(tmp_path):
  folder = run(tmp_path / "a", [record()], rows=[(50, 1024.0)])
  with (folder / "metrics.jsonl").open("a") as file:
    file.write('{"step": 100, "ima')
  assert measurements.training_seconds(folder, 1024) == 50


def test_older_records_lack_keys(tmp_path):
  old = {"task": "pretrain", "protocol": "knn", "split": "test", "metric": "top1", "value": 0.5}
  (one,) = read(run(tmp_path / "a", [old], {"data.source": "fashion_mnist"}))
  assert (one.value, one.interval, one.n, one.seeds) == (0.5, None, 1, ())
  assert (one.configs, one.commits) == ((), ())
  assert one.data == "fashion_mnist"
  assert tables(one) == []


def test_a_folder_of_workdirs_reports_every_one_below(tmp_path):
  run(tmp_path / "runs" / "a", [record(value=0.1)], LINEAR | {"model.width": 2.0})
  run(tmp_path / "runs" / "deep" / "b", [record(value=0.2)])
  run(tmp_path / "runs" / "a" / "checkpoints" / "not-one", [record(value=0.3)])
  (tmp_path / "runs" / "notes").mkdir()
  assert [one.value for one in read(tmp_path / "runs")] == [0.1, 0.2]


def test_a_workdir_that_is_named_twice_counts_once(tmp_path):
  folder = run(tmp_path / "a", [record()])
  assert len(measurements.read([folder, tmp_path, folder / ".." / "a"])) == 1


def test_runs_without_results_are_left_out_of_a_folder(tmp_path, caplog):
  run(tmp_path / "a", [record()])
  run(tmp_path / "b", None)
  with caplog.at_level(logging.WARNING, "byolx"):
    assert len(measurements.read([tmp_path])) == 1
  assert caplog.messages == [
    f"{tmp_path / 'b'}: no results yet; run `byolx eval --from={tmp_path / 'b'}`, or let its "
    "`byolx train` finish"
  ]


def test_a_sweep_reports_its_own_results(tmp_path):
  folder = tmp_path / "sweep"
  chosen = record(value=0.7, seed=[0, 1], n=2, interval=0.01, workdir="final/c1", cell={"a": 1})
  sweep(folder, [chosen])
  for seed, value in ((0, 0.69), (1, 0.71)):
    of_seed = [record(value=value, seed=seed)]
    run(folder / "final" / "c1" / f"seed_{seed}", of_seed, LINEAR | {"seed": seed}, [(10, 512.0)])
  run(folder / "cells" / "c0", [record(split="validation", chosen=False, value=0.6)])
  (one,) = read(folder)
  assert (one.value, one.interval, one.n, one.seeds) == (0.7, 0.01, 2, (0, 1))
  # The config and the cost are those of the runs that the record names.
  assert one.workdirs == tuple(folder / "final" / "c1" / f"seed_{seed}" for seed in (0, 1))
  assert one.seconds == 20
  assert tables(one) == [("7", 74.3), ("9", 74.3), ("13", 74.3)]
  assert [each.value for each in read(tmp_path)] == [0.7]
  # The sweep's mean, the mean of its two final runs, and the cell.
  assert sorted(round(each.value, 3) for each in read(folder, every=True)) == [0.6, 0.7, 0.7]


def test_a_sweep_whose_runs_are_gone(tmp_path):
  (one,) = read(sweep(tmp_path / "s", [record(workdir="/gone/c1", seed=[0, 1], n=2)]))
  assert (one.config, one.workdirs, one.seconds) == ({}, (), None)
  assert tables(one) == []


def test_results_alone_are_reported_by_their_means():
  """docs/digits.md has this table, written by hand from the same file."""
  found = read(DOCS / "digits")
  wanted = {
    ("online", 0.01): (81.7, 3.6),
    ("target", 0.1): (96.5, 0.6),
    ("pixels", 1.0): (96.1, 0.4),
  }
  for (encoder, labels), (value, interval) in wanted.items():
    (one,) = [
      one
      for one in found
      if one.record["protocol"] == "linear"
      and (one.record["encoder"], one.record["labels"]) == (encoder, labels)
    ]
    assert one.seeds == (0, 1, 2)
    assert 100 * one.value == pytest.approx(value, abs=0.05)
    assert 100 * one.interval == pytest.approx(interval, abs=0.05)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda p: p / "none", "none, which does not exist: expected a workdir of a run or a sweep"),
    (lambda p: p.mkdir() or p, "no workdir, and none below; expected a folder with a config.json"),
    (lambda p: run(p, None), "no results yet; run `byolx eval --from="),
    (lambda p: sweep(p, None), "no results yet; let its `byolx sweep` finish"),
    (lambda p: run(p / "a", None).parent, "no results yet; run `byolx eval --from="),
    (
      lambda p: run(p, []),
      "no record in results.json; expected records, which need labelled test images",
    ),
    (lambda p: run(p, ["x"]), "results.json: 'x'; expected records with task, protocol, split"),
    (lambda p: run(p, [record(value=None)]), "results.json: value None; expected a number in 0..1"),
    (lambda p: run(p, {"a": 1}), "results.json: dict; expected a list of records"),
  ],
)
def test_what_is_no_result(tmp_path, make, said):
  with pytest.raises(ConfigError) as refused:
    measurements.read([make(tmp_path / "x")])
  assert said in str(refused.value)
  assert "\n" not in str(refused.value)


def test_files_that_are_damaged(tmp_path):
  folder = run(tmp_path / "a", [record()], rows=[(1, 1.0)])
  (folder / "metrics.jsonl").write_text("x\n{}\n")
  with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1: b'x'; expected a JSON object"):
    measurements.read([folder])
  (folder / "results.json").write_text("[")
  with pytest.raises(ConfigError, match=r"results.json: not JSON .*; expected a list of records"):
    measurements.read([folder])


# Means


def test_seeds_are_averaged_and_the_interval_is_half_their_range(tmp_path):
  for seed, value in enumerate((0.70, 0.74, 0.72)):
    folder = tmp_path / str(seed)
    changes = LINEAR | {"seed": seed, "log.every_steps": 7 + seed}
    run(folder, [record(seed=seed, value=value)], changes, [(10, 1024.0 / (1 + seed))])
  (one,) = read(tmp_path)
  assert one.value == pytest.approx(0.72)
  assert one.interval == pytest.approx(0.02)
  assert (one.n, one.seeds) == (3, (0, 1, 2))
  assert one.seconds == pytest.approx(20)  # 10, 20 and 30
  assert one.workdirs == tuple(tmp_path / str(seed) for seed in range(3))


def test_seeds_of_the_pretraining_are_averaged_too(tmp_path):
  for seed, value in enumerate((0.70, 0.74)):
    changes = LINEAR | {"init.workdir": f"runs/pretrain_{seed}"}
    pretrain = {**ABLATION, **({"seed": seed} if seed else {})}
    run(tmp_path / str(seed), [record(pretrain=pretrain, value=value, config=str(seed))], changes)
  (one,) = read(tmp_path)
  assert (one.value, one.n) == (pytest.approx(0.72), 2)
  assert one.configs == ("0", "1")


@pytest.mark.parametrize(
  ("first", "second"),
  [
    ({"metric": "top1"}, {"metric": "top5"}),
    ({"labels": 0.1}, {"labels": 0.01}),
    ({"encoder": "online"}, {"encoder": "target"}),
    ({"data": "imagenet"}, {"data": "places365"}),
    ({"pretrained_on": "imagenet"}, {"pretrained_on": "places365"}),
    ({"pretrain": {}}, {"pretrain": {"train.epochs": 300.0}}),
    ({"step": 1}, {"step": 2}),
    ({"seed": [0, 1]}, {"seed": [2, 3]}),
  ],
)
def test_what_differs_in_more_than_seeds_is_not_averaged(tmp_path, first, second):
  run(tmp_path / "a", [record(seed=0) | first])
  run(tmp_path / "b", [record(seed=1) | second])
  assert [one.n for one in read(tmp_path)] == [1, 1]


def test_other_configs_are_not_averaged(tmp_path):
  run(tmp_path / "a", [record(seed=0)])
  run(tmp_path / "b", [record(seed=1)], LINEAR | {"seed": 1, "optim.base_rate": 0.4})
  assert len(read(tmp_path)) == 2


def test_one_seed_at_two_commits_is_two_results(tmp_path):
  for name, seed, commit in (("a", 0, "x"), ("b", 1, "x"), ("c", 0, "y")):
    value = 0.7 + 0.01 * seed + 0.1 * (commit == "y")
    run(tmp_path / name, [record(seed=seed, commit=commit, value=value)], LINEAR | {"seed": seed})
  assert [(one.commits, one.n) for one in read(tmp_path)] == [(("x",), 2), (("y",), 1)]


def test_seeds_at_two_commits_are_averaged_and_both_are_named(tmp_path):
  for seed, commit in enumerate("xy"):
    run(tmp_path / commit, [record(seed=seed, commit=commit)], LINEAR | {"seed": seed})
  (one,) = read(tmp_path)
  assert one.commits == ("x", "y")


def test_a_copy_of_a_workdir_counts_once(tmp_path):
  for name in "ab":
    run(tmp_path / name, [record()])
  assert [one.n for one in read(tmp_path)] == [1]


def test_chosen_rates_may_differ_between_seeds(tmp_path):
  for seed in (0, 1):
    rates = [record(seed=seed, rate=0.1 * (1 + seed)), record(seed=seed, rate=0.9, chosen=False)]
    on_validation = [record(seed=seed, split="validation", rate=r) for r in (0.1, 0.9)]
    run(tmp_path / str(seed), rates + on_validation, LINEAR | {"seed": seed})
  (one,) = read(tmp_path)
  assert one.n == 2
  assert len(read(tmp_path, every=True)) == 3


# The paper's numbers


@pytest.mark.parametrize(
  ("changes", "of_record", "wanted"),
  [
    ({}, {}, [("7", 74.3), ("9", 74.3), ("13", 74.3)]),
    ({"model.width": 2.0}, {}, [("9", 77.4)]),
    ({"model.width": 2}, {"metric": "top5", "labels": 1}, [("9", 93.6)]),
    ({"model.arch": "resnet200", "model.width": 2.0}, {"metric": "top5"}, [("7", 94.8), ("9", 94.9)]),
    ({"classify.views": "pretrain"}, {}, [("7", 74.4)]),
    ({"classify.tclip": 20.0, "classify.logit_penalty": 0.01}, {}, [("7", 74.7)]),
    ({"classify.tclip": 20.0}, {}, []),
    ({"model.arch": "resnet18"}, {}, []),
    ({"init.encoder": "target"}, {}, []),
    ({}, {"labels": 0.1}, []),
    ({}, {"split": "validation"}, []),
    ({}, {"chosen": False}, []),
    ({}, {"pretrained_on": None, "pretrain": None}, []),
    ({}, {"data": "places365"}, [("13", 51.0)]),
    ({}, {"pretrained_on": "places365"}, [("13", 58.5)]),
    ({}, {"pretrained_on": "places365", "data": "places365"}, [("13", 53.2)]),
    # Weights whose training is unknown may be the paper's; another training is not.
    ({}, {"pretrain": None}, [("7", 74.3), ("9", 74.3)]),
    ({}, {"pretrain": {"train.epochs": 100.0}}, []),
    ({}, {"pretrain": {"model.dtype": "bfloat16"}}, [("7", 74.3), ("9", 74.3), ("13", 74.3)]),
    (
      {},
      {"pretrain": {"train.batch_size": 512, "optim.base_rate": 0.4, "byol.tau_base": 0.9995}},
      [("text", 73.7)],
    ),
    (FINETUNE, {"task": "finetune", "protocol": "finetune"}, [("8", 77.7)]),
    (
      SUPERVISED,
      {"task": "supervised", "protocol": "supervised", "pretrained_on": None, "pretrain": None},
      [("9", 76.4)],
    ),
  ],
)  # fmt: skip
def test_which_numbers_a_run_is(changes, of_record, wanted):
  one = measurements.Measurement(record(**of_record), (), fields(LINEAR | changes), None)
  assert tables(compare.results([one], include_all=True)[0]) == wanted


BASELINE = ["14a", "14b", "15a", "15b", "16", "17", "18", "19", "20", "21"]


@pytest.mark.parametrize(
  ("pretrain", "wanted"),
  [
    ({}, [(number, 72.5) for number in BASELINE]),
    ({"optim.base_rate": 0.4}, [("15a", 72.3)]),
    ({"optim.base_rate": 1}, [("15a", 69.4)]),
    ({"optim.weight_decay": 5e-6}, [("15b", 71.0)]),
    ({"byol.projection_size": 64}, [("14b", 72.2)]),
    ({"byol.projector_depth": 3}, [("14a", 72.1)]),
    ({"train.micro_batch": 128}, [("16", 69.6)]),
    ({"train.batch_size": 128}, []),
    ({"views.view2.blur_probability": 0.0}, [("17", 72.4)]),
    ({"views.view1.crop_area": [0.08, 1.0]}, [(number, 72.5) for number in BASELINE]),
    ({"views.view1.crop_area": [0.2, 1.0]}, []),
    ({"byol.target": "stop_gradient"}, [("19", 5.5), ("21", 5.5), ("22", 3.2)]),
    ({"byol.target": "online", "byol.predictor": False}, [("19", 0.1)]),
    ({"optim.base_rate": 0.4, "byol.projection_size": 64}, []),
  ],
)
def test_which_ablation_a_pretraining_is(pretrain, wanted):
  of_run = record(pretrain=ABLATION | pretrain)
  one = measurements.Measurement(of_run, (), fields(LINEAR), None)
  assert tables(compare.results([one])[0]) == wanted


def test_an_ablation_needs_a_known_pretraining():
  condition = TABLES["15a"].condition(TABLES["15a"].rows[3], TABLES["15a"].columns[0])
  config = fields(LINEAR)
  assert compare.matches(condition, record(pretrain=ABLATION), config)
  assert not compare.matches(condition, record(pretrain=None), config)
  missing = record(pretrain=ABLATION)
  del missing["pretrained_on"]
  assert not compare.matches(condition, missing, config)


def test_a_record_that_does_not_say_where_its_encoder_comes_from_may_be_table_9():
  condition = TABLES["9"].condition(TABLES["9"].rows[0], TABLES["9"].columns[0])
  some = {k: v for k, v in record().items() if k not in ("pretrained_on", "pretrain", "chosen")}
  assert compare.matches(condition, some, fields(LINEAR))
  # The data set, where the record lacks it, is the config's; a config that is lost is no config.
  del some["data"]
  assert not compare.matches(condition, some, fields(LINEAR))
  assert compare.matches(condition, some, fields(LINEAR | {"data.source": "imagenet"}))
  assert not compare.matches(condition, record(), {})


# In words


@pytest.mark.parametrize(
  ("changes", "of_record", "wanted"),
  [
    ({}, {}, "linear"),
    ({"classify.views": "pretrain", "classify.tclip": 20.0, "classify.logit_penalty": 0.01}, {},
     "linear, pretrain views, tclip 20, logit penalty 0.01"),
    ({}, {"task": "finetune", "protocol": "finetune"}, "fine-tuning"),
    ({"classify.views": "randaugment"}, {"task": "supervised", "protocol": "supervised"},
     "supervised, randaugment views"),
    ({}, {"task": "pretrain", "protocol": "knn"}, "k-NN"),
    ({}, {"task": "pretrain", "protocol": "linear"}, "linear probe"),
    ({}, {"split": "validation", "rate": 0.4, "chosen": False},
     "linear, validation, not chosen, rate 0.4"),
  ],
)  # fmt: skip
def test_protocols_in_words(changes, of_record, wanted):
  one = measurements.Measurement(record(**of_record), (), fields(LINEAR | changes), None)
  assert compare.protocol(compare.results([one], include_all=True)[0]) == wanted


@pytest.mark.parametrize(
  ("config", "wanted"),
  [
    ({"model.arch": "resnet50", "model.width": 2.0}, "ResNet-50 2×"),
    ({"model.arch": "resnet18", "model.width": 0.25}, "ResNet-18 0.25×"),
    ({"model.arch": "custom", "model.channels": [8, 16]}, "custom 8-16"),
    ({}, ""),
  ],
)
def test_networks_in_words(config, wanted):
  assert compare.network(config) == wanted


def test_costs_in_words(tmp_path):
  run(tmp_path / "a", [record(devices="2 x cpu")], rows=[(10, 1024 / 73.0)])
  (one,) = read(tmp_path)
  assert compare.cost(one) == "12 min 10 s on 2 x cpu"
  run(
    tmp_path / "b", [record(devices="2 x cpu", seed=1)], LINEAR | {"seed": 1}, [(10, 1024 / 71.0)]
  )
  (one,) = read(tmp_path)
  assert compare.cost(one) == "2 × 12 min 00 s on 2 x cpu"
