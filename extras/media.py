"""Whole audio files: find them, count and decode them from end to end, past their damage, and read with PyAV
(pip install av) what libsndfile does not: m4a, mp4, mov, aac, webm, mka, mkv, wma, amr, ape.

    find_audio      the audio files below a folder
    count_samples   how many samples load_audio can read from a file, and what the user should know of it
    stream          a whole file in pieces, decoded once from its beginning to its end
    open_other      the reader that data.open_audio uses for what libsndfile refuses
    what_is         what a file is that is neither audio nor weights

mp3, Vorbis, Opus and what PyAV reads are counted by decoding, others by their header and a read at the end.
Bytes after what was read are sound that a header leaves out, unless they are padding, tags or chunks.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from data import (
    CLIP_FRAMES, FILTER_REACH, FRAME_LENGTH, MAX_SAMPLES, SAMPLE_RATE, InputError, clip_samples, load_audio,
    open_audio, resample, whole_rate,
)  # fmt: skip
from extras.ogg import MARGIN, PartFile, find_parts, is_ogg, last_page

# Read by PyAV
OTHER_SUFFIXES = ".m4a .m4b .m4v .mp4 .mov .3gp .aac .webm .mka .mkv .wma .amr .ape".split()
AUDIO_SUFFIXES = set(".wav .wave .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .aifc .au .snd .caf".split())
AUDIO_SUFFIXES.update([".w64", ".rf64", *OTHER_SUFFIXES])
TOOL_FOLDERS = {
    "__macosx", "@eadir", "$recycle.bin", "lost+found", "#recycle", "@recycle", "system volume information",
}  # fmt: skip
MAGIC = [
    ("webm", b"\x1aE\xdf\xa3"), ("wma", b"0&\xb2u"), ("amr", b"#!AMR"), ("ape", b"MAC "), ("ogg", b"OggS"),
    ("aac", b"\xff\xf1"), ("aac", b"\xff\xf9"),
]  # fmt: skip
# What FFmpeg may use: no demuxer of playlists; Ogg for the codecs that libsndfile does not read there
DEMUXERS = "aac,amr,amrnb,amrwb,ape,asf,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,ogg"
DECODERS = (
    "aac,aac_latm,ac3,eac3,alac,amrnb,amrwb,ape,flac,mp3,mp3float,opus,vorbis,wmav1,wmav2,wmapro,wmalossless,"
    "wmavoice,pcm_u8,pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be"
)
FLAC_HEAD = b"fLaC\0\0\0\x22"
BLOCK = 16_384  # frames decoded at a time
WARM_UP = 4608  # frames that may be wrong where decoding begins anew in an mp3
LEFT_OVER = 0.5  # seconds behind the claimed end that need not be sound
SHORTEST_GAP = 0.5  # seconds between the times of two packets: more than this is missing sound,
SHORTEST_GAP_OGG = 0.01  # in Ogg, whose times are exact
LONGEST_GAP = 60.0  # and more than this is a clock that was reset
LONGEST_HOLE = 2**20  # bytes of an mp3 in which the end of damage is looked for
MOST_BOXES = 100_000  # of an mp4 file: a day in parts of a second
MOST_HEADS = 50  # of an mp3: a frame begins at one of the first that look like one
MP3_HEAD = re.compile(rb"\xff[\xe2-\xfe]")  # of a frame
SLACK = 575  # frames that may be missing without a remark: less than a frame of mp3


# ----- Files below a folder --------------------------------------------------------------------------------


def find_audio(folder: str | os.PathLike) -> list[Path]:
    """Audio files below a folder, sorted; through links, but not in circles. Hidden files and the folders of
    tools are left out, with a line on stderr. Raises InputError if there are none."""

    def warn(error: OSError) -> None:
        print(f"WARNING: {error.filename} cannot be opened: {error.strerror}", file=sys.stderr)

    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder")
    paths = []
    hidden = []
    seen = set()
    for where, subfolders, names in os.walk(folder, followlinks=True, onerror=warn):
        links = {name for name in subfolders if os.path.islink(os.path.join(where, name))}
        subfolders.sort(key=lambda name: (name in links, name))  # a folder goes before links to it
        in_tool = any(map(is_hidden, Path(where).relative_to(folder).parts))
        place = (os.path.realpath(where), in_tool)  # what a tool's folder links to may be met again
        if place in seen:
            subfolders.clear()
            continue
        seen.add(place)
        for name in names:
            path = Path(where, name)
            suffix = os.path.splitext(name)[1].lower()
            if suffix in AUDIO_SUFFIXES and (in_tool or is_hidden(name)):
                hidden.append(path)
            elif suffix in AUDIO_SUFFIXES:
                paths.append(path)
            elif not suffix and not in_tool and not os.path.exists(path):  # it may have been a folder
                warn(FileNotFoundError(2, "a broken link", str(path)))
    real = os.path.realpath(folder)
    listed = set(paths)
    twice = []
    for path in filter(os.path.islink, paths):
        target = Path(os.path.realpath(path))
        if target.is_relative_to(real) and Path(folder, target.relative_to(real)) in listed:
            twice.append(path)
    if twice:
        first = min(twice).relative_to(folder)
        print(f"links to files that are listed as well: {len(twice)}, such as {first}", file=sys.stderr)
    if hidden:
        first = min(hidden).relative_to(folder)
        print(f"left out: {len(hidden)} files that are hidden or a tool's, such as {first}", file=sys.stderr)
    if not paths:
        raise InputError(f"no audio files below {folder} (looked for {' '.join(sorted(AUDIO_SUFFIXES))})")
    return sorted(paths)


def is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in TOOL_FOLDERS


def what_is(path: str | os.PathLike) -> str:
    """What a file mistaken for audio or weights really is, or why it cannot be opened; "" if not known."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        return error.strerror
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if not head:
        return "empty"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run git lfs pull"
    if re.match(rb"<!doctype html|<.*<html|<html", text, re.IGNORECASE | re.DOTALL):
        return "an HTML page: download the file again"
    if re.match(rb"<\?xml|<\w+>", text):
        return "an XML page: download the file again"
    if re.search(rb"[^\s -\xff]", head) is None:  # no control characters
        return f"a text file, {text[:40].decode('utf-8', 'replace')!r}"
    return ""


