"""Manifests: of your own audio, of three public data sets; statistics of one; a packed copy of its audio.

    python extras/prepare.py scan DIR -o train.tsv           every audio file below DIR; --labels: by folders
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
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    AUDIO_SUFFIXES, CLIP_FRAMES, FRAME_LENGTH, FRAME_SHIFT, MAX_SAMPLES, SAMPLE_RATE, AudioDataset,
    InputError, Manifest, build_loader, check_peak, first_line, log_mel, open_audio, read_lines, read_pieces,
    silence_libraries, whole_rate, write_lines,
)  # fmt: skip
from evaluate import init_distributed, read_classes, run_script  # noqa: E402

# Of mp3: kbit/s by the four bits in a frame's header, in MPEG 1, and in MPEG 2 and 2.5; what divides its rate
KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBITS_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
DIVISORS = {3: 1, 2: 2, 0: 4}  # by the two bits of the version; 1 is none


def find_audio(folder: str | os.PathLike) -> list[Path]:
    """Audio files below a folder, sorted; through links, but not in circles. Raises InputError if none."""
    paths, seen = [], set()

    def warn(error: OSError) -> None:
        print(f"WARNING: {error.filename} cannot be opened: {error.strerror}", file=sys.stderr)

    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder")
    for where, subfolders, names in os.walk(folder, followlinks=True, onerror=warn):
        if os.path.realpath(where) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(where))
        paths += [Path(where, name) for name in names if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES]
    if not paths:
        raise InputError(f"no audio files below {folder} (looked for {' '.join(sorted(AUDIO_SUFFIXES))})")
    return sorted(paths)


def mp3_samples(path: str | os.PathLike) -> int:
    """Samples that an mp3 holds, by the headers of its frames: the length it claims is often an estimate."""
    data = Path(path).read_bytes()
    size = data[6:10] if data[:3] == b"ID3" else b""
    at, n_samples = (10 if size else 0) + sum(byte << 7 * (3 - i) for i, byte in enumerate(size)), 0
    while 0 <= at <= len(data) - 4:
        head = int.from_bytes(data[at : at + 4], "big")
        version, layer, bits, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
        if head >> 21 != 0x7FF or version == 1 or layer != 1 or bits in (0, 15) or rate == 3:
            at = data.find(b"\xff", at + 1)  # no frame: look for the next
            continue
        hz, length = (44_100, 48_000, 32_000)[rate] // DIVISORS[version], 1152 if version == 3 else 576
        n_samples += length
        at += length // 8 * 1000 * (KBITS if version == 3 else KBITS_2)[bits - 1] // hz + (head >> 9 & 1)
    return n_samples


def count_samples(path: str | os.PathLike) -> int:
    """Samples at 16 kHz that can be read from a file, which may claim more. Raises InputError if it cannot
    be used, or holds more than it claims: that would be lost, because libsndfile stops there."""
    with open_audio(path) as file:
        n, rate = file.frames, file.samplerate
        held = mp3_samples(path) if file.format == "MP3" else n
        width = dict(PCM_16=2, PCM_24=3, PCM_32=4, FLOAT=4, DOUBLE=8).get(file.subtype, 0) * file.channels
        if file.format in ("WAV", "WAVEX") and width and os.path.getsize(path) - n * width > 2**31:
            held = os.path.getsize(path) // width  # its size has 32 bits, and wrapped
        if held > n * 1.02 + rate / 2:
            raise InputError(f"claims {n / rate:.1f} s and holds {held / rate:.1f} s: convert it")
        n = min(n, held)
        if n < MAX_SAMPLES * rate / SAMPLE_RATE and not reaches(file, n - 1):
            with open_audio(path) as again:  # from the start, where the end cannot be reached
                n = sum(len(block) for block in again.blocks(2**20, dtype="int16", frames=n))
        n_samples = n * SAMPLE_RATE // whole_rate(rate)
    if not FRAME_LENGTH <= n_samples < MAX_SAMPLES:
        raise InputError(f"has {n_samples / SAMPLE_RATE:.3f} s, not from 0.025 s to 37 hours")
    return n_samples


def reaches(file, frame: int) -> bool:
    """Whether a frame of an open soundfile.SoundFile can be read."""
    try:
        file.seek(frame)
        return len(file.read(1)) == 1
    except Exception:  # whatever libsndfile and its wrapper make of a damaged file
        return False


def printable(name: str) -> str:
    """A file's name in one line, its tabs and line breaks as in Python."""
    return name.translate({9: "\\t", 10: "\\n", 13: "\\r"})


