"""Programs that a later start takes from disk: the same results, and never those of something else."""

import json
import logging
import pickle
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from tiny import config_text

from byolx.core import sharding
from byolx.runs import config, experiment, schema, trainer
from byolx.training import compile_cache, programs
from byolx.training.state import new_state

IMAGES = {"images": 8}
NO_RUN = Path("no_run")


@pytest.fixture(autouse=True)
def folder(tmp_path):
  """An empty folder of compiled programs."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  compilation_cache.reset_cache()
  yield tmp_path / "compiled"
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def load(tmp_path):
  """A tiny config, with fields changed."""
  path = tmp_path / "tiny.py"
  path.write_text(config_text(train={"batch_size": 96, "epochs": 6.0}))
  return lambda *changes: config.load(str(path), [f"--config.{change}" for change in changes])


def settle(kept):
  """Waits for the manifests that are being written."""
  for thread in threading.enumerate():
    if thread.name.startswith("manifest "):
      thread.join()
  return kept


def start(cfg):
  """What a run has after its first step: the state's arrays, and the scalars."""
  exp = experiment.build(cfg, compile_cache.begin(cfg, NO_RUN))
  batches = exp.train_batches(0)
  batch = next(sharding.prefetch(batches, exp.mesh))
  batches.close()
  state, scalars = exp.compile_step()(exp.initialise(), batch, exp.step_key)
  settle(exp.kept)
  return [np.asarray(x) for x in jax.tree.leaves((state, scalars))], jax.tree.structure(state)


@pytest.fixture
def never(monkeypatch):
  """Nothing is traced or unpickled from now on."""

  def refuse(*_, **__):
    raise AssertionError("this should not happen")

  def forbid():
    monkeypatch.setattr(trainer.Recipe, "lower", refuse)
    monkeypatch.setattr(programs.Kept, "compile", refuse)
    for name in ("load", "loads", "Unpickler"):
      monkeypatch.setattr(pickle, name, refuse)

  return forbid


@pytest.mark.parametrize("changes", [(), ("mesh.state=full", "mesh.fsdp=4", "mesh.data=8")])
def test_a_second_start_neither_traces_nor_unpickles_and_gives_the_same_bits(
  load, changes, never, capsys
):
  first, tree = start(load(*changes))
  assert "compiling the step" in capsys.readouterr().out
  jax.clear_caches()
  never()
  second, again = start(load(*changes))
  assert "the step was compiled in an earlier start" in capsys.readouterr().out
  assert tree == again
  assert len(first) == len(second)
  assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_kept_step_donates_and_refuses_as_a_compiled_one_does(load):
  start(load())
  exp = experiment.build(load())
  step, state = exp.compile_step(), exp.initialise()
  batch = next(sharding.prefetch(exp.train_batches(0), exp.mesh))
  wrong = batch | {"view1": batch["view1"].astype(jnp.float32)}
  with pytest.raises(TypeError, match="compiled with uint8"):
    step(state, wrong, exp.step_key)
  after, _ = step(state, batch, exp.step_key)
  assert jax.tree.leaves(state.params)[0].is_deleted()
  assert int(after.step) == 1
  for name in ("in_tree", "out_tree", "input_shardings", "output_shardings"):
    assert getattr(step, name) == getattr(exp.lower().compile(), name)


def manifest(exp, name="step"):
  return exp.kept.path(name)


@pytest.mark.parametrize(
  ("change", "same"),
  [
    ("log.every_steps=7", True),
    ("seed=5", True),
    ("data.workers=1", True),
    ("train.remat=block", False),
    ("train.micro_batch=48", False),
    ("train.epochs=7", False),
    ("mesh.data=4", False),
    ("mesh.state=zero", False),
    ("views.placement=device", False),
    ("optim.base_rate=0.1", False),
  ],
)
def test_another_config_has_other_programs(load, change, same):
  before, after = (manifest(experiment.build(load(*changes))) for changes in ((), (change,)))
  assert (before == after) == same


def test_every_field_shapes_the_programs_unless_it_is_named():
  known = programs.NOT_IN_PROGRAMS
  assert all(any(field.startswith(name) for field in schema.fields()) for name in known)
  made = programs.facts(config.defaults(), jax.devices())
  assert {"train.remat", "mesh.state", "model.arch", "views.size"} <= set(made["fields"])


@pytest.mark.parametrize(
  "change",
  [
    lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
    lambda patch: patch.setattr(programs, "SOURCE", "another"),
    lambda patch: patch.setattr(programs, "_version", lambda package: "0"),
    lambda patch: patch.setattr(programs, "_processor", lambda: "another"),
  ],
)
def test_other_code_flags_and_machines_have_other_programs(monkeypatch, change):
  arguments = config.defaults(), jax.devices()
  before = programs.of(*arguments).path("step")
  assert programs.of(*arguments).path("step") == before
  with jax.default_matmul_precision("highest"):
    assert programs.of(*arguments).path("step") != before
  change(monkeypatch)
  assert programs.of(*arguments).path("step") != before


def test_data_and_devices_are_part_of_the_facts():
  cfg, devices = config.defaults(), jax.devices()
  other = config.defaults()
  other.data.folder = "photos"
  every = [(cfg, devices), (other, devices), (cfg, devices[:4])]
  assert len({programs.of(*arguments).path("step") for arguments in every}) == 3


