"""Weights that are merged for one forward and backward pass, and get their old bits back before anything is updated."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from .draw import coin_threshold
from .merge_plan import MergePlan
from .paths.path import Call
from .plan.filters import mark_written
from .stats import MergeStats

_leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()  # by the identity of the weight


class Lease:
    """The weights of a plan from a merge until they are restored.

    While it lasts, ``state_dict()`` and ``copy.deepcopy`` of the modules that hold the weights give the filters as they
    were before the merge, and pickling them raises: what is saved never has merged filters.

    Args:
        plan: the plan.
        weights: its weights as they are now.
        call: what to do.

    Raises:
        RuntimeError: one of the weights is merged for a forward pass already.
    """

    def __init__(self, plan: MergePlan, weights: Sequence[torch.Tensor], call: Call) -> None:
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured: forward-only merging draws on the host, and every replay would repeat "
                "this one draw; capture without it"
            )
        for name, weight in zip(plan.names, weights, strict=True):
            if id(weight) in _leases:
                raise RuntimeError(
                    f"layer {name} is merged for a forward pass already; one merge at a time can be undone: leave the "
                    "inner merged() out, or detach the InMerge(lasting=False) of the same weights"
                )
        self._plan, self._weights, self._call = plan, list(weights), call
        path = plan.paths.choose()
        self._path, self._merge = path.name, path.for_now(weights, call)
        self._written: list[tuple[int, int]] | None = None  # version and address of each weight
        self._hooks: list[Any] = []

    def merge(self, *, count: bool = True) -> MergeStats:
        """Merge the weights; if that is interrupted, they are restored.

        Args:
            count: whether the plan's running counts take it in; not if the same draw is merged again.
        """
        _leases.update((id(weight), self) for weight in self._weights)
        try:
            # Before the write: from then on there is something that must not be saved.
            for holder in self._plan.holders():
                self._hooks.append(holder.register_state_dict_post_hook(_SavesAsItWas(self, holder)))
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
        """Whether the weights are merged."""
        return self._written is not None

    def changed(self) -> list[int]:
        """Places of the layers whose weight somebody has written to, moved or replaced since the merge."""
        if self._written is None:
            return []
        return [
            place
            for place, (layer, weight, written) in enumerate(
                zip(self._plan.layers, self._weights, self._written, strict=True)
            )
            if layer.weight is not weight or (_version(weight), weight.data_ptr()) != written
        ]

    def restore(self) -> None:
        """Give the weights their old bits back; does nothing where they have them.

        Raises:
            RuntimeError: a weight was written to, moved or replaced in the meantime. That one stays as it is, and all
                others are restored.
        """
        if self._written is None:
            return
        changed = self.changed()
        self._put_back(changed)
        if changed:
            names = ", ".join(self._plan.names[place] for place in changed)
            raise RuntimeError(
                f"{names}: the weight was written to, moved or replaced while it was merged for a forward pass; it has "
                "been left as it is, with merged filters in it, since restoring it would lose what was written. "
                "Restore first, then write: leave the merged() block before optimizer.step(), merge_(), "
                "load_state_dict() or model.to()"
            )

    def _put_back(self, changed: Sequence[int]) -> None:
        self._merge.restore(changed)
        mark_written([weight for place, weight in enumerate(self._weights) if place not in changed])
        self._written = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for weight in self._weights:
            _leases.pop(id(weight), None)

    def as_it_was(self, weight: torch.Tensor) -> torch.Tensor | None:
        """A copy of a weight, without merged filters; None if it is none of these."""
        place = next((place for place, own in enumerate(self._weights) if own is weight), None)
        if place is None:
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
        place = next((place for place, own in enumerate(self._weights) if own is weight), None)
        if place is None:
            return
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
    return _leases.get(id(weight))


class _SavesAsItWas:
    """Gives the ``state_dict()`` and deep copies of a module the weights as they were before the merge."""

    def __init__(self, lease: Lease, holder: nn.Module) -> None:
        self._lease, self._holder = weakref.ref(lease), weakref.ref(holder)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        lease = self._lease()
        for name, parameter in module._parameters.items():
            if lease is not None and lease.is_merged and parameter is not None and prefix + name in state:
                copy = lease.as_it_was(parameter)
                if copy is not None:
                    state[prefix + name] = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A module's parameters are copied before its hooks, and to be found here.
        lease, holder = self._lease(), self._holder()
        if lease is not None and lease.is_merged and holder is not None:
            for parameter in holder._parameters.values():
                if parameter is not None and isinstance(memo.get(id(parameter)), torch.Tensor):
                    lease.write_old(parameter, memo[id(parameter)])
        return _nothing

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            f"this {type(self._holder()).__name__} is merged for a forward pass, and would be saved so; save it before "
            "the merge or after it was restored, or save its state_dict(), which gives what it was"
        )


def _nothing(*_: object) -> None:
    """What a copied module has in place of the hook."""


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
