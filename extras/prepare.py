"""Lists of clips (manifests): of your own audio, of public data sets; their statistics, and packed copies.

    python extras/prepare.py scan DIR -o train.tsv           every audio file below DIR
    python extras/prepare.py scan DIR --labels -o train.tsv  the class is the first folder below DIR
    python extras/prepare.py scan DIR --labels TABLE -o train.tsv    of a table: CSV, Raven, Label Studio
    python extras/prepare.py stats train.tsv                 mean and std for --norm_mean and --norm_std
    python extras/prepare.py pack train.tsv packed.tsv       decode once, into packed.pcm: --data packed.tsv
    python extras/prepare.py pack 20k/train/*.tar train.tsv  the same from tar (WebDataset) or parquet files
    python extras/prepare.py esc50 ESC-50-master -o esc50/   train1.tsv, test1.tsv, ... of five folds
    python extras/prepare.py speechcommands speech_commands_v0.02 -o spcv2/    train.tsv, valid.tsv, test.tsv
    python extras/prepare.py audioset SEGMENTS.csv LABELS.csv AUDIO_DIR -o train.tsv
    python extras/prepare.py released old.tsv -o train.tsv   the released code's old.tsv with its old.lbl

A file that ends with .bad lists what is left out, and what is damaged but kept, with the reasons. A manifest
separates labels by commas: a comma in a label becomes a semicolon. data.py describes the formats.
"""

import argparse
import csv
import hashlib
import itertools
import os
import re
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    CLIP_FRAMES, FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, AudioDataset, InputError, Manifest, build_loader,
    check_peak, first_line, labels_of, log_mel, write_lines,
)  # fmt: skip
from evaluate import Parser, run_script  # noqa: E402
from extras.labels import nfc, printable, read_labels  # noqa: E402
from extras.media import AUDIO_SUFFIXES, OTHER_SUFFIXES, count_samples, find_audio, stream  # noqa: E402
from extras.shards import Entry, check_shard, entries_of  # noqa: E402
from extras.tables import read_classes  # noqa: E402

LONG = 300 * SAMPLE_RATE  # a piece deep in such a file is slow to read, unless the format can seek
SLOW_SUFFIXES = (".mp3", *OTHER_SUFFIXES)
ID_FORMS = (r"(.{11})(|[-_.].*)", r".*\[([\w-]{11})\](.*)", r"Y(.{11})(.*)")  # YTID in a file's name
MEASURED_CLIPS = 200  # for the mean and std that `scan` prints
SHARDS = (".tar", ".parquet")


def tally(lines: Iterable[str]) -> str:
    """How often .bad gives each kind of reason: in full if always the same, else up to the colon."""
    kinds = defaultdict(Counter)
    for line in lines:
        reason = line.split("\t")[1]
        kind = re.sub(r"(?<!\w)\d[\d.]*", "...", re.split(r": | \(", reason)[0])
        kinds[kind][reason] += 1
    texts = []
    for kind, reasons in sorted(kinds.items(), key=lambda item: -item[1].total()):
        text = kind if len(reasons) > 1 else next(iter(reasons))
        texts.append(f"{reasons.total()} {text}")
    return ", ".join(texts[:6] + ["..."] * (len(texts) > 6))


def in_order(function: Callable, jobs: Iterable, workers: int, timeout: float | None = None) -> Iterator:
    """function(job) of each job, in order, computed ahead by `workers` threads. Raises TimeoutError."""
    pool = ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,))
    waiting = deque()
    torch.get_num_threads()  # keeps this thread's own number
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result(timeout)
        while waiting:
            yield waiting.popleft().result(timeout)
    except TimeoutError:
        raise TimeoutError(f"a file has not been read in {timeout:.0f} s") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ----- Writing manifests -----------------------------------------------------------------------------------


def join(labels: list[str]) -> str:
    """Labels as a column of a manifest."""
    return ",".join(label.replace(",", ";") for label in labels)


def say_if_comma(labels: Iterable[str]) -> bool:
    """Print that commas are replaced if one of these labels has one; returns whether one has."""
    for label in labels:
        if "," in label:
            print(f"commas separate labels in a manifest: {label!r} becomes {join([label])!r} and so on")
            return True
    return False


