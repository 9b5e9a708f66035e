"""Corrupted images in the manner of MedMNIST-C, Gaussian noise, and gradient attacks (FGSM, PGD).

MedMNIST-C (Di Salvo et al. 2024) corrupts images of 224 px with OpenCV and ImageMagick. These corruptions are its kinds
that make sense for grey and colour images of any size and for volumes, in PyTorch, with the parameters of
:data:`CORRUPTIONS`; they are *not* bit for bit MedMNIST-C's (``medmnist_c.py`` has those), and its relative metric
(against AlexNet at 224 px) is not used. A corruption is a function of the data set, its name and its severity alone:
all runs see the same images.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from inmerge_fast.demo.data import require

Corruption = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]
SEVERITIES = (1, 2, 3, 4, 5)
NOISE_SIGMAS = (0.1, 0.2, 0.3)  # of Gaussian noise on images in [0, 1], beside the corruptions
FGSM_EPSILONS = (2 / 255, 8 / 255)
PGD_EPSILON, PGD_STEPS = 2 / 255, 5
ATTACKS = {  # epsilon and steps
    **{f"fgsm {round(epsilon * 255)}/255": (epsilon, 1) for epsilon in FGSM_EPSILONS},
    f"pgd {round(PGD_EPSILON * 255)}/255": (PGD_EPSILON, PGD_STEPS),
}
ATTACKED = 256  # images that are attacked: it costs about 20 forward passes for each


def _normal(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x.shape, generator=generator)


def _gaussian_noise(x: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    return x + sigma * _normal(x, generator)


def _speckle_noise(x: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    return x * (1 + sigma * _normal(x, generator))


def _shot_noise(x: torch.Tensor, photons: float, generator: torch.Generator) -> torch.Tensor:
    return torch.poisson(x * photons, generator=generator) / photons


def _impulse_noise(x: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    chance = torch.rand(x.shape, generator=generator)
    return torch.where(chance < share / 2, 0.0, torch.where(chance > 1 - share / 2, 1.0, x))


def _gaussian_blur(x: torch.Tensor, sigma: float, _: torch.Generator) -> torch.Tensor:
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    for dim in range(2, x.ndim):
        lines = x.movedim(dim, -1)
        padded = nn.functional.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        x = nn.functional.conv1d(padded, kernel).reshape(lines.shape).movedim(-1, dim)
    return x


def _motion_blur(x: torch.Tensor, length: float, _: torch.Generator) -> torch.Tensor:
    """Mean of shifts along the last axis."""
    left = int(length) // 2
    flat = nn.functional.pad(x.reshape(-1, 1, x.shape[-1]), (left, int(length) - 1 - left), mode="replicate")
    return nn.functional.avg_pool1d(flat, int(length), 1).reshape(x.shape)


def _pixelate(x: torch.Tensor, share: float, _: torch.Generator) -> torch.Tensor:
    size = [max(1, round(side * share)) for side in x.shape[2:]]
    return nn.functional.interpolate(
        nn.functional.interpolate(x, size=size, mode="area"), size=x.shape[2:], mode="nearest"
    )


def _jpeg(x: torch.Tensor, quality: float, _: torch.Generator) -> torch.Tensor:
    """Compress every image (of a volume, every slice)."""
    Image = require("PIL.Image", "Pillow")
    slices = x.movedim(2, 1).flatten(0, 1) if x.ndim == 5 else x
    out = []
    for image in (slices * 255).round().byte().movedim(1, -1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=int(quality))
        out.append(np.array(Image.open(buffer)).reshape(image.shape))
    back = torch.from_numpy(np.stack(out)).movedim(-1, 1).float() / 255
    return back.reshape(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]).movedim(1, 2) if x.ndim == 5 else back


def _brightness(x: torch.Tensor, shift: float, _: torch.Generator) -> torch.Tensor:
    return x + shift


def _contrast(x: torch.Tensor, factor: float, _: torch.Generator) -> torch.Tensor:
    mean = x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    return mean + factor * (x - mean)


def _gamma(x: torch.Tensor, power: float, _: torch.Generator) -> torch.Tensor:
    return x**power


# The parameter of each, for severities 1 to 5, on images in [0, 1].
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.10, 0.15)),  # sigma
    "shot_noise": (_shot_noise, (250, 120, 60, 30, 15)),  # photons at full brightness
    "speckle_noise": (_speckle_noise, (0.10, 0.15, 0.20, 0.30, 0.40)),  # sigma, relative to the pixel
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.04, 0.07, 0.10)),  # share of pixels
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.8, 1.0, 1.4)),  # sigma in pixels
    "motion_blur": (_motion_blur, (2, 3, 4, 5, 7)),  # length in pixels; even ones shift by half of one
    "pixelate": (_pixelate, (0.9, 0.75, 0.6, 0.5, 0.4)),  # share of the side that is left
    "jpeg": (_jpeg, (60, 40, 25, 15, 10)),  # Pillow's quality
    "brightness_up": (_brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "brightness_down": (_brightness, (-0.05, -0.10, -0.15, -0.20, -0.30)),
    "contrast_up": (_contrast, (1.2, 1.4, 1.7, 2.0, 2.5)),  # factor around the image's mean
    "contrast_down": (_contrast, (0.8, 0.7, 0.6, 0.5, 0.35)),
    "gamma": (_gamma, (1.2, 1.4, 1.7, 2.0, 2.5)),  # power
}


def corrupt(images: torch.Tensor, name: str, severity: int) -> torch.Tensor:
    """Corrupted copies of images.

    Args:
        images: uint8 ``(N, channels, [depth,] height, width)``.
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 to 5.

    Returns:
        uint8, of the same shape: what is saved as an image has 8 bits.
    """
    function, parameters = CORRUPTIONS[name]
    return _apply(function, images, parameters[severity - 1], name)


def add_noise(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Copies of uint8 images with Gaussian noise of standard deviation ``sigma`` (1 is the range of a pixel)."""
    return _apply(_gaussian_noise, images, sigma, "noise")


def _apply(function: Corruption, images: torch.Tensor, parameter: float, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {parameter:g}".encode()))
    chunks = []
    for chunk in images.split(512):  # float copies of a large set would not fit in memory
        out = function(chunk.float() / 255, parameter, generator)
        chunks.append((out.clamp(0, 1) * 255).round().byte())
    return torch.cat(chunks)


def attack(
    loss_of: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, epsilon: float, steps: int
) -> torch.Tensor:
    """Images within ``epsilon`` of ``x`` (maximum norm) whose loss is higher: FGSM with one step, PGD with more.

    FGSM (Goodfellow et al. 2015) goes ``epsilon`` along the sign of the gradient. PGD (Madry et al. 2018), here without
    a random start, makes steps of ``2.5 epsilon / steps`` and stays within ``epsilon``.

    Args:
        loss_of: loss of images ``(n, channels, ...)`` in [0, 1], summed or averaged.
        x: such images, float32.
        epsilon: largest change of a pixel.
        steps: gradient steps.
    """
    size = epsilon if steps == 1 else 2.5 * epsilon / steps
    changed = x.clone()
    for _ in range(steps):
        changed.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(changed), changed)
        changed = changed.detach() + size * gradient.sign()
        changed = x + (changed - x).clamp(-epsilon, epsilon)
        changed = changed.clamp(0, 1)
    return changed
