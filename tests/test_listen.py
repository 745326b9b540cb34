"""Tags and features of files: windows, hard files, and what is written."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

import listen
from data import FRAME_SHIFT, clip_samples, load_audio, spectrogram
from evaluate import pooled
from listen import clock, hear
from model import EAT, MODELS, AudioClassifier, Encoder, ModelConfig, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
CONFIG = ModelConfig(**vars(MODELS["tiny"]) | dict(clip_frames=96))
HOP, WIDTH, PATCH = 96 * FRAME_SHIFT, clip_samples(96), 16 * FRAME_SHIFT


def slow_spectrogram(waveform: torch.Tensor) -> torch.Tensor:
    """Of a window as long as the network's clip at most: (1, 1, 96, M)."""
    padded, length = torch.zeros(1, WIDTH), torch.tensor([len(waveform)])
    padded[0, : len(waveform)] = waveform
    return spectrogram(padded, length, CONFIG.norm_mean, CONFIG.norm_std)


# --- windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_samples", [400, HOP - 1, HOP, HOP + 100, HOP + PATCH - 1, HOP + PATCH, 2 * HOP, 10 * HOP + 7777]
)
def test_windows_lie_side_by_side(tmp_path, n_samples):
    """They begin one clip apart, the last ends with the sound, less than a patch of the file is lost; each is
    what the spectrogram of that stretch is, whatever the batch size."""
    sound = torch.cat([tone(8000, hz=100 * i) for i in range(1, 22)])[:n_samples]
    soundfile.write(tmp_path / "clip.wav", sound.numpy(), 16_000, subtype="FLOAT")
    windows, problem = hear(lambda spec: spec, tmp_path / "clip.wav", CONFIG, CPU, batch_size=3)
    assert not problem and len(windows) == 1 + max(0, n_samples - PATCH) // HOP
    end = 0
    for i, window in enumerate(windows):
        assert window.begin == i * HOP / 16_000
        end = min(i * HOP + WIDTH, n_samples)
        assert window.end == end / 16_000
        expected = slow_spectrogram(sound[i * HOP : end])[0]
        np.testing.assert_allclose(window.output, expected, atol=1e-4)
    assert n_samples - end < PATCH


