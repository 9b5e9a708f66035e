"""What is done in place to a weight that a cached plan knows: it is merged or refused as a fresh plan would do."""

import pytest
import torch
from oracle import untouched
from torch import nn
from torch.autograd import forward_ad

import inmerge_fast
from inmerge_fast import MergePlan, native

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


@pytest.fixture(autouse=True, params=["in C", "in Python"])
def _checked(request, monkeypatch):
    """The two ways of seeing whether a target is what it was."""
    if request.param == "in Python":
        monkeypatch.setattr(native, "load", lambda: "it was not built")
    elif isinstance(native.load(), str):
        pytest.skip("the CPU kernel is not built here")


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))


def _scale(weight, others):
    weight.requires_grad_(False)
    weight.mul_(torch.ones(1, requires_grad=True))


def _write_one_filter(weight, others):
    weight.requires_grad_(False)
    weight[1] = torch.ones(1, requires_grad=True)


def _write_through_a_view(weight, others):
    weight.requires_grad_(False)
    weight.view(-1).add_(torch.ones(1, requires_grad=True))


def _give_a_tangent(weight, others):
    with torch.no_grad():
        weight.copy_(forward_ad.make_dual(torch.ones_like(weight), torch.ones_like(weight)))


def _free_the_storage(weight, others):
    weight.untyped_storage().resize_(0)


def _shrink_the_storage(weight, others):
    weight.data = torch.zeros(1000)[: weight.numel()].view(weight.shape)
    weight.untyped_storage().resize_(8)


def _expand(weight, others):
    weight.data = torch.zeros(1, *weight.shape[1:]).expand(weight.shape)


def _overlap(weight, others):
    weight.data = others[0].data.view(-1)[: weight.numel()].view(weight.shape)


def _overlap_in_part(weight, others):
    both = torch.zeros(weight.numel() + others[0].numel() - 4)
    others[0].data = both[: others[0].numel()].view(others[0].shape)
    weight.data = both[-weight.numel() :].view(weight.shape)


def _negate_lazily(weight, others):
    weight.data = torch._neg_view(weight.data.clone())


def _change_its_class(weight, others):
    weight.__class__ = type("Fancy", (nn.Parameter,), {})


def _put_inference_memory(weight, others):
    with torch.inference_mode():
        weight.data = torch.zeros(weight.shape)


REFUSED = [
    _scale, _write_one_filter, _write_through_a_view, _give_a_tangent, _free_the_storage, _shrink_the_storage, _expand,
    _overlap, _overlap_in_part, _negate_lazily, _change_its_class, _put_inference_memory,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # by make_dual
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_a_fresh_plan_refuses_a_cached_one_does_too(change, grad_mode):
    model = net()
    inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    with forward_ad.dual_level():
        change(model[2].weight, [model[1].weight])
        with pytest.raises((ValueError, TypeError)) as fresh:
            MergePlan(model, skip_first=0)
        check = untouched(model[:2])
        with torch.set_grad_enabled(grad_mode), pytest.raises(type(fresh.value)) as cached:
            inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
        check()
    assert str(cached.value) == str(fresh.value)


def test_what_a_fresh_plan_leaves_out_a_cached_one_does_too():
    model = net()
    inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL)
    model[2].weight.data = model[2].weight.data.to(torch.complex64)
    names = MergePlan(model, skip_first=0).names
    assert names
    assert "2" not in names
    before = model[2].weight.detach().clone()
    assert [layer.name for layer in inmerge_fast.merge_(model, skip_first=0, **MERGE_ALL).layers] == names
    assert torch.equal(model[2].weight, before)
