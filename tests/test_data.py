"""Front end, files, manifests, packing, and the order in which clips are read."""

import math
import os
import shutil
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
    read_classes,
    read_targets,
    resample,
    spectrogram,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "front_end.npz")
DEMO = ROOT / "assets" / "demo"
AUDIOSET = dict(mean=-4.268, std=4.569)


# --- front end -------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(log_mel(waveform), torch.stack([log_mel(row) for row in waveform]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100])
def test_golden_front_end(rate):
    """Against another machine, whose FFT rounds otherwise: that shows where a bin is far below the loudest."""
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
    assert (log_mel(torch.randn(16_000))[:, 3] + 15.9424).abs().max() < 1e-4  # no FFT bin lies in this triangle
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


# --- files -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_segments_are_cut_from_the_whole(tmp_path, rate):
    soundfile.write(tmp_path / "long.wav", tone(6 * rate, rate).numpy(), rate, subtype="FLOAT")
    whole = load_audio(tmp_path / "long.wav")
    torch.testing.assert_close(load_audio(tmp_path / "long.wav", 0, 20_000), whole[:20_000], rtol=0, atol=1e-6)
    piece = load_audio(tmp_path / "long.wav", 32_000, 20_000)
    torch.testing.assert_close(piece, whole[32_000:52_000], rtol=0, atol=1e-5)


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
        "truncated.flac": "unreadable", "header only.wav": "no sound", "silent.wav": "silent",
        "short.wav": "too short", "nan.wav": "not audio", "folder.wav": "no such file",
    }  # fmt: skip


def test_bad_files_are_named(folder):
    for name, message in bad_files(folder).items():
        with pytest.raises(InputError, match=message):
            load_audio(folder / name)


# --- manifests -------------------------------------------------------------------------------------------------------


def test_manifest(folder):
    manifest = Manifest(folder / "manifest.tsv")
    assert len(manifest) == 8
    assert manifest.path(3) == str(folder / "clip 3.wav") and manifest.labels(3) == ["low"]
    assert manifest.n_samples.tolist() == [8000 + 1600 * i for i in range(8)]


def test_manifest_relative_root_many_labels_no_last_newline(tmp_path):
    (tmp_path / "m.tsv").write_text("\ufeffaudio\r\na b.wav\t123\tdog,cat\r\n\r\nç.wav\t456")
    manifest = Manifest(tmp_path / "m.tsv")
    assert manifest.path(0) == str(tmp_path / "audio" / "a b.wav") and manifest.labels(0) == ["dog", "cat"]
    assert manifest.path(1) == str(tmp_path / "audio" / "ç.wav") and manifest.labels(1) == []


def test_released_pair_is_read(tmp_path):
    (tmp_path / "train.tsv").write_text("/data\nx/a.wav 320000\nx/b.wav 160000\n")
    (tmp_path / "train.lbl").write_text("a /m/01,/m/02\nb /m/03\n")
    manifest = Manifest(tmp_path / "train.tsv")
    assert manifest.path(1) == "/data/x/b.wav" and manifest.n_samples.tolist() == [320_000, 160_000]
    assert [manifest.labels(i) for i in range(2)] == [["/m/01", "/m/02"], ["/m/03"]]
    (tmp_path / "train.lbl").write_text("a /m/01\n")
    with pytest.raises(InputError, match="one line"):
        Manifest(tmp_path / "train.tsv")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no clips"),
        ("/data\n", "lists no clips"),
        ("/data\na.wav\t100\nb.wav\n", "line 3"),
        ("/data\na.wav\tmany\n", "line 2"),
        ("/data\na.wav\t-3\n", "line 2"),
        ("/data\na.wav\t999999999999\n", "line 2"),
        ("/data\na.wav\t99999999999999999999\n", "line 2"),
    ],
)
def test_malformed_manifest(tmp_path, text, message):
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        Manifest(tmp_path / "m.tsv")


def test_scan_writes_what_the_dataset_reads(folder, script):
    bad = [name for name in bad_files(folder) if (folder / name).is_file() and name not in ("silent.wav", "nan.wav")]
    (folder / "sub").mkdir()
    shutil.copy(folder / "clip 1.wav", folder / "sub" / "UPPER.WAV")
    script("data.py", "scan", folder, "-o", "made.tsv")
    manifest = Manifest(folder / "made.tsv")
    names = {
        Path(manifest.path(i)).relative_to(folder).as_posix(): int(manifest.n_samples[i]) for i in range(len(manifest))
    }
    assert names["clip 2.wav"] == 11_200 and names["sub/UPPER.WAV"] == 9600 and not names.keys() & set(bad)
    listed = (folder / "made.tsv.bad").read_text()
    assert all(repr(name) in listed for name in bad)
    again = script("data.py", "scan", folder, "-o", "made.tsv", check=False)
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].startswith("data.py: made.tsv exists")


