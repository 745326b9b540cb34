"""Fine-tune an encoder to classify audio (EAT paper, Sec. 3.4 and Table 4).

    python finetune.py --preset demo                              laptop, after pretrain.py --preset demo
    python finetune.py --preset own --init CKPT --data train.tsv --eval_data test.tsv    classes of your own
    python finetune.py --preset as20k --init CKPT --data train.tsv --eval_data eval.tsv --classes labels.csv
    torchrun --nproc_per_node=4 finetune.py --preset as2m ...     any preset, on any number of processes

CKPT is what model.read_pretrained knows, or `scratch`. The run folder `--out_dir` gets what that of
pretrain.py does, the scores of each evaluation in log.jsonl, and best.pt, the best by `--metric`; the same
command started again goes on. Presets are the released scripts' settings; where the paper's differ, flags
give them (README.md). Citations such as utils/mixup.py:22 point into the released code
(github.com/cwx-worst-one/EAT at 06c1c34).
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    Batch, ClipSampler, InputError, Labelled, open_labelled, seed_of, spectrogram, to_float,
)  # fmt: skip
from evaluate import (
    Above0, AtLeast0, Below1, Count, Frames, Number, UpTo1, Whole, accumulating, check_settings,
    distribute, parse_config, read_classes, run_script, score,
)  # fmt: skip
from model import MODELS, AudioClassifier, CheckpointError, Encoder, load_checkpoint, read_pretrained
from pretrain import DEMO, Run, cosine_lr, descend


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning, paper Table 4. --preset own takes clip length, lr and so on from --init and --data."""

    # Data and network
    data: str = ""  # labelled manifest to train on
    eval_data: str = ""  # labelled manifest to evaluate on
    classes: str = ""  # class_labels_indices.csv, or a label a line; without it, the labels of --data
    out_dir: str = "runs/finetune"  # run folder; a run found there is resumed
    init: str = ""  # checkpoint to start from, own or released, or scratch
    model: Literal[*MODELS] = "base"  # size of --init scratch: a row of model.MODELS
    clip_frames: Frames = 1024  # frames of 10 ms of a clip, a multiple of 16; others are cut or padded
    norm_mean: Number = -4.268  # mean of log-mel values, AudioSet's; extras/prepare.py stats prints yours
    norm_std: Above0 = 4.569  # their standard deviation; values are divided by twice this
    min_samples: Whole = 10_000  # shorter clips are not trained on (released code; samples at 16 kHz)
    # Loss and network
    loss: Literal["bce_positives", "bce", "ce"] = "bce_positives"  # BCE per positive, BCE per clip, softmax
    metric: Literal["mAP", "accuracy"] = "mAP"  # chooses best.pt
    pooling: Literal["cls", "mean", "bands"] = "cls"  # cls token, mean of the patches, or of each band's
    label_smoothing: Below1 = 0.0  # smoothing of ce without mixup, in training only (released code)
    drop_path: Below1 = 0.1  # rate at which the last block is left out, rising linearly from 0
    layer_decay: UpTo1 = 0.65  # factor on the learning rate from block to block, downwards (not in the paper)
    # Augmentation
    mixup: AtLeast0 = 0.8  # alpha of the Beta distribution, 0 = no mixup
    mixup_prob: UpTo1 = 0.9  # share of the updates that mix (released code)
    specaug_freq: UpTo1 = 0.2  # largest masked part of the mel bins
    specaug_time: UpTo1 = 0.2  # largest masked part of the frames
    roll: bool = True  # rotate each waveform by a random part of it, with a random gain
    noise: bool = False  # add uniform noise and rotate each spectrogram by up to 10 frames
    weighted: bool = True  # draw clips so that rare classes are heard
    epoch_clips: Count = 200_000  # clips of an epoch if weighted
    # Optimisation
    batch_size: Count = 96  # clips per update, over all processes
    accumulate: Count = 1  # parts that a process divides its clips into, to save memory
    updates: Count = 300_000  # length of the run; 300,000 are about 15 passes over AS-2M
    lr: Above0 = 5e-5  # peak learning rate of everything above the blocks
    min_lr: AtLeast0 = 1e-6  # learning rate at both ends; a block whose peak is lower keeps that throughout
    warmup: Whole = 30_000  # updates of linear warm-up, in proportion to --updates unless given; then cosine
    beta1: Below1 = 0.9  # AdamW's decay of the mean gradient
    beta2: Below1 = 0.95  # AdamW's decay of the mean squared gradient
    weight_decay: AtLeast0 = 0.05  # AdamW's, on everything (released code)
    clip_norm: AtLeast0 = 0.0  # largest gradient norm, 0 = any
    # The run
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile the network
    workers: Whole = 4  # loader processes of a training process, one for each core at most
    log_every: Count = 100  # updates between log lines
    save_every: Count = 10_000  # updates between checkpoints
    save_minutes: Above0 = 10.0  # minutes between checkpoints at most
    eval_every: Whole = 0  # updates between evaluations, 0 = an epoch, or a twentieth of the run if longer
    seed: Whole = 1  # seed of everything random
    # When to stop
    max_bad_fraction: UpTo1 = 0.05  # stop if more of the clips read than this cannot be used
    max_skipped: Count = 50  # stop after so many updates in a row whose gradient is not finite
    timeout: Above0 = 10.0  # minutes after which a process that hangs ends the job

    def __post_init__(self):
        check_settings(self)


