"""Every example trains in its quick form, and goes on from its checkpoint to the bit, with both forms of merging."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trainers import assert_same_weights

FOLDER = Path(__file__).parents[1] / "examples"
STEPS = 32  # of the quick form: two epochs of 512 images, two micro-batches of 16 a step
NEEDED = {"lightning": ["lightning"], "huggingface": ["transformers", "accelerate"], "accelerate": ["accelerate"],
          "monai": ["monai", "ignite"], "pytorch": []}  # fmt: skip
pytestmark = [
    # The frameworks' own: what they deprecate, how many workers they would like, that a run is short.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
    pytest.mark.filterwarnings("error::inmerge_fast.NoEffectWarning", "error::inmerge_fast.CollapseWarning"),
]


class StoppedError(Exception):
    """What interrupts a run."""


@pytest.fixture
def example(monkeypatch):
    """Imports an example by the name of its framework."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}

    def load(framework):
        for module in ["tensorboard", "sklearn", *NEEDED[framework]]:
            pytest.importorskip(module)
        return importlib.import_module(f"{framework}_resnet18")

    yield load
    for name in names:
        sys.modules.pop(name, None)
    if "accelerate" in sys.modules:
        state = sys.modules["accelerate"].state
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def run(module, *flags, stop_at=None):
    """The network after a run, which the optimizer step number ``stop_at`` interrupts."""
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise StoppedError

    hook = register_optimizer_step_pre_hook(count)
    try:
        return module.main(["--quick", *flags])
    finally:
        hook.remove()


def tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = set()
    for path in folder.rglob("events.out.*"):
        found |= set(EventAccumulator(str(path.parent)).Reload().Tags()["scalars"])
    return found


@pytest.mark.parametrize("flags", [[], ["--forward-only"]], ids=["lasting", "forward-only"])
@pytest.mark.parametrize("framework", NEEDED)
def test_trains_and_resumes_to_the_bit(framework, flags, example, tmp_path, capsys):
    module = example(framework)
    torch.manual_seed(1)
    whole = run(module, "--out", str(tmp_path / "whole"), *flags)
    summaries = re.findall(r"^\d+ optimizer steps: .*(?:\n.+)*", capsys.readouterr().out, re.MULTILINE)
    assert re.match(rf"{STEPS} optimizer steps: [1-9][\d,]* merges in [\d,]+ sampled", summaries[0])
    assert ("nothing of them is in the weights" in summaries[0]) == bool(flags)
    assert any(re.search(r"inmerge/(?:\w+/)?merged$", tag) for tag in tags(tmp_path / "whole"))

    half = str(tmp_path / "half")
    with pytest.raises(StoppedError):
        run(module, "--out", half, *flags, stop_at=STEPS // 2 + 3)
    torch.manual_seed(2)
    resumed = run(module, "--out", half, *flags, "--resume")
    summary = re.findall(r"^\d+ optimizer steps: .*(?:\n.+)*", capsys.readouterr().out, re.MULTILINE)[-1]
    assert summary == summaries[0]
    assert_same_weights(resumed, whole)


def test_the_network_learns_and_its_average_too(example, tmp_path):
    module = example("pytorch")
    network = run(module, "--out", str(tmp_path))
    common = sys.modules["common"]
    _, val_set, classes = common.load(common.arguments("", ["--quick", "--out", str(tmp_path)]))
    loader = torch.utils.data.DataLoader(val_set, 256)
    assert classes == 10
    assert module.evaluate(network, loader, torch.device("cpu")) > 0.6


def test_a_file_with_several_labels_per_image_is_refused(example, tmp_path):
    import numpy as np

    arrays = {}
    for split in ("train", "val", "test"):
        arrays |= {f"{split}_images": np.zeros((4, 28, 28), np.uint8), f"{split}_labels": np.zeros((4, 14), np.uint8)}
    np.savez(tmp_path / "many.npz", **arrays)
    with pytest.raises(ValueError, match="each image has 14 labels"):
        run(example("pytorch"), "--data", str(tmp_path / "many.npz"), "--out", str(tmp_path))
