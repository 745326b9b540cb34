"""Schedules, configuration, checkpoints, and whole runs: two processes, accumulation, resuming, bad input."""

import copy
import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import DEVICES, NEEDS_GPU, ROOT
from test_data import bad_files
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from data import InputError
from model import EAT, MLP, MODELS, ModelConfig
from pretrain import (
    PRESETS,
    PretrainConfig,
    cosine_lr,
    draw_masks,
    draw_noise,
    ema_decay,
    ema_update,
    parse_config,
)

BASE = PretrainConfig()
TINY = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2 --min_samples 1600".split()
TINY += ["--workers", 0]
SHORT = [
    *TINY,
    "--batch_size",
    8,
    "--updates",
    10,
    "--warmup",
    2,
    "--ema_anneal",
    5,
    "--ema_decay",
    0.9,
    "--log_every",
    1,
]
SHORT += ["--lr", 2e-3, "--utterance_weight", 1]


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, lr",
    [
        (0, 0.0),
        (1, 9.375058594e-09),
        (53332, 4.99990624941e-04),
        (53333, 5e-4),
        (226666, 2.50001132785e-04),
        (399999, 1.0265621686e-14),
    ],
)
def test_released_learning_rate(step, lr):
    assert cosine_lr(step, BASE.lr, BASE.warmup, BASE.updates, BASE.min_lr) == pytest.approx(lr, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(
    "step, decay", [(1, 0.9998000019), (2, 0.9998000038), (50000, 0.999895), (100000, 0.99999), (399999, 0.99999)]
)
def test_released_ema_decay(step, decay):
    assert ema_decay(step, BASE) == pytest.approx(decay, rel=1e-12)


def test_released_sizes():
    for name, trainable in (("base", 87_840_000), ("large", 308_543_488)):
        with torch.device("meta"):
            assert sum(p.numel() for p in EAT(MODELS[name]).parameters()) == trainable
    assert BASE.grid == (64, 8) and BASE.n_visible == 102
    assert dataclasses.replace(BASE, **PRESETS["large"]).n_visible == 128


def test_initialisation_follows_the_released_code():
    torch.manual_seed(0)
    eat = EAT(ModelConfig(width=192, depth=2, heads=3))
    weights = eat.state_dict()
    assert weights["encoder.cls_token"].std().item() == pytest.approx(1, abs=0.15)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert weights[f"encoder.blocks.1.{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert not weights[f"encoder.blocks.1.{name}.bias"].any()
    for name, limit in (
        ("encoder.patch_embed.weight", math.sqrt(6 / (256 + 192))), ("encoder.patch_embed.bias", 1 / 16),
        ("decoder.blocks.0.weight", 1 / math.sqrt(192 / 16 * 9)), ("decoder.proj.weight", 1 / math.sqrt(192)),
    ):  # fmt: skip
        assert 0.9 * limit < weights[name].abs().max() <= limit, name


def test_teacher_is_the_weighted_mean_of_past_students():
    torch.manual_seed(0)
    students = [torch.nn.Linear(3, 2) for _ in range(4)]
    teacher = copy.deepcopy(students[0])
    decays = [0.5, 0.9, 0.99]
    for student, decay in zip(students[1:], decays):
        ema_update(teacher, student, decay)
    shares = [math.prod(decays), *((1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays))]
    expected = sum(share * student.weight for share, student in zip(shares, students))
    torch.testing.assert_close(teacher.weight, expected)


# --- randomness ------------------------------------------------------------------------------------------------------


def test_masks_and_noise_depend_on_seed_step_and_clip_only():
    config, cpu = dataclasses.replace(BASE, model="demo", batch_size=4, clones=3), torch.device("cpu")
    assert torch.equal(draw_masks(config, 7, cpu), draw_masks(config, 7, cpu))
    assert not torch.equal(draw_masks(config, 7, cpu), draw_masks(config, 8, cpu))
    assert not torch.equal(draw_masks(config, 7, cpu), draw_masks(dataclasses.replace(config, seed=2), 7, cpu))
    noise = draw_noise(config, 7, range(4), cpu)
    assert noise.shape == (12, 512, 192) and noise.std() == pytest.approx(0.01, rel=0.01)
    assert torch.equal(noise[6:9], draw_noise(config, 7, range(2, 3), cpu))
    assert len({row.sum().item() for row in noise}) == 12


# --- configuration ---------------------------------------------------------------------------------------------------


def test_flags_presets_and_help(capsys):
    assert parse_config(PretrainConfig, PRESETS, []) == BASE
    config = parse_config(PretrainConfig, PRESETS, ["--preset", "large", "--lr", "1", "--no-decay_all"])
    assert (config.model, config.mask_ratio, config.lr, config.decay_all) == ("large", 0.75, 1.0, False)
    with pytest.raises(SystemExit):
        parse_config(PretrainConfig, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(PretrainConfig))


@pytest.mark.parametrize("argv", [["--upd", "3"], ["--preset", "huge"], ["--updates", "many"], ["--nonsense"]])
def test_wrong_flags_are_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parse_config(PretrainConfig, PRESETS, argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch_size=50), "does not divide"),
        (dict(batch_size=0), "above 0"),
        (dict(model="huge"), "choose from base"),
        (dict(warmup=-1), "--warmup must not be negative"),
        (dict(clip_frames=128), "smaller block"),
        (dict(mask="blocks"), "choose from block"),
        (dict(data=""), "--data is missing"),
        (dict(target_layers=13), "12 blocks"),
        (dict(probe_test="x"), "needs --probe_manifest"),
        (dict(seed=-1), "negative"),
        (dict(lr=math.nan), "reasonable size"),
        (dict(seed=2**70), "reasonable size"),
        (dict(timeout=0.0), "above 0"),
        (dict(mask_noise=-1.0), "negative"),
        (dict(mask_ratio=2.0), "between 0 and 1"),
        (dict(beta1=2.0), "between 0 and 1"),
        (dict(clip_frames=20_000), "at most 12288"),
        (dict(clip_frames=8), "visible"),
        (dict(mask_block_time=0), "does not fit"),
    ],
)
def test_settings_that_cannot_work(change, message):
    config = dataclasses.replace(BASE, **(dict(data="x.tsv") | change))
    with pytest.raises(InputError, match=re.escape(message)):
        pretrain.check_config(config, world=4)


