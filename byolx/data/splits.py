"""Selection of examples: class-balanced subsets of the labels, and held-out splits.

The paper trains on 1 % and 10 % of the labels (section 4.1 and appendix D.1) and on other fractions
(Figure 4). A held-out split replaces a missing test or validation split. ImageNet's validation
images are those of the paper (appendix D.1), whatever the order of the files. All functions depend
on labels, names and seeds alone, and read no image.
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

  Each of the C classes gets floor(k / C) of the k labels, and k mod C random classes get one more.
  A class with fewer labels than that gives all of them, and the other classes share the remainder.

  Subsets are nested: with equal labels and seed, a smaller subset is part of a larger one.

  Args:
    labels: class of each example, -1 for unlabelled examples, which are never drawn.
    amount: fraction of the examples as a float in (0, 1], or number k of labels as an int. For a
      fraction, k = round(amount * n), where n counts all examples, but at least one label per
      class present and at most all labels.
    seed: seed of the draw of the examples, and of the classes with one more.

  Returns:
    Sorted indices of the subset.

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
  """Draws a class-balanced share of the labelled examples from those that are not held out.

  The share counts all labelled examples, including held-out ones: 1 % of ImageNet are 12,812
  images. If the share exceeds the labelled candidates, all of these are returned.

  Args:
    labels: class of each example, -1 for unlabelled examples.
    candidates: indices of the examples that are not held out.
    share: share of all labelled examples, 0 < share <= 1.
    seed: seed of the draw, as in `balanced_subset`.

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
  """Finds the examples of a list of names.

  Full names are compared first; unless all of them match, only the parts after the last slash are.

  Args:
    names: name of each example.
    selection: names to find, in any order; duplicates are ignored.

  Returns:
    Sorted indices of the examples.

  Raises:
    ValueError: a name of the list matches no example, or several.
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
  """Reads a file with one name per line; empty lines are ignored.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, encoding="utf-8", errors="surrogateescape") as file:
    return [line.strip() for line in file if line.strip()]


def stratified_holdout(
  labels: Int[np.ndarray, "n"], share: float, seed: int, names: Sequence[str] | None = None
) -> tuple[Int64[np.ndarray, "r"], Int64[np.ndarray, "h"]]:
  """Holds out a share of the examples, with the same class proportions in both parts.

  ceil(share * n) examples are held out, in proportion to the class sizes; the largest remainders
  are rounded up. At least one example of each class is not held out, so fewer examples are held out
  if classes are very small. The label -1 counts as a class.

  Args:
    labels: class of each example, -1 if it is unlabelled.
    share: share of the examples held out, 0 <= share < 1.
    seed: seed of the draw within each class.
    names: name of each example, or None. With names, the draw within a class is by a hash of seed
      and name: it does not depend on the order of the examples, and hardly changes when examples
      are added.

  Returns:
    (remaining, held out): sorted indices.

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
"""Number of held-out training images, by rule."""


def imagenet_validation(
  names: Sequence[str], rule: str
) -> tuple[Int64[np.ndarray, "r"], Int64[np.ndarray, "h"]]:
  """Holds out the validation images of ImageNet's training images.

  The paper holds out "the last 10009 images of the official TensorFlow ImageNet split" (appendix
  D.1). TensorFlow Datasets sorts the images by md5("train" + file name), and the last 8 of its 1024
  shards have 10009 of the 1,281,167 images. The authors' code holds out the first 10000 instead.

  Args:
    names: name of each training image; folders, the part up to the last slash, are ignored.
    rule: images held out, 'last_10009' or 'first_10000' of this order.

  Returns:
    (remaining, held out): sorted indices.

  Raises:
    ValueError: unknown rule, or too few names.
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
  """Counts, for each element, the earlier elements of the same class."""
  order = np.argsort(class_of, kind="stable")
  starts = np.searchsorted(class_of[order], class_of[order])
  ranks = np.empty(len(class_of), np.int64)
  ranks[order] = np.arange(len(class_of)) - starts
  return ranks


def _quotas(sizes, total):
  """Held-out examples per class: proportional to its size, `total` in sum, never a whole class."""
  total = min(total, int((sizes - 1).sum()))
  exact = total * sizes / sizes.sum()
  quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), sizes - 1)
  while missing := total - int(quotas.sum()):
    remainders = np.where(quotas < sizes - 1, exact - quotas, -np.inf)
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    quotas = np.minimum(quotas, sizes - 1)
  return quotas


def _ceil(value):
  """Rounds up, with a tolerance for rounding errors such as that of 0.07 * 100."""
  return math.ceil(value - 1e-9)


def _hash(name, seed):
  return hashlib.sha256(b"%d/" % seed + os.fsencode(name)).digest()
