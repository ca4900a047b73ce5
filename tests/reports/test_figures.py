"""Pictures of results: a line for each protocol over shares of labels, or bars, and the paper's marks."""

import matplotlib
import numpy as np
import pytest
from made_runs import LINEAR, fields, record
from PIL import Image

from byolx.evaluation import plots
from byolx.reports import compare, figures, measurements


def results(*records, changes=LINEAR):
  made = [measurements.Measurement(one, (), fields(changes), None) for one in records]
  return compare.results(made)


def picture(path):
  """A PNG as numbers; the only file in its folder."""
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def has(image, colour):
  wanted = [round(255 * part) for part in matplotlib.colors.to_rgb(colour)]
  return (np.abs(image.astype(int) - wanted).max(axis=2) <= 2).sum()


def over_shares(task, offset=0.0, **changes):
  return [
    record(task=task, protocol=task, labels=share, value=0.6 + 0.1 * i + offset, **changes)
    for i, share in enumerate((0.01, 0.1, 1.0))
  ]


def test_a_line_for_each_protocol(tmp_path):
  few = results(*over_shares("finetune", pretrain={"train.epochs": 1.0}))
  figures.draw(few, tmp_path / "one" / "f.png")
  one = picture(tmp_path / "one" / "f.png")
  both = results(
    *over_shares("finetune", pretrain={"train.epochs": 1.0}),
    *over_shares("supervised", -0.1, pretrained_on=None),
  )
  figures.draw(both, tmp_path / "two" / "f.png")
  two = picture(tmp_path / "two" / "f.png")
  assert has(one, plots.COLOURS[0]) > 500
  assert has(one, plots.COLOURS[1]) == 0
  assert has(two, plots.COLOURS[0]) > 300
  assert has(two, plots.COLOURS[1]) > 300


def test_an_interval_is_drawn_where_several_were_averaged(tmp_path):
  def drawn(name, n):
    few = results(*over_shares("finetune", n=n, interval=0.05, pretrain={"train.epochs": 1.0}))
    figures.draw(few, tmp_path / name / "f.png")
    return has(picture(tmp_path / name / "f.png"), plots.COLOURS[0])

  assert drawn("three", 3) > drawn("one", 1) + 100


def test_bars_and_the_papers_mark(tmp_path):
  figures.draw(results(record(pretrain={"train.epochs": 1.0})), tmp_path / "a" / "f.png")
  figures.draw(results(record()), tmp_path / "b" / "f.png")
  plain, marked = picture(tmp_path / "a" / "f.png"), picture(tmp_path / "b" / "f.png")
  for image in (plain, marked):
    assert (np.ptp(image.astype(int), axis=2) > 80).sum() > 5000  # a blue bar
  assert has(marked, plots.INK) > has(plain, plots.INK) + 100


def test_every_metric_and_data_set_gets_a_panel(tmp_path):
  one = results(record())
  figures.draw(one, tmp_path / "1" / "f.png")
  more = [record(), record(metric="top5", value=0.9), record(data="places365", value=0.5)]
  figures.draw(results(*more), tmp_path / "3" / "f.png")
  small, large = picture(tmp_path / "1" / "f.png"), picture(tmp_path / "3" / "f.png")
  assert large.shape[0] > 2 * small.shape[0]


@pytest.mark.parametrize(
  "records",
  [
    [record(value=0.0)],
    [record(value=1.0, n=3, interval=0.1)],
    [{"task": "pretrain", "protocol": "knn", "split": "test", "metric": "f$1$", "value": 0.5}],
    [*over_shares("finetune"), record(labels=None)],
    [*over_shares("finetune", data="_odd $name"), record(data=None)],
    [record(encoder=f"encoder {i}", value=0.5 + i / 100) for i in range(30)],
    [one for i in range(15) for one in over_shares("linear", encoder=f"encoder {i}")],
  ],
)
def test_anything_can_be_drawn(tmp_path, records):
  figures.draw(results(*records), tmp_path / "f.png")
  assert (picture(tmp_path / "f.png") < 250).any(axis=2).mean() > 0.005
