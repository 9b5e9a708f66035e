"""The merging of a training run, step by step, whoever asks for the steps: the plan, the counter, the numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..draw import MAX_STEP, check_word
from ..effect import NO_EFFECT_CALLS, callers_level
from ..lease import as_it_was
from ..merge import merge_plan_, several_ranks
from ..merge_plan import MergePlan
from ..paths.path import Call
from ..plan.candidates import is_mergeable_module
from ..plan.plan import Target
from ..rank_cost import NEVER
from ..stats import MergeStats, NoEffectWarning
from ..thresholds import NoiseThreshold, QuantileThreshold, RankBudget, by_layer, quantile_threshold
from .agreement import Comparison
from .distributed import ShardedPlan, broadcast_from_first, is_sharded
from .guard import CollapseGuard
from .monitor import Monitor, Observation
from .rank_watch import RankWatch, as_one, from_one
from .recipe import Recipe
from .untrained import Untrained

STATE_VERSION = 2
NOTHING_TO_SPEND = (
    "the RankBudget of every layer was too small for its most similar pair, as it is where layers have few filters or "
    "runs few steps; InMerge.summary() shows the layers, a larger loss= or include_linear=True may find something to do"
)


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
        group: the ranks that train this model; None for all.
        stopped: names of layers that the guard has stopped.
        watch: what keeps account of what merging costs; None without guard and budget.
        untrained: what tells which layers nobody trains; None while attached to no optimizer.
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
        self.group = group
        self._selection, self._observe_every = selection, observe_every
        self._quantiles: dict[str, float] = {}
        self._quantiles_of: int | None = None  # the step that they were computed at
        self.stopped: set[str] = set()
        self.step_count = 0
        self._earlier: dict[str, tuple[int, int]] = {}  # sampled and merged by plans before this one
        self._before: torch.Tensor | None = None  # the same where the plan's counts are, in its order
        budget = recipe.threshold if isinstance(recipe.threshold, RankBudget) else None
        self._places: tuple[MergePlan, torch.Tensor] | None = None  # of its layers among all candidates
        self._waited = 0  # steps that would have merged, had not all layers been frozen
        self.untrained: Untrained | None = None
        self.plan = self._new_plan()
        self.watch = None if budget is None and guard is None else RankWatch(budget, group, self.plan.names)
        self._comparison = Comparison(group) if several_ranks(group) else None
        self._fixed = self._fixed_thresholds(self.plan)
        if budget is not None:
            self.plan.effect.advise(NOTHING_TO_SPEND)

    # ---------------------------------------------------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        """What a copy goes on from: all but the plan, which belongs to the memory of the weights, and the loggers."""
        return {
            "model": self.model,
            "selection": dict(self._selection),
            "recipe": self.recipe,
            "observe_every": self._observe_every,
            "guard": copy.deepcopy(self.guard),
            "group": self.group,
            "step_count": self.step_count,
            "quantiles": (dict(self._quantiles), self._quantiles_of),
            "stopped": set(self.stopped),
            "counted": self.counted_by_layer(),
            "watch": None if self.watch is None else self.watch.state_dict(),
        }

    # ------------------------------------------------------------------------------------------------------ one step

    def merge(self) -> MergeStats | None:
        """Merge, if the next step is one that merges, and count it."""
        step = self.step_count
        if not self.recipe.merges_at(step):
            self.step_count = step + 1
            return None
        observed = self.is_observed(step)
        if observed:
            self.monitor.log_due()
        weights = self.current_weights()
        if self._comparison is not None:
            self._comparison.look(self.recipe.occasion(step), step, self.plan.device, self.described)
        call = self.call_at(step)
        if not weights:
            self.step_count = step + 1
            self._wait()
            return None
        idle = self.idle()
        stats = merge_plan_(self.plan, weights, call)
        if self.untrained is not None:
            self.untrained.merged(weights, idle)
        self.step_count = step + 1
        if observed:
            self.observe(call, stats)
        return stats

    def _wait(self) -> None:
        """Count a step at which all layers were frozen."""
        self._waited += 1
        if self._waited == NO_EFFECT_CALLS and not self.plan.effect.calls:
            warnings.warn(
                f"nothing was merged in {self._waited} steps, because all {len(self.plan.frozen)} layers are frozen "
                "(requires_grad is False). They are merged from when they are trained; include_frozen=True merges them "
                "as they are",
                NoEffectWarning,
                stacklevel=callers_level(),
            )

    def call_at(self, step: int) -> Call:
        """The numbers of a step. Thresholds are one per layer, ``NEVER`` for a layer that is not merged any more."""
        recipe = self.recipe
        prob, alpha = recipe.prob_at(step), recipe.alpha_at(step)
        return Call(recipe.seed, step, prob, alpha, self._thresholds(step), recipe.partner, False)

    def idle_call(self, step: int) -> Call:
        """The numbers of a step that merges nothing: nothing is measured for it."""
        recipe, nothing = self.recipe, (NEVER,) * len(self.plan.layers)
        return Call(recipe.seed, step, 0.0, 1.0, nothing, recipe.partner, False)

    # ------------------------------------------------------------------------------------------------------------ plan

    def _new_plan(self) -> MergePlan:
        is_model = isinstance(self.model, nn.Module) and not is_mergeable_module(self.model)
        if is_model and is_sharded(self.model):  # type: ignore[arg-type]
            return ShardedPlan(self.model, may_wait=True, **self._selection)  # type: ignore[arg-type]
        # Layers and weights that were given one by one are meant, frozen or not.
        selection = self._selection if is_model else {**self._selection, "include_frozen": True}
        return MergePlan(self.model, may_wait=True, **selection)

    def current_weights(self) -> list[torch.Tensor]:
        """The plan's weights as they are now; a new plan where one was moved, replaced or frozen."""
        weights = self.plan.current_weights()
        if weights is None:
            plan, old = self._new_plan(), self.plan
            self._fixed = self._fixed_thresholds(plan)  # may raise, before anything is different
            self.plan = plan
            self._count_from(self._earlier | self._counted_with(old))  # waits, as planning does
            plan.effect.go_on_from(old.effect)
            weights = plan.weights()
        return weights

    def layers(self, wanted: Sequence[str] | None = None) -> Iterable[tuple[str, torch.Tensor, Any]]:
        """Name, full weight and layer, one after the other, so that only one sharded weight is gathered at a time.

        What is merged for a forward pass is given as it was, as a copy.

        Args:
            wanted: names of the layers; None for all.
        """
        weights = self.current_weights()  # first: this may plan anew
        names, layers = self.plan.names, self.plan.layers
        chosen = [place for place, name in enumerate(names) if wanted is None or name in wanted]
        some: Iterable[torch.Tensor] = [weights[place] for place in chosen]
        if isinstance(self.plan, ShardedPlan):
            some = self.plan.gathered(list(some))
        some = map(as_it_was, some)
        return zip([names[place] for place in chosen], some, [layers[place] for place in chosen], strict=True)

    # --------------------------------------------------------------------------------------------------------- counts

    @property
    def device(self) -> torch.device:
        """Where the weights are; counts are on the host before the first call."""
        return self.plan.device

    def counted(self) -> torch.Tensor:
        """Pairs sampled and merged in each layer over the whole run, int64 ``(layers, 2)``; nothing waits."""
        found, before = self.plan.totals(), self._before
        return found if before is None else found.to(before.device) + before

    def census(self) -> tuple[list[str], torch.Tensor]:
        """Names of all candidate layers, and the counts of each, -1 for those that are not merged now.

        So many and in this order whatever is frozen, that ranks can compare them.
        """
        every, counted = list(self.plan.candidates), self.counted()
        if self._places is None or self._places[0] is not self.plan or self._places[1].device != counted.device:
            places = {name: place for place, name in enumerate(every)}
            own = torch.tensor([places[name] for name in self.plan.names], dtype=torch.int64, device=counted.device)
            self._places = self.plan, own  # once for a plan: the host waits for this copy
        found = counted.new_full((len(every), 2), -1)
        return every, found.index_copy_(0, self._places[1], counted)

    def _count_from(self, earlier: dict[str, tuple[int, int]]) -> None:
        """Count on from what earlier plans have counted by layer."""
        self._earlier = earlier
        own = [earlier.get(name, (0, 0)) for name in self.plan.names]
        self._before = torch.tensor(own, dtype=torch.int64, device=self.plan.device) if any(map(any, own)) else None

    def counted_by_layer(self) -> dict[str, tuple[int, int]]:
        """Pairs sampled and merged in each layer that the run has met; waits for the device."""
        return self._earlier | self._counted_with(self.plan)

    def _counted_with(self, plan: MergePlan) -> dict[str, tuple[int, int]]:
        found = {}
        for name, (sampled, merged) in zip(plan.names, plan.totals().tolist(), strict=True):
            before = self._earlier.get(name, (0, 0))
            found[name] = (before[0] + sampled, before[1] + merged)
        return found

    # ------------------------------------------------------------------------------------------------------ thresholds

    def _fixed_thresholds(self, plan: MergePlan) -> list[float] | None:
        """One for each layer, where they depend on nothing but the layer."""
        chosen = self.recipe.threshold
        if isinstance(chosen, NoiseThreshold):
            return [chosen.of(layer.layout.elements) for layer in plan.layers]
        return by_layer(chosen, plan) if isinstance(chosen, dict) else None

    def _thresholds(self, step: int) -> tuple[float, ...]:
        names, watch = self.plan.names, self.watch
        values = self.chosen_thresholds(step)
        if watch is not None:
            measured = watch.advance(self, step, names, values)
            if measured and self.guard is not None:
                self.stopped.update(self.guard.judge(step, {name: watch.ledgers[name] for name in measured}))
            if values is None:
                values = watch.thresholds(self.recipe, names)
        assert values is not None
        left_alone = self.stopped | self.idle()
        if left_alone:
            values = [NEVER if name in left_alone else v for name, v in zip(names, values, strict=True)]
        return tuple(values)

    def idle(self) -> set[str]:
        """Names of layers that are not merged now, since nobody has trained them since the last time."""
        return set() if self.untrained is None else self.untrained.idle(self.plan)

    def chosen_thresholds(self, step: int) -> list[float] | None:
        """The threshold of each layer at ``step``, stopped or not; None where a budget sets them."""
        chosen = self.recipe.threshold
        if self._fixed is not None:
            return self._fixed
        if isinstance(chosen, RankBudget):
            return None
        if not isinstance(chosen, QuantileThreshold):
            return [self.recipe.threshold_at(step)] * len(self.plan.layers)
        is_due = self._quantiles_of is None or step - self._quantiles_of >= chosen.every
        # A layer that is trained from now on is measured at once; with several ranks, where one cannot know whether the
        # others have it, the next time that all of them measure.
        is_new = self._comparison is None and not self._quantiles.keys() >= set(self.plan.names)
        if is_due or is_new:
            self._quantiles = broadcast_from_first(self._measure_quantiles(chosen.rate), self.group)
            self._quantiles_of = step
        return [self._quantiles.get(name, NEVER) for name in self.plan.names]

    def peek_thresholds(self, step: int) -> dict[str, float] | None:
        """The thresholds of :meth:`chosen_thresholds` by layer, without measuring anything for the run."""
        kept = self._quantiles, self._quantiles_of
        values = self.chosen_thresholds(step)
        self._quantiles, self._quantiles_of = kept
        return None if values is None else dict(zip(self.plan.names, values, strict=True))

    def _measure_quantiles(self, rate: float) -> dict[str, float]:
        return {
            name: quantile_threshold(name, weight, layer, rate, self.recipe.partner)
            for name, weight, layer in self.layers()
        }

    # ------------------------------------------------------------------------------------------------------ monitoring

    def is_observed(self, step: int) -> bool:
        """Whether loggers look at a step that merges."""
        return bool(self.monitor.loggers) and self.recipe.occasion(step) % self._observe_every == 0

    def observe(self, call: Call, stats: MergeStats) -> None:
        """Begin to read what a call did."""
        thresholds = dict(zip(self.plan.names, call.threshold_of_each(len(self.plan.names)), strict=True))
        self.monitor.observe(Observation(call.step, call.alpha, call.prob, thresholds, stats))

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`inmerge_fast.InMerge.state_dict`."""
        return {
            "version": STATE_VERSION,
            "layers": list(self.plan.names),
            "choice": self._choice(),
            "step_count": self.step_count,
            "recipe": self.recipe.to_plain(),
            "quantiles": as_one(self._quantiles),
            "quantiles_of": self._quantiles_of,
            "stopped": sorted(self.stopped),
            "counted": as_one({name: list(counts) for name, counts in self.counted_by_layer().items()}),
            "watch": None if self.watch is None else self.watch.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
            "pending": tuple(observation.to_plain() for observation in self.monitor.pending),
        }

    def _choice(self) -> dict[str, Any]:
        """What chooses the layers, and from which, as plain data."""
        choice = {name: list(value) if isinstance(value, tuple) else value for name, value in self._selection.items()}
        return choice | {"candidates": list(self.plan.candidates)}

    def load_state_dict(self, state: Mapping[str, Any], keep: Sequence[str]) -> None:
        """See :meth:`inmerge_fast.InMerge.load_state_dict`."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state has version {state.get('version')!r}, expected {STATE_VERSION}")
        # The same layers, or the same choice of them, which are others while some are frozen.
        choice, saved = self._choice(), state.get("choice")
        if saved is not None:  # states from before there was the switch are of runs that merged heads
            saved = {"include_heads": choice["include_heads"] or bool(self.plan.heads)} | saved
        if state["layers"] != self.plan.names and saved != choice:
            other = sorted(set(state["layers"]) ^ set(self.plan.names)) or "their order"
            raise ValueError(
                f"state was saved for other layers, the difference is {other}; construct with the same model and the "
                "same skip_first, exclude, include_linear, include_frozen and include_heads"
            )
        check_word("step_count", state["step_count"], MAX_STEP)
        restored = self.recipe.restored(state["recipe"], keep)
        self._warn_of_differences(restored)
        self.recipe, self._fixed = restored, None
        budget = restored.threshold if isinstance(restored.threshold, RankBudget) else None
        self.watch = None if budget is None and self.guard is None else RankWatch(budget, self.group, self.plan.names)
        if self.watch is not None and state["watch"] is not None:
            self.watch.load_state_dict(state["watch"])
        self._fixed = self._fixed_thresholds(self.plan)
        self.plan.effect.reset()
        if budget is not None:
            self.plan.effect.advise(NOTHING_TO_SPEND)
        self._count_from({name: (sampled, merged) for name, (sampled, merged) in from_one(state["counted"]).items()})
        self.step_count = state["step_count"]
        self._quantiles, self._quantiles_of = dict(from_one(state["quantiles"])), state["quantiles_of"]
        self.stopped = set(state["stopped"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self.monitor.pending = [Observation.from_plain(plain) for plain in state["pending"]]

    def _warn_of_differences(self, restored: Recipe) -> None:
        found = self.recipe.differences(restored)
        if found:
            saved = " and ".join(f"{name}={new!r}" for name, (_, new) in found.items())
            given = " and ".join(f"{name}={old!r}" for name, (old, _) in found.items())
            warnings.warn(
                f"the checkpoint's {saved} replace what this InMerge was constructed with, {given}; "
                f"load_state_dict(state, keep={sorted(found)!r}) keeps the new values",
                UserWarning,
                stacklevel=callers_level(),
            )

    def described(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return self.recipe.described() | {
            "guard": repr(self.guard),
            "observe_every": self._observe_every,
            "layers": [(layer.name, layer.layer_id, tuple(layer.shape)) for layer in self.plan.layers],
        }
