"""The CPU's own kernel: a whole model in one call of a C function that reads filters where they lie (``kernels/cpu/``).

It draws, measures, decides and blends. Similarities have the same bits on every processor, whatever its vectors are,
and for any number of threads, so that replicas on unlike machines stay equal; blends have the reference's.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..candidates import MergeLayer
from ..draw import coin_threshold

VERSION = 1  # of kernels/cpu/module.c that this file can call
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # enum type of numbers.h


class CpuPairs(NamedTuple):
    """What one call has measured.

    Attributes:
        counts: pairs sampled in each layer, int64 ``(layers,)``.
        similarity: of each sampled pair by layer and filter, float64 ``(pairs,)``; NaN where a filter is not finite or
            has no partner.
        passed: whether the pair was above the threshold, bool ``(pairs,)``.
        passed_total: how many did.
        largest: the largest similarity; minus infinity if there is none.
    """

    counts: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]
    passed: npt.NDArray[np.bool_]
    passed_total: int
    largest: float


def unavailable() -> str:
    """Why the kernel cannot be used here; empty if it can."""
    kernel = _load()
    return kernel if isinstance(kernel, str) else ""


class CpuMerge:
    """The layer table of a plan, for as long as its weights stay where they are. It keeps no reference to them.

    Args:
        layers: the layers of the plan.
        weights: their weights, on the CPU.
        row_start: the first row of each layer among the filters of all, and their number, ``(layers + 1,)``.
        code: instruction set of the kernel, one of its ``code_names``; by default the best one that this processor has.
            It changes no bit of any result.

    Raises:
        RuntimeError: the kernel is :func:`unavailable`.
    """

    def __init__(
        self,
        layers: Sequence[MergeLayer],
        weights: Sequence[torch.Tensor],
        row_start: npt.NDArray[np.int64],
        *,
        code: str | None = None,
    ) -> None:
        kernel = _load()
        if isinstance(kernel, str):
            raise RuntimeError(f"the CPU kernel cannot be used: {kernel}")
        self._kernel, self._code = kernel, code
        self._layers, self._rows = len(layers), int(row_start[-1])
        table = np.empty((len(layers), 11), np.int64)
        for line, layer, weight in zip(table, layers, weights, strict=True):
            layout = layer.layout
            line[:] = (
                weight.data_ptr(), layout.filters, layout.elements, layout.group_size, layout.group_stride,
                layout.filter_stride, layout.run, layout.outer_stride, layout.inner_stride, layer.layer_id,
                _TYPES[layer.dtype],
            )  # fmt: skip
        self._table = table.tobytes()

    def run(
        self,
        seed: int,
        step: int,
        *,
        prob: float,
        alpha: float,
        thresholds: float | Sequence[float],
        dry_run: bool,
        given: tuple[npt.NDArray[np.bool_], npt.NDArray[np.integer]] | None = None,
    ) -> CpuPairs:
        """Merge the layers in place, on at most ``torch.get_num_threads()`` threads.

        The GIL is released. The call is not interrupted: a signal's handler runs right after it, so a
        ``KeyboardInterrupt`` may be raised here with everything merged. Autograd is not told of the write; who calls
        has to do that, whether the call returns or raises.

        Args:
            seed: see :func:`inmerge_fast.merge_`, as are step, prob, alpha and dry_run.
            step: step of the draw.
            prob: probability of the coin.
            alpha: share of itself that a merged filter keeps.
            thresholds: one for all layers, or one for each; above 1 for a layer that is measured and never merged.
            dry_run: write nothing.
            given: coins and partners of all filters instead of the draw, bool and int ``(rows,)``; partners are indices
                in the layer, -1 for a filter that found none.

        Raises:
            MemoryError: there is no memory for the call; nothing has been written.
            ValueError: ``thresholds`` or ``given`` do not fit the layers; nothing has been written.
        """
        coin = partner = None
        if given is not None:
            coin = np.asarray(given[0], np.bool_).tobytes()
            partner = np.asarray(given[1]).astype(np.int32, casting="same_kind").tobytes()
        counts, similarity, passed, totals = self._kernel.merge(
            self._table, self._limits(thresholds), coin, partner, seed, step, coin_threshold(prob), alpha,
            not dry_run, torch.get_num_threads(), self._code,
        )  # fmt: skip
        passed_total, largest = np.frombuffer(totals).tolist()
        return CpuPairs(
            np.frombuffer(counts, np.int64),
            np.frombuffer(similarity, np.float64),
            np.frombuffer(passed, np.bool_),
            int(passed_total),
            largest,
        )

    def _limits(self, thresholds: float | Sequence[float]) -> bytes:
        if isinstance(thresholds, (float, int)):
            return np.full(self._layers, thresholds, np.float64).tobytes()
        return np.asarray(thresholds, np.float64).tobytes()


def _load() -> ModuleType | str:
    """The extension module, or why it cannot be used."""
    if sys.implementation.name != "cpython":
        return f"{sys.implementation.name} is not CPython, whose C API it is built with"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a free-threaded Python has no limited C API, which it is built with"
    try:
        kernel = importlib.import_module("inmerge_fast._cpu")
    except ModuleNotFoundError:
        return "it was not built; where there is a C compiler, pip install builds it"
    except ImportError as error:
        return f"it cannot be loaded: {error}"
    found = getattr(kernel, "version", None)
    if found != VERSION:
        return f"it was built from another version of this package, {found} instead of {VERSION}; run pip install again"
    return kernel
