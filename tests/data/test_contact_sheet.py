"""The contact sheet: every pixel of every view is on it, where it belongs."""

import numpy as np
import pytest

from byolx.data.contact_sheet import draw_sheet


def images(n, *shape):
  return list(np.random.default_rng(n).integers(0, 250, (n, *shape, 3), dtype=np.uint8))


def pairs_of(views, rows, pairs):
  it = iter(views)
  return [[(next(it), next(it)) for _ in range(pairs)] for _ in range(rows)]


def contains(sheet, tile):
  """The places, (top, left), at which `tile` is on the sheet."""
  h, w = tile.shape[:2]
  tops, lefts = np.nonzero((sheet[: -h + 1, : -w + 1] == tile[0, 0]).all(axis=-1))
  return [
    (t, x)
    for t, x in zip(tops.tolist(), lefts.tolist(), strict=True)
    if np.array_equal(sheet[t : t + h, x : x + w], tile)
  ]


@pytest.mark.parametrize(("size", "factor"), [(16, 6), (28, 4), (96, 1), (224, 1)])
def test_views_stand_in_rows_and_columns(size, factor):
  originals, views = images(2, 8, 8), images(8, size, size)
  sheet = draw_sheet(originals, pairs_of(views, 2, 2))
  assert sheet.dtype == np.uint8
  enlarged = [np.kron(v, np.ones((factor, factor, 1), np.uint8)) for v in views]
  places = [contains(sheet, tile) for tile in enlarged]
  assert all(len(found) == 1 for found in places)
  tops, lefts = np.array([found[0] for found in places]).reshape(2, 4, 2).transpose(2, 0, 1)
  assert (tops == tops[:, :1]).all()
  assert (lefts == lefts[:1]).all()
  assert (np.diff(lefts, axis=1) >= size * factor).all()
  assert lefts[0, 2] - lefts[0, 1] > lefts[0, 1] - lefts[0, 0]  # pairs stand together
  assert lefts.min() >= size * factor  # the originals come first


def test_labels_are_written_above_every_column():
  views = images(4, 16, 16)
  sheet = draw_sheet(images(1, 8, 8), pairs_of(views, 1, 2))
  inked = (sheet[:20] < 200).any(axis=(0, 2))
  lefts = [contains(sheet, np.kron(v, np.ones((6, 6, 1), np.uint8)))[0][1] for v in views]
  for left in [6, *lefts]:
    assert 20 < inked[left : left + 96].sum() < 90
    inked[left : left + 96] = False
  assert not inked.any()


def test_single_views_stand_one_by_one():
  views = images(3, 96, 96)
  sheet = draw_sheet(images(1, 8, 8), [[(view,) for view in views]])
  (tops, lefts) = np.array([contains(sheet, view)[0] for view in views]).T
  assert (tops == tops[0]).all()
  assert len(set(np.diff(lefts))) == 1
  assert 96 < np.diff(lefts)[0] < 96 + 20


def test_originals_keep_their_shape():
  wide, tall = np.full((50, 200, 3), 90, np.uint8), np.full((300, 100, 3), 160, np.uint8)
  sheet = draw_sheet([wide, tall], pairs_of(images(4, 96, 96), 2, 1))
  column = sheet[24:, : 96 + 6]
  for grey, shape in ((90, (24, 96)), (160, (96, 32))):
    rows, columns = np.nonzero((column == grey).all(axis=-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == shape


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match="1 originals and rows of \\[1, 1\\] pairs"):
    draw_sheet(images(1, 8, 8), pairs_of(images(4, 16, 16), 2, 1))
  with pytest.raises(ValueError, match="0 originals"):
    draw_sheet([], [])
  with pytest.raises(ValueError, match="one size"):
    draw_sheet(images(1, 8, 8), [[(images(1, 16, 16)[0], images(1, 28, 28)[0])]])
  with pytest.raises(ValueError, match="one size"):
    draw_sheet(images(1, 8, 8), [[]])
  with pytest.raises(ValueError, match="square"):
    draw_sheet(images(1, 8, 8), pairs_of(images(2, 16, 28), 1, 1))
