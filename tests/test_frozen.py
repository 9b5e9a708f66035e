"""Layers whose weights require no gradient: left alone by ``merge_`` and ``InMerge`` alike, until they are trained."""

import warnings

import pytest
import torch
from oracle import untouched
from test_training import batches, net, optimizer_of, train
from torch import nn

from inmerge_fast import (
    InMerge,
    MergePlan,
    NoEffectWarning,
    NoiseThreshold,
    QuantileThreshold,
    RankBudget,
    merge_,
    similarity,
)

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}
SETTINGS = {"prob": 1.0, "threshold": -1.0, "skip_first": 0, "guard": None}


def convs(count):
    return nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(count)))


def with_teacher(order=("student", "teacher")):
    model = nn.ModuleDict()
    for name in order:
        model[name] = convs(10) if name == "student" else convs(13).requires_grad_(False)
    return model


def test_merge_leaves_a_frozen_teacher_alone():
    model = with_teacher()
    check = untouched(model["teacher"])
    assert merge_(model, **MERGE_ALL).merged == 4 * 4
    check()
    stats = merge_(model, include_frozen=True, skip_first=0, **MERGE_ALL)
    assert stats.merged == 4 * 23
    with pytest.raises(AssertionError):
        check()


def test_the_same_layers_are_left_out_by_merge_and_inmerge_and_in_a_plan():
    model = with_teacher()
    for choice in ({}, {"include_frozen": True}, {"skip_first": 3}, {"skip_first": 0.2, "exclude": "student.9"}):
        names = InMerge(model, **choice).plan.names
        assert [layer.name for layer in merge_(model, **MERGE_ALL, **choice).layers] == names
        plan = MergePlan(model, **choice)
        assert plan.names == names
        assert merge_(plan, **MERGE_ALL).merged == 4 * len(names)
    assert ("teacher.0", "frozen (requires_grad is False)") in MergePlan(model).skipped
    with pytest.raises(ValueError, match="include_frozen, include_heads and layer are set where a MergePlan is built"):
        merge_(plan, include_frozen=True, **MERGE_ALL)
    with pytest.raises(TypeError, match="include_frozen must be a bool, got 1"):
        merge_(model, include_frozen=1, **MERGE_ALL)


def test_a_look_shows_all():
    assert len(similarity(with_teacher()).layers) == 23
    assert len(similarity(with_teacher().requires_grad_(False)).layers) == 23


def test_where_all_are_frozen_merge_says_so_and_what_to_do():
    model = convs(3).requires_grad_(False)
    check = untouched(model)
    for call in (lambda: merge_(model, **MERGE_ALL), lambda: MergePlan(model, skip_first=0)):
        with pytest.raises(ValueError, match=r"frozen \(requires_grad is False\).*; include_frozen=True merges frozen"):
            call()
    check()
    assert merge_(model, include_frozen=True, skip_first=0, **MERGE_ALL).merged == 12


def test_what_is_given_itself_is_meant():
    """Single layers, lists and tensors; a tensor has no notion of being frozen."""
    layer = nn.Conv2d(4, 4, 3).requires_grad_(False)
    for target in (layer, [layer], layer.weight, torch.randn(4, 9), [torch.randn(4, 9)]):
        assert merge_(target, **MERGE_ALL).merged == 4


def test_freezing_is_noticed_by_a_cached_plan():
    model = convs(5)
    assert [layer.name for layer in merge_(model, skip_first=1, **MERGE_ALL).layers] == ["1", "2", "3", "4"]
    plan = MergePlan(model, skip_first=1)
    model[3].weight.requires_grad_(False)
    assert [layer.name for layer in merge_(model, skip_first=1, **MERGE_ALL).layers] == ["1", "2", "4"]
    with pytest.raises(ValueError, match=r"out of date.*\(un\)frozen"):
        merge_(plan, **MERGE_ALL)
    model[3].weight.requires_grad_(True)
    assert len(merge_(model, skip_first=1, **MERGE_ALL).layers) == 4
    assert merge_(plan, **MERGE_ALL).merged == 16
    model[0].weight.requires_grad_(False)  # is left out anyway
    assert merge_(plan, **MERGE_ALL).merged == 16


@pytest.mark.parametrize("order", [("student",), ("student", "teacher"), ("teacher", "student")])
def test_a_share_counts_the_layers_that_can_take_part(order):
    wanted = [f"student.{index}" for index in range(6, 10)]
    assert MergePlan(with_teacher(order)).names == wanted
    assert InMerge(with_teacher(order)).plan.names == wanted
    assert len(MergePlan(with_teacher(order), include_frozen=True).names) == round(0.4 * 23 if order[1:] else 4)


