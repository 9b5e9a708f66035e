"""What merging costs, on an accelerator: measured without a wait, and looked at at a step that the run alone decides.

Without a GPU a CPU tensor stands in whose copy takes a while to arrive. That shows who asks when; that no call
waits for a device, only one shows: the tests marked ``gpu``.
"""

import copy
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_training_rank import deep

import inmerge_fast
from inmerge_fast import CollapseGuard, CollapseWarning, InMerge, MergePlan, RankBudget, history, rank_cost
from inmerge_fast.history import FIRST_LOOK
from inmerge_fast.rank_cost import RankCost, Snapshot
from inmerge_fast.training import rank_watch
from inmerge_fast.training.rank_watch import MEASURE_DELAY


@pytest.fixture
def late(monkeypatch):
    """CPU weights are measured as those of an accelerator are; each snapshot arrives 2 ms after it was asked for."""
    monkeypatch.setattr(history, "may_defer", lambda device: True)
    monkeypatch.setattr(rank_watch, "may_defer", lambda device: True)
    threads, asked = [], {}
    original = RankCost.__init__

    def has_arrived(self):
        return time.monotonic() > asked.setdefault(id(self), time.monotonic()) + 0.002

    def made(self, *args):
        threads.append(threading.current_thread().name)
        original(self, *args)

    monkeypatch.setattr(Snapshot, "has_arrived", has_arrived)
    monkeypatch.setattr(RankCost, "__init__", made)
    return threads


