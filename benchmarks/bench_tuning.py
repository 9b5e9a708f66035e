"""Device time of the merge launches under other choices of the merge kernel: ``python -m benchmarks.bench_tuning``.

Programs per multiprocessor, elements per step of the loop, and warps per program, on networks of long, mixed and short
filters where all pairs pass. Never on live weights: every trial merges again. Writes
``benchmarks/results/<device>/tuning.json``; what wins goes into ``inmerge_fast/paths/triton/`` by hand, with a note.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from benchmarks.command import open_file, parser_of, print_row
from benchmarks.device_time import device_times
from benchmarks.result_files import ResultFile
from benchmarks.timing import copy_bandwidth
from benchmarks.work import REGIMES, SEED, Settings, mean_bytes, net_of

CHOSEN = ("VGG19", "ResNet-50", "DenseNet-121")
PROGRAMS_PER_SM = (2, 4, 6, 8, 12)
BLOCKS = (512, 1024, 2048)
WARPS = (4, 8)
COLUMNS = {"net": 14, "programs_per_sm": 15, "block": 6, "warps": 6}


def time_net(name: str, options: argparse.Namespace, file: ResultFile) -> None:
    """The device time of every combination for one network, float32."""
    device, repeats = options.device, options.repeats
    _model, plan = net_of(name, "float32", device)
    launcher = plan.paths.triton.launcher(plan.weights())
    settings = Settings(REGIMES["all pass"])
    numbers = {"prob": settings.prob, "alpha": settings.alpha, "threshold": settings.threshold, "dry_run": False}
    floor = mean_bytes(plan, range(repeats), settings) / copy_bandwidth(device) * 1e6
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    for per_sm, block, warps in itertools.product(PROGRAMS_PER_SM, BLOCKS, WARPS):
        choice = {"programs": min(multiprocessors * per_sm, launcher.rows), "BLOCK": block, "num_warps": warps}
        row = {"net": name, "programs_per_sm": per_sm, "block": block, "warps": warps, "floor_us": round(floor, 2)}
        with file.attempt(**row):
            row |= device_times(
                lambda step, choice=choice: launcher.run(SEED, step, **numbers, **choice), device, repeats
            )
            file.add(row)


def main(arguments: list[str] | None = None) -> int:
    """Time all choices and write the result file."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=20)
    options = parser.parse_args(arguments)
    if options.device.type != "cuda":
        print("bench_tuning needs a CUDA device: nothing was measured")
        return 0
    file = open_file(options, "tuning", {})
    for name in CHOSEN:
        with file.attempt(net=name):
            time_net(name, options, file)
    for row in sorted(file.rows, key=lambda row: (row["net"], row["device_us"])):
        print_row(row, COLUMNS, ("device_us", "floor_us"), header=row is file.rows[0])
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
