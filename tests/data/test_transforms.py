"""A transform of one's own: what it declares is delivered, whoever makes the batches and wherever."""

import itertools
import pickle

import jax
import numpy as np
import pytest
from own_transforms import Boxes, Colours, Dense, Scalars

from byolx.data import loader, shared_memory
from byolx.data.augment.distribution import ViewSpec
from byolx.data.batching import EVALUATION_SEED
from byolx.data.loader import evaluation_batches, evaluation_images, train_batches
from byolx.data.sampler import RANDAUGMENT, VIEW, Stream, epoch_order
from byolx.data.transforms import Array, Arrays, Centre, Random, Transform, Views

SEED, RECORDS, BATCH, STEPS = 5, 17, 8, 6  # 48 places: almost three epochs
BAD = frozenset({2, 11})
WHOLE, BROKEN = Colours(RECORDS), Colours(RECORDS, BAD)
TRANSFORMS = {
  "dense": Dense(),
  "scalars": Scalars(),
  "views": Views((ViewSpec(), ViewSpec(blur_probability=0.1)), 8),
  "crops": Views((ViewSpec(),), 8, "device"),
  "centre": Centre(4, 5),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  """Batches of eight rows have several parts, on any number of hosts."""
  monkeypatch.setattr(loader, "PART_ROWS", 3)


def train(transform, source=WHOLE, steps=STEPS, **options):
  """The first training batches, with copies of their arrays."""
  options = {"prefetch": 0, "max_failed_share": 1.0} | options
  with train_batches(source, transform, BATCH, SEED, **options) as batches:
    return [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, steps)]


def evaluate(transform, source=WHOLE, **options):
  """All evaluation batches, with copies of their arrays."""
  options = {"prefetch": 0, "max_failed_share": 1.0} | options
  with evaluation_batches(source, transform, BATCH, **options) as batches:
    return [jax.tree.map(np.array, batch) for batch in batches]


def by_hand(transform, example, seed, record, epoch):
  """The rows of one example, filled outside of the loader; they hold ones before."""
  is_array = lambda x: isinstance(x, Array)  # noqa: E731
  ones = lambda x: np.ones(x.shape, x.dtype)  # noqa: E731
  rows = jax.tree.map(ones, transform.arrays, is_leaf=is_array)
  transform(example, Random(Stream(seed), record, epoch), rows)
  return rows


def assert_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def joined(blocks):
  """The global batches of the hosts' blocks."""
  return [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*blocks)]


def assert_declared(batch, arrays, rows, added):
  """Names, shapes and types are those that were declared, and those that the loader adds."""
  assert set(batch) == set(arrays) | added
  for name, declared in arrays.items():
    parts = [(declared, batch[name])]
    if not isinstance(declared, Array):
      assert type(batch[name]) is type(declared)
      parts = list(zip(declared, batch[name], strict=True))
    for array, found in parts:
      assert (found.shape, found.dtype) == ((rows, *array.shape), np.dtype(array.dtype)), name
  for name in added:
    assert (batch[name].shape, batch[name].dtype) == ((rows,), bool if name == "mask" else np.int32)


# What is declared is delivered


