"""An encoder with linear classifiers on its representation (appendices D and E)."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from byolx.models.heads import Heads
from byolx.models.layers import Initializer, uncorrected
from byolx.models.resnet import ResNet, ResNetSpec


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
  """Shape of a classifier.

  Args:
    encoder: the residual network f.
    classes: number of logits of each head.
    heads: number of classifiers side by side.
    head_init: initialiser of the heads' kernels.
    network: function that makes another encoder instead of the ResNet, see `task.Setting`.
  """

  encoder: ResNetSpec
  classes: int
  heads: int = 1
  head_init: Initializer = uncorrected
  network: Callable[[nnx.Rngs], nnx.Module] | None = None


class Classifier(nnx.Module):
  """Images to logits."""

  def __init__(self, spec: ClassifierSpec, *, rngs: nnx.Rngs):
    self.encoder = spec.network(rngs) if spec.network else ResNet(spec.encoder, rngs=rngs)
    self.heads = Heads(self.encoder.features, spec.classes, spec.heads, spec.head_init, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b h w 3"], *, train: bool, frozen: bool = False
  ) -> Float[Array, "b n c"]:
    """Logits of every head.

    Args:
      x: normalised images.
      train: the encoder normalises by this batch's statistics, and records them.
      frozen: no gradient reaches the encoder, and it is not in training mode whatever `train` says.
    """
    y = self.encoder(x, train=train and not frozen)
    return self.heads(jax.lax.stop_gradient(y) if frozen else y)
