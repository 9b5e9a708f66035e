"""Shared memory that asynchronous instructions are still to read or write."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import Access
from .parse import Instr

UNIT = 16  # bytes; copies and the rows of products are multiples of it


class Pending:
    """Which parts of a CTA's shared memory copies in flight will write, and products in flight will read."""

    def __init__(self) -> None:
        # By copy or product: its instruction, and the units that it uses.
        self.writes: dict[Any, tuple[Instr, np.ndarray]] = {}
        self.reads: dict[Any, tuple[Instr, np.ndarray]] = {}

    def check_read(self, machine: Any, warp: Any, access: Access, instr: Instr) -> None:
        """Nobody may read what a copy in flight will write."""
        if self.writes:
            self._check(machine, warp, access, instr, self.writes)

    def check_write(self, machine: Any, warp: Any, access: Access, instr: Instr) -> None:
        """Nobody may write what a copy in flight will write or a product in flight reads."""
        if self.writes or self.reads:
            self._check(machine, warp, access, instr, self.writes)
            self._check(machine, warp, access, instr, self.reads)

    def _check(
        self, machine: Any, warp: Any, access: Access, instr: Instr, used: dict[Any, tuple[Instr, np.ndarray]]
    ) -> None:
        units = np.unique(access.numbers() * access.size // UNIT)
        for earlier, theirs in used.values():
            if np.isin(units, theirs).any():
                machine.in_flight(warp, earlier, instr)
