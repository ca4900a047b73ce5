"""Text that `byolx plan` prints: a list of values for one plan, or a table for several plans."""

from collections.abc import Sequence

from byolx.core.text import duration
from byolx.planning.plan import Plan

LEFT_OUT = (
  "Both estimates come from the compiler, not from a chip. They leave out network, input and "
  "checkpoints: collectives take no time."
)
_GIB = 2**30


def page(plan: Plan, costs: int = 0) -> str:
  """Returns a plan as text: memory and speed of a train step, duration and price of the training.

  If the train step does not fit the memory but a changed config was found that fits, the text of
  the changed config follows.

  Args:
    plan: plan to describe.
    costs: number of the costliest instructions to show.
  """
  slice_, figures = plan.topology, plan.figures
  head = [
    " ".join([plan.config, *plan.flags]),
    f"{slice_.name}: {_number(slice_.cores, 'core')} on {_number(slice_.hosts, 'host')}; batch "
    f"{plan.batch_size:,}" + _in_passes(plan) + f"; jax {figures.jax}, libtpu {figures.libtpu}",
    "",
  ]
  rows = _rows(plan) if figures.cycles is not None else [("fits", _fits(plan))]
  lines = [*head, *(f"{name:<15} {text}" for name, text in rows)]
  if plan.tried:
    lines += [
      "",
      "changes that were tried, the cheapest first:",
      *(f"  {line}" for line in plan.tried),
    ]
  if costs and figures.costs:
    lines += ["", _costs(plan, costs)]
  if plan.better:
    lines += ["", "It fits with " + " ".join(plan.better.flags), "", page(plan.better, costs)]
  elif not figures.fits:
    outcome = "no change that was tried fits" if plan.tried else "no change was tried"
    return "\n".join([*lines, "", f"{outcome}; more cores or a smaller train.batch_size will help"])
  else:
    lines += ["", LEFT_OUT]
  return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
  """Returns several plans as a table of text with one row per plan.

  If the train step of a plan does not fit the memory but a changed config was found that fits, a
  row for the changed config follows.
  """
  shown = [row for plan in plans for row in (plan, plan.better) if row]
  head = ["config", "topology", "cores", "fits", "GiB a core", "scheduled ms", "roofline ms"]
  head += ["TFLOP", "GB", "MXU %", "memory %", "images/s", "per host", "steps", "hours"]
  efficiency = plans[0].terms.efficiency
  head += [f"at {efficiency:g}", "core-hours"]
  priced = plans[0].terms.price is not None
  rows = [head + ["USD"] * priced, *(_cells(plan, priced) for plan in shown)]
  if len({plan.config for plan in shown}) == 1 and not any(plan.changes for plan in shown):
    rows = [row[1:] for row in rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  numbers = [
    all(row[i][:1].isdigit() or row[i] == "-" for row in rows[1:]) for i in range(len(widths))
  ]
  lines = [
    "  ".join(
      cell.rjust(width) if right else cell.ljust(width)
      for cell, width, right in zip(row, widths, numbers, strict=True)
    ).rstrip()
    for row in rows
  ]
  return "\n".join(
    [
      *lines,
      "",
      f"hours: the whole schedule at the scheduled speed, and at {efficiency:g} of it; core-hours: "
      f"at {efficiency:g} of it.",
      LEFT_OUT,
    ]
  )


def _rows(plan: Plan) -> list[tuple[str, str]]:
  """Returns the lines that describe a compiled train step, each as a tuple of a name and a text."""
  figures, slice_, terms = plan.figures, plan.topology, plan.terms
  generation = slice_.generation
  seconds = plan.scheduled_seconds
  roofline = 1e3 * figures.roofline_seconds
  rows = [
    ("fits", _fits(plan)),
    ("step", f"{1e3 * seconds:.2f} ms scheduled, {roofline:.2f} ms roofline"),
    (
      "matrix units",
      f"{figures.flops / 1e12:.3f} TFLOP a core, {100 * plan.share_of_flops:.0f} % of the peak of "
      f"{generation.flops / 1e12:g} TFLOP/s",
    ),
    (
      "memory traffic",
      f"{figures.bytes_accessed / 1e9:.2f} GB a core, {100 * plan.share_of_bandwidth:.0f} % of the "
      f"peak of {generation.bandwidth / 1e9:g} GB/s",
    ),
    ("collectives", _collectives(plan)),
    ("cycles", _kinds(figures.kinds)),
  ]
  if figures.unestimated:
    rows.append(("no cycles for", _counts(figures.unestimated)))
  if figures.unknown_loops:
    loops = _number(figures.unknown_loops, "loop")
    rows.append(("counted once", f"{loops} with an unknown trip count"))
  rate = plan.images_per_second
  rows += [
    ("input", f"{rate:,.0f} images/s, {rate / slice_.hosts:,.0f} per host, at the scheduled speed"),
    (
      "schedule",
      f"{plan.steps:,} steps: {_hours(plan.hours)} at the scheduled speed, "
      f"{_hours(plan.hours / terms.efficiency)} at {terms.efficiency:g} of it",
    ),
    ("core-hours", f"{plan.core_hours:,.1f} at {terms.efficiency:g} of the scheduled speed"),
  ]
  if plan.usd is not None:
    rows.append(("price", f"{plan.usd:,.2f} USD at {terms.price:g} a core-hour"))
  return [*rows, ("compiled in", duration(figures.compile_seconds))]


def _fits(plan: Plan) -> str:
  figures, memory = plan.figures, plan.topology.generation.memory_bytes
  needed, available = figures.peak_bytes / _GIB, memory / _GIB
  if not figures.fits:
    excess = needed - available
    return (
      f"no: {needed:.2f} GiB needed, {available:.2f} available on a core; {excess:.2f} too much"
    )
  parts = (figures.argument_bytes, figures.temp_bytes, figures.output_bytes)
  state, temporary, output = (part / _GIB for part in parts)
  return (
    f"yes: {needed:.2f} of {available:.2f} GiB a core (arguments {state:.2f}, temporaries "
    f"{temporary:.2f}, outputs {output:.2f}, mostly in the arguments' place)"
  )


def _collectives(plan: Plan) -> str:
  collectives = plan.figures.collectives
  return (
    ", ".join(
      f"{entry['count']} {kind} of {entry['bytes'] / 1e6:,.1f} MB in all"
      for kind, entry in collectives.items()
    )
    or "none"
  )


def _kinds(kinds: dict[str, int]) -> str:
  total = max(1, sum(kinds.values()))
  shares = [(kind, 100 * cycles / total) for kind, cycles in kinds.items()]
  return ", ".join(f"{kind} {share:.0f} %" for kind, share in shares if share >= 0.5)


def _costs(plan: Plan, count: int) -> str:
  clock, total = plan.topology.generation.clock_hz, max(1, plan.figures.cycles)
  lines = ["     ms    %  kind, result, source"]
  for cost in plan.figures.costs[:count]:
    times = f" x {cost.times}" if cost.times > 1 else ""
    lines.append(
      f"{1e3 * cost.total / clock:7.3f} {100 * cost.total / total:4.1f}  {cost.kind}{times}, "
      f"{cost.shape}, {cost.source or cost.name}"
    )
  return "\n".join(lines)


def _cells(plan: Plan, priced: bool) -> list[str]:
  figures, slice_ = plan.figures, plan.topology
  head = [" ".join([plan.config, *plan.flags]), slice_.name, f"{slice_.cores}"]
  head += ["yes" if figures.fits else "no", f"{figures.peak_bytes / _GIB:.2f}"]
  if figures.cycles is None:
    return head + ["-"] * 8 + [f"{plan.steps:,}"] + ["-"] * (3 + priced)
  rate = plan.images_per_second
  return [
    *head,
    f"{1e3 * plan.scheduled_seconds:.1f}",
    f"{1e3 * figures.roofline_seconds:.1f}",
    f"{figures.flops / 1e12:.3f}",
    f"{figures.bytes_accessed / 1e9:.1f}",
    f"{100 * plan.share_of_flops:.0f}",
    f"{100 * plan.share_of_bandwidth:.0f}",
    f"{rate:,.0f}",
    f"{rate / slice_.hosts:,.0f}",
    f"{plan.steps:,}",
    f"{plan.hours:.1f}",
    f"{plan.hours / plan.terms.efficiency:.1f}",
    f"{plan.core_hours:,.0f}",
    *([f"{plan.usd:,.0f}"] if priced else []),
  ]


def _in_passes(plan: Plan) -> str:
  each = plan.batch_size / plan.passes / plan.used
  text = f", {each:g} images a core"
  return text + (f" in each of {plan.passes} passes" if plan.passes > 1 else "")


def _counts(counts: dict[str, int]) -> str:
  return ", ".join(f"{count} {opcode}" for opcode, count in counts.items())


def _number(count: int, word: str) -> str:
  return f"{count:,} {word}{'' if count == 1 else 's'}"


def _hours(hours: float) -> str:
  return f"{hours:,.1f} hours" if hours >= 1 else duration(3600 * hours)
