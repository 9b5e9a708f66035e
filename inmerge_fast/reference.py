"""In-model merging, filter by filter: the definition that every fast path is tested and timed against.

Source: "In-Model Merging for Enhancing the Robustness of Medical Imaging Classification Models" (arXiv 2502.20516),
equations (1) to (4). With the filters K_i of one layer flattened to vectors k_i::

    sim(k_i, k_j) = k_i . k_j / (|k_i| |k_j|)                                   (2)
    K_i <- alpha K_i + (1 - alpha) K_j   where sim(k_i, k_j) > threshold        (3)

for one randomly chosen partner j(i) of each filter i that its coin selects with probability p (4). All partners are
read as they were before the call, as in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .draw import priorities, priority_keys

MIN_NORM = 1e-8  # norms are clamped here, so a zero filter has similarity 0


@dataclass(frozen=True)
class ReferenceResult:
    """Outcome of :func:`reference_merge`.

    Attributes:
        weight: the merged copy, same shape and dtype as the input.
        similarity: ``(N,)`` in the compute dtype: similarity of each sampled filter with its partner; NaN where the
            filter was not sampled or one of the two is not finite.
        merged: bool ``(N,)``.
    """

    weight: torch.Tensor
    similarity: torch.Tensor
    merged: torch.Tensor


def filter_of(weight: torch.Tensor, index: int, *, groups: int = 1, transposed: bool = False) -> torch.Tensor:
    """Filter ``index`` of a convolution weight, as a view: all the elements that make one output channel."""
    if not transposed:
        return weight[index]
    group, place = divmod(index, weight.shape[1])  # (C_in, N / groups, *kernel): filters lie along dim 1
    channels = weight.shape[0] // groups
    return weight[group * channels : (group + 1) * channels, place]


def _similarity(k_i: torch.Tensor, k_j: torch.Tensor) -> torch.Tensor | None:
    """Equation (2); None where a squared norm is not finite in float32: such filters never merge and are never read."""
    square_i, square_j = (k_i * k_i).sum(), (k_j * k_j).sum()
    if not (square_i.float().isfinite() and square_j.float().isfinite()):
        return None
    norms = square_i.sqrt().clamp(min=MIN_NORM) * square_j.sqrt().clamp(min=MIN_NORM)
    return (k_i * k_j).sum() / norms


@torch.no_grad()
def reference_merge(
    weight: torch.Tensor,
    coin: npt.NDArray,
    partner: npt.NDArray,
    *,
    alpha: float = 0.8,
    threshold: float = 0.3,
    groups: int = 1,
    transposed: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> ReferenceResult:
    """Merge the filters of one weight with given draws; returns a copy and leaves ``weight`` alone.

    Args:
        weight: ``(N, ...)``, or ``(C_in, N / groups, ...)`` if ``transposed``.
        coin: bool ``(N,)``, which filters look at their partner; see :func:`inmerge_fast.draw`.
        partner: int ``(N,)``, index of each filter's partner.
        alpha: share of itself that a merged filter keeps.
        threshold: filters merge where the similarity is strictly above it; at exactly -1 every sampled pair does.
        groups: groups of the convolution.
        transposed: whether this is the weight of a transposed convolution.
        compute_dtype: float32 (what the fast paths use below float64) or float64.

    Returns:
        The merged weight, the similarities and the decisions.
    """
    old, new = weight.to(compute_dtype), weight.clone()
    cpu = torch.device("cpu")  # whatever the default device is
    similarity = torch.full((len(coin),), torch.nan, dtype=compute_dtype, device=cpu)
    merged = torch.zeros(len(coin), dtype=torch.bool, device=cpu)
    keep, take, limit = (torch.tensor(x, dtype=compute_dtype, device=cpu) for x in (alpha, 1.0 - alpha, threshold))

    for i, j in enumerate(partner.tolist()):
        if not coin[i]:
            continue
        k_i = filter_of(old, i, groups=groups, transposed=transposed)
        k_j = filter_of(old, j, groups=groups, transposed=transposed)
        measured = _similarity(k_i, k_j)
        if measured is None:
            continue
        similarity[i] = measured
        if similarity[i] > limit or threshold == -1:
            blend = keep * k_i + take * k_j  # equation (3)
            filter_of(new, i, groups=groups, transposed=transposed).copy_(blend)
            merged[i] = True
    return ReferenceResult(new, similarity, merged)


def reference_forward_only(
    weight: torch.Tensor,
    coin: npt.NDArray,
    partner: npt.NDArray,
    loss: Callable[[torch.Tensor], torch.Tensor],
    **arguments: Any,
) -> tuple[torch.Tensor, ReferenceResult]:
    """One step of forward-only merging: the gradient at the merged weight. ``weight`` itself never changes.

    Args:
        weight: see :func:`reference_merge`, as are coin, partner and the other arguments.
        coin: which filters look at their partner.
        partner: the partners.
        loss: the loss of a weight, a scalar.
        **arguments: of :func:`reference_merge`.

    Returns:
        The gradient, like ``weight``, that an optimizer applies to ``weight`` as it is; and the merge.
    """
    result = reference_merge(weight, coin, partner, **arguments)
    merged = result.weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(merged), merged)
    return gradient, result


@torch.no_grad()
def reference_partners(
    weight: torch.Tensor,
    coin: npt.NDArray,
    partner: Literal["similar", "nearest"],
    *,
    threshold: float,
    seed: int,
    step: int,
    layer: int = 0,
    groups: int = 1,
    transposed: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> npt.NDArray[np.int64]:
    """Partners by similarity, filter by filter: the definition of the rules ``"nearest"`` and ``"similar"``.

    Args:
        weight: see :func:`reference_merge`.
        coin: bool ``(N,)``, which filters look for a partner; see :func:`inmerge_fast.draw`.
        partner: ``"nearest"``: the most similar other filter of the group, the lowest index on ties. ``"similar"``: of
            those above the threshold the one with the highest priority (``draw.py``), that is, any one of them.
        threshold: what ``"similar"`` compares with; at exactly -1 every finite filter qualifies.
        seed: seed of the draw.
        step: step of the draw.
        layer: the layer's id in the draw.
        groups: groups of the convolution.
        transposed: whether this is the weight of a transposed convolution.
        compute_dtype: float64, or float32.

    Returns:
        int64 ``(N,)`` for :func:`reference_merge`: partners, -1 where the coin did not fall or nobody qualifies.
    """
    filters = [
        filter_of(weight.to(compute_dtype), i, groups=groups, transposed=transposed).flatten() for i in range(len(coin))
    ]
    chosen = np.full(len(coin), -1, np.int64)
    for i in np.flatnonzero(coin):
        key = priority_keys(seed, step, layer, int(i))
        best = -math.inf
        first = i - i % (len(coin) // groups)
        for j in range(first, first + len(coin) // groups):
            similarity = _similarity(filters[i], filters[j])
            if j == i or similarity is None:
                continue
            if partner == "nearest":
                rank = similarity.item()
            elif similarity > threshold or threshold == -1:
                rank = float(priorities(key, j))
            else:
                continue
            if rank > best:  # ascending j: the lowest of equal ones stays
                best, chosen[i] = rank, j
    return chosen
