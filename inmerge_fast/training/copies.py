"""Copies of a model: averages of its weights, which are not to be merged, and what is copied along with a model."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from torch.optim.swa_utils import AveragedModel

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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an InMerge with a process_group belongs to this process and cannot be pickled; save its state_dict()"
        )
