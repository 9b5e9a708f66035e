"""The search for a setting with a gain: choose on corrupted validation images, write a plan, look at the test set once.

``search`` trains six settings of the space that the paper leaves open and measures them on the *validation* images.
``plan`` chooses from those results by the rule below and writes what will be confirmed, to be committed before anything
else. ``confirm`` does the plan: fresh seeds, the test images, Holm's correction, and intervals over seeds and images.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .compare import (
    RECOMPUTED,
    TRAINED,
    Paired,
    Row,
    compare,
    has_diverged,
    holm,
    is_controlled,
    paired,
    two_level_bootstrap,
    value_of,
)
from .config import BASELINE, Arm, Merging, Recipe, Run
from .experiments import Experiment, Options, arms_of, recipes
from .grid import Where, execute, is_leader, scores_path
from .metrics import auc
from .storage import is_stored, load_result, without_nan
from .tables import manifest_name, markdown, write_manifest, write_tables

CANDIDATES = (
    Merging(z=3.0),
    Merging(z=2.5, decay=True),
    Merging(z=3.0, partner="nearest", alpha=0.9),
    Merging(z=2.5, partner="similar", prob=0.1),
    Merging(z=2.5, start=0.5),
    Merging(z=2.0, alpha=0.95, prob=0.05),
)
METRIC = "corrupted AUC"
SEARCH_SEEDS, CONFIRM_SEEDS, FIRST_FRESH_SEED = 8, 20, 100
MOST_CONFIRMED = 2
BOOTSTRAP_REPEATS = 500
RULE = (
    f"at most {MOST_CONFIRMED} settings, those with the largest mean paired difference in {METRIC} on the validation "
    "images, if it is above 0 and no seed collapsed"
)
DECISION = (
    "a gain is confirmed if p after Holm's correction over the settings confirmed is below 0.05, the mean difference "
    "is above 0, and so is the lower end of the two-level bootstrap's 95 % interval (seeds x images)"
)


def search_experiment(options: Options) -> Experiment:
    """The search: measured on validation images only."""
    seeds = tuple(range(options.seeds or (2 if options.quick else SEARCH_SEEDS)))
    arms = (BASELINE, *arms_of(options, CANDIDATES))
    return Experiment("search", "Search on validation images", ((recipes(options)[0], arms),), seeds, split="val")


def search(options: Options, where: Where) -> None:
    """Run the search and show its table."""
    experiment = search_experiment(options)
    execute(experiment.runs(), where)
    if is_leader():
        path = write_manifest(experiment, where.out)
        write_tables(path)
        print(markdown(path))


def plan_path(options: Options, out: Path) -> Path:
    """Where the plan of a data set is."""
    return out / f"plan.{recipes(options)[0].name}.json"


def plan(options: Options, where: Where) -> None:
    """Choose from the search and write the plan.

    Raises:
        ValueError: the search is not complete, or there is a plan already.
    """
    experiment, path = search_experiment(options), plan_path(options, where.out)
    if path.exists():
        raise ValueError(
            f"{path}: there is a plan already, and one that is made after its results were seen is none; to start over "
            "with other seeds, delete it"
        )
    missing = [run.key() for run in experiment.runs() if not is_stored(where.out, run.key())]
    if missing:
        raise ValueError(
            f"the search is not complete: {len(missing)} runs are missing, as {missing[0]}; run search first"
        )
    rows = compare(_results(experiment, where.out))[1:]
    sound = [pair for pair in zip(rows, CANDIDATES, strict=True) if not (pair[0].diverged or pair[0].collapsed)]
    ranked = sorted(sound, key=lambda pair: -pair[0].judged(METRIC).mean)
    chosen = [setting for row, setting in ranked if row.judged(METRIC).mean > 0][:MOST_CONFIRMED]
    first, count = FIRST_FRESH_SEED, 3 if options.quick else CONFIRM_SEEDS
    content = {
        "recipe": dataclasses.asdict(experiment.groups[0][0]),
        "metric": METRIC,
        "rule": RULE,
        "decision": DECISION,
        "search": {row.label: _searched(row) for row in rows},
        "confirm": [dataclasses.asdict(setting) for setting in chosen],
        "seeds": list(range(first, first + count)),
        "split": "test",
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(rows)} settings against no merging, difference in {METRIC} on validation images, in points:")
    for row in rows:
        fate = "diverged" if row.diverged else "filters collapsed" if row.collapsed else ""
        print(f"  {row.judged(METRIC).mean:+.2f}  {row.label}{f' ({fate})' if fate else ''}")
    if chosen:
        labels = "; ".join(setting.label() for setting in chosen)
        print(f"To be tried on the test images, with {count} seeds that nobody has seen: {labels}.")
    else:
        print("None is above 0 with its filters apart, so nothing is to be tried on the test images.")
    print(f"Written: {path}. Commit it before you run confirm: that shows that the choice came first.")


def _searched(row: Row) -> dict[str, Any]:
    mean = row.judged(METRIC).mean
    found = {"d_mean": None if math.isnan(mean) else mean, "collapsed": row.collapsed}
    return found | ({"diverged": row.diverged} if row.diverged else {})


def confirm_experiment(path: Path) -> Experiment:
    """What a plan says is to be done.

    Raises:
        ValueError: there is no plan.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no plan; run search and plan first")
    content = json.loads(path.read_text())
    recipe = Recipe(**{**content["recipe"], "severities": tuple(content["recipe"]["severities"])})
    arms = (BASELINE, *(Arm(Merging(**setting)) for setting in content["confirm"]))
    title = "Confirmation on the test images"
    return Experiment("confirm", title, ((recipe, arms),), tuple(content["seeds"]), split="test", keep_scores=True)


