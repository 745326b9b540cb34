"""Score, tag and describe audio with a trained network; look at runs.

    python evaluate.py CKPT eval.tsv                      mAP, AUC, d-prime or accuracy, and a CSV with every class
    torchrun --nproc_per_node=4 evaluate.py CKPT eval.tsv the same, on four GPUs
    python evaluate.py CKPT clip.mp3 folder/              what does it sound like? Long files with a timeline
    python evaluate.py CKPT clip.wav --features out.npz   CLS token, frames and patches of the encoder
    python evaluate.py plot RUN                           curves of a run; see --help for the other pictures

CKPT is anything model.read_pretrained knows: a run folder, a .pt file of this project or of the released code, a
Hugging Face folder. Everything here is fp32, like the published scores.
Metrics, `predict` and the probes are functions that pretrain.py and finetune.py import.
"""

import argparse
import csv
import datetime
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    FRAME_LENGTH,
    FRAME_SHIFT,
    SAMPLE_RATE,
    AudioDataset,
    Clip,
    InputError,
    PastEnd,
    Silent,
    clip_samples,
    collate,
    count_samples,
    find_audio,
    find_classes,
    load_audio,
    read_all,
    read_classes,
    read_targets,
    spectrogram,
)
from masking import inverse_block_mask, random_mask
from model import AudioClassifier, AudioInput, CheckpointError, Encoder, read_pretrained

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Curve(NamedTuple):
    """Counts at every cut of the ranking of each class, float64; cuts lie between different scores only."""

    hits: Tensor  # (n, C) positives among the clips ranked so far
    hits_before: Tensor  # (n, C) at the cut before
    rank: Tensor  # (n, 1) clips ranked so far
    rank_before: Tensor  # (n, C)
    is_cut: Tensor  # (n, C) bool


def _curve(scores: Tensor, targets: Tensor) -> Curve:
    if scores.shape != targets.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores {tuple(scores.shape)}, targets {tuple(targets.shape)}: both must be (clips, classes)")
    if not scores.isfinite().all():
        raise ValueError("some scores are not finite")
    scores, order = scores.sort(dim=0, descending=True)
    hits = targets.bool().gather(0, order).cumsum(0, dtype=torch.float64)                # (n, C)
    rank = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)[:, None]  # (n, 1)
    is_cut = torch.ones_like(hits, dtype=torch.bool)
    is_cut[:-1] = scores[1:] != scores[:-1]

    def before(count: Tensor) -> Tensor:  # counts only grow: the largest at a cut so far is the last
        return F.pad((count * is_cut).cummax(0).values[:-1], (0, 0, 1, 0))

    return Curve(hits, before(hits), rank, before(rank), is_cut)


def _average_precision(c: Curve) -> Tensor:
    return ((c.hits - c.hits_before) * c.hits / c.rank * c.is_cut).sum(0) / c.hits[-1].clamp(min=1)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class, equal to scikit-learn's: (n, C) scores, (n, C) 0 or 1 -> (C,) float64.

    The sum over cuts of precision x gain in recall; equal scores are one cut. A class without positives has 0 as in
    scikit-learn, one without negatives 1. Raises ValueError for scores that are not finite.
    """
    return _average_precision(_curve(scores, targets))


def _roc_auc(c: Curve) -> Tensor:
    misses, misses_before = c.rank - c.hits, c.rank_before - c.hits_before
    area = ((misses - misses_before) * (c.hits + c.hits_before) / 2 * c.is_cut).sum(0)
    return area / (c.hits[-1] * misses[-1])


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of each class, ties counting half: -> (C,) float64, nan if it cannot be."""
    return _roc_auc(_curve(scores, targets))


def d_prime(auc: float) -> float:
    """Distance of two unit normal distributions that this AUC would separate: sqrt(2) * inverse normal CDF."""
    return math.sqrt(2) * torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)).item()


def accuracy(scores: Tensor, targets: Tensor) -> float:
    """Share of the clips whose highest score is one of their classes."""
    return targets.bool().gather(1, scores.argmax(1, keepdim=True)).double().mean().item()


