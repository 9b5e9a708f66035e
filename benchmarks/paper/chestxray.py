"""NIH ChestX-ray14 from its original layout: both folder forms, both tables, the published lists or a one-hot table.

The release (Wang et al., CVPR 2017) holds 112,120 PNGs of 1024x1024, either flat in ``images/`` (the NIH's archives) or
in ``images_001/images/`` to ``images_012/images/`` (Kaggle); images are found by their base name. The labels are in
``Data_Entry_2017.csv`` or ``Data_Entry_2017_v2020.csv``, the split in ``train_val_list.txt`` and ``test_list.txt``. The
InMerge authors use one table with 14 columns of 0 and 1 and a column ``fold`` instead.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from inmerge_fast.demo.data import require

from .dataset import SPLITS, DataSet, Split

LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NO_FINDING = "No Finding"
ENTRY_TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
LISTS = ("train_val_list.txt", "test_list.txt")
VAL_SHARE = 1 / 8  # of the training and validation images: 70 / 10 / 20 % in all, as in the literature
SPLIT_SEED = 0  # the split is part of the data set


@dataclass(frozen=True)
class Entry:
    """One image: its file name, its labels ``(14,)``, 0 or 1, and who it is of (empty in a one-hot table)."""

    name: str
    labels: tuple[int, ...]
    patient: str


def load_chestxray14(folder: Path, *, size: int = 224, cache: Path | None = None) -> DataSet:
    """Load ChestX-ray14, decoding its images once.

    Args:
        folder: what holds the table, the lists and the images, see the module's docstring.
        size: side to which images are resized.
        cache: folder for the decoded images, uint8 and mapped from there; ``~/.cache/inmerge_fast`` if None.

    Raises:
        ValueError: a file is missing, incomplete or damaged; the message names it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: there is no such folder; put NIH ChestX-ray14 there: {ENTRY_TABLES[0]}, {LISTS[0]}, {LISTS[1]} "
            "and images/ or images_001/ to images_012/"
        )
    parts = _read_splits(folder)
    paths = {path.name: path for path in sorted(folder.rglob("*.png"))}
    names = [entry.name for split in SPLITS for entry in parts[split]]
    missing = [name for name in names if name not in paths]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(names)} listed images are missing, the first is {missing[0]}"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "inmerge_fast" if cache is None else cache
    images = _decoded([paths[name] for name in names], size, cache)
    splits, start = [], 0
    for split in SPLITS:
        count = len(parts[split])
        labels = np.array([entry.labels for entry in parts[split]], dtype=np.float32)
        splits.append(Split(torch.from_numpy(images[start : start + count]), torch.from_numpy(labels)))
        start += count
    digest = hashlib.md5("\n".join(names).encode()).hexdigest()
    source = f"NIH ChestX-ray14 resized to {size}x{size}, md5 of the list of images {digest}"
    train, val, test = splits
    return DataSet(f"chestxray14_{size}", "multi-label", LABELS, train, val, test, source)


def _read_splits(folder: Path) -> dict[str, list[Entry]]:
    table = next((folder / name for name in ENTRY_TABLES if (folder / name).exists()), None)
    if table is not None:
        return _published_split(folder, read_entries(table))
    for path in sorted(folder.glob("*.csv")):
        parts = read_folds(path)
        if parts is not None:
            return parts
    raise ValueError(f"{folder}: holds neither {' nor '.join(ENTRY_TABLES)} nor a table with the column fold")


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
    return header.index(name)


def _field(path: Path, row: list[str], number: int, column: int) -> str:
    if column >= len(row):
        raise ValueError(f"{path}: row {number} is cut off: {','.join(row)!r}")
    return row[column].strip()


def read_entries(path: Path) -> dict[str, Entry]:
    """Entries of ``Data_Entry_2017*.csv`` by image name.

    Columns are found by name. Those needed come before ``OriginalImage[Width,Height]``, whose unquoted comma splits it.

    Raises:
        ValueError: a column is missing, a row is cut off, or a label is unknown.
    """
    header, rows = _rows(path)
    columns = [_column(path, header, name) for name in ("Image Index", "Finding Labels", "Patient ID")]
    entries = {}
    for number, row in enumerate(rows, start=2):
        name, findings, patient = (_field(path, row, number, column) for column in columns)
        found = set(findings.split("|")) - {NO_FINDING}
        if not found <= set(LABELS):
            raise ValueError(
                f"{path}: row {number} ({name}) has unknown labels: {', '.join(sorted(found - set(LABELS)))}"
            )
        entries[name] = Entry(name, tuple(int(label in found) for label in LABELS), patient)
    return entries


def read_folds(path: Path) -> dict[str, list[Entry]] | None:
    """Splits of a one-hot table: columns ``Image Index``, the 14 labels and ``fold``; None if it has no such column.

    Raises:
        ValueError: a column is missing, a value is not 0 or 1, or a fold is unknown or empty.
    """
    header, rows = _rows(path)
    if "fold" not in header:
        return None
    name_column, fold_column = _column(path, header, "Image Index"), header.index("fold")
    label_columns = [_column(path, header, label) for label in LABELS]
    parts: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for number, row in enumerate(rows, start=2):
        fold = _field(path, row, number, fold_column)
        if fold not in parts:
            raise ValueError(f"{path}: row {number} has fold {fold!r}; known are {', '.join(SPLITS)}")
        values = [_field(path, row, number, column) for column in label_columns]
        if not set(values) <= {"0", "1", "0.0", "1.0"}:
            raise ValueError(f"{path}: row {number} has labels other than 0 and 1: {', '.join(values)}")
        labels = tuple(int(float(value)) for value in values)
        parts[fold].append(Entry(_field(path, row, number, name_column), labels, ""))
    for split, entries in parts.items():
        if not entries:
            raise ValueError(f"{path}: no row has the fold {split!r}")
    return parts


def _published_split(folder: Path, entries: dict[str, Entry]) -> dict[str, list[Entry]]:
    chosen = []
    for file in LISTS:
        path = folder / file
        if not path.exists():
            raise ValueError(f"{path}: there is no such file; it comes with the data set")
        names = path.read_text().split()
        unknown = [name for name in names if name not in entries]
        if unknown or not names:
            detail = (
                f"{len(unknown)} images have no row in the table, the first is {unknown[0]}" if unknown else "is empty"
            )
            raise ValueError(f"{path}: {detail}")
        chosen.append([entries[name] for name in names])
    rest, test = chosen
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
    return {"train": train, "val": [entry for entry in rest if entry.patient in held], "test": test}


def _decoded(paths: list[Path], size: int, cache: Path) -> npt.NDArray[np.uint8]:
    key = hashlib.md5("\n".join(f"{p.name} {p.stat().st_size}" for p in paths).encode()).hexdigest()[:12]
    target = cache / f"chestxray14-{size}-{key}.npy"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        shape = (len(paths), 1, size, size)
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        try:
            with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter's lock
                grey = pool.map(lambda path: _grey(path, size), paths)
                bar = require("tqdm", "tqdm").tqdm(
                    grey, total=len(paths), desc="decoding", unit=" images", disable=None
                )
                for index, image in enumerate(bar):
                    out[index, 0] = image
            out.flush()
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    # Copy on write: torch warns of memory that it must not write to, although nothing here writes.
    return np.load(target, mmap_mode="c")


def _grey(path: Path, size: int) -> npt.NDArray[np.uint8]:
    Image = require("PIL.Image", "Pillow")
    try:
        with Image.open(path) as image:  # some are RGBA
            return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from error
