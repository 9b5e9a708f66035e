"""All pairs of a layer's filters as matrix products: what partner rules and similarity reports are computed from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .filters import FilterLayout
from .reference import MIN_NORM

BLOCK_PAIRS = 1 << 21  # pairs computed at once: 16 MB in float64


def autocast_off(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast would compute row dots in bfloat16, which decides 1.5 to 2.7 % of pairs near a threshold wrongly."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@torch.no_grad()
def unit_filters(weight: torch.Tensor, layout: FilterLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The filters divided by their norms, each norm clamped at 1e-8; non-finite filters become zero.

    In float64, so that no setting of the float32 matrix products (TF32, bfloat16) matters; a twentieth of a training
    step's time on a CPU. Devices without float64 (MPS) take float32.

    Returns:
        units: ``(groups, filters per group, D)``.
        finite: bool ``(groups, filters per group)``: whether the squared norm is finite in float32.
    """
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    filters = layout.rows(weight.detach()).to(dtype).reshape(-1, layout.group_size, layout.elements)
    norms = torch.linalg.vector_norm(filters, dim=2)
    finite = (norms * norms).float().isfinite()
    units = filters / norms.clamp(min=MIN_NORM)[..., None]
    return units.masked_fill_(~finite[..., None], 0.0), finite


@torch.no_grad()
def similarity_blocks(own: torch.Tensor, units: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Similarities of some unit filters ``(A, D)`` with all of a group ``(n, D)``, a block of rows at a time.

    Yields:
        The block's rows, and their similarities ``(rows, n)``.
    """
    rows = max(1, BLOCK_PAIRS // len(units))
    with autocast_off(units.device.type):
        for start in range(0, len(own), rows):
            block = slice(start, min(start + rows, len(own)))
            yield block, own[block] @ units.T
