"""The vectorised PyTorch path of accelerators: without Triton, for float64, and where it is asked for.

Decisions are drawn on the host, so only sampled filters are touched: two gathers, three row reductions, one blend and
one scatter per layer. ``eager_cpu.py`` is the CPU's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..plan.filters import FilterLayout, compute_dtype
from ..reference import MIN_NORM
from .pairs import autocast_off


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
