"""The laptop run: how much does pre-training help, and does more of it help more?

    python extras/audio/build.py OUT                                   what it trains on
    python extras/runs/laptop.py OUT runs/laptop                       all of it: about 15 hours of one core
    python extras/runs/laptop.py OUT runs/laptop --only pretrain1      a part: jobs with this prefix

Three seeds of pre-training, and a wider network with the same arithmetic; each is fine-tuned and probed on
five tasks, compared with training from scratch, four times as much fine-tuning, random encoders and the
log-mel input; intermediate checkpoints are fine-tuned and probed, too. Two processes started at once share
the work; started again, it resumes where it stopped. Writes laptop.json, tables.md, worth.png, curve.png,
all logs as logs.jsonl, and the first seed in half precision as encoder.pt, for the jobs that are done, into
the folder of the runs.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import evaluate  # noqa: E402
from data import open_labelled  # noqa: E402
from evaluate import save_checkpoint  # noqa: E402
from extras.plot import plt  # noqa: E402
from finetune import PRESETS  # noqa: E402
from model import Encoder, load_checkpoint  # noqa: E402

SEEDS = (1, 2, 3)
SCHEDULE = dict(
    batch_size=32, updates=4000, warmup=500, ema_decay=0.996, ema_decay_end=0.9998, ema_anneal=4000,
    save_every=250, probe_every=500,
)  # fmt: skip
STEPS = (500, 1000, 2000)  # whose checkpoints are kept, for the curve
# 1.5 times as wide: 2.24 times the arithmetic of an update
WIDE = "model.MODELS['demo'] = dataclasses.replace(model.MODELS['demo'], width=288, heads=6)"
WIDE_SCHEDULE = SCHEDULE | dict(updates=1787, warmup=223, ema_anneal=1787)
# manifest: what the reader sees, frames of a clip; syllables are short
TASKS = {
    "words10": ("10 words", 128), "words35": ("35 words", 128), "mandarin": ("15 rhymes", 64),
    "events": ("20 events", 128), "drums": ("12 drums", 128),
}  # fmt: skip
UPDATES = 600  # of fine-tuning
CURVE = ("words10", "words35", "events", "drums")  # linear probes, with the clips of pre-training
TUNED_TASK = "words35"  # fine-tuned for the curve
TUNED = "fine-tuned, pre-trained"
SCRATCH = "fine-tuned, from scratch"
LONGER = {row: f"{row}, 4 times the updates" for row in (TUNED, SCRATCH)}
PROBED = "linear probe, "
PROBES = [PROBED + of for of in ("pre-trained", "random encoder", "log-mel")]


def keep_checkpoint(run: Path) -> None:
    """Link last.pt under another name if it is of one of STEPS: a link stays when last.pt is replaced."""
    last = run / "last.pt"
    seen = run / "seen.pt"
    with contextlib.suppress(FileNotFoundError):  # there is none yet, or it is just being replaced
        if not (seen.exists() and seen.samefile(last)):
            seen.unlink(missing_ok=True)
            os.link(last, seen)
            step = load_checkpoint(seen)["step"]
            if step in STEPS and not (run / f"step{step}.pt").exists():
                os.link(seen, run / f"step{step}.pt")


def start(command: list, watch: Callable = lambda: None) -> None:
    """Run a program, with `watch` every two seconds; if we are stopped, it is stopped, too, and saves."""
    with subprocess.Popen(list(map(str, command)), cwd=ROOT) as process:
        try:
            while process.poll() is None:
                time.sleep(2)
                watch()
        finally:
            process.terminate()
    if process.returncode:  # it has said why
        sys.exit(process.returncode)


def pretrain(audio: Path, run: Path, seed: int, schedule: dict, patch: str = "") -> None:
    """Pre-train or resume, and keep intermediate checkpoints; `patch` is code that runs first."""
    flags = dict(data=audio / "pretrain.tsv") | schedule | dict(seed=seed, out_dir=run)
    flags |= dict(probe_train=audio / "words10_train.tsv", probe_test=audio / "words10_test.tsv")
    program = ["pretrain.py"]
    if patch:
        run_it = "runpy.run_path('pretrain.py', None, '__main__')"
        program = ["-c", f"import dataclasses, runpy, model; {patch}; {run_it}"]
    command = [sys.executable, *program, "--preset", "demo", *(f"--{k}={v}" for k, v in flags.items())]
    start(command, lambda: keep_checkpoint(run))
    if load_checkpoint(run / "last.pt")["step"] < schedule["updates"]:
        sys.exit(f"{run} stopped before its end")


def pack(audio: Path, packed: Path, names: Iterable[str]) -> None:
    """The manifests of these names, decoded once: what follows reads them many times."""
    for name in names:
        if not (packed / f"{name}.tsv").exists():
            command = [sys.executable, ROOT / "extras" / "prepare.py", "pack", audio / f"{name}.tsv"]
            start([*command, packed / f"{name}.tsv"])


def compare(audio: Path, out_dir: Path, task: str, seed: int, init: Path, *flags: str) -> None:
    """Rows of extras/compare.py for a seed and a task, into out_dir/table.json."""
    data = ["--data", f"{audio / task}_train.tsv", "--eval_data", f"{audio / task}_test.tsv"]
    own = ["--preset=demo", "--pooling=bands", f"--updates={UPDATES}", f"--clip_frames={TASKS[task][1]}"]
    command = [sys.executable, ROOT / "extras" / "compare.py", *own, *data, f"--seed={seed}", *flags]
    start([*command, "--init", init, "--out_dir", out_dir])


def probe(audio: Path, out_dir: Path, checkpoint: Path, tasks: Iterable[str] = CURVE) -> None:
    """Linear probes of a checkpoint, on the clips that `compare` takes, into out_dir/table.json."""
    encoder = Encoder.from_pretrained(checkpoint)
    frames = encoder.config.clip_frames
    least = PRESETS["demo"]["min_samples"]
    found = {}
    for task in tasks:
        train = open_labelled(f"{audio / task}_train.tsv", frames, None, least, allow_silence=False)
        test = open_labelled(f"{audio / task}_test.tsv", frames, train.classes)
        scores = evaluate.probe(evaluate.pooled(encoder), encoder.config, train, test, torch.device("cpu"))
        found[task] = scores["probe_linear"]
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "table.json").write_text(json.dumps(found, indent=1) + "\n")


class Job(NamedTuple):
    needs: tuple[Path, ...]  # files and folders that must be there
    makes: Path  # the file that says that it is done
    work: Callable[[], None]


def begin(audio: Path, runs: Path, manifests: Iterable[str]) -> tuple[dict[str, Job], Callable]:
    """Jobs by name, the first of which decodes manifests; and a function that adds one."""
    jobs = {}
    packed = runs / "packed"

    def add(name: str, needs: Path, work: Callable, *args, makes: str = "table.json") -> None:
        source = packed
        ready = packed / "done"
        if work in (pretrain, pack):
            source = audio
            ready = audio
        jobs[name] = Job((ready, needs), runs / name / makes, lambda: work(source, runs / name, *args))

    add("packed", audio, pack, manifests, makes="done")
    return jobs, add


def list_jobs(audio: Path, runs: Path) -> dict[str, Job]:
    """All there is to do, in an order in which it can be done."""
    jobs, add = begin(audio, runs, [f"{task}_{part}" for task in TASKS for part in ("train", "test")])
    for seed in SEEDS:
        add(f"pretrain{seed}", audio, pretrain, seed, SCHEDULE, makes="done")
    for seed in SEEDS:
        run = runs / f"pretrain{seed}"
        for task in TASKS:
            add(f"{task}-{seed}", run / "done", compare, task, seed, run)
        for step in STEPS:
            kept = run / f"step{step}.pt"
            add(f"probe{step}-{seed}", kept, probe, kept)
            add(f"curve{step}-{seed}", kept, compare, TUNED_TASK, seed, kept, "--rows", "tuned")
    for task in TASKS:
        for seed in SEEDS:
            run = runs / f"pretrain{seed}"
            for kind in ("scratch", "tuned"):
                name = f"longer-{kind}-{task}-{seed}"
                flags = ("--rows", kind, f"--updates={4 * UPDATES}")
                add(name, run / "done", compare, task, seed, run, *flags)
    run = runs / "wide-pretrain"
    add("wide-pretrain", audio, pretrain, 1, WIDE_SCHEDULE, WIDE, makes="done")
    add("wide-probe", run / "done", probe, run)
    for seed in SEEDS:
        add(f"wide-{seed}", run / "done", compare, TUNED_TASK, seed, run, "--rows", "tuned")
    return jobs


def work_through(jobs: dict[str, Job], runs: Path, only: tuple[str, ...]) -> None:
    """Do each job that can be done and that no process has done or is doing."""
    (runs / "claims").mkdir(parents=True, exist_ok=True)
    for name, job in jobs.items():
        asked = name == "packed" or name.startswith(only)  # most need it
        if not asked or job.makes.exists() or not all(map(Path.exists, job.needs)):
            continue
        with open(runs / "claims" / name, "w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
            except BlockingIOError:
                continue
            if not job.makes.exists():
                print(name, flush=True)
                job.work()
                job.makes.parent.mkdir(exist_ok=True)
                job.makes.touch()


def read_table(runs: Path, name: str) -> dict[str, float]:
    """Rows of a job's table.json, one score each; none if it is not done."""
    path = runs / name / "table.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if "accuracy" in found:  # a table of compare.py
        return {row: scores[0] for row, scores in found["accuracy"].items()}
    return found


