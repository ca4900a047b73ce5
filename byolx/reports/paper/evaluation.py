"""Tables 7 to 9 (appendix D): linear evaluation, fine-tuning and supervised training on ImageNet."""

from byolx.reports.paper.settings import LINEAR, PRETRAINING_VIEWS, finetuned, linear, supervised
from byolx.reports.paper.table import Column, Condition, Table, best, row

_NETWORKS = {50: "resnet50", 101: "resnet101", 152: "resnet152", 200: "resnet200"}


def _network(depth: int, width: int) -> Condition:
  return Condition(config={"model.arch": _NETWORKS[depth], "model.width": float(width)})


def _variation(pretrain_views: bool, regularised: bool) -> Condition:
  """Returns the required settings of a run for one of the four variants of linear evaluation in D.1.

  Args:
    pretrain_views: whether the classifier is trained with the augmentations of the pretraining, rather
      than with crops and flips only.
    regularised: whether the logits are regularised, with alpha = 20 and beta = 0.01.
  """
  views = PRETRAINING_VIEWS if pretrain_views else {"classify.views": LINEAR["classify.views"]}
  return Condition(
    config={
      **views,
      "classify.tclip": 20.0 if regularised else 0.0,
      "classify.logit_penalty": 0.01 if regularised else 0.0,
    }
  )


_TABLE_7_CELLS = {
  (50, 1): ((74.3, 91.6), (74.4, 91.8), (74.7, 91.8), (best(74.8), best(91.8))),
  (50, 4): ((78.6, 94.2), (78.6, 94.3), (78.9, 94.3), (best(79.0), best(94.5))),
  (200, 2): ((79.6, 94.8), (79.6, 94.8), (79.8, 95.0), (best(80.0), best(95.0))),
}
# (pretrain augmentations, logits regularization), in the order of the rows.
_VARIATIONS = ((False, False), (True, False), (False, True), (True, True))

TABLE_7 = Table(
  "7",
  "Different linear evaluation protocols on ImageNet: spatial or pre-train augmentations, with or "
  "without regularisation of the logits",
  ("Architecture", "Pre-train augmentations", "Logits regularization"),
  (
    Column("Top-1", condition=linear("top1")),
    Column("Top-5", condition=linear("top5")),
  ),
  tuple(
    row(
      f"ResNet-{depth} ({width}×)",
      "✓" if views else "",
      "✓" if regularised else "",
      cells=cells,
      condition=_network(depth, width).but(_variation(views, regularised)),
    )
    for (depth, width), of_network in _TABLE_7_CELLS.items()
    for (views, regularised), cells in zip(_VARIATIONS, of_network, strict=True)
  ),
  "ResNet-200 (2×) by the main protocol has top-5 94.8 here and 94.9 in Table 9.",
)

_SUPERVISED, _SEMI = "Supervised", "Semi-supervised (100%)"

TABLE_8 = Table(
  "8",
  "Semi-supervised training with the full ImageNet on a ResNet-50 (1×), and fully supervised methods",
  ("Kind", "Method"),
  (
    Column("Top-1", condition=finetuned("top1")),
    Column("Top-5", condition=finetuned("top5")),
  ),
  (
    row(_SUPERVISED, "Supervised [8]", cells=(76.5, None), theirs=True),
    row(_SUPERVISED, "AutoAugment [87]", cells=(77.6, 93.8), theirs=True),
    row(_SUPERVISED, "MaxUp [75]", cells=(best(78.9), best(94.2)), theirs=True),
    row(_SEMI, "SimCLR [8]", cells=(76.0, 93.1), theirs=True),
    row(_SEMI, "SimCLR (repro)", cells=(76.5, 93.5)),
    row(_SEMI, "BYOL", cells=(best(77.7), best(93.9)), condition=Condition()),
  ),
)

# Depth, width, million weights: BYOL top-1, top-5; supervised (ours) top-1, top-5; supervised [8].
_TABLE_9_CELLS = {
  (50, 1, 24): (74.3, 91.6, 76.4, 92.9, 76.5),
  (101, 1, 43): (76.4, 93.0, 78.0, 94.0, None),
  (152, 1, 58): (77.3, 93.7, 79.1, 94.5, None),
  (200, 1, 63): (77.8, 93.9, 79.3, 94.6, None),
  (50, 2, 94): (77.4, 93.6, 79.9, 95.0, 77.8),
  (101, 2, 170): (78.7, 94.3, 80.3, 95.0, None),
  (50, 3, 211): (78.2, 93.9, 80.2, 95.0, None),
  (152, 2, 232): (79.0, 94.6, 80.6, 95.3, None),
  (200, 2, 250): (best(79.6), best(94.9), 80.1, 95.2, None),
  (50, 4, 375): (78.6, 94.2, 80.7, best(95.3), 78.9),
  (101, 3, 382): (78.4, 94.2, 80.7, best(95.3), None),
  (152, 3, 522): (79.5, 94.6, best(80.9), 95.2, None),
}

_OURS = "Supervised (ours)"

TABLE_9 = Table(
  "9",
  "Linear evaluation of BYOL on ImageNet using larger encoders, and supervised baselines",
  ("Architecture", "Multiplier", "Weights"),
  (
    Column("Top-1", "BYOL", linear("top1")),
    Column("Top-5", "BYOL", linear("top5")),
    Column("Top-1", _OURS, supervised("top1")),
    Column("Top-5", _OURS, supervised("top5")),
    Column("Top-1", "Supervised [8]", theirs=True),
  ),
  tuple(
    row(
      f"ResNet-{depth}",
      f"{width}×",
      f"{weights}M",
      cells=cells,
      condition=_network(depth, width),
    )
    for (depth, width, weights), cells in _TABLE_9_CELLS.items()
  ),
  "ResNet-200 (2×) has top-5 94.9 here and 94.8 in Table 7.",
)