def summarize_scores(scores: Tensor, targets: Tensor) -> tuple[dict, Tensor]:
    """All metrics of (n, C) scores, and the average precision of each class (C,).

    mAP (classes without positives count as 0, as in scikit-learn and the released code, and are counted), AUC and
    d-prime (over the classes that have both; None where it would be infinite), accuracy if every clip has one class.
    """
    curve, n_positive = _curve(scores, targets), targets.sum(0)
    precision, auc = _average_precision(curve), _roc_auc(curve)
    result = dict(clips=len(scores), classes=scores.shape[1], mAP=precision.mean().item())
    if auc.isfinite().any():
        mean_auc = auc[auc.isfinite()].mean().item()
        result |= dict(AUC=mean_auc, d_prime=d_prime(mean_auc) if 0 < mean_auc < 1 else None)
    if (targets.sum(1) == 1).all():
        result |= dict(accuracy=accuracy(scores, targets))
    empty, full = int((n_positive == 0).sum()), int((n_positive == len(targets)).sum())
    return result | dict(classes_without_positives=empty, classes_without_negatives=full), precision


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def init_distributed(timeout: float) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did: (rank, world size, this process's device).

    A process that waits `timeout` minutes for the others fails, and torchrun then ends the job.
    """
    if not 0 < timeout < 1e6:
        raise InputError(f"--timeout must be a number of minutes above 0, not {timeout}")
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        sys.exit(f"{torch.cuda.device_count()} GPUs here: start at most that many processes (--nproc_per_node)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun's restarts share one store, and would find the addresses of dead processes in it (pytorch#135712)
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend, limit = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(minutes=timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return int(os.environ.get("RANK", 0)), world, device


class Predictions(NamedTuple):
    """What `predict` returns: one row for each clip that could be read, in the order of the data set."""

    values: Tensor  # (n, ...) fp32 on the CPU
    items: Tensor  # (n,) which items of the data set these are
    problems: list[tuple[str, str]]  # (name, reason) of the others


@torch.no_grad()
def predict(
    function: Callable[[Tensor], Tensor], dataset: AudioDataset, audio: AudioInput, device: torch.device,
    batch_size: int = 32, workers: int = 0,
) -> Predictions:  # fmt: skip
    """Apply `function`, spectrograms (B, 1, F, M) -> (B, ...), to every item of a data set once, on all processes.

    Each process takes a stretch of the items, all get all the results. Raises InputError if no item can be read.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = torch.arange(len(dataset)).tensor_split(world)[rank].tolist()
    values, items, problems, clips = [], [], [], []
    read = functools.partial(dataset.read, allow_silence=True)  # silence is scored like any other clip
    rows = read_all(read, mine, min(workers, os.cpu_count()))
    bar = dict(total=len(mine), desc="predict", unit="clip", leave=False, disable=None if rank == 0 else True)
    for i, waveform, problem in tqdm(rows, **bar):
        if problem:
            problems.append((dataset.name(i), problem))
        else:
            clips.append(Clip(waveform, i, "", i))
        if clips and (len(clips) == batch_size or i == mine[-1]):
            batch = collate(clips, dataset.n_frames)
            waveform, n_samples = batch.waveform.to(device), batch.n_samples.to(device)
            values.append(function(spectrogram(waveform, n_samples, audio.norm_mean, audio.norm_std)).float().cpu())
            items += batch.items
            clips = []
    parts = [(torch.cat(values) if values else None, items, problems)]
    if world > 1:
        parts, mine = [None] * world, parts[0]
        dist.all_gather_object(parts, mine)
    found = [part for part, _, _ in parts if part is not None]
    if not found:
        raise InputError(f"{dataset.source}: none of its {len(dataset)} clips can be read ({parts[0][2][0][1]})")
    items = torch.tensor([i for _, some, _ in parts for i in some])
    return Predictions(torch.cat(found), items, [problem for *_, some in parts for problem in some])


def score_manifest(
    model: AudioClassifier, dataset: AudioDataset, targets: Tensor, device: torch.device, workers: int = 0
) -> tuple[dict, Tensor, Predictions]:
    """Metrics of a classifier on a labelled data set: (metrics, average precision (C,), the predictions).

    Raises InputError if the network's scores are not finite.
    """
    training = model.training
    found = predict(model.eval(), dataset, model.audio, device, workers=workers)
    model.train(training)
    if not found.values.isfinite().all():
        raise InputError("the network's scores are not finite: its training has diverged")
    return *summarize_scores(found.values, targets[found.items]), found


# ---------------------------------------------------------------------------------------------------------------------
# Probes: what a frozen encoder knows about labels it was never shown

PROBE_LAYERS = ("last", "mean", "mix", "input")


def pooled_layers(encoder: Encoder, layer: str) -> Callable[[Tensor], Tensor]:
    """A function for `predict`: CLS token beside the mean patch, of the last block or of all: (B, K, 2D).

    layer: "last" (K = 1), "mean" of all blocks (K = 1) or "mix", all of them, for a probe that learns their weights;
    "input", the baseline without a network: mean and std over time of each log-mel band, (B, 1, 2M).
    """

    def pool_input(spec: Tensor) -> Tensor:
        is_sound = spec.amax(3, keepdim=True) > spec.amin(3, keepdim=True)                    # (B, 1, F, 1) not padding
        count = is_sound.sum(2, keepdim=True).clamp(min=1)                                    # (B, 1, 1, 1)
        mean = (spec * is_sound).sum(2, keepdim=True) / count                                 # (B, 1, 1, M)
        std = ((spec - mean).square() * is_sound).sum(2, keepdim=True).div(count).sqrt()
        return torch.cat([mean, std], dim=3)[:, :, 0]                                         # (B, 1, 2M)

    def pool(spec: Tensor) -> Tensor:
        tokens = torch.stack([encoder(spec)] if layer == "last" else encoder.layers(spec), 1)  # (B, K, 1+N, D)
        if layer == "mean":
            tokens = tokens.mean(1, keepdim=True)                                             # (B, 1, 1+N, D)
        return torch.cat([tokens[:, :, 0], tokens[:, :, 1:].mean(2)], dim=2)                  # (B, K, 2D)

    return pool_input if layer == "input" else pool


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, decay: float = 1e-2) -> Tensor:
    """Scores (n', C) of a logistic regression fitted to features x (n, K, D) with classes y (n, C) 0 or 1.

    Features are standardised; with K > 1 layers, their weights (a softmax) are learned too. Softmax regression if every
    clip has one class, else one logistic regression a class. LBFGS on all clips at once, the same on every process.
    """
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-6
    x, x_test, y = (x - mean) / std, (x_test - mean) / std, y.float()
    is_single = bool((y.sum(1) == 1).all())
    weight = torch.zeros(y.shape[1], x.shape[2] + 1, requires_grad=True)
    mix = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, mix], max_iter=200, line_search_fn="strong_wolfe")

    def scores(x: Tensor) -> Tensor:
        mixed = torch.einsum("nkd,k->nd", x, mix.softmax(0))                                  # (n, D)
        return F.linear(mixed, weight[:, :-1], weight[:, -1])                                 # (n, C)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(x), y) if is_single else F.binary_cross_entropy_with_logits(scores(x), y)
        loss = loss + decay * weight[:, :-1].square().sum() / (1 if is_single else y.shape[1])
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return scores(x_test).detach()