@pytest.mark.parametrize("name", TRANSFORMS)
def test_training_batches_have_the_declared_arrays(name):
  for hosts in (1, 2):
    for batch in train(TRANSFORMS[name], steps=2, host_count=hosts):
      assert_declared(batch, TRANSFORMS[name].arrays, BATCH // hosts, {"label", "index"})


@pytest.mark.parametrize("name", TRANSFORMS)
def test_evaluation_batches_have_the_declared_arrays(name):
  for hosts in (1, 2):
    batches = evaluate(TRANSFORMS[name], host_count=hosts)
    assert len(batches) == 3
    for batch in batches:
      assert_declared(batch, TRANSFORMS[name].arrays, BATCH // hosts, {"label", "index", "mask"})


@pytest.mark.parametrize("name", TRANSFORMS)
def test_training_rows_are_what_the_transform_fills(name):
  transform = TRANSFORMS[name]
  for step, batch in enumerate(train(transform)):
    for row in range(BATCH):
      epoch, number = divmod(step * BATCH + row, RECORDS)
      record = int(epoch_order(SEED, epoch, RECORDS)[number])
      expected = by_hand(transform, WHOLE[record], SEED, record, epoch)
      expected |= {"label": np.int32(record % 3), "index": np.int32(record)}
      assert_equal(jax.tree.map(lambda x, row=row: x[row], batch), expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_evaluation_rows_are_what_the_transform_fills_or_zero(name):
  transform = TRANSFORMS[name]
  seen = []
  for step, batch in enumerate(evaluate(transform, BROKEN)):
    for row in range(BATCH):
      record, found = step * BATCH + row, jax.tree.map(lambda x, row=row: x[row], batch)
      if record >= RECORDS or record in BAD:
        label, index, mask = (found.pop(key) for key in ("label", "index", "mask"))
        assert (label, index, bool(mask)) == (-1, -1, False)
        assert_equal(found, jax.tree.map(np.zeros_like, found))
        continue
      expected = by_hand(transform, BROKEN[record], EVALUATION_SEED, record, 0)
      expected |= {"label": np.int32(record % 3), "index": np.int32(record), "mask": np.True_}
      assert_equal(found, expected)
      seen.append(record)
  assert seen == sorted(set(range(RECORDS)) - BAD)


@pytest.mark.parametrize("name", ["dense", "scalars"])
def test_a_replacement_is_drawn_with_the_numbers_of_the_record_in_whose_place_it_is(name):
  transform, replaced = TRANSFORMS[name], 0
  for step, batch in enumerate(train(transform, BROKEN)):
    for row in range(BATCH):
      epoch, number = divmod(step * BATCH + row, RECORDS)
      record, other = int(epoch_order(SEED, epoch, RECORDS)[number]), int(batch["index"][row])
      assert (other == record) == (record not in BAD)
      assert other not in BAD
      replaced += other != record
      expected = by_hand(transform, BROKEN[other], SEED, record, epoch)
      expected |= {"label": np.int32(other % 3), "index": np.int32(other)}
      assert_equal(jax.tree.map(lambda x, row=row: x[row], batch), expected)
  assert replaced > 3


def test_evaluation_images_take_the_array_called_image():
  images, labels, indices = evaluation_images(BROKEN, TRANSFORMS["centre"])
  kept = sorted(set(range(RECORDS)) - BAD)
  assert indices.tolist() == kept
  assert labels.tolist() == [record % 3 for record in kept]
  np.testing.assert_array_equal(images, np.tile(np.uint8(kept)[:, None, None, None], (1, 4, 4, 3)))


# Whoever makes them


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["dense", "scalars"])
def test_hosts_threads_and_restarts_change_no_training_batch(name, threads, hosts):
  options = {"threads": threads, "host_count": hosts, "prefetch": 2}
  for start in (0, 4):
    blocks = [
      train(
        TRANSFORMS[name], BROKEN, STEPS - start, start_step=start, host_index=host, **options
      )
      for host in range(hosts)
    ]  # fmt: skip
    assert_equal(joined(blocks), train(TRANSFORMS[name], BROKEN)[start:])


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["dense", "scalars"])
def test_hosts_and_threads_change_no_evaluation_batch(name, threads, hosts):
  options = {"threads": threads, "host_count": hosts, "prefetch": 2}
  blocks = [evaluate(TRANSFORMS[name], BROKEN, host_index=host, **options) for host in range(hosts)]
  assert_equal(joined(blocks), evaluate(TRANSFORMS[name], BROKEN))


@pytest.mark.parametrize(
  ("name", "hosts", "start"), [("dense", 1, 0), ("dense", 2, 3), ("scalars", 1, 2)]
)
def test_workers_change_no_training_batch(name, hosts, start):
  blocks = [
    train(
      TRANSFORMS[name], BROKEN, STEPS - start,
      start_step=start, workers=2, prefetch=2, host_index=host, host_count=hosts,
    )
    for host in range(hosts)
  ]  # fmt: skip
  assert_equal(joined(blocks), train(TRANSFORMS[name], BROKEN)[start:])


@pytest.mark.parametrize(("name", "hosts"), [("dense", 1), ("dense", 2), ("scalars", 1)])
def test_workers_change_no_evaluation_batch(name, hosts):
  blocks = [
    evaluate(TRANSFORMS[name], BROKEN, workers=2, prefetch=2, host_index=host, host_count=hosts)
    for host in range(hosts)
  ]
  assert_equal(joined(blocks), evaluate(TRANSFORMS[name], BROKEN))


def test_workers_send_the_arrays_of_a_namedtuple_whatever_their_size(monkeypatch):
  """The large ones go through grain's shared memory."""
  monkeypatch.setattr(loader, "_SHARED_BYTES", 100)
  batches = train(TRANSFORMS["dense"], steps=3, workers=2, prefetch=2)
  assert isinstance(batches[0]["boxes"], Boxes)
  assert_equal(batches, train(TRANSFORMS["dense"], steps=3))


def test_batches_are_the_same_without_shared_memory(monkeypatch):
  expected = train(Dense(), BROKEN), evaluate(Dense(), BROKEN)
  monkeypatch.setattr(shared_memory, "POSSIBLE", False)
  assert_equal((train(Dense(), BROKEN), evaluate(Dense(), BROKEN)), expected)


def test_arrays_may_be_kept_while_later_batches_are_made():
  """Memory of a worker is filled again only when nothing of the batch is left."""
  options = {"workers": 1, "prefetch": 2, "max_failed_share": 1.0}
  with train_batches(WHOLE, Dense(), BATCH, SEED, **options) as batches:
    kept = [next(batches)["depth"][3] for _ in range(STEPS)]
  for found, batch in zip(kept, train(Dense()), strict=True):
    np.testing.assert_array_equal(found, batch["depth"][3])


# Random numbers


def numbers(random, *place):
  return random.generator(*place).random(4).tolist()


def test_streams_differ_by_number_purpose_record_epoch_and_seed_and_come_again():
  places = list(itertools.product((0, 1), (0, 3), (0, 1, 2), (0, 1, 7), (VIEW, RANDAUGMENT)))
  found = {
    (seed, record, epoch, number, purpose): numbers(
      Random(Stream(seed), record, epoch), number, purpose
    )
    for seed, record, epoch, number, purpose in places
  }
  assert len({x for some in found.values() for x in some}) == 4 * len(places)
  for (seed, record, epoch, *place), expected in reversed(found.items()):
    assert numbers(Random(Stream(seed), record, epoch), *place) == expected
    assert Stream(seed).at(place[1], record, epoch, place[0]).random(4).tolist() == expected


def test_a_generator_begins_anew_whatever_was_drawn_before():
  random = Random(Stream(3), 4, 5)
  first = numbers(random)
  random.generator(1).integers(5, size=3, dtype=np.uint32)
  assert numbers(random) == first == numbers(random, 0, VIEW)
  assert numbers(random, 1) != first


def test_evaluation_draws_the_same_for_an_image_every_time_and_wherever_it_is():
  by_record = [
    {
      int(index): (batch["noise"][row], batch["grey"][row])
      for batch in evaluate(Scalars(), source)
      for row, index in enumerate(batch["index"])
      if index >= 0
    }
    for source in (WHOLE, WHOLE, BROKEN)
  ]
  assert by_record[0] == by_record[1]
  assert by_record[2] == {i: by_record[0][i] for i in range(RECORDS) if i not in BAD}
  assert len({noise for noise, _ in by_record[0].values()}) == RECORDS


def test_epochs_draw_anew():
  noise = np.concatenate([batch["noise"] for batch in train(Scalars())])
  assert len(set(noise.tolist())) == STEPS * BATCH


# The interface


@pytest.mark.parametrize("name", TRANSFORMS)
def test_they_are_transforms_that_can_be_pickled(name):
  transform = TRANSFORMS[name]
  assert isinstance(transform, Transform)
  again = pickle.loads(pickle.dumps(transform))
  assert again == transform
  assert dict(again.arrays) == dict(transform.arrays)


def test_the_preview_is_the_transform_itself_or_views_with_all_their_colours():
  assert Dense().preview() == Dense()
  assert TRANSFORMS["centre"].preview() == TRANSFORMS["centre"]
  crops = TRANSFORMS["crops"].preview()
  assert crops == Views((ViewSpec(),), 8, "host")
  assert set(crops.arrays) == {"view1"}


class Reserved(Scalars):
  """It declares arrays that the loader adds itself."""

  @property
  def arrays(self) -> Arrays:
    return {"mask": Array((4, 4), bool), "grey": Array((), np.uint8)}


@pytest.mark.parametrize("batches", [train, evaluate])
def test_names_of_the_loaders_own_arrays_are_refused(batches):
  with pytest.raises(ValueError, match=r"the transform declares mask; expected other names than"):
    batches(Reserved())
