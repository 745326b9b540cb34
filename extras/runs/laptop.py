"""The laptop run: what is pre-training worth, and is more of it worth more?

    python extras/audio/build.py OUT                                   what it trains on
    python extras/runs/laptop.py OUT runs/laptop                       all of it: about 14 hours of one core
    python extras/runs/laptop.py OUT runs/laptop --only pretrain1      a part: jobs whose names begin so

Three seeds of pre-training and a wider network for the same arithmetic; of each, fine-tuning and probes on
five tasks, beside the same from scratch (and for four times as long), of random encoders and of the log-mel
input; fine-tuning and probes of checkpoints on the way. Started twice at once, two share the work; started
again, it goes on where it stopped. When all is there, writes laptop.json, tables.md, curve.png, the logs as
finetune.jsonl, and the first seed in half precision as encoder.pt into the folder of the runs.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

from model import load_checkpoint, save_checkpoint  # noqa: E402
from plot import plt  # noqa: E402

SEEDS = (1, 2, 3)
SCHEDULE = dict(
    batch_size=32, updates=4000, warmup=500, ema_decay=0.996, ema_decay_end=0.9998, ema_anneal=4000,
    save_every=250, probe_every=500,
)  # fmt: skip
STEPS = (500, 1000, 2000)  # whose checkpoints are kept, for the curve
# 1.5 times as wide: 2.24 times the arithmetic of an update
WIDE = "model.MODELS['demo'] = dataclasses.replace(model.MODELS['demo'], width=288, heads=6)"
WIDE_SCHEDULE = SCHEDULE | dict(updates=1787, warmup=223, ema_anneal=1787)
TASKS = {  # name: updates of fine-tuning
    "words10": 600, "words35": 1200, "mandarin": 600, "events": 600, "drums": 600,
}  # fmt: skip
TUNED, SCRATCH = "fine-tuned, pre-trained", "fine-tuned, from scratch"
LONGER = f"{SCRATCH}, 4 times the updates"


def keep_checkpoint(run: Path) -> None:
    """Another name for last.pt if it is that of one of STEPS: a link stays when last.pt is replaced."""
    link = run / "kept.pt"
    link.unlink(missing_ok=True)
    os.link(run / "last.pt", link)
    step = load_checkpoint(link)["step"]
    link.rename(run / f"step{step}.pt") if step in STEPS else link.unlink()


def pretrain(audio: Path, run: Path, seed: int, schedule: dict, patch: str = "") -> None:
    """Pre-train, or go on with it, and keep checkpoints on the way; `patch` is code that runs before."""
    flags = schedule | dict(data=audio / "pretrain.tsv", seed=seed, out_dir=run)
    flags |= dict(probe_train=audio / "words10_train.tsv", probe_test=audio / "words10_test.tsv")
    start = ["pretrain.py"]
    if patch:
        run_it = "runpy.run_path('pretrain.py', None, '__main__')"
        start = ["-c", f"import dataclasses, runpy, model; {patch}; {run_it}"]
    command = [sys.executable, *start, "--preset", "demo", *(f"--{k}={v}" for k, v in flags.items())]
    seen = 0.0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            time.sleep(2)
            if (run / "last.pt").exists() and (run / "last.pt").stat().st_mtime != seen:
                seen = (run / "last.pt").stat().st_mtime
                keep_checkpoint(run)
    if process.returncode or load_checkpoint(run / "last.pt")["step"] < schedule["updates"]:
        sys.exit(process.returncode or f"{run} stopped before its end")


def compare(audio: Path, out_dir: Path, task: str, seed: int, init: Path, *flags: str) -> None:
    """Rows of extras/compare.py for a seed and a task, into out_dir/table.json."""
    data = ["--data", f"{audio / task}_train.tsv", "--eval_data", f"{audio / task}_test.tsv"]
    command = [sys.executable, ROOT / "extras" / "compare.py", "--preset", "demo", *data, "--seed", str(seed)]
    subprocess.run([*command, "--init", init, "--out_dir", out_dir, *flags], cwd=ROOT, check=True)


def probe(audio: Path, out_dir: Path, checkpoint: Path, tasks: Iterable[str] = tuple(TASKS)) -> None:
    """The linear probe of a checkpoint on each task, into out_dir/table.json."""
    found = {}
    for task in tasks:
        command = [sys.executable, ROOT / "evaluate.py", checkpoint]
        command += [f"{audio / task}_train.tsv", f"{audio / task}_test.tsv"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found[task] = json.loads(done.stdout)["probe_linear"]
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "table.json").write_text(json.dumps(found, indent=1) + "\n")


class Job(NamedTuple):
    needs: Path  # a file that must be there
    makes: Path  # the file that says that it is done
    work: Callable[[], None]


def list_jobs(audio: Path, runs: Path) -> dict[str, Job]:
    """All there is to do, in an order in which it can be done."""
    jobs = {}

    def add(name: str, needs: Path, work: Callable, *args, makes: str = "table.json") -> None:
        jobs[name] = Job(needs, runs / name / makes, lambda: work(audio, runs / name, *args))

    for seed in SEEDS:
        add(f"pretrain{seed}", audio, pretrain, seed, SCHEDULE, makes="done")
    for seed in SEEDS:
        run = runs / f"pretrain{seed}"
        for task, updates in TASKS.items():
            add(f"{task}-{seed}", run / "done", compare, task, seed, run, f"--updates={updates}")
        for step in STEPS:
            kept = run / f"step{step}.pt"
            add(f"probe{step}-{seed}", kept, probe, kept)
            add(f"curve{step}-{seed}", kept, compare, "words10", seed, kept, "--rows", "tuned")
    run = runs / "wide-pretrain"
    add("wide-pretrain", audio, pretrain, 1, WIDE_SCHEDULE, WIDE, makes="done")
    add("wide-probe", run / "done", probe, run)
    for seed in SEEDS:
        add(f"wide-{seed}", run / "done", compare, "words10", seed, run, "--rows", "tuned")
    for seed in SEEDS:
        run = runs / f"pretrain{seed}"
        for task, updates in TASKS.items():
            longer = ("--rows", "scratch", f"--updates={4 * updates}")
            add(f"longer-{task}-{seed}", run / "done", compare, task, seed, run, *longer)
    return jobs


def work_through(jobs: dict[str, Job], runs: Path, only: tuple[str, ...]) -> None:
    """Do what can be done and nobody has done or is doing."""
    (runs / "claims").mkdir(parents=True, exist_ok=True)
    for name, job in jobs.items():
        if not name.startswith(only) or job.makes.exists() or not job.needs.exists():
            continue
        with open(runs / "claims" / name, "w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
            except BlockingIOError:
                continue
            if not job.makes.exists():
                print(name, flush=True)
                job.work()
                job.makes.touch()


def read_table(runs: Path, name: str) -> dict[str, float]:
    """Rows of a job's table.json, one score each."""
    found = json.loads((runs / name / "table.json").read_text())
    return {row: scores[0] for row, scores in found["accuracy"].items()} if "accuracy" in found else found


