"""Batches of worker processes: bit for bit those of one thread, through kills, in flat memory."""

import contextlib
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from photographs import write_jpegs

from byolx.data import loader, shared_memory
from byolx.data.augment.distribution import ViewSpec
from byolx.data.loader import evaluation_batches, train_batches
from byolx.data.sampler import epoch_order
from byolx.data.sources.folders import image_folder
from byolx.data.transforms import PLACEMENTS, Centre, Views

SPECS = (ViewSpec(), ViewSpec(blur_probability=0.1, solarise_probability=0.2))
SIZE, BATCH, STEPS, SEED = 32, 12, 8, 11
VIEWS = {placement: Views(SPECS, SIZE, placement) for placement in PLACEMENTS}
RECORDS = 41  # a batch divides neither them nor two epochs of them
BROKEN = (3, 17, 30)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder of photographs, three of them cut off."""
  folder = tmp_path_factory.mktemp("photographs")
  paths = sorted(write_jpegs(folder / "train", RECORDS, 72, 96))
  write_jpegs(folder / "test", 3, 72, 96)
  for i in BROKEN:
    paths[i].write_bytes(paths[i].read_bytes()[:900])
  return folder


@pytest.fixture(scope="module")
def source(root):
  return image_folder(root, "train")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  """Batches of twelve rows have several parts, on any number of hosts."""
  monkeypatch.setattr(loader, "PART_ROWS", 3)


def first(count, source, placement="host", **kwargs):
  """The first batches, with copies of their arrays."""
  with train_batches(source, VIEWS[placement], BATCH, SEED, **kwargs) as batches:
    return [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, count)]


@pytest.fixture(scope="module")
def plain(source):
  """What every arrangement has to equal: made one after the other in this thread."""
  return {p: first(STEPS, source, placement=p, prefetch=0) for p in PLACEMENTS}


def assert_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def joined(blocks):
  """The global batches of the hosts' blocks."""
  return [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*blocks)]


def check(source, plain, workers, hosts, threads, placement, start):
  """The rest of the run from step `start` on, host by host, equals the plain one."""
  blocks = [
    first(
      STEPS - start, source,
      workers=workers, threads=threads, placement=placement, start_step=start,
      host_index=host, host_count=hosts,
    )
    for host in range(hosts)
  ]  # fmt: skip
  assert_equal(joined(blocks), plain[placement][start:])


# The same batches


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_hosts_and_threads_change_nothing(source, plain, hosts, threads, placement, start):
  check(source, plain, 0, hosts, threads, placement, start)


@pytest.mark.parametrize(
  ("workers", "hosts", "threads", "placement", "start"),
  [
    (1, 1, 3, "device", 0),
    (2, 1, 3, "host", 3),
    (2, 2, 1, "device", 0),
    (4, 1, 1, "device", 2),
  ],
)
def test_workers_change_nothing(source, plain, workers, hosts, threads, placement, start):
  check(source, plain, workers, hosts, threads, placement, start)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_arrangement_changes_nothing(source, plain, workers, hosts, threads, placement):
  check(source, plain, workers, hosts, threads, placement, (workers + hosts + threads) % 4)


def test_workers_without_shared_memory(source, plain, tmp_path, monkeypatch):
  """Pixels then come through grain's own shared memory; PYTHONPATH says so to the workers."""
  switch = "from byolx.data import shared_memory; shared_memory.POSSIBLE = False\n"
  (tmp_path / "sitecustomize.py").write_text(switch)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.setattr(shared_memory.BufferReader, "open", _only_arrays)
  monkeypatch.setattr(loader, "_SHARED_BYTES", 1000)
  assert_equal(first(4, source, workers=1), plain["host"][:4])


