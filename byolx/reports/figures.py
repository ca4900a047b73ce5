"""Pictures of results: accuracy over the share of labels (Figure 4), or one bar for each protocol."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from byolx.evaluation import plots
from byolx.reports import compare
from byolx.reports.compare import Result

_METRICS = {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)"}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_FEW = len(plots.COLOURS)  # lines that colours alone tell apart
_SHORT = 34  # letters of a bar's name on one line

Name = tuple[str, str]
"""What a line or bar is: the protocol, and the encoder."""
Panel = tuple[str, list[Result]]
"""Title, and what is drawn below it."""


def draw(found: Sequence[Result], path: Path) -> None:
  """Lines where something was measured at several shares of the labels, and bars elsewhere.

  The paper's numbers, for the results that it has, are marked.

  Args:
    found: at least one result; those of several data sets or metrics get a panel each.
    path: of the PNG.
  """
  panels: dict[str, list[Result]] = {}
  for one in found:
    metric = _METRICS.get(one.record["metric"], one.record["metric"])
    panels.setdefault(f"{one.data}: {metric}" if one.data else metric, []).append(one)
  shares = [{name: _shares(group, name) for name in _names(group)} for group in panels.values()]
  over_shares = any(len(of_name) > 1 for of_panel in shares for of_name in of_panel.values())
  figure = (_lines if over_shares else _bars)(list(panels.items()))
  plots.save(figure, path)


def _names(found: Sequence[Result]) -> list[Name]:
  """Every line or bar once, in the order of the results."""
  return list(dict.fromkeys(_name(one) for one in found))


def _name(one: Result) -> Name:
  return compare.protocol(one), compare.encoder(one)


def _shares(found: Sequence[Result], name: Name) -> set[float]:
  return {one.record["labels"] for one in found if _name(one) == name and one.record.get("labels")}


def _labels(names: Sequence[Name]) -> dict[Name, str]:
  """What the legend says: the encoder as well only where there are several, or nothing else does."""
  several = len({encoder for _, encoder in names}) > 1
  return {
    (protocol, encoder): _plain(f"{protocol}: {encoder}" if several and encoder else protocol)
    for protocol, encoder in names
  }


def _plain(text: str) -> str:
  """matplotlib would read $ as a formula."""
  return text.replace("$", r"\$")


def _lines(panels: Sequence[Panel]) -> Figure:
  """Accuracy over the share of labels on a log scale, as in Figure 4."""
  across = min(2, len(panels))
  down = math.ceil(len(panels) / across)
  names = _names([one for _, group in panels for one in group])
  labels = _labels(names)
  figure = Figure(figsize=(4.4 * across + 2.6, 3.4 * down), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
  every = figure.subplots(down, across, squeeze=False).ravel()
  looks = _looks(names)
  paper = False
  for ax, (title, group) in zip(every, panels, strict=False):
    plots.style(ax, _plain(title))
    for name in _names(group):
      of_name = [one for one in group if _name(one) == name]
      _line(ax, of_name, *looks[name])
      paper |= _paper_points(ax, of_name, looks[name][0])
    _scale_shares(ax, group)
  for ax in every[len(panels) :]:
    ax.set_axis_off()
  handles = [
    Line2D(
      [], [], color=colour, linestyle=dash, marker=shape, markersize=4.5, linewidth=1.4,
      label=labels[name],
    )
    for name, (colour, dash, shape) in looks.items()
  ]  # fmt: skip
  if paper:
    handles.append(_paper_handle("D"))
  figure.legend(
    handles=handles,
    loc="outside right center",
    fontsize=8,
    frameon=False,
    labelcolor=plots.INK,
    handlelength=2.6,
  )
  return figure


def _looks(names: Sequence[Name]) -> dict[Name, tuple[str, Any, str]]:
  """A colour and a shape for each line; of many, a colour for each encoder and dashes by protocol."""
  protocols = list(dict.fromkeys(protocol for protocol, _ in names))
  encoders = list(dict.fromkeys(encoder for _, encoder in names))
  crossed = len(names) > _FEW and len(protocols) > 1 and len(encoders) > 1
  looks = {}
  for i, (protocol, encoder) in enumerate(names):
    colour = encoders.index(encoder) if crossed else i
    dash = protocols.index(protocol) if crossed else 0
    looks[protocol, encoder] = (
      plots.COLOURS[colour % len(plots.COLOURS)],
      _DASHES[dash % len(_DASHES)],
      plots.SHAPES[colour % len(plots.SHAPES)],
    )
  return looks


def _line(ax: Axes, found: Sequence[Result], colour: str, dash: Any, shape: str) -> None:
  points = sorted((one for one in found if one.record.get("labels")), key=compare.labels)
  x = [100 * compare.labels(one) for one in points]
  y = [100 * one.value for one in points]
  ax.plot(x, y, color=colour, linestyle=dash, marker=shape, markersize=4.5, linewidth=1.4)
  for one in points:
    if one.n > 1 and one.interval:
      at = (100 * compare.labels(one), 100 * one.value, 100 * one.interval)
      ax.errorbar(*at, color=colour, capsize=2.5, linewidth=1, fmt="none")


def _scale_shares(ax: Axes, found: Sequence[Result]) -> None:
  """A log axis whose ticks are the shares themselves."""
  shares = sorted({100 * compare.labels(one) for one in found if one.record.get("labels")})
  ax.set_xscale("log")
  ax.xaxis.set_minor_formatter(NullFormatter())
  ax.set_xticks(shares, [f"{share:g}%" for share in shares])
  ax.tick_params(axis="x", which="minor", length=0)
  if len(shares) > 1:
    ax.set_xlim(shares[0] / 1.15, shares[-1] * 1.15)
  ax.set_xlabel("labels used", fontsize=8, color=plots.INK)
  ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
  ax.set_axisbelow(True)


def _paper_points(ax: Axes, found: Sequence[Result], colour: str) -> bool:
  """Marks the paper's numbers; whether there was one."""
  points = [(100 * compare.labels(one), value) for one in found for value in _paper(one)]
  for x, y in points:
    ax.plot(x, y, "D", markersize=7, markerfacecolor="none", color=colour, zorder=4)
  return bool(points)