def test_a_share_is_counted_anew_where_any_layer_is_frozen():
    """Also one that the share has left out: a fresh plan would leave out others."""
    model = convs(10)
    merger = InMerge(model, **SETTINGS | {"skip_first": 0.5})
    plan = MergePlan(model, skip_first=0.5)
    for index in (0, 1, 2):
        model[index].requires_grad_(False)
        expected = MergePlan(model, skip_first=0.5)
        assert [layer.name for layer in merger.step().layers] == expected.names
        assert [layer.layer_id for layer in merger.plan.layers] == list(map(int, expected.names))
        assert not plan.is_current()
    assert expected.names == ["7", "8", "9"]
    assert ("3", "among the first 4 (skip_first=0.5)") in expected.skipped
    assert ("0", "frozen (requires_grad is False)") in expected.skipped


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": -1.0, "guard": None},
        {"threshold": NoiseThreshold(0.0), "guard": None},
        {"threshold": QuantileThreshold(0.5)},
        {"threshold": RankBudget(0.5), "stop": 100},
        {"threshold": {"0": -1.0, "3": -1.0, "5": -1.0}},
        {"loggers": [lambda row: None], "observe_every": 1, "threshold": -1.0, "guard": None},
    ],
    ids=["number", "noise", "quantile", "budget", "by layer", "observed"],
)
def test_inmerge_waits_while_all_are_frozen(settings):
    """At the beginning, as under Lightning's BackboneFinetuning, and in mid-run; steps are counted all the while."""
    model = net()
    model[:6].requires_grad_(False)
    optimizer = torch.optim.SGD(model[8].parameters(), lr=0.01)
    merger = InMerge(model, prob=1.0, skip_first=0, **settings).attach(optimizer)
    assert merger.plan.names == []
    assert merger.plan.frozen == ("0", "3", "5")
    assert "merges 0 layers" in str(merger.plan)
    model[1].eval()
    check = untouched(model[:6])
    train(model, optimizer, batches(3))
    check()
    assert merger.step_count == 3
    assert merger.summary().merged == merger.preview().merges == 0
    assert "0 merges" in str(merger.summary())
    assert "0 merges expected" in str(merger.preview())
    assert merger.effective_rank() == {}
    state = merger.state_dict()
    model.requires_grad_(True)
    optimizer.add_param_group({"params": model[:6].parameters()})
    train(model, optimizer, batches(3))
    assert merger.plan.names == ["0", "3", "5"]
    merged = merger.summary().merged
    assert merged > 0
    model[:6].requires_grad_(False)
    train(model, optimizer, batches(3))
    assert merger.step_count == 9
    assert merger.summary().merged == merged
    merger.load_state_dict(state)
    assert merger.step_count == 3


def test_a_run_resumes_whatever_is_frozen_meanwhile():
    model = net()
    merger = InMerge(model, **SETTINGS | {"skip_first": 0.3})
    merger.step()
    state = merger.state_dict()
    assert state["layers"] == ["3", "5"]
    for frozen in (model[3], model[:6], model[5]):
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        other = InMerge(model, **SETTINGS | {"skip_first": 0.3})
        other.load_state_dict(state)
        model.requires_grad_(True)
        assert [layer.name for layer in other.step().layers] == ["3", "5"]
        assert other.summary().merged == 20 * 2
    model[3].requires_grad_(False)
    for choice in ({"skip_first": 1}, {"include_linear": True}):
        with pytest.raises(ValueError, match="state was saved for other layers"):
            InMerge(model, **SETTINGS | {"skip_first": 0.3} | choice).load_state_dict(state)


def test_waiting_for_long_is_pointed_out_once():
    model = convs(2).requires_grad_(False)
    merger = InMerge(model, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            merger.step()
    with pytest.warns(NoEffectWarning, match=r"in 100 steps, because all 2 layers are frozen.*include_frozen=True"):
        merger.step()
    model.requires_grad_(True)
    merger.step()
    model.requires_grad_(False)
    for _ in range(200):
        merger.step()


def test_what_is_trained_at_last_must_be_in_the_optimizer():
    model = net()
    model[:6].requires_grad_(False)
    optimizer = torch.optim.SGD(model[8].parameters(), lr=0.01)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    optimizer.step()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="the optimizer holds none of the weights that are merged"):
        optimizer.step()
    assert merger.attached


def test_two_that_wait_for_the_same_weights_are_one_too_many():
    model = convs(2).requires_grad_(False)
    optimizer = optimizer_of("sgd", nn.Linear(2, 2))
    older = InMerge(model, **SETTINGS).attach(optimizer)
    with pytest.warns(UserWarning, match="has been detached"):
        InMerge(model, **SETTINGS).attach(optimizer)
    assert not older.attached


def test_a_graph_cannot_be_prepared_of_nothing():
    with pytest.raises(RuntimeError, match="all layers are frozen"):
        InMerge(convs(2).requires_grad_(False)).prepare()
