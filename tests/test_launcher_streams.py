"""What the launcher must survive without a GPU to try it on: calls on one stream after another."""

import pytest
import torch

from inmerge_fast import draw

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from fake_streams import Recorded, Stream, launcher_on_streams, pretend_on_gpu  # noqa: E402
from interpreter import apply_fixes  # noqa: E402
from test_kernel_details import CALL  # noqa: E402
from test_kernels import tensors_of  # noqa: E402

from inmerge_fast.paths.triton.for_now import Keeper  # noqa: E402


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


@pytest.fixture
def on_streams(monkeypatch):
    return launcher_on_streams(monkeypatch)


def test_a_call_on_another_stream_waits_for_the_last_one_and_keeps_the_buffers(on_streams):
    launcher, switch = on_streams
    first, second = Stream(0), Stream(7)
    for stream in (first, second, second, first):
        switch(stream)
        assert launcher.follow_current_stream() == stream.cuda_stream
    assert second.waited_for == [0], "the default stream itself; once, for on one stream calls follow each other anyway"
    assert first.waited_for == [7]
    assert all(tensor.streams == [0, 7, 0] for tensor in launcher.matcher.tensors())
    tensors = tensors_of(launcher, [])
    for name in ("partner", "readers", "active", "counter", "state", "scratch", "similarity", "outcome", "times"):
        assert tensors[name].streams == [0, 7, 0], f"{name} would be reused while a call uses it"


def test_streams_of_a_graph_wait_for_each_other_and_for_no_others(on_streams):
    launcher, switch = on_streams
    outside, captured, forked = Stream(0), Stream(9, captured=True), Stream(11, captured=True)
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


def test_memory_for_old_filters_is_kept_for_every_stream_that_uses_it(on_streams):
    launcher, switch = on_streams
    pretend_on_gpu(launcher, False)
    keeper = Keeper(launcher)
    keeper.reserve(0.5)
    assert list(map(id, launcher.kept)) == [id(keeper.place), id(keeper.merged), id(keeper.packed)]
    pretend_on_gpu(launcher)
    for name in ("place", "merged", "packed"):
        setattr(keeper, name, getattr(keeper, name).as_subclass(Recorded))
        getattr(keeper, name).streams = []
    launcher.kept = keeper.place, keeper.merged, keeper.packed
    launcher.follow_current_stream()
    switch(Stream(7))
    launcher.follow_current_stream()
    assert keeper.place.streams == keeper.merged.streams == keeper.packed.streams == [0, 7]


def test_replaced_scratch_is_kept_for_the_stream_that_used_it_last(on_streams, monkeypatch):
    launcher, switch = on_streams
    old = launcher.scratch
    for stream in (Stream(0), Stream(7)):
        switch(stream)
        launcher.follow_current_stream()
    third = Stream(8)
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
    side, reader = Stream(7), Stream(0)
    for stream in (side, reader, side):
        switch(stream)
        launcher.follow_current_stream()
    reader.waited_for.clear()
    switch(reader)
    pairs = results.fetch() if read == "fetch" else results.prefetch()()
    assert pairs.counts.tolist() == [draw(1, 0, 0, 9, 0.3)[0].sum()]
    assert reader.waited_for == [7]
