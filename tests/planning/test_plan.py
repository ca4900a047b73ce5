"""`byolx plan`: real programs of a tiny network, for TPUs that are not there, and what follows."""

import json
import re
from pathlib import Path

import jax
import pytest
import tiny

from byolx import cli
from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.planning import ahead_of_time, plan, tpu
from byolx.planning import page as planning_page
from byolx.runs import config, trainer

KEYS = {
  "topology", "cores", "fits", "peak_bytes", "argument_bytes", "temp_bytes", "flops",
  "bytes_accessed", "scheduled_step_seconds", "roofline_step_seconds", "collectives",
  "compile_seconds", "steps", "hours",
}  # fmt: skip
GIB = 2**30
ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
  """Writes a tiny config with groups of fields changed; its path."""

  def write(name="tiny.py", **groups):
    path = tmp_path / name
    groups.setdefault("train", {"epochs": 2.0, "batch_size": 64})
    path.write_text(tiny.config_text(**groups))
    return path

  return write


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """What these tests compiled once."""
  return tmp_path_factory.mktemp("plans")


@pytest.fixture
def byolx(capsys, cache):
  """Runs `byolx plan` in this process: (exit code, stdout, stderr)."""

  def run(*arguments):
    given = [str(argument) for argument in arguments]
    if not any(word.startswith("--cache=") for word in given):
      given.append(f"--cache={cache}")
    try:
      code = cli.main(["plan", *given])
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def never(monkeypatch):
  """No program may be compiled."""

  def compiles(*args, **kwargs):
    raise AssertionError("compiled")

  return lambda: monkeypatch.setattr(ahead_of_time, "compile_with_progress", compiles)


# One plan


def test_a_plan_of_a_tiny_run(byolx, write, tmp_path):
  out = tmp_path / "plan.json"
  given = [f"--config={write()}", "--topology=v3:2x2", f"--json={out}", "--costs=3", "--price=2"]
  code, page, err = byolx(*given, "--efficiency=0.25")
  assert code == 0
  assert err == "compiling for v3:2x2, usually less than a minute\n"
  found = json.loads(out.read_text())
  assert set(found) >= KEYS
  assert (found["topology"], found["cores"], found["hosts"]) == ("v3:2x2", 8, 1)
  assert found["fits"] is True
  # 1437 digits are for training.
  assert found["steps"] == 2 * 1437 // 64
  assert found["hours"] * 3600 == pytest.approx(found["steps"] * found["scheduled_step_seconds"])
  assert found["hours_at_efficiency"] == pytest.approx(4 * found["hours"])
  assert found["core_hours"] == pytest.approx(8 * found["hours_at_efficiency"])
  assert found["usd"] == pytest.approx(2 * found["core_hours"])
  assert found["images_per_second"] * found["scheduled_step_seconds"] == pytest.approx(64)
  cycles = sum(found["cycles_by_kind"].values())
  assert found["scheduled_step_seconds"] == pytest.approx(cycles / 940e6)
  assert 0 < found["roofline_step_seconds"] < found["scheduled_step_seconds"]
  assert 0 < found["share_of_flops"] < found["share_of_bandwidth"] < 1
  assert found["collectives"]["all-reduce"]["count"] > 0
  assert found["compile_seconds"] > 0
  assert len(found["costs"]) == 3
  assert page.startswith(
    f"{tmp_path / 'tiny.py'}\nv3:2x2: 8 cores on 1 host; batch 64, 8 images a core;"
  )
  assert "\nfits            yes: " in page
  assert "44 steps" in page
  assert page.rstrip().endswith(planning_page.LEFT_OUT)
  assert len(re.findall(r"^ *\d\.\d{3} +\d+\.\d  ", page, re.M)) == 3


def test_state_and_batch_are_the_arguments(write, cache):
  """Every core holds the state, its images of two views, and their labels."""
  topology, terms = tpu.topology("v3:2x2"), plan.Terms(cache=cache)
  built = plan.build(config.load(str(write())), topology, terms)
  figures = plan.make(built, "tiny", topology, terms).figures
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(built.abstract_state))
  held = state + 8 * 2 * (8 * 8 * 3)
  # A TPU holds arrays in tiles, of which small ones fill a part.
  assert held <= figures.argument_bytes < 32 * held
  assert figures.output_bytes <= figures.argument_bytes


def test_it_is_the_program_that_train_runs(write):
  """Lowered for as many CPU devices it is, but for the platform, what `recipe` gives to training."""
  topology = tpu.topology("v3:2x2")
  cfg = config.load(str(write()))
  for_tpu = plan.build(cfg, topology, plan.Terms())
  for_cpu = trainer.build(cfg, jax.devices()[:8], 1437, 10)
  assert for_tpu.steps == for_cpu.steps
  tpu_shapes, cpu_shapes = (
    [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one.lower().in_avals)]
    for one in (for_tpu, for_cpu)
  )
  assert tpu_shapes == cpu_shapes


