"""Front end, files, manifests, data sets, and the order in which clips are read."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT, tone

import data
from data import (
    AudioDataset,
    ClipSampler,
    InputError,
    Manifest,
    build_loader,
    clip_samples,
    load_audio,
    log_mel,
    open_labelled,
    read_pieces,
    resample,
    spectrogram,
    to_float,
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
    real = [dataset.read(i) for i in range(0, len(dataset), math.ceil(len(dataset) / 50))]
    noise = [torch.randn(400 + 997 * i, generator=generator) * 10 ** (-i / 10) for i in range(60)]
    assert len(real) + len(noise) >= 100
    for waveform in real + noise:
        assert (log_mel(waveform) - kaldi(waveform)).abs().max() <= 1e-4


def test_log_mel_is_batched():
    waveform = torch.stack([tone(9000), tone(9000, hz=3000)])
    expected = torch.stack([log_mel(row) for row in waveform])
    torch.testing.assert_close(log_mel(waveform), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100])
def test_golden_front_end(rate):
    """Against another machine, whose FFT rounds otherwise: it shows where a bin is far below the loudest."""
    ours = {"resampled_16k": resample(torch.from_numpy(GOLDEN[f"chirp_{rate}/waveform"]), rate)}
    waveform = ours["resampled_16k"]
    ours["log_mel"] = log_mel(waveform - waveform.mean())
    padded = torch.nn.functional.pad(waveform, (0, clip_samples(1024) - len(waveform)))
    ours["spec"] = spectrogram(padded[None], torch.tensor([len(waveform)]), **AUDIOSET)[0, 0]
    theirs = {name: torch.from_numpy(GOLDEN[f"chirp_{rate}/{name}"]) for name in ours}
    torch.testing.assert_close(ours["resampled_16k"], theirs["resampled_16k"], rtol=0, atol=1e-6)
    error, audible = (ours["log_mel"] - theirs["log_mel"]).abs(), theirs["log_mel"] > -8
    assert 0.05 < audible.float().mean() < 0.2  # a chirp: the rest of each frame is rounding
    assert error[audible].max() < 1e-4 and error.median() < 1e-6 and error.max() < 0.03
    assert (ours["spec"] - theirs["spec"]).abs().max() < 0.003
    assert (ours["spec"] - theirs["spec"]).abs().median() < 1e-6


def test_numbers_of_the_specification():
    assert log_mel(torch.zeros(160_000)).shape == (998, 128)
    assert log_mel(torch.zeros(400)).unique().tolist() == pytest.approx([-15.9424], abs=1e-4)
    assert (
        log_mel(torch.randn(16_000))[:, 3] + 15.9424
    ).abs().max() < 1e-4  # no FFT bin lies in this triangle
    padded = spectrogram(torch.zeros(1, clip_samples(1024)), torch.tensor([16_000]), **AUDIOSET)
    assert padded.shape == (1, 1, 1024, 128)
    assert padded[0, 0, 0, 0].item() == pytest.approx(-1.277565, abs=1e-5)  # silence
    assert padded[0, 0, 98, 0].item() == pytest.approx(0.467061, abs=1e-6)  # padding, louder
    assert (padded[0, 0, 98:] == padded[0, 0, 98, 0]).all() and padded[0, 0, 97, 0] < -1


def test_int16_and_float_agree():
    waveform = (tone(16_000) * 32768).round()
    n = torch.tensor([16_000])
    ours = [spectrogram(x[None], n, **AUDIOSET) for x in (waveform.to(torch.int16), waveform / 32768)]
    assert torch.equal(*ours)


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_formats_and_rates(tmp_path, suffix, rate, tolerance):
    path = tmp_path / f"x.{suffix}"
    waveform = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(2 * rate) / rate)
    soundfile.write(path, waveform.numpy(), rate)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(32_000) / 16_000)
    ours = load_audio(path)
    assert abs(len(ours) - 32_000) <= 2
    inside = slice(2000, 30_000)
    assert (ours[inside] - expected[inside]).abs().max() < max(tolerance, 2e-3 if rate != 16_000 else 0)


def test_channels_are_averaged_before_resampling(tmp_path):
    left, right = tone(44_100, 44_100, 300), tone(44_100, 44_100, 1000)
    soundfile.write(tmp_path / "stereo.wav", torch.stack([left, right], 1).numpy(), 44_100, subtype="FLOAT")
    expected = torchaudio.functional.resample((left + right) / 2, 44_100, 16_000)
    torch.testing.assert_close(load_audio(tmp_path / "stereo.wav"), expected, rtol=0, atol=1e-6)


RATES = [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 22_051]  # the last is taken for 22,050


@pytest.fixture(params=RATES)
def noisy(request, tmp_path) -> tuple[Path, torch.Tensor]:
    """A file of white noise, which a wrong phase or edge of the filter shows in; and all of it, resampled."""
    rate = request.param
    waveform = 0.2 * torch.randn(2 * rate + 123, generator=torch.Generator().manual_seed(rate))
    soundfile.write(tmp_path / "noise.wav", waveform.numpy(), rate, subtype="FLOAT")
    return tmp_path / "noise.wav", resample(waveform, rate)


def assert_same_sound(ours: torch.Tensor, theirs: torch.Tensor):
    """As long, and different by at least 100 dB less than it is loud."""
    assert len(ours) == len(theirs) > 0
    ratio = theirs.square().sum() / (ours - theirs).square().sum().clamp(min=1e-30)
    assert 10 * ratio.log10() >= 100


@pytest.mark.parametrize(
    "width, hop, start",
    [
        (5000, 5000, 0),
        (6000, 4000, 0),
        (3000, 7001, 0),
        (163_840, 163_840, 0),
        (5000, 4321, 12_345),
        (9000, 30, 24_995),
    ],
)
def test_pieces_are_slices_of_the_resampled_file(noisy, width, hop, start):
    """Side by side, overlapping or apart, from the first sample or a later one, to the short last piece."""
    path, whole = noisy
    pieces = list(read_pieces(path, width, hop, start))
    places = range(start, len(whole), hop)
    assert len(pieces) == len(places)
    for piece, at in zip(pieces, places):
        assert_same_sound(piece, whole[at : at + width])


@pytest.mark.parametrize(
    "start, n_samples", [(0, 20_000), (1, 20_000), (159, 400), (16_111, 9000), (24_000, 10**6)]
)
def test_segments_are_cut_from_the_resampled_file(noisy, start, n_samples):
    """A part of a file, read by itself, is that part of the whole; without a length it is the rest."""
    path, whole = noisy
    assert_same_sound(load_audio(path), whole)
    assert_same_sound(load_audio(path, start, n_samples), whole[start : start + n_samples])
    assert_same_sound(load_audio(path, start), whole[start:])


EVERY_RATE = [rate for rate in range(8000, 96_001, 25)]


@pytest.mark.parametrize("rates", [EVERY_RATE[::320], pytest.param(EVERY_RATE[::10], marks=pytest.mark.long)])
def test_pieces_at_every_rate_divisible_by_25(tmp_path, rates):
    """The first, one from the middle, the last full one, and the rest behind it."""
    for rate in rates:
        waveform = 0.2 * torch.randn(rate + rate // 3, generator=torch.Generator().manual_seed(rate))
        soundfile.write(tmp_path / "x.wav", waveform.numpy(), rate, subtype="FLOAT")
        whole = resample(waveform, rate)
        for start in (0, 4321, 15_000, len(whole) - 5000, len(whole) - 400):
            there = whole[start : start + 5000]
            assert_same_sound(load_audio(tmp_path / "x.wav", start, 5000), there)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
def test_the_last_seconds_of_a_vorbis_file(tmp_path, rate):
    """Into the last page, which is long where there is little to say, libsndfile does not seek exactly."""
    t = torch.arange(6 * rate) / rate
    soundfile.write(tmp_path / "x.ogg", (0.3 * torch.sin(2000 * t * (1 + t))).numpy(), rate)
    whole = load_audio(tmp_path / "x.ogg")
    for start in range(70_001, 95_000, 2345):
        assert_same_sound(load_audio(tmp_path / "x.ogg", start, 1000), whole[start : start + 1000])


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_segments_of_compressed_files(tmp_path, suffix):
    """What is reached by a jump into a file is what reading it from the start gives."""
    waveform = 0.2 * torch.randn(4 * 44_100, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / f"x.{suffix}", waveform.numpy(), 44_100)
    whole = load_audio(tmp_path / f"x.{suffix}")
    for start in (5000, 20_000, 40_001):
        assert_same_sound(load_audio(tmp_path / f"x.{suffix}", start, 12_000), whole[start : start + 12_000])


def test_where_a_file_ends(tmp_path):
    """A part that begins behind the end, or too near to it, is refused by its place and length."""
    soundfile.write(tmp_path / "x.wav", tone(16_000).numpy(), 16_000)
    assert len(load_audio(tmp_path / "x.wav", 15_000, 16_000)) == 1000
    with pytest.raises(InputError, match="has no sound at 1.00 s"):
        load_audio(tmp_path / "x.wav", 16_000, 16_000)
    with pytest.raises(InputError, match="has no sound at 62.50 s"):
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


def test_odd_rate_needs_little_memory(tmp_path):
    soundfile.write(tmp_path / "odd.wav", tone(22_051, 22_051).numpy(), 22_051)
    assert abs(len(load_audio(tmp_path / "odd.wav")) - 16_000) < 32


def bad_files(folder: Path) -> dict[str, str]:
    """Broken audio of many kinds, and a word of what is said about each."""
    wav = (folder / "clip 0.wav").read_bytes()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not audio at all")
    (folder / "truncated.flac").write_bytes(b"fLaC" + b"\0" * 20)
    (folder / "header only.wav").write_bytes(wav[:44])
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "short.wav", np.ones(100) / 2, 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    return {
        "missing.wav": "no such file", "empty.wav": "unreadable", "text.wav": "unreadable",
        "truncated.flac": "unreadable", "header only.wav": "too short", "silent.wav": "silent",
        "short.wav": "too short", "nan.wav": "its samples reach nan", "folder.wav": "no such file",
    }  # fmt: skip


def test_bad_files_are_named(folder):
    for name, message in bad_files(folder).items():
        with pytest.raises(InputError, match=message) as error:
            load_audio(folder / name)
        assert "\n" not in str(error.value)


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
    manifest, dataset = Manifest(tmp_path / "m.tsv"), AudioDataset(tmp_path / "m.tsv")
    assert manifest.path(0) == str(tmp_path / "audio" / "a b.wav") and dataset.labels(0) == ["dog", "cat"]
    assert manifest.path(1) == str(tmp_path / "audio" / "ç.wav") and dataset.labels(1) == []
    assert manifest.n_samples.tolist() == [1230, 456] and len(dataset) == 2


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.wav", "a/../../x.wav"])
def test_a_manifest_reaches_no_other_folder(folder, name):
    """A manifest may be a stranger's: what it lists outside of its folder is never opened."""
    (folder / "m.tsv").write_text(f"{folder}\n{name}\t16000\nclip 0.wav\t8000\n")
    with pytest.raises(InputError, match="lies outside the manifest's folder"):
        Manifest(folder / "m.tsv").path(0)
    clip = AudioDataset(folder / "m.tsv")[0]
    assert clip.item == 1 and clip.problem == f"{name}\tlies outside the manifest's folder"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no clips"),
        ("/data\n", "lists no clips"),
        ("/data\na.wav\t100\nb.wav\n", "line 3"),
        ("/data\na.wav 100\n", "line 2"),
        ("/data\na.wav\tmany\n", "line 2"),
        ("/data\na.wav\t-3\n", "line 2"),
        ("/data\na.wav\t1.5\n", "line 2"),
        ("/data\na.wav\t\tdog\n", "line 2"),
        ("/data\na.wav\t999999999999\n", "line 2"),
        ("/data\na.wav\t99999999999999999999\n", "line 2"),
        ("/data\na.wav\t" + 5000 * "9" + "\n", "line 2"),
    ],
)
def test_malformed_manifest(tmp_path, text, message):
    """The message names the file and the line, and is short, whatever the line holds."""
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(InputError, match=f"m.tsv.*{message}") as error:
        Manifest(tmp_path / "m.tsv")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["", "missing.tsv"])
