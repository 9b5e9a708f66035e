"""What merging will do to each layer (:func:`preview`), and what it has done (:func:`summarise`)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..effect import has_no_effect
from ..layer_similarity import summarise_layer
from ..rank_cost import NEVER, RankCost, Snapshot
from ..stats import describe_skipped
from .guard import CollapseGuard
from .run import MergeRun

NO_EFFECT, ACTIVE, COLLAPSING = "no effect", "active", "collapsing"


@dataclass(frozen=True)
class LayerSummary:
    """What merging did to one layer over a run.

    Attributes:
        name: qualified name of the layer.
        filters: number of filters N.
        sampled: pairs looked at, over all steps.
        merged: filters rewritten, over all steps.
        rank_start: effective rank at the first step that merged, of at most 2,048 filters; NaN if it was not measured
            (nothing has merged yet, or the run has no guard).
        rank_end: effective rank now. It also moves where nothing merges: training raises and lowers it.
        lost: share of the effective rank that merging has cost, an estimate; NaN if it was not measured.
        verdict: ``"no effect"`` where less than one of 10,000 sampled pairs merged, ``"collapsing"`` where the loss is
            above the guard's limit (10 % without one), else ``"active"``.
        stopped: whether the guard has stopped it.
    """

    name: str
    filters: int
    sampled: int
    merged: int
    rank_start: float
    rank_end: float
    lost: float
    verdict: str
    stopped: bool


class RunSummary:
    """What merging has done so far, by layer; printable.

    Attributes:
        layers: the layers of the plan, in its order.
        steps: optimizer steps so far.
        skipped: ``(name, reason)`` of every other candidate layer.
        left: pairs sampled and merged in layers that were merged before and are not in the plan now (frozen ones).
        lasting: whether merges stayed in the weights; if not, they have cost no rank, and nothing of that is printed.
    """

    def __init__(
        self,
        layers: Sequence[LayerSummary],
        steps: int,
        skipped: Sequence[tuple[str, str]],
        left: Mapping[str, tuple[int, int]],
        lasting: bool = True,
    ) -> None:
        self.layers, self.steps, self.skipped, self.left = tuple(layers), steps, tuple(skipped), dict(left)
        self.lasting = lasting

    @property
    def sampled(self) -> int:
        """Pairs looked at, all layers together."""
        return sum(layer.sampled for layer in self.layers) + sum(sampled for sampled, _ in self.left.values())

    @property
    def merged(self) -> int:
        """Filters rewritten, all layers together."""
        return sum(layer.merged for layer in self.layers) + sum(merged for _, merged in self.left.values())

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer, with the attributes of :class:`LayerSummary`."""
        return [asdict(layer) for layer in self.layers]

    def to_csv(self, path: str) -> None:
        """Write the rows to a CSV file, a number that there is not as ``nan``."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(LayerSummary)])
            writer.writeheader()
            writer.writerows(self.rows())

    def __str__(self) -> str:
        width = max(map(len, ["layer", *(s.name for s in self.layers)]))
        costs = "rank, start to now  lost by merging" if self.lasting else "rank now"
        lines = [
            f"{self.steps} optimizer steps: {self.merged:,} merges in {self.sampled:,} sampled pairs"
            + ("" if self.lasting else ", each for the passes of one step: nothing of them is in the weights"),
            f"{'layer':{width}}  filters     sampled      merged  per filter  {costs}  verdict",
        ]
        for s in self.layers:
            lost = "        -" if math.isnan(s.lost) else f"{100 * s.lost:7.1f} %"
            cost = f"{s.rank_start:7.1f} to {s.rank_end:7.1f}  {lost:>15}" if self.lasting else f"{s.rank_end:8.1f}"
            stopped = ", stopped" if s.stopped else ""
            lines.append(
                f"{s.name:{width}}  {s.filters:7d}  {s.sampled:10,d}  {s.merged:10,d}  {s.merged / s.filters:10.2f}  "
                f"{cost}  {s.verdict}{stopped}"
            )
        lines += [f"{name}, merged before: {merged:,} of {sampled:,}" for name, (sampled, merged) in self.left.items()]
        return "\n".join(lines + describe_skipped(self.skipped))

    def __repr__(self) -> str:
        return f"RunSummary(layers={len(self.layers)}, steps={self.steps}, merged={self.merged})"


def summarise(run: MergeRun) -> RunSummary:
    """See :meth:`inmerge_fast.InMerge.summary`."""
    run.current_weights()  # first: where some were frozen since, this plans anew
    counted = run.counted_by_layer()
    ledgers = {} if run.watch is None else run.watch.so_far()
    limit = CollapseGuard().loss if run.guard is None else run.guard.loss
    recipe = run.recipe
    end = run.step_count if recipe.stop is None else min(run.step_count, recipe.stop)
    step = max(end - 1, recipe.start)  # the last one that may have merged
    thresholds = run.peek_thresholds(step) if ledgers else None
    layers = []
    for name, weight, layer in run.layers():
        sampled, merged = counted[name]
        cost = RankCost(Snapshot(weight, layer.layout), layer.layer_id)
        start = lost = math.nan
        if name in ledgers:
            threshold = ledgers[name].threshold if thresholds is None else thresholds[name]
            # Charged up to now in a copy: a look must not change the run.
            ledger = ledgers[name].charged(cost, merged, threshold, recipe.partner, recipe.alpha_at(step))
            start, lost = ledger.rank_start, ledger.lost
        verdict = ACTIVE
        if not merged or has_no_effect(sampled, merged):
            verdict = NO_EFFECT
        elif name in run.stopped or lost > limit:
            verdict = COLLAPSING
        filters, stopped = layer.layout.filters, name in run.stopped
        layers.append(LayerSummary(name, filters, sampled, merged, start, cost.rank, lost, verdict, stopped))
    left = {name: counts for name, counts in counted.items() if name not in run.plan.names}
    return RunSummary(layers, run.step_count, run.plan.skipped, left, recipe.lasting)


@dataclass(frozen=True)
class LayerPreview:
    """What merging would do to one layer now.

    Attributes:
        name: qualified name of the layer.
        filters: number of filters N.
        threshold: similarity that a pair must exceed; infinite where nothing is to merge.
        max_similarity: the largest similarity of its pairs; NaN if there is none.
        share: share of the sampled filters that are expected to merge.
        merges: expected merges per step; 0 also where no filter is sampled, as where ``prob`` begins at 0.
        rank: effective rank now.
    """

    name: str
    filters: int
    threshold: float
    max_similarity: float
    share: float
    merges: float
    rank: float

    @property
    def can_act(self) -> bool:
        """Whether any pair would merge if it were sampled."""
        return self.share > 0


class Preview:
    """What the next step that merges is expected to do, by layer; printable.

    Attributes:
        layers: the layers of the plan, in its order.
        step: the step that it is of.
        skipped: ``(name, reason)`` of every other candidate layer.
        kept_bytes: memory that is expected to be taken by what filters were, where merging is undone before the update;
            None where it stays in the weights.
    """

    def __init__(
        self,
        layers: Sequence[LayerPreview],
        step: int,
        skipped: Sequence[tuple[str, str]],
        kept_bytes: int | None = None,
    ) -> None:
        self.layers, self.step, self.skipped, self.kept_bytes = tuple(layers), step, tuple(skipped), kept_bytes

    @property
    def merges(self) -> float:
        """Expected merges per step, all layers together."""
        return math.fsum(layer.merges for layer in self.layers)

    def __str__(self) -> str:
        width = max(map(len, ["layer", *(s.name for s in self.layers)]))
        idle = [s.name for s in self.layers if not s.can_act]
        lines = [
            f"{self.merges:.3g} merges expected at step {self.step}, for the weights as they are now; training moves "
            "them, and with them the numbers, by orders of magnitude in a fresh network",
            f"{'layer':{width}}  filters  threshold  max sim.  merges per step     rank",
        ]
        if self.kept_bytes is not None:
            lines[1:1] = [
                "they last for the forward and backward passes of a step: every filter is restored before the update, "
                "so they cost no rank, and need no budget and no guard",
                f"memory for what the filters were: about {self.kept_bytes / 1e6:.3g} MB",
            ]
        lines += [f"{s.name:{width}}  {s.filters:7d}  {s.threshold:9.4f}  {s.max_similarity:8.4f}  {s.merges:15.3g}  "
                  f"{s.rank:7.1f}" for s in self.layers]  # fmt: skip
        if idle:
            lines.append(f"{len(idle)} layers cannot act, no pair is above the threshold: {', '.join(idle)}")
        return "\n".join(lines + describe_skipped(self.skipped))

    def __repr__(self) -> str:
        return f"Preview(layers={len(self.layers)}, step={self.step}, merges={self.merges:.3g})"


def preview(run: MergeRun) -> Preview:
    """See :meth:`inmerge_fast.InMerge.preview`."""
    recipe = run.recipe
    step = run.step_count
    while not recipe.merges_at(step):
        if recipe.stop is not None and step >= recipe.stop:
            raise ValueError(f"no step merges any more: step_count is {run.step_count}, stop is {recipe.stop}")
        step = max(step + 1, recipe.start)
    run.current_weights()  # first, as there
    counted, watch, prob = run.counted_by_layer(), run.watch, recipe.prob_at(step)
    thresholds = run.peek_thresholds(step)
    layers = []
    for name, weight, layer in run.layers():
        filters = layer.layout.filters
        summary = summarise_layer(name, weight, layer.layout, False)
        cost = RankCost(Snapshot(weight, layer.layout), layer.layer_id)
        if thresholds is None:
            assert watch is not None
            threshold = watch.measured(recipe, step, name, cost, filters, counted[name][1], None).threshold
        else:
            threshold = thresholds[name]
        if name in run.stopped or threshold >= NEVER:
            threshold = math.inf
        share = cost.share_above(threshold, recipe.partner)
        layers.append(LayerPreview(name, filters, threshold, summary.max, share, prob * filters * share, cost.rank))
    every = sum(weight.numel() * weight.element_size() for weight in run.plan.weights())
    return Preview(layers, step, run.plan.skipped, None if recipe.lasting else round(prob * every))
