"""Grafts: another run's encoder, and nothing else of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byolx.checkpoints import pretrained, storage
from byolx.checkpoints.manager import CheckpointError, Checkpoints, named
from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers
from byolx.training.state import abstract_state

COLOURS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
ENCODER = ResNetSpec("custom", blocks=(1, 1), channels=(8, 16), stem="small", stem_channels=8)
META = {"commit": "c6887dc", "fingerprint": "0123456789ab"}
OTHER = {"hidden": 20, "classes": 3, "size": 6, "adam": True}


def abstract(devices, encoder=ENCODER, hidden=12, adam=False, size=8, **changes):
  spec = BYOLSpec(encoder, size, hidden, predictor_hidden=hidden, **{"classes": 10} | changes)
  task = Pretrain(spec, 100, **COLOURS)
  params = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))), task.trainable, ...)[1]
  mask = optimizers.adapted(params)
  if adam:
    tx = optimizers.adamw(lambda k: 0.1, 1e-6, mask)
  else:
    tx = optimizers.lars(lambda k: 0.1, 1e-6, 0.9, 1e-3, mask)
  return abstract_state(task, tx, sharding.Layout(sharding.make_mesh(devices)))


def fill(shapes, seed):
  rng = np.random.default_rng(seed)

  def one(leaf):
    value = rng.standard_normal(leaf.shape) if leaf.dtype == jnp.float32 else 7
    return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)

  return jax.tree.map(one, shapes)


@pytest.fixture(scope="module")
def source():
  """The state that is grafted from; its names and values."""
  return fill(abstract(2), 1)


@pytest.fixture
def workdir(tmp_path, source):
  """A workdir with its checkpoints of the steps 5 and 9."""
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
  checkpoints.save(5, fill(abstract(2), 5), {}, META)
  checkpoints.save(9, source, {}, META)
  checkpoints.close()
  return tmp_path / "run"


def inner(state, owner):
  """An encoder's arrays by the name inside it."""
  found = {}
  for variables in ("params", "rest"):
    start = f"{variables}.{owner}.encoder."
    found |= {
      n.removeprefix(start): np.asarray(x) for n, x in named(state).items() if n.startswith(start)
    }
  return found


def read(path, which="online", devices=4):
  return pretrained.read(path, which, sharding.replicated(sharding.make_mesh(devices)))


@pytest.mark.parametrize("which", ["online", "target"])
@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/9"])
def test_an_encoder_goes_into_another_run(workdir, source, which, where):
  new = fill(abstract(4, **OTHER), 2)
  encoder = read(workdir / where, which)
  state, table = pretrained.apply(new, encoder)
  expected = inner(source, which)
  assert len(expected) > 15
  assert any("mean" in name for name in expected)  # statistics as well as parameters
  for owner in ("online", "target"):
    found = inner(state, owner)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name], value)
  for name, array in named(state).items():
    assert len(array.sharding.device_set) == 4
    if ".encoder." not in name or name.startswith("opt_state"):
      np.testing.assert_array_equal(array, named(new)[name])
  assert jax.tree.structure(state) == jax.tree.structure(new)
  folder = workdir / "checkpoints" / "9"
  assert encoder.lineage == {
    "path": str(folder), "step": 9, "encoder": which, **META, "from": None,
  }  # fmt: skip
  said = table.text()
  assert [line.split()[0] for line in said.splitlines()[1:] if line[0] != " "] == [
    "loaded", "not", "new",
  ]  # fmt: skip


def test_a_state_with_a_graft_can_be_donated(workdir):
  state, _ = pretrained.apply(fill(abstract(1), 2), read(workdir, devices=1))
  jax.block_until_ready(jax.jit(lambda x: x, donate_argnums=0)(state))


