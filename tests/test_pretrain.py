"""Schedules, settings, updates and whole runs of pre-training: several processes, accumulation, bad input.

What a run promises when something goes wrong is tested in test_faults.py.
"""

import copy
import ctypes
import dataclasses
import datetime
import inspect
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
from conftest import DEVICES, NEEDS_GPU, ROOT
from test_data import bad_files
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import finetune
import listen
import prepare
import pretrain
from data import InputError
from evaluate import parse_config, pick_precision
from masking import count_visible
from model import EAT, MODELS, MLP, ModelConfig, load_checkpoint
from pretrain import (
    PRESETS, PretrainConfig, cosine_lr, draw_masks, draw_noise, ema_decay, ema_update, open_inputs, trim_log,
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


@pytest.mark.parametrize("step, decay", [
    (1, 0.9998000019), (2, 0.9998000038), (50000, 0.999895), (100000, 0.99999), (399999, 0.99999),
])  # fmt: skip
def test_released_ema_decay(step, decay):
    assert ema_decay(step, BASE) == pytest.approx(decay, rel=1e-12)


def test_released_sizes():
    for name, trainable in (("base", 87_840_000), ("large", 308_543_488)):
        with torch.device("meta"):
            assert sum(p.numel() for p in EAT(MODELS[name]).parameters()) == trainable
    assert BASE.grid == (64, 8) and count_visible(512, BASE.mask_ratio) == 102
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
    for kind in ("block", "flexible"):
        config = dataclasses.replace(config, mask=kind)
        masks = draw_masks(config, 7, CPU)
        assert masks.shape == (12, 512) and ((~masks).sum(1) == count_visible(512, config.mask_ratio)).all()
        assert torch.equal(masks, draw_masks(config, 7, CPU))
        assert not torch.equal(masks, draw_masks(config, 8, CPU))
        assert not torch.equal(masks, draw_masks(dataclasses.replace(config, seed=2), 7, CPU))
    noise = draw_noise(config, 7, range(4), CPU)
    assert noise.shape == (12, 512, 192) and noise.std() == pytest.approx(0.01, rel=0.01)
    assert torch.equal(noise[6:9], draw_noise(config, 7, range(2, 3), CPU))
    assert len({row.sum().item() for row in noise}) == 12


# --- settings ---------------------------------------------------------------------------------------------


def test_flags_presets_and_help(capsys):
    assert parse_config(PretrainConfig, PRESETS, []) == BASE
    flags = ["--preset", "large", "--lr", "1", "--stop_on_collapse"]
    config = parse_config(PretrainConfig, PRESETS, flags)
    assert (config.model, config.mask_ratio, config.lr, config.stop_on_collapse) == ("large", 0.75, 1.0, True)
    assert not parse_config(PretrainConfig, PRESETS, [*flags, "--no-stop_on_collapse"]).stop_on_collapse
    with pytest.raises(SystemExit) as stop:
        parse_config(PretrainConfig, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name}" in text for field in dataclasses.fields(PretrainConfig))


@pytest.mark.parametrize("module, cls, preset", [
    (pretrain, PretrainConfig, "demo"), (finetune, finetune.FinetuneConfig, "esc50"),
])  # fmt: skip
def test_help_is_of_the_preset_in_groups_and_whole_phrases(capsys, module, cls, preset):
    """The defaults are the chosen preset's; every flag stands below a heading, and explains itself."""
    with pytest.raises(SystemExit):
        parse_config(cls, module.PRESETS, ["--preset", preset, "--help"])
    text = capsys.readouterr().out
    flags = [" ".join(flag.split()) for flag in re.split(r"^  --", text, flags=re.M)]
    for name, value in module.PRESETS[preset].items():
        (flag,) = [flag for flag in flags if flag.startswith((f"{name} ", f"{name},"))]
        assert f"(default: {value})" in flag
    source = inspect.getsource(cls)
    groups = re.findall(r"^    # (.+)$", source, re.M)
    assert len(groups) >= 5 and all(f"\n{group}:\n  --" in text for group in groups)
    for phrase in re.findall(r"^    \w+: .*  # (.+)$", source, re.M):
        assert not re.match(r"(of|and|likewise|to this)\b", phrase), phrase


def test_what_is_not_given_fits_what_is():
    """Warm-ups take their share of --updates; the demo's labelled sets do not come with another --data."""

    def parse(*argv):
        return parse_config(PretrainConfig, PRESETS, ["--preset", "demo", *argv])

    usual, short = parse(), parse("--updates", "48")
    assert (usual.warmup, usual.ema_anneal, short.warmup, short.ema_anneal) == (80, 480, 8, 48)
    assert parse("--updates=60", "--warmup=7").warmup == 7
    assert parse("--updates", "1").ema_anneal == 1
    own = parse("--data", "mine.tsv")
    assert usual.probe_train and usual.probe_test and not own.probe_train and not own.probe_test
    assert parse("--data", "mine.tsv", "--probe_train", "a.tsv").probe_train == "a.tsv"
    assert parse("--out_dir", "data").probe_train  # a value that is called as a setting is none
    argv = "--preset demo --data x.tsv".split()
    assert not parse_config(finetune.FinetuneConfig, finetune.PRESETS, argv).eval_data
    with pytest.raises(InputError, match="--warmup 60 must be less than --updates 60"):
        parse("--updates", "60", "--warmup", "60")


@pytest.mark.parametrize("argv, message", [
    (["--upd", "3"], "--upd"), (["--update", "3"], "did you mean --updates?"),
    (["--preset", "huge"], "'huge' (choose from"), (["--nonsense"], "--nonsense"),
    (["--updates", "many"], "invalid int value: 'many'"), (["--lr"], "expected one argument"),
    ([""], "unrecognized arguments"),
])  # fmt: skip
def test_wrong_flags_are_one_line(argv, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        parse_config(PretrainConfig, PRESETS, argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(batch_size=50, accumulate=4), "--batch_size 50 does not divide by 1 processes x 4 (--accumulate)"),
    (dict(batch_size=0), "--batch_size must be a whole number above 0"),
    (dict(model="huge"), "--model huge: choose from base"),
    (dict(warmup=-1), "--warmup must be a whole number from 0 on"),
    (dict(clip_frames=128), "choose a smaller block"),
    (dict(mask="blocks"), "--mask blocks: choose from block, flexible"),
    (dict(data=""), "--data is missing"),
    (dict(target_layers=13), "--target_layers is above the 12 blocks of base"),
    (dict(probe_test="x"), "probes need both --probe_train and --probe_test"),
    (dict(probe_train="x"), "probes need both --probe_train and --probe_test"),
    (dict(seed=-1), "--seed must be a whole number from 0 on"),
    (dict(lr=math.nan), "--lr must be a number above 0"),
    (dict(seed=2**70), "--seed must be"),
    (dict(timeout=0.0), "--timeout must be a number above 0"),
    (dict(mask_noise=-1.0), "--mask_noise must be a number from 0 on"),
    (dict(mask_ratio=2.0), "--mask_ratio must be from 0 to below 1"),
    (dict(mask_ratio=0.0), "visible"),
    (dict(beta1=2.0), "--beta1 must be from 0 to below 1"),
    (dict(norm_mean=math.inf), "--norm_mean must be a number"),
    (dict(clip_frames=20_000), "16 to 12288 clip_frames"),
    (dict(clip_frames=1000), "--clip_frames must be a multiple of 16"),
    (dict(clip_frames=0), "--clip_frames must be a multiple of 16"),
    (dict(mask_block_time=0), "--mask_block_time must be a whole number above 0"),
    (dict(mask_block_freq=9), "choose a smaller block"),
    (dict(amp="fp8"), "--amp fp8: choose from auto"),
])  # fmt: skip
def test_settings_that_cannot_work(change, message):
    """What cannot work is said before anything is read or written; the message names the flag."""
    with pytest.raises(InputError, match=re.escape(message)) as error:
        pretrain.train(dataclasses.replace(BASE, **(dict(data="x.tsv") | change)))
    assert "\n" not in str(error.value)


