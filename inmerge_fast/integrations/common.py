"""What the callbacks share: arguments that are checked where they are written, and mergers made from them."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from ..draw import MAX_STEP
from ..effect import callers_level
from ..thresholds import RankBudget
from ..training.arguments import InMergeArguments, checked
from ..training.inmerge import InMerge
from ..training.monitor import Logger
from ..training.recipe import fitted_to

Part: TypeAlias = str | Callable[[Any], nn.Module] | None
PARAMETERS = inspect.signature(InMerge).parameters
DEFAULTS = {name: p.default for name, p in PARAMETERS.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

# The distribution that each module here is made for, the oldest release that will do, and what pip installs it with.
OLDEST = {
    "lightning": ("2.4", "lightning"),
    "pytorch-lightning": ("2.4", "lightning"),
    "transformers": ("4.50", "huggingface"),
    "accelerate": ("1.3", "huggingface"),
    "pytorch-ignite": ("0.4.13", "ignite"),
    "nnunetv2": ("2.8", "nnunet"),
}


def require(distribution: str, *names: str) -> None:
    """Make sure that a framework is there, new enough, and still has what is used of it.

    Args:
        distribution: what pip calls it, one of ``OLDEST``.
        *names: modules, or what is used of them: ``ignite.engine:Engine``.

    Raises:
        ImportError: it is missing, cannot be imported, or is too old or too new; says what to install.
    """
    oldest, extra = OLDEST[distribution]
    cure = f"pip install 'inmerge_fast[{extra}]'"
    gone: tuple[str, Exception] | None = None
    for name in names:
        module = name.partition(":")[0]
        try:
            pkgutil.resolve_name(f"{module}:" if ":" not in name else name)
        except AttributeError as error:
            gone = gone or (name, error)
        except ImportError as error:
            if "." not in module or not f"{module}.".startswith(f"{error.name}.") or error.name == module.split(".")[0]:
                what = f"{distribution} >= {oldest} is needed and cannot be imported ({error})"
                raise ImportError(f"{what}: {cure}") from error
            gone = gone or (name, error)
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, perhaps
        found = ""
    numbers = [tuple(map(int, re.findall(r"\d+", text.split("+")[0])[:2])) for text in (found, oldest)]
    if found and numbers[0] < numbers[1]:
        raise ImportError(f"{distribution} >= {oldest} is needed, and {found} is installed: {cure}")
    if gone is not None:
        raise ImportError(
            f"{distribution} {found or 'of unknown version'} has no {gone[0].replace(':', '.')} ({gone[1]}), which "
            f"{distribution} {oldest} has: it is too new for this inmerge_fast. Update inmerge_fast, or "
            f"pip install '{distribution}>={oldest}{f',<{found}' if found else ''}'"
        ) from gone[1]


class Blueprint:
    """What a callback needs to make an :class:`inmerge_fast.InMerge`, whenever its framework begins to train a model.

    Args:
        target: the part of the model that is merged: its name, or a function of the model; None for all of it.
        keep: see :meth:`inmerge_fast.InMerge.load_state_dict`.
        recipe: arguments of :class:`inmerge_fast.InMerge`.
        owner: the class that takes them, for messages.

    Attributes:
        recipe: the arguments that were given.

    Raises:
        TypeError: an argument has the wrong type, or is none.
        ValueError: an argument is out of range.
    """

    def __init__(
        self, target: Part, keep: Sequence[str], recipe: InMergeArguments, owner: str = "InMergeCallback"
    ) -> None:
        for name in recipe:
            if name not in DEFAULTS:
                near = difflib.get_close_matches(name, DEFAULTS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(DEFAULTS)}"
                raise TypeError(f"{owner}() got an unexpected argument {name!r}; {hint}")
        if target is not None and not isinstance(target, str) and not callable(target):
            raise TypeError(f"target must be the name of a part of the model or a function of it, got {target!r}")
        self.recipe: dict[str, Any] = dict(recipe)
        # The framework will tell a budget its steps, so that here any number will do.
        meant = checked(DEFAULTS | fitted_to(self.recipe, MAX_STEP, None)).recipe
        meant.restored(meant.to_plain(), keep)  # raises where keep names no argument
        self._target, self._keep, self._fitted, self._owner = target, tuple(keep), False, owner

    @property
    def label(self) -> str:
        """The part by its name, or by that of the function; empty for the whole model."""
        if self._target is None or isinstance(self._target, str):
            return self._target or ""
        return getattr(self._target, "__qualname__", type(self._target).__qualname__)

    def part(self, model: nn.Module) -> tuple[nn.Module, str]:
        """The part of ``model`` that is merged, and the tag of its numbers: ``inmerge``, or ``inmerge/<part>``.

        Raises:
            ValueError: the target is no part of it.
        """
        if self._target is None:
            return model, "inmerge"
        if callable(self._target):
            part = self._target(model)
            if not isinstance(part, nn.Module):
                raise ValueError(f"target must return a module, a part of the model, and returned {part!r}")
        else:
            try:
                part = model.get_submodule(self._target)
            except AttributeError:
                names = ", ".join(name for name, _ in model.named_children())
                raise ValueError(f"target={self._target!r} is no part of the model, whose parts are {names}") from None
        name = next((name for name, module in model.named_modules() if module is part), "")
        return part, f"inmerge/{name}" if name else "inmerge"

    def merger(self, part: nn.Module, total: float, epochs: float | None, loggers: Sequence[Logger]) -> InMerge:
        """An InMerge at step 0, for a run whose length the framework knows: see ``fitted_to``."""
        fitted = fitted_to(self.recipe, total, epochs)
        self._fitted = fitted.get("threshold") is not self.recipe.get("threshold")
        # A guard remembers whom it has warned of; the next run's shall not.
        fitted |= {name: copy.deepcopy(self.recipe[name]) for name in ("guard",) if name in self.recipe}
        return InMerge(part, **fitted | {"loggers": [*self.recipe.get("loggers", ()), *loggers]})

    def load(self, merger: InMerge, state: Mapping[str, Any]) -> None:
        """Have ``merger`` go on where ``state`` was taken; a budget that got its steps from here keeps the new ones."""
        keep = set(self._keep)
        saved = state["recipe"]["threshold"]
        if self._fitted and isinstance(saved, dict) and saved.get("kind") == RankBudget.__name__:
            budget = self.recipe["threshold"]
            if (saved["loss"], saved["every"]) == (budget.loss, budget.every):
                keep.add("threshold")
        merger.load_state_dict(state, keep=sorted(keep))

    def join(self, merger: InMerge, steps: int) -> None:
        """Have ``merger`` go on in a run whose first ``steps`` steps were taken without it, and say so."""
        merger.step_count = steps
        warnings.warn(
            f"training resumes after {steps} optimizer steps from a checkpoint that was saved without this "
            f"{self._owner}{f' ({self.label})' if self.label else ''}: they were not merged, and merging goes on as "
            f"planned for step {steps}",
            UserWarning,
            stacklevel=callers_level(),
        )
