"""Asynchronous copies from global to shared memory, ``cp.async``. Importing this module adds them.

A copy is made when it is waited for, the latest moment that is allowed; shared memory that is used before is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .access import shared_access, who_of, write_shared
from .memory import Access
from .parse import Imm, Instr
from .pending import units_of
from .steps import Step, step_for

if TYPE_CHECKING:
    from .machine import Machine, Warp
    from .program import Program


@dataclass(eq=False)
class Copy:
    """A copy in flight: from where and to where, by lane; a lane that takes nothing clears."""

    instr: Instr
    step: int
    who: int
    to: Access
    lanes: np.ndarray
    sources: list[tuple[Access, np.ndarray]]


@step_for("cp.async")
class AsyncCopy(Step):
    """``cp.async`` and what orders it."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        self.what = self.mods[1]
        if self.mods in (["async", "ca", "shared", "global"], ["async", "cg", "shared", "global"]):
            to, source, size, *taken = instr.args
            self.bytes, self.unit = size.value, min(size.value, 4)
            self.to, self.source = self.address(to, "u32"), self.address(source, "u64")
            self.taken = self.getter(taken[0] if taken else Imm(self.bytes), "u32")
        elif self.what == "wait_group":
            (self.still_pending,) = (arg.value for arg in instr.args)
        elif self.mods != ["async", "commit_group"]:
            raise self.fail()

    def run(self, machine: Machine, w: Warp) -> bool:
        if self.what == "commit_group":
            self.whole_warp(w)
            w.copies.append([])
        elif self.what == "wait_group":
            self.whole_warp(w)
            done = w.copies[: max(0, len(w.copies) - 1 - self.still_pending)]
            del w.copies[: len(done)]
            for copy in (copy for group in done for copy in group):
                self._finish(machine, w, copy)
        else:
            self._issue(machine, w)
        w.pc += 1
        return self.what != "commit_group"

    def _issue(self, machine: Machine, w: Warp) -> None:
        lanes = w.lanes(self.guard)
        chosen = slice(None) if lanes is None else lanes
        to, source, taken = self.to(w)[chosen], self.source(w)[chosen], self.taken(w)[chosen]
        if not to.size:
            return
        if set(taken.tolist()) - {0, self.bytes}:
            raise self.fail("takes a part")
        full = np.flatnonzero(taken)
        if machine.profile:
            machine.profile.access(w, source[full], self.bytes, False)
        count = self.bytes // self.unit
        into = shared_access(machine, w, to, self.unit, count, self.instr)
        if into.lanes != to.size:
            raise self.fail("copies everything to one place")
        sources = []
        if full.size:
            for access, which in machine.memory.touch(source[full], self.unit, count, self.instr):
                sources.append((access, full[which]))
        copy = Copy(self.instr, w.pc, w.who(lanes), into, np.arange(to.size), sources)
        w.cta.pending.check_write(machine, w, into, self.instr)
        w.cta.pending.begin(copy, self.instr, units_of(into), writes=True)
        if machine.clocks:  # it may read and write at any time from here to where it is waited for
            machine.clocks.plain(w.number, copy.who, into, w.pc, True, is_shared=True)
            for access, rows in sources:
                machine.clocks.plain(w.number, who_of(copy.who, rows), access, w.pc, False)
        w.copies[-1].append(copy)

    def _finish(self, machine: Machine, w: Warp, copy: Copy) -> None:
        w.cta.pending.end(copy)
        values = np.zeros((copy.lanes.size, copy.to.elements_per_lane()), f"u{copy.to.size}")
        for access, rows in copy.sources:
            loaded, _ = machine.ordering.load(w, access)
            values[rows] = loaded.reshape(-1, values.shape[1])
            if machine.clocks:
                machine.clocks.plain(w.number, who_of(copy.who, rows), access, copy.step, False)
        write_shared(machine, w, copy.to, values.ravel(), copy.who, copy.instr, copy.step)
