"""Which steps are training: those of an attached optimizer in any mode, those that are asked for in training mode."""

import warnings

import pytest
import torch
from oracle import untouched
from test_training import batches, loss_of, net, optimizer_of, train

from inmerge_fast import InMerge, NoEffectWarning

SETTINGS = {"prob": 1.0, "threshold": -1.0, "skip_first": 0, "guard": None}


def test_a_step_of_an_attached_optimizer_is_training_in_any_mode():
    """The model is left in evaluation mode after validation, or a part of it, or a tool has traced it."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    optimizer, other = optimizer_of("sgd", model), optimizer_of("sgd", twin)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    by_hand = InMerge(twin, **SETTINGS)
    data = batches(6)
    for mode in (model.train, model.eval, model[3].train):
        mode()
        for x in data:
            for target, chosen in ((model, optimizer), (twin, other)):
                target[1].eval()
                loss_of(target, x).backward()
                chosen.step()
                chosen.zero_grad()
            by_hand.step()
    assert merger.step_count == 18
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_a_step_that_is_asked_for_in_evaluation_mode_does_nothing():
    """So that it may stand before the forward pass of a loop that validates, too."""
    model = net()
    merger = InMerge(model, **SETTINGS)
    merger.step()
    model.eval()
    check = untouched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):  # a long validation: no weight changes
            assert merger.step() is None
    check()
    assert merger.step_count == 1
    model.train()
    assert merger.step().merged > 0


def test_training_in_evaluation_mode_is_pointed_out_once():
    model = net()
    optimizer = optimizer_of("sgd", model)
    merger = InMerge(model, **SETTINGS)
    train(model, optimizer, batches(3), lambda _: merger.step())
    model.eval()
    with pytest.warns(
        NoEffectWarning, match="17 steps of InMerge, while the weights change, in evaluation mode"
    ) as seen:
        train(model, optimizer, batches(60), lambda _: merger.step())
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert merger.step_count == 3
