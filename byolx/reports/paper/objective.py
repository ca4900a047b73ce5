"""Tables 18 to 22 (appendices G.4 to G.6 and J), and the results that the appendices state in their text.

The tables vary the loss, the target network, and the predictor with its learning rate.
"""

from byolx.reports.paper.settings import RESNET50, ablation, linear, pretrained
from byolx.reports.paper.table import Cell, Column, Condition, Table, best, row, spread

_TOP1 = (Column("Top-1", condition=ablation("top1")),)
_TOP1_AND_TOP5 = (*_TOP1, Column("Top-5", condition=ablation("top5")))

_BASELINE = Condition()
_HARD_COPY = pretrained({"byol.target": "stop_gradient"})

# Loss weight beta: (temperature alpha, top-1, top-5).
_TABLE_18_CELLS: dict[str, tuple[tuple[str, Cell | float, Cell | float], ...]] = {
  "0": (("0.1", 72.5, 90.8),),
  "0.1": (
    ("0.01", 72.2, 90.7),
    ("0.1", 72.4, 90.9),
    ("0.3", best(72.7), 91.0),
    ("1", 72.6, 90.9),
    ("3", 72.5, 90.9),
    ("10", 72.5, 90.9),
  ),
  "0.5": (
    ("0.01", 70.9, 90.2),
    ("0.1", 72.0, 90.8),
    ("0.3", best(72.7), best(91.2)),
    ("1", 72.7, 91.1),
    ("3", 72.6, 91.1),
    ("10", 72.5, 91.0),
  ),
  "1": (
    ("0.01", spread(53.9, 0.5), spread(77.5, 0.5)),
    ("0.1", 70.9, 90.3),
    ("0.3", best(72.7), 91.1),
    ("1", best(72.7), 91.1),
    ("3", 72.6, 91.0),
    ("10", 72.6, 91.1),
  ),
}

TABLE_18 = Table(
  "18",
  "Temperature and weight of the dispersion term, with a predictor and a target network, 300 epochs",
  ("Loss weight β", "Temperature α"),
  _TOP1_AND_TOP5,
  tuple(
    row(beta, alpha, cells=tuple(numbers), condition=_BASELINE if beta == "0" else None)
    for beta, of_beta in _TABLE_18_CELLS.items()
    for alpha, *numbers in of_beta
  ),
  "BYOL is β = 0, at any temperature.",
)


def _variant(predictor: bool, target: str) -> Condition:
  """Returns the required settings of a run for a variant of BYOL without negative examples (Table 19).

  Args:
    predictor: whether the variant has a predictor.
    target: kind of target network, a value of the config field `byol.target`.
  """
  return pretrained({"byol.predictor": predictor, "byol.target": target})


TABLE_19 = Table(
  "19",
  "Intermediate variants between BYOL and SimCLR, 300 epochs; sg means stop gradient",
  ("Method", "Predictor", "Target parameters", "β"),
  _TOP1,
  (
    row("BYOL", "✓", "ξ", "0", cells=(best(72.5),), condition=_variant(True, "ema")),
    row("", "✓", "ξ", "1", cells=(70.9,)),
    row("", "", "ξ", "1", cells=(70.7,)),
    row("", "✓", "sg(θ)", "1", cells=(70.2,)),
    row("SimCLR", "", "θ", "1", cells=(69.4,)),
    row("", "✓", "sg(θ)", "1", cells=(70.1,)),
    row("", "", "sg(θ)", "1", cells=(69.2,)),
    row("", "✓", "θ", "1", cells=(69.0,)),
    row("", "✓", "sg(θ)", "0", cells=(5.5,), condition=_variant(True, "stop_gradient")),
    row("", "✓", "θ", "0", cells=(0.3,), condition=_variant(True, "online")),
    row("", "", "ξ", "0", cells=(0.2,), condition=_variant(False, "ema")),
    row("", "", "sg(θ)", "0", cells=(0.1,), condition=_variant(False, "stop_gradient")),
    row("", "", "θ", "0", cells=(0.1,), condition=_variant(False, "online")),
  ),
  "SimCLR is β = 1 with neither predictor nor target network (G.5): our copy of the source has the "
  "name one row too high. The source lists predictor, sg(θ), β = 1 twice, with 70.2 and 70.1.",
)

