"""``FORWARD_ONLY.md``: what the plans of forward-only merging have confirmed, from plans and result files alone."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markers

from . import resampled
from .compare import FEWEST, RECOMPUTED, TRAINED, has_diverged, holm, paired
from .config import Arm
from .forward_only import (
    ADDED,
    ANGLE,
    ANGLE_DEFAULT,
    BOTH,
    COLUMNS,
    DEFAULT,
    DROPCONNECT,
    DROPOUT,
    LASTING,
    MERGING,
    METRIC,
    NAME,
    NOISE,
    OTHER_METRIC,
    RULE,
    confirmed_results,
    differences,
    named,
    value_of,
)
from .tables import difference_text, table

PAGE = "FORWARD_ONLY.md"
SAID = (METRIC, OTHER_METRIC, "corrupted acc", "noise AUC", "AUC", "acc")  # in the sentences at the top
PAIRS = (
    (MERGING, NOISE),
    (MERGING, ANGLE),
    (DEFAULT, ANGLE_DEFAULT),
    (MERGING, DROPCONNECT),
    (MERGING, DROPOUT),
    (BOTH, MERGING),
    (BOTH, DROPOUT),
)
README_ARMS = (MERGING, ANGLE, DEFAULT, ANGLE_DEFAULT, NOISE, DROPCONNECT, DROPOUT, BOTH)
BEGIN, END = "<!-- forward-only: begin (python -m benchmarks.paper report) -->", "<!-- forward-only: end -->"
HEAD = """# Forward-only merging: does it help?

Merging that lasts for one forward and backward pass (`InMerge(lasting=False)`), against no merging, against Gaussian
noise that moves the same filters as far, against DropConnect and Dropout2d on the same layers, together with Dropout2d,
and against lasting merging as published. Written by `python -m benchmarks.paper report` from `{folder}/{name}.*`.

