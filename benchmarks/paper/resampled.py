"""Intervals over seeds *and* test images of what a plan of forward-only merging confirmed.

Student's interval over seeds says what other seeds would give on the same test images. These are few, so a bootstrap
(Efron 1979) draws them with replacement, too. It needs the scores of every image, which result files do not hold: the
runs are made again in a folder beside them, and must come out as they were.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from .compare import has_diverged, two_level_bootstrap
from .config import BASELINE, Run
from .forward_only import DEFAULT, MERGING, METRIC, confirmed_results, read_plan
from .grid import Where, execute, scores_path
from .metrics import auc
from .storage import load_result

STAGE = "images"
REPEATS = 500
OTHER = "non-noise AUC"


def resampled_path(plan: Path) -> Path:
    """Where the intervals of a plan are."""
    return plan.with_name(plan.name.replace(".plan.", ".images."))


def resample(path: Path, where: Where) -> Path:
    """Make the runs of no merging and of the library's default again, and write the intervals of their difference.

    Args:
        path: of the plan.
        where: of its results.

    Raises:
        ValueError: there is no plan, it is not done, or a run came out otherwise than it is stored.
    """
    recipe, arms, seeds, digest = read_plan(path)
    _, found = confirmed_results(path)
    if len(found[""]) < len(seeds):
        raise ValueError(f"{path}: {len(found[''])} of {len(seeds)} seeds are done; run confirm first")
    arm = arms[DEFAULT if DEFAULT in arms else MERGING]
    again = dataclasses.replace(where, out=where.out / "checkpoints" / "scores")
    runs = [(Run(recipe, BASELINE, seed, "test", True, digest), Run(recipe, arm, seed, "test", True, digest))
            for seed in seeds]  # fmt: skip
    execute([run for pair in runs for run in pair], again)
    for run in (run for pair in runs for run in pair):
        new, old = (load_result(out, run.key()) for out in (again.out, where.out))
        other = [key for key in ("digests", "metrics", "recomputed") if new[key] != old[key]]
        if other:
            raise ValueError(
                f"{again.out}: {run.key()} has other {', '.join(other)} than in {where.out}: made with other versions? "
                "(delete the folder to start over)"
            )
    sound = [pair for pair in runs if not any(has_diverged(load_result(where.out, run.key())) for run in pair)]
    scores = [[dict(np.load(scores_path(again.out, run))) for run in pair] for pair in sound]
    kinds = [key for key in scores[0][0] if key not in ("labels", "clean") and not key.startswith("noise-")]
    content: dict[str, Any] = {"plan": digest, "arm": arm.label(), "seeds": len(sound), "repeats": REPEATS}
    for metric, names in ((METRIC, kinds), (OTHER, [kind for kind in kinds if "noise" not in kind])):
        pairs = [([a[name] for name in names], [b[name] for name in names]) for a, b in scores]
        mean, low, high = two_level_bootstrap(scores[0][0]["labels"], pairs, auc, repeats=REPEATS)
        content[metric] = {"d_mean": 100 * mean, "d_low": 100 * low, "d_high": 100 * high}
    target = resampled_path(path)
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{target}: {content}")
    return target


def said(plan: Path) -> str:
    """What was found, in a sentence; nothing where it was not looked for.

    Args:
        plan: path of the plan.

    Raises:
        ValueError: it is of another plan.
    """
    target = resampled_path(plan)
    if not target.exists():
        return ""
    content = json.loads(target.read_text())
    if content["plan"] != read_plan(plan)[3]:
        raise ValueError(f"{target}: is of plan {content['plan']}, not of {plan}; delete it and run {STAGE} again")
    each = (
        f"{metric} {content[metric]['d_mean']:+.2f} [{content[metric]['d_low']:+.2f}, {content[metric]['d_high']:+.2f}]"
        for metric in (METRIC, OTHER)
    )
    label = content["arm"]
    return f"{label[0].upper()}{label[1:]}, over seeds and images: {', '.join(each)}."
