"""``InMerge``: merging as a part of a training run, with schedules, checkpoints, several ranks and CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..draw import MAX_STEP, check_word
from ..dynamo import outside_dynamo
from ..inspection.similarity import summarise_layer
from ..merge import merge_plan_, several_ranks
from ..plan.candidates import is_mergeable_module, unwrap_compiled
from ..plan.filters import check_outside_transforms
from ..plan.plan import DEFAULT_SKIP_FIRST, MergePlan, Target
from ..stats import MergeStats, NoEffectWarning
from .distributed import ShardedPlan, broadcast_from_first, check_agreement, is_sharded
from .graphs import GraphSteps
from .guard import CollapseGuard
from .hooks import AttachedStep
from .monitor import Logger, Monitor, Observation
from .recipe import Recipe, Threshold, check_count, in_steps, selection
from .schedules import Schedule
from .thresholds import NEVER, NoiseThreshold, QuantileThreshold

EVAL_STEPS = 100  # steps in evaluation mode, before any in training mode, after which a warning says so
STATE_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """The numbers of one step. Thresholds are one per layer, ``NEVER`` for a layer that is not merged any more."""

    step: int
    alpha: float
    prob: float
    thresholds: tuple[float, ...]


class InMerge:
    """In-model merging (arXiv 2502.20516) in a training run: one object, one call per optimizer step.

    Either call :meth:`step` next to ``optimizer.step()``, or :meth:`attach` it to the optimizer once. It counts
    optimizer steps, knows when to merge and how much, does nothing while the model is in evaluation mode, and can be
    saved and resumed to the bit::

        merger = inmerge_fast.InMerge(model, threshold=inmerge_fast.NoiseThreshold(4), seed=0)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            merger.step()
            optimizer.zero_grad()

    Args:
        model: the model, possibly compiled, wrapped by ``DistributedDataParallel`` or sharded by ``fully_shard``; or an
            iterable of convolutions, ``Linear`` layers and weights, e.g. the float32 master weights.
        alpha: share of itself that a merged filter keeps, in [0, 1]: a number, a ramp (:func:`inmerge_fast.linear`,
            :func:`inmerge_fast.cosine`), or a function of the step.
        prob: probability that a filter looks at a partner, in [0, 1]; likewise.
        threshold: similarity that a pair must exceed, in [-1, 1]; likewise, or a threshold that follows the layer:
            :class:`inmerge_fast.NoiseThreshold` or :class:`inmerge_fast.QuantileThreshold`.
        partner: the partner rule, see :func:`inmerge_fast.merge_`.
        skip_first: see :func:`inmerge_fast.merge_`; or name patterns of the layers to leave out, and no others.
        exclude: name patterns of layers to leave out as well, see :func:`inmerge_fast.merge_`.
        include_linear: whether ``Linear`` layers take part too.
        include_frozen: whether weights that require no gradient take part too. Freezing and unfreezing is noticed.
        start: first step that merges.
        stop: first step that does not any more; None for no end.
        every: merge at every ``every``-th step from ``start`` on.
        steps_per_epoch: if given, ``start`` and ``stop`` count epochs of so many optimizer steps. The paper trains 30
            epochs plainly and 10 with merging: ``start=30, stop=40``.
        seed: seed of the draw, ``0 <= seed < 2**64``, the same on all ranks.
        guard: what watches for collapsing layers; None for nothing.
        loggers: functions that get a row of numbers for each observed step, see :class:`inmerge_fast.DictLogger`.
        observe_every: every how many merging steps are observed by guard and loggers. Nothing waits for the numbers:
            they are passed on when the next ones are taken.
        process_group: ranks that train this same model, all of which must construct it; None for all ranks.

    Attributes:
        plan: the layers that are merged, printable.
        step_count: optimizer steps so far; the number of the next one.
        stopped: names of layers that the guard has stopped.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, nothing can be merged, a weight cannot be rewritten in place, or the
            ranks disagree about the recipe.
    """

    def __init__(
        self,
        model: Target,
        *,
        alpha: Schedule = 0.8,
        prob: Schedule = 0.3,
        threshold: Threshold = 0.3,
        partner: str = "random",
        skip_first: float | str | Sequence[str] = DEFAULT_SKIP_FIRST,
        exclude: str | Sequence[str] = (),
        include_linear: bool = False,
        include_frozen: bool = False,
        start: float = 0,
        stop: float | None = None,
        every: int = 1,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        guard: CollapseGuard | str | None = "default",
        loggers: Sequence[Logger] = (),
        observe_every: int = 10,
        process_group: Any = None,
    ) -> None:
        if isinstance(model, AveragedModel):
            raise ValueError(
                "model is an AveragedModel, whose weights the next update_parameters() overwrites; merge the model "
                "that is trained, and its average follows"
            )
        first, last = in_steps(start, stop, steps_per_epoch)
        self._recipe = Recipe(alpha, prob, threshold, partner, first, last, every, seed)
        check_count("observe_every", observe_every)
        for name, flag in (("include_linear", include_linear), ("include_frozen", include_frozen)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {flag!r}")
        if not isinstance(guard, CollapseGuard) and guard is not None and guard != "default":
            raise TypeError(f"guard must be a CollapseGuard or None, got {guard!r}")
        for log in loggers:
            if not callable(log):
                raise TypeError(f"loggers must be callable, got {log!r}")
        if not isinstance(model, (nn.Module, torch.Tensor)) and isinstance(model, Iterable):
            model = tuple(model)
        self._model = unwrap_compiled(model) if isinstance(model, nn.Module) else model
        self._selection = selection(skip_first, exclude, include_linear, include_frozen)
        if guard == "default":
            # Rules that look for similar partners find them: what they measure says little about the layer.
            guard = CollapseGuard() if partner == "random" else CollapseGuard(mean_similarity=0.9, merge_rate=1.0)
        self._guard: CollapseGuard | None = guard  # type: ignore[assignment]
        self._monitor = Monitor(loggers)
        self._observe_every, self._group = int(observe_every), process_group
        self._quantiles: dict[str, float] = {}
        self._quantiles_of: int | None = None  # the step that they were computed at
        self._attached: AttachedStep | None = None
        self._steps_in_evaluation = 0
        self._graph = GraphSteps(self)
        self.stopped: set[str] = set()
        self.step_count = 0
        self.plan = self._new_plan()
        if several_ranks(process_group):
            check_agreement(self._described(), process_group)

    # ------------------------------------------------------------------------------------------------------ one step

    @outside_dynamo
    def step(self) -> MergeStats | None:
        """Merge, if this step is one that merges, and count it. Call it once per optimizer step, outside the model.

        While a CUDA graph is captured, the launches are captured that merge what :meth:`prepare` has last set.

        Returns:
            What was merged, read from the device only when looked at; None at a step that does not merge, in
            evaluation mode, and while capturing.

        Raises:
            RuntimeError: it is attached to an optimizer, which calls it already.
            ValueError: a schedule is out of range, or a weight cannot be merged any more; nothing was written then.
        """
        if self._attached is not None:
            raise RuntimeError("this InMerge is attached to an optimizer and steps with it; detach() it first")
        return self._advance()

    @outside_dynamo  # again, for an optimizer step inside a compiled function
    def _advance(self) -> MergeStats | None:
        check_outside_transforms()
        if not self._is_training():
            self._count_evaluation()
            return None
        if self._graph.is_capturing():
            self._graph.capture()
            return None
        step = self.step_count
        if not self._recipe.merges_at(step):
            self.step_count = step + 1
            return None
        observed = self._is_observed(step)
        if observed:
            self._take_in_observations()
        weights = self._current_weights()
        settings = self._settings(step)
        merge = self.plan.merge_ if isinstance(self.plan, ShardedPlan) else self._merge_plan
        stats = merge(
            weights,
            seed=self._recipe.seed,
            step=step,
            prob=settings.prob,
            alpha=settings.alpha,
            thresholds=settings.thresholds,
            partner=self._recipe.partner,
        )
        self.step_count = step + 1
        if observed:
            self._observe(settings, stats)
        return stats

    def _merge_plan(self, weights: list[torch.Tensor], **settings: Any) -> MergeStats:
        return merge_plan_(self.plan, weights, **settings)

    def _is_observed(self, step: int) -> bool:
        wanted = self._guard is not None or bool(self._monitor.loggers)
        return wanted and self._recipe.occasion(step) % self._observe_every == 0

    def _is_training(self) -> bool:
        if isinstance(self._model, nn.Module):
            return self._model.training
        return not isinstance(self._model, tuple) or all(getattr(item, "training", True) for item in self._model)

    def _count_evaluation(self) -> None:
        self._steps_in_evaluation += 1
        if self._steps_in_evaluation == EVAL_STEPS and self.step_count == 0:
            warnings.warn(
                f"{EVAL_STEPS} steps of InMerge and all of them in evaluation mode, where nothing is merged; if "
                "this is training, call model.train()",
                NoEffectWarning,
                stacklevel=3,
            )

    # ---------------------------------------------------------------------------------------------- plan and settings

    def _new_plan(self) -> MergePlan:
        is_model = isinstance(self._model, nn.Module) and not is_mergeable_module(self._model)
        if is_model and is_sharded(self._model):  # type: ignore[arg-type]
            return ShardedPlan(self._model, **self._selection)  # type: ignore[arg-type]
        # Layers and weights that were given one by one are meant, frozen or not.
        selection = self._selection if is_model else self._selection | {"include_frozen": True}
        return MergePlan(self._model, **selection)

    def _current_weights(self) -> list[torch.Tensor]:
        weights = self.plan.current_weights()
        if weights is None:  # moved, replaced, frozen, ...
            effect = self.plan.effect
            self.plan = self._new_plan()
            self.plan.effect = effect
            weights = self.plan.weights()
        return weights

    def _settings(self, step: int) -> Settings:
        return Settings(step, self._recipe.alpha_at(step), self._recipe.prob_at(step), self._thresholds(step))

    def _thresholds(self, step: int) -> tuple[float, ...]:
        chosen = self._recipe.threshold
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
            values = [self._recipe.threshold_at(step)] * len(self.plan.layers)
        if self.stopped:
            values = [NEVER if name in self.stopped else v for name, v in zip(self.plan.names, values, strict=True)]
        return tuple(values)

    def _measure_quantiles(self, rate: float) -> dict[str, float]:
        found = {}
        for name, weight, layer in self._layers():
            summary = summarise_layer(name, weight, layer.layout, False)
            found[name] = summary.threshold_for_rate(rate, self._recipe.partner) if summary.pairs else NEVER
        return found

    def _layers(self) -> Iterable[tuple[str, torch.Tensor, Any]]:
        """Name, full weight and layer, one after the other, so that only one sharded weight is gathered at a time."""
        weights: Iterable[torch.Tensor] = self._current_weights()
        if isinstance(self.plan, ShardedPlan):
            weights = self.plan.gathered(list(weights))
        return zip(self.plan.names, weights, self.plan.layers, strict=True)

    # ------------------------------------------------------------------------------------------------------ monitoring

    def _observe(self, settings: Settings, stats: MergeStats) -> None:
        thresholds = dict(zip(self.plan.names, settings.thresholds, strict=True))
        self._monitor.observe(Observation(settings.step, settings.alpha, settings.prob, thresholds, stats))

    def _take_in_observations(self) -> None:
        for observation in self._monitor.due():
            if self._guard is not None:
                self.stopped.update(self._guard.judge(observation.step, observation.layers))

    def flush(self) -> None:
        """Pass to the loggers what has been observed so far, e.g. at the end of the run; waits for the device."""
        self._monitor.flush()

    def effective_rank(self) -> dict[str, float]:
        """Effective rank of each layer's filters, now: N if all are orthogonal, 1 if all are alike.

        See :class:`inmerge_fast.LayerSimilarity`. Takes an eigenvalue decomposition per layer and waits for the device;
        with sharded weights all ranks must call it.
        """
        return {
            name: summarise_layer(name, weight, layer.layout, True).effective_rank
            for name, weight, layer in self._layers()
        }

    # --------------------------------------------------------------------------------------------------- CUDA graphs

    def prepare(self) -> None:
        """Put the numbers of the next step into device memory and count it, before each replay of a captured step.

        What is captured depends on nothing on the host, so schedules, ``start``, ``stop`` and ``every`` go on under
        replay; at a step that does not merge, the replay draws no filter. Also call it once before capturing, which
        allocates and compiles what is needed, and counts nothing in the end::

            merger.prepare()
            with torch.cuda.graph(graph):
                ...
                merger.step()
            for x, y in loader:
                ...
                merger.prepare()
                graph.replay()

        Raises:
            RuntimeError: the weights take the eager path, whose decisions are drawn on the host.
            ValueError: a weight was moved or replaced after the capture: the graph would still write to the old one.
        """
        self._graph.prepare()

    # ------------------------------------------------------------------------------------------------------ optimizer

    def attach(self, optimizer: torch.optim.Optimizer) -> InMerge:
        """Merge after each step of ``optimizer``, so that nothing is left to call.

        With gradient accumulation that is once per optimizer step. A step that a ``GradScaler`` skips merges nothing
        and is not counted; with fused and capturable optimizers, which decide on the device whether to skip, the host
        waits for that decision.

        Returns:
            Itself.

        Raises:
            TypeError: not a ``torch.optim.Optimizer``.
            ValueError: the optimizer does not update these weights, e.g. because it holds copies of them.
            RuntimeError: it is attached already.
        """
        if self._attached is not None:
            raise RuntimeError(
                "this InMerge is attached already; of several optimizers, attach it to the last one to step"
            )
        self._attached = AttachedStep(optimizer, self.plan.weights(), self._advance)
        return self

    @property
    def attached(self) -> bool:
        """Whether it steps with an optimizer."""
        return self._attached is not None

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit-identically, as plain data (``torch.load(weights_only=True)``).

        Functions given as schedules are not in it; the resumed run must construct with the same ones.
        """
        return {
            "version": STATE_VERSION,
            "layers": list(self.plan.names),
            "step_count": self.step_count,
            "recipe": self._recipe.to_plain(),
            "quantiles": dict(self._quantiles),
            "quantiles_of": self._quantiles_of,
            "stopped": sorted(self.stopped),
            "guard": None if self._guard is None else self._guard.state_dict(),
            "pending": [observation.to_plain() for observation in self._monitor.pending],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; seed, schedules, ``start``, ``stop`` and ``every`` come from it.

        Call it on all ranks.

        Raises:
            ValueError: the state is of other layers or of another version, or a schedule was a function and is none
                now, or the other way round. Nothing has changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state has version {state.get('version')!r}, expected {STATE_VERSION}")
        if state["layers"] != self.plan.names:
            other = sorted(set(state["layers"]) ^ set(self.plan.names)) or "their order"
            raise ValueError(
                f"state was saved for other layers, the difference is {other}; construct with the same model and the "
                "same skip_first, exclude, include_linear and include_frozen"
            )
        check_word("step_count", state["step_count"], MAX_STEP)
        self._recipe = self._recipe.restored(state["recipe"])
        self.step_count = state["step_count"]
        self._quantiles, self._quantiles_of = dict(state["quantiles"]), state["quantiles_of"]
        self.stopped = set(state["stopped"])
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])
        self._monitor.pending = [Observation.from_plain(plain) for plain in state["pending"]]

    def _described(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return self._recipe.described() | {
            "guard": repr(self._guard),
            "observe_every": self._observe_every,
            "layers": [(layer.name, layer.layer_id, tuple(layer.shape)) for layer in self.plan.layers],
        }

    def __repr__(self) -> str:
        return f"InMerge(layers={len(self.plan.layers)}, step_count={self.step_count}, seed={self._recipe.seed})"
