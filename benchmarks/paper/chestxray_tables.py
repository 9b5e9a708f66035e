"""Who is in which part of ChestX-ray14, from its tables and lists; an image or a patient is in one part only."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .dataset import AS_IT_IS, SPLITS, Reading

LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NO_FINDING = "No Finding"
ENTRY_TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
LISTS = ("train_val_list.txt", "test_list.txt")
VAL_SHARE = 1 / 8  # of the training and validation images: 70 / 10 / 20 % in all, as in the literature
SPLIT_SEED = 0  # the split is part of the data set
NAMED = 3  # images or patients that a message names; all are counted
IMAGE_NAME = re.compile(r"(\d{8})_\d{3}\.\w+")  # the release's: patient and number of the visit


@dataclass(frozen=True)
class Entry:
    """One image: its file name, its labels ``(14,)``, 0 or 1, and who it is of (empty where nothing says so)."""

    name: str
    labels: tuple[int, ...]
    patient: str


@dataclass(frozen=True)
class Parts:
    """The entries of each part, the table that they came from, and what is odd about them."""

    entries: dict[str, list[Entry]]
    table: Path
    notes: list[str] = field(default_factory=list)


def read_splits(folder: Path, reading: Reading = AS_IT_IS) -> Parts:
    """Read the table and the lists of a folder, or its table of folds.

    Raises:
        ValueError: a file is missing, damaged or contradicts itself or another one; an image or a patient is in two
            parts, or an image twice in one, unless ``reading.allow_overlap``. The message names it.
    """
    tables = [folder / name for name in ENTRY_TABLES if (folder / name).exists()]
    if not tables:
        return _read_fold_table(folder, reading)
    parts = _published_split(folder, tables[0], read_entries(tables[0]), reading)
    if len(tables) > 1:
        parts.notes.append(f"labels are those of {tables[0].name}; {tables[1].name} beside it is not used")
    return parts


def _read_fold_table(folder: Path, reading: Reading) -> Parts:
    found, unreadable = [], []
    for path in sorted(folder.glob("*.csv")):
        if path.name.startswith("."):  # what macOS leaves beside a file
            continue
        try:
            if "fold" in _rows(path)[0]:
                found.append(path)
        except ValueError as error:
            unreadable.append(str(error))
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]}: both have a column fold; keep the one that is meant")
    if not found:
        also = f"; {'; '.join(unreadable)}" if unreadable else ""
        raise ValueError(f"{folder}: holds neither {' nor '.join(ENTRY_TABLES)} nor a table with the column fold{also}")
    entries = read_folds(found[0])
    return Parts(entries, found[0], _check_parts(found[0], entries, reading))


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path}: holds no rows")
    return [name.strip() for name in rows[0]], rows[1:]


def _column(path: Path, header: Sequence[str], name: str) -> int:
    if name not in header:
        raise ValueError(f"{path}: has no column {name!r}; its columns are {', '.join(header)}")
    if header.count(name) > 1:
        raise ValueError(f"{path}: has {header.count(name)} columns {name!r}; keep the one that is meant")
    return header.index(name)


def _field(path: Path, row: list[str], number: int, column: int, width: int) -> str:
    if column >= len(row):
        raise ValueError(f"{path}: row {number} is cut off: {','.join(row)!r}")
    if any(one.strip() for one in row[width:]):
        raise ValueError(f"{path}: row {number} has more values than the header has names: {','.join(row)!r}")
    return row[column].strip()


def read_entries(path: Path) -> dict[str, Entry]:
    """Entries of ``Data_Entry_2017*.csv`` by image name.

    Columns are found by name. Those needed come before ``OriginalImage[Width,Height]``, whose unquoted comma splits it.

    Raises:
        ValueError: a column is missing, a row is cut off or shifted, a label is unknown, an image has no name or no
            patient, or two rows of one image differ.
    """
    header, rows = _rows(path)
    columns = [_column(path, header, name) for name in ("Image Index", "Finding Labels", "Patient ID")]
    entries: dict[str, Entry] = {}
    for number, row in enumerate(rows, start=2):
        name, findings, patient = (_field(path, row, number, column, len(header)) for column in columns)
        found = {one.strip() for one in findings.split("|")}
        if not found - {NO_FINDING} <= set(LABELS):
            unknown = ", ".join(sorted(one or repr(one) for one in found - {NO_FINDING, *LABELS}))
            raise ValueError(f"{path}: row {number} ({name}) has unknown labels: {unknown}")
        if NO_FINDING in found and len(found) > 1:
            raise ValueError(f"{path}: row {number} ({name}) has {NO_FINDING} beside findings: {findings}")
        if not name or not patient:
            raise ValueError(f"{path}: row {number} has no {'Patient ID' if name else 'Image Index'}: {','.join(row)}")
        entry = Entry(name, tuple(int(label in found) for label in LABELS), _same_number(patient))
        if entries.setdefault(name, entry) != entry:
            raise ValueError(f"{path}: row {number} contradicts an earlier row of the same image, {name}")
    return entries


def _same_number(patient: str) -> str:
    """One spelling of a patient's number: 00000007, 7 and 7.0 are one patient."""
    return str(int(patient.removesuffix(".0"))) if re.fullmatch(r"[0-9]+(\.0)?", patient) else patient


