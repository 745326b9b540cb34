"""Labels from other tools' tables: any CSV, a column for each class, Raven, Label Studio.

    read_labels(table, folder, paths)    the labels that a table gives to the files of a folder
    labels_in(cell)                      the labels in one cell, or in a field of a shard
"""

import ast
import codecs
import csv
import functools
import io
import json
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from data import InputError, first_line
from extras.media import AUDIO_SUFFIXES

WORDS = "label|class|categor|species|target|choice|annotation|tag"  # how titles of labels begin
PLAIN = r"(label|class|category|species|target|choice|annotation|tag|categorie)(e?s)?[ _-]?\d*"  # in full
SEVERAL = r"(labels|classes|categories|targets|choices|annotations|tags)$"  # a cell may list several
SAMPLE = 1000  # rows that tell which column names the files
SWITCHES = {"0", "1", "0.0", "1.0", "false", "true"}  # of a table with a column for each class
# Titles that are no class there, and that are no label although they begin like one
NO_CLASS = "^(unnamed.*|index|id|fold|split|train|test|valid(ation)?|is_.*|duration|length|channels?)?$"
NO_LABEL = (
    r"^(annotator|label+er|tagger|classifier)|^annotation[_ ]?id$|"
    r"[_ -](date|time|count|sr|wpm|rate|quality|confidence|score|by)$"
)
FILE_TITLE = "^(file|fname|path|audio|clip|wav|recording|sound)"  # of two columns of files the better one
POOR_TITLE = "^(unnamed.*|index|.*id|speaker.*)?$"
MISSING = {"NA", "NaN", "nan", "null"}  # a cell without label, as other tools write it


def nfc(text: str) -> str:
    """One spelling of accents: systems write the same name in different code points."""
    return unicodedata.normalize("NFC", text)


def printable(name: str) -> str:
    """A name in one line: tabs, line breaks and what a terminal obeys as in Python."""
    return re.sub(r"[\0\t\n\r\x1b]", lambda match: repr(match[0])[1:-1], name)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ----- Reading ---------------------------------------------------------------------------------------------


def decodings(path: str | os.PathLike) -> list[str]:
    """The text of a file, in each encoding that it may have. Raises InputError if it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return [data.decode("utf-16", errors="replace")]
    if b"\0" in data:
        raise InputError(f"{path} is no text: save the table as CSV")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError:
        # Windows' Latin-1 or, if files on the disk have just these bytes as names, whatever it is
        return [data.decode("cp1252", errors="replace"), os.fsdecode(data)]


def rows_of_json(text: str) -> list[list[str]]:
    """Rows of a list of objects, as Label Studio exports them (JSON and JSON_MIN)."""
    records = []
    for task in json.loads(text):
        record = dict(task.get("data", task))
        for annotation in task.get("annotations", []):
            values = [result.get("value") for result in annotation.get("result", [])]
            if not annotation.get("was_cancelled"):
                record["label"] = record.get("label", []) + values
        records.append(record)
    titles = list(dict.fromkeys(title for record in records for title in record))
    rows = [titles]
    for record in records:
        cells = [record.get(title, "") for title in titles]
        cells = ["" if cell is None else cell for cell in cells]
        rows.append([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return rows


def readings(path: str | os.PathLike) -> Iterator[list[list[str]]]:
    """The rows of a table, in each encoding and with each delimiter that it may have."""
    csv.field_size_limit(2**31 - 1)
    for text in decodings(path):
        if text.lstrip()[:1] == "[":
            try:
                rows = rows_of_json(text)
                yield rows
                return
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass  # a list of something else, or a label such as [noise]
        lines = [line for line in io.StringIO(text, newline="") if not re.match(r"#\s", line)]
        delimiters = ",;\t|"
        stated = re.match(r'"?sep=(.)', lines[0]) if lines else None  # a hint to spreadsheets
        if stated:
            delimiters = stated[1]
            lines.pop(0)
        for delimiter in delimiters:
            try:
                rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
            except csv.Error as error:
                raise InputError(f"cannot read {path}: {first_line(error)}") from None
            if rows and rows[-1] and "\n" in rows[-1][-1] and not text.rstrip().endswith('"'):
                first = rows[-1][-1].split("\n")[0]
                raise InputError(f"{path}: a quotation mark before {first!r} is not closed")
            yield [row for row in rows if any(map(str.strip, row))]


def parsed(text: str) -> object:
    """What a text such as '["dog"]' or "['dog']" means, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return text


