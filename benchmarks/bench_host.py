"""Host time of one ``merge_`` call with a cached plan: ``python -m benchmarks.bench_host``.

The time until the call returns, its arguments checked, every weight and module revalidated, all launches queued.
Without a GPU Triton's real launcher runs over a CUDA driver that does nothing (``tests/stub_cuda.c``, built with gcc):
all host work but the driver's own, 2 to 3 us per launch. Writes ``benchmarks/results/<device>/host.json``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import inmerge_fast
from benchmarks.command import print_row
from benchmarks.environment import environment
from benchmarks.helps import TIMED, parser_with
from benchmarks.result_files import RESULTS, ResultFile
from benchmarks.timing import quantiles
from benchmarks.work import NETS, SKIP_FIRST
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD
from inmerge_fast.paths.triton.handle import Handle

SETTINGS = {"alpha": 0.8, "prob": 0.3, "threshold": 0.3}
COLUMNS = {"target": 16, "layers": 6, "part": 18}
TIMES = ("launches_mean", "host_us", "host_q20_us", "host_q80_us")
PER_SAMPLE = 5 * DRAW_AHEAD  # calls; the clock's own cost is then below 0.01 us per call


def targets() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Models by name, each with the layers to skip: a single layer first, then whole networks as in bench_merge."""
    return {"conv": (lambda: nn.Conv2d(64, 64, 3), 0)} | {name: (build, SKIP_FIRST) for name, build in NETS.items()}


def time_host(call: Callable[[], object], samples: int, between: Callable[[], object]) -> dict[str, float]:
    """Median and quantiles of the time until ``call()`` returns; ``between`` runs untimed, before each sample."""
    times = []
    for sample in range(-3, samples):  # three to warm up
        between()
        start = time.perf_counter()
        for _ in range(PER_SAMPLE):
            call()
        taken = (time.perf_counter() - start) / PER_SAMPLE
        if sample >= 0:
            times.append(taken)
    return quantiles(times, "host")


def launches_of(call: Callable[[], object]) -> dict[str, float]:
    """Kernels that a call launches when all of them are compiled: at most, and on average."""
    launched, original = [], Handle.launch

    def launch(self: Handle, *arguments: object) -> None:
        launched[-1] += 1
        original(self, *arguments)  # type: ignore[arg-type]

    with mock.patch.object(Handle, "launch", launch):
        for _ in range(3 * DRAW_AHEAD):
            launched.append(0)
            call()
    return {"launches": max(launched), "launches_mean": sum(launched) / len(launched)}


def time_target(
    name: str, model: nn.Module, skip_first: int, samples: int, device: torch.device, file: ResultFile
) -> None:
    """The whole call by target, by plan, and as a training step; and its launches alone. Steps count on, as they do."""
    model = model.to(device)
    selection = {"skip_first": skip_first} if skip_first else {}
    plan = inmerge_fast.MergePlan(model, **selection)
    launcher = plan.paths.triton.launcher(plan.weights())
    merger = inmerge_fast.InMerge(model, seed=0, guard=None, **SETTINGS, **selection)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step = itertools.count()
    parts = {
        "merge_": lambda: inmerge_fast.merge_(model, seed=0, step=next(step), **SETTINGS, **selection),
        "merge_ with a plan": lambda: inmerge_fast.merge_(plan, seed=0, step=next(step), **SETTINGS),
        "InMerge.step": merger.step,
        "launches": lambda: launcher.run(0, next(step), dry_run=False, **SETTINGS),
    }
    about = {"target": name, "layers": len(plan.layers), "driver": "cuda" if device.type == "cuda" else "stub"}
    for part, call in parts.items():
        with file.attempt(target=name, part=part):
            times = time_host(call, samples, wait)
            row = about | {"part": part, "samples": samples} | launches_of(call) | times
            file.add(row)
            print_row(row, COLUMNS, TIMES, header=len(file.rows) == 1)


def _stub() -> Any:
    """``tests/stub.py``, which imports Triton; by its folder, or an installed package ``tests`` would hide it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    return importlib.import_module("stub")


def run_over_stub(arguments: list[str]) -> int:
    """Run this program again in a process whose CUDA driver does nothing; returns its exit status."""
    stub = _stub()
    if stub.compiler() is None:
        raise SystemExit("bench_host needs a CUDA device, or gcc to build a driver that does nothing")
    with tempfile.TemporaryDirectory() as folder:
        variables = stub.environment_over_stub(Path(folder))
        variables["INMERGE_INTERPRET"] = "1"  # the kernels' path for weights in host memory
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_host", "--stub", *arguments], env=variables, check=False
        ).returncode


def main(arguments: list[str] | None = None) -> int:
    """Time all targets and write the result file."""
    parser = parser_with(
        __doc__, f"{TIMED}; without a GPU gcc", "python -m benchmarks.bench_host --quick --out quick-results",
        "python -m benchmarks.bench_host",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=200, help=f"samples of {PER_SAMPLE} calls each")
    parser.add_argument("--quick", action="store_true", help="10 samples of three targets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)  # in the process over the stub
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.stub:
        return run_over_stub(given)
    if options.stub:
        from triton.runtime.driver import driver

        driver.set_active(_stub().StubDriver())
    # Over the stub nothing is computed, and random filters are not alike: nothing merges.
    warnings.simplefilter("ignore", inmerge_fast.NoEffectWarning)
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu else "cpu")
    chosen = targets()
    if options.quick:
        chosen = {name: chosen[name] for name in ("conv", "ResNet-18", "ConvNeXt-T")}
    samples = 10 if options.quick else options.samples
    about = environment(device)
    about["command"] = str(about["command"]).replace(" --stub", "")  # what the user typed
    file = ResultFile(options.out, "host", about, SETTINGS)
    for name, (build, skip) in chosen.items():
        with file.attempt(target=name):
            time_target(name, build(), skip, samples, device, file)
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