def test_what_is_no_manifest(tmp_path, name):
    with pytest.raises(InputError, match="cannot read the manifest"):
        Manifest(tmp_path / name)


# --- data sets -------------------------------------------------------------------------------------------


def test_long_clips_are_used_in_full(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(16_000 * 7).numpy(), 16_000, subtype="FLOAT")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nlong.wav\t{16_000 * 7}\nlong.wav\t20000\n")
    dataset = AudioDataset(str(tmp_path / "m.tsv"), n_frames=200)
    assert len(dataset) == 3 + 1  # 7 s hold three pieces of 2 s; the second line says 1.25 s
    whole = load_audio(tmp_path / "long.wav")
    for piece in range(3):
        assert torch.equal(dataset.read(piece), whole[32_000 * piece : 32_000 * piece + clip_samples(200)])
    assert len(AudioDataset(tmp_path / "m.tsv", n_frames=200, segments=False)) == 2


def test_stand_ins_are_always_the_same(folder):
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in bad)
    dataset = AudioDataset(folder / "manifest.tsv")
    for item, message in zip(range(8, len(dataset)), bad.values()):
        clip = dataset[item]
        assert clip.problem.startswith(f"{dataset.name(item)}\t") and message in clip.problem
        assert torch.equal(clip.waveform, dataset[0].waveform) and clip.item == 0
    assert dataset[3].problem == "" and dataset[3].item == 3


