"""What this project aims at, in numbers, each with where its figure stands in the result files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.result_files import Results

LARGE = ("VGG19", "ResNet-50", "3D ResNet-18")  # as large as the memory's bandwidth counts
SMALL = ("DenseNet-121", "EfficientNet-B0")
DEEP_LAYERS = 40
NOT_MEASURED = "not yet measured on a GPU"


@dataclass(frozen=True)
class Target:
    """An aim and what was measured, None where nothing was; ``where`` if that was not on a GPU but should have been."""

    what: str
    bound: float
    measured: float | None
    unit: str = ""
    at_most: bool = True
    where: str = ""

    @property
    def reached(self) -> bool:
        """Whether the measured figure keeps the bound."""
        assert self.measured is not None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def _worst(values: Iterable[float | None], *, at_most: bool = True) -> float | None:
    known = [value for value in values if value is not None]
    return (max(known) if at_most else min(known)) if known else None


def _of(found: Sequence[Results], bench: str, *, on_gpu: bool) -> list[Results]:
    return [results for results in found if results.bench == bench and results.on_gpu == on_gpu]


def _ours(files: Sequence[Results], nets: Iterable[str], **wanted: object) -> Iterator[Any]:
    for results in files:
        for net in nets:
            yield from results.pick(net=net, provider="merge_", **wanted)


def _speedups(files: Sequence[Results], provider: str, *, minimum_layers: int = 0, **wanted: object) -> Iterator[float]:
    """Wall time of ``provider`` over that of ``merge_``, row by row."""
    for results in files:
        for row in results.pick(provider="merge_", **wanted):
            if row["layers"] < minimum_layers:
                continue
            same = {key: row[key] for key in ("net", "dtype", "regime")}
            for other in results.pick(provider=provider, **same):
                yield other["wall_us"] / row["wall_us"]


def merge_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_merge``: device and wall time on a GPU, wall time on a CPU."""
    gpu, cpu = (_of(found, "merge", on_gpu=on_gpu) for on_gpu in (True, False))

    def over_floor(**wanted: object) -> float | None:
        return _worst(row["device_us"] / row["floor_us"] for row in _ours(gpu, LARGE, **wanted))

    def slowest(**wanted: object) -> float | None:
        return _worst(row["device_us"] for row in _ours(gpu, SMALL, **wanted))

    def at_least(values: Iterable[float]) -> float | None:
        return _worst(values, at_most=False)

    vgg: dict[str, object] = {"net": "VGG19", "dtype": "float32"}
    large = ", ".join(LARGE)
    cpu_vgg = [row for results in cpu for row in results.pick(provider="merge_", **vgg)]
    return [
        Target(f"GPU device time over its floor: {large}, float32, all pass", 1.4,
               over_floor(dtype="float32", regime="all pass"), "x"),
        Target("the same, bfloat16", 1.8, over_floor(dtype="bfloat16", regime="all pass"), "x"),
        Target("the same, float32, none passes", 1.5, over_floor(dtype="float32", regime="none passes"), "x"),
        Target(f"GPU device time: {', '.join(SMALL)}, float32", 20, slowest(dtype="float32"), " µs"),
        Target("GPU wall time, nets of 40 and more layers: `eager sampled` over `merge_`", 20,
               at_least(_speedups(gpu, "eager sampled", minimum_layers=DEEP_LAYERS)), "x", at_most=False),
        Target("GPU wall time, VGG19: best `compile` over `merge_`", 2.5,
               at_least(_speedups(gpu, "compile", **vgg)), "x", at_most=False),
        Target("GPU wall time, VGG19: `published` over `merge_`", 1000,
               at_least(_speedups(gpu, "published", **vgg)), "x", at_most=False),
        Target("CPU wall time, VGG19, all pass: `published` over `merge_`", 6,
               at_least(_speedups(cpu, "published", regime="all pass", **vgg)), "x", at_most=False),
        Target("the same, none passes", 5,
               at_least(_speedups(cpu, "published", regime="none passes", **vgg)), "x", at_most=False),
        Target("CPU wall time over its floor, VGG19 float32", 6.5,
               _worst(row["wall_us"] / row["floor_us"] for row in cpu_vgg), "x"),
        Target("CPU wall time, VGG19: `merge_` over the best `compile` of the sampled form", 1.5,
               _worst(1 / ratio for ratio in _speedups(cpu, "compile", **vgg)), "x"),
    ]  # fmt: skip


