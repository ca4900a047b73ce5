"""Pictures are written whole, show what they are given, and survive broken rows."""

import json
import math
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from byolx.evaluation import plots
from byolx.runs import curves, metrics_log
from byolx.tasks.pretrain import Pretrain

KEYS = (
  "loss", "loss_byol", "loss_probe", "top1", "tau", "rate", "std", "rank", "norm_representation",
  "norm_projection", "images_per_second",
)  # fmt: skip


def run(n):
  """Rows such as a run of 100 epochs writes."""
  t = (np.arange(n) + 1) / n
  columns = {
    "step": (t * 20_000).astype(int), "epoch": 100 * t,
    "loss": 4 * np.exp(-4 * t), "loss_byol": 2 * np.exp(-4 * t) + 0.4, "loss_probe": 2 - t,
    "top1": 0.9 * t, "tau": 1 - 0.004 * (np.cos(np.pi * t) + 1) / 2, "rate": 0.2 * t,
    "std": 0.5 + 0.4 * t, "rank": 20 * t, "norm_representation": 8 + t,
    "norm_projection": 3 * 10 ** (6 * t), "images_per_second": 100 + t,
  }  # fmt: skip
  return [{key: column[i].item() for key, column in columns.items()} for i in range(n)]


def draw(rows, path):
  """The curves of pretraining."""
  curves.curves(rows, path, Pretrain.curves)


def picture(path):
  """A PNG as numbers; the only file in its folder."""
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  with Image.open(path) as image:
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def ink(image):
  """How much is not white."""
  return (image < 250).any(axis=2).mean()


def has(image, colour):
  wanted = [round(255 * part) for part in matplotlib.colors.to_rgb(colour)]
  return (np.abs(image.astype(int) - wanted).max(axis=2) <= 2).sum()


def test_curves_of_a_run(tmp_path):
  draw(run(300), tmp_path / "curves.png")
  image = picture(tmp_path / "curves.png")
  assert image.shape == (800, 2112, 3)
  # A line in each of eight panels.
  for rows in np.split(image, 2):
    for panel in np.split(rows, 4, axis=1):
      assert has(panel, "#0072B2") > 100
  assert has(image[:400, :528], "#D55E00") > 100  # the probe's loss


def test_curves_without_labels_or_rank_have_fewer_panels(tmp_path):
  some = ("step", "loss_byol", "std", "tau")
  draw([{key: row[key] for key in some} for row in run(12)], tmp_path / "c.png")
  image = picture(tmp_path / "c.png")
  assert image.shape == (400, 3 * 528, 3)
  assert has(image, "#D55E00") == 0


@pytest.mark.parametrize(
  "rows",
  [
    [],
    run(1),
    [{"step": 1}],
    [{"step": 1, "loss_byol": math.nan, "std": None}],
    [{"step": 1, "epoch": math.nan, "loss_byol": 0.0}, {"step": 2, "loss_byol": math.inf}],
    [{"loss_byol": 1.0}],
  ],
)
def test_curves_of_next_to_nothing(tmp_path, rows):
  draw(rows, tmp_path / "c.png")
  assert ink(picture(tmp_path / "c.png")) > 1e-3


def test_curves_of_rows_with_holes(tmp_path):
  rng = np.random.default_rng(0)
  rows = run(12)
  for row in rows:
    for key in KEYS:
      value = rng.choice([row[key], 0.0, -1.0, 1e9, math.nan, math.inf, None])
      if rng.random() < 0.3:
        del row[key]
      else:
        row[key] = value
  draw(rows, tmp_path / "c.png")
  image = picture(tmp_path / "c.png")
  for part in np.split(image, 2):
    for panel in np.split(part, 4, axis=1):
      assert has(panel, "#0072B2") > 20


def test_running_mean_keeps_lines_and_gaps():
  line = np.arange(50.0)
  np.testing.assert_allclose(curves._running_mean(line, 5)[2:-2], line[2:-2])
  line[[0, 20]] = math.nan
  smooth = curves._running_mean(line, 5)
  assert np.isnan(smooth[[0, 20]]).all()
  assert smooth[21] == pytest.approx((19 + 21 + 22 + 23) / 4)


