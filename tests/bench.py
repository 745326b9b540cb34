"""How fast is it here? Prints a table; run by hand:

    python tests/bench.py                                       base, one clip, and the loader: 10 minutes
    python tests/bench.py --model base --clips 12 --amp bf16    the paper's batch of one GPU
    python tests/bench.py --finetune as20k --clips 1            an update of fine-tuning, of a preset
    python tests/bench.py --tags --model demo                   tags of a 20-minute mp3 against its wav's
    python tests/bench.py --formats                             files to spectrograms, beside the released way
    python tests/bench.py --json bench.json                     the same numbers as JSON

Every figure is the median of several runs. What should depend little on how busy the machine is is a ratio:
the rate of the update to that of a matrix product in the same process, the cost of a promise to the update.
"""

import argparse
import dataclasses
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchaudio
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import finetune  # noqa: E402
import pretrain  # noqa: E402
from evaluate import init_distributed, save_checkpoint  # noqa: E402
from masking import count_visible, visible_ids  # noqa: E402
from model import EAT, MODELS, AudioClassifier, Encoder, ModelConfig, make_targets  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = {str(i): "" for i in range(527)}  # as many as AudioSet has
FORMS = ["wav 16000 1", "wav 44100 2", "flac 16000 1", "flac 44100 2", "ogg 44100 2", "mp3 44100 2"]
FORMS += ["opus 48000 1"]  # name, Hz, channels
Numbers = dict[str, float]


def seconds_of(function: Callable) -> float:
    """Time of one call, the GPU's work included."""
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(function: Callable, runs: int = 5, warmup: int = 1) -> float:
    """Median time of a call, after `warmup` that do not count."""
    times = [seconds_of(function) for _ in range(warmup + runs)]
    return statistics.median(times[warmup:])


def rate_of(update: Callable, clips: int, flops: float, dtype: torch.dtype, runs: int) -> Numbers:
    """Time and rate of an update, with that of a matrix product before each: a machine's speed drifts."""
    a = torch.randn(1536, 1536, device=DEVICE, dtype=dtype)
    seconds = []
    rates = []
    update()
    for _ in range(runs):
        rates.append(2 * 1536**3 / median_seconds(partial(torch.matmul, a, a), 20, 5))
        seconds.append(seconds_of(update))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes, on Linux
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "update (s)": statistics.median(seconds),
        "update (TFLOP)": flops / 1e12,
        "update (GFLOP/s)": flops / statistics.median(seconds) / 1e9,
        "matrix product 1536^3 (GFLOP/s)": statistics.median(rates) / 1e9,
        "update / matrix product": statistics.median(flops / s / r for s, r in zip(seconds, rates)),
        "clips/s": clips / statistics.median(seconds),
        "peak memory (GiB)": peak / 2**30,
    }


def encoder_flops(c: ModelConfig, tokens: int) -> float:
    """Multiply-adds of the encoder for one sequence, times 2: projections, and attention's two products."""
    return c.depth * (2 * tokens * (4 + 2 * c.mlp_ratio) * c.width**2 + 4 * tokens**2 * c.width)


def update_flops(config: pretrain.PretrainConfig, c: ModelConfig) -> dict[str, float]:
    """Operations of an update: teacher forward; student and decoder forward and backward (3 x forward)."""
    H, W = c.grid(config.clip_frames)
    views = config.batch_size * config.clones
    conv = c.decoder_depth * 2 * c.width * (c.width // c.decoder_groups) * c.decoder_kernel**2
    teacher = config.batch_size * encoder_flops(c, H * W + 1)
    student = 3 * views * encoder_flops(c, count_visible(H * W, config.mask_ratio) + 1)
    decoder = 3 * views * H * W * (conv + 2 * c.width**2)
    return dict(teacher=teacher, student=student, decoder=decoder)


# ----- An update -------------------------------------------------------------------------------------------


def make(config: pretrain.PretrainConfig, student: EAT, teacher: Encoder) -> pretrain.Run:
    """A run with what train_step needs in its parts, as pretrain.py makes it."""
    run = pretrain.Run(config)
    student.to(DEVICE)
    teacher.to(DEVICE).eval().requires_grad_(False)
    optimizer = run.optimizer(student.parameters())
    run.stateful = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=run.scaler)
    if config.compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    return run


