#!/usr/bin/env bash
# The laptop reference run: what is pre-training worth? Three seeds of pre-training on 3.3 hours of unlabelled
# audio; of each, fine-tuning and probes on two labelled tasks, beside the same from scratch, of a random encoder
# and of the log-mel input. Started again, it goes on where it stopped.
#
#   python extras/audio/build.py OUT && bash extras/runs/laptop.sh OUT runs/laptop
set -euo pipefail
audio=$1 runs=$2
cd "$(dirname "$0")/../.."
for seed in 1 2 3; do
    python pretrain.py --preset demo --data "$audio/pretrain.tsv" --seed "$seed" --out_dir "$runs/pretrain$seed" \
        --clip_frames 64 --batch_size 32 --updates 1000 --warmup 150 --ema_decay 0.996 --ema_decay_end 0.9998 --ema_anneal 1000 \
        --probe_train "$audio/drums_train.tsv" --probe_test "$audio/drums_test.tsv"
done
for task in drums mandarin; do
    python extras/compare.py --preset demo --data "$audio/${task}_train.tsv" --eval_data "$audio/${task}_test.tsv" \
        --init "$runs/pretrain{seed}" --seeds 3 --out_dir "$runs/$task" \
        --clip_frames 64 --batch_size 32 --updates 400 --pooling cls
done
python extras/plot.py "$runs"/pretrain{1,2,3} -o "$runs/curves.png"
