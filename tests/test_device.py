"""What a GPU would run, tried without one.

Fake tensors have shapes, types and a device, and no values. On "cuda" ones, whatever would make the CPU wait
for the GPU fails (a value asked for, a shape that depends on values) or is seen (a copy from unpinned
memory), and so is the type in which autocast computes. Only the walk back through the graph needs a GPU: here
it makes gradients of zeros.
"""

import dataclasses
import json

import pytest
import torch
from conftest import ROOT, Script
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import finetune
import pretrain
from model import EAT, MODELS, AudioClassifier, Encoder

CUDA = torch.device("cuda", 0)


class Operators(TorchDispatchMode):
    """Notes of every operator the types of its results, and which copies would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.types = {}
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:
            return out
        name = function._schema.name.removeprefix("aten::")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in [*inputs, *outputs] if x.ndim or x.device.type == "cuda"}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.waits.append(f"{name} of {[(x.device.type, *x.shape) for x in inputs]}")
        for x in outputs[:1]:
            self.types.setdefault(name, set()).add(x.dtype)
        return out

    def forget(self) -> None:
        self.types.clear()
        self.waits.clear()


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for what asks the driver."""

    class Generator(torch.Generator):
        def __new__(cls, device=None):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    data.mel_filters.cache_clear()  # no real one is to be found
    data.hann_window.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch
    data.mel_filters.cache_clear()  # nor a fake one
    data.hann_window.cache_clear()


def batches(clips: int, frames: int):
    """What a loader gives; the lengths are known on the CPU."""
    samples = data.clip_samples(frames)
    while True:
        with unset_fake_temporarily():
            n_samples = torch.full((clips,), samples)
        yield data.Batch(torch.zeros(clips, samples), n_samples, list(range(clips)), [""] * clips)


def no_backward(monkeypatch, model: torch.nn.Module) -> None:
    def backward(loss):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def make_scaler(amp: torch.dtype) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cuda", init_scale=2.0**7, enabled=amp == torch.float16)


def two_updates_of_pretraining(gpu, amp: torch.dtype, **change) -> Operators:
    """The operators of the second of two updates, each of two parts, as process 1 of 2."""
    usual = dict(model="tiny", clip_frames=256, batch_size=8, clones=3, accumulate=2)
    config = pretrain.PretrainConfig(**usual | change)
    network = dataclasses.replace(MODELS["tiny"], clip_frames=256)
    with CUDA:
        student = EAT(network)
        teacher = Encoder(network).requires_grad_(False)
    no_backward(gpu, student)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    sampler = data.ClipSampler(99, 8, seed=0, rank=1, world=2, accumulate=2)
    feed = batches(2, config.clip_frames)
    scaler = make_scaler(amp)
    with Operators() as operators:
        for step in range(2):  # the first makes what is kept for all: filters, the optimizer's state
            operators.forget()
            parts = pretrain.draw_parts(feed, sampler, config, step, CUDA)
            out = pretrain.train_step(student, teacher, optimizer, scaler, parts, step, config, amp)
    assert out["pred"].shape == (2 * 3, 128, 64)
    assert all(x.device == CUDA for x in out.values())
    assert out["targets"].dtype == out["loss"].dtype == torch.float32
    return operators


def assert_types(types: dict[str, set], amp: torch.dtype, full: set[str]) -> None:
    """Products and the streams between them are in autocast's type; targets, losses, spectrograms in fp32."""
    half = {"addmm", "convolution", "gelu"} & types.keys()
    assert len(half) == 3, types
    assert all(types[name] == {amp} for name in half), types
    assert all(types[name] <= {torch.float32, torch.complex64} for name in full), types


@pytest.mark.parametrize("amp, block", [
    (torch.bfloat16, 5), (torch.float16, 5), (torch.float32, 5), (torch.bfloat16, 1),
])  # fmt: skip
def test_an_update_of_pretraining_never_waits_for_the_gpu(gpu, amp, block):
    operators = two_updates_of_pretraining(gpu, amp, mask_block_time=block, mask_block_freq=block)
    assert operators.waits == []
    assert_types(operators.types, amp, {"native_batch_norm", "mse_loss", "_fft_r2c"})
    assert operators.types["native_layer_norm"] == {amp, torch.float32}  # of the streams, and of the targets


@pytest.mark.parametrize("preset", ["as2m", "esc50", "spcv2"])
def test_an_update_of_finetuning_never_waits_for_the_gpu(gpu, preset):
    change = dict(model="tiny", clip_frames=256, batch_size=8, accumulate=2)
    config = finetune.FinetuneConfig(**finetune.PRESETS[preset] | change)
    network = dataclasses.replace(MODELS["tiny"], drop_path=0.1)
    with CUDA:
        model = AudioClassifier(network, {str(i): "" for i in range(5)}).train()
    no_backward(gpu, model)
    optimizer = torch.optim.AdamW(finetune.layer_decay_groups(model, config), fused=True)
    sampler = data.ClipSampler(99, 8, seed=0, accumulate=2)
    feed = batches(4, 256)
    scaler = make_scaler(torch.bfloat16)
    targets = torch.zeros(99, 5)
    with Operators() as operators:
        for step in range(2):
            operators.forget()
            parts = finetune.draw_parts(feed, sampler, targets, config, step, CUDA)
            out = finetune.train_step(model, optimizer, scaler, parts, step, config, torch.bfloat16)
    assert operators.waits == []
    assert out["loss"].dtype == torch.float32
    loss = "_log_softmax" if config.loss == "ce" else "binary_cross_entropy_with_logits"
    assert_types(operators.types, torch.bfloat16, {"_fft_r2c", loss})


