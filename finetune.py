"""Fine-tune an encoder to classify audio (EAT paper, Sec. 3.4 and Table 4), or probe it frozen.

    python finetune.py --preset demo                                   laptop, after python pretrain.py --preset demo
    python finetune.py --preset as20k --init CKPT --data train.tsv --eval_data eval.tsv --classes labels.csv
    python finetune.py --preset esc50 --init CKPT --data "train{fold}.tsv" --eval_data "test{fold}.tsv" --fold all
    torchrun --nproc_per_node=4 finetune.py --preset as2m ...          any preset, on any number of processes

CKPT is anything model.read_pretrained knows, or `scratch`. The run folder `--out_dir` gets config.json, log.jsonl (also
the scores of each evaluation), bad_files.tsv, last.pt, previous.pt and best.pt, the best by `--metric`; the same
command started again goes on from there. Presets are the released scripts' settings; where the paper's differ, flags
give them (README.md). Citations such as utils/mixup.py:22 point into the released code (github.com/cwx-worst-one/EAT
at 06c1c34).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    Batch,
    ClipSampler,
    InputError,
    build_loader,
    first_line,
    read_classes,
    sampling_weights,
    seed_of,
    spectrogram,
    to_float,
    write_lines,
)
from evaluate import PROBE_LAYERS, Labelled, init_distributed, open_labelled, probe, score_manifest
from model import MAX_PATCH_ROWS, MODELS, AudioClassifier, AudioInput, CheckpointError, Encoder, read_pretrained
from pretrain import (
    AMP,
    DEMO,
    Feed,
    Health,
    Stop,
    check_batch,
    check_choices,
    check_numbers,
    cosine_lr,
    end_together,
    keep_freed_memory,
    log,
    make_scaler,
    parse_config,
    peak_memory_gib,
    pick_precision,
    prepare,
    read_bad_files,
    restore,
    run_script,
    save_checkpoint,
    summarize,
    trim_log,
)


@dataclass(frozen=True)
class FinetuneConfig:
    """The rows of the paper's Table 4 for fine-tuning; the defaults are the released AS-2M script's."""

    data: str = ""  # labelled manifest or packed folder to train on; {fold} in it stands for --fold
    eval_data: str = ""  # the same to evaluate on
    classes: str = ""  # class_labels_indices.csv, or a file with a label a line; without it, the labels of --data
    out_dir: str = "runs/finetune"  # run folder; a run found there is resumed
    init: str = ""  # checkpoint to start from, own or released, or scratch; {seed} in it stands for the seed
    model: str = "base"  # size of --init scratch: a row of model.MODELS, or that of a checkpoint
    fold: str = ""  # number of one fold of a cross-validation, or all
    clip_frames: int = AudioInput.clip_frames  # frames of 10 ms per clip; longer clips are cut, shorter ones padded
    norm_mean: float = AudioInput.norm_mean  # of the log-mel values (AudioSet); python data.py stats prints yours
    norm_std: float = AudioInput.norm_std  # likewise; values are divided by twice this
    min_samples: int = 10_000  # shorter clips are left out of the training (released code; samples at 16 kHz)

    loss: str = "bce_positives"  # bce_positives (BCE / positive labels of the batch), bce (BCE / clips) or ce (softmax)
    metric: str = "mAP"  # mAP or accuracy: chooses best.pt
    pooling: str = "cls"  # cls token or mean of the patches
    label_smoothing: float = 0.0  # of ce without mixup, in training only (released code)
    drop_path: float = 0.1  # rate of the last block, rising linearly from 0
    layer_decay: float = 0.65  # factor on the learning rate from block to block, downwards (not in the paper)

    mixup: float = 0.8  # alpha of the Beta distribution, 0 = no mixup
    mixup_prob: float = 0.9  # share of the updates that mix (released code)
    specaug_freq: float = 0.2  # largest masked part of the mel bins
    specaug_time: float = 0.2  # and of the frames
    roll: bool = True  # turn each waveform around by a random part, with a random gain
    noise: bool = False  # add uniform noise and move each spectrogram by up to 10 frames
    weighted: bool = True  # draw clips so that rare classes are heard
    epoch_clips: int = 200_000  # clips of an epoch if weighted

    batch_size: int = 96  # clips per update, over all processes
    accumulate: int = 1  # parts that a process divides its clips into, to save memory
    updates: int = 300_000  # about 15 passes over AS-2M
    lr: float = 5e-5  # peak learning rate of everything above the blocks
    min_lr: float = 1e-6  # learning rate at both ends; a block whose peak is lower keeps that throughout
    warmup: int = 30_000  # updates of linear warm-up, then cosine decay
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.05  # AdamW, on everything (released code)
    clip_norm: float = 0.0  # largest gradient norm, 0 = any

    probe: str = ""  # linear or knn: no training, a probe of the frozen encoder
    probe_layer: str = "last"  # last, mean of all blocks, mix (weights learned, linear only) or input (log-mel)
    compare: bool = False  # one table: fine-tuned from --init and from scratch, probes of both and of the input

    amp: str = "auto"  # bf16, fp16 or fp32; auto: bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile the network
    workers: int = 4  # loader processes per training process, one for each core at most
    log_every: int = 100  # updates between log lines
    save_every: int = 1000  # updates between checkpoints
    eval_every: int = 0  # updates between evaluations, 0 = an epoch
    seed: int = 1  # of everything random
    seeds: int = 1  # do everything with so many seeds, --seed and the following, and print mean and spread

    max_bad_fraction: float = 0.05  # stop if more of the clips read than this cannot be used
    max_skipped: int = 50  # stop after so many updates in a row whose gradient is not finite
    timeout: float = 10.0  # minutes after which a process that hangs ends the job

    @property
    def audio(self) -> AudioInput:
        return AudioInput(clip_frames=self.clip_frames, norm_mean=self.norm_mean, norm_std=self.norm_std)


PRESETS = {
    "as2m": {},
    "as20k": dict(weighted=False, batch_size=48, updates=40_000, warmup=4_000),
    "esc50": dict(
        weighted=False, batch_size=48, updates=4_000, warmup=400, clip_frames=512, norm_mean=-6.627, norm_std=5.359,
        loss="ce", metric="accuracy", label_smoothing=0.1, mixup=0.0, specaug_freq=0.4, specaug_time=0.4,
    ),
    "spcv2": dict(
        weighted=False, batch_size=256, updates=40_000, warmup=4_000, clip_frames=128, norm_mean=-6.846, norm_std=5.565,
        loss="bce", metric="accuracy", label_smoothing=0.1, noise=True, lr=2e-4, seed=42,
    ),
    "demo": dict(
        data=str(DEMO / "train.tsv"), eval_data=str(DEMO / "test.tsv"), out_dir="runs/demo_finetune", model="demo",
        init="runs/demo/last.pt", compare=True, clip_frames=64, min_samples=1600, weighted=False, loss="ce",
        metric="accuracy", label_smoothing=0.1, mixup=0.0, roll=False, specaug_freq=0.1, specaug_time=0.1,
        layer_decay=0.9, batch_size=32, updates=400, warmup=40, lr=1e-3,
        workers=1, log_every=50, save_every=100, eval_every=100,
    ),
}  # fmt: skip

MAY_CHANGE = set(
    "data eval_data out_dir init accumulate compile workers log_every save_every eval_every max_bad_fraction "
    "max_skipped timeout probe probe_layer compare fold seeds classes model".split()
)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


class Draws(NamedTuple):
    """Everything random about the augmentation of some clips, each (B,) float64."""

    roll: Tensor  # 0 to 1, part of the clip
    gain: Tensor
    noise: Tensor  # 0 to 1
    shift: Tensor  # -10 to 9 frames, whole numbers
    freq_width: Tensor  # 0 to 1, of the largest width; likewise the others
    freq_start: Tensor
    time_width: Tensor
    time_start: Tensor


def draw_augmentation(config: FinetuneConfig, step: int) -> tuple[Tensor, float]:
    """The draws of an update, (8, batch_size) in the order of Draws, and its mixup weight.

    Every process draws the same ones and takes its clips.
    """
    rng, n = np.random.default_rng(seed_of("augment", config.seed, step)), config.batch_size
    draws = [rng.random(n), rng.beta(10, 10, n) + 0.5, rng.random(n), rng.integers(-10, 10, n)]
    draws += [rng.random(n) for _ in range(4)]
    mixes = config.mixup > 0 and rng.random() < config.mixup_prob
    return torch.from_numpy(np.stack(draws)), rng.beta(config.mixup, config.mixup) if mixes else 1.0


def roll_and_gain(waveform: Tensor, n_samples: Tensor, roll: Tensor, gain: Tensor) -> Tensor:
    """Turn each clip around by the part `roll` of itself and scale it: (B, S) -> (B, S) float.

    The paper calls this roll augmentation; the gain is the released code's (data/raw_audio_dataset.py:87-92).
    """
    at = torch.arange(waveform.shape[1], device=waveform.device).expand_as(waveform)                # (B, S)
    length = n_samples[:, None]
    source = torch.where(at < length, (at - (roll[:, None] * length).long()) % length, at)
    return to_float(waveform).gather(1, source) * gain[:, None].float()


def add_noise(spec: Tensor, uniform: Tensor, noise: Tensor, shift: Tensor) -> Tensor:
    """Add uniform noise in [0, noise / 10) and turn each spectrogram by `shift` frames: (B, 1, F, M) -> (B, 1, F, M).

    As released (data/raw_audio_dataset.py:430-432), where it is called Gaussian; after normalisation.
    """
    spec = spec + uniform * (noise.float() / 10)[:, None, None, None]
    frames = torch.arange(spec.shape[2], device=spec.device)
    source = (frames - shift[:, None].long()) % spec.shape[2]                                       # (B, F)
    return spec.gather(2, source[:, None, :, None].expand_as(spec))


def mixup(x: Tensor, weight: float) -> Tensor:
    """Mix each row with its mirror image in the batch: (B, ...) -> (B, ...); for spectrograms and targets alike.

    One weight for the whole batch (utils/mixup.py, mode "batch").
    """
    return weight * x + (1 - weight) * x.flip(0)


def spec_augment(spec: Tensor, draws: Draws, freq: float, time: float) -> Tensor:
    """Blank one band and one stretch of time of each clip, up to the parts `freq` and `time`: (B, 1, F, M).

    Blank is 0, the mean of the data set. As torchaudio's masking with its own draw for each clip
    (models/EAT_audio_classification.py:374-375): real-valued width and start are drawn, then cut to whole numbers.
    """
    bands, stretches = (3, freq, draws.freq_width, draws.freq_start), (2, time, draws.time_width, draws.time_start)
    for axis, part, width, start in (bands, stretches):
        size = spec.shape[axis]
        width = width * part * size                                                                 # (B,)
        first = (start * (size - width)).long()[:, None]
        at = torch.arange(size, device=spec.device)
        blank = (at >= first) & (at < first + width.long()[:, None])                                # (B, size)
        spec = spec.masked_fill(blank[:, None, None, :] if axis == 3 else blank[:, None, :, None], 0.0)
    return spec


def move(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def micro_batches(
    feed: Iterator[Batch], sampler: ClipSampler, targets: Tensor, config: FinetuneConfig, step: int,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """This process's parts of an update, augmented and mixed: [(spec (B, 1, F, M), targets (B, C) fp32), ...]."""
    draws, weight = draw_augmentation(config, step)
    parts = []
    for micro in range(config.accumulate):
        batch, rows = next(feed), sampler.rows(micro)
        mine = Draws(*move(draws[:, rows], device))
        waveform, n_samples = (x.to(device, non_blocking=True) for x in batch[:2])
        if config.roll:
            waveform = roll_and_gain(waveform, n_samples, mine.roll, mine.gain)
        spec = spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)                  # (B, 1, F, M)
        if config.noise:
            uniform = torch.empty_like(spec)
            for row, clip in zip(uniform, rows):
                seed = seed_of("uniform", config.seed, step, clip)
                row.uniform_(generator=torch.Generator(device).manual_seed(seed))
            spec = add_noise(spec, uniform, mine.noise, mine.shift)
        y = move(targets[batch.items], device).float()                                              # (B, C)
        if weight < 1:
            spec, y = mixup(spec, weight), mixup(y, weight)
        parts.append((spec_augment(spec, mine, config.specaug_freq, config.specaug_time), y))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# One update