def labels_in(cell: object, is_list: bool = False) -> list[str]:
    """The labels in a cell. A list, also one in JSON or Python syntax, gives all of its items; an object its
    labels or choices. Other text is one label or, with `is_list`, several, separated by `;`, `|` or commas
    without a space."""
    if isinstance(cell, str) and cell.strip()[:1] in ("[", "{"):
        value = parsed(cell.strip())
        if isinstance(value, list | dict):
            cell = value
    if cell is None:
        return []
    if isinstance(cell, dict):
        cell = [value for key, value in cell.items() if re.match(WORDS, key)]
    if isinstance(cell, list | tuple):
        return [label for item in cell for label in labels_in(item)]
    texts = re.split(r",(?! )|[;|]", str(cell)) if is_list else [str(cell)]
    labels = [re.sub(r"[\t\r\n]+", " ", nfc(text)).strip() for text in texts]
    return [label for label in labels if label]


# ----- Which file a cell names -----------------------------------------------------------------------------


class Files:
    """The files of a folder, by whatever a table may call them."""

    def __init__(self, folder: str | os.PathLike, paths: list[Path], table: str | os.PathLike):
        self.bases = [os.getcwd(), os.path.dirname(os.path.abspath(table))]  # where paths may start
        self.folders = []
        for resolve in (os.path.abspath, os.path.realpath):
            self.folders.append(os.path.join(nfc(resolve(folder)), ""))
        self.exact: dict[str, Path] = {}  # by the path below the folder
        self.endings: dict[str, Path | None] = {}  # by last parts, suffix or not, lower case; None: several
        self.depth: dict[Path, int] = {}
        self.find = functools.cache(self.look_up)
        for path in paths:
            self.exact[path.relative_to(folder).as_posix()] = path
        for name, path in list(self.exact.items()):
            self.exact.setdefault(nfc(name), path)
            parts = nfc(name).lower().split("/")
            self.depth[path] = len(parts)
            for i in range(len(parts)):
                ending = "/".join(parts[i:])
                for key in {ending, posixpath.splitext(ending)[0]}:
                    if self.endings.setdefault(key, path) is not path:
                        self.endings[key] = None

    def look_up(self, cell: str) -> tuple[Path | None, str]:
        """The file that a cell names, if it names one and only one: by its path, absolute or not, or by the
        end of it, with or without suffix; and the folders that were left out, if the path leads elsewhere."""
        if cell in self.exact:
            return self.exact[cell], ""
        name = nfc(cell.strip()).replace("\\", "/")
        if not name:
            return None, ""
        if "://" in name or "?d=" in name:  # an address
            name = unquote(name.split("?d=")[-1])
        name = posixpath.normpath(name)
        for key in (name, *self.below(name)):
            path = self.exact.get(key) or self.endings.get(key.lower())
            if path:
                return path, ""
        parts = name.lower().split("/")
        for i in range(1, len(parts)):
            path = self.endings.get("/".join(parts[i:]))
            if path and self.depth[path] == len(parts) - i:
                return path, "/".join(parts[:i])
        upload = re.fullmatch(r"(.*upload/(?:\d+/)?[0-9a-z]+-)([^/]+)", name)
        if upload:  # Label Studio puts a code before the name
            return self.endings.get(upload[2].lower()), upload[1]
        return None, ""

    def below(self, name: str) -> Iterator[str]:
        """What remains of a path that leads into the folder, from each place where it may start."""
        for base in self.bases:
            path = os.path.normpath(os.path.join(base, os.path.expanduser(name)))
            for folder in self.folders:
                if nfc(path).startswith(folder):
                    yield nfc(path).removeprefix(folder)


# ----- Which column is which -------------------------------------------------------------------------------


class Columns(NamedTuple):
    """What the columns of a table hold."""

    file: int
    labels: list[int]
    titles: list[str]  # one for each column, or none if the table has no row of titles
    is_one_hot: bool = False


def has_suffix(cell: str) -> bool:
    return os.path.splitext(cell.strip())[1].lower() in AUDIO_SUFFIXES


def has_titles(rows: list[list[str]], files: Files) -> bool:
    """Whether no cell of the first row is a file, or looks like one. A title may be the name of a file
    without its suffix: then the cells below it have one, or are no files."""
    for column, cell in enumerate(rows[0]):
        if has_suffix(cell):
            return False
        if files.find(cell)[0]:
            below = [row[column] for row in rows[1:SAMPLE] if column < len(row)]
            is_file = any(files.find(other)[0] for other in below) and not any(map(has_suffix, below))
            if is_file or not below:
                return False
    return True


def file_column(rows: list[list[str]], files: Files, step: int) -> tuple[int, int, int, int]:
    """The column that names most files: (files named with suffix, files named in all, 1 if its title says so
    or -1 if it says otherwise, minus its number). Only every `step`-th row is used."""
    best = (0, 0, 0, 0)
    is_titled = has_titles(rows, files)
    rows = rows[::step]
    for column in range(max(map(len, rows))):
        cells = [row[column] for row in rows if column < len(row)]
        if is_titled and re.match(WORDS, cells[0].strip().lower()):
            continue
        found = {}
        for cell in cells:
            path, _ = files.find(cell)
            if path:
                found[path] = found.get(path) or has_suffix(cell)
        title = 0
        if is_titled:
            title = bool(re.search(FILE_TITLE, cells[0].strip().lower()))
            title -= bool(re.search(POOR_TITLE, cells[0].strip().lower()))
        best = max(best, (sum(found.values()), len(found), title, -column))
    return best


