"""Time that a GPU spends on the launches of a call, apart from what the host needs to queue them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

from benchmarks.timing import CYCLES_PER_SECOND, WARM_UP, cold_cache, means_of, parts_of, quantiles
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD

QUEUED = (12, 4, 1)  # calls behind a sleeping device: fewer where their launches do not fit the driver's queue, of 1024
ASLEEP = 0.03  # seconds; longer than the host needs to queue so many calls
PROFILED_CALLS = 20
OWN_KERNEL = re.compile(r"_[a-z_]+_kernel")  # as Triton names them, by their function


class QueueOverflowError(RuntimeError):
    """The host could not queue a call while the device slept, so the device's time cannot be told from the host's."""


def device_times(call: Callable[[int], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Medians and quantiles of a call's time on the device, first launch's start to last one's end, and on the host.

    Timed with events, the cache cold before each call, queued while the device is kept busy: so it never waits for the
    host between the launches of a call, and the events time the launches alone. Where the device has woken before all
    was queued, because the driver's queue was full or the host slow, the samples are thrown away and fewer calls queued
    at a time. Each sample is a mean of ``DRAW_AHEAD`` calls in a row, one of which draws for all of them. The cache is
    filled by reading other memory: written lines would have to be written back at the call's expense. An empty pair of
    events takes about 2 us, which is left in: a reader of a figure may take it for overhead of ours.

    Raises:
        QueueOverflowError: not even one call can be queued in time.
    """
    for step in range(WARM_UP):
        call(step)
    for ahead in QUEUED:
        samples = _queued(call, device, repeats, ahead)
        if samples is not None:
            on_device, on_host = (means_of(seconds, DRAW_AHEAD) for seconds in samples)
            return quantiles(on_device, "device") | quantiles(on_host, "host")
    raise QueueOverflowError(f"a single call was not queued within {ASLEEP} s: more launches than the queue holds?")


def _queued(
    call: Callable[[int], object], device: torch.device, repeats: int, ahead: int
) -> tuple[list[float], list[float]] | None:
    """Seconds per call on the device and on the host; None if the device woke before all was queued."""
    fill_cache = cold_cache(device)
    events, host = [], []
    for first in range(0, repeats, ahead):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(ASLEEP * CYCLES_PER_SECOND))
        awake = torch.cuda.Event()
        awake.record()
        for step in range(first, min(first + ahead, repeats)):
            took = 0.0
            for part in parts_of(call):
                fill_cache()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                before = time.perf_counter()
                part(step)
                took += time.perf_counter() - before
                end.record()
                events.append((start, end))
            host.append(took)
        if awake.query():
            return None
    torch.cuda.synchronize(device)
    each = [start.elapsed_time(end) * 1e-3 for start, end in events]
    parts = len(parts_of(call))
    return [sum(each[first : first + parts]) for first in range(0, len(each), parts)], host


def kernel_times(call: Callable[[int], object], device: torch.device) -> dict[str, float]:
    """Mean microseconds per call of each of this package's kernels that ``call(step)`` launches, cold, by name.

    PyTorch's are left out: they fill the cache, or measure now and then what merging has cost. Empty without CUPTI.
    """
    fill_cache = cold_cache(device)
    call(0)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in range(PROFILED_CALLS):
            fill_cache()
            call(step)
        torch.cuda.synchronize(device)
    return {
        event.key: round(event.self_device_time_total / PROFILED_CALLS, 2)
        for event in profile.key_averages()
        if OWN_KERNEL.fullmatch(event.key) and event.self_device_time_total > 0
    }
