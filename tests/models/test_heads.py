"""Projector and predictor against numpy: depths, biases, normalisation between layers only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byolx.models.batch_norm import BatchNorm
from byolx.models.heads import MLP, Heads
from byolx.models.layers import uncorrected
from byolx.models.resnet import ResNetSpec


def numpy_init(key, shape, dtype=jnp.float32):
  """Values drawn outside of jax, which would compile a program per shape."""
  seed = np.asarray(jax.random.key_data(key))
  return jnp.asarray(np.random.default_rng(seed).normal(scale=0.5, size=shape), dtype)


SPEC = ResNetSpec("custom", blocks=(1,), channels=(4,), kernel_init=numpy_init)


def head(depth, spec=SPEC, **options):
  return MLP(spec, 6, 10, 4, depth=depth, rngs=nnx.Rngs(0), **options)


def scramble(module):
  """Gives every bias and normalisation parameter a value that shows."""
  rng = np.random.default_rng(5)
  for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    if variable.ndim == 1:
      variable.set_value(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32))


def in_numpy(mlp, x, views):
  """The head's training-mode output from its own arrays."""
  x = x.astype(np.float64)
  for layer, norm in zip(mlp.hidden, mlp.norms, strict=True):
    x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    for view in range(views):
      rows = x[view::views]
      x[view::views] = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + norm.eps)
    x = np.maximum(x * np.asarray(norm.scale[...]) + np.asarray(norm.offset[...]), 0)
  x = x @ np.asarray(mlp.output.kernel[...])
  return x if mlp.output.bias is None else x + np.asarray(mlp.output.bias[...])


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("output_bias", [False, True])
def test_the_output_is_numpys(depth, views, output_bias):
  mlp = head(depth, output_bias=output_bias)
  scramble(mlp)
  x = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
  expected = in_numpy(mlp, x, views)
  got = nnx.jit(lambda mlp, x: mlp(x, train=True, views=views))(mlp, jnp.asarray(x))
  np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
  assert [int(norm.updates[...]) for norm in mlp.norms] == [views] * (depth - 1)


@pytest.mark.parametrize(
  ("depth", "kernels"), [(1, [(6, 4)]), (2, [(6, 10), (10, 4)]), (3, [(6, 10), (10, 10), (10, 4)])]
)
def test_layers_of_each_depth(depth, kernels):
  mlp = head(depth)
  layers = [*mlp.hidden, mlp.output]
  assert [layer.kernel.shape for layer in layers] == kernels
  assert [norm.scale.shape for norm in mlp.norms] == [(10,)] * (depth - 1)


@pytest.mark.parametrize("output_bias", [False, True])
def test_hidden_layers_have_a_bias_and_the_last_one_if_asked(output_bias):
  mlp = head(3, output_bias=output_bias)
  assert [layer.bias is not None for layer in [*mlp.hidden, mlp.output]] == [
    True,
    True,
    output_bias,
  ]


def test_the_default_is_the_papers_two_layers_without_a_bias_at_the_end():
  mlp = MLP(SPEC, 6, 10, 4, rngs=nnx.Rngs(0))
  assert len(mlp.hidden) == len(mlp.norms) == 1
  assert mlp.output.bias is None


def test_evaluation_uses_averages_and_leaves_them_alone():
  mlp = head(2)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), jnp.float32)
  got = nnx.jit(lambda mlp, x: mlp(x, train=False))(mlp, x)
  hidden = np.asarray(x) @ np.asarray(mlp.hidden[0].kernel[...]) / np.sqrt(1 + 1e-5)
  np.testing.assert_allclose(got, np.maximum(hidden, 0) @ mlp.output.kernel[...], atol=1e-5)
  assert int(mlp.norms[0].updates[...]) == 0


def test_normalisation_and_type_are_the_encoders():
  spec = dataclasses.replace(SPEC, bn_decay=0.5, bn_group=3, bn_eps=1e-3, dtype=jnp.bfloat16)
  mlp = head(2, spec)
  (norm,) = [m for _, m in nnx.iter_modules(mlp) if isinstance(m, BatchNorm)]
  assert (norm.decay, norm.group, norm.eps) == (0.5, 3, 1e-3)
  assert mlp(jnp.ones((6, 6)), train=True).dtype == jnp.bfloat16
  assert mlp.output.kernel.dtype == jnp.float32


def test_heads_side_by_side_are_linear_layers_drawn_alike():
  heads = Heads(6, 4, 3, uncorrected, rngs=nnx.Rngs(0))
  kernel = np.asarray(heads.kernel[...], np.float64)
  assert kernel.shape == (3, 6, 4)
  assert (kernel == kernel[:1]).all()
  assert 0.5 < kernel.std() * np.sqrt(6) < 1.2
  rng = np.random.default_rng(0)
  kernel, bias = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 4))
  heads.kernel.set_value(jnp.asarray(kernel, jnp.float32))
  heads.bias.set_value(jnp.asarray(bias, jnp.float32))
  y = rng.normal(size=(5, 6))
  got = nnx.jit(lambda heads, y: heads(y))(heads, jnp.asarray(y, jnp.bfloat16))
  assert got.dtype == jnp.float32
  y = np.asarray(jnp.asarray(y, jnp.bfloat16), np.float64)
  np.testing.assert_allclose(got, np.stack([y @ k + b for k, b in zip(kernel, bias)], 1), atol=1e-4)
