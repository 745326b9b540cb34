"""Features as .npz files, for listen.py: written row by row, so that a day of sound needs little memory;
complete or not at all, so that a stopped job can resume; and marked with the settings that made them.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, AudioDataset, InputError
from evaluate import pooled, predict, probe_block
from model import Encoder, ModelConfig

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TEMPORARY = ".features-"  # prefix of the name of a file while it is being written
ABANDONED = 3600  # seconds without a write after which its job must be dead


class Rows:
    """An array that grows row by row, in an unnamed temporary file. Raises OSError if that fails."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)
        self.dtype = np.dtype(np.float32)
        self.row_shape = ()
        self.n_rows = 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows of the same type and shape as those before."""
        self.dtype = rows.dtype
        self.row_shape = rows.shape[1:]
        self.n_rows += len(rows)
        self.file.write(rows.tobytes())

    def copy_to(self, target) -> None:
        """Write everything to an open file, as numpy.save does."""
        header = dict(
            descr=np.lib.format.dtype_to_descr(self.dtype),
            fortran_order=False,
            shape=(self.n_rows, *self.row_shape),
        )
        np.lib.format.write_array_header_1_0(target, header)
        self.file.seek(0)
        shutil.copyfileobj(self.file, target, 2**20)


def collect_tokens(windows: Iterable, config: ModelConfig, folder: Path) -> dict[str, Rows]:
    """Tokens of a file by time, without padding, from the windows of listen.hear; kept in `folder` meanwhile.
    cls (windows, D) and cls_times (windows, 2), seconds from and to; patches (frames, bands, D); frames
    (frames, D), their mean over bands; and times (frames,), seconds at the middle of each frame of 160 ms."""
    P = config.patch_size
    arrays = {name: Rows(folder) for name in ("cls", "cls_times", "patches", "frames", "times")}
    for window in windows:
        if window.output is None:
            continue
        n_samples = round((window.end - window.begin) * SAMPLE_RATE)
        n_frames = 1 + (n_samples - FRAME_LENGTH) // FRAME_SHIFT
        n = max(1, n_frames // P)
        tokens = window.output                                                  # (1+N, D)
        patches = tokens[1:].reshape(-1, config.grid(0)[1], config.width)[:n]   # (n, W, D)
        seconds = (np.arange(n) + 0.5) * P * FRAME_SHIFT / SAMPLE_RATE          # (n,)
        arrays["cls"].append(tokens[:1])
        arrays["cls_times"].append(np.array([[window.begin, window.end]]))
        arrays["patches"].append(patches)
        arrays["frames"].append(patches.mean(1))
        arrays["times"].append(window.begin + seconds)
    return arrays


def settings_of(encoder: Encoder, block: int, **others) -> dict:
    """What features depend on, for find_features: the network, the block, and others. Raises InputError."""
    digest = hashlib.sha256(repr(encoder.config).encode())
    for name, weight in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().numpy().tobytes())
    return dict(weights=digest.hexdigest(), block=probe_block(encoder.config, block)) | others


def find_features(place: Path, settings: dict) -> dict | None:
    """How a .npz says it was made; None if there is no such file. Raises InputError if it was made with other
    settings, OSError if it cannot be opened."""
    try:
        with zipfile.ZipFile(place) as archive:
            found = json.loads(archive.comment)
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, ValueError):  # written by others
        found = None
    if isinstance(found, dict) and settings.items() <= found.items():
        return found
    other = "another checkpoint, --block or recording"
    raise InputError(f"{place} exists, made with {other}: remove it or choose another name")


def write_npz(place: Path, arrays: dict[str, Rows], settings: dict) -> None:
    """Write a temporary file, then rename it; if another job was quicker, its file stays. Raises InputError
    if that one was made with other settings, OSError if nothing can be written."""
    partial = place.with_name(f"{TEMPORARY}{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.comment = json.dumps(settings).encode()  # numpy.load passes over it
                for name, rows in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as target:
                        rows.copy_to(target)
            file.flush()
            os.fsync(file.fileno())
        if not place.exists():
            os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
    find_features(place, settings)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed jobs left below a folder; what another job is writing now stays."""
    for path in folder.rglob(f"{TEMPORARY}*.tmp"):
        with contextlib.suppress(OSError):  # another job has removed it, or forbids it
            if path.stat().st_mtime < time.time() - ABANDONED:
                path.unlink()


