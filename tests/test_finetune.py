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
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import soundfile
import torch
import torchaudio
from conftest import NEEDS_GPU, ROOT, tone
from test_parity import GOLDEN, assert_near, our_name

import evaluate
import finetune
import pretrain
from data import (
    AudioDataset, Batch, ClipSampler, InputError, clip_samples, collate, load_audio, open_labelled,
    spectrogram,
)  # fmt: skip
from evaluate import parse_config
from finetune import (
    PRESETS, FinetuneConfig, add_noise, blank_stretch, draw_mixup_weight, draw_parts, layer_decay_groups,
    mixup, open_inputs, roll_and_gain, sampling_weights, summed_loss, train_step,
)  # fmt: skip
from model import MODELS, AudioClassifier, CheckpointError, Encoder, ModelConfig, drop_path, load_checkpoint
from pretrain import cosine_lr

CPU = torch.device("cpu")
AS20K = FinetuneConfig(**PRESETS["as20k"])
TINY = "--preset esc50 --init scratch --model tiny --clip_frames 64 --min_samples 1600 --batch_size 8".split()
TINY += "--workers 0 --updates 12 --warmup 2 --lr 2e-3 --log_every 1 --save_every 4 --eval_every 6".split()
TINY += ["--data", "manifest.tsv", "--eval_data", "manifest.tsv", "--out_dir", "run"]
PRE = "--preset demo --model tiny --clip_frames 32 --clones 2 --updates 1 --workers 0".split()
PRE += "--mask_block_time 1 --mask_block_freq 1 --norm_mean -5 --norm_std 4".split()
PRE += "--out_dir pre --data manifest.tsv".split()


def read_log(path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def evaluations(path, metric: str = "accuracy") -> dict[int, float]:
    """Score of every evaluation in a run's log; none is there twice."""
    records = [record for record in read_log(path) if metric in record]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record[metric] for record in records}


def weights(path) -> dict[str, torch.Tensor]:
    """The classifier's weights in a checkpoint."""
    return load_checkpoint(path)["classifier"]


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.fixture(scope="module")
def golden() -> dict:
    """What was recorded from the released fine-tuning code."""
    with np.load(GOLDEN / "finetune.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["spec"] = torch.from_numpy(arrays["spec"]).float()
    return arrays


# --- against the released code ----------------------------------------------------------------------------


def test_loss_of_the_released_classifier(golden):
    model = AudioClassifier.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    targets = torch.from_numpy(golden["labels"]).float()
    with torch.no_grad():
        loss = summed_loss(model(golden["spec"]), targets, AS20K) / targets.sum()
    assert_near("loss", loss, golden["bce_over_positives"], 1e-5)


def test_peak_learning_rate_of_every_parameter(golden):
    model = AudioClassifier.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    peak = {}
    for group in layer_decay_groups(model, AS20K):
        for parameter in group["params"]:
            peak[id(parameter)] = group["peak_lr"]
    ours = {name: peak[id(parameter)] for name, parameter in model.named_parameters()}
    theirs = {}
    for name, value in zip(golden["peak_lr_names"], golden["peak_lr"]):
        released = str(name)
        if released.startswith("model."):
            released = our_name(released.removeprefix("model."))
        theirs[released] = value
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_learning_rates_over_the_whole_as20k_schedule():
    """Of the head, block 3 (just above the floor), blocks 0-2 (below it) and the last block."""
    with torch.device("meta"):
        model = AudioClassifier(ModelConfig(), {str(i): "" for i in range(527)})
    groups = {round(group["peak_lr"] / 5e-5, 12): group for group in layer_decay_groups(model, AS20K)}
    assert len(groups) == 13
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))

    def rates(block: int) -> list[float]:
        group = groups[round(0.65 ** (12 - block), 12)]
        schedule = (group["peak_lr"], AS20K.warmup, AS20K.updates, group["min_lr"])
        return [cosine_lr(step, *schedule) for step in (0, 2000, 4000, 22_000, 40_000)]

    assert rates(12) == pytest.approx([1e-6, 2.55e-5, 5e-5, 2.55e-5, 1e-6], rel=1e-6)
    assert rates(3) == pytest.approx([1e-6, 1.018e-6, 1.036e-6, 1.018e-6, 1e-6], rel=1e-3)
    for block, value in enumerate((2.84e-7, 4.38e-7, 6.73e-7)):
        assert rates(block) == pytest.approx([value] * 5, rel=2e-3)
    assert max(rates(11)) == pytest.approx(3.25e-5)
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
        clip_norm=(0.0,) * 4, epoch_clips=(200_000,) * 4, pooling=("cls",) * 4, min_samples=(10_000,) * 4,
        frozen=(False,) * 4,
    ).items():  # fmt: skip
        assert tuple(getattr(row, field) for row in rows.values()) == values, field