def test_decay_can_spare_biases_and_norms():
    student = EAT(MODELS["tiny"])
    everything = pretrain.param_groups(student, BASE)
    assert len(everything) == 1 and len(everything[0]["params"]) == len(list(student.parameters()))
    decayed, spared = pretrain.param_groups(student, dataclasses.replace(BASE, decay_all=False))
    assert (
        spared["weight_decay"] == 0
        and all(p.ndim == 1 for p in spared["params"])
        and all(p.ndim > 1 for p in decayed["params"])
    )


# --- whole runs ------------------------------------------------------------------------------------------------------


def read_log(path) -> list[dict]:
    return [
        json.loads(line) for line in (path / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")
    ]


def losses(path) -> list[float]:
    return [line["loss"] for line in read_log(path) if "loss" in line]


def weights(path) -> dict:
    state = torch.load(path / "last.pt", weights_only=True)
    return state["student"] | {f"teacher.{k}": v for k, v in state["teacher"].items()}


def test_two_processes_accumulation_and_packed_data_give_one_curve(folder, script):
    script("pretrain.py", *SHORT, "--data", "manifest.tsv", "--out_dir", "one")
    script("data.py", "pack", "manifest.tsv", "packed")
    script("pretrain.py", *SHORT, "--data", "manifest.tsv", "--out_dir", "two", processes=2)
    script("pretrain.py", *SHORT, "--data", "packed", "--out_dir", "parts", "--accumulate", 4, "--workers", 2)
    script("pretrain.py", *SHORT, "--data", "manifest.tsv", "--out_dir", "both", "--accumulate", 2, processes=2)
    expected = losses(folder / "one")
    assert len(expected) == 10 and expected[-1] < 0.9 * expected[0]
    for other in ("two", "parts", "both"):
        assert losses(folder / other) == pytest.approx(expected, rel=1e-5)
    for key in ("target_std", "pred_std", "grad_norm"):
        for ours, theirs in zip(read_log(folder / "two"), read_log(folder / "one")):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_resuming_repeats_the_run_bit_for_bit(folder, script):
    """Killed between two checkpoints, in the middle of an epoch, and continued with other workers."""
    args = [*SHORT, "--data", "manifest.tsv", "--batch_size", 6, "--updates", 60, "--save_every", 7]
    script("pretrain.py", *args, "--out_dir", "whole")
    command = [sys.executable, ROOT / "pretrain.py", *args, "--out_dir", "cut"]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (folder / "cut" / "log.jsonl").exists() or len(read_log(folder / "cut")) < 10:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    step = torch.load(folder / "cut" / "last.pt", weights_only=True)["step"]
    assert step % 7 == 0 and 7 <= step < 60
    out = script("pretrain.py", *args, "--out_dir", "cut", "--workers", 2).stdout
    assert f"resuming at update {step}" in out
    assert [line["step"] for line in read_log(folder / "cut")] == list(range(1, 61))
    assert losses(folder / "cut") == losses(folder / "whole")
    ours, theirs = weights(folder / "cut"), weights(folder / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_folder_keeps_its_settings(folder, script):
    args = [*SHORT, "--data", "manifest.tsv", "--out_dir", "run"]
    script("pretrain.py", *args)
    before = {p.name: p.read_bytes() for p in (folder / "run").iterdir()}
    again = script("pretrain.py", *args)
    assert "done" in again.stdout
    refused = script("pretrain.py", *args, "--lr", 0.1, check=False)
    assert refused.returncode == 2 and refused.stderr.strip().count("\n") == 0
    assert "run holds a run with other settings (lr was 0.002, now 0.1)" in refused.stderr
    assert before.keys() == {p.name for p in (folder / "run").iterdir()}
    assert before["last.pt"] == (folder / "run" / "last.pt").read_bytes()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    refused = script("pretrain.py", *SHORT, "--data", "manifest.tsv", "--out_dir", "mine", check=False)
    assert refused.returncode == 2 and "is not empty and holds no run" in refused.stderr


def test_bad_files_are_skipped_and_listed(folder, script):
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in bad)
        file.write("clip 0.wav\t100\n")
    script("pretrain.py", *SHORT, "--data", "manifest.tsv", "--out_dir", "run", "--max_bad_fraction", 1)
    listed = (folder / "run" / "bad_files.tsv").read_text()
    assert all(f"{name}\t" in listed for name in bad) and "clip 0.wav\tshorter than 1600 samples" in listed
    assert read_log(folder / "run")[-1]["bad_files"] == len(bad) + 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--data", "nothing.tsv"], "cannot read the manifest nothing.tsv"),
        (["--data", "broken.tsv"], "broken.tsv, line 2"),
        (["--data", "."], "is not a packed folder"),
        (["--data", "manifest.tsv", "--batch_size", 7], "does not divide over 2 processes"),
        (
            ["--data", "manifest.tsv", "--probe_manifest", "a.tsv"],
            "cannot read the manifest a.tsv",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, script, args, message):
    (folder / "broken.tsv").write_text("/data\nno tab or number here\n")
    result = script(
        "pretrain.py", *SHORT, *args, "--out_dir", "run", check=False, processes=2 if "--batch_size" in args else 1
    )
    ours = [line for line in result.stderr.splitlines() if line.startswith("pretrain.py: ")]
    assert result.returncode != 0 and len(ours) == 1 and message in ours[0]
    assert not (folder / "run").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    torch.manual_seed(0)
    config = dataclasses.replace(
        BASE, model="tiny", clip_frames=64, clones=2, batch_size=2, mask="random", updates=10, warmup=0, lr=1e-3
    )
    student = EAT(config.network)
    teacher = copy.deepcopy(student.encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(pretrain.param_groups(student, config), fused=True)
    scaler = pretrain.make_scaler(torch.float32, torch.device("cpu"))
    for step, value in enumerate((1.0, math.nan, math.inf, 1.0)):
        before = copy.deepcopy(student.state_dict())
        part = (
            torch.full((2, 1, 64, 128), value),
            draw_masks(config, step, torch.device("cpu")),
            torch.zeros(4, 32, 64),
        )
        pretrain.train_step(student, teacher, optimizer, scaler, [part], step, config, torch.float32)
        changed = any(not torch.equal(before[k], v) for k, v in student.state_dict().items())
        assert changed == math.isfinite(value)
    assert all(p.isfinite().all() for p in [*student.parameters(), *teacher.parameters()])


def one_update(config, device: str, compile: bool = False) -> dict[str, float]:
    """Losses and gradient norm of a first update, always of the same weights, data, masks and noise."""
    torch.backends.cudnn.allow_tf32 = False  # as in a run
    torch.manual_seed(0)
    device = torch.device(device)
    student = EAT(config.network).to(device)
    teacher = copy.deepcopy(student.encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(pretrain.param_groups(student, config), fused=True)
    dtype = pretrain.pick_precision(config.amp, device)
    if compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    generator, clips = torch.Generator().manual_seed(1), config.batch_size
    spec = torch.randn(clips, 1, config.clip_frames, 128, generator=generator)
    mask = draw_masks(config, 0, torch.device("cpu"))
    noise = draw_noise(config, 0, range(clips), torch.device("cpu"))
    part = tuple(x.to(device) for x in (spec, mask, noise))
    out = pretrain.train_step(
        student, teacher, optimizer, pretrain.make_scaler(dtype, device), [part], 0, config, dtype
    )
    assert all(p.dtype == torch.float32 for p in [*student.parameters(), *teacher.parameters()])
    assert out["targets"].dtype == torch.float32
    return {key: out[key].item() for key in pretrain.LOGGED}


UPDATE = dataclasses.replace(
    BASE, model="tiny", clip_frames=64, clones=4, batch_size=2, mask="random", warmup=0, updates=9, amp="fp32"
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_stays_near_full(amp, device):
    """Same update in autocast: losses agree to the precision of the type, weights and the teacher stay fp32."""
    half = one_update(dataclasses.replace(UPDATE, amp=amp), device)
    assert half == pytest.approx(one_update(UPDATE, "cpu"), rel=0.03)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), *DEVICES[1:]])
def test_compiled_is_eager(device):
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    assert one_update(UPDATE, device, compile=True) == pytest.approx(one_update(UPDATE, "cpu"), rel=1e-4)


def test_what_is_recomputed_holds_no_product():
    """The backward pass is two forward passes of products: GELU is computed again in it, the second layer is not."""
    mlp, x = MLP(16, 64), torch.randn(3, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = mlp(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 5 * 2 * 16 * 64
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@NEEDS_GPU
def test_200_updates_in_bf16_follow_fp32(folder, script):
    logs = {}
    for amp in ("fp32", "bf16"):
        script("pretrain.py", *SHORT, "--updates", 200, "--amp", amp, "--data", "manifest.tsv", "--out_dir", amp)
        logs[amp] = read_log(folder / amp)
    for full, half in zip(logs["fp32"], logs["bf16"]):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05), full["step"]


@NEEDS_GPU
@pytest.mark.parametrize(
    "flags", [["--amp", "fp32"], ["--amp", "bf16"], ["--amp", "fp16"], ["--amp", "bf16", "--compile"]]
)
def test_on_a_gpu_the_loss_falls(folder, script, flags):
    script("pretrain.py", *SHORT, *flags, "--data", "manifest.tsv", "--out_dir", "run")
    log = read_log(folder / "run")
    assert log[-1]["loss"] < 0.95 * log[0]["loss"] and log[-1]["skipped"] == 0


def test_the_demo_preset_is_complete():
    config = dataclasses.replace(BASE, **PRESETS["demo"])
    pretrain.check_config(config, world=2)
    for path in (config.data, config.probe_manifest, config.probe_test):
        assert (ROOT / path).exists()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept():
    """Once kept, memory of the size of activations is not mapped in again, page by page, at each use."""
    count = """
import resource, torch, pretrain
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(10_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
pretrain.keep_freed_memory()
faults()
print(first, faults())
"""
    done = subprocess.run([sys.executable, "-c", count], cwd=ROOT, capture_output=True, text=True, check=True)
    first, kept = map(int, done.stdout.split())
    assert first > 20 * 5000 and kept < 1000
