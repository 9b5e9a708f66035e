"""``trained-networks.md`` and its figure, from the result file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inmerge_fast.demo.data import require

from .figures import COLOURS, STYLE
from .tables import table
from .trained import ALPHA, AT_ONCE, NAME, PROB, PUBLISHED, RECOMMENDED, STEPS, THRESHOLD, merges_of, read

FEW = 1.0  # filters per step below which merging is next to nothing
HEAD = f"""# Networks that were trained: what would merge

Written by `python -m benchmarks.paper report` from `{NAME}.jsonl`. Weights from files that others trained and
published; nothing is trained here. *as published*: threshold {THRESHOLD:g}, alpha {ALPHA:g}, p {PROB:g}, the first ten
convolutions left out (of a network of ten or fewer 60 %). *recommended*: `RankBudget()` over {STEPS} steps, with the
library's defaults. *merges*: filters that a step rewrites with the weights as they are, expected at the published
threshold, the mean of the first {AT_ONCE} steps with a budget; of how many filters. *acting*: layers that merge in
{STEPS} steps. *rank*: mean over the layers of the effective rank as a share of the highest possible, before → after
{STEPS} steps of merging **without training in between**, which repairs nothing; *worst*: what the layer that loses most
keeps of its rank. *dead*: filters that are zero or have a hundredth of their layer's median norm; *twins*: filters with
another one of a similarity above 0.99.
Depthwise layers have one filter per group: merging does nothing to them, and they are in none of the other columns.

"""


def write(out: Path) -> list[Path]:
    """Write the page and the figure of a folder's results; nothing where there are none."""
    lines = read(out)
    if not lines:
        return []
    page = out / f"{NAME}.md"
    page.write_text(f"{HEAD}{_table(lines)}\n![{NAME}]({NAME}.svg)\n\n{_by_layer(lines)}\n{_sources(lines)}")
    return [page, *write_figure(lines, out)]


def answer(lines: Sequence[dict[str, Any]], folder: str) -> str:
    """What they come to, in a few sentences, each number from the result file."""
    few = [line for line in lines if merges_of(line[PUBLISHED], PUBLISHED)[0] < FEW]
    many = [line for line in lines if line not in few]

    def span(values: Sequence[float], form: str) -> str:
        low, high = min(values), max(values)
        return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"

    text = f"**{len(lines)} networks that others trained** ([table]({folder}/{NAME}.md)), at the paper's own setting: "
    parts = []
    if few:
        merges = [merges_of(line[PUBLISHED], PUBLISHED)[0] for line in few]
        parts.append(f"in {len(few)} next to nothing merges, {span(merges, '.2f')} filters per step ({_names(few)})")
    if many:
        found = [merges_of(line[PUBLISHED], PUBLISHED) for line in many]
        shares = [100 * share for _, share in found if share is not None]
        worst = [line[PUBLISHED]["worst"] for line in many]
        parts.append(
            f"in {len(many)} there are 1x1 convolutions, and in them merge {span([one for one, _ in found], '.0f')} "
            f"filters per step ({span(shares, '.0f')} % of all merges; {_names(many)}); {STEPS} steps without training "
            f"leave a layer {span([100 * one for one in worst], '.0f')} % of its rank in the worst case"
        )
    kept = [100 * line[RECOMMENDED]["rank"][1] / line[RECOMMENDED]["rank"][0] for line in lines]
    return f"{text}{'; '.join(parts)}. As recommended the layers keep {span(kept, '.0f')} % of their rank on average."


def _names(lines: Sequence[dict[str, Any]]) -> str:
    return ", ".join(line["name"].partition(" (")[0] for line in lines)


