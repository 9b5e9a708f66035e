"""NIH ChestX-ray14 from its original layout: both folder forms, both tables, the published lists or a one-hot table.

The release (Wang et al., CVPR 2017) holds 112,120 PNGs of 1024x1024, either flat in ``images/`` (the NIH's archives) or
in ``images_001/images/`` to ``images_012/images/`` (Kaggle); here they may also lie beside the table. Nothing else is
looked at, so that masks, thumbnails or resized copies of the same names do not take the place of the X-rays. The labels
are in ``Data_Entry_2017.csv`` or ``Data_Entry_2017_v2020.csv``, the split in ``train_val_list.txt`` and
``test_list.txt``. The InMerge authors use one table with 14 columns of 0 and 1 and a column ``fold`` instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from inmerge_fast.demo.duplicates import same_images

from .chestxray_tables import ENTRY_TABLES, LABELS, LISTS, read_splits, some
from .dataset import AS_IT_IS, SPLITS, DataSet, MissingDataError, Reading, Split
from .image_cache import decoded, default_folder

KAGGLE = tuple(f"images_{index:03d}" for index in range(1, 13))
LAYOUTS = "images/, images_001/images/ to images_012/images/, or beside the table"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

__all__ = ["LABELS", "find_images", "load_chestxray14"]


def load_chestxray14(
    folder: Path, *, size: int = 224, cache: Path | None = None, reading: Reading = AS_IT_IS
) -> DataSet:
    """Load ChestX-ray14, decoding its images once.

    Args:
        folder: what holds the table, the lists and the images, see the module's docstring.
        size: side to which images are resized.
        cache: folder for the decoded images, uint8 and mapped from there; ``~/.cache/inmerge_fast`` if None.
        reading: what the files leave open.

    Raises:
        ValueError: a file is missing, incomplete, damaged or ambiguous, or the split leaks; the message names it.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder}: there is no such folder; put NIH ChestX-ray14 there: {ENTRY_TABLES[0]}, {LISTS[0]}, {LISTS[1]} "
            "and images/ or images_001/ to images_012/"
        )
    found = read_splits(folder, reading)
    parts, notes = found.entries, list(found.notes)
    names = [entry.name for split in SPLITS for entry in parts[split]]
    paths, extra = find_images(folder, names)
    if extra:
        notes.append(f"{len(extra)} images in the folders are in no list and left out: {some(extra)}")
    place = default_folder() if cache is None else cache
    images, digests = decoded([paths[name] for name in names], size, place, name="chestxray14", bits=reading.bits)
    splits, start, each = [], 0, {}
    for split in SPLITS:
        stop = start + len(parts[split])
        labels = np.array([entry.labels for entry in parts[split]], dtype=np.float32)
        splits.append(Split(torch.from_numpy(images[start:stop]), torch.from_numpy(labels)))
        each[split] = digests[start:stop], labels
        start = stop
    notes += same_images(each)
    total = hashlib.sha256("\n".join(names).encode())
    for split in SPLITS:
        total.update(b"".join(each[split][0]) + each[split][1].tobytes())
    source = (
        f"NIH ChestX-ray14 resized to {size}x{size}, labels of {found.table.name}, sha256 of names, pixels and labels "
        f"{total.hexdigest()[:32]}"
    )
    train, val, test = splits
    return DataSet(f"chestxray14_{size}", "multi-label", LABELS, train, val, test, source, tuple(notes))


def find_images(folder: Path, names: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The file of each name in the known layouts, and the images there that have none of these names.

    Raises:
        ValueError: a name has no file, or two different ones.
    """
    places = [folder / "images", *(folder / name / "images" for name in KAGGLE), folder]
    wanted, paths, extra = set(names), {}, []
    for place in places:
        for file in _files(place):
            path = place / file
            if file not in wanted:
                if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):  # "._x.png" is of macOS
                    extra.append(file)
            elif file not in paths:
                paths[file] = path
            elif not path.samefile(paths[file]):
                raise ValueError(f"{paths[file]} and {path}: two images of one name; keep the one that is meant")
    missing = [name for name in dict.fromkeys(names) if name not in paths]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} listed images are missing, the first is {missing[0]}. "
            f"Looked for in {LAYOUTS}{_where_else(folder, missing[0], extra)}"
        )
    return paths, extra


def _files(place: Path) -> list[str]:
    """Names of the files in a folder, links followed; none if it does not exist."""
    if not place.is_dir():
        return []
    with os.scandir(place) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)
        )


def _where_else(folder: Path, name: str, extra: Sequence[str]) -> str:
    """What may have been meant by a name that is missing."""
    stem = Path(name).stem.lower()
    alike = next((one for one in extra if Path(one).stem.lower() == stem), None)
    if alike is not None:
        return f"; there is {alike}: give it the name that is listed"
    for place, folders, files in os.walk(folder):  # does not follow links, which may lead in a circle
        folders.sort()
        if name in files:
            path = Path(place) / name
            return f"; there is {path}" + (", a link to nothing" if not path.exists() else "")
    return ""
