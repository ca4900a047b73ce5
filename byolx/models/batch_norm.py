"""Batch normalisation with separate statistics for each view (docs/fidelity.md, `model.bn_group`).

All views of the images are rows of one batch: row b * views + v is view v of image b. Each view is
normalised by its own statistics, taken over the whole global batch or over groups of images in it.
Under `jax.jit`, XLA inserts the all-reduce that makes the statistics of a sharded batch global.
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
  """Batch normalisation of each channel, with float32 statistics for any compute type.

  Args:
    channels: number of channels, the size of the last axis.
    decay: decay rate of the running averages in [0, 1), applied once per view and forward pass.
    eps: constant added to the variance.
    group: number of consecutive images that share statistics (small batches within a large one,
      Table 16); 0 for the whole batch.
    debias: whether the running averages start at 0 and are divided by 1 - decay^updates, as in
      haiku. If False, they start at mean 0 and variance 1, as in torch.
    scale_init: initial value of the scale gamma.
    dtype: type of the output.
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
    """Normalises a batch by its own statistics in training, else by the running averages.

    Args:
      x: batch of any type, rows first and channels last; row b * views + v is view v of image b.
      train: whether to use the statistics of the batch, and to update the running averages with
        them. If False, the running averages are used.
      views: number of views per image in the batch, at least 1.

    Returns:
      Normalised batch in the type `dtype`.

    Raises:
      ValueError: in training, the number of rows is not a multiple of views * group, or of views if
        group is 0.
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
    """Returns the running mean and variance in float32, which are 0 and 1 before the first update."""
    if not self.debias:
      return self.mean[...], self.var[...]
    updated = self.updates[...] > 0
    weight = jnp.where(updated, 1.0 - self.decay ** self.updates[...].astype(jnp.float32), 1.0)
    return self.mean[...] / weight, jnp.where(updated, self.var[...] / weight, 1.0)

  def _record(self, moments: Float[Array, "g v 2 c"]) -> None:
    """Updates the running averages with the statistics of one batch.

    The update is made once for each view, in the order of the views.

    Args:
      moments: mean and variance of each view in each group of images. They are averaged over the
        groups.
    """
    views = moments.shape[1]
    weights = (1.0 - self.decay) * self.decay ** np.arange(views)[::-1, None, None]
    new = jnp.sum(np.float32(weights) * jnp.mean(moments, 0), 0)
    # set_value, as item assignment while tracing takes time quadratic in the size of the program.
    self.mean.set_value(self.decay**views * self.mean[...] + new[0])
    self.var.set_value(self.decay**views * self.var[...] + new[1])
    self.updates.set_value(self.updates[...] + views)


# Jitted inside of the jitted step, so that each shape is traced once, and not once per layer.
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
  """Normalises a batch; each view in each group of images is normalised by its own statistics.

  Args:
    x: batch, with row b * views + v for view v of image b.
    scale: scale gamma of each channel.
    offset: offset beta of each channel.
    group: number of consecutive images that share statistics.
    views: number of views per image.
    eps: constant added to the variance.
    dtype: type of the normalised batch.

  Returns:
    The normalised batch, and the mean and variance of each view in each group.
  """
  rows, space, channels = x.shape[0], tuple(range(1, x.ndim - 1)), x.shape[-1]
  wide = x.astype(jnp.float32)
  # The mean of each row comes first, so that only small arrays are reshaped into groups and views.
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
  """Computes (x - mean) * inverse + offset in float32, with a gradient that is faster than jax's own.

  The gradient is written by hand, and takes sums over two large arrays. The gradient that jax derives
  takes sums over three. The gradients of offset and mean come from the same sum up to a factor, but
  jax would compute this sum twice.

  Args:
    x: batch.
    mean: mean that is subtracted from each row.
    inverse: scale divided by the standard deviation, for each row.
    offset: offset of each channel.
  """
  return _affine(x, mean, inverse, offset)


def _normalise_forward(x: Array, mean: Array, inverse: Array, offset: Array) -> tuple:
  return _affine(x, mean, inverse, offset), (x, mean, inverse)


def _normalise_backward(residuals: tuple, dy: Array) -> tuple[Array, Array, Array, Array]:
  x, mean, inverse = residuals
  space = tuple(range(1, x.ndim - 1))
  total = jnp.sum(dy, space, keepdims=True)
  dinverse = jnp.sum(dy * (x.astype(jnp.float32) - mean), space, keepdims=True)
  doffset = jnp.sum(total, tuple(range(x.ndim - 1)))
  return (dy * inverse).astype(x.dtype), -inverse * total, dinverse, doffset


_normalise.defvjp(_normalise_forward, _normalise_backward)
