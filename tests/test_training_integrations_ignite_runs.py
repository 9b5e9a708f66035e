"""Runs of Ignite's engines that end early, and what is read between the iterations of one."""

import copy

import pytest
from oracle import assert_same_bits
from trainers import ACCUMULATE, DATA, assert_same_weights, hooks_of

pytest.importorskip("ignite")

from ignite.engine import Events
from ignite.handlers.ema_handler import EMAHandler
from test_training_integrations_ignite import FORWARD, parts, run, trainer_of

from inmerge_fast.integrations.ignite import InMergeHandler
from inmerge_fast.lease import lease_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::inmerge_fast.NoEffectWarning")


def test_a_run_that_is_terminated_without_its_last_event_lets_go():
    model, optimizer = parts()
    trainer, handler = trainer_of(model, optimizer), InMergeHandler(model, optimizer, **FORWARD)
    handler.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.terminate(skip_completed=True))
    trainer.run(DATA)
    assert not handler.merger.attached
    assert hooks_of(optimizer) == 0


def test_an_interrupted_run_has_its_own_weights_and_goes_on_to_the_bit():
    model, optimizer = parts()
    trainer, handler = trainer_of(model, optimizer), InMergeHandler(model, optimizer, **FORWARD)
    handler.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.interrupt())
    trainer.run(DATA, max_epochs=2)
    assert trainer.state.iteration == 3
    assert lease_of(model[0].weight) is None
    trainer.run(DATA, max_epochs=2)
    assert_same_weights(model, run(FORWARD, 2)[0])


@pytest.mark.parametrize("event", [Events.ITERATION_STARTED, Events.ITERATION_COMPLETED])
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_each_iteration_are_of_the_weights_as_they_were(event, first):
    model, optimizer = parts()
    trainer, handler = trainer_of(model, optimizer), InMergeHandler(model, optimizer, **FORWARD)
    average = EMAHandler(model, momentum=0.5)  # what it averages was not touched before the first step
    before = copy.deepcopy(model)
    if not first:
        handler.attach(trainer)
    average.attach(trainer, event=event)
    if first:
        handler.attach(trainer)
    merged = []
    trainer._process_function = merging(trainer._process_function, model, merged)
    with pytest.warns(UserWarning, match="has made no step"):
        trainer.run(DATA[: ACCUMULATE - 1])
    assert merged == [True] * (ACCUMULATE - 1)
    for own, expected in zip(average.ema_model.parameters(), before.parameters(), strict=True):
        assert_same_bits(own, expected)


def merging(step, model, merged):
    """Notes whether the weights are merged after ``step``."""

    def noted(engine, batch):
        out = step(engine, batch)
        merged.append(lease_of(model[0].weight) is not None)
        return out

    return noted
