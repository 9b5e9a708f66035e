"""What merging costs a layer: how much of its effective rank goes with one merge, from the filters as they are now.

The logarithm of the effective rank that is lost inside merges adds up, over a run, to what the layer lacks at its end
beside the same run without merging. So what merging costs can be measured while a run goes on, without that other run:
merges, which are counted, times the loss that one of them is (:meth:`RankCost.price`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from .effect import OnItsWay
from .layer_similarity import rank_of_gram
from .paths.match import PartnerRule
from .paths.pairs import autocast_off, filters_of
from .plan.filters import FilterLayout
from .reference import MIN_NORM

NEVER = 2.0  # a threshold above every similarity
MOST_FILTERS = 2048  # of a group that are compared: 32 MiB for their similarities
MOST_VALUES = 1024  # eigenvalues of a group: 0.2 s on a CPU thread
MEASURED_SHARE = 1 / 8  # of a layer's filters that may merge before its loss is measured anew
CURE = "a higher threshold or a lower prob prevents it, and InMerge's threshold=RankBudget() finds one"


class Snapshot:
    """What a layer's cost is worked out from, of its filters as they are now, on its way to the host.

    Nobody waits: an accelerator multiplies the filters in the order of its stream, and the copy begins behind that. The
    eigenvalues are the host's work, since an accelerator's library makes the host wait for them.

    Of large groups an evenly spaced part stands for the rest: 2,048 filters, and 1,024 where that makes the eigenvalues
    fewer.

    Args:
        weight: the weight, whole, on any device; not written to.
        layout: where its filters lie.

    Attributes:
        is_wide: whether the filters have at least as many elements as a group has filters.
        share: of the filters that stand for all.
    """

    @torch.no_grad()
    def __init__(self, weight: torch.Tensor, layout: FilterLayout) -> None:
        filters = filters_of(weight, layout, exact=True)
        size = layout.group_size
        kept = min(size, MOST_FILTERS)
        if min(kept, layout.elements) > MOST_VALUES:
            kept = MOST_VALUES
        self.is_wide, self.share = kept <= layout.elements, kept / size
        place = torch.linspace(0, size - 1, kept, device=weight.device).round().long()
        finite = filters.finite[:, place]
        values = filters.values[:, place].masked_fill(~finite[..., None], 0.0)
        if values.device.type == "mps":  # it has no float64
            values = values.cpu().double()
        with autocast_off(values.device.type):
            wanted = values @ values.mT if self.is_wide else values
        self._finite, self._wanted = OnItsWay(finite), OnItsWay(wanted)

    def has_arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self._wanted.has_arrived() and self._finite.has_arrived()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which filters are finite, and the Gram matrix of a wide layer or the filters of another; waits for them."""
        return torch.from_numpy(self._finite.read()), torch.from_numpy(self._wanted.read())


