"""Metrics against scikit-learn, predictions of several processes, probes, and the commands on hard input."""

import csv
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate
from data import FRAME_SHIFT, InputError, clip_samples, spectrogram
from evaluate import (
    accuracy,
    average_precision,
    clock,
    cls_attention,
    d_prime,
    knn_probe,
    linear_probe,
    listen,
    pooled_layers,
    roc_auc,
    summarize_scores,
    window_starts,
)
from model import MODELS, AudioClassifier, AudioInput, Encoder
from pretrain import save_checkpoint

DEVICE = torch.device("cpu")


# --- metrics ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_and_auc_equal_scikit_learn(dtype):
    """2,000 random tables of scores that are often equal and of classes that are often empty or full."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        n, n_classes, levels = rng.integers(1, 40), rng.integers(1, 6), rng.choice([1, 2, 3, 10, 10**6])
        scores = (rng.integers(0, levels, (n, n_classes)) / levels).astype(dtype)
        targets = rng.random((n, n_classes)) < rng.choice([0.0, 0.05, 0.5, 0.95, 1.0])
        assert_equals_sklearn(scores, targets)


@settings(max_examples=300, deadline=None)
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
    with pytest.raises(ValueError, match="must be"):
        average_precision(scores, targets[:2])


def test_d_prime_and_accuracy():
    assert d_prime(0.5) == 0 and abs(d_prime(0.9) - math.sqrt(2) * 1.2815515655446004) < 1e-12
    assert d_prime(1.0) == math.inf
    perfect = summarize_scores(torch.tensor([[0.9], [0.1]]), torch.tensor([[1], [0]]))[0]
    assert perfect["AUC"] == 1 and perfect["d_prime"] is None  # infinity is not JSON
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(scores, torch.tensor([[0, 1], [1, 0], [1, 0]])) == pytest.approx(2 / 3)


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [linear_probe, knn_probe])
def test_probes_find_what_is_there(fit):
    generator = torch.Generator().manual_seed(0)
    centers, label = 2 * torch.randn(3, 1, 10, generator=generator), torch.arange(300) % 3
    x, y = centers[label] + torch.randn(300, 1, 10, generator=generator), torch.nn.functional.one_hot(label, 3)
    assert accuracy(fit(x[:200], y[:200], x[200:]), y[200:]) > 0.9
    assert accuracy(fit(x[:200], y[:200].roll(67, 0), x[200:]), y[200:]) < 0.6  # labels of other clips
    x = x + 100.0  # what all clips share does not matter
    assert accuracy(fit(x[:200], y[:200], x[200:]), y[200:]) > 0.9


def test_the_baseline_of_the_probes_is_the_sound_without_its_padding():
    waveform = torch.randn(2, clip_samples(64)) / 10
    n_samples = torch.tensor([clip_samples(64), clip_samples(40)])
    waveform[1, n_samples[1] :] = 0
    pooled = pooled_layers(None, "input")(spectrogram(waveform, n_samples, -4.268, 4.569))
    for i, n_frames in enumerate((64, 40)):
        alone = spectrogram(waveform[i : i + 1, : n_samples[i]], n_samples[i : i + 1], -4.268, 4.569)[0, 0]
        assert len(alone) == n_frames
        expected = torch.cat([alone.mean(0), alone.std(0, correction=0)])
        assert torch.allclose(pooled[i, 0], expected, atol=1e-4)


def test_the_linear_probe_learns_which_layer_matters():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 4
    y, noise = torch.nn.functional.one_hot(label, 4), torch.randn(300, 8, 12, generator=generator)
    noise[:, 5, :4] += 3 * y  # one of eight layers knows
    mixed = accuracy(linear_probe(noise[:200], y[:200], noise[200:]), y[200:])
    mean = noise.mean(1, keepdim=True)
    assert mixed > 0.9 and mixed > accuracy(linear_probe(mean[:200], y[:200], mean[200:]), y[200:]) + 0.05


def test_a_probe_of_several_labels():
    """One logistic regression a class: each label is found though clips have several."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(300, 3, generator=generator) < 0.4
    x = (y.float() @ torch.randn(3, 10, generator=generator))[:, None]
    x = x + 0.3 * torch.randn(300, 1, 10, generator=generator)
    for fit in (linear_probe, knn_probe):
        assert average_precision(fit(x[:200], y[:200], x[200:]), y[200:]).mean() > 0.9


# --- checkpoints and files for the commands --------------------------------------------------------------------------


