"""How fast is it here? Prints a table; run by hand:

    python tests/bench.py                                       base, one clip, and the loader: 10 minutes
    python tests/bench.py --model base --clips 12 --amp bf16    the paper's batch of one GPU
    python tests/bench.py --finetune as20k --clips 1            an update of fine-tuning, of a preset
    python tests/bench.py --tags --model demo                   tags of a 20-minute mp3 against its wav's
    python tests/bench.py --formats                             files to spectrograms, beside the released way
    python tests/bench.py --json bench.json                     the same numbers as JSON

Every figure is the median of several runs. What should not depend on the machine's mood is a ratio: the rate
of the update against that of a plain matrix product in the same process, the cost of a promise against the
update.
"""

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchaudio
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import data  # noqa: E402
import finetune  # noqa: E402
import listen  # noqa: E402
import pretrain  # noqa: E402
from evaluate import init_distributed, pick_precision  # noqa: E402
from masking import count_visible, visible_ids  # noqa: E402
from model import EAT, MODELS, AudioClassifier, ModelConfig, make_targets, save_checkpoint  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def n_visible(config: pretrain.PretrainConfig) -> int:
    return count_visible(config.grid[0] * config.grid[1], config.mask_ratio)


def median_seconds(function, runs: int = 5, warmup: int = 1) -> float:
    """Median time of a call, the GPU's work included."""
    times = []
    for _ in range(warmup + runs):
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def paced(update, flops: float, dtype: torch.dtype, runs: int) -> dict[str, float]:
    """An update's time and rate, beside that of a matrix product before each: a machine's speed drifts."""
    a, seconds, rates = torch.randn(1536, 1536, device=DEVICE, dtype=dtype), [], []
    update()
    for _ in range(runs):
        rates.append(2 * 1536**3 / median_seconds(lambda: a @ a, 20, 5))
        seconds.append(median_seconds(update, 1, 0))
    return {
        "update (s)": statistics.median(seconds),
        "update (TFLOP)": flops / 1e12,
        "update (GFLOP/s)": flops / statistics.median(seconds) / 1e9,
        "matrix product 1536^3 (GFLOP/s)": statistics.median(rates) / 1e9,
        "update / matrix product": statistics.median(flops / s / r for s, r in zip(seconds, rates)),
    }


def forward_flops(c: ModelConfig, tokens: int) -> float:
    """Multiply-adds of the encoder for one sequence, times 2: projections, and attention's two products."""
    return c.depth * (2 * tokens * (4 + 2 * c.mlp_ratio) * c.width**2 + 4 * tokens**2 * c.width)


