#!/usr/bin/env bash
# The table of the quick start: ten spoken words, three seeds. Pre-training of the demo, then fine-tuning and probes of
# it, beside the same from scratch, of a random encoder and of the log-mel input; of the encoder that comes with the
# code; and from scratch for four times as long. Started again, it goes on where it stopped.
#
#   bash extras/runs/demo.sh runs/demo_table
set -euo pipefail
mkdir -p "$1"
runs=$(realpath "$1")
cd "$(dirname "$0")/../.."
for seed in 1 2 3; do
    python pretrain.py --preset demo --seed "$seed" --out_dir "$runs/pretrain$seed"
done
python extras/compare.py --seeds 3 --init "$runs/pretrain{seed}" --out_dir "$runs/demo"
python extras/compare.py --seeds 3 --init extras/runs/laptop/encoder.pt --rows tuned probes --out_dir "$runs/shipped"
python extras/compare.py --seeds 3 --init "$runs/pretrain{seed}" --rows scratch --updates 2400 --out_dir "$runs/scratch4"
