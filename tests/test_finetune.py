"""Fine-tuning: learning rates, augmentation and losses against the released code's numbers, whole runs."""

import dataclasses
import itertools
import json
import os
import re
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
from test_checkpoints import Attack, export, golden  # noqa: F401  (a fixture)
from test_faults import LONG, Job
from test_parity import GOLDEN, assert_near, our_name
from test_pretrain import PLAIN, read_log

import evaluate
import finetune
import pretrain
from data import AudioDataset, ClipSampler, InputError, load_audio
from evaluate import parse_config, read_classes
from finetune import (
    PRESETS, Draws, FinetuneConfig, add_noise, draw_augmentation, fit_presets, layer_decay_groups, mixup,
    open_inputs, roll_and_gain, sampling_weights, spec_augment, summed_loss, train_step,
)  # fmt: skip
from model import MODELS, AudioClassifier, CheckpointError, ModelConfig, drop_path, load_checkpoint
from pretrain import cosine_lr

AS20K = FinetuneConfig(**PRESETS["as20k"])
TINY = "--preset esc50 --init scratch --model tiny --clip_frames 64 --min_samples 1600 --batch_size 8".split()
TINY += "--workers 0 --updates 12 --warmup 2 --lr 2e-3 --log_every 1 --save_every 4 --eval_every 6".split()
TINY += ["--data", "manifest.tsv", "--eval_data", "manifest.tsv", "--out_dir", "run"]


def evaluations(path, metric: str = "accuracy") -> dict[int, float]:
    """Score of every evaluation in a run's log; none is there twice."""
    records = [record for record in read_log(path) if metric in record]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record[metric] for record in records}


def weights(path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["classifier"]


# --- against the released code ----------------------------------------------------------------------------


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
    """Of the head, block 3 (just above the floor), blocks 0-2 (below it) and the last block."""
    with torch.device("meta"):
        model = AudioClassifier(ModelConfig(), {str(i): "" for i in range(527)})
    groups = {round(g["peak_lr"] / 5e-5, 12): g for g in layer_decay_groups(model, AS20K)}
    assert len(groups) == 13
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))

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
    """Row by row; where the paper's settings differ, the README says so."""
    rows = {name: FinetuneConfig(**PRESETS[name]) for name in ("as2m", "as20k", "esc50", "spcv2")}
    for field, values in dict(
        lr=(5e-5, 5e-5, 5e-5, 2e-4), updates=(300_000, 40_000, 4_000, 40_000),
        warmup=(30_000, 4_000, 400, 4_000), batch_size=(96, 48, 48, 256), clip_frames=(1024, 1024, 512, 128),
        norm_mean=(-4.268, -4.268, -6.627, -6.846),
        norm_std=(4.569, 4.569, 5.359, 5.565), mixup=(0.8, 0.8, 0.0, 0.8), specaug_freq=(0.2, 0.2, 0.4, 0.2),
        specaug_time=(0.2, 0.2, 0.4, 0.2), roll=(True,) * 4, noise=(False, False, False, True),
        label_smoothing=(0.0, 0.0, 0.1, 0.1), weighted=(True, False, False, False),
        loss=("bce_positives", "bce_positives", "ce", "bce"), layer_decay=(0.65,) * 4, drop_path=(0.1,) * 4,
        metric=("mAP", "mAP", "accuracy", "accuracy"), seed=(1, 1, 1, 42), mixup_prob=(0.9,) * 4,
        min_lr=(1e-6,) * 4, beta1=(0.9,) * 4, beta2=(0.95,) * 4, weight_decay=(0.05,) * 4,
        clip_norm=(0.0,) * 4, epoch_clips=(200_000,) * 4, pooling=("cls",) * 4,
    ).items():  # fmt: skip
        assert tuple(getattr(row, field) for row in rows.values()) == values, field


