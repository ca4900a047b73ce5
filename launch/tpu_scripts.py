"""Bash scripts for the host machines of a TPU: they install the code and start, watch and stop runs.

Each script can be run repeatedly. On every host `~/byolx/src` has the code and its `.venv`.
`~/byolx/runs/NAME` has the files of one run: `train.sh`, `log`, `pid`, `exit` (the exit code), and
`lock`, a file that is locked while the run goes on. The lock shows whether the run goes on, also
after a lost connection or a reboot.
"""

import dataclasses
import shlex
import textwrap
from collections.abc import Sequence

MARK = "byolx-launch:"
"""Prefix of the lines that the scripts print for the launcher and not for the user."""

RUNNING, LOST, OTHER, STUCK = 99, 98, 97, 96
"""Exit codes of the scripts. RUNNING: the run goes on. LOST: the run ended without an exit code, as
after a reboot. OTHER: a run with the same name but another command goes on. STUCK: a run does not
end."""

TAIL_BYTES = 20_000
"""Maximal number of bytes of the existing log that `follow` prints at the first connection."""
ROOT = "/mnt/byolx"
WORK, DATA = "work", "data"

_WORK_OPTIONS = (
  "--implicit-dirs",
  # A checkpoint is completed by renaming its folder.
  "--rename-dir-limit=200000",
  # Files written by one host must be visible to all others.
  "--metadata-cache-ttl-secs=0",
  "--metadata-cache-negative-ttl-secs=0",
  "--kernel-list-cache-ttl-secs=0",
  # With streaming writes, a sync would not copy an open file to the bucket.
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
  """A Cloud Storage bucket that is mounted as a folder on the host machines.

  Args:
    bucket: name of the bucket.
    kind: kind of access: WORK for reading and writing by all hosts, or DATA for reading only, with
      cached metadata.
  """

  bucket: str
  kind: str

  @property
  def path(self) -> str:
    """Path of the mounted folder on the host machines."""
    return f"{ROOT}/{self.kind}/{self.bucket}"


def mounted(url: str, kind: str) -> tuple[Mount, str]:
  """Returns the mount that an address gs://BUCKET/FOLDER needs, and the folder's path on the hosts.

  Args:
    url: address in Cloud Storage.
    kind: kind of access: WORK for reading and writing, or DATA for reading only.
  """
  bucket, _, folder = url.removeprefix("gs://").partition("/")
  mount = Mount(bucket, kind)
  return mount, f"{mount.path}/{folder}".rstrip("/")


def install(source: str, commit: str) -> str:
  """Returns a script that installs the code of a commit and its dependencies on a host.

  The script does nothing if the commit is installed already or if a run goes on.

  Args:
    source: git address to clone; empty if the archive `~/byolx-COMMIT.tar.gz` has been uploaded.
    commit: full hash of the commit.
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
  """Returns a script that mounts Cloud Storage buckets as folders, unless they are mounted already.

  The script installs Cloud Storage FUSE first if it is missing.

  Args:
    mounts: buckets to mount.
    cache_gb: GiB of each host's memory for a cache of files from DATA mounts, which are read only; 0
      for no cache.
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
  for mount in mounts:
    options = _WORK_OPTIONS if mount.kind == WORK else _DATA_OPTIONS + (cache if cache_gb else ())
    lines = " \\\n        ".join([*options, f"{mount.bucket} {mount.path}"])
    parts.append(f"""\
    if ! mountpoint --quiet {mount.path}; then
      sudo install --directory --owner="$(id -un)" {mount.path}
      gcsfuse \\
        {lines}
    fi""")
  return _script("\n".join(parts))


def start(name: str, arguments: Sequence[str], workdir: str) -> str:
  """Returns a script that starts `byolx` on a host, in a session that outlives the connection.

  The script does nothing if the same command is running or has ended with exit code 0. It exits with
  OTHER if another command is running under the same name, and with 1 if `byolx` does not start.

  Args:
    name: name of the run.
    arguments: arguments of `byolx`.
    workdir: path of the workdir on the hosts; the log is copied there at the end.
  """
  folder = shlex.quote(workdir)
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
      sync {folder}/metrics.jsonl {folder}/tensorboard/* 2> /dev/null
    done &
    code=0
    wait $training || code=$?
    kill $!
    mkdir -p {folder}/logs
    cp "$run/log" {folder}/logs/"$(hostname).log"
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
  """Returns a script that waits for the end of a run on a host, and kills it after two minutes.

  The script exits with STUCK if the run does not end even then.
  """
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" 2> /dev/null || exit 0
    if flock --shared --timeout=120 lock true; then exit 0; fi
    kill -KILL "$(cat pid)"
    flock --shared --timeout=60 lock true || exit {STUCK}""")


def follow(name: str, start_at: int, seconds: int) -> str:
  """Returns a script that prints a run's log as it grows, until the run ends or the time is over.

  The last line that the script prints is MARK with the state of the run: `running`, `lost` or
  `ended CODE`. The script's exit code is RUNNING, LOST, or the exit code of the run.

  Args:
    name: name of the run.
    start_at: first byte of the log to print, from 1. With 0 the script skips all but the last
      TAIL_BYTES bytes, and first prints MARK and `from BYTE`.
    seconds: longest duration of the script in seconds.
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
  """Returns a script that prints the last two error lines of a run's log on a host."""
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" || exit 0
    grep --text --extended-regexp "byolx: error|Error|Killed" log | tail --lines=2 |
      sed "s/^/$(hostname), exit code $(cat exit 2> /dev/null || echo none): /" """)


def stop(name: str) -> str:
  """Returns a script that sends SIGTERM to a run, which then saves and ends with exit code 75."""
  return _script(f"""\
    cd "$HOME/byolx/runs/{name}" || exit 0
    if flock --shared --nonblock lock true; then exit 0; fi
    kill -TERM "$(cat pid)\"""")


def _script(text: str) -> str:
  return textwrap.dedent(text).rstrip()
