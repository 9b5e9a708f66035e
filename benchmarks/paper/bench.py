"""A data set on a device, and what all runs share of it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from . import medmnist_c, robustness
from .config import OWN, Recipe
from .dataset import SPLITS, DataSet, Split
from .image_cache import replacing
from .models import Model, Weights, build

COPIES = 1  # raised whenever the same corruption gives other pixels
CACHE_BYTES = 64 * 2**20  # corrupted copies of small sets are kept, since every run looks at them


class Bench:
    """A data set on a device, and what is computed from it once for all runs.

    Args:
        data: the images.
        device: where the networks are.
        limit: use this many images of every part, evenly spaced; None for all.
        weights: file with pre-trained weights of the network, or None.
        cache: folder for corrupted copies of large sets, which take longer to make than to measure, so that every run
            reads them there; None to make them for every run anew.
        room: bytes that training images may take on the device, see :class:`benchmarks.paper.feed.Feed`.
    """

    def __init__(
        self,
        data: DataSet,
        device: torch.device,
        limit: int | None = None,
        weights: Weights | None = None,
        room: int | None = None,
        cache: Path | None = None,
    ) -> None:
        if limit is not None:
            train, val, test = (_thinned(data.split(name), limit) for name in SPLITS)
            data = dataclasses.replace(data, train=train, val=val, test=test)
        self.data, self.device, self.weights, self.room, self.cache = data, device, weights, room, cache
        self._constants: dict[object, torch.Tensor] = {}
        self._copies: dict[tuple[str, str, str, float], torch.Tensor] = {}
        sample = data.train.images[:: max(1, len(data.train) // 5000)].float() / 255
        dims = [0, *range(2, sample.ndim)]
        self.normalisation = (tuple(sample.mean(dims).tolist()), tuple(sample.std(dims).clamp(min=1e-6).tolist()))

    def prepare(self, model: Model, unit: torch.Tensor) -> torch.Tensor:
        """What the network takes, from images in [0, 1] on the device: resized, in its channels, normalised."""
        if unit.shape[-1] < model.side:
            mode = "trilinear" if unit.ndim == 5 else "bilinear"
            unit = functional.interpolate(unit, size=(model.side,) * (unit.ndim - 2), mode=mode)
        if unit.shape[1] < model.channels:
            unit = unit.expand(-1, model.channels, *unit.shape[2:])
        mean, spread = model.normalisation or self.normalisation
        shape = (-1, *[1] * (unit.ndim - 2))
        return (unit - self._constant(mean, unit).view(shape)) / self._constant(spread, unit).view(shape)

    def _constant(self, values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        """A tensor that is copied to the device once: every copy would wait for what the device is doing."""
        key = (values, like.device, like.dtype)
        if key not in self._constants:
            self._constants[key] = like.new_tensor(values)
        return self._constants[key]

    def corruptions(self, source: str) -> tuple[str, ...]:
        """Names of the corruptions, "own" ones or those of the package medmnistc."""
        return tuple(robustness.CORRUPTIONS) if source == OWN else medmnist_c.names(self.data.name)

    def check_corruptions(self, source: str) -> None:
        """Try the corruptions on an image.

        Raises:
            ValueError: they cannot be used with this data set.
        """
        if source != OWN:
            medmnist_c.check(self.data.test.images, self.data.name)

    def check_weights(self, recipe: Recipe) -> str:
        """Load the pre-trained weights once, to see whether they fit; gives a line on what became of them.

        Raises:
            ValueError: they cannot be read or do not fit the recipe's network.
        """
        return build(recipe.model, self.data, 0, self.weights).loaded

    def copies(self, split: str, source: str, kind: str, level: float) -> torch.Tensor:
        """Corrupted copies of a part's images by one of :meth:`corruptions`, or noisy ones (``kind`` "noise")."""
        key = (split, source, kind, level)
        if key in self._copies:
            return self._copies[key]
        images = self.data.split(split).images
        large = images.numel() > CACHE_BYTES
        place = self._place(key, images) if large and self.cache is not None else None
        out = None if place is None else _mapped(place, images)
        if out is None:
            if kind == "noise":
                out = robustness.add_noise(images, level)
            elif source == OWN:
                out = robustness.corrupt(images, kind, int(level))
            else:
                out = medmnist_c.corrupt(images, self.data.name, kind, int(level))
            if place is not None:
                _keep(out, place)
        if not large:
            self._copies[key] = out
        return out

    def _place(self, key: tuple[str, str, str, float], images: torch.Tensor) -> Path:
        """The file of large copies: another one for other images, and for other code that makes them."""
        _, source, kind, level = key
        code = medmnist_c.version() if source != OWN and kind != "noise" else str(COPIES)
        total = hashlib.sha256(f"{code} {self.data.source} {tuple(images.shape)} {kind} {level:g}".encode())
        for one in (images[0], images[len(images) // 2], images[-1]):
            total.update(one.numpy().tobytes())
        assert self.cache is not None
        return self.cache / f"copies-{kind}-{total.hexdigest()[:16]}.npy"

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss: binary cross-entropy of the labels, or cross-entropy of the classes."""
        if self.data.task == "multi-label":
            return functional.binary_cross_entropy_with_logits(logits.float(), labels)
        return functional.cross_entropy(logits.float(), labels)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores ``(N, K)`` from logits."""
        return logits.float().sigmoid() if self.data.task == "multi-label" else logits.float().softmax(1)


def _thinned(part: Split, limit: int) -> Split:
    kept = torch.arange(limit) * len(part) // limit if limit < len(part) else torch.arange(len(part))
    return Split(part.images[kept], part.labels[kept])


def _keep(copies: torch.Tensor, place: Path) -> None:
    """Write copies to a file, whole or not at all; where there is no room they are made again for every run."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            np.save(file, copies.numpy())
    except OSError as error:
        print(f"{place}: cannot be written ({error}); these copies are made again for every run", file=sys.stderr)


def _mapped(place: Path, like: torch.Tensor) -> torch.Tensor | None:
    """Copies from a file; None if there is none, or it does not hold them."""
    if not place.exists():
        return None
    try:
        found = np.load(place, mmap_mode="c", allow_pickle=False)
    except Exception:  # of a header that is damaged NumPy raises errors of many types
        return None
    return torch.from_numpy(found) if found.dtype == np.uint8 and found.shape == tuple(like.shape) else None
