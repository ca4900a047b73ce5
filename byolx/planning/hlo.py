"""The text of a compiled TPU program as data: computations, instructions, how often each runs.

The compiler schedules every core's program as one list of instructions and notes with most of them
how many cycles it expects. A loop is one instruction with the computations of its body and its
condition, which run as often as it turns; a fusion carries the cycles of all that it fuses.
What follows from it is in `hlo_costs`. No jax here.
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
  """One line of a computation; `attributes` is all that follows the operands."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def cycles(self) -> int:
    """As the compiler estimates; 0 where it does not."""
    found = _CYCLES.search(self.attributes)
    return int(found[1]) if found else 0

  def called(self, *roles: str) -> list[str]:
    """Names of the computations called in these roles, such as `body`."""
    return [name for role, name in _CALLED.findall(self.attributes) if role in roles]

  def branches(self) -> list[str]:
    """Names of the computations of which a conditional runs one."""
    found = _BRANCHES.search(self.attributes)
    listed = [name.strip().lstrip("%") for name in found[1].split(",")] if found else []
    return listed or self.called("true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Program:
  """A parsed program: instructions by computation, and where it starts."""

  computations: dict[str, tuple[Instruction, ...]]
  entry: str

  @functools.cached_property
  def _by_name(self) -> dict[str, dict[str, Instruction]]:
    return {name: {one.name: one for one in found} for name, found in self.computations.items()}

  def find(self, computation: str, name: str) -> Instruction | None:
    """The instruction of that name."""
    return self._by_name[computation].get(name)


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if line.startswith("  ") and current is not None:
      if found := _INSTRUCTION.match(line):
        current.append(_instruction(found, line[found.end() :]))
    elif found := _COMPUTATION.match(line):
      current = computations.setdefault(found[2], [])
      entry = found[2] if found[1] else entry
    elif line.startswith("}"):
      current = None
  if not entry:
    raise ValueError("expected the text of a compiled program, which has a line ENTRY")
  return Program({name: tuple(found) for name, found in computations.items()}, entry)


def executed(
  program: Program, computation: str = "", times: int = 1, loops: bool = True
) -> Iterator[tuple[str, Instruction, int]]:
  """Every instruction that runs: its computation, itself, how often; not what is inside fusions.

  Of a conditional's branches it is the one with the most cycles.

  Args:
    program: whole.
    computation: to start in; default: the entry.
    times: that it runs.
    loops: False lets every loop turn once.
  """
  computation = computation or program.entry
  for one in program.computations.get(computation, ()):
    yield computation, one, times
    if one.opcode == "while":
      known = _trips(program, computation, one) if loops else 1
      turns = 1 if known is None else known
      for name in one.called("body"):
        yield from executed(program, name, times * turns, loops)
      for name in one.called("condition"):
        yield from executed(program, name, times * (turns + 1), loops)
    elif one.opcode == "conditional":
      runs = [list(executed(program, name, times, loops)) for name in one.branches()]
      yield from max(runs, key=lambda run: sum(o.cycles * n for _, o, n in run), default=[])
    elif one.opcode in ("call", "async-start"):
      for name in one.called("to_apply", "calls"):
        yield from executed(program, name, times, loops)


def unknown_loops(program: Program) -> int:
  """Loops of which it is not known how often they turn: they are counted as turning once."""
  return sum(
    one.opcode == "while" and _trips(program, computation, one) is None
    for computation, one, _ in executed(program, loops=False)
  )


def size(shape: str) -> int:
  """Bytes of an array or tuple as the text writes its shape, without padding."""
  bits = 0
  for kind, dims in _ARRAY.findall(shape):
    digits = re.search(r"\d+", kind)
    width = _BITS.get(kind, int(digits[0]) if digits else 0)
    bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
  return bits // 8


def dims(shape: str) -> list[int]:
  """The first array of a shape."""
  found = _ARRAY.search(shape)
  return [int(dim) for dim in found[2].split(",") if dim] if found else []


def parts(shape: str) -> list[str]:
  """The shapes of a tuple."""
  parts, depth, begin = [], 0, 1
  for index, letter in enumerate(shape):
    depth += letter in "({["
    depth -= letter in ")}]"
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      parts.append(shape[begin:index])
      begin = index + 1
  return parts


def _instruction(found: re.Match, rest: str) -> Instruction:
  """From what follows `name = `."""
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  stop = _closing(rest, start)
  inside = re.sub(r"/\*.*?\*/", "", rest[start + 1 : stop])
  operands = tuple(re.findall(r"%([\w.\-]+)", inside))
  opcode = rest[:start]
  kept = rest[stop + 1 :] if opcode != "constant" else f"value={inside}"
  return Instruction(found[2], shape, opcode, operands, kept, bool(found[1]))


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  return len(text) - 1


def _trips(program: Program, computation: str, loop: Instruction) -> int | None:
  """How often a loop turns: as noted, else from the constants that its counter runs between."""
  if found := _TRIPS.search(loop.attributes):
    return int(found[1])
  for name in loop.called("condition"):
    root = next((one for one in program.computations[name] if one.is_root), None)
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
  """What a loop's counter grows by at each turn; 1 where the text does not show it."""
  for name in loop.called("body"):
    root = next((one for one in program.computations[name] if one.is_root), None)
    if root is None or root.opcode != "tuple":
      continue
    grown = program.find(name, root.operands[index])
    if grown is not None and grown.opcode == "add":
      found = [_constant(program, name, operand) for operand in grown.operands]
      return next((value for value in found if value is not None and value > 0), 1)
  return 1


def _start(program: Program, computation: str, loop: Instruction, index: int) -> int | None:
  """The constant that a loop's counter starts from."""
  first = program.find(computation, loop.operands[0]) if loop.operands else None
  if first is None or first.opcode != "tuple":
    return None
  return _constant(program, computation, first.operands[index])


def _constant(program: Program, computation: str, name: str) -> int | None:
  """The whole number that a name stands for, behind copies."""
  one = program.find(computation, name)
  while one is not None and one.opcode in ("copy", "bitcast", "convert"):
    one = program.find(computation, one.operands[0])
  if one is None or one.opcode != "constant":
    return None
  found = re.fullmatch(r"value=(-?\d+)", one.attributes)
  return int(found[1]) if found else None
