"""Tags, detections and features of files: windows, damage, hard files, what is written, and what goes on."""

import csv
import errno
import io
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, Script, tone

from data import FRAME_SHIFT, clip_samples, load_audio, spectrogram
from evaluate import pooled, save_checkpoint
from extras import features, listen
from extras.listen import Window, clock, hear
from model import EAT, MODELS, AudioClassifier, Encoder, ModelConfig, load_checkpoint

CPU = torch.device("cpu")
CONFIG = ModelConfig(**vars(MODELS["tiny"]) | dict(clip_frames=96))
HOP = 96 * FRAME_SHIFT
WIDTH = clip_samples(96)
PATCH = 16 * FRAME_SHIFT


def slow_spectrogram(waveform: torch.Tensor) -> torch.Tensor:
    """Of a window as long as the network's clip at most: (1, 1, 96, M)."""
    padded = torch.zeros(1, WIDTH)
    padded[0, : len(waveform)] = waveform
    return spectrogram(padded, torch.tensor([len(waveform)]), CONFIG.norm_mean, CONFIG.norm_std)


def same(spec: torch.Tensor) -> torch.Tensor:
    return spec


def noise(n_samples: int) -> np.ndarray:
    """Noise does not compress: damage in the middle of the file is in the middle of the sound."""
    return 0.1 * np.random.default_rng(0).standard_normal(n_samples).astype(np.float32)


def damage(path: Path, at: float, n_bytes: int) -> None:
    """Put zeros in place of some bytes, from the given part of the file on."""
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    data[place : place + n_bytes] = bytes(n_bytes)
    path.write_bytes(data)


def table(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


# --- windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_samples", [400, HOP - 1, HOP, HOP + 100, HOP + PATCH - 1, HOP + PATCH, 2 * HOP, 10 * HOP + 7777]
)
@pytest.mark.parametrize("full", [False, True])
def test_windows_lie_side_by_side(tmp_path, n_samples, full):
    """They begin one clip apart, the last ends with the sound, less than a patch of the file is lost; each is
    what the spectrogram of that stretch is, whatever the batch size. The last may have to be as long as they.
    """
    sound = torch.cat([tone(8000, hz=100 * i) for i in range(1, 22)])[:n_samples]
    soundfile.write(tmp_path / "clip.wav", sound.numpy(), 16_000, subtype="FLOAT")
    windows = list(hear(same, tmp_path / "clip.wav", CONFIG, CPU, batch_size=3, full=full))
    assert len(windows) == 1 + max(0, n_samples - PATCH) // HOP
    end = 0
    for i, window in enumerate(windows):
        assert window.problem == ""
        end = min(i * HOP + WIDTH, n_samples)
        begin = i * HOP
        if full:
            begin = max(0, min(begin, end - WIDTH))
        assert window.begin == begin / 16_000
        assert window.end == end / 16_000
        expected = slow_spectrogram(sound[begin:end])[0]
        np.testing.assert_allclose(window.output, expected, atol=1e-4)
    assert n_samples - end < PATCH


@pytest.mark.parametrize("hop", [0.05, 0.1, 0.5, 0.96])
@pytest.mark.parametrize("n_samples", [900, WIDTH, WIDTH + 100, 2 * HOP + 5000])
@pytest.mark.parametrize("full", [False, True])
def test_windows_may_overlap(tmp_path, hop, n_samples, full):
    """One every hop; the last is the first that reaches the end, of which nothing is lost unless they overlap
    by less than a patch."""
    sound = torch.cat([tone(8000, hz=100 * i) for i in range(1, 6)])[:n_samples]
    soundfile.write(tmp_path / "clip.wav", sound.numpy(), 16_000, subtype="FLOAT")
    windows = list(hear(same, tmp_path / "clip.wav", CONFIG, CPU, hop, full=full))
    for i, window in enumerate(windows):
        begin = round(i * hop * 16_000)
        end = min(begin + WIDTH, n_samples)
        if full:
            begin = max(0, min(begin, end - WIDTH))
        assert window.begin == begin / 16_000
        assert window.end == end / 16_000
        expected = slow_spectrogram(sound[begin:end])[0]
        np.testing.assert_allclose(window.output, expected, atol=1e-4)
    ends = [round(window.end * 16_000) for window in windows]
    assert ends == sorted(set(ends))
    if hop < 0.8:
        assert ends[-1] == n_samples
    assert n_samples - ends[-1] < PATCH


def test_windows_of_another_rate_are_stretches_of_the_whole_file(tmp_path):
    """Stereo at 44.1 kHz: no seams where a window was resampled by itself."""
    soundfile.write(tmp_path / "clip.wav", tone(100_000, 44_100)[:, None].repeat(1, 2).numpy(), 44_100)
    whole = load_audio(tmp_path / "clip.wav")
    windows = list(hear(same, tmp_path / "clip.wav", CONFIG, CPU))
    assert len(windows) == 3
    for i, window in enumerate(windows):
        expected = slow_spectrogram(whole[i * HOP :][:WIDTH])[0]
        np.testing.assert_allclose(window.output, expected, atol=1e-3)


def test_windows_of_an_mp3_are_stretches_of_the_whole_file(tmp_path):
    """At few bits a second, where a frame takes bits from those before it."""
    form = dict(format="MP3", bitrate_mode="CONSTANT", compression_level=0.9)
    with soundfile.SoundFile(tmp_path / "clip.mp3", "w", 24_000, 1, **form) as file:
        file.write(noise(24_000 * 6))
    whole = load_audio(tmp_path / "clip.mp3")
    windows = [window for window in hear(same, tmp_path / "clip.mp3", CONFIG, CPU) if window.problem == ""]
    assert len(windows) == 7
    for i, window in enumerate(windows):
        expected = slow_spectrogram(whole[i * HOP :][:WIDTH])[0]
        np.testing.assert_allclose(window.output, expected, atol=1e-2)


