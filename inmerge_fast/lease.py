"""Weights that are merged for one forward and backward pass, and get their old bits back before anything is updated."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from .draw import coin_threshold
from .merge_plan import MergePlan
from .paths.path import Call
from .plan.filters import mark_written
from .stats import MergeStats

_leases: dict[int, weakref.ref[Lease]] = {}  # by the identity of the weight, which a lease holds


class Lease:
    """The weights of a plan from a merge until they are restored.

    While it lasts, ``state_dict()`` and ``copy.deepcopy`` of the modules that hold the weights give the filters as they
    were before the merge, and pickling them raises: what is saved never has merged filters. No optimizer that holds one
    of them takes a step. A lease that nobody holds any more restores.

    Args:
        plan: the plan.
        weights: its weights as they are now.
        call: what to do.
        before_step: what restores it before an optimizer steps; None if a step is a mistake, and is to raise.

    Raises:
        RuntimeError: one of the weights is merged for a forward pass already.
    """

    _is_on = False  # also where an interrupt comes before all is set

    def __init__(
        self,
        plan: MergePlan,
        weights: Sequence[torch.Tensor],
        call: Call,
        before_step: Callable[[], object] | None = None,
    ) -> None:
        self._written: list[tuple[int, int]] | None = None  # version and address of each weight
        self._found: tuple[list[int], list[int]] | None = None  # what was replaced and touched, looked at once
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured: forward-only merging draws on the host, and every replay would repeat "
                "this one draw; capture without it"
            )
        self._ids = list(map(id, weights))
        if not _leases.keys().isdisjoint(self._ids):
            name = next((name for name, own in zip(plan.names, weights, strict=True) if lease_of(own)), None)
            if name is not None:
                raise RuntimeError(
                    f"layer {name} is merged for a forward pass already; one merge at a time can be undone: leave the "
                    "inner merged() out, or detach the InMerge(lasting=False) of the same weights"
                )
        self._plan, self._weights, self._call, self._before_step = plan, list(weights), call, before_step
        path = plan.paths.choose()
        self._path, self._merge = path.name, path.for_now(weights, call)
        self._hooked: list[nn.Module] = []

    def merge(self, *, count: bool = True) -> MergeStats:
        """Merge the weights; if that is interrupted, they are restored.

        Args:
            count: whether the plan's running counts take it in; not if the same draw is merged again.
        """
        _watch_steps()
        of_self = weakref.ref(self)
        _leases.update(dict.fromkeys(self._ids, of_self))
        try:
            self._is_on = True
            # Before the write: from then on there is something that must not be saved.
            for hook in _hooks_of(self._plan):
                holder, hook.lease = hook.holder(), of_self
                if holder is not None:
                    self._hooked.append(holder)
                    holder._state_dict_hooks[id(self)] = hook  # what to register does, in a tenth of the time
            outcome = self._merge.merge()
            if count and coin_threshold(self._call.prob) > 0:
                outcome.count_in(self._plan.effect)
            mark_written(self._weights)
            self._written = [(_version(weight), weight.data_ptr()) for weight in self._weights]
        except BaseException:
            self._put_back(())
            raise
        return self._plan.stats(outcome, self._call, self._path)

    @property
    def is_merged(self) -> bool:
        """Whether the weights are merged, or just being merged or restored."""
        return self._is_on

    def changed(self) -> list[int]:
        """Places of the layers whose weight somebody has written to, moved or replaced since the merge."""
        if not self._is_on:
            return []
        replaced, touched = self._found or (self._replaced(), self._touched())
        return sorted({*replaced, *touched})

    def _replaced(self) -> list[int]:
        layers = zip(self._plan.layers, self._weights, strict=True)
        return [place for place, (layer, weight) in enumerate(layers) if layer.weight is not weight]

    def _touched(self) -> list[int]:
        """Places of the layers whose weight, perhaps no longer that of the layer, was written to or moved."""
        if self._written is None:  # it is just being merged
            return []
        return [
            place
            for place, (weight, written) in enumerate(zip(self._weights, self._written, strict=True))
            if (_version(weight), weight.data_ptr()) != written
        ]

    def restore(self) -> None:
        """Give the weights their old bits back; does nothing where they have them.

        Raises:
            RuntimeError: a weight was written to, moved or replaced in the meantime. That one stays as it is, and all
                others are restored.
        """
        try:
            self._end()
        except KeyboardInterrupt:
            self._end()  # all of it
            raise

    def _end(self) -> None:
        if not self._is_on:
            return
        if self._found is None:  # an interrupt may have it called again, when the weights have versions of its own
            self._found = self._replaced(), self._touched()
        replaced, touched = self._found
        self._put_back(touched)  # what was replaced too: whoever lent the layer another one gives it back
        if replaced or touched:
            names = ", ".join(self._plan.names[place] for place in sorted({*replaced, *touched}))
            raise RuntimeError(
                f"{names}: the weight was written to, moved or replaced while it was merged for a forward pass; it has "
                "been left as it is, with merged filters in it, since restoring it would lose what was written. "
                "Restore first, then write: leave the merged() block before optimizer.step(), merge_(), "
                "load_state_dict() or model.to()"
            )

    def _put_back(self, changed: Sequence[int]) -> None:
        self._merge.restore(changed)
        kept = (
            [weight for place, weight in enumerate(self._weights) if place not in changed] if changed else self._weights
        )
        mark_written(kept)
        key = id(self)
        for holder in self._hooked:
            holder._state_dict_hooks.pop(key, None)
        self._hooked.clear()
        for identity in self._ids:
            _leases.pop(identity, None)
        self._is_on = False

    def end_before(self, weight: torch.Tensor, what: str, cure: str) -> None:
        """Restore before somebody updates ``weight``, or averages it.

        Args:
            weight: one of the weights.
            what: what is about to happen, for a message.
            cure: what to do instead.

        Raises:
            RuntimeError: that is not to happen now, or see :meth:`restore`.
        """
        if self._before_step is not None:
            self._before_step()
            return
        name = self._plan.names[self._ids.index(id(weight))]
        raise RuntimeError(f"{name} is merged for a forward pass, and {what}. {cure}")

    def __del__(self) -> None:
        # A block that was never left, as Ctrl-C can have it. There may be no module any more whose weights these are.
        if self._is_on and not sys.is_finalizing():
            self._put_back(self._found[1] if self._found else self._touched())

    def as_it_was(self, weight: torch.Tensor) -> torch.Tensor | None:
        """A copy of a weight, without merged filters; None if it is none of these."""
        if id(weight) not in self._ids:
            return None
        copy = weight.detach().clone()
        self.write_old(weight, copy)
        return copy

    @torch.no_grad()
    def write_old(self, weight: torch.Tensor, copy: torch.Tensor) -> None:
        """Take merged filters out of a copy of ``weight``; does nothing if that is none of these.

        Raises:
            RuntimeError: the weight was changed in the meantime, so that nobody knows what it was to be.
        """
        if id(weight) not in self._ids:
            return
        place = self._ids.index(id(weight))
        if place in self.changed():
            raise RuntimeError(
                f"{self._plan.names[place]}: the weight was changed while it was merged for a forward pass, and can "
                "neither be saved nor copied before that ends"
            )
        index, values = self._merge.old(place)
        layout = self._plan.layers[place].layout
        layout.scatter_(layout.rows(copy), index.to(copy.device), values.to(copy.device))


def lease_of(weight: torch.Tensor) -> Lease | None:
    """The lease that a weight is merged under; None if it is not merged for a forward pass."""
    lease = _leases.get(id(weight))
    return None if lease is None else lease()


def as_it_was(weight: torch.Tensor) -> torch.Tensor:
    """The weight; a copy of what it was if it is merged for a forward pass."""
    lease = lease_of(weight)
    copy = None if lease is None else lease.as_it_was(weight)
    return weight if copy is None else copy


def refuse_to_pickle(module: nn.Module | None) -> NoReturn:
    """Raise, because the pickle of a module would have merged filters."""
    raise RuntimeError(
        f"this {type(module).__name__} is merged for a forward pass, and would be saved so; save it before "
        "the merge or after it was restored, or save its state_dict(), which gives what it was"
    )


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_before_any_step)
    scale_and_step, update = torch.amp.GradScaler.step, AveragedModel.update_parameters

    # A step that a scaler skips calls no hook of any optimizer, and averages that follow would read merged weights.
    @functools.wraps(scale_and_step)
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(optimizer, "param_groups"):
            _before_any_step(optimizer)
        return scale_and_step(self, optimizer, *args, **kwargs)

    # Where a step takes several micro-batches, or a second network's loss has called this one after its own step.
    @functools.wraps(update)
    def update_parameters(self: Any, model: nn.Module) -> Any:
        _before_average(model)
        return update(self, model)

    torch.amp.GradScaler.step = step  # type: ignore[method-assign]
    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


def _before_any_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # Compiled optimizers are not looked at: they would have a graph break, and so would everybody's.
    if torch.compiler.is_compiling() or not _leases:
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            lease = lease_of(weight)
            if lease is not None:
                what = f"the {type(optimizer).__name__} that holds it is about to step: it would update merged weights"
                lease.end_before(weight, what, "Call optimizer.step() after the merged() block")


def _before_average(model: nn.Module) -> None:
    if torch.compiler.is_compiling() or not _leases:
        return
    for weight in model.parameters():
        lease = lease_of(weight)
        if lease is not None:
            what = "an AveragedModel is about to average it, merged filters and all"
            lease.end_before(weight, what, "Call update_parameters() after the merged() block")


class _SavesAsItWas:
    """Gives the ``state_dict()`` and deep copies of a module the weights as they were before the merge."""

    _from_public_api = True  # as register_state_dict_post_hook marks it

    def __init__(self, holder: nn.Module) -> None:
        self.holder = weakref.ref(holder)
        self.lease: Callable[[], Lease | None] = _nothing

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        lease = self.lease()
        for name, parameter in module._parameters.items():
            if lease is not None and lease.is_merged and parameter is not None and prefix + name in state:
                copy = lease.as_it_was(parameter)
                if copy is not None:
                    state[prefix + name] = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A module's parameters are copied before its hooks, and to be found here.
        lease, holder = self.lease(), self.holder()
        if lease is not None and lease.is_merged and holder is not None:
            for parameter in holder._parameters.values():
                if parameter is not None and isinstance(memo.get(id(parameter)), torch.Tensor):
                    lease.write_old(parameter, memo[id(parameter)])
        return _nothing

    def __reduce__(self) -> NoReturn:
        refuse_to_pickle(self.holder())


_hooks: weakref.WeakKeyDictionary[MergePlan, list[_SavesAsItWas]] = weakref.WeakKeyDictionary()


def _hooks_of(plan: MergePlan) -> list[_SavesAsItWas]:
    """A hook for every module that holds a weight of the plan, made once."""
    found = _hooks.get(plan)
    if found is None:
        found = _hooks[plan] = [_SavesAsItWas(holder) for holder in plan.holders()]
    return found


def _nothing(*_: object) -> None:
    """What a copied module has in place of the hook."""


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