def choose_columns(rows: list[list[str]], file: int, files: Files) -> Columns | None:
    """What the columns of a table hold, if that can be told."""
    width = max(map(len, rows))
    if has_titles(rows, files):
        return titled_columns(rows, file, width)
    is_ragged = min(map(len, rows)) < width
    if width == 2 or (file == 0 and is_ragged):  # file,label or label,file; file,label[,label]
        return Columns(file, [column for column in range(width) if column != file], [])
    return None


def titled_columns(rows: list[list[str]], file: int, width: int) -> Columns | None:
    """Columns whose title begins with "label" and the like, or that hold nothing but 0 and 1."""
    titles = [nfc(title.strip()) for title in rows[0]]
    cells = []
    for column in range(len(titles)):
        cells.append({row[column].strip().lower() for row in rows[1:] if column < len(row)} - {""})
    columns = [i for i in range(len(titles)) if i != file and cells[i]]

    def matching(pattern: str) -> list[int]:
        return [i for i in columns if re.search(pattern, titles[i].lower())]

    plain = matching(f"^{PLAIN}$")
    begun = [i for i in matching(f"^({WORDS})") if i not in matching(NO_LABEL)]
    labels = plain or begun or matching(f"{PLAIN}$")[:1]
    switches = [i for i in columns if cells[i] <= SWITCHES and i not in matching(NO_CLASS)]
    if len(plain) > 1 and set(plain) <= set(switches):
        return Columns(file, plain, titles, is_one_hot=True)
    if not plain and len(switches) > 1 and set(labels) <= set(switches):
        return Columns(file, switches, titles, is_one_hot=True)
    names = [i for i in labels if not all(map(is_number, cells[i]))]
    labels = names or labels  # numbers beside names are their ids
    if len(titles) - 1 in labels:  # rows may go on
        labels += range(len(titles), width)
        titles += [titles[-1]] * (width - len(titles))
    if not labels:
        return None
    return Columns(file, labels, titles)


# ----- Labels ----------------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """What a table says about the files of a folder."""

    found: dict[Path, list[str]]
    problems: list[tuple[str, str]]  # other names in it, and the reason why they are no file
    columns: str  # which were used, in words


def read_labels(table: str | os.PathLike, folder: str | os.PathLike, paths: list[Path]) -> Labels:
    """The labels that a table gives to the files of a folder; several rows of a file add up. Raises
    InputError if it cannot be read, or if it cannot be told which columns hold the files and the labels."""
    files = Files(folder, paths, table)
    tables = [rows for rows in readings(table) if rows] or [[["nothing"]]]
    scores = [file_column(rows, files, max(1, len(rows) // SAMPLE)) for rows in tables]
    if not any(n_found for _, n_found, _, _ in scores):
        scores = [file_column(rows, files, 1) for rows in tables]
    best = max(scores)
    rows = tables[scores.index(best)]
    columns = choose_columns(rows, -best[3], files) if best[1] else None
    if columns is None:
        first = ", ".join(rows[0])[:100]
        name = str(paths[0].relative_to(folder))
        raise InputError(
            f"{table}: cannot tell which column names the files and which the labels. It begins with "
            f"{first!r}, a file is called {name!r}; expected: a first row of titles such as file,label"
        )
    return collect(rows, columns, files)


def collect(rows: list[list[str]], columns: Columns, files: Files) -> Labels:
    """The labels in the rows of a table."""
    found = defaultdict(list)
    places = defaultdict(set)  # the folders left out
    problems = []
    for row in rows[bool(columns.titles) :]:
        cell = row[columns.file] if columns.file < len(row) else ""
        path, place = files.find(cell)
        if path is None:
            is_several = nfc(cell.strip()).lower() in files.endings
            problems.append((cell, "several files have this name" if is_several else "no such file"))
            continue
        places[path].add(place)
        for i in columns.labels:
            value = row[i].strip() if i < len(row) else ""
            title = columns.titles[i] if columns.titles else ""
            if value in MISSING:
                value = ""
            if not columns.is_one_hot:
                found[path] += labels_in(value, bool(re.search(SEVERAL, title.lower())))
            elif value.lower() in ("1", "1.0", "true"):
                found[path].append(title)
    for path in places:
        if len(places[path]) > 1:
            found.pop(path, None)
            problems.append((path.name, f"the table has several, in {sorted(places[path])}"))
    titles = columns.titles or [f"column {i + 1}" for i in range(max(map(len, rows)))]
    labels = ", ".join(dict.fromkeys(titles[i] for i in columns.labels))
    return Labels(dict(found), problems, f"files: {titles[columns.file]}; labels: {labels}")
