"""Fine-tune an encoder to classify audio (EAT paper, Sec. 3.4 and Table 4).

    python finetune.py --preset demo                              laptop, after pretrain.py --preset demo
    python finetune.py --preset own --init CKPT --data train.tsv --eval_data test.tsv    classes of your own
    python finetune.py --preset own --frozen --init CKPT --data ...                      the same in seconds
    python finetune.py --preset as20k --init CKPT --data train.tsv --eval_data eval.tsv --classes labels.csv
    torchrun --nproc_per_node=4 finetune.py --preset as2m ...     any preset, on any number of processes

CKPT is what model.read_pretrained reads, or `scratch`. The run folder `--out_dir` gets the same files as that
of pretrain.py, the scores of each evaluation in log.jsonl, and best.pt, the best by `--metric`. The same
command started again goes on. `--frozen` only fits a linear classifier to the frozen encoder. Presets have
the released scripts' settings. Citations such as utils/mixup.py:22 point into the released code
(github.com/cwx-worst-one/EAT at 06c1c34).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from data import (
    FRAME_LENGTH, FRAME_SHIFT, Batch, ClipSampler, InputError, Labelled,
    Manifest, move, open_labelled, seed_of, spectrogram,
)  # fmt: skip
from evaluate import (
    distribute, fit_linear, has_one_class, parse_config, predict, probe_block, run_script,
    summarize_scores,
)  # fmt: skip
from extras.tables import classes_cut_short, read_classes
from model import MODELS, POOLINGS, AudioClassifier, Encoder, ModelConfig
from pretrain import DEMO, Run, RunConfig, cosine_lr, descend


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning, paper Table 4, as in the released scripts; --preset own fits --init and --data."""

    # Data and network
    data: str = ""  # labelled manifest to train on
    eval_data: str = ""  # labelled manifest to evaluate on
    classes: str = ""  # class_labels_indices.csv, or a label a line; default: the labels of --data
    out_dir: str = "runs/finetune"  # run folder; a run found there is resumed
    init: str = ""  # checkpoint to start from, own or released, or scratch
    model: Literal[*MODELS] = "base"  # size of --init scratch: a row of model.MODELS
    clip_frames: int = 1024  # frames of 10 ms; other clips are cut or padded. 0 = as --init, or fits --data
    norm_mean: float = -4.268  # mean of log-mel values, AudioSet's (prepare.py stats: yours). 0 = as --init
    norm_std: float = 4.569  # their standard deviation; values are divided by twice this. 0 = as --init
    min_samples: int = 10_000  # shorter clips are not trained on (released code; samples at 16 kHz)
    # Loss and network
    loss: Literal["bce_positives", "bce", "ce", "auto"] = "bce_positives"  # bce / positives, / clips; softmax
    metric: Literal["mAP", "accuracy", "auto"] = "mAP"  # chooses best.pt. auto: both from the labels
    pooling: Literal[*POOLINGS] = "cls"  # cls token, mean of the patches, or mean and deviation of each band
    frozen: bool = False  # fit only a linear classifier; softmax if each clip has one class, whatever --loss
    block: int = 0  # encoder block that --frozen classifies; 0 = at 7/12 of the depth
    label_smoothing: float = 0.0  # smoothing of ce without mixup, in training only (released code)
    drop_path: float = 0.1  # rate at which the last block is left out, rising linearly from 0
    layer_decay: float = 0.65  # factor on the learning rate from block to block, downwards (not in the paper)
    # Augmentation
    mixup: float = 0.8  # alpha of the Beta distribution, 0 = no mixup
    mixup_prob: float = 0.9  # share of the updates that mix (released code)
    specaug_freq: float = 0.2  # largest masked part of the mel bins
    specaug_time: float = 0.2  # largest masked part of the frames
    roll: bool = True  # rotate each waveform by a random part of it, with a random gain
    noise: bool = False  # add uniform noise and rotate each spectrogram by up to 10 frames
    weighted: bool = True  # draw clips of rare classes more often
    epoch_clips: int = 200_000  # clips per epoch if weighted
    # Optimisation
    batch_size: int = 96  # clips per update, over all processes
    updates: int = 300_000  # length of the run; 300,000 are about 15 passes over AS-2M
    lr: float = 5e-5  # peak learning rate of everything above the blocks, 0 = 0.2 / width
    min_lr: float = 1e-6  # learning rate at both ends; constant for blocks whose peak is lower
    warmup: int = 30_000  # updates of linear warm-up, in proportion to --updates unless given; then cosine
    clip_norm: float = 0.0  # largest gradient norm, 0 = no clipping
    # Evaluation
    eval_every: int = 0  # updates between evaluations, 0 = an epoch, or a twentieth of the run if longer