def over_seeds(runs: Path, form: str, row: str) -> list[float]:
    """The score of each seed that is done."""
    found = [read_table(runs, form.format(seed)) for seed in SEEDS]
    return [table[row] for table in found if row in table]


def collect(runs: Path) -> dict:
    """Scores of the jobs that are done, a list over seeds in each place."""
    tasks = {}
    for task in TASKS:
        tasks[task] = {row: over_seeds(runs, f"{task}-{{}}", row) for row in (TUNED, SCRATCH, *PROBES)}
        for kind, row in (("tuned", TUNED), ("scratch", SCRATCH)):
            tasks[task][LONGER[row]] = over_seeds(runs, f"longer-{kind}-{task}-{{}}", row)
    curve = {task: {0: tasks[task][f"{PROBED}random encoder"]} for task in CURVE}
    for task in CURVE:
        curve[task] |= {step: over_seeds(runs, f"probe{step}-{{}}", task) for step in STEPS}
        curve[task][SCHEDULE["updates"]] = tasks[task][f"{PROBED}pre-trained"]
    tuned = {0: tasks[TUNED_TASK][SCRATCH]}
    tuned |= {step: over_seeds(runs, f"curve{step}-{{}}", TUNED) for step in STEPS}
    tuned[SCHEDULE["updates"]] = tasks[TUNED_TASK][TUNED]
    wide = {task: [score] for task, score in read_table(runs, "wide-probe").items()}
    wide[TUNED] = over_seeds(runs, "wide-{}", TUNED)
    return dict(tasks=tasks, curve=curve, tuned=tuned, wide=wide)