def match_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_match``, whose search is of all pairs where prob is 1."""
    files = _of(found, "match", on_gpu=True)
    every: dict[str, object] = {"dtype": "float32", "prob": 1.0}

    def ratios(over: str, under: str, column: str, **wanted: object) -> Iterator[float]:
        for results in files:
            for row in results.pick(provider=over, **every, **wanted):
                for other in results.pick(provider=under, **every, net=row["net"]):
                    yield row[column] / other[column]

    times = (row["device_us"] for results in files for row in results.pick(provider="match", net="ResNet-50", **every))
    return [
        Target("GPU device time, nearest partner of every filter: VGG19, over its TF32 matrix products", 1.5,
               _worst(ratios("match", "gemm", "device_us", net="VGG19")), "x"),
        Target("the same, ResNet-50", 200, _worst(times), " µs"),
        Target("the same in wall time, all networks: `eager` over `match`", 5,
               _worst(ratios("eager", "match", "wall_us"), at_most=False), "x", at_most=False),
    ]  # fmt: skip


def host_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_host``, times machine by machine, since they are the processor's.

    Over a driver that does nothing, its own 2 to 3 us a launch are missing.
    """
    measured = _of(found, "host", on_gpu=True) or _of(found, "host", on_gpu=False)

    def most_launches(part: str) -> float | None:
        return _worst(row.get("launches") for results in measured for row in results.pick(part=part))

    targets = [
        Target("launches of `merge_` at most, whatever the number of layers", 3, most_launches("merge_")),
        Target("launches of a step at most, where draws run ahead", 2, most_launches("InMerge.step")),
    ]
    for results in measured:
        rows = results.pick(part="merge_")
        stub = any(row["driver"] == "stub" for row in rows)
        where = f"{results.device}, commit {results.environment['commit']}"
        where += f", over a driver that does nothing, {NOT_MEASURED}" if stub else ""
        conv = [row["host_us"] for row in rows if row["target"] == "conv"]
        up_to_50, up_to_110 = (
            [row["host_us"] for row in rows if row["target"] != "conv" and low < row["layers"] <= high]
            for low, high in ((0, 50), (50, 110))
        )
        targets += [
            Target(f"host time of a call, {of}", bound, _worst(times), " µs", where=where)
            for of, bound, times in (
                ("one convolution", 15, conv), ("up to 50 layers", 35, up_to_50), ("up to 110 layers", 60, up_to_110)
            )
        ]  # fmt: skip
    return targets


def training_targets(found: Sequence[Results]) -> list[Target]:
    """Targets of ``bench_training``."""
    files = _of(found, "training", on_gpu=True)
    shares = (row["share_percent"] for results in files for row in results.pick(net="ResNet-50"))
    return [
        Target("share of a ResNet-50 training step (batch 64, AMP, channels_last), device", 0.3, _worst(shares), " %")
    ]


def scaling_targets(found: Sequence[Results]) -> list[Target]:
    """Whether device time grows no faster than the bytes: the exponent between the two largest points of a series."""
    exponents = []
    for results in _of(found, "scaling", on_gpu=True):
        for series in ("filters", "elements", "layers"):
            rows = results.pick(series=series, provider="merge_", regime="all pass")
            before, last = sorted(rows, key=lambda row: row["floor_bytes"])[-2:]
            exponents.append(
                math.log(last["device_us"] / before["device_us"])
                / math.log(last["floor_bytes"] / before["floor_bytes"])
            )
    what = "growth of GPU device time with the bytes: exponent at the large end of a series"
    return [Target(what, 1.1, _worst(exponents))]
