"""Pictures (needs matplotlib).

    python extras/plot.py runs/demo runs/other -o curves.png                   curves of runs
    python extras/plot.py clip.wav -o masks.png                                what masks leave of a clip
    python extras/plot.py long.mp3 --timeline CKPT -o timeline.png             what a classifier hears when
    python extras/plot.py clip.wav --checkpoint CKPT --attention -o cls.png    where the CLS token looks
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, InputError, clip_samples, load_audio, spectrogram,
)  # fmt: skip
from evaluate import Parser, run_script  # noqa: E402
from extras.listen import Report, clock, hear_classes, name_classes, stretches  # noqa: E402
from extras.media import claimed_seconds, stream  # noqa: E402
from masking import inverse_block_mask  # noqa: E402
from model import AudioClassifier, Encoder, ModelConfig  # noqa: E402

try:
    import matplotlib
except ImportError:
    sys.exit("pictures need the package matplotlib: pip install matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 9})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

PANELS = {  # what of a run's log is drawn together
    "loss": ("loss", "loss_frame", "loss_utterance"),
    "standard deviation": ("target_std", "pred_std"),
    "probe score": ("probe_linear",),
    "score": ("mAP", "accuracy"),
    "learning rate": ("lr",),
}
PATCH = 16  # frames and mel bins
GREY = "0.85"  # where there is nothing to draw
MAX_COLUMNS = 1000  # of the spectrogram of a long file


# ----- Curves ----------------------------------------------------------------------------------------------


def is_number(value) -> bool:
    """Whether a value of a log can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_log(run: str) -> list[dict]:
    """The records of a run's log. Foreign and damaged lines are skipped and counted on stderr.
    Raises InputError if there are no records."""
    path = Path(run, "log.jsonl")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            records.append(record)
    if not records:
        raise InputError(f"cannot read {path}: it holds no steps")
    if len(records) < len(lines):
        print(f"WARNING: {path}: passed over {len(lines) - len(records)} damaged lines", file=sys.stderr)
    return records


def points_of(log: list[dict], key: str) -> tuple[list, list]:
    """The steps at which a log has a value, and the values."""
    steps = []
    values = []
    for record in log:
        if is_number(record.get(key)):
            steps.append(record["step"])
            values.append(record[key])
    return steps, values


