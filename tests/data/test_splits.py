"""Properties of the splits over arbitrary label sets."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from byolx.data.sources.names import Names
from byolx.data.splits import (
  balanced_subset,
  imagenet_validation,
  labelled_share,
  listed,
  stratified_holdout,
)

SEEDS = st.integers(0, 2**32 - 1)
LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(np.array)
PARTLY_LABELLED = st.lists(st.integers(-1, 5), min_size=1, max_size=120).map(np.array)


@given(PARTLY_LABELLED, st.floats(0.001, 1), SEEDS)
def test_subset_size_and_balance(labels, fraction, seed):
  assume((labels >= 0).any())
  chosen = balanced_subset(labels, fraction, seed)
  sizes = np.bincount(labels[labels >= 0])
  present = sizes[sizes > 0]
  assert len(chosen) == min(max(round(fraction * len(labels)), len(present)), present.sum())
  assert (np.diff(chosen) > 0).all()
  assert (labels[chosen] >= 0).all()
  # Balanced: a class below the largest part, but for one label, has no more to give.
  taken = np.bincount(labels[chosen], minlength=len(sizes))
  assert (taken >= np.minimum(sizes, max(taken) - 1)).all()
  assert (taken[sizes > 0] >= 1).all()


@given(LABELS, st.floats(0.001, 1), st.floats(0.001, 1), SEEDS)
def test_subsets_are_nested(labels, one, other, seed):
  small, large = (balanced_subset(labels, f, seed) for f in sorted((one, other)))
  assert set(small) <= set(large)


def test_subset_of_digits_by_hand():
  labels = load_digits().target[:1437]
  chosen = balanced_subset(labels, 0.01, 0)
  assert len(chosen) == 14
  assert sorted(np.bincount(labels[chosen]).tolist()) == [1] * 6 + [2] * 4
  np.testing.assert_array_equal(chosen, balanced_subset(labels, 14, 0))
  np.testing.assert_array_equal(balanced_subset(labels, 1.0, 0), np.arange(1437))


def test_subset_seeds_choose_examples_and_classes():
  labels = np.repeat(np.arange(5), 40)
  chosen = [balanced_subset(labels, 8, seed) for seed in range(40)]
  assert len({tuple(c) for c in chosen}) == 40
  larger = {tuple(np.flatnonzero(np.bincount(labels[c]) == 2)) for c in chosen}
  assert len(larger) > 5  # of the ten ways to choose three classes of five
  often = np.bincount(np.concatenate(chosen), minlength=200)
  assert (often > 0).sum() > 130  # 320 draws of 200 examples leave a fifth of them untouched


@pytest.mark.parametrize(
  ("labels", "amount", "message"),
  [
    ([0, 1, 2], 0.0, "fraction of labels is 0.0; expected 0 < fraction <= 1"),
    ([0, 1, 2], 1.5, "fraction of labels is 1.5"),
    ([0, 1, 2], 2, r"the number of labels is 2; expected 3 \(one per class\) to 3 \(all\)"),
    ([0, 1, -1], 3, "the number of labels is 3; expected 2"),
    ([-1, -1], 0.5, "none of the 2 examples is labelled"),
  ],
)
def test_subset_errors(labels, amount, message):
  with pytest.raises(ValueError, match=message):
    balanced_subset(np.array(labels), amount, 0)


@given(PARTLY_LABELLED, st.floats(0, 0.99), SEEDS, st.booleans())
def test_holdout_partitions_in_proportion(labels, share, seed, named):
  names = [f"{i:05d}.jpg" for i in range(len(labels))] if named else None
  rest, held = stratified_holdout(labels, share, seed, names)
  np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
  assert (np.diff(rest) > 0).all()
  assert (np.diff(held) > 0).all()
  classes, sizes = np.unique(labels, return_counts=True)
  wanted = min(math.ceil(share * len(labels) - 1e-9), len(labels) - len(classes))
  assert len(held) == wanted
  assert set(labels[rest]) == set(labels)
  taken = np.array([(labels[held] == c).sum() for c in classes])
  # In proportion, unless a class cannot give its part without its last example.
  if (wanted * sizes / sizes.sum() <= sizes - 1).all():
    assert (np.abs(taken - wanted * sizes / sizes.sum()) < 1).all()


def test_holdout_rounds_the_largest_remainders_up():
  labels = np.repeat([0, 1, 2], [17, 15, 8])  # a quarter: 4.25, 3.75, 2 of 10
  _, held = stratified_holdout(labels, 0.25, 3)
  assert np.bincount(labels[held]).tolist() == [4, 4, 2]


def test_holdout_size_is_not_fooled_by_floating_point():
  labels = np.zeros(100, int)
  assert [len(stratified_holdout(labels, k / 100, 0)[1]) for k in range(100)] == list(range(100))


def test_holdout_by_seed():
  labels = np.repeat(np.arange(4), 25)
  held = {tuple(stratified_holdout(labels, 0.2, seed)[1]) for seed in range(20)}
  assert len(held) == 20


@given(st.permutations(range(40)), SEEDS)
@settings(max_examples=20)
def test_holdout_by_name_does_not_depend_on_order(order, seed):
  names = [f"picture {i}" for i in range(40)]
  labels = np.arange(40) % 3
  held = {names[i] for i in stratified_holdout(labels, 0.3, seed, names)[1]}
  shuffled = [names[i] for i in order]
  again = stratified_holdout(labels[list(order)], 0.3, seed, shuffled)[1]
  assert {shuffled[i] for i in again} == held


def test_holdout_by_name_hardly_changes_when_files_are_added():
  names = [f"{i}.jpg" for i in range(1000)]
  old = stratified_holdout(np.zeros(900, int), 0.2, 0, names[:900])[1]
  new = stratified_holdout(np.zeros(1000, int), 0.2, 0, names)[1]
  kept = set(old) & set(new)
  assert len(kept) > 0.9 * len(old)


def test_holdout_errors():
  with pytest.raises(ValueError, match=r"share to hold out is 1\.0; expected 0 <= share < 1"):
    stratified_holdout(np.zeros(3, int), 1.0, 0)
  with pytest.raises(ValueError, match="2 names were given for 3 labels"):
    stratified_holdout(np.zeros(3, int), 0.5, 0, ["a", "b"])
  rest, held = stratified_holdout(np.zeros(0, int), 0.5, 0)
  assert len(rest) == len(held) == 0


# ImageNet's validation images


def imagenet_names(count):
  """Names as ImageNet's: n01440764_26.JPEG and so on, about 1281 of a class."""
  return [f"n{1440764 + 217 * (i // 1281):08d}_{26 + 3 * (i % 1281)}.JPEG" for i in range(count)]


