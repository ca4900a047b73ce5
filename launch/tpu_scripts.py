"""What runs on the hosts of a TPU, as bash: install, mount, start, follow. Each may be run again.

On every host `~/byolx/src` is the code with its `.venv`, and `~/byolx/runs/NAME` is one run: `train.sh`,
its `log`, `pid` and `exit` (the code), and `lock`, which is held for as long as it runs, so that
neither a lost connection nor a restarted machine leaves a wrong answer.
"""

import dataclasses
import shlex
import textwrap
from collections.abc import Sequence

MARK = "byolx-launch:"
"""What a line of a script to the launcher begins with."""

RUNNING, LOST, OTHER, STUCK = 99, 98, 97, 96
"""Exit codes of scripts: still running; ended without a code, as when the machine was restarted;
another command is running; the last run does not end."""

TAIL_BYTES = 20_000
ROOT = "/mnt/byolx"
WORK, DATA = "work", "data"

_WORK_OPTIONS = (
  "--implicit-dirs",
  # Checkpoints are finished by renaming their folder.
  "--rename-dir-limit=200000",
  # All hosts must see what one of them has written.
  "--metadata-cache-ttl-secs=0",
  "--metadata-cache-negative-ttl-secs=0",
  "--kernel-list-cache-ttl-secs=0",
  # Else a file that is being written is not in the bucket before it is closed, whatever is synced.
  "--enable-streaming-writes=false",
)
_DATA_OPTIONS = (
  "-o=ro",
  "--implicit-dirs",
  "--metadata-cache-ttl-secs=-1",
  "--stat-cache-max-size-mb=-1",
  "--type-cache-max-size-mb=-1",
  "--kernel-list-cache-ttl-secs=-1",
)


@dataclasses.dataclass(frozen=True)
class Mount:
  """A bucket as a folder: `work` is written by all hosts, `data` only read and remembered."""

  bucket: str
  kind: str

  @property
  def path(self) -> str:
    """Where it is on the hosts."""
    return f"{ROOT}/{self.kind}/{self.bucket}"


def mounted(url: str, kind: str) -> tuple[Mount, str]:
  """The mount of gs://BUCKET/FOLDER, and the folder's path on the hosts."""
  bucket, _, folder = url.removeprefix("gs://").partition("/")
  mount = Mount(bucket, kind)
  return mount, f"{mount.path}/{folder}".rstrip("/")


def install(source: str, commit: str) -> str:
  """Puts the code and its dependencies there; does nothing where they are, or where it runs.

  Args:
    source: a git address to clone, or empty: `~/byolx-COMMIT.tar.gz` was uploaded.
    commit: full hash.
  """
  if source:
    fetch = f"""\
    git clone --quiet {shlex.quote(source)} src
    git -C src checkout --quiet --detach {commit}"""
  else:
    fetch = f"""\
    mkdir src
    tar --extract --gzip --directory=src --file="$HOME/byolx-{commit}.tar.gz" """
  return _script(f"""\
    set -eu
    mkdir -p "$HOME/byolx/runs"
    cd "$HOME/byolx"
    if [ "$(cat installed 2> /dev/null)" = {commit} ]; then exit 0; fi
    for lock in runs/*/lock; do
      if [ -e "$lock" ] && ! flock --shared --nonblock "$lock" true; then exit 0; fi
    done
    rm -rf src installed
{fetch.rstrip()}
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python=3.11 src/.venv
    src/.venv/bin/pip install --quiet "./src[tpu]"
    echo {commit} > installed""")


def mount(mounts: Sequence[Mount], cache_gb: int) -> str:
  """Installs Cloud Storage FUSE and mounts buckets; those that are mounted are left alone.

  Args:
    mounts: which.
    cache_gb: memory of each host that keeps what was read of data; 0: none.
  """
  parts = [
    """\
    set -eu
    if ! command -v gcsfuse > /dev/null; then
      curl -fsSLo "$HOME/gcsfuse.deb" \\
        https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.8.0/gcsfuse_3.8.0_amd64.deb
      sudo apt-get -o DPkg::Lock::Timeout=600 --quiet update
      sudo apt-get -o DPkg::Lock::Timeout=600 --quiet --yes install "$HOME/gcsfuse.deb"
    fi"""
  ]
  cache = (
    "--cache-dir=/dev/shm/byolx",
    f"--file-cache-max-size-mb={1024 * cache_gb}",
    "--file-cache-cache-file-for-range-read",
  )
  for one in mounts:
    options = _WORK_OPTIONS if one.kind == WORK else _DATA_OPTIONS + (cache if cache_gb else ())
    lines = " \\\n        ".join([*options, f"{one.bucket} {one.path}"])
    parts.append(f"""\
    if ! mountpoint --quiet {one.path}; then
      sudo install --directory --owner="$(id -un)" {one.path}
      gcsfuse \\
        {lines}
    fi""")
  return _script("\n".join(parts))


