"""Digests: exact, the same on every mesh, and changed by every single bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from byolx.checkpoints import checksums
from byolx.core import sharding

TYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "uint32"]


def by_hand(array):
  """The definition, word by word, in Python's own integers."""
  most, total = 2**32, 0
  array = np.asarray(array)
  width = array.dtype.itemsize
  words = np.frombuffer(array.tobytes(), f"<u{min(width, 4)}").tolist()
  for place, word in enumerate(words):
    mixed = word ^ (place * 0x9E3779B1) % most
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B % most
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 % most
    total += mixed ^ (mixed >> 16)
  return total % most


def one(array):
  return checksums.digests({"x": array})["x"]


def random(dtype, shape, seed=0):
  bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * jnp.dtype(dtype).itemsize)
  if dtype == "bool":
    return np.frombuffer(bits, np.uint8).reshape(shape) % 2 == 1
  return np.frombuffer(bits, jnp.dtype(dtype)).reshape(shape)


@pytest.fixture(params=["host", "devices"])
def place(request, monkeypatch):
  """Both bodies: small arrays are summed on the host, unless nothing counts as small."""
  if request.param == "devices":
    monkeypatch.setattr(checksums, "HOST_BYTES", -1)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3, 4), (2, 0)])
def test_a_checksum_is_what_its_definition_says(dtype, shape):
  host = random(dtype, shape)
  assert one(jnp.asarray(host)) == by_hand(host)


def test_types_of_eight_bytes_are_two_words(monkeypatch):
  with jax.enable_x64(True):
    host = random("int64", (3, 5))
    assert one(jnp.asarray(host)) == by_hand(host)
    monkeypatch.setattr(checksums, "HOST_BYTES", -1)
    assert one(jnp.asarray(host)) == by_hand(host)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_a_checksum_is_the_same_however_an_array_is_spread(devices, axis):
  host = random("float32", (16, 8, 24))
  spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, sharding.DATA)
  array = jax.device_put(host, NamedSharding(sharding.make_mesh(devices), spec))
  assert one(array) == int(checksums._device_checksum(array)) == by_hand(host)


@given(st.integers(0, 10**6), st.integers(0, 31), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_every_changed_bit_and_word_is_seen(place, bit, word):
  host = random("uint32", (100, 100)).copy()
  array = jnp.asarray(host)
  before = one(array)
  place %= host.size
  flipped, replaced = host.copy(), host.copy()
  flipped.flat[place] ^= np.uint32(1 << bit)
  replaced.flat[place] = word
  assert one(jnp.asarray(flipped)) != before
  assert (one(jnp.asarray(replaced)) != before) == (word != host.flat[place])


def test_order_matters_and_zeros_count():
  host = random("float32", (64,))
  values = {one(jnp.asarray(x)) for x in (host, host[::-1], np.roll(host, 1), host[:-1])}
  values |= {one(jnp.zeros(n)) for n in (63, 64, 65)} | {one(-jnp.zeros(64))}
  assert len(values) == 8
  # Two flipped signs, which would cancel in a sum of weighted words.
  host = np.ones(1000, np.float32)
  pairs = [host.copy() for _ in range(20)]
  for i, pair in enumerate(pairs):
    pair[[i, 999 - i]] = -1
  assert len({one(jnp.asarray(x)) for x in [host, *pairs]}) == 21


@pytest.mark.parametrize("on_host", [True, False])
def test_arrays_may_be_donated_while_they_are_summed(monkeypatch, on_host):
  """As on a CPU, where all is summed later, and as on other devices, where the large ones are queued."""
  monkeypatch.setattr(checksums, "_is_on_host", lambda array: on_host)
  seen = []
  body = checksums._device_checksum
  monkeypatch.setattr(checksums, "_device_checksum", lambda x: seen.append(type(x)) or body(x))
  place = sharding.replicated(sharding.make_mesh(8))
  make = jax.jit(
    lambda: {"large": jnp.arange(330_000.0).reshape(1100, 300), "small": jnp.arange(100.0)},
    out_shardings=place,
  )
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  tree = make()
  pending = checksums.start(tree)
  assert len(seen) == (0 if on_host else 1)
  for _ in range(5):
    tree = overwrite(tree)
  found = pending.result()
  assert len(seen) == 1
  assert issubclass(seen[0], np.ndarray) == on_host
  assert found["small"] == by_hand(np.arange(100.0, dtype=np.float32))
  assert found["large"] == by_hand(np.arange(330_000.0, dtype=np.float32))
