"""Runs the Triton kernels for a plan: device tables, buffers, streams. The only file that touches Triton's launcher."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from .candidates import MergeLayer
from .draw import coin_threshold
from .kernels import tables
from .kernels.count import _count_kernel
from .kernels.draw import _draw_kernel
from .kernels.merge import FLAG, _merge_kernel
from .launch_match import Matcher
from .stats import SampledPairs

RESULT_SLOTS = 8  # calls whose statistics stay readable
ROW_BLOCK = 256  # rows per program of the draw and the count
SCRATCH_SHARE = 0.12  # of the layers' bytes, at prob 0.3; merged rows with readers need 8 % on average
SMALL_SCRATCH = 1 << 16  # bytes up to which scratch may be SMALL_SHARE: a few rows of a small layer are above average
SMALL_SHARE = 0.15
PROGRAMS_PER_SM = 8
MAX_ELEMENTS = 2**31 - 2**10  # per filter: the last block of one begins and ends within 31 bits
MAX_BYTES = 2**34  # of all layers: scratch of all rows, in units of 16 bytes, is counted in 31 bits
_KINDS = {torch.float32: tables.FLOAT32, torch.bfloat16: tables.BFLOAT16, torch.float16: tables.FLOAT16}


def merge_options(has_strided: bool, target: str) -> dict[str, Any]:
    """Compiler options of the merge kernel for ``target`` ("cuda" or "hip")."""
    # With multiplication and addition fused, the blend would be rounded once less than the reference's.
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if target == "cuda":
        # Left to itself the assembler spills a few words to get down to 64 or 96 registers.
        options["maxnreg"] = 128 if has_strided else 80
    return options


class Handle:
    """A kernel with its constants and options fixed, compiled at the first launch.

    Triton's own ``kernel[grid](...)`` looks every argument over again at each call, 22 us; a compiled kernel's launcher
    takes 2 to 3 us. It serves the types and alignments of the first launch only, which a :class:`Launcher` keeps: fixed
    tables, 32-bit counts, 64-bit seed and step.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: Any = None

    def launch(self, programs: int, stream: int, tensors: tuple[torch.Tensor, ...], numbers: tuple[Any, ...]) -> None:
        """Launch ``programs`` programs on ``stream`` with the kernel's arguments in order: tables, then numbers."""
        if not isinstance(self._kernel, triton.JITFunction):  # interpreted
            self._kernel[(programs,)](*tensors, *numbers, **self._constants)
            return
        if self._compiled is None:
            _check_not_capturing(tensors[0].device, "compiles its kernels")
            options = self._constants | self._options
            self._compiled = self._kernel.warmup(*tensors, *numbers, grid=(1,), **options)
            self._compiled._init_handles()
        compiled = self._compiled
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *[tensor.data_ptr() for tensor in tensors], *numbers, *self._constants.values(),
        )  # fmt: skip


def can_merge(layers: Sequence[MergeLayer]) -> bool:
    """Whether the kernels know the dtypes of all layers; float64 takes the eager path."""
    return all(layer.dtype in _KINDS and layer.layout.filters < FLAG.value for layer in layers)


@dataclass(frozen=True)
class Results:
    """Where a call's results are: a slot, readable until ``RESULT_SLOTS`` later calls have reused it."""

    launcher: Launcher
    call: int

    def fetch(self) -> SampledPairs:
        """Wait for the device and copy the results to the host.

        Raises:
            RuntimeError: the slot has been reused.
        """
        launcher = self.launcher
        with launcher.lock:
            if launcher.calls - self.call >= RESULT_SLOTS:
                raise RuntimeError(
                    f"the statistics of this call are gone: the plan keeps those of its last {RESULT_SLOTS} calls in "
                    "device memory; read them earlier"
                )
            slot = self.call % RESULT_SLOTS
            launcher.follow_current_stream()  # the call may have run on another one
            similarity = launcher.similarity[slot, : launcher.rows].cpu().double().numpy()
            outcome = launcher.outcome[slot, : launcher.rows].cpu().numpy()
        sampled = outcome != tables.NOT_SAMPLED.value
        counts = np.add.reduceat(sampled, launcher.row_start[:-1], dtype=np.int64)
        return SampledPairs(counts, similarity[sampled], outcome[sampled] == tables.PASSED.value)


