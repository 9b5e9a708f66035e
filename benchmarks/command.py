"""What the benchmarks of this folder have in common on their command lines, and the loop over networks."""

from __future__ import annotations

import argparse
import gc
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.helps import TIMED, parser_with
from benchmarks.result_files import RESULTS, ResultFile


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    module = re.search(r"python -m (benchmarks\.\w+)", description or "")
    name = module[1] if module else "benchmarks"
    parser = parser_with(description, TIMED, f"python -m {name} --quick --out quick-results", f"python -m {name}")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to merge (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--repeats", type=int, default=40, help="samples of each provider, which is a way of merging (default: 40)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="slow providers get fewer samples, to take so long (default: 3)"
    )
    parser.add_argument("--quick", action="store_true", help="few samples of little work, to see that all of it runs")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="where results go (default: benchmarks/results)"
    )
    return parser


def open_file(options: argparse.Namespace, name: str, settings: Mapping[str, object]) -> ResultFile:
    """The result file of a run with these options."""
    torch.set_num_threads(options.threads)
    # What is timed again repeats its draws on purpose.
    warnings.filterwarnings("ignore", "step goes back", UserWarning)
    return ResultFile(options.out, name, environment(options.device), settings)


def for_each_net(
    options: argparse.Namespace,
    file: ResultFile,
    time_net: Callable[[str, str, argparse.Namespace, ResultFile], None],
) -> None:
    """Time all networks that the command line names, dtype by dtype; one that fails is recorded."""
    for dtype in options.dtypes:
        for name in options.nets:
            with file.attempt(net=name, dtype=dtype):
                time_net(name, dtype, options, file)
            gc.collect()


def print_row(row: Mapping[str, object], columns: Mapping[str, int], times: Sequence[str], *, header: bool) -> None:
    """A line for the terminal, under its header: what was timed, then microseconds."""
    if header:
        print(" ".join(f"{name:{width}}" for name, width in columns.items()), *(f"{name:>14}" for name in times))
    numbers = (f"{row[name]:14,.3f}" if name in row else f"{'-':>14}" for name in times)
    print(" ".join(f"{row[name]!s:{width}}" for name, width in columns.items()), *numbers, flush=True)
