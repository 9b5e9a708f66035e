"""Forward-only merging in a training loop: merged before a step's first forward pass, restored before its update."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..dynamo import outside_dynamo
from ..effect import callers_level
from ..lease import Lease
from ..plan.candidates import unwrap_compiled
from ..stats import MergeStats, NoEffectWarning
from .run import MergeRun

# Methods beside step() with which an optimizer of two passes (SAM) writes to the weights.
OTHER_STEPS = ("first_step", "second_step", "ascent_step", "descent_step")


class ForwardSteps:
    """Merges a run's weights for the forward and backward passes of each optimizer step.

    All passes of one step, micro-batches and second passes too, see the same merge. It begins with the model's first
    forward pass in training mode with gradients enabled, and ends at the latest before the optimizer writes. A forward
    pass in evaluation mode or without gradients ends it too; the next training pass of that step begins it again, with
    the same draw and so the same bits.

    Args:
        run: the run.
        model: what is called for a forward pass, as it was given: compiled or not, wrapped or not.
    """

    def __init__(self, run: MergeRun, model: nn.Module) -> None:
        self._run, self._model = run, model
        self._lease: Lease | None = None
        self._merged_at = -1  # the step that was merged last
        self._undo: list[Callable[[], object]] = []
        self._has_warned = False

    # ------------------------------------------------------------------------------------------------- merge, restore

    @outside_dynamo
    def begin(self) -> MergeStats | None:
        """Merge, unless it is merged already or this step does not merge."""
        run, step = self._run, self._run.step_count
        if (self._lease is not None and self._lease.is_merged) or not run.recipe.merges_at(step):
            return None
        again, self._merged_at = self._merged_at == step, step
        observed = run.is_observed(step) and not again
        if observed:
            run.monitor.log_due()
        weights, call = run.current_weights(), run.call_at(step)
        self._lease = Lease(run.plan, weights, call)
        stats = self._lease.merge(count=not again)
        if observed:
            run.observe(call, stats)
        return stats

    @outside_dynamo
    def restore(self) -> None:
        """Give the weights their old bits back, if they are merged; see :meth:`Lease.restore`."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        try:
            lease.restore()
        except KeyboardInterrupt:
            lease.restore()  # all of it
            raise

    @contextmanager
    def merged(self) -> Iterator[MergeStats | None]:
        """Merge for the block, restore at its end, and count the step if nothing was raised."""
        try:
            yield self.begin()
        finally:
            self.restore()
        self.count()

    def count(self) -> None:
        """The optimizer step was taken."""
        run, step = self._run, self._run.step_count
        if self._undo and run.recipe.merges_at(step) and self._merged_at != step and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "an optimizer step was taken, and before it no forward pass in training mode was seen of the "
                f"{type(self._model).__name__} that InMerge(lasting=False) was given: nothing was merged. Give it the "
                "module that the training loop calls, or use `with merger.merged():`",
                NoEffectWarning,
                stacklevel=callers_level(),
            )
        run.step_count = step + 1

    # ---------------------------------------------------------------------------------------------------------- hooks

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Merge before forward passes of the model, and restore before each of these optimizers writes.

        Args:
            optimizers: all that write to the weights in a step, wrappers and what they wrap.
        """
        for module in self._called():
            self._undo.append(module.register_forward_pre_hook(self._before_forward).remove)
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Optimizer):
                self._undo.append(optimizer.register_step_pre_hook(self._before_step).remove)
            for name in OTHER_STEPS:
                if callable(getattr(optimizer, name, None)):
                    self._wrap(optimizer, name)

    def detach(self) -> None:
        """Undo :meth:`attach`, and restore."""
        while self._undo:
            self._undo.pop()()
        self.restore()

    def _called(self) -> list[nn.Module]:
        """What may be called for a forward pass: not what is inside a compiled model, where a hook would be traced."""
        model = self._model
        if unwrap_compiled(model) is not model:
            return [model]
        inner = model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model
        return [model] if inner is model or unwrap_compiled(inner) is not inner else [model, inner]

    @outside_dynamo
    def _before_forward(self, module: nn.Module, _: object) -> None:
        if module.training and torch.is_grad_enabled():
            self.begin()
        else:
            self.restore()

    def _before_step(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.restore()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None
        if "closure" in kwargs:
            return args, kwargs | {"closure": self._restoring(closure)}
        return (args[0], self._restoring(closure), *args[2:]), kwargs

    def _restoring(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure of an optimizer that evaluates the model inside its step, each time with merged weights."""

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            try:
                return closure(*args, **kwargs)
            finally:
                self.restore()

        return evaluate

    def _wrap(self, optimizer: Any, name: str) -> None:
        method = getattr(optimizer, name)

        @functools.wraps(method)
        def restored(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            return method(*args, **kwargs)

        setattr(optimizer, name, restored)

        def undo() -> None:
            if optimizer.__dict__.get(name) is restored:
                delattr(optimizer, name)

        self._undo.append(undo)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardSteps:
        """The hooks of a model's copy must not merge the original."""
        return Idle()

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        self.restore()  # a module's hooks are saved before the modules in it, so the weights are saved as they were
        return Idle, ()


class Idle(ForwardSteps):
    """What the hooks of a copied or loaded model call: nothing is attached to it."""

    def __init__(self) -> None:
        self._undo = []

    def begin(self) -> None:
        """Nothing."""

    def restore(self) -> None:
        """Nothing."""
