"""The merging of a training run, step by step, whoever asks for the steps: the plan, the counter, the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..draw import MAX_STEP, check_word
from ..layer_similarity import summarise_layer
from ..merge import merge_plan_
from ..merge_plan import MergePlan
from ..paths.path import Call
from ..plan.candidates import is_mergeable_module
from ..plan.plan import Target
from ..stats import MergeStats
from .distributed import ShardedPlan, broadcast_from_first, is_sharded
from .guard import CollapseGuard
from .monitor import Monitor, Observation
from .recipe import Recipe
from .thresholds import NEVER, NoiseThreshold, QuantileThreshold

STATE_VERSION = 1


class MergeRun:
    """What a run needs to merge at its steps, and to go on after a restart.

    Args:
        model: what is merged, without torch.compile's wrapper.
        selection: the arguments of a plan that choose layers.
        recipe: what to do at which step.
        guard: what watches for collapsing layers; None for nothing.
        monitor: what passes observations on.
        observe_every: every how many merging steps are observed.
        group: the ranks that train this model; None for all.

    Attributes:
        plan: the layers that are merged.
        step_count: optimizer steps so far; the number of the next one.
        stopped: names of layers that the guard has stopped.
    """

    def __init__(
        self,
        model: Target,
        selection: Mapping[str, Any],
        recipe: Recipe,
        guard: CollapseGuard | None,
        monitor: Monitor,
        observe_every: int,
        group: Any,
    ) -> None:
        self.model, self.recipe, self.guard, self.monitor = model, recipe, guard, monitor
        self._selection, self._observe_every, self._group = selection, observe_every, group
        self._quantiles: dict[str, float] = {}
        self._quantiles_of: int | None = None  # the step that they were computed at
        self.stopped: set[str] = set()
        self.step_count = 0
        self.plan = self._new_plan()

    # ------------------------------------------------------------------------------------------------------ one step

    def merge(self) -> MergeStats | None:
        """Merge, if the next step is one that merges, and count it."""
        step = self.step_count
        if not self.recipe.merges_at(step):
            self.step_count = step + 1
            return None
        observed = self.is_observed(step)
        if observed:
            self.take_in_observations()
        weights = self.current_weights()
        call = self.call_at(step)
        stats = merge_plan_(self.plan, weights, call)
        self.step_count = step + 1
        if observed:
            self.observe(call, stats)
        return stats

    def call_at(self, step: int) -> Call:
        """The numbers of a step. Thresholds are one per layer, ``NEVER`` for a layer that is not merged any more."""
        recipe = self.recipe
        return Call(
            recipe.seed,
            step,
            recipe.prob_at(step),
            recipe.alpha_at(step),
            self._thresholds(step),
            recipe.partner,
            False,
        )

    # ------------------------------------------------------------------------------------------------------------ plan

    def _new_plan(self) -> MergePlan:
        is_model = isinstance(self.model, nn.Module) and not is_mergeable_module(self.model)
        if is_model and is_sharded(self.model):  # type: ignore[arg-type]
            return ShardedPlan(self.model, **self._selection)  # type: ignore[arg-type]
        # Layers and weights that were given one by one are meant, frozen or not.
        selection = self._selection if is_model else {**self._selection, "include_frozen": True}
        return MergePlan(self.model, **selection)

    def current_weights(self) -> list[torch.Tensor]:
        """The plan's weights as they are now; a new plan where one was moved, replaced or frozen."""
        weights = self.plan.current_weights()
        if weights is None:
            effect = self.plan.effect
            self.plan = self._new_plan()
            self.plan.effect.go_on_from(effect)
            weights = self.plan.weights()
        return weights

    def layers(self) -> Iterable[tuple[str, torch.Tensor, Any]]:
        """Name, full weight and layer, one after the other, so that only one sharded weight is gathered at a time."""
        weights: Iterable[torch.Tensor] = self.current_weights()
        if isinstance(self.plan, ShardedPlan):
            weights = self.plan.gathered(list(weights))
        return zip(self.plan.names, weights, self.plan.layers, strict=True)

    # ------------------------------------------------------------------------------------------------------ thresholds

    def _thresholds(self, step: int) -> tuple[float, ...]:
        chosen = self.recipe.threshold
        if isinstance(chosen, NoiseThreshold):
            values = [chosen.of(layer.layout.elements) for layer in self.plan.layers]
        elif isinstance(chosen, QuantileThreshold):
            names = self.plan.names
            is_due = self._quantiles_of is None or step - self._quantiles_of >= chosen.every
            if is_due or not self._quantiles.keys() >= set(names):
                self._quantiles = broadcast_from_first(self._measure_quantiles(chosen.rate), self._group)
                self._quantiles_of = step
            values = [self._quantiles[name] for name in names]
        else:
            values = [self.recipe.threshold_at(step)] * len(self.plan.layers)
        if self.stopped:
            values = [NEVER if name in self.stopped else v for name, v in zip(self.plan.names, values, strict=True)]
        return tuple(values)

    def _measure_quantiles(self, rate: float) -> dict[str, float]:
        found = {}
        for name, weight, layer in self.layers():
            summary = summarise_layer(name, weight, layer.layout, False)
            found[name] = summary.threshold_for_rate(rate, self.recipe.partner) if summary.pairs else NEVER
        return found

    # ------------------------------------------------------------------------------------------------------ monitoring

    def is_observed(self, step: int) -> bool:
        """Whether guard or loggers look at a step that merges."""
        wanted = self.guard is not None or bool(self.monitor.loggers)
        return wanted and self.recipe.occasion(step) % self._observe_every == 0

    def observe(self, call: Call, stats: MergeStats) -> None:
        """Begin to read what a call did."""
        thresholds = dict(zip(self.plan.names, call.threshold_of_each(len(self.plan.names)), strict=True))
        self.monitor.observe(Observation(call.step, call.alpha, call.prob, thresholds, stats))

    def take_in_observations(self) -> None:
        """Pass on what has arrived of earlier observations."""
        for observation in self.monitor.due():
            if self.guard is not None:
                self.stopped.update(self.guard.judge(observation.step, observation.layers))

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`inmerge_fast.InMerge.state_dict`."""
        return {
            "version": STATE_VERSION,
            "layers": list(self.plan.names),
            "step_count": self.step_count,
            "recipe": self.recipe.to_plain(),
            "quantiles": dict(self._quantiles),
            "quantiles_of": self._quantiles_of,
            "stopped": sorted(self.stopped),
            "guard": None if self.guard is None else self.guard.state_dict(),
            "pending": [observation.to_plain() for observation in self.monitor.pending],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`inmerge_fast.InMerge.load_state_dict`."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state has version {state.get('version')!r}, expected {STATE_VERSION}")
        if state["layers"] != self.plan.names:
            other = sorted(set(state["layers"]) ^ set(self.plan.names)) or "their order"
            raise ValueError(
                f"state was saved for other layers, the difference is {other}; construct with the same model and the "
                "same skip_first, exclude, include_linear and include_frozen"
            )
        check_word("step_count", state["step_count"], MAX_STEP)
        self.recipe = self.recipe.restored(state["recipe"])
        self.step_count = state["step_count"]
        self._quantiles, self._quantiles_of = dict(state["quantiles"]), state["quantiles_of"]
        self.stopped = set(state["stopped"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self.monitor.pending = [Observation.from_plain(plain) for plain in state["pending"]]

    def described(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return self.recipe.described() | {
            "guard": repr(self.guard),
            "observe_every": self._observe_every,
            "layers": [(layer.name, layer.layer_id, tuple(layer.shape)) for layer in self.plan.layers],
        }
