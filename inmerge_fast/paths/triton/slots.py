"""Buffers that several calls have at a time: each call's own slot, readable until it is another call's."""

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
SLOTS = KEPT_CALLS + DRAW_AHEAD - 1  # the others hold what is drawn for calls to come


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
        lock: held while a slot is taken or read.
    """

    def __init__(
        self, row_start: np.ndarray, running: Running, zeros: Callable[..., torch.Tensor], follow: Callable[[], int]
    ) -> None:
        self.row_start, self.rows, self.running, self.follow = row_start, int(row_start[-1]), running, follow
        padded = -(-self.rows // 16) * 16  # so that every slot begins at a multiple of 16 bytes
        self.partner, self.readers, self.active = (zeros(SLOTS, padded) for _ in range(3))
        self.outcome = zeros(SLOTS, padded, dtype=torch.int8)
        self.similarity = zeros(SLOTS, padded, dtype=torch.float32)
        self.state = zeros(SLOTS, tables.STATE_WORDS.value)
        self._slots = [Slot(*(tensor[index] for tensor in self.tensors())) for index in range(SLOTS)]
        self.taken = 0
        self.lock = threading.Lock()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The buffers of all slots, in the order of :class:`Slot`."""
        return self.partner, self.readers, self.active, self.outcome, self.similarity, self.state

    def of(self, call: int) -> Slot:
        """The slot of a call, which later calls use again."""
        return self._slots[call % SLOTS]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def take(self, end: int) -> None:
        """The slots of the calls before ``end`` are taken, and what earlier calls left there is gone."""
        self.taken = max(self.taken, end)

    def clean(self) -> None:
        """Zero all counts, in two memsets."""
        self.readers.zero_()
        self.state.zero_()

    def results_of(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity and outcome of each row in a call; the caller holds the lock.

        Raises:
            RuntimeError: the slot has been reused.
        """
        if self.taken - call > SLOTS:
            raise RuntimeError(
                f"the statistics of this call are gone: the plan keeps those of its last {KEPT_CALLS} calls in device "
                "memory; read them earlier"
            )
        slot = self.of(call)
        self.follow()  # the call may have run on another stream
        return slot.similarity[: self.rows], slot.outcome[: self.rows]