def test_a_damaged_long_file_is_stood_in_for_by_another(folder):
    """However many pieces it has: what stands in is the first piece of the next clip that can be read."""
    (folder / "hour.wav").write_bytes(b"RIFF")
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "m.tsv").write_text("\n".join([lines[0], f"hour.wav\t{16_000 * 3600}", *lines[1:]]))
    dataset = AudioDataset(folder / "m.tsv", n_frames=64)
    first = 16_000 * 3600 // (64 * 160)
    for item in (0, 17, first - 1):
        clip = dataset[item]
        assert clip.problem.startswith("hour.wav\tunreadable") and clip.item == first
        assert torch.equal(clip.waveform, dataset[first].waveform)
    assert dataset.name(first) == "clip 0.wav"


def test_a_folder_that_is_gone_from_a_big_data_set_is_stood_in_for(folder):
    """However many clips it had: after the next 1,000, clips farther away are tried."""
    root, *lines = (folder / "manifest.tsv").read_text().splitlines()
    gone = [f"gone/{i}.wav\t16000\tlow" for i in range(3000)]
    (folder / "m.tsv").write_text("\n".join([root, *lines[:4], *gone, *lines[4:] * 100]) + "\n")
    dataset = AudioDataset(folder / "m.tsv", segments=False)
    for item in (4, 1000, 3003):
        clip, again = dataset[item], dataset[item]
        assert clip.problem == f"gone/{item - 4}.wav\tno such file" and clip.item > 3003
        assert clip.item == again.item
    assert dataset[3003].item == 3004  # the next, as long as one of the next can be read