def update_flops(config: pretrain.PretrainConfig) -> dict[str, float]:
    """Operations of an update: teacher forward; student and decoder forward and backward (3 x forward)."""
    c, n = config.network, config.grid[0] * config.grid[1]
    views = config.batch_size * config.clones
    conv = c.decoder_depth * 2 * c.width * (c.width // c.decoder_groups) * c.decoder_kernel**2
    return dict(
        teacher=config.batch_size * forward_flops(c, n + 1),
        student=3 * views * forward_flops(c, n_visible(config) + 1),
        decoder=3 * views * n * (conv + 2 * c.width**2),
    )


def make_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """As a run does."""
    is_half = pick_precision(amp, device)[0] == "fp16"
    return torch.amp.GradScaler(device.type, init_scale=2.0**7, enabled=is_half)


def make(config: pretrain.PretrainConfig, device: torch.device = DEVICE):
    """What train_step needs, as pretrain.py makes it: student, teacher, optimizer, scaler."""
    init_distributed()  # as a run does: keeps freed memory on a CPU, means fp32 by fp32 on a GPU
    torch.manual_seed(0)
    student = EAT(config.network).to(device)
    teacher = copy.deepcopy(student.encoder).requires_grad_(False)
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(student.parameters(), betas=betas, weight_decay=decay, fused=True)
    scaler = make_scaler(config.amp, device)
    if config.compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    return student, teacher, optimizer, scaler


def bench_update(config: pretrain.PretrainConfig, made, runs: int) -> dict[str, float]:
    """One update and its pieces, on noise of the right shape."""
    student, teacher, optimizer, scaler = made
    dtype = pick_precision(config.amp, DEVICE)[1]
    waveform = torch.randn(config.batch_size, data.clip_samples(config.clip_frames), device=DEVICE)
    n_samples = torch.full((config.batch_size,), waveform.shape[1], device=DEVICE)

    def front_end():
        return data.spectrogram(waveform, n_samples, config.norm_mean, config.norm_std)

    spec = front_end()
    mask = pretrain.draw_masks(config, 0, DEVICE)
    ids_keep = visible_ids(mask, n_visible(config))
    noise = pretrain.draw_noise(config, 0, range(config.batch_size), DEVICE)

    def autocast(function):
        def run():
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32), torch.no_grad():
                return function()

        return run

    parts, clips = [(spec, mask, noise)], range(config.batch_size)
    numbers = paced(
        lambda: pretrain.train_step(student, teacher, optimizer, scaler, parts, 1, config, dtype),
        sum(update_flops(config).values()), dtype, runs,
    )  # fmt: skip
    numbers |= {"clips/s": config.batch_size / numbers["update (s)"], "peak memory (GiB)": peak_memory()}
    tokens = autocast(lambda: student.encoder(spec, ids_keep))()
    pieces = {
        "front end": front_end,
        "masks": lambda: pretrain.draw_masks(config, 0, DEVICE),
        "noise": lambda: pretrain.draw_noise(config, 0, clips, DEVICE),
        "teacher and targets": autocast(lambda: make_targets(teacher.ffn_outputs(spec))),
        "student, forward": autocast(lambda: student.encoder(spec, ids_keep)),
        "decoder, forward": autocast(lambda: student.decoder(tokens[:, 1:], ids_keep, noise, config.grid)),
        "EMA": lambda: pretrain.ema_update(teacher, student.encoder, 0.9998),
    }
    pieces = {name: median_seconds(piece, runs) for name, piece in pieces.items()}
    pieces |= bench_backward(student, teacher, optimizer, parts[0], config, dtype, runs)
    numbers |= {f"  {name} (s)": seconds for name, seconds in pieces.items()}
    norm = torch.ones((), device=DEVICE)
    finite = median_seconds(lambda: (~norm.isfinite()).float(), 100, 10)
    with tempfile.TemporaryDirectory() as folder:
        parts = dict(student=student, teacher=teacher, optimizer=optimizer)
        state = {name: part.state_dict() for name, part in parts.items()}
        save = median_seconds(lambda: save_checkpoint(Path(folder, "last.pt"), **state), 3)
    seconds = numbers["update (s)"]
    return numbers | {
        "promise: checkpoint every --save_every, share of the update": save / config.save_every / seconds,
        "promise: finite gradients, share of the update": finite / seconds,
    }


