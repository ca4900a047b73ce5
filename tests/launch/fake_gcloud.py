"""Stands in for gcloud: a TPU, its queued resource and one run. As a program, in the file FAKE_STATE.

Keys of the state: node, queue (states or None), labels, running, starts, log (of the run), calls
(kinds, in order), commands (argument lists), ends (how the coming connections to the log end), fail
({kind: messages for its coming calls}), and preempt ({kind: at which of its calls}).
"""

import json
import os
import re
import sys


def main() -> int:
  path = os.environ["FAKE_STATE"]
  with open(path) as file:
    state = json.load(file)
  code = run(["gcloud", *sys.argv[1:]], state)
  with open(path, "w") as file:
    json.dump(state, file)
  return code


def run(command, state) -> int:
  """Does a command, on stdout and stderr; changes the state; returns the exit code."""
  argv = command[1:]
  kind = kind_of(argv)
  state["calls"].append(kind)
  state["commands"].append(command)
  return answer(kind, argv, state)


def kind_of(argv):
  group, verb = argv[2:4]
  if verb == "start":
    return "boot"
  if verb != "ssh":
    return verb + ("_queued" if group == "queued-resources" else "")
  command = argv[-1]
  marks = {
    "pip install": "install", "gcsfuse": "mount", "next.sh": "start", "--timeout=120": "settle",
    "tail --bytes": "follow", "grep --text": "errors", "kill -TERM": "stop",
  }  # fmt: skip
  return next((kind for mark, kind in marks.items() if mark in command), "setup")


def answer(kind, argv, state):
  if state["preempt"].get(kind) == state["calls"].count(kind):
    state["node"], state["running"], state["log"] = "PREEMPTED", False, ""
    state["queue"] = state["queue"] and "SUSPENDED"
  if messages := state["fail"].get(kind):
    message = messages.pop(0) if len(messages) > 1 or messages[0] != "always" else "always"
    message = state["always"] if message == "always" else message
    if message:
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) {message}")
  if kind in ("scp", "install", "mount", "setup", "start", "settle", "follow", "errors", "stop"):
    if state["node"] is None:
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) NOT_FOUND: no such TPU")
    if state["node"] != "READY":
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) TPU is in unusable terminal state")
  return {"follow": follow, "start": start, "stop": stop}.get(kind, manage)(kind, argv, state)


def say(message):
  print(message, file=sys.stderr)
  return 1


def manage(kind, argv, state):
  if kind in ("describe", "describe_queued"):
    key = "queue" if kind == "describe_queued" else "node"
    comes = state["queue"] == "ACTIVE" and not state["coming"].get("queue")
    if key == "node" and comes and state["node"] is None:
      state["node"] = "READY"
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) NOT_FOUND: Resource was not found")
    if state[key] is None:
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) NOT_FOUND: Resource was not found")
    print(json.dumps(described(state, key)))
    coming = state["coming"].get(key)
    if coming:
      state[key] = coming.pop(0)
  elif kind in ("create", "create_queued"):
    key = "node" if kind == "create" else "queue"
    if state[key]:
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) ALREADY_EXISTS: it exists")
    [label] = [word for word in argv if word.startswith("--labels=")]
    state["labels"] = dict([label.removeprefix("--labels=").split("=")])
    coming = state["coming"].get(key)
    state[key] = coming.pop(0) if coming else "READY" if key == "node" else "ACTIVE"
  elif kind.startswith("delete"):
    if state["queue" if kind == "delete_queued" else "node"] is None:
      return say(f"ERROR: (gcloud.compute.tpus.{kind}) NOT_FOUND: Resource was not found")
    state["node"], state["queue"], state["running"] = None, None, False
  elif kind == "boot":
    state["node"] = "READY"
  elif kind == "errors":
    print("host-3, exit code 1: byolx: error: process 3: the disk is full")
  return 0


def described(state, key):
  if key == "node":
    return {
      "state": state["node"], "labels": state["labels"], "acceleratorType": state["type"]
    }  # fmt: skip
  failed = {"failedData": {"error": {"message": "no such type"}}}
  return {
    "state": {"state": state["queue"], **(failed if state["queue"] == "FAILED" else {})},
    "tpu": {"nodeSpec": [{"node": {"labels": state["labels"]}}]},
  }


def start(kind, argv, state):
  if state["other"]:
    return 97
  state["starts"] += 0 if state["running"] else 1
  state["running"] = True
  return 0


def stop(kind, argv, state):
  state["running"] = False
  return 0


def follow(kind, argv, state):
  end = state["ends"].pop(0) if state["ends"] else "ended 0"
  if state["running"]:
    state["log"] += f"line {len(state['log'].splitlines()) + 1}\n"
  found = re.search(r"from=(\d+)", argv[-1])
  begin = int(found[1]) if found else 1
  if not found:
    print("byolx-launch: from 1")
  print(state["log"][begin - 1 :], end="")
  if end == "broken":
    return 1
  if end == "preempted":
    state["node"], state["running"], state["log"] = "PREEMPTED", False, ""
    state["queue"] = state["queue"] and "SUSPENDED"
    return 1
  print(f"byolx-launch: {end}")
  state["running"] = end == "running"
  return {"running": 99, "lost": 98}.get(end) or int(end.split()[1])


if __name__ == "__main__":
  sys.exit(main())