def test_windows_of_an_m4a_are_stretches_of_the_whole_file(tmp_path):
    av = pytest.importorskip("av")
    sound = (0.3 * np.sin(np.arange(80_000) * 0.2)).astype(np.float32)
    with av.open(str(tmp_path / "clip.m4a"), "w") as container:
        track = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    whole = load_audio(tmp_path / "clip.m4a")
    windows = list(hear(same, tmp_path / "clip.m4a", CONFIG, CPU))
    assert len(windows) >= 5
    for i, window in enumerate(windows):
        assert window.problem == ""
        expected = slow_spectrogram(whole[i * HOP :][:WIDTH])[0]
        np.testing.assert_allclose(window.output, expected, atol=1e-3)


def test_windows_come_while_the_file_is_read(tmp_path):
    """A batch at a time, and the first before the last is read."""
    block = tone(16_000 * 60).numpy()
    soundfile.write(tmp_path / "long.wav", np.tile(block, 5), 16_000)
    seen = []

    def peak(spec: torch.Tensor) -> torch.Tensor:
        seen.append(len(spec))
        return spec.amax((1, 2, 3))[:, None]

    windows = hear(peak, tmp_path / "long.wav", CONFIG, CPU, batch_size=4)
    assert next(windows).output.shape == (1,)
    assert seen == [4]
    assert len(list(windows)) == 312  # 300 s / 0.96 s, without the first
    assert max(seen) == 4
    assert sum(seen) == 313


def damaged_flac(folder: Path) -> Path:
    soundfile.write(folder / "good.flac", noise(320_000), 16_000)
    data = (folder / "good.flac").read_bytes()
    (folder / "bad.flac").write_bytes(data)
    damage(folder / "bad.flac", 0.5, 2000)
    return folder / "bad.flac"


def not_finite(folder: Path) -> Path:
    sound = noise(320_000)
    soundfile.write(folder / "good.flac", sound, 16_000, format="WAV", subtype="FLOAT")
    sound[160_000:160_100] = np.nan
    soundfile.write(folder / "bad.wav", sound, 16_000, subtype="FLOAT")
    return folder / "bad.wav"


@pytest.mark.parametrize("make", [damaged_flac, not_finite])
def test_damage_in_the_middle_costs_its_windows_only(tmp_path, make):
    """The others are heard as those of the undamaged file, also behind it."""
    path = make(tmp_path)
    good = [window for window in hear(same, tmp_path / "good.flac", CONFIG, CPU) if window.end > window.begin]
    bad = [window for window in hear(same, path, CONFIG, CPU) if window.end > window.begin]
    assert len(bad) == len(good) == 21
    lost = [i for i, window in enumerate(bad) if window.output is None]
    assert 1 <= len(lost) <= 3
    assert all(8 < bad[i].begin < 11.5 for i in lost)
    for i, window in enumerate(bad):
        assert (window.problem != "") == (i in lost)
        if i not in lost:
            np.testing.assert_allclose(window.output, good[i].output, atol=1e-4)


def test_a_file_that_cannot_be_read_is_a_window_without_length(tmp_path):
    (tmp_path / "x.wav").write_text("not audio")
    (window,) = hear(same, tmp_path / "x.wav", CONFIG, CPU)
    assert window.begin == window.end == 0
    assert window.output is None
    assert "a text file" in window.problem


def test_outputs_that_are_not_finite_are_an_error(tmp_path):
    soundfile.write(tmp_path / "clip.wav", tone(16_000).numpy(), 16_000)
    with pytest.raises(ValueError, match="not finite"):
        list(hear(lambda spec: spec / 0, tmp_path / "clip.wav", CONFIG, CPU))


def test_clock():
    said = [clock(s) for s in (5, 65, 3605, 59.96, 0.04)]
    assert said == ["0:05.0", "1:05.0", "1:00:05.0", "1:00.0", "0:00.0"]


# --- tags -------------------------------------------------------------------------------------------------


def test_tags_of_files(classifier, called):
    """A line a file with the likeliest classes; --classes names them by their labels; a summary beside."""
    result = called(listen, "classifier.pt", "clip 0.wav", "clip 1.wav")
    out = result.stdout.splitlines()
    assert len(out) == 2
    assert result.stderr == "2 files\n"  # nothing failed: that is not counted
    name, best = out[0].split("  ", 1)
    found = {part[:-5]: float(part[-4:]) for part in best.split(", ")}
    assert name == "clip 0.wav"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert set(found) == {"Low tone", "High tone"}
    assert sum(found.values()) == pytest.approx(1, abs=0.02)
    (classifier / "names.csv").write_text("index,label,name\n0,high,Hoch\n1,low,Tief\n")  # in another order
    out = called(listen, "classifier.pt", "clip 0.wav", "--classes", "names.csv").stdout
    assert out == f"clip 0.wav  {best}\n".replace("Low tone", "Tief").replace("High tone", "Hoch")
    record = json.loads(called(listen, "classifier.pt", "clip 0.wav", "--json", "--top_k", 1).stdout)
    assert list(record["top"]) == [max(found, key=found.get)]