def write_manifest(output: str, folder: str, files: list[tuple[Path, str]], missing: list[str] = ()) -> None:
    """Write a manifest of (file below `folder`, labels); what cannot be used goes to `output`.bad.

    Raises InputError if one of the two exists or no file can be used.
    """

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
    if "\n" in os.path.abspath(folder):
        raise InputError(f"the name of {folder!r} holds a line break: a manifest cannot hold it")
    with ThreadPoolExecutor() as pool:  # libsndfile works outside Python's lock
        rows = list(tqdm(pool.map(line, files), total=len(files), desc="scan", unit="file", disable=None))
    good, bad = ([row[i] for row in rows if row[i]] for i in (0, 1))
    bad += [f"{printable(name)}\tno such file" for name in missing]
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    if bad:
        write_lines(f"{output}.bad", bad)
    if not good:
        raise InputError(f"none of the {len(bad)} audio files below {folder} can be read: see {output}.bad")
    write_lines(output, [os.path.abspath(folder), *good])
    hours = sum(int(row.split("\t")[1]) for row in good) / SAMPLE_RATE / 3600
    left_out = f"; {len(bad)} left out, listed in {output}.bad" if bad else ""
    print(f"{output}: {len(good)} clips, {hours:.2f} h{left_out}")


def check_label(label: str) -> str:
    """The label, if it can stand in a manifest. Raises InputError."""
    if not label.strip() or "," in label:
        raise InputError(f"the class {label!r} is empty or holds a comma: rename it")
    return label


def scan(folder: str, output: str, labels: bool) -> None:
    """A manifest of every audio file below a folder, with --labels labelled by the folder that it lies in."""
    files = [(path, check_label(path.parent.name) if labels else "") for path in find_audio(folder)]
    if labels and (loose := [path for path, _ in files if path.parent == Path(folder)]):
        raise InputError(f"{loose[0]} lies in no folder below {folder} that could label it (--labels)")
    write_manifest(output, folder, files)


def released(source: str, output: str) -> None:
    """A manifest from the released code's .tsv, and .lbl beside it: ids and labels, a line for each clip."""
    try:
        root, *lines = os.fsdecode(Path(source).read_bytes()).split("\n")
        lbl = Path(source).with_suffix(".lbl")
        labels = os.fsdecode(lbl.read_bytes()).split("\n") if lbl.exists() else []
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    names = [line.rsplit(None, 1)[0] for line in lines if line.strip()]
    labels = [(line.split() + ["", ""])[1] for line in labels if line.strip()] or [""] * len(names)
    if len(labels) != len(names) or (lbl.exists() and not all(labels)):
        raise InputError(f"{lbl} must have one line 'id label,label' for each of the {len(names)} clips")
    root = os.path.join(os.path.dirname(source), root.strip())
    write_manifest(output, root, [(Path(root, name), own) for name, own in zip(names, labels)])


def stats(source: str, max_clips: int, workers: int) -> None:
    """Mean and std of the log-mel values, without padding, of max_clips clips spread over a manifest."""
    init_distributed()  # keeps freed memory
    data = AudioDataset(source)
    items = torch.linspace(0, len(data) - 1, max(1, min(max_clips, len(data)))).long().tolist()
    sums, n_bad = torch.zeros(3, dtype=torch.float64), 0
    loader = build_loader(data, [[item] for item in items], workers)
    for batch in tqdm(loader, desc="stats", unit="clip", disable=None):
        if batch.problems[0]:
            n_bad += 1
            continue
        spec = log_mel(batch.waveform[:, : batch.n_samples[0]]).double()
        sums += torch.stack([spec.sum(), spec.square().sum(), torch.tensor(spec.numel())])
    if not sums[2]:
        raise InputError(f"none of the {n_bad} clips of {source} can be read")
    mean = sums[0] / sums[2]
    std = (sums[1] / sums[2] - mean**2).sqrt()
    left_out = f"{len(items) - n_bad} clips, {n_bad} that cannot be read"
    print(f"--norm_mean {mean:.3f} --norm_std {std:.3f}    # {left_out}")


def pack(source: str, output: str, workers: int) -> None:
    """Decode a manifest's clips into one .pcm file, and list them in `output`.

    Started again, it goes on where it was: `output`.partial has a hash of the manifest, then a line for each
    of its clips that is done. Raises InputError if that was begun with another manifest.
    """
    if not output.endswith(".tsv") or os.path.exists(output):
        raise InputError(f"{output}: choose a new name that ends with .tsv")
    manifest, partial, pcm = Manifest(source), Path(f"{output}.partial"), Path(output).with_suffix(".pcm")
    if pcm.exists() and not partial.exists():
        raise InputError(f"{pcm} exists: remove it or choose another name")
    partial.touch(), pcm.touch()
    listed = os.fsencode(os.path.abspath(manifest.root)) + manifest.text.numpy().tobytes()
    digest = hashlib.sha256(listed).hexdigest()
    first, *done = read_lines(partial) or [digest]  # whole lines: the last may be half-written
    n_bytes = 2 * sum(int(line.split("\t")[1]) for line in done)
    if first != digest or os.path.getsize(pcm) < n_bytes:
        raise InputError(f"{partial} was begun with another manifest or .pcm: remove it and {pcm}")
    write_lines(partial, [digest, *done])
    with open(partial, "ab") as listing, open(pcm, "r+b") as samples:
        samples.seek(n_bytes)
        samples.truncate()
        rest, read = range(len(done), len(manifest.begins)), functools.partial(read_whole, manifest)
        loader = DataLoader(rest, None, num_workers=workers, collate_fn=read)
        for waveform, line in tqdm(loader, desc="pack", unit="clip", disable=None):
            samples.write(waveform.numpy().astype("<i2").tobytes())
            samples.flush()
            listing.write(os.fsencode(f"{line}\n"))
            listing.flush()
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