def read_folds(path: Path) -> dict[str, list[Entry]]:
    """Splits of a one-hot table: columns ``Image Index``, the 14 labels and ``fold``; ``Patient ID`` if it has one.

    Without that column the patient is read off the image's name, if it is one of the release.

    Raises:
        ValueError: a column is missing, a value is not 0 or 1, or a fold is unknown or empty.
    """
    header, rows = _rows(path)
    name_column, fold_column = _column(path, header, "Image Index"), _column(path, header, "fold")
    label_columns = [_column(path, header, label) for label in LABELS]
    patient_column = _column(path, header, "Patient ID") if "Patient ID" in header else None
    parts: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for number, row in enumerate(rows, start=2):
        fold = _field(path, row, number, fold_column, len(header))
        if fold not in parts:
            raise ValueError(f"{path}: row {number} has fold {fold!r}; known are {', '.join(SPLITS)}")
        values = [_field(path, row, number, column, len(header)) for column in label_columns]
        if not set(values) <= {"0", "1", "0.0", "1.0"}:
            raise ValueError(f"{path}: row {number} has labels other than 0 and 1: {', '.join(values)}")
        name = _field(path, row, number, name_column, len(header))
        if not name:
            raise ValueError(f"{path}: row {number} has no Image Index: {','.join(row)}")
        if patient_column is not None:
            patient = _field(path, row, number, patient_column, len(header))
            if not patient:
                raise ValueError(f"{path}: row {number} ({name}) has no Patient ID")
        else:
            of_release = IMAGE_NAME.fullmatch(name)
            patient = of_release[1] if of_release else ""
        parts[fold].append(Entry(name, tuple(int(float(value)) for value in values), _same_number(patient)))
    for split, entries in parts.items():
        if not entries:
            raise ValueError(f"{path}: no row has the fold {split!r}")
    return parts


def _read_list(path: Path, table: Path, entries: Mapping[str, Entry]) -> list[Entry]:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; it comes with the data set")
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from error
    if not names:
        raise ValueError(f"{path}: is empty")
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} images have no row in {table.name}: {some(unknown)}")
    return [entries[name] for name in names]


def _published_split(folder: Path, table: Path, entries: dict[str, Entry], reading: Reading) -> Parts:
    rest, test = (_read_list(folder / name, table, entries) for name in LISTS)
    notes = _check_parts(folder, dict(zip(LISTS, (rest, test), strict=True)), reading)
    unlisted = entries.keys() - {entry.name for entry in (*rest, *test)}
    if unlisted:
        notes.append(f"{len(unlisted)} images of {table.name} are in neither list and left out")
    # Images of one patient look alike: a random split over images would leak from training to validation.
    patients = sorted({entry.patient for entry in rest})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(patients))
    counts = Counter(entry.patient for entry in rest)
    held, total = set(), 0
    for index in order[:-1]:  # at least one patient stays for training
        if total >= VAL_SHARE * len(rest):
            break
        held.add(patients[index])
        total += counts[patients[index]]
    if not held:
        raise ValueError(f"{folder / LISTS[0]}: images of one patient only; there is nobody left for validation")
    train = [entry for entry in rest if entry.patient not in held]
    val = [entry for entry in rest if entry.patient in held]
    return Parts({"train": train, "val": val, "test": test}, table, notes)


def _check_parts(where: Path, parts: Mapping[str, Sequence[Entry]], reading: Reading) -> list[str]:
    """What is in two parts, or twice in one: an error, or sentences if that is allowed.

    Raises:
        ValueError: something is; or an image's rows differ, which nothing can allow.
    """
    wrong, first = [], {}
    for entries in parts.values():
        for entry in entries:
            if first.setdefault(entry.name, entry) != entry:
                raise ValueError(f"{where}: the rows of {entry.name} contradict each other in labels or patient")
    for name, entries in parts.items():
        twice = [one for one, count in Counter(entry.name for entry in entries).items() if count > 1]
        if twice:
            wrong.append(f"{len(twice)} images are more than once in {name}: {some(twice)}")
    for what, key in (("images", "name"), ("patients", "patient")):
        places: dict[str, dict[str, None]] = {}
        for name, entries in parts.items():
            for entry in entries:
                if getattr(entry, key):
                    places.setdefault(getattr(entry, key), {})[name] = None
        pairs: dict[tuple[str, ...], list[str]] = {}
        for one, found in places.items():
            if len(found) > 1:
                pairs.setdefault(tuple(found), []).append(one)
        wrong += [f"{len(those)} {what} are in {' and '.join(two)}: {some(those)}" for two, those in pairs.items()]
    if wrong and not reading.allow_overlap:
        raise ValueError(
            f"{where}: {'; '.join(wrong)}. A test of them is a test of memory: mend the split, or give "
            "--allow-overlap if it is meant"
        )
    nameless = sum(not entry.patient for entries in parts.values() for entry in entries)
    if nameless:
        wrong.append(f"nothing says who {nameless} of the images are of: whether one is in two parts was not seen")
    return wrong


def some(names: Iterable[str]) -> str:
    """The first of some names."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