def list_file(path: Path, labels: list[str], folder: str) -> tuple[str, str]:
    """A file's line of the manifest of a folder, and its line of .bad; "" if it has none."""
    name = os.path.relpath(path, folder)
    column = join(labels)
    try:
        if ".." in Path(name).parts:
            raise InputError("lies outside the manifest's folder")
        if set("\t\n\r") & set(name + column):
            raise InputError("its name or label holds a tab or a line break")
        n_samples, remark = count_samples(path)
    except (InputError, OSError) as error:
        return "", f"{printable(name)}\t{error}"
    line = f"{name}\t{n_samples}"
    if labels:
        line += f"\t{column}"
    return line, f"{name}\tkept, but {remark}" if remark else ""


def check_output(output: str, can_replace: bool) -> Manifest | None:
    """The list that is there already, if it may be replaced. Raises InputError if it may not, or if
    `output`.bad is another file than one of ours."""
    if not os.path.basename(output):
        raise InputError(f"{output} is a folder: name a file in it")
    old = None
    if os.path.exists(output):
        try:
            old = Manifest(output) if can_replace else None
        except InputError:
            pass
        if old is None or old.root.endswith(".pcm"):
            raise InputError(f"{output} exists: remove it or choose another name")
    bad = Path(f"{output}.bad")
    if bad.exists():
        *lines, rest = bad.read_bytes().split(b"\n")
        if rest or any(line.count(b"\t") != 1 for line in lines):
            raise InputError(f"{bad} exists: remove it or choose another name")
    return old


def write_bad(output: str, lines: Iterable[str]) -> None:
    """Write `output`.bad, or remove an older one if there is nothing to tell."""
    write_lines(f"{output}.bad", lines)
    if not os.path.getsize(f"{output}.bad"):
        os.remove(f"{output}.bad")


def write_manifest(
    output: str, folder: str, files: list[tuple[Path, list[str]]], bad: list[tuple[str, str]] = (),
    can_replace: bool = False, force: bool = False,
) -> list[str]:  # fmt: skip
    """Write a manifest of files below `folder` and their labels; returns its lines. `bad` (name, reason) and
    what cannot be used go to `output`.bad. Raises InputError if no file can be used, or if `output` exists,
    unless it `can_replace` a manifest that lists the same or, with `force`, any manifest."""
    old = check_output(output, can_replace)
    if {"\n", "\r"} & set(os.path.abspath(folder)):
        raise InputError(f"the name of {folder!r} holds a line break: a manifest cannot hold it")
    where = os.path.dirname(output) or "."
    os.makedirs(where, exist_ok=True)
    with TemporaryFile(dir=where):
        pass  # a folder that cannot be written is reported before the work
    rows = in_order(lambda file: list_file(*file, folder), files, os.cpu_count())
    lines = []
    kept = []
    left_out = []
    for line, problem in tqdm(rows, "scan", len(files), unit="file", disable=None):
        if line:
            lines.append(line)
        if line and problem:
            kept.append(problem)
        elif problem:
            left_out.append(problem)
    left_out += [f"{printable(name)}\t{reason}" for name, reason in bad]
    if lines and old and not force:
        is_same = sorted(old.lines) == sorted(map(os.fsencode, lines))
        if not is_same or os.path.realpath(old.root) != os.path.realpath(folder):
            raise InputError(f"{output} exists and lists other clips or labels: --force replaces it")
    write_bad(output, left_out + kept)
    if not lines:
        said = f"none of the {len(files)} audio files below {folder} can be read: see {output}.bad"
        raise InputError(f"{said} ({tally(left_out)})")
    write_lines(output, [os.path.abspath(folder), *lines])
    summarize(output, lines, left_out, len(kept))
    return lines


def summarize(output: str, lines: Iterable[str], left_out: list[str], n_kept: int) -> None:
    """Print how much a manifest lists, what is not in it, and its classes."""
    counts = Counter()
    n_clips = 0
    n_samples = 0
    n_without = 0
    for line in lines:
        fields = line.split("\t")
        labels = labels_of(fields)
        counts.update(labels)
        n_clips += 1
        n_samples += int(fields[1])
        n_without += not labels
    said = f"{output}: {n_clips} clips, {n_samples / SAMPLE_RATE / 3600:.2f} h"
    if left_out:
        said += f"; {len(left_out)} left out, listed in {output}.bad: {tally(left_out)}"
    print(said)
    if n_kept:
        print(f"{n_kept} damaged, but kept: see {output}.bad")
    if counts:
        first = [f"{label} ({counts[label]})" for label in sorted(counts)]
        print(f"{len(counts)} classes: {', '.join(first[:10] + ['...'] * (len(first) > 10))}")
    if counts and n_without:
        print(f"{n_without} clips without label")


