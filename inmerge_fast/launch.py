"""Runs the Triton kernels for a plan: device tables, buffers, streams."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton

from .candidates import MergeLayer
from .draw import coin_threshold
from .handle import Arguments, Handle, check_not_capturing
from .kernels import tables
from .kernels.count import _count_kernel
from .kernels.draw import _draw_kernel
from .kernels.merge import FLAG, _merge_kernel
from .kernels.prepare import _prepare_kernel
from .launch_match import Matcher
from .results import RESULT_SLOTS, Results

ROW_BLOCK = 256  # rows per program of the draw and the count
SCRATCH_SHARE = 0.12  # of the layers' bytes, at prob 0.3; merged rows with readers need 8 % on average
SMALL_SCRATCH = 1 << 16  # bytes up to which scratch may be SMALL_SHARE: a few rows of a small layer are above average
SMALL_SHARE = 0.15
PROGRAMS_PER_SM = 8
MAX_ELEMENTS = 2**31 - 2**10  # per filter: the last block of one begins and ends within 31 bits
MAX_BYTES = 2**34  # of all layers: scratch of all rows, in units of 16 bytes, is counted in 31 bits
_KINDS = {torch.float32: tables.FLOAT32, torch.bfloat16: tables.BFLOAT16, torch.float16: tables.FLOAT16}


def merge_options(constants: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Compiler options of the merge kernel with these constants for ``target`` ("cuda" or "hip")."""
    # With multiplication and addition fused, the blend would be rounded once less than the reference's.
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if target == "cuda":
        # Left to itself the assembler spills a few words to get down to 64 or 96 registers.
        dtypes = sum(constants[name] for name in ("HAS_FLOAT32", "HAS_BFLOAT16", "HAS_FLOAT16"))
        options["maxnreg"] = 128 if constants["HAS_STRIDED"] else 88 if constants["IN_MEMORY"] or dtypes > 1 else 80
    return options


def can_merge(layers: Sequence[MergeLayer]) -> bool:
    """Whether the kernels know the dtypes of all layers; float64 takes the eager path."""
    return all(layer.dtype in _KINDS and layer.layout.filters < FLAG.value for layer in layers)