def peak_memory() -> float:
    """Most memory this process has held, GiB: on the GPU, or resident if there is none."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def bench_backward(student, teacher, optimizer, part, config, dtype, runs: int) -> dict[str, float]:
    """The backward pass alone, and what follows it: gradient norm and optimizer."""
    spec, mask, noise = part
    ids_keep = visible_ids(mask, n_visible(config))
    with torch.no_grad():
        targets = make_targets(teacher.ffn_outputs(spec))
    backward, after = [], []
    for _ in range(runs + 1):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = student(spec, mask, ids_keep, targets, noise, config.utterance_weight)["loss"]
        backward.append(median_seconds(loss.backward, 1, 0))
        after.append(median_seconds(lambda: (
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm), optimizer.step(),
            optimizer.zero_grad(set_to_none=True),
        ), 1, 0))  # fmt: skip
    seconds, seconds_after = statistics.median(backward[1:]), statistics.median(after[1:])
    return {"backward": seconds, "gradient norm and optimizer": seconds_after}


def bench_finetune(config: finetune.FinetuneConfig, runs: int) -> dict[str, float]:
    """One update of fine-tuning, on noise of the right shape."""
    init_distributed()
    dtype, scaler = pick_precision(config.amp, DEVICE)[1], make_scaler(config.amp, DEVICE)
    network = dataclasses.replace(MODELS[config.model], drop_path=config.drop_path)
    model = AudioClassifier(network, {str(i): "" for i in range(527)}).to(DEVICE).train()
    optimizer = torch.optim.AdamW(finetune.layer_decay_groups(model, config), weight_decay=0.05, fused=True)
    if config.compile:
        model.compile()
    spec = torch.randn(config.batch_size, 1, config.clip_frames, data.MEL_BINS, device=DEVICE)
    y = (torch.rand(config.batch_size, 527, device=DEVICE) < 0.004).float()
    y[:, 0] = 1
    n = config.clip_frames // network.patch_size * (network.mel_bins // network.patch_size)
    numbers = paced(
        lambda: finetune.train_step(model, optimizer, scaler, [(spec, y)], 1, config, dtype),
        3 * config.batch_size * forward_flops(network, n + 1), dtype, runs,
    )  # fmt: skip
    numbers["clips/s"] = config.batch_size / numbers["update (s)"]
    return numbers | {"peak memory (GiB)": peak_memory()}


def bench_formats(runs: int) -> dict[str, float]:
    """Rate of files of ten seconds to spectrograms on one core, as a multiple of that of the released way, by
    format and in pairs: soundfile, torchaudio's resampling and Kaldi filterbank, a clip at a time."""
    torch.set_num_threads(1)
    init_distributed()
    options = dict(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=data.MEL_BINS)

    def released(paths: list[Path]) -> None:
        for path in paths:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            waveform = torchaudio.functional.resample(torch.from_numpy(samples.mean(1)), rate, 16_000)
            waveform = (waveform - waveform.mean())[None]
            torchaudio.compliance.kaldi.fbank(waveform, sample_frequency=16_000, dither=0.0, **options)

    def ours(paths: list[Path]) -> None:
        clips = [data.Clip(data.load_audio(path), 0, "") for path in paths]
        batch = data.collate(clips, data.CLIP_FRAMES)
        data.spectrogram(batch.waveform, batch.n_samples, 0.0, 1.0)

    numbers, noise = {}, torch.randn(10 * 48_000, 2).numpy() / 20
    forms = [("wav", 16_000, 1), ("wav", 44_100, 2), ("flac", 16_000, 1), ("flac", 44_100, 2)]
    forms += [("ogg", 44_100, 2), ("mp3", 44_100, 2), ("opus", 48_000, 1)]
    with tempfile.TemporaryDirectory() as folder:
        for kind, rate, channels in forms:
            path, times = Path(folder, f"{rate}.{kind}"), []
            form = dict(format="OGG", subtype="OPUS") if kind == "opus" else {}
            soundfile.write(path, noise[: 10 * rate, :channels], rate, **form)
            for _ in range(4 * runs):
                both = [functools.partial(way, [path] * 12) for way in (released, ours)]
                times.append([median_seconds(way, 1, 0) for way in both])
            ratio = statistics.median(theirs / own for theirs, own in times)
            numbers[f"rate / the released way: {kind}, {rate} Hz, {channels} channels"] = ratio
    return numbers


def bench_tags(model: str, runs: int, minutes: int = 20) -> dict[str, float]:
    """Tags of a long mp3, which is decoded in sequence, against those of its wav, in pairs."""
    init_distributed()
    torch.manual_seed(0)
    network = AudioClassifier(MODELS[model], {str(i): "" for i in range(527)}).to(DEVICE).eval()
    minute, seconds = torch.randn(60 * 16_000) / 20, dict(wav=[], mp3=[])
    with tempfile.TemporaryDirectory() as folder:
        for kind in seconds:
            soundfile.write(f"{folder}/long.{kind}", minute.repeat(minutes).numpy(), 16_000)
        for _ in range(runs):
            for kind, times in seconds.items():
                path = Path(folder, f"long.{kind}")
                times.append(median_seconds(lambda path=path: listen.tag(network, path, DEVICE), 1, 0))
    numbers = {f"tags of {minutes} minutes, {kind} (s)": statistics.median(t) for kind, t in seconds.items()}
    ratio = statistics.median(mp3 / wav for wav, mp3 in zip(*seconds.values()))
    return numbers | {"promise: tags of an mp3, times those of its wav (at most 1.5)": ratio}


