"""Front end, files, manifests, data sets, and the order in which clips are read."""

import math
import os
import subprocess
import sys
import threading
import time
import types
import unicodedata
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT, bad_files, tone

import data
from data import (
    LOUDEST,
    SILENCE,
    AudioDataset,
    ClipSampler,
    InputError,
    Manifest,
    build_loader,
    clip_samples,
    load_audio,
    log_mel,
    open_labelled,
    resample,
    spectrogram,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "front_end.npz")
DEMO = ROOT / "extras" / "demo"
AUDIOSET = dict(mean=-4.268, std=4.569)


# --- front end -------------------------------------------------------------------------------------------


def kaldi(waveform: torch.Tensor) -> torch.Tensor:
    return torchaudio.compliance.kaldi.fbank(
        waveform[None], htk_compat=True, sample_frequency=16_000, use_energy=False, window_type="hanning",
        num_mel_bins=128, dither=0.0, frame_shift=10,
    )  # fmt: skip


def test_log_mel_equals_kaldi():
    generator = torch.Generator().manual_seed(0)
    dataset = AudioDataset(DEMO / "pretrain.tsv")
    waveforms = [dataset.read(i) for i in range(0, len(dataset), math.ceil(len(dataset) / 50))]
    for i in range(60):
        waveforms.append(torch.randn(400 + 997 * i, generator=generator) * 10 ** (-i / 10))
    assert len(waveforms) >= 100
    for waveform in waveforms:
        assert (log_mel(waveform) - kaldi(waveform)).abs().max() <= 1e-4


def test_log_mel_is_batched():
    waveform = torch.stack([tone(9000), tone(9000, hz=3000)])
    expected = torch.stack([log_mel(row) for row in waveform])
    torch.testing.assert_close(log_mel(waveform), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100])
def test_golden_front_end(rate):
    """Against another machine, whose FFT rounds otherwise: it shows where a bin is far below the loudest."""
    waveform = resample(torch.from_numpy(GOLDEN[f"chirp_{rate}/waveform"]), rate)
    padded = torch.nn.functional.pad(waveform, (0, clip_samples(1024) - len(waveform)))
    ours = {
        "resampled_16k": waveform,
        "log_mel": log_mel(waveform - waveform.mean()),
        "spec": spectrogram(padded[None], torch.tensor([len(waveform)]), **AUDIOSET)[0, 0],
    }
    theirs = {name: torch.from_numpy(GOLDEN[f"chirp_{rate}/{name}"]) for name in ours}
    torch.testing.assert_close(ours["resampled_16k"], theirs["resampled_16k"], rtol=0, atol=1e-6)
    error = (ours["log_mel"] - theirs["log_mel"]).abs()
    audible = theirs["log_mel"] > -8
    assert 0.05 < audible.float().mean() < 0.2  # a chirp: the rest of each frame is rounding
    assert error[audible].max() < 1e-4
    assert error.median() < 1e-6
    assert error.max() < 0.03
    assert (ours["spec"] - theirs["spec"]).abs().max() < 0.003
    assert (ours["spec"] - theirs["spec"]).abs().median() < 1e-6


def test_numbers_of_the_specification():
    assert log_mel(torch.zeros(160_000)).shape == (998, 128)
    assert log_mel(torch.zeros(400)).unique().tolist() == pytest.approx([-15.9424], abs=1e-4)
    empty_bin = log_mel(torch.randn(16_000))[:, 3]  # no FFT bin lies in this triangle
    assert (empty_bin + 15.9424).abs().max() < 1e-4
    padded = spectrogram(torch.zeros(1, clip_samples(1024)), torch.tensor([16_000]), **AUDIOSET)
    assert padded.shape == (1, 1, 1024, 128)
    assert padded[0, 0, 0, 0].item() == pytest.approx(-1.277565, abs=1e-5)  # silence
    assert padded[0, 0, 98, 0].item() == pytest.approx(0.467061, abs=1e-6)  # padding, louder
    assert (padded[0, 0, 98:] == padded[0, 0, 98, 0]).all()
    assert padded[0, 0, 97, 0] < -1


def test_each_clip_of_a_batch_has_its_own_mean_and_length():
    """A clip in a batch, padded, is what it is alone: neither its neighbours nor its padding matter."""
    clips = [tone(5000) + 0.3, tone(9001, hz=1000) - 0.1, tone(400)]
    n_samples = torch.tensor([len(clip) for clip in clips])
    padded = torch.zeros(3, 9001)
    for row, clip in zip(padded, clips):
        row[: len(clip)] = clip
    together = spectrogram(padded, n_samples, **AUDIOSET)
    for row, clip in zip(together, clips):
        alone = (kaldi(clip - clip.mean()) + 4.268) / (2 * 4.569)
        torch.testing.assert_close(row[0, : len(alone)], alone, rtol=0, atol=2e-4)
        assert (row[0, len(alone) :] == torch.tensor(4.268) / torch.tensor(2 * 4.569)).all()


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05)])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_formats_and_rates(tmp_path, suffix, rate, tolerance):
    path = tmp_path / f"x.{suffix}"
    waveform = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(2 * rate) / rate)
    soundfile.write(path, waveform.numpy(), rate)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(32_000) / 16_000)
    ours = load_audio(path)
    if rate != 16_000:
        tolerance = max(tolerance, 2e-3)
    assert ours.dtype == torch.float32
    assert abs(len(ours) - 32_000) <= 2
    inside = slice(2000, 30_000)
    assert (ours[inside] - expected[inside]).abs().max() < tolerance


