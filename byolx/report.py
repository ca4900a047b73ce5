"""Pictures of a run: training curves with the collapse monitors, and a map of held-out images.

Every function takes data and a path, and writes a whole file or leaves the old one. Figures are
matplotlib objects of their own: nothing here touches pyplot, so any thread or notebook may call it.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from byolx.logs import write_atomically
from byolx.metrics import STD_WARNING

LARGEST_EMBEDDING = 2000
"""Images on a map; more would hide each other, and t-SNE slows down."""

INK, FAINT = "#262626", "#8c8c8c"
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito, safe for colour-blind readers
# The "muted" set of Paul Tol, safe for colour-blind readers, and black; then shapes change as well.
COLOURS = (
  "#332288", "#DDCC77", "#CC6677", "#88CCEE", "#117733",
  "#882255", "#44AA99", "#999933", "#AA4499", "#000000",
)  # fmt: skip
SHAPES = ("o", "^", "s", "D", "v", "P", "X", "*")
_LARGEST_LEGEND = 40


class _Panel(NamedTuple):
  """One pair of axes of the training curves."""

  title: str
  lines: tuple[tuple[str, str], ...]  # key of a row, name in the legend
  scale: float = 1.0
  marks: tuple[tuple[float, str], ...] = ()  # horizontal lines, and what they mean
  from_zero: bool = True
  top: float = -math.inf  # what the axis shows at least
  noisy: bool = True
  logarithmic: bool = False  # where values spread over a factor of 100


PRETRAINING = (
  _Panel("Loss", (("loss_byol", "BYOL"), ("loss_probe", "online probe"))),
  _Panel("Online probe: top-1 (%)", (("top1", ""),), scale=100),
  _Panel(
    "Projection: normalised std",
    (("std", ""),),
    marks=((1.0, "isotropic"), (STD_WARNING, "collapse")),
    top=1.0,
  ),
  _Panel("Projection: participation ratio", (("rank", ""),)),
  _Panel("Representation: $\\ell_2$ norm", (("norm_representation", ""),), logarithmic=True),
  _Panel("Projection: $\\ell_2$ norm", (("norm_projection", ""),), logarithmic=True),
  _Panel("Target decay $\\tau$", (("tau", ""),), from_zero=False, noisy=False),
  _Panel("Learning rate", (("rate", ""),), noisy=False),
)
"""Panels of a pretraining run."""

CLASSIFICATION = (
  _Panel("Loss", (("loss", ""),)),
  _Panel("Training images: top-1 (%)", (("top1", ""),), scale=100),
  _Panel("Gradient: $\\ell_2$ norm", (("norm_gradient", ""),), logarithmic=True),
  _Panel("Learning rate", (("rate", ""),), noisy=False),
)
"""Panels of a classifier's run; of several, the mean loss and the best accuracy."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Rows of a metrics.jsonl; without a last line that a killed run left half written.

  An empty list if there is no such file.

  Raises:
    ValueError: another line is not a JSON object.
  """
  if not path.exists():
    return []
  rows = []
  lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      if number == len(lines):
        break
      raise ValueError(f"{path}, line {number}: {line[:60]!r}; expected a JSON object") from None
    rows.append(row)
  return rows


def curves(
  rows: Sequence[Mapping[str, Any]], path: Path, panels: Sequence[_Panel] = PRETRAINING
) -> None:
  """Training curves; of pretraining: losses, accuracy, collapse monitors, norms (Figure 7), schedules.

  Args:
    rows: of metrics.jsonl. A key that no row has gets no panel; a value that is missing or not
      finite leaves a gap.
    path: of the PNG.
    panels: PRETRAINING or CLASSIFICATION.
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
  # The lowest panel of each column names the axis.
  for i, ax in enumerate(axes[: len(panels)]):
    if i + across >= len(panels):
      ax.set_xlabel(key, fontsize=8, color=INK)
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  if not panels:
    axes[0].text(0.5, 0.5, "no measurements", ha="center", va="center", color=FAINT)
  save(figure, path)


def _draw_panel(
  ax: Axes, panel: _Panel, x: Float[np.ndarray, "n"], rows: Sequence[Mapping[str, Any]]
) -> None:
  style(ax, panel.title)
  every = []
  for (key, name), colour in zip(panel.lines, (BLUE, ORANGE), strict=False):
    y = panel.scale * _column(rows, key)
    if not _finite(y):
      continue
    every.append(y[np.isfinite(y)])
    window = len(y) // 40
    if panel.noisy and window >= 3:
      ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
      y = _running_mean(y, window)
    marker = "o" if len(every[-1]) <= 20 else None
    ax.plot(x, y, color=colour, linewidth=1.4, marker=marker, markersize=3, label=name)
  _scale_y(ax, panel, np.concatenate(every))
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
  if len(every) > 1:
    ax.legend(fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.4)


def _scale_y(ax: Axes, panel: _Panel, values: Float[np.ndarray, "n"]) -> None:
  low, high = values.min(), values.max()
  if panel.logarithmic and low > 0 and high > 100 * low:
    ax.set_yscale("log")
    return
  ax.ticklabel_format(axis="y", useOffset=False)
  if panel.from_zero and low >= 0 and max(high, panel.top) > 0:
    ax.set_ylim(0, 1.1 * max(high, panel.top))


