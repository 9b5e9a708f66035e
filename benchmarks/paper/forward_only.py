"""Forward-only merging against no merging and against standard regularisers, with batch-norm statistics recomputed.

``plan`` trains all settings of :data:`FAMILIES` and measures them on corrupted *validation* images, chooses by
:data:`RULE` and writes what will be confirmed. It is to be committed before ``confirm``, which trains fresh seeds,
looks at the test images once, and refuses a plan that was changed after its first run. ``supplement`` plans a control
that was thought of later, for the seeds of a plan that is done; it chooses nothing, and ``confirm`` trains it, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .compare import FEWEST, RECOMPUTED, TRAINED, group_of, has_diverged, paired
from .config import BASELINE, FORWARD, PAPER, Arm, Merging, Recipe, Run
from .experiments import Options, recipes
from .grid import Where, execute, is_leader
from .storage import is_stored, load_result, path_of, runs_of, without_nan

NAME = "forward-only"


def _forward(**changed: Any) -> Arm:
    return Arm(dataclasses.replace(FORWARD, **changed))


FAMILIES: dict[str, tuple[Arm, ...]] = {
    "forward-only merging": (
        Arm(FORWARD),
        *(_forward(alpha=alpha) for alpha in (0.3, 0.7)),
        *(_forward(prob=prob) for prob in (0.25, 1.0)),
        _forward(skip_first=PAPER.skip_first),
        *(_forward(z=2.0, partner=partner) for partner in ("random", "similar")),
        _forward(partner="nearest"),
    ),
    "Dropout2d": tuple(Arm(dropout=prob) for prob in (0.1, 0.2, 0.3)),
    "DropConnect": tuple(Arm(dropconnect=prob) for prob in (0.2, 0.4)),
    "both": tuple(Arm(FORWARD, dropout=prob) for prob in (0.1, 0.2)),
}
MERGING, DROPOUT, DROPCONNECT, BOTH = FAMILIES
NOISE, LASTING, DEFAULT = "noise", "lasting merging", "default"
ANGLE, ANGLE_DEFAULT = ADDED = "noise at the angle", "noise at the angle of the default"
# Column title and place in a result; shown in percent or points.
COLUMNS: dict[str, tuple[str, str]] = {
    "acc": ("clean", "acc"),
    "AUC": ("clean", "auc"),
    "ECE": ("clean", "ece"),
    "corrupted acc": ("corrupted", "acc"),
    "corrupted AUC": ("corrupted", "auc"),
    "non-noise AUC": ("not noise", "auc"),
    "corrupted ECE": ("corrupted", "ece"),
    "noise AUC": ("noise", "auc"),
}
METRIC, OTHER_METRIC = "corrupted AUC", "non-noise AUC"
SEARCH_SEEDS, CONFIRM_SEEDS, FIRST_FRESH_SEED = 3, 20, 600
RULE = (
    f"of every family the setting with the largest mean {METRIC} on validation images, statistics recomputed, among "
    "those of which no seed diverged or collapsed; beside them the library's default of forward-only merging, noise as "
    "large as the merging that was chosen, and lasting merging as published"
)


def recipe_of(options: Options, from_scratch: bool = False) -> Recipe:
    """The recipe of a data set and a network: short, small steps, 1,000 training images at most.

    Args:
        options: the command line.
        from_scratch: the arms start from random weights (or those of a file), not from a trained backbone.
    """
    usual = recipes(options)[0]
    digits = options.data == "digits"
    values: dict[str, Any] = {
        "name": f"{NAME}.{usual.name.removesuffix('-ordinary')}", "batch_size": options.batch_size or 32,
        "severities": (4,), "attack": False, "limit": usual.limit or (None if digits else 1000),
    }  # fmt: skip
    if not (digits or options.quick):  # bfloat16: on a CPU that has it, three times as fast
        values |= {"backbone_epochs": options.backbone_epochs or 6, "arm_epochs": options.arm_epochs or 3, "bf16": True}
    if usual.model == "efficientnet_lite0" and not options.quick:  # has been trained before
        epochs = options.backbone_epochs or 2, options.arm_epochs or 2
        values |= {"backbone_epochs": epochs[0], "arm_epochs": epochs[1], "limit": options.limit or 800,
                   "high": options.lr or 0.02}  # fmt: skip
    out = dataclasses.replace(usual, **values)
    if from_scratch:
        epochs = out.backbone_epochs if options.arm_epochs is None else options.arm_epochs
        return dataclasses.replace(
            out, name=f"{out.name}-scratch", backbone_epochs=0, arm_epochs=epochs, middle=out.high
        )
    return out


def named(recipe: dict[str, Any], seeds: int) -> str:
    """What a plan's recipe is, for the first column of a table."""
    start = "" if recipe["backbone_epochs"] else ", from scratch"
    return f"{recipe['data'].removesuffix('.npz')}, {recipe['model']}{start}, {seeds} seeds"


