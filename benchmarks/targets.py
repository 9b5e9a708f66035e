"""What this project aims at, in numbers, each with where its figure stands in the result files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.result_files import Results, by_device, joined

LARGE = ("VGG19", "ResNet-50", "3D ResNet-18")  # as large as the memory's bandwidth counts
SMALL = ("DenseNet-121", "EfficientNet-B0")
WIDE = ("VGG19", "ResNet-18", "3D ResNet-18")  # filters so long that on a CPU, too, bytes are all that counts
SHORT = ("DenseNet-121", "EfficientNet-B0", "ConvNeXt-T")
DEEP_LAYERS = 40
NOT_MEASURED, NOT_ON_A_CPU = "not yet measured on a GPU", "not yet measured"
TWO_THREADS = 1.5  # times as fast as one
AT_BANDWIDTH = 1.1  # times the floor: two threads that are no slower have nothing left to gain
HOST_MACHINE = "AMD"  # where the bounds of host times over the stub hold; another processor may take twice as long


@dataclass(frozen=True)
class Target:
    """An aim and what was measured, None where nothing was.

    Attributes:
        what: the figure.
        bound: what it is to keep.
        measured: the worst one.
        unit: of both.
        at_most: whether the bound is the largest figure allowed, or the smallest.
        where: on which machine, and how, if that matters.
        binding: whether the bound is for that machine; elsewhere the figure is reported and nothing more.
        excused: whether it is reached all the same, as ``where`` says.
        unmeasured: what to say where nothing was measured.
    """

    what: str
    bound: float
    measured: float | None
    unit: str = ""
    at_most: bool = True
    where: str = ""
    binding: bool = True
    excused: bool = False
    unmeasured: str = NOT_MEASURED

    @property
    def reached(self) -> bool:
        """Whether the measured figure keeps the bound."""
        assert self.measured is not None
        return self.excused or (self.measured <= self.bound if self.at_most else self.measured >= self.bound)

    @property
    def outcome(self) -> str:
        """One word for it."""
        if self.measured is None:
            return "open"
        return ("reached" if self.reached else "**missed**") if self.binding else "reported"


def _worst(values: Iterable[float | None], *, at_most: bool = True) -> float | None:
    known = [value for value in values if value is not None]
    return (max(known) if at_most else min(known)) if known else None


def _of(found: Sequence[Results], bench: str, *, on_gpu: bool) -> list[Results]:
    """A benchmark's results, of one device each, all passes together."""
    return [
        joined(here[bench])
        for here in by_device(found).values()
        if bench in here and here[bench][0].on_gpu == on_gpu
    ]  # fmt: skip


def _over_floor(
    files: Sequence[Results], nets: Iterable[str], column: str, provider: str = "merge_", **wanted: object
) -> float | None:
    rows = (row for results in files for net in nets for row in results.pick(net=net, provider=provider, **wanted))
    return _worst(row[column] / row["floor_us"] for row in rows if column in row)


def _speedup(
    files: Sequence[Results], provider: str, *, nets: Iterable[str] | None = None, minimum_layers: int = 0,
    **wanted: object,
) -> float | None:  # fmt: skip
    """The least wall time of ``provider`` over that of ``merge_``, row by row."""
    return _worst(
        (
            results.over_merge(row)
            for results in files
            for row in results.pick(provider=provider, **wanted)
            if row["layers"] >= minimum_layers and (nets is None or row["net"] in nets)
        ),
        at_most=False,
    )


