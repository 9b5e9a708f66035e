"""The callback in Lightning's Trainer: run after run, after exceptions, and beside Lightning's own helpers."""

import pytest
import torch
from test_training import loss_of, net
from torch import nn
from trainers import ACCUMULATE, ALWAYS, BUDGET, RECIPE, STEPS, Batches, assert_same_weights, hooks_of, lightning_parts

from inmerge_fast import DictLogger
from inmerge_fast.lease import lease_of

pl = pytest.importorskip("lightning.pytorch")

from inmerge_fast.integrations.lightning import InMergeCallback  # noqa: E402

Module, fit = lightning_parts()
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::inmerge_fast.NoEffectWarning"
)


# ----------------------------------------------------------------------------------------------------- several runs


def sampled(callback):
    return {name: sampled for name, (sampled, _) in callback.merger._run.counted_by_layer().items()}


def fit_on(trainer, module, epochs):
    trainer.fit_loop.max_epochs = epochs
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))


def test_fit_twice_goes_on_in_the_same_trainer(tmp_path):
    in_one_go, callback, module = InMergeCallback(**RECIPE), InMergeCallback(**RECIPE), Module()
    fit(Module(), [in_one_go], tmp_path, max_epochs=3)
    trainer = fit(module, [callback], tmp_path)
    fit_on(trainer, module, 3)
    assert callback.merger.step_count == trainer.global_step == 3 * STEPS
    assert sampled(callback) == sampled(in_one_go)
    budget = InMergeCallback(**BUDGET)
    fit_on(fit(module, [budget], tmp_path), module, 3)
    assert budget.merger._run.recipe.merging_steps == 3 * STEPS