class RankCost:
    """The filters of one layer, all pairs of a group compared with each other, in float64 on the host.

    Args:
        snapshot: the filters. A loss is that of the part that stands for all, and a price is scaled.
        key: what the partners of :meth:`price` are drawn from.

    Attributes:
        rank: the effective rank (:class:`inmerge_fast.LayerSimilarity`); NaN if no filter is finite and not zero.
        pairs: pairs of finite filters.
    """

    @torch.no_grad()
    def __init__(self, snapshot: Snapshot, key: int) -> None:
        self._finite, wanted = snapshot.read()
        self._is_wide, self._share, self._key = snapshot.is_wide, snapshot.share, key
        self._values = None if self._is_wide else wanted
        with autocast_off("cpu"):
            self._gram = wanted if self._is_wide else wanted @ wanted.mT
        scale = _inverse_norms(self._gram.diagonal(dim1=1, dim2=2))
        self._similarity = self._gram * scale[:, :, None] * scale[:, None, :]
        both = self._finite[:, :, None] & self._finite[:, None, :]
        both.diagonal(dim1=1, dim2=2).fill_(False)
        self._similarity.masked_fill_(~both, -math.inf)
        self.pairs = int(both.sum())
        self.rank = self._rank_of(self._values, self._gram)

    def share_above(self, threshold: float, partner: PartnerRule) -> float:
        """The share of sampled filters that would merge, see :meth:`LayerSimilarity.share_above`; 0 without pairs."""
        above = self._above(threshold)
        if partner == "random":
            return float(above.sum()) / max(self.pairs, 1)
        return float(above.any(2).sum()) / max(int(self._finite.sum()), 1)

    def threshold_for(self, share: float, partner: PartnerRule) -> float:
        """The lowest threshold at which no more than a share of the sampled filters would merge.

        Returns:
            A similarity that occurs; ``NEVER`` where the share is less than the most similar pair.
        """
        found = self._similarity if partner == "random" else self._similarity.amax(2)
        found = found[found > -math.inf]
        above = math.floor(share * found.numel() + 1e-9)
        if above < 1:
            return NEVER
        if above >= found.numel():
            return -1.0
        return float(found.kthvalue(found.numel() - above).values)

    def least_share(self, partner: PartnerRule) -> float:
        """The share that the most similar pair is, which merges in both directions."""
        count = self.pairs if partner == "random" else int(self._finite.sum())
        return min(2 / max(count, 1), 1.0)

    @torch.no_grad()
    def price(self, threshold: float, partner: PartnerRule, alpha: float) -> float | None:
        """The logarithm of effective rank that one merge costs at this threshold: the mean, if all that can did so now.

        Every filter that may merge does, once, with the partner that the rule would give it, but for alpha below 0.5
        only one of two that are each other's; nothing is written.

        Returns:
            The loss by merged filter, not below 0, infinite where none but zeros would be left; None where no pair is
            above the threshold.
        """
        above = self._above(threshold)
        moves = above.any(2)
        moved = int(moves.sum())
        if not moved or not math.isfinite(self.rank):
            return None
        if partner == "nearest":
            mate = self._similarity.argmax(2)
        else:
            generator = torch.Generator("cpu").manual_seed(self._key)
            chance = torch.rand(above.shape, generator=generator, device="cpu")
            mate = (chance * above).argmax(2)
        if alpha < 0.5:
            # Two that look at each other would change places, which costs little, at 0 nothing. In a run hardly two of
            # a pair look at once: so one of them stays.
            index = torch.arange(mate.shape[1], device="cpu")
            moves &= ~(moves.gather(1, mate) & (mate.gather(1, mate) == index) & (mate < index))
            moved = int(moves.sum())
        other = moves.to(self._gram.dtype) * (1.0 - alpha)
        own = 1.0 - other
        values = gram = None
        if self._is_wide:  # from the Gram matrix alone: its rows move, and then its columns
            columns = mate[:, None].expand_as(self._gram)
            rows = own[..., None] * self._gram + other[..., None] * self._gram.gather(1, columns.mT)
            gram = own[:, None] * rows + other[:, None] * rows.gather(2, columns)
        else:
            assert self._values is not None
            partners = self._values.gather(1, mate[..., None].expand_as(self._values))
            values = own[..., None] * self._values + other[..., None] * partners
        after = self._rank_of(values, gram)
        if math.isnan(after):  # opposite filters have cancelled each other out, and none is left
            return math.inf
        return max(math.log(self.rank / after), 0.0) / moved * self._share

    def _above(self, threshold: float) -> torch.Tensor:
        # At -1 every pair of finite filters passes; the others have minus infinity.
        return self._similarity > (-math.inf if threshold == -1 else threshold)

    def _rank_of(self, values: torch.Tensor | None, gram: torch.Tensor | None) -> float:
        """Effective rank of filters, from their Gram matrix or that of their elements, whichever is smaller."""
        if self._is_wide:
            assert gram is not None
            scale = _inverse_norms(gram.diagonal(dim1=1, dim2=2))
            return rank_of_gram(gram * scale[:, :, None] * scale[:, None, :])
        assert values is not None
        units = values / torch.linalg.vector_norm(values, dim=2, keepdim=True).clamp(min=MIN_NORM)
        with autocast_off(units.device.type):
            return rank_of_gram(units.mT @ units)