def test_the_file_of_the_users_own_task_is_part_of_the_facts():
  cfg, devices = config.defaults(), jax.devices()
  every = [(cfg, devices), (cfg, devices, "abc"), (cfg, devices, "abd")]
  assert len({programs.of(*arguments).path("step") for arguments in every}) == 3
  assert programs.facts(*every[1])["source"] == [programs.SOURCE, "abc"]


def test_the_source_checksum_sees_every_change(tmp_path):
  (tmp_path / "below").mkdir()
  for name, text in (("one.py", "x = 1"), ("below/two.py", "y = 2"), ("data.txt", "3")):
    (tmp_path / name).write_text(text)
  checksums = [programs.source_checksum(tmp_path)]
  (tmp_path / "data.txt").write_text("4")
  assert programs.source_checksum(tmp_path) == checksums[0]
  (tmp_path / "below" / "two.py").write_text("y = 3")
  checksums.append(programs.source_checksum(tmp_path))
  (tmp_path / "below" / "two.py").rename(tmp_path / "two.py")
  checksums.append(programs.source_checksum(tmp_path))
  assert len(set(checksums)) == 3


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def foreign(path):
  """A whole manifest, of a program with other facts."""
  manifest = json.loads(path.read_text())
  manifest.pop("checksum")
  manifest["facts"]["config"] += 1
  path.write_text(json.dumps(manifest | {"checksum": programs._sha256(manifest)}))


@pytest.mark.parametrize(
  ("what", "harm", "said"),
  [
    ("manifest", cut, "JSONDecodeError"),
    ("manifest", flip, "byolx_step"),
    ("manifest", lambda path: path.write_text("[]"), "byolx_step"),
    ("manifest", foreign, "made from another config"),
    ("entry", cut, "sha256 mismatch"),
    ("entry", flip, "sha256 mismatch"),
    ("entry", lambda path: path.unlink(), "FileNotFoundError"),
  ],
)
def test_what_is_damaged_or_foreign_is_made_anew(folder, caplog, what, harm, said):
  shapes, compiled = small(kept_in(folder))
  expected = compiled(*values(shapes))
  path = kept_in(folder).path("step")
  if what == "entry":
    path = folder / f"{json.loads(path.read_text())['entry']}-cache"
  assert kept_in(folder).find("step", *shapes, IMAGES) is not None
  harm(path)
  caplog.set_level(logging.WARNING)
  assert kept_in(folder).find("step", *shapes, IMAGES) is None
  assert said in caplog.text
  assert "the program is compiled again" in caplog.text
  path.unlink(missing_ok=True)
  compilation_cache.reset_cache()
  jax.clear_caches()
  small(kept_in(folder))
  again = kept_in(folder).find("step", *shapes, IMAGES)
  one, other = (jax.tree.leaves(x) for x in (again(*values(shapes)), expected))
  assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_program_for_other_shapes_is_not_taken(folder, caplog):
  (arguments, state), _ = small(kept_in(folder))
  other = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=state.sharding)
  assert kept_in(folder).find("step", (other, arguments[1]), other, IMAGES) is None
  assert "arguments and results" in caplog.text


def test_a_program_for_more_images_is_not_taken(folder, caplog):
  """They are counted only after it has begun to load."""
  shapes, _ = small(kept_in(folder))
  assert kept_in(folder).find("step", *shapes, {"images": 9}) is None
  assert "its images and classes are {'images': 8}, expected {'images': 9}" in caplog.text


def kept_in(folder):
  return programs.Kept(folder, {"config": 1}, jax.devices()[:1])


def small(kept):
  """A program like a step, compiled and noted; and what it takes, and returns first."""
  place = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  state, x = (jax.ShapeDtypeStruct((size,), jnp.float32, sharding=place) for size in (3, 4))

  def step(state, x):
    return state * 2 + jnp.sum(jnp.sin(x)), {"loss": jnp.sum(x)}

  jitted = jax.jit(step, in_shardings=place, out_shardings=place)
  compiled = kept.compile("step", jitted.lower(state, x), (state, x), state, IMAGES)
  settle(kept)
  return ((state, x), state), compiled


def values(shapes):
  return [jnp.arange(x.shape[0], dtype=x.dtype) for x in shapes[0]]


def test_without_a_folder_nothing_is_kept(load, folder):
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  cfg = load("compile.cache=")
  exp = experiment.build(cfg, compile_cache.begin(cfg, NO_RUN))
  assert manifest(exp) is None
  exp.initialise()
  settle(exp.kept)
  assert not folder.exists()


def test_the_keys_of_a_new_state_are_those_of_flax(load):
  exp = experiment.build(load())
  state = new_state(exp.task, exp.tx, exp.encoder_key)
  model = exp.task.init(nnx.Rngs(exp.encoder_key))
  expected = nnx.split(model, exp.task.trainable, ...)[1:]
  found = jax.tree.leaves((state.params, state.rest))
  for one, other in zip(found, jax.tree.leaves(expected), strict=True):
    assert np.array_equal(one, other)
