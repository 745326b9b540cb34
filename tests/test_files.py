"""Files and folders as users have them, from the scan to the scores: no sound is lost, none is used twice,
names and labels stay what they are. How single files are read is in test_media.py."""

import builtins
import csv
import json
import os
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone

import evaluate
import pretrain
from data import AudioDataset, InputError, load_audio, log_mel
from evaluate import save_checkpoint
from extras import prepare, released
from extras.listen import tag
from extras.media import stream
from extras.tables import read_classes
from model import MODELS, AudioClassifier

RATE = 44_100
TINY = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2".split()
TINY += "--batch_size 4 --warmup 1".split()


def noise(seconds: float, rate: int = RATE, level: float = 0.2) -> np.ndarray:
    rng = np.random.default_rng(round(1000 * seconds))
    return (level * rng.standard_normal(round(seconds * rate))).astype(np.float32)


def lines_of(path: Path) -> list[str]:
    """Lines of a text file of any bytes; only a line feed ends one."""
    return os.fsdecode(path.read_bytes()).removesuffix("\n").split("\n")


def scanned(folder: Path, labels: str | None = None) -> tuple[list[list[str]], list[str]]:
    """Rows of the manifest m.tsv beside a folder, as `prepare.py scan` makes it, and lines of its .bad."""
    manifest = folder.parent / "m.tsv"
    bad = folder.parent / "m.tsv.bad"
    manifest.unlink(missing_ok=True)
    bad.unlink(missing_ok=True)
    prepare.scan(str(folder), str(manifest), labels)
    rows = [line.split("\t") for line in lines_of(manifest)[1:]]
    if not bad.exists():
        return rows, []
    return rows, lines_of(bad)


@pytest.fixture
def audio(tmp_path) -> Path:
    (tmp_path / "audio").mkdir()
    return tmp_path / "audio"


# --- sound -------------------------------------------------------------------------------------------------


