"""Small networks on top of a representation: projector g and predictor q (appendix A, Table 14a)."""

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from byolx.models.layers import Linear
from byolx.models.resnet import ResNetSpec


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
    options = {"kernel_init": spec.kernel_init, "dtype": spec.dtype, "rngs": rngs}
    sizes = (inputs, *(hidden,) * (depth - 1))
    self.hidden = nnx.List(Linear(a, b, **options) for a, b in itertools.pairwise(sizes))
    self.norms = nnx.List(spec.norm(size) for size in sizes[1:])
    self.output = Linear(sizes[-1], outputs, bias=output_bias, **options)

  def __call__(self, x: Float[Array, "b d"], *, train: bool, views: int = 1) -> Float[Array, "b e"]:
    for layer, norm in zip(self.hidden, self.norms, strict=True):
      x = jax.nn.relu(norm(layer(x), train=train, views=views))
    return self.output(x)
