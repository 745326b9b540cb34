"""Audio files in, normalised log-mel spectrograms out.

    python data.py scan  DIR -o train.tsv       list every audio file below DIR; --labels: labelled by their folders
    python data.py stats train.tsv              mean and std for --norm_mean and --norm_std
    python data.py pack  train.tsv shards/      decode once; training then reads shards/ instead of train.tsv
    python data.py esc50 ESC-50-master -o esc50/                             train1.tsv, test1.tsv, ... of the 5 folds
    python data.py speechcommands speech_commands_v0.02 -o spcv2/            train.tsv, valid.tsv, test.tsv
    python data.py audioset SEGMENTS.csv LABELS.csv AUDIO_DIR -o train.tsv   one manifest of multi-labelled clips

**Manifest**: line 1 is the folder that paths are relative to (itself absolute or relative to the manifest); then a line
for each clip,

    path<TAB>n_samples[<TAB>label,label...]

with n_samples counted at 16 kHz. The released code's `.tsv` (two fields) with an `.lbl` beside it is read too.

**Packed**: `00000.pcm` holds 16 kHz mono little-endian int16, clip behind clip; `00000.tsv` lists its clips in that
order, as a manifest whose line 1 is the CRC-32 of the `.pcm`; and so on for each shard. `index.json`, written last,
lists the shards.

The front end (`log_mel`, `spectrogram`) runs on any device, on whole batches; only `resample` needs torchaudio, and
only reading files needs soundfile. Citations such as data/raw_audio_dataset.py:399 point into the released code
(github.com/cwx-worst-one/EAT at 06c1c34).
"""

import argparse
import atexit
import codecs
import csv
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SAMPLE_RATE = 16_000
FRAME_LENGTH = 400  # 25 ms
FRAME_SHIFT = 160  # 10 ms
FFT_SIZE = 512
MEL_BINS = 128
MEL_LOW, MEL_HIGH = 20.0, SAMPLE_RATE / 2
PREEMPHASIS = 0.97
LOG_FLOOR = torch.finfo(torch.float32).eps  # silence is log(eps) = -15.94

CLIP_FRAMES = 1024  # 10.24 s; 1024 / 16 = 64 patches in time
MAX_SAMPLES = 2**31  # 37 hours: a file or manifest that claims more is wrong
LOUDEST = 1e6  # float files may exceed 1, but not by this much
SILENCE = 2.0**-15  # nothing in a file reaches one int16 step
AUDIO_SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64".split())
SHARD_SAMPLES = 2**29  # a shard is full at 1 GiB


class InputError(ValueError):
    """Something the user gave is wrong; the message says what and how to mend it, in one line."""


class PastEnd(InputError):
    """A file ends before the part of it that was asked for."""


class Silent(InputError):
    """There is nothing to hear in a file, or in the part of it that was asked for."""


# ---------------------------------------------------------------------------------------------------------------------
# Front end: waveform -> normalised log-mel spectrogram


def clip_samples(n_frames: int) -> int:
    """Samples that fill n_frames frames: 1024 -> 164,080."""
    return (n_frames - 1) * FRAME_SHIFT + FRAME_LENGTH


@functools.lru_cache
def _mel_filters(device: torch.device) -> Tensor:
    """Triangles of equal width on the mel scale, (FFT_SIZE / 2, MEL_BINS); the Nyquist bin would weigh nothing.

    In float32 on purpose: Kaldi's rounding of the slopes shows in the fourth digit of quiet bins.
    """
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (MEL_LOW, MEL_HIGH))
    edges = low + torch.arange(MEL_BINS + 2) * ((high - low) / (MEL_BINS + 1))               # (M+2,)
    hz = torch.arange(FFT_SIZE // 2) * (SAMPLE_RATE / FFT_SIZE)                              # (256,)
    bins = 1127.0 * (1.0 + hz / 700.0).log()[:, None]                                        # (256, 1)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (bins - left) / (center - left), (right - bins) / (right - center)          # (256, M)
    return torch.minimum(rise, fall).clamp(min=0).to(device)


def to_float(waveform: Tensor) -> Tensor:
    """int16 samples, as packed, to float32 in [-1, 1); anything else as it is."""
    return waveform.float() / 32768 if waveform.dtype == torch.int16 else waveform


def log_mel(waveform: Tensor) -> Tensor:
    """Kaldi's log-mel filterbank, batched: (..., S) at 16 kHz, float in [-1, 1] or int16 -> (..., F, M).

    F = 1 + (S - 400) // 160: only frames that lie inside the waveform.

    Equals torchaudio.compliance.kaldi.fbank with the released settings (data/raw_audio_dataset.py:399-402): 25 ms Hann
    windows every 10 ms, mean removed per frame, pre-emphasis 0.97, power spectrum, 128 mel bins from 20 Hz to 8 kHz.
    """
    waveform = to_float(waveform)
    window = torch.hann_window(FRAME_LENGTH, periodic=False, device=waveform.device)
    frames = waveform.unfold(-1, FRAME_LENGTH, FRAME_SHIFT)                                  # (..., F, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - PREEMPHASIS * previous) * window
    power = torch.fft.rfft(frames, n=FFT_SIZE).abs().square()                                # (..., F, 257)
    mel = power[..., :-1] @ _mel_filters(waveform.device)                                    # (..., F, M)
    return mel.clamp(min=LOG_FLOOR).log()


def spectrogram(waveform: Tensor, n_samples: Tensor, mean: float, std: float) -> Tensor:
    """Padded clips -> the model's input: (B, S) float or int16, of which n_samples (B,) are sound -> (B, 1, F, M).

    The clip's mean is subtracted; frames past its end are 0 *before* normalisation, so that padding is louder than
    digital silence, +0.467 against -1.278 with AudioSet's constants; normalised by 2 * std. All as in the released
    code (data/raw_audio_dataset.py:95-111, 404-428).
    """
    waveform = to_float(waveform)
    clip_mean = waveform.sum(1, keepdim=True) / n_samples[:, None]                           # (B, 1)
    spec = log_mel(waveform - clip_mean)                                                     # (B, F, M)
    n_frames = 1 + torch.div(n_samples - FRAME_LENGTH, FRAME_SHIFT, rounding_mode="floor")   # (B,)
    is_sound = torch.arange(spec.shape[1], device=spec.device) < n_frames[:, None]           # (B, F)
    return ((spec * is_sound[:, :, None] - mean) / (2 * std))[:, None]                       # (B, 1, F, M)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_audio(
    path: str | os.PathLike, start: int = 0, n_samples: int | None = None, allow_silence: bool = False
) -> Tensor:
    """Read (part of) a file of any rate and channel count as mono 16 kHz: -> (S,) float32 in [-1, 1].

    `start` and `n_samples` count samples at 16 kHz; only that part is decoded. Channels are averaged before resampling
    (the released code resamples along the channel axis, raw_audio_dataset.py:388-396).
    Raises InputError if the file is missing, unreadable, empty, not finite or, without `allow_silence`, silent.
    """
    waveform = _decode(path, start, n_samples)
    if len(waveform) < FRAME_LENGTH:
        raise InputError(f"too short: {len(waveform)} samples at 16 kHz, a frame needs {FRAME_LENGTH}")
    peak = waveform.abs().max().item()
    if not peak <= LOUDEST:
        raise InputError(f"its samples are not audio: the largest is {peak}")
    if peak < SILENCE and not allow_silence:
        raise Silent("silent")
    return waveform