SMALL = dict(  # for small data sets: less augmentation
    weighted=False, label_smoothing=0.1, mixup=0.0, roll=False, specaug_freq=0.1, specaug_time=0.1,
    layer_decay=0.9,
)  # fmt: skip
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
    "own": SMALL | dict(
        model="small", clip_frames=0, norm_mean=0.0, norm_std=0.0, min_samples=0, lr=0.0, loss="auto",
        metric="auto", pooling="bands", batch_size=32, updates=400, warmup=40, log_every=20,
    ),
    "demo": SMALL | dict(
        data=str(DEMO / "train.tsv"), eval_data=str(DEMO / "test.tsv"), out_dir="runs/demo_finetune",
        model="demo", init="runs/demo", clip_frames=128, min_samples=1600, loss="ce", metric="accuracy",
        pooling="bands", batch_size=16, updates=600, warmup=60, lr=1e-3, workers=1, log_every=50,
        save_every=150, eval_every=150,
    ),
}  # fmt: skip

# What may change when a run goes on. All else makes it another experiment, as do other clips or classes
MAY_CHANGE = """data eval_data out_dir classes accumulate compile workers log_every save_every save_minutes
    eval_every max_bad_fraction max_skipped timeout""".split()


# ----- Augmentation ----------------------------------------------------------------------------------------
# Each clip is augmented with its own random numbers, whichever process it is on.


def roll_and_gain(waveform: Tensor, rng: np.random.Generator) -> Tensor:
    """Rotate a clip by a random part of its length and scale it: (S,) -> (S,).
    The paper calls this roll augmentation; the gain is the released code's (data/raw_audio_dataset.py:87-92).
    """
    shift = int(rng.random() * len(waveform))
    gain = rng.beta(10, 10) + 0.5
    return waveform.roll(shift) * gain


def add_noise(spec: Tensor, rng: np.random.Generator) -> Tensor:
    """Add uniform noise in [0, 0.1) and rotate the spectrogram by up to 10 frames: (1, F, M) -> (1, F, M).
    As released (data/raw_audio_dataset.py:430-432), where it is called Gaussian; after normalisation."""
    noise = rng.random(spec.shape, dtype=np.float32) * (rng.random() / 10)
    shift = int(rng.integers(-10, 10))
    return (spec + move(torch.from_numpy(noise), spec.device)).roll(shift, dims=1)


def blank_stretch(spec: Tensor, axis: int, largest: float, rng: np.random.Generator) -> None:
    """SpecAugment: set a stretch of one axis, up to the part `largest` of it, to 0, the mean of the data set.
    As torchaudio's masking (models/EAT_audio_classification.py:374-375): real-valued width and start are
    drawn, then cut to whole numbers."""
    size = spec.shape[axis]
    width = rng.random() * largest * size
    start = rng.random() * (size - width)
    spec.narrow(axis, int(start), int(width)).zero_()


def mixup(x: Tensor, weight: float) -> Tensor:
    """Mix each row with its neighbour, 0 with 1, 2 with 3, ...: (B, ...) -> (B, ...).
    Spectrograms and targets alike, one weight for the whole batch (utils/mixup.py, mode "batch"). Neighbours
    are always in one process."""
    neighbours = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # (B, ...)
    return weight * x + (1 - weight) * neighbours


def draw_mixup_weight(config: FinetuneConfig, step: int) -> float:
    """The mixing weight of an update, the same in all processes; 1 = no mixing."""
    rng = np.random.default_rng(seed_of("mixup", config.seed, step))
    if config.mixup and rng.random() < config.mixup_prob:
        return rng.beta(config.mixup, config.mixup)
    return 1.0