def test_the_demo_preset_is_complete():
    config = dataclasses.replace(BASE, **PRESETS["demo"])
    data, probe_sets, student, teacher = open_inputs(config)
    assert len(data) > 500 and [len(part.classes) for part in probe_sets] == [10, 10]
    assert student.config == config.network == teacher.config


# --- one update -------------------------------------------------------------------------------------------


def parts_of_run(config, device: torch.device = CPU):
    """Student, teacher, optimizer, scaler and type of the products, as `train` makes them."""
    torch.manual_seed(0)
    student = EAT(config.network).to(device)
    teacher = copy.deepcopy(student.encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.weight_decay, fused=True)
    name, dtype = pick_precision(config.amp, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**7, enabled=name == "fp16")
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
        part = spec, draw_masks(config, step, CPU), torch.zeros(8, 32, 64)
        pretrain.train_step(student, teacher, optimizer, scaler, [part], step, config, dtype)
        changed = any(not torch.equal(before[k], v) for k, v in student.state_dict().items())
        assert changed == math.isfinite(value)
    assert all(p.isfinite().all() for p in [*student.parameters(), *teacher.parameters()])


def one_update(config, device: str, compile: bool = False) -> dict[str, float]:
    """Losses and gradient norm of a first update, always of the same weights, data, masks and noise."""
    torch.backends.cudnn.allow_tf32 = False  # as in a run
    device = torch.device(device)
    student, teacher, optimizer, scaler, dtype = parts_of_run(config, device)
    if compile:
        student.compile()
        teacher.ffn_outputs = torch.compile(teacher.ffn_outputs)
    generator, clips = torch.Generator().manual_seed(1), config.batch_size
    spec = torch.randn(clips, 1, config.clip_frames, 128, generator=generator)
    part = spec, draw_masks(config, 0, CPU), draw_noise(config, 0, range(clips), CPU)
    parts = [tuple(x.to(device) for x in part)]
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
    mlp, x = MLP(16, 64), torch.randn(3, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = mlp(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 5 * 2 * 16 * 64
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="done where there is no GPU")
def test_freed_memory_is_kept():
    """Once kept, memory of the size of activations is not mapped in again, page by page, at each use."""
    count = """
import resource, torch, evaluate
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(10_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
evaluate.init_distributed()
faults()
print(first, faults())
"""
    done = subprocess.run([sys.executable, "-c", count], cwd=ROOT, capture_output=True, text=True, check=True)
    first, kept = map(int, done.stdout.split())
    assert first > 20 * 5000 and kept < 1000


# --- whole runs -------------------------------------------------------------------------------------------


def read_log(path) -> list[dict]:
    """The records of a run's log; a line that is being written is left out."""
    lines = (path / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(path) -> list[float]:
    return [line["loss"] for line in read_log(path) if "loss" in line]


def test_two_processes_accumulation_and_packed_data_give_one_curve(folder, script, train):
    """Accumulation within two processes is in test_going_on_with_another_number_of_processes."""
    assert train(*PLAIN, "--out_dir", "one") == 0
    script("pretrain.py", *PLAIN, "--out_dir", "two", processes=2)
    script("extras/prepare.py", "pack", "manifest.tsv", "packed.tsv")
    assert train(*SHORT, "--data", "packed.tsv", "--out_dir", "parts", "--accumulate", 4, "--workers", 2) == 0
    expected = losses(folder / "one")
    assert len(expected) == 10 and expected[-1] < 0.9 * expected[0]
    for other in ("two", "parts"):
        assert losses(folder / other) == pytest.approx(expected, rel=1e-5)
    for key in ("target_std", "pred_std", "grad_norm"):
        for ours, theirs in zip(read_log(folder / "two"), read_log(folder / "one"), strict=True):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_four_processes_give_the_curve_of_one(folder, script, train):
    """The paper's layout: torchrun --nproc_per_node=4."""
    assert train(*PLAIN, "--out_dir", "one") == 0
    assert "starting in four: 4 x " in script("pretrain.py", *PLAIN, "--out_dir", "four", processes=4).stdout
    assert losses(folder / "four") == pytest.approx(losses(folder / "one"), rel=1e-5)
    one, four = (load_checkpoint(folder / name / "last.pt") for name in ("one", "four"))
    for part in ("student", "teacher"):
        torch.testing.assert_close(four[part], one[part], rtol=1e-4, atol=1e-5)


def test_the_log_says_what_happens(folder, train, capsys):
    """A line for the first update, every log_every-th and the last; probes before, during and after."""
    probes = ["--probe_train", "manifest.tsv", "--probe_test", "manifest.tsv", "--probe_every", 2]
    assert train(*PLAIN, "--out_dir", "run", "--updates", 5, "--log_every", 3, *probes) == 0
    log = read_log(folder / "run")
    assert [line["step"] for line in log if "loss" in line] == [1, 3, 5]
    scores = {line["step"]: line for line in log if "probe_knn" in line}
    assert list(scores) == [0, 2, 4, 5]
    assert all(0 <= line[kind] <= 1 for line in scores.values() for kind in ("probe_linear", "probe_knn"))
    last = log[-2]
    assert last["loss"] == pytest.approx(last["loss_frame"] + last["loss_utterance"], rel=1e-6)
    assert last["epoch"] == 5 * 8 / 8 and last["skipped"] == 0 and last["bad_clips"] == 0
    assert last["lr"] == cosine_lr(4, 2e-3, 2, 5, 0) and last["ema_decay"] == BASE.ema_decay_end
    assert last["clips_per_s"] * last["step_ms"] == pytest.approx(8 * 1000) and 0 < last["data_wait"] < 1
    assert "step 5  loss" in capsys.readouterr().out


@pytest.mark.parametrize("updates, advice", [
    (400_000, ["28 days: did you mean --preset demo, --model small?"]), (40_000, []),
])  # fmt: skip
def test_a_run_says_how_long_it_will_take(folder, train, capsys, monkeypatch, updates, advice):
    """From the third update on, as if each took 6 s and the run began on the first of January."""
    now, real = [0.0], pretrain.train_step

    def train_step(*args):
        out = real(*args)
        now[0] += 6
        if now[0] == 24:
            signal.raise_signal(signal.SIGTERM)
        return out

    monkeypatch.setattr(pretrain, "train_step", train_step)
    monkeypatch.setattr(time, "perf_counter", lambda: 1 + now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "localtime", time.gmtime)
    assert train(*PLAIN, "--updates", updates, "--out_dir", "run") == 128 + signal.SIGTERM
    end = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=6 * updates)
    lines = capsys.readouterr().out.splitlines()
    said = [f"an update takes 6.00 s: {updates - 3:,} more until {end:%a %d %b %H:%M}", *advice]
    at = lines.index(said[0])
    assert lines[at : at + len(said)] == said and lines[at - 1].startswith("step 3 ")
    assert lines[at + len(said)].startswith("step 4 ") and max(map(len, lines)) <= 80
    left = [line["minutes_left"] for line in read_log(folder / "run")]
    assert left == pytest.approx([(updates - step) / 10 for step in (1, 2, 3, 4)])


def test_output_is_made_for_people_and_for_files(classifier, train, tune, called, capfd):
    """Lines of at most 80 columns; no bars of progress where there is no terminal."""
    probes = ["--probe_train", "manifest.tsv", "--probe_test", "manifest.tsv", "--probe_every", 5]
    assert train(*PLAIN, "--out_dir", "run", *probes) == 0
    small = "--preset own --model tiny --init scratch --batch_size 8 --updates 10 --min_samples 1600".split()
    data = "--clip_frames 96 --workers 0 --log_every 1 --data manifest.tsv --eval_data manifest.tsv".split()
    assert tune(*small, *data, "--out_dir", "tuned") == 0
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert set(said.err.splitlines()) == {"WARNING: probes: 0 clips cannot be used, 12 are cut to fit"}
    assert sum("probe_linear" in line for line in lines) == 3 and sum("mAP" in line for line in lines) >= 2
    outputs = [said.out]
    for module, *args in (
        (evaluate, "classifier.pt", "manifest.tsv"), (evaluate, "run", "manifest.tsv", "manifest.tsv"),
        (prepare, "scan", ".", "-o", "new.tsv"), (prepare, "stats", "new.tsv"),
        (prepare, "pack", "new.tsv", "packed.tsv"), (listen, "classifier.pt", "clip 0.wav", "clip 1.wav"),
        (listen, "classifier.pt", "clip 7.wav"), (listen, "run", ".", "--features", "features"),
    ):  # fmt: skip
        done = called(module, *args)
        outputs.append(done.stdout + done.stderr)
    assert all(outputs) and "\r" not in "".join(outputs)


@pytest.mark.parametrize("flags, kept", [
    (["--save_every", 4], (8, 10)), (["--save_every", 20, "--save_minutes", 1e-9], (9, 10)), ([], (10,)),
])  # fmt: skip
def test_checkpoints_come_by_updates_or_minutes(folder, train, flags, kept):
    """The last two are kept: previous.pt and last.pt; the one of the last update is always there."""
    assert train(*PLAIN, "--out_dir", "run", *flags) == 0
    paths = filter(Path.exists, (folder / "run" / name for name in ("previous.pt", "last.pt")))
    assert tuple(load_checkpoint(path)["step"] for path in paths) == kept


@pytest.mark.parametrize("flags", [
    ["--mask", "flexible", "--clip_frames", 128, "--mask_ratio", 0.6, "--mask_adjust", 0.3],
    ["--mask_block_time", 1, "--mask_block_freq", 1], ["--target_layers", 1, "--utterance_weight", 0],
    ["--amp", "bf16"], ["--seed", 5],
])  # fmt: skip
def test_every_variant_learns_and_no_two_are_the_same(folder, train, flags):
    assert train(*PLAIN, "--out_dir", "run", *flags) == 0 == train(*PLAIN, "--out_dir", "plain")
    ours = losses(folder / "run")
    assert ours[-1] < 0.95 * ours[0] and ours[-1] != losses(folder / "plain")[-1]


def test_going_on_from_the_weights_of_another_run(folder, train):
    """--init takes student and teacher of a checkpoint, nothing else; one of another size is refused."""
    train(*PLAIN, "--out_dir", "first")
    still = "--updates 1 --warmup 0 --lr 1e-30 --ema_decay 1 --ema_decay_end 1".split()
    train(*PLAIN, "--out_dir", "second", "--init", "first", *still)
    first, second = (load_checkpoint(folder / name / "last.pt") for name in ("first", "second"))
    for part in ("student", "teacher"):
        assert all(torch.equal(second[part][key], value) for key, value in first[part].items())
    assert losses(folder / "second")[0] < 0.95 * losses(folder / "first")[0]
    with pytest.raises(ValueError, match="first is not a checkpoint of this model") as error:
        train(*PLAIN, "--model", "demo", "--out_dir", "third", "--init", "first")
    assert "\n" not in str(error.value) and not (folder / "third").exists()


def test_a_run_folder_keeps_its_settings(folder, script, train, capsys):
    args = [*PLAIN, "--out_dir", "run"]
    assert train(*args) == 0
    before = {p.name: p.read_bytes() for p in (folder / "run").iterdir()}
    capsys.readouterr()
    assert train(*args) == 0 and "done: 10 updates" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in (folder / "run").iterdir()}
    refused = script("pretrain.py", *args, "--lr", 0.1, check=False)
    said = "pretrain.py: run has other settings (lr was 0.002, now 0.1): choose another --out_dir\n"
    assert refused.returncode == 1 and refused.stderr == said
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "other.tsv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="data_digest was"):
        train(*args, "--data", "other.tsv")
    assert before == {p.name: p.read_bytes() for p in (folder / "run").iterdir()}
    (folder / "manifest.tsv").rename(folder / "moved.tsv")  # the same data in another place is the same
    assert train(*args, "--data", "moved.tsv", "--save_every", 3, "--workers", 1) == 0
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="mine is not empty and holds no run"):
        train(*args, "--data", "moved.tsv", "--out_dir", "mine")
    assert [p.name for p in (folder / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_keeps_its_precision(folder, train, monkeypatch):
    """The one that --amp auto has found: where it would be another, the run does not go on in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = [*PLAIN, "--out_dir", "run"]
    assert train(*args, "--amp", "fp32") == 0 == train(*args, "--amp", "auto")
    with pytest.raises(InputError, match=r"run has other settings \(amp was fp32, now bf16\)"):
        train(*args, "--amp", "bf16")
    monkeypatch.setattr(pretrain, "pick_precision", lambda *_: ("fp16", torch.float16))  # on another machine
    with pytest.raises(InputError, match=r"\(amp was fp32, now fp16\)") as error:
        train(*args)
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
    reasons = {name: reason for name, reason in (line.split("\t") for line in listed)}
    assert len(listed) == len(reasons) == len(bad) + 3000
    assert {name: reasons[name] for name, word in bad.items() if word not in reasons[name]} == {}
    assert reasons["short 7.wav"] == "shorter than --min_samples 1600"
    n_items = 8 + len(bad)
    n_bad = read_log(folder / "run")[-1]["bad_clips"]  # of 80 clips, those of which are bad
    assert abs(n_bad / 80 - len(bad) / n_items) < len(bad) / 80 and n_bad >= len(bad) * (80 // n_items)


@pytest.mark.parametrize("args, message", [
    (["--data", "nothing.tsv"], "cannot read the manifest nothing.tsv"),
    (["--data", "broken.tsv"], "broken.tsv, line 2"),
    (["--data", "."], "cannot read the manifest .: Is a directory"),
    (["--data", "nowhere.tsv"], "nowhere.tsv, line 1: there is no folder /nowhere"),
    (["--data", "unpacked.tsv"], "gone.pcm is missing or has the wrong size"),
    (["--probe_train", "a.tsv", "--probe_test", "a.tsv"], "cannot read the manifest a.tsv"),
    (["--init", "nothing.pt"], "nothing.pt"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(folder, train, args, message):
    (folder / "broken.tsv").write_text("/data\nno tab or number here\n")
    (folder / "nowhere.tsv").write_text("/nowhere\na.wav\t16000\n")
    (folder / "unpacked.tsv").write_text("gone.pcm\na.wav\t16000\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train(*PLAIN, *args, "--out_dir", "run")
    assert "\n" not in str(error.value) and not (folder / "run").exists()


# --- several processes ------------------------------------------------------------------------------------


def our_lines(result: subprocess.CompletedProcess) -> list[str]:
    """What our code has said on stderr; the rest is torchrun's."""
    traceback = re.search(r"^\[rank\d\]: ", result.stderr, re.M)  # how torch begins its lines
    assert not traceback, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("pretrain.py: ")]


@pytest.mark.parametrize("args, message", [
    (["--data", "nothing.tsv"], "cannot read the manifest nothing.tsv: No such file or directory"),
    pytest.param(
        ["--batch_size", 7], "--batch_size 7 does not divide by 2 processes x 1 (--accumulate)",
        marks=pytest.mark.long,
    ),
    pytest.param(["--lr", -1], "--lr must be a number above 0, not -1.0", marks=pytest.mark.long),
    (["--out_dir", "mine"], "mine is not empty and holds no run: choose another --out_dir"),
])  # fmt: skip
def test_an_error_is_told_once_by_all_processes(folder, script, args, message):
    """Whether all find it, before or after they have joined, or the first alone, as what is in the folder."""
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    result = script("pretrain.py", *PLAIN, "--out_dir", "run", *args, processes=2, check=False)
    assert result.returncode == 1 and our_lines(result) == [f"pretrain.py: {message}"]
    assert not (folder / "run").exists()


@pytest.mark.parametrize("what", [
    "settings", *(pytest.param(what, marks=pytest.mark.long) for what in ("data", "precision")),
])  # fmt: skip
def test_processes_that_do_not_agree_are_refused(folder, script, what):
    """As when another machine has an old command line or another manifest: nothing is trained."""
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "manifest1.tsv").write_text("\n".join(lines[:-1]) + "\n")
    (folder / "manifest0.tsv").write_text("\n".join(lines) + "\n")
    own = dict(
        settings='sys.argv += ["--seed", rank]', data='sys.argv += ["--data", f"manifest{rank}.tsv"]',
        precision='evaluate.pick_precision = lambda *_: (("fp32", "bf16")[int(rank)], None)',  # of --amp auto
    )[what]  # fmt: skip
    (folder / "start.py").write_text(
        f'import os, runpy, sys\nsys.path.insert(0, "{ROOT}")\nimport evaluate\n'
        f'rank = os.environ["RANK"]\n{own}\nsys.argv[0] = "pretrain.py"\n'
        f'runpy.run_path("{ROOT / "pretrain.py"}", run_name="__main__")\n'
    )
    result = script(folder / "start.py", *PLAIN, "--out_dir", "run", processes=2, check=False)
    said = "pretrain.py: process 1 has other settings, data or precision than the first"
    assert result.returncode == 1 and our_lines(result) == [said]
    assert not (folder / "run" / "last.pt").exists() and not (folder / "run" / "log.jsonl").exists()


# --- the log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["", '{"step": 5, "lo', '{"step": 5, "lo{"step": 6, "loss": 1}', "\0\0\0"])
def test_a_damaged_log_is_trimmed(tmp_path, damage):
    """Lines that will be written again go, and what a crash or a full disk has left; the rest stays."""
    path = tmp_path / "log.jsonl"
    rows = [dict(step=0, probe_knn=0.5), dict(step=1, loss=3.0), dict(step=4, loss=2.0)]
    rows += [dict(step=4, probe_knn=0.6), dict(step=5, loss=1.0)]
    path.write_text("\n".join([*map(json.dumps, rows), damage]))
    trim_log(path, 4)
    assert read_log(tmp_path) == rows[:3]  # the probe of update 4 is made after its checkpoint
    trim_log(path, 0)
    assert read_log(tmp_path) == []
    trim_log(Path(tmp_path, "new.jsonl"), 0)


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
    assert log[-1]["loss"] < 0.95 * log[0]["loss"] and log[-1]["skipped"] == 0
    assert log[-1]["gpu_memory_gib"] > 0
