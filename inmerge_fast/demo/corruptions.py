"""Test images that are worse than the training images: what merging was made for."""

from __future__ import annotations

import dataclasses

import torch

from .data import ImageSet

NOISE = 1.0  # standard deviations of the training images' pixels
BLUR = 3  # side of the box whose mean replaces a pixel, twice
SEED = 0  # the same noise for all arms and seeds


def corruptions_of(data: ImageSet) -> dict[str, ImageSet]:
    """The data set with other test images: ``"noisy"`` ones and ``"blurred"`` ones."""
    x = data.test_x
    noise = torch.randn(x.shape, generator=torch.Generator("cpu").manual_seed(SEED), device="cpu").to(x.device)
    pool = torch.nn.functional.avg_pool2d if data.dims == 2 else torch.nn.functional.avg_pool3d
    blurred = x
    for _ in range(2):
        blurred = pool(blurred, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
    changed = {"noisy": x + NOISE * noise, "blurred": blurred}
    return {name: dataclasses.replace(data, test_x=images) for name, images in changed.items()}
