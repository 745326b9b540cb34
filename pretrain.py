"""Pre-train EAT (paper, Sec. 3): a teacher sees clips; a student sees masked copies and predicts the teacher.

    python pretrain.py --preset demo                             laptop, embedded words, 4 minutes
    python pretrain.py --data train.tsv --accumulate 4           one GPU, the paper's 48 clips in 4 parts
    torchrun --nproc_per_node=4 pretrain.py --data train.tsv     the paper's setup

The run folder `--out_dir` gets config.json, log.jsonl (a line every `--log_every` updates), bad_files.tsv,
last.pt and the one before it, previous.pt; the same command started again goes on from there. What is random
in update `step`, which counts completed ones, is drawn from (seed, step, clip): the run is the same for any
number of processes, parts and workers. EAT_pretraining.py:364 is released code, cited as in model.py.
"""

import copy
import dataclasses
import errno
import fcntl
import json
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    STOPPING, AudioDataset, Batch, ClipSampler, InputError, Labelled, build_loader, first_line, open_labelled,
    read_lines, seed_of, spectrogram, write_lines,
)  # fmt: skip
from evaluate import (
    Above0, AtLeast0, Below1, Count, Frames, Number, UpTo1, Whole, accumulating, check_settings,
    distribute, init_distributed, masked_std, parse_config, pick_precision, pooled, probe, run_script,
)  # fmt: skip
from masking import count_visible, flexible_block_mask, inverse_block_mask, visible_ids
from model import (
    EAT, MODELS, Encoder, ModelConfig, load_checkpoint, make_targets, newest_checkpoint, refusing,
    save_checkpoint,
)  # fmt: skip

DEMO = Path(__file__).resolve().parent / "extras" / "demo"


@dataclass(frozen=True)
class PretrainConfig:
    """The rows of the paper's Table 4, with the released code's values where the paper has none or others."""

    # Data and network
    data: str = ""  # manifest to train on (python extras/prepare.py scan makes one)
    out_dir: str = "runs/pretrain"  # run folder; a run found there is resumed
    model: Literal[*MODELS] = "base"  # base (ViT-B), large (ViT-L), small, demo or tiny: rows of model.MODELS
    init: str = ""  # start from the student and teacher of this pre-training checkpoint, own or released
    clip_frames: Frames = 1024  # frames of 10 ms of a clip, a multiple of 16; shorter clips are padded
    norm_mean: Number = -4.268  # mean of log-mel values, AudioSet's; extras/prepare.py stats prints yours
    norm_std: Above0 = 4.569  # their standard deviation; values are divided by twice this
    min_samples: Whole = 10_000  # shorter clips are left out (released code; samples at 16 kHz)
    # Masks
    mask: Literal["block", "flexible"] = "block"  # flexible: a shape drawn for each clip
    mask_ratio: Below1 = 0.8  # fraction of patches hidden from the student
    mask_block_time: Count = 5  # size of a visible block in patches of 160 ms; 1 x 1: random masks
    mask_block_freq: Count = 5  # size of a visible block in patches of 16 mel bins
    mask_adjust: UpTo1 = 0.07  # extra area drawn to make up for overlapping blocks (released code)
    clones: Count = 16  # masked copies of each clip
    mask_noise: AtLeast0 = 0.01  # std of the noise that fills masked places for the decoder (released code)
    # Loss and teacher
    utterance_weight: AtLeast0 = 192.0  # weight of the CLS loss; 192 is the released lambda = 1 (see README)
    target_layers: Whole = 0  # average the teacher's last blocks, 0 = all
    ema_decay: UpTo1 = 0.9998  # decay of the teacher at first (released code), rising linearly
    ema_decay_end: UpTo1 = 0.99999  # decay of the teacher at last
    ema_anneal: Count = 100_000  # updates until then, in proportion to --updates unless given
    # Optimisation
    batch_size: Count = 48  # clips per update, over all processes
    accumulate: Count = 1  # parts that a process divides its clips into, to save memory
    updates: Count = 400_000  # length of the run; 400,000 are 10 epochs of AudioSet
    lr: Above0 = 5e-4  # peak learning rate
    min_lr: AtLeast0 = 0.0  # learning rate at both ends (the paper's table says 1e-6)
    warmup: Whole = 53_333  # updates of linear warm-up, in proportion to --updates unless given; then cosine
    beta1: Below1 = 0.9  # AdamW's decay of the mean gradient
    beta2: Below1 = 0.95  # AdamW's decay of the mean squared gradient
    weight_decay: AtLeast0 = 0.05  # AdamW's, on everything (released code)
    clip_norm: Above0 = 4.0  # largest gradient norm (released code)
    # The run
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile the networks
    workers: Whole = 4  # loader processes of a training process, one for each core at most
    log_every: Count = 100  # updates between log lines
    save_every: Count = 10_000  # updates between checkpoints (released code)
    save_minutes: Above0 = 10.0  # minutes between checkpoints at most
    seed: Whole = 1  # seed of everything random
    # When to stop
    max_bad_fraction: UpTo1 = 0.05  # stop if more of the clips read than this cannot be used
    max_skipped: Count = 50  # stop after so many updates in a row whose gradient is not finite
    stop_on_collapse: bool = False  # stop, rather than warn, when targets or predictions are nearly constant
    timeout: Above0 = 10.0  # minutes after which a process that hangs ends the job
    # Probes
    probe_train: str = ""  # labelled manifest: fit probes of the frozen encoder, before and after training
    probe_test: str = ""  # labelled manifest to score them on
    probe_every: Whole = 0  # also probe every so many updates, 0 = not

    def __post_init__(self):
        check_settings(self)

    @property
    def network(self) -> ModelConfig:
        audio = dict(clip_frames=self.clip_frames, norm_mean=self.norm_mean, norm_std=self.norm_std)
        return dataclasses.replace(MODELS[self.model], **audio)

    @property
    def grid(self) -> tuple[int, int]:
        return MODELS[self.model].grid(self.clip_frames)


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

