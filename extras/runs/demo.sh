#!/usr/bin/env bash
# The tables of the demo's README, three seeds. Pre-training of the demo, then fine-tuning and probes of it, beside the
# same from scratch, of a random encoder and of the log-mel input; of the encoder that comes with the code; from scratch
# for four times as long; and 35 words, whose clips extras/audio/build.py has made in AUDIO. Started again, it resumes.
#
#   bash extras/runs/demo.sh runs/demo_table [AUDIO]
set -euo pipefail
mkdir -p "$1"
runs=$(realpath "$1")
audio=${2:+$(realpath "$2")}
cd "$(dirname "$0")/../.."
for seed in 1 2 3; do
    python pretrain.py --preset demo --seed "$seed" --out_dir "$runs/pretrain$seed"
done
shipped=extras/runs/laptop/encoder.pt
python extras/compare.py --seeds 3 --init "$runs/pretrain{seed}" --out_dir "$runs/demo"
python extras/compare.py --seeds 3 --init $shipped --rows tuned probes --out_dir "$runs/shipped"
python extras/compare.py --seeds 3 --init "$runs/pretrain{seed}" --rows scratch --updates 2400 --out_dir "$runs/scratch4"
if [ -n "$audio" ]; then
    python extras/compare.py --preset demo --seeds 3 --init $shipped --rows tuned scratch --out_dir "$runs/words35" \
        --data "$audio/words35_train.tsv" --eval_data "$audio/words35_test.tsv"
fi
