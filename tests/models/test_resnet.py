"""Residual networks: Table 9's sizes, shapes of all stages, paddings, types and first values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

from byolx.models.batch_norm import BatchNorm
from byolx.models.resnet import ARCHITECTURES, STEMS, Block, ResNet, ResNetSpec


def numpy_init(key, shape, dtype=jnp.float32):
  """Values drawn outside of jax, which would compile a program per shape."""
  seed = np.asarray(jax.random.key_data(key))
  size = 1 / math.sqrt(math.prod(shape[:-1]))
  return jnp.asarray(np.random.default_rng(seed).normal(scale=size, size=shape), dtype)


def no_memory(_, shape, dtype):
  """An array of zeros that all are the same four bytes."""
  return np.broadcast_to(np.zeros((), dtype), shape)


def build(spec, **changes):
  return ResNet(dataclasses.replace(spec, kernel_init=numpy_init, **changes), rngs=nnx.Rngs(0))


@functools.cache
def parameters(spec):
  """How many numbers an encoder has."""
  encoder = ResNet(dataclasses.replace(spec, kernel_init=no_memory), rngs=nnx.Rngs(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(encoder, nnx.Param)))


def stage_shapes(spec, size):
  """Shapes of `stages` and of the representation, without computing them."""
  encoder = ResNet(dataclasses.replace(spec, kernel_init=no_memory), rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(encoder)

  def run(state, x):
    model = nnx.merge(graphdef, state)
    return model.stages(x, train=False), model(x, train=False)

  maps, y = jax.eval_shape(run, state, jnp.zeros((2, size, size, 3)))
  return [m.shape[1:] for m in maps], y.shape


@pytest.mark.parametrize(
  ("arch", "width", "millions"),
  [
    ("resnet50", 1, 24),
    ("resnet101", 1, 43),
    ("resnet152", 1, 58),
    ("resnet200", 1, 63),
    ("resnet50", 2, 94),
    ("resnet101", 2, 170),
    ("resnet50", 3, 211),
    ("resnet152", 2, 232),
    ("resnet200", 2, 250),
    ("resnet50", 4, 375),
    ("resnet101", 3, 382),
    ("resnet152", 3, 522),
  ],
)
def test_the_twelve_sizes_of_table_9(arch, width, millions):
  assert round(parameters(ResNetSpec(arch, float(width))) / 1e6) == millions


@pytest.mark.parametrize(
  ("arch", "torchvision"),
  [
    ("resnet18", 11_176_512),
    ("resnet34", 21_284_672),
    ("resnet50", 23_508_032),
    ("resnet101", 42_500_160),
    ("resnet152", 58_143_808),
  ],
)
def test_sizes_are_torchvisions_without_its_classifier(arch, torchvision):
  spec = ResNetSpec(arch)
  # torchvision's basic networks have no projection before their first stage; the reference's do.
  projection = 0 if spec.stages.bottleneck else 64 * 64 + 2 * 64
  assert parameters(spec) == torchvision + projection


@pytest.mark.parametrize(
  ("arch", "stem", "size", "sides"),
  [
    ("resnet18", "imagenet", 224, (56, 56, 28, 14, 7)),
    ("resnet50", "imagenet", 225, (57, 57, 29, 15, 8)),
    ("resnet18", "small", 32, (32, 32, 16, 8, 4)),
    ("resnet34", "medium", 28, (14, 14, 7, 4, 2)),
  ],
)
def test_shapes_of_every_stage(arch, stem, size, sides):
  spec = ResNetSpec(arch, stem=stem)
  maps, y = stage_shapes(spec, size)
  assert maps == [(s, s, c) for s, c in zip(sides, (64, *spec.stages.channels), strict=True)]
  assert y == (2, spec.stages.channels[-1])


@pytest.mark.parametrize("stem", list(STEMS))
@pytest.mark.parametrize("size", [23, 32])
def test_both_paddings_have_the_same_shapes(stem, size):
  spec = ResNetSpec("custom", blocks=(1, 1), channels=(4, 8), stem=stem, stem_channels=4)
  torch = dataclasses.replace(spec, padding="torch")
  assert stage_shapes(spec, size) == stage_shapes(torch, size)


def test_dilation_keeps_the_resolution_of_the_last_stage():
  spec = ResNetSpec("resnet50", dilation=2)
  maps, _ = stage_shapes(spec, 224)
  assert [m[0] for m in maps] == [56, 56, 28, 14, 14]
  assert maps[-1] == (14, 14, 2048)
  assert parameters(spec) == parameters(ResNetSpec("resnet50"))
  small = ResNetSpec(
    "custom", blocks=(1, 2), channels=(4, 8), stem="small", stem_channels=4, dilation=2
  )
  encoder = build(small)
  kernels = [conv for block in encoder.groups[1] for conv in block.convs]
  assert [conv.dilation for conv in kernels] == [2] * 4
  assert [conv.stride for conv in kernels] == [1] * 4
  assert encoder.groups[0][0].convs[0].dilation == 1


def test_stages_take_the_strides_they_are_given():
  spec = ResNetSpec(
    "custom", blocks=(1, 1, 1), channels=(4, 8, 8), strides=(2, 2, 1), stem="small", stem_channels=4
  )
  maps, _ = stage_shapes(spec, 16)
  assert [m[0] for m in maps] == [16, 8, 4, 4]
  plain = dataclasses.replace(spec, strides=())
  assert [m[0] for m in stage_shapes(plain, 16)[0]] == [16, 16, 8, 4]


def test_a_bottlenecks_stride_sits_on_its_3x3_convolution():
  spec = ResNetSpec(
    "custom", blocks=(1, 2), channels=(16, 32), bottleneck=True, kernel_init=numpy_init
  )
  encoder = ResNet(spec, rngs=nnx.Rngs(0))
  first, second = encoder.groups[1]
  assert [c.kernel.shape[:2] for c in first.convs] == [(1, 1), (3, 3), (1, 1)]
  assert [c.stride for c in first.convs] == [1, 2, 1]
  assert [c.kernel.shape[3] for c in first.convs] == [8, 8, 32]
  assert first.shortcut.stride == 2
  assert second.shortcut is None
  assert [c.stride for c in second.convs] == [1] * 3
  # All groups start with a projection, the first too, where the shape would not need one.
  assert build(ResNetSpec("custom", blocks=(1,), channels=(64,))).groups[0][0].shortcut is not None


def sides(size, kernel, stride, padding):
  if padding == "torch":
    return kernel // 2, kernel // 2
  total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


@pytest.mark.parametrize("padding", ["same", "torch"])
@pytest.mark.parametrize("size", [20, 23])  # 10 and 12 after the convolution
def test_the_imagenet_stem_against_scipy(padding, size):
  """7x7 convolution, normalisation, ReLU and 3x3 max pool, each at stride 2."""
  encoder = build(
    ResNetSpec("custom", blocks=(1,), channels=(4,), stem_channels=4, padding=padding)
  )
  x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
  kernel = np.asarray(encoder.stem.kernel[...], np.float64)
  around = [(0, 0), *[sides(size, 7, 2, padding)] * 2, (0, 0)]
  padded = np.pad(x.astype(np.float64), around)
  convolved = np.stack(
    [
      [
        sum(scipy.signal.correlate2d(image[..., c], kernel[..., c, d], "valid") for c in range(3))
        for image in padded
      ]
      for d in range(4)
    ],
    axis=-1,
  )[:, ::2, ::2]
  active = np.maximum(convolved / np.sqrt(1 + 1e-5), 0)
  around = [(0, 0), *[sides(active.shape[1], 3, 2, padding)] * 2, (0, 0)]
  padded = np.pad(active, around, constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
  expected = windows.max((-1, -2))[:, ::2, ::2]
  got = nnx.jit(lambda model, x: model.stages(x, train=False)[0])(encoder, x)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_block_adds_its_shortcut_before_the_last_relu():
  spec = ResNetSpec("custom", blocks=(1,), channels=(3,), bn_last_scale=0.0, kernel_init=numpy_init)
  block = Block(spec, 3, 3, 1, 1, False, nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
  np.testing.assert_allclose(block(x, train=True, views=1), np.maximum(x, 0), atol=1e-6)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_the_last_normalisation_of_a_block_starts_where_it_is_told(last):
  encoder = build(
    ResNetSpec("custom", blocks=(1, 2), channels=(8, 16), bottleneck=True), bn_last_scale=last
  )
  blocks = [block for group in encoder.groups for block in group]
  assert len(blocks) == 3
  for block in blocks:
    assert [float(norm.scale[...].mean()) for norm in block.norms] == [1.0, 1.0, last]
    if block.shortcut_norm is not None:
      np.testing.assert_array_equal(block.shortcut_norm.scale[...], 1.0)
  np.testing.assert_array_equal(encoder.stem_norm.scale[...], 1.0)


@pytest.mark.parametrize(
  ("width", "channels", "stem"),
  [
    (1.0, (64, 128, 256, 512), 64),
    (0.25, (16, 32, 64, 128), 16),
    (0.3, (20, 40, 76, 152), 20),
    (2.0, (128, 256, 512, 1024), 128),
    (0.001, (4, 4, 4, 4), 4),
  ],
)
def test_widths_multiply_every_channel_count(width, channels, stem):
  spec = ResNetSpec("resnet18", width)
  assert spec.stages.channels == channels
  assert spec.stem_width == stem
  assert spec.stages._replace(channels=(64, 128, 256, 512)) == (ARCHITECTURES["resnet18"])


def test_a_fractional_width_of_a_bottleneck_builds_and_has_its_shapes():
  spec = ResNetSpec("custom", 0.4, blocks=(1, 1), channels=(16, 32), bottleneck=True, stem="small")
  assert spec.stages.channels == (8, 12)
  maps, y = stage_shapes(spec, 8)
  assert maps == [(8, 8, 24), (8, 8, 8), (4, 4, 12)]
  assert y == (2, 12)


def test_normalisation_options_reach_every_layer():
  spec = ResNetSpec(
    "custom", blocks=(1,), channels=(4,), bn_decay=0.5, bn_eps=1e-3, bn_group=7, bn_debias=False
  )
  norms = [m for _, m in nnx.iter_modules(build(spec)) if isinstance(m, BatchNorm)]
  assert len(norms) == 4
  for norm in norms:
    assert (norm.decay, norm.eps, norm.group, norm.debias) == (0.5, 1e-3, 7, False)


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
  x = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
  spec = ResNetSpec("custom", blocks=(1, 1), channels=(8, 16), bottleneck=True, stem_channels=8)
  outputs = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    encoder = build(spec, dtype=dtype)
    outputs[dtype] = nnx.jit(lambda model, x: model(x, train=True, views=2))(encoder, x)
    state = nnx.state(encoder, nnx.Any(nnx.Param, nnx.BatchStat))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
      jnp.dtype(jnp.float32),
      jnp.dtype(jnp.int32),
    }
  half, full = (np.asarray(outputs[d], np.float32) for d in (jnp.bfloat16, jnp.float32))
  assert outputs[jnp.bfloat16].dtype == jnp.bfloat16
  assert np.linalg.norm(half - full) < 0.02 * np.linalg.norm(full)
  assert not np.array_equal(half, full)


def test_the_representation_is_the_last_stage_averaged_over_space():
  encoder = build(ResNetSpec("custom", blocks=(1,), channels=(4,), stem="small", stem_channels=4))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
  y, maps = nnx.jit(lambda m, x: (m(x, train=False), m.stages(x, train=False)))(encoder, x)
  np.testing.assert_allclose(y, np.asarray(maps[-1]).mean((1, 2)), rtol=1e-5)
  assert y.shape[1] == encoder.features == 4


@pytest.mark.parametrize(("channels", "strides"), [((8,), ()), ((8, 8), (1,)), ((8, 8), (1, 2, 2))])
def test_unequal_numbers_of_stages_are_refused(channels, strides):
  with pytest.raises(ValueError):
    build(ResNetSpec("custom", blocks=(1, 1), channels=channels, strides=strides))
