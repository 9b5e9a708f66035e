"""Whether a tree of modules is still the one that a plan was made for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_

import torch
from torch import nn


class Structure:
    """What a plan's targets were made of: every module's children, and every weight that a layer held.

    All references are weak, so that a cached plan keeps neither modules nor weights alive. Checking touches every
    container, child and weight once, without a walk.
    """

    def __init__(self, roots: Sequence[nn.Module | torch.Tensor]) -> None:
        modules = list(dict.fromkeys(chain.from_iterable(r.modules() for r in roots if isinstance(r, nn.Module))))
        self._roots = [weakref.ref(root) for root in roots]
        self._parents = [weakref.ref(module) for module in modules if module._modules]
        children = chain.from_iterable(module._modules.values() for module in modules if module._modules)
        self._children = [_reference(child) for child in children]
        # An empty dict keeps nothing alive, and a list of them is tested in one call.
        self._childless = [module._modules for module in modules if not module._modules]
        holders = [module for module in modules if "weight" in module._parameters]
        self._holders = [weakref.ref(module) for module in holders]
        self._weights = [_reference(module._parameters["weight"]) for module in holders]

    def is_current(self) -> bool:
        """Whether every child and every weight is still the same object, and none came or went."""
        if any(root() is None for root in self._roots) or any(self._childless):
            return False
        parents, holders = [p() for p in self._parents], [h() for h in self._holders]
        if None in parents or None in holders:
            return False
        children = list(chain.from_iterable([m._modules.values() for m in parents]))  # type: ignore[union-attr]
        weights = [m._parameters.get("weight") for m in holders]  # type: ignore[union-attr]
        return (
            len(children) == len(self._children)
            and all(map(is_, children, [child() for child in self._children]))
            and all(map(is_, weights, [weight() for weight in self._weights]))
        )


def _nothing() -> None:
    return None


def _reference(value: object) -> Callable[[], object]:
    return _nothing if value is None else weakref.ref(value)
