"""Manifests of folders and of public data sets, statistics, and packed copies: extras/prepare.py."""

import os
import shutil
import sys
from pathlib import Path

import prepare
import pytest
import soundfile
import torch
from conftest import tone
from test_data import bad_files, kaldi

from data import AudioDataset, InputError, Manifest, load_audio, open_labelled, to_float
from evaluate import read_classes

PREPARE = "extras/prepare.py"


def wav(path: Path, n_samples: int = 8000, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(n_samples, rate).numpy(), rate)


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


# --- scan --------------------------------------------------------------------------------------------------


def test_scan_writes_what_the_dataset_reads(folder, script):
    """Every file that can be read, whatever the case of its suffix, with its length; the others in .bad."""
    bad = bad_files(folder)
    for name in "missing.wav folder.wav silent.wav nan.wav".split():  # no files, or found when they are read
        del bad[name]
    wav(folder / "sub" / "UPPER.WAV", 48_001, 48_000)
    shutil.copy(folder / "clip 0.wav", os.fsencode(folder) + b"/\xe9\xff.wav")  # a name need not be UTF-8
    said = script(PREPARE, "scan", folder, "-o", "made.tsv").stdout
    dataset = AudioDataset(folder / "made.tsv", segments=False, allow_silence=True)
    names = {dataset.name(i): int(dataset.manifest.n_samples[i]) for i in range(len(dataset))}
    assert Manifest(folder / "made.tsv").root == str(folder)
    assert names["clip 2.wav"] == 11_200 and names["sub/UPPER.WAV"] == 16_000 and not names.keys() & set(bad)
    assert len(names) == 8 + 1 + 1 + 2 and os.fsdecode(b"\xe9\xff.wav") in names
    assert {dataset[i].problem[:8] for i in range(len(dataset))} == {"", "nan.wav\t"}
    listed = [line.split("\t") for line in (folder / "made.tsv.bad").read_text().splitlines()]
    assert {name for name, _ in listed} == set(bad) and all(reason for _, reason in listed)
    assert f"made.tsv: 12 clips, 0.00 h; {len(bad)} left out, listed in made.tsv.bad" in said
    again = script(PREPARE, "scan", folder, "-o", "made.tsv", check=False)
    assert again.returncode == 1 and again.stderr.startswith("prepare.py: made.tsv exists")
    assert again.stderr.count("\n") == 1


def test_scan_labels_by_folder(tmp_path, script):
    for name in ("cat/a.wav", "more/dog, small/b.wav", "dog/c.wav"):
        wav(tmp_path / "in" / name)
    with pytest.raises(InputError, match="the class 'dog, small' is empty or holds a comma"):
        prepare.scan(str(tmp_path / "in"), str(tmp_path / "m.tsv"), labels="")
    assert not (tmp_path / "m.tsv").exists()
    (tmp_path / "in/more/dog, small").rename(tmp_path / "in/more/dog")
    script(PREPARE, "scan", "in", "-o", "m.tsv", "--labels")
    dataset = AudioDataset(tmp_path / "m.tsv")
    assert {dataset.name(i): dataset.labels(i) for i in range(3)} == {
        "cat/a.wav": ["cat"], "dog/c.wav": ["dog"], "more/dog/b.wav": ["dog"],
    }  # fmt: skip
    with pytest.raises(InputError, match="none of the 1 audio files has a label in its folder"):
        prepare.scan(str(tmp_path / "in/cat"), str(tmp_path / "cat.tsv"), labels="")
    wav(tmp_path / "in" / "loose.wav")  # what has no label is listed
    script(PREPARE, "scan", "in", "-o", "more.tsv", "--labels")
    assert (tmp_path / "more.tsv.bad").read_text() == "loose.wav\tno label\n"
    assert len(AudioDataset(tmp_path / "more.tsv")) == 3


