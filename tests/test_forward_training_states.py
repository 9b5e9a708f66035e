"""``InMerge(lasting=False)``: what is saved, copied, averaged and left behind; and what is refused."""

import copy
import pickle
import tracemalloc

import pytest
import torch
from forward_loops import SEED, by_hand, loss_of, make, weights_of
from oracle import assert_same_bits
from torch import nn

import inmerge_fast
from inmerge_fast import InMerge
from inmerge_fast.lease import lease_of


def test_a_scaler_that_skips_a_step_leaves_nothing_behind():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    merger = InMerge(model, lasting=False, seed=SEED).attach(optimizer)
    scaler, average = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.swa_utils.AveragedModel(model)
    before = weights_of(model)
    for factor in (float("inf"), 1.0):
        scaler.scale(loss_of(model, 0) * factor).backward()
        merged_weight = model[3].weight.detach().clone()
        scaler.step(optimizer)
        average.update_parameters(model)
        scaler.update()
        optimizer.zero_grad()
        assert lease_of(model[0].weight) is None
        if factor != 1.0:
            assert merger.step_count == 0
            for own, old in zip(average.module.parameters(), before, strict=True):
                assert_same_bits(own.detach(), old)
            skipped_with = merged_weight
    assert merger.step_count == 1
    assert_same_bits(merged_weight, skipped_with)  # the next passes are of the same step, and see the same merge
    assert not torch.equal(merged_weight, before[4])


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


def test_memory_for_old_filters_is_kept_from_step_to_step_and_freed_by_detach():
    model = nn.Conv2d(256, 256, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    merger = InMerge(model, lasting=False, prob=0.5).attach(optimizer)
    if merger.plan.path != "cpu":
        pytest.skip("needs the CPU kernel, whose memory Python counts")
    held, size = [], model.weight.numel() * 4
    tracemalloc.start()
    try:
        for _ in range(4):
            merger._forward.begin()
            merger._forward.restore()
            held.append(tracemalloc.get_traced_memory()[0])
        merger.detach()
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.4 * size < held[0] <= held[-1] < 0.7 * size
    assert most < 0.8 * size
    assert after < 0.1 * size
