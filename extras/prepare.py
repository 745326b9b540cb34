"""Manifests: of your own audio, of three public data sets; statistics of one; a packed copy of its audio.

    python extras/prepare.py scan DIR -o train.tsv           every audio file below DIR
    python extras/prepare.py scan DIR --labels -o train.tsv  labelled by folders; or by a table: --labels CSV
    python extras/prepare.py stats train.tsv                 mean and std for --norm_mean and --norm_std
    python extras/prepare.py pack train.tsv packed.tsv       decode once, into packed.pcm: --data packed.tsv
    python extras/prepare.py esc50 ESC-50-master -o esc50/   train1.tsv, test1.tsv, ... of five folds
    python extras/prepare.py speechcommands speech_commands_v0.02 -o spcv2/    train.tsv, valid.tsv, test.tsv
    python extras/prepare.py audioset SEGMENTS.csv LABELS.csv AUDIO_DIR -o train.tsv
    python extras/prepare.py released old.tsv -o train.tsv   the released code's old.tsv with its old.lbl

What cannot be used is left out, and listed with the reason in a file that ends with .bad. The formats are
described at the top of data.py.
"""

import argparse
import csv
import functools
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    CLIP_FRAMES, FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, AudioDataset, InputError, Manifest, build_loader,
    check_peak, first_line, log_mel, read_lines, read_pieces, silence_libraries, write_lines,
)  # fmt: skip
from evaluate import init_distributed, read_classes, run_script  # noqa: E402

from listen import count_samples, find_audio  # noqa: E402


def printable(name: str) -> str:
    """A file's name in one line, its tabs and line breaks as in Python."""
    return name.translate({9: "\\t", 10: "\\n", 13: "\\r"})


def write_manifest(output: str, folder: str, files: list[tuple[Path, str]], bad: list[str] = ()) -> None:
    """Write a manifest of (file below `folder`, labels); `bad` and what cannot be used go to `output`.bad.
    Raises InputError if one of the two exists or no file can be used."""

    def line(file: tuple[Path, str]) -> tuple[str, str]:
        name, labels = os.path.relpath(file[0], folder), file[1]
        try:
            if ".." in Path(name).parts:
                raise InputError("lies outside the manifest's folder")
            if set("\t\n\r") & set(name + labels):
                raise InputError("its name or label holds a tab or a line break")
            return f"{name}\t{count_samples(file[0])}" + (f"\t{labels}" if labels else ""), ""
        except (InputError, OSError) as error:
            return "", f"{printable(name)}\t{error}"

    for path in (output, f"{output}.bad"):
        if os.path.exists(path):
            raise InputError(f"{path} exists: remove it or choose another name")
    if {"\n", "\r"} & set(os.path.abspath(folder)):
        raise InputError(f"the name of {folder!r} holds a line break: a manifest cannot hold it")
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    write_lines(output, []), os.remove(output)  # what cannot be written is told before the work
    with ThreadPoolExecutor() as pool:  # libsndfile works outside Python's lock
        rows = list(tqdm(pool.map(line, files), total=len(files), desc="scan", unit="file", disable=None))
    good, bad = [row[0] for row in rows if row[0]], [*(row[1] for row in rows if row[1]), *bad]
    if bad:
        write_lines(f"{output}.bad", bad)
    if not good:
        raise InputError(f"none of the {len(bad)} audio files below {folder} can be read: see {output}.bad")
    write_lines(output, [os.path.abspath(folder), *good])
    hours = [int(row.split("\t")[1]) / SAMPLE_RATE / 3600 for row in good]
    left_out = f"; {len(bad)} left out, listed in {output}.bad" if bad else ""
    print(f"{output}: {len(good)} clips, {sum(hours):.2f} h{left_out}")
    if any(h > 1 / 12 and row.split("\t")[0].lower().endswith(".mp3") for h, row in zip(hours, good)):
        print("long mp3 files are slow to read in pieces: `prepare.py pack` decodes them once")


def check_label(label: str) -> str:
    """The label, if it can stand in a manifest. Raises InputError."""
    if not label.strip() or "," in label:
        raise InputError(f"the class {label!r} is empty or holds a comma: rename it")
    return label


