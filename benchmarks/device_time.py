"""Time that a GPU spends on the launches of a call, apart from what the host needs to queue them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timing import CYCLES_PER_SECOND, WARM_UP, cold_cache, means_of, quantiles
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD

AHEAD = 12  # calls queued behind a sleeping device: few enough that the queue never fills, which would stop the host
ASLEEP = 0.03  # seconds; longer than the host needs to queue AHEAD calls
PROFILED_CALLS = 20


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds per call: on the device from the first launch's start to the last one's end, and on the host.

    Each a mean of ``DRAW_AHEAD`` calls in a row, one of which draws for all of them.
    """

    device: list[float]
    host: list[float]

    def row(self) -> dict[str, float]:
        """Median and quantiles of both, as they stand in result files."""
        return quantiles(self.device, "device") | quantiles(self.host, "host")


def device_times(call: Callable[[int], object], device: torch.device, repeats: int) -> DeviceTimes:
    """Time ``call(step)`` with events, the cache cold before each call, queued while the device is kept busy.

    So the device never waits for the host between the launches of a call, and the events time the launches alone. The
    cache is filled by reading other memory: written lines would have to be written back at the call's expense. An empty
    pair of events takes about 2 us, which is left in: a reader of a figure may take it for overhead of ours.
    """
    fill_cache = cold_cache(device)
    for step in range(WARM_UP):
        call(step)
    events, host = [], []
    for first in range(0, repeats, AHEAD):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(ASLEEP * CYCLES_PER_SECOND))
        for step in range(first, min(first + AHEAD, repeats)):
            fill_cache()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            before = time.perf_counter()
            call(step)
            host.append(time.perf_counter() - before)
            end.record()
            events.append((start, end))
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) * 1e-3 for start, end in events]
    return DeviceTimes(means_of(times, DRAW_AHEAD), means_of(host, DRAW_AHEAD))


def kernel_times(call: Callable[[int], object], device: torch.device) -> dict[str, float]:
    """Mean microseconds per call of every kernel that ``call(step)`` launches, cold, by name; empty without CUPTI."""
    fill_cache = cold_cache(device)
    call(0)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_CALLS):  # what the cold cache costs, to tell it apart
            fill_cache()
        torch.cuda.synchronize(device)
    other = {event.key for event in profile.key_averages()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in range(PROFILED_CALLS):
            fill_cache()
            call(step)
        torch.cuda.synchronize(device)
    return {
        event.key: round(event.self_device_time_total / PROFILED_CALLS, 2)
        for event in profile.key_averages()
        if event.key not in other and event.self_device_time_total > 0
    }
