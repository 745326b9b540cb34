"""Makes the reference audio: clips cut from sounds in Debian 12 packages, and their manifests.

    pip install soxr "soundfile>=0.13"                   # beside the project's own requirements
    python extras/audio/build.py OUT                     # every set; some: --sets drums mandarin
    python extras/audio/build.py OUT --from FOLDER       # manifests only, for clips that FOLDER has already
    python pretrain.py --data OUT/pretrain.tsv

Downloads with Debian's apt-get and unpacks with dpkg-deb: nothing is installed and no root is needed. ffmpeg
is used for 76 clips of pretrain and events, fluidsynth for 328 of drums; espeak-ng and flite, the voices of
words, are downloaded too. Clips that are there already are not made again: a run that was interrupted goes on
where it stopped. README.md explains the tables beside this file, which name the sources.
"""

import argparse
import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter, defaultdict, namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
from tqdm import tqdm

HERE = Path(__file__).parent
SAMPLE_RATE = 16_000
PAD = 320  # samples kept around a sound when silence is cut off: 20 ms
FADE = 80  # samples over which a sound fades in and out: 5 ms
GAP = np.zeros(2_400, np.float32)  # between the sounds of one clip: 0.15 s

NOTE_SECONDS = 2.4  # from note to note
# Percussion keys of General MIDI in the order in which they are played. The order matters: what a synthesizer
# has played before changes the next note's waveform a little.
KEYS = [35, 36, 37, 38, 40, 39, 41, 43, 45, 47, 48, 50, 42, 46, 49, 57, 52, 55, 51, 59, 53, 54, 56, 67, 68]
KEYS += [60, 61, 62, 63, 64, 69, 70, 82, 75, 76, 77]

SPEECH = ["espeak-ng", "espeak-ng-data", "libespeak-ng1", "flite", "libflite1"]  # packages of the voices
TEN_WORDS = "yes no up down left right on off stop go".split()  # those of the manifests words10


class Recipe(NamedTuple):
    """What the clips of one set have in common."""

    silence: float  # both ends of a sound are cut off where they stay this many dB below its peak
    seconds: float  # how long a sound, and a clip, is at most
    quiet: float  # a sound whose peak is below this ...
    peak: float  # ... is scaled to this peak
    bitrate: int


RECIPES = {
    "pretrain": Recipe(silence=-55, seconds=10, quiet=0.1, peak=0.2, bitrate=24_000),
    "drums": Recipe(silence=-50, seconds=1.5, quiet=np.inf, peak=0.7, bitrate=32_000),
    "events": Recipe(silence=-50, seconds=5, quiet=np.inf, peak=0.7, bitrate=26_000),
    "mandarin": Recipe(silence=-40, seconds=1, quiet=np.inf, peak=0.7, bitrate=24_000),
    "words": Recipe(silence=-np.inf, seconds=1, quiet=np.inf, peak=0.7, bitrate=20_000),
}


# A line of a set's table behind the name of the set; all are strings
Clip = namedtuple("Clip", "set path n_samples label split fold package folder files")


def read_table(name: str) -> list[list[str]]:
    lines = (HERE / f"{name}.tsv").read_text("utf-8").split("\n")
    return [line.split("\t") for line in lines[1:] if line]


def run(*command: str | Path, cwd: str | Path | None = None) -> bytes:
    """What a program prints. Raises OSError with its last words if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True)
    except FileNotFoundError:
        raise OSError(f"this needs the program {command[0]} (apt install {command[0]})") from None
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip().split("\n")[-1] or f"{command[0]} failed")
    return done.stdout


def resample(sound: np.ndarray, rate: int) -> np.ndarray:
    import soxr  # here, because --from does without it

    return np.nan_to_num(soxr.resample(sound, rate, SAMPLE_RATE, "HQ") if rate != SAMPLE_RATE else sound)


def read(path: Path, at: str, seconds: float) -> np.ndarray:
    """A sound, mono at 16 kHz: the file, `seconds` of it from frame `at` on, or a SoundFont's note `at`."""
    if path.suffix in (".sf2", ".sf3"):
        program, note = at.split(",", 1)
        return resample(*play(path, int(program))[note])
    if path.suffix == ".pat":
        return read_patch(path)
    if path.suffix == ".g722":
        form = ("-f", "f32le", "-ac", "1", "-ar", "16000", "-")
        pcm = run("ffmpeg", "-v", "error", "-f", "g722", "-i", path, *form)
        sound = np.frombuffer(pcm, np.float32)
        return sound[int(at) :][: int(seconds * SAMPLE_RATE)] if at else sound
    with sf.SoundFile(path) as file:
        file.seek(int(at or 0))
        sound = file.read(int(seconds * file.samplerate) if at else -1, dtype="float32", always_2d=True)
        return resample(sound.mean(1), file.samplerate)