def piped_mp3(path: Path, samples: np.ndarray) -> None:
    """An mp3 of variable bit rate as an encoder writes it into a pipe: without the frame with its length."""
    soundfile.write(path, samples, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    data = path.read_bytes()
    assert 0 < data.find(b"Xing") < 100
    path.write_bytes(data[data.index(data[:2], 200) :])


def test_a_file_that_claims_more_than_it_holds_is_used_once(audio, capsys):
    """A quiet start makes 40 s of mp3 look like 75: it is counted right, and no piece of it comes twice."""
    piped_mp3(audio / "x.mp3", np.concatenate([np.zeros(3 * RATE, np.float32), noise(37)]))
    assert soundfile.info(audio / "x.mp3").duration > 60
    rows, bad = scanned(audio)
    assert int(rows[0][1]) / 16_000 == pytest.approx(40, abs=0.1)
    data = AudioDataset(audio.parent / "m.tsv")
    assert len(data) == 3
    whole = torch.cat([piece for piece, _ in stream(audio / "x.mp3", 163_840)])
    for i in range(3):
        assert data[i].problem == ""
        assert torch.allclose(data.read(i)[:160_000], whole[163_840 * i :][:160_000], atol=1e-5)
    capsys.readouterr()
    prepare.stats(str(audio.parent / "m.tsv"), 100, workers=0)
    mean = float(capsys.readouterr().out.split("--norm_mean")[1].split()[0].strip("="))
    assert mean == pytest.approx(log_mel(whole[: 3 * 163_840]).mean().item(), abs=0.02)
    with pytest.raises(InputError, match="0 samples at 16 kHz from 51.20 s on"):  # only claimed
        load_audio(audio / "x.mp3", 5 * 163_840, 163_840)


def test_encodings_that_cannot_seek_are_used_in_full(audio):
    soundfile.write(audio / "gsm.wav", noise(30, 8000), 8000, subtype="GSM610")
    rows, bad = scanned(audio)
    assert bad == []
    assert int(rows[0][1]) == pytest.approx(480_000, abs=700)
    data = AudioDataset(audio.parent / "m.tsv")
    whole = torch.cat([piece for piece, _ in stream(audio / "gsm.wav", 2**20)])
    for i in range(len(data)):
        clip = data[i]
        there = whole[163_840 * i :][: len(clip.waveform)]
        assert clip.problem == ""
        assert torch.allclose(clip.waveform, there, atol=1e-5)


def test_packed_or_not_a_clip_is_as_loud(audio):
    """Float audio above full scale too."""
    for name, level in (("a.wav", 1.2), ("b.wav", 0.2), ("c.wav", 12.0)):
        soundfile.write(audio / name, noise(3, 16_000, level), 16_000, subtype="FLOAT")
    scanned(audio)
    prepare.pack([str(audio.parent / "m.tsv")], str(audio.parent / "packed.tsv"))
    files = AudioDataset(audio.parent / "m.tsv")
    packed = AudioDataset(audio.parent / "packed.tsv")
    assert len(packed) == 3
    assert files.read(0).abs().max() > 4
    for i in range(3):
        there = files.read(i)
        back = packed.read(i)
        assert (back - there).abs().max() <= there.abs().max() / 2**14
        assert log_mel(back).mean() == pytest.approx(log_mel(there).mean().item(), abs=2e-3)


# --- names -------------------------------------------------------------------------------------------------


ODD = [b"caf\xe9", b"nel\x85x", "two\u2028lines".encode(), b"fs\x1cy", b" lead", b"trail ", b'"quo"', b"\x0b"]
ODD += ["caf\u00e9".encode(), b"page\x0c", b"100%", b"a,b"]


def test_what_we_write_is_read_back_as_it_was(audio, train):
    """Manifests, packed ones, .bad, bad_files.tsv: a name for a line, whatever bytes it has."""
    odd = [os.fsdecode(name) for name in ODD]
    for i, name in enumerate(odd):
        soundfile.write(os.fsencode(audio / f"{name}.wav"), tone(16_000 + i).numpy(), 16_000)
        (audio / f"bad {name}.wav").write_text("no audio")
    rows, bad = scanned(audio)
    names = sorted(f"{name}.wav" for name in odd)
    assert [row[0] for row in rows] == names
    assert [line.split("\t")[0] for line in bad] == sorted(f"bad {name}" for name in names)

    # Some are found damaged later, and one is listed that is not there: the tables of these
    for name in names[::2]:
        (audio / name).write_text("no audio any more")
    with open(audio.parent / "m.tsv", "ab") as file:
        file.write(b"c\rr.wav\t16000\n")
    prepare.pack([str(audio.parent / "m.tsv")], str(audio.parent / "new" / "packed.tsv"))
    packed = AudioDataset(audio.parent / "new" / "packed.tsv")
    assert [packed.name(i) for i in range(len(packed))] == names[1::2]
    lengths = {row[0]: int(row[1]) for row in rows}
    for i in range(len(packed)):
        assert len(packed.read(i)) == lengths[packed.name(i)]
    listed = [line.split("\t")[0] for line in lines_of(audio.parent / "new" / "packed.tsv.bad")]
    assert listed == [*names[::2], "c\rr.wav"]
    args = [*TINY, *"--updates 8 --log_every 1 --workers 0 --max_bad_fraction 1 --out_dir run".split()]
    assert train("--data", "m.tsv", *args) == 0
    listed = [line.split("\t")[0] for line in lines_of(audio.parent / "run" / "bad_files.tsv")]
    assert sorted(listed) == sorted([*names[::2], "c\rr.wav"])  # each once, in eight logs


@pytest.mark.parametrize("text", ["my notes", "a line\n", "name\tnote\nand more"])
def test_a_bad_file_of_others_stays(audio, text):
    soundfile.write(audio / "here.wav", tone(8000).numpy(), 16_000)
    bad = audio.parent / "m.tsv.bad"
    bad.write_text(text)
    with pytest.raises(InputError, match="m.tsv.bad exists: remove it"):
        prepare.scan(str(audio), str(audio.parent / "m.tsv"))
    assert bad.read_text() == text


def test_broken_links_are_listed(audio, capsys):
    """A broken link named as audio is a missing file; any other may have been a folder, and is told."""
    soundfile.write(audio / "here.wav", tone(8000).numpy(), 16_000)
    for i in range(3):
        (audio / f"annexed {i}.wav").symlink_to(f"../.git/annex/objects/{i}")
    (audio / "self.wav").symlink_to("self.wav")
    (audio / "disk").symlink_to(audio.parent / "not mounted")
    (audio / "folder.wav").mkdir()
    soundfile.write(audio / "folder.wav" / "there.wav", tone(8000).numpy(), 16_000)
    rows, bad = scanned(audio)
    assert [row[0] for row in rows] == ["folder.wav/there.wav", "here.wav"]
    names = ["annexed 0.wav", "annexed 1.wav", "annexed 2.wav", "self.wav"]
    assert bad == [f"{name}\ta broken link" for name in names]
    assert f"WARNING: {audio}/disk cannot be opened: a broken link\n" in capsys.readouterr().err


def test_what_cannot_be_read_says_why(audio):
    """As text, with what to do about it where something can be done."""
    (audio / "a.wav").touch()
    (audio / "b \u00e9.wav").write_text("a text")
    (audio / "c.flac").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (audio / "d.mp3").write_text("<!DOCTYPE html><html>not found</html>")
    soundfile.write(audio / "e.wav", tone(300).numpy(), 16_000)
    soundfile.write(audio / "f.wav", tone(8000).numpy(), 16_000)
    rows, bad = scanned(audio)
    assert [row[0] for row in rows] == ["f.wav"]
    assert [line.split("\t")[0] for line in bad] == ["a.wav", "b \u00e9.wav", "c.flac", "d.mp3", "e.wav"]
    said = ["empty", "a text file", "run git lfs pull", "an HTML page: download the file again", "too short"]
    for line, reason in zip(bad, said):
        assert reason in line


# --- labels and classes ------------------------------------------------------------------------------------


@pytest.fixture
def odd_classes(audio) -> list[str]:
    """Folders with names of odd bytes, a clip in each, m.tsv, and c.pt, an untrained classifier of them."""
    labels = [os.fsdecode(name) for name in (*ODD[:4], ODD[5].strip(), *ODD[6:7], *ODD[8:11])]
    for i, label in enumerate(labels):
        (audio / label).mkdir()
        soundfile.write(os.fsencode(audio / label / "x.wav"), tone(16_000 + i).numpy(), 16_000)
    rows, bad = scanned(audio, labels="")
    assert bad == []
    labels = sorted(label.strip() for label in labels)
    assert sorted(row[2] for row in rows) == labels
    config = replace(MODELS["tiny"], clip_frames=64)
    torch.manual_seed(0)
    model = AudioClassifier(config, {label: label for label in labels}, exclusive=True)
    state = dict(network=asdict(config), head=model.head_settings, classifier=model.state_dict())
    save_checkpoint(audio.parent / "c.pt", **state)
    return labels


def test_labels_of_odd_bytes_are_scored(audio, odd_classes, called):
    """Through manifest, network and the table of classes; so with a table of labels that is not UTF-8."""
    rows, _ = scanned(audio, labels="")
    table = b""
    for name, _, label in rows:
        table += os.fsencode('{},"{}"\n'.format(name, label.replace('"', '""')))
    (audio.parent / "t.csv").write_bytes(b"file,label\n" + table.replace(b'"quo"/', b'""quo""/'))
    called(evaluate, "c.pt", "m.tsv", "--workers", 0)
    with open(audio.parent / "per_class.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == odd_classes
    assert {row["clips"] for row in found} == {"1"}


def test_labels_of_odd_bytes_are_exported(audio, odd_classes, called):
    pytest.importorskip("safetensors")
    called(released, "c.pt", "exported")
    assert b"caf\xe9" in (audio.parent / "exported" / "README.md").read_bytes()
    assert [*AudioClassifier.from_pretrained(audio.parent / "exported").classes] == odd_classes


def test_labels_of_odd_bytes_are_drawn(audio, odd_classes, called):
    pytest.importorskip("matplotlib")
    from extras import plot

    called(plot, audio / odd_classes[0] / "x.wav", "--timeline", "c.pt", "-o", "t.png")
    assert (audio.parent / "t.png").read_bytes().startswith(b"\x89PNG")


def test_classes_of_the_same_name_are_both_told(audio):
    torch.manual_seed(0)
    classes = {"/m/0jbk": "Animal", "/m/0k4j": "Car", "/m/zzz": "Animal"}
    soundfile.write(audio / "x.wav", tone(16_000).numpy(), 16_000)
    model = AudioClassifier(MODELS["tiny"], classes, exclusive=True).eval()
    top = tag(model, audio / "x.wav", torch.device("cpu"))["top"]
    assert set(top) == {"Animal (/m/0jbk)", "Car", "Animal (/m/zzz)"}
    assert sum(top.values()) == pytest.approx(1)


@pytest.mark.parametrize("text, classes", [
    # AudioSet's class_labels_indices.csv
    ('index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n',
     {"/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking"}),
    # FSD50K's vocabulary, with a header in another order and without one
    ("index,name,mid\n0,Accordion,/m/0mkg\n1,Applause,/m/028ght\n",
     {"/m/0mkg": "Accordion", "/m/028ght": "Applause"}),
    ("0,Accordion,/m/0mkg\n1,Applause,/m/028ght\n", {"Accordion": "Accordion", "Applause": "Applause"}),
    # The released label_descriptors.csv
    ('0,/m/09x0r\n1,"Bass, guitar"\n', {"/m/09x0r": "/m/09x0r", "Bass, guitar": "Bass, guitar"}),
    # With a header and without names
    ("index,label\n0,dog\n1,cat\n", {"dog": "dog", "cat": "cat"}),
    # A label a line, which may hold what it likes
    ('dog\n  cat \n\nrace car, auto\n"quoted" one\n"\n12\n',
     {label: label for label in ("dog", "cat", "race car, auto", '"quoted" one', '"', "12")}),
    ("two\u2028lines\nnel\x85x\nfs\x1cy\n", {x: x for x in ("two\u2028lines", "nel\x85x", "fs\x1cy")}),
    ("dog", {"dog": "dog"}),
    # Quotes in quotes, and white space around a cell
    ('index , mid , display_name\n0, /m/1 ,"a ""loud"" one"\n', {"/m/1": 'a "loud" one'}),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_classes(tmp_path, text, classes, encoding, end):
    """All four layouts give the classes in order, with a byte order mark or not, and either line end."""
    (tmp_path / "classes").write_bytes(text.replace("\n", end).encode(encoding))
    found = read_classes(tmp_path / "classes")
    assert found == classes
    assert list(found) == list(classes)


@pytest.mark.parametrize("layout", ["{}\n", "index,mid,display_name\n0,{0},{0}\n", "0,{}\n"])
def test_classes_are_the_same_in_either_spelling_of_accents(tmp_path, layout):
    """Composed (NFC), as the labels of a manifest are, though the file has them decomposed."""
    composed = unicodedata.normalize("NFC", "\u00e9tude \u00fc")
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    for spelling in (composed, decomposed):
        (tmp_path / "classes").write_text(layout.format(spelling), encoding="utf-8")
        assert read_classes(tmp_path / "classes") == {composed: composed}
    both = f"{composed}\n{decomposed}\n"
    (tmp_path / "classes").write_text(both, encoding="utf-8")
    with pytest.raises(InputError, match="expected every class once, found 1 in 2 lines"):
        read_classes(tmp_path / "classes")


@pytest.mark.parametrize("data, message", [
    (b"", "expected every class once, found 0 in 0 lines"),
    (b"\n \n", "expected every class once, found 0 in 0 lines"),
    (b"dog\ncat\ndog\n", "expected every class once, found 2 in 3 lines"),
    (b"index,mid,display_name\n0,/m/1,a\n2,/m/2,b\n", "the indices of the classes do not count from 0"),
    (b"1,dog\n2,cat\n", "the indices of the classes do not count from 0"),
    (b"1,dog\n0,cat\n", "the indices of the classes do not count from 0"),
    (b"index,mid,display_name\n0,/m/1,a\n1,/m/1,b\n", "expected every class once, found 1 in 2 lines"),
    (b"caf\xe9\n", "cannot read the classes in .*classes: 'utf-8' codec can't decode"),
    (None, "cannot read the classes in .*classes: .*No such file"),
])  # fmt: skip
def test_what_is_no_file_of_classes(tmp_path, data, message):
    if data is not None:
        (tmp_path / "classes").write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_classes(tmp_path / "classes")
    assert "\n" not in str(error.value)


def test_tables_with_a_byte_order_mark(tmp_path):
    """As spreadsheets write them: ESC-50's, AudioSet's, and lists of the released code."""
    (tmp_path / "ESC" / "meta").mkdir(parents=True)
    (tmp_path / "ESC" / "audio").mkdir()
    rows = ["filename,fold,target,category", "1.wav,1,0,dog", "2.wav,2,0,dog"]
    (tmp_path / "ESC" / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    for name in ("1", "2", "0123456789a"):
        soundfile.write(tmp_path / "ESC" / "audio" / f"{name}.wav", tone(8000).numpy(), 16_000)
    prepare.esc50(str(tmp_path / "ESC"), str(tmp_path / "esc50"))
    assert lines_of(tmp_path / "esc50" / "test1.tsv")[1:] == ["1.wav\t8000\tdog"]
    labels = tmp_path / "labels.csv"
    labels.write_text("index,mid,display_name\n0,/m/09x0r,Speech\n", encoding="utf-8-sig")
    segments = tmp_path / "segments.csv"
    segments.write_text("# list\n0123456789a, 0, 10, /m/09x0r\n", encoding="utf-8-sig")
    prepare.audioset(str(segments), str(labels), str(tmp_path / "ESC"), str(tmp_path / "as.tsv"))
    assert lines_of(tmp_path / "as.tsv")[1:] == ["audio/0123456789a.wav\t8000\t/m/09x0r"]
    old = tmp_path / "old.tsv"
    old.write_text(f"{tmp_path}/ESC/audio\r\n1.wav 48000\r\n", encoding="utf-8-sig", newline="")
    (tmp_path / "old.lbl").write_text("1 dog\r\n", encoding="utf-8-sig", newline="")
    prepare.released(str(old), str(tmp_path / "new.tsv"))
    assert lines_of(tmp_path / "new.tsv")[1:] == ["1.wav\t8000\tdog"]


# --- a run -------------------------------------------------------------------------------------------------


def test_a_list_of_bad_files_that_cannot_be_written_costs_the_list_not_the_run(
    folder, train, monkeypatch, capsys
):
    """On a full disk: a warning, as for the log."""
    (folder / "clip 2.wav").write_text("damaged")

    def full(path, mode="r", *args, **kwargs):
        if "a" in mode and str(path).endswith("bad_files.tsv"):
            raise OSError(28, "No space left on device", str(path))
        return builtins.open(path, mode, *args, **kwargs)

    monkeypatch.setattr(pretrain, "open", full, raising=False)
    args = [*TINY, *"--updates 6 --log_every 2 --min_samples 1600 --workers 0 --max_bad_fraction 1".split()]
    assert train("--data", "manifest.tsv", "--out_dir", "run", *args) == 0
    said = capsys.readouterr().out
    assert "WARNING: could not write to run/bad_files.tsv" in said
    assert "done: 6 updates" in said
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 6
    assert log[-1]["bad_clips"] > 0
