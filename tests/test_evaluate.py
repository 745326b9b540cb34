"""Metrics against scikit-learn, predictions of several processes, pooled tokens, probes, and bad input."""

import csv
import json
import math
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate
from data import InputError, clip_samples, load_audio, open_labelled, spectrogram
from evaluate import (
    average_precision, knn_probe, linear_probe, load_classifier, mean_and_std, pooled,
    predict, probe, roc_auc, summarize_scores, tokens_after,
)  # fmt: skip
from model import EAT, MODELS, AudioClassifier, Encoder, save_checkpoint

CPU = torch.device("cpu")
TINY = replace(MODELS["tiny"], clip_frames=96)


# --- metrics ----------------------------------------------------------------------------------------------


def assert_equals_sklearn(scores: np.ndarray, targets: np.ndarray) -> None:
    ours = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    auc = roc_auc(torch.from_numpy(scores), torch.from_numpy(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's on classes without positives
        theirs = [average_precision_score(y, s) for y, s in zip(targets.T, scores.T)]
    assert np.abs(ours.numpy() - theirs).max() <= 1e-12
    for value, y, s in zip(auc, targets.T, scores.T):
        if 0 < y.sum() < len(y):
            assert abs(value.item() - roc_auc_score(y, s)) <= 1e-12
        else:
            assert value.isnan()


@pytest.mark.parametrize("n_tables", [150, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_and_auc_equal_scikit_learn(dtype, n_tables):
    """Random tables of scores that are often equal and of classes that are often empty or full."""
    rng = np.random.default_rng(0)
    for _ in range(n_tables):
        n, n_classes, levels = rng.integers(1, 40), rng.integers(1, 6), rng.choice([1, 2, 3, 10, 10**6])
        scores = (rng.integers(0, levels, (n, n_classes)) / levels).astype(dtype)
        targets = rng.random((n, n_classes)) < rng.choice([0.0, 0.05, 0.5, 0.95, 1.0])
        assert_equals_sklearn(scores, targets)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.booleans()), min_size=1, max_size=30))
def test_average_precision_of_any_finite_scores(pairs):
    scores, targets = np.array([[s] for s, _ in pairs]), np.array([[y] for _, y in pairs])
    with np.errstate(over="ignore"):
        assert_equals_sklearn(scores, targets)


def test_of_classes_without_positives_or_negatives():
    """0 and 1 as in scikit-learn, counted, and left out of the AUC."""
    targets = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0]])
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    assert average_precision(scores, targets).tolist() == [0, 1, 0.5]
    result, precision = summarize_scores(scores, targets)
    assert precision.tolist() == [0, 1, 0.5]
    assert result["mAP"] == 0.5 and result["AUC"] == 0.5 and result["d_prime"] == 0
    assert result["classes_without_positives"] == 1 and result["classes_without_negatives"] == 1
    assert "accuracy" not in result  # one clip has two classes
    with pytest.raises(ValueError, match="not finite"):
        average_precision(scores / 0, targets)
    with pytest.raises(ValueError, match="do not match"):
        average_precision(scores, targets[:2])


def accuracy(scores: torch.Tensor, targets: torch.Tensor) -> float:
    return summarize_scores(scores, targets)[0]["accuracy"]


def test_d_prime_and_accuracy():
    """An AUC of .9 is two normal distributions that are sqrt(2) * 1.28 apart."""
    scores, targets = torch.arange(11.0)[:, None], torch.zeros(11, 1)
    targets[9] = 1  # above 9 of the 10 others
    result = summarize_scores(scores, targets)[0]
    assert result["AUC"] == 0.9 and abs(result["d_prime"] - math.sqrt(2) * 1.2815515655446004) < 1e-12
    perfect = summarize_scores(torch.tensor([[0.9], [0.1]]), torch.tensor([[1], [0]]))[0]
    assert perfect["AUC"] == 1 and perfect["d_prime"] is None  # infinity is not JSON
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(scores, torch.tensor([[0, 1], [1, 0], [1, 0]])) == pytest.approx(2 / 3)


