"""Pre-train EAT (paper, Sec. 3): a teacher sees clips; a student sees masked copies and predicts the teacher.

    python pretrain.py --preset demo                             laptop, embedded words, 4 minutes
    python pretrain.py --data train.tsv --accumulate 4           one GPU, the paper's 48 clips in 4 parts
    torchrun --nproc_per_node=4 pretrain.py --data train.tsv     the paper's setup

The run folder `--out_dir` gets config.json, log.jsonl, bad_files.tsv, last.pt and the checkpoint before it,
previous.pt. The same command resumes the run. Random numbers depend on the seed and on what they are for: the
order of clips on the epoch, masks on the update, noise on the update and the clip's row in its batch. So the
run is the same for any number of processes. `step` counts completed updates. Citations: see model.py.
"""

import contextlib
import copy
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from data import (
    AudioDataset, Batch, ClipSampler, InputError, build_loader, first_line, move, seed_of, spectrogram,
    write_lines,
)  # fmt: skip
from evaluate import (
    STOP, check_settings, distribute, gather, init_distributed, open_probe_sets, open_run_folder,
    parse_config, pick_precision, pooled, probe, run_script, save_checkpoint, spread,
)  # fmt: skip
from masking import count_visible, inverse_block_mask, visible_ids
from model import EAT, MODELS, Encoder, load_checkpoint, make_targets, refusing

DEMO = Path(__file__).resolve().parent / "extras" / "demo"