@pytest.fixture
def classifier(folder) -> Path:
    """classifier.pt in the folder of clips: untrained, of two exclusive classes."""
    torch.manual_seed(0)
    audio = AudioInput(clip_frames=96)
    model = AudioClassifier(MODELS["tiny"], {"low": "Low tone", "high": "High tone"}, exclusive=True, audio=audio)
    torch.nn.init.normal_(model.head.weight)
    network = {k: getattr(MODELS["tiny"], k) for k in MODELS["tiny"].__dataclass_fields__}
    config = dict(clip_frames=96, norm_mean=audio.norm_mean, norm_std=audio.norm_std, pooling="cls", loss="ce")
    save_checkpoint(
        folder / "classifier.pt", step=1, config=config, network=network, classes=model.classes, norm_eps=1e-6,
        classifier=model.state_dict(),
    )  # fmt: skip
    return folder


def test_two_processes_predict_what_one_does(classifier, script):
    """7 clips, of which one cannot be read: each clip once, in order."""
    lines = (classifier / "manifest.tsv").read_text().splitlines()[:-1]
    (classifier / "clip 3.wav").write_bytes(b"RIFF nonsense")
    (classifier / "seven.tsv").write_text("\n".join(lines) + "\n")
    results = [
        script("evaluate.py", "classifier.pt", "seven.tsv", "--json", "--csv", f"{n}.csv", processes=n) for n in (1, 2)
    ]
    one, two = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    assert one["clips"] == 6 and one["unreadable"] == 1 and "clip 3.wav cannot be used" in results[1].stderr
    assert one.keys() == two.keys() and all(one[key] == pytest.approx(two[key], abs=1e-6) for key in one)
    rows = list(csv.DictReader(open(classifier / "1.csv")))
    assert [(row["label"], row["name"], row["clips"]) for row in rows] == [
        ("low", "Low tone", "3"), ("high", "High tone", "3"),
    ]  # fmt: skip
    assert (classifier / "1.csv").read_text() == (classifier / "2.csv").read_text()


def test_predictions_are_in_order_for_any_share(folder):
    """Three processes' shares, one after the other, are the whole; the padding of a batch changes nothing."""
    dataset, targets, classes = evaluate.open_labelled(str(folder / "manifest.tsv"), AudioInput(clip_frames=96))
    encoder = Encoder(MODELS["tiny"]).eval()

    def cls(spec):
        return encoder(spec)[:, 0]

    whole = evaluate.predict(cls, dataset, AudioInput(), DEVICE, batch_size=3)
    single = evaluate.predict(cls, dataset, AudioInput(), DEVICE, batch_size=1, workers=1)
    assert whole.items.tolist() == list(range(8)) and not whole.problems
    torch.testing.assert_close(whole.values, single.values)
    assert targets.sum().item() == 8 and list(classes) == ["high", "low"]


def test_tags_of_files(classifier, script):
    out = script("evaluate.py", "classifier.pt", "clip 0.wav", "--top_k", 2).stdout.splitlines()
    assert out[0].startswith("clip 0.wav") and "0.5 s" in out[0]
    probabilities = {line.split(maxsplit=1)[1]: float(line.split()[0]) for line in out[1:3]}
    assert set(probabilities) == {"Low tone", "High tone"} and sum(probabilities.values()) == pytest.approx(1, abs=2e-3)
    (classifier / "names.csv").write_text("index,label,name\n0,high,Hoch\n1,low,Tief\n")  # in another order
    out = script("evaluate.py", "classifier.pt", "clip 0.wav", "--classes", "names.csv").stdout
    assert {line.split()[1]: line.split()[0] for line in out.splitlines()[1:]} == {
        name.replace("Low tone", "Tief").replace("High tone", "Hoch"): f"{p:.3f}" for name, p in probabilities.items()
    }


