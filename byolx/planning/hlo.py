"""Parse the text of a compiled TPU program: computations, instructions and their executions.

The compiler schedules the program of a core as one list of instructions and annotates most of them
with estimated cycles. A loop is one instruction that refers to the computations of its body and its
condition. A fusion carries the cycles of all instructions that it fuses. The module `costs` derives
totals from the parsed program. This module does not import jax.
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
  """One line of a computation.

  Args:
    name: name, unique in its computation.
    shape: shape of the result as text, such as `f32[2,3]{1,0}`.
    opcode: operation, such as `fusion`.
    operands: names of the operands.
    attributes: text after the operands; for a constant `value=` and its value.
    is_root: whether its result is the result of the computation.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def cycles(self) -> int:
    """Cycles that the compiler estimates; 0 without an estimate."""
    match = _CYCLES.search(self.attributes)
    return int(match[1]) if match else 0

  def called(self, *roles: str) -> list[str]:
    """Names of the computations that the instruction calls in these roles, such as `body`."""
    return [name for role, name in _CALLED.findall(self.attributes) if role in roles]

  def branches(self) -> list[str]:
    """Names of the computations between which a conditional chooses."""
    match = _BRANCHES.search(self.attributes)
    branches = [name.strip().lstrip("%") for name in match[1].split(",")] if match else []
    return branches or self.called("true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Program:
  """A parsed program.

  Args:
    computations: instructions by the name of their computation.
    entry: name of the computation in which the program starts.
  """

  computations: dict[str, tuple[Instruction, ...]]
  entry: str

  @functools.cached_property
  def _by_name(self) -> dict[str, dict[str, Instruction]]:
    return {name: {each.name: each for each in body} for name, body in self.computations.items()}

  def find(self, computation: str, name: str) -> Instruction | None:
    """Instruction of a computation by its name; None if there is none of that name."""
    return self._by_name[computation].get(name)


def parse(text: str) -> Program:
  """Parse the text of a compiled program, `compiled.as_text()`.

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
  """Yield every executed instruction: name of its computation, instruction, number of executions.

  Instructions inside fusions are not yielded. Of a conditional, only the branch with the most
  cycles counts.

  Args:
    program: parsed program.
    computation: name of the computation to start in; empty: the entry.
    times: number of executions of that computation.
    loops: whether a loop counts as often as it runs; False counts every loop once.
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
  """Number of loops with an unknown trip count, which `executed` counts once."""
  return sum(
    instruction.opcode == "while" and _trip_count(program, computation, instruction) is None
    for computation, instruction, _ in executed(program, loops=False)
  )


def size(shape: str) -> int:
  """Bytes of an array or a tuple of arrays, without padding, from the text of its shape."""
  bits = 0
  for kind, dims in _ARRAY.findall(shape):
    digits = re.search(r"\d+", kind)
    width = _BITS.get(kind, int(digits[0]) if digits else 0)
    bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
  return bits // 8


def dims(shape: str) -> list[int]:
  """Dimensions of the first array in the text of a shape."""
  match = _ARRAY.search(shape)
  return [int(dim) for dim in match[2].split(",") if dim] if match else []


def parts(shape: str) -> list[str]:
  """Texts of the shapes in a tuple."""
  parts, depth, begin = [], 0, 1
  for index, letter in enumerate(shape):
    depth += letter in "({["
    depth -= letter in ")}]"
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      parts.append(shape[begin:index])
      begin = index + 1
  return parts


def _instruction(head: re.Match, rest: str) -> Instruction:
  """Parse an instruction from the match of `name = ` and the rest of the line."""
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
  """Index at which the parenthesis that opens at `start` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  return len(text) - 1


def _trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
  """Trip count of a loop, from its annotation or the constants of its counter; None: unknown."""
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
  """Increment of a loop's counter; 1 if it is not a constant."""
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
  """Constant from which a loop's counter starts; None if it is not a constant."""
  first = program.find(computation, loop.operands[0]) if loop.operands else None
  if first is None or first.opcode != "tuple":
    return None
  return _constant(program, computation, first.operands[index])


def _constant(program: Program, computation: str, name: str) -> int | None:
  """Whole number of a constant, also behind copies and casts; None if it is not a constant."""
  instruction = program.find(computation, name)
  while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
    instruction = program.find(computation, instruction.operands[0])
  if instruction is None or instruction.opcode != "constant":
    return None
  match = re.fullmatch(r"value=(-?\d+)", instruction.attributes)
  return int(match[1]) if match else None
