"""A happens-before data race detector for the programs of one kernel launch: vector clocks, vectorised with NumPy.

Two accesses by different programs to the same byte race if one of them writes, one of them is not atomic, and nothing
orders them. Only atomics order: what came before a release comes before what follows an acquire of the same word, if
the acquire sees the release. A race is found in every schedule that makes both accesses, not just where it does harm.

Triton compiles a program to threads, of which the detector tells two apart: *the first*, which executes scalar atomics,
and *the others*. Any of them may have made a load or a store, so both count as having made it. An atomic orders only
its own thread's accesses; a barrier joins the two. Hence loads are ordered before a release only with a barrier in
between. The result of a scalar atomic comes to the other threads through a barrier of its own; but not if nobody uses
the result, which the detector cannot see. It supposes that of all relaxed ones, as of the running totals.

Not looked for: races among the threads of one program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from interpreter import Access, memory_span

FIRST, OTHERS = 0, 1
ALWAYS = np.iinfo(np.int32).max
PAGE = 512  # bytes of memory per page of bookkeeping


@dataclass(frozen=True)
class Race:
    """Two unordered operations of two programs on the same memory."""

    kind: str  # the earlier one's and the later one's letter (Read, Write, Atomic): W-W, W-R, R-W, A-R, A-W, R-A, W-A
    where: str  # the first element concerned: "name[index]" if it lies in a named tensor, else its address
    address: int
    elements: int  # how many are concerned
    earlier: int  # program, numbered in launch order
    later: int

    def __str__(self) -> str:
        more = f" and {self.elements - 1} more" if self.elements > 1 else ""
        return f"{self.kind} at {self.where}{more}: program {self.earlier}, then {self.later}"


class _Word:
    """A word that atomics were done on: when by whom, and what the releases among them published."""

    def __init__(self, programs: int) -> None:
        self.times = np.zeros(programs, np.int32)
        self.published = np.zeros((programs, 2), np.int32)


class RaceDetector:
    """Watches the memory operations of one launch, in the order in which they happen.

    Each program has a clock that ticks at its barriers and atomics. ``known[p, s, q, t]`` says up to which time of
    program q the accesses of its thread t come before whatever thread s of program p does next.

    Args:
        programs: how many the launch has.
        barrier_before_release: whether the compiler puts a barrier before every release, as Triton does, unpromised.
        tensors: names for reports.
    """

    def __init__(self, programs: int, *, barrier_before_release: bool, tensors: Mapping[str, torch.Tensor]) -> None:
        self.races: list[Race] = []
        self.programs = programs
        self.barrier_before_release = barrier_before_release
        self.tensors = tensors
        self.time = np.ones(programs, np.int32)
        self.known = np.zeros((programs, 2, programs, 2), np.int32)
        # What all threads of a program know of all threads of another, and of the first thread of another.
        self.all_know = np.zeros((programs, programs), np.int32)
        self.all_know_first = np.zeros((programs, programs), np.int32)
        for program in range(programs):
            self._update(program)

        # By byte: the last write, and each program's last read since; the word (an index) if atomics were done on it.
        self.pages: dict[int, int] = {}
        capacity = 128 * PAGE
        self.writer = np.zeros(capacity, np.int32)
        self.written = np.zeros(capacity, np.int32)
        self.read = np.zeros((capacity, programs), np.int32)
        self.word = np.zeros(capacity, np.int32)
        self.words: list[_Word | None] = [None]

    def access(self, program: int, access: Access) -> None:
        """``program`` makes this access now."""
        if not access.addresses.size:
            return
        places = self._places(access.addresses, access.size)
        if access.op == "atomic":
            self._atomic(program, access, places)
            return
        letter = "R" if access.op == "load" else "W"
        known = self.all_know[program]
        self._check_writes(letter, program, access, places, known)
        if self.word[places].any():
            for index in np.unique(self.word[places]):
                word = self.words[index]
                if word is not None and (word.times > self.all_know_first[program]).any():
                    for earlier in np.flatnonzero(word.times > self.all_know_first[program]):
                        self._report(f"A-{letter}", access, self.word[places] == index, earlier, program)
        if access.op == "load":
            self.read[places, program] = self.time[program]
            return
        self._check_reads("W", program, access, places, known)
        self.read[places] = 0
        self.writer[places] = program
        self.written[places] = self.time[program]
        self.word[places] = 0  # a later acquire sees this write, not the releases before it

    def barrier(self, program: int) -> None:
        """``program`` joins its threads."""
        joined = self.known[program].max(axis=0)
        joined[program] = self.time[program]
        self.known[program] = joined
        self.time[program] += 1
        self._update(program)

    def _atomic(self, program: int, access: Access, places: np.ndarray) -> None:
        acquires, releases = access.order in ("acquire", "acq_rel"), access.order in ("release", "acq_rel")
        if releases and self.barrier_before_release:
            self.barrier(program)
        first = self.known[program, FIRST]
        first[program, FIRST] = self.time[program]
        words = [self._word_at(bytes_of_word) for bytes_of_word in places.reshape(-1, access.size)]
        if acquires:
            for word in words:
                np.maximum(first, word.published, out=first)
        known = first.min(axis=1)
        known[program] = ALWAYS
        self._check_writes("A", program, access, places, known)
        self._check_reads("A", program, access, places, known)
        for word in words:
            if releases:
                np.maximum(word.published, first, out=word.published)
            word.times[program] = self.time[program]
        self.time[program] += 1
        if access.is_scalar and access.order != "relaxed":
            self.barrier(program)
        else:
            self._update(program)

    def _word_at(self, places: np.ndarray) -> _Word:
        index = self.word[places[0]]
        if index == 0:
            index = len(self.words)
            self.words.append(_Word(self.programs))
            self.word[places] = index
        word = self.words[index]
        assert word is not None
        return word

    def _update(self, program: int) -> None:
        self.all_know[program] = self.known[program].min(axis=(0, 2))
        self.all_know_first[program] = self.known[program, :, :, FIRST].min(axis=0)
        self.all_know[program, program] = self.all_know_first[program, program] = ALWAYS

    def _check_writes(self, letter: str, program: int, access: Access, places: np.ndarray, known: np.ndarray) -> None:
        writer = self.writer[places]
        unordered = self.written[places] > known[writer]
        if unordered.any():
            for earlier in np.unique(writer[unordered]):
                self._report(f"W-{letter}", access, unordered & (writer == earlier), earlier, program)

    def _check_reads(self, letter: str, program: int, access: Access, places: np.ndarray, known: np.ndarray) -> None:
        unordered = self.read[places] > known
        if unordered.any():
            for earlier in np.flatnonzero(unordered.any(axis=0)):
                self._report(f"R-{letter}", access, unordered[:, earlier], earlier, program)

    def _report(self, kind: str, access: Access, bad_bytes: np.ndarray, earlier: int, later: int) -> None:
        bad = bad_bytes.reshape(-1, access.size).any(axis=1)
        address = int(access.addresses[bad][0])
        where = locate(address, self.tensors)
        self.races.append(Race(kind, where, address, int(bad.sum()), int(earlier), int(later)))

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Where the bytes at these addresses have their bookkeeping."""
        every_byte = (addresses[:, None] + np.arange(size, dtype=np.uint64)).ravel().astype(np.int64)
        pages, offsets = np.divmod(every_byte, PAGE)
        low, high = int(pages.min()), int(pages.max())
        if high - low <= 2 * addresses.size + 2:
            page_starts = np.array([self._page_start(page) for page in range(low, high + 1)])
            return page_starts[pages - low] + offsets
        distinct, index = np.unique(pages, return_inverse=True)
        return np.array([self._page_start(int(page)) for page in distinct])[index] + offsets

    def _page_start(self, page: int) -> int:
        start = self.pages.get(page)
        if start is None:
            start = self.pages[page] = len(self.pages) * PAGE
            if start == self.writer.size:
                for name in ("writer", "written", "read", "word"):
                    old = getattr(self, name)
                    setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        return start


def locate(address: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """``name[index]`` of the element at an address; the index is a place in memory if the tensor is not contiguous."""
    for name, tensor in tensors.items():
        start, end = memory_span(tensor)
        if start <= address < end:
            element = (address - start) // tensor.element_size()
            index = np.unravel_index(element, tensor.shape) if tensor.is_contiguous() else (element,)
            return f"{name}[{', '.join(str(int(i)) for i in index)}]"
    return hex(address)
