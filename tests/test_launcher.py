"""What the launcher must survive without a GPU to try it on: interruptions, captures, other streams, large numbers."""

import contextlib

import numpy as np
import pytest
import torch
from oracle import bits

from inmerge_fast import MergePlan, NoEffectWarning, draw, merge_, reference_merge

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interpreter import apply_fixes, bounds, traffic  # noqa: E402
from test_kernel_details import CALL, _CountingKernel  # noqa: E402
from test_kernels import ALPHA, alike, assert_merged_and_clean, cycle, launcher_of, tensors_of  # noqa: E402

from inmerge_fast import handle, launch  # noqa: E402
from inmerge_fast.effect import NO_EFFECT_CALLS, EffectMonitor, _largest_similarity  # noqa: E402
from inmerge_fast.handle import Arguments, Handle  # noqa: E402
from inmerge_fast.kernels import tables  # noqa: E402
from inmerge_fast.launch import RESULT_SLOTS, Launcher  # noqa: E402

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


# ------------------------------------------------------------------------------------------------------- interruptions


# Before which launch, or right after it was queued.
CUT_SHORT = [
    *(("random", when, launch) for when, launch in (("before", 0), ("after", 0), ("before", 1))),
    *(("nearest", "before", launch) for launch in range(5)),
]


@pytest.mark.parametrize("calls_before", [1, 2])
@pytest.mark.parametrize(("partner", "when", "launch"), CUT_SHORT)
def test_a_call_that_is_cut_short_leaves_nothing_for_the_next_one(monkeypatch, partner, when, launch, calls_before):
    """Ctrl-C while the merge kernel compiles comes between the count and the merge: rows counted, and never merged."""
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    call = {"prob": 1.0, "threshold": -1.0, "alpha": 0.75, "seed": 1, "partner": partner}
    weight, twin = alike(9, 20), alike(9, 20)
    plan = MergePlan(weight)
    for step in range(calls_before):
        merge_(plan, step=step, **call)
    original, launched = Handle.launch, []

    def interrupted(self, *arguments):
        if len(launched) == launch and when == "before":
            raise KeyboardInterrupt
        original(self, *arguments)
        if len(launched) == launch:
            raise KeyboardInterrupt
        launched.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(Handle, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_(plan, step=9, **call)
    launcher = plan.launcher([weight])
    everything = [
        *tensors_of(launcher, [weight]).values(),
        *(launcher.matcher.tensors() if partner != "random" else []),
    ]
    with bounds(*everything):
        for step in (2, 3):
            assert merge_(plan, step=step, **call).merged == 9
    for step in (*range(calls_before), 2, 3):
        merge_(twin, step=step, **call)
    assert torch.equal(weight, twin)
    assert not launcher.state.any()


def test_drawing_ahead_takes_a_slot_and_its_statistics_are_gone():
    weights = [alike(9, 20)]
    launcher = launcher_of(weights)

    def run(step, **ahead):
        return launcher.run(1, step, prob=0.5, alpha=ALPHA, threshold=-1.0, dry_run=True, **ahead)

    calls = [run(step, next_draw=(1, step + 1, 0.5)) for step in range(RESULT_SLOTS)]
    with pytest.raises(RuntimeError, match="statistics of this call are gone"):
        calls[0].fetch()
    for step in range(1, RESULT_SLOTS):
        coin, _ = draw(1, step, 0, 9, 0.5)
        assert calls[step].fetch().counts.tolist() == [coin.sum()]
    assert run(RESULT_SLOTS).fetch().counts.tolist() == [draw(1, RESULT_SLOTS, 0, 9, 0.5)[0].sum()]
    calls[2].fetch()


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
        Launcher(plan.layers, weights, plan.row_start)
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

        def record(self):
            pass

        def query(self):
            return self.done

    monkeypatch.setattr(torch, "empty", lambda size, **options: allocations.append(options) or host)
    monkeypatch.setattr(torch, "Event", Event)
    monitor, totals = EffectMonitor(), _CudaTotals()

    def count(calls, capturing=False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        for _ in range(calls):
            monitor.count_call(totals)

    count(1)
    assert [(options["device"], options["pin_memory"]) for options in allocations] == [("cpu", True)]
    count(NO_EFFECT_CALLS - 2)
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
    def __init__(self, handle):
        self.cuda_stream, self.waited_for = handle, []

    def wait_stream(self, other):
        self.waited_for.append(other.cuda_stream)


class _Recorded(torch.Tensor):
    """A tensor that remembers which streams its memory was said to be used on."""

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


@pytest.fixture
def on_streams(monkeypatch):
    """A launcher that believes itself on a GPU, and a function that makes a stream current."""
    weights = [alike(9, 20)]
    launcher = launcher_of(weights)
    launcher.weights = weights  # keeps them alive
    launcher.reserve_scratch(0.3)
    launcher.run(1, 0, prob=0.3, **CALL, dry_run=True, partner="nearest")  # builds what partner rules need
    launcher.device, launcher.on_gpu = CUDA, True
    for holder in (vars(launcher), vars(launcher.matcher), launcher.matcher._work):
        for name, value in holder.items():
            if isinstance(value, torch.Tensor):
                holder[name] = value.as_subclass(_Recorded)
                holder[name].streams = []
    current = []

    def switch(stream, capturing=False):
        current[:] = [stream]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: _Stream(handle))
    return launcher, switch


def test_a_call_on_another_stream_waits_for_the_last_one_and_keeps_the_buffers(on_streams):
    launcher, switch = on_streams
    first, second, captured = _Stream(0), _Stream(7), _Stream(9)
    for stream, capturing in ((first, False), (second, False), (second, False), (captured, True), (first, False)):
        switch(stream, capturing)
        assert launcher.follow_current_stream() == stream.cuda_stream
    assert second.waited_for == [0], "once: on the same stream calls follow each other anyway"
    assert captured.waited_for == [], "a captured stream may not wait for another"
    assert first.waited_for == [9]
    assert all(tensor.streams == [0, 7, 9, 0] for tensor in launcher.matcher.tensors())
    for name in ("partner", "readers", "active", "counter", "state", "scratch", "similarity", "outcome", "totals"):
        assert getattr(launcher, name).streams == [0, 7, 9, 0], f"{name} would be reused while a call uses it"


def test_once_a_graph_was_captured_calls_count_apart_and_draw_nothing_ahead(on_streams, monkeypatch):
    """Its replays come unseen: what the host believes to be drawn or zeroed may not be any more."""
    launcher, switch = on_streams
    monkeypatch.setattr(launcher, "_on_device", contextlib.nullcontext)
    launcher.device, launcher.on_gpu = torch.device("cpu"), False
    launcher.reserve_scratch(0.9)
    launcher.scratch = launcher.scratch.as_subclass(_Recorded)
    launcher.scratch.streams = []
    launcher.device, launcher.on_gpu = CUDA, True
    launched = []
    names = {launcher._draw: "draw and count", launcher._draw_only: "draw", launcher._count: "count"}
    for of, name in names.items():
        call = of.launch
        monkeypatch.setattr(of, "launch", lambda *a, name=name, call=call: launched.append(name) or call(*a))

    def run(step, capturing):
        launched.clear()
        switch(_Stream(0), capturing)
        launcher.run(1, step, prob=0.9, **CALL, dry_run=False, next_draw=(1, step + 1, 0.9))
        return list(launched)

    def captured(step):
        """A call of which nothing runs: its launches and memsets go into the graph."""
        zeroed = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "zero_", lambda tensor: zeroed.append(tensor))
            for handle in vars(launcher).values():
                if isinstance(handle, Handle):
                    patch.setattr(handle, "launch", lambda *a, handle=handle: launched.append(names.get(handle)))
            patch.setattr(launcher._merge_handle({}), "launch", lambda *_: None)
            called = run(step, True)
        assert any(tensor is launcher.state for tensor in zeroed), "the list starts from nothing at every replay"
        return called

    compiled = []
    monkeypatch.setattr(Handle, "compile", lambda self, *_: compiled.append(self))
    assert run(0, False) == ["draw and count"] * 2
    assert compiled == [launcher._draw_only, launcher._count], "what the graph needs and could not compile"
    assert run(1, False) == ["draw and count"]
    assert captured(2) == ["draw", "count"], "what was drawn ahead is not in the graph"
    assert launcher.state.any(), "and is still listed, since nothing has run"
    with bounds(*tensors_of(launcher, launcher.weights).values()):
        assert run(3, False) == ["draw", "count"]
    assert not launcher.state.any()
    assert captured(4) == ["draw", "count"]
    launcher._cut_short = True  # an interrupt before a replay, which resets nothing on the host
    launcher.state.fill_(1)
    switch(_Stream(0))
    monkeypatch.setattr(launcher, "_set_thresholds", lambda _: None)  # there is no device to copy them to
    launcher.prepare(1, 5, prob=0.9, write=True, **CALL)
    assert not launcher.state.any()
    assert len(compiled) == 2


