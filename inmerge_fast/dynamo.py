"""Keeps torch.compile out of functions that write to weights, at little cost where nothing is being compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

# torch.compiler.disable, applied at the first call: at import it would pull in Dynamo and Triton (2 s).
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def outside_dynamo(function: F) -> F:
    """A graph break around ``function``, inside of which nothing is compiled.

    Inductor can lose a partial in-place write to a weight inside a compiled region. What torch.compiler.disable does to
    every call takes 3.5 us, so it is done only where Dynamo watches this thread.
    """
    disabled = _disable_dynamo(function)
    try:
        frames = torch._C._dynamo.eval_frame
        watching = frames.get_eval_frame_callback
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if watching() is None else disabled(*args, **kwargs)

        frames.set_code_exec_strategy(getattr(guarded, "__code__"), skip)  # noqa: B009
    except (AttributeError, TypeError):  # they are PyTorch's private business
        return cast(F, disabled)
    guarded._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, guarded)
