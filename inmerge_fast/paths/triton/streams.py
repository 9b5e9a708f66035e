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
        self._stream: int | None = None

    def follow(self) -> int:
        """The current stream; the first time on another one, it waits for what this plan still does on the last."""
        if not self._on_gpu:
            return 0
        stream = raw_stream(self._device)
        if stream != self._stream:
            current = torch.cuda.current_stream(self._device)
            # torch.cuda.graph() synchronises before it captures, and a captured stream may not wait for another.
            if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                current.wait_stream(torch.cuda.ExternalStream(self._stream, self._device))
            for tensor in self._tensors():  # or their memory would be reused as if only their first stream used it
                tensor.record_stream(current)
            self._stream = stream
        return stream