def test_channels_are_averaged_before_resampling(tmp_path):
    left = tone(44_100, 44_100, 300)
    right = tone(44_100, 44_100, 1000)
    soundfile.write(tmp_path / "stereo.wav", torch.stack([left, right], 1).numpy(), 44_100, subtype="FLOAT")
    expected = torchaudio.functional.resample((left + right) / 2, 44_100, 16_000)
    torch.testing.assert_close(load_audio(tmp_path / "stereo.wav"), expected, rtol=0, atol=1e-6)


RATES = [1000, 3000, 8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 22_051]  # the last as 22,050


@pytest.fixture(params=RATES)
def noisy(request, tmp_path) -> tuple[Path, torch.Tensor]:
    """A file of white noise, which a wrong phase or edge of the filter shows in; and all of it, resampled."""
    rate = request.param
    waveform = 0.2 * torch.randn(2 * rate + 123, generator=torch.Generator().manual_seed(rate))
    soundfile.write(tmp_path / "noise.wav", waveform.numpy(), rate, subtype="FLOAT")
    if rate == 22_051:
        rate = 22_050
    return tmp_path / "noise.wav", torchaudio.functional.resample(waveform, rate, 16_000)


def assert_same_sound(ours: torch.Tensor, theirs: torch.Tensor):
    """As long, and different by at least 100 dB less than it is loud."""
    assert len(ours) == len(theirs) > 0
    ratio = theirs.square().sum() / (ours - theirs).square().sum().clamp(min=1e-30)
    assert 10 * ratio.log10() >= 100


@pytest.mark.parametrize(
    "start, n_samples", [(0, 20_000), (1, 20_000), (159, 400), (160, 400), (16_111, 9000), (24_000, 10**6)]
)
def test_a_part_of_a_file_is_that_part_of_the_whole(noisy, start, n_samples):
    """Read by itself and resampled; without a length it is the rest."""
    path, whole = noisy
    assert_same_sound(load_audio(path), whole)
    assert_same_sound(load_audio(path, start, n_samples), whole[start : start + n_samples])
    assert_same_sound(load_audio(path, start), whole[start:])


EVERY_RATE = [rate for rate in range(8000, 96_001, 25)]


@pytest.mark.parametrize("rates", [EVERY_RATE[::320], pytest.param(EVERY_RATE[::10], marks=pytest.mark.long)])
def test_parts_at_every_rate_divisible_by_25(tmp_path, rates):
    """The first, one from the middle, the last full one, and the rest behind it."""
    for rate in rates:
        waveform = 0.2 * torch.randn(rate + rate // 3, generator=torch.Generator().manual_seed(rate))
        soundfile.write(tmp_path / "x.wav", waveform.numpy(), rate, subtype="FLOAT")
        whole = torchaudio.functional.resample(waveform, rate, 16_000)
        for start in (0, 4321, 15_000, len(whole) - 5000, len(whole) - 400):
            there = whole[start : start + 5000]
            assert_same_sound(load_audio(tmp_path / "x.wav", start, 5000), there)


@pytest.mark.parametrize(
    "suffix, subtype, rates",
    [
        ("wav", "PCM_16", [11_025, 22_051, 37_800]),
        ("flac", "PCM_16", [8000, 22_051, 44_100]),
        ("ogg", "VORBIS", [11_025, 37_800, 44_100]),
        ("opus", "OPUS", [12_000, 16_000, 48_000]),
    ],
)
def test_random_parts_of_files(tmp_path, suffix, subtype, rates):
    """Whatever the format, what is reached by a jump into the file is what reading from its start gives."""
    path = tmp_path / f"x.{suffix}"
    form = "OGG" if subtype in ("VORBIS", "OPUS") else None
    for rate in rates:
        rng = np.random.default_rng(rate)
        samples = 0.2 * rng.standard_normal(4 * rate + 17)
        soundfile.write(path, samples, rate, format=form, subtype=subtype)
        whole = load_audio(path)
        assert len(whole) == pytest.approx(16_000 * len(samples) / rate, rel=0.001)
        for _ in range(6):
            start = int(rng.integers(0, len(whole) - 400))
            n_samples = int(rng.integers(400, 20_000))
            assert_same_sound(load_audio(path, start, n_samples), whole[start : start + n_samples])


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
def test_the_last_seconds_of_a_vorbis_file(tmp_path, rate):
    """Into the last page, which is long where there is little to say, libsndfile does not seek exactly."""
    t = torch.arange(6 * rate) / rate
    soundfile.write(tmp_path / "x.ogg", (0.3 * torch.sin(2000 * t * (1 + t))).numpy(), rate)
    whole = load_audio(tmp_path / "x.ogg")
    for start in range(70_001, 95_000, 2345):
        assert_same_sound(load_audio(tmp_path / "x.ogg", start, 1000), whole[start : start + 1000])


def test_where_a_file_ends(tmp_path):
    """A part that begins behind the end, or too near to it, is refused by its place and length."""
    soundfile.write(tmp_path / "x.wav", tone(16_000).numpy(), 16_000)
    assert len(load_audio(tmp_path / "x.wav", 15_000, 16_000)) == 1000
    assert len(load_audio(tmp_path / "x.wav", 15_600, 16_000)) == 400
    with pytest.raises(InputError, match="too short: 0 samples at 16 kHz from 1.00 s on"):
        load_audio(tmp_path / "x.wav", 16_000, 16_000)
    with pytest.raises(InputError, match="too short: 0 samples at 16 kHz from 62.50 s on"):
        load_audio(tmp_path / "x.wav", 10**6, 16_000)
    with pytest.raises(InputError, match="too short: 399 samples"):
        load_audio(tmp_path / "x.wav", 15_601, 16_000)


def test_silence_is_refused_unless_allowed(tmp_path):
    """By the part that is asked for, not by the whole file."""
    soundfile.write(tmp_path / "x.wav", torch.cat([torch.zeros(16_000), tone(16_000)]).numpy(), 16_000)
    with pytest.raises(InputError, match="^silent$"):
        load_audio(tmp_path / "x.wav", 0, 16_000)
    assert not load_audio(tmp_path / "x.wav", 0, 16_000, allow_silence=True).any()
    assert load_audio(tmp_path / "x.wav", 8000, 16_000).any()


def next_above(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


def next_below(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(0)))


def test_limits_of_what_is_sound():
    assert SILENCE == 1 / 32768  # one step of 16 bits
    assert LOUDEST == 64


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "peak, message",
    [
        (2**-15, ""),
        (next_above(2**-15), ""),
        (next_below(2**-15), "^silent$"),
        (0.0, "^silent$"),
        (64.0, ""),
        (next_below(64.0), ""),
        (next_above(64.0), "its samples reach 64, where full scale is 1"),
        (3000.0, "its samples reach 3000, where full scale is 1: are they unscaled integers"),
        (math.inf, "its samples reach inf"),
        (math.nan, "its samples reach nan"),
    ],
)
def test_the_quietest_and_the_loudest_file(tmp_path, peak, message, sign):
    """One sample, of either sign, decides; silence may be allowed, what is no audio may not."""
    samples = np.zeros(16_000, np.float32)
    samples[777] = sign * peak
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    if message:
        with pytest.raises(InputError, match=message):
            load_audio(tmp_path / "x.wav")
    else:
        assert load_audio(tmp_path / "x.wav").numpy().tolist() == samples.tolist()
    if "reach" in message:
        with pytest.raises(InputError, match=message):
            load_audio(tmp_path / "x.wav", allow_silence=True)
    else:
        assert len(load_audio(tmp_path / "x.wav", allow_silence=True)) == 16_000