# --- tokens, pooled ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(replace(TINY, depth=3)).eval()


def padded_spectrogram(n_frames: list[int], clip_frames: int = 96) -> torch.Tensor:
    """Noise of so many frames each, padded to clips of `clip_frames`: (B, 1, clip_frames, M)."""
    n_samples = torch.tensor([clip_samples(n) for n in n_frames])
    waveform = torch.randn(len(n_frames), clip_samples(clip_frames)) / 10
    waveform[torch.arange(waveform.shape[1]) >= n_samples[:, None]] = 0
    return spectrogram(waveform, n_samples, TINY.norm_mean, TINY.norm_std)


def slow_tokens(encoder: Encoder, spec: torch.Tensor, n_blocks: int) -> torch.Tensor:
    tokens = encoder.embed(spec)
    for i in range(n_blocks):
        tokens = encoder.blocks[i](tokens)[0]
    return tokens


@torch.no_grad()
def test_tokens_after_a_block(encoder):
    """Counted from 1 on, the last is what the encoder returns; 0 is at 7/12 of them; others are refused."""
    spec = padded_spectrogram([96, 40])
    for block in (1, 2, 3):
        assert torch.equal(tokens_after(encoder, block)(spec), slow_tokens(encoder, spec, block))
    assert torch.equal(tokens_after(encoder, 3)(spec), encoder(spec))
    assert torch.equal(tokens_after(encoder)(spec), tokens_after(encoder, 1)(spec))
    for block in (-1, 4):
        with pytest.raises(InputError, match=f"no block {block}: the encoder has 3"):
            tokens_after(encoder, block)
        with pytest.raises(InputError, match=f"no block {block}: the encoder has 3"):
            pooled(encoder, "bands", block)
    with pytest.raises(ValueError, match="bands, cls_mean, not 'mean'"):
        pooled(encoder, "mean")


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 2])
def test_cls_and_mean_patch(encoder, block):
    """CLS token, then the mean of all patches, of the block that is asked for; by default of 7/12 of them."""
    spec = padded_spectrogram([96, 40])
    tokens = slow_tokens(encoder, spec, block or 1)
    expected = torch.stack([torch.cat([row[0], row[1:].mean(0)]) for row in tokens])
    torch.testing.assert_close(pooled(encoder, "cls_mean", block)(spec), expected)


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 2])
def test_bands_are_mean_and_std_of_each_band_over_the_sounding_patches(encoder, block):
    """Against a loop over bands, for clips that fill 6, 3, 2 and less than one of 6 patches: a patch counts
    if half of its frames are sound, the first always."""
    spec = padded_spectrogram([96, 40, 39, 3])
    found, tokens = pooled(encoder, "bands", block)(spec), slow_tokens(encoder, spec, block or 1)
    assert found.shape == (4, 2 * 8 * 64)
    for row, n_patches in enumerate((6, 3, 2, 1)):
        grid = tokens[row, 1:].view(6, 8, 64)  # time, band
        means, stds = [], []
        for band in range(8):
            sounding = torch.stack([grid[t, band] for t in range(n_patches)])
            means.append(sounding.mean(0))
            stds.append(sounding.std(0, correction=0))
        torch.testing.assert_close(found[row], torch.cat([*means, *stds]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bands_of_frames_that_fill_no_patch_and_of_silence(encoder):
    """Frames after the last whole patch are not looked at; of a silent clip the first patch counts."""
    spec = padded_spectrogram([40, 25])
    longer = torch.cat([spec, torch.randn(2, 1, 9, 128)], dim=2)
    torch.testing.assert_close(pooled(encoder, "bands")(longer), pooled(encoder, "bands")(spec))
    silent = spectrogram(torch.zeros(1, clip_samples(96)), torch.tensor([clip_samples(96)]), 0.0, 1.0)
    mean, std = pooled(encoder, "bands")(silent).chunk(2, dim=1)
    torch.testing.assert_close(mean, tokens_after(encoder)(silent)[:, 1:9].flatten(1))
    assert (std == 0).all()


def test_mean_and_std_where_the_weight_is():
    x, weight = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]])
    found = mean_and_std(x, weight)
    some = x[0, [0, 1, 3]]
    torch.testing.assert_close(found[0], torch.cat([some.mean(0), some.std(0, correction=0)]))
    torch.testing.assert_close(found[1], torch.cat([x[1, 4], torch.zeros(3)]))