def plan_path(recipe: Recipe, out: Path) -> Path:
    """Where a recipe's plan is."""
    return out / f"{recipe.name}.plan.json"


def beside(plan: Path, what: str) -> Path:
    """Where something that belongs to a plan is: its "supplement", or its "images"."""
    return plan.with_name(plan.name.replace(".plan.", f".{what}."))


def value_of(result: dict[str, Any], column: str, evaluation: str = RECOMPUTED) -> float:
    """A number of a result, in percent; NaN for a diverged run.

    Args:
        result: from a result file.
        column: of :data:`COLUMNS`.
        evaluation: as trained, or with batch-norm statistics recomputed, which is the same without batch norm.
    """
    group, key = COLUMNS[column]
    value = group_of(result[evaluation] or result[TRAINED], group)[key]
    return float("nan") if value is None else 100 * value


def has_failed(result: dict[str, Any]) -> bool:
    """Whether a run diverged, in either evaluation, or its filters collapsed."""
    return has_diverged(result) or bool(np.isnan(value_of(result, METRIC))) or result["filters"]["collapsed"]


def search_runs(recipe: Recipe, seeds: int) -> dict[str, dict[Arm, list[Run]]]:
    """The runs that a plan is made from, on validation images, by family; "" is no merging."""
    families = {"": (BASELINE,)} | FAMILIES
    return {
        family: {arm: [Run(recipe, arm, seed, "val") for seed in range(seeds)] for arm in arms}
        for family, arms in families.items()
    }


def plan(recipe: Recipe, where: Where, options: Options, like: Path | None = None) -> Path:
    """Explore on validation images, choose and write the plan.

    Args:
        recipe: of the runs.
        where: where results are.
        options: give the number of seeds.
        like: take over what this plan has chosen, for another network or start, without exploring.

    Raises:
        ValueError: there is a plan already, or the test images have been looked at.
    """
    path = plan_path(recipe, where.out)
    if path.exists():
        raise ValueError(f"{path}: there is a plan already, and a second choice would not be one; delete it to restart")
    seen = [name for name in runs_of(path_of(where.out, recipe.name)) if "/test-" in name]
    if seen:
        raise ValueError(f"{path}: {len(seen)} runs have looked at the test images already; no plan may follow that")
    if like is None:
        seeds = options.seeds or (2 if options.quick else SEARCH_SEEDS)
        chosen, explored = _explore(recipe, where, seeds)
        source = f"explored with {seeds} seed{'s' * (seeds > 1)}"
    else:
        taken, explored = json.loads(like.read_text()), {}
        chosen = {family: arm_of(values) for family, values in taken["confirm"].items() if family in FAMILIES}
        source = f"taken over from {like.name}, without a look at this network or start"
    first, count = FIRST_FRESH_SEED, 3 if options.quick else CONFIRM_SEEDS
    content = {
        "recipe": dataclasses.asdict(recipe), "metric": METRIC, "rule": RULE, "source": source, "search": explored,
        "confirm": {family: dataclasses.asdict(arm) for family, arm in confirmed_with(chosen).items()},
        "seeds": list(range(first, first + count)),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(without_nan(content), indent=1) + "\n")
    print(f"{path}: {'; '.join(arm.label() for arm in chosen.values())}\nCommit it before confirm.")
    return path


