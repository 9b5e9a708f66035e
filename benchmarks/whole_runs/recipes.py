"""Ordinary training recipes, each a whole run of a few minutes on a CPU, and what they are trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import nets
from benchmarks.paper.data import load
from benchmarks.paper.dataset import DataSet, Split
from benchmarks.paper.imagenet import efficientnet_lite0
from inmerge_fast.demo.train import build_net

RESEED = 1_000_003  # added to the seed of the data order
EVAL_BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """A run.

    Attributes:
        name: short name.
        about: what it is, in a line.
        data: "digits", or "pneumoniamnist" for a file in MedMNIST's layout.
        side: side of the images that the network takes.
        channels: colour channels that it takes.
        net: makes the network, from classes and seed.
        optimizer: makes the optimizer, from the network.
        batch: images per step.
        steps: optimizer steps.
        start: the first one that merges.
        limit: use this many training images; None for all.
        bf16: autocast to bfloat16.
        clip: norm that gradients are clipped to; None for not at all.
    """

    name: str
    about: str
    data: str
    side: int
    channels: int
    net: Callable[[int, int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batch: int
    steps: int
    start: int
    limit: int | None = None
    bf16: bool = False
    clip: float | None = None


def _resnet18(classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nets.ResNet(nets.BasicBlock, (2, 2, 2, 2), classes, channels=1, small_images=True)
    net.pool = nn.MaxPool2d(3, stride=2, padding=1)
    return net


def _imagenet_lite0(classes: int, seed: int) -> nn.Module:
    try:
        return efficientnet_lite0(classes, seed)
    except ValueError as error:
        raise SystemExit(f"finetune: {error}") from error


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "resnet18", "ResNet-18 of full width, AdamW, weight decay 0.05, cosine, bf16, from scratch, PneumoniaMNIST",
            "pneumoniamnist", 28, 1, _resnet18,
            lambda net: torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05),
            batch=16, steps=128, start=16, limit=2048, bf16=True, clip=1.0,
        ),
        Recipe(
            "vgg8", "VGG-like net of 8 convolutions, SGD, weight decay 0.02, cosine, from scratch, PneumoniaMNIST",
            "pneumoniamnist", 28, 1, lambda classes, seed: build_net(1, classes, seed),
            lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=2e-2),
            batch=32, steps=300, start=30,
        ),
        Recipe(
            "digits", "the same net, SGD, weight decay 0.0005, cosine, from scratch, scikit-learn's digits",
            "digits", 16, 1, lambda classes, seed: build_net(1, classes, seed),
            lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4),
            batch=32, steps=400, start=40,
        ),
        Recipe(
            "finetune", "EfficientNet-Lite0 trained on ImageNet, AdamW, learning rate 0.0003, cosine, PneumoniaMNIST",
            "pneumoniamnist", 64, 3, _imagenet_lite0,
            lambda net: torch.optim.AdamW(net.parameters(), 3e-4, weight_decay=0.05),
            batch=16, steps=200, start=0, limit=2048,
        ),
    )
}  # fmt: skip


class Images:
    """A recipe's images, as its network takes them.

    Args:
        recipe: the recipe.
        path: file with PneumoniaMNIST, or None for ``pneumoniamnist.npz`` in the folder ``INMERGE_DATA``.
    """

    def __init__(self, recipe: Recipe, path: str | None) -> None:
        data = _load(recipe.data, path)
        self.classes = len(data.labels)
        sample = data.train.images.float() / 255
        self._mean, self._spread = sample.mean(), sample.std()
        self._recipe = recipe
        self.train, self.test = self._prepared(data.train, recipe.limit), self._prepared(data.test, None)

    def _prepared(self, part: Split, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = (part.images[:limit].float() / 255 - self._mean) / self._spread
        if x.shape[-1] != self._recipe.side:
            x = functional.interpolate(x, size=(self._recipe.side,) * 2, mode="bilinear")
        return x.expand(-1, self._recipe.channels, -1, -1), part.labels[:limit].long().flatten()

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of a run: whole epochs, each in another order."""
        rng = np.random.default_rng(seed)
        (x, y), batch = self.train, self._recipe.batch
        order = rng.permutation(len(x))
        for _ in range(self._recipe.steps):
            if len(order) < batch:
                order = rng.permutation(len(x))
            chosen, order = torch.from_numpy(order[:batch]), order[batch:]
            yield x[chosen], y[chosen]

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Share of the test images that the network classifies rightly; NaN if its outputs are not finite."""
        net.eval()
        x, y = self.test
        scores = torch.cat([net(part) for part in x.split(EVAL_BATCH)])
        return float((scores.argmax(1) == y).float().mean()) if scores.isfinite().all() else math.nan


@cache
def _load(name: str, path: str | None) -> DataSet:
    return load("digits" if name == "digits" else str(Path(path or "pneumoniamnist.npz")))
