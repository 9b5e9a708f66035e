"""What a call of the kernels has left in device memory, read at once or copied to the host meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...effect import EffectMonitor
from ...kernels import tables
from ...stats import SampledPairs
from .slots import Slots


@dataclass(slots=True)  # frozen, it would take twice as long to make, and every call makes one
class Results:
    """Where a call's results are: a slot, readable until it is another call's.

    Those of a call in a CUDA graph are its latest replay's; before the first one nothing was sampled.
    """

    slots: Slots
    call: int

    def fetch(self) -> SampledPairs:
        """Wait for the device and copy the results to the host.

        Raises:
            RuntimeError: the slot has been reused, or a CUDA graph is being captured.
        """
        with self.slots.lock:
            similarity, outcome = self.slots.results_of(self.call)
            return self._pairs(similarity.cpu(), outcome.cpu())

    __call__ = fetch

    def prefetch(self) -> Callable[[], SampledPairs]:
        """Begin to copy the results to the host, after what the current stream does now, and return at once.

        Returns:
            What waits for the copy, and for nothing else, and reads it.

        Raises:
            RuntimeError: the slot has been reused, or a CUDA graph is being captured.
        """
        with self.slots.lock:
            on_device = self.slots.results_of(self.call)
            if not on_device[0].is_cuda:
                copied = [tensor.clone() for tensor in on_device]
                return lambda: self._pairs(*copied)
            with torch.inference_mode(False):
                on_host = [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True) for t in on_device]
            for host, device in zip(on_host, on_device, strict=True):
                host.copy_(device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(on_device[0].device))

        def fetch() -> SampledPairs:
            arrived.synchronize()
            return self._pairs(*on_host)

        return fetch

    def count_in(self, effect: EffectMonitor) -> None:
        """Tell the monitor where the totals of all calls so far are, without waiting."""
        effect.count_running(self.slots.running)

    def _pairs(self, similarity: torch.Tensor, outcome: torch.Tensor) -> SampledPairs:
        values: npt.NDArray[np.float64] = similarity.double().numpy()
        codes = outcome.numpy()
        sampled = codes != tables.NOT_SAMPLED.value
        counts = np.add.reduceat(sampled, self.slots.row_start[:-1], dtype=np.int64)
        return SampledPairs(counts, values[sampled], codes[sampled] == tables.PASSED.value)