@pytest.mark.parametrize(
    "step, gain, message",
    [
        (1, None, ""),
        (-1, None, ""),
        (0, None, "silent"),
        (-32768, None, ""),
        (1, "2", ""),
        (0, "2", "silent"),
        (-32768, "64", ""),
        (32767, "64", ""),
        (-32768, "64.001", "its samples reach 64.001, where full scale is 1"),
        (1, "1e9", "its samples reach 30517.6, where full scale is 1"),
        (1, "1e999", "its samples reach nan"),
        (1, "inf", "its samples reach nan"),
        (1, "nan", "its samples reach nan"),
    ],
)
def test_the_quietest_and_the_loudest_packed_clip(tmp_path, step, gain, message):
    """With the gain, whatever that is: it may be a stranger's."""
    samples = np.zeros(4000, "<i2")
    samples[1000] = step
    samples[3000] = 100  # of the second clip, which stands in
    samples.tofile(tmp_path / "packed.pcm")
    line = "a.wav\t2000\tdog"
    if gain is not None:
        line += f"\t{gain}"
    (tmp_path / "packed.tsv").write_text(f"packed.pcm\n{line}\nb.wav\t2000\tdog\n")
    dataset = AudioDataset(tmp_path / "packed.tsv")
    clip = dataset[0]
    if message:
        assert clip.problem.startswith(f"a.wav\t{message}")
        assert clip.item == 1
    else:
        assert clip.problem == ""
        assert clip.waveform[1000] == step * float(gain or 1) / 32768
        assert clip.waveform.count_nonzero() == 1
    allowing = AudioDataset(tmp_path / "packed.tsv", allow_silence=True)[0]
    assert bool(allowing.problem) == ("reach" in message)


def test_odd_rate_needs_little_memory(tmp_path):
    soundfile.write(tmp_path / "odd.wav", tone(22_051, 22_051).numpy(), 22_051)
    assert abs(len(load_audio(tmp_path / "odd.wav")) - 16_000) < 32


def test_bad_files_are_named(folder):
    for name, message in bad_files(folder).items():
        with pytest.raises(InputError, match=message) as error:
            load_audio(folder / name)
        assert "\n" not in str(error.value)


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "x.wav").symlink_to("nowhere.wav")
    with pytest.raises(InputError, match="^a broken link$"):
        load_audio(tmp_path / "x.wav")


@pytest.mark.parametrize("rate, channels", [(999, 1), (768_001, 1), (16_000, 65)])
def test_implausible_formats_are_refused(tmp_path, rate, channels):
    soundfile.write(tmp_path / "x.wav", np.full((800, channels), 0.1), rate)
    with pytest.raises(InputError, match=f"implausible format: {rate} Hz, {channels} channels"):
        load_audio(tmp_path / "x.wav")


# --- manifests -------------------------------------------------------------------------------------------


def test_manifest(folder):
    manifest = Manifest(folder / "manifest.tsv")
    assert manifest.path(3) == str(folder / "clip 3.wav")
    assert manifest.fields(3) == ["clip 3.wav", "12800", "low"]
    assert manifest.n_samples.tolist() == [8000 + 1600 * i for i in range(8)]


def test_manifest_relative_root_many_labels_no_last_newline(tmp_path):
    """Byte order mark, CRLF, blank lines and a last line without end are read past."""
    (tmp_path / "audio").mkdir()
    text = "\ufeffaudio\r\na b.wav\t1230\tdog, cat,\r\n\r\n\u00e7.wav\t456"
    (tmp_path / "m.tsv").write_bytes(text.encode())
    manifest = Manifest(tmp_path / "m.tsv")
    dataset = AudioDataset(tmp_path / "m.tsv")
    assert manifest.path(0) == str(tmp_path / "audio" / "a b.wav")
    assert manifest.path(1) == str(tmp_path / "audio" / "\u00e7.wav")
    assert manifest.n_samples.tolist() == [1230, 456]
    assert len(dataset) == 2
    assert dataset.labels(0) == ["dog", "cat"]
    assert dataset.labels(1) == []


