"""Audio files in, normalised log-mel spectrograms out.

    load_audio     a file of any format and rate, or a part of it -> 16 kHz mono
    log_mel        waveform -> Kaldi's log-mel filterbank, on whole batches, on any device
    spectrogram    padded clips -> the model's input
    AudioDataset   the clips of a manifest, cut into pieces; an unreadable one is replaced by the next clip
    ClipSampler    which clips an update uses: the same for any number of processes
    build_loader   batches of clips, read ahead by threads

**Manifest**: line 1 is the folder that paths are relative to (itself absolute or relative to the manifest).
Then each clip has a line, path<TAB>n_samples[<TAB>label,label...], with n_samples counted at 16 kHz.

**Packed**: line 1 is a .pcm file that holds the clips in that order, end to end, as 16 kHz mono little-endian
int16. Clips above full scale are divided by a gain, their fourth column. extras/prepare.py writes both.
Only `resample` needs torchaudio, only reading files needs soundfile; extras/media.py adds m4a and webm.
Citations such as data/raw_audio_dataset.py:399 point into the released code (github.com/cwx-worst-one/EAT).
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import math
import os
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
FRAME_LENGTH = 400  # 25 ms
FRAME_SHIFT = 160  # 10 ms
FFT_SIZE = 512
MEL_BINS = 128
MEL_LOW = 20.0  # Hz
MEL_HIGH = SAMPLE_RATE / 2
PREEMPHASIS = 0.97
LOG_FLOOR = torch.finfo(torch.float32).eps  # silence is log(eps) = -15.94

CLIP_FRAMES = 1024  # 10.24 s; 1024 / 16 = 64 patches in time
MAX_SAMPLES = 2**31  # 37 hours: a file or manifest that claims more is wrong
FILTER_REACH = 160  # samples on each side that the resampling filter sees
LOUDEST = 64.0  # float files may exceed full scale, 1, but not by this much
SILENCE = 2.0**-15  # a peak below one int16 step is silence
MAX_STAND_INS = 1000  # give up after so many unreadable clips in a row


class InputError(ValueError):
    """Something the user gave is wrong; the message says what and how to fix it, in one line."""


# ----- Front end: waveform -> normalised log-mel spectrogram -----------------------------------------------


def clip_samples(n_frames: int) -> int:
    """Samples that fill n_frames frames: 1024 -> 164,080."""
    return (n_frames - 1) * FRAME_SHIFT + FRAME_LENGTH


def hz_to_mel(hz: float) -> float:
    return 1127.0 * math.log(1.0 + hz / 700.0)


@functools.lru_cache
def mel_filters(device: torch.device) -> Tensor:
    """Triangles of equal width on the mel scale, (FFT_SIZE / 2, MEL_BINS); the Nyquist bin would weigh 0.
    In float32 on purpose: Kaldi's rounding of the slopes shows in the fourth digit of quiet bins."""
    low = hz_to_mel(MEL_LOW)
    width = (hz_to_mel(MEL_HIGH) - low) / (MEL_BINS + 1)
    edges = low + torch.arange(MEL_BINS + 2) * width             # (M+2,)
    hz = torch.arange(FFT_SIZE // 2) * (SAMPLE_RATE / FFT_SIZE)  # (256,)
    bins = 1127.0 * (1.0 + hz / 700.0).log()[:, None]            # (256, 1)
    left = edges[:-2]
    center = edges[1:-1]
    right = edges[2:]
    rise = (bins - left) / (center - left)                       # (256, M)
    fall = (right - bins) / (right - center)                     # (256, M)
    return torch.minimum(rise, fall).clamp(min=0).to(device)


@functools.lru_cache
def hann_window(device: torch.device) -> Tensor:
    """Cached, so that `log_mel` can be exported."""
    return torch.hann_window(FRAME_LENGTH, periodic=False, device=device)


for table in (mel_filters, hann_window):  # fill the caches: an export would put tensors without data there
    table(torch.device("cpu"))


def log_mel(waveform: Tensor) -> Tensor:
    """Kaldi's log-mel filterbank, batched: (..., S) at 16 kHz, in [-1, 1] -> (..., F, M).
    F = 1 + (S - 400) // 160: only frames that lie inside the waveform. Equals
    torchaudio.compliance.kaldi.fbank with the released settings (data/raw_audio_dataset.py:399-402): 25 ms
    Hann windows every 10 ms, mean removed per frame, pre-emphasis 0.97, powers, 128 mel bins to 8 kHz."""
    frames = waveform.unfold(-1, FRAME_LENGTH, FRAME_SHIFT)            # (..., F, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)  # (..., F, 400)
    frames = (frames - PREEMPHASIS * previous) * hann_window(waveform.device)
    power = torch.fft.rfft(frames, n=FFT_SIZE).abs().square()          # (..., F, 257)
    mel = power[..., :-1] @ mel_filters(waveform.device)               # (..., F, M)
    return mel.clamp(min=LOG_FLOOR).log()


def spectrogram(waveform: Tensor, n_samples: Tensor, mean: float, std: float) -> Tensor:
    """Padded clips -> the model's input: (B, S), of which n_samples (B,) are sound -> (B, 1, F, M).
    The clip's mean is subtracted. Frames past its end are 0 *before* normalisation, so that padding is
    louder than digital silence: +0.467 against -1.278 with AudioSet's constants. Normalised by 2 * std. All
    as in the released code (data/raw_audio_dataset.py:95-111, 404-428)."""
    clip_mean = waveform.sum(1, keepdim=True) / n_samples[:, None]                          # (B, 1)
    spec = log_mel(waveform - clip_mean)                                                    # (B, F, M)
    n_frames = 1 + torch.div(n_samples - FRAME_LENGTH, FRAME_SHIFT, rounding_mode="floor")  # (B,)
    is_sound = torch.arange(spec.shape[1], device=spec.device) < n_frames[:, None]          # (B, F)
    spec = spec * is_sound[:, :, None]
    return ((spec - mean) / (2 * std))[:, None]                                             # (B, 1, F, M)


# ----- Files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_audio(path: str | Path) -> Iterator:
    """An open soundfile.SoundFile, or the replacement of extras/media.py for formats that libsndfile does not
    read. Any error while it is open becomes an InputError."""
    import soundfile

    if not os.path.isfile(path):
        raise InputError("a broken link" if os.path.islink(path) else "no such file")
    try:
        try:
            name = path if os.name == "nt" else os.fsencode(path)  # it need not be UTF-8
            file = soundfile.SoundFile(name)
        except soundfile.LibsndfileError as error:
            from extras.media import open_other

            file = open_other(path, error)
        with file:
            if not 1_000 <= file.samplerate <= 768_000 or file.channels > 64:
                raise InputError(f"implausible format: {file.samplerate} Hz, {file.channels} channels")
            yield file
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise many types for damaged files
        reason = getattr(error, "error_string", first_line(error))
        raise InputError(f"unreadable: {reason}") from None


def whole_rate(rate: int) -> int:
    """The rate itself or, if its resampling filter would take gigabytes, the nearest multiple of 25 Hz."""
    if math.gcd(rate, SAMPLE_RATE) >= 25:
        return rate
    return 25 * max(1, round(rate / 25))


@functools.lru_cache(8)  # making the filter takes as long as using it on ten seconds
def resampler(rate: int) -> torch.nn.Module:
    import torchaudio

    return torchaudio.transforms.Resample(rate, SAMPLE_RATE, dtype=torch.float32)


def resample(waveform: Tensor, rate: int) -> Tensor:
    """Resample (..., S) from `rate` Hz to 16 kHz with torchaudio's windowed sinc, as the released code."""
    rate = whole_rate(rate)
    if rate == SAMPLE_RATE:
        return waveform
    return resampler(rate)(waveform)


def safe_seek(file, frame: int) -> int:
    """Where to start decoding so that the samples from `frame` on equal those of the whole file.
    An mp3 frame may use up to 511 bytes of the frames before it, or 255 below 32 kHz, where a frame of 576
    samples may have as few as 3. libsndfile cannot seek exactly in Vorbis' last page, which is below 10 s."""
    if "MPEG" in file.subtype:  # in mp3 files, or inside wav
        return max(0, frame - (16_384 if file.samplerate >= 32_000 else 65_536))
    if file.subtype == "VORBIS":
        return max(0, min(frame, file.frames - 10 * file.samplerate))
    return frame if file.seekable() else 0


def load_audio(
    path: str | Path, start: int = 0, n_samples: int = MAX_SAMPLES, allow_silence: bool = False
) -> Tensor:
    """Read a file, or part of it, as mono 16 kHz: -> (S,) float32 in [-1, 1].
    `start` and `n_samples` count samples at 16 kHz. Only that part is decoded, and equals the same part of
    the whole file. Channels are averaged before resampling (the released code resamples along the channel
    axis, data/raw_audio_dataset.py:388-396). Raises InputError if the file is missing or unreadable, or if
    the part is too short, not audio or (unless `allow_silence`) silent."""
    with open_audio(path) as file:
        rate = whole_rate(file.samplerate)
        if min(n_samples, file.frames * SAMPLE_RATE // rate) >= MAX_SAMPLES:
            raise InputError(f"claims {file.frames / rate / 3600:.0f} hours: its header is wrong, convert it")
        # Read what the filter reaches, too, and begin where its phase is as in the whole file
        period = SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE)
        begin = max(0, start - FILTER_REACH) // period * period
        first = min(begin * rate // SAMPLE_RATE, file.frames)
        last = math.ceil((start + n_samples + FILTER_REACH) * rate / SAMPLE_RATE)
        last = min(last, file.frames)
        near = safe_seek(file, first)
        if near:
            file.seek(near)
        samples = file.read(last - near, dtype="float32", always_2d=True)[first - near :]
    waveform = torch.from_numpy(samples).mean(1)
    if len(waveform):
        waveform = resample(waveform, rate)[start - begin :][:n_samples]
    if len(waveform) < FRAME_LENGTH:
        sound = f"{len(waveform)} samples at 16 kHz from {start / SAMPLE_RATE:.2f} s on"
        raise InputError(f"too short: {sound}, a frame needs {FRAME_LENGTH}")
    check_peak(waveform, allow_silence)
    return waveform


def check_peak(waveform: Tensor, allow_silence: bool) -> None:
    """Raise InputError for what is not audio, or silent."""
    peak = np.abs(waveform.numpy()).max()
    if not peak <= LOUDEST:
        raise InputError(f"its samples reach {peak:.6g}, where full scale is 1: are they unscaled integers?")
    if peak < SILENCE and not allow_silence:
        raise InputError("silent")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write a temporary file, then rename it: the text file is whole or not there."""
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


# ----- Data sets -------------------------------------------------------------------------------------------


class Manifest:
    """A list of clips. Raises InputError naming the line that cannot be read."""

    def __init__(self, path: str | Path):
        try:
            text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
        except OSError as error:
            raise InputError(f"cannot read the manifest {path}: {error.strerror}") from None
        root, *lines = text.replace(b"\r\n", b"\n").split(b"\n")
        self.root = os.path.join(os.path.dirname(path), os.fsdecode(root))
        self.digest = hashlib.sha256(memoryview(text)[len(root) :]).hexdigest()  # the folder does not count
        self.lines = []  # of bytes: millions of them take little memory
        n_samples = array("q")
        for number, line in enumerate(lines, start=2):
            columns = line.split(b"\t", 2)
            if len(columns) > 1 and columns[1].isdigit() and len(columns[1]) <= 10:
                self.lines.append(line)
                n_samples.append(int(columns[1]))
            elif line.strip():
                raise InputError(f"{path}, line {number}: not path<TAB>n_samples[<TAB>labels]: {line[:80]}")
        if not self.lines:
            raise InputError(f"the manifest {path} lists no clips")
        self.n_samples = torch.from_numpy(np.array(n_samples))
        if self.n_samples.max() >= MAX_SAMPLES:
            raise InputError(f"{path}: {self.fields(self.n_samples.argmax())[0]} cannot be that long")

    def fields(self, i: int) -> list[str]:
        """The columns of clip i's line: path, n_samples and, where there is one, the labels."""
        return os.fsdecode(self.lines[i]).split("\t")

    def path(self, i: int) -> str:
        """Path of clip i. Raises InputError if it is not below the root: a manifest may be untrusted."""
        name = self.fields(i)[0]
        if Path(name).anchor or ".." in Path(name).parts:
            raise InputError("lies outside the manifest's folder")
        return os.path.join(self.root, name)


class Clip(NamedTuple):
    """One item of an AudioDataset: a clip, or a piece of a long one."""

    waveform: Tensor  # (S,) not padded
    item: int  # the item that was read, the stand-in if there is one: use its labels
    problem: str  # file and reason, if another clip stands in for it


class Batch(NamedTuple):
    """Clips padded with zeros to the same length."""

    waveform: Tensor  # (B, S)
    n_samples: Tensor  # (B,) how much of each row is sound
    items: list[int]  # which items these are
    problems: list[str]  # of each row: file and reason if another clip stands in


class AudioDataset:
    """The clips of a manifest, each cut into pieces of at most `n_frames` frames.
    Long recordings are used up to their last full piece; without `segments`, as in the released code, only
    the first n_frames of each clip (`n_cut` counts the longer ones). An item that cannot be read is replaced
    by the first piece of the next clip, always the same. Raises InputError if nothing is usable."""

    def __init__(
        self, source: str | Path, n_frames: int = CLIP_FRAMES, min_samples: int = FRAME_LENGTH,
        segments: bool = True, allow_silence: bool = False,
    ):  # fmt: skip
        self.source = source
        self.n_frames = n_frames
        self.min_samples = least = max(min_samples, FRAME_LENGTH)
        self.allow_silence = allow_silence
        self.manifest = Manifest(source)
        root = self.manifest.root
        n_samples = self.manifest.n_samples
        self.is_packed = root.endswith(".pcm")
        if self.is_packed and (not os.path.isfile(root) or os.path.getsize(root) != 2 * n_samples.sum()):
            raise InputError(f"{root} is missing or has the wrong size: run extras/prepare.py pack again")
        if not self.is_packed and not os.path.isdir(root):
            raise InputError(f"{source}, line 1: there is no folder {root}")
        self.offset = n_samples.cumsum(0) - n_samples  # (lines,) where each clip begins, if packed

        # Which lines are long enough, and into how many pieces each is cut
        is_long = n_samples >= least
        self.too_short = []  # file and reason
        for line in (~is_long).nonzero().flatten().tolist():
            name = self.manifest.fields(line)[0]
            self.too_short.append(f"{name}\tshorter than {self.min_samples} samples at 16 kHz")
        lines = is_long.nonzero().flatten()
        if not len(lines):
            raise InputError(f"{source}: no clip has the {least} samples that --min_samples asks for")
        self.n_cut = 0
        hop = n_frames * FRAME_SHIFT
        pieces = (n_samples[lines] // hop).clamp(min=1)
        if not segments:
            self.n_cut = int((n_samples[lines] > clip_samples(n_frames)).sum())
            pieces = torch.ones_like(lines)
        self.line = lines.repeat_interleave(pieces)                     # (items,) of the manifest
        first_item = (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
        self.start = hop * (torch.arange(len(self.line)) - first_item)  # (items,) in samples

    def __len__(self) -> int:
        return len(self.line)

    def name(self, item: int) -> str:
        """The file that an item comes from, as the manifest lists it."""
        return self.manifest.fields(self.line[item])[0]

    def labels(self, item: int) -> list[str]:
        """Labels of the clip that an item comes from, empty if the manifest has none."""
        return labels_of(self.manifest.fields(self.line[item]))

    def read(self, item: int) -> Tensor:
        """The waveform of an item, (S,), S <= clip_samples(n_frames). Raises InputError, as load_audio."""
        line = int(self.line[item])
        start = int(self.start[item])
        n_samples = clip_samples(self.n_frames)
        if not self.is_packed:
            return load_audio(self.manifest.path(line), start, n_samples, self.allow_silence)
        n_samples = min(n_samples, int(self.manifest.n_samples[line]) - start)
        at = 2 * (int(self.offset[line]) + start)  # 2 bytes a sample
        pcm = np.fromfile(self.manifest.root, "<i2", n_samples, offset=at)
        if len(pcm) < n_samples:
            raise InputError(f"{self.manifest.root} has changed")
        waveform = torch.from_numpy(pcm.astype(np.float32) / 32768)
        check_peak(waveform, self.allow_silence)
        fields = self.manifest.fields(line)
        if len(fields) > 3:
            waveform = waveform * float(fields[3])  # the gain of a clip above full scale
            check_peak(waveform, allow_silence=True)
        return waveform

    def __getitem__(self, item: int) -> Clip:
        problem = ""
        stand_in = item
        for _ in range(MAX_STAND_INS):
            try:
                return Clip(self.read(stand_in), stand_in, problem)
            except (ValueError, OSError) as error:
                problem = problem or f"{self.name(item)}\t{first_line(error)}"
            next_line = self.line[stand_in] + 1
            stand_in = int(torch.searchsorted(self.line, next_line)) % len(self)
        raise InputError(f"{problem.expandtabs(1)}; nor can the clips after it: is the data still there?")


def labels_of(fields: list[str]) -> list[str]:
    """The labels in the columns of a manifest's line, with accents spelt in one way (Unicode's NFC)."""
    if len(fields) < 3:
        return []
    text = unicodedata.normalize("NFC", fields[2])
    return [label.strip() for label in text.split(",") if label.strip()]


class Labelled(NamedTuple):
    """A labelled data set, one item a clip."""

    data: AudioDataset
    targets: Tensor  # (n, K) bool, K classes
    classes: dict[str, str]  # label -> name


def open_labelled(
    source: str, n_frames: int, classes: dict[str, str] | None = None, min_samples: int = FRAME_LENGTH,
    allow_silence: bool = True,
) -> Labelled:  # fmt: skip
    """Open a labelled manifest; without `classes`, they are the labels found, sorted. Raises InputError."""
    data = AudioDataset(source, n_frames, min_samples, segments=False, allow_silence=allow_silence)
    labels = [data.labels(item) for item in range(len(data))]
    if classes is None:
        classes = {label: label for label in sorted(set(itertools.chain(*labels)))}
    index = {label: i for i, label in enumerate(classes)}
    targets = torch.zeros(len(data), len(classes), dtype=torch.bool)
    for item, found in enumerate(labels):
        if not found:
            raise InputError(f"{source}: {data.name(item)} has no label (third column)")
        unknown = set(found) - index.keys()
        if unknown:
            raise InputError(f"{source}: {data.name(item)} has an unknown label: {min(unknown)!r}")
        targets[item, [index[label] for label in found]] = True
    return Labelled(data, targets, classes)


# ----- Batches ---------------------------------------------------------------------------------------------


def seed_of(purpose: str, *key: int) -> int:
    """A well-mixed 63-bit seed for one purpose, from integers such as (seed, step, clip). Random numbers come
    from these, not from the state of a process, so that the number of processes does not matter."""
    sequence = np.random.SeedSequence([*purpose.encode(), *key])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


class ClipSampler:
    """Endless batches of items: a new order every epoch, and epochs follow each other without a gap.
    Update s uses the clips s * batch_size ... (s + 1) * batch_size - 1 of that stream, for any number of
    processes; each takes its share of them, in `accumulate` parts. Iterates over lists of items from update
    `start` on. An epoch is a permutation of all items or, with `weights`, `epoch_items` drawn, none twice."""

    def __init__(
        self, n_items: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1,
        accumulate: int = 1, weights: Tensor | None = None, epoch_items: int = 0,
    ):  # fmt: skip
        self.n_items = n_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.accumulate = accumulate
        self.part_size = batch_size // (world * accumulate)
        self.weights = weights
        self.epoch_items = n_items if weights is None else min(epoch_items, n_items)

    def rows(self, part: int) -> range:
        """Which clips of an update form this process's part number `part`."""
        first = (self.rank * self.accumulate + part) * self.part_size
        return range(first, first + self.part_size)

    def order(self, epoch: int) -> Tensor:
        """The items of an epoch, (epoch_items,)."""
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.n_items, generator=generator)
        drawn = torch.multinomial(self.weights, self.epoch_items, replacement=False, generator=generator)
        return drawn[torch.randperm(len(drawn), generator=generator)]  # multinomial draws the heaviest first

    def __iter__(self) -> Iterator[list[int]]:
        order = functools.lru_cache(2)(self.order)  # an update may span two epochs
        for step in itertools.count(self.start):
            for part in range(self.accumulate):
                items = []
                for row in self.rows(part):
                    epoch, place = divmod(step * self.batch_size + row, self.epoch_items)
                    items.append(int(order(epoch)[place]))
                yield items


def collate(clips: list[Clip], n_frames: int) -> Batch:
    """Pad clips to the samples of n_frames frames."""
    waveform = torch.zeros(len(clips), clip_samples(n_frames))
    for row, clip in zip(waveform, clips):
        row[: len(clip.waveform)] = clip.waveform
    n_samples = torch.tensor([len(clip.waveform) for clip in clips])
    return Batch(waveform, n_samples, [clip.item for clip in clips], [clip.problem for clip in clips])


def build_loader(
    data: AudioDataset, batches: Iterable[list[int]], workers: int, timeout: float = 1800
) -> Iterator[Batch]:
    """Batches of items in order, read ahead by `workers` threads: decoding runs outside Python's lock.
    Raises TimeoutError if the next batch does not come within `timeout` seconds."""

    def read(items: list[int]) -> Batch:
        return collate([data[item] for item in items], data.n_frames)

    # One OpenMP thread in each loader thread, or the resampler would start a team in each. get_num_threads
    # first: it makes this thread keep its own number, which the threads' set_num_threads would change
    torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,))
    waiting = collections.deque()
    try:
        for items in batches:
            waiting.append(pool.submit(read, items))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result(timeout)
        while waiting:
            yield waiting.popleft().result(timeout)
    except TimeoutError:
        raise TimeoutError(f"no batch for {timeout:.0f} s: reading {data.source} hangs") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def move(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without waiting for it."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
