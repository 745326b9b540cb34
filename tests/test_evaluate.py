"""Metrics against scikit-learn, predictions of several processes, pooled tokens, probes, and bad input."""

import builtins
import csv
import io
import json
import math
import os
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn.functional import one_hot

import evaluate
from data import InputError, clip_samples, load_audio, open_labelled, spectrogram
from evaluate import (
    average_precision, fit_linear, has_one_class, pooled, predict, probe, probe_block, save_checkpoint,
    spread, summarize_scores,
)  # fmt: skip
from extras import tables
from extras.tables import load_classifier, roc_auc, write_table
from model import EAT, MODELS, AudioClassifier, Encoder, pool

CPU = torch.device("cpu")
TINY = replace(MODELS["tiny"], clip_frames=96)


# --- metrics ----------------------------------------------------------------------------------------------


def assert_equals_sklearn(scores: np.ndarray, targets: np.ndarray) -> None:
    ours = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    auc = roc_auc(torch.from_numpy(scores), torch.from_numpy(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's on classes without positives
        theirs = [average_precision_score(y, s) for y, s in zip(targets.T, scores.T)]
    assert ours.dtype == auc.dtype == torch.float64
    assert np.abs(ours.numpy() - theirs).max() <= 1e-12
    for value, y, s in zip(auc, targets.T, scores.T):
        if 0 < y.sum() < len(y):
            assert abs(value.item() - roc_auc_score(y, s)) <= 1e-12
        else:
            assert value.isnan()


@pytest.mark.parametrize("n_tables", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_and_auc_equal_scikit_learn(dtype, n_tables):
    """Random tables of scores that are often equal and of classes that are often empty or full."""
    rng = np.random.default_rng(0)
    for _ in range(n_tables):
        n = rng.integers(1, 40)
        n_classes = rng.integers(1, 6)
        levels = rng.choice([1, 2, 3, 10, 10**6])
        scores = (rng.integers(0, levels, (n, n_classes)) / levels).astype(dtype)
        targets = rng.random((n, n_classes)) < rng.choice([0.0, 0.05, 0.5, 0.95, 1.0])
        assert_equals_sklearn(scores, targets)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.booleans()), min_size=1, max_size=30))
def test_average_precision_of_any_finite_scores(pairs):
    scores = np.array([[s] for s, _ in pairs])
    targets = np.array([[y] for _, y in pairs])
    with np.errstate(over="ignore"):
        assert_equals_sklearn(scores, targets)


def test_average_precision_in_closed_form():
    """The positives at ranks 1, 3 and 5: (1/1 + 2/3 + 3/5) / 3; all equal: the share of positives."""
    scores = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0], [0.0]])
    targets = torch.tensor([[1], [0], [1], [0], [1], [0]])
    expected = (1 + 2 / 3 + 3 / 5) / 3
    assert average_precision(scores, targets).item() == pytest.approx(expected, abs=1e-15)
    assert average_precision(torch.zeros(6, 1), targets).item() == 0.5
    tied = torch.tensor([[5.0], [4.0], [4.0], [4.0], [1.0], [1.0]])
    expected = (1 + 2 / 4 + 3 / 6) / 3
    assert average_precision(tied, targets).item() == pytest.approx(expected, abs=1e-15)


def test_auc_in_closed_form():
    """Of 2 x 3 pairs one is the wrong way round and one is equal; a pair that is equal counts half."""
    scores = torch.tensor([[3.0], [1.0], [2.0], [1.0], [0.0]])
    targets = torch.tensor([[1], [1], [0], [0], [0]])
    assert roc_auc(scores, targets).item() == pytest.approx((3 + 1 + 0.5) / 6, abs=1e-15)
    assert roc_auc(torch.zeros(5, 1), targets).item() == 0.5


def test_of_classes_without_positives_or_negatives():
    """0 and 1 as in scikit-learn, counted, and left out of the AUC."""
    targets = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0]])
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    assert average_precision(scores, targets).tolist() == [0, 1, 0.5]
    result, precision = summarize_scores(scores, targets)
    assert precision.tolist() == [0, 1, 0.5]
    assert result["mAP"] == 0.5
    assert result["AUC"] == 0.5
    assert result["d_prime"] == 0
    assert result["classes_without_positives"] == 1
    assert result["clips"] == result["classes"] == 3
    assert "accuracy" not in result  # one clip has two classes
    with pytest.raises(ValueError, match="expected finite scores and their targets"):
        average_precision(scores / 0, targets)
    with pytest.raises(ValueError, match="expected finite scores and their targets"):
        average_precision(scores, targets[:2])
    with pytest.raises(ValueError, match="expected finite scores and their targets"):
        average_precision(scores[0], targets[0])


def test_a_table_without_any_auc():
    """Where no class has both positives and negatives there is none, and no d-prime: JSON has no nan."""
    result, _ = summarize_scores(torch.rand(3, 2), torch.tensor([[1, 0]] * 3))
    assert "AUC" not in result
    assert "d_prime" not in result
    assert result["mAP"] == 0.5
    json.dumps(result, allow_nan=False)


def test_map_and_auc_are_means_over_classes():
    rng = np.random.default_rng(0)
    scores = rng.random((50, 4))
    targets = rng.random((50, 4)) < [0.1, 0.3, 0.5, 0.9]
    result, precision = summarize_scores(torch.from_numpy(scores), torch.from_numpy(targets))
    assert result["mAP"] == pytest.approx(average_precision_score(targets, scores), abs=1e-12)
    assert result["AUC"] == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    assert result["mAP"] == pytest.approx(precision.mean().item(), abs=1e-12)
    assert result["classes_without_positives"] == 0


