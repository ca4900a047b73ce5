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