def summed_loss(logits: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    """Loss of logits (B, C) for targets (B, C), which may be mixed, summed over clips and classes: fp32 scalar.

    (models/EAT_audio_classification.py:410-457)
    """
    logits = logits.float()
    if config.loss != "ce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    smoothing = 0.0 if config.mixup else config.label_smoothing
    targets = (1 - smoothing) * targets + smoothing / targets.shape[1]
    return -(targets * logits.log_softmax(1)).sum()


def layer_decay_groups(model: AudioClassifier, config: FinetuneConfig) -> list[dict]:
    """Parameters grouped by peak learning rate: block i of L has lr * layer_decay^(L - i), all else lr.

    So the last block is below the head by one factor, and patch_embed, CLS token and norms are at the head's rate
    (models/EAT_audio_classification.py:290-344; not in the paper). A group's own floor is never above its peak.
    """
    groups: dict[float, dict] = {}
    for name, p in model.named_parameters():
        depth = len(model.encoder.blocks)
        block = int(name.split(".")[2]) if name.startswith("encoder.blocks.") else depth
        peak = config.lr * config.layer_decay ** (depth - block)
        group = groups.setdefault(peak, dict(params=[], peak_lr=peak, min_lr=min(config.min_lr, peak)))
        group["params"].append(p)
    return list(groups.values())


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    parts: list[tuple[Tensor, Tensor]], step: int, config: FinetuneConfig, amp_dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """One update; `model` is the classifier or the DistributedDataParallel around it. Returns loss and grad_norm.

    The loss is that of the whole batch, over its positive labels or its clips, however many processes share it.
    """
    classifier = model.module if isinstance(model, DistributedDataParallel) else model
    for group in optimizer.param_groups:
        group["lr"] = cosine_lr(step, group["peak_lr"], config.warmup, config.updates, group["min_lr"])

    world = dist.get_world_size() if dist.is_initialized() else 1
    total = torch.stack([y.sum() if config.loss == "bce_positives" else y.new_full((), len(y)) for _, y in parts]).sum()
    if world > 1:
        dist.all_reduce(total)
    loss = torch.zeros_like(total)
    for i, (spec, y) in enumerate(parts, start=1):
        sync = contextlib.nullcontext() if i == len(parts) or model is classifier else model.no_sync()
        with sync:
            with torch.autocast(spec.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                logits = model(spec)                                                                # (B, C)
            part = summed_loss(logits, y, config) / total
            scaler.scale(part * world).backward()  # DistributedDataParallel divides by the number of processes
        loss += part.detach()

    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(classifier.parameters(), config.clip_norm or math.inf)
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # where 1, fused AdamW leaves the weights as they are
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return dict(loss=loss, grad_norm=grad_norm)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Task(NamedTuple):
    """What the settings name, opened."""

    train: Labelled
    test: Labelled
    model: AudioClassifier


def check(config: FinetuneConfig, world: int) -> tuple[Task, dict[str, str]]:
    """Check the settings and open what they name: (task, digests of the data). Raises InputError."""
    check_numbers(
        config,
        positive="clip_frames norm_std layer_decay epoch_clips batch_size accumulate updates lr log_every save_every "
        "max_skipped timeout",
        fractions="label_smoothing drop_path layer_decay mixup_prob specaug_freq specaug_time beta1 beta2 "
        "max_bad_fraction",
    )
    check_choices(
        config, loss=("bce_positives", "bce", "ce"), metric=("mAP", "accuracy"), pooling=("cls", "mean"), amp=AMP,
        probe=("", "linear", "knn"), probe_layer=PROBE_LAYERS,
    )  # fmt: skip
    check_batch(config, world)
    if config.drop_path == 1:
        raise InputError("--drop_path must be below 1")
    if config.mixup and config.batch_size // (world * config.accumulate) % 2:
        raise InputError(f"mixup pairs clips: --batch_size {config.batch_size} must give each part an even number")
    if config.probe == "knn" and config.probe_layer == "mix":
        raise InputError("--probe_layer mix needs --probe linear: nearest neighbours learn no weights")
    if not config.eval_data:
        raise InputError("--eval_data is missing: a labelled manifest or packed folder")
    if not config.init:
        raise InputError("--init is missing: a checkpoint, or scratch")
    classes = read_classes(config.classes) if config.classes else None
    train = open_labelled(config.data, config.audio, classes, config.min_samples)
    if len(train.classes) < 2:
        raise InputError(f"{config.data} has one class only: {next(iter(train.classes))}")
    test = open_labelled(config.eval_data, config.audio, train.classes)
    for some in (train, test):
        if (config.loss == "ce" or config.metric == "accuracy") and (some.targets.sum(1) != 1).any():
            raise InputError(f"{some.dataset.source}: a clip has several labels, use --preset as20k, or its losses")
    model = build_classifier(config, train.classes)
    return Task(train, test, model), dict(
        data_digest=train.dataset.digest(), eval_digest=test.dataset.digest(), init_digest=digest_of(model),
        classes_digest=hashlib.sha256("\n".join(train.classes).encode(errors="surrogateescape")).hexdigest(),
    )  # fmt: skip


def build_classifier(config: FinetuneConfig, classes: dict[str, str]) -> AudioClassifier:
    """The encoder of --init, or a new one, with a new head for these classes. Raises InputError."""
    torch.manual_seed(config.seed)
    if config.init == PRESETS["demo"]["init"] and not Path(config.init).exists():
        raise InputError(f"there is no {config.init} yet: run python pretrain.py --preset demo first")
    if config.init != "scratch":
        encoder = Encoder.from_pretrained(config.init)
    elif config.model in MODELS or Path(config.model).exists():
        encoder = Encoder(MODELS[config.model] if config.model in MODELS else read_pretrained(config.model).network)
    else:
        raise InputError(f"--model {config.model}: choose from {', '.join(MODELS)}, or a checkpoint")
    rows, last = encoder.config.grid(config.clip_frames)[0], MAX_PATCH_ROWS * encoder.config.patch_size
    if not 1 <= rows <= MAX_PATCH_ROWS:
        raise InputError(f"--clip_frames {config.clip_frames}: {encoder.config.patch_size} to {last}")
    network = dataclasses.replace(encoder.config, drop_path=config.drop_path)
    model = AudioClassifier(network, classes, config.pooling, config.loss == "ce", config.audio)
    model.encoder.load_state_dict(encoder.state_dict())
    return model


def digest_of(model: nn.Module) -> str:
    """Hash of a network's weights."""
    total = hashlib.sha256()
    for p in model.parameters():
        total.update(p.detach().numpy().tobytes())
    return total.hexdigest()


def train(config: FinetuneConfig, rank: int, world: int, device: torch.device, stop: Stop) -> tuple[int, float]:
    """Run the fine-tuning that `config` describes, or go on with it: (exit status, score of the last evaluation)."""
    task, checkpoint, _lock = prepare(config, rank, world, check, MAY_CHANGE)
    data, targets, classes = task.train
    out_dir, is_main = Path(config.out_dir), rank == 0
    if device.type == "cpu":
        keep_freed_memory()

    # Network, optimizer
    classifier = task.model.to(device).train()
    optimizer = torch.optim.AdamW(
        layer_decay_groups(classifier, config), lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    amp_dtype = pick_precision(config.amp, device)
    scaler = make_scaler(amp_dtype, device, growth_interval=16_384)
    parts_of_run = dict(classifier=classifier, optimizer=optimizer, scaler=scaler)

    # Resume
    step, last, best = 0, dict(step=0, score=math.nan), dict(step=0, score=-1.0)
    if checkpoint is not None:
        state = restore(out_dir / checkpoint, parts_of_run)
        step, last, best = state["step"], state["last"], state["best"]
        del state
    if is_main:
        trim_log(out_dir, step)
        n_parameters = sum(p.numel() for p in classifier.parameters())
        begin = f"resuming at update {step}" if step else "starting"
        print(f"{begin} in {out_dir}: {config.init}, {n_parameters:,} parameters", end=", ")
        print(f"{len(classes)} classes, {len(data):,} clips", end=", ")
        print(f"{len(task.test.dataset):,} to evaluate, {world} x {device.type}", end=", ")
        print(str(amp_dtype).removeprefix("torch."))
        if config.weighted and config.epoch_clips >= len(data):
            print("WARNING: --weighted has no effect: --epoch_clips draws every clip; choose less than there are")

    # Data: the stream of clips from this update on
    weights = sampling_weights(targets) if config.weighted else None
    sampler = ClipSampler(
        len(data), config.batch_size, config.seed, step, rank, world, config.accumulate,
        weights, config.epoch_clips, mirrored=config.mixup > 0,
    )  # fmt: skip
    feed = Feed(build_loader(data, sampler, config.workers, pin_memory=device.type == "cuda"), data, out_dir)
    if is_main:
        feed.report((name, f"shorter than {config.min_samples} samples") for name in data.short_names())
    if config.compile:
        classifier.compile()
    model = classifier if world == 1 else DistributedDataParallel(
        classifier, gradient_as_bucket_view=True, broadcast_buffers=False
    )

    def save(name: str, **more) -> bool:
        """Only last.pt keeps the one before it; best.pt has no optimizer. False if the disk did not take it."""
        plain = dict(step=step, config=asdict(config), network=asdict(classifier.encoder.config), last=last, best=best)
        plain |= dict(classes=classifier.classes, norm_eps=classifier.fc_norm.eps)
        try:
            save_checkpoint(out_dir / name, keep=name == "last.pt", **plain, classifier=classifier.state_dict(), **more)
        except (OSError, RuntimeError) as error:
            message = f"could not save update {step} in {out_dir} ({first_line(error)}), the last checkpoint stands"
            if step == config.updates or code:
                raise InputError(message) from None
            tqdm.write(f"WARNING: {message}; the run goes on")
            return False
        return True

    def save_last() -> None:
        save("last.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    def is_due() -> bool:
        """Whether the network is to be evaluated as it is, and has not been."""
        is_epoch = step * config.batch_size % sampler.epoch_items < config.batch_size
        is_time = step % config.eval_every == 0 if config.eval_every else is_epoch
        return step > last["step"] and (is_time or step == config.updates)

    def evaluate() -> None:
        nonlocal last, best
        scores, _, found = score_manifest(classifier, task.test.dataset, task.test.targets, device, config.workers)
        last = dict(step=step, score=scores[config.metric])
        if is_main:
            feed.report(found.problems)
            log(out_dir, dict(step=step, **scores))
            before, best = best, max(best, last, key=lambda some: some["score"])
            if best is last and not save("best.pt"):
                best = before

    code, history, health, clock, feed.waited = 0, [], Health(stop, config), time.perf_counter(), 0.0
    if is_due():  # stopped before its evaluation
        evaluate()
        if is_main:
            save_last()
    bar = dict(initial=step, total=config.updates, disable=None if is_main else True)  # None: only on a terminal
    for done in (progress := tqdm(range(step, config.updates), **bar)):
        torch.manual_seed(seed_of("drop_path", config.seed, done, rank))
        parts = micro_batches(feed, sampler, targets, config, done, device)
        out = train_step(model, optimizer, scaler, parts, done, config, amp_dtype)
        history.append(torch.stack([world * out["loss"], out["grad_norm"]]))  # a process knows its share of the loss
        step = done + 1  # completed updates
        is_last = step == config.updates

        if step == 1 or step % config.log_every == 0 or is_last:
            means, skipped, bad_fraction = summarize(history, ("loss", "grad_norm"), feed, world)
            health.check(skipped, bad_fraction)
            seconds = time.perf_counter() - clock
            record = dict(
                step=step, epoch=step * config.batch_size / sampler.epoch_items, **means,
                lr=max(group["lr"] for group in optimizer.param_groups), skipped=sum(skipped),
                bad_files=len(read_bad_files(feed.path)), clips_per_s=len(history) * config.batch_size / seconds,
                step_ms=1000 * seconds / len(history), data_wait=feed.waited / seconds,
                peak_memory_gib=peak_memory_gib(device),
            )  # fmt: skip
            if is_main:
                log(out_dir, record)
                progress.set_postfix({k: record[k] for k in ("loss", "lr", "clips_per_s")})
            history, clock, feed.waited = [], time.perf_counter(), 0.0

        code = stop.agreed()
        if is_main and (step % config.save_every == 0 or is_last or code > 128):
            save_last()
        if code:
            break
        if is_due():
            begin = time.perf_counter()
            evaluate()
            clock += time.perf_counter() - begin  # the log's speed is that of the training
            if is_main and is_last:
                save_last()  # knows its score

    progress.close()
    if is_main and code:
        print(f"finetune.py: {stop.reason or 'stopped by a signal to another process'}", file=sys.stderr)
    elif is_main:
        score, top = f"{config.metric} {last['score']:.4f}", f"{best['score']:.4f} (update {best['step']})"
        print(f"done: {score} after the last update, at best {top}")
    return code, last["score"]


# ---------------------------------------------------------------------------------------------------------------------
# Several runs: folds, and what pre-training is worth


def variants(config: FinetuneConfig) -> dict[str, FinetuneConfig]:
    """The rows of the table: the run itself, or with --compare everything to set beside it. Raises InputError."""
    if not config.compare:
        return {f"{config.probe} probe" if config.probe else "fine-tuned": config}
    if config.probe or config.init == "scratch":
        raise InputError("--compare needs a checkpoint as --init, and no --probe: it makes both itself")
    make, scratch = dataclasses.replace, dict(init="scratch", model=config.init)
    rows = {
        "fine-tuned, pre-trained": make(config, out_dir=str(Path(config.out_dir, "pretrained"))),
        "fine-tuned, from scratch": make(config, out_dir=str(Path(config.out_dir, "scratch")), **scratch),
    }
    for kind, layer in (("linear", "last"), ("linear", "mix"), ("knn", "last")):
        name = f"{kind} probe" + (", all blocks" if layer == "mix" else "")
        rows[f"{name}, pre-trained"] = make(config, probe=kind, probe_layer=layer)
        rows[f"{name}, random encoder"] = make(config, probe=kind, probe_layer=layer, **scratch)
    for kind in ("linear", "knn"):
        rows[f"{kind} probe, log-mel"] = make(config, probe=kind, probe_layer="input", **scratch)
    return rows


def repeats(config: FinetuneConfig) -> list[FinetuneConfig]:
    """One configuration for each of --seeds seeds. Raises InputError if there are none."""
    if config.seeds < 1:
        raise InputError(f"--seeds must be above 0, not {config.seeds}")
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        names = dict(init=config.init.replace("{seed}", str(seed)), model=config.model.replace("{seed}", str(seed)))
        out_dir = str(Path(config.out_dir, f"seed{seed}")) if config.seeds > 1 else config.out_dir
        rows.append(dataclasses.replace(config, seed=seed, out_dir=out_dir, **names))
    return rows


def folds(config: FinetuneConfig) -> list[FinetuneConfig]:
    """One configuration for each fold that --fold asks for. Raises InputError if there are none."""
    if not config.fold:
        if "{fold}" in config.data + config.eval_data:
            raise InputError("--fold is missing: a number, or all")
        return [config]
    if "{fold}" not in config.data or "{fold}" not in config.eval_data:
        raise InputError('--fold needs {fold} in --data and --eval_data, such as "esc50/train{fold}.tsv"')
    numbers = [config.fold]
    if config.fold == "all":
        numbers = [str(i) for i in range(1, 100) if Path(config.data.replace("{fold}", str(i))).exists()]
    if not numbers:
        raise InputError(f"there is no {config.data.replace('{fold}', '1')}")
    return [
        dataclasses.replace(
            config, data=config.data.replace("{fold}", i), eval_data=config.eval_data.replace("{fold}", i),
            out_dir=str(Path(config.out_dir, f"fold{i}")), fold=i,
        ) for i in numbers
    ]  # fmt: skip


def run_probe(config: FinetuneConfig, device: torch.device, world: int) -> float:
    """Score of a probe of the frozen encoder; accuracy or mAP."""
    (train, test, model), _ = check(config, world)
    kind = dict(layer=config.probe_layer, kinds=(config.probe,), metric=config.metric)
    return probe(model.encoder.to(device), config.audio, train, test, device, config.workers, **kind).popitem()[1]


def run_all(config: FinetuneConfig) -> int:
    """All the runs that the command line asks for, one after the other, and their table; returns the exit status."""
    torch.backends.cudnn.allow_tf32 = False
    rank, world, device = init_distributed(config.timeout)
    plan, error = [], ""
    try:
        plan = [(name, row) for name, one in variants(config).items() for some in repeats(one) for row in folds(some)]
        for _, row in plan if len(plan) > 1 else []:  # a missing fold is told before the first has run for hours
            check(row, world)
    except (InputError, CheckpointError, OSError) as problem:
        error = str(problem)
    end_together(error, rank, world)
    stop, table = Stop(world, config.timeout), {}
    for name, row in plan:
        if row.probe:
            code, score = 0, run_probe(row, device, world)
        else:
            code, score = train(row, rank, world, device, stop)
        if code := code or stop.agreed():
            break
        table.setdefault(name, []).append(score)
    if rank == 0 and not code and (len(plan) > 1 or config.probe):
        if config.seeds > 1:  # the spread is that over seeds; of several folds, each has its mean
            table = {name: np.reshape(scores, (config.seeds, -1)).mean(1).tolist() for name, scores in table.items()}
        print_table(table, config, keep=len(plan) > 1)
    if world > 1:
        dist.destroy_process_group()
    return code


def print_table(table: dict[str, list[float]], config: FinetuneConfig, keep: bool) -> None:
    """Print each row's score; of several folds or seeds mean, deviation and each. `keep` them in table.json."""
    width = max(map(len, table))
    print(f"\n{'':{width}s}  {config.metric}")
    for name, scores in table.items():
        each = " ".join(f"{score:.4f}" for score in scores)
        spread = f" ± {np.std(scores, ddof=1):.4f}  ({each})" if len(scores) > 1 else ""
        print(f"{name:{width}s}  {np.mean(scores):.4f}{spread}")
    if keep:
        path = Path(config.out_dir, "table.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()).get(config.metric, {}) if path.exists() else {}
        write_lines(path, [json.dumps({config.metric: before | table}, indent=1)])


def main() -> None:
    run_script(run_all, parse_config(FinetuneConfig, PRESETS))


if __name__ == "__main__":
    main()
