"""Rematerialisation policies: names of intermediate values, and the names that each policy keeps."""

CONVOLUTION = "convolution"
"""Outputs of convolutions and linear layers."""

BLOCK = "block"
"""Outputs of the stem and of residual blocks."""

STAGE = "stage"
"""Outputs of the stem and of stages."""

VIEWS = "views"
"""Input images of the networks, after augmentation and normalisation."""

MOMENTS = "moments"
"""Batch statistics of `BatchNorm`: small, but costly to compute again, as they are reduced over all
devices."""

OUTPUTS = "outputs"
"""Representations, projections and predictions."""

ALWAYS_KEPT = (VIEWS, MOMENTS, OUTPUTS)


KEPT = {
  "none": None,
  "convolution": (*ALWAYS_KEPT, CONVOLUTION),
  "block": (*ALWAYS_KEPT, BLOCK),
  "stage": (*ALWAYS_KEPT, STAGE),
}
"""Names of the values that the forward pass keeps for the backward pass, for each value of the config
field `train.remat`. All other values are computed again in the backward pass. With `none`, all values
that the backward pass needs are kept."""