def collect(runs: Path) -> dict:
    """Scores of all jobs, a list over seeds in each place."""

    def over_seeds(form: str, row: str) -> list[float]:
        return [read_table(runs, form.format(seed))[row] for seed in SEEDS]

    tasks = {}
    for task in TASKS:
        tasks[task] = {row: over_seeds(f"{task}-{{}}", row) for row in read_table(runs, f"{task}-1")}
        tasks[task][LONGER] = over_seeds(f"longer-{task}-{{}}", SCRATCH)
    curve = {task: {0: found["linear probe, random encoder"]} for task, found in tasks.items()}
    for task in TASKS:
        curve[task] |= {step: over_seeds(f"probe{step}-{{}}", task) for step in STEPS}
        curve[task][SCHEDULE["updates"]] = tasks[task]["linear probe, pre-trained"]
    tuned = {0: tasks["words10"][SCRATCH]} | {step: over_seeds(f"curve{step}-{{}}", TUNED) for step in STEPS}
    tuned[SCHEDULE["updates"]] = tasks["words10"][TUNED]
    wide = read_table(runs, "wide-probe") | {TUNED: over_seeds("wide-{}", TUNED)}
    return dict(tasks=tasks, curve=curve, tuned=tuned, wide=wide)


def cell(scores: list[float]) -> str:
    """Mean and standard deviation over seeds, if there is one."""
    spread = f" ± {statistics.stdev(scores):.3f}" if len({*scores}) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}"


