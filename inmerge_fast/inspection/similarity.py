"""``similarity``: what the filters of a network look like to each other, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..layer_similarity import LayerSimilarity, summarise_layer
from ..merge_plan import MergePlan
from ..paths.match import PartnerRule
from ..paths.pairs import filters_of, similarity_blocks
from ..plan.plan import Target
from ..stats import describe_skipped
from .bar import Bar
from .looks import Look, Selection, looks_at

PICTURED_LAYERS = 3
MOST_PICTURED = 4096  # filters of a layer: its matrix takes 128 MiB


class Similarity:
    """Result of :func:`similarity`: one summary per layer, and each layer's matrix on request.

    Attributes:
        layers: the summaries, in module order.
        skipped: ``(name, reason)`` of every other candidate layer.
    """

    def __init__(
        self, layers: Sequence[LayerSimilarity], skipped: Sequence[tuple[str, str]], looks: Sequence[Look]
    ) -> None:
        self.layers = tuple(layers)
        self.skipped = tuple(skipped)
        self._looks = tuple(looks)

    def __getitem__(self, name: str) -> LayerSimilarity:
        return self.layers[self._index(name)]

    def look(self, name: str) -> Look:
        """Where a layer's weight is read.

        Raises:
            KeyError: there is no such layer.
        """
        return self._looks[self._index(name)]

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
        filters = filters_of(*self._looks[index].weight(), exact=True)
        groups, size, _ = filters.values.shape
        matrix = filters.values.new_full((groups, size, groups, size), torch.nan)
        everyone = torch.arange(size, device=matrix.device)
        for g in range(groups):
            finite = filters.finite[g]
            for block, rows in similarity_blocks(everyone, filters.values[g], filters.inverse_norms[g]):
                matrix[g, block, g] = rows.masked_fill(~(finite & finite[block, None]), torch.nan)
        return matrix.view(groups * size, groups * size)

    def threshold_for_rate(self, rate: float, partner: PartnerRule = "random") -> dict[str, float]:
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
    layers: str | Sequence[str] = (),
    include_linear: bool = False,
    effective_rank: bool = True,
    layouts: Mapping[str, tuple[int, bool]] | None = None,
    progress: bool = False,
) -> Similarity:
    """Compare all filters of each layer with each other: look before merging. Changes nothing.

    Whatever can be read is: it need not be a weight that ``merge_`` could write to. Expanded, sliced, sparse,
    quantised, 8-bit and parametrised weights are compared by a copy; what has no values (a meta tensor, a shard) is
    skipped, with the reason.

    Args:
        target: a convolution, a ``Linear``, a weight tensor, an iterable of those, a model, or a
            :class:`inmerge_fast.MergePlan`; see :func:`inmerge_fast.merge_`. Or a state dict: its floating-point
            tensors of at least 3 dimensions (2 with ``include_linear``), each with its filters along dim 0 and in one
            group unless ``layouts`` says otherwise. Of several with one input channel all but the first entry are taken
            for depthwise layers, which have nothing to merge; tensors with one element per filter are gains.
        skip_first: see :func:`inmerge_fast.merge_`; here no layer is left out by default, frozen ones neither. The
            layers of a state dict are in the order of its keys; patterns may end before ``.weight``.
        exclude: see :func:`inmerge_fast.merge_`.
        layers: name pattern or patterns of the only layers to compare.
        include_linear: see :func:`inmerge_fast.merge_`.
        effective_rank: whether to compute it too, which takes an eigenvalue decomposition per layer.
        layouts: of a state dict, ``(groups, transposed)`` of convolutions by key.
        progress: whether to show a bar on standard error, where that is a terminal.

    Returns:
        A summary of each layer, printable as a table. Only a block of a layer's similarities is in memory at a time.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a pattern matches nothing, or no layer can be compared; the message
            gives the reason for each.

    Example::

        found = inmerge_fast.similarity(model)
        print(found)
        thresholds = found.threshold_for_rate(0.05)  # by layer: 5 % of the sampled pairs would merge
    """
    selection = Selection(skip_first, exclude, layers, include_linear)
    looks, skipped = looks_at(target, selection, layouts or {})
    summaries = []
    with Bar("comparing filters", len(looks), shown=progress) as bar:
        for look in looks:
            bar.show(look.name)
            summaries.append(summarise_layer(look.name, *look.weight(), effective_rank))
    return Similarity(summaries, skipped, looks)


def most_alike(found: Similarity) -> list[str]:
    """The layers in which a twentieth of the filters have the most similar nearest neighbours.

    Those of one element per filter are none of them, where every cosine is 1 or -1, and none of more than 4,096.
    """
    layers = [layer for layer in found.layers if layer.pairs and layer.elements > 1 and layer.filters <= MOST_PICTURED]
    layers.sort(key=lambda layer: -layer.threshold_for_rate(0.05, "nearest"))
    return [layer.name for layer in layers[:PICTURED_LAYERS]]