# --- probes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [linear_probe, knn_probe])
def test_probes_find_what_is_there(fit):
    generator = torch.Generator().manual_seed(0)
    centers, label = 2 * torch.randn(3, 10, generator=generator), torch.arange(300) % 3
    x, y = centers[label] + torch.randn(300, 10, generator=generator), torch.nn.functional.one_hot(label, 3)
    assert accuracy(fit(x[:200], y[:200], x[200:]), y[200:]) > 0.9
    assert accuracy(fit(x[:200], y[:200].roll(67, 0), x[200:]), y[200:]) < 0.6  # labels of other clips
    x = x + 100.0  # what all clips share does not matter
    assert accuracy(fit(x[:200], y[:200], x[200:]), y[200:]) > 0.9


def test_a_probe_of_several_labels():
    """One logistic regression a class: each label is found though clips have several."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(300, 3, generator=generator) < 0.4
    x = y.float() @ torch.randn(3, 10, generator=generator)
    x = x + 0.3 * torch.randn(300, 10, generator=generator)
    for fit in (linear_probe, knn_probe):
        assert average_precision(fit(x[:200], y[:200], x[200:]), y[200:]).mean() > 0.9


def brightness(spec: torch.Tensor) -> torch.Tensor:
    """Mean of each of eight bands: enough to tell the tones of the test folder apart."""
    return spec[:, 0, :48].mean(1).unflatten(1, (8, 16)).mean(2)


def test_probe_fits_one_set_and_scores_the_other(folder, capsys):
    """Accuracy where every clip of both has one class, else mAP, or what is asked for; a clip that cannot be
    read is told and left out, one that is cut is told."""
    one = open_labelled(folder / "manifest.tsv", 160)
    assert probe(brightness, TINY, one, one, CPU) == dict(probe_linear=1.0, probe_knn=1.0)
    wrong = one._replace(targets=~one.targets)
    assert probe(brightness, TINY, one, wrong, CPU) == dict(probe_linear=0.0, probe_knn=0.0)
    several = one._replace(targets=one.targets | (torch.arange(8) == 0)[:, None])  # one clip has both
    found = predict(brightness, one.data, TINY, CPU).values
    scores = linear_probe(found, one.targets, found)
    expected = average_precision(scores, several.targets).mean().item()
    assert expected < 1
    assert probe(brightness, TINY, one, several, CPU)["probe_linear"] == pytest.approx(expected)
    expected = average_precision(scores, wrong.targets).mean().item()
    assert probe(brightness, TINY, one, wrong, CPU, metric="mAP")["probe_linear"] == pytest.approx(expected)
    assert capsys.readouterr().err == ""
    (folder / "clip 3.wav").write_text("damaged")
    assert probe(brightness, TINY, one, one, CPU)["probe_linear"] == 1.0
    assert "probes: 2 clips cannot be used, 0 are cut" in capsys.readouterr().err
    short = open_labelled(folder / "manifest.tsv", 96)
    probe(brightness, TINY, short, one, CPU)
    assert "probes: 2 clips cannot be used, 3 are cut" in capsys.readouterr().err
    with pytest.raises(InputError, match="features are not finite"):
        probe(lambda spec: brightness(spec) / 0, TINY, one, one, CPU)


# --- the command ------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_networks_outputs(classifier, called):
    """One line of JSON, equal to scikit-learn's scores of the network applied clip by clip."""
    one = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    model, outputs, config = AudioClassifier.from_pretrained(classifier / "classifier.pt"), [], TINY
    for i in range(8):
        waveform = load_audio(classifier / f"clip {i}.wav", 0, clip_samples(96))
        n_samples = torch.tensor([len(waveform)])
        waveform = torch.nn.functional.pad(waveform, (0, clip_samples(96) - len(waveform)))
        spec = spectrogram(waveform[None], n_samples, config.norm_mean, config.norm_std)
        with torch.no_grad():
            outputs.append(model(spec)[0])
    scores, is_low = torch.stack(outputs).numpy(), np.arange(8) < 4
    targets = np.stack([is_low, ~is_low], 1)
    assert one["mAP"] == pytest.approx(average_precision_score(targets, scores), abs=1e-9)
    assert one["AUC"] == pytest.approx(roc_auc_score(targets, scores), abs=1e-9)
    assert one["accuracy"] == (scores.argmax(1) == (np.arange(8) >= 4)).mean()
    assert one["clips"] == 8 and one["classes"] == 2 and one["unreadable"] == 0


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
    assert one["clips"] == 6 and one["unreadable"] == 2
    for result in results:
        assert "cannot be used: clip 3.wav unreadable" in result.stderr
        assert "cannot be used: click.wav shorter than a frame" in result.stderr
    assert one.keys() == two.keys() and all(one[key] == pytest.approx(two[key], abs=1e-6) for key in one)
    rows = list(csv.DictReader(open(classifier / "run" / "per_class.csv")))
    assert [(row["label"], row["name"], row["clips"]) for row in rows] == [
        ("low", "Low tone", "3"), ("high", "High tone", "3"),
    ]  # fmt: skip
    assert np.mean([float(row["average_precision"]) for row in rows]) == pytest.approx(one["mAP"], abs=1e-6)
    assert (classifier / "run" / "per_class.csv").read_text() == (classifier / "per_class.csv").read_text()