def test_probabilities_are_those_of_the_network(classifier, called):
    """Of each window, the last of which is a whole one, too; of the file, the mean over time."""
    sound = torch.cat([tone(HOP), tone(6000, hz=2000)])
    soundfile.write(classifier / "long.wav", sound.numpy(), 16_000, subtype="FLOAT")
    state = load_checkpoint(classifier / "classifier.pt")
    model = AudioClassifier.from_pretrained(classifier / "classifier.pt")
    margin = []
    with torch.no_grad():
        for part in (sound[:WIDTH], sound[-WIDTH:]):
            margin.append(model(slow_spectrogram(part))[0] @ torch.tensor([1.0, -1.0]))
    scale = 2 / (margin[0] - margin[1])  # a head that says .73 of the first window and .27 of the second
    state["classifier"]["head.weight"] *= scale
    state["classifier"]["head.bias"][0] = -scale * (margin[0] + margin[1]) / 2
    save_checkpoint(classifier / "sure.pt", **state)
    record = json.loads(called(listen, "sure.pt", "long.wav", "--json").stdout)
    p = [torch.tensor(1.0).sigmoid().item(), torch.tensor(-1.0).sigmoid().item()]
    for window, low in zip(record["windows"], p, strict=True):
        assert window["top"] == pytest.approx({"Low tone": low, "High tone": 1 - low}, abs=5e-3)
        likeliest = "Low tone" if low > 0.5 else "High tone"
        assert list(window["top"])[0] == likeliest
    border = (HOP + (HOP + 6000 - WIDTH)) / 2  # half-way between the middles of the windows
    mean = np.average(p, weights=[border, HOP + 6000 - border])
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
    soundfile.write(hard / "g_constant.wav", np.full(16_000, 0.25), 16_000)
    soundfile.write(hard / "h_empty.wav", np.zeros(0), 16_000)
    result = script("extras/listen.py", "classifier.pt", "hard", "missing.wav", "--json")
    found = {}
    for line in result.stdout.splitlines():
        record = json.loads(line)
        found[Path(record["file"]).name] = record
    assert len(found) == 9
    for name, reason in (
        ("a_20ms.wav", "too short"), ("c_silence.wav", "silent"), ("d_nan.wav", "samples reach nan"),
        ("e_text.wav", "a text file"), ("missing.wav", "no such file"), ("g_constant.wav", "silent"),
        ("h_empty.wav", "too short"),
    ):  # fmt: skip
        assert reason in found[name]["error"], name
        assert "top" not in found[name], name
    for name in ("b_8_channels.wav", "f_good.flac"):
        assert sum(found[name]["top"].values()) == pytest.approx(1, abs=1e-5)
        assert "error" not in found[name]
    assert result.stderr == "9 files, 7 not usable\n"


def test_if_no_file_can_be_used_the_exit_status_is_1(classifier, called):
    result = called(listen, "classifier.pt", "missing.wav", check=False)
    assert result.returncode == 1
    assert result.stdout == "missing.wav  not usable: no such file\n"
    assert "Traceback" not in result.stderr
    assert called(listen, "classifier.pt", "missing.wav", "clip 0.wav").returncode == 0


def test_a_clip_shorter_than_a_patch_is_marked(classifier, called):
    """The network sees mostly padding: the tags are no plain ones."""
    soundfile.write(classifier / "short.wav", tone(2000).numpy(), 16_000)
    soundfile.write(classifier / "enough.wav", tone(2800).numpy(), 16_000)  # 15 frames of 10 ms and one of 25
    short, enough = called(listen, "classifier.pt", "short.wav", "enough.wav").stdout.splitlines()
    assert short.endswith("(only 0.125 s: less than a patch of 0.175 s)")
    assert "tone 0." in short
    assert enough[-4:-2] == "0."
    record = json.loads(called(listen, "classifier.pt", "short.wav", "--json").stdout)
    assert record["remark"] == "only 0.125 s: less than a patch of 0.175 s"


def test_a_long_file_has_a_timeline(classifier, called):
    """Window by window, silence among them."""
    sound = torch.cat([tone(40_000), torch.zeros(40_000), tone(20_000, hz=1000)])
    soundfile.write(classifier / "long.wav", sound.numpy(), 16_000)
    record = json.loads(called(listen, "classifier.pt", "long.wav", "--json").stdout)
    starts = [window["start"] for window in record["windows"]]
    last = (100_000 - WIDTH) / 16_000  # it ends with the file
    assert starts == [0, 0.96, 1.92, 2.88, 3.84, 4.8, last]
    assert record["seconds"] == pytest.approx(100_000 / 16_000, abs=0.16)
    assert [w["start"] for w in record["windows"] if w["top"] is None] == [2.88, 3.84]
    text = called(listen, "classifier.pt", "long.wav", "--timeline").stdout.splitlines()
    first, *stretches = [line.split() for line in text]  # neighbours with the same class are one stretch
    assert first[0] == "long.wav"
    assert stretches[0][0] == "0:00.0"
    assert stretches[-1][2] == "0:06.2"
    assert ["0:02.9", "to", "0:04.8", "silence", "1.00"] in stretches
    for a, b in zip(stretches, stretches[1:]):
        assert a[2] == b[0]
        assert a[3:-1] != b[3:-1]
    assert called(listen, "classifier.pt", "long.wav").stdout.count("\n") == 1


@pytest.mark.parametrize("make", [damaged_flac, not_finite])
def test_damage_is_told_in_every_form(classifier, called, make):
    """Text, timeline, JSON and beside a table; each time the exit status is 0, and what follows is heard."""
    path = make(classifier)
    record = json.loads(called(listen, "classifier.pt", path, "--json").stdout)
    assert record["seconds"] == 20.0
    assert len(record["top"]) == 2
    lost = [window for window in record["windows"] if "error" in window]
    reason = lost[0]["error"]
    assert all(window["top"] is None for window in lost)
    assert all(window["top"] for window in record["windows"] if window not in lost)
    assert record["error"].startswith(f"{reason} ({len(lost)} of 21 windows not heard)")
    text = called(listen, "classifier.pt", path, "--timeline").stdout.splitlines()
    assert f"(heard in part: {record['error']})" in text[0]
    line = [line for line in text if "not heard: " in line][0]
    assert line.endswith(f"not heard: {reason}")
    assert line.split()[0] == clock(lost[0]["start"])
    assert text[-1].split()[2] == "0:20.0"
    result = called(listen, "classifier.pt", path, "--csv", "--threshold", 0.01)
    for name in ("Low tone", "High tone"):
        rows = [row for row in table(result.stdout) if row["class"] == name]
        assert [row["start"] for row in rows] == ["0.000", f"{lost[-1]['start'] + 0.96:.3f}"]
        assert [row["end"] for row in rows] == [f"{lost[0]['start']:.3f}", "20.000"]
    assert result.stderr == f"{path} is heard in part: {record['error']}\n"