@pytest.mark.parametrize("header", ["", "filename,label\n"])
def test_scan_labels_by_a_table(tmp_path, script, header):
    """Labels in cells of their own or in one; a file without label, or a row without file, is told."""
    for name in ("a.wav", "sub/b c.wav", "c.wav", "d.wav"):
        wav(tmp_path / "in" / name)
    table = 'a.wav,dog\nsub/b c.wav, cat , dog\nc.wav,"cat, rain"\nd.wav,\nnone.wav,cat\n'
    (tmp_path / "labels.csv").write_text(header + table)
    out = script(PREPARE, "scan", "in", "--labels", "labels.csv", "-o", "m.tsv").stdout
    dataset = AudioDataset(tmp_path / "m.tsv")
    assert {dataset.name(i): dataset.labels(i) for i in range(len(dataset))} == {
        "a.wav": ["dog"], "c.wav": ["cat", "rain"], "sub/b c.wav": ["cat", "dog"],
    }  # fmt: skip
    assert "2 left out, listed in m.tsv.bad" in out
    assert (tmp_path / "m.tsv.bad").read_text() == "d.wav\tno label\nnone.wav\tno such file\n"
    for text in ("x.wav,dog\n", header, "# nothing\n"):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(InputError, match="none of the 4 audio files has a label in .*other.csv"):
            prepare.scan(str(tmp_path / "in"), str(tmp_path / "x.tsv"), str(tmp_path / "other.csv"))
    (tmp_path / "more.csv").write_text("file,label,split\na.wav,dog,train\n")
    with pytest.raises(InputError, match="more.csv: the column 'split' is no label: remove it"):
        prepare.scan(str(tmp_path / "in"), str(tmp_path / "x.tsv"), str(tmp_path / "more.csv"))
    (tmp_path / "quoted.csv").write_text(header + 'a.wav, "dog,bark"\nc.wav, "dog"\n')
    prepare.scan(str(tmp_path / "in"), str(tmp_path / "quoted.tsv"), str(tmp_path / "quoted.csv"))
    assert [row[2] for row in rows_of(tmp_path / "quoted.tsv")] == ["dog,bark", "dog"]
    (tmp_path / "rows.csv").write_text(header + "a.wav,dog\nc.wav,rain\na.wav,cat\na.wav,dog\n")
    prepare.scan(str(tmp_path / "in"), str(tmp_path / "rows.tsv"), str(tmp_path / "rows.csv"))
    dataset = AudioDataset(tmp_path / "rows.tsv")  # several rows of a file add up
    assert [dataset.labels(i) for i in range(len(dataset))] == [["dog", "cat"], ["rain"]]


def test_long_mp3_files_come_with_a_hint(tmp_path, script):
    """To read them in pieces costs a seek through the file each: pack decodes them once."""
    (tmp_path / "in").mkdir()
    for seconds in (10, 320):
        soundfile.write(tmp_path / "in" / "x.mp3", tone(16_000).repeat(seconds).numpy(), 16_000)
        out = script(PREPARE, "scan", "in", "-o", f"{seconds}.tsv").stdout
        assert ("prepare.py pack" in out) == (seconds > 300)


