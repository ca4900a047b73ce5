"""BYOL's networks: online encoder, projector and predictor; target encoder and projector (Figure 8)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from byolx.core.fields import at_least, field, one_of
from byolx.models import encoder
from byolx.models.encoder import Network
from byolx.models.heads import MLP
from byolx.models.layers import Linear
from byolx.models.remat import OUTPUTS
from byolx.models.resnet import ResNetSpec


@dataclasses.dataclass(frozen=True)
class BYOLSpec:
  """Specification of BYOL's networks.

  Args:
    encoder: specification of the ResNet f. Projector and predictor use its normalisation and its
      initialiser too. The probe, a linear classifier, uses its initialiser.
    projection_size: size of the projection z and of the prediction q(z).
    projector_hidden, projector_depth: size of the hidden layers and number of linear layers of the
      projector g.
    predictor_hidden, predictor_depth: size of the hidden layers and number of linear layers of the
      predictor q.
    output_bias: whether the last layers of g and q have a bias.
    predictor: whether there is a predictor; if False, the projection is used as prediction (Table
      19).
    target: name of the target of the prediction (Table 19). "ema" is the projection of a target
      network, which is a moving average of the online network. "stop_gradient" is the online
      projection with a stopped gradient, sg(theta) in the paper. "online" is the online projection
      with its gradient, theta in the paper.
    target_init: name of the target network's initial weights: "own_key" for random weights of its
      own, "online" for a copy of the online network's.
    classes: number of classes of the online probe, a linear classifier; 0 for no probe.
    network: function that makes the user's own encoder, which replaces the ResNet f; None to use
      the ResNet.
  """

  encoder: ResNetSpec
  projection_size: int = field(256, "size of the projection and of the prediction", at_least(1))
  projector_hidden: int = field(4096, "size of the projector's hidden layers", at_least(1))
  projector_depth: int = field(2, "number of linear layers of the projector", at_least(1))
  predictor_hidden: int = field(4096, "size of the predictor's hidden layers", at_least(1))
  predictor_depth: int = field(2, "number of linear layers of the predictor", at_least(1))
  output_bias: bool = field(False, "bias in the last layer of projector and predictor")
  predictor: bool = field(
    True, "predictor; without it, the projection is the prediction (Table 19)"
  )
  target: str = field(
    "ema",
    "target of the prediction (Table 19): ema, projection of a moving-average network; "
    "stop_gradient or online, projection of the online network with or without a stopped gradient",
    one_of("ema", "stop_gradient", "online"),
  )
  target_init: str = field(
    "own_key",
    "initial target network: random weights of its own (own_key), or a copy of the online network",
    one_of("own_key", "online"),
  )
  classes: int = 0
  network: Network | None = None


class Outputs(NamedTuple):
  """Outputs for a batch of images: the encoder's representation y and the projector's projection z.

  Both are float32.
  """

  representation: Float[Array, "b d"]
  projection: Float[Array, "b p"]


class Branch(nnx.Module):
  """The encoder f and the projector g, either of the online network or of the target network.

  Args:
    spec: specification of BYOL's networks.
    rngs: random keys of the kernels.
  """

  def __init__(self, spec: BYOLSpec, *, rngs: nnx.Rngs):
    self.encoder = encoder.build(spec.encoder, spec.network, rngs)
    self.projector = MLP(
      spec.encoder,
      self.encoder.features,
      spec.projector_hidden,
      spec.projection_size,
      depth=spec.projector_depth,
      output_bias=spec.output_bias,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "b h w 3"], *, train: bool, views: int = 1) -> Outputs:
    y = self.encoder(x, train=train, views=views)
    z = self.projector(y, train=train, views=views)
    named = (checkpoint_name(x.astype(jnp.float32), OUTPUTS) for x in (y, z))
    return Outputs(*named)


class BYOL(nnx.Module):
  """BYOL's online and target networks, with a linear probe on the online representation.

  `online`, `predictor` and `probe` are trained by gradients. `target` moves towards `online` when
  `follow` is called, after each optimiser step. `predictor`, `target` and `probe` are None if the
  specification has none.

  Args:
    spec: specification of BYOL's networks.
    rngs: random keys of the kernels.
  """

  def __init__(self, spec: BYOLSpec, *, rngs: nnx.Rngs):
    self.online = Branch(spec, rngs=rngs)
    self.predictor = (
      MLP(
        spec.encoder,
        spec.projection_size,
        spec.predictor_hidden,
        spec.projection_size,
        depth=spec.predictor_depth,
        output_bias=spec.output_bias,
        rngs=rngs,
      )
      if spec.predictor
      else None
    )
    self.probe = (
      Linear(
        self.online.encoder.features,
        spec.classes,
        kernel_init=spec.encoder.initializer,
        rngs=rngs,
      )
      if spec.classes
      else None
    )
    self.target = Branch(spec, rngs=rngs) if spec.target == "ema" else None
    if self.target is not None and spec.target_init == "online":
      nnx.update(self.target, jax.tree.map(jnp.copy, nnx.state(self.online)))

  def predict(self, z: Float[Array, "b p"], *, train: bool, views: int = 1) -> Float[Array, "b p"]:
    """Computes the float32 prediction q(z) from projections z; without a predictor, returns z."""
    if self.predictor is None:
      return z
    prediction = self.predictor(z, train=train, views=views).astype(jnp.float32)
    return checkpoint_name(prediction, OUTPUTS)

  def follow(self, tau: Float[Array, ""], *, statistics: bool = False) -> None:
    """Moves the target's parameters xi towards the online parameters theta (Algorithm 1, line 11).

    Each xi becomes xi + (1 - tau) * (theta - xi). Does nothing if there is no target network.

    Args:
      tau: decay rate, in [0, 1].
      statistics: whether BatchNorm's running averages are moved in the same way. If False, the
        target network updates them in its own forward passes.
    """
    if self.target is None:
      return
    kinds = (nnx.Param, nnx.BatchStat) if statistics else (nnx.Param,)
    online = dict(nnx.to_flat_state(nnx.state(self.online, nnx.Any(*kinds))))
    for path, xi in nnx.to_flat_state(nnx.state(self.target, nnx.Any(*kinds))):
      theta = online[path][...]
      if jnp.issubdtype(theta.dtype, jnp.floating):
        xi.set_value(xi[...] + (1.0 - tau) * (theta - xi[...]))
