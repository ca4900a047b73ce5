"""Losses: one value per example, the equation in the comment (appendices B, D, J.3; reference)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def l2_normalise(x: Float[Array, "*b d"], guard: float = 1e-12) -> Float[Array, "*b d"]:
  """x / ||x||, as the reference guards it: x * rsqrt(max(||x||^2, guard))."""
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squared, guard))


def regression_loss(
  prediction: Float[Array, "*b d"], target: Float[Array, "*b d"], guard: float = 1e-12
) -> Float[Array, "*b"]:
  """BYOL's loss of one direction, in [0, 4].

  || q/||q|| - z'/||z'|| ||^2 = 2 - 2 <q, z'> / (||q|| ||z'||)   (Eq. 2, Algorithm 1 line 7)

  Args:
    prediction: q(z) of one view.
    target: z' of the other view; the caller stops its gradient.
    guard: smallest squared norm; 0 is the pseudo-code of appendix J.3, without a guard.
  """
  difference = l2_normalise(prediction, guard) - l2_normalise(target, guard)
  return jnp.sum(jnp.square(difference), axis=-1)


def cross_entropy(
  logits: Float[Array, "*b c"], labels: Int[Array, "*b"], smoothing: float = 0.0
) -> Float[Array, "*b"]:
  """-sum_k t_k log softmax(logits)_k with t = (1 - smoothing) * onehot(label) + smoothing / c.

  0 where the label is -1 (unlabelled).
  """
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
  if smoothing:
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    loss = (1 - smoothing) * loss + smoothing * uniform
  return jnp.where(labels >= 0, loss, 0.0)


def tclip(logits: Float[Array, "*b c"], alpha: float) -> Float[Array, "*b c"]:
  """alpha * tanh(logits / alpha), in (-alpha, alpha); the logits themselves where alpha is 0 (D.1)."""
  return alpha * jnp.tanh(logits / alpha) if alpha else logits


def logit_penalty(logits: Float[Array, "*b c"]) -> Float[Array, "*b"]:
  """average(logits^2) over the classes: beta times it regularises a classifier (D.1)."""
  return jnp.mean(jnp.square(logits), axis=-1)
