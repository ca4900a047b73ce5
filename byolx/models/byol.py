"""BYOL's networks: online encoder, projector and predictor; target encoder and projector (Figure 8)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from byolx.core.fields import at_least, field, one_of
from byolx.models.heads import MLP
from byolx.models.layers import Linear
from byolx.models.remat import OUTPUTS
from byolx.models.resnet import ResNet, ResNetSpec


@dataclasses.dataclass(frozen=True)
class BYOLSpec:
  """Sizes of BYOL's heads, and which of its parts exist.

  Args:
    encoder: the residual network f; its normalisation and initialisers are those of the heads too.
    projection_size: size of z and q.
    projector_hidden, projector_depth: hidden size and number of linear layers of g.
    predictor_hidden, predictor_depth: hidden size and number of linear layers of q.
    output_bias: a bias in the last layer of g and q.
    predictor: without it the projection itself is the prediction (Table 19).
    target: "ema", a moving average with weights of its own; "stop_gradient" or "online", the online
      projection with or without a stopped gradient (Table 19's sg(theta) and theta).
    target_init: "own_key", drawn apart from the online network; "online", a copy of it.
    classes: number of classes of the online probe; 0 leaves the probe out.
    network: function that makes another encoder instead of the ResNet, see `task.Setting`.
  """

  encoder: ResNetSpec
  projection_size: int = field(256, "size of projection and prediction", at_least(1))
  projector_hidden: int = field(4096, "hidden size of the projector", at_least(1))
  projector_depth: int = field(2, "linear layers of the projector", at_least(1))
  predictor_hidden: int = field(4096, "hidden size of the predictor", at_least(1))
  predictor_depth: int = field(2, "linear layers of the predictor", at_least(1))
  output_bias: bool = field(False, "a bias in the last layer of projector and predictor")
  predictor: bool = field(True, "False: the projection is the prediction (Table 19)")
  target: str = field(
    "ema",
    "target of the prediction (Table 19)",
    one_of("ema", "stop_gradient", "online"),
  )
  target_init: str = field(
    "own_key", "target drawn apart from the online network, or a copy", one_of("own_key", "online")
  )
  classes: int = 0
  network: Callable[[nnx.Rngs], nnx.Module] | None = None


class Outputs(NamedTuple):
  """What a branch says of a batch: representation y, projection z, both float32."""

  representation: Float[Array, "b d"]
  projection: Float[Array, "b p"]


class Branch(nnx.Module):
  """Encoder f and projector g, which the online and the target network both have."""

  def __init__(self, spec: BYOLSpec, *, rngs: nnx.Rngs):
    self.encoder = spec.network(rngs) if spec.network else ResNet(spec.encoder, rngs=rngs)
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
  """Everything that BYOL trains or moves.

  `online`, `predictor` and the linear `probe` are trained by gradient; `target` moves towards
  `online` after each optimiser step (see `follow`).
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
    """q(z), or z itself where there is no predictor; float32."""
    if self.predictor is None:
      return z
    prediction = self.predictor(z, train=train, views=views).astype(jnp.float32)
    return checkpoint_name(prediction, OUTPUTS)

  def follow(self, tau: Float[Array, ""], *, statistics: bool = False) -> None:
    """xi <- xi + (1 - tau) * (theta - xi), for the target's parameters (Algorithm 1, line 11).

    Its running statistics come from its own forward passes, unless `statistics` averages them too.
    """
    if self.target is None:
      return
    kinds = (nnx.Param, nnx.BatchStat) if statistics else (nnx.Param,)
    online = dict(nnx.to_flat_state(nnx.state(self.online, nnx.Any(*kinds))))
    for path, xi in nnx.to_flat_state(nnx.state(self.target, nnx.Any(*kinds))):
      theta = online[path][...]
      if jnp.issubdtype(theta.dtype, jnp.floating):
        xi.set_value(xi[...] + (1.0 - tau) * (theta - xi[...]))
