"""Tables from result files alone.

An experiment leaves a manifest ``<name>.json`` beside its runs, which says what belongs together. Whatever is shown is
made from manifests and runs, so that it can be made again, byte for byte.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .chestxray import LABELS
from .compare import METRICS, Evaluation, Paired, Row, compare, has_diverged
from .config import OWN, Run
from .data import without_size
from .experiments import Experiment
from .published import CHESTXRAY14, CHESTXRAY14_COLUMNS, MEDMNIST
from .storage import is_stored, load_result

SHOWN = ("acc", "AUC", "corrupted acc", "corrupted AUC", "noise AUC", "PGD 2/255 acc")
CALIBRATION = ("ECE", "corrupted ECE")  # lower is better, so counted apart
COLUMNS = (*SHOWN, "non-noise AUC", *CALIBRATION)
NOTE = (
    "In percent, mean ± sd over the seeds; d is the paired difference to the baseline of the same seed, backbone "
    "and number of epochs, *as trained* to *as trained* and *recomputed* to *recomputed*, in percentage points, "
    "with its 95 % interval (Student's t; none for fewer than three seeds). *recomputed*: with batch-norm "
    "statistics computed anew for the final weights by one pass over the training images; what merging in training "
    "does to running variances imitates robustness, so a gain counts only if it is there, too. *as trained only*: "
    "from before this was measured. *no batch norm*: nothing to recompute. ECE: "
    "expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv 1706.04599), lower is "
    "better; – where it was not measured. *non-noise AUC*: corrupted AUC without the kinds of pixel noise. "
    "\\* p < 0.05; \\*\\* p < 0.05 after Holm's correction over the settings of this table. "
    "*merges* are filters merged per step, *rank* is the effective rank of the filters before → after the arm as a "
    "share of the highest possible, *collapsed* counts the seeds where a layer lost half of it or its filters became "
    "alike, *identical* those whose weights equal the baseline's, bit for bit."
)


def manifest_name(experiment: Experiment) -> str:
    """Name of an experiment's manifest, tables and figures: the experiment and the first recipe."""
    return f"{experiment.name}.{experiment.groups[0][0].name}"


def write_manifest(experiment: Experiment, out: Path) -> Path:
    """Say which runs belong to an experiment. A manifest of the same arms with more seeds stays as it is."""
    groups = [
        {
            "recipe": recipe.name,
            "arms": [arm.label() for arm in arms],
            "runs": [[Run(recipe, arm, seed, experiment.split).key() for seed in experiment.seeds] for arm in arms],
        }
        for recipe, arms in experiment.groups
    ]
    content = {"name": experiment.name, "title": experiment.title, "figure": experiment.figure,
               "split": experiment.split, "groups": groups}  # fmt: skip
    path = out / f"{manifest_name(experiment)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        more = [arm for group in json.loads(path.read_text())["groups"] for arm in group["runs"]]
        fewer = [arm for group in groups for arm in group["runs"]]
        if len(more) == len(fewer) and all(set(a) > set(b) for a, b in zip(more, fewer, strict=True)):
            return path
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read_manifest(path: Path) -> tuple[dict[str, Any], list[list[list[dict[str, Any]]]]]:
    """A manifest and the results that exist of its groups and arms."""
    manifest = json.loads(path.read_text())
    results = [
        [[load_result(path.parent, key) for key in arm if is_stored(path.parent, key)] for arm in group["runs"]]
        for group in manifest["groups"]
    ]
    return manifest, results


def rows_of(path: Path) -> list[tuple[str, list[Row]]]:
    """Rows of every recipe of a manifest; none for a recipe without a baseline."""
    manifest, results = read_manifest(path)
    return [
        (group["recipe"], compare(arms) if arms[0] else [])
        for group, arms in zip(manifest["groups"], results, strict=True)
    ]


