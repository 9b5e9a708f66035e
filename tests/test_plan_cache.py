"""When a cached plan is used, when it is built anew, and that it keeps nothing alive."""

import gc
import threading
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from oracle import assert_is_reference
from torch import nn
from torch.nn.utils import prune

import inmerge_fast
from benchmarks.nets import mixed_net
from inmerge_fast import MergePlan, merge
from inmerge_fast.effect import NO_EFFECT_CALLS
from inmerge_fast.merge import MAX_CACHED_PLANS, _plans
from inmerge_fast.plan import plan as plan_module

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


def test_plans_are_cached_by_target_and_choice(monkeypatch):
    built = []
    original = MergePlan.__init__
    monkeypatch.setattr(MergePlan, "__init__", lambda self, *a, **k: (built.append(1), original(self, *a, **k))[1])
    model, convs = mixed_net(), [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)]
    for _ in range(3):
        inmerge_fast.merge_(model)
        inmerge_fast.merge_(model, skip_first=0)
        inmerge_fast.merge_(model[0])
        inmerge_fast.merge_(iter(convs))
        inmerge_fast.merge_(convs[0].weight)
    assert len(built) == 5


def test_a_cached_plan_does_not_keep_its_target_alive():
    model, conv, weight = mixed_net(), nn.Conv2d(2, 2, 1), torch.randn(4, 4)
    pair = [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)]
    gc.collect()
    entries = len(_plans)
    for target in (model, conv, weight, pair):
        inmerge_fast.merge_(target)
    assert len(_plans) == entries + 4
    parts = [weakref.ref(part) for part in (model, model[0], model[0].weight, conv, conv.weight, pair[0].weight)]
    del model, conv, weight, pair, target
    gc.collect()
    assert len(_plans) == entries
    assert not any(part() is not None for part in parts)


def _replace_conv(model):
    model[0] = nn.Conv2d(3, 4, 3)


def _replace_nested(model):
    model[1][0] = nn.Conv2d(4, 4, 3)


def _replace_container(model):
    model[1] = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4))


def _add_conv(model):
    model[1].append(nn.Conv2d(4, 4, 3))


def _add_conv_to_a_leaf(model):
    model[1][1].extra = nn.Conv2d(4, 4, 3)


def _remove_conv(model):
    del model[1][0]


def _replace_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(4, 3, 3, 3))


def _assign_data(model):
    model[0].weight.data = torch.randn(4, 3, 3, 3)


