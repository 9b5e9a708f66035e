"""nnU-Net v2 itself, where it is installed: found by name, trained on a data set in its format, resumed, compiled.

It trains several processes on CUDA devices alone, so that its DDP is not run here.
"""

import functools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_ops
from PIL import Image
from trainers import assert_same_weights, hooks_of

from inmerge_fast import InMerge

pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: tests/frameworks.sh")
torchvision_ops.declare()

from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402

from inmerge_fast.integrations import nnunet  # noqa: E402

DATASET, EPOCHS, STEPS = "Dataset901_Squares", 3, 2
LASTING = {"threshold": -1.0, "prob": 0.5, "seed": 5}
FORWARD = {"lasting": False, "seed": 5}
BOTH = pytest.mark.parametrize("recipe", [LASTING, FORWARD], ids=["lasting", "forward-only"])
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::inmerge_fast.NoEffectWarning")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The environment after nnU-Net has planned and preprocessed six images of squares."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    folder = tmp_path_factory.mktemp("nnunet")
    names = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    environment = names | {"nnUNet_n_proc_DA": "1", "nnUNet_extTrainer": str(nnunet.SEARCH_PATH)}
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    raw, generator = folder / "raw" / DATASET, np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    for case in range(6):
        label = np.zeros((40, 40), np.uint8)
        y, x = generator.integers(5, 20, 2)
        label[y : y + 12, x : x + 12] = 1
        image = (label * 120 + generator.integers(0, 100, label.shape)).astype(np.uint8)
        Image.fromarray(image).save(raw / "imagesTr" / f"case_{case:03}_0000.png")
        Image.fromarray(label).save(raw / "labelsTr" / f"case_{case:03}.png")
    dataset = {"channel_names": {"0": "gray"}, "labels": {"background": 0, "square": 1}, "numTraining": 6}
    (raw / "dataset.json").write_text(json.dumps(dataset | {"file_ending": ".png"}))
    api.extract_fingerprints([901], num_processes=1)
    api.plan_experiments([901])
    api.preprocess([901], configurations=("2d",), num_processes=(1,))
    patch.setenv("nnUNet_n_proc_DA", "0")  # data are made in this process, in order
    yield folder
    patch.undo()


@pytest.fixture(autouse=True)
def results(prepared):
    shutil.rmtree(prepared / "results", ignore_errors=True)
    return prepared / "results"


def trainer_of(kind, recipe=None, resume=False, epochs=EPOCHS):
    """A trainer of a few steps, as nnUNetv2_train makes it; each epoch sets the random state."""

    class Short(kind):
        def on_epoch_start(self):
            super().on_epoch_start()
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(self.current_epoch)

    Short.__name__ = kind.__name__
    if recipe is not None:
        Short.inmerge = recipe
    folder = Path(os.environ["nnUNet_preprocessed"], DATASET)  # noqa: SIM112
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    torch.manual_seed(0)
    trainer = Short(plans | {"continue_training": resume}, "2d", 0, dataset, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, STEPS, 1
    trainer.save_every = 1
    maybe_load_checkpoint(trainer, resume, False)
    return trainer


def test_nnunet_finds_both_by_name():
    for name in ("nnUNetTrainerInMerge", "nnUNetTrainerInMergeForwardOnly"):
        found = get_trainer_from_args("901", "2d", 0, name, device=torch.device("cpu"))
        assert type(found) is getattr(nnunet, name)
        assert name in found.output_folder


def test_says_what_it_merges_and_gives_the_weights_of_steps_by_hand(results):
    trainer = trainer_of(nnunet.nnUNetTrainerInMerge, LASTING)
    trainer.run_training()
    assert trainer.merger.step_count == EPOCHS * STEPS
    assert hooks_of(trainer.optimizer) == 0
    [log] = (results / DATASET).rglob("training_log*.txt")
    text = log.read_text()
    assert str(trainer.merger.plan).splitlines()[0] in text
    assert text.count("sampled filters merged") == EPOCHS

    class ByHand(nnUNetTrainer):
        def on_train_start(self):
            super().on_train_start()
            self.merger = InMerge(self.network, **LASTING)

        def train_step(self, batch):
            result = super().train_step(batch)
            self.merger.step()
            return result

    plain = trainer_of(ByHand)
    plain.run_training()
    assert plain.merger.summary().merged == trainer.merger.summary().merged > 0
    assert_same_weights(trainer.network, plain.network)


@BOTH
def test_goes_on_to_the_bit_from_a_checkpoint(recipe):
    whole = trainer_of(nnunet.nnUNetTrainerInMerge, recipe)
    whole.run_training()
    shutil.rmtree(whole.output_folder)

    class Killed(Exception):  # noqa: N818
        pass

    first = trainer_of(nnunet.nnUNetTrainerInMerge, recipe)
    first.on_epoch_end = functools.partial(_end_and_raise, first, first.on_epoch_end, Killed)
    with pytest.raises(Killed):
        first.run_training()
    again = trainer_of(nnunet.nnUNetTrainerInMerge, recipe, resume=True)
    assert again.current_epoch == EPOCHS - 1
    again.run_training()
    assert again.merger.state_dict() == whole.merger.state_dict()
    assert_same_weights(again.network, whole.network)


def _end_and_raise(trainer, end, error):
    end()
    if trainer.current_epoch == EPOCHS - 1:
        raise error


@pytest.mark.filterwarnings("default::UserWarning")
def test_checkpoints_without_merging_and_with_it_are_taken_by_either():
    plain = trainer_of(nnUNetTrainer, epochs=1)
    plain.run_training()
    merging = trainer_of(nnunet.nnUNetTrainerInMerge, LASTING)
    merging.load_checkpoint(f"{plain.output_folder}/checkpoint_final.pth")
    with pytest.warns(UserWarning, match="after 2 optimizer steps .* saved without this nnUNetTrainerInMerge"):
        merging.run_training()
    assert merging.merger.step_count == EPOCHS * STEPS
    plain = trainer_of(nnUNetTrainer)
    plain.load_checkpoint(f"{merging.output_folder}/checkpoint_final.pth")
    assert_same_weights(plain.network, merging.network)


def test_a_compiled_network_gives_the_same_weights(monkeypatch):
    plain = trainer_of(nnunet.nnUNetTrainerInMerge, FORWARD, epochs=1)
    plain.run_training()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)  # it would not on a CPU
    compiled = trainer_of(nnunet.nnUNetTrainerInMerge, FORWARD, epochs=1)
    compiled.run_training()
    assert isinstance(compiled.network, torch._dynamo.OptimizedModule)
    assert compiled.merger.summary().merged == plain.merger.summary().merged > 0
    assert_same_weights(compiled.network._orig_mod, plain.network)


def test_wrong_arguments_surface_before_anything_is_trained():
    with pytest.raises(TypeError, match="unexpected argument 'treshold'; did you mean 'threshold'"):
        trainer_of(nnunet.nnUNetTrainerInMerge, {"treshold": 0.3})
