"""What a barrier stands between, alone: accesses that it orders, and that no other barrier orders as well.

A schedule that notices a deleted barrier shows that it is needed; that none does shows nothing, unless there is nothing
to notice. So here all paths through the code count, whether or not a run took them, and of each access the bytes that
it touched in any run; one that no run came to may touch any.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from .access import Atomic, MemoryStep
from .program import Program
from .steps import NOBODY, Alu, Barrier, Branch, Return, Step, WarpBarrier

if TYPE_CHECKING:
    from .machine import Machine, Warp

ACCESSES = (MemoryStep, Atomic)
SILENT = (Alu, Branch, Barrier, WarpBarrier, Return)  # these touch no memory
ACQUIRES, RELEASES = ("acquire", "acq_rel"), ("release", "acq_rel")
Places = dict[tuple[int, int], np.ndarray]  # of an access: where its lanes' bytes begin, sorted, by launch and CTA


class Touched:
    """What the accesses of a program touch, in all runs of :attr:`program`, which behaves like it.

    Addresses in shared memory are below all others, so they are not told apart.
    """

    def __init__(self, program: Program) -> None:
        self.original, self.steps = program, program.steps
        self.program = copy.copy(program)
        self.program.steps = [
            _Watched(step, self, number) if isinstance(step, ACCESSES) else step
            for number, step in enumerate(program.steps)
        ]
        self._launches, self._machine = 0, None
        self._seen: dict[int, set[tuple[int, int, bytes]]] = {}

    def note(self, number: int, machine: Machine, w: Warp, addresses: np.ndarray) -> None:
        """An access by lanes of a warp."""
        if machine is not self._machine:
            self._launches, self._machine = self._launches + 1, machine
        self._seen.setdefault(number, set()).add((self._launches, w.cta.number, addresses.astype("i8").tobytes()))

    def only_by(self, barrier: int) -> str | None:
        """Two accesses of a CTA that nothing but this barrier orders and that must be ordered, or None."""
        after = _following(self.steps)
        before: list[list[int]] = [[] for _ in self.steps]
        for number, numbers in enumerate(after):
            for each in numbers:
                before[each].append(number)
        for one, other in product(self._accesses(barrier, before), self._accesses(barrier, after)):
            if self._must_be_ordered(one, other):
                return f"{self.steps[one].instr}, then {self.steps[other].instr}"
        return None

    def _accesses(self, barrier: int, following: list[list[int]]) -> list[int]:
        """Those that it leads to with no barrier of all warps in between."""
        found: set[int] = set()
        waiting = list(following[barrier])
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                step = self.steps[number]
                if not isinstance(step, Barrier) or step.warps < self.original.warps:
                    waiting += following[number]
        return [number for number in sorted(found) if not isinstance(self.steps[number], SILENT)]

    def _must_be_ordered(self, one: int, other: int) -> bool:
        first, second = self.steps[one], self.steps[other]
        if not isinstance(first, ACCESSES) or not isinstance(second, ACCESSES):
            return True  # whatever it touches
        # A release publishes what the CTA did before, and an acquire is of use to what it does later.
        if (second.order in RELEASES and _is_global(first)) or (first.order in ACQUIRES and _is_global(second)):
            return True
        if not (_writes(first) or _writes(second)) or (first.order and second.order):
            return False
        if one not in self._seen or other not in self._seen:
            return _is_global(first) == _is_global(second)
        mine, theirs = self._places(one), self._places(other)
        return any(
            _overlap(mine[where], _bytes(first), theirs[where], _bytes(second)) for where in mine.keys() & theirs.keys()
        )

    def _places(self, number: int) -> Places:
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        for launch, cta, addresses in self._seen[number]:
            found.setdefault((launch, cta), []).append(np.frombuffer(addresses, "i8"))
        return {where: np.unique(np.concatenate(parts)) for where, parts in found.items()}


class _Watched(Step):
    """An access, with a note of where it was."""

    def __init__(self, step: MemoryStep | Atomic, touched: Touched, number: int) -> None:
        self._step, self._touched, self._number = step, touched, number
        self.instr, self.guard = step.instr, step.guard

    def run(self, machine: Machine, w: Warp) -> bool:
        lanes = w.lanes(self.guard)
        if lanes is not NOBODY:
            addresses = self._step.at(w)
            self._touched.note(self._number, machine, w, addresses if lanes is None else addresses[lanes])
        return self._step.run(machine, w)


def _is_global(step: MemoryStep | Atomic) -> bool:
    return isinstance(step, Atomic) or not step.is_shared


def _writes(step: MemoryStep | Atomic) -> bool:
    return isinstance(step, Atomic) or not step.loads


def _bytes(step: MemoryStep | Atomic) -> int:
    return step.size if isinstance(step, Atomic) else step.size * step.count


def _overlap(a: np.ndarray, size_a: int, b: np.ndarray, size_b: int) -> bool:
    """Whether any bytes from ``a`` on are among those from ``b`` on."""
    return bool((np.searchsorted(b, a - size_b, "right") < np.searchsorted(b, a + size_a, "left")).any())


def _following(steps: Sequence[Step | Alu]) -> list[list[int]]:
    """Where a warp may go from each step."""
    found = []
    for number, step in enumerate(steps):
        ends = isinstance(step, Return) or (isinstance(step, Branch) and step.guard is None)
        targets = [step.program.places[label] for label in step.table] if isinstance(step, Branch) else []
        found.append(targets if ends else [*targets, number + 1])
    return found
