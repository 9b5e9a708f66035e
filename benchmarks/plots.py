"""Plots of the result files, as SVG that is the same to the byte for the same files and version of matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.result_files import REGIMES, Results, by_device, joined, slug

COLOURS = {
    "published": "#888888", "eager": "#c26d2d", "eager sampled": "#e3b23c", "compile": "#5b8e7d", "merge_": "#2a5caa",
}  # fmt: skip
STYLE = {"svg.hashsalt": "inmerge_fast", "svg.fonttype": "path", "font.size": 10, "axes.spines.top": False,
         "axes.spines.right": False}  # fmt: skip


def draw_all(found: Sequence[Results], folder: Path) -> Iterator[Path]:
    """Draw all plots of all devices; yields their paths."""
    plots = {"merge": {"ratios": draw_ratios, "floor": draw_floor}, "scaling": {"scaling": draw_scaling}}
    with mpl.rc_context(STYLE):
        for device, here in by_device(found).items():
            for bench, passes in here.items():
                results = joined(passes)
                for name, draw in plots.get(bench, {}).items() if results.rows else ():
                    path = folder / f"{slug(device)}-{name}.svg"
                    draw(results).savefig(path, metadata={"Date": None})
                    yield path


def draw_ratios(results: Results) -> Figure:
    """Bars: wall time of every provider over that of ``merge_``, by network, float32, logarithmic."""
    nets = list(dict.fromkeys(row["net"] for row in results.rows))
    providers = [p for p in COLOURS if p != "merge_" and results.pick(provider=p, dtype="float32")]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axis, regime in zip(figure.subplots(2, 1, sharex=True), REGIMES, strict=True):
        for index, provider in enumerate(providers):
            where = {"dtype": "float32", "regime": regime}
            ratios = [_ratio(results, results.pick(net=net, provider=provider, **where)) for net in nets]
            x = np.arange(len(nets)) + (index - (len(providers) - 1) / 2) * 0.8 / len(providers)
            bars = axis.bar(x, ratios, 0.8 / len(providers), label=provider, color=COLOURS[provider])
            axis.bar_label(bars, [_label(r) for r in ratios], fontsize=8, padding=1)
        axis.axhline(1, color=COLOURS["merge_"], linewidth=1.5, label="merge_" if regime == REGIMES[0] else None)
        axis.set(yscale="log", title=f"{regime} (float32, p = 0.3)", ylabel="time over merge_")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(np.arange(len(nets)), nets)
        axis.margins(y=0.12)
    figure.suptitle(f"Wall time over that of merge_ (1 = as fast, above: slower); {results.device}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=len(providers) + 1, loc="outside lower center")
    return figure


def draw_floor(results: Results) -> Figure:
    """Time against the bytes that must move: a panel for each regime, a column of points for each network and dtype."""
    column, what = ("device_us", "device time") if results.on_gpu else ("wall_us", "wall time")
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    shown = [p for p in COLOURS if any(column in row for row in results.pick(provider=p))]
    speed = results.environment["copy_bandwidth_gb_s"]
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, regime in zip(panels, REGIMES, strict=True):
        for provider in shown:
            rows = [row for row in results.pick(provider=provider, regime=regime) if column in row]
            for wide in (True, False):
                points = [(r["floor_bytes"] / 1e6, r[column]) for r in rows if (r["dtype"] == "float32") == wide]
                axis.scatter(
                    [x for x, _ in points], [y for _, y in points], s=26, marker="o" if wide else "v", linewidths=1.2,
                    edgecolors=COLOURS[provider], facecolors=COLOURS[provider] if wide else "none",
                    label=provider if wide else None,
                )  # fmt: skip
        sizes = [row["floor_bytes"] / 1e6 for row in results.rows if row["regime"] == regime]
        reach = np.array([min(sizes), max(sizes)]) if sizes else np.array([])
        axis.plot(reach, reach / speed * 1e3, color="black", label=f"floor: a copy at {speed:g} GB/s")
        axis.set_title(regime, pad=62)
        axis.set_xlabel("bytes that the draw must move, MB")
        _logarithmic(axis)
        _name_networks(axis, results, regime)
    panels[0].set_ylabel(f"{what}, µs")
    figure.suptitle(f"{what.capitalize()} against bytes; filled: float32, hollow: 16 bits; {results.device}")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=len(shown) + 1, loc="outside lower center", fontsize=9)
    return figure


def draw_scaling(results: Results) -> Figure:
    """One panel for each series: time of ``merge_`` and of eager sampled, and the floor, as the work grows."""
    column, what = ("device_us", "device time") if results.on_gpu else ("wall_us", "wall time")
    labels = {
        "filters": "filters, 1152 elements each",
        "elements": "elements per filter, 512 filters",
        "layers": "layers of 128 filters, 1152 elements each",
        "prob": "p, 512 filters, 4608 elements each",
    }
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    for axis, (series, label) in zip(figure.subplots(2, 2).flat, labels.items(), strict=True):
        for provider in ("eager sampled", "merge_"):
            for regime, style in zip(REGIMES, ("o-", "o--"), strict=True):
                rows = [r for r in results.pick(series=series, provider=provider, regime=regime) if column in r]
                axis.plot([r["value"] for r in rows], [r[column] for r in rows], style, color=COLOURS[provider],
                          label=f"{provider}, {regime}", markersize=3)  # fmt: skip
        for regime, style in zip(REGIMES, ("-", "--"), strict=True):
            rows = results.pick(series=series, provider="merge_", regime=regime)
            axis.plot([r["value"] for r in rows], [r["floor_us"] for r in rows], style, color="black",
                      label=f"floor, {regime}", linewidth=1)  # fmt: skip
        axis.set(xlabel=label, ylabel=f"{what}, µs")
        _logarithmic(axis)
    figure.suptitle(f"{what.capitalize()} as the work grows (float32); {results.device}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center", fontsize=9)
    return figure


def _logarithmic(axis: Any) -> None:
    """Both axes, with plain numbers; not where nothing was measured, which has no logarithm."""
    axis.grid(alpha=0.25)
    if not any(len(line.get_xdata()) for line in axis.lines):
        return
    axis.set(xscale="log", yscale="log")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter("{x:,.7g}")
        ticks.set_minor_formatter(NullFormatter())


def _name_networks(axis: Any, results: Results, regime: str) -> None:
    """Names of the networks above their columns of float32."""
    for row in results.pick(provider="merge_", dtype="float32", regime=regime):
        x = row["floor_bytes"] / 1e6
        axis.axvline(x, color="0.88", linewidth=0.8, zorder=0)
        axis.annotate(row["net"], (x, 1), xycoords=axis.get_xaxis_transform(), xytext=(0, 3), fontsize=8,
                      textcoords="offset points", rotation=45, rotation_mode="anchor")  # fmt: skip


def _label(ratio: float) -> str:
    """Two digits as people write them, 1,200: "1.2e+03" is long and runs into its neighbour."""
    return f"{float(f'{ratio:.2g}'):,g}" if np.isfinite(ratio) else ""


def _ratio(results: Results, rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the one row, if there is one, or NaN."""
    ratio = results.over_merge(rows[0]) if rows else None
    return float("nan") if ratio is None else ratio
