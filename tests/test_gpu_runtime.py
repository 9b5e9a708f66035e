"""What a call costs and whom it waits for on a GPU: synchronisation, memory, streams, CUDA graphs."""

import warnings

import pytest
import torch
from on_gpu import keep_busy, synchronising_raises
from torch import nn
from vectorised import assert_merged

from inmerge_fast import MergePlan, NoEffectWarning, merge_
from inmerge_fast.effect import NO_EFFECT_CALLS

triton = pytest.importorskip("triton")

from inmerge_fast.paths.triton.slots import KEPT_CALLS, SLOTS  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CALL = {"prob": 1.0, "alpha": 0.75, "threshold": -1.0}


def some_weights():
    """An odd number of rows, in three dtypes, so that nothing is aligned by luck."""
    shapes = [(33, 27), (64, 144), (20, 64)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def clones(weights):
    return [weight.clone() for weight in weights]


def warm_plan(weights):
    """A plan that has compiled its kernels and whose scratch is large enough for every probability.

    What its merges cost is not measured, they are more than a training's: test_rank_in_background.py is about that.
    """
    plan = MergePlan(weights)
    assert plan.path == "triton"
    plan.history.look = lambda *arguments: None
    merge_(plan, prob=1.0, dry_run=True, seed=0, step=0)
    torch.cuda.synchronize()
    return plan


# ----------------------------------------------------------------------------------------------------- waits for nobody


def test_a_call_does_not_wait_for_the_device():
    weights = some_weights()
    plan = warm_plan(weights)
    busy = keep_busy(0.5)
    with synchronising_raises():
        for step in range(50):
            stats = merge_(plan, seed=1, step=step, prob=0.3, threshold=(-1.0, 0.3)[step % 2])
        assert not busy.query(), "the host waited for the device"
        with pytest.raises(RuntimeError, match="synchronizing"):
            _ = stats.sampled  # the mode does notice


def test_a_call_on_a_model_does_not_wait_for_the_device():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(5)), nn.Linear(8, 8)).to(DEVICE)
    merge_(model, prob=1.0, seed=0, step=0)
    torch.cuda.synchronize()
    busy = keep_busy(0.5)
    with synchronising_raises(), torch.autocast("cuda"):
        for step in range(20):
            merge_(model, seed=1, step=step)
            merge_(model)  # draws its own seed, on the host
    assert not busy.query(), "the host waited for the device"


def test_no_device_memory_is_allocated_after_the_first_call():
    weights = some_weights()
    plan = warm_plan(weights)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for step in range(2 * SLOTS):
        merge_(plan, seed=1, step=step, prob=(0.1, 0.3, 1.0)[step % 3], threshold=(-1.0, 0.3)[step % 2])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    _ = torch.empty(1, device=DEVICE)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1, "the counter does count"


@pytest.mark.filterwarnings("ignore:step goes back")
def test_nothing_is_compiled_after_the_first_call(monkeypatch):
    weights = some_weights()
    plan = warm_plan(weights)
    compiled = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **details: compiled.append(details["metadata"]))
    for step in range(2 * SLOTS):
        seed, number = (1, 2**64 - 1)[step % 2], (1, 16, 2**62)[step % 3]
        prob, threshold, alpha = (0.1, 1.0)[step % 2], (-1.0, 0.0, 1.0)[step % 3], (1.0, 0.0, 0.8)[step % 3]
        call = {"prob": prob, "threshold": threshold, "alpha": alpha, "dry_run": step % 5 == 0}
        merge_(plan, seed=seed, step=number, **call)
    assert not compiled
    plan.paths.triton.launcher(weights).run(1, 0, prob=1.0, alpha=0.5, threshold=0.5, dry_run=True, BLOCK=16)
    assert compiled, "the listener does notice other constants"


def test_the_no_effect_warning_comes_without_waiting():
    weight = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], device=DEVICE)
    plan = warm_plan(weight)
    # The first real call page-locks memory for the counts, and PyTorch loads a kernel when it first launches it: for
    # both the driver may wait.
    merge_(plan, prob=1.0, threshold=0.3)
    plan.effect._numbers()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        busy = keep_busy(1.0)
        for _ in range(NO_EFFECT_CALLS + 5):
            merge_(plan, prob=1.0, threshold=0.3)
        assert not busy.query(), "the host waited for the device"
        assert not caught
        torch.cuda.synchronize()
        merge_(plan, prob=1.0, threshold=0.3)
    assert [warning.category for warning in caught] == [NoEffectWarning]
    assert "was -0.6000" in str(caught[0].message)