def merge_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_merge`` on a GPU: device time, and wall time beside other providers."""
    gpu = _of(found, "merge", on_gpu=True)
    slowest = _worst(
        row.get("device_us")
        for results in gpu
        for net in SMALL
        for row in results.pick(net=net, dtype="float32", provider="merge_")
    )
    vgg: dict[str, object] = {"net": "VGG19", "dtype": "float32"}

    def over_floor(dtype: str, regime: str) -> float | None:
        return _over_floor(gpu, LARGE, "device_us", dtype=dtype, regime=regime)

    return [
        Target(f"GPU device time over its floor: {', '.join(LARGE)}, float32, all pass", 1.4,
               over_floor("float32", "all pass"), "x"),
        Target("the same, bfloat16", 1.8, over_floor("bfloat16", "all pass"), "x"),
        Target("the same, float32, none passes", 1.5, over_floor("float32", "none passes"), "x"),
        Target(f"GPU device time: {', '.join(SMALL)}, float32", 20, slowest, " µs"),
        Target("GPU wall time, nets of 40 and more layers: `eager sampled` over `merge_`", 20,
               _speedup(gpu, "eager sampled", minimum_layers=DEEP_LAYERS), "x", at_most=False),
        Target("GPU wall time, VGG19: best `compile` over `merge_`", 2.5, _speedup(gpu, "compile", **vgg), "x",
               at_most=False),
        Target("GPU wall time, VGG19: `published` over `merge_`", 1000, _speedup(gpu, "published", **vgg), "x",
               at_most=False),
    ]  # fmt: skip


def cpu_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_merge`` on a CPU: wall time over the floor, beside other providers, and with two threads."""
    cpu = _of(found, "merge", on_gpu=False)

    def over_floor(bound: float, regime: str, nets: Sequence[str], *dtypes: str) -> Target:
        what = f"CPU wall time over its floor: {', '.join(nets)}, {' and '.join(dtypes)}, {regime}"
        worst = _worst(_over_floor(cpu, nets, "wall_us", dtype=dtype, regime=regime) for dtype in dtypes)
        return Target(what, bound, worst, "x", unmeasured=NOT_ON_A_CPU)

    def faster(what: str, bound: float, provider: str, **wanted: Any) -> Target:
        measured = _speedup(cpu, provider, **wanted)
        return Target(f"CPU wall time, {what}: `{provider}` over `merge_`", bound, measured, "x", at_most=False,
                      unmeasured=NOT_ON_A_CPU)  # fmt: skip

    short = ", ".join(SHORT)
    all_pass = {"dtype": "float32", "regime": "all pass"}
    return [
        over_floor(1.3, "all pass", WIDE, "float32"),
        over_floor(1.6, "none passes", WIDE, "float32"),
        over_floor(1.8, "all pass", WIDE, "bfloat16", "float16"),
        over_floor(2.2, "none passes", WIDE, "bfloat16", "float16"),
        over_floor(1.5, "all pass", ["ResNet-50"], "float32"),
        over_floor(2.2, "all pass", ["ResNet-50"], "bfloat16"),
        over_floor(3, "all pass", SHORT, "float32"),
        faster(f"{short}, float32, all pass", 5, "eager sampled", nets=SHORT, **all_pass),
        faster("every row where it runs", 2, "compile"),
        faster("every float32 row", 25, "published", dtype="float32"),
        _two_threads(cpu),
    ]


def _two_threads(cpu: Sequence[Results]) -> Target:
    """How much faster two threads are; where one falls short, whether the machine's memory allows more."""
    rows = [row for results in cpu for row in results.pick(provider="merge_, 2 threads", dtype="float32")]
    short = [row for row in rows if row["merge_us"] / row["wall_us"] < TWO_THREADS]
    over_floor = _worst(row["wall_us"] / row["floor_us"] for row in short)
    at_bandwidth = over_floor is not None and over_floor <= AT_BANDWIDTH
    where = f"at the bandwidth of both cores: {over_floor:.2f}x the floor of two threads" if at_bandwidth else ""
    return Target(
        f"CPU wall time, VGG19 and ResNet-50, float32: one thread over two, or at most {AT_BANDWIDTH:g}x the floor",
        TWO_THREADS, _worst((row["merge_us"] / row["wall_us"] for row in rows), at_most=False), "x", at_most=False,
        where=where, unmeasured=NOT_ON_A_CPU, excused=at_bandwidth,
    )  # fmt: skip


