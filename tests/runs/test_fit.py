"""Stops, restarts and rollbacks of real runs: what comes out is what would have come out."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import config_text

from byolx.checkpoints import manager, pretrained
from byolx.core import sharding
from byolx.runs import config, experiment, fit, initial_state, rollbacks
from byolx.runs.workdir import claim
from byolx.training import loop
from byolx.training import step as training_step

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("compiled")
STEPS = 29

CONFIG = config_text(
  train={"epochs": 2, "batch_size": 96},
  checkpoint={"every_epochs": 0.5, "keep": 100},
  log={"every_steps": 1},
  mesh={"data": 1},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A config file."""
  file = tmp_path_factory.mktemp("config") / "tiny.py"
  file.write_text(CONFIG)
  return file


def trained(path, workdir, *overrides):
  """Runs or goes on, without the evaluation: (what was said, the arrays)."""
  cfg = config.load(str(path), [f"--config.{override}" for override in overrides])
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    claim(workdir, cfg)
    state = fit.fit(experiment.build(cfg), workdir)
  return out.getvalue(), [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def rows(workdir):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for row in found:
    del row["images_per_second"]
  return found


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
  """An undisturbed run: its workdir and arrays."""
  workdir = tmp_path_factory.mktemp("whole")
  _, arrays = trained(path, workdir)
  assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))
  return workdir, arrays


def same(arrays, others):
  for one, other in zip(arrays, others, strict=True):
    np.testing.assert_array_equal(one, other)


# Signals


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(
  number, code, path, whole, compiled, tmp_path
):
  slowly = (
    "import sys, time\n"
    "from byolx import cli; from byolx.runs import metrics_log\n"
    "write = metrics_log.RunLog.write\n"
    "def later(*arguments):\n"
    "  time.sleep(0.2)\n"
    "  write(*arguments)\n"
    "metrics_log.RunLog.write = later\n"
    "sys.exit(cli.main(sys.argv[1:]))\n"
  )
  workdir = tmp_path / "stopped"
  # No checkpoint is due before the signal: what is found afterwards was saved because of it.
  never = "--config.checkpoint.every_epochs=100"
  command = [sys.executable, "-c", slowly, "train", f"--config={path}", f"--workdir={workdir}"]
  environment = os.environ | compiled | {"PYTHONPATH": str(ROOT)}
  with subprocess.Popen(
    [*command, never], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
  ) as process:
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.02)
    process.send_signal(number)
    said = process.stderr.read()
  assert process.returncode == code
  last = said.splitlines()[-1]
  assert last.startswith(f"byolx: stopped by {number.name} after step ")
  assert last.endswith(f"of {STEPS}, which is saved; the same command goes on from there")
  (step,) = (int(one.name) for one in (workdir / "checkpoints").glob("[0-9]*"))
  assert 3 <= step < STEPS
  said, arrays = trained(path, workdir)
  assert f"going on from step {step} of {STEPS}" in said
  same(arrays, whole[1])
  assert rows(workdir) == rows(whole[0])


