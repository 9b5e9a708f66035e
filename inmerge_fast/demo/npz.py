"""Files in MedMNIST format, checked: their axes, numbers and labels are understood, or refused with the cure."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checkpoints.kinds import kind_of
from .duplicates import digest_of, same_images

SPLITS = ("train", "val", "test")
MOST_CHANNELS = 4  # an axis this short is one of colours, not a side
SHAPES = "(N, H, W), (N, H, W, 3) or (N, D, H, W)"


@dataclass(frozen=True)
class Archive:
    """What a file holds.

    Attributes:
        arrays: ``{train,val,test}_images``, uint8 ``(N, H, W)``, ``(N, H, W, 3)`` or ``(N, D, H, W)``, and
            ``{train,val,test}_labels``, integers ``(N,)``, or ``(N, K)`` in a multi-label set.
        classes: number of classes or labels.
        notes: what was understood that the format does not say, and images that occur more than once.
    """

    arrays: dict[str, npt.NDArray]
    classes: int
    notes: tuple[str, ...]


def is_volumes(images: npt.NDArray) -> bool:
    """Whether the images, in MedMNIST's layout, are volumes."""
    return images.ndim == 4 and images.shape[-1] != 3


def read_npz(path: str | Path) -> Archive:
    """Read and check all splits of a file in MedMNIST format.

    Images in PyTorch's order ``(N, C, H, W)`` and a single channel at either end are understood, and a note says so;
    so are labels ``(N, K)`` of which each image has exactly one.

    Args:
        path: as for :func:`inmerge_fast.demo.data.load_npz`.

    Raises:
        ValueError: the file is missing, is not such a file, or could mean several things; the message names it and says
            why.
    """
    arrays, notes = _read_arrays(Path(path)), []
    for split in SPLITS:
        _check_split(path, split, arrays[f"{split}_images"], arrays[f"{split}_labels"])
        understood = _order_of(f"{path}: {split}_images", arrays[f"{split}_images"].shape)
        if arrays[f"{split}_labels"].shape[1:] == (1,):
            arrays[f"{split}_labels"] = arrays[f"{split}_labels"][:, 0]
        for kind in ("images", "labels"):
            one, first = arrays[f"{split}_{kind}"], arrays[f"train_{kind}"]
            if one.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{path}: {split}_{kind} and train_{kind} differ in shape: {one.shape} and {first.shape}"
                )
    if understood is not None:
        notes.append(f"images of shape {arrays['train_images'].shape} are read as {understood[1]}")
    for split in SPLITS:
        key = f"{split}_images"
        if arrays[key].max() <= 1:
            raise ValueError(
                f"{path}: {key} hold no value above {arrays[key].max()}, of 255: made uint8 from [0, 1], or masks? "
                "Save (255 * images).astype(np.uint8)"
            )
        if understood is not None:
            arrays[key] = np.ascontiguousarray(understood[0](arrays[key]))
    _one_hot_to_classes(arrays, notes)
    if arrays["train_labels"].ndim == 1:
        _check_classes(path, arrays)
        classes = int(arrays["train_labels"].max()) + 1  # a choice of images may lack a rare one
    else:
        _check_multi_label(path, arrays)
        classes = arrays["train_labels"].shape[1]
    parts = {
        split: ([digest_of(image) for image in arrays[f"{split}_images"]], arrays[f"{split}_labels"])
        for split in SPLITS
    }
    return Archive(arrays, classes, (*notes, *same_images(parts)))


def _read_arrays(path: Path) -> dict[str, npt.NDArray]:
    keys = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
    try:
        file = path.open("rb")  # np.load leaves the file open if it fails
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    with file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: is not an npz archive{_what_else(path)}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: is a single array, not an npz archive")
        missing = [key for key in keys if key not in archive]
        if missing:
            found = ", ".join(sorted(archive)) or "nothing"
            raise ValueError(f"{path}: not in MedMNIST format: {', '.join(missing)} missing; it holds {found}")
        try:
            arrays = {key: archive[key] for key in keys}
        except MemoryError as error:
            raise ValueError(f"{path}: does not fit into memory, or is damaged: {error}") from error
        except Exception as error:  # NumPy's reader of headers, zip's and zlib's raise errors of many types
            raise ValueError(f"{path}: damaged, or holds arrays that are not plain numbers: {error}") from error
        for key, value in arrays.items():
            if not isinstance(value, np.ndarray):  # NumPy gives the bytes of what is no .npy file
                raise ValueError(f"{path}: damaged: {key} is no array of NumPy")
        return arrays


def _what_else(path: Path) -> str:
    """What a file is that is no archive; empty where that is not known."""
    try:
        kind_of(path)
    except ValueError as error:
        return f": {error}".replace(f"{path}: ", "")
    return ""


def _check_split(path: str | Path, split: str, images: npt.NDArray, labels: npt.NDArray) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: {split}_images must be uint8, got {images.dtype}{_as_uint8(images)}")
    if not 3 <= images.ndim <= 5:
        raise ValueError(f"{path}: {split}_images must have shape {SHAPES}, got {images.shape}")
    if 0 in images.shape:
        raise ValueError(f"{path}: {split}_images is empty: its shape is {images.shape}")
    if labels.ndim not in (1, 2) or 0 in labels.shape[1:]:
        raise ValueError(f"{path}: {split}_labels must have shape (N, 1) or, multi-label, (N, K), got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: {split}_labels must be integers, got {labels.dtype}{_as_integers(labels)}")
    if len(images) != len(labels):
        raise ValueError(f"{path}: {len(images)} {split}_images but {len(labels)} {split}_labels")


