"""``similarity``: what the filters of a network look like to each other, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..paths.match import check_partner_rule
from ..paths.pairs import filters_of, similarity_blocks
from ..plan.filters import FilterLayout
from ..plan.plan import MergePlan, Target
from ..stats import describe_skipped

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

    def share_above(self, threshold: float, partner: str = "random") -> float:
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

    def threshold_for_rate(self, rate: float, partner: str = "random") -> float:
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

    def _counts(self, partner: str) -> npt.NDArray[np.int64]:
        check_partner_rule(partner)
        if not self.pairs:
            raise ValueError(f"{self.name}: fewer than two filters of a group are finite; there is nothing to compare")
        return self.pair_counts if partner == "random" else self.nearest_counts


class Similarity:
    """Result of :func:`similarity`: one summary per layer, and each layer's matrix on request.

    Attributes:
        layers: the summaries, in module order.
        skipped: ``(name, reason)`` of every other candidate layer.
    """

    def __init__(
        self, plan: MergePlan, layers: Sequence[LayerSimilarity], skipped: Sequence[tuple[str, str]], kept: object
    ) -> None:
        self.layers = tuple(layers)
        self.skipped = tuple(skipped)
        self._plan = plan
        self._kept = kept  # the plan refers to its weights weakly, and a state dict may be all that holds them

    def __getitem__(self, name: str) -> LayerSimilarity:
        return self.layers[self._index(name)]

    def matrix(self, name: str | None = None) -> torch.Tensor:
        """The similarities of all filters of one layer, computed now, from the weight as it is now.

        Args:
            name: the layer; may be left out if there is only one.

        Returns:
            ``(N, N)``, float64 on the weight's device (float32 on MPS). The diagonal is 1, or 0 for zero filters; NaN
            where a filter is not finite and between groups.

        Raises:
            KeyError: there is no such layer.
            ValueError: ``name`` is missing though there are several layers, or the weight is gone.
        """
        if name is None and len(self.layers) > 1:
            raise ValueError(f"name must be one of the {len(self.layers)} layers, e.g. {self.layers[0].name!r}")
        index = 0 if name is None else self._index(name)
        filters = filters_of(self._plan.weights()[index], self._plan.layers[index].layout, exact=True)
        groups, size, _ = filters.values.shape
        matrix = filters.values.new_full((groups, size, groups, size), torch.nan)
        everyone = torch.arange(size, device=matrix.device)
        for g in range(groups):
            finite = filters.finite[g]
            for block, rows in similarity_blocks(everyone, filters.values[g], filters.inverse_norms[g]):
                matrix[g, block, g] = rows.masked_fill(~(finite & finite[block, None]), torch.nan)
        return matrix.view(groups * size, groups * size)

    def threshold_for_rate(self, rate: float, partner: str = "random") -> dict[str, float]:
        """Each layer's threshold for a wanted merge rate, by name; see :meth:`LayerSimilarity.threshold_for_rate`."""
        return {layer.name: layer.threshold_for_rate(rate, partner) for layer in self.layers}

    def _index(self, name: str) -> int:
        for index, layer in enumerate(self.layers):
            if layer.name == name:
                return index
        raise KeyError(f"no layer {name!r}; there are {', '.join(repr(layer.name) for layer in self.layers)}")

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{'layer':{width}}  filters      D  zero  eff. rank     mean      std   1/sqrt(D)      50 %      99 %"
            "       max  above 0.3"
        ]
        for s in self.layers:
            median, high, above = (
                (s.quantile(0.5), s.quantile(0.99), s.share_above(0.3)) if s.pairs else (math.nan,) * 3
            )
            lines.append(
                f"{s.name:{width}}  {s.filters:7d}  {s.elements:5d}  {s.zero:4d}  {s.effective_rank:9.1f}  "
                f"{s.mean:7.4f}  {s.std:7.4f}  {s.elements**-0.5:10.4f}  {median:8.4f}  {high:8.4f}  {s.max:8.4f}  "
                f"{100 * above:7.3f} %"
            )
        return "\n".join(lines + describe_skipped(self.skipped))

    def __repr__(self) -> str:
        return f"Similarity(layers={len(self.layers)}, skipped={len(self.skipped)})"