def read_patch(path: Path) -> np.ndarray:
    """The first sound of a Gravis Ultrasound patch: headers of fixed lengths, then 16-bit samples."""
    data = path.read_bytes()
    (n_bytes,), (rate,) = struct.unpack_from("<I", data, 247), struct.unpack_from("<H", data, 259)
    unsigned = data[294] & 2
    sound = np.frombuffer(data[335 : 335 + n_bytes // 2 * 2], "<u2" if unsigned else "<i2").astype(np.float32)
    return resample((sound - 32768 if unsigned else sound) / 32768, rate)


@functools.lru_cache(maxsize=4)
def play(font: Path, program: int) -> dict[str, tuple[np.ndarray, int]]:
    """Plays a SoundFont's drums one after the other: "key,velocity" -> waveform and its rate."""
    if font.stem.endswith("LV2"):  # a single kit, on channel 0, at four velocities
        channel, notes = 0, [(key, velocity) for key in KEYS if key < 60 for velocity in (30, 60, 90, 120)]
    else:  # General MIDI has its drums on channel 9; program 40 is the brush kit, whose snares are left out
        channel, notes = 9, [(key, 110) for key in KEYS if program != 40 or key not in (38, 40)]
    events = bytes([0, 0xC0 | channel, program])
    for key, velocity in notes:  # key down; 1152 ticks, half of NOTE_SECONDS, later up; then as long silence
        events += bytes([0, 0x90 | channel, key, velocity, 0x89, 0, 0x80 | channel, key, 0])
        events += bytes([0x89, 0, 0xB0 | channel, 120, 0])
    events += bytes([0x87, 0x40, 0xFF, 0x2F, 0])
    midi = struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, 480, b"MTrk", len(events)) + events
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "notes.mid").write_bytes(midi)
        options = "-ni -q -R 0 -C 0 -g 0.8 -r 44100 -o synth.dynamic-sample-loading=1 -F notes.wav".split()
        run("fluidsynth", *options, font.resolve(), "notes.mid", cwd=folder)
        sound, rate = sf.read(Path(folder, "notes.wav"), dtype="float32", always_2d=True)
    starts = [i * NOTE_SECONDS for i in range(len(notes))]
    cuts = [slice(int(start * rate), int((start + NOTE_SECONDS - 0.05) * rate)) for start in starts]
    return {f"{key},{velocity}": (sound[cut].mean(1), rate) for (key, velocity), cut in zip(notes, cuts)}


def cut_silence(sound: np.ndarray, decibels: float, pad: int = PAD) -> np.ndarray:
    loud = np.flatnonzero(np.abs(sound) > np.abs(sound).max() * 10 ** (decibels / 20))
    return sound[max(0, loud[0] - pad) : loud[-1] + pad]


noise_of = functools.lru_cache(maxsize=4)(functools.partial(read, at="", seconds=0))