# ----- scan, stats -----------------------------------------------------------------------------------------


def scan(folder: str, output: str, labels: str | None = None, force: bool = False) -> None:
    """A manifest of every audio file below a folder.
    With `labels`, "" for the first folder below it, or a table, files without a label are left out."""
    check_output(output, can_replace=True)
    paths = find_audio(folder)
    found = {}
    bad = []
    if labels:
        table = read_labels(labels, folder, paths)
        print(f"{labels}: {table.columns}")
        found = {path: list(dict.fromkeys(own)) for path, own in table.found.items() if own}
        bad = table.problems
    elif labels == "":
        for path in paths:
            first, *rest = path.relative_to(folder).parts
            label = nfc(first).strip()
            if rest and label:
                found[path] = [label]
    files = [(path, found.get(path, [])) for path in paths]
    if labels is not None:
        files = [(path, own) for path, own in files if own]
        unlabelled = [path for path in paths if path not in found]
        bad = [(os.path.relpath(path, folder), "no label") for path in unlabelled] + bad
        if not files:
            raise InputError(f"none of the {len(paths)} audio files has a label in {labels or 'its folder'}")
        say_if_comma(label for own in found.values() for label in own)
    lines = write_manifest(output, folder, files, bad, can_replace=True, force=force)
    print_norm(output)
    rows = [line.split("\t") for line in lines]
    if any(int(row[1]) > LONG and row[0].lower().endswith(SLOW_SUFFIXES) for row in rows):
        print("long files of these formats are slow to read in pieces: `prepare.py pack` decodes them once")


def measure(
    data: AudioDataset, max_items: int, workers: int, timeout: float
) -> tuple[float, float, int, int]:
    """Mean and std of the log-mel values, without padding, of items spread over a data set; how many were
    read, and how many cannot be."""
    items = torch.linspace(0, len(data) - 1, max(1, min(max_items, len(data)))).long().tolist()
    total = torch.zeros(3, dtype=torch.float64)  # number, sum, sum of squares
    n_bad = 0
    loader = build_loader(data, [[item] for item in items], workers, 60 * timeout)
    for batch in tqdm(loader, "stats", len(items), unit="piece", leave=False, disable=None):
        if batch.problems[0]:
            n_bad += 1
            continue
        spec = log_mel(batch.waveform[:, : batch.n_samples[0]]).double()
        total += torch.stack([torch.tensor(spec.numel()), spec.sum(), spec.square().sum()])
    if not total[0]:
        raise InputError(f"none of {n_bad} pieces of {data.source} can be read")
    mean = total[1] / total[0]
    std = (total[2] / total[0] - mean**2).sqrt()
    return float(mean), float(std), len(items) - n_bad, n_bad


def print_norm(output: str) -> None:
    """Print the mean and std of the beginnings of some clips."""
    try:
        data = AudioDataset(output, segments=False)
        mean, std, n_clips, _ = measure(data, MEASURED_CLIPS, os.cpu_count(), 30)
    except InputError:
        return  # silence, or nothing but shorter than a frame
    norm = f"--norm_mean {mean:.3f} --norm_std {std:.3f}"
    print(f"{norm}    # for pretrain.py, of {n_clips} clips; of more: stats")


def stats(source: str, max_clips: int, workers: int, timeout: float = 30) -> None:
    """Mean and std of the log-mel values, without padding, of max_clips pieces spread over a manifest."""
    data = AudioDataset(source)
    mean, std, n_pieces, n_bad = measure(data, max_clips, workers, timeout)
    said = f"{n_pieces} of {len(data)} pieces of {len(data.line.unique())} clips"
    if n_bad:
        said += f", {n_bad} unreadable"
    print(f"--norm_mean {mean:.3f} --norm_std {std:.3f}    # {said}")


