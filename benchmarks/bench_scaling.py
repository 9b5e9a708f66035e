"""Time of ``merge_`` as the work grows in one direction, and of single layers: ``python -m benchmarks.bench_scaling``.

Number of filters, elements per filter, number of layers, probability of the coin; measured like ``bench_merge``. Writes
``benchmarks/results/<device>/scaling.json``.
"""

from __future__ import annotations

import argparse
import sys

import torch

import inmerge_fast
from benchmarks import providers
from benchmarks.bench_merge import time_plan
from benchmarks.command import open_file, parser_of
from benchmarks.result_files import ResultFile
from benchmarks.work import REGIMES, Layers, Settings, scaling_series


def time_point(point: Layers, options: argparse.Namespace, file: ResultFile) -> None:
    """``merge_`` and the eager form that touches the same rows, at one point of a series, in both regimes."""
    torch.manual_seed(0)
    weights = point.weights(options.device)
    plan = inmerge_fast.MergePlan(weights)
    about = {
        "series": point.series, "value": point.value, "dtype": point.dtype, "layers": point.layers,
        "filters": point.filters, "elements": point.elements, "prob": point.prob, "path": plan.path,
    }  # fmt: skip
    for regime, threshold in REGIMES.items():
        settings = Settings(threshold, point.prob)
        time_plan(plan, [providers.SAMPLED, providers.MERGE], settings, about | {"regime": regime}, options, file)


def main(arguments: list[str] | None = None) -> int:
    """Time all points and write the result file."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=20, seconds=0.5)
    options = parser.parse_args(arguments)
    points = scaling_series()
    if options.quick:
        points, options.repeats, options.seconds = points[:2], 5, 0.1
    file = open_file(options, "scaling", {"alpha": 0.8})
    for point in points:
        with file.attempt(series=point.series, value=point.value, dtype=point.dtype):
            time_point(point, options, file)
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