@dataclass(frozen=True)
class RunConfig:
    """What pre-training and fine-tuning have in common."""
    accumulate: int = 1  # parts into which a process divides its clips, to save memory
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    weight_decay: float = 0.05  # AdamW's, on all parameters (released code)
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile the networks
    workers: int = 4  # loader threads of a process
    seed: int = 1  # seed of everything random
    log_every: int = 100  # updates between log lines; the first and third are logged, too
    save_every: int = 10_000  # updates between checkpoints (released code)
    save_minutes: float = 10.0  # save at least this often, in minutes
    max_bad_fraction: float = 0.05  # stop if a larger fraction of the clips cannot be used
    max_skipped: int = 50  # stop after so many updates in a row whose gradient is not finite
    timeout: float = 10.0  # minutes after which a process that hangs ends the job

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pre-training, paper Table 4, with the released code's values where the paper gives none or differs."""
    # Data and network
    data: str = ""  # manifest to train on (python extras/prepare.py scan makes one)
    out_dir: str = "runs/pretrain"  # run folder; a run found there is resumed
    model: Literal[*MODELS] = "base"  # base (ViT-B), large (ViT-L), small, demo or tiny: rows of model.MODELS
    init: str = ""  # start from the student and teacher of this pre-training checkpoint, own or released
    clip_frames: int = 1024  # frames of 10 ms of a clip, a multiple of 16; shorter clips are padded
    norm_mean: float = -4.268  # mean of log-mel values, AudioSet's; extras/prepare.py stats prints yours
    norm_std: float = 4.569  # their standard deviation; values are divided by twice this
    min_samples: int = 10_000  # shorter clips are left out (released code; samples at 16 kHz)
    # Masks
    mask_ratio: float = 0.8  # fraction of patches hidden from the student
    mask_block_time: int = 5  # size of a visible block in patches of 160 ms; 1 x 1: random masks
    mask_block_freq: int = 5  # size of a visible block in patches of 16 mel bins
    mask_adjust: float = 0.07  # extra area drawn to make up for overlapping blocks (released code)
    clones: int = 16  # masked copies of each clip
    mask_noise: float = 0.01  # std of the noise that fills masked places for the decoder (released code)
    # Loss and teacher
    utterance_weight: float = 192.0  # weight of the CLS loss; 192 is the released lambda = 1 (see README)
    target_layers: int = 0  # average the teacher's last blocks, 0 = all
    ema_decay: float = 0.9998  # initial decay of the teacher (released code), rising linearly
    ema_decay_end: float = 0.99999  # final decay of the teacher
    ema_anneal: int = 100_000  # updates to reach ema_decay_end, scaled with --updates unless given
    # Optimisation
    batch_size: int = 48  # clips per update, over all processes
    updates: int = 400_000  # length of the run; 400,000 are 10 epochs of AudioSet
    lr: float = 5e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at both ends (the paper's table says 1e-6)
    warmup: int = 53_333  # updates of linear warm-up, in proportion to --updates unless given; then cosine
    clip_norm: float = 4.0  # largest gradient norm (released code), 0 = no clipping
    stop_on_collapse: bool = False  # stop, rather than warn, when targets or predictions are nearly constant
    # Probes
    probe_train: str = ""  # labelled manifest: fit probes of the frozen encoder, before and after training
    probe_test: str = ""  # labelled manifest to score them on
    probe_every: int = 0  # also probe every so many updates, 0 = never


PRESETS = {
    "base": {},
    "large": dict(model="large", mask_ratio=0.75, mask_adjust=0.1, lr=4e-4, ema_anneal=150_000),
    "demo": dict(
        data=str(DEMO / "pretrain.tsv"), out_dir="runs/demo", model="demo", clip_frames=128, min_samples=1600,
        mask_block_time=2, mask_block_freq=2, clones=8, utterance_weight=1.0, ema_decay=0.996,
        ema_decay_end=0.9995, ema_anneal=480, batch_size=16, updates=480, lr=2e-3, warmup=80, workers=1,
        log_every=40, save_every=80, probe_train=str(DEMO / "train.tsv"), probe_test=str(DEMO / "test.tsv"),
        probe_every=240,
    ),
}  # fmt: skip

# Settings that may change on resume. Any other change, or other clips in `data`, makes it another run
MAY_CHANGE = """data out_dir accumulate compile workers log_every save_every save_minutes max_bad_fraction
    max_skipped stop_on_collapse timeout probe_train probe_test probe_every""".split()


# ----- One update ------------------------------------------------------------------------------------------

LOGGED = ("loss", "loss_frame", "loss_utterance", "grad_norm")  # of what train_step returns


def cosine_lr(step: int, peak: float, warmup: int, updates: int, min_lr: float) -> float:
    """Learning rate after `step` updates: linear from min_lr, of the first update, to peak, then
    cosine back, as in the released recipe (fairseq's cosine_lr_scheduler.py:71-146)."""
    if step < warmup:
        return min_lr + (peak - min_lr) * step / warmup
    progress = (step - warmup) / (updates - warmup)
    return min_lr + (peak - min_lr) / 2 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, config: PretrainConfig) -> float:
    """Decay of the teacher after `step` updates: linear, then constant (EAT_pretraining.py:364-378)."""
    fraction = min(step / max(1, config.ema_anneal), 1.0)
    return config.ema_decay_end - (config.ema_decay_end - config.ema_decay) * (1 - fraction)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in fp32 (paper Sec. 3.2)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


def draw_masks(config: PretrainConfig, step: int, device: torch.device) -> Tensor:
    """The masks of an update, (batch_size * C, N) bool: every process draws the same and takes its rows."""
    generator = torch.Generator(device).manual_seed(seed_of("masks", config.seed, step))
    n = config.batch_size * config.clones
    grid = MODELS[config.model].grid(config.clip_frames)
    block = (config.mask_block_time, config.mask_block_freq)
    return inverse_block_mask(n, grid, config.mask_ratio, block, config.mask_adjust, generator, device)


def draw_noise(config: PretrainConfig, step: int, rows: range, device: torch.device) -> Tensor:
    """What the decoder sees at masked places, for some rows of an update's batch: (len(rows) * C, N, D)."""
    network = MODELS[config.model]
    H, W = network.grid(config.clip_frames)
    shape = (config.clones, H * W, network.width)
    noise = []
    for row in rows:
        generator = torch.Generator(device).manual_seed(seed_of("noise", config.seed, step, row))
        noise.append(torch.randn(shape, generator=generator, device=device))
    return torch.cat(noise).mul_(config.mask_noise)