def _only_arrays(self, handle):
  assert isinstance(handle, np.ndarray)
  return handle


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_waits_for_who_is_slow(source, workers):
  """Workers are done long before their last batches are read."""
  settings = {"transform": Centre(SIZE, 36, "paper"), "batch_size": BATCH}
  expected = list(evaluation_batches(source, **settings, prefetch=0))
  assert [int(batch["mask"].sum()) for batch in expected] == [11, 11, 11, 5]
  with evaluation_batches(source, **settings, workers=workers, prefetch=8) as batches:
    some = [next(batches)]
    time.sleep(2 if workers else 0.1)
    assert_equal(some + list(batches), expected)


# Unreadable files


@pytest.mark.parametrize(("workers", "hosts"), [(0, 1), (0, 3), (1, 1)])
def test_unreadable_files_are_named_once(source, caplog, workers, hosts):
  messages = []
  for host in range(hosts):
    caplog.clear()
    batches = first(2 * STEPS, source, workers=workers, host_index=host, host_count=hosts)
    assert len(set(caplog.messages)) == len(caplog.messages)
    messages += caplog.messages
    for batch in batches:
      assert not set(BROKEN) & set(batch["index"].tolist())
  for record in BROKEN:
    named = {message for message in messages if f"record {record} cannot be read" in message}
    assert len(named) == 1
    assert source.names[record] in named.pop()
  assert len(set(messages)) == len(BROKEN)


def test_replacements_stand_where_the_broken_ones_would(source, plain):
  """Everything else keeps its place; every epoch replaces a record by the same one."""
  index = np.concatenate([batch["index"] for batch in plain["host"]])[: 2 * RECORDS]
  replaced = []
  for epoch, seen in enumerate(index.reshape(2, RECORDS)):
    order = epoch_order(SEED, epoch, RECORDS)
    other = seen != order
    assert sorted(order[other].tolist()) == list(BROKEN)
    replaced.append(dict(zip(order[other].tolist(), seen[other].tolist())))
  assert replaced[0] == replaced[1]


# Once per epoch


@pytest.mark.parametrize(("records", "hosts", "workers"), [(38, 1, 0), (37, 3, 0), (38, 1, 1)])
def test_every_record_once_per_epoch(tmp_path, records, hosts, workers):
  write_jpegs(tmp_path / "train", records, 72, 96)
  write_jpegs(tmp_path / "test", 3, 72, 96)
  whole = image_folder(tmp_path, "train")
  count = -(-3 * records // BATCH)
  blocks = [
    first(count, whole, workers=workers, host_index=host, host_count=hosts) for host in range(hosts)
  ]
  stream = np.concatenate([batch["index"] for batch in joined(blocks)])
  assert stream.shape == (count * BATCH,)
  for epoch in stream[: 3 * records].reshape(3, records):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(records))


# Kills


RUN = """
import hashlib, sys
import jax, numpy as np
from byolx.data import loader
from byolx.data.augment.distribution import ViewSpec
from byolx.data.sources.folders import image_folder
from byolx.data.transforms import Views

loader.PART_ROWS = 3
specs = (ViewSpec(), ViewSpec(blur_probability=0.1, solarise_probability=0.2))
views = Views(specs, 32, "device")
source = image_folder(sys.argv[1], "train")
start = int(sys.argv[2])
batches = loader.train_batches(source, views, 12, 11, start_step=start, workers=2)
for step, batch in enumerate(batches, start):
  digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(batch)))
  print(step, digest.hexdigest(), flush=True)
"""


def digest(batch):
  return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(batch)))


