"""Notices that weights are trained while nobody hears of a step: another optimizer has taken over, perhaps."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    """Warns once where the weights are trained all along without a step that is heard.

    Looks at the version of one weight after each backward pass, a number on the host that every write in place raises;
    a look costs less than a microsecond. That weight may be frozen in stage two, of all weights, and its gradients
    looked at no more: so the steps of all other optimizers that hold some of the weights are listened to as well.

    Args:
        around: tells whether a step is under way: what is computed inside it is no evidence.
        name: how the warning calls what is attached to.
        weights: the weights.
        real: the optimizers whose steps are heard.
        waiting: gives the weights, and those that are frozen now.
    """

    def __init__(
        self,
        around: Surroundings,
        name: str,
        weights: Sequence[torch.Tensor],
        real: Sequence[torch.optim.Optimizer],
        waiting: Callable[[], Sequence[torch.Tensor]],
    ) -> None:
        self._around, self._name, self._waiting = around, name, waiting
        self._heard_before_backward = self._heard_before_other = False
        self._silent = self._others = 0  # changes, and steps of other optimizers, since a step was heard
        self._version = -1
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._real = weakref.WeakSet(real)
        # Which of the weights each other optimizer holds.
        self._held: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[torch.Tensor]] = weakref.WeakKeyDictionary()
        _listen_to_all()
        _listening.add(self)
        # Some compute gradients time and again within a step, and write in between, as line searches do.
        self._is_deaf = any(isinstance(one, torch.optim.LBFGS) for one in real)
        self.look_at(weights)

    def look_at(self, weights: Sequence[torch.Tensor]) -> None:
        """Look at one of these weights from now on, if there is one that can be looked at."""
        self._stop_looking()
        self._held.clear()
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
        if self._heard_before_backward:
            self._heard_before_backward, self._silent = False, 0
            return
        self._silent += 1
        if self._silent == SILENT_STEPS:
            self._warn("Something else trains them now; detach(), and attach to what steps")

    def listen(self, other: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""
        if other in self._real or self._around.is_in_a_step:
            return
        held = self._held.get(other)
        if held is None:
            try:
                wanted = set(map(id, self._waiting()))
            except ValueError:  # the weights are gone
                return
            held = [p for group in other.param_groups for p in group["params"] if id(p) in wanted]
            self._held[other] = held
        if not any(p.grad is not None for p in held):
            return
        if self._heard_before_other:
            self._heard_before_other, self._others = False, 0
            return
        self._others += 1
        if self._others == SILENT_STEPS:
            self._warn(f"A {type(other).__name__} trains them now; detach(), and attach to that")

    def hear(self) -> None:
        """A step was taken."""
        self._heard_before_backward = self._heard_before_other = True

    def _warn(self, cause: str) -> None:
        self.remove()
        warnings.warn(
            f"the weights have changed {SILENT_STEPS} times, and the {self._name} that InMerge is attached to has "
            f"not stepped in between: nothing is merged. {cause}, or call merger.step() after each of its steps",
            NoEffectWarning,
            stacklevel=callers_level(),
        )

    def remove(self) -> None:
        """Look and listen no more; may be called again."""
        _listening.discard(self)
        self._stop_looking()

    def _stop_looking(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


_listening: weakref.WeakSet[Silence] = weakref.WeakSet()


@functools.cache
def _listen_to_all() -> None:
    # Once and for good: PyTorch goes through its hooks when one of ours, or the garbage collector, might take one away.
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # Compiled optimizers are not listened to: they would have a graph break, and so would everybody's.
    if torch.compiler.is_compiling() or not _listening:
        return
    for silence in list(_listening):
        silence.listen(optimizer)


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
