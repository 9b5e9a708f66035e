"""The callback in Hugging Face's Trainer: where its state goes, what it logs, and what is left attached."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from test_training import loss_of
from torch import nn
from trainers import (
    ALWAYS,
    BUDGET,
    DATA,
    RECIPE,
    STEPS,
    Batches,
    Classifier,
    assert_as_plain,
    assert_same_weights,
    hooks_of,
    huggingface_trainer,
    plain_loop,
)

from inmerge_fast import DictLogger, InMerge, RankBudget

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from inmerge_fast.integrations.huggingface import KEY, InMergeCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::inmerge_fast.NoEffectWarning"
)
SAVING = {"save_strategy": "steps", "save_steps": 3}


def saved_in(folder):
    return json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"].get(KEY)


def apart_from_logs(state):
    """A state without the rows on their way to the loggers: at the end of training they have arrived."""
    return {name: value for name, value in state.items() if name != "pending"}


def count_calls(monkeypatch):
    """The mergers that were called, once per call."""
    calls, real = [], InMerge._advance

    def counted(self, *arguments, **keywords):
        calls.append(self)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(InMerge, "_advance", counted)
    return calls


# ---------------------------------------------------------------------------------------------------------------- state


def test_gives_the_same_weights_and_resumes_from_wherever_the_trainer_does(tmp_path):
    plain = plain_loop()
    model, callback = Classifier(), InMergeCallback(**RECIPE)
    huggingface_trainer(model, [callback], tmp_path / "run", **SAVING).train()
    assert_as_plain(model.net, callback.merger, plain)
    state = json.loads(json.dumps(callback.merger.state_dict()))  # it has lists for tuples
    assert apart_from_logs(saved_in(tmp_path / "run" / "checkpoint-6")) == apart_from_logs(state)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "under another name")
    shutil.copytree(checkpoint, tmp_path / "last" / "checkpoint-3")
    for folder, resume in (
        ("run", str(checkpoint)),
        ("new", str(tmp_path / "elsewhere" / "under another name")),
        ("last", True),
    ):
        resumed, again = Classifier(), InMergeCallback(**RECIPE)
        trainer = huggingface_trainer(resumed, [again], tmp_path / folder)
        trainer.train(resume_from_checkpoint=resume)
        assert_as_plain(resumed.net, again.merger, plain)
        assert again.merger.state_dict() == callback.merger.state_dict()


def test_the_state_is_saved_by_whom_and_when_the_trainers_is(tmp_path, monkeypatch):
    callback = InMergeCallback(**RECIPE)
    trainer = huggingface_trainer(Classifier(), [callback], tmp_path, **SAVING)
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda _: False))
    trainer.train()
    assert not list(tmp_path.rglob("*inmerge*"))
    assert not list(tmp_path.rglob("trainer_state.json"))
    monkeypatch.undo()
    trainer.save_state()  # at any time
    assert saved_in(tmp_path) == json.loads(json.dumps(callback.merger.state_dict()))
    assert copy.deepcopy(trainer.state).stateful_callbacks[KEY] == callback.merger.state_dict()
    assert pickle.loads(pickle.dumps(trainer.state)).stateful_callbacks[KEY] == callback.merger.state_dict()


def test_callbacks_that_the_trainer_restores_itself_are_no_obstacle(tmp_path):
    """With this flag it constructs the callbacks of a checkpoint anew, from what it holds of their arguments."""
    patience = transformers.EarlyStoppingCallback
    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, **SAVING}
    model, callback = Classifier(), InMergeCallback(**RECIPE)
    huggingface_trainer(model, [callback, patience(5)], tmp_path, **evaluating).train()
    for flag in (True, False):
        resumed, again = Classifier(), InMergeCallback(**RECIPE)
        trainer = huggingface_trainer(resumed, [again, patience(7)], tmp_path,
                                      restore_callback_states_from_checkpoint=flag, **evaluating)  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert again.merger.state_dict() == callback.merger.state_dict()
        assert again in trainer.callback_handler.callbacks


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_callback_that_joins_later_counts_the_steps_before_it(tmp_path):
    huggingface_trainer(Classifier(), [], tmp_path, **SAVING).train()
    recipe = RECIPE | {"start": STEPS}
    model, callback = Classifier(), InMergeCallback(**recipe)
    trainer = huggingface_trainer(model, [callback], tmp_path, num_train_epochs=2)
    with pytest.warns(UserWarning, match=r"resumes after 6 optimizer steps from a checkpoint that was saved without"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_as_plain(model.net, callback.merger, plain_loop(recipe, epochs=2))


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_budget_is_told_its_steps_and_epochs_are_known(tmp_path):
    callback = InMergeCallback(**BUDGET, start=2)
    huggingface_trainer(Classifier(), [callback], tmp_path, num_train_epochs=2, **SAVING).train()
    assert callback.merger._run.recipe.merging_steps == 2 * STEPS - 2
    with pytest.warns(UserWarning, match=r"steps_per_epoch=12, but this trainer makes 6 optimizer steps per epoch"):
        huggingface_trainer(Classifier(), [InMergeCallback(steps_per_epoch=len(DATA), stop=2)], tmp_path / "b").train()
    longer = InMergeCallback(**BUDGET, start=2)
    trainer = huggingface_trainer(Classifier(), [longer], tmp_path, num_train_epochs=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert longer.merger._run.recipe.threshold == RankBudget(0.3, steps=4 * STEPS - 2)
    assert longer.merger.step_count == 4 * STEPS


def test_two_parts_have_a_callback_each(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = Classifier().net, Classifier().net

        def forward(self, x):
            return {"loss": loss_of(self.left, x) + loss_of(self.right, x)}

    def callbacks():
        return [InMergeCallback(target="left", **RECIPE), InMergeCallback(target="right", **RECIPE | {"prob": 0.9})]

    whole, pair = Two(), callbacks()
    trainer = huggingface_trainer(whole, pair, tmp_path, logging_strategy="steps", logging_steps=1, **SAVING)
    trainer.train()
    assert [callback.merger.step_count for callback in pair] == [STEPS, STEPS]
    tags = {tag for row in trainer.state.log_history for tag in row}
    assert {"inmerge/left/merged", "inmerge/right/merged", "inmerge/right/3/merged"} <= tags
    model, resumed = Two(), callbacks()
    huggingface_trainer(model, resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(model, whole)
    assert pair[0].merger.state_dict() == resumed[0].merger.state_dict() != resumed[1].merger.state_dict()
    same = [InMergeCallback(target="left", **RECIPE) for _ in range(2)]
    with pytest.raises(ValueError, match=r"two InMergeCallbacks with target='left', which would merge twice per step"):
        huggingface_trainer(Two(), same, tmp_path).train()


# --------------------------------------------------------------------------------------------------------- several runs


def test_train_twice_merges_once_per_step(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    callback = InMergeCallback(**ALWAYS)
    trainer = huggingface_trainer(Classifier(), [callback], tmp_path)
    for _ in range(2):
        calls.clear()
        trainer.train()
        assert calls == [callback.merger] * STEPS
        assert hooks_of(trainer.optimizer.optimizer) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no more memory")])
def test_train_after_an_interrupted_one_merges_once_per_step(tmp_path, monkeypatch, error):
    calls = count_calls(monkeypatch)
    model, callback = Classifier(), InMergeCallback(**ALWAYS)
    trainer = huggingface_trainer(model, [callback], tmp_path, data=Batches(7, error))
    with pytest.raises(type(error)):
        trainer.train()
    interrupted = callback.merger
    calls.clear()
    trainer.train()
    assert calls == [callback.merger] * STEPS
    assert callback.merger is not interrupted
    assert not interrupted.attached
    assert not callback.merger.attached

    trainer.train_dataset = Batches(7, error)  # and with a new Trainer, as where a notebook's cell is run again
    with pytest.raises(type(error)):
        trainer.train()
    other = InMergeCallback(**ALWAYS)
    again = huggingface_trainer(model, [other], tmp_path)
    again.optimizer = trainer.optimizer.optimizer
    calls.clear()
    again.train()
    assert calls == [other.merger] * STEPS
    assert not callback.merger.attached


def test_auto_find_batch_size_merges_once_per_step(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    model, callback = Classifier(), InMergeCallback(**ALWAYS)
    model.largest = 8  # of 4 rows each
    arguments = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = huggingface_trainer(model, [callback], tmp_path, **arguments)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert calls == [callback.merger] * STEPS
    assert hooks_of(trainer.optimizer.optimizer) == 0


def test_the_best_model_is_loaded_and_left_as_it_is(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, **SAVING}
    evaluating |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first one
    model, callback = Classifier(), InMergeCallback(**ALWAYS)
    trainer = huggingface_trainer(model, [callback], tmp_path, **evaluating)
    trainer.train()
    from safetensors.torch import load_file

    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-3")
    kept = load_file(f"{best}/model.safetensors")
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value)
    assert callback.merger.step_count == STEPS
    assert not callback.merger.attached


def test_a_hyperparameter_search_merges_each_trials_model(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    calls, mergers, models = count_calls(monkeypatch), [], []

    def new_model(trial):
        models.append(Classifier())
        return models[-1]

    class Watch(InMergeCallback):
        def on_train_end(self, *arguments, **keywords):
            super().on_train_end(*arguments, **keywords)
            mergers.append(self.merger)

    trainer = huggingface_trainer(new_model, [Watch(**RECIPE)], tmp_path, eval_strategy="epoch", **SAVING)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"num_train_epochs": trial.suggest_int("num_train_epochs", 1, 2)},
        backend="optuna", n_trials=3,
    )  # fmt: skip
    assert len({id(merger) for merger in mergers}) == 3
    for number, (merger, model) in enumerate(zip(mergers, models[-3:], strict=True)):
        assert not merger.attached
        assert calls.count(merger) == merger.step_count in (STEPS, 2 * STEPS)
        assert_as_plain(model.net, merger, plain_loop(RECIPE, merger.step_count // STEPS))
        saved = saved_in(tmp_path / f"run-{number}" / f"checkpoint-{merger.step_count}")
        assert apart_from_logs(saved) == apart_from_logs(json.loads(json.dumps(merger.state_dict())))


# ----------------------------------------------------------------------------------------------------------------- logs


class Reports(transformers.TrainerCallback):
    """As what ``report_to`` names: it stands before the user's own callbacks."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def test_what_is_observed_is_logged_with_the_trainers_losses(tmp_path, capsys):
    log, reports = DictLogger(), Reports()
    callback = InMergeCallback(loggers=[log], observe_every=1, **RECIPE)
    trainer = huggingface_trainer(Classifier(), [reports, callback], tmp_path, logging_strategy="steps",
                                  logging_steps=2)  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "inmerge/merged" in row]
    assert [(row["step"], row["inmerge/step"]) for row in rows] == [(4, 3), (6, 5)]  # of the first, nothing merged yet
    by_step = {row["step"]: row for row in log.rows}
    for row in rows:
        seen = by_step[row["inmerge/step"]]
        assert row["inmerge/merged"] == seen["merged"] > 0
        assert row["inmerge/net.3/mean_similarity"] == seen["layers"]["net.3"]["mean_similarity"]
    assert [step for step, logs in reports.logged if "inmerge/merged" in logs] == [4, 6]
    assert [row["step"] for row in log.rows] == [2, 3, 4, 5]
    assert "'loss'" in (printed := capsys.readouterr().out)
    assert "inmerge" not in printed
    assert len(trainer.callback_handler.callbacks) == len(set(trainer.callback_handler.callbacks))


def test_without_losses_the_last_row_is_logged_at_the_end(tmp_path):
    trainer = huggingface_trainer(Classifier(), [InMergeCallback(**RECIPE)], tmp_path)
    trainer.train()
    [row] = [row for row in trainer.state.log_history if "inmerge/merged" in row]
    assert row["step"] == STEPS


def test_a_trainers_own_log_is_used(tmp_path):
    seen = []
    trainer = huggingface_trainer(Classifier(), [InMergeCallback(**RECIPE)], tmp_path)
    kind = type(trainer)
    kind.log = lambda self, logs, *rest: (seen.append(set(logs)), super(kind, self).log(logs, *rest))[1]
    trainer.train()
    assert any("inmerge/merged" in logs for logs in seen)
