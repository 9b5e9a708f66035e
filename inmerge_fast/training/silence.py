"""Notices that weights are trained while nobody hears of a step: another optimizer has taken over, perhaps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from ..effect import callers_level
from ..stats import NoEffectWarning

SILENT_STEPS = 16  # changes in a row without a step; gradients of so few batches are accumulated, if of any
EVALUATION_STEPS = 100  # steps in evaluation mode, before any in training mode, after which a warning says so


class Surroundings(Protocol):
    """What tells whether a step is under way."""

    @property
    def is_in_a_step(self) -> bool:
        """Whether it is."""


class Silence:
    """Looks at the version of one weight after each backward pass, and warns once where it has changed all along.

    The version is a number on the host that every write in place raises. A look costs less than a microsecond.

    Args:
        around: tells whether a step is under way: what is computed inside it is no evidence.
        name: how the warning calls what is attached to.
        weights: the weights.
        real: the optimizers whose steps are heard.

    Attributes:
        heard: whether a step was heard since the last backward pass.
    """

    def __init__(
        self,
        around: Surroundings,
        name: str,
        weights: Sequence[torch.Tensor],
        real: Sequence[torch.optim.Optimizer],
    ) -> None:
        self._around, self._name = around, name
        self.heard = False
        self._silent = 0
        self._version = -1
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        # Some compute gradients time and again within a step, and write in between, as line searches do.
        self._is_deaf = any(isinstance(one, torch.optim.LBFGS) for one in real)
        self.look_at(weights)

    def look_at(self, weights: Sequence[torch.Tensor]) -> None:
        """Look at one of these weights from now on, if there is one that can be looked at."""
        self.remove()
        weight = next((w for w in weights if type(w) in (torch.Tensor, torch.nn.Parameter) and w.requires_grad), None)
        if weight is not None and not self._is_deaf and not weight.is_inference():
            self._version, self._silent = weight._version, 0
            of_self = weakref.ref(self)  # PyTorch would keep it, and the model in a circle that nobody collects

            def look(weight: torch.Tensor) -> None:
                silence = of_self()
                if silence is not None:
                    silence._look(weight)

            self._handle = weight.register_post_accumulate_grad_hook(look)

    def _look(self, weight: torch.Tensor) -> None:
        version = weight._version
        if version == self._version or self._around.is_in_a_step:
            return
        self._version = version
        if self.heard:
            self.heard, self._silent = False, 0
            return
        self._silent += 1
        if self._silent == SILENT_STEPS:
            self.remove()
            warnings.warn(
                f"the weights have changed {SILENT_STEPS} times, and the {self._name} that InMerge is attached to has "
                "not stepped in between: nothing is merged. Something else trains them now; detach(), and attach to "
                "what steps, or call merger.step() after each of its steps",
                NoEffectWarning,
                stacklevel=callers_level(),
            )

    def remove(self) -> None:
        """Look no more; may be called again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class Evaluation:
    """Counts the steps that are asked for in evaluation mode, and warns where the model is trained all the same.

    Attributes:
        calls: such steps since the last one in training mode.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._changes, self._version = 0, -1

    def count(self, weight: torch.Tensor | None, steps: int) -> None:
        """Count a step that was not taken.

        Args:
            weight: one of the weights.
            steps: steps that were taken so far.
        """
        self.calls += 1
        version = -1 if weight is None or weight.is_inference() else weight._version
        self._changes += self.calls > 1 and version != self._version
        self._version = version
        is_trained = self._changes == SILENT_STEPS
        if is_trained or (self.calls == EVALUATION_STEPS and steps == 0 and self._changes < SILENT_STEPS):
            change = ", while the weights change," if is_trained else " and all of them"
            warnings.warn(
                f"{self.calls} steps of InMerge{change} in evaluation mode, where nothing is merged; if this is "
                "training, call model.train()",
                NoEffectWarning,
                stacklevel=callers_level(),
            )

    def end(self) -> None:
        """A step in training mode."""
        self.calls = self._changes = 0
