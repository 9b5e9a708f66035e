"""What tests on a GPU have in common."""

import contextlib
import warnings

import torch

CYCLES_PER_SECOND = 1_980_000_000  # of the fastest clock: waits may be longer, which is as well


def keep_busy(seconds):
    """Occupy the current stream; the event is done when the stream is free again."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def synchronising_raises():
    """Calls that make the host wait for the device raise a RuntimeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype, once it has set it
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
