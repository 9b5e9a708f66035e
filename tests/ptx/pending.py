"""Shared memory that asynchronous instructions are still to read or write."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import Access, Index
from .parse import Instr

UNIT = 4  # bytes; copies and the operands of products are multiples of it


def units_of(access: Access) -> Index:
    """The units that an access touches; one may be there several times."""
    if access.size >= UNIT:
        return access.bytes_index(UNIT)
    return access.numbers().ravel() * access.size // UNIT


class Pending:
    """Which parts of a CTA's shared memory copies in flight will write, and products in flight will read."""

    def __init__(self, shared_bytes: int) -> None:
        units = -(-shared_bytes // UNIT)
        self.writes, self.reads = np.zeros(units, np.int32), np.zeros(units, np.int32)  # how many, by unit
        self.jobs: dict[Any, tuple[Instr, Index, np.ndarray]] = {}

    def begin(self, job: Any, instr: Instr, units: Index, *, writes: bool) -> None:
        """A copy or a product is issued, of units that are there once each."""
        counts = self.writes if writes else self.reads
        counts[units] += 1
        self.jobs[job] = instr, units, counts

    def end(self, job: Any) -> None:
        """It has been waited for."""
        _, units, counts = self.jobs.pop(job)
        counts[units] -= 1

    def check_read(self, machine: Any, warp: Any, access: Access, instr: Instr) -> None:
        """Nobody may read what a copy in flight will write."""
        if self.jobs:
            self._check(machine, warp, access, instr, self.writes)

    def check_write(self, machine: Any, warp: Any, access: Access, instr: Instr) -> None:
        """Nobody may write what a copy in flight will write or a product in flight reads."""
        if self.jobs:
            self._check(machine, warp, access, instr, self.writes)
            self._check(machine, warp, access, instr, self.reads)

    def _check(self, machine: Any, warp: Any, access: Access, instr: Instr, counts: np.ndarray) -> None:
        units = units_of(access)
        if not counts[units].any():
            return
        mine = np.zeros(len(counts), bool)
        mine[units] = True
        for earlier, used, theirs in self.jobs.values():
            if theirs is counts and mine[used].any():
                machine.in_flight(warp, earlier, instr)