# ----- pack ------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """What an earlier run has packed."""

    n_listed: int = 0  # bytes of its listing that are whole
    n_bytes: int = 0  # of samples
    source: int = 0  # the last one begun
    n_entries: int = 0  # how many of its entries are done


def pack(sources: list[str], output: str, classes: str = "", workers: int = 0, timeout: float = 30) -> int:
    """Decode manifests, tar or parquet files into one .pcm file, and list its clips in `output`.
    Started again, it goes on where it was: `output`.partial has a hash of the sources, then lines
    source<TAB>kind<TAB>text. The text is a line of the manifest (kind "clip") or of .bad ("left out", "kept"
    if the next clip is damaged, "lost" if more of the source may be missing). Returns 1 if any is lost."""
    if not output.endswith(".tsv") or output in sources:
        raise InputError(f"{output}: the last name is that of the new list and must end with .tsv")
    named = {}
    for source in sources:
        place = os.path.realpath(source)
        if place in named:
            raise InputError(f"{source} is named twice, or the same as {named[place]}")
        named[place] = source
    partial = Path(f"{output}.partial")
    pcm = Path(output).with_suffix(".pcm")
    if not partial.exists():
        check_output(output, can_replace=False)
        if pcm.exists():
            raise InputError(f"{pcm} exists: remove it or choose another name")
    known = read_classes(classes) if classes else {}
    content = repr([list(known.items()), *map(identity, sources)])
    digest = hashlib.sha256(os.fsencode(content)).hexdigest()
    pcm.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    pcm.touch()
    temporary = TemporaryDirectory(ignore_cleanup_errors=True)  # after an error threads may still use it
    with open(partial, "r+b") as listing, open(pcm, "r+b") as samples, temporary as folder:
        lock(listing, output)
        if partial.exists() and os.path.exists(output) and not os.path.getsize(partial):
            partial.unlink()  # another process has finished since, and this file is ours
        if not partial.exists():
            raise InputError(f"another process has just made {output}")
        done = read_partial(partial, digest)
        if os.path.getsize(pcm) < done.n_bytes:
            raise InputError(f"{partial} was begun with another .pcm: remove it and {pcm}")
        listing.truncate(done.n_listed)
        listing.seek(done.n_listed)
        samples.truncate(done.n_bytes)
        samples.seek(done.n_bytes)
        if not done.n_listed:
            listing.write(f"{digest}\n".encode())
        entries = all_entries(sources, known, done)
        clips = in_order(lambda job: pack_clip(*job, folder), entries, workers, 60 * timeout)
        for waveform, lines in tqdm(clips, "pack", unit="clip", disable=None):
            samples.write(waveform.numpy().astype("<i2").tobytes())
            samples.flush()
            listing.write(os.fsencode(lines))
            listing.flush()
        os.fsync(samples.fileno())
    return finish(partial, pcm, output)