def _load_by_assignment(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def _to_half(model):
    model.half()


def _to_channels_last(model):
    model.to(memory_format=torch.channels_last)


def _reshape_in_place(model):
    model[0].weight.data = model[0].weight.data.view(4, 9, 3, 1)


CHANGES = [
    _replace_conv, _replace_nested, _replace_container, _add_conv, _add_conv_to_a_leaf, _remove_conv,
    _replace_parameter, _load_by_assignment, _to_half, _to_channels_last, _reshape_in_place,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_target_is_noticed(device, change):
    model = mixed_net().to(device)
    inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    plan = MergePlan(model, skip_first=0)
    change(model)
    model.to(device)
    assert not plan.is_current()
    with pytest.raises(ValueError, match="the plan is out of date.*build a new MergePlan"):
        inmerge_fast.merge_(plan, **MERGE_ALL)
    fresh = MergePlan(model, skip_first=0)
    before = [weight.detach().clone() for weight in fresh.weights()]
    stats = inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    assert [layer.name for layer in stats.layers] == [layer.name for layer in fresh.layers]
    for layer, old, new in zip(fresh.layers, before, fresh.weights(), strict=True):
        transposed = old.shape[0] != layer.layout.filters
        groups = layer.layout.filters // layer.layout.group_size
        assert_is_reference(
            old, new, layer=layer.layer_id, alpha=0.8, groups=groups, transposed=transposed, **MERGE_ALL
        )


def test_conversions_that_swap_tensors_are_not_kept_from_it(device):
    """``torch.utils.swap_tensors`` refuses tensors that somebody refers to weakly."""
    model = mixed_net().to(device)
    inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    plan = MergePlan(model, skip_first=0)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half()
        assert not plan.is_current()
        inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    stats = inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    assert stats.merged == sum(layer.filters for layer in stats.layers)


def test_training_does_not_outdate_a_plan():
    model = mixed_net()
    plan, whatever = MergePlan(model), MergePlan(model, include_frozen=True)
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    model.eval()
    model.load_state_dict(mixed_net().state_dict())
    assert plan.is_current()
    model.requires_grad_(False)
    assert whatever.is_current()


@pytest.mark.parametrize(
    "change",
    [lambda data: data.view(torch.float16), lambda data: data[:2], lambda data: data.t()],
    ids=["dtype", "shape", "stride"],
)
@pytest.mark.parametrize("with_guards", [True, False])
def test_the_same_memory_read_in_another_way_is_noticed(change, with_guards, monkeypatch):
    if not with_guards:  # a PyTorch that has no such class
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    weight = torch.randn(4, 4).bfloat16()
    plan, pointer = MergePlan(weight), weight.data_ptr()
    assert plan._storage._guards(weight) == with_guards
    assert plan.is_current()
    weight.data = change(weight.data)
    assert weight.data_ptr() == pointer
    assert not plan.is_current()


def test_one_inference_weight_among_others_outdates_the_plan_outside_inference_mode():
    normal = torch.randn(4, 9)
    with torch.inference_mode():
        weights = [normal, torch.randn(4, 9)]
        assert inmerge_fast.merge_(weights, **MERGE_ALL).merged == 8
    before = normal.clone()
    with pytest.raises(ValueError, match="1: Tensor: the weight was created in inference mode"):
        inmerge_fast.merge_(weights, **MERGE_ALL)
    assert torch.equal(normal, before)


def test_a_target_and_a_list_of_it_have_plans_of_their_own():
    conv, model = nn.Conv2d(2, 2, 1), mixed_net()
    for _ in range(2):
        assert inmerge_fast.merge_(conv, **MERGE_ALL).layers[0].name == "Conv2d"
        assert inmerge_fast.merge_([conv], **MERGE_ALL).layers[0].name == "0: Conv2d"
        inmerge_fast.merge_(model, **MERGE_ALL)
        with pytest.raises(TypeError, match="pass models one by one"):
            inmerge_fast.merge_([model], **MERGE_ALL)


def _untie(model):
    model[1][0].weight = nn.Parameter(torch.randn(4, 4, 3, 3))


def _tie_later(model):
    model[5].weight = model[1][0].weight


def _grow_a_layer_with_nothing_to_pair(model):
    model[2].groups = 1
    model[2].weight = nn.Parameter(torch.randn(4, 4, 3, 3))


@pytest.mark.parametrize("change", [_untie, _tie_later, _grow_a_layer_with_nothing_to_pair])
def test_changes_of_layers_that_are_not_merged_are_noticed(change):
    model = mixed_net()
    model.append(nn.Conv2d(4, 4, 3))
    if change is _untie:
        model[5].weight = model[1][0].weight
    inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    change(model)
    fresh = MergePlan(model, skip_first=0)
    stats = inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    assert [layer.name for layer in stats.layers] == [layer.name for layer in fresh.layers]
    assert stats.skipped == fresh.skipped


@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_tensor_that_becomes_computed_is_noticed(grad_mode):
    weight, scale = torch.randn(4, 9), torch.ones(4, 1, requires_grad=True)
    with torch.set_grad_enabled(grad_mode):
        inmerge_fast.merge_(weight, **MERGE_ALL)
    weight.mul_(scale)
    with torch.set_grad_enabled(grad_mode), pytest.raises(ValueError, match="it has a grad_fn"):
        inmerge_fast.merge_(weight, **MERGE_ALL)


def test_a_model_that_its_own_hooks_refer_to_is_freed():
    model = mixed_net()
    model[1].register_forward_hook(lambda *_, model=model: None)
    inmerge_fast.merge_(model)
    root = weakref.ref(model)
    del model
    gc.collect()
    assert root() is None


def test_the_number_of_cached_plans_is_limited():
    convs = [nn.Conv2d(2, 2, 1) for _ in range(2 * MAX_CACHED_PLANS)]
    for conv in convs:
        inmerge_fast.merge_(conv)
    assert len(_plans) == MAX_CACHED_PLANS


def test_a_plan_that_another_thread_puts_out_meanwhile_is_used(monkeypatch):
    monkeypatch.setattr(merge, "MAX_CACHED_PLANS", 2)
    monkeypatch.setattr(merge, "_plans", OrderedDict())
    weight, *others = torch.randn(4, 4, 9)
    inmerge_fast.merge_(weight)
    original = MergePlan.current_weights

    def put_out(plan):
        monkeypatch.setattr(MergePlan, "current_weights", original)
        thread = threading.Thread(target=lambda: [inmerge_fast.merge_(other) for other in others])
        thread.start()
        thread.join()
        return original(plan)

    monkeypatch.setattr(MergePlan, "current_weights", put_out)
    assert inmerge_fast.merge_(weight, **MERGE_ALL).merged == 4


@pytest.mark.parametrize("change", [_replace_parameter, _assign_data, _to_half])
@pytest.mark.parametrize("moment", [plan_module.Structure, plan_module.Storage])
def test_a_change_by_another_thread_while_a_plan_is_built_is_an_error(moment, change, monkeypatch):
    """Otherwise the plan would watch the new memory, and take it for what it found in the old one."""
    model = mixed_net()
    original = moment.__init__

    def change_first(self, *arguments):
        monkeypatch.undo()
        thread = threading.Thread(target=change, args=(model,))
        thread.start()
        thread.join()
        original(self, *arguments)

    monkeypatch.setattr(moment, "__init__", change_first)
    with pytest.raises(ValueError, match="changed by another thread"):
        inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    stats = inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    assert stats.merged == sum(layer.filters for layer in stats.layers)


@pytest.mark.parametrize("own_hash", [nn.Module.__hash__, lambda self: 1], ids=["of the identity", "of a value"])
def test_children_are_compared_by_identity(own_hash):
    class Equal(nn.Sequential):
        def __eq__(self, other):
            return isinstance(other, Equal)

        __hash__ = own_hash

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Equal())
    inmerge_fast.merge_(model, **MERGE_ALL)
    kept_alive = model[1]
    model[1] = Equal(nn.Conv2d(4, 4, 3))
    before = model[1][0].weight.detach().clone()
    inmerge_fast.merge_(model, **MERGE_ALL)
    assert not torch.equal(model[1][0].weight, before)
    assert len(kept_alive) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"skip_first": 1}, {"skip_first": 2}),
        ({"skip_first": 0.4}, {"skip_first": 0.7}),
        ({"exclude": "0", "skip_first": 0}, {"exclude": "1", "skip_first": 0}),
        ({"include_linear": True}, {"include_linear": False}),
    ],
)
def test_every_choice_of_layers_has_a_cached_plan_of_its_own(one, other):
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(3)), nn.Linear(2, 2))
    for choice in (one, other, one):
        merged = [layer.name for layer in inmerge_fast.merge_(model, dry_run=True, **choice).layers]
        assert merged == [layer.name for layer in MergePlan(model, **choice).layers]


