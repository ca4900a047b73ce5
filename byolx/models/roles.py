"""Roles of parameters, by which the optimiser selects weight decay and LARS's trust ratio.

Every trainable variable has its role as metadata, such as `nnx.Param(value, role=Role.NORM)`; names
of parameters have no effect. By default, biases and parameters of normalisations get neither weight
decay nor the trust ratio (appendix A, Optimization).
"""

import enum


class Role(enum.Enum):
  """Role of a trainable parameter: kernel, bias, or scale or offset of a normalisation."""

  KERNEL = "kernel"
  BIAS = "bias"
  NORM = "norm"

  @property
  def adapted(self) -> bool:
    """Whether a parameter with this role gets weight decay and LARS's trust ratio, by default."""
    return self is Role.KERNEL