def read_whole(manifest: Manifest, i: int) -> tuple[Tensor, str]:
    """A whole file as int16, decoded in pieces to save memory; and its line of the listing."""
    (name, _, *labels), hop = manifest.fields(i), CLIP_FRAMES * FRAME_SHIFT
    try:
        pieces, gain = [], 1
        for piece in read_pieces(manifest.path(i), hop, hop):
            check_peak(piece, allow_silence=True)
            while piece.max() * 32768 >= 32767.5 * gain or piece.min() * 32768 < -32768.5 * gain:
                gain, pieces = 2 * gain, [(p / 2).round().to(torch.int16) for p in pieces]
            pieces.append((piece * (32768 / gain)).round().to(torch.int16))
        waveform = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int16)
        if len(waveform) < FRAME_LENGTH or not waveform.any():
            raise InputError("silent" if len(waveform) >= FRAME_LENGTH else "too short")
        more = labels[:1] if gain == 1 else ["".join(labels[:1]), str(gain)]
        return waveform, "\t".join([name, str(len(waveform)), *more])
    except InputError as error:
        return torch.empty(0, dtype=torch.int16), f"{name}\t0\t{error}"


def read_table(path: str | os.PathLike, **form) -> list[list[str]]:
    """Rows of a CSV without its lines that begin with '#'. Raises InputError if it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if not line.startswith("#"))
            return [row for row in csv.reader(lines, **form) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


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
    absent = {clip["filename"] for clip in clips if not (audio / clip["filename"]).is_file()}
    for fold in folds:
        for part in ("train", "test"):
            own = [(c["filename"], c["category"]) for c in clips if (c["fold"] == fold) == (part == "test")]
            files = [(audio / name, label) for name, label in own if name not in absent]
            missing = [name for name, _ in own if name in absent]
            write_manifest(f"{output}/{part}{fold}.tsv", str(audio), files, missing)


def speechcommands(folder: str, output: str) -> None:
    """Manifests of Speech Commands, a folder a word, split by validation_list.txt and testing_list.txt."""
    part_of = {}
    for part, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        rows = read_table(f"{folder}/{name}")
        part_of |= dict.fromkeys((row[0] for row in rows), part)
    files = dict(train=[], valid=[], test=[])
    for path in find_audio(folder):
        word, name = path.parent.name, path.relative_to(folder).as_posix()
        if name.count("/") == 1 and not word.startswith("_"):  # _background_noise_ is not a word
            files[part_of.pop(name, "train")].append((path, check_label(word)))
    for part in files:
        missing = [name for name, where in part_of.items() if where == part]
        write_manifest(f"{output}/{part}.tsv", folder, files[part], missing)


def audioset(segments: str, labels: str, folder: str, output: str) -> None:
    """A manifest of the clips of an AudioSet list (YTID, start, end, "label,label") that are below a folder.

    `labels` is class_labels_indices.csv; a clip's file is known by the 11 characters of its YTID at the
    beginning of the name, or behind a Y.
    """
    known, rows = read_classes(labels), read_table(segments, skipinitialspace=True)
    if not rows or any(len(row) < 4 for row in rows):
        raise InputError(f"{segments} is not a list of AudioSet segments: YTID, start, end, labels")
    by_id = {}
    for path in find_audio(folder):
        if len(path.stem) > 11 and path.stem[0] == "Y":
            by_id.setdefault(path.stem[1:12], path)
        if len(path.stem) == 11 or path.stem[11:12] in ("_", "-", "."):
            by_id[path.stem[:11]] = path
    for row in rows:
        if unknown := set(row[3].split(",")) - known.keys():
            what = f"{row[0]} has the label {min(unknown)!r}"
            raise InputError(f"{segments}: {what}, which {labels} does not list")
    files = [(by_id[row[0]], row[3]) for row in rows if row[0] in by_id]
    write_manifest(output, folder, files, [row[0] for row in rows if row[0] not in by_id])


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
            command.add_argument("--labels", action="store_true", help="label each file by its folder")
        if function is stats:
            command.add_argument("--max_clips", type=int, default=10_000)
        if function in (stats, pack):
            command.add_argument("--workers", type=int, default=os.cpu_count())
    args = vars(parser.parse_args())
    silence_libraries()
    del args["command"]
    args.pop("function")(**args)
    return 0


if __name__ == "__main__":
    run_script(main)
