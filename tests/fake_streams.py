"""Stand-ins for streams and CUDA graphs: what the launcher asks of them, while Triton's interpreter runs its kernels.

They cannot show that a wait holds anything up, nor what PyTorch makes of a handle: in test_torch_on_stub.py PyTorch's
own streams record their events, and in test_gpu_runtime.py there is work to wait for.
"""

import contextlib

import pytest
import torch
from test_kernel_details import CALL
from test_kernels import alike, launcher_of

from inmerge_fast.paths.triton import streams
from inmerge_fast.paths.triton.handle import Handle

CUDA = torch.device("cuda:0")


class Stream:
    """Stands in for ``torch.cuda.Stream``: its handle, whether a graph takes it along, and whom it waited for."""

    made = 0

    def __init__(self, handle, captured=False):
        self.cuda_stream, self.captured, self.waited_for = handle, captured, []

    def wait_stream(self, other):
        self.waited_for.append(other.cuda_stream)

    @classmethod
    def external(cls, handle, device=None):
        """``torch.cuda.ExternalStream``, to which 0 is no handle but none: it makes a new stream."""
        cls.made += not handle
        return cls(handle or 1000 + cls.made)


class Recorded(torch.Tensor):
    """A tensor that remembers which streams its memory was said to be used on."""

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


class Graph:
    """Stands in for a CUDA graph: takes the launches of a launcher along, and makes them at each replay."""

    def __init__(self):
        self.launches = []

    @contextlib.contextmanager
    def capture(self, launcher, switch):
        pretend_on_gpu(launcher)
        switch(Stream(5, captured=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handle, "launch", lambda *launch: self.launches.append(launch))
            yield
        switch(Stream(0))
        pretend_on_gpu(launcher, False)

    def replay(self):
        for launch in self.launches:
            Handle.launch(*launch)


def pretend_on_gpu(launcher, on_gpu=True):
    launcher.device, launcher.on_gpu = (CUDA, True) if on_gpu else (torch.device("cpu"), False)
    launcher._streams._device, launcher._streams._on_gpu = launcher.device, on_gpu


def launcher_on_streams(monkeypatch):
    """A launcher that believes itself on a GPU, and a function that makes a stream current."""
    weights = [alike(9, 20)]
    launcher = launcher_of(weights)
    launcher.weights = weights  # keeps them alive
    launcher.reserve_scratch(0.3)
    launcher.run(1, 0, prob=0.3, **CALL, dry_run=True, partner="nearest")  # builds what partner rules need
    pretend_on_gpu(launcher)
    tables = launcher, launcher.running, launcher.slots, launcher.matcher
    for holder in (*map(vars, tables), launcher.matcher._work):
        for name, value in holder.items():
            if isinstance(value, torch.Tensor):
                holder[name] = value.as_subclass(Recorded)
                holder[name].streams = []
    monkeypatch.setattr(launcher, "on_device", contextlib.nullcontext)
    current = [Stream(0)]

    def switch(stream):
        current[0] = stream

    @contextlib.contextmanager
    def inside(stream):
        outside, current[0] = current[0], stream
        yield
        current[0] = outside

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0].captured)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream.external)
    monkeypatch.setattr(streams, "raw_stream", lambda device: current[0].cuda_stream)
    return launcher, switch
