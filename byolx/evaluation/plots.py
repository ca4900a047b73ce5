"""Pictures of a run: training curves with the collapse monitors, and a map of held-out images.

Every function takes data and a path, and writes a whole file or leaves the old one. Figures are
matplotlib objects of their own: nothing here touches pyplot, so any thread or notebook may call it.
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
