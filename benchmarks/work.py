"""What is timed: real networks, single layers, series that grow in one direction, and the bytes a draw must move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import inmerge_fast
from benchmarks import nets, nets_mobile

NETS: dict[str, Callable[[], nn.Module]] = {
    "VGG19": nets.vgg19,
    "ResNet-18": nets.resnet18,
    "ResNet-50": nets.resnet50,
    "DenseNet-121": nets.densenet121,
    "EfficientNet-B0": nets_mobile.efficientnet_b0,
    "ConvNeXt-T": nets_mobile.convnext_tiny,
    "3D ResNet-18": nets.r3d_18,
}
SKIP_FIRST = 10  # the paper's choice: convolutions of a network that are left alone
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REGIMES = {"all pass": -1.0, "none passes": 1.0}  # thresholds
SEED = 0


@dataclass(frozen=True)
class Settings:
    """Arguments of a merge, and whether it is undone again."""

    threshold: float
    prob: float = 0.3
    alpha: float = 0.8
    restores: bool = False


@dataclass(frozen=True)
class Layers:
    """A point of a scaling series: ``layers`` equal layers of ``filters`` filters with ``elements`` elements each."""

    series: str
    value: float
    filters: int
    elements: int
    layers: int = 1
    prob: float = 0.3
    dtype: str = "float32"

    def weights(self, device: torch.device) -> list[torch.Tensor]:
        """Random weights of these shapes."""
        shape = (self.filters, self.elements)
        return [torch.randn(shape, device=device).to(DTYPES[self.dtype]) for _ in range(self.layers)]


SINGLE_LAYERS = {  # by its number of elements
    "conv 64x64x3x3": (64, 576),
    "conv 2048x512x1x1": (2048, 512),
    "conv 512x512x3x3": (512, 4608),
    "conv 512x512x3x3x3": (512, 13824),
}


def net_of(
    name: str, dtype: str, device: torch.device, skip_first: int = SKIP_FIRST
) -> tuple[nn.Module, inmerge_fast.MergePlan]:
    """A network with random weights on a device, and the plan of the layers that are merged."""
    torch.manual_seed(0)
    with torch.device(device):
        model = NETS[name]().to(DTYPES[dtype])
    return model, inmerge_fast.MergePlan(model, skip_first=skip_first)


def scaling_series() -> list[Layers]:
    """All points of all series; each grows the bytes in one direction from a layer in the middle."""
    return [
        *(Layers("filters", n, n, 1152) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096)),
        *(Layers("elements", d, 512, d) for d in (64, 256, 576, 1152, 2304, 4608, 9216, 16384)),
        *(Layers("layers", count, 128, 1152, layers=count) for count in (1, 2, 4, 8, 16, 32, 64, 128)),
        *(Layers("prob", prob, 512, 4608, prob=prob) for prob in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)),
        *(
            Layers("single layer", filters * elements, filters, elements, dtype=dtype)
            for filters, elements in SINGLE_LAYERS.values()
            for dtype in DTYPES
        ),
    ]


def bytes_of_draw(plan: inmerge_fast.MergePlan, step: int, prob: float, *, writes: bool, restores: bool = False) -> int:
    """Bytes that one call must move: every filter that is sampled or read as a partner once, in.

    And every sampled filter once, out, if all of them merge (``writes``). If that is undone again (``restores``), each
    of those three times more: out to where it is kept, and later in from there and out to its place. Of S bytes in the
    layers that is S (1 - (1 - p) e^-p) + 4 p S on average, 2.7 S at p = 0.5.
    """
    coins, partners = plan.draw(SEED, step, prob)
    moved = 0
    for layer, start, end in zip(plan.layers, plan.rows.start, plan.rows.start[1:], strict=False):
        coin, partner = coins[start:end], partners[start:end]
        read = np.union1d(coin.nonzero()[0], partner[coin]).size
        written = int(coin.sum()) * (4 if restores else 1) if writes else 0
        moved += (read + written) * layer.layout.elements * layer.dtype.itemsize
    return moved


def mean_bytes(plan: inmerge_fast.MergePlan, steps: Iterable[int], settings: Settings) -> float:
    """Mean of :func:`bytes_of_draw` over the steps that were timed, where all pass or none does."""
    writes = settings.threshold == REGIMES["all pass"]
    restores = settings.restores
    every = [bytes_of_draw(plan, step, settings.prob, writes=writes, restores=restores) for step in steps]
    return float(np.mean(every))
