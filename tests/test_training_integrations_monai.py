"""The handler on MONAI's trainers: told by them what they train, with their checkpoints, reports and networks."""

import pytest
import torch
from test_training_integrations_ignite import FORWARD, classes, parts
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

from inmerge_fast import InMerge

pytest.importorskip("ignite")
pytest.importorskip("monai")

from monai.engines import SupervisedEvaluator, SupervisedTrainer, Trainer
from monai.handlers import CheckpointLoader, CheckpointSaver, StatsHandler
from monai.networks import nets

from inmerge_fast.integrations.ignite import InMergeHandler

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::inmerge_fast.NoEffectWarning",
    "ignore::inmerge_fast.CollapseWarning",
)  # fmt: skip


def monai_trainer(model, optimizer, handlers, **arguments):
    arguments = {"max_epochs": 1, "accumulation_steps": ACCUMULATE} | arguments
    data = [{"image": x, "label": x} for x in DATA]
    return SupervisedTrainer(
        device="cpu",
        train_data_loader=data,
        network=model,
        optimizer=optimizer,
        loss_function=classes,
        train_handlers=handlers,
        decollate=False,
        **arguments,
    )


@pytest.mark.parametrize("recipe", [RECIPE, FORWARD], ids=["lasting", "forward-only"])
def test_monais_trainer_says_itself_what_it_trains(recipe):
    (model, optimizer), handler = parts(), InMergeHandler(**recipe)
    monai_trainer(model, optimizer, [handler]).run()
    assert hooks_of(optimizer) == 0
    assert_as_plain(model, handler.merger, plain_loop() if recipe is RECIPE else forward_loop(FORWARD))


def test_monai_steps_once_more_at_the_end_of_each_epoch():
    (model, optimizer), handler = parts(), InMergeHandler(**BUDGET)
    monai_trainer(model, optimizer, [handler], accumulation_steps=5, max_epochs=2).run()
    assert handler.merger._run.recipe.threshold.steps == handler.merger.step_count == 2 * 3  # of 12 batches each


@pytest.mark.parametrize("recipe", [RECIPE, FORWARD], ids=["lasting", "forward-only"])
@pytest.mark.parametrize("first", ["loader", "handler"])
def test_resumes_to_the_bit_from_monais_checkpoint(tmp_path, recipe, first):
    whole, optimizer = parts()
    monai_trainer(whole, optimizer, [InMergeHandler(**recipe)], max_epochs=3).run()
    (model, optimizer), handler = parts(), InMergeHandler(**recipe)
    trainer = monai_trainer(model, optimizer, [handler])
    everything = {"net": model, "optimizer": optimizer, "trainer": trainer, "inmerge": handler}
    CheckpointSaver(str(tmp_path), everything, save_interval=1).attach(trainer)
    trainer.run()

    (model, optimizer), again = parts(), InMergeHandler(**recipe)
    trainer = monai_trainer(model, optimizer, [], max_epochs=3)
    everything = {"net": model, "optimizer": optimizer, "trainer": trainer, "inmerge": again}
    [file] = tmp_path.iterdir()
    handlers = [CheckpointLoader(str(file), everything), again]
    for one in handlers if first == "loader" else reversed(handlers):
        one.attach(trainer)
    trainer.run()
    assert again.merger.step_count == 3 * STEPS
    assert_same_weights(model, whole)


def test_monais_own_reports_show_what_was_merged(capsys):
    model, optimizer = parts()
    handlers = [StatsHandler(name="train", output_transform=lambda _: None), InMergeHandler(observe_every=1, **ALWAYS)]
    monai_trainer(model, optimizer, handlers).run()
    assert "inmerge/merged: " in capsys.readouterr().out


def test_monais_evaluator_and_a_network_without_a_name_are_refused():
    model, optimizer = parts()
    with pytest.raises(ValueError, match="the engine evaluates a model"):
        SupervisedEvaluator("cpu", [], model, val_handlers=[InMergeHandler(model, optimizer)])

    class Own(Trainer):
        def _iteration(self, *_):
            return {}

    own = Own("cpu", 1, [{"image": 0}], handlers=[InMergeHandler()])
    with pytest.raises(ValueError, match="Own has no network to ask for"):
        own.run()


NETWORKS = {
    "DenseNet121 2D": ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, (2, 1, 32, 32)),
    "DenseNet121 3D": ("DenseNet121", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}, (2, 1, 32, 32, 32)),
    "UNet": (
        "UNet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2)},
        (1, 1, 32, 32),
    ),
    "SegResNet": (
        "SegResNet",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 8},
        (1, 1, 16, 16, 16),
    ),
}


@pytest.mark.parametrize("recipe", [ALWAYS, {"lasting": False}], ids=["lasting", "forward-only"])
@pytest.mark.parametrize("name", NETWORKS)
def test_monais_networks_train_as_in_a_plain_loop(name, recipe):
    kind, arguments, shape = NETWORKS[name]
    data = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(getattr(nets, kind)(**arguments))
    model, plain = models
    handler = InMergeHandler(**recipe)
    SupervisedTrainer(
        "cpu", 1, [{"image": x, "label": x} for x in data], model, torch.optim.SGD(model.parameters(), 0.01),
        lambda out, _: out.square().mean(), train_handlers=[handler], decollate=False,
    ).run()  # fmt: skip
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    merger = InMerge(plain, **recipe).attach(optimizer)
    for x in data:
        plain.train()
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    merger.detach()
    assert handler.merger.summary().merged > 0
    assert_same_weights(model, plain)
