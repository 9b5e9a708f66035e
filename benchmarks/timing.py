"""How time is measured, in one place: wall time with nothing in cache, providers interleaved.

*Wall time* is from the call until its work is done, synchronised on a GPU. Before each sample the caches are filled
with other memory, because in a training step a forward and a backward pass lie between two merges.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

COLD_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}  # 4 times the L3 of an EPYC's 8 cores and the L2 of an H200 (60 MB)
WARM_UP = 2  # calls before the first sample: they compile, allocate and fault pages in
CYCLES_PER_SECOND = 1.98e9  # of an H200; only how long the device is kept busy depends on it


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def cold_cache(device: torch.device) -> Callable[[], None]:
    """A function that fills the device's last cache with other memory.

    It reads: lines that were written would have to be written back later, at the expense of the call that is timed.
    """
    other = torch.ones(COLD_BYTES[device.type] // 4, device=device)
    total = torch.zeros((), device=device)

    def fill() -> None:
        torch.sum(other, 0, out=total)

    return fill


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time from ``call()`` until its work is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class InParts:
    """A call whose parts are timed one by one, each with a cold cache, and added up: others work between them."""

    def __init__(self, *parts: Callable[[int], object]) -> None:
        self.parts = parts

    def __call__(self, number: int) -> None:
        """All parts."""
        for part in self.parts:
            part(number)


def parts_of(call: Callable[[int], object]) -> Sequence[Callable[[int], object]]:
    """The parts that are timed one by one; most calls have one."""
    return call.parts if isinstance(call, InParts) else (call,)


@dataclass
class Samples:
    """Wall seconds of several calls by name and round, and by name the error of those that failed."""

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    repeats: int,
    seconds_each: float,
    before_round: Callable[[], object],
    before_call: Callable[[str], object] = lambda name: None,
) -> Samples:
    """Wall seconds of every call, one sample of each in turn, so that a slow moment of the machine hits all alike.

    Args:
        calls: what to time, by name; called with the number of the round. One that raises an exception is left out from
            there on, and its samples count for nothing.
        device: where their work is done.
        repeats: rounds.
        seconds_each: a call that would take longer than this in all rounds takes part in fewer, evenly spread, but in
            at least 5 (or ``repeats``): the published loop is a thousand times slower than the kernels.
        before_round: called untimed before each round, to restore what the calls change.
        before_call: called untimed before each call, with its name.
    """
    fill_cache = cold_cache(device)
    samples = Samples({name: {} for name in calls})

    def sample(name: str, number: int) -> float | None:
        before_call(name)
        seconds = 0.0
        try:
            for part in parts_of(calls[name]):
                fill_cache()
                seconds += wall_seconds(functools.partial(part, number), device)
            return seconds
        except Exception as error:
            samples.errors[name] = error
            return None

    rounds: dict[str, int] = {}
    for name in calls:
        before_round()
        *_, took = [sample(name, repeats + extra) for extra in range(WARM_UP)]
        if took is not None:
            rounds[name] = min(repeats, max(5, int(seconds_each / took)))
    for repeat in range(repeats):
        before_round()
        for name, count in rounds.items():
            if name not in samples.errors and repeat * count % repeats < count:
                taken = sample(name, repeat)
                if taken is not None:
                    samples.seconds[name][repeat] = taken
    for name in samples.errors:
        del samples.seconds[name]
    return samples


def means_of(seconds: Iterable[float], count: int) -> list[float]:
    """Means of ``count`` samples in a row each, for calls of which one in so many does what the others find done."""
    values = np.fromiter(seconds, float)
    whole = len(values) // count
    return np.mean(values[: whole * count].reshape(whole, count), axis=1).tolist() if whole else [float(values.mean())]


def quantiles(seconds: Iterable[float], name: str) -> dict[str, float]:
    """Median and 20 / 80 % quantiles in microseconds, as ``name_us``, ``name_q20_us`` and ``name_q80_us``."""
    low, middle, high = np.quantile(np.fromiter(seconds, float) * 1e6, [0.2, 0.5, 0.8])
    return {f"{name}_us": round(middle, 2), f"{name}_q20_us": round(low, 2), f"{name}_q80_us": round(high, 2)}