LOGGED = ("loss", "loss_frame", "loss_utterance", "grad_norm")  # of what train_step returns
SHOWN = "step loss lr clips_per_s minutes_left probe_linear probe_knn mAP accuracy".split()  # on the console
# What may change when a run goes on; all else makes it another experiment. Of `data` the digest may not
MAY_CHANGE = """data out_dir accumulate compile workers log_every save_every save_minutes max_bad_fraction
    max_skipped stop_on_collapse timeout probe_train probe_test probe_every""".split()


# ----- One update ------------------------------------------------------------------------------------------


def cosine_lr(step: int, peak: float, warmup: int, updates: int, min_lr: float) -> float:
    """Learning rate after `step` updates: linear from min_lr, which the first update has, to peak, then
    cosine back, as the released recipe (fairseq's cosine_lr_scheduler.py:71-146)."""
    if step < warmup:
        return min_lr + (peak - min_lr) * step / warmup
    return min_lr + (peak - min_lr) / 2 * (1 + math.cos(math.pi * (step - warmup) / (updates - warmup)))


def ema_decay(step: int, config: PretrainConfig) -> float:
    """Decay of the teacher after `step` updates: linear, then constant (EAT_pretraining.py:364-378)."""
    fraction = min(step / config.ema_anneal, 1.0)
    return config.ema_decay_end - (config.ema_decay_end - config.ema_decay) * (1 - fraction)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in fp32 (paper Sec. 3.2)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


def draw_masks(config: PretrainConfig, step: int, device: torch.device) -> Tensor:
    """The masks of an update, (batch_size * C, N) bool: every process draws the same and takes its rows."""
    generator = torch.Generator(device).manual_seed(seed_of("masks", config.seed, step))
    ratio, adjust, drawn = config.mask_ratio, config.mask_adjust, dict(generator=generator, device=device)
    if config.mask == "flexible":
        return flexible_block_mask(config.batch_size, config.clones, config.grid, ratio, adjust, **drawn)
    block = config.mask_block_time, config.mask_block_freq
    return inverse_block_mask(config.batch_size * config.clones, config.grid, ratio, block, adjust, **drawn)


def draw_noise(config: PretrainConfig, step: int, clips: range, device: torch.device) -> Tensor:
    """What the decoder sees at masked places, for some clips of an update: (len(clips) * C, N, D)."""
    (H, W), generator = config.grid, torch.Generator(device)
    noise = torch.empty(len(clips), config.clones, H * W, MODELS[config.model].width, device=device)
    for row, clip in zip(noise, clips):
        generator.manual_seed(seed_of("noise", config.seed, step, clip))
        row.normal_(std=config.mask_noise, generator=generator)
    return noise.flatten(0, 1)


