"""Batch normalisation with statistics per view, as the reference trains with (fidelity: BN).

The two views of a batch go through the network as one interleaved batch, row b * views + v, yet each
view is normalised by its own statistics, over the whole global batch or over groups of it. Under
`jax.jit` with a batch-sharded input the statistics are global: XLA inserts the one all-reduce.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.models.remat import MOMENTS
from byolx.models.roles import Role


class BatchNorm(nnx.Module):
  """Normalises each channel; float32 statistics whatever the compute type.

  Args:
    channels: size of the last axis.
    decay: of the running averages, which are updated once per view.
    eps: added to the variance.
    group: images per statistics group; 0 takes the whole batch. The last axis of a step's batch is
      cut into consecutive groups (Table 16's small batches inside a large one).
    debias: divide the running averages by 1 - decay^updates, as haiku does; without it they start
      from mean 0 and variance 1, as torch's do.
    scale_init: initial gamma.
    dtype: of the output.
  """

  def __init__(
    self,
    channels: int,
    *,
    decay: float = 0.9,
    eps: float = 1e-5,
    group: int = 0,
    debias: bool = True,
    scale_init: float = 1.0,
    dtype: DTypeLike = jnp.float32,
  ):
    self.scale = nnx.Param(jnp.full(channels, scale_init, jnp.float32), role=Role.NORM)
    self.offset = nnx.Param(jnp.zeros(channels, jnp.float32), role=Role.NORM)
    self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
    self.var = nnx.BatchStat(jnp.full(channels, 0.0 if debias else 1.0, jnp.float32))
    self.updates = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.decay = decay
    self.eps = eps
    self.group = group
    self.debias = debias
    self.dtype = dtype

  def __call__(
    self, x: Float[Array, "*b c"], *, train: bool, views: int = 1
  ) -> Float[Array, "*b c"]:
    """Normalises by the batch's statistics (and updates the averages), or by the averages.

    Args:
      x: rows first, channels last; with `views` > 1 row b * views + v is view v of image b.
      train: use and record this batch's statistics.
      views: how many views are interleaved.

    Raises:
      ValueError: the rows are not a multiple of views * group.
    """
    if not train:
      mean, var = self.averages()
      inverse = jax.lax.rsqrt(var + self.eps) * self.scale[...]
      return _affine(x, mean, inverse, self.offset[...]).astype(self.dtype)
    rows = x.shape[0]
    group = self.group or rows // views
    if group == 0 or rows % (group * views):
      raise ValueError(
        f"batch of {rows} rows: expected a multiple of views {views} * model.bn_group {group}"
      )
    y, moments = _by_batch(
      x, self.scale[...], self.offset[...], group, views, self.eps, jnp.dtype(self.dtype)
    )
    self._record(jax.lax.stop_gradient(moments))
    return y

  def averages(self) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """Running mean and variance; 0 and 1 before the first update."""
    if not self.debias:
      return self.mean[...], self.var[...]
    seen = self.updates[...] > 0
    weight = jnp.where(seen, 1.0 - self.decay ** self.updates[...].astype(jnp.float32), 1.0)
    return self.mean[...] / weight, jnp.where(seen, self.var[...] / weight, 1.0)

  def _record(self, moments: Float[Array, "g v 2 c"]) -> None:
    """One update per view, in order; groups of one batch count as one update with their mean."""
    views = moments.shape[1]
    weights = (1.0 - self.decay) * self.decay ** np.arange(views)[::-1, None, None]
    new = jnp.sum(np.float32(weights) * jnp.mean(moments, 0), 0)
    # set_value: item assignment under tracing costs time quadratic in the program.
    self.mean.set_value(self.decay**views * self.mean[...] + new[0])
    self.var.set_value(self.decay**views * self.var[...] + new[1])
    self.updates.set_value(self.updates[...] + views)


# Jitted inside the step: each shape is traced once, not once per layer, a third of the tracing time.
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _by_batch(
  x: Float[Array, "*b c"],
  scale: Float[Array, "c"],
  offset: Float[Array, "c"],
  group: int,
  views: int,
  eps: float,
  dtype: np.dtype,
) -> tuple[Float[Array, "*b c"], Float[Array, "g v 2 c"]]:
  """Normalised by the statistics of each group's views; and these, mean and variance."""
  rows, space, channels = x.shape[0], tuple(range(1, x.ndim - 1)), x.shape[-1]
  wide = x.astype(jnp.float32)
  # Each row is summed by itself first: only small arrays are cut into groups and views.
  moments = jnp.stack([jnp.mean(wide, space), jnp.mean(wide * wide, space)], axis=1)
  moments = jnp.mean(moments.reshape(-1, group, views, 2, channels), axis=1)
  mean, square = jnp.split(checkpoint_name(moments, MOMENTS), 2, axis=2)
  var = jnp.maximum(square - mean * mean, 0.0)

  def of_rows(x: Array) -> Array:
    x = jnp.broadcast_to(x[:, None], (rows // (group * views), group, *x.shape[1:]))
    return x.reshape(rows, *(1,) * len(space), channels)

  inverse = jax.lax.rsqrt(of_rows(var) + eps) * scale
  y = _normalise(x, of_rows(mean), inverse, offset).astype(dtype)
  return y, jnp.concatenate([mean, var], axis=2)


def _affine(x: Array, mean: Array, inverse: Array, offset: Array) -> Array:
  return (x.astype(jnp.float32) - mean) * inverse + offset


@jax.custom_vjp
def _normalise(
  x: Float[Array, "b *s c"],
  mean: Float[Array, "b *ones c"],
  inverse: Float[Array, "b *ones c"],
  offset: Float[Array, "c"],
) -> Float[Array, "b *s c"]:
  """(x - mean) * inverse + offset in float32, with a gradient that sums two large arrays.

  Left to itself, jax sums three: for offset it sums what it sums for mean, but for a factor.
  """
  return _affine(x, mean, inverse, offset)


def _normalise_forward(x: Array, mean: Array, inverse: Array, offset: Array) -> tuple:
  return _affine(x, mean, inverse, offset), (x, mean, inverse)


def _normalise_backward(known: tuple, of_y: Array) -> tuple[Array, Array, Array, Array]:
  x, mean, inverse = known
  space = tuple(range(1, x.ndim - 1))
  total = jnp.sum(of_y, space, keepdims=True)
  of_inverse = jnp.sum(of_y * (x.astype(jnp.float32) - mean), space, keepdims=True)
  of_offset = jnp.sum(total, tuple(range(x.ndim - 1)))
  return (of_y * inverse).astype(x.dtype), -inverse * total, of_inverse, of_offset


_normalise.defvjp(_normalise_forward, _normalise_backward)
