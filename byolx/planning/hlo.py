"""Parses the text of a compiled TPU program into computations, which are lists of instructions.

The compiler schedules the program of a core as one list of instructions. It annotates most of them
with estimated clock cycles. A loop is one instruction that names two other computations, the body
and the condition. A fusion is one instruction that combines several, and its cycles are those of all
of them. The module `costs` computes totals from the parsed program. This module does not import jax.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
  """One instruction of a compiled program, parsed from one line of the program's text.

  A computation is a list of instructions, such as the body of a loop.

  Args:
    name: name of the instruction, unique in the computation.
    shape: shape of the result as text, such as `f32[2,3]{1,0}`.
    opcode: operation, such as `convolution`.
    operands: names of the instructions whose results are the inputs.
    attributes: text of the line after the operands. A constant has `value=` and its value here.
    is_root: whether the result of the instruction is the result of the computation.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def cycles(self) -> int:
    """Clock cycles that the compiler estimates for one execution; 0 if there is no estimate."""
    match = _CYCLES.search(self.attributes)
    return int(match[1]) if match else 0

  def called(self, *roles: str) -> list[str]:
    """Returns the names of the computations that the instruction calls.

    Args:
      roles: attributes that name such computations, such as `body` and `condition` of a loop.
    """
    return [name for role, name in _CALLED.findall(self.attributes) if role in roles]

  def branches(self) -> list[str]:
    """Returns the names of the computations that are the branches of a conditional.

    Only one branch runs. For any other instruction the list is empty.
    """
    match = _BRANCHES.search(self.attributes)
    branches = [name.strip().lstrip("%") for name in match[1].split(",")] if match else []
    return branches or self.called("true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Program:
  """A parsed program: computations, which are lists of instructions.

  Args:
    computations: instructions of each computation, by the computation's name.
    entry: name of the computation with which the program starts.
  """

  computations: dict[str, tuple[Instruction, ...]]
  entry: str

  @functools.cached_property
  def _by_name(self) -> dict[str, dict[str, Instruction]]:
    return {name: {each.name: each for each in body} for name, body in self.computations.items()}

  def find(self, computation: str, name: str) -> Instruction | None:
    """Returns the instruction with a name; None if the computation has no such instruction.

    Args:
      computation: name of the computation.
      name: name of the instruction.
    """
    return self._by_name[computation].get(name)


def parse(text: str) -> Program:
  """Parses the text of a compiled program, as jax's `Compiled.as_text()` returns it.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if line.startswith("  ") and current is not None:
      if match := _INSTRUCTION.match(line):
        current.append(_instruction(match, line[match.end() :]))
    elif match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif line.startswith("}"):
      current = None
  if not entry:
    raise ValueError("expected the text of a compiled program, which has a line ENTRY")
  return Program({name: tuple(body) for name, body in computations.items()}, entry)


def executed(
  program: Program, computation: str = "", times: int = 1, loops: bool = True
) -> Iterator[tuple[str, Instruction, int]]:
  """Yields all executed instructions, with the number of executions of each.

  Each value is a tuple of the computation's name, the instruction and the number. A computation is
  a list of instructions, such as the body of a loop. A fusion, which combines several instructions
  into one, is yielded as one. For a conditional, the function assumes that the branch with the most
  clock cycles runs.

  Args:
    program: parsed program.
    computation: name of the computation to start with. "" is the computation with which the
      program starts.
    times: number of executions of that computation.
    loops: whether all iterations of a loop count; False counts one iteration of every loop.
  """
  computation = computation or program.entry
  for instruction in program.computations.get(computation, ()):
    yield computation, instruction, times
    if instruction.opcode == "while":
      count = _trip_count(program, computation, instruction) if loops else 1
      trips = 1 if count is None else count
      for name in instruction.called("body"):
        yield from executed(program, name, times * trips, loops)
      for name in instruction.called("condition"):
        yield from executed(program, name, times * (trips + 1), loops)
    elif instruction.opcode == "conditional":
      runs = [list(executed(program, name, times, loops)) for name in instruction.branches()]
      yield from max(runs, key=lambda run: sum(o.cycles * n for _, o, n in run), default=[])
    elif instruction.opcode in ("call", "async-start"):
      for name in instruction.called("to_apply", "calls"):
        yield from executed(program, name, times, loops)


def unknown_loops(program: Program) -> int:
  """Counts the loops with an unknown number of iterations. `executed` assumes one iteration there."""
  return sum(
    instruction.opcode == "while" and _trip_count(program, computation, instruction) is None
    for computation, instruction, _ in executed(program, loops=False)
  )


def size(shape: str) -> int:
  """Returns the bytes of an array without padding. For a tuple, it is the sum over all its arrays.

  Args:
    shape: shape as text, such as `f32[2,3]` or `(f32[2,3], s32[])`.
  """
  bits = 0
  for kind, dims in _ARRAY.findall(shape):
    digits = re.search(r"\d+", kind)
    width = _BITS.get(kind, int(digits[0]) if digits else 0)
    bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
  return bits // 8


def dims(shape: str) -> list[int]:
  """Returns the dimensions of the first array in a shape, such as [2, 3] for `f32[2,3]{1,0}`."""
  match = _ARRAY.search(shape)
  return [int(dim) for dim in match[2].split(",") if dim] if match else []


def parts(shape: str) -> list[str]:
  """Splits a tuple's shape into the shapes of its elements.

  For example, `(f32[2,3],s32[])` becomes ["f32[2,3]", "s32[]"].
  """
  parts, depth, begin = [], 0, 1
  for index, letter in enumerate(shape):
    depth += letter in "({["
    depth -= letter in ")}]"
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      parts.append(shape[begin:index])
      begin = index + 1
  return parts


def _instruction(head: re.Match, rest: str) -> Instruction:
  """Parses one line of a computation, which has the form `NAME = SHAPE OPCODE(OPERANDS), ...`.

  Args:
    head: match of `_INSTRUCTION`, the line up to `=`.
    rest: text of the line after `=`.
  """
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  stop = _closing(rest, start)
  inside = re.sub(r"/\*.*?\*/", "", rest[start + 1 : stop])
  operands = tuple(re.findall(r"%([\w.\-]+)", inside))
  opcode = rest[:start]
  attributes = rest[stop + 1 :] if opcode != "constant" else f"value={inside}"
  return Instruction(head[2], shape, opcode, operands, attributes, bool(head[1]))


def _closing(text: str, start: int) -> int:
  """Returns the index of the closing parenthesis. The opening one is at index `start` of the text."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  return len(text) - 1


def _trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
  """Returns a loop's number of iterations; None if it is unknown.

  The number is read from the compiler's annotation. Without an annotation, it is computed from the
  start, the end and the step of the loop's counter. Then start and end must be constants.

  Args:
    program: parsed program.
    computation: name of the computation that contains the loop.
    loop: instruction of the loop, a `while`.
  """
  if match := _TRIPS.search(loop.attributes):
    return int(match[1])
  for name in loop.called("condition"):
    root = next((each for each in program.computations[name] if each.is_root), None)
    if root is None or root.opcode != "compare" or len(root.operands) != 2:
      continue
    counter = program.find(name, root.operands[0])
    end = _constant(program, name, root.operands[1])
    if counter is None or counter.opcode != "get-tuple-element" or end is None:
      continue
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])
    start = _start(program, computation, loop, index)
    if "direction=LT" in root.attributes and start is not None:
      return max(0, -(-(end - start) // _stride(program, loop, index)))
  return None


def _stride(program: Program, loop: Instruction, index: int) -> int:
  """Returns the step of a loop's counter: the constant that the body adds to it in each iteration.

  If no positive constant is found, the result is 1.

  Args:
    program: parsed program.
    loop: instruction of the loop, a `while`.
    index: position of the counter in the tuple of the loop's variables.
  """
  for name in loop.called("body"):
    root = next((each for each in program.computations[name] if each.is_root), None)
    if root is None or root.opcode != "tuple":
      continue
    update = program.find(name, root.operands[index])
    if update is not None and update.opcode == "add":
      constants = [_constant(program, name, operand) for operand in update.operands]
      return next((value for value in constants if value is not None and value > 0), 1)
  return 1


def _start(program: Program, computation: str, loop: Instruction, index: int) -> int | None:
  """Returns the first value of a loop's counter; None if it is not a constant.

  Args:
    program: parsed program.
    computation: name of the computation that contains the loop.
    loop: instruction of the loop, a `while`.
    index: position of the counter in the tuple of the loop's variables.
  """
  first = program.find(computation, loop.operands[0]) if loop.operands else None
  if first is None or first.opcode != "tuple":
    return None
  return _constant(program, computation, first.operands[index])


def _constant(program: Program, computation: str, name: str) -> int | None:
  """Returns the value of an instruction that is a whole-number constant; otherwise None.

  A copy or a cast of a constant also counts as a constant.

  Args:
    program: parsed program.
    computation: name of the computation that contains the instruction.
    name: name of the instruction.
  """
  instruction = program.find(computation, name)
  while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
    instruction = program.find(computation, instruction.operands[0])
  if instruction is None or instruction.opcode != "constant":
    return None
  match = re.fullmatch(r"value=(-?\d+)", instruction.attributes)
  return int(match[1]) if match else None