PRESETS = {
    "as2m": {},
    "as20k": dict(weighted=False, batch_size=48, updates=40_000, warmup=4_000),
    "esc50": dict(
        weighted=False, batch_size=48, updates=4_000, warmup=400, clip_frames=512, norm_mean=-6.627,
        norm_std=5.359, loss="ce", metric="accuracy", label_smoothing=0.1, mixup=0.0, specaug_freq=0.4,
        specaug_time=0.4,
    ),
    "spcv2": dict(
        weighted=False, batch_size=256, updates=40_000, warmup=4_000, clip_frames=128, norm_mean=-6.846,
        norm_std=5.565, loss="bce", metric="accuracy", label_smoothing=0.1, noise=True, lr=2e-4, seed=42,
    ),
    "own": dict(
        weighted=False, loss="ce", metric="accuracy", label_smoothing=0.1, mixup=0.0, roll=False,
        specaug_freq=0.1, specaug_time=0.1, layer_decay=0.9, batch_size=32, updates=400, warmup=40,
        log_every=20,
    ),
    "demo": dict(
        data=str(DEMO / "train.tsv"), eval_data=str(DEMO / "test.tsv"), out_dir="runs/demo_finetune",
        model="demo", init="runs/demo", clip_frames=128, min_samples=1600, weighted=False, loss="ce",
        metric="accuracy", pooling="mean", label_smoothing=0.1, mixup=0.0, roll=False, specaug_freq=0.1,
        specaug_time=0.1, layer_decay=0.9, batch_size=16, updates=600, warmup=60, lr=1e-3, workers=1,
        log_every=50, save_every=150, eval_every=150,
    ),
}  # fmt: skip

# What may change when a run goes on; of data, weights and classes the digests may not
MAY_CHANGE = """data eval_data out_dir init model classes accumulate compile workers log_every save_every
    save_minutes eval_every max_bad_fraction max_skipped timeout""".split()


# ----- Augmentation ----------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """Everything random about the augmentation of some clips, each (B,) float64."""

    roll: Tensor  # 0 to 1, part of the clip
    gain: Tensor  # 0.5 to 1.5
    noise: Tensor  # 0 to 1
    shift: Tensor  # -10 to 9 frames, whole numbers
    freq_width: Tensor  # 0 to 1, of the largest width
    freq_start: Tensor  # 0 to 1, of the room that is left
    time_width: Tensor
    time_start: Tensor


