"""Numbers that change in the course of training: constants, ramps, or any function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ..draw import check_share

Schedule: TypeAlias = float | Callable[[int], float]
SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Ramp:
    """A number that goes from one value to another within a range of steps, and is constant before and after.

    Attributes:
        first: value up to step ``begin``.
        last: value from step ``end`` on.
        begin: the step at which it starts to change.
        end: the step at which it has arrived.
        shape: ``"linear"``, or ``"cosine"`` for half a cosine wave, which starts and ends flat.
    """

    first: float
    last: float
    begin: int
    end: int
    shape: str

    def __post_init__(self) -> None:
        if self.end <= self.begin:
            raise ValueError(f"end must be after begin, got begin={self.begin} and end={self.end}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}, got {self.shape!r}")
        for name, value in (("first", self.first), ("last", self.last)):
            check_share(name, value, low=-1.0)

    def __call__(self, step: int) -> float:
        """The value at ``step``."""
        if step <= self.begin:
            return self.first
        if step >= self.end:
            return self.last
        share = (step - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.first + (self.last - self.first) * share


def linear(first: float, last: float, *, begin: int = 0, end: int) -> Ramp:
    """A straight ramp for ``alpha``, ``prob`` or ``threshold`` of :class:`inmerge_fast.InMerge`.

    Args:
        first: value up to step ``begin``.
        last: value from step ``end`` on.
        begin: optimizer step at which the ramp begins.
        end: optimizer step at which it ends.

    Raises:
        TypeError: a value is not a number.
        ValueError: a value is outside [-1, 1], or ``end`` is not after ``begin``.
    """
    return Ramp(first, last, begin, end, "linear")


def cosine(first: float, last: float, *, begin: int = 0, end: int) -> Ramp:
    """Like :func:`linear`, along half a cosine wave."""
    return Ramp(first, last, begin, end, "cosine")


def check_schedule(name: str, schedule: object, *, low: float = 0.0) -> None:
    """Check an argument that may be a number or a function of the step.

    Raises:
        TypeError: neither a number nor callable.
        ValueError: a number, or an end of a ramp, outside ``[low, 1]``.
    """
    if isinstance(schedule, Ramp):
        check_share(f"{name}'s first value", schedule.first, low=low)
        check_share(f"{name}'s last value", schedule.last, low=low)
    elif not callable(schedule):
        check_share(name, schedule, low=low)


def value_at(name: str, schedule: Schedule, step: int, *, low: float = 0.0) -> float:
    """The value of a schedule at ``step``.

    Raises:
        TypeError: a function of the user's returned something else than a number.
        ValueError: it returned a number outside ``[low, 1]``.
    """
    if not callable(schedule):
        return float(schedule)
    value = schedule(step)
    check_share(f"{name} at step {step}", value, low=low)
    return float(value)


def highest_value(name: str, schedule: Schedule, first: int, last: int, *, low: float = 0.0) -> float:
    """The highest value of a schedule from step ``first`` to ``last``; a user's function is asked for ``first`` only.

    It may not be defined at steps to come.
    """
    now = value_at(name, schedule, first, low=low)
    return max(now, schedule(last)) if isinstance(schedule, Ramp) else now


def to_plain(schedule: object) -> float | dict[str, Any] | None:
    """What a checkpoint keeps of a schedule: a number or a ramp as plain data, None for a function of the user's."""
    if isinstance(schedule, Ramp):
        return asdict(schedule)
    return None if callable(schedule) else float(schedule)  # type: ignore[arg-type]


def from_plain(name: str, plain: float | dict[str, Any] | None, present: Schedule) -> Schedule:
    """The schedule that a checkpoint describes; a function of the user's is not in it and stays the present one.

    Raises:
        ValueError: the checkpoint was made with a function, and ``present`` is none, or the other way round.
    """
    is_function = callable(present) and not isinstance(present, Ramp)
    if (plain is None) != is_function:
        was = "a function of the step, which a checkpoint cannot hold" if plain is None else f"{plain!r}"
        raise ValueError(
            f"{name} was {was} when the state was saved, and is {present!r} now; construct with the same {name}, or "
            f"load_state_dict(state, keep=[{name!r}]) for the new one"
        )
    if plain is None:
        return present
    return Ramp(**plain) if isinstance(plain, dict) else float(plain)
