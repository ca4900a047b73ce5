"""Means over seeds, by numbers worked out by hand."""

import pytest

from byolx.runs import results


def record(seed, value, **more):
  known = dict.fromkeys(results.KEYS, "same")
  return {**known, "value": value, "interval": None, "n": 1, "seed": seed, **more}


def test_what_differs_only_in_the_seed_is_averaged():
  (mean,) = results.mean_over_seeds([record(0, 0.5), record(1, 0.8), record(2, 0.8)])
  assert mean["value"] == pytest.approx(0.7)
  assert mean["interval"] == pytest.approx(0.15)
  assert (mean["n"], mean["seed"], mean["metric"]) == (3, [0, 1, 2], "same")


def test_one_seed_has_the_interval_that_it_had():
  for interval in (None, 0.1):
    (mean,) = results.mean_over_seeds([record(4, 0.5, interval=interval, n=3)])
    assert (mean["value"], mean["interval"], mean["n"], mean["seed"]) == (0.5, interval, 3, [4])


def test_what_else_differs_is_listed():
  (mean,) = results.mean_over_seeds([record(0, 0.5, rate=0.1), record(1, 0.7, rate=0.2)])
  assert mean["rate"] == [0.1, 0.2]


def test_other_measurements_are_kept_apart():
  records = [record(s, s, metric=metric) for s in (0, 1) for metric in ("top5", "top1")]
  assert [mean["metric"] for mean in results.mean_over_seeds(records)] == ["top5", "top1"]
  records = [record(0, 0.1, commit="a"), record(1, 0.2, commit="b")]
  assert len(results.mean_over_seeds(records)) == 2
  (mean,) = results.mean_over_seeds(records, ["metric"])
  assert mean["commit"] == ["a", "b"]


def test_a_workdir_without_results_has_no_records(tmp_path):
  assert results.read(tmp_path) == []