def draw_parts(
    batches: Iterator[Batch], sampler: ClipSampler, targets: Tensor, config: FinetuneConfig, step: int,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """This process's parts of an update, augmented and mixed: [(spec (B, 1, F, M), targets (B, K) fp32)]."""
    weight = draw_mixup_weight(config, step)
    parts = []
    for part in range(config.accumulate):
        batch = next(batches)
        rngs = []
        for row in sampler.rows(part):
            rngs.append(np.random.default_rng(seed_of("augment", config.seed, step, row)))
        waveform = move(batch.waveform, device)                                     # (B, S)
        n_samples = move(batch.n_samples, device)                                   # (B,)
        if config.roll:
            for clip, n, rng in zip(waveform, batch.n_samples.tolist(), rngs):
                clip[:n] = roll_and_gain(clip[:n], rng)
        spec = spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)  # (B, 1, F, M)
        if config.noise:
            for clip, rng in zip(spec, rngs):
                clip[:] = add_noise(clip, rng)
        y = move(targets[batch.items], device).float()                              # (B, K)
        if weight < 1:
            spec = mixup(spec, weight)
            y = mixup(y, weight)
        for clip, rng in zip(spec, rngs):
            blank_stretch(clip, 2, config.specaug_freq, rng)
            blank_stretch(clip, 1, config.specaug_time, rng)
        parts.append((spec, y))
    return parts


# ----- One update ------------------------------------------------------------------------------------------


