"""Saving and resuming: bit-identical to a run that was never interrupted, even by ``kill -9``."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import assert_same_bits
from test_training import batches, loss_of, net, optimizer_of

from inmerge_fast import (
    CollapseGuard,
    DictLogger,
    InMerge,
    NoiseThreshold,
    QuantileThreshold,
    RankBudget,
    cosine,
    linear,
)

HERE = Path(__file__).parent
STEPS = 60
RECIPES = {
    "constants": {"threshold": 0.05},
    "ramps": {
        "alpha": linear(0.9, 0.6, end=40), "prob": cosine(0.1, 0.5, begin=5, end=50), "threshold": linear(0.2, 0, end=9)
    },
    "noise": {"threshold": NoiseThreshold(0.5), "every": 2, "start": 3},
    "quantile": {"threshold": QuantileThreshold(0.2, every=7), "partner": "nearest", "seed": 2**64 - 1},
    "guard": {"threshold": -0.2, "prob": 0.8, "alpha": 0.6, "guard": CollapseGuard(0.15)},
    "budget": {"threshold": RankBudget(0.3, every=7), "stop": STEPS, "prob": 0.8, "guard": None},
    "budget of a few steps": {"threshold": RankBudget(0.3, steps=40), "prob": 0.9, "partner": "similar", "every": 2},
    "by layer": {"threshold": {"3": 0.1, "5": -0.2}, "guard": None},
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    model = net()
    recipe = dict(RECIPES[name])
    if isinstance(guard := recipe.get("guard"), CollapseGuard):  # a guard remembers; each run needs its own
        recipe["guard"] = CollapseGuard(guard.loss, guard.action)
    return model, optimizer_of("adam", model), InMerge(model, skip_first=1, **recipe)


def run(model, optimizer, merger, steps):
    data = batches(STEPS)
    for step in steps:
        loss_of(model, data[step]).backward()
        optimizer.step()
        merger.step()
        optimizer.zero_grad()


def snapshot(model, optimizer, merger):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "merger": merger.state_dict()}


@pytest.mark.filterwarnings("ignore::inmerge_fast.CollapseWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_bit_identical(name, tmp_path):
    """With checkpoints at odd moments: between refreshes, with observations and counts of merges under way."""
    whole = build(name)
    run(*whole, range(STEPS))
    for cut in (9, 33):
        first = build(name)
        run(*first, range(cut))
        torch.save(snapshot(*first), tmp_path / "state.pt")
        run(*first, range(cut, STEPS))  # saving changes nothing
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed = build(name)
        for part, key in zip(resumed, ("model", "optimizer", "merger"), strict=True):
            part.load_state_dict(state[key])
        assert resumed[2].step_count == cut
        run(*resumed, range(cut, STEPS))
        for other in (first, resumed):
            for key, value in whole[0].state_dict().items():
                assert_same_bits(value, other[0].state_dict()[key], key)
            assert other[2].state_dict() == whole[2].state_dict()
        assert resumed[2].summary().rows() == whole[2].summary().rows() or name == "constants"
    if name == "guard":
        assert whole[2].stopped, "the guard must have acted, or this tests nothing"
    if "budget" in name:
        assert whole[2].summary().merged > 10


@pytest.mark.filterwarnings(
    "ignore::inmerge_fast.CollapseWarning", "ignore:torch.distributed is disabled", "ignore::FutureWarning"
)
@pytest.mark.parametrize("name", RECIPES)
def test_a_distributed_checkpoint_has_all_of_the_state(name, tmp_path):
    """It reads only what the state of a run at its beginning has keys for."""
    first, resumed = build(name), build(name)
    first[2]._run.monitor.loggers = resumed[2]._run.monitor.loggers = [DictLogger()]
    run(*first, range(31))  # observations are under way
    dcp.save({"merger": first[2]}, checkpoint_id=tmp_path)
    dcp.load({"merger": resumed[2]}, checkpoint_id=tmp_path)
    assert repr(resumed[2].state_dict()) == repr(first[2].state_dict())  # not ==, for NaN


@pytest.mark.filterwarnings("ignore::inmerge_fast.CollapseWarning")
@pytest.mark.parametrize("name", ["quantile", "budget"])
def test_states_from_before_are_read(name):
    """What comes layer by layer was a dict."""
    first, resumed = build(name), build(name)
    run(*first, range(20))
    state = first[2].state_dict()
    old = state | {key: state[key][0] for key in ("quantiles", "counted")}
    if state["watch"] is not None:
        old["watch"] = state["watch"] | {"ledgers": state["watch"]["ledgers"][0]}
    resumed[2].load_state_dict(old)
    assert resumed[2].state_dict() == state


def test_seed_and_schedules_come_from_the_state():
    _, _, merger = build("ramps")
    other = InMerge(net(), skip_first=1, seed=77, alpha=0.5)
    with pytest.warns(UserWarning, match=r"alpha=Ramp\(.* and seed=0 replace what .*, alpha=0.5 .* and seed=77;"):
        other.load_state_dict(merger.state_dict())
    assert other.state_dict() == merger.state_dict()


def test_what_a_checkpoint_overrides_is_said_with_the_way_to_keep_it():
    state = InMerge(net(), threshold=0.2, start=3, stop=50).state_dict()
    fresh = InMerge(net(), threshold=NoiseThreshold(2), start=3, stop=80, alpha=0.7)
    with pytest.warns(UserWarning, match=r"keep=\['alpha', 'stop', 'threshold'\]\) keeps the new values") as seen:
        fresh.load_state_dict(state)
    assert seen[0].filename == __file__
    assert fresh.state_dict() == state
    for given in ("threshold", "thresholds"):
        with pytest.raises(ValueError, match="keep must name arguments of the recipe, among alpha, prob, threshold"):
            fresh.load_state_dict(state, keep=given if given == "threshold" else [given])
    kept = InMerge(net(), threshold=NoiseThreshold(2), start=3, stop=80, alpha=0.7)
    kept.load_state_dict(state, keep=["threshold", "stop", "alpha"])
    recipe = kept.state_dict()["recipe"]
    assert (recipe["threshold"], recipe["stop"], recipe["alpha"]) == ({"kind": "NoiseThreshold", "z": 2}, 80, 0.7)
    same = InMerge(net(), threshold=0.2, start=3, stop=50)
    same.load_state_dict(state)  # nothing is said where nothing is overridden


def test_a_run_can_go_on_with_another_threshold():
    """From a plain one to a budget and back: what merging has cost so far goes along."""
    model = net()
    first = InMerge(model, threshold=-0.2, prob=0.8, stop=100, skip_first=1, guard=CollapseGuard(0.9))
    for _ in range(20):
        first.step()
    state = first.state_dict()
    second = InMerge(model, threshold=RankBudget(0.5), prob=0.8, stop=100, skip_first=1, guard=CollapseGuard(0.9))
    second.load_state_dict(state, keep=["threshold"])
    before = {name: ledger["spent"] for name, ledger in state["watch"]["ledgers"][0].items()}
    assert all(value > 0 for value in before.values())
    second.step()
    assert {name: ledger.spent for name, ledger in second._run.watch.ledgers.items()} == before
    for _ in range(40):
        second.step()
    third = InMerge(model, threshold=-1.0, prob=0.8, stop=100, skip_first=1, guard=CollapseGuard(0.9))
    third.load_state_dict(second.state_dict(), keep=["threshold"])
    assert third.step().merged > 0


def test_functions_can_be_exchanged_for_others():
    state = InMerge(net(), prob=lambda step: 0.5).state_dict()
    fresh = InMerge(net(), prob=0.25)
    with pytest.raises(ValueError, match=r"load_state_dict\(state, keep=\['prob'\]\) for the new one"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, keep=["prob"])
    assert fresh.state_dict()["recipe"]["prob"] == 0.25


def test_functions_of_the_step_are_not_saved_and_must_be_given_again():
    def halves(step):
        return 0.5 if step % 2 else 0.25

    state = InMerge(net(), prob=halves).state_dict()
    assert state["recipe"]["prob"] is None
    InMerge(net(), prob=halves).load_state_dict(state)
    fresh = InMerge(net(), prob=0.5)
    before = fresh.state_dict()
    with pytest.raises(ValueError, match="prob was a function of the step"):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before
    with pytest.raises(ValueError, match=r"prob was 0.5 when the state was saved"):
        InMerge(net(), prob=halves).load_state_dict(before)


def test_a_state_of_other_layers_or_versions_is_refused():
    state = InMerge(net(), skip_first=0).state_dict()
    with pytest.raises(ValueError, match=r"other layers, the difference is \['0'\]"):
        InMerge(net(), skip_first=1).load_state_dict(state)
    with pytest.raises(ValueError, match="version 7, expected 2"):
        InMerge(net(), skip_first=0).load_state_dict(state | {"version": 7})


def test_what_was_observed_before_the_checkpoint_is_logged_once():
    first, second = DictLogger(), DictLogger()
    merger = InMerge(net(), loggers=[first], observe_every=2)
    for _ in range(4):
        merger.step()
    state = merger.state_dict()
    assert [row["step"] for row in first.rows] == [0]
    model = net()
    resumed = InMerge(model, loggers=[second], observe_every=2)
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.step()
    resumed.flush()
    resumed.flush()
    assert [row["step"] for row in second.rows] == [2, 4]


SCRIPT = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_training_state import STEPS, build, run, snapshot
torch.set_num_threads(1)
path = sys.argv[2]
parts = build("quantile")
start = 0
if os.path.exists(path):
    state = torch.load(path, weights_only=True)
    for part, key in zip(parts, ("model", "optimizer", "merger")):
        part.load_state_dict(state[key])
    start = parts[2].step_count
for step in range(start, STEPS):
    run(*parts, [step])
    if step % 5 == 4:
        torch.save(snapshot(*parts), path + ".new")
        os.replace(path + ".new", path)
    print(step, flush=True)
torch.save(parts[0].state_dict(), path + ".final")
"""


@pytest.mark.filterwarnings("ignore::inmerge_fast.CollapseWarning")
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path):
    """A real SIGKILL in the middle of a step, twice, and then to the end."""
    path = tmp_path / "checkpoint.pt"
    command = [sys.executable, "-c", SCRIPT, str(HERE), str(path)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    for killed_after in (13, 38):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                if int(line) == killed_after:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) in (35, 40), "resumed from the last checkpoint before the kill"
    whole = build("quantile")
    run(*whole, range(STEPS))
    final = torch.load(f"{path}.final", weights_only=True)
    for key, value in whole[0].state_dict().items():
        assert_same_bits(value, final[key], key)


def test_a_checkpoint_of_one_guard_needs_none_in_the_other():
    state = InMerge(net(), guard=None).state_dict()
    assert state["guard"] is None
    InMerge(net()).load_state_dict(state)
    InMerge(net(), guard=None).load_state_dict(InMerge(net()).state_dict())
