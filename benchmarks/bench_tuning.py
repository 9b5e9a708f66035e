"""Device time of the merge launches under other choices of the merge kernel: ``python -m benchmarks.bench_tuning``.

Programs per multiprocessor, elements per step of the loop, and warps per program, on networks of long, mixed and short
filters where all pairs pass. Never on live weights: every trial merges again. Writes
``benchmarks/results/<device>/tuning.json``; what wins goes into ``inmerge_fast/paths/triton/`` by hand, with a note.
"""

from __future__ import annotations

import itertools
import sys

import torch

import inmerge_fast
from benchmarks.bench_merge import parser_of
from benchmarks.device_time import device_times
from benchmarks.timing import copy_bandwidth, environment, write_results
from benchmarks.work import NETS, REGIMES, SEED, SKIP_FIRST, Settings, mean_bytes

CHOSEN = ("VGG19", "ResNet-50", "DenseNet-121")
PROGRAMS_PER_SM = (2, 4, 6, 8, 12)
BLOCKS = (512, 1024, 2048)
WARPS = (4, 8)


def rows_of(name: str, device: torch.device, repeats: int) -> list[dict[str, object]]:
    """The device time of every combination for one network, float32."""
    with torch.device(device):
        model = NETS[name]()
    plan = inmerge_fast.MergePlan(model, skip_first=SKIP_FIRST)
    launcher = plan.paths.triton.launcher(plan.weights())
    settings = Settings(REGIMES["all pass"])
    numbers = {"prob": settings.prob, "alpha": settings.alpha, "threshold": settings.threshold, "dry_run": False}
    floor = mean_bytes(plan, range(repeats), settings) / copy_bandwidth(device) * 1e6
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    rows = []
    for per_sm, block, warps in itertools.product(PROGRAMS_PER_SM, BLOCKS, WARPS):
        choice = {"programs": min(multiprocessors * per_sm, launcher.rows), "BLOCK": block, "num_warps": warps}
        times = device_times(lambda step, choice=choice: launcher.run(SEED, step, **numbers, **choice), device, repeats)
        rows.append({"net": name, "programs_per_sm": per_sm, "block": block, "warps": warps,
                     "floor_us": round(floor, 2)} | times.row())  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Time all choices and write the result file."""
    parser = parser_of(__doc__ or "")
    parser.set_defaults(repeats=20)
    options = parser.parse_args(arguments)
    if options.device.type != "cuda":
        print("bench_tuning needs a CUDA device: nothing was measured")
        return 0
    rows = [row for name in CHOSEN for row in rows_of(name, options.device, options.repeats)]
    print(f"{'net':14} {'programs/SM':>11} {'block':>6} {'warps':>6} {'device us':>10} {'floor us':>9}")
    for row in sorted(rows, key=lambda row: (row["net"], row["device_us"])):
        print(f"{row['net']:14} {row['programs_per_sm']:11d} {row['block']:6d} {row['warps']:6d} "
              f"{row['device_us']:10.1f} {row['floor_us']:9.1f}")  # fmt: skip
    print("written to", write_results(options.out, "tuning", environment(options.device), {}, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
