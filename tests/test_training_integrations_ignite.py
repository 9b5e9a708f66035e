"""The handler on Ignite's engines: the same weights, checkpoints, metrics, bad input."""

import copy
import inspect
import pickle

import pytest
import torch
from oracle import assert_same_bits
from test_training import loss_of, net
from torch import nn
from trainers import (
    ACCUMULATE,
    ALWAYS,
    BUDGET,
    DATA,
    RECIPE,
    STEPS,
    assert_as_plain,
    assert_same_weights,
    forward_loop,
    hooks_of,
    plain_loop,
)

pytest.importorskip("ignite")

from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver

from inmerge_fast.integrations.ignite import InMergeHandler

FORWARD = {"lasting": False, "seed": 3}
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::inmerge_fast.NoEffectWarning",
    "ignore::inmerge_fast.CollapseWarning",
)


def parts():
    torch.manual_seed(0)
    model = net()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def classes(out, _):
    """The loss of the plain loop; the target that the engines pass on is not looked at."""
    return nn.functional.cross_entropy(out, torch.arange(len(out)) % 4)


def trainer_of(model, optimizer):
    """Ignite's own, with accumulation."""
    return create_supervised_trainer(
        model,
        optimizer,
        classes,
        gradient_accumulation_steps=ACCUMULATE,
        prepare_batch=lambda batch, **_: (batch, batch),
    )


def run(recipe, epochs=1, **keywords):
    model, optimizer = parts()
    trainer, handler = trainer_of(model, optimizer), InMergeHandler(model, optimizer, **recipe, **keywords)
    handler.attach(trainer)
    trainer.run(DATA, max_epochs=epochs)
    assert hooks_of(optimizer) == 0  # let go
    return model, handler, trainer


# --------------------------------------------------------------------------------------------------------------- ignite


def test_gives_the_same_weights_as_a_plain_loop():
    model, handler, _ = run(RECIPE)
    assert handler.merger.summary().merged > 0
    assert_as_plain(model, handler.merger, plain_loop())


def test_forward_only_gives_the_same_weights_as_a_plain_loop():
    model, handler, _ = run(FORWARD)
    assert handler.merger.summary().merged > 0
    assert_as_plain(model, handler.merger, forward_loop(FORWARD))


def test_a_function_that_calls_parts_of_the_model_is_merged_for_too():
    (model, optimizer), calls = parts(), []

    def step(_, x):
        for part in model:  # as encoder and decoder
            x = part(x)
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        calls.append(handler.merger.step_count)

    handler, trainer = InMergeHandler(model, optimizer, **FORWARD), Engine(step)
    handler.attach(trainer)
    trainer.run(DATA[:3])
    assert calls == [1, 2, 3]
    assert handler.merger.summary().merged > 0


@pytest.mark.parametrize("recipe", [RECIPE, FORWARD], ids=["lasting", "forward-only"])
def test_resumes_to_the_bit_from_ignites_checkpoint(tmp_path, recipe):
    whole = run(recipe, epochs=3)[0]
    model, optimizer = parts()
    trainer, handler = trainer_of(model, optimizer), InMergeHandler(model, optimizer, **recipe)
    handler.attach(trainer)
    everything = {"trainer": trainer, "model": model, "optimizer": optimizer, "inmerge": handler}
    saver = DiskSaver(tmp_path, create_dir=True, require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(everything, saver, n_saved=None))
    trainer.run(DATA, max_epochs=1)

    model, optimizer = parts()
    trainer, again = trainer_of(model, optimizer), InMergeHandler(model, optimizer, **recipe)
    again.attach(trainer)
    everything = {"trainer": trainer, "model": model, "optimizer": optimizer, "inmerge": again}
    [file] = tmp_path.iterdir()
    Checkpoint.load_objects(everything, torch.load(file, weights_only=True))
    assert again.state_dict() == handler.state_dict()
    trainer.run(DATA, max_epochs=3)
    assert again.merger.step_count == 3 * STEPS
    assert_same_weights(model, whole)


def test_a_second_run_goes_on_and_a_new_one_begins_anew():
    model, handler, trainer = run(RECIPE)
    first = handler.merger
    trainer.run(DATA, max_epochs=2)
    assert handler.merger is not first
    assert_as_plain(model, handler.merger, plain_loop(epochs=2))
    trainer.state.max_epochs = None  # Ignite begins at epoch 1 again
    trainer.run(DATA, max_epochs=1)
    assert handler.merger.step_count == STEPS


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_handler_that_joins_later_counts_the_steps_before_it():
    model, optimizer = parts()
    trainer = trainer_of(model, optimizer)
    trainer.run(DATA, max_epochs=1)
    handler = InMergeHandler(model, optimizer, accumulation_steps=ACCUMULATE, **RECIPE | {"start": STEPS})
    handler.attach(trainer)
    with pytest.warns(UserWarning, match=f"after {STEPS} optimizer steps .* without this InMergeHandler"):
        trainer.run(DATA, max_epochs=2)
    assert handler.merger.step_count == 2 * STEPS


def test_a_budget_is_told_the_optimizer_steps_of_the_run():
    _, handler, _ = run(BUDGET, epochs=2, accumulation_steps=ACCUMULATE)
    assert handler.merger._run.recipe.threshold.steps == 2 * STEPS


