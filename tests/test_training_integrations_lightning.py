"""The callback in Lightning's Trainer: the steps that it follows in one run, of one optimizer and of several."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from test_training import loss_of, net
from torch import nn
from trainers import (
    ALWAYS,
    BUDGET,
    DATA,
    RECIPE,
    STEPS,
    assert_as_plain,
    assert_same_weights,
    lightning_parts,
    plain_loop,
)

from inmerge_fast import DictLogger, InMerge, RankBudget

pl = pytest.importorskip("lightning.pytorch")

from inmerge_fast.integrations.lightning import InMergeCallback  # noqa: E402

Module, fit = lightning_parts()
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::inmerge_fast.NoEffectWarning"
)


# ------------------------------------------------------------------------------------------------------------- one run


def test_gives_the_same_weights(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module, log = Module(), DictLogger()
    callback = InMergeCallback(observe_every=2, loggers=[log], **RECIPE)
    fit(module, [callback], tmp_path, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    assert_as_plain(module.net, callback.merger, plain_loop())
    assert callback.merger.plan.names == ["net.3", "net.5"]
    assert [row["step"] for row in log.rows] == [2, 4]
    [metrics] = tmp_path.rglob("metrics.csv")
    assert "inmerge/net.3/mean_similarity" in metrics.read_text()


def test_resumes_bit_identically(tmp_path):
    """Two epochs in one go, and with the state through a checkpoint between them."""
    with pytest.raises(ValueError, match=r"optimizer=3, but the module has 1 optimizers"):
        fit(Module(), [InMergeCallback(optimizer=3, **RECIPE)], tmp_path)
    whole, in_one_go = Module(), InMergeCallback(**RECIPE)
    fit(whole, [in_one_go], tmp_path, max_epochs=2)
    trainer = fit(Module(), [InMergeCallback(**RECIPE)], tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module, callback = Module(), InMergeCallback(**RECIPE)
    fit(module, [callback], tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert callback.merger.state_dict() == in_one_go.merger.state_dict()
    assert callback.merger.step_count == 2 * STEPS
    assert_same_weights(module, whole)


OTHER_PACKAGE = """
import pytorch_lightning as pl, torch
from inmerge_fast.integrations.lightning import InMergeCallback

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
    def training_step(self, batch, _):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = InMergeCallback(threshold=-1.0, prob=1.0)
trainer = pl.Trainer(callbacks=callback, max_epochs=2, accelerator="cpu", devices=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 3, 8, 8), batch_size=2))
assert isinstance(callback, pl.Callback)
assert callback.merger.step_count == trainer.global_step == 8, callback.merger
"""


def test_pytorch_lightning_is_served_too():
    pytest.importorskip("pytorch_lightning")
    root = __file__.rpartition("/tests/")[0]
    command = [sys.executable, "-W", "ignore", "-c", OTHER_PACKAGE]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------- several optimizers


class Gan(pl.LightningModule):
    """Manual optimization: the critic steps with every batch, the generator with every second one."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
        self.critic = net()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.generator, self.critic)]

    def training_step(self, batch, index):
        self.steps(batch["x"], index, self.optimizers(), self.manual_backward)

    def steps(self, x, index, optimizers, backward):
        backward(loss_of(self.critic, self.generator(x)))
        optimizers[1].step()
        if index % 2:
            optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def callbacks_of_a_gan():
    return [
        InMergeCallback(target="generator", optimizer=0, seed=1, **ALWAYS),
        InMergeCallback(target="critic", optimizer=1, seed=2, **ALWAYS),
    ]


def fit_gan(module, callbacks, folder, **arguments):
    return fit(module, callbacks, folder, accumulate_grad_batches=1, **arguments)


