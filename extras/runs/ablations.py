"""The ablations: runs that differ in one setting, two seeds of each, on the axes of the paper's own.

    python extras/audio/build.py OUT                                  the audio
    python extras/runs/ablations.py OUT runs/ablations                20 pre-trainings, 24 fine-tunings
    python extras/runs/ablations.py OUT runs/ablations --only base    a part: jobs whose names begin so

1,500 updates each on clips of 2.56 s, 16 x 8 patches; then linear probes by bands on 35 words and on events,
and for utterance weights fine-tuning on ten words with the CLS token and with the mean over the patches.
Started twice at once, two share the work; started again, it goes on where it stopped. Writes ablations.json,
tables.md and logs.jsonl into the folder of the runs, of the jobs that are done.
"""

import json
import sys
from pathlib import Path

from laptop import ROOT, TUNED, Job, begin, cell, compare, main, over_seeds, pretrain, probe

sys.path.insert(0, str(ROOT / "tests"))

from bench import update_flops  # noqa: E402

from pretrain import PRESETS, PretrainConfig  # noqa: E402

SEEDS, TASKS = (1, 2), ("words35", "events")
BASE = dict(
    clip_frames=256, batch_size=4, clones=16, updates=1500, warmup=200, ema_decay=0.996, ema_decay_end=0.9998,
    ema_anneal=1500, mask_block_time=5, mask_block_freq=5,
)  # fmt: skip


def same_arithmetic(clones: int) -> int:
    """The batch size at which so many clones cost as much as BASE's."""
    costs = []
    for own in (BASE, BASE | dict(batch_size=1, clones=clones)):
        costs.append(sum(update_flops(PretrainConfig(**PRESETS["demo"] | own)).values()))
    return round(costs[0] / costs[1])


# axis: {run: (what the reader sees, what the paper has: mAP on AS-20K, settings)}
WEIGHTS = {
    "weight0": ("0", "38.9", dict(utterance_weight=0.0)),
    "base": ("1", "-", {}),
    "weight1.92": ("1.92 (λ = 0.01)", "39.2", dict(utterance_weight=1.92)),
    "weight192": ("192 (λ = 1)", "40.2", dict(utterance_weight=192.0)),
}
BLOCKS = {
    "random": ("random patches", "37.8", dict(mask_block_time=1, mask_block_freq=1)),
    "blocks3": ("3 x 3", "39.9", dict(mask_block_time=3, mask_block_freq=3)),
    "base": ("5 x 5", "40.2", {}),
    "flexible": ("flexible", "40.2", dict(mask="flexible")),
}
SLOW = {
    "slow1": ("1", "-", dict(lr=5e-4)),
    "slow192": ("192 (λ = 1)", "40.2", dict(lr=5e-4, utterance_weight=192.0)),
}
CLONES = {
    "clones1": (f"1 x {same_arithmetic(1)}", "-", dict(clones=1, batch_size=same_arithmetic(1))),
    "base": (f"16 x {BASE['batch_size']}", "-", {}),
}
AXES = {
    "utterance weight": WEIGHTS, "the same at the released lr, 5e-4": SLOW, "visible blocks": BLOCKS,
    "clones x clips, equal arithmetic": CLONES,
}  # fmt: skip
TUNED_RUNS = (*WEIGHTS, *SLOW)


def list_jobs(audio: Path, runs: Path) -> dict[str, Job]:
    """All there is to do, in an order in which it can be done."""
    manifests = [f"{task}_{part}" for task in ("words10", *TASKS) for part in ("train", "test")]
    jobs, add = begin(audio, runs, ["pretrain", *manifests])
    unlabelled = runs / "packed" / "pretrain.tsv"
    settings = {name: own for axis in AXES.values() for name, (_, _, own) in axis.items()}
    for seed in SEEDS:
        for name, own in settings.items():
            run = runs / f"{name}-{seed}"
            add(run.name, unlabelled, pretrain, seed, BASE | own | dict(data=unlabelled), makes="done")
            add(f"{run.name}-probe", run / "done", probe, run, TASKS)
        for task in TASKS:
            run, flags = runs / f"base-{seed}", ("--rows", "probes", f"--clip_frames={BASE['clip_frames']}")
            add(f"untrained-{task}-{seed}", run / "done", compare, task, seed, run, *flags)
        for name in TUNED_RUNS:
            for pooling in ("cls", "mean"):
                run = runs / f"{name}-{seed}"
                flags = ("--rows", "tuned", f"--pooling={pooling}")
                add(f"{run.name}-{pooling}", run / "done", compare, "words10", seed, run, *flags)
    return jobs


def collect(runs: Path) -> dict:
    """Scores of the jobs that are done, a list over seeds in each place."""
    probes, tuned = {}, {}
    for name in dict.fromkeys(name for axis in AXES.values() for name in axis):
        probes[name] = {task: over_seeds(runs, f"{name}-{{}}-probe", task) for task in TASKS}
    for of in ("random encoder", "log-mel"):
        row = f"linear probe, {of}"
        probes[of] = {task: over_seeds(runs, f"untrained-{task}-{{}}", row) for task in TASKS}
    for name in TUNED_RUNS:
        tuned[name] = {p: over_seeds(runs, f"{name}-{{}}-{p}", TUNED) for p in ("cls", "mean")}
    return dict(probes=probes, tuned=tuned)


def tables(found: dict) -> list[str]:
    """A row for each value of each axis, the paper's number beside it."""
    probes, tuned = found["probes"], found["tuned"]
    lines = ["| | paper, mAP | 35 words | events | ten words, CLS | ten words, mean |", "|---" * 6 + "|"]
    for axis, rows in AXES.items():
        lines.append(f"| **{axis}** | | | | | |")
        for name, (title, paper, _) in rows.items():
            cells = [cell(probes[name][task]) for task in TASKS]
            cells += [cell(tuned[name][p]) for p in ("cls", "mean") if rows.keys() <= tuned.keys()]
            lines.append(f"| {title} | {paper} | {' | '.join(cells)} |{' |' * (4 - len(cells))}")
    for row in ("random encoder", "log-mel"):
        lines.append(f"| {row} | | {' | '.join(cell(probes[row][task]) for task in TASKS)} | | |")
    return lines


def write_results(runs: Path) -> None:
    """ablations.json and tables.md."""
    found = collect(runs)
    (runs / "ablations.json").write_text(json.dumps(found, indent=1) + "\n")
    (runs / "tables.md").write_text("\n".join(tables(found)) + "\n")


if __name__ == "__main__":
    main(__doc__, list_jobs, write_results)