def scan(folder: str, output: str, labels: str | None) -> None:
    """A manifest of every audio file below a folder.
    Labelled, with "", by the folders that they lie in, or by a table; then what has no label is left out."""
    files = find_audio(folder)
    if labels is None:
        return write_manifest(output, folder, [(path, "") for path in files])
    found = {path: [path.parent.name] for path in files if path.parent != Path(folder)}
    if labels:
        rows = read_table(labels, skipinitialspace=True)
        if rows and rows[0][0].lower() in ("file", "filename", "path"):
            more, rows = rows[0][2:], rows[1:]
            if odd := [title for title in more if title and not title.lower().startswith("label")]:
                raise InputError(f"{labels}: the column {odd[0]!r} is no label: remove it, or name it label")
        found = {Path(folder, name): [] for name, *_ in rows}
        for name, *cells in rows:  # several of a file add up
            found[Path(folder, name)] += ",".join(cells).split(",")
    found = {path: [*dict.fromkeys(filter(None, map(str.strip, own)))] for path, own in found.items()}
    labelled = [(path, ",".join(map(check_label, found[path]))) for path in files if found.get(path)]
    bad = {path: "no label" for path in files if not found.get(path)}
    bad |= dict.fromkeys(found.keys() - set(files), "no such file")
    if not labelled:
        raise InputError(f"none of the {len(files)} audio files has a label in {labels or 'its folder'}")
    lines = [f"{printable(os.path.relpath(path, folder))}\t{reason}" for path, reason in sorted(bad.items())]
    write_manifest(output, folder, labelled, lines)


def released(source: str, output: str) -> None:
    """A manifest from the released code's .tsv, and .lbl beside it: ids and labels, a line for each clip."""
    try:
        root, *lines = os.fsdecode(Path(source).read_bytes()).removeprefix("\ufeff").split("\n")
        lbl = Path(source).with_suffix(".lbl")
        labels = os.fsdecode(lbl.read_bytes()).split("\n") if lbl.exists() else []
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    names = [line.rsplit(None, 1)[0] for line in lines if line.strip()]
    rows = [line.rsplit(None, 1) for line in labels if line.strip()]
    if lbl.exists() and (len(rows) != len(names) or any(len(row) < 2 for row in rows)):
        raise InputError(f"{lbl} must have one line 'id label,label' for each of the {len(names)} clips")
    ids, root = [row[0].strip() for row in rows], os.path.join(os.path.dirname(source), root.strip())
    if sorted(ids) == sorted(stems := [Path(name).stem for name in names]) and ids != stems:
        raise InputError(f"{lbl} lists the clips in another order than {source}")
    labels = [row[1] for row in rows] or [""] * len(names)
    write_manifest(output, root, [(Path(root, name), own) for name, own in zip(names, labels)])


def stats(source: str, max_clips: int, workers: int, timeout: float = 30) -> None:
    """Mean and std of the log-mel values, without padding, of max_clips clips spread over a manifest."""
    init_distributed()  # keeps freed memory
    data = AudioDataset(source)
    items = torch.linspace(0, len(data) - 1, max(1, min(max_clips, len(data)))).long().tolist()
    sums, n_bad = torch.zeros(3, dtype=torch.float64), 0
    loader = build_loader(data, [[item] for item in items], workers, 60 * timeout)
    for batch in tqdm(loader, "stats", len(items), unit="clip", disable=None):
        if batch.problems[0]:
            n_bad += 1
            continue
        spec = log_mel(batch.waveform[:, : batch.n_samples[0]]).double()
        sums += torch.stack([spec.sum(), spec.square().sum(), torch.tensor(spec.numel())])
    if not sums[2]:
        raise InputError(f"none of the {n_bad} clips of {source} can be read")
    mean, std = sums[0] / sums[2], (sums[1] / sums[2] - (sums[0] / sums[2]) ** 2).sqrt()
    print(f"--norm_mean {mean:.3f} --norm_std {std:.3f}    # {len(items) - n_bad} clips, {n_bad} unreadable")


