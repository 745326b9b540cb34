"""How much does pre-training help? A table: fine-tuned from a checkpoint and from scratch; probes; log-mel.

    python extras/compare.py                                                               the demo's table
    python extras/compare.py --init "runs/pre{seed}" --seeds 3 --data train.tsv --eval_data test.tsv ...
    python extras/compare.py --init CKPT --data "train{fold}.tsv" --eval_data "test{fold}.tsv" ...

All other flags are those of finetune.py. --seeds N repeats everything with N seeds; {seed} in --init stands
for the seed. {fold} in --data, --eval_data and --init stands for a fold as the manifests' names have it, such
as 1 to 5 or 01 to 10, and everything is done for each. The table has the mean over folds, and mean
and standard deviation over seeds. If it is stopped, the current fine-tuning saves; the same command resumes.
Runs, and the table as table.json, are in --out_dir.
"""

import argparse
import contextlib
import glob
import json
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import InputError, write_lines  # noqa: E402
from evaluate import (  # noqa: E402
    STOP, Parser, init_distributed, parse_config, pooled, probe, run_script,
)  # fmt: skip
from finetune import PRESETS, FinetuneConfig, open_inputs  # noqa: E402
from model import MODELS, read_pretrained  # noqa: E402

ROWS = ("tuned", "scratch", "probes")  # what --rows may name
FOLD = "{fold}"


# ----- Folds -----------------------------------------------------------------------------------------------


def find_folds(pattern: str) -> dict[str, str]:
    """Each value that {fold} can have in a path, in order -> the file. Values are numbers, as written in the
    name, or, if there are none, any text. If {fold} occurs twice, both have the same value."""
    parts = pattern.split(FOLD)
    first, *others = map(re.escape, parts)
    form = f"{first}(?P<fold>[^/]+?){'(?P=fold)'.join(others)}"
    found = {}
    for path in glob.glob("*".join(map(glob.escape, parts))):
        match = re.fullmatch(form, path)
        if match:
            found[match["fold"]] = path
    numbers = {int(text): text for text in found if text.isdecimal()}
    order = [numbers[number] for number in sorted(numbers)] or sorted(found)
    if len(numbers) < sum(map(str.isdecimal, found)):
        raise InputError(f"{pattern} has a fold twice, such as 1 and 01: {', '.join(sorted(found))}")
    return {text: found[text] for text in order}


def check_folds(pattern: str, folds: dict[str, str]) -> None:
    """Raise InputError if folds are missing between those that were found, or beside them."""
    if len(folds) < 2:
        raise InputError(f"{pattern}: {FOLD} must stand for two folds at least, found {len(folds)}")
    numbers = [int(text) for text in folds if text.isdecimal()]
    missing = []
    if numbers:
        missing = sorted(set(range(min(numbers), max(numbers))) - set(numbers))
    if missing:
        raise InputError(f"{pattern} has no fold {', '.join(map(str, missing))}, but {', '.join(folds)}")
    loose = re.sub(r"0+\{fold\}", FOLD, pattern)  # fold0{fold} finds 01 to 09, and 10 is beside them
    beside = set(find_folds(loose).values()) - set(folds.values())
    if beside:
        raise InputError(f"{pattern} leaves out {', '.join(sorted(beside))}: {loose} finds all folds")


def list_folds(config: FinetuneConfig) -> list[str]:
    """What {fold} stands for in --data and --eval_data; [""] without folds. Raises InputError for gaps."""
    patterns = [path for path in (config.data, config.eval_data) if FOLD in path]
    found = [find_folds(pattern) for pattern in patterns]
    if not found:
        return [""]
    for pattern, own, others in zip(patterns, found, reversed(found)):
        lacking = [fold for fold in others if fold not in own]
        if lacking:
            raise InputError(f"{pattern} has no fold {', '.join(lacking)}, which the other manifests have")
        check_folds(pattern, own)
    return list(found[0])


# ----- Rows of the table -----------------------------------------------------------------------------------