@pytest.mark.parametrize("call", ["run", "prepare"])
def test_thresholds_are_copied_after_what_the_plan_does_on_another_stream(on_streams, monkeypatch, call):
    launcher, _ = on_streams
    launcher.device, launcher.on_gpu, order = torch.device("cpu"), False, []
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


def test_an_interrupt_between_new_scratch_and_its_tables_leaves_no_table_of_the_old(monkeypatch):
    launcher = launcher_of([alike(64, 300)])
    launcher.reserve_scratch(0.3)
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_tables_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            launcher.reserve_scratch(1.0)
    launcher.reserve_scratch(1.0)
    assert all(merge[9] is launcher.scratch for _, merge in launcher._tables.values())


def test_a_draw_ahead_serves_the_next_call_only():
    """Where an interrupt has made a call that left no trace but its number, the outcome lies in another slot."""
    weights = [alike(40, 6)]
    launcher = launcher_of(weights)
    numbers = {"prob": 0.5, "alpha": ALPHA, "threshold": -1.0, "dry_run": False}
    for step in range(RESULT_SLOTS):  # old outcomes in every slot
        launcher.run(2, step, **numbers | {"prob": 1.0})
    launcher.run(3, 0, **numbers, next_draw=(3, 1, 0.5))
    launcher.calls += 1
    assert launcher.run(3, 1, **numbers).fetch().counts.tolist() == [draw(3, 1, 0, 40, 0.5)[0].sum()]


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


