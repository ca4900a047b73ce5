"""Draws a map of images by their features, and defines the style of all figures.

Files are replaced atomically. Figures do not use pyplot, so any thread or notebook may draw them.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from byolx.core.files import write_atomically

LARGEST_EMBEDDING = 2000
"""Largest number of images on a map of images. More images would overlap, and make t-SNE slow."""

INK, FAINT = "#262626", "#8c8c8c"
BLUE, ORANGE = "#0072B2", "#D55E00"  # from Okabe and Ito, safe for colour-blind readers
# Paul Tol's "muted" set, safe for colour-blind readers, and black. Further classes get other shapes.
COLOURS = (
  "#332288", "#DDCC77", "#CC6677", "#88CCEE", "#117733",
  "#882255", "#44AA99", "#999933", "#AA4499", "#000000",
)  # fmt: skip
SHAPES = ("o", "^", "s", "D", "v", "P", "X", "*")
_LARGEST_LEGEND = 40


def embedding(
  features: Num[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  classes: Sequence[str],
  path: Path,
  title: str,
  seed: int = 0,
) -> None:
  """Draws a map of images as a PNG: images with similar features are close, and colours show the classes.

  The positions do not depend on the labels. They are the t-SNE of 50 principal components of the
  directions of the features (the loss compares only directions).

  Args:
    features: features of the images, real numbers.
    labels: class of each image; -1 means unlabelled.
    classes: names of the classes; a label without a name is shown as a number.
    path: path of the PNG.
    title: title above the map.
    seed: seed of t-SNE, and of the choice of images if there are more than `LARGEST_EMBEDDING`.

  Raises:
    ValueError: features are not finite.
  """
  if not np.isfinite(features).all():
    raise ValueError("some features are not finite; expected real numbers")
  rng = np.random.default_rng(seed)
  if len(features) > LARGEST_EMBEDDING:
    sample = np.sort(rng.choice(len(features), LARGEST_EMBEDDING, replace=False))
    features, labels = features[sample], labels[sample]
  points = _project(features, seed)
  # A random order keeps the last class from covering the others.
  order = rng.permutation(len(points))
  points, labels = points[order], labels[order]
  present = np.unique(labels).tolist()
  columns = 1 if len(present) <= 20 else 2
  figure = Figure(figsize=(4.8 + 2.2 * columns, 5.4), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
  ax = figure.subplots()
  style(ax, title)
  ax.set(xticks=[], yticks=[])
  ax.set_aspect("equal", adjustable="datalim")
  ax.spines[:].set_visible(False)
  appearances = np.array([_appearance(label) for label in labels.tolist()]).reshape(-1, 2)
  for shape in np.unique(appearances[:, 1]):
    with_shape = appearances[:, 1] == shape
    ax.scatter(
      *points[with_shape].T,
      s=14 if len(points) > 500 else 26,
      c=appearances[with_shape, 0],
      marker=str(shape),
      alpha=0.85,
      linewidths=0,
    )
  _legend(figure, present, classes, columns)
  save(figure, path)


def _project(features: Num[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
  """Computes two coordinates per image: t-SNE of 50 principal components of the features' directions.

  With fewer than 5 images, or without variance, the coordinates are the first two principal components.
  """
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
  # One thread: several threads wait for each other in a busy loop, which is slow on shared cores.
  with threadpool_limits(1):
    return tsne.fit_transform(components.astype(np.float32))


def _appearance(label: int) -> tuple[str, str]:
  """Returns the colour and the marker of a class. Label -1 means unlabelled images."""
  if label < 0:
    return FAINT, "o"
  cycle = label // len(COLOURS)
  return COLOURS[label % len(COLOURS)], SHAPES[cycle % len(SHAPES)]


def _name(label: int, classes: Sequence[str]) -> str:
  """Returns the name of a class for the legend, shortened and escaped.

  Without the escape, matplotlib reads $ as a formula, and hides a name that starts with _.
  """
  if label < 0:
    return "unlabelled"
  name = classes[label] if label < len(classes) else f"class {label}"
  name = name if len(name) <= 24 else name[:23] + "…"
  return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _legend(figure: Figure, labels: Sequence[int], classes: Sequence[str], columns: int) -> None:
  """Adds a legend with the names of the classes beside the map, at most `_LARGEST_LEGEND` names."""
  shown = labels[:_LARGEST_LEGEND]
  names = [_name(label, classes) for label in shown]
  appearances = [_appearance(label) for label in shown]
  if len(labels) > len(shown):
    names.append(f"and {len(labels) - len(shown)} more")
    appearances.append(("none", "o"))
  handles = [
    Line2D([], [], linestyle="", marker=shape, markersize=5.5, color=colour, markeredgewidth=0)
    for colour, shape in appearances
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


def style(ax: Axes, title: str) -> None:
  """Applies the common style to axes: title at the left, no box, small ticks."""
  ax.set_title(title, fontsize=9, loc="left", color=INK)
  ax.tick_params(labelsize=7.5, colors=INK, length=3)
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(FAINT)


def save(figure: Figure, path: Path) -> None:
  """Saves a figure as a PNG. An existing file is replaced atomically."""
  png = io.BytesIO()
  FigureCanvasAgg(figure).print_figure(png, format="png", dpi=160, facecolor="white")
  write_atomically(path, png.getvalue())
