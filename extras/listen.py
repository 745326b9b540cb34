"""What do files sound like? The likeliest classes, or an encoder's features; of any length, window by window.

    python extras/listen.py CKPT clip.mp3 folder/            one line per file: its three likeliest classes
    python extras/listen.py CKPT long.mp3 --timeline         what is heard when
    python extras/listen.py CKPT folder/ --csv > found.csv   detections: file, start, end, class, probability
    python extras/listen.py CKPT folder/ --features DIR      one .npz per file: cls, patches, frames, times
    python extras/listen.py CKPT x.tsv --features x.npz      one row per clip: features, labels, files

CKPT is what model.read_pretrained knows: a run folder, a .pt file, released weights. Windows are as long as
the network's clips and lie side by side, but for tags the last ends with the file; with --hop 0.5 one begins
every half second, and --timeline and --csv mark changes as finely. Silent windows have no class. Only windows
that contain damage are lost. A job that writes features can be stopped and resumed: the same command skips
finished files.
"""

import argparse
import csv
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, SILENCE, Clip, InputError, check_peak, clip_samples, collate,
    spectrogram,
)  # fmt: skip
from evaluate import PROBE_POOLINGS, Parser, init_distributed, run_script  # noqa: E402
from extras.features import (  # noqa: E402
    Rows, collect_tokens, settings_of, summarize, tell_problem, write_features, write_manifest_features,
)  # fmt: skip
from extras.media import claimed_seconds, find_audio, stream  # noqa: E402
from extras.tables import load_classifier  # noqa: E402
from model import AudioClassifier, Encoder, ModelConfig  # noqa: E402

SHORTEST_HOP = 0.01  # seconds: a frame
BATCH_FRAMES = 4096  # 10-ms frames in a batch: more takes memory and is no faster


