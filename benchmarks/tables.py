"""Markdown tables of the result files, one function a benchmark; what was not measured is a dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.result_files import REGIMES, Results
from benchmarks.targets import Target

PROVIDERS = (
    "published",
    "eager",
    "eager sampled",
    "compile",
    "merge_",
    "merge_, 2 threads",
    "merged",
)  # from left to right

FRONT_NETS = ("VGG19", "ResNet-50", "DenseNet-121")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def microseconds(value: float | None) -> str:
    """A time with three significant digits and its unit."""
    if value is None:
        return "-"
    if value >= 999.5:
        return f"{value / 1e3:.3g} ms" if value < 999_500 else f"{value / 1e6:.3g} s"
    return f"{value:.3g} µs"


def in_code(name: str) -> str:
    """A provider's name, that of a function of ours as code."""
    function, comma, rest = name.partition(",")
    return f"`{function}`{comma}{rest}" if function in ("merge_", "match", "merged") else name


def by_net(results: Results, *columns: str) -> list[tuple[Any, ...]]:
    """The values of these columns in all rows, once each, network by network."""
    nets = list(dict.fromkeys(row["net"] for row in results.rows))
    found = dict.fromkeys(tuple(row[column] for column in ("net", *columns)) for row in results.rows)
    return sorted(found, key=lambda key: nets.index(key[0]))


def pair(values: Sequence[str]) -> str:
    """Where all pass / where none does."""
    return "-" if set(values) == {"-"} else " / ".join(values)


def merge_table(results: Results) -> str:
    """Wall time of every provider for every network, all pass / none passes, and ``merge_``'s over the floor."""
    providers = [name for name in PROVIDERS if results.pick(provider=name)]
    header = ["network", "dtype", "layers", *map(in_code, providers), "`merge_` / floor"]
    column = "device_us" if results.on_gpu else "wall_us"
    if results.on_gpu:
        header.append("`merge_` on the device (floor)")
    lines = []
    for net, dtype in by_net(results, "dtype"):
        here = {"net": net, "dtype": dtype}
        line = [net, dtype, str(results.pick(**here)[0]["layers"])]
        for provider in providers:
            line.append(pair([
                microseconds(results.value("wall_us", **here, regime=regime, provider=provider)) for regime in REGIMES
            ]))  # fmt: skip
        ours = [
            (results.value(column, **here, regime=regime, provider="merge_"),
             results.value("floor_us", **here, regime=regime, provider="merge_"))
            for regime in REGIMES
        ]  # fmt: skip
        line.append(pair(["-" if time is None else f"{time / floor:.1f}" for time, floor in ours]))
        if results.on_gpu:
            line.append(pair(["-" if time is None else f"{time:.1f} ({floor:.1f}) µs" for time, floor in ours]))
        lines.append(line)
    return table(header, lines)


def front_table(shown: Mapping[str, Results]) -> str:
    """Three networks, float32, all pass: the published loop, the faster plain PyTorch, torch.compile, ours."""
    lines = []
    for where, results in shown.items():
        for net in FRONT_NETS:
            here = {"net": net, "dtype": "float32", "regime": REGIMES[0]}
            times = [
                [results.value("wall_us", **here, provider=name) for name in names]
                for names in (("published",), ("eager", "eager sampled"), ("compile",), ("merge_",))
            ]
            known = [[time for time in each if time is not None] for each in times]
            lines.append([f"{net}, {where}", *(microseconds(min(each, default=None)) for each in known)])
    return table(["network", "published code", "plain PyTorch", "`torch.compile`", "this library"], lines)


