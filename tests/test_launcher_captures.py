"""What the launcher must survive without a GPU to try it on: CUDA graphs that are captured and replayed."""

import numpy as np
import pytest
import torch

from inmerge_fast import MergePlan, NoEffectWarning, draw

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from fake_streams import CUDA, Graph, Recorded, Stream, launcher_on_streams, pretend_on_gpu  # noqa: E402
from interpreter import apply_fixes, bounds  # noqa: E402
from test_kernel_details import CALL, _CountingKernel  # noqa: E402
from test_kernels import alike, launcher_of, tensors_of  # noqa: E402

from inmerge_fast.effect import NO_EFFECT_CALLS, EffectMonitor  # noqa: E402
from inmerge_fast.paths.triton import handle, launch  # noqa: E402
from inmerge_fast.paths.triton.handle import Arguments, Handle  # noqa: E402
from inmerge_fast.paths.triton.launch import Launcher  # noqa: E402
from inmerge_fast.paths.triton.slots import CAPTURED_CALLS, KEPT_CALLS, SLOTS  # noqa: E402


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


@pytest.fixture
def on_streams(monkeypatch):
    return launcher_on_streams(monkeypatch)


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


class _Numbers:
    """Stands in for the three numbers that a look is taken at, on a GPU."""

    is_cuda, device = True, CUDA


class _Running:
    """Stands in for a plan's running counts on a GPU."""

    largest = _Numbers()


class _Host:
    def __init__(self):
        self.copies = []

    def copy_(self, source, *, non_blocking):
        self.copies.append((source, non_blocking))

    def numpy(self):
        return np.array([40_000, 3, 5])


def test_the_no_effect_warning_allocates_once_stays_out_of_captures_and_waits_for_nobody(monkeypatch):
    """Its copy would become part of a graph, and its event could not be asked."""
    host, allocations, events, numbers = _Host(), [], [], _Numbers()

    class Event:
        done = False

        def __init__(self, device):
            events.append(self)

        def record(self, stream):
            assert stream == "current stream of cuda:0"

        def query(self):
            return self.done

        def synchronize(self):
            assert self.done, "it was waited for"

    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"current stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, **options: allocations.append((size, options)) or host)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(EffectMonitor, "_numbers", lambda self: numbers)
    monitor, running = EffectMonitor(1), _Running()

    def count(calls, capturing=False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        for _ in range(calls):
            monitor.count_running(running)

    count(1, capturing=True)
    assert allocations == [], "page-locking memory is forbidden there"
    count(1)
    [(size, options)] = allocations
    assert (size, options["device"], options["pin_memory"]) == ((3,), "cpu", True)
    count(NO_EFFECT_CALLS - 3)
    count(3, capturing=True)
    assert host.copies == events == []
    count(3)
    assert host.copies == [(numbers, True)]
    assert len(events) == len(allocations) == 1
    Event.done = True
    with pytest.warns(NoEffectWarning, match="103 calls of merge_ sampled 40,000 filter pairs and merged 3, which is"):
        count(1)
    count(3)
    assert len(host.copies) == 1


def test_once_a_graph_was_captured_calls_count_apart_and_draw_nothing_ahead(on_streams, monkeypatch):
    """Its replays come unseen: what the host believes to be drawn or zeroed may not be any more."""
    launcher, switch = on_streams
    pretend_on_gpu(launcher, False)
    launcher.reserve_scratch(0.9)
    launcher.scratch = launcher.scratch.as_subclass(Recorded)
    launcher.scratch.streams = []
    pretend_on_gpu(launcher)
    launched = []
    names = {launcher._draw: "draw and count", launcher._draw_only: "draw", launcher._count: "count"}
    for of, name in names.items():
        call = of.launch
        monkeypatch.setattr(of, "launch", lambda *a, name=name, call=call: launched.append(name) or call(*a))

    def run(step, capturing):
        launched.clear()
        switch(Stream(0, capturing))
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


def test_replays_and_calls_leave_each_others_statistics_alone(on_streams):
    """A replay comes unseen, at any time, and writes where its capture was told to."""
    launcher, switch = on_streams
    numbers = {"alpha": 0.5, "threshold": -1.0, "dry_run": True}
    graphs, replayed = [], []
    for step in range(CAPTURED_CALLS):
        graphs.append(Graph())
        with graphs[-1].capture(launcher, switch):
            replayed.append(launcher.run(2, step, prob=0.3, **numbers))
    assert [int(results.fetch().counts[0]) for results in replayed] == [0] * CAPTURED_CALLS, "nothing has run"
    calls, expected = [], []
    for step in range(2 * SLOTS):
        calls.append(launcher.run(1, step, prob=0.9, **numbers))
        expected.append(draw(1, step, 0, 9, 0.9)[0].sum())
        for graph in graphs:
            graph.replay()
        assert [int(results.fetch().counts[0]) for results in calls[-KEPT_CALLS:]] == expected[-KEPT_CALLS:]
        drawn = [draw(2, of, 0, 9, 0.3)[0].sum() for of in range(CAPTURED_CALLS)]
        assert [int(results.fetch().counts[0]) for results in replayed] == drawn


def test_statistics_of_more_captured_calls_than_are_kept_apart_raise(on_streams):
    launcher, switch = on_streams
    pretend_on_gpu(launcher, False)
    launcher.prepare(1, 0, prob=0.3, alpha=0.5, threshold=-1.0, write=False)
    results, again = [], None
    with Graph().capture(launcher, switch):
        for _ in range(2 * CAPTURED_CALLS):
            again = launcher.run_from_memory(again=again)  # an InMerge that captures its graph anew
    results.append(again)
    for _ in range(CAPTURED_CALLS):
        assert all(result.fetch().counts.tolist() == [0] for result in results)
        with Graph().capture(launcher, switch):
            results.append(launcher.run_from_memory())
    for result in (results[0], results[-1]):
        with pytest.raises(RuntimeError, match="keeps 4 calls in CUDA graphs apart, and more were captured"):
            result.fetch()
    assert all(result.fetch().counts.tolist() == [0] for result in results[1:-1])


@pytest.mark.parametrize("read", ["fetch", "prefetch"])
def test_statistics_cannot_be_read_in_a_capture(on_streams, monkeypatch, read):
    """The copy would become part of the graph, and what it copies to would be page-locked there."""
    launcher, switch = on_streams
    pretend_on_gpu(launcher, False)
    results = launcher.run(1, 0, prob=0.3, **CALL, dry_run=True)
    monkeypatch.setattr(Recorded, "is_cuda", True)
    switch(Stream(5, captured=True))
    with pytest.raises(RuntimeError, match="cannot be read while a CUDA graph is captured"):
        getattr(results, read)()