def _explore(recipe: Recipe, where: Where, seeds: int) -> tuple[dict[str, Arm], dict[str, Any]]:
    """The best setting of every family on validation images, and what was seen of all."""
    runs = search_runs(recipe, seeds)
    execute([run for arms in runs.values() for each in arms.values() for run in each], where)
    base = [load_result(where.out, run.key()) for run in runs[""][BASELINE]]
    chosen, explored = {}, {}
    for family in FAMILIES:
        gains = {}
        for arm, each in runs[family].items():
            results = [load_result(where.out, run.key()) for run in each]
            pairs = zip(results, base, strict=True)
            gain = float(np.mean([value_of(one, METRIC) - value_of(other, METRIC) for one, other in pairs]))
            failed = sum(map(has_failed, results))
            explored[arm.label()] = {"family": family, "d_mean": gain, "failed": failed}
            if not failed:
                gains[arm] = gain
        if gains:
            chosen[family] = max(gains, key=lambda arm: gains[arm])
    return chosen, explored


def confirmed_with(chosen: dict[str, Arm]) -> dict[str, Arm]:
    """What is confirmed: the chosen arms and what the rule puts beside them, each once."""
    out = dict(chosen)
    merging = chosen.get(MERGING, Arm(FORWARD)).merging
    assert merging is not None
    out |= {NOISE: Arm(dataclasses.replace(merging, as_noise=True)), LASTING: Arm(PAPER)}
    if Arm(FORWARD) not in out.values():
        out[DEFAULT] = Arm(FORWARD)
    return out


def supplement(path: Path) -> Path:
    """Write what is added to a plan that is done: noise that moves *and* turns filters as merging does.

    Args:
        path: of the plan.

    Raises:
        ValueError: there is no plan, it is not done, there is a supplement already, or one of its arms has been run.
    """
    _, arms, _, digest = read_plan(path)
    target = beside(path, "supplement")
    if target.exists():
        raise ValueError(f"{target}: there is a supplement already")
    check_done(path)
    added = {}
    for family, angle in ((MERGING, ANGLE), (DEFAULT, ANGLE_DEFAULT)):
        if family in arms:
            added[angle] = Arm(dataclasses.replace(arms[family].merging, as_noise=True, same_angle=True))
    content = {"plan": digest, "confirm": {family: dataclasses.asdict(arm) for family, arm in added.items()}}
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{target}: {'; '.join(arm.label() for arm in added.values())}\nCommit it before confirm.")
    return target


def arm_of(values: dict[str, Any]) -> Arm:
    """An arm from a plan."""
    merging = values["merging"]
    return Arm(**{**values, "merging": None if merging is None else Merging(**merging)})


