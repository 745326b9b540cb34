"""Which pages of an Ogg file are lost, by their checksums. libsndfile passes over them without a word: what
follows in Vorbis is in another place, and in Opus it fills the gap with sound of its own."""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

LARGEST_PAGE = 65_307  # bytes of an Ogg file
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bytes, their bits in the other order
NO_END = 2**64 - 1  # in place of the time of a page on which no packet ends


def is_ogg(file) -> bool:
    return file.subtype in ("VORBIS", "OPUS")


class Page(NamedTuple):
    """A page of an Ogg file."""

    stream: bytes  # whose it is
    number: int  # in that stream
    end: int  # frames up to the last that is complete on it, or NO_END
    is_first: bool  # of its stream
    body: bytes


def ogg_pages(raw) -> Iterator[Page]:
    """The whole pages of an Ogg file, in order."""
    raw.seek(0)
    window = b""
    at = 0
    is_end = False
    while True:
        at = window.find(b"OggS", at)
        if at < 0:
            at = max(0, len(window) - 3)
        if len(window) - at < LARGEST_PAGE and not is_end:
            more = raw.read(2**20)
            is_end = not more
            window = window[at:] + more
            at = 0
            continue
        head = window[at : at + 27]
        if len(head) < 27:
            return
        body = at + 27 + head[26]
        end = body + sum(window[at + 27 : body])
        if head[4] or ogg_checksum(head[:22] + bytes(4) + window[at + 26 : end]) != head[22:26]:
            at += 4
            continue
        n_frames = int.from_bytes(head[6:14], "little")
        number = int.from_bytes(head[18:22], "little")
        yield Page(head[14:18], number, n_frames, bool(head[5] & 2), window[body:end])
        at = end


def ogg_checksum(page: bytes) -> bytes:
    """zlib's polynomial, from the highest bit of a byte to its lowest, and without zlib's inversions."""
    crc = zlib.crc32(page.translate(MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(MIRRORED)


def ogg_holes(raw, file) -> list[tuple[int, int]]:
    """Where pages are lost in an open Ogg file, as (from, to) in frames. The first page behind them counts as
    lost too: what begins in one of them may end there. Of Opus also the second: a seek does not find it."""
    behind = 2 if file.subtype == "OPUS" else 1
    stream = b""
    number = 0  # of the page before
    end = 0  # as that of the last page that has one
    begin = None  # of a hole
    n_behind = 0  # pages behind it
    holes = []
    for page in ogg_pages(raw):
        if page.is_first and page.body.startswith((b"\x01vorbis", b"OpusHead")):
            if stream:
                break  # another file, joined to this one
            stream = page.stream
            number = page.number
        elif page.stream == stream:
            if page.number != number + 1 and end:  # for libsndfile the first page left is the beginning
                n_behind = 0
                begin = end if begin is None else begin
            number = page.number
            if page.end == NO_END:
                continue
            end = page.end
            n_behind += 1
            if begin is not None and n_behind >= behind:
                holes.append((begin, end))
                begin = None
    if begin is not None:
        holes.append((begin, end))
    clock = 48_000 if file.subtype == "OPUS" else file.samplerate
    first = end * file.samplerate // clock - file.frames  # the clock need not begin with 0

    def frame(time: int) -> int:
        return max(0, time * file.samplerate // clock - first)

    return [(frame(begin), frame(end)) for begin, end in holes]


def last_page(file, raw) -> int:
    """Frames of an Ogg file, by its last page, which libsndfile may miss after damage; 0 if absurd."""
    raw.seek(0)
    head = raw.read(200)
    size = os.fstat(raw.fileno()).st_size
    raw.seek(max(0, size - 2 * LARGEST_PAGE))
    page = raw.read().rpartition(b"OggS")[2]
    n_frames = int.from_bytes(page[2:10], "little")
    if file.subtype == "OPUS":
        n_frames = n_frames * file.samplerate // 48_000 - file.samplerate // 10  # less what is not heard
    if page[10:14] not in head:
        n_frames += file.frames  # of another stream, behind this one
    if n_frames > 10 * file.frames + file.samplerate:
        return 0
    return n_frames