def test_the_table_names_what_came_and_what_did_not(workdir):
  _, table = pretrained.apply(fill(abstract(1, **OTHER), 2), read(workdir, devices=1))
  parts = {
    title: {part: (arrays, numbers, remark) for part, arrays, numbers, remark in rows}
    for title, rows in vars(table).items()
  }
  assert parts["loaded"].keys() == {"online encoder", "target encoder"}
  assert parts["left"].keys() == {
    "step", "online projector", "predictor", "probe", "target encoder", "target projector",
    "opt_state",
  }  # fmt: skip
  arrays, numbers, remark = parts["missing"]["probe"]
  assert (arrays, numbers) == (2, 16 * 3 + 3)
  assert remark == "params.probe.bias is float32[3], float32[10] in the checkpoint; and 1 more"
  assert parts["left"]["probe"][:2] == (2, 16 * 10 + 10)
  sizes = {n: x.size for n, x in inner(fill(abstract(1), 0), "online").items()}
  assert parts["loaded"]["online encoder"][:2] == (len(sizes), sum(sizes.values()))


def test_only_the_encoder_is_read(workdir, source, monkeypatch):
  asked = []
  whole = storage.read_arrays
  monkeypatch.setattr(
    storage,
    "read_arrays",
    lambda folder, wanted: asked.append(set(wanted)) or whole(folder, wanted),
  )
  read(workdir)
  names = {n for n in named(source) if n.split(".")[1:3] == ["online", "encoder"]}
  assert asked == [names]


def test_damage_elsewhere_does_not_matter(tmp_path, source, caplog):
  """Every large array but the encoder's is destroyed on disk; the small ones lie together."""
  folder = tmp_path / "checkpoints"
  checkpoints = Checkpoints(folder)
  checkpoints.save(9, source, {}, META)
  checkpoints.close()
  expected = inner(source, "online")
  blob = b"".join(np.ascontiguousarray(x).tobytes() for x in expected.values())
  damaged = 0
  for name, array in named(source).items():
    data = np.asarray(array).tobytes()
    if len(data) < 2000 or "online.encoder" in name or data in blob:
      continue
    for path in (folder / "9" / "state").rglob("*"):
      content = path.read_bytes() if path.is_file() else b""
      if data in content:
        path.write_bytes(content.replace(data, bytes(len(data))))
        damaged += 1
  assert damaged >= 4
  for name, value in read(folder).arrays.items():
    np.testing.assert_array_equal(value, expected[name])
  with pytest.raises(CheckpointError, match="checksum mismatch"):
    Checkpoints(folder).restore(abstract(1))
  with pytest.raises(CheckpointError, match="checksum mismatch"):
    read(folder, "target")


def test_a_damaged_checkpoint_is_passed_over(workdir, caplog):
  (workdir / "checkpoints" / "9" / "record" / "record.json").write_text("{}")
  assert read(workdir).lineage["step"] == 5
  assert "step 9" in caplog.text


@pytest.mark.parametrize(
  ("encoder", "difference"),
  [
    (ResNetSpec("custom", blocks=(1, 1), channels=(8, 12), stem="small", stem_channels=8),
     r"groups\.1\.0\.\S+ is float32\[.*16\] there, float32\[.*12\] here; "),
    (ResNetSpec("custom", blocks=(1, 2), channels=(8, 16), stem="small", stem_channels=8),
     r"groups\.1\.1\.\S+ is missing there, float32\[.*\] here; "),
    (ResNetSpec("custom", blocks=(1,), channels=(8,), stem="small", stem_channels=8),
     r"groups\.1\.0\.\S+ is float32\[.*\] there, no such array here; "),
  ],
)  # fmt: skip
def test_another_architecture_is_refused(workdir, encoder, difference):
  with pytest.raises(ConfigError, match="has another architecture: " + difference) as raised:
    pretrained.apply(fill(abstract(1, encoder), 2), read(workdir, devices=1))
  message = str(raised.value)
  assert message.startswith(f"init.workdir: the encoder of {workdir}/checkpoints/9 ")
  assert "\n" not in message
  assert message.count(" here") == 3
  assert message[-5:] == " more"


def test_an_encoder_that_is_not_there_is_said(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, fill(abstract(1, target="online"), 0), {}, {})
  checkpoints.close()
  with pytest.raises(
    ConfigError, match=r"^init.encoder=target: .* has no such encoder; it has: online$"
  ):
    read(tmp_path, "target")
  with pytest.raises(CheckpointError, match=r"empty: expected a workdir, or a checkpoint$"):
    read(tmp_path / "empty")
