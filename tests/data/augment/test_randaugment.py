"""RandAugment: what is drawn, how operations are applied to a view, and errors."""

import functools
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from randaugment_cases import (
  BINS,
  IMAGES,
  WITHOUT_STRENGTH,
  images,
  magnitudes,
  run,
  single,
)
from scipy import stats
from sklearn.datasets import load_sample_image

from byolx.data.augment import randaugment
from byolx.data.augment.randaugment import OPERATIONS, Operations, RandAugment, apply, draw

# ------------------------------------------------------------------------------------------------
# Applying
# ------------------------------------------------------------------------------------------------


def all_operations(spec=RandAugment()):  # noqa: B008 (frozen)
  """One view's operations in which all 14 come, in order."""
  rng = np.random.default_rng(0)
  drawn = draw(RandAugment(400, spec.magnitude, spec.bins), rng)
  first = [int(np.argmax(drawn.index == i)) for i in range(len(OPERATIONS))]
  return Operations(drawn.index[first], drawn.strength[first])


@pytest.mark.parametrize("image", IMAGES)
def test_magnitude_0_is_the_identity_where_there_is_one(image):
  view = images()[image]
  drawn = all_operations(RandAugment(magnitude=0))
  for i, name in enumerate(OPERATIONS):
    result = apply(view, Operations(drawn.index[i : i + 1], drawn.strength[i : i + 1]))
    if name == "solarize":
      assert np.array_equal(result, np.where(view == 255, 0, view))
    elif name not in ("autocontrast", "equalize"):
      assert np.array_equal(result, view), name


def test_operations_follow_one_another():
  view = images()["flower 24"]
  drawn = all_operations()
  for first, second in itertools.permutations(range(len(OPERATIONS)), 2):
    chosen = [first, second]
    between = run(OPERATIONS[first], view, drawn.strength[first])
    expected = run(OPERATIONS[second], between, drawn.strength[second])
    both = Operations(drawn.index[chosen], drawn.strength[chosen])
    assert np.array_equal(apply(view, both), expected)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("interpolation", randaugment.INTERPOLATIONS)
def test_strides_do_not_matter_and_the_view_stays(name, interpolation):
  base = np.array(load_sample_image("china.jpg"))
  before = base.copy()
  strength = all_operations().strength[OPERATIONS.index(name)]
  views = {
    "cut": base[10:60, 20:70],
    "mirrored": base[10:60, 20:70][:, ::-1],
    "upside down": base[10:60, 20:70][::-1],
    "turned": base[10:60, 20:70].swapaxes(0, 1),
    "every third": base[10:160:3, 20:170:3],
    "BGR": base[10:60, 20:70, ::-1],
  }
  for kind, view in views.items():
    expected = run(name, np.ascontiguousarray(view), strength, interpolation)
    result = run(name, view, strength, interpolation)
    assert np.array_equal(result, expected), kind
    assert result.dtype == np.uint8
    if name == "identity":
      assert result is view
    else:
      assert not np.shares_memory(result, base), kind
      result[:] = 0  # may be written
  assert np.array_equal(base, before)


def test_threads_do_not_meet():
  view = images()["china"]
  rng = np.random.default_rng(3)
  drawn = [draw(RandAugment(operations=3), rng) for _ in range(60)]
  alone = [apply(view, one) for one in drawn]
  with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(functools.partial(apply, view), drawn))
  for one, other in zip(alone, together, strict=True):
    assert np.array_equal(one, other)


# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------

SPECS = st.integers(2, 64).flatmap(
  lambda bins: st.builds(
    RandAugment, st.integers(1, 8), st.floats(0, bins - 1) | st.integers(0, bins - 1), st.just(bins)
  )
)


@pytest.mark.parametrize("magnitude", range(BINS))
def test_strengths_are_torchvisions(magnitude):
  drawn = draw(RandAugment(operations=2000, magnitude=magnitude), np.random.default_rng(magnitude))
  for i, name in enumerate(OPERATIONS):
    every = magnitudes(name)
    expected = np.unique(np.float32(every[magnitude % len(every) :: BINS]))
    assert np.unique(drawn.strength[drawn.index == i]) == pytest.approx(expected), name


def test_defaults_are_the_documented_choice():
  assert RandAugment() == RandAugment(2, 9, 31, "nearest")
  assert len(OPERATIONS) == len(set(OPERATIONS)) == 14