def _paper(one: Result) -> list[float]:
  """The paper's numbers for a result, in %; most often none or one."""
  cells = compare.in_paper(one)
  return list(dict.fromkeys(cell.value for _, _, cell in cells if cell.value is not None))


def _paper_handle(marker: str) -> Line2D:
  return Line2D(
    [], [], linestyle="", marker=marker, markersize=6.5, color=plots.INK,
    markerfacecolor="none" if marker == "D" else plots.INK, label="paper",
  )  # fmt: skip


def _bars(panels: Sequence[Panel]) -> Figure:
  """One bar for each result, from zero; the paper's number is a mark on it."""
  counts = [len(group) for _, group in panels]
  inches = [0.34 * count + 0.55 for count in counts]
  labels = [_bar_labels(group) for _, group in panels]
  longest = max(len(line) for group in labels for label in group for line in label.splitlines())
  figure = Figure(figsize=(4.4 + 0.065 * longest, sum(inches) + 0.35), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.06, w_pad=0.08)
  axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts).ravel()
  paper = False
  for ax, (title, group), names in zip(axes, panels, labels, strict=True):
    plots.style(ax, _plain(title))
    paper |= _draw_bars(ax, group)
    ax.set_yticks(range(len(group)), names)
  axes[-1].set_xlabel("%", fontsize=8, color=plots.INK)
  if paper:
    figure.legend(
      handles=[_paper_handle("|")],
      loc="outside upper right",
      fontsize=8,
      frameon=False,
      labelcolor=plots.INK,
    )
  return figure


def _bar_labels(found: Sequence[Result]) -> list[str]:
  """Protocol and encoder, on two lines if they are long; the share of labels if they differ."""
  names = _labels(_names(found))
  shares = {one.record.get("labels") for one in found}
  labels = []
  for one in found:
    text = names[_name(one)] + (f", {compare.share(one)}" if len(shares) > 1 else "")
    labels.append(text.replace(": ", ":\n", 1) if len(text) > _SHORT else text)
  return labels


def _draw_bars(ax: Axes, found: Sequence[Result]) -> bool:
  """The bars, what they measure, and the paper's marks; whether there was one."""
  values = [100 * one.value for one in found]
  errors = [100 * one.interval if one.n > 1 and one.interval else 0.0 for one in found]
  ax.barh(range(len(found)), values, height=0.62, color=plots.BLUE, alpha=0.75, linewidth=0)
  marked = False
  for y, (one, value, error) in enumerate(zip(found, values, errors, strict=True)):
    if error:
      ax.errorbar(value, y, xerr=error, color=plots.INK, capsize=2.5, linewidth=1, fmt="none")
    ends = [value + error]
    for number in _paper(one):
      ax.plot([number, number], [y - 0.4, y + 0.4], color=plots.INK, linewidth=1.8)
      ends.append(number)
      marked = True
    paper = ", ".join(f"{number:.1f}" for number in _paper(one))
    ax.annotate(
      f"{value:.1f}" + (f" (paper {paper})" if paper else ""),
      (max(ends), y),
      xytext=(4, 0),
      textcoords="offset points",
      va="center",
      fontsize=7.5,
      color=plots.INK,
    )
  ax.set_xlim(0, 118 if marked else 108)
  ax.set_xticks(range(0, 101, 20))
  ax.tick_params(axis="y", length=0)
  ax.invert_yaxis()
  return marked