def tensorflow_shards(names, shards):
  """TensorFlow Datasets' files: names sorted by salted hash, cut where round(n * k / shards) says."""

  def key(name):
    salted = hashlib.md5()
    salted.update(b"train")
    salted.update(name.encode())
    return int(salted.hexdigest(), 16)

  ordered = sorted(names, key=key)
  ends = [round(len(names) * k / shards) for k in range(shards + 1)]
  return [ordered[start:end] for start, end in itertools.pairwise(ends)]


def flat(shards):
  return {name for shard in shards for name in shard}


def test_imagenet_validation_is_the_end_or_the_start_of_the_hashed_order():
  names = imagenet_names(12_000)
  ordered = [name for shard in tensorflow_shards(names, 16) for name in shard]
  for rule, expected in (("last_10009", ordered[-10009:]), ("first_10000", ordered[:10000])):
    rest, held = imagenet_validation(names, rule)
    assert {names[i] for i in held} == set(expected)
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(12_000))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(held) > 0).all()
    assert held.dtype == rest.dtype == np.int64


FIRST_THREE = ["n01441198_122.JPEG", "n01441415_1097.JPEG", "n01442283_341.JPEG"]
LAST_TWELVE = [
  "n01440764_1142.JPEG", "n01440764_3800.JPEG", "n01440981_2375.JPEG", "n01440981_2588.JPEG",
  "n01441198_833.JPEG", "n01441415_3038.JPEG", "n01441849_3332.JPEG", "n01442066_2945.JPEG",
  "n01442066_3053.JPEG", "n01442283_89.JPEG", "n01442283_1856.JPEG", "n01442283_2075.JPEG",
]  # fmt: skip


