"""Time of finding the nearest partner of every sampled filter: ``python -m benchmarks.bench_match``.

The layers after the tenth convolution, at prob 0.3 (a call of ``merge_``) and 1 (every filter). ``eager`` normalises,
multiplies and takes the argmax, layer by layer, ``compile`` is torch.compile of that; both look at all filters, since
to look at some they would have to wait for the device. ``gemm`` is the matrix product alone, in TF32 on a GPU and
float32 on a CPU: what the arithmetic of all pairs costs at this machine's best. ``match`` is this package's search, and
``merge_`` the whole call with ``partner="nearest"``. Wall time from call to done with nothing in cache, all providers
interleaved; on a GPU also the device time. Each provider's partners are first checked against float64.

Two floors: the bytes of the weights at the bandwidth of a copy, and 2 N D flops for every sampled filter, three times
over for float32 on a GPU (tf32x3), at the best rate of a large square matrix product. Writes
``benchmarks/results/<device>/match.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn import functional as F

import inmerge_fast
from benchmarks import providers
from benchmarks.bench_merge import parser_of, time_nets
from benchmarks.device_time import device_times, kernel_times
from benchmarks.timing import copy_bandwidth, environment, quantiles, time_interleaved, wall_seconds, write_results
from benchmarks.work import DTYPES, NETS, SEED, SKIP_FIRST
from inmerge_fast.paths.match import match_layer
from inmerge_fast.paths.pairs import filters_of

PROBS = (0.3, 1.0)
GEMM_SIZE = {"cpu": 1024, "cuda": 4096}
# Two similarities this close are the same to a provider: float32 sums in any order, and one TF32 product.
CLOSE = {"eager": 1e-5, "compile": 1e-5, "match": 1e-5}
Search = Callable[[], list[torch.Tensor]]  # the nearest other filter of every filter, by layer


@contextlib.contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _nearest(rows: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(rows.float(), dim=1, eps=providers.MIN_NORM)
    return torch.mm(unit, unit.T).fill_diagonal_(-2.0).argmax(1)


def eager(plan: inmerge_fast.MergePlan) -> Search:
    """Matrix product and argmax, layer by layer."""
    rows = providers.rows_of(plan)
    return lambda: [_nearest(row) for row in rows]


def compiled(plan: inmerge_fast.MergePlan) -> Search:
    """torch.compile of :func:`eager`'s layer."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    rows, nearest = providers.rows_of(plan), torch.compile(_nearest, fullgraph=True)
    return lambda: [nearest(row) for row in rows]


def gemm(plan: inmerge_fast.MergePlan) -> Callable[[], object]:
    """The matrix products of all layers alone."""
    rows = [row.float() if row.device.type == "cpu" else row for row in providers.rows_of(plan)]

    def call() -> None:
        with _tf32(True):
            for row in rows:
                torch.mm(row, row.T)

    return call


def match(plan: inmerge_fast.MergePlan, prob: float) -> Callable[[int], object]:
    """Draw and search of this package, without the merge; takes the step."""
    if plan.path == "triton":
        launcher = plan.paths.triton.launcher(plan.weights())
        return lambda step: launcher.find_partners(SEED, step, prob=prob, partner="nearest", threshold=0.0)

    def call(step: int) -> list[torch.Tensor]:
        coin, _ = plan.draw(SEED, step, prob)
        found = []
        for layer, weight, first, end in zip(
            plan.layers, plan.weights(), plan.rows.start, plan.rows.start[1:], strict=False
        ):
            sampled = coin[first:end].nonzero()[0]
            partners = match_layer(
                weight, layer.layout, sampled, "nearest", threshold=0.0, seed=SEED, step=step, layer=layer.layer_id
            )
            found.append(torch.from_numpy(partners))
        return found

    return call


def check(plan: inmerge_fast.MergePlan, searches: Mapping[str, Search]) -> None:
    """Raise unless every search finds filters as similar as the nearest one in float64.

    Raises:
        AssertionError: it does not.
    """
    for name, search in searches.items():
        for layer, weight, found in zip(plan.layers, plan.weights(), search(), strict=True):
            (units,) = filters_of(weight, layer.layout, exact=True).units()
            similarity = (units @ units.T).fill_diagonal_(-2.0)
            own = similarity.gather(1, found[:, None].to(similarity.device).long())[:, 0]
            off = (similarity.amax(1) - own).max().item()
            assert off <= CLOSE[name], f"{name}, layer {layer.name}: off by {off:.1e}"


