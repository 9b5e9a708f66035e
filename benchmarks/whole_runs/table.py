"""The table of whole runs, from their lines."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markers

from .recipes import RECIPES

Line = Mapping[str, Any]
BASELINE, RESEEDED = "without merging", "without merging, reseeded"
BEGIN, END = "<!-- settings: begin (python -m benchmarks.whole_runs report) -->", "<!-- settings: end -->"
GUIDE_COLUMNS = (0, 1, 2, 4, 8)  # of the table: threshold, seeds, merges per step, lowest rank kept, accuracy
HEADER = """# What thresholds do over whole runs

Written by `python -m benchmarks.whole_runs report` from [runs.jsonl](runs.jsonl), one line a run. Every run is beside
the one of the same seed without merging: the same network, batches and schedules.

- *Merges per filter*: over the run, in the layers with the fewest and the most.
- *Rank kept*: effective rank of a layer at the end over that of the same layer without merging; the lowest of all
  layers and seeds, and the lowest of the layers' means over seeds. The reseeded baseline, which sees the images in
  another order, shows how far it moves by itself.
- *Lost by merging*: the most that {summary} says of any layer, at the end, without knowing the run beside it.
- *Accuracy*: difference on the test images in points, mean and each seed. What the reseeded baseline shows is noise.
- *Time*: of all `InMerge.step` calls together, as a share of the run's CPU time.
"""


def write_table(path: Path) -> Path:
    """Write the table beside the result file; returns its path."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    text = [HEADER.format(summary="`InMerge.summary()`")]
    for name, recipe in RECIPES.items():
        own = [line for line in lines if line["recipe"] == name]
        if own:
            text += [f"## {name}", "", f"{recipe.about}; {_size(own[0])}.", "", *_table(own), ""]
    versions = sorted({f"torch {line['torch']}, Python {line['python']}" for line in lines})
    text.append(f"{len(lines)} runs; {'; '.join(versions)}, CPU, one thread each.\n")
    out = path.with_name("RESULTS.md")
    out.write_text("\n".join(text))
    return out


def guide_section(path: Path) -> str:
    """The table of docs/thresholds.md: a few columns of every recipe's table, one under another."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        "| network | threshold | seeds | merges per step | rank kept, lowest | accuracy |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, recipe in RECIPES.items():
        where = recipe.about.partition(",")[0] + ", " + recipe.about.rpartition(", ")[2]
        for row in _table([line for line in lines if line["recipe"] == name])[2:]:
            cells = row.strip("| ").split(" | ")
            if len(cells) > max(GUIDE_COLUMNS):
                kept = [cells[column].partition(" (")[0] for column in GUIDE_COLUMNS]
                rows.append(f"| {where} | {' | '.join(kept)} |")
                where = ""
    return "\n".join(rows)


def updated(page: str, section: str) -> str:
    """A page with another section between this command's markers, see :func:`benchmarks.markers.updated`."""
    return markers.updated(page, BEGIN, END, section)


def _size(line: Line) -> str:
    return f"{line['steps']} steps, merging in the last {line['merging_steps']}, {len(line['rank'])} layers"


def _table(lines: Sequence[Line]) -> list[str]:
    diverged = [line for line in lines if line["accuracy"] is None]
    base = {line["seed"]: line for line in lines if line["setting"] == BASELINE and line["accuracy"] is not None}
    settings: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line["seed"] in base and line["setting"] != BASELINE and line["accuracy"] is not None:
            settings[line["setting"]].append(line)
    rows = [
        "| threshold | seeds | merges per step | merges per filter | rank kept, lowest | of means | lost by merging "
        "| layers stopped | accuracy, points | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(setting, found, base) for setting, found in settings.items()]
    accuracy = [100 * line["accuracy"] for line in base.values()]
    end = ["", f"Accuracy without merging: {', '.join(f'{value:.2f}' for value in accuracy)} %."]
    if diverged:
        names = "; ".join(f"{line['setting']}, seed {line['seed']}" for line in diverged)
        end += ["", f"Diverged, and in no number above: {names}."]
    return [*rows, *end]


def _row(setting: str, found: Sequence[Line], base: Mapping[int, Line]) -> str:
    kept = [{name: rank / base[line["seed"]]["rank"][name] for name, rank in line["rank"].items()} for line in found]
    means = [math.exp(math.fsum(math.log(one[name]) for one in kept) / len(kept)) for name in kept[0]]
    difference = [100 * (line["accuracy"] - base[line["seed"]]["accuracy"]) for line in found]
    mean = math.fsum(difference) / len(difference)
    each = ", ".join(f"{value:+.2f}" for value in difference)
    merging = [line for line in found if "layers" in line]
    columns = ["-"] * 4
    time = "-"
    if merging:
        steps = math.fsum(
            sum(layer["merged"] for layer in line["layers"].values()) / line["merging_steps"] for line in merging
        )
        by_filter = [
            layer["merged"] / line["filters"][name] for line in merging for name, layer in line["layers"].items()
        ]
        lost = [layer["lost"] for line in merging for layer in line["layers"].values() if layer["lost"] is not None]
        stopped = sum(layer["stopped"] for line in merging for layer in line["layers"].values()) / len(merging)
        columns = [
            f"{steps / len(merging):.3g}",
            f"{min(by_filter):.2f} to {max(by_filter):.2f}",
            f"{100 * max(lost):.1f} %" if lost else "-",
            f"{stopped:g}",
        ]
        share = math.fsum(line["merger_seconds"] for line in merging) / math.fsum(
            line["cpu_seconds"] for line in merging
        )
        time = f"{100 * share:.1f} %"
    lowest = min(min(one.values()) for one in kept)
    return (
        f"| {setting} | {len(found)} | {columns[0]} | {columns[1]} | {lowest:.3f} | {min(means):.3f} | {columns[2]} "
        f"| {columns[3]} | {mean:+.2f} ({each}) | {time} |"
    )
