"""NIH ChestX-ray14 and CheXpert by way of torchxrayvision, which reads their tables; ``--data nih:FOLDER`` and so on.

Its classes say which labels an image has, and where it lies. What they leave open is settled here: columns come in the
order of ``LABELS`` for NIH and in the alphabet's for CheXpert; all frontal views and all images of a patient are taken,
where the classes take the first PA view of each by default; a patient is in one part only. Pixels are decoded as those
of every other data set here, to uint8: :func:`in_its_units` makes of them the -1024 to 1024 that its models expect.

In CheXpert a finding that a report does not mention, or leaves open, is NaN. The loss and the AUC here have no use for
that, so it is refused, unless ``chexpert-zeros:FOLDER`` says that it is to count as absent (its authors' U-Zeros).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .chestxray import LABELS
from .chestxray_tables import ENTRY_TABLES, SPLIT_SEED, some
from .dataset import AS_IT_IS, SPLITS, DataSet, MissingDataError, Reading, Split
from .image_cache import decoded, default_folder

KINDS = ("nih", "chexpert", "chexpert-zeros")
OLDEST = (1, 5)  # the first release whose NIH class reads the table of 2020
ENDS = (0.7, 0.8)  # of the patients: training, then validation, then test
VIEWS = ["PA", "AP"]


def is_xrays(spec: str) -> bool:
    """Whether a data set's name asks for torchxrayvision."""
    return spec.partition(":")[0] in KINDS and ":" in spec


def folder_of(spec: str) -> Path:
    """The folder of a name of this kind."""
    return Path(spec.partition(":")[2])


def in_its_units(images: torch.Tensor) -> torch.Tensor:
    """What torchxrayvision's models take: float32 in [-1024, 1024] of uint8 images of any shape."""
    return (2 * (images.to(torch.float32) / 255) - 1) * 1024


def load_xrays(
    spec: str, *, size: int = 224, root: Path | None = None, cache: Path | None = None, reading: Reading = AS_IT_IS
) -> DataSet:
    """Load a data set through torchxrayvision.

    Args:
        spec: ``nih:``, ``chexpert:`` or ``chexpert-zeros:`` and a folder: of NIH, one that has ``images/`` and
            ``Data_Entry_2017.csv`` or its form of 2020; of CheXpert, one that has ``train.csv`` and ``train/``.
        size: side to which images are resized.
        root: what the folder may be relative to.
        cache: folder for the decoded images; ``~/.cache/inmerge_fast`` if None.
        reading: what the image files leave open.

    Returns:
        A multi-label data set of which 70, 10 and 20 % of the patients are in training, validation and test.

    Raises:
        MissingDataError: there is no such folder.
        ValueError: torchxrayvision is missing or too old; a file is missing; a label is NaN; there are fewer patients
            than parts.
    """
    kind, folder = spec.partition(":")[0], folder_of(spec)
    if root is not None and not folder.is_dir():
        folder = root / folder
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: there is no such folder; {spec} needs it")
    xrv = _library()
    table = _table(folder, ENTRY_TABLES if kind == "nih" else ("train.csv",))
    if kind == "nih":
        found = xrv.datasets.NIH_Dataset(str(folder / "images"), str(table), views=VIEWS, unique_patients=False)
        names = found.csv["Image Index"].tolist()
        paths = [folder / "images" / name for name in names]
    else:
        found = xrv.datasets.CheX_Dataset(str(folder), str(table), views=VIEWS, unique_patients=False)
        names = [name[name.index("train/") :] for name in found.csv["Path"]]
        paths = [folder / name for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(names)} listed images are missing: {some(missing)}")
    columns = list(LABELS) if kind == "nih" else sorted(found.pathologies)
    labels = found.labels[:, [found.pathologies.index(label) for label in columns]]
    labels, notes = _without_nan(labels, columns, kind, folder)
    parts = _parts(found.csv["patientid"].astype(str).to_numpy(), folder)
    order = np.concatenate(parts)
    images, digests = decoded(
        [paths[index] for index in order], size, default_folder() if cache is None else cache,
        name=kind.partition("-")[0], bits=reading.bits,
    )  # fmt: skip
    digest = hashlib.sha256(b"".join(digests) + labels[order].tobytes())
    splits, start = [], 0
    for part in parts:
        stop = start + len(part)
        splits.append(Split(torch.from_numpy(images[start:stop]), torch.from_numpy(labels[part])))
        start = stop
    source = (
        f"{'NIH ChestX-ray14' if kind == 'nih' else 'CheXpert'} by torchxrayvision {xrv.__version__} resized to "
        f"{size}x{size}, sha256 of pixels and labels {digest.hexdigest()[:32]}"
    )
    return DataSet(f"{kind}_{size}", "multi-label", tuple(columns), *splits, source, tuple(notes))


def _library() -> Any:
    cure = "pip install torchxrayvision (with -c constraints.txt, or pip replaces torch)"
    try:
        import torchxrayvision as xrv
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's wheel is for another torch
        raise ValueError(
            f"data of this kind need torchxrayvision, which cannot be imported ({error}): {cure}"
        ) from error
    if tuple(map(int, xrv.__version__.split(".")[:2])) < OLDEST:
        raise ValueError(
            f"torchxrayvision {'.'.join(map(str, OLDEST))} or newer is needed, got {xrv.__version__}: {cure}"
        )
    return xrv


def _table(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: holds no {' nor '.join(names)}")


def _without_nan(
    labels: np.ndarray[Any, Any], columns: list[str], kind: str, folder: Path
) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Labels of 0 and 1, and what was made of the others, a sentence.

    Raises:
        ValueError: there are others, and nothing says what they are.
    """
    unknown = np.isnan(labels)
    if not unknown.any():
        return labels, []
    worst = columns[int(unknown.sum(0).argmax())]
    count = f"{int(unknown.sum())} of {unknown.size} labels are unknown (NaN), most of {worst}"
    if kind != "chexpert-zeros":
        raise ValueError(
            f"{folder}: {count}: the reports do not mention the finding, or leave it open. "
            f"--data chexpert-zeros:{folder.name} takes them for absent"
        )
    return np.nan_to_num(labels, nan=0.0).astype(np.float32), [f"{count}: taken for absent"]


def _parts(patients: np.ndarray[Any, Any], folder: Path) -> list[np.ndarray[Any, Any]]:
    """Rows of the training, the validation and the test part; all rows of a patient are in one."""
    each = np.unique(patients)
    if len(each) < len(SPLITS):
        raise ValueError(f"{folder}: images of {len(each)} patients, and each of {', '.join(SPLITS)} needs one")
    order = np.random.default_rng(SPLIT_SEED).permutation(each)
    first = min(max(round(ENDS[0] * len(each)), 1), len(each) - 2)
    second = min(max(round(ENDS[1] * len(each)), first + 1), len(each) - 1)
    return [np.flatnonzero(np.isin(patients, some_of)) for some_of in np.split(order, [first, second])]
