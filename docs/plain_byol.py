"""BYOL's train step in plain JAX, as a reference for speed: dicts of arrays and functions.

The computation is that of byolx with a float32 ResNet, LARS, two interleaved views, online probe and
monitors; `step_speed.py` compares results and speed. Nothing here imports byolx. The numbers and sizes
of stages and blocks follow from the parameters.

  {"online": {"encoder": {"stem", "stem_norm", "groups": {0: {0: {"convs", "norms", ...}}}},
              "projector": {"hidden", "norms", "output"}},
   "predictor": {...}, "probe": {"kernel", "bias"}}

A normalisation has `scale` and `offset` here, and `mean`, `var`, `updates` in the averages' dict.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

EPS, DECAY = 1e-5, 0.9
LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Constants of a run: colour normalisation, tau, optimiser, and the schedule of `steps` steps."""

  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  steps: int
  warmup_steps: int
  peak_rate: float
  weight_decay: float
  momentum: float
  trust: float
  tau_base: float


def conv(kernel, x, stride=1):
  """Convolution with TensorFlow's padding; 1x1 kernels as products, which are faster on a CPU."""
  if kernel.shape[0] == 1:
    return x[:, ::stride, ::stride] @ kernel[0, 0]
  return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=LAYOUT)


def batch_norm(params, averages, x):
  """Normalises each of two interleaved views by its own statistics; also returns new averages."""
  split = x.reshape(-1, 2, *x.shape[1:])
  axes = (0, *range(2, split.ndim - 1))
  mean = jnp.mean(split, axes, keepdims=True)
  var = jnp.maximum(jnp.mean(split * split, axes, keepdims=True) - mean * mean, 0.0)
  y = (split - mean) * (jax.lax.rsqrt(var + EPS) * params["scale"]) + params["offset"]
  new_mean, new_var = averages["mean"], averages["var"]
  for view in range(2):
    new_mean = DECAY * new_mean + (1 - DECAY) * mean.reshape(2, -1)[view]
    new_var = DECAY * new_var + (1 - DECAY) * var.reshape(2, -1)[view]
  return y.reshape(x.shape), {"mean": new_mean, "var": new_var, "updates": averages["updates"] + 2}


def block(params, averages, x, stride):
  """One residual block, its stride on the 3x3 convolution of a bottleneck."""
  skip, norms = x, {}
  new = {"norms": norms}
  if "shortcut" in params:
    skip, new["shortcut_norm"] = batch_norm(
      params["shortcut_norm"],
      averages["shortcut_norm"],
      conv(params["shortcut"]["kernel"], x, stride),
    )
  last = len(params["convs"]) - 1
  strided = 1 if last == 2 else 0
  for i in range(last + 1):
    x = conv(params["convs"][i]["kernel"], x, stride if i == strided else 1)
    x, norms[i] = batch_norm(params["norms"][i], averages["norms"][i], x)
    x = jax.nn.relu(x if i < last else x + skip)
  return x, new


def encoder(params, averages, x):
  """Images to features: stem, max pool, stages of residual blocks, mean over space."""
  new, groups = {}, {}
  x = conv(params["stem"]["kernel"], x, 2)
  x, new["stem_norm"] = batch_norm(params["stem_norm"], averages["stem_norm"], x)
  window = (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
  x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, *window)
  for i, stage in params["groups"].items():
    groups[i] = {}
    for j, inner in stage.items():
      stride = 2 if i > 0 and j == 0 else 1
      x, groups[i][j] = block(inner, averages["groups"][i][j], x, stride)
  return jnp.mean(x, (1, 2)), new | {"groups": groups}


def mlp(params, averages, x):
  """Linear layers, each followed by normalisation and ReLU except the last, which has no bias."""
  norms = {}
  for i, layer in params["hidden"].items():
    x = x @ layer["kernel"] + layer["bias"]
    x, norms[i] = batch_norm(params["norms"][i], averages["norms"][i], x)
    x = jax.nn.relu(x)
  return x @ params["output"]["kernel"], {"norms": norms}


def branch(params, averages, x):
  """Representation y, projection z, and new averages."""
  y, of_encoder = encoder(params["encoder"], averages["encoder"], x)
  z, of_projector = mlp(params["projector"], averages["projector"], y)
  return y, z, {"encoder": of_encoder, "projector": of_projector}


def by_view(x):
  """Rows 2 * b + v as [b, v]."""
  return x.reshape(-1, 2, x.shape[-1])