def test_statistics_are_read_after_what_the_plan_does_on_another_stream(on_streams, monkeypatch):
    launcher, switch = on_streams
    launcher.device, launcher.on_gpu = torch.device("cpu"), False
    results = launcher.run(1, 0, prob=0.3, **CALL, dry_run=True)
    launcher.device, launcher.on_gpu = CUDA, True
    launcher._stream = 7
    reader = _Stream(0)
    switch(reader)
    assert results.fetch().counts.tolist() == [draw(1, 0, 0, 9, 0.3)[0].sum()]
    assert reader.waited_for == [7]


# ------------------------------------------------------------------------------------------------- memory and addresses


@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (16, 64), (64, 64), (40, 300), (128, 1024), (512, 4608)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_at_most_15_percent_for_small_layers_too(shape, dtype):
    launcher = launcher_of([torch.empty(shape, dtype=dtype)])
    launcher.reserve_scratch(0.3)
    assert launcher.scratch.numel() <= max(0.15 * launcher.bytes, 16)  # one unit: there is no smaller one
    assert launcher.scratch.numel() >= 0.12 * launcher.bytes - 1


def test_a_schedule_of_prob_allocates_scratch_a_few_times_at_most():
    launcher, seen = launcher_of([torch.empty(512, 1152)]), []
    for prob in np.linspace(0, 1, 1001):
        launcher.reserve_scratch(float(prob))
        seen.append(launcher.scratch)
    assert all(scratch is seen[0] for scratch in seen[:301]), "up to 0.3 once"
    assert len({id(scratch) for scratch in seen}) <= 8
    launcher.reserve_scratch(0.3)
    assert launcher.scratch is seen[-1]


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 719), ("MAX_ELEMENTS", 19)])
def test_what_32_bits_cannot_count_raises(monkeypatch, limit, value):
    weights = [alike(9, 20)]
    monkeypatch.setattr(launch, limit, value + 1)
    launcher_of(weights)
    monkeypatch.setattr(launch, limit, value)
    with pytest.raises(ValueError, match="720 bytes and up to 20 elements per filter.*INMERGE_FORCE_EAGER=1"):
        launcher_of(weights)


def test_limits_are_within_31_bits():
    assert launch.MAX_ELEMENTS + 1024 <= 2**31
    assert launch.MAX_BYTES / 16 * 2 <= 2**31


@pytest.mark.parametrize("capacity", [0, 1000])
def test_addresses_beyond_2_to_the_31_elements(capacity):
    """The filters of a large weight from number 70,000 on: where it begins there is nothing, and nobody looks."""
    filters, elements, far = 5, 2**15, 70_000
    assert far * elements > 2**31
    weights = [alike(filters, elements)]
    launcher = launcher_of(weights)
    launcher.layer_table[0, tables.BASE.value] -= far * elements * 4
    launcher.layer_table[0, tables.FIRST_ROW.value] -= far
    launcher.reserve_scratch(1.0)
    partner = np.array(cycle(filters, None))
    launcher.partner.copy_(torch.from_numpy(partner))
    expected = reference_merge(weights[0], partner >= 0, partner, **CALL).weight
    with bounds(*tensors_of(launcher, weights).values()):
        launcher.merge_drawn(0, **CALL, dry_run=False, BLOCK=2**13, programs=2, capacity=capacity * 8)
    assert_merged_and_clean(launcher, weights, [expected])