def say(word: str, path: Path, how: str, speech: list[str]) -> np.ndarray:
    """A word in noise, 1 s: `how` is from which sample of the noise on, decibels, voice, its speed and pitch,
    and from which sample of the clip on it speaks."""
    at, snr, voice, rate, pitch, start = how.split(",")
    if "+" in voice:
        command = ["espeak-ng", "-v", voice, "-s", rate, "-p", pitch, "-w", "word.wav", word]
    else:
        stretch = f"duration_stretch={175 / int(rate):.2f}"
        command = ["flite", "-voice", voice, "--setf", stretch, "-t", word, "-o", "word.wav"]
    with tempfile.TemporaryDirectory() as folder:
        run(*speech, *command, cwd=folder)
        spoken = resample(*sf.read(Path(folder, "word.wav"), dtype="float32"))
    spoken = cut_silence(spoken, -40, pad=480)
    spoken = spoken * (0.6 / np.abs(spoken).max())  # changes the mixture's rounding only, but Opus notices
    spoken = np.pad(spoken, (int(start), SAMPLE_RATE))[:SAMPLE_RATE]
    noise = noise_of(path)[int(at) :][:SAMPLE_RATE]
    gain = np.sqrt((spoken**2).mean() / ((noise**2).mean() + 1e-9)) * 10 ** (-float(snr) / 20)
    return spoken + gain * noise


