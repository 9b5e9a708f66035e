"""Runs the Triton kernels for a plan: device tables, buffers, streams."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton

from ...draw import coin_threshold
from ...kernels import tables
from ...kernels.count import _count_kernel
from ...kernels.draw import _draw_kernel
from ...kernels.merge import _merge_kernel
from ...kernels.prepare import _prepare_kernel
from ...plan.candidates import MergeLayer
from .draw_ahead import DRAW_AHEAD, Drawn, next_draw
from .handle import Arguments, Handle, check_not_capturing, merge_options, merge_programs, merge_shape
from .launch_match import Matcher
from .layer_table import check_size, kind_at, layer_table
from .results import Results
from .running import Running
from .slots import CAPTURED_CALLS, SLOTS, Slot, Slots
from .streams import StreamOrder

ROW_BLOCK = 256  # rows per program of the draw and the count
SCRATCH_SHARE = 0.12  # of the layers' bytes, at prob 0.3; merged rows with readers need 8 % on average
SMALL_SCRATCH = 1 << 16  # bytes up to which scratch may be SMALL_SHARE: a few rows of a small layer are above average
SMALL_SHARE = 0.15
_NOTHING = contextlib.nullcontext()


class Launcher:
    """Tables and buffers of one plan on its device. Built at the first call; weights that move are taken in."""

    def __init__(self, layers: Sequence[MergeLayer], weights: Sequence[torch.Tensor], row_start: np.ndarray) -> None:
        device = weights[0].device
        check_not_capturing(device, "builds its tables and compiles its kernels")
        rows = int(row_start[-1])
        self.bytes = check_size(layers, weights, rows)
        self.device, self.on_gpu = device, device.type == "cuda"
        self.row_start = row_start
        self.rows = rows
        table = layer_table(layers, weights, row_start)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            with torch.inference_mode(False):  # the buffers outlive the mode that this call may run in
                return torch.zeros(shape, dtype=dtype, device=device)

        self.layer_table = zeros(*table.shape, dtype=torch.int64).copy_(torch.from_numpy(table))
        row_layer = np.repeat(np.arange(len(layers), dtype=np.int32), np.diff(row_start))
        self.row_layer = zeros(rows).copy_(torch.from_numpy(row_layer))
        self.counter, self.slot, self.deferred = zeros(rows), zeros(rows), zeros(rows)
        self.call = zeros(tables.CALL_WORDS.value, dtype=torch.int64)
        self._streams = StreamOrder(device, self._tensors)
        self.follow_current_stream = self._streams.follow
        self.running = Running(self.row_layer, len(layers), zeros)
        self.slots = slots = Slots(row_start, self.running, zeros, self._streams.follow)
        self.lock, self.slot_of = slots.lock, slots.of
        self._draw_tables = Arguments(
            self.layer_table, self.row_layer, slots.partner, slots.readers, slots.active, slots.outcome, slots.state,
            self.call,
        )  # fmt: skip
        self.scratch = zeros(0, dtype=torch.int8)
        self.kept: tuple[torch.Tensor, ...] = ()  # for old filters, by a Keeper
        self.calls = -1  # number of the latest that was not captured
        self._drawn: Drawn | None = None
        self._clean = range(SLOTS)  # the calls whose slots a draw may count in: their readers and state are zero
        self._thresholds: tuple[float, ...] | None = None
        self._reserved_prob = -1.0  # the prob that scratch is large enough for
        self._captured_scratch: list[torch.Tensor] = []
        self._has_captured = False  # replays of a graph come unseen, between any two calls
        self._may_capture = False
        kinds = table[:, tables.KIND.value]
        self._kinds: list[int] = kinds.tolist()
        self.target = "hip" if torch.version.hip else "cuda"
        self._constants = {
            "HAS_FLOAT32": any(layer.dtype == torch.float32 for layer in layers),
            "HAS_BFLOAT16": any(layer.dtype == torch.bfloat16 for layer in layers),
            "HAS_FLOAT16": any(layer.dtype == torch.float16 for layer in layers),
            "HAS_DENSE": bool((kinds < tables.STRIDED.value).any()),
            "HAS_STRIDED": bool((kinds >= tables.STRIDED.value).any()),
            "IN_MEMORY": False,
            **merge_shape(sum(weight.numel() for weight in weights) / max(rows, 1), self.target),
            "BARRIER": True,
            "SEM": "acq_rel",
            "NAIVE": False,
        }
        rows_of = ("HAS_FLOAT32", "HAS_BFLOAT16", "HAS_FLOAT16", "HAS_DENSE", "HAS_STRIDED", "BLOCK", "STRIDED_BLOCK")
        self.row_constants = {name: self._constants[name] for name in rows_of}
        self.row_warps = merge_options(self._constants, self.target)["num_warps"]
        in_turns = {"BLOCK": ROW_BLOCK, "SLOTS": SLOTS}
        in_any = in_turns | {"SLOTS": SLOTS + CAPTURED_CALLS}  # for a single call, which may be in a graph
        self._draw = Handle(_draw_kernel, in_turns | {"IN_MEMORY": False, "COUNT": True}, {})
        self._draw_only = Handle(_draw_kernel, in_any | {"IN_MEMORY": False, "COUNT": False}, {})
        self._draw_from_memory = Handle(_draw_kernel, in_any | {"IN_MEMORY": True, "COUNT": False}, {})
        self._prepare = Handle(_prepare_kernel, {}, {})
        self._count = Handle(_count_kernel, {"BLOCK": ROW_BLOCK, "MATCHED": False}, {})
        self._count_matched = Handle(_count_kernel, {"BLOCK": ROW_BLOCK, "MATCHED": True}, {})
        self.layers, self.zeros = layers, zeros
        self._matcher: Matcher | None = None
        self._counts: dict[tuple[int, bool], Arguments] = {}
        self._merges: dict[tuple[tuple[str, Any], ...], Handle] = {}
        self._row_blocks = triton.cdiv(rows, ROW_BLOCK)
        self.programs = 4  # the interpreter runs them one after the other
        if self.on_gpu:
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            self.programs = multiprocessors * merge_programs(self._constants, self.target)
        self.programs = min(self.programs, rows)

    def move(self, weights: Sequence[torch.Tensor]) -> bool:
        """Take in where weights lie now that have moved; False if they lie so that the kernels must be chosen anew."""
        addresses = list(map(torch.Tensor.data_ptr, weights))
        if list(map(kind_at, self.layers, addresses)) != self._kinds:
            return False
        with self.lock, self.on_device():
            check_not_capturing(self.device, "after a weight has moved copies a table")
            self.follow_current_stream()  # kernels of earlier calls may still be reading the table
            self.layer_table[:, tables.BASE.value] = torch.tensor(addresses, device="cpu").to(self.device)
        return True

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
        # Also where scratch is large enough already: the last time may have been interrupted between the two.
        self._tables = [self._merge_tables(slot) for slot in self.slots]
        self._reserved_prob = enough

    def _merge_tables(self, slot: Slot) -> Arguments:
        """Tensor arguments of the merge of the call in ``slot``."""
        return Arguments(
            self.layer_table, self.row_layer, slot.partner, slot.readers, slot.active, self.counter, self.slot,
            self.deferred, slot.state, self.scratch, slot.similarity, slot.outcome, self.running.times,
            self.running.largest, self.call,
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
            bits = torch.tensor(encoded, dtype=torch.float32, device="cpu").view(torch.int32).long()
            self.layer_table[:, tables.THRESHOLD.value] = bits.to(self.device)
            self._thresholds = thresholds

    @property
    def matcher(self) -> Matcher:
        """Tables and buffers of the partner rules, built at the first use."""
        if self._matcher is None:
            check_not_capturing(self.device, "with a partner rule builds its tables")
            has = {name: value for name, value in self._constants.items() if name.startswith("HAS_")}
            self._matcher = Matcher(self.layers, self.row_start, self._kinds, has, self.zeros)
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
        **overrides: Any,
    ) -> Results:
        """Draw and merge on the current stream, no synchronisation.

        That is two launches, or one where an earlier draw has drawn for this call, too (:mod:`.draw_ahead`). Five with
        a partner rule, and one more for each further kind of layers (dtype, dense or strided); three in a CUDA graph
        and once one was captured.

        Args:
            seed: seed of the draw.
            step: step of the draw.
            prob: see :func:`inmerge_fast.merge_`, as are the others.
            alpha: share of itself that a merged filter keeps.
            threshold: similarity that a pair must exceed, or one for each layer.
            dry_run: only measure.
            partner: the rule; other than "random" it takes three launches or more between draw and merge.
            **overrides: constants and compiler options of the merge kernel, for tests and tuning; constants of the
                match kernel are in ``match``.
        """
        with self.lock, self.on_device():
            stream = self.follow_current_stream()  # first: what is copied and zeroed here comes after earlier calls
            self.reserve_scratch(prob)
            match = overrides.pop("match", {})
            call, limit = self.draw_for(stream, seed, step, prob, threshold, partner, write=not dry_run, match=match)
            self._merge(self.slots.index_of(call), stream, alpha, limit, dry_run, overrides)
            return Results(self.slots, call)

    def draw_for(
        self, stream: int, seed: int, step: int, prob: float, threshold: float | Sequence[float], partner: str, *,
        write: bool, match: dict[str, Any] | None = None,
    ) -> tuple[int, float]:  # fmt: skip
        """Draw, match and count for the next call, or find that an earlier draw has done so; the caller holds the lock.

        Returns:
            The number of the call, and what its kernel takes for the threshold.
        """
        coin, limit = coin_threshold(prob), self._threshold_argument(threshold)
        call = self._next_call()
        if self.on_gpu and call >= 0 and not self._may_capture:
            # What a graph launches, it cannot compile.
            self._draw_only.compile(self._draw_tables, (seed, step, 0, coin, self.rows, 0, 1))
            self._count.compile(self._counted(0, False), (self.rows, 1))
            self._may_capture = True
        slot = self.slots.index_of(call)
        if partner != "random" or self._has_captured:
            self._draw_apart(self._draw_only, stream, call, seed, step, coin)
            self._match(partner, stream, slot, (seed, step), limit, match or {})
            self._count_drawn(stream, slot, matched=partner != "random", write=write)
        elif self._drawn is None or not self._drawn.serves(call, seed, step, coin):
            self._draw_and_count(stream, next_draw(self._drawn, call, seed, step, coin))
        return call, limit

    def _draw_and_count(self, stream: int, draws: Drawn) -> None:
        """Draw and count in one launch, for one call or for several."""
        # First nothing is known to be drawn or clean: an interrupt may come at any place below, or after the launch.
        clean, self._drawn, self._clean = self._clean, None, range(0)
        self.slots.take(draws.end)
        if draws.first < clean.start or draws.end > clean.stop:
            # Other draws have counted there, for calls that did not come, or calls in between have left theirs.
            self.slots.clean()
            clean = range(draws.first, draws.first + SLOTS)
        number = draws.end - draws.first
        stride = draws.stride if number > 1 else 0  # that of a single draw means nothing, and may not fit 64 bits
        numbers = (draws.seed, draws.step, stride, draws.coin, self.rows, draws.first % SLOTS, number)
        self._draw.launch((self._row_blocks, DRAW_AHEAD), stream, self._draw_tables, numbers)
        self._clean, self._drawn = range(draws.end, max(clean.stop, draws.end + DRAW_AHEAD)), draws

    def _draw_apart(self, kernel: Handle, stream: int, call: int, seed: int, step: int, coin: int) -> None:
        """Draw for this call only, and count in a launch of its own: ahead of partner rules, and in CUDA graphs.

        A graph's replays come unseen, so it can rely on nothing that another draw has left.
        """
        self._drawn = None
        self.slots.take(call + 1)
        numbers = (seed, step, 0, coin, self.rows, self.slots.index_of(call), 1)
        kernel.launch((self._row_blocks, 1), stream, self._draw_tables, numbers)

    def prepare(
        self, seed: int, step: int, *, prob: float, alpha: float, threshold: float | Sequence[float], write: bool
    ) -> None:
        """Put a call's numbers into device memory, where :meth:`run_from_memory` finds them, in one launch.

        Each layer's threshold is copied where it has changed. Scratch memory is reserved for the first ``prob`` only: a
        captured graph knows its address, and a larger prob does with less.
        """
        with self.lock, self.on_device():
            stream = self.follow_current_stream()
            if self._reserved_prob < 0:
                self.reserve_scratch(prob)
            if isinstance(threshold, (float, int)):
                threshold = (threshold,) * len(self.layer_table)
            self._set_thresholds(tuple(threshold))
            numbers = (seed, step, coin_threshold(prob), alpha, 1.0 - alpha, int(write))
            self._prepare.launch((1, 1), stream, Arguments(self.call), numbers)

    def run_from_memory(self, *, partner: str = "random", again: Results | None = None, **overrides: Any) -> Results:
        """The launches of :meth:`run` with the numbers that :meth:`prepare` left in device memory, for CUDA graphs.

        Every replay leaves its statistics in the slot of the call that was captured; with ``again``, what an earlier
        capture returned, in the same one, since that graph is replayed no more.
        """
        with self.lock, self.on_device():
            if self._reserved_prob < 0:
                raise RuntimeError("nothing was prepared: call prepare before run_from_memory")
            stream = self.follow_current_stream()
            call = self._next_call(again.call if again is not None and again.slots is self.slots else 0)
            slot, limit = self.slots.index_of(call), float(tables.FROM_TABLE.value)
            self._draw_apart(self._draw_from_memory, stream, call, 0, 0, 0)
            self._match(partner, stream, slot, None, limit, overrides.pop("match", {}))
            # A replay that must not write samples nobody (prob 0), so whatever is counted was allowed to write.
            self._count_drawn(stream, slot, matched=partner != "random", write=True)
            overrides |= {"IN_MEMORY": True}
            self._merge(slot, stream, 0.0, limit, False, overrides)
            return Results(self.slots, call)

    def _next_call(self, again: int = 0) -> int:
        """The number of this call, or ``again`` if both are in a CUDA graph."""
        if self._is_captured():
            return again if again < 0 else self.slots.capture()
        self.calls += 1
        return self.calls

    def _is_captured(self) -> bool:
        """Whether a CUDA graph takes this call along, which then knows the address of scratch for good."""
        if not (self.on_gpu and torch.cuda.is_current_stream_capturing()):
            return False
        self._has_captured = True
        if all(kept is not self.scratch for kept in self._captured_scratch):
            self._captured_scratch.append(self.scratch)
        return True

    def _match(
        self, partner: str, stream: int, slot: int, seed_step: tuple[int, int] | None, limit: float,
        overrides: dict[str, Any],
    ) -> None:  # fmt: skip
        if partner != "random":
            seed, step = seed_step or (None, 0)
            drawn = self.slots[slot]
            self.matcher.run(
                partner, stream, (self.layer_table, drawn.partner, drawn.similarity, self.call), seed, step, limit,
                **overrides,
            )  # fmt: skip

    def find_partners(self, seed: int, step: int, *, prob: float, partner: str, threshold: float) -> None:
        """Draw and match without merging, which leaves the best pairs in device memory; for benchmarks and tests."""
        with self.lock, self.on_device():
            self.reserve_scratch(prob)
            stream = self.follow_current_stream()
            following = self.calls + 1  # in its slot, so that the last calls' statistics stay what they are
            self._draw_apart(self._draw_only, stream, following, seed, step, coin_threshold(prob))
            slot, limit = self.slots.index_of(following), self._threshold_argument(threshold)
            self._match(partner, stream, slot, (seed, step), limit, {})

    def found_partners(self) -> torch.Tensor:
        """What :meth:`find_partners` found: int64 ``(rows,)``, row numbers; only sampled rows with a partner count."""
        return (self.matcher.best & tables.FURTHEST_ROW.value) ^ tables.FURTHEST_ROW.value

    def merge_drawn(
        self, slot: int, *, alpha: float, threshold: float | Sequence[float], dry_run: bool, **overrides: Any
    ) -> None:
        """Count and merge with the partners that are in the slot, whoever chose them; for tests."""
        stream, limit = self.follow_current_stream(), self._threshold_argument(threshold)
        self._count_drawn(stream, slot, matched=False, write=not dry_run)
        self._merge(slot, stream, alpha, limit, dry_run, overrides)

    def _count_drawn(self, stream: int, slot: int, *, matched: bool, write: bool) -> None:
        count = self._count_matched if matched else self._count
        count.launch((self._row_blocks, 1), stream, self._counted(slot, matched), (self.rows, int(write)))

    def _merge(
        self, slot: int, stream: int, alpha: float, limit: float, dry_run: bool, overrides: dict[str, Any]
    ) -> None:
        """Merge what was counted in a slot."""
        programs, capacity = self.programs, self.scratch.numel() // 16
        if overrides:
            programs, capacity = overrides.pop("programs", programs), overrides.pop("capacity", capacity)
        numbers = (capacity, alpha, 1.0 - alpha, limit, int(not dry_run), programs)
        self._merge_handle(overrides).launch((programs, 1), stream, self._tables[slot], numbers)

    def _counted(self, slot: int, matched: bool) -> Arguments:
        """Tensor arguments of the count; ``best`` is not looked at unless partners were matched."""
        if (slot, matched) not in self._counts:
            partner, readers, active, _, _, state = self.slots[slot]
            best = self.matcher.best if matched else self.call
            self._counts[slot, matched] = Arguments(partner, readers, active, state, best, self.running.times)
        return self._counts[slot, matched]

    def _merge_handle(self, overrides: dict[str, Any]) -> Handle:
        key = tuple(sorted(overrides.items())) if overrides else ()
        if key not in self._merges:
            constants = self._constants | overrides
            options = merge_options(constants, self.target)
            options |= {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in overrides}
            self._merges[key] = Handle(_merge_kernel, constants, options)
        return self._merges[key]

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """The plan's device as the current one, where it is not."""
        if self.on_gpu and torch.cuda.current_device() != self.device.index:
            return torch.cuda.device(self.device)
        return _NOTHING

    def _tensors(self) -> list[torch.Tensor]:
        """All device memory that the launches use."""
        own = [self.layer_table, self.row_layer, self.counter, self.slot, self.deferred, self.call]
        own += [self.running.times, self.running.largest, self.scratch, *self._captured_scratch, *self.slots.tensors()]
        return [*own, *self.kept] + (self._matcher.tensors() if self._matcher else [])