TABLE_20 = Table(
  "20",
  "Normalizations in the loss, 300 epochs",
  ("Normalization",),
  _TOP1_AND_TOP5,
  (
    row("ℓ2-norm", cells=(best(72.5), best(90.8)), condition=_BASELINE),
    row("LayerNorm", cells=(spread(72.5, 0.4), 90.1)),
    row("No normalization", cells=(67.4, 87.1)),
    row("BatchNorm", cells=(65.3, 85.3)),
  ),
)

TABLE_21 = Table(
  "21",
  "No slowly moving target network, the online network's weights copied into it, and a multiplier λ "
  "of the predictor's learning rate, 300 epochs",
  ("λ",),
  _TOP1,
  (
    row("0", cells=(0.01,)),
    row("1", cells=(5.5,), condition=_HARD_COPY),
    row("2", cells=(spread(62.8, 1.5),)),
    row("10", cells=(66.6,)),
    row("20", cells=(spread(66.3, 0.3),)),
    row("Baseline", cells=(72.5,), condition=_BASELINE),
  ),
  "λ = 1 is the run of Table 19 with predictor, sg(θ), β = 0; Table 22 has 3.2 ± 2.9 for it.",
)

# Multiplier mu of the projector's learning rate: top-1 at lambda = 1, 1.5, 2, 5, 10.
_TABLE_22_CELLS = {
  "1": (spread(3.2, 2.9), spread(25.7, 6.6), spread(60.8, 2.9), spread(66.7, 0.4), 66.9),
  "1.5": (
    spread(1.4, 2.0), spread(9.2, 7.0), spread(55.2, 5.8), spread(61.5, 0.6), spread(66.0, 0.3),
  ),
  "2": (spread(2.0, 2.8), spread(5.3, 1.9), spread(15.8, 13.4), spread(60.9, 0.8), 66.3),
  "5": (
    spread(1.5, 0.9), spread(2.5, 1.5), spread(2.5, 1.4), spread(20.5, 2.0), spread(60.5, 0.6),
  ),
  "10": (0.1, spread(2.1, 0.3), spread(1.9, 0.8), spread(2.8, 0.4), spread(8.3, 6.8)),
}  # fmt: skip

TABLE_22 = Table(
  "22",
  "No slowly moving target network, and multipliers μ of the projector's and λ of the predictor's "
  "learning rate, top-1 at 300 epochs",
  ("μ",),
  (
    Column("1", "λ =", ablation("top1")),
    *(Column(multiplier, "λ =") for multiplier in ("1.5", "2", "5", "10")),
  ),
  tuple(
    row(mu, cells=cells, condition=_HARD_COPY if mu == "1" else None)
    for mu, cells in _TABLE_22_CELLS.items()
  ),
  "λ = μ = 1 is the run of Table 21 with λ = 1, which has 5.5 for it.",
)

_SMALL_BATCH = Condition(
  config=RESNET50,
  pretrain={"train.batch_size": 512, "optim.base_rate": 0.4, "byol.tau_base": 0.9995},
  origin_known=True,
)

TEXT = Table(
  "text",
  "Results that the appendices state only in their text",
  ("Appendix", "Result"),
  (Column("Top-1", condition=linear("top1")),),
  (
    row("F", "Places365: ResNet-50v2, supervised [73]", cells=(55.2,), theirs=True),
    row("G.5", "SimCLR as published, 300 epochs", cells=(67.9,)),
    row("G.5", "SimCLR, loss times 2α, larger projector, 300 epochs", cells=(69.2,)),
    row("H", "BYOL, batch size 512, 1000 epochs", cells=(73.7,), condition=_SMALL_BATCH),
    row("J.2", "Optimal linear predictor in closed form, no target, 300 epochs", cells=(50.3,)),
  ),
  "G.5's 69.2 is the run that Table 19 has with 69.4.",
)
