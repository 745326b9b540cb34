"""Packed copies of manifests, tar and parquet files: `extras/prepare.py pack`, extras/shards.py."""

import gzip
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

from data import AudioDataset, InputError, load_audio
from extras import prepare, shards

PREPARE = "extras/prepare.py"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
CLASSES = "index,mid,display_name\n0,/m/a,Bark\n1,/m/b,\"Bark, loud\"\n2,/m/c,Rain\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("packed*")}


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def bad_of(path: Path) -> dict[str, str]:
    lines = Path(f"{path}.bad").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def pack(folder: Path, *sources: str, classes: str = "") -> int:
    """Pack files of a folder into its packed.tsv."""
    paths = [str(folder / name) for name in sources]
    return prepare.pack(paths, str(folder / "packed.tsv"), classes, workers=2)


def clip_bytes(i: int, form: str = "WAV", n_samples: int = 8000) -> bytes:
    """A sound file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(n_samples, hz=200 + 50 * i).numpy(), 16_000, format=form)
    return buffer.getvalue()


def pcm_of(data: bytes) -> np.ndarray:
    """What libsndfile makes of it."""
    return soundfile.read(io.BytesIO(data), dtype="int16")[0]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, files: dict[str, bytes], **form) -> None:
    with tarfile.open(path, "w", **form) as tar:
        for name, data in files.items():
            add(tar, name, data)


def web_dataset(n: int, first: int = 0) -> dict[str, bytes]:
    """Files of n clips and their labels, as in a tar of AudioSet's."""
    files = {}
    for i in range(first, first + n):
        files[f"{i:05d}.wav"] = clip_bytes(i)
        record = {"id": f"x{i}", "label": ["Bark", "Rain"][i % 2], "label_id": [i % 2 * 2]}
        files[f"{i:05d}.json"] = json.dumps(record).encode()
    return files


# --- manifests ---------------------------------------------------------------------------------------------


def assert_equal_to_the_files(files: AudioDataset, packed: AudioDataset):
    """The same items, labels and sound."""
    assert len(files) == len(packed)
    assert packed.is_packed
    for i in range(len(files)):
        assert packed.name(i) == files.name(i)
        assert packed.labels(i) == files.labels(i)
        assert torch.equal(packed.read(i), files.read(i))  # the wav files hold int16 as well


def test_pack_and_files_give_the_same(folder, script):
    """Packed data is one .pcm beside its list, without the clips that cannot be read, which are named."""
    files = AudioDataset(folder / "manifest.tsv")
    (folder / "text.wav").write_text("no audio")
    (folder / "empty.wav").touch()
    with open(folder / "manifest.tsv", "a") as file:
        for name in ("text.wav", "empty.wav", "gone.wav", "../up.wav"):
            file.write(f"{name}\t16000\tbad\n")
    said = script(PREPARE, "pack", "manifest.tsv", "packed.tsv", "--workers", 1).stdout
    assert "packed.tsv: 8 clips, 0.00 h" in said
    assert "; 4 left out, listed in packed.tsv.bad: " in said
    assert "2 classes: high (4), low (4)\n" in said
    assert set(contents(folder)) == {"packed.tsv", "packed.pcm", "packed.tsv.bad"}
    assert (folder / "packed.tsv").read_text().splitlines()[0] == "packed.pcm"
    assert (folder / "packed.pcm").stat().st_size == 2 * int(files.manifest.n_samples.sum())
    assert_equal_to_the_files(files, AudioDataset(folder / "packed.tsv"))
    assert list(bad_of(folder / "packed.tsv")) == ["text.wav", "empty.wav", "gone.wav", "../up.wav"]
    again = script(PREPARE, "pack", "manifest.tsv", "packed.tsv", check=False)
    assert again.returncode == 1
    assert again.stderr == "prepare.py: packed.tsv exists: remove it or choose another name\n"


def test_several_manifests_are_packed_one_after_the_other(folder):
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "a.tsv").write_text("\n".join(lines[:4]) + "\n")
    (folder / "b.tsv").write_text("\n".join([lines[0], *lines[4:]]) + "\n")
    assert pack(folder, "a.tsv", "b.tsv") == 0
    assert_equal_to_the_files(AudioDataset(folder / "manifest.tsv"), AudioDataset(folder / "packed.tsv"))