def test_stats_of_a_known_signal(folder, script):
    out = script("data.py", "stats", "manifest.tsv", "--workers", 0).stdout.split()
    dataset = AudioDataset(folder / "manifest.tsv")
    values = torch.cat([kaldi(dataset.read(i)).flatten() for i in range(8)])
    assert float(out[1]) == pytest.approx(values.mean().item(), abs=1e-3)
    assert float(out[3]) == pytest.approx(values.std().item(), abs=1e-3)


# --- dataset and packing ---------------------------------------------------------------------------------------------


def test_long_clips_are_used_in_full(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(16_000 * 7).numpy(), 16_000, subtype="FLOAT")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nlong.wav\t{16_000 * 7}\nlong.wav\t20000\n")
    dataset = AudioDataset(tmp_path / "m.tsv", n_frames=200)
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
        assert message in clip.problem and torch.equal(clip.waveform, dataset[0].waveform)
    assert not dataset[3].problem


def test_a_damaged_long_file_is_stood_in_for_by_another(folder):
    """However many pieces it has: what stands in is the first piece of the next clip that can be read."""
    (folder / "hour.wav").write_bytes(b"RIFF")
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "m.tsv").write_text("\n".join([lines[0], f"hour.wav\t{16_000 * 3600}", *lines[1:]]))
    dataset = AudioDataset(folder / "m.tsv", n_frames=64)
    first = 16_000 * 3600 // (64 * 160)
    for item in (0, 17, first - 1):
        assert dataset[item].problem and torch.equal(dataset[item].waveform, dataset[first].waveform)


def test_a_name_need_not_be_utf8(folder, script):
    shutil.copy(folder / "clip 0.wav", os.fsencode(folder) + b"/\xe9\xff.wav")
    script("data.py", "scan", folder, "-o", "made.tsv")
    dataset = AudioDataset(folder / "made.tsv")
    assert all(not dataset[i].problem for i in range(len(dataset))) and len(dataset) == 9


def test_an_mp3_of_other_bytes_is_not_called_missing(folder, script):
    (folder / "broken.mp3").write_bytes(bytes(range(256)) * 50)
    script("data.py", "scan", ".", "-o", "m.tsv")
    assert "it holds no audio\n" in (folder / "m.tsv.bad").read_text()
    with pytest.raises(InputError, match="unreadable: it holds no audio"):
        load_audio(folder / "broken.mp3")


