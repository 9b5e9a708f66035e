"""Thresholds that follow the layer, beside the paper's fixed one.

In most deep layers no two filters are as similar as the paper's 0.3: the cosine of two random filters of D elements
has a standard deviation of ``1 / sqrt(D)``, which is 0.015 at D = 4608. So a threshold is better given in those units
(:class:`NoiseThreshold`), or as the share of a layer's pairs that shall be above it (:class:`QuantileThreshold`).
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from ..merge import check_share

NEVER = 2.0  # above every similarity: the layer is measured and never merged


@dataclass(frozen=True)
class NoiseThreshold:
    """``z / sqrt(D)`` for a layer whose filters have D elements: ``z`` standard deviations of random filters.

    In trials on ordinarily trained nets almost nothing was above z = 5; at 2 to 3 filters drifted together slowly;
    below 2 every merge made the next one likelier, until the filters of a layer were all alike.

    Attributes:
        z: number of standard deviations. The threshold is limited to [-1, 1].
    """

    z: float

    def __post_init__(self) -> None:
        if isinstance(self.z, bool) or not isinstance(self.z, numbers.Real):
            raise TypeError(f"z must be a number, got {self.z!r}")
        if not math.isfinite(self.z):
            raise ValueError(f"z must be finite, got {self.z!r}")

    def of(self, elements: int) -> float:
        """The threshold of a layer with ``elements`` elements per filter."""
        return min(max(float(self.z) / math.sqrt(elements), -1.0), 1.0)


@dataclass(frozen=True)
class QuantileThreshold:
    """The similarity that a share ``rate`` of the sampled filters of a layer exceed, taken from its own pairs.

    Every ``every`` steps all pairs of every layer are compared (a matrix product per layer, and the host waits for it);
    with probability p about ``p * rate`` of a layer's filters are then merged per step. The thresholds are rounded up
    to a multiple of 1e-4.

    Attributes:
        rate: wanted share of the sampled filters, in [0, 1].
        every: optimizer steps after which the thresholds are computed anew.
    """

    rate: float
    every: int = 100

    def __post_init__(self) -> None:
        check_share("rate", self.rate)
        if isinstance(self.every, bool) or not isinstance(self.every, numbers.Integral):
            raise TypeError(f"every must be an int, got {self.every!r}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
