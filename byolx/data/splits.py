"""Selects examples of a data set: class-balanced subsets of the labels, and held-out splits.

The paper trains on 1 % and 10 % of the labels (section 4.1 and appendix D.1) and on other fractions
(Figure 4). If a data set has no test or validation split, some of its training examples are held out
instead. For ImageNet these are the images that the paper holds out (appendix D.1), whatever the order
of the files. All functions depend on labels, names and seeds alone, and read no image.
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
  """Draws a class-balanced subset of the labels.

  For k labels and C classes, floor(k / C) examples are drawn from each class. One more example is drawn
  from each of k mod C random classes. If a class has fewer examples, all of them are drawn, and the rest
  is drawn from the other classes. With equal labels and seed, a larger subset contains a smaller one.

  Args:
    labels: class of each example, -1 for unlabelled examples, which are never drawn.
    amount: number k of labels as an int, or fraction of the examples as a float in (0, 1]. A fraction
      gives k = round(amount * n), where n is the number of all examples. This k is then limited: it is
      at least the number of classes present and at most the number of labelled examples.
    seed: seed of the random choice of the examples, and of the classes that give one more.

  Returns:
    Sorted indices of the subset.

  Raises:
    ValueError: the fraction is outside (0, 1]; the number of labels is less than the number of
      classes or more than the number of labelled examples; no example is labelled.
  """
  labelled = np.flatnonzero(labels >= 0)
  if not len(labelled):
    raise ValueError(f"none of the {len(labels)} examples is labelled; expected classes 0, 1, ...")
  classes = np.unique(labels[labelled])
  if isinstance(amount, int | np.integer):
    count = amount
    if not len(classes) <= count <= len(labelled):
      raise ValueError(
        f"the number of labels is {count}; expected {len(classes)} (one per class) to"
        f" {len(labelled)} (all)"
      )
  else:
    if not 0 < amount <= 1:
      raise ValueError(f"the fraction of labels is {amount}; expected 0 < fraction <= 1")
    count = min(max(round(amount * len(labels)), len(classes)), len(labelled))

  # All labelled examples are ordered in rounds, with one example per class in each round. A subset
  # is the first `count` of them, so that subsets are nested.
  rng = np.random.default_rng(seed)
  turn = rng.permutation(len(classes))  # turn[c]: position of class c in each round
  shuffled = labelled[rng.permutation(len(labelled))]
  class_of = np.searchsorted(classes, labels[shuffled])
  order = np.lexsort((turn[class_of], _rank_in_class(class_of)))
  return np.sort(shuffled[order[:count]]).astype(np.int64)


def labelled_share(
  labels: Int[np.ndarray, "n"], candidates: Int[np.ndarray, "r"], share: float, seed: int
) -> Int64[np.ndarray, "k"]:
  """Draws a class-balanced subset of the candidates, as large as a share of all labelled examples.

  The share is one of all labelled examples, also those held out of training. So 1 % of ImageNet is 12,812
  images. At least one example per class is drawn. If there are not enough labelled candidates, all of
  them are returned.

  Args:
    labels: class of each example, -1 for unlabelled examples.
    candidates: indices of the examples to draw from, which are not held out.
    share: size of the subset as a share of all labelled examples, 0 < share <= 1.
    seed: seed of the random choice of the examples.

  Returns:
    Indices of the drawn examples, in the order of `candidates`.
  """
  labelled = candidates[labels[candidates] >= 0]
  present = len(np.unique(labels[labelled]))
  count = max(round(share * int(np.sum(labels >= 0))), present)
  if count >= len(labelled):
    return labelled
  return labelled[balanced_subset(labels[labelled], count, seed)]


def listed(names: Sequence[str], selection: Sequence[str]) -> Int64[np.ndarray, "k"]:
  """Returns the indices of the examples whose names are in the list `selection`.

  First the full names are compared. If any of them is not found, only the parts of all names after the
  last slash are compared.

  Args:
    names: name of each example.
    selection: list of names to find, in any order; duplicates are ignored.

  Returns:
    Sorted indices of the examples.

  Raises:
    ValueError: a name of the list matches no example, or its part after the last slash matches several.
  """
  index_of_name = {name: index for index, name in enumerate(names)}
  if all(name in index_of_name for name in selection):
    return np.unique([index_of_name[name] for name in selection]).astype(np.int64)
  index_of_base: dict[str, int] = {}
  for index, name in enumerate(names):
    base = name.rpartition("/")[2]
    index_of_base[base] = -1 if base in index_of_base else index
  bases = [name.rpartition("/")[2] for name in selection]
  missing = [base for base in bases if base not in index_of_base]
  if missing:
    raise ValueError(
      f"{len(missing)} of {len(bases)} listed images are missing, such as {missing[0]}; expected "
      f"names such as {names[0].rpartition('/')[2] if len(names) else 'those of images'}"
    )
  ambiguous = [base for base in bases if index_of_base[base] < 0]
  if ambiguous:
    raise ValueError(f"{len(ambiguous)} listed names match several images, such as {ambiguous[0]}")
  return np.unique([index_of_base[base] for base in bases]).astype(np.int64)


def read_list(path: str | os.PathLike[str]) -> list[str]:
  """Reads a file with one name per line, and returns the names; empty lines are ignored.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, encoding="utf-8", errors="surrogateescape") as file:
    return [line.strip() for line in file if line.strip()]


