"""What really steps, where an optimizer is wrapped in others: whose step is a step, and what is done around it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LAST_OF_A_STEP = ("third_step", "second_step")  # the last one that a class has, as sharpness-aware optimizers do


@dataclass(frozen=True)
class Stepping:
    """The optimizers of one training step.

    Attributes:
        real: those whose step changes the weights; PyTorch calls their hooks after it.
        around: ``(optimizer, method)`` that may call them, and write to the weights afterwards.
        ends: those of ``around`` that are a step of their own accord.
        links: all of them, wrapped and wrapping.
    """

    real: tuple[torch.optim.Optimizer, ...]
    around: tuple[tuple[Any, str], ...]
    ends: frozenset[tuple[int, str]]
    links: tuple[Any, ...]


def stepping_of(optimizer: Any, weights: Sequence[torch.Tensor]) -> Stepping:
    """Find out what steps when ``optimizer`` does, wrapped or not, and make sure that PyTorch calls its hooks.

    Wrappers are followed by what they hold: accelerate's and Lightning's, Lookahead, sharpness-aware optimizers,
    ``PostLocalSGDOptimizer``, ``ZeroRedundancyOptimizer``, containers of several optimizers.

    Args:
        optimizer: what the training loop steps.
        weights: what it must hold at least one of; none if it cannot be told yet.

    Raises:
        TypeError: not an optimizer.
        ValueError: it holds none of the weights, or PyTorch does not call hooks after its steps.
    """
    wanted = set(map(id, weights))
    if not _is_like_an_optimizer(optimizer):
        found = [f"{path} ({type(inner).__name__})" for path, inner in _inside(optimizer)]
        hint = f"; attach to its {' or '.join(found)}" if found else ""
        if optimizer is None:
            hint = ": make the optimizer first, and attach to it"
        raise TypeError(f"optimizer must be a torch.optim.Optimizer to attach to, got {type(optimizer).__name__}{hint}")
    chain = _chain(optimizer, wanted)
    if wanted:
        check_held([link for link, _ in chain], weights)
    real = [link for link, inner in chain if not inner]
    real = [one for one in real if held_by(one) & wanted] or real  # none on a rank that has no share of these weights
    for one in real:
        _check_hooks_are_called(one, optimizer)
    around, ends = [], set()
    for link, inner in chain:
        last = next((name for name in LAST_OF_A_STEP if callable(getattr(type(link), name, None))), None)
        if inner or last is not None or _may_step_within_its_step(link):
            around += [(link, name) for name in _steps_of(link)]
            ends |= {(id(link), last)} if last is not None else set()
    return Stepping(tuple(real), tuple(around), frozenset(ends), tuple(link for link, _ in chain))  # type: ignore[arg-type]


def check_held(optimizers: Sequence[Any], weights: Sequence[torch.Tensor]) -> None:
    """Raise where optimizers hold none of the weights.

    Raises:
        ValueError: they hold none.
    """
    wanted = set(map(id, weights))
    if not any(held_by(optimizer) & wanted for optimizer in optimizers):
        raise ValueError(
            "the optimizer holds none of the weights that are merged: it updates another model, or copies of them "
            "(float32 masters), which would overwrite every merge; attach to the optimizer of these weights, or give "
            "InMerge what this one updates"
        )


def _is_like_an_optimizer(value: Any) -> bool:
    if isinstance(value, torch.optim.Optimizer):
        return True
    return not isinstance(value, (nn.Module, type)) and all(
        hasattr(value, name) for name in ("step", "zero_grad", "param_groups")
    )


def _inside(holder: Any) -> Iterator[tuple[str, Any]]:
    """Optimizers that an object holds, also in its lists and dicts, with the expression that gives them."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        items: Iterable[tuple[str, Any]] = [(name, value)]
        if isinstance(value, (list, tuple)):
            items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, dict) and name not in ("state", "defaults"):
            items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
        for path, item in items:
            if _is_like_an_optimizer(item):
                public = path.lstrip("_")  # wrappers hide what they hold behind a property
                yield (public if getattr(holder, public, None) is item else path), item


def _chain(optimizer: Any, wanted: set[int]) -> list[tuple[Any, list[Any]]]:
    """The optimizer and all that it holds for the same weights, outermost first, each with what it holds itself."""
    chain: list[tuple[Any, list[Any]]] = []
    seen = {id(optimizer)}

    def follow(link: Any) -> None:
        own = held_by(link) | wanted
        # A share of the weights may be empty on some rank; what holds other weights is somebody else's.
        inner = [
            item for _, item in _inside(link) if id(item) not in seen and (held_by(item) & own or not held_by(item))
        ]
        seen.update(map(id, inner))
        chain.append((link, inner))
        for item in inner:
            follow(item)

    follow(optimizer)
    return chain


def held_by(optimizer: Any) -> set[int]:
    """Identities of all that an optimizer updates."""
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def _steps_of(optimizer: Any) -> list[str]:
    """Names of the methods that may be a part of a step: ``step``, ``first_step``, ``step_and_update`` and so on."""
    names = [name for name in dir(type(optimizer)) if "step" in name.split("_") and name[0] != "_"]
    return [
        name
        for name in names
        if "hook" not in name
        and not name.startswith(("get", "set"))
        and inspect.isfunction(getattr(type(optimizer), name, None))
    ]


def _may_step_within_its_step(optimizer: Any) -> bool:
    """Whether a step may call a step of a parent class, after which PyTorch calls the hooks as well."""
    written = {inspect.unwrap(vars(c)["step"]) for c in type(optimizer).__mro__ if "step" in vars(c)}
    return len(written - {torch.optim.Optimizer.step}) > 1


def _check_hooks_are_called(real: Any, given: Any) -> None:
    name = type(real).__name__
    whose = "" if real is given else f", inside the {type(given).__name__},"
    cure = "call merger.step() after each of its steps instead"
    if not isinstance(real, torch.optim.Optimizer):
        raise ValueError(f"{name}{whose} is no torch.optim.Optimizer, and nothing is called after its step: {cure}")
    if getattr(real, "_overlap_with_ddp", False):
        raise ValueError(f"{name}{whose} steps in the middle of backward with overlap_with_ddp=True: attach without it")
    if "_optimizer_step_post_hooks" not in vars(real):
        raise ValueError(
            f"{name}{whose} has no hooks, because its __init__ does not call torch.optim.Optimizer.__init__: attach to "
            f"the optimizer that it wraps, if there is one, or {cure}"
        )
    if not getattr(type(real).step, "hooked", False):
        real._patch_step_function()  # as Optimizer.__init__ does, which it has not called either
    if not getattr(real.step, "hooked", False):
        raise ValueError(
            f"{name}{whose} has had its step replaced by {getattr(real.step, '__qualname__', real.step)}, which may "
            f"call no hooks: attach before it is replaced and wrap the step with functools.wraps, or {cure}"
        )
