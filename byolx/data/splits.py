"""Which examples are used: balanced subsets of the labels, and held-out shares.

Section 4.1 and appendix D.1 train on 1 % and 10 % of the labels; Figure 4 on other fractions. A
held-out share stands in where a data set has no test or validation split of its own. ImageNet's
validation images are those of the paper (appendix D.1), whatever order the files are in. Everything
here is a function of labels, names and seeds: it never looks at an image or a disk.
"""

import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64


def balanced_subset(
  labels: Int[np.ndarray, "n"], amount: float | int, seed: int
) -> Int64[np.ndarray, "k"]:
  """Indices of a class-balanced subset of the labels, sorted.

  Every class gets floor(k / C) of the k labels and seeded-chosen classes one more. A class that
  has fewer than its part gives all it has, and the others share what is missing.

  Subsets are nested: with the same labels and seed, a smaller one lies inside a larger one.

  Args:
    labels: class of each example, -1 for unlabelled examples, which are never chosen.
    amount: a float in (0, 1] is a fraction: k = round(amount * n), where n counts all examples,
      but at least one label per class present and at most all labels. An int is k itself.
    seed: chooses the examples, and which classes get one more.

  Raises:
    ValueError: the fraction is outside (0, 1]; a count is less than the number of classes or more
      than the number of labelled examples; no example is labelled.
  """
  labelled = np.flatnonzero(labels >= 0)
  if not len(labelled):
    raise ValueError(f"none of the {len(labels)} examples is labelled; expected classes 0, 1, ...")
  classes = np.unique(labels[labelled])
  if isinstance(amount, int | np.integer):
    count = amount
    if not len(classes) <= count <= len(labelled):
      raise ValueError(
        f"{count} labels were asked for; expected {len(classes)} (one per class) to"
        f" {len(labelled)} (all)"
      )
  else:
    if not 0 < amount <= 1:
      raise ValueError(f"the fraction of labels is {amount}; expected 0 < fraction <= 1")
    count = min(max(round(amount * len(labels)), len(classes)), len(labelled))

  # One endless dealing, a card to every class in turn; a subset is its first `count` cards.
  rng = np.random.default_rng(seed)
  turn = rng.permutation(len(classes))  # turn[c]: when class c is served in every round
  shuffled = labelled[rng.permutation(len(labelled))]
  class_of = np.searchsorted(classes, labels[shuffled])
  dealt = np.lexsort((turn[class_of], _rank_in_class(class_of)))
  return np.sort(shuffled[dealt[:count]]).astype(np.int64)


def labelled_share(
  labels: Int[np.ndarray, "n"], rest: Int[np.ndarray, "r"], share: float, seed: int
) -> Int64[np.ndarray, "k"]:
  """A class-balanced share of all labelled examples, drawn from the rest that is not held out.

  A share counts all labelled examples: 1 % of ImageNet are 12,811 images, held-out ones or not. A
  share that is more than the rest is the rest.

  Args:
    labels: class of every example, -1 for unlabelled ones.
    rest: indices of those that may be chosen.
    share: 0 < share <= 1.
    seed: see `balanced_subset`.
  """
  known = rest[labels[rest] >= 0]
  present = len(np.unique(labels[known]))
  count = max(round(share * int(np.sum(labels >= 0))), present)
  return known[balanced_subset(labels[known], count, seed)] if count < len(known) else known


def listed(names: Sequence[str], wanted: Sequence[str]) -> Int64[np.ndarray, "k"]:
  """Indices, sorted, of the names that a list has.

  Names are compared whole, or where some are not there like that, by what follows their last slash.

  Raises:
    ValueError: a name of the list is not there, or fits several.
  """
  whole = {name: number for number, name in enumerate(names)}
  if all(name in whole for name in wanted):
    return np.unique([whole[name] for name in wanted]).astype(np.int64)
  index: dict[str, int] = {}
  for number, name in enumerate(names):
    base = name.rpartition("/")[2]
    index[base] = -1 if base in index else number
  bases = [name.rpartition("/")[2] for name in wanted]
  missing = [base for base in bases if base not in index]
  if missing:
    raise ValueError(
      f"{len(missing)} of {len(bases)} listed images are not there, such as {missing[0]}; expected "
      f"names such as {names[0].rpartition('/')[2] if len(names) else 'those of images'}"
    )
  twice = [base for base in bases if index[base] < 0]
  if twice:
    raise ValueError(f"{len(twice)} listed names fit several images, such as {twice[0]}")
  return np.unique([index[base] for base in bases]).astype(np.int64)