def write_tables(path: Path) -> Path:
    """Write ``<manifest>.md`` beside a manifest: the tables, and the figure where there is something to draw."""
    target, text = path.with_suffix(".md"), markdown(path, 1)
    if any(row.kind == "setting" for _, rows in rows_of(path) for row in rows):
        text += f"\n![{path.stem}]({path.stem}.svg)\n"
    target.write_text(text)
    return target


def markdown(path: Path, level: int = 2) -> str:
    """The tables of a manifest."""
    manifest, results = read_manifest(path)
    parts = [f"{'#' * level} {manifest['title']}\n"]
    if manifest["name"] == "table-chestxray14":
        parts.append(_chestxray(results))
    for recipe, rows in rows_of(path):
        parts.append(f"{'#' * (level + 1)} {recipe}\n")
        parts.append(setup_of(rows, results, recipe, manifest) + "\n" if rows else "No runs.\n")
        if rows:
            parts += [_absolute(rows), _differences(rows)]
    if any(rows for _, rows in rows_of(path)):
        parts.append(NOTE + "\n")
    return "\n".join(parts)


def setup_of(rows: Sequence[Row], results: Any, recipe: str, manifest: Mapping[str, Any]) -> str:
    """What was done, in a sentence."""
    index = next(i for i, group in enumerate(manifest["groups"]) if group["recipe"] == recipe)
    one = results[index][0][0]
    values, about = one["recipe"], one["environment"]
    counts = "/".join(map(str, one["data"]["images"]))
    whose = "" if one["corruptions"] == OWN else f" of {one['corruptions']}"
    text = (
        f"{one['data']['name']} ({counts} training/validation/test images), measured on the {manifest['split']} "
        f"images; {values['model']}, {values['optimizer']}, batch {values['batch_size']}, weight decay "
        f"{values['weight_decay']:g}, "
        f"{values['backbone_epochs']} backbone epochs (learning rate {values['high']:g} to {values['middle']:g}), then "
        f"{values['arm_epochs']} in every arm (to {values['low']:g}); corruptions{whose} at severities "
        f"{', '.join(map(str, values['severities']))}; {about['device']}, torch {about['torch']}."
    )
    published = MEDMNIST.get(without_size(one["data"]["name"]))
    if published:
        text += " The paper's accuracy: {:.3f} ± {:.3f} without and {:.3f} ± {:.3f} with merging.".format(
            *published[0], *published[1]
        )
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|---" + "|--:" * (len(head) - 1) + "|")
    return "\n".join(lines) + "\n"


def _counts(row: Row) -> list[str]:
    merges = "–" if math.isnan(row.per_step) else f"{row.per_step:.2f}"
    rank = "–" if math.isnan(row.rank[0]) else f"{row.rank[0]:.2f} → {row.rank[1]:.2f}"
    return [merges, rank, f"{row.collapsed}/{row.n}"]


def _number(mean: float, sd: float) -> str:
    return "–" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}")


def difference_text(one: Paired) -> str:
    """A paired difference in a table."""
    if math.isnan(one.mean):
        return "–"
    if math.isnan(one.low):
        return f"{one.mean:+.2f}"
    if one.low == one.high == 0:
        return "0"
    stars = r" \*\*" if one.p_holm < 0.05 else r" \*" if one.p < 0.05 else ""
    return f"{one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}]{stars}"


def gains_and_losses(rows: Sequence[Row], metrics: Sequence[str] = SHOWN) -> tuple[list[str], list[str]]:
    """What differs from the baseline after Holm's correction, each in a few words."""
    gains: list[str] = []
    losses: list[str] = []
    for row in rows:
        for metric in metrics if row.kind == "setting" else ():
            one = row.judged(metric)
            if one.p_holm < 0.05:
                (gains if one.mean > 0 else losses).append(f"{row.label}: {metric} {one.mean:+.2f}")
    return gains, losses


