"""`byolx bench input`: every figure of its page, and what it calls enough."""

import dataclasses
import json

import numpy as np
import pytest
from photographs import write_jpegs

from byolx import cli
from byolx.data import loader
from byolx.data.decode import decode
from byolx.data.sampler import epoch_order
from byolx.data.transforms import Views
from byolx.planning import input_speed
from byolx.runs import config, images, trainer

STAGES = {"host": ["decode", "crop, resize", "colour", "batch", "transfer"]}
STAGES["device"] = [stage for stage in STAGES["host"] if stage != "colour"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Thirty small photographs, one of them cut off; 24 are for training."""
  root = tmp_path_factory.mktemp("photographs")
  paths = write_jpegs(root, 30, 72, 96)
  paths[0].write_bytes(paths[0].read_bytes()[:700])
  return root


@pytest.fixture
def settings(folder):
  """Overrides that make configs/image_folder.py tiny."""
  return [
    f"--config.data.folder={folder}",
    "--config.views.size=32",
    "--config.eval.resize=36",
    "--config.train.batch_size=8",
  ]


@pytest.fixture
def byolx(capsys):
  """Runs the command in this process: (exit code, stdout, stderr)."""

  def run(*arguments):
    try:
      code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()

  return run


def assert_consistent(report, stages):
  """The figures that follow from others do."""
  assert [stage.name for stage in report.stages] == stages
  assert all(0 < stage.ms_per_image < 1000 for stage in report.stages)
  for rate in report.rates:
    cores = max(1, min(rate.workers, report.cores))
    assert rate.per_core == pytest.approx(rate.images_per_second / cores)
    assert rate.of_limit == pytest.approx(rate.per_core / report.limit_images_per_second)
    assert 0 < rate.of_shared_limit < 3
  assert report.best.images_per_second == max(rate.images_per_second for rate in report.rates)
  busy = report.best.images_per_second * report.gflop_per_image * 1e9
  assert report.tpu_v3_cores == pytest.approx(busy / (0.3 * 61.5e12))


@pytest.mark.parametrize("placement", ["host", "device"])
def test_digits(placement):
  changes = [f"--config.views.placement={placement}"]
  cfg = config.load("configs/quickstart.py", changes)
  report = input_speed.measure_input(cfg, [0], 0.1)
  assert (report.source, report.records, report.size) == ("digits", 1437, cfg.views.size)
  assert (report.placement, report.batch_size) == (placement, cfg.train.batch_size)
  assert [rate.workers for rate in report.rates] == [0]
  assert_consistent(report, STAGES[placement])  # nothing is read


def test_folder_on_one_page_and_as_json(byolx, settings, tmp_path):
  code, out, _ = byolx(
    "bench", "input", "--config=configs/image_folder.py", *settings, "--config.data.threads=2",
    "--seconds=0.1", "--workers=0,1", f"--json={tmp_path / 'input.json'}",
  )  # fmt: skip
  assert code == 0
  found = json.loads((tmp_path / "input.json").read_text())
  assert set(found) == {field.name for field in dataclasses.fields(input_speed.InputReport)}
  report = input_speed.InputReport(
    **found
    | {
      "stages": tuple(input_speed.Stage(**stage) for stage in found["stages"]),
      "rates": tuple(input_speed.Rate(**rate) for rate in found["rates"]),
    }
  )
  assert (report.source, report.records, report.batch_size) == ("image_folder", 24, 8)
  assert [rate.workers for rate in report.rates] == [0, 1]
  assert_consistent(report, ["read", *STAGES["host"]])
  assert out == report.text() + "\n"
  assert len(out.splitlines()) < 30
  assert max(map(len, out.splitlines())) <= 100


REPORT = input_speed.InputReport(
  source="photos",
  records=1_281_167,
  size=224,
  placement="host",
  batch_size=4096,
  cores=16,
  stages=(
    input_speed.Stage("read", 0.05),
    input_speed.Stage("decode", 0.8),
    input_speed.Stage("colour", 0.0),
  ),
  limit_images_per_second=400.0,
  rates=(
    input_speed.Rate(0, 380.0, 380.0, 0.95, 0.95),
    input_speed.Rate(16, 5120.0, 320.0, 0.8, 0.91),
  ),
  gflop_per_image=64.5,
  tpu_v3_cores=17.9,
)


def test_page_in_words():
  text = REPORT.text()
  for words in (
    "photos: 1,281,167 records, views of 224 px, colours on the host, 16 cores",
    "limit: decode, crop, resize, colour, bare functions",
    "this host feeds 1.25 steps/s of 4,096 images, 16 workers:",
    "enough for 17.9 TPU v3 cores at this config (64.5 GFLOP an image, cores at 30% of 61.5",
  ):
    assert words in text
  rows = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if "  " in line}
  assert rows["decode"][-2:] == ["0.800", "1,250"]
  assert rows["in this process"][-4:] == ["380", "380", "95.0%", "95.0%"]
  assert rows["16 workers"][-4:] == ["5,120", "320", "80.0%", "91.0%"]
  on_device = dataclasses.replace(REPORT, placement="device").text()
  assert "limit: decode, crop, resize, bare functions" in on_device


# The sample


def test_sample_is_the_first_readable_records(settings):
  cfg = config.load("configs/image_folder.py", settings)
  source = images.build_sources(cfg).train
  work = input_speed.Work.of(cfg, source)
  order = epoch_order(cfg.seed, 0, len(source)).tolist()
  assert len(work.records) == len(work.encoded) == len(work.draws) == len(source) - 1
  assert list(work.records) == [record for record in order if record in work.records]
  for i in (0, 5):
    np.testing.assert_array_equal(work.image(i), source[work.records[i]].image)
    np.testing.assert_array_equal(decode(work.encoded[i], ""), work.image(i))


def test_bare_functions_do_what_the_pipeline_does(settings):
  cfg = config.load("configs/image_folder.py", settings)
  source = images.build_sources(cfg).train
  work = input_speed.Work.of(cfg, source)
  transform = trainer.build_input(cfg, len(source.classes))
  assert isinstance(transform, Views)
  with loader.train_batches(source, transform, 4, cfg.seed) as batches:
    batch = next(batches)
  rows = batch["index"].tolist()
  for row, record in enumerate(rows):
    if rows.count(record) == 1:
      i = work.records.index(record)
      views = work.colours(i, work.crops(i, work.image(i)))
      for name, view in zip(("view1", "view2"), views, strict=True):
        np.testing.assert_array_equal(batch[name][row], view)


# Operations of a step


def resnet50_macs(size):
  """Multiply-adds of the convolutions, from the layer table of He et al., in their own terms."""
  side = size // 2
  macs, channels = side**2 * 7 * 7 * 3 * 64, 64
  side //= 2
  for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
    for block in range(blocks):
      before, side = side, side // (stride if block == 0 else 1)
      macs += before**2 * channels * width  # 1x1; the stride is in the 3x3
      macs += side**2 * 9 * width * width + side**2 * width * 4 * width
      if block == 0:
        macs += side**2 * channels * 4 * width  # the shortcut
      channels = 4 * width
  return macs


@pytest.mark.parametrize("placement", ["host", "device"])
def test_operations_of_a_resnet50(placement):
  """Four forward passes' worth for each of two views, two operations for a multiply-add."""
  cfg = config.load("configs/pretrain_imagenet.py", [f"--config.views.placement={placement}"])
  assert resnet50_macs(224) == pytest.approx(4.1e9, rel=0.01)
  flops = input_speed.step_flops_per_image(cfg)
  assert flops == pytest.approx(8 * 2 * resnet50_macs(224), rel=0.03)
  assert flops == pytest.approx(0.516e12 / 8, rel=0.03)  # as the TPU's compiler counts a step of 8


# Refusals


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["bench"], "the following arguments are required: what, --config"),
    (["bench", "output", "--config=x.py"], "argument what: invalid choice: 'output'"),
    (["bench", "input"], "the following arguments are required: --config"),
    (["bench", "input", "--config=none.py"], "none.py"),
    (["bench", "input", "--config=CONFIG", "--workers=-1"], "'-1': expected whole numbers"),
    (["bench", "input", "--config=CONFIG", "--workers=2,x"], "'2,x': expected whole numbers"),
    (["bench", "input", "--config=CONFIG", "--workers="], "'': expected whole numbers"),
    (["bench", "input", "--config=CONFIG", "--seconds=0"], "'0': expected a number above 0"),
    (["bench", "input", "--config=CONFIG", "--seconds=nan"], "'nan': expected a number above 0"),
    (["bench", "input", "--config=CONFIG", "--seconds=soon"], "'soon': expected a number"),
    (["bench", "input", "--config=CONFIG", "--config.views.size=two"], "views.size"),
    (["bench", "input", "--config=CONFIG", "--config.nothing=1"], "nothing"),
    (["bench", "input", "--config=CONFIG", "--config.data.folder=/none"], "/none"),
    (["bench", "input", "--config=CONFIG", "--nothing"], "unknown argument --nothing"),
  ],
)
def test_refused_in_one_line(byolx, arguments, message):
  arguments = [word.replace("CONFIG", "configs/image_folder.py") for word in arguments]
  code, out, err = byolx(*arguments)
  assert (code, out) == (2, "")
  assert err.startswith("byolx: error: ")
  assert err.count("\n") == 1
  assert message in err


def test_images_that_cannot_be_read_are_refused_in_one_line(byolx, tmp_path):
  for i in range(10):
    (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8 nothing")
  code, out, err = byolx(
    "bench", "input", "--config=configs/image_folder.py", f"--config.data.folder={tmp_path}",
    "--config.train.batch_size=2", "--seconds=0.1",
  )  # fmt: skip
  assert (code, out) == (1, "")
  last = err.splitlines()[-1]
  assert last.startswith("byolx: error: ")
  assert "image_folder: none of 8 records can be read" in last
  assert ".jpg: not a JPEG file" in last


def test_json_that_cannot_be_written(byolx, tmp_path):
  (tmp_path / "file").write_text("")
  code, _, err = byolx(
    "bench", "input", "--config=configs/quickstart.py", "--seconds=0.02", "--workers=0",
    f"--json={tmp_path / 'file' / 'input.json'}",
  )  # fmt: skip
  assert code == 1
  assert err.splitlines()[-1].startswith("byolx: error: ")
  assert "file" in err.splitlines()[-1]