def read_plan(path: Path) -> tuple[Recipe, dict[str, Arm], list[int], str]:
    """A plan's recipe, arms by family without the baseline, seeds, and digest.

    Raises:
        ValueError: there is no plan.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no plan; run {NAME} plan first")
    content = json.loads(path.read_text())
    recipe = Recipe(**{**content["recipe"], "severities": tuple(content["recipe"]["severities"])})
    arms = {family: arm_of(values) for family, values in content["confirm"].items()}
    return recipe, arms, content["seeds"], _digest(path)


def read_supplement(path: Path) -> tuple[dict[str, Arm], str]:
    """What a plan's supplement adds, by family, and its digest; nothing if there is none.

    Args:
        path: of the plan.

    Raises:
        ValueError: it is the supplement of another plan.
    """
    target = beside(path, "supplement")
    if not target.exists():
        return {}, ""
    content = json.loads(target.read_text())
    if content["plan"] != _digest(path):
        raise ValueError(f"{target}: is for plan {content['plan']}, and {path.name} is {_digest(path)}; restore it")
    return {family: arm_of(values) for family, values in content["confirm"].items()}, _digest(target)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def planned_runs(path: Path) -> dict[str, list[Run]]:
    """The runs of a plan and of its supplement by family, a run for each seed; "" is no merging.

    Raises:
        ValueError: there is no plan, or results that looked at test images are not of it, or not of its supplement.
    """
    recipe, arms, seeds, digest = read_plan(path)
    extra, extra_digest = read_supplement(path)
    runs = {
        family: [Run(recipe, arm, seed, plan=source) for seed in seeds]
        for every, source in (({"": BASELINE} | arms, digest), (extra, extra_digest))
        for family, arm in every.items()
    }
    wanted = {run.key().partition("/")[2]: run.plan for each in runs.values() for run in each}
    for name, result in runs_of(path_of(path.parent, recipe.name)).items():
        if "/test-" in name and result.get("plan") != wanted.get(name):
            later = (result["arm"]["merging"] or {}).get("same_angle")
            raise ValueError(
                f"{beside(path, 'supplement') if later else path}: was changed after its runs had begun: {name} was "
                f"made by plan {result.get('plan')}, and this is {wanted.get(name, 'without that run')}; restore it"
            )
    return runs


def confirm(path: Path, where: Where) -> None:
    """Do a plan, and then its supplement.

    Raises:
        ValueError: there is none, or it is not the one that runs were made by.
    """
    execute([run for of_seed in zip(*planned_runs(path).values(), strict=True) for run in of_seed], where)


def confirmed_results(path: Path) -> tuple[dict[str, Arm], dict[str, dict[int, dict[str, Any]]]]:
    """The arms of a plan, and their results by family and seed; "" is no merging.

    Only of seeds that are done in all arms, so that every row of a table is about the same ones; those of a supplement
    when they are done for all these seeds.

    Raises:
        ValueError: there is no plan, or it is not the one that runs were made by.
    """
    runs, out = planned_runs(path), path.parent
    found = {
        family: {run.seed: load_result(out, run.key()) for run in each if is_stored(out, run.key())}
        for family, each in runs.items()
    }
    own = [results for family, results in found.items() if family not in ADDED]
    done = [run.seed for run in runs[""] if all(run.seed in results for results in own)]
    shown = [family for family in runs if family not in ADDED or (done and set(done) <= set(found[family]))]
    arms = {family: runs[family][0].arm for family in shown}
    return arms, {family: {seed: found[family][seed] for seed in done} for family in shown}


def check_done(path: Path) -> None:
    """Look whether all seeds of a plan are done in all its arms.

    Raises:
        ValueError: they are not.
    """
    done, planned = len(confirmed_results(path)[1][""]), len(read_plan(path)[2])
    if done < planned:
        raise ValueError(f"{path}: {done} of {planned} seeds are done; run confirm first")


def confirmations(out: Path) -> Iterator[tuple[dict[str, Any], dict[str, Arm], dict[str, dict[int, dict[str, Any]]]]]:
    """Recipe, arms and results of every plan that has enough seeds for an interval, see :func:`confirmed_results`."""
    for path in sorted(out.glob(f"{NAME}.*.plan.json")):
        arms, found = confirmed_results(path)
        if len(found[""]) >= FEWEST:
            yield json.loads(path.read_text())["recipe"], arms, found


def differences(
    one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], column: str, evaluation: str = RECOMPUTED
) -> list[float]:
    """Paired differences in points, over the seeds of which both runs exist and neither diverged.

    Raises:
        ValueError: the runs of a seed cannot be compared: they started from other weights or saw other data.
    """
    seeds = sorted(set(one) & set(other))
    for seed in seeds:
        for what in ("recipe", "data"):
            if one[seed][what] != other[seed][what]:
                raise ValueError(f"{one[seed]['arm']['label']}, seed {seed}: another {what} than that of the other arm")
        if one[seed]["digests"]["backbone"] != other[seed]["digests"]["backbone"]:
            raise ValueError(f"{one[seed]['arm']['label']}, seed {seed}: another backbone than that of the other arm")
    pairs = [(value_of(one[seed], column, evaluation), value_of(other[seed], column, evaluation)) for seed in seeds]
    return [first - second for first, second in pairs if not np.isnan([first, second]).any()]


def run_stage(stage: str, options: Options, where: Where, from_scratch: bool, like: str | None) -> None:
    """``plan``, ``confirm`` or ``supplement``, as the command line says."""
    recipe = recipe_of(options, from_scratch)
    if stage == "plan":
        plan(recipe, where, options, None if like is None else where.out / f"{NAME}.{like}.plan.json")
        return
    path = plan_path(recipe, where.out)
    if stage == "supplement":
        supplement(path)
        return
    confirm(path, where)
    if is_leader():
        arms, found = confirmed_results(path)
        for family, results in found.items():
            one = paired(differences(results, found[""], METRIC))
            interval = f"{one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            print(f"{arms[family].label():60} d {METRIC} {interval}, n = {one.n}")
