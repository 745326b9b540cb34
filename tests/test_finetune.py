"""Fine-tuning: learning rates, augmentation and losses against the released code's numbers, whole runs, bad input."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import NEEDS_GPU, ROOT, tone
from test_checkpoints import Attack, golden  # noqa: F401  (a fixture)
from test_parity import GOLDEN, assert_near, our_name

import finetune
from data import AudioDataset, ClipSampler, InputError, read_classes, read_targets, sampling_weights
from evaluate import average_precision
from finetune import (
    PRESETS,
    Draws,
    FinetuneConfig,
    add_noise,
    draw_augmentation,
    layer_decay_groups,
    mixup,
    roll_and_gain,
    spec_augment,
    summed_loss,
    train_step,
)
from model import MODELS, AudioClassifier, DropPath, ModelConfig, load_checkpoint
from pretrain import cosine_lr, make_scaler

AS20K = FinetuneConfig(**PRESETS["as20k"])
TINY = "--preset esc50 --init scratch --model tiny --clip_frames 64 --min_samples 1600 --batch_size 8".split()
TINY += "--workers 0 --updates 12 --warmup 2 --lr 2e-3 --log_every 1 --save_every 4 --eval_every 6".split()
TINY += ["--data", "manifest.tsv", "--eval_data", "manifest.tsv", "--out_dir", "run"]


def read_log(path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["classifier"]


# --- against the released code ---------------------------------------------------------------------------------------


def test_loss_of_the_released_classifier(golden):  # noqa: F811
    model = AudioClassifier.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    targets = torch.from_numpy(golden["labels"]).float()
    with torch.no_grad():
        loss = summed_loss(model(golden["spec"]), targets, AS20K) / targets.sum()
    assert_near("loss", loss, golden["bce_over_positives"], 1e-5)


def test_peak_learning_rate_of_every_parameter(golden):  # noqa: F811
    model = AudioClassifier.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    peak = {id(p): group["peak_lr"] for group in layer_decay_groups(model, AS20K) for p in group["params"]}
    ours = {name: peak[id(p)] for name, p in model.named_parameters()}
    theirs = {}
    for name, value in zip(golden["peak_lr_names"], golden["peak_lr"]):
        theirs[our_name(name.removeprefix("model.")) if name.startswith("model.") else str(name)] = value
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], rel=1e-12) for name in ours)


def test_learning_rates_over_the_whole_as20k_schedule():
    """eat.md section 12 and 8.3: head, block 3 (just above the floor), blocks 0-2 (below it) and the last."""
    with torch.device("meta"):
        model = AudioClassifier(ModelConfig(), {str(i): "" for i in range(527)})
    groups = {round(g["peak_lr"] / 5e-5, 12): g for g in layer_decay_groups(model, AS20K)}
    assert len(groups) == 13 and sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))

    def lrs(block: int) -> list[float]:
        group = groups[round(0.65 ** (12 - block), 12)]
        steps = (0, 2000, 4000, 22_000, 40_000)
        return [cosine_lr(n, group["peak_lr"], AS20K.warmup, AS20K.updates, group["min_lr"]) for n in steps]

    assert lrs(12) == pytest.approx([1e-6, 2.55e-5, 5e-5, 2.55e-5, 1e-6], rel=1e-6)
    assert lrs(3) == pytest.approx([1e-6, 1.018e-6, 1.036e-6, 1.018e-6, 1e-6], rel=1e-3)
    for block, value in enumerate((2.84e-7, 4.38e-7, 6.73e-7)):
        assert lrs(block) == pytest.approx([value] * 5, rel=2e-3)
    assert max(lrs(11)) == pytest.approx(3.25e-5)
    spcv2 = dataclasses.replace(AS20K, lr=2e-4)
    assert layer_decay_groups(model, spcv2)[1]["peak_lr"] == pytest.approx(1.14e-6, rel=5e-3)


def test_presets_are_the_released_scripts():
    """eat.md section 11, row by row."""
    rows = {name: FinetuneConfig(**PRESETS[name]) for name in ("as2m", "as20k", "esc50", "spcv2")}
    for field, values in dict(
        lr=(5e-5, 5e-5, 5e-5, 2e-4), updates=(300_000, 40_000, 4_000, 40_000), warmup=(30_000, 4_000, 400, 4_000),
        batch_size=(96, 48, 48, 256), clip_frames=(1024, 1024, 512, 128), norm_mean=(-4.268, -4.268, -6.627, -6.846),
        norm_std=(4.569, 4.569, 5.359, 5.565), mixup=(0.8, 0.8, 0.0, 0.8), specaug_freq=(0.2, 0.2, 0.4, 0.2),
        specaug_time=(0.2, 0.2, 0.4, 0.2), roll=(True,) * 4, noise=(False, False, False, True),
        label_smoothing=(0.0, 0.0, 0.1, 0.1), weighted=(True, False, False, False),
        loss=("bce_positives", "bce_positives", "ce", "bce"), layer_decay=(0.65,) * 4, drop_path=(0.1,) * 4,
        metric=("mAP", "mAP", "accuracy", "accuracy"), seed=(1, 1, 1, 42), mixup_prob=(0.9,) * 4, min_lr=(1e-6,) * 4,
        beta1=(0.9,) * 4, beta2=(0.95,) * 4, weight_decay=(0.05,) * 4, clip_norm=(0.0,) * 4, epoch_clips=(200_000,) * 4,
        pooling=("cls",) * 4,
    ).items():  # fmt: skip
        assert tuple(getattr(row, field) for row in rows.values()) == values, field


def test_drop_path_rates_and_scale():
    encoder = AudioClassifier(ModelConfig(width=64, heads=2, drop_path=0.1), {"a": "a", "b": "b"}).encoder
    rates = [block.drop_path.rate for block in encoder.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    drop, x = DropPath(0.25).train(), torch.ones(20_000, 2, 3)
    y = drop(x)
    per_clip = y[:, 0, 0]
    assert (y == per_clip[:, None, None]).all() and per_clip.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (per_clip == 0).double().mean() == pytest.approx(0.25, abs=0.015)
    assert drop.eval()(x) is x


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, hard = torch.randn(6, 5, generator=generator), torch.nn.functional.one_hot(torch.arange(6) % 5, 5).float()
    ce = FinetuneConfig(**PRESETS["esc50"])
    expected = torch.nn.functional.cross_entropy(logits, hard.argmax(1), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(summed_loss(logits, hard, ce), expected)
    mixed = mixup(hard, 0.3)
    expected = -(mixed * logits.log_softmax(1)).sum()  # no smoothing once labels are mixed
    torch.testing.assert_close(summed_loss(logits, mixed, dataclasses.replace(ce, mixup=0.8)), expected)
    p = logits.sigmoid()
    expected = -(mixed * p.log() + (1 - mixed) * (1 - p).log()).sum()
    torch.testing.assert_close(summed_loss(logits, mixed, AS20K), expected)


@pytest.mark.parametrize("loss", ["bce_positives", "bce", "ce"])
def test_an_update_in_parts_is_an_update(loss):
    """Accumulation, with parts of different label mass, gives the gradient of the whole batch."""
    torch.manual_seed(0)
    model = AudioClassifier(MODELS["tiny"], {str(i): "" for i in range(4)})
    config = FinetuneConfig(loss=loss, updates=10, warmup=0, mixup=0.0)
    spec, y = torch.randn(4, 1, 32, 128), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    results = []
    for parts in ([(spec, y)], [(spec[:2], y[:2]), (spec[2:], y[2:])]):
        one = AudioClassifier(MODELS["tiny"], model.classes)
        one.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD([dict(params=one.parameters(), peak_lr=0.1, min_lr=0.0)], lr=0.0, fused=True)
        scaler = make_scaler(torch.float32, torch.device("cpu"))
        out = train_step(one, optimizer, scaler, parts, 0, config, torch.float32)
        results.append((out["loss"], out["grad_norm"], *one.state_dict().values()))
    torch.testing.assert_close(results[0], results[1])
    total = y.sum() if loss == "bce_positives" else 4
    torch.testing.assert_close(results[0][0], summed_loss(model(spec), y, config).detach() / total)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_mixup_keeps_label_mass_and_mixes_clips_as_labels():
    x, y = torch.randn(6, 1, 8, 4), (torch.rand(6, 5) < 0.5).float()
    for weight in (0.0, 0.3, 1.0):
        assert mixup(y, weight).sum() == pytest.approx(y.sum().item(), rel=1e-6)
        torch.testing.assert_close(mixup(x, weight)[1], weight * x[1] + (1 - weight) * x[4])
    draws = [draw_augmentation(AS20K, step)[1] for step in range(4000)]
    assert sum(weight == 1 for weight in draws) / 4000 == pytest.approx(0.1, abs=0.02)
    mixed = [weight for weight in draws if weight < 1]
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.02) and np.var(mixed) == pytest.approx(1 / (4 * 2.6), abs=0.01)
    assert all(draw_augmentation(dataclasses.replace(AS20K, mixup=0.0), step)[1] == 1 for step in range(50))


def many_draws(n: int) -> Draws:
    return Draws(*draw_augmentation(dataclasses.replace(AS20K, batch_size=n), 0)[0])


def test_spec_augment_widths_and_places():
    """Widths are floor(u * part * size), as eat.md 1.9 measured: 0 to 25 with mean 12.3, and 0 to 204 with mean 101."""
    n = 4000
    blank = spec_augment(torch.ones(n, 1, 1024, 128), many_draws(n), 0.2, 0.2)[:, 0] == 0
    bins, frames = blank.all(1), blank.all(2)                     # (n, 128), (n, 1024)
    assert torch.equal(blank, bins[:, None, :] | frames[:, :, None])
    for mask, widest, mean in ((bins, 25, 12.3), (frames, 204, 101)):
        width = mask.sum(1)
        assert width.max() == widest and width.double().mean() == pytest.approx(mean, rel=0.03)
        steps = (mask[:, 1:] != mask[:, :-1]).sum(1) + mask[:, 0].int() + mask[:, -1].int()
        assert ((steps == 2) | (width == 0)).all()                # one stretch
    assert (bins.sum(1) == 0).double().mean() == pytest.approx(1 / 25.6, abs=0.01)
    middle = (torch.arange(1024) * frames).sum(1)[frames.any(1)] / frames.sum(1)[frames.any(1)]
    assert middle.mean() == pytest.approx(511, abs=12)
    assert torch.equal(spec_augment(torch.ones(4, 1, 64, 128), many_draws(4), 0.0, 0.0), torch.ones(4, 1, 64, 128))


def test_roll_turns_the_sound_and_not_the_padding():
    waveform = torch.zeros(3, 10)
    waveform[:, :6] = torch.arange(1.0, 7)
    out = roll_and_gain(
        waveform, torch.tensor([6, 6, 6]), torch.tensor([0.0, 0.5, 0.99]), torch.tensor([1.0, 2.0, 1.0]).double()
    )
    assert out[0].tolist() == waveform[0].tolist()
    assert out[1].tolist() == [8, 10, 12, 2, 4, 6, 0, 0, 0, 0]
    assert out[2].tolist() == [2, 3, 4, 5, 6, 1, 0, 0, 0, 0]
    pcm = roll_and_gain((waveform * 1000).short(), torch.tensor([6] * 3), torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(pcm, waveform * 1000 / 32768)
    gain = many_draws(20_000).gain  # Beta(10, 10) + 0.5
    assert gain.mean() == pytest.approx(1, abs=0.005) and gain.var() == pytest.approx(1 / 84, rel=0.05)
    assert 0.5 <= gain.min() and gain.max() <= 1.5


def test_noise_is_uniform_positive_and_turns_frames():
    draws = many_draws(2000)
    assert draws.shift.min() == -10 and draws.shift.max() == 9 and draws.noise.min() >= 0
    spec = torch.arange(20.0)[None, None, :, None].expand(2, 1, 20, 128)
    turned = add_noise(spec, torch.zeros_like(spec), torch.ones(2), torch.tensor([3, -2]))
    assert turned[0, 0, :4, 0].tolist() == [17, 18, 19, 0] and turned[1, 0, -3:, 0].tolist() == [19, 0, 1]
    noisy = add_noise(spec, torch.ones_like(spec), torch.tensor([0.5, 1.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(noisy - spec, torch.tensor([0.05, 0.1])[:, None, None, None].expand_as(spec))


# --- sampling and classes --------------------------------------------------------------------------------------------


def test_weighted_sampling_hears_rare_classes_and_repeats_none_in_an_epoch():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(20_000, 3, generator=generator) < torch.tensor([0.5, 0.05, 0.005])
    targets[:, 0] |= ~targets.any(1)
    weights = sampling_weights(targets)
    counts = targets.sum(0).double()
    i = int(targets[:, 1].nonzero()[0])
    assert weights[i] == pytest.approx(sum(1000 / (c + 0.01) for c, y in zip(counts.tolist(), targets[i]) if y))
    batches = iter(ClipSampler(20_000, 5, seed=0, weights=weights, epoch_items=20))
    epochs = [torch.tensor([next(batches) for _ in range(4)]).flatten() for _ in range(2000)]
    assert all(len(epoch.unique()) == 20 for epoch in epochs) and not torch.equal(epochs[0], epochs[1])
    drawn = targets[torch.cat(epochs)].double().mean(0)
    # with so small an epoch, drawing without replacement is nearly drawing by weight
    expected = (weights[:, None] * targets).sum(0) / weights.sum()
    assert drawn.tolist() == pytest.approx(expected.tolist(), rel=0.1)
    assert drawn[2] > 10 * targets[:, 2].double().mean()
    halves = torch.stack(epochs).view(2000, 2, 10)  # a rare clip comes as often early in an epoch as late
    early, late = (targets[halves[:, i].flatten(), 2].double().mean() for i in (0, 1))
    assert early == pytest.approx(late.item(), rel=0.1)


def test_mirrored_parts_are_the_whole_batch():
    """Partners in mixup share a part, so that any number of processes mixes the same pairs."""
    for world, accumulate in ((1, 1), (2, 1), (2, 2), (4, 1)):
        mixed = {}
        for rank in range(world):
            sampler = ClipSampler(100, 8, 0, 0, rank, world, accumulate, mirrored=True)
            for micro in range(accumulate):
                rows = sampler.rows(micro)
                mixed |= dict(zip(rows, reversed(rows)))
        assert mixed == {i: 7 - i for i in range(8)}


def test_class_files(tmp_path):
    (tmp_path / "audioset.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
    )
    assert read_classes(tmp_path / "audioset.csv") == {"/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking"}
    (tmp_path / "released.csv").write_text("0,/m/09x0r,Speech\n1,/m/05zppz,Male speech\n")
    assert read_classes(tmp_path / "released.csv") == {"/m/09x0r": "Speech", "/m/05zppz": "Male speech"}
    (tmp_path / "gap.csv").write_text("0,dog\n2,cat\n")
    with pytest.raises(InputError, match="do not count from 0"):
        read_classes(tmp_path / "gap.csv")
    (tmp_path / "lines.txt").write_text("dog\ncat\n\n")
    assert list(read_classes(tmp_path / "lines.txt")) == ["dog", "cat"]
    (tmp_path / "twice.txt").write_text("dog\ndog\n")
    with pytest.raises(InputError, match="every class once"):
        read_classes(tmp_path / "twice.txt")


def test_released_label_files(folder):
    """A .tsv of two columns with an .lbl beside it, as the released code has them."""
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "old.tsv").write_text("\n".join(line.rsplit("\t", 1)[0] for line in lines) + "\n")
    (folder / "old.lbl").write_text("".join(f"{i} {'a,b' if i % 2 else 'b'}\n" for i in range(8)))
    targets = read_targets(AudioDataset(str(folder / "old.tsv"), segments=False), {"a": "a", "b": "b"})
    assert targets[:, 0].tolist() == [False, True] * 4 and targets[:, 1].all()


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_task_on_real_audio_is_learned(tmp_path, script):
    """Instruments or a syllable: from an untrained network to nearly all right on clips it was not trained on."""
    demo = ROOT / "assets" / "demo"
    clips = [(path, kind) for kind in ("instruments", "syllables/a") for path in sorted((demo / kind).iterdir())]
    for part in (0, 1):
        lines = [f"{path.relative_to(demo)}\t16000\t{kind}" for path, kind in clips[part::2]]
        (tmp_path / f"{part}.tsv").write_text("\n".join([str(demo), *lines]) + "\n")
    script("finetune.py", *TINY, "--data", "0.tsv", "--eval_data", "1.tsv", "--updates", 150, "--lr", 5e-3)
    assert read_log(tmp_path / "run")[-1]["accuracy"] >= 0.9


def test_resume_is_exact_and_best_is_kept(folder, script):
    more = [*TINY, "--updates", 40]
    script("finetune.py", *more)
    whole, cut = weights(folder / "run" / "last.pt"), [*more, "--out_dir", "cut"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "finetune.py"), *map(str, cut)], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.time() + 120
    while not (folder / "cut" / "last.pt").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "resuming at update" in script("finetune.py", *cut).stdout
    again = weights(folder / "cut" / "last.pt")
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
    log = read_log(folder / "cut")
    evaluations = {record["step"]: record["accuracy"] for record in log if "accuracy" in record}
    assert list(evaluations) == [6, 12, 18, 24, 30, 36, 40]
    best = load_checkpoint(folder / "cut" / "best.pt")
    assert best["best"]["score"] == max(evaluations.values()) and "optimizer" not in best
    assert AudioClassifier.from_pretrained(folder / "cut").classes == {"high": "high", "low": "low"}


def test_a_signal_to_all_processes_of_an_evaluating_run_saves(folder, script):
    """Loaders included, several times, in training and evaluation alike; none is left behind, and the run goes on."""
    more = [*TINY, "--workers", 1, "--updates", 30, "--eval_every", 1]
    for delay in (0.1, 0.6, 1.3):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "finetune.py"), *map(str, more)], cwd=folder, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while "step" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 143 and "Traceback" not in said, said
    assert "resuming at update" in script("finetune.py", *more).stdout
    assert read_log(folder / "run")[-1]["step"] == 30


@pytest.mark.parametrize("preset", ["as20k", "as2m", "spcv2"])
def test_two_processes_are_one(folder, script, preset):
    """The same clips, mixed in the same pairs, with the same augmentation; drop path alone is drawn by each."""
    metric = ["--metric", "mAP"] if preset != "spcv2" else []
    args = [*TINY, "--preset", preset, "--drop_path", 0, "--lr", 1e-3, *metric, "--seed", 3, "--epoch_clips", 4]
    for name, processes, more in (("one", 1, []), ("two", 2, []), ("parts", 1, ["--accumulate", 2])):
        script("finetune.py", *args, "--out_dir", name, *more, processes=processes)
    one, two, parts = (read_log(folder / name) for name in ("one", "two", "parts"))
    for ours in (two, parts):
        for a, b in zip(one, ours, strict=True):
            for key in {"loss", "grad_norm", "mAP"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)


def test_from_pretrained_weights_and_probes(folder, script):
    tiny = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2 --batch_size 4".split()
    tiny += "--updates 3 --warmup 1 --min_samples 1600 --workers 0 --data manifest.tsv --out_dir pre".split()
    script("pretrain.py", *tiny, "--probe_manifest", "manifest.tsv", "--probe_every", 2)
    probes = {r["step"]: (r["probe_linear"], r["probe_knn"]) for r in read_log(folder / "pre") if "probe_knn" in r}
    assert list(probes) == [0, 2, 3] and all(0 <= x <= 1 for pair in probes.values() for x in pair)
    script("model.py", "export", "pre", "exported")
    accuracies = []
    for init in ("pre", "exported", "exported/fairseq.pt"):
        for kind in ("linear", "knn"):
            layer = "mix" if kind == "linear" else "mean"
            args = [*TINY, "--init", init, "--probe", kind, "--probe_layer", layer]
            accuracies.append(script("finetune.py", *args).stdout.splitlines()[-1].split()[-1])
        script("finetune.py", *TINY, "--init", init, "--updates", 2, "--out_dir", f"from_{init.replace('/', '_')}")
    assert accuracies == accuracies[:2] * 3
    logs = [read_log(folder / name) for name in ("from_pre", "from_exported", "from_exported_fairseq.pt")]
    assert logs[0][0]["loss"] == logs[1][0]["loss"] == logs[2][0]["loss"]


def test_folds_and_their_mean(folder, script):
    lines = (folder / "manifest.tsv").read_text().splitlines()
    for fold in (1, 2):
        for part in ("train", "test"):
            mine = [line for i, line in enumerate(lines[1:]) if (i % 2 == fold - 1) == (part == "test")]
            (folder / f"{part}{fold}.tsv").write_text("\n".join([lines[0], *mine]) + "\n")
    args = [*TINY, "--data", "train{fold}.tsv", "--eval_data", "test{fold}.tsv", "--updates", 2]
    table = script("finetune.py", *args, "--fold", "all").stdout.splitlines()[-1]
    each = [read_log(folder / "run" / f"fold{i}")[-1]["accuracy"] for i in (1, 2)]
    assert table.split()[1] == f"{np.mean(each):.4f}" and f"({each[0]:.4f} {each[1]:.4f})" in table
    assert json.loads((folder / "run" / "table.json").read_text())["accuracy"]["fine-tuned"] == each
    refused = script("finetune.py", *args, check=False)
    assert refused.stderr == "finetune.py: --fold is missing: a number, or all\n"


def test_seeds_of_their_own_checkpoints_and_their_spread(folder, script):
    """The table of --compare --seeds: seed n starts from the checkpoint of seed n; mean and sample deviation."""
    tiny = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2 --batch_size 4".split()
    tiny += "--updates 1 --warmup 1 --min_samples 1600 --workers 0 --data manifest.tsv".split()
    for seed in (3, 4):
        script("pretrain.py", *tiny, "--seed", seed, "--out_dir", f"pre{seed}")
    args = [*TINY, "--init", "pre{seed}", "--seed", 3, "--updates", 2, "--compare"]
    said = script("finetune.py", *args, "--seeds", 2).stdout
    table = json.loads((folder / "run" / "table.json").read_text())["accuracy"]
    assert all(len(scores) == 2 for scores in table.values()) and "linear probe, log-mel" in table
    for i, seed in enumerate((3, 4)):
        rows = dict(pretrained="fine-tuned, pre-trained", scratch="fine-tuned, from scratch")
        for name, row in rows.items():
            assert read_log(folder / "run" / name / f"seed{seed}")[-1]["accuracy"] == table[row][i]
        alone = script("finetune.py", *TINY, "--init", f"pre{seed}", "--probe", "knn", "--seed", seed).stdout
        assert alone.splitlines()[-1].split()[-1] == f"{table['knn probe, pre-trained'][i]:.4f}"
    scores = table["linear probe, random encoder"]
    assert f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}" in said


def test_an_unreadable_clip_is_neither_trained_on_nor_scored(folder, script):
    """Its stand-in comes with its own labels."""
    (folder / "clip 2.wav").write_text("damaged")
    script("finetune.py", *TINY, "--max_bad_fraction", 1)
    log = read_log(folder / "run")
    assert log[-1]["clips"] == 7 and "clip 2.wav\t" in (folder / "run" / "bad_files.tsv").read_text()
    dataset = AudioDataset(str(folder / "manifest.tsv"), 64, segments=False)
    clip = dataset[2]
    assert clip.problem and clip.item == 3 and dataset.labels(clip.item) == ["low"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--init", "nothing.pt"], "cannot read nothing.pt: No such file"),
        (["--init", "attack.pt"], "attack.pt holds posix.system, more than tensors and plain values: refused"),
        (["--init", ""], "--init is missing"),
        (["--data", "unlabelled.tsv"], "unlabelled.tsv has no labels"),
        (["--data", "half.tsv"], "clip 1.wav has no label"),
        (["--eval_data", "other.tsv"], "has the label 'bird', which is not one of the 2 classes"),
        (["--eval_data", ""], "--eval_data is missing"),
        (["--data", "single.tsv"], "has one class only"),
        (["--data", "several.tsv"], "a clip has several labels"),
        (["--batch_size", "7", "--mixup", "0.5"], "mixup pairs clips"),
        (["--loss", "mse"], "--loss mse: choose from bce_positives, bce, ce"),
        (["--lr", "nan"], "reasonable size"),
        (["--clip_frames", "8"], "16 to 12288"),
        (["--probe", "svm"], "--probe svm: choose from"),
        (["--probe", "knn", "--probe_layer", "mix"], "nearest neighbours learn no weights"),
        (["--compare"], "--compare needs a checkpoint as --init"),
        (["--model", "huge"], "--model huge: choose from base"),
        (["--timeout", "1e300"], "--timeout must be"),
        (["--classes", "nothing.csv"], "cannot read the classes in nothing.csv"),
        (["--fold", "all"], "--fold needs {fold}"),
        (["--seeds", "0"], "--seeds must be above 0"),
        (["--seeds", "2", "--init", "no{seed}.pt"], "cannot read no1.pt: No such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, script, args, message):
    torch.save(dict(network={}, student=Attack(folder / "ran")), folder / "attack.pt")
    (folder / "unlabelled.tsv").write_text(f"{folder}\nclip 0.wav\t8000\nclip 1.wav\t9600\n")
    (folder / "half.tsv").write_text(f"{folder}\nclip 0.wav\t8000\ta\nclip 1.wav\t9600\n")
    (folder / "other.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tbird\n")
    (folder / "single.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow\nclip 1.wav\t9600\tlow\n")
    (folder / "several.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow,high\nclip 1.wav\t9600\tlow\n")
    result = script("finetune.py", *TINY, *args, check=False)
    assert result.returncode in (1, 2) and message in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "run").exists() and not (folder / "ran").exists()


def test_a_diverged_network_is_told_in_one_line(folder, script):
    args = [*TINY, "--lr", 1e30, "--layer_decay", 1, "--warmup", 0, "--eval_every", 3]
    result = script("finetune.py", *args, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "scores are not finite: its training has diverged" in result.stderr


def test_a_silent_clip_is_scored(folder, script):
    """Not trained on, but its score counts, as in the released code."""
    soundfile.write(folder / "clip 5.wav", np.zeros(16_000), 16_000)
    script("finetune.py", *TINY, "--max_bad_fraction", 1)
    assert read_log(folder / "run")[-1]["clips"] == 8
    assert "clip 5.wav\tsilent" in (folder / "run" / "bad_files.tsv").read_text()


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(folder, script):
    """The run is stopped at the very update that is due: saved at once, evaluated when it goes on."""
    script("finetune.py", *TINY)
    state = load_checkpoint(folder / "run" / "last.pt")
    state["last"], state["best"] = dict(step=6, score=state["last"]["score"]), dict(step=6, score=-1.0)
    torch.save(state, folder / "run" / "last.pt")
    script("finetune.py", *TINY)
    assert [r["step"] for r in read_log(folder / "run") if "accuracy" in r] == [6, 12, 12]
    assert load_checkpoint(folder / "run" / "best.pt")["step"] == 12


def test_other_settings_in_the_same_folder_are_refused(folder, script):
    (folder / "names.txt").write_text("low\nhigh\n")
    script("finetune.py", *TINY)
    other = script("finetune.py", *TINY, "--classes", "names.txt", check=False)  # the head's rows mean others
    assert other.returncode == 2 and "classes_digest was" in other.stderr
    refused = script("finetune.py", *TINY, "--layer_decay", 0.9, check=False)
    assert refused.returncode == 2 and "layer_decay was 0.65, now 0.9" in refused.stderr
    done = script("finetune.py", *TINY).stdout
    assert done.splitlines()[-1].startswith("done: accuracy")


def test_the_score_of_the_log_is_that_of_evaluate(folder, script):
    script("finetune.py", *TINY)
    logged = read_log(folder / "run")[-1]
    said = json.loads(script("evaluate.py", "run/last.pt", "manifest.tsv", "--json").stdout)
    assert all(said[key] == pytest.approx(logged[key], abs=1e-9) for key in ("mAP", "AUC", "accuracy"))


def test_the_demo_preset_is_complete(tmp_path, script):
    config = FinetuneConfig(**PRESETS["demo"])
    assert os.path.exists(config.data) and os.path.exists(config.eval_data)
    refused = script("finetune.py", "--preset", "demo", check=False)
    assert "there is no runs/demo/last.pt yet: run python pretrain.py --preset demo first\n" in refused.stderr
    rows = finetune.variants(config)
    assert all(row.model == config.init for row in rows.values() if row.init == "scratch")  # of the same size
    assert {row.probe for row in rows.values()} == {"", "linear", "knn"}
    assert {row.init for row in rows.values()} == {"scratch", config.init}


@NEEDS_GPU
@pytest.mark.parametrize("flags", [["fp32"], ["bf16"], ["fp16"], ["bf16", "--compile"]])
def test_on_a_gpu_it_learns(folder, script, flags):
    script("finetune.py", *TINY, "--amp", *flags, "--updates", 60, "--eval_every", 60)
    log = read_log(folder / "run")
    assert log[-2]["loss"] < log[0]["loss"] and log[-1]["accuracy"] >= 0.75


def test_a_stop_among_several_seeds_is_no_error(folder, monkeypatch):
    """The second of three seeds is stopped: its exit status is the command's, and there is no table yet."""
    codes = iter([0, 143])
    monkeypatch.setattr(finetune, "train", lambda *_: (next(codes), 0.5))
    monkeypatch.setattr(finetune, "Stop", lambda *_: SimpleNamespace(agreed=lambda: 0))
    monkeypatch.chdir(folder)
    config = finetune.parse_config(FinetuneConfig, PRESETS, [*TINY, "--seeds", "3"])
    assert finetune.run_all(config) == 143 and not (folder / "run" / "table.json").exists()


def test_average_precision_is_at_hand():
    """evaluate.py's metrics can be used alone, as the README shows."""
    assert math.isclose(average_precision(torch.tensor([[0.9], [0.1]]), torch.tensor([[1], [0]])).item(), 1.0)


def test_soundfile_clips_longer_than_the_network_are_cut(folder, script):
    soundfile.write(folder / "clip 0.wav", tone(64_000).numpy(), 16_000)
    script("finetune.py", *TINY, "--updates", 2)
    assert read_log(folder / "run")[-1]["clips"] == 8
