"""tf.Example messages, parsed without TensorFlow: protocol buffers, just so far.

  Example   { Features features = 1; }
  Features  { map<string, Feature> feature = 1; }, whose entries are { key = 1; value = 2; }
  Feature   { oneof: BytesList = 1, FloatList = 2, Int64List = 3 }, each { repeated value = 1; }

Nothing is copied but what is asked for, and whatever the bytes, nothing but ValueError is raised.
"""

from collections.abc import Iterator


def features(record: bytes) -> dict[str, memoryview]:
  """The serialised Feature of every key of a tf.Example; raises ValueError if it is damaged."""
  found = {}
  for part in _messages(memoryview(record), 1):
    for entry in _messages(part, 1):
      key = bytes(next(_messages(entry, 1), b"")).decode("utf-8", "surrogateescape")
      found[key] = next(_messages(entry, 2), memoryview(b""))
  return found


def first_bytes(features: dict[str, memoryview], key: str) -> bytes:
  """The first bytes of a feature; raises ValueError if it has none."""
  for values in _messages(_feature(features, key), 1):
    for value in _messages(values, 1):
      return bytes(value)
  raise ValueError(f"the feature {key!r} holds no bytes")


def first_int(features: dict[str, memoryview], key: str) -> int:
  """The first whole number of a feature; raises ValueError if it has none."""
  for values in _messages(_feature(features, key), 3):
    for number, value in _fields(values):
      if number != 1:
        continue
      if not isinstance(value, int):  # several in a row, packed
        value, _ = _varint(value, 0)
      return value - (1 << 64) if value >> 63 else value
  raise ValueError(f"the feature {key!r} holds no whole number")


def _feature(features: dict[str, memoryview], key: str) -> memoryview:
  if key not in features:
    raise ValueError(f"no feature {key!r}; there are: {', '.join(sorted(features)) or 'none'}")
  return features[key]


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
  """The strings and submessages with this field number."""
  for number, value in _fields(message):
    if number == wanted and not isinstance(value, int):
      yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """(field number, value) in order; numbers of fixed size come as their bytes."""
  position = 0
  while position < len(message):
    tag, position = _varint(message, position)
    kind = tag & 7
    if kind == 0:
      value, position = _varint(message, position)
    else:
      if kind == 2:
        size, position = _varint(message, position)
      elif kind in (1, 5):
        size = 8 if kind == 1 else 4
      else:
        raise ValueError(f"damaged tf.Example: wire type {kind}")
      if size > len(message) - position:
        raise ValueError(f"damaged tf.Example: {size} bytes wanted, {len(message) - position} left")
      value = message[position : position + size]
      position += size
    yield tag >> 3, value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
  """(number, position behind it)."""
  number = 0
  for shift in range(0, 64, 7):
    if position >= len(message):
      raise ValueError("damaged tf.Example: it ends inside a number")
    byte = message[position]
    position += 1
    number |= (byte & 0x7F) << shift
    if byte < 0x80:
      return number & (1 << 64) - 1, position
  raise ValueError("damaged tf.Example: a number of more than 64 bits")