def _reduce(rank: int, meeting: str, config: pretrain.PretrainConfig, answer) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    student, *_ = make(config, torch.device("cpu"))
    model = DistributedDataParallel(student, gradient_as_bucket_view=True, broadcast_buffers=False)
    started, sizes = [], []

    def hook(_, bucket):
        started.append(time.perf_counter())
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    spec = torch.randn(1, 1, config.clip_frames, data.MEL_BINS)
    mask = pretrain.draw_masks(config, 0, spec.device)
    ids_keep = visible_ids(mask, n_visible(config))
    noise = pretrain.draw_noise(config, 0, [0], spec.device)
    targets = torch.zeros(1, mask.shape[1], config.network.width)
    for _ in range(2):  # the order of the gradients is known from the second time on
        started.clear(), sizes.clear()
        loss = model(spec, mask, ids_keep, targets, noise, config.utterance_weight)["loss"]
        begin = time.perf_counter()
        loss.backward()
        seconds = time.perf_counter() - begin
    answer[rank] = torch.tensor([
        sum(sizes), len(sizes), (started[0] - begin) / seconds, (started[-1] - begin) / seconds,
        4 * sum(p.numel() for p in student.parameters()),
    ])  # fmt: skip


def bench_reduction(config: pretrain.PretrainConfig) -> dict[str, float]:
    """What two processes on CPUs tell each other in an update, and when."""
    answer = torch.zeros(2, 5, dtype=torch.float64).share_memory_()
    config = dataclasses.replace(config, batch_size=1, amp="fp32", compile=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_reduce, (f"{folder}/meeting", config, answer), nprocs=2)
    sent, buckets, first, last, computed = answer[0].tolist()
    return {
        "DDP: gradients averaged in an update (MB)": sent / 1e6,
        "DDP: 4 bytes x trainable parameters (MB)": computed / 1e6,
        "DDP: parts that these are sent in": buckets,
        "DDP: the first part starts after this share of the backward": first,
        "DDP: the last part starts after this share of the backward": last,
    }


def _agree(rank: int, meeting: str, answer) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    status = torch.tensor(0)

    def agree() -> bool:
        dist.all_reduce(status, dist.ReduceOp.MAX)
        return bool(status)

    answer[rank] = median_seconds(agree, 1000, 100)


def bench_agreement() -> float:
    """Time in which two processes agree whether to stop."""
    answer = torch.zeros(2).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_agree, (f"{folder}/meeting", answer), nprocs=2)
    return answer.max().item()


