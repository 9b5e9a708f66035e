"""What a load returns, and when others see a store: memory that is coherent, or as weak as PTX allows.

The weak one is what may happen on a GPU between plain accesses that nothing orders:

- A plain store goes to its warp's buffer, a barrier moves it on to its CTA's, and other CTAs see it when it leaves
  that: at some random time, in random order but for stores to the same bytes, or when it must. A release empties the
  CTA's buffer and, of the warp's, what the releasing lanes have stored themselves. So what other warps or lanes stored
  after the last barrier is not covered, as PTX has it.
- A plain load may be answered from the CTA's *view*, memory as it was at the CTA's last acquire, or at launch. An
  acquire renews all of it. What the CTA has stored or loaded itself is never older than that.
- Atomics and loads with an order act on memory itself.

No GPU is that lazy. It returns nothing that PTX forbids, but is not all that PTX allows: a load is done where it stands
and never later, so a missing release shows in stores and not in loads; and within a CTA an acquire by one lane serves
all. The race detector (``clocks.py``) has no such gaps.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import EVERY_BIT, Access, Bytes, Contents, Memory, Region, put

Loaded = tuple[np.ndarray, np.ndarray | None]  # values, and which of their bits were written where that is not all


class Coherent:
    """Everybody sees everything at once."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def load(self, warp: Any, access: Access) -> Loaded:
        """A plain load."""
        now = access.region.now
        return now.value[access.size][access.index], now.written and now.written[access.size][access.index]

    def store(self, warp: Any, access: Access, values: np.ndarray, lanes: np.ndarray) -> None:
        """A plain store; ``lanes`` are the numbers of those that take part."""
        access.region.store(access, values)

    def begin_ordered(self, warp: Any, access: Access) -> None:
        """Before an atomic or a load with an order, which act on memory itself."""

    def change(self, access: Access, values: np.ndarray) -> None:
        """What an atomic changes."""
        access.region.store(access, values)

    def end_ordered(self, warp: Any, access: Access) -> None:
        """Behind an atomic or a load with an order."""

    def release(self, warp: Any, lanes: np.ndarray) -> None:
        """A release by some lanes."""

    def acquire(self, warp: Any) -> None:
        """An acquire by some lane."""

    def barrier(self, warps: list[Any]) -> None:
        """Warps of a CTA have met, all of them or one with itself."""

    def step(self, ctas: list[Any]) -> None:
        """Time passes."""

    def finish(self, ctas: list[Any]) -> None:
        """The launch ends."""


@dataclass
class Entry:
    """A store that is not yet visible to others, and the lanes that made it."""

    access: Access
    lanes: np.ndarray


