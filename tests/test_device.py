"""What a GPU would run, tried without one.

Fake tensors have shapes, types and a device, and no values. On "cuda" ones, whatever would make the CPU wait
for the GPU fails (a value asked for, a shape that depends on values) or is seen (a copy from unpinned
memory), and so is the type in which autocast computes. Only the walk back through the graph needs a GPU: here
it makes gradients of zeros.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import finetune
import pretrain
from conftest import ROOT
from model import EAT, MODELS, AudioClassifier, Encoder

CUDA = torch.device("cuda", 0)


class Operators(TorchDispatchMode):
    """Notes of every operator the types of its results, and which copies would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.types, self.waits = {}, []

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
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch
    data._mel_filters.cache_clear()  # it may hold a fake one


def batches(clips: int, frames: int):
    """What a loader gives, int16."""
    samples = data.clip_samples(frames)
    while True:
        waveform, n_samples = torch.zeros(clips, samples, dtype=torch.int16), torch.full((clips,), samples)
        yield data.Batch(waveform, n_samples, list(range(clips)), [""] * clips)


def no_backward(monkeypatch, model: torch.nn.Module) -> None:
    def backward(loss):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def on_gpu(build) -> torch.nn.Module:
    """What build() makes, on the fake GPU; positions are computed on the CPU and moved."""
    with CUDA:
        model = build()
    for module in model.modules():
        if isinstance(module, Encoder):
            module.pos_embed = module.pos_embed.to(CUDA)
    return model


def make_scaler(amp: torch.dtype) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cuda", init_scale=2.0**7, enabled=amp == torch.float16)


def two_updates_of_pretraining(gpu, amp: torch.dtype, **change) -> Operators:
    """The operators of the second of two updates, each of two parts, as process 1 of 2."""
    config = pretrain.PretrainConfig(
        **dict(model="tiny", clip_frames=256, batch_size=8, clones=3, accumulate=2) | change
    )
    student, teacher = on_gpu(lambda: EAT(config.network)), on_gpu(lambda: Encoder(config.network))
    teacher.requires_grad_(False)
    no_backward(gpu, student)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    sampler = data.ClipSampler(99, 8, seed=0, rank=1, world=2, accumulate=2)
    feed, scaler = batches(2, config.clip_frames), make_scaler(amp)
    with Operators() as operators:
        for step in range(2):  # the first makes what is kept for all: filters, the optimizer's state
            operators.waits.clear(), operators.types.clear()
            parts = pretrain.draw_parts(feed, sampler, config, step, CUDA)
            out = pretrain.train_step(student, teacher, optimizer, scaler, parts, step, config, amp)
    assert out["pred"].shape == (2 * 3, 128, 64) and all(x.device == CUDA for x in out.values())
    assert out["targets"].dtype == out["loss"].dtype == torch.float32
    return operators


def assert_types(types: dict[str, set], amp: torch.dtype, full: set[str]) -> None:
    """Products and the streams between them are in autocast's type; targets, losses, spectrograms in fp32."""
    half = {"addmm", "convolution", "gelu"} & types.keys()
    assert len(half) == 3 and all(types[name] == {amp} for name in half), types
    assert all(types[name] <= {torch.float32, torch.complex64} for name in full), types


@pytest.mark.parametrize("mask", ["block", "flexible", "random"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16, torch.float32])
def test_an_update_of_pretraining_never_waits_for_the_gpu(gpu, mask, amp):
    change = dict(mask_block_time=1, mask_block_freq=1) if mask == "random" else dict(mask=mask)
    operators = two_updates_of_pretraining(gpu, amp, **change)
    assert operators.waits == []
    assert_types(operators.types, amp, {"native_batch_norm", "mse_loss", "_fft_r2c"})
    assert operators.types["native_layer_norm"] == {amp, torch.float32}  # of the streams, and of the targets


