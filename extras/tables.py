"""Tables of classes: read from AudioSet's and others' files, and written after an evaluation; AUC."""

import csv
import itertools
import os
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from data import AudioDataset, InputError, first_line, labels_of
from model import AudioClassifier


def read_classes(path: str | os.PathLike) -> dict[str, str]:
    """Label -> name of every class, in the file's order: AudioSet's class_labels_indices.csv, FSD50K's table,
    the released label_descriptors.csv (index,label, without header), or a label a line. Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in unicodedata.normalize("NFC", text).split("\n") if line.strip()]
        rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the classes in {path}: {first_line(error)}") from None
    header = ["index", "label"]
    if rows and rows[0][0].strip() == "index":
        header = [cell.strip() for cell in rows.pop(0)]
    label = header.index("mid") if "mid" in header else 1
    name = label
    for title in ("display_name", "name"):
        if title in header:
            name = header.index(title)
    if not all(len(row) > max(label, name) and row[0].isdecimal() for row in rows):  # a label a line
        rows = [[line] for line in lines]
        label = 0
        name = 0
    elif [int(row[0]) for row in rows] != list(range(len(rows))):
        raise InputError(f"{path}: the indices of the classes do not count from 0")
    classes = {row[label].strip(): row[name].strip() for row in rows}
    if not classes or len(classes) < len(rows):
        raise InputError(f"{path}: expected every class once, found {len(classes)} in {len(rows)} lines")
    return classes


def load_classifier(path: str, classes: str = "") -> AudioClassifier:
    """A classifier; with `classes`, its classes have the names of that file. Raises InputError."""
    model = AudioClassifier.from_pretrained(path)
    if not classes:
        return model
    names = read_classes(classes)
    own = model.classes
    if names.keys() == own.keys():
        model.classes = {label: names[label] for label in own}
    elif "class 0" in own and len(names) == len(own):  # released files hold no labels
        model.classes = names
    else:
        raise InputError(f"{classes} does not list the {len(own)} classes of {path}, {next(iter(own))} ...")
    return model


def classes_cut_short(data: AudioDataset) -> list[str]:
    """The classes that lose more than a tenth of their clips because these are too short, with numbers."""
    lost = Counter()
    total = Counter()
    for line, n_samples in enumerate(data.manifest.n_samples.tolist()):
        for label in labels_of(data.manifest.fields(line)):
            total[label] += 1
            lost[label] += n_samples < data.min_samples
    return [f"{label} ({n} of {total[label]})" for label, n in lost.items() if n > total[label] / 10]


def write_table(out: str, checkpoint: str, model: AudioClassifier, counts: Tensor, precision: Tensor) -> None:
    """Write the average precision of each class, to `out` or else per_class.csv in the run folder or here.
    If the name is taken, to another; warns if that is impossible."""
    place = out or checkpoint
    path = Path(out or "per_class.csv")
    if not out and os.path.exists(os.path.join(os.path.dirname(checkpoint), "log.jsonl")):
        place = os.path.dirname(checkpoint)  # the run folder of a last.pt
    if os.path.isdir(place):
        path = Path(place, "per_class.csv")
    rows = [("label", "name", "clips", "average_precision")]
    for (label, name), count, value in zip(model.classes.items(), counts.tolist(), precision.tolist()):
        rows.append((label, name, count, f"{value:.6f}"))
    try:
        file = open_new(path)
        try:
            with file:
                csv.writer(file).writerows(rows)
        except OSError:
            os.remove(file.name)  # half a table
            raise
    except OSError as error:
        print(f"WARNING: no table of classes ({error}): --out names another place", file=sys.stderr)
        return
    print(f"each class: {file.name}", file=sys.stderr)


def open_new(path: Path) -> IO:
    """Open a file for writing; if there is one of that name, another with a number behind the name."""
    new = path
    for number in itertools.count(2):
        try:
            return open(new, "x", newline="", encoding="utf-8", errors="surrogateescape")
        except FileExistsError:
            new = path.with_name(f"{path.stem}{number}{path.suffix}")


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of each class: (n, C), (n, C) -> (C,) float64; nan if all targets are equal.
    The share of pairs of a positive and a negative in which the positive scores higher; ties count half."""
    result = []
    for score, target in zip(scores.T, targets.bool().T):
        negatives = score[~target].sort().values
        below = torch.searchsorted(negatives, score[target])                  # negatives that score lower
        not_above = torch.searchsorted(negatives, score[target], right=True)  # and those that score the same
        result.append((below + not_above).double().mean() / 2 / len(negatives))
    return torch.stack(result)
