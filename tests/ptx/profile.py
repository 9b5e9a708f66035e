"""What a launch executes and moves, counted: what a GPU must do whatever its clock.

Instructions are PTX's, by warp; ``mov`` is counted apart, since the assembler drops nearly all of them. A request is
one warp's memory instruction; it takes as many 32-byte sectors of global memory, or passes over the 32 banks of shared
memory, as its addresses need.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import LANES
from .parse import Instr, Reg
from .steps import NOBODY, Alu, Branch

if TYPE_CHECKING:
    from .machine import Warp
    from .program import Program

ASKS_MEMORY = ("ld.global", "atom.global")  # and waits for the answer where it is needed


@dataclass
class Cost:
    """Of a memory instruction: requests, lanes that take part, bytes, and sectors or passes."""

    requests: int = 0
    lanes: int = 0
    bytes: int = 0
    parts: int = 0

    def add(self, other: Cost) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def sectors(addresses: np.ndarray) -> int:
    """Sectors of global memory, for at most 32 bytes per lane."""
    return np.unique(addresses // np.uint64(32)).size


def passes(addresses: np.ndarray, width: int) -> int:
    """Passes over the banks of shared memory: lanes with 8 or 16 bytes take turns by halves or quarters."""
    group, total = LANES if width <= 4 else 128 // width, 0
    for first in range(0, addresses.size, group):
        part = addresses[first : first + group].astype("i8")
        words = np.unique(part[:, None] // 4 + np.arange(max(1, width // 4)))
        total += max(Counter((words % 32).tolist()).values())
    return total


class Depths:
    """How many loads, one after the other, what a warp holds has taken.

    A load waits for its address, its predicate, and the branches and barriers before it; an acquire is waited for by
    all that follows. Within a program that is a bound on the round trips to memory that no reordering removes.
    """

    def __init__(self) -> None:
        self.registers: dict[Reg, int] = {}
        self.control = 0

    def of(self, registers: list[Reg]) -> int:
        return max((self.registers.get(register, 0) for register in registers), default=0)


class Profile:
    """Counts of one launch of a program.

    Attributes:
        executed: how often each step was executed, by warp.
        costs: of the steps that touch memory.
        chain: the most loads one after the other in any warp.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.executed = [0] * len(program.steps)
        self.costs: dict[int, Cost] = {}
        self.chain = 0
        self._depths: dict[Warp, Depths] = {}
        self._shared: dict[int, dict[int, int]] = {}  # depths of words in shared memory, by CTA
        self._uses = [[(i, i.reads(), i.writes()) for i in program.instrs_of(k)] for k in range(len(program.steps))]

    def step(self, w: Warp) -> None:
        """A warp is about to execute a step."""
        self.executed[w.pc] += 1
        depths = self._depths.setdefault(w, Depths())
        step = self.program.steps[w.pc]
        if not isinstance(step, (Alu, Branch)) and step.guard and w.lanes(step.guard) is NOBODY:
            return
        for instr, reads, writes in self._uses[w.pc]:
            depth = max(depths.of(reads), depths.control)
            if instr.op in ("bra", "brx"):
                depths.control = depth
            elif instr.form.startswith(ASKS_MEMORY):
                depth += 1
                self.chain = max(self.chain, depth)
                if "acquire" in instr.mods or "acq_rel" in instr.mods:
                    depths.control = depth
            for register in writes:
                depths.registers[register] = depth

    def access(self, w: Warp, addresses: np.ndarray, width: int, is_shared: bool) -> None:
        """The step's memory access, of lanes that take part."""
        parts = passes(addresses, width) if is_shared else sectors(addresses)
        self.costs.setdefault(w.pc, Cost()).add(Cost(1, addresses.size, addresses.size * width, parts))
        if is_shared:
            self._through_shared(w, addresses, width)

    def _through_shared(self, w: Warp, addresses: np.ndarray, width: int) -> None:
        depths, held = self._depths[w], self._shared.setdefault(w.cta.number, {})
        words = {word for at in addresses.tolist() for word in range(at // 4, (at + width + 3) // 4)}
        ((_, reads, writes),) = self._uses[w.pc]
        if writes:
            depth = max(max(held.get(word, 0) for word in words), depths.of(writes))
            depths.registers |= dict.fromkeys(writes, depth)
        else:
            held |= dict.fromkeys(words, max(depths.of(reads), depths.control))

    def barrier(self, warps: list[Warp]) -> None:
        """Warps have waited for each other."""
        all_depths = [self._depths.setdefault(warp, Depths()) for warp in warps]
        latest = max(depths.control for depths in all_depths)
        for depths in all_depths:
            depths.control = latest

    # -------------------------------------------------------------------------------------------------------- results

    def instructions(self) -> Counter[str]:
        """Executed instructions by opcode, by warp."""
        counts: Counter[str] = Counter()
        for number, times in enumerate(self.executed):
            for instr in self.program.instrs_of(number):
                counts[instr.op] += times
        return counts

    def barriers(self) -> int:
        """How often a CTA's warps have met."""
        return sum(self.executed[number] for number in self.program.barriers()) // self.program.warps

    def memory(self, *forms: str) -> Cost:
        """What the instructions that begin with one of these forms cost."""
        total = Cost()
        for number, cost in self.costs.items():
            if _form(self.program.steps[number].instr).startswith(forms):
                total.add(cost)
        return total


def _form(instr: Instr) -> str:
    return instr.form.replace("::cta", "")
