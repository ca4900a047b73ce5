"""What a compiled TPU program costs: cycles, collectives, traffic, what takes the time. See `hlo`."""

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
_MOVING = {
  "copy", "copy-start", "copy-done", "transpose", "reshape", "bitcast-convert", "slice", "pad",
  "concatenate", "dynamic-slice", "dynamic-update-slice", "slice-start", "slice-done", "broadcast",
  "convert",
}  # fmt: skip
_OWN = {
  "select-and-scatter", "reduce-window", "scatter", "gather", "sort", "custom-call",
  "rng-bit-generator", "fft", "cholesky", "triangular-solve", *COLLECTIVES,
}  # fmt: skip

_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_SMALL = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Cost:
  """An instruction that takes time: `cycles` of one run, `times` that it runs in a step."""

  name: str
  kind: str
  opcode: str
  shape: str
  source: str
  cycles: int
  times: int

  @property
  def total(self) -> int:
    """Cycles of all its runs."""
    return self.cycles * self.times


def cycles(program: Program, *, loops: bool = True) -> int:
  """Cycles of one step on one core, as scheduled: one instruction after the other.

  Collectives and a few other instructions carry no estimate: see `unestimated`.

  Args:
    program: whole.
    loops: False counts every loop's body once.
  """
  return sum(one.cycles * times for _, one, times in executed(program, loops=loops))


def loop_share(program: Program, weight: Callable[[Program, str, Instruction], float]) -> float:
  """What a count that takes every loop's body once is to be multiplied with, at least 1.

  XLA's own cost analysis is such a count, wherever it does not know how often a loop turns.

  Args:
    program: whole.
    weight: of an instruction of a computation: `flops`, `traffic` or the like.
  """
  whole = once = 0.0
  for computation, one, times in executed(program):
    whole += weight(program, computation, one) * times
  for computation, one, times in executed(program, loops=False):
    once += weight(program, computation, one) * times
  return max(1.0, whole / once) if once else 1.0


def collectives(program: Program) -> dict[str, dict[str, int]]:
  """Collectives of a step by kind: `count`, and `bytes` of their results on one core.

  A start and its done are one. Of an all-reduce the result is what each core puts in, of an
  all-gather what it has afterwards, of a reduce-scatter the part that it keeps.
  """
  found: dict[str, dict[str, int]] = {}
  for _, one, times in executed(program):
    for kind, moved in _collectives_in(program, one):
      entry = found.setdefault(kind, {"count": 0, "bytes": 0})
      entry["count"] += times
      entry["bytes"] += times * moved
  return {kind: found[kind] for kind in COLLECTIVES if kind in found}


def costs(program: Program) -> list[Cost]:
  """Everything with an estimate, the costliest first."""
  found = []
  for _, one, times in executed(program):
    if one.cycles:
      named = _OP_NAME.search(one.attributes)
      source = named[1] if named else ""
      shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", one.shape)
      kind = _kind(program, one)
      found.append(Cost(one.name, kind, one.opcode, shape, source, one.cycles, times))
  return sorted(found, key=lambda cost: (-cost.total, cost.name))


def by_kind(found: list[Cost]) -> dict[str, int]:
  """Cycles by kind of work, the most first."""
  total: Counter[str] = Counter()
  for cost in found:
    total[cost.kind] += cost.total
  return dict(total.most_common())


def unestimated(program: Program) -> dict[str, int]:
  """How many instructions have a result of at least 64 KiB and no estimate, by their opcode."""
  found: Counter[str] = Counter()
  for _, one, times in executed(program):
    idle = one.opcode in _FREE | _CONTROL or one.opcode.endswith(("-start", "-done"))
    moves_nothing = one.opcode == "custom-call" and "Concat" in one.attributes
    allocates = one.opcode == "custom-call" and "AllocateBuffer" in one.attributes
    collective = _collectives_in(program, one)
    if idle or moves_nothing or allocates or collective or one.cycles:
      continue
    if size(one.shape) >= _SMALL:
      found[one.opcode] += times
  return dict(found.most_common())


def flops(program: Program, computation: str, instruction: Instruction) -> float:
  """Multiplications and additions of convolutions and products, padding included."""
  if instruction.opcode == "convolution":
    return _convolution_flops(program, computation, instruction)
  if instruction.opcode == "dot":
    left = dims(_operand_shape(program, computation, instruction, 0))
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    inner = math.prod(left[axis] for axis in axes)
    return 2.0 * math.prod(dims(instruction.shape)) * inner
  inside = [
    flops(program, name, one)
    for name in instruction.called("calls")
    for one in program.computations.get(name, ())
  ]
  return sum(inside, 0.0)


def traffic(program: Program, computation: str, instruction: Instruction) -> float:
  """Bytes that an instruction reads and writes, if nothing stays on the chip."""
  if instruction.opcode in _FREE | _CONTROL:
    return 0.0
  read = sum(
    size(_operand_shape(program, computation, instruction, index))
    for index in range(len(instruction.operands))
  )
  return float(read + size(instruction.shape))


def time(program: Program, computation: str, instruction: Instruction) -> float:
  """Estimated cycles, as a weight."""
  return float(instruction.cycles)


def _collectives_in(program: Program, instruction: Instruction) -> list[tuple[str, int]]:
  """Kind and bytes of every collective that an instruction is or fuses."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    shape = instruction.shape
    if instruction.opcode != kind and kind != "all-reduce" and shape.startswith("("):
      shape = parts(shape)[1]  # a start has its operands before its results
    return [(kind, size(shape))]
  if instruction.opcode != "fusion":
    return []
  inside = [program.computations.get(name, ()) for name in instruction.called("calls")]
  return [found for body in inside for one in body for found in _collectives_in(program, one)]


def _kind(program: Program, instruction: Instruction) -> str:
  """The row of the table of kinds that an instruction belongs to."""
  opcodes = _opcodes(program, instruction)
  if opcodes & {"convolution", "dot"}:
    return CONVOLUTIONS
  for own in sorted(opcodes & _OWN):
    return own
  if "reduce" in opcodes:
    return REDUCTIONS
  return MOVES if opcodes <= _MOVING | _FREE else ELEMENTWISE


def _opcodes(program: Program, instruction: Instruction) -> set[str]:
  """Its opcode; of a fusion, those of all that it fuses."""
  if instruction.opcode != "fusion":
    return {instruction.opcode}
  inside = [program.computations.get(name, ()) for name in instruction.called("calls")]
  return set().union(*(_opcodes(program, one) for body in inside for one in body))


def _operand_shape(program: Program, computation: str, instruction: Instruction, index: int) -> str:
  found = program.find(computation, instruction.operands[index])
  return found.shape if found else ""


def _convolution_flops(program: Program, computation: str, one: Instruction) -> float:
  kernel = dims(_operand_shape(program, computation, one, 1))
  labels = re.search(r"dim_labels=\w+_(\w+)->", one.attributes)
  outputs = kernel[labels[1].index("o")] if labels and kernel else 1
  dilated = re.search(r"lhs_dilate=([\dx]+)", one.attributes)
  zeros = math.prod(int(step) for step in dilated[1].split("x")) if dilated else 1
  return 2.0 * math.prod(dims(one.shape)) * math.prod(kernel) / outputs / zeros
