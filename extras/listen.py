"""What do files sound like? The likeliest classes, or an encoder's features; of any length, window by window.

    python extras/listen.py CKPT clip.mp3 folder/            the likeliest classes, of a fine-tuned network
    python extras/listen.py CKPT folder/ --features DIR      a .npz for each file: cls, patches, frames, times

CKPT is what model.read_pretrained knows: a run folder, a .pt file, released weights.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, SILENCE, Clip, InputError, check_peak, clip_samples, collate,
    read_pieces, spectrogram,
)  # fmt: skip
from evaluate import init_distributed, load_classifier, run_script, tokens_after  # noqa: E402
from model import AudioClassifier, Encoder, ModelConfig  # noqa: E402

from prepare import count_samples, find_audio  # noqa: E402


class Window(NamedTuple):
    """A part of a file as long as the network's clip, and what the network makes of it."""

    begin: float  # seconds
    end: float  # of the sound; what follows is padding
    output: np.ndarray | None  # None: silence


@torch.no_grad()
def hear(
    function: Callable[[Tensor], Tensor], path: Path, config: ModelConfig, device: torch.device,
    batch_size: int = 16,
) -> tuple[list[Window], str]:  # fmt: skip
    """Apply `function`, (B, 1, F, M) -> (B, ...), to the windows of a file, side by side, the last as long as
    there is sound: (windows, what is wrong with the file or ""). Of a long file only a batch is in memory."""
    width, hop = clip_samples(config.clip_frames), config.clip_frames * FRAME_SHIFT
    pieces, waiting, windows, problem, at_end = read_pieces(path, width, hop), [], [], "", False
    while not at_end:
        try:
            piece = next(pieces)
            check_peak(piece, allow_silence=True)
            is_first = not windows and not waiting
            if len(piece) >= (FRAME_LENGTH if is_first else config.patch_size * FRAME_SHIFT):
                waiting.append(Clip(piece, 0, ""))
        except (StopIteration, InputError) as error:
            at_end, problem = True, str(error)
        if waiting and (at_end or len(waiting) == batch_size):
            waveform, n_samples, *_ = collate(waiting, config.clip_frames)
            spec = spectrogram(waveform.to(device), n_samples.to(device), config.norm_mean, config.norm_std)
            for clip, output in zip(waiting, function(spec).float().cpu().numpy()):
                begin, is_silent = len(windows) * hop, clip.waveform.abs().max() < SILENCE
                ends = (begin / SAMPLE_RATE, (begin + len(clip.waveform)) / SAMPLE_RATE)
                windows.append(Window(*ends, None if is_silent else output))
            waiting = []
    if all(window.output is None for window in windows):
        return [], problem or ("silent" if windows else "too short")
    if not problem:
        try:
            count_samples(path)
        except InputError as error:  # it holds more than can be read
            return windows, str(error)
    return windows, problem and f"{problem} (after {clock(windows[-1].end)})"


def clock(seconds: float) -> str:
    """Seconds as 2:03.4 or 1:02:03.4."""
    minutes, seconds = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"


def tag(model: AudioClassifier, path: Path, device: torch.device, top_k: int = 5) -> dict:
    """The likeliest classes of a file and, if it has several, of its windows, for JSON: file, error, seconds,
    top {name: probability}, windows [{start, end, top}], where top is None in silence."""
    names, count = list(model.classes.values()), Counter(model.classes.values())
    names = [f"{name} ({label})" if count[name] > 1 else name for label, name in model.classes.items()]

    def top(p: np.ndarray | None) -> dict[str, float] | None:
        best = () if p is None else np.argsort(-p, kind="stable")[:top_k]
        return {names[i]: float(p[i]) for i in best} or None

    windows, problem = hear(lambda spec: model.probabilities(model(spec)), path, model.config, device)
    record = dict(file=str(path)) | (dict(error=problem) if problem else {})
    if heard := [window for window in windows if window.output is not None]:
        seconds = [window.end - window.begin for window in heard]
        mean = np.average([window.output for window in heard], axis=0, weights=seconds)
        record |= dict(seconds=round(windows[-1].end, 2), top=top(mean))
    if len(windows) > 1:
        record["windows"] = [dict(start=w.begin, end=w.end, top=top(w.output)) for w in windows]
    return record


