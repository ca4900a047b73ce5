"""Tables 11 to 13 (appendices E and F): transfer to other tasks and data sets."""

from byolx.reports.paper.settings import LINEAR, LOCAL_VALIDATION, MAIN, RESNET50, measured
from byolx.reports.paper.table import Column, Condition, Table, best, row

TABLE_11 = Table(
  "11",
  "Transfer results in semantic segmentation and object detection (PASCAL VOC)",
  ("Method",),
  (Column("AP50"), Column("mIoU")),
  (
    row("Supervised-IN [9]", cells=(74.4, 74.4), theirs=True),
    row("RelPos [23], by [40]*", cells=(66.8, None), theirs=True),
    row("Multi-task [40]*", cells=(70.5, None), theirs=True),
    row("LocalAgg [98]", cells=(69.1, None), theirs=True),
    row("MoCo [9]", cells=(74.9, 72.5), theirs=True),
    row("MoCo + IG-1B [9]", cells=(75.6, 73.6), theirs=True),
    row("CPC [32]**", cells=(76.6, None), theirs=True),
    row("SimCLR (repro)", cells=(75.2, 75.2)),
    row("BYOL (ours)", cells=(best(77.5), best(76.3))),
  ),
  "* uses a larger model (ResNet-101). ** uses an even larger model (ResNet-161).",
)

TABLE_12 = Table(
  "12",
  "Transfer results on NYU v2 depth estimation; rms and rel: lower is better",
  ("Method",),
  (
    Column("pct.< 1.25"),
    Column("pct.< 1.25²"),
    Column("pct.< 1.25³"),
    Column("rms", unit="m", higher_is_better=False, decimals=3),
    Column("rel", unit="", higher_is_better=False, decimals=3),
  ),
  (
    row("Supervised-IN [83]", cells=(81.1, 95.3, 98.8, 0.573, best(0.127)), theirs=True),
    row("RelPos [23], by [40]*", cells=(80.6, 94.7, 98.3, best(0.399), 0.146), theirs=True),
    row("Color [41], by [40]*", cells=(76.8, 93.5, 97.7, 0.444, 0.164), theirs=True),
    row("Exemplar [46, 40]*", cells=(71.3, 90.6, 96.5, 0.513, 0.191), theirs=True),
    row("Mot. Seg. [99], by [40]*", cells=(74.2, 92.4, 97.4, 0.473, 0.177), theirs=True),
    row("Multi-task [40]*", cells=(79.3, 94.2, 98.1, 0.422, 0.152), theirs=True),
    row("SimCLR (repro)", cells=(83.3, 96.5, 99.1, 0.557, 0.134)),
    row("BYOL (ours)", cells=(best(84.6), best(96.7), best(99.1), 0.541, 0.129)),
  ),
)


def _on(data: str) -> Condition:
  """Returns the required settings of a run for linear evaluation (D.1) on a data set.

  The encoder must be a ResNet-50 that was pretrained with the paper's main settings (`MAIN`).

  Args:
    data: name of the data set of the evaluation, "imagenet" or "places365".
  """
  # The paper names no validation images of Places365.
  validation = LOCAL_VALIDATION if data == "imagenet" else {}
  config = {**LINEAR, **RESNET50, **validation}
  return Condition(measured("linear", data=data), config, MAIN, origin_known=True)


def _from(data: str) -> Condition:
  return Condition({"pretrained_on": data})


TABLE_13 = Table(
  "13",
  "Transfer results (linear evaluation, ResNet-50) from Places365 (PL), and of BYOL trained on "
  "ImageNet (BYOL-IN)",
  ("Method",),
  (
    Column("Places365", condition=_on("places365")),
    Column("ImageNet", condition=_on("imagenet")),
    *(
      Column(name)
      for name in (
        "Food101", "CIFAR10", "CIFAR100", "Birdsnap", "SUN397", "Cars", "Aircraft", "DTD", "Pets",
        "Caltech-101", "Flowers",
      )
    ),
  ),
  (
    row(
      "BYOL-IN",
      cells=(51.0, 74.3, 75.3, 91.3, 78.4, 57.3, 62.6, 67.2, 60.6, 76.5, 90.4, 94.3, 96.1),
      condition=_from("imagenet"),
    ),
    row(
      "BYOL-PL",
      cells=tuple(
        map(
          best,
          (53.2, 58.5, 64.7, 84.5, 66.1, 28.8, 64.2, 55.6, 55.9, 68.5, 66.1, 84.3, 90.0),
        )
      ),
      condition=_from("places365"),
    ),
    row(
      "SimCLR-PL",
      cells=(53.0, 56.5, 61.7, 80.8, 61.1, 21.2, 62.5, 40.1, 44.3, 64.3, 59.4, 77.1, 85.9),
    ),
  ),
  "Places365 and ImageNet by the protocol of appendix D.1, the others by that of E.2. Aircraft, Pets, "
  "Caltech-101 and Flowers: mean per-class accuracy; the others: top-1.",
)  # fmt: skip
