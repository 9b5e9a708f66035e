"""The table of ``RESULTS.md`` with merging beside what is known to help, all with recomputed statistics."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import forward_only
from .compare import FEWEST, Row, paired
from .experiments import FINE_TUNE_ARMS
from .forward_only import (
    ANGLE,
    ANGLE_DEFAULT,
    BOTH,
    DEFAULT,
    DROPCONNECT,
    DROPOUT,
    LASTING,
    MERGING,
    NOISE,
    confirmations,
)
from .tables import SHOWN as COUNTED
from .tables import difference_text, gains_and_losses, read_manifest, rows_of, table

SHOWN = ("acc", "AUC", "ECE", "corrupted acc", "corrupted AUC", "non-noise AUC", "corrupted ECE", "noise AUC")
FAMILIES = (LASTING, MERGING, ANGLE, DEFAULT, ANGLE_DEFAULT, NOISE, DROPCONNECT, DROPOUT, BOTH)
IN_ANSWER = {LASTING: "lasting, as published", DEFAULT: "forward-only, default",
             ANGLE_DEFAULT: "noise at the default's angle", MERGING: "forward-only, as chosen",
             ANGLE: "noise at its angle", NOISE: "noise as large", DROPCONNECT: "DropConnect", DROPOUT: "Dropout2d",
             BOTH: "forward-only and Dropout2d"}  # fmt: skip
FINE_TUNED = {LASTING: "paper", DEFAULT: "forward-only", ANGLE_DEFAULT: "equal-angle-noise",
              NOISE: "equal-norm-noise", DROPCONNECT: "dropconnect", DROPOUT: "dropout",
              BOTH: "forward-only+dropout"}  # fmt: skip
ALL_KINDS, OTHER_KINDS = forward_only.METRIC, forward_only.OTHER_METRIC
IN_SHORT = """Differences in AUC to no merging, in percentage points with 95 % intervals, batch-norm statistics
recomputed in both; \\* the interval excludes 0; 0: nothing merged. *All*: mean over 13 kinds of corruption; *not
noise*: over the nine that are no pixel noise. *Default*: alpha 0.5, p 0.5, random partner; *as chosen*: on validation
images, with one or two seeds of this set-up or, in three, of another. Noise *as large* moves the filters as far as
what was chosen, noise *at the angle* of a merging turns them as far, too, all in random directions. In fine-tuning
nothing was chosen: 2 epochs and 2 in every arm on 200 images, 200 test images. –: not run, or what the default has.

"""
HEAD = """## Merging beside standard regularisers

Every arm against no merging, same seed, same start, same images in the same order; batch-norm statistics recomputed
in both. Lasting merging is the published in-place merge at its own setting; noise moves the filters as far as the
merging in its name, noise *at the angle* turns them as far, too, both in random directions; DropConnect and Dropout2d
work on the same layers. d in percentage points with 95 % intervals; \\* p < 0.05, in fine-tuning \\*\\* p < 0.05 after
Holm's correction over its arms. *Corrupted*: mean over 13 kinds of corruption at severity 4, *non-noise* over the nine
that are no pixel noise; *noise*: Gaussian, of three strengths. *ECE*: expected calibration error (15 bins), less is
better. *merges*: filters per step.

"""


def fine_tunings(manifests: Sequence[Path]) -> Iterator[tuple[str, list[Row]]]:
    """What was fine-tuned, in words, and its rows, where enough seeds are done."""
    for path in manifests:
        if not path.name.startswith("fine-tune."):
            continue
        _, results = read_manifest(path)
        for (_, rows), arms in zip(rows_of(path), results, strict=True):
            if rows and rows[0].recomputed.n >= FEWEST:
                recipe = arms[0][0]["recipe"]
                weights = " with ImageNet weights" if recipe["model"] == "efficientnet_lite0" else ""
                seeds = f"{rows[0].recomputed.n} seeds"
                yield f"{recipe['data'].removesuffix('.npz')}, {recipe['model']}{weights}, {seeds}", rows


def section(manifests: Sequence[Path], out: Path) -> str:
    """The section; empty if nothing was run with controls."""
    body: list[list[str]] = []
    for recipe, arms, found in confirmations(out):
        where = forward_only.named(recipe, len(found[""]))
        for family in (one for one in FAMILIES if one in arms and found.get(one)):
            results = found[family]
            merges = [one["merging"]["per_step"] for one in results.values() if one["merging"] is not None]
            label = f"lasting merging, {arms[family].label()}" if family == LASTING else arms[family].label()
            each = (paired(forward_only.differences(results, found[""], key)) for key in SHOWN)
            body.append(
                [where, label, _merges(sum(merges) / len(merges) if merges else math.nan), *map(difference_text, each)]
            )
            where = ""
    for where, rows in fine_tunings(manifests):
        for row in rows:
            if row.recomputed.difference:
                values = (row.recomputed.difference[key] for key in SHOWN)
                body.append([where, row.title, _merges(row.per_step), *map(difference_text, values)])
                where = ""
    if not body:
        return ""
    return HEAD + table(["data, network", "training", "merges", *(f"d {key}" for key in SHOWN)], body)


def _merges(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def fine_tuned(manifests: Sequence[Path]) -> list[str]:
    """A sentence on each network that was fine-tuned: what differs after Holm's correction."""
    said = []
    for where, rows in fine_tunings(manifests):
        gains, losses = (", ".join(one) or "none" for one in gains_and_losses(rows, (*COUNTED, OTHER_KINDS)))
        arms = sum(row.kind == "setting" for row in rows)
        text = (
            f"**Fine-tuning** ({where}), {arms} arms against no merging, in accuracy and AUC after Holm's correction: "
            f"gains {gains}; losses {losses}."
        )
        advised = {"recommended": "recommendation for lasting", "forward-only": "default of forward-only"}
        for name, what in advised.items():
            label = FINE_TUNE_ARMS[name].label()
            for row in (row for row in rows if row.label == label):
                keys = (ALL_KINDS, "noise AUC", "AUC", "corrupted ECE")
                each = (f"{key} {difference_text(row.judged(key))}" for key in keys)
                text += f" The library's {what} merging, `{label}`: d {', '.join(each)}."
        said.append(text)
    return said


