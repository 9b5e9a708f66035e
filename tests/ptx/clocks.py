"""Data races, by vector clocks: independent of what values came out, every unordered pair of conflicting accesses.

Two accesses to a byte race if one of them writes, one of them is not atomic, and nothing orders them. What orders:
program order, barriers, and a release that an acquire of the same word sees.

Each warp counts as two threads: *its first lane*, which is the one that executes scalar stores and atomics, and *its
other lanes*. A release by the first lane covers what that lane did, and what the others did before the last barrier; an
acquire by it reaches the others with the next barrier. Races among the other lanes of one warp are not looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .memory import Access, Index, Region

TICK = 1 << 20  # a time, and below it the number of the step that did it
STEP = TICK - 1
FIRST, OTHERS, BOTH = range(3)  # lanes of a warp
ALWAYS = np.iinfo(np.int64).max
Report = Callable[[str, Region, int, int, int, int, int], None]


class Shadow:
    """When the elements of a region were last accessed, by whom: 64-bit words of time and step, by thread."""

    def __init__(self, region: Region, size: int, threads: slice) -> None:
        self.region, self.size, self.threads = region, size, threads
        elements = region.now.value.raw.size // size
        self.writer, self.written = np.full(elements, threads.start, np.int32), np.zeros(elements, np.int64)
        self.read = np.zeros((threads.stop - threads.start, elements), np.int64)
        self.is_written = False
        self.words: dict[int, Word] = {}  # those that atomics were done on, by place in bytes

    def refine(self, size: int) -> None:
        """From now on look at smaller elements."""
        factor = self.size // size
        self.writer, self.written = np.repeat(self.writer, factor), np.repeat(self.written, factor)
        self.read, self.size = np.repeat(self.read, factor, axis=1), size


class Word:
    """What was done by atomics, and what the releases among them published."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self.changed, self.loaded = np.zeros(threads, np.int64), np.zeros(threads, np.int64)
        self.published: np.ndarray | None = None


class Look(NamedTuple):
    """An access to elements of a region by one thread, and what that thread knows."""

    shadow: Shadow
    index: Index
    known: np.ndarray
    thread: int
    step: int