def test_drop_path_rates_and_scale():
    """The rate rises linearly over the blocks; a branch is left out for whole clips, else scaled up."""
    encoder = AudioClassifier(ModelConfig(width=64, heads=2, drop_path=0.1), {"a": "a", "b": "b"}).encoder
    rates = [block.drop_path for block in encoder.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    y = drop_path(x, 0.25)
    per_clip = y[:, 0, 0]
    assert (y == per_clip[:, None, None]).all() and per_clip.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (per_clip == 0).double().mean() == pytest.approx(0.25, abs=0.015)
    assert drop_path(x, 0.0) is x
    spec = torch.randn(8, 1, 32, 128)
    with torch.no_grad():
        assert not torch.equal(encoder(spec), encoder(spec))
        assert torch.equal(encoder.eval()(spec), encoder(spec))


# --- losses -----------------------------------------------------------------------------------------------


def test_losses_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    hard = torch.nn.functional.one_hot(torch.arange(6) % 5, 5).float()
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
    spec = torch.randn(4, 1, 32, 128)
    y = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    results = []
    for parts in ([(spec, y)], [(spec[:2], y[:2]), (spec[2:], y[2:])]):
        one = AudioClassifier(MODELS["tiny"], model.classes)
        one.load_state_dict(model.state_dict())
        groups = [dict(params=one.parameters(), peak_lr=0.1, min_lr=0.0)]
        optimizer = torch.optim.SGD(groups, lr=0.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        out = train_step(one, optimizer, scaler, parts, 0, config, torch.float32)
        results.append((out["loss"], out["grad_norm"], *one.state_dict().values()))
    torch.testing.assert_close(results[0], results[1])
    total = y.sum() if loss == "bce_positives" else 4
    torch.testing.assert_close(results[0][0], summed_loss(model(spec), y, config).detach() / total)


# --- augmentation -----------------------------------------------------------------------------------------


def test_mixup_keeps_label_mass_and_mixes_clips_as_labels():
    x, y = torch.randn(6, 1, 8, 4), (torch.rand(6, 5) < 0.5).float()
    for weight in (0.0, 0.3, 1.0):
        assert mixup(y, weight).sum() == pytest.approx(y.sum().item(), rel=1e-6)
        for i, partner in enumerate((1, 0, 3, 2, 5, 4)):
            torch.testing.assert_close(mixup(x, weight)[i], weight * x[i] + (1 - weight) * x[partner])
    draws = [draw_augmentation(AS20K, step)[1] for step in range(4000)]
    assert sum(weight == 1 for weight in draws) / 4000 == pytest.approx(0.1, abs=0.02)
    mixed = [weight for weight in draws if weight < 1]
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.02)
    assert np.var(mixed) == pytest.approx(1 / (4 * 2.6), abs=0.01)
    assert all(draw_augmentation(dataclasses.replace(AS20K, mixup=0.0), step)[1] == 1 for step in range(50))


def many_draws(n: int) -> Draws:
    return Draws(*draw_augmentation(dataclasses.replace(AS20K, batch_size=n), 0)[0])


def test_spec_augment_widths_and_places():
    """Widths are floor(u * part * size), as released: 0 to 25 with mean 12.3, and 0 to 204 with mean 101."""
    n, blank = 4000, {}
    for shape, parts, widest, mean in (((1, 128), (0.2, 0.0), 25, 12.3), ((1024, 1), (0.0, 0.2), 204, 101)):
        blank[widest] = spec_augment(torch.ones(n, 1, *shape), many_draws(n), *parts).flatten(1) == 0
        mask, width = blank[widest], blank[widest].sum(1)
        assert width.max() == widest and width.double().mean() == pytest.approx(mean, rel=0.03)
        steps = (mask[:, 1:] != mask[:, :-1]).sum(1) + mask[:, 0].int() + mask[:, -1].int()
        assert ((steps == 2) | (width == 0)).all()  # one stretch
    bins, frames = blank[25], blank[204]
    assert (bins.sum(1) == 0).double().mean() == pytest.approx(1 / 25.6, abs=0.01)
    middle = (torch.arange(1024) * frames).sum(1)[frames.any(1)] / frames.sum(1)[frames.any(1)]
    assert middle.mean() == pytest.approx(511, abs=12)
    draws = Draws(*(values[:100] for values in many_draws(n)))
    both = spec_augment(torch.ones(100, 1, 1024, 128), draws, 0.2, 0.2)[:, 0] == 0
    assert torch.equal(both, bins[:100, None, :] | frames[:100, :, None])
    ones = torch.ones(4, 1, 64, 128)
    assert torch.equal(spec_augment(ones, many_draws(4), 0.0, 0.0), ones)


def test_roll_turns_the_sound_and_not_the_padding():
    waveform = torch.zeros(3, 10)
    waveform[:, :6] = torch.arange(1.0, 7)
    part, gain = torch.tensor([0.0, 0.5, 0.99]), torch.tensor([1.0, 2.0, 1.0]).double()
    out = roll_and_gain(waveform, torch.tensor([6, 6, 6]), part, gain)
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


# --- sampling and classes ---------------------------------------------------------------------------------


def test_weighted_sampling_hears_rare_classes_and_repeats_none_in_an_epoch():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(20_000, 3, generator=generator) < torch.tensor([0.5, 0.05, 0.005])
    targets[:, 0] |= ~targets.any(1)
    weights = sampling_weights(targets)
    counts = targets.sum(0).double()
    i = int(targets[:, 1].nonzero()[0])
    expected = sum(1000 / (c + 0.01) for c, y in zip(counts.tolist(), targets[i]) if y)
    assert weights[i] == pytest.approx(expected)
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


def test_partners_in_mixup_share_a_part():
    """Any number of processes and parts mixes the same pairs of clips."""
    for world, accumulate in ((1, 1), (2, 1), (2, 2), (4, 1)):
        mixed = []
        for rank in range(world):
            sampler = ClipSampler(100, 8, 0, 0, rank, world, accumulate)
            for part in range(accumulate):
                rows = torch.tensor(sampler.rows(part))
                mixed += mixup(rows.float(), 0.0).tolist()
        assert mixed == [1, 0, 3, 2, 5, 4, 7, 6]


def test_class_files(tmp_path):
    """AudioSet's table, the released one, one label a line; the order is the file's, and that of the head."""
    (tmp_path / "audioset.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
    )
    expected = {"/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking"}
    assert read_classes(tmp_path / "audioset.csv") == expected
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


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_task_on_real_audio_is_learned(tmp_path, tune):
    """Telephone prompts or a word: an untrained network gets most right of clips that are new to it."""
    own_classes(tmp_path, ["prompts", "words/stop"])
    assert tune(*TINY, "--data", "own0.tsv", "--eval_data", "own1.tsv", "--updates", 200, "--lr", 5e-3) == 0
    assert evaluations(tmp_path / "run")[200] >= 0.75


def own_classes(folder, kinds: list[str]) -> None:
    """own0.tsv and own1.tsv: 22 and 11 clips of each kind, from the embedded audio."""
    demo, lines = ROOT / "extras" / "demo", ([], [])
    for kind in kinds:
        paths = sorted((demo / kind).iterdir())
        for i in range(33):  # of the prompts, which are few and long, several parts
            waveform = load_audio(paths[i % len(paths)], i // len(paths) * 16_000, 10_000)
            name = f"{kind.split('/')[-1]}{i}.wav"
            soundfile.write(folder / name, waveform.numpy(), 16_000)
            lines[i % 3 == 2].append(f"{name}\t{len(waveform)}\t{kind}")
    for part in (0, 1):
        (folder / f"own{part}.tsv").write_text("\n".join([str(folder), *lines[part]]) + "\n")


OWN_PRE = "--preset demo --model tiny --clip_frames 32 --clones 2 --updates 10 --workers 0".split()
OWN_PRE += "--norm_mean -5 --norm_std 4 --min_samples 1000 --out_dir pre".split()


def test_classes_of_your_own_are_learned_by_default(tmp_path, train, script):
    """With --preset own, and no other setting that makes a difference."""
    own_classes(tmp_path, ["prompts", "words/stop"])
    assert train(*OWN_PRE, "--data", "own0.tsv") == 0
    files = "--init pre --data own0.tsv --eval_data own1.tsv --out_dir run --workers 0".split()
    script("finetune.py", "--preset", "own", *files, "--updates", 100, "--eval_every", 100)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    taken = dict(clip_frames=32, norm_mean=-5.0, norm_std=4.0, min_samples=1000, lr=0.2 / 64)
    assert {name: config[name] for name in taken} == taken and config["warmup"] == 10
    assert evaluations(tmp_path / "run")[100] >= 0.75


def test_the_preset_own_fits_labels_and_what_is_given_stays(folder, train, tune):
    """Several labels are learned as such; flags come before the checkpoint; other presets are as they are."""
    assert train(*OWN_PRE, "--data", "manifest.tsv", "--updates", 1) == 0
    several = (folder / "manifest.tsv").read_text().replace("\tlow", "\tlow,any")
    (folder / "several.tsv").write_text(several)

    def fitted(*flags: str, preset: str = "own") -> FinetuneConfig:
        argv = ["--preset", preset, "--init", "pre", "--eval_data", "manifest.tsv", *flags]
        return parse_config(FinetuneConfig, fit_presets(argv), argv)

    one, many = fitted("--data", "manifest.tsv"), fitted("--data", "several.tsv")
    assert (one.loss, one.metric, one.clip_frames) == ("ce", "accuracy", 32)
    assert (many.loss, many.metric, many.clip_frames) == ("bce", "mAP", 32)
    flags = "--data several.tsv --loss bce_positives --clip_frames 64 --min_samples 3 --lr 1".split()
    given = fitted(*flags)
    assert (given.loss, given.clip_frames, given.min_samples, given.lr) == ("bce_positives", 64, 3, 1.0)
    assert fitted("--data", "manifest.tsv", preset="esc50").clip_frames == 512
    with pytest.raises(CheckpointError, match="there is no file nothing"):
        fitted("--data", "manifest.tsv", "--init", "nothing")
    more = "--eval_data several.tsv --updates 2 --batch_size 8 --workers 0".split()
    assert finetune.train(fitted("--data", "several.tsv", *more)) == 0
    assert list(evaluations(folder / "runs" / "finetune", "mAP")) == [1, 2]


def test_warm_up_takes_its_share_of_a_shorter_run():
    def warmup(*argv: str) -> int:
        return parse_config(FinetuneConfig, PRESETS, [*argv]).warmup

    assert [warmup("--preset", name) for name in ("esc50", "own", "demo")] == [400, 40, 60]
    assert warmup("--preset", "esc50", "--updates", "200") == 20 == warmup("--preset=own", "--updates=200")
    assert warmup("--updates", "200", "--warmup", "7") == 7


def test_the_demos_test_set_is_not_for_other_data(folder, tune):
    with pytest.raises(InputError, match="--eval_data is missing: a labelled manifest"):
        tune("--preset", "demo", "--init", "scratch", "--data", "manifest.tsv")
    assert not (folder / "runs").exists()


def test_resume_is_exact_and_best_is_kept(folder, script, tune):
    args = [*TINY, "--updates", 40, "--drop_path", 0.5]
    script("finetune.py", *args)
    cut = [*args, "--out_dir", "cut"]
    job = Job(folder, *cut, processes=1, program="finetune.py")
    assert job.wait_for((folder / "cut" / "last.pt").exists)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    step = load_checkpoint(folder / "cut" / "last.pt")["step"]
    assert 4 <= step < 40 and f"resuming at update {step} " in script("finetune.py", *cut).stdout
    whole, again = weights(folder / "run" / "last.pt"), weights(folder / "cut" / "last.pt")
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
    scores = evaluations(folder / "cut")
    assert list(scores) == [6, 12, 18, 24, 30, 36, 40] and scores == evaluations(folder / "run")
    best = load_checkpoint(folder / "cut" / "best.pt")
    assert best["best"] == dict(step=best["step"], score=max(scores.values()), clips=8)
    assert "optimizer" not in best
    assert scores[best["step"]] == max(scores.values())
    assert AudioClassifier.from_pretrained(folder / "cut").classes == {"high": "high", "low": "low"}
    done = load_checkpoint(folder / "cut" / "last.pt")["best"]
    assert done == best["best"] and tune(*cut) == 0 and evaluations(folder / "cut") == scores


def scores_of(accuracies):
    """evaluate.score, but with these accuracies, one after the other."""

    def score(*args, **loading):
        scores, rows, found = evaluate.score(*args, **loading)
        return scores | dict(accuracy=next(accuracies)), rows, found

    return score


def test_a_best_that_cannot_be_written_is_none(folder, tune, monkeypatch, capsys):
    """The run calls its best what best.pt holds."""
    save, is_full = pretrain.save_checkpoint, iter([False, True, False, False])

    def save_but_once(path, **state):
        if path.name == "best.pt" and next(is_full):
            raise OSError(28, "No space left on device")
        return save(path, **state)

    monkeypatch.setattr(finetune, "score", scores_of(iter([0.5, 0.9, 0.6, 0.7])))
    monkeypatch.setattr(pretrain, "save_checkpoint", save_but_once)
    assert tune(*TINY, "--updates", 24) == 0  # evaluated after 6, 12, 18 and 24
    best = load_checkpoint(folder / "run" / "best.pt")
    assert best["step"] == 24 and best["best"] == dict(step=24, score=0.7, clips=8)
    said = capsys.readouterr().out
    assert "could not save update 12 in run" in said and "done: best accuracy 0.7000, after update 24" in said


def test_a_new_best_does_not_put_off_the_checkpoint(folder, tune, monkeypatch):
    """Minutes count from the last one that a run can go on from."""
    clock, save, saved = itertools.count(step=20.0), pretrain.save_checkpoint, []

    def save_and_tell(path, **state):
        saved.append(path.name)
        return save(path, **state)

    monkeypatch.setattr(finetune, "score", scores_of(itertools.count(0.1, 0.01)))
    monkeypatch.setattr(pretrain, "save_checkpoint", save_and_tell)
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(**vars(time) | dict(monotonic=lambda: next(clock))))
    assert tune(*TINY, "--save_every", 1000, "--eval_every", 1, "--save_minutes", 1.5) == 0
    assert saved.count("best.pt") == 12 and saved.count("last.pt") > 1


@pytest.mark.parametrize("delays", [(0.1, 0.9), pytest.param((0, 0.2, 0.4, 0.6, 0.8, 1.3), marks=LONG)])
def test_a_signal_to_all_processes_of_an_evaluating_run_saves(folder, tune, capsys, delays):
    """Loaders included, several times, in training and evaluation; none is left behind, the run goes on."""
    args = [*TINY, "--workers", 1, "--updates", 200, "--eval_every", 1]
    for delay in delays:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "finetune.py"), *map(str, args)], cwd=folder, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not (line := process.stdout.readline()).startswith("step"):
            assert line, process.stderr.read()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 143 and "Traceback" not in said, said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    step = load_checkpoint(folder / "run" / "last.pt")["step"]
    assert tune(*args, "--workers", 0, "--eval_every", 100) == 0
    assert f"resuming at update {step} " in capsys.readouterr().out
    assert [r["step"] for r in read_log(folder / "run") if "loss" in r] == list(range(1, 201))


