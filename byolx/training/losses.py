"""Losses, with one float value per example (Eq. 2; appendices B, D and J.3)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def l2_normalise(x: Float[Array, "*b d"], guard: float = 1e-12) -> Float[Array, "*b d"]:
  """l2-normalises the last axis: x * rsqrt(max(||x||^2, guard)), as the reference implementation.

  Args:
    x: vectors along the last axis.
    guard: smallest squared norm, which prevents a division by zero.
  """
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squared, guard))


def regression_loss(
  prediction: Float[Array, "*b d"], target: Float[Array, "*b d"], guard: float = 1e-12
) -> Float[Array, "*b"]:
  """BYOL's loss for one direction of a pair of views; each value is in [0, 4].

  || q/||q|| - z'/||z'|| ||^2 = 2 - 2 <q, z'> / (||q|| ||z'||)   (Eq. 2, Algorithm 1 line 7)

  Args:
    prediction: predictions q(z) of one view.
    target: target projections z' of the other view, with their gradient stopped by the caller.
    guard: smallest squared norm; 0 for no guard, as in the pseudo-code of appendix J.3.
  """
  difference = l2_normalise(prediction, guard) - l2_normalise(target, guard)
  return jnp.sum(jnp.square(difference), axis=-1)


def cross_entropy(
  logits: Float[Array, "*b c"], labels: Int[Array, "*b"], smoothing: float = 0.0
) -> Float[Array, "*b"]:
  """Cross-entropy with label smoothing.

  -sum_k t_k log softmax(logits)_k  with  t = (1 - smoothing) * onehot(label) + smoothing / c

  Args:
    logits: logits of the c classes.
    labels: labels in 0 to c - 1, or -1 for an unlabelled example, whose loss is 0.
    smoothing: share of the uniform distribution in the target, in [0, 1].
  """
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
  if smoothing:
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    loss = (1 - smoothing) * loss + smoothing * uniform
  return jnp.where(labels >= 0, loss, 0.0)


def tclip(logits: Float[Array, "*b c"], alpha: float) -> Float[Array, "*b c"]:
  """Soft clipping of logits to (-alpha, alpha): alpha * tanh(logits / alpha) (appendix D.1).

  Args:
    logits: logits of the classes.
    alpha: bound, at least 0; 0 returns the logits unchanged.
  """
  return alpha * jnp.tanh(logits / alpha) if alpha else logits


def logit_penalty(logits: Float[Array, "*b c"]) -> Float[Array, "*b"]:
  """Mean of logits^2 over the classes, which beta weighs in a classifier's loss (appendix D.1)."""
  return jnp.mean(jnp.square(logits), axis=-1)
