"""What a data set is, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a data set.

    Attributes:
        images: uint8 ``(N, channels, [depth,] height, width)``, in memory or mapped from a file.
        labels: int64 ``(N,)``; float32 ``(N, K)``, 0 or 1, of a multi-label set.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class DataSet:
    """A data set with a training, a validation and a test part.

    Attributes:
        name: short name for tables and folders.
        task: "multi-class" (binary ones included) or "multi-label".
        labels: names of the classes or labels.
        train: what the backbone and the arms are trained on.
        val: what settings are chosen on.
        test: what is reported.
        source: where the images came from, with a digest.
    """

    name: str
    task: str
    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    source: str

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.train.images.shape[1]

    @property
    def dims(self) -> int:
        """2 for images, 3 for volumes."""
        return self.train.images.ndim - 2

    def split(self, name: str) -> Split:
        """The part called ``name``: train, val or test."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def describe(self) -> str:
        """Counts and shape in a line."""
        shape = "x".join(map(str, self.train.images.shape[2:]))
        return (
            f"{self.name}: {len(self.train)}/{len(self.val)}/{len(self.test)} training/validation/test images of "
            f"{self.channels}x{shape}, {self.task}, {len(self.labels)} labels; {self.source}"
        )