@pytest.mark.parametrize("counts", [True, False], ids=["counting", "apart"])
def test_traffic_of_the_draw_and_the_count_is_what_their_docstrings_say(counts):
    weights = [alike(300, 4), alike(45, 4)]
    launcher = launcher_of(weights)
    launcher.reserve_scratch(0.5)
    rows, blocks = launcher.rows, launcher._row_blocks
    handle, turn = (launcher._draw, 0) if counts else (launcher._draw_only, None)
    stale = launcher.counted_odd if counts else launcher.readers
    with traffic(
        drawn=[launcher.partner, stale, launcher.outcome], index=[launcher.row_layer], active=[launcher.active]
    ) as drawing:
        handle.launch(blocks, 0, launcher._tables[0, turn][0], (1, 0, 2**23, rows))
    active = int((launcher.partner >= 0).sum())
    assert 0 < active < rows
    assert drawing["drawn"].bytes_stored == 9 * rows
    assert drawing["index"].bytes_loaded == 4 * rows
    if counts:
        assert drawing["active"].bytes_stored == drawing.bytes_stored - 9 * rows == 4 * active
        assert drawing.atomics == active + blocks
        return
    assert drawing.bytes_stored == 9 * rows
    with traffic(partner=[launcher.partner], active=[launcher.active]) as counting:
        launcher._count.launch(blocks, 0, launcher._counted(False), (rows,))
    assert counting["partner"].bytes_loaded == counting.bytes_loaded == 4 * rows
    assert counting["active"].bytes_stored == counting.bytes_stored == 4 * active
    assert counting.atomics == active + blocks


def test_a_draw_that_counts_finds_its_buffers_empty_whatever_came_before():
    """Every kind of call, in every order, some drawn ahead and not used, some cut short between draw and merge."""
    kinds = {
        "plain": {}, "ahead": {"ahead": True}, "ahead of another": {"ahead": "another"}, "dry run": {"dry_run": True},
        "nearest": {"partner": "nearest"}, "nearest ahead": {"partner": "nearest", "ahead": True}, "cut": {"cut": True},
        "search": {"search": True}, "from memory": {"memory": True},
    }  # fmt: skip
    weights = [alike(40, 6), alike(30, 9)]
    launcher = launcher_of(weights)
    names = [name for first in kinds for second in kinds for name in (first, second)]
    for step, name in enumerate(names):
        how = {"partner": "random", "dry_run": False, "ahead": None, "cut": False} | kinds[name]
        before = [weight.clone() for weight in weights]
        call = {"prob": 0.5, "alpha": ALPHA, "threshold": -1.0}
        ahead = {None: None, True: (7, step + 1, 0.5), "another": (8, step, 0.5)}[how["ahead"]]
        if how.get("search"):
            launcher.find_partners(7, step, prob=0.5, partner="nearest", threshold=0.3)
            continue
        if how.get("memory"):
            launcher.prepare(7, step, write=True, **call)
            launcher.run_from_memory()
        elif how["cut"]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launcher, "_merge", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    launcher.run(7, step, dry_run=False, **call)
            continue
        else:
            launcher.run(7, step, dry_run=how["dry_run"], partner=how["partner"], next_draw=ahead, **call)
        if how["partner"] == "random" and not how["dry_run"]:
            for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
                coin, partner = draw(7, step, layer, len(old), 0.5)
                expected = reference_merge(old, coin, partner, alpha=ALPHA, threshold=-1.0).weight
                assert torch.equal(bits(new), bits(expected)), f"{name}, call {step}"
        if ahead is None:
            assert not launcher.state.any(), f"{name}, call {step}"


def test_the_largest_similarity_of_all_may_be_negative():
    weights = [torch.tensor([[1.0, 0.0], [-0.6, 0.8]]), torch.tensor([[1.0, 0.0], [-0.28, 0.96]])]
    launcher = launcher_of(weights)
    launcher.run(1, 0, prob=1.0, alpha=ALPHA, threshold=0.5, dry_run=False)
    assert _largest_similarity(launcher.totals) == pytest.approx(-0.28)


def test_more_than_1024_filters_and_the_largest_words():
    weights = [alike(1100, 8)]
    before = weights[0].clone()
    launcher = launcher_of(weights)
    seed, step = 2**64 - 1, 2**63 - 1
    launcher.run(seed, step, prob=0.05, alpha=ALPHA, threshold=0.3, dry_run=False)
    coin, partner = draw(seed, step, 0, 1100, 0.05)
    expected = reference_merge(before, coin, partner, alpha=ALPHA, threshold=0.3)
    assert torch.equal(bits(weights[0]), bits(expected.weight))
    assert 0 < expected.merged.sum() < coin.sum()
