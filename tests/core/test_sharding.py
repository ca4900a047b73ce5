"""The mesh, and how batches get on it."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from byolx.core import sharding


@pytest.mark.parametrize(("wanted", "devices"), [(1, 1), (2, 2), (8, 8), (0, 8)])
def test_a_mesh_takes_the_first_devices(wanted, devices):
  mesh = sharding.make_mesh(wanted)
  assert dict(mesh.shape) == {"data": devices, "fsdp": 1}
  assert list(mesh.devices.ravel()) == jax.devices()[:devices]
  assert mesh.axis_types == (AxisType.Auto,) * 2


def test_more_devices_than_there_are_is_refused():
  with pytest.raises(ValueError, match=r"mesh\.data=9: expected at most the 8 devices"):
    sharding.make_mesh(9)


@pytest.mark.parametrize(
  ("devices", "fsdp"),
  [(1, 1), (8, 8), (32, 32), (96, 48), (97, 1), (128, 64), (512, 64), (2048, 64)],
)
def test_by_default_the_pieces_are_the_largest_divisor_up_to_64(devices, fsdp):
  assert sharding.default_fsdp(devices) == fsdp


def test_neighbours_share_a_state():
  mesh = sharding.make_mesh(8, 4)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
  assert [[d.id for d in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  with pytest.raises(ValueError, match=r"mesh\.fsdp=3: expected a divisor of the mesh's 8 devices"):
    sharding.make_mesh(8, 3)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((1, 1, 256, 1024), (None, None, None, "fsdp")),
    ((3, 3, 512, 512), (None, None, "fsdp")),
    ((2048, 4096), (None, "fsdp")),
    ((2048, 1001), ("fsdp",)),
    ((1023, 1001), ()),  # no axis can be divided
    ((3, 3, 64, 64), ()),  # 36,864 elements: too small
    ((8192,), ()),
    ((), ()),
  ],
)
def test_large_arrays_are_cut_where_their_pieces_are_largest(shape, spec):
  mesh = sharding.make_mesh(8, 4)
  assert sharding.in_pieces(mesh, shape).spec == PartitionSpec(*spec)
  assert sharding.in_pieces(sharding.make_mesh(8), shape).spec == PartitionSpec()


@pytest.mark.parametrize(
  ("state", "params", "rest"),
  [("replicated", False, False), ("zero", False, True), ("full", True, True)],
)
def test_a_layout_says_which_parts_of_a_state_are_in_pieces(state, params, rest):
  layout = sharding.Layout(sharding.make_mesh(8, 8), state)
  tree = {"kernel": jnp.zeros((256, 256)), "scale": jnp.zeros(256)}
  for got, cut in ((layout.of_params(tree), params), (layout.of_rest(tree), rest)):
    assert got["kernel"].spec == PartitionSpec(*(["fsdp"] if cut else []))
    assert got["scale"].spec == PartitionSpec()


@pytest.mark.parametrize("fsdp", [2, 8])
@pytest.mark.parametrize("state", ["zero", "full"])
def test_a_gradient_is_reduced_and_cut_at_once(fsdp, state):
  """The sum of all devices' gradients by numpy, one reduce-scatter, a piece per device."""
  mesh = sharding.make_mesh(8, fsdp)
  x = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)

  def gradient(a, b):
    return a.T @ b

  @jax.jit
  def summed(x):
    with sharding.using(sharding.Layout(mesh, state)):
      return sharding.summed(gradient, (256, 256), x, 2 * x)

  placed = sharding.put_batch({"x": x}, mesh)["x"]
  got = summed(placed)
  np.testing.assert_allclose(got, 2 * x.T @ x, rtol=1e-5, atol=1e-5)
  assert got.sharding.is_equivalent_to(sharding.in_pieces(mesh, (256, 256)), 2)
  assert got.addressable_shards[0].data.shape == (256 // fsdp, 256)
  text = summed.lower(placed).compile().as_text()
  assert text.count(" reduce-scatter(") == 1
  assert text.count(" all-reduce(") == (0 if fsdp == 8 else 1)


def test_without_a_layout_nothing_is_gathered_or_cut():
  x = jnp.ones((4, 4))
  assert sharding.gathered(x) is x
  assert sharding.summed(lambda a: a, (4, 4), x) is x


@pytest.mark.parametrize("processes", [[0], [0, 0, 0], [0, 0, 1, 1], [0, 1, 2]])
def test_devices_ordered_by_process_are_accepted(processes):
  sharding.check_rows(processes)


@pytest.mark.parametrize(
  "processes", [[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1], [0, 2, 1]]
)
def test_devices_in_another_order_would_shuffle_rows_and_are_refused(processes):
  said = ", ".join(map(str, processes))
  with pytest.raises(ValueError, match=f"of the processes {said} in this order"):
    sharding.check_rows(processes)


class Device(NamedTuple):
  """What a mesh looks at."""

  id: int
  process_index: int


@pytest.mark.parametrize(("data", "expected"), [(0, [0, 2, 4, 1, 3, 5]), (4, [0, 2, 1, 3])])
def test_a_mesh_over_processes_has_as_many_devices_of_each_in_their_order(data, expected):
  devices = [Device(number, number % 2) for number in range(6)]
  assert [device.id for device in sharding.choose_devices(devices, data)] == expected


@pytest.mark.parametrize("data", [0, 3, 4])
def test_devices_that_processes_cannot_share_evenly_are_refused(data):
  devices = [Device(number, min(number, 1)) for number in range(4)]
  with pytest.raises(ValueError, match=f"mesh.data={data}: expected the same .* have 1, 3"):
    sharding.choose_devices(devices, data)


def test_gathers_and_products_over_the_batch_axis_work():
  """With Explicit axes, jax's default, both raise."""
  mesh = sharding.make_mesh(8)
  z = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  index = np.arange(16)[::-1].copy()
  batch = sharding.put_batch({"z": z, "index": index}, mesh)
  got = jax.jit(lambda b: (b["z"] @ b["z"].T, b["z"][b["index"]]))(batch)
  np.testing.assert_allclose(got[0], z @ z.T, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got[1], z[::-1])


def test_a_batch_is_spread_by_example_and_a_state_is_everywhere():
  mesh = sharding.make_mesh(4)
  batch = {
    "view1": np.arange(8 * 2 * 2 * 3, dtype=np.uint8).reshape(8, 2, 2, 3),
    "draws1": (np.arange(8.0, dtype=np.float32), np.arange(16, dtype=np.int32).reshape(8, 2)),
  }
  placed = sharding.put_batch(batch, mesh)
  for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
    assert ours.dtype == theirs.dtype
    assert ours.sharding.spec == PartitionSpec(("data", "fsdp"))
    for device, shard in enumerate(ours.addressable_shards):
      np.testing.assert_array_equal(shard.data, theirs[2 * device : 2 * device + 2])
  everywhere = jax.device_put(jnp.arange(3.0), sharding.replicated(mesh))
  assert [len(shard.data) for shard in everywhere.addressable_shards] == [3] * 4


@pytest.mark.parametrize("ahead", [0, 1, 2, 10])
def test_prefetch_keeps_order_and_number_and_reads_no_further_than_told(ahead):
  read = []

  def batches():
    for step in range(5):
      read.append(step)
      yield {"x": np.full((2, 1), step, np.int32)}

  got = []
  for batch in sharding.prefetch(batches(), sharding.make_mesh(2), ahead):
    got.append(int(batch["x"][0, 0]))
    assert len(read) == min(5, len(got) + ahead)
  assert got == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
  ("images", "wanted", "cores", "expected"),
  [
    (64, 0, 2, 2),
    (64, 0, 16, 4),
    (48, 0, 2, 2),
    (33, 0, 2, 1),
    (96, 0, 5, 4),
    (8, 0, 8, 1),
    (8, 3, 2, 3),
  ],
)
def test_a_cpu_is_split_so_that_every_device_has_work(monkeypatch, images, wanted, cores, expected):
  told = []
  monkeypatch.delenv("XLA_FLAGS")
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
  monkeypatch.setattr(jax.config, "update", lambda name, value: told.append((name, value)))
  sharding.split_cpu(images, wanted)
  assert told == [("jax_num_cpu_devices", expected)]
  assert wanted or images % expected == 0


def test_a_number_of_devices_set_outside_wins(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("changed the devices"))
  sharding.split_cpu(64, 2)


def test_splitting_after_the_devices_are_there_does_nothing(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")
  assert len(jax.devices()) == 8
  sharding.split_cpu(64, 2)
  assert len(jax.devices()) == 8