def embedding(
  features: Num[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  classes: Sequence[str],
  path: Path,
  title: str,
  seed: int = 0,
) -> None:
  """A map of images by their features: near means alike; the colour, which it never saw, the class.

  Directions of the features (the loss compares nothing else), PCA to 50 dimensions, then t-SNE.

  Args:
    features: real numbers.
    labels: class of each image, -1 = unlabelled.
    classes: their names; a label without a name is shown by its number.
    path: of the PNG.
    title: says what images and which encoder.
    seed: of the sample, where there are more than `LARGEST_EMBEDDING` images, and of t-SNE.

  Raises:
    ValueError: features that are not finite.
  """
  if not np.isfinite(features).all():
    raise ValueError("some features are not finite; expected real numbers")
  rng = np.random.default_rng(seed)
  if len(features) > LARGEST_EMBEDDING:
    sample = np.sort(rng.choice(len(features), LARGEST_EMBEDDING, replace=False))
    features, labels = features[sample], labels[sample]
  points = _project(features, seed)
  # Drawn in random order, so that no class hides the others.
  order = rng.permutation(len(points))
  points, labels = points[order], labels[order]
  shown = np.unique(labels).tolist()
  columns = 1 if len(shown) <= 20 else 2
  figure = Figure(figsize=(4.8 + 2.2 * columns, 5.4), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
  ax = figure.subplots()
  style(ax, title)
  ax.set(xticks=[], yticks=[])
  ax.set_aspect("equal", adjustable="datalim")
  ax.spines[:].set_visible(False)
  looks = np.array([_appearance(label) for label in labels.tolist()]).reshape(-1, 2)
  for shape in np.unique(looks[:, 1]):
    here = looks[:, 1] == shape
    ax.scatter(
      *points[here].T,
      s=14 if len(points) > 500 else 26,
      c=looks[here, 0],
      marker=str(shape),
      alpha=0.85,
      linewidths=0,
    )
  _legend(figure, shown, classes, columns)
  save(figure, path)


def _project(features: Num[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
  """Two coordinates per image: t-SNE of 50 principal components, or two of them for a few images."""
  unit = np.asarray(features, np.float64)
  unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
  centred = unit - unit.mean(axis=0) if len(unit) else unit
  left, singular, _ = np.linalg.svd(centred, full_matrices=False)
  components = (left * singular)[:, :50]
  plane = np.zeros((len(unit), 2))
  plane[:, : min(2, components.shape[1])] = components[:, :2]
  spread = plane[:, 0].std() if len(plane) else 0.0
  if len(unit) < 5 or spread < 1e-9:
    return plane
  tsne = TSNE(
    init=(plane / spread * 1e-4).astype(np.float32),
    perplexity=min(30.0, (len(unit) - 1) / 3),
    random_state=seed,
    n_jobs=1,
  )
  # One thread: several wait for each other in a busy loop, for minutes where cores are shared.
  with threadpool_limits(1):
    return tsne.fit_transform(components.astype(np.float32))


def _appearance(label: int) -> tuple[str, str]:
  """Colour and shape of a class."""
  if label < 0:
    return FAINT, "o"
  turn = label // len(COLOURS)
  return COLOURS[label % len(COLOURS)], SHAPES[turn % len(SHAPES)]


def _name(label: int, classes: Sequence[str]) -> str:
  """What the legend calls a class; matplotlib would read $ as a formula and hide a leading _."""
  if label < 0:
    return "unlabelled"
  name = classes[label] if label < len(classes) else f"class {label}"
  name = name if len(name) <= 24 else name[:23] + "…"
  return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _legend(figure: Figure, labels: Sequence[int], classes: Sequence[str], columns: int) -> None:
  """Names of classes beside the map; the first forty of many."""
  shown = labels[:_LARGEST_LEGEND]
  names = [_name(label, classes) for label in shown]
  looks = [_appearance(label) for label in shown]
  if len(labels) > len(shown):
    names.append(f"and {len(labels) - len(shown)} more")
    looks.append(("none", "o"))
  handles = [
    Line2D([], [], linestyle="", marker=shape, markersize=5.5, color=colour, markeredgewidth=0)
    for colour, shape in looks
  ]
  figure.legend(
    handles,
    names,
    loc="outside right center",
    ncols=columns,
    fontsize=8.5 if columns == 1 else 7,
    frameon=False,
    labelcolor=INK,
    handletextpad=0.3,
  )


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, "n"]:
  """One key of all rows; NaN where it is missing or not a finite number."""
  values = np.array([row[key] if row.get(key) is not None else math.nan for row in rows], float)
  return np.where(np.isfinite(values), values, math.nan)


def _finite(values: Float[np.ndarray, "n"]) -> bool:
  return bool(np.isfinite(values).any())


def _running_mean(y: Float[np.ndarray, "n"], window: int) -> Float[np.ndarray, "n"]:
  """Mean of the finite values within half a window on both sides; NaN where y is."""
  finite = np.isfinite(y)
  kernel = np.ones(2 * (window // 2) + 1)
  totals = np.convolve(np.where(finite, y, 0.0), kernel, "same")
  counts = np.convolve(finite.astype(float), kernel, "same")
  return np.where(finite, totals / np.maximum(counts, 1), math.nan)


def style(ax: Axes, title: str) -> None:
  """The look of every pair of axes: a title at the left, no box, small ticks."""
  ax.set_title(title, fontsize=9, loc="left", color=INK)
  ax.tick_params(labelsize=7.5, colors=INK, length=3)
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(FAINT)


def save(figure: Figure, path: Path) -> None:
  """The PNG, drawn whole before a file is touched."""
  png = io.BytesIO()
  FigureCanvasAgg(figure).print_figure(png, format="png", dpi=160, facecolor="white")
  write_atomically(path, png.getvalue())