@contextlib.contextmanager
def running(root, start):
  """A training process that prints a digest per step."""
  command = [sys.executable, "-c", RUN, str(root), str(start)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  try:
    yield process
  finally:
    process.kill()
    process.stdout.close()
    process.wait(60)


def descendants(pid):
  """Ids of a process's children, and theirs."""
  try:
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
  except OSError:
    return []
  return children + [d for child in children for d in descendants(child)]


def is_alive(pid):
  """A dead process that nobody asked about stays in the table as a zombie."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
  except OSError:
    return False


def comes_true(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.05)
  return condition()


def test_killed_at_any_moment_it_goes_on_exactly(root, source):
  rng = random.Random(3)
  shared = set(os.listdir("/dev/shm"))
  printed = []
  for _ in range(2):
    with running(root, len(printed)) as process:
      goal = len(printed) + rng.randrange(2, 9)
      while len(printed) < goal:
        printed.append(process.stdout.readline().decode())
      started = descendants(process.pid)
      assert len(started) >= 2
      time.sleep(rng.uniform(0, 0.05))
      process.send_signal(signal.SIGKILL)
      printed += [line.decode() for line in process.stdout if line.endswith(b"\n")]
    assert comes_true(lambda pids=started: not any(map(is_alive, pids)))
    left = set(os.listdir("/dev/shm")) - shared
    assert comes_true(lambda left=left: not left & set(os.listdir("/dev/shm")))
  expected = train_batches(source, VIEWS["device"], BATCH, SEED, prefetch=0)
  with expected as batches:
    for step, (line, batch) in enumerate(zip(printed, batches)):
      assert line == f"{step} {digest(batch).hexdigest()}\n"


def test_a_killed_worker_ends_the_run_with_an_error(source):
  before = set(descendants(os.getpid()))
  with train_batches(source, VIEWS["host"], BATCH, SEED, workers=1) as batches:
    next(batches)
    workers = [pid for pid in descendants(os.getpid()) if pid not in before and is_worker(pid)]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(Exception, match=r"(?i)process|proc|worker"):
      list(itertools.islice(batches, 1000))
  assert comes_true(lambda: not is_alive(workers[0]))


def is_worker(pid):
  return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


# Memory


def memory(pid, kind="VmRSS"):
  """Bytes of a process: VmRSS is all of it, RssAnon what it shares with nobody."""
  for line in Path(f"/proc/{pid}/status").read_text().splitlines():
    if line.startswith(f"{kind}:"):
      return 1024 * int(line.split()[1])
  raise ValueError(f"{kind} is not in /proc/{pid}/status")


def all_memory():
  return sum(memory(pid) for pid in [os.getpid(), *descendants(os.getpid())] if is_alive(pid))


def growth(source, workers, warm_up, batches, batch_size=BATCH, size=SIZE):
  """(how much RSS grew after the warm-up as a share, bytes of a batch)."""
  made = train_batches(source, Views(SPECS, size), batch_size, SEED, workers=workers)
  with made:
    for batch in itertools.islice(made, warm_up):
      sent = jax.device_put(batch)
    before = all_memory()
    for batch in itertools.islice(made, batches):
      sent = jax.device_put(batch)
    after = all_memory()
    return after / before - 1, before, sum(x.nbytes for x in jax.tree.leaves(sent))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_batch_is_left_behind(source, workers):
  grown, before, size = growth(source, workers, 30, 150, batch_size=36, size=64)
  assert 150 * size > 0.05 * before  # a batch per step would be seen
  assert grown < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_flat_over_two_thousand_batches(source, workers):
  grown, _, _ = growth(source, workers, 200, 2000)
  assert grown < 0.02


def test_memory_of_workers_does_not_grow_with_the_batch(source):
  """Their own; their shared memory holds the batches loaded in advance."""
  own = []
  for batch_size in (12, 480):
    before = set(descendants(os.getpid()))
    with train_batches(source, Views(SPECS, 64), batch_size, SEED, workers=1) as batches:
      for batch in itertools.islice(batches, 4):
        assert batch["view1"].shape == (batch_size, 64, 64, 3)
      (pid,) = (p for p in descendants(os.getpid()) if p not in before and is_worker(p))
      own.append(memory(pid, "RssAnon"))
      shared = memory(pid, "RssShmem")
  large = 2 * 480 * 64 * 64 * 3
  assert own[1] - own[0] < large / 3
  assert shared < 6 * large