def _decode(path: str | os.PathLike, start: int, n_samples: int | None) -> Tensor:
    import soundfile

    if not os.path.isfile(path):
        raise InputError("no such file")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # bytes: a name need not be UTF-8
            rate, n_channels = file.samplerate, file.channels
            if not (1_000 <= rate <= 768_000 and n_channels <= 64):
                raise InputError(f"implausible format: {rate} Hz, {n_channels} channels")
            context = min(start, FRAME_SHIFT)  # read a little more on both sides for the resampling filter
            first = (start - context) * rate // SAMPLE_RATE
            if n_samples is None and file.frames > MAX_SAMPLES:
                raise InputError(f"claims {file.frames / rate / 3600:.0f} hours: its header is wrong, convert it")
            if start * rate // SAMPLE_RATE >= file.frames:
                raise PastEnd(f"has no sound at {start / SAMPLE_RATE:.2f} s")
            file.seek(first)
            last = file.frames
            if n_samples is not None:
                last = min(last, math.ceil((start + n_samples + FRAME_SHIFT) * rate / SAMPLE_RATE))
            samples = file.read(last - first, dtype="float32", always_2d=True)               # (frames, channels)
    except InputError:
        raise
    except Exception as error:  # whatever libsndfile and its wrapper make of a damaged file
        raise InputError(f"unreadable: {_why(error, path)}") from None
    if samples.size == 0:
        raise (PastEnd if start else InputError)("unreadable: nothing could be decoded")
    waveform = resample(torch.from_numpy(samples).mean(1), rate)[context:]
    return waveform[:n_samples]


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _why(error: Exception, path: str | os.PathLike) -> str:
    """What libsndfile says of a file, but for an mp3 without a frame, of which it says that it does not exist."""
    reason = first_line(error)
    return "it holds no audio" if "File does not exist" in reason and os.path.isfile(path) else reason


def resample(waveform: Tensor, rate: int) -> Tensor:
    """Resample (..., S) from `rate` Hz to 16 kHz with torchaudio's default windowed sinc, as the released code does."""
    if math.gcd(rate, SAMPLE_RATE) < 25:  # an odd rate would need a filter of gigabytes; at 11 kHz 0.1 % off
        rate = 25 * max(1, round(rate / 25))
    if rate == SAMPLE_RATE:
        return waveform
    import torchaudio

    return torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)


