"""Schedules, settings, updates and whole runs of pre-training: several processes, accumulation, bad input.

What a run promises when something goes wrong is tested in test_faults.py.
"""

import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEVICES, NEEDS_GPU, ROOT, Script, bad_files
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import finetune
import pretrain
from data import AudioDataset, ClipSampler, InputError, build_loader
from evaluate import parse_config, pick_precision
from extras import listen, prepare
from masking import count_visible
from model import EAT, MODELS, MLP, ModelConfig, load_checkpoint, make_targets
from pretrain import (
    PRESETS, PretrainConfig, cosine_lr, draw_masks, draw_noise, draw_parts, ema_decay, ema_update,
    open_networks,
)  # fmt: skip

BASE = PretrainConfig()
CPU = torch.device("cpu")
TINY = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2".split()
TINY += "--min_samples 1600 --workers 0".split()
SHORT = [*TINY, *"--batch_size 8 --updates 10 --warmup 2 --ema_anneal 5 --ema_decay 0.9 --lr 2e-3".split()]
SHORT += "--utterance_weight 1 --log_every 1".split()
PLAIN = [*SHORT, "--data", "manifest.tsv"]


# --- schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, lr", [
    (0, 0.0), (1, 9.375058594e-09), (53332, 4.99990624941e-04), (53333, 5e-4), (226666, 2.50001132785e-04),
    (399999, 1.0265621686e-14),
])  # fmt: skip
def test_released_learning_rate(step, lr):
    found = cosine_lr(step, BASE.lr, BASE.warmup, BASE.updates, BASE.min_lr)
    assert found == pytest.approx(lr, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("step, lr", [(0, 1.0), (1, 2.5), (2, 4.0), (4, 2.5), (6, 1.0)])
def test_the_learning_rate_begins_and_ends_at_its_least(step, lr):
    assert cosine_lr(step, 4.0, 2, 6, 1.0) == pytest.approx(lr)


@pytest.mark.parametrize("step, decay", [
    (1, 0.9998000019), (2, 0.9998000038), (50000, 0.999895), (100000, 0.99999), (399999, 0.99999),
])  # fmt: skip
def test_released_ema_decay(step, decay):
    assert ema_decay(step, BASE) == pytest.approx(decay, rel=1e-12)


def test_released_sizes():
    for name, trainable in (("base", 87_840_000), ("large", 308_543_488)):
        with torch.device("meta"):
            assert sum(p.numel() for p in EAT(MODELS[name]).parameters()) == trainable
    assert MODELS[BASE.model].grid(BASE.clip_frames) == (64, 8)
    assert count_visible(512, BASE.mask_ratio) == 102
    assert count_visible(512, PRESETS["large"]["mask_ratio"]) == 128


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


# --- randomness -------------------------------------------------------------------------------------------


def test_masks_and_noise_depend_on_seed_step_and_clip_only():
    config = dataclasses.replace(BASE, model="demo", batch_size=4, clones=3)
    masks = draw_masks(config, 7, CPU)
    assert masks.shape == (12, 512)
    assert ((~masks).sum(1) == count_visible(512, config.mask_ratio)).all()
    assert torch.equal(masks, draw_masks(config, 7, CPU))
    noise = draw_noise(config, 7, range(4), CPU)
    assert noise.shape == (12, 512, 192)
    assert noise.std() == pytest.approx(0.01, rel=0.01)
    assert torch.equal(noise[6:9], draw_noise(config, 7, range(2, 3), CPU))
    assert len({row.sum().item() for row in noise}) == 12
    for other, step in ((config, 8), (dataclasses.replace(config, seed=2), 7)):
        assert not torch.equal(masks, draw_masks(other, step, CPU))
        assert not torch.equal(noise, draw_noise(other, step, range(4), CPU))


def drawn(folder: Path, config: PretrainConfig, steps: range, world: int = 1) -> list[list[torch.Tensor]]:
    """What `world` processes draw for each update: spec, mask and noise of all of its clips, in order."""
    data = AudioDataset(folder / "manifest.tsv", config.clip_frames)
    parts = [[] for _ in steps]
    for rank in range(world):
        share = (steps[0], rank, world, config.accumulate)
        sampler = ClipSampler(len(data), config.batch_size, config.seed, *share)
        batches = build_loader(data, sampler, workers=1)
        for found, step in zip(parts, steps):
            found += draw_parts(batches, sampler, config, step, CPU)
        batches.close()
    return [[torch.cat(tensors) for tensors in zip(*found)] for found in parts]


@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_an_update_draws_the_same_for_any_number_of_processes_and_parts(folder, world, accumulate):
    """Also where a run begins in the middle, as one that goes on does."""
    sizes = dict(clip_frames=96, batch_size=4, clones=2, mask_block_time=2)
    config = dataclasses.replace(BASE, model="tiny", **sizes)
    whole = drawn(folder, config, range(4))
    shared = drawn(folder, dataclasses.replace(config, accumulate=accumulate), range(1, 4), world)
    for ours, theirs in zip(shared, whole[1:], strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert [len(x) for x in ours] == [4, 8, 8]


def test_every_update_draws_anew(folder):
    """Three epochs of eight clips, in six updates: each epoch has another order, and no clip of any update
    has a mask or noise that another clip, or another update, has."""
    block = dict(mask_block_time=1, mask_block_freq=1)  # so that no two masks are alike by chance
    config = dataclasses.replace(BASE, model="tiny", clip_frames=256, batch_size=4, clones=3, **block)
    specs, masks, noise = (torch.cat(tensors) for tensors in zip(*drawn(folder, config, range(6))))
    clips = [spec.sum().item() for spec in specs]
    epochs = [tuple(clips[i : i + 8]) for i in (0, 8, 16)]
    assert len(set(epochs)) == 3
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len(masks.unique(dim=0)) == 6 * 4 * 3
    assert len(noise.flatten(1)[:, :9].unique(dim=0)) == 6 * 4 * 3


# Losses of six updates of `--preset demo --updates 6`, and the digest of the weights that they end with, on a
# CPU with AVX2 and one thread. Other CPUs add in another order
LOSSES = [
    32.976905822753906, 32.898277282714844, 29.566356658935547, 28.12437629699707, 27.575881958007812,
    27.618473052978516,
]  # fmt: skip
DIGEST = "742afb248c4f296c"


def test_six_updates_of_the_demo_are_those_of_before(tmp_path, train):
    flags = "--preset demo --updates 6 --log_every 1 --probe_train= --probe_test= --out_dir run".split()
    assert train(*flags) == 0
    found = losses(tmp_path / "run")
    assert found == pytest.approx(LOSSES, rel=1e-5)
    if found == LOSSES:
        state = load_checkpoint(tmp_path / "run" / "last.pt")
        total = hashlib.sha256()
        for name, value in [*state["student"].items(), *state["teacher"].items()]:
            total.update(name.encode())
            total.update(value.numpy().tobytes())
        assert total.hexdigest()[:16] == DIGEST


# --- settings ---------------------------------------------------------------------------------------------


def test_flags_and_presets():
    assert parse_config(PretrainConfig, PRESETS, []) == BASE
    flags = ["--preset", "large", "--lr", "1", "--stop_on_collapse"]
    config = parse_config(PretrainConfig, PRESETS, flags)
    assert config == dataclasses.replace(BASE, **PRESETS["large"] | dict(lr=1.0, stop_on_collapse=True))
    assert not parse_config(PretrainConfig, PRESETS, [*flags, "--no-stop_on_collapse"]).stop_on_collapse


@pytest.mark.parametrize("module, cls, preset", [
    (pretrain, PretrainConfig, "demo"), (finetune, finetune.FinetuneConfig, "esc50"),
])  # fmt: skip
def test_help_shows_every_setting_with_the_presets_default(capsys, module, cls, preset):
    with pytest.raises(SystemExit) as end:
        parse_config(cls, module.PRESETS, ["--preset", preset, "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    usual = dataclasses.asdict(cls()) | module.PRESETS[preset]
    for name, value in usual.items():
        (comment,) = re.findall(rf"^  --{name} +{re.escape(str(value))} +(\S.*)$", text, re.M)
        assert len(comment) > 10
    assert all(preset in text.splitlines()[2] for preset in module.PRESETS)


def test_what_is_not_given_fits_what_is():
    """Warm-ups take their share of --updates; the demo's labelled sets do not come with another --data."""

    def parse(*argv):
        return parse_config(PretrainConfig, PRESETS, ["--preset", "demo", *argv])

    usual = parse()
    short = parse("--updates", "48")
    assert (usual.warmup, usual.ema_anneal) == (80, 480)
    assert (short.warmup, short.ema_anneal) == (8, 48)
    assert parse("--updates=60", "--warmup=7").warmup == 7
    assert parse("--updates", "1").ema_anneal == 1
    own = parse("--data", "mine.tsv")
    assert usual.probe_train and usual.probe_test
    assert not own.probe_train and not own.probe_test
    assert parse("--data", "mine.tsv", "--probe_train", "a.tsv").probe_train == "a.tsv"
    assert parse("--out_dir", "data").probe_train  # a value that is called as a setting is none
    argv = "--preset demo --data x.tsv".split()
    assert not parse_config(finetune.FinetuneConfig, finetune.PRESETS, argv).eval_data
    with pytest.raises(InputError, match="--warmup 60 must be less than --updates 60"):
        parse("--updates", "60", "--warmup", "60")


@pytest.mark.parametrize("argv, message", [
    (["--upd", "3"], "unrecognized arguments: --upd 3 (--help lists the flags)"),
    (["--preset", "huge"], "'huge' (choose from"), (["--nonsense"], "--nonsense"),
    (["--updates", "many"], "invalid int value: 'many'"), (["--lr"], "expected one argument"),
    ([""], "unrecognized arguments"), (["--mask_ratio", "1.5"], "--mask_ratio 1.5 is too large"),
])  # fmt: skip
def test_wrong_flags_are_one_line(argv, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        parse_config(PretrainConfig, PRESETS, argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(batch_size=50, accumulate=4), "--batch_size 50 does not divide by 1 processes x 4 (--accumulate)"),
    (dict(batch_size=0), "--batch_size 0 is too small"),
    (dict(model="huge"), "--model huge: choose from base"),
    (dict(amp="fp8"), "--amp fp8: choose from auto"),
    (dict(warmup=-1), "--warmup -1 is too small"),
    (dict(workers=-1), "--workers -1 is too small"),
    (dict(seed=-1), "--seed -1 is too small"),
    (dict(lr=math.nan), "--lr nan is too small or not finite"),
    (dict(timeout=0.0), "--timeout 0.0 is too small"),
    (dict(mask_noise=-1.0), "--mask_noise -1.0 is too small"),
    (dict(mask_ratio=2.0), "--mask_ratio 2.0 is too large"),
    (dict(beta1=1.0), "--beta1 1.0 is too large"), (dict(beta2=2.0), "--beta2 2.0 is too large"),
    (dict(mask_block_time=0), "--mask_block_time 0 is too small"),
    (dict(data=""), "--data is missing"),
    (dict(clip_frames=32, mask_block_time=5), "--clip_frames, --mask...: no masks of ratio 0.8 with"),
    (dict(mask_block_time=4, mask_block_freq=8), "choose a smaller block, longer clips or another ratio"),
    (dict(mask_ratio=0.0), "no masks of ratio 0.0"),
    (dict(mask_block_freq=9), "with blocks of 2 x 9 fit 4 x 8 patches"),
    (dict(clip_frames=20_000), "--clip_frames, --mask...: expected clip_frames from 1 to 12288, not 20000"),
    (dict(clip_frames=1000), "expected whole patches of 16"),
    (dict(norm_mean=math.inf), "a finite norm_mean"),
    (dict(target_layers=3), "--target_layers is above the 2 blocks of tiny"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(folder, monkeypatch, change, message):
    """Before anything is written."""
    monkeypatch.chdir(folder)
    config = parse_config(PretrainConfig, PRESETS, [*PLAIN, "--out_dir", "run"])
    with pytest.raises(InputError, match=re.escape(message)) as error:
        pretrain.train(dataclasses.replace(config, **change))
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists()


def test_the_demo_preset_is_complete():
    config = dataclasses.replace(BASE, **PRESETS["demo"])
    data = AudioDataset(config.data, config.clip_frames, config.min_samples)
    probe_sets = evaluate.open_probe_sets(config.probe_train, config.probe_test, config.clip_frames)
    student, teacher = open_networks(config)
    assert len(data) > 500
    assert [len(labelled.classes) for labelled in probe_sets] == [10, 10]
    assert student.config == teacher.config == dataclasses.replace(MODELS["demo"], clip_frames=128)


# --- one update -------------------------------------------------------------------------------------------


def parts_of_run(config: PretrainConfig, device: torch.device = CPU) -> tuple:
    """Student, teacher, optimizer, scaler and type of the products, as `train` makes them."""
    student, teacher = open_networks(config)
    student.to(device)
    teacher.to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.weight_decay, fused=True)
    dtype = pick_precision(config.amp, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**7, enabled=dtype == torch.float16)
    return student, teacher, optimizer, scaler, dtype


UPDATE = dataclasses.replace(
    BASE, model="tiny", clip_frames=64, clones=4, batch_size=2, mask_block_time=1, mask_block_freq=1,
    warmup=0, updates=9, amp="fp32",
)  # fmt: skip


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    config = dataclasses.replace(UPDATE, lr=1e-3)
    student, teacher, optimizer, scaler, dtype = parts_of_run(config)
    for step, value in enumerate((1.0, math.nan, math.inf, 1.0)):
        before = copy.deepcopy(student.state_dict())
        spec = torch.full((2, 1, 64, 128), value)
        parts = [(spec, draw_masks(config, step, CPU), torch.zeros(8, 32, 64))]
        pretrain.train_step(student, teacher, optimizer, scaler, parts, step, config, dtype)
        changed = any(not torch.equal(before[k], v) for k, v in student.state_dict().items())
        assert changed == math.isfinite(value)
    assert all(p.isfinite().all() for p in [*student.parameters(), *teacher.parameters()])


def test_an_update_is_adamw_on_the_clipped_gradient_then_the_teacher_follows():
    """Three updates of two parts, each against its definition; what is returned holds no graph."""
    config = dataclasses.replace(
        UPDATE, data="x.tsv", accumulate=2, batch_size=4, lr=1e-2, clip_norm=0.5, ema_decay=0.2,
        ema_decay_end=0.8, ema_anneal=4, utterance_weight=3.0, weight_decay=0.3, beta1=0.6, beta2=0.7,
        target_layers=1, mask_ratio=0.75,
    )  # fmt: skip
    student, teacher, _, scaler, dtype = parts_of_run(config)
    optimizer = pretrain.Run(config).optimizer(student.parameters())
    expected = copy.deepcopy(student)
    follower = copy.deepcopy(teacher)
    form = dict(lr=0.0, betas=(0.6, 0.7), eps=1e-8, weight_decay=0.3, foreach=False)
    adamw = torch.optim.AdamW(expected.parameters(), **form)
    for step in range(3):
        masks = draw_masks(config, step, CPU).chunk(2)
        parts = []
        for i in range(2):
            spec = torch.randn(2, 1, 64, 128, generator=torch.Generator().manual_seed(10 * step + i))
            parts.append((spec, masks[i], draw_noise(config, step, range(2 * i, 2 * i + 2), CPU)))
        out = pretrain.train_step(student, teacher, optimizer, scaler, parts, step, config, dtype)

        whole = [torch.cat(tensors) for tensors in zip(*parts)]
        ids_keep = (~whole[1]).nonzero()[:, 1].view(16, -1)
        targets = make_targets(follower.ffn_outputs(whole[0])[-1:])
        found = expected(whole[0], whole[1], ids_keep, targets, whole[2], 3.0)
        grads = torch.autograd.grad(found["loss"], list(expected.parameters()))
        norm = sum(grad.double().square().sum() for grad in grads).sqrt().item()
        assert norm > 0.5
        for p, grad in zip(expected.parameters(), grads):
            p.grad = grad * 0.5 / norm
        adamw.param_groups[0]["lr"] = cosine_lr(step, 1e-2, 0, 9, 0.0)
        adamw.step()
        decay = [0.35, 0.5, 0.65][step]
        for theirs, ours in zip(follower.parameters(), expected.encoder.parameters()):
            theirs.data = decay * theirs.data + (1 - decay) * ours.data

        assert out["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        for name in ("loss", "loss_frame", "loss_utterance"):
            assert out[name].item() == pytest.approx(found[name].item(), rel=1e-4)
        assert not any(x.requires_grad for x in out.values())
        torch.testing.assert_close(student.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(teacher.state_dict(), follower.state_dict(), rtol=1e-3, atol=1e-5)


def one_update(config: PretrainConfig, device: str, compile: bool = False) -> dict[str, float]:
    """Losses and gradient norm of a first update, always of the same weights, data, masks and noise."""
    torch.backends.cudnn.allow_tf32 = False  # as in a run
    device = torch.device(device)
    student, teacher, optimizer, scaler, dtype = parts_of_run(config, device)
    if compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    generator = torch.Generator().manual_seed(1)
    spec = torch.randn(config.batch_size, 1, config.clip_frames, 128, generator=generator)
    mask = draw_masks(config, 0, CPU)
    noise = draw_noise(config, 0, range(config.batch_size), CPU)
    parts = [(spec.to(device), mask.to(device), noise.to(device))]
    out = pretrain.train_step(student, teacher, optimizer, scaler, parts, 0, config, dtype)
    assert all(p.dtype == torch.float32 for p in [*student.parameters(), *teacher.parameters()])
    assert out["targets"].dtype == torch.float32
    return {key: out[key].item() for key in pretrain.LOGGED}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_stays_near_full(amp, device):
    """The losses agree to the precision of the type; weights, targets and teacher stay fp32."""
    half = one_update(dataclasses.replace(UPDATE, amp=amp), device)
    assert half == pytest.approx(one_update(UPDATE, "cpu"), rel=0.03)
    assert half != one_update(UPDATE, "cpu")


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), *DEVICES[1:]])
def test_compiled_is_eager(device):
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    assert one_update(UPDATE, device, compile=True) == pytest.approx(one_update(UPDATE, "cpu"), rel=1e-4)


def test_the_backward_pass_is_two_forward_passes_of_products():
    """What the bench counts as three forward passes an update is what is computed."""
    mlp = MLP(16, 64)
    x = torch.randn(3, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = mlp(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 5 * 2 * 16 * 64
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="done where there is no GPU")
def test_freed_memory_is_kept(tmp_path, script):
    """Once kept, memory of the size of activations is not mapped in again, page by page, at each use."""
    (tmp_path / "count.py").write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, evaluate
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(10_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
evaluate.init_distributed()
faults()
print(first, faults())
""")
    first, kept = map(int, script(tmp_path / "count.py").stdout.split())
    assert first > 5 * 5000
    assert kept < 1000


# --- whole runs -------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict]:
    """The records of a run's log; a line that is being written is left out."""
    lines = (path / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in read_log(path) if "loss" in line]


def test_processes_accumulation_and_packed_data_give_one_curve(folder, script, train):
    """Four processes are the paper's layout. Accumulation within two processes is in
    test_going_on_with_another_number_of_processes."""
    assert train(*PLAIN, "--out_dir", "one") == 0
    said = script("pretrain.py", *PLAIN, "--out_dir", "four", processes=4).stdout
    assert said.startswith("four, from update 0: 4 x cpu, torch.float32\n")
    script("pretrain.py", *PLAIN, "--out_dir", "two", processes=2)
    script("extras/prepare.py", "pack", "manifest.tsv", "packed.tsv")
    assert train(*SHORT, "--data", "packed.tsv", "--out_dir", "parts", "--accumulate", 4, "--workers", 2) == 0
    expected = losses(folder / "one")
    assert len(expected) == 10
    assert expected[-1] < 0.9 * expected[0]
    for other in ("two", "four", "parts"):
        assert losses(folder / other) == pytest.approx(expected, rel=1e-5)
    for key in ("grad_norm", "lr", "epoch", "ema_decay"):
        for ours, theirs in zip(read_log(folder / "two"), read_log(folder / "one"), strict=True):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    one = load_checkpoint(folder / "one" / "last.pt")
    four = load_checkpoint(folder / "four" / "last.pt")
    for part in ("student", "teacher"):
        torch.testing.assert_close(four[part], one[part], rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_torchrun_of_the_command_line(folder, train):
    """Python and torchrun as people start them; the other tests start copies of a process (starter.py)."""
    assert train(*PLAIN, "--out_dir", "one") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "pretrain.py", *PLAIN, "--out_dir", "two"]
    subprocess.run(list(map(str, command)), cwd=folder, check=True, timeout=300)
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-5)


def test_the_log_says_what_happens(folder, train, capsys):
    """A line for the first update, every log_every-th and the last; probes before, during and after."""
    probes = ["--probe_train", "manifest.tsv", "--probe_test", "manifest.tsv", "--probe_every", 2]
    assert train(*PLAIN, "--out_dir", "run", "--updates", 5, "--log_every", 3, *probes) == 0
    log = read_log(folder / "run")
    assert [line["step"] for line in log if "loss" in line] == [1, 3, 5]
    scores = {line["step"]: line["probe_linear"] for line in log if "probe_linear" in line}
    assert list(scores) == [0, 2, 4, 5]
    assert all(0 <= score <= 1 for score in scores.values())
    last = log[-2]
    assert last["loss"] == pytest.approx(last["loss_frame"] + last["loss_utterance"], rel=1e-6)
    assert last["epoch"] == 5 * 8 / 8
    assert last["skipped"] == 0
    assert last["bad_clips"] == 0
    assert last["lr"] == cosine_lr(4, 2e-3, 2, 5, 0)
    assert last["ema_decay"] == BASE.ema_decay_end
    assert last["clips_per_s"] > 0
    assert 0 < last["data_wait"] < 1
    assert "step 5  loss" in capsys.readouterr().out


def test_logged_spreads_are_those_of_what_is_predicted(folder, train, monkeypatch):
    """target_std and pred_std: the channels' standard deviations over the masked patches of all copies."""
    seen = []
    real = pretrain.train_step

    def train_step(*args):
        out = real(*args)
        targets = []
        pred = []
        for row, mask in enumerate(out["mask"]):
            targets.append(out["targets"][row // 2][mask])  # two copies of each clip
            pred.append(out["pred"][row][mask])
        variances = [torch.cat(rows).var(0) for rows in (targets, pred)]
        seen.append([(variance + 1e-6).sqrt().mean().item() for variance in variances])
        return out

    monkeypatch.setattr(pretrain, "train_step", train_step)
    assert train(*PLAIN, "--updates", 4, "--out_dir", "run") == 0
    logged = [(line["target_std"], line["pred_std"]) for line in read_log(folder / "run")]
    for ours, expected in zip(logged, seen, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_logged_losses_are_means_over_the_updates_since_the_last_line(folder, train):
    assert train(*PLAIN, "--out_dir", "every") == 0
    assert train(*PLAIN, "--out_dir", "third", "--log_every", 3) == 0
    rows = read_log(folder / "every")
    means = {line["step"]: line for line in read_log(folder / "third")}
    assert list(means) == [1, 3, 6, 9, 10]
    for name in pretrain.LOGGED:
        for step, first in ((1, 0), (3, 1), (6, 3), (9, 6), (10, 9)):
            expected = sum(row[name] for row in rows[first:step]) / (step - first)
            assert means[step][name] == pytest.approx(expected, rel=1e-5)


def test_a_run_says_how_long_it_will_take(folder, train, capsys, monkeypatch):
    """In each line of the log, as if each update took 8 s, 2 of them for its clips, and a probe an hour."""
    now = [0.0]
    real_step = pretrain.train_step
    real_loader = pretrain.build_loader

    def train_step(*args):
        out = real_step(*args)
        now[0] += 6
        if now[0] == 3600 + 4 * 8:
            signal.raise_signal(signal.SIGTERM)
        return out

    def build_loader(*args, **options):
        for batch in real_loader(*args, **options):
            now[0] += 2
            yield batch

    def probe(*args, **options):
        now[0] += 3600
        return dict(probe_linear=0.5)

    monkeypatch.setattr(pretrain, "train_step", train_step)
    monkeypatch.setattr(pretrain, "build_loader", build_loader)
    monkeypatch.setattr(pretrain, "probe", probe)
    monkeypatch.setattr(time, "perf_counter", lambda: 1 + now[0])
    probes = ["--probe_train", "manifest.tsv", "--probe_test", "manifest.tsv"]
    assert train(*PLAIN, "--updates", 36_000, "--out_dir", "run", *probes) == 128 + signal.SIGTERM
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 90
    first, *logged = read_log(folder / "run")
    assert first["probe_linear"] == 0.5
    minutes = [(36_000 - step) * 8 / 60 for step in (1, 2, 3, 4)]
    assert [line["minutes_left"] for line in logged] == pytest.approx(minutes)
    assert [line["clips_per_s"] for line in logged] == pytest.approx([1] * 4)
    assert [line["data_wait"] for line in logged] == pytest.approx([2 / 8] * 4)


def test_output_is_made_for_people_and_for_files(classifier, train, tune, called, capfd):
    """Lines that fit a terminal; no bars of progress where there is no terminal."""
    probes = ["--probe_train", "manifest.tsv", "--probe_test", "manifest.tsv", "--probe_every", 5]
    assert train(*PLAIN, "--out_dir", "run", *probes) == 0
    small = "--preset own --model tiny --init scratch --batch_size 8 --updates 10 --min_samples 1600".split()
    data = "--clip_frames 96 --workers 0 --log_every 1 --data manifest.tsv --eval_data manifest.tsv".split()
    assert tune(*small, *data, "--out_dir", "tuned") == 0
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert set(said.err.splitlines()) == {"WARNING: probes: 0 clips cannot be used, 12 are cut to fit"}
    assert sum("probe_linear" in line for line in lines) == 3
    assert sum("mAP" in line for line in lines) >= 2
    outputs = [said.out]
    for module, *args in (
        (evaluate, "classifier.pt", "manifest.tsv"), (evaluate, "run", "manifest.tsv", "manifest.tsv"),
        (prepare, "scan", ".", "-o", "new.tsv"), (prepare, "stats", "new.tsv"),
        (prepare, "pack", "new.tsv", "packed.tsv"), (listen, "classifier.pt", "clip 0.wav", "clip 1.wav"),
        (listen, "classifier.pt", "clip 7.wav"), (listen, "run", ".", "--features", "features"),
    ):  # fmt: skip
        done = called(module, *args)
        outputs.append(done.stdout + done.stderr)
    assert all(outputs)
    assert "\r" not in "".join(outputs)


@pytest.mark.parametrize("flags, kept", [
    (["--save_every", 4], [8, 10]), (["--save_every", 20, "--save_minutes", 1e-9], [9, 10]), ([], [10]),
])  # fmt: skip
def test_checkpoints_come_by_updates_or_minutes(folder, train, flags, kept):
    """The last two are kept: previous.pt and last.pt; the one of the last update is always there."""
    assert train(*PLAIN, "--out_dir", "run", *flags) == 0
    paths = [folder / "run" / name for name in ("previous.pt", "last.pt")]
    assert [load_checkpoint(path)["step"] for path in paths if path.exists()] == kept


@pytest.mark.long
def test_every_variant_learns_and_no_two_are_the_same(folder, train):
    final = {}
    for name, flags in dict(
        plain=[], ratio=["--clip_frames", 128, "--mask_ratio", 0.6, "--mask_adjust", 0.3],
        random=["--mask_block_time", 1, "--mask_block_freq", 1],
        one_layer=["--target_layers", 1, "--utterance_weight", 0], bf16=["--amp", "bf16"], seed=["--seed", 5],
    ).items():  # fmt: skip
        assert train(*PLAIN, "--out_dir", name, *flags) == 0
        ours = losses(folder / name)
        assert ours[-1] < 0.95 * ours[0], name
        final[name] = ours[-1]
    assert len(set(final.values())) == len(final)


def test_going_on_from_the_weights_of_another_run(folder, train):
    """--init takes student and teacher of a checkpoint, nothing else; one of another size is refused."""
    train(*PLAIN, "--out_dir", "first")
    still = "--updates 1 --warmup 0 --lr 1e-30 --ema_decay 1 --ema_decay_end 1".split()
    train(*PLAIN, "--out_dir", "second", "--init", "first", *still)
    first = load_checkpoint(folder / "first" / "last.pt")
    second = load_checkpoint(folder / "second" / "last.pt")
    for part in ("student", "teacher"):
        assert all(torch.equal(second[part][key], value) for key, value in first[part].items())
    assert losses(folder / "second")[0] < 0.95 * losses(folder / "first")[0]
    with pytest.raises(ValueError, match="first is not a checkpoint of this model") as error:
        train(*PLAIN, "--model", "demo", "--out_dir", "third", "--init", "first")
    assert "\n" not in str(error.value)
    assert not (folder / "third").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_folder_keeps_its_settings(folder, script, train, capsys):
    args = [*PLAIN, "--out_dir", "run"]
    assert train(*args) == 0
    before = contents(folder / "run")
    capsys.readouterr()
    assert train(*args) == 0
    assert "done: 10 updates" in capsys.readouterr().out
    assert before == contents(folder / "run")
    refused = script("pretrain.py", *args, "--lr", 0.1, check=False)
    assert refused.returncode == 1
    said = "pretrain.py: run is another run (lr was 0.002, now 0.1): choose another --out_dir\n"
    assert refused.stderr == said
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "other.tsv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="data_digest was"):
        train(*args, "--data", "other.tsv")
    assert before == contents(folder / "run")
    (folder / "manifest.tsv").rename(folder / "moved.tsv")  # the same data in another place is the same
    assert train(*args, "--data", "moved.tsv", "--save_every", 3, "--workers", 1) == 0
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="mine is not empty and holds no run"):
        train(*args, "--data", "moved.tsv", "--out_dir", "mine")
    assert contents(folder / "mine") == {"thesis.txt": b"precious"}


def test_a_run_keeps_its_precision(folder, train, monkeypatch):
    """The one that --amp auto has found: where it would be another, the run does not go on in silence."""
    args = [*PLAIN, "--out_dir", "run"]
    assert train(*args, "--amp", "fp32") == 0
    with pytest.raises(InputError, match=r"run is another run \(amp was torch.float32, now torch.bfloat16\)"):
        train(*args, "--amp", "bf16")
    monkeypatch.setattr(pretrain, "pick_precision", lambda *_: torch.float16)  # on another machine
    with pytest.raises(InputError, match=r"\(amp was torch.float32, now torch.float16\)") as error:
        train(*args, "--amp", "fp32")
    assert "\n" not in str(error.value)


def test_bad_files_are_skipped_and_listed(folder, script):
    """Each once, with the reason, however many processes meet it and however often."""
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in bad)
        file.writelines(f"short {i}.wav\t100\n" for i in range(3000))  # so that writing takes its time
    args = [*PLAIN, "--out_dir", "run", "--max_bad_fraction", 1, "--log_every", 5]
    script("pretrain.py", *args, processes=2)
    listed = (folder / "run" / "bad_files.tsv").read_text().splitlines()
    reasons = dict(line.split("\t") for line in listed)
    assert len(listed) == len(reasons) == len(bad) + 3000
    assert {name: reasons[name] for name, word in bad.items() if word not in reasons[name]} == {}
    assert reasons["short 7.wav"] == "shorter than 1600 samples at 16 kHz"
    n_items = 8 + len(bad)
    n_bad = read_log(folder / "run")[-1]["bad_clips"]  # of 80 clips, those of which are bad
    assert abs(n_bad / 80 - len(bad) / n_items) < len(bad) / 80
    assert n_bad >= len(bad) * (80 // n_items)


def test_bad_files_are_listed_when_a_run_stops(folder, train, monkeypatch):
    """Also those met since the last log line."""
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in bad)
    real_step = pretrain.train_step
    n_steps = []

    def train_step(*args):
        n_steps.append(1)
        if len(n_steps) == 8:
            signal.raise_signal(signal.SIGTERM)
        return real_step(*args)

    monkeypatch.setattr(pretrain, "train_step", train_step)
    args = [*PLAIN, "--out_dir", "run", "--max_bad_fraction", 1, "--log_every", 100]
    assert train(*args) == 128 + signal.SIGTERM
    listed = (folder / "run" / "bad_files.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == sorted(bad)


def test_a_log_that_is_removed_does_not_end_the_run(folder, train, monkeypatch):
    real_step = pretrain.train_step

    def train_step(*args):
        (folder / "run" / "log.jsonl").unlink(missing_ok=True)
        return real_step(*args)

    monkeypatch.setattr(pretrain, "train_step", train_step)
    assert train(*PLAIN, "--out_dir", "run", "--log_every", 100, "--save_every", 4) == 0
    assert [line["step"] for line in read_log(folder / "run")] == [10]
    assert load_checkpoint(folder / "run" / "last.pt")["step"] == 10


@pytest.mark.parametrize("args, message", [
    (["--data", "nothing.tsv"], "cannot read the manifest nothing.tsv"),
    (["--data", "broken.tsv"], "broken.tsv, line 2"),
    (["--data", "."], "cannot read the manifest .: Is a directory"),
    (["--data", "nowhere.tsv"], "nowhere.tsv, line 1: there is no folder /nowhere"),
    (["--data", "unpacked.tsv"], "gone.pcm is missing or has the wrong size"),
    (["--min_samples", 10**6], "no clip has the 1000000 samples that --min_samples asks for"),
    (["--probe_train", "a.tsv", "--probe_test", "a.tsv"], "cannot read the manifest a.tsv"),
    (["--init", "nothing.pt"], "nothing.pt"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(folder, train, args, message):
    (folder / "broken.tsv").write_text("/data\nno tab or number here\n")
    (folder / "nowhere.tsv").write_text("/nowhere\na.wav\t16000\n")
    (folder / "unpacked.tsv").write_text("gone.pcm\na.wav\t16000\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train(*PLAIN, *args, "--out_dir", "run")
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists()


# --- several processes ------------------------------------------------------------------------------------


def our_lines(text: str) -> list[str]:
    """What our code has told on stderr, in one line each or in a traceback; the rest is torchrun's."""
    return re.findall(r'^\w+\.py: .*|^  File ".*/(?:pretrain|finetune|evaluate)\.py", line .*', text, re.M)


def start_of(folder: Path, body: str, program: str = "pretrain.py") -> Path:
    """A script that does `body`, which knows its process's `rank`, and then what `program` does."""
    path = folder / f"start {len(list(folder.iterdir()))}.py"
    path.write_text(f"""
import os, runpy, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
rank = int(os.environ.get("RANK", 0))
{body}
sys.argv[0] = {str(ROOT / program)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    return path


# What each process does before it trains, its flags, and the line that one of them tells
MISTAKES = {
    "all find it before they have joined": ("", ["--lr", -1], "--lr -1.0 is too small or not finite"),
    "the first alone finds it": (
        "", ["--out_dir", "mine"], "mine is not empty and holds no run: choose another --out_dir",
    ),
    "the second lacks the data": (
        'if rank == 1: sys.argv += ["--data", "nothing.tsv"]', [],
        "cannot read the manifest nothing.tsv: No such file or directory",
    ),
    "the second has other settings": (
        'sys.argv += ["--seed", str(rank)]', [], "the processes have different settings, data or precision",
    ),
}  # fmt: skip
MORE_MISTAKES = {
    "all find it when they have joined": (
        "", ["--batch_size", 7], "--batch_size 7 does not divide by 2 processes x 1 (--accumulate)",
    ),
    "all find it when the network is made": (
        "", ["--target_layers", 3], "--target_layers is above the 2 blocks of tiny",
    ),
    "the second has other data": (
        'sys.argv += ["--data", f"manifest{rank}.tsv"]', [],
        "the processes have different settings, data or precision",
    ),
    "the second has another precision": (
        "import evaluate, torch\n"
        "evaluate.pick_precision = lambda *_: (torch.float32, torch.bfloat16)[rank]", [],
        "the processes have different settings, data or precision",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistakes", [MISTAKES, pytest.param(MORE_MISTAKES, marks=pytest.mark.long)])
def test_a_mistake_is_told_once_in_one_line(folder, mistakes):
    """Whichever process finds it, and when; the others say nothing, and nothing is written."""
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "manifest0.tsv").write_text("\n".join(lines) + "\n")
    (folder / "manifest1.tsv").write_text("\n".join(lines[:-1]) + "\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    jobs = []
    for i, (body, args, _) in enumerate(mistakes.values()):
        command = [start_of(folder, body), *PLAIN, "--out_dir", f"run{i}", *args]
        jobs.append(Script(command, folder, folder / f"out{i}", folder / f"err{i}", processes=2))
    assert [job.wait(120) for job in jobs] == [1] * len(jobs)
    for i, (name, (_, _, message)) in enumerate(mistakes.items()):
        assert our_lines((folder / f"err{i}").read_text()) == [f"pretrain.py: {message}"], name
        assert not list(folder.glob(f"run{i}/*.pt")), name
        assert not list(folder.glob(f"run{i}/log.jsonl")), name
    assert contents(folder / "mine") == {"thesis.txt": b"precious"}


def test_a_bug_in_one_process_shows_its_traceback_only(folder, script):
    """Not those of the others, which wait for it."""
    body = "import model\ndef fails(*_): raise RuntimeError('hand-made')\n"
    body += "if rank == 1: model.ufo_loss = fails"
    result = script(start_of(folder, body), *PLAIN, "--out_dir", "run", processes=2, check=False)
    assert result.returncode == 1
    assert result.stderr.count("RuntimeError: ") == 1
    assert result.stderr.count("RuntimeError: hand-made") == 1


# --- on a GPU ---------------------------------------------------------------------------------------------


@NEEDS_GPU
def test_200_updates_in_bf16_follow_fp32(folder, script):
    logs = {}
    for amp in ("fp32", "bf16"):
        script("pretrain.py", *PLAIN, "--updates", 200, "--amp", amp, "--out_dir", amp)
        logs[amp] = read_log(folder / amp)
    for full, half in zip(logs["fp32"], logs["bf16"], strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05), full["step"]


@NEEDS_GPU
@pytest.mark.parametrize("flags", [["fp32"], ["bf16"], ["fp16"], ["bf16", "--compile"]])
def test_on_a_gpu_the_loss_falls(folder, script, flags):
    script("pretrain.py", *PLAIN, "--amp", *flags, "--out_dir", "run")
    log = read_log(folder / "run")
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert log[-1]["skipped"] == 0
    assert log[-1]["gpu_memory_gib"] > 0
