"""BYOL's networks: which parts exist, how the target starts and follows, types of the outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byolx.models.byol import BYOL, Branch, BYOLSpec
from byolx.models.resnet import ResNetSpec


def numpy_init(key, shape, dtype=jnp.float32):
  """Values drawn outside of jax, which would compile a program per shape."""
  seed = np.asarray(jax.random.key_data(key))
  return jnp.asarray(np.random.default_rng(seed).normal(scale=0.2, size=shape), dtype)


ENCODER = ResNetSpec(
  "custom", blocks=(1,), channels=(4,), stem="small", stem_channels=4, kernel_init=numpy_init
)
SPEC = BYOLSpec(
  ENCODER, projection_size=6, projector_hidden=8, predictor_hidden=10, output_bias=True, classes=5
)


def build(seed=0, **changes):
  return BYOL(dataclasses.replace(SPEC, **changes), rngs=nnx.Rngs(seed))


def arrays(module, *kinds):
  """{path: numpy array} of a module's variables."""
  state = nnx.state(module, nnx.Any(*kinds))
  return {path: np.array(variable[...]) for path, variable in nnx.to_flat_state(state)}


def randomise(module, seed):
  """Fills every floating-point variable with values that nothing else has."""
  rng = np.random.default_rng(seed)
  for _, variable in nnx.to_flat_state(nnx.state(module)):
    if jnp.issubdtype(variable.dtype, jnp.floating):
      variable.set_value(jnp.asarray(rng.normal(size=variable.shape), jnp.float32))


follow = nnx.jit(
  lambda model, tau, statistics: model.follow(tau, statistics=statistics),
  static_argnames="statistics",
)


@pytest.mark.parametrize("statistics", [False, True])
def test_follow_is_numpys_moving_average(statistics):
  model, tau = build(), np.float32(0.875)
  randomise(model.online, 1)
  randomise(model.target, 2)
  model.online.encoder.stem_norm.updates.set_value(jnp.int32(7))
  online, before = (arrays(m, nnx.Param, nnx.BatchStat) for m in (model.online, model.target))
  other = arrays(model.predictor, nnx.Param), arrays(model.probe, nnx.Param)
  follow(model, jnp.float32(tau), statistics=statistics)
  after = arrays(model.target, nnx.Param, nnx.BatchStat)
  moved = 0
  for path, xi in before.items():
    averaged = path[-1] in ("kernel", "bias", "scale", "offset")
    averaged |= statistics and path[-1] in ("mean", "var")
    if averaged:
      expected = tau * xi + (1 - tau) * online[path]
      np.testing.assert_allclose(after[path], expected, rtol=1e-6, atol=1e-6)
      moved += 1
    else:
      np.testing.assert_array_equal(after[path], xi)
  # 4 convolutions and their norms, 2 linear layers and 1 norm of the projector.
  assert moved == 4 + 2 * 4 + 4 + 2 + statistics * 2 * 5
  for path, theta in arrays(model.online, nnx.Param, nnx.BatchStat).items():
    np.testing.assert_array_equal(theta, online[path])
  for part, old in zip((model.predictor, model.probe), other, strict=True):
    for path, value in arrays(part, nnx.Param).items():
      np.testing.assert_array_equal(value, old[path])


def test_tau_one_freezes_the_target_and_tau_zero_copies():
  model = build()
  before = arrays(model.target, nnx.Param)
  follow(model, jnp.float32(1), statistics=False)
  for path, value in arrays(model.target, nnx.Param).items():
    np.testing.assert_array_equal(value, before[path])
  follow(model, jnp.float32(0), statistics=False)
  online = arrays(model.online, nnx.Param)
  for path, value in arrays(model.target, nnx.Param).items():
    np.testing.assert_allclose(value, online[path], atol=1e-7)


