"""A call after each optimizer step: once, after all that the step writes."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ..effect import callers_level
from ..plan.plan import LayerPlan
from .optimizers import Stepping, check_held, held_by, stepping_of
from .silence import Silence

Before: TypeAlias = "Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]"


class AttachedStep:
    """Calls a function after each step of an optimizer, unless a ``GradScaler`` has skipped the step.

    Where optimizers are wrapped, a step has been taken if the innermost one has stepped, and it is over when the
    outermost call is: Lookahead and others write to the weights once more. Of two that are attached for the same
    weights the older one lets go, with a warning: both would merge after every step.

    Args:
        optimizer: what the training loop steps.
        plan: gives the plan as it is now, of whose weights it must hold at least one, unless all are frozen.
        call: the function.
        let_go: what is called when a newer one is attached for these weights; it must :meth:`remove` this one.
        before: what is called before anything of a step can write, with the arguments of the method that may, which it
            returns; None for nothing.

    Raises:
        TypeError: not an optimizer.
        ValueError: the optimizer holds none of the weights, or its steps cannot be followed.
    """

    def __init__(
        self,
        optimizer: Any,
        plan: Callable[[], LayerPlan],
        call: Callable[[], object],
        let_go: Callable[[], object],
        before: Before | None = None,
    ) -> None:
        weights = plan().weights()
        stepping = stepping_of(optimizer, weights)
        let_others_go(plan().weights(waiting=True))
        self._plan, self._call, self._let_go, self._before = plan, call, let_go, before
        self._is_checked = bool(weights)
        self._real = [weakref.ref(real) for real in stepping.real]
        self._links = [weakref.ref(link) for link in stepping.links]
        self._is_on = True
        self._depth = 0  # calls around a step that have begun
        self._taken = False  # whether a step was taken inside them
        self._handles = [real.register_step_post_hook(self._after_step) for real in stepping.real]
        if before is not None:
            self._handles += [real.register_step_pre_hook(self._before_step) for real in stepping.real]
        self._replaced = [self._surround(owner, name, stepping) for owner, name in stepping.around]
        name = type(optimizer).__name__
        self._silence = Silence(self, name, weights, stepping.real, lambda: plan().weights(waiting=True))
        _attached.add(self)

    def _before_step(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._before is not None
        rest, kwargs = self._before(args[1:], kwargs)  # the first one is the optimizer
        return (args[0], *rest), kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Other optimizers are not called for a step that is skipped; fused and capturable ones get the scaler's verdict
        # as this attribute, skip on the device, and call their hooks all the same.
        self._silence.hear()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            if found_inf.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a GradScaler's verdict about this step lies on the device, where a CUDA graph that is being "
                    "captured cannot be asked for it; use bfloat16, or call step() outside the graph"
                )
            if bool(found_inf > 0):
                return
        if self._depth:
            self._taken = True
        else:
            self._call()

    def _surround(self, owner: Any, name: str, stepping: Stepping) -> tuple[Any, str, Any, Any]:
        """Put a method of one object in brackets; returns what :meth:`remove` needs."""
        before, method = vars(owner).get(name), getattr(owner, name)
        is_a_step = (id(owner), name) in stepping.ends
        of_owner, attached = weakref.ref(owner), self

        @functools.wraps(getattr(method, "__func__", method))
        def surrounded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not of_owner():  # a deep copy, which has taken this along
                return getattr(type(self), name)(self, *args, **kwargs)
            if not attached._is_on:
                return method(*args, **kwargs)
            if attached._before is not None:
                args, kwargs = attached._before(args, kwargs)
            attached._depth += 1
            try:
                result = method(*args, **kwargs)
                attached._taken |= is_a_step
            except BaseException:
                attached._taken = False
                raise
            finally:
                attached._depth -= 1
            if attached._taken and not attached._depth:
                attached._taken = False
                attached._silence.hear()
                attached._call()
            return result

        ours = types.MethodType(surrounded, owner)
        setattr(owner, name, ours)
        return owner, name, before, ours

    @property
    def may_see_a_step(self) -> bool:
        """Whether one of the optimizers is still there."""
        return any(real() is not None for real in self._real)

    def held(self) -> set[int]:
        """Identities of all that the optimizer, or one that it wraps, updates."""
        return set().union(*(held_by(link()) for link in self._links))

    @property
    def is_in_a_step(self) -> bool:
        """Whether a call around a step has begun and not ended."""
        return self._depth > 0

    def look_again(self) -> None:
        """Take in that weights were replaced, or that frozen ones are trained now.

        Raises:
            ValueError: no weight was trained before, and the optimizer holds none of those that are.
        """
        weights = self._plan().weights()
        self._silence.look_at(weights)
        if weights and not self._is_checked:
            self._is_checked = True
            optimizers = [real() for real in self._real]
            check_held([optimizer for optimizer in optimizers if optimizer is not None], weights)

    def holds(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether it merges one of these weights after steps that may come."""
        if not self._is_on or not (self.may_see_a_step or self._before):  # before a step there is a forward pass
            return False
        try:
            return not set(map(id, weights)).isdisjoint(map(id, self._plan().weights(waiting=True)))
        except ValueError:  # its weights are gone
            return False

    def let_go(self) -> None:
        """Make way for a newer one."""
        self._let_go()

    def remove(self) -> None:
        """Call no more; may be called again."""
        self._is_on = False
        _attached.discard(self)
        self._silence.remove()
        for handle in self._handles:
            handle.remove()
        for owner, name, before, ours in reversed(self._replaced):
            if vars(owner).get(name) is not ours:
                continue  # wrapped by others since, as by a scheduler: it stays, and only passes calls on
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._handles, self._replaced = [], []


_attached: weakref.WeakSet[AttachedStep] = weakref.WeakSet()  # all that are on


def let_others_go(weights: Sequence[torch.Tensor]) -> bool:
    """Detach, with a warning, whoever else is attached for one of these weights; returns True, as nobody is now."""
    for other in [one for one in list(_attached) if one.holds(weights)]:
        other.let_go()
        if not other.may_see_a_step:
            continue
        warnings.warn(
            "another InMerge was attached to an optimizer for the same weights, and has been detached: both would have "
            "merged after every step. detach() the old one first, as `with InMerge(model).attach(optimizer):` does",
            UserWarning,
            stacklevel=callers_level(),
        )
    return True
