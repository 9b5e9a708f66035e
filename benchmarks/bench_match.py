"""Time of finding the nearest partner of every sampled filter: ``python -m benchmarks.bench_match``.

The layers after the tenth convolution, at prob 0.3 (a call of ``merge_``) and 1 (every filter). ``eager`` normalises,
multiplies and takes the argmax, layer by layer, ``compile`` is torch.compile of that; both look at all filters, since
to look at some they would have to wait for the device. ``gemm`` is the matrix product alone, in TF32 on a GPU and
float32 on a CPU: what the arithmetic of all pairs costs at this machine's best. ``match`` is this package's search, and
``merge_`` the whole call with ``partner="nearest"``. Wall time from call to done with nothing in cache, all providers
interleaved; on a GPU also the device time. Each provider's partners are first checked against float64; one that is
wrong or fails is recorded with its error, and the rest are timed.

Two floors: the bytes of the weights at the bandwidth of a copy, and 2 N D flops for every sampled filter, three times
over for float32 on a GPU (tf32x3), at the best rate of a large square matrix product. Writes
``benchmarks/results/<device>/match.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

import inmerge_fast
from benchmarks import searches
from benchmarks.ceilings import copy_bandwidth, gemm_rate
from benchmarks.command import for_each_net, open_file, parser_of, print_row
from benchmarks.device_time import device_times, kernel_times
from benchmarks.result_files import ResultFile
from benchmarks.timing import quantiles, time_interleaved
from benchmarks.work import DTYPES, NETS, SEED, net_of

PROBS = (0.3, 1.0)
LARGE = ("VGG19", "ResNet-18", "ResNet-50")
COLUMNS = {"net": 16, "dtype": 9, "prob": 5, "provider": 9}
TIMES = ("wall_us", "wall_q20_us", "wall_q80_us", "floor_bytes_us", "floor_flops_us", "device_us", "host_us")


def floors(plan: inmerge_fast.MergePlan, prob: float, rate: float) -> dict[str, float]:
    """Both floors, in microseconds, and what they are made of."""
    weights = sum(weight.numel() * weight.element_size() for weight in plan.weights())
    flops = sum(2 * layer.layout.filters**2 * layer.layout.elements for layer in plan.layers)
    products = 3 if plan.device.type == "cuda" and plan.layers[0].dtype == torch.float32 else 1
    return {
        "flops": flops,
        "floor_bytes_us": round(weights / copy_bandwidth(plan.device) * 1e6, 3),
        "floor_flops_us": round(prob * products * flops / rate * 1e6, 3),
    }


def time_net(name: str, dtype: str, options: argparse.Namespace, file: ResultFile) -> None:
    """All rows of one network in one dtype."""
    _model, plan = net_of(name, dtype, options.device)  # the plan keeps no network alive
    ways = {"eager": searches.eager, "match": searches.found_by_match}
    if name in options.compile_nets:
        ways["compile"] = searches.compiled
    sound: dict[str, searches.Search] = {}
    for provider, way in ways.items():
        with file.attempt(net=name, dtype=dtype, provider=provider):
            search = way(plan)
            searches.check(plan, provider, search)
            sound[provider] = search
    for prob in PROBS:
        calls: dict[str, Callable[[int], object]] = {
            key: lambda _, search=search: search() for key, search in sound.items() if key != "match"
        }
        products = searches.gemm(plan)
        calls["gemm"] = lambda _, products=products: products()
        if "match" in sound:
            calls["match"] = searches.match(plan, prob)
        arguments = {"partner": "nearest", "threshold": 1.0, "prob": prob, "seed": SEED}  # nothing is written
        calls["merge_"] = lambda step, arguments=arguments: inmerge_fast.merge_(plan, step=step, **arguments)
        time_prob(plan, calls, {"net": name, "dtype": dtype, "prob": prob}, options, file)


def time_prob(
    plan: inmerge_fast.MergePlan,
    calls: dict[str, Callable[[int], object]],
    about: dict[str, object],
    options: argparse.Namespace,
    file: ResultFile,
) -> None:
    """The rows of all providers at one prob."""
    device, rate = options.device, gemm_rate(options.device)
    samples = time_interleaved(
        calls, device, repeats=options.repeats, seconds_each=options.seconds, before_round=lambda: None
    )
    for provider, error in samples.errors.items():
        file.fail(error, **about, provider=provider)
    for provider, seconds in samples.seconds.items():
        row = {**about, "provider": provider, "layers": len(plan.layers), "path": plan.path, "samples": len(seconds)}
        row |= quantiles(seconds.values(), "wall") | floors(plan, about["prob"], rate)
        file.add(row)
        if device.type == "cuda":
            with file.attempt(**about, provider=provider, what="device time"):
                file.extend(row, device_times(calls[provider], device, options.repeats))
        if device.type == "cuda" and provider in ("match", "merge_"):
            with file.attempt(**about, provider=provider, what="time of each kernel"):
                file.extend(row, {"kernels_us": kernel_times(calls[provider], device)})
        print_row(row, COLUMNS, TIMES, header=len(file.rows) == 1)


def main(arguments: list[str] | None = None) -> int:
    """Time all networks and write the result file."""
    parser = parser_of(__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(LARGE), metavar="NET")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    parser.add_argument("--compile-nets", nargs="*", choices=NETS, default=list(LARGE),
                        metavar="NET", help="networks that torch.compile is timed with")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.nets, options.repeats, options.seconds, options.compile_nets = ["ConvNeXt-T"], 3, 0.1, []
    file = open_file(options, "match", {"probs": PROBS})
    for_each_net(options, file, time_net)
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