def test_a_vanished_folder_ends_the_run(tmp_path):
    (tmp_path / "m.tsv").write_text("audio\n" + "".join(f"{i}.wav\t16000\n" for i in range(150)))
    with pytest.raises(InputError, match="line 1: there is no folder"):
        AudioDataset(tmp_path / "m.tsv")
    (tmp_path / "audio").mkdir()
    with pytest.raises(InputError, match="Is the data still there"):
        AudioDataset(tmp_path / "m.tsv")[0]


def test_a_manifest_that_claims_more_than_a_file_holds(folder):
    """The pieces that are there are read; for the others the next clip stands in, and the file is named."""
    soundfile.write(folder / "x.wav", tone(48_000 * 8, 48_000).numpy(), 48_000)
    lines = [str(folder), f"x.wav\t{48_000 * 8}", "clip 0.wav\t8000"]  # as counted at 48 kHz
    (folder / "m.tsv").write_text("\n".join(lines))
    dataset = AudioDataset(folder / "m.tsv", n_frames=400)
    assert len(dataset) == 6 + 1
    assert [bool(dataset[i].problem) for i in range(7)] == [False, False, True, True, True, True, False]
    assert dataset[2].problem == "x.wav\thas no sound at 8.00 s" and dataset[2].item == 6


def test_silent_clips_are_read_if_allowed(folder):
    soundfile.write(folder / "clip 0.wav", np.zeros(8000), 16_000)
    clip = AudioDataset(folder / "manifest.tsv")[0]
    assert clip.problem == "clip 0.wav\tsilent" and clip.item == 1
    clip = AudioDataset(folder / "manifest.tsv", allow_silence=True)[0]
    assert not clip.problem and clip.item == 0 and not clip.waveform.any()