def test_every_layer_id_has_a_cached_plan_of_its_own():
    weight = torch.randn(16, 9)
    for layer in (3, 4, 3):
        before = weight.clone()
        inmerge_fast.merge_(weight, layer=layer, **MERGE_ALL)
        assert_is_reference(before, weight, layer=layer, alpha=0.8, **MERGE_ALL)


def test_untying_a_layer_of_a_list_is_noticed():
    convs = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    convs[1].weight = convs[0].weight
    assert len(inmerge_fast.merge_(convs, **MERGE_ALL).layers) == 1
    convs[1].weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    assert len(inmerge_fast.merge_(convs, **MERGE_ALL).layers) == 2


def test_a_weight_that_comes_back_or_goes_is_noticed():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    prune.identity(model[1], "weight")
    plan = MergePlan(model, skip_first=0, exclude="1")
    assert plan.is_current()
    prune.remove(model[1], "weight")
    assert not plan.is_current()
    plan = MergePlan(model, skip_first=0)
    del model[2].weight
    assert not plan.is_current()


def test_another_module_where_a_dead_one_was_is_noticed():
    """Ids come back when an object dies, and CPython gives its memory to the next object of the same size."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Identity())
    plan, old = MergePlan(model, skip_first=0), id(model[1])
    model[1] = None
    others = [nn.Identity()]
    while id(others[-1]) != old and len(others) < 1000:
        others.append(nn.Identity())
    others[-1].extra = nn.Conv2d(4, 4, 3)
    model[1] = others[-1]
    assert not plan.is_current(), f"id came back: {id(model[1]) == old}"


def test_a_loop_over_the_layers_of_a_deep_net_plans_each_once_and_is_warned(monkeypatch):
    """ResNet-101 has 104 convolutions. A plan that is built anew at every call also never counts to 100."""
    built = []
    original = MergePlan.__init__
    monkeypatch.setattr(MergePlan, "__init__", lambda self, *a, **k: (built.append(1), original(self, *a, **k))[1])
    weights = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]) for _ in range(104)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(NO_EFFECT_CALLS):
            for index, weight in enumerate(weights):
                inmerge_fast.merge_(weight, prob=1.0, seed=0, step=step, layer=index)
    assert len(built) == 104
    assert [warning.category for warning in caught] == [inmerge_fast.NoEffectWarning] * 104
