"""A call after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class AttachedStep:
    """Calls a function after each step of an optimizer, unless a ``GradScaler`` has skipped the step.

    Args:
        optimizer: the optimizer.
        weights: what it must hold at least one of.
        call: the function.

    Raises:
        TypeError: not a ``torch.optim.Optimizer``.
        ValueError: the optimizer holds none of the weights.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[torch.Tensor], call: Callable[[], object]
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(weight) in held for weight in weights):
            raise ValueError(
                "the optimizer holds none of the weights that are merged: it updates another model, or copies of them "
                "(float32 masters), which would overwrite every merge; give InMerge what the optimizer updates"
            )
        self._call = call
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Other optimizers are not called for a step that is skipped; fused and capturable ones get the scaler's verdict
        # as this attribute, skip on the device, and call their hooks all the same.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            if found_inf.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a GradScaler's verdict about this step lies on the device, where a CUDA graph that is being "
                    "captured cannot be asked for it; use bfloat16, or call step() outside the graph"
                )
            if bool(found_inf > 0):
                return
        self._call()

    def remove(self) -> None:
        """Call no more."""
        self._handle.remove()
