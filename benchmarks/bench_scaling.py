"""Time of ``merge_`` as the work grows in one direction, and of single layers: ``python -m benchmarks.bench_scaling``.

Number of filters, elements per filter, number of layers, probability of the coin; measured like ``bench_merge``. Writes
``benchmarks/results/<device>/scaling.json``.
"""

from __future__ import annotations

import sys

import torch

import inmerge_fast
from benchmarks import providers
from benchmarks.bench_merge import parser_of, time_plan
from benchmarks.timing import environment, write_results
from benchmarks.work import REGIMES, Layers, Settings, scaling_series


def rows_of(point: Layers, device: torch.device, repeats: int, seconds: float) -> list[dict[str, object]]:
    """``merge_`` and the eager form that touches the same rows, at one point of a series, in both regimes."""
    torch.manual_seed(0)
    weights = point.weights(device)
    plan = inmerge_fast.MergePlan(weights)
    chosen = {provider.name: provider for provider in (providers.SAMPLED, providers.MERGE)}
    about = {
        "series": point.series, "value": point.value, "dtype": point.dtype, "layers": point.layers,
        "filters": point.filters, "elements": point.elements, "prob": point.prob, "path": plan.path,
    }  # fmt: skip
    rows = []
    for regime, threshold in REGIMES.items():
        settings = Settings(threshold, point.prob)
        rows += time_plan(plan, chosen, settings, about | {"regime": regime}, repeats, seconds)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Time all points and write the result file."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=20, seconds=0.5)
    options = parser.parse_args(arguments)
    points = scaling_series()
    if options.quick:
        points, options.repeats, options.seconds = points[:2], 5, 0.1
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'series':13} {'value':>10} {'dtype':9} {'regime':11} {'provider':14} {'wall us':>10} {'floor us':>9}")
    for point in points:
        for row in rows_of(point, options.device, options.repeats, options.seconds):
            print(f"{row['series']:13} {row['value']:10g} {row['dtype']:9} {row['regime']:11} {row['provider']:14} "
                  f"{row['wall_us']:10.1f} {row['floor_us']:9.1f}")  # fmt: skip
            rows.append(row)
    about = environment(options.device)
    print("written to", write_results(options.out, "scaling", about, {"alpha": 0.8}, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