def draw_parts(
    batches: Iterator[Batch], sampler: ClipSampler, config: PretrainConfig, step: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's parts of an update: (spec (B, 1, F, M), mask (B*C, N), noise (B*C, N, D))."""
    masks = draw_masks(config, step, device).unflatten(0, (config.batch_size, config.clones))
    for part in range(config.accumulate):
        waveform, n_samples = (x.to(device, non_blocking=True) for x in next(batches)[:2])
        spec = spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)  # (B, 1, F, M)
        clips = sampler.rows(part)
        mask = masks[clips.start : clips.stop].flatten(0, 1)                        # (B*C, N)
        yield spec, mask, draw_noise(config, step, clips, device)


def train_step(
    model: nn.Module, teacher: Encoder, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], step: int, config: PretrainConfig, amp: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of student and teacher; `model` is the student EAT or the DistributedDataParallel around it.
    Returns loss, loss_frame, loss_utterance (means over the parts: all masks hide equally many patches),
    grad_norm (before clipping), and of the last part pred, targets, mask. Nothing here waits for the GPU."""
    student = getattr(model, "module", model)
    optimizer.param_groups[0]["lr"] = cosine_lr(step, config.lr, config.warmup, config.updates, config.min_lr)
    losses, share = 0.0, 1 / config.accumulate
    for i, (spec, mask, noise) in enumerate(parts, start=1):
        with accumulating(model, i < config.accumulate):
            with torch.autocast(spec.device.type, amp, enabled=amp != torch.float32):
                with torch.no_grad():
                    targets = make_targets(teacher.ffn_outputs(spec)[-config.target_layers :])  # (B, N, D)
                ids_keep = visible_ids(mask, count_visible(mask.shape[1], config.mask_ratio))   # (B*C, V)
                out = model(spec, mask, ids_keep, targets, noise, config.utterance_weight)
            scaler.scale(share * out["loss"]).backward()
        losses += share * torch.stack([out["loss"].detach(), out["loss_frame"], out["loss_utterance"]])
    grad_norm = descend(optimizer, scaler, student, config.clip_norm)
    ema_update(teacher, student.encoder, ema_decay(step + 1, config))
    return dict(zip(LOGGED, (*losses, grad_norm)), pred=out["pred"], targets=targets, mask=mask)


# ----- Pre-training ----------------------------------------------------------------------------------------


def open_inputs(config: PretrainConfig) -> tuple[AudioDataset, list[Labelled], EAT, Encoder]:
    """Check the settings against one another, and open what they name: data, probe sets, student, teacher."""
    try:
        draw_masks(dataclasses.replace(config, batch_size=1, clones=1), 0, torch.device("cpu"))  # may raise
        torch.manual_seed(config.seed)
        student = EAT(config.network)
    except ValueError as error:
        raise InputError(f"--clip_frames, --mask...: {error}") from None
    if config.target_layers > student.config.depth:
        raise InputError(f"--target_layers is above the {student.config.depth} blocks of {config.model}")
    if bool(config.probe_train) != bool(config.probe_test):
        raise InputError("probes need both --probe_train and --probe_test")
    data, sets = AudioDataset(config.data, config.clip_frames, config.min_samples).checked(), []
    for source in filter(None, (config.probe_train, config.probe_test)):
        sets.append(open_labelled(source, config.clip_frames, sets[0].classes if sets else None))
    teacher = copy.deepcopy(student.encoder)
    if config.init:
        with refusing(config.init):  # it may be of another size
            for own, initial in zip((student, teacher), EAT.from_pretrained(config.init)):
                own.load_state_dict(initial.state_dict())
    return data, sets, student, teacher


def train(config: PretrainConfig) -> int:
    """Run the pre-training that `config` describes, or go on with it; returns the exit status."""
    run = Run(config)
    data, probe_sets, student, teacher = open_inputs(config)
    student.to(run.device).train()
    teacher.to(run.device).eval().requires_grad_(False)
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(student.parameters(), 0.0, betas, weight_decay=decay, fused=True)

    # Resume: weights and optimizer from the newest checkpoint, clips from its update on
    saved = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=run.scaler)
    start = run.resume(saved, MAY_CHANGE, data_digest=data.digest())["step"]
    place = (run.rank, run.world, config.accumulate)
    sampler = ClipSampler(len(data), config.batch_size, config.seed, start, *place)
    n_short = len(data.too_short)
    run.say(f"model {config.model}; data {data.source}, {len(data):,} pieces, {n_short} clips too short")

    # Speed: compile in place, so that names of parameters stay; average gradients over processes
    if config.compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    model, batches = distribute(student), run.batches(data, sampler)

    def run_probe(step: int) -> None:
        if probe_sets:
            function = pooled(student.encoder, "cls_mean", student.config.depth)  # where training shows most
            run.log(step=step, **probe(function, config.network, *probe_sets, run.device, **run.loading))

    for step in run.steps(start, network=asdict(config.network)):
        if step == 0 or (config.probe_every and step % config.probe_every == 0):
            run_probe(step)
        parts = draw_parts(batches, sampler, config, step, run.device)
        out = train_step(model, teacher, optimizer, run.scaler, parts, step, config, run.amp)
        run.history.append({name: out[name] for name in LOGGED})
        step += 1  # from here on: completed updates
        if step == 1 or step % config.log_every == 0 or step == config.updates:
            times_masked = out["mask"].unflatten(0, (-1, config.clones)).sum(1)  # (B, N)
            target_std = masked_std(out["targets"].flatten(0, 1), times_masked.flatten())
            pred_std = masked_std(out["pred"].flatten(0, 1), out["mask"].flatten())
            run.log_training(
                step, epoch=step * config.batch_size / len(data), target_std=target_std, pred_std=pred_std,
                lr=optimizer.param_groups[0]["lr"], ema_decay=ema_decay(step, config),
            )  # fmt: skip
            if step > config.warmup and (target_std < 0.1 or pred_std < 0.01):  # the released code's defaults
                run.complain("the features have collapsed (see target_std)", stop=config.stop_on_collapse)
    if not run.status:
        run_probe(config.updates)
        run.say(f"done: {config.updates} updates; weights and curves are in {run.out_dir}")
    return run.status


# ----- The frame of a run, for finetune.py too: folder, checkpoints, log, stop. Nothing of EAT below -------


def descend(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, model: nn.Module, clip_norm: float
) -> Tensor:
    """Clip the gradients and step, unless one of them is not finite; returns their norm before clipping."""
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # where 1, fused AdamW leaves the weights alone
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def trim_log(path: Path, start: int) -> None:
    """Drop what was half-written, and what comes again: losses after update `start`, scores from it on."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    records = [(line, json.loads(line)) for line in lines if line.endswith("}") and line.rfind("{") == 0]
    write_lines(path, [line for line, r in records if r["step"] < start + ("loss" in r)])


class Run:
    """What every training has. Rank 0 writes; all processes call `resume`, `steps` and `log_training`."""

    def __init__(self, config, growth_interval: int = 4096):
        self.config, self.out_dir = config, Path(config.out_dir)
        self.rank, self.world, self.device = init_distributed(config.timeout)
        if not config.data:
            raise InputError("--data is missing: a manifest (python extras/prepare.py scan makes one)")
        if config.batch_size % (self.world * config.accumulate):
            parts = f"{self.world} processes x {config.accumulate} (--accumulate)"
            raise InputError(f"--batch_size {config.batch_size} does not divide by {parts}")
        self.precision, self.amp = pick_precision(config.amp, self.device)
        scaling = dict(growth_interval=growth_interval, enabled=self.precision == "fp16")
        self.scaler = torch.amp.GradScaler(self.device.type, 2.0**7, **scaling)  # as released
        self.loading = dict(workers=config.workers, timeout=0.9 * 60 * config.timeout)  # s; before others do
        self.status, self.reason = 0, ""  # exit status, above 0 to stop; and why
        self.history, self.n_skipped, self.n_read, self.n_bad, self.bad = [], 0, 0, 0, set()
        self.begun, self.seconds, self.waited, self.saved = 0.0, 0.0, 0.0, time.monotonic()

    def resume(self, parts: dict, may_change: list[str], **digests: str) -> dict:
        """Open the run folder; its newest checkpoint goes into `parts` and is returned. Raises InputError."""
        self.parts, self.settings = parts, asdict(self.config) | digests | dict(amp=self.precision)
        shared = [self.open_folder() if self.rank == 0 else None, self.settings]
        if self.world > 1:
            dist.broadcast_object_list(shared)
        path, settings = shared
        if settings != self.settings:
            raise InputError(f"process {self.rank} has other settings, data or precision than the first")
        state = load_checkpoint(path) if path else dict(step=0, settings=settings)
        old = state.get("settings", {})
        if changed := [k for k in settings | old if k not in may_change and old.get(k) != settings.get(k)]:
            diff = "; ".join(f"{k} was {old.get(k)}, now {settings.get(k)}" for k in changed)
            more = f"; to go on, --init {self.out_dir}" if "updates" in changed and "teacher" in parts else ""
            raise InputError(f"{self.out_dir} has other settings ({diff}): choose another --out_dir{more}")
        with refusing(path):
            for name, part in parts.items() if path else ():  # a new run loads nothing
                part.load_state_dict(state[name])
        if self.rank == 0:
            write_lines(self.out_dir / "config.json", [json.dumps(settings, indent=1)])
        begin = f"resuming at update {state['step']}" if path else "starting"
        self.say(f"{begin} in {self.out_dir}: {self.world} x {self.device.type}, {self.precision}")
        return state

    def open_folder(self) -> Path | None:
        """Make the run folder and lock it as long as this process lives; returns its newest checkpoint."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.out_dir.iterdir()}
        if names and not names & {"lock", "config.json"}:
            raise InputError(f"{self.out_dir} is not empty and holds no run: choose another --out_dir")
        self.lock = open(self.out_dir / "lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"another process is running in {self.out_dir}: wait for it") from None
            self.complain(f"no locks in {self.out_dir}: see that one process runs in it", stop=False)
        return newest_checkpoint(self.out_dir)

    def batches(self, data: AudioDataset, sampler: ClipSampler) -> Iterator[Batch]:
        """The sampler's batches; takes note of the time, and of the clips that cannot be used."""
        short = (data.manifest.fields(line)[0] for line in data.too_short.tolist())
        self.bad |= {f"{name}\tshorter than --min_samples {self.config.min_samples}" for name in short}
        loader = build_loader(data, sampler, pin_memory=self.device.type == "cuda", **self.loading)
        while True:
            begin = time.perf_counter()
            self.begun = self.begun or begin
            batch = next(loader)
            self.waited += time.perf_counter() - begin
            bad = [problem for problem in batch.problems if problem]
            self.n_read, self.n_bad = self.n_read + len(batch.items), self.n_bad + len(bad)
            self.bad.update(bad)
            yield batch

    def steps(self, start: int, **plain) -> Iterator[int]:
        """Yields the number of completed updates, from `start` on; the loop's body makes the next. Then all
        processes agree whether to stop, and a checkpoint, with the values `plain` too, is written if due."""

        def on_signal(number: int, _) -> None:
            signal.signal(number, signal.SIG_DFL)  # a second one is not so patient
            self.status = 128 + number  # as in shells; above 128 the run is saved first
            self.reason = f"stopped by {signal.Signals(number).name}; the same command goes on"

        self.plain, updates, save_every = plain, self.config.updates, self.config.save_every
        if self.rank == 0:
            trim_log(self.out_dir / "log.jsonl", start)
        before = {number: signal.signal(number, on_signal) for number in STOPPING}
        agreed, is_quiet = torch.tensor(0), self.rank > 0 or None  # None: off without a terminal
        for step in tqdm(range(start, updates), initial=start, total=updates, disable=is_quiet):
            begin = time.perf_counter()
            yield step
            agreed.fill_(self.status)
            if self.world > 1:
                dist.all_reduce(agreed, dist.ReduceOp.MAX)  # on the CPU: never waits for the GPU
            now, n_left = time.perf_counter(), updates - step - 1  # after it: here the slowest is waited for
            self.seconds, self.begun = self.seconds + now - self.begun, 0.0
            if step == start + 2:  # the first ones are slower
                days = min(1e5, n_left * (now - begin) / 86_400)
                end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + 86_400 * days))
                advice = f"\n{days:.0f} days: did you mean --preset demo, --model small?" if days > 3 else ""
                self.say(f"an update takes {now - begin:.2f} s: {n_left:,} more until {end}{advice}")
            is_time = time.monotonic() > self.saved + 60 * self.config.save_minutes
            if is_time or (step + 1) % save_every == 0 or step + 1 == updates or agreed > 128:
                self.save("last.pt", step + 1)
            if agreed:
                self.say(f"update {step + 1}: {self.reason or 'another process stops'}", sys.stderr)
                break
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.status > 128 and not agreed:  # it came after the last agreement: there is no update to finish
            signal.raise_signal(self.status - 128)
        self.status = int(agreed)

    def complain(self, problem: str, stop: bool = True) -> None:
        """Warn of a problem or, to `stop`, end the run after this update with exit status 1."""
        self.say(f"WARNING: {problem}")
        if stop and not self.status:
            self.status, self.reason = 1, problem

    def say(self, text: str, file=None) -> None:
        if self.rank == 0:
            tqdm.write(text, file=file)

    def save(self, name: str, step: int, **parts) -> Path | None:
        """Write a checkpoint, if rank 0 can: a full disk costs the checkpoint, not the run before its end."""
        if self.rank > 0:
            return None
        state = dict(step=step, settings=self.settings, **self.plain)
        state |= {name: part.state_dict() for name, part in (parts or self.parts).items()}
        self.saved = self.saved if parts else time.monotonic()  # a best.pt is none to go on from
        try:
            return save_checkpoint(self.out_dir / name, **state)
        except (OSError, RuntimeError) as error:
            problem = f"could not save update {step} in {self.out_dir} ({first_line(error)})"
            if step == self.config.updates or self.status:
                raise InputError(f"{problem}, the last checkpoint stands") from None
            self.complain(f"{problem}, the run goes on", stop=False)

    def log_training(self, step: int, **more) -> None:
        """Log the means of `history` over all processes since the last such line; stop a run that is ill."""
        names, c = list(self.history[0]), self.config
        rows = torch.stack([torch.stack([numbers[name] for name in names]) for numbers in self.history])
        sums, bad = torch.tensor([self.n_bad, self.n_read, self.waited]).double(), [self.bad] * self.world
        if self.world > 1:
            dist.all_reduce(rows), dist.all_reduce(sums), dist.all_gather_object(bad, self.bad)
        is_good, (n_bad, n_read, waited) = rows.isfinite().all(1), sums.tolist()
        means = (rows[is_good].mean(0) / self.world).tolist() if is_good.any() else [None] * len(names)
        seconds = self.seconds + time.perf_counter() - self.begun
        self.write("bad_files.tsv", sorted(set().union(*bad)) if self.rank == 0 else [])
        self.log(
            step=step, **dict(zip(names, means)), **more, skipped=int((~is_good).sum()), bad_clips=int(n_bad),
            clips_per_s=len(rows) * c.batch_size / seconds, step_ms=1000 * seconds / len(rows),
            minutes_left=(c.updates - step) * seconds / len(rows) / 60,
            data_wait=waited / self.world / seconds, gpu_memory_gib=torch.cuda.max_memory_allocated() / 2**30,
        )  # fmt: skip
        for good in is_good.tolist():
            self.n_skipped = 0 if good else self.n_skipped + 1
            if self.n_skipped == c.max_skipped:
                self.complain(f"{c.max_skipped} updates in a row had no finite gradient (lower --lr)")
        if n_read >= 100 and n_bad / n_read > c.max_bad_fraction:
            share = f"{n_bad / n_read:.0%} of the clips"
            self.complain(f"{share} cannot be used (--max_bad_fraction): see {self.out_dir}/bad_files.tsv")
        self.history, self.bad = [], set()
        self.begun, self.seconds, self.waited = time.perf_counter(), 0.0, 0.0

    def log(self, **record) -> None:
        """Add a JSON line to log.jsonl, and print what people watch."""
        if self.rank == 0:
            self.write("log.jsonl", [json.dumps(record)])
        shown = [(name, record[name]) for name in SHOWN if record.get(name) is not None]
        self.say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown))

    def write(self, name: str, lines: Iterable[str]) -> None:
        """Add the lines that are new to a file of the run folder; a full disk costs them, not the run."""
        path = self.out_dir / name
        try:
            old = set(read_lines(path))
            with open(path, "a", errors="surrogateescape") as file:
                file.write("".join(f"{line}\n" for line in lines if line not in old))
        except OSError as error:
            self.complain(f"could not write to {path}: {error}", stop=False)


if __name__ == "__main__":
    run_script(lambda: train(parse_config(PretrainConfig, PRESETS)))
