"""The eager path on the CPU: PyTorch and NumPy, which look at float32 and float64 filters where they lie.

All row dots of a layer, each needed filter with itself and each sampled filter with its partner, are the entries of one
sparse matrix: a product ``W @ W.T`` that is evaluated at given places only (``torch.sparse.sampled_addmm``). It reads
the filters where they lie: 2.7 ms for VGG19's deep layers, where two gathers and three reductions take 7.4, with the
same error (2e-8). What surrounds the products is computed for all layers at once.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..plan.candidates import MergeLayer
from ..plan.filters import FilterLayout, compute_dtype, mark_written
from ..reference import MIN_NORM
from .pairs import autocast_off

# From this many bytes per filter on, filters are blended one by one in NumPy, each written once to where it lies:
# 4.4 ms for VGG19's deep layers instead of 8.6 with gathers. A filter costs 2.5 us at least, so short ones are not.
LONG_FILTER = 8192
# Gathers are spread over threads, which catches up with the loop, which is not.
THREADS_OF_LOOP = 2


class Scratch(threading.local):
    """Memory for gathered filters that is kept from call to call, one set for each thread.

    Fresh temporaries of a few megabytes are returned to the system at once, and faulting their pages in again takes
    longer than the arithmetic: 2,000 faults and twice the time per call on VGG19's deep layers.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, rows: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of shape ``(rows, elements)``; the same name gives the same memory again."""
        size = rows * elements
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return buffer[:size].view(rows, elements)


_scratch = Scratch()


@torch.no_grad()
def merge_layers_(
    layers: Sequence[MergeLayer],
    weights: Sequence[torch.Tensor],
    row_start: npt.NDArray[np.int64],
    sampled: npt.NDArray[np.bool_],
    partner: npt.NDArray[np.int64],
    *,
    alpha: float,
    thresholds: Sequence[float],
    dry_run: bool,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Merge the sampled filters of some layers, in place: all are measured before the first one is written.

    Args:
        layers: the layers.
        weights: their weights, on the CPU.
        row_start: the first row of each layer among the filters of all, and their number, ``(layers + 1,)``.
        sampled: whether a filter looks at its partner, ``(rows,)``.
        partner: index of its partner within the layer, ``(rows,)``; looked at where sampled.
        alpha: share of itself that a merged filter keeps.
        thresholds: one per layer, see :func:`inmerge_fast.merge.merge_plan_`.
        dry_run: only measure.

    Returns:
        similarity: ``(A,)`` of the sampled filters in order, float32, or float64 where a weight is; NaN for pairs with
            a non-finite filter.
        passed: bool ``(A,)``.
    """
    # Filters may hold Inf and NaN, and what comes of them is looked at below.
    with autocast_off("cpu"), np.errstate(all="ignore"):
        with _without_warnings() if torch.is_warn_always_enabled() else contextlib.nullcontext():
            similarity, finite = _measure(layers, weights, row_start, sampled, partner)
        own = sampled.nonzero()[0]
        bounds = np.searchsorted(own, row_start)
        # A float32 similarity is compared with the threshold rounded to float32, as in the kernel.
        limits = [
            limit if layer.dtype == torch.float64 else float(np.float32(limit))
            for limit, layer in zip(thresholds, layers, strict=True)
        ]
        counts = np.diff(bounds)
        above = similarity > np.repeat(limits, counts)
        passed = finite & (above | np.repeat(np.asarray(thresholds) == -1, counts))
        if not dry_run and passed.any():
            try:
                for layer, weight, first, start, end in zip(
                    layers, weights, row_start[:-1], bounds[:-1], bounds[1:], strict=True
                ):
                    chosen = own[start:end][passed[start:end]]
                    if chosen.size:
                        _blend_(weight.detach(), layer.layout, chosen - first, partner[chosen], alpha)
            except BaseException:  # an interrupt; autograd does not see what NumPy has written so far
                mark_written(weights)
                raise
    return similarity, passed


def _measure(
    layers: Sequence[MergeLayer],
    weights: Sequence[torch.Tensor],
    row_start: npt.NDArray[np.int64],
    sampled: npt.NDArray[np.bool_],
    partner: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Similarity of each sampled filter with its partner, NaN where not finite, and whether it is."""
    sizes = np.diff(row_start)
    first = np.repeat(row_start[:-1], sizes)
    index = np.arange(len(sampled)) - first
    own = sampled.nonzero()[0]
    other = partner[own] + first[own]
    needed = sampled.copy()
    needed[other] = True
    # Compressed sparse rows: a needed filter's line has its square, a sampled one's also its dot, by column.
    line = np.zeros(len(sampled) + 1, np.int64)
    np.cumsum(needed.astype(np.int64) + sampled, out=line[1:])
    square_at = line[:-1] + (sampled & (partner < index))
    dot_at = line[own] + (other > own)
    column = np.empty(line[-1], np.int64)
    column[square_at[needed]] = index[needed]
    column[dot_at] = partner[own]

    double = [weight.dtype == torch.float64 for weight in weights]
    values = np.empty(len(column), np.float64 if any(double) else np.float32)
    for layer, weight, start, end in zip(layers, weights, row_start[:-1], row_start[1:], strict=True):
        here = slice(line[start], line[end])
        values[here] = _dots(
            weight.detach(), layer.layout, line[start : end + 1] - line[start], column[here], needed[start:end]
        )
    square_own, square_other, dot = values[square_at[own]], values[square_at[other]], values[dot_at]
    norms = np.maximum(np.sqrt(square_own), MIN_NORM) * np.maximum(np.sqrt(square_other), MIN_NORM)
    similarity = dot / norms
    if any(double) and not all(double):
        similarity = np.where(np.repeat(double, sizes)[own], similarity, similarity.astype(np.float32))
    # Finite means a finite squared norm in float32.
    finite = np.isfinite(square_own.astype(np.float32)) & np.isfinite(square_other.astype(np.float32))
    return np.where(finite, similarity, similarity.dtype.type(np.nan)), finite


def _dots(
    weight: torch.Tensor,
    layout: FilterLayout,
    line: npt.NDArray[np.int64],
    column: npt.NDArray[np.int64],
    needed: npt.NDArray[np.bool_],
) -> npt.NDArray[Any]:
    """Dot products of a layer's filters: entry e, of line i, is that of filters i and ``column[e]``."""
    rows, dtype = layout.rows(weight), compute_dtype(weight)
    if not column.size:
        return np.empty(0, np.float32)
    if not layout.is_dense or rows.dtype != dtype:
        chosen = torch.from_numpy(needed.nonzero()[0])
        rows = layout.gather(rows, chosen, _scratch.take("x", len(chosen), layout.elements, dtype))
        line, column = line[np.append(needed, True)], (needed.cumsum() - 1)[column]
    # No out=: allow_mutation_on_saved_tensors cannot follow that for sparse tensors.
    pairs = _sparse(line, column, torch.zeros(len(column), dtype=dtype, device="cpu"), len(rows))
    products: torch.Tensor = torch.sparse.sampled_addmm(pairs, rows, rows.t(), beta=0.0)
    return products.values().numpy()


def _sparse(
    line: npt.NDArray[np.int64], column: npt.NDArray[np.int64], values: torch.Tensor, filters: int
) -> torch.Tensor:
    return torch.sparse_csr_tensor(
        torch.from_numpy(line), torch.from_numpy(column), values, (filters, filters), device="cpu",
        check_invariants=False,
    )  # fmt: skip


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """That sparse tensors are in beta state, said once per process unless the user wants it always, is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with _without_warnings():
    _sparse(np.zeros(2, np.int64), np.zeros(0, np.int64), torch.zeros(0, device="cpu"), 1)


def _blend_(
    weight: torch.Tensor,
    layout: FilterLayout,
    own: npt.NDArray[np.int64],
    partner: npt.NDArray[np.int64],
    alpha: float,
) -> None:
    """Filters ``own`` become blends with their partners, products rounded one by one as in the kernel."""
    rows, dtype = layout.rows(weight), compute_dtype(weight)
    # A mode that watches PyTorch's operators, as allow_mutation_on_saved_tensors does, has to see the write.
    past_pytorch = layout.is_dense and not torch._C._len_torch_dispatch_stack()
    long = layout.elements * weight.element_size() >= LONG_FILTER and torch.get_num_threads() <= THREADS_OF_LOOP
    if long and past_pytorch and rows.dtype == dtype:
        _blend_one_by_one_(rows, own, partner, alpha)
        return
    size = (len(own), layout.elements, dtype)
    index = torch.from_numpy(own)
    x = layout.gather(rows, index, _scratch.take("x", *size))
    y = layout.gather(rows, torch.from_numpy(partner), _scratch.take("y", *size))
    new = x.mul_(alpha).add_(y.mul_(1.0 - alpha)).to(weight.dtype)
    if past_pytorch:
        _in_numpy(rows)[own] = _in_numpy(new)  # PyTorch's index_copy_ goes element by element: three times as long
    else:
        layout.scatter_(rows, index, new)


def _in_numpy(values: torch.Tensor) -> npt.NDArray[Any]:
    """The memory of a contiguous tensor as an array, 16-bit floats as the integers that have their bits."""
    return np.asarray(_Memory(values))


class _Memory:
    """What NumPy asks for. ``Tensor.numpy()`` would do, but leaves a storage that can never be resized (FSDP does)."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values  # kept as long as the array
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(values.shape),
            "typestr": np.dtype({2: "i2", 4: "f4", 8: "f8"}[values.element_size()]).str,
            "data": (values.data_ptr(), False),
        }


