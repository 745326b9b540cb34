"""The ablations: runs that differ in one setting, two seeds of each, on the axes of the paper's own.

    python extras/audio/build.py OUT                                  the audio
    python extras/runs/ablations.py OUT runs/ablations                20 pre-trainings, 24 fine-tunings
    python extras/runs/ablations.py OUT runs/ablations --only base    a part: jobs whose names begin with this

1,500 updates each on clips of 2.56 s, 16 x 8 patches; then linear probes by bands on 35 words and on events,
and for utterance weights fine-tuning on ten words with the CLS token and with the mean over the patches.
Two processes started at once share the work; started again, it resumes where it stopped. Writes
ablations.json, tables.md and logs.jsonl, for the jobs that are done, into the folder of the runs.
"""

import json
import sys
from pathlib import Path

import torch
from laptop import ROOT, TUNED, Job, begin, cell, compare, main, over_seeds, probe
from laptop import pretrain as run_pretrain
from torch import Tensor

sys.path.insert(0, str(ROOT / "tests"))

from bench import update_flops  # noqa: E402

import pretrain  # noqa: E402
from data import seed_of  # noqa: E402
from evaluate import parse_config, run_script  # noqa: E402
from masking import count_visible  # noqa: E402
from model import MODELS  # noqa: E402
from pretrain import PRESETS, PretrainConfig  # noqa: E402

SEEDS = (1, 2)
TASKS = ("words35", "events")
BASE = dict(
    clip_frames=256, batch_size=4, clones=16, updates=1500, warmup=200, ema_decay=0.996, ema_decay_end=0.9998,
    ema_anneal=1500, mask_block_time=5, mask_block_freq=5,
)  # fmt: skip


# ----- Flexible blocks, the last row of the paper's Table 3 ------------------------------------------------

FLEXIBLE_BLOCKS = ((6, 4), (5, 5), (8, 3))  # (time, freq); released code: utils/data_utils.py:234-274
START = 2  # there every block, whatever its shape, begins so many patches before its centre
FLEXIBLE = "import sys; sys.path.append('extras/runs'); import ablations; ablations.pretrain_flexible()"


def flexible_block_mask(
    n: int,
    clones: int,
    grid: tuple[int, int] = (64, 8),
    mask_ratio: float = 0.8,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Inverse block masks whose block shape is drawn per clip and shared by its clones: (n * clones, H*W)
    bool, clone-minor rows. The released code's option `flexible_mask`, off in its recipes.
    Arguments, ValueError and the rest of the algorithm as masking.inverse_block_mask."""
    H, W = grid
    n_rows = n * clones
    n_visible = count_visible(H * W, mask_ratio)
    random = dict(generator=generator, device=device)
    masks = []
    for h, w in FLEXIBLE_BLOCKS:
        n_blocks = int(H * W * ((1 - mask_ratio + adjust) / (h * w)))
        if h > H or w > W or n_blocks < 1 or not 0 < n_visible < H * W:
            raise ValueError(f"{H} x {W} patches at mask ratio {mask_ratio} have no room for {h} x {w}")
        center = torch.randint(H * W, (n_rows, n_blocks, 1), **random)                     # (R, K, 1)
        from_top = torch.arange(H, device=device) - center // W + START                    # (R, K, H)
        from_left = torch.arange(W, device=device) - center % W + START                    # (R, K, W)
        in_rows = ((from_top >= 0) & (from_top < h)).float()                               # (R, K, H)
        in_cols = ((from_left >= 0) & (from_left < w)).float()                             # (R, K, W)
        in_block = torch.einsum("nkh,nkw->nhw", in_rows, in_cols).clamp(max=1).flatten(1)  # (R, H*W)
        noise = torch.rand(in_block.shape, **random)
        keep = (in_block + noise).topk(n_visible, dim=1, sorted=False).indices             # (R, V)
        masks.append(torch.ones_like(in_block, dtype=torch.bool).scatter_(1, keep, False))
    shape = torch.randint(len(masks), (n, 1), **random)                                    # (n, 1)
    shape = shape.expand(n, clones).reshape(-1)                                            # (R,)
    return torch.stack(masks)[shape, torch.arange(n_rows, device=device)]                  # (R, H*W)


def draw_flexible_masks(config: PretrainConfig, step: int, device: torch.device) -> Tensor:
    """The masks of an update in the place of pretrain.draw_masks: (batch_size * C, N) bool."""
    generator = torch.Generator(device).manual_seed(seed_of("masks", config.seed, step))
    grid = MODELS[config.model].grid(config.clip_frames)
    return flexible_block_mask(
        config.batch_size, config.clones, grid, config.mask_ratio, config.mask_adjust, generator, device
    )


def pretrain_flexible() -> None:
    """pretrain.py with flexible blocks, in a process of its own."""
    pretrain.draw_masks = draw_flexible_masks
    run_script(lambda: pretrain.train(parse_config(PretrainConfig, PRESETS)))


# ----- Jobs ------------------------------------------------------------------------------------------------


def same_arithmetic(clones: int) -> int:
    """The batch size at which so many clones cost as much as BASE's."""
    costs = []
    for own in (BASE, BASE | dict(batch_size=1, clones=clones)):
        config = PretrainConfig(**PRESETS["demo"] | own)
        costs.append(sum(update_flops(config, MODELS[config.model]).values()))
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
    "flexible": ("flexible", "40.2", {}),
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
            schedule = BASE | own | dict(data=unlabelled)
            before = FLEXIBLE if name == "flexible" else ""
            add(run.name, unlabelled, run_pretrain, seed, schedule, before, makes="done")
            add(f"{run.name}-probe", run / "done", probe, run, TASKS)
        for task in TASKS:
            run = runs / f"base-{seed}"
            flags = ("--rows", "probes", f"--clip_frames={BASE['clip_frames']}")
            add(f"untrained-{task}-{seed}", run / "done", compare, task, seed, run, *flags)
        for name in TUNED_RUNS:
            for pooling in ("cls", "mean"):
                run = runs / f"{name}-{seed}"
                flags = ("--rows", "tuned", f"--pooling={pooling}")
                add(f"{run.name}-{pooling}", run / "done", compare, "words10", seed, run, *flags)
    return jobs


def collect(runs: Path) -> dict:
    """Scores of the jobs that are done, a list over seeds in each place."""
    probes = {}
    tuned = {}
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
    probes = found["probes"]
    tuned = found["tuned"]
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
