"""The ablations: short runs that differ in one setting, two seeds of each, probed on three tasks.

    python extras/audio/build.py OUT                              what they train on
    python extras/runs/ablations.py OUT runs/ablations            28 runs of 5 minutes a core, 4 fine-tunings
    python extras/runs/ablations.py OUT runs/ablations --seeds 1  one seed, to share the work between cores

Writes tables (ablations.json, tables.md) and a picture (ablations.png) of the seeds there are into the folder
of the runs. Started again, it goes on where it stopped. (The logs kept beside this file call random masks
mask_random; they were a setting of their own then.)
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "extras")]

from bench import update_flops  # noqa: E402

from data import open_labelled  # noqa: E402
from evaluate import knn_probe, linear_probe, pooled, predict, summarize_scores  # noqa: E402
from model import EAT, Encoder  # noqa: E402
from plot import plt  # noqa: E402
from pretrain import PRESETS, PretrainConfig  # noqa: E402

TASKS = ("drums", "mandarin", "events")
SCHEDULE = dict(updates=600, warmup=90, ema_decay=0.996, ema_decay_end=0.9998, ema_anneal=600)
SHORT = dict(SCHEDULE, clip_frames=64, batch_size=32, clones=8)  # 4 x 8 patches of 0.64 s
LONG = dict(SCHEDULE, clip_frames=256, batch_size=16, clones=4)  # 16 x 8 patches of 2.56 s: room for blocks
RANDOM = dict(mask_block_time=1, mask_block_freq=1)


def same_flops(clones: int) -> int:
    """The batch size at which so many clones cost as much arithmetic as the short run's 32 x 8."""
    config = PretrainConfig(**PRESETS["demo"] | SHORT)
    cost = sum(update_flops(config).values())
    one = sum(update_flops(dataclasses.replace(config, batch_size=1, clones=clones)).values())
    return round(cost / one)


# axis -> what the reader sees -> settings; a run that serves two axes has one folder
AXES = {
    "utterance weight": {
        "0": SHORT | dict(utterance_weight=0.0),
        "1": SHORT,
        "1.92 (paper's 0.01)": SHORT | dict(utterance_weight=1.92),
        "10": SHORT | dict(utterance_weight=10.0),
        "192 (paper's 1)": SHORT | dict(utterance_weight=192.0),
    },
    "visible blocks": {
        "random, 1 x 1": LONG | RANDOM,
        "2 x 2": LONG | dict(mask_block_time=2, mask_block_freq=2),
        "3 x 3": LONG | dict(mask_block_time=3, mask_block_freq=3),
        "5 x 5": LONG | dict(mask_block_time=5, mask_block_freq=5),
        "flexible": LONG | dict(mask="flexible"),
    },
    "clones x clips": {
        **{f"{c} x {same_flops(c)}": SHORT | dict(clones=c, batch_size=same_flops(c)) for c in (1, 4)},
        "8 x 32": SHORT,
        f"16 x {same_flops(16)}": SHORT | dict(clones=16, batch_size=same_flops(16)),
    },
    "teacher's blocks": {"last": SHORT | dict(target_layers=1), "all": SHORT},
}
SEEN = {"CLS": "linear, CLS", "mean patch": "linear, mean", "both": "linear"}  # what the probe sees of a run


def name_of(settings: dict, seed: int) -> str:
    """A run's folder: what it changes, and its seed."""
    base = LONG if settings["clip_frames"] == LONG["clip_frames"] else SHORT
    changed = [f"{name}_{value}" for name, value in settings.items() if base.get(name) != value]
    return "-".join([f"{settings['clip_frames']}frames", *changed, f"seed{seed}"])


def train(settings: dict, seed: int, audio: Path, out_dir: Path) -> None:
    """Pre-train, or go on with it."""
    flags = settings | dict(
        data=audio / "pretrain.tsv", seed=seed, out_dir=out_dir, probe_every=150,
        probe_train=audio / "drums_train.tsv", probe_test=audio / "drums_test.tsv",
    )  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run([sys.executable, ROOT / "pretrain.py", "--preset", "demo", *words], check=True)