def test_micro_batches_do_the_same_work(byolx, write, tmp_path):
  """A loop over two passes has the flops of one pass over all, where XLA would count one turn."""
  found = []
  for name, train in (("whole", {}), ("halves", {"micro_batch": 32})):
    path = write(f"{name}.py", train={"epochs": 2.0, "batch_size": 64, **train})
    out = tmp_path / f"{name}.json"
    assert byolx(f"--config={path}", "--topology=v3:2x2", f"--json={out}")[0] == 0
    found.append(json.loads(out.read_text()))
  whole, halves = found
  assert (whole["passes"], halves["passes"]) == (1, 2)
  assert halves["flops"] == pytest.approx(whole["flops"], rel=0.1)
  assert halves["steps"] == whole["steps"]
  counts = [one["collectives"]["all-reduce"]["count"] for one in found]
  assert counts[1] > 1.5 * counts[0]


# Remembering


def test_a_second_time_nothing_is_compiled(byolx, write, never, tmp_path):
  first, second = tmp_path / "1.json", tmp_path / "2.json"
  given = [f"--config={write()}", "--topology=v3:2x2"]
  assert byolx(*given, f"--json={first}")[0] == 0
  never()
  code, _, err = byolx(*given, f"--json={second}")
  assert (code, err) == (0, "")
  assert first.read_text() == second.read_text()


# Tables


def test_a_table_of_topologies(byolx, write, tmp_path):
  out = tmp_path / "plans.json"
  given = [f"--config={write()}", "--topology=v3:2x2,v5e:2x2", f"--json={out}"]
  code, page, err = byolx(*given, "--price=1")
  assert code == 0
  assert f"2 of 2: {tmp_path / 'tiny.py'} on v5e:2x2" in err
  found = json.loads(out.read_text())
  assert [one["topology"] for one in found] == ["v3:2x2", "v5e:2x2"]
  for one, flops, bandwidth in zip(found, (61.5e12, 197e12), (450e9, 819e9), strict=True):
    work = max(one["flops"] / flops, one["bytes_accessed"] / bandwidth)
    assert work <= one["roofline_step_seconds"] < one["scheduled_step_seconds"]
  head, first, second = page.splitlines()[:3]
  assert head.split()[:3] == ["topology", "cores", "fits"]
  assert (first.split()[:3], second.split()[0]) == (["v3:2x2", "8", "yes"], "v5e:2x2")
  assert head.split()[-1] == "USD"
  assert planning_page.LEFT_OUT in page


def test_a_table_of_configs_goes_on_where_it_stopped(byolx, write, monkeypatch, tmp_path):
  """What was compiled before Ctrl-C is not compiled again."""
  paths = [write("a.py"), write("b.py", byol={"projection_size": 12})]
  given = [*(f"--config={path}" for path in paths), "--topology=v3:2x2"]
  given.append(f"--cache={tmp_path / 'plans'}")
  compile_with_progress, asked = ahead_of_time.compile_with_progress, []

  def stops(lowered, name, size):
    asked.append(size)
    if len(asked) == 2:
      raise KeyboardInterrupt
    return compile_with_progress(lowered, name, size)

  monkeypatch.setattr(ahead_of_time, "compile_with_progress", stops)
  code, _, err = byolx(*given)
  assert code == 130
  assert "the same command goes on from there" in err
  code, page, _ = byolx(*given)
  assert (code, len(asked)) == (0, 3)
  assert asked[2] == asked[1]
  assert page.splitlines()[0].split()[:2] == ["config", "topology"]
  assert [line.split()[0] for line in page.splitlines()[1:3]] == [str(path) for path in paths]


@pytest.mark.usefixtures("compiled")
def test_jaxs_own_cache_is_set_aside(byolx, write, tmp_path):
  """It would keep a program that it cannot load without the devices, and warn of it the next time."""
  jax.jit(lambda x: x * 2).lower(1.0).compile()  # from here on jax takes its cache to be in use
  folder = jax.config.jax_compilation_cache_dir
  for name in ("once", "again"):
    code, _, err = byolx(
      f"--config={write('a.py')}", "--topology=v3:2x2", f"--cache={tmp_path / name}"
    )
    assert code == 0
    assert "compiling for v3:2x2" in err
  assert jax.config.jax_compilation_cache_dir == folder


# What does not fit