def test_silence_is_the_same_packed(tmp_path):
    """A piece without sound is replaced in training, as of files, and read for scoring."""
    silence = torch.zeros(5 * 10_240)
    for name, parts in (("a", [tone(10_240), silence, tone(10_240)]), ("b", [silence]), ("c", [tone(8000)])):
        soundfile.write(tmp_path / f"{name}.wav", torch.cat(parts).numpy(), 16_000)
    lines = [str(tmp_path), f"a.wav\t{7 * 10_240}\tx", f"b.wav\t{5 * 10_240}\ty", "c.wav\t8000\tx"]
    (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
    pack(tmp_path, "m.tsv")
    forms = [(dict(), 13, 9), (dict(segments=False), 3, 1), (dict(allow_silence=True), 13, 0)]
    for form, n_items, n_problems in forms:
        files = AudioDataset(tmp_path / "m.tsv", n_frames=64, **form)
        packed = AudioDataset(tmp_path / "packed.tsv", n_frames=64, **form)
        assert len(files) == len(packed) == n_items
        for i in range(n_items):
            assert (files[i].problem, files[i].item) == (packed[i].problem, packed[i].item)
            assert torch.equal(files[i].waveform, packed[i].waveform)
        assert sum(bool(packed[i].problem) for i in range(n_items)) == n_problems


def test_a_long_file_is_packed_whole(tmp_path):
    """Decoded in pieces, it is the same as in one, at 16 kHz, at another rate, and as mp3."""
    soundfile.write(tmp_path / "long.wav", tone(16_000 * 25).numpy(), 16_000)
    soundfile.write(tmp_path / "other.wav", tone(44_100 * 25, 44_100).numpy(), 44_100, subtype="FLOAT")
    low = dict(bitrate_mode="VARIABLE", compression_level=0.9)
    soundfile.write(tmp_path / "low.mp3", tone(22_050 * 25, 22_050).numpy(), 22_050, **low)
    prepare.scan(str(tmp_path), str(tmp_path / "m.tsv"))
    pack(tmp_path, "m.tsv")
    packed = AudioDataset(tmp_path / "packed.tsv", 4000, segments=False)
    assert [packed.name(i) for i in range(3)] == ["long.wav", "low.mp3", "other.wav"]
    for i, name in enumerate(["long.wav", "low.mp3", "other.wav"]):
        whole = load_audio(tmp_path / name)
        rounding = 0.502 / 32768
        assert len(packed.read(i)) == pytest.approx(len(whole), abs=1)
        n = min(len(whole), len(packed.read(i)))
        torch.testing.assert_close(packed.read(i)[:n], whole[:n], rtol=0, atol=rounding)


def test_float_audio_above_full_scale_is_packed_as_it_is(tmp_path):
    """By a gain that the list has."""
    loud = 12 * torch.randn(48_000, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    late = torch.cat([loud.repeat(4) / 100, loud])  # known only in its second piece
    for name, sound in (("a.wav", loud), ("b.wav", loud / 100), ("c.wav", late)):
        soundfile.write(tmp_path / name, sound.numpy(), 16_000, subtype="FLOAT")
    prepare.scan(str(tmp_path), str(tmp_path / "m.tsv"))
    pack(tmp_path, "m.tsv")
    files = AudioDataset(tmp_path / "m.tsv")
    packed = AudioDataset(tmp_path / "packed.tsv")
    assert files.read(0).abs().max() > 40
    for i in range(len(files)):
        gain = float(packed.manifest.fields(packed.line[i])[3]) if i != 1 else 1.0
        torch.testing.assert_close(packed.read(i), files.read(i), rtol=0, atol=1.01 * gain / 32768)
    assert packed.labels(0) == []


def test_damage_in_the_middle_costs_its_piece(tmp_path, capsys):
    """The sound before and behind it is packed in its place, and .bad says it."""
    sound = 0.3 * torch.randn(16_000 * 60, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    soundfile.write(tmp_path / "x.flac", sound.numpy(), 16_000)
    whole = load_audio(tmp_path / "x.flac")
    data = bytearray((tmp_path / "x.flac").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 100] = bytes(100)
    (tmp_path / "x.flac").write_bytes(data)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nx.flac\t960000\n")
    assert pack(tmp_path, "m.tsv") == 0
    packed = torch.from_numpy(np.fromfile(tmp_path / "packed.pcm", "<i2") / 32768).float()
    assert len(packed) == len(whole)
    differs = ((packed - whole).abs() > 1e-4).nonzero().flatten()
    assert 0 < len(differs) < 3 * 16_000
    assert 25 * 16_000 < differs.min() < differs.max() < 35 * 16_000
    assert bad_of(tmp_path / "packed.tsv")["x.flac"].startswith("kept, but damaged at ")
    assert "1 damaged, but kept: see " in capsys.readouterr().out


def test_a_piece_that_is_no_audio_is_silence(tmp_path):
    """Numbers that are none, in one piece of three."""
    sound = tone(16_000 * 30).numpy()
    sound[16_000 * 15] = np.nan
    soundfile.write(tmp_path / "x.wav", sound, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nx.wav\t480000\nnan.wav\t16000\n")
    pack(tmp_path, "m.tsv")
    packed = np.fromfile(tmp_path / "packed.pcm", "<i2") / 32768
    expected = sound.copy()
    expected[163_840:327_680] = 0
    assert np.abs(packed - expected).max() < 1e-4
    bad = bad_of(tmp_path / "packed.tsv")
    assert bad["x.wav"].startswith("kept, but its samples reach nan")
    assert bad["x.wav"].endswith("(at 10.2 s)")
    assert bad["nan.wav"].startswith("its samples reach nan")


def test_pack_touches_no_other_file(folder):
    """A .pcm, list or .bad that is there already is somebody's, whatever it holds."""
    for name in ("mine.pcm", "list.tsv", "other.tsv.bad"):
        (folder / name).write_text("precious\n")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name, message in [
        ("mine.tsv", "mine.pcm exists: remove it"), ("list.tsv", "list.tsv exists: remove it"),
        ("other.tsv", "other.tsv.bad exists: remove it"), ("shards", "must end with .tsv"),
        ("manifest.tsv", "must end with .tsv"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            prepare.pack([str(folder / "manifest.tsv")], str(folder / name))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_source_that_is_named_twice_is_refused(folder):
    (folder / "link.tsv").symlink_to("manifest.tsv")
    with pytest.raises(InputError, match="link.tsv is named twice, or the same as .*manifest.tsv"):
        pack(folder, "manifest.tsv", "link.tsv")
    assert not (folder / "packed.tsv.partial").exists()


def test_pack_makes_the_folder_of_its_output(folder):
    prepare.pack([str(folder / "manifest.tsv")], str(folder / "a" / "new" / "packed.tsv"))
    assert len(AudioDataset(folder / "a" / "new" / "packed.tsv")) == 8


def test_pack_of_bad_files_only(folder):
    """Nothing is left that would be in the way when the files are there."""
    (folder / "away").mkdir()
    for path in folder.glob("*.wav"):
        path.rename(folder / "away" / path.name)
    with pytest.raises(InputError, match="no clip can be read: see .*packed.tsv.bad"):
        pack(folder, "manifest.tsv")
    assert len(bad_of(folder / "packed.tsv")) == 8
    for path in (folder / "away").iterdir():
        path.rename(folder / path.name)
    pack(folder, "manifest.tsv")
    assert_equal_to_the_files(AudioDataset(folder / "manifest.tsv"), AudioDataset(folder / "packed.tsv"))
    assert not (folder / "packed.tsv.bad").exists()


def test_pack_keeps_what_it_knows_of_a_line(folder):
    """A fourth column of somebody's manifest is not taken for a gain."""
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "m.tsv").write_text("\n".join([lines[0], *(f"{line}\ta note" for line in lines[1:])]) + "\n")
    pack(folder, "m.tsv")
    assert_equal_to_the_files(AudioDataset(folder / "m.tsv"), AudioDataset(folder / "packed.tsv"))


# --- stopped and started again -----------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def sources(folder) -> list[str]:
    """A manifest with a file that is damaged, and two tar files, the first of which is cut."""
    (folder / "clip 2.wav").write_text("damaged")
    write_tar(folder / "0.tar", web_dataset(4))
    write_tar(folder / "1.tar", web_dataset(4, 4))
    data = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(data[: len(data) * 6 // 10])
    return ["manifest.tsv", "0.tar", "1.tar"]


@pytest.mark.parametrize("n_read", [0, 1, 3, 8, 9, 10, 11, 12, 14])
def test_pack_goes_on_where_it_was(folder, sources, monkeypatch, n_read):
    """What is done is not decoded again; a sample or line that was half-written is written anew."""
    assert pack(folder, *sources) == 1  # clips are missing in the first tar
    expected = contents(folder)
    for name in expected:
        (folder / name).unlink()
    decode = prepare.decode
    decoded = []

    def dies(path):
        decoded.append(path)
        if len(decoded) == n_read + 1:
            raise Killed
        return decode(path)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "decode", dies)
        if n_read < 14:
            with pytest.raises(Killed):
                prepare.pack([str(folder / name) for name in sources], str(folder / "packed.tsv"), workers=1)
            assert not (folder / "packed.tsv").exists()
            with open(folder / "packed.pcm", "ab") as pcm:
                pcm.write(b"\1" * 200_001)
            with open(folder / "packed.tsv.partial", "ab") as partial:
                partial.write(b"0\tkept\tclip 5.wav\tkept, but damaged\n0\tclip\tclip 5.wav\t16")
        n_before = len(decoded)
        patch.setattr(prepare, "decode", lambda path: decoded.append(path) or decode(path))
        assert pack(folder, *sources) == 1
    assert contents(folder) == expected
    if n_read < 14:
        assert len(decoded) - n_before <= 14 - n_read + 4  # what threads had decoded ahead


def test_a_killed_process_goes_on_to_the_same(folder):
    """SIGKILL in the first and the second source, and once behind the list, before the end."""
    sources = [str(folder / "0.tar"), str(folder / "1.tar")]
    write_tar(folder / "0.tar", web_dataset(100))
    write_tar(folder / "1.tar", web_dataset(100, 100))
    assert pack(folder, "0.tar", "1.tar") == 0
    expected = contents(folder)
    for name in expected:
        (folder / name).unlink()
    partial = folder / "packed.tsv.partial"
    for n_done in (20, 110):
        command = [PREPARE, "pack", *sources, str(folder / "packed.tsv"), "--workers", "2"]
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        n_lines = 0
        while process.poll() is None and n_lines <= n_done:
            time.sleep(0.001)
            n_lines = partial.read_bytes().count(b"\n") if partial.exists() else 0
        process.send_signal(signal.SIGSTOP)
        try:
            before = partial.read_bytes()
            with pytest.raises(InputError, match="another process is packing into .*packed.tsv: wait for it"):
                pack(folder, "0.tar", "1.tar")
            assert partial.read_bytes() == before
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert n_done < partial.read_bytes().count(b"\n") < 201
    listed = partial.read_bytes()
    for _ in range(2):
        assert pack(folder, "0.tar", "1.tar") == 0
        assert contents(folder) == expected
        partial.write_bytes(listed)


CHANGES = ["fewer clips", "other labels", "another folder", "another tar", "other classes"]


@pytest.mark.parametrize("change", CHANGES)
def test_pack_does_not_go_on_with_other_sources(folder, sources, monkeypatch, change):
    """What is there was not made from them, and stays."""
    (folder / "classes.csv").write_text(CLASSES)
    monkeypatch.setattr(prepare, "finish", lambda *args: 0)
    classes = str(folder / "classes.csv")
    pack(folder, *sources, classes=classes)
    before = contents(folder)
    text = (folder / "manifest.tsv").read_text()
    if change == "fewer clips":
        (folder / "manifest.tsv").write_text(text[:-50])
    elif change == "other labels":
        (folder / "manifest.tsv").write_text(text.replace("low", "deep"))
    elif change == "another folder":
        (folder / "manifest.tsv").write_text(text.replace(str(folder), f"{folder}/.."))
    elif change == "another tar":
        write_tar(folder / "1.tar", web_dataset(3))
    else:
        (folder / "classes.csv").write_text(CLASSES.replace("/m/c", "/m/d"))
    with pytest.raises(InputError, match="packed.tsv.partial was begun with other sources: remove it"):
        pack(folder, *sources, classes=classes)
    assert contents(folder) == before


@pytest.mark.parametrize("is_gone", [True, False])
def test_pack_does_not_go_on_without_its_samples(folder, sources, monkeypatch, is_gone):
    """A .pcm that is gone, or shorter than what is said to be done, is not filled up with silence."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish", lambda *args: 0)
        pack(folder, *sources)
    pcm = folder / "packed.pcm"
    if is_gone:
        pcm.unlink()
    else:
        pcm.write_bytes(pcm.read_bytes()[:-2])
    with pytest.raises(InputError, match="begun with another .pcm: remove it and .*packed.pcm"):
        pack(folder, *sources)
    assert not (folder / "packed.tsv").exists()


# --- tar ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_as_audioset_has_it(tmp_path, script, form):
    """Names of any length; sound as libsndfile decodes it; display names with a comma remain one label."""
    files = {}
    for i, label in enumerate(["Bark, loud", "Rain", "Rain"]):
        name = f"{'a long folder/' * 7}ÿ{i:06d}"
        files[f"{name}.wav"] = clip_bytes(i)
        files[f"{name}.json"] = json.dumps({"id": f"x{i}", "label": [label], "label_id": [1]}).encode()
    write_tar(tmp_path / "x.tar", files, format=form)
    said = script(PREPARE, "pack", "x.tar", "packed.tsv").stdout
    assert "'Bark, loud' becomes 'Bark; loud'" in said
    assert "2 classes: Bark; loud (1), Rain (2)" in said
    sounds = [data for name, data in files.items() if name.endswith(".wav")]
    expected = np.concatenate([pcm_of(data) for data in sounds])
    assert np.array_equal(np.fromfile(tmp_path / "packed.pcm", "<i2"), expected)
    assert [row[2] for row in rows_of(tmp_path / "packed.tsv")] == ["Bark; loud", "Rain", "Rain"]
    assert rows_of(tmp_path / "packed.tsv")[0][0] == f"x.tar/{'a long folder/' * 7}ÿ000000.wav"


@pytest.mark.parametrize("sidecars, labels", [
    ({".json": b'{"label": "Bark"}'}, ["Bark"]), ({".JSON": b'{"label": "Bark"}'}, ["Bark"]),
    ({".json": b'{"label": ["Bark", "Rain"]}'}, ["Bark", "Rain"]),
    ({".json": b'{"labels": ["Bark"], "text": "a dog"}'}, ["Bark"]),
    ({".json": b'{"label_id": [0, 2]}'}, ["0", "2"]), ({".json": b'{"text": "a dog"}'}, []),
    ({".json": b'{"target": 5, "category": "Bark"}'}, ["Bark"]),
    ({".cls": b"7"}, ["7"]), ({".cls": b"Bark\n"}, ["Bark"]), ({".txt": b"Bark"}, ["Bark"]), ({}, []),
    ({".txt": b"a dog barks", ".json": b'{"label": "Bark"}'}, ["Bark"]),
    ({".json": b'{"labels": "dog,cat"}'}, ["dog", "cat"]),
    ({".json": b'{"labels": "Bark, loud"}'}, ["Bark; loud"]),
    ({".json": b'["Bark"]'}, []), ({".json": b'{"label": null}'}, []), ({".png": b"x", ".cls": b"0"}, ["0"]),
])  # fmt: skip
@pytest.mark.parametrize("is_before", [False, True])
def test_labels_beside_the_sound(tmp_path, sidecars, labels, is_before):
    """In whatever form, before or behind it."""
    beside = {f"a/{i}{suffix}": data for i in range(2) for suffix, data in sidecars.items()}
    files = {f"a/{i}.wav": clip_bytes(i) for i in range(2)} | beside
    order = sorted(files, key=lambda name: (name.split(".")[0], (name.endswith("wav") == is_before)))
    write_tar(tmp_path / "x.tar", {name: files[name] for name in order})
    assert pack(tmp_path, "x.tar") == 0
    data = AudioDataset(tmp_path / "packed.tsv")
    assert [data.labels(i) for i in range(2)] == [labels, labels]


def test_classes_choose_the_labels(tmp_path, capsys):
    """By index, display name or mid, all become mids; what is none of them is left out and named."""
    (tmp_path / "classes.csv").write_text(CLASSES)
    named = {"label": ["Bark, loud"], "label_id": [1]}
    records = [named, {"label_id": [2, 0]}, {"labels": ["/m/c"]}, {"label": "Owl"}, {}]
    files = {}
    for i, record in enumerate(records):
        files[f"{i}.wav"] = clip_bytes(i)
        files[f"{i}.json"] = json.dumps(record).encode()
    write_tar(tmp_path / "x.tar", files)
    assert pack(tmp_path, "x.tar", classes=str(tmp_path / "classes.csv")) == 0
    data = AudioDataset(tmp_path / "packed.tsv")
    assert [data.labels(i) for i in range(4)] == [["/m/b"], ["/m/c", "/m/a"], ["/m/c"], []]
    assert "'Owl' is not among --classes" in bad_of(tmp_path / "packed.tsv")[f"{tmp_path}/x.tar/3.wav"]
    said = capsys.readouterr().out
    assert "becomes" not in said
    assert "1 clips without label" in said


def test_names_with_dots_and_several_sounds_of_a_key(tmp_path):
    """WebDataset's key ends at the first dot: a label of the whole name goes before one of the key."""
    files = {
        "Zbc_30.000.wav": clip_bytes(0), "Zbc_30.000.cls": b"a", "Zbc_30.500.wav": clip_bytes(1),
        "Zbc_30.500.cls": b"b", "mix.left.flac": clip_bytes(2, "FLAC"),
        "mix.right.flac": clip_bytes(3, "FLAC"), "mix.cls": b"c",
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", files)
    pack(tmp_path, "x.tar")
    assert [row[2] for row in rows_of(tmp_path / "packed.tsv")] == ["a", "b", "c", "c"]


def test_what_else_is_in_a_tar(tmp_path):
    """Folders and what macOS adds are no clips; links, damaged clips, and labels without sound are named."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "a/._0.wav", b"x")
        add(tar, "a/0.wav", clip_bytes(0))
        add(tar, "a/1.wav", b"no audio")
        add(tar, "a/2.json", b"{}")
        add(tar, "a/3.wav", clip_bytes(3))
        add(tar, "a/3.json", b"{")
        add(tar, "a/4\t.wav", clip_bytes(4))
        link = tarfile.TarInfo("a/5.wav")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)
    assert pack(tmp_path, "x.tar") == 0
    path = f"{tmp_path}/x.tar/a"
    assert [row[0] for row in rows_of(tmp_path / "packed.tsv")] == [f"{path}/0.wav", f"{path}/4\\t.wav"]
    bad = bad_of(tmp_path / "packed.tsv")
    assert sorted(bad) == [f"{path}/1.wav", f"{path}/2.json", f"{path}/3.wav", f"{path}/5.wav"]
    assert "no sound beside it" in bad[f"{path}/2.json"]
    assert "not JSON" in bad[f"{path}/3.wav"]
    assert "a link" in bad[f"{path}/5.wav"]


@pytest.mark.parametrize("part", [0.3, 0.5, 0.8, 0.93])
def test_a_tar_that_is_cut_keeps_what_is_whole(tmp_path, script, part):
    """The clip in which it ends is named, that more may be missing is said, and the exit status is 1."""
    files = web_dataset(5)
    write_tar(tmp_path / "x.tar", files)
    data = (tmp_path / "x.tar").read_bytes()
    end = int(part * 5 * (512 + 16_384 + 1024))  # of the bytes that hold members
    (tmp_path / "x.tar").write_bytes(data[:end])
    done = script(PREPARE, "pack", "x.tar", "packed.tsv", check=False)
    assert done.returncode == 1
    assert "WARNING: clips are missing: x.tar " in done.stderr
    rows = rows_of(tmp_path / "packed.tsv")
    assert len(rows) == int(part * 5)
    expected = [pcm_of(files[f"{i:05d}.wav"]) for i in range(len(rows))]
    assert np.array_equal(np.fromfile(tmp_path / "packed.pcm", "<i2"), np.concatenate(expected))
    assert "x.tar" in bad_of(tmp_path / "packed.tsv")


def test_a_tar_that_is_cut_between_two_clips(tmp_path, script):
    """Nothing is half there, but the mark of its end."""
    write_tar(tmp_path / "x.tar", web_dataset(3))
    data = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        end = tar.getmembers()[4].offset
    (tmp_path / "x.tar").write_bytes(data[:end])
    done = script(PREPARE, "pack", "x.tar", "packed.tsv", check=False)
    assert done.returncode == 1
    assert len(rows_of(tmp_path / "packed.tsv")) == 2
    assert "the end is missing" in done.stderr


@pytest.mark.parametrize("noise", [b"\xff" * 512, b"\0" * 512, b"<html>".ljust(512)])
def test_a_damaged_header_costs_its_clip(tmp_path, capsys, noise):
    """tarfile would stop there without a word."""
    write_tar(tmp_path / "x.tar", web_dataset(5))
    with tarfile.open(tmp_path / "x.tar") as tar:
        at = tar.getmember("00002.wav").offset
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[at : at + 512] = noise
    (tmp_path / "x.tar").write_bytes(data)
    assert pack(tmp_path, "x.tar") == 1
    names = [Path(row[0]).name for row in rows_of(tmp_path / "packed.tsv")]
    assert names == ["00000.wav", "00001.wav", "00003.wav", "00004.wav"]
    assert "damaged" in capsys.readouterr().err


def test_two_tar_files_in_one(tmp_path):
    """As `cat` makes them, and with a global header, as git does: every clip, nothing is called damaged."""
    form = dict(format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"})
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", web_dataset(2, 2 * i), **form)
    (tmp_path / "both.tar").write_bytes((tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes())
    assert pack(tmp_path, "both.tar") == 0
    assert len(rows_of(tmp_path / "packed.tsv")) == 4
    assert not (tmp_path / "packed.tsv.bad").exists()


def test_a_large_tar_takes_little_memory(tmp_path):
    """tarfile keeps all members that it has seen."""
    header = tarfile.TarInfo("x.wav").tobuf()
    with open(tmp_path / "x.tar", "wb") as file:
        for i in range(2_000):
            file.write(tarfile.TarInfo(f"{i:08d}.wav").tobuf())
        file.write(bytes(1024))
    assert len(header) == 512
    tracemalloc.start()
    n_entries = sum(1 for _ in shards.entries_of(str(tmp_path / "x.tar"), {}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_entries == 2_000
    assert peak < 500_000


@pytest.mark.parametrize("name, data, message", [
    ("x.tar", POINTER, "a Git LFS pointer: run git lfs pull"),
    ("x.tar", b"<!DOCTYPE html><html>Sign in</html>", "an HTML page"), ("x.tar", b"", "empty"),
    ("x.parquet", POINTER, "a Git LFS pointer"), ("x.parquet", b"PAR1" + bytes(1000), "is no parquet file"),
    ("x.tar.gz", b"\x1f\x8b\x08\0\0", "unpack or rename it"), ("gone.tar", None, "no file .*gone.tar"),
    ("*.tar", None, "no file .*[*].tar"), ("x.tar", "folder", "no file"),
    ("x.tar", gzip.compress(bytes(20_480), mtime=0), "it is compressed: unpack it"),
])  # fmt: skip
def test_shards_that_are_none_are_named_before_the_work(tmp_path, name, data, message):
    """In one line; another shard before it is not begun."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    write_tar(tmp_path / "good.tar", web_dataset(1))
    if data == "folder":
        (tmp_path / name).mkdir()
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        pack(tmp_path, "good.tar", name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("packed*"))


# --- parquet -----------------------------------------------------------------------------------------------


@pytest.fixture
def write_parquet(tmp_path):
    """Writes columns, and Hugging Face's features if there are some, to a parquet file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name: str, columns: dict, features: dict | None = None, **form) -> None:
        table = pyarrow.table(columns)
        if features:
            text = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": text})
        parquet.write_table(table, tmp_path / name, **form)

    return write


def sounds(n: int, form: str = "FLAC") -> list[dict]:
    return [{"bytes": clip_bytes(i, form), "path": f"clip {i}.{form.lower()}"} for i in range(n)]


def test_a_parquet_file_as_audioset_has_it(tmp_path, script, write_parquet):
    """Mids are its labels, or with --classes whatever is one of them; sound as libsndfile decodes it."""
    columns = dict(
        video_id=["a", "b", "c"], audio=sounds(3), labels=[["/m/a"], ["/m/b", "/m/c"], []],
        human_labels=[["Bark"], ["Bark, loud", "Rain"], []],
    )  # fmt: skip
    write_parquet("x.parquet", columns)
    said = script(PREPARE, "pack", "x.parquet", "packed.tsv").stdout
    assert "becomes" not in said
    expected = np.concatenate([pcm_of(sound["bytes"]) for sound in columns["audio"]])
    assert np.array_equal(np.fromfile(tmp_path / "packed.pcm", "<i2"), expected)
    assert rows_of(tmp_path / "packed.tsv") == [
        ["x.parquet/clip 0.flac", "8000", "/m/a"], ["x.parquet/clip 1.flac", "8000", "/m/b,/m/c"],
        ["x.parquet/clip 2.flac", "8000"],
    ]  # fmt: skip
    del columns["labels"]
    write_parquet("y.parquet", columns)
    (tmp_path / "classes.csv").write_text(CLASSES)
    script(PREPARE, "pack", "y.parquet", "other.tsv", "--classes", "classes.csv")
    assert [row[2:] for row in rows_of(tmp_path / "other.tsv")] == [["/m/a"], ["/m/b,/m/c"], []]
    said = script(PREPARE, "pack", "y.parquet", "names.tsv").stdout
    assert "'Bark, loud' becomes 'Bark; loud'" in said
    assert rows_of(tmp_path / "names.tsv")[1][2] == "Bark; loud,Rain"


@pytest.mark.parametrize("columns, features, labels", [
    (dict(label=[1, 0]), {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}, [["dog"], ["cat"]]),
    (dict(label=[-1, 0]), {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}, [[], ["cat"]]),
    (dict(labels=[[1], []]), {"labels": {"feature": {"names": ["cat", "dog"]}}}, [["dog"], []]),
    (dict(labels=[[1], [0, 1]]), {"labels": [{"names": ["cat", "dog"]}]}, [["dog"], ["cat", "dog"]]),
    (dict(label=[1, 0]), None, [["1"], ["0"]]), (dict(label=["dog", "cat"]), None, [["dog"], ["cat"]]),
    (dict(classID=[3, 1], **{"class": ["dog_bark", "car_horn"]}), None, [["dog_bark"], ["car_horn"]]),
    (dict(target=[3, 1], category=["dog", "cat"], fold=[1, 2]), None, [["dog"], ["cat"]]),
    (dict(speaker=["Ann", "Bob"]), None, [[], []]),
    (dict(genre=[1, 0]), {"genre": {"names": ["jazz", "pop"], "_type": "ClassLabel"}}, [["pop"], ["jazz"]]),
    (dict(label=["dog", "cat"]), {"label": {"names": ["cat", "dog"]}}, [["dog"], ["cat"]]),
    (dict(label=[1.0, 0.0]), {"label": {"names": ["cat", "dog"]}}, [["dog"], ["cat"]]),
    (dict(label=["dog", "cat"]), ["no object"], [["dog"], ["cat"]]),
])  # fmt: skip
def test_labels_of_parquet_columns(tmp_path, write_parquet, columns, features, labels):
    """Of the Hub's audio sets: integers with names and without, texts, lists."""
    write_parquet("x.parquet", dict(audio=sounds(2), **columns), features)
    assert pack(tmp_path, "x.parquet") == 0
    data = AudioDataset(tmp_path / "packed.tsv")
    assert [data.labels(i) for i in range(2)] == labels


def test_sound_in_other_columns(tmp_path, write_parquet):
    """Plain bytes; a picture beside it; no path; none at all is refused, an empty row is named."""
    wavs = [clip_bytes(i) for i in range(3)]
    write_parquet("a.parquet", dict(wav=wavs, cover=[b"png"] * 3))
    write_parquet("b.parquet", dict(file=[{"bytes": data, "path": None} for data in wavs]))
    write_parquet("c.parquet", dict(audio=[{"bytes": None, "path": "/elsewhere/x.wav"}, *sounds(1)]))
    assert pack(tmp_path, "a.parquet", "b.parquet", "c.parquet") == 0
    expected = np.concatenate([pcm_of(data) for data in [*wavs, *wavs, sounds(1)[0]["bytes"]]])
    assert np.array_equal(np.fromfile(tmp_path / "packed.pcm", "<i2"), expected)
    (reason,) = bad_of(tmp_path / "packed.tsv").values()
    assert reason == "the row holds no sound"
    for columns in (dict(text=["a"]), dict(a=[b"x"], b=[b"y"])):
        write_parquet("d.parquet", columns)
        with pytest.raises(InputError, match="which of the columns .* is the sound"):
            prepare.pack([str(tmp_path / "d.parquet")], str(tmp_path / "d.tsv"))


def test_a_row_of_any_kind_costs_itself(tmp_path, write_parquet):
    """Addresses as paths, other types, labels without end: the other rows are packed."""
    address = "https://x.org/a.wav?Signature=" + "a" * 300
    paths = [address, "x.\0wav", "\x1b[31m.wav"]
    rows = [{"bytes": clip_bytes(i), "path": path} for i, path in enumerate(paths)]
    write_parquet("a.parquet", dict(audio=rows))
    write_parquet("b.parquet", dict(audio=[[row] for row in rows]))
    write_parquet("c.parquet", dict(audio=sounds(2), label=["[" * 3000 + "1", "dog"]))
    assert pack(tmp_path, "a.parquet", "b.parquet", "c.parquet") == 0
    names = [row[0].removeprefix(str(tmp_path)) for row in rows_of(tmp_path / "packed.tsv")]
    expected = [f"/a.parquet/{address}", "/a.parquet/x.\\x00wav", "/a.parquet/\\x1b[31m.wav"]
    assert names[:3] == expected
    assert names[3:] == ["/c.parquet/clip 0.flac", "/c.parquet/clip 1.flac"]
    assert list(bad_of(tmp_path / "packed.tsv").values()) == ["the row holds no sound"] * 3


def test_zeros_and_ones_are_no_indices(tmp_path, write_parquet):
    """A number for each class is refused, not read as labels 0 and 1."""
    write_parquet("x.parquet", dict(audio=sounds(3), labels=[[0, 1, 0], [1, 0, 0], [0, 2]]))
    assert pack(tmp_path, "x.parquet") == 0
    assert [row[2] for row in rows_of(tmp_path / "packed.tsv")] == ["0,2"]
    reasons = set(bad_of(tmp_path / "packed.tsv").values())
    assert reasons == {"its labels are zeros and ones, not names or indices: convert them"}


def test_clips_without_labels_are_told_and_a_shard_without_sound(tmp_path, capsys):
    files = {"0.wav": clip_bytes(0), "@eaDir/1.wav": clip_bytes(1), ".a/2.wav": clip_bytes(2)}
    write_tar(tmp_path / "x.tar", files)
    assert pack(tmp_path, "x.tar") == 0
    assert len(rows_of(tmp_path / "packed.tsv")) == 1
    assert "no clip has a label" in capsys.readouterr().out
    write_tar(tmp_path / "y.tar", {"0.npy": b"x"})
    with pytest.raises(InputError, match="it holds no audio files"):
        prepare.pack([str(tmp_path / "y.tar")], str(tmp_path / "y.tsv"))


def test_a_sidecar_of_any_kind_costs_its_clip(tmp_path):
    files = {}
    deep = '{"label": ' + "[" * 900 + "1" + "]" * 900 + "}"
    for i, text in enumerate([deep, '{"label": "dog"}']):
        files[f"{i}.wav"] = clip_bytes(i)
        files[f"{i}.json"] = text.encode()
    write_tar(tmp_path / "x.tar", files)
    assert pack(tmp_path, "x.tar") == 0
    assert [row[2] for row in rows_of(tmp_path / "packed.tsv")] == ["dog"]
    assert list(bad_of(tmp_path / "packed.tsv")) == [f"{tmp_path}/x.tar/0.wav"]


def test_a_damaged_group_of_rows_costs_itself(tmp_path, capsys, write_parquet):
    write_parquet("x.parquet", dict(audio=sounds(12)), row_group_size=4, compression="zstd")
    import pyarrow.parquet

    column = pyarrow.parquet.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 60] = b"\xff" * 60
    (tmp_path / "x.parquet").write_bytes(data)
    assert pack(tmp_path, "x.parquet") == 1
    names = [row[0].split("/")[-1] for row in rows_of(tmp_path / "packed.tsv")]
    assert names == [f"clip {i}.flac" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert "rows 4 to 7 cannot be read" in capsys.readouterr().err


def test_without_pyarrow_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="x.parquet: pip install pyarrow$"):
        pack(tmp_path, "x.parquet")


def test_other_formats_in_shards(tmp_path, write_parquet):
    """One decoder for all: mp3 and Opus too, and m4a if PyAV is there."""
    samples = tone(16_000).numpy()
    files = {}
    for suffix, form in (("mp3", dict(format="MP3")), ("opus", dict(format="OGG", subtype="OPUS"))):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 16_000, **form)
        files[f"x.{suffix}"] = buffer.getvalue()
    write_tar(tmp_path / "x.tar", files)
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    write_parquet("x.parquet", dict(audio=rows))
    assert pack(tmp_path, "x.tar", "x.parquet") == 0
    packed = AudioDataset(tmp_path / "packed.tsv")
    assert len(packed) == 4
    for i, (name, data) in enumerate([*files.items(), *files.items()]):
        (tmp_path / name).write_bytes(data)
        whole = load_audio(tmp_path / name)
        n = min(len(whole), len(packed.read(i)))
        assert n >= 16_000
        torch.testing.assert_close(packed.read(i)[:n], whole[:n], rtol=0, atol=0.502 / 32768)
