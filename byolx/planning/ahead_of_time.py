"""Compiles programs for TPUs and reads the compiler's estimates of their memory and speed.

No TPU is needed. Compiling takes minutes, so the estimates are cached on disk under a hash of the
program.
"""

import dataclasses
import hashlib
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from byolx.core import files
from byolx.core.config import ConfigError
from byolx.planning import costs as planning_costs
from byolx.planning import hlo, tpu
from byolx.training import compile_cache

FORMAT = 1
COSTS_KEPT = 100
"""Maximal number of instructions whose costs `Figures.costs` contains."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Figures:
  """The TPU compiler's estimates for one train step on one core.

  The compiler may refuse a step as too large. Then only `fits`, `peak_bytes`, `compile_seconds`
  and the versions are set.

  Args:
    fits: whether the step fits the memory of a core.
    peak_bytes: peak memory that the step needs on a core, in bytes. It includes arguments,
      temporaries and outputs.
    argument_bytes, output_bytes, temp_bytes: bytes of the step's arguments, outputs and
      temporaries. Their sum can exceed `peak_bytes`, because most outputs overwrite arguments.
    flops: floating-point operations of a step, with all iterations of its loops.
    bytes_accessed: bytes that a step reads and writes, with all iterations of its loops.
    cycles: estimated clock cycles of a step. Communication between cores counts as 0 cycles.
    roofline_seconds: optimistic time of a step in seconds. It assumes that every instruction runs
      at the peak arithmetic rate or at the peak memory rate.
    collectives: number of communications between cores and bytes of their results, by kind of
      communication, such as `{"all-reduce": {"count": 2, "bytes": 4096}}`.
    kinds: cycles by kind of work, such as "reductions".
    costs: costs of the costliest instructions, the costliest first.
    unestimated: number of executions of instructions without estimated cycles, by operation.
    unknown_loops: number of loops with an unknown number of iterations. All figures count one
      iteration of such a loop.
    compile_seconds: duration of the compilation in seconds. If the figures come from the cache, it
      is the duration of the earlier compilation.
    jax, libtpu: versions of the two packages.
  """

  fits: bool
  peak_bytes: int
  argument_bytes: int | None = None
  output_bytes: int | None = None
  temp_bytes: int | None = None
  flops: float | None = None
  bytes_accessed: float | None = None
  cycles: int | None = None
  roofline_seconds: float | None = None
  collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  kinds: dict[str, int] = dataclasses.field(default_factory=dict)
  costs: tuple[planning_costs.Cost, ...] = ()
  unestimated: dict[str, int] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0
  compile_seconds: float = 0.0
  jax: str = ""
  libtpu: str = ""


def figures(lowered: jax.stages.Lowered, topology: tpu.Topology, cache: Path | None) -> Figures:
  """Returns the compiler's estimates for a program on a TPU slice.

  If the estimates are in the cache, they are read from there. Otherwise the program is compiled, and
  its estimates are added to the cache.

  Args:
    lowered: program, lowered for the devices of `topology`.
    topology: TPU slice, such as v3:16x16.
    cache: folder of the cached estimates; None disables the cache.

  Raises:
    ConfigError: the compiler refuses the program, but not because of its size. Or libtpu, the TPU
      compiler, is not installed.
  """
  text = lowered.as_text()
  key = _key(text, topology.name)
  path = cache / f"{key}.json" if cache else None
  if path and (cached := _read(path, key)):
    return cached
  began = time.monotonic()
  try:
    compiled = compile_with_progress(lowered, topology.name, len(text))
    result = _measure(compiled, topology)
  except jax.errors.JaxRuntimeError as error:
    result = Figures(fits=False, peak_bytes=_bytes_needed(str(error), topology))
  seconds = round(time.monotonic() - began, 2)
  result = dataclasses.replace(
    result, compile_seconds=seconds, jax=jax.__version__, libtpu=tpu.version()
  )
  if path:
    _write(path, key, result)
  return result


def compile_with_progress(lowered: jax.stages.Lowered, name: str, size: int) -> jax.stages.Compiled:
  """Compiles a program and returns it. Prints to stderr how long the compilation usually takes.

  If stderr is a terminal, the elapsed time is also printed. Ctrl-C interrupts at once, because the
  compiler runs in a daemon thread. Errors of the compiler are raised unchanged.

  Args:
    lowered: lowered program to compile.
    name: name of the TPU slice for the message, such as v3:16x16.
    size: length of the program's text in characters. The time is estimated from it.
  """
  minutes = round(size / 1e6 * compile_cache.SECONDS_PER_MEGABYTE["tpu"] / 60)
  usual = f"usually about {minutes + 1} minutes" if minutes else "usually less than a minute"
  message = f"compiling for {name}, {usual}"
  result: dict[str, Any] = {}

  def work() -> None:
    try:
      with compile_cache.set_aside():
        result["compiled"] = lowered.compile()
    except BaseException as error:
      result["error"] = error

  thread = threading.Thread(target=work, daemon=True)
  began = time.monotonic()
  thread.start()
  terminal = sys.stderr.isatty()
  if not terminal:
    print(message, file=sys.stderr, flush=True)
  while thread.is_alive():
    thread.join(1.0)
    if terminal:
      spent = round(time.monotonic() - began)
      line = f"{message}; {spent // 60}:{spent % 60:02d} so far"
      print(f"\r{line}", end="", file=sys.stderr, flush=True)
  if terminal:
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
  if "error" in result:
    raise result["error"]
  return result["compiled"]


def _measure(compiled: jax.stages.Compiled, topology: tpu.Topology) -> Figures:
  """Reads the compiler's estimates from a compiled program's text and from jax's analyses of it."""
  program = hlo.parse(compiled.as_text())
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  # XLA's cost analysis counts the body of a loop once.
  flops = cost.get("flops", 0.0) * planning_costs.loop_factor(program, planning_costs.flops)
  accessed = cost.get("bytes accessed", 0.0) * planning_costs.loop_factor(
    program, planning_costs.traffic
  )
  # On newer TPUs the analysis rates some instructions at -1 second. The time is then too short, and
  # the work divided by the peak rates is a better bound.
  generation = topology.generation
  optimal = cost.get("optimal_seconds", 0.0) * planning_costs.loop_factor(
    program, planning_costs.time
  )
  roofline = max(optimal, flops / generation.flops, accessed / generation.bandwidth)
  costs = planning_costs.costs(program)
  return Figures(
    fits=memory.peak_memory_in_bytes <= topology.generation.memory_bytes,
    peak_bytes=memory.peak_memory_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    flops=flops,
    bytes_accessed=accessed,
    cycles=planning_costs.cycles(program),
    roofline_seconds=roofline,
    collectives=planning_costs.collectives(program),
    kinds=planning_costs.by_kind(costs),
    costs=tuple(costs[:COSTS_KEPT]),
    unestimated=planning_costs.unestimated(program),
    unknown_loops=hlo.unknown_loops(program),
  )


