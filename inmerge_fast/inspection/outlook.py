"""What merging would do to a network as it is: the line under ``inspect``'s table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layer_similarity import LayerSimilarity
from ..merge_plan import MergePlan
from ..paths.pairs import filters_of
from ..plan.plan import DEFAULT_SKIP_FIRST, Target
from ..thresholds import RankBudget
from ..training.inmerge import InMerge
from .bar import Bar
from .looks import ONE_PER_GROUP, Look, Selection, looks_at
from .similarity import Similarity

PAPER_THRESHOLD = 0.3
PAPER_PROB = 0.3
DEAD, TWIN = 0.01, 0.99  # share of the layer's median norm, and similarity
STEPS = 1000  # of the run that a budget is spent on


@dataclass(frozen=True)
class Outlook:
    """Filters that one step of merging would rewrite, with the weights as they are.

    Attributes:
        layers: how many layers take part.
        filters: how many filters they have.
        published: expected merges at the published setting, all and in 1x1 layers.
        recommended: the same with :class:`inmerge_fast.RankBudget` over :data:`STEPS` steps.
        acting: layers in which that would merge at all.
        dead: filters that do nothing: zero, or with a norm below a hundredth of their layer's median.
        twins: filters with another one of a similarity above 0.99.
        depthwise: layers with one filter per group, which merging leaves as they are; in none of the numbers above.
    """

    layers: int
    filters: int
    published: tuple[float, float]
    recommended: tuple[float, float]
    acting: int
    dead: int = 0
    twins: int = 0
    depthwise: int = 0

    def __str__(self) -> str:
        if not self.layers:
            return "Would merging do anything here? No: the layers that merge_ takes by default hold nothing to merge."
        return (
            f"Would merging do anything here? Of {self.filters} filters in {self.layers} layers, one step merges, as "
            f"the weights are now:\n"
            f"  as published (threshold {PAPER_THRESHOLD:g}, p = {PAPER_PROB:g}): {_merges(*self.published)}\n"
            f"  recommended (InMerge with RankBudget(), over {STEPS} steps): {_merges(*self.recommended)}, in "
            f"{self.acting} of the layers\n"
            f"  {self.dead} of the filters are dead (zero, or a hundredth of their layer's median norm), {self.twins} "
            f"have a twin (similarity above {TWIN:g})" + self._depthwise()
        )

    def _depthwise(self) -> str:
        if not self.depthwise:
            return ""
        many = f"{self.depthwise} depthwise layers, which are"
        layers = "a depthwise layer, which is" if self.depthwise == 1 else many
        return f"\n  merging does nothing to {layers} not counted"


def _merges(every: float, pointwise: float) -> str:
    if not every:
        return "none"
    return f"{every:.3g} filters, {100 * pointwise / every:.0f} % of them in 1x1 layers"


def outlook(
    target: Target | MergePlan | Mapping[str, object],
    found: Similarity,
    skip_first: float | str | Sequence[str] | None,
    layouts: Mapping[str, tuple[int, bool]],
) -> Outlook:
    """What one step would merge in the layers of ``found`` that ``merge_`` takes.

    Args:
        target: what was compared.
        found: what came out.
        skip_first: None for the default of ``merge_``; else ``found`` has been chosen already.
        layouts: see :func:`inmerge_fast.similarity`.
    """
    taken: Collection[str] = [layer.name for layer in found.layers]
    if skip_first is None and not isinstance(target, MergePlan):
        linear = any(not layer.kernel for layer in found.layers)
        try:
            looks, _ = looks_at(target, Selection(DEFAULT_SKIP_FIRST, include_linear=linear), layouts)
            taken = {look.name for look in looks}
        except ValueError:  # what is left has nothing to pair
            taken = ()
    layers = [layer for layer in found.layers if layer.name in taken and layer.pairs]
    if not layers:
        return Outlook(0, 0, (0.0, 0.0), (0.0, 0.0), 0, depthwise=depthwise_of(found))
    published = [PAPER_PROB * layer.finite * layer.share_above(PAPER_THRESHOLD) for layer in layers]
    recommended = []
    with Bar("weighing merges", len(layers), shown=True) as bar:
        for layer in layers:
            bar.show(layer.name)
            alone = InMerge([holder_of(found.look(layer.name))], threshold=RankBudget(), stop=STEPS)
            recommended.append(alone.preview().layers[0].merges)
    small = [layer.is_pointwise for layer in layers]
    return Outlook(
        len(layers),
        sum(layer.filters for layer in layers),
        _sums(published, small),
        _sums(recommended, small),
        sum(merges > 0 for merges in recommended),
        sum(dead_of(found.look(layer.name)) for layer in layers),
        sum(twins_of(layer) for layer in layers),
        depthwise_of(found),
    )


def dead_of(look: Look) -> int:
    """Filters of a layer that are zero or have next to no norm."""
    norms = filters_of(*look.weight(), exact=True).values.norm(dim=-1).flatten()
    return int((norms <= DEAD * norms.nanmedian()).sum())


def twins_of(layer: LayerSimilarity) -> int:
    """Filters of a layer that have a near copy in it."""
    return round(layer.share_above(TWIN, "nearest") * layer.finite)


def depthwise_of(found: Similarity) -> int:
    """Layers that were left out because they hold one filter per group."""
    return sum(ONE_PER_GROUP in reason for _, reason in found.skipped)


def _sums(merges: Sequence[float], small: Sequence[bool]) -> tuple[float, float]:
    return sum(merges), sum(one for one, is_small in zip(merges, small, strict=True) if is_small)


def holder_of(look: Look) -> nn.Module | torch.Tensor:
    """A copy of a layer that can be merged."""
    weight, _ = look.weight()
    copy = weight.detach().clone()
    if look.groups == 1 and not look.transposed:
        return copy
    kinds = {3: (nn.Conv1d, nn.ConvTranspose1d), 4: (nn.Conv2d, nn.ConvTranspose2d), 5: (nn.Conv3d, nn.ConvTranspose3d)}
    inner, outer = weight.shape[1] * look.groups, weight.shape[0]
    channels = (outer, inner) if look.transposed else (inner, outer)
    kind: Any = kinds[weight.dim()][look.transposed]
    module: nn.Module = kind(*channels, tuple(weight.shape[2:]), groups=look.groups, device="meta", bias=False)
    module.weight = nn.Parameter(copy)
    return module