def pack(source: str, output: str, workers: int, timeout: float = 30) -> None:
    """Decode a manifest's clips into one .pcm file, and list them in `output`.
    Started again, it goes on where it was: `output`.partial has a hash of the manifest, then a line for each
    of its clips that is done. Raises InputError if that was begun with another manifest."""
    if not output.endswith(".tsv") or os.path.exists(output):
        raise InputError(f"{output}: choose a new name that ends with .tsv")
    manifest, partial, pcm = Manifest(source), Path(f"{output}.partial"), Path(output).with_suffix(".pcm")
    if pcm.exists() and not partial.exists():
        raise InputError(f"{pcm} exists: remove it or choose another name")
    pcm.parent.mkdir(parents=True, exist_ok=True), partial.touch(), pcm.touch()
    listed = os.fsencode(os.path.abspath(manifest.root)) + manifest.text.numpy().tobytes()
    digest = hashlib.sha256(listed).hexdigest()
    first, *done = read_lines(partial) or [digest]  # whole lines: the last may be half-written
    n_bytes = 2 * sum(int(line.split("\t")[1]) for line in done)
    if first != digest or os.path.getsize(pcm) < n_bytes:
        raise InputError(f"{partial} was begun with another manifest or .pcm: remove it and {pcm}")
    write_lines(partial, [digest, *done])
    with open(partial, "ab") as listing, open(pcm, "r+b") as samples:
        samples.seek(n_bytes), samples.truncate()
        clips, read = range(len(manifest.begins)), functools.partial(read_whole, manifest)
        rest = clips[len(done) :]
        loader = build_loader(clips, zip(rest), workers, 60 * timeout, collate_fn=read)
        for waveform, line in tqdm(loader, "pack", len(rest), unit="clip", disable=None):
            samples.write(waveform.numpy().astype("<i2").tobytes()), samples.flush()
            listing.write(os.fsencode(f"{line}\n")), listing.flush()
        os.fsync(samples.fileno())
    rows = [line.split("\t") for line in read_lines(partial)[1:]]
    bad = [f"{row[0]}\t{row[2]}" for row in rows if row[1] == "0"]
    if bad:
        write_lines(f"{output}.bad", bad)
    if len(bad) == len(rows):
        partial.unlink(), pcm.unlink()  # to begin anew
        raise InputError(f"no clip of {source} can be read: see {output}.bad")
    write_lines(output, [pcm.name, *("\t".join(row) for row in rows if row[1] != "0")])
    partial.unlink()
    left_out = f"; {len(bad)} left out, listed in {output}.bad" if bad else ""
    print(f"{output}: {len(rows) - len(bad)} clips in {pcm}{left_out}")


def read_whole(manifest: Manifest, clips: list[int]) -> tuple[Tensor, str]:
    """The one clip's whole file as int16, decoded in pieces to save memory; and its line of the listing."""
    (i,) = clips
    (name, _, *labels), hop = manifest.fields(i), CLIP_FRAMES * FRAME_SHIFT
    try:
        pieces, gain = [], 1
        for piece in read_pieces(manifest.path(i), hop, hop):
            check_peak(piece, allow_silence=True)
            while piece.max() * 32768 >= 32767.5 * gain or piece.min() * 32768 < -32768.5 * gain:
                gain, pieces = 2 * gain, [(p / 2).round().to(torch.int16) for p in pieces]
            pieces.append((piece * (32768 / gain)).round().to(torch.int16))
        waveform = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int16)
        if len(waveform) < FRAME_LENGTH:
            raise InputError("too short")
        more = labels[:1] if gain == 1 else ["".join(labels[:1]), str(gain)]
        return waveform, "\t".join([name, str(len(waveform)), *more])
    except InputError as error:
        return torch.empty(0, dtype=torch.int16), f"{name}\t0\t{error}"


def read_table(path: str | os.PathLike, **form) -> list[list[str]]:
    """Rows of a CSV without its lines that begin with '#'. Raises InputError if it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = (line for line in file if not line.startswith("#"))
            return [row for row in csv.reader(lines, **form) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = getattr(error, "strerror", "") or first_line(error)
        raise InputError(f"cannot read {path}: {said}") from None


def esc50(folder: str, output: str) -> None:
    """Manifests of ESC-50's folds, from its meta/esc50.csv: testK.tsv is fold K, trainK.tsv the others."""
    table = f"{folder}/meta/esc50.csv"
    header, *rows = read_table(table) or [[]]
    if not {"filename", "fold", "category"} <= set(header) or any(len(row) != len(header) for row in rows):
        raise InputError(f"{table} is not the table of ESC-50: it begins with {','.join(header)}")
    clips, audio = [dict(zip(header, row)) for row in rows], Path(folder, "audio")
    for clip in clips:
        check_label(clip["category"])
        if not clip["fold"].isdecimal() or os.path.basename(clip["filename"]) != clip["filename"]:
            raise InputError(f"{table}: {clip['filename']!r} has no fold, or lies elsewhere")
    folds = sorted({clip["fold"] for clip in clips})
    if len(folds) < 2:
        raise InputError(f"{table} has one fold only: there is nothing to train on")
    for fold in folds:
        for part in ("train", "test"):
            own = [clip for clip in clips if (clip["fold"] == fold) == (part == "test")]
            files = [(audio / clip["filename"], clip["category"]) for clip in own]
            write_manifest(f"{output}/{part}{fold}.tsv", str(audio), files)


