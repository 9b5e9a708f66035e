"""The CPU's own kernel: a whole model in one call of a C function that reads filters where they lie (``kernels/cpu/``).

It draws, measures, decides and blends. Similarities have the same bits on every processor, whatever its vectors are,
and for any number of threads, so that replicas on unlike machines stay equal; blends have the reference's.
"""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import native
from ..draw import coin_threshold
from ..effect import EffectMonitor
from ..plan.candidates import MergeLayer
from ..plan.filters import mark_written
from ..plan.rows import Rows
from ..stats import SampledPairs
from .match import match_rows
from .path import Call

_TOTALS = struct.Struct("dd")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # enum type of numbers.h


class CpuPairs:
    """What one call has measured. Arrays are made of it where somebody looks: made at every call, they took 3 us.

    Args:
        counts: bytes of int64 ``(layers,)``.
        similarity: bytes of float64 ``(pairs,)``.
        passed: bytes of bool ``(pairs,)``.
        totals: bytes of float64 ``(2,)``: how many pairs passed, and the largest similarity, minus infinity if there is
            none.
    """

    __slots__ = ("_counts", "_passed", "_similarity", "_totals")

    def __init__(self, counts: bytearray, similarity: bytearray, passed: bytearray, totals: bytearray) -> None:
        self._counts, self._similarity, self._passed, self._totals = counts, similarity, passed, totals

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Pairs sampled in each layer, int64 ``(layers,)``."""
        return np.frombuffer(self._counts, np.int64)

    @property
    def similarity(self) -> npt.NDArray[np.float64]:
        """Of each sampled pair by layer and filter, ``(pairs,)``; NaN where one is not finite or has no partner."""
        return np.frombuffer(self._similarity, np.float64)

    @property
    def passed(self) -> npt.NDArray[np.bool_]:
        """Whether each pair was above the threshold, bool ``(pairs,)``."""
        return np.frombuffer(self._passed, np.bool_)

    @property
    def passed_total(self) -> int:
        """How many pairs were."""
        return int(_TOTALS.unpack(self._totals)[0])

    @property
    def largest(self) -> float:
        """The largest similarity; minus infinity if there is none."""
        largest: float = _TOTALS.unpack(self._totals)[1]
        return largest

    def __call__(self) -> SampledPairs:
        """The numbers of each pair."""
        return SampledPairs(self.counts, self.similarity, self.passed)

    def count_in(self, effect: EffectMonitor) -> None:
        """Tell the monitor."""
        effect.count(self._counts, self._passed, *_TOTALS.unpack(self._totals))


class CpuPath:
    """Merges on a CPU, in one call for all layers.

    Args:
        rows: the plan's filters.
    """

    name = "cpu"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._unavailable: str | None = None
        self._merge: tuple[CpuMerge, tuple[list[int], list[int], int]] | None = None
        self._spare = bytearray()

    @property
    def reason(self) -> str:
        """Why it was chosen."""
        return f"device {self._rows.device}"

    @property
    def refusal(self) -> str:
        """Why the kernel cannot merge now; empty if it can."""
        if self._unavailable is None:
            why = unavailable()
            self._unavailable = f"the CPU kernel cannot be used: {why}" if why else ""
        if self._unavailable:
            return self._unavailable
        if torch._C._len_torch_dispatch_stack():  # as in allow_mutation_on_saved_tensors
            return "a mode that watches PyTorch's operators is active, and has to see the writes"
        return ""

    def merge(self, weights: Sequence[torch.Tensor], call: Call) -> CpuPairs:
        """See :class:`inmerge_fast.paths.path.Path`.

        Raises:
            ValueError: another thread has just moved a weight; nothing has been written.
        """
        held = list(map(torch.Tensor.untyped_storage, weights))
        try:
            return self._run(self._kernel_for(weights, held), weights, call, None)
        finally:
            del held  # until here

    def for_now(self, weights: Sequence[torch.Tensor], call: Call) -> CpuForNow:
        """See :class:`inmerge_fast.paths.path.Path`."""
        return CpuForNow(self, weights, call)

    def release(self) -> None:
        """See :meth:`inmerge_fast.paths.choice.Paths.release`."""
        self._spare = bytearray()

    def _take_spare(self) -> bytearray:
        """Memory for old filters, used again: new memory has the system make each of its pages, 1 us for 4 KB."""
        spare, self._spare = self._spare, bytearray()
        return spare

    def _kernel_for(self, weights: Sequence[torch.Tensor], held: Sequence[torch.UntypedStorage]) -> CpuMerge:
        # The kernel writes to addresses while other threads run. One of them may give a weight other memory, as
        # model.half() does, and would free what is written to. 17 us for 110 layers.
        starts, sizes = list(map(torch.UntypedStorage.data_ptr, held)), list(map(torch.UntypedStorage.nbytes, held))
        memory = starts, sizes, self._rows.moves  # the last one since a weight may move inside its storage
        found = self._merge
        if found is None or found[1] != memory:
            kernel = (
                CpuMerge(self._rows.layers, weights, self._rows.start) if found is None else found[0].moved(weights)
            )
            if not (kernel.lies_in(starts, sizes) and all(layer.is_current() for layer in self._rows.layers)):
                raise ValueError("a weight was moved or replaced by another thread while this call of merge_ began")
            found = self._merge = kernel, memory
        return found[0]

    def _run(self, kernel: CpuMerge, weights: Sequence[torch.Tensor], call: Call, kept: list[Any] | None) -> CpuPairs:
        given = None
        if call.partner != "random":
            coin, _ = self._rows.draw(call.seed, call.step, call.prob)
            thresholds = call.threshold_of_each(len(weights))
            given = coin, match_rows(
                self._rows, weights, coin, call.partner, thresholds, seed=call.seed, step=call.step
            )  # fmt: skip
        try:
            return kernel.run(
                call.seed, call.step, prob=call.prob, alpha=call.alpha, thresholds=call.thresholds,
                dry_run=call.dry_run, given=given, kept=kept,
            )  # fmt: skip
        except BaseException:  # an interrupt, which comes after the call: autograd has to know of its writes
            if not call.dry_run:
                mark_written(weights)
            raise


class CpuForNow:
    """See :class:`inmerge_fast.paths.path.ForNow`. It holds the weights' memory, and lends that for old filters."""

    def __init__(self, path: CpuPath, weights: Sequence[torch.Tensor], call: Call) -> None:
        self._path, self._weights, self._call = path, weights, call
        self._held = list(map(torch.Tensor.untyped_storage, weights))
        self._kernel = path._kernel_for(weights, self._held)
        self._kept: list[Any] = []

    def merge(self) -> CpuPairs:
        """Merge, see there."""
        self._kept = kept = [self._path._take_spare()]
        return self._path._run(self._kernel, self._weights, self._call, kept)

    def restore(self, changed: Collection[int] = ()) -> None:
        """Put back, see there."""
        if len(self._kept) < 2:  # it did not come to a write
            return
        counts, rows, passed, old = self._kept[1]
        if changed:
            start = np.concatenate([[0], np.cumsum(np.frombuffer(counts, np.int64))])
            passed = bytearray(passed)
            for place in changed:
                passed[start[place] : start[place + 1]] = bytes(int(start[place + 1] - start[place]))
        self._kernel.restore(counts, rows, passed, old)
        self._kept = []  # first: it is another merge's from then on
        self._path._spare = old

    def old(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What filters were, see there."""
        elements, dtype = self._path._rows.layers[place].layout.elements, self._path._rows.layers[place].dtype
        cpu = torch.device("cpu")  # whatever the default device is
        nothing = torch.empty(0, dtype=torch.int64, device=cpu), torch.empty(0, elements, dtype=dtype, device=cpu)
        if len(self._kept) < 2:  # it has not come to a write yet
            return nothing
        counts, rows, passed, old = self._kept[1]
        sampled = np.frombuffer(counts, np.int64)
        layers = self._path._rows.layers
        first = int(sampled[:place].sum())
        skipped = sum(
            int(count) * layer.layout.elements * layer.dtype.itemsize
            for count, layer in zip(sampled[:place], layers[:place], strict=True)
        )
        chosen = slice(first, first + int(sampled[place]))
        merged = np.frombuffer(passed, np.bool_)[chosen].nonzero()[0]
        if not len(merged):
            return nothing
        found = torch.frombuffer(old, dtype=dtype, count=int(sampled[place]) * elements, offset=skipped)
        index = np.frombuffer(rows, np.int32)[chosen][merged].astype(np.int64)
        return torch.from_numpy(index), found.view(-1, elements)[torch.from_numpy(merged)]


def unavailable() -> str:
    """Why the kernel cannot be used here; empty if it can."""
    kernel = native.load()
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
        kernel = native.load()
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
        self._same_for_all = math.nan, b""
        self._first = table[:, 0]
        self._end = self._first + table[:, 1] * table[:, 2] * [layer.dtype.itemsize for layer in layers]

    def moved(self, weights: Sequence[torch.Tensor]) -> CpuMerge:
        """The same for weights that lie elsewhere: another one, since another thread may be using this one."""
        other = copy.copy(self)
        table = np.frombuffer(self._table, np.int64).reshape(self._layers, -1).copy()
        table[:, 0] = list(map(torch.Tensor.data_ptr, weights))
        other._table = table.tobytes()
        other._first, other._end = table[:, 0], self._end - self._first + table[:, 0]
        return other

    def lies_in(self, starts: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether each layer lies inside the memory of so many bytes from its start."""
        return bool(np.all(self._first >= starts) and np.all(self._end <= np.add(starts, sizes)))

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
        kept: list[Any] | None = None,
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
            kept: a list with a bytearray, which is used again if it has room: before anything is written, what
                :meth:`restore` takes is appended.

        Raises:
            MemoryError: there is no memory for the call; nothing has been written.
            ValueError: ``thresholds`` or ``given`` do not fit the layers; nothing has been written.
        """
        coin = partner = None
        if given is not None:
            coin = np.asarray(given[0], np.bool_).tobytes()
            partner = np.asarray(given[1]).astype(np.int32, casting="same_kind").tobytes()
        return CpuPairs(
            *self._kernel.merge(
                self._table, self._limits(thresholds), coin, partner, seed, step, coin_threshold(prob), alpha,
                not dry_run, torch.get_num_threads(), self._code, kept,
            )
        )  # fmt: skip

    def restore(self, counts: bytearray, rows: bytes, passed: bytearray, old: bytearray) -> None:
        """Put the filters back that :meth:`run` has merged, to the bit, with what it has appended to ``kept``."""
        self._kernel.restore(self._table, counts, rows, passed, old, torch.get_num_threads())

    def _limits(self, thresholds: float | Sequence[float]) -> bytes:
        if isinstance(thresholds, (float, int)):
            kept = self._same_for_all  # one object: another thread may call with another threshold
            if thresholds != kept[0]:
                kept = self._same_for_all = float(thresholds), np.full(self._layers, float(thresholds)).tobytes()
            return kept[1]
        return np.asarray(thresholds, np.float64).tobytes()