def test_a_gan_has_a_merger_for_each_optimizer(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    plain = Gan()
    optimizers = plain.configure_optimizers()
    mergers = [InMerge(plain.generator, seed=1, **ALWAYS), InMerge(plain.critic, seed=2, **ALWAYS)]
    for merger, optimizer in zip(mergers, optimizers, strict=True):
        merger.attach(optimizer)
    for index, x in [*enumerate(DATA)] * 2:
        plain.steps(x, index, optimizers, lambda loss: loss.backward())
    whole, callbacks = Gan(), callbacks_of_a_gan()
    fit_gan(whole, callbacks, tmp_path, max_epochs=2, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    assert [callback.merger.step_count for callback in callbacks] == [len(DATA), 2 * len(DATA)]
    assert_same_weights(whole, plain)
    [metrics] = tmp_path.rglob("metrics.csv")
    tags = metrics.read_text().partition("\n")[0].split(",")
    assert {"inmerge/generator/merged", "inmerge/generator/0/merged", "inmerge/critic/3/merged"} <= set(tags)

    trainer = fit_gan(Gan(), callbacks_of_a_gan(), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    assert len({callback.state_key for callback in callbacks} & kept.keys()) == 2
    module, resumed = Gan(), callbacks_of_a_gan()
    fit_gan(module, resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert_same_weights(module, plain)


def test_a_module_without_an_optimizer_is_refused(tmp_path):
    class Untrained(Module):
        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match="configure_optimizers of Untrained has returned no optimizer"):
        fit(Untrained(), [InMergeCallback(**RECIPE)], tmp_path)


def test_two_callbacks_for_the_same_part_are_refused_by_lightning(tmp_path):
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `InMergeCallback`"):
        fit_gan(Gan(), [InMergeCallback(target="critic", optimizer=1, **RECIPE) for _ in range(2)], tmp_path)
    keys = [InMergeCallback(target=target, optimizer=index, **RECIPE).state_key
            for target, index in itertools.product([None, "a", "b", net], [0, 1])]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_a_budget_is_told_the_steps_of_its_optimizer(tmp_path):
    budgets = [InMergeCallback(target="generator", optimizer=0, **BUDGET | {"skip_first": 0}),
               InMergeCallback(target="critic", optimizer=1, **BUDGET)]  # fmt: skip
    fit_gan(Gan(), budgets, tmp_path, max_epochs=-1, max_steps=18)  # of both optimizers together, as Lightning counts
    assert [callback.merger._run.recipe.merging_steps for callback in budgets] == [9, 9]


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_budget_is_told_its_steps_and_epochs_are_known(tmp_path):
    callback = InMergeCallback(**BUDGET, start=2)
    fit(Module(), [callback], tmp_path, max_epochs=2)
    assert callback.merger._run.recipe.merging_steps == 2 * STEPS - 2
    with pytest.warns(UserWarning, match=r"steps_per_epoch=12, but this trainer makes 6 optimizer steps per epoch"):
        fit(Module(), [InMergeCallback(steps_per_epoch=len(DATA), stop=2)], tmp_path, max_epochs=2)
    with pytest.raises(ValueError, match=r"has to know how many they are: pass stop="):
        fit(Module(), [InMergeCallback(**BUDGET, start=50)], tmp_path)


def test_a_changing_accumulation_is_counted(tmp_path):
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    for schedule, steps in (({0: 1, 1: 3}, 12 + 4 + 4), ({0: 5}, 3 * 3)):
        callback = InMergeCallback(**BUDGET)
        trainer = fit(Module(), [callback, GradientAccumulationScheduler(schedule)], tmp_path, max_epochs=3,
                      accumulate_grad_batches=1)  # fmt: skip
        assert callback.merger._run.recipe.merging_steps == trainer.global_step == steps


def test_warnings_point_at_the_users_line(tmp_path):
    """Not at Lightning's, whichever of its hooks was called."""
    callback = InMergeCallback(threshold=0.999, skip_first=0, steps_per_epoch=5000, stop=1)
    with pytest.warns(UserWarning, match="this trainer makes") as seen:
        fit(Module(), [callback], tmp_path, max_epochs=3)
    ours = [w for w in seen if "of merge_ sampled" in str(w.message) or "this trainer makes" in str(w.message)]
    assert len(ours) == 2
    assert all(w.filename.endswith("trainers.py") for w in ours)


def test_nobody_knows_the_steps_of_a_stream(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"x": x} for x in DATA])

    with pytest.raises(ValueError, match=r"has to know how many they are: pass stop="):
        fit(Module(), [InMergeCallback(**BUDGET)], tmp_path, data=Stream())
    callback = InMergeCallback(steps_per_epoch=3, stop=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(Module(), [callback], tmp_path, data=Stream())
    assert not [w for w in said if "steps_per_epoch" in str(w.message)]


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_longer_run_resumed_spends_its_budget_over_the_longer_run(tmp_path):
    fit(Module(), [InMergeCallback(**BUDGET)], tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        callback = InMergeCallback(**BUDGET)
        fit(Module(), [callback], tmp_path, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert callback.merger._run.recipe.merging_steps == callback.merger.step_count == 3 * STEPS
    assert not [w for w in said if "the checkpoint's" in str(w.message)]
    changed = BUDGET | {"threshold": RankBudget(0.2)}
    with pytest.warns(UserWarning, match=r"the checkpoint's threshold=RankBudget\(loss=0.3, .* replace"):
        fit(Module(), [InMergeCallback(**changed)], tmp_path, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    callback = InMergeCallback(**changed, keep=["threshold"])
    fit(Module(), [callback], tmp_path, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert callback.merger._run.recipe.threshold == RankBudget(0.2, steps=3 * STEPS)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_callback_that_joins_later_counts_the_steps_before_it(tmp_path):
    """As in the paper: plain epochs, then some with merging; here from the plain run's checkpoint."""
    fit(Module(), [], tmp_path).save_checkpoint(tmp_path / "plain.ckpt")
    recipe = RECIPE | {"start": STEPS}
    module, callback = Module(), InMergeCallback(**recipe)
    with pytest.warns(UserWarning, match=r"resumes after 6 optimizer steps from a checkpoint that was saved without"):
        fit(module, [callback], tmp_path, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert_as_plain(module.net, callback.merger, plain_loop(recipe, epochs=2))
