"""What a result file says of the machine and the versions of its run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.ceilings import copy_bandwidth
from benchmarks.result_files import ROOT
from benchmarks.timing import CYCLES_PER_SECOND, synchronize


def environment(device: torch.device) -> dict[str, object]:
    """Everything a reader needs to judge the figures of this run."""
    about: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: whether others held the cores
        "copy_bandwidth_gb_s": round(copy_bandwidth(device) / 1e9, 1),
    }
    if device.type == "cuda":
        about |= {"cuda": str(torch.version.cuda)} | _driver_and_clocks(device)
    return about


def processor() -> str:
    """Name of the CPU."""
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
    """Short hash, with "+changes" where the code that is measured or measures differs from it.

    Of a copy of the checkout, which may have no history or an older one, the variable ``INMERGE_COMMIT`` says it.
    """
    if said := os.environ.get("INMERGE_COMMIT"):
        return said
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
