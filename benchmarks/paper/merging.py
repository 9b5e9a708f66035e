"""What an arm does in training, which is called before its forward passes, and what it counts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

import inmerge_fast
from inmerge_fast import InMerge, MergePlan, MergeStats

from .config import Arm, Merging
from .controls import OtherWeights, dropconnect, dropout2d, noise_like_merging

VALIDATION_STEPS = 2**40  # counters of merges in validation start here, far from those of training


class Treatment:
    """What an arm does to a network while it trains; this one does nothing by itself.

    Attributes:
        each_forward: to be called before every forward pass, not once per optimizer step.
        in_validation: :meth:`validate` is to be called before every forward pass of a validation.
        calls: training steps so far.
        undo: what :meth:`detach` undoes.
    """

    def __init__(self) -> None:
        self.each_forward = self.in_validation = False
        self.calls = 0
        self.undo = contextlib.ExitStack()

    def __call__(self, counter: int) -> MergeStats | None:
        """Before a training step's forward pass."""
        self.calls += 1
        return None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of a training with this optimizer."""

    def detach(self) -> None:
        """After the last: nothing is left of it but what the network has learnt."""
        self.undo.close()

    def validate(self) -> None:
        """Before a validation's forward pass."""

    @property
    def merged(self) -> int:
        """Filters rewritten so far."""
        return 0

    def summary(self) -> dict[str, Any] | None:
        """Counts for a result file; None for what does not merge."""
        return None


class Changed(Treatment):
    """A control that trains at other weights."""

    def __init__(self, weights: OtherWeights) -> None:
        super().__init__()
        self._weights = weights
        self.undo.callback(weights.restore)

    def __call__(self, counter: int) -> None:
        """Change the weights for a step's passes."""
        super().__call__(counter)
        self._weights.begin(counter)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore before each of its steps."""
        self.undo.callback(self._weights.attach(optimizer))


class Merger(Treatment):
    """Merges a network with :class:`inmerge_fast.InMerge` in the way of a setting, and counts what happens.

    Args:
        net: the network of the arm, in training mode whenever it is merged.
        setting: how to merge.
        seed: seed of the draws.
        first: number of the arm's first merge, in the draw.
        steps: merges that the arm could make, for what changes on the way.
    """

    def __init__(self, net: nn.Module, setting: Merging, seed: int, first: int, steps: int) -> None:
        super().__init__()
        self.each_forward, self.in_validation = setting.each_forward, setting.in_validation
        prob = setting.prob
        self._merge = InMerge(
            net,
            alpha=setting.alpha,
            prob=inmerge_fast.cosine(prob, 0.0, begin=first, end=first + steps) if setting.decay else prob,
            threshold=setting.limit(),
            partner=setting.partner,
            skip_first=setting.skip_first,
            include_linear=setting.include_linear,
            start=first + round(setting.start * steps),
            stop=None if setting.budget is None else first + steps,
            seed=seed,
            guard=None,  # an arm that collapses is a finding; every result counts it
            lasting=setting.lasting,
        )
        self._validations = 0
        self._sampled = dict.fromkeys(self._merge.plan.names, 0)
        self._merged = dict.fromkeys(self._merge.plan.names, 0)

    def __call__(self, counter: int) -> MergeStats | None:
        """Merge before a training step's forward pass."""
        super().__call__(counter)
        return self._step(counter)

    def validate(self) -> None:
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


class ForwardMerger(Merger):
    """Merges for the forward and backward pass of each step, as ``InMerge(lasting=False)`` does in any training."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let it merge by itself from now on."""
        self._merge.attach(optimizer)
        self.undo.callback(self._merge.detach)

    def _step(self, counter: int) -> MergeStats | None:
        self._merge.step_count = counter
        return None

    def summary(self) -> dict[str, Any]:
        """As for merging that lasts."""
        for layer in self._merge.summary().layers:
            self._sampled[layer.name], self._merged[layer.name] = layer.sampled, layer.merged
        return super().summary()


def treatment(net: nn.Module, arm: Arm, seed: int, first: int, steps: int) -> Treatment | None:
    """What an arm does to its network in training; None for a baseline.

    Args:
        net: the network.
        arm: the arm.
        seed: seed of the draws.
        first: number of the arm's first merge, in the draw.
        steps: merges that the arm could make.

    Raises:
        ValueError: the arm asks for what cannot go together.
    """
    setting = arm.merging
    if setting is not None and not setting.lasting and (setting.each_forward or setting.in_validation or setting.decay):
        raise ValueError(f"merging for the forward pass alone is once per step, at the same p: {arm.label()}")
    if setting is not None and setting.as_noise and (setting.lasting or arm.dropconnect):
        raise ValueError(f"noise instead of merging is for the forward pass alone, and by itself: {arm.label()}")
    if setting is not None and arm.dropconnect:
        raise ValueError(f"DropConnect is a control of merging, not for use with it: {arm.label()}")
    out: Treatment
    plan = MergePlan(net, skip_first=0.0 if setting is None else setting.skip_first)
    if setting is not None and setting.as_noise:
        out = Changed(OtherWeights(plan, noise_like_merging(plan, setting, seed)))
    elif setting is not None:
        out = (Merger if setting.lasting else ForwardMerger)(net, setting, seed, first, steps)
    elif arm.dropconnect:
        out = Changed(OtherWeights(plan, dropconnect(arm.dropconnect, seed)))
    elif arm.dropout:
        out = Treatment()
    else:
        return None
    if arm.dropout:
        out.undo.callback(dropout2d(net, plan, arm.dropout))
    return out
