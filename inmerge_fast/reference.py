"""In-model merging, filter by filter: the definition that every fast path is tested and timed against.

Source: "In-Model Merging for Enhancing the Robustness of Medical Imaging Classification Models" (arXiv 2502.20516),
equations (1) to (4). With the filters K_i of one layer flattened to vectors k_i::

    sim(k_i, k_j) = k_i . k_j / (|k_i| |k_j|)                                   (2)
    K_i <- alpha K_i + (1 - alpha) K_j   where sim(k_i, k_j) > threshold        (3)

for one randomly chosen partner j(i) of each filter i that its coin selects with probability p (4). All partners are
read as they were before the call, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy.typing as npt
import torch

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
        square_i, square_j = (k_i * k_i).sum(), (k_j * k_j).sum()
        if not (square_i.float().isfinite() and square_j.float().isfinite()):
            continue  # a filter whose squared norm is not finite in float32 never merges and is never read from
        norms = square_i.sqrt().clamp(min=MIN_NORM) * square_j.sqrt().clamp(min=MIN_NORM)
        similarity[i] = (k_i * k_j).sum() / norms  # equation (2)
        if similarity[i] > limit or threshold == -1:
            blend = keep * k_i + take * k_j  # equation (3)
            filter_of(new, i, groups=groups, transposed=transposed).copy_(blend)
            merged[i] = True
    return ReferenceResult(new, similarity, merged)
