"""Watches for layers that merge into one filter, and can stop merging them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..merge import check_share
from ..stats import LayerStats

ACTIONS = ("warn", "stop")


class CollapseWarning(UserWarning):
    """The filters of a layer are becoming alike."""


@dataclass
class _Window:
    """What has been seen of a layer since it was judged last."""

    sampled: int = 0
    passed: int = 0
    measured: int = 0
    similarity: float = 0.0


@dataclass
class CollapseGuard:
    """Judges each layer by its sampled pairs, and warns once per layer that runs away.

    Merging makes filters more alike, and alike filters merge more often: below a threshold of about ``2 / sqrt(D)``
    that does not end before all filters of the layer are the same. A layer is judged by every ``pairs`` pairs or more
    that were sampled at the observed steps, so that small layers are not judged by a handful.

    Attributes:
        mean_similarity: mean sampled similarity above which a layer counts as collapsing, in [-1, 1].
        merge_rate: share of the sampled filters that merged, above which it does too, in [0, 1]; 1 never does.
        pairs: sampled pairs that a judgement needs.
        action: ``"warn"`` (:class:`CollapseWarning`, once per layer), or ``"stop"``, which also merges the layer no
            more.
    """

    mean_similarity: float = 0.5
    merge_rate: float = 0.5
    pairs: int = 100
    action: str = "warn"
    _windows: dict[str, _Window] = field(default_factory=dict, repr=False)
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        check_share("mean_similarity", self.mean_similarity, low=-1.0)
        check_share("merge_rate", self.merge_rate)
        if isinstance(self.pairs, bool) or not isinstance(self.pairs, int):
            raise TypeError(f"pairs must be an int, got {self.pairs!r}")
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {ACTIONS}, got {self.action!r}")

    def judge(self, step: int, layers: Sequence[LayerStats]) -> list[str]:
        """Take in what was observed at ``step``; returns the names of layers that must not be merged any more."""
        stop = []
        for layer in layers:
            window = self._windows.setdefault(layer.name, _Window())
            window.sampled += layer.sampled
            window.passed += layer.passed
            if not math.isnan(layer.mean_similarity):
                window.measured += layer.sampled
                window.similarity += layer.mean_similarity * layer.sampled
            if window.sampled < self.pairs:
                continue
            del self._windows[layer.name]
            mean = window.similarity / window.measured if window.measured else 0.0
            rate = window.passed / window.sampled
            if mean <= self.mean_similarity and rate <= self.merge_rate:
                continue
            if self.action == "stop":
                stop.append(layer.name)
            if layer.name not in self._warned:
                self._warned.add(layer.name)
                warnings.warn(self._message(layer.name, step, mean, rate, window.sampled), CollapseWarning, 2)
        return stop

    def _message(self, name: str, step: int, mean: float, rate: float, pairs: int) -> str:
        what = "it is merged no more" if self.action == "stop" else 'CollapseGuard(action="stop") would leave it alone'
        return (
            f"layer {name} is collapsing (seen at step {step}, over {pairs} sampled pairs): mean similarity {mean:.3f} "
            f"(limit {self.mean_similarity:g}), {100 * rate:.0f} % of the sampled filters merged "
            f"(limit {100 * self.merge_rate:.0f} %); {what}; a higher threshold or a lower prob prevents it"
        )

    def state_dict(self) -> dict[str, Any]:
        """What the guard has seen, as plain data."""
        return {
            "windows": {name: vars(window).copy() for name, window in self._windows.items()},
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._windows = {name: _Window(**window) for name, window in state["windows"].items()}
        self._warned = set(state["warned"])
