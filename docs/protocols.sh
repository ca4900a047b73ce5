#!/usr/bin/env bash
# The protocols of appendix D on the encoder and the images of one pretraining run: linear evaluation and
# its variation (Table 7), fine-tuning and supervised baselines at three shares of the labels (Figure 4),
# then a table and a figure.
#
#   bash docs/protocols.sh runs/fashion_mnist runs/fashion_protocols
#
# First argument: workdir of the pretraining run. Second argument: folder of all results. The same command
# continues after a stop. The environment variable JOBS is the number of runs at once, each on one CPU
# core (default 2). Other variables set epochs, shares, seeds, batch size and rates, see below.
set -euo pipefail

pretrained=$1 folder=$2
jobs=${JOBS:-2}
linear_epochs=${LINEAR_EPOCHS:-4}
shares=${SHARES:-0.01 0.1 1.0}
epochs=(${EPOCHS:-40 8 2}) # for each share
seeds=(${SEEDS:-0,1,2 0,1,2 0})
batch=${BATCH:-64}
rates=${RATES:-0.1,0.4}
one_core="--config.mesh.cpu_devices=1 --config.log.every_seconds=60"

say() { printf '\n== %s\n' "$*"; }

say "linear evaluation and its variation: Table 7's four rows, five rates side by side in each"
# shellcheck disable=SC2086
byolx sweep --config=configs/linear.py --grid=table7 --seeds=0,1,2 --jobs="$jobs" \
  --config.init.workdir="$pretrained" --config.train.epochs="$linear_epochs" $one_core \
  --workdir="$folder/table7"

i=0
for share in $shares; do
  for method in finetune supervised randaugment; do
    passes=epochs=${epochs[$i]}
    case $method in
      finetune) run=(--config=configs/finetune.py:"$passes" --config.init.workdir="$pretrained") ;;
      supervised) run=(--config=configs/supervised.py:"$passes" --config.init.like="$pretrained") ;;
      randaugment)
        run=(--config=configs/supervised.py:"$passes",views=randaugment
          --config.init.like="$pretrained") ;;
    esac
    say "$method, $share of the labels"
    # shellcheck disable=SC2086
    byolx sweep "${run[@]}" --grid=optim.base_rate="$rates" --seeds="${seeds[$i]}" --jobs="$jobs" \
      --config.data.labels="$share" --config.train.batch_size="$batch" $one_core --workdir="$folder/${method}_$share"
  done
  i=$((i + 1))
done

say "report"
byolx report "$folder" --output="$folder/report.md" --figure="$folder/labels.png"
cat "$folder/report.md"
