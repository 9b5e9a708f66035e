"""What a path is: one way of merging the layers of a plan. All ways do the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch

from ..effect import EffectMonitor
from ..stats import SampledPairs
from .match import PartnerRule


class Call(NamedTuple):
    """The numbers of one call, checked by whoever composes it.

    Attributes:
        seed: see :func:`inmerge_fast.merge_`, as are step, prob, alpha, partner and dry_run.
        step: step of the draw.
        prob: probability that a filter looks at a partner.
        alpha: share of itself that a merged filter keeps.
        thresholds: one for all layers, or one for each; above 1 for a layer that is measured and never merged.
        partner: the partner rule.
        dry_run: write nothing.
    """

    seed: int
    step: int
    prob: float
    alpha: float
    thresholds: float | Sequence[float]
    partner: PartnerRule = "random"
    dry_run: bool = False

    def threshold_of_each(self, layers: int) -> Sequence[float]:
        """One threshold for each of so many layers."""
        return [self.thresholds] * layers if isinstance(self.thresholds, (float, int)) else self.thresholds


class Outcome(Protocol):
    """What a call has measured, perhaps still in device memory."""

    def __call__(self) -> SampledPairs:
        """Wait for it and copy it to the host."""

    def count_in(self, effect: EffectMonitor) -> None:
        """Tell the monitor, without waiting."""


class ForNow(Protocol):
    """A merge of a plan's weights that is undone again. Made before anything is written, so that nothing can be lost.

    ``merge`` may be interrupted anywhere: ``restore`` puts back what was written until then.
    """

    def merge(self) -> Outcome:
        """Merge the weights in place, keeping what the filters were."""

    def restore(self, changed: Collection[int] = ()) -> None:
        """Put every filter back as it was, to the bit; again and again does no harm.

        Args:
            changed: places of layers that are left alone.
        """

    def old(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What filters of the layer at ``place`` were: their indices, int64 ``(A,)``, and themselves, ``(A, D)``.

        At least those that were written to.
        """


class Path(Protocol):
    """One way of merging a plan's layers."""

    @property
    def name(self) -> str:
        """How plans and statistics call it."""

    @property
    def reason(self) -> str:
        """Why it was chosen, in a few words."""

    def merge(self, weights: Sequence[torch.Tensor], call: Call) -> Outcome:
        """Merge the plan's weights in place.

        Args:
            weights: the weights as they are now, in the plan's order.
            call: what to do.

        Returns:
            What was measured.
        """

    def for_now(self, weights: Sequence[torch.Tensor], call: Call) -> ForNow:
        """The same, to be undone; nothing is written yet. The weights must stay where they are until then."""
