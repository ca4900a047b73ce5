"""Batch normalisation with statistics per view, as the reference trains with (fidelity: BN).

The two views of a batch go through the network as one interleaved batch, row b * views + v, yet each
view is normalised by its own statistics, over the whole global batch or over groups of it. Under
`jax.jit` with a batch-sharded input the statistics are global: XLA inserts the one all-reduce.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.models.names import MOMENTS
from byolx.roles import Role


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
      return self._affine(x, mean, var)
    rows, space = x.shape[0], tuple(range(1, x.ndim - 1))
    wide = x.astype(jnp.float32)
    # Each row is summed by itself first: only small arrays are cut into groups and views.
    moments = jnp.stack([jnp.mean(wide, space), jnp.mean(jnp.square(wide), space)], axis=1)
    moments = checkpoint_name(jnp.mean(self._split(moments, views), axis=1), MOMENTS)
    mean, square = moments[:, :, 0], moments[:, :, 1]
    var = jnp.maximum(square - jnp.square(mean), 0.0)
    self._record(mean, var)
    per_row = self._by_row(jnp.stack([mean, var], axis=2), rows)
    per_row = per_row.reshape(rows, 2, *(1,) * len(space), x.shape[-1])
    return self._affine(x, per_row[:, 0], per_row[:, 1])

  def averages(self) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """Running mean and variance; 0 and 1 before the first update."""
    if not self.debias:
      return self.mean[...], self.var[...]
    seen = self.updates[...] > 0
    weight = jnp.where(seen, 1.0 - self.decay ** self.updates[...].astype(jnp.float32), 1.0)
    return self.mean[...] / weight, jnp.where(seen, self.var[...] / weight, 1.0)

  def _split(self, x: Float[Array, "b *s"], views: int) -> Float[Array, "g n v *s"]:
    rows = x.shape[0]
    group = self.group or rows // views
    if group == 0 or rows % (group * views):
      raise ValueError(
        f"batch of {rows} rows: expected a multiple of views {views} * model.bn_group {group}"
      )
    return x.reshape(rows // (group * views), group, views, *x.shape[1:])

  def _by_row(self, x: Float[Array, "g v *s"], rows: int) -> Float[Array, "b *s"]:
    """What holds for a group's view, for each of its rows."""
    groups, views, *rest = x.shape
    per_row = jnp.broadcast_to(x[:, None], (groups, rows // (groups * views), views, *rest))
    return per_row.reshape(rows, *rest)

  def _record(self, mean: Float[Array, "g v c"], var: Float[Array, "g v c"]) -> None:
    """One update per view, in order; groups of one batch count as one update with their mean."""
    mean, var = jnp.mean(mean, 0), jnp.mean(var, 0)
    running_mean, running_var = self.mean[...], self.var[...]
    for view in range(mean.shape[0]):
      running_mean = self.decay * running_mean + (1.0 - self.decay) * mean[view]
      running_var = self.decay * running_var + (1.0 - self.decay) * var[view]
    # set_value: item assignment under tracing costs time quadratic in the program.
    self.mean.set_value(jax.lax.stop_gradient(running_mean))
    self.var.set_value(jax.lax.stop_gradient(running_var))
    self.updates.set_value(self.updates[...] + mean.shape[0])

  def _affine(self, x: Array, mean: Array, var: Array) -> Array:
    inverse = jax.lax.rsqrt(var + self.eps) * self.scale[...]
    return ((x.astype(jnp.float32) - mean) * inverse + self.offset[...]).astype(self.dtype)