def probes(encoder: Encoder, audio: Path) -> dict[str, dict[str, float]]:
    """Accuracy of probes of an encoder on each task: of CLS token and mean patch, and of either alone."""
    config, cpu, found = encoder.config, torch.device("cpu"), {}
    see = pooled(encoder, "cls_mean", config.depth)
    for task in TASKS:
        train = open_labelled(str(audio / f"{task}_train.tsv"), config.clip_frames)
        test = open_labelled(str(audio / f"{task}_test.tsv"), config.clip_frames, train.classes)
        x, x_test = (predict(see, some.data, config, cpu) for some in (train, test))
        y, y_test = train.targets[x.items], test.targets[x_test.items]
        x, x_test, width = x.values, x_test.values, config.width  # (n, 2D): CLS, mean
        scores = {
            "linear": linear_probe(x, y, x_test),
            "linear, CLS": linear_probe(x[:, :width], y, x_test[:, :width]),
            "linear, mean": linear_probe(x[:, width:], y, x_test[:, width:]),
            "knn": knn_probe(x, y, x_test),
        }
        found[task] = {n: summarize_scores(some, y_test)[0]["accuracy"] for n, some in scores.items()}
    return found


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make()` returns, from a file beside the run if it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        value = make()
        path.write_text(json.dumps(value, indent=1) + "\n")
    return json.loads(path.read_text())


def trained(settings: dict, seed: int, audio: Path, runs: Path) -> dict:
    """Probes of a run, and the lowest spread of its targets."""
    out_dir = runs / name_of(settings, seed)

    def make():
        train(settings, seed, audio, out_dir)
        return probes(Encoder.from_pretrained(out_dir), audio)

    found = kept(out_dir / "probes.json", make)
    log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return found | dict(target_std=min(record["target_std"] for record in log if "target_std" in record))


def untrained(settings: dict, seed: int, audio: Path, runs: Path) -> dict:
    """Probes of the network that the runs start from."""
    config = PretrainConfig(**PRESETS["demo"] | settings)
    torch.manual_seed(seed)
    encoder = EAT(config.network).encoder.eval()
    return kept(runs / f"random-{name_of(settings, seed)}.json", lambda: probes(encoder, audio))


def finetuned(pooling: str, seed: int, audio: Path, runs: Path) -> float:
    """Accuracy on mandarin after fine-tuning the short run with this pooling."""
    out_dir = runs / f"mandarin-{pooling}-seed{seed}"
    flags = dict(
        data=audio / "mandarin_train.tsv", eval_data=audio / "mandarin_test.tsv", pooling=pooling,
        init=runs / name_of(SHORT, seed), seed=seed, out_dir=out_dir,
        clip_frames=64, batch_size=32, updates=400,
    )  # fmt: skip

    def make():
        words = [f"--{name}={value}" for name, value in flags.items()]
        subprocess.run([sys.executable, ROOT / "finetune.py", "--preset", "demo", *words], check=True)
        return json.loads((out_dir / "log.jsonl").read_text().splitlines()[-1])["accuracy"]

    return kept(runs / f"{out_dir.name}.json", make)


def cell(scores: list[float]) -> str:
    """Mean and half the distance of the seeds."""
    return f"{statistics.mean(scores):.3f} ± {(max(scores) - min(scores)) / 2:.3f}"


def table(axis: str, rows: dict[str, list[dict]]) -> list[str]:
    """The linear probe of every row on every task, as Markdown."""
    lines = [f"| {axis} | {' | '.join(TASKS)} |", "|---" * (1 + len(TASKS)) + "|"]
    for name, found in rows.items():
        cells = (cell([run[task]["linear"] for run in found]) for task in TASKS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(tables: dict[str, dict[str, list[dict]]]):
    """A panel for each axis: the linear probe of each seed, their mean, and the untrained network."""
    figure, axes = plt.subplots(1, len(tables), figsize=(12, 3.6), sharey=True, width_ratios=[5, 6, 4, 2])
    for axis, (title, rows) in zip(axes, tables.items()):
        names = [name for name in rows if name != "untrained"]
        for i, task in enumerate(TASKS):
            scores = [[run[task]["linear"] for run in rows[name]] for name in names]
            means = [statistics.mean(some) for some in scores]
            axis.plot(range(len(names)), means, color=f"C{i}", label=task)
            for at, some in enumerate(scores):
                axis.plot([at] * len(some), some, ".", color=f"C{i}")
            untrained = statistics.mean(run[task]["linear"] for run in rows["untrained"])
            axis.axhline(untrained, color=f"C{i}", ls=":", lw=1)
        names = [name.replace(" (", "\n(") for name in names]
        axis.set_xticks(range(len(names)), names, fontsize=7, rotation=30)
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("accuracy of the linear probe\n(dotted: untrained)")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("audio", type=Path, help="what extras/audio/build.py made")
    parser.add_argument("runs", type=Path, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    where, seeds, tables = (args.audio.resolve(), args.runs), args.seeds, {}
    for axis, values in AXES.items():
        rows = {name: [trained(some, seed, *where) for seed in seeds] for name, some in values.items()}
        base = LONG if LONG | RANDOM in values.values() else SHORT
        tables[axis] = rows | dict(untrained=[untrained(base, seed, *where) for seed in seeds])
    tuned = {pooling: [finetuned(pooling, seed, *where) for seed in seeds] for pooling in ("cls", "mean")}

    lines = [line for axis, rows in tables.items() for line in [*table(axis, rows), ""]]
    runs, seen = tables["utterance weight"]["1"], {}
    for name, probe in SEEN.items():
        seen[name] = [{task: {"linear": run[task][probe]} for task in TASKS} for run in runs]
    lines += [*table("what the probe sees", seen), "", "fine-tuned on mandarin: "]
    lines[-1] += ", ".join(f"{name} {cell(scores)}" for name, scores in tuned.items())
    (args.runs / "tables.md").write_text("\n".join(lines) + "\n")
    (args.runs / "ablations.json").write_text(json.dumps(dict(tables, fine_tuned=tuned), indent=1) + "\n")
    draw(tables).savefig(args.runs / "ablations.png", dpi=110)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