def test_scan_labels_by_folder(tmp_path, script):
    for name in ("cat/a.wav", "more/dog, small/b.wav", "dog/c.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "in" / name, tone(8000).numpy(), 16_000)
    refused = script("data.py", "scan", "in", "-o", "m.tsv", "--labels", check=False)
    assert "the class 'dog, small' holds a comma" in refused.stderr and not (tmp_path / "m.tsv").exists()
    (tmp_path / "in/more/dog, small").rename(tmp_path / "in/more/dog")
    script("data.py", "scan", "in", "-o", "m.tsv", "--labels")
    dataset = AudioDataset(str(tmp_path / "m.tsv"))
    assert {dataset.name(i): dataset.labels(i) for i in range(3)} == {
        "cat/a.wav": ["cat"], "dog/c.wav": ["dog"], "more/dog/b.wav": ["dog"],
    }  # fmt: skip
    refused = script("data.py", "scan", "in/cat", "-o", "cat.tsv", "--labels", check=False)
    assert "in/cat/a.wav lies in no folder below in/cat that could label it" in refused.stderr


def test_scan_follows_links_but_not_in_circles(folder, tmp_path_factory, script):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(folder / "clip 0.wav", elsewhere / "linked.wav")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    script("data.py", "scan", folder, "-o", "made.tsv")
    manifest = Manifest(folder / "made.tsv")
    assert len(manifest) == 9 and "link/linked.wav" in [manifest.name(i) for i in range(9)]


def test_a_vanished_folder_ends_the_run(tmp_path):
    (tmp_path / "m.tsv").write_text("audio\n" + "".join(f"{i}.wav\t16000\n" for i in range(150)))
    with pytest.raises(InputError, match="line 1: there is no folder"):
        AudioDataset(tmp_path / "m.tsv")
    (tmp_path / "audio").mkdir()
    with pytest.raises(InputError, match="Is the data still there"):
        AudioDataset(tmp_path / "m.tsv")[0]


def test_counts_of_another_rate_do_not_make_bad_files(tmp_path):
    """Released manifests count a file's own samples: at 48 kHz, 10 s look like 30 s at 16 kHz."""
    soundfile.write(tmp_path / "x.wav", tone(48_000 * 8, 48_000).numpy(), 48_000)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nx.wav\t{48_000 * 8}\n")
    dataset = AudioDataset(tmp_path / "m.tsv")
    assert len(dataset) == 2 and not dataset[1].problem and torch.equal(dataset[1].waveform, dataset[0].waveform)


def test_the_data_is_known_by_what_is_listed(folder):
    text = (folder / "manifest.tsv").read_text()
    (folder / "moved.tsv").write_text("." + text[text.index("\n") :])
    (folder / "other.tsv").write_text(text.replace("clip 3", "clip 4"))
    digests = [AudioDataset(folder / name).digest() for name in ("manifest.tsv", "moved.tsv", "other.tsv")]
    assert digests[0] == digests[1] != digests[2]


def test_short_clips_are_left_out(folder):
    dataset = AudioDataset(folder / "manifest.tsv", min_samples=12_000)
    assert len(dataset) == 5 and dataset.name(0) == "clip 3.wav"
    assert list(dataset.short_names()) == ["clip 0.wav", "clip 1.wav", "clip 2.wav"]
    with pytest.raises(InputError, match="no clip has the 50000 samples"):
        AudioDataset(folder / "manifest.tsv", min_samples=50_000)


def test_pack_and_files_give_the_same(folder, script, monkeypatch):
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\tbad\n" for name in bad)
    monkeypatch.setattr(data, "SHARD_SAMPLES", 35_000)
    data.pack(folder / "manifest.tsv", folder / "packed", workers=0)
    files, packed = AudioDataset(folder / "manifest.tsv"), AudioDataset(folder / "packed")
    assert len(packed) == 8 and len(packed.shards) == 3
    assert len((folder / "packed" / "bad_files.tsv").read_text().splitlines()) == len(bad)
    for i in range(8):
        assert packed.labels(i) == files.labels(i) and packed.name(i) == f"clip {i}.wav"
        assert torch.equal(data.to_float(packed.read(i)), files.read(i))  # the wav files hold int16 as well


def test_a_long_file_is_packed_whole(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(16_000 * 25).numpy(), 16_000)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nlong.wav\t{16_000 * 25}\n")
    data.pack(tmp_path / "m.tsv", tmp_path / "packed", workers=0)
    for n_frames in (64, 200, 1024):
        files, packed = AudioDataset(tmp_path / "m.tsv", n_frames), AudioDataset(tmp_path / "packed", n_frames)
        assert len(files) == len(packed) == 16_000 * 25 // (160 * n_frames)
        for i in range(len(files)):
            assert torch.equal(files.read(i), data.to_float(packed.read(i)))


def test_pack_resumes_and_finds_damage(folder, monkeypatch):
    monkeypatch.setattr(data, "SHARD_SAMPLES", 35_000)
    target = folder / "packed"
    data.pack(folder / "manifest.tsv", target, workers=0)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    for name in ("index.json", "00001.tsv", "00002.tsv", "00002.pcm"):  # as if it had been stopped in the second shard
        (target / name).unlink()
    with pytest.raises(InputError, match="run python data.py pack"):
        AudioDataset(target)
    decoded, decode = set(), data._decode
    monkeypatch.setattr(data, "_decode", lambda path, *args: decoded.add(path) or decode(path, *args))
    data.pack(folder / "manifest.tsv", target, workers=0)
    assert 0 < len(decoded) < 8 and before == {p.name: p.read_bytes() for p in target.iterdir()}

    flipped = bytearray(before["00001.pcm"])
    flipped[1000] ^= 1
    (target / "00001.pcm").write_bytes(flipped)
    with pytest.raises(InputError, match="00001.pcm does not match"):
        data.pack(folder / "manifest.tsv", target, workers=0)
    (target / "00001.pcm").write_bytes(before["00001.pcm"][:-2])
    with pytest.raises(InputError, match="wrong size"):
        AudioDataset(target)


@pytest.mark.parametrize("index", ["", "[]", '{"shards": 5}', '{"shards": []}', '{"shards": ["../x"]}'])
def test_an_index_that_is_no_index(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(InputError, match="is not a packed folder"):
        AudioDataset(tmp_path)


def test_pack_touches_no_other_folder(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "00000.pcm").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        data.pack(folder / "manifest.tsv", folder / "mine", workers=0)
    assert (folder / "mine" / "00000.pcm").read_text() == "precious"


def test_pack_refuses_another_manifest(folder):
    data.pack(folder / "manifest.tsv", folder / "packed", workers=0)
    text = (folder / "manifest.tsv").read_text().replace("clip 7.wav", "clip 6.wav")
    (folder / "other.tsv").write_text(text)
    with pytest.raises(InputError, match="another manifest"):
        data.pack(folder / "other.tsv", folder / "packed", workers=0)


# --- order -----------------------------------------------------------------------------------------------------------


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
        parts = [stream(20 * accumulate, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
        for step in range(20):
            at_step = [parts[rank][step * accumulate + micro] for rank in range(world) for micro in range(accumulate)]
            assert sum(at_step, []) == whole[step]
    assert stream(5, start=15) == whole[15:]


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_is_the_same_for_any_number_of_workers(folder, workers):
    dataset = AudioDataset(folder / "manifest.tsv", n_frames=100)

    def first(n_workers):
        loader = iter(build_loader(dataset, ClipSampler(len(dataset), 3, seed=0), n_workers))
        return [next(loader) for _ in range(5)]

    for ours, theirs in zip(first(workers), first(0)):
        assert torch.equal(ours.waveform, theirs.waveform) and torch.equal(ours.n_samples, theirs.n_samples)


def test_seeds_differ_by_purpose_and_key():
    keys = [(s, i, j) for s in range(4) for i in range(20) for j in range(20)]
    seeds = {data.seed_of(purpose, *key) for key in keys for purpose in ("masks", "noise")}
    assert len(seeds) == 2 * len(keys) and max(seeds) < 2**63


def test_demo_is_labelled_and_attributed():
    """Every probe class is in both halves, which share no clip; every file shipped is used and its origin named."""
    train, test = (AudioDataset(DEMO / f"{half}.tsv", segments=False) for half in ("train", "test"))
    classes = [{d.labels(i)[0] for i in range(len(d))} for d in (train, test)]
    used = [
        {DEMO / d.name(i) for i in range(len(d))} for d in (train, test, AudioDataset(DEMO / "pretrain.tsv"))
    ]
    assert classes[0] == classes[1] and not (used[0] | used[2]) & used[1]
    shipped = set(DEMO.rglob("*.opus"))
    assert set.union(*used) == shipped
    origins = {DEMO / line.split("\t")[0] for line in (DEMO / "origin.tsv").read_text().splitlines()[1:]}
    assert origins == shipped
    text = (DEMO / "README.md").read_text()
    assert all(f"`{p.relative_to(DEMO).parts[0]}/" in text for p in shipped)


# --- manifests of three data sets ------------------------------------------------------------------------------------


def wav(path: Path, n_samples: int = 8000, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(n_samples, rate).numpy(), rate)


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_esc50_folds(tmp_path, script):
    header = "filename,fold,target,category,esc10,src_file,take"
    names = [(fold, i, name) for fold in range(1, 6) for i, name in enumerate(["dog", "sea_waves"])]
    rows = [f"{fold}-{i}-A-{i}.wav,{fold},{i},{name},True,{i},A" for fold, i, name in names]
    (tmp_path / "ESC-50" / "meta").mkdir(parents=True)
    (tmp_path / "ESC-50" / "meta" / "esc50.csv").write_text("\n".join([header, *rows]) + "\n")
    for row in rows[:-1]:  # the last is missing
        wav(tmp_path / "ESC-50" / "audio" / row.split(",")[0], 44_100, 44_100)
    out = script("data.py", "esc50", "ESC-50", "-o", "esc50").stdout
    assert "esc50/train1.tsv: 7 clips" in out and "1 left out, listed in esc50/train1.tsv.bad" in out
    folds = {i: rows_of(tmp_path / "esc50" / f"test{i}.tsv") for i in range(1, 6)}
    assert folds[1] == [["1-0-A-0.wav", "16000", "dog"], ["1-1-A-1.wav", "16000", "sea_waves"]]
    assert [len(rows) for rows in folds.values()] == [2, 2, 2, 2, 1]
    for i in folds:
        train = rows_of(tmp_path / "esc50" / f"train{i}.tsv")
        assert sorted(train) == sorted(row for j in folds if j != i for row in folds[j])
    assert "5-1-A-1.wav" in (tmp_path / "esc50" / "test5.tsv.bad").read_text()
    assert len(AudioDataset(str(tmp_path / "esc50" / "train1.tsv"), 512, segments=False)) == 7
    again = script("data.py", "esc50", "ESC-50", "-o", "esc50", check=False)
    assert again.returncode == 1 and "exists: remove it" in again.stderr


def test_speech_commands_split(tmp_path, script):
    source = tmp_path / "sc"
    for name in ("yes/a_nohash_0.wav", "yes/b_nohash_0.wav", "no/a_nohash_0.wav", "no/c_nohash_1.wav"):
        wav(source / name)
    wav(source / "_background_noise_" / "running_tap.wav", 32_000)
    (source / "validation_list.txt").write_text("yes/b_nohash_0.wav\n")
    (source / "testing_list.txt").write_text("no/a_nohash_0.wav\nno/gone_nohash_0.wav\n")
    out = script("data.py", "speechcommands", "sc", "-o", "spcv2").stdout
    assert "spcv2/test.tsv: 1 clips" in out and "1 left out" in out
    tables = {part: rows_of(tmp_path / "spcv2" / f"{part}.tsv") for part in ("train", "valid", "test")}
    assert {part: [(row[0], row[2]) for row in rows] for part, rows in tables.items()} == {
        "train": [("no/c_nohash_1.wav", "no"), ("yes/a_nohash_0.wav", "yes")],
        "valid": [("yes/b_nohash_0.wav", "yes")],
        "test": [("no/a_nohash_0.wav", "no")],
    }


def test_audioset_clips_by_their_id(tmp_path, script):
    (tmp_path / "labels.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
    )
    (tmp_path / "segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=4, num_segs=4\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/09x0r"\n'
        'YxY_-abc012, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n'
        'Zbcdefghijk, 30.000, 40.000, "/m/05zppz"\n'
        'missing_one, 30.000, 40.000, "/m/05zppz"\n'
    )
    for name in ("sub/--4gqARaEJE.wav", "YYxY_-abc012.flac", "Zbcdefghijk_30.000_40.000.wav"):
        wav(tmp_path / "audio" / name)
    out = script("data.py", "audioset", "segments.csv", "labels.csv", "audio", "-o", "train.tsv").stdout
    assert "3 clips" in out and "1 of 4 clips missing" in out
    assert rows_of(tmp_path / "train.tsv") == [
        ["sub/--4gqARaEJE.wav", "8000", "/m/09x0r"],
        ["YYxY_-abc012.flac", "8000", "/m/09x0r,/m/05zppz"],
        ["Zbcdefghijk_30.000_40.000.wav", "8000", "/m/05zppz"],
    ]
    assert "missing_one" in (tmp_path / "train.tsv.bad").read_text()
    classes = read_classes(tmp_path / "labels.csv")
    targets = read_targets(AudioDataset(str(tmp_path / "train.tsv"), segments=False), classes)
    assert targets.tolist() == [[True, False], [True, True], [False, True]]
    (tmp_path / "segments.csv").write_text('--4gqARaEJE, 0.000, 10.000, "/m/other"\n')
    refused = script("data.py", "audioset", "segments.csv", "labels.csv", "audio", "-o", "x.tsv", check=False)
    assert "has the label '/m/other', which labels.csv does not list" in refused.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["esc50", "empty", "-o", "out"], "cannot read empty/meta/esc50.csv"),
        (["speechcommands", "empty", "-o", "out"], "cannot read empty/validation_list.txt"),
        (["audioset", "nothing.csv", "nothing.csv", "empty", "-o", "x.tsv"], "cannot read the classes in nothing.csv"),
        (["audioset", "table.csv", "table.csv", "empty", "-o", "x.tsv"], "is not a list of AudioSet segments"),
        (["esc50", "evil1", "-o", "out"], "'/etc/passwd' has no fold or class, or lies elsewhere"),
        (["esc50", "evil2", "-o", "out"], "'1.wav' has no fold or class, or lies elsewhere"),
        (["esc50", "evil3", "-o", "out"], "the class 'dog, big' holds a comma"),
        (["esc50", "single", "-o", "out"], "has one fold only"),
    ],
)
def test_folders_that_are_not_these_data_sets(tmp_path, script, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("index,label\n0,dog\n")
    rows = dict(
        evil1="/etc/passwd,1,dog", evil2="1.wav,/../../evil,dog", evil3='1.wav,1,"dog, big"', single="1.wav,1,dog"
    )
    for name, row in rows.items():
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta" / "esc50.csv").write_text(f"filename,fold,category\n{row}\n")
    result = script("data.py", *args, check=False)
    assert not (tmp_path / "out").exists()
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
