"""Draws training curves as a PNG, with one plot per panel of the task."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from byolx.evaluation.plots import BLUE, FAINT, INK, ORANGE, save, style
from byolx.training.task import Panel


def curves(rows: Sequence[Mapping[str, Any]], path: Path, panels: Sequence[Panel]) -> None:
  """Draws the training curves of a run as a PNG.

  For pretraining, the curves are losses, accuracy, collapse monitors, norms (Figure 7) and schedules.

  Args:
    rows: rows of metrics.jsonl. A missing or non-finite value leaves a gap in its curve.
    path: path of the PNG.
    panels: panels of the run's task, each the description of one plot. A panel without any finite value
      is not drawn.
  """
  panels = [p for p in panels if any(_finite(_column(rows, key)) for key, _ in p.lines)]
  across = min(4, max(1, len(panels)))
  down = max(1, math.ceil(len(panels) / across))
  figure = Figure(figsize=(3.3 * across, 2.5 * down), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
  axes = figure.subplots(down, across, squeeze=False).ravel()
  key = "epoch" if _finite(_column(rows, "epoch")) else "step"
  x = _column(rows, key)
  for ax, panel in zip(axes, panels, strict=False):
    _draw_panel(ax, panel, x, rows)
  for i, ax in enumerate(axes[: len(panels)]):
    if i + across >= len(panels):
      ax.set_xlabel(key, fontsize=8, color=INK)
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  if not panels:
    axes[0].text(0.5, 0.5, "no measurements", ha="center", va="center", color=FAINT)
  save(figure, path)


def _draw_panel(
  ax: Axes, panel: Panel, x: Float[np.ndarray, "n"], rows: Sequence[Mapping[str, Any]]
) -> None:
  style(ax, panel.title)
  drawn = []
  for (key, name), colour in zip(panel.lines, (BLUE, ORANGE), strict=False):
    y = panel.scale * _column(rows, key)
    if not _finite(y):
      continue
    drawn.append(y[np.isfinite(y)])
    window = len(y) // 40
    if panel.noisy and window >= 3:
      ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
      y = _running_mean(y, window)
    marker = "o" if len(drawn[-1]) <= 20 else None
    ax.plot(x, y, color=colour, linewidth=1.4, marker=marker, markersize=3, label=name)
  _scale_y(ax, panel, np.concatenate(drawn))
  for height, meaning in panel.marks:
    ax.axhline(height, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
      meaning,
      (1, height),
      xycoords=("axes fraction", "data"),
      xytext=(-2, 2),
      textcoords="offset points",
      ha="right",
      fontsize=7,
      color=FAINT,
    )
  if len(drawn) > 1:
    ax.legend(fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.4)


def _scale_y(ax: Axes, panel: Panel, values: Float[np.ndarray, "n"]) -> None:
  low, high = values.min(), values.max()
  if panel.logarithmic and low > 0 and high > 100 * low:
    ax.set_yscale("log")
    return
  ax.ticklabel_format(axis="y", useOffset=False)
  if panel.from_zero and low >= 0 and max(high, panel.top) > 0:
    ax.set_ylim(0, 1.1 * max(high, panel.top))


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, "n"]:
  """Returns the values of one key in all rows. A missing or non-finite value becomes NaN."""
  values = np.array([row[key] if row.get(key) is not None else math.nan for row in rows], float)
  return np.where(np.isfinite(values), values, math.nan)


def _finite(values: Float[np.ndarray, "n"]) -> bool:
  return bool(np.isfinite(values).any())


def _running_mean(y: Float[np.ndarray, "n"], window: int) -> Float[np.ndarray, "n"]:
  """Computes the mean of the finite values in a window around each value.

  The mean is NaN where the value is not finite.
  """
  finite = np.isfinite(y)
  kernel = np.ones(2 * (window // 2) + 1)
  totals = np.convolve(np.where(finite, y, 0.0), kernel, "same")
  counts = np.convolve(finite.astype(float), kernel, "same")
  return np.where(finite, totals / np.maximum(counts, 1), math.nan)
