"""What a parameter is for. The optimiser decides by this role, never by a parameter's name.

Every trainable variable carries its role as metadata: `nnx.Param(value, role=Role.NORM)`. Biases and
normalisation parameters take neither weight decay nor LARS's trust ratio (appendix A, Optimization).
"""

import enum


class Role(enum.Enum):
  """Role of one trainable array."""

  KERNEL = "kernel"
  BIAS = "bias"
  NORM = "norm"

  @property
  def adapted(self) -> bool:
    """Whether weight decay and LARS adaptation apply."""
    return self is Role.KERNEL
