"""The first page of the results: what all experiments come to, counted, and one figure of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inmerge_fast.demo.data import require

from . import controls_page, forward_only, trained, trained_page
from .compare import FEWEST, Paired, Row, paired
from .config import PAPER, Arm
from .figures import COLOURS, STYLE
from .tables import CALIBRATION, SHOWN, rows_of

FIGURE = "all.svg"
METRIC = "corrupted AUC"
VALIDATION = "search"  # the one experiment that is measured on validation images


@dataclass(frozen=True)
class Setting:
    """One setting on one recipe: where it stands, and its row."""

    experiment: str
    recipe: str
    row: Row


def settings_of(manifests: Sequence[Path]) -> list[Setting]:
    """All settings of lasting merging, measured on test images with enough seeds for an interval, once each."""
    found: dict[tuple[str, str], Setting] = {}
    for path in manifests:
        if path.name.startswith(f"{VALIDATION}."):
            continue
        for recipe, rows in rows_of(path):
            # With MedMNIST-C's corruptions the same networks are measured a second time.
            for row in rows if "-medmnistc-" not in recipe else ():
                here = found.get((recipe, row.label))  # several experiments share the paper's own setting
                lasts = row.merging is not None and row.merging.get("lasting", True)
                if lasts and row.n >= FEWEST and (here is None or row.n > here.row.n):
                    found[recipe, row.label] = Setting(path.stem, recipe, row)
    return list(found.values())


def answer(settings: Sequence[Setting], manifests: Sequence[Path], out: Path) -> str:
    """The answer: a table and a few lines, each number counted from the result files."""
    lines = controls_page.lasting_answer(out)
    lines += [_lasting(settings), f"{_published(settings)} {_collapse(settings)}"] if settings else []
    lines += controls_page.forward_only_answer(out)
    lines += controls_page.fine_tuned(manifests)
    networks = trained.read(out)
    lines += [trained_page.answer(networks, out.name)] if networks else []
    short = controls_page.answer_table(manifests, out)
    return (f"{short}\n" if short else "") + "\n".join(f"- {line}" for line in lines) + "\n"


Compared = tuple[Setting, str, Paired]


def _sorted(settings: Sequence[Setting], metrics: Sequence[str]) -> tuple[list[Compared], list[Compared], int]:
    """Gains and losses after Holm's correction, and the number of comparisons; a smaller error is a gain."""
    each = [(one, metric, one.row.judged(metric)) for one in settings for metric in metrics]
    each = [item for item in each if not math.isnan(item[2].mean)]
    sure = [item for item in each if item[2].p_holm < 0.05]
    better = [item for item in sure if (item[2].mean > 0) != (item[1] in CALIBRATION)]
    return better, [item for item in sure if item not in better], len(each)


def _by_collapse(gains: Sequence[Compared], losses: Sequence[Compared]) -> tuple[str, str]:
    """Counts where no filters collapsed, and where some did."""
    none, some = (
        _counted(*(sum(bool(one.row.collapsed) == state for one, _, _ in those) for those in (gains, losses)))
        for state in (False, True)
    )
    return none, some


def _lasting(settings: Sequence[Setting]) -> str:
    gains, losses, compared = _sorted(settings, SHOWN)
    better, worse, _ = _sorted(settings, CALIBRATION)
    none, some = _by_collapse(gains, losses)
    recipes = len({one.recipe for one in settings})
    named = ", ".join(
        f"{metric} {value.mean:+.2f} ({one.recipe}: {one.row.label})" for one, metric, value in (*gains, *better)
    )
    text = (
        f"**Lasting merging in {len(settings)} cases** ({len({one.row.label for one in settings})} settings on "
        f"{recipes} pairs of data and recipe), {compared} comparisons with no merging on test images in "
        f"{', '.join(SHOWN)}, after Holm's correction within each table. Where no filters "
        f"collapsed: **{none}**; where some did: {some}. In {' and '.join(CALIBRATION)}, counted apart: "
        "{} where none did, {} where some did.".format(*_by_collapse(better, worse))
    )
    text += f" The gains: {named}." if named else ""
    unchecked = sum(one.row.recomputed.n < one.row.n for one in settings)
    gone = [
        f"{metric} {value.mean:+.2f} ({one.recipe}: {one.row.label})"
        for one in settings
        for metric, value in one.row.trained.difference.items()
        if metric in SHOWN and value.p_holm < 0.05 and value.mean > 0
        and not (one.row.judged(metric).p_holm < 0.05 and one.row.judged(metric).mean > 0)
    ]  # fmt: skip
    if unchecked:
        text += f" {unchecked} of the cases were measured as trained only."
    if gone:
        text += f" Gains as trained that recomputed statistics do not confirm: {', '.join(gone)}."
    return text


