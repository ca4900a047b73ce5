"""Numbers to watch: collapse monitors of a batch of vectors, norms (Figure 7), accuracy.

BYOL has no negatives, so nothing in its loss forbids that every image gets the same vector (appendix
J.2 and Table 22 show how). The loss alone does not tell: it is lowest at collapse. These monitors do.

Device functions are pure and cheap enough for every training step, but `effective_rank`, which
needs singular values and belongs in evaluation.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

STD_WARNING = 0.1
"""An even spread of normalised std s goes with a mean cosine of 1 - s^2 between images: here 0.99."""

RANK_WARNING = 1.5
"""Between the 1 of a line and the 2 of an evenly filled plane."""

_NO_SPREAD = 1e-12
"""float32 leaves a variance of about 1e-14 between unit vectors that are all the same."""


def normalised_std(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Spread of the directions of the vectors, from 0 (collapsed) to 1 (isotropic).

  The standard deviation of each dimension of z / |z| over the batch, averaged over dimensions, times
  sqrt(d). The variances of all dimensions sum to at most 1, so each is 1/d where the directions fill
  the sphere evenly.
  """
  unit = _unit(z)
  return jnp.mean(jnp.std(unit, axis=0)) * math.sqrt(z.shape[1])


def participation_ratio(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """How many directions share the variance, from 1 to min(b - 1, d); 0 if there is no variance.

  tr(C)^2 / tr(C^2) for the covariance C of z / |z|, which is (sum l)^2 / sum l^2 over its
  eigenvalues l: k equal ones give k. It takes one matrix product and no eigenvalues. It weighs large
  eigenvalues more than `effective_rank` does, so it is the smaller of the two.
  """
  centred = _centred_unit(z)
  # C and the Gram matrix between images have the same eigenvalues: take the smaller one.
  gram = centred @ centred.T if z.shape[0] < z.shape[1] else centred.T @ centred
  total = jnp.trace(gram)
  spread = total > _NO_SPREAD * z.shape[0]
  return jnp.where(spread, total**2 / jnp.where(spread, jnp.sum(gram**2), 1.0), 0.0)


def effective_rank(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Effective rank of z / |z| centred over the batch; 0 if there is no variance.

  exp of the entropy of the singular values, scaled to sum 1 (Roy & Vetterli 2007, eq. 4): k equal
  ones give k. From a decomposition of the batch itself, since float32 eigenvalues of its Gram matrix
  would turn noise of 1e-7 into singular values of 3e-4, and hundreds of those into a few ranks.
  """
  singular = jnp.linalg.svd(_centred_unit(z), compute_uv=False)
  spread = jnp.sum(singular**2) > _NO_SPREAD * z.shape[0]
  shares = singular / jnp.where(spread, jnp.sum(singular), 1.0)
  return jnp.where(spread, jnp.exp(jnp.sum(jax.scipy.special.entr(shares))), 0.0)


def mean_norm(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Mean l2 norm of the vectors (Figure 7)."""
  return jnp.mean(jnp.linalg.norm(z.astype(jnp.float32), axis=1))


def topk_accuracy(
  logits: Float[Array, "b classes"], labels: Int[Array, "b"], k: int = 1
) -> Float[Array, ""]:
  """Share of labelled examples whose class is among the k largest logits.

  Equal logits rank by class number, as in `jax.lax.top_k`; a NaN is never right. Examples with label
  -1 are not counted; NaN if none is labelled.
  """
  counted = labels >= 0
  correct = rank_of_label(logits, labels) < k
  return jnp.sum(correct & counted) / jnp.sum(counted)


def rank_of_label(logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]) -> Int[Array, "*b"]:
  """How many classes come before the label's; for label -1, meaningless.

  Equal logits rank by class number; the label comes after every NaN, and after everything if it is one.
  """
  own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)
  later: Bool[Array, "*b classes"] = jnp.arange(logits.shape[-1]) >= labels[..., None]
  # Counted by what is certainly behind, so that comparisons with NaN count as before.
  behind = (logits < own) | ((logits == own) & later)
  return jnp.sum(~behind, axis=-1)


def collapse_warning(std: float, rank: float, dimension: int) -> str | None:
  """One line if the monitors say that vectors have collapsed, else None.

  Args:
    std: `normalised_std` of the vectors.
    rank: their `participation_ratio` or `effective_rank`.
    dimension: of the vectors; with fewer than 2, rank says nothing.
  """
  if not (math.isfinite(std) and math.isfinite(rank)):
    return f"the collapse monitors are not finite (normalised std {std}, rank {rank})"
  if std < STD_WARNING:
    return (
      f"the vectors collapse towards a point: normalised std {std:.3f}, expected at least "
      f"{STD_WARNING} (1 is isotropic)"
    )
  if rank < RANK_WARNING and dimension >= 2:
    return (
      f"the vectors collapse towards a line: rank {rank:.2f} of {dimension} dimensions, expected at "
      f"least {RANK_WARNING}"
    )
  return None


def _unit(z: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """z / |z| in float32; zero vectors stay zero."""
  z = z.astype(jnp.float32)
  return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _centred_unit(z: Float[Array, "b d"]) -> Float[Array, "b d"]:
  unit = _unit(z)
  return unit - jnp.mean(unit, axis=0)
