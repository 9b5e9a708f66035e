"""Buffers that several calls have at a time: each call's own slot, readable until it is another call's.

A call in a CUDA graph gets a slot that only other such calls take: its replays come unseen, and would overwrite what
another call has left. Such calls are numbered -1, -2 and so on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ...kernels import tables
from .draw_ahead import DRAW_AHEAD
from .running import Running

KEPT_CALLS = 8  # whose statistics stay readable
SLOTS = KEPT_CALLS + DRAW_AHEAD - 1  # that calls take in turns; the others hold what is drawn for calls to come
CAPTURED_CALLS = 4  # calls in CUDA graphs that have a slot of their own, which replays write to at any time


class Slot(NamedTuple):
    """A call's share of the buffers that several calls have at a time, ``(rows,)`` padded to a multiple of 16 each.

    Attributes:
        partner: int32, each row's partner or -1.
        readers: int32, how many active rows read each row.
        active: int32, the active rows.
        outcome: int8, what became of each row (``kernels/tables.py``).
        similarity: float32, of active rows.
        state: int32 ``(STATE_WORDS,)``.
    """

    partner: torch.Tensor
    readers: torch.Tensor
    active: torch.Tensor
    outcome: torch.Tensor
    similarity: torch.Tensor
    state: torch.Tensor


class Slots:
    """The slots of one plan's calls, which take turns.

    Args:
        row_start: the first row of each layer, and the number of rows.
        running: what all calls add to.
        zeros: makes a tensor of zeros on the device, int32 unless told otherwise.
        follow: makes the current stream wait for what the plan still does on another one.

    Attributes:
        taken: the calls before this one have taken their slots, those that are drawn ahead included.
        running: what all calls have done together.
        captured: calls in CUDA graphs so far.
        lock: held while a slot is taken or read.
    """

    def __init__(
        self, row_start: np.ndarray, running: Running, zeros: Callable[..., torch.Tensor], follow: Callable[[], int]
    ) -> None:
        self.row_start, self.rows, self.running, self.follow = row_start, int(row_start[-1]), running, follow
        padded = -(-self.rows // 16) * 16  # so that every slot begins at a multiple of 16 bytes
        slots = SLOTS + CAPTURED_CALLS
        self.partner, self.readers, self.active = (zeros(slots, padded) for _ in range(3))
        self.outcome = zeros(slots, padded, dtype=torch.int8)
        self.similarity = zeros(slots, padded, dtype=torch.float32)
        self.state = zeros(slots, tables.STATE_WORDS.value)
        self._slots = [Slot(*(tensor[index] for tensor in self.tensors())) for index in range(slots)]
        self.taken = self.captured = 0
        self.lock = threading.Lock()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The buffers of all slots, in the order of :class:`Slot`."""
        return self.partner, self.readers, self.active, self.outcome, self.similarity, self.state

    @staticmethod
    def index_of(call: int) -> int:
        """The index of a call's slot."""
        return call % SLOTS if call >= 0 else SLOTS + (-1 - call) % CAPTURED_CALLS

    def of(self, call: int) -> Slot:
        """The slot of a call, which later calls use again."""
        return self._slots[self.index_of(call)]

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def take(self, end: int) -> None:
        """The slots of the calls before ``end`` are taken, and what earlier calls left there is gone."""
        self.taken = max(self.taken, end)

    def capture(self) -> int:
        """The number of the next call in a CUDA graph."""
        self.captured += 1
        return -self.captured

    def clean(self) -> None:
        """Zero all counts, in two memsets."""
        self.readers.zero_()
        self.state.zero_()

    def results_of(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity and outcome of each row in a call; the caller holds the lock.

        Raises:
            RuntimeError: the slot has been reused, or a CUDA graph is being captured.
        """
        if self.state.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("statistics cannot be read while a CUDA graph is captured; read them after a replay")
        if call < 0 and (self.captured + call >= CAPTURED_CALLS or -call > CAPTURED_CALLS):
            raise RuntimeError(
                f"the statistics of this call cannot be told from those of another: the plan keeps {CAPTURED_CALLS} "
                "calls in CUDA graphs apart, and more were captured; capture with a new MergePlan"
            )
        if call >= 0 and self.taken - call > SLOTS:
            raise RuntimeError(
                f"the statistics of this call are gone: the plan keeps those of its last {KEPT_CALLS} calls in device "
                "memory; read them earlier"
            )
        slot = self.of(call)
        self.follow()  # the call may have run on another stream
        return slot.similarity[: self.rows], slot.outcome[: self.rows]
