"""Pictures (needs matplotlib).

    python extras/plot.py runs/demo runs/other -o curves.png                   curves of runs
    python extras/plot.py clip.wav -o masks.png                                what masks leave of a clip
    python extras/plot.py clip.wav --checkpoint CKPT -o timeline.png           a classifier's scores over time
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import FRAME_SHIFT, SAMPLE_RATE, InputError, clip_samples, load_audio, spectrogram  # noqa: E402
from evaluate import run_script  # noqa: E402
from masking import inverse_block_mask  # noqa: E402
from model import AudioClassifier, Encoder, ModelConfig  # noqa: E402

from listen import hear  # noqa: E402

try:
    import matplotlib
except ImportError:
    sys.exit("pictures need the package matplotlib: pip install matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 9})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

PANELS = (  # what of a run's log is drawn together
    ("loss", ("loss", "loss_frame", "loss_utterance")),
    ("standard deviation", ("target_std", "pred_std")),
    ("probe score", ("probe_linear", "probe_knn")),
    ("score", ("mAP", "accuracy")),
    ("learning rate", ("lr",)),
)


def plot_curves(runs: list[str]):
    """Training curves of one or several runs: a panel for each kind of quantity that their logs hold."""
    logs = {}
    for run in runs:
        try:
            logs[run] = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
            if not all(math.isfinite(record["step"]) for record in logs[run]) or not logs[run]:
                raise ValueError("it holds no steps")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"cannot read {run}/log.jsonl: {error}") from None
    held = {key for log in logs.values() for record in log for key in record}
    panels = [(title, [key for key in keys if key in held]) for title, keys in PANELS if held & set(keys)]
    n_rows, lines = -(-len(panels) // 2), {}
    figure, axes = plt.subplots(n_rows, 2, figsize=(9, 2.6 * n_rows), squeeze=False)
    for (title, keys), axis in zip(panels, axes.flat):
        for number, (run, log) in enumerate(logs.items()):
            for i, key in enumerate(keys):  # one run: a colour a key; several: a colour a run
                points = [(r["step"], r[key]) for r in log if r.get(key) is not None]
                style = dict(linestyle=("-", "--", ":")[i], color=f"C{i if len(runs) == 1 else number}")
                style |= dict(marker=".", label=key if number == 0 else None)
                (line,) = axis.plot(*zip(*points) if points else ([], []), **style)
                lines.setdefault(Path(run).name, line)
        axis.set(xlabel="update", ylabel=title)
        axis.set_yscale("log" if title == "loss" else "linear")
        legend = axis.legend(edgecolor="none", framealpha=0.7, fontsize=7, handlelength=3.5)
        for line in legend.get_lines() if len(runs) > 1 else []:
            line.set_color("0.3")
    if len(runs) > 1:
        place = dict(loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
        figure.legend(lines.values(), lines, **place)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return figure


def read_clip(path: str, config: ModelConfig) -> tuple[Tensor, float]:
    """The first clip of a file as a spectrogram (1, 1, F, M), cut to whole patches, and its seconds."""
    waveform = load_audio(path, 0, clip_samples(config.clip_frames))
    spec = spectrogram(waveform[None], torch.tensor([len(waveform)]), config.norm_mean, config.norm_std)
    frames = spec.shape[2] // 16 * 16
    if not frames:
        raise InputError(f"{path} is shorter than a patch of 160 ms")
    return spec[:, :, :frames], frames * FRAME_SHIFT / SAMPLE_RATE


def draw_spectrogram(axis, spec: Tensor, seconds: float):
    axis.set(xlabel="time / s", ylabel="mel band")
    extent = (0, seconds, 0, spec.shape[-1])
    cmap = matplotlib.colormaps["magma"].with_extremes(bad="0.85")  # where it is nan
    return axis.imshow(spec[0, 0].T.numpy(), origin="lower", aspect="auto", extent=extent, cmap=cmap)


def plot_masks(path: str):
    """A clip as the student sees it: four inverse block masks, four random ones, hidden patches grey."""
    spec, seconds = read_clip(path, ModelConfig())
    grid = (spec.shape[2] // 16, spec.shape[3] // 16)
    generator = torch.Generator().manual_seed(0)
    block = (5, 5) if grid[0] >= 20 else (min(2, grid[0]), 2)
    blocks = inverse_block_mask(4, grid, block=block, generator=generator)
    random = inverse_block_mask(4, grid, block=(1, 1), generator=generator)
    kinds = {f"inverse block masks of {block[0]} x {block[1]} patches": blocks, "random masks": random}
    figure, axes = plt.subplots(5, 2, figsize=(9, 7), sharex=True, sharey=True)
    for column, (title, masks) in enumerate(kinds.items()):
        draw_spectrogram(axes[0, column], spec, seconds)
        axes[0, column].set_title(f"the clip, and what 4 {title} leave", fontsize=9)
        for axis, mask in zip(axes[1:, column], masks):
            hidden = mask.view(grid).repeat_interleave(16, 0).repeat_interleave(16, 1)  # (F, M)
            draw_spectrogram(axis, spec.masked_fill(hidden, torch.nan), seconds)
    for axis in axes.flat:
        axis.label_outer()
    return figure


@torch.no_grad()
def cls_attention(encoder: Encoder, spec: Tensor) -> Tensor:
    """How CLS attends to the patches in the last block, mean over heads: (1, 1, F, M) -> (H, W)."""
    tokens, width = encoder.embed(spec), encoder.config.width
    for block in encoder.blocks[:-1]:
        tokens, _ = block(tokens)
    attention = encoder.blocks[-1].attn
    q, k, _ = attention.qkv(tokens).view(1, -1, 3, attention.heads, width // attention.heads).unbind(2)
    weight = torch.einsum("hd,nhd->hn", q[0, 0], k[0]).mul((width // attention.heads) ** -0.5).softmax(1)
    return weight[:, 1:].mean(0).view(encoder.config.grid(spec.shape[2]))  # (H, W)


def plot_attention(encoder: Encoder, path: str):
    """A clip's spectrogram above the attention of the CLS token over time and frequency."""
    spec, seconds = read_clip(path, encoder.config)
    weight = cls_attention(encoder, spec)
    figure, axes = plt.subplots(2, 1, figsize=(9, 4), sharex=True)
    figure.colorbar(draw_spectrogram(axes[0], spec, seconds), ax=axes[0], label="normalised log-mel")
    form = dict(origin="lower", aspect="auto", extent=(0, seconds, 0, spec.shape[-1]), cmap="viridis")
    image = axes[1].imshow(weight.T.numpy() * weight.numel(), **form)
    axes[1].set(xlabel="time / s", ylabel="mel band")
    figure.colorbar(image, ax=axes[1], label="attention of CLS\n(1 = even)")
    return figure


