"""How alike the filters of one layer are, all pairs of them, in a few numbers and two histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from .paths.match import PartnerRule, check_partner_rule
from .paths.pairs import filters_of, similarity_blocks
from .plan.filters import FilterLayout

BINS = 20_000  # of a histogram over [-1, 1]
RESOLUTION = 2 / BINS  # 1e-4: thresholds of four decimals lie between two bins


def _edge_above(value: float) -> int:
    """Number of the first bin that holds nothing below ``value`` (and of its lower edge)."""
    return math.ceil((value + 1) / RESOLUTION - 1e-6)


@dataclass(frozen=True)
class LayerSimilarity:
    """The pairwise cosine similarities of one layer's filters, summarised without an N x N matrix.

    A pair (i, j) is filter i and another filter j of its group, both finite; (j, i) counts as another pair. Shares and
    quantiles come from histograms with bins of 1e-4 (:data:`RESOLUTION`).

    Attributes:
        name: qualified name of the layer.
        filters: number of filters N.
        groups: number of groups; filters of different groups are not compared.
        elements: elements D per filter.
        finite: filters with a finite squared norm; the others are left out.
        zero: filters that are all zero; their similarity is 0.
        pairs: number of pairs.
        mean: mean similarity of the pairs; NaN if there are none, as are the next two.
        std: their standard deviation. Random filters have ``1 / sqrt(D)``.
        max: the largest.
        effective_rank: ``exp`` of the entropy of the singular values, normalised to sum 1, of the matrix of filters
            divided by their norms (Roy and Vetterli, "The effective rank", EUSIPCO 2007): N if all are orthogonal,
            1 if all are alike. NaN if it was not wanted.
        pair_counts: int64 ``(BINS,)``, pairs by similarity, from -1 to 1.
        nearest_counts: int64 ``(BINS,)``, filters by the similarity of their nearest other filter.
        kernel: size of the convolution's kernel; empty for a Linear layer.
    """

    name: str
    filters: int
    groups: int
    elements: int
    finite: int
    zero: int
    pairs: int
    mean: float
    std: float
    max: float
    effective_rank: float
    pair_counts: npt.NDArray[np.int64] = field(repr=False)
    nearest_counts: npt.NDArray[np.int64] = field(repr=False)
    kernel: tuple[int, ...] = ()

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a 1x1 convolution, which looks at one place at a time."""
        return bool(self.kernel) and set(self.kernel) == {1}

    def share_above(self, threshold: float, partner: PartnerRule = "random") -> float:
        """The share of sampled filters that would merge at ``threshold``; times ``prob``, of all filters per call.

        Args:
            threshold: in [-1, 1], rounded up to a multiple of 1e-4.
            partner: the rule. For ``"random"`` this is the share of pairs above the threshold, for ``"nearest"`` and
                ``"similar"`` that of filters whose nearest other filter is above it.

        Raises:
            TypeError: ``partner`` is not a string.
            ValueError: an argument is out of its range, or the layer has no finite pair.
        """
        _check_in("threshold", threshold, -1.0, 1.0)
        counts = self._counts(partner)
        return float(counts[_edge_above(threshold) :].sum() / counts.sum())

    def threshold_for_rate(self, rate: float, partner: PartnerRule = "random") -> float:
        """The lowest multiple of 1e-4 at which at most a share ``rate`` of the sampled filters would merge.

        ``merge_`` with this threshold and probability p then rewrites about ``p * rate`` of the layer's filters.

        Args:
            rate: wanted share of the sampled filters, in [0, 1].
            partner: the rule, see :meth:`share_above`.

        Returns:
            The threshold, in [-1, 1]. It is 1 where more than ``rate`` of the pairs are duplicates.

        Raises:
            TypeError: ``partner`` is not a string.
            ValueError: an argument is out of its range, or the layer has no finite pair.
        """
        _check_in("rate", rate, 0.0, 1.0)
        counts = self._counts(partner)
        above = np.concatenate([counts[::-1].cumsum()[::-1], [0]])  # from each edge upwards
        edge = int(np.argmax(above <= rate * counts.sum() * (1 + 1e-12)))
        return round(edge * RESOLUTION - 1, 4)

    def quantile(self, share: float) -> float:
        """The similarity that a share ``share`` of the pairs do not exceed, rounded up to a multiple of 1e-4."""
        _check_in("share", share, 0.0, 1.0)
        return self.threshold_for_rate(1 - share)

    def _counts(self, partner: PartnerRule) -> npt.NDArray[np.int64]:
        check_partner_rule(partner)
        if not self.pairs:
            raise ValueError(f"{self.name}: fewer than two filters of a group are finite; there is nothing to compare")
        return self.pair_counts if partner == "random" else self.nearest_counts


@torch.no_grad()
def summarise_layer(name: str, weight: torch.Tensor, layout: FilterLayout, effective_rank: bool) -> LayerSimilarity:
    """Summary of one weight, see :func:`similarity`."""
    filters = filters_of(weight, layout, exact=True)
    values, finite = filters.values, filters.finite
    groups, _, elements = values.shape
    pair_counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    nearest_counts = torch.zeros_like(pair_counts)
    sums = values.new_zeros(3)  # pairs, similarity, its square
    largest = values.new_full((), -torch.inf)
    for g in range(groups):
        members = finite[g].nonzero()[:, 0]
        if len(members) < 2:
            continue
        everyone = torch.arange(len(members), device=members.device)
        for block, found in similarity_blocks(everyone, values[g, members], filters.inverse_norms[g, members]):
            own = found.diagonal(block.start)  # each filter with itself, which is no pair: 0, and counted out again
            own.zero_()
            sums += torch.stack([found.new_tensor(found.numel() - len(own)), found.sum(), found.square().sum()])
            pair_counts += _histogram(found)
            pair_counts -= len(own) * _histogram(own[:1])
            own.fill_(-torch.inf)
            nearest = found.amax(1)
            largest = torch.maximum(largest, nearest.max())
            nearest_counts += _histogram(nearest)
    pairs, total, square = sums.tolist()
    mean = total / pairs if pairs else math.nan
    return LayerSimilarity(
        name=name,
        filters=layout.filters,
        groups=groups,
        elements=elements,
        finite=int(finite.sum()),
        zero=int((values == 0).all(2).sum()),
        pairs=int(pairs),
        mean=mean,
        std=math.sqrt(max(square / pairs - mean * mean, 0.0)) if pairs else math.nan,
        max=float(largest) if pairs else math.nan,
        effective_rank=_effective_rank(filters.units()) if effective_rank else math.nan,
        pair_counts=pair_counts.cpu().numpy(),
        nearest_counts=nearest_counts.cpu().numpy(),
        kernel=tuple(weight.shape[2:]),
    )


def _histogram(values: torch.Tensor) -> torch.Tensor:
    # Counted as integers, which is deterministic on a GPU; rounding can take a similarity out of [-1, 1].
    return torch.bincount(((values.flatten() + 1) / RESOLUTION).long().clamp_(0, BINS - 1), minlength=BINS)


def _effective_rank(units: torch.Tensor) -> float:
    transposed = units.transpose(1, 2)
    # The singular values are the roots of the eigenvalues of either Gram matrix; the smaller one takes less time.
    gram = units @ transposed if units.shape[1] <= units.shape[2] else transposed @ units
    return rank_of_gram(gram)


def rank_of_gram(gram: torch.Tensor) -> float:
    """Effective rank of filters of norm 1 from their Gram matrices by group, ``(groups, n, n)``; NaN if all are 0."""
    values = torch.linalg.eigvalsh(gram).clamp_(min=0.0).sqrt_().flatten()
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def _check_in(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