def flags_of(config: FinetuneConfig) -> list[str]:
    """The command line that has these settings."""
    flags = []
    for name, value in vars(config).items():
        if value is False:
            flags.append(f"--no-{name}")
        elif value is True:
            flags.append(f"--{name}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def fine_tune(config: FinetuneConfig) -> float:
    """The last score of a fine-tuning, which is run now unless it is done. If it fails or is stopped, this
    script ends with the same exit status."""
    command = [sys.executable, ROOT / "finetune.py", *flags_of(config)]
    process = subprocess.Popen(command, stderr=sys.stderr)  # run_script has closed its file descriptor 2

    def pass_on(number: int, _) -> None:
        process.send_signal(number)

    STOP.handle(pass_on)
    status = process.wait()
    STOP.handle(signal.SIG_DFL)
    if status < 0:  # killed by a signal
        status = 128 - status
    if status:  # it has said why
        sys.exit(status)
    scores = []
    for line in Path(config.out_dir, "log.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # others may have written there
            scores.append(float(json.loads(line)[config.metric]))
    if not scores:
        raise InputError(f"{config.out_dir}/log.jsonl has no {config.metric}: remove the folder")
    return scores[-1]


def log_mel_statistics(spec: Tensor) -> Tensor:
    """Without a network: mean and deviation over time of each mel bin, without padding and digital silence,
    (B, 1, F, M) -> (B, 2*M)."""
    x = spec[:, 0]                                                           # (B, F, M)
    is_sound = (x.amax(2, keepdim=True) > x.amin(2, keepdim=True)).float()   # (B, F, 1)
    total = is_sound.sum(1, keepdim=True).clamp(min=1)                       # (B, 1, 1)
    mean = (x * is_sound).sum(1, keepdim=True) / total                       # (B, 1, M)
    square = (x - mean).square() * is_sound                                  # (B, F, M)
    std = (square.sum(1, keepdim=True) / total).sqrt()                       # (B, 1, M)
    return torch.cat([mean, std], dim=1).flatten(1)                          # (B, 2*M)


def size_of(checkpoint: str) -> str:
    """The name in model.MODELS of the network in a checkpoint. Raises InputError if it is none of them."""
    network = read_pretrained(checkpoint)["network"]
    sizes = ("width", "depth", "heads", "mlp_ratio", "patch_size")
    for name, model in MODELS.items():
        if all(network[size] == getattr(model, size) for size in sizes):
            return name
    raise InputError(f"{checkpoint} has the size of none of the models {', '.join(MODELS)}")


def probe_all(tuned: FinetuneConfig, scratch: FinetuneConfig, device: torch.device) -> dict[str, float]:
    """Linear probes: of both encoders by bands, and of the log-mel spectrogram."""
    found = {}
    for name, config in (("pre-trained", tuned), ("random encoder", scratch)):
        _, train, test, model = open_inputs(config)
        data = (model.config, train, test, device, config.metric)
        encoder = model.to(device).eval().encoder
        scores = probe(pooled(encoder), *data, workers=config.workers)
        found[f"linear probe, {name}"] = scores["probe_linear"]
    scores = probe(log_mel_statistics, *data, workers=config.workers)
    found["linear probe, log-mel"] = scores["probe_linear"]
    return found


def rows_of(config: FinetuneConfig, rows: list[str], device: torch.device) -> dict[str, float]:
    """The rows of the table for one seed and fold."""
    tuned = replace(config, out_dir=f"{config.out_dir}/pretrained")
    found = {}
    if "tuned" in rows:
        found["fine-tuned, pre-trained"] = fine_tune(tuned)
    if set(rows) == {"tuned"}:
        return found
    model = size_of(config.init)
    scratch = replace(config, init="scratch", model=model, out_dir=f"{config.out_dir}/scratch")
    if "scratch" in rows:
        found["fine-tuned, from scratch"] = fine_tune(scratch)
    if "probes" in rows:
        found |= probe_all(tuned, scratch, device)
    return found


# ----- The table -------------------------------------------------------------------------------------------


def list_runs(config: FinetuneConfig, seeds: int, folds: list[str]) -> list[FinetuneConfig]:
    """The settings for each seed and fold, fitted to the checkpoint and labels. Raises InputError for what
    any of them lacks, before the first has run for hours."""
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        for fold in folds:
            out_dir = Path(config.out_dir)
            if seeds > 1:
                out_dir = out_dir / f"seed{seed}"
            if fold:
                out_dir = out_dir / f"fold{fold}"
            names = {}
            for name in ("data", "eval_data", "init"):
                names[name] = getattr(config, name).replace("{seed}", str(seed)).replace(FOLD, fold)
            run = replace(config, seed=seed, out_dir=str(out_dir), **names)
            if not run.data:
                raise InputError("--data is missing: a labelled manifest")
            runs.append(open_inputs(run)[0])
    return runs


def print_row(name: str, scores: list[float], n_folds: int) -> None:
    """Mean over folds and seeds, deviation over seeds, and each score."""
    means = []  # over the folds of each seed
    for first in range(0, len(scores), n_folds):
        means.append(statistics.mean(scores[first : first + n_folds]))
    text = f"{name:32s} {statistics.mean(means):.4f}"
    if len(means) > 1:
        text += f" ± {statistics.stdev(means):.4f}"
    if len(scores) > 1:
        text += f"  ({' '.join(f'{score:.4f}' for score in scores)})"
    print(text)


def main() -> int:
    """Do what the command line says; returns the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds, from --seed on")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows of the table")
    args, rest = parser.parse_known_args()
    config = parse_config(FinetuneConfig, dict(demo=PRESETS["demo"]) | PRESETS, rest)
    if config.init == "scratch":
        raise InputError("--init must be a checkpoint: training from scratch is compared with it")
    if args.seeds < 1:
        raise InputError("--seeds counts from 1")
    _, _, device = init_distributed(alone=True)
    folds = list_folds(config)
    runs = list_runs(config, args.seeds, folds)
    if set(args.rows) != {"tuned"}:
        for run in runs:
            size_of(run.init)  # raises InputError
    if len(folds) > 1:
        print(f"folds: {' '.join(folds)}", flush=True)
    table = {}
    for run in runs:
        for name, score in rows_of(run, args.rows, device).items():
            table.setdefault(name, []).append(score)
    for name, scores in table.items():
        print_row(name, scores, len(folds))
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    write_lines(Path(config.out_dir, "table.json"), [json.dumps({runs[0].metric: table}, indent=1)])
    return 0


if __name__ == "__main__":
    run_script(main)
