"""What several processes say to each other; whole runs of several are in test_processes.py."""

import re
import socket
import subprocess
import sys
import time

import pytest
from processes import ROOT

from byolx.core import distributed

PROGRAM = """
import sys, time
from byolx.core import distributed

port, index, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.initialise(f"127.0.0.1:{port}", count, index, peer_timeout=5, start_timeout=60)
assert (distributed.index(), distributed.count()) == (index, count)
print("agree", distributed.agree({"floats": [0.1, 1e-300], "of": index}))
print("any", [distributed.any_process(index == who) for who in (0, 1, 7)])
soon, got = distributed.Soon("soon"), []
for call in range(400):
  time.sleep(0.02)
  if soon(index == 1 and call in (3, 250)):
    got.append(call)
print("soon", len(got), got)
again = distributed.Soon("soon")
print("unwanted", any(again(False) for _ in range(3)))
print("late", distributed.any_process(index == 0))
sys.stdout.flush()
if index == 1:
  distributed.leave(7, "failed: on purpose")
distributed.barrier("for ever")
"""


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start(*arguments, program=PROGRAM):
  return subprocess.Popen(
    [sys.executable, "-c", program, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )


def test_three_processes_agree_and_end_together():
  port = free_port()
  all_of_them = [start(port, index, 3) for index in range(3)]
  try:
    said = [process.communicate(timeout=120) for process in all_of_them]
  finally:
    for process in all_of_them:
      process.kill()
  assert [process.returncode for process in all_of_them] == [7, 7, 7], said
  first = said[0][0].splitlines()
  assert first[0] == "agree {'floats': [0.1, 1e-300], 'of': 0}"
  assert first[1] == "any [True, True, False]"
  assert re.match(r"soon 2 \[\d+, \d+\]", first[2])
  assert first[3:] == ["unwanted False", "late True"]
  assert [out.splitlines() for out, _ in said] == [first] * 3
  for index in (0, 2):
    lines = [line for line in said[index][1].splitlines() if line.startswith("byolx: ")]
    expected = rf"byolx: error: process {index}: process 1 \(.+\) failed: on purpose"
    assert len(lines) == 1, said[index]
    assert re.fullmatch(expected, lines[0])


def test_one_process_is_alone_and_agrees_with_itself():
  assert (distributed.index(), distributed.count(), distributed.prefix()) == (0, 1, "")
  assert distributed.is_writer()
  value = {"a": (1, 2)}
  assert distributed.agree(value) is value
  assert [distributed.any_process(flag) for flag in (True, False)] == [True, False]
  soon = distributed.Soon("stop")
  assert [soon(wish) for wish in (False, True, False)] == [False, True, False]
  distributed.barrier("nobody else")
  distributed.leave(1, "failed: nobody hears it")
  distributed.await_reason()
  distributed.finish()


@pytest.mark.parametrize(
  ("given", "reason"),
  [
    (("host:1", None, None), "together, or none"),
    ((None, 2, 0), "together, or none"),
    (("host", 2, 0), "expected HOST:PORT"),
    (("host:port", 2, 0), "expected HOST:PORT"),
    (("host:1", 2, 2), "process is 2 of 2; expected 0 to 1"),
  ],
)
def test_arguments_that_do_not_go_together_are_refused(given, reason):
  with pytest.raises(ValueError, match=reason):
    distributed.initialise(*given)


def test_no_cluster_around_is_said():
  program = "from byolx.core import distributed as d\ntry: d.initialise()\n"
  program += "except ValueError as error: print(error)"
  out, error = start(program=program).communicate(timeout=60)
  assert out == "no cluster was detected; give coordinator, processes and process\n", error


def test_processes_that_do_not_come_are_not_waited_for_for_ever():
  program = "from byolx.core import distributed as d; import sys\n"
  program += "d.initialise(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]), start_timeout=2)"
  port, began = free_port(), time.monotonic()
  waiting = start(port, 1, program=program)
  _, error = waiting.communicate(timeout=60)
  assert waiting.returncode == 1
  assert error.splitlines()[-1] == (
    f"byolx: error: not all of the 2 processes at 127.0.0.1:{port} connected within 2 s"
  )
  assert time.monotonic() - began < 30


def test_a_port_that_is_taken_is_named():
  program = "from byolx.core import distributed as d; import sys\n"
  program += "try: d.initialise(f'127.0.0.1:{sys.argv[1]}', 2, 0)\n"
  program += "except d.DistributedError as error: print(error)"
  with socket.socket(socket.AF_INET6) as taken:
    taken.bind(("::", 0))
    taken.listen()
    port = taken.getsockname()[1]
    out, error = start(port, program=program).communicate(timeout=60)
  assert out.startswith(f"process 0 cannot listen on port {port}: "), (out, error)
  assert "Traceback" not in error