# ----- What libsndfile does not read -----------------------------------------------------------------------


def container_of(path: str | os.PathLike) -> str:
    """The kind of a file that PyAV may read, by its name or its first bytes; "" if it is none."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix in OTHER_SUFFIXES:
        return suffix[1:]
    with open(path, "rb") as file:
        head = file.read(16)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "mp4"
    for kind, magic in MAGIC:
        if head.startswith(magic):
            return kind
    return ""


def open_other(path: str | os.PathLike, error: soundfile.LibsndfileError) -> "MediaFile":
    """Open with PyAV what libsndfile refused with `error`. Raises InputError, which says what the file is."""
    what = what_is(path)
    if what:
        raise InputError(what)
    kind = container_of(path)
    if not kind:
        reason = error.error_string.rstrip(".")
        raise InputError(f"unreadable: {reason}: if it is audio, convert it with ffmpeg")
    try:
        import av
    except ImportError:
        raise InputError(f"{kind}: pip install av, or convert with ffmpeg") from None
    try:
        return MediaFile(path, kind)
    except av.FFmpegError as av_error:
        raise InputError(f"{kind}, unreadable: {av_error.strerror}") from None


class MediaFile:
    """A file that FFmpeg decodes, with the methods of soundfile.SoundFile that reading forward needs.
    Damaged packets become silence of their length; `read` raises InputError there, so that training names the
    piece, and `blocks` goes on. Nothing in the file can lead to another file or address."""

    format = "AV"
    subtype = ""

    def __init__(self, path: str | os.PathLike, kind: str):
        import av

        self.error = av.FFmpegError
        self.file = open(path, "rb")
        options = dict(fd=str(self.file.fileno()), protocol_whitelist="fd", format_whitelist=DEMUXERS)
        options.update(codec_whitelist=DECODERS, max_probe_packets="1")
        self.container = av.open("fd:", container_options=options)
        self.track = self.container.streams.best("audio")
        self.samplerate = 0
        self.channels = 0
        self.position = 0  # the next frame
        self.source = fill_gaps(self.decode())
        self.left = b""  # decoded, not read
        self.is_good = True  # whether that is sound
        self.claimed = 0  # frames
        self.slack = 0  # frames by which the claim may be wrong
        try:
            self.begin(kind)
        except BaseException:
            self.__exit__()
            raise
        # The true number is known only at the end; load_audio reads what there is, up to this many
        self.frames = (MAX_SAMPLES - 2**26) * self.samplerate // SAMPLE_RATE

    def begin(self, kind: str) -> None:
        """Decode the first frames, which tell rate and channels. Raises InputError."""
        if self.track is None:
            raise InputError(f"this {kind} has no sound")
        codec = self.track.codec_context
        if codec is None or codec.name not in DECODERS.split(","):
            raise InputError(f"the sound of this {kind} has a codec that is not read: convert it with ffmpeg")
        codec.options = dict(err_detect="crccheck+explode")
        self.left, self.is_good = next(self.source, (b"", True))
        if not len(self.left):
            raise InputError(f"nothing of this {kind} can be decoded")
        self.claimed = round(self.claimed_seconds() * self.samplerate)
        self.slack = self.samplerate // 10
        if "matroska" in self.container.format.name and self.container.streams.video:  # it may be longer
            self.slack += self.claimed // 50

    def claimed_seconds(self) -> float:
        """How long the container says that the sound is, 0 if it does not say."""
        form = self.container.format.name
        end = (self.container.duration or 0) / 1_000_000
        if form == "aac":
            return 0  # there it is a guess
        if "matroska" not in form:
            return float((self.track.duration or 0) * self.track.time_base) or end
        tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", self.track.metadata.get("DURATION", ""))
        if tag:  # of the sound alone
            hours, minutes, seconds = map(float, tag.groups())
            end = min(end or math.inf, 3600 * hours + 60 * minutes + seconds)
        start = float((self.track.start_time or 0) * self.track.time_base)
        return max(0, end - max(0, start))  # both are times of a clock that need not begin with 0

    def decode(self) -> Iterator[np.ndarray | int]:
        """Arrays (n, C) and, for what is damaged, the number of frames."""
        packets = self.container.demux(self.track)
        shortest = SHORTEST_GAP
        if self.container.format.name == "ogg":
            shortest = SHORTEST_GAP_OGG
        clock = 0.0  # seconds at which the last packet began
        n_since = 0  # frames since then
        while True:
            try:
                packet = next(packets, None)
            except self.error:  # the container itself is damaged or cut
                return
            if packet is None:
                return
            rate = self.samplerate or self.track.codec_context.sample_rate
            if packet.pts is not None:
                before = clock
                clock = float(packet.pts * packet.time_base)
                missing = round((clock - before) * rate) - n_since
                n_since = 0
                if self.samplerate and shortest < missing / rate < LONGEST_GAP:
                    yield missing  # FFmpeg passed over packets
            try:
                frames = packet.decode()
            except self.error:
                gap = round(min(1.0, float((packet.duration or 0) * packet.time_base)) * rate)
                n_since += gap
                yield gap
                continue
            for frame in frames:
                form = (frame.sample_rate, frame.layout.nb_channels)
                if not self.samplerate:
                    self.samplerate, self.channels = form
                if form != (self.samplerate, self.channels):
                    raise InputError("its sample rate or number of channels changes: convert it with ffmpeg")
                n_since += frame.samples
                yield to_float(frame)

    def take(self, frames: int) -> tuple[np.ndarray, bool]:
        """The next frames, (n, C), at most `frames`, and none only at the end; and whether they are sound."""
        if not len(self.left):
            self.left, self.is_good = next(self.source, (self.left, True))
        block = self.left[:frames]
        self.left = self.left[frames:]
        self.position += len(block)
        return block, self.is_good

    def blocks(self) -> Iterator[tuple[np.ndarray, bool]]:
        """The rest of the file: (n, C) float32, and whether it is sound or silence in place of damage."""
        block, is_good = self.take(BLOCK)
        while len(block):
            yield block, is_good
            block, is_good = self.take(BLOCK)

    def seekable(self) -> bool:
        return True

    def seek(self, frame: int) -> int:
        """Decode and drop what lies before `frame`; only forward."""
        if frame - self.position > 60 * self.samplerate:
            say_slow()
        while self.position < frame:
            block, _ = self.take(frame - self.position)
            if not len(block):
                break
        return self.position

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """The next frames, (n, C) float32, fewer only at the end. Raises InputError if they are damaged."""
        blocks = [self.left[:0]]
        end = self.position + frames
        while self.position < end:
            block, is_good = self.take(end - self.position)
            if not is_good:
                raise InputError(f"damaged at {(self.position - len(block)) / self.samplerate:.1f} s")
            if not len(block):
                break
            blocks.append(block)
        return np.concatenate(blocks)

    def __enter__(self) -> "MediaFile":
        return self

    def __exit__(self, *error) -> None:
        self.source.close()
        self.container.close()
        self.file.close()


def to_float(frame) -> np.ndarray:
    """An av.AudioFrame -> (n, C) float32 in [-1, 1]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    if samples.dtype.kind == "u":
        samples = samples / full_scale - 1
    if samples.dtype.kind == "i":
        samples = samples / full_scale
    return np.ascontiguousarray(samples.T, np.float32)


