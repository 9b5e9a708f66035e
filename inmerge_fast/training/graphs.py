"""Merging inside a CUDA graph: the launches are captured once, a step's numbers are put into device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..paths.path import Call
from ..plan.filters import check_outside_transforms, mark_written
from ..rank_cost import NEVER
from ..stats import MergeStats
from .run import MergeRun

if TYPE_CHECKING:
    from ..paths.triton.launch import Launcher
    from ..paths.triton.results import Results


class GraphSteps:
    """The steps of a run that are replayed."""

    def __init__(self, run: MergeRun) -> None:
        self._run = run
        self._captured: Results | None = None
        self._moves = 0  # of weights until the capture
        self._prepared: Call | None = None
        self._merges = False  # whether the prepared step does

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured now."""
        return self._run.plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def prepare(self) -> None:
        """See :meth:`inmerge_fast.InMerge.prepare`."""
        check_outside_transforms()
        run, plan = self._run, self._run.plan
        if not plan.layers:
            raise RuntimeError("all layers are frozen, so there is nothing that a CUDA graph could merge")
        path = plan.paths.choose()
        if path is not plan.paths.triton:
            raise RuntimeError(
                f"CUDA graphs need the kernels, but this plan takes the {path.name} path ({path.reason})"
            )
        if self._captured is not None and not (plan.is_current() and plan.rows.moves == self._moves):
            raise ValueError("a weight was moved, replaced or (un)frozen after the capture; capture the graph again")
        launcher = self._launcher(run.current_weights())
        if self._prepared is None:
            self._warm_up(launcher)
        self._take_in_replay(launcher)
        recipe, step = run.recipe, run.step_count
        self._merges = recipe.merges_at(step)
        if self._merges:
            self._prepared = run.call_at(step)
        elif self._prepared is None:
            self._prepared = run.idle_call(step)
        now = self._prepared
        if not self._merges:  # the thresholds stay as they are, or they would be copied for nothing
            now = now._replace(alpha=1.0, prob=0.0)
        launcher.prepare(
            recipe.seed, step, prob=now.prob, alpha=now.alpha, threshold=now.thresholds, write=self._merges
        )
        run.step_count = step + 1

    def capture(self) -> None:
        """Launch what merges whatever is prepared, and leave the prepared step uncounted: capturing runs nothing."""
        run = self._run
        weights = run.plan.current_weights()
        if weights is None or self._prepared is None:
            raise RuntimeError("call prepare() right before capturing: nothing is prepared, or a weight has changed")
        self._captured = self._launcher(weights).run_from_memory(partner=run.recipe.partner, again=self._captured)
        self._moves = run.plan.rows.moves
        mark_written(weights)
        self._merges = False
        run.step_count -= 1

    def _launcher(self, weights: list[torch.Tensor]) -> Launcher:
        return self._run.plan.paths.triton.launcher(weights)

    def _warm_up(self, launcher: Launcher) -> None:
        """Compile and allocate what the captured launches need, in a run that samples nothing."""
        run, recipe = self._run, self._run.recipe
        with launcher.lock:
            launcher.reserve_scratch(recipe.prob_at(max(recipe.start, run.step_count)))
        nothing = (NEVER,) * len(run.plan.layers)
        launcher.prepare(0, 0, prob=0.0, alpha=1.0, threshold=nothing, write=False)
        launcher.run_from_memory(partner=recipe.partner)

    def _take_in_replay(self, launcher: Launcher) -> None:
        """Observe the replay before this one: its statistics lie where the captured call left them."""
        run, replayed, results = self._run, self._prepared, self._captured
        if replayed is None or results is None or not self._merges:
            return
        plan = run.plan
        results.count_in(plan.effect)
        if run.is_observed(replayed.step):
            run.monitor.log_due()
            stats = MergeStats(
                results, plan.names, plan.filters, skipped=plan.skipped, seed=replayed.seed, step=replayed.step,
                dry_run=False, path="triton",
            )  # fmt: skip
            run.observe(replayed, stats)
