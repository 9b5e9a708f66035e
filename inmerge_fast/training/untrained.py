"""Layers that the optimizer does not hold: merged after its steps only if something else trains them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence

import torch

from ..effect import callers_level
from ..plan.plan import LayerPlan
from ..stats import NoEffectWarning

PATIENCE = 16  # merging steps before a warning says that nothing trains a layer


class Untrained:
    """Tells which layers nobody has trained since they were merged last.

    Of several optimizers one is attached to, and the others may train what it does not hold: every step of theirs
    raises the version of the weights that they write. Where nothing does, as where only a head is trained and nobody
    has frozen the rest, merging step after step would change, and in the end collapse, what nothing repairs.

    Args:
        plan: the plan.
        held: gives the identities of all that the optimizer holds.
        name: how a warning calls the optimizer.
    """

    def __init__(self, plan: LayerPlan, held: Callable[[], Collection[int]], name: str) -> None:
        self._held, self._name = held, name
        self._of: weakref.ref[LayerPlan] | None = None
        self._others: list[tuple[str, int]] = []  # names and places of layers that the optimizer does not hold
        self._versions: dict[str, int] = {}  # of their weights after the last merge
        self._never = 0  # merging steps so far, while some of them were never trained
        self._trained: set[str] = set()
        self._look_at(plan, plan.weights())

    def _look_at(self, plan: LayerPlan, weights: Sequence[torch.Tensor]) -> None:
        held, self._of = self._held(), weakref.ref(plan)
        self._others = [
            (name, place)
            for place, (name, weight) in enumerate(zip(plan.names, weights, strict=True))
            if id(weight) not in held and type(weight) in (torch.Tensor, torch.nn.Parameter)
            and not weight.is_inference()
        ]  # fmt: skip
        now = {name: weights[place]._version for name, place in self._others}
        self._versions = now | {name: was for name, was in self._versions.items() if name in now}

    def idle(self, plan: LayerPlan) -> set[str]:
        """Names of the layers that have not been trained since the last merge."""
        if self._of is None or self._of() is not plan:
            self._look_at(plan, plan.weights())
        weights = plan.weights() if self._others else []
        return {name for name, place in self._others if weights[place]._version == self._versions[name]}

    def merged(self, weights: Sequence[torch.Tensor], idle: Collection[str]) -> None:
        """All layers but the idle ones have been merged, and their versions mean nothing any more."""
        if not self._others:
            return
        self._trained |= {name for name, _ in self._others if name not in idle}
        self._versions = {name: weights[place]._version for name, place in self._others}
        never = [name for name, _ in self._others if name not in self._trained]
        self._never += bool(never)
        if never and self._never == PATIENCE:
            warnings.warn(
                f"{', '.join(never)}: not merged, since nothing trains these layers: the {self._name} that InMerge is "
                "attached to does not hold their weights, and nothing else has written to them. Give them to an "
                "optimizer; or leave them out, by exclude= or by freezing them (requires_grad_(False))",
                NoEffectWarning,
                stacklevel=callers_level(),
            )
