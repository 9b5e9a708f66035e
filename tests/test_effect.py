"""What the calls of a plan are counted to do, and what is said where that is next to nothing."""

import contextlib
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast import InMerge, MergePlan, NoEffectWarning
from inmerge_fast.effect import (
    MAX_WITHOUT_A_WORD,
    NO_EFFECT_CALLS,
    SHORTEST,
    EffectMonitor,
    _without_a_word,
    callers_place,
)

ROOT = Path(__file__).parents[1]


def layers(device):
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(1, 20, generator=generator)
    return [
        (torch.randn(filters, 20, generator=generator) + 0.6 * common).to(device) for filters in (9, 40, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("partner", ["random", "similar", "nearest"])
def test_totals_are_those_of_every_call_by_layer(device, partner):
    weights = layers(device)
    plan = MergePlan(weights)
    expected = np.zeros((3, 2), int)
    for step in range(12):
        how = {"prob": 0.4, "threshold": 0.35, "partner": partner, "seed": 1, "step": step}
        inmerge_fast.merge_(plan, dry_run=True, **how)  # was not meant to merge: does not count
        stats = inmerge_fast.merge_(plan, **how)
        expected += [(layer.sampled, layer.merged) for layer in stats.layers]
    assert plan.totals().tolist() == expected.tolist()
    assert (expected[:2, 1] > 0).all()
    assert (expected[:2, 1] < expected[:2, 0]).all()
    plan.effect.reset()
    assert not plan.totals().any()


def test_totals_go_on_where_the_path_changes(monkeypatch):
    weights = layers("cpu")
    plan = MergePlan(weights)
    expected = np.zeros((3, 2), int)
    for step in range(9):
        monkeypatch.setenv("INMERGE_FORCE_EAGER", str(step % 2))
        stats = inmerge_fast.merge_(plan, prob=0.9, threshold=0.2, seed=1, step=step)
        expected += [(layer.sampled, layer.merged) for layer in stats.layers]
    assert plan.totals().tolist() == expected.tolist()


def counted(monitor, calls, sampled, merged):
    """Count calls with so many pairs each, of which so many pass."""
    passed = np.arange(sampled) < merged
    for _ in range(calls):
        monitor.count(np.array([sampled]), passed, merged, 0.25)


def test_four_merges_in_many_pairs_are_no_effect():
    monitor = EffectMonitor(1)
    counted(monitor, 4, 3000, 1)
    counted(monitor, NO_EFFECT_CALLS - 5, 3000, 0)
    with pytest.warns(NoEffectWarning, match="100 calls of merge_ sampled 300,000 filter pairs and merged 4, which is"):
        counted(monitor, 1, 3000, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted(monitor, 3000, 3000, 0)


def test_as_many_as_a_rate_of_one_in_ten_thousand_is_an_effect():
    monitor = EffectMonitor(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted(monitor, 30, 3000, 1)
        counted(monitor, 70, 3000, 0)


def test_what_stops_merging_later_is_looked_at_again():
    monitor = EffectMonitor(1)
    counted(monitor, NO_EFFECT_CALLS, 1000, 1)
    counted(monitor, 9 * NO_EFFECT_CALLS - 1, 2000, 0)
    with pytest.warns(NoEffectWarning, match="1000 calls of merge_ sampled 1,900,000 filter pairs and merged 100"):
        counted(monitor, 1, 2000, 0)


def test_a_short_run_has_its_word_at_the_end():
    monitor = EffectMonitor(1)
    counted(monitor, SHORTEST - 1, 40, 0)
    assert monitor.last_word() is None
    counted(monitor, 1, 40, 0)
    assert id(monitor) not in _without_a_word, "whoever has been asked is done"
    with pytest.warns(NoEffectWarning, match="10 calls of merge_ sampled 400 filter pairs and merged none") as seen:
        monitor.end()
    assert seen[0].filename == __file__
    assert monitor.last_word() is None
    busy = EffectMonitor(1)
    counted(busy, 20, 40, 1)
    busy.end()


def test_who_merges_rarely_on_purpose_is_told_at_the_end_only_and_only_of_nothing_at_all():
    monitor, busy = EffectMonitor(1), EffectMonitor(1)
    monitor.advise("a reason")
    busy.advise("a reason")
    counted(monitor, 2000, 5000, 0)
    counted(busy, 1, 5000, 1)
    counted(busy, 1999, 5000, 0)
    busy.end()
    with pytest.warns(NoEffectWarning, match="2000 calls of merge_ sampled 10,000,000 .* merged none: a reason"):
        monitor.end()


def test_a_new_plan_goes_on_with_the_calls_of_the_old_one():
    old, new = EffectMonitor(1), EffectMonitor(2)
    counted(old, 60, 100, 0)
    new.go_on_from(old)
    assert new.totals().tolist() == [[0, 0], [0, 0]]
    for _ in range(39):
        new.count(np.array([50, 50]), np.zeros(100, bool), 0, -0.5)
    with pytest.warns(NoEffectWarning, match="100 calls of merge_ sampled 10,000 .* largest similarity seen was 0.25"):
        new.count(np.array([50, 50]), np.zeros(100, bool), 0, -0.5)


def test_few_monitors_are_kept_for_a_word_at_the_end():
    monitors = [EffectMonitor(1) for _ in range(MAX_WITHOUT_A_WORD + 10)]
    for monitor in monitors:
        counted(monitor, 1, 10, 0)
    assert len(_without_a_word) == MAX_WITHOUT_A_WORD
    assert id(monitors[-1]) in _without_a_word


SCRIPT = """
import sys, torch, inmerge_fast
torch.set_num_threads(1)

def train(calls, threshold):
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.Conv2d(64, 64, 3))
    for step in range(calls):
        inmerge_fast.merge_(model, threshold=threshold, skip_first=0, seed=0, step=step)  # the line

train(int(sys.argv[1]), float(sys.argv[2]))  # the model is gone when the script ends
print("done")
"""


@pytest.mark.parametrize(("calls", "threshold", "word"), [(60, 0.9, True), (9, 0.9, False), (12, -0.1, False)])
def test_a_script_that_ends_early_has_a_last_word(tmp_path, calls, threshold, word):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path), str(calls), str(threshold)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    line = SCRIPT.splitlines().index(next(x for x in SCRIPT.splitlines() if "# the line" in x)) + 1
    if word:
        assert f"{path}:{line}: NoEffectWarning: 60 calls of merge_ sampled" in done.stderr
        assert "A threshold of" in done.stderr
    else:
        assert not done.stderr


def test_a_new_largest_similarity_is_that_of_all_layers(device):
    """Of the calls that count: one with a model whose filters are the same, which a dry run looks at, does not."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)).to(device)
    plan = MergePlan(model, skip_first=0)
    inmerge_fast.merge_(plan, prob=1.0, threshold=1.0, seed=0, step=0, dry_run=True)
    largest = max(
        inmerge_fast.merge_(plan, prob=1.0, threshold=1.0, seed=0, step=step).max_similarity
        for step in range(SHORTEST)
    )  # fmt: skip
    with pytest.warns(NoEffectWarning, match=f"the largest similarity seen was {largest:.4f}"):
        plan.effect.end()


def test_warnings_point_at_the_users_line_through_libraries(monkeypatch):
    """Lightning and contextlib call the optimizer and the block; where all is installed, the first of them."""
    model = torch.nn.Conv2d(3, 8, 3)
    merger = InMerge(model, lasting=False, threshold=0.999, skip_first=0)
    for _ in range(NO_EFFECT_CALLS - 1):
        with merger.merged():
            pass
    block = merger.merged()
    with pytest.warns(NoEffectWarning) as seen:
        contextlib.ExitStack().enter_context(block)
    assert [warning.filename for warning in seen] == [__file__]
    library = "/usr/lib/site-packages/trainer.py"
    call = types.FunctionType(compile("f = lambda g: g()", library, "exec").co_consts[0], {"__name__": "trainer"})
    assert call(callers_place)[0] == __file__
    monkeypatch.setattr("inmerge_fast.effect._is_of_a_library", lambda file: True)
    assert call(callers_place)[0] == library
