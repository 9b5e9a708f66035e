"""Data sets by name or file: scikit-learn's digits, MedMNIST, any ``.npz`` in its layout, NIH ChestX-ray14."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import sys
import urllib.error
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from inmerge_fast.demo.data import DIGITS_TRAIN, read_digits
from inmerge_fast.demo.npz import is_volumes, read_npz

from .dataset import AS_IT_IS, SPLITS, DataSet, Reading, Split
from .own import is_own, own_data

SIZES = {2: (28, 64, 128, 224), 3: (28, 64)}  # MedMNIST's, by the dimensions of its images
DIGITS_VAL = 297  # of the 797 digits that the demo tests with; the remaining 500 are the test set here


def load(spec: str, *, size: int | None = None, root: str | Path | None = None, reading: Reading = AS_IT_IS) -> DataSet:
    """Load a data set.

    Args:
        spec: ``digits``; a MedMNIST name such as ``pneumoniamnist``; the path of an ``.npz`` file in MedMNIST's layout;
            the path of a folder that holds NIH ChestX-ray14, or ``chestxray14``; ``nih:``, ``chexpert:`` or
            ``chexpert-zeros:`` and a folder that torchxrayvision reads; ``package.module:function``, see
            :func:`benchmarks.paper.own.own_data`. Paths may be relative to ``root``.
        size: side of the images, for MedMNIST (28, 64, 128, 224; volumes 28, 64: a file for each) and ChestX-ray14
            (any; 224 if None). The images of an ``.npz`` file or of one's own are resized to any.
        root: folder of the data; the environment variable ``INMERGE_DATA``, else ``~/.medmnist``, if None.
        reading: what image files and splits leave open, for ChestX-ray14.

    Returns:
        The data set. Its notes, what was understood and what is odd about it, are said once, on standard error.

    Raises:
        ValueError: the data cannot be found or used; the message names the file and the cure.
    """
    data = _load(spec, size, root, reading)
    data = dataclasses.replace(data, notes=(*data.notes, *data.without_auc()))
    for note in data.notes:
        _say(f"{data.name}: {note}")
    return data


@functools.cache
def _say(line: str) -> None:
    if is_leader() and multiprocessing.parent_process() is None:  # not from every process of a pool
        print(line, file=sys.stderr, flush=True)


def is_leader() -> bool:
    """Whether this process is the one that writes and prints: the only one, or rank 0 of ``torchrun``."""
    return os.environ.get("RANK", "0") == "0"


def _load(spec: str, size: int | None, root: str | Path | None, reading: Reading) -> DataSet:
    from .chestxray import load_chestxray14  # needs Pillow, the others do not
    from .xrays import is_xrays, load_xrays

    folder = Path(root or os.environ.get("INMERGE_DATA") or "~/.medmnist").expanduser()
    if spec == "digits":
        if size not in (None, 8):
            raise ValueError(f"size must be 8 or left out for digits, got {size}")
        return _digits()
    if spec.endswith(".npz"):
        path = Path(spec) if Path(spec).exists() else folder / spec
        return resized(_from_npz(path, path.stem), size)
    if is_xrays(spec):
        return load_xrays(spec, size=size or 224, root=folder, reading=reading)
    if is_own(spec):
        return resized(own_data(spec), size)
    for path in (Path(spec), folder / spec):
        if spec == "chestxray14" or path.is_dir():
            return load_chestxray14(path if path.is_dir() else folder / spec, size=size or 224, reading=reading)
    return _medmnist(spec, size or 28, folder)


def resized(data: DataSet, size: int | None) -> DataSet:
    """A data set with images of another size: bilinear, and averaged where they become smaller.

    Raises:
        ValueError: the size is not above 0, or the images are not square.
    """
    shape = tuple(data.train.images.shape[2:])
    if size is None or shape == (size,) * data.dims:
        return data
    if size < 1 or len(set(shape)) > 1:
        raise ValueError(f"size must be above 0, and of square images, got {size} for {data.name} with {shape}")
    train, val, test = (_resized(data.split(name), size) for name in SPLITS)
    source = f"{data.source}, resized from {shape[0]} to {size} px"
    return dataclasses.replace(data, train=train, val=val, test=test, source=source)


def _resized(part: Split, size: int) -> Split:
    flat = part.images.ndim == 4
    out = [
        functional.interpolate(
            chunk.float(), size=(size,) * (chunk.ndim - 2), mode="bilinear" if flat else "trilinear", antialias=flat
        )
        for chunk in part.images.split(512)  # float copies of a large set would not fit in memory
    ]
    return Split(torch.cat([chunk.round().clamp(0, 255).byte() for chunk in out]), part.labels)


def without_size(name: str) -> str:
    """The name of a data set without the size of its images: ``pathmnist`` of ``pathmnist_224``."""
    return re.sub(r"_\d+$", "", name)


def _digits() -> DataSet:
    images, labels = read_digits()
    grey = (images * (255 / 16)).round().astype(np.uint8)
    ends = [0, DIGITS_TRAIN, DIGITS_TRAIN + DIGITS_VAL, len(grey)]
    train, val, test = (_split(grey[a:b], labels[a:b]) for a, b in itertools.pairwise(ends))
    return DataSet("digits", "multi-class", tuple("0123456789"), train, val, test, "scikit-learn's load_digits")


def _from_npz(path: Path, name: str, labels: tuple[str, ...] | None = None) -> DataSet:
    archive = read_npz(path)
    arrays = archive.arrays
    train, val, test = (_split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in SPLITS)
    task = "multi-label" if arrays["train_labels"].ndim == 2 else "multi-class"
    names = labels if labels is not None else tuple(map(str, range(archive.classes)))
    return DataSet(name, task, names, train, val, test, f"{path.name}, md5 {md5_of(path)}", archive.notes)


def _split(images: npt.NDArray, labels: npt.NDArray) -> Split:
    x = torch.from_numpy(np.ascontiguousarray(images))
    x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 and not is_volumes(images) else x[:, None]
    kind = np.float32 if labels.ndim == 2 else np.int64
    return Split(x, torch.from_numpy(labels.astype(kind)))


def md5_of(path: Path) -> str:
    """MD5 of a file, as MedMNIST publishes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() if hasattr(hashlib, "file_digest") else _md5(file.read())


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def _medmnist(name: str, size: int, folder: Path) -> DataSet:
    try:
        from medmnist.info import INFO
    except ImportError as error:
        raise ValueError(
            f"data {name!r}: MedMNIST names need the medmnist package: pip install --no-deps medmnist (with its "
            "dependencies pip would replace torch), or give the path of an .npz file"
        ) from error
    if name not in INFO:
        raise ValueError(f"data must be digits, a folder, an .npz file or one of {', '.join(INFO)}, got {name!r}")
    info, volumes = INFO[name], name.endswith("3d")
    if size not in SIZES[3 if volumes else 2]:
        raise ValueError(f"size of {name} must be one of {SIZES[3 if volumes else 2]}, got {size}")
    suffix = "" if size == 28 else f"_{size}"
    path = folder / f"{name}{suffix}.npz"
    url, wanted = info[f"url{suffix}"], info[f"MD5{suffix}"]
    if not path.exists():
        _download(url, path)
    found = md5_of(path)
    if found != wanted:
        raise ValueError(
            f"{path}: MD5 is {found}, MedMNIST's file has {wanted}; delete it and fetch {url} again, or pass its path "
            "as data to use it as it is"
        )
    return _from_npz(path, f"{name}{suffix}", tuple(info["label"][key] for key in sorted(info["label"], key=int)))


def _download(url: str, path: Path) -> None:
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        part.replace(path)
    except (OSError, urllib.error.URLError) as error:
        raise ValueError(
            f"{path}: there is no such file and it could not be downloaded ({error}); fetch {url} and put it there, or "
            "set INMERGE_DATA to the folder that holds it"
        ) from error
