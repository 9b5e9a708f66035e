"""Memory as bytes: which regions there are, what an access touches, whether it is allowed.

Global memory is a copy of host memory at the host's addresses, made at launch and written back at its end. A
:class:`Region` is one tensor of it, or the shared memory of a CTA. Out of bounds is what does not lie in one of the
launch's tensors as a whole; misaligned is what hardware refuses.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .arithmetic import LANES
from .parse import Instr

EVERY_BIT = {size: np.array([-1], f"i{size}").view(f"u{size}")[0] for size in (1, 2, 4, 8)}
Index = slice | np.ndarray


class AccessError(RuntimeError):
    """An access out of bounds, misaligned, or of memory that nobody has written."""


class Bytes:
    """Bytes that can be looked at in elements of 1, 2, 4 or 8."""

    __slots__ = ("raw", "views")

    def __init__(self, size: int, fill: int = 0) -> None:
        size = -(-max(size, 1) // 16) * 16
        self.raw = np.full(size, fill, "u1") if fill else np.zeros(size, "u1")
        self.views = {1: self.raw, 2: self.raw.view("u2"), 4: self.raw.view("u4"), 8: self.raw.view("u8")}

    def __getitem__(self, size: int) -> np.ndarray:
        return self.views[size]


class Contents:
    """What is in a region at some time, and, where that is not all of it, which bytes have been written.

    ``kept`` says that somebody looks at it as of now, so that a change must go to a copy.
    """

    __slots__ = ("kept", "value", "written")

    def __init__(self, value: Bytes, written: Bytes | None) -> None:
        self.value, self.written, self.kept = value, written, False

    def copy(self) -> Contents:
        value, written = Bytes(self.value.raw.size), self.written and Bytes(self.value.raw.size)
        value.raw[:] = self.value.raw
        if written:
            written.raw[:] = self.written.raw
        return Contents(value, written)


@dataclass(eq=False)
class Region:
    """Memory from ``start`` to before ``end``, in elements counted from ``origin``, which is a multiple of 16.

    Attributes:
        is_defined: it may be read before it was written.
        now: what is in it.
    """

    name: str
    start: int
    end: int
    is_defined: bool

    def __post_init__(self) -> None:
        self.origin = self.start // 16 * 16
        size = self.end - self.origin
        # A pattern, so that what is read in spite of all is not a plausible zero.
        self.now = Contents(Bytes(size, 0 if self.is_defined else 0xA5), None if self.is_defined else Bytes(size))

    def load(self, contents: Contents, access: Access) -> np.ndarray:
        """Elements of the contents of some time."""
        return contents.value[access.size][access.index]

    def store(self, access: Access, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Change the contents, all bits of the elements or those in a mask."""
        if self.now.kept:
            self.now = self.now.copy()
        put(self.now, access, values, mask)

    def name_of(self, place: int) -> str:
        """For reports: a place in bytes from the origin."""
        return f"{self.name}+{self.origin + place - self.start}"


