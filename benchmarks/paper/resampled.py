"""Intervals over seeds *and* test images of what a plan of forward-only merging confirmed.

Student's interval over seeds says what other seeds would give on the same test images. These are few, so a bootstrap
(Efron 1979) draws them with replacement, too. It needs the scores of every image, which result files do not hold: the
runs are made again in a folder beside them, and must come out as they were.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from .compare import is_noise, two_level_bootstrap
from .config import Run
from .forward_only import (
    DEFAULT,
    MERGING,
    METRIC,
    OTHER_METRIC,
    beside,
    check_done,
    confirmed_results,
    differences,
    planned_runs,
    read_plan,
    value_of,
)
from .grid import Where, execute, scores_path
from .metrics import auc
from .storage import load_result

STAGE = "images"
REPEATS = 1000


def resample(path: Path, where: Where) -> Path:
    """Make the runs of no merging and of the library's default again, and write the intervals of their difference.

    Args:
        path: of the plan.
        where: of its results.

    Raises:
        ValueError: there is no plan, it is not done, or a run came out otherwise than it is stored.
    """
    check_done(path)
    planned = planned_runs(path)
    each = (planned[""], planned[_family(planned)])
    again = dataclasses.replace(where, out=where.out / "checkpoints" / "scores")
    runs = [[dataclasses.replace(run, keep_scores=True) for run in pair] for pair in zip(*each, strict=True)]
    for some in (runs[:1], runs):  # with other versions the first seed says so
        execute([run for pair in some for run in pair], again)
        for run in (run for pair in some for run in pair):
            _check_same(run, again.out, where.out)
    results = {run: load_result(where.out, run.key()) for pair in runs for run in pair}
    sound = [pair for pair in runs if not any(np.isnan(value_of(results[run], METRIC)) for run in pair)]
    scores = [[dict(np.load(scores_path(again.out, run))) for run in pair] for pair in sound]
    kinds = [key for key in scores[0][0] if key not in ("labels", "clean") and not key.startswith("noise-")]
    content: dict[str, Any] = {
        "plan": runs[0][0].plan,
        "arm": runs[0][1].arm.label(),
        "seeds": len(sound),
        "repeats": REPEATS,
    }
    for metric, names in ((METRIC, kinds), (OTHER_METRIC, [kind for kind in kinds if not is_noise(kind)])):
        pairs = [([a[name] for name in names], [b[name] for name in names]) for a, b in scores]
        mean, low, high = two_level_bootstrap(scores[0][0]["labels"], pairs, auc, repeats=REPEATS)
        content[metric] = {"d_mean": 100 * mean, "d_low": 100 * low, "d_high": 100 * high}
    target = beside(path, STAGE)
    target.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"{target}: {content}")
    return target


def _family(arms: Collection[str]) -> str:
    """Whose runs are made again: those of the library's default."""
    return DEFAULT if DEFAULT in arms else MERGING


def _check_same(run: Run, again: Path, stored: Path) -> None:
    """Look whether a run came out as it is stored, and its scores are those that its result was made of.

    Raises:
        ValueError: it did not, or they are not.
    """
    new, old = (load_result(out, run.key()) for out in (again, stored))
    other = [key for key in ("digests", "metrics", "recomputed") if new[key] != old[key]]
    scores = np.load(scores_path(again, run))
    other += [
        f"scores of {kind}"
        for kind, levels in (new["recomputed"] or new["metrics"])["by_corruption"].items()
        for level, values in levels.items()
        if values["auc"] is not None and auc(scores["labels"], scores[f"{kind}-{level}"]) != values["auc"]
    ]
    if other:
        raise ValueError(
            f"{again}: {run.key()} has other {', '.join(other)} than in {stored}: made with other versions? "
            "(delete the folder to start over)"
        )


def said(plan: Path) -> str:
    """What was found, in a sentence; nothing where it was not looked for.

    Args:
        plan: path of the plan.

    Raises:
        ValueError: it is not of the runs that are stored.
    """
    target = beside(plan, STAGE)
    if not target.exists():
        return ""
    content = json.loads(target.read_text())
    arms, found = confirmed_results(plan)
    family, each = _family(arms), []
    for metric in (METRIC, OTHER_METRIC):
        values, one = differences(found[family], found[""], metric), content[metric]
        made_of = {"plan": read_plan(plan)[3], "arm": arms[family].label(), "seeds": len(values), "repeats": REPEATS}
        if not made_of.items() <= content.items() or abs(np.mean(values) - one["d_mean"]) > 1e-6:
            raise ValueError(f"{target}: is not of the runs of {plan}; delete it and run {STAGE} again")
        each.append(f"d {metric} {one['d_mean']:+.2f} [{one['d_low']:+.2f}, {one['d_high']:+.2f}]")
    label = arms[family].label()
    return f"{label[0].upper()}{label[1:]}, over seeds and images: {', '.join(each)}."