@pytest.mark.parametrize("preset", ["as2m", *(pytest.param(name, marks=LONG) for name in ("as20k", "spcv2"))])
def test_two_processes_are_one(folder, script, tune, preset):
    """The same clips, mixed in the same pairs, with the same augmentation; each draws its own drop path."""
    metric = ["--metric", "mAP"] if preset != "spcv2" else []
    args = [*TINY, "--preset", preset, *metric, *"--drop_path 0 --lr 1e-3 --seed 3 --epoch_clips 4".split()]
    assert tune(*args, "--out_dir", "one") == 0 == tune(*args, "--out_dir", "parts", "--accumulate", 2)
    both = ["--accumulate", 2] if preset == "spcv2" else []
    script("finetune.py", *args, "--out_dir", "two", *both, processes=2)
    one, two, parts = (read_log(folder / name) for name in ("one", "two", "parts"))
    for ours in (two, parts):
        for a, b in zip(one, ours, strict=True):
            for key in {"loss", "grad_norm", "mAP"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)


def test_from_pretrained_weights_in_any_layout(folder, train, tune):
    """A run folder, and what extras/released.py makes of it, are the same beginning, and not from scratch."""
    assert train(*PLAIN, "--updates", 3, "--out_dir", "pre") == 0
    export("pre", "exported")
    first = []
    for init in ("pre", "exported", "exported/fairseq.pt", "pre/last.pt", "scratch"):
        assert tune(*TINY, "--init", init, "--updates", 3, "--out_dir", f"from {init.replace('/', ' ')}") == 0
        first.append(read_log(folder / f"from {init.replace('/', ' ')}")[0]["loss"])
    assert first[:4] == first[:1] * 4 and first[4] != first[0]
    assert tune(*TINY, "--init", "from pre", "--updates", 3, "--out_dir", "again") == 0  # or a fine-tuned one
    assert read_log(folder / "again")[0]["loss"] not in first


