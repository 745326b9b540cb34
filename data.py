"""Audio files in, normalised log-mel spectrograms out.

    read_pieces    a file of any format and rate -> pieces of 16 kHz mono; load_audio: one of them
    log_mel        waveform -> Kaldi's log-mel filterbank, on whole batches, on any device
    spectrogram    padded clips -> the model's input
    AudioDataset   a manifest's clips, in pieces; another clip stands in for one that cannot be read
    ClipSampler    which clips an update uses: the same for any number of processes, from any update on

**Manifest**: line 1 is the folder that paths are relative to (itself absolute or relative to the manifest);
then a line for each clip, path<TAB>n_samples[<TAB>label,label...], with n_samples counted at 16 kHz.

**Packed**: line 1 is a .pcm file that holds the clips in that order, end to end, as 16 kHz mono little-endian
int16, of clips above full scale divided by a gain, their fourth column. extras/prepare.py writes both.

Only `resample` needs torchaudio, only reading files needs soundfile. Citations such as
data/raw_audio_dataset.py:399 point into the released code (github.com/cwx-worst-one/EAT at 06c1c34).
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SAMPLE_RATE = 16_000
FRAME_LENGTH, FRAME_SHIFT = 400, 160  # 25 ms, 10 ms
FFT_SIZE, MEL_BINS, MEL_LOW, MEL_HIGH = 512, 128, 20.0, SAMPLE_RATE / 2
PREEMPHASIS, LOG_FLOOR = 0.97, torch.finfo(torch.float32).eps  # silence is log(eps) = -15.94

CLIP_FRAMES = 1024  # 10.24 s; 1024 / 16 = 64 patches in time
MAX_SAMPLES = 2**31  # 37 hours: a file or manifest that claims more is wrong
STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}  # at these a run is saved before it ends
LOUDEST = 64.0  # float files may exceed full scale, 1, but not by this much
SILENCE = 2.0**-15  # nothing in a file reaches one int16 step
AUDIO_SUFFIXES = set(""".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64
    .m4a .aac .wma .webm .mp4 .mka .amr .ape""".split())  # the last line is not read, but named


class InputError(ValueError):
    """Something the user gave is wrong; the message says what and how to fix it, in one line."""


# ----- Front end: waveform -> normalised log-mel spectrogram -----------------------------------------------


def clip_samples(n_frames: int) -> int:
    """Samples that fill n_frames frames: 1024 -> 164,080."""
    return (n_frames - 1) * FRAME_SHIFT + FRAME_LENGTH


@functools.lru_cache
def _mel_filters(device: torch.device) -> Tensor:
    """Triangles of equal width on the mel scale, (FFT_SIZE / 2, MEL_BINS); the Nyquist bin would weigh 0.
    In float32 on purpose: Kaldi's rounding of the slopes shows in the fourth digit of quiet bins."""
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (MEL_LOW, MEL_HIGH))
    edges = low + torch.arange(MEL_BINS + 2) * ((high - low) / (MEL_BINS + 1))       # (M+2,)
    hz = torch.arange(FFT_SIZE // 2) * (SAMPLE_RATE / FFT_SIZE)                      # (256,)
    bins = 1127.0 * (1.0 + hz / 700.0).log()[:, None]                                # (256, 1)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (bins - left) / (center - left), (right - bins) / (right - center)  # (256, M)
    return torch.minimum(rise, fall).clamp(min=0).to(device)


def to_float(waveform: Tensor) -> Tensor:
    """int16 samples, as packed, to float32 in [-1, 1); anything else as it is."""
    return waveform.float() / 32768 if waveform.dtype == torch.int16 else waveform


def log_mel(waveform: Tensor) -> Tensor:
    """Kaldi's log-mel filterbank, batched: (..., S) at 16 kHz, float in [-1, 1] or int16 -> (..., F, M).
    F = 1 + (S - 400) // 160: only frames that lie inside the waveform. Equals
    torchaudio.compliance.kaldi.fbank with the released settings (data/raw_audio_dataset.py:399-402): 25 ms
    Hann windows every 10 ms, mean removed per frame, pre-emphasis 0.97, powers, 128 mel bins to 8 kHz."""
    waveform = to_float(waveform)
    window = torch.hann_window(FRAME_LENGTH, periodic=False, device=waveform.device)
    frames = waveform.unfold(-1, FRAME_LENGTH, FRAME_SHIFT)    # (..., F, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - PREEMPHASIS * previous) * window
    power = torch.fft.rfft(frames, n=FFT_SIZE).abs().square()  # (..., F, 257)
    mel = power[..., :-1] @ _mel_filters(waveform.device)      # (..., F, M)
    return mel.clamp(min=LOG_FLOOR).log()


def spectrogram(waveform: Tensor, n_samples: Tensor, mean: float, std: float) -> Tensor:
    """Padded clips -> the model's input: (B, S) float or int16, n_samples (B,) of it sound -> (B, 1, F, M).
    The clip's mean is subtracted; frames past its end are 0 *before* normalisation, so that padding is
    louder than digital silence, +0.467 against -1.278 with AudioSet's constants; normalised by 2 * std. All
    as in the released code (data/raw_audio_dataset.py:95-111, 404-428)."""
    waveform = to_float(waveform)
    clip_mean = waveform.sum(1, keepdim=True) / n_samples[:, None]                          # (B, 1)
    spec = log_mel(waveform - clip_mean)                                                    # (B, F, M)
    n_frames = 1 + torch.div(n_samples - FRAME_LENGTH, FRAME_SHIFT, rounding_mode="floor")  # (B,)
    is_sound = torch.arange(spec.shape[1], device=spec.device) < n_frames[:, None]          # (B, F)
    return ((spec * is_sound[:, :, None] - mean) / (2 * std))[:, None]                      # (B, 1, F, M)


# ----- Files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_audio(path: str | os.PathLike) -> Iterator:
    """An audio file as a soundfile.SoundFile. Raises InputError for all that goes wrong with it meanwhile."""
    import soundfile

    if not os.path.isfile(path):
        raise InputError("a link to nothing" if os.path.islink(path) else "no such file")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # bytes: a name need not be UTF-8
            if not (1_000 <= file.samplerate <= 768_000 and file.channels <= 64):
                raise InputError(f"implausible format: {file.samplerate} Hz, {file.channels} channels")
            yield file
    except InputError:
        raise
    except Exception as error:  # whatever libsndfile and its wrapper make of a damaged file
        reason = getattr(error, "error_string", first_line(error))  # without the name, as bytes
        with contextlib.suppress(OSError):  # it may be gone by now
            if not os.path.getsize(path):
                reason = "it is empty"
            elif any(text in reason for text in ("not recognised", "unsupported", "not exist")):
                reason = "no audio that libsndfile reads (m4a, aac, wma, webm: convert with ffmpeg)"
        raise InputError(f"unreadable: {reason}") from None


def whole_rate(rate: int) -> int:
    """The rate itself or, if its resampling filter would take gigabytes, the nearest multiple of 25 Hz."""
    return rate if math.gcd(rate, SAMPLE_RATE) >= 25 else 25 * max(1, round(rate / 25))


def resample(waveform: Tensor, rate: int) -> Tensor:
    """Resample (..., S) from `rate` Hz to 16 kHz with torchaudio's windowed sinc, as the released code."""
    return waveform if whole_rate(rate) == SAMPLE_RATE else _resampler(whole_rate(rate))(waveform)


@functools.lru_cache(8)  # to make the filter takes as long as to use it on ten seconds
def _resampler(rate: int) -> torch.nn.Module:
    import torchaudio

    return torchaudio.transforms.Resample(rate, SAMPLE_RATE, dtype=torch.float32)


def read_pieces(
    path: str | os.PathLike, width: int, hop: int = MAX_SAMPLES, start: int = 0
) -> Iterator[Tensor]:
    """Decode a file forward: pieces (S,) of `width` samples, one every `hop`, from `start` to the file's end.
    Mono float32 at 16 kHz, in which the arguments count. Channels are averaged before resampling (the
    released code resamples along the channel axis, raw_audio_dataset.py:388-396); a piece is what that
    stretch of the whole file, resampled, would be. Raises InputError."""
    with open_audio(path) as file:
        rate = whole_rate(file.samplerate)
        if min(width, file.frames * SAMPLE_RATE // rate) >= MAX_SAMPLES:
            raise InputError(f"claims {file.frames / rate / 3600:.0f} hours: its header is wrong, convert it")
        unit, margin = SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE), 160  # the filter's period and reach
        buffer, at = torch.empty(0), max(0, start - margin) // unit * unit  # `buffer` begins at sample `at`
        skipped = at * rate // SAMPLE_RATE
        if skipped >= file.frames > 0:
            return
        near = max(0, file.frames - 10 * rate) if file.subtype == "VORBIS" else skipped
        if rest := skipped - (file.seek(min(near, skipped)) if file.seekable() else 0):
            file.read(rest)  # a seek into the last page of Vorbis misses
        while True:
            end = math.ceil((start + width + margin) * rate / SAMPLE_RATE)
            n_missing = min(end, file.frames) - at * rate // SAMPLE_RATE - len(buffer)
            samples = torch.from_numpy(file.read(max(0, n_missing), dtype="float32", always_2d=True))
            samples = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
            buffer = torch.cat([buffer, samples]) if len(buffer) else samples
            piece = resample(buffer, rate)[start - at :][:width] if len(buffer) else buffer
            if not len(piece):
                return
            yield piece
            start += hop
            begin = max(0, start - margin) // unit * unit
            n_done = (begin - at) * rate // SAMPLE_RATE
            file.read(min(max(0, n_done - len(buffer)), file.frames), dtype="int16")  # if pieces lie apart
            buffer, at = buffer[n_done:], begin


def load_audio(
    path: str | os.PathLike, start: int = 0, n_samples: int = MAX_SAMPLES, allow_silence: bool = False
) -> Tensor:
    """Read (part of) a file of any rate and channel count as mono 16 kHz: -> (S,) float32 in [-1, 1].
    `start` and `n_samples` count samples at 16 kHz; only that part is decoded. Raises InputError if the file
    is missing or unreadable, or if that part is too short, not audio or (but for `allow_silence`) silent."""
    waveform = next(read_pieces(path, n_samples, start=start), torch.empty(0))
    if start and not len(waveform):
        raise InputError(f"has no sound at {start / SAMPLE_RATE:.2f} s")
    if len(waveform) < FRAME_LENGTH:
        raise InputError(f"too short: {len(waveform)} samples at 16 kHz, a frame needs {FRAME_LENGTH}")
    check_peak(waveform, allow_silence)
    return waveform


def check_peak(waveform: Tensor, allow_silence: bool) -> None:
    """Raise InputError for what is not audio, or silent."""
    peak = to_float(torch.stack(waveform.aminmax())).abs().max().item()
    if not peak <= LOUDEST:
        raise InputError(f"its samples reach {peak:.6g}, where full scale is 1: scaled as integers are?")
    if peak < SILENCE and not allow_silence:
        raise InputError("silent")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Write a text file so that it is there in full or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        file.writelines(os.fsencode(f"{line}\n") for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines that write_lines wrote, whatever bytes they hold; none if there is no file."""
    return os.fsdecode(Path(path).read_bytes()).split("\n")[:-1] if os.path.exists(path) else []


# ----- Data sets -------------------------------------------------------------------------------------------


class Manifest:
    """A list of clips, compact enough for millions: the file's bytes and two integers a line, in tensors that
    loader processes share. Raises InputError naming the line that cannot be read."""

    def __init__(self, path: str | os.PathLike):
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the manifest {path}: {error.strerror}") from None
        root, _, text = text.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
        self.root = os.path.join(os.path.dirname(path), os.fsdecode(root.rstrip(b"\r")))
        begins, counts, at = array("q"), array("q"), 0
        for row, line in enumerate(text.split(b"\n"), start=2):
            if line.strip():
                n_samples = (line.split(b"\t") + [b""])[1].rstrip()
                if not n_samples.isdigit() or len(n_samples) > 10 or int(n_samples) >= MAX_SAMPLES:
                    raise InputError(f"{path}, line {row}: not path<TAB>n_samples[<TAB>labels]: {line[:80]}")
                begins.append(at)
                counts.append(int(n_samples))
            at += len(line) + 1
        if not counts:
            raise InputError(f"the manifest {path} lists no clips")
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.begins = torch.frombuffer(begins, dtype=torch.int64)
        self.n_samples = torch.frombuffer(counts, dtype=torch.int64)

    def fields(self, i: int) -> list[str]:
        """The columns of clip i's line: path, n_samples and, where there is one, the labels."""
        end = int(self.begins[i + 1]) if i + 1 < len(self.begins) else len(self.text)
        line = self.text[int(self.begins[i]) : end].numpy().tobytes()
        return os.fsdecode(line.partition(b"\n")[0].rstrip(b"\r")).split("\t")

    def path(self, i: int) -> str:
        """Path of clip i. Raises InputError if it is not below the root: a manifest may be a stranger's."""
        name = self.fields(i)[0]
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError("lies outside the manifest's folder")
        return os.path.join(self.root, name)


class Clip(NamedTuple):
    """One item of an AudioDataset: a clip, or a piece of a long one."""

    waveform: Tensor  # (S,) float32 or int16, not padded
    item: int  # the one that was read: a stand-in's own, which its labels belong to
    problem: str  # file and reason, if it stands in for an item that cannot be read


class AudioDataset(Dataset):
    """The clips of a manifest, each cut into pieces of at most `n_frames` frames.
    Hour-long recordings are used to the last piece that is full; without `segments`, as in the released code,
    of `n_cut` longer clips only the first n_frames. An item that cannot be read is replaced by the first
    piece of the next clip that can, always the same one. Raises InputError if nothing is usable."""

    def __init__(
        self, source: str | os.PathLike, n_frames: int = CLIP_FRAMES, min_samples: int = FRAME_LENGTH,
        segments: bool = True, allow_silence: bool = False,
    ):  # fmt: skip
        self.source, self.n_frames, self.allow_silence = source, n_frames, allow_silence
        self.manifest = Manifest(source)
        root, n_samples = self.manifest.root, self.manifest.n_samples
        self.is_packed = root.endswith(".pcm")
        if self.is_packed and (not os.path.isfile(root) or os.path.getsize(root) != 2 * int(n_samples.sum())):
            raise InputError(f"{root} is missing or has the wrong size: run extras/prepare.py pack again")
        if not self.is_packed and not os.path.isdir(root):
            raise InputError(f"{source}, line 1: there is no folder {root}")
        is_long = n_samples >= max(min_samples, FRAME_LENGTH)
        lines, self.too_short = is_long.nonzero().flatten(), (~is_long).nonzero().flatten()
        if not len(lines):
            raise InputError(f"{source}: no clip has the {min_samples} samples that --min_samples asks for")
        self.n_cut = 0 if segments else int((n_samples[lines] > clip_samples(n_frames)).sum())
        hop = n_frames * FRAME_SHIFT
        pieces = (n_samples[lines] // hop).clamp(min=1) if segments else torch.ones_like(lines)
        self.line = lines.repeat_interleave(pieces)                     # (items,) of the manifest
        first_item = (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
        self.start = hop * (torch.arange(len(self.line)) - first_item)  # (items,) in samples
        self.offset = n_samples.cumsum(0) - n_samples                   # (lines,) if packed

    def __len__(self) -> int:
        return len(self.line)

    def checked(self) -> "AudioDataset":
        """Itself. Raises InputError if most of 20 files, spread over it, are not there."""
        sample = torch.linspace(0, len(self) - 1, 0 if self.is_packed else 20).long().tolist()
        paths = [os.path.join(self.manifest.root, self.name(item)) for item in sample]
        if len(absent := [path for path in paths if not os.path.lexists(path)]) > 10:
            raise InputError(f"most files of {self.source} are not there, as {absent[0]}: see its first line")
        return self

    def name(self, item: int) -> str:
        """The file that an item comes from, as the manifest lists it."""
        return self.manifest.fields(int(self.line[item]))[0]

    def labels(self, item: int) -> list[str]:
        """Labels of the clip that an item comes from, empty if the manifest has none."""
        text = ",".join(self.manifest.fields(int(self.line[item]))[2:3])
        return [label.strip() for label in text.split(",") if label.strip()]

    def digest(self) -> str:
        """Hash of what is listed, labels included, wherever it lies."""
        return hashlib.sha256(self.manifest.text.numpy().tobytes()).hexdigest()

    def read(self, item: int) -> Tensor:
        """The waveform of an item, (S,), S <= clip_samples(n_frames). Raises InputError, as load_audio."""
        line, start, n_samples = int(self.line[item]), int(self.start[item]), clip_samples(self.n_frames)
        if not self.is_packed:
            return load_audio(self.manifest.path(line), start, n_samples, self.allow_silence)
        n_samples = min(n_samples, int(self.manifest.n_samples[line]) - start)
        pcm = np.fromfile(self.manifest.root, "<i2", n_samples, offset=2 * (int(self.offset[line]) + start))
        if len(pcm) < n_samples:
            raise InputError(f"{self.manifest.root} has changed")
        waveform, gain = torch.from_numpy(pcm), self.manifest.fields(line)[3:4]
        waveform = to_float(waveform) * float(gain[0]) if gain else waveform  # of clips above full scale
        check_peak(waveform, self.allow_silence)
        return waveform

    def __getitem__(self, item: int) -> Clip:
        problem, stand_in = "", item
        for n_tried in range(min(1100, len(self))):
            try:
                return Clip(self.read(stand_in), stand_in, problem)
            except (ValueError, OSError) as error:
                problem = problem or f"{self.name(item)}\t{first_line(error)}"
            line = self.line[stand_in] + max(0, n_tried - 1000) ** 3  # the next; after 1,000 by leaps
            stand_in = int(torch.searchsorted(self.line, line, right=True)) % len(self)
        raise InputError(f"{problem.expandtabs(1)}, nor can the clips after it. Is the data still there?")


class Labelled(NamedTuple):
    """A labelled data set, one item a clip."""

    data: AudioDataset
    targets: Tensor  # (n, C) bool
    classes: dict[str, str]  # label -> name


def open_labelled(
    source: str, n_frames: int, classes: dict[str, str] | None = None, min_samples: int = FRAME_LENGTH,
    allow_silence: bool = True,
) -> Labelled:  # fmt: skip
    """Open a labelled manifest; without `classes`, they are the labels found, sorted. Raises InputError."""
    data = AudioDataset(source, n_frames, min_samples, False, allow_silence=allow_silence).checked()
    labels = [data.labels(item) for item in range(len(data))]
    classes = classes or {label: label for label in sorted(set(itertools.chain(*labels)))}
    index = {label: i for i, label in enumerate(classes)}
    targets = torch.zeros(len(data), len(classes), dtype=torch.bool)
    for item, own in enumerate(labels):
        if not own or not index.keys() >= set(own):
            what = f"the labels {own}, not all among the {len(index)} classes" if own else "no label"
            raise InputError(f"{source}: {data.name(item)} has {what} (third column)")
        targets[item, [index[label] for label in own]] = True
    return Labelled(data, targets, classes)


# ----- Batches ---------------------------------------------------------------------------------------------


def seed_of(purpose: str, *key: int) -> int:
    """A well-mixed 63-bit seed for one purpose, from integers such as (seed, step, clip): randomness is drawn
    from these, never from the state of a process, so that it does not matter how many there are."""
    return int(np.random.SeedSequence([*purpose.encode(), *key]).generate_state(1, np.uint64)[0]) >> 1


class ClipSampler:
    """Endless batches of items: a new order every epoch, one epoch after the other without a gap.
    Update s uses the clips s * batch_size ... (s + 1) * batch_size - 1 of that stream, for any number of
    processes; each takes its share of them, in `accumulate` parts. Iterates over lists of items from update
    `start` on. An epoch is a permutation of all items or, with `weights`, `epoch_items` drawn, none twice."""

    def __init__(
        self, n_items: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1,
        accumulate: int = 1, weights: Tensor | None = None, epoch_items: int = 0,
    ):  # fmt: skip
        self.n_items, self.batch_size, self.seed, self.start = n_items, batch_size, seed, start
        self.rank, self.accumulate, self.part_size = rank, accumulate, batch_size // (world * accumulate)
        self.weights = weights
        self.epoch_items = n_items if weights is None else min(epoch_items, n_items)

    def rows(self, part: int) -> range:
        """Which clips of an update form this process's part number `part`."""
        number = self.rank * self.accumulate + part
        return range(number * self.part_size, (number + 1) * self.part_size)

    def order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.n_items, generator=generator)
        drawn = torch.multinomial(self.weights, self.epoch_items, replacement=False, generator=generator)
        return drawn[torch.randperm(len(drawn), generator=generator)]  # multinomial draws the heaviest first

    def __iter__(self) -> Iterator[list[int]]:
        order = functools.lru_cache(2)(self.order)  # an update may span two epochs
        for step in itertools.count(self.start):
            for part in range(self.accumulate):
                positions = [step * self.batch_size + row for row in self.rows(part)]
                yield [int(order(i // self.epoch_items)[i % self.epoch_items]) for i in positions]


class Batch(NamedTuple):
    """Clips padded with zeros to the same length."""

    waveform: Tensor  # (B, S) float32 or int16
    n_samples: Tensor  # (B,) how much of each row is sound
    items: list[int]  # which items these are
    problems: list[str]  # of each row: file and reason if it is a stand-in


def collate(clips: list[Clip], n_frames: int) -> Batch:
    """Pad clips to the samples of n_frames frames."""
    dtype = functools.reduce(torch.promote_types, (clip.waveform.dtype for clip in clips))
    waveform = torch.zeros(len(clips), clip_samples(n_frames), dtype=dtype)
    for row, clip in zip(waveform, clips):
        row[: len(clip.waveform)] = clip.waveform if dtype == torch.int16 else to_float(clip.waveform)
    n_samples = torch.tensor([len(clip.waveform) for clip in clips])
    return Batch(waveform, n_samples, [clip.item for clip in clips], [clip.problem for clip in clips])


def build_loader(
    data: AudioDataset, batches: Iterable[list[int]], workers: int, timeout: float = 1800, **options
) -> Iterator[Batch]:
    """Batches of items in order, read ahead by `workers` processes, one a core at most. Raises RuntimeError
    after `timeout` seconds without a batch, or when a process has died."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    atexit.register(_end_loaders), atexit.register(signal.signal, signal.SIGCHLD, signal.SIG_DFL)
    options["collate_fn"] = options.get("collate_fn") or functools.partial(collate, n_frames=data.n_frames)
    if workers:
        options |= dict(num_workers=min(workers, max(1, cores)), prefetch_factor=4, timeout=min(timeout, 1e6))
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # inherited by the processes:
    try:  # a signal to the whole group must not end them before the run has saved
        loader = iter(DataLoader(data, batch_sampler=batches, worker_init_fn=_behave, **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def fetch() -> Batch | None:
        timer = threading.Timer(min(1.05 * timeout, 1e6), _end_loaders)  # torch waits on for a stopped one
        timer.start()
        try:
            return next(loader, None)
        except (EOFError, ConnectionError):  # of a process that has been killed
            threading.Event().wait(1)  # for the signal that tells of it, at which torch raises RuntimeError
            raise
        finally:
            timer.cancel()

    return iter(fetch, None)


def _behave(_: int) -> None:
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)  # /dev/shm is full
    silence_libraries()


def silence_libraries() -> None:
    """Let only Python write to stderr: libmpg123 warns there of much that is fine, and names no file."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_loaders() -> None:
    """At exit: Python would wait for loaders that an exception kept alive, and they block SIGTERM."""
    for child in (child for child in multiprocessing.active_children() if child.daemon):
        child.kill()
