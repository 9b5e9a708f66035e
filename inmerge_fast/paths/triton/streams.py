"""Order between streams: what a plan does on one of them waits for what it still does on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .handle import raw_stream


class StreamOrder:
    """The stream that a plan works on.

    Args:
        device: the plan's device; on a CPU there is nothing to order.
        tensors: gives all device memory that the plan's launches use.
    """

    def __init__(self, device: torch.device, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._device, self._on_gpu, self._tensors = device, device.type == "cuda", tensors
        self._handle: int | None = None
        # The object, not only its handle: torch.cuda.ExternalStream(0) is no stream of the caller's but a new one.
        self._stream: torch.cuda.Stream | None = None

    def follow(self) -> int:
        """The current stream; the first time on another one, it waits for what this plan still does on the last."""
        if not self._on_gpu:
            return 0
        handle = raw_stream(self._device)
        if handle != self._handle:
            current = torch.cuda.current_stream(self._device)
            if self._stream is not None and _may_wait(current, self._stream):
                current.wait_stream(self._stream)
            for tensor in self._tensors():  # or their memory would be reused as if only their first stream used it
                tensor.record_stream(current)
            self._handle, self._stream = handle, current
        return handle


def _may_wait(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> bool:
    """Whether both are part of the graph that is captured, or neither.

    A captured stream cannot wait for what is outside its graph, and need not: ``torch.cuda.graph`` synchronises before
    it captures. Another stream that waited for a captured one would be captured as well.
    """
    return _is_captured(stream) == _is_captured(other)


def _is_captured(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
