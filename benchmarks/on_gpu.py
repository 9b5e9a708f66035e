"""Device time, host time and the least time that a GPU's memory allows for a call of ``merge_``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

import inmerge_fast

FLUSH_BYTES = 1 << 28  # several times the L2 cache of an H200 (60 MB)
COPY_BYTES = 1 << 30
CYCLES_PER_SECOND = 1.98e9


class GpuClock:
    """Times calls on one device, and measures its copy bandwidth to compare them with."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sum = torch.zeros((), device=device)
        self.copy_bandwidth = self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy that is much larger than the cache."""
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = self._device_seconds(lambda _: target.copy_(source), 20)
        return 2 * COPY_BYTES / statistics.median(times)

    def _device_seconds(self, call: Callable[[int], object], repeats: int) -> list[float]:
        return [start.elapsed_time(end) * 1e-3 for start, end, _ in self._run(call, repeats)]

    def _run(
        self, call: Callable[[int], object], repeats: int
    ) -> list[tuple[torch.cuda.Event, torch.cuda.Event, float]]:
        """Start and end on the device and host seconds of each call, queued while the device is kept busy.

        So the device never waits for the host between the kernels of a call. Before each call the cache is filled by
        reading other memory: written lines would have to be written back at the call's expense.
        """
        for warm_up in range(3):
            call(warm_up)
        events = []
        for first in range(0, repeats, 10):  # few enough that the queue never fills, which would stop the host
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(int(0.03 * CYCLES_PER_SECOND))
            for repeat in range(first, min(first + 10, repeats)):
                torch.sum(self._flush, 0, out=self._sum)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                before = time.perf_counter()
                call(repeat)
                host = time.perf_counter() - before
                end.record()
                events.append((start, end, host))
        torch.cuda.synchronize(self.device)
        return events

    def time(self, call: Callable[[int], object], repeats: int) -> dict[str, float]:
        """Device and host time of ``call(step)`` in microseconds."""
        events = self._run(call, repeats)
        device = [start.elapsed_time(end) * 1e3 for start, end, _ in events]
        fifths = statistics.quantiles(device, n=5)
        return {
            "device_us": statistics.median(device), "device_q20_us": fifths[0], "device_q80_us": fifths[-1],
            "host_us": statistics.median(host * 1e6 for _, _, host in events),
        }  # fmt: skip

    def floor(
        self, plan: inmerge_fast.MergePlan, steps: Iterable[int], prob: float, *, writes: bool
    ) -> dict[str, float]:
        """Bytes that the very draws of these steps must move, and the time that a copy of as many takes."""
        moved = statistics.mean(bytes_of_draw(plan, 0, step, prob, writes=writes) for step in steps)
        return {"floor_bytes": moved, "floor_us": moved / self.copy_bandwidth * 1e6}

    def about(self) -> dict[str, str]:
        """What the results file says of the device beyond its name."""
        return {
            "copy_bandwidth": f"{self.copy_bandwidth / 1e12:.3f} TB/s, read and written",
            "cuda": str(torch.version.cuda),
        }

    def print_table(self, rows: Sequence[dict[str, object]]) -> None:
        """Print what :meth:`time` and :meth:`floor` found."""
        print(f"\ncold cache; floor: bytes of the draw at a copy's {self.copy_bandwidth / 1e12:.2f} TB/s")
        print(f"{'net':13} {'regime':12} {'provider':10} {'device us':>10} {'20 %':>8} {'80 %':>8} {'floor us':>9} "
              f"{'x floor':>8} {'host us':>8}")  # fmt: skip
        for row in rows:
            if "device_us" in row:
                print(f"{row['net']:13} {row['regime']:12} {row['provider']:10} {row['device_us']:10.1f} "
                      f"{row['device_q20_us']:8.1f} {row['device_q80_us']:8.1f} {row['floor_us']:9.1f} "
                      f"{row['device_us'] / row['floor_us']:8.2f} {row['host_us']:8.1f}")  # fmt: skip


def bytes_of_draw(plan: inmerge_fast.MergePlan, seed: int, step: int, prob: float, *, writes: bool) -> int:
    """Bytes of the filters that are sampled or read as partners, each once, and of the sampled ones if all merge."""
    moved = 0
    for layer in plan.layers:
        layout = layer.layout
        groups = layout.filters // layout.group_size
        coin, partner = inmerge_fast.draw(seed, step, layer.layer_id, layout.filters, prob, groups=groups)
        read = np.union1d(coin.nonzero()[0], partner[coin]).size
        moved += (read + (int(coin.sum()) if writes else 0)) * layout.elements * layer.dtype.itemsize
    return moved