def in_words(record: dict) -> str:
    """What `tag` returns, for people."""
    lines = [record["file"] + (f"  ({record['seconds']} s)" if "seconds" in record else "")]
    lines += [f"    cannot be used: {record['error']}"] if "error" in record else []
    lines += [f"    {p:.3f}  {name}" for name, p in record.get("top", {}).items()]
    for window in record.get("windows", []):
        top = ", ".join(f"{name} {p:.2f}" for name, p in (window["top"] or {"silence": 1.0}).items())
        lines.append(f"    {clock(window['start']):>10s}  {top}")
    return "\n".join(lines)


def features(
    encode: Callable[[Tensor], Tensor], path: Path, config: ModelConfig, device: torch.device
) -> tuple[dict[str, np.ndarray], str]:
    """Tokens of a file by time, without padding, and what is wrong with the file or "".

    cls (windows, D) and cls_times (windows, 2), seconds from and to; patches (frames, bands, D); frames
    (frames, D), their mean over bands; and times (frames,), seconds at the middle of each frame of 160 ms.
    """
    windows, problem = hear(encode, path, config, device)
    parts, width = dict(cls=[], cls_times=[], patches=[], times=[]), config.patch_size * FRAME_SHIFT
    for begin, end, tokens in windows:
        if tokens is not None:
            n_frames = 1 + (round((end - begin) * SAMPLE_RATE) - FRAME_LENGTH) // FRAME_SHIFT
            n = max(1, n_frames // config.patch_size)
            parts["cls"].append(tokens[:1])                                                  # (1, D)
            parts["cls_times"].append([[begin, end]])                                        # (1, 2)
            patches = tokens[1:].reshape(-1, config.grid(0)[1], config.width)                # (H, W, D)
            parts["patches"].append(patches[:n])                                             # (n, W, D)
            parts["times"].append(begin + (np.arange(n) + 0.5) * width / SAMPLE_RATE)        # (n,)
    arrays = {name: np.concatenate(part) for name, part in parts.items() if part}
    return arrays | (dict(frames=arrays["patches"].mean(1)) if arrays else {}), problem


def places_of_features(output: str, files: list[tuple[Path, Path]]) -> list[Path]:
    """Where the features of each file go: DIR/name.npz, or of one file the .npz itself. Raises InputError."""
    if os.path.exists(output):
        raise InputError(f"{output} exists: remove it or choose another name")
    if output.endswith(".npz") and len(files) > 1:
        raise InputError(f"{output} is for one file: name a folder for the features of {len(files)}")
    if output.endswith(".npz"):
        return [Path(output)]
    names = [path.relative_to(root) for path, root in files]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{twice[0]} is there twice: give the folder above, or one after the other")
    return [Path(output, f"{name}.npz") for name in names]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("inputs", nargs="+", help="audio files and folders")
    parser.add_argument("--classes", default="", help="their names: class_labels_indices.csv, or one a line")
    parser.add_argument("--top_k", type=int, default=5, help="classes to print for a file")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each file")
    parser.add_argument("--features", default="", help="write features into this folder; of one file, a .npz")
    parser.add_argument("--block", type=int, default=0, help="of the features: from 1 on, 0 = the last")
    parser.add_argument("--teacher", action="store_true", help="features of a pre-training run's teacher")
    args = parser.parse_args()
    _, world, device = init_distributed()
    if world > 1 or args.top_k < 1:
        raise InputError("this needs one process, without torchrun, and a --top_k above 0")
    if args.features:
        encoder = Encoder.from_pretrained(args.checkpoint, args.teacher).to(device)
        encode = tokens_after(encoder, args.block)
    else:
        model = load_classifier(args.checkpoint, args.classes).to(device)
    files = [  # and the folder that names each
        (path, root if root.is_dir() else path.parent)
        for root in map(Path, args.inputs) for path in (find_audio(root) if root.is_dir() else [root])
    ]  # fmt: skip
    n_good, places = 0, places_of_features(args.features, files) if args.features else [None] * len(files)
    for (path, _), place in tqdm([*zip(files, places)], disable=len(files) == 1 or None, leave=False):
        if not args.features:
            record = tag(model, path, device, args.top_k)
            tqdm.write(json.dumps(record) if args.json else in_words(record))
            n_good += "top" in record
            continue
        arrays, problem = features(encode, path, encoder.config, device)
        if problem:
            tqdm.write(f"{path} cannot be used: {problem}", file=sys.stderr)
        if arrays:
            place.parent.mkdir(parents=True, exist_ok=True)
            np.savez(place, **arrays)
            n_good += 1
    if args.features:
        print(f"{args.features}: features of {n_good} files; {len(files) - n_good} cannot be used")
    return int(n_good == 0)


if __name__ == "__main__":
    run_script(main)