@pytest.fixture
def memory(monkeypatch):
  """Instead of the compiler: a peak by state, remat and passes of the recipe, in GiB; what was asked."""

  def of(peaks):
    asked = []

    def figures(lowered, topology, cache):
      return lowered_peaks.pop()

    lowered_peaks = []
    lowered = jax.jit(lambda x: x).lower(0.0)

    def noted(self):
      c = self.config
      asked.append((c.mesh.state, c.train.remat, self.passes))
      peak = peaks(*asked[-1])
      lowered_peaks.append(ahead_of_time.Figures(peak <= 15, int(peak * GIB)))
      return lowered

    monkeypatch.setattr(trainer.Recipe, "lower", noted)
    monkeypatch.setattr(ahead_of_time, "figures", figures)
    monkeypatch.setattr(sharding, "held_bytes", lambda tree: 2 * GIB)
    return asked

  return of


def planned(path, search=True):
  topology, terms = tpu.topology("v3:2x2"), plan.Terms(search=search)
  built = plan.build(config.load(str(path)), topology, terms)
  return plan.make(built, "tiny", topology, terms)


def test_the_smallest_change_that_fits(memory, write):
  """The order is: state, then remat, then micro-batches; the first that fits ends it."""
  asked = memory(lambda state, remat, passes: {"none": 20, "convolution": 18, "block": 14}[remat])
  found = planned(write())
  assert not found.figures.fits
  assert asked == [
    ("replicated", "none", 1),
    ("zero", "none", 1),
    ("full", "none", 1),
    ("replicated", "convolution", 1),
    ("zero", "convolution", 1),
    ("full", "convolution", 1),
    ("replicated", "block", 1),
  ]
  assert found.better.flags == ["--config.train.remat=block"]
  assert found.better.figures.fits
  assert found.json()["smallest_change"]["changes"] == {"train.remat": "block"}
  assert found.tried[0] == "mesh.state=zero: needs 20.00 GiB"
  assert found.tried[-1] == "train.remat=block: needs 14.00 GiB"


def test_micro_batches_come_last(memory, write):
  asked = memory(lambda state, remat, passes: 20 / passes)
  found = planned(write())
  assert asked.index(("full", "stage", 1)) == len(asked) - 2
  assert found.better.flags == ["--config.train.micro_batch=32"]
  assert found.better.passes == 2


def test_changes_that_cannot_be_enough_are_not_compiled(memory, write):
  """8 GiB of state and its like cannot free 30; nor can they once remat leaves 24 of them missing."""
  asked = memory(lambda state, remat, passes: {"none": 46, "convolution": 40}.get(remat, 15))
  found = planned(write())
  assert asked == [("replicated", remat, 1) for remat in ("none", "convolution", "block")]
  assert "mesh.state=full: cannot free enough, not compiled" in found.tried
  assert "train.remat=convolution, mesh.state=full: cannot free enough, not compiled" in found.tried
  assert found.better.changes == {"train.remat": "block"}


def test_nothing_fits(memory, write):
  asked = memory(lambda state, remat, passes: 100.0)
  found = planned(write())
  assert found.better is None
  assert ("replicated", "stage", 1) in asked
  assert max(passes for *_, passes in asked) == 8  # one image a core
  page = planning_page.page(found)
  assert "no: 100.00 GiB needed, 15.48 available on a core; 84.52 too much" in page
  assert page.endswith("more cores or a smaller train.batch_size will help")
  row = planning_page.table([found]).splitlines()[1].split()
  assert row[:4] == ["v3:2x2", "8", "no", "100.00"]


def test_no_search(memory, write):
  asked = memory(lambda state, remat, passes: 100.0)
  found = planned(write(), search=False)
  assert (len(asked), found.tried, found.better) == (1, (), None)


def test_what_the_compiler_says_of_a_program_that_is_too_large(byolx, write, tmp_path, monkeypatch):
  """Its own words, through to the exit code."""
  said = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (21.50G) exceeds available HBM (15.48G). HLO module: jit_train_step.\nSee more"
  )

  def fails(*_):
    raise jax.errors.JaxRuntimeError(said)

  monkeypatch.setattr(ahead_of_time, "compile_with_progress", fails)
  out = tmp_path / "plan.json"
  given = [f"--config={write()}", "--topology=v3:2x2", f"--cache={tmp_path}", f"--json={out}"]
  code, page, _ = byolx(*given, "--no_search")
  assert code == 1
  assert "no: 21.50 GiB needed, 15.48 available on a core; 6.02 too much" in page
  found = json.loads(out.read_text())
  assert (found["fits"], found["peak_bytes"], found["hours"]) == (False, int(21.5 * GIB), None)
  assert set(found) >= KEYS


