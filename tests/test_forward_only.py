"""``merged``: the gradient is that of merged weights, and they have their old bits back whatever happens."""

import copy
import pickle

import pytest
import torch
from oracle import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import inmerge_fast
from inmerge_fast import draw, lease, merge_, merged, reference_forward_only
from inmerge_fast.lease import lease_of

DRAW = {"seed": 5, "step": 3}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.again.weight = self.second.weight
        self.up = nn.ConvTranspose2d(8, 12, 3, groups=2)

    def forward(self, x):
        return self.up(self.again(torch.relu(self.second(torch.relu(self.first(x))))))


@pytest.fixture
def model(device):
    return Tied().to(device)


def inputs(device, seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def loss_of(model, x):
    return model(x).square().mean()


def copies(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_restored(model, before):
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.detach(), old)
    assert all(lease_of(parameter) is None for parameter in model.parameters())
    hooks = [hook for module in model.modules() for hook in module._state_dict_hooks.values()]
    assert set(hooks) <= {lease._nothing}  # which a copy has


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_inside_the_block_weights_are_what_merge_makes_of_them_and_after_it_what_they_were(device, dtype, threshold):
    model = Tied().to(device, dtype)
    twin, before = copy.deepcopy(model), copies(model)
    merge_(twin, skip_first=0, alpha=0.5, prob=0.5, threshold=threshold, **DRAW)
    with merged(model, threshold=threshold, **DRAW) as stats:
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(own.detach(), other.detach())
    assert_restored(model, before)
    assert 0 < stats.merged <= stats.sampled
    assert (stats.merged == stats.sampled) == (threshold == -1.0)


@pytest.mark.parametrize("partner", ["nearest", "similar"])
def test_partner_rules_and_memory_formats(device, partner):
    model = Tied().to(device).to(memory_format=torch.channels_last)
    twin, before = copy.deepcopy(model), copies(model)
    merge_(twin, skip_first=0, alpha=0.5, prob=0.5, threshold=0.0, partner=partner, **DRAW)
    with merged(model, threshold=0.0, partner=partner, **DRAW):
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(own.detach(), other.detach())
    assert_restored(model, before)


def test_the_gradient_is_that_of_the_reference(device):
    weight = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    before = weight.detach().clone()
    coin, partner = draw(DRAW["seed"], DRAW["step"], 0, 12, 0.5)
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def loss(weight):
        return (weight - target).pow(4).mean()

    expected, result = reference_forward_only(before.cpu(), coin, partner, lambda w: loss(w.to(device)).cpu(),
                                              alpha=0.5, threshold=-1.0)  # fmt: skip
    with merged(weight, **DRAW) as stats:
        loss(weight).backward()
    assert stats.merged == int(result.merged.sum()) > 0
    torch.testing.assert_close(weight.grad.cpu(), expected.cpu(), rtol=1e-5, atol=1e-6)
    unmerged = torch.autograd.grad(loss(before.requires_grad_()), before)[0]
    assert not torch.allclose(weight.grad, unmerged)
    assert_same_bits(weight.detach(), before.detach())


def test_the_step_is_taken_from_the_old_weights(device, model):
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copies(model)
    for index in range(2):  # accumulation: one draw for both
        with merged(model, **DRAW):
            loss_of(model, inputs(device, index)).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert_same_bits(parameter.detach(), old.add(gradient, alpha=-0.1))
    merge_(twin, skip_first=0, alpha=0.5, prob=0.5, threshold=-1.0, **DRAW)
    (loss_of(twin, inputs(device)) + loss_of(twin, inputs(device, 1))).backward()
    for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_exception_in_the_block(model, error):
    before = copies(model)
    with pytest.raises(error, match="here"), merged(model, **DRAW):
        raise error("here")
    assert_restored(model, before)
    assert lease_of(model.first.weight) is None


def test_an_interrupt_right_after_the_kernel_loses_nothing(model, monkeypatch):
    """A signal's handler runs when a call in C returns, before its result is anywhere."""
    before = copies(model)
    plan = inmerge_fast.MergePlan(model, skip_first=0)
    kind = type(plan.paths.choose().for_now(plan.weights(), inmerge_fast.paths.path.Call(0, 0, 0.5, 0.5, -1.0)))
    merge = kind.merge

    def interrupted(self):
        merge(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt), merged(model, **DRAW):
        raise AssertionError("the block was entered")
    assert_restored(model, before)


def test_an_interrupt_while_it_is_restored_does_not_stop_that(model, monkeypatch):
    before = copies(model)
    context = merged(model, **DRAW)
    context.__enter__()
    own = context._lease
    put_back, calls = own._put_back, []

    def interrupted(changed):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        put_back(changed)

    monkeypatch.setattr(own, "_put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        context.__exit__(None, None, None)
    assert_restored(model, before)


def test_a_second_merge_of_the_same_weights_is_refused(model):
    before = copies(model)
    with merged(model, **DRAW):
        with pytest.raises(RuntimeError, match="layer Conv2d is merged for a forward pass already"):
            merged(model.second, **DRAW).__enter__()
        with pytest.raises(RuntimeError, match="was used already"), (context := merged(nn.Conv2d(3, 8, 3), **DRAW)):
            context.__enter__()
    assert_restored(model, before)


def writes(model):
    """Each writes to the weights; what must be left of it, by name of the layer, is checked by ``torch.equal``."""
    return {
        "an update by hand": lambda: model.first.weight.detach().sub_(1),
        "load_state_dict": lambda: model.first.load_state_dict(nn.Conv2d(3, 8, 3).state_dict()),
        "merge_": lambda: merge_(model.first, threshold=-1.0, prob=1.0, seed=9, step=9),
        "half": lambda: model.first.double(),
        "new parameter": lambda: setattr(model.first, "weight", nn.Parameter(model.first.weight.detach() + 1)),
        "data": lambda: setattr(model.first.weight, "data", model.first.weight.data + 1),
    }


@pytest.mark.parametrize("name", list(writes(None)))
def test_a_weight_that_was_written_to_in_the_block_is_named_and_keeps_what_was_written(model, name):
    before = copies(model)
    context = merged(model, **DRAW)
    context.__enter__()
    writes(model)[name]()
    written = model.first.weight.detach().clone()
    if name in ("an update by hand", "load_state_dict", "merge_"):  # it still is that weight
        with pytest.raises(RuntimeError, match="can neither be saved nor copied"):
            model.state_dict()
    with pytest.raises(RuntimeError, match=r"^first: .* left as it is"):
        context.__exit__(None, None, None)
    assert_same_bits(model.first.weight.detach(), written)
    for index, parameter in enumerate(model.parameters()):
        if parameter is not model.first.weight and parameter is not model.first.bias:
            assert_same_bits(parameter.detach(), before[index])
    assert lease_of(model.first.weight) is None
    assert not any(module._state_dict_hooks for module in model.modules())


def test_saving_and_copying_in_the_block_give_the_weights_as_they_were(model):
    before = copies(model)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    whole = nn.Sequential(model, nn.Linear(2, 2))
    with merged(model, **DRAW) as stats:
        assert stats.merged
        saved, copied, nested = model.state_dict(), copy.deepcopy(model), copy.deepcopy(whole)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        assert list(saved) == names
        assert not torch.equal(model.second.weight, before[2])
        with pytest.raises(RuntimeError, match="is merged for a forward pass, and would be saved so"):
            pickle.dumps(model)
    for other in (copied, nested[0], averaged.module):
        assert_restored(other, before)
        assert other.again.weight is other.second.weight
    fresh = Tied()
    fresh.load_state_dict(saved)
    for parameter, old in zip(fresh.parameters(), before, strict=True):
        assert_same_bits(parameter.detach(), old.cpu())
    assert_restored(model, before)
    pickle.dumps(model)
    assert_restored(pickle.loads(pickle.dumps(copied)), before)


def test_a_backward_pass_after_the_block_raises(device, model):
    with merged(model, **DRAW):
        loss = loss_of(model, inputs(device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_with_merged_weights(device, model, reentrant):
    x = inputs(device).requires_grad_()
    with merged(model, **DRAW):
        loss_of(model, x).backward()
        plain = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_autocast_keeps_no_copy_of_merged_weights(full_device):
    model = Tied().to(full_device)
    x = inputs(full_device)
    with torch.autocast(full_device.type, dtype=torch.bfloat16):
        before = model(x)  # casts the weights, and keeps them
        with merged(model, **DRAW):
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


def test_compiled_models(full_device):
    model = Tied().to(full_device)
    compiled, x, before = torch.compile(model, backend="aot_eager"), inputs(full_device), copies(model)
    compiled(x).sum().backward()
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True), merged(compiled, **DRAW):
        compiled(x).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(x).sum().backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    assert_restored(model, before)


@pytest.mark.gpu
def test_a_capture_is_refused_and_the_graph_goes_on_without_it():
    model, x = Tied().cuda(), inputs("cuda")
    before = copies(model)
    with merged(model, **DRAW):
        model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            merged(model, **DRAW).__enter__()
        out = model(x)
    graph.replay()
    torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)
    assert_restored(model, before)


def test_a_block_inside_a_compiled_function(full_device):
    model, x = Tied().to(full_device), inputs(full_device)
    before, twin = copies(model), copy.deepcopy(model)

    @torch.compile(backend="aot_eager")
    def gradient(step):
        with merged(model, seed=5, step=step):
            loss = loss_of(model, x)
            loss.backward()
        return loss

    for step in range(3):
        model.zero_grad()
        found = gradient(step)
        with merged(twin, seed=5, step=step):
            torch.testing.assert_close(found, loss_of(twin, x), rtol=1e-5, atol=1e-6)
        assert_restored(model, before)


def test_batch_norm_statistics_are_recomputed_with_the_weights_as_they_were(full_device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(full_device)
    twin = copy.deepcopy(model)
    with merged(model, **DRAW):
        model(inputs(full_device)).sum().backward()
    assert not torch.equal(model[1].running_mean, twin[1].running_mean)
    for each in (model, twin):
        torch.optim.swa_utils.update_bn([inputs(full_device)], each)
    assert_same_bits(model[1].running_mean, twin[1].running_mean)
    assert_same_bits(model[1].running_var, twin[1].running_var)


def test_the_defaults_are_not_the_papers():
    plan_of_all = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    with merged(nn.Sequential(*plan_of_all), **DRAW) as stats:
        assert len(stats.layers) == 3
        assert stats.merged == stats.sampled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 2}, "alpha"),
        ({"prob": -1}, "prob"),
        ({"threshold": 3.0}, "threshold"),
        ({"threshold": inmerge_fast.RankBudget()}, "RankBudget"),
        ({"partner": "best"}, "partner"),
        ({"include_linear": 1}, "include_linear"),
        ({"seed": 0}, "step"),
        ({"seed": -1, "step": 0}, "seed"),
        ({"layer": -1}, "layer"),
    ],
)
def test_wrong_arguments_raise_where_they_are_written(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        merged(nn.Conv2d(3, 8, 3), **arguments)


def test_what_is_merged_for_a_moment_does_not_count_as_lasting(recwarn):
    conv = nn.Conv2d(8, 16, 3)
    for step in range(200):
        with merged(conv, seed=0, step=step):
            pass
    assert not recwarn.list
    merge_(conv, seed=0, step=0)


def test_where_nothing_is_alike_enough_a_warning_says_so():
    conv = nn.Conv2d(8, 16, 3)

    def train():
        for step in range(200):
            with merged(conv, threshold=0.99, seed=0, step=step):
                pass

    with pytest.warns(inmerge_fast.NoEffectWarning, match="merged none"):
        train()