def test_an_mp3_that_holds_more_than_it_claims_is_told(classifier, called):
    """Three mp3 files in one, of which only the first can be decoded: heard, and the rest not passed over."""
    soundfile.write(classifier / "a.mp3", tone(32_000).numpy(), 16_000)
    (classifier / "three.mp3").write_bytes(3 * (classifier / "a.mp3").read_bytes())
    record = json.loads(called(listen, "classifier.pt", "a.mp3", "--json").stdout)
    assert record["seconds"] == pytest.approx(2, abs=0.16)
    assert "error" not in record
    record = json.loads(called(listen, "classifier.pt", "three.mp3", "--json").stdout)
    assert record["seconds"] > 5 or "holds" in record["error"]


def test_classes_of_the_same_name_are_told_apart(classifier, called):
    """By their labels: none is lost."""
    (classifier / "names.csv").write_text("index,label,name\n0,low,Tone\n1,high,Tone\n")
    args = ["classifier.pt", "clip 0.wav", "--classes", "names.csv", "--json"]
    top = json.loads(called(listen, *args).stdout)["top"]
    assert {*top} == {"Tone (low)", "Tone (high)"}
    assert sum(top.values()) == pytest.approx(1, abs=1e-5)


def test_json_is_utf8(classifier, called, monkeypatch):
    """Names are written as they are, not as escapes, whatever the terminal's encoding; and read back."""
    names = "index,label,name\n0,low,Höhe\n1,high,木琴\n"
    (classifier / "names.csv").write_text(names, encoding="utf-8")
    (classifier / "clip 0.wav").rename(classifier / "öl.wav")
    out = called(listen, "classifier.pt", "öl.wav", "--classes", "names.csv", "--json").stdout
    assert '"Höhe"' in out
    assert '"木琴"' in out
    assert '"öl.wav"' in out
    assert set(json.loads(out)["top"]) == {"Höhe", "木琴"}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    assert listen.main() == 0
    sys.stdout.flush()
    assert raw.getvalue().decode("utf-8") == out


# --- detections -------------------------------------------------------------------------------------------


class ToneClassifier(torch.nn.Module):
    """Tells low from high by the power in the lower and the upper mel bins of a window."""

    def __init__(self, names: tuple[str, str] = ("low", "high")):
        super().__init__()
        self.config = CONFIG
        self.classes = {name: name for name in names}

    def forward(self, spec: torch.Tensor) -> torch.Tensor:
        power = (spec[:, 0] * 2 * CONFIG.norm_std + CONFIG.norm_mean).exp()  # (B, F, M)
        low = power[:, :, :64].sum((1, 2))
        high = power[:, :, 64:].sum((1, 2))
        return torch.stack([low / (low + high), high / (low + high)], dim=1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@pytest.fixture
def tones(tmp_path, monkeypatch):
    """joined.wav: 5.3 s of a low tone, 4.1 s of a high one as loud to the network, 3 s of silence, 2 s of the
    low one; CKPT is the classifier above."""
    t = np.arange(16_000 * 6) / 16_000
    low = 0.2 * np.sin(2 * np.pi * 300 * t)
    high = 0.2 * np.sin(2 * np.pi * 5000 * t)
    model = ToneClassifier()
    both = torch.tensor(np.stack([low[:WIDTH], high[:WIDTH]]), dtype=torch.float32)
    spec = spectrogram(both, torch.tensor([WIDTH, WIDTH]), CONFIG.norm_mean, CONFIG.norm_std)
    power = (spec * 2 * CONFIG.norm_std + CONFIG.norm_mean).exp().sum((1, 2, 3))
    high *= (power[0] / power[1]).sqrt().item()
    parts = [low[: int(5.3 * 16_000)], high[: int(4.1 * 16_000)], np.zeros(3 * 16_000), low[:32_000]]
    soundfile.write(tmp_path / "joined.wav", np.concatenate(parts), 16_000, subtype="FLOAT")
    monkeypatch.setattr(listen, "load_classifier", lambda path, classes: model)
    return model


def test_side_by_side_a_change_is_marked_to_the_window(tones, called):
    text = called(listen, "CKPT", "joined.wav", "--timeline").stdout.splitlines()
    names = [line.split()[3] for line in text[1:]]
    assert names == ["low", "high", "silence", "low"]
    starts = [line.split()[0] for line in text[1:]]
    assert starts == ["0:00.0", "0:05.8", "0:09.6", "0:11.5"]  # multiples of 0.96 s


@pytest.mark.parametrize("hop", [0.05, 0.1, 0.3])
def test_with_overlap_a_change_is_marked_to_the_hop(tones, called, hop):
    """Where the sound changes, though a window is ten hops long."""
    text = called(listen, "CKPT", "joined.wav", "--timeline", "--hop", hop).stdout.splitlines()
    stretches = [line.split() for line in text[1:]]
    assert [stretch[3] for stretch in stretches] == ["low", "high", "silence", "low"]
    assert stretches[-1][2] == "0:14.4"

    def seconds(text: str) -> float:
        return float(text.removeprefix("0:"))

    assert seconds(stretches[1][0]) == pytest.approx(5.3, abs=hop / 2 + 0.06)
    assert seconds(stretches[2][0]) == pytest.approx(9.4 + 0.48, abs=hop / 2 + 0.06)  # silent as a whole
    assert seconds(stretches[3][0]) == pytest.approx(12.4 - 0.48, abs=hop / 2 + 0.06)


@pytest.mark.parametrize("hop", [0, 0.05, 0.1, 0.3])
def test_detections_are_a_table(tones, called, hop):
    """A line for each stretch above the threshold, by default a half: windows in a row are one detection,
    whose probability is their mean."""
    result = called(listen, "CKPT", "joined.wav", "--csv", "--hop", hop)
    rows = table(result.stdout)
    assert list(rows[0]) == ["file", "start", "end", "class", "probability"]
    assert [row["class"] for row in rows] == ["low", "high", "low"]
    assert {row["file"] for row in rows} == {"joined.wav"}
    assert result.stderr == ""
    record = json.loads(called(listen, "CKPT", "joined.wav", "--json", "--hop", hop).stdout)
    runs = []  # of windows: class, probabilities
    for window in record["windows"]:
        top = window["top"] or {"silence": 1.0}
        name = max(top, key=top.get)
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(top.get(name))
    runs = [run for run in runs if run[0] in ("low", "high")]
    for row, (name, scores) in zip(rows, runs, strict=True):
        assert row["class"] == name
        assert float(row["probability"]) == pytest.approx(np.mean(scores), abs=1e-4)
    step = hop or 0.96
    assert float(rows[0]["start"]) == 0
    assert rows[0]["end"] == rows[1]["start"]
    assert float(rows[0]["end"]) == pytest.approx(5.3, abs=step / 2 + 0.03)
    assert float(rows[2]["end"]) == 14.4


def test_classes_may_be_detected_together(tones, called):
    """Above a threshold of 0.2, both classes are there where the tones meet; lines come by their start."""
    args = ["joined.wav", "--csv", "--hop", 0.1, "--threshold", 0.2]
    rows = table(called(listen, "CKPT", *args).stdout)
    assert [row["class"] for row in rows[:2]] == ["low", "high"]
    assert float(rows[0]["end"]) == pytest.approx(5.3 + 0.3 * 0.96, abs=0.1)  # 0.2 of a window is low
    assert float(rows[1]["start"]) == pytest.approx(5.3 - 0.3 * 0.96, abs=0.1)
    starts = [float(row["start"]) for row in rows]
    assert starts == sorted(starts)


def test_a_threshold_that_nothing_reaches_leaves_the_header(tones, called):
    result = called(listen, "CKPT", "joined.wav", "--csv", "--threshold", 1)
    assert result.stdout == "file,start,end,class,probability\n"


def test_names_with_commas_and_quotes_are_one_cell(tones, called, monkeypatch, tmp_path):
    model = ToneClassifier(('Bark, "loud"', "Höhe"))
    monkeypatch.setattr(listen, "load_classifier", lambda path, classes: model)
    (tmp_path / "joined.wav").rename(tmp_path / "a, b.wav")
    rows = table(called(listen, "CKPT", "a, b.wav", "--csv").stdout)
    assert [row["class"] for row in rows] == ['Bark, "loud"', "Höhe", 'Bark, "loud"']
    assert {row["file"] for row in rows} == {"a, b.wav"}


def test_labels_for_audacity(tones, called):
    """Tab-separated start, end and text, without a header, of one file."""
    out = called(listen, "CKPT", "joined.wav", "--audacity").stdout
    rows = table(called(listen, "CKPT", "joined.wav", "--csv").stdout)
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[:2] for line in lines] == [[row["start"], row["end"]] for row in rows]
    assert [line[2].split()[0] for line in lines] == ["low", "high", "low"]