def make(clip: Clip, folder: Path, target: Path, speech: list[str]) -> None:
    """Writes a clip, from the unpacked files in `folder`."""
    recipe, sounds = RECIPES[clip.set], []
    longest = int(recipe.seconds * SAMPLE_RATE)
    for file in clip.files.split("|"):
        name, _, at = file.partition("@")
        path = folder / clip.folder / name
        spoken = clip.set == "words"
        sound = say(clip.label, path, at, speech) if spoken else read(path, at, recipe.seconds)
        sound = cut_silence(sound, recipe.silence)[:longest]
        peak = np.abs(sound).max()
        sound = sound * (recipe.peak / peak if peak < recipe.quiet else 1)
        fade = np.linspace(0, 1, min(FADE, len(sound) // 2), dtype=np.float32)
        sound[: len(fade)] *= fade
        sound[len(sound) - len(fade) :] *= fade[::-1]
        sounds += [sound, GAP]
    sound = np.concatenate(sounds[:-1])[:longest].clip(-0.999, 0.999)
    level = 1 - (recipe.bitrate - 6_000) / 250_000  # libsndfile's levels 0 to 1 are 256 to 6 kbit/s
    target.parent.mkdir(parents=True, exist_ok=True)
    sf.write(f"{target}.tmp", sound, SAMPLE_RATE, "OPUS", format="OGG", compression_level=level)
    os.replace(f"{target}.tmp", target)


def unpack(package: str, cache: Path, folder: Path) -> None:
    """Unpacks a package, downloaded unless cached."""
    if not list(cache.glob(f"{package}_*.deb")):
        run("apt-get", "download", package, cwd=folder)
        for deb in folder.glob("*.deb"):
            os.replace(deb, cache / deb.name)
    run("dpkg-deb", "-x", next(cache.glob(f"{package}_*.deb")), folder)


def unpack_speech(cache: Path, licences: Path) -> list[str]:
    """Unpacks espeak-ng and flite, with the libraries that the system lacks. How their commands begin."""
    folder = cache.resolve() / "speech"
    folder.mkdir(exist_ok=True)
    plan = run("apt-get", "--simulate", "--no-install-recommends", "install", "espeak-ng", "flite").decode()
    for package in dict.fromkeys(SPEECH + re.findall(r"^Inst (\S+)", plan, re.M)):
        unpack(package, cache, folder)
    for package in SPEECH:
        shutil.copy(folder / "usr/share/doc" / package / "copyright", licences / f"{package}.txt")
    libraries = ":".join(sorted({str(file.parent) for file in folder.rglob("*.so*")}))
    data = next(folder.glob("usr/lib/*/espeak-ng-data")).parent
    return ["env", f"PATH={folder}/usr/bin", f"LD_LIBRARY_PATH={libraries}", f"ESPEAK_DATA_PATH={data}"]


def build_package(
    package: str, folder: str, clips: list[Clip], out: Path, cache: Path, speech: list[str], bar: tqdm
) -> None:
    """Makes clips of one package. What cannot be made is printed and left out."""
    problems = Counter()
    with tempfile.TemporaryDirectory(dir=cache) as unpacked:
        try:
            unpack(package, cache, Path(unpacked))
            for licence in list(Path(unpacked).glob("usr/share/doc/*/copyright"))[:1]:
                shutil.copy(licence, out / "licences" / f"{package}.txt")
        except OSError as error:
            problems[str(error)] = len(clips)
            bar.update(len(clips))
            clips = []
        for clip in sorted(clips, key=lambda clip: clip.files):  # so that a SoundFont is played once
            try:
                make(clip, Path(unpacked, folder), out / clip.set / clip.path, speech)
            except (OSError, sf.SoundFileError, ValueError, IndexError) as error:
                problems[str(error)] += 1
            bar.update()
    for problem, count in problems.items():
        tqdm.write(f"{package}: {count} clips not made: {problem}")


def length(path: Path) -> str:
    """Number of samples of an audio file; empty if it cannot be read."""
    try:
        return str(sf.info(path).frames)
    except sf.SoundFileError:
        return ""


def write_manifests(name: str, clips: list[Clip], out: Path, root: str) -> None:
    """OUT/SET.tsv, or OUT/SET_train.tsv and OUT/SET_test.tsv; with folds OUT/SET_train1.tsv and so on too.
    Those of words are called words35, and written again for ten of them, words10."""
    lists = defaultdict(list)
    for clip in clips:
        line = "\t".join([f"{name}/{clip.path}", clip.n_samples, clip.label]).rstrip("\t")
        title = {"words": "words35"}.get(name, name)
        lists[f"{title}_{clip.split}" if clip.split else title].append(line)
        for fold in "12345" if clip.fold else "":
            lists[f"{name}_{'test' if clip.fold == fold else 'train'}{fold}"].append(line)
        if name == "words" and clip.label in TEN_WORDS:
            lists[f"words10_{clip.split}"].append(line)
    for manifest, lines in lists.items():
        (out / f"{manifest}.tsv").write_text("\n".join([root, *lines, ""]), "utf-8")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, help="folder for clips and manifests")
    parser.add_argument("--sets", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    manifests_only = dict(dest="existing", metavar="FOLDER", help="has the clips: manifests only")
    parser.add_argument("--from", type=Path, **manifests_only)
    parser.add_argument("--cache", type=Path, help="folder for the downloaded packages; default OUT/packages")
    parser.add_argument("--workers", type=int, default=2, help="packages at a time")
    args = parser.parse_args()
    sets = {name: [Clip(name, *fields) for fields in read_table(name)] for name in args.sets}
    root, cache = args.existing or args.out, args.cache or args.out / "packages"
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.existing:
        todo = defaultdict(list)
        for clip in sum(sets.values(), []):
            if length(root / clip.set / clip.path) != clip.n_samples:
                todo[clip.package].append(clip)
        folders = {package: folder for package, _, folder, _ in read_table("packages")}
        cache.mkdir(parents=True, exist_ok=True)
        (args.out / "licences").mkdir(exist_ok=True)
        speech = []  # the voices that are installed, should they not be unpacked
        if any(clip.set == "words" for clip in sum(todo.values(), [])):
            try:
                speech = unpack_speech(cache, args.out / "licences")
            except OSError as error:
                print(f"voices: {error}")
        n_clips = sum(map(len, todo.values()))
        with tqdm(total=n_clips, unit="clip", disable=None) as bar, ThreadPool(args.workers) as pool:
            same = (args.out, cache, speech, bar)
            jobs = [(name, folders[name], clips, *same) for name, clips in todo.items()]
            pool.starmap(build_package, jobs, chunksize=1)
    for name, clips in sets.items():
        lengths = {clip: length(root / name / clip.path) for clip in clips}
        good = [clip for clip in clips if lengths[clip] == clip.n_samples]
        missing = list(lengths.values()).count("")
        differ = len(clips) - len(good) - missing
        print(f"{name}: {len(good)} of {len(clips)} clips match, {missing} missing, {differ} differ")
        write_manifests(name, good, args.out, str(root.resolve()) if args.existing else ".")


if __name__ == "__main__":
    main()