def test_the_data_is_known_by_what_is_listed(folder):
    text = (folder / "manifest.tsv").read_text()
    (folder / "moved.tsv").write_text("." + text[text.index("\n") :])
    (folder / "other.tsv").write_text(text.replace("clip 3", "clip 4"))
    (folder / "labels.tsv").write_text(text.replace("low", "deep"))
    names = ("manifest.tsv", "moved.tsv", "other.tsv", "labels.tsv")
    digests = [AudioDataset(folder / name).digest() for name in names]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_short_clips_are_left_out(folder):
    dataset = AudioDataset(folder / "manifest.tsv", min_samples=12_000)
    assert len(dataset) == 5 and dataset.name(0) == "clip 3.wav"
    short = [dataset.manifest.fields(line)[0] for line in dataset.too_short.tolist()]
    assert short == ["clip 0.wav", "clip 1.wav", "clip 2.wav"]
    with pytest.raises(InputError, match="no clip has the 50000 samples"):
        AudioDataset(folder / "manifest.tsv", min_samples=50_000)


@pytest.fixture
def packed(tmp_path) -> Path:
    """Three clips of 2,000 samples, counted up from 0, in packed.pcm; the last is divided by a gain of 4."""
    np.arange(6000, dtype="<i2").tofile(tmp_path / "packed.pcm")
    lines = ["packed.pcm", "a.wav\t2000\tdog", "b/c.wav\t2000\tdog,cat", "d.wav\t2000\t\t4"]
    (tmp_path / "packed.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "packed.tsv"


def test_packed_data_is_one_file_of_samples(packed):
    """The clips lie in it in the order of the manifest; a gain makes them as loud as they were."""
    dataset = AudioDataset(packed)
    assert [dataset.name(i) for i in range(3)] == ["a.wav", "b/c.wav", "d.wav"]
    assert [dataset.labels(i) for i in range(3)] == [["dog"], ["dog", "cat"], []]
    assert torch.equal(dataset.read(0), torch.arange(2000, dtype=torch.int16))
    assert torch.equal(dataset.read(1), torch.arange(2000, 4000, dtype=torch.int16))
    assert torch.equal(dataset.read(2), torch.arange(4000, 6000) * 4 / 32768)
    pieces = AudioDataset(packed, n_frames=4, min_samples=640)
    assert len(pieces) == 9 and pieces.start.tolist() == 3 * [0, 640, 1280]
    assert torch.equal(pieces.read(4), torch.arange(2640, 2640 + clip_samples(4), dtype=torch.int16))
    assert torch.equal(pieces.read(5), torch.arange(3280, 4000, dtype=torch.int16))  # and not the next clip


def test_packed_data_may_be_moved(packed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path in (packed, packed.with_suffix(".pcm")):
        path.rename(tmp_path / "elsewhere" / path.name)
    assert len(AudioDataset(tmp_path / "elsewhere" / "packed.tsv").read(0)) == 2000


@pytest.mark.parametrize("change", [lambda pcm: pcm[:-2], lambda pcm: pcm + b"\0\0", lambda pcm: b"", None])
def test_packed_data_of_another_size_is_refused(packed, change):
    pcm = packed.with_suffix(".pcm")
    pcm.write_bytes(change(pcm.read_bytes())) if change else pcm.unlink()
    with pytest.raises(InputError, match="packed.pcm is missing or has the wrong size: .* pack again"):
        AudioDataset(packed)


def test_packed_data_that_changes_under_a_run_is_noticed(packed):
    """Clips that are gone are stood in for by those that are left, and the last of them ends the run."""
    dataset, pcm = AudioDataset(packed), packed.with_suffix(".pcm")
    pcm.write_bytes(pcm.read_bytes()[:5000])
    clip = dataset[1]
    assert clip.problem.startswith("b/c.wav\t") and "has changed" in clip.problem and clip.item == 0
    pcm.unlink()
    with pytest.raises(InputError, match="b/c.wav .*Is the data still there"):
        dataset[1]


@pytest.mark.parametrize("gain", ["x", "1e999", "nan", "-1", ""])
def test_a_gain_that_is_none_spoils_its_clip_only(packed, gain):
    """A stranger's packed data may say anything: the clip is stood in for or finite, and no more fails."""
    packed.write_text(packed.read_text().replace("\t4\n", f"\t{gain}\n"))
    clip = AudioDataset(packed)[2]
    assert (clip.problem.startswith("d.wav\t") and clip.item == 0) or to_float(clip.waveform).isfinite().all()


# --- labels ------------------------------------------------------------------------------------------------


def test_labelled_data(folder):
    """The classes are the labels found, in their order, or those that are given; a clip has one row."""
    found = open_labelled(folder / "manifest.tsv", n_frames=20)
    assert found.classes == {"high": "high", "low": "low"} and len(found.data) == 8
    assert found.targets.tolist() == 4 * [[False, True]] + 4 * [[True, False]]
    classes = {"low": "Deep", "other": "Other", "high": "High"}
    given = open_labelled(folder / "manifest.tsv", 64, classes)
    assert given.classes == classes
    assert given.targets.tolist() == 4 * [[True, False, False]] + 4 * [[False, False, True]]
    short = open_labelled(folder / "manifest.tsv", 64, min_samples=15_000)
    assert len(short.data) == len(short.targets) == 3 and list(short.classes) == ["high"]


@pytest.mark.parametrize(
    "label, message",
    [
        ("", "clip 3.wav has no label"),
        ("\tlow,bass", "clip 3.wav has the labels .*'bass'.*not all among the 2"),
    ],
)
def test_labels_that_are_missing_or_unknown(folder, label, message):
    text = (folder / "manifest.tsv").read_text().replace("12800\tlow", f"12800{label}")
    (folder / "m.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        open_labelled(folder / "m.tsv", 64, {"low": "Low", "high": "High"})


# --- order -----------------------------------------------------------------------------------------------


def stream(n_batches: int, **kwargs) -> list[list[int]]:
    sampler = iter(ClipSampler(n_items=10, batch_size=8, seed=3, **kwargs))
    return [next(sampler) for _ in range(n_batches)]


def test_every_epoch_is_a_permutation():
    flat = sum(stream(50), [])
    epochs = [flat[i : i + 10] for i in range(0, 400, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) > 30


def test_any_division_and_any_start_give_the_same_stream():
    whole = stream(20)
    for world, accumulate in ((1, 4), (2, 1), (2, 2), (4, 2)):
        parts = [
            stream(20 * accumulate, rank=rank, world=world, accumulate=accumulate) for rank in range(world)
        ]
        for step in range(20):
            own = slice(step * accumulate, (step + 1) * accumulate)
            assert sum((sum(part[own], []) for part in parts), []) == whole[step]
    assert stream(5, start=15) == whole[15:]


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_is_the_same_for_any_number_of_workers(folder, workers):
    dataset = AudioDataset(folder / "manifest.tsv", n_frames=100)

    def first(n_workers):
        loader = iter(build_loader(dataset, ClipSampler(len(dataset), 3, seed=0), n_workers))
        return [next(loader) for _ in range(5)]

    for ours, theirs in zip(first(workers), first(0)):
        assert torch.equal(ours.waveform, theirs.waveform) and torch.equal(ours.n_samples, theirs.n_samples)
        assert ours.items == theirs.items and ours.problems == theirs.problems == ["", "", ""]


def test_batches_are_padded_and_name_what_stands_in(folder, tmp_path):
    """Behind the sound are zeros; a row that stands in says for which file, and why."""
    (folder / "clip 2.wav").unlink()
    dataset = AudioDataset(folder / "manifest.tsv", n_frames=100)
    batch = next(iter(build_loader(dataset, [[1, 2, 7]], workers=0)))
    assert batch.waveform.shape == (3, clip_samples(100)) and batch.waveform.dtype == torch.float32
    assert batch.n_samples.tolist() == [9600, 12_800, clip_samples(100)] and batch.items == [1, 3, 7]
    assert batch.problems == ["", "clip 2.wav\tno such file", ""]
    for row, item, n in zip(batch.waveform, batch.items, batch.n_samples):
        assert torch.equal(row[:n], dataset.read(item)) and not row[n:].any()


def test_batches_of_packed_clips_stay_integers_unless_one_is_not(packed):
    dataset = AudioDataset(packed)
    whole, mixed = build_loader(dataset, [[0, 1], [0, 2]], workers=0)
    assert whole.waveform.dtype == torch.int16 and mixed.waveform.dtype == torch.float32
    assert torch.equal(to_float(whole.waveform[0]), mixed.waveform[0])
    assert torch.equal(mixed.waveform[1, :2000], dataset.read(2))


def test_seeds_differ_by_purpose_and_key():
    keys = [(s, i, j) for s in range(4) for i in range(20) for j in range(20)]
    seeds = {data.seed_of(purpose, *key) for key in keys for purpose in ("masks", "noise")}
    assert len(seeds) == 2 * len(keys) and max(seeds) < 2**63


def test_demo_is_labelled_and_attributed():
    """Every probe class is in both halves, which share no clip; every file is used, its origin named."""
    train, test = (AudioDataset(DEMO / f"{half}.tsv", segments=False) for half in ("train", "test"))
    classes = [{d.labels(i)[0] for i in range(len(d))} for d in (train, test)]
    sets = (train, test, AudioDataset(DEMO / "pretrain.tsv"))
    used = [{DEMO / d.name(i) for i in range(len(d))} for d in sets]
    assert classes[0] == classes[1] and not (used[0] | used[2]) & used[1]
    shipped = set(DEMO.rglob("*.opus"))
    assert set.union(*used) == shipped
    origins = {DEMO / line.split("\t")[0] for line in (DEMO / "origin.tsv").read_text().splitlines()[1:]}
    assert origins == shipped
    text = (DEMO / "README.md").read_text()
    assert all(f"`{p.relative_to(DEMO).parts[0]}/" in text for p in shipped)