def test_hard_files_are_named_and_the_others_go_on(classifier, script):
    hard = classifier / "hard"
    hard.mkdir()
    soundfile.write(hard / "a_20ms.wav", tone(320).numpy(), 16_000)
    soundfile.write(hard / "b_8_channels.wav", tone(48_000, 48_000)[:, None].repeat(1, 8).numpy(), 48_000)
    soundfile.write(hard / "c_silence.wav", np.zeros(16_000), 16_000)
    soundfile.write(hard / "d_nan.wav", np.full(16_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    (hard / "e_text.wav").write_text("not audio")
    soundfile.write(hard / "f_good.flac", tone(20_000, 44_100).numpy(), 44_100)
    lines = script("evaluate.py", "classifier.pt", "hard", "missing.wav", "--json").stdout.splitlines()
    found = {Path(record["file"]).name: record for record in map(json.loads, lines)}
    assert len(found) == 7
    for name, reason in (
        ("a_20ms.wav", "shorter than one frame"), ("c_silence.wav", "silent"), ("d_nan.wav", "not audio"),
        ("e_text.wav", "rror"), ("missing.wav", "no such file"),
    ):  # fmt: skip
        assert reason in found[name]["error"] and "top" not in found[name], name
    for name in ("b_8_channels.wav", "f_good.flac"):
        assert sum(found[name]["top"].values()) == pytest.approx(1, abs=1e-5)
    result = script("evaluate.py", "classifier.pt", "missing.wav", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr


def test_a_long_file_has_a_timeline(classifier, script):
    sound = torch.cat([tone(40_000), torch.zeros(40_000), tone(20_000, hz=1000)])
    soundfile.write(classifier / "long.wav", sound.numpy(), 16_000)
    record = json.loads(script("evaluate.py", "classifier.pt", "long.wav", "--json").stdout)
    starts = [window["start"] for window in record["windows"]]
    assert starts == [start / 16_000 for start in window_starts(100_000, 96)]
    assert record["seconds"] == pytest.approx(100_000 / 16_000, abs=0.16)
    silent = [w["start"] for w in record["windows"] if w["top"] is None]
    assert silent and all(2.5 <= start < 5 for start in silent)
    text = script("evaluate.py", "classifier.pt", "long.wav").stdout
    assert "0:02.8  silence" in text and "0:00.0  " in text


def test_windows():
    width = 96 * FRAME_SHIFT
    for n_samples in (400, width - 1, width, width + 100, width + 5000, 2 * width, 10 * width + 7777):
        starts = window_starts(n_samples, 96)
        assert starts[0] == 0 and all(0 < b - a <= width for a, b in zip(starts, starts[1:]))
        assert all(start % 2560 == 0 for start in starts)
        assert n_samples - (starts[-1] + width) <= 2560  # less than a patch is lost
        assert len(starts) == 1 or starts[-1] + width <= n_samples
    assert [clock(16_000 * s) for s in (5, 65, 3605)] == ["0:05.0", "1:05.0", "1:00:05.0"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Twenty minutes: windows come one at a time."""
    with soundfile.SoundFile(tmp_path / "hours.wav", "w", 16_000, 1) as file:
        block = tone(16_000 * 60).numpy()
        for _ in range(20):
            file.write(block)
    seen = []

    def peak(spec: torch.Tensor) -> torch.Tensor:
        seen.append(len(spec))
        return spec.amax((1, 2, 3))[:, None]

    (heard,) = listen(peak, [tmp_path / "hours.wav"], AudioInput(), DEVICE, batch_size=4)
    assert max(seen) <= 4 and len(heard.outputs) == math.ceil(20 * 60 / 10.24) and None not in heard.outputs


# --- features --------------------------------------------------------------------------------------------------------


def test_features_are_the_encoders_tokens(classifier, script):
    script("evaluate.py", "classifier.pt", "clip 7.wav", "--features", "out.npz", "--layer", "1")
    found = np.load(classifier / "out.npz")
    encoder = Encoder.from_pretrained(classifier / "classifier.pt")
    spec, _ = evaluate.read_clip(str(classifier / "clip 7.wav"), encoder.audio)
    with torch.no_grad():
        tokens = encoder.layers(spec)[0][0]
    frames = 7  # 19,200 samples: 118 frames of which a window has 96, then the last window ends 1 patch later
    assert found["cls"].shape == (2, 64) and found["patches"].shape == (frames, 8, 64)
    np.testing.assert_allclose(found["cls"][0], tokens[0], atol=1e-5)
    np.testing.assert_allclose(found["patches"][:6], tokens[1:].view(6, 8, 64), atol=1e-5)
    np.testing.assert_allclose(found["frames"], found["patches"].mean(1), atol=1e-6)
    np.testing.assert_allclose(found["times"], 0.08 + 0.16 * np.arange(frames), atol=1e-9)


def test_features_of_a_folder(classifier, script):
    (classifier / "sub").mkdir()
    soundfile.write(classifier / "sub" / "clip 0.wav", tone(16_000).numpy(), 16_000)
    out = script("evaluate.py", "classifier.pt", ".", "--features", "all.npz").stdout
    assert "features of 9 files" in out
    found = np.load(classifier / "all.npz")
    assert "clip 0.wav/cls" in found and found["sub/clip 0.wav/frames"].shape == (6, 64)
    script("evaluate.py", "classifier.pt", ".", "--features", "each")
    one = np.load(classifier / "each" / "sub" / "clip 0.wav.npz")
    np.testing.assert_array_equal(one["frames"], found["sub/clip 0.wav/frames"])
    twice = script("evaluate.py", "classifier.pt", "clip 0.wav", "sub", "--features", "x.npz", check=False)
    assert twice.returncode == 1 and "clip 0.wav is there twice" in twice.stderr and not (classifier / "x.npz").exists()
    again = script("evaluate.py", "classifier.pt", ".", "--features", "each", check=False)
    assert again.returncode == 1 and again.stderr == "evaluate.py: each exists: remove it or choose another name\n"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["classifier.pt", "unlabelled.tsv"], "has no label"),
        (["classifier.pt", "unknown.tsv"], "has the label 'mid', which is not one of the 2 classes"),
        (["classifier.pt", "manifest.tsv", "--classes", "three.txt"], "lists 3 classes, the checkpoint has 2"),
        (["classifier.pt", "manifest.tsv", "--classes", "others.txt"], "does not list 'low', a class of"),
        (["classifier.pt", "clip 0.wav", "--features", "x.npz", "--layer", "9"], "choose last, mean or 1 to 2"),
        (["classifier.pt", "clip 0.wav", "--top_k", "0"], "above 0"),
        (["missing.pt", "manifest.tsv"], "No such file"),
        (["classifier.pt", "nothing"], ""),
        (["classifier.pt", "empty"], "no audio files below empty"),
        (["plot", "nothing"], "no such file or run: nothing"),
        (["plot", "empty"], "cannot read empty/log.jsonl"),
        (["plot", "hollow"], "cannot read hollow/log.jsonl"),
        (["plot", "three.txt", "-o", "three.txt"], "cannot draw into three.txt"),
        (["plot", "short.csv"], "is not a table of classes"),
        (["classifier.pt", "manifest.tsv", "--csv", "manifest.tsv"], "manifest.tsv exists and is no table of classes"),
        (["classifier.pt", "manifest.tsv", "--csv", "nowhere/x.csv"], "there is no folder nowhere"),
        (["classifier.pt", "clip 0.wav", "--features", "nowhere/x.npz"], "there is no folder nowhere"),
    ],
)
def test_refusals_are_one_line(classifier, script, args, message):
    (classifier / "empty").mkdir()
    (classifier / "three.txt").write_text("a\nb\nc\n")
    (classifier / "hollow").mkdir()
    (classifier / "hollow" / "log.jsonl").write_text('{"loss": 1}\n')
    (classifier / "short.csv").write_text("label,name,clips,average_precision\na,A\n")
    listed = (classifier / "manifest.tsv").read_text()
    (classifier / "others.txt").write_text("a\nb\n")
    (classifier / "unlabelled.tsv").write_text(f"{classifier}\nclip 0.wav\t8000\n")
    (classifier / "unknown.tsv").write_text(f"{classifier}\nclip 0.wav\t8000\tmid\n")
    result = script("evaluate.py", *args, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (classifier / "manifest.tsv").read_text() == listed
    if message:
        assert message in result.stderr and result.stderr.count("\n") == 1


# --- pictures --------------------------------------------------------------------------------------------------------


def test_attention_of_cls_is_what_the_last_block_computes():
    encoder, spec = Encoder(MODELS["tiny"]).eval(), torch.randn(1, 1, 96, 128)
    weight = cls_attention(encoder, spec)
    captured = []
    hook = encoder.blocks[-1].attn.register_forward_hook(lambda module, inputs, _: captured.append(inputs[0]))
    encoder(spec)
    hook.remove()
    q, k, _ = encoder.blocks[-1].attn.qkv(captured[0]).view(1, 49, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / math.sqrt(32)).softmax(-1)[0, :, 0, 1:].mean(0)
    assert weight.shape == (6, 8)
    torch.testing.assert_close(weight.flatten(), expected)


@pytest.mark.parametrize(
    "args",
    [
        ["run", "run"],
        ["per_class.csv"],
        ["clip 7.wav"],
        ["clip 7.wav", "--checkpoint", "classifier.pt"],
        ["clip 7.wav", "--checkpoint", "classifier.pt", "--attention"],
    ],
)
def test_pictures(classifier, script, args):
    pytest.importorskip("matplotlib")
    (classifier / "run").mkdir()
    records = [dict(step=i, loss=5.0 / i, lr=1e-3, target_std=0.9, accuracy=0.1 * i) for i in range(1, 4)]
    (classifier / "run" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (classifier / "per_class.csv").write_text("label,name,clips,average_precision\na,A bird,3,0.5\nb,Bell,2,1.0\n")
    assert script("evaluate.py", "plot", *args, "-o", "out.png").stdout == "out.png\n"
    assert (classifier / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib_the_message_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        evaluate.pyplot()


def test_clip_is_cut_to_the_classifiers_length():
    path = ROOT / "assets" / "demo" / "prompts" / "000.opus"
    spec, seconds = evaluate.read_clip(str(path), AudioInput(clip_frames=64))
    assert spec.shape[2] == 64 and seconds == pytest.approx(0.64) and clip_samples(64) == 10_480