def _bytes_needed(message: str, topology: tpu.Topology) -> int:
  """Returns the bytes of memory that a too large program needs.

  The number is parsed from the compiler's error message.

  Raises:
    ConfigError: the error is not about the program's size.
  """
  if "RESOURCE_EXHAUSTED" in message:
    size = r"([\d.]+)([KMGT]?)i?B?"
    for form in (rf"total memory required[^(]*\({size}\)", rf"Used {size} of [\d.]+\w* hbm"):
      if match := re.search(form, message):
        return round(float(match[1]) * _UNITS[match[2]])
  reason = message.strip().partition("\n")[0]
  raise ConfigError(f"--topology={topology.name}: the compiler refuses this step: {reason}")


def _key(text: str, name: str) -> str:
  """Returns the cache key of a program.

  The key is a hash of the program's text, the slice's name and the versions of jax and libtpu.

  Args:
    text: text of the lowered program.
    name: name of the TPU slice, such as v3:16x16.
  """
  versions = json.dumps([FORMAT, name, jax.__version__, tpu.version()])
  return hashlib.sha256(f"{versions}\n{text}".encode()).hexdigest()[:32]


def _write(path: Path, key: str, result: Figures) -> None:
  body = json.dumps(dataclasses.asdict(result))
  entry = {"format": FORMAT, "program": key, "digest": _checksum(body), "figures": body}
  files.write_atomically(path, json.dumps(entry) + "\n")


def _read(path: Path, key: str) -> Figures | None:
  """Reads the compiler's cached estimates from a file.

  Returns None if the file is missing or damaged, or if it has another format or another key.
  """
  try:
    entry = json.loads(path.read_text())
    body = entry["figures"]
    if (entry["format"], entry["program"], entry["digest"]) != (FORMAT, key, _checksum(body)):
      return None
    fields = json.loads(body)
    fields["costs"] = tuple(planning_costs.Cost(**cost) for cost in fields["costs"])
    return Figures(**fields)
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _checksum(body: str) -> str:
  return hashlib.sha256(body.encode()).hexdigest()[:16]