# ----- Windows ---------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of a file as long as the network's clip, and what the network makes of it.
    A window of zero length tells what is wrong with the file as a whole."""

    begin: float  # seconds
    end: float  # of the sound; what follows is padding
    output: np.ndarray | None  # None: silence, or a problem
    problem: str  # why it could not be heard, or ""


class Piece(NamedTuple):
    """The sound of a window that has not been heard yet."""

    begin: int  # in samples
    waveform: Tensor  # (S,)
    problem: str


def cut_into_pieces(path: Path, config: ModelConfig, hop: int, full: bool) -> Iterator[Piece]:
    """The windows of a file, one every `hop` samples; the last is the first to reach the end of the file, of
    which less than a patch may be left out. To be `full`, the last begins earlier, unless it is the only one
    or that sound is damaged. What is wrong with the file as a whole comes last, without sound."""
    patch = config.patch_size * FRAME_SHIFT
    width = clip_samples(config.clip_frames)
    begin = 0
    end = 0  # of the windows so far
    before = torch.empty(0)  # the sound of the last one, if it is good
    try:
        for waveform, problem in stream(path, width, hop):
            reach = begin + len(waveform)
            if not len(waveform):
                yield Piece(end, waveform, problem)
            elif begin == 0 and len(waveform) < FRAME_LENGTH:
                raise InputError(f"too short: {len(waveform) / SAMPLE_RATE:.3f} s, a frame has 0.025 s")
            elif begin == 0 or (len(waveform) >= patch and reach > end):
                problem = problem or find_problem(waveform)
                missing = width - len(waveform)
                if full and missing and len(before) and not problem:
                    waveform = torch.cat([before[hop - missing : hop], waveform])
                yield Piece(reach - len(waveform), waveform, problem)
                end = reach
                before = waveform[:0] if problem else waveform
            begin += hop
        if begin == 0:
            raise InputError("too short: it holds no sound")
    except InputError as error:
        yield Piece(end, torch.empty(0), str(error))


def find_problem(waveform: Tensor) -> str:
    """Why this is no audio, or ""."""
    try:
        check_peak(waveform, allow_silence=True)
    except InputError as error:
        return str(error)
    return ""


def is_silent(waveform: Tensor) -> bool:
    """Whether it is silent without its mean, which the network does not see."""
    return bool((waveform - waveform.mean()).abs().max() < SILENCE)


def apply(
    function: Callable[[Tensor], Tensor], pieces: list[Piece], config: ModelConfig, device: torch.device
) -> Iterator[Window]:
    """What the network makes of a batch. Raises InputError if that is not finite."""
    outputs = {}
    heard = []
    for i, piece in enumerate(pieces):
        if len(piece.waveform) and not piece.problem and not is_silent(piece.waveform):
            heard.append(i)
    if heard:
        clips = [Clip(pieces[i].waveform, i, "") for i in heard]
        batch = collate(clips, config.clip_frames)
        n_samples = batch.n_samples.to(device)
        spec = spectrogram(batch.waveform.to(device), n_samples, config.norm_mean, config.norm_std)
        values = function(spec).float().cpu().numpy()
        if not np.isfinite(values).all():
            raise InputError("the network's outputs are not finite: its training has diverged")
        outputs = dict(zip(heard, values))
    for i, piece in enumerate(pieces):
        end = piece.begin + len(piece.waveform)
        yield Window(piece.begin / SAMPLE_RATE, end / SAMPLE_RATE, outputs.get(i), piece.problem)


@torch.no_grad()
def hear(
    function: Callable[[Tensor], Tensor], path: Path, config: ModelConfig, device: torch.device,
    hop: float = 0.0, batch_size: int = 0, full: bool = False,
) -> Iterator[Window]:  # fmt: skip
    """Apply `function`, (B, 1, F, M) -> (B, ...), to the windows of a file, one every `hop` seconds or, by
    default, side by side; `full` makes the last as long as the others. Only a batch is in memory. Silent
    windows and those with a problem have no output. What is wrong with the file as a whole comes last, as a
    window without length, which is the only one if the file cannot be read. Raises InputError if outputs are
    not finite."""
    batch_size = batch_size or max(1, BATCH_FRAMES // config.clip_frames)
    batch = []
    form = dict(unit="s", delay=2, leave=False, disable=None)
    with tqdm(desc=path.name, total=round(claimed_seconds(path)), **form) as bar:
        for piece in cut_into_pieces(path, config, hop_samples(config, hop), full):
            batch.append(piece)
            if len(batch) == batch_size:
                yield from apply(function, batch, config, device)
                bar.update(piece.begin // SAMPLE_RATE - bar.n)
                batch = []
        yield from apply(function, batch, config, device)


def hop_samples(config: ModelConfig, hop: float) -> int:
    """Samples from one window to the next. Raises InputError if some would be left out."""
    side_by_side = config.clip_frames * FRAME_SHIFT
    longest = side_by_side / SAMPLE_RATE
    if hop and not SHORTEST_HOP <= hop <= longest:
        raise InputError(f"--hop {hop}: choose {SHORTEST_HOP} to {longest} s, the length of a window")
    return round(hop * SAMPLE_RATE) or side_by_side


class Report:
    """What is wrong with a file, collected from its windows."""

    def __init__(self):
        self.n_windows = 0
        self.n_heard = 0
        self.n_damaged = 0
        self.first_damage = ""
        self.whole = ""  # what is wrong with the file as a whole
        self.seconds = 0.0  # length of what was read

    def follow(self, windows: Iterable[Window]) -> Iterator[Window]:
        """Pass on the windows that have a length, and count them."""
        for window in windows:
            if window.begin == window.end:
                self.whole = window.problem
                continue
            self.n_windows += 1
            self.n_heard += window.output is not None
            self.seconds = window.end
            if window.problem:
                self.n_damaged += 1
                self.first_damage = self.first_damage or window.problem
            yield window

    def problem(self) -> str:
        """What is wrong, in one line, or ""; valid once all windows have been followed."""
        said = []
        if self.n_damaged:
            said.append(f"{self.first_damage} ({self.n_damaged} of {self.n_windows} windows not heard)")
        elif self.n_windows and not self.n_heard:
            said.append("silent")
        if self.whole:
            said.append(self.whole)
        return "; ".join(said)


# ----- Tags ------------------------------------------------------------------------------------------------


def name_classes(model: AudioClassifier) -> list[str]:
    """Names of the outputs; where several share one, with their labels."""
    count = Counter(model.classes.values())
    names = []
    for label, name in model.classes.items():
        if count[name] > 1:
            name = f"{name} ({label})"
        names.append(name)
    return names


def hear_classes(model: AudioClassifier, path: Path, device: torch.device, hop: float) -> Iterator[Window]:
    """The windows of a file with the probabilities of a classifier, (C,)."""

    def probabilities(spec: Tensor) -> Tensor:
        return model.probabilities(model(spec))

    return hear(probabilities, path, model.config, device, hop, full=True)


def stretches(windows: Iterable[tuple], config: ModelConfig) -> Iterator[tuple]:
    """The time that each window stands for, up to half-way from its middle to that of the next:
    (begin, end, window) in seconds -> (start, end, window)."""
    clip = config.clip_frames * FRAME_SHIFT / SAMPLE_RATE
    start = 0.0
    end = 0.0
    last_begin = 0.0
    before = None
    for begin, next_end, window in windows:
        if before is not None:
            half_way = (last_begin + begin + clip) / 2
            yield start, half_way, before
            start = half_way
        before = window
        last_begin = begin
        end = next_end
    if before is not None:
        yield start, end, before


def tag(model: AudioClassifier, path: Path, device: torch.device, top_k: int = 5, hop: float = 0.0) -> dict:
    """The likeliest classes of a file and, if it has several, of its windows, for JSON: file, error, remark,
    seconds, top {name: probability}, windows [{start, end, top, error}]. There is no top if the file cannot
    be used; that of a window is None in silence and, with an error, if it cannot be heard."""
    names = name_classes(model)
    total = np.zeros(len(names))
    total_seconds = 0.0
    windows = []
    report = Report()
    heard = report.follow(hear_classes(model, path, device, hop))
    parts = ((window.begin, window.end, window) for window in heard)
    for start, end, window in stretches(parts, model.config):
        entry = dict(start=window.begin, end=window.end, top=None)
        if window.problem:
            entry["error"] = window.problem
        if window.output is not None:
            entry["top"] = pick_top(window.output, names, top_k)
            total += window.output * (end - start)  # windows may overlap
            total_seconds += end - start
        windows.append(entry)
    record = dict(file=str(path))
    problem = report.problem()
    if problem:
        record["error"] = problem
    if report.n_heard:
        patch = clip_samples(model.config.patch_size) / SAMPLE_RATE
        if report.seconds < patch:
            record["remark"] = f"only {report.seconds:.3f} s: less than a patch of {patch:.3f} s"
        record["seconds"] = round(report.seconds, 2)
        record["top"] = pick_top(total / total_seconds, names, top_k)
    if len(windows) > 1:
        record["windows"] = windows
    return record


def pick_top(p: np.ndarray, names: list[str], top_k: int) -> dict[str, float]:
    """The likeliest classes, the first the likeliest."""
    best = np.argsort(-p, kind="stable")[:top_k]
    return {names[i]: float(p[i]) for i in best}


def clock(seconds: float) -> str:
    """Seconds as 2:03.4 or 1:02:03.4."""
    minutes, seconds = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:04.1f}"
    return f"{minutes}:{seconds:04.1f}"


def in_words(record: dict) -> str:
    """What `tag` returns, in a line for people."""
    parts = [record["file"]]
    if "top" in record:
        best = list(record["top"].items())[:3]
        parts.append(", ".join(f"{name} {p:.2f}" for name, p in best))
        if "error" in record:
            parts.append(f"(heard in part: {record['error']})")
    else:
        parts.append(f"not usable: {record['error']}")
    if "remark" in record:
        parts.append(f"({record['remark']})")
    return "  ".join(parts)


class Stretch:
    """A stretch of time in which the same is heard, window after window."""

    def __init__(self, name: str, start: float):
        self.name = name
        self.start = start  # seconds
        self.end = start
        self.total = 0.0  # of the probabilities
        self.n_windows = 0

    def add(self, end: float, probability: float) -> None:
        """Go on to `end` with another window."""
        self.end = end
        self.total += probability
        self.n_windows += 1

    def probability(self) -> float:
        """The mean of its windows; nan where nothing could be heard."""
        return self.total / self.n_windows


def find_likeliest(windows: list[dict], config: ModelConfig) -> list[Stretch]:
    """The stretches of a file in which the likeliest class is the same, from the windows of `tag`."""
    found = []
    parts = [(window["start"], window["end"], window) for window in windows]
    for start, end, window in stretches(parts, config):
        name = "silence"
        p = 1.0
        if "error" in window:
            name = f"not heard: {window['error']}"
            p = math.nan
        elif window["top"]:
            name, p = next(iter(window["top"].items()))
        if not found or found[-1].name != name:
            found.append(Stretch(name, start))
        found[-1].add(end, p)
    return found


def detect(
    model: AudioClassifier, path: Path, device: torch.device, threshold: float, hop: float = 0.0
) -> tuple[list[Stretch], Report]:
    """The stretches of a file in which the probability of a class is above the threshold, by their start."""
    names = name_classes(model)
    report = Report()
    windows = report.follow(hear_classes(model, path, device, hop))
    parts = ((window.begin, window.end, window) for window in windows)
    found = []
    going_on = {}  # class -> its stretch
    for start, end, window in stretches(parts, model.config):
        above = []
        if window.output is not None:
            above = np.flatnonzero(window.output > threshold).tolist()
        going_on = {i: going_on[i] for i in above if i in going_on}
        for i in above:
            if i not in going_on:
                going_on[i] = Stretch(names[i], start)
                found.append(going_on[i])
            going_on[i].add(end, float(window.output[i]))
    return found, report


# ----- Command line ----------------------------------------------------------------------------------------


def read_command_line() -> argparse.Namespace:
    """The flags. Raises InputError for those that have no effect together."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("inputs", nargs="+", help="audio files and folders; for features also a manifest")
    tags = parser.add_argument_group("tags")
    tags.add_argument("--classes", default="", help="their names: class_labels_indices.csv, or one a line")
    tags.add_argument("--hop", type=float, default=0, help="seconds between windows; 0 = side by side")
    tags.add_argument("--timeline", action="store_true", help="also print what is heard when")
    tags.add_argument("--json", action="store_true", help="print JSON, a line for each file")
    tags.add_argument("--top_k", type=int, default=5, help="classes for a file or window in JSON")
    tags.add_argument("--csv", action="store_true", help="print a table of what is heard above --threshold")
    tags.add_argument("--audacity", action="store_true", help="the same for one file, as labels for Audacity")
    tags.add_argument("--threshold", type=float, help="least probability of a detection; default 0.5")
    features = parser.add_argument_group("features")
    features.add_argument("--features", default="", help="write features into this folder or .npz")
    features.add_argument("--block", type=int, default=0, help="block to use; 0 = at 7/12 of the depth")
    features.add_argument("--teacher", action="store_true", help="use a pre-training run's teacher")
    features.add_argument("--pooling", choices=PROBE_POOLINGS, default="bands", help="of a manifest's clips")
    features.add_argument("--workers", type=int, default=4, help="loader threads for a manifest")
    args = parser.parse_args()
    if args.top_k < 1:
        raise InputError("--top_k must be above 0")
    forms = [args.timeline or args.json, args.csv, args.audacity, bool(args.features)]
    if sum(forms) > 1:
        raise InputError("--timeline or --json, --csv, --audacity and --features: choose one")
    if args.threshold is not None and not (args.csv or args.audacity):
        raise InputError("--threshold is for --csv and --audacity")
    if args.features and (args.hop or args.classes):
        raise InputError("--hop and --classes are for tags, not for --features")
    if not args.features and (args.block or args.teacher):
        raise InputError("--block and --teacher are for --features")
    return args


