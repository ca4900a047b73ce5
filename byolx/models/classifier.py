"""Classifier: an encoder with linear classifiers (heads) on its representation (appendices D and E)."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from byolx.models import encoder
from byolx.models.encoder import Network
from byolx.models.heads import Heads
from byolx.models.layers import Initializer, uncorrected
from byolx.models.resnet import ResNetSpec


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
  """Specification of a classifier: an encoder with one or more linear heads on its representation.

  Args:
    encoder: specification of the ResNet f.
    classes: number of classes, which is the number of logits of each head.
    heads: number of linear heads, at least 1.
    head_init: initialiser of the heads' kernels.
    network: function that makes the user's own encoder, which replaces the ResNet f; None to use
      the ResNet.
  """

  encoder: ResNetSpec
  classes: int
  heads: int = 1
  head_init: Initializer = uncorrected
  network: Network | None = None


class Classifier(nnx.Module):
  """Network that computes logits from images: an encoder with one or more linear heads.

  Args:
    spec: specification of the classifier.
    rngs: random keys of the kernels.
  """

  def __init__(self, spec: ClassifierSpec, *, rngs: nnx.Rngs):
    self.encoder = encoder.build(spec.encoder, spec.network, rngs)
    self.heads = Heads(self.encoder.features, spec.classes, spec.heads, spec.head_init, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b h w 3"], *, train: bool, frozen: bool = False
  ) -> Float[Array, "b n c"]:
    """Computes the logits [b, n, c] of each of the n heads.

    Args:
      x: normalised images.
      train: whether BatchNorm uses the statistics of this batch and updates the running averages.
        If False, it uses the running averages.
      frozen: whether the encoder is frozen: no gradient reaches it, and it uses the running
        averages whatever `train` is.
    """
    y = self.encoder(x, train=train and not frozen)
    return self.heads(jax.lax.stop_gradient(y) if frozen else y)