def test_files_that_cannot_be_used_are_told_beside_the_table(tones, called):
    result = called(listen, "CKPT", "missing.wav", "joined.wav", "--csv")
    assert {row["file"] for row in table(result.stdout)} == {"joined.wav"}
    expected = "missing.wav cannot be used: no such file\n2 files, 1 not usable\n"
    assert result.stderr == expected
    assert called(listen, "CKPT", "missing.wav", "--csv", check=False).returncode == 1


# --- features ---------------------------------------------------------------------------------------------


def test_features_are_the_encoders_tokens(classifier, called):
    """Tokens after the block that was asked for, without padding, by time."""
    called(listen, "classifier.pt", "clip 7.wav", "--features", "out.npz", "--block", "1")
    found = np.load(classifier / "out.npz")
    encoder = Encoder.from_pretrained(classifier / "classifier.pt")
    waveform = load_audio(classifier / "clip 7.wav")
    tokens = []
    with torch.no_grad():
        for part in (waveform[:WIDTH], waveform[HOP:]):
            tokens.append(encoder.blocks[0](encoder.embed(slow_spectrogram(part)))[0][0])
    first, last = tokens
    # 19,200 samples: a window of 6 patches in time, and 22 frames in the second window, which is 1 patch
    assert found["cls"].shape == (2, 64)
    assert found["patches"].shape == (7, 8, 64)
    assert found["patches"].dtype == np.float32
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


@pytest.mark.parametrize("make", [damaged_flac, not_finite])
def test_features_go_on_behind_damage(classifier, called, make):
    """What is lost is told, also by the command that finds the features there; the times say where it is."""
    path = make(classifier)
    reason = f"{path} is heard in part: "
    args = ["classifier.pt", path, "--features", "out.npz"]
    for _ in range(2):
        result = called(listen, *args)
        assert result.stderr.startswith(reason)
        assert "windows not heard" in result.stderr
    times = np.load(classifier / "out.npz")["times"]
    assert times[-1] > 19.5
    (gap,) = np.flatnonzero(np.diff(times) > 0.2)
    assert 8 < times[gap] < 11


def test_features_of_a_teacher(folder, called):
    """--teacher: of a pre-training run, those of the moving average."""
    torch.manual_seed(0)
    student = EAT(CONFIG)
    teacher = Encoder(CONFIG).eval()
    state = dict(student=student.state_dict(), teacher=teacher.state_dict(), network=vars(CONFIG))
    save_checkpoint(folder / "pre.pt", **state)
    for name, encoder, args in (("student", student.encoder.eval(), []), ("teacher", teacher, ["--teacher"])):
        called(listen, "pre.pt", "clip 0.wav", "--features", f"{name}.npz", "--block", 2, *args)
        with torch.no_grad():
            cls = encoder(slow_spectrogram(load_audio(folder / "clip 0.wav")))[:, 0]
        np.testing.assert_allclose(np.load(folder / f"{name}.npz")["cls"], cls, atol=1e-5)