def plot_timeline(model: AudioClassifier, path: str, n_classes: int = 10):
    """Probabilities of a file's likeliest classes in each of its windows, 0 in silence."""
    cpu = torch.device("cpu")
    windows, problem = hear(lambda spec: model.probabilities(model(spec)), Path(path), model.config, cpu)
    if not windows:
        raise InputError(f"{path} cannot be used: {problem}")
    silence = np.zeros(len(model.classes))
    scores = np.stack([silence if w.output is None else w.output for w in windows])  # (windows, C)
    chosen = np.argsort(-scores.max(0), kind="stable")[:n_classes]
    edges = [w.begin for w in windows] + [windows[-1].end]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.28 * len(chosen)))
    rows = np.arange(len(chosen) + 1) - 0.5
    image = axis.pcolormesh(edges, rows, scores[:, chosen].T, vmin=0, vmax=1, cmap="Blues")
    axis.set_yticks(range(len(chosen)), [list(model.classes.values())[i] for i in chosen])
    axis.invert_yaxis()
    axis.set(xlabel="time / s")
    figure.colorbar(image, ax=axis, label="probability")
    return figure


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("inputs", nargs="+", help="run folders, or an audio file")
    parser.add_argument("--checkpoint", default="", help="of a clip, draw what this network makes of it")
    parser.add_argument("--attention", action="store_true", help="where the CLS token looks")
    parser.add_argument("-o", "--output", default="plot.png", help="picture to write")
    args = parser.parse_args()
    first = args.inputs[0]
    if not args.output.lower().endswith((".png", ".jpg", ".pdf", ".svg")) or args.output in args.inputs:
        raise InputError(f"cannot draw into {args.output}: choose a new .png, .jpg, .pdf or .svg")
    if args.attention and not args.checkpoint:
        raise InputError("--attention is that of a network: name it with --checkpoint")
    if not os.path.isdir(os.path.dirname(args.output) or "."):
        raise InputError(f"there is no folder {os.path.dirname(args.output)} for the picture")
    if os.path.isdir(first):
        figure = plot_curves(args.inputs)
    elif len(args.inputs) > 1:
        raise InputError("several inputs must be run folders")
    elif not os.path.isfile(first):
        raise InputError(f"no such file or run: {first}")
    elif not args.checkpoint:
        figure = plot_masks(first)
    elif args.attention:
        figure = plot_attention(Encoder.from_pretrained(args.checkpoint), first)
    else:
        figure = plot_timeline(AudioClassifier.from_pretrained(args.checkpoint), first)
    figure.savefig(args.output, dpi=120)
    print(args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