def find_files(inputs: list[str]) -> list[tuple[Path, Path]]:
    """The audio files of the command line, each with the folder from which it is named. Raises InputError."""
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += [(found, path) for found in find_audio(path)]
        elif path.suffix == ".tsv":
            use = "is for --features X.npz, alone, and for evaluate.py"
            raise InputError(f"{path}: a manifest {use}; for tags name the files or their folder")
        else:
            files.append((path, path.parent))
    return files


def print_detections(
    args: argparse.Namespace, model: AudioClassifier, path: Path, device: torch.device
) -> bool:
    """Print a table of what is heard in a file; returns whether it can be used."""
    threshold = args.threshold
    if threshold is None:
        threshold = 0.5
    found, report = detect(model, path, device, threshold, args.hop)
    table = csv.writer(sys.stdout, lineterminator="\n")
    with tqdm.external_write_mode():
        for part in found:
            p = part.probability()
            if args.audacity:
                print(f"{part.start:.3f}\t{part.end:.3f}\t{part.name} {p:.2f}")
            else:
                table.writerow([path, f"{part.start:.3f}", f"{part.end:.3f}", part.name, f"{p:.4f}"])
    is_good = report.n_heard > 0
    tell_problem(path, report.problem(), is_good)
    return is_good


def print_tags(args: argparse.Namespace, model: AudioClassifier, path: Path, device: torch.device) -> bool:
    """Print what is heard in a file; returns whether it can be used."""
    record = tag(model, path, device, args.top_k, args.hop)
    if args.json:
        tqdm.write(json.dumps(record, ensure_ascii=False))
        return "top" in record
    tqdm.write(in_words(record))
    if args.timeline:
        for part in find_likeliest(record.get("windows", []), model.config):
            span = f"{clock(part.start)} to {clock(part.end)}"
            p = f"{part.probability():.2f}".removesuffix("nan")
            tqdm.write(f"    {span:20s}  {part.name} {p}".rstrip())
    return "top" in record


