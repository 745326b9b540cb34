"""Clips of tar files (WebDataset) and parquet files (Hugging Face), in order, without unpacking them.

    check_shard(path)             raises InputError unless it can be opened
    entries_of(path, classes)     its clips and, in their place, what is damaged
"""

import functools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from data import InputError, first_line
from extras.media import AUDIO_SUFFIXES, is_hidden, what_is
from extras.labels import SEVERAL, WORDS, is_number, labels_in, printable

BLOCK = tarfile.BLOCKSIZE
SIDECARS = (".json", ".cls", ".txt")  # labels beside the sound, the best first
FIELDS = ("labels", "label", "human_labels")  # the best first, then whatever is called like a label
MAX_TEXT = 2**20  # bytes of a sidecar
MAX_BYTES = 2**31


class Entry(NamedTuple):
    """A clip to be packed, or what is wrong in its place."""

    name: str
    labels: list[str] = []
    path: str = ""  # of its file, unless it is in a shard
    read: Callable[[], bytes] | None = None  # in a shard: returns the file's bytes
    problem: str = ""
    is_loss: bool = False  # more than this clip may be missing


def check_shard(path: str) -> None:
    """Raise InputError for what is no tar or parquet file."""
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    if path.endswith(".parquet"):
        sound_column(path, open_parquet(path).schema_arrow)
        return
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        reason = what_is(path) or "download it again"
        if tarfile.is_tarfile(path):
            reason = "it is compressed: unpack it with gunzip or the like"
        raise InputError(f"{path} is no tar file: {reason}") from None


def entries_of(path: str, classes: dict[str, str]) -> Iterator[Entry]:
    """The clips of a shard in order. `classes` (label -> name), if any, are the labels to use."""
    read = parquet_entries if path.endswith(".parquet") else tar_entries
    for entry in read(path, Labeller(classes)):
        yield entry._replace(name=printable(entry.name))


# ----- Labels ----------------------------------------------------------------------------------------------


class Labeller:
    """Finds the labels in the fields that a shard has for each clip."""

    def __init__(self, classes: dict[str, str]):
        names = list(classes.values())
        self.known = {str(i): label for i, label in enumerate(classes)}  # by index, by name, or as they are
        self.known |= {name: label for label, name in classes.items() if names.count(name) == 1}
        self.known |= {label: label for label in classes}

    def __call__(self, record: dict, names: dict[str, list[str]] | None = None) -> list[str]:
        """The labels of a clip; `names` has the labels that its integers stand for. Raises InputError if
        there are labels, but no field whose labels are among the classes."""
        names = names or {}
        others = [field for field in record if re.match(WORDS, field.lower()) or field in names]
        found = []
        for field in dict.fromkeys([*FIELDS, *others]):
            if is_multi_hot(record.get(field)):
                raise InputError(f"its {field} are zeros and ones, not names or indices: convert them")
            labels = labels_in(record.get(field), bool(re.search(SEVERAL, field.lower())))
            if field in names:
                own = {str(i): name for i, name in enumerate(names[field])}
                labels = [label.removesuffix(".0") for label in labels]
                labels = [own.get(label, label) for label in labels if label != "-1"]  # -1: none
            if labels:
                found.append(labels)
        found.sort(key=lambda labels: all(map(is_number, labels)))  # names before numbers
        if not self.known or not found:
            return found[0] if found else []
        for labels in found:
            if self.known.keys() >= set(labels):
                return [self.known[label] for label in labels]
        raise InputError(f"its label {found[0][0]!r} is not among --classes")


def is_multi_hot(value: object) -> bool:
    """Whether a list has a 0 or a 1 for each class: indices would not be repeated."""
    if not isinstance(value, list):
        return False
    found = set(map(str, value))
    return len(found) < len(value) and found <= {"0", "1"}


# ----- tar -------------------------------------------------------------------------------------------------


