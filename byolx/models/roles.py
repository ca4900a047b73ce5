"""Roles of parameters, by which the optimiser selects weight decay and LARS's trust ratio.

Every trainable variable has its role as metadata, such as `nnx.Param(value, role=Role.NORM)`; names of
parameters have no effect. Biases and normalisation parameters get neither weight decay nor the trust
ratio (appendix A, Optimization).
"""

import enum


class Role(enum.Enum):
  """Role of one trainable array."""

  KERNEL = "kernel"
  BIAS = "bias"
  NORM = "norm"

  @property
  def adapted(self) -> bool:
    """Whether weight decay and LARS's trust ratio apply to the parameter."""
    return self is Role.KERNEL