def lasting_answer(out: Path) -> list[str]:
    """A sentence on the published setting of lasting merging, where it stood beside forward-only merging."""
    each = [found for _, _, found in confirmations(out) if found.get(LASTING)]
    if not each:
        return []
    values = [paired(forward_only.differences(found[LASTING], found[""], ALL_KINDS)) for found in each]
    said = ", ".join(sorted(map(difference_text, values)))
    return [
        f"**Lasting merging as published** (threshold 0.3, alpha 0.8, p 0.3) in {len(each)} set-ups of at least "
        f"{min(value.n for value in values)} fresh seeds: d {ALL_KINDS} {said}."
    ]


def forward_only_answer(out: Path) -> list[str]:
    """A sentence on all confirmations of forward-only merging; none if there are none."""
    each = [found for _, _, found in confirmations(out)]
    if not each:
        return []

    def counted(name: str, other: str, metric: str) -> list[str]:
        both = [found for found in each if found.get(MERGING) and found.get(other, other == "")]
        values = [paired(forward_only.differences(found[MERGING], found[other], metric)) for found in both]
        above, below = (sum(test) for test in ([one.low > 0 for one in values], [one.high < 0 for one in values]))
        few = f" of {len(both)}" if len(both) < len(each) else ""
        return [f"{name} in {above}{few}" + (f" (below in {below})" if below else "")] if both else []

    rivals = {
        "no merging": "",
        "noise as large": NOISE,
        "noise at its angle": ANGLE,
        "DropConnect": DROPCONNECT,
        "Dropout2d": DROPOUT,
    }
    counts = [
        f"{metric} above that of " + ", ".join(text for rival in rivals.items() for text in counted(*rival, metric))
        for metric in (ALL_KINDS, OTHER_KINDS)
    ]
    return [
        f"**Forward-only merging, as chosen**, in the same {len(each)} set-ups, by the interval of each difference: "
        f"{'; '.join(counts)}."
    ]


def answer_table(manifests: Sequence[Path], out: Path) -> str:
    """What merging and its controls do to the AUC on corrupted images, of all kinds and without pixel noise."""
    body: list[list[str]] = []

    def add(where: str, cells_of: Callable[[str], list[str]]) -> None:
        body.extend([[where, "all", *cells_of(ALL_KINDS)], ["", "not noise", *cells_of(OTHER_KINDS)]])

    def of_plan(found: dict[str, Any], metric: str) -> list[str]:
        results = dict(found)
        if DEFAULT not in found:  # the plan chose it
            results |= {DEFAULT: found.get(MERGING, {}), ANGLE_DEFAULT: found.get(ANGLE, {})}
        each = (paired(forward_only.differences(results.get(family, {}), found[""], metric)) for family in IN_ANSWER)
        cells = dict(zip(IN_ANSWER, map(difference_text, each), strict=True))
        return list((cells if DEFAULT in found else {**cells, MERGING: "the default", ANGLE: "–"}).values())

    def of_fine_tuning(rows: Sequence[Row], metric: str) -> list[str]:
        by_label = {row.label: row.recomputed.difference.get(metric) for row in rows}
        labels = (FINE_TUNE_ARMS[FINE_TUNED[family]].label() if family in FINE_TUNED else "" for family in IN_ANSWER)
        each = map(by_label.get, labels)
        # Uncorrected, as the lines above.
        return ["–" if one is None else difference_text(dataclasses.replace(one, p_holm=math.nan)) for one in each]

    for recipe, _, found in sorted(confirmations(out), key=lambda one: one[0]["data"] == "digits"):
        add(forward_only.named(recipe, len(found[""])), functools.partial(of_plan, found))
    for where, rows in fine_tunings(manifests):
        add(where, functools.partial(of_fine_tuning, rows))
    if not body:
        return ""
    return IN_SHORT + table(["data, network", "corruptions", *IN_ANSWER.values()], body)