def test_an_unreadable_clip_is_neither_trained_on_nor_scored(folder, tune):
    """Its stand-in comes with its own labels."""
    (folder / "clip 2.wav").write_text("damaged")
    assert tune(*TINY, "--max_bad_fraction", 1) == 0
    log, listed = read_log(folder / "run"), (folder / "run" / "bad_files.tsv").read_text()
    assert log[-1]["clips"] == 7 and listed.count("clip 2.wav\tunreadable") == 1 == listed.count("\n")
    dataset = AudioDataset(folder / "manifest.tsv", 64, segments=False)
    clip = dataset[2]
    assert clip.problem and clip.item == 3 and dataset.labels(clip.item) == ["low"]


def test_what_the_last_evaluation_alone_cannot_read_is_listed(folder, tune):
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "eval.tsv").write_text("\n".join([*lines, "gone.wav\t16000\tlow"]) + "\n")
    assert tune(*TINY, "--eval_data", "eval.tsv", "--eval_every", 100) == 0
    assert (folder / "run" / "bad_files.tsv").read_text() == "gone.wav\tno such file\n"
    assert read_log(folder / "run")[-1]["clips"] == 8 and list(evaluations(folder / "run")) == [12]


def test_clips_that_one_evaluation_could_not_read_make_no_best(folder, tune, monkeypatch, capsys):
    """The score of fewer clips is another score: the file system had a hiccup, and the console says so."""
    seen = []

    def score(model, test, device, **loading):
        gone = [folder / f"clip {i}.wav" for i in range(4) if len(seen) == 1]
        for path in gone:
            path.rename(path.with_suffix(".away"))
        seen.append(evaluate.score(model, test, device, **loading))
        for path in gone:
            path.with_suffix(".away").rename(path)
        return seen[-1][0] | dict(accuracy=[0.5, 1.0, 0.6, 0.4][len(seen) - 1]), *seen[-1][1:]

    monkeypatch.setattr(finetune, "score", score)
    assert tune(*TINY, "--eval_every", 3) == 0
    assert [scores["clips"] for scores, *_ in seen] == [8, 4, 8, 8]
    assert load_checkpoint(folder / "run" / "best.pt")["best"] == dict(step=9, score=0.6, clips=8)
    assert "WARNING: 4 clips to evaluate on cannot be used: see bad_files.tsv" in capsys.readouterr().out