def test_scan_follows_links_but_not_in_circles(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(folder / "clip 0.wav", elsewhere / "linked.wav")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    prepare.scan(str(folder), str(folder / "made.tsv"), labels=None)
    dataset = AudioDataset(folder / "made.tsv")
    names = [dataset.name(i) for i in range(len(dataset))]
    assert len(names) == 9 and "link/linked.wav" in names


def test_names_that_a_manifest_cannot_hold(folder):
    """A name with a tab or line break is listed in .bad, in one line, and the other files in the manifest."""
    wav(folder / "a\tb.wav"), wav(folder / "c\nd.wav")
    prepare.scan(str(folder), str(folder / "made.tsv"), labels=None)
    assert len(rows_of(folder / "made.tsv")) == 8
    listed = (folder / "made.tsv.bad").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["a\\tb.wav", "c\\nd.wav"]
    assert all("holds a tab or a line break" in line for line in listed)


def test_an_mp3_of_other_bytes_is_not_called_missing(folder):
    """libsndfile says of it that the file does not exist."""
    (folder / "broken.mp3").write_bytes(bytes(range(256)) * 50)
    prepare.scan(str(folder), str(folder / "m.tsv"), labels=None)
    (line,) = (folder / "m.tsv.bad").read_text().splitlines()
    assert line.startswith("broken.mp3\tunreadable: ") and "exist" not in line
    with pytest.raises(InputError, match="unreadable: (?!.*exist)"):
        load_audio(folder / "broken.mp3")


def test_folders_without_audio(tmp_path):
    with pytest.raises(InputError, match="nothing is not a folder"):
        prepare.scan(str(tmp_path / "nothing"), "m.tsv", labels=None)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(InputError, match="no audio files below .*looked for .*[.]flac"):
        prepare.scan(str(tmp_path), "m.tsv", labels=None)
    (tmp_path / "x.wav").write_text("text")
    with pytest.raises(InputError, match="none of the 1 audio files .* can be read: see .*m.tsv.bad"):
        prepare.scan(str(tmp_path), str(tmp_path / "m.tsv"), labels=None)
    assert not (tmp_path / "m.tsv").exists() and "x.wav\t" in (tmp_path / "m.tsv.bad").read_text()


# --- stats -------------------------------------------------------------------------------------------------


def test_stats_of_a_known_signal(folder, script):
    """Mean and std of Kaldi's values of all clips that can be read; silence is no signal."""
    expected = AudioDataset(folder / "manifest.tsv")
    values = torch.cat([kaldi(expected.read(i)).flatten() for i in range(8)])
    bad = bad_files(folder)
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in bad)
    said = script(PREPARE, "stats", "manifest.tsv", "--workers", 0).stdout
    out = said.split()
    assert float(out[1]) == pytest.approx(values.mean().item(), abs=1e-3)
    assert float(out[3]) == pytest.approx(values.std().item(), abs=1e-3)
    assert out[0] == "--norm_mean" and out[2] == "--norm_std" and f"8 clips, {len(bad)} unreadable" in said


# --- pack --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("packed*")}


def assert_equal_to_the_files(files: AudioDataset, packed: AudioDataset):
    """The same items, labels and sound."""
    assert len(files) == len(packed) and packed.is_packed
    for i in range(len(files)):
        assert packed.name(i) == files.name(i) and packed.labels(i) == files.labels(i)
        assert torch.equal(to_float(packed.read(i)), files.read(i))  # the wav files hold int16 as well


def test_pack_and_files_give_the_same(folder, script):
    """Packed data is one .pcm beside its list, without the clips that cannot be read, which are named."""
    files = AudioDataset(folder / "manifest.tsv")
    bad = {name: message for name, message in bad_files(folder).items() if message != "silent"}
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\tbad\n" for name in bad)
    said = script(PREPARE, "pack", "manifest.tsv", "packed.tsv", "--workers", 1).stdout
    assert "packed.tsv: 8 clips in packed.pcm" in said and f"; {len(bad)} left out" in said
    assert set(contents(folder)) == {"packed.tsv", "packed.pcm", "packed.tsv.bad"}
    assert (folder / "packed.tsv").read_text().splitlines()[0] == "packed.pcm"
    assert (folder / "packed.pcm").stat().st_size == 2 * int(files.manifest.n_samples.sum())
    assert_equal_to_the_files(files, AudioDataset(folder / "packed.tsv"))
    listed = [line.split("\t") for line in (folder / "packed.tsv.bad").read_text().splitlines()]
    assert [name for name, _ in listed] == list(bad)
    assert all(bad[name] in reason for name, reason in listed)
    again = script(PREPARE, "pack", "manifest.tsv", "packed.tsv", check=False)
    assert (
        again.returncode == 1
        and again.stderr == "prepare.py: packed.tsv: choose a new name that ends with .tsv\n"
    )