def _table(lines: Sequence[dict[str, Any]]) -> str:
    head = ["network", "convolutions", "depthwise", "setting", "layers", "merges", "of filters", "in 1x1", "acting",
            "rank", "worst", "dead", "twins"]  # fmt: skip
    body = []
    for line in lines:
        for label in (PUBLISHED, RECOMMENDED):
            one = line[label]
            merges, pointwise = merges_of(one, label)
            first = label == PUBLISHED
            body.append([
                line["name"] if first else "", str(line["convolutions"]) if first else "",
                str(line["depthwise"]) if first else "", label, str(one["layers"]), _number(merges),
                str(one["filters"]), "–" if pointwise is None else f"{100 * pointwise:.0f} %", str(one["acting"]),
                f"{one['rank'][0]:.2f} → {one['rank'][1]:.2f}", f"{100 * one['worst']:.0f} %", str(one["dead"]),
                str(one["twins"]),
            ])  # fmt: skip
    return table(head, body)


def _number(value: float) -> str:
    return "0" if not value else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _by_layer(lines: Sequence[dict[str, Any]]) -> str:
    """The layers in which most merges, as published."""
    body = []
    for line in lines:
        layers = sorted(line[PUBLISHED]["by_layer"], key=lambda layer: -layer["expected"])
        for place, layer in enumerate([one for one in layers if one["expected"] > 0][:3]):
            body.append([
                line["name"] if place == 0 else "", f"`{layer['name']}`", str(layer["filters"]), str(layer["elements"]),
                "1x1" if layer["pointwise"] else "larger", _number(layer["expected"]),
                f"{layer['rank'][0]:.2f} → {layer['rank'][1]:.2f}",
            ])  # fmt: skip
    text = "The three layers in which most merges as published; all layers are in the result file.\n\n"
    return text + table(["network", "layer", "filters", "elements", "kernel", "merges", "rank"], body)


def _sources(lines: Sequence[dict[str, Any]]) -> str:
    return "Weights:\n\n" + "".join(f"- {line['name']}: {line['source']}\n" for line in lines)


def draw(axis: Any, lines: Sequence[dict[str, Any]]) -> None:
    """A row for every network: its mean rank before, and after merging in both ways."""
    for place, line in enumerate(reversed(lines)):
        for label, colour, offset in ((PUBLISHED, COLOURS[1], 0.16), (RECOMMENDED, COLOURS[0], -0.16)):
            before, after = line[label]["rank"]
            axis.plot([before, after], [place + offset] * 2, "-", color=colour, linewidth=1.2)
            axis.plot(before, place + offset, "|", color=colour, markersize=7)
            axis.plot(after, place + offset, "o", color=colour, markersize=4.5)
            merges = merges_of(line[label], label)[0]
            axis.text(1.01, place + offset, _number(merges), color=colour, fontsize=7, va="center")
    axis.set_yticks(range(len(lines)), [line["name"].partition(" (")[0] for line in reversed(lines)], fontsize=8)
    lowest = min(line[label]["rank"][1] for line in lines for label in (PUBLISHED, RECOMMENDED))
    axis.set_xlim(math.floor(10 * lowest) / 10 - 0.02, 1.0)
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.set_xlabel(f"effective rank, share of the highest: | before, ● after {STEPS} steps without training")
    axis.text(1.01, len(lines) - 0.35, "merges\nper step", fontsize=7, va="bottom")
    for label, colour in ((PUBLISHED, COLOURS[1]), (RECOMMENDED, COLOURS[0])):
        axis.plot([], [], "o-", color=colour, markersize=4.5, label=label)
    axis.legend(fontsize=8, loc="lower left", frameon=False)


def write_figure(lines: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write the figure of all networks."""
    matplotlib = require("matplotlib", "matplotlib")
    matplotlib.use("agg")
    plt = require("matplotlib.pyplot", "matplotlib")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 1.4 + 0.36 * len(lines)), layout="constrained")
        draw(axis, lines)
        axis.set_title("Trained networks: what merging alone does to their filters", fontsize=10)
        target = out / f"{NAME}.svg"
        figure.savefig(target, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return [target]
