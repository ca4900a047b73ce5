"""LARS against the reference's own twenty steps and against numpy; exclusions decided by role."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from byolx.models.batch_norm import BatchNorm
from byolx.models.byol import BYOL, BYOLSpec
from byolx.models.layers import Conv, Linear
from byolx.models.resnet import ResNetSpec
from byolx.models.roles import Role
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers, schedules

ROLES = {"w": Role.KERNEL, "b": Role.BIAS, "scale": Role.NORM, "offset": Role.NORM}
DECAY, MOMENTUM, TRUST, STEPS = 1.5e-6, 0.9, 1e-3, 20


def as_state(arrays):
  """{"linear/w": array, ...} as a state whose parameters have roles."""
  nested = {}
  for name, value in arrays.items():
    group, leaf = name.split("/")
    nested.setdefault(group, {})[leaf] = nnx.Param(jnp.asarray(value), role=ROLES[leaf])
  return nnx.State(nested)


def as_arrays(state):
  return {"/".join(path): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def run(make, start, gradients):
  """The parameters after every step; `make` takes the mask."""
  params = as_state(start)
  tx = make(optimizers.adapted(params))

  @jax.jit
  def step(params, opt_state, gradient):
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state, history = tx.init(params), []
  for gradient in gradients:
    params, opt_state = step(params, opt_state, as_state(gradient))
    history.append(as_arrays(params))
  return history


def numpy_lars(start, gradients, rates, decay):
  """The authors' LARS in float64, one parameter after another."""
  history = [{} for _ in gradients]
  for name, value in start.items():
    w, m = value.astype(np.float64), 0.0
    for k, gradient in enumerate(gradients):
      g = gradient[name].astype(np.float64)
      if ROLES[name.split("/")[1]] is Role.KERNEL:
        g = g + decay * w
        norm_w, norm_g = np.linalg.norm(w), np.linalg.norm(g)
        g = g * (TRUST * norm_w / norm_g if norm_w > 0 and norm_g > 0 else 1.0)
      m = MOMENTUM * m + g
      w = w - rates[k] * m
      history[k][name] = w
  return history