def test_silence_is_the_same_packed(tmp_path):
    """A piece without sound is stood in for in training, as of files, and read for scoring."""
    silence = torch.zeros(5 * 10_240)
    for name, parts in (("a", [tone(10_240), silence, tone(10_240)]), ("b", [silence]), ("c", [tone(8000)])):
        soundfile.write(tmp_path / f"{name}.wav", torch.cat(parts).numpy(), 16_000)
    lines = [str(tmp_path), f"a.wav\t{7 * 10_240}\tx", f"b.wav\t{5 * 10_240}\ty", "c.wav\t8000\tx"]
    (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
    prepare.pack(str(tmp_path / "m.tsv"), str(tmp_path / "packed.tsv"), workers=0)
    for kind in (dict(n_frames=64), dict(n_frames=64, segments=False), dict(n_frames=64, allow_silence=True)):
        files, packed = (AudioDataset(tmp_path / name, **kind) for name in ("m.tsv", "packed.tsv"))
        assert len(files) == len(packed) == (3 if "segments" in kind else 13)
        n_problems = 0
        for i in range(len(files)):
            assert (files[i].problem, files[i].item) == (packed[i].problem, packed[i].item)
            assert torch.equal(files[i].waveform, to_float(packed[i].waveform))
            n_problems += bool(packed[i].problem)
        assert n_problems == (0 if "allow_silence" in kind else 1 if "segments" in kind else 9)


def test_a_long_file_is_packed_whole(tmp_path):
    """Decoded in pieces, it is the same for clips of any length, and so is a file of another rate."""
    soundfile.write(tmp_path / "long.wav", tone(16_000 * 25).numpy(), 16_000)
    soundfile.write(tmp_path / "other.wav", tone(44_100 * 25, 44_100).numpy(), 44_100, subtype="FLOAT")
    lines = [str(tmp_path), f"long.wav\t{16_000 * 25}", f"other.wav\t{16_000 * 25}"]
    (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
    prepare.pack(str(tmp_path / "m.tsv"), str(tmp_path / "packed.tsv"), workers=0)
    for n_frames in (64, 200, 1024):
        files, packed = (AudioDataset(tmp_path / name, n_frames) for name in ("m.tsv", "packed.tsv"))
        assert len(files) == len(packed) == 2 * (16_000 * 25 // (160 * n_frames))
        for i in range(len(files)):
            rounding = 0.0 if files.name(i) == "long.wav" else 0.502 / 32768
            torch.testing.assert_close(to_float(packed.read(i)), files.read(i), rtol=0, atol=rounding)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def interrupted(folder, monkeypatch) -> tuple[Path, dict[str, bytes]]:
    """A folder where packing ended in the sixth clip, behind a bad one; and what it would have made."""
    (folder / "clip 2.wav").write_text("damaged")
    source, target = str(folder / "manifest.tsv"), str(folder / "packed.tsv")
    prepare.pack(source, target, workers=0)
    expected = contents(folder)
    for name in expected:
        (folder / name).unlink()
    read, n_read = prepare.read_pieces, []

    def dies(path, *args):
        n_read.append(path)
        if len(n_read) == 6:
            raise Killed
        return read(path, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepare, "read_pieces", dies)
        prepare.pack(source, target, workers=0)
    assert not (folder / "packed.tsv").exists()
    return folder, expected


def test_pack_goes_on_where_it_was(interrupted):
    """What is done is not decoded again; a sample or line that was half-written is written anew."""
    folder, expected = interrupted
    with pytest.raises(InputError, match="cannot read the manifest"):
        AudioDataset(folder / "packed.tsv")
    with open(folder / "packed.pcm", "ab") as pcm, open(folder / "packed.tsv.partial", "a") as partial:
        pcm.write(b"\1" * 200_001)
        partial.write("clip 5.wav\t16")
    for i in (0, 1, 3, 4):
        (folder / f"clip {i}.wav").unlink()
    prepare.pack(str(folder / "manifest.tsv"), str(folder / "packed.tsv"), workers=0)
    assert contents(folder) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: lines[:4],
        lambda lines: [*lines, "clip 0.wav\t8000\tlow"],
        lambda lines: [line.replace("low", "deep") for line in lines],
        lambda lines: [lines[0] + "/../elsewhere", *lines[1:]],
    ],
)
def test_pack_does_not_go_on_with_another_manifest(interrupted, change):
    """Fewer, more or other clips, labels or folders: what is there was not made from them, and stays."""
    folder, _ = interrupted
    before = contents(folder)
    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "other.tsv").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(InputError, match="packed.tsv.partial was begun with another manifest"):
        prepare.pack(str(folder / "other.tsv"), str(folder / "packed.tsv"), workers=0)
    assert contents(folder) == before