def warned(call, wanted, pause=0.002):
    """What ``call(step)`` warns of, over as many steps as are wanted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in wanted:
            call(step)
            time.sleep(pause)  # a training step, in which the thread may work
    return [str(warning.message) for warning in caught if warning.category is CollapseWarning]


def test_the_warning_of_merge_comes_a_few_calls_later_and_says_the_same(late, monkeypatch):
    def run(model):
        return warned(lambda step: inmerge_fast.merge_(model, threshold=0.0, skip_first=0, seed=0, step=step),
                      range(3 * FIRST_LOOK))  # fmt: skip

    model = deep()
    said = run(copy.deepcopy(model))
    assert said
    assert set(late) == {"inmerge_fast-rank_0"}
    monkeypatch.setattr(history, "may_defer", lambda device: False)
    at_once = run(model)
    assert [text.split(" (seen")[0] for text in said[: len(at_once)]] == [text.split(" (seen")[0] for text in at_once]
    seen = [int(text.split("(seen after ")[1].split()[0]) for text in (said[0], at_once[0])]
    assert seen[0] >= seen[1] + 2


def test_a_run_looks_at_what_it_measured_six_merging_steps_later(late):
    model = deep()
    merger = InMerge(model, threshold=0.05, skip_first=0, every=2, guard=CollapseGuard(0.5))
    watch = merger._run.watch
    start = {name: cost.rank for name, cost in costs_of(model).items()}
    late.clear()
    for step in range(2 * MEASURE_DELAY):
        assert not watch.ledgers, step
        merger.step()
    merger.step()
    assert {name: ledger.rank_start for name, ledger in watch.ledgers.items()} == start
    assert set(late) == {"inmerge_fast-rank_0"}
    assert all(ledger.occasion == 0 for ledger in watch.ledgers.values())


def costs_of(model):
    plan = MergePlan(model, skip_first=0)
    return {
        layer.name: RankCost(Snapshot(weight, layer.layout), layer.layer_id)
        for layer, weight in zip(plan.layers, plan.weights(), strict=True)
    }


def test_the_guard_stops_what_collapses_at_the_same_step_however_long_the_thread_takes(late, monkeypatch):
    def run(pause):
        merger, steps = InMerge(deep(), threshold=-1.0, skip_first=0, guard=CollapseGuard(0.2)), {}

        def step(number):
            merger.step()
            for name in merger.stopped:
                steps.setdefault(name, number)

        assert len(warned(step, range(60), pause)) == 3
        return steps, merger.effective_rank()

    found = run(pause=0.02)  # the thread has long been done
    original = RankCost.price
    monkeypatch.setattr(RankCost, "price", lambda self, *args: time.sleep(0.02) or original(self, *args))
    assert run(pause=0.0) == found
    assert len(found[0]) == 3


@pytest.mark.parametrize("saved_at", [3, 9, 14, 21])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same(late, saved_at):
    """Also one that was saved while a measurement was on its way."""
    settings = {"threshold": 0.02, "prob": 0.6, "skip_first": 0, "guard": CollapseGuard(0.3)}
    model = deep()
    merger = InMerge(model, **settings)
    for _ in range(saved_at):
        merger.step()
    other = copy.deepcopy(model)
    state = merger.state_dict()
    resumed = InMerge(other, **settings)
    resumed.load_state_dict(state)
    assert (state["watch"]["measuring"] is None) == (saved_at == 14), "the others are saved in the middle"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        for run in (merger, resumed):
            for _ in range(40):
                run.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    own, loaded = ({name: vars(ledger) for name, ledger in run._run.watch.ledgers.items()} for run in (merger, resumed))
    assert own == loaded
    assert own


def test_where_the_weights_are_decides_not_where_the_counts_are(monkeypatch):
    """Before the first call the counts are on the host; ranks of which one has counted would part."""
    asked = []
    monkeypatch.setattr(MergePlan, "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(rank_watch, "may_defer", lambda device: asked.append(device) or True)
    InMerge(deep(), threshold=0.5, skip_first=0).step()
    assert asked == [torch.device("meta")]


def test_a_run_that_is_over_before_it_looks_has_its_cost_in_the_summary(late):
    """And the look changes nothing."""
    merger = InMerge(deep(), threshold=-1.0, skip_first=0, stop=MEASURE_DELAY - 2, guard=CollapseGuard(0.01))
    for _ in range(MEASURE_DELAY):
        merger.step()
    watch = merger._run.watch
    assert not watch.ledgers
    assert all(layer.lost > 0.01 and layer.verdict == "collapsing" for layer in merger.summary().layers)
    assert not watch.ledgers
    assert watch._measuring is not None


@pytest.mark.parametrize("load", ["checkpoint", "step_count"])
def test_steps_that_are_set_back_do_not_blind_the_guard(late, load):
    """A checkpoint from the middle of a measurement that goes on with another ``every``: occasions are fewer then."""
    settings = {"threshold": -1.0, "prob": 0.01, "skip_first": 0, "guard": CollapseGuard(0.2)}
    merger, watch = InMerge(deep(), **settings), None
    for _ in range(400):
        merger.step()
        watch = merger._run.watch
        if watch._measuring is not None and watch._occasion > 100:
            break
    assert watch._measuring is not None
    if load == "checkpoint":
        state, merger = merger.state_dict(), InMerge(deep(), **settings, every=50)
        merger.load_state_dict(state, keep=["every"])
        watch = merger._run.watch
        for _ in range(50):
            merger.step()
    else:
        merger.step_count = 0
        merger.step()
    assert watch._measuring is None


def test_steps_that_are_set_back_do_not_stop_a_budget():
    merger = InMerge(deep(), threshold=RankBudget(0.3), skip_first=0, stop=400, guard=None)
    for _ in range(300):
        merger.step()
    merger.step_count = 0
    for _ in range(50):
        merger.step()
    assert all(ledger.occasion < 50 for ledger in merger._run.watch.ledgers.values())


def test_what_arrives_late_replaces_nothing_that_was_measured_since(late):
    """As where a checkpoint goes on with a budget, whose measurements are waited for."""
    model = deep()
    merger = InMerge(model, threshold=0.02, skip_first=0, stop=400)
    merger.step()
    state = merger.state_dict()
    other = InMerge(model, threshold=RankBudget(0.3), skip_first=0, stop=400, guard=None)
    other.load_state_dict(state, keep=["threshold"])
    watch = other._run.watch
    newer = {name: rank_watch.LayerLedger(**{**vars(ledger), "occasion": 1, "spent": 0.5})
             for name, ledger in watch.so_far().items()}  # fmt: skip
    watch.ledgers |= newer
    for _ in range(MEASURE_DELAY + 1):
        other.step()
    assert watch._measuring is None
    assert all(ledger.spent >= 0.5 for ledger in watch.ledgers.values())


def test_a_thread_that_trains_goes_on_when_the_main_one_is_over(monkeypatch):
    """Python begins no threads then, and takes in no work for them."""
    over = ThreadPoolExecutor(1)
    over.shutdown()
    monkeypatch.setattr(rank_cost, "_worker", (os.getpid(), over))
    assert rank_cost.in_background(lambda: 3).result() == 3


def test_a_fork_has_a_thread_of_its_own(late):
    """As a loader's worker that merges a model of its own: threads do not come along."""
    assert rank_cost.in_background(lambda: 1).result() == 1
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of a fork with threads
        child = os.fork()
    if not child:
        os.write(writing, b"%d" % rank_cost.in_background(lambda: 2).result(timeout=20))
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"2"
    os.waitpid(child, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("lasts", ["merge_", "InMerge"])
def test_no_step_waits_for_the_device_while_layers_collapse(lasts):
    """All of them are measured, and named in the end.

    The device is at most two steps behind: what was counted at a step is looked at two steps later, come what may.
    """
    from on_gpu import keep_busy, synchronising_raises

    model = deep().cuda()
    if lasts == "merge_":
        step = lambda number: inmerge_fast.merge_(model, threshold=-1.0, skip_first=0, seed=0, step=number)  # noqa: E731
    else:
        merger = InMerge(model, threshold=-1.0, skip_first=0, guard=CollapseGuard(0.2, action="warn"))
        step = lambda number: merger.step()  # noqa: E731
    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    found = []
    for first in range(3, 99, 2):
        busy = keep_busy(0.2)
        with synchronising_raises():
            found += warned(step, range(first, first + 2))
        assert not busy.query(), "the host waited for the device"
        torch.cuda.synchronize()
    assert len(found) == 3, found
