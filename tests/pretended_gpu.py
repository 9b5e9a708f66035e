"""A program on a GPU that is pretended: ``python tests/pretended_gpu.py -m benchmarks.bench_merge --quick``.

Tensors are the host's and say that they are on ``cuda:0``; launches go through Triton's own launcher to a driver that
does nothing (``tests/stub_cuda.c``), and the eager path then does what the kernels would have done. Events and streams
keep a clock of their own, which runs behind the host's while the device sleeps. So all code that only a GPU would run
is run, and its figures mean nothing. torch.compile is not pretended: it fails, and that is to be survived, too.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).parent
INSIDE = "PRETENDED_GPU"
PROPERTIES = SimpleNamespace(name="Pretended GPU", multi_processor_count=132, uuid="0", total_memory=2**36, major=9)


class Clock:
    """When the device has done what was queued so far."""

    done = 0.0

    def queue(self, seconds):
        self.done = max(self.done, time.perf_counter()) + seconds
        return self.done

    def wait(self, *_):
        time.sleep(max(0.0, self.done - time.perf_counter()))


class Profile:
    """A profiler that has seen one kernel."""

    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def key_averages(self):
        return [SimpleNamespace(key="_merge_kernel", self_device_time_total=20.0)]


class Stream:
    """The one stream."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        self.device = None

    def wait_stream(self, other):
        pass

    wait_event = wait_stream


def pretend():
    """Make this process believe that it has a GPU; returns the mode that has to be active."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_map
    from triton.runtime.driver import driver

    from tests.stub import StubDriver

    driver.set_active(StubDriver())
    clock = Clock()

    class Event:
        def __init__(self, **_):
            self.at = None

        def record(self, *_):
            self.at = clock.queue(2e-6)

        def query(self):
            return time.perf_counter() >= self.at

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

        def synchronize(self):
            clock.wait()

    def on_host(value):
        """A device or its name as that of the host's memory."""
        is_device = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return torch.device("cpu") if is_device else value

    class OnGpu(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            if function == torch.Tensor.device.__get__:
                return torch.device("cuda", 0)
            if function == torch.Tensor.is_cuda.__get__:
                return True
            if function is torch.device:
                return function(*arguments, **(keywords or {}))
            keywords = {key: on_host(value) for key, value in (keywords or {}).items() if key != "pin_memory"}
            return function(*tree_map(on_host, arguments), **keywords)

    settings = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "Event": Event,
        "Stream": Stream, "ExternalStream": Stream, "current_stream": Stream, "get_stream_from_external": Stream,
        "get_device_name": lambda *_: PROPERTIES.name, "get_device_properties": lambda *_: PROPERTIES,
        "synchronize": clock.wait, "_sleep": lambda cycles: clock.queue(cycles / 1.98e9),
        "is_current_stream_capturing": lambda: False, "memory_allocated": lambda *_: 0, "_lazy_init": lambda: None,
        "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None,
        "is_bf16_supported": lambda: True,
    }  # fmt: skip
    for name, value in settings.items():
        mock.patch.object(torch.cuda, name, value, create=True).start()
    mock.patch.object(torch.Tensor, "record_stream").start()
    mock.patch.object(torch, "Event", Event).start()
    mock.patch.object(torch.accelerator, "current_stream", Stream).start()
    mock.patch.object(torch.profiler, "profile", Profile).start()
    return OnGpu()


def compute():
    """Let the eager path do what the kernels would have done, after their launches."""
    import torch

    from inmerge_fast.paths.cpu import CpuPath
    from inmerge_fast.paths.eager import EagerPath
    from inmerge_fast.paths.triton.launch import Launcher
    from inmerge_fast.paths.triton.path import TritonPath

    launch, launch_for_now = TritonPath.merge, TritonPath.for_now

    def merge(self, weights, call):
        launch(self, weights, call)
        return EagerPath(self._rows, "in the place of kernels").merge(weights, call)

    class ForNow:
        def __init__(self, launching, computing):
            self._launching, self._computing = launching, computing

        def merge(self):
            self._launching.merge()
            return self._computing.merge()

        def restore(self, changed=()):
            self._launching.restore(changed)
            self._computing.restore(changed)

    def for_now(self, weights, call):  # of all layers, which the eager path takes long for
        path = CpuPath(self._rows)
        if path.refusal:
            path = EagerPath(self._rows, "in the place of kernels")
        return ForNow(launch_for_now(self, weights, call), path.for_now(weights, call))

    def found_partners(self):
        rows = []
        for weight, start in zip(self._weights, self.row_start[:-1], strict=True):
            unit = torch.nn.functional.normalize(weight.detach().flatten(1).double(), dim=1)
            rows.append((unit @ unit.T).fill_diagonal_(-2.0).argmax(1) + int(start))
        return torch.cat(rows)

    build = Launcher.__init__

    def keep_weights(self, layers, weights, row_start):
        build(self, layers, weights, row_start)
        self._weights = weights

    mock.patch.object(TritonPath, "merge", merge).start()
    mock.patch.object(TritonPath, "for_now", for_now).start()
    mock.patch.object(Launcher, "__init__", keep_weights).start()
    mock.patch.object(Launcher, "found_partners", found_partners).start()


def main():
    arguments = sys.argv[1:]
    if INSIDE not in os.environ:  # the driver has to be there before the process starts
        sys.path.insert(0, str(HERE.parent))
        from tests.stub import environment_over_stub

        with tempfile.TemporaryDirectory() as folder:
            variables = environment_over_stub(Path(folder)) | {INSIDE: "1"}
            return subprocess.run([sys.executable, __file__, *arguments], env=variables, check=False).returncode
    sys.path[0] = str(HERE.parent)
    mode = pretend()
    from benchmarks import ceilings, device_time, timing

    ceilings.GEMM_SIZE["cuda"] = 256
    ceilings.COPY_BYTES["cuda"] = timing.COLD_BYTES["cuda"] = 1 << 22
    device_time.ASLEEP = 0.3  # what the device would do while the host queues on, the host does itself
    if "benchmarks.bench_host" not in arguments:  # which times nothing but the launches
        compute()
    with mode:
        if arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
            return 0
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
