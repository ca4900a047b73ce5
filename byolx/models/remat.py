"""Names of values inside the networks, by which a remat policy says what the forward pass keeps."""

CONVOLUTION = "convolution"
"""Outputs of convolutions and linear layers."""

BLOCK = "block"
"""Outputs of residual blocks, and the stem's."""

STAGE = "stage"
"""Outputs of stages, and the stem's."""

VIEWS = "views"
"""Images as the networks take them."""

MOMENTS = "moments"
"""BatchNorm's statistics of a batch: small, and reduced over all devices."""

OUTPUTS = "outputs"
"""Representations, projections and predictions."""

ALWAYS_KEPT = (VIEWS, MOMENTS, OUTPUTS)


KEPT = {
  "none": None,
  "convolution": (*ALWAYS_KEPT, CONVOLUTION),
  "block": (*ALWAYS_KEPT, BLOCK),
  "stage": (*ALWAYS_KEPT, STAGE),
}
"""What a forward pass keeps for the backward pass, by `train.remat`; the rest is computed again.
`none` leaves it to the compiler, which keeps what it needs and computes nothing twice."""