@settings(max_examples=150, deadline=None)
@given(SPECS, st.integers(0, 2**32 - 1))
def test_draws_are_in_range(spec, seed):
  index, strength = draw(spec, np.random.default_rng(seed))
  assert index.shape == strength.shape == (spec.operations,)
  assert (index.dtype, strength.dtype) == (np.int32, np.float32)
  assert np.all((index >= 0) & (index < 14))
  share = spec.magnitude / (spec.bins - 1)
  for i, s in zip(index.tolist(), strength.tolist()):
    name = OPERATIONS[i]
    if name == "posterize":
      assert abs((8 - s) - 4 * share) <= 0.5 + 1e-6
      assert s == int(s)
    elif name == "solarize":
      assert s == pytest.approx(255 * (1 - share), abs=1e-4)
    elif name in WITHOUT_STRENGTH:
      assert s == 0
    else:
      ends = magnitudes(name)
      middle = ends[0]
      assert abs(s - middle) == pytest.approx(abs(ends[BINS - 1] - middle) * share, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(SPECS, SPECS, st.integers(0, 2**32 - 1))
def test_the_generator_is_called_alike_whatever_comes_out(spec, other, seed):
  rng, counted = np.random.default_rng(seed), np.random.default_rng(seed)
  drawn = draw(spec, rng)
  counted.random(2 * spec.operations)
  assert rng.bit_generator.state == counted.bit_generator.state
  again = draw(spec, np.random.default_rng(seed))
  assert np.array_equal(drawn.index, again.index)
  assert np.array_equal(drawn.strength, again.strength)
  # Another magnitude keeps the operations, another number of them those that both have.
  both = min(spec.operations, other.operations)
  assert np.array_equal(draw(other, np.random.default_rng(seed)).index[:both], drawn.index[:both])


def test_operations_and_signs_are_equally_likely():
  rng = np.random.default_rng(5)
  drawn = [draw(RandAugment(operations=3), rng) for _ in range(10_000)]
  index, strength = (np.stack(values) for values in zip(*drawn))
  for place in range(3):
    assert stats.chisquare(np.bincount(index[:, place], minlength=14)).pvalue > 1e-3
  pairs = np.bincount(index[:, 0] * 14 + index[:, 1], minlength=196)
  assert stats.chisquare(pairs).pvalue > 1e-3
  for i, name in enumerate(OPERATIONS):
    if name not in (*WITHOUT_STRENGTH, "posterize", "solarize"):
      plus = strength[index == i] > magnitudes(name)[0]
      assert stats.binomtest(int(plus.sum()), plus.size).pvalue > 1e-3, name


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"operations": 0}, "operations is 0; expected at least 1"),
    ({"bins": 1}, "bins is 1; expected at least 2"),
    ({"magnitude": -1}, "magnitude is -1; expected a number from 0 to bins - 1 = 30"),
    ({"magnitude": 31}, "magnitude is 31; expected"),
    ({"magnitude": float("nan")}, "magnitude is nan; expected"),
    ({"magnitude": 9, "bins": 9}, "bins - 1 = 8"),
    ({"interpolation": "cubic"}, "'cubic'; expected one of nearest, bilinear"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    RandAugment(**fields)


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((), np.uint8),
    ((8, 8), np.uint8),
    ((8, 9, 3), np.uint8),
    ((8, 8, 4), np.uint8),
    ((0, 0, 3), np.uint8),
    ((2, 8, 8, 3), np.uint8),
    ((8, 8, 3), np.float32),
  ],
)
def test_bad_views(shape, dtype):
  # Unwrapped, because the tests' type checker would be the first to object.
  with pytest.raises(ValueError, match=r"the view is .*; expected uint8 of shape \(side, side, 3"):
    inspect.unwrap(apply)(np.zeros(shape, dtype), single("rotate", 3))


def test_bad_operations():
  view = images()["flower 24"]
  one = single("rotate", 3)
  with pytest.raises(ValueError, match=r"\(2, 1\).*expected one axis"):
    apply(view, Operations(*(np.stack([values, values]) for values in one)))
  with pytest.raises(ValueError, match="strength"):
    apply(view, one._replace(strength=np.zeros(2, np.float32)))
  for index in (-1, 14):
    with pytest.raises(ValueError, match=f"operation {index}; expected one of 0 identity, 1 shear"):
      apply(view, one._replace(index=np.array([index], np.int32)))
  with pytest.raises(ValueError, match="'cubic'; expected one of nearest, bilinear"):
    apply(view, one, "cubic")
  with pytest.raises(ValueError, match="'cubic'"):
    randaugment.shear_y(view, 0.1, "cubic")
  for bits in (0, 9):
    with pytest.raises(ValueError, match=f"bits is {bits}; expected a whole number from 1 to 8"):
      randaugment.posterize(view, bits)
