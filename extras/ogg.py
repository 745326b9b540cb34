"""The parts of a damaged Ogg file, by the checksums of its pages. libsndfile passes over a lost page without
a word: what follows in Vorbis is in another place, in Opus it fills the gap with sound of its own, and seeks
near it are wrong. So each part between two lost pages is decoded as a file, behind the headers of the whole.
"""

import io
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

LARGEST_PAGE = 65_307  # bytes of an Ogg file
MOST_FAILED = 1000  # checksums in a row: what follows is no Ogg, and to look at it would take long
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bytes, their bits in the other order
NO_TIME = 2**64 - 1  # of a page on which no packet ends
OPUS_CLOCK = 48_000  # whatever the rate
MARGIN = 0.5  # seconds after which an Opus decoder has forgotten that it began in the middle


class Page(NamedTuple):
    """A page of an Ogg file."""

    begin: int  # in bytes of the file
    end: int
    stream: bytes  # whose it is
    number: int  # in that stream
    time: int  # frames up to the last one that is complete on it, or NO_TIME
    is_first: bool  # of its stream
    body: bytes


class Part(NamedTuple):
    """Pages that follow each other."""

    begin: int  # in bytes of the file
    end: int
    time: int  # frames up to its end


class Parts(NamedTuple):
    """The sound of an Ogg file."""

    head: bytes  # the pages before it
    skip: int  # frames that a decoder drops at the beginning
    clock: int  # frames a second, in which the times of pages count
    parts: list[Part]


def is_ogg(file) -> bool:
    return file.subtype in ("VORBIS", "OPUS")


def ogg_pages(raw) -> Iterator[Page]:
    """The whole pages of an Ogg file, in order."""
    raw.seek(0)
    window = b""
    start = 0  # the byte of the file with which it begins
    at = 0
    is_end = False
    n_failed = 0  # checksums in a row
    while n_failed < MOST_FAILED:
        at = window.find(b"OggS", at)
        if at < 0:
            at = max(0, len(window) - 3)
        if len(window) - at < LARGEST_PAGE and not is_end:
            more = raw.read(2**20)
            is_end = not more
            window = window[at:] + more
            start += at
            at = 0
            continue
        head = window[at : at + 27]
        if len(head) < 27:
            return
        body = at + 27 + head[26]
        end = body + sum(window[at + 27 : body])
        if head[4] or head[5] > 7:  # not version 0, or unknown flags
            at += 4
            continue
        if ogg_checksum(head[:22] + bytes(4) + window[at + 26 : end]) != head[22:26]:
            at += 4
            n_failed += 1
            continue
        n_failed = 0
        time = int.from_bytes(head[6:14], "little")
        number = int.from_bytes(head[18:22], "little")
        is_first = bool(head[5] & 2)
        yield Page(start + at, start + end, head[14:18], number, time, is_first, window[body:end])
        at = end


def ogg_checksum(page: bytes) -> bytes:
    """zlib's polynomial, from the highest bit of a byte to its lowest, and without zlib's inversions."""
    crc = zlib.crc32(page.translate(MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(MIRRORED)


def find_parts(raw, rate: int) -> Parts:
    """The parts of the first Vorbis or Opus stream in an Ogg file of that sample rate, one if no page is lost
    between others."""
    stream = b""
    number = 0  # of the page before
    head_end = 0
    skip = 0
    clock = rate
    parts = []
    for page in ogg_pages(raw):
        if page.is_first and page.body.startswith((b"\x01vorbis", b"OpusHead")):
            if parts:
                break  # another file, joined to this one
            if not stream:
                stream = page.stream
                number = page.number
                head_end = page.end
                if page.body.startswith(b"OpusHead"):
                    skip = int.from_bytes(page.body[10:12], "little")
                    clock = OPUS_CLOCK
            continue
        if page.stream != stream:
            continue
        if not parts and page.time in (0, NO_TIME):  # comments and tables
            head_end = page.end
        elif not parts or page.number != number + 1:
            parts.append(Part(page.begin, page.end, 0))
        number = page.number
        if parts:
            time = parts[-1].time
            if page.time != NO_TIME:
                time = page.time
            parts[-1] = parts[-1]._replace(end=page.end, time=time)
    raw.seek(0)
    return Parts(raw.read(head_end), skip, clock, parts)


class PartFile(io.RawIOBase):
    """One part of an Ogg file behind its headers, for soundfile."""

    def __init__(self, raw, head: bytes, part: Part):
        self.raw = raw
        self.head = head
        self.part = part
        self.at = 0

    def readinto(self, buffer) -> int:
        if self.at < len(self.head):
            found = self.head[self.at :][: len(buffer)]
        else:
            at = self.part.begin + self.at - len(self.head)
            self.raw.seek(at)
            found = self.raw.read(max(0, min(len(buffer), self.part.end - at)))
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(self.head) + self.part.end - self.part.begin
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def last_page(file, raw) -> int:
    """Frames of an Ogg file, by its last page, which libsndfile may miss after damage; 0 if absurd."""
    raw.seek(0)
    head = raw.read(200)
    size = os.fstat(raw.fileno()).st_size
    raw.seek(max(0, size - 2 * LARGEST_PAGE))
    page = raw.read().rpartition(b"OggS")[2]
    n_frames = int.from_bytes(page[2:10], "little")
    if file.subtype == "OPUS":
        n_frames = n_frames * file.samplerate // OPUS_CLOCK - file.samplerate // 10  # less what is not heard
    if page[10:14] not in head:
        n_frames += file.frames  # of another stream, behind this one
    if n_frames > 10 * file.frames + file.samplerate:
        return 0
    return n_frames
