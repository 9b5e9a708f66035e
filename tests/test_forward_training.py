"""``InMerge(lasting=False)`` in training loops: merged for each step's passes, and for nothing else."""

import copy
import pickle
import warnings

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

import inmerge_fast
from inmerge_fast import InMerge, NoEffectWarning, merged
from inmerge_fast.lease import lease_of

SEED = 3


def make(seed=0, norm=True):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))


def batch(index):
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 4, (4,), generator=generator)


def loss_of(model, index):
    x, y = batch(index)
    return nn.functional.cross_entropy(model(x), y)


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_hand(steps, *, micro=1, norm=True, make_optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
    """What training with ``merged`` around the passes of each step gives."""
    model = make(norm=norm)
    optimizer = make_optimizer(model.parameters())
    for step in range(steps):
        with merged(model, seed=SEED, step=step):
            for index in range(micro):
                loss_of(model, step * micro + index).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model, other):
    for (name, own), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(own, expected), name


@pytest.mark.parametrize("micro", [1, 3])
def test_attached_it_is_merged_around_the_passes_of_each_step(micro):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    for step in range(6):
        for index in range(micro):
            loss_of(model, step * micro + index).backward()
            assert lease_of(model[0].weight) is not None
        optimizer.step()
        assert lease_of(model[0].weight) is None
        optimizer.zero_grad()
    assert merger.step_count == 6
    assert_same(model, by_hand(6, micro=micro))
    assert merger.summary().merged > 0


def test_the_block_counts_the_steps():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    merger = InMerge(model, lasting=False, seed=SEED)
    for step in range(6):
        with merger.merged() as stats:
            loss_of(model, step).backward()
            assert stats.merged > 0
        optimizer.step()
        optimizer.zero_grad()
    assert merger.step_count == 6
    assert_same(model, by_hand(6))
    before = weights_of(model)
    with pytest.raises(ZeroDivisionError), merger.merged():
        raise ZeroDivisionError
    assert merger.step_count == 6
    for own, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(own.detach(), old)


def test_schedules_start_and_stop_hold():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    merger = InMerge(model, lasting=False, start=2, stop=5, every=2, prob=inmerge_fast.linear(0.2, 1.0, begin=2, end=4))
    merger.attach(optimizer)
    seen = []
    for step in range(7):
        loss_of(model, step).backward()
        seen.append(lease_of(model[0].weight) is not None)
        optimizer.step()
    assert seen == [step in (2, 4) for step in range(7)]


def test_an_evaluation_in_the_middle_of_accumulation_sees_the_weights_as_they_were():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    before = weights_of(model)
    loss_of(model, 0).backward()
    merged_weight = model[3].weight.detach().clone()
    model.eval()
    with torch.no_grad():
        loss_of(model, 9)
    for own, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(own.detach(), old)
    model.train()
    loss_of(model, 1).backward()
    assert_same_bits(model[3].weight.detach(), merged_weight)
    optimizer.step()
    assert_same(model, by_hand(1, micro=2))
    with merged(make(), seed=SEED, step=0) as stats:
        pass
    summary = merger.summary()
    assert (summary.sampled, summary.merged) == (stats.sampled, stats.merged)  # counted once


def test_statistics_are_recomputed_without_merging():
    model = by_hand(3)
    twin = copy.deepcopy(model)
    InMerge(model, lasting=False, seed=SEED).attach(torch.optim.SGD(model.parameters(), 0.1))
    for each in (model, twin):
        torch.optim.swa_utils.update_bn([batch(0)[0], batch(1)[0]], each)
    assert_same(model, twin)


