"""``InMerge`` inside a CUDA graph: the launches are captured once, a step's numbers are put into device memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..plan.filters import check_outside_transforms, mark_written
from ..stats import MergeStats
from .thresholds import NEVER

if TYPE_CHECKING:
    from ..paths.triton.launch import Launcher
    from ..paths.triton.results import Results
    from .inmerge import InMerge, Settings


class GraphSteps:
    """The steps of an :class:`inmerge_fast.InMerge` that are replayed."""

    def __init__(self, merger: InMerge) -> None:
        self._merger = merger
        self._captured: Results | None = None
        self._prepared: Settings | None = None
        self._merges = False  # whether the prepared step does

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured now."""
        return self._merger.plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def prepare(self) -> None:
        """See :meth:`inmerge_fast.InMerge.prepare`."""
        check_outside_transforms()
        merger = self._merger
        plan = merger.plan
        if plan.path != "triton":
            raise RuntimeError(f"CUDA graphs need the kernels, but this plan takes the eager path ({plan.path_reason})")
        if self._captured is not None and not plan.is_current():
            raise ValueError("a weight was moved, replaced or (un)frozen after the capture; capture the graph again")
        weights = merger._current_weights()
        launcher = merger.plan.launcher(weights)
        if self._prepared is None:
            self._warm_up(launcher)
        self._take_in_replay(launcher)
        recipe, step = merger._recipe, merger.step_count
        self._merges = recipe.merges_at(step)
        if self._merges or self._prepared is None:
            self._prepared = merger._settings(step if self._merges else max(recipe.start, step))
        now = dataclasses.replace(self._prepared, step=step)
        if not self._merges:  # the thresholds stay as they are, or they would be copied for nothing
            now = dataclasses.replace(now, alpha=1.0, prob=0.0)
        launcher.prepare(
            recipe.seed, step, prob=now.prob, alpha=now.alpha, threshold=now.thresholds, write=self._merges
        )
        merger.step_count = step + 1

    def capture(self) -> None:
        """Launch what merges whatever is prepared, and leave the prepared step uncounted: capturing runs nothing."""
        merger = self._merger
        weights = merger.plan.current_weights()
        if weights is None or self._prepared is None:
            raise RuntimeError("call prepare() right before capturing: nothing is prepared, or a weight has changed")
        self._captured = merger.plan.launcher(weights).run_from_memory(partner=merger._recipe.partner)
        mark_written(weights)
        self._merges = False
        merger.step_count -= 1

    def _warm_up(self, launcher: Launcher) -> None:
        """Compile and allocate what the captured launches need, in a run that samples nothing."""
        recipe = self._merger._recipe
        with launcher.lock:
            launcher.reserve_scratch(recipe.prob_at(max(recipe.start, self._merger.step_count)))
        nothing = (NEVER,) * len(self._merger.plan.layers)
        launcher.prepare(0, 0, prob=0.0, alpha=1.0, threshold=nothing, write=False)
        launcher.run_from_memory(partner=recipe.partner)

    def _take_in_replay(self, launcher: Launcher) -> None:
        """Observe the replay before this one: its statistics lie where the captured call left them."""
        merger, settings, results = self._merger, self._prepared, self._captured
        if settings is None or results is None or not self._merges:
            return
        plan = merger.plan
        plan.effect.count_call(launcher.totals)
        if merger._is_observed(settings.step):
            merger._take_in_observations()
            stats = MergeStats(
                results, plan.names, plan.filters, skipped=plan.skipped, seed=merger._recipe.seed, step=settings.step,
                dry_run=False, path="triton",
            )  # fmt: skip
            merger._observe(settings, stats)
