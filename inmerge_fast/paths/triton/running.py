"""What the calls of a plan have done so far, all together, in device memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels import tables


class Running:
    """Counts that the kernels add to in every call that may write, replays of CUDA graphs included.

    Args:
        row_layer: int32 ``(rows,)``, the layer of each row.
        layers: number of layers.
        zeros: makes a tensor of zeros on the device, int32 unless told otherwise.

    Attributes:
        times: int32 ``(rows, ROW_COUNTS)``: how often each row was sampled, and how often it passed. A row is sampled
            once per call, so they overflow after 2**31 calls.
        largest: int32 ``(1,)``, the largest similarity as an integer that sorts like it (``kernels/merge.py``).
    """

    def __init__(self, row_layer: torch.Tensor, layers: int, zeros: Callable[..., torch.Tensor]) -> None:
        self._row_layer, self._layers = row_layer, layers
        self.times = zeros(len(row_layer), tables.ROW_COUNTS.value)
        self.largest = zeros(1)
        self.reset()

    def reset(self) -> None:
        """Forget all calls."""
        self.times.zero_()
        self.largest.fill_(-(2**31))

    def by_layer(self) -> torch.Tensor:
        """Pairs sampled and passed in each layer, int64 ``(layers, 2)`` on the device; nothing waits."""
        times = self.times.long()
        return times.new_zeros(self._layers, tables.ROW_COUNTS.value).index_add_(0, self._row_layer, times)
