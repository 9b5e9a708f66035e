"""Figures from result files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inmerge_fast.demo.data import require

from .compare import FEWEST, Row
from .tables import read_manifest, rows_of

SHOWN = ("AUC", "corrupted AUC")
COLOURS = ("#0072b2", "#d55e00")  # told apart by the colour-blind, too
FLOOR = "#999999"
STYLE = {"font.size": 9, "svg.hashsalt": "inmerge", "svg.fonttype": "path", "axes.spines.top": False,
         "axes.spines.right": False}  # fmt: skip


def write_figures(path: Path) -> list[Path]:
    """Write ``<manifest>.svg`` beside a manifest that has results; gives what was written."""
    manifest, _ = read_manifest(path)
    groups = [(recipe, rows) for recipe, rows in rows_of(path) if any(row.kind == "setting" for row in rows)]
    if not groups:
        return []
    matplotlib = require("matplotlib", "matplotlib")
    matplotlib.use("agg")
    plt = require("matplotlib.pyplot", "matplotlib")
    draw = {"heat": _heat, "line": _line, "bars": _bars}[manifest["figure"]]
    with plt.rc_context(STYLE):
        figure = draw(plt, manifest, groups)
        out = [path.with_suffix(".svg")]
        # Neither dates nor versions: the same results give the same bytes.
        figure.savefig(out[0], metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return out


def _settings(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.kind in ("setting", "reseeded")]


def _point(axis: Any, place: float, row: Row, metric: str, colour: str, vertical: bool = False) -> None:
    one = row.judged(metric)
    error = None if math.isnan(one.low) else [[one.mean - one.low], [one.high - one.mean]]
    hollow = {} if row.collapsed == 0 else {"markerfacecolor": "white"}
    if vertical:
        axis.errorbar(one.mean, place, xerr=error, fmt="o", color=colour, capsize=2, markersize=5, **hollow)
    else:
        axis.errorbar(place, one.mean, yerr=error, fmt="o", color=colour, capsize=2, markersize=5, **hollow)


def _legend(axis: Any) -> None:
    for metric, colour in zip(SHOWN, COLOURS, strict=True):
        axis.plot([], [], "o", color=colour, markersize=5, label=metric)


def _bars(plt: Any, manifest: dict[str, Any], groups: Sequence[tuple[str, list[Row]]]) -> Any:
    """A row for every arm: the paired difference and its interval."""
    height = 1.2 + 0.42 * max(len(_settings(rows)) for _, rows in groups)
    # Room for the longest name, at 0.08 inches a letter, beside an axis that takes its title.
    longest = max(len(line) for _, rows in groups for row in _settings(rows) for line in _tick(row).split("\n"))
    figure, axes = plt.subplots(
        1, len(groups), figsize=((4.0 + 0.08 * longest) * len(groups), height + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (recipe, rows) in zip(axes[0], groups, strict=True):
        shown = _settings(rows)
        for index, row in enumerate(shown):
            for offset, (metric, colour) in enumerate(zip(SHOWN, COLOURS, strict=True)):
                place = len(shown) - index - 0.12 + 0.24 * (1 - offset)
                _point(axis, place, row, metric, colour, vertical=True)
        axis.set_yticks(range(len(shown), 0, -1), [_tick(row) for row in shown])
        axis.set_ylim(0.4, len(shown) + 1.3)  # the legend stands above all points
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(recipe, fontsize=9)
        axis.set_xlabel(_difference_label(rows))
        _legend(axis)
        axis.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    figure.suptitle(_title(manifest), fontsize=10)
    return figure


def _tick(row: Row) -> str:
    merges = "" if math.isnan(row.per_step) else f"\n{row.per_step:.2f} merges/step"
    return row.title + merges


def _difference_label(rows: Sequence[Row]) -> str:
    return f"difference to the baseline, points ({_seeds(rows)})"


def _seeds(rows: Sequence[Row]) -> str:
    fewest, most = min(row.n for row in rows), max(row.n for row in rows)
    counts = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"{counts} seeds, 95 % intervals" if most >= FEWEST else f"{counts} seeds, too few for intervals"


def _title(manifest: dict[str, Any]) -> str:
    return f"{manifest['title']}\n({manifest['split']} images; hollow: filters collapsed in some seed)"


def _line(plt: Any, manifest: dict[str, Any], groups: Sequence[tuple[str, list[Row]]]) -> Any:
    """Differences and effective rank over the setting that is swept."""
    (recipe, rows) = groups[0]
    shown = [row for row in rows if row.kind == "setting"]
    floor = next((row for row in rows if row.kind == "reseeded"), None)
    width = max(5.5, 1.6 + 0.75 * len(shown))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(width, 5.4), sharex=True, layout="constrained",
                                         height_ratios=(3, 2))  # fmt: skip
    for offset, (metric, colour) in enumerate(zip(SHOWN, COLOURS, strict=True)):
        for index, row in enumerate(shown):
            _point(top, index - 0.1 + 0.2 * offset, row, metric, colour)
    if floor is not None and not math.isnan(floor.judged(SHOWN[1]).low):
        one = floor.judged(SHOWN[1])
        top.axhspan(one.low, one.high, color=FLOOR, alpha=0.25, linewidth=0, label=f"{SHOWN[1]} of another data order")
    top.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("difference to the\nbaseline, points")
    top.set_title(f"{_title(manifest)}\n{recipe}, {_seeds(rows)}", fontsize=9)
    _legend(top)
    top.legend(fontsize=8, loc="best", frameon=False)
    bottom.plot(range(len(shown)), [row.rank[0] for row in shown], ":", color=FLOOR, label="effective rank before")
    kinds = [row.merging is not None and row.merging["z"] is not None for row in shown]
    for kind in sorted(set(kinds)):  # fixed and scaled thresholds are two scales: no line leads from one to the other
        places = [place for place, one in enumerate(kinds) if one == kind]
        bottom.plot(places, [shown[place].rank[1] for place in places], "o-", color="#009e73",
                    label="after" if kind == kinds[0] else None)  # fmt: skip
    bottom.set_ylim(0, 1.05)
    bottom.set_ylabel("share of the\nhighest rank")
    bottom.legend(fontsize=8, loc="best", frameon=False)
    bottom.set_xticks(
        range(len(shown)),
        [f"{_swept(row, manifest['name'])}\n{'diverged' if row.diverged else f'{row.per_step:.2f}'}" for row in shown],
    )
    bottom.set_xlabel("setting, and filters merged per step")
    return figure


def _swept(row: Row, name: str) -> str:
    assert row.merging is not None
    if name == "sweep-layers":
        return f"skip {row.merging['skip_first']:g}"
    return f"τ = {row.merging['threshold']:g}" if row.merging["z"] is None else f"{row.merging['z']:g}/√D"


def _heat(plt: Any, manifest: dict[str, Any], groups: Sequence[tuple[str, list[Row]]]) -> Any:
    """Differences over alpha and p."""
    (recipe, rows) = groups[0]
    cells = {(row.merging["alpha"], row.merging["prob"]): row for row in rows if row.merging is not None}
    alphas, probs = (sorted({key[place] for key in cells}) for place in (0, 1))
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(4.9 * len(SHOWN), 4.2), layout="constrained")
    for axis, metric in zip(axes, SHOWN, strict=True):
        values = [[cells[a, p].judged(metric) if (a, p) in cells else None for p in probs] for a in alphas]
        means = [[math.nan if one is None else one.mean for one in line] for line in values]
        # Half a point at least: less is within the noise of another data order.
        top = max(0.5, *(abs(mean) for line in means for mean in line if not math.isnan(mean)))
        image = axis.imshow(means, cmap="RdBu", vmin=-top, vmax=top, origin="lower", aspect="auto")
        for y, line in enumerate(values):
            for x, one in enumerate(line):
                if one is not None:
                    row = cells[alphas[y], probs[x]]
                    half = "" if math.isnan(one.low) else f"\n±{one.high - one.mean:.2f}"
                    alarm = "\ndiverged" if row.diverged else "\ncollapsed" if row.collapsed else ""
                    mean = "–" if math.isnan(one.mean) else f"{one.mean:+.2f}"
                    axis.text(x, y, f"{mean}{half}{alarm}", ha="center", va="center", fontsize=8,
                              color="white" if abs(one.mean) > 0.65 * top else "black")  # fmt: skip
        axis.set_xticks(range(len(probs)), [f"{p:g}" for p in probs])
        axis.set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
        axis.set_xlabel("merge probability p")
        axis.set_ylabel("merge weight α")
        axis.set_title(f"{metric}, difference to the baseline, points", fontsize=9)
        figure.colorbar(image, ax=axis)
    half = ", ± half of the 95 % interval" if rows[0].n >= FEWEST else ""
    figure.suptitle(f"{manifest['title']}, τ = 0.3: {recipe}, {rows[0].n} seeds{half}", fontsize=10)
    return figure
