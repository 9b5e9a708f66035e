"""What the launcher must survive without a GPU to try it on: CUDA graphs being captured, and other streams."""

import contextlib

import pytest
import torch

from inmerge_fast import MergePlan, NoEffectWarning, draw

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interpreter import apply_fixes, bounds  # noqa: E402
from test_kernel_details import CALL, _CountingKernel  # noqa: E402
from test_kernels import alike, launcher_of, tensors_of  # noqa: E402

from inmerge_fast.effect import NO_EFFECT_CALLS, EffectMonitor  # noqa: E402
from inmerge_fast.paths.triton import handle, launch, streams  # noqa: E402
from inmerge_fast.paths.triton.handle import Arguments, Handle  # noqa: E402
from inmerge_fast.paths.triton.launch import Launcher  # noqa: E402

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


# ------------------------------------------------------------------------------------------------------------ captures


def test_a_capture_is_told_to_warm_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="the first merge_ of a plan builds.*; call merge_ once before capturing"):
        handle.check_not_capturing(CUDA, "builds its tables")
    handle.check_not_capturing(torch.device("cpu"), "builds its tables")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    handle.check_not_capturing(CUDA, "builds its tables")


def test_nothing_is_built_compiled_or_allocated_in_a_capture(monkeypatch):
    weights = [alike(128, 1024)]
    plan, launcher = MergePlan(weights), launcher_of(weights)
    launcher.reserve_scratch(0.1)
    scratch, kernel = launcher.scratch, _CountingKernel()

    def capturing(device, what):
        raise RuntimeError(f"capturing: {what}")

    for module in (launch, handle):
        monkeypatch.setattr(module, "check_not_capturing", capturing)
    monkeypatch.setattr(torch, "zeros", pytest.fail)
    monkeypatch.setattr(torch, "empty", pytest.fail)
    with pytest.raises(RuntimeError, match="capturing: builds its tables"):
        Launcher(plan.layers, weights, plan.rows.start)
    with pytest.raises(RuntimeError, match="capturing: with a larger prob"):
        launcher.reserve_scratch(1.0)
    assert launcher.scratch is scratch
    launcher.reserve_scratch(0.1)  # enough as it is
    with pytest.raises(RuntimeError, match="capturing: compiles its kernels"):
        Handle(kernel, {}, {}).launch(1, 0, Arguments(weights[0]), ())
    assert (kernel.warmups, kernel.runs) == (0, [])


class _CudaTotals:
    """Stands in for the running totals of a plan on a GPU."""

    is_cuda, device, dtype = True, CUDA, torch.int32


class _Host:
    dtype = torch.int32

    def __init__(self):
        self.copies = []

    def copy_(self, source, *, non_blocking):
        self.copies.append((source, non_blocking))

    def __getitem__(self, index):
        return 0 if index == 0 else 5