def test_imagenet_validation_by_stored_names():
  """What TensorFlow Datasets 4.9.10's own shuffler puts first and last of 10,012 names."""
  names = imagenet_names(10_012)
  rest, _ = imagenet_validation(names, "last_10009")
  assert [names[i] for i in rest] == FIRST_THREE
  rest, _ = imagenet_validation(names, "first_10000")
  assert [names[i] for i in rest] == LAST_TWELVE


def test_imagenet_validation_whatever_the_order_and_the_folders():
  names = imagenet_names(10_500)
  expected = {names[i] for i in imagenet_validation(names, "last_10009")[1]}
  order = np.random.default_rng(0).permutation(len(names))
  shuffled = [f"train/{names[i][:9]}/{names[i]}" for i in order]
  held = imagenet_validation(shuffled, "last_10009")[1]
  assert {shuffled[i].rpartition("/")[2] for i in held} == expected


def test_the_last_shards_of_imagenet_hold_10009():
  """1,281,167 names, 1024 shards, of which the last 8 are the paper's validation images."""
  names = imagenet_names(1_281_167)
  rest, held = imagenet_validation(Names.of(names), "last_10009")
  assert (len(rest), len(held)) == (1_271_158, 10_009)
  last = flat(tensorflow_shards(names, 1024)[-8:])
  assert len(last) == 10_009
  assert {names[i] for i in held} == last


def test_imagenet_validation_errors():
  with pytest.raises(ValueError, match=r"last_10009 holds out 10009 of 10009 training images"):
    imagenet_validation(imagenet_names(10_009), "last_10009")
  with pytest.raises(ValueError, match=r"rule is 'none'; expected one of last_10009, first_10000"):
    imagenet_validation(imagenet_names(10_010), "none")


# Shares and lists of labels


@given(PARTLY_LABELLED, st.floats(0.01, 0.5), st.lists(st.floats(0.001, 1), max_size=4), SEEDS)
def test_shares_are_balanced_nested_and_apart_from_what_is_held_out(labels, held, shares, seed):
  rest, held_out = stratified_holdout(labels, held, 0)
  assume((labels[rest] >= 0).any())
  smaller = set()
  for share in sorted(shares):
    chosen = labelled_share(labels, rest, share, seed)
    assert (np.diff(chosen) > 0).all()
    assert (labels[chosen] >= 0).all()
    assert not set(chosen) & set(held_out)
    assert smaller <= set(chosen)
    smaller = set(chosen)
    # A share of all labels, held-out ones too, as far as the rest has them.
    known = rest[labels[rest] >= 0]
    present = len(np.unique(labels[known]))
    wanted = max(round(share * int(np.sum(labels >= 0))), present)
    assert len(chosen) == min(wanted, len(known))
    taken, there = (np.bincount(labels[which], minlength=6) for which in (chosen, known))
    assert (taken >= np.minimum(there, taken.max() - 1)).all()


def test_one_percent_of_imagenet_is_what_simclr_has():
  labels = np.arange(1_281_167) % 1000
  rest = np.arange(10_009, 1_281_167)
  assert len(labelled_share(labels, rest, 0.01, 0)) == 12_812  # its list has 12,811: floors
  assert len(labelled_share(labels, rest, 1.0, 0)) == 1_271_158


def test_a_list_is_matched_by_file_names_in_any_order():
  names = Names.of(["b/x.JPEG", "a/y.JPEG", "c/z.JPEG"])
  np.testing.assert_array_equal(listed(names, ["z.JPEG", "b/x.JPEG", "z.JPEG"]), [0, 2])
  with pytest.raises(ValueError, match=r"1 of 2 listed images are missing, such as q; expected"):
    listed(names, ["x.JPEG", "q"])
  with pytest.raises(ValueError, match=r"1 listed names match several images, such as x"):
    listed(["a/x", "b/x", "y"], ["x", "y"])
  np.testing.assert_array_equal(listed(["a/x", "b/x", "y"], ["y"]), [2])
