"""What is pre-training worth? One table: fine-tuned from a checkpoint and from scratch; probes; the log-mel
input.

    python extras/compare.py --init runs/demo                                    the demo's table
    python extras/compare.py --init "runs/pre{seed}" --seeds 3 --data train.tsv --eval_data test.tsv ...
    python extras/compare.py --preset esc50 --init CKPT --folds 5 --rows tuned \
        --data "esc50/train{fold}.tsv" --eval_data "esc50/test{fold}.tsv"        cross-validation

Every other flag is one of finetune.py's. With --seeds N everything is done N times, where {seed} in --init
stands for the seed; with --folds N for each {fold} in --data and --eval_data, counted from 1. The table has
the mean over folds, and over seeds mean and standard deviation. Started again, it goes on where it stopped.
Runs, and the table as table.json, are in --out_dir.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import InputError, open_labelled, write_lines  # noqa: E402
from evaluate import init_distributed, mean_and_std, parse_config, pooled, probe, run_script, sounding  # noqa: E402
from finetune import PRESETS, FinetuneConfig, open_inputs  # noqa: E402
from model import MODELS, read_pretrained  # noqa: E402

ROWS = ("tuned", "scratch", "probes")  # what --rows may name


def fine_tune(config: FinetuneConfig) -> float:
    """Score of the last evaluation of a fine-tuning, done or made now."""
    flags = [f"--{name}={value}" for name, value in vars(config).items() if not isinstance(value, bool)]
    flags += [f"--{'' if value else 'no-'}{name}" for name, value in vars(config).items() if isinstance(value, bool)]
    done = subprocess.run([sys.executable, ROOT / "finetune.py", *flags])
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    records = map(json.loads, Path(config.out_dir, "log.jsonl").read_text().splitlines())
    return [record[config.metric] for record in records if config.metric in record][-1]


def log_mel_statistics(spec: Tensor) -> Tensor:
    """The baseline without a network: mean and std over time of each log-mel band, (B, 1, F, M) -> (B,
    2M)."""
    return mean_and_std(spec[:, 0], sounding(spec))


def size_of(checkpoint: str) -> str:
    """The row of model.MODELS that a checkpoint's network is. Raises InputError if it is none."""
    network = read_pretrained(checkpoint)["network"]
    for name, model in MODELS.items():
        if all(network[key] == getattr(model, key) for key in ("width", "depth", "heads", "mlp_ratio", "patch_size")):
            return name
    raise InputError(f"{checkpoint} has the size of none of the models {', '.join(MODELS)}")


def rows_of(config: FinetuneConfig, rows: list[str]) -> dict[str, float]:
    """The rows of the table for one seed and fold."""
    _, _, device = init_distributed()
    tuned = dataclasses.replace(config, out_dir=f"{config.out_dir}/pretrained")
    scratch = dataclasses.replace(
        config, init="scratch", model=size_of(config.init), out_dir=f"{config.out_dir}/scratch"
    )
    found = {}
    if "tuned" in rows:
        found["fine-tuned, pre-trained"] = fine_tune(tuned)
    if "scratch" in rows:
        found["fine-tuned, from scratch"] = fine_tune(scratch)
    for name, own in (("pre-trained", tuned), ("random encoder", scratch)) if "probes" in rows else ():
        train, test, model = open_inputs(own)
        encoder = model.to(device).eval().encoder
        for kind, score in probe(pooled(encoder), model.config, train, test, device).items():
            found[f"{kind.removeprefix('probe_')} probe, {name}"] = score
    if "probes" in rows:
        for kind, score in probe(log_mel_statistics, model.config, train, test, device).items():
            found[f"{kind.removeprefix('probe_')} probe, log-mel"] = score
    return found


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1, help="do all this with so many seeds, from --seed on")
    parser.add_argument("--folds", type=int, default=0, help="and for each of so many folds")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what the table has")
    args, rest = parser.parse_known_args()
    config = parse_config(FinetuneConfig, dict(demo=PRESETS["demo"]) | PRESETS, rest)
    if args.seeds < 1 or args.folds < 0:
        raise InputError("--seeds and --folds count from 1")
    if ("{fold}" in config.data + config.eval_data) != bool(args.folds):
        raise InputError("--folds needs {fold} in --data and --eval_data, and the other way round")
    plan = []
    for seed in range(config.seed, config.seed + args.seeds):
        for fold in range(1, args.folds + 1) if args.folds else (0,):
            names = {name: getattr(config, name).replace("{fold}", str(fold)) for name in ("data", "eval_data")}
            parts = [f"seed{seed}"] * (args.seeds > 1) + [f"fold{fold}"] * (args.folds > 0)
            names |= dict(init=config.init.replace("{seed}", str(seed)), out_dir=str(Path(config.out_dir, *parts)))
            plan.append(dataclasses.replace(config, seed=seed, **names))
    for own in plan:  # a missing fold or checkpoint is told before the first has run for hours
        open_inputs(own)
    found = [rows_of(own, args.rows) for own in plan]
    n_folds, table = max(1, args.folds), {}
    for name in found[0]:
        scores = [row[name] for row in found]
        means = [statistics.mean(scores[i : i + n_folds]) for i in range(0, len(scores), n_folds)]  # one a seed
        table[name] = scores
        spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
        each = f"  ({' '.join(f'{score:.4f}' for score in scores)})" if len(scores) > 1 else ""
        print(f"{name:32s} {statistics.mean(means):.4f}{spread}{each}")
    write_lines(Path(config.out_dir, "table.json"), [json.dumps({config.metric: table}, indent=1)])
    return 0


if __name__ == "__main__":
    run_script(main)
