"""The table of ``RESULTS.md`` with merging beside what is known to help, all with recomputed statistics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import forward_only
from .compare import FEWEST, Row, paired
from .experiments import FINE_TUNE_ARMS
from .forward_only import BOTH, DEFAULT, DROPCONNECT, DROPOUT, LASTING, MERGING, NOISE, confirmed_results
from .tables import difference_text, gains_and_losses, read_manifest, rows_of, table

SHOWN = ("acc", "AUC", "ECE", "corrupted AUC", "corrupted ECE", "noise AUC")
FAMILIES = (LASTING, MERGING, DEFAULT, NOISE, DROPCONNECT, DROPOUT, BOTH)
IN_ANSWER = {LASTING: "lasting, as published", MERGING: "forward-only, as chosen", DEFAULT: "forward-only, default",
             NOISE: "noise as large", DROPCONNECT: "DropConnect", DROPOUT: "Dropout2d",
             BOTH: "forward-only and Dropout2d"}  # fmt: skip
FINE_TUNED = {LASTING: "paper", DEFAULT: "forward-only", NOISE: "equal-norm-noise", DROPCONNECT: "dropconnect",
              DROPOUT: "dropout", BOTH: "forward-only+dropout"}  # fmt: skip
IN_SHORT = """Differences in AUC on corrupted images to no merging, in percentage points with 95 % intervals, statistics
recomputed in both; \\* the interval excludes 0. *As chosen*: on validation images;
nothing was chosen for fine-tuning. EfficientNet-Lite0 sees the images at 64 px.

"""
HEAD = """## Merging beside standard regularisers

Every arm against no merging, same seed, same start, same images in the same order; batch-norm statistics recomputed in
both. Lasting merging is the published in-place merge at its own setting; noise moves the filters as far as the merging
above it, in random directions; DropConnect and Dropout2d work on the same layers. d in percentage points with 95 %
intervals, not corrected for the number of rows; of ECE (15 bins) less is better. *merges*: filters per step.

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
    for path in sorted(out.glob(f"{forward_only.NAME}.*.plan.json")):
        arms, found = confirmed_results(path)
        if len(found[""]) < FEWEST:
            continue
        recipe = json.loads(path.read_text())["recipe"]
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
        gains, losses = (", ".join(one) or "none" for one in gains_and_losses(rows))
        arms = sum(row.kind == "setting" for row in rows)
        said.append(
            f"**Fine-tuning** ({where}, statistics recomputed), {arms} arms against no merging, after Holm's "
            f"correction: gains {gains}; losses {losses}."
        )
    return said


def forward_only_answer(out: Path) -> list[str]:
    """A sentence on all confirmations of forward-only merging; none if there are none."""
    each = [found for _, found in _confirmed(out)]
    if not each:
        return []

    def beats(other: str) -> tuple[int, int]:
        both = [found for found in each if found.get(MERGING) and found.get(other, other == "")]
        values = [paired(forward_only.differences(found[MERGING], found[other], forward_only.METRIC)) for found in both]
        return sum(value.low > 0 for value in values), sum(value.high < 0 for value in values)

    rivals = (("no merging", ""), ("noise as large", NOISE), ("DropConnect", DROPCONNECT), ("Dropout2d", DROPOUT))
    counts = "; ".join("{}: better in {}, worse in {}".format(name, *beats(family)) for name, family in rivals)
    return [
        f"**Forward-only merging**, {len(each)} pairs of data and network, settings chosen on validation images, "
        f"fresh seeds, statistics recomputed; by the interval of the difference in {forward_only.METRIC}, against "
        f"{counts}."
    ]


def answer_table(manifests: Sequence[Path], out: Path) -> str:
    """All that merging and its controls do to the corrupted AUC, one line for data and network."""
    body = []
    for path, found in _confirmed(out):
        recipe = json.loads(path.read_text())["recipe"]
        results = dict(found)
        results.setdefault(DEFAULT, found.get(MERGING, {}))  # the plan chose the default
        cells = (
            difference_text(paired(forward_only.differences(results.get(family, {}), found[""], forward_only.METRIC)))
            for family in IN_ANSWER
        )
        body.append([forward_only.named(recipe, len(found[""])), *cells])
    for where, rows in fine_tunings(manifests):
        by_label = {row.label: row.recomputed.difference.get(forward_only.METRIC) for row in rows}
        labels = [FINE_TUNE_ARMS[FINE_TUNED[family]].label() if family in FINE_TUNED else "" for family in IN_ANSWER]
        each = [by_label.get(label) for label in labels]
        # Uncorrected, as the lines above.
        texts = ["–" if one is None else difference_text(dataclasses.replace(one, p_holm=math.nan)) for one in each]
        body.append([where, *texts])
    if not body:
        return ""
    return IN_SHORT + table(["data, network", *IN_ANSWER.values()], body)


def _confirmed(out: Path) -> Iterator[tuple[Path, dict[str, dict[int, dict[str, Any]]]]]:
    for path in sorted(out.glob(f"{forward_only.NAME}.*.plan.json")):
        found = forward_only.confirmed_results(path)[1]
        if len(found[""]) >= FEWEST:
            yield path, found