class Manifest:
    """A list of clips, compact enough for millions: the file's bytes and two integers a line, in tensors that loader
    workers share.

    Raises InputError naming the line that cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read the manifest {path}: it is not a file")
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the manifest {path}: {error.strerror}") from None
        lines = text.split(b"\n")
        self.root = os.path.join(path.parent, os.fsdecode(lines[0].removeprefix(codecs.BOM_UTF8).rstrip(b"\r")))
        begins, counts, position = array("q"), array("q"), len(lines[0]) + 1
        for number, line in enumerate(lines[1:], start=2):
            if line.strip():
                fields = line.split(b"\t") if b"\t" in line else line.rsplit(None, 1)
                try:
                    counts.append(int(fields[1]))
                    if not 0 <= counts[-1] < MAX_SAMPLES:
                        raise ValueError
                except (IndexError, ValueError, OverflowError):
                    raise InputError(
                        f"{path}, line {number}: expected path<TAB>n_samples[<TAB>labels], found {line[:80]!r}"
                    ) from None
                begins.append(position)
            position += len(line) + 1
        if not counts:
            raise InputError(f"the manifest {path} lists no clips")
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.begins = torch.frombuffer(begins, dtype=torch.int64)
        self.n_samples = torch.frombuffer(counts, dtype=torch.int64)
        self.lbl = _read_lbl(path.with_suffix(".lbl"), len(self)) if path.with_suffix(".lbl").exists() else None

    def __len__(self) -> int:
        return len(self.n_samples)

    def fields(self, i: int) -> list[str]:
        """The columns of clip i's line: path, n_samples and, where there is one, the labels."""
        begin = int(self.begins[i])
        end = int(self.begins[i + 1]) if i + 1 < len(self) else len(self.text)
        line = os.fsdecode(self.text[begin:end].numpy().tobytes()).split("\n", 1)[0].rstrip("\r")
        return line.split("\t") if "\t" in line else line.rsplit(None, 1)

    def name(self, i: int) -> str:
        """Path of clip i as it is listed."""
        return self.fields(i)[0]

    def path(self, i: int) -> str:
        """Path of clip i. Raises InputError if it is not below the manifest's root: a manifest may be a stranger's."""
        name = self.name(i)
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError("lies outside the manifest's folder")
        return os.path.join(self.root, name)

    def labels(self, i: int) -> list[str]:
        """Labels of clip i, empty if the manifest has none."""
        text = self.lbl[i] if self.lbl is not None else (self.fields(i) + ["", ""])[2]
        return [label.strip() for label in text.split(",") if label.strip()]


def _read_lbl(path: Path, n_clips: int) -> list[str]:
    """Labels in the released format: a line a clip, an id, white space, labels joined by commas."""
    lines = [line.split() for line in path.read_text(errors="surrogateescape").splitlines() if line.strip()]
    if len(lines) != n_clips or any(len(line) != 2 for line in lines):
        raise InputError(f"{path} must have one line 'id label,label' for each of the {n_clips} clips of its .tsv")
    return [labels for _, labels in lines]


class Clip(NamedTuple):
    """One item of an AudioDataset."""

    waveform: Tensor  # (S,) float32 or int16, not padded
    index: int  # which item was asked for
    problem: str  # why another clip stands in for it; empty if none does
    item: int  # which item this is


