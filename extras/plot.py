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

from listen import claimed_seconds, clock, hear, silence_libraries  # noqa: E402

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
    n_rows, lines, last = -(-len(panels) // 2), {}, max(r["step"] for log in logs.values() for r in log)
    figure, axes = plt.subplots(n_rows, 2, figsize=(9, 2.6 * n_rows), squeeze=False)
    for (title, keys), axis in zip(panels, axes.flat):
        for number, (run, log) in enumerate(logs.items()):
            for i, key in enumerate(keys):  # one run: a colour a key; several: a colour a run
                points = [(r["step"], r[key]) for r in log if r.get(key) is not None]
                style = dict(linestyle=("-", "--", ":")[i], color=f"C{i if len(runs) == 1 else number}")
                style |= dict(marker=".", label=key if number == 0 else None)
                (line,) = axis.plot(*zip(*points) if points else ([], []), **style)
                lines.setdefault(run.replace("$", r"\$"), line)  # no formula
        scale, bottom = ("log", None) if title == "loss" else ("linear", 0)
        axis.set(xlabel="update", ylabel=title, xlim=(0, 1.03 * last), yscale=scale)
        axis.set_ylim(bottom, 1.02 if "score" in title else None)
        place = dict(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above the panel: it covers nothing
        legend = axis.legend(frameon=False, fontsize=7, handlelength=3.5, **place)
        for line in legend.get_lines() if len(runs) > 1 else []:
            line.set_color("0.3")
    if len(runs) > 1:
        ncols = max(1, min(4, 100 // max(map(len, lines))))
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=ncols, frameon=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return head(figure, *runs[: len(runs) == 1])


def head(figure, *lines: str):
    """The figure with what it is of above it, whatever characters that has; of what is long, the end."""
    text = os.fsencode("\n".join(line[-120:] for line in lines)).decode(errors="replace")
    figure.suptitle(text, fontsize=9, parse_math=False)
    return figure


def read_clip(path: str, config: ModelConfig) -> tuple[Tensor, float, str]:
    """The first clip of a file, cut to whole patches: spectrogram (1, 1, F, M), seconds, in words."""
    try:
        waveform = load_audio(path, 0, clip_samples(config.clip_frames))
    except InputError as error:
        raise InputError(f"cannot draw the beginning of {path}: {error}") from None
    spec = spectrogram(waveform[None], torch.tensor([len(waveform)]), config.norm_mean, config.norm_std)
    frames = spec.shape[2] // 16 * 16
    if not frames:
        raise InputError(f"{path} is shorter than a patch of 160 ms")
    spec, seconds = spec[:, :, :frames], frames * FRAME_SHIFT / SAMPLE_RATE
    return spec, seconds, f"{path}: 0:00.0 to {clock(seconds)} of {clock(claimed_seconds(path))}"


def draw_spectrogram(axis, spec: Tensor, length: float, colours: str = "magma"):
    axis.set(xlabel="time / s", ylabel="mel band")
    extent = (0, length, 0, spec.shape[-1])
    cmap = matplotlib.colormaps[colours].with_extremes(bad="0.85")  # where it is nan
    return axis.imshow(spec[0, 0].T.numpy(), origin="lower", aspect="auto", extent=extent, cmap=cmap)


def below_spectrogram(spec: Tensor, length: float, height: float = 1.0):
    """A figure with a spectrogram, and an axis of that height below it, of the same time."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 2 + 2 * height), sharex=True, height_ratios=(1, height))
    figure.colorbar(draw_spectrogram(axes[0], spec, length), ax=axes[0], label="normalised log-mel")
    axes[0].label_outer()
    return figure, axes[1]


def plot_masks(path: str):
    """A clip as the student sees it: four inverse block masks, four random ones, hidden patches grey."""
    spec, seconds, place = read_clip(path, ModelConfig())
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
    return head(figure, place)


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


def plot_attention(encoder: Encoder, path: str, checkpoint: str = ""):
    """A clip's spectrogram above the attention of the CLS token over time and frequency."""
    spec, seconds, place = read_clip(path, encoder.config)
    weight = cls_attention(encoder, spec)                                                   # (H, W)
    figure, axis = below_spectrogram(spec, seconds)
    weight = weight.repeat_interleave(16, 0).repeat_interleave(16, 1) * weight.numel()      # (F, M)
    image = draw_spectrogram(axis, weight[None, None], seconds, "viridis")
    figure.colorbar(image, ax=axis, label="attention of CLS\n(1 = even)")
    return head(figure, place, f"attention in the last block of {checkpoint}")


def plot_timeline(model: AudioClassifier, path: str, checkpoint: str = "", n_classes: int = 10):
    """A file's spectrogram above the probabilities of its likeliest classes by window, 0 in silence."""
    clip, seen = model.config.clip_frames * FRAME_SHIFT / SAMPLE_RATE, []  # seconds; the spectrogram
    width = max(1, min(model.config.clip_frames, int(1000 * clip / max(claimed_seconds(path), clip))))

    def look(spec: Tensor) -> Tensor:  # (B, 1, F, M) -> (B, C)
        seen.extend(torch.nn.functional.adaptive_avg_pool2d(spec[:, 0], (width, spec.shape[3])))
        return model.probabilities(model(spec))

    windows, problem = hear(look, Path(path), model.config, torch.device("cpu"))
    if not windows:
        raise InputError(f"{path} cannot be used: {problem}")
    silence, end = np.zeros(len(model.classes)), windows[-1].end
    scores = np.stack([silence if w.output is None else w.output for w in windows])  # (windows, C)
    chosen = np.argsort(-scores.max(0), kind="stable")[:n_classes]
    spec = torch.cat(seen)[None, None, : max(1, int((end - 0.025) / clip * width))]  # without the padding
    seconds, unit = (60, "min") if end > 180 else (1, "s")
    figure, axis = below_spectrogram(spec, spec.shape[2] * clip / width / seconds, 0.3 + 0.14 * len(chosen))
    edges, rows = np.array([w.begin for w in windows] + [end]) / seconds, np.arange(len(chosen) + 1) - 0.5
    image = axis.pcolormesh(edges, rows, scores[:, chosen].T, vmin=0, vmax=1, cmap="Blues")
    names = [os.fsencode(name).decode(errors="replace") for name in model.classes.values()]
    axis.set_yticks(range(len(chosen)), [names[i] for i in chosen], parse_math=False)
    axis.set(xlabel=f"time / {unit}", xlim=(0, edges[-1]), ylim=(rows[-1], rows[0]))
    figure.colorbar(image, ax=axis, label="probability")
    part = clock(end) + (problem and f", heard in part: {problem}")
    return head(figure, f"{path} ({part})", f"what {checkpoint} hears")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("inputs", nargs="+", help="run folders, or an audio file")
    parser.add_argument("--checkpoint", default="", help="of a clip, draw what this network makes of it")
    parser.add_argument("--attention", action="store_true", help="where the CLS token looks")
    parser.add_argument("-o", "--output", default="plot.png", help="picture to write")
    args = parser.parse_args()
    first, *more = args.inputs
    if not args.output.lower().endswith((".png", ".jpg", ".pdf", ".svg")) or args.output in args.inputs:
        raise InputError(f"cannot draw into {args.output}: choose a new .png, .jpg, .pdf or .svg")
    if args.attention and not args.checkpoint:
        raise InputError("--attention is that of a network: name it with --checkpoint")
    if not os.path.isdir(os.path.dirname(args.output) or "."):
        raise InputError(f"there is no folder {os.path.dirname(args.output)} for the picture")
    if os.path.isdir(first):
        figure = plot_curves(args.inputs)
    elif more or not os.path.isfile(first):
        raise InputError("several inputs must be run folders" if more else f"no such file or run: {first}")
    elif not args.checkpoint:
        figure = plot_masks(first)
    elif args.attention:
        figure = plot_attention(Encoder.from_pretrained(args.checkpoint), first, args.checkpoint)
    else:
        figure = plot_timeline(AudioClassifier.from_pretrained(args.checkpoint), first, args.checkpoint)
    figure.savefig(args.output, dpi=120)
    print(args.output)
    return 0


if __name__ == "__main__":
    silence_libraries()
    run_script(main)