def test_windows_of_another_rate_are_stretches_of_the_whole_file(tmp_path):
    """Stereo at 44.1 kHz: no seams where a window was resampled by itself."""
    soundfile.write(tmp_path / "clip.wav", tone(100_000, 44_100)[:, None].repeat(1, 2).numpy(), 44_100)
    whole = load_audio(tmp_path / "clip.wav")
    windows, _ = hear(lambda spec: spec, tmp_path / "clip.wav", CONFIG, CPU)
    assert len(windows) == 3
    for i, window in enumerate(windows):
        np.testing.assert_allclose(window.output, slow_spectrogram(whole[i * HOP :][:WIDTH])[0], atol=1e-3)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Twenty minutes: windows come a batch at a time."""
    with soundfile.SoundFile(tmp_path / "hours.wav", "w", 16_000, 1) as file:
        block = tone(16_000 * 60).numpy()
        for _ in range(20):
            file.write(block)
    seen = []

    def peak(spec: torch.Tensor) -> torch.Tensor:
        seen.append(len(spec))
        return spec.amax((1, 2, 3))[:, None]

    windows, problem = hear(peak, tmp_path / "hours.wav", ModelConfig(), CPU, batch_size=4)
    assert not problem and max(seen) == 4 and sum(seen) == len(windows) == math.ceil(20 * 60 / 10.24)
    assert not any(window.output is None for window in windows)


def test_clock():
    said = [clock(s) for s in (5, 65, 3605, 59.96, 0.04)]
    assert said == ["0:05.0", "1:05.0", "1:00:05.0", "1:00.0", "0:00.0"]


# --- tags -------------------------------------------------------------------------------------------------


def test_tags_of_files(classifier, called):
    """A line a file with the likeliest classes; --classes names them by their labels; a summary beside."""
    result = called(listen, "classifier.pt", "clip 0.wav", "clip 1.wav")
    out = result.stdout.splitlines()
    assert len(out) == 2 and result.stderr == "2 files, 0 not usable\n"
    name, best = out[0].split("  ", 1)
    found = {part[:-5]: float(part[-4:]) for part in best.split(", ")}
    assert name == "clip 0.wav" and list(found.values()) == sorted(found.values(), reverse=True)
    assert set(found) == {"Low tone", "High tone"} and sum(found.values()) == pytest.approx(1, abs=0.02)
    (classifier / "names.csv").write_text("index,label,name\n0,high,Hoch\n1,low,Tief\n")  # in another order
    out = called(listen, "classifier.pt", "clip 0.wav", "--classes", "names.csv").stdout
    assert out == f"clip 0.wav  {best}\n".replace("Low tone", "Tief").replace("High tone", "Hoch")
    record = json.loads(called(listen, "classifier.pt", "clip 0.wav", "--json", "--top_k", 1).stdout)
    assert list(record["top"]) == [max(found, key=found.get)]


def test_probabilities_are_those_of_the_network(classifier, called):
    """Of each window; of the file, the mean weighted by how much sound a window holds."""
    sound = torch.cat([tone(HOP), tone(6000, hz=2000)])
    soundfile.write(classifier / "long.wav", sound.numpy(), 16_000, subtype="FLOAT")
    state = load_checkpoint(classifier / "classifier.pt")
    model, parts = AudioClassifier.from_pretrained(classifier / "classifier.pt"), [sound[:WIDTH], sound[HOP:]]
    with torch.no_grad():
        margin = [model(slow_spectrogram(part))[0] @ torch.tensor([1.0, -1.0]) for part in parts]
    scale = 2 / (margin[0] - margin[1])  # a head that says .73 of the first window and .27 of the second
    state["classifier"]["head.weight"] *= scale
    state["classifier"]["head.bias"][0] = -scale * (margin[0] + margin[1]) / 2
    save_checkpoint(classifier / "sure.pt", **state)
    record = json.loads(called(listen, "sure.pt", "long.wav", "--json").stdout)
    p = [torch.tensor(1.0).sigmoid().item(), torch.tensor(-1.0).sigmoid().item()]
    for window, low in zip(record["windows"], p, strict=True):
        assert window["top"] == pytest.approx({"Low tone": low, "High tone": 1 - low}, abs=5e-3)
        assert list(window["top"])[0] == ("Low tone" if low > 0.5 else "High tone")  # the likeliest first
    mean = np.average(p, weights=[WIDTH, 6000])
    assert record["top"] == pytest.approx({"Low tone": mean, "High tone": 1 - mean}, abs=5e-3)
    assert record["seconds"] == round((HOP + 6000) / 16_000, 2)


def test_hard_files_are_named_and_the_others_go_on(classifier, script):
    """Files that are too short, silent, no audio, or not there cost themselves only."""
    hard = classifier / "hard"
    hard.mkdir()
    soundfile.write(hard / "a_20ms.wav", tone(320).numpy(), 16_000)
    soundfile.write(hard / "b_8_channels.wav", tone(48_000, 48_000)[:, None].repeat(1, 8).numpy(), 48_000)
    soundfile.write(hard / "c_silence.wav", np.zeros(16_000), 16_000)
    soundfile.write(hard / "d_nan.wav", np.full(16_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    (hard / "e_text.wav").write_text("not audio")
    soundfile.write(hard / "f_good.flac", tone(20_000, 44_100).numpy(), 44_100)
    lines = script("extras/listen.py", "classifier.pt", "hard", "missing.wav", "--json").stdout.splitlines()
    found = {Path(record["file"]).name: record for record in map(json.loads, lines)}
    assert len(found) == 7
    for name, reason in (
        ("a_20ms.wav", "too short"), ("c_silence.wav", "silent"), ("d_nan.wav", "samples reach nan"),
        ("e_text.wav", "unreadable: "), ("missing.wav", "no such file"),
    ):  # fmt: skip
        assert reason in found[name]["error"] and "top" not in found[name], name
    for name in ("b_8_channels.wav", "f_good.flac"):
        assert sum(found[name]["top"].values()) == pytest.approx(1, abs=1e-5)
        assert "error" not in found[name]


def test_if_no_file_can_be_used_the_exit_status_is_1(classifier, called):
    result = called(listen, "classifier.pt", "missing.wav", check=False)
    assert result.returncode == 1 and result.stdout == "missing.wav  not usable: no such file\n"
    assert "Traceback" not in result.stderr
    assert called(listen, "classifier.pt", "missing.wav", "clip 0.wav").returncode == 0


def test_a_long_file_has_a_timeline(classifier, called):
    """Window by window, silence among them."""
    sound = torch.cat([tone(40_000), torch.zeros(40_000), tone(20_000, hz=1000)])
    soundfile.write(classifier / "long.wav", sound.numpy(), 16_000)
    record = json.loads(called(listen, "classifier.pt", "long.wav", "--json").stdout)
    starts = [window["start"] for window in record["windows"]]
    assert starts == [i * 0.96 for i in range(7)]
    assert record["seconds"] == pytest.approx(100_000 / 16_000, abs=0.16)
    assert [w["start"] for w in record["windows"] if w["top"] is None] == [2.88, 3.84]
    text = called(listen, "classifier.pt", "long.wav", "--timeline").stdout.splitlines()
    first, *stretches = [line.split() for line in text]  # neighbours with the same class are one stretch
    assert first[0] == "long.wav" and stretches[0][0] == "0:00.0" and stretches[-1][2] == "0:06.2"
    assert ["0:02.9", "to", "0:04.8", "silence", "1.00"] in stretches
    assert all(a[2] == b[0] and a[3:-1] != b[3:-1] for a, b in zip(stretches, stretches[1:]))
    assert called(listen, "classifier.pt", "long.wav").stdout.count("\n") == 1


def test_a_file_that_breaks_off_is_heard_up_to_there(classifier, called):
    """What comes before the damage counts; the damage is told with its place."""
    sound = torch.cat([tone(40_000), torch.full((16_000,), torch.nan)])
    soundfile.write(classifier / "broken.wav", sound.numpy(), 16_000, subtype="FLOAT")
    record = json.loads(called(listen, "classifier.pt", "broken.wav", "--json").stdout)
    assert len(record["windows"]) == 2 and sum(record["top"].values()) == pytest.approx(1, abs=1e-5)
    assert "its samples reach nan" in record["error"] and record["error"].endswith("(after 0:01.9)")
    text = called(listen, "classifier.pt", "broken.wav").stdout
    assert "tone 0." in text and f"(heard in part: {record['error']})" in text


def test_an_mp3_that_holds_more_than_it_claims_is_told(classifier, called):
    """Three mp3 files in one, of which only the first can be decoded: heard, and the rest not passed over."""
    soundfile.write(classifier / "a.mp3", tone(32_000).numpy(), 16_000)
    (classifier / "three.mp3").write_bytes(3 * (classifier / "a.mp3").read_bytes())
    for name, has_error in (("a.mp3", False), ("three.mp3", True)):
        record = json.loads(called(listen, "classifier.pt", name, "--json").stdout)
        assert record["seconds"] == pytest.approx(2, abs=0.16) and len(record["top"]) == 2
        assert ("error" in record) == has_error and "claims 2.0 s" in record.get("error", "claims 2.0 s")


def test_classes_of_the_same_name_are_told_apart(classifier, called):
    """By their labels: none is lost."""
    (classifier / "names.csv").write_text("index,label,name\n0,low,Tone\n1,high,Tone\n")
    args = ["classifier.pt", "clip 0.wav", "--classes", "names.csv", "--json"]
    top = json.loads(called(listen, *args).stdout)["top"]
    assert {*top} == {"Tone (low)", "Tone (high)"} and sum(top.values()) == pytest.approx(1, abs=1e-5)


# --- features ---------------------------------------------------------------------------------------------


def test_features_are_the_encoders_tokens(classifier, called):
    """Tokens after the block that was asked for, without padding, by time."""
    called(listen, "classifier.pt", "clip 7.wav", "--features", "out.npz", "--block", "1")
    found = np.load(classifier / "out.npz")
    encoder = Encoder.from_pretrained(classifier / "classifier.pt")
    waveform = load_audio(classifier / "clip 7.wav")
    with torch.no_grad():
        first, last = (
            encoder.blocks[0](encoder.embed(slow_spectrogram(part)))[0][0]
            for part in (waveform[:WIDTH], waveform[HOP:])
        )
    # 19,200 samples: a window of 6 patches in time, and 22 frames in the second window, which is 1 patch
    assert found["cls"].shape == (2, 64) and found["patches"].shape == (7, 8, 64)
    np.testing.assert_allclose(found["cls"], torch.stack([first[0], last[0]]), atol=1e-5)
    np.testing.assert_allclose(found["cls_times"], [[0, WIDTH / 16_000], [0.96, 1.2]])
    np.testing.assert_allclose(found["patches"][:6], first[1:].view(6, 8, 64), atol=1e-5)
    np.testing.assert_allclose(found["patches"][6], last[1:9], atol=1e-5)
    np.testing.assert_allclose(found["frames"], found["patches"].mean(1), atol=1e-6)
    np.testing.assert_allclose(found["times"], 0.08 + 0.16 * np.arange(7), atol=1e-9)


def test_features_leave_silence_out(classifier, called):
    """A silent window has no tokens; the times of the others say where they are."""
    sound = torch.cat([tone(HOP), torch.zeros(2 * HOP), tone(HOP, hz=1000)])
    soundfile.write(classifier / "gap.wav", sound.numpy(), 16_000)
    called(listen, "classifier.pt", "gap.wav", "--features", "gap.npz")
    found = np.load(classifier / "gap.npz")
    assert found["patches"].shape == (17, 8, 64)  # of windows 0, 2 (where the last tone begins) and 3
    np.testing.assert_allclose(found["times"][:7], [*(0.08 + 0.16 * np.arange(6)), 1.92 + 0.08], atol=1e-9)


def test_features_of_a_teacher(folder, called):
    """--teacher: of a pre-training run, those of the moving average."""
    torch.manual_seed(0)
    student, teacher = EAT(CONFIG), Encoder(CONFIG).eval()
    state = dict(student=student.state_dict(), teacher=teacher.state_dict(), network=vars(CONFIG))
    save_checkpoint(folder / "pre.pt", **state)
    for name, encoder, args in (("student", student.encoder.eval(), []), ("teacher", teacher, ["--teacher"])):
        called(listen, "pre.pt", "clip 0.wav", "--features", f"{name}.npz", "--block", 2, *args)
        with torch.no_grad():
            cls = encoder(slow_spectrogram(load_audio(folder / "clip 0.wav")))[:, 0]
        np.testing.assert_allclose(np.load(folder / f"{name}.npz")["cls"], cls, atol=1e-5)


def test_features_of_a_folder(classifier, called):
    """A .npz for each file, in folders as the files are; what cannot be used is told, and nothing is
    overwritten."""
    (classifier / "sub").mkdir()
    soundfile.write(classifier / "sub" / "clip 0.wav", tone(16_000).numpy(), 16_000)
    (classifier / "clip 3.wav").write_text("damaged")
    result = called(listen, "classifier.pt", ".", "--features", "each")
    assert result.stdout == "each: features of 9 files, 1 not usable\n"
    assert "clip 3.wav cannot be used: unreadable" in result.stderr
    written = {path.relative_to(classifier / "each").as_posix() for path in classifier.glob("each/**/*.npz")}
    assert written == {f"clip {i}.wav.npz" for i in range(8) if i != 3} | {"sub/clip 0.wav.npz"}
    assert np.load(classifier / "each" / "sub" / "clip 0.wav.npz")["frames"].shape == (6, 64)
    (classifier / "empty").mkdir()
    called(listen, "classifier.pt", "sub/clip 0.wav", "--features", "empty/")  # as shells complete it
    assert (classifier / "empty" / "clip 0.wav.npz").exists()
    called(listen, "classifier.pt", "sub/clip 0.wav", "--features", "one.npz")
    one, same = np.load(classifier / "one.npz"), np.load(classifier / "each" / "sub" / "clip 0.wav.npz")
    assert {*one} == {"cls", "cls_times", "patches", "frames", "times"}
    np.testing.assert_array_equal(one["frames"], same["frames"])


def test_features_of_a_manifest_are_a_table(classifier, called):
    """A row for each clip that can be read, as the probes see it, with its labels, for scikit-learn."""
    (classifier / "clip 3.wav").write_text("damaged")
    args = ["classifier.pt", "manifest.tsv", "--features", "new/all.npz", "--workers", 0, "--block", 1]
    result = called(listen, *args, "--pooling", "bands")
    found = np.load(classifier / "new" / "all.npz")
    assert found["features"].shape == (7, 2 * 8 * 64) and found["features"].dtype == np.float32
    assert found["labels"].tolist() == ["low"] * 3 + ["high"] * 4
    assert found["files"].tolist() == [f"clip {i}.wav" for i in range(8) if i != 3]
    assert "clip 3.wav unreadable" in result.stderr and "1 clips cannot be used" in result.stdout
    assert "clips are longer than 96 frames" in result.stdout
    encoder = Encoder.from_pretrained(classifier / "classifier.pt")
    spec = slow_spectrogram(load_audio(classifier / "clip 0.wav"))
    with torch.no_grad():
        row = pooled(encoder, "bands", 1)(spec)[0]
    np.testing.assert_allclose(found["features"][0], row, atol=1e-4)


def test_a_closed_pipe_is_no_error(classifier):
    """As of `| head -1`: no traceback, no message."""
    command = [sys.executable, ROOT / "extras" / "listen.py", "classifier.pt", *["clip 0.wav"] * 40]
    run = dict(cwd=classifier, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **run) as job:
        assert job.stdout.readline().startswith("clip 0.wav  ")
        job.stdout.close()
        assert job.stderr.read() == ""


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["classifier.pt", "clip 0.wav", "--features", "x.npz", "--block", "9"], "no block 9: the encoder"),
        (["classifier.pt", "clip 0.wav", "--features", "x.npz", "--teacher"], "classifier.pt has no teacher"),
        (["classifier.pt", "clip 0.wav", "--features", "sub"], "sub exists: remove it or choose another"),
        (["classifier.pt", "clip 0.wav", "--features", "x.csv"], "x.csv: features are written as .npz"),
        (["classifier.pt", "manifest.tsv", "--features", "x"], "the features of a manifest, one at a time"),
        (["classifier.pt", ".", "--features", "x.npz"], "x.npz is for one file: name a folder"),
        (["classifier.pt", "clip 0.wav", "sub", "--features", "x"], "clip 0.wav is there twice"),
        (["classifier.pt", "clip 0.wav", "--top_k", "0"], "above 0"),
        (["classifier.pt", "clip 0.wav", "--classes", "three.txt"], "does not list the 2 classes of cl"),
        (["missing.pt", "clip 0.wav"], "there is no file missing.pt"),
        (["classifier.pt", "empty"], "no audio files below empty"),
    ],
)
def test_refusals_are_one_line(classifier, called, args, message):
    (classifier / "empty").mkdir()
    (classifier / "three.txt").write_text("a\nb\nc\n")
    (classifier / "sub").mkdir()
    soundfile.write(classifier / "sub" / "clip 0.wav", tone(8000).numpy(), 16_000)
    result = called(listen, *args, check=False)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("listen.py: ") and message in result.stderr
    assert not (classifier / "x.npz").exists() and not (classifier / "x").exists()


def test_several_processes_are_refused(classifier, called, monkeypatch):
    """torchrun would make each of them do everything."""
    monkeypatch.setattr(listen, "init_distributed", lambda: (0, 2, CPU))
    result = called(listen, "classifier.pt", "clip 0.wav", check=False)
    assert result.returncode == 1 and "this needs one process, without torchrun" in result.stderr
