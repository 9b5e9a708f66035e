"""Partner rules: which filter a sampled filter looks at, where that depends on the weights.

``"random"`` needs no weights and is part of the draw (``draw.py``). The other rules compare a filter with all others
of its group, after the draw and before the merge, which then measures the chosen pair itself and decides:

- ``"nearest"``: the finite filter of highest similarity, above the threshold or not; the lowest index on ties.
- ``"similar"``: one of the finite filters above the threshold (of all finite ones at threshold -1), uniformly; none if
  there is none.

Similarities within rounding of each other or of the threshold can be told apart differently by the paths, whose
products have other roundings: 5e-6, of 16-bit filters on a GPU 3e-5 (``kernels/match.py``). Within that band
``"nearest"`` may take either, and ``"similar"`` may draw a pair that the merge then measures at or below the threshold
and leaves alone, or pass over one that it would have measured above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from ..draw import priorities, priority_keys
from ..plan.filters import FilterLayout
from ..plan.rows import Rows
from .pairs import filters_of, similarity_blocks

PartnerRule: TypeAlias = Literal["random", "similar", "nearest"]
PARTNER_RULES: tuple[PartnerRule, ...] = get_args(PartnerRule)


def check_partner_rule(partner: object) -> None:
    """Check the argument ``partner``.

    Raises:
        TypeError: not a string.
        ValueError: not one of the rules.
    """
    if not isinstance(partner, str):
        raise TypeError(f"partner must be a str, got {partner!r}")
    if partner not in PARTNER_RULES:
        raise ValueError(f"partner must be one of {', '.join(map(repr, PARTNER_RULES))}, got {partner!r}")


def match_rows(
    rows: Rows,
    weights: Sequence[torch.Tensor],
    coin: npt.NDArray[np.bool_],
    partner: str,
    thresholds: Sequence[float],
    *,
    seed: int,
    step: int,
) -> npt.NDArray[np.int64]:
    """Partners of the filters of all layers under ``"similar"`` or ``"nearest"``; see :func:`match_layer`.

    Returns:
        ``(rows,)`` int64, indices in the layer, -1 where the coin did not fall or no filter qualifies.
    """
    found = np.full(len(coin), -1, np.int64)
    for layer, weight, threshold, place in zip(rows.layers, weights, thresholds, rows.of_layers(), strict=True):
        sampled = coin[place].nonzero()[0]
        found[place][sampled] = match_layer(
            weight, layer.layout, sampled, partner, threshold=threshold, seed=seed, step=step, layer=layer.layer_id
        )
    return found


@torch.no_grad()
def match_layer(
    weight: torch.Tensor,
    layout: FilterLayout,
    sampled: npt.NDArray[np.int64],
    partner: str,
    *,
    threshold: float,
    seed: int,
    step: int,
    layer: int,
) -> npt.NDArray[np.int64]:
    """Partners of the sampled filters of one weight under ``"similar"`` or ``"nearest"``.

    Args:
        weight: the weight, on any device; on an accelerator this waits for it.
        layout: where its filters lie.
        sampled: indices of the filters whose coin fell, ``(A,)``, ascending.
        partner: the rule.
        threshold: similarity that a partner must exceed to be drawn by ``"similar"``; -1 admits every finite one.
        seed: seed of the draw.
        step: step of the draw.
        layer: the layer's id in the draw.

    Returns:
        ``(A,)`` int64, indices in the layer, -1 where no filter qualifies.
    """
    chosen = np.full(sampled.size, -1, np.int64)
    if sampled.size == 0:
        return chosen
    filters = filters_of(weight, layout, exact=False)
    group, place = np.divmod(sampled, layout.group_size)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        own = torch.from_numpy(place[members]).to(weight.device)
        finite = filters.finite[g]
        for block, similarity in similarity_blocks(own, filters.values[g], filters.inverse_norms[g]):
            allowed = finite & finite[own[block], None]
            allowed.scatter_(1, own[block, None], False)  # never itself
            if partner == "nearest":
                best = _nearest(similarity, allowed)
            else:
                if threshold != -1:
                    allowed &= similarity > threshold
                best = _highest_priority(allowed, seed, step, layer, sampled[members[block]], g * layout.group_size)
            chosen[members[block]] = np.where(best >= 0, best + g * layout.group_size, -1)
    return chosen


def _nearest(similarity: torch.Tensor, allowed: torch.Tensor) -> npt.NDArray[np.int64]:
    similarity = similarity.masked_fill(~allowed, -torch.inf)
    best = similarity.amax(1, keepdim=True)
    place = torch.arange(similarity.shape[1], device=similarity.device)
    first = torch.where(similarity == best, place, similarity.shape[1]).amin(1)  # argmax promises no order of ties
    return first.masked_fill(best[:, 0] == -torch.inf, -1).cpu().numpy()


def _highest_priority(
    allowed: torch.Tensor, seed: int, step: int, layer: int, own: npt.NDArray[np.int64], first: int
) -> npt.NDArray[np.int64]:
    row, place = allowed.cpu().numpy().nonzero()
    priority = priorities(priority_keys(seed, step, layer, own)[row], place + first)
    best = np.full(len(own), -1, np.int64)
    # Last comes what is kept: the highest priority, and among equal ones the lowest place.
    order = np.lexsort((-place, priority))
    best[row[order]] = place[order]
    return best