def lock(file: IO, output: str) -> None:
    """Keep other processes out until the file is closed. Raises InputError if one is there."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's would end when anybody closes the file
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process is packing into {output}: wait for it") from None
    except OSError:
        print(f"WARNING: {output} cannot be locked: start only one process for it", file=sys.stderr)


def identity(source: str) -> tuple:
    """What identifies a source. Raises InputError if it cannot be used."""
    if source.endswith(SHARDS):
        check_shard(source)
        return source, os.path.getsize(source)
    if os.path.isfile(source):
        with open(source, "rb") as file:
            if b"\0" in file.read(1024):
                raise InputError(f"{source} is no manifest, nor named .tar or .parquet: unpack or rename it")
    manifest = Manifest(source)
    return os.path.abspath(manifest.root), manifest.digest


def read_partial(partial: Path, digest: str) -> Done:
    """What an earlier run has done. Raises InputError if it did something else."""
    done = Done()
    size = 0
    with open(partial, "rb") as file:
        for line in file:
            size += len(line)
            if not line.endswith(b"\n"):
                break  # half-written
            if size == len(line):
                if line.rstrip() != digest.encode():
                    raise InputError(f"{partial} was begun with other sources: remove it and the .pcm")
                done = Done(size)
                continue
            number, kind, *text = line.split(b"\t")
            if kind == b"kept":
                continue  # counts with its clip, in the next line
            n_bytes = 2 * int(text[1]) if kind == b"clip" else 0
            n_entries = done.n_entries if int(number) == done.source else 0
            done = Done(size, done.n_bytes + n_bytes, int(number), n_entries + 1)
    return done


def all_entries(sources: list[str], classes: dict[str, str], done: Done) -> Iterator[tuple[int, Entry]]:
    """What remains to be packed: the number of a source, and an entry of it."""
    n_done = done.n_entries
    is_told = False
    for number in range(done.source, len(sources)):
        source = sources[number]
        if source.endswith(SHARDS):
            entries = entries_of(source, classes)
        else:
            entries = manifest_entries(source)
        for entry in itertools.islice(entries, n_done, None):
            is_told = is_told or say_if_comma(entry.labels)
            yield number, entry
        n_done = 0


def manifest_entries(source: str) -> Iterator[Entry]:
    """The clips of a manifest."""
    manifest = Manifest(source)
    for i in range(len(manifest.lines)):
        fields = manifest.fields(i)
        try:
            yield Entry(fields[0], labels_of(fields), path=manifest.path(i))
        except InputError as error:
            yield Entry(fields[0], problem=str(error))


def pack_clip(number: int, entry: Entry, folder: str) -> tuple[Tensor, str]:
    """Decode a clip, one of a shard through a file in `folder`: int16 (S,), and the lines of the listing."""
    try:
        if entry.problem:
            raise InputError(entry.problem)
        path = entry.path
        if entry.read:
            suffix = os.path.splitext(entry.name)[1]
            if suffix.lower() not in AUDIO_SUFFIXES:  # of a row it may be anything
                suffix = ""
            path = os.path.join(folder, f"{threading.get_ident()}{suffix}")
            Path(path).write_bytes(entry.read())
        waveform, gain, remark = decode(path)
    except InputError as error:
        kind = "lost" if entry.is_loss else "left out"
        return torch.empty(0, dtype=torch.int16), f"{number}\t{kind}\t{entry.name}\t{printable(str(error))}\n"
    line = f"{number}\tclip\t{entry.name}\t{len(waveform)}"
    if entry.labels or gain != 1:
        line += f"\t{join(entry.labels)}"
    if gain != 1:
        line += f"\t{gain}"
    if remark:
        line = f"{number}\tkept\t{entry.name}\tkept, but {remark}\n{line}"
    return waveform, f"{line}\n"


def decode(path: str) -> tuple[Tensor, int, str]:
    """A whole file, in pieces to save memory: int16 (S,), the gain that it was divided by, and what is wrong
    with it. A piece that is damaged, or no audio, is silence. Raises InputError if all are."""
    pieces = []
    gain = 1
    problems = []
    is_good = False
    for piece, problem in stream(path, CLIP_FRAMES * FRAME_SHIFT):
        try:
            if len(piece):
                check_peak(piece, allow_silence=True)
        except InputError as error:
            problem = f"{error} (at {sum(map(len, pieces)) / SAMPLE_RATE:.1f} s)"
            piece = torch.zeros_like(piece)
        if problem:
            problems.append(problem)
        if not len(piece):
            continue  # a remark on the whole file
        is_good = is_good or not problem or bool(piece.any())
        peak = 32768 * piece
        while peak.max() >= 32767.5 * gain or peak.min() < -32768.5 * gain:
            gain *= 2
            pieces = [(piece / 2).round().to(torch.int16) for piece in pieces]
        pieces.append((peak / gain).round().to(torch.int16))
    if pieces and not is_good:
        raise InputError(problems[0])
    waveform = torch.cat([torch.empty(0, dtype=torch.int16), *pieces])
    if len(waveform) < FRAME_LENGTH:
        raise InputError("too short")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return waveform, gain, "; ".join(problems[:3]) + more


def finish(partial: Path, pcm: Path, output: str) -> int:
    """Write the manifest and .bad of a listing; returns the exit status. Raises InputError without a clip."""

    def texts(*kinds: str) -> Iterator[str]:
        with open(partial, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            next(file)
            for line in file:
                _, kind, text = line.removesuffix("\n").split("\t", 2)
                if kind in kinds:
                    yield text

    write_bad(output, texts("left out", "lost", "kept"))
    if next(texts("clip"), None) is None:
        partial.unlink()  # to begin anew
        pcm.unlink()
        if os.path.exists(f"{output}.bad"):
            raise InputError(f"no clip can be read: see {output}.bad")
        raise InputError("it holds no audio files")
    write_lines(output, itertools.chain([pcm.name], texts("clip")))
    summarize(output, texts("clip"), list(texts("left out")), sum(1 for _ in texts("kept")))
    if all(text.count("\t") < 2 for text in texts("clip")):
        print("no clip has a label")
    status = 0
    for text in texts("lost"):
        print(f"WARNING: clips are missing: {text.expandtabs(1)}", file=sys.stderr)
        status = 1
    partial.unlink(missing_ok=True)  # another process may have finished it, too
    return status


# ----- Public data sets ------------------------------------------------------------------------------------


def read_table(path: str | os.PathLike, **form) -> list[list[str]]:
    """Rows of a CSV without its lines that begin with '#'. Raises InputError if it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = (line for line in file if not line.startswith("#"))
            return [row for row in csv.reader(lines, **form) if row]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except csv.Error as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