def test_features_of_a_folder(classifier, called):
    """A .npz for each file, in folders as the files are; what cannot be used is told."""
    (classifier / "sub").mkdir()
    soundfile.write(classifier / "sub" / "clip 0.wav", tone(16_000).numpy(), 16_000)
    (classifier / "clip 3.wav").write_text("damaged")
    result = called(listen, "classifier.pt", ".", "--features", "each")
    assert result.stdout == "each: features of 9 files, 1 not usable\n"
    assert "clip 3.wav cannot be used: a text file" in result.stderr
    written = {path.relative_to(classifier / "each").as_posix() for path in classifier.glob("each/**/*.*")}
    assert written == {f"clip {i}.wav.npz" for i in range(8) if i != 3} | {"sub/clip 0.wav.npz"}
    assert np.load(classifier / "each" / "sub" / "clip 0.wav.npz")["frames"].shape == (6, 64)
    (classifier / "empty").mkdir()
    called(listen, "classifier.pt", "sub/clip 0.wav", "--features", "empty/")  # as shells complete it
    assert (classifier / "empty" / "clip 0.wav.npz").exists()
    called(listen, "classifier.pt", "sub/clip 0.wav", "--features", "one.npz")
    one = np.load(classifier / "one.npz")
    again = np.load(classifier / "each" / "sub" / "clip 0.wav.npz")
    assert {*one} == {"cls", "cls_times", "patches", "frames", "times"}
    np.testing.assert_array_equal(one["frames"], again["frames"])


def test_features_of_a_manifest_are_a_table(classifier, called):
    """A row for each clip that can be read, as the probes see it, with its labels, for scikit-learn."""
    (classifier / "clip 3.wav").write_text("damaged")
    args = ["classifier.pt", "manifest.tsv", "--features", "new/all.npz", "--workers", 0, "--block", 1]
    result = called(listen, *args, "--pooling", "bands")
    found = np.load(classifier / "new" / "all.npz")
    assert found["features"].shape == (7, 2 * 8 * 64)
    assert found["features"].dtype == np.float32
    assert found["labels"].tolist() == ["low"] * 3 + ["high"] * 4
    assert found["files"].tolist() == [f"clip {i}.wav" for i in range(8) if i != 3]
    assert "clip 3.wav a text file" in result.stderr
    assert "1 clips cannot be used" in result.stdout
    assert "clips are longer than 96 frames" in result.stdout
    encoder = Encoder.from_pretrained(classifier / "classifier.pt")
    spec = slow_spectrogram(load_audio(classifier / "clip 0.wav"))
    with torch.no_grad():
        row = pooled(encoder, "bands", 1)(spec)[0]
    np.testing.assert_allclose(found["features"][0], row, atol=1e-4)


def test_nothing_is_said_of_clips_when_all_can_be_used(classifier, called):
    lines = (classifier / "manifest.tsv").read_text().splitlines()
    (classifier / "short.tsv").write_text("\n".join(lines[:4]) + "\n")  # of less than a window
    result = called(listen, "classifier.pt", "short.tsv", "--features", "x.npz")
    assert result.stdout == "x.npz: features (3, 1024)\n"
    assert result.stderr == ""


# --- features that are there, or cannot be written --------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and what they hold."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.fixture
def many(classifier, script) -> Path:
    """40 clips in `clips`, and their features in `whole`."""
    for i in range(40):
        path = classifier / "clips" / f"{i % 4}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(20_000, hz=100 + 20 * i).numpy(), 16_000)
    script("extras/listen.py", "classifier.pt", "clips", "--features", "whole")
    return classifier


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_that_was_killed_goes_on(many, script, number):
    """What it has written is whole; the same command keeps that and writes the rest."""
    whole = snapshot(many / "whole")
    command = [ROOT / "extras" / "listen.py", "classifier.pt", "clips", "--features", "out"]
    job = Script(command, many, many / "stdout", many / "stderr")
    while len(list(many.glob("out/*/*.npz"))) < 5:
        assert job.poll() is None
        time.sleep(0.002)
    os.kill(job.pid, number)
    assert job.wait() != 0
    written = {path for path in many.glob("out/*/*.npz")}
    before = {path: path.stat().st_mtime_ns for path in written}
    assert 5 <= len(written) < 40
    for path in written:
        assert path.read_bytes() == whole[path.relative_to(many / "out").as_posix()]
    result = script("extras/listen.py", "classifier.pt", "clips", "--features", "out")
    assert result.stdout == f"out: features of 40 files, {len(written)} were there already\n"
    assert {path: path.stat().st_mtime_ns for path in written} == before
    found = snapshot(many / "out")
    assert {name: data for name, data in found.items() if name.endswith(".npz")} == whole
    if number == signal.SIGTERM:
        assert found == whole


