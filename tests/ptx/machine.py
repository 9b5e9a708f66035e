"""One launch: warps of several CTAs, interleaved at every instruction that another one could observe.

Which warp comes next is drawn by a seed, in one of several ways (:class:`Schedule`). Divergent lanes of a warp wait for
those behind. Reported, in :attr:`Machine.findings`: data races; shared memory that is written while a copy or a product
in flight uses it; barriers that warps come to at different places. Raised: accesses that are out of bounds, misaligned
or of memory never written; a barrier that not all lanes, or not all warps, come to.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import LANES
from .clocks import BOTH, FIRST, OTHERS, Clocks
from .memory import Memory, Region
from .ordering import ordering
from .parse import SINK, Instr, Operand
from .pending import Pending
from .program import Program
from .steps import EVERY_LANE, NOBODY, Barrier
from .translate import UNSIGNED

if TYPE_CHECKING:
    from collections.abc import Callable

    from .copies import Copy
    from .matrix import Product
    from .profile import Profile

FIRST_LANE = (np.arange(LANES) == 0).tobytes()
EVERYBODY = EVERY_LANE.tobytes()
NOBODYS = NOBODY.tobytes()


class StuckError(RuntimeError):
    """A barrier that is never complete, or no end."""


@dataclass(frozen=True)
class Schedule:
    """How to interleave.

    Attributes:
        how: "even"; "speeds", each warp has its own; "priorities", which now and then change, so that one warp runs far
            ahead of all others; "turns", one after the other; "serial", each as far as it gets.
        resident: CTAs in flight, all if None. They start in random order but for the last two.
        weak: drain and stale of ``ordering.Weak``; None is coherent memory.
    """

    seed: int = 0
    how: str = "even"
    resident: int | None = None
    weak: tuple[float, float] | None = None
    races: bool = True
    max_steps: int = 5_000_000


@dataclass(frozen=True)
class Finding:
    """Two accesses that nothing orders, or a use of shared memory or barriers that is not allowed.

    Attributes:
        kind: of a race the earlier and the later access, "R-W", "W-A"; else "in flight" or "barrier".
        region: what memory it is about.
        is_in_cta: both are of one CTA.
        where: an example.
    """

    kind: str
    region: str
    is_in_cta: bool
    earlier: Instr
    later: Instr
    where: str

    def __str__(self) -> str:
        return f"{self.kind} {self.where}: {self.earlier}, then {self.later}"


class Warp:
    """32 lanes, their registers, and where they are."""

    def __init__(self, cta: Cta, index: int) -> None:
        kernel, rng = cta.machine.program.kernel, cta.machine.numpy_rng
        self.cta, self.index = cta, index
        self.number = cta.number * cta.machine.program.warps + index
        self.p = [rng.random(LANES) < 0.5] * kernel.banks["p"]  # registers begin with anything
        self.h, self.r, self.d = (
            [rng.integers(0, 2**63, LANES, "u8").astype(UNSIGNED[bank])] * kernel.banks[bank] for bank in "hrd"
        )
        thread = np.arange(LANES, dtype="u4") + np.uint32(LANES * index)
        x, y = (np.full(LANES, each, "u4") for each in cta.index)
        self.special = {
            "%tid.x": thread, "%laneid": thread % np.uint32(LANES), "%ctaid.x": x, "%ctaid.y": y,
            "%ctaid.z": np.zeros(LANES, "u4"),
        }  # fmt: skip
        self.pc = 0
        self.mask, self.full = EVERY_LANE, True
        self.elsewhere: dict[int, np.ndarray] = {}  # lanes at other places
        self.waits_at: Barrier | None = None
        self.copies: list[list[Copy]] = [[]]  # groups of what is in flight, the last one still open
        self.products: list[list[Product]] = [[]]
        self.done = False

    def lanes(self, guard: Callable[[Warp], np.ndarray] | None) -> np.ndarray | None:
        """Which lanes take part in an instruction: None for all, NOBODY for none."""
        if guard is None:
            return None if self.full else self.mask
        mask = guard(self) if self.full else guard(self) & self.mask
        raw = mask.tobytes()
        return None if raw == EVERYBODY else NOBODY if raw == NOBODYS else mask

    def who(self, lanes: np.ndarray | None) -> int:
        """As the race detector sees these lanes."""
        if lanes is None:
            return BOTH
        return (FIRST if lanes.tobytes() == FIRST_LANE else BOTH) if lanes[0] else OTHERS

    def write(self, reg: Operand, values: np.ndarray, lanes: np.ndarray | None) -> None:
        """Set a register in some lanes, to values of them or of all; narrow ones are extended by their sign if any."""
        if reg == SINK:
            return
        bank, own = getattr(self, reg.bank), UNSIGNED[reg.bank]
        if values.dtype != own:
            values = values.view(own) if values.itemsize == np.dtype(own).itemsize else values.astype(own)
        if lanes is not None:
            old = bank[reg.index].copy()
            old[lanes] = values
            values = old
        bank[reg.index] = values if values.size == LANES else np.full(LANES, values[0])

    def leave(self, pc: int, lanes: np.ndarray) -> None:
        """Some lanes go elsewhere."""
        self.elsewhere[pc] = self.elsewhere[pc] | lanes if pc in self.elsewhere else lanes
        self.mask, self.full = self.mask & ~lanes, False

    def converge(self) -> None:
        """Go on with the lanes that are furthest behind."""
        self.elsewhere[self.pc] = self.elsewhere[self.pc] | self.mask if self.pc in self.elsewhere else self.mask
        self._resume()

    def exit(self) -> None:
        """The lanes that are here have ended."""
        if self.elsewhere:
            self._resume()
        else:
            self.done = True

    def _resume(self) -> None:
        self.pc = min(self.elsewhere)
        self.mask = self.elsewhere.pop(self.pc)
        self.full = self.mask.tobytes() == EVERYBODY


class Cta:
    """The warps of a program, and their shared memory."""

    def __init__(self, machine: Machine, number: int, index: tuple[int, int]) -> None:
        self.machine, self.number, self.index = machine, number, index
        self.shared = Region(f"shared memory of CTA {number}", 0, machine.program.shared_bytes, is_defined=False)
        self.pending = Pending(machine.program.shared_bytes)
        self.warps = [Warp(self, i) for i in range(machine.program.warps)]


class Machine:
    """A launch.

    Args:
        program: what to run.
        memory: global memory; :meth:`run` changes it.
        arguments: of the kernel, in order.
        grid: CTAs in x and y.
        schedule: how to interleave.
        profile: counts what is executed, if given.
    """

    def __init__(
        self, program: Program, memory: Memory, arguments: Sequence[int | float], grid: tuple[int, int],
        schedule: Schedule, profile: Profile | None = None,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.grid, self.schedule, self.profile = program, memory, grid, schedule, profile
        self.rng, self.numpy_rng = random.Random(schedule.seed), np.random.default_rng(schedule.seed)
        self.findings: dict[tuple, Finding] = {}
        self.steps = 0
        self.ctas: list[Cta] = []
        self.ordering = ordering(memory, self.rng, schedule.weak)
        warps = grid[0] * grid[1] * program.warps
        self.clocks = Clocks(warps, program.warps, self._race) if schedule.races else None
        self._arguments = dict(zip((name for name, _ in program.kernel.params), arguments, strict=True))
        self._params: dict[tuple[str, int, str], np.ndarray] = {}

    def param(self, name: str, offset: int, dtype: str) -> np.ndarray:
        """A parameter, or a part of it."""
        key = (name, offset, dtype)
        if key not in self._params:
            value, size = self._arguments[name], np.dtype(dtype).itemsize
            is_float = isinstance(value, float)
            raw = np.float32(value).tobytes() if is_float else (int(value) & (2**128 - 1)).to_bytes(16, "little")
            self._params[key] = np.full(LANES, np.frombuffer(raw[offset : offset + size], dtype)[0])
        return self._params[key]

    # ----------------------------------------------------------------------------------------------------- scheduling

    def run(self) -> None:
        """Run all CTAs to their end.

        Raises:
            AccessError: see :mod:`.memory`.
            StuckError: a barrier that not all warps come to, or no end.
        """
        x, y = self.grid
        indices = [(i, j) for j in range(y) for i in range(x)]
        waiting = list(range(len(indices)))[::-1]
        if self.schedule.how not in ("turns", "serial"):
            self.rng.shuffle(waiting)
        running: list[Cta] = []
        self.ready: list[Warp] = []
        self.weight: dict[Warp, float] = {}
        current = None
        with np.errstate(all="ignore"):
            while self.ready or waiting:
                while waiting and len(running) < (self.schedule.resident or len(indices)):
                    number = waiting.pop()
                    cta = Cta(self, number, indices[number])
                    self.ctas.append(cta)
                    running.append(cta)
                    self.ready += cta.warps
                    self.weight |= {warp: 10 ** self.rng.uniform(-1, 1) for warp in cta.warps}
                if not self.ready:
                    break  # all that run wait for a barrier
                current = self._next(current)
                self._advance(current)
                if current.done or current.waits_at:
                    self.ready.remove(current)
                    self._check_barrier(current.cta)
                    if all(warp.done for warp in current.cta.warps):
                        running.remove(current.cta)
                        self._forget(current.cta)
                self.ordering.step(self.ctas)
            for cta in running:
                self._stuck(cta)
            self.ordering.finish(self.ctas)

    def _next(self, current: Warp | None) -> Warp:
        ready, how, rng = self.ready, self.schedule.how, self.rng
        if how == "even":
            return ready[int(rng.random() * len(ready))]
        if how == "speeds":  # chosen as often as a warp is fast
            while True:
                warp = ready[int(rng.random() * len(ready))]
                if rng.random() * 10 < self.weight[warp]:
                    return warp
        if how == "priorities":
            if rng.random() < 0.02:
                self.weight[rng.choice(ready)] = 10 ** rng.uniform(-1, 1)
                current = None
            if current is None or current.done or current.waits_at:
                current = max(ready, key=self.weight.__getitem__)
            return current
        if how == "serial":
            return ready[0]
        if how != "turns":
            raise ValueError(f"how must be even, speeds, priorities, turns or serial, not {how!r}")
        ready.append(ready.pop(0))
        return ready[-1]

    def _advance(self, w: Warp) -> None:
        """Run a warp up to and including the next instruction that others could observe."""
        steps, profile = self.program.steps, self.profile
        self.steps += 1
        if self.steps > self.schedule.max_steps:
            raise StuckError(f"{self.program.kernel.name}: no end after {self.schedule.max_steps} steps")
        while True:
            step = steps[w.pc]
            if profile:
                profile.step(w)
            is_visible = step.run(self, w)
            if w.elsewhere and not w.done:
                w.converge()
            if is_visible:
                return

    def _check_barrier(self, cta: Cta) -> None:
        """Let warps go on whose barrier is complete. A warp that has ended never comes to one."""
        arrived: dict[int, list[Warp]] = {}
        for warp in cta.warps:
            if warp.waits_at:
                arrived.setdefault(warp.waits_at.barrier, []).append(warp)
        for warps in arrived.values():
            places = {warp.waits_at for warp in warps}
            if len(warps) < max(place.warps for place in places):
                continue
            if len(places) > 1:
                first, *_, last = sorted(places, key=self.program.steps.index)
                self._find("barrier", "barrier", True, first.instr, last.instr, f"CTA {cta.number}: some warps come to")
            self.meet(warps)
            for warp in warps:
                warp.waits_at = None
            self.ready += warps

    def meet(self, warps: list[Warp]) -> None:
        """Warps of a CTA synchronise, or one its lanes: what each did comes before what all do next."""
        if self.clocks:
            self.clocks.barrier([warp.number for warp in warps])
        self.ordering.barrier(warps)
        if self.profile:
            self.profile.barrier(warps)

    def _stuck(self, cta: Cta) -> None:
        waits = {str(warp.waits_at.instr): warp.index for warp in cta.warps if warp.waits_at}
        if waits:
            raise StuckError(f"CTA {cta.number}: a barrier that not all warps come to: {', '.join(waits)}")

    def _forget(self, cta: Cta) -> None:
        """Free what nobody needs any more."""
        if self.clocks:
            self.clocks.shadows.pop(cta.shared, None)
        cta.shared = None
        for warp in cta.warps:
            warp.p = warp.h = warp.r = warp.d = []

    # ------------------------------------------------------------------------------------------------------- findings

    def _find(self, kind: str, region: str, is_in_cta: bool, earlier: Instr, later: Instr, where: str) -> None:
        key = (kind, region, is_in_cta, id(earlier), id(later))
        if key not in self.findings:
            self.findings[key] = Finding(kind, region, is_in_cta, earlier, later, where)

    def _race(self, kind: str, region: Region, place: int, by: int, by_step: int, thread: int, step: int) -> None:
        per_cta, steps = 2 * self.program.warps, self.program.steps
        one, other = by // per_cta, thread // per_cta
        name = "shared" if region.name.startswith("shared") else region.name
        whose = f"CTA {one} warp {by % per_cta // 2} and CTA {other} warp {thread % per_cta // 2}"
        where = f"at {region.name_of(place)}, {whose}"
        self._find(kind, name, one == other, steps[by_step].instr, steps[step].instr, where)

    def in_flight(self, warp: Warp, earlier: Instr, later: Instr) -> None:
        """Shared memory is used that a copy or a product still uses otherwise."""
        self._find("in flight", "shared", True, earlier, later, f"in CTA {warp.cta.number}")
