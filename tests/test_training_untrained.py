"""An optimizer that holds only some of the weights: the others are merged after its steps if something trains them."""

import warnings

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from inmerge_fast import InMerge, NoEffectWarning
from inmerge_fast.lease import lease_of
from inmerge_fast.training.untrained import PATIENCE

SETTINGS = {"threshold": -1.0, "prob": 1.0, "skip_first": 0, "guard": None, "seed": 1}


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten())


def backward(model):
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().mean().backward()


def sgd(*layers):
    return torch.optim.SGD([weight for layer in layers for weight in layer.parameters()], lr=0.1)


def merges(merger):
    return {name: merged for name, (_, merged) in merger._run.counted_by_layer().items()}


def test_a_pretrained_backbone_that_nobody_has_frozen_is_left_alone():
    model = make()
    before = model[0].weight.detach().clone()
    optimizer = sgd(model[1], model[2])
    with InMerge(model, **SETTINGS).attach(optimizer) as merger, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PATIENCE - 1):
            backward(model)
            optimizer.step()
        assert_same_bits(model[0].weight.detach(), before)
        assert merges(merger) == {"0": 0, "1": 8 * (PATIENCE - 1), "2": 8 * (PATIENCE - 1)}
        warnings.simplefilter("default")
        with pytest.warns(NoEffectWarning, match=r"^0: not merged, .* the SGD .* does not hold their weights"):
            optimizer.step()
        warnings.simplefilter("error")
        optimizer.step()  # once is enough


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.filterwarnings("error")
def test_of_two_optimizers_one_is_attached_to_and_both_train_what_is_merged(order):
    """As by hand, after the last of them; what steps after it is merged one step later."""
    model, twin = make(), make()
    first, last = sgd(model[0]), sgd(model[1], model[2])
    by_hand = InMerge(twin, **SETTINGS)
    optimizers = sgd(twin[0]), sgd(twin[1], twin[2])
    merger = InMerge(model, **SETTINGS).attach(last)
    for _ in range(PATIENCE + 2):
        backward(model)
        backward(twin)
        for optimizer in (first, last)[::order]:
            optimizer.step()
            optimizer.zero_grad()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        by_hand.step()
    expected = merges(by_hand)
    if order == 1:
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(own.detach(), other.detach())
    else:
        expected["0"] -= 8
    assert merges(merger) == expected


def test_a_weight_that_the_optimizer_is_given_later_is_merged_from_then_on():
    model = make()
    optimizer = sgd(model[1], model[2])
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(model[0].parameters())})
        backward(model)
        optimizer.step()
    assert merges(merger) == {"0": 16, "1": 32, "2": 32}


def test_detached_it_merges_all_again():
    model = make()
    merger = InMerge(model, **SETTINGS).attach(sgd(model[1]))
    merger.detach()
    merger.step()
    assert merges(merger) == {"0": 8, "1": 8, "2": 8}


def test_forward_only_merging_is_of_all_weights_and_nobodys_step_sees_it():
    """It changes nothing for good, so a layer that nobody trains loses nothing."""
    model = make()
    first, last = sgd(model[0]), sgd(model[1], model[2])
    before = [weight.detach().clone() for weight in model.parameters()]
    InMerge(model, lasting=False).attach(last)
    backward(model)
    assert lease_of(model[0].weight) is not None
    first.step()
    assert lease_of(model[0].weight) is None
    for own, was in list(zip(model.parameters(), before, strict=True))[2:]:
        assert_same_bits(own.detach(), was)
    last.step()
    assert_same_bits(model[0].weight.detach(), before[0].add(model[0].weight.grad, alpha=-0.1))