def test_the_no_effect_warning_allocates_once_stays_out_of_captures_and_waits_for_nobody(monkeypatch):
    """Its copy would become part of a graph, and its event could not be asked."""
    host, allocations, events = _Host(), [], []

    class Event:
        done = False

        def __init__(self, device):
            events.append(self)

        def record(self, stream):
            assert stream == "current stream of cuda:0"

        def query(self):
            return self.done

    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"current stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda size, **options: allocations.append(options) or host)
    monkeypatch.setattr(torch, "Event", Event)
    monitor, totals = EffectMonitor(), _CudaTotals()

    def count(calls, capturing=False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        for _ in range(calls):
            monitor.count_call(totals)

    count(1, capturing=True)
    assert allocations == [], "page-locking memory is forbidden there"
    count(1)
    assert [(options["device"], options["pin_memory"]) for options in allocations] == [("cpu", True)]
    count(NO_EFFECT_CALLS - 3)
    count(3, capturing=True)
    assert host.copies == events == []
    count(3)
    assert host.copies == [(totals, True)]
    assert len(events) == len(allocations) == 1
    Event.done = True
    with pytest.warns(NoEffectWarning):
        count(1)
    count(3)
    assert len(host.copies) == 1


# ------------------------------------------------------------------------------------------------------------- streams


class _Stream:
    """A stand-in for ``torch.cuda.Stream``: its handle, whether a graph takes it along, and whom it waited for.

    It cannot show that a wait holds anything up, nor what PyTorch makes of a handle: test_streams_on_stub.py lets
    PyTorch's own streams record their events, and test_gpu_runtime.py has work to wait for.
    """

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


class _Recorded(torch.Tensor):
    """A tensor that remembers which streams its memory was said to be used on."""

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


def pretend_on_gpu(launcher, on_gpu=True):
    launcher.device, launcher.on_gpu = (CUDA, True) if on_gpu else (torch.device("cpu"), False)
    launcher._streams._device, launcher._streams._on_gpu = launcher.device, on_gpu


@pytest.fixture
def on_streams(monkeypatch):
    """A launcher that believes itself on a GPU, and a function that makes a stream current."""
    weights = [alike(9, 20)]
    launcher = launcher_of(weights)
    launcher.weights = weights  # keeps them alive
    launcher.reserve_scratch(0.3)
    launcher.run(1, 0, prob=0.3, **CALL, dry_run=True, partner="nearest")  # builds what partner rules need
    pretend_on_gpu(launcher)
    for holder in (vars(launcher), vars(launcher.slots), vars(launcher.matcher), launcher.matcher._work):
        for name, value in holder.items():
            if isinstance(value, torch.Tensor):
                holder[name] = value.as_subclass(_Recorded)
                holder[name].streams = []
    current = [_Stream(0)]

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
    monkeypatch.setattr(torch.cuda, "ExternalStream", _Stream.external)
    monkeypatch.setattr(streams, "raw_stream", lambda device: current[0].cuda_stream)
    return launcher, switch


def test_a_call_on_another_stream_waits_for_the_last_one_and_keeps_the_buffers(on_streams):
    launcher, switch = on_streams
    first, second = _Stream(0), _Stream(7)
    for stream in (first, second, second, first):
        switch(stream)
        assert launcher.follow_current_stream() == stream.cuda_stream
    assert second.waited_for == [0], "the default stream itself; once, for on one stream calls follow each other anyway"
    assert first.waited_for == [7]
    assert all(tensor.streams == [0, 7, 0] for tensor in launcher.matcher.tensors())
    tensors = tensors_of(launcher, [])
    for name in ("partner", "readers", "active", "counter", "state", "scratch", "similarity", "outcome", "totals"):
        assert tensors[name].streams == [0, 7, 0], f"{name} would be reused while a call uses it"


def test_streams_of_a_graph_wait_for_each_other_and_for_no_others(on_streams):
    launcher, switch = on_streams
    outside, captured, forked = _Stream(0), _Stream(9, captured=True), _Stream(11, captured=True)
    for stream in (outside, captured, forked, outside):
        switch(stream)
        assert launcher.follow_current_stream() == stream.cuda_stream
    assert captured.waited_for == [], "a captured stream cannot wait for one that is not"
    assert forked.waited_for == [9], "the graph would run both at once"
    assert outside.waited_for == [], "it would be captured as well"
    captured.captured = forked.captured = False  # the capture has ended
    switch(captured)
    launcher.follow_current_stream()
    assert captured.waited_for == [0]


def test_once_a_graph_was_captured_calls_count_apart_and_draw_nothing_ahead(on_streams, monkeypatch):
    """Its replays come unseen: what the host believes to be drawn or zeroed may not be any more."""
    launcher, switch = on_streams
    monkeypatch.setattr(launcher, "_on_device", contextlib.nullcontext)
    pretend_on_gpu(launcher, False)
    launcher.reserve_scratch(0.9)
    launcher.scratch = launcher.scratch.as_subclass(_Recorded)
    launcher.scratch.streams = []
    pretend_on_gpu(launcher)
    launched = []
    names = {launcher._draw: "draw and count", launcher._draw_only: "draw", launcher._count: "count"}
    for of, name in names.items():
        call = of.launch
        monkeypatch.setattr(of, "launch", lambda *a, name=name, call=call: launched.append(name) or call(*a))

    def run(step, capturing):
        launched.clear()
        switch(_Stream(0, capturing))
        launcher.run(1, step, prob=0.9, **CALL, dry_run=False)
        return list(launched)

    def captured(step):
        """A call of which nothing runs: its launches go into the graph, and nothing else does."""
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "zero_", lambda _: pytest.fail("a memset"))
            for handle in vars(launcher).values():
                if isinstance(handle, Handle):
                    patch.setattr(handle, "launch", lambda *a, handle=handle: launched.append(names.get(handle)))
            patch.setattr(launcher._merge_handle({}), "launch", lambda *_: None)
            return run(step, True)

    compiled = []
    monkeypatch.setattr(Handle, "compile", lambda self, *_: compiled.append(self))
    assert [run(step, False) for step in range(4)] == [["draw and count"]] * 3 + [[]]
    assert compiled == [launcher._draw_only, launcher._count], "what the graph needs and could not compile"
    assert captured(4) == ["draw", "count"], "what was drawn ahead is not in the graph"
    assert launcher.slots.state.any(), "and is still listed, since nothing has run"
    with bounds(*tensors_of(launcher, launcher.weights).values()):
        for step in range(5, 9):
            launcher.slot_of(launcher.calls + 1).state.fill_(1)  # as a replay may leave what is drawn ahead
            assert run(step, False) == ["draw", "count"]
            assert not launcher.slot_of(launcher.calls).state.any()
    assert captured(9) == ["draw", "count"]
    assert len(compiled) == 2