def forward_table(results: Results) -> str:
    """Wall time of every provider for every network, and that of ``merged`` over the floor and over ``merge_``'s."""
    providers = [name for name in PROVIDERS if results.pick(provider=name)]
    header = ["network", "dtype", "layers", *map(in_code, providers), "`merge_`", "`merged` / floor"]
    if results.on_gpu:
        header.append("`merged` on the device (floor)")
    column = "device_us" if results.on_gpu else "wall_us"
    lines = []
    for net, dtype in by_net(results, "dtype"):
        here = {"net": net, "dtype": dtype}
        times = [microseconds(results.value("wall_us", **here, provider=provider)) for provider in providers]
        rows = results.pick(**here, provider="merged")
        ours = rows[0] if rows else {}
        time, floor = ours.get(column), ours.get("floor_us")
        line = [net, dtype, str(results.pick(**here)[0]["layers"]), *times, microseconds(ours.get("merge_us"))]
        line.append("-" if time is None else f"{time / floor:.1f}")
        if results.on_gpu:
            line.append("-" if time is None else f"{time:.1f} ({floor:.1f}) µs")
        lines.append(line)
    return table(header, lines)


def training_table(results: Results) -> str:
    """What merging adds to a training step."""
    header = ["network", "batch", "merging", "step", "merging alone", "share of the step",
              "A/B difference (95 % interval)"]  # fmt: skip
    if results.on_gpu:
        header += ["host", "peak memory added", "kept"]

    def megabytes(row: Mapping[str, Any], column: str) -> str:
        return f"{row[column] / 1e6:.1f} MB" if column in row else "-"

    lines = []
    for row in results.rows:
        line = [
            row["net"], "x".join(map(str, row["batch"])), row.get("merging", "lasting"), microseconds(row["step_us"]),
            microseconds(row.get("merge_device_us" if results.on_gpu else "merge_host_us")),
            f"{row['share_percent']:.2g} %" if "share_percent" in row else "-",
            f"{row['ab_us'] / 1e3:+.2f} ms ({row['ab_low_us'] / 1e3:+.2f} to {row['ab_high_us'] / 1e3:+.2f})",
        ]  # fmt: skip
        if results.on_gpu:
            line += [microseconds(row.get("merge_host_us"))]
            line += [megabytes(row, column) for column in ("peak_added_bytes", "kept_bytes")]
        lines.append(line)
    return table(header, lines)


def host_table(results: Results) -> str:
    """Host time of a call."""
    names = list(dict.fromkeys((row["target"], row["layers"]) for row in results.rows))
    parts = list(dict.fromkeys(row["part"] for row in results.rows))
    lines = []
    for target, layers in names:
        values = [results.value("host_us", target=target, part=part) for part in parts]
        lines.append([target, str(layers), *map(microseconds, values)])
    return table(["target", "layers", *map(in_code, parts)], lines)


def match_table(results: Results) -> str:
    """Time of every provider for every network, for every filter and for the sampled ones."""
    providers = list(dict.fromkeys(row["provider"] for row in results.rows))
    header = ["network", "dtype", "prob", *map(in_code, providers), "floor by flops", "by bytes"]
    column = "device_us" if results.on_gpu else "wall_us"
    lines = []
    for net, dtype, prob in by_net(results, "dtype", "prob"):
        rows = results.pick(net=net, dtype=dtype, prob=prob)
        times = {row["provider"]: row.get(column) for row in rows}
        floors = [microseconds(rows[0][f"floor_{kind}_us"]) for kind in ("flops", "bytes")]
        lines.append([net, dtype, f"{prob:g}", *(microseconds(times.get(name)) for name in providers), *floors])
    return table(header, lines)


def target_table(targets: Iterable[Target]) -> str:
    """What was aimed at, what was measured, and whether it is reached."""
    lines = []
    for target in targets:
        where = f" ({target.where})" if target.where else ""
        measured = target.unmeasured if target.measured is None else f"{target.measured:.3g}{target.unit}{where}"
        bound = f"{'≤' if target.at_most else '≥'} {target.bound:g}{target.unit}"
        lines.append([target.what, bound, measured, target.outcome])
    return table(["target", "bound", "measured", ""], lines)
