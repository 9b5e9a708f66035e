"""The vectorised PyTorch path: the CPU, devices without Triton, and float64.

Decisions are drawn on the host, so only sampled filters are touched: two gathers, three row reductions, and, where
something passes, one blend and one scatter per layer. That is about 5 times as fast as the published loop on VGG19's
deep layers; a batched matrix product for the row dots would be 5 times slower and 10 times less accurate than
``(x * y).sum(1)``, and dense masks over all filters slower than the published loop.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

from .filters import FilterLayout
from .pairs import autocast_off
from .reference import MIN_NORM


class Scratch(threading.local):
    """Memory for gathered filters that is kept from call to call, one set for each thread.

    On the CPU, fresh temporaries of a few megabytes are returned to the system at once, and faulting their pages in
    again takes longer than the arithmetic: 2,000 faults and twice the time per call on VGG19's deep layers.
    Accelerators have caching allocators and get fresh memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised memory of shape ``(rows, elements)``; the same name gives the same memory again."""
        size = rows * elements
        if device.type != "cpu":
            return torch.empty((rows, elements), dtype=dtype, device=device)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(rows, elements)


_scratch = Scratch()


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
    """Merge the sampled filters of one weight, in place.

    Args:
        weight: the weight, on any device.
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
    device, on_cpu = weight.device, weight.device.type == "cpu"
    compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    size = (sampled.size, layout.elements, compute_dtype, device)
    rows = layout.rows(weight)
    own = torch.from_numpy(sampled).to(device)
    with autocast_off(device.type):
        x = _gather(rows, layout, own, _scratch.take("x", *size))
        y = _gather(rows, layout, torch.from_numpy(partner).to(device), _scratch.take("y", *size))
        norm_x, norm_y = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y, dim=1)
        products = torch.mul(x, y, out=_scratch.take("xy", *size))
        similarity = products.sum(1) / (norm_x.clamp(min=MIN_NORM) * norm_y.clamp(min=MIN_NORM))
        # Finite means a finite squared norm: a norm of 1e20 is finite in float32, but its square is not.
        finite = (norm_x * norm_x).float().isfinite() & (norm_y * norm_y).float().isfinite()
        passed = finite if threshold == -1 else finite & (similarity > threshold)
        similarity = similarity.masked_fill(~finite, torch.nan)
        # Nothing passing is the usual case at the paper's threshold; an accelerator would stall to answer.
        if dry_run or sampled.size == 0 or (on_cpu and not passed.any()):
            return similarity, passed
        if on_cpu and not passed.all():
            own, x, y = own[passed], x[passed], y[passed]
        # Rounded after each product, like the reference and the kernel: equal to the bit, which lerp_ is not.
        new = x.mul_(alpha).add_(y.mul_(1.0 - alpha)).to(weight.dtype)
        if not on_cpu:
            old = _gather(rows, layout, own, torch.empty_like(new))
            new = torch.where(passed[:, None], new, old)
        _scatter_(rows, layout, own, new)
    return similarity, passed


def _group_and_place(layout: FilterLayout, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.div(index, layout.group_size, rounding_mode="floor"), index % layout.group_size


def _gather(rows: torch.Tensor, layout: FilterLayout, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if not layout.is_dense:
        return out.copy_(rows[_group_and_place(layout, index)].reshape(out.shape))
    if rows.dtype == out.dtype:
        return torch.index_select(rows, 0, index, out=out)
    return out.copy_(rows.index_select(0, index))


def _scatter_(rows: torch.Tensor, layout: FilterLayout, index: torch.Tensor, new: torch.Tensor) -> None:
    if layout.is_dense:
        rows.index_copy_(0, index, new)
    else:
        rows[_group_and_place(layout, index)] = new.view(len(index), *rows.shape[2:])
