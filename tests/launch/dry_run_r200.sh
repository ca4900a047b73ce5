#!/usr/bin/env bash
# r200: v3-512 (64 hosts) in europe-west4-a. The commands of launch/gcloud_tpu.py, in order, if
# nothing fails. The launcher also retries failed commands, uses a TPU and a run that exist already,
# and after a preemption deletes the TPU and starts again.
set -euo pipefail

# Request the TPU, and wait until it is ready.
gcloud compute tpus queued-resources create r200 --zone=europe-west4-a --node-id=r200 --runtime-version=tpu-ubuntu2204-base --accelerator-type=v3-512 --labels=byolx-launch=r200
until gcloud compute tpus tpu-vm describe r200 --zone=europe-west4-a --format=json |
  grep --quiet '"state": "READY"'
do sleep 30; done

# Install the commit on all hosts, mount the buckets, and run the command of --setup.
gcloud compute tpus tpu-vm ssh r200 --zone=europe-west4-a --worker=all --quiet '--command=set -eu
mkdir -p "$HOME/byolx/runs"
cd "$HOME/byolx"
if [ "$(cat installed 2> /dev/null)" = COMMIT ]; then exit 0; fi
for lock in runs/*/lock; do
  if [ -e "$lock" ] && ! flock --shared --nonblock "$lock" true; then exit 0; fi
done
rm -rf src installed
git clone --quiet https://example.org/byolx.git src
git -C src checkout --quiet --detach COMMIT
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --seed --python=3.11 src/.venv
src/.venv/bin/pip install --quiet "./src[tpu]"
echo COMMIT > installed'

gcloud compute tpus tpu-vm ssh r200 --zone=europe-west4-a --worker=all --quiet '--command=set -eu
if ! command -v gcsfuse > /dev/null; then
  curl -fsSLo "$HOME/gcsfuse.deb" \
    https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.8.0/gcsfuse_3.8.0_amd64.deb
  sudo apt-get -o DPkg::Lock::Timeout=600 --quiet update
  sudo apt-get -o DPkg::Lock::Timeout=600 --quiet --yes install "$HOME/gcsfuse.deb"
fi
if ! mountpoint --quiet /mnt/byolx/data/bucket; then
  sudo install --directory --owner="$(id -un)" /mnt/byolx/data/bucket
  gcsfuse \
    -o=ro \
    --implicit-dirs \
    --metadata-cache-ttl-secs=-1 \
    --stat-cache-max-size-mb=-1 \
    --type-cache-max-size-mb=-1 \
    --kernel-list-cache-ttl-secs=-1 \
    bucket /mnt/byolx/data/bucket
fi
if ! mountpoint --quiet /mnt/byolx/work/bucket; then
  sudo install --directory --owner="$(id -un)" /mnt/byolx/work/bucket
  gcsfuse \
    --implicit-dirs \
    --rename-dir-limit=200000 \
    --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 \
    --kernel-list-cache-ttl-secs=0 \
    --enable-streaming-writes=false \
    bucket /mnt/byolx/work/bucket
fi'

# Start r200 on all hosts.
start() {
gcloud compute tpus tpu-vm ssh r200 --zone=europe-west4-a --worker=all --quiet '--command=set -eu
mkdir -p "$HOME/byolx/runs/r200"
cd "$HOME/byolx/runs/r200"
cat > next.sh << "END"
cd "$HOME/byolx/src"
run="$HOME/byolx/runs/r200"
export PYTHONUNBUFFERED=1
.venv/bin/byolx train \
  --config=configs/pretrain_imagenet.py:arch=resnet200,width=2 \
  --config.data.folder=/mnt/byolx/data/bucket/imagenet \
  --workdir=/mnt/byolx/work/bucket/runs/r200 \
  --distributed &
training=$!
echo $training > "$run/pid"
while sleep 60; do
  sync /mnt/byolx/work/bucket/runs/r200/metrics.jsonl /mnt/byolx/work/bucket/runs/r200/tensorboard/* 2> /dev/null
done &
code=0
wait $training || code=$?
kill $!
mkdir -p /mnt/byolx/work/bucket/runs/r200/logs
cp "$run/log" /mnt/byolx/work/bucket/runs/r200/logs/"$(hostname).log"
echo $code > "$run/exit.new"
mv "$run/exit.new" "$run/exit"
END
same=0
cmp --quiet next.sh train.sh || same=$?
if [ -e lock ] && ! flock --shared --nonblock lock true; then
  if [ $same = 0 ]; then exit 0; fi
  exit 97
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
exit 1'
}
start

# Print the log of worker 0 until the run ends. Exit codes: 99: the run goes on; 75: the run has
# stopped and saved, and is started again; 0: done; others: failed.
while true; do
code=0
gcloud compute tpus tpu-vm ssh r200 --zone=europe-west4-a --worker=0 --quiet '--command=cd "$HOME/byolx/runs/r200" || { echo "byolx-launch: lost"; exit 98; }
size=$(stat --format=%s log)
from=$((size > 20000 ? size - 20000 + 1 : 1))
echo "byolx-launch: from $from"
if flock --shared --nonblock lock true; then
  tail --bytes="+$from" log
else
  timeout 300 tail --bytes="+$from" --follow --pid="$(cat pid)" log
fi
[ -z "$(tail --bytes=1 log)" ] || echo
kill -0 "$(cat pid)" 2> /dev/null || flock --shared --timeout=60 lock true
if ! flock --shared --nonblock lock true; then
  echo "byolx-launch: running"
  exit 99
elif [ -f exit ]; then
  echo "byolx-launch: ended $(cat exit)"
  exit "$(cat exit)"
fi
echo "byolx-launch: lost"
exit 98' || code=$?
if [ $code = 75 ]; then
gcloud compute tpus tpu-vm ssh r200 --zone=europe-west4-a --worker=all --quiet '--command=cd "$HOME/byolx/runs/r200" 2> /dev/null || exit 0
if flock --shared --timeout=120 lock true; then exit 0; fi
kill -KILL "$(cat pid)"
flock --shared --timeout=60 lock true || exit 96'
start
elif [ $code != 99 ]; then break; fi
done

# Delete the TPU.
gcloud compute tpus queued-resources delete r200 --zone=europe-west4-a --force --quiet
exit $code
