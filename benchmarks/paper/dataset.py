"""What a data set is, wherever it came from, and how to read what its files leave open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPLITS = ("train", "val", "test")


class MissingDataError(ValueError):
    """There are no data here: nothing is wrong with them."""


@dataclass(frozen=True)
class Reading:
    """What those who know their files can say of them.

    Attributes:
        bits: bits that hold data in image files of 16 bits, 8 to 16; None for what the format says, where that is sure.
        allow_overlap: take an image or a patient in several parts, or an image twice in one, as it is: counted and
            said instead of refused.
    """

    bits: int | None = None
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        if self.bits is not None and not 8 <= self.bits <= 16:
            raise ValueError(f"bits must be 8 to 16, or None for what the image files say, got {self.bits}")


AS_IT_IS = Reading()


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
        notes: how the files were understood and what is odd about them, a sentence each.
    """

    name: str
    task: str
    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    source: str
    notes: tuple[str, ...] = ()

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
            f"{self.name}: {len(self.train)}/{len(self.val)}/{len(self.test)} training/validation/test "
            f"{'volumes' if self.dims == 3 else 'images'} of {self.channels}x{shape}, {self.task}, {len(self.labels)} "
            f"labels; {self.source}"
        )

    def without_auc(self) -> list[str]:
        """A sentence on each part that is measured in which a label has no AUC: none of its images has it, or all."""
        notes = []
        for word, part in (("validation", self.val), ("test", self.test)):
            one_hot = part.labels.ndim == 1
            truth = torch.nn.functional.one_hot(part.labels, len(self.labels)) if one_hot else part.labels
            counts = truth.sum(0).tolist()
            names = [name for name, count in zip(self.labels, counts, strict=True) if count in (0, len(part))]
            if names:
                notes.append(f"none or all of the {word} images have {', '.join(names)}: no AUC for it there")
        return notes