def test_names_and_labels_of_any_bytes(tmp_path):
    """What is not UTF-8, and characters that Python takes for ends of lines, stay in their line."""
    names = [b"caf\xe9.wav", b"nel\x85x.wav", "two\u2028lines.wav".encode(), b"fs\x1cy.wav", b"c\rr.wav"]
    names += [b" lead.wav", b'"quoted".wav', b"form\x0cfeed.wav"]
    lines = [name + b"\t8000\t" + name[:4] for name in names]
    (tmp_path / "m.tsv").write_bytes(b".\n" + b"\n".join(lines) + b"\n")
    manifest = Manifest(tmp_path / "m.tsv")
    assert [os.fsencode(manifest.fields(i)[0]) for i in range(len(names))] == names
    assert [os.fsencode(os.path.basename(manifest.path(i))) for i in range(len(names))] == names
    for name in names:
        soundfile.write(os.path.join(os.fsencode(tmp_path), name), tone(8000).numpy(), 16_000)
    dataset = AudioDataset(tmp_path / "m.tsv")
    for i in range(len(names)):
        assert dataset[i].problem == ""
    assert dataset.labels(0) == [os.fsdecode(b"caf\xe9")]


def test_the_digest_is_that_of_all_lines_but_the_first(folder):
    """Wherever the files lie, and whatever ends its lines have; any other name, length or label shows."""
    text = (folder / "manifest.tsv").read_text()
    rest = text[text.index("\n") :]
    (folder / "moved.tsv").write_text("." + rest)
    (folder / "bom.tsv").write_text("." + rest, encoding="utf-8-sig")
    digests = [Manifest(folder / name).digest for name in ("manifest.tsv", "moved.tsv", "bom.tsv")]
    assert len(set(digests)) == 1
    (folder / "other.tsv").write_text(text.replace("clip 3", "clip 4"))
    (folder / "labels.tsv").write_text(text.replace("low", "deep"))
    (folder / "length.tsv").write_text(text.replace("12800", "12801"))
    (folder / "less.tsv").write_text(text[: text.rindex("clip 7")])
    digests += [Manifest(folder / f"{name}.tsv").digest for name in ("other", "labels", "length", "less")]
    assert len(set(digests)) == 5


def test_windows_is_asked_for_a_file_by_text(tmp_path, monkeypatch):
    """libsndfile takes bytes there for another encoding; elsewhere bytes may be no text."""
    asked = []

    class Opened(Exception):
        pass

    def open_it(name):
        asked.append(name)
        raise Opened

    (tmp_path / "ü.wav").touch()
    monkeypatch.setattr(soundfile, "SoundFile", open_it)
    for system in ("posix", "nt"):
        with monkeypatch.context() as patch, pytest.raises(InputError):
            patch.setattr(data, "os", types.SimpleNamespace(name=system, path=os.path, fsencode=os.fsencode))
            load_audio(str(tmp_path / "ü.wav"))
    assert asked == [os.fsencode(tmp_path / "ü.wav"), str(tmp_path / "ü.wav")]


@pytest.mark.parametrize("name", ["C:x.wav", "C:/x.wav", "/x.wav", "//server/share/x.wav", "..\\x.wav"])
def test_a_manifest_reaches_no_other_folder_on_windows(folder, monkeypatch, name):
    (folder / "m.tsv").write_text(f"{folder}\n{name}\t16000\n")
    manifest = Manifest(folder / "m.tsv")
    monkeypatch.setattr(data, "Path", PureWindowsPath)
    with pytest.raises(InputError, match="lies outside the manifest's folder"):
        manifest.path(0)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.wav", "a/../../x.wav"])
def test_a_manifest_reaches_no_other_folder(folder, name):
    """A manifest may be a stranger's: what it lists outside of its folder is never opened."""
    (folder / "m.tsv").write_text(f"{folder}\n{name}\t16000\nclip 0.wav\t8000\n")
    with pytest.raises(InputError, match="lies outside the manifest's folder"):
        Manifest(folder / "m.tsv").path(0)
    clip = AudioDataset(folder / "m.tsv")[0]
    assert clip.item == 1
    assert clip.problem == f"{name}\tlies outside the manifest's folder"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no clips"),
        ("/data\n", "lists no clips"),
        ("/data\n\n \n", "lists no clips"),
        ("/data\na.wav\t100\nb.wav\n", "line 3"),
        ("/data\na.wav 100\n", "line 2"),
        ("/data\na.wav\tmany\n", "line 2"),
        ("/data\na.wav\t-3\n", "line 2"),
        ("/data\na.wav\t1.5\n", "line 2"),
        ("/data\na.wav\t\u0661\u0662\n", "line 2"),  # digits, but not ours
        ("/data\na.wav\t\tdog\n", "line 2"),
        ("/data\na.wav\t999999999999\n", "line 2"),
        ("/data\na.wav\t99999999999999999999\n", "line 2"),
        ("/data\na.wav\t" + 5000 * "9" + "\n", "line 2"),
        (f"/data\na.wav\t100\nb.wav\t{2**31}\n", "b.wav cannot be that long"),
        ("/data\na.wav\t9999999999\n", "a.wav cannot be that long"),
    ],
)
def test_malformed_manifest(tmp_path, text, message):
    """The message names the file and the line, and is short, whatever the line holds."""
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(InputError, match=f"m.tsv.*{message}") as error:
        Manifest(tmp_path / "m.tsv")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_the_largest_count_of_samples(tmp_path):
    (tmp_path / "m.tsv").write_text(f".\na.wav\t{2**31 - 1}\nb.wav\t0\n")
    manifest = Manifest(tmp_path / "m.tsv")
    assert manifest.n_samples.tolist() == [2**31 - 1, 0]


