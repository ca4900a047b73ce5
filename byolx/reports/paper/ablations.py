"""Tables 14 to 17 (appendices G.1 to G.3).

They vary the projector and predictor, the learning rate and weight decay, the batch size and the
augmentations.
"""

from byolx.reports.paper.settings import ablation, pretrained
from byolx.reports.paper.table import Column, Condition, Table, best, row, spread

_BYOL = (Column("Top-1", condition=ablation("top1")), Column("Top-5", condition=ablation("top5")))
_BYOL_AND_SIMCLR = (
  Column("BYOL (ours)", "Top-1", ablation("top1")),
  Column("SimCLR (repro)", "Top-1"),
  Column("BYOL (ours)", "Top-5", ablation("top5")),
  Column("SimCLR (repro)", "Top-5"),
)

# (projector depth, predictor depth): top-1, top-5.
_TABLE_14A_CELLS = {
  (1, 1): (61.9, 86.0),
  (1, 2): (65.0, 86.8),
  (1, 3): (65.7, 86.8),
  (2, 1): (71.5, 90.7),
  (2, 2): (best(72.5), best(90.8)),
  (2, 3): (71.4, 90.4),
  (3, 1): (71.4, 90.4),
  (3, 2): (72.1, 90.5),
  (3, 3): (72.1, 90.5),
}

TABLE_14A = Table(
  "14a",
  "Projector and predictor depth (the number of linear layers), 300 epochs",
  ("Proj. depth", "Pred. depth"),
  _BYOL,
  tuple(
    row(
      str(projector),
      str(predictor),
      cells=cells,
      condition=pretrained({"byol.projector_depth": projector, "byol.predictor_depth": predictor}),
    )
    for (projector, predictor), cells in _TABLE_14A_CELLS.items()
  ),
)

_TABLE_14B_CELLS = {
  16: (spread(69.9, 0.3), 89.9),
  32: (71.3, 90.6),
  64: (72.2, 90.9),
  128: (72.5, 91.0),
  256: (72.5, 90.8),
  512: (best(72.6), best(91.0)),
}

TABLE_14B = Table(
  "14b",
  "Projection dimension, 300 epochs",
  ("Projector output dim",),
  _BYOL,
  tuple(
    row(str(size), cells=cells, condition=pretrained({"byol.projection_size": size}))
    for size, cells in _TABLE_14B_CELLS.items()
  ),
)

_TABLE_15A_CELLS = {
  0.01: (spread(34.8, 3.0), spread(60.8, 3.2)),
  0.1: (65.0, 87.0),
  0.2: (71.7, 90.6),
  0.3: (best(72.5), best(90.8)),
  0.4: (72.3, 90.6),
  0.5: (71.5, 90.1),
  1.0: (69.4, 89.2),
}

TABLE_15A = Table(
  "15a",
  "Base learning rate, 300 epochs",
  ("Learning rate",),
  _BYOL,
  tuple(
    row(f"{rate:g}", cells=cells, condition=pretrained({"optim.base_rate": rate}))
    for rate, cells in _TABLE_15A_CELLS.items()
  ),
)

_TABLE_15B_CELLS = {
  1e-7: (72.1, 90.4),
  5e-7: (best(72.6), best(91.0)),
  1e-6: (72.5, 90.8),
  5e-6: (spread(71.0, 0.3), 90.0),
  1e-5: (spread(69.6, 0.4), 89.3),
}

TABLE_15B = Table(
  "15b",
  "Weight decay, 300 epochs",
  ("Weight decay coefficient",),
  _BYOL,
  tuple(
    row(f"{decay:.0e}", cells=cells, condition=pretrained({"optim.weight_decay": decay}))
    for decay, cells in _TABLE_15B_CELLS.items()
  ),
)

# BYOL top-1, SimCLR top-1, BYOL top-5, SimCLR top-5.
_TABLE_16_CELLS = {
  4096: (best(72.5), 67.9, best(90.8), 88.5),
  2048: (72.4, 67.8, 90.7, 88.5),
  1024: (72.2, 67.4, 90.7, 88.1),
  512: (72.2, 66.5, 90.8, 87.6),
  256: (71.8, spread(64.3, 2.1), 90.7, spread(86.3, 1.0)),
  128: (spread(69.6, 0.5), 63.6, 89.6, 85.9),
  64: (spread(59.7, 1.5), spread(59.2, 2.9), spread(83.2, 1.2), spread(83.0, 1.9)),
}