def draw_parts(
    batches: Iterator[Batch], sampler: ClipSampler, config: PretrainConfig, step: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's parts of an update: (spec (B, 1, F, M), mask (B*C, N), noise (B*C, N, D))."""
    masks = draw_masks(config, step, device)                                        # (batch_size*C, N)
    for part in range(config.accumulate):
        batch = next(batches)
        waveform = move(batch.waveform, device)                                     # (B, S)
        n_samples = move(batch.n_samples, device)                                   # (B,)
        spec = spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)  # (B, 1, F, M)
        rows = sampler.rows(part)
        mask = masks[rows.start * config.clones : rows.stop * config.clones]        # (B*C, N)
        yield spec, mask, draw_noise(config, step, rows, device)


def train_step(
    model: nn.Module, teacher: Encoder, optimizer: Optimizer, scaler: GradScaler,
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], step: int, config: PretrainConfig, amp: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of student and teacher; `model` is the student EAT or the DistributedDataParallel around it.
    Returns loss, loss_frame, loss_utterance (means over the parts: all masks hide equally many patches),
    grad_norm (before clipping), and of the last part pred, targets, mask. Nothing here waits for the GPU."""
    student = getattr(model, "module", model)
    optimizer.param_groups[0]["lr"] = cosine_lr(step, config.lr, config.warmup, config.updates, config.min_lr)
    losses = 0.0
    for i, (spec, mask, noise) in enumerate(parts, start=1):
        if dist.is_initialized():  # average gradients over processes in the last part only
            model.require_backward_grad_sync = i == config.accumulate
        with torch.autocast(spec.device.type, amp, enabled=amp != torch.float32):
            with torch.no_grad():
                ffn_outputs = teacher.ffn_outputs(spec)                                     # L x (B, N, D)
                targets = make_targets(ffn_outputs[-config.target_layers :])  # 0: all      # (B, N, D)
            ids_keep = visible_ids(mask, count_visible(mask.shape[1], config.mask_ratio))   # (B*C, V)
            out = model(spec, mask, ids_keep, targets, noise, config.utterance_weight)
        scaler.scale(out["loss"] / config.accumulate).backward()
        part_losses = [out["loss"].detach(), out["loss_frame"], out["loss_utterance"]]
        losses = losses + torch.stack(part_losses) / config.accumulate
    grad_norm = descend(optimizer, scaler, student, config.clip_norm)
    ema_update(teacher, student.encoder, ema_decay(step + 1, config))
    return dict(zip(LOGGED, [*losses, grad_norm]), pred=out["pred"], targets=targets, mask=mask)


def descend(optimizer: Optimizer, scaler: GradScaler, model: nn.Module, clip_norm: float) -> Tensor:
    """Clip the gradients and step, unless one of them is not finite; returns their norm before clipping."""
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # 1: AdamW skips it; for fp16 the scaler decides
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ----- A run -----------------------------------------------------------------------------------------------


def train(config: PretrainConfig) -> int:
    """Run the pre-training that `config` describes, or go on with it; returns the exit status."""
    run = Run(config)
    device = run.device
    # Student and teacher
    student, teacher = open_networks(config)
    student.to(device)
    teacher.to(device).eval().requires_grad_(False)
    optimizer = run.optimizer(student.parameters())

    # Clips to learn from, and labelled ones to probe what is learnt
    data = AudioDataset(config.data, config.clip_frames, config.min_samples)
    probe_sets = ()
    if config.probe_train or config.probe_test:
        probe_sets = open_probe_sets(config.probe_train, config.probe_test, config.clip_frames)

    # Go on from the newest checkpoint in the run folder, if there is one
    run.stateful = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=run.scaler)
    run.about = dict(network=asdict(student.config))
    run.resume(MAY_CHANGE, data_digest=data.manifest.digest)
    run.say(f"{config.data}: {len(data):,} pieces; {len(data.too_short)} clips are too short")
    sampler = run.sampler(data)
    batches = run.load(data, sampler)

    # Speed: compile in place, so that names of parameters stay; average gradients over processes
    if config.compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    model = distribute(student)

    def run_probe(step: int) -> None:
        if probe_sets:
            function = pooled(student.encoder, "cls_mean", student.config.depth)  # after the last block
            run.log(step=step, **probe(function, student.config, *probe_sets, device, **run.loading))

    if run.start == 0:  # not in the loop, which is timed
        run_probe(0)
    for step in run.steps():
        if step and config.probe_every and step % config.probe_every == 0:
            run_probe(step)

        parts = draw_parts(batches, sampler, config, step, device)
        out = train_step(model, teacher, optimizer, run.scaler, parts, step, config, run.amp)
        run.history.append(torch.stack([out[name] for name in LOGGED]))

        step += 1  # from here on: completed updates
        if step in (1, 3) or step % config.log_every == 0 or step == config.updates:
            mask = out["mask"]  # (B*C, N)
            target_std = spread(out["targets"].repeat_interleave(config.clones, 0)[mask])
            pred_std = spread(out["pred"][mask].float())
            run.log_training(
                step, LOGGED, epoch=step * config.batch_size / len(data), lr=optimizer.param_groups[0]["lr"],
                ema_decay=ema_decay(step, config), target_std=target_std, pred_std=pred_std,
            )  # fmt: skip
            if step > config.warmup and not (target_std > 0.1 and pred_std > 0.01):  # released limits; or nan
                run.warn("the features have collapsed (see target_std)", config.stop_on_collapse)
        run.save_or_stop(step)
    if not run.stopped:
        run_probe(config.updates)
        run.say(f"done: {config.updates} updates; weights and curves are in {run.out_dir}")
    return run.stopped


def open_networks(config: PretrainConfig) -> tuple[EAT, Encoder]:
    """Student and teacher at the start of a run. Raises InputError for settings that do not fit."""
    torch.manual_seed(config.seed)
    audio = dict(clip_frames=config.clip_frames, norm_mean=config.norm_mean, norm_std=config.norm_std)
    try:
        draw_masks(config, 0, torch.device("cpu"))
        student = EAT(replace(MODELS[config.model], **audio))
    except ValueError as error:
        raise InputError(f"--clip_frames, --mask...: {error}") from None
    if config.target_layers > student.config.depth:
        raise InputError(f"--target_layers is above the {student.config.depth} blocks of {config.model}")
    teacher = copy.deepcopy(student.encoder)
    if config.init:
        initial = EAT.from_pretrained(config.init)
        with refusing(config.init):  # it may be of another size
            for network, other in zip((student, teacher), initial):
                network.load_state_dict(other.state_dict())
    return student, teacher


# ----- Run: folder, checkpoints, log and end of a training, for finetune.py too; not specific to EAT -------

SHOWN = "step loss lr clips_per_s minutes_left probe_linear mAP accuracy".split()  # on the console


class Run:
    """What every training has. Process 0 writes; all call resume, log_training and save_or_stop together."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.out_dir = Path(config.out_dir)
        self.rank, self.world, self.device = init_distributed(config.timeout)
        self.amp = pick_precision(config.amp, self.device)
        self.scaler = GradScaler(
            self.device.type, 128.0, growth_interval=4096, enabled=self.amp == torch.float16
        )
        self.loading = dict(workers=config.workers, timeout=54 * config.timeout)  # s: fails before others do
        self.settings = {}
        self.stateful = {}  # what a checkpoint holds: networks, optimizer ...
        self.about = {}  # and plain values
        self.lock = None
        self.start = 0  # updates that were made before this process started
        self.status = 0  # the exit status that this process asks for, 0 = go on
        self.reason = "another process stops"
        self.stopped = 0  # the exit status that all processes agreed on
        self.history = []  # of each update since the last log line: losses and gradient norm
        self.problems = []  # clips replaced since the last log line: file and reason
        self.waited = 0.0  # seconds for clips since the last log line
        self.n_bad = 0  # clips replaced since this process started
        self.n_skipped = 0  # updates in a row without a finite gradient
        self.logged_at = 0.0
        self.saved_at = time.monotonic()
        if not config.data:
            raise InputError("--data is missing: a manifest (python extras/prepare.py scan makes one)")
        if config.batch_size % (self.world * config.accumulate):
            parts = f"{self.world} processes x {config.accumulate} (--accumulate)"
            raise InputError(f"--batch_size {config.batch_size} does not divide by {parts}")

    def optimizer(self, parameters: Iterable) -> AdamW:
        c = self.config
        return AdamW(parameters, 0.0, (c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)

    def sampler(self, data: AudioDataset, weights: Tensor | None = None, epoch_items: int = 0) -> ClipSampler:
        """This process's share of the clips of every update, from the next one on."""
        c = self.config
        return ClipSampler(
            len(data), c.batch_size, c.seed, self.start, self.rank, self.world, c.accumulate, weights,
            epoch_items,
        )  # fmt: skip

    def resume(self, may_change: list[str], **digests: str) -> dict:
        """Open the run folder, load its newest checkpoint into `parts`, and return it. Raises InputError."""
        self.settings = asdict(self.config) | digests | dict(amp=str(self.amp))
        path = None
        if self.rank == 0:
            path, self.lock = open_run_folder(self.out_dir)
        shared = gather([(path, self.settings)])
        if any(settings != self.settings for _, settings in shared):
            raise InputError("the processes have different settings, data or precision")
        path = shared[0][0]
        state = dict(step=0, log_size=0)
        if path:
            state = load_checkpoint(path)
            for name, value in self.settings.items():
                old = state.get("settings", {}).get(name)
                if old != value and name not in may_change:
                    change = f"{name} was {old}, now {value}"
                    raise InputError(f"{self.out_dir} is another run ({change}): choose another --out_dir")
            with refusing(path):
                for name, part in self.stateful.items():
                    part.load_state_dict(state[name])
        self.start = state["step"]
        self.say(f"{self.out_dir}, from update {self.start}: {self.world} x {self.device.type}, {self.amp}")
        if self.rank == 0:
            write_lines(self.out_dir / "config.json", [json.dumps(self.settings, indent=1)])
            with open(self.out_dir / "log.jsonl", "a") as log:  # what follows will be logged again
                log.truncate(min(log.tell(), state["log_size"]))
        return state

    def steps(self) -> Iterator[int]:
        """The numbers of the updates left to make, until all are made or the processes agree to stop."""
        STOP.handle(STOP.note)
        end = self.config.updates
        steps = range(self.start, end)
        self.logged_at = time.perf_counter()
        for step in tqdm(steps, initial=self.start, total=end, disable=self.rank > 0 or None):
            yield step
            if self.stopped:
                self.say(f"update {step + 1}: {self.reason}")
                break
        STOP.handle(signal.SIG_DFL)

    def save_or_stop(self, step: int, must_save: bool = False) -> None:
        """Agree on whether to stop (sets `stopped`). Save if it is time or a signal (128 + number) stops."""
        if STOP.number:
            self.status = 128 + STOP.number  # as in shells
            self.reason = f"stopped by {signal.Signals(STOP.number).name}; the same command resumes"
        status = torch.tensor(self.status)
        if self.world > 1:
            dist.all_reduce(status, dist.ReduceOp.MAX)  # on the CPU: does not wait for the GPU
        self.stopped = int(status)
        if self.stopped:
            self.add("bad_files.tsv", gather(self.problems))
        config = self.config
        is_time = must_save or time.monotonic() > self.saved_at + 60 * config.save_minutes
        if is_time or step % config.save_every == 0 or step == config.updates or self.stopped > 128:
            self.save("last.pt", step, self.stateful)
            self.saved_at = time.monotonic()

    def warn(self, problem: str, stop: bool = False) -> None:
        """Warn of a problem or, to `stop`, end the run after this update with exit status 1."""
        self.say(f"WARNING: {problem}")
        if stop and not self.status:
            self.status = 1
            self.reason = problem

    def say(self, text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError):  # output that goes to a full disk
                tqdm.write(text)

    def save(self, name: str, step: int, parts: dict) -> bool:
        """Write a checkpoint; returns whether that worked. If the disk is full, the run goes on."""
        if self.rank > 0:
            return True
        state = dict(step=step, settings=self.settings, **self.about)
        for key, part in parts.items():
            state[key] = part.state_dict()
        try:
            with open(self.out_dir / "log.jsonl", "ab") as log:
                state["log_size"] = log.tell()
            save_checkpoint(self.out_dir / name, **state)
        except (OSError, RuntimeError) as error:
            problem = f"could not save update {step} in {self.out_dir}: {first_line(error)}"
            if step == self.config.updates or self.stopped:
                raise InputError(problem) from None
            self.warn(problem)
            return False
        return True

    def load(self, data: AudioDataset, sampler: ClipSampler) -> Iterator[Batch]:
        """The sampler's batches; records how long they took, and which clips could not be used."""
        self.add("bad_files.tsv", data.too_short)
        loader = build_loader(data, sampler, **self.loading)
        while True:
            begin = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - begin
            self.problems += filter(None, batch.problems)
            yield batch

    def log_training(self, step: int, names: tuple[str, ...], **more) -> None:
        """Log means over processes and the updates since the last line or start; stop a failing run."""
        config = self.config
        rows = torch.stack(self.history)  # (updates, names)
        if self.world > 1:
            dist.all_reduce(rows)
        is_finite = rows.isfinite().all(1)
        means = [None] * len(names)
        if is_finite.any():
            means = (rows[is_finite].mean(0) / self.world).tolist()
        problems = gather(self.problems)
        self.n_bad += len(problems)
        self.add("bad_files.tsv", problems)
        seconds = time.perf_counter() - self.logged_at
        pace = seconds / len(rows)
        self.log(
            step=step, **dict(zip(names, means)), **more, skipped=int((~is_finite).sum()),
            bad_clips=self.n_bad, clips_per_s=config.batch_size / pace, data_wait=self.waited / seconds,
            minutes_left=(config.updates - step) * pace / 60,
            gpu_memory_gib=torch.cuda.max_memory_allocated() / 2**30,
        )  # fmt: skip
        for good in is_finite.tolist():
            self.n_skipped = 0 if good else self.n_skipped + 1
            if self.n_skipped == config.max_skipped:
                self.warn(f"{self.n_skipped} updates in a row had no finite gradient (lower --lr)", stop=True)
        n_read = (step - self.start) * config.batch_size
        if n_read >= 100 and self.n_bad / n_read > config.max_bad_fraction:
            self.warn(f"{self.n_bad} of {n_read} clips cannot be used (--max_bad_fraction)", stop=True)
        self.history = []
        self.problems = []
        self.waited = 0.0
        self.logged_at = time.perf_counter()

    def log(self, **record) -> None:
        """Add a JSON line to log.jsonl, and print what people watch."""
        self.add("log.jsonl", [json.dumps(record)])
        self.say(
            "  ".join(f"{name} {record[name]:.7g}" for name in SHOWN if record.get(name) is not None)
        )

    def add(self, name: str, lines: list[str]) -> None:
        """Append new lines to a file in the run folder; a full disk loses them, not the run."""
        if self.rank > 0 or not lines:
            return
        try:
            with open(self.out_dir / name, "ab+") as file:  # names of files may hold any bytes
                file.seek(0)
                old = set(file.read().split(b"\n"))
                if b"" not in old:  # a full disk cut the last line
                    file.write(b"\n")
                new = set(map(os.fsencode, lines)) - old
                file.writelines(line + b"\n" for line in sorted(new))
        except OSError as error:
            self.warn(f"could not write to {self.out_dir / name}: {error}")


if __name__ == "__main__":
    run_script(lambda: train(parse_config(PretrainConfig, PRESETS)))
