"""What is pre-training worth? A table: fine-tuned from a checkpoint and from scratch; probes; log-mel input.

    python extras/compare.py                                                               the demo's table
    python extras/compare.py --init "runs/pre{seed}" --seeds 3 --data train.tsv --eval_data test.tsv ...
    python extras/compare.py --init CKPT --data "train{fold}.tsv" --eval_data "test{fold}.tsv" ...

Every other flag is one of finetune.py's. With --seeds N everything is done N times, where {seed} in --init
stands for the seed; and for each {fold} of which --data and --eval_data are there. The table has the mean
over folds, and over seeds mean and standard deviation. Stopped, it stops the fine-tuning at work, which
saves; started again, it goes on from there. Runs, and the table as table.json, are in --out_dir.
"""

import argparse
import dataclasses
import glob
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import STOPPING, InputError, write_lines  # noqa: E402
from evaluate import (  # noqa: E402
    init_distributed, mean_and_std, parse_config, pooled, probe, run_script, sounding,
)  # fmt: skip
from finetune import PRESETS, FinetuneConfig, fit_presets, open_inputs  # noqa: E402
from model import MODELS, read_pretrained  # noqa: E402

ROWS = ("tuned", "scratch", "probes")  # what --rows may name


def fine_tune(config: FinetuneConfig) -> float:
    """Score of the last evaluation of a fine-tuning, done or made now."""
    settings = vars(config).items()
    flags = [f"--{name}={value}" for name, value in settings if not isinstance(value, bool)]
    flags += [f"--{'' if value else 'no-'}{name}" for name, value in settings if isinstance(value, bool)]
    command = [sys.executable, ROOT / "finetune.py", *flags]
    process = subprocess.Popen(command, start_new_session=True)  # so that a signal reaches it once: from here
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in STOPPING}
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status:  # it has said why
        sys.exit(status if status > 0 else 128 - status)
    records = map(json.loads, Path(config.out_dir, "log.jsonl").read_text().splitlines())
    return [record[config.metric] for record in records if config.metric in record][-1]


def log_mel_statistics(spec: Tensor) -> Tensor:
    """Without a network: mean and std over time of each log-mel band, (B, 1, F, M) -> (B, 2M)."""
    return mean_and_std(spec[:, 0], sounding(spec))


def size_of(checkpoint: str) -> str:
    """The row of model.MODELS that a checkpoint's network is. Raises InputError if it is none."""
    network = read_pretrained(checkpoint)["network"]
    for name, model in MODELS.items():
        if all(network[k] == getattr(model, k) for k in "width depth heads mlp_ratio patch_size".split()):
            return name
    raise InputError(f"{checkpoint} has the size of none of the models {', '.join(MODELS)}")


def rows_of(config: FinetuneConfig, rows: list[str]) -> dict[str, float]:
    """The rows of the table for one seed and fold."""
    (_, _, device), found = init_distributed(), {}
    tuned = dataclasses.replace(config, out_dir=f"{config.out_dir}/pretrained")
    model = config.model if set(rows) == {"tuned"} else size_of(config.init)
    scratch = dataclasses.replace(config, init="scratch", model=model, out_dir=f"{config.out_dir}/scratch")
    if "tuned" in rows:
        found["fine-tuned, pre-trained"] = fine_tune(tuned)
    if "scratch" in rows:
        found["fine-tuned, from scratch"] = fine_tune(scratch)
    for name, own in (("pre-trained", tuned), ("random encoder", scratch)) if "probes" in rows else ():
        train, test, model = open_inputs(own)
        encoder = model.to(device).eval().encoder
        data = (model.config, train, test, device, config.workers, config.metric)
        for kind, score in probe(pooled(encoder), *data).items():
            found[f"{kind.removeprefix('probe_')} probe, {name}"] = score
    if "probes" in rows:
        for kind, score in probe(log_mel_statistics, *data).items():
            found[f"{kind.removeprefix('probe_')} probe, log-mel"] = score
    return found


def find_folds(config: FinetuneConfig) -> list[int]:
    """The numbers that {fold} stands for: those of the manifests there are. Raises InputError for a gap."""
    if "{fold}" not in config.data + config.eval_data:
        return [0]
    numbers = set()
    for name in (config.data, config.eval_data):
        before, _, after = name.partition("{fold}")
        paths = glob.glob(f"{glob.escape(before)}*{glob.escape(after)}")
        numbers |= {int(n) for p in paths if (n := p[len(before) : len(p) - len(after)]).isdecimal()}
    if len(numbers) < 2:
        raise InputError(f"{config.data}: {{fold}} must stand for two folds at least")
    return list(range(min(numbers), max(numbers) + 1))


def fill(text: str, seed: int, fold: int) -> str:
    """The text with the numbers that {seed} and {fold} stand for."""
    return text.replace("{seed}", str(seed)).replace("{fold}", str(fold))


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=1, help="do all this with so many seeds, from --seed on")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what the table has")
    args, rest = parser.parse_known_args()
    presets = dict(demo=PRESETS["demo"]) | PRESETS
    config = parse_config(FinetuneConfig, presets, rest)
    plan, folds = [], find_folds(config)
    first = [fill(word, config.seed, folds[0]) for word in rest]  # `own` is fitted to these
    config = parse_config(FinetuneConfig, presets | fit_presets(first), rest)
    if init_distributed()[1] > 1:
        raise InputError("this needs one process, without torchrun")
    if config.init == "scratch":
        raise InputError("--init must be a checkpoint: what is from scratch is set beside it")
    if args.seeds < 1:
        raise InputError("--seeds counts from 1")
    for seed in range(config.seed, config.seed + args.seeds):
        for fold in folds:
            parts = [f"seed{seed}"] * (args.seeds > 1) + [f"fold{fold}"] * (len(folds) > 1)
            own = {name: fill(getattr(config, name), seed, fold) for name in ("data", "eval_data", "init")}
            own |= dict(seed=seed, out_dir=str(Path(config.out_dir, *parts)))
            plan.append(dataclasses.replace(config, **own))
    for own in plan:  # what is missing is told before the first has run for hours
        open_inputs(own)
        if set(args.rows) != {"tuned"}:
            size_of(own.init)
    found = [rows_of(own, args.rows) for own in plan]
    n_folds, table = len(folds), {}
    for name in found[0]:
        table[name] = scores = [row[name] for row in found]
        means = [statistics.mean(scores[i : i + n_folds]) for i in range(0, len(scores), n_folds)]  # a seed
        spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
        each = f"  ({' '.join(f'{score:.4f}' for score in scores)})" if len(scores) > 1 else ""
        print(f"{name:32s} {statistics.mean(means):.4f}{spread}{each}")
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    write_lines(Path(config.out_dir, "table.json"), [json.dumps({config.metric: table}, indent=1)])
    return 0


if __name__ == "__main__":
    run_script(main)
