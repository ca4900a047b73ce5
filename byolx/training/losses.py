"""Loss functions, which return one float per example (Eq. 2; appendices B, D and J.3)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def l2_normalise(x: Float[Array, "*b d"], guard: float = 1e-12) -> Float[Array, "*b d"]:
  """Scales vectors to l2 norm 1: x * rsqrt(max(||x||^2, guard)), as the reference implementation does.

  Args:
    x: vectors along the last axis.
    guard: lower limit of the squared norm, which prevents a division by zero.
  """
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squared, guard))


def regression_loss(
  prediction: Float[Array, "*b d"], target: Float[Array, "*b d"], guard: float = 1e-12
) -> Float[Array, "*b"]:
  """Computes BYOL's loss of each example for one direction, from one view to the other, in [0, 4].

    || q/||q|| - z'/||z'|| ||^2 = 2 - 2 <q, z'> / (||q|| ||z'||)   (Eq. 2, Algorithm 1 line 7)

  Args:
    prediction: predictions q(z) from one view.
    target: target projections z' of the other view; the caller must stop their gradient.
    guard: lower limit of the squared norms; 0 for no limit, as in the pseudo-code of appendix J.3.
  """
  difference = l2_normalise(prediction, guard) - l2_normalise(target, guard)
  return jnp.sum(jnp.square(difference), axis=-1)


def cross_entropy(
  logits: Float[Array, "*b c"], labels: Int[Array, "*b"], smoothing: float = 0.0
) -> Float[Array, "*b"]:
  """Computes the cross-entropy of each example, with label smoothing.

    -sum_k t_k log softmax(logits)_k  with  t = (1 - smoothing) * onehot(label) + smoothing / c

  Args:
    logits: logits of the c classes.
    labels: labels in 0 to c - 1, or -1 for an unlabelled example, whose loss is 0.
    smoothing: weight of the uniform distribution in t, in [0, 1].
  """
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
  if smoothing:
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    loss = (1 - smoothing) * loss + smoothing * uniform
  return jnp.where(labels >= 0, loss, 0.0)


def tclip(logits: Float[Array, "*b c"], alpha: float) -> Float[Array, "*b c"]:
  """Limits logits smoothly to (-alpha, alpha), by alpha * tanh(logits / alpha) (appendix D.1).

  Args:
    logits: logits of the classes.
    alpha: limit, at least 0; with 0, the logits are returned unchanged.
  """
  return alpha * jnp.tanh(logits / alpha) if alpha else logits


def logit_penalty(logits: Float[Array, "*b c"]) -> Float[Array, "*b"]:
  """Computes the mean of logits^2 over the classes, a term of a classifier's loss (appendix D.1)."""
  return jnp.mean(jnp.square(logits), axis=-1)