@pytest.mark.parametrize("pooling", ["cls", "mean", "bands"])
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_classifier_never_waits_for_the_gpu(gpu, pooling, exclusive):
    """In training, whatever it pools."""
    with CUDA:
        model = AudioClassifier(MODELS["tiny"], {"a": "", "b": ""}, pooling, exclusive).train()
        spec = torch.zeros(3, 1, 256, 128)
    with Operators() as operators, torch.autocast("cuda", torch.bfloat16):
        logits = model(spec)
    assert operators.waits == []
    assert (logits.shape, logits.device) == ((3, 2), CUDA)


def item(gpu):
    real = pretrain.ema_decay

    def ask(step, config):
        return real(step, config) + 0 * float(torch.zeros((), device=CUDA))

    gpu.setattr(pretrain, "ema_decay", ask)


def arange_on_the_cpu(gpu):
    real = torch.arange
    gpu.setattr(torch, "arange", lambda *a, device=None, **k: real(*a, **k))


def nonzero(gpu):
    gpu.setattr(pretrain, "visible_ids", lambda mask, n: (~mask).nonzero()[:, 1].view(len(mask), -1)[:, :n])


def noise_on_the_cpu(gpu):
    real = pretrain.draw_noise
    gpu.setattr(pretrain, "draw_noise", lambda *a: real(*a[:3], torch.device("cpu")).to(CUDA))


def blocking_copy(gpu):
    real = torch.Tensor.to
    gpu.setattr(torch.Tensor, "to", lambda x, *a, non_blocking=False, **k: real(x, *a, **k))


def targets_in_half(gpu):
    real = torch.Tensor.float
    gpu.setattr(torch.Tensor, "float", lambda x: x if x.ndim == 3 and x.dtype == torch.bfloat16 else real(x))


@pytest.mark.parametrize(
    "fault", [item, arange_on_the_cpu, nonzero, noise_on_the_cpu, blocking_copy, targets_in_half]
)
def test_what_would_wait_or_compute_in_another_type_is_caught(gpu, fault):
    """The test above fails on each of these."""
    fault(gpu)
    with pytest.raises(Exception):  # noqa: B017  of the fake tensors, or of the assertions
        operators = two_updates_of_pretraining(gpu, torch.bfloat16)
        assert operators.waits == []
        assert_types(operators.types, torch.bfloat16, {"native_batch_norm", "mse_loss", "_fft_r2c"})


@pytest.mark.parametrize("local_rank, message", [("0", ""), ("2", "2 GPUs here: start one process for each")])
def test_more_processes_than_gpus_are_refused(monkeypatch, local_rank, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    for owner, name in ((torch.backends.cudnn, "allow_tf32"), (torch.backends.cudnn, "benchmark")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    cudnn_sdp = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        if message:
            with pytest.raises(data.InputError, match=message):
                evaluate.init_distributed()
        else:
            assert evaluate.init_distributed() == (0, 1, CUDA)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn_sdp)


@pytest.mark.parametrize("has_bf16, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_the_precision_follows_the_gpu(monkeypatch, has_bf16, expected):
    """bf16 where the hardware has it; emulated it is slower than fp16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert evaluate.pick_precision("auto", CUDA) == expected
    assert evaluate.pick_precision("auto", torch.device("cpu")) == torch.float32
    assert evaluate.pick_precision("fp16", torch.device("cpu")) == torch.float16


@pytest.mark.long
def test_the_first_run_on_a_gpu_is_ready(tmp_path):
    """All parts of gpu_first_run.py, at their size for a CPU: what they compare agrees."""
    parts = ("kernels", "agree", "updates", "ddp")
    jobs = []
    for part in parts:
        command = [ROOT / "tests" / "gpu_first_run.py", part, tmp_path]
        jobs.append(Script(command, tmp_path, tmp_path / f"{part}.out", tmp_path / f"{part}.err"))
    status = [job.wait(300) for job in jobs]
    assert status == [0] * 4, [(tmp_path / f"{part}.out").read_text() for part in parts]
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in parts}
    assert found["kernels"]["attention, student, default: error, gradient finite"].endswith("True")
    assert all(value > 0 for name, value in found["updates"].items() if name.endswith("(ms)"))
    losses = [value.split() for name, value in found["ddp"].items() if name.endswith("three losses")]
    losses = torch.tensor([[float(number) for number in row] for row in losses])
    assert losses.shape == (4, 3)
    assert (losses / losses[0] - 1).abs().max() < 1e-5
    assert losses[0, 2] < losses[0, 0]
    for amp in ("bf16", "fp16"):
        assert found["ddp"][f"{amp}: gradient norm, weights unchanged"].endswith("True")
    assert found["ddp"]["fp32: exit status after SIGTERM"] == "143"
    assert found["ddp"]["fp32: exit status of the resumed run, and of one without a stop"] == "0 0"
    stopped, updates, _ = found["ddp"]["fp32: resumed run: from update, updates, loss"].split()
    assert int(stopped) < int(updates) == 12
    assert found["ddp"]["fp32: resumed run: largest difference of a loss"] == 0
    assert found["ddp"]["fp32: exit status of fine-tuning"] == "0"