def assert_same(got, expected, atol):
  for ours, theirs in zip(got, expected, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours:
      np.testing.assert_allclose(ours[name], theirs[name], atol=atol, rtol=1e-6)


def furthest(got, expected):
  return max(np.abs(got[-1][name] - expected[-1][name]).max() for name in got[-1])


@pytest.fixture(scope="module")
def reference(golden):
  """(start, gradients, parameters after each step, rates) of the reference's optimiser."""
  archive = golden("optimisation")

  def tree(prefix):
    return {k.removeprefix(prefix): v for k, v in archive.items() if k.startswith(prefix)}

  gradients = [tree(f"lars_grad{k:02d}/") for k in range(STEPS)]
  after = [tree(f"lars_params{k + 1:02d}/") for k in range(STEPS)]
  return tree("lars_start/"), gradients, after, archive["lars_lr"]


@pytest.fixture(scope="module")
def made_up():
  """(start, gradients) of a larger tree with gradients of very different sizes."""
  rng = np.random.default_rng(3)
  shapes = {
    "conv/w": (3, 3, 4, 8), "norm/scale": (8,), "norm/offset": (8,),
    "linear/w": (8, 5), "linear/b": (5,),
  }  # fmt: skip
  draw = lambda scale: {  # noqa: E731
    name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
  }
  return draw(0.5), [draw(10.0 ** rng.uniform(-4, 1)) for _ in range(STEPS)]


def table(rates):
  """A schedule that reads its rates from a table."""
  return lambda k: jnp.asarray(rates, jnp.float32)[k]


def test_twenty_steps_of_the_reference(reference):
  start, gradients, after, rates = reference
  assert len(set(rates)) > 10
  got = run(
    lambda mask: optimizers.lars(table(rates), DECAY, MOMENTUM, TRUST, mask), start, gradients
  )
  assert_same(got, after, atol=1e-6)


def test_the_order_of_optax_lars_is_another_trajectory(reference):
  """Its rate comes before momentum, so the test above would catch a return to it."""
  start, gradients, after, rates = reference

  def theirs(mask):
    return optax.lars(
      table(rates),
      DECAY,
      weight_decay_mask=mask,
      trust_coefficient=TRUST,
      trust_ratio_mask=mask,
      momentum=MOMENTUM,
    )

  assert furthest(run(theirs, start, gradients), after) > 1e-3


def test_a_moving_rate_against_numpy(made_up):
  start, gradients = made_up
  rate = schedules.warmup_cosine(0.8, 5, STEPS)
  got = run(lambda mask: optimizers.lars(rate, 1e-2, MOMENTUM, TRUST, mask), start, gradients)
  rates = [float(rate(k)) for k in range(STEPS)]
  for ours, theirs in zip(got, numpy_lars(start, gradients, rates, 1e-2), strict=True):
    for name in start:
      size = max(1.0, np.abs(theirs[name]).max())
      np.testing.assert_allclose(ours[name], theirs[name], atol=2e-6 * size)


def test_decay_leaves_biases_and_norms_alone(made_up):
  start, _ = made_up
  none = [{name: np.zeros_like(value) for name, value in start.items()}]
  got = run(lambda mask: optimizers.lars(table([0.5]), 0.1, MOMENTUM, TRUST, mask), start, none)[-1]
  for name, value in start.items():
    if name.endswith("/w"):
      # The trust ratio cancels the decay's size: the step is rate * trust along w.
      np.testing.assert_allclose(got[name], value * (1 - 0.5 * TRUST), rtol=1e-6)
    else:
      np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_zero_norm_means_a_factor_of_one(zero):
  one = np.full((2, 2), 0.25, np.float32)
  start = {"linear/w": np.zeros((2, 2), np.float32) if zero == "weight" else one}
  gradients = [{"linear/w": one if zero == "weight" else np.zeros((2, 2), np.float32)}] * 2
  got = run(
    lambda mask: optimizers.lars(table([0.1, 0.1]), 0.0, MOMENTUM, TRUST, mask), start, gradients
  )
  first = -0.1 * one if zero == "weight" else one  # the whole gradient, not a thousandth of it
  np.testing.assert_allclose(got[0]["linear/w"], first, rtol=1e-6)
  assert_same(got, numpy_lars(start, gradients, [0.1, 0.1], 0.0), atol=1e-8)


def test_the_trust_ratio_is_optaxs_with_half_of_its_norms():
  rng = np.random.default_rng(3)
  g, w = (
    {"a": scale * rng.normal(size=(3, 3, 8, 16)), "zero": np.zeros(4), "c": rng.normal(size=5)}
    for scale in (1e-4, 2.0)
  )
  g, w = jax.tree.map(jnp.float32, (g, w))

  def apply(transformation):
    return jax.jit(lambda g, w: transformation.update(g, transformation.init(w), w)[0])

  ours = apply(optimizers.scale_by_trust_ratio(TRUST))
  theirs = apply(optax.scale_by_trust_ratio(trust_coefficient=TRUST))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), ours(g, w), theirs(g, w))
  compiled = [one.lower(g, w).compile().as_text() for one in (ours, theirs)]
  norms = 2 * len(w)
  assert [text.count(" reduce(") for text in compiled] == [norms, 2 * norms]


def test_sgd_is_nesterovs_against_numpy(made_up):
  start, gradients = made_up
  rates = np.linspace(0.1, 0.0, STEPS)
  got = run(lambda mask: optimizers.sgd(table(rates), 1e-2, MOMENTUM, mask), start, gradients)[-1]
  for name, value in start.items():
    w, m = value.astype(np.float64), 0.0
    for k, gradient in enumerate(gradients):
      g = gradient[name] + (1e-2 * w if name.endswith("/w") else 0.0)
      m = MOMENTUM * m + g
      w = w - rates[k] * (g + MOMENTUM * m)
    np.testing.assert_allclose(got[name], w, rtol=1e-5, atol=1e-5)