def draw_augmentation(config: FinetuneConfig, step: int) -> tuple[Tensor, float]:
    """The draws of an update, (8, batch_size) in the order of Draws, and its mixup weight.
    Every process draws the same ones and takes its clips."""
    rng, n = np.random.default_rng(seed_of("augment", config.seed, step)), config.batch_size
    draws = [rng.random(n), rng.beta(10, 10, n) + 0.5, rng.random(n), rng.integers(-10, 10, n)]
    draws += [rng.random(n) for _ in range(4)]
    mixes = config.mixup > 0 and rng.random() < config.mixup_prob
    return torch.from_numpy(np.stack(draws)), rng.beta(config.mixup, config.mixup) if mixes else 1.0


def roll_and_gain(waveform: Tensor, n_samples: Tensor, roll: Tensor, gain: Tensor) -> Tensor:
    """Rotate each clip by the part `roll` of its length and scale it: (B, S) -> (B, S) float.
    The paper calls this roll augmentation; the gain is the released code's (data/raw_audio_dataset.py:87-92).
    """
    at = torch.arange(waveform.shape[1], device=waveform.device).expand_as(waveform)  # (B, S)
    length = n_samples[:, None]
    source = torch.where(at < length, (at - (roll[:, None] * length).long()) % length, at)
    return to_float(waveform).gather(1, source) * gain[:, None].float()


def add_noise(spec: Tensor, uniform: Tensor, noise: Tensor, shift: Tensor) -> Tensor:
    """Add uniform noise in [0, noise / 10) and rotate each spectrogram by `shift` frames: (B, 1, F, M).
    As released (data/raw_audio_dataset.py:430-432), where it is called Gaussian; after normalisation."""
    spec = spec + uniform * (noise.float() / 10)[:, None, None, None]
    frames = torch.arange(spec.shape[2], device=spec.device)
    source = (frames - shift[:, None].long()) % spec.shape[2]  # (B, F)
    return spec.gather(2, source[:, None, :, None].expand_as(spec))


def mixup(x: Tensor, weight: float) -> Tensor:
    """Mix each row with its neighbour, 0 with 1, 2 with 3, ...: (B, ...) -> (B, ...).
    Spectrograms and targets alike, one weight for the whole batch (utils/mixup.py, mode "batch"). Neighbours
    are always in one process."""
    return weight * x + (1 - weight) * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def spec_augment(spec: Tensor, draws: Draws, freq: float, time: float) -> Tensor:
    """Blank one band and one stretch of time of each clip, up to the parts `freq` and `time`: (B, 1, F, M).
    Blank is 0, the mean of the data set. As torchaudio's masking with its own draw for each clip
    (models/EAT_audio_classification.py:374-375): real-valued width and start are drawn, then cut to whole
    numbers."""
    bands, stretches = (freq, draws.freq_width, draws.freq_start), (time, draws.time_width, draws.time_start)
    for axis, (part, width, start) in ((3, bands), (2, stretches)):
        size = spec.shape[axis]
        width = width * part * size                                   # (B,)
        first = (start * (size - width)).long()[:, None]
        at = torch.arange(size, device=spec.device)
        blank = (at >= first) & (at < first + width.long()[:, None])  # (B, size)
        spec = spec.masked_fill(blank[:, None, None, :] if axis == 3 else blank[:, None, :, None], 0.0)
    return spec


