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
from ..lease import Lease, lease_of, refuse_to_pickle
from ..plan.candidates import unwrap_compiled
from ..stats import MergeStats, NoEffectWarning
from .distributed import SHARDED, is_sharded
from .hooks import AttachedStep
from .run import MergeRun

# What is not done with or without ``lasting=False``, and what to do instead.
NO_STEP = (
    "with lasting=False a step begins before the forward pass and ends before the optimizer step: attach() this "
    "InMerge, or put forward and backward into `with merger.merged():`"
)
NO_CAPTURE = "lasting=False does not work in CUDA graphs: the host draws and restores; capture without it"
NO_BLOCK = (
    "merged() is for an InMerge with lasting=False that is not attached: one that merges for good has step(), and an "
    "attached one merges by itself unless you detach() it"
)
IN_BLOCK = (
    "this InMerge is in a merged() block already, and one block is one optimizer step: put all forward and backward "
    "passes of the step into it"
)


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
        self._has_warned = self._in_block = False
        self._attached: AttachedStep | None = None
        self._parts = Parts(self.restore)

    # ------------------------------------------------------------------------------------------------- merge, restore

    @outside_dynamo
    def begin(self) -> MergeStats | None:
        """Merge, unless it is merged already or this step does not merge."""
        run, step = self._run, self._run.step_count
        if self._lease is not None and self._lease.changed():
            self.restore()  # raises: whatever updates the weights, updates merged ones
        if (self._lease is not None and self._lease.is_merged) or not run.recipe.merges_at(step):
            return None
        again, self._merged_at = self._merged_at == step, step
        observed = run.is_observed(step) and not again
        if observed:
            run.monitor.log_due()
        weights, call = run.current_weights(), run.call_at(step)
        if not weights:  # all are frozen
            return None
        self._lease = Lease(run.plan, weights, call, None if self._attached is None else self.restore)
        stats = self._lease.merge(count=not again)
        if observed:
            run.observe(call, stats)
        return stats

    @outside_dynamo
    def restore(self) -> None:
        """Give the weights their old bits back, if they are merged; see :meth:`Lease.restore`."""
        self._parts.leave()
        lease = self._lease
        if lease is None:
            return
        try:
            lease.restore()
        finally:
            if not lease.is_merged:  # else an interrupt came first, and the next step has to find it
                self._lease = None

    @contextmanager
    def merged(self) -> Iterator[MergeStats | None]:
        """Merge for the block, restore at its end, and count the step if nothing was raised.

        Raises:
            RuntimeError: in such a block, whose weights this one's end would restore.
        """
        if self._in_block:
            raise RuntimeError(IN_BLOCK)
        self._in_block = True
        try:
            yield self.begin()
        finally:
            self._in_block = False
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
                "module that the training loop calls, a compiled one as compiled, or use `with merger.merged():`",
                NoEffectWarning,
                stacklevel=callers_level(),
            )
        run.step_count = step + 1

    # ---------------------------------------------------------------------------------------------------------- hooks

    def attach(self, attached: AttachedStep) -> None:
        """Merge before forward passes of the model in training mode, for as long as ``attached`` may see a step."""
        self._attached = attached
        for module in self._called():
            self._undo.append(module.register_forward_pre_hook(self._before_forward).remove)
            self._undo.append(module.register_forward_hook(self._after_forward, always_call=True).remove)
            self._undo.append(module.register_load_state_dict_pre_hook(self._before_load).remove)
        inner = unwrap_compiled(self._model)
        if inner is not self._model:  # evaluated as it is, perhaps
            self._undo.append(inner.register_forward_pre_hook(self._before_uncompiled).remove)
            self._undo.append(inner.register_load_state_dict_pre_hook(self._before_load).remove)

    def detach(self) -> None:
        """Undo :meth:`attach`, and restore."""
        self._attached = None
        while self._undo:
            self._undo.pop()()
        self.restore()
        self._run.plan.paths.release()

    def _called(self) -> list[nn.Module]:
        """What may be called for a forward pass: not what is inside a compiled model, where a hook would be traced."""
        model = self._model
        if unwrap_compiled(model) is not model:
            return [model]
        inner = model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model
        return [model] if inner is model or unwrap_compiled(inner) is not inner else [model, inner]

    @outside_dynamo
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._parts.leave()
        if self._attached is not None and not self._attached.may_see_a_step:
            self._end_alone(module)
        # Reentrant checkpoints compute without gradients first, of inputs that require one, and again in backward.
        elif module.training and (torch.is_grad_enabled() or any(map(_requires_grad, args))):
            self.begin()
        else:
            self.restore()

    def _after_forward(self, *_: object) -> None:
        if self._lease is not None and not self._parts.is_on and not torch.compiler.is_compiling():
            self._parts.watch(self._run.plan.holders())

    def _before_uncompiled(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():  # traced, it is nothing
            self._before_forward(module, args)

    def _before_load(self, *_: object) -> None:
        self.restore()

    def _end_alone(self, module: nn.Module) -> None:
        """The optimizer is gone: another one may be trained with, of whose steps nobody will hear."""
        self.detach()
        if module.training and torch.is_grad_enabled():
            warnings.warn(
                "the optimizer that InMerge(lasting=False) was attached to is gone, and nothing is merged any more; "
                "attach an InMerge to the one that steps now",
                NoEffectWarning,
                stacklevel=callers_level(),
            )

    def before_write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Restore, ahead of a call with these arguments that may write to the weights.

        Returns:
            The arguments, with a closure that evaluates the model changed to do so with merged weights.
        """
        self.restore()
        if callable(kwargs.get("closure")):
            kwargs = kwargs | {"closure": self._merging(kwargs["closure"])}
        if args and callable(args[0]):
            args = (self._merging(args[0]), *args[1:])
        return args, kwargs

    def _merging(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            try:
                if torch.is_grad_enabled():
                    self.begin()
                return closure(*args, **kwargs)
            finally:
                self.restore()

        return evaluate

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardSteps:
        """The hooks of a model's copy must not merge the original."""
        return Idle()

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        for module in self._called():
            if any(parameter is not None and lease_of(parameter) for parameter in module._parameters.values()):
                refuse_to_pickle(module)  # its own weights have been pickled already
        self.restore()  # a module's hooks are saved before the modules in it, so the weights are saved as they were
        return Idle, ()


class Parts:
    """Notices that a part of a model is evaluated on its own, while the weights are merged.

    Its layers have a hook between the model's forward passes only: within one, a layer in evaluation mode is part of a
    pass that trains, as where a backbone's batch norm is held still; and to call 120 hooks takes four times as long as
    to put them in and out again (145 and 35 us).

    Args:
        evaluated: what to do then.
    """

    def __init__(self, evaluated: Callable[[], object]) -> None:
        self._evaluated = evaluated
        self._layers: list[nn.Module] = []

    @property
    def is_on(self) -> bool:
        """Whether the layers have a hook."""
        return bool(self._layers)

    def watch(self, layers: Iterable[nn.Module]) -> None:
        """Put hooks into these layers."""
        key = id(self)
        for layer in layers:
            self._layers.append(layer)
            layer._forward_pre_hooks[key] = self  # what to register does, in a tenth of the time

    def leave(self) -> None:
        """Take them out."""
        key = id(self)
        while self._layers:
            self._layers[-1]._forward_pre_hooks.pop(key, None)
            self._layers.pop()

    def __call__(self, layer: nn.Module, _: object) -> None:
        """A layer is called."""
        # What is computed within a backward pass was checkpointed, and has to see what the forward pass saw.
        if not layer.training and torch._C._current_graph_task_id() == -1:
            self._evaluated()

    def __deepcopy__(self, memo: dict[int, Any]) -> Parts:
        return Parts(_nothing)

    def __reduce__(self) -> tuple[type[Parts], tuple[Any]]:
        return Parts, (_nothing,)


def _nothing() -> None:
    """What a copied layer has to do."""


def _requires_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def check_is_called(model: object) -> nn.Module:
    """The model, if its forward passes can be followed.

    Raises:
        TypeError: it is not a module.
        ValueError: its weights are sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "with lasting=False the model must be the module that the training loop calls, got "
            f"{type(model).__name__}; merge single weights with `with inmerge_fast.merged(weights):`"
        )
    if is_sharded(model):
        raise ValueError(SHARDED)
    return model


class Idle(ForwardSteps):
    """What the hooks of a copied or loaded model call: nothing is attached to it."""

    def __init__(self) -> None:
        self._undo, self._attached, self._lease = [], None, None
        self._parts = Parts(self.restore)

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        return Idle, ()

    def begin(self) -> None:
        """Nothing."""

    def restore(self) -> None:
        """Nothing."""
