"""32-bit checksums of arrays; a change of a single bit always changes the checksum.

Each 32-bit word of an array is mixed with its position by an invertible function, and the mixed
words are summed modulo 2^32. So a change in one word always changes the sum. The sum does not
depend on the order in which the words are added, and is the same on any mesh and for any sharding.
Values of 8 bytes are split into two words; values of fewer than 4 bytes are widened to one word.

Large arrays on accelerators are summed there, by a jitted function. Small arrays are summed by
numpy, because compiling the function for every shape would take longer than the sums. Small arrays,
and all arrays on a CPU, are summed only in `Pending.result`, so that `start` returns at once.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HOST_BYTES = 2**20
"""Largest size in bytes of an array that numpy sums, if this process holds all of the array."""

_STEP = np.uint32(0x9E3779B1)
_FIRST, _SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


class Pending:
  """Result of `start`: checksums whose computation may not have ended yet.

  Args:
    sums: checksums as uint32 scalars on the devices, by array name.
    views: arrays on the host whose checksums are still to be computed, by array name.
  """

  def __init__(self, sums: dict[str, jax.Array], views: dict[str, np.ndarray]):
    self._sums, self._views = sums, views

  def result(self) -> dict[str, int]:
    """Waits for the devices and returns the checksum of each array, in 0 to 2^32 - 1, by name."""
    host = {name: _host_checksum(view) for name, view in self._views.items()}
    return host | {name: int(value) for name, value in jax.device_get(self._sums).items()}


def start(arrays: Mapping[str, jax.Array]) -> Pending:
  """Starts computing the checksums of arrays, without waiting for the devices.

  In a multi-process run, all processes must call this function with the same arrays.

  Args:
    arrays: arrays of any shape and sharding, by name; they may be donated after the call.

  Returns:
    An object whose method `result` waits for the checksums and returns them.
  """
  sums, on_host = {}, {}
  for name, array in arrays.items():
    whole = array.is_fully_replicated or array.is_fully_addressable
    # Every device holds all of a replicated array: the copy on one device is enough.
    local = array.addressable_data(0) if array.is_fully_replicated else array
    if whole and (array.nbytes <= HOST_BYTES or _is_on_host(array)):
      local.copy_to_host_async()
      on_host[name] = local
    else:
      sums[name] = _device_checksum(local)
  return Pending(sums, {name: np.asarray(local) for name, local in on_host.items()})


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Computes the checksum of each array, in 0 to 2^32 - 1, and returns them by name.

  In a multi-process run, all processes must call this function with the same arrays.

  Args:
    arrays: arrays of any shape and sharding, by name.
  """
  return start(arrays).result()


def _is_on_host(array: jax.Array) -> bool:
  """Returns whether a whole array is in CPU memory, where numpy can view it without a copy.

  jax does not write into memory that has a view, so such an array may be donated.
  """
  return all(device.platform == "cpu" for device in array.sharding.device_set)


def _host_checksum(view: np.ndarray) -> int:
  if view.nbytes > HOST_BYTES:
    return int(_device_checksum(view))
  return int(_sum(np, _words_of_view(view)))


@jax.jit
def _device_checksum(array: jax.Array) -> jax.Array:
  """Computes the checksum of an array on the devices, as a uint32 scalar.

  The array is not reshaped, because a reshape could gather an array that is sharded over devices.
  """
  if array.dtype == jnp.bool_:
    words = array.astype(jnp.uint32)
  elif array.dtype.itemsize < 4:
    narrow = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
  else:  # values of 8 bytes get a new last axis of two words
    words = jax.lax.bitcast_convert_type(array, jnp.uint32)
  return _sum(jnp, words)


def _words_of_view(view: np.ndarray) -> np.ndarray:
  """Returns the 32-bit words of a numpy array as uint32, flat and in row-major order."""
  flat = np.ascontiguousarray(view).reshape(-1)
  narrow = view.dtype.itemsize < 4
  words = flat.view(f"uint{8 * view.dtype.itemsize}" if narrow else "uint32")
  return words.astype(np.uint32)


def _sum(xp: Any, words: Any) -> Any:
  """Mixes the words of an array with their positions, and returns the sum modulo 2^32.

  Args:
    xp: the module that computes, numpy or jax.numpy.
    words: words of the array, uint32 of any shape.
  """
  mixed = words ^ _positions(xp, words.shape)
  mixed = (mixed ^ (mixed >> 16)) * _FIRST
  mixed = (mixed ^ (mixed >> 13)) * _SECOND
  return xp.sum(mixed ^ (mixed >> 16), dtype=xp.uint32)


def _positions(xp: Any, shape: tuple[int, ...]) -> Any:
  """Returns one uint32 number for each element of an array, computed from the element's position.

  The number is the row-major index of the element, multiplied by an odd constant, modulo 2^32.

  Args:
    xp: the module that computes, numpy or jax.numpy.
    shape: shape of the array.
  """
  places = xp.zeros(shape, xp.uint32)
  for axis, length in enumerate(shape):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    along = xp.arange(length, dtype=xp.uint32) * xp.uint32(stride)
    places = places + along.reshape((-1,) + (1,) * (len(shape) - axis - 1))
  return places * _STEP
