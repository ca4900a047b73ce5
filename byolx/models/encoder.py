"""Builds the encoder of a model: a ResNet, or the user's own NNX module."""

from collections.abc import Callable

from flax import nnx

from byolx.core.config import ConfigError
from byolx.models.resnet import ResNet, ResNetSpec
from byolx.models.roles import Role

Network = Callable[[nnx.Rngs], nnx.Module]
"""Function that makes the user's own encoder from random keys: an NNX module with `features` (int)
that is called as `module(x, train=..., views=...)` on normalised images [b, h, w, 3] and returns
[b, features]."""


def build(spec: ResNetSpec, network: Network | None, rngs: nnx.Rngs) -> nnx.Module:
  """Builds the encoder: the ResNet of a specification, or the user's own network.

  A parameter's role decides whether it gets weight decay and LARS's trust ratio. A parameter of the
  user's network may have no role. It then gets one by its shape: an array of two or more axes is a
  kernel, any other array is a bias. By default, kernels get weight decay and the trust ratio, and
  biases get neither.

  Args:
    spec: specification of the ResNet.
    network: function that makes the user's own encoder, which replaces the ResNet; None to build
      the ResNet.
    rngs: random keys of the parameters.

  Raises:
    ConfigError: the user's encoder has no attribute `features`.
  """
  if network is None:
    return ResNet(spec, rngs=rngs)
  module = network(rngs)
  if not hasattr(module, "features"):
    raise ConfigError(
      f"the network {type(module).__name__} has no attribute `features`; expected the size of its "
      "representation, an int"
    )
  for _, variable in nnx.iter_graph(module):
    if isinstance(variable, nnx.Param) and variable.get_metadata().get("role") is None:
      variable.set_metadata(role=Role.KERNEL if variable[...].ndim > 1 else Role.BIAS)
  return module