def accuracy(scores: torch.Tensor, targets: torch.Tensor) -> float:
    return summarize_scores(scores, targets)[0]["accuracy"]


@pytest.mark.parametrize(
    "below, quantile", [(9, 1.2815515655446004), (8, 0.8416212335729143), (1, -1.2815515655446004)]
)
def test_d_prime(below, quantile):
    """An AUC of .9 is two normal distributions that are sqrt(2) * 1.28 apart."""
    scores = torch.arange(11.0)[:, None]
    targets = torch.zeros(11, 1)
    targets[below] = 1  # above so many of the 10 others
    result = summarize_scores(scores, targets)[0]
    assert result["AUC"] == below / 10
    assert result["d_prime"] == pytest.approx(math.sqrt(2) * quantile, abs=1e-12)


@pytest.mark.parametrize("scores, auc", [([[0.9], [0.1]], 1), ([[0.1], [0.9]], 0)])
def test_an_infinite_d_prime_is_left_out(scores, auc):
    result = summarize_scores(torch.tensor(scores), torch.tensor([[1], [0]]))[0]
    assert result["AUC"] == auc
    assert "d_prime" not in result


def test_accuracy_is_that_of_the_highest_score():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(scores, torch.tensor([[0, 1], [1, 0], [1, 0]])) == pytest.approx(2 / 3)
    assert accuracy(scores, torch.tensor([[False, True], [True, False], [False, True]])) == 1


def test_clips_of_one_class():
    assert has_one_class(torch.tensor([[1, 0], [0, 1]]))
    assert not has_one_class(torch.tensor([[1, 0], [1, 1]]))
    assert not has_one_class(torch.tensor([[1, 0], [0, 0]]))
    assert not has_one_class(torch.tensor([[True, True]]))


def test_spread_is_the_mean_deviation_of_the_channels():
    """In closed form: 0, 2 in one channel, constant in the other; over rows, with n - 1."""
    x = torch.tensor([[0.0, 5.0], [2.0, 5.0], [0.0, 5.0], [2.0, 5.0]])
    assert spread(x) == pytest.approx((math.sqrt(4 / 3 + 1e-6) + math.sqrt(1e-6)) / 2, rel=1e-6)


# --- pooling ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(replace(TINY, depth=3)).eval()


def padded_spectrogram(n_frames: list[int], clip_frames: int = 96) -> torch.Tensor:
    """Noise of so many frames each, padded to clips of `clip_frames`: (B, 1, clip_frames, M)."""
    n_samples = torch.tensor([clip_samples(n) for n in n_frames])
    generator = torch.Generator().manual_seed(sum(n_frames))
    waveform = torch.randn(len(n_frames), clip_samples(clip_frames), generator=generator) / 10
    waveform[torch.arange(waveform.shape[1]) >= n_samples[:, None]] = 0
    return spectrogram(waveform, n_samples, TINY.norm_mean, TINY.norm_std)


def slow_tokens(encoder: Encoder, spec: torch.Tensor, n_blocks: int) -> torch.Tensor:
    tokens = encoder.embed(spec)
    for i in range(n_blocks):
        tokens = encoder.blocks[i](tokens)[0]
    return tokens


