"""What an in-place write behind autograd's back can break, one test a hazard: noticed, avoided or raised."""

import copy
import warnings

import numpy as np
import pytest
import torch
from oracle import assert_is_reference, assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import inmerge_fast
from inmerge_fast import draw
from inmerge_fast.paths.eager import merge_layer_
from inmerge_fast.plan.filters import FilterLayout, filter_layout

MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


def small_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-1.0, 1.0], ids=["all merge", "none merges"])
def test_backward_raises_if_a_merge_came_after_the_forward(device, threshold):
    conv = nn.Conv2d(3, 6, 3).to(device)
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    loss = conv(x).square().sum()
    inmerge_fast.merge_(conv, **(MERGE_ALL | {"threshold": threshold}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_dry_run_between_forward_and_backward_is_harmless(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    loss = conv(x).square().sum()
    before = conv.weight.detach().clone()
    stats = inmerge_fast.merge_(conv, dry_run=True, **MERGE_ALL)
    assert (stats.passed, stats.merged) == (6, 0)
    assert_same_bits(conv.weight, before)
    loss.backward()


def test_gradients_after_a_merge_are_those_of_the_merged_weights(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    inmerge_fast.merge_(conv, **MERGE_ALL)
    fresh = copy.deepcopy(conv)
    x = torch.randn(2, 3, 8, 8, device=device)
    for module in (conv, fresh):
        module(x).square().sum().backward()
    assert torch.equal(conv.weight.grad, fresh.weight.grad)
    assert conv.weight.is_leaf
    assert conv.weight.requires_grad


def test_merging_keeps_the_parameter_its_memory_and_the_optimizer_state(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    conv(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
    optimizer.step()
    parameter, pointer = conv.weight, conv.weight.data_ptr()
    momentum = optimizer.state[conv.weight]["momentum_buffer"].clone()
    gradient = conv.weight.grad.clone()
    alias = conv.state_dict()["weight"]
    inmerge_fast.merge_(conv, **MERGE_ALL)
    assert conv.weight is parameter
    assert conv.weight.data_ptr() == pointer
    assert torch.equal(optimizer.state[conv.weight]["momentum_buffer"], momentum)
    assert torch.equal(conv.weight.grad, gradient)
    assert torch.equal(alias, conv.weight), "an uncloned state_dict is a view of the live weight, as always in PyTorch"


def test_activation_checkpointing_before_the_forward_is_exact(device):
    """Between forward and backward it could not be detected: recomputation uses the merged weight (documented)."""
    model = small_net().to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    model(x)
    twin = copy.deepcopy(model)
    for module in (model, twin):
        inmerge_fast.merge_(module, skip_first=0, **MERGE_ALL)
    model(x).sum().backward()
    checkpoint(twin, x, use_reentrant=False).sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not twin[0]._forward_pre_hooks, "a hook would fire again when the forward is recomputed"


# --- autocast ---------------------------------------------------------------------------------------------------------


def test_under_autocast_the_next_forward_sees_the_merge(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        conv(x)  # caches a bfloat16 copy of the weight until the region ends
        inmerge_fast.merge_(conv, **MERGE_ALL)
        inside = conv(x)
    with torch.autocast(device.type, torch.bfloat16):
        fresh = conv(x)
    assert torch.equal(inside, fresh)


def test_under_autocast_the_gradient_is_that_of_the_forward_that_ran(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    twin = copy.deepcopy(conv)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = conv(x).float().square().sum()
        inmerge_fast.merge_(conv, **MERGE_ALL)
        twin(x).float().square().sum().backward()
    loss.backward()
    assert torch.equal(conv.weight.grad, twin.weight.grad)


def test_under_autocast_similarities_are_computed_in_float32(device):
    weight = torch.randn(64, 300).to(device)
    outside = inmerge_fast.merge_(weight, dry_run=True, **MERGE_ALL)
    with torch.autocast(device.type, torch.bfloat16):
        inside = inmerge_fast.merge_(weight, dry_run=True, **MERGE_ALL)
    assert inside.layers == outside.layers


def test_autocast_is_off_while_similarities_are_computed(monkeypatch):
    """The sums that take part today stay in float32 anyway; matrix products and ``vecdot`` would not."""
    seen = []
    gather = FilterLayout.gather
    monkeypatch.setattr(FilterLayout, "gather", lambda *a: seen.append(torch.is_autocast_enabled("cpu")) or gather(*a))
    weight = torch.randn(4, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inmerge_fast.merge_(weight, **MERGE_ALL)
        merge_layer_(weight, filter_layout(weight, ""), np.arange(4), np.roll(np.arange(4), 1), alpha=0.8,
                     threshold=-1.0, dry_run=False)  # fmt: skip
    assert seen
    assert not any(seen)


# --- weights that are shared, or computed elsewhere -------------------------------------------------------------------


def test_tied_weights_are_merged_once(device):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(device)
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    for target in (model, list(model), [model[0].weight, model[1].weight]):
        with torch.no_grad():
            model[0].weight.copy_(before)
        stats = inmerge_fast.merge_(target, **MERGE_ALL)
        assert stats.sampled == 4
        assert "and goes with it" in str(stats)
        assert_is_reference(before, model[0].weight, layer=0, alpha=0.8, **MERGE_ALL)


@pytest.mark.parametrize(
    ("conv", "shape", "memory_format"),
    [(nn.Conv2d, (2, 5, 6, 6), torch.channels_last), (nn.Conv3d, (2, 5, 6, 6, 6), torch.channels_last_3d)],
)
def test_channels_last_weights_are_merged_as_they_lie(device, conv, shape, memory_format):
    module = conv(5, 8, 3).to(device, memory_format=memory_format)
    assert not module.weight.is_contiguous()
    before, pointer = module.weight.detach().clone(), module.weight.data_ptr()
    inmerge_fast.merge_(module, **MERGE_ALL)
    assert module.weight.data_ptr() == pointer
    assert module.weight.is_contiguous(memory_format=memory_format)
    assert_is_reference(before, module.weight, layer=0, alpha=0.8, **MERGE_ALL)
    module(torch.randn(shape, device=device))


def test_groups_pair_with_their_own_kind_only(device):
    """A filter of another group reads other input channels, so mixing with it would mix unrelated features."""
    conv = nn.Conv2d(6, 9, 3, groups=3, bias=False).to(device)
    x = torch.randn(1, 6, 5, 5, device=device)
    before = conv(x)
    inmerge_fast.merge_(conv, alpha=0.75, **MERGE_ALL)
    _, partner = draw(1, 0, 0, 9, 1.0, groups=3)
    torch.testing.assert_close(conv(x), 0.75 * before + 0.25 * before[:, partner], rtol=1e-4, atol=1e-5)


def test_mergeable_modules_that_only_look_special():
    from torch.ao.nn import qat

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    conv = qat.Conv2d(3, 6, 3, qconfig=qconfig)
    assert inmerge_fast.merge_(conv, **MERGE_ALL).merged == 6


def _quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 6, 3))


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 6, 3)))


def _exported():
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    return torch.export.export(model, (torch.randn(1, 3, 8, 8),)).module()


def _mkldnn():
    from torch.utils import mkldnn

    return mkldnn.to_mkldnn(nn.Sequential(nn.Conv2d(3, 6, 3)).eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [_quantised, _scripted, _exported, _mkldnn])
def test_modules_without_plain_convolutions_raise_instead_of_doing_nothing(make):
    with pytest.raises(ValueError, match=r"no convolution found in this .*\(TorchScript, exported and quantised"):
        inmerge_fast.merge_(make())


# --- tensors that are not plain memory --------------------------------------------------------------------------------


def test_inference_tensors(device):
    with torch.inference_mode():
        conv = nn.Conv2d(3, 6, 3).to(device)
        assert inmerge_fast.merge_(conv, **MERGE_ALL).merged == 6
    with pytest.raises(ValueError, match="created in inference mode"):
        inmerge_fast.merge_(conv, **MERGE_ALL)
    normal = nn.Conv2d(3, 6, 3).to(device)
    before, version = normal.weight.detach().clone(), normal.weight._version
    with torch.inference_mode():
        inmerge_fast.merge_(normal, **MERGE_ALL)
    assert_is_reference(before, normal.weight, layer=0, alpha=0.8, **MERGE_ALL)
    assert normal.weight._version > version
    inmerge_fast.merge_(normal, **MERGE_ALL)  # with scratch memory that was first needed in inference mode


def test_torch_func_transforms(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    parameters = {name: value.detach() for name, value in conv.named_parameters()}
    x = torch.randn(2, 3, 8, 8, device=device)

    def loss(parameters):
        inmerge_fast.merge_(parameters["weight"], **MERGE_ALL)
        return torch.func.functional_call(conv, parameters, (x,)).sum()

    with pytest.raises(ValueError, match="called inside a torch.func transform; call it outside of it"):
        torch.func.grad(loss)(parameters)
    stacked = torch.randn(3, 6, 9, device=device)
    with pytest.raises(ValueError, match="inside a torch.func transform"):
        torch.func.vmap(lambda weight: inmerge_fast.merge_(weight, **MERGE_ALL).merged)(stacked)

    def merge_the_module_while_its_parameters_are_swapped(parameters):
        with torch.nn.utils.stateless._reparametrize_module(conv, parameters):
            inmerge_fast.merge_(conv, **MERGE_ALL)
            return conv(x).sum()

    inmerge_fast.merge_(conv, **MERGE_ALL)  # its plan is cached now
    with pytest.raises(ValueError, match="inside a torch.func transform"):
        torch.func.grad(merge_the_module_while_its_parameters_are_swapped)(parameters)


def test_fake_tensor_modes(device):
    """Kernels would get the addresses of tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = torch.randn(4, 9, device=device)
    before = weight.clone()
    for _ in range(2):
        with FakeTensorMode(), pytest.raises(ValueError, match="called under a FakeTensorMode"):
            inmerge_fast.merge_(weight, **MERGE_ALL)
        assert torch.equal(weight, before)
        inmerge_fast.merge_(weight, **MERGE_ALL)  # its plan is cached now
        before = weight.clone()


def test_the_default_device_is_not_taken_for_the_weights(device):
    before = torch.randn(4, 9)
    weight = before.to(device, copy=True)
    with torch.device("meta"):
        assert inmerge_fast.merge_(weight, **MERGE_ALL).merged == 4
        coin, partner = draw(1, 0, 0, 4, 1.0)
        expected = inmerge_fast.reference_merge(before, coin, partner, threshold=-1.0)
    assert_same_bits(weight, expected.weight)
    assert not expected.similarity.isnan().any()


def test_tensor_subclasses():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    two = nn.Parameter(TwoTensor(torch.randn(4, 9), torch.randn(4, 9)))
    with pytest.raises(TypeError, match="the weight is a TwoTensor, not a plain tensor"):
        inmerge_fast.merge_(two, **MERGE_ALL)
    with FakeTensorMode():
        fake = nn.Conv2d(3, 6, 3)
    with pytest.raises(TypeError, match="the weight is a FakeTensor, not a plain tensor"):
        inmerge_fast.merge_(fake, **MERGE_ALL)

    class Marked(nn.Parameter):
        pass

    with pytest.raises(TypeError, match="the weight is a Marked"):
        inmerge_fast.merge_(Marked(torch.randn(4, 9)), **MERGE_ALL)


def test_lazily_cloned_weights_change_alone(device):
    original = torch.randn(4, 9, device=device)
    kept = original.clone()
    copy_on_write = torch._lazy_clone(original)
    inmerge_fast.merge_(copy_on_write, **MERGE_ALL)
    assert_is_reference(kept, copy_on_write, layer=0, alpha=0.8, **MERGE_ALL)
    assert torch.equal(original, kept)

    kept = copy_on_write.clone()
    later = torch._lazy_clone(copy_on_write)  # shares memory whose address a plan knows
    inmerge_fast.merge_(copy_on_write, **MERGE_ALL)
    assert_is_reference(kept, copy_on_write, layer=0, alpha=0.8, **MERGE_ALL)
    assert torch.equal(later, kept)


def test_memory_mapped_weights_change_alone(tmp_path):
    kept = torch.randn(4, 9)
    torch.save(kept, tmp_path / "weight.pt")
    mapped = torch.load(tmp_path / "weight.pt", mmap=True, weights_only=True)
    inmerge_fast.merge_(mapped, **MERGE_ALL)
    assert_is_reference(kept, mapped, layer=0, alpha=0.8, **MERGE_ALL)
    assert torch.equal(torch.load(tmp_path / "weight.pt", weights_only=True), kept)


def test_threads_that_share_a_plan_do_not_share_scratch_memory():
    from concurrent.futures import ThreadPoolExecutor

    conv = nn.Conv2d(16, 64, 3)
    expected = [inmerge_fast.merge_(conv, prob=0.5, seed=1, step=s, dry_run=True).layers for s in range(40)]
    with ThreadPoolExecutor(4) as pool:
        calls = pool.map(lambda s: inmerge_fast.merge_(conv, prob=0.5, seed=1, step=s, dry_run=True).layers, range(40))
        assert list(calls) == expected


def test_a_closure_of_a_model_that_is_merged_inside_a_transform_raises(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    before = conv.weight.detach().clone()

    def loss(x):
        inmerge_fast.merge_(conv, **MERGE_ALL)
        return conv(x).sum()

    with pytest.raises(ValueError, match="inside a torch.func transform"):
        torch.func.grad(loss)(torch.randn(1, 3, 8, 8, device=device))
    assert torch.equal(conv.weight, before)


def test_nested_regions_without_autocast_do_not_keep_stale_copies(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        old = conv(x)
        with torch.autocast(device.type, enabled=False):
            inmerge_fast.merge_(conv, **MERGE_ALL)
        assert not torch.equal(conv(x), old)


@pytest.mark.parametrize("channels", [3, 300], ids=["short filters", "long filters"])
def test_saved_tensors_that_may_be_mutated_give_the_gradient_of_the_forward_that_ran(channels):
    conv = nn.Conv2d(channels, 6, 3)
    twin = copy.deepcopy(conv)
    x = torch.randn(2, channels, 8, 8, requires_grad=True)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = conv(x).square().sum()
        inmerge_fast.merge_(conv, **MERGE_ALL)
        (gradient,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(twin(x).square().sum(), x)
    assert torch.equal(gradient, expected)


def test_a_call_in_inference_mode_that_merges_nothing_does_not_break_later_calls(device):
    conv = nn.Conv2d(3, 6, 3).to(device)
    with torch.inference_mode():
        inmerge_fast.merge_(conv, prob=1.0, threshold=1.0, seed=1, step=0)
    assert inmerge_fast.merge_(conv, **MERGE_ALL).merged == 6


def test_threads_may_share_a_plan(device):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    conv = nn.Conv2d(4, 12, 3).to(device)
    expected = [inmerge_fast.merge_(conv, prob=0.5, seed=1, step=step, dry_run=True).layers for step in range(12)]
    together = Barrier(2)

    def rounds(steps):
        seen = []
        for step in steps:
            together.wait()
            stats = inmerge_fast.merge_(conv, prob=0.5, seed=1, step=step, dry_run=True)
            together.wait()
            seen.append(stats.layers)
        return seen

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rounds, (range(6), range(6, 12)))
    assert first + second == expected
