"""Copies of a model: averages of its weights, which are not to be merged, and what is copied along with a model."""

from __future__ import annotations

import re
from typing import Any

from torch.optim.swa_utils import AveragedModel

from .monitor import Monitor
from .run import MergeRun

# Classes that average weights are told by their names, since none of their libraries is needed here, and by what they
# do: timm's ModelEma to ModelEmaV3, ema-pytorch's EMA, KarrasEMA and PostHocEMA, ExponentialMovingAverage and so on.
_NAMES = re.compile(r"EMA|Ema([A-Z0-9]|$)|Averag")
_UPDATES = ("update", "update_parameters", "update_average", "update_moving_average")


def check_is_no_average(model: Any) -> None:
    """Raise where ``model`` is an average of another model's weights.

    Raises:
        ValueError: it is one.
    """
    updates = [name for name in _UPDATES if callable(getattr(model, name, None))]
    if updates and any(base is AveragedModel or _NAMES.search(base.__name__) for base in type(model).__mro__):
        raise ValueError(
            f"model is a {type(model).__name__}, an average of weights that the next {updates[0]}() overwrites; merge "
            "the model that is trained, and its average follows"
        )


class OnlyHere:
    """Something that deep copies share, and that cannot be saved.

    Args:
        value: what it is.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, _: object) -> OnlyHere:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self.value is None:
            return OnlyHere, (None,)
        raise TypeError(
            "an InMerge with a process_group belongs to this process and cannot be pickled; save its state_dict()"
        )


def state_of(run: MergeRun) -> dict[str, Any]:
    """What a copy of a run goes on from."""
    state = run.__getstate__()
    return state if isinstance(run, CopiedRun) else state | {"group": OnlyHere(run.group)}


class CopiedRun(MergeRun):
    """A run that plans when it is first used: with a deep copy of a model its InMerge is copied before the layers are.

    Then it becomes a :class:`MergeRun`. That one has no ``__getattr__``, which would slow down every look at it.

    Args:
        state: what :func:`state_of` gave, copied.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.model, self.step_count, self._state = state["model"], state["step_count"], state

    def __getstate__(self) -> dict[str, Any]:
        return self._state | {"step_count": self.step_count}

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("_state")
        if state is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        run = MergeRun(
            self.model,
            state["selection"],
            state["recipe"],
            state["guard"],
            Monitor(()),
            state["observe_every"],
            state["group"].value,
        )
        run.step_count, run.stopped = self.step_count, state["stopped"]
        run._quantiles, run._quantiles_of = state["quantiles"]
        if run.watch is not None and state["watch"] is not None:
            run.watch.load_state_dict(state["watch"])
        run._count_from(state["counted"])
        self.__class__, self.__dict__ = MergeRun, run.__dict__  # type: ignore[assignment]
        return getattr(self, name)
