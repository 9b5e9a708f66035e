"""The filters of all layers of a plan as one sequence of rows, which is how paths draw, measure and count."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..draw import draw_filters
from .candidates import MergeLayer


class Rows:
    """The filters of some layers, layer after layer.

    Args:
        layers: the layers, all on one device.
        device: that device, which must be given where there is no layer.

    Attributes:
        layers: the layers.
        device: device of all the weights.
        start: int64 ``(layers + 1,)``, the first row of each layer, and the number of rows.
        moves: how often weights were found elsewhere in memory than before. Who keeps addresses looks whether it has
            changed.
    """

    def __init__(self, layers: Sequence[MergeLayer], device: torch.device | None = None) -> None:
        self.layers = tuple(layers)
        self.moves = 0
        self.device = layers[0].device if device is None else device
        sizes = np.array([layer.layout.filters for layer in layers], np.int64)
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        self._filter = np.arange(self.start[-1]) - np.repeat(self.start[:-1], sizes)
        self._layer_id = np.repeat(np.array([layer.layer_id for layer in layers], np.int64), sizes)
        self._group_size = np.repeat(np.array([layer.layout.group_size for layer in layers], np.int64), sizes)

    def of_layers(self) -> list[slice]:
        """The rows of each layer."""
        return [slice(start, end) for start, end in itertools.pairwise(self.start.tolist())]

    def draw(self, seed: int, step: int, prob: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Coins and partners (indices within the layer) of all filters: ``(rows,)`` each."""
        return draw_filters(seed, step, self._layer_id, self._filter, self._group_size, prob)
