"""Metrics of training and evaluation: collapse monitors, norms and accuracy.

BYOL has no negative examples, so its loss allows collapse, where all images get the same vector
(appendix J.2 and Table 22 give examples). The loss does not show collapse, since it is lowest there.
The collapse monitors show it: they measure how different the vectors of a batch are.

All functions on arrays are pure. They are cheap enough for each training step. Only `effective_rank` is
not: it needs singular values, and is for evaluation.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

STD_WARNING = 0.1
"""Smallest normalised std without a collapse warning.

At this std s, the mean cosine between the vectors of two images is 1 - s^2 = 0.99.
"""

RANK_WARNING = 1.5
"""Smallest rank of a batch of vectors without a collapse warning.

The rank is 1 if all vectors lie on a line, and 2 if they fill a plane evenly.
"""

_NO_SPREAD = 1e-12
"""Largest variance that counts as 0. Rounding in float32 gives about 1e-14 for equal unit vectors."""


def normalised_std(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Computes the spread of the directions of vectors, from 0 (all equal) to 1 (isotropic).

  The spread is sqrt(d) times the mean over dimensions of the standard deviation of z / |z| over the
  batch. The variances of all dimensions sum to at most 1, and each is 1/d for isotropic directions.

  Args:
    z: vectors, in any float dtype.

  Returns:
    float32 scalar in 0..1.
  """
  unit = _unit(z)
  return jnp.mean(jnp.std(unit, axis=0)) * math.sqrt(z.shape[1])


def participation_ratio(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Computes the participation ratio of z / |z|: the number of directions that share the variance.

  This is tr(C)^2 / tr(C^2) for the covariance C of z / |z|, or (sum l)^2 / sum l^2 over the eigenvalues
  l of C: k equal non-zero eigenvalues give k. The computation needs one matrix product and no
  eigenvalues. The ratio is at most `effective_rank`, since it gives more weight to large eigenvalues.

  Args:
    z: vectors, in any float dtype.

  Returns:
    float32 scalar from 1 to min(b - 1, d); 0 if there is no variance.
  """
  centred = _centred_unit(z)
  # C and the Gram matrix of the images have the same non-zero eigenvalues: take the smaller one.
  gram = centred @ centred.T if z.shape[0] < z.shape[1] else centred.T @ centred
  total = jnp.trace(gram)
  spread = total > _NO_SPREAD * z.shape[0]
  return jnp.where(spread, total**2 / jnp.where(spread, jnp.sum(gram**2), 1.0), 0.0)


def effective_rank(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Computes the effective rank of z / |z|, centred over the batch (Roy & Vetterli 2007, eq. 4).

  This is exp(entropy) of the singular values, scaled to sum 1: k equal non-zero values give k. The
  singular values are computed from the batch itself. The square roots of float32 eigenvalues of its Gram
  matrix would be too inaccurate: a rounding error of 1e-7 becomes a singular value of 3e-4.

  Args:
    z: vectors, in any float dtype.

  Returns:
    float32 scalar from 1 to min(b - 1, d); 0 if there is no variance.
  """
  singular = jnp.linalg.svd(_centred_unit(z), compute_uv=False)
  spread = jnp.sum(singular**2) > _NO_SPREAD * z.shape[0]
  shares = singular / jnp.where(spread, jnp.sum(singular), 1.0)
  return jnp.where(spread, jnp.exp(jnp.sum(jax.scipy.special.entr(shares))), 0.0)


def mean_norm(z: Float[Array, "b d"]) -> Float[Array, ""]:
  """Computes the mean l2 norm of vectors, as a float32 scalar (Figure 7)."""
  return jnp.mean(jnp.linalg.norm(z.astype(jnp.float32), axis=1))


def topk_accuracy(
  logits: Float[Array, "b classes"], labels: Int[Array, "b"], k: int = 1
) -> Float[Array, ""]:
  """Computes the share of the labelled examples whose class is among the k largest logits.

  If two logits are equal, the logit of the lower class number counts as larger, as in `jax.lax.top_k`.
  An example whose label has the logit NaN counts as wrong.

  Args:
    logits: logits; larger is more likely.
    labels: classes of the examples; examples with label -1 are unlabelled and ignored.
    k: number of largest logits.

  Returns:
    Scalar in 0..1; NaN if no example is labelled.
  """
  counted = labels >= 0
  correct = rank_of_label(logits, labels) < k
  return jnp.sum(correct & counted) / jnp.sum(counted)


def rank_of_label(logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]) -> Int[Array, "*b"]:
  """Computes the rank of the label's class among all classes, from 0 for the largest logit.

  If two logits are equal, the lower class number comes first. Other classes whose logit is NaN come
  first. If the logit of the label is NaN, the label comes last.

  Args:
    logits: logits; larger is more likely.
    labels: classes of the examples; the rank of label -1 (unlabelled) is meaningless.

  Returns:
    Integers in 0..classes - 1, or `classes` if the label's logit is NaN.
  """
  label_logit = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)
  tie_after_label: Bool[Array, "*b classes"] = jnp.arange(logits.shape[-1]) >= labels[..., None]
  # Classes after the label are counted, since comparisons with NaN are False.
  after_label = (logits < label_logit) | ((logits == label_logit) & tie_after_label)
  return jnp.sum(~after_label, axis=-1)


def collapse_warning(std: float, rank: float, dimension: int) -> str | None:
  """Returns a warning if vectors have collapsed (are nearly equal, or lie nearly on a line), else None.

  Args:
    std: `normalised_std` of the vectors, in 0..1.
    rank: `participation_ratio` or `effective_rank` of the vectors.
    dimension: dimension of the vectors. Below 2, the rank is not checked.

  Returns:
    One line of text if std is below `STD_WARNING`, rank is below `RANK_WARNING`, or either is not
    finite. None if there is no warning.
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
  """Computes z / |z| in float32; zero vectors stay zero."""
  z = z.astype(jnp.float32)
  return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _centred_unit(z: Float[Array, "b d"]) -> Float[Array, "b d"]:
  unit = _unit(z)
  return unit - jnp.mean(unit, axis=0)