def l2_normalise(x):
  """x / ||x||."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def monitors(y, z):
  """Standard deviation and rank of the projections of view 1, and mean norms of y and z."""
  lengths = jnp.linalg.norm(z, axis=1, keepdims=True)
  unit = z / jnp.maximum(lengths, 1e-12)
  centred = unit - jnp.mean(unit, 0)
  gram = centred @ centred.T if z.shape[0] < z.shape[1] else centred.T @ centred
  total, spread = jnp.trace(gram), jnp.trace(gram) > 1e-12 * z.shape[0]
  return {
    "std": jnp.mean(jnp.std(unit, 0)) * math.sqrt(z.shape[1]),
    "rank": jnp.where(spread, total**2 / jnp.where(spread, jnp.sum(gram**2), 1.0), 0.0),
    "norm_representation": jnp.mean(jnp.linalg.norm(y, axis=1)),
    "norm_projection": jnp.mean(lengths),
  }


def loss_of(params, target, averages, batch, settings):
  """BYOL's loss in both directions plus the probe's; also returns new averages and scalars."""
  views = jnp.stack([batch["view1"], batch["view2"]], axis=1)
  x = views.reshape(-1, *views.shape[2:]).astype(jnp.float32) / 255.0
  x = (x - jnp.asarray(settings.mean)) / jnp.asarray(settings.std)
  new = {}
  y, z, new["online"] = branch(params["online"], averages["online"], x)
  q, new["predictor"] = mlp(params["predictor"], averages["predictor"], z)
  _, wanted, new["target"] = branch(target, averages["target"], x)
  # View 1 predicts view 2's target, and the other way round.
  gap = l2_normalise(by_view(q)) - l2_normalise(by_view(jax.lax.stop_gradient(wanted)))[:, ::-1]
  byol = jnp.mean(jnp.sum(gap * gap, (1, 2)))
  first_y, first_z = (jax.lax.stop_gradient(by_view(a)[:, 0]) for a in (y, z))
  labels = batch["label"]
  labelled = labels >= 0
  count = jnp.maximum(jnp.sum(labelled), 1)
  logits = first_y @ params["probe"]["kernel"] + params["probe"]["bias"]
  entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
  probe = jnp.sum(jnp.where(labelled, entropy, 0.0)) / count
  hits = jnp.sum((jnp.argmax(logits, 1) == labels) & labelled)
  scalars = {
    "loss": byol + probe,
    "loss_byol": byol,
    "loss_probe": probe,
    "top1": hits / count,
    **monitors(first_y, first_z),
  }
  return byol + probe, (jax.lax.stop_gradient(new), scalars)


def rate_at(step, settings):
  """Linear warm-up from 0, then a cosine to 0."""
  peak, warmup, steps = settings.peak_rate, settings.warmup_steps, settings.steps
  done = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
  cosine = peak * (1.0 + jnp.cos(jnp.pi * done)) / 2.0
  return jnp.where(step < warmup, peak * step / max(warmup, 1), cosine)


def lars(path, param, grad, trace, rate, settings):
  """(update, momentum) of one array; only kernels have weight decay and trust ratio."""
  if path[-1].key == "kernel":
    grad = grad + settings.weight_decay * param
    of_param, of_grad = jnp.linalg.norm(param), jnp.linalg.norm(grad)
    usable = (of_param > 0) & (of_grad > 0)
    ratio = settings.trust * of_param / jnp.where(usable, of_grad, 1.0)
    grad = grad * jnp.where(usable, ratio, 1.0)
  trace = settings.momentum * trace + grad
  return -rate * trace, trace


def norm_of(tree):
  """Euclidean norm of all arrays together."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def train_step(settings, state, batch):
  """One step: gradient, LARS, update of the target. The state should be donated."""
  params, step = state["params"], state["step"]
  grads, (averages, scalars) = jax.grad(loss_of, has_aux=True)(
    params, state["target"], state["averages"], batch, settings
  )
  rate = rate_at(step, settings)
  pairs = jax.tree_util.tree_map_with_path(
    lambda path, *arrays: lars(path, *arrays, rate, settings), params, grads, state["momentum"]
  )
  updates, momentum = jax.tree.transpose(jax.tree.structure(params), None, pairs)
  params = jax.tree.map(jnp.add, params, updates)
  tau = 1.0 - (1.0 - settings.tau_base) * (jnp.cos(jnp.pi * step / settings.steps) + 1.0) / 2.0
  target = jax.tree.map(
    lambda xi, theta: xi + (1.0 - tau) * (theta - xi), state["target"], params["online"]
  )
  scalars |= {"tau": tau, "norm_gradient": norm_of(grads), "norm_update": norm_of(updates)}
  state = {
    "step": step + 1,
    "params": params,
    "target": target,
    "averages": averages,
    "momentum": momentum,
  }
  return state, scalars


def new_state(params, target, averages):
  """The state at step 0, with zero momentum."""
  return {
    "step": jnp.zeros((), jnp.int32),
    "params": params,
    "target": target,
    "averages": averages,
    "momentum": jax.tree.map(jnp.zeros_like, params),
  }


def compile_step(settings, whole, spread):
  """The jitted step: sharding `whole` for the state, which is donated, and `spread` for batches."""

  def step(state, batch):
    return train_step(settings, state, batch)

  return jax.jit(step, in_shardings=(whole, spread), out_shardings=(whole, whole), donate_argnums=0)
