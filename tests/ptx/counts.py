"""What the project's kernels execute and move per row, counted from their PTX: ``python -m tests.ptx counts``.

Whatever a GPU makes of them, it must do that much. The CTAs take turns, so the same code always gives the same counts.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton

from .cases import BFLOAT16, FLOAT32, alike
from .launch import on_ptx
from .machine import Schedule
from .profile import Profile
from .project import RESULTS, launcher_of

RECORD = RESULTS / "ptx-counts.json"
FILTERS, PROB, ALPHA, PROGRAMS = 128, 0.3, 0.75, 64
# By name: elements per filter, dtype, and the threshold; -1 lets every pair pass, 1 none.
MERGES: dict[str, tuple[int, torch.dtype, float]] = {
    "float32 x 64": (64, FLOAT32, -1.0), "float32 x 576": (576, FLOAT32, -1.0), "float32 x 4608": (4608, FLOAT32, -1.0),
    "float32 x 4608, none passes": (4608, FLOAT32, 1.0), "bfloat16 x 4608": (4608, BFLOAT16, -1.0),
    "float32 x 147, unaligned": (147, FLOAT32, -1.0),
}  # fmt: skip
# The same, for one tile of the partner rules.
MATCHES: dict[str, tuple[int, torch.dtype, str]] = {
    "float32 x 576, nearest": (576, FLOAT32, "nearest"), "bfloat16 x 576, similar": (576, BFLOAT16, "similar"),
}  # fmt: skip
ARCHS = {"sm_80": (*MERGES, *MATCHES), "sm_90": (*MERGES, *MATCHES), "sm_100": tuple(MERGES)}


def versions() -> dict[str, Any]:
    """What has been recorded, by version of Triton, GPU and case."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def record() -> None:
    """Count everything and keep it for the installed Triton."""
    found = {arch: {name: count(arch, name) for name in names} for arch, names in ARCHS.items()}
    RECORD.write_text(json.dumps(versions() | {triton.__version__: found}, indent=1, sort_keys=True) + "\n")


def risen(arch: str, name: str) -> list[str]:
    """The counts that are above what was recorded for the installed Triton.

    Raises:
        KeyError: nothing was.
    """
    known, now = versions()[triton.__version__][arch][name], count(arch, name)
    return [
        f"{kernel}: {what} {known.get(kernel, {}).get(what)} -> {value}"
        for kernel, values in now.items()
        for what, value in values.items()
        if value > known.get(kernel, {}).get(what, -1)
    ]


def describe(profile: Profile, rows: int) -> dict[str, Any]:
    """The counts of one launch, per row where that makes sense."""

    def per_row(count: int) -> float:
        return round(count / rows, 2)

    ops = profile.instructions()
    loads, stores = profile.memory("ld.global", "cp.async"), profile.memory("st.global")
    shared = profile.memory("ld.shared", "st.shared", "ldmatrix", "stmatrix")
    return {
        "instructions": per_row(sum(ops.values()) - ops["mov"]),  # the assembler drops nearly all moves
        "products": per_row(ops["mma"] + profile.products()),
        "barriers": per_row(profile.barriers()),
        "atomics": per_row(profile.memory("atom.global", "red.global").lanes),
        "chain_of_loads": profile.chain,
        "load_requests": per_row(loads.requests),
        "load_sectors": per_row(loads.parts),
        "sectors_per_load": round(loads.parts / max(1, loads.requests), 2),
        "store_requests": per_row(stores.requests),
        "store_sectors": per_row(stores.parts),
        "sectors_per_store": round(stores.parts / max(1, stores.requests), 2),
        "shared_requests": per_row(shared.requests),
        "passes_per_shared_request": round(shared.parts / max(1, shared.requests), 2),
    }


def count(arch: str, name: str) -> dict[str, dict[str, Any]]:
    """The counts of every launch of a call, by kernel; per active row in the merge, per filter elsewhere."""
    elements, dtype, *_ = case = (MERGES | MATCHES)[name]
    rule, threshold = (case[2], -1.0) if name in MATCHES else ("random", case[2])
    launcher, weights = launcher_of([alike(FILTERS, elements, dtype, 0)])
    schedule = Schedule(1, "turns", races=False)
    with on_ptx(arch, schedule, keep_profiles=True) as device:
        device.watch(launcher, weights)
        call = {"prob": PROB, "alpha": ALPHA, "threshold": threshold, "dry_run": False, "partner": rule}
        result = launcher.run(3, 5, programs=PROGRAMS, **call)
    active = int(result.fetch().counts.sum())
    found: dict[str, dict[str, Any]] = {"rows": {"filters": FILTERS, "active": active}}
    for kernel, profile in device.profiles:
        kernel = kernel.strip("_").removesuffix("_kernel")
        while kernel in found:  # a launch for each kind of layers
            kernel += "'"
        found[kernel] = describe(profile, active if kernel == "merge" else FILTERS)
    return found