def private_mib(pid: int) -> float:
    """Memory of a process that it shares with no other, MiB (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def bench_data(config: pretrain.PretrainConfig, made, clips: int, workers: int, runs: int) -> dict:
    """Clips of 10 s from flac files and packed, against decoding alone; two million lines; a training."""
    with tempfile.TemporaryDirectory() as folder:
        noise = torch.randn(160_000, generator=torch.Generator().manual_seed(0)) / 20
        for i in range(clips):
            soundfile.write(f"{folder}/{i}.flac", noise.roll(1000 * i).numpy(), 16_000)
        data.write_lines(f"{folder}/m.tsv", [folder, *(f"{i}.flac\t160000" for i in range(clips))])
        lines = (f"{i % clips}.flac\t160000" for i in range(2_000_000))
        data.write_lines(f"{folder}/big.tsv", [folder, *lines])
        pack = [ROOT / "extras" / "prepare.py", "pack", f"{folder}/m.tsv", f"{folder}/packed.tsv"]
        subprocess.run([sys.executable, *pack, f"--workers={workers}"], check=True, stdout=sys.stderr)

        def decode():
            for i in range(clips):
                soundfile.read(f"{folder}/{i}.flac", dtype="float32")

        def load(source, n_batches):
            """Clips/s, and the most memory that a loader process has for itself, MiB."""
            dataset = data.AudioDataset(f"{folder}/{source}")
            sampler = data.ClipSampler(len(dataset), 12, seed=0)
            loader = iter(data.build_loader(dataset, sampler, workers))
            next(loader)  # the processes have started
            start = time.perf_counter()
            for _ in range(n_batches):
                next(loader)
            seconds = time.perf_counter() - start
            memory = max(private_mib(p.pid) for p in multiprocessing.active_children())
            return 12 * n_batches / seconds, memory

        def medians(source, n_batches):
            return (statistics.median(some) for some in zip(*(load(source, n_batches) for _ in range(3))))

        alone = clips / median_seconds(decode, 3)
        files, memory = medians("m.tsv", clips // 12)
        many, memory_of_many = medians("big.tsv", clips // 12)
        packed, _ = medians("packed.tsv", clips // 2)
        opening = median_seconds(lambda: data.AudioDataset(f"{folder}/big.tsv"), 3, 0)
        return {
            "decoding flac alone, one process (clips/s)": alone,
            f"loader, flac files, {workers} workers (clips/s)": files,
            f"loader, packed, {workers} workers (clips/s)": packed,
            "2,000,000 lines: opening (s)": opening,
            "2,000,000 lines: loader (clips/s)": many,
            "2,000,000 lines: memory that a worker adds (MiB)": memory_of_many - memory,
            "2,000,000 lines: start of pretrain.py to its first update (s)": first_update(config, folder),
            **bench_training(config, made, f"{folder}/packed.tsv", workers, runs),
        }


def bench_training(config, made, source: str, workers: int, runs: int) -> dict[str, float]:
    """Updates on audio that loaders read, as pretrain.py makes them: the share spent waiting for it."""
    dataset = data.AudioDataset(source)
    run = pretrain.Run(dataclasses.replace(config, data=source, workers=workers))
    sampler = data.ClipSampler(len(dataset), config.batch_size, seed=0)
    batches = run.batches(dataset, sampler)

    def update():
        parts = pretrain.draw_parts(batches, sampler, config, 1, DEVICE)
        pretrain.train_step(*made, parts, 1, config, run.amp)

    update()  # the loaders have started
    run.waited = 0.0
    seconds = [median_seconds(update, 1, 0) for _ in range(4 * runs)]
    return {
        "training from packed audio: update (s)": statistics.median(seconds),
        "training from packed audio: share spent waiting for data": run.waited / sum(seconds),
    }


def first_update(config: pretrain.PretrainConfig, folder: str) -> float:
    """Seconds from the start of pretrain.py to the log line of its first update, with two million lines."""
    flags = dict(data=f"{folder}/big.tsv", out_dir=f"{folder}/run", model=config.model, clones=config.clones)
    flags |= dict(batch_size=config.batch_size, amp=config.amp, updates=2, warmup=0)
    words = [f"--{name}={value}" for name, value in flags.items()]
    command, start = [sys.executable, "-u", ROOT / "pretrain.py", *words], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1 "):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise RuntimeError("pretrain.py ended before its first update")


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

    config = dataclasses.replace(
        pretrain.PretrainConfig(), model=args.model, batch_size=args.clips, clones=args.clones,
        amp=args.amp, compile=args.compile,
    )  # fmt: skip
    if args.finetune:
        numbers = bench_finetune(finetune.FinetuneConfig(**finetune.PRESETS[args.finetune] | dict(
            model=args.model, batch_size=args.clips, amp=args.amp, compile=args.compile,
        )), args.runs)  # fmt: skip
    elif args.tags:
        numbers = bench_tags(args.model, args.runs)
    elif args.formats:
        numbers = bench_formats(args.runs)
    else:
        made = make(config)
        numbers = bench_update(config, made, args.runs)
        share = bench_agreement() / numbers["update (s)"]
        numbers["promise: agreement on a stop, share of the update"] = share
        numbers |= bench_data(config, made, 240, args.workers, args.runs)
        del made
        numbers |= bench_reduction(config)
    threads = f"{torch.get_num_threads()} CPU threads"
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else threads
    what = f"fine-tuning ({args.finetune})" if args.finetune else f"{args.clones} clones"
    what = "tags" if args.tags else "formats" if args.formats else what
    print(f"\n{args.model}, {args.clips} clips, {what}, {args.amp}, {device}, torch {torch.__version__}")
    for name, value in numbers.items():
        print(f"{name:62s} {value:12.4g}")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(vars(args), device=device, **numbers), indent=1) + "\n")


if __name__ == "__main__":
    main()