def speechcommands(folder: str, output: str) -> None:
    """Manifests of Speech Commands, a folder a word, split by validation_list.txt and testing_list.txt."""
    part_of = {}
    for part, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        part_of |= dict.fromkeys((row[0] for row in read_table(f"{folder}/{name}")), part)
    files = dict(train=[], valid=[], test=[])
    for path in find_audio(folder):
        word, name = path.parent.name, path.relative_to(folder).as_posix()
        if name.count("/") == 1 and not word.startswith("_"):  # _background_noise_ is not a word
            files[part_of.pop(name, "train")].append((path, check_label(word)))
    for part in files:
        bad = [f"{name}\tno such file" for name, where in part_of.items() if where == part]
        write_manifest(f"{output}/{part}.tsv", folder, files[part], bad)


def audioset(segments: str, labels: str, folder: str, output: str) -> None:
    """A manifest of the clips of an AudioSet list (YTID, start, end, "label,label") that are below a folder.
    `labels` is class_labels_indices.csv; a clip's file is known by the 11 characters of its YTID at the
    beginning of the name, or behind a Y; and by its start, in s or ms, if only numbers follow."""
    known, rows = read_classes(labels), read_table(segments, skipinitialspace=True)
    if not rows or any(len(row) < 4 or not re.fullmatch(r"\d+(\.\d+)?", row[1]) for row in rows):
        raise InputError(f"{segments} is not a list of AudioSet segments: YTID, start, end, labels")
    by_id, behind_y = {}, {}
    for path in find_audio(folder):
        if len(path.stem) > 11 and path.stem[0] == "Y":
            behind_y.setdefault(path.stem[1:12], []).append((path, path.stem[12:]))
        if len(path.stem) == 11 or path.stem[11:12] in ("_", "-", "."):
            by_id.setdefault(path.stem[:11], []).append((path, path.stem[11:]))
    files, bad, cut = [], [], re.compile(r"[-_.](\d+(?:\.\d+)?)(?:[-_.]\d+(?:\.\d+)?)?")  # _start[_end]
    for name, start, _, own, *_ in rows:
        if unknown := set(own.split(",")) - known.keys():
            raise InputError(f"{segments}: {name} has the label {min(unknown)!r}, which {labels} lacks")
        found, times = by_id.get(name) or behind_y.get(name, []), (float(start), 1000 * float(start))
        paths = [path for path, rest in found if not (n := cut.fullmatch(rest)) or float(n[1]) in times]
        if len(paths) == 1:
            files.append((paths[0], own))
        else:
            bad.append(f"{name}\t{len(paths) or 'no'} files that begin at {start} s")
    write_manifest(output, folder, files, bad)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for function, *arguments in (
        (scan, "folder", "-o"), (stats, "source"), (pack, "source", "output"), (esc50, "folder", "-o"),
        (speechcommands, "folder", "-o"), (audioset, "segments", "labels", "folder", "-o"),
        (released, "source", "-o"),
    ):  # fmt: skip
        command = commands.add_parser(function.__name__, help=function.__doc__.split("\n")[0])
        command.set_defaults(function=function)
        for name in arguments:
            command.add_argument(name, **(dict(dest="output", required=True) if name == "-o" else {}))
        if function is scan:
            by = "by the folder they lie in, or by a table: file,label[,label]"
            command.add_argument("--labels", nargs="?", const="", metavar="CSV", help=by)
        if function is stats:
            command.add_argument("--max_clips", type=int, default=10_000)
        if function in (stats, pack):
            command.add_argument("--workers", type=int, default=os.cpu_count())
            command.add_argument("--timeout", type=float, default=30, help="minutes, then what hangs fails")
    args = vars(parser.parse_args())
    silence_libraries()
    del args["command"]
    args.pop("function")(**args)
    return 0


if __name__ == "__main__":
    run_script(main)
