"""What ``merge_`` notices over its calls: layers that collapse, steps that go back. Thresholds and selections of it."""

import time
import warnings

import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast import CollapseWarning, InMerge, MergePlan, NoiseThreshold, QuantileThreshold, RankBudget, history
from inmerge_fast.history import FIRST_LOOK


def net(device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 24, 3), nn.Conv2d(24, 32, 3), nn.Conv2d(32, 32, 1)).to(device)


def merged_to_the_end(model, calls, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(calls):
            inmerge_fast.merge_(model, seed=0, step=step, **settings)  # the line
            if next(model.parameters()).is_cuda:
                # The warning waits for a copy and a thread's work, the loop does not: a training step takes longer.
                torch.cuda.synchronize()
                time.sleep(0.005)
    return [warning for warning in caught if warning.category is CollapseWarning]


def test_layers_that_collapse_are_named_once(device):
    model = net(device)
    before = {layer.name: layer.effective_rank for layer in inmerge_fast.similarity(model).layers}
    caught = merged_to_the_end(model, 5 * FIRST_LOOK, threshold=-0.3, skip_first=0, exclude="2")
    after = {layer.name: layer.effective_rank for layer in inmerge_fast.similarity(model).layers}
    assert sorted(str(warning.message).split(" is collapsing")[0] for warning in caught) == ["layer 0", "layer 1"]
    assert all(warning.filename == __file__ for warning in caught), "the warnings point at the caller"
    assert "RankBudget" in str(caught[0].message)
    assert all(after[name] < 0.5 * before[name] for name in ("0", "1"))


def test_the_warning_says_what_merging_has_cost():
    model = net()
    ranks, found = [], []
    for step in range(400):
        ranks.append(inmerge_fast.similarity(model).layers[1].effective_rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            inmerge_fast.merge_(model, threshold=0.12, skip_first=1, exclude="2", seed=0, step=step)
        found += [str(warning.message) for warning in caught]
        if found:
            break
    assert "it about" in found[0]
    said = float(found[0].split("about ")[1].split(" %")[0])
    now = inmerge_fast.similarity(model).layers[1].effective_rank
    assert said == pytest.approx(100 * (1 - now / ranks[0]), rel=0.3)
    assert f"the rank is {now:.1f} now" in found[0]


def test_where_nothing_merges_nothing_is_measured(monkeypatch):
    """Not even where all filters are alike."""
    monkeypatch.setattr(history, "RankCost", pytest.fail)
    model = net()
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[:1] + 0.1 * torch.randn_like(model[1].weight))
    assert not merged_to_the_end(model, 3 * FIRST_LOOK, threshold=1.0, skip_first=0)


def test_dry_runs_do_not_collapse_anything():
    assert not merged_to_the_end(net(), 3 * FIRST_LOOK, threshold=-1.0, skip_first=0, dry_run=True)


def test_steps_that_go_back_are_noticed_once():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, step in ((0, 5), (0, 5), (0, 6), (1, 2), (1, 3), (0, 0)):
            inmerge_fast.merge_(model, seed=seed, step=step)
        inmerge_fast.merge_(model, seed=0, step=9)
        inmerge_fast.merge_(model, seed=0, step=3, dry_run=True)
        inmerge_fast.merge_(model)
        inmerge_fast.merge_(net(), seed=0, step=1)  # another model
    with pytest.warns(
        UserWarning, match="step goes back from 9 to 0 with the same seed, 0: .*of the whole run"
    ) as seen:
        inmerge_fast.merge_(model, seed=0, step=0)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inmerge_fast.merge_(model, seed=0, step=5)
        inmerge_fast.merge_(model, seed=0, step=0)


# ---------------------------------------------------------------------------------------------- thresholds, selections


@pytest.mark.parametrize(
    "threshold",
    [NoiseThreshold(1.0), QuantileThreshold(0.2), {"0": 0.9, "1": 0.05, "2": -1.0}, 0.1],
    ids=lambda threshold: type(threshold).__name__,
)
def test_a_call_takes_what_a_run_takes(threshold, device):
    model, twin = net(device), net(device)
    call = inmerge_fast.merge_(model, threshold=threshold, prob=1.0, skip_first=0, seed=3, step=0)
    step = InMerge(twin, threshold=threshold, prob=1.0, skip_first=0, seed=3, guard=None).step()
    assert call.layers == step.layers
    assert call.merged > 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_thresholds_by_layer_are_those_of_similarity():
    model = net()
    thresholds = inmerge_fast.similarity(model).threshold_for_rate(0.1)
    assert set(thresholds) == {"0", "1", "2"}
    stats = inmerge_fast.merge_(model, threshold=thresholds, prob=1.0, skip_first=1, dry_run=True)
    assert [layer.name for layer in stats.layers] == ["1", "2"], "that of the first layer is not needed"
    rate = [inmerge_fast.merge_(model, threshold=thresholds, prob=1.0, skip_first=1, dry_run=True) for _ in range(30)]
    assert sum(stats.passed for stats in rate) / sum(stats.sampled for stats in rate) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("threshold", "error", "match"),
    [
        ({"1": 0.2}, ValueError, r"threshold has no value for layer '2' \(1 of 2 layers have none; it has '1'\)"),
        ({"1": 0.2, "2": 0.2, "tpyo": 0.1}, ValueError, "a value for 'tpyo', which is no layer; they are '"),
        ({"1": 0.2, "2": 1.5}, ValueError, r"threshold of layer '2' must be in \[-1, 1\], got 1.5"),
        ({"1": 0.2, "2": "high"}, TypeError, "threshold of layer '2' must be a number"),
        ({}, ValueError, "threshold is an empty dict"),
        ("high", TypeError, "threshold must be a number, got 'high'"),
    ],
)
def test_thresholds_that_are_none_raise_before_anything_is_written(threshold, error, match):
    model = net()
    before = model[1].weight.detach().clone()
    with pytest.raises(error, match=match):
        inmerge_fast.merge_(model, threshold=threshold, prob=1.0, skip_first=1)
    with pytest.raises(error, match=match):
        InMerge(model, threshold=threshold, prob=1.0, skip_first=1)
    assert torch.equal(before, model[1].weight)


def test_a_budget_is_not_for_one_call():
    with pytest.raises(
        TypeError, match=r"has to know the steps of a run.*InMerge\(model, threshold=RankBudget\(\), stop"
    ):
        inmerge_fast.merge_(net(), threshold=RankBudget())


@pytest.mark.parametrize("patterns", ["0", ["0", "2"]])
def test_skip_first_takes_patterns_everywhere(patterns):
    names = [name for name in ("0", "1", "2") if name not in patterns]
    assert MergePlan(net(), skip_first=patterns).names == names
    assert [layer.name for layer in inmerge_fast.merge_(net(), skip_first=patterns).layers] == names
    assert InMerge(net(), skip_first=patterns).plan.names == names
    assert [layer.name for layer in inmerge_fast.similarity(net(), skip_first=patterns).layers] == names
    model = net()
    first = inmerge_fast.merge_(model, skip_first=patterns, exclude="1" if len(names) > 1 else ()).layers
    assert [layer.name for layer in first] == [name for name in names if name != "1" or len(names) == 1]
