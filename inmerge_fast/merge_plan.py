"""``MergePlan``: the layers that are merged, and the path that merges them."""

from __future__ import annotations

import torch

from .effect import EffectMonitor
from .history import CallHistory
from .paths.choice import Paths
from .paths.path import Call, Outcome
from .plan.plan import LayerPlan
from .stats import MergeStats


class MergePlan(LayerPlan):
    """The layers that ``merge_`` works on, found and checked once, and printable.

    ``merge_`` builds and caches one by itself; build one to look at it, or to pass it as ``merge_``'s target::

        plan = inmerge_fast.MergePlan(model, skip_first=10)
        print(plan)
        inmerge_fast.merge_(plan, seed=0, step=step)

    Args:
        target: what to merge, see :func:`inmerge_fast.merge_`.
        skip_first: see :func:`inmerge_fast.merge_`; models only.
        exclude: see :func:`inmerge_fast.merge_`; models only.
        include_linear: see :func:`inmerge_fast.merge_`; models only.
        include_frozen: whether weights that require no gradient take part, too; what is not a model is meant anyway.
        include_heads: see :func:`inmerge_fast.merge_`; models only.
        layer: layer id of a single layer in the draw; 0 for models and iterables, which number their layers.
        may_wait: whether there may be no layer for now, because all of them are frozen.

    Attributes:
        layers: the layers that are merged, in module order.
        skipped: ``(name, reason)`` of every other candidate, in module order where it came from a model.
        candidates: names of all, merged or not, without those that share a weight with one of them.
        frozen: names of those that would be merged if their weights required a gradient.
        heads: names of those that are heads, merged or not.
        paths: the ways to merge them.
        effect: what counts the calls, and watches whether merging does anything.
        history: what watches whether calls of ``merge_`` do too much.

    Raises:
        TypeError: the target or one of its weights has the wrong type.
        ValueError: nothing can be merged, or a weight cannot be rewritten in place.
    """

    def _tabulate(self) -> None:
        super()._tabulate()
        self.paths = Paths(self.rows)
        self.effect = EffectMonitor(len(self.layers))
        self.history = CallHistory()

    def totals(self) -> torch.Tensor:
        """Pairs sampled and merged in each layer by all calls that may write, int64 ``(layers, 2)``; nothing waits."""
        self.paths.follow()
        return self.effect.totals()

    def stats(self, outcome: Outcome, call: Call, path: str) -> MergeStats:
        """What a call on the path of this name has done, as users see it."""
        return MergeStats(
            outcome,
            self.names,
            self.filters,
            skipped=self.skipped,
            seed=call.seed,
            step=call.step,
            dry_run=call.dry_run,
            path=path,
        )

    @property
    def path(self) -> str:
        """What merges these layers now: "cpu" (the kernel in C), "triton" (the GPU's kernels) or "eager" (PyTorch)."""
        return self.paths.choose().name

    @property
    def path_reason(self) -> str:
        """Why :attr:`path` is what it is."""
        return self.paths.choose().reason

    def __str__(self) -> str:
        first, *others = super().__str__().split("\n")
        return "\n".join([f"{first}; path: {self.path} ({self.path_reason})", *others])

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, path={self.path!r})"