# -------------------------------------------------------------------------------------------------------------- streams


def test_a_call_runs_on_the_current_stream():
    """Its weights come from work that has not run yet: on another stream the merge would take what was there before."""
    weights = some_weights()
    plan = warm_plan(weights)
    new = [torch.randn_like(weight) for weight in weights]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for step in range(5):
        with torch.cuda.stream(side):
            keep_busy(0.02)
            torch._foreach_copy_(weights, new)
            merge_(plan, seed=1, step=step, **CALL)
            merged = clones(weights)
        side.synchronize()
        for layer, (before, after) in enumerate(zip(new, merged, strict=True)):
            assert_merged(before, after, seed=1, step=step, layer=layer, **CALL)


def test_calls_of_one_plan_on_two_streams_follow_each_other():
    """The tables and counters of a plan belong to one call at a time."""
    weights = some_weights()
    plan = warm_plan(weights)
    in_turn = clones(weights)
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    torch.cuda.synchronize()
    for step in range(30):
        with torch.cuda.stream(streams[step % 3]):
            keep_busy((0.01, 0.0, 0.003)[step // 3 % 3])
            merge_(plan, seed=1, step=step, **CALL)
    torch.cuda.synchronize()
    other = warm_plan(in_turn)
    for step in range(30):
        merge_(other, seed=1, step=step, **CALL)
    assert all(torch.equal(a, b) for a, b in zip(weights, in_turn, strict=True))
    launcher = plan.paths.triton.launcher(weights)
    assert not launcher.counter.any()
    assert not launcher.slot_of(launcher.calls).state.any()  # others may hold what is drawn ahead


@pytest.mark.parametrize("begins_on_default", [True, False])
def test_the_default_stream_is_waited_for_and_waits_like_any_other(begins_on_default):
    """Its handle is 0, from which PyTorch below 2.14 makes a new stream that nothing runs on."""
    weights = some_weights()
    plan, in_turn = warm_plan(weights), clones(weights)
    streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for step in range(4):
        with torch.cuda.stream(streams[(step + 1 - begins_on_default) % 2]):
            if step == 0:
                busy = keep_busy(0.5)
            merge_(plan, seed=1, step=step, **CALL)
    assert not busy.query(), "the host waited, so nothing shows"
    torch.cuda.synchronize()
    other = MergePlan(in_turn)
    for step in range(4):
        merge_(other, seed=1, step=step, **CALL)
    assert all(torch.equal(a, b) for a, b in zip(weights, in_turn, strict=True))


@pytest.mark.parametrize("read", ["layers", "prefetch"])
@pytest.mark.parametrize("on_default", [True, False])
def test_statistics_read_on_another_stream_are_those_of_the_call(on_default, read):
    weights = some_weights()
    plan = warm_plan(weights)
    default, side = torch.cuda.default_stream(), torch.cuda.Stream()
    caller, reader = (default, side) if on_default else (side, default)
    for step in range(5):
        expected = merge_(plan, seed=1, step=step, prob=0.5, dry_run=True).layers
        torch.cuda.synchronize()
        with torch.cuda.stream(caller):
            keep_busy(0.02)
            stats = merge_(plan, seed=1, step=step, prob=0.5, dry_run=True)
        with torch.cuda.stream(reader):
            if read == "prefetch":
                stats.prefetch()
            assert stats.layers == expected


def test_statistics_of_reused_slots_raise():
    plan = warm_plan(weights := some_weights())
    calls = [merge_(plan, seed=1, step=step, prob=1.0, dry_run=True) for step in range(SLOTS + 1)]
    with pytest.raises(RuntimeError, match="statistics of this call are gone"):
        _ = calls[0].sampled
    assert calls[-KEPT_CALLS].sampled == calls[-1].sampled == sum(map(len, weights))


# ---------------------------------------------------------------------------------------------------------- CUDA graphs


def test_capturing_the_first_call_says_to_warm_up():
    weights = some_weights()
    plan, before = MergePlan(weights), clones(weights)
    graph, touched = torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        touched += 1  # a graph must not be empty
        with pytest.raises(RuntimeError, match="call merge_ once before capturing"):
            merge_(plan, seed=1, step=0, **CALL)
    merge_(plan, seed=1, step=0, **CALL)
    for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
        assert_merged(old, new, seed=1, step=0, layer=layer, **CALL)


def test_a_captured_call_takes_seed_and_step_from_memory():
    weights = some_weights()
    plan = warm_plan(weights)
    launcher = plan.paths.triton.launcher(weights)
    launcher.prepare(1, 0, write=False, **CALL)
    launcher.run_from_memory()  # its draw is a kernel of its own
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher.run_from_memory()
    for seed, step in ((1, 0), (2**64 - 1, 2**63 - 1), (5, 2**32)):
        launcher.prepare(seed, step, write=True, **CALL)
        before = clones(weights)
        graph.replay()
        for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
            assert_merged(old, new, seed=seed, step=step, layer=layer, **CALL)
    before = clones(weights)
    merge_(plan, seed=9, step=9, **CALL)  # the plan still works outside the graph
    for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
        assert_merged(old, new, seed=9, step=9, layer=layer, **CALL)


@pytest.mark.filterwarnings("ignore:step goes back")
@pytest.mark.parametrize("drawn_ahead", [False, True])
def test_a_captured_merge_repeats_its_draw_and_calls_in_between_stay_right(drawn_ahead):
    weights = some_weights()
    plan = MergePlan(weights)
    launcher = plan.paths.triton.launcher(weights)
    merge_(plan, seed=1, step=0, **CALL)
    if drawn_ahead:  # what it has counted must not be in the graph's way
        for step in (1, 2):
            merge_(plan, seed=1, step=step, **CALL)
        assert launcher._drawn.end > launcher.calls + 1
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge_(plan, seed=1, step=3, **CALL)
    for step in (2, 3, 4, 3):  # step 3 by replays
        before = clones(weights)
        graph.replay() if step == 3 else merge_(plan, seed=1, step=step, **CALL)
        for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
            assert_merged(old, new, seed=1, step=step, layer=layer, **CALL)
    assert not launcher.slot_of(launcher.calls).state.any()  # others may hold what is drawn ahead


def test_replays_and_calls_leave_each_others_statistics_alone():
    weights = some_weights()
    plan = warm_plan(weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merge_(plan, seed=2, step=0, prob=0.3, dry_run=True)
        with pytest.raises(RuntimeError, match="cannot be read while a CUDA graph is captured"):
            _ = captured.sampled
    of_graph = merge_(plan, seed=2, step=0, prob=0.3, dry_run=True).layers
    calls, expected = [], []
    for step in range(2 * SLOTS):
        calls.append(merge_(plan, seed=1, step=step, prob=0.9, dry_run=True))
        expected.append(merge_(MergePlan(weights), seed=1, step=step, prob=0.9, dry_run=True).layers)
        graph.replay()
        if step >= KEPT_CALLS:
            assert calls[-KEPT_CALLS].layers == expected[-KEPT_CALLS]
    assert captured.layers == of_graph


# ---------------------------------------------------------------------------------------------------------- other paths


@pytest.mark.parametrize("threshold", [-1.0, 0.05])
def test_the_eager_path_can_be_forced_and_gives_the_same(monkeypatch, threshold):
    weights = [torch.randn(200, 72, device=DEVICE).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    again = clones(weights)
    call = {"prob": 0.6, "threshold": threshold, "seed": 4, "step": 2}
    stats = merge_(weights, **call)
    monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
    eager = merge_(again, **call)
    assert (stats.path, eager.path) == ("triton", "eager")
    assert (stats.sampled, stats.passed) == (eager.sampled, eager.passed)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_float64_layers_take_the_eager_path():
    weights = [torch.randn(8, 9, device=DEVICE), torch.randn(8, 9, dtype=torch.float64, device=DEVICE)]
    plan = MergePlan(weights)
    assert (plan.path, plan.path_reason) == ("eager", "float64 layers, or layers of 2**20 filters and more")
    assert merge_(plan, prob=1.0, threshold=-1.0).merged == 16


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_call_runs_on_the_device_of_its_weights():
    weight = torch.randn(33, 27, device="cuda:1")
    before = weight.clone()
    assert torch.cuda.current_device() == 0
    assert merge_(weight, seed=1, step=0, **CALL).path == "triton"
    assert_merged(before, weight, seed=1, step=0, layer=0, **CALL)
    assert torch.cuda.current_device() == 0