def print_all(args: argparse.Namespace, device: torch.device) -> int:
    """Print what is heard in all files; returns the exit status."""
    files = find_files(args.inputs)
    if args.audacity and len(files) > 1:
        raise InputError(f"Audacity's labels are of one recording: name one file, not {len(files)}")
    model = load_classifier(args.checkpoint, args.classes).to(device)
    hop_samples(model.config, args.hop)  # tells what is wrong with it
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if args.csv:
        print("file,start,end,class,probability")
    print_one = print_tags
    if args.csv or args.audacity:
        print_one = print_detections
    n_good = 0
    for path, _ in tqdm(files, disable=len(files) == 1 or None, leave=False):
        n_good += print_one(args, model, path, device)
    if len(files) > 1:
        print(summarize(len(files), len(files) - n_good), file=sys.stderr)
    return int(n_good == 0)


def write_all_features(args: argparse.Namespace, device: torch.device) -> int:
    """Write the features of files or of a manifest; returns the exit status."""
    encoder = Encoder.from_pretrained(args.checkpoint, args.teacher).to(device)
    if args.inputs[0].endswith(".tsv"):
        if len(args.inputs) > 1 or not args.features.endswith(".npz"):
            raise InputError("the features of a manifest, one at a time, go into one .npz")
        return write_manifest_features(args, encoder, device)
    settings = settings_of(encoder, args.block)

    def encode(spec: Tensor) -> Tensor:
        return encoder(spec, n_blocks=settings["block"])

    def collect(path: Path, folder: Path) -> tuple[dict[str, Rows], str]:
        report = Report()
        windows = report.follow(hear(encode, path, encoder.config, device))
        arrays = collect_tokens(windows, encoder.config, folder)
        return arrays, report.problem()

    return write_features(args.features, find_files(args.inputs), settings, collect)


def main() -> int:
    """Do what the command line says; returns the exit status."""
    args = read_command_line()
    _, _, device = init_distributed(alone=True)
    if args.features:
        return write_all_features(args, device)
    return print_all(args, device)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written is removed
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe (| head) ends it without a word
    run_script(main)