def read_part(path: str, offset: int, size: int) -> bytes:
    """A stretch of a file. Raises InputError if the file ends before it does, or cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    if len(data) < size:
        raise InputError("cut short: the shard ends inside it")
    return data


def tar_members(path: str) -> Iterator[tarfile.TarInfo | str]:
    """The members of a tar file in order and, where something is missing, a text that says what."""
    total = os.path.getsize(path)
    end = 0  # of the member before
    with tarfile.open(path, "r:", ignore_zeros=True) as tar, open(path, "rb") as file:
        member = tar.next()
        while member is not None:
            if is_damage(file, end, member.offset):
                yield f"bytes {end} to {member.offset} are damaged"
            yield member
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            tar.members.clear()  # else it would keep all
            try:
                member = tar.next()
            except (tarfile.TarError, OSError):
                break
        if end >= total or is_damage(file, end, total):
            yield "the end is missing or damaged: download it again"


def is_damage(file, start: int, end: int) -> bool:
    """Whether there is anything but zeros and global headers in this stretch of a tar file."""
    file.seek(start)
    for _ in range(start, end, BLOCK):
        block = file.read(BLOCK)
        if block.strip(b"\0"):
            return b"ustar" not in block or block[156:157] != b"g"
    return False


def tar_entries(path: str, labeller: Labeller) -> Iterator[Entry]:
    """The sounds of a tar file, each with the labels in the files beside it that have its name."""
    group = []
    for member in tar_members(path):
        if isinstance(member, str):
            yield from group_entries(path, group, labeller)
            group = []
            yield Entry(path, problem=member, is_loss=True)
        elif member.isfile() or member.issym() or member.islnk():
            if group and key_of(member) != key_of(group[0]):
                yield from group_entries(path, group, labeller)
                group = []
            group.append(member)
    yield from group_entries(path, group, labeller)


def key_of(member: tarfile.TarInfo) -> str:
    """What the files of a sample have in common: the path to the first dot of the name, as in WebDataset."""
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.split(".")[0])


def group_entries(path: str, group: list[tarfile.TarInfo], labeller: Labeller) -> Iterator[Entry]:
    """The clips among the files of one sample."""
    suffixes = {member: posixpath.splitext(member.name)[1].lower() for member in group}
    texts = sorted((m for m in group if suffixes[m] in SIDECARS), key=lambda m: SIDECARS.index(suffixes[m]))
    sounds = [member for member in group if suffixes[member] in AUDIO_SUFFIXES]
    if texts and not sounds:
        yield Entry(f"{path}/{texts[0].name}", problem="no sound beside it")
    for sound in sounds:
        if any(map(is_hidden, PurePosixPath(sound.name).parts)):
            continue  # what macOS and others add
        name = f"{path}/{sound.name}"
        stem = posixpath.splitext(sound.name)[0]
        own = [text for text in texts if posixpath.splitext(text.name)[0] == stem] or texts
        if not sound.isreg() or sound.issparse() or sound.size > MAX_BYTES:
            yield Entry(name, problem="a link, or a file with holes or above 2 GiB: unpack the shard")
            continue
        try:
            labels = sidecar_labels(path, own, labeller)
            read = functools.partial(read_part, path, sound.offset_data, sound.size)
            yield Entry(name, labels, read=read)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # whatever JSON may hold
            yield Entry(name, problem=first_line(error))


def sidecar_labels(path: str, texts: list[tarfile.TarInfo], labeller: Labeller) -> list[str]:
    """The labels in the first of these files that has some. Raises InputError if it cannot be read."""
    for text in texts:
        data = read_part(path, text.offset_data, min(text.size, MAX_TEXT))
        record = dict(label=data.decode("utf-8", errors="replace"))
        if text.name.lower().endswith(".json"):
            try:
                record = json.loads(data)
            except (ValueError, RecursionError):
                raise InputError(f"{posixpath.basename(text.name)} is not JSON") from None
        if isinstance(record, dict):
            labels = labeller(record)
            if labels:
                return labels
    return []


# ----- parquet ---------------------------------------------------------------------------------------------


def open_parquet(path: str):
    """A pyarrow.parquet.ParquetFile. Raises InputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=2**20)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is no parquet file: {what_is(path) or first_line(error)}") from None


def class_names(schema) -> dict[str, list[str]]:
    """The names of classes that Hugging Face's features give to the integers of each column."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(text)["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    found = {}
    for column, feature in features:
        while isinstance(feature, dict | list) and feature and "names" not in feature:
            feature = feature[0] if isinstance(feature, list) else feature.get("feature")
        if isinstance(feature, dict) and feature:
            found[column] = feature["names"]
    return found


def sound_column(path: str, schema) -> str:
    """The column that holds the sound. Raises InputError if there is none, or more than one."""
    found = []
    for field in schema:
        children = [field.type.field(i).name for i in range(field.type.num_fields)]
        if "bytes" in children or "binary" in str(field.type):
            found.append(field.name)
    named = [name for name in found if re.search("audio|sound|wav|flac|mp3", name.lower())] or found
    if len(named) != 1:
        columns = ", ".join(schema.names)
        raise InputError(f"{path}: which of the columns {columns} is the sound? Rename it to audio")
    return named[0]


def parquet_entries(path: str, labeller: Labeller) -> Iterator[Entry]:
    """The rows of a parquet file."""
    import pyarrow

    file = open_parquet(path)
    column = sound_column(path, file.schema_arrow)
    names = class_names(file.schema_arrow)
    columns = [name for name in file.schema_arrow.names if name != column]
    columns = [name for name in columns if name in (*FIELDS, *names) or re.match(WORDS, name.lower())]
    n_before = 0
    for group in range(file.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        n_read = 0
        try:
            for batch in file.iter_batches(8, row_groups=[group], columns=[column, *columns]):
                for row in batch.to_pylist():
                    yield row_entry(path, row, row.pop(column), n_before + n_read, names, labeller)
                    n_read += 1
        except (OSError, pyarrow.ArrowException) as error:
            rows = f"rows {n_before + n_read} to {n_before + n_rows - 1}"
            yield Entry(path, problem=f"{rows} cannot be read: {first_line(error)}", is_loss=True)
        n_before += n_rows


def row_entry(
    path: str, row: dict, sound: dict | bytes | None, number: int, names: dict, labeller: Labeller
) -> Entry:
    """One row as a clip."""
    if isinstance(sound, bytes):
        sound = dict(bytes=sound)
    if not isinstance(sound, dict):
        sound = {}
    name = f"{path}/{sound.get('path') or number}"
    try:
        data = sound.get("bytes")
        if not data:
            raise InputError("the row holds no sound")
        return Entry(name, labeller(row, names), read=lambda: data)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # whatever a row may hold
        return Entry(name, problem=first_line(error))
