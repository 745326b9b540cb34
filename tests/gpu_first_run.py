"""The first half hour on one GPU, in four parts of at most 9 minutes each:

    python tests/gpu_first_run.py kernels OUT    ceilings, attention, layouts of the decoder's convolution
    python tests/gpu_first_run.py agree OUT      the first base update: CPU = GPU in every type, compiled too
    python tests/gpu_first_run.py updates OUT    an update in its variants: time, memory by clips, profiles
    python tests/gpu_first_run.py ddp OUT        NCCL; an overflow; 300 updates with a stop; fine-tuning

Each part writes what it found to OUT/PART.json; its exit status is 1 if something that must hold does not.
Without a GPU it runs the same lines at a tiny size.
"""

import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
BF16 = torch.bfloat16
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else ".")
SIZE = dict(rows=192, T=103, H=64, W=8, D=768, M=8192) if GPU else dict(rows=4, T=9, H=8, W=4, D=64, M=64)
found: dict[str, float | str] = {}
broken: list[str] = []


def note(name: str, value) -> None:
    found[name] = value
    print(f"{name:66s} {value:10.4g}" if isinstance(value, float) else f"{name:66s} {value}", flush=True)
    (OUT / f"{sys.argv[1]}.json").write_text(json.dumps(found, indent=1))


def check(name: str, value, holds: bool) -> None:
    """Note what must hold."""
    note(name, value)
    if not holds:
        broken.append(name)


def ms(function, runs: int = 20, warmup: int = 5) -> float:
    """Median milliseconds on the device, of `runs` calls timed one by one with events."""
    for _ in range(warmup if GPU else 0):
        function()
    if not GPU:
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * runs)]
    pairs = list(zip(events[::2], events[1::2]))
    for begin, end in pairs:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def backward(loss_of, *leaves):
    """A call that runs forward and backward of loss_of."""

    def run():
        for x in leaves:
            x.grad = None
        out = loss_of()
        out.backward(torch.ones_like(out))

    return run


