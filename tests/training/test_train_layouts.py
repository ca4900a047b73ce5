"""Every way to keep the state, and every remat policy, trains alike; what each device holds of it."""

import jax
import numpy as np
import pytest
from flax import nnx
from test_train_devices import KEY, numpy_init

from byolx.core import sharding
from byolx.data import loader
from byolx.data.augment.distribution import ViewSpec
from byolx.data.sources import small
from byolx.data.transforms import Views
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers, schedules
from byolx.training.state import TrainState, abstract_state, initialise, new_state
from byolx.training.step import compile_step, train_step

STEPS, BATCH = 10, 64
LAYOUTS = {
  "replicated": ("replicated", 1),
  "zero": ("zero", 8),
  "zero, two copies": ("zero", 4),
  "full": ("full", 8),
  "full, two copies": ("full", 4),
}
RUNS = [
  *((layout, "none", 1) for layout in LAYOUTS),
  *(("replicated", remat, 1) for remat in ("convolution", "block", "stage")),
  ("full", "block", 1),
  ("full", "none", 2),
]


@pytest.fixture(scope="module")
def small_pieces():
  """Arrays of 64 elements are cut too, so that a small network's kernels are."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "LEAST_TO_CUT", 64)
    yield


@pytest.fixture(scope="module")
def parts(small_pieces):
  """Task, optimiser, first state and ten batches of digits."""
  encoder = ResNetSpec(
    "custom",
    blocks=(1, 1),
    channels=(8, 16),
    strides=(2, 1),
    stem="small",
    stem_channels=8,
    kernel_init=numpy_init,
  )
  spec = BYOLSpec(
    encoder, 8, projector_hidden=16, predictor_hidden=16, target_init="online", classes=10
  )
  task = Pretrain(spec, STEPS, mean=(0.3,) * 3, std=(0.35,) * 3, tau_base=0.9)
  params = nnx.split(task.init(nnx.Rngs(0)), task.trainable, ...)[1]
  rate = schedules.warmup_cosine(0.02, 2, STEPS)
  tx = optimizers.lars(rate, 1e-4, 0.9, 1e-2, optimizers.adapted(params))
  source = small.digits("train", test_share=0.2)
  views = Views((ViewSpec(),) * 2, 8)
  with loader.train_batches(source, views, BATCH, seed=0) as stream:
    batches = [next(stream) for _ in range(STEPS)]
  return task, tx, jax.device_get(new_state(task, tx, jax.random.key(0))), batches


@pytest.fixture(scope="module")
def run(parts):
  """Ten steps of one layout, remat policy and number of passes: (state, compiled program's text)."""
  task, tx, first, batches = parts
  done = {}

  def of(layout, remat, passes):
    if (layout, remat, passes) not in done:
      kind, fsdp = LAYOUTS[layout]
      place = sharding.Layout(sharding.make_mesh(8, fsdp), kind)
      shardings = TrainState(
        sharding.replicated(place.mesh),
        place.of_params(first.params),
        place.of_rest(first.rest),
        place.of_rest(first.opt_state),
        first.graphdef,
      )
      state = jax.device_put(first, shardings)
      step = train_step
      jitted = jax.jit(
        lambda state, batch, key: step(task, tx, passes, remat, place, state, batch, key),
        out_shardings=(shardings, sharding.replicated(place.mesh)),
      )
      placed = [sharding.put_batch(batch, place.mesh) for batch in batches]
      compiled = jitted.lower(state, placed[0], KEY).compile()
      for batch in placed:
        state, _ = compiled(state, batch, KEY)
      done[layout, remat, passes] = state, compiled.as_text()
    return done[layout, remat, passes]

  return of


@pytest.mark.parametrize(("layout", "remat", "passes"), RUNS[1:])
def test_parameters_after_ten_steps_are_those_of_the_plain_run(parts, run, layout, remat, passes):
  first = parts[2]
  plain, other = run("replicated", "none", passes)[0], run(layout, remat, passes)[0]
  moved = 0.0
  for part in ("params", "rest"):
    begin, ours, theirs = (nnx.to_flat_state(getattr(s, part)) for s in (first, plain, other))
    for (path, x), (_, a), (_, b) in zip(begin, ours, theirs, strict=True):
      x, a, b = x[...], a[...], b[...]
      np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=str(path))
      moved = max(moved, float(np.abs(np.asarray(a) - x).max()))
  assert moved > 0.01


