"""A user's transforms and images; worker processes import them from here."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from byolx.data.decode import DecodeError
from byolx.data.sources.base import Example
from byolx.data.transforms import Array, Transform


class Boxes(NamedTuple):
  """Padded boxes of one image."""

  corners: Any
  classes: Any
  crowd: Any


@dataclasses.dataclass(frozen=True)
class Dense(Transform):
  """Arrays of many types and shapes, made of the image, its label and two random streams."""

  side: int = 6

  @property
  def arrays(self):
    side = self.side
    return {
      "picture": Array((side, side, 3), np.uint8),
      "depth": Array((side, side), np.float32),
      "turns": Array((), np.int32),
      "valid": Array((side, side), bool),
      "place": Array((2,), np.int16),
      "nothing": Array((0, 4), np.float32),
      "weight": Array((), np.float32),
      "boxes": Boxes(
        Array((3, 4), np.float32), Array((3,), np.dtype(np.int32)), Array((), np.bool_)
      ),
    }

  def __call__(self, example, random, rows):
    rng = random.generator()
    rows["picture"][...] = example.image[:1, :1]
    rows["depth"][...] = rng.random((self.side, self.side), np.float32)
    rows["turns"][...] = example.label * 10 + rng.integers(4)
    rows["valid"][...] = rows["depth"] > 0.5
    rows["place"][...] = random.record, random.epoch
    rows["weight"][...] = rng.random()
    rng = random.generator(1)
    rows["boxes"].corners[...] = rng.random((3, 4), np.float32)
    rows["boxes"].classes[...] = rng.integers(10, size=3)
    rows["boxes"].crowd[...] = rng.random() < 0.5


@dataclasses.dataclass(frozen=True)
class Scalars(Transform):
  """No array has axes of its own."""

  @property
  def arrays(self):
    return {"grey": Array((), np.uint8), "noise": Array((), np.float32)}

  def __call__(self, example, random, rows):
    rows["grey"][...] = example.image[0, 0, 0]
    rows["noise"][...] = random.generator().random()


@dataclasses.dataclass(frozen=True, eq=False)
class Colours:
  """`count` images of one colour each, of different sizes; those in `bad` cannot be read."""

  count: int
  bad: frozenset = frozenset()
  name: str = "colours"
  classes: tuple = ("zero", "one", "two")

  @property
  def labels(self):
    return (np.arange(self.count) % 3).astype(np.int32)

  @property
  def names(self):
    return tuple(f"{i}.png" for i in range(self.count))

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.bad:
      raise DecodeError(f"{index}.png: broken")
    image = np.full((5 + index % 3, 4 + index % 5, 3), index % 256, np.uint8)
    return Example(image, index % 3, f"{index}.png")