def test_predictions_are_in_order_and_the_batch_does_not_matter(folder):
    """Whatever the batch size and the loader; one item a clip, of all labelled clips."""
    data, targets, classes = open_labelled(folder / "manifest.tsv", 96)
    encoder = Encoder(TINY).eval()

    def cls(spec):
        return encoder(spec)[:, 0]

    whole = predict(cls, data, TINY, CPU, batch_size=3)
    single = predict(cls, data, TINY, CPU, batch_size=1, workers=1)
    assert whole.items.tolist() == list(range(8)) and not whole.problems
    torch.testing.assert_close(whole.values, single.values)
    assert targets.sum().item() == 8 and list(classes) == ["high", "low"]


def test_the_score_is_told_even_if_its_table_cannot_be_written(classifier, called):
    (classifier / "per_class.csv").mkdir()
    result = called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0, check=False)
    assert result.returncode == 1 and json.loads(result.stdout)["clips"] == 8
    assert "per_class.csv" in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture
def pretrained(folder):
    """A pre-training checkpoint in the folder of clips: student and teacher differ."""
    torch.manual_seed(0)
    student, teacher = EAT(TINY), Encoder(TINY)
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
        args = ["--pooling", pooling, "--block", block, *["--teacher"] * teacher, "--workers", 0]
        found[pooling, block] = json.loads(called(evaluate, *files, *args).stdout)
        assert found[pooling, block] == dict(pooling=pooling) | wanted(pooling, block, teacher)
        assert found[pooling, block].keys() == {"pooling", "probe_linear", "probe_knn"}
    assert json.loads(called(evaluate, *files, "--workers", 0).stdout) == found["bands", 0]
    two = json.loads(script("evaluate.py", *files, processes=2).stdout)
    assert two == pytest.approx(found["bands", 0])


def test_what_the_probe_sees_depends_on_what_is_asked_for(pretrained, called, monkeypatch):
    """--teacher, --pooling and --block reach the features: all are different."""
    seen = []
    zeros = torch.zeros(8, 2)
    monkeypatch.setattr(evaluate, "linear_probe", lambda x, y, x_test: seen.append(x) or zeros)
    files = ("pretrained.pt", "manifest.tsv", "manifest.tsv", "--workers", 0)
    mean = ["--pooling", "cls_mean"]
    for args in ([], ["--teacher"], ["--block", 2], mean, [*mean, "--block", 2]):
        called(evaluate, *files, *args)
    assert [x.shape[1] for x in seen] == [1024, 1024, 1024, 128, 128]
    for i, a in enumerate(seen):
        assert not any(a.shape == b.shape and torch.allclose(a, b, atol=1e-3) for b in seen[:i])


