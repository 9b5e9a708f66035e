"""What to do at which step of a training run: the part of ``InMerge`` that knows nothing of weights."""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..draw import MAX_SEED, MAX_STEP, check_flag, check_word
from ..effect import callers_level
from ..paths.match import PartnerRule, check_partner_rule
from ..plan.plan import check_selection
from ..thresholds import FOLLOWING, NoiseThreshold, QuantileThreshold, RankBudget, check_by_layer, check_count
from .schedules import Schedule, check_schedule, from_plain, highest_value, to_plain, value_at

Threshold: TypeAlias = "Schedule | Mapping[str, float] | NoiseThreshold | QuantileThreshold | RankBudget"
SELECTION = ("skip_first", "exclude", "include_linear", "include_frozen", "include_heads")
BY_LAYER = "by layer"  # kind of a dict of thresholds in a checkpoint


@dataclass(frozen=True)
class Recipe:
    """Arguments of :class:`inmerge_fast.InMerge`, checked; ``start`` and ``stop`` in optimizer steps."""

    alpha: Schedule
    prob: Schedule
    threshold: Threshold
    partner: PartnerRule
    start: int
    stop: int | None
    every: int
    seed: int
    lasting: bool = True

    def __post_init__(self) -> None:
        check_schedule("alpha", self.alpha)
        check_schedule("prob", self.prob)
        if isinstance(self.threshold, Mapping):
            object.__setattr__(self, "threshold", check_by_layer(self.threshold))
        elif not self.threshold_follows_layer:
            check_schedule("threshold", self.threshold, low=-1.0)
        check_partner_rule(self.partner)
        check_count("every", self.every)
        check_word("seed", self.seed, MAX_SEED)
        if not self.lasting and isinstance(self.threshold, RankBudget):
            raise ValueError(
                "threshold=RankBudget() limits what merging costs for good, and with lasting=False nothing is; give a "
                "number, NoiseThreshold or QuantileThreshold, or leave it out to merge every sampled filter"
            )
        if isinstance(self.threshold, RankBudget) and self.merging_steps is None:
            raise ValueError(
                "threshold=RankBudget() spends its budget evenly over the steps that merge, and has to know how many "
                "they are: pass stop=, the number of optimizer steps of the run (or of epochs, with steps_per_epoch), "
                "or RankBudget(steps=)"
            )

    @property
    def threshold_follows_layer(self) -> bool:
        """Whether each layer has its own threshold."""
        return isinstance(self.threshold, (NoiseThreshold, QuantileThreshold, RankBudget, dict))

    @property
    def merging_steps(self) -> int | None:
        """How many steps merge in the whole run, or are to share a budget; None if nobody knows."""
        steps = self.threshold.steps if isinstance(self.threshold, RankBudget) else None
        if steps is None:
            if self.stop is None:
                return None
            steps = self.stop - self.start
        return -(-steps // self.every)

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

    def highest_prob(self, first: int, last: int) -> float:
        """The highest probability from step ``first`` to ``last``, as far as it can be known at ``first``."""
        return highest_value("prob", self.prob, first, last)

    def threshold_at(self, step: int) -> float:
        """Threshold at ``step``, if it is one for all layers."""
        return value_at("threshold", self.threshold, step, low=-1.0)  # type: ignore[arg-type]

    def shown(self) -> str:
        """All of it in a line, as it would be written as arguments; of thresholds by layer the first ones."""
        pairs = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return ", ".join(f"{k}={reprlib.repr(v) if isinstance(v, dict) else repr(v)}" for k, v in pairs)

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        threshold: Any = self.threshold
        if isinstance(threshold, dict):
            threshold = {"kind": BY_LAYER, "values": dict(threshold)}
        elif self.threshold_follows_layer:
            threshold = {"kind": type(threshold).__name__, **vars(threshold)}
        else:
            threshold = to_plain(threshold)
        changed = {"alpha": to_plain(self.alpha), "prob": to_plain(self.prob), "threshold": threshold}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changed

    def restored(self, plain: Mapping[str, Any], keep: Sequence[str] = ()) -> Recipe:
        """The recipe of a checkpoint; functions of the step are not in it and are taken from this recipe.

        Args:
            plain: what :meth:`to_plain` gave.
            keep: the arguments that stay what they are in this recipe.

        Raises:
            ValueError: what was a function then is none now, or the other way round; or ``keep`` names no argument.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if isinstance(keep, str) or not set(keep) <= set(names):
            raise ValueError(f"keep must name arguments of the recipe, among {', '.join(names)}; got {keep!r}")
        values = dict(plain)
        if values.setdefault("lasting", True) != self.lasting:  # checkpoints of version 2 may be from before
            raise ValueError(
                f"the checkpoint is of a run with lasting={values['lasting']}, and this InMerge has "
                f"lasting={self.lasting}; construct it with the same"
            )
        for name in ("alpha", "prob", "threshold"):
            if name not in keep:
                values[name] = self._restored_value(name, plain[name])
        return Recipe(**values | {name: getattr(self, name) for name in keep})

    def _restored_value(self, name: str, saved: Any) -> Any:
        if name == "threshold" and isinstance(saved, dict) and "kind" in saved:
            if saved["kind"] == BY_LAYER:
                return dict(saved["values"])
            return FOLLOWING[saved["kind"]](**{key: value for key, value in saved.items() if key != "kind"})
        present = 0.0 if name == "threshold" and self.threshold_follows_layer else getattr(self, name)
        return from_plain(name, saved, present)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Arguments that are not the same here and in ``other``, with both values."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

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
            "lasting": self.lasting,
            "start, stop and every": (self.start, self.stop, self.every),
        }


def fitted_to(arguments: Mapping[str, Any], total: float, epochs: float | None) -> dict[str, Any]:
    """Arguments of :class:`inmerge_fast.InMerge` for a run whose length the training framework knows.

    A :class:`inmerge_fast.RankBudget` that is not told its steps gets those that remain from ``start`` on. Where
    ``steps_per_epoch`` is not what the framework makes, as where batches were counted instead of optimizer steps, a
    warning says so.

    Args:
        arguments: what the user has given.
        total: optimizer steps of the run; infinite if there is no end.
        epochs: epochs of the run; None if they are not what ends it.
    """
    fitted, per_epoch = dict(arguments), arguments.get("steps_per_epoch")
    if per_epoch is not None and epochs and math.isfinite(total) and abs(per_epoch - total / epochs) > 1:
        warnings.warn(
            f"steps_per_epoch={per_epoch}, but this trainer makes {total / epochs:.6g} optimizer steps per epoch: "
            "with gradient accumulation over k batches they are one for k, and with several ranks each has its share",
            UserWarning,
            stacklevel=callers_level(),
        )
    budget = arguments.get("threshold")
    if isinstance(budget, RankBudget) and budget.steps is None and arguments.get("stop") is None:
        first, _ = in_steps(arguments.get("start", 0), None, per_epoch)
        if math.isfinite(total) and total > first:
            fitted["threshold"] = dataclasses.replace(budget, steps=int(total) - first)
    return fitted


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


def selection(skip_first: Any, exclude: Any, **flags: bool) -> dict[str, Any]:
    """Arguments that choose layers, checked, as a plan takes them.

    Raises:
        TypeError: wrong types.
        ValueError: ``skip_first`` is negative or a fraction outside [0, 1).
    """
    for name, flag in flags.items():
        check_flag(name, flag)
    first, patterns = check_selection(skip_first, exclude)
    return {"skip_first": first, "exclude": patterns, **flags}
