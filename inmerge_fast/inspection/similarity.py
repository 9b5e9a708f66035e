"""``similarity``: what the filters of a network look like to each other, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..layer_similarity import LayerSimilarity, summarise_layer
from ..merge_plan import MergePlan
from ..paths.pairs import filters_of, similarity_blocks
from ..plan.plan import Target
from ..stats import describe_skipped


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
    skip_first: float | str | Sequence[str] = 0,
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
        skip_first: see :func:`inmerge_fast.merge_`; here no layer is left out by default, frozen ones neither.
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
        plan = MergePlan(
            target, skip_first=skip_first, exclude=exclude, include_linear=include_linear, include_frozen=True
        )
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
    state: Mapping[str, object], skip_first: object, exclude: str | Sequence[str], dims: int
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