@pytest.mark.parametrize("name", ["", "missing.tsv"])
def test_what_is_no_manifest(tmp_path, name):
    with pytest.raises(InputError, match="cannot read the manifest"):
        Manifest(tmp_path / name)


OPEN_MANIFEST = """
import resource, sys, time
import data
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
begin = time.process_time()
lines = []
for line in open(sys.argv[1], "rb"):
    lines.append(line.split(b"\\t"))
    lines.pop()
plain = time.process_time() - begin
before = peak()
begin = time.process_time()
manifest = data.Manifest(sys.argv[1])
took = time.process_time() - begin
print(len(manifest.lines), int(manifest.n_samples.sum()), peak() - before, took / plain)
"""


@pytest.mark.long
def test_two_million_lines(tmp_path):
    """In less than 400 MB, and in a few times the time that only splitting the lines takes."""
    n = 2_000_000
    with open(tmp_path / "m.tsv", "w") as file:
        file.write(".\n")
        for i in range(n):
            file.write(f"a folder/clip number {i:07d}.wav\t{160_000 + i % 7}\t/m/{i % 527:03d}\n")
    command = [sys.executable, "-c", OPEN_MANIFEST, str(tmp_path / "m.tsv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    n_lines, total, megabytes, ratio = map(float, done.stdout.split())
    assert n_lines == n
    assert total == 160_000 * n + sum(i % 7 for i in range(n))
    assert megabytes < 400
    assert ratio < 12  # 3 to 5 is usual


# --- data sets -------------------------------------------------------------------------------------------


def test_long_clips_are_used_in_full(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(16_000 * 7).numpy(), 16_000, subtype="FLOAT")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nlong.wav\t{16_000 * 7}\nlong.wav\t20000\n")
    dataset = AudioDataset(str(tmp_path / "m.tsv"), n_frames=200)
    assert len(dataset) == 3 + 1  # 7 s hold three pieces of 2 s; the second line says 1.25 s
    assert dataset.n_cut == 0
    whole = load_audio(tmp_path / "long.wav")
    for piece in range(3):
        assert torch.equal(dataset.read(piece), whole[32_000 * piece : 32_000 * piece + clip_samples(200)])
    first_only = AudioDataset(tmp_path / "m.tsv", n_frames=200, segments=False)
    assert len(first_only) == 2
    assert first_only.n_cut == 1
    assert torch.equal(first_only.read(0), whole[: clip_samples(200)])
    full = clip_samples(200)
    (tmp_path / "m.tsv").write_text(f".\na.wav\t{full - 1}\nb.wav\t{full}\nc.wav\t{full + 1}\n")
    assert AudioDataset(tmp_path / "m.tsv", n_frames=200, segments=False).n_cut == 1
    assert AudioDataset(tmp_path / "m.tsv", n_frames=200).n_cut == 0


def test_stand_ins_are_always_the_same(folder):
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in bad)
    dataset = AudioDataset(folder / "manifest.tsv")
    for item, message in zip(range(8, len(dataset)), bad.values()):
        clip = dataset[item]
        assert clip.problem.startswith(f"{dataset.name(item)}\t")
        assert message in clip.problem
        assert clip.item == 0
        assert torch.equal(clip.waveform, dataset[0].waveform)
    assert dataset[3].problem == ""
    assert dataset[3].item == 3


def test_a_damaged_long_file_is_stood_in_for_by_another(folder):
    """However many pieces it has: what stands in is the first piece of the next clip that can be read."""
    (folder / "hour.wav").write_bytes(b"RIFF\0\0\0\1")
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "m.tsv").write_text("\n".join([lines[0], f"hour.wav\t{16_000 * 3600}", *lines[1:]]))
    dataset = AudioDataset(folder / "m.tsv", n_frames=64)
    first = 16_000 * 3600 // (64 * 160)
    for item in (0, 17, first - 1):
        clip = dataset[item]
        assert clip.problem.startswith("hour.wav\tunreadable")
        assert clip.item == first
        assert torch.equal(clip.waveform, dataset[first].waveform)
    assert dataset.name(first) == "clip 0.wav"


@pytest.mark.parametrize("n_gone", [999, 1000])
def test_how_many_clips_in_a_row_may_be_gone(folder, n_gone):
    """After a thousand in a row the data must be gone, which ends the run and names the first of them."""
    root, *lines = (folder / "manifest.tsv").read_text().splitlines()
    gone = [f"gone/{i}.wav\t16000\tlow" for i in range(n_gone)]
    (folder / "m.tsv").write_text("\n".join([root, *gone, *lines]) + "\n")
    dataset = AudioDataset(folder / "m.tsv", segments=False)
    if n_gone < 1000:
        clip = dataset[0]
        assert clip.problem == "gone/0.wav\tno such file"
        assert clip.item == n_gone
        assert torch.equal(clip.waveform, load_audio(folder / "clip 0.wav"))
    else:
        with pytest.raises(InputError, match="gone/0.wav no such file; .* is the data still there"):
            dataset[0]
        assert dataset[1].item == n_gone


def test_a_vanished_folder_ends_the_run(tmp_path):
    (tmp_path / "m.tsv").write_text("audio\n" + "".join(f"{i}.wav\t16000\n" for i in range(150)))
    with pytest.raises(InputError, match="line 1: there is no folder"):
        AudioDataset(tmp_path / "m.tsv")
    (tmp_path / "audio").mkdir()
    with pytest.raises(InputError, match="is the data still there") as error:
        AudioDataset(tmp_path / "m.tsv")[0]
    assert "\t" not in str(error.value)


