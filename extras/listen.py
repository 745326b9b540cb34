"""What do files sound like? The likeliest classes, or an encoder's features; of any length, window by window.

    python extras/listen.py CKPT clip.mp3 folder/            a line a file: its three likeliest classes
    python extras/listen.py CKPT long.mp3 --timeline         what is heard when
    python extras/listen.py CKPT folder/ --features DIR      a .npz a file: cls, patches, frames, times
    python extras/listen.py CKPT x.tsv --features x.npz      a row a clip: features, labels, files

CKPT is what model.read_pretrained knows: a run folder, a .pt file, released weights.
"""

import argparse
import contextlib
import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    AUDIO_SUFFIXES, FRAME_LENGTH, FRAME_SHIFT, MAX_SAMPLES, SAMPLE_RATE, SILENCE, AudioDataset, Clip,
    InputError, check_peak, clip_samples, collate, open_audio, read_pieces, silence_libraries, spectrogram,
    whole_rate,
)  # fmt: skip
from evaluate import (  # noqa: E402
    POOLINGS, init_distributed, load_classifier, pooled, predict, run_script, tokens_after,
)  # fmt: skip
from model import AudioClassifier, Encoder, ModelConfig  # noqa: E402

# Of MPEG audio: kbit/s by the four bits in a frame's header, in MPEG 1 and in MPEG 2 and 2.5, each by layer;
# and by the two bits of the version what divides its rate
KBITS = {
    1: range(32, 449, 32), 2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}  # fmt: skip
KBITS_2 = {1: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)}
KBITS_2[2] = KBITS_2[3] = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
DIVISORS = {3: 1, 2: 2, 0: 4}


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
        for path in (os.path.join(where, name) for name in names if not os.path.splitext(name)[1]):
            if not os.path.exists(path):  # it may have been a folder
                warn(FileNotFoundError(2, "a link to nothing", path))
    if not paths:
        raise InputError(f"no audio files below {folder} (looked for {' '.join(sorted(AUDIO_SUFFIXES))})")
    return sorted(paths)