def test_a_real_program_that_is_too_large(byolx, write):
  """The compiler's message for this very version is understood."""
  path = write(
    data={"source": "imagenet"},
    views={"size": 224},
    eval={"resize": 224},
    train={"epochs": 90.0, "batch_size": 8 * 4096},
  )
  code, page, _ = byolx(f"--config={path}", "--topology=v3:2x2", "--no_search")
  assert code == 1
  needed = float(re.search(r"no: ([\d.]+) GiB needed, 15\.48 available", page)[1])
  # Two views of 4096 images on a core, as bytes: 1.15 GiB; some activations of eight channels.
  assert 15.48 < needed < 1000


def test_another_failure_of_the_compiler(byolx, write, monkeypatch):
  def fails(*_):
    raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such thing\nmore")

  monkeypatch.setattr(ahead_of_time, "compile_with_progress", fails)
  code, _, err = byolx(f"--config={write()}", "--topology=v3:2x2", "--cache=")
  assert code == 2
  said = "--topology=v3:2x2: the compiler refuses this step: UNIMPLEMENTED: no such thing"
  assert err == f"byolx: error: {said}\n"


# Images


@pytest.mark.parametrize(
  ("fields", "given", "images", "classes"),
  [
    ({"data.source": "imagenet"}, {}, 1_281_167, 1000),
    ({"data.source": "imagenet", "data.validation": "last_10009"}, {}, 1_271_158, 1000),
    ({"data.source": "places365"}, {}, 1_803_460, 365),
    ({"data.source": "imagenet", "data.labels": 0.01}, {}, 12_812, 1000),
    ({"data.source": "digits", "data.validation": "share", "task": "linear"}, {}, 1437 - 144, 10),
    (
      {
        "data.source": "imagenet",
        "data.validation": "last_10009",
        "data.labels": 1.0,
        "task": "linear",
      },
      {},
      1_271_158,
      1000,
    ),
    ({"data.source": "cifar100"}, {"images": 600}, 600, 100),
    ({"data.source": "digits", "data.test_share": 0.5}, {}, 898, 10),
    ({"data.source": "image_folder"}, {"images": 700, "classes": 3}, 700, 3),
  ],
)
def test_images_are_counted_without_them(fields, given, images, classes):
  cfg = config.defaults()
  cfg.update_from_flattened_dict(fields)
  assert plan.count_images(cfg, plan.Terms(**given)) == (images, classes)


def test_images_that_cannot_be_counted(byolx, write, never, tmp_path):
  never()
  folder = tmp_path / "photos"
  path = write(data={"source": "image_folder", "folder": str(folder)})
  code, _, err = byolx(f"--config={path}", "--topology=v3:2x2")
  assert code == 2
  assert err.count("\n") == 1
  assert "data.source=image_folder: its images cannot be counted (" in err
  assert "give --images=N and --classes=N" in err


# The command


def test_help_has_examples_that_load(byolx):
  out = byolx("--help")[1].replace("\\\n", "")
  examples = [line.split() for line in out.splitlines() if line.startswith("  byolx plan ")]
  assert len(examples) >= 3
  for words in examples:
    values = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    config.load(str(ROOT / values["--config"]))
    assert all(tpu.topology(name).cores for name in values["--topology"].split(","))


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (["--topology=v3:3x3"], "--topology=v3:3x3: expected multiples of a host's 2x2 chips"),
    (["--topology=v3:2x2,v9-8"], "--topology=v9-8: expected chips as in v3:16x16"),
    (
      ["--topology=v3:4x4,v3:16x16"],
      "--topology=v3:16x16: train.batch_size=64: expected a multiple of the mesh's 512 devices",
    ),
    (["--topology=v3:2x2", "--efficiency=0"], "--efficiency: '0': expected a number above 0"),
    (
      ["--topology=v3:2x2", "--efficiency=1.5"],
      "--efficiency: '1.5': expected a number from 0 to 1",
    ),
    (["--topology=v3:2x2", "--price=-1"], "--price: '-1': expected a number of at least 0"),
    (["--topology=v3:2x2", "--images=0"], "--images: '0': expected a whole number of at least 1"),
    (["--topology=v3:2x2", "--images=10"], "expected at most the 10 training images"),
    (["--topology=v3:2x2", "--config.model.arch=resnet51"], "model.arch='resnet51'"),
    ([], "required: --topology; see byolx plan --help"),
  ],
)
def test_mistakes_are_known_before_anything_is_compiled(byolx, write, never, given, said):
  never()
  code, out, err = byolx(f"--config={write()}", *given)
  assert (code, out) == (2, "")
  assert err.startswith("byolx: error: ")
  assert said in err
  assert err.count("\n") == 1


def test_without_the_compiler(byolx, write, monkeypatch):
  def missing():
    raise ConfigError("not installed; install it with: pip install 'byolx[plan]'")

  monkeypatch.setattr(tpu, "version", missing)
  code, _, err = byolx(f"--config={write()}", "--topology=v3:2x2")
  assert code == 2
  assert "pip install 'byolx[plan]'" in err
