"""While an ``InMerge`` is attached: training by something else is noticed, and there is one for each set of weights."""

import gc
import warnings
import weakref

import pytest
import torch
from test_training import batches, loss_of, net, optimizer_of, train
from test_training_attach import SETTINGS, AroundAnother, Sharpness, one_call, sgd, two_calls
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks_of_all
from torch.optim.optimizer import register_optimizer_step_post_hook

from inmerge_fast import InMerge, NoEffectWarning
from inmerge_fast.training.silence import _listening


def test_training_by_something_else_is_noticed():
    """Another optimizer in stage two, or no optimizer at all."""
    model, data = net(), batches(40)
    merger = InMerge(model, **SETTINGS).attach(sgd(model))
    second = optimizer_of("adam", model)
    with pytest.warns(NoEffectWarning, match="the SGD that InMerge is attached to has not stepped") as seen:
        train(model, second, data)
    assert len(seen) == 1
    assert seen[0].filename.endswith("test_training.py") or seen[0].filename == __file__
    merger.detach()
    merger.attach(second)

    class ByHand:
        @torch.no_grad()
        def step(self):
            for p in model.parameters():
                p -= 0.01 * p.grad

        def zero_grad(self):
            model.zero_grad()

    with pytest.warns(NoEffectWarning, match="the Adam that InMerge is attached to has not stepped"):
        train(model, ByHand(), data)


@pytest.mark.parametrize(
    ("before", "after"), [((), (0, 3)), ((0, 3, 5), ()), ((0,), (3,))], ids=["first ones", "all at first", "others"]
)
def test_another_optimizer_is_noticed_whatever_is_frozen_by_then(before, after):
    """Before it takes over, and when it does."""
    model, data = net(), batches(20)
    for index in before:
        model[index].weight.requires_grad_(False)
    first = sgd(model)
    merger = InMerge(model, threshold=-1.0, skip_first=0).attach(first)
    one_call(model, first, data[0])
    for index in before:
        model[index].weight.requires_grad_(True)
    for index in after:
        model[index].weight.requires_grad_(False)
    with pytest.warns(NoEffectWarning, match="the SGD that InMerge is attached to has not stepped") as seen:
        train(model, optimizer_of("adam", model), data)
    assert len(seen) == 1
    assert seen[0].filename.endswith("test_training.py")
    assert merger.step_count == 1


def test_other_optimizers_that_step_as_well_are_in_order():
    """The last one of two is attached to; another one trains other weights."""
    model, other, data = net(), net(), batches(40)
    first, last, apart = sgd(model), sgd(model), sgd(other)
    merger = InMerge(model, **SETTINGS).attach(last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in data:
            loss_of(model, x).backward()
            loss_of(other, x).backward()
            for optimizer in (first, last, apart, apart):
                optimizer.step()
                optimizer.zero_grad(set_to_none=optimizer is not first)
    assert merger.step_count == 40


def test_nothing_listens_to_optimizers_afterwards():
    """One hook for all stays, and has nobody to tell."""
    before = set(_listening)
    model = net()
    merger = InMerge(model, **SETTINGS).attach(sgd(model))
    assert len(set(_listening) - before) == 1
    merger.detach()
    assert not set(_listening) - before
    hooks = len(hooks_of_all)
    InMerge(model, **SETTINGS).attach(sgd(model))
    gc.collect()
    assert not set(_listening) - before
    assert len(hooks_of_all) == hooks


def test_what_is_no_training_by_something_else():
    """Gradients are accumulated, weights are clamped in between, steps are skipped, a step has a closure."""
    model, data = net(), batches(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in data:
            loss_of(model, x).backward()
            with torch.no_grad():
                model[3].weight.clamp_(-1, 1)
        for x in data:
            (loss_of(model, x) * torch.inf).backward()
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        merger.detach()
        sharp = InMerge(model, **SETTINGS).attach(Sharpness(model.parameters(), lr=0.0))
        for x in data:
            two_calls(model, sharp._attached._replaced[0][0], x)
    assert sharp.step_count == 40


def test_a_weight_that_was_replaced_is_looked_at():
    model, data = net(), batches(40)
    optimizer = sgd(model)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.add_param_group({"params": [model[0].weight]})
    one_call(model, optimizer, data[0])
    other = optimizer_of("adam", model)
    with pytest.warns(NoEffectWarning, match="have changed 16 times"):
        train(model, other, data)
    assert merger.step_count == 1


# ---------------------------------------------------------------------------------------- one merger per set of weights


def test_of_two_for_the_same_weights_the_older_lets_go():
    model, other = net(), net()
    optimizer = sgd(model)
    x = batches(1)[0]
    apart = InMerge(other, **SETTINGS).attach(sgd(other))
    older = InMerge(model, **SETTINGS).attach(optimizer)
    for newer_optimizer, target in ((optimizer, model), (sgd(model), [model[3]])):
        newer = InMerge(target, **{k: v for k, v in SETTINGS.items() if k != "skip_first" or target is model})
        with pytest.warns(UserWarning, match="another InMerge was attached .* and has been detached") as seen:
            newer.attach(newer_optimizer)
        assert seen[0].filename == __file__
        assert (older.attached, newer.attached, apart.attached) == (False, True, True)
        one_call(model, newer_optimizer, x)
        assert (older.step_count, newer.step_count) == (0 if target is model else 1, 1)
        older.detach()
        older = newer


def test_an_attached_one_lets_go_for_one_that_is_stepped_by_hand():
    """A notebook's cell that attached, and steps by hand when it is run again."""
    model, data = net(), batches(6)
    optimizer = sgd(model)
    older = InMerge(model, **SETTINGS).attach(optimizer)
    one_call(model, optimizer, data[0])
    by_hand = InMerge(model, **SETTINGS)
    with pytest.warns(UserWarning, match="another InMerge was attached .* and has been detached") as seen:
        by_hand.step()
    assert [warning.filename for warning in seen] == [__file__]
    for x in data:
        one_call(model, optimizer, x)
        by_hand.step()
    assert (older.step_count, by_hand.step_count, older.attached) == (1, 7, False)


def test_one_whose_optimizer_is_gone_or_that_is_detached_is_in_nobodys_way():
    model = net()
    with InMerge(model, **SETTINGS).attach(sgd(model)) as merger:
        assert merger.attached
    assert not merger.attached
    with pytest.raises(KeyboardInterrupt), InMerge(model, **SETTINGS).attach(sgd(model)) as merger:
        raise KeyboardInterrupt
    assert not merger.attached
    optimizer = sgd(model)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    del optimizer
    gc.collect()
    InMerge(model, **SETTINGS).attach(sgd(model))


def test_nothing_is_kept_alive():
    model = net()
    optimizer = AroundAnother(sgd(model))
    merger = weakref.ref(InMerge(model, **SETTINGS).attach(optimizer))
    gc.collect()
    assert merger() is not None, "the optimizer keeps it"
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert merger() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_merger_that_goes_away_in_the_midst_of_anothers_step_does_not_disturb_it():
    """PyTorch goes through the hooks of all optimizers after a step, and a collector may run in any of them."""
    model, other = net(), net()
    of_other, optimizer = sgd(other), sgd(model)
    merger = [InMerge(other, **SETTINGS).attach(of_other)]
    handle = register_optimizer_step_post_hook(lambda *_: [one.detach() for one in merger])
    try:
        InMerge(model, **SETTINGS).attach(optimizer)
        for x in batches(3):
            loss_of(model, x).backward()
            optimizer.step()
    finally:
        handle.remove()