class AudioDataset(Dataset):
    """The clips of a manifest or a packed folder, each cut into pieces of at most `n_frames` frames.

    A clip twice as long as n_frames or longer gives several items, so that hour-long recordings are used to the last
    piece that is full; the released code uses only the first n_frames, as `segments=False` does here. An item that
    cannot be read is replaced by the next that can, always the same one.

    Raises InputError if nothing usable is listed.
    """

    def __init__(
        self, source: str, n_frames: int = CLIP_FRAMES, min_samples: int = FRAME_LENGTH, segments: bool = True
    ):
        self.source, self.is_packed = source, os.path.isdir(source)
        self.shards = _open_packed(source) if self.is_packed else [Manifest(source)]
        if not self.is_packed and not os.path.isdir(self.shards[0].root):
            raise InputError(f"{source}, line 1: there is no folder {self.shards[0].root}")
        self.n_frames, self.hop = n_frames, n_frames * FRAME_SHIFT
        n_samples = torch.cat([shard.n_samples for shard in self.shards])
        long_enough = n_samples >= max(min_samples, FRAME_LENGTH)
        self.clips = long_enough.nonzero().flatten()               # (K,) lines that are used, counted over all shards
        self.too_short = (~long_enough).nonzero().flatten()
        if not len(self.clips):
            raise InputError(f"{source}: no clip has the {min_samples} samples that --min_samples asks for")
        pieces = (n_samples[self.clips] // self.hop).clamp(min=1) if segments else torch.ones_like(self.clips)
        self.last_item = pieces.cumsum(0)                          # (K,) one past the last item of each clip
        self.first_line = torch.tensor([0] + [len(shard) for shard in self.shards]).cumsum(0)
        if self.is_packed:
            self.offsets = [shard.n_samples.cumsum(0) - shard.n_samples for shard in self.shards]

    def __len__(self) -> int:
        return int(self.last_item[-1])

    def digest(self) -> str:
        """Hash of what is listed, labels included, wherever it lies."""
        total = hashlib.sha256()
        for shard in self.shards:
            total.update(shard.text[int(shard.begins[0]) :].numpy().tobytes())
            total.update("\n".join(shard.lbl or []).encode(errors="surrogateescape"))
        return total.hexdigest()

    def locate(self, item: int) -> tuple[int, int, int]:
        """Where an item lies: number of the manifest (one a shard), line in it, piece of that clip."""
        clip = int(torch.searchsorted(self.last_item, item, right=True))
        piece = item - (int(self.last_item[clip - 1]) if clip else 0)
        return *self._line(int(self.clips[clip])), piece

    def _line(self, line: int) -> tuple[int, int]:
        shard = int(torch.searchsorted(self.first_line, line, right=True)) - 1
        return shard, line - int(self.first_line[shard])

    def name(self, item: int) -> str:
        """The file that an item comes from, as its manifest lists it."""
        shard, line, _ = self.locate(item)
        return self.shards[shard].name(line)

    def labels(self, item: int) -> list[str]:
        """Labels of the clip that an item comes from."""
        shard, line, _ = self.locate(item)
        return self.shards[shard].labels(line)

    def short_names(self) -> Iterator[str]:
        """The clips that are left out because they are shorter than min_samples."""
        for line in self.too_short.tolist():
            shard, line = self._line(line)
            yield self.shards[shard].name(line)

    def read(self, item: int, allow_silence: bool = False) -> Tensor:
        """The waveform of an item, (S,) with S <= clip_samples(n_frames). Raises InputError as load_audio does."""
        shard, line, piece = self.locate(item)
        manifest, start, n_samples = self.shards[shard], piece * self.hop, clip_samples(self.n_frames)
        if not self.is_packed:
            try:
                return load_audio(manifest.path(line), start, n_samples, allow_silence)
            except PastEnd:  # the manifest counts another rate's samples, as released ones do, or the file has changed
                if start == 0:
                    raise
                return load_audio(manifest.path(line), 0, n_samples, allow_silence)
        n_samples = min(n_samples, int(manifest.n_samples[line]) - start)
        offset = 2 * (int(self.offsets[shard][line]) + start)
        try:
            pcm = np.memmap(manifest.pcm, "<i2", mode="r", offset=offset, shape=n_samples)
        except (OSError, ValueError) as error:  # the shard has changed since it was opened
            raise InputError(f"{manifest.pcm}: {first_line(error)}") from None
        return torch.from_numpy(np.array(pcm, dtype=np.int16))

    def __getitem__(self, item: int) -> Clip:
        problem = ""
        stand_in, tries = item, min(len(self.clips), 1000)
        for _ in range(tries):
            try:
                return Clip(self.read(stand_in), item, problem, stand_in)
            except InputError as error:
                problem = problem or str(error)
            clip = torch.searchsorted(self.last_item, stand_in, right=True)
            stand_in = int(self.last_item[clip]) % len(self)  # the first piece of the next clip
        raise InputError(f"{self.name(item)} and the {tries - 1} after it: {problem}. Is the data still there?")


def _open_packed(folder: str) -> list[Manifest]:
    """The shards of a packed folder as manifests with an attribute `pcm`, the path of the samples."""
    try:
        names = json.loads(Path(folder, "index.json").read_text())["shards"]
        if not names or not all(re.fullmatch(r"\d{5,}", name) for name in names):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder} is not a packed folder (no valid index.json): run python data.py pack to the end, "
            "or for a folder of audio files python data.py scan"
        ) from None
    shards = []
    for name in names:
        shard = Manifest(Path(folder, f"{name}.tsv"))
        shard.pcm, shard.root = Path(folder, f"{name}.pcm"), ""
        if not shard.pcm.exists() or shard.pcm.stat().st_size != 2 * int(shard.n_samples.sum()):
            raise InputError(f"{shard.pcm} is missing or has the wrong size: remove {name}.tsv and run pack again")
        shards.append(shard)
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def seed_of(purpose: str, *key: int) -> int:
    """A well-mixed 63-bit seed for one purpose, from integers such as (seed, step, clip).

    Randomness is drawn from these, never from the state of a process, so that it does not matter how many there are.
    """
    return int(np.random.SeedSequence([*purpose.encode(), *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ClipSampler:
    """Endless batches of items: a new order every epoch, one epoch after the other without a gap.

    Update s uses the clips s * batch_size ... (s + 1) * batch_size - 1 of that stream, for any number of processes;
    each process takes its share of them, in `accumulate` parts. Iterates over lists of items from update `start` on.
    An epoch is a permutation of all items or, with `weights`, `epoch_items` of them drawn without replacement.
    `mirrored`: a part holds clip i together with clip batch_size - 1 - i, its partner in mixup.
    """

    def __init__(
        self, n_items: int, batch_size: int, seed: int, start: int = 0,
        rank: int = 0, world: int = 1, accumulate: int = 1,
        weights: Tensor | None = None, epoch_items: int = 0, mirrored: bool = False,
    ):  # fmt: skip
        self.n_items, self.batch_size, self.seed, self.start = n_items, batch_size, seed, start
        self.rank, self.accumulate, self.part = rank, accumulate, batch_size // (world * accumulate)
        self.weights, self.mirrored = weights, mirrored
        self.epoch_items = min(epoch_items, n_items) if weights is not None else n_items

    def rows(self, micro: int) -> list[int]:
        """Which clips of an update form this process's micro-batch number `micro`."""
        number = self.rank * self.accumulate + micro
        if self.mirrored:
            first = number * self.part // 2
            front = range(first, first + self.part // 2)
            return [*front, *(self.batch_size - 1 - i for i in reversed(front))]
        return list(range(number * self.part, (number + 1) * self.part))

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.n_items, generator=generator)
        drawn = torch.multinomial(self.weights, self.epoch_items, replacement=False, generator=generator)
        return drawn[torch.randperm(len(drawn), generator=generator)]  # multinomial draws the heaviest first

    def __iter__(self) -> Iterator[list[int]]:
        position, epoch, order = self.start * self.batch_size, -1, None
        while True:
            batch = []
            while len(batch) < self.batch_size:
                if position // self.epoch_items != epoch:
                    epoch = position // self.epoch_items
                    order = self._order(epoch)
                first = position % self.epoch_items
                some = order[first : first + self.batch_size - len(batch)].tolist()
                batch += some
                position += len(some)
            yield from ([batch[i] for i in self.rows(micro)] for micro in range(self.accumulate))


class Batch(NamedTuple):
    """Clips padded to the same length."""

    waveform: Tensor  # (B, S) float32 or int16
    n_samples: Tensor  # (B,) how much of each row is sound
    problems: list[tuple[int, str]]  # (item, what was wrong) where another clip stands in
    items: list[int]  # which items these are


def collate(clips: list[Clip], n_frames: int) -> Batch:
    """Pad clips with zeros to the samples of n_frames frames."""
    dtype = torch.float32 if any(clip.waveform.is_floating_point() for clip in clips) else torch.int16
    waveform = torch.zeros(len(clips), clip_samples(n_frames), dtype=dtype)
    for row, clip in zip(waveform, clips):
        row[: len(clip.waveform)] = clip.waveform
    n_samples = torch.tensor([len(clip.waveform) for clip in clips])
    problems = [(clip.index, clip.problem) for clip in clips if clip.problem]
    return Batch(waveform, n_samples, problems, [clip.item for clip in clips])


def _leave_signals_to_the_parent(_: int) -> None:
    """Loader processes end with their parent; a signal to the whole group must not end them before it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@functools.lru_cache
def _end_loaders_at_exit() -> None:
    """An exception can keep a loader alive to the end, where Python would wait for processes that ignore SIGTERM."""
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])


def build_loader(dataset: AudioDataset, batches, workers: int, pin_memory: bool = False) -> DataLoader:
    """Loads the given batches (lists of items) in order, read ahead by `workers` processes, one a core at most."""
    _end_loaders_at_exit()
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=functools.partial(collate, n_frames=dataset.n_frames),
        num_workers=min(workers, os.cpu_count()),
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        prefetch_factor=4 if workers else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def read_classes(path: str | os.PathLike) -> dict[str, str]:
    """Label -> name of every class, in the order of the file: AudioSet's class_labels_indices.csv, the released
    label_descriptors.csv (index,label, without a header), or a text file with a label on each line.

    Raises InputError if there are none or some twice, or if the indices do not count from 0.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n") for line in file if line.strip()]
        rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the classes in {path}: {first_line(error)}") from None
    if rows and rows[0][0] == "index":
        rows = rows[1:]
    if rows and all(len(row) > 1 and row[0].isdecimal() for row in rows):
        if [int(row[0]) for row in rows] != list(range(len(rows))):
            raise InputError(f"{path}: the indices of the classes do not count from 0")
        rows = [row[1:] for row in rows]
    else:
        rows = [[line] for line in lines]
    classes = {row[0].strip(): row[-1].strip() for row in rows}
    if not classes or len(classes) < len(rows):
        raise InputError(f"{path}: expected every class once, found {len(classes)} in {len(rows)} lines")
    return classes


def find_classes(dataset: AudioDataset) -> dict[str, str]:
    """The labels that occur in a data set, sorted, as classes. Raises InputError if there are none."""
    labels = sorted({label for item in range(len(dataset)) for label in dataset.labels(item)})
    if not labels:
        raise InputError(f"{dataset.source} has no labels: its third column, path<TAB>n_samples<TAB>label,label")
    return {label: label for label in labels}


def read_targets(dataset: AudioDataset, classes: dict[str, str]) -> Tensor:
    """Which classes each item has: (n, C) bool. Raises InputError naming a clip without a label or with another one."""
    index = {label: i for i, label in enumerate(classes)}
    targets = torch.zeros(len(dataset), len(classes), dtype=torch.bool)
    for item in range(len(dataset)):
        labels = dataset.labels(item)
        if not labels:
            raise InputError(f"{dataset.source}: {dataset.name(item)} has no label (third column)")
        for label in labels:
            if label not in index:
                known = ", ".join(list(index)[:5])
                raise InputError(
                    f"{dataset.source}: {dataset.name(item)} has the label {label!r}, "
                    f"which is not one of the {len(index)} classes ({known} ...)"
                )
            targets[item, index[label]] = True
    return targets


def sampling_weights(targets: Tensor) -> Tensor:
    """How often each clip is drawn so that rare classes are heard: (n, C) -> (n,) float64.

    The sum over a clip's labels of 1000 / (clips with that label + 0.01): the recipe of AST (Gong et al. 2021,
    github.com/YuanGongND/ast, egs/audioset/gen_weight_file.py), on which the released EAT weights are understood to
    rest; its own file is not published.
    """
    clip, label = targets.nonzero().unbind(1)
    rarity = 1000 / (torch.bincount(label, minlength=targets.shape[1]) + 0.01).double()
    return torch.zeros(len(targets), dtype=torch.float64).index_add_(0, clip, rarity[label])


# ---------------------------------------------------------------------------------------------------------------------
# Commands: scan, stats, pack, and manifests of three data sets


class _Reader(Dataset):
    """Whole files, or the items of an AudioDataset, without stand-ins: (index, waveform or None, problem)."""

    def __init__(self, read: Callable[[int], Tensor], indices: Iterable[int]):
        self.read, self.indices = read, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, str]:
        try:
            return self.indices[i], self.read(self.indices[i]), ""
        except InputError as error:
            return self.indices[i], None, str(error)


def read_all(read: Callable[[int], Tensor], indices: Iterable[int], workers: int) -> DataLoader:
    """Iterates over (index, waveform or None, problem) in order, `workers` processes ahead."""
    _end_loaders_at_exit()
    options = dict(num_workers=max(0, workers), worker_init_fn=_leave_signals_to_the_parent)
    return DataLoader(_Reader(read, indices), batch_size=None, **options)


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Write a text file so that it is there in full or not at all."""
    with open(f"{path}.tmp", "w", errors="surrogateescape") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _walk(folder: str, refused: list[OSError]) -> Iterator[Path]:
    """Everything below a folder, through links but not in circles; folders that cannot be opened go to `refused`."""
    seen = set()
    for where, subfolders, names in os.walk(folder, followlinks=True, onerror=refused.append):
        if os.path.realpath(where) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(where))
        yield from (Path(where, name) for name in names)


def count_samples(path: str | os.PathLike) -> tuple[int, str]:
    """What a file's header says: (samples at 16 kHz, why it cannot be used or "")."""
    import soundfile

    try:
        info = soundfile.info(os.fsencode(path))
        n_samples = info.frames * SAMPLE_RATE // max(info.samplerate, 1)
    except Exception as error:  # whatever libsndfile makes of a damaged file
        return 0, _why(error, path)
    if n_samples >= MAX_SAMPLES:
        return n_samples, "claims more than 37 hours: its header is wrong, convert it"
    return n_samples, "" if n_samples >= FRAME_LENGTH else "shorter than one frame of 25 ms"


def find_audio(folder: str) -> tuple[list[Path], int, list[tuple[str, str]]]:
    """Audio files below a folder, sorted, the number of other files, and folders that cannot be opened, with reasons.

    Raises InputError if there is no such folder or no audio in it.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder")
    refused: list[OSError] = []
    files = sorted(path for path in _walk(folder, refused) if path.is_file())
    paths = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    if not paths:
        raise InputError(f"no audio files below {folder} (looked for {' '.join(sorted(AUDIO_SUFFIXES))})")
    problems = [(os.path.relpath(error.filename, folder), f"folder: {error.strerror}") for error in refused]
    return paths, len(files) - len(paths), problems


def write_manifest(output: str, folder: str, files: list[tuple[Path, str]], bad: list[tuple[str, str]]) -> str:
    """Write a manifest of (file below folder, labels); what cannot be used goes, with `bad`, to `output`.bad.

    Returns what to tell the user. Raises InputError if one of the two exists or no file can be used.
    """
    if "\n" in os.path.abspath(folder):
        raise InputError(f"the name of {folder!r} holds a line break: a manifest cannot hold it")
    for path in (output, f"{output}.bad"):
        if os.path.exists(path):
            raise InputError(f"{path} exists: remove it or choose another name")

    def measure(file: tuple[Path, str]) -> tuple[str, int, str, str]:
        name, labels = os.fspath(file[0].relative_to(folder)), file[1]
        if "\t" in name + labels or "\n" in name + labels:
            return name, 0, labels, "its name or label holds a tab or a line break"
        n_samples, problem = count_samples(file[0])
        return name, n_samples, labels, problem

    with ThreadPoolExecutor() as pool:  # libsndfile works outside Python's lock
        rows = list(tqdm(pool.map(measure, files), total=len(files), desc="scan", unit="file"))
    good, bad = [row for row in rows if not row[3]], [(row[0], row[3]) for row in rows if row[3]] + bad
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    if bad:
        write_lines(f"{output}.bad", (f"{name!r}\t{problem}" for name, problem in bad))
    if not good:
        raise InputError(f"none of the {len(bad)} audio files below {folder} can be read: see {output}.bad")
    lines = ("\t".join([name, str(n_samples), labels][: 3 if labels else 2]) for name, n_samples, labels, _ in good)
    write_lines(output, [os.path.abspath(folder), *lines])
    hours = sum(row[1] for row in good) / SAMPLE_RATE / 3600
    left_out = f"; {len(bad)} left out, listed in {output}.bad" if bad else ""
    return f"{output}: {len(good)} clips, {hours:.2f} h{left_out}"


def scan(folder: str, output: str, labels: bool = False) -> None:
    """Write a manifest of every audio file below `folder`; files that cannot be used go to `output`.bad.

    With `labels`, each is labelled by the folder it lies in. Raises InputError if one lies in none below `folder`.
    """
    paths, n_others, refused = find_audio(folder)
    if labels and (loose := next((path for path in paths if path.parent == Path(folder)), None)):
        raise InputError(f"{loose} lies in no folder below {folder} that could label it (--labels)")
    files = [(path, path.parent.name if labels else "") for path in paths]
    for _, label in files:
        _refuse_comma(label)
    said = write_manifest(output, folder, files, refused)
    print(said + (f"; {n_others} files of other kinds" if n_others else ""))


def read_csv(path: str | os.PathLike, **format) -> list[list[str]]:
    """Rows of a table without its lines that begin with '#'. Raises InputError if it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.reader((line for line in file if not line.startswith("#")), **format) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


def _refuse_comma(label: str) -> None:
    if "," in label:
        raise InputError(f"the class {label!r} holds a comma, which stands between labels in a manifest: rename it")


def esc50(folder: str, output: str) -> None:
    """Manifests of ESC-50's five folds: trainK.tsv and testK.tsv, where testK.tsv is fold K and trainK.tsv the others.

    `folder` is laid out as published: meta/esc50.csv (filename, fold, target, category, ...) and audio/.
    """
    rows = read_csv(Path(folder, "meta", "esc50.csv"))
    header, rows = rows[0] if rows else [], rows[1:]
    if not {"filename", "fold", "category"} <= set(header) or not rows or any(len(r) != len(header) for r in rows):
        raise InputError(f"{folder}/meta/esc50.csv is not the table of ESC-50: it begins with {','.join(header)}")
    clips = [dict(zip(header, row)) for row in rows]
    for clip in clips:
        name = clip["filename"]
        if not clip["fold"].isdecimal() or os.path.basename(name) != name or not clip["category"]:
            raise InputError(f"{folder}/meta/esc50.csv: {name!r} has no fold or class, or lies elsewhere")
        _refuse_comma(clip["category"])
    if len({clip["fold"] for clip in clips}) < 2:
        raise InputError(f"{folder}/meta/esc50.csv has one fold only: there is nothing to train on")
    audio = Path(folder, "audio")
    missing = [(clip["filename"], "no such file") for clip in clips if not (audio / clip["filename"]).is_file()]
    absent = {name for name, _ in missing}
    for fold in sorted({clip["fold"] for clip in clips}):
        for part in ("train", "test"):
            mine = [clip for clip in clips if (clip["fold"] == fold) == (part == "test")]
            files = [(audio / clip["filename"], clip["category"]) for clip in mine if clip["filename"] not in absent]
            lost = [(clip["filename"], "no such file") for clip in mine if clip["filename"] in absent]
            print(write_manifest(f"{output}/{part}{fold}.tsv", str(audio), files, lost))


def speechcommands(folder: str, output: str) -> None:
    """Manifests of Speech Commands with its official split: train.tsv, valid.tsv and test.tsv.

    `folder` is laid out as published: a folder a word, validation_list.txt and testing_list.txt.
    """
    listed: dict[str, str] = {}
    for part, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        try:
            listed |= dict.fromkeys(Path(folder, name).read_text().split("\n"), part)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {folder}/{name}: {first_line(error)}") from None
    listed.pop("", None)
    paths, _, _ = find_audio(folder)
    files: dict[str, list] = dict(train=[], valid=[], test=[])
    for path in paths:
        relative = path.relative_to(folder)
        if len(relative.parts) == 2 and not relative.parts[0].startswith("_"):  # _background_noise_ is not a word
            _refuse_comma(relative.parts[0])
            files[listed.pop(relative.as_posix(), "train")].append((path, relative.parts[0]))
    for part in files:
        missing = [(name, "no such file") for name, where in listed.items() if where == part]
        print(write_manifest(f"{output}/{part}.tsv", folder, files[part], missing))


def audioset(segments: str, labels: str, folder: str, output: str) -> None:
    """A manifest of the clips of an AudioSet list that are below `folder`; the missing ones go to `output`.bad.

    `segments` as published (YTID, start, end, "label,label"), `labels` is class_labels_indices.csv; a clip's file is
    known by the 11 characters of its YTID at the beginning of the name, or behind a Y.
    """
    known = read_classes(labels)
    rows = read_csv(segments, skipinitialspace=True)
    if not rows or any(len(row) < 4 for row in rows):
        raise InputError(f"{segments} is not a list of AudioSet segments: YTID, start_seconds, end_seconds, labels")
    by_id = {}
    for path in find_audio(folder)[0]:
        if len(path.stem) > 11 and path.stem[0] == "Y":
            by_id.setdefault(path.stem[1:12], path)
        if len(path.stem) == 11 or path.stem[11:12] in ("_", "-", "."):
            by_id[path.stem[:11]] = path
    files, missing = [], []
    for row in rows:
        tags = row[3].split(",")
        if unknown := [tag for tag in tags if tag not in known]:
            raise InputError(f"{segments}: {row[0]} has the label {unknown[0]!r}, which {labels} does not list")
        if row[0] in by_id:
            files.append((by_id[row[0]], ",".join(tags)))
        else:
            missing.append((row[0], "no such file"))
    print(write_manifest(output, folder, files, missing) + f"; {len(missing)} of {len(rows)} clips missing")


def stats(source: str, max_clips: int, workers: int) -> tuple[float, float]:
    """Mean and std of the log-mel values, padding excluded, of up to max_clips clips spread evenly over a manifest."""
    dataset = AudioDataset(source)
    items = torch.linspace(0, len(dataset) - 1, max(1, min(max_clips, len(dataset)))).long().tolist()
    total, total_square, count, n_bad = 0.0, 0.0, 0, 0
    for _, waveform, problem in tqdm(read_all(dataset.read, items, workers), desc="stats", unit="clip"):
        if problem:
            n_bad += 1
            continue
        spec = log_mel(waveform).double()
        total, total_square, count = total + spec.sum(), total_square + spec.square().sum(), count + spec.numel()
    if not count:
        raise InputError(f"none of the {n_bad} clips of {source} can be read")
    mean = total / count
    std = (total_square / count - mean**2).sqrt()
    print(f"--norm_mean {mean:.3f} --norm_std {std:.3f}    # {len(items) - n_bad} clips, {n_bad} that cannot be read")
    return float(mean), float(std)


def pack(source: str, folder: str, workers: int) -> None:
    """Decode a manifest's clips into a packed folder (layout at the top of this file).

    Started again, it goes on at the shard it was writing; at the end every shard is read back and compared with its
    checksum. Clips that cannot be used are left out and listed in `bad_files.tsv`.
    Raises InputError if the folder was packed from another manifest, or if a shard fails its check.
    """
    manifest, target = Manifest(source), Path(folder)
    digest = hashlib.sha256(manifest.text.numpy().tobytes()).hexdigest()
    plan = dict(sample_rate=SAMPLE_RATE, shard_samples=SHARD_SAMPLES, clips=len(manifest), manifest=digest)
    target.mkdir(parents=True, exist_ok=True)
    plan_path, index_path = target / "plan.json", target / "index.json"
    if plan_path.exists() and plan_path.read_text().strip() != json.dumps(plan):
        raise InputError(f"{folder} was packed from another manifest or by another version: choose an empty folder")
    if not plan_path.exists() and any(target.iterdir()):
        raise InputError(f"{folder} is not empty: choose an empty folder")
    write_lines(plan_path, [json.dumps(plan)])

    shard_of = (manifest.n_samples.cumsum(0) - manifest.n_samples) // SHARD_SAMPLES  # by what the manifest says
    names, first = [], 0
    with tqdm(total=len(manifest), desc="pack", unit="clip") as progress:
        for count in shard_of.unique_consecutive(return_counts=True)[1].tolist():
            names.append(f"{len(names):05d}")
            if (target / f"{names[-1]}.tsv").exists():
                progress.update(count)
            else:
                _pack_shard(manifest, range(first, first + count), target / names[-1], workers, progress)
            first += count

    for name in tqdm(names, desc="check", unit="shard"):
        with open(target / f"{name}.tsv") as file:
            expected = file.readline().strip()
        if not (target / f"{name}.pcm").exists() or _crc(target / f"{name}.pcm") != expected:
            raise InputError(f"{target / name}.pcm does not match its checksum: remove {name}.tsv and run pack again")
    names = [name for name in names if (target / f"{name}.pcm").stat().st_size]  # a shard of bad files is empty
    if not names:
        raise InputError(f"no clip of {source} can be read: see {target}/*.bad")
    bad = [line for path in sorted(target.glob("*.bad")) for line in path.read_text().splitlines()]
    if bad:
        write_lines(target / "bad_files.tsv", bad)
    write_lines(index_path, [json.dumps(dict(plan, shards=names))])
    left_out = f"; {len(bad)} left out, listed in {target / 'bad_files.tsv'}" if bad else ""
    print(f"{folder}: {len(manifest) - len(bad)} clips, shards: {len(names)}{left_out}")


def _pack_shard(manifest: Manifest, lines: range, stem: Path, workers: int, progress: tqdm) -> None:
    good, bad = [], []
    with open(f"{stem}.pcm", "wb") as file:
        for i, waveform, problem in read_all(functools.partial(_read_int16, manifest), lines, workers):
            progress.update()
            if problem:
                bad.append(f"{manifest.name(i)}\t{problem}")
                continue
            file.write(waveform.numpy().astype("<i2").tobytes())
            labels = ",".join(manifest.labels(i))
            good.append("\t".join([manifest.name(i), str(len(waveform)), labels][: 3 if labels else 2]))
        file.flush()
        os.fsync(file.fileno())
    if bad:
        write_lines(f"{stem}.bad", bad)
    write_lines(f"{stem}.tsv", [_crc(Path(f"{stem}.pcm")), *good])  # its presence says that the shard is complete


def _read_int16(manifest: Manifest, i: int) -> Tensor:
    """A whole file as int16, decoded piece by piece: an hour takes no more memory than it has samples."""
    path, pieces = manifest.path(i), []
    while not pieces or len(pieces[-1]) == CLIP_FRAMES * FRAME_SHIFT:
        if len(pieces) * CLIP_FRAMES * FRAME_SHIFT > MAX_SAMPLES:
            raise InputError("goes on for more than 37 hours: cut it")
        try:
            piece = _decode(path, len(pieces) * CLIP_FRAMES * FRAME_SHIFT, CLIP_FRAMES * FRAME_SHIFT)
        except PastEnd:
            if not pieces:
                raise
            break  # the file ends with a full piece
        if not piece.abs().max() <= LOUDEST:
            raise InputError(f"its samples are not audio: the largest is {piece.abs().max()}")
        pieces.append((piece * 32768).round().clamp(-32768, 32767).to(torch.int16))
    waveform = torch.cat(pieces)
    if len(waveform) < FRAME_LENGTH:
        raise InputError(f"too short: {len(waveform)} samples at 16 kHz, a frame needs {FRAME_LENGTH}")
    if not waveform.any():
        raise InputError("silent")
    return waveform


def _crc(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"crc32:{crc:08x}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("scan", help="write a manifest of every audio file below a folder")
    command.add_argument("folder")
    command.add_argument("-o", "--output", required=True)
    command.add_argument("--labels", action="store_true", help="label each file by the folder it lies in")
    command = commands.add_parser("esc50", help="manifests of ESC-50's folds")
    command.add_argument("folder", help="ESC-50-master: meta/esc50.csv and audio/")
    command.add_argument("-o", "--output", required=True, help="folder for train1.tsv, test1.tsv, ...")
    command = commands.add_parser("speechcommands", help="manifests of Speech Commands' official split")
    command.add_argument("folder", help="a folder a word, validation_list.txt, testing_list.txt")
    command.add_argument("-o", "--output", required=True, help="folder for train.tsv, valid.tsv, test.tsv")
    command = commands.add_parser("audioset", help="manifest of AudioSet clips")
    command.add_argument("segments", help="balanced_train_segments.csv, for example")
    command.add_argument("labels", help="class_labels_indices.csv")
    command.add_argument("folder", help="where the clips are")
    command.add_argument("-o", "--output", required=True, help="manifest")
    command = commands.add_parser("stats", help="print the mean and std to normalise with")
    command.add_argument("source", help="manifest or packed folder")
    command.add_argument("--max_clips", type=int, default=10_000)
    command.add_argument("--workers", type=int, default=os.cpu_count())
    command = commands.add_parser("pack", help="decode a manifest's clips once into large files")
    command.add_argument("source", help="manifest")
    command.add_argument("folder")
    command.add_argument("--workers", type=int, default=os.cpu_count())
    args = vars(parser.parse_args())
    try:
        {f.__name__: f for f in (scan, stats, pack, esc50, speechcommands, audioset)}[args.pop("command")](**args)
    except (InputError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; pack goes on where it was, the others begin anew")


if __name__ == "__main__":
    main()
