"""Runs the kernels of the partner rules that look at the weights: their work table, buffers and constants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.match import _list_kernel, _match_kernel
from ...kernels.tables import STRIDED
from ...plan.candidates import MergeLayer
from .handle import Arguments, Handle, check_not_capturing

# The list kernel looks at so many filters together, and measures the norms of four, 8 kB of float32 at a time: a filter
# alone would have a quarter of that on its way, and with 16 the 512 of a layer would keep 32 programs busy.
LISTING = {"BLOCK": 1024, "FILTERS": 4, "DEPTH": 512}
# One tile: 64 x 64 pairs, 32 elements deep, fits the registers of 256 threads (tests/aot_registers.json).
TILE = {"ROWS": 64, "TILE": 64, "DEPTH": 32}
WARPS = 8  # with 4, ranking a tile at random spills 300 bytes per thread on sm_90, and "nearest" 16 on sm_80
TILES_OF_ELEMENTS = 4096  # short filters: a program takes several tiles, about as much work as one of 4,096 elements


def work_items(
    layers: Sequence[MergeLayer], row_start: npt.NDArray[np.int64], chosen: Iterable[int], rows: int, tile: int
) -> npt.NDArray[np.int32]:
    """What the programs of the match are for: ``rows`` listed filters of a group and a run of columns each.

    ``chosen`` layers, by index, are those that one launch compares.

    There are items for every filter of every group; those beyond the filters that are sampled end at once.

    Returns:
        int32 ``(items, WORK_COLUMNS)``, the longest first, so that no program starts a long one when others are done.
    """
    items, lengths = [], []
    for index in chosen:
        layout = layers[index].layout
        size = layout.group_size
        run = tile * max(1, TILES_OF_ELEMENTS // layout.elements)
        for group_row in range(int(row_start[index]), int(row_start[index]) + layout.filters, size):
            for rank in range(0, size, rows):
                for column in range(0, size, run):
                    end = min(column + run, size)
                    items.append((index, group_row, rank, column, end))
                    lengths.append(-(-(end - column) // tile) * layout.elements)
    order = np.argsort(-np.array(lengths), kind="stable")
    return np.array(items, np.int32)[order]


def match_constants(target: str) -> dict[str, Any]:
    """Constants of the match kernel for ``target`` ("cuda" or "hip") that do not depend on the model."""
    # AMD's compiler has no tf32x3; its float32 matrix units multiply exactly.
    return TILE | {"PRECISION": "ieee" if target == "hip" else "tf32x3"}


def match_options(target: str) -> dict[str, Any]:
    """Compiler options of the match kernel for ``target`` ("cuda" or "hip")."""
    # Left to itself, the assembler spills to get down to 128 registers, for two programs per multiprocessor. With 255
    # nothing spills on sm_80, 90 and 100. On sm_86, 89 and 120 float32 "similar" does, 8, 8 and 28 bytes (Triton 3.7),
    # but not in the loop of products: it loads one word again, or three, behind the last tile, and on sm_120 two per
    # tile. Four stages spill none on sm_86 and 89 and more on sm_120; a tile of 32 would load half as much again.
    return {"num_warps": WARPS} | ({"maxnreg": 255} if target == "cuda" else {})


class Matcher:
    """Tables and buffers of one plan's partner rules, built at their first use."""

    def __init__(
        self,
        layers: Sequence[MergeLayer],
        row_start: npt.NDArray[np.int64],
        kinds: Sequence[int],
        constants: dict[str, Any],
        zeros: Callable[..., torch.Tensor],
    ) -> None:
        self._layers, self._row_start, self._kinds, self._zeros = layers, row_start, kinds, zeros
        target = "hip" if torch.version.hip else "cuda"
        self._constants, self._options = match_constants(target), match_options(target)
        groups, blocks = [], []
        for index, (layer, first, end) in enumerate(
            zip(layers, row_start[:-1].tolist(), row_start[1:].tolist(), strict=True)
        ):
            groups += [(row, layer.layout.group_size) for row in range(first, end, layer.layout.group_size)]
            filters = LISTING["FILTERS"]
            blocks += [(index, row, min(row + filters, end) - 1) for row in range(first, end, filters)]
        self.groups = zeros(len(groups), 2).copy_(torch.from_numpy(np.array(groups, np.int32)))
        self.blocks = zeros(len(blocks), 3).copy_(torch.from_numpy(np.array(blocks, np.int32)))
        self.list = zeros(int(row_start[-1]))
        self.best = zeros(int(row_start[-1]), dtype=torch.int64)
        self.inverse_norm = zeros(int(row_start[-1]), dtype=torch.float32)
        self._list_handle = Handle(_list_kernel, constants | LISTING, {})
        self._work: dict[tuple[int, int, int], torch.Tensor] = {}
        self._handles: dict[tuple[tuple[str, Any], ...], Handle] = {}

    def run(
        self,
        partner: str,
        stream: int,
        tables_of_call: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        seed: int | None,
        step: int,
        threshold: float,
        **overrides: Any,
    ) -> None:
        """List the sampled filters, measure all norms, and find each sampled one's best pair.

        Two launches, and one more for each further kind of layers (dtype, dense or strided).

        Args:
            partner: the rule, "similar" or "nearest".
            stream: where to launch.
            tables_of_call: the layer table, the drawn partners, this call's similarities, and the numbers in memory.
            seed: seed of the draw; None takes it and the step from memory.
            step: step of the draw.
            threshold: what ``"similar"`` compares with, as the merge kernel takes it.
            **overrides: constants of the match kernel, for tests.
        """
        layer_table, partners, similarity, call = tables_of_call
        groups, blocks = len(self.groups), len(self.blocks)
        self._list_handle.launch(
            (groups + blocks, 1), stream,
            Arguments(
                layer_table, self.groups, self.blocks, partners, self.list, self.best, similarity, self.inverse_norm
            ),
            (groups,),
        )  # fmt: skip
        for kind in sorted(set(self._kinds)):
            constants = {"CODE": kind, "SIMILAR": partner == "similar", "IN_MEMORY": seed is None} | self._constants
            if partner == "similar" and kind >= STRIDED.value:
                constants["TILE"] = 32  # with 64 the addresses of strided filters spill 30 bytes in Triton 3.6
            constants |= overrides
            key = tuple(constants.items())
            if key not in self._handles:
                check_not_capturing(self.groups.device, f"with partner={partner!r} builds a table")
                self._handles[key] = Handle(_match_kernel, constants, self._options)
            work = self.work(kind, constants["ROWS"], constants["TILE"])
            self._handles[key].launch(
                (len(work), 1), stream, Arguments(layer_table, work, self.list, self.inverse_norm, self.best, call),
                (seed or 0, step, threshold),
            )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """All device memory that the launches use."""
        return [self.groups, self.blocks, self.list, self.best, self.inverse_norm, *self._work.values()]

    def work(self, kind: int, rows: int, tile: int) -> torch.Tensor:
        """The table of work items of one kind of layers, on the device."""
        if (kind, rows, tile) not in self._work:
            chosen = [index for index, own in enumerate(self._kinds) if own == kind]
            items = work_items(self._layers, self._row_start, chosen, rows, tile)
            self._work[kind, rows, tile] = self._zeros(*items.shape).copy_(torch.from_numpy(items))
        return self._work[kind, rows, tile]