def draw_panel(axis: Axes, logs: dict[str, list[dict]], keys: list[str], title: str) -> list:
    """Curves of one kind for all runs: one run has a colour for each key, several runs a colour each. Returns
    the last line of each run."""
    lines = []
    for number, log in enumerate(logs.values()):
        for i, key in enumerate(keys):
            colour = i if len(logs) == 1 else number
            style = dict(color=f"C{colour}", linestyle=("-", "--", ":")[i], marker=".")
            if number == 0:
                style["label"] = key
            (line,) = axis.plot(*points_of(log, key), **style)
        lines.append(line)
    axis.set(xlabel="update", ylabel=title)
    if title == "loss":
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    place = dict(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above the panel: it covers nothing
    legend = axis.legend(frameon=False, fontsize=7, handlelength=3.5, **place)
    if len(logs) > 1:
        for line in legend.get_lines():
            line.set_color("0.3")
    return lines


def plot_curves(runs: list[str]) -> Figure:
    """Training curves of one or several runs: a panel for each kind of quantity that their logs hold."""
    logs = {run: read_log(run) for run in runs}
    records = [record for log in logs.values() for record in log]
    held = {key for record in records for key in record if is_number(record[key])}
    panels = {}
    for title, keys in PANELS.items():
        keys = [key for key in keys if key in held]
        if keys:
            panels[title] = keys
    if not panels:
        raise InputError(f"the log of {runs[0]} holds nothing to draw")
    n_rows = math.ceil(len(panels) / 2)
    last = max(record["step"] for record in records)
    figure, axes = plt.subplots(n_rows, 2, figsize=(9, 2.6 * n_rows), squeeze=False)
    for (title, keys), axis in zip(panels.items(), axes.flat):
        lines = draw_panel(axis, logs, keys, title)
        axis.set_xlim(0, max(1, 1.03 * last))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    if len(runs) == 1:
        return head(figure, runs[0])
    names = [run.replace("$", r"\$") for run in logs]  # no formula
    ncols = max(1, min(4, 100 // max(map(len, names))))
    figure.legend(lines, names, loc="outside lower center", ncols=ncols, frameon=False)
    return head(figure)


def head(figure: Figure, *lines: str) -> Figure:
    """The figure with these lines above it, whatever characters they have; of a long line, only the end."""
    text = "\n".join(line[-120:] for line in lines)
    text = os.fsencode(text).decode(errors="replace")
    figure.suptitle(text, fontsize=9, parse_math=False)
    return figure


# ----- A clip ----------------------------------------------------------------------------------------------


def read_clip(path: str, config: ModelConfig) -> tuple[Tensor, float, str]:
    """The beginning of a file, cut to whole patches: spectrogram (1, 1, F, M), seconds, and a description."""
    try:
        waveform = load_audio(path, 0, clip_samples(config.clip_frames))
    except InputError as error:
        raise InputError(f"cannot draw the beginning of {path}: {error}") from None
    n_samples = torch.tensor([len(waveform)])
    spec = spectrogram(waveform[None], n_samples, config.norm_mean, config.norm_std)
    frames = spec.shape[2] // PATCH * PATCH
    if not frames:
        raise InputError(f"{path} is shorter than a patch of 160 ms")
    seconds = frames * FRAME_SHIFT / SAMPLE_RATE
    place = f"{path}: 0:00.0 to {clock(seconds)} of {clock(claimed_seconds(path))}"
    return spec[:, :, :frames], seconds, place


def draw_spectrogram(axis: Axes, spec: Tensor, length: float, colours: str = "magma"):
    """A spectrogram (1, 1, F, M), grey where it is nan; `length` is that of its axis of time."""
    axis.set(xlabel="time / s", ylabel="mel bin")
    extent = (0, length, 0, spec.shape[3])
    cmap = matplotlib.colormaps[colours].with_extremes(bad=GREY)
    return axis.imshow(spec[0, 0].T.numpy(), origin="lower", aspect="auto", extent=extent, cmap=cmap)


def below_spectrogram(spec: Tensor, length: float, height: float = 1.0) -> tuple[Figure, Axes]:
    """A figure with a spectrogram and, below it, an axis with the same times, `height` times as high."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 2 + 2 * height), sharex=True, height_ratios=(1, height))
    image = draw_spectrogram(axes[0], spec, length)
    figure.colorbar(image, ax=axes[0], label="normalised log-mel")
    axes[0].label_outer()
    return figure, axes[1]


def enlarge(patches: Tensor) -> Tensor:
    """Patches as a picture of their frames and mel bins: (H, W) -> (F, M)."""
    return patches.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)


def plot_masks(path: str) -> Figure:
    """A clip as the student sees it: four inverse block masks, four random ones, hidden patches grey."""
    spec, seconds, place = read_clip(path, ModelConfig())
    grid = (spec.shape[2] // PATCH, spec.shape[3] // PATCH)
    generator = torch.Generator().manual_seed(0)
    block = (5, 5)
    if grid[0] < 20:
        block = (min(2, grid[0]), 2)
    kinds = {
        f"inverse block masks of {block[0]} x {block[1]} patches": block,
        "random masks": (1, 1),
    }
    figure, axes = plt.subplots(5, 2, figsize=(9, 7), sharex=True, sharey=True)
    for column, (title, block) in zip(axes.T, kinds.items()):
        masks = inverse_block_mask(4, grid, block=block, generator=generator)
        draw_spectrogram(column[0], spec, seconds)
        column[0].set_title(f"the clip, and what 4 {title} leave", fontsize=9)
        for axis, mask in zip(column[1:], masks):
            hidden = enlarge(mask.view(grid))  # (F, M)
            draw_spectrogram(axis, spec.masked_fill(hidden, torch.nan), seconds)
    for axis in axes.flat:
        axis.label_outer()
    return head(figure, place)


@torch.no_grad()
def cls_attention(encoder: Encoder, spec: Tensor) -> Tensor:
    """How CLS attends to the patches in the last block, mean over heads: (1, 1, F, M) -> (H, W)."""
    x = encoder.embed(spec)                                            # (1, 1+N, D)
    for block in encoder.blocks[:-1]:
        x, _ = block(x)
    attention = encoder.blocks[-1].attn
    D = encoder.config.width
    head_width = D // attention.heads
    qkv = attention.qkv(x).view(-1, 3, attention.heads, head_width)    # (1+N, 3, heads, D/heads)
    q, k, _ = qkv.unbind(1)                                            # 3 x (1+N, heads, D/heads)
    scores = torch.einsum("hd,nhd->hn", q[0], k) / math.sqrt(head_width)
    weight = scores.softmax(1)[:, 1:].mean(0)                          # (N,)
    return weight.view(encoder.config.grid(spec.shape[2]))             # (H, W)


def plot_attention(encoder: Encoder, path: str, checkpoint: str = "") -> Figure:
    """A clip's spectrogram above the attention of the CLS token over time and frequency."""
    spec, seconds, place = read_clip(path, encoder.config)
    weight = cls_attention(encoder, spec)                     # (H, W)
    weight = enlarge(weight) * weight.numel()                 # (F, M): 1 where it is even
    figure, axis = below_spectrogram(spec, seconds)
    image = draw_spectrogram(axis, weight[None, None], seconds, "viridis")
    figure.colorbar(image, ax=axis, label="attention of CLS\n(1 = even)")
    return head(figure, place, f"attention in the last block of {checkpoint}")


# ----- A file ----------------------------------------------------------------------------------------------


def overview(path: str, config: ModelConfig) -> tuple[Tensor, float]:
    """The spectrogram of a whole file, (1, 1, F, M), with no more columns than can be seen, and the seconds
    of a column. Only a clip of the waveform is in memory. Raises InputError."""
    hop = config.clip_frames * FRAME_SHIFT
    clip_seconds = hop / SAMPLE_RATE
    n_clips = max(1.0, claimed_seconds(path) / clip_seconds)
    columns = max(1, min(config.clip_frames, int(MAX_COLUMNS / n_clips)))  # of a clip
    parts = []
    for piece, _ in stream(path, clip_samples(config.clip_frames), hop):
        if len(piece) < FRAME_LENGTH:
            continue
        spec = spectrogram(piece[None], torch.tensor([len(piece)]), config.norm_mean, config.norm_std)
        n = math.ceil(spec.shape[2] / config.clip_frames * columns)
        parts.append(F.adaptive_avg_pool2d(spec, (n, spec.shape[3])))  # (1, 1, n, M)
    if not parts:
        raise InputError(f"{path} cannot be used: too short")
    return torch.cat(parts, dim=2), clip_seconds / columns


def plot_timeline(
    model: AudioClassifier, path: str, checkpoint: str = "", hop: float = 0.0, n_classes: int = 10
) -> Figure:
    """A file's spectrogram above the probabilities of its likeliest classes over time: 0 in silence, grey
    where it is damaged. A window, one every `hop` seconds, stands for its middle."""
    report = Report()
    windows = list(report.follow(hear_classes(model, Path(path), torch.device("cpu"), hop)))
    if not report.n_heard:
        raise InputError(f"{path} cannot be used: {report.problem()}")
    edges = [0.0]
    rows = []
    parts = [(window.begin, window.end, window) for window in windows]
    for _, end, window in stretches(parts, model.config):
        row = np.zeros(len(model.classes))
        if window.problem:
            row = np.full(len(model.classes), np.nan)
        elif window.output is not None:
            row = window.output
        edges.append(end)
        rows.append(row)
    scores = np.stack(rows, axis=1)                                                  # (C, windows)
    chosen = np.argsort(-np.nanmax(scores, axis=1), kind="stable")[:n_classes]
    seconds = 1
    unit = "s"
    if edges[-1] > 180:
        seconds = 60
        unit = "min"
    spec, column = overview(path, model.config)
    figure, axis = below_spectrogram(spec, spec.shape[2] * column / seconds, 0.3 + 0.14 * len(chosen))
    places = np.arange(len(chosen) + 1) - 0.5
    cmap = matplotlib.colormaps["Blues"].with_extremes(bad=GREY)
    drawn = np.ma.masked_invalid(scores[chosen])
    image = axis.pcolormesh(np.array(edges) / seconds, places, drawn, vmin=0, vmax=1, cmap=cmap)
    names = [os.fsencode(name).decode(errors="replace") for name in name_classes(model)]
    axis.set_yticks(range(len(chosen)), [names[i] for i in chosen], parse_math=False)
    axis.set(xlabel=f"time / {unit}", xlim=(0, edges[-1] / seconds), ylim=(places[-1], places[0]))
    figure.colorbar(image, ax=axis, label="probability")
    part = clock(edges[-1])
    problem = report.problem()
    if problem:
        part += f", heard in part: {problem}"
    return head(figure, f"{path} ({part})", f"what {checkpoint} hears")


# ----- Command line ----------------------------------------------------------------------------------------


def read_command_line() -> argparse.Namespace:
    """The flags. Raises InputError for those that do not go together."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("inputs", nargs="+", help="run folders, or an audio file")
    parser.add_argument("--timeline", default="", help="draw what this classifier hears when")
    parser.add_argument("--hop", type=float, default=0.0, help="seconds between windows, 0 = side by side")
    parser.add_argument("--checkpoint", default="", help="network for --attention")
    parser.add_argument("--attention", action="store_true", help="draw where its CLS token looks")
    parser.add_argument("-o", "--output", default="plot.png", help="picture to write")
    args = parser.parse_args()
    if not args.output.lower().endswith((".png", ".jpg", ".pdf", ".svg")) or args.output in args.inputs:
        raise InputError(f"cannot draw into {args.output}: choose a new .png, .jpg, .pdf or .svg")
    if args.attention != bool(args.checkpoint):
        raise InputError("--attention and --checkpoint go together (--timeline CKPT draws classes over time)")
    if args.attention and args.timeline:
        raise InputError("choose --timeline or --attention")
    if args.hop and not args.timeline:
        raise InputError("--hop is for --timeline")
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder} for the picture")
    return args


def main() -> int:
    """Do what the command line says; returns the exit status."""
    args = read_command_line()
    path = args.inputs[0]
    is_run = os.path.isdir(path)
    if is_run and (args.timeline or args.attention):
        raise InputError(f"{path} is a folder: --timeline and --attention draw an audio file")
    if len(args.inputs) > 1 and not is_run:
        raise InputError("several inputs must be run folders")
    if not os.path.exists(path):
        raise InputError(f"no such file or run: {path}")
    if is_run:
        figure = plot_curves(args.inputs)
    elif args.timeline:
        figure = plot_timeline(AudioClassifier.from_pretrained(args.timeline), path, args.timeline, args.hop)
    elif args.attention:
        figure = plot_attention(Encoder.from_pretrained(args.checkpoint), path, args.checkpoint)
    else:
        figure = plot_masks(path)
    figure.savefig(args.output, dpi=120)
    print(args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