def bands_of(tokens: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Mean and deviation over these rows of patches of one clip's tokens (1+N, D), by loops."""
    grid = tokens[1:].view(-1, 8, tokens.shape[1])  # time, band, width
    means = []
    deviations = []
    for band in range(8):
        sounding = torch.stack([grid[t, band] for t in rows])
        means.append(sounding.mean(0))
        deviations.append((sounding.var(0, correction=0) + 1e-6).sqrt())
    return torch.cat([*means, *deviations])


@torch.no_grad()
def test_pooling_by_cls_and_mean():
    tokens = torch.randn(2, 1 + 48, 64)
    spec = padded_spectrogram([96, 40])
    assert torch.equal(pool(tokens, spec, TINY, "cls"), tokens[:, 0])
    torch.testing.assert_close(pool(tokens, spec, TINY, "mean"), tokens[:, 1:].sum(1) / 48)


def test_bands_are_mean_and_deviation_over_the_rows_with_sound():
    """A row of patches counts if half of its 16 frames are sound: clips that fill 6, 3, 2, 1 of 6 rows; if
    there is none, as in a clip of 3 or 7 frames, the row that has most."""
    frames = [96, 95, 48, 40, 39, 17, 16, 8, 7, 3]
    n_rows = [6, 6, 3, 3, 2, 1, 1, 1, 1, 1]
    spec = padded_spectrogram(frames)
    tokens = torch.randn(len(frames), 1 + 48, 64)
    found = pool(tokens, spec, TINY, "bands")
    assert found.shape == (len(frames), 2 * 8 * 64)
    for own, row, n in zip(found, tokens, n_rows):
        torch.testing.assert_close(own, bands_of(row, list(range(n))), atol=1e-5, rtol=1e-5)


def test_bands_leave_out_digital_silence():
    """Wherever it lies: frames whose mel bins are all equal, as those of padding and zeros are."""
    waveform = torch.randn(2, clip_samples(96), generator=torch.Generator().manual_seed(0)) / 10
    waveform[0, : 160 * 32] = 0
    waveform[1, 160 * 48 : 160 * 80 + 400] = 0
    spec = spectrogram(waveform, torch.tensor([clip_samples(96)] * 2), TINY.norm_mean, TINY.norm_std)
    is_sound = (spec[:, 0] != spec[:, 0, :, :1]).any(2)
    per_row = is_sound.view(2, 6, 16).sum(2)
    assert per_row[0].tolist() == [0, 2, 16, 16, 16, 16]
    assert per_row[1].tolist() == [16, 16, 16, 0, 0, 15]
    tokens = torch.randn(2, 1 + 48, 64)
    found = pool(tokens, spec, TINY, "bands")
    torch.testing.assert_close(found[0], bands_of(tokens[0], [2, 3, 4, 5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], bands_of(tokens[1], [0, 1, 2, 5]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "n_sound, rows",
    [
        ([16, 8, 7, 0, 0, 0], [0, 1]),
        ([7, 8, 0, 0, 0, 16], [1, 5]),
        ([7, 6, 0, 7, 0, 0], [0, 3]),
        ([0, 0, 0, 0, 1, 0], [4]),
        ([0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_rows_of_patches_count(n_sound, rows):
    """By the number of sounding frames in each, made by hand; the clip beside it does not matter."""
    spec = torch.full((2, 1, 96, 128), -1.2776)
    for row, n in enumerate(n_sound):
        spec[0, 0, 16 * row : 16 * row + n, 5:9:2] = 0.3  # two mel bins are enough
    spec[1, 0, :, 90::2] = 0.3
    tokens = torch.randn(2, 1 + 48, 64)
    found = pool(tokens, spec, TINY, "bands")
    torch.testing.assert_close(found[0], bands_of(tokens[0], rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], bands_of(tokens[1], list(range(6))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("from_bin, to_bin", [(0, 20), (40, 60), (108, 128), (7, 8)])
def test_bands_leave_out_padding_with_a_blank_band(from_bin, to_bin):
    """SpecAugment sets a band of mel bins to 0 in all frames: that makes no sound of padding or silence."""
    spec = padded_spectrogram([40])
    spec[0, 0, 48:64] = -1.277565  # digital silence, then padding
    tokens = torch.randn(1, 1 + 48, 64)
    expected = pool(tokens, spec, TINY, "bands")
    torch.testing.assert_close(expected[0], bands_of(tokens[0], [0, 1, 2]), atol=1e-5, rtol=1e-5)
    spec[:, :, :, from_bin:to_bin] = 0
    torch.testing.assert_close(pool(tokens, spec, TINY, "bands"), expected)


@pytest.mark.parametrize("bins, is_sound", [([], False), ([64], False), ([0, 127], False), ([0, 64], True)])
def test_how_little_is_sound(bins, is_sound):
    """Mel bins that differ from the one below three times or more; a blank band alone makes two steps."""
    spec = torch.full((1, 1, 96, 128), 0.467)
    spec[:, :, :16, ::2] = 0.3
    spec[:, :, 16:32, bins] = 0.3
    tokens = torch.randn(1, 1 + 48, 64)
    rows = [0, 1] if is_sound else [0]
    found = pool(tokens, spec, TINY, "bands")
    torch.testing.assert_close(found[0], bands_of(tokens[0], rows), atol=1e-5, rtol=1e-5)


def test_bands_in_closed_form():
    """Tokens that count the rows: their mean and deviation, in each band its own multiple."""
    rows = torch.arange(6.0).repeat_interleave(8)
    band = torch.arange(8.0).repeat(6)
    tokens = torch.cat([torch.tensor([99.0]), rows * (1 + band)])[None, :, None].expand(1, 49, 64)
    found = pool(tokens, padded_spectrogram([64]), TINY, "bands").view(2, 8, 64)
    for i in range(8):
        mean = (0 + 1 + 2 + 3) / 4 * (1 + i)
        variance = (2.25 + 0.25 + 0.25 + 2.25) / 4 * (1 + i) ** 2
        assert found[0, i].tolist() == pytest.approx([mean] * 64, rel=1e-6)
        assert found[1, i].tolist() == pytest.approx([math.sqrt(variance + 1e-6)] * 64, rel=1e-6)


@pytest.mark.parametrize("n_frames", [96, 16, 3, 0])
def test_gradients_of_bands_are_finite(n_frames):
    """Also where the deviation is zero: tokens that are all equal, one row of patches, a silent clip."""
    spec = torch.full((1, 1, 96, 128), 0.467)
    spec[:, :, :n_frames, ::2] = 0
    for tokens in (torch.ones(1, 49, 64), torch.randn(1, 49, 64)):
        tokens.requires_grad_(True)
        found = pool(tokens, spec, TINY, "bands")
        assert found.isfinite().all()
        weight = torch.randn(found.shape)
        (found * weight).sum().backward()
        assert tokens.grad.isfinite().all()
        n_rows = max(1, n_frames // 16)
        if n_frames == 0:
            n_rows = 6
        used = tokens.grad[0, 1:].view(6, 8 * 64)
        assert used[:n_rows].any()
        assert not used[n_rows:].any()
        assert not tokens.grad[0, 0].any()  # the CLS token has no part in it


@torch.no_grad()
def test_bands_of_frames_that_fill_no_patch_and_of_silence(encoder):
    """Frames after the last whole patch are not looked at; a silent clip has finite features."""
    spec = padded_spectrogram([40, 25])
    longer = torch.cat([spec, torch.randn(2, 1, 9, 128)], dim=2)
    torch.testing.assert_close(pooled(encoder)(longer), pooled(encoder)(spec))
    silent = spectrogram(torch.zeros(1, clip_samples(96)), torch.tensor([clip_samples(96)]), 0.0, 1.0)
    expected = bands_of(slow_tokens(encoder, silent, 1)[0], list(range(6)))
    torch.testing.assert_close(pooled(encoder)(silent)[0], expected)


def test_block_of_probes():
    """From 1 on; 0 is the one at 7/12 of the depth, and never none."""
    depths = {1: 1, 2: 1, 3: 1, 4: 2, 6: 3, 12: 7, 24: 14}
    for depth, block in depths.items():
        config = replace(TINY, depth=depth)
        assert probe_block(config) == block
        assert probe_block(config, depth) == depth
        for wrong in (-1, depth + 1):
            with pytest.raises(InputError, match=f"no block {wrong}: the encoder has {depth}"):
                probe_block(config, wrong)


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_what_probes_see(encoder, block):
    """Of the block that is asked for, by default of 7/12 of them: bands, or the CLS token and the mean of all
    patches."""
    spec = padded_spectrogram([96, 40, 3])
    tokens = slow_tokens(encoder, spec, block or 1)
    expected = [bands_of(row, list(range(n))) for row, n in zip(tokens, (6, 3, 1))]
    found = pooled(encoder, "bands", block)(spec)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    expected = [torch.cat([row[0], row[1:].mean(0)]) for row in tokens]
    torch.testing.assert_close(pooled(encoder, "cls_mean", block)(spec), torch.stack(expected))
    for wrong in (-1, 4):
        with pytest.raises(InputError, match=f"no block {wrong}"):
            pooled(encoder, "bands", wrong)


# --- probes -----------------------------------------------------------------------------------------------


def clips_of_classes(n: int, n_labels: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 10) of unlike scales, far from 0, and 3 classes: one for each clip or up to n_labels."""
    generator = torch.Generator().manual_seed(0)
    if n_labels is None:
        y = one_hot(torch.arange(n) % 3, 3)
    else:
        y = (torch.rand(n, 3, generator=generator) < torch.tensor([0.2, 0.4, 0.6])).long()
    x = y.float() @ torch.randn(3, 10, generator=generator) + torch.randn(n, 10, generator=generator)
    return x * 10.0 ** torch.linspace(-1, 1, 10) + torch.linspace(0, 5, 10), y


def sklearn_scores(x: torch.Tensor, y: torch.Tensor, decay: float) -> np.ndarray:
    """Logits of scikit-learn's logistic regression on standardised features. It weighs the sum over clips by
    C against half the squared weights; we take the mean over clips, and `decay` times the squared weights."""
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    settings = dict(C=1 / (2 * decay * len(x)), tol=1e-10, max_iter=10_000)
    if (y.sum(1) == 1).all():
        scores = LogisticRegression(**settings).fit(z, y.argmax(1).numpy()).decision_function(z)
        return scores - scores.mean(1, keepdims=True)
    columns = []
    for column in y.T.numpy():
        columns.append(LogisticRegression(**settings).fit(z, column).decision_function(z))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("n_labels", [None, 3], ids=["one class", "several labels"])
@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_linear_probe_equals_scikit_learn(n_labels, decay):
    """Softmax regression, or a logistic regression a class, with the same penalty; the bias has none."""
    x, y = clips_of_classes(240, n_labels)
    weight, bias = fit_linear(x, y, decay)
    assert weight.shape == (3, 10)
    assert bias.shape == (3,)
    assert weight.dtype == bias.dtype == torch.float32
    ours = torch.nn.functional.linear(x, weight, bias)
    if n_labels is None:  # what is added to all classes does not matter
        ours = ours - ours.mean(1, keepdim=True)
    theirs = sklearn_scores(x, y, decay)
    assert np.abs(ours.numpy() - theirs).max() < 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("n_labels", [None, 3])
def test_linear_probe_has_a_penalty_of_its_own_by_default(n_labels):
    x, y = clips_of_classes(240, n_labels)
    for ours, theirs in zip(fit_linear(x, y), fit_linear(x, y, 1e-2)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n_labels", [None, 3])
def test_linear_probe_is_the_same_on_raw_and_standardised_features(n_labels):
    """Whatever unit and origin each feature has; a feature that never changes does not matter."""
    x, y = clips_of_classes(240, n_labels)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    expected = torch.nn.functional.linear(standard, *fit_linear(standard, y))
    for features in (x, x * 1000 - 7, torch.cat([x, torch.full((240, 1), 3.0)], dim=1)):
        scores = torch.nn.functional.linear(features, *fit_linear(features, y))
        torch.testing.assert_close(scores, expected, atol=2e-3, rtol=1e-3)


def test_linear_probe_finds_what_is_there():
    """On clips that it was not fitted to, and not if the labels are those of other clips."""
    x, y = clips_of_classes(300, None)
    weight, bias = fit_linear(x[:200], y[:200])
    assert accuracy(torch.nn.functional.linear(x[200:], weight, bias), y[200:]) > 0.7
    weight, bias = fit_linear(x[:200], y[:200].roll(67, 0))
    assert accuracy(torch.nn.functional.linear(x[200:], weight, bias), y[200:]) < 0.5
    x, y = clips_of_classes(300, 3)
    weight, bias = fit_linear(x[:200], y[:200])
    scores = torch.nn.functional.linear(x[200:], weight, bias)
    assert average_precision(scores, y[200:]).mean() > 0.8


def brightness(spec: torch.Tensor) -> torch.Tensor:
    """Mean of each of eight bands: enough to tell the tones of the test folder apart."""
    return spec[:, 0, :48].mean(1).unflatten(1, (8, 16)).mean(2)


def test_probe_fits_one_set_and_scores_the_other(folder, capsys):
    """Accuracy where every clip of the test set has one class, else mAP, or what is asked for."""
    one = open_labelled(folder / "manifest.tsv", 160)
    assert probe(brightness, TINY, one, one, CPU) == dict(probe_linear=1.0)
    wrong = one._replace(targets=~one.targets)
    assert probe(brightness, TINY, one, wrong, CPU) == dict(probe_linear=0.0)
    several = one._replace(targets=one.targets | (torch.arange(8) == 0)[:, None])  # one clip has both
    found = predict(brightness, one.data, TINY, CPU).values
    scores = torch.nn.functional.linear(found, *fit_linear(found, one.targets))
    expected = average_precision(scores, several.targets).mean().item()
    assert expected < 1
    assert probe(brightness, TINY, one, several, CPU)["probe_linear"] == pytest.approx(expected)
    expected = average_precision(scores, wrong.targets).mean().item()
    assert probe(brightness, TINY, one, wrong, CPU, metric="mAP")["probe_linear"] == pytest.approx(expected)
    assert capsys.readouterr().err == ""


def test_probe_tells_of_clips_that_it_does_not_use(folder, capsys):
    """Those that cannot be read, in both sets, and those that are cut; labels stay with their clips."""
    one = open_labelled(folder / "manifest.tsv", 160)
    (folder / "clip 3.wav").write_text("damaged")
    assert probe(brightness, TINY, one, one, CPU)["probe_linear"] == 1.0
    assert "probes: 2 clips cannot be used, 0 are cut" in capsys.readouterr().err
    short = open_labelled(folder / "manifest.tsv", 96)
    probe(brightness, TINY, short, one, CPU)
    assert "probes: 2 clips cannot be used, 3 are cut" in capsys.readouterr().err
    with pytest.raises(InputError, match="outputs are not finite: its training has diverged"):
        probe(lambda spec: brightness(spec) / 0, TINY, one, one, CPU)


@pytest.mark.long
def test_probe_of_the_encoder_that_comes_with_the_code(called):
    """Its score on the demo's ten words, as the README and extras/runs/laptop/README.md have it."""
    demo = ROOT / "extras" / "demo"
    args = (ROOT / "extras" / "runs" / "laptop" / "encoder.pt", demo / "train.tsv", demo / "test.tsv")
    found = json.loads(called(evaluate, *args).stdout)
    assert found == dict(pooling="bands", probe_linear=pytest.approx(0.59, abs=0.006))  # 200 clips


# --- the command ------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_networks_outputs(classifier, called):
    """One line of JSON, equal to scikit-learn's scores of the network applied clip by clip."""
    one = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    model = AudioClassifier.from_pretrained(classifier / "classifier.pt")
    outputs = []
    for i in range(8):
        waveform = load_audio(classifier / f"clip {i}.wav", 0, clip_samples(96))
        n_samples = torch.tensor([len(waveform)])
        waveform = torch.nn.functional.pad(waveform, (0, clip_samples(96) - len(waveform)))
        spec = spectrogram(waveform[None], n_samples, TINY.norm_mean, TINY.norm_std)
        with torch.no_grad():
            outputs.append(model(spec)[0])
    scores = torch.stack(outputs).double().softmax(1).numpy()
    is_low = np.arange(8) < 4
    targets = np.stack([is_low, ~is_low], 1)
    assert one["mAP"] == pytest.approx(average_precision_score(targets, scores), abs=1e-9)
    assert one["AUC"] == pytest.approx(roc_auc_score(targets, scores), abs=1e-9)
    assert one["accuracy"] == (scores.argmax(1) == (np.arange(8) >= 4)).mean()
    assert one["clips"] == 8
    assert one["classes"] == 2
    assert one["unreadable"] == 0


def table_of(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_table_of_a_checkpoint_in_a_run_folder_goes_there(classifier, called):
    (classifier / "run").mkdir()
    (classifier / "run" / "log.jsonl").touch()
    os.replace(classifier / "classifier.pt", classifier / "run" / "last.pt")
    called(evaluate, "run/last.pt", "manifest.tsv", "--workers", 0)
    assert (classifier / "run" / "per_class.csv").exists()
    assert not (classifier / "per_class.csv").exists()


@pytest.mark.parametrize("env", [dict(RANK="1"), dict(RANK="3", WORLD_SIZE="1")])
def test_a_rank_without_other_processes_prints(classifier, script, env):
    """As some batch systems set it."""
    result = script("evaluate.py", "classifier.pt", "manifest.tsv", **env)
    assert json.loads(result.stdout)["clips"] == 8


def test_two_processes_score_what_one_does(classifier, called, script):
    """8 clips, of which one cannot be read and one is too short: each clip once, in order; the table of
    classes goes into the run folder, or without one into the current folder."""
    lines = (classifier / "manifest.tsv").read_text().splitlines()[:-1]
    (classifier / "clip 3.wav").write_bytes(b"RIFF nonsense")
    (classifier / "seven.tsv").write_text("\n".join([*lines, "click.wav\t300\tlow"]) + "\n")
    (classifier / "run").mkdir()
    (classifier / "classifier.pt").rename(classifier / "run" / "best.pt")
    results = [called(evaluate, "run", "seven.tsv", "--workers", 0)]
    results.append(script("evaluate.py", "run/best.pt", "seven.tsv", processes=2))
    one, two = (json.loads(result.stdout) for result in results)
    assert one["clips"] == 6
    assert one["unreadable"] == 2
    for result in results:
        assert "cannot be used: clip 3.wav " in result.stderr
        assert "cannot be used: click.wav shorter than 400 samples" in result.stderr
        assert result.stderr.count("cannot be used") == 2
    assert one.keys() == two.keys()
    for key in one:
        assert one[key] == pytest.approx(two[key], abs=1e-6)
    rows = table_of(classifier / "run" / "per_class.csv")
    assert [row["label"] for row in rows] == ["low", "high"]
    assert [row["name"] for row in rows] == ["Low tone", "High tone"]
    assert [row["clips"] for row in rows] == ["3", "3"]
    assert np.mean([float(row["average_precision"]) for row in rows]) == pytest.approx(one["mAP"], abs=1e-6)
    assert (classifier / "run" / "per_class.csv").read_text() == (classifier / "per_class.csv").read_text()


def test_predictions_are_in_order_and_the_batch_does_not_matter(folder):
    """Whatever the batch size and the loader; one item a clip, of all labelled clips."""
    data, targets, classes = open_labelled(folder / "manifest.tsv", 96)
    encoder = Encoder(TINY).eval()

    def cls(spec):
        return encoder(spec)[:, 0]

    whole = predict(cls, data, TINY, CPU, batch_size=3)
    single = predict(cls, data, TINY, CPU, batch_size=1, workers=2)
    assert whole.items.tolist() == list(range(8))
    assert whole.problems == []
    assert whole.values.shape == (8, 64)
    torch.testing.assert_close(whole.values, single.values)
    assert targets.sum().item() == 8
    assert list(classes) == ["high", "low"]


def test_predictions_leave_out_what_cannot_be_read(folder):
    """A clip that stands in for another is not scored twice; what is left out is named with its reason."""
    (folder / "clip 2.wav").unlink()
    (folder / "clip 7.wav").write_text("text")
    with open(folder / "manifest.tsv", "a") as file:
        file.write("click.wav\t300\tlow\n")
    data = open_labelled(folder / "manifest.tsv", 96).data
    found = predict(lambda spec: spec.mean((1, 2, 3)), data, TINY, CPU, batch_size=3)
    assert found.items.tolist() == [0, 1, 3, 4, 5, 6]
    assert [problem.split("\t")[0] for problem in found.problems] == ["clip 2.wav", "clip 7.wav", "click.wav"]
    for item, value in zip(found.items.tolist(), found.values):
        clip = data.read(item)
        waveform = torch.zeros(1, clip_samples(96))
        waveform[0, : len(clip)] = clip
        expected = spectrogram(waveform, torch.tensor([len(clip)]), TINY.norm_mean, TINY.norm_std).mean()
        torch.testing.assert_close(value, expected)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_a_second_evaluation_leaves_the_first_table_alone(classifier, called):
    """Its table has a number behind its name, and each says where its table is; so with --out."""
    args = ("classifier.pt", "manifest.tsv", "--workers", 0)
    for name in ("per_class.csv", "per_class2.csv", "per_class3.csv"):
        assert last_line(called(evaluate, *args).stderr) == f"each class: {name}"
    first = (classifier / "per_class.csv").read_text()
    assert (classifier / "per_class2.csv").read_text() == first
    (classifier / "per_class.csv").write_text("mine")
    (classifier / "per_class2.csv").unlink()
    assert last_line(called(evaluate, *args).stderr) == "each class: per_class2.csv"
    assert (classifier / "per_class.csv").read_text() == "mine"
    for name in ("of classes.txt", "of classes2.txt"):
        result = called(evaluate, *args, "--out", "of classes.txt")
        assert last_line(result.stderr) == f"each class: {name}"
        assert (classifier / name).read_text() == first


def test_out_may_be_a_folder(classifier, called):
    (classifier / "tables").mkdir()
    args = ("classifier.pt", "manifest.tsv", "--workers", 0, "--out", "tables")
    for name in ("per_class.csv", "per_class2.csv"):
        assert last_line(called(evaluate, *args).stderr) == f"each class: tables/{name}"
        assert len(table_of(classifier / "tables" / name)) == 2


@pytest.mark.parametrize("out", ["manifest.tsv/table.csv", "nowhere/table.csv", 300 * "x" + ".csv"])
def test_a_table_that_cannot_be_written_there(classifier, called, out):
    """Scores are told, with exit status 0, and a line says that there is no table and how to have one."""
    result = called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0, "--out", out)
    assert result.returncode == 0
    assert json.loads(result.stdout)["clips"] == 8
    assert last_line(result.stderr).startswith("WARNING: no table of classes (")
    assert last_line(result.stderr).endswith("): --out names another place")
    assert result.stderr.count("WARNING: no table") == 1
    assert not list(classifier.glob("per_class*"))


def test_a_folder_of_checkpoints_that_cannot_be_written(classifier, called, monkeypatch):
    """As a read-only disk has it: scores, exit status 0, and --out goes elsewhere."""
    (classifier / "run").mkdir()
    (classifier / "classifier.pt").rename(classifier / "run" / "best.pt")

    def refuse(path, mode="r", *args, **kwargs):
        if "r" not in mode and "run" in str(path):
            raise OSError(30, "Read-only file system", str(path))
        return builtins.open(path, mode, *args, **kwargs)

    monkeypatch.setattr(tables, "open", refuse, raising=False)
    result = called(evaluate, "run", "manifest.tsv", "--workers", 0)
    assert json.loads(result.stdout)["clips"] == 8
    assert "WARNING: no table of classes" in result.stderr
    assert "Read-only file system" in result.stderr
    assert "run/per_class.csv" in result.stderr
    result = called(evaluate, "run", "manifest.tsv", "--workers", 0, "--out", "table.csv")
    assert last_line(result.stderr) == "each class: table.csv"
    assert [row["label"] for row in table_of(classifier / "table.csv")] == ["low", "high"]


def test_exclusive_classes_are_ranked_by_their_probabilities(classifier, called):
    """A clip's logits may all be higher than another's, and the probability of a class lower."""
    scored = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    model = AudioClassifier.from_pretrained(classifier / "classifier.pt")
    data, targets, _ = open_labelled(classifier / "manifest.tsv", 96, model.classes)
    logits = evaluate.predict(model, data, model.config, torch.device("cpu")).values
    precision = average_precision_score(targets.numpy(), logits.softmax(1).numpy(), average=None)
    assert scored["mAP"] == pytest.approx(precision.mean(), abs=1e-6)
    wrong = average_precision_score(targets.numpy(), logits.numpy(), average=None)
    assert abs(wrong.mean() - precision.mean()) > 0.01
    rows = table_of(classifier / "per_class.csv")
    assert [float(row["average_precision"]) for row in rows] == pytest.approx(list(precision), abs=1e-5)


def test_a_disk_that_is_full_leaves_no_part_of_a_table(classifier, monkeypatch, capsys):
    """A table is there in full or not at all."""

    class Full(io.TextIOWrapper):
        def write(self, text):
            super().write(text[:10])
            raise OSError(28, "No space left on device")

    def open_full(path, mode, **kwargs):
        return Full(builtins.open(path, mode + "b"))

    monkeypatch.setattr(tables, "open", open_full, raising=False)
    model = AudioClassifier.from_pretrained(classifier / "classifier.pt")
    write_table(str(classifier / "t.csv"), "", model, torch.tensor([1, 2]), torch.tensor([0.5, 0.25]))
    assert not (classifier / "t.csv").exists()
    assert "WARNING: no table of classes ([Errno 28] No space left" in capsys.readouterr().err


def test_the_table_of_classes_is_read_back(classifier):
    """Names with commas, quotes and other bytes; the counts and scores of each class."""
    classes = {"a": 'Male speech, "man" speaking', "b": "caf\udce9", "c": "two\nlines"}
    model = AudioClassifier(TINY, classes)
    write_table(str(classifier / "c.csv"), "", model, torch.tensor([1, 2, 0]), torch.tensor([0.5, 0.25, 0]))
    rows = table_of(classifier / "c.csv")
    assert [row["name"] for row in rows] == list(classes.values())
    assert [row["label"] for row in rows] == list(classes)
    assert [int(row["clips"]) for row in rows] == [1, 2, 0]
    assert [float(row["average_precision"]) for row in rows] == [0.5, 0.25, 0]


@pytest.fixture
def pretrained(folder):
    """A pre-training checkpoint in the folder of clips: student and teacher differ."""
    torch.manual_seed(0)
    student = EAT(TINY)
    teacher = Encoder(TINY)
    state = dict(student=student.state_dict(), teacher=teacher.state_dict(), network=asdict(TINY))
    save_checkpoint(folder / "pretrained.pt", step=1, **state)
    return folder


def test_probes_of_the_command_are_those_of_the_functions(pretrained, called, script):
    """Student or teacher, pooling and block as asked for; two processes find what one does."""

    def wanted(pooling: str, block: int, teacher: bool) -> dict[str, float]:
        one = Encoder.from_pretrained(pretrained / "pretrained.pt", teacher)
        train = open_labelled(pretrained / "manifest.tsv", 96)
        test = open_labelled(pretrained / "test.tsv", 96, train.classes)
        return probe(pooled(one, pooling, block), TINY, train, test, CPU)

    lines = (pretrained / "manifest.tsv").read_text().splitlines()
    (pretrained / "test.tsv").write_text("\n".join([lines[0], *lines[3:7]]) + "\n")
    files = ("pretrained.pt", "manifest.tsv", "test.tsv")
    found = {}
    for pooling, block, teacher in (("cls_mean", 2, False), ("bands", 1, True), ("bands", 0, False)):
        args = ["--pooling", pooling, "--block", block, "--workers", 0]
        if teacher:
            args.append("--teacher")
        found[pooling, block] = json.loads(called(evaluate, *files, *args).stdout)
        assert found[pooling, block] == dict(pooling=pooling) | wanted(pooling, block, teacher)
        assert found[pooling, block].keys() == {"pooling", "probe_linear"}
    assert json.loads(called(evaluate, *files, "--workers", 0).stdout) == found["bands", 0]
    two = json.loads(script("evaluate.py", *files, processes=2).stdout)
    assert two == pytest.approx(found["bands", 0])


def test_what_the_probe_sees_depends_on_what_is_asked_for(pretrained, called, monkeypatch):
    """--teacher, --pooling and --block reach the features: all are different."""
    seen = []

    def note(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x)
        return torch.zeros(y.shape[1], x.shape[1]), torch.zeros(y.shape[1])

    monkeypatch.setattr(evaluate, "fit_linear", note)
    files = ("pretrained.pt", "manifest.tsv", "manifest.tsv", "--workers", 0)
    mean = ["--pooling", "cls_mean"]
    for args in ([], ["--teacher"], ["--block", 2], mean, [*mean, "--block", 2]):
        called(evaluate, *files, *args)
    assert [x.shape[1] for x in seen] == [1024, 1024, 1024, 128, 128]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-3)


def test_classes_get_the_names_of_a_file(classifier):
    """By their labels, in whatever order; a checkpoint whose classes have no names takes the file's order."""
    path = str(classifier / "classifier.pt")
    names = str(classifier / "names.csv")
    (classifier / "names.csv").write_text("index,label,name\n0,high,Hoch\n1,low,Tief\n")
    assert load_classifier(path, names).classes == dict(low="Tief", high="Hoch")
    assert [*load_classifier(path, names).classes] == ["low", "high"]
    nameless = AudioClassifier(TINY, {"class 0": "class 0", "class 1": "class 1"})
    state = dict(network=asdict(TINY), head=nameless.head_settings, classifier=nameless.state_dict())
    save_checkpoint(classifier / "nameless.pt", **state)
    named = load_classifier(str(classifier / "nameless.pt"), names)
    assert named.classes == dict(high="Hoch", low="Tief")
    assert [*named.classes] == ["high", "low"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["classifier.pt", "unlabelled.tsv"], "has no label"),
        (["classifier.pt", "unknown.tsv"], "has an unknown label: 'mid'"),
        (["classifier.pt", "manifest.tsv", "--classes", "three.txt"], "three.txt does not list the 2 cl"),
        (["classifier.pt", "manifest.tsv", "--classes", "others.txt"], "others.txt does not list the 2 cl"),
        (["classifier.pt", "manifest.tsv", "manifest.tsv", "--block", "9"], "no block 9: the encoder has 2"),
        (["classifier.pt", "manifest.tsv", "manifest.tsv", "--teacher"], "classifier.pt has no teacher"),
        (["classifier.pt", "manifest.tsv", "unknown.tsv"], "has an unknown label: 'mid'"),
        (["classifier.pt", "manifest.tsv", "--teacher"], "are for probes: name two manifests"),
        (["classifier.pt", "manifest.tsv", "--block", "1"], "are for probes: name two manifests"),
        (["classifier.pt", "manifest.tsv", "--pooling", "cls_mean"], "are for probes: name two manifests"),
        (["classifier.pt", "manifest.tsv", "manifest.tsv", "--pooling", "max"], "invalid choice: 'max'"),
        (["classifier.pt", "manifest.tsv", "--worker", "0"], "unrecognized arguments: --worker"),
        (["classifier.pt"], "the following arguments are required: manifest"),
        (["missing.pt", "manifest.tsv"], "there is no file missing.pt"),
        (["classifier.pt", "nothing.tsv"], "cannot read the manifest nothing.tsv"),
        (["classifier.pt", "clip 0.wav"], "line "),
        (["classifier.pt", "empty"], "cannot read the manifest empty"),
    ],
)
def test_refusals_are_one_line(classifier, called, args, message):
    (classifier / "empty").mkdir()
    (classifier / "three.txt").write_text("a\nb\nc\n")
    (classifier / "others.txt").write_text("a\nb\n")
    (classifier / "unlabelled.tsv").write_text(f"{classifier}\nclip 0.wav\t8000\n")
    (classifier / "unknown.tsv").write_text(f"{classifier}\nclip 0.wav\t8000\tmid\n")
    result = called(evaluate, *args, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert not (classifier / "per_class.csv").exists()
    assert result.stderr.startswith("evaluate.py: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_script_itself_refuses_in_one_line(pretrained, script):
    result = script("evaluate.py", "pretrained.pt", "manifest.tsv", check=False)
    assert result.returncode == 1
    assert result.stderr == "evaluate.py: pretrained.pt has no classifier: it is another kind of checkpoint\n"


def test_a_network_that_diverged_is_told(classifier, called, monkeypatch):
    """Scores that are not finite are an error of one line, not a score."""
    monkeypatch.setattr(AudioClassifier, "forward", lambda _, x: torch.full((len(x), 2), math.nan))
    result = called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "outputs are not finite: its training has diverged" in result.stderr


def test_a_silent_clip_is_scored(classifier, called):
    """Silence counts: a network must say something of it too, as in the released code."""
    soundfile.write(classifier / "clip 5.wav", np.zeros(16_000), 16_000)
    result = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    assert result["clips"] == 8
    assert result["unreadable"] == 0


def test_a_clip_longer_than_the_networks_is_cut(classifier, called):
    """A clip of 4 s is scored by its first 0.96 s, once."""
    soundfile.write(classifier / "clip 0.wav", tone(64_000).numpy(), 16_000)
    text = (classifier / "manifest.tsv").read_text()
    (classifier / "long.tsv").write_text(text.replace("clip 0.wav\t8000", "clip 0.wav\t64000"))
    result = called(evaluate, "classifier.pt", "long.tsv", "--workers", 0)
    long = json.loads(result.stdout)
    assert "WARNING: 4 longer clips are scored by their beginning\n" in result.stderr
    soundfile.write(classifier / "clip 0.wav", tone(64_000)[: clip_samples(96)].numpy(), 16_000)
    cut = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    assert long["clips"] == cut["clips"] == 8
    assert long["AUC"] == cut["AUC"]
