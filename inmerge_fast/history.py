"""What the calls of ``merge_`` do to one plan in the course of time, and warnings of what they should not do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from .effect import OnItsWay, callers_level
from .paths.path import Call
from .plan.candidates import MergeLayer
from .rank_cost import CURE, LayerLedger, RankCost, describe_collapse
from .stats import CollapseWarning

COLLAPSE = 0.1  # share of a layer's effective rank that merging may cost before it is called a collapse
FIRST_LOOK = 16  # calls; the next look comes after twice as many, and from then on
LOOK_EVERY = 64


class CallHistory:
    """Warns once of each layer whose merging has cost too much, and once of steps that go back.

    Every 64 calls the merges of each layer are counted, without waiting. The loss is measured
    (:class:`inmerge_fast.rank_cost.RankCost`, which does wait) where an eighth of a layer's filters have merged since
    the last time: where nothing merges nothing is measured.

    Attributes:
        next_look: calls after which there is something to look at.
    """

    def __init__(self) -> None:
        self.next_look = FIRST_LOOK
        self._ledgers: dict[str, LayerLedger] = {}
        self._collapsed: set[str] = set()
        self._merged: OnItsWay | None = None
        self._latest: tuple[int, int] | None = None  # seed and step
        self._has_gone_back = False

    def notice_draw(self, seed: int, step: int) -> None:
        """Take in seed and step of a call that may write; warns if the steps go back.

        The draws of an epoch would be repeated in every other one.
        """
        latest, self._latest = self._latest, (seed, step)
        if latest is None or step >= latest[1] or latest[0] != seed or self._has_gone_back:
            return
        self._has_gone_back = True
        warnings.warn(
            f"step goes back from {latest[1]} to {step} with the same seed, {seed}: the same filters look at the same "
            "partners again. Count the optimizer steps of the whole run, not those of each epoch anew",
            UserWarning,
            stacklevel=callers_level(),
        )

    def look(
        self,
        layers: Sequence[MergeLayer],
        weights: Sequence[torch.Tensor],
        call: Call,
        calls: int,
        totals: Callable[[], torch.Tensor],
    ) -> None:
        """Look at what has been merged, after a call that may write; warns of layers where it was too much.

        Args:
            layers: the layers of the plan.
            weights: their weights.
            call: the call.
            calls: how many there were.
            totals: gives what was sampled and merged in each layer by all of them, int64 ``(layers, 2)``.
        """
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph would take the copy along
        if self._merged is None:
            self._merged = OnItsWay(totals())
        if not self._merged.has_arrived():
            return
        merged, self._merged = self._merged.read()[:, 1].tolist(), None
        self.next_look = calls + min(calls, LOOK_EVERY)
        thresholds = call.threshold_of_each(len(layers))
        for layer, weight, count, threshold in zip(layers, weights, merged, thresholds, strict=True):
            name, filters = layer.name, layer.layout.filters
            ledger = self._ledgers.setdefault(name, LayerLedger(filters, 0.0, 0.0, 0, 0))
            if name in self._collapsed or not ledger.is_due(count):
                continue
            cost = RankCost(weight, layer.layout, 1_000_003 * calls + layer.layer_id)
            ledger.charge(cost, count, threshold, call.partner, call.alpha)
            if ledger.lost > COLLAPSE:
                self._collapsed.add(name)
                message = f"{describe_collapse(name, ledger)} (seen after {calls} calls of merge_); {CURE}"
                warnings.warn(message, CollapseWarning, stacklevel=callers_level())
