"""The table of ``RESULTS.md`` with merging beside what is known to help, all with recomputed statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import forward_only
from .compare import FEWEST, Row, paired
from .forward_only import BOTH, DEFAULT, DROPCONNECT, DROPOUT, LASTING, MERGING, NOISE, confirmed_results
from .tables import difference_text, read_manifest, rows_of, table

SHOWN = ("acc", "AUC", "ECE", "corrupted AUC", "corrupted ECE", "noise AUC")
FAMILIES = (LASTING, MERGING, DEFAULT, NOISE, DROPCONNECT, DROPOUT, BOTH)
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
    """A sentence on each network that was fine-tuned."""
    said = []
    for where, rows in fine_tunings(manifests):
        pairs = [
            (row.label, *(difference_text(row.recomputed.difference[key]) for key in ("AUC", "corrupted AUC")))
            for row in rows
            if row.recomputed.difference
        ]
        text = "; ".join(f"{label} {first} and {second}" for label, first, second in pairs)
        said.append(f"**Fine-tuning** ({where}, statistics recomputed), d AUC and d corrupted AUC: {text}.")
    return said