def match_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_match``, whose search is of all pairs where prob is 1."""
    files = _of(found, "match", on_gpu=True)
    every: dict[str, object] = {"dtype": "float32", "prob": 1.0}

    def ratios(over: str, under: str, column: str, **wanted: object) -> Iterator[float]:
        for results in files:
            for row in results.pick(provider=over, **every, **wanted):
                for other in results.pick(provider=under, **every, net=row["net"]):
                    if column in row and column in other:
                        yield row[column] / other[column]

    of_resnet = {"provider": "match", "net": "ResNet-50"} | every
    times = (row.get("device_us") for results in files for row in results.pick(**of_resnet))
    return [
        Target("GPU device time, nearest partner of every filter: VGG19, over its TF32 matrix products", 1.5,
               _worst(ratios("match", "gemm", "device_us", net="VGG19")), "x"),
        Target("the same, ResNet-50", 200, _worst(times), " µs"),
        Target("the same in wall time, all networks: `eager` over `match`", 5,
               _worst(ratios("eager", "match", "wall_us"), at_most=False), "x", at_most=False),
    ]  # fmt: skip


def _host_times(results: Results | None) -> list[float | None]:
    """The slowest call on one convolution, on up to 50 layers and on up to 110."""
    rows = results.pick(part="merge_") if results else []
    conv = [row["host_us"] for row in rows if row["target"] == "conv"]
    deeper = (
        [row["host_us"] for row in rows if row["target"] != "conv" and low < row["layers"] <= high]
        for low, high in ((0, 50), (50, 110))
    )
    return [_worst(times) for times in (conv, *deeper)]


def host_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_host``, times machine by machine, since they are the processor's.

    Over a driver that does nothing, its own 2 to 3 us a launch are missing.
    """
    gpu, stub = (_of(found, "host", on_gpu=on_gpu) for on_gpu in (True, False))

    def most_launches(part: str) -> float | None:
        return _worst(row.get("launches") for results in gpu or stub for row in results.pick(part=part))

    targets = [
        Target("launches of `merge_` at most, whatever the number of layers", 3, most_launches("merge_")),
        Target("launches of a step at most, where draws run ahead", 2, most_launches("InMerge.step")),
    ]
    layers = ("one convolution", "up to 50 layers", "up to 110 layers")
    for measured in gpu or [None]:
        where = f"{measured.device}, commit {measured.environment['commit']}" if measured else ""
        targets += [
            Target(f"host time of a call on a machine with a GPU, {of}", bound, time, " µs", where=where)
            for of, bound, time in zip(layers, (15, 35, 60), _host_times(measured), strict=True)
        ]
    for results in stub:
        where = f"{results.device}, commit {results.environment['commit']}"
        targets += [
            Target(f"host time of a call over a driver that does nothing, {of}", bound, time, " µs", where=where,
                   binding=results.device.startswith(HOST_MACHINE), unmeasured=NOT_ON_A_CPU)
            for of, bound, time in zip(layers, (10, 20, 35), _host_times(results), strict=True)
        ]  # fmt: skip
    return targets


def training_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_training``."""
    files = _of(found, "training", on_gpu=True)
    rows = [row for results in files for row in results.pick(net="ResNet-50")]
    shares = (row.get("share_percent") for row in rows if row.get("merging", "lasting") == "lasting")
    return [
        Target("share of a ResNet-50 training step (batch 64, AMP, channels_last), device", 0.3, _worst(shares), " %")
    ]


def forward_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_forward``: merging and restoring over the bytes that they must move, and beside PyTorch.

    On a GPU the three kernels move p S more than the floor, 1.2 times it: what is kept is read by the second.
    """
    gpu, cpu = (_of(found, "forward", on_gpu=on_gpu) for on_gpu in (True, False))
    what, of_wide, of_large = "forward-only merging", ", ".join(WIDE), ", ".join(LARGE)
    ratios = (
        row["wall_us"] / ours["wall_us"]
        for results in cpu
        for row in results.pick(provider="eager sampled", dtype="float32")
        for ours in results.pick(provider="merged", dtype="float32", net=row["net"])
    )
    return [
        Target(f"GPU device time of {what} over its floor: {of_large}, float32", 1.6,
               _over_floor(gpu, LARGE, "device_us", "merged", dtype="float32"), "x"),
        Target(f"CPU wall time of {what} over its floor: {of_wide}, float32", 1.3,
               _over_floor(cpu, WIDE, "wall_us", "merged", dtype="float32"), "x", unmeasured=NOT_ON_A_CPU),
        Target(f"the same, {', '.join(SHORT)}", 3, _over_floor(cpu, SHORT, "wall_us", "merged", dtype="float32"), "x",
               unmeasured=NOT_ON_A_CPU),
        Target(f"CPU wall time of {what}, float32: `eager sampled` over `merged`", 2, _worst(ratios, at_most=False),
               "x", at_most=False, unmeasured=NOT_ON_A_CPU),
    ]  # fmt: skip


def scaling_targets(found: Sequence[Results]) -> list[Target]:
    """Whether device time grows no faster than the bytes: the exponent between the two largest points of a series."""
    exponents = []
    for results in _of(found, "scaling", on_gpu=True):
        for series in ("filters", "elements", "layers"):
            rows = [
                row for row in results.pick(series=series, provider="merge_", regime="all pass") if "device_us" in row
            ]
            if len(rows) < 2:
                continue
            before, last = sorted(rows, key=lambda row: row["floor_bytes"])[-2:]
            exponents.append(
                math.log(last["device_us"] / before["device_us"])
                / math.log(last["floor_bytes"] / before["floor_bytes"])
            )
    what = "growth of GPU device time with the bytes: exponent at the large end of a series"
    return [Target(what, 1.1, _worst(exponents))]
