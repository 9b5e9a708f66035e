"""How time is measured, in one place: wall time with nothing in cache, copy bandwidth, and what a result file says.

*Wall time* is from the call until its work is done, synchronised on a GPU. Before each sample the caches are filled
with other memory, because in a training step a forward and a backward pass lie between two merges.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
COLD_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}  # 4 times the L3 of an EPYC's 8 cores and the L2 of an H200 (60 MB)
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
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


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second by ``copy_`` of much more than the caches hold; the best of 10."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = [wall_seconds(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.numel() / min(seconds[2:])


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time from ``call()`` until its work is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    repeats: int,
    seconds_each: float,
    before_round: Callable[[], object],
) -> dict[str, dict[int, float]]:
    """Wall seconds of every call, one sample of each in turn, so that a slow moment of the machine hits all alike.

    Args:
        calls: what to time, by name; called with the number of the round.
        device: where their work is done.
        repeats: rounds.
        seconds_each: a call that would take longer than this in all rounds takes part in fewer, evenly spread, but in
            at least 5 (or ``repeats``): the published loop is a thousand times slower than the kernels.
        before_round: called untimed before each round, to restore what the calls change.

    Returns:
        For every name its samples by round.
    """
    fill_cache = cold_cache(device)
    rounds: dict[str, int] = {}
    for name, call in calls.items():
        before_round()
        took = [wall_seconds(functools.partial(call, repeats + i), device) for i in range(WARM_UP)]
        rounds[name] = min(repeats, max(5, int(seconds_each / took[-1])))
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    for repeat in range(repeats):
        before_round()
        for name, call in calls.items():
            if repeat * rounds[name] % repeats < rounds[name]:
                fill_cache()
                samples[name][repeat] = wall_seconds(functools.partial(call, repeat), device)
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


def environment(device: torch.device) -> dict[str, object]:
    """Everything a reader needs to judge the figures of this run."""
    about: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "copy_bandwidth_gb_s": round(copy_bandwidth(device) / 1e9, 1),
    }
    if device.type == "cuda":
        about |= {"cuda": str(torch.version.cuda)} | _driver_and_clocks(device)
    return about


def write_results(
    root: Path, bench: str, about: Mapping[str, object], settings: Mapping[str, object], rows: Sequence[object]
) -> Path:
    """Write ``<root>/<device>/<bench>.json`` whole, or leave what is there untouched; returns its path."""
    device = str(about["device"]).replace("(R)", "").replace("(TM)", "").replace("/", " ")
    path = root / "-".join(device.split()) / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": about, "settings": settings, "rows": rows}, indent=1, allow_nan=False)
    beside = path.with_suffix(".json.new")
    beside.write_text(text + "\n")
    os.replace(beside, path)  # atomic: a run that is killed leaves no half a file
    return path


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Short hash, with "+changes" where the code that is measured or measures differs from it."""
    commit = _output_of("git", "rev-parse", "--short", "HEAD")
    changed = _output_of("git", "status", "--porcelain", "--", "inmerge_fast", "kernels", "benchmarks/*.py")
    return (commit + ("+changes" if changed else "")) if commit else "unknown"


def _driver_and_clocks(device: torch.device) -> dict[str, str]:
    """Driver version, and the clocks while the device is busy: idle ones would say nothing about the figures."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    torch.cuda._sleep(int(2 * CYCLES_PER_SECOND))
    line = _output_of(
        "nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", f"--query-gpu={query}",
        "--format=csv,noheader,nounits",
    )  # fmt: skip
    synchronize(device)
    found = [part.strip() for part in line.split(",")]
    if len(found) != 5:
        return {"driver": "unknown", "clocks": "unknown"}
    driver, sm, max_sm, memory, max_memory = found
    return {"driver": driver, "clocks": f"SM {sm} of {max_sm} MHz, memory {memory} of {max_memory} MHz"}


def _output_of(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