def similarity(
    target: Target | MergePlan | Mapping[str, object],
    *,
    skip_first: float = 0,
    exclude: str | Sequence[str] = (),
    include_linear: bool = False,
    effective_rank: bool = True,
) -> Similarity:
    """Compare all filters of each layer with each other: look before merging. Changes nothing.

    Args:
        target: a convolution, a ``Linear``, a weight tensor, an iterable of those, a model, or a
            :class:`inmerge_fast.MergePlan`; see :func:`inmerge_fast.merge_`. Or a state dict: its floating-point
            tensors of at least 3 dimensions (2 with ``include_linear``), each with its filters along dim 0 and in one
            group, since a state dict does not say which are transposed or grouped.
        skip_first: see :func:`inmerge_fast.merge_`; here no layer is left out by default.
        exclude: see :func:`inmerge_fast.merge_`.
        include_linear: see :func:`inmerge_fast.merge_`.
        effective_rank: whether to compute it too, which takes an eigenvalue decomposition per layer.

    Returns:
        A summary of each layer, printable as a table. Only a block of a layer's similarities is in memory at a time.

    Raises:
        TypeError: an argument or a weight has the wrong type.
        ValueError: see :func:`inmerge_fast.merge_`.

    Example::

        found = inmerge_fast.similarity(model)
        print(found)
        thresholds = found.threshold_for_rate(0.05)  # by layer: 5 % of the sampled pairs would merge
    """
    kept = None
    if isinstance(target, MergePlan):
        if (skip_first, exclude, include_linear) != (0, (), False):
            raise ValueError("skip_first, exclude and include_linear are set where a MergePlan is built")
        plan = target
    elif isinstance(target, Mapping):
        kept = target = _weights_of(target, skip_first, exclude, 2 if include_linear else 3)
        plan = MergePlan(list(target.values()))
    else:
        plan = MergePlan(target, skip_first=skip_first, exclude=exclude, include_linear=include_linear)
    names, skipped = [layer.name for layer in plan.layers], list(plan.skipped)
    if isinstance(target, dict):
        keys = list(target)
        names = [keys[layer.layer_id] for layer in plan.layers]
        skipped = [(keys[int(name.split(":")[0])], reason) for name, reason in plan.skipped]
    layers = [
        summarise_layer(name, weight, layer.layout, effective_rank)
        for name, layer, weight in zip(names, plan.layers, plan.weights(), strict=True)
    ]
    return Similarity(plan, layers, skipped, kept)


def _weights_of(
    state: Mapping[str, object], skip_first: float, exclude: str | Sequence[str], dims: int
) -> dict[str, torch.Tensor]:
    if skip_first != 0 or exclude not in ((), ""):
        raise ValueError("skip_first and exclude choose among the layers of a model; leave entries out of the dict")
    weights = {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= dims
    }
    if not weights:
        raise ValueError(f"the state dict has {len(state)} entries, but no floating-point tensor of {dims} dimensions")
    return weights


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
            rows = torch.arange(len(found), device=found.device)
            found[rows, rows + block.start] = torch.nan
            others = found[~found.isnan()]
            sums += torch.stack([others.new_tensor(others.numel()), others.sum(), others.square().sum()])
            nearest = found.nan_to_num(nan=-torch.inf).amax(1)
            largest = torch.maximum(largest, nearest.max())
            pair_counts += _histogram(others)
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
    )


def _histogram(values: torch.Tensor) -> torch.Tensor:
    # Counted as integers, which is deterministic on a GPU; rounding can take a similarity out of [-1, 1].
    return torch.bincount(((values + 1) / RESOLUTION).long().clamp_(0, BINS - 1), minlength=BINS)


def _effective_rank(units: torch.Tensor) -> float:
    transposed = units.transpose(1, 2)
    # The singular values are the roots of the eigenvalues of either Gram matrix; the smaller one takes less time.
    gram = units @ transposed if units.shape[1] <= units.shape[2] else transposed @ units
    values = torch.linalg.eigvalsh(gram).clamp_(min=0.0).sqrt_().flatten()
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def _check_in(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