def tables(found: dict) -> list[str]:
    """What each task gains; what the length of pre-training is worth."""
    rule = "|---" * (1 + len(TASKS)) + "|"
    lines = [f"| | {' | '.join(TASKS)} |", rule]
    for row in (TUNED, SCRATCH, LONGER, *(r for r in found["tasks"]["words10"] if "probe" in r)):
        lines.append(f"| {row} | {' | '.join(cell(found['tasks'][task][row]) for task in TASKS)} |")
    lines += ["", f"| updates | fine-tuned, words10 | {' | '.join(TASKS)} |", "|---" + rule]
    for step, tuned in found["tuned"].items():
        cells = (cell(found["curve"][task][step]) for task in TASKS)
        lines.append(f"| {int(step):,} | {cell(tuned)} | {' | '.join(cells)} |")
    wide = found["wide"]
    cells = (f"{wide[task]:.3f}" for task in TASKS)
    return [*lines, f"| 288 wide, {WIDE_SCHEDULE['updates']:,} | {cell(wide[TUNED])} | {' | '.join(cells)} |"]


def draw(found: dict):
    """Fine-tuned score and linear probes against updates of pre-training."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
    at = [250 if step == 0 else step for step in found["tuned"]]
    series = [(0, "fine-tuned", found["tuned"])] + [(1, task, found["curve"][task]) for task in TASKS]
    for number, (panel, name, points) in enumerate(series):
        means, spreads = zip(*((statistics.mean(s), statistics.stdev(s)) for s in points.values()))
        style = dict(marker="o", ms=3, capsize=3, color=f"C{number}", label=name)
        panels[panel].errorbar(at, means, spreads, **style)
    same = SCHEDULE["updates"]  # of the narrower network, in arithmetic
    panels[0].errorbar(same, statistics.mean(found["wide"][TUNED]), statistics.stdev(found["wide"][TUNED]),
                       marker="*", ms=9, capsize=3, color="k", label="288 wide, same arithmetic")  # fmt: skip
    panels[1].plot([same] * len(TASKS), [found["wide"][task] for task in TASKS], "k*", ms=6)
    for row, style in ((LONGER, "--"), ("linear probe, log-mel", ":")):
        score = statistics.mean(found["tasks"]["words10"][row])
        panels[0].axhline(score, color="k", ls=style, lw=1, label=row.replace(", 4 times", ",\n4 times"))
    for axis, title in zip(panels, ("ten words", "linear probe, bands")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, ["none", *map(str, list(found["tuned"])[1:])])
        axis.minorticks_off()
        axis.set(title=title, xlabel="updates of pre-training", ylabel="accuracy")
        axis.legend(frameon=False, fontsize=7)
    return figure


def write_results(runs: Path) -> None:
    """laptop.json, tables.md, curve.png and encoder.pt."""
    (runs / "laptop.json").write_text(json.dumps(collect(runs), indent=1) + "\n")
    found = json.loads((runs / "laptop.json").read_text())
    (runs / "tables.md").write_text("\n".join(tables(found)) + "\n")
    draw(found).savefig(runs / "curve.png", dpi=110)
    state = load_checkpoint(runs / f"pretrain{SEEDS[0]}" / "last.pt")
    half = {part: {k: v.half() for k, v in state[part].items()} for part in ("student", "teacher")}
    save_checkpoint(runs / "encoder.pt", step=state["step"], network=state["network"], **half)


def main(doc: str, list_jobs: Callable, write_results: Callable) -> None:
    """Work through the jobs; with the last one, write the logs of the fine-tunings and the results."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("audio", type=Path, help="what extras/audio/build.py made")
    parser.add_argument("runs", type=Path, help="folder for the runs")
    parser.add_argument("--only", nargs="+", default=[""], help="jobs whose names begin with one of these")
    args = parser.parse_args()
    audio, runs = args.audio.resolve(), args.runs.resolve()
    jobs = list_jobs(audio, runs)
    work_through(jobs, runs, tuple(args.only))
    missing = [name for name, job in jobs.items() if not job.makes.exists()]
    if missing:
        sys.exit(f"not done yet: {', '.join(missing)}")
    with open(runs / "finetune.jsonl", "w") as out:
        for name in jobs:
            for log in sorted((runs / name).glob("*/log.jsonl")):
                for line in map(json.loads, log.read_text().splitlines()):
                    out.write(json.dumps(dict(run=f"{name}/{log.parent.name}", **line)) + "\n")
    write_results(runs)
    print((runs / "tables.md").read_text())


if __name__ == "__main__":
    main(__doc__, list_jobs, write_results)