def confirm(options: Options, where: Where) -> None:
    """Do the plan and write ``confirm.<recipe>.result.json``."""
    experiment = confirm_experiment(plan_path(options, where.out))
    if len(experiment.groups[0][1]) == 1:
        print("The plan has nothing to try on the test images: no setting of the search was good enough.")
        return
    done = result_path(experiment, where.out)
    if done.exists():
        print(f"{done}: confirmed already; test images are looked at once. What was found:")
        _say(json.loads(done.read_text()))
        return
    execute(experiment.runs(), where)
    if not is_leader():
        return
    path = write_manifest(experiment, where.out)
    write_tables(path)
    print(markdown(path))
    _say(verdict(experiment, where.out))


def _say(found: Mapping[str, Mapping[str, Any]]) -> None:
    for label, one in found.items():
        print(f"- {said(label, one)}")


def said(label: str, one: Mapping[str, Any]) -> str:
    """What was found about one setting, in a sentence."""
    diverged = f" ({one['diverged']} more seeds diverged)" if one.get("diverged") else ""
    if None in (one["d_mean"], one["d_low"]):
        return f"{label}: not confirmed, no interval{diverged}"
    return (
        f"{label}: d {METRIC} {one['d_mean']:+.2f} [{one['d_low']:+.2f}, {one['d_high']:+.2f}], p after Holm "
        f"{one['p_holm']:.2g}, over seeds and images [{one['bootstrap_low']:+.2f}, {one['bootstrap_high']:+.2f}]: "
        f"{'confirmed' if one['confirmed'] else 'not confirmed'}{diverged}"
    )


def _results(experiment: Experiment, out: Path) -> list[list[dict[str, Any]]]:
    """Results of every arm of an experiment with one recipe, a list each."""
    ((recipe, arms),) = experiment.groups
    runs = [[Run(recipe, arm, seed, experiment.split) for seed in experiment.seeds] for arm in arms]
    return [[load_result(out, run.key()) for run in each] for each in runs]


def result_path(experiment: Experiment, out: Path) -> Path:
    """Where the verdict is written."""
    return out / f"{manifest_name(experiment)}.result.json"


def verdict(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Apply the plan's decision to the runs and write it down."""
    (recipe, arms) = experiment.groups[0]
    one: dict[Arm, list[Run]] = {arm: [Run(recipe, arm, seed) for seed in experiment.seeds] for arm in arms}
    scores = {arm: [np.load(scores_path(out, run)) for run in runs] for arm, runs in one.items()}
    results = dict(zip(arms, _results(experiment, out), strict=True))
    labels = scores[arms[0]][0]["labels"]
    names = [key for key in scores[arms[0]][0].files if key not in ("labels", "clean") and not key.startswith("noise-")]
    tested: list[tuple[Arm, Paired, tuple[float, float, float]]] = []
    for arm in arms[1:]:
        both = list(zip(results[arms[0]], results[arm], scores[arms[0]], scores[arm], strict=True))
        sound = [four for four in both if not (has_diverged(four[0]) or has_diverged(four[1]))]
        controlled = all(is_controlled(one) for a, b, *_ in sound for one in (a, b))
        how = RECOMPUTED if controlled else TRAINED
        difference = paired([value_of(b, METRIC, how) - value_of(a, METRIC, how) for a, b, _, _ in sound])
        pairs = [([a[name] for name in names], [b[name] for name in names]) for _, _, a, b in sound]
        interval = two_level_bootstrap(labels, pairs, auc, repeats=BOOTSTRAP_REPEATS) if pairs else (math.nan,) * 3
        tested.append((arm, difference, interval))
    adjusted = holm([difference.p for _, difference, _ in tested])
    content = {
        arm.label(): {
            "d_mean": difference.mean, "d_low": difference.low, "d_high": difference.high, "p": difference.p,
            "p_holm": p, "bootstrap_low": 100 * low, "bootstrap_high": 100 * high,
            "confirmed": bool(p < 0.05 and difference.mean > 0 and low > 0), "seeds": difference.n,
        } | ({"diverged": len(experiment.seeds) - difference.n} if difference.n < len(experiment.seeds) else {})
        for (arm, difference, (_, low, high)), p in zip(tested, adjusted, strict=True)
    }  # fmt: skip
    content = without_nan(content)
    result_path(experiment, out).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


STAGES: dict[str, Callable[[Options, Where], None]] = {"search": search, "plan": plan, "confirm": confirm}
