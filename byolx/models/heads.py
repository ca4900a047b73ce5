"""Small networks on top of a representation: projector g and predictor q (appendix A, Table 14a), and
linear classifiers (appendix D)."""

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
  """`depth` linear layers; batch normalisation and ReLU after each but the last.

  Depth 1 is one linear layer (appendix G.1). The hidden layers have a bias; the last one has none
  unless `output_bias`, as in the reference (appendix J.2's pseudo-code gives it one). Normalisation,
  initialiser and compute type are the encoder's, taken from `spec`.
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
  """Linear classifiers side by side on one representation, all drawn alike; float32.

  Args:
    inputs: size of the representation.
    classes: logits of each.
    count: of classifiers.
    kernel_init: of the one draw that all kernels start from.
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