def _counted(gains: int, losses: int) -> str:
    return f"{gains} gain{'s' * (gains != 1)} and {losses} loss{'es' * (losses != 1)}"


def _published(settings: Sequence[Setting]) -> str:
    own = {Arm(PAPER).label(), f"{Arm(PAPER).label()}, Linear"}
    rows = [one.row for one in settings if one.row.label in own]
    if not rows:
        return "The paper's own setting was not run."
    idle = sum(row.identical for row in rows)
    runs = sum(row.n for row in rows)
    merges = [row.per_step for row in rows]
    return (
        f"At the paper's own setting {min(merges):.2g} to {max(merges):.2g} filters merge per step in these tables, "
        f"{np.median(merges):.2g} in the median recipe; {idle} of {runs} runs end with the weights of no merging, bit "
        "for bit."
    )


def _collapse(settings: Sequence[Setting]) -> str:
    collapsed = [one for one in settings if one.row.collapsed]
    active = [one for one in settings if one.row.per_step >= 1]
    both = sum(one.row.collapsed > 0 for one in active)
    return (
        f"Where it acts, filters grow alike: in {both} of the {len(active)} cases that merge at least one filter "
        f"per step a layer lost half of its effective rank in some seed ({len(collapsed)} of all {len(settings)})."
    )


def write_figure(settings: Sequence[Setting], out: Path) -> Path | None:
    """Write the figure of all settings; None if there are none."""
    if not settings:
        return None
    matplotlib = require("matplotlib", "matplotlib")
    matplotlib.use("agg")
    plt = require("matplotlib.pyplot", "matplotlib")
    with plt.rc_context(STYLE):
        networks = trained.read(out)
        figure, axes = plt.subplots(
            1, 1 + bool(networks), figsize=(7.2 * (1 + bool(networks)), 4.8), squeeze=False, layout="constrained"
        )
        axis = axes[0, 0]
        if networks:
            trained_page.draw(axes[0, 1], networks)
            axes[0, 1].set_title("Trained networks: what merging alone does to their filters", fontsize=10)
        for one in settings:
            filled = {"markerfacecolor": "white"} if one.row.collapsed else {}
            _point(axis, one.row.per_step, one.row.judged(METRIC), "o", COLOURS[0], **filled)
        for _, _, found in forward_only.confirmations(out):
            results = found.get(forward_only.MERGING, {})
            value = paired(forward_only.differences(results, found[""], METRIC))
            if value.n >= FEWEST:
                merges = float(np.mean([one["merging"]["per_step"] for one in results.values()]))
                _point(axis, merges, value, "D", COLOURS[1])
        for marker, colour, face, name in (
            ("o", COLOURS[0], COLOURS[0], "lasting merging"),
            ("o", COLOURS[0], "white", "lasting, filters collapsed in some seed"),
            ("D", COLOURS[1], COLOURS[1], "forward-only merging"),
        ):
            axis.plot([], [], marker, color=colour, markerfacecolor=face, markersize=5, label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(-0.002, 1.5 * axis.get_xlim()[1])
        axis.set_xlabel("filters merged per step")
        axis.set_ylabel(f"difference in {METRIC}, points")
        axis.set_title("Small networks: every setting against no merging, 95 % intervals", fontsize=10)
        axis.legend(fontsize=8, loc="lower left", frameon=False)
        target = out / FIGURE
        figure.savefig(target, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return target


def _point(axis: object, place: float, one: Paired, marker: str, colour: str, **filled: str) -> None:
    error = None if math.isnan(one.low) else [[one.mean - one.low], [one.high - one.mean]]
    axis.errorbar(  # type: ignore[attr-defined]
        place, one.mean, yerr=error, fmt=marker, color=colour, markersize=4.5, elinewidth=0.7, capsize=0, **filled
    )