def read_list(path: str | os.PathLike[str]) -> list[str]:
  """The names in a file, one a line.

  Raises:
    OSError: it cannot be read.
  """
  with open(path, encoding="utf-8", errors="surrogateescape") as file:
    return [line.strip() for line in file if line.strip()]


def stratified_holdout(
  labels: Int[np.ndarray, "n"], share: float, seed: int, names: Sequence[str] | None = None
) -> tuple[Int64[np.ndarray, "r"], Int64[np.ndarray, "h"]]:
  """Splits examples in two with the same class proportions: (rest, held out), sorted indices.

  ceil(share * n) examples are held out, as evenly over the classes as whole numbers allow (the
  largest remainders are rounded up). The rest keeps at least one example of every class, so less
  is held out where classes are that small. -1 counts as a class of its own.

  Args:
    labels: class of each example.
    share: 0 <= share < 1.
    seed: chooses the examples.
    names: if given, a name per example, by whose digest the examples of a class are chosen: then
      the split is a function of names and seed, and hardly changes when examples are added.

  Raises:
    ValueError: the share is outside [0, 1), or there is not one name per example.
  """
  if not 0 <= share < 1:
    raise ValueError(f"the share to hold out is {share}; expected 0 <= share < 1")
  if names is not None and len(names) != len(labels):
    raise ValueError(f"{len(names)} names were given for {len(labels)} labels; expected as many")
  if not len(labels):
    return np.empty(0, np.int64), np.empty(0, np.int64)
  if names is None:
    order = np.random.default_rng(seed).permutation(len(labels))
  else:
    order = np.array(sorted(range(len(names)), key=lambda i: _digest(names[i], seed)))
  _, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  quotas = _quotas(sizes, _ceil(share * len(labels)))
  held = np.zeros(len(labels), bool)
  held[order] = _rank_in_class(class_of[order]) < quotas[class_of[order]]
  return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


IMAGENET_VALIDATION = {"last_10009": 10009, "first_10000": 10000}
"""How many training images a rule keeps apart."""


def imagenet_validation(
  names: Sequence[str], rule: str
) -> tuple[Int64[np.ndarray, "r"], Int64[np.ndarray, "h"]]:
  """Splits ImageNet's training images in two: (rest, held out), sorted indices.

  The paper holds out "the last 10009 images of the official TensorFlow ImageNet split" (appendix
  D.1). That order is the order of md5("train" + file name); the last 8 of its 1024 shards hold
  10009 of the 1,281,167 images. The authors' code takes the first 10000 instead.

  Args:
    names: of the training images; what stands before the last slash is ignored.
    rule: 'last_10009' or 'first_10000'.

  Raises:
    ValueError: unknown rule, or not more names than are held out.
  """
  if rule not in IMAGENET_VALIDATION:
    raise ValueError(f"rule is {rule!r}; expected one of {', '.join(IMAGENET_VALIDATION)}")
  count = IMAGENET_VALIDATION[rule]
  if len(names) <= count:
    raise ValueError(
      f"{rule} are to be held out of {len(names)} training images; expected more than {count}"
    )
  salted = hashlib.md5(b"train", usedforsecurity=False)
  digests = bytearray()
  for name in names:
    digest = salted.copy()
    digest.update(os.fsencode(name.rpartition("/")[2]))
    digests += digest.digest()
  high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).T
  order = np.lexsort((low, high))
  held = np.zeros(len(names), bool)
  held[order[-count:] if rule == "last_10009" else order[:count]] = True
  return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def _rank_in_class(class_of):
  """For each element, how many of its class stand before it."""
  order = np.argsort(class_of, kind="stable")
  starts = np.searchsorted(class_of[order], class_of[order])
  ranks = np.empty(len(class_of), np.int64)
  ranks[order] = np.arange(len(class_of)) - starts
  return ranks


def _quotas(sizes, total):
  """How many to take of each class: proportional to its size, `total` in all, never the last."""
  total = min(total, int((sizes - 1).sum()))
  exact = total * sizes / sizes.sum()
  quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), sizes - 1)
  while missing := total - int(quotas.sum()):
    wanting = np.where(quotas < sizes - 1, exact - quotas, -np.inf)
    quotas[np.argsort(-wanting, kind="stable")[:missing]] += 1
    quotas = np.minimum(quotas, sizes - 1)
  return quotas


def _ceil(value):
  """The next whole number, forgiving the last bits of a product such as 0.07 * 100."""
  return math.ceil(value - 1e-9)


def _digest(name, seed):
  return hashlib.sha256(b"%d/" % seed + os.fsencode(name)).digest()