def test_a_manifest_that_claims_more_than_a_file_holds(folder):
    """The pieces that are there are read; for the others the next clip stands in, and the file is named."""
    soundfile.write(folder / "x.wav", tone(48_000 * 8, 48_000).numpy(), 48_000)
    lines = [str(folder), f"x.wav\t{48_000 * 8}", "clip 0.wav\t8000"]  # as counted at 48 kHz
    (folder / "m.tsv").write_text("\n".join(lines))
    dataset = AudioDataset(folder / "m.tsv", n_frames=400)
    assert len(dataset) == 6 + 1
    assert [bool(dataset[i].problem) for i in range(7)] == [False, False, True, True, True, True, False]
    assert dataset[2].problem == "x.wav\ttoo short: 0 samples at 16 kHz from 8.00 s on, a frame needs 400"
    assert dataset[2].item == 6


def test_silent_clips_are_read_if_allowed(folder):
    soundfile.write(folder / "clip 0.wav", np.zeros(8000), 16_000)
    clip = AudioDataset(folder / "manifest.tsv")[0]
    assert clip.problem == "clip 0.wav\tsilent"
    assert clip.item == 1
    clip = AudioDataset(folder / "manifest.tsv", allow_silence=True)[0]
    assert clip.problem == ""
    assert clip.item == 0
    assert not clip.waveform.any()


def test_short_clips_are_left_out_and_listed(folder):
    dataset = AudioDataset(folder / "manifest.tsv", min_samples=12_800)
    assert len(dataset) == 5
    assert dataset.name(0) == "clip 3.wav"  # of exactly 12,800
    reason = "shorter than 12800 samples at 16 kHz"
    assert dataset.too_short == [f"clip {i}.wav\t{reason}" for i in range(3)]
    with pytest.raises(InputError, match="no clip has the 50000 samples"):
        AudioDataset(folder / "manifest.tsv", min_samples=50_000)


def test_what_is_shorter_than_a_frame_is_left_out_always(folder):
    with open(folder / "manifest.tsv", "a") as file:
        file.write("click.wav\t399\tlow\nframe.wav\t400\tlow\n")
    dataset = AudioDataset(folder / "manifest.tsv", min_samples=0)
    assert len(dataset) == 9
    assert dataset.name(8) == "frame.wav"
    assert dataset.too_short == ["click.wav\tshorter than 400 samples at 16 kHz"]
    (folder / "clicks.tsv").write_text(f"{folder}\nclick.wav\t399\n")
    with pytest.raises(InputError, match="no clip has the 400 samples"):
        AudioDataset(folder / "clicks.tsv", min_samples=0)


