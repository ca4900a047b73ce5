"""Sums up the costs of a compiled TPU program, such as clock cycles and memory traffic.

Collectives are the operations that communicate between cores, such as all-reduce.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

from byolx.planning.hlo import Instruction, Program, dims, executed, parts, size

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

CONVOLUTIONS, MOVES, REDUCTIONS, ELEMENTWISE = (
  "convolutions and products",
  "copies, transposes and casts",
  "reductions",
  "elementwise",
)

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_CONTROL = {"while", "conditional", "call", "async-start", "async-update", "async-done"}
_DATA_MOVES = {
  "copy", "copy-start", "copy-done", "transpose", "reshape", "bitcast-convert", "slice", "pad",
  "concatenate", "dynamic-slice", "dynamic-update-slice", "slice-start", "slice-done", "broadcast",
  "convert",
}  # fmt: skip
_NAMED_BY_OPCODE = {
  "select-and-scatter", "reduce-window", "scatter", "gather", "sort", "custom-call",
  "rng-bit-generator", "fft", "cholesky", "triangular-solve", *COLLECTIVES,
}  # fmt: skip

_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_LARGE = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Cost:
  """Estimated cost of one instruction of a compiled TPU program.

  Args:
    name: name of the instruction in the program.
    kind: kind of work, such as "reductions" or "all-reduce".
    opcode: operation, such as `convolution`.
    shape: shape of the result as text, such as `f32[2,3]`.
    source: jax operation from which the instruction was compiled, such as
      `jit(step)/dot_general`. It is empty if the program does not name one.
    cycles: estimated clock cycles of one execution.
    times: number of executions in a train step.
  """

  name: str
  kind: str
  opcode: str
  shape: str
  source: str
  cycles: int
  times: int

  @property
  def total(self) -> int:
    """Estimated clock cycles of all executions of the instruction in a train step."""
    return self.cycles * self.times


def cycles(program: Program, *, loops: bool = True) -> int:
  """Returns the clock cycles of a program on one core, the sum over all executed instructions.

  Instructions without an estimate count as 0 cycles. Communication between cores has no estimate,
  and a few other instructions have none either (see `unestimated`).

  Args:
    program: parsed program.
    loops: whether all iterations of a loop count; False counts one iteration of every loop.
  """
  return sum(each.cycles * times for _, each, times in executed(program, loops=loops))


def loop_factor(program: Program, weight: Callable[[Program, str, Instruction], float]) -> float:
  """Returns the factor by which to multiply a total of XLA's cost analysis, at least 1.

  XLA's analysis counts only one iteration of every loop. The factor is the total over all
  iterations, divided by the total over one iteration of each loop.

  Args:
    program: parsed program.
    weight: function that returns what one instruction adds to the total, such as `flops` or
      `traffic`. Its arguments are the program, the name of the computation and the instruction.
  """
  total = once = 0.0
  for computation, instruction, times in executed(program):
    total += weight(program, computation, instruction) * times
  for computation, instruction, times in executed(program, loops=False):
    once += weight(program, computation, instruction) * times
  return max(1.0, total / once) if once else 1.0


def collectives(program: Program) -> dict[str, dict[str, int]]:
  """Counts a program's collectives, the operations that communicate between cores, by kind.

  The returned dictionary has an entry for each kind, such as "all-reduce". Its `count` is the number
  of executions, and its `bytes` is the total size of their results on one core. An asynchronous
  collective has two instructions, start and done, but counts once. The result of an all-gather is
  the whole gathered array. The result of a reduce-scatter is only the core's part of the sum.
  """
  collectives: dict[str, dict[str, int]] = {}
  for _, instruction, times in executed(program):
    for kind, result_bytes in _collectives_in(program, instruction):
      entry = collectives.setdefault(kind, {"count": 0, "bytes": 0})
      entry["count"] += times
      entry["bytes"] += times * result_bytes
  return {kind: collectives[kind] for kind in COLLECTIVES if kind in collectives}


def costs(program: Program) -> list[Cost]:
  """Returns the costs of all executed instructions with estimated cycles, the costliest first."""
  costs = []
  for _, each, times in executed(program):
    if each.cycles:
      named = _OP_NAME.search(each.attributes)
      source = named[1] if named else ""
      shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", each.shape)
      kind = _kind(program, each)
      costs.append(Cost(each.name, kind, each.opcode, shape, source, each.cycles, times))
  return sorted(costs, key=lambda cost: (-cost.total, cost.name))


def by_kind(costs: list[Cost]) -> dict[str, int]:
  """Returns the total clock cycles of each kind of work, such as "reductions", the largest first."""
  total: Counter[str] = Counter()
  for cost in costs:
    total[cost.kind] += cost.total
  return dict(total.most_common())


def unestimated(program: Program) -> dict[str, int]:
  """Counts the executions of instructions without estimated cycles, by operation.

  Instructions with results below 64 KiB are left out. Collectives (communication between cores),
  control flow and instructions that move no data are left out too.
  """
  counts: Counter[str] = Counter()
  for _, each, times in executed(program):
    idle = each.opcode in _FREE | _CONTROL or each.opcode.endswith(("-start", "-done"))
    moves_nothing = each.opcode == "custom-call" and "Concat" in each.attributes
    allocates = each.opcode == "custom-call" and "AllocateBuffer" in each.attributes
    collective = _collectives_in(program, each)
    if idle or moves_nothing or allocates or collective or each.cycles:
      continue
    if size(each.shape) >= _LARGE:
      counts[each.opcode] += times
  return dict(counts.most_common())


def flops(program: Program, computation: str, instruction: Instruction) -> float:
  """Returns the floating-point operations of one execution of an instruction.

  Only multiplications and additions of convolutions and matrix products are counted. Those inside
  a fusion (several instructions combined into one) and those with padding are included.

  Args:
    program: parsed program.
    computation: name of the computation that contains the instruction.
    instruction: instruction of the program.
  """
  if instruction.opcode == "convolution":
    return _convolution_flops(program, computation, instruction)
  if instruction.opcode == "dot":
    left = dims(_operand_shape(program, computation, instruction, 0))
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in match[1].split(",") if axis] if match else []
    inner = math.prod(left[axis] for axis in axes)
    return 2.0 * math.prod(dims(instruction.shape)) * inner
  inside = [
    flops(program, name, each)
    for name in instruction.called("calls")
    for each in program.computations.get(name, ())
  ]
  return sum(inside, 0.0)


def traffic(program: Program, computation: str, instruction: Instruction) -> float:
  """Returns the bytes that an instruction reads and writes, as if all arrays were in main memory.

  The result is 0 for loops and for instructions that touch no data, such as `tuple`.

  Args:
    program: parsed program.
    computation: name of the computation that contains the instruction.
    instruction: instruction of the program.
  """
  if instruction.opcode in _FREE | _CONTROL:
    return 0.0
  read = sum(
    size(_operand_shape(program, computation, instruction, index))
    for index in range(len(instruction.operands))
  )
  return float(read + size(instruction.shape))


def time(program: Program, computation: str, instruction: Instruction) -> float:
  """Returns the compiler's estimate of an instruction's clock cycles; 0 if there is no estimate.

  The first two arguments are unused. They exist because `loop_factor` passes them.
  """
  return float(instruction.cycles)


def _collectives_in(program: Program, instruction: Instruction) -> list[tuple[str, int]]:
  """Returns the collectives of an instruction: the kind and the bytes of the result of each.

  Collectives are communications between cores, such as "all-reduce". A fusion, which combines
  several instructions into one, may contain several collectives. Most instructions contain none.
  """
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    shape = instruction.shape
    if instruction.opcode != kind and kind != "all-reduce" and shape.startswith("("):
      shape = parts(shape)[1]  # a start instruction's shape has operands before results
    return [(kind, size(shape))]
  if instruction.opcode != "fusion":
    return []
  bodies = [program.computations.get(name, ()) for name in instruction.called("calls")]
  return [pair for body in bodies for each in body for pair in _collectives_in(program, each)]


def _kind(program: Program, instruction: Instruction) -> str:
  """Returns an instruction's kind of work, such as "reductions".

  For a few operations, such as "sort", the kind is the operation's own name.
  """
  opcodes = _opcodes(program, instruction)
  if opcodes & {"convolution", "dot"}:
    return CONVOLUTIONS
  for opcode in sorted(opcodes & _NAMED_BY_OPCODE):
    return opcode
  if "reduce" in opcodes:
    return REDUCTIONS
  return MOVES if opcodes <= _DATA_MOVES | _FREE else ELEMENTWISE


def _opcodes(program: Program, instruction: Instruction) -> set[str]:
  """Returns the operations of an instruction as a set, such as {"reduce"}.

  A fusion combines several instructions into one, and the set has the operations of all of them.
  """
  if instruction.opcode != "fusion":
    return {instruction.opcode}
  bodies = [program.computations.get(name, ()) for name in instruction.called("calls")]
  return set().union(*(_opcodes(program, each) for body in bodies for each in body))


def _operand_shape(program: Program, computation: str, instruction: Instruction, index: int) -> str:
  """Returns the shape of the input at position `index` of an instruction, such as "f32[2,3]".

  The text is empty if the shape is unknown.
  """
  operand = program.find(computation, instruction.operands[index])
  return operand.shape if operand else ""


def _convolution_flops(program: Program, computation: str, convolution: Instruction) -> float:
  """Returns the number of multiplications and additions of a convolution.

  Operations with the zeros that dilation inserts into the input are not counted.
  """
  kernel = dims(_operand_shape(program, computation, convolution, 1))
  labels = re.search(r"dim_labels=\w+_(\w+)->", convolution.attributes)
  outputs = kernel[labels[1].index("o")] if labels and kernel else 1
  dilated = re.search(r"lhs_dilate=([\dx]+)", convolution.attributes)
  zeros = math.prod(int(step) for step in dilated[1].split("x")) if dilated else 1
  return 2.0 * math.prod(dims(convolution.shape)) * math.prod(kernel) / outputs / zeros
