"""tf.Example messages, written by Google's protocol buffers; damage raises ValueError only."""

import contextlib

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from byolx.data.sources.tf_example import features, first_bytes, first_int


def example_class():
  """tf.train.Example as TensorFlow's own .proto files have it."""
  file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
  repeated, one = 3, 1
  for name, kind in (("BytesList", 12), ("FloatList", 2), ("Int64List", 3)):
    message = file.message_type.add(name=name)
    message.field.add(name="value", number=1, type=kind, label=repeated)
  feature = file.message_type.add(name="Feature")
  feature.oneof_decl.add(name="kind")
  for number, name in enumerate(("BytesList", "FloatList", "Int64List"), 1):
    field = feature.field.add(name=name, number=number, type=11, label=one)
    field.type_name, field.oneof_index = f".t.{name}", 0
  container = file.message_type.add(name="Features")
  entry = container.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = True
  entry.field.add(name="key", number=1, type=9, label=one)
  entry.field.add(name="value", number=2, type=11, label=one, type_name=".t.Feature")
  container.field.add(
    name="feature", number=1, type=11, label=repeated, type_name=".t.Features.FeatureEntry"
  )
  example = file.message_type.add(name="Example")
  example.field.add(name="features", number=1, type=11, label=one, type_name=".t.Features")
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = example_class()


def serialise(values):
  """A tf.Example of bytes, lists of ints and lists of floats."""
  message = Example()
  for key, value in values.items():
    feature = message.features.feature[key]
    if isinstance(value, bytes):
      feature.BytesList.value.append(value)
    elif value and isinstance(value[0], float):
      feature.FloatList.value.extend(value)
    else:
      feature.Int64List.value.extend(value)
  return message.SerializeToString(deterministic=True)


INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES = st.dictionaries(
  st.text(max_size=20),
  st.binary(max_size=300)
  | st.lists(INT64, min_size=1, max_size=5)
  | st.lists(st.floats(width=32), min_size=1, max_size=5),
  max_size=6,
)


@given(VALUES)
def test_what_protocol_buffers_write_is_read(values):
  found = features(serialise(values))
  assert set(found) == set(values)
  for key, value in values.items():
    if isinstance(value, bytes):
      assert first_bytes(found, key) == value
    elif isinstance(value[0], int):
      assert first_int(found, key) == value[0]
    for read, kind in ((first_bytes, bytes), (first_int, int)):
      if not isinstance(value if isinstance(value, bytes) else value[0], kind):
        with pytest.raises(ValueError, match="holds no"):
          read(found, key)
  with pytest.raises(ValueError, match="no feature 'another one of them all'; there are: "):
    first_int(found, "another one of them all")


def test_numbers_that_are_not_packed():
  # features { feature { key: "k" value { int64_list { value: 300 value: 7 } } } }, by hand.
  int64_list = b"\x08\xac\x02\x08\x07"
  value = b"\x1a\x05" + int64_list
  entry = b"\x0a\x01k\x12\x07" + value
  inner = b"\x0a" + bytes([len(entry)]) + entry
  record = b"\x0a" + bytes([len(inner)]) + inner
  assert Example.FromString(record).features.feature["k"].Int64List.value == [300, 7]
  assert first_int(features(record), "k") == 300


def test_unknown_fields_are_passed_over():
  record = serialise({"image": b"pixels", "label": [-1]})
  extra = b"\x78\x05" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x7a\x02ab"  # field 15
  for mixed in (extra + record, record + extra):
    found = features(mixed)
    assert (first_bytes(found, "image"), first_int(found, "label")) == (b"pixels", -1)


def read_all(record):
  found = features(record)
  for key in found:
    for read in (first_bytes, first_int):
      with contextlib.suppress(ValueError):
        read(found, key)


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_value_error(record):
  with contextlib.suppress(ValueError):
    read_all(record)


@given(VALUES, st.data())
def test_damage_raises_nothing_but_value_error(values, data):
  record = bytearray(serialise(values))
  for _ in range(data.draw(st.integers(0, 3))):
    if record:
      record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
  with contextlib.suppress(ValueError):
    read_all(bytes(record[: data.draw(st.integers(0, len(record)))]))


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (b"\x0a\x05abc", "5 bytes expected, 3 left"),
    (b"\x0a", "ends inside a number"),
    (b"\x0a" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
    (b"\x0b", "wire type 3"),
    (b"\x0a" + b"\xff" * 9 + b"\x01", "18446744073709551615 bytes expected, 0 left"),
  ],
)
def test_damage_is_described(record, message):
  with pytest.raises(ValueError, match=f"damaged tf.Example: .*{message}"):
    features(record)
