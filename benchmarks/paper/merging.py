"""What an arm calls before its forward passes, and what it counts."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from inmerge_fast import MergePlan, MergeStats, merge_

from .config import Merging

VALIDATION_STEPS = 2**40  # counters of merges in validation start here, far from those of training


class Merger:
    """Merges a network in the way of a setting and counts what happens.

    Args:
        net: the network of the arm.
        setting: how to merge.
        seed: seed of the draws.
        steps: steps of the arm, for what changes on the way.
    """

    def __init__(self, net: nn.Module, setting: Merging, seed: int, steps: int) -> None:
        self.setting = setting
        self._seed, self._steps = seed, steps
        self._plan = MergePlan(net, skip_first=setting.skip_first, include_linear=setting.include_linear)
        self._targets: list[tuple[MergePlan, float]] = [(self._plan, setting.threshold)]
        if setting.z is not None:
            # Layer by layer, with the ids that the layers have in the model's plan: the draws are the same.
            self._targets = [
                (
                    MergePlan(net.get_submodule(planned.name), layer=planned.layer_id),
                    min(1.0, setting.z / math.sqrt(planned.layout.elements)),
                )
                for planned in self._plan.layers
            ]
        self.calls = self._validations = 0
        self._sampled = dict.fromkeys(self._plan.names, 0)
        self._merged = dict.fromkeys(self._plan.names, 0)

    def __call__(self, counter: int) -> MergeStats | None:
        """Merge before a training step's forward pass."""
        progress = self.calls / self._steps
        self.calls += 1
        if progress < self.setting.start:
            return None
        prob = self.setting.prob * (0.5 * (1 + math.cos(math.pi * progress)) if self.setting.decay else 1.0)
        return self._merge(prob, counter)

    def in_validation(self) -> None:
        """Merge before a validation's forward pass."""
        self._merge(self.setting.prob, VALIDATION_STEPS + self._validations)
        self._validations += 1

    def _merge(self, prob: float, counter: int) -> MergeStats | None:
        stats = None
        for (plan, threshold), layers in zip(self._targets, self._names(), strict=True):
            stats = merge_(
                plan, alpha=self.setting.alpha, prob=prob, threshold=threshold, partner=self.setting.partner,
                seed=self._seed, step=counter,
            )  # fmt: skip
            for name, layer in zip(layers, stats.layers, strict=True):
                self._sampled[name] += layer.sampled
                self._merged[name] += layer.merged
        return stats

    def _names(self) -> list[list[str]]:
        names = list(self._plan.names)
        return [names] if len(self._targets) == 1 and self.setting.z is None else [[name] for name in names]

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
