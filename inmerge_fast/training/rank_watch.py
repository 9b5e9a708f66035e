"""What merging has cost each layer in a run: measured where it merges, for the guard and for a budget."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..effect import OnItsWay
from ..merge import several_ranks
from ..paths.match import PartnerRule
from ..rank_cost import NEVER, LayerLedger, RankCost, Snapshot, finished, in_background, may_defer
from ..thresholds import MOST_SHARE, RankBudget
from .agreement import CHECK_EVERY, DELAY, is_check
from .distributed import broadcast_from_first, first_ranks_numbers, is_first
from .recipe import Recipe

MEASUREMENTS = 32  # of a budget's run, about; at its beginning, when a network changes most, they are closer together
LEAST_PRICE = 1e-7
MEASURE_DELAY = 6  # merging steps that a measurement has on an accelerator before it is looked at


def as_one(by_layer: Mapping[str, Any]) -> tuple[dict[str, Any]]:
    """A dict with keys that come in the course of a run, as one value of a checkpoint.

    ``torch.distributed.checkpoint`` takes dicts apart and reads those keys only that the state has which it loads into,
    that of a run which has not begun: without a word it would leave out the rest.
    """
    return (dict(by_layer),)


def from_one(saved: Any) -> Mapping[str, Any]:
    """What :func:`as_one` was given; checkpoints of version 2 may be from before, and have it as it is."""
    return saved if isinstance(saved, Mapping) else saved[0]


class Watched(Protocol):
    """What a watch looks at: the run."""

    recipe: Recipe

    @property
    def device(self) -> torch.device:
        """Where the weights are, the same for all ranks whatever they have counted."""

    def layers(self, wanted: Sequence[str]) -> Iterable[tuple[str, torch.Tensor, Any]]:
        """Name, whole weight and layer of the wanted ones; all ranks must iterate."""

    def counted(self) -> torch.Tensor:
        """Pairs sampled and merged in each layer over the whole run, int64 ``(layers, 2)``; nothing waits."""

    def census(self) -> tuple[list[str], torch.Tensor]:
        """Names of all candidate layers, and the same of each, -1 for those that are not merged now."""


@dataclass
class _Count:
    """Merges by layer at some step, on their way to the host."""

    due: int  # the occasion at which they are looked at
    names: list[str]
    numbers: OnItsWay

    def merged(self) -> dict[str, int]:
        """Merges of the layers that were in the plan then."""
        merged = self.numbers.read()[:, 1].tolist()
        return {name: count for name, count in zip(self.names, merged, strict=True) if count >= 0}


@dataclass
class _Work:
    """What a ledger is brought up to date from."""

    old: LayerLedger | None
    snapshot: Snapshot
    key: int
    filters: int
    threshold: float


@dataclass
class _Measurement:
    """What merging has cost some layers at some occasion, on its way; of the first rank alone there is work."""

    due: int  # the occasion at which it is looked at
    occasion: int
    partner: PartnerRule
    alpha: float
    counted: OnItsWay | None = None
    places: dict[str, int] = field(default_factory=dict)  # of the layers in what is counted
    work: dict[str, _Work] = field(default_factory=dict)
    found: Future[dict[str, LayerLedger]] | None = None

    def go_on(self) -> None:
        """Begin to work, as soon as all is on the host."""
        arriving = [self.counted, *(work.snapshot for work in self.work.values())]
        if all(one.has_arrived() for one in arriving if one):
            self._begin()

    def ledgers(self) -> dict[str, LayerLedger]:
        """What was found; waits for it."""
        self._begin()
        return {} if self.found is None else self.found.result()

    def _begin(self) -> None:
        if self.found is None and self.counted is not None:
            self.found = in_background(functools.partial(self._ledgers, self.counted.read()[:, 1].tolist()))

    def _ledgers(self, merged: list[int]) -> dict[str, LayerLedger]:
        return {
            name: _charged(
                work.old, RankCost(work.snapshot, work.key), work.filters, self.occasion, merged[self.places[name]],
                work.threshold, self.partner, self.alpha,
            )
            for name, work in self.work.items()
        }  # fmt: skip


class RankWatch:
    """Keeps a ledger for each layer, and a budget's thresholds.

    Steps are counted as *occasions*, those that merge. When something is measured depends on the occasion, and on the
    merges that the first rank has counted, never on what only one rank knows, its plan least of all: with several ranks
    it is what the first one has told with its latest count. The first rank measures, and the others take what it has
    found.

    On an accelerator nobody waits for a measurement: it is looked at six merging steps later, worked out by a thread in
    the meantime. A budget's is waited for, since the thresholds of the same step come from it.

    Args:
        budget: the budget that sets the thresholds; None where they come from elsewhere.
        group: the ranks that train this model; None for all.
        names: the layers that are merged at first, on all ranks.

    Attributes:
        ledgers: by layer.
    """

    def __init__(self, budget: RankBudget | None, group: Any, names: Sequence[str]) -> None:
        self.ledgers: dict[str, LayerLedger] = {}
        self._budget, self._group = budget, group
        self._occasion = -1  # the latest
        self._count: _Count | None = None
        self._measuring: _Measurement | None = None
        self._agreed = list(names) if several_ranks(group) else None  # the layers that the first rank merges

    def advance(self, run: Watched, step: int, names: list[str], thresholds: Sequence[float] | None) -> list[str]:
        """Look at what there is to look at before the merge of ``step``.

        Args:
            run: the run.
            step: the optimizer step.
            names: the layers that this rank merges.
            thresholds: the threshold of each; None with a budget.

        Returns:
            The layers whose cost was measured.
        """
        occasion = run.recipe.occasion(step)
        if occasion == self._occasion:
            return []
        self._occasion = occasion
        counted = self._count is not None and occasion >= self._count.due
        merged = self._count.merged() if self._count is not None and counted else {}
        if counted:
            self._count = None
            self._agreed = None if self._agreed is None else list(merged)
        candidates = names if self._agreed is None else self._agreed
        found = self._take_in(occasion)
        known = [name for name in candidates if name in self.ledgers]
        due: set[str] = set()
        if self._measuring is None and (not known or counted):
            # A layer that has come since waits: when to measure must not depend on the plan of one rank.
            due.update(set(candidates).difference(known))
            due.update(name for name in known if name in merged and self.ledgers[name].is_due(merged[name]))
        if self._budget is not None and not self._is_over(run.recipe, occasion):
            window = self.window(run.recipe, occasion)
            since = {name: occasion - self.ledgers[name].occasion for name in known}
            due.update(name for name in known if since[name] >= window or since[name] < 0)
        measured = [name for name in candidates if name in due]
        if measured:
            in_force = None if thresholds is None else dict(zip(names, thresholds, strict=True))
            if in_force is not None and may_defer(run.device):
                self._begin(run, step, names, measured, in_force)
                measured = []
            else:
                self._measure(run, step, names, measured, in_force)
        if is_check(occasion):
            every, counts = run.census()
            self._count = _Count(occasion + DELAY, every, OnItsWay(first_ranks_numbers(counts, self._group)))
        return [name for name in (*found, *measured) if name in self.ledgers]

    def thresholds(self, recipe: Recipe, names: Iterable[str]) -> list[float]:
        """The thresholds that the budget has set; ``NEVER`` for layers that were not measured yet, and at the end."""
        if self._is_over(recipe, self._occasion):
            return [NEVER for _ in names]
        return [self.ledgers[name].threshold if name in self.ledgers else NEVER for name in names]

    @staticmethod
    def _is_over(recipe: Recipe, occasion: int) -> bool:
        """Whether the steps that the budget was for have been."""
        assert recipe.merging_steps is not None
        return occasion >= recipe.merging_steps

    def window(self, recipe: Recipe, occasion: int) -> int:
        """Merging steps from one measurement of a budget to the next."""
        budget, total = self._budget, recipe.merging_steps
        assert budget is not None
        assert total is not None
        if budget.every is not None:
            return -(-budget.every // recipe.every)
        return min(max(CHECK_EVERY, occasion // 8), max(CHECK_EVERY, total // MEASUREMENTS))

    def _measure(
        self, run: Watched, step: int, names: list[str], wanted: list[str], thresholds: Mapping[str, float] | None
    ) -> None:
        counted: dict[str, int] = {}
        found: dict[str, LayerLedger] = {}
        for name, weight, layer in run.layers(wanted):
            if not is_first(self._group):
                continue  # all ranks must have gathered the weight
            if not counted:
                counted = dict(zip(names, run.counted()[:, 1].tolist(), strict=True))
            cost = RankCost(Snapshot(weight, layer.layout), 1_000_003 * self._occasion + layer.layer_id)
            threshold = None if thresholds is None else thresholds[name]
            found[name] = self.measured(run.recipe, step, name, cost, layer.layout.filters, counted[name], threshold)
        self.ledgers |= broadcast_from_first(found, self._group)

    def _begin(
        self, run: Watched, step: int, names: list[str], wanted: list[str], thresholds: Mapping[str, float]
    ) -> None:
        """Begin to measure."""
        recipe, occasion = run.recipe, self._occasion
        self._measuring = measuring = _Measurement(
            occasion + MEASURE_DELAY, occasion, recipe.partner, recipe.alpha_at(step)
        )
        for name, weight, layer in run.layers(wanted):
            if not is_first(self._group):
                continue  # all ranks must have gathered the weight
            snapshot, key = Snapshot(weight, layer.layout), 1_000_003 * occasion + layer.layer_id
            filters, old = layer.layout.filters, self.ledgers.get(name)
            measuring.work[name] = _Work(old, snapshot, key, filters, thresholds[name])
        if measuring.work:
            measuring.counted = OnItsWay(run.counted())
            measuring.places = {name: place for place, name in enumerate(names)}

    def _take_in(self, occasion: int) -> list[str]:
        """Take in what has been measured, when that is due; returns the names of the layers.

        It is due as well where steps were set back, as by a checkpoint that goes on with another ``every``.
        """
        if self._measuring is None:
            return []
        if self._measuring.occasion <= occasion < self._measuring.due:
            self._measuring.go_on()
            return []
        measuring, self._measuring = self._measuring, None
        found = self._newer(broadcast_from_first(measuring.ledgers(), self._group))
        self.ledgers |= found
        return list(found)

    def _newer(self, found: Mapping[str, LayerLedger]) -> dict[str, LayerLedger]:
        """What was found, but for layers that a budget has measured since."""
        return {
            name: ledger
            for name, ledger in found.items()
            if name not in self.ledgers or self.ledgers[name].occasion <= ledger.occasion
        }

    def so_far(self) -> dict[str, LayerLedger]:
        """The ledgers with what is on its way, which the run takes in at its own time; waits for it.

        Of several ranks the first one knows it, and tells it only then: here nobody waits for a rank.
        """
        return self.ledgers | ({} if self._measuring is None else self._newer(self._measuring.ledgers()))

    def measured(
        self,
        recipe: Recipe,
        step: int,
        name: str,
        cost: RankCost,
        filters: int,
        merged: int,
        threshold: float | None,
    ) -> LayerLedger:
        """The ledger of a layer, brought up to ``step``; the one that is kept stays as it is.

        Args:
            recipe: the recipe.
            step: the optimizer step.
            name: the layer.
            cost: its filters now.
            filters: how many they are.
            merged: merges in it so far.
            threshold: the threshold in force; None with a budget, whose last one it is.
        """
        occasion, alpha = recipe.occasion(step), recipe.alpha_at(step)
        old = self.ledgers.get(name)
        ledger = _charged(old, cost, filters, occasion, merged, threshold, recipe.partner, alpha)
        if self._budget is not None:
            window = self.window(recipe, occasion)
            prob = recipe.highest_prob(step, step + window * recipe.every)
            _set_threshold(ledger, cost, self._budget, recipe, window, prob, alpha)
        return ledger

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain data; waits for what is on its way."""
        count, measuring = self._count, self._measuring
        return {
            "ledgers": as_one({name: vars(ledger).copy() for name, ledger in self.ledgers.items()}),
            "occasion": self._occasion,
            "count": None if count is None else [count.due, count.names, count.numbers.read().tolist()],
            "agreed": None if self._agreed is None else list(self._agreed),
            "measuring": None if measuring is None else [
                measuring.due, as_one({name: vars(ledger).copy() for name, ledger in measuring.ledgers().items()})
            ],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.ledgers = _ledgers(state["ledgers"])
        self._occasion, self._count = state["occasion"], None
        self._measuring = None
        if state.get("measuring") is not None:
            due, found = state["measuring"]
            self._measuring = _Measurement(due, self._occasion, "random", 0.0, found=finished(_ledgers(found)))
        if self._agreed is not None and state.get("agreed") is not None:
            self._agreed = list(state["agreed"])
        if state["count"] is not None:
            due, names, numbers = state["count"]
            self._count = _Count(due, list(names), OnItsWay(torch.from_numpy(np.array(numbers, np.int64))))


def _ledgers(saved: Any) -> dict[str, LayerLedger]:
    return {name: LayerLedger(**ledger) for name, ledger in from_one(saved).items()}


def _charged(
    old: LayerLedger | None, cost: RankCost, filters: int, occasion: int, merged: int, threshold: float | None,
    partner: PartnerRule, alpha: float,
) -> LayerLedger:  # fmt: skip
    """A new ledger, or a copy of the old one with what has been merged since; see :meth:`RankWatch.measured`."""
    if old is None:
        ledger = LayerLedger(filters, cost.rank, cost.rank, occasion, merged)
        if threshold is not None:  # afterwards the first merges may have left nothing to lose
            ledger.price = cost.price(threshold, partner, alpha)
        return ledger
    ledger = old.charged(cost, merged, old.threshold if threshold is None else threshold, partner, alpha)
    ledger.occasion = occasion
    return ledger


def _set_threshold(
    ledger: LayerLedger, cost: RankCost, budget: RankBudget, recipe: Recipe, window: int, prob: float, alpha: float
) -> None:
    """The lowest threshold whose merges are worth what may be spent until the window's end, and their price."""
    total, partner = recipe.merging_steps, recipe.partner
    assert total is not None
    window = min(window, total - ledger.occasion)
    left = budget.budget * (ledger.occasion + window) / total - ledger.spent
    price, ledger.price, ledger.threshold = ledger.price, None, NEVER
    if window <= 0 or left <= 0 or not cost.pairs:
        return
    looks = max(prob, 1e-9) * ledger.filters * window  # filters that look at a partner until then
    if price is None:
        price = cost.price(cost.threshold_for(MOST_SHARE, partner), partner, alpha)
    least = cost.least_share(partner)
    threshold, found, expense = NEVER, None, 0.0
    for _ in range(2):
        share = max(min(left / (max(price or 0.0, LEAST_PRICE) * looks), MOST_SHARE), least)
        threshold = cost.threshold_for(share, partner)
        found = cost.price(threshold, partner, alpha)
        expense = looks * cost.share_above(threshold, partner) * (found or 0.0)
        if expense <= 1.1 * left:
            break
        price = found  # dearer than at the threshold before: fewer of them
    if expense <= 1.5 * left:  # else not even the most similar pair can be paid yet
        ledger.price, ledger.threshold = found, threshold