def move(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def draw_parts(
    batches: Iterator[Batch], sampler: ClipSampler, targets: Tensor, config: FinetuneConfig, step: int,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """This process's parts of an update, augmented and mixed: [(spec (B, 1, F, M), targets (B, C) fp32)]."""
    draws, weight = draw_augmentation(config, step)
    parts = []
    for part in range(config.accumulate):
        batch, clips = next(batches), sampler.rows(part)
        drawn = Draws(*move(draws[:, clips.start : clips.stop], device))
        waveform, n_samples = (x.to(device, non_blocking=True) for x in batch[:2])
        if config.roll:
            waveform = roll_and_gain(waveform, n_samples, drawn.roll, drawn.gain)
        spec = spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)  # (B, 1, F, M)
        if config.noise:
            uniform, generator = torch.empty_like(spec), torch.Generator(device)
            for row, clip in zip(uniform, clips):
                generator.manual_seed(seed_of("uniform", config.seed, step, clip))
                row.uniform_(generator=generator)
            spec = add_noise(spec, uniform, drawn.noise, drawn.shift)
        y = move(targets[batch.items], device).float()                              # (B, C)
        if weight < 1:
            spec, y = mixup(spec, weight), mixup(y, weight)
        parts.append((spec_augment(spec, drawn, config.specaug_freq, config.specaug_time), y))
    return parts


# ----- One update ------------------------------------------------------------------------------------------


def summed_loss(logits: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    """Loss of logits (B, C) for targets (B, C), which may be mixed, summed over clips and classes: fp32.
    (models/EAT_audio_classification.py:410-457)"""
    logits = logits.float()
    if config.loss != "ce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    smoothing = 0.0 if config.mixup else config.label_smoothing
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")


def layer_decay_groups(model: AudioClassifier, config: FinetuneConfig) -> list[dict]:
    """Parameters grouped by peak learning rate: block i of L has lr * layer_decay^(L - i), all else lr.
    So the last block is below the head by one factor, and patch_embed, CLS token and norms are at the head's
    rate (models/EAT_audio_classification.py:290-344; not in the paper). A group's own floor is never above
    its peak."""
    groups, depth = {}, len(model.encoder.blocks)
    for name, p in model.named_parameters():
        block = int(name.split(".")[2]) if name.startswith("encoder.blocks.") else depth
        peak = config.lr * config.layer_decay ** (depth - block)
        group = groups.setdefault(peak, dict(params=[], peak_lr=peak, min_lr=min(config.min_lr, peak)))
        group["params"].append(p)
    return list(groups.values())


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    parts: list[tuple[Tensor, Tensor]], step: int, config: FinetuneConfig, amp: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """One update; `model` is the classifier or the DistributedDataParallel around it.
    Returns loss and grad_norm. The loss is that of the whole batch, over its positive labels or its clips,
    however many processes share it."""
    for group in optimizer.param_groups:
        group["lr"] = cosine_lr(step, group["peak_lr"], config.warmup, config.updates, group["min_lr"])
    world = dist.get_world_size() if dist.is_initialized() else 1
    total = sum(y.sum() if config.loss == "bce_positives" else y.new_full((), len(y)) for _, y in parts)
    if world > 1:
        dist.all_reduce(total)
    loss = torch.zeros_like(total)
    for i, (spec, y) in enumerate(parts, start=1):
        with accumulating(model, i < len(parts)):
            with torch.autocast(spec.device.type, amp, enabled=amp != torch.float32):
                logits = model(spec)  # (B, C)
            part = world * summed_loss(logits, y, config) / total  # DistributedDataParallel divides by world
            scaler.scale(part).backward()
        loss += part.detach()
    return dict(loss=loss, grad_norm=descend(optimizer, scaler, model, config.clip_norm or math.inf))


def sampling_weights(targets: Tensor) -> Tensor:
    """How often each clip is drawn so that rare classes are heard: (n, C) -> (n,) float64.
    The sum over a clip's labels of 1000 / (clips with that label + 0.01): the recipe of AST (Gong et al.
    2021, github.com/YuanGongND/ast, egs/audioset/gen_weight_file.py), on which the released EAT weights are
    understood to rest; its own file is not published."""
    clip, label = targets.nonzero().unbind(1)
    rarity = 1000 / (torch.bincount(label, minlength=targets.shape[1]) + 0.01).double()
    return torch.zeros(len(targets), dtype=torch.float64).index_add_(0, clip, rarity[label])


# ----- Fine-tuning -----------------------------------------------------------------------------------------


def open_inputs(config: FinetuneConfig, world: int = 1) -> tuple[Labelled, Labelled, AudioClassifier]:
    """Check the settings against one another, and open what they name: training and test set, network."""
    if config.mixup and config.batch_size // (world * config.accumulate) % 2:
        raise InputError(f"mixup pairs clips: --batch_size {config.batch_size} must give even parts")
    for name, what in (("eval_data", "a labelled manifest"), ("init", "a checkpoint, or scratch")):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing: {what}")
    classes = read_classes(config.classes) if config.classes else None
    train = open_labelled(config.data, config.clip_frames, classes, config.min_samples, allow_silence=False)
    short = [",".join(train.data.manifest.fields(i)[2:3]) for i in train.data.too_short.tolist()]
    if lost := {label.strip() for text in short for label in text.split(",")} - train.classes.keys() - {""}:
        raise InputError(f"all clips of {min(lost)} are shorter than --min_samples {config.min_samples}")
    test = open_labelled(config.eval_data, config.clip_frames, train.classes)
    if len(train.classes) < 2:
        raise InputError(f"{config.data} has one class only: {next(iter(train.classes))}")
    for data, targets, _ in (train, test):
        if (config.loss == "ce" or config.metric == "accuracy") and (targets.sum(1) != 1).any():
            raise InputError(f"{data.source}: a clip has several labels: --loss bce --metric mAP")
    torch.manual_seed(config.seed)
    if config.init == PRESETS["demo"]["init"] and not os.path.exists(config.init):
        raise InputError(f"there is no {config.init} yet: run python pretrain.py --preset demo first")
    is_new = config.init == "scratch"
    encoder = Encoder(MODELS[config.model]) if is_new else Encoder.from_pretrained(config.init)
    try:
        changes = {k: getattr(config, k) for k in ("clip_frames", "norm_mean", "norm_std", "drop_path")}
        network = dataclasses.replace(encoder.config, **changes)
    except ValueError as error:
        raise InputError(f"--clip_frames: {error}") from None
    model = AudioClassifier(network, train.classes, config.pooling, config.loss == "ce")
    model.encoder.load_state_dict(encoder.state_dict())
    return train, test, model


def fit_presets(argv: list[str]) -> dict[str, dict]:
    """PRESETS; `own` fitted to the checkpoint and the labels that a command line names: clip length and
    normalisation as in pre-training, the shortest clip, too, if the checkpoint tells it, lr by width, BCE if
    clips have several labels."""
    config = parse_config(FinetuneConfig, PRESETS, argv)
    if not {"own", "--preset=own"} & set(argv) or config.init in ("", "scratch") or not config.data:
        return PRESETS
    state = read_pretrained(config.init)
    fitted = {name: state["network"][name] for name in ("clip_frames", "norm_mean", "norm_std")}
    fitted |= dict(lr=round(0.2 / state["network"]["width"], 6))  # 1e-3 for the demo's network
    fitted |= dict(min_samples=state.get("settings", {}).get("min_samples", config.min_samples))
    if (open_labelled(config.data, fitted["clip_frames"]).targets.sum(1) > 1).any():
        fitted |= dict(loss="bce", metric="mAP")
    return PRESETS | dict(own=PRESETS["own"] | fitted)


def train(config: FinetuneConfig) -> int:
    """Run the fine-tuning that `config` describes, or go on with it; returns the exit status."""
    run = Run(config, growth_interval=16_384)
    (data, targets, classes), test, classifier = open_inputs(config, run.world)
    init = hashlib.sha256(repr(classifier.config).encode())
    for p in () if config.init == "scratch" else classifier.encoder.parameters():  # drawn ones vary by CPU
        init.update(p.detach().numpy().tobytes())
    names = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
    digests = dict(init_digest=init.hexdigest(), classes_digest=names.hexdigest())
    digests |= dict(data_digest=data.digest(), eval_digest=test.data.digest())
    classifier.to(run.device).train()
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    groups = layer_decay_groups(classifier, config)
    optimizer = torch.optim.AdamW(groups, 0.0, betas, weight_decay=decay, fused=True)

    # Resume: weights and optimizer from the newest checkpoint, clips from its update on
    saved = dict(classifier=classifier, optimizer=optimizer, scaler=run.scaler)
    start = run.resume(saved, MAY_CHANGE, **digests)["step"]
    process = (run.rank, run.world, config.accumulate)
    weights = sampling_weights(targets) if config.weighted else None
    sampler = ClipSampler(
        len(data), config.batch_size, config.seed, start, *process, weights, config.epoch_clips
    )  # fmt: skip
    counts = f"{len(data):,} clips ({len(data.too_short)} more too short), {len(test.data):,} to evaluate on"
    run.say(f"{config.init}: {len(classes)} classes, {counts}")
    if n_cut := data.n_cut + test.data.n_cut:
        run.say(f"WARNING: of {n_cut} longer clips only the first {config.clip_frames} frames are used")
    if config.weighted and config.epoch_clips >= len(data):
        run.say("WARNING: --weighted has no effect: --epoch_clips draws every clip; choose fewer")
    if config.compile:
        classifier.compile()
    model, batches = distribute(classifier), run.batches(data, sampler)

    def evaluate(step: int) -> None:
        scores, _, found = score(classifier.eval(), test, run.device, **run.loading)
        classifier.train()
        run.log(step=step, **scores)
        run.write("bad_files.tsv", found.problems if run.rank == 0 else [])
        if found.problems:
            run.say(f"WARNING: {len(found.problems)} clips to evaluate on cannot be used: see bad_files.tsv")
        best, new = run.plain["best"], dict(step=step, score=scores[config.metric], clips=scores["clips"])
        if (new["clips"], new["score"]) > (best["clips"], best["score"]):  # of fewer, it says less
            run.plain["best"] = new
            if not run.save("best.pt", step, classifier=classifier):
                run.plain["best"] = best  # which the file still holds

    # Clips between evaluations: an epoch or, if that is more, a twentieth of the run
    stretch = config.batch_size * config.eval_every
    stretch = stretch or max(sampler.epoch_items, config.batch_size * config.updates // 20)
    head, best = classifier.head_settings, dict(step=0, score=-1.0, clips=0)
    if start and (path := run.out_dir / "best.pt").exists():  # it may be newer than the checkpoint
        with contextlib.suppress(CheckpointError):
            best |= load_checkpoint(path)["best"]
    for step in run.steps(start, network=asdict(classifier.config), head=head, best=best):
        if step and step * config.batch_size % stretch < config.batch_size:
            evaluate(step)
        parts = draw_parts(batches, sampler, targets, config, step, run.device)
        torch.manual_seed(seed_of("drop_path", config.seed, step, run.rank))  # now: loaders draw, too
        out = train_step(model, optimizer, run.scaler, parts, step, config, run.amp)
        run.history.append(out)
        step += 1  # from here on: completed updates
        if step == 1 or step % config.log_every == 0 or step == config.updates:
            lr = max(group["lr"] for group in optimizer.param_groups)
            run.log_training(step, epoch=step * config.batch_size / sampler.epoch_items, lr=lr)
    if not run.status:
        evaluate(config.updates)
        best = run.plain["best"]
        run.say(f"done: best {config.metric} {best['score']:.4f}, after update {best['step']}: {run.out_dir}")
    return run.status


if __name__ == "__main__":
    run_script(lambda: train(parse_config(FinetuneConfig, fit_presets(sys.argv[1:]))))