Settings were chosen on corrupted *validation* images; each plan was committed before a test image was looked at by
its seeds, which are fresh. (The test images are those of [RESULTS.md](RESULTS.md), and small: other seeds have seen
them.) All arms of a seed start from the same weights and see the same images in the same order. Every arm is measured
twice: as trained, and with batch-norm statistics **recomputed** by one pass over the training images with the final
weights, because training at changed weights leaves statistics behind that imitate robustness. A gain counts only if
it is there with recomputed statistics, in AUC, which no shift of the decision threshold moves. There was no reseeded
baseline and no attack here. Intervals are over seeds, which share the test images. Each family was tried at the few
settings in the tables below, Dropout2d up to 0.3: more of it may gain more.
{angle}{images}
{rule}
"""
WITH_ANGLE = """
Noise of the same norm moves a filter as far as merging, but turns it less: merging with alpha 0.5 turns a filter by 45
degrees where its partner has nothing to do with it, noise of that length by 35. It also leaves it longer, and before a
batch norm, where the length changes no output, a longer filter has a smaller gradient. So a control was *added* when
the other results were known: *noise at the angle* gives a filter the norm, the angle and the distance that merging
would, in a random direction instead of that of another filter. It was not tuned, merging was; its plan was committed
before its runs, which have the seeds of the others. The last epoch's training loss, at the changed weights, stands in
the tables: what raises it more disturbs more.
"""
WITH_IMAGES = """
Intervals *over seeds and images* draw both with replacement (a bootstrap, {repeats} times), as if the test images were
others, too. They are of the same runs, which were made again for the scores of every image.
"""
NOTE = """\
d: paired difference to no merging, *recomputed* to *recomputed* and *as trained* to *as trained*, in percentage points,
with its 95 % interval (Student's t over seeds; none for fewer than three). \\* p < 0.05; \\*\\* p < 0.05 after Holm's
correction over the planned arms of the table, of an added one over all. Corrupted: mean over the kinds of
[robustness.py](robustness.py) at severity {severity}, *non-noise* over the nine that are no pixel noise; noise: mean
over three levels. ECE: expected calibration error over 15 bins, lower is better. *merges* are filters per step,
*loss* is the mean training loss of the last epoch, at the changed weights where an arm changes them. *failed*: seeds
that diverged, which enter no comparison, and seeds whose filters collapsed.
"""


def write(out: Path) -> Path | None:
    """Write the page beside the folder of results; None if there is no plan."""
    plans = sorted(out.glob(f"{NAME}.*.plan.json"), key=_order)
    if not plans:
        return None
    rule = textwrap.fill(f"The rule: {RULE}.", 120)
    angle = WITH_ANGLE if any(ANGLE in confirmed_results(path)[0] for path in plans) else ""
    images = WITH_IMAGES.format(repeats=resampled.REPEATS) if any(map(resampled.said, plans)) else ""
    parts = [HEAD.format(folder=out.name, name=NAME, rule=rule, angle=angle, images=images), "## In short\n"]
    parts += [f"- {sentence(path)}" for path in plans]
    parts.append("")
    parts += [section(path) for path in plans]
    target = out.parent / PAGE
    target.write_text("\n".join(parts).rstrip() + "\n")
    print(f"written: {target}")
    return target


def readme_section(out: Path) -> str:
    """The table of README.md beside it: what was chosen and its controls, of every plan that has enough seeds."""
    body = []
    for path in sorted(out.glob(f"{NAME}.*.plan.json"), key=_order):
        arms, found = confirmed_results(path)
        recipe = json.loads(path.read_text())["recipe"]
        where = named(recipe, len(found[""]))
        for family in README_ARMS if len(found[""]) >= FEWEST else ():
            if family in arms:
                values = (paired(differences(found[family], found[""], column)) for column in SAID)
                body.append([where, arms[family].label(), *map(difference_text, values)])
                where = ""
    return table(["data, network", "training", *(f"d {column}" for column in SAID)], body)


def updated(readme: str, section: str) -> str:
    """That page with another section between this command's markers, see :func:`benchmarks.markers.updated`."""
    return markers.updated(readme, BEGIN, END, section)


def _order(path: Path) -> tuple[bool, str]:
    return bool(json.loads(path.read_text())["source"].startswith("taken")), path.name


def _title(content: Mapping[str, Any]) -> str:
    recipe = content["recipe"]
    start = "continued from one backbone" if recipe["backbone_epochs"] else "no backbone: all epochs in the arms"
    return f"{recipe['data'].removesuffix('.npz')}, {recipe['model']}, {start}"


def sentence(path: Path) -> str:
    """What a plan came to, in a few lines."""
    title = f"**{_title(json.loads(path.read_text()))}**"
    arms, found = confirmed_results(path)
    count = len(found[""])
    if count < FEWEST:
        return f"{title}: planned, {count or 'no'} seed{'s' * (count != 1)} run, too few to compare."

    def against_none(family: str, columns: Sequence[str] = SAID) -> str:
        each = {column: paired(differences(found[family], found[""], column)) for column in columns}
        return ", ".join(f"{column} {difference_text(value)}" for column, value in each.items() if value.n)

    def verdict(one: str, other: str) -> str:
        value = paired(differences(found[one], found[other], METRIC))
        word = "better than" if value.low > 0 else "worse than" if value.high < 0 else "not to be told from"
        return f"{word} {names[other]} ({difference_text(value)})"

    names = {
        MERGING: "merging alone",
        NOISE: "noise of the same norm",
        ANGLE: "noise at the angle",
        ANGLE_DEFAULT: "noise at its angle",
        DROPOUT: "Dropout2d",
        DROPCONNECT: "DropConnect",
    }
    lines = [f"{title}, {count} seeds. {arms[MERGING].label().capitalize()}: d {against_none(MERGING)}."]
    controls = [verdict(MERGING, other) for other in (NOISE, ANGLE, DROPCONNECT, DROPOUT) if other in arms]
    if controls:
        lines.append(f"In {METRIC} it is {', '.join(controls)}.")
    if DEFAULT in arms:
        beside = f"; {METRIC} {verdict(DEFAULT, ANGLE_DEFAULT)}" if ANGLE_DEFAULT in arms else ""
        lines.append(
            f"With the library's default, {arms[DEFAULT].label().partition(', ')[2]}: {against_none(DEFAULT)}{beside}."
        )
    over_images = resampled.said(path)
    if over_images:
        lines.append(over_images)
    if BOTH in arms:
        beside = [verdict(BOTH, other) for other in (MERGING, DROPOUT) if other in arms]
        lines.append(f"Merging with Dropout2d: {against_none(BOTH)}; {' and '.join(beside)}.")
    if LASTING in arms:
        lines.append(f"Lasting merging as published: {against_none(LASTING, SAID[:1])}.")
    return " ".join(lines)


def section(path: Path) -> str:
    """A plan's tables."""
    content = json.loads(path.read_text())
    arms, found = confirmed_results(path)
    recipe, base = content["recipe"], list(found[""].values())
    parts = [f"## {_title(content)}\n"]
    if base:
        parts += [_setup(recipe, base, len(content["seeds"])), _table(arms, found), _pairs(arms, found)]
        parts.append(NOTE.format(severity=recipe["severities"][0]))
    parts.append(_search(content))
    return "\n".join(parts)


def _setup(recipe: Mapping[str, Any], base: Sequence[Mapping[str, Any]], planned: int) -> str:
    counts = "/".join(map(str, base[0]["data"]["images"]))
    epochs = (
        f"{recipe['backbone_epochs']} backbone epochs (learning rate {recipe['high']:g} to {recipe['middle']:g}), then "
        if recipe["backbone_epochs"] else ""
    )  # fmt: skip
    norm = "" if base[0]["batch_norms"] else " The network has no batch norm: nothing to recompute."
    kind = ", bfloat16 autocast" if recipe["bf16"] else ""
    level = ", ".join(f"{column} {np.nanmean([value_of(one, column) for one in base]):.2f}" for column in COLUMNS)
    return (
        f"{counts} training/validation/test images; {recipe['optimizer']}, batch {recipe['batch_size']}, weight decay "
        f"{recipe['weight_decay']:g}, {epochs}{recipe['arm_epochs']} epochs in every arm (from {recipe['middle']:g} to "
        f"{recipe['low']:g}){kind}; {len(base)} of {planned} planned seeds.{norm} Without merging, statistics "
        f"recomputed, in percent: {level}.\n"
    )


def _table(arms: Mapping[str, Arm], found: Mapping[str, Mapping[int, Any]]) -> str:
    rows = []
    for evaluation, name in ((RECOMPUTED, RECOMPUTED), (TRAINED, "as trained")):
        values = {
            family: {column: paired(differences(results, found[""], column, evaluation)) for column in COLUMNS}
            for family, results in found.items()
            if family and results
        }
        planned = [family for family in values if family not in ADDED]
        for column in COLUMNS:  # what was added later takes nothing from what was planned
            p = {family: each[column].p for family, each in values.items()}
            adjusted = dict(zip(p, holm(list(p.values())), strict=True))
            adjusted |= dict(zip(planned, holm([p[family] for family in planned]), strict=True))
            for family, each in values.items():
                each[column] = dataclasses.replace(each[column], p_holm=adjusted[family])
        rows += [(family, name, each) for family, each in values.items()]
    order = list(found)
    body = [
        [arms[family].label(), name, *_counts(found[family]), *map(difference_text, each.values())]
        for family, name, each in sorted(rows, key=lambda row: order.index(row[0]))
    ]
    shift = [
        paired([value_of(one, column, TRAINED) - value_of(one, column) for one in found[""].values()])
        for column in COLUMNS
    ]
    body.append(["no merging", "as trained − recomputed", *_counts(found[""]), *map(difference_text, shift)])
    return table(["arm", "statistics", "n", "merges", "loss", "failed", *(f"d {column}" for column in COLUMNS)], body)


def _counts(results: Mapping[int, Any]) -> list[str]:
    merges = [one["merging"]["per_step"] for one in results.values() if one["merging"] is not None]
    diverged = sum(map(has_diverged, results.values()))
    collapsed = sum(one["filters"]["collapsed"] for one in results.values())
    failed = ", ".join(f"{count} {word}" for count, word in ((diverged, "diverged"), (collapsed, "collapsed")) if count)
    loss = np.mean([one["loss"][-1] for one in results.values() if one["loss"]])
    return [str(len(results)), f"{np.mean(merges):.2f}" if merges else "–", f"{loss:.3f}", failed or "0"]


def _pairs(arms: Mapping[str, Arm], found: Mapping[str, Mapping[int, Any]]) -> str:
    body = [
        [f"{arms[one].label()} − {arms[other].label()}",
         *(difference_text(paired(differences(found[one], found[other], column))) for column in COLUMNS)]
        for one, other in PAIRS
        if found.get(one) and found.get(other)
    ]  # fmt: skip
    if not body:
        return ""
    return "Arm against arm, statistics recomputed, not corrected for their number:\n\n" + table(
        ["difference", *(f"d {column}" for column in COLUMNS)], body
    )


def _search(content: Mapping[str, Any]) -> str:
    if not content["search"]:
        return f"Settings: {content['source']}.\n"
    body = []
    for label, one in content["search"].items():
        gain = "–" if one["d_mean"] is None else f"{one['d_mean']:+.2f}"
        body.append([label, one["family"], gain, str(one["failed"])])
    return f"Where the settings come from: {content['source']} on validation images.\n\n" + table(
        ["setting", "family", f"d {METRIC}", "failed"], body
    )