@pytest.mark.skipif("max_iters" not in inspect.signature(Engine.run).parameters, reason="this Ignite cannot do so")
def test_a_run_that_is_ended_by_iterations_is_measured_too():
    model, optimizer = parts()
    trainer, handler = trainer_of(model, optimizer), InMergeHandler(model, optimizer, accumulation_steps=2, **BUDGET)
    handler.attach(trainer)
    trainer.run(DATA, max_iters=8)
    assert handler.merger._run.recipe.threshold.steps == handler.merger.step_count == 4


def test_what_was_observed_stands_in_the_metrics_of_the_same_epoch():
    model, optimizer = parts()
    trainer, rows, seen = trainer_of(model, optimizer), [], []

    @trainer.on(Events.EPOCH_COMPLETED)  # before the handler's own, had it any for this event
    def look(engine):
        seen.append(dict(engine.state.metrics))

    InMergeHandler(model, optimizer, target="0", observe_every=1, loggers=[rows.append], **ALWAYS).attach(trainer)
    trainer.run(DATA, max_epochs=1)
    assert seen[0]["inmerge/0/merged"] == rows[-1]["merged"] > 0
    assert seen[0]["inmerge/0/step"] == rows[-1]["step"] == STEPS - 1
    assert not [name for name in seen[0] if name.count("/") > 2]  # no single layers


# ----------------------------------------------------------------------------------------------------------- exceptions


class BrokenError(Exception):
    pass


def raise_again(_, error):
    raise error


def failing(at, recipe=ALWAYS, listener=None):
    """An engine whose iteration ``at`` fails after the forward pass, and its parts."""
    model, optimizer = parts()

    def step(engine, x):
        loss = loss_of(model, x)
        if engine.state.iteration == at:
            raise BrokenError
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    handler, trainer = InMergeHandler(model, optimizer, **recipe), Engine(step)
    if listener is not None:
        trainer.add_event_handler(Events.EXCEPTION_RAISED, listener)
    handler.attach(trainer)
    return model, optimizer, handler, trainer


def test_an_exception_passes_and_nothing_stays_attached_or_merged():
    model, optimizer, handler, trainer = failing(1, FORWARD)
    before = copy.deepcopy(list(model.parameters()))
    other = InMergeHandler(model, optimizer, target="3", **FORWARD)
    other.attach(trainer)  # of several, none may stay
    handler._blueprint = InMergeHandler(target="5", **FORWARD)._blueprint
    with pytest.raises(BrokenError):
        trainer.run(DATA)
    for own, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(own, old)
    assert hooks_of(optimizer) == 0


def test_an_exception_that_another_handler_deals_with_does_not_end_merging():
    _, optimizer, handler, trainer = failing(4, listener=lambda _, error: None)
    trainer.run(DATA, max_epochs=2)
    assert handler.merger.step_count == len(DATA) + 3
    assert hooks_of(optimizer) == 0


def test_the_next_run_ends_what_an_exception_has_left_attached():
    model, optimizer, handler, trainer = failing(2, listener=raise_again)
    with pytest.raises(BrokenError):
        trainer.run(DATA)
    assert handler.merger.attached
    again, second = InMergeHandler(model, optimizer, **ALWAYS), trainer_of(model, optimizer)
    again.attach(second)
    second.run(DATA)  # no warning of two that are attached
    assert not handler.merger.attached


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_attached_says_so():
    model, optimizer = parts()
    handler = InMergeHandler(model, optimizer, **RECIPE)
    with pytest.raises(TypeError, match="engine must be an ignite"):
        handler.attach(model)
    with pytest.raises(ValueError, match="the engine evaluates a model"):
        handler.attach(create_supervised_evaluator(model))
    with pytest.raises(ValueError, match="Engine has no network to ask for: give InMergeHandler the model"):
        InMergeHandler(**RECIPE).attach(trainer_of(model, optimizer))
    with pytest.raises(ValueError, match="Engine has no optimizer to ask for"):
        InMergeHandler(model, **RECIPE).attach(trainer_of(model, optimizer))
    trainer = trainer_of(model, optimizer)
    handler.attach(trainer)
    with pytest.raises(ValueError, match="attached to this engine already"):
        handler.attach(trainer)
    with pytest.raises(ValueError, match="attached to another engine already"):
        handler.attach(trainer_of(model, optimizer))
    InMergeHandler(model, optimizer, **RECIPE).attach(trainer)
    with pytest.raises(ValueError, match="two InMergeHandlers for the same weights"):
        trainer.run(DATA)


def test_arguments_are_checked_where_they_are_written():
    model, optimizer = parts()
    with pytest.raises(TypeError, match=r"InMergeHandler\(\) got an unexpected argument 'treshold'; did you mean"):
        InMergeHandler(model, optimizer, treshold=0.3)
    with pytest.raises(TypeError, match="model must be the module"):
        InMergeHandler(optimizer, model)
    with pytest.raises(ValueError, match="accumulation_steps must"):
        InMergeHandler(model, optimizer, accumulation_steps=0)
    with pytest.raises(ValueError, match="prob must"):
        InMergeHandler(model, optimizer, prob=2)


def test_an_engine_that_steps_nothing_is_told_of():
    model, optimizer = parts()
    handler, engine = InMergeHandler(model, optimizer, **RECIPE), Engine(lambda _, x: loss_of(model, x))
    handler.attach(engine)
    with pytest.warns(UserWarning, match="has run, and the optimizer has made no step"):
        engine.run(DATA)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_the_arguments_and_no_run(how):
    _, handler, _ = run(RECIPE)
    twin = how(handler)
    assert twin.merger is None
    assert twin.state_dict() == {}
    assert twin._blueprint.recipe == RECIPE
