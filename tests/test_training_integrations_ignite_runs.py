"""Runs of Ignite's engines that end early, and what is read between the iterations of one."""

import copy
from inspect import signature

import pytest
import torch
from oracle import assert_same_bits
from torch import nn
from torch.utils.data import DataLoader
from trainers import ACCUMULATE, DATA, STEPS, assert_same_weights, hooks_of

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers.ema_handler import EMAHandler
from test_training_integrations_ignite import FORWARD, parts, run, trainer_of

from inmerge_fast import RankBudget
from inmerge_fast.integrations.ignite import InMergeHandler
from inmerge_fast.lease import lease_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::inmerge_fast.NoEffectWarning")


@pytest.mark.skipif("skip_completed" not in signature(Engine.terminate).parameters, reason="this Ignite cannot do so")
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


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED])
def test_a_handler_that_is_attached_to_a_running_engine_merges_from_then_on(event):
    model, optimizer = parts()
    engine, calls = trainer_of(model, optimizer), []
    handler = InMergeHandler(model, optimizer, accumulation_steps=ACCUMULATE, **FORWARD)
    engine.add_event_handler(event(once=2), lambda e: handler.attach(e))
    engine.add_event_handler(Events.ITERATION_STARTED, lambda e: calls.append(e.state.iteration))
    with pytest.warns(UserWarning, match="resumes after"):
        engine.run(DATA, max_epochs=2)
    assert calls == list(range(1, 2 * len(DATA) + 1))
    assert handler.merger.summary().merged > 0
    assert handler.merger.step_count == 2 * STEPS
    assert hooks_of(optimizer) == 0


def test_a_handler_that_is_attached_to_an_interrupted_engine_merges_from_then_on():
    model, optimizer = parts()
    engine = trainer_of(model, optimizer)
    handler = InMergeHandler(model, optimizer, accumulation_steps=ACCUMULATE, **FORWARD)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.interrupt())
    engine.run(DATA)
    handler.attach(engine)
    with pytest.warns(UserWarning, match="resumes after 1 "):
        engine.run(DATA)
    assert handler.merger.step_count == STEPS
    assert handler.merger.summary().merged > 0


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


@pytest.mark.parametrize("recipe", [FORWARD, {"threshold": RankBudget(), "skip_first": 0}])
def test_both_networks_of_monais_gan_trainer_are_merged_and_know_their_steps(recipe):
    pytest.importorskip("monai")
    from monai.engines import GanTrainer

    torch.manual_seed(0)
    generator = nn.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 1, 3))
    critic = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 1))
    networks = generator, critic
    optimizers = [torch.optim.SGD(network.parameters(), 0.01) for network in networks]
    handlers = [InMergeHandler(*pair, **recipe) for pair in zip(networks, optimizers, strict=True)]
    trainer = GanTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=DataLoader(torch.randn(8, 1, 4, 4), batch_size=2),
        g_network=generator,
        g_optimizer=optimizers[0],
        g_loss_function=lambda fake: -critic(fake).mean(),
        d_network=critic,
        d_optimizer=optimizers[1],
        d_loss_function=lambda fake, real: critic(fake.detach()).mean() - critic(real).mean(),
        d_train_steps=3,
        d_prepare_batch=lambda batch, *_, **__: batch,
        g_prepare_batch=lambda num_latents, **_: torch.randn(num_latents, 8, 1, 1),
        train_handlers=handlers,
        decollate=False,
    )
    left = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: left.extend(lease_of(w) for n in networks for w in n.parameters())
    )
    trainer.run()
    assert [handler.merger.step_count for handler in handlers] == [8, 24]
    assert set(left) == {None}
    for handler, steps in zip(handlers, (8, 24), strict=True):
        if recipe is FORWARD:
            assert handler.merger.summary().merged > 0
        else:
            assert handler.merger._run.recipe.threshold.steps == steps