@pytest.mark.parametrize("is_gone", [True, False])
def test_pack_does_not_go_on_without_its_samples(interrupted, is_gone):
    """A .pcm that is gone, or shorter than what is said to be done, is not filled up with silence."""
    folder, _ = interrupted
    pcm = folder / "packed.pcm"
    pcm.unlink() if is_gone else pcm.write_bytes(pcm.read_bytes()[:-2])
    with pytest.raises(InputError, match="begun with another manifest or .pcm: remove it and .*packed.pcm"):
        prepare.pack(str(folder / "manifest.tsv"), str(folder / "packed.tsv"), workers=0)
    assert not (folder / "packed.tsv").exists()


def test_pack_touches_no_other_file(folder):
    """A .pcm or list that is there already is somebody's, whatever it holds."""
    (folder / "mine.pcm").write_text("precious")
    with pytest.raises(InputError, match="mine.pcm exists: remove it or choose another name"):
        prepare.pack(str(folder / "manifest.tsv"), str(folder / "mine.tsv"), workers=0)
    (folder / "list.tsv").write_text("precious")
    for name in ("list.tsv", "shards", "manifest.tsv"):
        with pytest.raises(InputError, match="choose a new name that ends with .tsv"):
            prepare.pack(str(folder / "manifest.tsv"), str(folder / name), workers=0)
    assert (folder / "mine.pcm").read_text() == (folder / "list.tsv").read_text() == "precious"
    assert not {"mine.tsv", "mine.tsv.partial", "list.pcm", "shards"} & {
        path.name for path in folder.iterdir()
    }


def test_pack_makes_the_folder_of_its_output(folder):
    prepare.pack(str(folder / "manifest.tsv"), str(folder / "a" / "new" / "packed.tsv"), workers=0)
    assert len(AudioDataset(folder / "a" / "new" / "packed.tsv")) == 8


def test_pack_of_bad_files_only(folder):
    """Nothing is left that would be in the way when the files are there."""
    source, target = str(folder / "manifest.tsv"), str(folder / "packed.tsv")
    (folder / "away").mkdir()
    for path in folder.glob("*.wav"):
        path.rename(folder / "away" / path.name)
    with pytest.raises(InputError, match="no clip of .*manifest.tsv can be read: see .*packed.tsv.bad"):
        prepare.pack(source, target, workers=0)
    assert len((folder / "packed.tsv.bad").read_text().splitlines()) == 8
    for path in (folder / "away").iterdir():
        path.rename(folder / path.name)
    prepare.pack(source, target, workers=0)
    assert_equal_to_the_files(AudioDataset(source), AudioDataset(target))


def test_pack_keeps_what_it_knows_of_a_line(folder):
    """A fourth column of somebody's manifest is not taken for a gain."""
    lines = (folder / "manifest.tsv").read_text().splitlines()
    (folder / "m.tsv").write_text("\n".join([lines[0], *(f"{line}\ta note" for line in lines[1:])]) + "\n")
    prepare.pack(str(folder / "m.tsv"), str(folder / "packed.tsv"), workers=0)
    assert_equal_to_the_files(AudioDataset(folder / "m.tsv"), AudioDataset(folder / "packed.tsv"))


# --- manifests of three data sets --------------------------------------------------------------------------