class Launcher:
    """Tables and buffers of one plan on its device. Built at the first call, and with new weights built anew."""

    def __init__(self, layers: Sequence[MergeLayer], weights: Sequence[torch.Tensor], row_start: np.ndarray) -> None:
        device = weights[0].device
        check_not_capturing(device, "builds its tables and compiles its kernels")
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
        self.call = zeros(tables.CALL_WORDS.value, dtype=torch.int64)
        self.totals = zeros(2)
        self.totals[tables.LARGEST_KEY.value] = -(2**31)
        padded = -(-rows // 16) * 16  # so that every slot begins at a multiple of 16 bytes
        self.similarity = zeros(RESULT_SLOTS, padded, dtype=torch.float32)
        self.outcome = zeros(RESULT_SLOTS, padded, dtype=torch.int8)
        self.scratch = zeros(0, dtype=torch.int8)
        self.calls = -1
        self.drawn_ahead = -1  # the latest call whose draw came before it, and so took its slot
        self._thresholds: tuple[float, ...] | None = None
        self._reserved_prob = -1.0  # the prob that scratch is large enough for
        self._captured_scratch: list[torch.Tensor] = []
        self._drawn: tuple[int, int, int] | None = None  # what the next call's slot and the partners already hold
        kinds = table[:, tables.KIND.value]
        self._constants = {
            "HAS_FLOAT32": any(layer.dtype == torch.float32 for layer in layers),
            "HAS_BFLOAT16": any(layer.dtype == torch.bfloat16 for layer in layers),
            "HAS_FLOAT16": any(layer.dtype == torch.float16 for layer in layers),
            "HAS_DENSE": bool((kinds < tables.STRIDED.value).any()),
            "HAS_STRIDED": bool((kinds >= tables.STRIDED.value).any()),
            "IN_MEMORY": False,
            "BLOCK": min(1024, max(32, triton.next_power_of_2(longest))),
            "BARRIER": True,
            "SEM": "acq_rel",
            "NAIVE": False,
        }
        self._draw = Handle(_draw_kernel, {"BLOCK": ROW_BLOCK, "IN_MEMORY": False}, {})
        self._draw_from_memory = Handle(_draw_kernel, {"BLOCK": ROW_BLOCK, "IN_MEMORY": True}, {})
        self._prepare = Handle(_prepare_kernel, {}, {})
        self._count = Handle(_count_kernel, {"BLOCK": ROW_BLOCK, "MATCHED": False}, {})
        self._count_matched = Handle(_count_kernel, {"BLOCK": ROW_BLOCK, "MATCHED": True}, {})
        self._layers, self._zeros = layers, zeros
        self._matcher: Matcher | None = None
        self._counts: dict[bool, Arguments] = {}
        self._merges: dict[tuple[tuple[str, Any], ...], Handle] = {}
        self._stream: int | None = None
        self._cut_short = False
        self._row_blocks = triton.cdiv(rows, ROW_BLOCK)
        self.programs = 4  # the interpreter runs them one after the other
        if device.type == "cuda":
            self.programs = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM
        self.programs = min(self.programs, rows)

    def reserve_scratch(self, prob: float) -> None:
        """Make scratch large enough for ``prob``: rows that merge and are read, p (1 - e**-p) of all on average.

        For 0.3 at least, and from there on in steps of 0.1, so that a schedule of ``prob`` does not allocate all along.
        """
        if prob <= self._reserved_prob:
            return
        enough = max(0.3, math.ceil(prob * 10) / 10)
        share = SCRATCH_SHARE * enough * math.expm1(-enough) / (0.3 * math.expm1(-0.3))
        wanted = max(int(share * self.bytes), min(SMALL_SCRATCH, int(SMALL_SHARE * self.bytes)), 16)
        if self.scratch.numel() < wanted:
            check_not_capturing(self.device, "with a larger prob than before allocates scratch memory")
            self.follow_current_stream()  # kernels of earlier calls may still be using what is replaced
            with torch.inference_mode(False):
                self.scratch = torch.empty(wanted, dtype=torch.int8, device=self.device)
            self._tables = [self._tables_of(slot) for slot in range(RESULT_SLOTS)]
        self._reserved_prob = enough

    def _tables_of(self, slot: int) -> tuple[Arguments, Arguments]:
        """Tensor arguments of the draw and the merge that leave their results in ``slot``."""
        similarity, outcome = self.similarity[slot], self.outcome[slot]
        return (
            Arguments(self.layer_table, self.row_layer, self.partner, self.readers, outcome, self.call),
            Arguments(
                self.layer_table, self.row_layer, self.partner, self.readers, self.active, self.counter, self.slot,
                self.deferred, self.state, self.scratch, similarity, outcome, self.totals, self.call,
            ),
        )  # fmt: skip

    def _threshold_argument(self, threshold: float | Sequence[float]) -> float:
        """What the kernels take for a threshold; where layers differ, theirs go to the layer table first.

        A threshold of -1 means that every sampled pair passes, one above 1 that none does.
        """
        if not isinstance(threshold, (float, int)):
            if len(set(threshold)) > 1:
                self._set_thresholds(tuple(threshold))
                return float(tables.FROM_TABLE.value)
            threshold = threshold[0]  # the same for all: a ramp need not copy a table at every step
        return tables.ALWAYS.value if threshold == -1 else threshold

    def _set_thresholds(self, thresholds: tuple[float, ...]) -> None:
        """Each layer's own threshold to the layer table, if they are new there."""
        if thresholds != self._thresholds:
            check_not_capturing(self.device, "with other thresholds than before copies them")
            encoded = [tables.ALWAYS.value if value == -1 else value for value in thresholds]
            bits = torch.tensor(encoded, dtype=torch.float32).view(torch.int32).long()
            self.layer_table[:, tables.THRESHOLD.value] = bits.to(self.device)
            self._thresholds = thresholds

    @property
    def matcher(self) -> Matcher:
        """Tables and buffers of the partner rules, built at the first use."""
        if self._matcher is None:
            check_not_capturing(self.device, "with a partner rule builds its tables")
            kinds = {name: value for name, value in self._constants.items() if name.startswith("HAS_")}
            self._matcher = Matcher(self._layers, self.row_start, kinds, self._zeros)
        return self._matcher

    def run(
        self,
        seed: int,
        step: int,
        *,
        prob: float,
        alpha: float,
        threshold: float | Sequence[float],
        dry_run: bool,
        partner: str = "random",
        next_draw: tuple[int, int, float] | None = None,
        **overrides: Any,
    ) -> Results:
        """Draw, count and merge: three launches on the current stream, no synchronisation; five with a partner rule.

        Args:
            seed: seed of the draw.
            step: step of the draw.
            prob: see :func:`inmerge_fast.merge_`, as are the others.
            alpha: share of itself that a merged filter keeps.
            threshold: similarity that a pair must exceed, or one for each layer.
            dry_run: only measure.
            partner: the rule; other than "random" it makes two launches between draw and count.
            next_draw: seed, step and prob of the next call, if known: they are drawn after this merge, so that the next
                call need not wait for its draw.
            **overrides: constants of the merge kernel, for tests; those of the match kernel are in ``match``.
        """
        coin = coin_threshold(prob)
        with self.lock, self._on_device():
            self.reserve_scratch(prob if next_draw is None else max(prob, next_draw[2]))
            limit = self._threshold_argument(threshold)
            stream = self.follow_current_stream()
            drawn, self._drawn = (None if self._is_captured() else self._drawn), None
            self.calls += 1
            slot = self.calls % RESULT_SLOTS
            if drawn != (seed, step, coin):
                self._draw.launch(self._row_blocks, stream, self._tables[slot][0], (seed, step, coin, self.rows))
            self._match(partner, stream, slot, (seed, step), limit, overrides.pop("match", {}))
            self.merge_drawn(
                slot, alpha=alpha, threshold=limit, dry_run=dry_run, matched=partner != "random", **overrides
            )
            if next_draw is not None:
                ahead = (next_draw[0], next_draw[1], coin_threshold(next_draw[2]))
                self.drawn_ahead = self.calls + 1
                self._draw.launch(
                    self._row_blocks, stream, self._tables[(slot + 1) % RESULT_SLOTS][0], (*ahead, self.rows)
                )
                self._drawn = ahead
            return Results(self, self.calls)

    def prepare(
        self, seed: int, step: int, *, prob: float, alpha: float, threshold: float | Sequence[float], write: bool
    ) -> None:
        """Put a call's numbers into device memory, where :meth:`run_from_memory` finds them, in one launch.

        Each layer's threshold is copied where it has changed. Scratch memory is reserved for the first ``prob`` only: a
        captured graph knows its address, and a larger prob does with less.
        """
        with self.lock, self._on_device():
            if self._reserved_prob < 0:
                self.reserve_scratch(prob)
            if isinstance(threshold, (float, int)):
                threshold = (threshold,) * len(self.layer_table)
            self._set_thresholds(tuple(threshold))
            numbers = (seed, step, coin_threshold(prob), alpha, 1.0 - alpha, int(write))
            self._prepare.launch(1, self.follow_current_stream(), Arguments(self.call), numbers)

    def run_from_memory(self, *, partner: str = "random", **overrides: Any) -> Results:
        """The launches of :meth:`run` with the numbers that :meth:`prepare` left in device memory, for CUDA graphs.

        Every replay leaves its statistics in the slot of the call that was captured.
        """
        with self.lock, self._on_device():
            if self._reserved_prob < 0:
                raise RuntimeError("nothing was prepared: call prepare before run_from_memory")
            stream, self._drawn = self.follow_current_stream(), None
            self.calls += 1
            slot = self.calls % RESULT_SLOTS
            limit = float(tables.FROM_TABLE.value)
            self._is_captured()
            self._draw_from_memory.launch(self._row_blocks, stream, self._tables[slot][0], (0, 0, 0, self.rows))
            self._match(partner, stream, slot, None, limit, overrides.pop("match", {}))
            overrides |= {"IN_MEMORY": True}
            self.merge_drawn(slot, alpha=0.0, threshold=limit, dry_run=False, matched=partner != "random", **overrides)
            return Results(self, self.calls)

    def _is_captured(self) -> bool:
        """Whether a CUDA graph takes this call along, which then knows the address of scratch for good."""
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return False
        if all(kept is not self.scratch for kept in self._captured_scratch):
            self._captured_scratch.append(self.scratch)
        return True

    def _match(
        self, partner: str, stream: int, slot: int, seed_step: tuple[int, int] | None, limit: float,
        overrides: dict[str, Any],
    ) -> None:  # fmt: skip
        if partner != "random":
            seed, step = seed_step or (None, 0)
            self.matcher.run(
                partner, stream, (self.layer_table, self.partner, self.similarity[slot], self.call), seed, step, limit,
                **overrides,
            )  # fmt: skip

    def find_partners(self, seed: int, step: int, *, prob: float, partner: str, threshold: float) -> None:
        """Draw and match without merging, which leaves the best pairs in device memory; for benchmarks and tests."""
        with self.lock, self._on_device():
            self.reserve_scratch(prob)
            stream, self._drawn = self.follow_current_stream(), None
            self._draw.launch(
                self._row_blocks, stream, self._tables[0][0], (seed, step, coin_threshold(prob), self.rows)
            )
            self._match(partner, stream, 0, (seed, step), self._threshold_argument(threshold), {})

    def found_partners(self) -> torch.Tensor:
        """What :meth:`find_partners` found: int64 ``(rows,)``, row numbers; only sampled rows with a partner count."""
        return (self.matcher.best & tables.FURTHEST_ROW.value) ^ tables.FURTHEST_ROW.value

    def merge_drawn(
        self,
        slot: int,
        *,
        alpha: float,
        threshold: float | Sequence[float],
        dry_run: bool,
        matched: bool = False,
        **overrides: Any,
    ) -> None:
        """Count and merge with the partners that are in the table, whoever chose them, or that were just matched."""
        stream, limit = self.follow_current_stream(), self._threshold_argument(threshold)
        if self._cut_short:  # after a count alone its list would only grow, past its end
            self.state.zero_()
        self._cut_short = True
        count = self._count_matched if matched else self._count
        count.launch(self._row_blocks, stream, self._counted(matched), (self.rows,))
        programs, capacity = self.programs, self.scratch.numel() // 16
        if overrides:
            programs, capacity = overrides.pop("programs", programs), overrides.pop("capacity", capacity)
        numbers = (capacity, alpha, 1.0 - alpha, limit, int(not dry_run), programs)
        self._merge_handle(overrides).launch(programs, stream, self._tables[slot][1], numbers)
        self._cut_short = False

    def _counted(self, matched: bool) -> Arguments:
        """Tensor arguments of the count; ``best`` is not looked at unless partners were matched."""
        if matched not in self._counts:
            best = self.matcher.best if matched else self.call
            self._counts[matched] = Arguments(self.partner, self.readers, self.active, self.state, best)
        return self._counts[matched]

    def _merge_handle(self, overrides: dict[str, Any]) -> Handle:
        key = tuple(sorted(overrides.items())) if overrides else ()
        if key not in self._merges:
            target = "hip" if torch.version.hip else "cuda"
            constants = self._constants | overrides
            options = merge_options(constants, target)
            if "num_warps" in overrides:
                options["num_warps"] = constants.pop("num_warps")
            self._merges[key] = Handle(_merge_kernel, constants, options)
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
            matched = self._matcher.tensors() if self._matcher else []
            # Or their memory would be reused as if only their first stream used it.
            for value in [*vars(self).values(), *matched]:
                if isinstance(value, torch.Tensor):
                    value.record_stream(current)
            self._stream = stream
        return stream


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
