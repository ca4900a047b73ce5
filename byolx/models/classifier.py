"""An encoder with linear classifiers on its representation (appendices D and E)."""

import dataclasses

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
    classes: logits of each head.
    heads: classifiers side by side.
    head_init: of their kernels.
  """

  encoder: ResNetSpec
  classes: int
  heads: int = 1
  head_init: Initializer = uncorrected


class Classifier(nnx.Module):
  """Images to logits."""

  def __init__(self, spec: ClassifierSpec, *, rngs: nnx.Rngs):
    self.encoder = ResNet(spec.encoder, rngs=rngs)
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