@pytest.fixture
def packed(tmp_path) -> Path:
    """Three clips of 2,000 samples, counted up from 0, in packed.pcm; the last is divided by a gain of 4."""
    np.arange(6000, dtype="<i2").tofile(tmp_path / "packed.pcm")
    lines = ["packed.pcm", "a.wav\t2000\tdog", "b/c.wav\t2000\tdog,cat", "d.wav\t2000\t\t4"]
    (tmp_path / "packed.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "packed.tsv"


def counted(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop) / 32768


def test_packed_data_is_one_file_of_samples(packed):
    """The clips lie in it in the order of the manifest; a gain makes them as loud as they were."""
    dataset = AudioDataset(packed)
    assert [dataset.name(i) for i in range(3)] == ["a.wav", "b/c.wav", "d.wav"]
    assert [dataset.labels(i) for i in range(3)] == [["dog"], ["dog", "cat"], []]
    assert torch.equal(dataset.read(0), counted(0, 2000))
    assert torch.equal(dataset.read(1), counted(2000, 4000))
    assert torch.equal(dataset.read(2), counted(4000, 6000) * 4)
    assert dataset.read(0).dtype == dataset.read(2).dtype == torch.float32
    pieces = AudioDataset(packed, n_frames=4, min_samples=640)
    assert len(pieces) == 9
    assert pieces.start.tolist() == 3 * [0, 640, 1280]
    assert torch.equal(pieces.read(4), counted(2640, 2640 + clip_samples(4)))
    assert torch.equal(pieces.read(5), counted(3280, 4000))  # and not the next clip


def test_packed_data_may_be_moved(packed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path in (packed, packed.with_suffix(".pcm")):
        path.rename(tmp_path / "elsewhere" / path.name)
    assert len(AudioDataset(tmp_path / "elsewhere" / "packed.tsv").read(0)) == 2000


@pytest.mark.parametrize("size", [0, 11_998, 12_002, None])
def test_packed_data_of_another_size_is_refused(packed, size):
    pcm = packed.with_suffix(".pcm")
    if size is None:
        pcm.unlink()
    else:
        os.truncate(pcm, size)
    with pytest.raises(InputError, match="packed.pcm is missing or has the wrong size: .* pack again"):
        AudioDataset(packed)


def test_packed_data_that_changes_under_a_run_is_noticed(packed):
    """Clips that are gone are stood in for by those that are left, and the last of them ends the run."""
    dataset = AudioDataset(packed)
    pcm = packed.with_suffix(".pcm")
    os.truncate(pcm, 5000)
    clip = dataset[1]
    assert clip.problem.startswith("b/c.wav\t")
    assert "has changed" in clip.problem
    assert clip.item == 0
    pcm.unlink()
    with pytest.raises(InputError, match="b/c.wav .*is the data still there"):
        dataset[1]


@pytest.mark.parametrize("gain", ["x", "1e999", "nan", "-1", ""])
def test_a_gain_that_is_none_spoils_its_clip_only(packed, gain):
    """A stranger's packed data may say anything: the clip is stood in for or finite, and no more fails."""
    packed.write_text(packed.read_text().replace("\t4\n", f"\t{gain}\n"))
    clip = AudioDataset(packed)[2]
    assert clip.waveform.isfinite().all()
    if gain != "-1":
        assert clip.problem.startswith("d.wav\t")
        assert clip.item == 0


# --- labels ------------------------------------------------------------------------------------------------


def test_labelled_data(folder):
    """The classes are the labels found, in their order, or those that are given; a clip has one row."""
    found = open_labelled(folder / "manifest.tsv", n_frames=20)
    assert found.classes == {"high": "high", "low": "low"}
    assert len(found.data) == 8
    assert found.targets.tolist() == 4 * [[False, True]] + 4 * [[True, False]]
    classes = {"low": "Deep", "other": "Other", "high": "High"}
    given = open_labelled(folder / "manifest.tsv", 64, classes)
    assert given.classes == classes
    assert given.targets.tolist() == 4 * [[True, False, False]] + 4 * [[False, False, True]]
    short = open_labelled(folder / "manifest.tsv", 64, min_samples=15_000)
    assert len(short.data) == len(short.targets) == 3
    assert list(short.classes) == ["high"]


def test_labels_are_the_same_in_either_spelling_of_accents(folder):
    """Composed (NFC) in one line and decomposed (NFD) in another, as file systems give them: one class."""
    composed = unicodedata.normalize("NFC", "\u00e9tude")
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    text = (folder / "manifest.tsv").read_text()
    (folder / "m.tsv").write_text(text.replace("low", composed).replace("high", f"b, {decomposed} "))
    found = open_labelled(folder / "m.tsv", 64)
    assert list(found.classes) == ["b", composed]
    assert found.targets.tolist() == 4 * [[False, True]] + 4 * [[True, True]]
    given = open_labelled(folder / "m.tsv", 64, {composed: "Study", "b": "B"})
    assert torch.equal(given.targets, found.targets.flip(1))


@pytest.mark.parametrize(
    "label, message",
    [
        ("", "clip 3.wav has no label"),
        ("\t , ", "clip 3.wav has no label"),
        ("\tlow,bass", "clip 3.wav has an unknown label: 'bass'"),
    ],
)
def test_labels_that_are_missing_or_unknown(folder, label, message):
    text = (folder / "manifest.tsv").read_text().replace("12800\tlow", f"12800{label}")
    (folder / "m.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        open_labelled(folder / "m.tsv", 64, {"low": "Low", "high": "High"})


# --- order -----------------------------------------------------------------------------------------------


def stream(n_batches: int, **kwargs) -> list[list[int]]:
    settings = dict(n_items=10, batch_size=8, seed=3) | kwargs
    sampler = iter(ClipSampler(**settings))
    return [next(sampler) for _ in range(n_batches)]


def epochs_of(items: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]


def test_every_epoch_is_a_new_permutation():
    """One epoch after the other without a gap, though batches do not divide it; another for another seed."""
    epochs = epochs_of(sum(stream(50), []), 10)
    assert len(epochs) == 40
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len(set(epochs)) == 40
    assert epochs_of(sum(stream(50, seed=4), []), 10)[0] != epochs[0]
    first = [epoch[0] for epoch in epochs_of(sum(stream(2000), []), 10)]
    counts = np.bincount(first, minlength=10)  # each item comes first in a tenth of the epochs
    assert np.abs(counts - 160).max() < 5 * math.sqrt(160 * 0.9)


@pytest.mark.parametrize("weights", [None, torch.arange(1.0, 11)])
def test_any_division_and_any_start_give_the_same_stream(weights):
    """Of an update each process and each part has its share, in order: whatever the division."""
    more = dict(weights=weights, epoch_items=7)
    whole = stream(20, **more)
    for world, accumulate in ((1, 4), (2, 1), (2, 2), (4, 2), (8, 1)):
        parts = []
        for rank in range(world):
            share = dict(rank=rank, world=world, accumulate=accumulate)
            parts.append(stream(20 * accumulate, **share, **more))
        for step in range(20):
            together = []
            for part in parts:
                for items in part[step * accumulate : (step + 1) * accumulate]:
                    together += items
            assert together == whole[step]
    assert stream(5, start=15, **more) == whole[15:]


def test_rows_are_the_places_of_a_part_in_its_update():
    sampler = ClipSampler(100, 24, seed=0, rank=1, world=3, accumulate=2)
    assert list(sampler.rows(0)) == [8, 9, 10, 11]
    assert list(sampler.rows(1)) == [12, 13, 14, 15]


def test_weighted_epochs_draw_items_by_their_weight_and_none_twice():
    """The first item of each epoch is drawn in proportion; within one, the heavy ones do not come first."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    n_epochs = 2000
    items = sum(stream(n_epochs, n_items=5, batch_size=2, weights=weights, epoch_items=2), [])
    epochs = epochs_of(items, 2)
    for first, second in epochs:
        assert first != second
    drawn = np.bincount(items, minlength=5) / n_epochs
    expected = np.zeros(5)  # of two draws without replacement
    p = (weights / weights.sum()).numpy()
    for i in range(5):
        expected[i] = p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i)
    assert np.abs(drawn - expected).max() < 0.05
    in_front = np.bincount([epoch[0] for epoch in epochs], minlength=5) / n_epochs
    assert np.abs(in_front - expected / 2).max() < 0.04  # each of the two is as often in front
    whole = epochs_of(sum(stream(10, n_items=4, batch_size=4, weights=weights[:4], epoch_items=99), []), 4)
    for epoch in whole:  # no more than there are
        assert sorted(epoch) == [0, 1, 2, 3]


# --- loader ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_loader_is_the_same_for_any_number_of_threads(folder, workers):
    dataset = AudioDataset(folder / "manifest.tsv", n_frames=100)

    def first(n_workers):
        loader = iter(build_loader(dataset, ClipSampler(len(dataset), 3, seed=0), n_workers))
        return [next(loader) for _ in range(25)]

    for ours, theirs in zip(first(workers), first(0)):
        assert torch.equal(ours.waveform, theirs.waveform)
        assert torch.equal(ours.n_samples, theirs.n_samples)
        assert ours.items == theirs.items
        assert ours.problems == theirs.problems == ["", "", ""]


def test_batches_are_padded_and_name_what_stands_in(folder):
    """Behind the sound are zeros; a row that stands in says for which file, and why."""
    (folder / "clip 2.wav").unlink()
    dataset = AudioDataset(folder / "manifest.tsv", n_frames=100)
    batches = list(build_loader(dataset, [[1, 2, 7], [0]], workers=0))
    assert len(batches) == 2
    batch = batches[0]
    assert batch.waveform.shape == (3, clip_samples(100))
    assert batch.waveform.dtype == torch.float32
    assert batch.n_samples.tolist() == [9600, 12_800, clip_samples(100)]
    assert batch.items == [1, 3, 7]
    assert batch.problems == ["", "clip 2.wav\tno such file", ""]
    for row, item, n in zip(batch.waveform, batch.items, batch.n_samples):
        assert torch.equal(row[:n], dataset.read(item))
        assert not row[n:].any()


def test_batches_of_packed_clips_are_float32(packed):
    """Whatever clips are in a batch, with a gain or without."""
    dataset = AudioDataset(packed)
    whole, mixed = build_loader(dataset, [[0, 1], [0, 2]], workers=0)
    assert whole.waveform.dtype == mixed.waveform.dtype == torch.float32
    assert torch.equal(whole.waveform[0], mixed.waveform[0])
    assert torch.equal(mixed.waveform[1, :2000], dataset.read(2))


class Slow:
    """A data set of zeros; `seen` notes the items that were read, and by which thread."""

    source = "slow.tsv"
    n_frames = 4

    def __init__(self, hangs_at: int = -1):
        self.seen = []
        self.hangs_at = hangs_at
        self.go_on = threading.Event()

    def __getitem__(self, item: int) -> data.Clip:
        self.seen.append((item, threading.get_ident()))
        if item == self.hangs_at:
            self.go_on.wait(60)
        time.sleep(0.01)
        return data.Clip(torch.zeros(400), item, "")


def test_threads_read_ahead_but_not_without_end(folder):
    """As many threads as are asked for, four batches for each of them ahead; none goes on when it is left."""
    dataset = Slow()
    loader = build_loader(dataset, ([i] for i in range(10**9)), workers=3)
    first = next(loader)
    assert first.items == [0]
    time.sleep(0.5)
    assert len(dataset.seen) == 4 * 3 + 1
    assert len({thread for _, thread in dataset.seen}) == 3
    assert threading.get_ident() not in {thread for _, thread in dataset.seen}
    loader.close()
    time.sleep(0.1)
    n_seen = len(dataset.seen)
    time.sleep(0.3)
    assert len(dataset.seen) == n_seen


def test_a_read_that_hangs_is_an_error():
    """After the time that is given; what was read before it has been delivered."""
    dataset = Slow(hangs_at=2)
    loader = build_loader(dataset, [[0], [1], [2], [3]], workers=2, timeout=0.5)
    items = []
    with pytest.raises(TimeoutError, match="no batch for 0 s: reading slow.tsv hangs"):
        for batch in loader:
            items += batch.items
    assert items == [0, 1]
    dataset.go_on.set()


def test_an_error_of_a_thread_is_raised_where_the_batch_is_wanted(folder):
    dataset = AudioDataset(folder / "manifest.tsv")
    for path in folder.glob("*.wav"):
        path.unlink()
    with pytest.raises(InputError, match="is the data still there"):
        next(build_loader(dataset, [[0]], workers=2))


def test_what_was_to_be_read_is_not_when_the_loader_is_left():
    """But for the read that a thread is in: a run that ends does not wait for others."""
    dataset = Slow(hangs_at=1)
    loader = build_loader(dataset, ([i] for i in range(10**9)), workers=1)
    assert next(loader).items == [0]
    loader.close()
    dataset.go_on.set()
    time.sleep(0.3)
    assert len(dataset.seen) <= 2


def test_seeds_differ_by_purpose_and_key():
    seeds = set()
    n_keys = 0
    for purpose in ("masks", "noise"):
        for seed in range(4):
            for i in range(20):
                for j in range(20):
                    seeds.add(data.seed_of(purpose, seed, i, j))
                    n_keys += 1
    assert len(seeds) == n_keys
    assert max(seeds) < 2**63


def test_seeds_stay_what_they_were():
    """Runs that were made before go on with the same order, masks and noise."""
    assert data.seed_of("order", 1, 0) == 7102875520146025664
    assert data.seed_of("masks", 1, 7) == 1018360188302116769
    assert data.seed_of("noise", 2, 3, 4) == 84224150360659214


def test_demo_is_labelled_and_attributed():
    """Every probe class is in both halves, which share no clip; every file is used, its origin named."""
    train = AudioDataset(DEMO / "train.tsv", segments=False)
    test = AudioDataset(DEMO / "test.tsv", segments=False)
    unlabelled = AudioDataset(DEMO / "pretrain.tsv")
    classes = []
    used = []
    for dataset in (train, test, unlabelled):
        classes.append({label for i in range(len(dataset)) for label in dataset.labels(i)[:1]})
        used.append({DEMO / dataset.name(i) for i in range(len(dataset))})
    assert classes[0] == classes[1]
    assert len(classes[0]) == 10
    assert not (used[0] | used[2]) & used[1]
    shipped = set(DEMO.rglob("*.opus"))
    assert set.union(*used) == shipped
    origins = {DEMO / line.split("\t")[0] for line in (DEMO / "origin.tsv").read_text().splitlines()[1:]}
    assert origins == shipped
    text = (DEMO / "README.md").read_text()
    for path in shipped:
        assert f"`{path.relative_to(DEMO).parts[0]}/" in text