def knn_probe(x: Tensor, y: Tensor, x_test: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Scores (n', C): the classes of the k nearest of features x (n, K, D), weighted by exp(cosine / temperature).

    Features are standardised first, because what all clips have in common would make them all alike. Neighbours and
    temperature as in DINO (arXiv 2104.14294, app. F).
    """
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-6
    x, x_test = (F.normalize(((some - mean) / std).flatten(1), dim=1) for some in (x, x_test))  # (n, K*D)
    scores = []
    for part in x_test.split(1024):
        cosine, nearest = (part @ x.T).topk(min(k, len(x)), dim=1)                            # (1024, k)
        weight = (cosine / temperature).softmax(1)
        scores.append(torch.einsum("nk,nkc->nc", weight, y[nearest].float()))                 # (1024, C)
    return torch.cat(scores)


class Labelled(NamedTuple):
    """A labelled data set, one item a clip."""

    dataset: AudioDataset
    targets: Tensor  # (n, C) bool
    classes: dict[str, str]  # label -> name


def open_labelled(
    manifest: str, audio: AudioInput, classes: dict[str, str] | None = None, min_samples: int = FRAME_LENGTH
) -> Labelled:
    """Open a labelled manifest or packed folder; without `classes`, they are the labels found. Raises InputError."""
    dataset = AudioDataset(manifest, audio.clip_frames, min_samples, segments=False)
    classes = classes or find_classes(dataset)
    return Labelled(dataset, read_targets(dataset, classes), classes)


def probe(
    encoder: Encoder, audio: AudioInput, train: Labelled, test: Labelled | None, device: torch.device,
    workers: int = 0, layer: str = "last", kinds: tuple[str, ...] = ("linear", "knn"), metric: str = "",
) -> dict[str, float]:  # fmt: skip
    """Fit probes to one labelled set and score them on another: {"probe_linear": ..., "probe_knn": ...}.

    metric: "accuracy" or "mAP"; by default accuracy if every clip of both has one class. Without a `test` set every
    fourth clip of `train` is tested.
    """
    training = encoder.training
    encoder.eval()
    found = [
        predict(pooled_layers(encoder, layer), some.dataset, audio, device, workers=workers)
        for some in (train, test)
        if some
    ]
    encoder.train(training)
    if not all(some.values.isfinite().all() for some in found):
        raise InputError("the encoder's features are not finite: its training has diverged")
    x, y = found[0].values, train.targets[found[0].items]
    if test:
        x_test, y_test = found[1].values, test.targets[found[1].items]
    else:
        is_test = found[0].items % 4 == 3
        x, y, x_test, y_test = x[~is_test], y[~is_test], x[is_test], y[is_test]
    n_bad = sum(len(some.problems) for some in found)
    if n_bad and (not dist.is_initialized() or dist.get_rank() == 0):
        tqdm.write(f"WARNING: {n_bad} labelled clips cannot be read, the probe does without them")
    if not len(x) or not len(x_test):
        raise InputError(f"{train.dataset.source}: too few clips for a probe")
    is_single = all((some.targets.sum(1) == 1).all() for some in (train, test) if some)
    metric = metric or ("accuracy" if is_single else "mAP")
    fit = dict(linear=linear_probe, knn=knn_probe)
    scores = {f"probe_{kind}": fit[kind](x, y, x_test) for kind in kinds}
    return {name: summarize_scores(some, y_test)[0][metric] for name, some in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Files: tags and features


@dataclass
class Heard:
    """A file as it is worked through: where its windows begin, in samples, and what the network made of each."""

    path: Path
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    outputs: list[np.ndarray | None] = field(default_factory=list)  # None: silent
    problem: str = ""


def window_starts(n_samples: int, n_frames: int) -> list[int]:
    """Where windows of n_frames begin, in samples: side by side, and the last as late as the patches allow."""
    width, patch = n_frames * FRAME_SHIFT, 16 * FRAME_SHIFT
    starts = list(range(0, max(1, n_samples - width + 1), width))
    if starts[-1] + width < n_samples - patch:
        starts.append((n_samples - width) // patch * patch)
    return starts


@torch.no_grad()
def listen(
    function: Callable[[Tensor], Tensor], paths: list[Path], audio: AudioInput, device: torch.device,
    batch_size: int = 16,
) -> Iterator[Heard]:  # fmt: skip
    """Apply `function`, (B, 1, F, M) -> (B, ...), to the windows of files of any length; yields each file when done.

    Windows of several files share a batch, and of a long file only a batch at a time is in memory.
    """
    width, waiting, queue = clip_samples(audio.clip_frames), [], []

    def flush() -> None:
        if waiting:
            batch = collate([clip for _, _, clip in waiting], audio.clip_frames)
            spec = spectrogram(batch.waveform.to(device), batch.n_samples.to(device), audio.norm_mean, audio.norm_std)
            for (file, slot, _), output in zip(waiting, function(spec).float().cpu().numpy()):
                file.outputs[slot] = output
            waiting.clear()

    for path in tqdm(paths, desc="listen", unit="file", leave=False, disable=None if len(paths) > 1 else True):
        queue.append(file := Heard(path))
        n_samples, file.problem = count_samples(path) if path.is_file() else (0, "no such file")
        is_silent = not file.problem
        for start in window_starts(n_samples, audio.clip_frames) if not file.problem else []:
            try:
                waveform = load_audio(path, start, width)
                is_silent = False
                waiting.append((file, len(file.outputs), Clip(waveform, 0, "", 0)))
                length = len(waveform)
            except Silent:
                length = min(width, n_samples - start)
            except PastEnd:
                if start == 0:
                    file.problem = "nothing could be decoded"
                break  # the header promised more
            except InputError as error:
                file.problem = f"{error} (at {clock(start)})" if start else str(error)
                break
            file.starts.append(start)
            file.lengths.append(length)
            file.outputs.append(None)
            if len(waiting) == batch_size:
                flush()
        if is_silent and not file.problem:
            file.problem = "silent"
        while queue and not any(f is queue[0] for f, _, _ in waiting):
            yield queue.pop(0)
    flush()
    yield from queue


def clock(samples: int) -> str:
    """Samples at 16 kHz as 1:02:03.4 or 2:03.4."""
    tenths = samples * 10 // SAMPLE_RATE
    hours, minutes, seconds = tenths // 36_000, tenths // 600 % 60, tenths % 600 / 10
    return f"{hours}:{minutes:02d}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"


def find_files(inputs: list[str]) -> tuple[list[Path], list[Path]]:
    """Audio files named on the command line or below its folders, and for each the folder that names it."""
    paths, roots = [], []
    for name in inputs:
        found = find_audio(name)[0] if os.path.isdir(name) else [Path(name)]
        paths += found
        roots += [Path(name) if os.path.isdir(name) else Path(name).parent] * len(found)
    return paths, roots


def tag(model: AudioClassifier, paths: list[Path], device: torch.device, top_k: int, as_json: bool) -> int:
    """Print the top_k classes of each file, and of each window if it has several; returns how many files failed."""
    names, n_failed = list(model.classes.values()), 0

    def top(probabilities: np.ndarray) -> list[tuple[str, float]]:
        return [(names[i], float(probabilities[i])) for i in np.argsort(-probabilities, kind="stable")[:top_k]]

    for file in listen(lambda spec: model.probabilities(model(spec)), paths, model.audio, device):
        heard = [output for output in file.outputs if output is not None]
        record = dict(file=str(file.path))
        if file.problem:
            n_failed += 1
            record["error"] = file.problem
        if heard:
            ends = [start + length for start, length in zip(file.starts, file.lengths)]
            record |= dict(seconds=round(max(ends) / SAMPLE_RATE, 2), top=dict(top(np.mean(heard, 0))))
            if len(ends) > 1:
                record["windows"] = [
                    dict(start=start / SAMPLE_RATE, end=end / SAMPLE_RATE, top=dict(top(p)) if p is not None else None)
                    for start, end, p in zip(file.starts, ends, file.outputs)
                ]
        if as_json:
            print(json.dumps(record), flush=True)
            continue
        print(f"{file.path}" + (f"  ({record['seconds']} s)" if heard else ""))
        if file.problem:
            print(f"    cannot be used: {file.problem}")
        for name, probability in record.get("top", {}).items():
            print(f"    {probability:.3f}  {name}")
        for window in record.get("windows", []):
            said = ", ".join(f"{name} {p:.2f}" for name, p in (window["top"] or {"silence": 1.0}).items())
            print(f"    {clock(round(window['start'] * SAMPLE_RATE)):>10s}  {said}")
    return n_failed


def layer_tokens(encoder: Encoder, layer: str) -> Callable[[Tensor], Tensor]:
    """Tokens (B, 1+N, D) of the last block, of block number `layer` (1 is the first), or the mean over blocks."""
    if layer == "last":
        return encoder
    if layer == "mean":
        return lambda spec: torch.stack(encoder.layers(spec)).mean(0)
    if layer.isdigit() and 1 <= int(layer) <= encoder.config.depth:
        return lambda spec: encoder.layers(spec)[int(layer) - 1]
    raise InputError(f"--layer {layer}: choose last, mean or 1 to {encoder.config.depth}")


def arrange_features(file: Heard, config) -> dict[str, np.ndarray]:
    """Tokens of a file's windows -> arrays by time; what overlaps the window before, or is padding, is left out.

    cls (windows, D), cls_times (windows, 2) seconds from and to; patches (frames, bands, D), frames (frames, D), their
    mean over bands, and times (frames,) seconds at the middle of each frame of 160 ms.
    """
    bands, shift = config.mel_bins // config.patch_size, config.patch_size * FRAME_SHIFT
    cls, cls_times, patches, times, done = [], [], [], [], 0
    for start, length, tokens in zip(file.starts, file.lengths, file.outputs):
        if tokens is None:
            continue
        rows = tokens[1:].reshape(-1, bands, tokens.shape[1])                                 # (frames, bands, D)
        sounding = max(1, (1 + (length - FRAME_LENGTH) // FRAME_SHIFT) // config.patch_size)
        first = max(0, (done - start) // shift)
        cls.append(tokens[0])
        cls_times.append((start / SAMPLE_RATE, (start + length) / SAMPLE_RATE))
        patches.append(rows[first:sounding])
        times += [(start + (i + 0.5) * shift) / SAMPLE_RATE for i in range(first, len(rows[:sounding]))]
        done = start + len(rows[:sounding]) * shift
    patches = np.concatenate(patches)
    return dict(
        cls=np.stack(cls), cls_times=np.array(cls_times), patches=patches, frames=patches.mean(1), times=np.array(times)
    )


def check_parent(output: str) -> None:
    """Tell before the work, not after it, that there is no folder for its result. Raises InputError."""
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise InputError(f"there is no folder {os.path.dirname(output)} for {os.path.basename(output)}")


def write_features(
    encoder: Encoder, paths: list[Path], roots: list[Path], device: torch.device, layer: str, output: str
) -> int:
    """Write the arrays of arrange_features: all files into one .npz (keys behind `file/` if there are several), or into
    a folder, one .npz for each. Returns how many files failed. Raises InputError if the output exists."""
    is_one = output.endswith(".npz")
    if os.path.exists(output):
        raise InputError(f"{output} exists: remove it or choose another name")
    check_parent(output)
    names = [os.fsencode(path.relative_to(root)).decode(errors="backslashreplace") for path, root in zip(paths, roots)]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{name} is there twice: give the folder above, or one after the other")
    found, n_failed = {}, 0
    for file, name in zip(listen(layer_tokens(encoder, layer), paths, encoder.audio, device), names):
        if file.problem:
            n_failed += 1
            print(f"{file.path} cannot be used: {file.problem}", file=sys.stderr)
        if all(tokens is None for tokens in file.outputs):
            continue
        arrays = arrange_features(file, encoder.config)
        if is_one:
            found |= {f"{name}/{key}" if len(paths) > 1 else key: value for key, value in arrays.items()}
        else:
            os.makedirs(os.path.dirname(os.path.join(output, name)), exist_ok=True)
            np.savez(os.path.join(output, f"{name}.npz"), **arrays)
    if found:
        np.savez(output, **found)
    if n_failed < len(paths):
        print(f"{output}: features of {len(paths) - n_failed} files" + (f", {n_failed} failed" if n_failed else ""))
    return n_failed


def evaluate_manifest(model: AudioClassifier, manifest: str, device: torch.device, output: str, args) -> None:
    """Print the metrics of a classifier on a labelled manifest and write every class to the CSV `output`."""
    is_main, header = not dist.is_initialized() or dist.get_rank() == 0, "label,name,clips,average_precision"
    check_parent(output)
    if os.path.exists(output) and Path(output).read_bytes().split(b"\n")[0].strip() != header.encode():
        raise InputError(f"{output} exists and is no table of classes: remove it or choose another --csv")
    dataset, targets, _ = open_labelled(manifest, model.audio, model.classes)
    result, precision, found = score_manifest(model, dataset, targets, device, args.workers)
    if not is_main:
        return
    for name, problem in [*found.problems, *((name, "shorter than a frame") for name in dataset.short_names())]:
        print(f"{name} cannot be used: {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps(result | dict(unreadable=len(found.problems))))
    else:
        for name, value in result.items():
            print(f"{name:26s} {value:.4f}" if isinstance(value, float) else f"{name:26s} {value}")
    with open(output, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(header.split(","))
        for (label, name), n, value in zip(model.classes.items(), targets[found.items].sum(0).tolist(), precision):
            rows.writerow([label, name, n, f"{value:.6f}"])
    if not args.json:
        print(f"every class: {output}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def pyplot():
    """matplotlib, which is optional, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False})
    return plt