def test_esc50_folds(tmp_path, script):
    header = "filename,fold,target,category,esc10,src_file,take"
    names = [(fold, i, name) for fold in range(1, 6) for i, name in enumerate(["dog", "sea_waves"])]
    rows = [f"{fold}-{i}-A-{i}.wav,{fold},{i},{name},True,{i},A" for fold, i, name in names]
    (tmp_path / "ESC-50" / "meta").mkdir(parents=True)
    (tmp_path / "ESC-50" / "meta" / "esc50.csv").write_text("\n".join([header, *rows]) + "\n")
    for row in rows[:-1]:  # the last is missing
        wav(tmp_path / "ESC-50" / "audio" / row.split(",")[0], 44_100, 44_100)
    out = script(PREPARE, "esc50", "ESC-50", "-o", "esc50").stdout
    assert "esc50/train1.tsv: 7 clips" in out and "1 left out, listed in esc50/train1.tsv.bad" in out
    folds = {i: rows_of(tmp_path / "esc50" / f"test{i}.tsv") for i in range(1, 6)}
    assert folds[1] == [["1-0-A-0.wav", "16000", "dog"], ["1-1-A-1.wav", "16000", "sea_waves"]]
    assert [len(rows) for rows in folds.values()] == [2, 2, 2, 2, 1]
    for i in folds:
        train = rows_of(tmp_path / "esc50" / f"train{i}.tsv")
        assert sorted(train) == sorted(row for j in folds if j != i for row in folds[j])
    assert "5-1-A-1.wav" in (tmp_path / "esc50" / "test5.tsv.bad").read_text()
    assert len(AudioDataset(str(tmp_path / "esc50" / "train1.tsv"), 512, segments=False)) == 7
    with pytest.raises(InputError, match="train1.tsv exists: remove it"):
        prepare.esc50(str(tmp_path / "ESC-50"), str(tmp_path / "esc50"))