def test_fit_begins_anew_in_another_trainer(tmp_path):
    module, callback, other = Module(), InMergeCallback(**RECIPE), InMergeCallback(**RECIPE)
    fit(module, [callback], tmp_path, max_epochs=2)
    fit(module, [callback], tmp_path)
    fit(Module(), [other], tmp_path)
    assert callback.merger.step_count == STEPS
    assert sampled(callback) == sampled(other)
    fit(module, [], tmp_path).save_checkpoint(tmp_path / "plain.ckpt")
    for one, resumed in ((callback, module), (InMergeCallback(**RECIPE), Module())):
        other = one
        fit(resumed, [one], tmp_path, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert sampled(callback) == sampled(other)  # neither has anything of a run before


class StopsAt(pl.Callback):
    def __init__(self, hook, error):
        setattr(self, hook, self.stop)
        self.error = error

    def stop(self, *_, **__):
        raise self.error


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("error", [RuntimeError("no more memory"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_attached(hook, error, tmp_path):
    module, callback = Module(), InMergeCallback(**ALWAYS)
    optimizers = []
    callback.on_fit_start = lambda trainer, _: optimizers.extend(trainer.optimizers)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, [callback, StopsAt(hook, error)], tmp_path)
    [optimizer] = optimizers
    assert hooks_of(optimizer) == 0
    assert callback.merger.attached is False
    steps = callback.merger.step_count
    optimizer.step()
    assert callback.merger.step_count == steps
    trainer = fit(module, [callback], tmp_path)  # and goes on
    assert callback.merger.step_count == trainer.global_step == STEPS


class Looks(Module):
    """Tells in each of its steps whether weights are merged; never called itself."""

    def look(self):
        return any(lease_of(weight) for weight in self.parameters())

    def training_step(self, batch, _):
        loss = super().training_step(batch, _)
        self.seen.append(self.look())
        return loss

    def validation_step(self, batch, _):
        self.net(batch["x"])
        self.validated.append(self.look())

    def on_before_optimizer_step(self, _):
        self.seen.append("step")


def test_forward_only_merging_of_a_module_that_is_never_called(tmp_path):
    module = Looks()
    module.seen, module.validated = [], []
    data = torch.utils.data.DataLoader(Batches(), batch_size=None)
    callback = InMergeCallback(lasting=False)
    fit(module, [callback], tmp_path, accumulate_grad_batches=2, val_check_interval=1, val=data)
    steps = callback.merger.step_count
    assert module.seen[:6] == [True, True, "step", True, True, "step"]
    assert steps == module.seen.count("step") == STEPS * ACCUMULATE // 2
    assert module.validated
    assert not any(module.validated)
    assert not module.look()


def test_a_replaced_optimizer_is_followed(tmp_path):
    class SecondStage(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [torch.optim.Adam(pl_module.parameters(), lr=1e-3)]

    for order in (1, -1):
        callback = InMergeCallback(**ALWAYS)
        trainer = fit(Module(), [callback, SecondStage()][::order], tmp_path, max_epochs=2)
        assert callback.merger.step_count == trainer.global_step == 2 * STEPS
        assert hooks_of(trainer.optimizers[0]) == 0


# ------------------------------------------------------------------------------------------------- Lightning's helpers


def test_the_learning_rate_finder_merges_nothing(tmp_path):
    """It trains on the side, without the trainer's callbacks, and puts everything back."""
    from lightning.pytorch.callbacks import LearningRateFinder

    log, module = DictLogger(), Module()
    module.lr = 0.05
    callback = InMergeCallback(**ALWAYS, loggers=[log], observe_every=1)
    trainer = fit(module, [callback, LearningRateFinder(num_training_steps=5)], tmp_path, max_epochs=2)
    assert trainer.global_step > 5  # old Lightnings end a step after the search
    assert [row["step"] for row in log.rows] == list(range(trainer.global_step))
    assert callback.merger.step_count == trainer.global_step


def test_the_learning_rate_finder_in_mid_run_leaves_no_trace(tmp_path):
    from lightning.pytorch.callbacks import LearningRateFinder

    class Later(LearningRateFinder):
        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    runs = []
    for helpers in ([], [Later(num_training_steps=5, update_attr=False)]):
        module, callback = Module(), InMergeCallback(**BUDGET)
        module.lr = 0.05
        fit(module, [callback, *helpers], tmp_path, max_epochs=3)
        runs.append((module, callback))
    assert runs[0][1].merger.state_dict() == runs[1][1].merger.state_dict()
    assert_same_weights(runs[1][0], runs[0][0])


def test_averaged_weights_are_left_alone(tmp_path):
    """StochasticWeightAveraging takes one more epoch for the averaged weights' statistics, with a step at its end."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    log = DictLogger()
    callback = InMergeCallback(**ALWAYS, loggers=[log], observe_every=1)

    def averaging():
        return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)

    trainer = fit(Module(), [callback, averaging()], tmp_path, max_epochs=2)
    assert [row["step"] for row in log.rows] == list(range(2 * STEPS))
    assert callback.merger.step_count == trainer.global_step == 2 * STEPS + 1
    callback = InMergeCallback(**BUDGET)
    fit(Module(), [averaging(), callback], tmp_path, max_epochs=2)
    assert callback.merger._run.recipe.merging_steps == 2 * STEPS


def test_an_average_follows(tmp_path):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    callback = InMergeCallback(**ALWAYS)
    trainer = fit(Module(), [callback, callbacks.EMAWeightAveraging(decay=0.5)], tmp_path, max_epochs=2)
    assert callback.merger.step_count == trainer.global_step == 2 * STEPS


def test_a_backbone_waits_until_it_is_trained(tmp_path):
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Transfer(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = net()[:-1], nn.Linear(12, 4)

        def training_step(self, batch, _):
            return loss_of(nn.Sequential(self.backbone, self.head), batch["x"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.05)

    module, callback = Transfer(), InMergeCallback(**ALWAYS)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    for callbacks in ([callback, finetuning], [finetuning, callback]):
        trainer = fit(module, callbacks, tmp_path, max_epochs=2)
        assert callback.merger.step_count == trainer.global_step == 2 * STEPS
        totals = callback.merger._run.counted_by_layer()
        assert {name: sampled for name, (sampled, _) in totals.items()} == {
            "backbone.0": 6 * STEPS, "backbone.3": 8 * STEPS, "backbone.5": 12 * STEPS
        }  # fmt: skip