def found_by_match(plan: inmerge_fast.MergePlan) -> Search:
    """What :func:`match` finds for every filter."""
    call = match(plan, 1.0)

    def search() -> list[torch.Tensor]:
        found = call(0)
        if isinstance(found, list):
            return found
        rows = plan.paths.triton.launcher(plan.weights()).found_partners()
        return [rows[a:b] - a for a, b in zip(plan.rows.start[:-1].tolist(), plan.rows.start[1:].tolist(), strict=True)]

    return search


@functools.cache
def gemm_rate(device: torch.device) -> float:
    """Flops per second of a large square matrix product: TF32 on a GPU, float32 on a CPU; the best of 40."""
    size = GEMM_SIZE[device.type]
    square = torch.randn(size, size, device=device)
    with _tf32(True):
        return 2 * size**3 / min(wall_seconds(lambda: torch.mm(square, square), device) for _ in range(40))


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


def time_net(name: str, dtype: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, object]]:
    """All rows of one network in one dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        model = NETS[name]()
    plan = inmerge_fast.MergePlan(model.to(DTYPES[dtype]), skip_first=SKIP_FIRST)
    searches: dict[str, Search] = {"eager": eager(plan), "match": found_by_match(plan)}
    if not providers.why_not_compile(device) and name in options.compile_nets:
        searches["compile"] = compiled(plan)
    check(plan, searches)
    rate = gemm_rate(device)
    rows: list[dict[str, object]] = []
    for prob in PROBS:
        calls: dict[str, Callable[[int], object]] = {
            key: lambda _, search=search: search() for key, search in searches.items() if key != "match"
        }
        products = gemm(plan)
        calls["gemm"] = lambda _, products=products: products()
        calls["match"] = match(plan, prob)
        arguments = {"partner": "nearest", "threshold": 1.0, "prob": prob, "seed": SEED}  # nothing is written
        calls["merge_"] = lambda step, arguments=arguments: inmerge_fast.merge_(plan, step=step, **arguments)
        samples = time_interleaved(
            calls, device, repeats=options.repeats, seconds_each=options.seconds, before_round=lambda: None
        )
        for provider, call in calls.items():
            row: dict[str, object] = {
                "net": name, "dtype": dtype, "prob": prob, "provider": provider, "layers": len(plan.layers),
                "path": plan.path, "samples": len(samples[provider]),
            }  # fmt: skip
            row |= quantiles(samples[provider].values(), "wall") | floors(plan, prob, rate)
            if device.type == "cuda":
                row |= device_times(call, device, options.repeats).row()
                row["kernels_us"] = kernel_times(call, device) if provider in ("match", "merge_") else {}
            rows.append(row)
    return rows


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """A table for the terminal."""
    wide = ("net", 16), ("dtype", 9), ("prob", 5), ("provider", 9)
    times = ("wall_us", "wall_q20_us", "wall_q80_us", "floor_bytes_us", "floor_flops_us", "device_us", "host_us")
    print(" ".join(f"{name:{width}}" for name, width in wide), " ".join(f"{name:>14}" for name in times))
    for row in rows:
        numbers = (f"{row[name]:14.1f}" if name in row else f"{'-':>14}" for name in times)
        print(" ".join(f"{row[name]!s:{width}}" for name, width in wide), " ".join(numbers))


def main(arguments: list[str] | None = None) -> int:
    """Time all networks and write the result file."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["VGG19", "ResNet-18", "ResNet-50"], metavar="NET")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    parser.add_argument("--compile-nets", nargs="*", choices=NETS, default=["VGG19", "ResNet-18", "ResNet-50"],
                        metavar="NET", help="networks that torch.compile is timed with")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.nets, options.repeats, options.seconds, options.compile_nets = ["DenseNet-121"], 3, 0.1, []
    rows = time_nets(options, time_net, print_rows)
    about = environment(options.device)
    print("written to", write_results(options.out, "match", about, {"probs": PROBS}, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
