"""Whether a plan's targets are still what they were: the same modules, with the same weights in the same memory."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .. import native
from .candidates import is_mergeable_module
from .filters import has_memory
from .rows import Rows

_PROPERTIES = (torch.Tensor.is_leaf, torch.Tensor.requires_grad)


class Watch(Protocol):
    """Whether a target is still what it was, in C (``kernels/cpu/watch.c``)."""

    def weights(self) -> list[torch.Tensor] | tuple[torch.Tensor, ...] | None:
        """The plan's weights in its order; a tuple if some of them lie elsewhere; None if anything else has changed."""

    def take_note(self) -> None:
        """Expect the weights where they lie now."""


class Structure:
    """What a plan's targets were made of: every module's children, and the weights of convolutions and Linears.

    All references are weak, so that a cached plan keeps neither modules nor weights alive. Children are told apart by
    their ids. That is sound while none of them has died, because an id comes back only then, and every reference says
    when its object dies. Checking touches every container, child and weight once, without a walk: 25 us for
    DenseNet-121 with its 319 children and 121 weights, where a comparison of weak references takes 70.
    """

    def __init__(self, roots: Sequence[nn.Module | torch.Tensor]) -> None:
        modules = list(dict.fromkeys(chain.from_iterable(r.modules() for r in roots if isinstance(r, nn.Module))))
        tensors = [root for root in roots if isinstance(root, torch.Tensor)]
        holders = [module for module in modules if is_mergeable_module(module)]
        # TorchScript keeps the children of its modules elsewhere; none of them can be merged.
        containers = [module for module in modules if isinstance(module._modules, dict)]
        self._died: list[object] = []
        self._watched = [self._watch(x) for x in (*roots, *modules)]
        # An empty dict keeps nothing alive, and a list of them is tested in one call.
        self._childless = [module._modules for module in containers if not module._modules]
        self._parents = [self._watch(module) for module in containers if module._modules]
        # The hash of a tuple of children is that of their ids, unless a class of them has its own.
        self._summary = _hash_of if all(type(m).__hash__ is object.__hash__ for m in modules) else _ids_of
        self._children = self._summary([module._modules for module in containers if module._modules])
        with_weight = [holder for holder in holders if "weight" in holder._parameters]
        self._holders = [self._watch(holder) for holder in with_weight]
        self._others = [self._watch(holder) for holder in holders if "weight" not in holder._parameters]
        # No weak references to Parameters: torch.utils.swap_tensors refuses what has one. Nor are they needed: a plan
        # looks at nothing of a weight but its memory, which is compared anyway, and at which layers share one.
        self._weights = [id(holder._parameters["weight"]) for holder in with_weight]
        self._tensors = [self._watch(tensor) for tensor in tensors]

    def compiled(self, picks: Sequence[int], trained: Sequence[bool | None]) -> Watch | None:
        """The same check and that of :class:`Storage` in one call of C code; None where that cannot be had.

        25 us instead of 56 for DenseNet-121.

        Args:
            picks: the plan's weights, as places in :meth:`weights`.
            trained: whether each of those weights must go on to require a gradient or not to; None for either.
        """
        kernel, exchange = native.load(), getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        if isinstance(kernel, str) or exchange is None:
            return None
        try:
            watch: Watch = kernel.Watch(
                exchange, _PROPERTIES, self._died, self._childless, self._parents, self._holders, self._others,
                self._tensors, list(picks), bytes(0 if must is None else 1 + must for must in trained),
            )  # fmt: skip
        except ValueError:  # e.g. a weight of more than eight dimensions
            return None
        return watch

    def _watch(self, value: Any) -> weakref.ref[Any]:
        return weakref.ref(value, self._died.append)

    def weights(self) -> list[Any] | None:
        """Weights of all convolutions and Linears in module order, then the tensors; None if anything has changed.

        Changed means that a child or a weight is not the same object any more, or that one came or went.
        """
        if self._died or any(self._childless):
            return None
        try:
            children = self._summary([parent()._modules for parent in self._parents])  # type: ignore[union-attr]
            weights = [holder()._parameters["weight"] for holder in self._holders]  # type: ignore[union-attr]
            gained = any("weight" in holder()._parameters for holder in self._others)  # type: ignore[union-attr]
        except (AttributeError, KeyError):  # an object died just now, or a layer has lost its weight
            return None
        if gained or children != self._children or list(map(id, weights)) != self._weights:
            return None
        weights += [tensor() for tensor in self._tensors]
        return None if self._died else weights


