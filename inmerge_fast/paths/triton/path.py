"""The Triton kernels as a path."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ...plan.rows import Rows
from ..path import Call, ForNow

if TYPE_CHECKING:
    from .for_now import Keeper
    from .launch import Launcher  # imports Triton
    from .results import Results


class TritonPath:
    """Merges on a GPU, in two launches for all layers at most; or in Triton's interpreter.

    Args:
        rows: the plan's filters.
    """

    name = "triton"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._launcher: Launcher | None = None
        self._keeper: Keeper | None = None
        self._moves = 0  # of weights that the launcher has taken in
        self._lock = threading.Lock()

    @property
    def reason(self) -> str:
        """Why it was chosen."""
        device = self._rows.device
        return "interpreted, INMERGE_INTERPRET is set" if device.type == "cpu" else f"device {device}"

    @cached_property
    def refusal(self) -> str:
        """Why the kernels cannot merge these layers on this machine; empty if they can."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if torch.version.hip:
            # Compiled for gfx942, a release waits for the releasing wave's stores only; nobody has tried it on one.
            return "the kernels are not verified on AMD GPUs"
        from .build import why_unlaunchable
        from .layer_table import can_merge

        if not can_merge(self._rows.layers):
            return "float64 layers, or layers of 2**20 filters and more"
        return why_unlaunchable()

    def launcher(self, weights: Sequence[torch.Tensor]) -> Launcher:
        """The kernels' tables and buffers for these weights, built at the first call."""
        rows = self._rows
        with self._lock:
            if self._launcher is None or (self._moves != rows.moves and not self._launcher.move(weights)):
                from .launch import Launcher

                self._launcher = Launcher(rows.layers, weights, rows.start)
            self._moves = rows.moves
            return self._launcher

    def follow(self) -> None:
        """What is queued next comes after all calls so far, which may have been on another stream."""
        if self._launcher is not None:
            with self._launcher.lock:
                self._launcher.follow_current_stream()

    def release(self) -> None:
        """See :meth:`inmerge_fast.paths.choice.Paths.release`."""
        if self._keeper is not None:
            self.follow()  # what is freed may be given to whoever queues next on this stream
            self._keeper = None
            if self._launcher is not None:
                self._launcher.kept = ()

    def merge(self, weights: Sequence[torch.Tensor], call: Call) -> Results:
        """Queue the launches of a call; see :class:`inmerge_fast.paths.path.Path`."""
        return self.launcher(weights).run(
            call.seed, call.step, prob=call.prob, alpha=call.alpha, threshold=call.thresholds, partner=call.partner,
            dry_run=call.dry_run,
        )  # fmt: skip

    def for_now(self, weights: Sequence[torch.Tensor], call: Call) -> ForNow:
        """See :class:`inmerge_fast.paths.path.Path`."""
        launcher, keeper = self.launcher(weights), self._keeper
        if keeper is None or not keeper.belongs_to(launcher):
            from .for_now import Keeper

            keeper = self._keeper = Keeper(launcher)
        return keeper.for_now(weights, call)