def check_label(label: str) -> str:
    """The label, if it can stand in a manifest. Raises InputError."""
    if not label.strip() or "," in label:
        raise InputError(f"the class {label!r} is empty or holds a comma: rename it")
    return label


def esc50(folder: str, output: str) -> None:
    """Manifests of ESC-50's folds, from its meta/esc50.csv: testK.tsv is fold K, trainK.tsv the others."""
    table = f"{folder}/meta/esc50.csv"
    rows = read_table(table)
    header = rows.pop(0) if rows else []
    if not {"filename", "fold", "category"} <= set(header) or any(len(row) != len(header) for row in rows):
        raise InputError(f"{table} is not the table of ESC-50: it begins with {','.join(header)}")
    clips = [dict(zip(header, row)) for row in rows]
    audio = Path(folder, "audio")
    for clip in clips:
        check_label(clip["category"])
        if not clip["fold"].isdecimal() or os.path.basename(clip["filename"]) != clip["filename"]:
            raise InputError(f"{table}: {clip['filename']!r} has no fold, or lies elsewhere")
    folds = sorted({clip["fold"] for clip in clips})
    if len(folds) < 2:
        raise InputError(f"{table} has one fold only: there is nothing to train on")
    for fold in folds:
        train = [clip for clip in clips if clip["fold"] != fold]
        test = [clip for clip in clips if clip["fold"] == fold]
        for part, own in (("train", train), ("test", test)):
            files = [(audio / clip["filename"], [clip["category"]]) for clip in own]
            write_manifest(f"{output}/{part}{fold}.tsv", str(audio), files)


def speechcommands(folder: str, output: str) -> None:
    """Manifests of Speech Commands, a folder a word, split by validation_list.txt and testing_list.txt."""
    part_of = {}
    for part, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        for row in read_table(f"{folder}/{name}"):
            part_of[row[0]] = part
    files = dict(train=[], valid=[], test=[])
    for path in find_audio(folder):
        word = path.parent.name
        name = path.relative_to(folder).as_posix()
        if name.count("/") == 1 and not word.startswith("_"):  # _background_noise_ is not a word
            part = part_of.pop(name, "train")
            files[part].append((path, [check_label(word)]))
    for part in files:
        bad = [(name, "no such file") for name, where in part_of.items() if where == part]
        write_manifest(f"{output}/{part}.tsv", folder, files[part], bad)