@pytest.mark.parametrize("call", ["run", "prepare"])
def test_thresholds_are_copied_after_what_the_plan_does_on_another_stream(on_streams, monkeypatch, call):
    launcher, _ = on_streams
    order = []
    pretend_on_gpu(launcher, False)
    for name in ("follow_current_stream", "_set_thresholds"):
        original = getattr(launcher, name)
        monkeypatch.setattr(launcher, name, lambda *a, name=name, original=original: order.append(name) or original(*a))
    numbers = {"prob": 0.3, "alpha": 0.5, "threshold": [0.1]}
    monkeypatch.setattr(launcher, "_threshold_argument", lambda given: launcher._set_thresholds(tuple(given)) or 3.0)
    if call == "run":
        launcher.run(1, 0, **numbers, dry_run=True)
    else:
        launcher.prepare(1, 0, **numbers, write=False)
    assert order[:2] == ["follow_current_stream", "_set_thresholds"]


def test_replaced_scratch_is_kept_for_the_stream_that_used_it_last(on_streams, monkeypatch):
    launcher, switch = on_streams
    old = launcher.scratch
    for stream in (_Stream(0), _Stream(7)):
        switch(stream)
        launcher.follow_current_stream()
    third = _Stream(8)
    switch(third)
    monkeypatch.setattr(torch, "empty", lambda size, *, dtype, device: torch.zeros(size, dtype=dtype))
    launcher.reserve_scratch(1.0)
    assert launcher.scratch is not old
    assert third.waited_for == [7], "only then does what comes next on this stream come after the use on the other"
    assert old.streams == [0, 7, 8]


@pytest.mark.parametrize("read", ["fetch", "prefetch"])
def test_statistics_are_read_after_what_the_plan_does_on_another_stream(on_streams, read):
    launcher, switch = on_streams
    pretend_on_gpu(launcher, False)
    results = launcher.run(1, 0, prob=0.3, **CALL, dry_run=True)
    pretend_on_gpu(launcher)
    side, reader = _Stream(7), _Stream(0)
    for stream in (side, reader, side):
        switch(stream)
        launcher.follow_current_stream()
    reader.waited_for.clear()
    switch(reader)
    pairs = results.fetch() if read == "fetch" else results.prefetch()()
    assert pairs.counts.tolist() == [draw(1, 0, 0, 9, 0.3)[0].sum()]
    assert reader.waited_for == [7]
