"""Arguments of ``InMerge`` by name and type, and what becomes of them before there is a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from ..draw import check_flag
from ..forward_only import ALPHA, PROB, SKIP_FIRST, THRESHOLD
from ..paths.match import PartnerRule
from ..plan.plan import DEFAULT_SKIP_FIRST
from ..thresholds import check_count
from .guard import CollapseGuard
from .monitor import Logger
from .recipe import SELECTION, Recipe, Threshold, in_steps, selection
from .schedules import Schedule


class InMergeArguments(TypedDict, total=False):
    """What :class:`inmerge_fast.InMerge` takes beside the model, for functions that pass it on.

    ``def f(**recipe: Unpack[InMergeArguments])`` shows each argument to editors and type checkers; what they mean is
    said there.
    """

    alpha: Schedule | None
    prob: Schedule | None
    threshold: Threshold | None
    partner: PartnerRule
    skip_first: float | str | Sequence[str] | None
    exclude: str | Sequence[str]
    include_linear: bool
    include_frozen: bool
    include_heads: bool
    start: float
    stop: float | None
    every: int
    steps_per_epoch: int | None
    seed: int
    guard: CollapseGuard | Literal["default"] | None
    loggers: Sequence[Logger]
    observe_every: int
    process_group: Any
    lasting: bool


# What the arguments are that are None: the paper's for lasting merging, and those of ``merged``.
DEFAULTS: dict[bool, dict[str, Any]] = {
    True: {"alpha": 0.8, "prob": 0.3, "threshold": 0.3, "skip_first": DEFAULT_SKIP_FIRST},
    False: {"alpha": ALPHA, "prob": PROB, "threshold": THRESHOLD, "skip_first": SKIP_FIRST},
}


@dataclass(frozen=True)
class Checked:
    """Arguments of :class:`inmerge_fast.InMerge` that are right in themselves, whatever the model is.

    Attributes:
        recipe: what to do at which step.
        selection: the arguments of a plan that choose layers.
        guard: what watches for collapsing layers; None for nothing.
        loggers: functions that get the observed rows.
        observe_every: every how many merging steps are observed.
    """

    recipe: Recipe
    selection: dict[str, Any]
    guard: CollapseGuard | None
    loggers: list[Logger]
    observe_every: int


def checked(given: Mapping[str, Any]) -> Checked:
    """Check the arguments of :class:`inmerge_fast.InMerge`, all of them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """
    lasting = given["lasting"]
    check_flag("lasting", lasting)
    given = {**given, **{name: value for name, value in DEFAULTS[lasting].items() if given[name] is None}}
    first, last = in_steps(given["start"], given["stop"], given["steps_per_epoch"])
    names = ("alpha", "prob", "threshold", "partner", "every", "seed", "lasting")
    recipe = Recipe(start=first, stop=last, **{name: given[name] for name in names})
    check_count("observe_every", given["observe_every"])
    chosen = selection(**{name: given[name] for name in SELECTION})
    guard = given["guard"]
    if guard == "default":
        guard = CollapseGuard() if lasting else None  # what does not last collapses nothing
    elif guard is not None and not lasting:
        raise ValueError("guard watches what merging costs for good, and with lasting=False nothing is; leave it out")
    if guard is not None and not isinstance(guard, CollapseGuard):
        raise TypeError(f"guard must be a CollapseGuard or None, got {guard!r}")
    for log in given["loggers"]:
        if not callable(log):
            raise TypeError(f"loggers must be callable, got {log!r}")
    return Checked(recipe, chosen, guard, list(given["loggers"]), int(given["observe_every"]))
