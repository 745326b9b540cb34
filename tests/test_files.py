"""Files and folders as users have them: no sound is lost, none is heard twice, nothing fails in silence."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

sys.path.insert(0, str(ROOT / "extras"))
import compare  # noqa: E402
import evaluate  # noqa: E402
import listen  # noqa: E402
import released  # noqa: E402
from data import AudioDataset, InputError, load_audio, log_mel, read_lines, read_pieces  # noqa: E402
from evaluate import read_classes  # noqa: E402
from model import EAT, MODELS, AudioClassifier, save_checkpoint  # noqa: E402

RATE = 44_100
TINY = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2".split()
TINY += "--batch_size 4 --warmup 1".split()


def noise(seconds: float, rate: int = RATE, level: float = 0.2) -> np.ndarray:
    rng = np.random.default_rng(round(1000 * seconds))
    return (level * rng.standard_normal(round(seconds * rate))).astype(np.float32)


def piped_mp3(path: Path, samples: np.ndarray) -> None:
    """An mp3 of variable bit rate as an encoder writes it into a pipe: without the frame with its length."""
    soundfile.write(path, samples, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    data = path.read_bytes()
    assert 0 < data.find(b"Xing") < 100
    path.write_bytes(data[data.index(data[:2], 200) :])


def scanned(script, folder: Path, *flags) -> tuple[list[list[str]], list[str]]:
    """Rows of the manifest of a folder, and the lines of its .bad."""
    (folder.parent / "m.tsv").unlink(missing_ok=True), (folder.parent / "m.tsv.bad").unlink(missing_ok=True)
    script("extras/prepare.py", "scan", folder, "-o", folder.parent / "m.tsv", *flags)
    lines = read_lines(folder.parent / "m.tsv")[1:]
    return [line.split("\t") for line in lines], read_lines(folder.parent / "m.tsv.bad")


@pytest.fixture
def audio(tmp_path) -> Path:
    (tmp_path / "audio").mkdir()
    return tmp_path / "audio"


# --- containers --------------------------------------------------------------------------------------------


def test_a_container_that_claims_more_is_counted_right(audio, script):
    """A quiet start makes 60 s look like more than 150: counted right, and no piece is another one again."""
    piped_mp3(audio / "x.mp3", np.concatenate([np.zeros(3 * RATE, np.float32), noise(57)]))
    assert soundfile.info(audio / "x.mp3").duration > 100
    rows, bad = scanned(script, audio)
    assert not bad and int(rows[0][1]) / 16_000 == pytest.approx(60, abs=0.1)
    data = AudioDataset(audio.parent / "m.tsv")
    assert len(data) == 5 and all(not data[i].problem for i in range(5))
    whole = torch.cat(list(read_pieces(audio / "x.mp3", 163_840, 163_840)))
    for i in range(5):
        assert torch.allclose(data.read(i)[:160_000], whole[163_840 * i :][:160_000], atol=1e-5)
    said = script("extras/prepare.py", "stats", audio.parent / "m.tsv", "--workers", 0).stdout
    exact = log_mel(whole)
    assert float(said.split()[1]) == pytest.approx(exact[: 5 * 1024].mean().item(), abs=0.02)
    with pytest.raises(InputError, match="has no sound at 71.68 s"):  # there is a claim there, and no sound
        load_audio(audio / "x.mp3", 7 * 163_840, 163_840)


def test_a_container_that_claims_less_is_named(audio, script):
    """A loud start makes 40 s look like a few, where libsndfile would stop: it is listed, and said."""
    quiet = 0.001 * np.sin(np.arange(37 * RATE) * 0.05).astype(np.float32)
    piped_mp3(audio / "x.mp3", np.concatenate([noise(3), quiet]))
    soundfile.write(audio / "y.wav", noise(1), RATE)
    assert soundfile.info(audio / "x.mp3").duration < 20
    rows, (bad,) = scanned(script, audio)
    assert [row[0] for row in rows] == ["y.wav"] and bad.startswith("x.mp3\tclaims ") and "convert it" in bad
    mean, cpu = lambda spec: spec.mean((1, 2, 3)), torch.device("cpu")
    windows, problem = listen.hear(mean, audio / "x.mp3", MODELS["tiny"], cpu)
    assert windows and "claims" in problem


def test_truncated_files_are_counted_by_what_they_hold(audio, script):
    for name, form in (("a.mp3", "MP3"), ("b.ogg", "OGG"), ("c.wav", "WAV")):
        soundfile.write(audio / name, noise(20), RATE, format=form)
        data = (audio / name).read_bytes()
        (audio / name).write_bytes(data[: len(data) // 2])
    rows, bad = scanned(script, audio)
    assert not bad
    for name, n_samples in rows:
        assert int(n_samples) / 16_000 == pytest.approx(10, abs=1.5), name
        assert len(load_audio(audio / name)) == pytest.approx(int(n_samples), abs=2000), name


def test_encodings_that_cannot_seek_are_read_forward(audio, script):
    soundfile.write(audio / "gsm.wav", noise(30, 8000), 8000, subtype="GSM610")
    rows, bad = scanned(script, audio)
    assert not bad and int(rows[0][1]) == pytest.approx(480_000, abs=700)
    data, (whole,) = AudioDataset(audio.parent / "m.tsv"), read_pieces(audio / "gsm.wav", 2**30)
    for i in range(len(data)):
        clip = data[i]
        there = whole[163_840 * i :][: len(clip.waveform)]
        assert not clip.problem and torch.allclose(clip.waveform, there, atol=1e-5)


@pytest.mark.parametrize("form, subtype, channels", [
    ("WAV", "PCM_16", 1), ("WAV", "PCM_U8", 2), ("WAV", "FLOAT", 2), ("WAV", "ULAW", 1),
    ("WAV", "IMA_ADPCM", 1), ("WAVEX", "PCM_24", 2), ("AIFF", "PCM_16", 2), ("AU", "PCM_16", 1),
])  # fmt: skip
def test_a_size_that_wrapped_is_named(audio, form, subtype, channels):
    """4 GiB more than the 32-bit header can say; a sparse file, so that it costs no disk."""
    samples = noise(1, 48_000)[:, None].repeat(channels, 1)
    soundfile.write(audio / "x", samples, 48_000, format=form, subtype=subtype)
    assert listen.count_samples(audio / "x") == pytest.approx(16_000, abs=400)
    with open(audio / "x", "r+b") as file:
        file.truncate(2**32 + file.seek(0, 2))
    with pytest.raises(InputError, match=r"claims 1[.]0 s and holds \d{4,6}[.]\d s: convert it"):
        listen.count_samples(audio / "x")


@pytest.mark.parametrize("name, place, code, more", [
    ("x.wav", b"data", "<4xI", 0), ("x.aiff", b"SSND", ">4xI", 8), ("x.au", b".snd", ">8xI", 0),
    ("x.caf", b"data", ">4xQ", 4), ("x.rf64", b"ds64", "<16xQ", 0),
])  # fmt: skip
def test_a_header_that_was_not_brought_up_to_date_is_named(audio, name, place, code, more):
    """A recorder that died: the header claims a third. Data and other chunks behind are as they should be."""
    soundfile.write(audio / name, noise(6, 48_000), 48_000, subtype="PCM_16")
    data = bytearray((audio / name).read_bytes())
    at = data.index(place) + struct.calcsize(code) - struct.calcsize(code[-1])
    size, width = len(noise(6, 48_000)) * 2 + more, struct.calcsize(code[-1])
    data[at : at + width] = struct.pack(code[0] + code[-1], (size - more) // 3 + more)
    assert listen.count_samples(audio / name) == 96_000
    (audio / name).write_bytes(data)
    with pytest.raises(InputError, match=r"claims 2[.]0 s and holds 6[.]0 s: convert it"):
        listen.count_samples(audio / name)


@pytest.mark.parametrize("suffix", ["wav", "au", "caf"])
def test_two_files_in_one_are_named(audio, suffix):
    """As `cat` makes them: libsndfile stops at the end of the first."""
    soundfile.write(audio / f"x.{suffix}", noise(2, 16_000), 16_000, subtype="PCM_16")
    (audio / f"x.{suffix}").write_bytes(2 * (audio / f"x.{suffix}").read_bytes())
    with pytest.raises(InputError, match=r"claims 2[.]0 s and holds 4[.][01] s|unreadable: Error in WAV"):
        listen.count_samples(audio / f"x.{suffix}")


def test_pictures_and_texts_behind_the_sound_are_no_sound(audio):
    soundfile.write(audio / "x.wav", noise(1, 16_000), 16_000)
    chunks = b"LIST" + struct.pack("<I", 10**6) + bytes(10**6) + b"id3 " + struct.pack("<I", 7) + bytes(8)
    (audio / "x.wav").write_bytes((audio / "x.wav").read_bytes() + chunks)
    assert listen.count_samples(audio / "x.wav") == 16_000


@pytest.mark.parametrize("rate, channels", [(8000, 1), (22_050, 2), (48_000, 2)])
@pytest.mark.parametrize("claimed", [0, 1 / 3, 1, 3, 1e9])
def test_an_mp3_whose_length_was_changed_is_counted_right_or_named(audio, rate, channels, claimed):
    """The number of frames in its Xing header says anything: what scan counts can be read."""
    path = audio / "x.mp3"
    soundfile.write(path, noise(6, rate)[:, None].repeat(channels, 1), rate)
    data = bytearray(path.read_bytes())
    at = data.index(b"Xing") + 8
    n_frames = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = min(2**32 - 1, int(claimed * n_frames)).to_bytes(4, "big")
    path.write_bytes(data)
    try:
        n_samples = listen.count_samples(path)
    except InputError as error:
        assert re.match("claims .* holds 6[.]|too short: 0", str(error))
        return
    assert n_samples == pytest.approx(96_000, abs=3000)
    assert len(load_audio(path, n_samples - 8000, 8000)) == pytest.approx(8000, abs=3)


def test_mpeg_audio_of_other_layers_is_counted_right(audio):
    """Layer II, as broadcasters have it, under the name of an mp3: 400 frames of 1152 samples, by hand."""
    head = 0x7FF << 21 | 3 << 19 | 2 << 17 | 1 << 16 | 8 << 12 | 3 << 6  # 128 kbit/s at 44.1 kHz, mono
    frame = head.to_bytes(4, "big").ljust(144 * 128_000 // 44_100, b"\x11")
    (audio / "x.mp3").write_bytes(400 * frame)
    assert soundfile.info(audio / "x.mp3").subtype == "MPEG_LAYER_II"
    n_samples = listen.count_samples(audio / "x.mp3")
    assert n_samples == pytest.approx(400 * 1152 / 44_100 * 16_000, abs=10)
    assert len(load_audio(audio / "x.mp3")) == pytest.approx(n_samples, abs=1)


def test_warnings_of_libraries_do_not_flood(audio, script):
    """libmpg123 complains of a truncated mp3 each time that it is opened."""
    soundfile.write(audio / "x.mp3", noise(20), RATE, format="MP3")
    (audio / "x.mp3").write_bytes((audio / "x.mp3").read_bytes()[:100_000])
    code = f"import soundfile; soundfile.info({str(audio / 'x.mp3')!r})"
    loud = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert b"arning" in loud.stderr
    done = script("extras/prepare.py", "scan", audio, "-o", "m.tsv")
    assert "arning" not in done.stderr
    done = script("pretrain.py", "--data", "m.tsv", *TINY, "--updates", 2, "--workers", 1)
    assert "arning" not in done.stderr


# --- values ------------------------------------------------------------------------------------------------


def test_float_audio_above_full_scale_is_packed_as_it_is(audio, script):
    for name, level in (("a.wav", 1.2), ("b.wav", 0.2), ("c.wav", 12.0)):
        soundfile.write(audio / name, noise(3, 16_000, level), 16_000, subtype="FLOAT")
    rows, bad = scanned(script, audio)
    script("extras/prepare.py", "pack", audio.parent / "m.tsv", "packed.tsv", "--workers", 0)
    files, packed = AudioDataset(audio.parent / "m.tsv"), AudioDataset(audio.parent / "packed.tsv")
    assert len(packed) == 3 and files.read(0).abs().max() > 4
    for i in range(3):
        there, back = files.read(i), packed.read(i)
        assert log_mel(back).mean() == pytest.approx(log_mel(there).mean().item(), abs=2e-3)
    assert packed.read(1).dtype == torch.int16 and packed.labels(0) == []


def test_numbers_scaled_as_integers_are_named(audio):
    soundfile.write(audio / "x.wav", noise(1, 16_000, 3000), 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match="where full scale is 1"):
        load_audio(audio / "x.wav")


# --- names -------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_and_odd_line_separators(audio, script):
    names = [os.fsdecode(b"caf\xe9.wav"), "two\u2028lines.wav", "page\x0c.wav", "unit\x1f.wav", "café.wav"]
    for i, name in enumerate(names):
        soundfile.write(os.fsencode(audio / name), tone(8000 + i).numpy(), 16_000)
    (audio / "bad\x85.wav").write_text("no audio")
    rows, (bad,) = scanned(script, audio)
    assert sorted(row[0] for row in rows) == sorted(names) and bad.startswith("bad\x85.wav\tunreadable")
    script("extras/prepare.py", "pack", audio.parent / "m.tsv", "packed.tsv", "--workers", 0)
    packed = AudioDataset(audio.parent / "packed.tsv")
    assert sorted(packed.name(i) for i in range(len(packed))) == sorted(names)
    lengths = {packed.name(i): len(packed.read(i)) for i in range(len(packed))}
    assert lengths == {name: 8000 + i for i, name in enumerate(names)}


def test_links_to_nothing_are_listed(audio, script):
    soundfile.write(audio / "here.wav", tone(8000).numpy(), 16_000)
    for i in range(4):
        (audio / f"annexed {i}.wav").symlink_to(f"../.git/annex/objects/{i}")
    rows, bad = scanned(script, audio)
    assert len(rows) == 1 and bad == [f"annexed {i}.wav\ta link to nothing" for i in range(4)]


def test_links_to_folders_that_are_gone_and_to_themselves(audio, script):
    """What lay in the folder cannot be listed: it is named. A folder that is called like a file is one."""
    (audio / "disk").symlink_to(audio.parent / "not mounted")
    (audio / "self.wav").symlink_to("self.wav")
    (audio / "folder.wav").mkdir()
    soundfile.write(audio / "folder.wav" / "here.wav", tone(8000).numpy(), 16_000)
    said = script("extras/prepare.py", "scan", audio, "-o", "m.tsv").stderr
    assert f"WARNING: {audio}/disk cannot be opened: a link to nothing\n" in said
    assert read_lines(audio.parent / "m.tsv")[1:] == ["folder.wav/here.wav\t8000"]
    assert read_lines(audio.parent / "m.tsv.bad") == ["self.wav\ta link to nothing"]


ODD = [b"caf\xe9", b"nel\x85x", "two\u2028lines".encode(), b"fs\x1cy", b" lead", b"trail ", b'"quo"', b"\x0b"]


def test_what_we_write_is_read_back_as_it_was(audio, script, train):
    """Manifests, packed ones, .bad, bad_files.tsv: a name for a line, whatever bytes it has."""
    odd = [os.fsdecode(name) for name in ODD]
    for i, name in enumerate(odd):
        soundfile.write(os.fsencode(audio / f"{name}.wav"), tone(16_000 + i).numpy(), 16_000)
        (audio / f"bad {name}.wav").write_text("no audio")
    rows, bad = scanned(script, audio)
    names, bad_names = sorted(f"{name}.wav" for name in odd), sorted(f"bad {name}.wav" for name in odd)
    assert [row[0] for row in rows] == names and [line.split("\t")[0] for line in bad] == bad_names
    for name in names[::2]:  # and the tables that are written when these are found damaged
        (audio / name).write_text("no audio any more")
    (audio.parent / "m.tsv").write_bytes((audio.parent / "m.tsv").read_bytes() + b"c\rr.wav\t16000\n")
    script("extras/prepare.py", "pack", "m.tsv", "new/packed.tsv", "--workers", 0)
    packed = AudioDataset(audio.parent / "new" / "packed.tsv")
    assert [packed.name(i) for i in range(len(packed))] == names[1::2]
    listed = [line.split("\t")[0] for line in read_lines(audio.parent / "new" / "packed.tsv.bad")]
    assert listed == [*names[::2], "c\rr.wav"]
    args = [*TINY, *"--updates 6 --log_every 1 --workers 0 --max_bad_fraction 1 --out_dir run".split()]
    assert train("--data", "m.tsv", *args) == 0
    listed = [line.split("\t")[0] for line in read_lines(audio.parent / "run" / "bad_files.tsv")]
    assert sorted(listed) == sorted([*names[::2], "c\rr.wav"])  # each once, in six logs


def test_labels_of_odd_bytes(audio, script, called, monkeypatch):
    """Folders as classes, or a table that is not UTF-8: through manifest, network, scores and card."""
    labels = [os.fsdecode(name) for name in (*ODD[:4], ODD[5].strip())]
    for i, label in enumerate(labels):
        (audio / label).mkdir()
        soundfile.write(os.fsencode(audio / label / "x.wav"), tone(16_000 + i).numpy(), 16_000)
    rows, bad = scanned(script, audio, "--labels")
    assert not bad and sorted(row[2] for row in rows) == sorted(labels)
    table = b"".join(os.fsencode(f"{label}/x.wav,{label}\n") for label in labels)
    (audio.parent / "t.csv").write_bytes(table)
    assert scanned(script, audio, "--labels", "t.csv") == (rows, [])
    config = dataclasses.replace(MODELS["tiny"], clip_frames=64)
    model = AudioClassifier(config, {label: label for label in sorted(labels)}, exclusive=True)
    state = dict(network=vars(config), head=model.head_settings, classifier=model.state_dict())
    save_checkpoint(audio.parent / "c.pt", **state)
    called(evaluate, "c.pt", "m.tsv", "--workers", 0)
    with open(audio.parent / "per_class.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["name"] for row in csv.DictReader(file)] == sorted(labels)
    monkeypatch.chdir(audio.parent)
    released.export("c.pt", "exported")
    assert os.fsencode(labels[0]) in (audio.parent / "exported" / "README.md").read_bytes()
    assert [*AudioClassifier.from_pretrained("exported").classes] == sorted(labels)
    pytest.importorskip("matplotlib")
    import plot

    plot.plot_timeline(model.eval(), os.path.join(audio, labels[0], "x.wav")).savefig("t.png")


def test_what_cannot_be_read_says_why(audio, script):
    """As text, with what to do about it: other formats, an empty file, a text."""
    (audio / "a.m4a").write_bytes(b"\0\0\0 ftypM4A " + bytes(100))
    (audio / "b.wav").touch()
    (audio / "c é.wav").write_text("a text")
    soundfile.write(audio / "d.wav", tone(8000).numpy(), 16_000)
    rows, bad = scanned(script, audio)
    assert [row[0] for row in rows] == ["d.wav"]
    assert "convert with ffmpeg" in bad[0] and bad[0].startswith("a.m4a\t")
    assert bad[1] == "b.wav\tunreadable: it is empty" and bad[2].startswith("c é.wav\tunreadable: no audio")


# --- tables ------------------------------------------------------------------------------------------------


def test_classes_of_the_same_name_are_both_told(audio):
    torch.manual_seed(0)
    classes = {"/m/0jbk": "Animal", "/m/0k4j": "Car", "/m/zzz": "Animal"}
    soundfile.write(audio / "x.wav", tone(16_000).numpy(), 16_000)
    model = AudioClassifier(MODELS["tiny"], classes, exclusive=True).eval()
    top = listen.tag(model, audio / "x.wav", torch.device("cpu"))["top"]
    assert set(top) == {"Animal (/m/0jbk)", "Car", "Animal (/m/zzz)"}
    assert sum(top.values()) == pytest.approx(1)


def test_class_tables_of_other_orders(tmp_path):
    (tmp_path / "fsd.csv").write_text("index,name,mid\n0,Accordion,/m/0mkg\n1,Applause,/m/028ght\n")
    assert read_classes(tmp_path / "fsd.csv") == {"/m/0mkg": "Accordion", "/m/028ght": "Applause"}
    (tmp_path / "audioset.csv").write_text('index,mid,display_name\n0,/m/09x0r,"Speech"\n')
    assert read_classes(tmp_path / "audioset.csv") == {"/m/09x0r": "Speech"}
    (tmp_path / "vocabulary.csv").write_text("0,Accordion,/m/0mkg\n1,Applause,/m/028ght\n")  # without header
    assert read_classes(tmp_path / "vocabulary.csv") == {"Accordion": "Accordion", "Applause": "Applause"}


def test_tables_with_a_byte_order_mark(tmp_path, script):
    (tmp_path / "ESC" / "meta").mkdir(parents=True), (tmp_path / "ESC" / "audio").mkdir()
    rows = ["filename,fold,target,category", "1.wav,1,0,dog", "2.wav,2,0,dog"]
    (tmp_path / "ESC" / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    for i in (1, 2):
        soundfile.write(tmp_path / "ESC" / "audio" / f"{i}.wav", tone(8000).numpy(), 16_000)
    script("extras/prepare.py", "esc50", "ESC", "-o", "esc50")
    assert read_lines(tmp_path / "esc50" / "test1.tsv")[1:] == ["1.wav\t8000\tdog"]
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n", encoding="utf-8-sig")
    (tmp_path / "segments.csv").write_text("# list\n0123456789a, 0, 10, /m/09x0r\n", encoding="utf-8-sig")
    soundfile.write(tmp_path / "ESC" / "audio" / "0123456789a.wav", tone(8000).numpy(), 16_000)
    script("extras/prepare.py", "audioset", "segments.csv", "labels.csv", "ESC", "-o", "as.tsv")
    assert read_lines(tmp_path / "as.tsv")[1:] == ["audio/0123456789a.wav\t8000\t/m/09x0r"]
    (tmp_path / "old.tsv").write_text("ESC/audio\r\n1.wav 48000\r\n", encoding="utf-8-sig", newline="")
    (tmp_path / "old.lbl").write_text("1 dog\r\n", encoding="utf-8-sig", newline="")
    script("extras/prepare.py", "released", "old.tsv", "-o", "new.tsv")
    assert read_lines(tmp_path / "new.tsv")[1:] == ["1.wav\t8000\tdog"]


@pytest.mark.parametrize("train_folds, test_folds, found", [
    ([0, 1, 2], [0, 1, 2], [0, 1, 2]), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ([9, 10, 11], [9, 10, 11], [9, 10, 11]), ([0, 1, 3], [0, 1, 3], "2"), ([0, 1, 2], [1, 2], "0"),
    ([1, 2], [1, 2, 3], "3"), ([1], [1], "two folds at least"),
])  # fmt: skip
def test_folds_that_are_there_or_are_missed(folder, called, monkeypatch, train_folds, test_folds, found):
    """From 0 or 1 on, each is in the mean; a gap, or a half of one, is named before the first has run."""
    for part, folds in (("train", train_folds), ("test", test_folds)):
        for fold in folds:
            shutil.copy(folder / "manifest.tsv", folder / f"{part}{fold}.tsv")
    model, done = EAT(dataclasses.replace(MODELS["tiny"], clip_frames=64)), []
    state = dict(student=model.state_dict(), teacher=model.encoder.state_dict(), network=vars(model.config))
    save_checkpoint(folder / "pre.pt", **state)
    monkeypatch.setattr(compare, "fine_tune", lambda config: done.append(Path(config.data).stem) or 0.5)
    names = ["--data", "train{fold}.tsv", "--eval_data", "test{fold}.tsv", "--rows", "tuned"]
    args = ["--preset", "esc50", "--clip_frames", 64, "--min_samples", 1600, "--init", "pre.pt", *names]
    result = called(compare, *args, "--out_dir", "run", check=isinstance(found, list))
    if isinstance(found, list):
        assert done == [f"train{fold}" for fold in found]
    else:
        assert not done and result.stderr.count("\n") == 1 and not (folder / "run").exists()
        assert found in result.stderr and (len(found) > 1 or f"{found}.tsv" in result.stderr)


@pytest.mark.parametrize("script_name, args", [
    ("evaluate", ["classifier.pt", "manifest.tsv"]), ("evaluate", ["classifier.pt", *2 * ["manifest.tsv"]]),
    ("prepare", ["stats", "manifest.tsv"]), ("prepare", ["pack", "manifest.tsv", "packed.tsv"]),
    ("listen", ["classifier.pt", "manifest.tsv", "--features", "x.npz"]),
])  # fmt: skip
def test_fewer_than_no_workers_are_refused_in_one_line(classifier, called, monkeypatch, script_name, args):
    module = importlib.import_module(script_name)
    monkeypatch.setattr(module, "silence_libraries", lambda: None, raising=False)
    said = called(module, *args, "--workers", -1, check=False)
    assert said.returncode == 1 and not said.stdout
    assert said.stderr.count("\n") == 1 and "num_workers" in said.stderr and "--workers 0" in said.stderr


@pytest.mark.parametrize("flags", [["--teacher"], ["--block", 1], ["--pooling", evaluate.POOLINGS[-1]]])
def test_flags_of_probes_are_refused_where_nothing_is_probed(classifier, called, flags):
    said = called(evaluate, "classifier.pt", "manifest.tsv", *flags, check=False)
    assert said.returncode == 1 and not said.stdout and said.stderr.count("\n") == 1
    assert "--teacher, --block and --pooling are for probes" in said.stderr


# --- a run -------------------------------------------------------------------------------------------------


def test_a_full_disk_and_then_a_bad_file_costs_the_list_not_the_run(folder, script):
    """The list of bad files cannot be written: a warning, as for the log."""
    (folder / "clip 2.wav").write_text("damaged")
    args = [*TINY, *"--updates 6 --log_every 2 --min_samples 1600 --workers 0 --max_bad_fraction 1".split()]
    code = (
        "import builtins, sys; real = open\n"
        "def full(path, mode='r', *a, **k):\n"
        "    if 'a' in mode and str(path).endswith('bad_files.tsv'): raise OSError(28, 'No space left')\n"
        "    return real(path, mode, *a, **k)\n"
        "builtins.open = full\n"
        f"sys.argv = {['pretrain.py', '--data', 'manifest.tsv', '--out_dir', 'run', *args]!r}\n"
        "from evaluate import parse_config, run_script; import pretrain\n"
        "run_script(lambda: pretrain.train(parse_config(pretrain.PretrainConfig, pretrain.PRESETS)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING: could not write to run/bad_files.tsv" in done.stdout and "done: 6 updates" in done.stdout
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 6 and log[-1]["bad_clips"] > 0


def test_the_table_of_classes_is_read_back(tmp_path):
    """Names with commas, quotes and other bytes come back from per_class.csv."""
    from evaluate import write_classes

    classes = {"a": 'Male speech, "man" speaking', "b": os.fsdecode(b"caf\xe9")}
    model = AudioClassifier(MODELS["tiny"], classes)
    write_classes(tmp_path / "c.csv", model, torch.tensor([1, 2]), torch.tensor([0.5, 0.25]))
    with open(tmp_path / "c.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(classes.values())
