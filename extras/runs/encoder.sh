#!/usr/bin/env bash
# The encoder that comes with the code, laptop/encoder.pt: the demo's network after 4,000 updates of 32 clips on 3.3 hours
# of unlabelled audio, an hour and a half on one core; weights in half precision. Started again, it goes on.
#
#   python extras/audio/build.py OUT && bash extras/runs/encoder.sh OUT runs/encoder
set -euo pipefail
audio=$1 run=$2
cd "$(dirname "$0")/../.."
python pretrain.py --preset demo --data "$audio/pretrain.tsv" --out_dir "$run" --batch_size 32 --updates 4000 \
    --warmup 500 --ema_decay 0.996 --ema_decay_end 0.9998 --ema_anneal 4000 --probe_every 500 \
    --probe_train "$audio/words10_train.tsv" --probe_test "$audio/words10_test.tsv"
python - "$run" <<'PYTHON'
import sys
from pathlib import Path
from model import load_checkpoint, save_checkpoint
run = Path(sys.argv[1])
state = load_checkpoint(run / "last.pt")
half = {part: {k: v.half() for k, v in state[part].items()} for part in ("student", "teacher")}
save_checkpoint(run / "encoder.pt", step=state["step"], network=state["network"], **half)
PYTHON
