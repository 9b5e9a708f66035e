"""Launches the kernels of a merge that is undone again (``kernels/forward.py``)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from ...kernels.forward import _blend_kernel, _restore_kernel, _save_kernel
from ..path import Call
from .handle import Arguments, Handle, check_not_capturing
from .launch import Launcher
from .results import Results

UNIT = 16  # bytes in which packed memory is handed out
# Of a thread where some filters are strided: left to itself ptxas spills up to 16 bytes on sm_80, to get to 32 and 72.
REGISTERS = {"maxnreg": 48}, {"maxnreg": 96}  # of what copies, and of what blends
SIGMAS = 8.0  # of the memory that a call's sampled filters take, above the mean


class Keeper:
    """Packed memory for the filters of one plan, and the launches that fill and empty it.

    Args:
        launcher: the plan's launcher, whose draws and tables these launches take.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        rows = launcher.rows
        self.place = launcher.zeros(rows) - 1
        self.merged = launcher.zeros(rows, dtype=torch.int8)
        self.packed = launcher.zeros(0, dtype=torch.int8)
        launcher.kept = self.place, self.merged, self.packed
        self._tables: dict[int, tuple[Arguments, Arguments]] = {}  # by slot
        self._units = [
            (layer.layout.filters, -(-layer.layout.elements * layer.dtype.itemsize // UNIT))
            for layer in launcher.layers
        ]
        constants, options = launcher.row_constants, {"num_warps": launcher.row_warps}
        copying, blending = REGISTERS if constants["HAS_STRIDED"] and launcher.target == "cuda" else ({}, {})
        self._save = Handle(_save_kernel, constants, options | copying)
        self._blend = Handle(_blend_kernel, constants | {"NAIVE": False}, options | blending)
        self._restore = Handle(_restore_kernel, constants, options | copying)

    def belongs_to(self, launcher: Launcher) -> bool:
        """Whether it launches with the tables of this launcher."""
        return self._launcher is launcher

    def reserve(self, prob: float) -> None:
        """Make packed memory large enough for what a call with ``prob`` samples."""
        every = sum(filters * units for filters, units in self._units)
        variance = prob * (1 - prob) * sum(filters * units * units for filters, units in self._units)
        wanted = UNIT * min(every, math.ceil(prob * every + SIGMAS * math.sqrt(variance)))
        if self.packed.numel() < wanted:
            check_not_capturing(self._launcher.device, "allocates memory for the filters that it keeps")
            self._launcher.follow_current_stream()  # kernels of earlier calls may still be using what is replaced
            self._tables.clear()  # before: an interrupt in between must not leave them with less memory than is said
            with torch.inference_mode(False):
                self.packed = torch.empty(wanted, dtype=torch.int8, device=self._launcher.device)
            self._launcher.kept = self.place, self.merged, self.packed

    def for_now(self, weights: Sequence[torch.Tensor], call: Call) -> TritonForNow:
        """A merge of the weights that is undone again."""
        return TritonForNow(self, weights, call)

    def merge(self, call: Call) -> Results:
        """Draw, save and blend, on the current stream."""
        launcher = self._launcher
        with launcher.lock, launcher.on_device():
            stream = launcher.follow_current_stream()
            self.reserve(call.prob)
            number, limit = launcher.draw_for(
                stream, call.seed, call.step, call.prob, call.thresholds, call.partner, write=True
            )
            grid = launcher.programs, 1
            save, blend = self._tables_of(launcher.slots.index_of(number))
            self._save.launch(grid, stream, save, (self.packed.numel() // UNIT, launcher.programs))
            self._blend.launch(grid, stream, blend, (call.alpha, 1.0 - call.alpha, limit, launcher.programs))
            return Results(launcher.slots, number)

    def _tables_of(self, index: int) -> tuple[Arguments, Arguments]:
        """Tensor arguments of save and blend for the call in a slot, whose addresses are looked up once."""
        if index not in self._tables:
            launcher, slot = self._launcher, self._launcher.slots[index]
            tables, running = (launcher.layer_table, launcher.row_layer), launcher.running
            self._tables[index] = (
                Arguments(*tables, slot.active, slot.state, self.place, self.packed),
                Arguments(
                    *tables, slot.partner, slot.active, slot.state, slot.similarity, slot.outcome, running.times,
                    running.largest, self.place, self.merged, self.packed,
                ),
            )  # fmt: skip
        return self._tables[index]

    def restore(self) -> None:
        """Put back what has merged, on the current stream."""
        launcher = self._launcher
        with launcher.lock, launcher.on_device():
            stream = launcher.follow_current_stream()
            tables = Arguments(launcher.layer_table, launcher.row_layer, self.place, self.merged, self.packed)
            self._restore.launch((launcher.programs, 1), stream, tables, (launcher.rows, launcher.programs))

    def forget(self) -> None:
        """Keep nothing any more."""
        self._launcher.follow_current_stream()
        self.place.fill_(-1)
        self.merged.zero_()

    def old(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the filters of the layer at ``index`` were that have merged: indices and values; waits for them."""
        launcher = self._launcher
        launcher.follow_current_stream()
        start, end = launcher.row_start[index : index + 2]
        layer = launcher.layers[index]
        merged = self.merged[start:end].nonzero()[:, 0]
        width = -(-layer.layout.elements * layer.dtype.itemsize // UNIT) * UNIT
        first = self.place[start:end][merged].long() * UNIT
        lines = self.packed[first[:, None] + torch.arange(width, device=first.device)]
        return merged, lines.view(layer.dtype)[:, : layer.layout.elements]


class TritonForNow:
    """See :class:`inmerge_fast.paths.path.ForNow`."""

    def __init__(self, keeper: Keeper, weights: Sequence[torch.Tensor], call: Call) -> None:
        self._keeper, self._weights, self._call = keeper, weights, call
        self._began = False

    def merge(self) -> Results:
        """Merge, see there."""
        self._began = True
        return self._keeper.merge(self._call)

    def restore(self, changed: Collection[int] = ()) -> None:
        """Put back, see there."""
        if not self._began:
            return
        if not changed:
            self._keeper.restore()
            return
        with torch.no_grad():
            for place, (layer, weight) in enumerate(zip(self._keeper._launcher.layers, self._weights, strict=True)):
                if place not in changed:
                    index, values = self._keeper.old(place)
                    layer.layout.scatter_(layer.layout.rows(weight), index, values)
        self._keeper.forget()

    def old(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What filters were, see there."""
        return self._keeper.old(place)