def _evaluations(row: Row) -> list[tuple[str, Evaluation]]:
    """How a row was evaluated, in words, and what came out."""
    if not row.has_norm:
        return [("no batch norm", row.trained)]
    if not row.recomputed.n:
        return [("as trained only", row.trained)]
    return [("as trained", row.trained), ("recomputed", row.recomputed)]


def _absolute(rows: Sequence[Row]) -> str:
    head = ["arm", "statistics", "seeds", "merges", "rank", "collapsed", *COLUMNS]
    body = [
        [row.title, word, str(one.n), *_counts(row), *(_number(one.mean[key], one.sd[key]) for key in COLUMNS)]
        for row in rows
        for word, one in _evaluations(row)
    ]
    return table(head, body)


def _differences(rows: Sequence[Row]) -> str:
    head = ["arm", "statistics", "merges", "rank", "collapsed", "identical", *(f"d {metric}" for metric in COLUMNS)]
    body = [
        [row.title, word, *_counts(row), f"{row.identical}/{row.n}", *(difference_text(one.difference[key])
         for key in COLUMNS)]
        for row in rows
        for word, one in _evaluations(row)
        if one.difference
    ]  # fmt: skip
    return table(head, body)


def csv_of(manifests: Sequence[Path]) -> str:
    """All numbers of all tables."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["experiment", "recipe", "arm", "statistics", "metric", "seeds", "mean", "sd", "d_mean", "d_sd",
                     "d_low", "d_high", "p", "p_holm", "merges_per_step", "rank_before", "rank_after", "collapsed",
                     "identical"])  # fmt: skip
    for path in manifests:
        for recipe, rows in rows_of(path):
            for row in rows:
                writer.writerows([path.stem, recipe, *line] for line in _numbers(row))
    return out.getvalue()


def _numbers(row: Row) -> list[list[Any]]:
    def text(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.6g}"

    counts = [text(row.per_step), *map(text, row.rank), row.collapsed, row.identical]
    lines = []
    for word, found in _evaluations(row):
        for metric in METRICS:
            if math.isnan(found.mean[metric]) and not row.diverged:
                continue  # not measured
            one = found.difference.get(metric)
            names = ("mean", "sd", "low", "high", "p", "p_holm")
            pair = [text(getattr(one, name)) for name in names] if one else [""] * len(names)
            values = text(found.mean[metric]), text(found.sd[metric])
            lines.append([row.title, word, metric, found.n, *values, *pair, *counts])
    return lines


def _chestxray(results: list[list[list[dict[str, Any]]]]) -> str:
    """The published rows, and ours."""
    head = ["model", *CHESTXRAY14_COLUMNS, "mean"]
    body = [[name, *(f"{value:.3f}" for value in values)] for name, values in CHESTXRAY14.items()]
    ours = [arm for arms in results for arm in arms if arm]
    if not ours:
        empty = ["–"] * (len(head) - 1)
        body.append(["**ours**: no data, see below", *empty])
    for arm in ours:
        kept = [result for result in arm if not has_diverged(result)]
        classes = [_mean([result["metrics"]["class_auc"].get(label) for result in kept]) for label in LABELS]
        total = _mean([result["metrics"]["clean"]["auc"] for result in kept])
        seeds = f"{len(kept)} seeds" + (f", {len(arm) - len(kept)} more diverged" if len(kept) < len(arm) else "")
        name = f"**ours**: {arm[0]['arm']['label']} ({arm[0]['recipe']['model']}, {seeds})"
        body.append([name, *("–" if math.isnan(value) else f"{value:.3f}" for value in [*classes, total])])
    text = "AUROC; the first eleven rows are the paper's (arXiv 2502.20516, its table of ChestX-ray14).\n\n"
    text += table(head, body)
    if not ours:
        text += (
            "\nOur row is empty: the 112,120 images are not here. `python -m benchmarks.paper table-chestxray14 --data "
            "FOLDER` fills it from a folder in the NIH's layout.\n"
        )
    return text


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
