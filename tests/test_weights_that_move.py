"""``weight.data = other``: a weight at another address costs a look and no new plan, and is merged there on all paths.

Sharpness-aware optimizers put every weight back into other memory at every step.
"""

import pytest
import torch
from oracle import assert_is_reference, assert_same_bits, untouched
from test_training import batches, loss_of, net
from test_training_attach import Sharpness, two_calls
from torch import nn

import inmerge_fast
from benchmarks.nets import mixed_net
from inmerge_fast import InMerge, MergePlan, native
from inmerge_fast.plan import plan as plan_module

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


def clone(model):
    for p in model.parameters():
        p.data = p.data.clone()


def swap_two(model):
    a, b = model[0], model[2]
    a.weight.data, b.weight.data = b.weight.data, a.weight.data


def into_one_buffer(model):
    """Some of them at addresses that no vector is aligned to."""
    weights = [m.weight for m in model.modules() if hasattr(m, "weight")]
    buffer = torch.zeros(sum(w.numel() + 1 for w in weights), device=weights[0].device)
    at = 0
    for weight in weights:
        there = buffer[at : at + weight.numel()].view(weight.shape)
        there.copy_(weight.data)
        weight.data = there
        at += weight.numel() + 1


def along_its_own_storage(model):
    weight = model[0].weight
    buffer = torch.zeros(3 * weight.numel(), device=weight.device)
    weight.data = buffer[weight.numel() :][: weight.numel()].view(weight.shape).copy_(weight.data)
    inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    first = weight.data.clone()
    weight.data = buffer[2 * weight.numel() :].view(weight.shape).copy_(first)


MOVES = [clone, swap_two, into_one_buffer, along_its_own_storage]


def same_shapes():
    convs = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)
    return nn.Sequential(*convs, nn.BatchNorm2d(6))  # what nothing reads is taken for a head


@pytest.fixture(autouse=True, params=["in C", "in Python"])
def _checked(request, monkeypatch):
    """The two ways of seeing whether a target is what it was; the CPU's kernel goes on to be what it is."""
    if request.param == "in Python":
        monkeypatch.setattr(plan_module.Structure, "compiled", lambda *_: None)
    elif isinstance(native.load(), str):
        pytest.skip("the CPU kernel is not built here")


def assert_merges_as_defined(model, plan):
    before = [weight.detach().clone() for weight in plan.weights()]
    inmerge_fast.merge_(plan, **MERGE_ALL)
    for layer, old, new in zip(plan.layers, before, plan.weights(), strict=True):
        assert_is_reference(
            old, new, layer=layer.layer_id, alpha=0.8, groups=layer.layout.filters // layer.layout.group_size,
            transposed=isinstance(model[int(layer.name)], nn.ConvTranspose2d), **MERGE_ALL,
        )  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_a_weight_that_moves_is_merged_where_it_lies(device, move):
    model = same_shapes().to(device)
    plan = MergePlan(model, skip_first=0)
    for _ in range(3):
        inmerge_fast.merge_(plan, **MERGE_ALL)
        old = model[0].weight.data
        moves = plan.rows.moves
        move(model)
        check = untouched(nn.ParameterList([nn.Parameter(old.clone())]))
        assert plan.is_current()
        assert plan.rows.moves > moves
        assert_merges_as_defined(model, plan)
        check()
        assert plan.rows.moves <= moves + 2
    moves = plan.rows.moves
    assert plan.is_current()
    assert plan.rows.moves == moves, "nothing has moved"


def test_a_weight_may_move_inside_its_storage(device):
    model = same_shapes().to(device)
    weight = model[0].weight
    buffer = torch.zeros(2, weight.numel(), device=device)
    weight.data = buffer[0].view(weight.shape).copy_(weight.data)
    plan = MergePlan(model, skip_first=0)
    inmerge_fast.merge_(plan, **MERGE_ALL)
    kept = weight.detach().clone()
    weight.data = buffer[1].view(weight.shape).copy_(kept)
    assert_merges_as_defined(model, plan)
    assert torch.equal(buffer[0].view_as(kept), kept)


