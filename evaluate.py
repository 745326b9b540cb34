"""How good is it? And what all scripts have: settings and processes.

    python evaluate.py CKPT eval.tsv              fine-tuned: mAP, AUC, d-prime, accuracy; a CSV of classes
    python evaluate.py CKPT train.tsv test.tsv    frozen: linear and nearest-neighbour probes of the encoder

CKPT is what model.read_pretrained knows: a run folder, a .pt file, released weights. Both run under torchrun
too, with the same numbers, in fp32 like the published scores.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import gc
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import AudioDataset, InputError, Labelled, build_loader, first_line, open_labelled, spectrogram
from model import AudioClassifier, CheckpointError, Encoder, ModelConfig

# ----- Scripts: settings and processes ---------------------------------------------------------------------

# What a setting may be: its type, in words, and the test
Count = Annotated[int, "a whole number above 0", lambda x: 0 < x < 2**62]
Frames = Annotated[int, "a multiple of 16, of a patch's frames", lambda x: 0 < x < 2**62 and x % 16 == 0]
Whole = Annotated[int, "a whole number from 0 on", lambda x: 0 <= x < 2**62]
Above0 = Annotated[float, "a number above 0", lambda x: 0 < x < math.inf]
AtLeast0 = Annotated[float, "a number from 0 on", lambda x: 0 <= x < math.inf]
Below1 = Annotated[float, "from 0 to below 1", lambda x: 0 <= x < 1]
UpTo1 = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Number = Annotated[float, "a number", math.isfinite]


def check_settings(config) -> None:
    """Refuse what the type of a field rules out, or a warm-up as long as the run. Raises InputError."""
    if config.warmup >= config.updates:
        raise InputError(f"--warmup {config.warmup} must be less than --updates {config.updates}")
    for field in dataclasses.fields(config):
        value, args = getattr(config, field.name), get_args(field.type)
        if args and isinstance(value, str) and value not in args:  # Literal: what may be chosen
            raise InputError(f"--{field.name} {value}: choose from {', '.join(args)}")
        if args and not isinstance(value, str) and not args[2](value):  # Annotated: type, words, test
            raise InputError(f"--{field.name} must be {args[1]}, not {value}")


def parse_config(cls, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> config, or InputError: a flag a field, its comment as help; presets change defaults.
    What is not given follows from what is: warm-ups keep their share of --updates, and a preset's sets to
    score on are not for other --data."""

    def refuse(message: str) -> None:
        near = difflib.get_close_matches(message.split(": ")[-1].split(" ")[0], map("--{}".format, fields))
        raise InputError(f"{message} ({f'did you mean {near[0]}?' if near else '--help lists the flags'})")

    argv = sys.argv[1:] if argv is None else argv
    fields = {field.name: field for field in dataclasses.fields(cls)}
    lines = re.findall(r"^    (?:# (.+)|(\w+): .*?  # (.+))", inspect.getsource(cls), re.M)
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage="%(prog)s [--flag value ...]")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets, default=next(iter(presets)), help="row of defaults")
    parser = argparse.ArgumentParser(description=cls.__doc__, parents=[first], allow_abbrev=False, **form)
    first.error = parser.error = refuse
    for heading, name, comment in lines:
        if heading:
            group = parser.add_argument_group(heading)
        elif name in fields:
            kind, default = fields[name].type, fields[name].default
            choices = "|".join(get_args(kind)) if isinstance(default, str) else ""
            value = dict(type=type(default), metavar=choices or type(default).__name__)
            value = dict(action=argparse.BooleanOptionalAction) if kind is bool else value
            group.add_argument(f"--{name}", default=default, help=comment, **value)
    parser.set_defaults(**presets[first.parse_known_args(argv)[0].preset])
    values, usual = vars(parser.parse_args(argv)), vars(parser.parse_args([]))
    given = {re.sub("^--(no-)?|=.*", "", word) for word in argv if word.startswith("--")}
    derived = fields.keys() - given
    for name in derived & {"warmup", "ema_anneal"}:
        least = int(name == "ema_anneal")
        values[name] = max(least, values[name] * values["updates"] // usual["updates"])
    for name in derived & {"eval_data", "probe_train", "probe_test"}:
        values[name] = "" if "data" in given else values[name]
    return cls(**{name: values[name] for name in fields})


def init_distributed(timeout: float = 30) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did: (rank, world size, this process's device). One
    that waits `timeout` minutes for the others fails, and torchrun then ends the job."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and torch.version.cuda and os.path.exists("/dev/nvidia0"):
        if os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"):
            built = f"this PyTorch is built for CUDA {torch.version.cuda}"
            raise InputError(f"the GPU's driver is too old, {built} (CUDA_VISIBLE_DEVICES= for the CPU)")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(f"{torch.cuda.device_count()} GPUs here: start no more processes (--nproc_per_node)")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in convolutions too
        torch.backends.cudnn.benchmark = True  # shapes are fixed
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has made nan of bf16 (pytorch#196678)
        torch.cuda.set_device(device)
    elif hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: fresh pages cost a tenth of a small update
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed
    if world > 1:
        # torchrun's restarts share a store, and would find the addresses of the dead in it (pytorch#135712)
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        on_gpu = dict(backend="cpu:gloo,cuda:nccl", device_id=device)
        options = on_gpu if device.type == "cuda" else dict(backend="gloo")
        limit = datetime.timedelta(minutes=min(timeout, 1e6))
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=limit, **options)
    return int(os.environ.get("RANK", 0)), world, device


def distribute(model: nn.Module) -> nn.Module:
    """The model or, among several processes, the DistributedDataParallel that averages its gradients."""
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if not torch.cuda.is_available():  # else it sums in another order from its second update on
            model.reducer._push_all_rebuilt_params()
    return model


def accumulating(model: nn.Module, is_more_to_come: bool) -> contextlib.AbstractContextManager:
    """Where to compute a part of an update: gradients are averaged over processes in the last part only."""
    return model.no_sync() if is_more_to_come and hasattr(model, "no_sync") else contextlib.nullcontext()


def pick_precision(amp: str, device: torch.device) -> tuple[str, torch.dtype]:
    """Name and type of --amp on a device; auto: bf16 or else fp16 on a GPU, fp32 on a CPU."""
    if amp == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "fp32" if device.type == "cpu" else "bf16" if has_bf16 else "fp16"
    return amp, dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[amp]


def run_script(main: Callable[[], int]) -> None:
    """Run a script to its exit status; user errors are printed in one line, by one process."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # any name can be printed
    status, line, get_store = 1, None, dist.distributed_c10d._get_default_store
    try:
        status, line = main(), ""
    except KeyboardInterrupt:
        line = "interrupted"
    except (InputError, CheckpointError, OSError) as error:  # of a loader, the last line of its traceback
        line = str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")
    except (RuntimeError, ValueError) as error:
        if re.search("DataLoader|num_workers", str(error)):  # below 0, waited too long, or one is dead
            cure = "more shared memory (docker --ipc=host or --shm-size), or --workers 0"
            line, _holds_loaders = f"{first_line(error).rstrip('.')}: try {cure}", error  # until it is said
        elif not (dist.is_initialized() and get_store().check(["said"])):  # or another process has said why
            raise
    is_joined, rank = dist.is_initialized(), os.environ.get("RANK", "0")
    if line and (get_store().add("said", 1) == 1 if is_joined else rank == "0"):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    elif line and not is_joined:
        time.sleep(10)  # torchrun ends all with the first that ends: let that be the one that speaks
    gc.collect()  # a DistributedDataParallel left over would keep the group's threads beyond Python's end
    if is_joined and line == "":  # after an error of others NCCL would wait for them here
        dist.destroy_process_group()
    sys.exit(status)


# ----- Metrics ---------------------------------------------------------------------------------------------


def per_class(metric: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Tensor:
    """metric(scores (n,), targets (n,) bool) of every class: (n, C), (n, C) -> (C,) float64."""
    if scores.shape != targets.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} do not match")
    if not scores.isfinite().all():
        raise ValueError("some scores are not finite")
    return torch.stack([metric(s.contiguous(), y) for s, y in zip(scores.T, targets.bool().T)])


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class, as scikit-learn's: (n, C) scores, (n, C) 0 or 1 -> (C,) float64.
    The mean, over a class's positives, of the precision among the clips that score at least as high. A class
    without positives has 0. Raises ValueError for scores that are not finite."""

    def of_one(scores: Tensor, targets: Tensor) -> Tensor:
        everything, positives = scores.sort().values, scores[targets].sort().values
        hits = len(positives) - torch.searchsorted(positives, positives)
        rank = len(everything) - torch.searchsorted(everything, positives)
        return (hits / rank.double()).sum() / max(1, len(positives))

    return per_class(of_one, scores, targets)


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of each class: (C,) float64, nan if it has no positives or no negatives.
    The share of pairs of a positive and a negative where the positive scores higher; equal ones are half."""

    def of_one(scores: Tensor, targets: Tensor) -> Tensor:
        positives, negatives = scores[targets], scores[~targets].sort().values
        below, not_above = (torch.searchsorted(negatives, positives, right=right) for right in (False, True))
        return (below + not_above).double().mean() / (2.0 * len(negatives) or math.nan)

    return per_class(of_one, scores, targets)


def summarize_scores(scores: Tensor, targets: Tensor) -> tuple[dict, Tensor]:
    """All metrics of (n, C) scores, and the average precision of each class (C,).
    mAP (classes without positives count as 0, as in scikit-learn and the released code, and are counted), AUC
    (over the classes that have both) and d-prime (the distance of two unit normal distributions with that
    AUC, None where infinite); and accuracy, of the highest score, if every clip has one class."""
    precision, auc = average_precision(scores, targets), roc_auc(scores, targets)
    result = dict(clips=len(scores), classes=scores.shape[1], mAP=precision.mean().item())
    if auc.isfinite().any():
        auc = auc[auc.isfinite()].mean()
        d_prime = math.sqrt(2) * torch.special.ndtri(auc).item()
        result |= dict(AUC=auc.item(), d_prime=d_prime if 0 < auc < 1 else None)
    if (targets.sum(1) == 1).all():
        result |= dict(accuracy=targets.bool()[range(len(scores)), scores.argmax(1)].double().mean().item())
    empty, full = (targets.sum(0) == 0).sum().item(), (targets.sum(0) == len(targets)).sum().item()
    return result | dict(classes_without_positives=empty, classes_without_negatives=full), precision


@torch.no_grad()
def masked_std(x: Tensor, weight: Tensor) -> float:
    """Spread of features over the masked patches of all processes, the sign of a collapse when it nears 0.
    x (R, D), weight (R,) how often each row counts: mean over channels of the square root of the unbiased
    variance + 1e-6 (EAT_pretraining.py:830-845, where it is called target_var and pred_var)."""
    x, weight = x.double(), weight.double()
    sums = torch.cat([weight.sum()[None], weight @ x, weight @ x.square()])  # (1 + 2D,)
    if dist.is_initialized():
        dist.all_reduce(sums)
    count, total, square = sums[0], *sums[1:].chunk(2)
    return ((square - total**2 / count) / (count - 1) + 1e-6).sqrt().mean().item()


# ----- Predictions -----------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """What `predict` returns: one row for each clip that could be read, in the order of the data set."""

    values: Tensor  # (n, ...) fp32 on the CPU
    items: Tensor  # (n,) which items of the data set these are
    problems: list[str]  # the others: file and reason


@torch.no_grad()
def predict(
    function: Callable[[Tensor], Tensor], data: AudioDataset, config: ModelConfig, device: torch.device,
    workers: int = 0, batch_size: int = 32, **loading,
) -> Predictions:  # fmt: skip
    """Apply `function`, (B, 1, F, M) -> (B, ...), to every item of a data set once: each process to a stretch
    of them, all get all the results. Raises InputError if none can be read."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = torch.arange(len(data)).tensor_split(world)[rank].split(batch_size)
    loader = build_loader(data, [batch.tolist() for batch in batches if len(batch)], workers, **loading)
    values, items, problems = [], [], []
    for batch in tqdm(loader, "predict", len(batches), leave=False, disable=rank > 0 or None):  # None: no tty
        waveform, n_samples = batch.waveform.to(device), batch.n_samples.to(device)
        out = function(spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)).float().cpu()
        good = [row for row, problem in enumerate(batch.problems) if not problem]  # a stand-in is not scored
        values.append(out[good])
        items += [batch.items[row] for row in good]
        problems += filter(None, batch.problems)
    parts = [(values, items, problems)]
    if world > 1:
        parts, own = [None] * world, parts[0]
        dist.all_gather_object(parts, own)
    values, items, problems = (sum(column, []) for column in zip(*parts))
    return Predictions(torch.cat(values), torch.tensor(items), problems)


def score(
    model: AudioClassifier, test: Labelled, device: torch.device, workers: int = 0, **loading
) -> tuple[dict, Tensor, Predictions]:
    """Metrics of a classifier on a labelled data set: (metrics, average precision (C,), the predictions)."""
    found = predict(model, test.data, model.config, device, workers, **loading)
    if not found.values.isfinite().all():
        raise InputError("the network's scores are not finite: its training has diverged")
    return *summarize_scores(found.values, test.targets[found.items]), found


# ----- Probes: what a frozen encoder knows about labels it was never shown ---------------------------------

POOLINGS = ("bands", "cls_mean")


def mean_and_std(x: Tensor, weight: Tensor) -> Tensor:
    """Over time, where `weight` (B, T) is 1, of x (B, T, ..., D): (B, 2 * ... * D), all means first."""
    weight = weight.reshape(*weight.shape, *[1] * (x.ndim - 2)).float()
    total = weight.sum(1, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(1, keepdim=True) / total
    std = ((x - mean).square() * weight).sum(1, keepdim=True).div(total).sqrt()
    return torch.cat([mean, std], dim=1).flatten(1)


def sounding(spec: Tensor) -> Tensor:
    """Which frames are neither padding nor digital silence, whose mel bins are all equal: (B, F) bool."""
    return (spec.amax(3) > spec.amin(3))[:, 0]


def tokens_after(encoder: Encoder, block: int = 0) -> Callable[[Tensor], Tensor]:
    """The tokens (B, 1+N, D) after a block: from 1 on; 0 is at 7/12 of the depth, reported as the best of the
    published weights (see extras/runs/laptop/README.md). Raises InputError if there is no such block."""
    if not 0 <= block <= encoder.config.depth:
        raise InputError(f"there is no block {block}: the encoder has {encoder.config.depth}")

    def encode(spec: Tensor) -> Tensor:
        tokens = encoder.embed(spec)
        for layer in encoder.blocks[: block or max(1, len(encoder.blocks) * 7 // 12)]:
            tokens, _ = layer(tokens)
        return tokens

    return encode


def pooled(encoder: Encoder, pooling: str = POOLINGS[0], block: int = 0) -> Callable[[Tensor], Tensor]:
    """What the probes see of a clip after a block, as `tokens_after` counts them: a function for `predict`.
    "bands": mean and std over time of the patches in each band, without padding, (B, 1, F, M) -> (B, 2WD);
    "cls_mean", as in published probes: CLS token and mean patch, (B, 2D). Raises InputError."""
    encode = tokens_after(encoder, block)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")

    def pool(spec: Tensor) -> Tensor:
        tokens, (H, W) = encode(spec), encoder.config.grid(spec.shape[2])       # (B, 1+N, D)
        if pooling == "cls_mean":
            return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)      # (B, 2D)
        frames = sounding(spec)[:, : H * encoder.config.patch_size]             # (B, F)
        is_sound = frames.unflatten(1, (H, -1)).float().mean(2) >= 0.5          # (B, H)
        is_sound[:, 0] = True                                                   # however short the clip is
        return mean_and_std(tokens[:, 1:].unflatten(1, (H, W)), is_sound)       # (B, 2WD)

    return pool


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, decay: float = 1e-2) -> Tensor:
    """Scores (n', C) of a logistic regression fitted to features x (n, D) with classes y (n, C) 0 or 1.
    Features are standardised. Softmax regression if every clip has one class, else one logistic regression a
    class. LBFGS on all clips at once, the same on every process."""
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-6
    x, x_test, y = (x - mean) / std, (x_test - mean) / std, y.float()
    is_single = bool((y.sum(1) == 1).all())
    weight = torch.zeros(y.shape[1], x.shape[1] + 1, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = F.linear(x, weight[:, :-1], weight[:, -1])  # (n, C)
        loss = F.cross_entropy(scores, y) if is_single else F.binary_cross_entropy_with_logits(scores, y)
        loss = loss + decay * weight[:, :-1].square().sum() / (1 if is_single else y.shape[1])
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return F.linear(x_test, weight[:, :-1], weight[:, -1]).detach()


def knn_probe(x: Tensor, y: Tensor, x_test: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Scores (n', C): classes of the k nearest of features x (n, D), weighted by exp(cosine / temperature).
    Features are standardised first, because what all clips have in common would make them all alike.
    Neighbours and temperature as in DINO (arXiv 2104.14294, app. F)."""
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-6
    x, x_test = (F.normalize((features - mean) / std, dim=1) for features in (x, x_test))
    scores = []
    for part in x_test.split(1024):
        cosine, nearest = (part @ x.T).topk(min(k, len(x)), dim=1)             # (1024, k)
        weight = (cosine / temperature).softmax(1)
        scores.append(torch.einsum("nk,nkc->nc", weight, y[nearest].float()))  # (1024, C)
    return torch.cat(scores)


def probe(
    function: Callable[[Tensor], Tensor], config: ModelConfig, train: Labelled, test: Labelled,
    device: torch.device, workers: int = 0, metric: str = "", **loading,
) -> dict[str, float]:  # fmt: skip
    """Fit probes to function(spec) (B, D) of one labelled set and score them on another.
    Returns probe_linear and probe_knn: `metric` or, without one, accuracy if every clip has one class or mAP.
    """
    common = (config, device, workers)
    found, found_test = (predict(function, part.data, *common, **loading) for part in (train, test))
    y, y_test = train.targets[found.items], test.targets[found_test.items]
    x, x_test = found.values.to(device), found_test.values.to(device)
    if not (x.isfinite().all() and x_test.isfinite().all()):
        raise InputError("the encoder's features are not finite: its training has diverged")
    n_bad, n_cut = len(found.problems) + len(found_test.problems), train.data.n_cut + test.data.n_cut
    if (n_bad or n_cut) and int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"WARNING: probes: {n_bad} clips cannot be used, {n_cut} are cut to fit", file=sys.stderr)
    is_single = (y.sum(1) == 1).all() and (y_test.sum(1) == 1).all()
    metric = metric or ("accuracy" if is_single else "mAP")
    fits = dict(probe_linear=linear_probe, probe_knn=knn_probe)
    scores = {name: fit(x, y.to(device), x_test).cpu() for name, fit in fits.items()}
    return {name: summarize_scores(table, y_test)[0][metric] for name, table in scores.items()}


# ----- Command line ----------------------------------------------------------------------------------------


def read_classes(path: str | os.PathLike) -> dict[str, str]:
    """Label -> name of every class, in the file's order: AudioSet's class_labels_indices.csv, FSD50K's table,
    the released label_descriptors.csv (index,label, without header), or a label a line. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n") for line in file if line.strip()]
        rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", "") or first_line(error)  # without the path again
        raise InputError(f"cannot read the classes in {path}: {reason}") from None
    header = [cell.strip() for cell in rows.pop(0)] if rows and rows[0][0].strip() == "index" else ["", "mid"]
    label = header.index("mid") if "mid" in header else 1  # the columns of labels and names
    name = next((i for i, cell in enumerate(header) if cell in ("display_name", "name")), -1)
    if not all(len(row) > label and row[0].isdecimal() for row in rows):  # a label a line
        rows, label = [[line] for line in lines], 0
    elif [int(row[0]) for row in rows] != list(range(len(rows))):
        raise InputError(f"{path}: the indices of the classes do not count from 0")
    elif rows and rows[0][name].startswith("/m/"):  # FSD50K's index,label,mid: no names
        name = label
    classes = {row[label].strip(): row[name].strip() for row in rows}
    if not classes or len(classes) < len(rows):
        raise InputError(f"{path}: expected every class once, found {len(classes)} in {len(rows)} lines")
    return classes


def load_classifier(path: str, classes: str = "") -> AudioClassifier:
    """A classifier; with `classes`, its classes have the names of that file. Raises InputError."""
    model = AudioClassifier.from_pretrained(path)
    names, own = read_classes(classes) if classes else model.classes, model.classes
    if len(names) != len(own) or names.keys() != own.keys() and "class 0" not in own:  # released: no labels
        raise InputError(f"{classes} does not list the {len(own)} classes of {path}, {next(iter(own))} ...")
    model.classes = {label: names[label] for label in own} if names.keys() == own.keys() else names
    return model


def write_classes(path: Path, model: AudioClassifier, counts: Tensor, precision: Tensor) -> None:
    """Write a table of all classes: label, name, clips, average_precision."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        scores = map("{:.6f}".format, precision.tolist())
        rows = zip(model.classes, model.classes.values(), counts.tolist(), scores)
        csv.writer(file).writerows([("label", "name", "clips", "average_precision"), *rows])


def main() -> int:
    """Do what the command line says; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("manifest", help="labelled clips: to score, or to fit probes on")
    parser.add_argument("test", nargs="?", help="labelled clips to score the probes on")
    parser.add_argument("--classes", default="", help="their names: class_labels_indices.csv, or one a line")
    parser.add_argument("--pooling", choices=POOLINGS, default=POOLINGS[0], help="what probes see of a clip")
    parser.add_argument("--block", type=int, default=0, help="that probes see, from 1 on; 0 = 7/12 of all")
    parser.add_argument("--teacher", action="store_true", help="probe the teacher of a pre-training run")
    parser.add_argument("--workers", type=int, default=4, help="loader processes")
    parser.add_argument("--timeout", type=float, default=30, help="minutes after which what hangs fails")
    args = parser.parse_args()
    if not args.test and (args.teacher or args.block or args.pooling != POOLINGS[0]):
        raise InputError("--teacher, --block and --pooling are for probes, which take two manifests")
    rank, _, device = init_distributed(args.timeout)
    loading = dict(workers=args.workers, timeout=0.9 * 60 * args.timeout)  # s; before other processes do
    if args.test:
        encoder = Encoder.from_pretrained(args.checkpoint, args.teacher).to(device)
        train = open_labelled(args.manifest, encoder.config.clip_frames)
        test = open_labelled(args.test, encoder.config.clip_frames, train.classes)
        function = pooled(encoder, args.pooling, args.block)
        result = dict(pooling=args.pooling) | probe(function, encoder.config, train, test, device, **loading)
    else:
        model = load_classifier(args.checkpoint, args.classes).to(device)
        test = open_labelled(args.manifest, model.config.clip_frames, model.classes)
        result, precision, found = score(model, test, device, **loading)
        short = (test.data.manifest.fields(line)[0] for line in test.data.too_short.tolist())
        problems = found.problems + [f"{name}\tshorter than a frame" for name in short]
        result |= dict(unreadable=len(problems))
    if rank == 0:
        print(json.dumps(result))
    if rank == 0 and not args.test:
        for problem in problems:
            print(f"cannot be used: {problem.expandtabs(1)}", file=sys.stderr)
        path = Path(args.checkpoint if os.path.isdir(args.checkpoint) else "", "per_class.csv")
        write_classes(path, model, test.targets[found.items].sum(0), precision)
        cut = f"; {test.data.n_cut} clips are longer than the network's: scored by their beginning"
        print(f"each class: {path}{cut if test.data.n_cut else ''}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