def collectives(text):
  kinds = ("all-reduce", "reduce-scatter", "all-gather")
  return {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "replicated"])
def test_pieces_are_reduced_by_scattering_and_gathered_for_use(parts, run, layout):
  plain = collectives(run("replicated", "none", 1)[1])
  assert plain["all-reduce"] > 0
  assert plain["reduce-scatter"] == plain["all-gather"] == 0
  found = collectives(run(layout, "none", 1)[1])
  count = LAYOUTS[layout][1]
  cut = [
    x
    for x in jax.tree.leaves(parts[2].params)
    if x.size >= 64 and any(n % count == 0 for n in x.shape)
  ]
  assert found["reduce-scatter"] > 0
  assert found["reduce-scatter"] <= len(cut)
  assert found["all-gather"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_holds_the_bytes_that_the_layout_predicts(parts, run, layout):
  kind, count = LAYOUTS[layout]
  first, state = parts[2], run(layout, "none", 1)[0]

  def expected(x, cut):
    divisible = x.size >= 64 and any(size % count == 0 for size in x.shape)
    return x.size * x.dtype.itemsize // (count if cut and divisible and count > 1 else 1)

  for part, cut in (
    ("params", kind == "full"),
    ("rest", kind != "replicated"),
    ("opt_state", kind != "replicated"),
  ):
    arrays = jax.tree.leaves(getattr(state, part))
    wanted = sum(expected(x, cut) for x in jax.tree.leaves(getattr(first, part)))
    for device in range(8):
      assert sum(x.addressable_shards[device].data.nbytes for x in arrays) == wanted
  whole = sum(x.nbytes for x in jax.tree.leaves(first))
  held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  assert (held == whole) == (kind == "replicated")


@pytest.mark.parametrize("remat", ["convolution", "block", "stage"])
def test_what_is_not_kept_is_computed_again(run, remat):
  """More products, but no more exchanges: statistics of a batch are kept whatever the policy."""

  def counted(policy):
    text = run("replicated", policy, 1)[1]
    return text.count(" convolution(") + text.count(" dot("), collectives(text)["all-reduce"]

  (plain, exchanges), (again, exchanges_again) = counted("none"), counted(remat)
  assert exchanges_again <= exchanges
  if remat == "convolution":
    assert again == plain
  else:
    assert again > plain


def test_the_compiled_step_takes_and_gives_the_layouts_shardings(parts):
  encoder = ResNetSpec(
    "custom", blocks=(1,), channels=(8,), strides=(1,), stem="small", stem_channels=8
  )
  task = Pretrain(BYOLSpec(encoder, 8, 16, 1), STEPS, mean=(0.5,) * 3, std=(0.5,) * 3)
  params = nnx.eval_shape(lambda: nnx.split(task.init(nnx.Rngs(0)), task.trainable, ...)[1])
  tx = optimizers.sgd(lambda step: 0.1, 0.0, 0.9, optimizers.adapted(params))
  layout = sharding.Layout(sharding.make_mesh(8, 8), "full")
  state = initialise(task, tx, jax.random.key(0), layout)
  abstract = abstract_state(task, tx, layout)
  before = [x.sharding for x in jax.tree.leaves(state)]
  assert before == [x.sharding for x in jax.tree.leaves(abstract)]
  assert any(not place.is_fully_replicated for place in before)
  step = compile_step(task, tx, layout, remat="block")
  after, scalars = step(state, sharding.put_batch(parts[3][0], layout.mesh), KEY)
  for place, x in zip(before, jax.tree.leaves(after), strict=True):
    assert place.is_equivalent_to(x.sharding, x.ndim)
  assert all(np.isfinite(value) for value in jax.device_get(scalars).values())
