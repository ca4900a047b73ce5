"""What a run leaves on disk and says while it trains."""

import json
import struct
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from byolx.core.text import duration
from byolx.runs import metrics_log


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until told otherwise."""
  clock = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(metrics_log, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
  return clock


def open_log(folder, start=0, **options):
  defaults = {"steps": 100, "steps_per_epoch": 12.5, "images_per_step": 64, "every_seconds": 60.0}
  log = metrics_log.RunLog(folder, start=start, **defaults | options)
  log.begin()
  return log


def rows(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
  """All TensorBoard events in the order of files and records (length, crc, bytes, crc)."""
  found = []
  for path in sorted((folder / "tensorboard").iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      found.append(Event.FromString(data[at + 12 : at + 12 + length]))
      at += 12 + length + 4
  return found


def test_rows_are_json_with_step_epoch_scalars_and_speed(tmp_path, clock):
  log = open_log(tmp_path)
  clock.now += 2.0
  log.write(10, {"loss": 3.5, "tau": 0.996})
  assert rows(tmp_path) == [  # on disk before it is closed
    {"step": 10, "epoch": 0.8, "loss": 3.5, "tau": 0.996, "images_per_second": 320.0}
  ]
  clock.now += 0.5
  log.write(15, {"loss": 3.0, "tau": 0.997})
  log.close()
  assert rows(tmp_path)[1] == {
    "step": 15, "epoch": 1.2, "loss": 3.0, "tau": 0.997, "images_per_second": 640.0,
  }  # fmt: skip


def test_tensorboard_events_hold_the_same_numbers(tmp_path, clock):
  log = open_log(tmp_path)
  for step in (10, 20):
    clock.now += 1.0
    log.write(step, {"loss": 4.0 / step, "top1": 0.25})
  log.close()
  scalars = {}
  for event in events(tmp_path):
    for value in event.summary.value:
      scalars.setdefault(value.tag, {})[event.step] = value.simple_value
  assert set(scalars) == {"epoch", "loss", "top1", "images_per_second"}
  assert scalars["loss"] == pytest.approx({10: 0.4, 20: 0.2})
  assert scalars["top1"] == {10: 0.25, 20: 0.25}
  assert scalars["images_per_second"] == {10: 640.0, 20: 640.0}


@pytest.mark.parametrize("start", [0, 20])
def test_continuing_drops_what_came_after_the_step_it_continues_from(tmp_path, clock, start):
  log = open_log(tmp_path)
  for step in (10, 20, 30):
    log.write(step, {"loss": float(step)})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "epo')  # the machine stopped here
  log = open_log(tmp_path, start)
  assert [row["step"] for row in rows(tmp_path)] == [10, 20][: start // 10]
  clock.now += 1.0
  log.write(start + 10, {"loss": -1.0})
  log.close()
  assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
    *[(10, 10.0), (20, 20.0)][: start // 10],
    (start + 10, -1.0),
  ]
  # The speed counts only this attempt's steps.
  assert rows(tmp_path)[-1]["images_per_second"] == 640.0
  # TensorBoard forgets its points from the named step on.
  restarts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
  assert restarts[-1] == start + 1


def test_a_line_that_was_cut_off_at_the_very_step_is_dropped(tmp_path, clock):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  log = open_log(tmp_path, 5)
  log.write(6, {"loss": 1.0})
  log.close()
  assert [row["step"] for row in rows(tmp_path)] == [1, 6]
  assert not list(tmp_path.glob("*.tmp"))


def test_a_progress_line_says_where_the_run_is(tmp_path, clock, capsys):
  log = open_log(tmp_path, steps=4000, steps_per_epoch=100.0, every_seconds=5.0)
  clock.now += 4.0
  log.write(20, {"loss": 3.9, "top1": 0.1})
  assert capsys.readouterr().err == ""  # not yet time
  clock.now += 4.0
  log.write(50, {"loss": 3.14159, "top1": 0.4236})
  assert capsys.readouterr().err == (
    "step   50/4000  epoch 0.5  loss 3.1416  online top-1 42.4  480 images/s  8 min 47 s left\n"
  )
  clock.now += 4.0
  log.write(80, {"loss": 3.0})
  assert capsys.readouterr().err == ""
  clock.now += 4.0
  log.write(110, {"loss": 2.0})
  line = capsys.readouterr().err
  assert "top-1" not in line
  assert "step  110/4000" in line
  log.close()


def test_the_last_step_always_has_a_line(tmp_path, clock, capsys):
  log = open_log(tmp_path, every_seconds=1e9)
  clock.now += 1.0
  log.write(50, {"loss": 1.0})
  log.write(100, {"loss": 0.5})
  log.close()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("step 100/100  epoch 8.0  loss 0.5000")
  assert line.endswith("0 s left")


def test_time_left_goes_by_the_speed_since_the_last_row(tmp_path, clock, capsys):
  log = open_log(tmp_path, start=40, every_seconds=0.0)
  clock.now += 300.0  # compiling, say
  log.write(50, {"loss": 1.0})
  clock.now += 2.0
  log.write(60, {"loss": 1.0})
  log.close()
  first, second = capsys.readouterr().err.splitlines()
  assert first.endswith("2 images/s  25 min 00 s left")
  assert second.endswith("320 images/s  8 s left")


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.4, "0 s"),
    (12.0, "12 s"),
    (59.6, "1 min 00 s"),
    (200.0, "3 min 20 s"),
    (3599.7, "1 h 00 min"),
    (7500.0, "2 h 05 min"),
    (360_000.0, "100 h 00 min"),
  ],
)
def test_durations_read_well(seconds, text):
  assert duration(seconds) == text


def test_a_process_that_is_not_the_writer_writes_and_prints_nothing(tmp_path, clock, capsys):
  log = open_log(tmp_path, writer=False, every_seconds=0.0)
  clock.now += 2.0
  log.write(100, {"loss": 3.5})
  log.close()
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr() == ("", "")