def fill_gaps(parts: Iterator[np.ndarray | int]) -> Iterator[tuple[np.ndarray, bool]]:
    """Arrays (n, C) and lengths of gaps -> (array, whether it is sound): silence in the gaps, but not at the
    end, where there is just less."""
    gap = 0
    for part in parts:
        if isinstance(part, int):
            gap += part
        elif len(part):
            while gap:
                n = min(gap, BLOCK)
                yield np.zeros((n, part.shape[1]), np.float32), False
                gap -= n
            yield part, True


@functools.cache  # once in a process
def say_slow() -> None:
    print("m4a, webm and the like are decoded from their beginning for every piece, which is slow in long "
          "files: `prepare.py pack` decodes them once", file=sys.stderr)  # fmt: skip


# ----- Whole files -----------------------------------------------------------------------------------------


class NoSeek(soundfile.SoundFile):
    """A SoundFile that does not seek after each read: an mp3 frame uses bits of earlier frames, which a seek
    makes libmpg123 forget."""

    def seekable(self) -> bool:
        return False


class Forward(NoSeek):
    """The same from a byte of an open file on, read by its descriptor."""

    def __init__(self, raw, byte: int = 0):
        raw.seek(byte)
        super().__init__(raw.fileno(), closefd=False)


def read_block(file: soundfile.SoundFile, n: int) -> np.ndarray:
    """At most n frames, (n, C) float32; none at the end and at damage."""
    try:
        return file.read(n, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return np.zeros((0, file.channels), np.float32)


def drop(file: soundfile.SoundFile, n: int) -> None:
    """Read and discard the next n frames, or as many as there are."""
    while n > 0:
        block = read_block(file, min(BLOCK, n))
        if not len(block):
            return
        n -= len(block)


class WholeFile:
    """A file decoded once, from its beginning to its end, in bounded memory; `open_whole` makes it.
    libsndfile reads `raw` by its descriptor, so that raw.tell() says how far it has read."""

    def __init__(self, file, raw):
        self.file = file
        self.raw = raw
        self.first_byte = 0  # of the sound
        self.origin = 0  # the byte at which libsndfile opens it
        if file.format != "AV":
            if is_mpeg(file):
                self.origin = first_frame(raw)
            self.file = Forward(raw, self.origin)
            self.first_byte = raw.tell()
        self.rate = whole_rate(file.samplerate)
        self.claimed = claimed_frames(self.file)
        if is_ogg(file):
            self.claimed = max(self.claimed, last_page(file, raw))
        if file.format == "AV" and "mov" in file.container.format.name and holds_several_mp4(raw):
            raise InputError("holds several files, joined end to end: convert it")
        if self.claimed > 2**62:
            raise InputError("its header does not say how long it is: convert it")
        if self.claimed * SAMPLE_RATE // self.rate >= MAX_SAMPLES:
            hours = self.claimed / self.rate / 3600
            raise InputError(f"claims {hours:.0f} hours: its header is wrong, convert it")
        self.decoded = 0  # frames, with the silence in place of damage
        self.damaged = 0  # frames of that silence
        self.readable = 0  # frames that load_audio can reach
        self.is_broken = False  # whether the decoder gave up on damage
        self.behind = 0  # bytes of sound behind what the header claims
        self.missed = 0.0  # and their seconds

    def reaches_end(self) -> bool:
        """Whether the header counts frames, so that decoding is not needed, and the last one can be read."""
        file = self.file
        if file.format == "AV" or is_mpeg(file) or is_ogg(file):
            return False
        try:
            file.seek(self.claimed - 1)
            if not len(file.read(1)):
                return False
        except soundfile.LibsndfileError:
            return False
        self.decoded = self.claimed
        self.readable = self.claimed
        self.look_behind()
        return True

    def blocks(self) -> Iterator[tuple[Tensor, bool]]:
        """The whole file: (n,) mono float32, and whether it is sound or silence in place of damage."""
        if self.file.format == "AV":
            blocks = self.file.blocks()
        elif is_ogg(self.file):
            blocks = fill_gaps(self.decode_ogg())
        else:
            blocks = fill_gaps(self.decode())
        for block, is_good in blocks:
            channels = block.shape[1]
            yield torch.from_numpy(block) @ torch.full((channels,), 1 / channels), is_good  # mean(1), quickly
            self.decoded += len(block)
            if not is_good:
                self.damaged += len(block)
        if not self.is_broken or not is_mpeg(self.file):
            self.readable = self.decoded
        if self.file.format != "AV" and self.decoded >= self.claimed:
            self.look_behind()

    def decode(self) -> Iterator[np.ndarray | int]:
        """What libsndfile decodes: arrays (n, C) and, for what is damaged, the number of frames."""
        self.file = Forward(self.raw, self.origin)
        is_mp3 = is_mpeg(self.file)
        at = 0
        left = self.file.frames  # to read more would be an error in FLAC
        while left > 0 or (is_mp3 and self.is_broken):  # behind damage libmpg123 only guesses how many
            block = ()
            has_failed = False
            try:
                block = self.file.read(min(BLOCK, left), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                has_failed = True
            if len(block):
                yield block
                at += len(block)
                left -= len(block)
                continue
            gap = 0
            if is_mp3:
                gap = self.go_on_in_mp3(at)
            elif has_failed:
                gap = self.go_on(at)
            if (gap or has_failed) and not self.is_broken:
                self.is_broken = True
                self.readable = at
            if not gap:
                return
            yield gap
            at += gap
            left = self.file.frames - at
            if is_mp3:
                left = self.file.frames - WARM_UP

    def decode_ogg(self) -> Iterator[np.ndarray | int]:
        """The same of Vorbis and Opus; if pages are lost, each part between them by itself."""
        rate = self.file.samplerate
        n_frames = self.file.frames
        found = find_parts(self.raw, rate)
        if len(found.parts) < 2:
            yield from self.decode()
            return
        skip = found.skip * rate // found.clock
        first = found.parts[-1].time * rate // found.clock - n_frames  # the clock need not begin with 0
        at = 0
        for part in found.parts:
            try:
                file = NoSeek(PartFile(self.raw, found.head, part))
            except soundfile.LibsndfileError:
                continue
            with file:
                begin = 0
                good = 0  # where its sound is that of the whole file
                if part is not found.parts[0]:
                    begin = part.time * rate // found.clock - first - skip - file.frames
                    good = begin
                    if skip:
                        good += round(MARGIN * rate)
                good = max(at, good)
                if good >= n_frames:
                    continue  # it is too short, or its times are wrong
                if good > at:
                    yield good - at
                    at = good
                drop(file, at - begin)
                block = read_block(file, BLOCK)
                while len(block):
                    yield block
                    at += len(block)
                    block = read_block(file, BLOCK)

    def go_on(self, at: int) -> int:
        """Reopen at frames further and further after `at`: returns how many were skipped, 0 if that fails."""
        step = BLOCK
        while at + step < self.claimed:
            if self.begin_anew(0, at + step):
                return step + WARM_UP
            step *= 2
        return 0

    def go_on_in_mp3(self, at: int) -> int:
        """The same from the next bytes that look like a frame header: to seek in mp3 means to decode."""
        end = self.raw.tell()
        frames_a_byte = at / max(1, end - self.first_byte)
        if sound_behind(self.raw, end, "MP3") * frames_a_byte < LEFT_OVER * self.rate:
            return 0
        self.raw.seek(end)
        heads = MP3_HEAD.finditer(self.raw.read(LONGEST_HOLE))
        for head in itertools.islice(heads, 1000):
            byte = self.begin_anew(end + head.start(), 0)
            if byte:
                return WARM_UP + round((byte - end) * frames_a_byte)
        return 0

    def begin_anew(self, byte: int, frame: int) -> int:
        """Reopen and drop the first frames, which may be wrong: the byte where sound begins, 0 on failure."""
        try:
            file = Forward(self.raw, byte)
            first_byte = self.raw.tell()
            if frame:
                file.seek(frame)
            n = len(file.read(WARM_UP))
        except soundfile.LibsndfileError:
            return 0
        if n < WARM_UP or (file.samplerate, file.channels) != (self.file.samplerate, self.file.channels):
            return 0
        self.file = file
        return first_byte

    def look_behind(self) -> None:
        """Find how many seconds of sound there are behind those that the header claims."""
        end = self.raw.tell()
        seconds_a_byte = self.decoded / self.rate / max(1, end - self.first_byte)
        self.behind = sound_behind(self.raw, end, self.file.format)
        self.missed = self.behind * seconds_a_byte

    def remark(self) -> str:
        """What the user should know of the file, or ""; once it has been decoded."""
        claimed = self.claimed / self.rate
        decoded = self.decoded / self.rate
        slack = getattr(self.file, "slack", SLACK)
        if is_mpeg(self.file) and (self.file.format == "WAV" or self.origin):
            slack += 3 * 1152  # what an encoder adds before and behind, or a frame whose bits are missing
        said = []
        if self.missed > 0.2:
            said.append(f"claims {claimed:.1f} s and holds {claimed + self.missed:.1f} s")
        missing = missing_bytes(self.raw)
        if missing:
            said.append(f"it is cut: its header claims {missing:,} bytes more")
        if self.decoded < self.claimed - slack:
            said.append(f"claims {claimed:.2f} s, {decoded:.2f} s can be decoded")
        if self.damaged:
            said.append(f"{self.damaged / self.rate:.2f} s are damaged")
        return "; ".join(said)


def first_frame(raw) -> int:
    """The byte at which libsndfile can open an mp3. By its name, but not by a descriptor, it opens also what
    begins in the middle of a frame, and AAC, of which it makes noise."""
    raw.seek(0)
    head = raw.read(LONGEST_HOLE)
    if head[:2] in (b"\xff\xf1", b"\xff\xf9"):
        raise InputError("is named mp3 but holds AAC: rename it to .aac")
    for byte in [0, *(match.start() for match in itertools.islice(MP3_HEAD.finditer(head), MOST_HEADS))]:
        try:
            Forward(raw, byte).close()
            return byte
        except soundfile.LibsndfileError:
            continue
    raise InputError("no frame of this mp3 is whole: convert it with ffmpeg")


def is_mpeg(file) -> bool:
    """Whether libmpg123 decodes an open file: an mp3, perhaps in a wav, or its older relatives."""
    return file.subtype.startswith("MPEG")


@contextlib.contextmanager
def open_whole(path: str | os.PathLike) -> Iterator[WholeFile]:
    """Open a file to decode all of it. Raises InputError for whatever goes wrong until it is closed."""
    with open_audio(path) as file, open(path, "rb", buffering=0) as raw:
        yield WholeFile(file, raw)


def claimed_frames(file) -> int:
    """Frames that an open file claims to have, 0 if it does not say."""
    return getattr(file, "claimed", file.frames)


def claimed_seconds(path: str | os.PathLike) -> float:
    """Length of a file as it says itself, 0 if it does not say or cannot be read."""
    try:
        with open_audio(path) as file:
            return claimed_frames(file) / file.samplerate
    except InputError:
        return 0.0


def missing_bytes(raw) -> int:
    """How many bytes less than its first header says a wav or aiff file has, 0 if that cannot be."""
    raw.seek(0)
    head = raw.read(8)
    if head[:4] not in (b"RIFF", b"FORM"):
        return 0
    claimed = int.from_bytes(head[4:], "little" if head[:4] == b"RIFF" else "big")
    if claimed > 2**31 - 2**16:  # what writers to a pipe put there, or the end of 31 and 32 bits
        return 0
    missing = claimed + 8 - os.fstat(raw.fileno()).st_size
    return missing if missing > 1000 else 0  # some count a few bytes wrongly


def sound_behind(raw, at: int, form: str) -> int:
    """How many bytes from `at` on are neither padding nor tags nor chunks, and so must be sound."""
    size = end_without_tags(raw)
    if size - at >= 2**32:  # whatever the bytes are: the header's 32 bits were too few, and wrapped
        return size - at
    while at < size:
        raw.seek(at)
        head = raw.read(2**16)
        n = len(head) - len(head.lstrip(b"\0\xff")) or length_of_tag(head, form)
        if not n or at + n > size:
            break
        at += n
    return max(0, size - at)


def end_without_tags(raw) -> int:
    """Where a file ends, without the tags of mp3 that can be read from behind only."""
    end = os.fstat(raw.fileno()).st_size
    while True:
        raw.seek(max(0, end - 128))
        tail = raw.read(min(end, 128))
        size = 0
        if tail.startswith(b"TAG") and len(tail) == 128:
            size = 128
        elif tail[-32:-24] == b"APETAGEX":
            size = int.from_bytes(tail[-20:-16], "little")
        elif tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
            size = 15 + int(tail[-15:-9])
        if not 0 < size <= end:
            return end
        end -= size


def length_of_tag(head: bytes, form: str) -> int:
    """Bytes of the tag, or the chunk of a container, that begins here; 0 if none does."""
    if head.startswith(b"TAG"):
        return 128
    if head.startswith(b"APETAGEX"):
        return 32 + int.from_bytes(head[12:16], "little")
    if re.match(rb"ID3[\0-\x0f]", head):  # not the chunk named "ID3 "
        size = 0
        for byte in head[6:10]:
            size = 128 * size + byte
        return 10 + size
    name = head[:4]
    if name in (b"RIFF", b"FORM") or not all(32 <= byte < 127 for byte in name):
        return 0
    if form == "CAF":
        return 12 + int.from_bytes(head[4:12], "big")
    if form in ("AIFF", "SVX"):
        return 8 + int.from_bytes(head[4:8], "big")
    return 8 + int.from_bytes(head[4:8], "little")


def holds_several_mp4(raw) -> bool:
    """Whether these are several joined files, of which FFmpeg reads the first only."""
    size = os.fstat(raw.fileno()).st_size
    n_heads = 0
    at = 0
    for _ in range(MOST_BOXES):
        raw.seek(at)
        head = raw.read(16)
        n_heads += head[4:8] == b"moov"
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        at += length
        if length < 8 or at >= size or n_heads > 1:  # of length 0 is the last
            break
    return n_heads > 1


def holds_several(raw) -> bool:
    """Whether this is several joined FLAC files: libFLAC may seek into any of them."""
    n_heads = 0
    for at in range(0, os.fstat(raw.fileno()).st_size, 2**18):
        raw.seek(at)
        n_heads += raw.read(2**18 + len(FLAC_HEAD) - 1).count(FLAC_HEAD)
    return n_heads > 1


def count_samples(path: str | os.PathLike) -> tuple[int, str]:
    """Samples at 16 kHz that load_audio can read from a file, and what the user should know of it or "", for
    example that it claims more. Raises InputError if it cannot be used, or holds more than it claims: that
    would be lost, because libsndfile stops there."""
    with open_whole(path) as whole:
        if whole.file.format == "FLAC" and holds_several(whole.raw):
            raise InputError("holds several FLAC files, joined end to end: convert it")
        if not whole.reaches_end():
            for _ in whole.blocks():
                pass
        remark = whole.remark()
        seconds = whole.readable / whole.rate
        if clip_samples(CLIP_FRAMES) / SAMPLE_RATE < seconds and whole.readable < whole.decoded:
            pieces = f"only `prepare.py pack` reads what follows {seconds:.2f} s"
            remark = f"{remark}; {pieces}".removeprefix("; ")
        if is_ogg(whole.file) and whole.damaged:
            remark += ", where pieces read from the file are wrong: `prepare.py pack` makes them silent"
        n_samples = whole.readable * SAMPLE_RATE // whole.rate
        is_broken = whole.is_broken
        if not whole.claimed and whole.behind > 1000:
            raise InputError("its header says that it is empty, but sound follows: convert it")
        if whole.missed > LEFT_OVER + min(10, 0.02 * seconds):
            raise InputError(f"{remark}: convert it")
    if n_samples < FRAME_LENGTH:
        raise InputError(f"too short: {seconds:.3f} s, a frame has 0.025 s; {remark}".removesuffix("; "))
    if n_samples >= MAX_SAMPLES:
        raise InputError(f"has {seconds / 3600:.0f} hours: cut it into parts")
    if is_broken:
        try:
            load_audio(path, 0, clip_samples(CLIP_FRAMES), allow_silence=True)  # at least its first piece
        except InputError as error:
            raise InputError(f"{error} ({remark}): convert it") from None
    return n_samples, remark


def stream(path: str | os.PathLike, width: int, hop: int = 0) -> Iterator[tuple[Tensor, str]]:
    """Decode a whole file in pieces of `width` samples, one every `hop` (by default `width`, at most that),
    both at 16 kHz: (piece (S,), mono float32, what is wrong with it or ""). The last may be shorter.
    A piece equals that stretch of the whole file, decoded in one read and resampled; damage becomes
    silence and is reported. What the user should know of the file as a whole comes last, with an empty
    piece. Raises InputError if the file cannot be read at all."""
    hop = hop or width
    if hop > width:
        raise ValueError("the pieces of a stream follow each other or overlap")
    with open_whole(path) as whole:
        blocks = whole.blocks()
        period = SAMPLE_RATE // math.gcd(whole.rate, SAMPLE_RATE)  # of the resampling filter's phase
        buffer = torch.empty(0)  # at the file's rate
        begin = 0  # the sample at 16 kHz with which it begins
        damaged = []  # (from, to) in frames of the file
        for start in itertools.count(0, hop):
            first = begin * whole.rate // SAMPLE_RATE
            end = math.ceil((start + width + FILTER_REACH) * whole.rate / SAMPLE_RATE)
            parts = [buffer]
            at = first + len(buffer)
            while at < end:
                block, is_good = next(blocks, (None, True))
                if block is None:
                    break
                parts.append(block)
                if not is_good:
                    damaged.append((at, at + len(block)))
                at += len(block)
            buffer = torch.cat(parts)
            sound = buffer[: end - first]
            if len(sound):
                sound = resample(sound, whole.rate)
            piece = sound[start - begin :][:width]
            if not len(piece):
                break
            problem = ""
            damaged = [place for place in damaged if place[1] > first]
            if damaged and damaged[0][0] < end:
                problem = f"damaged at {max(first, damaged[0][0]) / whole.rate:.1f} s"
            yield piece, problem
            begin = max(0, start + hop - FILTER_REACH) // period * period
            buffer = buffer[begin * whole.rate // SAMPLE_RATE - first :]
        remark = whole.remark()
    if remark:
        yield torch.empty(0), remark
