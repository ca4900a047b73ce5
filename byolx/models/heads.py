"""Small networks on top of a representation.

These are the projector g and the predictor q (appendix A, Table 14a), and linear classifiers
(appendix D).
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from byolx.core import sharding
from byolx.models.layers import Initializer, Linear
from byolx.models.resnet import ResNetSpec
from byolx.models.roles import Role


class MLP(nnx.Module):
  """Multi-layer perceptron: linear layers, with batch normalisation and ReLU after all but the last.

  Args:
    spec: specification of the encoder, whose normalisation, initialiser and compute type are used.
    inputs: size of the input vectors.
    hidden: size of the hidden layers, which have a bias.
    outputs: size of the output vectors.
    depth: number of linear layers, at least 1 (1 is a single linear layer, appendix G.1).
    output_bias: whether the last layer has a bias, as in the pseudo-code of appendix J.2; the
      reference implementation has none.
    rngs: random keys of the kernels.
  """

  def __init__(
    self,
    spec: ResNetSpec,
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    depth: int = 2,
    output_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    options = {"kernel_init": spec.initializer, "dtype": spec.dtype, "rngs": rngs}
    sizes = (inputs, *(hidden,) * (depth - 1))
    self.hidden = nnx.List(Linear(a, b, **options) for a, b in itertools.pairwise(sizes))
    self.norms = nnx.List(spec.norm(size) for size in sizes[1:])
    self.output = Linear(sizes[-1], outputs, bias=output_bias, **options)

  def __call__(self, x: Float[Array, "b d"], *, train: bool, views: int = 1) -> Float[Array, "b e"]:
    for layer, norm in zip(self.hidden, self.norms, strict=True):
      x = jax.nn.relu(norm(layer(x), train=train, views=views))
    return self.output(x)


class Heads(nnx.Module):
  """Several linear classifiers on the same representation, computed in float32.

  All classifiers start with the same random kernel and with biases of 0.

  Args:
    inputs: size of the representation.
    classes: number of classes.
    count: number of classifiers.
    kernel_init: initialiser of the kernel.
    rngs: random key of the kernel.
  """

  def __init__(
    self, inputs: int, classes: int, count: int, kernel_init: Initializer, *, rngs: nnx.Rngs
  ):
    kernel = kernel_init(rngs.params(), (inputs, classes), jnp.float32)
    self.kernel = nnx.Param(
      jnp.broadcast_to(kernel, (count, inputs, classes)).copy(), role=Role.KERNEL
    )
    self.bias = nnx.Param(jnp.zeros((count, classes), jnp.float32), role=Role.BIAS)

  def __call__(self, y: Float[Array, "b d"]) -> Float[Array, "b n c"]:
    kernel = sharding.gathered(self.kernel[...])
    logits = jnp.einsum("bd,ndc->bnc", y.astype(jnp.float32), kernel)
    return logits + self.bias[...]
