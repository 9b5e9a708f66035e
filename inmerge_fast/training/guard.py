"""Stops merging in layers that it has cost too much."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from ..draw import check_share
from ..effect import callers_level
from ..rank_cost import CURE, LayerLedger, describe_collapse
from ..stats import CollapseWarning

Action: TypeAlias = Literal["warn", "stop"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass
class CollapseGuard:
    """Stops a layer whose merging has cost it more than a share of its effective rank, and warns once.

    Merging makes filters more alike, and alike filters merge more often: below some threshold, which nobody knows
    beforehand, that does not end before all filters of the layer are the same. What merging has cost is measured, as
    :class:`inmerge_fast.RankBudget` measures it, whatever the threshold is, each time an eighth of a layer's filters
    have merged: so there is nothing to measure and no alarm where nothing merged.

    Attributes:
        loss: share of the effective rank above which a layer has lost too much by merging, in (0, 1).
        action: ``"stop"``, so that the layer is merged no more, or ``"warn"`` for the :class:`CollapseWarning` alone.
    """

    loss: float = 0.1
    action: Action = "stop"
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        check_share("loss", self.loss)
        if not 0.0 < self.loss < 1.0:
            raise ValueError(f"loss must be above 0 and below 1, got {self.loss!r}")
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {ACTIONS}, got {self.action!r}")

    def judge(self, step: int, ledgers: Mapping[str, LayerLedger]) -> list[str]:
        """Judge layers by what merging has cost them until ``step``; returns the names of those to merge no more."""
        guilty = [name for name, ledger in ledgers.items() if ledger.lost > self.loss]
        for name in guilty:
            if name not in self._warned:
                self._warned.add(name)
                message = self._message(name, step, ledgers[name])
                warnings.warn(message, CollapseWarning, stacklevel=callers_level())
        return guilty if self.action == "stop" else []

    def _message(self, name: str, step: int, ledger: LayerLedger) -> str:
        what = "it is merged no more" if self.action == "stop" else 'CollapseGuard(action="stop") would leave it alone'
        return f"{describe_collapse(name, ledger)} (seen at step {step}, limit {100 * self.loss:g} %); {what}; {CURE}"

    def state_dict(self) -> dict[str, Any]:
        """What the guard remembers, as plain data."""
        return {"warned": sorted(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._warned = set(state["warned"])