@pytest.mark.parametrize("preset", ["as2m", "esc50", "spcv2"])
def test_an_update_of_finetuning_never_waits_for_the_gpu(gpu, preset):
    change = dict(model="tiny", clip_frames=256, batch_size=8, accumulate=2)
    config = finetune.FinetuneConfig(**finetune.PRESETS[preset] | change)
    network = dataclasses.replace(MODELS["tiny"], drop_path=0.1)
    model = on_gpu(lambda: AudioClassifier(network, {str(i): "" for i in range(5)})).train()
    no_backward(gpu, model)
    optimizer = torch.optim.AdamW(finetune.layer_decay_groups(model, config), fused=True)
    sampler, feed = data.ClipSampler(99, 8, seed=0, accumulate=2), batches(4, 256)
    scaler, targets = make_scaler(torch.bfloat16), torch.zeros(99, 5)
    with Operators() as operators:
        for step in range(2):
            operators.waits.clear(), operators.types.clear()
            parts = finetune.draw_parts(feed, sampler, targets, config, step, CUDA)
            out = finetune.train_step(model, optimizer, scaler, parts, step, config, torch.bfloat16)
    assert operators.waits == [] and out["loss"].dtype == torch.float32
    loss = "_log_softmax" if config.loss == "ce" else "binary_cross_entropy_with_logits"
    assert_types(operators.types, torch.bfloat16, {"_fft_r2c", loss})


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


@pytest.mark.parametrize("gpu_is_there, cuda, visible, is_refused", [
    (True, "12.8", None, True), (True, "12.8", "0", True), (True, "12.8", "", False),
    (True, "12.8", "-1", False), (True, None, None, False), (False, "12.8", None, False),
])  # fmt: skip
def test_a_driver_too_old_for_this_build_is_refused(
    called, monkeypatch, gpu_is_there, cuda, visible, is_refused
):
    """A GPU that a build for CUDA cannot use is not left idle in silence, unless it is hidden on purpose."""
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda x: gpu_is_there if x == "/dev/nvidia0" else real(x))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    said = called(evaluate, "nothing.pt", "nothing.tsv", check=False)
    old = "the GPU's driver is too old, this PyTorch is built for CUDA 12.8"
    old += " (CUDA_VISIBLE_DEVICES= for the CPU)"
    assert said.returncode == 1 and said.stderr.count("\n") == 1 and not said.stdout
    assert (said.stderr == f"evaluate.py: {old}\n") == is_refused
    if not is_refused:  # it goes on to the next mistake
        assert evaluate.init_distributed()[2].type == "cpu" and "nothing.pt" in said.stderr
    else:
        with pytest.raises(data.InputError, match=re.escape(old)):
            evaluate.init_distributed()


def test_the_first_run_on_a_gpu_is_ready(tmp_path):
    """All parts of gpu_first_run.py, at their size for a CPU: what they compare agrees."""
    parts = ("kernels", "agree", "updates", "ddp")
    command = [sys.executable, ROOT / "tests" / "gpu_first_run.py"]
    options = dict(stdout=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    jobs = [subprocess.Popen([*command, part, tmp_path], **options) for part in parts]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, said
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in parts}
    assert found["kernels"]["attention, student, default: error, gradient finite"].endswith("True")
    assert all(value > 0 for name, value in found["updates"].items() if name.endswith("(ms)"))
    losses = [value.split() for name, value in found["ddp"].items() if name.endswith("three losses")]
    losses = torch.tensor([[float(number) for number in row] for row in losses])
    assert losses.shape == (4, 3) and (losses / losses[0] - 1).abs().max() < 1e-5
    assert losses[0, 2] < losses[0, 0]
    for amp in ("bf16", "fp16"):
        assert found["ddp"][f"{amp}: gradient norm, weights unchanged"].endswith("True")
    assert found["ddp"]["fp32: exit status after SIGTERM"] == "143"
    assert found["ddp"]["fp32: exit status of the resumed run, and of one without a stop"] == "0 0"
    stopped, updates, _ = found["ddp"]["fp32: resumed run: from update, updates, loss"].split()
    assert int(stopped) < int(updates) == 20
    assert found["ddp"]["fp32: resumed run: largest difference of a loss"] == 0
    assert found["ddp"]["fp32: exit status of fine-tuning"] == "0"
