"""Whole files: found, named, counted, decoded whole and in pieces; cut, joined, damaged and mutated."""

import contextlib
import io
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

from data import InputError, clip_samples, load_audio, open_audio
from extras import media
from extras.media import count_samples, find_audio, stream, what_is
from extras.ogg import ogg_checksum, ogg_pages

LONG = pytest.mark.long


def noise(seconds: float, rate: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise whose level changes every tenth of a second, over a tone: (n, channels) float32."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    level = np.repeat(0.3 * rng.random(n // (rate // 10) + 1) ** 3, rate // 10)[:n, None]
    wave = 0.2 * np.sin(np.arange(n) * 0.05)[:, None]
    return (level * rng.standard_normal((n, channels)) + wave).clip(-1, 1).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int, **form) -> None:
    """Like soundfile.write, a second at a time: libsndfile's Vorbis encoder overflows the stack otherwise."""
    with soundfile.SoundFile(path, "w", rate, samples.shape[1], **form) as file:
        for i in range(0, len(samples), rate):
            file.write(samples[i : i + rate])


def overwrite(path: Path, at: float, n_bytes: int, seed: int = 0) -> None:
    """Put random bytes in place of some, from the given part of the file on."""
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    data[place : place + n_bytes] = random.Random(seed).randbytes(n_bytes)
    path.write_bytes(data)


def whole_of(path: Path) -> torch.Tensor:
    return load_audio(path, allow_silence=True)


def largest_difference(piece: torch.Tensor, reference: torch.Tensor) -> float:
    """Of a piece from the same stretch of the whole file. torchaudio computes the length of the whole in
    float32, so that it may lack the last sample."""
    assert 0 <= len(piece) - len(reference) <= 1
    if not len(reference):
        return 0.0
    return (piece[: len(reference)] - reference).abs().max().item()