def test_drop_path_rates_and_scale():
    """The rate rises linearly over the blocks; a branch is left out for whole clips, else scaled up."""
    encoder = Encoder(ModelConfig(width=64, heads=2, drop_path=0.1))
    rates = [block.drop_path for block in encoder.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    y = drop_path(x, 0.25)
    per_clip = y[:, 0, 0]
    assert torch.equal(y, per_clip[:, None, None].expand_as(y))
    assert per_clip.unique().tolist() == pytest.approx([0, 4 / 3])
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
    total = 4
    if loss == "bce_positives":
        total = y.sum()
    torch.testing.assert_close(results[0][0], summed_loss(model(spec), y, config).detach() / total)


# --- augmentation -----------------------------------------------------------------------------------------


class Numbers:
    """In place of a generator: the uniform numbers that it is given, one after the other."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


@pytest.mark.parametrize("axis, frames, largest", [
    (2, 64, 0.2), (1, 1024, 0.2), (1, 512, 0.4), (1, 128, 0.1), (2, 64, 0.0),
])  # fmt: skip
def test_blanked_stretches_are_those_of_torchaudio(axis, frames, largest):
    """From the same uniform numbers, for each clip: FrequencyMasking and TimeMasking as released."""
    n = 200
    size = (frames, 128)[axis - 1]
    specs = torch.ones(n, 1, 128, frames)
    torch.manual_seed(7)
    expected = torchaudio.functional.mask_along_axis_iid(specs, largest * size, 0.0, 4 - axis)
    torch.manual_seed(7)
    width = torch.rand(n, 1)
    start = torch.rand(n, 1)
    for i in range(n):
        spec = torch.ones(1, frames, 128)
        blank_stretch(spec, axis, largest, Numbers(width[i].item(), start[i].item()))
        assert torch.equal(spec, expected[i].transpose(1, 2)), i


def test_blanked_stretches_have_their_widths_and_places():
    """Widths are floor(u * part * size): 0 to 25 with mean 12.3 of 128 mel bins; placed evenly."""
    widths = []
    places = []
    for seed in range(4000):
        spec = torch.ones(1, 2, 128)
        blank_stretch(spec, 2, 0.2, np.random.default_rng(seed))
        blank = (spec[0, 0] == 0).nonzero().flatten().tolist()
        widths.append(len(blank))
        if blank:
            assert blank == list(range(blank[0], blank[-1] + 1))
            places.append(np.mean(blank) / 127)
    assert (min(widths), max(widths)) == (0, 25)
    assert np.mean(widths) == pytest.approx(12.3, rel=0.03)
    assert np.mean(places) == pytest.approx(0.5, abs=0.02)
    seen = np.bincount(widths, minlength=26)
    expected = 4000 * np.append(np.ones(25), 0.6) / 25.6
    assert scipy.stats.chisquare(seen, expected).pvalue > 0.001


def test_roll_rotates_by_any_part_with_a_gain_around_one():
    """As released: the shift is uniform, the gain Beta(10, 10) + 0.5."""
    shifts = []
    gains = []
    for seed in range(4000):
        waveform = torch.zeros(20)
        waveform[0] = 1.0
        turned = roll_and_gain(waveform, np.random.default_rng(seed))
        shifts.append(int(turned.argmax()))
        gains.append(turned.max().item())
        assert turned.count_nonzero() == 1
    assert scipy.stats.chisquare(np.bincount(shifts, minlength=20)).pvalue > 0.001
    assert scipy.stats.kstest(np.array(gains) - 0.5, scipy.stats.beta(10, 10).cdf).pvalue > 0.001
    waveform = torch.arange(1.0, 7)
    turned = roll_and_gain(waveform, np.random.default_rng(3))
    order = (turned / turned.max() * 6).round().int().tolist()
    start = order.index(1)
    assert order[start:] + order[:start] == [1, 2, 3, 4, 5, 6]


def test_noise_is_uniform_and_rotates_frames():
    """As released: in [0, level / 10) with a uniform level; rotated by -10 to 9 frames."""
    levels = []
    shifts = []
    ramp = torch.arange(40.0)[None, :, None].expand(1, 40, 128)  # of whole numbers, a frame each
    for seed in range(1000):
        noisy = add_noise(ramp, np.random.default_rng(seed))
        noise = noisy - noisy.floor()
        levels.append(10 * noise.max().item())
        first = int(noisy[0, :, 0].floor().argmin())
        shifts.append((first + 20) % 40 - 20)
        assert torch.equal(noisy.floor(), ramp.roll(first, 1))
    assert noise.min() >= 0
    assert scipy.stats.kstest(noise.flatten().numpy() / noise.max().item(), "uniform").pvalue > 0.001
    assert scipy.stats.kstest(levels, "uniform").pvalue > 0.001
    assert (min(shifts), max(shifts)) == (-10, 9)
    assert scipy.stats.chisquare(np.bincount(np.array(shifts) + 10)).pvalue > 0.001


def test_mixup_keeps_label_mass_and_mixes_clips_as_labels():
    x = torch.randn(6, 1, 8, 4)
    y = (torch.rand(6, 5) < 0.5).float()
    for weight in (0.0, 0.3, 1.0):
        assert mixup(y, weight).sum() == pytest.approx(y.sum().item(), rel=1e-6)
        mixed = mixup(x, weight)
        for i, partner in enumerate((1, 0, 3, 2, 5, 4)):
            torch.testing.assert_close(mixed[i], weight * x[i] + (1 - weight) * x[partner])


def test_mixup_weights_are_those_of_the_released_code():
    """Beta(0.8, 0.8) in nine of ten updates; another in each update and with each seed."""
    draws = [draw_mixup_weight(AS20K, step) for step in range(4000)]
    mixed = [weight for weight in draws if weight < 1]
    assert len(mixed) / 4000 == pytest.approx(0.9, abs=0.02)
    assert len(set(mixed)) == len(mixed)
    assert scipy.stats.kstest(mixed, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    assert draws[:50] == [draw_mixup_weight(AS20K, step) for step in range(50)]
    other = dataclasses.replace(AS20K, seed=2)
    assert not set(mixed) & {draw_mixup_weight(other, step) for step in range(50)}
    without = dataclasses.replace(AS20K, mixup=0.0)
    assert {draw_mixup_weight(without, step) for step in range(50)} == {1.0}


# --- randomness: new in each update, the same for any number of processes and parts ------------------------

PLAIN = dict(
    clip_frames=64, batch_size=8, roll=False, noise=False, mixup=0.0, mixup_prob=1.0, specaug_freq=0.0,
    specaug_time=0.0, weighted=False,
)  # fmt: skip
KINDS = {
    "roll": dict(roll=True),
    "noise": dict(noise=True),
    "mixup": dict(mixup=0.8),
    "bins": dict(specaug_freq=0.5),
    "frames": dict(specaug_time=0.5),
}


def one_update(
    folder, config: FinetuneConfig, step: int, world: int = 1, accumulate: int = 1, item: int | None = None
):  # fmt: skip
    """What all processes together train on in an update: (spec, targets). The clips are those of update 0,
    or always the same `item`."""
    data, targets, _ = open_labelled(folder / "manifest.tsv", config.clip_frames)
    config = dataclasses.replace(config, accumulate=accumulate)
    specs = []
    labels = []

    def read(items: list[int]) -> Batch:
        if item is not None:
            items = [item] * len(items)
        return collate([data[i] for i in items], config.clip_frames)

    for rank in range(world):
        sampler = ClipSampler(len(data), config.batch_size, config.seed, 0, rank, world, accumulate)
        batches = map(read, sampler)
        for spec, y in draw_parts(batches, sampler, targets, config, step, CPU):
            specs.append(spec)
            labels.append(y)
    return torch.cat(specs), torch.cat(labels)


def test_without_augmentation_an_update_is_its_clips(folder):
    config = FinetuneConfig(**PLAIN)
    data, targets, _ = open_labelled(folder / "manifest.tsv", 64)
    items = next(iter(ClipSampler(len(data), 8, config.seed)))
    batch = collate([data[i] for i in items], 64)
    spec, y = one_update(folder, config, 5)
    assert torch.equal(spec, spectrogram(batch.waveform, batch.n_samples, config.norm_mean, config.norm_std))
    assert torch.equal(y, targets[items].float())


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_is_new_in_each_update_and_with_each_seed(folder, kind):
    """Of the same clips; and the same again when the update is made again."""
    config = FinetuneConfig(**PLAIN | KINDS[kind])
    seen = []
    for step in range(3):
        spec, y = one_update(folder, config, step)
        again, y_again = one_update(folder, config, step)
        assert torch.equal(spec, again)
        assert torch.equal(y, y_again)
        seen.append(one_update(folder, config, step, item=7)[0])
    other = dataclasses.replace(config, seed=2)
    seen.append(one_update(folder, other, 0, item=7)[0])
    if kind == "mixup":  # which does nothing to equal clips
        seen = [one_update(folder, config, step)[0] for step in range(3)]
    for one, two in itertools.combinations(seen, 2):
        assert not torch.equal(one, two)


@pytest.mark.parametrize("kind", ["roll", "noise", "bins", "frames"])
def test_each_clip_is_augmented_by_its_own_numbers(folder, kind):
    """The same clip eight times becomes several."""
    plain, _ = one_update(folder, FinetuneConfig(**PLAIN), 0, item=7)
    assert torch.equal(plain, plain[:1].expand_as(plain))
    spec, _ = one_update(folder, FinetuneConfig(**PLAIN | KINDS[kind]), 0, item=7)
    assert len({row.double().sum().item() for row in spec}) > 4


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_augmentation_is_the_same_for_any_number_of_processes_and_parts(folder, world, accumulate):
    everything = dict(roll=True, noise=True, mixup=0.8, specaug_freq=0.5, specaug_time=0.5)
    config = FinetuneConfig(**PLAIN | everything)
    spec, y = one_update(folder, config, 3)
    ours, y_ours = one_update(folder, config, 3, world, accumulate)
    torch.testing.assert_close(ours, spec)
    torch.testing.assert_close(y_ours, y)


def test_clips_are_blanked_after_they_are_mixed(folder):
    """As released: what is blank in a mixed clip is blank, not a part of its neighbour."""
    config = FinetuneConfig(**PLAIN | dict(mixup=0.8, specaug_freq=0.5, specaug_time=0.5))
    spec, _ = one_update(folder, config, 0)
    assert draw_mixup_weight(config, 0) < 0.99
    bins = (spec == 0).all(2).sum(2)    # (8, 1) mel bins that are blank in all frames
    frames = (spec == 0).all(3).sum(2)  # (8, 1)
    assert len(bins.unique()) > 3
    assert len(frames.unique()) > 3


def test_roll_leaves_the_padding_where_it_is(folder):
    """If padding were rotated into a clip, frames of it would be silent, and sound would be lost."""
    soundfile.write(folder / "clip 0.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 16_000)
    data, _, _ = open_labelled(folder / "manifest.tsv", 64)
    n_frames = 1 + (8000 - 400) // 160
    config = FinetuneConfig(**PLAIN | dict(roll=True))
    row = next(iter(ClipSampler(len(data), 8, config.seed))).index(0)
    padding = torch.tensor(-config.norm_mean / (2 * config.norm_std))
    turned = set()
    for step in range(5):
        spec = one_update(folder, config, step)[0][row, 0]
        assert (spec[:n_frames].amax(1) > spec[:n_frames].amin(1)).all()
        assert (spec[:n_frames].mean(1) > -1).all()
        torch.testing.assert_close(spec[n_frames:], padding.expand(64 - n_frames, 128))
        turned.add(spec[0].sum().item())
    assert len(turned) == 5


def test_drop_path_is_new_in_each_update_and_the_same_when_made_again(folder, tune, monkeypatch):
    """Two runs that learn nothing see the same clip in the same state: only drop path tells updates apart."""
    (folder / "one.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow\nclip 7.wav\t19200\thigh\n")
    still = "--data one.tsv --batch_size 2 --no-roll --specaug_freq 0 --specaug_time 0 --lr 1e-30".split()
    still += "--min_lr 0 --weight_decay 0 --drop_path 0.7 --updates 12 --eval_every 12 --log_every 1".split()
    assert tune(*TINY, *still, "--out_dir", "one") == 0
    assert tune(*TINY, *still, "--out_dir", "two") == 0
    losses = [record["loss"] for record in read_log(folder / "one") if "loss" in record]
    assert losses == [record["loss"] for record in read_log(folder / "two") if "loss" in record]
    assert len(set(losses)) > 3
    assert tune(*TINY, *still, "--drop_path", 0, "--out_dir", "without") == 0
    without = [record["loss"] for record in read_log(folder / "without") if "loss" in record]
    assert max(without) == pytest.approx(min(without), rel=1e-6)


# --- sampling and classes ---------------------------------------------------------------------------------


def test_weighted_sampling_hears_rare_classes_and_repeats_none_in_an_epoch():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(5000, 3, generator=generator) < torch.tensor([0.5, 0.05, 0.005])
    targets[:, 0] |= ~targets.any(1)
    weights = sampling_weights(targets)
    counts = targets.sum(0).double()
    i = int(targets[:, 1].nonzero()[0])
    expected = 0.0
    for count, has_label in zip(counts.tolist(), targets[i].tolist()):
        expected += has_label * 1000 / (count + 0.01)
    assert weights[i] == pytest.approx(expected)
    batches = iter(ClipSampler(5000, 5, seed=0, weights=weights, epoch_items=20))
    epochs = []
    for _ in range(1500):
        epochs.append(torch.tensor([next(batches) for _ in range(4)]).flatten())
    assert all(len(epoch.unique()) == 20 for epoch in epochs)
    drawn = targets[torch.cat(epochs)].double().mean(0)
    # with so small an epoch, drawing without replacement is nearly drawing by weight
    expected = (weights[:, None] * targets).sum(0) / weights.sum()
    assert drawn.tolist() == pytest.approx(expected.tolist(), rel=0.1)
    assert drawn[2] > 10 * targets[:, 2].double().mean()
    halves = torch.stack(epochs).view(1500, 2, 10)  # a rare clip comes as often early in an epoch as late
    early = targets[halves[:, 0].flatten(), 2].double().mean()
    late = targets[halves[:, 1].flatten(), 2].double().mean()
    assert early == pytest.approx(late.item(), rel=0.1)


def test_the_order_with_weights_is_new_in_each_epoch_and_shared_by_all_processes():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(40, generator=generator, dtype=torch.float64)

    def clips(world: int, accumulate: int, seed: int = 3, start: int = 0) -> list[list[int]]:
        """The clips of six updates, three epochs of 16 clips: those of the processes in order."""
        updates = [[] for _ in range(6 - start)]
        for rank in range(world):
            share = (start, rank, world, accumulate)
            batches = iter(ClipSampler(40, 8, seed, *share, weights=weights, epoch_items=16))
            for update in updates:
                for _ in range(accumulate):
                    update += next(batches)
        return updates

    whole = clips(1, 1)
    epochs = [whole[i] + whole[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({frozenset(epoch) for epoch in epochs}) == 3
    assert clips(1, 1, seed=4) != whole
    for world, accumulate in ((2, 1), (1, 2), (4, 1)):
        assert clips(world, accumulate) == whole
    assert clips(1, 1, start=3) == whole[3:]


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


# --- the presets for classes of one's own and the demo -----------------------------------------------------


def own_classes(folder, kinds: list[str]) -> None:
    """own0.tsv and own1.tsv: 22 and 11 clips of each kind, from the embedded audio."""
    lines = ([], [])
    for kind in kinds:
        paths = sorted((ROOT / "extras" / "demo" / kind).iterdir())
        for i in range(33):  # of the prompts, which are few and long, several parts
            waveform = load_audio(paths[i % len(paths)], i // len(paths) * 16_000, 10_000)
            name = f"{kind.split('/')[-1]}{i}.wav"
            soundfile.write(folder / name, waveform.numpy(), 16_000)
            lines[i % 3 == 2].append(f"{name}\t{len(waveform)}\t{kind}")
    for part in (0, 1):
        (folder / f"own{part}.tsv").write_text("\n".join([str(folder), *lines[part]]) + "\n")


SHIPPED = ROOT / "extras" / "runs" / "laptop" / "encoder.pt"
OWN = "--preset own --data own0.tsv --eval_data own1.tsv --out_dir run --workers 0".split()


@pytest.fixture
def encoder(folder):
    """encoder.pt beside the clips: untrained, with clips of 0.96 s and a normalisation of its own."""
    torch.manual_seed(0)
    config = dataclasses.replace(MODELS["tiny"], clip_frames=96, norm_mean=-5.0, norm_std=4.0)
    save(folder / "encoder.pt", config, Encoder(config))
    return folder


def save(path, config: ModelConfig, encoder: Encoder) -> None:
    """A checkpoint of an encoder alone."""
    student = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    evaluate.save_checkpoint(path, step=1, network=dataclasses.asdict(config), student=student)


def test_the_preset_own_takes_what_the_encoder_that_ships_says(tmp_path, tune):
    """Length and normalisation of a clip, and a learning rate for its width; all clips are used."""
    own_classes(tmp_path, ["prompts", "words/stop"])
    network = load_checkpoint(SHIPPED)["network"]
    assert tune(*OWN, "--init", SHIPPED, "--updates", 2, "--batch_size", 4, "--eval_every", 3) == 0
    config = load_checkpoint(tmp_path / "run" / "last.pt")["settings"]
    taken = {name: network[name] for name in ("clip_frames", "norm_mean", "norm_std")}
    taken |= dict(lr=round(0.2 / 192, 6), loss="ce", metric="accuracy", warmup=0, min_samples=0)
    assert {name: config[name] for name in taken} == taken
    assert list(evaluations(tmp_path / "run")) == [2]


@pytest.mark.parametrize("flags", [
    ["--frozen"], pytest.param(["--updates", 60, "--eval_every", 60], marks=pytest.mark.long),
])  # fmt: skip
def test_the_preset_own_learns_by_default(tmp_path, tune, flags):
    """From the encoder that ships, with no other setting that makes a difference."""
    own_classes(tmp_path, ["prompts", "words/stop"])
    assert tune(*OWN, "--init", SHIPPED, *flags) == 0
    assert max(evaluations(tmp_path / "run").values()) >= 0.9


def fitted(*flags: str) -> FinetuneConfig:
    """The settings of --preset own for manifest.tsv once what they name is open."""
    argv = "--preset own --init encoder.pt --data manifest.tsv --eval_data manifest.tsv".split()
    return open_inputs(parse_config(FinetuneConfig, PRESETS, [*argv, *flags]))[0]


def test_the_preset_own_fits_the_checkpoint_and_the_labels(encoder, monkeypatch):
    """Several labels are learned as such; what is given stays; other presets are as they are."""
    monkeypatch.chdir(encoder)
    several = (encoder / "manifest.tsv").read_text().replace("\tlow", "\tlow,any")
    (encoder / "several.tsv").write_text(several)
    one = fitted()
    assert (one.loss, one.metric, one.clip_frames, one.lr) == ("ce", "accuracy", 96, 0.2 / 64)
    assert (one.norm_mean, one.norm_std, one.min_samples) == (-5.0, 4.0, 0)
    many = fitted("--data", "several.tsv", "--eval_data", "several.tsv")
    assert (many.loss, many.metric, many.clip_frames) == ("bce", "mAP", 96)
    flags = "--loss bce_positives --clip_frames 64 --min_samples 3 --lr 1 --norm_mean 1 --norm_std 2".split()
    given = fitted("--data", "several.tsv", "--eval_data", "several.tsv", *flags)
    assert (given.loss, given.clip_frames, given.min_samples) == ("bce_positives", 64, 3)
    assert (given.lr, given.norm_mean, given.norm_std) == (1.0, 1.0, 2.0)
    for name in ("norm_mean", "norm_std"):  # one of them is given, the other is the checkpoint's
        given = fitted(f"--{name}", "1")
        expected = dict(norm_mean=-5.0, norm_std=4.0) | {name: 1.0}
        assert dict(norm_mean=given.norm_mean, norm_std=given.norm_std) == expected
    assert fitted("--preset", "esc50").clip_frames == 512
    with pytest.raises(InputError, match="a clip of --data or --eval_data has several labels: --loss bce"):
        fitted("--data", "several.tsv", "--eval_data", "several.tsv", "--loss", "ce")
    with pytest.raises(CheckpointError, match="there is no file nothing"):
        fitted("--init", "nothing")


def test_own_from_scratch_is_a_small_network_at_the_clips_length(folder, monkeypatch):
    """The longest clip is 1.2 s, 117 whole frames: 128 fill patches of 16. Longer ones are cut at 10.24 s."""
    monkeypatch.chdir(folder)
    argv = "--preset own --init scratch --data manifest.tsv --eval_data manifest.tsv".split()
    config, train, _, model = open_inputs(parse_config(FinetuneConfig, PRESETS, argv))
    assert model.config == dataclasses.replace(MODELS["small"], clip_frames=128, drop_path=0.1)
    assert (config.clip_frames, config.lr, train.data.n_cut) == (128, round(0.2 / 384, 6), 0)
    text = (folder / "manifest.tsv").read_text().replace("clip 0.wav\t8000", "clip 0.wav\t800000")
    (folder / "manifest.tsv").write_text(text)
    config, train, _, model = open_inputs(parse_config(FinetuneConfig, PRESETS, argv))
    assert (config.clip_frames, model.config.clip_frames, train.data.n_cut) == (1024, 1024, 1)


@pytest.mark.parametrize("n_samples, frames", [(20_720, 128), (20_721, 144), (23_280, 144), (400, 16)])
def test_own_from_scratch_has_the_least_rows_of_patches_that_hold_the_longest_clip(
    folder, monkeypatch, n_samples, frames
):  # fmt: skip
    monkeypatch.chdir(folder)
    lines = [f"{i}.wav\t{n_samples - i}\t{'low' if i else 'high'}" for i in range(2)]
    (folder / "two.tsv").write_text("\n".join([str(folder), *lines]))
    argv = "--preset own --init scratch --data two.tsv --eval_data two.tsv".split()
    network = MODELS["small"]
    config = finetune.fit_to_network(parse_config(FinetuneConfig, PRESETS, argv), network)
    assert config.clip_frames == frames
    assert clip_samples(frames) >= n_samples > clip_samples(frames - 16)


def test_own_keeps_short_clips_and_names_classes_that_lose_theirs(encoder, tune, capsys):
    """All clips are trained on; with --min_samples, a class that loses more than a tenth is named."""
    own = "--preset own --init encoder.pt --data manifest.tsv --eval_data manifest.tsv --batch_size 8".split()
    own += "--updates 2 --workers 0".split()
    assert tune(*own, "--out_dir", "all") == 0
    assert "leaves out clips" not in capsys.readouterr().out
    assert tune(*own, "--min_samples", 9601, "--out_dir", "some") == 0  # two of the four low ones are shorter
    said = capsys.readouterr().out
    assert "WARNING: --min_samples 9601 leaves out clips of low (2 of 4)\n" in said
    listed = (encoder / "some" / "bad_files.tsv").read_text()
    assert listed == "".join(f"clip {i}.wav\tshorter than 9601 samples at 16 kHz\n" for i in (0, 1))
    root, *lines = (encoder / "manifest.tsv").read_text().splitlines()
    more = [line for line in lines if "clip 0" not in line]
    many = [root, lines[0], *more, *more, *more]  # one of ten low clips: not more than a tenth
    (encoder / "many.tsv").write_text("\n".join(many) + "\n")
    assert tune(*own, "--data", "many.tsv", "--min_samples", 8001, "--out_dir", "many") == 0
    assert "leaves out clips" not in capsys.readouterr().out


def test_warm_up_takes_its_share_of_a_shorter_run():
    def warmup(*argv: str) -> int:
        return parse_config(FinetuneConfig, PRESETS, [*argv]).warmup

    assert [warmup("--preset", name) for name in ("esc50", "own", "demo")] == [400, 40, 60]
    assert warmup("--preset", "esc50", "--updates", "200") == 20
    assert warmup("--preset=own", "--updates=200") == 20
    assert warmup("--updates", "200", "--warmup", "7") == 7


def test_the_demos_test_set_is_not_for_other_data(folder, tune):
    with pytest.raises(InputError, match="--eval_data is missing: a labelled manifest"):
        tune("--preset", "demo", "--init", "scratch", "--data", "manifest.tsv")
    assert not (folder / "runs").exists()


def test_the_demo_preset_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = FinetuneConfig(**PRESETS["demo"])
    with pytest.raises(CheckpointError, match="there is no .*runs/demo"):
        finetune.train(config)
    assert not (tmp_path / "runs").exists()
    config, train, test, model = open_inputs(dataclasses.replace(config, init="scratch"))
    assert len(train.classes) == 10
    assert min(len(train.data), len(test.data)) >= 100
    assert model.config.clip_frames == config.clip_frames
    assert (model.exclusive, model.pooling) == (True, "bands")


# --- frozen: a classifier in seconds ----------------------------------------------------------------------

FROZEN = "--preset own --frozen --init encoder.pt --data manifest.tsv --eval_data manifest.tsv".split()
FROZEN += "--out_dir run --workers 0".split()


@pytest.fixture
def two_sets(encoder):
    """train.tsv and test.tsv, half of the clips each, and encoder.pt."""
    root, *lines = (encoder / "manifest.tsv").read_text().splitlines()
    for name, own in (("train", lines[::2]), ("test", lines[1::2])):
        (encoder / f"{name}.tsv").write_text("\n".join([root, *own]) + "\n")
    return encoder


@pytest.mark.parametrize("block", [0, 2])
def test_a_frozen_encoder_scores_as_its_probe(two_sets, tune, called, capfd, block):
    """And what it wrote is a classifier like any other: for evaluate.py, for --init, for its probe."""
    files = ("--data", "train.tsv", "--eval_data", "test.tsv")
    assert tune(*FROZEN, *files, "--block", block) == 0
    said = capfd.readouterr().out
    probed = called(evaluate, "encoder.pt", "train.tsv", "test.tsv", "--block", block, "--workers", 0).stdout
    score = json.loads(probed)["probe_linear"]
    assert evaluations(two_sets / "run") == {400: score}
    assert f"done: accuracy {score:.4f}: run\n" in said
    for name in ("last.pt", "best.pt"):
        scored = json.loads(called(evaluate, f"run/{name}", "test.tsv", "--workers", 0).stdout)
        assert scored["accuracy"] == score
    again = called(evaluate, "run", "train.tsv", "test.tsv", "--block", block, "--workers", 0).stdout
    assert json.loads(again)["probe_linear"] == score
    assert tune(*TINY, "--init", "run", "--clip_frames", 96, "--out_dir", "more") == 0
    model = AudioClassifier.from_pretrained(two_sets / "run")
    assert (model.pooling, model.block, model.exclusive) == ("bands", block or 1, True)
    assert list(model.classes) == ["high", "low"]
    network = load_checkpoint(two_sets / "encoder.pt")["student"]
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, network[f"encoder.{name}"]), name


def test_a_frozen_classifier_says_how_sure_it_is(two_sets, tune):
    """Probabilities of a clip from its samples are those of the logistic regression on its features."""
    assert tune(*FROZEN) == 0
    model = AudioClassifier.from_pretrained(two_sets / "run")
    data, targets, _ = open_labelled(two_sets / "manifest.tsv", 96)
    batch = collate([data[i] for i in range(8)], 96)
    spec = spectrogram(batch.waveform, batch.n_samples, -5.0, 4.0)
    with torch.no_grad():
        features = evaluate.pooled(model.encoder, "bands", model.block)(spec)
        weight, bias = evaluate.fit_linear(features, targets)
        expected = torch.nn.functional.linear(features, weight, bias).softmax(1)
        found = model.probabilities(model(spec))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(1), targets.int().argmax(1))


def test_frozen_with_several_labels_is_a_logistic_regression_each(encoder, tune, called):
    several = (encoder / "manifest.tsv").read_text().replace("\tlow", "\tlow,any")
    (encoder / "manifest.tsv").write_text(several)
    assert tune(*FROZEN) == 0
    probed = called(evaluate, "encoder.pt", "manifest.tsv", "manifest.tsv", "--workers", 0).stdout
    assert evaluations(encoder / "run", "mAP") == {400: json.loads(probed)["probe_linear"]}
    assert not AudioClassifier.from_pretrained(encoder / "run").exclusive


def test_probabilities_of_a_frozen_classifier_follow_its_fit(encoder, tune):
    """Every clip to learn from has one class: softmax, though a clip to evaluate on has two."""
    several = (encoder / "manifest.tsv").read_text().replace("\tlow", "\tlow,high", 1)
    (encoder / "several.tsv").write_text(several)
    assert tune(*FROZEN, "--eval_data", "several.tsv") == 0
    assert list(evaluations(encoder / "run", "mAP")) == [400]
    assert AudioClassifier.from_pretrained(encoder / "run").exclusive


def test_frozen_repeated_in_its_folder_does_no_harm(two_sets, tune):
    """The same classifier and the same log; with other settings it is refused, and nothing is lost."""
    assert tune(*FROZEN) == 0
    run = two_sets / "run"
    scores = evaluations(run)
    before = weights(run / "last.pt")
    assert tune(*FROZEN) == 0
    assert evaluations(run) == scores
    assert_same_weights(weights(run / "last.pt"), before)
    assert_same_weights(weights(run / "best.pt"), before)
    log = (run / "log.jsonl").read_bytes()
    for flags, change in (
        (["--block", 2], "block was 0, now 2"), (["--no-frozen"], "frozen was True, now False"),
        (["--data", "train.tsv"], "data_digest was"), (["--init", "scratch"], "init was encoder.pt"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(change)):
            tune(*FROZEN, *flags)
    assert (run / "log.jsonl").read_bytes() == log
    assert_same_weights(weights(run / "last.pt"), before)


def test_frozen_leaves_out_and_lists_what_cannot_be_read(encoder, tune):
    (encoder / "clip 2.wav").write_text("damaged")
    assert tune(*FROZEN) == 0
    assert read_log(encoder / "run")[-1]["clips"] == 7
    listed = (encoder / "run" / "bad_files.tsv").read_text()
    assert listed.startswith("clip 2.wav\t")
    assert listed.count("\n") == 1


def test_frozen_refuses_a_block_that_is_not_there(encoder, tune):
    with pytest.raises(InputError, match="there is no block 3: the encoder has 2"):
        tune(*FROZEN, "--block", 3)
    assert not (encoder / "run").exists()


def test_two_processes_make_the_same_frozen_classifier(two_sets, script, tune):
    assert tune(*FROZEN, "--out_dir", "one") == 0
    script("finetune.py", *FROZEN, "--out_dir", "two", "--no-roll", processes=2)
    one = weights(two_sets / "one" / "last.pt")
    two = weights(two_sets / "two" / "last.pt")
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
    assert evaluations(two_sets / "one") == evaluations(two_sets / "two")


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_task_on_real_audio_is_learned(tmp_path, tune):
    """Telephone prompts or a word: an untrained network gets most right of clips that are new to it."""
    own_classes(tmp_path, ["prompts", "words/stop"])
    files = ["--data", "own0.tsv", "--eval_data", "own1.tsv"]
    assert tune(*TINY, *files, "--updates", 120, "--eval_every", 120, "--lr", 5e-3) == 0
    assert evaluations(tmp_path / "run")[120] >= 0.75


def test_the_last_lines_say_which_score_to_report(folder, tune, capsys, monkeypatch):
    """That of last.pt; best.pt was selected on the same clips."""
    scores_become(monkeypatch, [0.5, 0.9, 0.6])
    assert tune(*TINY, "--eval_every", 5) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "done: accuracy 0.6000 at the end, last.pt: the score to report",
        "best: 0.9000 after update 10, best.pt: selected on --eval_data, so optimistic",
    ]


def test_the_score_to_report_is_that_of_evaluate(folder, tune, called, capfd):
    """And both files are what the lines say they are; drop path is for training only."""
    assert tune(*TINY, "--drop_path", 0.9) == 0
    last, best = re.findall(r"^(?:done: accuracy|best:) ([.\d]+)", capfd.readouterr().out, re.MULTILINE)
    logged = read_log(folder / "run")[-1]
    said = json.loads(called(evaluate, "run/last.pt", "manifest.tsv", "--workers", 0).stdout)
    for key in ("mAP", "AUC", "accuracy"):
        assert said[key] == pytest.approx(logged[key], abs=1e-9)
    assert f"{said['accuracy']:.4f}" == last
    scored = json.loads(called(evaluate, "run/best.pt", "manifest.tsv", "--workers", 0).stdout)
    assert f"{scored['accuracy']:.4f}" == best
    assert scored["accuracy"] == max(evaluations(folder / "run").values())


def scores_become(monkeypatch, accuracies: list[float]) -> list[int]:
    """Evaluations find these accuracies, one after the other; returns the list of how many clips each had."""
    left = iter(accuracies)
    n_clips = []

    def summarize(*args):
        scores, precision = evaluate.summarize_scores(*args)
        n_clips.append(scores["clips"])
        scores["accuracy"] = next(left)
        return scores, precision

    monkeypatch.setattr(finetune, "summarize_scores", summarize)
    return n_clips


def stops_at(monkeypatch, number: int) -> None:
    """The process dies before the update that comes after so many."""
    step = finetune.train_step
    calls = itertools.count()

    def dies(*args):
        if next(calls) == number:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(finetune, "train_step", dies)


def test_a_run_that_dies_goes_on_exactly(folder, tune, monkeypatch, capsys):
    """From its last checkpoint, with the same log, scores and weights, drop path and mixup included."""
    args = [*TINY, "--updates", 20, "--drop_path", 0.5, "--mixup", 0.8, "--weighted", "--epoch_clips", 6]
    assert tune(*args) == 0
    for number in (15, 3):  # after update 15, and 3 after the resume at 12
        stops_at(monkeypatch, number)
        with pytest.raises(KeyboardInterrupt):
            tune(*args, "--out_dir", "cut")
        monkeypatch.undo()
        monkeypatch.chdir(folder)
    assert tune(*args, "--out_dir", "cut") == 0
    assert "cut, from update 12: 1 x cpu" in capsys.readouterr().out
    whole = folder / "run"
    cut = folder / "cut"
    assert_same_weights(weights(cut / "last.pt"), weights(whole / "last.pt"))
    assert evaluations(cut) == evaluations(whole)
    assert list(evaluations(cut)) == [6, 12, 18, 20]
    losses = [(record["step"], record["loss"]) for record in read_log(whole) if "loss" in record]
    assert losses == [(record["step"], record["loss"]) for record in read_log(cut) if "loss" in record]
    assert [step for step, _ in losses] == list(range(1, 21))
    best = load_checkpoint(cut / "best.pt")
    assert evaluations(cut)[best["step"]] == max(evaluations(cut).values())
    assert "optimizer" not in best
    assert tune(*args, "--out_dir", "cut") == 0  # it has ended: nothing changes
    assert evaluations(cut) == evaluations(whole)
    assert AudioClassifier.from_pretrained(cut).classes == {"high": "high", "low": "low"}


def test_a_resumed_run_knows_its_best(folder, tune, monkeypatch, capsys):
    """It died after update 9 and went on from update 8; its best is that of update 6."""
    with monkeypatch.context() as patch:
        scores_become(patch, [0.9])
        stops_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            tune(*TINY)
    scores_become(monkeypatch, [0.5])
    assert tune(*TINY) == 0
    assert "best: 0.9000 after update 6, best.pt" in capsys.readouterr().out
    assert load_checkpoint(folder / "run" / "best.pt")["step"] == 6


def test_a_best_that_cannot_be_written_is_none(folder, tune, monkeypatch, capsys):
    """The run calls its best what best.pt holds."""
    save_checkpoint = pretrain.save_checkpoint
    is_full = iter([False, True, False, False])

    def save_but_once(path, **state):
        if path.name == "best.pt" and next(is_full):
            raise OSError(28, "No space left on device")
        save_checkpoint(path, **state)

    scores_become(monkeypatch, [0.5, 0.9, 0.6, 0.7])
    monkeypatch.setattr(pretrain, "save_checkpoint", save_but_once)
    assert tune(*TINY, "--updates", 24) == 0  # evaluated after 6, 12, 18 and 24
    assert load_checkpoint(folder / "run" / "best.pt")["step"] == 24
    said = capsys.readouterr().out
    assert "WARNING: could not save update 12 in run: " in said
    assert "best: 0.7000 after update 24, best.pt" in said


def test_a_new_best_does_not_put_off_the_checkpoint(folder, tune, monkeypatch):
    """Minutes count from the last one that a run can go on from."""
    save_checkpoint = pretrain.save_checkpoint
    saved = []

    def save_and_tell(path, **state):
        saved.append((path.name, state["step"]))
        save_checkpoint(path, **state)

    scores_become(monkeypatch, [0.1 + 0.01 * i for i in range(12)])
    monkeypatch.setattr(pretrain, "save_checkpoint", save_and_tell)
    assert tune(*TINY, "--save_every", 1000, "--eval_every", 1, "--save_minutes", 1e-9) == 0
    assert [step for name, step in saved if name == "best.pt"] == list(range(1, 13))
    assert [step for name, step in saved if name == "last.pt"] == list(range(1, 13))


def test_a_score_of_fewer_clips_is_never_the_best(folder, tune, monkeypatch, capsys):
    """The file system had a hiccup in the second evaluation: its score is another, and so is the first's
    that was of fewer clips than the third."""
    gone = [folder / f"clip {i}.wav" for i in range(4)]
    evaluated = []
    predict = finetune.predict

    def hiccup(*args, **kwargs):
        evaluated.append(1)
        if len(evaluated) in (1, 2):
            for path in gone[: 2 * len(evaluated) - 1]:
                path.rename(path.with_suffix(".away"))
        found = predict(*args, **kwargs)
        for path in gone:
            if path.with_suffix(".away").exists():
                path.with_suffix(".away").rename(path)
        return found

    n_clips = scores_become(monkeypatch, [0.9, 1.0, 0.6, 0.4])
    monkeypatch.setattr(finetune, "predict", hiccup)
    assert tune(*TINY, "--eval_every", 3) == 0
    assert n_clips == [7, 5, 8, 8]
    assert load_checkpoint(folder / "run" / "best.pt")["step"] == 9
    assert "best: 0.6000 after update 9, best.pt" in capsys.readouterr().out
    logged = [record["unreadable"] for record in read_log(folder / "run") if "unreadable" in record]
    assert logged == [1, 3, 0, 0]
    listed = (folder / "run" / "bad_files.tsv").read_text().splitlines()
    assert listed == [f"clip {i}.wav\tno such file" for i in range(3)]


@pytest.mark.parametrize("delays", [
    (0.3,), pytest.param((0, 0.2, 0.4, 0.6, 0.8, 1.3), marks=pytest.mark.long),
])  # fmt: skip
def test_a_signal_to_an_evaluating_run_saves(folder, tune, capsys, delays):
    """In training and in evaluation; no process is left behind, and the run goes on."""
    args = [*TINY, "--workers", 1, "--updates", 1000, "--eval_every", 1]
    for delay in delays:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "finetune.py"), *map(str, args)], cwd=folder, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = ""
        while not line.startswith("step"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 143, errors
        assert "Traceback" not in errors
        assert "stopped by SIGTERM; the same command resumes" in said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    step = load_checkpoint(folder / "run" / "last.pt")["step"]
    logged = [record["step"] for record in read_log(folder / "run") if "loss" in record]
    assert logged == list(range(1, step + 1))
    evaluated = list(evaluations(folder / "run"))
    assert evaluated == list(range(1, step))


def test_what_was_trained_is_saved_before_an_evaluation(folder, tune, monkeypatch):
    """A signal waits for its end, and whoever sent it may not."""
    saved = []
    real = evaluate.predict

    def predict(*args, **options):
        saved.append(load_checkpoint(folder / "run" / "last.pt")["step"])
        return real(*args, **options)

    monkeypatch.setattr(finetune, "predict", predict)
    assert tune(*TINY, "--save_every", 100) == 0
    assert saved == [6, 12]


@pytest.mark.parametrize("preset", [
    "as2m", pytest.param("as20k", marks=pytest.mark.long), pytest.param("spcv2", marks=pytest.mark.long),
])  # fmt: skip
def test_two_processes_are_one(folder, script, tune, preset):
    """The same clips, mixed in the same pairs, with the same augmentation; each draws its own drop path."""
    args = [*TINY, "--preset", preset, *"--drop_path 0 --lr 1e-3 --seed 3 --epoch_clips 4".split()]
    both = []
    if preset == "spcv2":
        both = ["--accumulate", 2]
    assert tune(*args, "--out_dir", "one") == 0
    assert tune(*args, "--out_dir", "parts", "--accumulate", 2) == 0
    script("finetune.py", *args, "--out_dir", "two", *both, processes=2)
    one = read_log(folder / "one")
    for name in ("two", "parts"):
        for a, b in zip(one, read_log(folder / name), strict=True):
            for key in {"loss", "grad_norm", "mAP"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)


def test_processes_draw_their_own_drop_path(folder, script):
    """Both processes have the same clip only; drop path alone tells them apart."""
    (folder / "same.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow\n")
    (folder / "names.txt").write_text("low\nhigh\n")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import finetune, torch, pathlib\n"
        "step = finetune.train_step\n"
        "def tell(model, *args):\n"
        "    out = step(model, *args)\n"
        "    pathlib.Path(f'loss{torch.distributed.get_rank()}').write_text(str(out['loss'].item()))\n"
        "    return out\n"
        "finetune.train_step = tell\n"
        "finetune.run_script(lambda: finetune.train(finetune.parse_config(finetune.FinetuneConfig,"
        " finetune.PRESETS)))\n"
    )
    (folder / "tell.py").write_text(program)
    still = "--data same.tsv --classes names.txt --batch_size 4 --no-roll --specaug_freq 0".split()
    still += "--specaug_time 0 --updates 1 --warmup 0 --drop_path 0.7 --log_every 1".split()
    script(folder / "tell.py", *TINY, *still, processes=2)
    losses = [float((folder / f"loss{rank}").read_text()) for rank in (0, 1)]
    assert losses[0] != losses[1]
    logged = read_log(folder / "run")[0]["loss"]
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_from_pretrained_weights_in_any_layout(folder, train, tune):
    """A run folder, its checkpoint and a fine-tuned classifier are a beginning, and not from scratch."""
    assert train(*PRE) == 0
    first = {}
    for init in ("pre", "pre/last.pt", "scratch"):
        out_dir = f"from {init.replace('/', ' ')}"
        assert tune(*TINY, "--init", init, "--updates", 3, "--out_dir", out_dir) == 0
        first[init] = read_log(folder / out_dir)[0]["loss"]
    assert first["pre"] == first["pre/last.pt"] != first["scratch"]
    assert tune(*TINY, "--init", "from pre", "--updates", 3, "--out_dir", "again") == 0
    assert read_log(folder / "again")[0]["loss"] not in first.values()
    student = load_checkpoint(folder / "pre" / "last.pt")["student"]
    flags = "--preset esc50 --init pre --data manifest.tsv --eval_data manifest.tsv --clip_frames 64".split()
    model = open_inputs(parse_config(FinetuneConfig, PRESETS, flags))[3]
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, student[f"encoder.{name}"]), name


def test_an_unreadable_clip_is_neither_trained_on_nor_scored(folder, tune):
    """Its stand-in comes with its own labels."""
    (folder / "clip 2.wav").write_text("damaged")
    assert tune(*TINY, "--max_bad_fraction", 1) == 0
    listed = (folder / "run" / "bad_files.tsv").read_text()
    assert read_log(folder / "run")[-1]["clips"] == 7
    assert listed.startswith("clip 2.wav\t")
    assert listed.count("\n") == 1
    dataset = AudioDataset(folder / "manifest.tsv", 64, segments=False)
    clip = dataset[2]
    assert clip.problem
    assert clip.item == 3
    assert dataset.labels(clip.item) == ["low"]


def test_a_stand_in_is_learned_by_its_own_labels(folder):
    """The last low clip cannot be read; a high one comes in its place, with its own targets."""
    (folder / "clip 3.wav").write_text("damaged")
    spec, y = one_update(folder, FinetuneConfig(**PLAIN), 0)
    assert y.sum(0).tolist() == [5, 3]  # high, low
    assert y.sum(1).tolist() == [1] * 8


def test_what_the_last_evaluation_alone_cannot_read_is_listed(folder, tune):
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "eval.tsv").write_text("\n".join([*lines, "gone.wav\t16000\tlow"]) + "\n")
    assert tune(*TINY, "--eval_data", "eval.tsv", "--eval_every", 100) == 0
    assert (folder / "run" / "bad_files.tsv").read_text() == "gone.wav\tno such file\n"
    assert read_log(folder / "run")[-1]["clips"] == 8
    assert list(evaluations(folder / "run")) == [12]


def test_a_silent_clip_is_scored(folder, tune):
    """Not trained on, but its score counts, as in the released code."""
    soundfile.write(folder / "clip 5.wav", np.zeros(16_000), 16_000)
    assert tune(*TINY, "--max_bad_fraction", 1) == 0
    assert read_log(folder / "run")[-1]["clips"] == 8
    assert (folder / "run" / "bad_files.tsv").read_text() == "clip 5.wav\tsilent\n"


def write_bad_manifests(folder: Path) -> None:
    rows = (folder / "manifest.tsv").read_text()
    (folder / "unlabelled.tsv").write_text(f"{folder}\nclip 0.wav\t8000\nclip 1.wav\t9600\n")
    (folder / "half.tsv").write_text(f"{folder}\nclip 0.wav\t8000\ta\nclip 1.wav\t9600\n")
    (folder / "other.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tbird\n")
    (folder / "single.tsv").write_text(f"{folder}\nclip 0.wav\t8000\tlow\nclip 1.wav\t9600\tlow\n")
    (folder / "several.tsv").write_text(rows.replace("\tlow", "\tlow,high", 1))
    (folder / "notes.txt").write_text("not a checkpoint")


@pytest.mark.parametrize("args, message", [
    (["--init", "nothing.pt"], "there is no file nothing.pt"),
    (["--init", "notes.txt"], "notes.txt"),
    (["--init", ""], "--init is missing: a checkpoint, or scratch"),
    (["--data", ""], "--data is missing"),
    (["--data", "nothing.tsv"], "cannot read the manifest nothing.tsv"),
    (["--data", "unlabelled.tsv"], "unlabelled.tsv: clip 0.wav has no label (third column)"),
    (["--data", "half.tsv"], "half.tsv: clip 1.wav has no label (third column)"),
    (["--eval_data", "other.tsv"], "other.tsv: clip 0.wav has an unknown label: 'bird'"),
    (["--eval_data", ""], "--eval_data is missing: a labelled manifest"),
    (["--min_samples", "13000"], "manifest.tsv, with --min_samples 13000, has one class only: high"),
    (["--min_samples", "30000"], "manifest.tsv: no clip has the 30000 samples that --min_samples asks for"),
    (["--warmup", "12"], "--warmup 12 must be less than --updates 12"),
    (["--data", "single.tsv"], "single.tsv, with --min_samples 1600, has one class only: low"),
    (["--data", "several.tsv"], "a clip of --data or --eval_data has several labels: --loss bce"),
    (["--batch_size", "7", "--mixup", "0.5"], "mixup pairs clips"),
    (["--accumulate", "8", "--mixup", "0.5"], "mixup pairs clips"),
    (["--accumulate", "3"], "--batch_size 8 does not divide by 1 processes x 3 (--accumulate)"),
    (["--loss", "mse"], "--loss mse: choose from bce_positives, bce, ce"),
    (["--lr", "nan"], "--lr nan is too small or not finite"),
    (["--mixup_prob", "1.5"], "--mixup_prob 1.5 is too large"),
    (["--drop_path", "1"], "--drop_path 1.0 is too large"),
    (["--clip_frames", "12304"], "--clip_frames: expected clip_frames from 1 to 12288, not 12304"),
    (["--clip_frames", "100"], "--clip_frames: expected whole patches of 16"),
    (["--model", "huge"], "--model huge: choose from base"),
    (["--timeout", "0"], "--timeout 0.0 is too small"),
    (["--classes", "nothing.csv"], "cannot read the classes in nothing.csv"),
    (["--pooling", "max"], "--pooling max: choose from cls, mean, bands"),
    (["--speed", "3"], "unrecognized arguments: --speed 3"),
    (["--preset", "none"], "argument --preset: invalid choice: 'none'"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(folder, tune, args, message):
    write_bad_manifests(folder)
    with pytest.raises((InputError, CheckpointError), match=re.escape(message)) as error:
        tune(*TINY, *args)
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists()


def test_a_block_is_for_frozen_only(encoder, tune):
    with pytest.raises(InputError, match="^--block is for --frozen$"):
        tune("--preset", "own", *FROZEN[3:], "--block", 1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_frozen_with_another_pooling(two_sets, tune, pooling):
    """The classifier is the logistic regression of what is pooled so."""
    assert tune(*FROZEN, "--pooling", pooling, "--block", 1) == 0
    model = AudioClassifier.from_pretrained(two_sets / "run")
    assert model.pooling == pooling
    data, targets, _ = open_labelled(two_sets / "manifest.tsv", 96)
    batch = collate([data[i] for i in range(8)], 96)
    spec = spectrogram(batch.waveform, batch.n_samples, -5.0, 4.0)
    with torch.no_grad():
        tokens = model.encoder(spec, n_blocks=1)
        features = dict(cls=tokens[:, 0], mean=tokens[:, 1:].mean(1))[pooling]
        weight, bias = evaluate.fit_linear(features, targets)
        expected = torch.nn.functional.linear(features, weight, bias)
        torch.testing.assert_close(model(spec), expected, atol=1e-3, rtol=1e-3)


def test_a_diverged_network_is_told_in_one_line(folder, script):
    args = [*TINY, "--lr", 1e30, "--layer_decay", 1, "--warmup", 0, "--eval_every", 3]
    result = script("finetune.py", *args, check=False)
    assert result.returncode == 1
    assert result.stderr == "finetune.py: the network's outputs are not finite: its training has diverged\n"


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(folder, tune, monkeypatch):
    """The run died in the very evaluation that was due: it is made when the run goes on."""
    args = [*TINY, "--drop_path", 0.5, "--save_every", 6]
    assert tune(*args) == 0
    scores = evaluations(folder / "run")
    assert list(scores) == [6, 12]

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "predict", dies)
        with pytest.raises(KeyboardInterrupt):
            tune(*args, "--out_dir", "cut")
    assert load_checkpoint(folder / "cut" / "last.pt")["step"] == 6
    assert tune(*args, "--out_dir", "cut") == 0
    assert evaluations(folder / "cut") == scores
    assert_same_weights(weights(folder / "cut" / "last.pt"), weights(folder / "run" / "last.pt"))


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
    assert tune(*TINY, "--workers", 2, "--log_every", 3) == 0
    assert "done: accuracy" in capsys.readouterr().out


def test_clips_longer_than_the_network_are_cut(folder, tune, capsys):
    """One item a clip, however long it is, and the user is told."""
    soundfile.write(folder / "clip 0.wav", tone(64_000).numpy(), 16_000)
    text = (folder / "manifest.tsv").read_text().replace("clip 0.wav\t8000", "clip 0.wav\t64000")
    (folder / "manifest.tsv").write_text(text)
    n_long = sum(8000 + 1600 * i > clip_samples(64) for i in range(1, 8)) + 1
    assert tune(*TINY, "--updates", 3) == 0
    assert read_log(folder / "run")[-1]["clips"] == 8
    said = capsys.readouterr().out
    assert f"WARNING: of {2 * n_long} longer clips only the first 0.64 s are used" in said


@NEEDS_GPU
@pytest.mark.parametrize("flags", [["fp32"], ["bf16"], ["fp16"], ["bf16", "--compile"]])
def test_on_a_gpu_it_learns(folder, script, flags):
    script("finetune.py", *TINY, "--amp", *flags, "--updates", 60, "--eval_every", 60)
    log = read_log(folder / "run")
    assert log[-2]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] >= 0.75