class Clocks:
    """Watches the accesses of one launch in the order in which they happen.

    ``known[t, u]`` is the latest time of thread u that comes before whatever thread t does next.

    Args:
        warps: how many the launch has, and ``per_cta`` how many of them make up a CTA.
        report: called with the kind ("W-R": an earlier write, a later read; A is an atomic), the place, and the thread
            and step of the earlier and the later access.
    """

    def __init__(self, warps: int, per_cta: int, report: Report) -> None:
        self.report, self.per_cta = report, per_cta
        self.known = np.zeros((2 * warps, 2 * warps), np.int64)
        np.fill_diagonal(self.known, ALWAYS)
        self.time = np.full(2 * warps, TICK, np.int64)
        self.shadows: dict[Region, Shadow] = {}

    def shadow(self, access: Access, warp: int, is_shared: bool) -> Shadow:
        """The bookkeeping of a region, in elements that are small enough."""
        shadow = self.shadows.get(access.region)
        if shadow is None:
            threads = slice(0, len(self.time))
            if is_shared:
                first = warp // self.per_cta * self.per_cta
                threads = slice(2 * first, 2 * (first + self.per_cta))
            shadow = self.shadows[access.region] = Shadow(access.region, access.size, threads)
        if access.size < shadow.size:
            shadow.refine(access.size)
        return shadow

    def plain(
        self, warp: int, who: int, access: Access, step: int, writes: bool, is_shared: bool = False,
        changes_nothing: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        """A load or a store by lanes of a warp: ``who`` is FIRST, OTHERS or BOTH.

        Several warps may execute one store, to the same words with the same values, as the compiler has them do with
        what each holds a copy of; ``changes_nothing`` says whether it is so.
        """
        shadow = self.shadow(access, warp, is_shared)
        index = access.bytes_index(shadow.size)
        parts = [(2 * warp + who, index)]
        if who == BOTH:
            first, rest = 2 * warp + FIRST, 2 * warp + OTHERS
            own = access.elements_per_lane() * access.size // shadow.size
            parts = [(first, index), (rest, index)]
            if access.lanes > 1 and isinstance(index, slice):
                middle = index.start + own
                parts = [(first, slice(index.start, middle)), (rest, slice(middle, index.stop))]
            elif access.lanes > 1:
                parts = [(first, index[:own]), (rest, index[own:])]
        for thread, part in parts:
            look = Look(shadow, part, self.known[thread, shadow.threads], thread, step)
            self._check(look, writes, changes_nothing)
        for thread, part in parts:
            now = self.time[thread] | step
            if not writes:
                shadow.read[thread - shadow.threads.start, part] = now
                continue
            shadow.read[:, part] = 0
            shadow.writer[part], shadow.written[part], shadow.is_written = thread, now, True

    def atomic(self, warp: int, who: int, access: Access, step: int, order: str, writes: bool) -> None:
        """An atomic, or a load with an order, of one lane's word."""
        thread = 2 * warp + who
        shadow = self.shadow(access, warp, False)
        known, place = self.known[thread], access.place(0)
        look = Look(shadow, access.bytes_index(shadow.size), known, thread, step)
        if shadow.is_written:
            self._check_writes(look, "A")
        if writes:
            self._check_reads(look, "A")
        word = shadow.words.get(place)
        if word is None:
            word = shadow.words[place] = Word(access.size, len(self.time))
        if order in ("acquire", "acq_rel") and word.published is not None:
            np.maximum(known, word.published, out=known)
        (word.changed if writes else word.loaded)[thread] = self.time[thread] | step
        if order in ("release", "acq_rel"):
            self._release(thread, word)

    def _release(self, thread: int, word: Word) -> None:
        mine = self.known[thread].copy()
        mine[thread] = self.time[thread] | STEP
        word.published = mine if word.published is None else np.maximum(word.published, mine)
        self.time[thread] += TICK

    def barrier(self, warps: Iterable[int]) -> None:
        """Warps have met; one alone has synchronised its lanes."""
        threads = [thread for warp in warps for thread in (2 * warp, 2 * warp + 1)]
        now = self.time[threads] | STEP
        self.known[threads, threads] = now
        self.known[threads] = self.known[threads].max(0)
        self.known[threads, threads] = ALWAYS
        self.time[threads] += TICK

    # -------------------------------------------------------------------------------------------------------- checks

    def _check(self, look: Look, writes: bool, changes_nothing: Callable[[], bool] | None) -> None:
        letter = "RW"[writes]
        if look.shadow.is_written:
            self._check_writes(look, letter, changes_nothing)
        if look.shadow.words:
            self._check_atomics(look, letter)
        if writes:
            self._check_reads(look, letter)

    def _check_writes(self, look: Look, letter: str, changes_nothing: Callable[[], bool] | None = None) -> None:
        shadow, index = look.shadow, look.index
        late = shadow.written[index] > look.known[shadow.writer[index] - shadow.threads.start]
        if changes_nothing and b"\1" in late.tobytes() and changes_nothing():
            late &= (shadow.written[index] & STEP) != look.step
        if b"\1" in late.tobytes():
            which = int(np.flatnonzero(late)[0])
            self._found(f"W-{letter}", look, which, int(shadow.writer[index][which]), shadow.written[index][which])

    def _check_reads(self, look: Look, letter: str) -> None:
        shadow, index = look.shadow, look.index
        late = shadow.read[:, index] > look.known[:, None]
        if b"\1" in late.tobytes():
            for row in np.flatnonzero(late.any(1)):
                which = int(np.flatnonzero(late[row])[0])
                self._found(f"R-{letter}", look, which, shadow.threads.start + int(row), shadow.read[row, index][which])

    def _check_atomics(self, look: Look, letter: str) -> None:
        shadow, index = look.shadow, look.index
        if isinstance(index, slice):
            low, high = index.start * shadow.size, index.stop * shadow.size
            hit = [place for place, word in shadow.words.items() if place < high and place + word.size > low]
        else:
            all_touched = set((index * shadow.size).tolist())
            hit = [place for place, word in shadow.words.items() if all_touched & {*range(place, place + word.size)}]
        for place in hit:
            word = shadow.words[place]
            for times in (word.changed, word.loaded) if letter == "W" else (word.changed,):
                for by in np.flatnonzero(times > look.known).tolist():
                    earlier = int(times[by]) & STEP
                    self.report(f"A-{letter}", shadow.region, place, by, earlier, look.thread, look.step)
            if letter == "W":
                shadow.words.pop(place)  # a later acquire sees this write, not the releases before it

    def _found(self, kind: str, look: Look, which: int, by: int, time: np.int64) -> None:
        index, shadow = look.index, look.shadow
        place = int(index.start + which if isinstance(index, slice) else index[which]) * shadow.size
        self.report(kind, shadow.region, place, by, int(time) & STEP, look.thread, look.step)
