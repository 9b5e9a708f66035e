"""What the calls of ``merge_`` do to one plan in the course of time, and warnings of what they should not do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from .effect import OnItsWay, callers_level, page_locked
from .paths.path import Call
from .plan.candidates import MergeLayer
from .rank_cost import CURE, LayerLedger, RankCost, Snapshot, describe_collapse, finished, in_background, may_defer
from .stats import CollapseWarning

COLLAPSE = 0.1  # share of a layer's effective rank that merging may cost before it is called a collapse
FIRST_LOOK = 16  # calls; the next look comes after twice as many, and from then on
LOOK_EVERY = 64


@dataclass
class _Measurement:
    """What merging has cost a layer, from its filters at some call on."""

    name: str
    snapshot: Snapshot
    work: Callable[[], LayerLedger]
    found: Future[LayerLedger] | None = None

    def is_done(self) -> bool:
        """Whether it has been worked out; begins with it as soon as the filters are on the host."""
        if self.found is None and self.snapshot.has_arrived():
            self.found = in_background(self.work)
        return self.found is not None and self.found.done()

    def result(self) -> LayerLedger:
        """What was found."""
        assert self.found is not None
        return self.found.result()


class CallHistory:
    """Warns once of each layer whose merging has cost too much, and once of steps that go back.

    Every 64 calls the merges of each layer are counted. The loss is measured
    (:class:`inmerge_fast.rank_cost.RankCost`) where an eighth of a layer's filters have merged since the last time:
    where nothing merges nothing is measured. No call waits for an accelerator: the filters are copied to the host in
    the order of the stream, a thread works out what was lost, and a later call says it.

    Page-locked memory comes before that: for the counts at the first call, for filters when their layer is first
    measured. The driver may wait for the device then, once.

    Attributes:
        next_look: calls after which there is something to look at.
    """

    def __init__(self) -> None:
        self.next_look = 1
        self._host: torch.Tensor | None = None
        self._ledgers: dict[str, LayerLedger] = {}
        self._collapsed: set[str] = set()
        self._merged: OnItsWay | None = None
        self._measuring: list[_Measurement] = []
        self._counted_after = 0  # calls
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
            return  # a graph would take the copies along
        if self._host is None:
            where = totals()
            self._host, self.next_look = page_locked(where.shape, where.dtype, where.is_cuda), FIRST_LOOK
        if calls < self.next_look:
            return
        if not self._measuring:
            if self._merged is None:
                self._merged, self._counted_after = OnItsWay(totals(), self._host), calls
            if not self._merged.has_arrived():
                return
            merged, self._merged = self._merged.read()[:, 1].tolist(), None
            self._begin(layers, weights, merged, call)
        done = [measurement.is_done() for measurement in self._measuring]  # of all: the work of each begins here
        if all(done):
            self.next_look = self._counted_after + min(self._counted_after, LOOK_EVERY)
            self._take_in(calls)

    def _begin(
        self,
        layers: Sequence[MergeLayer],
        weights: Sequence[torch.Tensor],
        merged: Sequence[int],
        call: Call,
    ) -> None:
        """Begin to measure where that is due."""
        thresholds = call.threshold_of_each(len(layers))
        for layer, weight, count, threshold in zip(layers, weights, merged, thresholds, strict=True):
            name, filters = layer.name, layer.layout.filters
            ledger = self._ledgers.setdefault(name, LayerLedger(filters, 0.0, 0.0, 0, 0))
            if name in self._collapsed or not ledger.is_due(count):
                continue
            snapshot, key = Snapshot(weight, layer.layout), 1_000_003 * self._counted_after + layer.layer_id
            work = functools.partial(_charged, ledger, snapshot, key, count, threshold, call.partner, call.alpha)
            found = None if may_defer(weight.device) else finished(work())
            self._measuring.append(_Measurement(name, snapshot, work, found))

    def _take_in(self, calls: int) -> None:
        measured, self._measuring = self._measuring, []
        for measurement in measured:
            name, ledger = measurement.name, measurement.result()
            self._ledgers[name] = ledger
            if ledger.lost > COLLAPSE:
                self._collapsed.add(name)
                message = f"{describe_collapse(name, ledger)} (seen after {calls} calls of merge_); {CURE}"
                warnings.warn(message, CollapseWarning, stacklevel=callers_level())


def _charged(ledger: LayerLedger, snapshot: Snapshot, key: int, *charge: Any) -> LayerLedger:
    return ledger.charged(RankCost(snapshot, key), *charge)