def cell(scores: list[float]) -> str:
    """Mean and standard deviation over seeds, if they differ; a dash without any."""
    if not scores:
        return "-"
    text = f"{statistics.mean(scores):.3f}"
    if len(set(scores)) > 1:
        text += f" ± {statistics.stdev(scores):.3f}"
    return text


def tables(found: dict) -> list[str]:
    """What each task gains; what the length of pre-training is worth."""

    def count(scores: list[float], form: str) -> str:
        if 0 < len(scores) < len(SEEDS):
            return form.format(len(scores))
        return ""

    titles = {task: title for task, (title, _) in TASKS.items()}
    lines = [f"| | {' | '.join(titles.values())} |", "|---" * (1 + len(TASKS)) + "|"]
    for row in (TUNED, SCRATCH, *LONGER.values(), *PROBES):
        scores = [found["tasks"][task][row] for task in TASKS]
        cells = [cell(some) + count(some, " ({} seeds)") for some in scores]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    head = ("updates", f"{titles[TUNED_TASK]}, fine-tuned", *(titles[task] for task in CURVE))
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for step, tuned in found["tuned"].items():
        cells = (cell(found["curve"][task][step]) for task in CURVE)
        lines.append(f"| {int(step):,}{count(tuned, ', {} seeds')} | {cell(tuned)} | {' | '.join(cells)} |")
    if any(found["wide"].values()):
        cells = (cell(found["wide"].get(row, [])) for row in (TUNED, *CURVE))
        lines.append(f"| {WIDE_SCHEDULE['updates']:,}, 288 wide, one run | {' | '.join(cells)} |")
    return lines