def test_a_resumed_run_knows_the_best_that_is_on_the_disk(folder, tune, monkeypatch, capsys):
    """It was killed between best.pt and the next checkpoint, and then scores otherwise, as a GPU may."""
    monkeypatch.setattr(finetune, "score", scores_of(iter([0.5, 0.9])))
    save, steps = pretrain.save_checkpoint, []

    def dies(path, **state):
        steps.append((path.name, state["step"]))
        if steps[-1] == ("last.pt", 8):
            raise KeyboardInterrupt
        return save(path, **state)

    monkeypatch.setattr(pretrain, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(*TINY, "--eval_every", 3)
    assert steps == [("best.pt", 3), ("last.pt", 4), ("best.pt", 6), ("last.pt", 8)]
    monkeypatch.setattr(pretrain, "save_checkpoint", save)
    monkeypatch.setattr(finetune, "score", scores_of(iter([0.6, 0.7, 0.8])))
    assert tune(*TINY, "--eval_every", 3) == 0
    assert "done: best accuracy 0.9000, after update 6" in capsys.readouterr().out
    assert load_checkpoint(folder / "run" / "best.pt")["best"] == dict(step=6, score=0.9, clips=8)


def test_from_scratch_goes_on_where_random_numbers_differ(folder, tune, monkeypatch):
    """In their last bits, as between types of CPU; the weights of the checkpoint are those that count."""
    assert tune(*TINY) == 0
    init = torch.nn.init.xavier_uniform_
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", lambda x: init(x, gain=1.000001))
    assert tune(*TINY) == 0


@pytest.mark.parametrize("args, message", [
    (["--init", "nothing.pt"], "there is no file nothing.pt"),
    (["--init", "attack.pt"], "attack.pt"),
    (["--init", ""], "--init is missing: a checkpoint, or scratch"),
    (["--data", ""], "--data is missing"),
    (["--data", "unlabelled.tsv"], "unlabelled.tsv: clip 0.wav has no label"),
    (["--data", "half.tsv"], "half.tsv: clip 1.wav has no label"),
    (["--eval_data", "other.tsv"], "clip 0.wav has the labels ['bird'], not all among the 2 classes"),
    (["--eval_data", ""], "--eval_data is missing: a labelled manifest"),
    (["--data", "absent.tsv"], "most files of absent.tsv are not there, as"),
    (["--eval_data", "absent.tsv"], "most files of absent.tsv are not there, as"),
    (["--min_samples", "13000"], "all clips of low are shorter than --min_samples 13000"),
    (["--warmup", "12"], "--warmup 12 must be less than --updates 12"),
    (["--data", "single.tsv", "--eval_data", "single.tsv"], "single.tsv has one class only: low"),
    (["--data", "several.tsv"], "several.tsv: a clip has several labels: --loss bce --metric mAP"),
    (["--batch_size", "7", "--mixup", "0.5"], "mixup pairs clips"),
    (["--accumulate", "8", "--mixup", "0.5"], "mixup pairs clips"),
    (["--accumulate", "3"], "--batch_size 8 does not divide by 1 processes x 3 (--accumulate)"),
    (["--loss", "mse"], "--loss mse: choose from bce_positives, bce, ce"),
    (["--lr", "nan"], "--lr must be a number above 0"),
    (["--clip_frames", "12304"], "16 to 12288 clip_frames"),
    (["--clip_frames", "100"], "--clip_frames must be a multiple of 16"),
    (["--model", "huge"], "--model huge: choose from base"),
    (["--timeout", "0"], "--timeout must be a number above 0"),
    (["--classes", "nothing.csv"], "cannot read the classes in nothing.csv"),
    (["--pooling", "max"], "--pooling max: choose from cls, mean, bands"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(folder, tune, args, message):
    torch.save(dict(network={}, student=Attack(folder / "ran")), folder / "attack.pt")
    (folder / "unlabelled.tsv").write_text(f"{folder}\nclip 0.wav\t8000\nclip 1.wav\t9600\n")
    rows = (folder / "manifest.tsv").read_text()
    (folder / "absent.tsv").write_text(re.sub("clip [1-6]", "gone", rows))
    (folder / "half.tsv").write_text(f"{folder}\nclip 0.wav\t8000\ta\nclip 1.wav\t9600\n")
    (folder / "other.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tbird\n")
    (folder / "single.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow\nclip 1.wav\t9600\tlow\n")
    (folder / "several.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow,high\nclip 1.wav\t9600\tlow\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tune(*TINY, *args)
    assert "\n" not in str(error.value) and not (folder / "run").exists() and not (folder / "ran").exists()


def test_a_diverged_network_is_told_in_one_line(folder, script):
    args = [*TINY, "--lr", 1e30, "--layer_decay", 1, "--warmup", 0, "--eval_every", 3]
    result = script("finetune.py", *args, check=False)
    said = "finetune.py: the network's scores are not finite: its training has diverged\n"
    assert result.returncode == 1 and result.stderr == said


def test_a_silent_clip_is_scored(folder, tune):
    """Not trained on, but its score counts, as in the released code."""
    soundfile.write(folder / "clip 5.wav", np.zeros(16_000), 16_000)
    assert tune(*TINY, "--max_bad_fraction", 1) == 0
    assert read_log(folder / "run")[-1]["clips"] == 8
    assert (folder / "run" / "bad_files.tsv").read_text() == "clip 5.wav\tsilent\n"


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(folder, tune):
    """The run was stopped at the very update that is due: saved at once, evaluated when it goes on."""
    args = [*TINY, "--drop_path", 0.5]
    assert tune(*args, "--save_every", 6) == 0
    run = folder / "run"
    scores, whole = evaluations(run), weights(run / "last.pt")
    assert list(scores) == [6, 12]
    os.replace(run / "previous.pt", run / "last.pt")
    (run / "best.pt").unlink()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(line for line in lines if "accuracy" not in line))
    assert load_checkpoint(run / "last.pt")["step"] == 6 and tune(*args) == 0
    assert evaluations(run) == scores and [line["step"] for line in read_log(run)][5:8] == [6, 6, 7]
    best = load_checkpoint(run / "best.pt")
    assert best["best"]["score"] == max(scores.values()) == scores[best["step"]]
    assert all(torch.equal(value, whole[key]) for key, value in weights(run / "last.pt").items())


def test_other_settings_in_the_same_folder_are_refused(folder, tune, capsys):
    (folder / "names.txt").write_text("low\nhigh\n")
    assert tune(*TINY) == 0
    with pytest.raises(InputError, match="classes_digest was"):  # the head's rows mean others
        tune(*TINY, "--classes", "names.txt")
    with pytest.raises(InputError, match=re.escape("(layer_decay was 0.65, now 0.9)")):
        tune(*TINY, "--layer_decay", 0.9)
    (folder / "low.tsv").write_text((folder / "manifest.tsv").read_text().replace("high", "low", 1))
    for which in ("data", "eval_data"):
        with pytest.raises(InputError, match=f"{which.removesuffix('_data')}_digest was"):
            tune(*TINY, f"--{which}", "low.tsv")
    capsys.readouterr()
    assert tune(*TINY) == 0 and "done: best accuracy" in capsys.readouterr().out


def test_the_score_of_the_log_is_that_of_evaluate(folder, tune, called):
    assert tune(*TINY) == 0
    logged = read_log(folder / "run")[-1]
    said = json.loads(called(evaluate, "run/last.pt", "manifest.tsv").stdout)
    assert all(said[key] == pytest.approx(logged[key], abs=1e-9) for key in ("mAP", "AUC", "accuracy"))


def test_the_demo_preset_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = FinetuneConfig(**PRESETS["demo"])
    with pytest.raises(InputError, match="there is no runs/demo yet: run python pretrain.py --preset demo"):
        finetune.train(config)
    data, test, model = open_inputs(dataclasses.replace(config, init="scratch"))
    assert len(data.classes) == 10 == len(test.classes) and min(len(data.data), len(test.data)) >= 100
    assert model.config.clip_frames == config.clip_frames and model.exclusive


def test_clips_longer_than_the_network_are_cut(folder, tune):
    """One item a clip, however long it is."""
    soundfile.write(folder / "clip 0.wav", tone(64_000).numpy(), 16_000)
    text = (folder / "manifest.tsv").read_text().replace("clip 0.wav\t8000", "clip 0.wav\t64000")
    (folder / "manifest.tsv").write_text(text)
    assert tune(*TINY, "--updates", 3) == 0
    assert read_log(folder / "run")[-1]["clips"] == 8


@NEEDS_GPU
@pytest.mark.parametrize("flags", [["fp32"], ["bf16"], ["fp16"], ["bf16", "--compile"]])
def test_on_a_gpu_it_learns(folder, script, flags):
    script("finetune.py", *TINY, "--amp", *flags, "--updates", 60, "--eval_every", 60)
    log = read_log(folder / "run")
    assert log[-2]["loss"] < log[0]["loss"] and log[-1]["accuracy"] >= 0.75