def test_esc50_folds_of_other_numbers(tmp_path):
    """Numbered from 0, or with one missing: a pair of manifests for each fold that is there."""
    (tmp_path / "meta").mkdir()
    rows = [f"{fold}-{i}.wav,{fold},{name}" for fold in (0, 1, 3) for i, name in enumerate(["dog", "cat"])]
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,category", *rows]) + "\n")
    for row in rows:
        wav(tmp_path / "audio" / row.split(",")[0])
    prepare.esc50(str(tmp_path), str(tmp_path / "out"))
    expected = {f"{part}{fold}.tsv" for part in ("train", "test") for fold in (0, 1, 3)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert [row[0] for row in rows_of(tmp_path / "out" / "test0.tsv")] == ["0-0.wav", "0-1.wav"]
    assert [row[0][0] for row in rows_of(tmp_path / "out" / "train0.tsv")] == ["1", "1", "3", "3"]


def test_speech_commands_split(tmp_path, script):
    source = tmp_path / "sc"
    for name in ("yes/a_nohash_0.wav", "yes/b_nohash_0.wav", "no/a_nohash_0.wav", "no/c_nohash_1.wav"):
        wav(source / name)
    wav(source / "_background_noise_" / "running_tap.wav", 32_000)
    (source / "validation_list.txt").write_text("yes/b_nohash_0.wav\n")
    (source / "testing_list.txt").write_text("no/a_nohash_0.wav\nno/gone_nohash_0.wav\n")
    out = script(PREPARE, "speechcommands", "sc", "-o", "spcv2").stdout
    assert "spcv2/test.tsv: 1 clips" in out and "1 left out" in out
    tables = {part: rows_of(tmp_path / "spcv2" / f"{part}.tsv") for part in ("train", "valid", "test")}
    assert {part: [(row[0], row[2]) for row in rows] for part, rows in tables.items()} == {
        "train": [("no/c_nohash_1.wav", "no"), ("yes/a_nohash_0.wav", "yes")],
        "valid": [("yes/b_nohash_0.wav", "yes")],
        "test": [("no/a_nohash_0.wav", "no")],
    }


def test_audioset_clips_by_their_id(tmp_path, script, monkeypatch):
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
        'another_cut, 30.000, 40.000, "/m/05zppz"\nseveral_one, 30.000, 40.000, "/m/05zppz"\n'
    )
    for name in (
        "sub/--4gqARaEJE.wav", "YYxY_-abc012.flac", "Zbcdefghijk_30.000_40.000.wav",
        "Zbcdefghijk_90.000_100.000.wav", "another_cut_000090.wav", "several_one_30000.wav",
        "several_one.wav",
    ):  # fmt: skip
        wav(tmp_path / "audio" / name)
    out = script(PREPARE, "audioset", "segments.csv", "labels.csv", "audio", "-o", "train.tsv").stdout
    assert "train.tsv: 3 clips" in out and "3 left out, listed in train.tsv.bad" in out
    assert rows_of(tmp_path / "train.tsv") == [
        ["sub/--4gqARaEJE.wav", "8000", "/m/09x0r"],
        ["YYxY_-abc012.flac", "8000", "/m/09x0r,/m/05zppz"],
        ["Zbcdefghijk_30.000_40.000.wav", "8000", "/m/05zppz"],
    ]
    assert (tmp_path / "train.tsv.bad").read_text().splitlines() == [
        "missing_one\tno files that begin at 30.000 s", "another_cut\tno files that begin at 30.000 s",
        "several_one\t2 files that begin at 30.000 s",
    ]  # fmt: skip
    found = open_labelled(tmp_path / "train.tsv", 64, read_classes(tmp_path / "labels.csv"))
    assert found.targets.tolist() == [[True, False], [True, True], [False, True]]
    (tmp_path / "segments.csv").write_text('--4gqARaEJE, 0.000, 10.000, "/m/other"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="has the label '/m/other', which labels.csv lacks"):
        prepare.audioset("segments.csv", "labels.csv", "audio", "x.tsv")


@pytest.mark.parametrize(
    "args, message",
    [
        (["esc50", "empty", "-o", "out"], "cannot read empty/meta/esc50.csv"),
        (["speechcommands", "empty", "-o", "out"], "cannot read empty/validation_list.txt"),
        (
            ["audioset", "nothing.csv", "nothing.csv", "empty", "-o", "x.tsv"],
            "cannot read the classes in nothing.csv",
        ),
        (
            ["audioset", "table.csv", "table.csv", "empty", "-o", "x.tsv"],
            "is not a list of AudioSet segments",
        ),
        (["esc50", "evil1", "-o", "out"], "'/etc/passwd' has no fold, or lies elsewhere"),
        (["esc50", "evil2", "-o", "out"], "'1.wav' has no fold, or lies elsewhere"),
        (["esc50", "evil3", "-o", "out"], "the class 'dog, big' is empty or holds a comma"),
        (["esc50", "single", "-o", "out"], "has one fold only"),
    ],
)
def test_folders_that_are_not_these_data_sets(tmp_path, script, monkeypatch, args, message):
    """They are refused in one line before anything is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("index,label\n0,dog\n")
    rows = dict(
        evil1="/etc/passwd,1,dog",
        evil2="1.wav,/../../evil,dog",
        evil3='1.wav,1,"dog, big"',
        single="1.wav,1,dog",
    )
    for name, row in rows.items():
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta" / "esc50.csv").write_text(f"filename,fold,category\n{row}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    monkeypatch.setattr(prepare, "silence_libraries", lambda: None)
    with pytest.raises(InputError) as error:
        prepare.main()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.tsv").exists()
    if args[1] == "single":  # as a script
        result = script(PREPARE, *args, check=False)
        assert result.returncode == 1 and result.stderr == f"prepare.py: {error.value}\n"


# --- the released code's lists -----------------------------------------------------------------------------


def test_released_lists_become_a_manifest(tmp_path, script):
    """White space between columns, labels in an .lbl, lengths at the files' own rates: all is made anew."""
    wav(tmp_path / "audio" / "x" / "a b.wav", 48_000, 48_000), wav(tmp_path / "audio" / "c.wav", 8000)
    (tmp_path / "old.tsv").write_text("audio\nx/a b.wav 480000\nc.wav\t8000\ngone.wav 1\n")
    (tmp_path / "old.lbl").write_text("a /m/01,/m/02\nb /m/03\nc /m/03\n")
    said = script(PREPARE, "released", "old.tsv", "-o", "new.tsv").stdout
    assert "new.tsv: 2 clips" in said and "1 left out, listed in new.tsv.bad" in said
    assert Manifest(tmp_path / "new.tsv").root == str(tmp_path / "audio")
    assert rows_of(tmp_path / "new.tsv") == [
        ["x/a b.wav", "16000", "/m/01,/m/02"],
        ["c.wav", "8000", "/m/03"],
    ]
    assert (tmp_path / "new.tsv.bad").read_text() == "gone.wav\tno such file\n"
    dataset = AudioDataset(tmp_path / "new.tsv")
    assert [dataset.labels(i) for i in range(2)] == [["/m/01", "/m/02"], ["/m/03"]]


def test_released_lists_without_labels(tmp_path):
    wav(tmp_path / "audio" / "c.wav", 8000)
    (tmp_path / "old.tsv").write_text(f"{tmp_path}/audio\nc.wav\t8000")
    prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert rows_of(tmp_path / "new.tsv") == [["c.wav", "8000"]]


@pytest.mark.parametrize("lbl", ["a /m/01\n", "", "a /m/01\nb\n", "a /m/01\nb /m/02\nc /m/03\n"])
def test_released_labels_that_do_not_match(tmp_path, lbl):
    """Every clip has one line of labels, or none is used."""
    wav(tmp_path / "a.wav"), wav(tmp_path / "b.wav")
    (tmp_path / "old.tsv").write_text(".\na.wav 8000\nb.wav 8000\n")
    (tmp_path / "old.lbl").write_text(lbl)
    with pytest.raises(
        InputError, match="old.lbl must have one line 'id label,label' for each of the 2 clips"
    ):
        prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert not (tmp_path / "new.tsv").exists()


def test_released_labels_in_another_order_and_ids_with_spaces(tmp_path):
    wav(tmp_path / "a 1.wav"), wav(tmp_path / "b 1.wav")
    (tmp_path / "old.tsv").write_text(".\na 1.wav 8000\nb 1.wav 8000\n")
    (tmp_path / "old.lbl").write_text("b 1\t/m/02\na 1\t/m/01\n")
    with pytest.raises(InputError, match="old.lbl lists the clips in another order than .*old.tsv"):
        prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    (tmp_path / "old.lbl").write_text("a 1\t/m/01\nb 1\t/m/02\n")
    prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert rows_of(tmp_path / "new.tsv") == [["a 1.wav", "8000", "/m/01"], ["b 1.wav", "8000", "/m/02"]]


def test_what_cannot_be_written_is_told_before_the_scan(folder, monkeypatch):
    monkeypatch.setattr(prepare, "count_samples", lambda path: pytest.fail("it scans"))
    (folder / "file").write_text("")
    for output in ("new/", "file/x.tsv"):
        with pytest.raises(OSError):
            prepare.scan(str(folder), f"{folder}/{output}", labels=None)


def test_released_lists_of_other_places(tmp_path):
    """Names that a manifest could not be read by are named, and the others are listed."""
    wav(tmp_path / "in" / "a.wav"), wav(tmp_path / "out" / "b.wav")
    (tmp_path / "old.tsv").write_text(f"in\na.wav 8000\n{tmp_path}/out/b.wav 8000\n../out/b.wav 8000\n")
    prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert rows_of(tmp_path / "new.tsv") == [["a.wav", "8000"]]
    assert (tmp_path / "new.tsv.bad").read_text() == 2 * "../out/b.wav\tlies outside the manifest's folder\n"
    with pytest.raises(InputError, match="cannot read .*missing.tsv"):
        prepare.released(str(tmp_path / "missing.tsv"), str(tmp_path / "new2.tsv"))
