"""Images for the demo: scikit-learn's digits, or a file in MedMNIST format, checked before anything is trained."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .npz import is_volumes, read_npz

MIN_SIDE, MAX_SIDE = 16, 28  # three poolings leave 2x2 of 16; a step at 28 takes 2.5 times as long as at 16
VOLUME_SIDE = 16  # a step takes 0.1 s on one core; at 28 it takes 0.9 s
VOLUME_COST = 3  # a volume counts as this many images where their number is limited
CHUNK = 256  # images turned to float at a time: 2000 RGB images of 224x224 would take 1.2 GB at once
DIGITS_TRAIN = 1000
DIGITS_SEED = 0  # the split is part of the data set: --seed does not change it


@dataclass(frozen=True)
class ImageSet:
    """Images or volumes of one data set, ready for the net.

    Attributes:
        name: what to call the data set in the output.
        details: how many images there are, of what kind, and what was done to them.
        train_x: ``(N, channels, [depth,] height, width)`` float32, zero mean and unit variance over the training
            images.
        train_y: ``(N,)`` int64; of a multi-label set ``(N, classes)`` float32, 0 or 1.
        test_x: as ``train_x``, scaled by the same numbers.
        test_y: as ``train_y``.
        classes: number of classes, or of the labels that every image of a multi-label set has.
    """

    name: str
    details: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: int

    @property
    def multi_label(self) -> bool:
        """Whether every image has several labels, each 0 or 1, instead of one class."""
        return self.train_y.ndim == 2

    @property
    def labels_each(self) -> int:
        """Labels that the net predicts for every image."""
        return self.classes if self.multi_label else 1

    @property
    def dims(self) -> int:
        """2 for images, 3 for volumes."""
        return self.train_x.ndim - 2

    @property
    def noun(self) -> str:
        """What to call the images in the output."""
        return "volumes" if self.dims == 3 else "images"

    @property
    def measure(self) -> str:
        """What to call the share of right answers in the output."""
        return "label accuracy" if self.multi_label else "accuracy"


def require(module: str, package: str) -> Any:
    """Import a module of the optional extra ``demo``.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"the demo needs {package} ({error}): pip install 'inmerge_fast[demo]'") from error


def load_digits() -> ImageSet:
    """Handwritten digits that come with scikit-learn: 1797 grey images of 8x8 pixels, 10 classes."""
    images, labels = read_digits()
    train, test = slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None)
    return _image_set("scikit-learn digits", images[train], labels[train], images[test], labels[test], 10, [])


def read_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """scikit-learn's digits ``(1797, 8, 8)``, 0 to 16, and their labels, shuffled: ``DIGITS_TRAIN`` to train with."""
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    order = np.random.default_rng(DIGITS_SEED).permutation(len(digits.target))
    return digits.images[order].astype(np.float32), digits.target[order]


def load_npz(path: str | Path, *, max_train: int, max_test: int, seed: int) -> ImageSet:
    """Read a file in MedMNIST format.

    Args:
        path: an npz archive with ``{train,val,test}_images``, uint8 ``(N, H, W)``, ``(N, H, W, 3)`` or, for volumes,
            ``(N, D, H, W)``, and ``{train,val,test}_labels``, integers: classes ``(N, 1)`` or ``(N,)``, or several
            labels ``(N, K)``, each 0 or 1.
        max_train: use a random choice of this many training images if there are more, and of a third as many volumes.
        max_test: the same for test images.
        seed: seed of that choice.

    Raises:
        ValueError: the file is missing, or is not such a file; the message names it and says why.
    """
    archive = read_npz(path)
    arrays, notes = archive.arrays, list(archive.notes)
    rng, chosen = np.random.default_rng(seed), {}
    noun, cost = ("volumes", VOLUME_COST) if is_volumes(arrays["train_images"]) else ("images", 1)
    for split, word, most in (("train", "training", max_train // cost), ("test", "test", max_test // cost)):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if len(images) > most:
            kept = np.sort(rng.permutation(len(images))[:most])
            notes.append(f"a random {most} of the {len(images)} {word} {noun} are used, to stay within two minutes")
            images, labels = images[kept], labels[kept]
        chosen[split] = images, labels
    notes.append(f"the validation {noun} are not used")
    return _image_set(Path(path).name, *chosen["train"], *chosen["test"], archive.classes, notes)


def _image_set(
    name: str,
    train_images: npt.NDArray,
    train_labels: npt.NDArray,
    test_images: npt.NDArray,
    test_labels: npt.NDArray,
    classes: int,
    notes: list[str],
) -> ImageSet:
    noun, most = ("volumes", VOLUME_SIDE) if is_volumes(train_images) else ("images", MAX_SIDE)
    sides = train_images.shape[1:] if noun == "volumes" else train_images.shape[1:3]
    size = tuple(min(max(side, MIN_SIDE), most) for side in sides)
    resized = "" if size == sides else f", resized to {'x'.join(map(str, size))}"
    train_x, test_x = (channels_first(images, size) for images in (train_images, test_images))
    mean, spread = train_x.mean(), train_x.std().clamp(min=1e-6)
    kind = "grey" if train_x.shape[1] == 1 else "RGB"
    counts = f"{len(train_x)} training and {len(test_x)} test {noun}, {classes} "
    counts += "classes" if train_labels.ndim == 1 else f"labels per {noun[:-1]}"
    label_type = "int64" if train_labels.ndim == 1 else "float32"
    if train_labels.ndim == 2:
        # Most labels are rare: without this number an accuracy of 95 % looks like a good one.
        blind = 100 * (test_labels == (train_labels.mean(axis=0) > 0.5)).mean()
        notes = [f"answering each label with its commoner value gives a label accuracy of {blind:.2f} %", *notes]
    return ImageSet(
        name=name,
        details="; ".join([f"{counts}, {'x'.join(map(str, sides))} {kind}{resized}", *notes]),
        train_x=(train_x - mean) / spread,
        train_y=torch.from_numpy(train_labels.astype(label_type)),
        test_x=(test_x - mean) / spread,
        test_y=torch.from_numpy(test_labels.astype(label_type)),
        classes=classes,
    )


def channels_first(images: npt.NDArray, size: tuple[int, ...]) -> torch.Tensor:
    """Images in MedMNIST's layout as float32 ``(N, channels, *size)``, resized if they are of another size."""
    chunks = []
    for start in range(0, len(images), CHUNK):
        x = torch.from_numpy(images[start : start + CHUNK].astype(np.float32))
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 and not is_volumes(images) else x[:, None]
        chunks.append(x if x.shape[2:] == size else _resize(x, size))
    return torch.cat(chunks).contiguous()


def _resize(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    bilinear = partial(nn.functional.interpolate, mode="bilinear", antialias=True)
    if len(size) == 2:
        return bilinear(x, size=size)
    # Trilinear in two steps, as PyTorch has no antialiasing in 3D: the slices (as channels), then the depth.
    depth, height, width = size
    x = bilinear(x[:, 0], size=(height, width))
    return bilinear(x.flatten(2)[:, None], size=(depth, height * width)).reshape(-1, 1, depth, height, width)
