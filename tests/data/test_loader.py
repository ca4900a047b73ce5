"""Batches: the same whoever makes them and wherever they start, and robust to broken files."""

import gc
import itertools
import threading
import time
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from byolx.data.augment import randaugment
from byolx.data.augment.distribution import ViewSpec, draw
from byolx.data.augment.on_host import apply_host
from byolx.data.augment.randaugment import RandAugment
from byolx.data.augment.resizing import crop_and_resize, evaluation_view
from byolx.data.decode import DecodeError
from byolx.data.loader import evaluation_batches, evaluation_images, train_batches
from byolx.data.sampler import RANDAUGMENT, VIEW, Stream, epoch_order
from byolx.data.sources.base import Example
from byolx.data.sources.small import digits
from byolx.data.transforms import Centre, Views

T = ViewSpec()
T_PRIME = ViewSpec(blur_probability=0.1, solarise_probability=0.2)
VIEWS = (T, T_PRIME)


@pytest.fixture(scope="module")
def digits_test():
  return digits("test")


@dataclass
class FakeSource:
  """`count` one-colour images of different sizes; those in `bad` cannot be read."""

  count: int
  bad: frozenset = frozenset()
  error: type = DecodeError
  name: str = "fake"
  classes: tuple = ("even", "odd")
  asked: list = field(default_factory=list)

  def __post_init__(self):
    self.labels = (np.arange(self.count) % 2).astype(np.int32)
    self.names = tuple(f"fake/{i}" for i in range(self.count))

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    self.asked.append(index)
    if index in self.bad:
      raise self.error(f"fake/{index}: broken")
    image = np.full((5 + index % 3, 4 + index % 5, 3), index % 256, np.uint8)
    return Example(image, int(self.labels[index]), f"fake/{index}")


def first(count, *args, **kwargs):
  """The first batches, made without a thread, with copies of their arrays."""
  with train_batches(*args, **{"prefetch": 0} | kwargs) as batches:
    return [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, count)]


def block_of(batch, host, hosts):
  """One host's rows of a global batch."""
  return jax.tree.map(lambda a: np.split(a, hosts)[host], batch)


def assert_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


# What a batch holds


def test_batch_is_what_its_parts_say(digits_test):
  batch_size, step = 25, 29  # places 725 to 750: the epoch ends at 720
  (host,) = first(1, digits_test, Views(VIEWS, 16), batch_size, 7, start_step=step)
  crops = Views(VIEWS, 16, "device")
  (device,) = first(1, digits_test, crops, batch_size, 7, start_step=step)
  assert set(host) == {"view1", "view2", "label", "index"}
  assert set(device) == set(host) | {"draws1", "draws2"}
  for row in range(batch_size):
    epoch, number = divmod(step * batch_size + row, 360)
    record = int(epoch_order(7, epoch, 360)[number])
    image, label, _ = digits_test[record]
    for batch in (host, device):
      assert (batch["index"][row], batch["label"][row]) == (record, label)
    for view, spec in enumerate(VIEWS):
      draws = draw(spec, Stream(7).at(VIEW, record, epoch, view), 8, 8)
      crop = crop_and_resize(image, draws.crop, 16, False)
      made = apply_host(crop, draws, spec.brightness_rule)
      np.testing.assert_array_equal(host[f"view{view + 1}"][row], made)
      np.testing.assert_array_equal(device[f"view{view + 1}"][row], crop)
      assert_equal(draws, jax.tree.map(lambda a, row=row: a[row], device[f"draws{view + 1}"]))


@pytest.mark.parametrize("workers", [0, 1])
def test_randaugment_follows_from_seed_and_place(digits_test, workers):
  spec = ViewSpec(blur_probability=0.0, randaugment=RandAugment(2, 20))
  (batch,) = first(1, digits_test, Views((spec,), 16), 24, 7, start_step=29, workers=workers)
  assert set(batch) == {"view1", "label", "index"}
  changed = 0
  for row in range(24):
    epoch, number = divmod(29 * 24 + row, 360)
    record = int(epoch_order(7, epoch, 360)[number])
    draws = draw(spec, Stream(7).at(VIEW, record, epoch, 0), 8, 8)
    crop = crop_and_resize(digits_test[record][0], draws.crop, 16, False)
    before = apply_host(crop, draws, spec.brightness_rule)
    drawn = randaugment.draw(spec.randaugment, Stream(7).at(RANDAUGMENT, record, epoch, 0))
    np.testing.assert_array_equal(batch["view1"][row], randaugment.apply(before, drawn))
    changed += not np.array_equal(batch["view1"][row], before)
  assert changed > 12