def test_classes_get_the_names_of_a_file(classifier):
    """By their labels, in whatever order; a checkpoint whose classes have no names takes the file's order."""
    path = str(classifier / "classifier.pt")
    (classifier / "names.csv").write_text("index,label,name\n0,high,Hoch\n1,low,Tief\n")
    assert load_classifier(path, str(classifier / "names.csv")).classes == dict(low="Tief", high="Hoch")
    assert [*load_classifier(path, str(classifier / "names.csv")).classes] == ["low", "high"]
    nameless = AudioClassifier(TINY, {"class 0": "class 0", "class 1": "class 1"})
    state = dict(network=asdict(TINY), head=nameless.head_settings, classifier=nameless.state_dict())
    save_checkpoint(classifier / "nameless.pt", **state)
    named = load_classifier(str(classifier / "nameless.pt"), str(classifier / "names.csv"))
    assert named.classes == dict(high="Hoch", low="Tief") and [*named.classes] == ["high", "low"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["classifier.pt", "unlabelled.tsv"], "has no label"),
        (["classifier.pt", "unknown.tsv"], "has the labels ['mid'], not all among the 2"),
        (["classifier.pt", "manifest.tsv", "--classes", "three.txt"], "three.txt does not list the 2 cl"),
        (["classifier.pt", "manifest.tsv", "--classes", "others.txt"], "others.txt does not list the 2 cl"),
        (["classifier.pt", "manifest.tsv", "manifest.tsv", "--block", "9"], "no block 9: the encoder has 2"),
        (["classifier.pt", "manifest.tsv", "manifest.tsv", "--teacher"], "classifier.pt has no teacher"),
        (["classifier.pt", "manifest.tsv", "unknown.tsv"], "has the labels ['mid'], not all among"),
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
    result = called(evaluate, *args, "--workers", 0, check=False)
    assert result.returncode == 1 and result.stdout == "" and not (classifier / "per_class.csv").exists()
    assert result.stderr.startswith("evaluate.py: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_script_itself_refuses_in_one_line(pretrained, script):
    result = script("evaluate.py", "pretrained.pt", "manifest.tsv", check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "pretrained.pt is not fine-tuned, it has no classes" in result.stderr


def test_a_network_that_diverged_is_told(classifier, called, monkeypatch):
    """Scores that are not finite are an error of one line, not a score."""
    monkeypatch.setattr(AudioClassifier, "forward", lambda _, x: torch.full((len(x), 2), math.nan))
    result = called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "scores are not finite: its training has diverged" in result.stderr


def test_a_silent_clip_is_scored(classifier, called):
    """Silence counts: a network must say something of it too, as in the released code."""
    soundfile.write(classifier / "clip 5.wav", np.zeros(16_000), 16_000)
    result = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    assert result["clips"] == 8 and result["unreadable"] == 0


def test_a_clip_longer_than_the_networks_is_cut(classifier, called):
    """A clip of 4 s is scored by its first 0.96 s, once."""
    soundfile.write(classifier / "clip 0.wav", tone(64_000).numpy(), 16_000)
    text = (classifier / "manifest.tsv").read_text()
    (classifier / "long.tsv").write_text(text.replace("clip 0.wav\t8000", "clip 0.wav\t64000"))
    result = called(evaluate, "classifier.pt", "long.tsv", "--workers", 0)
    long = json.loads(result.stdout)
    assert "per_class.csv; 4 clips are longer than the network's: scored by their beginning" in result.stderr
    soundfile.write(classifier / "clip 0.wav", tone(64_000)[: clip_samples(96)].numpy(), 16_000)
    cut = json.loads(called(evaluate, "classifier.pt", "manifest.tsv", "--workers", 0).stdout)
    assert long["clips"] == cut["clips"] == 8 and long["AUC"] == cut["AUC"]
