"""The path of plain PyTorch: every device, and wherever a faster path cannot run or may not.

Decisions are drawn on the host, so only sampled filters are touched: two gathers, three row reductions, one blend and
one scatter per layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..effect import EffectMonitor
from ..plan.filters import FilterLayout, compute_dtype
from ..plan.rows import Rows
from ..reference import MIN_NORM
from ..stats import SampledPairs
from .match import match_rows
from .pairs import autocast_off
from .path import Call


class EagerPath:
    """Merges layer after layer with PyTorch's own operators.

    Args:
        rows: the plan's filters.
        reason: why no faster path is taken.
    """

    name = "eager"

    def __init__(self, rows: Rows, reason: str) -> None:
        self._rows, self.reason = rows, reason

    def merge(self, weights: Sequence[torch.Tensor], call: Call) -> EagerPairs:
        """See :class:`inmerge_fast.paths.path.Path`."""
        coin, partner = self._rows.draw(call.seed, call.step, call.prob)
        return merge_drawn_(self._rows, weights, coin, partner, call)

    def for_now(self, weights: Sequence[torch.Tensor], call: Call) -> EagerForNow:
        """See :class:`inmerge_fast.paths.path.Path`."""
        return EagerForNow(self._rows, weights, call)


class EagerForNow:
    """See :class:`inmerge_fast.paths.path.ForNow`. All sampled filters are kept: to ask which merge is to wait."""

    def __init__(self, rows: Rows, weights: Sequence[torch.Tensor], call: Call) -> None:
        self._rows, self._weights, self._call = rows, weights, call
        self._old: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def merge(self) -> EagerPairs:
        """Merge, see there."""
        coin, partner = self._rows.draw(self._call.seed, self._call.step, self._call.prob)
        old = []
        for layer, weight, place in zip(self._rows.layers, self._weights, self._rows.of_layers(), strict=True):
            sampled = torch.from_numpy(coin[place].nonzero()[0]).to(weight.device)
            old.append((sampled, layer.layout.gather(layer.layout.rows(weight), sampled)))
        self._old = old
        return merge_drawn_(self._rows, self._weights, coin, partner, self._call)

    @torch.no_grad()
    def restore(self, changed: Collection[int] = ()) -> None:
        """Put back, see there."""
        for place, (sampled, values) in enumerate(self._old):
            if place not in changed:
                layout = self._rows.layers[place].layout
                layout.scatter_(layout.rows(self._weights[place]), sampled, values)

    def old(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What filters were, see there."""
        if not self._old:  # it has not come to a write yet
            weight = self._weights[place]
            return weight.new_empty(0, dtype=torch.int64), weight.new_empty(0, self._rows.layers[place].layout.elements)
        return self._old[place]


@dataclass(frozen=True)
class EagerPairs:
    """What the eager path has measured, on the weights' device; attributes as in :class:`SampledPairs`."""

    counts: npt.NDArray[np.int64]
    similarity: torch.Tensor
    passed: torch.Tensor

    def __call__(self) -> SampledPairs:
        """Wait for the device and copy the results to the host."""
        return SampledPairs(self.counts, self.similarity.cpu().double().numpy(), self.passed.cpu().numpy())

    def count_in(self, effect: EffectMonitor) -> None:
        """Tell the monitor, without waiting."""
        effect.count_pairs(self.counts, self.similarity, self.passed)


def merge_drawn_(
    rows: Rows,
    weights: Sequence[torch.Tensor],
    coin: npt.NDArray[np.bool_],
    partner: npt.NDArray[np.int64],
    call: Call,
) -> EagerPairs:
    """Merge layers in place with the coins and random partners of their filters, ``(rows,)`` each.

    Returns:
        The pairs, with similarity NaN for a filter that found no partner.
    """
    counts = np.add.reduceat(coin, rows.start[:-1], dtype=np.int64)
    thresholds = call.threshold_of_each(len(weights))
    found = coin
    if call.partner != "random":
        partner = match_rows(rows, weights, coin, call.partner, thresholds, seed=call.seed, step=call.step)
        found = coin & (partner >= 0)
    each = []
    for layer, weight, threshold, place in zip(rows.layers, weights, thresholds, rows.of_layers(), strict=True):
        own = found[place].nonzero()[0]
        pairs = merge_layer_(
            weight, layer.layout, own, partner[place][own], alpha=call.alpha, threshold=threshold, dry_run=call.dry_run
        )
        each.append(pairs)
    similarity, passed = map(torch.cat, zip(*each, strict=True))
    if found is not coin and not np.array_equal(found, coin):
        kept = found[coin]
        similarity, passed = _spread(similarity, kept, torch.nan), _spread(passed, kept, False)
    return EagerPairs(counts, similarity, passed)


def _spread(values: torch.Tensor, found: npt.NDArray[np.bool_], missing: float) -> torch.Tensor:
    """``values`` of the sampled filters that found a partner, with ``missing`` for those that did not."""
    spread = values.new_full((found.size,), missing)
    spread[torch.from_numpy(found).to(values.device)] = values
    return spread


@torch.no_grad()
def merge_layer_(
    weight: torch.Tensor,
    layout: FilterLayout,
    sampled: npt.NDArray[np.int64],
    partner: npt.NDArray[np.int64],
    *,
    alpha: float,
    threshold: float,
    dry_run: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the sampled filters of one weight, in place, without waiting for the device.

    Args:
        weight: the weight.
        layout: where its filters lie.
        sampled: indices of the filters whose coin fell, ``(A,)``, ascending.
        partner: their partners, ``(A,)``.
        alpha: share of itself that a merged filter keeps.
        threshold: see :func:`inmerge_fast.merge_`.
        dry_run: only measure.

    Returns:
        similarity: ``(A,)`` in the compute dtype (float32, or float64 for float64 weights), on the weight's device;
            NaN for pairs with a non-finite filter.
        passed: bool ``(A,)``.
    """
    device = weight.device
    dtype = compute_dtype(weight)
    rows = layout.rows(weight)
    own = torch.from_numpy(sampled).to(device)
    with autocast_off(device.type):
        old = layout.gather(rows, own)
        x, y = old.to(dtype), layout.gather(rows, torch.from_numpy(partner).to(device)).to(dtype)
        norm_x, norm_y = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y, dim=1)
        # A batched matrix product for the row dots would be 10 times less accurate.
        similarity = (x * y).sum(1) / (norm_x.clamp(min=MIN_NORM) * norm_y.clamp(min=MIN_NORM))
        # Finite means a finite squared norm: a norm of 1e20 is finite in float32, but its square is not.
        finite = (norm_x * norm_x).float().isfinite() & (norm_y * norm_y).float().isfinite()
        passed = finite if threshold == -1 else finite & (similarity > threshold)
        similarity = similarity.masked_fill(~finite, torch.nan)
        if not dry_run and sampled.size:
            # Rounded after each product, like the reference and the kernel: equal to the bit, which lerp_ is not. All
            # sampled filters are written, since to ask which ones merge would stall the host.
            new = (x * alpha).add_(y.mul_(1.0 - alpha)).to(weight.dtype)
            layout.scatter_(rows, own, torch.where(passed[:, None], new, old))
    return similarity, passed