def test_two_jobs_in_one_folder_do_not_break_one_another(many):
    whole = snapshot(many / "whole")
    command = [ROOT / "extras" / "listen.py", "classifier.pt", "clips", "--features", "out"]
    jobs = [Script(command, many, many / f"out {i}", many / f"err {i}") for i in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert snapshot(many / "out") == whole
    for i in range(2):
        assert (many / f"err {i}").read_text() == ""


def test_the_job_that_is_quicker_wins(tmp_path):
    """Its file stays, unless it was made with other settings, which is an error."""
    rows = features.Rows(tmp_path)
    rows.append(np.ones((2, 3), np.float32))
    features.write_npz(tmp_path / "x.npz", dict(a=rows), dict(block=1, problem="first"))
    rows.append(np.zeros((1, 3), np.float32))
    features.write_npz(tmp_path / "x.npz", dict(a=rows), dict(block=1, problem="first"))
    assert np.load(tmp_path / "x.npz")["a"].shape == (2, 3)
    with pytest.raises(ValueError, match="made with another checkpoint"):
        features.write_npz(tmp_path / "x.npz", dict(a=rows), dict(block=2))
    assert np.load(tmp_path / "x.npz")["a"].shape == (2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_what_is_there_is_not_computed_again(classifier, called, monkeypatch):
    args = ["classifier.pt", "clip 0.wav", "--features", "x.npz"]
    called(listen, *args)
    before = (classifier / "x.npz").read_bytes()
    monkeypatch.setattr(listen, "hear", None)
    assert called(listen, *args).stdout == "x.npz: features of 1 files, 1 were there already\n"
    assert (classifier / "x.npz").read_bytes() == before


@pytest.mark.parametrize("other", ["block", "checkpoint", "recording", "foreign", "text"])
def test_features_made_otherwise_are_neither_kept_nor_replaced(classifier, called, other):
    """In one line, before anything is written beside them."""
    (classifier / "out").mkdir()
    place = classifier / "out" / "clip 5.wav.npz"
    args = ["classifier.pt", classifier / "clip 5.wav", "--features", "out"]
    called(listen, *args)
    flags = []
    if other == "block":
        flags = ["--block", 2]
    elif other == "checkpoint":
        state = load_checkpoint(classifier / "classifier.pt")
        state["classifier"]["encoder.cls_token"] += 1
        save_checkpoint(classifier / "classifier.pt", **state)
    elif other == "recording":
        n_samples = 8000 + 1600 * 5  # as many as before: the size of the file says nothing
        soundfile.write(classifier / "clip 5.wav", tone(n_samples, hz=1000).numpy(), 16_000)
    elif other == "foreign":
        np.savez(place, a=np.zeros(3))
    else:
        place.write_text("mine")
    before = place.read_bytes()
    result = called(listen, "classifier.pt", ".", "--features", "out", *flags, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "clip 5.wav.npz exists, made with another" in result.stderr
    assert place.read_bytes() == before
    assert os.listdir(classifier / "out") == ["clip 5.wav.npz"]


def test_files_that_cannot_be_written_are_passed_over(classifier, called):
    """A name too long for four more characters, a folder or a file in the way: named, counted, and the others
    go on; if none can be written, the exit status is 1."""
    long = "n" * 249 + ".wav"
    (classifier / "clip 0.wav").rename(classifier / long)
    (classifier / "sub").mkdir()
    (classifier / "clip 1.wav").rename(classifier / "sub" / "clip 1.wav")
    (classifier / "out").mkdir()
    (classifier / "out" / "clip 2.wav.npz").mkdir()
    (classifier / "out" / "sub").write_text("a file")
    result = called(listen, "classifier.pt", ".", "--features", "out")
    assert result.stdout == "out: features of 8 files, 3 not usable\n"
    said = sorted(result.stderr.splitlines())
    assert len(said) == 3
    assert "clip 2.wav cannot be used: cannot write out/clip 2.wav.npz: Is a directory" in said[0]
    assert f"{long} cannot be used: cannot write out/{long}.npz: File name too long" in said[1]
    assert "sub/clip 1.wav cannot be used: cannot write out/sub/clip 1.wav.npz: " in said[2]
    assert len(list(classifier.glob("out/*.npz"))) == 6
    assert called(listen, "classifier.pt", long, "--features", "other", check=False).returncode == 1


def test_a_full_disk_ends_the_job_which_goes_on_later(classifier, called, monkeypatch):
    calls = []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = called(listen, "classifier.pt", ".", "--features", "out", check=False)
    assert result.returncode == 1
    assert result.stderr == "listen.py: out: the disk is full; the same command goes on\n"
    assert sorted(os.listdir(classifier / "out")) == ["clip 0.wav.npz", "clip 1.wav.npz"]
    result = called(listen, "classifier.pt", ".", "--features", "out")
    assert result.stdout == "out: features of 8 files, 2 were there already\n"


def test_what_killed_jobs_left_is_removed_but_not_what_others_write(classifier, called):
    (classifier / "out" / "sub").mkdir(parents=True)
    old = classifier / "out" / "sub" / f"{features.TEMPORARY}1.tmp"
    new = classifier / "out" / "sub" / f"{features.TEMPORARY}2.tmp"
    old.write_text("half")
    new.write_text("half")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    called(listen, "classifier.pt", "clip 0.wav", "--features", "out")
    assert not old.exists()
    assert new.exists()


# --- memory -----------------------------------------------------------------------------------------------

PEAKS = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from extras import listen
for line in sys.argv[2:]:
    sys.argv = ["listen.py", *json.loads(line)]
    listen.main()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


def write_recording(path: Path, hours: float) -> None:
    """Noise below 500 Hz, 1,000 bytes a second."""
    block = np.random.default_rng(0).integers(-8000, 8000, 60_000, dtype=np.int16)
    with soundfile.SoundFile(path, "w", 1000, 1, subtype="PCM_U8") as file:
        for _ in range(round(hours * 60)):
            file.write(block)


def save_classifier(path: Path, config: ModelConfig, n_classes: int) -> None:
    torch.manual_seed(0)
    model = AudioClassifier(config, {f"class {i}": f"class {i}" for i in range(n_classes)})
    state = dict(network=vars(config), head=model.head_settings, classifier=model.state_dict())
    save_checkpoint(path, step=1, **state)


def peaks_of(script, folder: Path, *jobs: list) -> list[int]:
    """Peak memory of a process in MiB after one call of listen.py, and after another."""
    (folder / "peaks.py").write_text(PEAKS)
    result = script(folder / "peaks.py", ROOT, *[json.dumps(job) for job in jobs])
    return [int(line) for line in result.stderr.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("hours, width", [(0.5, 256), (24, 64)])
def test_features_of_a_long_recording_do_not_fill_the_memory(tmp_path, script, hours, width):
    """Peak memory of the process; the features are larger than what it may grow."""
    write_recording(tmp_path / "short.wav", 1 / 60)
    write_recording(tmp_path / "long.wav", hours)
    config = ModelConfig(width=width, depth=1, heads=1, mlp_ratio=1, clip_frames=96)
    save_classifier(tmp_path / "c.pt", config, 2)
    jobs = [["c.pt", f"{name}.wav", "--features", f"{name}.npz"] for name in ("short", "long")]
    short, long = peaks_of(script, tmp_path, *jobs)
    size = (tmp_path / "long.npz").stat().st_size / 2**20
    assert size > 0.78 * width * hours > 60
    assert long - short < 60
    assert long < 2048
    with np.load(tmp_path / "long.npz") as found:
        assert found["times"][-1] == pytest.approx(3600 * hours, abs=0.5)
        assert len(found["cls"]) == int(3600 * hours / 0.96)


def test_tags_keep_no_outputs(monkeypatch):
    """Of each window only the likeliest classes, in tags and in detections."""
    held = []

    def windows(*_):
        for i in range(100):
            output = np.full(2, 0.4 + 0.01 * (i % 20))
            held.append(weakref.ref(output))
            assert sum(reference() is not None for reference in held) <= 3
            yield Window(i, i + 1, output, "")

    monkeypatch.setattr(listen, "hear_classes", windows)
    model = ToneClassifier()
    record = listen.tag(model, Path("x.wav"), CPU, top_k=1)
    assert len(record["windows"]) == 100
    assert all(len(window["top"]) == 1 for window in record["windows"])
    found, _ = listen.detect(model, Path("x.wav"), CPU, threshold=0.5)
    assert len(found) == 2 * 5
    assert len(held) == 200


@pytest.mark.long
@pytest.mark.parametrize("hours, n_classes, clip_frames", [(0.15, 10_000, 16), (24, 500, 96)])
@pytest.mark.parametrize("form", ["--json", "--timeline"])
def test_tags_of_a_long_recording_do_not_fill_the_memory(
    tmp_path, script, hours, n_classes, clip_frames, form
):  # fmt: skip
    write_recording(tmp_path / "short.wav", 3 / 60)  # several batches
    write_recording(tmp_path / "long.wav", hours)
    config = ModelConfig(width=32, depth=1, heads=1, mlp_ratio=1, clip_frames=clip_frames)
    save_classifier(tmp_path / "c.pt", config, n_classes)
    jobs = [["c.pt", f"{name}.wav", form] for name in ("short", "long")]
    short, long = peaks_of(script, tmp_path, *jobs)
    outputs = 360_000 * hours / clip_frames * n_classes * 4 / 2**20  # MiB of all windows
    assert outputs > 100
    assert long < 2048
    if hours < 1:
        assert long - short < 50


# --- ends and refusals ------------------------------------------------------------------------------------


def test_a_closed_pipe_is_no_error(classifier):
    """As of `| head -1`: no traceback, no message."""
    os.mkfifo(classifier / "pipe")
    command = [ROOT / "extras" / "listen.py", "classifier.pt", *["clip 0.wav"] * 400]
    job = Script(command, classifier, classifier / "pipe", classifier / "err")
    with open(classifier / "pipe") as pipe:
        assert pipe.readline().startswith("clip 0.wav  ")
    assert job.wait() == -signal.SIGPIPE
    assert (classifier / "err").read_text() == ""


@pytest.mark.parametrize(
    "args, message",
    [
        (["clip 0.wav", "--features", "x.npz", "--block", "9"], "no block 9: the encoder"),
        (["clip 0.wav", "--features", "x.npz", "--teacher"], "classifier.pt has no teacher"),
        (["clip 0.wav", "--features", "three.txt"], "three.txt exists and is no folder"),
        (["clip 0.wav", "--features", "x.csv"], "x.csv: features are written as .npz"),
        (["manifest.tsv", "--features", "x"], "the features of a manifest, one at a time"),
        (["manifest.tsv", "--features", "there.npz"], "there.npz exists: remove it or choose another"),
        ([".", "--features", "x.npz"], "x.npz is for one file: name a folder"),
        (["clip 0.wav", "sub", "--features", "x"], "clip 0.wav is there twice"),
        (["clip 0.wav", "--top_k", "0"], "above 0"),
        (["clip 0.wav", "--top_k", "many"], "--top_k: invalid int value"),
        (["clip 0.wav", "--classes", "three.txt"], "does not list the 2 classes of cl"),
        (["empty"], "no audio files below empty"),
        (["manifest.tsv"], "manifest.tsv: a manifest is for --features X.npz, alone, and for evaluate.py;"),
        (["clip 0.wav", "manifest.tsv", "--features", "x"], "for tags name the files or their folder"),
        (["clip 0.wav", "--hop", "0.97"], "--hop 0.97: choose 0.01 to 0.96 s"),
        (["clip 0.wav", "--hop", "-1"], "--hop -1.0: choose"),
        (["clip 0.wav", "--hop", "nan"], "--hop nan: choose"),
        (["clip 0.wav", "--csv", "--json"], "choose one"),
        (["clip 0.wav", "--threshold", "0.5"], "--threshold is for --csv and --audacity"),
        (["clip 0.wav", "--block", "1"], "--block and --teacher are for --features"),
        (["clip 0.wav", "clip 1.wav", "--audacity"], "name one file, not 2"),
    ],
)
def test_refusals_are_one_line(classifier, called, args, message):
    (classifier / "empty").mkdir()
    (classifier / "three.txt").write_text("a\nb\nc\n")
    (classifier / "there.npz").write_text("mine")
    (classifier / "sub").mkdir()
    soundfile.write(classifier / "sub" / "clip 0.wav", tone(8000).numpy(), 16_000)
    result = called(listen, "classifier.pt", *args, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("listen.py: ")
    assert message in result.stderr
    assert not (classifier / "x.npz").exists()
    assert not (classifier / "x").exists()


def test_a_checkpoint_that_is_missing_is_told(classifier, called):
    result = called(listen, "missing.pt", "clip 0.wav", check=False)
    assert result.returncode == 1
    assert "there is no file missing.pt" in result.stderr


def test_several_processes_are_refused_at_once(classifier, called, monkeypatch):
    """torchrun would make each of them do everything; without others it must not wait for them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = called(listen, "classifier.pt", "clip 0.wav", check=False)
    assert result.returncode == 1
    assert "this needs one process, but WORLD_SIZE is 2" in result.stderr