def put(contents: Contents, access: Access, values: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Set elements, all of their bits or those in a mask."""
    view, index = contents.value[access.size], access.index
    view[index] = values if mask is None else (view[index] & ~mask) | (values & mask)
    if contents.written:
        contents.written[access.size][index] |= EVERY_BIT[access.size] if mask is None else mask


@dataclass(frozen=True)
class Access:
    """The elements that some lanes touch, one lane after the other.

    Attributes:
        size: bytes per element.
        index: their numbers, from the region's origin.
        lanes: how many lanes those are; 1 also where all touch the same elements.
    """

    region: Region
    size: int
    index: Index
    lanes: int

    def bytes_index(self, size: int) -> Index:
        """The same memory in elements of another size, ``self.size`` or a smaller power of two."""
        factor = self.size // size
        if factor == 1:
            return self.index
        if isinstance(self.index, slice):
            return slice(self.index.start * factor, self.index.stop * factor)
        return (self.index[:, None] * factor + np.arange(factor)).ravel()

    def elements_per_lane(self) -> int:
        """How many elements each lane touches."""
        index = self.index
        return (index.stop - index.start if isinstance(index, slice) else index.size) // self.lanes

    def numbers(self) -> np.ndarray:
        """The elements' numbers, by lane."""
        index = self.index
        if isinstance(index, slice):
            index = np.arange(index.start, index.stop)
        return index.reshape(self.lanes, -1)

    def part(self, rows: np.ndarray) -> Access:
        """Some of the lanes."""
        numbers = self.numbers()[rows]
        return Access(self.region, self.size, numbers.ravel(), len(numbers))

    def place(self, which: int) -> int:
        """Bytes from the region's origin to an element, by its place in ``index``."""
        index = self.index
        return int(index.start + which if isinstance(index, slice) else index[which]) * self.size


@cache
def _ramp(step: int, dtype: str) -> bytes:
    return (np.arange(LANES) * step).astype(dtype).tobytes()


@cache
def _elements(count: int) -> np.ndarray:
    return np.arange(count)


def touch(region: Region, addresses: np.ndarray, size: int, count: int) -> Access | None:
    """The access of lanes to ``count`` elements each, or None if it is out of bounds.

    Raises:
        AccessError: an address is misaligned.
    """
    first, width, lanes = int(addresses[0]), size * count, addresses.size
    raw, item = addresses.tobytes(), addresses.itemsize
    uniform = raw[:item] * lanes == raw
    if uniform or (addresses - addresses[0]).tobytes() == _ramp(width, addresses.dtype.str)[: len(raw)]:
        if uniform:
            lanes = 1
        if first % width:
            raise AccessError(f"misaligned: {first:#x} for {width} bytes")
        if first < region.start or first + lanes * width > region.end:
            return None
        begin = (first - region.origin) // size
        return Access(region, size, slice(begin, begin + lanes * count), lanes)
    if int(np.bitwise_or.reduce(addresses)) % width:
        raise AccessError(f"misaligned: {next(hex(each) for each in addresses if each % width)} for {width} bytes")
    if int(addresses.min()) < region.start or int(addresses.max()) + width > region.end:
        return None
    numbers = (addresses.astype("i8") - region.origin) // size
    return Access(region, size, numbers if count == 1 else (numbers[:, None] + _elements(count)).ravel(), lanes)


class Memory:
    """Global memory.

    Args:
        spans: (name, first address, address behind the last byte, whether it may be read before it is written) of every
            tensor; those that overlap are views of one.
    """

    def __init__(self, spans: Sequence[tuple[str, int, int, bool]]) -> None:
        merged: list[tuple[str, int, int, bool]] = []
        for name, start, end, is_defined in sorted(spans, key=lambda span: span[1]):
            if merged and start < merged[-1][2]:
                before = merged.pop()
                name, start, end, is_defined = before[0], before[1], max(end, before[2]), before[3] or is_defined
            merged.append((name, start, end, is_defined))
        self.regions = [Region(*span) for span in merged]
        self._starts = [region.start for region in self.regions]
        for region in self.regions:
            if region.is_defined:
                source = (ctypes.c_uint8 * (region.end - region.start)).from_address(region.start)
                region.now.value.raw[region.start - region.origin : region.end - region.origin] = source

    def write_back(self) -> None:
        """Copy everything to the host."""
        for region in self.regions:
            own = region.now.value.raw[region.start - region.origin : region.end - region.origin]
            ctypes.memmove(region.start, own.ctypes.data, own.size)

    def touch(self, addresses: np.ndarray, size: int, count: int, instr: Instr) -> Iterator[tuple[Access, Index]]:
        """The accesses of lanes to ``count`` elements each, and which of the lanes: mostly one access, of all.

        Raises:
            AccessError: out of bounds or misaligned.
        """
        region = self.regions[max(0, bisect_right(self._starts, int(addresses[0])) - 1)]
        try:
            access = touch(region, addresses, size, count)
            if access is not None:
                yield access, slice(None)
                return
            owners = np.searchsorted(self._starts, addresses, "right") - 1
            for owner in np.unique(owners):
                lanes = np.flatnonzero(owners == owner)
                region = self.regions[max(0, owner)]
                access = touch(region, addresses[lanes], size, count)
                if access is None:
                    at = [hex(each) for each in addresses[lanes]]
                    where = f"{region.name} from {region.start:#x} to {region.end:#x}"
                    raise AccessError(f"out of bounds: {size * count} bytes at {', '.join(at[:4])}, nearest is {where}")
                yield access, lanes
        except AccessError as error:
            raise AccessError(f"{instr}: {error}") from None