class Buffer:
    """Stores of a warp or a CTA: the latest value of each byte, and the stores in order."""

    def __init__(self) -> None:
        self.latest: dict[Region, Contents] = {}
        self.entries: list[Entry] = []

    def hold(self, entry: Entry, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        region = entry.access.region
        if region not in self.latest:
            size = region.now.value.raw.size
            self.latest[region] = Contents(Bytes(size), Bytes(size))
        put(self.latest[region], entry.access, values, mask)
        self.entries.append(entry)

    def take(self, access: Access) -> tuple[np.ndarray, np.ndarray]:
        """Values and masks of what is held at some elements, which is held no more."""
        latest = self.latest[access.region]
        mask = latest.written[access.size][access.index].copy()
        latest.written[access.size][access.index] = 0
        return latest.value[access.size][access.index], mask

    def overlay(self, access: Access, values: np.ndarray, written: np.ndarray | None) -> Loaded:
        """What a load sees that comes after these stores."""
        latest = self.latest.get(access.region)
        if latest is None or not self.entries:
            return values, written
        mask = latest.written[access.size][access.index]
        values = (values & ~mask) | (latest.value[access.size][access.index] & mask)
        return values, written if written is None else written | mask


class Weak(Coherent):
    """As lazy as allowed.

    Args:
        memory: of the launch.
        rng: for what happens at random.
        drain: the chance that a store leaves some buffer at a step.
        stale: the chance that an element is loaded from the CTA's view where that differs.
    """

    def __init__(self, memory: Memory, rng: random.Random, drain: float, stale: float) -> None:
        super().__init__(memory)
        self.rng, self.drain, self.stale = rng, drain, stale
        self.numpy_rng = np.random.default_rng(rng.getrandbits(64))
        self.buffers: dict[Any, Buffer] = {}  # of warps and CTAs
        self.views: dict[Any, dict[Region, Contents]] = {}  # of CTAs; what is missing was not changed since the launch
        self.first: dict[Region, Contents] = {}  # as the launch found it, of what was changed since
        self.changed: set[Region] = set()

    def buffer(self, holder: Any) -> Buffer:
        if holder not in self.buffers:
            self.buffers[holder] = Buffer()
        return self.buffers[holder]

    def load(self, warp: Any, access: Access) -> Loaded:
        values, written = super().load(warp, access)
        region, cta = access.region, warp.cta
        if region in self.changed:
            view = self._view(cta, region)
            if view is not region.now:
                values, written = self._stale(cta, view, access, values, written)
        for holder in (cta, warp):
            if holder in self.buffers:
                values, written = self.buffers[holder].overlay(access, values, written)
        return values, written

    def store(self, warp: Any, access: Access, values: np.ndarray, lanes: np.ndarray) -> None:
        self.buffer(warp).hold(Entry(access, lanes), values)

    def begin_ordered(self, warp: Any, access: Access) -> None:
        """What the own CTA has stored there comes first."""
        for holder in (warp.cta, warp):
            if holder in self.buffers and access.region in self.buffers[holder].latest:
                self._leave(holder, warp.cta, access)

    def change(self, access: Access, values: np.ndarray) -> None:
        self._note_change(access.region)
        super().change(access, values)

    def end_ordered(self, warp: Any, access: Access) -> None:
        """No later load of the CTA sees anything older there."""
        region = access.region
        if region in self.changed and (view := self._view(warp.cta, region)) is not region.now:
            self._renew(warp.cta, view, access, region.load(region.now, access))

    def release(self, warp: Any, lanes: np.ndarray) -> None:
        cta = warp.cta
        if cta in self.buffers:
            for entry in self.buffers[cta].entries:
                self._leave(cta, cta, entry.access)
            self.buffers[cta].entries.clear()
        if warp not in self.buffers:
            return
        kept = []
        for entry in self.buffers[warp].entries:
            own = np.isin(entry.lanes, lanes)
            if own.all():
                self._leave(warp, cta, entry.access)
                continue
            if own.any():
                self._leave(warp, cta, entry.access.part(own))
            kept.append(Entry(entry.access.part(~own), entry.lanes[~own]))
        self.buffers[warp].entries[:] = kept

    def acquire(self, warp: Any) -> None:
        view = self.views.setdefault(warp.cta, {})
        for region in self.changed:
            view[region] = region.now
            region.now.kept = True

    def barrier(self, warps: list[Any]) -> None:
        for warp in warps:
            if warp in self.buffers and self.buffers[warp].entries:
                of_cta = self.buffer(warp.cta)
                for entry in self.buffers[warp].entries:
                    of_cta.hold(entry, *self.buffers[warp].take(entry.access))
                self.buffers[warp].entries.clear()

    def step(self, ctas: list[Any]) -> None:
        if self.rng.random() >= self.drain:
            return
        cta = self.rng.choice(ctas)
        holders = [each for each in (cta, *cta.warps) if each in self.buffers and self.buffers[each].entries]
        if holders:
            holder = self.rng.choice(holders)
            entries = self.buffers[holder].entries
            self._leave(holder, cta, entries.pop(self.rng.randrange(len(entries))).access)

    def finish(self, ctas: list[Any]) -> None:
        for cta in ctas:
            for holder in (cta, *cta.warps):
                if holder in self.buffers:
                    for entry in self.buffers[holder].entries:
                        self._leave(holder, cta, entry.access)
                    self.buffers[holder].entries.clear()

    # ------------------------------------------------------------------------------------------------- views, buffers

    def _view(self, cta: Any, region: Region) -> Contents:
        return self.views.get(cta, {}).get(region) or self.first[region]

    def _renew(
        self, cta: Any, view: Contents, access: Access, values: np.ndarray, mask: np.ndarray | None = None
    ) -> None:
        """Elements of a CTA's view become as new as some values."""
        if view.kept:
            view = self.views.setdefault(cta, {})[access.region] = view.copy()
        put(view, access, values, mask)

    def _stale(
        self, cta: Any, view: Contents, access: Access, values: np.ndarray, written: np.ndarray | None
    ) -> Loaded:
        """Of each element the new value or the CTA's old one, from now on at least as new for the whole CTA."""
        old = view.value[access.size][access.index]
        old_written = None if written is None else view.written[access.size][access.index]
        same_written = written is None or np.array_equal(written, old_written)
        if same_written and np.array_equal(values, old):
            return values, written
        late = self.numpy_rng.random(old.shape) < self.stale
        if not late.all():
            fresh = Access(access.region, access.size, access.numbers().ravel()[~late], 1)
            mask = None if written is None else written[~late]
            self._renew(cta, view, fresh, values[~late], mask)
        return np.where(late, old, values), written if written is None else np.where(late, old_written, written)

    def _leave(self, holder: Any, cta: Any, access: Access) -> None:
        """Stores leave the buffer of a warp or CTA, for memory and for the CTA's view."""
        region = access.region
        value, mask = self.buffers[holder].take(access)
        if holder is not cta and cta in self.buffers and region in self.buffers[cta].latest:
            of_cta = self.buffers[cta].latest[region].written[access.size]
            of_cta[access.index] &= ~mask  # older
        self._note_change(region)
        view = self._view(cta, region)
        region.store(access, value, mask)
        self._renew(cta, view, access, value, mask)

    def _note_change(self, region: Region) -> None:
        if region not in self.changed:
            self.changed.add(region)
            self.first[region], region.now.kept = region.now, True


def ordering(memory: Memory, rng: random.Random, weak: tuple[float, float] | None) -> Coherent:
    """Coherent memory, or weak memory with (drain, stale)."""
    return Coherent(memory) if weak is None else Weak(memory, rng, *weak)


def is_written(written: np.ndarray | None, size: int) -> bool:
    """Whether all bits of some elements were written."""
    return written is None or bool((written == EVERY_BIT[size]).all())
