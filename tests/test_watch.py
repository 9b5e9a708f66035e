"""Whether a target is still what it was: the check in C says what the one in Python says, whatever is done to it."""

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from benchmarks.nets import resnet18
from inmerge_fast import MergePlan, native

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="the CPU kernel is not built here")


def net():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.ModuleDict({"a": nn.Conv2d(8, 8, 1), "b": nn.Linear(4, 4)}),
        nn.ConvTranspose2d(8, 6, 3),
        nn.Identity(),
        nn.Conv2d(6, 8, 3, groups=2),
    )


def some_conv(model):
    """One that is merged."""
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    return random.choice([conv for conv in convs if conv.weight is not None and conv.weight.requires_grad])


def replace_child(model):
    model[1]["a"] = nn.Conv2d(8, 8, 1)


def same_memory_by_another_parameter(model):
    conv = some_conv(model)
    conv.weight = nn.Parameter(conv.weight.detach())


def new_memory(model):
    conv = some_conv(model)
    conv.weight.data = conv.weight.detach().clone()


def other_strides(model):
    conv = model[0][0]
    conv.weight.data = conv.weight.detach().clone(memory_format=torch.channels_last)


def the_same_memory_transposed(model):
    conv = model[1]["a"]
    conv.weight.data = conv.weight.detach().transpose(0, 1)


class OtherTensor(torch.Tensor):
    """A kind of tensor that a plan refuses."""


def another_kind_of_tensor(model):
    weight = some_conv(model).weight
    torch.utils.swap_tensors(weight, weight.detach().as_subclass(OtherTensor).requires_grad_())


def take_the_weight(model):
    conv = some_conv(model)
    weight = conv.weight
    del conv.weight
    conv.weight = weight.detach()  # an attribute, no Parameter


def changed(model):
    """Everything that must make a plan anew, by name."""
    return {
        "a child is replaced": replace_child,
        "a child comes": lambda m: m.append(nn.Conv2d(8, 8, 1)),
        "a child comes to a module that had none": lambda m: m[3].add_module("x", nn.ReLU()),
        "a child goes": lambda m: m.pop(3),
        "two children change places": lambda m: m.__setitem__(3, m[2]),
        "another Parameter": same_memory_by_another_parameter,
        "other strides": other_strides,
        "transposed": the_same_memory_transposed,
        "another kind of tensor in the same memory": another_kind_of_tensor,
        "another dtype": lambda m: some_conv(m).double(),
        "a weight goes": take_the_weight,
        "a weight is frozen": lambda m: m[0][0].weight.requires_grad_(False),
        "a frozen weight is trained again": lambda m: m[4].weight.requires_grad_(True),
        "freed": lambda m: m[0][0].weight.untyped_storage().resize_(0),
    }


def unchanged(model):
    """What training does, by name."""

    def step():
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()

    return {
        "nothing": lambda m: None,
        "a step": lambda m: step(),
        "values are loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
        "evaluation": lambda m: m.eval(),
        "other memory": new_memory,
        "another plan": lambda m: MergePlan(m, skip_first=1),
    }


def both(plan):
    """What the check in C and the one in Python say."""
    watch, plan._watch = plan._watch, None
    in_python = plan.current_weights()
    plan._watch = watch
    in_c = plan.current_weights()
    assert (in_c is None) == (in_python is None)
    if in_c is not None:
        assert len(in_c) == len(in_python)
        assert all(one is other for one, other in zip(in_c, in_python, strict=True))
    return in_c


def planned(model):
    model[4].weight.requires_grad_(False)
    plan = MergePlan(model, skip_first=0)
    assert plan._watch is not None
    assert both(plan) is not None
    return plan


@pytest.mark.parametrize("name", changed(None))
def test_a_change_is_seen(name):
    model = net()
    plan = planned(model)
    changed(model)[name](model)
    assert both(plan) is None


@pytest.mark.parametrize(("skip_first", "is_counted"), [(0.4, True), (2, False)])
def test_freezing_a_layer_that_is_left_out_is_seen_where_it_counts(skip_first, is_counted):
    model = net()
    plan = MergePlan(model, skip_first=skip_first)
    assert plan.names == ["2", "4"]
    model[0][0].weight.requires_grad_(False)
    assert (both(plan) is None) is is_counted


def test_a_layer_that_gets_a_weight_is_seen():
    """As when a parametrization is removed: it may be one to merge."""
    model = net()
    weight = model[1]["b"].weight
    del model[1]["b"].weight
    plan = planned(model)
    model[1]["b"].weight = weight
    assert both(plan) is None


@pytest.mark.parametrize("name", unchanged(net()))
def test_what_training_does_is_none(name):
    model = net()
    plan = planned(model)
    unchanged(model)[name](model)
    assert both(plan) is not None


