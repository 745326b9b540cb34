"""Files and folders as users have them: no sound is lost, none is heard twice, nothing fails in silence."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

sys.path.insert(0, str(ROOT / "extras"))
import listen  # noqa: E402
from data import AudioDataset, InputError, load_audio, log_mel, read_lines, read_pieces  # noqa: E402
from evaluate import read_classes  # noqa: E402
from model import MODELS, AudioClassifier  # noqa: E402

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


def test_a_wav_whose_size_wrapped_is_named(audio, script):
    """5 GiB, of which the 32-bit header can say 1 only; a sparse file, so that it costs no disk."""
    soundfile.write(audio / "x.wav", noise(1, 48_000), 48_000)
    with open(audio / "x.wav", "r+b") as file:
        file.truncate(2**32 + file.seek(0, 2))
    soundfile.write(audio / "y.wav", noise(1), RATE)
    rows, (bad,) = scanned(script, audio)
    assert [row[0] for row in rows] == ["y.wav"] and bad.startswith("x.wav\tclaims 1.0 s and holds 4")


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
