"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Num

from byolx.evaluation.logistic_regression import _check_labels, _padded

_COSINES = 2**25  # largest number of cosines in memory at the same time (128 MiB)
_BLOCK = 256  # largest number of test images that are classified at the same time


def knn_probe(
  features: Num[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  test_features: Num[np.ndarray, "m d"],
  *,
  classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> Int[np.ndarray, "m"]:
  """Classifies test images by a weighted vote of their k nearest labelled training images.

  The nearest images are those with the largest cosine s between the features, and each votes with weight
  exp(s / temperature) (Wu et al. 2018, section 3.4).

  Args:
    features: features of the training images, real numbers.
    labels: classes of the training images. An image with label -1 is unlabelled and has no vote.
    test_features: features of the test images, real numbers.
    classes: number of classes, at least 2.
    k: number of neighbours that vote; if fewer images are labelled, all of them vote.
    temperature: temperature of the weights, above 0.

  Returns:
    Predicted class of each test image.

  Raises:
    ValueError: no training image is labelled, a label is not below `classes`, or `classes` is below 2.
  """
  _check_labels(labels, classes)
  x, y = _padded(features, labels)
  tests, _ = _padded(test_features, np.zeros(len(test_features), np.int32))
  # Blocks of test images limit memory. Padding makes the number of rows a multiple of the block.
  block = min(_BLOCK, 2 ** max(0, int(math.log2(_COSINES / len(x)))))
  blocks = tests.reshape(-1, block, tests.shape[1])
  votes = _vote(x, y, blocks, classes, k, temperature)
  return np.asarray(votes).reshape(-1)[: len(test_features)]


@functools.partial(jax.jit, static_argnames=("classes", "k"))
def _vote(
  x: Float32[Array, "n d"],
  labels: Int[Array, "n"],
  blocks: Float32[Array, "blocks m d"],
  classes: int,
  k: int,
  temperature: Float[Array, ""],
) -> Int[Array, "blocks m"]:
  x = _unit(x)

  def of_block(tests: Float32[Array, "m d"]) -> Int[Array, "m"]:
    cosines = jnp.matmul(_unit(tests), x.T, precision="highest")
    nearest, index = jax.lax.top_k(jnp.where(labels >= 0, cosines, -jnp.inf), min(k, len(x)))
    weights = jnp.exp(nearest / temperature)  # 0 for an unlabelled neighbour
    voted = jax.nn.one_hot(labels[index], classes) * weights[:, :, None]
    return jnp.argmax(voted.sum(axis=1), axis=1)

  return jax.lax.map(of_block, blocks)


def _unit(x: Float32[Array, "n d"]) -> Float32[Array, "n d"]:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