class Launcher:
    """Tables and buffers of one plan on its device. Built at the first call, and with new weights built anew."""

    def __init__(self, layers: Sequence[MergeLayer], weights: Sequence[torch.Tensor], row_start: np.ndarray) -> None:
        device = weights[0].device
        _check_not_capturing(device, "builds its tables and compiles its kernels")
        rows = int(row_start[-1])
        if rows >= 2**31:
            raise ValueError(f"the plan has {rows} filters, the kernels number them with 32 bits")
        longest = max((layer.layout.elements for layer in layers), default=0)
        self.bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        if longest > MAX_ELEMENTS or self.bytes > MAX_BYTES:
            raise ValueError(
                f"the weights of this plan hold {self.bytes} bytes and up to {longest} elements per filter, more than "
                f"the kernels count with 32 bits ({MAX_BYTES} and {MAX_ELEMENTS}); merge fewer layers per call, or set "
                "INMERGE_FORCE_EAGER=1"
            )
        self.lock = threading.Lock()
        self.device = device
        self.row_start = row_start
        self.rows = rows
        table = np.zeros((len(layers), tables.COLUMNS.value), np.int64)
        for line, layer, weight, first_row in zip(table, layers, weights, row_start, strict=False):
            _fill_line(line, layer, weight, int(first_row))

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            with torch.inference_mode(False):  # the buffers outlive the mode that this call may run in
                return torch.zeros(shape, dtype=dtype, device=device)

        self.layer_table = zeros(*table.shape, dtype=torch.int64).copy_(torch.from_numpy(table))
        row_layer = np.repeat(np.arange(len(layers), dtype=np.int32), np.diff(row_start))
        self.row_layer = zeros(rows).copy_(torch.from_numpy(row_layer))
        self.partner, self.readers, self.active = zeros(rows), zeros(rows), zeros(rows)
        self.counter, self.slot, self.deferred = zeros(rows), zeros(rows), zeros(rows)
        self.state = zeros(tables.STATE_WORDS.value)
        self.seed_step = zeros(2, dtype=torch.int64)
        self.totals = zeros(2)
        self.totals[tables.LARGEST_KEY.value] = -(2**31)
        padded = -(-rows // 16) * 16  # so that every slot begins at a multiple of 16 bytes
        self.similarity = zeros(RESULT_SLOTS, padded, dtype=torch.float32)
        self.outcome = zeros(RESULT_SLOTS, padded, dtype=torch.int8)
        self.scratch = zeros(0, dtype=torch.int8)
        self.calls = -1
        kinds = table[:, tables.KIND.value]
        self._has_strided = bool((kinds >= tables.STRIDED.value).any())
        self._constants = {
            "HAS_FLOAT32": any(layer.dtype == torch.float32 for layer in layers),
            "HAS_BFLOAT16": any(layer.dtype == torch.bfloat16 for layer in layers),
            "HAS_FLOAT16": any(layer.dtype == torch.float16 for layer in layers),
            "HAS_DENSE": bool((kinds < tables.STRIDED.value).any()),
            "HAS_STRIDED": self._has_strided,
            "BLOCK": min(1024, max(32, triton.next_power_of_2(longest))),
            "BARRIER": True,
            "SEM": "acq_rel",
            "NAIVE": False,
        }
        self._draw = Handle(_draw_kernel, {"BLOCK": ROW_BLOCK, "IN_MEMORY": False}, {})
        self._draw_from_memory = Handle(_draw_kernel, {"BLOCK": ROW_BLOCK, "IN_MEMORY": True}, {})
        self._count = Handle(_count_kernel, {"BLOCK": ROW_BLOCK, "MATCHED": False}, {})
        self._count_matched = Handle(_count_kernel, {"BLOCK": ROW_BLOCK, "MATCHED": True}, {})
        self._layers, self._zeros = layers, zeros
        self._matcher: Matcher | None = None
        self._merges: dict[tuple[tuple[str, Any], ...], Handle] = {}
        self._stream: int | None = None
        self._cut_short = False
        self._reserved = -1.0  # the prob that scratch is large enough for
        self._row_blocks = triton.cdiv(rows, ROW_BLOCK)
        self.programs = 4  # the interpreter runs them one after the other
        if device.type == "cuda":
            self.programs = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM
        self.programs = min(self.programs, rows)

    def reserve_scratch(self, prob: float) -> None:
        """Make scratch large enough for ``prob``: rows that merge and are read, p (1 - e**-p) of all on average.

        For 0.3 at least, and from there on in steps of 0.1, so that a schedule of ``prob`` does not allocate all along.
        """
        if prob <= self._reserved:
            return
        enough = max(0.3, math.ceil(prob * 10) / 10)
        share = SCRATCH_SHARE * enough * math.expm1(-enough) / (0.3 * math.expm1(-0.3))
        wanted = max(int(share * self.bytes), min(SMALL_SCRATCH, int(SMALL_SHARE * self.bytes)), 16)
        if self.scratch.numel() < wanted:
            _check_not_capturing(self.device, "with a larger prob than before allocates scratch memory")
            self.follow_current_stream()  # kernels of earlier calls may still be using what is replaced
            with torch.inference_mode(False):
                self.scratch = torch.empty(wanted, dtype=torch.int8, device=self.device)
            self._tables = [self._tables_of(slot) for slot in range(RESULT_SLOTS)]
        self._reserved = enough

    def _tables_of(self, slot: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Tensor arguments of the draw and the merge that leave their results in ``slot``."""
        similarity, outcome = self.similarity[slot], self.outcome[slot]
        return (
            (self.layer_table, self.row_layer, self.partner, self.readers, outcome, self.seed_step),
            (
                self.layer_table, self.row_layer, self.partner, self.readers, self.active, self.counter, self.slot,
                self.deferred, self.state, self.scratch, similarity, outcome, self.totals,
            ),
        )  # fmt: skip

    @property
    def matcher(self) -> Matcher:
        """Tables and buffers of the partner rules, built at the first use."""
        if self._matcher is None:
            _check_not_capturing(self.device, "with a partner rule builds its tables")
            kinds = {name: value for name, value in self._constants.items() if name.startswith("HAS_")}
            self._matcher = Matcher(self._layers, self.row_start, kinds, self._zeros, Handle)
        return self._matcher

    def run(
        self,
        seed: int | None,
        step: int,
        *,
        prob: float,
        alpha: float,
        threshold: float,
        dry_run: bool,
        partner: str = "random",
        **overrides: Any,
    ) -> Results:
        """Draw, count and merge: three launches on the current stream, no synchronisation; five with a partner rule.

        Args:
            seed: seed of the draw; None takes it and the step from ``self.seed_step`` in device memory.
            step: step of the draw.
            prob: see :func:`inmerge_fast.merge_`, as are the others.
            alpha: share of itself that a merged filter keeps.
            threshold: similarity that a pair must exceed.
            dry_run: only measure.
            partner: the rule; other than "random" it makes two launches between draw and count.
            **overrides: constants of the merge kernel, for tests; those of the match kernel are in ``match``.
        """
        with self.lock, self._on_device():
            self.reserve_scratch(prob)
            self.calls += 1
            slot = self.calls % RESULT_SLOTS
            draw = self._draw_from_memory if seed is None else self._draw
            draw.launch(
                self._row_blocks,
                self.follow_current_stream(),
                self._tables[slot][0],
                (seed or 0, step, coin_threshold(prob), self.rows),
            )
            match_overrides = overrides.pop("match", {})
            if partner != "random":
                self.matcher.run(
                    partner, self.follow_current_stream(),
                    (self.layer_table, self.partner, self.similarity[slot], self.seed_step),
                    seed, step, threshold, **match_overrides,
                )  # fmt: skip
            self.merge_drawn(
                slot, alpha=alpha, threshold=threshold, dry_run=dry_run, matched=partner != "random", **overrides
            )
            return Results(self, self.calls)

    def merge_drawn(
        self, slot: int, *, alpha: float, threshold: float, dry_run: bool, matched: bool = False, **overrides: Any
    ) -> None:
        """Count and merge with the partners that are in the table, whoever chose them, or that were just matched."""
        stream = self.follow_current_stream()
        if self._cut_short:  # after a count alone its list would only grow, past its end
            self.state.zero_()
        self._cut_short = True
        best = self.matcher.best if matched else self.seed_step  # any tensor of its type: not looked at
        (self._count_matched if matched else self._count).launch(
            self._row_blocks, stream, (self.partner, self.readers, self.active, self.state, best), (self.rows,)
        )
        programs = overrides.pop("programs", self.programs)
        capacity = overrides.pop("capacity", self.scratch.numel() // 16)
        numbers = (capacity, alpha, 1.0 - alpha, threshold, int(threshold == -1), int(not dry_run), programs)
        self._merge_handle(overrides).launch(programs, stream, self._tables[slot][1], numbers)
        self._cut_short = False

    def _merge_handle(self, overrides: dict[str, Any]) -> Handle:
        key = tuple(sorted(overrides.items()))
        if key not in self._merges:
            target = "hip" if torch.version.hip else "cuda"
            self._merges[key] = Handle(
                _merge_kernel, self._constants | overrides, merge_options(self._has_strided, target)
            )
        return self._merges[key]

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def follow_current_stream(self) -> int:
        """The current stream; the first time on another one, it waits for what this plan still does on the last."""
        if self.device.type != "cuda":
            return 0
        current = torch.cuda.current_stream(self.device)
        stream: int = current.cuda_stream
        if stream != self._stream:
            # torch.cuda.graph() synchronises before it captures, and a captured stream may not wait for another.
            if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                current.wait_stream(torch.cuda.ExternalStream(self._stream, self.device))
            held = [*vars(self).values(), *(self._matcher.tensors() if self._matcher is not None else ())]
            for value in held:  # or their memory would be reused as if only their first stream used it
                if isinstance(value, torch.Tensor):
                    value.record_stream(current)
            self._stream = stream
        return stream


def _check_not_capturing(device: torch.device, what: str) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first merge_ of a plan {what}, which a CUDA graph cannot capture; call merge_ once before capturing"
        )


def _fill_line(line: np.ndarray, layer: MergeLayer, weight: torch.Tensor, first_row: int) -> None:
    layout, size = layer.layout, weight.element_size()
    aligned = layout.is_dense and weight.data_ptr() % 16 == 0 and layout.elements * size % 16 == 0
    columns = {
        tables.BASE: weight.data_ptr(),
        tables.ELEMENTS: layout.elements,
        tables.GROUP_SIZE: layout.group_size,
        tables.FIRST_ROW: first_row,
        tables.LAYER_ID: layer.layer_id,
        tables.KIND: _KINDS[layer.dtype].value + (0 if aligned else tables.STRIDED.value),
        tables.GROUP_STRIDE: layout.group_stride,
        tables.FILTER_STRIDE: layout.filter_stride,
        tables.RUN: layout.run,
        tables.OUTER_STRIDE: layout.outer_stride,
        tables.INNER_STRIDE: layout.inner_stride,
        tables.SCRATCH_UNITS: -(-layout.elements * size // 16),
    }
    for column, value in columns.items():
        line[column.value] = value
