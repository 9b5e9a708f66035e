"""MedMNIST-C's own corruptions, from the package medmnistc where it can be imported (Di Salvo et al. 2024).

Applied as its ``DatasetManager`` does: every image as RGB, and back to grey for grey sets. Two things differ. The
random numbers are seeded by corruption and severity, not once per data set, so that any choice of them sees the same
images. And images smaller than the 224 px that they were made for are taken as they are, which makes blur and
pixelation harsher; a corruption that does not work at their size is an error. The relative metric (against AlexNet) is
not used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import random
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from inmerge_fast.demo.data import require

from .data import without_size

PACKAGE = "medmnistc"
TRIED = 8  # images, by check: where stains and bubbles fit is a matter of chance
SAME_IMAGES = {"chestxray14": "chestmnist"}
HOW_TO_INSTALL = (
    "install it with pip install --no-deps, with opencv-python-headless, scikit-image, wand, the system's ImageMagick "
    "and a torchvision that fits the torch you have, or pip replaces torch"
)


def registry() -> Any:
    """The package's list of corruptions.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module(f"{PACKAGE}.corruptions.registry")
    except (ImportError, RuntimeError, OSError) as error:  # no package; a torchvision or ImageMagick that does not fit
        raise ValueError(f"{PACKAGE} cannot be imported ({error}); {HOW_TO_INSTALL}") from error


def _design(data_name: str) -> tuple[dict[str, Any], bool]:
    """The corruptions designed for a data set, each with its parameters, and whether its images are coloured."""
    designed = registry()
    key = without_size(data_name)
    key = SAME_IMAGES.get(key, key)
    if key not in designed.CORRUPTIONS_DS:
        raise ValueError(
            f"{PACKAGE} has no corruptions for {data_name!r}, only for {', '.join(designed.CORRUPTIONS_DS)}"
        )
    return designed.CORRUPTIONS_DS[key], designed.DATASET_RGB[key]


def names(data_name: str) -> tuple[str, ...]:
    """The corruptions designed for a data set.

    Raises:
        ValueError: the package cannot be imported, or has none for it.
    """
    return tuple(_design(data_name)[0])


def version() -> str:
    """The package and its version, for result files."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} (of unknown version)"


def check(images: torch.Tensor, data_name: str) -> None:
    """Try every corruption of a data set at every severity on some of its images, see :func:`corrupt`.

    Raises:
        ValueError: the package cannot be imported, has none for this set, or one fails on such images.
    """
    for name in names(data_name):
        for severity in range(1, 6):
            corrupt(images[:TRIED], data_name, name, severity)


def corrupt(images: torch.Tensor, data_name: str, name: str, severity: int) -> torch.Tensor:
    """Corrupted copies of images.

    Args:
        images: uint8 ``(N, channels, height, width)``, one channel for grey sets and three for coloured ones.
        data_name: the data set, as ``pneumoniamnist`` or ``pathmnist_224``, whose parameters are used.
        name: one of its :func:`names`.
        severity: 1 to 5.

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: the images do not fit the set, or the corruption fails on them.
    """
    Image = require("PIL.Image", "Pillow")
    corruptions, colour = _design(data_name)
    if images.ndim != 4 or images.shape[1] != (3 if colour else 1):
        raise ValueError(
            f"{data_name}: {PACKAGE} takes {'coloured' if colour else 'grey'} images for this set, "
            f"got images of shape {tuple(images.shape[1:])}; use --corruptions own"
        )
    corruptor, out = corruptions[name], []
    with _seeded(corruptor, zlib.crc32(f"{name} {severity}".encode())):
        for image in images.movedim(1, -1).numpy():
            pixels = Image.fromarray(image if colour else image[..., 0]).convert("RGB")
            try:
                changed = Image.fromarray(corruptor.apply(pixels, severity - 1))
            except Exception as error:  # whatever the libraries below it raise
                raise ValueError(_failure(name, severity, image, str(error))) from error
            if changed.mode not in ("L", "RGB"):  # from other numbers than uint8, which convert would cut at 255
                raise ValueError(_failure(name, severity, image, f"it gives pixels of Pillow's mode {changed.mode}"))
            changed = changed.convert("RGB")
            pixels = np.array(changed if colour else changed.convert("L"))
            if pixels.shape[:2] != image.shape[:2]:
                raise ValueError(_failure(name, severity, image, f"it gives images of shape {pixels.shape}"))
            out.append(pixels.reshape(image.shape))
    return torch.from_numpy(np.stack(out)).movedim(-1, 1).contiguous()


def _failure(name: str, severity: int, image: np.ndarray, why: str) -> str:
    height, width = image.shape[:2]
    return (
        f"{PACKAGE}'s {name} at severity {severity} fails on images of {height}x{width} ({why}); it is made for "
        "224x224: use those, or --corruptions own"
    )


@contextlib.contextmanager
def _seeded(corruptor: Any, seed: int) -> Iterator[None]:
    """The generators that the package draws from, seeded in here and outside as if nothing had been drawn."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    corruptor.rng = np.random.default_rng(seed)  # impulse noise expects it there
    try:
        # Motion blur of version 0.1.0 decodes bytes by what NumPy 2.3 has removed.
        with mock.patch.object(np, "fromstring", np.frombuffer):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
