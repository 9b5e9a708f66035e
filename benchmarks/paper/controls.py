"""What merging is compared with: Gaussian noise as large, DropConnect and Dropout2d on the same layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from inmerge_fast import MergePlan, merged

from .config import Merging

Change = Callable[[Sequence[torch.Tensor], int], list[torch.Tensor]]


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one optimizer step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class OtherWeights:
    """Other weights for the forward and backward pass of a step, restored before the update.

    Args:
        plan: the layers.
        change: gives their other weights, from the weights and the number of the step.
    """

    def __init__(self, plan: MergePlan, change: Change) -> None:
        self._plan, self._change = plan, change
        self._saved: list[torch.Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Restore before every step of ``optimizer``; gives what undoes that."""
        return optimizer.register_step_pre_hook(lambda *_: self.restore()).remove

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Before the first forward pass of a step."""
        self.restore()
        weights = self._plan.weights()
        saved = [weight.detach().clone() for weight in weights]
        others = self._change(weights, step)
        self._saved = saved
        for weight, other in zip(weights, others, strict=True):
            weight.copy_(other)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights their old bits back, if they are changed."""
        saved, self._saved = self._saved, []
        for weight, old in zip(self._plan.weights(), saved, strict=True) if saved else ():
            weight.copy_(old)


def noise_like_merging(plan: MergePlan, setting: Merging, seed: int) -> Change:
    """Every filter that forward-only merging would move is moved as far, in a random direction.

    With ``same_angle`` that direction is random only across the filter: along it, it moves as merging would. So it has
    the norm, the angle to its old self and the distance from it of a merged filter, and only the partner is missing.
    Without, alpha 0.5 between orthogonal filters of one norm is 45 degrees, and noise of that length 35.
    """

    def change(weights: Sequence[torch.Tensor], step: int) -> list[torch.Tensor]:
        before = [weight.detach().clone() for weight in weights]
        arguments: dict[str, Any] = {
            "alpha": setting.alpha, "prob": setting.prob, "threshold": setting.limit(), "partner": setting.partner
        }  # fmt: skip
        with merged(plan, **arguments, seed=seed, step=step):
            moved = [(weight - old).flatten(1) for weight, old in zip(weights, before, strict=True)]
        draws, out = generator(seed, step), []
        for old, move in zip(before, moved, strict=True):
            noise = torch.randn(old.shape, generator=draws).to(old).flatten(1)
            along = torch.zeros_like(noise)
            if setting.same_angle:
                along = _along(move, old.flatten(1))
                noise = noise - _along(noise, old.flatten(1))
            scale = (move - along).norm(dim=1) / noise.norm(dim=1).clamp_min(torch.finfo(noise.dtype).tiny)
            out.append(old + (along + noise * scale[:, None]).view_as(old))
        return out

    return change


def _along(vectors: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The part of each row of ``vectors`` along that of ``directions``; zero along a zero row."""
    squares = directions.square().sum(1, keepdim=True)
    return torch.where(squares > 0, (vectors * directions).sum(1, keepdim=True) / squares, 0.0) * directions


def dropconnect(prob: float, seed: int) -> Change:
    """Each weight is zero with probability ``prob``; the others are larger by as much (Wan et al. 2013)."""

    def change(weights: Sequence[torch.Tensor], step: int) -> list[torch.Tensor]:
        draws = generator(seed, step)
        kept = [(torch.rand(weight.shape, generator=draws) >= prob).to(weight) for weight in weights]
        return [weight.detach() * one / (1 - prob) for weight, one in zip(weights, kept, strict=True)]

    return change


def dropout2d(net: nn.Module, plan: MergePlan, prob: float) -> Callable[[], None]:
    """Dropout2d behind every layer of a plan: behind the batch norm that follows it, else behind the layer itself.

    Returns:
        What undoes it.

    Raises:
        ValueError: a layer of the plan is not a module of the network.
    """
    # A convolution may hold modules of its own, as EfficientNet's that pad their images first.
    order = [
        (name, module) for name, module in net.named_modules() if name in plan.names or not list(module.children())
    ]
    places = [index for index, (name, _) in enumerate(order) if name in plan.names]
    if len(places) != len(plan.names):
        raise ValueError(f"Dropout2d found {len(places)} of the {len(plan.names)} layers that merge")
    handles = []
    for index in places:
        behind = itertools.takewhile(lambda item: not isinstance(item[1], nn.Conv2d), order[index + 1 :])
        norm = next((module for _, module in behind if isinstance(module, nn.BatchNorm2d)), order[index][1])
        handles.append(
            norm.register_forward_hook(lambda module, _, out: functional.dropout2d(out, prob, module.training))
        )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