def _inverse_norms(squares: torch.Tensor) -> torch.Tensor:
    return squares.clamp(min=MIN_NORM**2).rsqrt()


@dataclass
class LayerLedger:
    """What merging has cost one layer, as far as it has been measured.

    Attributes:
        filters: number of filters.
        rank_start: effective rank when it was first measured.
        rank: when it was last measured.
        occasion: when that was, in steps that merge or calls.
        merged: merges that are charged.
        spent: the logarithm of effective rank that they have cost.
        price: what one merge cost when it was last measured; None where no pair was above the threshold.
        threshold: the one that a budget has set.
    """

    filters: int
    rank_start: float
    rank: float
    occasion: int
    merged: int
    spent: float = 0.0
    price: float | None = None
    threshold: float = NEVER

    @property
    def lost(self) -> float:
        """The share of the effective rank that merging has cost."""
        return -math.expm1(-self.spent)

    def is_due(self, merged: int) -> bool:
        """Whether so many merges have not been charged that it is time to measure."""
        return merged - self.merged >= max(1.0, MEASURED_SHARE * self.filters)

    def charge(self, cost: RankCost, merged: int, threshold: float, partner: PartnerRule, alpha: float) -> None:
        """Charge the merges since the last time with the mean of their price then and now.

        Args:
            cost: the filters as they are now.
            merged: merges so far.
            threshold: the threshold in force; likewise partner and alpha.
            partner: the rule.
            alpha: share of itself that a merged filter keeps.
        """
        now = cost.price(threshold, partner, alpha)
        count, self.merged = merged - self.merged, merged
        if count:
            prices = [price for price in (self.price, now) if price is not None]
            if not prices:  # nothing is above the threshold, then or now: what would the most similar ones cost?
                similar = cost.price(cost.threshold_for(MEASURED_SHARE, partner), partner, alpha)
                prices = [similar or 0.0]
            self.spent += count * math.fsum(prices) / len(prices)
        self.price, self.rank = now, cost.rank

    def charged(self, cost: RankCost, merged: int, threshold: float, partner: PartnerRule, alpha: float) -> LayerLedger:
        """A copy with the merges since the last time charged, see :meth:`charge`; this one stays as it is."""
        new = LayerLedger(**vars(self))
        new.charge(cost, merged, threshold, partner, alpha)
        return new


def describe_collapse(name: str, ledger: LayerLedger) -> str:
    """What has happened to a layer, for warnings."""
    return (
        f"layer {name} is collapsing: merging has cost it about {100 * ledger.lost:.0f} % of its effective rank, in "
        f"{ledger.merged} merges of its {ledger.filters} filters; the rank is {ledger.rank:.1f} now"
    )


T = TypeVar("T")
_worker: tuple[int, ThreadPoolExecutor] | None = None  # and the process that it is of: a fork has no threads


def may_defer(device: torch.device) -> bool:
    """Whether what filters on ``device`` have cost is worked out in the background: a CPU trains with its cores."""
    return device.type != "cpu"


def in_background(work: Callable[[], T]) -> Future[T]:
    """What ``work`` will return: done by a thread of its own, one after the other, while training goes on.

    Eigenvalues take up to 0.2 s, without Python's lock. The thread must not ask a GPU for anything: a graph that is
    captured meanwhile would become invalid.
    """
    global _worker
    if _worker is None or _worker[0] != os.getpid():
        _worker = os.getpid(), ThreadPoolExecutor(1, "inmerge_fast-rank")
    try:
        return _worker[1].submit(work)
    except RuntimeError:  # the main thread is over, and the one that trains goes on: Python begins no threads then
        return finished(work())


def finished(value: T) -> Future[T]:
    """What is known already, as what :func:`in_background` returns."""
    done: Future[T] = Future()
    done.set_result(value)
    return done
