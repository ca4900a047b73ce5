"""Eight whole training steps of the reference's own code, reproduced by the product's train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byolx.core import sharding
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers, schedules
from byolx.training.state import TrainState, initialise
from byolx.training.step import compile_step

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ENCODERS = {
  "tiny": ResNetSpec("custom", blocks=(1, 1, 1, 1), channels=(8, 8, 8, 8)),
  "bottleneck": ResNetSpec(
    "custom", blocks=(1, 2, 1, 1), channels=(16, 32, 48, 64), bottleneck=True
  ),
}
NETWORKS = {"tiny": "tiny_res_net", "bottleneck": "bottleneck_net"}
# tests/golden/README.md: the reference against itself with its input perturbed by 3e-7.
NOISE = {"tiny": (4e-4, 7e-3, 3e-3), "bottleneck": (7e-6, 2e-4, 4e-5)}
STEPS, BATCH = 8, 16


def haiku_name(path: tuple, network: str) -> tuple[str, str]:
  """Where the reference keeps the parameter that this library keeps at `path` of a branch or head."""
  names = [str(part) for part in path]
  leaf = {"kernel": "w", "bias": "b", "scale": "scale", "offset": "offset"}[names[-1]]
  match names[:-1]:
    case ["encoder", "stem"]:
      return f"{network}/~/initial_conv", leaf
    case ["encoder", "stem_norm"]:
      return f"{network}/~/initial_batchnorm", leaf
    case ["encoder", "groups", group, block, kind, *index]:
      kinds = {"convs": "conv", "norms": "batchnorm"}
      inner = {"shortcut": "shortcut_conv", "shortcut_norm": "shortcut_batchnorm"}.get(kind)
      inner = inner or f"{kinds[kind]}_{index[0]}"
      return f"{network}/~/block_group_{group}/~/block_{block}/~/{inner}", leaf
    case [head, "hidden", "0"]:
      return f"{head}/linear", leaf
    case [head, "norms", "0"]:
      return f"{head}/batch_norm", leaf
    case [head, "output"]:
      return f"{head}/linear_1", leaf
    case ["probe"]:
      return "classifier", leaf
  raise ValueError(f"no such parameter in the reference: {path}")


def reference_key(section: str, path: tuple, network: str) -> str:
  """Key of a model parameter in the archive; path starts with online, target, predictor or probe."""
  inner = path[1:] if path[0] in ("online", "target") else path
  side = "target" if path[0] == "target" else "online"
  return "|".join([f"{section}_{side}", *haiku_name(inner, network)])


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def trajectory(request, golden):
  """(name, archive, final state, scalars of each step) of the eight steps."""
  name, archive = request.param, golden(f"trajectory_{request.param}")
  network = NETWORKS[name]
  spec = BYOLSpec(ENCODERS[name], 16, projector_hidden=32, predictor_hidden=32, classes=10)
  task = Pretrain(spec, STEPS, **IMAGENET, tau_base=0.9)
  mesh = sharding.make_mesh(1)
  rate = schedules.warmup_cosine(4.0 * BATCH / 256, 2, STEPS)
  params = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))), task.trainable, ...)[1]
  tx = optimizers.lars(rate, 1e-4, 0.9, 1e-3, optimizers.adapted(params))
  state = load(initialise(task, tx, jax.random.key(0), sharding.Layout(mesh)), archive, network)
  step = compile_step(task, tx, sharding.Layout(mesh))
  scalars = []
  for k in range(STEPS):
    batch = {key: archive[f"batch{k}|{key}"] for key in ("view1", "view2")}
    batch["label"] = archive[f"batch{k}|labels"]
    state, logged = step(state, sharding.put_batch(batch, mesh), jax.random.key(1))
    scalars.append(jax.device_get(logged) | {"rate": float(rate(k))})
  return name, network, archive, state, scalars


def load(state: TrainState, archive: dict, network: str) -> TrainState:
  """The state with every parameter replaced by the reference's start."""
  model = state.model()
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    value = archive[reference_key("start", path, network)]
    variable.set_value(jnp.asarray(value.reshape(variable.shape)))
  trainable = Pretrain.trainable
  _, params, rest = nnx.split(model, trainable, ...)
  return TrainState(state.step, params, rest, state.opt_state, state.graphdef)


def test_every_step_reproduces_the_scalars(trajectory):
  name, _, archive, _, scalars = trajectory
  tolerance = NOISE[name][0]
  for key, ours in {"loss": "loss", "repr_loss": "loss_byol", "classif_loss": "loss_probe"}.items():
    got = np.array([row[ours] for row in scalars])
    np.testing.assert_allclose(got[:2], archive[f"log|{key}"][:2], rtol=2e-6)
    np.testing.assert_allclose(got, archive[f"log|{key}"], atol=4 * tolerance)
  for key, ours in {"tau": "tau", "learning_rate": "rate", "top1_accuracy": "top1"}.items():
    got = np.array([row[ours] for row in scalars])
    np.testing.assert_allclose(got, archive[f"log|{key}"], rtol=1e-6, atol=1e-7)


def test_final_parameters_and_target(trajectory):
  name, network, archive, state, _ = trajectory
  moved = missed = 0.0
  for path, variable in nnx.to_flat_state(nnx.state(state.model(), nnx.Param)):
    start = archive[reference_key("start", path, network)]
    end = archive[reference_key("end", path, network)]
    moved += float(np.sum(np.square(end - start)))
    missed += float(np.sum(np.square(np.asarray(variable[...]).reshape(end.shape) - end)))
  assert np.sqrt(missed / moved) < 4 * NOISE[name][1]


@pytest.mark.parametrize("side", ["online", "target"])
def test_final_statistics(trajectory, side):
  name, network, archive, state, _ = trajectory
  model = state.model()
  branch = model.online if side == "online" else model.target
  norms = {path: m for path, m in nnx.iter_modules(branch) if type(m).__name__ == "BatchNorm"}
  assert len(norms) > 10
  for path, norm in norms.items():
    module = haiku_name((*path, "scale"), network)[0]
    mean, var = norm.averages()
    for ours, theirs in {"mean": mean, "var": var}.items():
      key = f"end_{side}_state|{module}/~/{ours}_ema|average"
      scale = max(1.0, float(np.abs(archive[key]).max()))
      np.testing.assert_allclose(
        np.asarray(theirs), archive[key].ravel(), atol=4 * NOISE[name][2] * scale
      )
    counter = archive[f"end_{side}_state|{module}/~/mean_ema|counter"]
    assert int(norm.updates[...]) == int(counter)