def name_places(output: str, files: list[tuple[Path, Path]]) -> list[Path]:
    """Where the features of each file go: DIR/name.npz, or of one file the .npz itself. `files` are pairs of
    a file and the folder from which it is named. Raises InputError."""
    if os.path.exists(output) and not output.endswith(".npz") and not os.path.isdir(output):
        raise InputError(f"{output} exists and is no folder: choose another name")
    if Path(output).suffix not in ("", ".npz") and not os.path.isdir(output):
        raise InputError(f"{output}: features are written as .npz, or into a folder")
    if output.endswith(".npz"):
        if len(files) > 1:
            raise InputError(f"{output} is for one file: name a folder for the features of {len(files)}")
        return [Path(output)]
    names = [path.relative_to(root) for path, root in files]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{name} is there twice: give the folder above, or one after the other")
    return [Path(output, f"{name}.npz") for name in names]


def write_features(
    output: str, files: list[tuple[Path, Path]], settings: dict,
    collect: Callable[[Path, Path], tuple[dict[str, Rows], str]],
) -> int:  # fmt: skip
    """Write the features of each file that has none; returns the exit status. `collect` takes a file and a
    folder for temporary files, and returns (arrays, what is wrong). Raises InputError if features made with
    other settings are there, or if the disk is full."""
    jobs = []
    for (path, _), place in zip(files, name_places(output, files)):
        own = settings | dict(recording=digest_of(path))
        jobs.append((path, place, own))
        with contextlib.suppress(OSError):  # reported when it is this file's turn
            find_features(place, own)
    if os.path.isdir(output):
        remove_abandoned(Path(output))
    n_found = 0
    n_bad = 0
    for path, place, own in tqdm(jobs, disable=len(jobs) == 1 or None, leave=False):
        is_good = True
        try:
            found = find_features(place, own)  # again: another job may have written it
            if found is not None:
                n_found += 1
                problem = found["problem"]
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                arrays, problem = collect(path, place.parent)
                is_good = arrays["cls"].n_rows > 0
                if is_good:
                    write_npz(place, arrays, own | dict(problem=problem))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise InputError(f"{place.parent}: the disk is full; the same command goes on") from None
            problem = f"cannot write {place}: {error.strerror}"
            is_good = False
        n_bad += not is_good
        tell_problem(path, problem, is_good)
    said = summarize(len(jobs), n_bad)
    if n_found:
        said += f", {n_found} were there already"
    print(f"{output}: features of {said}")
    return int(n_bad == len(jobs))


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def tell_problem(path: Path, problem: str, is_good: bool) -> None:
    """Tell on stderr what is wrong with a file, if anything."""
    if problem and is_good:
        tqdm.write(f"{path} is heard in part: {problem}", file=sys.stderr)
    elif problem:
        tqdm.write(f"{path} cannot be used: {problem}", file=sys.stderr)


def summarize(n_files: int, n_bad: int) -> str:
    """The number of files and of those that failed, if any."""
    if n_bad:
        return f"{n_files} files, {n_bad} not usable"
    return f"{n_files} files"


def write_manifest_features(args, encoder: Encoder, device: torch.device) -> int:
    """Write the features of a manifest's clips, as the probes see them; returns the exit status.
    Raises InputError, and OSError if nothing can be written."""
    place = Path(args.features)
    if os.path.lexists(place):
        raise InputError(f"{place} exists: remove it or choose another name")
    data = AudioDataset(args.inputs[0], encoder.config.clip_frames, segments=False, allow_silence=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: Rows(place.parent) for name in ("features", "labels", "files")}  # fails before the work
    function = pooled(encoder, args.pooling, args.block)
    found = predict(function, data, encoder.config, device, args.workers)
    items = found.items.tolist()
    arrays["features"].append(found.values.numpy())
    arrays["labels"].append(np.array([",".join(data.labels(item)) for item in items]))
    arrays["files"].append(np.array([data.name(item) for item in items]))
    digest = data.manifest.digest
    settings = settings_of(encoder, args.block, pooling=args.pooling, manifest=digest)
    write_npz(place, arrays, settings)
    for problem in found.problems:
        print(f"cannot be used: {problem.expandtabs(1)}", file=sys.stderr)
    said = f"{place}: features {tuple(found.values.shape)}"
    if found.problems:
        said += f"; {len(found.problems)} clips cannot be used"
    print(said)
    if data.n_cut:
        print(f"{data.n_cut} clips are longer than {data.n_frames} frames: features are of their beginning")
    return 0