def _as_uint8(images: npt.NDArray) -> str:
    """What the values of another type are, and how to save them; nothing of what is not a number."""
    if images.dtype.kind == "b":
        return ": save images.astype(np.uint8) * 255"
    if images.dtype.kind not in "iuf" or not images.size:
        return ""
    bad = int((~np.isfinite(images)).sum())
    if bad:
        return f" with {bad} values that are not finite: what should they be?"
    low, high = images.min(), images.max()
    if low >= 0 and high <= 1 and images.dtype.kind == "f":
        cure = "save (255 * images).round().astype(np.uint8)"
    elif low >= 0 and high <= 255:
        cure = "save images.round().astype(np.uint8)"
    else:
        cure = "say which values are black and white by scaling them to 0 to 255, the same for all images"
    return f" between {low:g} and {high:g}: {cure}"


def _as_integers(labels: npt.NDArray) -> str:
    if labels.dtype.kind == "b":
        return ": save labels.astype(np.uint8)"
    if labels.dtype.kind != "f":
        return ""
    bad = int((~np.isfinite(labels)).sum())
    if bad:
        return f" with {bad} values that are not finite: which class is that?"
    whole = bool((labels == labels.round()).all())
    return ": save labels.astype(np.int64)" if whole else " with values between whole numbers"


def _order_of(what: str, shape: tuple[int, ...]) -> tuple[Callable[[npt.NDArray], npt.NDArray], str] | None:
    """How images in another order are brought into MedMNIST's, and what they are; None if they are in it.

    Raises:
        ValueError: the shape can be read in several ways, or in none.
    """
    sides = shape[1:]
    short = [axis for axis, side in enumerate(sides) if side <= MOST_CHANNELS]
    if not short and len(sides) <= 3:
        if len(set(sides)) == 1 or len(sides) == 2:
            return None
        return (lambda images: images), f"grey volumes of {sides[0]} slices of {sides[1]} x {sides[2]}"
    if len(sides) == 3 and short == [2] and sides[2] == 3:
        return None
    ends = {0: "first", len(sides) - 1: "last"}
    if len(sides) > 2 and len(short) == 1 and sides[short[0]] == 1 and short[0] in ends:
        kind = "volumes" if len(sides) == 4 else "images"
        return (lambda images: images.squeeze(1 + short[0])), f"grey {kind}, their one channel {ends[short[0]]}"
    if len(sides) == 3 and short == [0] and sides[0] == 3:
        return (lambda images: np.moveaxis(images, 1, -1)), "colour images in PyTorch's order, channels first"
    cure = "whether an axis of 4 or fewer is one of colours or a side is not clear"
    if len(sides) == 3:
        cure += ": colour images are (N, H, W, 3), as of np.moveaxis(images, 1, -1), and volumes have more slices"
    raise ValueError(f"{what} must have shape {SHAPES}, got {shape}; {cure}")


def _one_hot_to_classes(arrays: dict[str, npt.NDArray], notes: list[str]) -> None:
    """Labels ``(N, K)`` of which every image in every part has exactly one are classes."""
    labels = [arrays[f"{split}_labels"] for split in SPLITS]
    if labels[0].ndim == 1 or not all(
        one.min() >= 0 and one.max() == 1 and (one.sum(axis=1) == 1).all() for one in labels
    ):
        return
    notes.append(f"labels of shape {labels[0].shape}, of which each image has one, are read as classes")
    for split in SPLITS:
        arrays[f"{split}_labels"] = arrays[f"{split}_labels"].argmax(axis=1)


def _check_classes(path: str | Path, arrays: Mapping[str, npt.NDArray]) -> None:
    known = np.unique(arrays["train_labels"])
    top = len(known) - 1
    if known[0] != 0 or known[-1] != top:
        raise ValueError(
            f"{path}: train_labels out of range: {len(known)} classes must be numbered 0 to {top}, "
            f"but the labels lie between {known[0]} and {known[-1]}: save np.unique(labels, return_inverse=True)[1] of "
            "the labels of all parts together"
        )
    if top == 0:
        raise ValueError(f"{path}: train_labels holds one class only; there is nothing to learn")
    for split in ("val", "test"):
        labels = arrays[f"{split}_labels"]
        if labels.min() < 0 or labels.max() > top:
            raise ValueError(
                f"{path}: {split}_labels out of range: between {labels.min()} and {labels.max()}, "
                f"but train_labels has classes 0 to {top}"
            )


def _check_multi_label(path: str | Path, arrays: Mapping[str, npt.NDArray]) -> None:
    for split in SPLITS:
        labels = arrays[f"{split}_labels"]
        if labels.min() < 0 or labels.max() > 1:
            raise ValueError(
                f"{path}: {split}_labels out of range: several labels per image, shape {labels.shape}, must each be 0 "
                f"or 1, but they lie between {labels.min()} and {labels.max()}"
            )
    if (arrays["train_labels"] == arrays["train_labels"][0]).all():
        raise ValueError(f"{path}: train_labels are the same for every image; there is nothing to learn")
