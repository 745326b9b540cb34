"""Pre-train EAT (paper, Sec. 3): a teacher sees a clip; a student sees 16 masked copies of it and predicts the teacher.

    python pretrain.py --preset demo                                    laptop, embedded audio, about 3 minutes
    python pretrain.py --data train.tsv --accumulate 4                  one GPU, the paper's 48 clips in 4 parts
    torchrun --nproc_per_node=4 pretrain.py --data train.tsv            the paper's setup

`--data` is a manifest or a packed folder (see data.py). The run folder `--out_dir` gets config.json, log.jsonl (a line
every `--log_every` updates), bad_files.tsv, last.pt and the one before it, previous.pt; the same command started again
goes on from there.
`step` counts completed updates everywhere. Everything random in update `step` is drawn from (seed, step, clip), so that
the run is the same for any number of processes, micro-batches and workers.
Citations such as EAT_pretraining.py:364 point into the released code (github.com/cwx-worst-one/EAT at 06c1c34).
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import fcntl
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    AudioDataset,
    Batch,
    ClipSampler,
    InputError,
    build_loader,
    first_line,
    seed_of,
    spectrogram,
    write_lines,
)
from evaluate import Labelled, init_distributed, open_labelled, probe
from masking import count_visible, flexible_block_mask, inverse_block_mask, random_mask, visible_ids
from model import (
    EAT,
    MAX_PATCH_ROWS,
    MODELS,
    AudioInput,
    CheckpointError,
    Encoder,
    ModelConfig,
    load_checkpoint,
    make_targets,
)

DEMO = Path(__file__).resolve().parent / "assets" / "demo"


@dataclass(frozen=True)
class PretrainConfig:
    """The rows of the paper's Table 4, with the released code's values where the paper has none or others."""

    data: str = ""  # manifest (.tsv) or packed folder to train on
    out_dir: str = "runs/pretrain"  # run folder; a run found there is resumed
    model: str = "base"  # base (ViT-B), large (ViT-L), small, demo or tiny: rows of model.MODELS
    init: str = ""  # start from the student and teacher of this pre-training checkpoint, own or released
    clip_frames: int = AudioInput.clip_frames  # frames of 10 ms per clip; shorter clips are padded
    norm_mean: float = AudioInput.norm_mean  # of the log-mel values (AudioSet); python data.py stats prints yours
    norm_std: float = AudioInput.norm_std  # likewise; values are divided by twice this
    min_samples: int = 10_000  # shorter clips are left out (released code; samples at 16 kHz)

    mask: str = "block"  # block, flexible (block shape drawn per clip) or random
    mask_ratio: float = 0.8  # fraction of patches hidden from the student
    mask_block_time: int = 5  # size of a visible block in patches of 160 ms
    mask_block_freq: int = 5  # and in patches of 16 mel bins
    mask_adjust: float = 0.07  # extra area drawn to make up for overlapping blocks (released code)
    clones: int = 16  # masked copies of each clip
    mask_noise: float = 0.01  # std of the noise that fills masked places for the decoder (released code)

    utterance_weight: float = 192.0  # of the CLS loss; 192 is the released lambda = 1, 1.92 its 0.01 (see README)
    target_layers: int = 0  # average the teacher's last blocks, 0 = all
    ema_decay: float = 0.9998  # of the teacher at the start (released code), rising linearly
    ema_decay_end: float = 0.99999  # to this
    ema_anneal: int = 100_000  # after this many updates

    batch_size: int = 48  # clips per update, over all processes
    accumulate: int = 1  # parts that a process divides its clips into, to save memory
    updates: int = 400_000  # 10 epochs of AudioSet
    lr: float = 5e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at both ends (the paper's table says 1e-6)
    warmup: int = 53_333  # updates of linear warm-up, then cosine decay
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.05  # AdamW
    decay_all: bool = True  # decay biases and norms too, as the released code does; off: spare what is 1-D
    clip_norm: float = 4.0  # largest gradient norm (released code)

    amp: str = "auto"  # bf16, fp16 or fp32; auto: bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile the networks
    workers: int = 4  # loader processes per training process, one for each core at most
    log_every: int = 100  # updates between log lines
    save_every: int = 1000  # updates between checkpoints
    seed: int = 1  # of everything random

    max_bad_fraction: float = 0.05  # stop if more of the clips read than this cannot be used
    max_skipped: int = 50  # stop after so many updates in a row whose gradient is not finite
    stop_on_collapse: bool = False  # stop, rather than warn, when targets or predictions are nearly constant
    timeout: float = 10.0  # minutes after which a process that hangs ends the job

    probe_manifest: str = ""  # labelled manifest: what the frozen encoder knows of it, before and after training
    probe_test: str = ""  # labelled manifest to score the probes on; without it, every fourth clip of the other
    probe_every: int = 0  # also probe every so many updates, 0 = not

    @property
    def audio(self) -> AudioInput:
        return AudioInput(clip_frames=self.clip_frames, norm_mean=self.norm_mean, norm_std=self.norm_std)

    @property
    def network(self) -> ModelConfig:
        return MODELS[self.model]

    @property
    def grid(self) -> tuple[int, int]:
        return self.network.grid(self.clip_frames)

    @property
    def n_visible(self) -> int:
        return count_visible(self.grid[0] * self.grid[1], self.mask_ratio)


PRESETS = {
    "base": {},
    "large": dict(
        model="large", mask_ratio=0.75, mask_adjust=0.1, lr=4e-4, ema_anneal=150_000,
    ),
    "demo": dict(
        data=str(DEMO / "pretrain.tsv"), out_dir="runs/demo", model="demo", clip_frames=64, min_samples=1600,
        mask_block_time=2, mask_block_freq=2, clones=8, utterance_weight=1.0,
        ema_decay=0.99, ema_decay_end=0.999, ema_anneal=600, batch_size=32, updates=600, lr=2e-3, warmup=100,
        workers=1, log_every=50, save_every=100,
        probe_manifest=str(DEMO / "train.tsv"), probe_test=str(DEMO / "test.tsv"), probe_every=200,
    ),
}  # fmt: skip

# What may change when a run is continued; everything else would make it another experiment.
MAY_CHANGE = set(  # data: the path may, the clips may not
    "data out_dir accumulate compile workers log_every save_every probe_manifest probe_test probe_every "
    "max_bad_fraction max_skipped stop_on_collapse timeout".split()
)


# ---------------------------------------------------------------------------------------------------------------------
# Run plumbing


def parse_config(cls, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> config: one flag per field, its comment as help; a preset changes defaults, a flag beats it."""
    comments = dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--flag value ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists the flags)\n")
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)), help="row of defaults")
    for field in dataclasses.fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        help = comments[field.name].replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=help, **kind)
    parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    values = vars(parser.parse_args(argv))
    del values["preset"]
    return cls(**values)