TABLE_16 = Table(
  "16",
  "Influence of the batch size, 300 epochs",
  ("Batch size",),
  _BYOL_AND_SIMCLR,
  tuple(
    row(
      str(size),
      cells=cells,
      condition=pretrained({"train.micro_batch": 0 if size == 4096 else size}),
    )
    for size, cells in _TABLE_16_CELLS.items()
  ),
  "Gradients are averaged over 4096 / size consecutive passes, and the target moves once per 4096 "
  "images (G.2): train.micro_batch, not train.batch_size.",
)


def _both(**fields: float) -> Condition:
  """Returns the required settings of a table row that changes the augmentations of pretraining.

  The changes apply to both views of an image.

  Args:
    **fields: names of augmentation settings of a view, with their new values.
  """
  return Condition(
    pretrain={
      f"views.{view}.{name}": x for view in ("view1", "view2") for name, x in fields.items()
    }
  )


_NO_FLIP = _both(flip_probability=0.0)
_NO_JITTER = _both(jitter_probability=0.0)
_NO_GRAY = _both(grayscale_probability=0.0)
_NO_BLUR = _both(blur_probability=0.0)
_NO_SOLARISE = _both(solarise_probability=0.0)
_NO_COLOUR = _NO_JITTER.but(_NO_GRAY)
_NO_SECOND_BLUR = Condition(pretrain={"views.view2.blur_probability": 0.0})
_NO_SECOND_SOLARISE = Condition(pretrain={"views.view2.solarise_probability": 0.0})
_CROP_AND_FLIP = _NO_COLOUR.but(_NO_BLUR).but(_NO_SOLARISE)

TABLE_17 = Table(
  "17",
  "Ablation on image transformations, 300 epochs",
  ("Image augmentation",),
  _BYOL_AND_SIMCLR,
  (
    row("Baseline", cells=(best(72.5), 67.9, best(90.8), 88.5), condition=Condition()),
    row("Remove flip", cells=(71.9, 67.3, 90.6, 88.2), condition=_NO_FLIP),
    row("Remove blur", cells=(71.2, 65.2, 90.3, 86.6), condition=_NO_BLUR),
    row(
      "Remove color (jittering and grayscale)",
      cells=(spread(63.4, 0.7), 45.7, spread(85.3, 0.5), 70.6),
      condition=_NO_COLOUR,
    ),
    row("Remove color jittering", cells=(71.8, 63.7, 90.7, 85.9), condition=_NO_JITTER),
    row("Remove grayscale", cells=(70.3, 61.9, 89.8, 84.1), condition=_NO_GRAY),
    row("Remove blur in T'", cells=(72.4, 67.5, 90.8, 88.4), condition=_NO_SECOND_BLUR),
    row("Remove solarize in T'", cells=(72.3, 67.7, 90.8, 88.2), condition=_NO_SECOND_SOLARISE),
    row(
      "Remove blur and solarize in T'",
      cells=(72.2, 67.4, 90.8, 88.1),
      condition=_NO_SECOND_BLUR.but(_NO_SECOND_SOLARISE),
    ),
    row(
      "Symmetric blurring/solarization",
      cells=(72.5, 68.1, 90.8, 88.4),
      condition=_both(blur_probability=0.5, solarise_probability=0.2),
    ),
    row(
      "Crop only",
      cells=(spread(59.4, 0.3), spread(40.3, 0.3), 82.4, spread(64.8, 0.4)),
      condition=_CROP_AND_FLIP.but(_NO_FLIP),
    ),
    row(
      "Crop and flip only",
      cells=(spread(60.1, 0.3), 40.2, spread(83.0, 0.3), 64.8),
      condition=_CROP_AND_FLIP,
    ),
    row(
      "Crop and color only",
      cells=(70.7, 64.2, 90.0, 86.2),
      condition=_NO_FLIP.but(_NO_BLUR).but(_NO_SOLARISE),
    ),
    row(
      "Crop and blur only",
      cells=(spread(61.1, 0.3), 41.7, 83.9, 66.4),
      condition=_NO_FLIP.but(_NO_COLOUR).but(_NO_SOLARISE),
    ),
  ),
  'The paper does not state whether rows named "... only" keep flips and solarisation; '
  "here they keep neither, unless named. Color is jittering and grayscale.",
)
