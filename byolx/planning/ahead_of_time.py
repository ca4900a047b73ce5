"""Programs compiled ahead of time, for TPUs that need not be there, and what the compiler says of them.

What it said is kept on disk under the hash of the program, since it takes minutes to say.
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
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Figures:
  """What the compiler says of one step on one core; where it does not fit, only the first two.

  Args:
    fits: into the core's memory.
    peak_bytes: of the core's memory at once: arguments, temporaries and outputs; where it does not
      fit, what it would need.
    argument_bytes, output_bytes, temp_bytes: parts of it; most outputs take the arguments' place.
    flops, bytes_accessed: of a step, loops counted as often as they turn.
    cycles: scheduled, see `costs.cycles`.
    roofline_seconds: optimistic: each instruction at the peak of its limit.
    collectives: see `costs.collectives`.
    kinds: cycles by kind of work.
    costs: the costliest instructions.
    unestimated: see `costs.unestimated`.
    unknown_loops: loops counted once because it is not known how often they turn.
    compile_seconds: what it took, whenever that was.
    jax, libtpu: versions.
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
  """Compiles a program for the devices that it was lowered for, or remembers what that said.

  Args:
    lowered: program.
    topology: that it was lowered for.
    cache: folder to remember in; None: none.

  Raises:
    ConfigError: the compiler refuses it for another reason than its size.
  """
  text = lowered.as_text()
  key = _key(text, topology.name)
  path = cache / f"{key}.json" if cache else None
  if path and (known := _read(path, key)):
    return known
  began = time.monotonic()
  try:
    compiled = compile_aloud(lowered, topology.name, len(text))
    found = _measure(compiled, topology)
  except jax.errors.JaxRuntimeError as error:
    found = Figures(fits=False, peak_bytes=_bytes_needed(str(error), topology))
  seconds = round(time.monotonic() - began, 2)
  found = dataclasses.replace(
    found, compile_seconds=seconds, jax=jax.__version__, libtpu=tpu.version()
  )
  if path:
    _write(path, key, found)
  return found


def compile_aloud(lowered: jax.stages.Lowered, name: str, size: int) -> jax.stages.Compiled:
  """Compiles, and says meanwhile on stderr how long it takes; Ctrl-C ends it at once.

  Args:
    lowered: program.
    name: of what it is compiled for.
    size: of its text, characters.
  """
  minutes = round(size / 1e6 * compile_cache.SECONDS_PER_MEGABYTE["tpu"] / 60)
  usual = f"usually about {minutes + 1} minutes" if minutes else "usually less than a minute"
  said = f"compiling for {name}, {usual}"
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
    print(said, file=sys.stderr, flush=True)
  while thread.is_alive():
    thread.join(1.0)
    if terminal:
      spent = round(time.monotonic() - began)
      line = f"{said}; {spent // 60}:{spent % 60:02d} so far"
      print(f"\r{line}", end="", file=sys.stderr, flush=True)
  if terminal:
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
  if "error" in result:
    raise result["error"]
  return result["compiled"]


def _measure(compiled: jax.stages.Compiled, topology: tpu.Topology) -> Figures:
  """Reads a program's text, and what jax says of its memory and cost."""
  program = hlo.parse(compiled.as_text())
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  # The cost analysis counts a loop's body once.
  flops = cost.get("flops", 0.0) * planning_costs.loop_share(program, planning_costs.flops)
  accessed = cost.get("bytes accessed", 0.0) * planning_costs.loop_share(
    program, planning_costs.traffic
  )
  # On newer TPUs some instructions are rated -1 second: no less than the work at its peak.
  generation = topology.generation
  optimal = cost.get("optimal_seconds", 0.0) * planning_costs.loop_share(
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
  """What a program that is too large would need, from the compiler's message.

  Raises:
    ConfigError: the message is about something else.
  """
  if "RESOURCE_EXHAUSTED" in message:
    size = r"([\d.]+)([KMGT]?)i?B?"
    for form in (rf"total memory required[^(]*\({size}\)", rf"Used {size} of [\d.]+\w* hbm"):
      if found := re.search(form, message):
        return round(float(found[1]) * _UNITS[found[2]])
  reason = message.strip().partition("\n")[0]
  raise ConfigError(f"--topology={topology.name}: the compiler refuses this step: {reason}")


def _key(text: str, name: str) -> str:
  """What tells programs apart: their text, where they run and who compiles."""
  versions = json.dumps([FORMAT, name, jax.__version__, tpu.version()])
  return hashlib.sha256(f"{versions}\n{text}".encode()).hexdigest()[:32]


def _write(path: Path, key: str, found: Figures) -> None:
  body = json.dumps(dataclasses.asdict(found))
  whole = {"format": FORMAT, "program": key, "digest": _digest(body), "figures": body}
  files.write_atomically(path, json.dumps(whole) + "\n")


def _read(path: Path, key: str) -> Figures | None:
  """What was kept, unless it is damaged, of an older format, or of another program."""
  try:
    whole = json.loads(path.read_text())
    body = whole["figures"]
    if (whole["format"], whole["program"], whole["digest"]) != (FORMAT, key, _digest(body)):
      return None
    fields = json.loads(body)
    fields["costs"] = tuple(planning_costs.Cost(**cost) for cost in fields["costs"])
    return Figures(**fields)
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _digest(body: str) -> str:
  return hashlib.sha256(body.encode()).hexdigest()[:16]