def test_shapes_and_types(digits_test):
  (batch,) = first(1, digits_test, Views((T, T, T), 9, "device"), 4, 0)
  for i in (1, 2, 3):
    assert (batch[f"view{i}"].shape, batch[f"view{i}"].dtype) == ((4, 9, 9, 3), np.uint8)
    assert (batch[f"draws{i}"].crop.shape, batch[f"draws{i}"].crop.dtype) == ((4, 4), np.int32)
    assert (batch[f"draws{i}"].hue.shape, batch[f"draws{i}"].hue.dtype) == ((4,), np.float32)
    assert (batch[f"draws{i}"].flip.shape, batch[f"draws{i}"].flip.dtype) == ((4,), bool)
  assert batch["label"].dtype == batch["index"].dtype == np.int32


class PhotoSource(FakeSource):
  """The same photograph again and again."""

  def __getitem__(self, index):
    return Example(load_sample_image("flower.jpg"), 0, "flower")


def test_antialias_and_brightness_rule_are_passed_on():
  source = PhotoSource(6)
  plain, smooth = (
    first(1, source, Views((T,), 24, "device", antialias), 2, 0)[0] for antialias in (False, True)
  )
  assert np.abs(plain["view1"].astype(int) - smooth["view1"]).mean() > 1
  only = {"jitter_probability": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
  adds, multiplies = (
    first(1, source, Views((ViewSpec(brightness_rule=rule, **only),), 24), 2, 0)[0]["view1"]
    for rule in ("additive", "multiplicative")
  )
  assert np.abs(adds.astype(int) - multiplies).mean() > 1


# Randomness


def test_views_are_independent(digits_test):
  batches = first(10, digits_test, Views((T, T), 8, "device"), 72, 0)  # two epochs
  one, two = (np.concatenate([batch[key].hue for batch in batches]) for key in ("draws1", "draws2"))
  index = np.concatenate([batch["index"] for batch in batches])
  order = np.argsort(index, kind="stable").reshape(360, 2)  # [record, epoch]
  for a, b in (
    (one, two),  # the views of a record
    (one[order[:, 0]], one[order[:, 1]]),  # its epochs
    (one[order[:-1, 0]], one[order[1:, 0]]),  # its neighbour
    (one[order[:-1, 0]], two[order[1:, 0]]),
  ):
    assert (a != b).all()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.2  # 3.8 standard deviations of 360 draws


# The stream


@pytest.mark.parametrize(("records", "batch_size"), [(360, 48), (7, 3), (3, 8), (1, 2)])
def test_every_record_once_per_epoch(records, batch_size):
  count = -(-3 * records // batch_size)
  batches = first(count, FakeSource(records), Views((T,), 4), batch_size, 1)
  assert all(batch["index"].shape == (batch_size,) for batch in batches)
  stream = np.concatenate([batch["index"] for batch in batches])[: 3 * records]
  for epoch in stream.reshape(3, records):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(records))


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(hosts, placement):
  source = FakeSource(50, frozenset({4, 20}))
  views = Views(VIEWS, 6, placement)
  whole = first(4, source, views, 16, 3, start_step=2)
  parts = [
    first(4, source, views, 16, 3, start_step=2, host_index=host, host_count=hosts)
    for host in range(hosts)
  ]
  for step, batch in enumerate(whole):
    for host in range(hosts):
      assert_equal(parts[host][step], block_of(batch, host, hosts))


def test_restart_in_the_middle_is_bit_equal(digits_test):
  views = Views(VIEWS, 8)
  straight = first(12, digits_test, views, 64, 5)
  resumed = first(4, digits_test, views, 64, 5, start_step=8, prefetch=3)
  assert_equal(straight[8:], resumed)


def test_draws_do_not_depend_on_the_batch_size():
  def by_record(batch_size):
    batches = first(40 // batch_size, FakeSource(40), Views(VIEWS, 5), batch_size, 2)
    return {
      int(index): (batch["view1"][row].tobytes(), batch["view2"][row].tobytes())
      for batch in batches
      for row, index in enumerate(batch["index"])
    }

  assert by_record(4) == by_record(20) == by_record(40)


def test_seeds_differ(digits_test):
  (one,), (two,) = (first(1, digits_test, Views((T,), 8), 64, seed) for seed in (0, 1))
  assert (one["index"] != two["index"]).mean() > 0.9


# Running ahead


def threads():
  return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_thread_runs_ahead_and_close_ends_it(prefetch):
  before = threads()
  source = FakeSource(1000)
  batches = train_batches(source, Views((T,), 4), 10, 0, prefetch=prefetch)
  next(batches)
  # One batch given, `prefetch` waiting, one in hand.
  deadline = time.monotonic() + 20
  while len(source.asked) < 10 * (prefetch + 2) and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.1)
  assert len(source.asked) == 10 * (prefetch + 2)
  assert len(threads() - before) == 1
  batches.close()
  batches.close()
  assert threads() == before
  with pytest.raises(StopIteration):
    next(batches)


def test_forgotten_iterators_close_themselves():
  before = threads()
  batches = train_batches(FakeSource(100), Views((T,), 4), 10, 0)
  next(batches)
  assert threads() != before
  del batches
  gc.collect()
  assert threads() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_caller_and_end_the_thread(prefetch):
  before = threads()
  source = FakeSource(30, frozenset({17}), RuntimeError)
  batches = train_batches(source, Views((T,), 4), 5, 0, prefetch=prefetch)
  with pytest.raises(RuntimeError, match="fake/17: broken"):
    list(itertools.islice(batches, 7))
  assert threads() == before


# Evaluation


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_evaluation_in_order_and_padded(digits_test, rule, antialias):
  centre = Centre(4, 5, rule, antialias)
  batches = list(evaluation_batches(digits_test, centre, 100))
  assert [batch["mask"].sum() for batch in batches] == [100, 100, 100, 60]
  for batch in batches:
    assert batch["image"].shape == (100, 4, 4, 3)
    np.testing.assert_array_equal(batch["index"][~batch["mask"]], -1)
    np.testing.assert_array_equal(batch["label"][~batch["mask"]], -1)
    np.testing.assert_array_equal(batch["image"][~batch["mask"]], 0)
  images, labels, indices = evaluation_images(digits_test, centre)
  np.testing.assert_array_equal(indices, np.arange(360))
  np.testing.assert_array_equal(labels, digits_test.labels)
  for i in range(0, 360, 17):
    view = evaluation_view(digits_test[i].image, 4, 5, rule, antialias)
    np.testing.assert_array_equal(images[i], view)
  valid = [batch["image"][batch["mask"]] for batch in batches]
  np.testing.assert_array_equal(np.concatenate(valid), images)


def test_evaluation_masks_unreadable_files():
  before = threads()
  source = FakeSource(10, frozenset({2, 9}))
  batches = list(evaluation_batches(source, Centre(4, 4), 4))
  mask = np.concatenate([batch["mask"] for batch in batches])
  assert np.flatnonzero(~mask).tolist() == [2, 9, 10, 11]
  index = np.concatenate([batch["index"] for batch in batches])
  assert index[mask].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
  assert threads() == before  # it closes itself
  with pytest.raises(ValueError, match="1 of the 4 records seen"):
    list(evaluation_batches(source, Centre(4, 4), 4, max_failed_share=0.0))


def test_evaluation_on_several_hosts():
  whole = list(evaluation_batches(FakeSource(10), Centre(4, 4), 4))
  for host in range(2):
    part = list(evaluation_batches(FakeSource(10), Centre(4, 4), 4, host_index=host, host_count=2))
    assert_equal(part, [block_of(batch, host, 2) for batch in whole])


# Settings


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 0}, "batch_size is 0; expected a positive multiple of 1 hosts"),
    ({"batch_size": 9, "host_count": 2}, "batch_size is 9; expected a positive multiple of 2"),
    ({"host_index": 2, "host_count": 2}, "host_index is 2 of 2; expected 0 <= index < count"),
    ({"seed": -1}, "seed is -1; expected 0 to"),
    ({"seed": 2**32}, "seed is 4294967296; expected 0 to"),
    ({"start_step": -1}, "start_step is -1; expected at least 0"),
    ({"workers": -2}, "workers is -2; expected at least 0, or -1"),
    ({"threads": 0}, "threads is 0; expected at least 1"),
    ({"prefetch": -1}, "prefetch is -1"),
    ({"max_failed_share": 2.0}, "data.max_failed_share is 2.0"),
    ({"source": FakeSource(0)}, "fake is empty; expected at least one record"),
  ],
)
def test_wrong_settings(change, message):
  views = Views(VIEWS, 4)
  settings = {"source": FakeSource(4), "transform": views, "batch_size": 2, "seed": 0}
  with pytest.raises(ValueError, match=message):
    train_batches(**settings | change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"source": FakeSource(0)}, "fake is empty"),
  ],
)
def test_wrong_evaluation_settings(change, message):
  settings = {"source": FakeSource(4), "transform": Centre(4, 4), "batch_size": 2}
  with pytest.raises(ValueError, match=message):
    evaluation_batches(**settings | change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"placement": "gpu"}, "placement is 'gpu'; expected one of host, device"),
    ({"size": 0}, "size is 0; expected at least 1"),
    ({"specs": ()}, "no view was given"),
  ],
)
def test_wrong_views(change, message):
  with pytest.raises(ValueError, match=message):
    Views(**{"specs": VIEWS, "size": 4} | change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rule": "middle"}, "rule is 'middle'; expected one of paper, reference"),
    ({"resize": 3}, "expected 1 <= size <= resize"),
    ({"size": 0}, "expected 1 <= size <= resize"),
  ],
)
def test_wrong_centre(change, message):
  with pytest.raises(ValueError, match=message):
    Centre(**{"size": 4, "resize": 4, "rule": "paper"} | change)