@pytest.mark.parametrize("seed", range(40))
def test_they_agree_whatever_is_done(seed):
    random.seed(seed)
    model = net()
    plan = planned(model)
    for _ in range(3):
        name, do = random.choice([*changed(model).items(), *unchanged(model).items()])
        try:
            do(model)
        except Exception:  # an earlier one took what this one needs
            continue
        both(plan)
        if name == "freed":  # PyTorch itself follows the null pointer
            break


def test_tensors_and_single_layers():
    weights = [torch.randn(4, 5), torch.randn(3, 2, 2)]
    plan = MergePlan(weights)
    assert all(one is other for one, other in zip(both(plan), weights, strict=True))
    weights[1].data = weights[1].clone()
    assert both(plan)[1] is weights[1]
    weights[1].data = weights[1].clone().view(2, 3, 2)
    assert both(plan) is None
    conv = nn.Conv2d(2, 4, 3)
    plan = MergePlan(conv)
    assert both(plan)[0] is conv.weight
    del conv
    gc.collect()
    assert plan._watch.weights() is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_a_model_with_modules_of_torchscript():
    inner = torch.jit.script(nn.Sequential(nn.ReLU(), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), inner, torch.jit.script(nn.ReLU()), nn.Conv2d(4, 4, 3))
    plan = MergePlan(model, skip_first=0)
    assert plan._watch is not None
    assert len(both(plan)) == 2
    model[1] = nn.ReLU()
    assert both(plan) is None


def test_it_keeps_nothing_alive():
    model = resnet18()
    plan = MergePlan(model)
    inner, weight = weakref.ref(model.layer4), weakref.ref(model.layer4[0].conv1)
    plan._watch.weights()
    model.layer4 = nn.Identity()
    assert inner() is None
    assert weight() is None
    assert plan._watch.weights() is None
    root = weakref.ref(model)
    del model
    assert root() is None


def test_no_reference_is_lost_or_left():
    """A thousand checks leave every reference count as it was."""
    import sys

    model = net()
    plan = planned(model)
    conv = model[0][0]
    looked_at = [conv, conv.weight, conv._parameters, model._modules, plan._watch]
    before = [sys.getrefcount(x) for x in looked_at]
    for _ in range(1000):
        plan._watch.weights()
    model[0].append(nn.Conv2d(1, 2, 1))
    for _ in range(1000):
        assert plan._watch.weights() is None
    assert [sys.getrefcount(x) for x in looked_at] == before


def test_what_cannot_be_watched_is_checked_in_python(monkeypatch):
    nine = torch.randn(2, *[1] * 7, 3)
    plan = MergePlan(nine)
    assert plan._watch is None
    assert plan.current_weights()[0] is nine
    monkeypatch.setattr(native, "load", lambda: "it was not built")
    assert MergePlan(net())._watch is None


def test_bad_arguments_are_errors_and_no_crash():
    watch = native.load().Watch
    exchange = torch.Tensor.__dlpack_c_exchange_api__
    conv = nn.Conv2d(2, 4, 3)
    holder = weakref.ref(conv)
    empty, properties = [[]] * 6, (torch.Tensor.is_leaf, torch.Tensor.requires_grad)
    with pytest.raises(TypeError):
        watch(exchange)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        watch(None, properties, *empty, [], b"")
    with pytest.raises(ValueError, match="properties of another kind"):
        watch(exchange, (1, 2), [], [], [], [holder], [], [], [0], b"\2")
    for pick in (1, -1, 7):
        with pytest.raises(ValueError, match="not there"):
            watch(exchange, properties, [], [], [], [holder], [], [], [pick], b"\2")
    with pytest.raises(ValueError, match="not there"):
        watch(exchange, properties, [], [], [], [holder], [], [], [0, 0], b"\2")
    for gradients in (b"", b"\2\2"):
        with pytest.raises(ValueError, match="not one gradient for each weight"):
            watch(exchange, properties, [], [], [], [holder], [], [], [0], gradients)
    with pytest.raises(ValueError, match="without a weight"):
        watch(exchange, properties, [], [], [], [weakref.ref(nn.Conv2d(1, 1, 1))], [], [], [], b"\0")
    made = watch(exchange, properties, [], [], [], [holder], [], [], [0], b"\2")
    with pytest.raises(TypeError, match="initialised once"):
        made.__init__(exchange, properties, [], [], [], [holder], [], [], [0], b"\2")
    assert made.weights()[0] is conv.weight
    with pytest.raises(ValueError, match="without a weight"):
        watch(exchange, properties, [], [], [], [conv], [], [], [0], b"\2")  # no weak reference