def update(run: pretrain.Run, parts) -> None:
    """One update of pre-training."""
    student, teacher, optimizer, scaler = run.stateful.values()
    pretrain.train_step(student, teacher, optimizer, scaler, parts, 1, run.config, run.amp)


def draw_part(config: pretrain.PretrainConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise as all clips of an update: spec, mask, noise."""
    waveform = torch.randn(config.batch_size, data.clip_samples(config.clip_frames))
    n_samples = torch.full((config.batch_size,), waveform.shape[1])
    batch = data.Batch(waveform, n_samples, [], [])
    sampler = data.ClipSampler(config.batch_size, config.batch_size, seed=0)
    return next(pretrain.draw_parts(iter([batch]), sampler, config, 0, device))


def bench_update(run: pretrain.Run, runs: int) -> Numbers:
    """One update, its pieces, and what two promises of a run cost."""
    part = draw_part(run.config, DEVICE)
    flops = sum(update_flops(run.config, run.stateful["student"].config).values())
    numbers = rate_of(partial(update, run, [part]), run.config.batch_size, flops, run.amp, runs)
    for name, seconds in bench_pieces(run, *part, runs).items():
        numbers[f"  {name} (s)"] = seconds
    norm = torch.ones((), device=DEVICE)
    finite = median_seconds(lambda: (~norm.isfinite()).float(), 100, 10)
    with tempfile.TemporaryDirectory() as folder:
        state = {name: part.state_dict() for name, part in run.stateful.items()}
        save = median_seconds(partial(save_checkpoint, Path(folder, "last.pt"), **state), 3)
    promise = "promise: checkpoint every --save_every, share of the update"
    numbers[promise] = save / run.config.save_every / numbers["update (s)"]
    numbers["promise: finite gradients, share of the update"] = finite / numbers["update (s)"]
    return numbers


def bench_pieces(run: pretrain.Run, spec: Tensor, mask: Tensor, noise: Tensor, runs: int) -> Numbers:
    """Seconds of the pieces of an update."""
    config = run.config
    student, teacher, optimizer, scaler = run.stateful.values()
    waveform = torch.randn(len(spec), data.clip_samples(config.clip_frames), device=DEVICE)
    n_samples = torch.full((len(spec),), waveform.shape[1], device=DEVICE)
    ids_keep = visible_ids(mask, count_visible(mask.shape[1], config.mask_ratio))
    grid = student.config.grid(config.clip_frames)
    autocast = torch.autocast(DEVICE.type, run.amp, enabled=run.amp != torch.float32)
    with torch.no_grad(), autocast:
        tokens = student.encoder(spec, ids_keep)[:, 1:]
        targets = make_targets(teacher.ffn_outputs(spec))
        pieces = {
            "front end": partial(data.spectrogram, waveform, n_samples, config.norm_mean, config.norm_std),
            "masks": partial(pretrain.draw_masks, config, 0, DEVICE),
            "noise": partial(pretrain.draw_noise, config, 0, range(len(spec)), DEVICE),
            "teacher and targets": lambda: make_targets(teacher.ffn_outputs(spec)),
            "student, forward": partial(student.encoder, spec, ids_keep),
            "decoder, forward": partial(student.decoder, tokens, ids_keep, noise, grid),
            "EMA": partial(pretrain.ema_update, teacher, student.encoder, 0.9998),
        }
        seconds = {name: median_seconds(piece, runs) for name, piece in pieces.items()}
    backward = []
    after = []
    for _ in range(runs + 1):
        with autocast:
            loss = student(spec, mask, ids_keep, targets, noise, config.utterance_weight)["loss"]
        backward.append(seconds_of(scaler.scale(loss).backward))
        after.append(seconds_of(partial(pretrain.descend, optimizer, scaler, student, config.clip_norm)))
    seconds["backward"] = statistics.median(backward[1:])
    seconds["gradient norm and optimizer"] = statistics.median(after[1:])
    return seconds


def bench_finetune(config: finetune.FinetuneConfig, runs: int) -> Numbers:
    """One update of fine-tuning, on noise."""
    config = finetune.fit_to_network(config, MODELS[config.model])
    run = pretrain.Run(config)
    network = dataclasses.replace(
        MODELS[config.model], drop_path=config.drop_path, clip_frames=config.clip_frames
    )  # fmt: skip
    model = AudioClassifier(network, CLASSES, config.pooling).to(DEVICE).train()
    optimizer = run.optimizer(finetune.layer_decay_groups(model, config))
    if config.compile:
        model.compile()
    spec = torch.randn(config.batch_size, 1, config.clip_frames, network.mel_bins, device=DEVICE)
    y = (torch.rand(config.batch_size, len(CLASSES), device=DEVICE) < 0.004).float()
    y[:, 0] = 1
    H, W = network.grid(config.clip_frames)
    flops = 3 * config.batch_size * encoder_flops(network, H * W + 1)
    step = partial(finetune.train_step, model, optimizer, run.scaler, [(spec, y)], 1, config, run.amp)
    return rate_of(step, config.batch_size, flops, run.amp, runs)


# ----- Audio -----------------------------------------------------------------------------------------------


def released_way(paths: list[Path]) -> None:
    """Files to spectrograms by torchaudio's resampling and Kaldi filterbank, a clip at a time."""
    options = dict(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=data.MEL_BINS)
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waveform = torchaudio.functional.resample(torch.from_numpy(samples.mean(1)), rate, 16_000)
        waveform = (waveform - waveform.mean())[None]
        torchaudio.compliance.kaldi.fbank(waveform, sample_frequency=16_000, dither=0.0, **options)


def own_way(paths: list[Path]) -> None:
    """Files to spectrograms as a run makes them."""
    clips = [data.Clip(data.load_audio(path), 0, "") for path in paths]
    batch = data.collate(clips, data.CLIP_FRAMES)
    data.spectrogram(batch.waveform, batch.n_samples, 0.0, 1.0)


def bench_formats(runs: int) -> Numbers:
    """Rate of files to spectrograms on one core, as a multiple of that of the released way, in pairs."""
    torch.set_num_threads(1)
    init_distributed()
    noise = torch.randn(10 * 48_000, 2).numpy() / 20
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            kind, rate, channels = form.split()
            path = Path(folder, f"{rate}.{kind}")
            options = dict(format="OGG", subtype="OPUS") if kind == "opus" else {}
            soundfile.write(path, noise[: 10 * int(rate), : int(channels)], int(rate), **options)
            ratios = []
            for _ in range(4 * runs):
                released = seconds_of(partial(released_way, [path] * 12))
                ratios.append(released / seconds_of(partial(own_way, [path] * 12)))
            name = f"rate / the released way: {kind}, {rate} Hz, {channels} channels"
            numbers[name] = statistics.median(ratios)
    return numbers


def bench_tags(model: str, runs: int) -> Numbers:
    """Tags of a long mp3, which is decoded in sequence, against those of its wav, in pairs."""
    from extras import listen

    init_distributed()
    torch.manual_seed(0)
    network = AudioClassifier(MODELS[model], CLASSES).to(DEVICE).eval()
    noise = torch.randn(60 * 16_000).repeat(20).numpy() / 20
    seconds = dict(wav=[], mp3=[])
    with tempfile.TemporaryDirectory() as folder:
        for kind in seconds:
            soundfile.write(f"{folder}/long.{kind}", noise, 16_000)
        for _ in range(runs):
            for kind, times in seconds.items():
                times.append(seconds_of(partial(listen.tag, network, Path(folder, f"long.{kind}"), DEVICE)))
    ratio = statistics.median(mp3 / wav for wav, mp3 in zip(*seconds.values()))
    return {
        "tags of 20 minutes, wav (s)": statistics.median(seconds["wav"]),
        "tags of 20 minutes, mp3 (s)": statistics.median(seconds["mp3"]),
        "promise: tags of an mp3, times those of its wav (at most 1.5)": ratio,
    }


def write_clips(folder: str, n_clips: int) -> None:
    """Clips of 10 s as flac files (m.tsv), the same packed (packed.tsv), and two million lines (big.tsv)."""
    noise = torch.randn(160_000, generator=torch.Generator().manual_seed(0)) / 20
    lines = [f"{i}.flac\t160000" for i in range(n_clips)]
    with open(f"{folder}/packed.pcm", "wb") as packed:
        for i in range(n_clips):
            samples = (32768 * noise.roll(1000 * i).numpy()).astype(np.int16)
            soundfile.write(f"{folder}/{i}.flac", samples, 16_000)
            packed.write(samples.tobytes())
    data.write_lines(f"{folder}/m.tsv", [folder, *lines])
    data.write_lines(f"{folder}/packed.tsv", ["packed.pcm", *lines])
    data.write_lines(f"{folder}/big.tsv", [folder, *(lines[i % n_clips] for i in range(2_000_000))])


def load(source: str, workers: int) -> Iterator[data.Batch]:
    """Endless batches of 12 clips, once the threads have started."""
    clips = data.AudioDataset(source)
    loader = data.build_loader(clips, data.ClipSampler(len(clips), 12, seed=0), workers)
    next(loader)
    return loader


def take(loader: Iterator, n_batches: int) -> None:
    for _ in range(n_batches):
        next(loader)


def clips_per_second(source: str, workers: int, n_batches: int) -> float:
    """Rate of a loader, the median of three."""
    rates = []
    for _ in range(3):
        loader = load(source, workers)
        rates.append(12 * n_batches / seconds_of(partial(take, loader, n_batches)))
        loader.close()
    return statistics.median(rates)


def bench_loader(folder: str, n_clips: int, workers: int) -> Numbers:
    """The loader's rates, and that of decoding alone."""

    def decode() -> None:
        for i in range(n_clips):
            soundfile.read(f"{folder}/{i}.flac", dtype="float32")

    numbers = {"decoding flac alone, one thread (clips/s)": n_clips / median_seconds(decode, 3)}
    for name, source, n_batches in (
        (f"loader, flac files, {workers} workers (clips/s)", "m.tsv", n_clips // 12),
        (f"loader, packed, {workers} workers (clips/s)", "packed.tsv", n_clips // 2),
        ("2,000,000 lines: loader (clips/s)", "big.tsv", n_clips // 12),
    ):
        numbers[name] = clips_per_second(f"{folder}/{source}", workers, n_batches)
    return numbers


def resident(field: str) -> float:
    """Memory of this process, MiB: now (VmRSS) or at most (VmHWM). Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def _open(_: int, source: str, answer: Tensor) -> None:
    before = resident("VmRSS")
    answer[0] = seconds_of(partial(data.AudioDataset, source))
    answer[1] = resident("VmHWM") - before


def bench_opening(folder: str) -> Numbers:
    """What opening two million lines takes, in new processes."""
    answers = torch.zeros(3, 2).share_memory_()
    for answer in answers:
        mp.spawn(_open, (f"{folder}/big.tsv", answer), nprocs=1)
    seconds, memory = answers.median(0).values.tolist()
    return {
        "2,000,000 lines: opening (s)": seconds,
        "2,000,000 lines: memory that opening adds to the process (MiB)": memory,
    }


def first_update(config: pretrain.PretrainConfig, folder: str) -> float:
    """Seconds from the start of pretrain.py to the log line of its first update, with two million lines."""
    flags = dict(data=f"{folder}/big.tsv", out_dir=f"{folder}/run", model=config.model, clones=config.clones)
    flags |= dict(batch_size=config.batch_size, amp=config.amp, updates=2, warmup=0)
    command = [sys.executable, "-u", str(ROOT / "pretrain.py")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1 "):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise RuntimeError("pretrain.py ended before its first update")


def bench_training(run: pretrain.Run, source: str, runs: int) -> Numbers:
    """Updates on audio that a loader reads, as pretrain.py makes them: the share spent waiting for it."""
    clips = data.AudioDataset(source)
    sampler = run.sampler(clips)
    batches = run.load(clips, sampler)

    def train() -> None:
        update(run, pretrain.draw_parts(batches, sampler, run.config, 1, DEVICE))

    train()  # the threads have started
    run.waited = 0.0
    seconds = [seconds_of(train) for _ in range(4 * runs)]
    batches.close()
    return {
        "training from packed audio: update (s)": statistics.median(seconds),
        "training from packed audio: share spent waiting for data": run.waited / sum(seconds),
    }


def tiny_update() -> Callable:
    """An eager update of 12 blocks whose tensors are so small that its time is the host's."""
    config = pretrain.PretrainConfig(
        data="noise", model="tiny", clip_frames=128, mask_block_time=2, mask_block_freq=2, batch_size=1,
        clones=2, amp="fp32",
    )  # fmt: skip
    network = dataclasses.replace(MODELS["tiny"], depth=12, clip_frames=128)
    run = make(config, EAT(network), Encoder(network))
    return partial(update, run, [draw_part(config, DEVICE)])


def host_seconds(function: Callable, loader: Iterator) -> tuple[float, float]:
    """Mean host time of an update that takes a batch first, and the batches/s meanwhile."""
    seconds = 0.0
    start = time.perf_counter()
    for _ in range(50):
        next(loader)
        begin = time.perf_counter()
        function()
        seconds += time.perf_counter() - begin
    return seconds / 50, 50 / (time.perf_counter() - start)


def bench_host(folder: str, workers: int, runs: int) -> Numbers:
    """What loader threads, which share Python's lock with it, cost the thread that starts kernels."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    function = tiny_update()
    host_seconds(function, itertools.repeat(None))  # warm up
    rows = []
    for _ in range(2 * runs):
        alone, _ = host_seconds(function, itertools.repeat(None))
        row = [alone]
        for source in ("packed.tsv", "m.tsv"):
            loader = load(f"{folder}/{source}", workers)
            seconds, rate = host_seconds(function, loader)
            loader.close()
            row += [seconds / alone, 12 * rate]
        rows.append(row)
    torch.set_num_threads(n_threads)
    beside = f"host time beside {workers} loader threads"
    names = [
        "host time of an eager update of 12 blocks, alone (s)", f"{beside}, packed / alone",
        "  packed clips/s meanwhile", f"{beside}, flac / alone", "  flac clips/s meanwhile",
    ]  # fmt: skip
    return {name: statistics.median(column) for name, column in zip(names, zip(*rows))}


# ----- Two processes ---------------------------------------------------------------------------------------


def _meet(rank: int, meeting: str, config: pretrain.PretrainConfig, answer: Tensor) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    status = torch.tensor(0)

    def agree() -> bool:
        dist.all_reduce(status, dist.ReduceOp.MAX)
        return bool(status)

    agreement = median_seconds(agree, 1000, 100)
    student, _ = pretrain.open_networks(config)
    model = DistributedDataParallel(student, gradient_as_bucket_view=True, broadcast_buffers=False)
    started = []
    sizes = []

    def hook(_, bucket):
        started.append(time.perf_counter())
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    spec, mask, noise = draw_part(config, torch.device("cpu"))
    ids_keep = visible_ids(mask, count_visible(mask.shape[1], config.mask_ratio))
    targets = torch.zeros(1, mask.shape[1], student.config.width)
    for _ in range(2):  # the order of the gradients is known from the second time on
        started.clear()
        sizes.clear()
        loss = model(spec, mask, ids_keep, targets, noise, config.utterance_weight)["loss"]
        begin = time.perf_counter()
        loss.backward()
        seconds = time.perf_counter() - begin
    first = (started[0] - begin) / seconds
    last = (started[-1] - begin) / seconds
    n_bytes = 4 * sum(p.numel() for p in student.parameters())
    answer[rank] = torch.tensor([agreement, sum(sizes) / 1e6, n_bytes / 1e6, len(sizes), first, last])


def bench_processes(config: pretrain.PretrainConfig, update_seconds: float) -> Numbers:
    """What two processes on CPUs tell each other in an update, and when."""
    answer = torch.zeros(2, 6, dtype=torch.float64).share_memory_()
    config = dataclasses.replace(config, batch_size=1, amp="fp32", compile=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_meet, (f"{folder}/meeting", config, answer), nprocs=2)
    agreement, *reduction = answer[0].tolist()
    names = [
        "DDP: gradients averaged in an update (MB)", "DDP: 4 bytes x trainable parameters (MB)",
        "DDP: parts that these are sent in", "DDP: the first part starts after this share of the backward",
        "DDP: the last part starts after this share of the backward",
    ]  # fmt: skip
    promise = "promise: agreement on a stop, share of the update"
    return dict(zip(names, reduction)) | {promise: agreement / update_seconds}


# ----- Command line ----------------------------------------------------------------------------------------


def bench_pretraining(config: pretrain.PretrainConfig, workers: int, runs: int) -> Numbers:
    """An update of pre-training, and everything around it."""
    run = make(config, *pretrain.open_networks(config))
    numbers = bench_update(run, runs)
    with tempfile.TemporaryDirectory() as folder:
        write_clips(folder, 240)
        numbers |= bench_loader(folder, 240, workers)
        numbers |= bench_opening(folder)
        start = "2,000,000 lines: start of pretrain.py to its first update (s)"
        numbers[start] = first_update(config, folder)
        numbers |= bench_training(run, f"{folder}/packed.tsv", runs)
        numbers |= bench_host(folder, workers, runs)
    del run
    return numbers | bench_processes(config, numbers["update (s)"])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="base")
    parser.add_argument("--finetune", default="", choices=["", *finetune.PRESETS], help="its update instead")
    parser.add_argument("--tags", action="store_true", help="those of a long mp3 and its wav instead")
    parser.add_argument("--formats", action="store_true", help="reading and front end by format instead")
    parser.add_argument("--clips", type=int, default=1, help="clips per update")
    parser.add_argument("--clones", type=int, default=16)
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    settings = dict(
        data="noise", model=args.model, batch_size=args.clips, amp=args.amp, compile=args.compile,
        workers=args.workers,
    )  # fmt: skip
    if args.finetune:
        what = f"fine-tuning ({args.finetune})"
        config = finetune.FinetuneConfig(**finetune.PRESETS[args.finetune] | settings)
        numbers = bench_finetune(config, args.runs)
    elif args.tags:
        what = "tags"
        numbers = bench_tags(args.model, args.runs)
    elif args.formats:
        what = "formats"
        numbers = bench_formats(args.runs)
    else:
        what = f"{args.clones} clones"
        config = pretrain.PretrainConfig(clones=args.clones, **settings)
        numbers = bench_pretraining(config, args.workers, args.runs)
    device = f"{torch.get_num_threads()} CPU threads"
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_name()
    print(f"\n{args.model}, {args.clips} clips, {what}, {args.amp}, {device}, torch {torch.__version__}")
    for name, value in numbers.items():
        print(f"{name:64s} {value:12.4g}")
    if args.json:
        record = vars(args) | dict(device=device) | numbers
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