@pytest.fixture
def interruptible():
  """Ctrl-C as Python has it, also where the tests were started with it ignored, by a shell's `&`."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_as_ever():
  stop = fit.Stop()
  before = signal.getsignal(signal.SIGINT)
  with stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Divergence


def first_records(path):
  """The first record of every batch of an undisturbed run and some more."""
  exp = experiment.build(config.load(str(path)))
  with contextlib.closing(exp.train_batches(0)) as batches:
    return [int(batch["index"][0]) for batch in itertools.islice(batches, STEPS + 20)]


ROLL = "train.on_divergence=rollback"


def nan_probe(monkeypatch, bad):
  """Steps whose batch starts with a record in `bad` report a loss that is not finite."""
  compile_step = fit._compile

  def patched(exp):
    compiled = compile_step(exp)

    def run_step(state, batch, key):
      first = int(np.asarray(batch["index"][0]))
      state, scalars = compiled(state, batch, key)
      return state, scalars | ({"loss": jax.numpy.float32("nan")} if first in bad else {})

    return run_step

  monkeypatch.setattr(fit, "_compile", patched)


def test_rollback_leaves_out_the_batches_since_the_checkpoint(path, tmp_path, monkeypatch):
  first = first_records(path)
  nan_probe(monkeypatch, {first[11]})  # the batch of step 12; checkpoints every 7 steps
  said, arrays = trained(path, tmp_path, ROLL)
  (line,) = [line for line in said.splitlines() if line.startswith("warning: step 12: loss=nan")]
  assert line.endswith(
    "Going back to step 7; the batches since then are left out (rollback 1 of 3)"
  )
  (rollback,) = [
    json.loads(line) for line in (tmp_path / rollbacks.ROLLBACKS).read_text().splitlines()
  ]
  assert (rollback["at"], rollback["to"], rollback["left_out"]) == (12, 7, 5)
  assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
  # An independent run of the same steps: 7 batches, then those from number 12 on.
  exp = experiment.build(config.load(str(path)))
  state = exp.initialise()
  monkeypatch.undo()
  step = training_step.compile_step(exp.task, exp.tx, exp.layout, passes=exp.passes)
  with contextlib.closing(exp.train_batches(0)) as batches:
    used = itertools.chain(
      itertools.islice(batches, 7), itertools.islice(batches, 5, 5 + STEPS - 7)
    )
    for batch in used:
      state, _ = step(state, sharding.put_batch(batch, exp.mesh), exp.step_key)
  same(arrays, [np.asarray(leaf) for leaf in jax.tree.leaves(state)])


def test_a_restart_after_a_rollback_goes_on_with_the_same_batches(path, tmp_path, monkeypatch):
  first = first_records(path)
  nan_probe(monkeypatch, {first[11], first[22]})
  _, arrays = trained(path, tmp_path / "one", ROLL)
  # The same, cut off and started again after each saved step; then from an early checkpoint.
  _, _ = trained(path, tmp_path / "two", ROLL)
  for newest in (21, 14):
    for one in (tmp_path / "two" / "checkpoints").glob("[0-9]*"):
      if int(one.name) > newest:
        subprocess.run(["rm", "-r", one], check=True)
    said, again = trained(path, tmp_path / "two", ROLL)
    assert f"going on from step {newest} of {STEPS}" in said
    same(again, arrays)
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
  # From before the first rollback it takes the same turns again.
  for one in (tmp_path / "two" / "checkpoints").glob("[0-9]*"):
    if int(one.name) > 0:
      subprocess.run(["rm", "-r", one], check=True)
  said, again = trained(path, tmp_path / "two", ROLL)
  same(again, arrays)
  assert "warning" not in said


def test_rollbacks_are_bounded(path, tmp_path, monkeypatch):
  nan_probe(monkeypatch, set(first_records(path)[9:]))
  with pytest.raises(
    loop.DivergedError, match=r"rolled back 2 times before; train.max_rollbacks=2"
  ):
    trained(path, tmp_path, ROLL, "train.max_rollbacks=2")
  lines = (tmp_path / rollbacks.ROLLBACKS).read_text().splitlines()
  assert [json.loads(line)["number"] for line in lines] == [1, 2]


def test_divergence_before_the_first_checkpoint_starts_anew(path, whole, tmp_path, monkeypatch):
  nan_probe(monkeypatch, {first_records(path)[2]})
  said, _ = trained(path, tmp_path, ROLL)
  assert "Going back to step 0" in said
  assert rows(tmp_path)[0]["loss"] != rows(whole[0])[0]["loss"]  # the first three batches are gone


# When


@pytest.mark.parametrize(
  ("overrides", "steps"),
  [
    (["checkpoint.every_epochs=0.5"], {7, 14, 21, 28, 29}),
    (["checkpoint.every_epochs=100", "checkpoint.every_steps=10"], {10, 20, 29}),
    (["checkpoint.every_epochs=100", "checkpoint.every_minutes=1e-9"], set(range(1, STEPS + 1))),
    (["checkpoint.every_epochs=100"], {29}),
  ],
)
def test_when_checkpoints_are_due(overrides, steps, path, tmp_path):
  trained(path, tmp_path, *overrides)
  assert {int(one.name) for one in (tmp_path / "checkpoints").glob("[0-9]*")} == steps


# Another run's encoder


def test_a_run_may_start_from_the_encoder_of_another(path, whole, tmp_path):
  def encoder(workdir, step, which):
    folder = workdir / "checkpoints" / str(step)
    return pretrained.read(folder, which, jax.sharding.SingleDeviceSharding(jax.devices()[0]))

  given = ["byol.projector_hidden=24", f"init.workdir={whole[0]}", "init.encoder=target"]
  given += ["checkpoint.every_steps=1", "optim.base_rate=1e-12"]  # it hardly moves
  said, arrays = trained(path, tmp_path / "grafted", *given)
  assert f"starting from the target encoder of {whole[0]}/checkpoints/{STEPS}" in said
  assert "online encoder" in said
  assert "not loaded" in said
  theirs, ours = encoder(whole[0], STEPS, "target"), encoder(tmp_path / "grafted", 1, "online")
  kernels = [name for name in theirs.arrays if "kernel" in name]
  assert kernels
  for name in kernels:
    np.testing.assert_allclose(ours.arrays[name], theirs.arrays[name], atol=1e-6)
  assert ours.lineage["from"]["path"] == str(whole[0] / "checkpoints" / str(STEPS))
  # Started again without a checkpoint, it takes the very same one, though there may be newer ones.
  lineage = json.loads((tmp_path / "grafted" / initial_state.LINEAGE).read_text())
  (tmp_path / "again").mkdir()
  older = lineage | {"path": str(whole[0] / "checkpoints" / "14")}
  (tmp_path / "again" / initial_state.LINEAGE).write_text(json.dumps(older))
  said, others = trained(path, tmp_path / "again", *given)
  assert f"starting from the target encoder of {whole[0]}/checkpoints/14" in said
  assert any((one != other).any() for one, other in zip(arrays, others, strict=True))
  with pytest.raises(
    config.ConfigError, match=r"\(model\.channels: \(16,\), but the encoder has \(8,\)\)"
  ):
    trained(path, tmp_path / "other", f"init.workdir={whole[0]}", "model.channels=(16,)")


# Other devices


def test_a_run_that_changes_its_mesh_goes_on_within_rounding(path, whole, tmp_path):
  """8 -> 4 -> 1 -> 8 devices, a quarter of the run on each: the same records in the same order."""
  newest = 0
  for devices, stays in ((8, 7), (4, 14), (1, 21), (8, STEPS)):
    said, arrays = trained(path, tmp_path, f"mesh.data={devices}")
    assert not newest or f"going on from step {newest} of" in said
    newest = stays
    for one in (tmp_path / "checkpoints").glob("[0-9]*"):
      if int(one.name) > stays:
        shutil.rmtree(one)
  for ours, theirs in zip(arrays, whole[1], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
  found, expected = rows(tmp_path), rows(whole[0])
  assert [row["step"] for row in found] == [row["step"] for row in expected]
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_a_run_that_changes_where_its_state_lives_goes_on_within_rounding(
  path, whole, tmp_path, monkeypatch
):
  """In pieces over 8 devices, over 4, whole, in pieces again: checkpoints hold whole arrays."""
  monkeypatch.setattr(sharding, "LEAST_TO_CUT", 64)
  quarters = (("full", 8, 7), ("zero", 4, 14), ("replicated", 1, 21), ("full", 4, STEPS))
  for state, devices, stays in quarters:
    overrides = f"mesh.state={state}", f"mesh.data={devices}"
    exp = experiment.build(config.load(str(path), [f"--config.{name}" for name in overrides]))
    kept = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(exp.abstract_state)]
    assert all(kept) == (state == "replicated")
    _, arrays = trained(path, tmp_path, *overrides)
    for one in (tmp_path / "checkpoints").glob("[0-9]*"):
      if int(one.name) > stays:
        shutil.rmtree(one)
  for ours, theirs in zip(arrays, whole[1], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
  for ours, theirs in zip(rows(tmp_path), rows(whole[0]), strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_an_encoder_from_another_run_takes_its_place_in_pieces(path, whole, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "LEAST_TO_CUT", 64)
  said, _ = trained(
    path, tmp_path, f"init.workdir={whole[0]}", "mesh.state=full", "mesh.data=8", "train.epochs=0.6"
  )
  assert "starting from the online encoder of" in said


def test_a_checkpoint_serves_any_micro_batch(path, whole):
  """The state does not know how many passes a step took: every array comes back as it was."""
  checkpoints = manager.Checkpoints(whole[0] / "checkpoints")
  for micro in (0, 48, 32):
    exp = experiment.build(config.load(str(path), [f"--config.train.micro_batch={micro}"]))
    state = fit.restore(exp, checkpoints, rollbacks.Rollbacks(whole[0]))
    same([np.asarray(leaf) for leaf in jax.tree.leaves(state)], whole[1])
    with contextlib.closing(exp.train_batches(STEPS)) as batches:
      step = training_step.compile_step(exp.task, exp.tx, exp.layout, passes=exp.passes)
      state, scalars = step(state, sharding.put_batch(next(batches), exp.mesh), exp.step_key)
    assert np.isfinite(float(scalars["loss"]))
  checkpoints.close()