def kernels() -> None:
    """Ceilings, attention and the decoder's convolution, each in every way that there is."""
    square = torch.randn(SIZE["M"], SIZE["M"], device=DEVICE, dtype=BF16)
    note("matrix product (TFLOP/s)", 2e-9 * SIZE["M"] ** 3 / ms(lambda: square @ square))
    big = torch.empty(2**28 if GPU else 2**16, device=DEVICE)
    note("copy, read + written (GB/s)", 2e-6 * big.nbytes / ms(lambda: big.clone()))
    rows, T, D = SIZE["rows"], SIZE["T"], SIZE["D"]
    for name, b, t in (("student", rows, T), ("teacher", max(1, rows // 16), 513 if GPU else 17)):
        qkv = torch.randn(b, t, 3, D // 64, 64, device=DEVICE, dtype=BF16, requires_grad=True)

        def attention(qkv=qkv):
            return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)

        double = qkv.detach().double().permute(2, 0, 3, 1, 4)
        exact = F.scaled_dot_product_attention(*double.unbind(0)).transpose(1, 2)
        if GPU:
            q = qkv.detach().permute(2, 0, 3, 1, 4)
            note(f"attention, {name}: chosen", str(SDPBackend(torch._fused_sdp_choice(q[0], q[1], q[2]))))
        for backend in (None, *((SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if GPU else ())):
            context = sdpa_kernel(backend) if backend else contextlib.nullcontext()
            with context:
                label = f"attention, {name}, {backend.name if backend else 'default'}"
                note(f"{label}: forward + backward (ms)", ms(backward(attention, qkv)))
                error = (attention().double() - exact).norm() / exact.norm()
                note(f"{label}: error, gradient finite", f"{error:.1e} {bool(qkv.grad.isfinite().all())}")
    H, W, groups = SIZE["H"], SIZE["W"], 16
    x = torch.randn(rows, H, W, D, device=DEVICE, dtype=BF16, requires_grad=True)
    weight = torch.randn(D, D // groups, 3, 3, device=DEVICE, dtype=BF16, requires_grad=True)
    bias = torch.randn(D, device=DEVICE, dtype=BF16, requires_grad=True)
    flops = 2 * 9 * x.numel() * D // groups
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        for layout in ("NHWC", "NCHW"):

            def convolve(layout=layout):
                y = x.permute(0, 3, 1, 2)
                y = y.contiguous() if layout == "NCHW" else y
                return F.conv2d(y, weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1).contiguous()

            with torch.no_grad():
                forward = ms(convolve)
            both = ms(backward(convolve, x, weight, bias))
            note(f"decoder layer, {layout}, benchmark {benchmark}: forward (ms)", forward)
            note(f"decoder layer, {layout}, benchmark {benchmark}: forward + backward (ms)", both)
            note(f"decoder layer, {layout}, benchmark {benchmark}: (TFLOP/s)", 3e-9 * flops / both)
    torch.backends.cudnn.benchmark = False


def setting(**change):
    base = dict(batch_size=12) if GPU else dict(
        model="tiny", clip_frames=64, batch_size=2, clones=2, mask_block_time=2, mask_block_freq=2
    )  # fmt: skip
    return dataclasses.replace(pretrain.PretrainConfig(), **base | dict(amp="bf16", warmup=0) | change)


def batches(config):
    """The same clips in every update, in as many parts as it has."""
    generator = torch.Generator().manual_seed(0)
    samples = data.clip_samples(config.clip_frames)
    waveform = 0.1 * torch.randn(config.batch_size, samples, generator=generator)
    for part in itertools.cycle(waveform.chunk(config.accumulate)):
        n_samples = torch.full((len(part),), samples)
        yield data.Batch(part, n_samples, [0] * len(part), [""] * len(part))


def make(config):
    """Student, teacher, optimizer, scaler, as pretrain.py has them."""
    student, teacher = pretrain.open_networks(config)
    student.to(DEVICE).train()
    teacher.to(DEVICE).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**7, enabled=config.amp == "fp16")
    if config.compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    return student, teacher, optimizer, scaler


def whole_update(config, student, teacher, optimizer, scaler, wrapped=None):
    """A call that makes one update as pretrain.py does, from waveforms on."""
    sampler = data.ClipSampler(1000, config.batch_size, 0, accumulate=config.accumulate)
    feed = batches(config)
    numbers = itertools.count()
    amp = evaluate.pick_precision(config.amp, DEVICE)

    def run():
        step = next(numbers)
        parts = pretrain.draw_parts(feed, sampler, config, step, DEVICE)
        return pretrain.train_step(wrapped or student, teacher, optimizer, scaler, parts, step, config, amp)

    return run


def updates() -> None:
    """An update in its variants: time on the device, time of the CPU, memory; and that it never waits."""
    variants = {name: {} for name in ("as it is", "cuDNN attention", "no cudnn.benchmark")}
    variants |= {"4 parts" if GPU else "2 parts": dict(accumulate=4 if GPU else 2)}
    variants |= {f"{n} clips": dict(batch_size=n) for n in ((6, 24, 48) if GPU else (1, 3))}
    variants |= {"fp16": dict(amp="fp16"), "fp32": dict(amp="fp32")}
    if GPU:
        variants["compiled"] = dict(compile=True)
        variants["compiled, 48 clips"] = dict(compile=True, batch_size=48)
        variants["large"] = pretrain.PRESETS["large"]
    for name, change in variants.items():
        torch.backends.cudnn.benchmark = name != "no cudnn.benchmark"
        if GPU:
            torch.backends.cuda.enable_cudnn_sdp(name == "cuDNN attention")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = setting(**change)
        made = make(config)
        run = whole_update(config, *made)
        start = time.perf_counter()
        out = run()  # kept through the next update, as in pretrain.py
        note(f"update, {name}: the first (s)", time.perf_counter() - start)
        note(f"update, {name}: device (ms)", ms(run, 20, 4))
        start = time.perf_counter()
        n = 10 if GPU else 1
        for _ in range(n):
            run()
        note(f"update, {name}: CPU until all are queued (ms)", 1000 / n * (time.perf_counter() - start))
        if GPU:
            torch.cuda.synchronize()
            note(f"update, {name}: wall (ms)", 1000 / n * (time.perf_counter() - start))
            note(f"update, {name}: peak memory (GiB)", torch.cuda.max_memory_allocated() / 2**30)
            note(f"update, {name}: reserved (GiB)", torch.cuda.max_memory_reserved() / 2**30)
            try:
                torch.cuda.set_sync_debug_mode("error")
                run()
                note(f"update, {name}: waits for the GPU", "never")
            except RuntimeError as error:
                note(f"update, {name}: waits for the GPU", str(error).splitlines()[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if name in ("as it is", "compiled") and GPU:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run()
                torch.cuda.synchronize()
            form = dict(sort_by="cuda_time_total", row_limit=40, max_name_column_width=110)
            table = profile.key_averages().table(**form)
            (OUT / f"profile_{name.replace(' ', '_')}.txt").write_text(table)
        del made, run, out
        torch._dynamo.reset()  # or the next size is compiled as one that varies
        gc.collect()


def ddp() -> None:
    """NCCL with one process: three updates with and without DistributedDataParallel, whole and in parts; an
    overflow in fp16 and a nan in bf16 change no weight; then whole_runs."""
    backends = dict(backend="cpu:gloo,cuda:nccl", device_id=DEVICE) if GPU else dict(backend="gloo")
    dist.init_process_group(rank=0, world_size=1, store=dist.HashStore(), **backends)
    code = torch.tensor(3)
    rows = torch.ones(2, 3, device=DEVICE)
    dist.all_reduce(code, dist.ReduceOp.MAX)
    dist.all_reduce(rows)
    good = code == 3 and rows.sum() == 6 and evaluate.gather(["rank 0"]) == ["rank 0"]
    check("collectives on the CPU, the device and of objects", str(bool(good)), good)
    losses = {}
    for wrapped in (False, True):
        for accumulate in (1, 2):
            config = setting(amp="fp32", accumulate=accumulate, batch_size=4, updates=9)
            made = make(config)
            run = whole_update(config, *made, evaluate.distribute(made[0]) if wrapped else None)
            losses[wrapped, accumulate] = [run()["loss"].item() for _ in range(3)]
    for key, value in losses.items():
        same = all(abs(x / y - 1) < 1e-3 for x, y in zip(value, losses[False, 1]))
        check(f"fp32, ddp {key[0]}, {key[1]} parts: three losses", " ".join(f"{x:.6f}" for x in value), same)
    for amp in ("bf16", "fp16"):
        made = make(setting(amp=amp))
        run = whole_update(setting(amp=amp), *made)
        run()
        before = copy.deepcopy(made[0].state_dict())
        if amp == "fp16":
            made[3].update(2.0**60)  # every gradient overflows
        else:
            made[0].decoder.proj.weight.register_hook(lambda grad: grad * torch.nan)
        norm = run()["grad_norm"]
        same = all(torch.equal(before[k], v) for k, v in made[0].state_dict().items())
        check(f"{amp}: gradient norm, weights unchanged", f"{norm.item()} {same}", same)
    dist.destroy_process_group()
    for amp in ("bf16", "fp16") if GPU else ("fp32",):
        whole_runs(amp)


def start(*command):
    """A script of the project in another process; without a GPU it starts at once, as in the tests."""
    if GPU:
        return subprocess.Popen([sys.executable, *map(str, command)])
    from conftest import Script

    return Script(command, OUT, OUT / "said.txt", OUT / "said.txt")


def whole_runs(amp: str) -> None:
    """300 updates (tiny: 12), stopped by SIGTERM and gone on with, and without a stop; then fine-tuning: the
    scripts themselves."""
    size = "--preset demo --model tiny --batch_size 4 --updates 12"
    if GPU:
        size = "--batch_size 12 --updates 300 --min_samples 1600"
    command = [ROOT / "pretrain.py", *size.split(), "--data", pretrain.DEMO / "pretrain.tsv"]
    command += f"--amp {amp} --warmup 4 --log_every 2 --probe_train= --probe_test= --out_dir".split()
    cut = OUT / f"{amp}_cut"
    uncut = OUT / f"{amp}_uncut"
    log = cut / "log.jsonl"
    process = start(*command, cut)
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    status = process.wait()
    stopped = model.load_checkpoint(cut / "last.pt")["step"]
    check(f"{amp}: exit status after SIGTERM", str(status), status == 143)
    begin = time.perf_counter()
    statuses = [start(*command, cut).wait()]
    note(f"{amp}: resumed run: seconds", time.perf_counter() - begin)
    statuses.append(start(*command, uncut).wait())
    name = f"{amp}: exit status of the resumed run, and of one without a stop"
    check(name, " ".join(map(str, statuses)), statuses == [0, 0])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    whole = {}
    for line in (uncut / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        whole[record["step"]] = record["loss"]
    last = records[-1]
    note(f"{amp}: resumed run: from update, updates, loss", f"{stopped} {last['step']} {last['loss']:.4f}")
    differences = []
    for record in records:
        if record["step"] > stopped + 2:  # the line before is the mean of fewer updates
            differences.append(abs(record["loss"] / whole[record["step"]] - 1))
    check(f"{amp}: resumed run: largest difference of a loss", max(differences), max(differences) < 0.02)
    note(f"{amp}: clips/s, waiting for data", f"{last['clips_per_s']:.1f} {last['data_wait']:.4f}")
    tune = [ROOT / "finetune.py", "--init", cut, "--amp", amp, "--out_dir", OUT / f"{amp}_tuned"]
    tune += "--preset demo --warmup 2 --updates".split() + ["50" if GPU else "3"]
    status = start(*tune).wait()
    check(f"{amp}: exit status of fine-tuning", str(status), status == 0)


def agree() -> None:
    """The same first update of the base network in every type, on the CPU and the GPU."""
    from test_pretrain import one_update

    config = setting(batch_size=1, updates=9)
    exact = {}
    for device, amp, compiled in (
        ("cpu", "fp32", False), *((("cuda", amp, False) for amp in ("fp32", "bf16", "fp16")) if GPU else ()),
        *((("cuda", "bf16", True),) if GPU else (("cpu", "bf16", False),)),
    ):  # fmt: skip
        got = one_update(dataclasses.replace(config, amp=amp), device, compiled)
        numbers = " ".join(f"{k} {v:.5g}" for k, v in got.items())
        exact = exact or got
        near = abs(got["loss"] / exact["loss"] - 1) < (1e-3 if amp == "fp32" else 0.02)
        check(f"first update, {device}, {amp}, compiled {compiled}", numbers, near)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    if GPU:
        evaluate.init_distributed()  # its settings of cuDNN
        note("card", torch.cuda.get_device_name())
        versions = (torch.__version__, torch.backends.cudnn.version(), torch.cuda.nccl.version())
        note("torch, cuDNN, NCCL", " ".join(map(str, versions)))
    dict(kernels=kernels, updates=updates, ddp=ddp, agree=agree)[sys.argv[1]]()
    print(*(f"BROKEN: {name}" for name in broken), sep="\n")
    sys.exit(len(broken) > 0)