def summed_loss(logits: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    """Loss of logits (B, K) for targets (B, K), which may be mixed, summed over clips and K classes: fp32.
    (models/EAT_audio_classification.py:410-457)"""
    logits = logits.float()
    if config.loss != "ce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    smoothing = 0.0 if config.mixup else config.label_smoothing
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")


def layer_decay_groups(model: AudioClassifier, config: FinetuneConfig) -> list[dict]:
    """Parameters grouped by peak learning rate: block i of L has lr * layer_decay^(L - i), all else lr.
    So the last block is one factor below the head, while patch_embed, CLS token and norms have the head's
    rate (models/EAT_audio_classification.py:290-344; not in the paper). A group's min_lr is never above
    its peak."""
    groups = {}
    depth = len(model.encoder.blocks)
    for name, p in model.named_parameters():
        block = int(name.split(".")[2]) if name.startswith("encoder.blocks.") else depth
        peak = config.lr * config.layer_decay ** (depth - block)
        if peak not in groups:
            groups[peak] = dict(params=[], peak_lr=peak, min_lr=min(config.min_lr, peak))
        groups[peak]["params"].append(p)
    return list(groups.values())


def train_step(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler,
    parts: list[tuple[Tensor, Tensor]], step: int, config: FinetuneConfig, amp: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """One update; `model` is the classifier or the DistributedDataParallel around it.
    Returns loss and grad_norm. The loss is summed over the whole batch and divided by the number of its
    positive labels or clips, however many processes share it."""
    for group in optimizer.param_groups:
        group["lr"] = cosine_lr(step, group["peak_lr"], config.warmup, config.updates, group["min_lr"])
    targets = torch.cat([y for _, y in parts])                  # (clips of this process, K)
    total = targets.sum()
    if config.loss != "bce_positives":
        total = torch.full_like(total, len(targets))
    world = 1
    if dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(total)
    loss = torch.zeros_like(total)
    for i, (spec, y) in enumerate(parts, start=1):
        if dist.is_initialized():  # average gradients over processes in the last part only
            model.require_backward_grad_sync = i == len(parts)
        with torch.autocast(spec.device.type, amp, enabled=amp != torch.float32):
            logits = model(spec)                                # (B, K)
        part_loss = world * summed_loss(logits, y, config) / total  # averaging gradients divides by world
        scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    grad_norm = descend(optimizer, scaler, model, config.clip_norm)
    return dict(loss=loss, grad_norm=grad_norm)


def sampling_weights(targets: Tensor) -> Tensor:
    """How often each clip is drawn so that rare classes are heard: (n, K) -> (n,) float64.
    The sum over a clip's labels of 1000 / (clips with that label + 0.01): the recipe of AST (Gong et al.
    2021, github.com/YuanGongND/ast, egs/audioset/gen_weight_file.py), on which the released EAT weights are
    believed to be based; their own file is not published."""
    clip, label = targets.nonzero().unbind(1)                                # (labels,) of all clips
    rarity = 1000 / (targets.sum(0).double() + 0.01)                         # (K,)
    weights = torch.zeros(len(targets), dtype=torch.float64)
    return weights.index_add_(0, clip, rarity[label])


# ----- Fine-tuning -----------------------------------------------------------------------------------------


def fit_to_network(config: FinetuneConfig, network: ModelConfig) -> FinetuneConfig:
    """Replace settings of 0 by the values they stand for."""
    if not config.clip_frames:
        frames = network.clip_frames
        if config.init == "scratch":
            longest = 1 + (int(Manifest(config.data).n_samples.max()) - FRAME_LENGTH) / FRAME_SHIFT
            frames = min(frames, math.ceil(longest / network.patch_size) * network.patch_size)
        config = replace(config, clip_frames=frames)
    if not config.norm_mean:
        config = replace(config, norm_mean=network.norm_mean)
    if not config.norm_std:
        config = replace(config, norm_std=network.norm_std)
    if not config.lr:
        config = replace(config, lr=round(0.2 / network.width, 6))
    return config


def fit_to_labels(config: FinetuneConfig, targets: Tensor) -> FinetuneConfig:
    """Replace the settings "auto": softmax and accuracy if every clip has one class. Raises InputError."""
    is_single = has_one_class(targets)
    if config.loss == "auto":
        config = replace(config, loss="ce" if is_single else "bce")
    if config.metric == "auto":
        config = replace(config, metric="accuracy" if is_single else "mAP")
    if not is_single and (config.loss == "ce" or config.metric == "accuracy"):
        raise InputError("a clip of --data or --eval_data has several labels: --loss bce --metric mAP")
    return config


def open_inputs(config: FinetuneConfig) -> tuple[FinetuneConfig, Labelled, Labelled, AudioClassifier]:
    """Open what the settings name: (the settings, fitted to it; training and test set; network)."""
    if not config.eval_data:
        raise InputError("--eval_data is missing: a labelled manifest")
    if not config.init:
        raise InputError("--init is missing: a checkpoint, or scratch")
    torch.manual_seed(config.seed)
    if config.init == "scratch":
        encoder = Encoder(MODELS[config.model])
    else:
        encoder = Encoder.from_pretrained(config.init)
    config = fit_to_network(config, encoder.config)
    classes = read_classes(config.classes) if config.classes else None
    train = open_labelled(config.data, config.clip_frames, classes, config.min_samples, allow_silence=False)
    if len(train.classes) < 2:
        only = f"{config.data}, with --min_samples {config.min_samples}, has one class only"
        raise InputError(f"{only}: {next(iter(train.classes))}")
    test = open_labelled(config.eval_data, config.clip_frames, train.classes)
    config = fit_to_labels(config, torch.cat([train.targets, test.targets]))
    try:
        network = replace(
            encoder.config, clip_frames=config.clip_frames, norm_mean=config.norm_mean,
            norm_std=config.norm_std, drop_path=config.drop_path,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"--clip_frames: {error}") from None
    head = dict(pooling=config.pooling, exclusive=config.loss == "ce")
    if config.frozen:  # fit_linear uses softmax if each clip has one class, and so must the head
        block = probe_block(network, config.block)
        head |= dict(exclusive=has_one_class(train.targets), block=block, norm_eps=None)
    elif config.block:
        raise InputError("--block is for --frozen")
    model = AudioClassifier(network, train.classes, **head)
    model.encoder.load_state_dict(encoder.state_dict())
    return config, train, test, model


def train(config: FinetuneConfig) -> int:
    """Run the fine-tuning that `config` describes, or go on with it; returns the exit status."""
    run = Run(config)
    device = run.device
    config, train_set, test_set, classifier = open_inputs(config)
    run.config = config
    if config.mixup and config.batch_size // (run.world * config.accumulate) % 2:
        raise InputError(f"mixup pairs clips: --batch_size {config.batch_size} must give even parts")
    data, targets, classes = train_set
    classifier.to(device).train()
    optimizer = run.optimizer(layer_decay_groups(classifier, config))

    # Go on from the newest checkpoint in the run folder, if there is one
    labels = "\n".join(classes).encode(errors="surrogateescape")
    run.stateful = dict(classifier=classifier, optimizer=optimizer, scaler=run.scaler)
    run.about = dict(network=asdict(classifier.config), head=classifier.head_settings)
    digests = dict(data_digest=data.manifest.digest, eval_digest=test_set.data.manifest.digest)
    digests["classes_digest"] = hashlib.sha256(labels).hexdigest()
    run.about["best"] = run.resume(MAY_CHANGE, **digests).get("best", [0, 0.0, 0])  # clips, score, update
    run.say(f"{len(classes)} classes, {len(data):,} clips, {len(test_set.data):,} to evaluate on")
    n_cut = data.n_cut + test_set.data.n_cut
    if n_cut:
        run.warn(f"of {n_cut} longer clips only the first {config.clip_frames / 100:g} s are used")
    short = classes_cut_short(data)
    if short:
        run.warn(f"--min_samples {config.min_samples} leaves out clips of {', '.join(short)}")

    def evaluate(step: int) -> float:
        classifier.eval()
        found = predict(classifier, test_set.data, classifier.config, device, **run.loading)
        classifier.train()
        probabilities = classifier.probabilities(found.values.double())
        scores, _ = summarize_scores(probabilities, test_set.targets[found.items])
        run.log(step=step, **scores, unreadable=len(found.problems))
        run.add("bad_files.tsv", found.problems)
        new = [scores["clips"], scores[config.metric], step]  # a score on fewer clips never wins
        if new[:2] > run.about["best"][:2] and run.save("best.pt", step, dict(classifier=classifier)):
            run.about["best"] = new
        return scores[config.metric]

    if config.frozen:
        fit_head(classifier, train_set, run)
        run.save("last.pt", config.updates, run.stateful)
        run.say(f"done: {config.metric} {evaluate(config.updates):.4f}: {run.out_dir}")
        return 0

    # This process's share of every update
    weights = sampling_weights(targets) if config.weighted else None
    sampler = run.sampler(data, weights, config.epoch_clips)
    batches = run.load(data, sampler)
    # Evaluate every epoch or, if that is longer, every twentieth of the run
    epoch_updates = sampler.epoch_items // config.batch_size
    eval_every = config.eval_every or max(epoch_updates, config.updates // 20, 1)

    # Speed: compile in place, so that names of parameters stay; average gradients over processes
    if config.compile:
        classifier.compile()
    model = distribute(classifier)

    for step in run.steps():
        if step and step % eval_every == 0:
            evaluate(step)

        parts = draw_parts(batches, sampler, targets, config, step, device)
        torch.manual_seed(seed_of("drop_path", config.seed, step, run.rank))  # other processes draw others
        out = train_step(model, optimizer, run.scaler, parts, step, config, run.amp)
        run.history.append(torch.stack([out["loss"], out["grad_norm"]]))

        step += 1  # from here on: completed updates
        if step in (1, 3) or step % config.log_every == 0 or step == config.updates:
            lr = max(group["lr"] for group in optimizer.param_groups)
            epoch = step * config.batch_size / sampler.epoch_items
            run.log_training(step, ("loss", "grad_norm"), lr=lr, epoch=epoch)

        # Save before an evaluation: a signal has to wait for its end
        run.save_or_stop(step, must_save=step % eval_every == 0)

    if not run.stopped:
        last = evaluate(config.updates)
        _, best, step = run.about["best"]
        run.say(
            f"done: {config.metric} {last:.4f} at the end, last.pt: the score to report\n"
            f"best: {best:.4f} after update {step}, best.pt: selected on --eval_data, so optimistic"
        )
    return run.stopped


def fit_head(classifier: AudioClassifier, train_set: Labelled, run: Run) -> None:
    """Logistic regression of the classes on the frozen encoder's features, as in evaluate.probe."""
    classifier.eval()
    head = classifier.head
    classifier.head = nn.Identity()
    found = predict(classifier, train_set.data, classifier.config, run.device, **run.loading)
    run.add("bad_files.tsv", found.problems)
    targets = train_set.targets[found.items].to(run.device)
    weight, bias = fit_linear(found.values.to(run.device), targets)
    head.load_state_dict(dict(weight=weight, bias=bias))
    classifier.head = head


if __name__ == "__main__":
    run_script(lambda: train(parse_config(FinetuneConfig, PRESETS)))
