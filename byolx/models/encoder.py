"""The encoder of a model: a ResNet, or the user's own NNX module."""

from collections.abc import Callable

from flax import nnx

from byolx.core.config import ConfigError
from byolx.models.resnet import ResNet, ResNetSpec
from byolx.models.roles import Role

Network = Callable[[nnx.Rngs], nnx.Module]
"""The user's own encoder: makes a module with `features` (int) that is called as
`module(x, train=..., views=...)` on normalised images [b, h, w, 3] and returns [b, features]."""


def build(spec: ResNetSpec, network: Network | None, rngs: nnx.Rngs) -> nnx.Module:
  """Builds the ResNet of a specification, or the user's own encoder.

  Parameters of the user's encoder that have no role get one by their shape: arrays of two or more axes
  are kernels, all others biases, which take neither weight decay nor LARS's trust ratio.

  Args:
    spec: specification of the ResNet.
    network: function that makes the user's encoder; None for the ResNet.
    rngs: random keys of the parameters.

  Raises:
    ConfigError: the user's encoder has no `features`.
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
