"""A number for every array that tells whether a single bit of it has changed.

Each 32-bit word is mixed with its position by a function that can be undone, so that a word that
changes always changes what it adds to the sum, modulo 2^32. Sums do not depend on the order: the
number is the same on any mesh, for any sharding. Types of other widths are split or widened.

Large arrays are summed by a jitted function, on the devices where they are; small ones by numpy, as
compiling for every shape would take longer than that. Where the devices are the host, that waits
for the result too: the one who asks is not kept waiting, and his processor is not taken from him.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HOST_BYTES = 2**20
"""Arrays up to this size are summed by numpy, if this process has all of them."""

_STEP = np.uint32(0x9E3779B1)
_FIRST, _SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


class Pending:
  """Digests under way: made without waiting for the devices, by `start`."""

  def __init__(self, sums: dict[str, jax.Array], views: dict[str, np.ndarray]):
    self._sums, self._views = sums, views

  def result(self) -> dict[str, int]:
    """The digest of every array, by name; waits for the devices."""
    host = {name: _host_digest(view) for name, view in self._views.items()}
    return host | {name: int(value) for name, value in jax.device_get(self._sums).items()}


def start(arrays: Mapping[str, jax.Array]) -> Pending:
  """Begins the digests of named arrays; these may be donated as soon as it returns.

  With several processes all of them call it, for the same arrays.
  """
  sums, seen = {}, {}
  for name, array in arrays.items():
    whole = array.is_fully_replicated or array.is_fully_addressable
    # A copy of a replicated array is the array; one device's work is enough.
    local = array.addressable_data(0) if array.is_fully_replicated else array
    if whole and (array.nbytes <= HOST_BYTES or _is_on_host(array)):
      local.copy_to_host_async()
      seen[name] = local
    else:
      sums[name] = _device_digest(local)
  return Pending(sums, {name: np.asarray(local) for name, local in seen.items()})


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """The digest of every array, by name."""
  return start(arrays).result()


def _is_on_host(array: jax.Array) -> bool:
  """Whether numpy sees its memory as it is; a view keeps it from being written into."""
  return all(device.platform == "cpu" for device in array.sharding.device_set)


def _host_digest(view: np.ndarray) -> int:
  if view.nbytes > HOST_BYTES:
    return int(_device_digest(view))
  return int(_sum(np, _words_of_view(view)))


@jax.jit
def _device_digest(array: jax.Array) -> jax.Array:
  """A uint32 scalar. Nothing is reshaped, which could gather an array that is spread over devices."""
  if array.dtype == jnp.bool_:
    words = array.astype(jnp.uint32)
  elif array.dtype.itemsize < 4:
    narrow = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
  else:  # of 8 bytes, a new last axis of two words
    words = jax.lax.bitcast_convert_type(array, jnp.uint32)
  return _sum(jnp, words)


def _words_of_view(view: np.ndarray) -> np.ndarray:
  """The bits as uint32, of the shape that they have on a device."""
  flat = np.ascontiguousarray(view).reshape(-1)
  narrow = view.dtype.itemsize < 4
  words = flat.view(f"uint{8 * view.dtype.itemsize}" if narrow else "uint32")
  return words.astype(np.uint32)


def _sum(xp: Any, words: Any) -> Any:
  """The mixed words' sum modulo 2^32; `xp` is numpy or jax.numpy."""
  mixed = words ^ _positions(xp, words.shape)
  mixed = (mixed ^ (mixed >> 16)) * _FIRST
  mixed = (mixed ^ (mixed >> 13)) * _SECOND
  return xp.sum(mixed ^ (mixed >> 16), dtype=xp.uint32)


def _positions(xp: Any, shape: tuple[int, ...]) -> Any:
  """Each word's place in row-major order times an odd number, modulo 2^32."""
  places = xp.zeros(shape, xp.uint32)
  for axis, length in enumerate(shape):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    along = xp.arange(length, dtype=xp.uint32) * xp.uint32(stride)
    places = places + along.reshape((-1,) + (1,) * (len(shape) - axis - 1))
  return places * _STEP
