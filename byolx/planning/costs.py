"""Costs of a compiled TPU program: cycles, collectives, memory traffic and kinds of work."""

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
  """Estimated cost of an instruction.

  Args:
    name: name in the program.
    kind: kind of work, a key of `by_kind`.
    opcode: operation, such as `fusion`.
    shape: shape of the result as text, without layout.
    source: `op_name` of the metadata, which names the jax code; empty: none.
    cycles: estimated cycles of one execution.
    times: executions in a step.
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
    """Cycles of all executions in a step."""
    return self.cycles * self.times


def cycles(program: Program, *, loops: bool = True) -> int:
  """Scheduled cycles of one step on one core: one instruction after the other.

  Collectives and a few other instructions have no estimate, see `unestimated`.

  Args:
    program: parsed program.
    loops: whether a loop counts as often as it runs; False counts the body of every loop once.
  """
  return sum(each.cycles * times for _, each, times in executed(program, loops=loops))


def loop_factor(program: Program, weight: Callable[[Program, str, Instruction], float]) -> float:
  """Ratio, at least 1, of a count with all executions of loops to a count with each loop once.

  XLA's own cost analysis counts a loop once if its trip count is unknown.

  Args:
    program: parsed program.
    weight: count of one instruction, as a function of program, name of the computation and
      instruction, such as `flops` or `traffic`.
  """
  total = once = 0.0
  for computation, instruction, times in executed(program):
    total += weight(program, computation, instruction) * times
  for computation, instruction, times in executed(program, loops=False):
    once += weight(program, computation, instruction) * times
  return max(1.0, total / once) if once else 1.0


def collectives(program: Program) -> dict[str, dict[str, int]]:
  """Collectives of a step by kind, each with `count` and the `bytes` of its results on one core.

  A start and its done count as one collective. The result of an all-reduce is as large as the
  input of a core, that of an all-gather is the gathered array, that of a reduce-scatter is the part
  of one core.
  """
  collectives: dict[str, dict[str, int]] = {}
  for _, instruction, times in executed(program):
    for kind, result_bytes in _collectives_in(program, instruction):
      entry = collectives.setdefault(kind, {"count": 0, "bytes": 0})
      entry["count"] += times
      entry["bytes"] += times * result_bytes
  return {kind: collectives[kind] for kind in COLLECTIVES if kind in collectives}


def costs(program: Program) -> list[Cost]:
  """Costs of all executed instructions with an estimate, the costliest first."""
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
  """Cycles of a step by kind of work, the largest first."""
  total: Counter[str] = Counter()
  for cost in costs:
    total[cost.kind] += cost.total
  return dict(total.most_common())


def unestimated(program: Program) -> dict[str, int]:
  """Executions of instructions that have no estimate and a result of at least 64 KiB, by opcode.

  Collectives, control flow and instructions that move no data are left out.
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
  """Multiplications and additions of the convolutions and products in an instruction, at least 0.

  Multiplications with padding are counted.
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
  """Bytes that an instruction reads and writes if all its arrays are in main memory."""
  if instruction.opcode in _FREE | _CONTROL:
    return 0.0
  read = sum(
    size(_operand_shape(program, computation, instruction, index))
    for index in range(len(instruction.operands))
  )
  return float(read + size(instruction.shape))


def time(program: Program, computation: str, instruction: Instruction) -> float:
  """Estimated cycles of an instruction, as a weight for `loop_factor`; 0 without an estimate."""
  return float(instruction.cycles)


def _collectives_in(program: Program, instruction: Instruction) -> list[tuple[str, int]]:
  """Kind and result bytes of every collective in an instruction, which may be a fusion."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    shape = instruction.shape
    if instruction.opcode != kind and kind != "all-reduce" and shape.startswith("("):
      shape = parts(shape)[1]  # a start has its operands before its results
    return [(kind, size(shape))]
  if instruction.opcode != "fusion":
    return []
  bodies = [program.computations.get(name, ()) for name in instruction.called("calls")]
  return [pair for body in bodies for each in body for pair in _collectives_in(program, each)]


def _kind(program: Program, instruction: Instruction) -> str:
  """Kind of work of an instruction."""
  opcodes = _opcodes(program, instruction)
  if opcodes & {"convolution", "dot"}:
    return CONVOLUTIONS
  for opcode in sorted(opcodes & _NAMED_BY_OPCODE):
    return opcode
  if "reduce" in opcodes:
    return REDUCTIONS
  return MOVES if opcodes <= _DATA_MOVES | _FREE else ELEMENTWISE


def _opcodes(program: Program, instruction: Instruction) -> set[str]:
  """Opcode of an instruction; for a fusion, the opcodes of all fused instructions."""
  if instruction.opcode != "fusion":
    return {instruction.opcode}
  bodies = [program.computations.get(name, ()) for name in instruction.called("calls")]
  return set().union(*(_opcodes(program, each) for body in bodies for each in body))


def _operand_shape(program: Program, computation: str, instruction: Instruction, index: int) -> str:
  operand = program.find(computation, instruction.operands[index])
  return operand.shape if operand else ""


def _convolution_flops(program: Program, computation: str, convolution: Instruction) -> float:
  kernel = dims(_operand_shape(program, computation, convolution, 1))
  labels = re.search(r"dim_labels=\w+_(\w+)->", convolution.attributes)
  outputs = kernel[labels[1].index("o")] if labels and kernel else 1
  dilated = re.search(r"lhs_dilate=([\dx]+)", convolution.attributes)
  zeros = math.prod(int(step) for step in dilated[1].split("x")) if dilated else 1
  return 2.0 * math.prod(dims(convolution.shape)) * math.prod(kernel) / outputs / zeros
