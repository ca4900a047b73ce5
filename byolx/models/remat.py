"""Rematerialisation policies: to save memory, the backward pass computes some values again.

The networks give names to intermediate values. A policy is the set of names whose values the
forward pass stores for the backward pass.
"""

CONVOLUTION = "convolution"
"""Name given to the outputs of convolutions and linear layers."""

BLOCK = "block"
"""Name given to the outputs of a ResNet's stem and of its residual blocks."""

STAGE = "stage"
"""Name given to the outputs of a ResNet's stem and of its stages."""

VIEWS = "views"
"""Name given to the networks' input images, after augmentation and normalisation."""

MOMENTS = "moments"
"""Name given to the batch statistics of `BatchNorm`. They are small, but costly to compute again,
because they are reduced over all devices."""

OUTPUTS = "outputs"
"""Name given to representations, projections and predictions."""

ALWAYS_KEPT = (VIEWS, MOMENTS, OUTPUTS)


KEPT = {
  "none": None,
  "convolution": (*ALWAYS_KEPT, CONVOLUTION),
  "block": (*ALWAYS_KEPT, BLOCK),
  "stage": (*ALWAYS_KEPT, STAGE),
}
"""Rematerialisation policies by name, the values of the config field `train.remat`. A policy is the
names of the values that the forward pass stores for the backward pass; all other values are
computed again. With `none`, all values that the backward pass needs are stored."""