def deviation(scores: list[float], alone: float) -> float:
    """Standard deviation over seeds; `alone` for a single one."""
    if len(scores) < 2:
        return alone
    return statistics.stdev(scores)


def draw_bars(axis, tables: dict, bars: list[tuple]) -> None:
    """A group of bars for each task: (row of its table, label, style), with the deviation over seeds."""
    width = 0.8 / len(bars)
    for i, (row, label, style) in enumerate(bars):
        for x, task in enumerate(TASKS):
            place = x + width * (i - (len(bars) - 1) / 2)
            scores = tables[task][row]
            if not scores:
                axis.text(place, 0.01, "not run", rotation=90, ha="center", va="bottom", fontsize=7)
                continue
            spread = deviation(scores, math.nan)
            axis.bar(place, statistics.mean(scores), width, yerr=spread, capsize=2, label=label, **style)
            label = ""  # once in the legend


def draw_worth(found: dict):
    """What pre-training is worth on each task: the network fine-tuned, and frozen; the log-mel as a line."""
    figure, (tuned, frozen) = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, width_ratios=(4, 3))
    scratch = dict(color="0.75", edgecolor="k", linewidth=0.5)
    trained = scratch | dict(color="C0")
    longer = dict(hatch="////")
    draw_bars(tuned, found["tasks"], [
        (SCRATCH, "from scratch", scratch), (TUNED, "pre-trained", trained),
        (LONGER[SCRATCH], "from scratch, 4 times the updates", scratch | longer),
        (LONGER[TUNED], "pre-trained, 4 times the updates", trained | longer),
    ])  # fmt: skip
    draw_bars(frozen, found["tasks"], [
        (f"{PROBED}random encoder", "random encoder", scratch),
        (f"{PROBED}pre-trained", "pre-trained", trained),
    ])  # fmt: skip
    label = "log-mel, without a network"
    for x, task in enumerate(TASKS):
        scores = found["tasks"][task][f"{PROBED}log-mel"]
        if scores:
            frozen.plot([x - 0.42, x + 0.42], [statistics.mean(scores)] * 2, "k--", lw=1.2, label=label)
            label = ""
    tuned.set(title="fine-tuned", ylabel="accuracy, mean ± deviation of 3 seeds", ylim=(0, 1))
    frozen.set_title("frozen, linear probe")
    for axis in (tuned, frozen):
        axis.set_xticks(range(len(TASKS)), [title for title, _ in TASKS.values()])
        axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    return figure


