#!/usr/bin/env bash
# The one-GPU reference run: ViT-B, the base recipe with everything that is tied to its length scaled to UPDATES,
# on the unlabelled audio, packed; then the same table as the laptop run's. Started again, it goes on where it
# stopped.
#
#   python extras/audio/build.py OUT
#   bash extras/runs/one_gpu.sh OUT runs/one_gpu [UPDATES] [TUNE_UPDATES] [FLAG ...]
#
# Further flags are for pretrain.py. A trial without a GPU: ... 2 2 --batch_size 1 --accumulate 1
set -euo pipefail
audio=$1 runs=$2 updates=${3:-10000} tune=${4:-1000}
shift $(($# < 4 ? $# : 4))
cd "$(dirname "$0")/../.."
mkdir -p "$runs"
[ -e "$runs/packed.tsv" ] || python extras/prepare.py pack "$audio/pretrain.tsv" "$runs/packed.tsv"
# of 400,000 updates, 53,333 warm up and the teacher's decay rises from 1 - 2e-4 to 1 - 1e-5 in 100,000
read -r warmup anneal decay decay_end <<< "$(python -c "
n = $updates; s = 400_000 / n
print(n * 53_333 // 400_000, max(1, n // 4), 1 - min(0.5, 2e-4 * s), 1 - min(0.5, 1e-5 * s))")"
python pretrain.py --data "$runs/packed.tsv" --accumulate 4 --updates "$updates" --warmup "$warmup" \
    --ema_decay "$decay" --ema_decay_end "$decay_end" --ema_anneal "$anneal" --out_dir "$runs/pretrain" \
    --save_every 500 --probe_train "$audio/drums_train.tsv" --probe_test "$audio/drums_test.tsv" \
    --probe_every 2500 "$@"
for task in drums mandarin; do
    python extras/compare.py --preset esc50 --data "$audio/${task}_train.tsv" --eval_data "$audio/${task}_test.tsv" \
        --init "$runs/pretrain" --seeds 3 --out_dir "$runs/$task" --updates "$tune" --warmup $((tune / 10)) \
        --clip_frames 160 --min_samples 1600 --norm_mean -4.268 --norm_std 4.569 --no-roll
done
python extras/plot.py "$runs/pretrain" -o "$runs/curves.png"