PANELS = (  # what of a run's log is drawn together
    ("loss", ("loss", "loss_frame", "loss_utterance")),
    ("standard deviation", ("target_std", "pred_std")),
    ("probe score", ("probe_linear", "probe_knn")),
    ("score", ("mAP", "accuracy")),
    ("learning rate", ("lr",)),
)


def plot_curves(plt, runs: list[str]):
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
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(9, 2.6 * -(-len(panels) // 2)), squeeze=False)
    lines = {}
    for (title, keys), axis in zip(panels, axes.flat):
        for number, (run, log) in enumerate(logs.items()):
            for i, key in enumerate(keys):  # one run: a colour a key; several: a colour a run
                points = [(r["step"], r[key]) for r in log if r.get(key) is not None]
                style = dict(linestyle=("-", "--", ":")[i], color=f"C{i if len(runs) == 1 else number}", marker=".")
                (line,) = axis.plot(*zip(*points) if points else ([], []), **style, label=key if number == 0 else None)
                lines.setdefault(Path(run).name, line)
        axis.set(xlabel="update", ylabel=title)
        axis.set_yscale("log" if title == "loss" else "linear")
        legend = axis.legend(edgecolor="none", framealpha=0.7, fontsize=7, handlelength=3.5)
        for line in legend.get_lines() if len(runs) > 1 else []:
            line.set_color("0.3")
    if len(runs) > 1:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return figure


def read_clip(path: str, audio: AudioInput) -> tuple[Tensor, float]:
    """The first clip of a file as a spectrogram (1, 1, F, M), cut to whole patches, and its seconds."""
    waveform = load_audio(path, 0, clip_samples(audio.clip_frames))
    spec = spectrogram(waveform[None], torch.tensor([len(waveform)]), audio.norm_mean, audio.norm_std)
    frames = spec.shape[2] // 16 * 16
    if not frames:
        raise InputError(f"{path} is shorter than a patch of 160 ms")
    return spec[:, :, :frames], frames * FRAME_SHIFT / SAMPLE_RATE


def draw_spectrogram(axis, spec: Tensor, seconds: float, **options):
    axis.set(xlabel="time / s", ylabel="mel band")
    extent = (0, seconds, 0, spec.shape[-1])
    return axis.imshow(spec[0, 0].T, origin="lower", aspect="auto", extent=extent, cmap="magma", **options)


def plot_masks(plt, path: str):
    """A clip's spectrogram as the student sees it: four inverse block masks, four random ones, hidden patches grey."""
    spec, seconds = read_clip(path, AudioInput())
    grid = (spec.shape[2] // 16, spec.shape[3] // 16)
    generator = torch.Generator().manual_seed(0)
    block = (5, 5) if grid[0] >= 20 else (2, 2)
    kinds = {
        f"inverse block masks of {block[0]} x {block[1]} patches": inverse_block_mask(
            4, grid=grid, mask_ratio=0.8, block=block, adjust=0.07, generator=generator
        ),
        "random masks": random_mask(4, grid=grid, mask_ratio=0.8, generator=generator),
    }
    figure, axes = plt.subplots(5, 2, figsize=(9, 7), sharex=True, sharey=True)
    for column, (title, masks) in enumerate(kinds.items()):
        draw_spectrogram(axes[0, column], spec, seconds)
        axes[0, column].set_title(f"the clip, and what 4 {title} leave", fontsize=9)
        for axis, mask in zip(axes[1:, column], masks):
            hidden = mask.view(grid).repeat_interleave(16, 0).repeat_interleave(16, 1)        # (F, M)
            draw_spectrogram(axis, spec.masked_fill(hidden, torch.nan), seconds).cmap.set_bad("0.85")
    for axis in axes.flat:
        axis.label_outer()
    return figure


@torch.no_grad()
def cls_attention(encoder: Encoder, spec: Tensor) -> Tensor:
    """How the CLS token of the last block attends to the patches, mean over heads: (1, 1, F, M) -> (H, W), sum <= 1."""
    tokens = (encoder.layers(spec)[-2:] if encoder.config.depth > 1 else [encoder.embed(spec)])[0]  # its input
    attention, width = encoder.blocks[-1].attn, encoder.config.width
    q, k, _ = attention.qkv(tokens).view(1, -1, 3, attention.heads, width // attention.heads).unbind(2)
    weight = torch.einsum("hd,nhd->hn", q[0, 0], k[0]).mul((width // attention.heads) ** -0.5).softmax(1)
    return weight[:, 1:].mean(0).view(encoder.config.grid(spec.shape[2]))                     # (H, W)


def plot_attention(plt, encoder: Encoder, path: str):
    """A clip's spectrogram above the attention of the CLS token over time and frequency."""
    spec, seconds = read_clip(path, encoder.audio)
    weight = cls_attention(encoder, spec)
    figure, axes = plt.subplots(2, 1, figsize=(9, 4), sharex=True)
    figure.colorbar(draw_spectrogram(axes[0], spec, seconds), ax=axes[0], label="normalised log-mel")
    image = axes[1].imshow(
        weight.T * weight.numel(), origin="lower", aspect="auto", extent=(0, seconds, 0, spec.shape[-1]), cmap="viridis"
    )
    axes[1].set(xlabel="time / s", ylabel="mel band")
    figure.colorbar(image, ax=axes[1], label="attention of CLS\n(1 = even)")
    return figure


def plot_timeline(plt, model: AudioClassifier, path: str, device: torch.device, n_classes: int = 10):
    """Probabilities of a file's likeliest classes in each of its windows."""
    (file,) = listen(lambda spec: model.probabilities(model(spec)), [Path(path)], model.audio, device)
    if file.problem and not file.starts:
        raise InputError(f"{path} cannot be used: {file.problem}")
    silent = np.zeros(len(model.classes))
    scores = np.stack([silent if output is None else output for output in file.outputs])      # (windows, C)
    chosen = np.argsort(-scores.max(0), kind="stable")[:n_classes]
    edges = [start / SAMPLE_RATE for start in file.starts] + [(file.starts[-1] + file.lengths[-1]) / SAMPLE_RATE]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.28 * len(chosen)))
    rows = np.arange(len(chosen) + 1) - 0.5
    image = axis.pcolormesh(edges, rows, scores[:, chosen].T, vmin=0, vmax=1, cmap="Blues")
    axis.set_yticks(range(len(chosen)), [list(model.classes.values())[i] for i in chosen])
    axis.invert_yaxis()
    axis.set(xlabel="time / s")
    figure.colorbar(image, ax=axis, label="probability")
    return figure


def plot_classes(plt, path: str, n_shown: int = 60):
    """Average precision of each class of a CSV that evaluate.py wrote, best first; of many, the best and the worst."""
    try:
        with open(path, newline="") as file:
            rows = [(row["name"], float(row["average_precision"]), int(row["clips"])) for row in csv.DictReader(file)]
        if not rows:
            raise ValueError("it is empty")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a table of classes from evaluate.py: {error}") from None
    rows.sort(key=lambda row: -row[1])
    mean = np.mean([row[1] for row in rows])
    shown = rows if len(rows) <= n_shown else rows[: n_shown // 2] + rows[-n_shown // 2 :]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.18 * len(shown)))
    axis.barh(range(len(shown)), [row[1] for row in shown], color="C0")
    axis.set_yticks(range(len(shown)), [f"{name} ({n})" for name, _, n in shown], fontsize=7)
    axis.axvline(mean, color="0.4", linestyle="--", label=f"mean of all {len(rows)} classes: {mean:.3f}")
    axis.invert_yaxis()
    axis.set(xlabel="average precision", ylabel="class (clips)", xlim=(0, 1))
    axis.legend(frameon=False, loc="lower right")
    return figure


def plot(inputs: list[str], checkpoint: str, attention: bool, output: str, device: torch.device) -> None:
    """Draw what the inputs call for: runs, a table of classes, or a clip (its masks, CLS attention or timeline)."""
    plt, first = pyplot(), inputs[0]
    check_parent(output)
    if not output.lower().endswith((".png", ".jpg", ".pdf", ".svg")) or output in inputs:
        raise InputError(f"cannot draw into {output}: choose a new name that ends with .png, .jpg, .pdf or .svg")
    if os.path.isdir(first):
        figure = plot_curves(plt, inputs)
    elif len(inputs) > 1:
        raise InputError("several inputs must be run folders")
    elif first.endswith(".csv"):
        figure = plot_classes(plt, first)
    elif not os.path.isfile(first):
        raise InputError(f"no such file or run: {first}")
    elif not checkpoint:
        figure = plot_masks(plt, first)
    elif attention or read_pretrained(checkpoint).head is None:
        figure = plot_attention(plt, Encoder.from_pretrained(checkpoint), first)
    else:
        figure = plot_timeline(plt, AudioClassifier.from_pretrained(checkpoint).to(device), first, device)
    figure.savefig(output, dpi=120)
    print(output)


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line; `plot` is a command of its own."""
    if argv[:1] == ["plot"]:
        parser = argparse.ArgumentParser(prog="evaluate.py plot", allow_abbrev=False, description="Draw a picture of")
        parser.add_argument("inputs", nargs="+", help="run folders, a per-class CSV, or an audio file")
        what = "of an audio file, draw a classifier's timeline or an encoder's CLS attention; without it, masks"
        parser.add_argument("--checkpoint", default="", help=what)
        parser.add_argument("--attention", action="store_true", help="the CLS attention of a classifier too")
        parser.add_argument("-o", "--output", default="plot.png", help="picture to write")
        return parser.parse_args(argv[1:], argparse.Namespace(command="plot"))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False, description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", help="run folder, .pt file or Hugging Face folder")
    parser.add_argument("inputs", nargs="+", help="a manifest or packed folder to score; or audio files and folders")
    parser.add_argument("--classes", default="", help="names of the classes: class_labels_indices.csv, or one a line")
    parser.add_argument("--top_k", type=int, default=5, help="classes to print for a file")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each file")
    parser.add_argument("--csv", default="per_class.csv", help="where the average precision of each class goes")
    parser.add_argument("--features", default="", help="write features instead: a .npz file, or a folder")
    parser.add_argument("--layer", default="last", help="of the features: last, mean or a number from 1")
    parser.add_argument("--teacher", action="store_true", help="features of the teacher of a pre-training run")
    parser.add_argument("--workers", type=int, default=4, help="loader processes")
    return parser.parse_args(argv, argparse.Namespace(command="evaluate"))


def rename_classes(model: AudioClassifier, path: str) -> None:
    """Give the classes of a classifier the names of a file, by their labels, or by their order if it has no labels.

    Raises InputError if the file does not list the same classes.
    """
    classes = read_classes(path)
    if len(classes) != len(model.classes):
        raise InputError(f"{path} lists {len(classes)} classes, the checkpoint has {len(model.classes)}")
    if classes.keys() == model.classes.keys():
        classes = {label: classes[label] for label in model.classes}
    elif not all(label.startswith("class ") for label in model.classes):  # what read_pretrained calls nameless ones
        unknown = next(label for label in model.classes if label not in classes)
        raise InputError(f"{path} does not list {unknown!r}, a class of the checkpoint")
    model.classes = classes


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    torch.backends.cudnn.allow_tf32 = False
    _, world, device = init_distributed(timeout=30)
    if args.command == "plot":
        plot(args.inputs, args.checkpoint, args.attention, args.output, device)
        return 0
    first = args.inputs[0]
    is_manifest = first.endswith(".tsv") or os.path.exists(os.path.join(first, "index.json"))
    if world > 1 and not is_manifest:
        raise InputError("files are worked through by one process: leave out torchrun")
    if args.top_k < 1:
        raise InputError(f"--top_k must be above 0, not {args.top_k}")
    if args.features:
        encoder = Encoder.from_pretrained(args.checkpoint, args.teacher).to(device)
        if is_manifest:
            raise InputError("--features takes audio files and folders, not a manifest")
        paths, roots = find_files(args.inputs)
        return int(write_features(encoder, paths, roots, device, args.layer, args.features) == len(paths))
    model = AudioClassifier.from_pretrained(args.checkpoint).to(device)
    if args.classes:
        rename_classes(model, args.classes)
    if is_manifest and len(args.inputs) > 1:
        raise InputError("one manifest at a time")
    if is_manifest:
        evaluate_manifest(model, first, device, args.csv, args)
        return 0
    paths, _ = find_files(args.inputs)
    return int(tag(model, paths, device, args.top_k, args.json) == len(paths))


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a name or label need not be printable
    try:
        status = run(parse_arguments(sys.argv[1:]))
    except (InputError, CheckpointError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