def test_a_scaler_that_skips_a_step_leaves_nothing_behind():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights_of(model)
    for factor in (float("inf"), 1.0):
        scaler.scale(loss_of(model, 0) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor != 1.0:
            assert merger.step_count == 0
            for own, old in zip(model.state_dict(keep_vars=True).values(), model.state_dict().values(), strict=True):
                assert own.shape == old.shape
            saved = model.state_dict()
            assert_same_bits(saved["3.weight"], before[4])
    assert merger.step_count == 1
    assert lease_of(model[0].weight) is None


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_an_exception_leaves_is_not_saved_not_evaluated_and_not_stepped(error):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    before = weights_of(model)

    def fail():
        raise error

    with pytest.raises(error):
        (loss_of(model, 0).register_hook(lambda _: fail()) and loss_of(model, 0).backward()) or fail()
    saved = model.state_dict()
    assert_same_bits(saved["3.weight"], before[4])
    loaded = pickle.loads(pickle.dumps(model))  # restores first
    for own, old in zip(loaded.parameters(), before, strict=True):
        assert_same_bits(own.detach(), old)
    loss_of(model, 0).backward()
    merger.detach()
    for own, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(own.detach(), old)
    assert not model._forward_pre_hooks


def test_a_step_without_a_backward_pass():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    before = weights_of(model)
    loss_of(model, 0)
    optimizer.step()
    for own, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(own.detach(), old)


def test_a_closure_is_evaluated_with_merged_weights_and_the_step_is_taken_without():
    def make_optimizer(parameters):
        return torch.optim.LBFGS(parameters, lr=0.01, max_iter=3)

    model, twin = make(norm=False), make(norm=False)
    optimizer, other = make_optimizer(model.parameters()), make_optimizer(twin.parameters())
    InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            assert lease_of(model[0].weight) is not None
            return loss

        def by_hand(step=step):
            other.zero_grad()
            with merged(twin, seed=SEED, step=step):
                loss = loss_of(twin, step)
                loss.backward()
            return loss

        optimizer.step(closure)
        other.step(by_hand)
        assert lease_of(model[0].weight) is None
    assert_same(model, twin)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation in its usual form (github.com/davda54/sam)."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    def step(self, closure=None):
        raise NotImplementedError


def test_both_passes_of_sam_see_merged_weights_and_neither_write_does():
    model, twin = make(norm=False), make(norm=False)
    optimizer, other = (Sam(each.parameters(), torch.optim.SGD, lr=0.1) for each in (model, twin))
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    for step in range(3):
        for half in ("first_step", "second_step"):
            loss_of(model, step).backward()
            getattr(optimizer, half)()
            optimizer.zero_grad()
            with merged(twin, seed=SEED, step=step):
                loss_of(twin, step).backward()
            getattr(other, half)()
            other.zero_grad()
        assert merger.step_count == step + 1
    assert_same(model, twin)


def test_an_average_that_follows_the_steps_has_no_merged_weights():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    loss_of(model, 0).backward()
    early = copy.deepcopy(model)
    optimizer.step()
    average.update_parameters(model)
    for own, expected in zip(average.module.parameters(), model.parameters(), strict=True):
        assert_same_bits(own.detach(), expected.detach())
    for own, expected in zip(early.parameters(), make().parameters(), strict=True):
        assert_same_bits(own.detach(), expected.detach())
    loss_of(early, 1).backward()  # its hooks merge nothing, and not the original
    assert lease_of(early[0].weight) is None
    assert lease_of(model[0].weight) is None


class Holder(nn.Module):
    """A model that holds its InMerge."""

    def __init__(self):
        super().__init__()
        self.merger = None
        self.net = make()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_holds_its_merger_is_copied_while_it_is_merged(copied):
    model = Holder()
    model.merger = InMerge(model, lasting=False, seed=SEED)
    model.merger.attach(torch.optim.SGD(model.parameters(), 0.1))
    loss_of(model, 0).backward()
    other = copied(model)
    for own, old in zip(other.net.parameters(), make().parameters(), strict=True):
        assert_same_bits(own.detach(), old.detach())
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other.merger.attach(optimizer)
    loss_of(other, 1).backward()
    assert lease_of(other.net[0].weight) is not None
    optimizer.step()
    assert lease_of(other.net[0].weight) is None
    assert other.merger.step_count == 1
    assert model.merger.step_count == 0


@pytest.mark.parametrize("given", ["compiled", "inner"])
def test_compiled_models(given):
    torch._dynamo.reset()  # code that was compiled for another model is used again, and knows nothing of a hook
    model = make()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    InMerge(compiled if given == "compiled" else model, lasting=False, seed=SEED).attach(optimizer)
    for step in range(3):
        loss_of(compiled, step).backward()
        assert lease_of(model[0].weight) is not None
        optimizer.step()
        optimizer.zero_grad()
    expected = by_hand(3)
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_weight_that_was_written_to_while_merged_is_named_and_no_step_is_taken():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    loss_of(model, 0).backward()
    with torch.no_grad():
        model[3].weight.add_(1)
    kept = model[3].weight.detach().clone()
    with pytest.raises(RuntimeError, match="^3: the weight was written to"):
        optimizer.step()
    assert_same_bits(model[3].weight.detach(), kept)
    assert merger.step_count == 0


def test_a_run_goes_on_bit_identically():
    def run(model, merger, optimizer, steps):
        merger.attach(optimizer)
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    model = make()
    merger = InMerge(model, lasting=False, seed=SEED)
    _kept = run(model, merger, torch.optim.SGD(model.parameters(), 0.1), range(3))
    loss_of(model, 3)  # merged: what is saved is not
    saved = copy.deepcopy({"model": model.state_dict(), "merger": merger.state_dict()})
    fresh = make(1)
    fresh.load_state_dict(saved["model"])
    going_on = InMerge(fresh, lasting=False, seed=SEED)
    going_on.load_state_dict(saved["merger"])
    run(fresh, going_on, torch.optim.SGD(fresh.parameters(), 0.1), range(3, 6))
    whole = by_hand(6, make_optimizer=lambda p: torch.optim.SGD(p, 0.1))
    for own, other in zip(fresh.parameters(), whole.parameters(), strict=True):
        assert_same_bits(own.detach(), other.detach())
    with pytest.raises(ValueError, match="lasting=False, and this InMerge has lasting=True"):
        InMerge(make(), skip_first=0).load_state_dict(saved["merger"])


def test_a_model_that_is_not_called_is_noticed():
    model = make()
    outer = nn.Sequential(*model)  # called instead
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    InMerge(model, lasting=False).attach(optimizer)
    loss_of(outer, 0).backward()
    with pytest.warns(NoEffectWarning, match="no forward pass in training mode was seen of the Sequential"):
        optimizer.step()
    loss_of(outer, 1).backward()
    optimizer.step()  # once is enough


def test_nothing_warns_in_an_ordinary_loop():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    merger = InMerge(model, lasting=False).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        merger.flush()
        assert "3 optimizer steps" in str(merger.summary())
        assert "collapsing" not in str(merger.summary())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lasting": 1}, TypeError, "lasting"),
        ({"guard": inmerge_fast.CollapseGuard()}, ValueError, "guard"),
        ({"threshold": inmerge_fast.RankBudget(), "stop": 10}, ValueError, "RankBudget"),
    ],
)
def test_what_means_nothing_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        InMerge(make(), **{"lasting": False, **arguments})


def test_single_weights_are_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"with inmerge_fast\.merged\(weights\)"):
        InMerge([nn.Conv2d(3, 8, 3)], lasting=False)


def test_other_ways_to_step_are_refused_with_the_cure():
    merger = InMerge(make(), lasting=False)
    with pytest.raises(RuntimeError, match=r"with merger\.merged\(\)"):
        merger.step()
    with pytest.raises(RuntimeError, match="CUDA graphs"):
        merger.prepare()
    with pytest.raises(RuntimeError, match="merges for good has step"):
        InMerge(make()).merged()
    merger.attach(torch.optim.SGD(merger._run.model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="detach"):
        merger.merged()


def test_the_defaults_are_those_of_each_mode():
    lasting, forward = InMerge(make()), InMerge(make(), lasting=False)
    assert (lasting._run.recipe.alpha, lasting._run.recipe.prob, lasting._run.recipe.threshold) == (0.8, 0.3, 0.3)
    assert (forward._run.recipe.alpha, forward._run.recipe.prob, forward._run.recipe.threshold) == (0.5, 0.5, -1.0)
    assert [layer.name for layer in forward.plan.layers] == ["0", "3"]