def test_nothing_is_written_to_where_a_weight_was(device):
    model = same_shapes().to(device)
    plan = MergePlan(model, skip_first=0)
    inmerge_fast.merge_(plan, **MERGE_ALL)
    old = [p.data for p in model.parameters()]
    kept = [data.clone() for data in old]
    clone(model)
    inmerge_fast.merge_(plan, **MERGE_ALL)
    for data, copy in zip(old, kept, strict=True):
        assert torch.equal(data, copy)


def test_counts_go_on(device):
    model = same_shapes().to(device)
    plan = MergePlan(model, skip_first=0)
    for step in range(6):
        inmerge_fast.merge_(plan, prob=1.0, threshold=-1.0, seed=1, step=step)
        (clone if step % 2 else into_one_buffer)(model)
    assert plan.totals().tolist() == [[24, 24], [24, 24], [36, 36]]


def test_statistics_of_the_calls_before_a_move_can_be_read(device):
    model = same_shapes().to(device)
    plan = MergePlan(model, skip_first=0)
    stats = inmerge_fast.merge_(plan, prob=0.7, threshold=-1.0, seed=1, step=0)
    into_one_buffer(model)
    later = inmerge_fast.merge_(plan, prob=0.7, threshold=-1.0, seed=1, step=0)
    assert [s.sampled for s in stats.layers] == [s.sampled for s in later.layers]


def test_what_a_plan_has_refused_it_takes_again_when_it_is_right():
    model = mixed_net()
    plan = MergePlan(model, skip_first=0)
    inmerge_fast.merge_(plan, **MERGE_ALL)
    weight, other = model[1][0].weight, model[0].weight
    before = weight.data
    weight.data = torch.zeros(200)[: weight.numel()].view(weight.shape)
    shared = weight.data.view(-1)
    other.data = shared[: other.numel()].view(other.shape)
    for _ in range(2):
        assert not plan.is_current()
        with pytest.raises(ValueError, match="out of date"):
            inmerge_fast.merge_(plan, **MERGE_ALL)
        with pytest.raises(ValueError, match="shares memory with"):
            inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    weight.data = before
    other.data = other.data.clone()
    assert inmerge_fast.merge_(plan, **MERGE_ALL).merged == 14


def test_sharpness_aware_training_plans_once(monkeypatch):
    """And has the bits of one that plans at every step."""
    torch.manual_seed(0)
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    settings = {"prob": 0.5, "threshold": -0.5, "skip_first": 0, "guard": None}
    optimizer, other = (Sharpness(m.parameters(), lr=0.05) for m in (model, twin))
    merger = InMerge(model, **settings).attach(optimizer)
    plan, plans = merger.plan, 0
    for step, x in enumerate(batches(8)):
        two_calls(model, optimizer, x)
        two_calls(twin, other, x)
        fresh = InMerge(twin, **settings)
        fresh.step_count = step
        fresh.step()
        plans += 1
    assert merger.plan is plan
    assert plan.rows.moves == plans
    for key, value in twin.state_dict().items():
        assert_same_bits(model.state_dict()[key], value, key)
    assert loss_of(model, x).isfinite()


@pytest.mark.interpreted
def test_a_graph_that_was_captured_before_a_weight_moved_must_be_captured_again(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    model = net()
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=0)
    merger.prepare()
    merger._graph.capture()
    merger.prepare()
    clone(model)
    with pytest.raises(ValueError, match="after the capture; capture the graph again"):
        merger.prepare()


@pytest.mark.interpreted
def test_tables_are_kept_where_the_kernels_still_fit(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    model = same_shapes()
    plan = MergePlan(model, skip_first=0)
    launcher = plan.paths.triton.launcher(plan.current_weights())
    clone(model)
    assert plan.paths.triton.launcher(plan.current_weights()) is launcher
    into_one_buffer(model)  # dense layers have to be read as strided ones
    other = plan.paths.triton.launcher(plan.current_weights())
    assert other is not launcher
    assert other._kinds != launcher._kinds
