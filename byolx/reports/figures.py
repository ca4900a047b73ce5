"""Draws results as figures: accuracy over the share of labels (Figure 4), or one bar per result."""

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
_MAX_COLOURS = len(plots.COLOURS)  # largest number of lines that have distinct colours
_MAX_LETTERS = 34  # longest name of a bar on one line

Name = tuple[str, str]
"""Name of a line or bar: the name of the protocol and the name of the encoder."""
Panel = tuple[str, list[Result]]
"""One pair of axes of a figure: its title and the results to draw in it."""


def draw(results: Sequence[Result], path: Path) -> None:
  """Draws results as a PNG, with marks at the paper's numbers.

  Each pair of data set and metric has its own axes. If some encoder has results of the same protocol at
  several shares of labels (fractions of the training labels), the figure shows lines over this share.
  Otherwise it shows bars.

  Args:
    results: at least one result.
    path: path of the PNG.
  """
  panels: dict[str, list[Result]] = {}
  for result in results:
    metric = _METRICS.get(result.record["metric"], result.record["metric"])
    panels.setdefault(f"{result.data}: {metric}" if result.data else metric, []).append(result)
  shares = [{name: _shares(group, name) for name in _names(group)} for group in panels.values()]
  over_shares = any(len(of_name) > 1 for of_panel in shares for of_name in of_panel.values())
  figure = (_lines if over_shares else _bars)(list(panels.items()))
  plots.save(figure, path)


def _names(results: Sequence[Result]) -> list[Name]:
  """Returns the distinct names of lines or bars, in the order of the results."""
  return list(dict.fromkeys(_name(result) for result in results))


def _name(result: Result) -> Name:
  return compare.protocol(result), compare.encoder(result)


def _shares(results: Sequence[Result], name: Name) -> set[float]:
  return {
    result.record["labels"]
    for result in results
    if _name(result) == name and result.record.get("labels")
  }


def _labels(names: Sequence[Name]) -> dict[Name, str]:
  """Returns the label of each line or bar. It includes the encoder only if there are several encoders."""
  several = len({encoder for _, encoder in names}) > 1
  return {
    (protocol, encoder): _plain(f"{protocol}: {encoder}" if several and encoder else protocol)
    for protocol, encoder in names
  }


def _plain(text: str) -> str:
  """Escapes the character $, which would start a formula in matplotlib."""
  return text.replace("$", r"\$")


def _lines(panels: Sequence[Panel]) -> Figure:
  """Draws accuracy over the share of labels on a logarithmic axis, as in Figure 4."""
  across = min(2, len(panels))
  down = math.ceil(len(panels) / across)
  names = _names([result for _, group in panels for result in group])
  labels = _labels(names)
  figure = Figure(figsize=(4.4 * across + 2.6, 3.4 * down), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
  axes = figure.subplots(down, across, squeeze=False).ravel()
  looks = _looks(names)
  paper = False
  for ax, (title, group) in zip(axes, panels, strict=False):
    plots.style(ax, _plain(title))
    for name in _names(group):
      line = [result for result in group if _name(result) == name]
      _line(ax, line, *looks[name])
      paper |= _paper_points(ax, line, looks[name][0])
    _scale_shares(ax, group)
  for ax in axes[len(panels) :]:
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
  """Returns the colour, the dashes and the marker of each line.

  Each line has its own colour where there are enough colours. Otherwise, if there are several encoders
  and several protocols, the colour shows the encoder and the dashes show the protocol.
  """
  protocols = list(dict.fromkeys(protocol for protocol, _ in names))
  encoders = list(dict.fromkeys(encoder for _, encoder in names))
  crossed = len(names) > _MAX_COLOURS and len(protocols) > 1 and len(encoders) > 1
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


def _line(ax: Axes, results: Sequence[Result], colour: str, dash: Any, shape: str) -> None:
  labelled = sorted(
    (result for result in results if result.record.get("labels")), key=compare.labels
  )
  x = [100 * compare.labels(result) for result in labelled]
  y = [100 * result.value for result in labelled]
  ax.plot(x, y, color=colour, linestyle=dash, marker=shape, markersize=4.5, linewidth=1.4)
  for result in labelled:
    if result.n > 1 and result.interval:
      point = (100 * compare.labels(result), 100 * result.value, 100 * result.interval)
      ax.errorbar(*point, color=colour, capsize=2.5, linewidth=1, fmt="none")


def _scale_shares(ax: Axes, results: Sequence[Result]) -> None:
  """Makes the x axis logarithmic, with one tick per measured share of labels."""
  shares = sorted(
    {100 * compare.labels(result) for result in results if result.record.get("labels")}
  )
  ax.set_xscale("log")
  ax.xaxis.set_minor_formatter(NullFormatter())
  ax.set_xticks(shares, [f"{share:g}%" for share in shares])
  ax.tick_params(axis="x", which="minor", length=0)
  if len(shares) > 1:
    ax.set_xlim(shares[0] / 1.15, shares[-1] * 1.15)
  ax.set_xlabel("labels used", fontsize=8, color=plots.INK)
  ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
  ax.set_axisbelow(True)


def _paper_points(ax: Axes, results: Sequence[Result], colour: str) -> bool:
  """Marks the paper's numbers for the results of one line; returns whether there were any numbers."""
  points = [(100 * compare.labels(result), value) for result in results for value in _paper(result)]
  for x, y in points:
    ax.plot(x, y, "D", markersize=7, markerfacecolor="none", color=colour, zorder=4)
  return bool(points)


def _paper(result: Result) -> list[float]:
  """Returns the distinct numbers that the paper has for a result, in %; usually none or one."""
  cells = compare.in_paper(result)
  return list(dict.fromkeys(cell.value for _, _, cell in cells if cell.value is not None))


def _paper_handle(marker: str) -> Line2D:
  return Line2D(
    [], [], linestyle="", marker=marker, markersize=6.5, color=plots.INK,
    markerfacecolor="none" if marker == "D" else plots.INK, label="paper",
  )  # fmt: skip


def _bars(panels: Sequence[Panel]) -> Figure:
  """Draws one horizontal bar per result, from zero, with a mark at the paper's number."""
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


def _bar_labels(results: Sequence[Result]) -> list[str]:
  """Returns the labels of the bars.

  A label has the protocol, the encoder if there are several, and the share of labels if it varies. A
  long label has two lines.
  """
  names = _labels(_names(results))
  shares = {result.record.get("labels") for result in results}
  labels = []
  for result in results:
    text = names[_name(result)] + (f", {compare.share(result)}" if len(shares) > 1 else "")
    labels.append(text.replace(": ", ":\n", 1) if len(text) > _MAX_LETTERS else text)
  return labels


def _draw_bars(ax: Axes, results: Sequence[Result]) -> bool:
  """Draws bars with their values and the paper's marks; returns whether there were any marks."""
  values = [100 * result.value for result in results]
  errors = [
    100 * result.interval if result.n > 1 and result.interval else 0.0 for result in results
  ]
  ax.barh(range(len(results)), values, height=0.62, color=plots.BLUE, alpha=0.75, linewidth=0)
  marked = False
  for y, (result, value, error) in enumerate(zip(results, values, errors, strict=True)):
    if error:
      ax.errorbar(value, y, xerr=error, color=plots.INK, capsize=2.5, linewidth=1, fmt="none")
    ends = [value + error]
    for number in _paper(result):
      ax.plot([number, number], [y - 0.4, y + 0.4], color=plots.INK, linewidth=1.8)
      ends.append(number)
      marked = True
    paper = ", ".join(f"{number:.1f}" for number in _paper(result))
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
