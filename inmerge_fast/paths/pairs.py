"""All pairs of a layer's filters as matrix products: what partner rules and similarity reports are computed from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..plan.filters import FilterLayout
from ..reference import MIN_NORM

BLOCK_PAIRS = 1 << 21  # pairs computed at once: 16 MB in float64


def autocast_off(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast would compute row dots in bfloat16, which decides 1.5 to 2.7 % of pairs near a threshold wrongly."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Filters:
    """The filters of one weight by group, with what their similarities need.

    Attributes:
        values: ``(groups, filters per group, D)``, float32 or float64; the weight's own memory if it can be.
        inverse_norms: ``(groups, filters per group)``, 1 over each norm, which is clamped at 1e-8.
        finite: bool, same shape: whether the squared norm is finite in float32. The others' similarities mean nothing.
    """

    values: torch.Tensor
    inverse_norms: torch.Tensor
    finite: torch.Tensor

    def units(self) -> torch.Tensor:
        """The filters divided by their norms; zero where not finite."""
        return (self.values * self.inverse_norms[..., None]).masked_fill_(~self.finite[..., None], 0.0)


def _multiplies_in_float32(device_type: str) -> bool:
    """Whether matrix products of float32 are what they say: the user may have allowed TF32 or bfloat16 inside them."""
    backend = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device_type)
    return backend is None or backend.matmul.fp32_precision in ("none", "ieee")


@torch.no_grad()
def filters_of(weight: torch.Tensor, layout: FilterLayout, *, exact: bool) -> Filters:
    """The filters of ``weight``, to be multiplied with each other.

    Args:
        weight: the weight, on any device.
        layout: where its filters lie.
        exact: in float64, where the device has it. Otherwise float64 weights stay so, and the others are multiplied in
            float32, unless TF32 or bfloat16 is allowed for it, which would be off by up to 1e-3 and 1e-2.
    """
    kind = weight.device.type
    double = exact or weight.dtype == torch.float64 or not _multiplies_in_float32(kind)
    dtype = torch.float64 if double and kind != "mps" else torch.float32
    values = layout.rows(weight.detach()).to(dtype).reshape(-1, layout.group_size, layout.elements)
    norms = torch.linalg.vector_norm(values, dim=2)
    return Filters(values, 1 / norms.clamp(min=MIN_NORM), (norms * norms).float().isfinite())


@torch.no_grad()
def similarity_blocks(
    own: torch.Tensor, values: torch.Tensor, inverse_norms: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Similarities of some filters of a group with all of it, a block of rows at a time.

    Args:
        own: which ones, int64 ``(A,)``.
        values: all filters of the group ``(n, D)``.
        inverse_norms: of all filters, ``(n,)``.

    Yields:
        The block of ``own``, and its similarities ``(rows, n)``.
    """
    rows = max(1, BLOCK_PAIRS // len(values))
    with autocast_off(values.device.type):
        for start in range(0, len(own), rows):
            block = slice(start, min(start + rows, len(own)))
            chosen = own[block]
            dots = values[chosen] @ values.T
            yield block, dots.mul_(inverse_norms[chosen, None]).mul_(inverse_norms)