def draw_curve(found: dict):
    """Fine-tuned score and linear probes against updates of pre-training."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.2))
    series = [(0, "fine-tuned", found["tuned"])]
    series += [(1, TASKS[task][0], found["curve"][task]) for task in CURVE]
    for number, (panel, name, points) in enumerate(series):
        points = {max(STEPS[0] // 2, int(step)): scores for step, scores in points.items() if scores}
        if STEPS[0] // 2 in points:
            points[STEPS[0] // 2 + 1] = [math.nan]  # "none" is not on the axis: no line from there
            points = dict(sorted(points.items()))
        means = [statistics.mean(scores) for scores in points.values()]
        spreads = [deviation(scores, 0.0) for scores in points.values()]
        style = dict(marker="o", ms=3, capsize=3, color=f"C{number}", label=name)
        panels[panel].errorbar(points.keys(), means, spreads, **style)
    same = SCHEDULE["updates"]  # the narrower network's updates, of the same arithmetic
    for panel, rows in zip(panels, ((TUNED,), CURVE)):
        label = "1.5 times as wide, same cost"
        for row in rows:
            scores = found["wide"].get(row)
            if scores:
                panel.plot(same, statistics.mean(scores), "k*", ms=8, label=label)
                label = ""  # once in a legend
    for row, style, label in (
        (LONGER[TUNED], "-.", "4,000, fine-tuned 4 times as long"),
        (LONGER[SCRATCH], "--", "none, fine-tuned 4 times as long"),
        (f"{PROBED}log-mel", ":", f"{PROBED}log-mel"),
    ):  # fmt: skip
        scores = found["tasks"][TUNED_TASK][row]
        if scores:
            panels[0].axhline(statistics.mean(scores), color="k", ls=style, lw=1, label=label)
    for axis, title in zip(panels, (f"{TASKS[TUNED_TASK][0]}, fine-tuned", "frozen, linear probe")):
        axis.set_xscale("log", base=2)
        axis.set_xticks([STEPS[0] // 2, *STEPS, same], ["none", *map(str, (*STEPS, same))])
        axis.minorticks_off()
        axis.set(title=title, xlabel="updates of pre-training", ylabel="accuracy")
    panels[0].legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.1))
    panels[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def save_encoder(state: dict, path: Path) -> None:
    """Save student and teacher of a pre-training run in half precision, with settings but no folders."""
    settings = dict(state["settings"])
    for name in ("data", "out_dir", "probe_train", "probe_test"):
        if name in settings:
            settings[name] = Path(settings[name]).name
    half = {}
    for part in ("student", "teacher"):
        half[part] = {name: value.half() for name, value in state[part].items()}
    save_checkpoint(path, step=state["step"], settings=settings, network=state["network"], **half)


def write_results(runs: Path) -> None:
    """laptop.json, tables.md, worth.png, curve.png and encoder.pt."""
    (runs / "laptop.json").write_text(json.dumps(collect(runs), indent=1) + "\n")
    found = json.loads((runs / "laptop.json").read_text())
    (runs / "tables.md").write_text("\n".join(tables(found)) + "\n")
    draw_worth(found).savefig(runs / "worth.png", dpi=110)
    draw_curve(found).savefig(runs / "curve.png", dpi=110)
    first = runs / f"pretrain{SEEDS[0]}"
    if (first / "done").exists():
        save_encoder(load_checkpoint(first / "last.pt"), runs / "encoder.pt")


def main(doc: str, list_jobs: Callable, write_results: Callable) -> None:
    """Work through the jobs, then write results and logs of those that are done."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("audio", type=Path, help="what extras/audio/build.py made")
    parser.add_argument("runs", type=Path, help="folder for the runs")
    parser.add_argument("--only", nargs="+", default=[""], help="jobs whose names begin with one of these")
    args = parser.parse_args()
    audio = args.audio.resolve()
    runs = args.runs.resolve()
    if not (audio / "pretrain.tsv").exists():
        parser.error(f"{audio} has no pretrain.tsv: make it with extras/audio/build.py")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core
    torch.set_num_threads(1)  # likewise for the probes, which are computed here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends, too
    jobs = list_jobs(audio, runs)
    work_through(jobs, runs, tuple(args.only))
    with open(runs / "claims" / "results", "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)  # two may end together
        with open(runs / "logs.jsonl", "w") as out:
            done = [name for name, job in jobs.items() if job.makes.exists()]
            for name in done:
                for log in sorted((runs / name).glob("**/log.jsonl")):
                    run = str(log.parent.relative_to(runs))
                    for line in map(json.loads, log.read_text().splitlines()):
                        out.write(json.dumps(dict(run=run, **line)) + "\n")
        write_results(runs)
        print((runs / "tables.md").read_text())
    missing = [name for name, job in jobs.items() if not job.makes.exists()]
    if missing:
        sys.exit(f"not done yet: {', '.join(missing)}")


if __name__ == "__main__":
    main(__doc__, list_jobs, write_results)