def test_adamw_moves_by_the_sign_and_decays_kernels_only():
  start = {"linear/w": np.array([[1.0, -2.0]], np.float32), "linear/b": np.array([3.0], np.float32)}
  gradients = [
    {"linear/w": np.array([[5.0, -0.1]], np.float32), "linear/b": np.ones(1, np.float32)}
  ]
  got = run(lambda mask: optimizers.adamw(table([0.01]), 0.5, mask), start, gradients)[-1]
  np.testing.assert_allclose(got["linear/w"], [[1 - 0.01 * 1.5, -2 + 0.01 * (1 + 1.0)]], rtol=1e-5)
  np.testing.assert_allclose(got["linear/b"], [3 - 0.01], rtol=1e-5)


@pytest.fixture(scope="module")
def byol():
  """Shapes of a BYOL with twelve blocks in a stage, deep heads with output biases, and a probe."""
  encoder = ResNetSpec("custom", blocks=(12, 1), channels=(8, 16), bottleneck=True, stem_channels=8)
  spec = BYOLSpec(encoder, 8, 16, 3, 16, 2, output_bias=True, classes=10)
  return nnx.eval_shape(lambda: BYOL(spec, rngs=nnx.Rngs(0)))


def test_a_real_network_excludes_exactly_batch_norm_and_biases(byol):
  expected, kernels = set(), set()
  for path, module in nnx.iter_modules(byol):
    if "target" in path:
      continue
    if isinstance(module, BatchNorm):
      expected |= {(*path, "scale"), (*path, "offset")}
    if isinstance(module, Linear | Conv):
      kernels.add((*path, "kernel"))
      if isinstance(module, Linear) and module.bias is not None:
        expected.add((*path, "bias"))
  params = nnx.state(byol, Pretrain.trainable)
  mask = nnx.to_flat_state(optimizers.adapted(params))
  excluded = {path for path, flag in mask if flag.get_raw_value() is False}
  assert excluded == expected
  assert {path for path, flag in mask if flag.get_raw_value() is True} == kernels
  # Projector 2 hidden + 1 last bias and 2 norms, predictor 1 + 1 and 1, probe 1.
  heads = [path for path in excluded if path[0] in ("predictor", "probe") or "projector" in path]
  assert len(heads) == (3 + 2 * 2) + (2 + 2) + 1


def test_the_masks_leaves_stand_where_the_parameters_do(byol):
  """Ten and more blocks sort differently as numbers and as text; optax pairs leaves by order."""
  params = nnx.state(byol, Pretrain.trainable)
  pairs = jax.tree.map(lambda x, flag: (x.ndim > 1, flag), params, optimizers.adapted(params))
  leaves = jax.tree.leaves(pairs)
  assert leaves[::2] == leaves[1::2]
  assert 0 < sum(leaves[::2]) < len(leaves) // 2


def test_the_target_is_not_trained(byol):
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(byol, Pretrain.trainable))]
  assert {path[0] for path in paths} == {"online", "predictor", "probe"}


def test_a_parameter_without_a_role_is_refused_by_name():
  params = nnx.State({"head": {"kernel": nnx.Param(jnp.ones((2, 2)))}})
  with pytest.raises(ValueError, match=r"head\.kernel.*expected one of.*KERNEL.*BIAS.*NORM"):
    optimizers.adapted(params)


def test_a_parameter_of_several_arrays_is_refused():
  two = nnx.Param({"a": jnp.ones(2), "b": jnp.ones(2)}, role=Role.KERNEL)
  with pytest.raises(ValueError, match="2 arrays in 1 parameters"):
    optimizers.adapted(nnx.State({"head": two}))


def test_only_kernels_are_adapted():
  assert [role for role in Role if role.adapted] == [Role.KERNEL]


def test_stacked_classifiers_take_their_multiple_of_a_step():
  updates = {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.full((3, 5), 2.0)}
  tx = optimizers.scale_each([1.0, 0.5, 3.0])
  found, _ = jax.jit(lambda u: tx.update(u, tx.init(u)))(updates)
  for head, factor in enumerate((1.0, 0.5, 3.0)):
    np.testing.assert_array_equal(found["kernel"][head], np.full((4, 5), factor))
    np.testing.assert_array_equal(found["bias"][head], np.full(5, 2 * factor))