# ----- Folders, and what is no audio -----------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_audio_is_found_sorted_and_what_belongs_to_tools_is_left_out_with_a_line(tmp_path, capsys):
    touch(tmp_path, "b.WAV", "a/c.m4a", "a/.hidden/x.wav", "__MACOSX/b.wav", "a/._c.m4a", "x.txt", "a/d.webm")
    touch(tmp_path, "@eaDir/b.wav/x.wav", "$RECYCLE.BIN/x.flac", "lost+found/y.mp3", ".git/readme")
    found = find_audio(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/c.m4a", "a/d.webm", "b.WAV"]
    assert re.match(r"left out: 6 files .* such as \$RECYCLE.BIN/x.flac\n$", capsys.readouterr().err)


def test_a_folder_whose_own_name_is_hidden_is_searched(tmp_path, capsys):
    touch(tmp_path, ".cache/a.wav")
    assert find_audio(tmp_path / ".cache") == [tmp_path / ".cache" / "a.wav"]
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="no audio files below"):
        find_audio(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        find_audio(tmp_path / ".cache" / "a.wav")


def test_links_are_followed_but_not_in_circles(tmp_path, capsys):
    touch(tmp_path, ".store/a.wav", "real/b.wav")
    (tmp_path / "shown").symlink_to(".store")  # the same folder, once as a tool's and once as the user's
    (tmp_path / "real" / "up").symlink_to("..")
    (tmp_path / ".store" / "up").symlink_to("..")
    (tmp_path / "gone").symlink_to("nowhere")
    found = find_audio(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["real/b.wav", "shown/a.wav"]
    said = capsys.readouterr().err
    assert "gone cannot be opened: a broken link" in said
    assert "left out: " in said


def test_links_to_listed_files_are_told(tmp_path, capsys):
    touch(tmp_path, "a.wav", "other/b.wav", "outside.txt")
    (tmp_path / "c.wav").symlink_to("other/b.wav")
    (tmp_path / "d.wav").symlink_to("outside.txt")
    assert len(find_audio(tmp_path)) == 4
    assert capsys.readouterr().err == "links to files that are listed as well: 1, such as c.wav\n"


@pytest.mark.parametrize("content, said", [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid x\nsize 1\n", "a Git LFS pointer: run git lfs pull"),
    (b"<!DOCTYPE html>\n<title>Sign in</title>", "an HTML page: download the file again"),
    (b"\xef\xbb\xbf\n <HTML><body>", "an HTML page: download the file again"),
    (b"<?xml version='1.0'?><!DOCTYPE html PUBLIC><html>", "an HTML page: download the file again"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an XML page: download the file again"),
    (b"#EXTM3U\na.wav\n", "a text file, '#EXTM3U"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a", "pt"])
def test_pages_and_pointers_are_called_what_they_are(tmp_path, content, said, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    assert what_is(path).startswith(said)
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        load_audio(path)


def test_what_is_not_known_is_given_no_name(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(1), 16_000)
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    assert what_is(tmp_path / "x.wav") == ""
    assert what_is(tmp_path / "x.pt") == ""
    assert what_is(tmp_path / "gone") == "No such file or directory"


def test_damaged_files_of_libsndfiles_formats_keep_its_reason(tmp_path):
    """FFmpeg would read this wav."""
    soundfile.write(tmp_path / "x.wav", noise(1), 16_000)
    data = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "x.wav").write_bytes(data[:20] + b"\xff\x7f" + data[22:])
    with pytest.raises(InputError, match="^unreadable: "):
        load_audio(tmp_path / "x.wav")


@pytest.mark.parametrize("name, kind", [("x.m4a", "m4a"), ("x.wav", "mp4"), ("x.webm", "webm")])
def test_without_av_one_line_says_what_to_install(tmp_path, monkeypatch, name, kind):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / name).write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0" + bytes(100))
    for function in (load_audio, count_samples):
        with pytest.raises(InputError, match=f"^{kind}: pip install av, or convert with ffmpeg$"):
            function(tmp_path / name)


# ----- Pieces of files that libsndfile reads ---------------------------------------------------------------


def check_pieces(path: Path, n_random: int, rng: random.Random) -> None:
    """At random and in sequence, pieces equal the whole file, which is counted right."""
    whole = whole_of(path)
    n_samples, remark = count_samples(path)
    assert abs(n_samples - len(whole)) <= 1
    for _ in range(n_random):
        start = rng.randrange(1, len(whole) - 500)
        length = rng.choice([500, 16_000, clip_samples(300)])
        piece = load_audio(path, start, length, allow_silence=True)
        assert largest_difference(piece, whole[start : start + length]) <= 1e-6, (path, start)
    for width, hop in ((clip_samples(300), 300 * 160), (10_000, 10_000)):
        n_pieces = 0
        for piece, problem in stream(path, width, hop):
            if not len(piece):
                assert problem == remark  # of the whole file, at the end
                continue
            start = n_pieces * hop
            assert not problem
            assert largest_difference(piece, whole[start : start + width]) <= 1e-6, (path, start)
            n_pieces += 1
        assert n_pieces == -(-len(whole) // hop)


SOME = [
    (8000, 1, "CONSTANT", 0.99), (24_000, 1, "CONSTANT", 0.99), (44_100, 2, "VARIABLE", 0.9),
    (22_050, 2, "VARIABLE", 0.99), (48_000, 2, "CONSTANT", 0.0), (16_000, 1, "VARIABLE", 0.5),
]  # fmt: skip
ALL = [
    (rate, channels, mode, level)
    for rate in (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000) for channels in (1, 2)
    for mode in ("CONSTANT", "VARIABLE") for level in (0.0, 0.5, 0.99)
]  # fmt: skip


@pytest.mark.parametrize("rate, channels, mode, level", SOME + [pytest.param(*x, marks=LONG) for x in ALL])
def test_pieces_of_an_mp3_equal_the_whole(tmp_path, rate, channels, mode, level):
    """From 8 to 320 kbit/s; frames take bits from those before them, which a seek would lose."""
    path = tmp_path / "x.mp3"
    form = dict(format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=mode, compression_level=level)
    write(path, noise(10, rate, channels), rate, **form)
    check_pieces(path, 10, random.Random(rate))


def test_pieces_of_an_mp3_in_a_wav_equal_the_whole(tmp_path):
    """As Windows' sound recorder wrote them; 8 kbit/s, so that much is taken from the frames before."""
    rate = 24_000
    data = mp3(20, rate, bitrate_mode="CONSTANT", compression_level=0.99)
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, rate, 1000, 1, 0, 12, 1, 2, 24, 1, 1393)
    body = b"WAVE"
    for name, content in ((b"fmt ", form), (b"fact", struct.pack("<I", 20 * rate)), (b"data", data)):
        body += name + struct.pack("<I", len(content)) + content
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert soundfile.info(tmp_path / "x.wav").subtype == "MPEG_LAYER_III"
    check_pieces(tmp_path / "x.wav", 10, random.Random(0))


def formats() -> list:
    """Every pair of format and subtype; a few by default."""
    usual = {
        ("WAV", "PCM_16"), ("WAV", "GSM610"), ("AIFF", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
        ("OGG", "OPUS"), ("CAF", "ALAC_16"), ("W64", "MS_ADPCM"), ("AU", "ULAW"), ("RF64", "FLOAT"),
    }  # fmt: skip
    pairs = []
    for form in soundfile.available_formats():
        for subtype in soundfile.available_subtypes(form):
            marks = [] if (form, subtype) in usual else [LONG]
            pairs.append(pytest.param(form, subtype, marks=marks))
    return pairs


@pytest.mark.parametrize("form, subtype", formats())
def test_pieces_of_every_format_equal_the_whole(tmp_path, form, subtype):
    if form in ("RAW", "SD2") or subtype.startswith("DWVW"):
        pytest.skip("has no header, needs a second file, or cannot be sought by libsndfile itself")
    n_read = 0
    for rate, channels in ((16_000, 1), (44_100, 2), (8000, 1)):
        if channels == 2 and subtype in ("ALAC_20", "ALAC_24", "ALAC_32"):
            continue  # libsndfile's encoder writes beyond its memory
        path = tmp_path / f"x{rate}"
        try:
            write(path, noise(6, rate, channels), rate, format=form, subtype=subtype)
        except soundfile.LibsndfileError:  # such a rate or number of channels cannot be written
            continue
        check_pieces(path, 8, random.Random(rate))
        n_read += 1
    if not n_read:
        pytest.skip("libsndfile cannot write it")


def resident(what: str = "VmRSS") -> float:
    """Memory of this process now, or its peak (VmHWM), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise AssertionError(what)


@pytest.mark.parametrize("hours", [0.25, pytest.param(24, marks=LONG)])
def test_a_long_file_is_streamed_in_bounded_memory(tmp_path, hours):
    """Decoded at once, 15 minutes would be 86 MB; a sparse file, so that it costs no disk."""
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros(24_000), 24_000)
    n_bytes = round(hours * 3600) * 48_000  # 24 hours fit the header's 32 bits
    with open(path, "r+b") as file:
        for place, size in ((4, n_bytes + 36), (40, n_bytes)):
            file.seek(place)
            file.write(struct.pack("<I", size))
        file.truncate(44 + n_bytes)
    n_read = 0
    before = 0.0
    for piece, problem in stream(path, 163_840):
        if not before:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resident()
        n_read += len(piece)
        assert not problem
    assert n_read == hours * 3600 * 16_000
    assert resident("VmHWM") - before < 50


# ----- Lengths ---------------------------------------------------------------------------------------------


def mp3(seconds: float, rate: int = 44_100, seed: int = 0, **form) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(seconds, rate, 1, seed), rate, format="MP3", **form)
    return buffer.getvalue()


def without_xing(data: bytes) -> bytes:
    """As an encoder writes to a pipe: without the first frame, which counts the others."""
    place = max(data.find(b"Xing"), data.find(b"Info"))
    return data[data.index(data[:2], place) :]


def free_format(n_frames: int) -> bytes:
    """Frames of Layer I at 48 kHz whose header gives no bit rate, silent, 384 samples and 500 bytes each."""
    head = 0x7FF << 21 | 3 << 19 | 3 << 17 | 1 << 16 | 1 << 10 | 3 << 6
    return n_frames * head.to_bytes(4, "big").ljust(500, b"\0")


ID3_2 = b"ID3\x04\0\0" + bytes([0, 10, 0, 0]) + b"APIC" + bytes(range(256)) * 640  # as a cover of 164 kB
ID3_2 = ID3_2[: 10 + (10 << 14)]
ID3_1 = b"TAG" + b"title".ljust(125)
APE_TAG = b"APETAGEX" + struct.pack("<IIII8x", 2000, 150_032, 1, 0xA0000000)
APE_TAG += bytes(range(256)) * 586 + b"APETAGEX" + struct.pack("<IIII8x", 2000, 150_032, 1, 0x80000000)


@pytest.mark.parametrize("before, behind", [
    (b"", b""), (ID3_2, b""), (b"", ID3_1), (b"", APE_TAG[: 32 + 150_032] + ID3_1), (ID3_2, ID3_1),
    (b"", bytes(300_000)), (b"", b"\xff" * 300_000),
])  # fmt: skip
def test_tags_and_padding_around_an_mp3_are_no_sound(tmp_path, before, behind):
    (tmp_path / "x.mp3").write_bytes(before + mp3(6) + behind)
    assert count_samples(tmp_path / "x.mp3") == (96_000, "")


def test_a_cut_mp3_is_counted_by_what_it_holds_and_that_is_told(tmp_path):
    data = mp3(20)
    (tmp_path / "x.mp3").write_bytes(data[: len(data) // 2])
    n_samples, remark = count_samples(tmp_path / "x.mp3")
    assert n_samples == pytest.approx(160_000, abs=8000)
    assert re.fullmatch(r"claims 20\.00 s, (9|10)\.\d\d s can be decoded", remark)
    assert len(load_audio(tmp_path / "x.mp3")) == pytest.approx(n_samples, abs=1)


@pytest.mark.parametrize("name, data", [
    ("joined", mp3(6) + mp3(9, seed=1)),
    ("joined behind a cover", ID3_2 + mp3(2) + mp3(3)),
    ("joined with other rates", mp3(6) + mp3(6, 22_050)),
    ("joined without a count", without_xing(mp3(6)) + without_xing(mp3(5))),
    ("VBR from a pipe", without_xing(mp3(30, bitrate_mode="VARIABLE", compression_level=0.5))),
    ("free format", free_format(2000)),
])  # fmt: skip
def test_an_mp3_that_holds_more_than_its_header_says_is_counted_in_full_or_refused(tmp_path, name, data):
    path = tmp_path / "x.mp3"
    path.write_bytes(data)
    held = {"joined": 15, "joined behind a cover": 5, "joined with other rates": 12, "free format": 16,
            "joined without a count": 11, "VBR from a pipe": 30}[name]  # fmt: skip
    try:
        n_samples, remark = count_samples(path)
    except InputError as error:
        assert re.match(r"claims .* s and holds .* s.*: convert it|too short|unreadable", str(error))
        return
    assert n_samples / 16_000 == pytest.approx(held, rel=0.02)
    assert len(load_audio(path, n_samples - 8000, 8000, True)) == pytest.approx(8000, abs=3)


@pytest.mark.parametrize("rate, channels", [(8000, 1), (22_050, 2), (48_000, 2)])
@pytest.mark.parametrize("claimed", [0, 1 / 3, 1, 3, 1e9])
def test_an_mp3_whose_count_was_changed_is_counted_right_or_refused(tmp_path, rate, channels, claimed):
    path = tmp_path / "x.mp3"
    soundfile.write(path, noise(6, rate, channels), rate)
    data = bytearray(path.read_bytes())
    at = data.index(b"Xing") + 8
    n_frames = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = min(2**32 - 1, int(claimed * n_frames)).to_bytes(4, "big")
    path.write_bytes(data)
    try:
        n_samples, remark = count_samples(path)
    except InputError as error:
        assert re.match("claims .* holds [567][.]|claims .* hours|too short: 0", str(error))
        return
    assert n_samples == pytest.approx(96_000, abs=3000)
    assert bool(remark) == (claimed > 1)
    assert len(load_audio(path, n_samples - 8000, 8000)) == pytest.approx(8000, abs=3)


@pytest.mark.parametrize("n_bytes", [500, 1000, 5000])
def test_an_mp3_that_begins_in_the_middle_of_a_frame(tmp_path, n_bytes):
    """As programs that cut recordings into parts leave them. Its length is a guess; more is told."""
    path = tmp_path / "x.mp3"
    data = mp3(20, 44_100, bitrate_mode="CONSTANT")
    path.write_bytes(data[n_bytes:])
    n_samples, remark = count_samples(path)
    assert re.fullmatch(r"|claims 19\.\d s and holds \d\d\.\d s", remark)
    whole = load_audio(path)
    assert n_samples == pytest.approx(len(whole), abs=1000)
    assert n_samples == pytest.approx(320_000 * len(data[n_bytes:]) / len(data), abs=8000)
    streamed = torch.cat([piece for piece, _ in stream(path, 32_000)])
    assert len(streamed) == pytest.approx(n_samples, abs=1)
    assert (streamed - whole[: len(streamed)])[1000:-1000].abs().max() <= 1e-6  # it ends one frame earlier
    assert largest_difference(load_audio(path, 160_000, 16_000), streamed[160_000:176_000]) <= 1e-6


def test_mpeg_audio_of_other_layers_is_counted_right(tmp_path):
    """Layer II, as broadcasters have it, under the name of an mp3: 400 frames of 1152 samples, by hand."""
    head = 0x7FF << 21 | 3 << 19 | 2 << 17 | 1 << 16 | 8 << 12 | 3 << 6  # 128 kbit/s at 44.1 kHz, mono
    frame = head.to_bytes(4, "big").ljust(144 * 128_000 // 44_100, b"\x11")
    (tmp_path / "x.mp3").write_bytes(400 * frame)
    assert soundfile.info(tmp_path / "x.mp3").subtype == "MPEG_LAYER_II"
    n_samples, _ = count_samples(tmp_path / "x.mp3")
    assert n_samples == pytest.approx(400 * 1152 / 44_100 * 16_000, abs=10)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_cut_and_joined_ogg_files(tmp_path, subtype):
    path = tmp_path / "x.ogg"
    write(path, noise(1, 48_000), 48_000, format="OGG", subtype=subtype)
    short = path.read_bytes()
    write(path, noise(20, 48_000), 48_000, format="OGG", subtype=subtype)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    n_samples, _ = count_samples(path)
    assert n_samples == pytest.approx(160_000, abs=32_000)
    path.write_bytes(data + data)
    with pytest.raises(InputError, match=r"claims \d+\.. s and holds \d\d\.. s.*: convert it"):
        count_samples(path)
    other = bytearray(short)
    serial = other[14:18]
    path.write_bytes(short + other.replace(serial, b"\1\2\3\4"))  # so short that it is read with the first
    with contextlib.suppress(InputError):
        assert "claims 2.0" in count_samples(path)[1] or "claims 1.9" in count_samples(path)[1]


def test_cut_and_joined_flac_files(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(40), 16_000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    n_samples, remark = count_samples(path)
    assert n_samples == pytest.approx(320_000, abs=64_000)
    assert re.match(r"claims 40\.00 s, \d\d\.\d\d s can be decoded", remark)
    assert largest_difference(load_audio(path, 0, 160_000), load_audio(path, 0, 160_000)) == 0
    path.write_bytes(data[: len(data) // 9])  # not even the first piece can be read
    with pytest.raises(InputError, match=r"flac decoder .*claims 40\.00 s, \d\.\d\d s can be decoded"):
        count_samples(path)
    path.write_bytes(data + data)
    with pytest.raises(InputError, match="several FLAC files"):
        count_samples(path)
    path.write_bytes(data + bytes(100_000))
    assert count_samples(path) == (640_000, "")


@pytest.mark.parametrize("form, subtype, channels", [
    ("WAV", "PCM_16", 1), ("WAV", "PCM_U8", 2), ("WAV", "FLOAT", 2), ("WAV", "ULAW", 1),
    ("WAV", "IMA_ADPCM", 1), ("WAVEX", "PCM_24", 2), ("AIFF", "PCM_16", 2), ("AU", "PCM_16", 1),
])  # fmt: skip
def test_a_size_that_wrapped_is_refused(tmp_path, form, subtype, channels):
    """4 GiB more than the 32-bit header can say; a sparse file, so that it costs no disk."""
    path = tmp_path / "x"
    soundfile.write(path, noise(1, 48_000, channels), 48_000, format=form, subtype=subtype)
    assert count_samples(path)[0] == pytest.approx(16_000, abs=400)
    with open(path, "r+b") as file:
        file.truncate(2**32 + file.seek(0, 2))
    with pytest.raises(InputError, match=r"claims 1[.]0 s and holds \d{4,6}[.]\d s: convert it"):
        count_samples(path)


SIZES = {  # of each container: where the size of the sound is, and what is added to it
    "x.wav": (b"data", "<4xI", 0), "x.aiff": (b"SSND", ">4xI", 8), "x.au": (b".snd", ">8xI", 0),
    "x.caf": (b"data", ">4xQ", 4), "x.rf64": (b"ds64", "<16xQ", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("claimed", ["nothing", "a third", "all", "the most"])
def test_a_size_that_was_not_brought_up_to_date_is_counted_right_or_refused(tmp_path, name, claimed):
    """As of a recorder that died, or of an encoder that writes to a pipe."""
    place, code, more = SIZES[name]
    path = tmp_path / name
    soundfile.write(path, noise(6, 48_000), 48_000, subtype="PCM_16")
    assert count_samples(path) == (96_000, "")
    data = bytearray(path.read_bytes())
    width = struct.calcsize(code[-1])
    at = data.index(place) + struct.calcsize(code) - width
    sizes = {"nothing": 0, "a third": 192_000 + more, "all": 576_000 + more, "the most": 256**width - 1}
    size = sizes[claimed]
    data[at : at + width] = struct.pack(code[0] + code[-1], size)
    path.write_bytes(data)
    try:
        assert count_samples(path) == (96_000, "")
        assert len(load_audio(path)) == 96_000
    except InputError as error:
        assert claimed != "all"
        said = "claims 2[.]0 s and holds 6[.]0 s: convert it|its header says that it is empty|unreadable: "
        assert re.match(said, str(error))


def chunk(name: bytes, n_bytes: int, order: str = "<") -> bytes:
    """Of random bytes, which look like sound."""
    body = random.Random(n_bytes).randbytes(n_bytes)
    return name + struct.pack(f"{order}I", n_bytes) + body + b"\0" * (n_bytes % 2)


@pytest.mark.parametrize("behind", [
    bytes(200_000), b"\xff" * 200_000, chunk(b"LIST", 10**6) + chunk(b"id3 ", 77_777), chunk(b"bext", 99_999),
    chunk(b"_PMX", 200_001), ID3_2, bytes(5000) + chunk(b"iXML", 100_000) + bytes(70_000), ID3_1,
])  # fmt: skip
def test_what_lies_behind_a_wav_is_no_sound(tmp_path, behind):
    soundfile.write(tmp_path / "x.wav", noise(1), 16_000)
    with open(tmp_path / "x.wav", "ab") as file:
        file.write(behind)
    assert count_samples(tmp_path / "x.wav") == (16_000, "")


def test_chunks_before_the_sound_and_of_other_containers_are_no_sound(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(1), 16_000)
    data = (tmp_path / "x.wav").read_bytes()
    more = chunk(b"bext", 602) + chunk(b"LIST", 100_000) + chunk(b"JUNK", 77_777)
    size = struct.pack("<I", len(data) - 8 + len(more))
    (tmp_path / "x.wav").write_bytes(b"RIFF" + size + data[8:36] + more + data[36:])
    soundfile.write(tmp_path / "x.aiff", noise(1), 16_000)
    with open(tmp_path / "x.aiff", "ab") as file:
        file.write(chunk(b"ID3 ", 200_001, ">"))
    soundfile.write(tmp_path / "x.caf", noise(1), 16_000, subtype="PCM_16")
    with open(tmp_path / "x.caf", "ab") as file:
        file.write(b"info" + struct.pack(">Q", 100_000) + random.Random(0).randbytes(100_000))
    for name in ("x.wav", "x.aiff", "x.caf"):
        assert count_samples(tmp_path / name) == (16_000, ""), name


def test_claims_of_days_are_refused(tmp_path):
    soundfile.write(tmp_path / "x.flac", noise(1), 16_000)
    data = bytearray((tmp_path / "x.flac").read_bytes())
    data[21:26] = bytes([data[21] | 15, 255, 255, 255, 255])  # 36 bits that count the samples
    (tmp_path / "x.flac").write_bytes(data)
    with pytest.raises(InputError, match=r"claims 1193 hours: its header is wrong, convert it"):
        count_samples(tmp_path / "x.flac")


# ----- Damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, n_bytes", [("flac", 1), ("flac", 20_000), ("mp3", 8000)])
def test_damage_costs_its_piece_and_not_the_rest(tmp_path, suffix, n_bytes):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, noise(60), 16_000)
    whole = load_audio(path)
    overwrite(path, 0.5, n_bytes)
    n_wrong = 0
    for i, (piece, problem) in enumerate(stream(path, 32_000)):
        reference = whole[32_000 * i :][:32_000]
        if problem:
            n_wrong += 1
            continue
        if i < 12 or suffix == "flac":  # behind the damage an mp3 has no clock
            assert largest_difference(piece, reference) <= 1e-6
        assert len(piece) > 10_000
        assert piece.abs().max() > 0.05
    assert i >= 29
    assert 2 <= n_wrong <= 6  # with the line on the whole file


def page_starts(data: bytes) -> list[int]:
    """Of an Ogg file: where its pages begin. The first holds the header, the second comments and tables."""
    return [match.start() for match in re.finditer(b"OggS", data)]


def with_page_lost(data: bytes, page: int) -> bytes:
    """With one bit of a page wrong, so that its checksum is."""
    at = page_starts(data)[page] + 60
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def check_places(path: Path, whole: torch.Tensor) -> float:
    """That what a damaged file holds is in its place, where no damage is told: the seconds of damage. At the
    end of Opus 6.5 ms are missing."""
    n_samples, remark = count_samples(path)
    assert len(whole) - 105 <= n_samples <= len(whole) + 1
    found = re.match(r"(\d+\.\d+) s are damaged, where pieces read from the file are wrong: ", remark)
    n_seconds = float(found[1])
    n_wrong = 0
    for i, (piece, problem) in enumerate(stream(path, 8_000)):
        if problem:
            n_wrong += len(piece) > 0
        else:
            if len(piece) < 8_000:
                piece = piece[:-100]  # the resampler's filter sees the end
            assert largest_difference(piece, whole[8_000 * i :][: len(piece)]) <= 1e-6
    assert n_seconds <= n_wrong / 2 <= n_seconds + 1
    return n_seconds


@pytest.mark.parametrize("kind", ["a bit", pytest.param("zeros", marks=LONG), "bytes that are gone"])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_damage_in_ogg_costs_its_pages_and_what_follows_stays_in_its_place(tmp_path, subtype, kind):
    """libsndfile moves what follows in Vorbis, and makes up sound in Opus, without a word."""
    path = tmp_path / "x.ogg"
    write(path, noise(40), 16_000, format="OGG", subtype=subtype)
    whole = load_audio(path)
    assert count_samples(path) == (640_000, "")
    data = path.read_bytes()
    page = page_starts(data)[12]
    if kind == "a bit":
        path.write_bytes(with_page_lost(data, 12))
    if kind == "zeros":
        path.write_bytes(data[: page + 100] + bytes(8900) + data[page + 9000 :])
    if kind == "bytes that are gone":
        path.write_bytes(data[:page] + data[page + 3000 :])
    assert 0.5 < check_places(path, whole) < 8


@pytest.mark.parametrize("subtype, rate", [("VORBIS", 44_100), ("VORBIS", 16_000), ("OPUS", 48_000)])
def test_damage_at_the_beginning_of_an_ogg_file(tmp_path, subtype, rate):
    path = tmp_path / "x.ogg"
    write(path, noise(6, rate, 2), rate, format="OGG", subtype=subtype)
    whole = load_audio(path)
    data = path.read_bytes()
    for page in (3, 4, 5):
        path.write_bytes(with_page_lost(data, page))
        check_places(path, whole)


@pytest.mark.parametrize("milliseconds", [20, pytest.param(60, marks=LONG), pytest.param(200, marks=LONG)])
def test_damage_in_opus_of_short_pages(av, tmp_path, milliseconds):
    path = tmp_path / "x.opus"
    encode(path, noise(12, 48_000), 48_000, "libopus", form="ogg", page_duration=str(1000 * milliseconds))
    whole = load_audio(path)
    data = path.read_bytes()
    assert len(page_starts(data)) > 11_000 / milliseconds
    for part in (0.1, 0.5, 0.8):
        path.write_bytes(with_page_lost(data, int(part * len(page_starts(data)))))
        assert check_places(path, whole) == pytest.approx(0.5 + milliseconds / 1000, abs=0.02)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("page", [2, -1])
def test_the_first_or_last_page_of_an_ogg_file_is_lost(tmp_path, subtype, page):
    """It then begins later, or ends earlier, and that is told."""
    path = tmp_path / "x.ogg"
    write(path, noise(20), 16_000, format="OGG", subtype=subtype)
    whole = load_audio(path)
    path.write_bytes(with_page_lost(path.read_bytes(), page))
    n_samples, remark = count_samples(path)
    assert 17 < n_samples / 16_000 < 20
    assert re.fullmatch(r"claims (19\.9\d|20\.00) s, 1\d\.\d\d s can be decoded", remark)
    streamed = torch.cat([piece for piece, _ in stream(path, 16_000)])
    assert len(streamed) == n_samples
    begin = 0
    if page == 2:
        likeness = np.correlate(whole[:60_000].numpy(), streamed[10_000:20_000].numpy(), "valid")
        begin = int(likeness.argmax()) - 10_000
        assert 0.5 < begin / 16_000 < 1.5
    difference = streamed - whole[begin : begin + n_samples]
    assert difference[8000:].abs().max() <= 1e-3  # a lossy decoder needs a moment


@pytest.mark.parametrize("tail", [b"OggS\0", b"OggS\0" + b"\xff" * 11, b"OggS\0\0" + b"\xff" * 21])
def test_what_only_looks_like_ogg_takes_no_time(tmp_path, tail):
    path = tmp_path / "x.ogg"
    write(path, noise(5), 16_000, format="OGG", subtype="VORBIS")
    n_pages = len(page_starts(path.read_bytes()))
    path.write_bytes(path.read_bytes() + tail * (2_000_000 // len(tail)))
    begin = time.process_time()
    with open(path, "rb", buffering=0) as raw:
        assert len(list(ogg_pages(raw))) == n_pages
    assert time.process_time() - begin < 3


def test_times_of_pages_that_cannot_be_are_no_crash(tmp_path):
    """A page is lost before one whose time is absurd, though its checksum holds."""
    path = tmp_path / "x.ogg"
    write(path, noise(10), 16_000, format="OGG", subtype="VORBIS")
    data = with_page_lost(path.read_bytes(), 6)
    at, end = page_starts(data)[8:10]
    for granule in (0, 5, 2**40, 2**62, 2**63):
        page = data[at : at + 6] + granule.to_bytes(8, "little") + data[at + 14 : at + 22] + bytes(4)
        page += data[at + 26 : end]
        page = page[:22] + ogg_checksum(page) + page[26:]
        path.write_bytes(data[:at] + page + data[end:])
        n_samples, remark = count_samples(path)
        assert 0 < n_samples <= 160_000
        assert remark


def test_scan_counts_what_pieces_can_reach(tmp_path):
    """libmpg123 gives up on a long damaged stretch: load_audio does not reach behind it, stream does."""
    path = tmp_path / "x.mp3"
    soundfile.write(path, noise(60), 16_000)
    overwrite(path, 0.5, 30_000)
    n_samples, remark = count_samples(path)
    assert n_samples / 16_000 == pytest.approx(30, abs=1)
    assert "s are damaged; only `prepare.py pack` reads what follows" in remark
    assert len(load_audio(path, n_samples - 8000, 8000)) == 8000
    n_streamed = sum(len(piece) for piece, _ in stream(path, 32_000))
    assert n_streamed / 16_000 == pytest.approx(60, abs=1)


def test_frames_that_are_skipped_are_told(tmp_path):
    path = tmp_path / "x.mp3"
    soundfile.write(path, noise(20), 16_000)
    overwrite(path, 0.4, 500)
    n_samples, remark = count_samples(path)
    assert 16 < n_samples / 16_000 < 20
    assert re.match(r"claims 20\.00 s, 1\d\.\d\d s can be decoded", remark)
    assert list(stream(path, 16_000))[-1][1] == remark


# ----- What PyAV reads -------------------------------------------------------------------------------------

# Container, encoder, its rate, samples that decoding begins late (at that rate), least signal to noise in dB
ENCODED = [
    ("m4a", "aac", 44_100, 0, 15), ("mp4", "aac", 44_100, 0, 15), ("mov", "pcm_s16le", 44_100, 0, 80),
    ("aac", "aac", 44_100, 1024, 15), ("webm", "libopus", 48_000, 0, 10), ("mka", "flac", 44_100, 0, 80),
    ("mkv", "libopus", 48_000, 0, 10), ("wma", "wmav2", 44_100, -2048, 10), ("m4a", "alac", 44_100, 0, 80),
]  # fmt: skip


def encode(
    path: Path, samples: np.ndarray, rate: int, codec: str, n_pictures: int = 0, form: str = "",
    **options: str,
) -> None:  # fmt: skip
    """Write (n, C) float32 with PyAV; the options are the container's."""
    import av

    forms = {"aac": "adts", "wma": "asf", "mka": "matroska", "mkv": "matroska", "m4a": "ipod"}
    channels = samples.shape[1]
    layout = "mono" if channels == 1 else "stereo"
    with av.open(str(path), "w", format=form or forms.get(path.suffix[1:]), options=options) as container:
        track = container.add_stream(codec, rate=rate)
        track.layout = layout
        if codec not in ("flac", "alac", "pcm_s16le"):
            track.bit_rate = 128_000 * channels
        if n_pictures:
            add_video(container, n_pictures)
        sample_format = track.codec_context.codec.audio_formats[0].name
        resampler = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
        for i in range(0, len(samples), 1024):
            part = np.ascontiguousarray(samples[i : i + 1024].reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
            frame.sample_rate = rate
            frame.pts = i
            for piece in resampler.resample(frame):
                container.mux(track.encode(piece))
        container.mux(track.encode(None))


def add_video(container, n_pictures: int = 3) -> None:
    """Black pictures, ten a second."""
    import av

    picture = container.add_stream("mpeg4", rate=10)
    picture.width = 64
    picture.height = 64
    picture.pix_fmt = "yuv420p"
    for i in range(n_pictures):
        frame = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), format="yuv420p")
        frame.pts = i
        container.mux(picture.encode(frame))
    container.mux(picture.encode(None))


@pytest.fixture
def av():
    return pytest.importorskip("av")


@pytest.mark.parametrize("suffix, codec, rate, lag, decibel", ENCODED)
def test_other_containers_hold_what_was_encoded(av, tmp_path, suffix, codec, rate, lag, decibel):
    samples = noise(6, rate, 2)
    path = tmp_path / f"x.{suffix}"
    encode(path, samples, rate, codec, n_pictures=3 * (suffix in ("mp4", "mov", "mkv")))
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    with open_audio(path) as file:
        assert (file.samplerate, file.channels) == (rate, 2)
        decoded = file.read(rate * 10, dtype="float32", always_2d=True)
    if lag > 0:
        decoded = decoded[lag:]
    else:
        samples = samples[-lag:]
    n = min(len(decoded), len(samples))
    assert n > 5.9 * rate
    assert len(decoded) - len(samples) <= 2048
    error = decoded[:n] - samples[:n]
    assert 10 * np.log10((samples[:n] ** 2).mean() / (error**2).mean()) > decibel


@pytest.mark.parametrize(
    "suffix, codec", [("m4a", "aac"), ("webm", "libopus"), ("aac", "aac"), ("wma", "wmav2")]
)
def test_pieces_of_other_containers_equal_the_whole(av, tmp_path, suffix, codec):
    path = tmp_path / f"x.{suffix}"
    encode(path, noise(12, 48_000, 2), 48_000, codec)
    check_pieces(path, 6, random.Random(0))
    assert count_samples(path)[1] == ""
    path.rename(tmp_path / "x")
    if suffix != "aac":  # which has nothing to be known by
        assert len(load_audio(tmp_path / "x")) > 190_000


def test_a_video_without_sound_is_called_that(av, tmp_path):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        add_video(container)
    with pytest.raises(InputError, match="this mp4 has no sound"):
        load_audio(tmp_path / "x.mp4")


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {}\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"
           "a=control:{}\n",
    "DASH": "<MPD><Period><AdaptationSet><Representation id='1' mimeType='audio/mp4'><BaseURL>{}</BaseURL>"
            "</Representation></AdaptationSet></Period></MPD>",
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_in_disguise_opens_no_file_and_no_address(av, tmp_path, monkeypatch, kind):
    encode(tmp_path / "other.m4a", noise(2, 44_100), 44_100, "aac")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.m4a"
        for target in ("other.m4a", str(tmp_path / "other.m4a"), address):
            (tmp_path / "x.m4a").write_text(PLAYLISTS[kind].format(target))
            with pytest.raises(InputError):
                load_audio(tmp_path / "x.m4a")
            with pytest.raises(av.FFmpegError):  # nor if it were not known by its text
                media.MediaFile(tmp_path / "x.m4a", "m4a")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "suffix, codec", [("aac", "aac"), ("m4a", "aac"), ("wma", "wmav2"), ("webm", "libopus")]
)
def test_damage_in_other_containers_is_told_and_costs_its_pieces(av, tmp_path, suffix, codec):
    """Packets become silence, of a webm the whole cluster. Of a wma it is only told that there is less."""
    path = tmp_path / f"x.{suffix}"
    encode(path, noise(20, 48_000), 48_000, codec)
    whole = load_audio(path)
    overwrite(path, 0.5, 3000)
    n_samples, remark = count_samples(path)
    assert n_samples <= len(whole)
    assert re.search(r"s are damaged|claims .* can be decoded", remark)
    n_damaged = 0
    for i, (piece, problem) in enumerate(stream(path, 32_000)):
        start = 32_000 * i
        if problem.startswith("damaged at"):
            n_damaged += 1
            with pytest.raises(InputError, match="damaged at"):
                load_audio(path, start, 32_000)
        elif problem:
            assert problem == remark
        elif i < 4:
            assert largest_difference(piece, whole[start : start + 32_000]) <= 1e-6
            assert largest_difference(load_audio(path, start, 32_000), piece) <= 1e-6
    assert i >= 6
    assert n_damaged <= 4
    if suffix != "wma":
        assert n_damaged
        assert n_samples == pytest.approx(len(whole), abs=8000)


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "webm", "aac"])
def test_joined_files_are_read_whole_or_refused(av, tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    codec = "libopus" if suffix == "webm" else "aac"
    encode(path, noise(4, 48_000), 48_000, codec)
    path.write_bytes(2 * path.read_bytes())
    if suffix in ("m4a", "mp4"):
        with pytest.raises(InputError, match="holds several files, joined end to end: convert it"):
            count_samples(path)
    else:
        assert count_samples(path) == (pytest.approx(128_000, abs=2000), "")


@pytest.mark.parametrize("name, codec, form", [
    ("x.mkv", "libopus", ""), ("x.mkv", "aac", ""), ("x.mp4", "aac", ""), ("x.m4a", "aac", "adts"),
    ("x.oga", "flac", "ogg"), ("x.webm", "libopus", "ogg"), ("x.mp3", "aac", "ipod"),
    ("x.wav", "libmp3lame", ""),
])  # fmt: skip
def test_whole_files_are_not_called_damaged(av, tmp_path, name, codec, form):
    """Pictures that go on without sound, files named as another format, formats in others' containers."""
    path = tmp_path / name
    encode(path, noise(6, 48_000), 48_000, codec, 120 if name in ("x.mkv", "x.mp4") else 0, form)
    assert count_samples(path) == (pytest.approx(96_000, abs=1200), "")


def test_aac_named_mp3_is_called_that(av, tmp_path):
    encode(tmp_path / "x.mp3", noise(6, 48_000), 48_000, "aac", form="adts")
    with pytest.raises(InputError, match="is named mp3 but holds AAC: rename it to .aac"):
        count_samples(tmp_path / "x.mp3")


def test_a_cut_webm_is_counted_by_what_it_holds_and_that_is_told(av, tmp_path):
    path = tmp_path / "x.webm"
    encode(path, noise(20, 48_000), 48_000, "libopus")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    n_samples, remark = count_samples(path)
    assert n_samples == pytest.approx(160_000, abs=16_000)
    assert re.match(r"claims 20\.\d\d s, (9|10)\.\d\d s can be decoded", remark)
    assert len(load_audio(path)) == pytest.approx(n_samples, abs=1)


def test_a_rate_that_changes_is_one_line(av, tmp_path):
    """As where a broadcast goes from one programme to the next."""
    for rate in (44_100, 22_050):
        encode(tmp_path / f"{rate}.aac", noise(2, rate), rate, "aac")
    data = (tmp_path / "44100.aac").read_bytes() + (tmp_path / "22050.aac").read_bytes()
    (tmp_path / "x.aac").write_bytes(data)
    with pytest.raises(InputError, match="its sample rate or number of channels changes: convert it"):
        count_samples(tmp_path / "x.aac")


def test_a_piece_deep_in_a_long_file_is_called_slow_once(av, tmp_path, capsys):
    media.say_slow.cache_clear()
    path = tmp_path / "x.m4a"
    encode(path, noise(70, 16_000), 16_000, "aac")
    load_audio(path, 40 * 16_000, 8000)
    assert not capsys.readouterr().err
    for _ in range(2):
        load_audio(path, 65 * 16_000, 8000)
    assert capsys.readouterr().err.count("`prepare.py pack` decodes them once") == 1


def tags_at_the_end() -> dict[str, bytes]:
    """Tags of mp3 whose length is in their last bytes only."""
    item = struct.pack("<II", 6000, 0) + b"Lyrics\0" + b"la " * 2000
    ape = item + b"APETAGEX" + struct.pack("<III", 1000, len(item) + 32, 1) + bytes(12)
    lyrics = b"LYRICSBEGINLYR06000" + b"la " * 2000
    lyrics += b"%06dLYRICS200" % len(lyrics)
    id3 = b"TAG" + bytes(125)
    return {"ape": ape, "ape, id3": ape + id3, "lyrics, id3": lyrics + id3}


@pytest.mark.parametrize("name", tags_at_the_end())
def test_tags_at_the_end_of_an_mp3_are_no_sound(tmp_path, name):
    data = mp3(5)
    (tmp_path / "x.mp3").write_bytes(data)
    (tmp_path / "y.mp3").write_bytes(data + tags_at_the_end()[name])
    assert count_samples(tmp_path / "y.mp3") == count_samples(tmp_path / "x.mp3")


def test_headers_that_do_not_say_how_long_a_file_is(tmp_path):
    """A recorder that lost its power, an encoder that wrote to a pipe; an empty file is still empty."""
    wav = tmp_path / "x.wav"
    soundfile.write(wav, noise(5, 16_000, 1, 0), 16_000)
    data = wav.read_bytes()
    wav.write_bytes(data[:40] + bytes(4) + data[44:])
    with pytest.raises(InputError, match="says that it is empty, but sound follows: convert it"):
        count_samples(wav)
    wav.write_bytes(data[:40] + bytes(4))
    with pytest.raises(InputError, match="too short"):
        count_samples(wav)
    flac = tmp_path / "x.flac"
    soundfile.write(flac, noise(5, 16_000, 1, 0), 16_000)
    data = bytearray(flac.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    flac.write_bytes(data)
    with pytest.raises(InputError, match="does not say how long it is: convert it"):
        count_samples(flac)


@pytest.mark.parametrize("form", ["WAV", "AIFF"])
def test_a_file_that_was_cut_is_told(tmp_path, form):
    """libsndfile takes what is there for the whole."""
    path = tmp_path / "x"
    soundfile.write(path, noise(4, 16_000, 1, 0), 16_000, format=form)
    assert count_samples(path) == (64_000, "")
    path.write_bytes(path.read_bytes()[:64_000])
    n_samples, remark = count_samples(path)
    assert n_samples < 32_000
    assert "it is cut: its header claims 64,0" in remark


def test_a_folder_goes_before_a_link_to_it(tmp_path):
    """Its name is the class of what is in it."""
    (tmp_path / "dog").mkdir()
    soundfile.write(tmp_path / "dog" / "x.wav", noise(1, 16_000, 1, 0), 16_000)
    (tmp_path / "a link").symlink_to(tmp_path / "dog")
    assert find_audio(tmp_path) == [tmp_path / "dog" / "x.wav"]


def test_folders_of_tools_in_any_spelling(tmp_path, capsys):
    for folder in ("$Recycle.Bin", "__macosx", "#recycle", "System Volume Information", "birds"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "x.wav", noise(1, 16_000, 1, 0), 16_000)
    assert find_audio(tmp_path) == [tmp_path / "birds" / "x.wav"]
    assert "left out: 4 files that are hidden or a tool's" in capsys.readouterr().err


def test_a_matroska_file_whose_clock_begins_later(tmp_path):
    """A piece cut from a longer recording is whole."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.mka"), "w") as container:
        track = container.add_stream("flac", rate=16_000, layout="mono")
        samples = (noise(6, 16_000, 1, 0).reshape(1, -1) * 32767).astype(np.int16)
        for start in range(0, samples.shape[1], 4000):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + 4000], format="s16", layout="mono")
            frame.sample_rate = 16_000
            frame.pts = 20 * 16_000 + start
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    n_samples, remark = count_samples(tmp_path / "x.mka")
    assert (n_samples, remark) == (96_000, "")


# ----- Libraries, replaced files, mutated files ------------------------------------------------------------


def test_warnings_of_torch_are_shown(tmp_path):
    """Its loggers write to the stderr of the import, which is silenced."""
    code = "import logging, torch\nfrom evaluate import run_script\ndef main():\n"
    code += " logging.getLogger('torch._dynamo').warning('recompiled')\n return 0\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.count("recompiled") == 1


def test_warnings_of_libraries_are_kept_from_stderr_and_those_of_python_are_not(tmp_path):
    data = mp3(20)
    (tmp_path / "x.mp3").write_bytes(data[:100_000])
    code = f"import soundfile, sys\ndef main():\n soundfile.info({str(tmp_path / 'x.mp3')!r})\n"
    code += " print('mine', file=sys.stderr)\n return 0\n"
    loud = subprocess.run([sys.executable, "-c", f"{code}main()"], capture_output=True, text=True, cwd=ROOT)
    assert "arning" in loud.stderr and "mine" in loud.stderr
    quiet = f"{code}from evaluate import run_script\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", quiet], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "mine\n"


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=LONG)])
def test_files_that_are_replaced_while_they_are_counted(tmp_path, rounds):
    """By another file, by damage, by a link to nothing: one of the files is counted, or it is refused."""
    rng = random.Random(rounds)
    path = tmp_path / "x.wav"
    for n_samples in (8000, 12_000):
        soundfile.write(tmp_path / f"{n_samples}.wav", tone(n_samples).numpy(), 16_000)
    (tmp_path / "bad.wav").write_bytes((tmp_path / "8000.wav").read_bytes()[:60])
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            (tmp_path / "new").symlink_to(tmp_path / rng.choice(["8000.wav", "12000.wav", "bad.wav", "gone"]))
            os.replace(tmp_path / "new", path)

    thread = threading.Thread(target=replace)
    thread.start()
    said = []
    end = time.time() + 60
    try:
        while (len(said) < rounds or len(set(said)) < 3) and time.time() < end:
            try:
                said.append(count_samples(path)[0])
            except InputError:
                said.append("refused")
    finally:
        stop.set()
        thread.join()
    assert set(said) == {8000, 12_000, "refused"}


def mutate(data: bytearray, suffix: str, rng: random.Random) -> None:
    """Flip, overwrite, cut out or repeat some bytes, or change what an mp3 says of its length."""
    for _ in range(rng.choice([1, 3, 30])):
        at = rng.randrange(len(data))
        size = rng.randrange(1, 64)
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + size] = rng.randbytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:  # most of what matters is at the front
                data[rng.randrange(min(len(data), 64))] = rng.choice([0, 127, 128, 255])
            case 5:  # longer damage, behind which decoding begins anew
                data[at : at + 100 * size] = rng.choice([bytes(100 * size), rng.randbytes(100 * size)])
    place = data.find(b"Xing")
    if suffix == "mp3" and place >= 0 and rng.random() < 0.5:
        frames = rng.choice([0, 1, rng.randrange(1000), rng.randrange(2**32), 2**32 - 1])
        data[place + 8 : place + 12] = frames.to_bytes(4, "big")
    if suffix == "mp3" and place >= 0 and rng.random() < 0.2:
        del data[: data.find(data[:2], place)]  # as from a pipe


def outcome(path: Path, start: int) -> list:
    """What count_samples, load_audio and stream make of a file, within two seconds and 500 MiB each."""
    said = []
    functions = (
        lambda: count_samples(path),
        lambda: load_audio(path, start, 164_080, allow_silence=True).numpy().tobytes(),
        lambda: [(piece.numpy().tobytes(), problem) for piece, problem in stream(path, 164_080)],
    )
    for function in functions:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident()
        begun = time.time()
        try:
            said.append(function())
        except InputError as error:
            assert str(error) and "\n" not in str(error)
            said.append(str(error))
        assert time.time() - begun < 2, path
        assert resident("VmHWM") - before < 500, path
    return said


@pytest.mark.parametrize("n_files", [100, pytest.param(2000, marks=LONG)])
def test_mutated_audio_never_crashes_hangs_or_swells(tmp_path, n_files):
    """Bytes of real files in six formats: each is read or refused in one line, twice in the same way, and of
    what is counted the end can be read."""
    rng = random.Random(n_files)
    originals = {}
    for suffix in ("wav", "flac", "ogg", "mp3"):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(4), 16_000, format=suffix.upper())
        originals[suffix] = buffer.getvalue()
    with contextlib.suppress(ImportError):
        for suffix, codec in (("m4a", "aac"), ("webm", "libopus")):
            encode(tmp_path / f"good.{suffix}", noise(4, 48_000), 48_000, codec)
            originals[suffix] = (tmp_path / f"good.{suffix}").read_bytes()
    n_counted = 0
    for i in range(n_files):
        suffix = list(originals)[i % len(originals)]
        data = bytearray(originals[suffix])
        mutate(data, suffix, rng)
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(data)
        start = rng.choice([0, rng.randrange(2 ** rng.randrange(1, 40))])
        said = outcome(path, start)
        assert outcome(path, start) == said
        if isinstance(said[0], tuple):
            n_counted += 1
            n_samples = said[0][0]
            try:
                load_audio(path, max(0, n_samples - 2000), 164_080, allow_silence=True)
            except InputError as error:
                assert not str(error).startswith("has no sound"), path
    assert n_files / 4 < n_counted < n_files
