"""Manifests of folders and of public data sets, and statistics: extras/prepare.py, extras/labels.py."""

import codecs
import json
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import tone

from data import AudioDataset, InputError, Manifest, load_audio, open_labelled
from extras import prepare
from extras.labels import labels_in
from extras.tables import read_classes

PREPARE = "extras/prepare.py"


def wav(path: Path, n_samples: int = 8000, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(os.fsencode(path), tone(n_samples, rate).numpy(), rate, format="WAV")


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def bad_of(path: Path) -> dict[str, str]:
    lines = Path(f"{path}.bad").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


# --- scan --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder) -> list[str]:
    """Names of files in the folder that cannot be used."""
    good = (folder / "clip 0.wav").read_bytes()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not audio at all")
    (folder / "cut.flac").write_bytes(b"fLaC" + bytes(20))
    (folder / "header only.wav").write_bytes(good[:44])
    wav(folder / "short.wav", 100)
    return ["empty.wav", "text.wav", "cut.flac", "header only.wav", "short.wav"]


def test_scan_writes_what_the_dataset_reads(folder, broken, script):
    """Every file that can be read, whatever the case of its suffix, with its length; the others in .bad."""
    wav(folder / "sub" / "UPPER.WAV", 48_001, 48_000)
    shutil.copy(folder / "clip 0.wav", os.fsencode(folder) + b"/\xe9\xff.wav")  # a name need not be UTF-8
    said = script(PREPARE, "scan", folder, "-o", "made.tsv").stdout
    dataset = AudioDataset(folder / "made.tsv", segments=False)
    names = {dataset.name(i): int(dataset.manifest.n_samples[i]) for i in range(len(dataset))}
    assert Manifest(folder / "made.tsv").root == str(folder)
    assert names["clip 2.wav"] == 11_200
    assert names["sub/UPPER.WAV"] == 16_000
    assert len(names) == 10
    assert os.fsdecode(b"\xe9\xff.wav") in names
    assert not any(dataset[i].problem for i in range(10))
    assert sorted(bad_of(folder / "made.tsv")) == sorted(broken)
    assert "made.tsv: 10 clips, 0.00 h; 5 left out, listed in made.tsv.bad: " in said


def test_scan_ends_with_counts_by_reason(folder, broken, script):
    """The same reason in full, others by what they have in common."""
    (folder / "empty 2.wav").touch()
    wav(folder / "short 2.wav", 300)
    said = script(PREPARE, "scan", folder, "-o", "made.tsv").stdout
    assert "7 left out" in said
    assert "2 empty" in said
    assert "3 too short" in said  # two lengths, and none
    assert "0.019" not in said


def test_scan_prints_mean_and_std(folder, script):
    """Of all clips, as Kaldi's values have them, if there are few."""
    said = script(PREPARE, "scan", folder, "-o", "made.tsv").stdout
    values = torch.cat([kaldi(load_audio(folder / f"clip {i}.wav")).flatten() for i in range(8)])
    found = re.search(r"--norm_mean (\S+) --norm_std (\S+)    # for pretrain.py, of 8 clips", said)
    assert float(found[1]) == pytest.approx(values.mean().item(), abs=1e-3)
    assert float(found[2]) == pytest.approx(values.std().item(), abs=1e-3)


def test_scan_says_what_is_damaged_but_kept(folder, script):
    """Half an mp3: counted by what can be decoded, listed, and named in .bad."""
    soundfile.write(folder / "x.mp3", tone(160_000).repeat(2).numpy(), 16_000)
    data = (folder / "x.mp3").read_bytes()
    (folder / "x.mp3").write_bytes(data[: len(data) // 2])
    said = script(PREPARE, "scan", folder, "-o", "made.tsv").stdout
    assert "9 clips" in said
    assert "left out" not in said
    assert "1 damaged, but kept" in said
    assert bad_of(folder / "made.tsv")["x.mp3"].startswith("kept, but claims 20.0")


def test_scan_again_when_nothing_has_changed(folder, broken, script):
    """A list that is the same is written again, with its .bad; another needs --force; other files stay."""
    script(PREPARE, "scan", folder, "-o", "made.tsv")
    first = (folder / "made.tsv").read_bytes()
    for name in broken:
        (folder / name).unlink()
    script(PREPARE, "scan", folder, "-o", "made.tsv")
    assert (folder / "made.tsv").read_bytes() == first
    assert not (folder / "made.tsv.bad").exists()
    wav(folder / "new.wav")
    refused = script(PREPARE, "scan", folder, "-o", "made.tsv", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("prepare.py: made.tsv exists and lists other clips")
    assert "--force" in refused.stderr
    assert (folder / "made.tsv").read_bytes() == first
    script(PREPARE, "scan", folder, "-o", "made.tsv", "--force")
    assert len(rows_of(folder / "made.tsv")) == 9


def test_scan_replaces_no_file_of_another_kind(folder, broken, script):
    """Even with --force: a text, a packed list, a .bad that is none."""
    script(PREPARE, "pack", "manifest.tsv", "packed.tsv")
    (folder / "mine.tsv").write_text("precious")
    (folder / "new.tsv.bad").write_text("precious\n")
    for name in ("mine.tsv", "packed.tsv", "new.tsv"):
        before = {path: path.read_bytes() for path in folder.glob("*.tsv*")}
        refused = script(PREPARE, "scan", folder, "-o", name, "--force", check=False)
        assert refused.returncode == 1
        assert "exists: remove it or choose another name" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert {path: path.read_bytes() for path in folder.glob("*.tsv*")} == before


def test_scan_again_after_nothing_could_be_read(tmp_path):
    """The .bad of the first attempt is not in the way of the second."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.wav").write_text("no audio")
    output = str(tmp_path / "m.tsv")
    for _ in range(2):
        with pytest.raises(InputError, match="none of the 1 audio files .* can be read: see .*m.tsv.bad"):
            prepare.scan(str(tmp_path / "in"), output)
    wav(tmp_path / "in" / "x.wav")
    prepare.scan(str(tmp_path / "in"), output)
    assert not (tmp_path / "m.tsv.bad").exists()


def test_folders_without_audio(tmp_path):
    with pytest.raises(InputError, match="nothing is not a folder"):
        prepare.scan(str(tmp_path / "nothing"), "m.tsv")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(InputError, match="no audio files below .*looked for .*[.]flac"):
        prepare.scan(str(tmp_path), "m.tsv")


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
    prepare.scan(str(folder), str(folder / "made.tsv"))
    names = [row[0] for row in rows_of(folder / "made.tsv")]
    assert len(names) == 9
    assert "link/linked.wav" in names


def test_names_that_a_manifest_cannot_hold(folder):
    """A name with a tab or line break is listed in .bad, in one line, and the other files in the manifest."""
    wav(folder / "a\tb.wav")
    wav(folder / "c\nd.wav")
    prepare.scan(str(folder), str(folder / "made.tsv"))
    assert len(rows_of(folder / "made.tsv")) == 8
    bad = bad_of(folder / "made.tsv")
    assert sorted(bad) == ["a\\tb.wav", "c\\nd.wav"]
    assert all("holds a tab or a line break" in reason for reason in bad.values())


def test_what_cannot_be_written_is_told_before_the_scan(folder, monkeypatch):
    monkeypatch.setattr(prepare, "count_samples", lambda path: pytest.fail("it scans"))
    (folder / "file").write_text("")
    for output in ("new/", "file/x.tsv"):
        with pytest.raises((OSError, InputError)):
            prepare.scan(str(folder), f"{folder}/{output}")


def test_torchrun_is_refused_in_one_line(folder, script):
    """Its processes would write the same files."""
    for command in (["scan", folder, "-o", "m.tsv"], ["stats", "manifest.tsv"]):
        refused = script(PREPARE, *command, check=False, WORLD_SIZE="2", RANK="0")
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert "without torchrun" in refused.stderr


@pytest.mark.parametrize("command", [["stats", "manifest.tsv"], ["pack", "manifest.tsv", "packed.tsv"]])
def test_fewer_than_no_workers_are_refused_in_one_line(folder, script, command):
    refused = script(PREPARE, *command, "--workers", -1, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "--workers" in refused.stderr


# --- classes by folder -------------------------------------------------------------------------------------


def labels_found(output: Path) -> dict[str, list[str]]:
    """The labels that a data set reads from a manifest."""
    data = AudioDataset(output)
    return {data.name(i): data.labels(i) for i in range(len(data))}


def test_the_class_is_the_first_folder(tmp_path, script):
    """At whatever depth the files are; those without folder are listed."""
    for name in ("dog/2023/x.wav", "dog/y.wav", "bird/2024/deep/z.wav", "bird/2023/x.wav", "loose.wav"):
        wav(tmp_path / "in" / name)
    said = script(PREPARE, "scan", "in", "-o", "m.tsv", "--labels").stdout
    assert labels_found(tmp_path / "m.tsv") == {
        "bird/2023/x.wav": ["bird"], "bird/2024/deep/z.wav": ["bird"], "dog/2023/x.wav": ["dog"],
        "dog/y.wav": ["dog"],
    }  # fmt: skip
    assert bad_of(tmp_path / "m.tsv") == {"loose.wav": "no label"}
    assert "2 classes: bird (2), dog (2)\n" in said
    with pytest.raises(InputError, match="none of the 1 audio files has a label in its folder"):
        prepare.scan(str(tmp_path / "in" / "dog" / "2023"), str(tmp_path / "x.tsv"), labels="")


def test_a_class_with_a_comma_is_one_class(tmp_path, script):
    wav(tmp_path / "in" / "race car, auto racing" / "x.wav")
    said = script(PREPARE, "scan", "in", "-o", "m.tsv", "--labels").stdout
    assert labels_found(tmp_path / "m.tsv") == {"race car, auto racing/x.wav": ["race car; auto racing"]}
    assert "'race car, auto racing' becomes 'race car; auto racing'" in said


def test_the_first_ten_classes_are_printed(tmp_path, script):
    for i in range(12):
        wav(tmp_path / "in" / f"class {i:02d}" / "x.wav")
    said = script(PREPARE, "scan", "in", "-o", "m.tsv", "--labels").stdout
    first = ", ".join(f"class {i:02d} (1)" for i in range(10))
    assert f"12 classes: {first}, ...\n" in said


def test_one_spelling_of_accents(tmp_path):
    """Folders and tables in Unicode's composed and decomposed forms are the same class and file."""
    nfc = unicodedata.normalize("NFC", "Vögel")
    nfd = unicodedata.normalize("NFD", "Vögel")
    wav(tmp_path / "in" / nfc / "a.wav")
    wav(tmp_path / "in" / nfd / "b.wav")
    if len(os.listdir(tmp_path / "in")) < 2:
        pytest.skip("this file system has one form only")
    prepare.scan(str(tmp_path / "in"), str(tmp_path / "m.tsv"), labels="")
    assert [row[2] for row in rows_of(tmp_path / "m.tsv")] == [nfc, nfc]
    table = f"file,label\n{nfd}/a.wav,{nfd}\n{nfc}/b.wav,{nfc}\n"
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    prepare.scan(str(tmp_path / "in"), str(tmp_path / "t.tsv"), labels=str(tmp_path / "t.csv"))
    assert [row[2] for row in rows_of(tmp_path / "t.tsv")] == [nfc, nfc]


# --- label tables ------------------------------------------------------------------------------------------


@pytest.fixture
def by_table(tmp_path, monkeypatch):
    """Labels of a.wav, b.wav and c.wav, or of other names, by a table's text or bytes."""
    monkeypatch.chdir(tmp_path)

    def read(table: str | bytes, names: tuple[str, ...] = ("a.wav", "b.wav", "c.wav")) -> dict:
        for name in names:
            wav(tmp_path / "in" / name)
        if isinstance(table, str):
            table = table.encode()
        (tmp_path / "table.csv").write_bytes(table)
        prepare.scan("in", "m.tsv", labels="table.csv", force=True)
        return labels_found(tmp_path / "m.tsv")

    return read


DOG_CAT = {"a.wav": ["dog"], "b.wav": ["cat"], "c.wav": ["dog"]}
PLAIN = "file,label\na.wav,dog\nb.wav,cat\nc.wav,dog\n"


@pytest.mark.parametrize("table", [
    PLAIN, PLAIN.replace(",", ";"), PLAIN.replace(",", "\t"), PLAIN.replace("\n", "\r\n"),
    PLAIN.removeprefix("file,label\n"), "sep=;\n" + PLAIN.replace(",", ";"), "sep=,\r\n" + PLAIN,
    PLAIN.encode("utf-8-sig"), PLAIN.encode("utf-16"), codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    PLAIN.replace(",", "\t").encode("utf-16"), "# made by hand\n" + PLAIN,
    "dog,a.wav\ncat,b.wav\ndog,c.wav\n", "label;file\ndog;a.wav\ncat;b.wav\ndog;c.wav\n",
    "a,dog\nb,cat\nc,dog\n", "A.WAV,dog\nB.WAV,cat\nC.WAV,dog\n",
    ".\\a.wav,dog\n.\\b.wav,cat\n.\\c.wav,dog\n",
    PLAIN.replace("\n", "\n./", 3), "in/a.wav,dog\nin/b.wav,cat\nin/c.wav,dog\n",
    "C:\\me\\a.wav,dog\nC:\\me\\b.wav,cat\nC:\\me\\c.wav,dog\n",
    "/mnt/other/a.wav\tdog\n/mnt/other/b.wav\tcat\n/mnt/other/c.wav\tdog\n",
    "file,duration,label\na.wav,0.5,dog\nb.wav,0.5,cat\nc.wav,0.5,dog\n",
    "filepath,primary_label,rating\nin/a.wav,dog,4.5\nin/b.wav,cat,3\nin/c.wav,dog,5\n",
    ",file,label\n0,a.wav,dog\n1,b.wav,cat\n2,c.wav,dog\n",
    "fname,split,class_id,class_name\na.wav,train,3,dog\nb.wav,test,7,cat\nc.wav,train,3,dog\n",
    "filename,fold,target,category\na.wav,1,0,dog\nb.wav,2,5,cat\nc.wav,3,0,dog\n",
    "label_id,label,path\n0,dog,a.wav\n1,cat,b.wav\n0,dog,c.wav\n",
    "recording,Species,confidence\na,dog,0.9\nb,cat,0.8\nc,dog,0.7\n",
    "file,dog,cat\na.wav,1,0\nb.wav,0,1\nc.wav,1,0\n",
    "file;dog;cat\na.wav;1.0;0.0\nb.wav;0.0;1.0\nc.wav;1.0;0.0\n",
    ",cat,dog,fold,duration,file\n0,0,1,1,2.5,a.wav\n1,1,0,2,2.5,b.wav\n2,0,1,2,2.5,c.wav\n",
    "file,labels\na.wav,\"['dog']\"\nb.wav,\"['cat']\"\nc.wav,\"['dog']\"\n",
    "audio,id,choice,annotator\n"
    "/data/upload/1/1a2b3c4d-a.wav,1,dog,5\n/data/upload/1/99aabbcc-b.wav,2,cat,5\n"
    "/data/upload/1/abc-c.wav,3,\"{\"\"choices\"\":[\"\"dog\"\"]}\",5\n",
    json.dumps([
        {"audio": "/data/upload/1/1a2b3c4d-a.wav", "id": 1, "choice": "dog"},
        {"audio": "/data/local-files/?d=in/b.wav", "id": 2, "choice": {"choices": ["cat"]}},
        {"audio": "http://host/data/upload/1/abc-c.wav", "label": [{"start": 0, "labels": ["dog"]}]},
    ]),
    json.dumps([
        {"id": i, "data": {"audio": f"/data/upload/1/abc-{name}.wav"}, "annotations": [
            {"result": [{"type": "choices", "value": {"choices": [label]}}], "was_cancelled": False},
            {"result": [{"type": "choices", "value": {"choices": ["wrong"]}}], "was_cancelled": True},
        ]}
        for i, (name, label) in enumerate([("a", "dog"), ("b", "cat"), ("c", "dog")])
    ]),
    "file|label\na.wav|dog\nb.wav|cat\nc.wav|dog\n",
    "source_file,file,label\nb.wav,a.wav,dog\nc.wav,b.wav,cat\na.wav,c.wav,dog\n",
    "file,annotation_id,label_quality,target_sr,label\na.wav,1,3,16000,dog\nb.wav,2,3,44100,cat\nc.wav,3,1,8000,dog\n",
    "file,is_test,dog,cat\na.wav,1,1,0\nb.wav,0,0,1\nc.wav,1,1,0\n",
    "filename,duration,dog,cat\na.wav,1,1,0\nb.wav,1.0,0,1\nc.wav,1,1,0\n",
    "file,label\na.wav,dog\na.wav,NA\nb.wav,cat\nb.wav,NaN\nc.wav,dog\n",
    json.dumps([
        {"file": "a.wav", "label": "dog"}, {"file": "b.wav", "label": "cat"},
        {"file": "b.wav", "label": None},
        {"file": "c.wav", "label": "dog", "text": "long " * 40_000},
    ]),
    "file,label,text\na.wav,dog,\nb.wav,cat,\nc.wav,dog," + "long " * 40_000,
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tBegin File\tSpecies\n"
    "1\tWaveform 1\t1\t0.0\t0.1\t100\ta.wav\tdog\n2\tWaveform 1\t1\t0.2\t0.3\t100\ta.wav\tdog\n"
    "3\tWaveform 1\t1\t0.0\t0.1\t100\tb.wav\tcat\n4\tWaveform 1\t1\t0.0\t0.1\t100\tc.wav\tdog\n",
])  # fmt: skip
def test_tables_of_other_tools(by_table, table):
    """Delimiters, encodings, names, columns beside: the same three labels."""
    assert by_table(table) == DOG_CAT


@pytest.mark.parametrize("titles", ["class_0,class_1", "label1,label2"])
def test_switches_with_titles_of_labels(by_table, titles):
    """A column for each class is that, whatever its title begins with."""
    first, second = titles.split(",")
    found = by_table(f"file,{titles}\na.wav,1,0\nb.wav,0,1\nc.wav,1,1\n")
    assert found == {"a.wav": [first], "b.wav": [second], "c.wav": [first, second]}


def test_numbers_that_are_names_of_files_and_of_rows(by_table):
    """The column with a title of files is the files', not the index that pandas adds."""
    found = by_table(",fname,labels\n0,2,cat\n1,0,dog\n2,1,bird\n", ("0.wav", "1.wav", "2.wav"))
    assert found == {"0.wav": ["dog"], "1.wav": ["bird"], "2.wav": ["cat"]}


def test_a_quotation_mark_that_is_not_closed(by_table):
    """It would make one label of the rest of the table."""
    rows = [f"{i}.wav,dog" for i in range(20)]
    rows[3] = '3.wav,"cat'
    with pytest.raises(InputError, match="a quotation mark before 'cat' is not closed"):
        by_table("file,label\n" + "\n".join(rows), [f"{i}.wav" for i in range(20)])
    found = by_table('file,label,text\na.wav,dog,"two\nlines"\nb.wav,cat,"one"\n', ("a.wav", "b.wav"))
    assert found == {"a.wav": ["dog"], "b.wav": ["cat"]}


def test_titles_that_are_names_of_files(by_table):
    found = by_table("file,dog,cat\ndog.wav,1,0\ncat.wav,0,1\n", ("dog.wav", "cat.wav"))
    assert found == {"dog.wav": ["dog"], "cat.wav": ["cat"]}
    found = by_table("file,label\nfile.wav,dog\nb.wav,cat\n", ("file.wav", "b.wav"))
    assert found == {"file.wav": ["dog"], "b.wav": ["cat"]}


def test_the_table_of_urbansound(by_table, capsys):
    """Eight columns, of which one is the file and one the class; files lie in folders of folds."""
    table = (
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n"
        "100263-2-0-117.wav,100263,58.5,62.5,1,5,2,children_playing\n"
        "100648-1-0-0.wav,100648,4.823402,5.471927,2,10,1,car_horn\n"
    )
    names = ("fold5/100032-3-0-0.wav", "fold5/100263-2-0-117.wav", "fold10/100648-1-0-0.wav")
    assert by_table(table, names) == {
        names[0]: ["dog_bark"], names[1]: ["children_playing"], names[2]: ["car_horn"],
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "files: slice_file_name; labels: class\n" in said
    assert "3 classes: car_horn (1), children_playing (1), dog_bark (1)" in said


def test_absolute_relative_and_home_paths_are_the_same_file(by_table, tmp_path, monkeypatch):
    """Rows of one file add up, however they write its path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    table = f"file,label\n{tmp_path}/in/x/a.wav,dog\nx/a.wav,cat\n~/in/x/a.wav,bird\n./in/x/a.wav,frog\n"
    found = by_table(f"{table}b.wav,cow\n", ("x/a.wav", "x/b.wav"))
    assert found == {"x/a.wav": ["dog", "cat", "bird", "frog"], "x/b.wav": ["cow"]}


def test_a_name_that_may_be_two_files_labels_none(by_table, tmp_path):
    """x/a.wav and y/a.wav are not told apart by a.wav; and cat/1.wav is not dog/1.wav."""
    found = by_table("file,label\na.wav,dog\nx/b.wav,cat\n", ("x/a.wav", "y/a.wav", "x/b.wav"))
    assert found == {"x/b.wav": ["cat"]}
    assert bad_of(tmp_path / "m.tsv")["a.wav"] == "several files have this name"
    shutil.rmtree(tmp_path / "in")
    found = by_table("file,label\ncat/1.wav,cat\ndog/2.wav,dog\n", ("dog/1.wav", "dog/2.wav"))
    assert found == {"dog/2.wav": ["dog"]}
    shutil.rmtree(tmp_path / "in")
    found = by_table("file,label\ncat/1.wav,cat\ndog/1.wav,dog\nfrog/2.wav,frog\n", ("1.wav", "2.wav"))
    assert found == {"2.wav": ["frog"]}
    assert "1.wav" in bad_of(tmp_path / "m.tsv")


def test_a_comma_in_the_one_column_of_labels_is_part_of_the_label(by_table, capsys):
    """Of files and titles of any kind; and the output says what becomes of it."""
    expected = {"a.wav": ["race car; auto racing"], "b.wav": ["dog"]}
    rows = 'a.wav,"race car, auto racing"\nb.wav,dog\n'
    for header in ("file,label\n", "", "file,labels\n", "path,Category\n"):
        assert by_table(header + rows, ("a.wav", "b.wav")) == expected
        assert "'race car, auto racing' becomes 'race car; auto racing'" in capsys.readouterr().out
    assert by_table("a.wav;race car, auto racing\nb.wav;dog\n", ("a.wav", "b.wav")) == expected


def test_several_labels_of_a_file(by_table, tmp_path):
    """In columns of their own, in rows of their own, in lists; what has no label or no file is told."""
    expected = {"a.wav": ["cat", "dog"], "b.wav": ["rain"]}
    for table in (
        "a.wav, cat , dog\nb.wav,rain\n", "filename,label\na.wav,cat,dog\nb.wav,rain\n",
        "file,label,label\na.wav,cat,dog\nb.wav,rain,\n",
        "file,label 1,label 2\na.wav,cat,dog\nb.wav,rain,\n",
        "a.wav,cat\na.wav,dog\na.wav,cat\nb.wav,rain\n",
        'fname,labels,mids\na.wav,"cat,dog","/m/1,/m/2"\nb.wav,rain,/m/3',
        "file;labels\na.wav;cat|dog\nb.wav;rain\n",
        'file,tags\na.wav,"[""cat"", ""dog""]"\nb.wav,"[""rain""]"\n',
        "file,cat,dog,rain\na.wav,1,1,0\nb.wav,0,0,1\n",
        "file,label_cat,label_dog,rain\na.wav,1,1,0\nb.wav,0,0,1\n",
    ):
        found = by_table(table, ("a.wav", "b.wav", "c.wav"))
        found = {name: [label.removeprefix("label_") for label in labels] for name, labels in found.items()}
        assert found == expected, table
        assert bad_of(tmp_path / "m.tsv") == {"c.wav": "no label"}
    by_table("file,label\na.wav,dog\nb.wav,\nnone.wav,cat\n")
    bad = bad_of(tmp_path / "m.tsv")
    assert bad == {"b.wav": "no label", "c.wav": "no label", "none.wav": "no such file"}


def test_labels_of_other_encodings(by_table, tmp_path):
    """Windows' Latin-1 is read as that, unless the files themselves have such names."""
    table = "file;label\na.wav;Vögel\nb.wav;Hund\n".encode("latin-1")
    assert by_table(table, ("a.wav", "b.wav")) == {"a.wav": ["Vögel"], "b.wav": ["Hund"]}
    odd = os.fsdecode(b"caf\xe9")
    table = os.fsencode(f"{odd}.wav,{odd}\n")
    assert by_table(table, (f"{odd}.wav",)) == {f"{odd}.wav": [odd]}


@pytest.mark.parametrize("table", [
    "a.wav,train,dog\nb.wav,test,cat\n", "file,duration,speaker\na.wav,0.5,Ann\nb.wav,0.5,Bob\n",
    "a.wav\nb.wav\n", "file,label\nx.wav,dog\ny.wav,cat\n", "file,label\n", "# nothing\n", "",
    "file,hasbird\na.wav,1\nb.wav,0\n", "file,soft,hard\na.wav,0.3,0.7\nb.wav,0.5,0.5\n",
    "[1, 2, 3]", '[{"audio": 5}]',
    "audio,bird,id,annotator,annotation_id\na.wav,dog,1,1,1\nb.wav,cat,2,1,2\n",
    "file,target_sr\na.wav,16000\nb.wav,8000\n", "file,labeler\na.wav,anna\nb.wav,ben\n",
])  # fmt: skip
def test_tables_that_cannot_be_told_are_refused(by_table, tmp_path, table):
    """In one line with the first row, a file's name and what is expected; nothing is written."""
    with pytest.raises(InputError) as error:
        by_table(table)
    said = str(error.value)
    assert "\n" not in said
    assert "'a.wav'" in said
    assert "file,label" in said
    assert all(word in said for word in re.findall(r"\w+", table)[:1])  # of the first row
    assert not (tmp_path / "m.tsv").exists()


def test_a_table_that_is_no_table(by_table, tmp_path, capsys):
    """Whatever is given: one line."""
    rng = np.random.default_rng(0)
    for table in (rng.bytes(5000), b"\xff\xfe\x00", b'"' * 1001, b"[" * 100_000, b"PK\3\4\0\0"):
        with pytest.raises(InputError) as error:
            by_table(table)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot read in: "):
        prepare.scan("in", "x.tsv", labels="in")


def test_labels_in_a_cell():
    assert labels_in("Bark, loud") == ["Bark, loud"]
    assert labels_in("[noise]") == ["[noise]"]
    assert labels_in(["a", ["b"], None, 3]) == ["a", "b", "3"]
    assert labels_in('[{"start": 0.5, "labels": ["a", "b"]}]') == ["a", "b"]
    assert labels_in("two\nlines\there") == ["two lines here"]
    assert labels_in("  ") == []


# --- stats -------------------------------------------------------------------------------------------------


def kaldi(waveform: torch.Tensor) -> torch.Tensor:
    return torchaudio.compliance.kaldi.fbank(
        waveform[None], htk_compat=True, sample_frequency=16_000, use_energy=False, window_type="hanning",
        num_mel_bins=128, dither=0.0, frame_shift=10,
    )  # fmt: skip


def test_stats_of_a_known_signal(folder, broken, script):
    """Mean and std of Kaldi's values of all clips that can be read."""
    values = torch.cat([kaldi(load_audio(folder / f"clip {i}.wav")).flatten() for i in range(8)])
    said = script(PREPARE, "stats", "manifest.tsv", "--workers", 0).stdout
    assert said.endswith("    # 8 of 8 pieces of 8 clips\n")
    with open(folder / "manifest.tsv", "a") as file:
        file.writelines(f"{name}\t16000\n" for name in broken)
    said = script(PREPARE, "stats", "manifest.tsv", "--workers", 0).stdout
    out = said.split()
    assert out[0] == "--norm_mean"
    assert out[2] == "--norm_std"
    assert float(out[1]) == pytest.approx(values.mean().item(), abs=1e-3)
    assert float(out[3]) == pytest.approx(values.std().item(), abs=1e-3)
    assert ", 5 unreadable" in said


def test_stats_tells_pieces_from_clips(tmp_path, script):
    """A long file has many pieces; of more than --max_clips only some are measured."""
    wav(tmp_path / "long.wav", 16_000 * 42)
    wav(tmp_path / "short.wav")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\nlong.wav\t{16_000 * 42}\nshort.wav\t8000\n")
    assert "# 5 of 5 pieces of 2 clips\n" in script(PREPARE, "stats", "m.tsv").stdout
    assert "# 3 of 5 pieces of 2 clips\n" in script(PREPARE, "stats", "m.tsv", "--max_clips", 3).stdout


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


def test_audioset_clips_by_the_names_of_yt_dlp(tmp_path):
    """Title [ID].m4a and the like, beside the other forms; a title may have brackets of its own."""
    ids = ["--4gqARaEJE", "Zbcdefghijk", "YxY_-abc012", "another_cut"]
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n")
    (tmp_path / "segments.csv").write_text("".join(f'{name}, 30.000, 40.000, "/m/09x0r"\n' for name in ids))
    names = [
        "A title [--4gqARaEJE].wav", "Live [Full_Album_] [Zbcdefghijk].f140.wav",
        "T [YxY_-abc012]_30.000_40.000.wav", "T [another_cut]_90.000_100.000.wav",
    ]  # fmt: skip
    for name in names:
        wav(tmp_path / "audio" / name)
    arguments = [str(tmp_path / name) for name in ("segments.csv", "labels.csv", "audio", "train.tsv")]
    prepare.audioset(*arguments)
    assert [row[0] for row in rows_of(tmp_path / "train.tsv")] == names[:3]
    assert bad_of(tmp_path / "train.tsv") == {"another_cut": "no files that begin at 30.000 s"}


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
    with pytest.raises(InputError) as error:
        prepare.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x.tsv").exists()
    if args[1] == "single":  # as a script
        result = script(PREPARE, *args, check=False)
        assert result.returncode == 1 and result.stderr == f"prepare.py: {error.value}\n"


# --- the released code's lists -----------------------------------------------------------------------------


def test_released_lists_become_a_manifest(tmp_path, script):
    """White space between columns, labels in an .lbl, lengths at the files' own rates: all is made anew."""
    wav(tmp_path / "audio" / "x" / "a b.wav", 48_000, 48_000)
    wav(tmp_path / "audio" / "c.wav", 8000)
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
    wav(tmp_path / "a.wav")
    wav(tmp_path / "b.wav")
    (tmp_path / "old.tsv").write_text(".\na.wav 8000\nb.wav 8000\n")
    (tmp_path / "old.lbl").write_text(lbl)
    with pytest.raises(
        InputError, match="old.lbl must have one line 'id label,label' for each of the 2 clips"
    ):
        prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert not (tmp_path / "new.tsv").exists()


def test_released_labels_in_another_order_and_ids_with_spaces(tmp_path):
    wav(tmp_path / "a 1.wav")
    wav(tmp_path / "b 1.wav")
    (tmp_path / "old.tsv").write_text(".\na 1.wav 8000\nb 1.wav 8000\n")
    (tmp_path / "old.lbl").write_text("b 1\t/m/02\na 1\t/m/01\n")
    with pytest.raises(InputError, match="old.lbl lists the clips in another order than .*old.tsv"):
        prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    (tmp_path / "old.lbl").write_text("a 1\t/m/01\nb 1\t/m/02\n")
    prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert rows_of(tmp_path / "new.tsv") == [["a 1.wav", "8000", "/m/01"], ["b 1.wav", "8000", "/m/02"]]


def test_released_lists_of_other_places(tmp_path):
    """Names that a manifest could not be read by are named, and the others are listed."""
    wav(tmp_path / "in" / "a.wav")
    wav(tmp_path / "out" / "b.wav")
    (tmp_path / "old.tsv").write_text(f"in\na.wav 8000\n{tmp_path}/out/b.wav 8000\n../out/b.wav 8000\n")
    prepare.released(str(tmp_path / "old.tsv"), str(tmp_path / "new.tsv"))
    assert rows_of(tmp_path / "new.tsv") == [["a.wav", "8000"]]
    assert (tmp_path / "new.tsv.bad").read_text() == 2 * "../out/b.wav\tlies outside the manifest's folder\n"
    with pytest.raises(InputError, match="cannot read .*missing.tsv"):
        prepare.released(str(tmp_path / "missing.tsv"), str(tmp_path / "new2.tsv"))