def test_metrics_survive_a_cut_last_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert metrics_log.read_metrics(path) == []
  rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text)
  read = metrics_log.read_metrics(path)
  assert read[0] == rows[0]
  assert math.isnan(read[1]["loss"])
  path.write_bytes(text.encode() + b'{"step": 3, "lo\xc3')
  assert len(metrics_log.read_metrics(path)) == 2
  path.write_text('{"step": 1\n' + text)
  with pytest.raises(ValueError, match=r"line 1: .*expected a JSON object"):
    metrics_log.read_metrics(path)


@pytest.fixture(scope="module")
def digits():
  x, y = load_digits(return_X_y=True)
  return x.astype(np.float32), y.astype(np.int32)


def test_embedding_keeps_classes_together(digits):
  x, y = digits
  points = plots._project(x[:300], seed=0)
  distances = ((points[:, None] - points) ** 2).sum(axis=2)
  nearest = distances.argsort(axis=1)[:, 1]
  assert (y[:300][nearest] == y[:300]).mean() > 0.9


def test_embedding_is_a_picture_in_the_colours_of_its_classes(digits, tmp_path):
  x, y = digits
  names = [str(i) for i in range(10)]
  plots.embedding(x[:200], y[:200], names, tmp_path / "new" / "e.png", "digits, held out")
  image = picture(tmp_path / "new" / "e.png")
  for colour in plots.COLOURS:
    assert has(image, colour) > 50
  # The same again, byte for byte.
  before = (tmp_path / "new" / "e.png").read_bytes()
  plots.embedding(x[:200], y[:200], names, tmp_path / "new" / "e.png", "digits, held out")
  assert (tmp_path / "new" / "e.png").read_bytes() == before


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7])
def test_embedding_of_a_few_images(digits, tmp_path, n):
  x, y = digits
  plots.embedding(x[:n], y[:n], ("zero", "one"), tmp_path / "e.png", "few")
  image = picture(tmp_path / "e.png")
  assert has(image, plots.COLOURS[0]) > 50


def test_embedding_of_collapsed_and_of_flat_features(tmp_path):
  labels = np.zeros(40, np.int32)
  plots.embedding(np.ones((40, 8)), labels, ("a",), tmp_path / "e.png", "collapsed")
  assert has(picture(tmp_path / "e.png"), plots.COLOURS[0]) > 50
  one = np.linspace(-1, 1, 40)[:, None]
  plots.embedding(one, labels, ("a",), tmp_path / "e.png", "one dimension")
  assert has(picture(tmp_path / "e.png"), plots.COLOURS[0]) > 50
  with pytest.raises(ValueError, match="not finite"):
    plots.embedding(one * math.inf, labels, ("a",), tmp_path / "e.png", "broken")


def test_embedding_of_unlabelled_images_and_of_many_oddly_named_classes(digits, tmp_path):
  x, _ = digits
  plots.embedding(x[:30], np.full(30, -1), (), tmp_path / "e.png", "no labels")
  image = picture(tmp_path / "e.png")
  assert has(image, plots.FAINT) > 50
  assert has(image, plots.COLOURS[0]) == 0
  names = ["$x_1", "_hidden", "a very long name of a class, too long for a legend", "ß €"]
  labels = np.arange(120, dtype=np.int32) % 60
  plots.embedding(x[:120], labels, names, tmp_path / "e.png", "sixty classes")
  assert picture(tmp_path / "e.png").shape[1] > image.shape[1]
  looks = {plots._appearance(label) for label in range(80)}
  assert len(looks) == 80


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
  path = tmp_path / "curves.png"
  draw([{"step": 1, "std": 0.5}], path)
  before = path.read_bytes()

  def fail(place, content):
    with place.open("wb") as file:
      file.write(content[: len(content) // 2])
    raise OSError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
      draw([{"step": 1, "std": 0.6}], path)
  assert path.read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 1


def test_pictures_may_be_drawn_from_any_thread(tmp_path):
  before = dict(matplotlib.rcParams)
  thread = threading.Thread(target=draw, args=([{"step": 1, "std": 0.5}], tmp_path / "c.png"))
  thread.start()
  thread.join()
  assert ink(picture(tmp_path / "c.png")) > 1e-3
  assert dict(matplotlib.rcParams) == before
