"""What to do at which step of a training run: the part of ``InMerge`` that knows nothing of weights."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..draw import MAX_SEED, MAX_STEP, check_word
from ..paths.match import check_partner_rule
from ..plan.plan import check_selection
from .schedules import Schedule, check_schedule, from_plain, to_plain, value_at
from .thresholds import NoiseThreshold, QuantileThreshold

Threshold: TypeAlias = "Schedule | NoiseThreshold | QuantileThreshold"
FOLLOWING = {"NoiseThreshold": NoiseThreshold, "QuantileThreshold": QuantileThreshold}


@dataclass(frozen=True)
class Recipe:
    """Arguments of :class:`inmerge_fast.InMerge`, checked; ``start`` and ``stop`` in optimizer steps."""

    alpha: Schedule
    prob: Schedule
    threshold: Threshold
    partner: str
    start: int
    stop: int | None
    every: int
    seed: int

    def __post_init__(self) -> None:
        check_schedule("alpha", self.alpha)
        check_schedule("prob", self.prob)
        if not self.threshold_follows_layer:
            check_schedule("threshold", self.threshold, low=-1.0)
        check_partner_rule(self.partner)
        check_count("every", self.every)
        check_word("seed", self.seed, MAX_SEED)

    @property
    def threshold_follows_layer(self) -> bool:
        """Whether each layer has its own threshold."""
        return isinstance(self.threshold, (NoiseThreshold, QuantileThreshold))

    def merges_at(self, step: int) -> bool:
        """Whether ``step`` is one that merges."""
        return step >= self.start and (self.stop is None or step < self.stop) and (step - self.start) % self.every == 0

    def occasion(self, step: int) -> int:
        """How many steps have merged before this one."""
        return (step - self.start) // self.every

    def alpha_at(self, step: int) -> float:
        """Alpha at ``step``."""
        return value_at("alpha", self.alpha, step)

    def prob_at(self, step: int) -> float:
        """Probability at ``step``."""
        return value_at("prob", self.prob, step)

    def threshold_at(self, step: int) -> float:
        """Threshold at ``step``, if it is one for all layers."""
        return value_at("threshold", self.threshold, step, low=-1.0)  # type: ignore[arg-type]

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        threshold: Any = self.threshold
        if isinstance(threshold, (NoiseThreshold, QuantileThreshold)):
            threshold = {"kind": type(threshold).__name__, **vars(threshold)}
        else:
            threshold = to_plain(threshold)
        changed = {"alpha": to_plain(self.alpha), "prob": to_plain(self.prob), "threshold": threshold}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changed

    def restored(self, plain: Mapping[str, Any]) -> Recipe:
        """The recipe of a checkpoint; functions of the step are not in it and are taken from this recipe.

        Raises:
            ValueError: what was a function then is none now, or the other way round.
        """
        saved = plain["threshold"]
        threshold: Threshold
        if isinstance(saved, dict) and "kind" in saved:
            threshold = FOLLOWING[saved["kind"]](**{name: value for name, value in saved.items() if name != "kind"})
        else:
            present = 0.0 if self.threshold_follows_layer else self.threshold
            threshold = from_plain("threshold", saved, present)  # type: ignore[arg-type]
        alpha = from_plain("alpha", plain["alpha"], self.alpha)
        prob = from_plain("prob", plain["prob"], self.prob)
        return Recipe(**dict(plain) | {"alpha": alpha, "prob": prob, "threshold": threshold})

    def described(self) -> dict[str, Any]:
        """What can be compared with another rank's recipe: functions by some of their values."""
        last = self.start + self.every if self.stop is None else self.stop - 1
        probes = (self.start, last)  # a function need not be defined at other steps
        threshold = repr(self.threshold)
        if not self.threshold_follows_layer:
            threshold = repr([self.threshold_at(step) for step in probes])
        return {
            "seed": self.seed,
            "alpha": [self.alpha_at(step) for step in probes],
            "prob": [self.prob_at(step) for step in probes],
            "threshold": threshold,
            "partner": self.partner,
            "start, stop and every": (self.start, self.stop, self.every),
        }


def check_count(name: str, value: object) -> None:
    """Check a positive integer argument.

    Raises:
        TypeError: not an integer.
        ValueError: less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def in_steps(start: float, stop: float | None, steps_per_epoch: int | None) -> tuple[int, int | None]:
    """``start`` and ``stop`` in optimizer steps; with ``steps_per_epoch`` they are given in epochs.

    Raises:
        TypeError: one of them has the wrong type.
        ValueError: one of them is negative, or ``stop`` is not after ``start``.
    """
    if steps_per_epoch is not None:
        check_count("steps_per_epoch", steps_per_epoch)
    unit = 1 if steps_per_epoch is None else int(steps_per_epoch)
    for name, value in (("start", start), ("stop", stop)):
        if value is None and name == "stop":
            continue
        whole = steps_per_epoch is None
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
            what = "an int (epochs need steps_per_epoch)" if whole else "a number of epochs"
            raise TypeError(f"{name} must be {what}, got {value!r}")
        if not 0 <= value * unit <= MAX_STEP:  # type: ignore[operator]  # NaN fails too
            raise ValueError(f"{name} must not be negative, got {value!r}")
    first, last = round(start * unit), None if stop is None else round(stop * unit)
    if last is not None and last <= first:
        raise ValueError(f"stop must be after start, got start={start!r} and stop={stop!r}: nothing would ever merge")
    return first, last


def selection(skip_first: Any, exclude: Any, include_linear: bool, include_frozen: bool) -> dict[str, Any]:
    """Arguments that choose layers, checked, as a plan takes them; ``skip_first`` may be patterns of names.

    Raises:
        TypeError: wrong types.
        ValueError: ``skip_first`` is negative or a fraction outside [0, 1).
    """
    if isinstance(skip_first, str) or (isinstance(skip_first, Sequence) and not isinstance(skip_first, bytes)):
        patterns = check_selection(0, skip_first) + check_selection(0, exclude)
        skip_first = 0
    else:
        patterns = check_selection(skip_first, exclude)
    return {
        "skip_first": skip_first,
        "exclude": patterns,
        "include_linear": include_linear,
        "include_frozen": include_frozen,
    }
