"""Parses tf.Example messages without TensorFlow.

A tf.Example is a message in the format of protocol buffers. Only this part of the format is supported:

  Example   { Features features = 1; }
  Features  { map<string, Feature> feature = 1; }, whose entries are { key = 1; value = 2; }
  Feature   { oneof: BytesList = 1, FloatList = 2, Int64List = 3 }, each { repeated value = 1; }

Only the requested values are copied. A damaged message raises ValueError, whatever bytes it has.
"""

from collections.abc import Iterator


def features(record: bytes) -> dict[str, memoryview]:
  """Parses a tf.Example, and returns the serialised message of each feature by its key.

  Raises:
    ValueError: the message is damaged.
  """
  serialised = {}
  for part in _messages(memoryview(record), 1):
    for entry in _messages(part, 1):
      key = bytes(next(_messages(entry, 1), b"")).decode("utf-8", "surrogateescape")
      serialised[key] = next(_messages(entry, 2), memoryview(b""))
  return serialised


def first_bytes(features: dict[str, memoryview], key: str) -> bytes:
  """Returns the first byte string of the feature `key` of a tf.Example.

  The first argument is the dict that the function `features` returns.

  Raises:
    ValueError: the feature is missing, damaged or has no byte string.
  """
  for values in _messages(_feature(features, key), 1):
    for value in _messages(values, 1):
      return bytes(value)
  raise ValueError(f"the feature {key!r} holds no bytes")


def first_int(features: dict[str, memoryview], key: str) -> int:
  """Returns the first integer of the feature `key` of a tf.Example.

  The first argument is the dict that the function `features` returns.

  Raises:
    ValueError: the feature is missing, damaged or has no integer.
  """
  for values in _messages(_feature(features, key), 3):
    for number, value in _fields(values):
      if number != 1:
        continue
      if not isinstance(value, int):  # packed: several integers in one field
        value, _ = _varint(value, 0)
      return value - (1 << 64) if value >> 63 else value
  raise ValueError(f"the feature {key!r} holds no integer")


def _feature(features: dict[str, memoryview], key: str) -> memoryview:
  if key not in features:
    raise ValueError(f"no feature {key!r}; there are: {', '.join(sorted(features)) or 'none'}")
  return features[key]


def _messages(message: memoryview, field_number: int) -> Iterator[memoryview]:
  """Yields the contents of all strings and submessages of `message` that have this field number."""
  for number, value in _fields(message):
    if number == field_number and not isinstance(value, int):
      yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """Yields (field number, value) of each field of a message, in order.

  The value is an int for a varint (an integer of variable length), otherwise the bytes of the field.

  Raises:
    ValueError: the message is damaged.
  """
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
        raise ValueError(
          f"damaged tf.Example: {size} bytes expected, {len(message) - position} left"
        )
      value = message[position : position + size]
      position += size
    yield tag >> 3, value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
  """Reads a varint (an integer of variable length) of a message.

  Returns:
    The unsigned integer, and the position of the byte that follows it.

  Raises:
    ValueError: the message ends inside the integer, or the integer has more than 64 bits.
  """
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