def cosine_lr(step: int, peak: float, warmup: int, updates: int, min_lr: float) -> float:
    """Learning rate of the update that follows `step` completed ones: linear from min_lr to peak, then cosine back.

    As the released recipe (fairseq's cosine_lr_scheduler.py:71-146): the first update has min_lr, for pre-training 0.
    """
    if step < warmup:
        return min_lr + (peak - min_lr) * step / warmup
    return min_lr + (peak - min_lr) / 2 * (1 + math.cos(math.pi * (step - warmup) / (updates - warmup)))


def save_checkpoint(path: Path, keep: bool = True, **state) -> None:
    """Write tensors and plain values to `path`, whole or not at all; the file it replaces becomes previous.pt (`keep`).

    Raises OSError or RuntimeError if the disk does not take it; what was there is then still there.
    """
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def log(out_dir: Path, record: dict) -> None:
    """Add a JSON line to the run's log.jsonl and print it in short; a full disk costs the line, not the run."""
    try:
        with open(out_dir / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        tqdm.write(f"WARNING: could not write to {out_dir / 'log.jsonl'}: {error}")
    tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Teacher


def ema_decay(step: int, config: PretrainConfig) -> float:
    """Decay of the teacher after `step` updates: linear, then constant (paper Sec. 3.2; EAT_pretraining.py:364-378)."""
    fraction = min(step / config.ema_anneal, 1.0)
    return config.ema_decay_end - (config.ema_decay_end - config.ema_decay) * (1 - fraction)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in fp32. Paper Sec. 3.2."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# One update


def draw_masks(config: PretrainConfig, step: int, device: torch.device) -> Tensor:
    """The masks of an update, (batch_size * C, N) bool: every process draws the same ones and takes its rows."""
    generator = torch.Generator(device).manual_seed(seed_of("masks", config.seed, step))
    common = dict(grid=config.grid, mask_ratio=config.mask_ratio, generator=generator, device=device)
    n, block = config.batch_size * config.clones, (config.mask_block_time, config.mask_block_freq)
    if config.mask == "random":
        return random_mask(n, **common)
    if config.mask == "flexible":
        return flexible_block_mask(config.batch_size, config.clones, adjust=config.mask_adjust, **common)
    return inverse_block_mask(n, block=block, adjust=config.mask_adjust, **common)


def draw_noise(config: PretrainConfig, step: int, clips: list[int], device: torch.device) -> Tensor:
    """What the decoder sees at masked places, for some clips of an update: (len(clips) * C, N, D)."""
    (H, W), generator = config.grid, torch.Generator(device)
    noise = torch.empty(len(clips), config.clones, H * W, config.network.width, device=device)
    for row, clip in zip(noise, clips):
        row.normal_(std=config.mask_noise, generator=generator.manual_seed(seed_of("noise", config.seed, step, clip)))
    return noise.flatten(0, 1)


def micro_batches(
    batches: Iterator[Batch], sampler: ClipSampler, config: PretrainConfig, step: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's parts of an update: (spec (B, 1, F, M), mask (B*C, N), noise (B*C, N, D))."""
    masks = draw_masks(config, step, device).view(config.batch_size, config.clones, -1)     # (batch_size, C, N)
    for micro in range(config.accumulate):
        waveform, n_samples = (x.to(device, non_blocking=True) for x in next(batches)[:2])
        spec = spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)          # (B, 1, F, M)
        rows = sampler.rows(micro)
        noise = draw_noise(config, step, rows, device)                                      # (B*C, N, D)
        yield spec, masks[rows].flatten(0, 1), noise


def train_step(
    model: nn.Module, teacher: Encoder, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], step: int, config: PretrainConfig, amp_dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of student and teacher; `model` is the student EAT or the DistributedDataParallel around it.

    Returns loss, loss_frame, loss_utterance (means over the parts), grad_norm (before clipping), and of the last part
    pred, targets and mask. Nothing here waits for the GPU.
    """
    student = model.module if isinstance(model, DistributedDataParallel) else model
    for group in optimizer.param_groups:
        group["lr"] = cosine_lr(step, config.lr, config.warmup, config.updates, config.min_lr)

    losses = torch.zeros(3, device=next(student.parameters()).device)
    for i, (spec, mask, noise) in enumerate(parts, start=1):
        is_last = i == config.accumulate
        sync = contextlib.nullcontext() if is_last or model is student else model.no_sync()  # average gradients once
        with sync:
            with torch.autocast(spec.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                with torch.no_grad():
                    targets = make_targets(teacher.ffn_outputs(spec)[-config.target_layers :])  # (B, N, D)
                ids_keep = visible_ids(mask, config.n_visible)                                  # (B*C, V)
                out = model(spec, mask, ids_keep, targets, noise, config.utterance_weight)
            scaler.scale(out["loss"] / config.accumulate).backward()
        losses += torch.stack([out["loss"].detach(), out["loss_frame"], out["loss_utterance"]]) / config.accumulate

    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # where 1, fused AdamW leaves the weights as they are
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    ema_update(teacher, student.encoder, ema_decay(step + 1, config))
    loss, loss_frame, loss_utterance = losses
    return dict(
        loss=loss, loss_frame=loss_frame, loss_utterance=loss_utterance, grad_norm=grad_norm,
        pred=out["pred"], targets=targets, mask=mask,
    )  # fmt: skip


MIN_TARGET_STD, MIN_PRED_STD = 0.1, 0.01  # below: collapse (the released code's class defaults)


@torch.no_grad()
def masked_std(x: Tensor, weight: Tensor) -> float:
    """Spread of features over the masked patches of all processes, the sign of a collapse when it nears 0.

    x (R, D), weight (R,) how often each row counts: mean over channels of the square root of the unbiased variance
    + 1e-6 (EAT_pretraining.py:830-845, where it is called target_var and pred_var).
    """
    x, weight = x.double(), weight.double()
    sums = torch.cat([weight.sum()[None], weight @ x, weight @ x.square()])                 # (1 + 2D,)
    if dist.is_initialized():
        dist.all_reduce(sums)
    count, total, square = sums[0], *sums[1:].chunk(2)
    return ((square - total**2 / count) / (count - 1) + 1e-6).sqrt().mean().item()


def param_groups(model: nn.Module, config: PretrainConfig) -> list[dict]:
    """Parameters with and without weight decay.

    The released code means to spare 1-D ones, but its override is never applied (fairseq/optim/composite.py:139-142).
    """
    decayed = [p for p in model.parameters() if config.decay_all or p.ndim >= 2]
    spared = [p for p in model.parameters() if not (config.decay_all or p.ndim >= 2)]
    groups = [dict(params=decayed, weight_decay=config.weight_decay), dict(params=spared, weight_decay=0.0)]
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------------------------------------------------


def check_numbers(config, positive: str, fractions: str, signed: str = "norm_mean") -> None:
    """Refuse numbers that cannot work: the names of those above 0, of those from 0 to 1, of those that may be negative.

    Raises InputError.
    """
    for name, value in asdict(config).items():
        if isinstance(value, str):
            continue
        if not math.isfinite(value) or (isinstance(value, int) and value >= 2**62):
            raise InputError(f"--{name} must be a number of reasonable size, not {value}")
        if name in positive.split() and value <= 0:
            raise InputError(f"--{name} must be above 0, not {value}")
        if name in fractions.split() and not 0 <= value <= 1:
            raise InputError(f"--{name} must lie between 0 and 1, not {value}")
        if name not in signed.split() and value < 0:
            raise InputError(f"--{name} must not be negative, got {value}")
    if config.beta1 == 1 or config.beta2 == 1:
        raise InputError("--beta1 and --beta2 must be below 1")


def check_choices(config, **choices_of: Iterable[str]) -> None:
    """Refuse words that are not among the choices. Raises InputError."""
    for name, choices in choices_of.items():
        if getattr(config, name) not in choices:
            raise InputError(f"--{name} {getattr(config, name)}: choose from {', '.join(choices)}")


AMP = ("auto", "bf16", "fp16", "fp32")


def check_config(config: PretrainConfig, world: int) -> None:
    """Refuse settings that cannot work, before anything is loaded or written. Raises InputError."""
    check_numbers(
        config,
        positive="clip_frames norm_std clones ema_anneal batch_size accumulate updates lr clip_norm log_every "
        "save_every max_skipped timeout",
        fractions="mask_ratio mask_adjust ema_decay ema_decay_end beta1 beta2 max_bad_fraction",
    )
    check_choices(config, model=MODELS, mask=("block", "flexible", "random"), amp=AMP)
    check_batch(config, world)
    if config.grid[0] > MAX_PATCH_ROWS:
        raise InputError(f"--clip_frames {config.clip_frames}: at most {MAX_PATCH_ROWS * config.network.patch_size}")
    if not 0 <= config.target_layers <= config.network.depth:
        raise InputError(f"--target_layers {config.target_layers}: {config.model} has {config.network.depth} blocks")
    if config.probe_test and not config.probe_manifest:
        raise InputError("--probe_test needs --probe_manifest")
    try:
        draw_masks(dataclasses.replace(config, batch_size=1, clones=1), 0, torch.device("cpu"))
    except ValueError as error:
        raise InputError(f"--mask: {error}") from None


def check_batch(config, world: int) -> None:
    """Refuse a missing data set, and a batch that does not divide over processes and parts. Raises InputError."""
    if not config.data:
        raise InputError("--data is missing: a manifest (python data.py scan makes one) or a packed folder")
    if config.batch_size % (world * config.accumulate):
        parts = f"{world} processes x {config.accumulate} parts (--accumulate)"
        raise InputError(f"--batch_size {config.batch_size} does not divide over {parts}")


def open_run(config, may_change: set[str], **digests: str) -> IO:
    """Make the run folder, or make sure that it belongs to these settings; returns a lock to hold during the run.

    Settings in `may_change` may differ from those of the run found there, the digests of its data may not.

    The lock ends with its process, however that ends. Raises InputError if the folder is in use or is another run's.
    """
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "config.json").exists() and any(p.name != "lock" for p in out_dir.iterdir()):
        raise InputError(f"{out_dir} is not empty and holds no run: choose another --out_dir")
    lock = open(out_dir / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another process is running in {out_dir}: wait for it or choose another --out_dir") from None
    new = asdict(config) | digests
    if not any(out_dir.glob("*.pt")) and not any(out_dir.glob("*.damaged")):  # nothing to continue yet
        write_lines(out_dir / "config.json", [json.dumps(new, indent=1)])
        return lock
    try:
        old = json.loads((out_dir / "config.json").read_text())
        changed = [k for k in new.keys() | old.keys() if k not in may_change and old.get(k) != new.get(k)]
    except (ValueError, AttributeError):
        raise InputError(f"{out_dir / 'config.json'} is damaged: restore it or choose another --out_dir") from None
    if changed:
        diff = "; ".join(f"{k} was {old.get(k)}, now {new.get(k)}" for k in sorted(changed))
        raise InputError(f"{out_dir} holds a run with other settings ({diff}): choose another --out_dir")
    return lock


def newest_checkpoint(out_dir: Path) -> str | None:
    """Name of the newest checkpoint that can be read, None if there is none; a damaged last.pt is put aside.

    Raises InputError if there are checkpoints, but none can be read.
    """
    last, previous = out_dir / "last.pt", out_dir / "previous.pt"
    damage = ""
    for path in filter(Path.exists, (last, previous)):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            damage = damage or str(error)
            continue
        if damage:
            os.replace(last, out_dir / "last.damaged")
            print(f"WARNING: {damage}; kept as {out_dir / 'last.damaged'}, going on from {path}", file=sys.stderr)
        return path.name
    if damage:
        raise InputError(f"{damage}, and there is no other checkpoint: restore one, or choose another --out_dir")
    return None


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products; weights, softmax, norms, targets, losses and the teacher's average stay in fp32."""
    if amp == "auto" and device.type == "cpu":
        amp = "fp32"
    elif amp == "auto":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[amp]


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, where the C library is glibc; for training on a CPU.

    Otherwise each large tensor is new memory, cleared and mapped page by page: a tenth of a small network's update.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def make_scaler(amp_dtype: torch.dtype, device: torch.device, growth_interval: int = 4096) -> torch.amp.GradScaler:
    """Loss scaling for fp16 as released: 2^7 at first, doubled after 4096 good updates (fairseq fp16_optimizer.py)."""
    is_half = amp_dtype == torch.float16
    return torch.amp.GradScaler(device.type, init_scale=2.0**7, growth_interval=growth_interval, enabled=is_half)


def prepare(config, rank: int, world: int, check: Callable, may_change: set[str]) -> tuple[Any, str | None, IO | None]:
    """Check settings and data, then open the run folder: (what check returns, checkpoint to resume, the folder's lock).

    `check(config, world)` returns (anything, digests of the data) or raises. Ends all processes, with one line, if
    anything is wrong on any of them.
    """
    checked, digests, checkpoint, lock, error = None, {}, None, None, ""
    try:
        checked, digests = check(config, world)
    except (InputError, CheckpointError, OSError) as problem:
        error = str(problem)
    end_together(error, rank, world)
    try:
        if rank == 0:
            lock = open_run(config, may_change, **digests)
            checkpoint = newest_checkpoint(Path(config.out_dir))
    except (InputError, OSError) as problem:
        error = str(problem)
    end_together(error, rank, world)
    chosen = [checkpoint]
    if world > 1:
        dist.broadcast_object_list(chosen)
    return checked, chosen[0], lock


def end_together(error: str, rank: int, world: int) -> None:
    """End all processes if one has an error to report; rank 0 prints the first."""
    errors = [error]
    if world > 1:
        errors = [""] * world
        dist.all_gather_object(errors, error)
    if any(errors):
        if rank == 0:
            print(f"{Path(sys.argv[0]).name}: {next(filter(None, errors))}", file=sys.stderr)
        if world > 1:
            dist.destroy_process_group()
        sys.exit(2)


def restore(path: Path, parts_of_run: dict) -> dict:
    """Give the parts of a run the state that a checkpoint holds; returns the checkpoint. Raises InputError."""
    state = load_checkpoint(path)
    try:
        for name, part in parts_of_run.items():
            part.load_state_dict(state[name])
        int(state["step"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is not a checkpoint of this run: {first_line(error)}") from None
    return state


class Stop:
    """A wish to stop, by a signal to any process or by rank 0, on which all processes agree after each update."""

    def __init__(self, world: int, timeout: float):
        self.code, self.reason, limit = 0, "", datetime.timedelta(minutes=timeout)
        # on the CPU: never waits for the GPU
        self.group = dist.new_group(backend="gloo", timeout=limit) if world > 1 else None
        atexit.register(self.leave)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one is not so patient
        self.code, self.reason = 128 + number, f"stopped by {signal.Signals(number).name}; the same command goes on"

    def ask(self, reason: str) -> None:
        """Wish to stop with exit status 1."""
        self.code, self.reason = 1, reason

    def agreed(self) -> int:
        """The exit status of the stop that some process wishes, 0 if none does; the same on all processes."""
        code = torch.tensor(self.code)
        if self.group is not None:
            dist.all_reduce(code, dist.ReduceOp.MAX, group=self.group)
        return int(code)

    def leave(self) -> None:
        """Let go of the group: one that the signal handlers keep would now and then abort Python's exit."""
        self.group = None


class Feed:
    """Iterates over a loader's batches; measures the wait for them and lists unreadable clips in bad_files.tsv."""

    def __init__(self, loader: Iterable[Batch], dataset: AudioDataset, out_dir: Path):
        self.batches, self.dataset, self.path = iter(loader), dataset, out_dir / "bad_files.tsv"
        self.waited, self.n_read, self.n_bad, self.listed = 0.0, 0, 0, read_bad_files(self.path)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.n_read, self.n_bad = self.n_read + len(batch.waveform), self.n_bad + len(batch.problems)
        self.report((self.dataset.name(item), problem) for item, problem in batch.problems)
        return batch

    def report(self, problems: Iterable[tuple[str, str]]) -> None:
        """Add files to the list. One short append per line: the processes share the file."""
        for name, problem in problems:
            if name not in self.listed:
                self.listed.add(name)
                with open(self.path, "a", errors="surrogateescape") as file:
                    file.write(f"{name}\t{problem}\n")


def read_bad_files(path: Path) -> set[str]:
    """Names of the files listed in a bad_files.tsv, none if there is no such file."""
    if not path.exists():
        return set()
    return {line.split("\t")[0] for line in path.read_text(errors="surrogateescape").splitlines()}


class Task(NamedTuple):
    """What the settings name, opened."""

    data: AudioDataset
    probe_data: tuple[Labelled | None, Labelled | None]
    init: tuple[EAT, Encoder] | None


def check(config: PretrainConfig, world: int) -> tuple[Task, dict[str, str]]:
    """Check the settings and open what they name: (task, digest of the data). Raises InputError."""
    check_config(config, world)
    data, train, test = AudioDataset(config.data, config.clip_frames, config.min_samples), None, None
    if config.probe_manifest:
        train = open_labelled(config.probe_manifest, config.audio)
        test = open_labelled(config.probe_test, config.audio, train.classes) if config.probe_test else None
    init = EAT.from_pretrained(config.init) if config.init else None
    if init and init[0].config != config.network:
        raise InputError(f"--init {config.init} is of another size than --model {config.model}")
    return Task(data, (train, test), init), dict(data_digest=data.digest())


def train(config: PretrainConfig) -> int:
    """Run the pre-training that `config` describes, or go on with it; returns the exit status."""
    torch.backends.cudnn.allow_tf32 = False  # --amp fp32 means fp32, in convolutions too
    rank, world, device = init_distributed(config.timeout)
    (dataset, probe_data, init), checkpoint, _lock = prepare(config, rank, world, check, MAY_CHANGE)
    out_dir, is_main = Path(config.out_dir), rank == 0
    if device.type == "cpu":
        keep_freed_memory()

    # Student, teacher, optimizer
    torch.manual_seed(config.seed)
    student, teacher = init or (EAT(config.network), None)
    student.to(device).train()
    teacher = (teacher or copy.deepcopy(student.encoder)).to(device).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        param_groups(student, config), lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )
    amp_dtype = pick_precision(config.amp, device)
    scaler = make_scaler(amp_dtype, device)
    parts_of_run = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)

    # Resume
    start = restore(out_dir / checkpoint, parts_of_run)["step"] if checkpoint is not None else 0
    if is_main:
        trim_log(out_dir, start)
        n_parameters = sum(p.numel() for p in student.parameters())
        begin = f"resuming at update {start}" if start else "starting"
        print(f"{begin} in {out_dir}: {config.model}, {n_parameters:,} parameters", end=", ")
        print(f"{len(dataset.clips):,} clips in {len(dataset):,} pieces, {world} x {device.type}", end=", ")
        print(str(amp_dtype).removeprefix("torch."))
        if config.warmup >= config.updates:
            print(f"WARNING: --warmup {config.warmup} takes longer than the run: the learning rate only rises")

    # Data: the stream of clips from update `start` on
    stop = Stop(world, config.timeout)
    sampler = ClipSampler(len(dataset), config.batch_size, config.seed, start, rank, world, config.accumulate)
    feed = Feed(build_loader(dataset, sampler, config.workers, pin_memory=device.type == "cuda"), dataset, out_dir)
    if is_main:
        feed.report((name, f"shorter than {config.min_samples} samples") for name in dataset.short_names())

    # Speed: compile in place, so that names of parameters stay; average gradients over processes
    if config.compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    model = student if world == 1 else DistributedDataParallel(
        student, gradient_as_bucket_view=True, broadcast_buffers=False
    )

    def run_probe(step: int) -> None:
        if probe_data[0]:
            found = probe(student.encoder, config.audio, *probe_data, device, config.workers)
            if is_main:
                log(out_dir, dict(step=step, **found))

    def save(step: int) -> None:
        state = {name: part.state_dict() for name, part in parts_of_run.items()}
        plain = dict(step=step, config=asdict(config), network=asdict(config.network))
        save_checkpoint(out_dir / "last.pt", **plain, **state)

    if not start:
        run_probe(0)
    code, history, health, clock, feed.waited = 0, [], Health(stop, config), time.perf_counter(), 0.0
    bar = dict(initial=start, total=config.updates, disable=None if is_main else True)  # None: only on a terminal
    for step in (progress := tqdm(range(start, config.updates), **bar)):
        parts = micro_batches(feed, sampler, config, step, device)
        out = train_step(model, teacher, optimizer, scaler, parts, step, config, amp_dtype)
        history.append(torch.stack([out[k] for k in LOGGED]))
        step += 1  # from here on: completed updates
        is_last = step == config.updates

        if step == 1 or step % config.log_every == 0 or is_last:
            losses, skipped, bad_fraction = summarize(history, LOGGED, feed, world)
            health.check(skipped, bad_fraction)
            seconds = time.perf_counter() - clock
            record = dict(
                step=step, epoch=step * config.batch_size / len(dataset), **losses, **spread(out, config.clones),
                lr=optimizer.param_groups[0]["lr"], ema_decay=ema_decay(step, config), skipped=sum(skipped),
                bad_files=len(read_bad_files(feed.path)), clips_per_s=len(history) * config.batch_size / seconds,
                step_ms=1000 * seconds / len(history), data_wait=feed.waited / seconds,
                peak_memory_gib=peak_memory_gib(device),
            )  # fmt: skip
            if is_main:
                log(out_dir, record)
                progress.set_postfix({k: record[k] for k in ("loss", "lr", "clips_per_s")})
                check_collapse(stop, record, config)
            history, clock, feed.waited = [], time.perf_counter(), 0.0

        if is_last or (config.probe_every and step % config.probe_every == 0):
            begin = time.perf_counter()
            run_probe(step)
            clock += time.perf_counter() - begin  # the log's speed is that of the training
        code = stop.agreed()
        if is_main and (step % config.save_every == 0 or is_last or code > 128):
            try:
                save(step)
            except (OSError, RuntimeError) as error:
                message = f"could not save update {step} in {out_dir} ({first_line(error)}), the last checkpoint stands"
                if is_last or code:
                    raise InputError(message) from None
                tqdm.write(f"WARNING: {message}; the run goes on")
        if code:
            break

    progress.close()
    if is_main and code:
        print(f"pretrain.py: {stop.reason or 'stopped by a signal to another process'}", file=sys.stderr)
    elif is_main:
        print(f"done: {config.updates} updates; weights in {out_dir / 'last.pt'}, curves in {out_dir / 'log.jsonl'}")
        if Path(config.data).parent == DEMO:
            print("next: python data.py scan FOLDER -o train.tsv, and on with 'Your own audio' in README.md")
    if world > 1:
        dist.destroy_process_group()
    return code


LOGGED = ("loss", "loss_frame", "loss_utterance", "grad_norm")


def summarize(
    history: list[Tensor], names: tuple[str, ...], feed: Feed, world: int
) -> tuple[dict[str, float | None], list[bool], float]:
    """Over all processes: means of what `history` holds since the last log line, which of these updates were skipped,
    and the share of clips that cannot be used (of 100 or more read so far)."""
    rows = torch.stack(history)                                                             # (updates, names)
    clips = torch.tensor([feed.n_bad, feed.n_read], dtype=rows.dtype, device=rows.device)
    if world > 1:
        dist.all_reduce(rows)
        dist.all_reduce(clips)
    is_good = rows.isfinite().all(1)
    good = rows[is_good] / world
    n_bad, n_read = clips.tolist()
    means = good.mean(0).tolist() if len(good) else [None] * len(names)
    return dict(zip(names, means)), (~is_good).tolist(), n_bad / n_read if n_read >= 100 else 0.0


def spread(out: dict[str, Tensor], clones: int) -> dict[str, float]:
    """target_std and pred_std of what train_step returned."""
    times_masked = out["mask"].view(len(out["targets"]), clones, -1).sum(1).flatten()       # (B*N,)
    return dict(
        target_std=masked_std(out["targets"].flatten(0, 1), times_masked),
        pred_std=masked_std(out["pred"].flatten(0, 1), out["mask"].flatten()),
    )


class Health:
    """Asks for a stop if a run diverges or its data is broken."""

    def __init__(self, stop: Stop, config):
        self.stop, self.config, self.streak = stop, config, 0

    def check(self, skipped: list[bool], bad_fraction: float) -> None:
        """Take note of which updates were skipped since the last call, and of the share of unusable clips."""
        longest = 0
        for is_skipped in skipped:
            self.streak = self.streak + 1 if is_skipped else 0
            longest = max(longest, self.streak)
        if bad_fraction > self.config.max_bad_fraction:
            listed = Path(self.config.out_dir, "bad_files.tsv")
            self.stop.ask(f"{bad_fraction:.0%} of the clips cannot be used (--max_bad_fraction): see {listed}")
        if longest >= self.config.max_skipped:
            self.stop.ask(f"{longest} updates in a row had no finite gradient (lower --lr, or --amp fp32)")


def check_collapse(stop: Stop, record: dict, config: PretrainConfig) -> None:
    """Warn, or ask for a stop, if after the warm-up targets or predictions are nearly constant."""
    target_std, pred_std = record["target_std"], record["pred_std"]
    if record["step"] > config.warmup and (target_std < MIN_TARGET_STD or pred_std < MIN_PRED_STD):
        collapse = f"the features have collapsed (target_std {target_std:.3f}, pred_std {pred_std:.3f})"
        tqdm.write(f"WARNING: {collapse}")
        if config.stop_on_collapse:
            stop.ask(collapse)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on the GPU, or resident if there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def trim_log(out_dir: Path, step: int) -> None:
    """Drop log lines of updates that will be repeated, and what was half-written when the run was killed."""
    path = out_dir / "log.jsonl"
    if path.exists():
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError):
                continue
        write_lines(path, kept)


def run_script(train: Callable[..., int], config) -> None:
    """Run a training to its exit status; what the user can mend is told in one line."""
    name = Path(sys.argv[0]).name
    sys.stdout.reconfigure(line_buffering=True)  # a log that goes to a file is there to be read while the run goes on
    try:
        sys.exit(train(config))
    except KeyboardInterrupt:  # before the first update; later ones are handled by Stop
        sys.exit(f"{name}: interrupted before the first update")
    except OSError as error:
        sys.exit(f"{name}: {error}; the same command goes on from the last checkpoint in {config.out_dir}")
    except (InputError, CheckpointError) as error:  # one from a loader process comes with a traceback, its words last
        sys.exit(f"{name}: {str(error).strip().splitlines()[-1].removeprefix('data.InputError: ')}")


def main() -> None:
    run_script(train, parse_config(PretrainConfig, PRESETS))


if __name__ == "__main__":
    main()
