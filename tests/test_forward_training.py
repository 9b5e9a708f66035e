"""``InMerge(lasting=False)`` in training loops: merged for each step's passes, and for nothing else."""

import copy
import warnings

import pytest
import torch
from forward_loops import SEED, assert_same, batch, by_hand, loss_of, make, weights_of
from oracle import assert_same_bits
from torch import nn

import inmerge_fast
from inmerge_fast import InMerge, NoEffectWarning, merged
from inmerge_fast.lease import lease_of


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