def mpeg_samples(path: str | os.PathLike, layer: int = 3) -> int:
    """Samples that an mp3 holds, by the headers of its frames: the length it claims is often an estimate."""
    data = Path(path).read_bytes()
    size = data[6:10] if data[:3] == b"ID3" else b""
    at, n_samples = (10 if size else 0) + sum(byte << 7 * (3 - i) for i, byte in enumerate(size)), 0
    while 0 <= at <= len(data) - 4:
        head = int.from_bytes(data[at : at + 4], "big")
        version, kind, bits, rate = head >> 19 & 3, 4 - (head >> 17 & 3), head >> 12 & 15, head >> 10 & 3
        if head >> 21 != 0x7FF or version == 1 or kind != layer or bits in (0, 15) or rate == 3:
            at = data.find(b"\xff", at + 1)  # no frame: look for the next
            continue
        hz, slot = (44_100, 48_000, 32_000)[rate] // DIVISORS[version], 4 if layer == 1 else 1
        length = 384 if layer == 1 else 576 if layer == 3 and version < 3 else 1152
        n_samples += length
        kbits = (KBITS if version == 3 else KBITS_2)[layer][bits - 1]
        at += (length // 8 * 1000 * kbits // hz // slot + (head >> 9 & 1)) * slot
    return n_samples


def part_beyond(path: str | os.PathLike, form: str) -> float:
    """What follows the chunks of a container and is none, as a part of the sound that it claims: sound that
    the header leaves out, because its size wrapped at 4 GiB, or was not brought up to date."""
    start, head = {"AIFF": (12, ">4sI"), "CAF": (8, ">4sQ")}.get(form, (12, "<4sI"))
    size, at, sound, long = os.path.getsize(path), start, 0, 0
    with open(path, "rb") as file:
        if form == "AU":
            at, sound = struct.unpack(">4xII", file.read(12))
            at += sound
        while form != "AU" and at + struct.calcsize(head) <= size:
            file.seek(at)
            name, length = struct.unpack(head, file.read(struct.calcsize(head)))
            if form == "RF64" and name == b"ds64":
                long = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
            length = long if long and length == 2**32 - 1 else length
            end = at + struct.calcsize(head) + length
            if not all(32 <= byte < 127 for byte in name) or name in (b"RIFF", b"FORM") or end > size:
                break
            sound += length * (name in (b"data", b"SSND"))
            at = end + (length % 2 if form != "CAF" else 0)
    return max(0, size - at) / sound if sound else 0.0


def count_samples(path: str | os.PathLike) -> int:
    """Samples at 16 kHz that can be read from a file, which may claim more. Raises InputError if it cannot
    be used, or holds more than it claims: that would be lost, because libsndfile stops there."""
    with open_audio(path) as file:
        n, rate, held = file.frames, file.samplerate, file.frames
        if file.format == "MP3":
            held = mpeg_samples(path, file.subtype.count("I"))  # MPEG_LAYER_III
        elif file.format in ("WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF"):
            held += round(n * part_beyond(path, file.format))
        if held > n * 1.02 + rate / 2:
            raise InputError(f"claims {n / rate:.1f} s and holds {held / rate:.1f} s: convert it")
        n = min(n, held)
        if n >= MAX_SAMPLES * rate / SAMPLE_RATE:
            raise InputError(f"claims {n / rate / 3600:.0f} hours: its header is wrong, convert it")
        n_samples = n * SAMPLE_RATE // whole_rate(rate)
        if not reaches(file, n - 1):  # read it, then
            n_samples = min(n_samples, sum(map(len, read_pieces(path, 2**17, 2**17))))
    if n_samples < FRAME_LENGTH:
        raise InputError(f"too short: {n_samples / SAMPLE_RATE:.3f} s, a frame has 0.025 s")
    return n_samples


def reaches(file, frame: int) -> bool:
    """Whether a frame of an open soundfile.SoundFile can be read."""
    try:
        file.seek(frame)
        return len(file.read(1)) == 1
    except Exception:  # whatever libsndfile and its wrapper make of a damaged file
        return False


class Window(NamedTuple):
    """A part of a file as long as the network's clip, and what the network makes of it."""

    begin: float  # seconds
    end: float  # of the sound; what follows is padding
    output: np.ndarray | None  # None: silence


@torch.no_grad()
def hear(
    function: Callable[[Tensor], Tensor], path: Path, config: ModelConfig, device: torch.device,
    batch_size: int = 16,
) -> tuple[list[Window], str]:  # fmt: skip
    """Apply `function`, (B, 1, F, M) -> (B, ...), to the windows of a file, side by side, the last as long as
    there is sound: (windows, what is wrong with the file or ""). Of a long file only a batch is in memory."""
    width, hop = clip_samples(config.clip_frames), config.clip_frames * FRAME_SHIFT
    pieces, waiting, windows, problem, at_end = read_pieces(path, width, hop), [], [], "", False
    form = dict(unit="s", delay=2, leave=False, disable=None)
    bar = tqdm(total=round(claimed_seconds(path)), desc=path.name, **form)
    while not at_end:
        try:
            piece = next(pieces)
            check_peak(piece, allow_silence=True)
            is_first = not windows and not waiting
            if len(piece) >= (FRAME_LENGTH if is_first else config.patch_size * FRAME_SHIFT):
                waiting.append(Clip(piece, 0, ""))
        except (StopIteration, InputError) as error:
            at_end, problem = True, str(error)
        if waiting and (at_end or len(waiting) == batch_size):
            waveform, n_samples, *_ = collate(waiting, config.clip_frames)
            spec = spectrogram(waveform.to(device), n_samples.to(device), config.norm_mean, config.norm_std)
            for clip, output in zip(waiting, function(spec).float().cpu().numpy()):
                begin, is_silent = len(windows) * hop, clip.waveform.abs().max() < SILENCE
                ends = (begin / SAMPLE_RATE, (begin + len(clip.waveform)) / SAMPLE_RATE)
                windows.append(Window(*ends, None if is_silent else output))
            waiting = []
            bar.update(round(windows[-1].end) - bar.n)
    bar.close()
    if all(window.output is None for window in windows):
        return [], problem or ("silent" if windows else "too short")
    if not problem:
        try:
            count_samples(path)
        except InputError as error:  # it holds more than can be read
            return windows, str(error)
    return windows, problem and f"{problem} (after {clock(windows[-1].end)})"


def claimed_seconds(path: Path) -> float:
    """Length of a file as it says itself, 0 if it cannot be read."""
    try:
        with open_audio(path) as file:
            return file.frames / file.samplerate
    except InputError:
        return 0.0


def clock(seconds: float) -> str:
    """Seconds as 2:03.4 or 1:02:03.4."""
    minutes, seconds = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"


def tag(model: AudioClassifier, path: Path, device: torch.device, top_k: int = 5) -> dict:
    """The likeliest classes of a file and, if it has several, of its windows, for JSON: file, error, seconds,
    top {name: probability}, windows [{start, end, top}], where top is None in silence."""
    names, count = list(model.classes.values()), Counter(model.classes.values())
    names = [f"{name} ({label})" if count[name] > 1 else name for label, name in model.classes.items()]

    def top(p: np.ndarray | None) -> dict[str, float] | None:
        best = () if p is None else np.argsort(-p, kind="stable")[:top_k]
        return {names[i]: float(p[i]) for i in best} or None

    windows, problem = hear(lambda spec: model.probabilities(model(spec)), path, model.config, device)
    record = dict(file=str(path)) | (dict(error=problem) if problem else {})
    if heard := [window for window in windows if window.output is not None]:
        seconds = [window.end - window.begin for window in heard]
        mean = np.average([window.output for window in heard], axis=0, weights=seconds)
        record |= dict(seconds=round(windows[-1].end, 2), top=top(mean))
    if len(windows) > 1:
        record["windows"] = [dict(start=w.begin, end=w.end, top=top(w.output)) for w in windows]
    return record


def in_words(record: dict, timeline: bool) -> str:
    """What `tag` returns, for people: a line and, with `timeline`, one for each stretch of like windows."""
    best = ", ".join(f"{name} {p:.2f}" for name, p in list(record.get("top", {}).items())[:3])
    problem = f"not usable: {record['error']}" if "error" in record else ""
    if best and problem:
        problem = f"(heard in part: {record['error']})"
    lines = ["  ".join(filter(None, (record["file"], best, problem)))]
    stretches = []
    for window in record.get("windows", []) if timeline else []:
        name, p = next(iter((window["top"] or {"silence": 1.0}).items()))
        for before in stretches[-1:]:
            before["end"] = window["start"]  # a window's last frame reaches a little into the next
        if not stretches or stretches[-1]["name"] != name:
            stretches.append(dict(name=name, start=window["start"], scores=[]))
        stretches[-1].update(end=window["end"], scores=[*stretches[-1]["scores"], p])
    for s in stretches:
        span = f"{clock(s['start'])} to {clock(s['end'])}"
        lines.append(f"    {span:20s}  {s['name']} {sum(s['scores']) / len(s['scores']):.2f}")
    return "\n".join(lines)


def features(
    encode: Callable[[Tensor], Tensor], path: Path, config: ModelConfig, device: torch.device
) -> tuple[dict[str, np.ndarray], str]:
    """Tokens of a file by time, without padding, and what is wrong with the file or "".

    cls (windows, D) and cls_times (windows, 2), seconds from and to; patches (frames, bands, D); frames
    (frames, D), their mean over bands; and times (frames,), seconds at the middle of each frame of 160 ms.
    """
    windows, problem = hear(encode, path, config, device)
    parts, width = dict(cls=[], cls_times=[], patches=[], times=[]), config.patch_size * FRAME_SHIFT
    for begin, end, tokens in windows:
        if tokens is not None:
            n_frames = 1 + (round((end - begin) * SAMPLE_RATE) - FRAME_LENGTH) // FRAME_SHIFT
            n = max(1, n_frames // config.patch_size)
            parts["cls"].append(tokens[:1])                                                  # (1, D)
            parts["cls_times"].append([[begin, end]])                                        # (1, 2)
            patches = tokens[1:].reshape(-1, config.grid(0)[1], config.width)                # (H, W, D)
            parts["patches"].append(patches[:n])                                             # (n, W, D)
            parts["times"].append(begin + (np.arange(n) + 0.5) * width / SAMPLE_RATE)        # (n,)
    arrays = {name: np.concatenate(part) for name, part in parts.items() if part}
    return arrays | (dict(frames=arrays["patches"].mean(1)) if arrays else {}), problem


def places_of_features(output: str, files: list[tuple[Path, Path]]) -> list[Path]:
    """Where the features of each file go: DIR/name.npz, or of one file the .npz itself. Raises InputError."""
    if Path(output).suffix not in ("", ".npz"):
        raise InputError(f"{output}: features are written as .npz, or into a folder")
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise InputError(f"{output} exists: remove it or choose another name")
    if output.endswith(".npz") and len(files) > 1:
        raise InputError(f"{output} is for one file: name a folder for the features of {len(files)}")
    if output.endswith(".npz"):
        return [Path(output)]
    names = [path.relative_to(root) for path, root in files]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{twice[0]} is there twice: give the folder above, or one after the other")
    return [Path(output, f"{name}.npz") for name in names]


@contextlib.contextmanager
def written(path: Path) -> Iterator:
    """A file to write to, which has its name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_manifest_features(args: argparse.Namespace, encoder: Encoder, device: torch.device) -> int:
    """Write the features of a manifest's clips, as the probes see them; returns the exit status."""
    data = AudioDataset(args.inputs[0], encoder.config.clip_frames, segments=False, allow_silence=True)
    function = pooled(encoder, args.pooling, args.block)
    with written(Path(args.features)) as file:  # what cannot be written is told before the work
        found = predict(function, data, encoder.config, device, args.workers)
        items = found.items.tolist()
        arrays = dict(labels=[",".join(data.labels(i)) for i in items], files=[data.name(i) for i in items])
        np.savez(file, features=found.values.numpy(), **{k: np.array(v) for k, v in arrays.items()})
    for problem in found.problems:
        print(f"cannot be used: {problem.expandtabs(1)}", file=sys.stderr)
    n_bad = len(found.problems) + len(data.too_short)
    print(f"{args.features}: features {tuple(found.values.shape)}; {n_bad} clips cannot be used")
    if data.n_cut:
        print(f"{data.n_cut} clips are longer than {data.n_frames} frames: features are of their beginning")
    return 0


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("inputs", nargs="+", help="audio files and folders; for features also a manifest")
    parser.add_argument("--classes", default="", help="their names: class_labels_indices.csv, or one a line")
    parser.add_argument("--timeline", action="store_true", help="also print what is heard when")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each file")
    parser.add_argument("--top_k", type=int, default=5, help="classes for a file or window in JSON")
    parser.add_argument("--features", default="", help="write features into this folder or .npz")
    parser.add_argument("--block", type=int, default=0, help="of the features, from 1 on; 0 = 7/12 of all")
    parser.add_argument("--pooling", choices=POOLINGS, default=POOLINGS[0], help="of a manifest's features")
    parser.add_argument("--workers", type=int, default=4, help="loader processes for a manifest")
    parser.add_argument("--teacher", action="store_true", help="features of a pre-training run's teacher")
    args = parser.parse_args()
    _, world, device = init_distributed()
    if world > 1 or args.top_k < 1:
        raise InputError("this needs one process, without torchrun, and a --top_k above 0")
    is_manifest = args.features and args.inputs[0].endswith(".tsv")
    if is_manifest and (len(args.inputs) > 1 or not args.features.endswith(".npz")):
        raise InputError("the features of a manifest, one at a time, go into one .npz")
    files = [  # and the folder that names each
        (path, root if root.is_dir() else path.parent)
        for root in map(Path, args.inputs) for path in (find_audio(root) if root.is_dir() else [root])
    ]  # fmt: skip
    n_good, places = 0, places_of_features(args.features, files) if args.features else [None] * len(files)
    if args.features:
        encoder = Encoder.from_pretrained(args.checkpoint, args.teacher).to(device)
        encode = tokens_after(encoder, args.block)
    else:
        model = load_classifier(args.checkpoint, args.classes).to(device)
    if is_manifest:
        return write_manifest_features(args, encoder, device)
    for (path, _), place in tqdm([*zip(files, places)], disable=len(files) == 1 or None, leave=False):
        if args.features:
            arrays, problem = features(encode, path, encoder.config, device)
            if arrays:
                with written(place) as file:
                    np.savez(file, **arrays)
            n_good += bool(arrays)
            if problem:
                tqdm.write(f"{path} cannot be used: {problem}", file=sys.stderr)
        else:
            record = tag(model, path, device, args.top_k)
            n_good += "top" in record
            tqdm.write(json.dumps(record) if args.json else in_words(record, args.timeline))
    summary = f"{len(files)} files, {len(files) - n_good} not usable"
    if args.features:
        print(f"{args.features}: features of {summary}")
    elif len(files) > 1:
        print(summary, file=sys.stderr)
    return int(n_good == 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe (| head) ends it without a word
    silence_libraries()
    run_script(main)