# Of a dict with str keys, the collector's referents are its values in order: 9 us less than asking each dict for them.
def _hash_of(children: list[Any]) -> int:
    return hash(tuple(gc.get_referents(*children)))


def _ids_of(children: list[Any]) -> list[int]:
    return list(map(id, gc.get_referents(*children)))


class Storage:
    """Where weights lie in memory and how they are read: address, dtype, shape and strides of each.

    PyTorch's own guards compare dtype, shape and strides of many tensors in one call of C++ code, 14 us instead of 50
    for 110 layers. They also compare modes that do not matter here, so what they refuse is looked at again, one by one.

    Args:
        rows: the filters of the plan, which are told where the weights have moved.
        weights: the weights that hold them.
    """

    def __init__(self, rows: Rows, weights: Sequence[torch.Tensor]) -> None:
        self._rows, self._layers = rows, rows.layers
        self._pointers = [weight.data_ptr() for weight in weights]
        self._bytes = np.array([weight.numel() * weight.element_size() for weight in weights], np.int64)
        self._types = list(map(type, weights))
        self._guards: Callable[..., bool] = _refuse
        self._renew_guards(weights)

    def _renew_guards(self, weights: Sequence[torch.Tensor]) -> None:
        try:
            self._guards = torch._C._dynamo.guards.TensorGuards(
                *weights, dynamic_dims_sizes=None, dynamic_dims_strides=None
            ).check
        except (AttributeError, TypeError):  # they are PyTorch's private business
            self._guards = _refuse

    def move(self, weights: Sequence[torch.Tensor]) -> bool:
        """Take note of where the same tensors lie now, read in the same way.

        ``weight.data = other`` moves a weight, as sharpness-aware optimizers do at every step.

        Returns:
            False where they cannot be merged there: what a fresh plan would refuse, it shall refuse.
        """
        pointers = list(map(torch.Tensor.data_ptr, weights))
        for weight, pointer, before in zip(weights, pointers, self._pointers, strict=True):
            if pointer != before and (weight.is_inference() or weight.is_neg() or not has_memory(weight)):
                return False
        start = np.array(pointers, np.int64)
        order = np.argsort(start)
        if (start[order[:-1]] + self._bytes[order[:-1]] > start[order[1:]]).any():
            return False  # two of them share memory
        for layer, pointer in zip(self._layers, pointers, strict=True):
            layer.pointer = pointer
        self._pointers = pointers
        self._rows.moves += 1
        return True

    def holds(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether the same tensors are read in the same way; where they lie now is taken note of."""
        if list(map(type, weights)) != self._types:
            return False
        if list(map(torch.Tensor.data_ptr, weights)) != self._pointers and not (
            all(layer.is_read_alike() for layer in self._layers) and self.move(weights)
        ):
            return False
        # Without grad mode some versions of the guards do not see that a tensor has come to require a gradient.
        if torch.is_grad_enabled() and self._guards(*weights):
            # They do not see requires_grad_(False) and then mul_ by a tensor with a gradient: it requires one again.
            return all(map(_is_leaf, weights))
        if not all(layer.is_current() for layer in self._layers):
            return False
        if torch.is_grad_enabled():
            self._renew_guards(weights)
        return True


_is_leaf = operator.attrgetter("is_leaf")


def _refuse(*_: object) -> bool:
    return False