def start(name: str, arguments: Sequence[str], workdir: str) -> str:
  """Starts `byolx` with these arguments, apart from the connection; does nothing where it runs.

  Args:
    name: of the run.
    arguments: of `byolx`.
    workdir: on the hosts; the log is left there at the end.
  """
  place = shlex.quote(workdir)
  words = " \\\n      ".join(shlex.quote(word) for word in arguments)
  return _script(f"""\
    set -eu
    mkdir -p "$HOME/byolx/runs/{name}"
    cd "$HOME/byolx/runs/{name}"
    cat > next.sh << "END"
    cd "$HOME/byolx/src"
    run="$HOME/byolx/runs/{name}"
    export PYTHONUNBUFFERED=1
    .venv/bin/byolx {words} &
    training=$!
    echo $training > "$run/pid"
    while sleep 60; do
      sync {place}/metrics.jsonl {place}/tensorboard/* 2> /dev/null
    done &
    code=0
    wait $training || code=$?
    kill $!
    mkdir -p {place}/logs
    cp "$run/log" {place}/logs/"$(hostname).log"
    echo $code > "$run/exit.new"
    mv "$run/exit.new" "$run/exit"
    END
    same=0
    cmp --quiet next.sh train.sh || same=$?
    if [ -e lock ] && ! flock --shared --nonblock lock true; then
      if [ $same = 0 ]; then exit 0; fi
      exit {OTHER}
    fi
    if [ $same = 0 ] && [ "$(cat exit 2> /dev/null)" = 0 ]; then exit 0; fi
    mv next.sh train.sh
    rm -f exit pid
    touch log
    setsid --fork flock --timeout=60 --close lock bash train.sh < /dev/null >> log 2>&1
    for _ in $(seq 100); do
      if [ -s pid ]; then exit 0; fi
      sleep 0.1
    done
    exit 1""")


def settle(name: str) -> str:
  """Waits until the run has ended on this host; after two minutes ends it."""
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" 2> /dev/null || exit 0
    if flock --shared --timeout=120 lock true; then exit 0; fi
    kill -KILL "$(cat pid)"
    flock --shared --timeout=60 lock true || exit {STUCK}""")


def follow(name: str, start_at: int, seconds: int) -> str:
  """Prints the log as it grows, for some time or until the run ends, then one line of MARK.

  The line says `running`, `lost` or `ended CODE`, and so does the exit code: RUNNING, LOST, or the
  run's own.

  Args:
    name: of the run.
    start_at: byte of the log to begin with, from 1; 0: near its end, with a line `MARK from BYTE`.
    seconds: how long.
  """
  begin = f"from={start_at}"
  if not start_at:
    begin = f"""\
size=$(stat --format=%s log)
    from=$((size > {TAIL_BYTES} ? size - {TAIL_BYTES} + 1 : 1))
    echo "{MARK} from $from\""""
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" || {{ echo "{MARK} lost"; exit {LOST}; }}
    {begin}
    if flock --shared --nonblock lock true; then
      tail --bytes="+$from" log
    else
      timeout {seconds} tail --bytes="+$from" --follow --pid="$(cat pid)" log
    fi
    [ -z "$(tail --bytes=1 log)" ] || echo
    kill -0 "$(cat pid)" 2> /dev/null || flock --shared --timeout=60 lock true
    if ! flock --shared --nonblock lock true; then
      echo "{MARK} running"
      exit {RUNNING}
    elif [ -f exit ]; then
      echo "{MARK} ended $(cat exit)"
      exit "$(cat exit)"
    fi
    echo "{MARK} lost"
    exit {LOST}""")


def errors(name: str) -> str:
  """Prints this host's last errors of a run."""
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" || exit 0
    grep --text --extended-regexp "byolx: error|Error|Killed" log | tail --lines=2 |
      sed "s/^/$(hostname), exit code $(cat exit 2> /dev/null || echo none): /" """)


def stop(name: str) -> str:
  """Asks the run to save and to end, as a preemption would; it exits with 75."""
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" || exit 0
    if flock --shared --nonblock lock true; then exit 0; fi
    kill -TERM "$(cat pid)\"""")


def _script(text: str) -> str:
  return textwrap.dedent(text).rstrip()
