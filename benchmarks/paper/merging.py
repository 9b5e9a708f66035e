"""What an arm calls before its forward passes, and what it counts."""

from __future__ import annotations

from typing import Any

from torch import nn

import inmerge_fast
from inmerge_fast import InMerge, MergeStats, NoiseThreshold

from .config import Merging

VALIDATION_STEPS = 2**40  # counters of merges in validation start here, far from those of training


class Merger:
    """Merges a network with :class:`inmerge_fast.InMerge` in the way of a setting, and counts what happens.

    Args:
        net: the network of the arm, in training mode whenever it is merged.
        setting: how to merge.
        seed: seed of the draws.
        first: number of the arm's first merge, in the draw.
        steps: merges that the arm could make, for what changes on the way.
    """

    def __init__(self, net: nn.Module, setting: Merging, seed: int, first: int, steps: int) -> None:
        self.setting = setting
        prob = setting.prob
        self._merge = InMerge(
            net,
            alpha=setting.alpha,
            prob=inmerge_fast.cosine(prob, 0.0, begin=first, end=first + steps) if setting.decay else prob,
            threshold=setting.threshold if setting.z is None else NoiseThreshold(setting.z),
            partner=setting.partner,
            skip_first=setting.skip_first,
            include_linear=setting.include_linear,
            start=first + round(setting.start * steps),
            seed=seed,
            guard=None,  # an arm that collapses is a finding; every result counts it
        )
        self.calls = self._validations = 0
        self._sampled = dict.fromkeys(self._merge.plan.names, 0)
        self._merged = dict.fromkeys(self._merge.plan.names, 0)

    def __call__(self, counter: int) -> MergeStats | None:
        """Merge before a training step's forward pass."""
        self.calls += 1
        return self._step(counter)

    def in_validation(self) -> None:
        """Merge before a validation's forward pass."""
        self._step(VALIDATION_STEPS + self._validations)
        self._validations += 1

    def _step(self, counter: int) -> MergeStats | None:
        self._merge.step_count = counter
        stats = self._merge.step()
        for layer in stats.layers if stats is not None else ():
            self._sampled[layer.name] += layer.sampled
            self._merged[layer.name] += layer.merged
        return stats

    @property
    def merged(self) -> int:
        """Filters rewritten so far."""
        return sum(self._merged.values())

    def summary(self) -> dict[str, Any]:
        """Counts for a result file; ``per_step`` is filters merged per training step, validation included."""
        sampled = sum(self._sampled.values())
        return {
            "steps": self.calls,
            "validation_steps": self._validations,
            "per_step": self.merged / max(1, self.calls),
            "passed": self.merged / sampled if sampled else 0.0,
            "merged_by_layer": self._merged,
            "sampled_by_layer": self._sampled,
        }