def test_a_target_with_its_own_key_shares_no_kernel():
  model = build(target_init="own_key")
  online, target = (arrays(m, nnx.Param) for m in (model.online, model.target))
  assert online.keys() == target.keys()
  kernels = [path for path in online if path[-1] == "kernel"]
  assert len(kernels) == 6
  for path in kernels:
    assert not np.isclose(online[path], target[path]).any()


def test_a_target_that_starts_from_the_online_network_is_a_copy_of_it():
  model = build(target_init="online")
  kinds = (nnx.Param, nnx.BatchStat)
  before, target = (arrays(m, *kinds) for m in (model.online, model.target))
  for path, value in before.items():
    np.testing.assert_array_equal(value, target[path])
  randomise(model.online, 1)
  for path, value in arrays(model.target, *kinds).items():
    np.testing.assert_array_equal(value, target[path])
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model))]
  assert len(set(pointers)) == len(pointers)  # a donated buffer may appear once only


def test_the_online_network_does_not_depend_on_how_the_target_starts():
  first = arrays(build(target_init="own_key").online, nnx.Param)
  second = arrays(build(target_init="online").online, nnx.Param)
  for path, value in first.items():
    np.testing.assert_array_equal(value, second[path])


@pytest.mark.parametrize(
  ("changes", "missing"),
  [
    ({}, set()),
    ({"predictor": False}, {"predictor"}),
    ({"classes": 0}, {"probe"}),
    ({"target": "stop_gradient"}, {"target"}),
    ({"target": "online", "predictor": False}, {"target", "predictor"}),
  ],
)
def test_parts_exist_as_specified(changes, missing):
  model = build(**changes)
  parts = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))}
  assert parts == {"online", "predictor", "probe", "target"} - missing
  if "target" in missing:
    before = arrays(model, nnx.Param)
    model.follow(jnp.float32(0.5))  # nothing to move
    for path, value in arrays(model, nnx.Param).items():
      np.testing.assert_array_equal(value, before[path])


def test_sizes_are_the_specs_and_the_papers_by_default():
  model = build(projector_depth=3, predictor_depth=1)
  assert [layer.kernel.shape for layer in model.online.projector.hidden] == [(4, 8), (8, 8)]
  assert model.online.projector.output.kernel.shape == (8, 6)
  assert len(model.predictor.hidden) == 0
  assert model.predictor.output.kernel.shape == (6, 6)
  assert model.probe.kernel.shape == (4, 5)
  assert model.probe.bias is not None
  paper = BYOLSpec(ENCODER)
  assert (paper.projector_hidden, paper.predictor_hidden, paper.projection_size) == (
    4096,
    4096,
    256,
  )
  assert (paper.projector_depth, paper.predictor_depth, paper.output_bias) == (2, 2, False)
  assert (paper.predictor, paper.target, paper.target_init) == (True, "ema", "own_key")


def test_without_a_predictor_the_projection_is_the_prediction():
  z = jnp.ones((4, 6))
  assert build(predictor=False).predict(z, train=True, views=2) is z


def test_a_bfloat16_network_gives_float32_outputs_near_those_of_float32():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 3)), jnp.float32)
  outputs = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    spec = dataclasses.replace(SPEC, encoder=dataclasses.replace(ENCODER, dtype=dtype))
    model = BYOL(spec, rngs=nnx.Rngs(0))

    def run(model, x):
      out = model.online(x, train=True, views=2)
      return *out, model.predict(out.projection, train=True, views=2)

    outputs[dtype] = nnx.jit(run)(model, x)
  for half, full in zip(outputs[jnp.bfloat16], outputs[jnp.float32], strict=True):
    assert half.dtype == full.dtype == jnp.float32
    error = np.linalg.norm(half - full)
    assert 0 < error < 0.05 * np.linalg.norm(full)


def test_a_branch_names_its_outputs():
  branch = Branch(SPEC, rngs=nnx.Rngs(0))
  out = nnx.eval_shape(lambda x: branch(x, train=False), jnp.zeros((2, 6, 6, 3)))
  assert out.representation.shape == (2, 4)
  assert out.projection.shape == (2, 6)