def audioset(segments: str, labels: str, folder: str, output: str) -> None:
    """A manifest of the clips of an AudioSet list (YTID, start, end, "label,label") that are below a folder.
    `labels` is class_labels_indices.csv. Files are recognised by the 11 characters of the YTID: in brackets
    as yt-dlp writes them, at the beginning of the name, or after a Y; and by the start, in s or ms, if only
    numbers follow."""
    known = read_classes(labels)
    rows = read_table(segments, skipinitialspace=True)
    if not rows or any(len(row) < 4 or not re.fullmatch(r"\d+(\.\d+)?", row[1]) for row in rows):
        raise InputError(f"{segments} is not a list of AudioSet segments: YTID, start, end, labels")
    tables = [{} for _ in ID_FORMS]  # of each form: YTID -> files, each with what follows in its name
    for path in find_audio(folder):
        for form, table in zip(ID_FORMS, tables):
            match = re.fullmatch(form, path.stem, re.DOTALL)
            if match:
                table.setdefault(match[1], []).append((path, match[2]))
    files = []
    bad = []
    for name, start, _, own, *_ in rows:
        unknown = set(own.split(",")) - known.keys()
        if unknown:
            raise InputError(f"{segments}: {name} has the label {min(unknown)!r}, which {labels} lacks")
        found = next((table[name] for table in tables if name in table), [])
        paths = [path for path, rest in found if may_begin_at(float(start), rest)]
        if len(paths) == 1:
            files.append((paths[0], own.split(",")))
        else:
            bad.append((name, f"{len(paths) or 'no'} files that begin at {start} s"))
    write_manifest(output, folder, files, bad)


def may_begin_at(start: float, rest: str) -> bool:
    """Whether what follows a YTID, such as _30.000_40.000 or _30000, gives no other start time."""
    match = re.fullmatch(r"[-_.](\d+(?:\.\d+)?)(?:[-_.]\d+(?:\.\d+)?)?", rest)
    return match is None or float(match[1]) in (start, 1000 * start)


def released(source: str, output: str) -> None:
    """A manifest from the released code's .tsv, and .lbl beside it: ids and labels, a line for each clip."""
    lbl = Path(source).with_suffix(".lbl")
    try:
        text = os.fsdecode(Path(source).read_bytes()).removeprefix("\ufeff")
        label_text = os.fsdecode(lbl.read_bytes()) if lbl.exists() else ""
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    root, *lines = text.split("\n")
    root = os.path.join(os.path.dirname(source), root.strip())
    names = [line.rsplit(None, 1)[0] for line in lines if line.strip()]
    labels = [[]] * len(names)
    if lbl.exists():
        rows = [line.rsplit(None, 1) for line in label_text.split("\n") if line.strip()]
        if len(rows) != len(names) or any(len(row) < 2 for row in rows):
            raise InputError(f"{lbl} must have one line 'id label,label' for each of the {len(names)} clips")
        ids = [row[0].strip() for row in rows]
        stems = [Path(name).stem for name in names]
        if ids != stems and sorted(ids) == sorted(stems):
            raise InputError(f"{lbl} lists the clips in another order than {source}")
        labels = [row[1].split(",") for row in rows]
    write_manifest(output, root, [(Path(root, name), own) for name, own in zip(names, labels)])


# ----- Command line ----------------------------------------------------------------------------------------


def n_workers(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)


def main() -> int:
    """Do what the command line says; returns the exit status."""
    form = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = Parser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    positional = {
        scan: ["folder"], stats: ["source"], pack: ["sources", "output"], esc50: ["folder"],
        speechcommands: ["folder"], audioset: ["segments", "labels", "folder"], released: ["source"],
    }  # fmt: skip
    for function, names in positional.items():
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(function.__name__, help=summary, description=function.__doc__, **form)
        command.set_defaults(function=function)
        for name in names:
            command.add_argument(name, nargs="+" if name == "sources" else None)
        if function not in (stats, pack):
            command.add_argument("-o", dest="output", required=True, help="the manifest, or their folder")
        if function is scan:
            by = "by the first folder below DIR, or by a table"
            command.add_argument("--labels", nargs="?", const="", metavar="TABLE", help=by)
            command.add_argument("--force", action="store_true", help="replace a list of other clips")
        if function is stats:
            command.add_argument("--max_clips", type=int, default=10_000, help="how many pieces to measure")
        if function is pack:
            command.add_argument("--classes", default="", help="use the mids of class_labels_indices.csv")
        if function in (stats, pack):
            command.add_argument("--workers", type=n_workers, default=os.cpu_count(), help="threads")
            command.add_argument("--timeout", type=float, default=30, help="minutes until a hang is an error")
    args = vars(parser.parse_args())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("prepare.py is one process that uses all cores: start it without torchrun")
    del args["command"]
    function = args.pop("function")
    return function(**args) or 0


if __name__ == "__main__":
    run_script(main)