def _blend_one_by_one_(
    rows: torch.Tensor, own: npt.NDArray[np.int64], partner: npt.NDArray[np.int64], alpha: float
) -> None:
    """Each filter after all that read it, so that it is written where it lies; those in a circle are kept aside.

    A filter is followed by its partner if it can be, which is in the cache then: 4.4 ms for VGG19's deep layers, where
    keeping all filters that are read aside takes 5.2. Each is written by one call, so that an interrupt leaves no
    filter half blended.
    """
    values, (elements, dtype) = _in_numpy(rows), (rows.shape[1], rows.dtype)
    keep, take = values.dtype.type(alpha), values.dtype.type(1.0 - alpha)
    mine, theirs = _scratch.take("y", 2, elements, dtype).numpy()

    def blend(i: int, j: int, out: npt.NDArray[Any]) -> None:
        np.multiply(values[i], keep, mine)
        np.multiply(values[j], take, theirs)
        np.add(mine, theirs, out)

    partner_of = dict(zip(own.tolist(), partner.tolist(), strict=True))
    readers = np.bincount(partner, minlength=len(values)).tolist()
    unread = [i for i in partner_of if not readers[i]]
    while unread:
        i = unread.pop()
        j = partner_of.pop(i)
        blend(i, j, values[i])
        readers[j] -= 1
        if not readers[j] and j in partner_of:
            unread.append(j)
    aside = _scratch.take("x", len(partner_of), elements, dtype).numpy()
    for (i, j), out in zip(partner_of.items(), aside, strict=True):
        blend(i, j, out)
    values[list(partner_of)] = aside