def stratified_holdout(
  labels: Int[np.ndarray, "n"], share: float, seed: int, names: Sequence[str] | None = None
) -> tuple[Int64[np.ndarray, "r"], Int64[np.ndarray, "h"]]:
  """Divides the examples into a held-out part and the remaining ones, class by class.

  Of n examples, ceil(share * n) are held out. The number for each class is in proportion to its size. It
  is rounded down, and the classes with the largest remainders then give one more example. At least one
  example of each class remains, so fewer examples are held out if classes are very small. The label -1
  counts as a class.

  Args:
    labels: class of each example, -1 if it is unlabelled.
    share: share of the examples held out, 0 <= share < 1.
    seed: seed of the choice of examples within each class.
    names: name of each example; None for a random choice. With names, examples are chosen by a hash of
      seed and name. Their choice then does not depend on the order of the examples, and hardly changes
      when examples are added.

  Returns:
    Two sorted arrays of indices: the remaining examples, and those held out.

  Raises:
    ValueError: the share is outside [0, 1), or the numbers of names and labels differ.
  """
  if not 0 <= share < 1:
    raise ValueError(f"the share to hold out is {share}; expected 0 <= share < 1")
  if names is not None and len(names) != len(labels):
    raise ValueError(f"{len(names)} names were given for {len(labels)} labels; expected one each")
  if not len(labels):
    return np.empty(0, np.int64), np.empty(0, np.int64)
  if names is None:
    order = np.random.default_rng(seed).permutation(len(labels))
  else:
    order = np.array(sorted(range(len(names)), key=lambda i: _hash(names[i], seed)))
  _, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  quotas = _quotas(sizes, _ceil(share * len(labels)))
  held = np.zeros(len(labels), bool)
  held[order] = _rank_in_class(class_of[order]) < quotas[class_of[order]]
  return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


IMAGENET_VALIDATION = {"last_10009": 10009, "first_10000": 10000}
"""Number of ImageNet's training images that each rule of `imagenet_validation` holds out."""


def imagenet_validation(
  names: Sequence[str], rule: str
) -> tuple[Int64[np.ndarray, "r"], Int64[np.ndarray, "h"]]:
  """Divides ImageNet's training images into a validation split and the remaining ones.

  The paper holds out "the last 10009 images of the official TensorFlow ImageNet split" (appendix
  D.1). TensorFlow Datasets sorts the images by md5("train" + file name), and the last 8 of its 1024
  shards have 10009 of the 1,281,167 images. The authors' code holds out the first 10000 instead.

  Args:
    names: name of each training image. The part up to the last slash, its folders, is ignored.
    rule: name of the rule: 'last_10009' holds out the last 10009 images in the order of TensorFlow
      Datasets, 'first_10000' the first 10000.

  Returns:
    Two sorted arrays of indices: the remaining images, and those held out.

  Raises:
    ValueError: the rule is unknown, or no image would remain.
  """
  if rule not in IMAGENET_VALIDATION:
    raise ValueError(f"rule is {rule!r}; expected one of {', '.join(IMAGENET_VALIDATION)}")
  count = IMAGENET_VALIDATION[rule]
  if len(names) <= count:
    raise ValueError(
      f"{rule} holds out {count} of {len(names)} training images; expected more than {count}"
    )
  salted = hashlib.md5(b"train", usedforsecurity=False)
  hashes = bytearray()
  for name in names:
    md5 = salted.copy()
    md5.update(os.fsencode(name.rpartition("/")[2]))
    hashes += md5.digest()
  high, low = np.frombuffer(hashes, ">u8").reshape(-1, 2).T
  order = np.lexsort((low, high))
  held = np.zeros(len(names), bool)
  held[order[-count:] if rule == "last_10009" else order[:count]] = True
  return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def _rank_in_class(class_of):
  """Returns an array with one number per element: how many earlier elements have the same class."""
  order = np.argsort(class_of, kind="stable")
  starts = np.searchsorted(class_of[order], class_of[order])
  ranks = np.empty(len(class_of), np.int64)
  ranks[order] = np.arange(len(class_of)) - starts
  return ranks


def _quotas(sizes, total):
  """Computes the number of examples to hold out from each class, in proportion to the class sizes.

  Args:
    sizes: number of examples of each class.
    total: number of examples to hold out in all. Fewer are held out if this is necessary for one
      example of each class to remain.
  """
  total = min(total, int((sizes - 1).sum()))
  exact = total * sizes / sizes.sum()
  quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), sizes - 1)
  while missing := total - int(quotas.sum()):
    remainders = np.where(quotas < sizes - 1, exact - quotas, -np.inf)
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    quotas = np.minimum(quotas, sizes - 1)
  return quotas


def _ceil(value):
  """Rounds up, but ignores tiny excesses: 0.07 * 100, which is 7.000000000000001, gives 7."""
  return math.ceil(value - 1e-9)


def _hash(name, seed):
  return hashlib.sha256(b"%d/" % seed + os.fsencode(name)).digest()
