"""The page of recipes: every block is run as it stands, with the real library, in both forms of merging."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision_ops
from oracle import assert_same_bits

import inmerge_fast
from inmerge_fast import InMerge, RankBudget

PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"
NEEDS = {
    "Plain PyTorch": (),
    "Lightning": ("lightning",),
    "Hugging Face Trainer": ("transformers", "accelerate"),
    "Ignite": ("ignite",),
    "MONAI": ("monai", "ignite"),
    "nnU-Net v2": ("nnunetv2",),
    "accelerate": ("accelerate",),
    "timm": ("timm",),
    "torchxrayvision": ("torchxrayvision",),
}
FORMS = {"lasting": {"threshold": RankBudget()}, "forward-only": {"lasting": False}}
SAMPLED = {
    "lasting": {"threshold": -1.0, "prob": 0.5, "skip_first": 0, "guard": None},
    "forward-only": FORMS["forward-only"],
}
pytestmark = [pytest.mark.filterwarnings("ignore")]
torchvision_ops.declare()


def blocks(text):
    """``(heading, language, code)`` of every block, in order."""
    heading, found = "", []
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        else:
            found.append((heading, match[2], match[3]))
    return found


BLOCKS = blocks(PAGE.read_text())
PYTHON = [(heading, code) for heading, language, code in BLOCKS if language == "python" and heading]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A folder of their own for what trainers write, and no state of accelerate from one to the next."""
    monkeypatch.chdir(tmp_path)
    yield
    if "accelerate" in sys.modules:
        state = sys.modules["accelerate"].state
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def run(heading, code, merging):
    """The names that a block leaves behind."""
    for package in NEEDS[heading]:
        pytest.importorskip(package)
    names = {"__name__": "recipe"}
    [(_, _, first)] = [block for block in BLOCKS if not block[0]]
    exec(compile(first, f"{PAGE.name}, first block", "exec"), names)
    assert names["merging"] == FORMS["lasting"]
    names["merging"] = merging
    exec(compile(code, f"{PAGE.name}, {heading}", "exec"), names)
    return names


def test_every_block_is_known():
    assert [heading for heading in dict.fromkeys(heading for heading, _, _ in BLOCKS) if heading] == list(NEEDS)
    languages = {language for _, language, _ in BLOCKS}
    assert languages == {"python", "json", "bash"}
    assert len(PYTHON) == len(NEEDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heading", "code"), PYTHON, ids=[heading for heading, _ in PYTHON])
def test_a_block_runs_as_it_stands(heading, code, form):
    names = run(heading, code, FORMS[form])
    if heading == "nnU-Net v2":  # a class, which test_framework_nnunet.py trains with
        assert names["nnUNetTrainerInMergeMine"].inmerge == {**FORMS[form], "seed": 7}
        return
    merger = names["merger"]
    assert isinstance(merger, InMerge)
    assert merger.step_count == (2 if heading == "torchxrayvision" else 8)
    assert not merger.attached
    counted = merger._run.counted_by_layer().values()
    if form == "forward-only":
        assert sum(merged for _, merged in counted) > 0
    else:
        assert sum(sampled for sampled, _ in counted) > 0


SAME = ("Lightning", "Ignite", "MONAI", "accelerate")  # which take the data in the order of the loader


@pytest.mark.parametrize("form", SAMPLED)
@pytest.mark.parametrize("heading", SAME)
def test_the_same_recipe_gives_the_same_weights(heading, form):
    code = dict(PYTHON)
    plain = run("Plain PyTorch", code["Plain PyTorch"], SAMPLED[form])
    names = run(heading, code[heading], SAMPLED[form])
    assert plain["merger"].summary().merged > 0
    for name, value in plain["model"].state_dict().items():
        assert_same_bits(names["model"].state_dict()[name], value, f"{heading}: {name}")


@pytest.mark.parametrize("form", FORMS)
def test_the_bundle_runs(form):
    bundle = pytest.importorskip("monai.bundle")
    [config] = [json.loads(code) for _, language, code in BLOCKS if language == "json"]
    if form == "forward-only":
        del config["inmerge"]["threshold"]
        config["inmerge"]["lasting"] = False
    parser = bundle.ConfigParser(config)
    parser.get_parsed_content("trainer").run()
    merger = parser.get_parsed_content("inmerge").merger
    assert merger.step_count == 8
    assert merger.plan.heads == ("model.2.conv",)
    assert ("lasting=False" in repr(merger)) == (form == "forward-only")
    if form == "forward-only":
        assert merger.summary().merged > 0


def test_the_commands_name_what_nnunet_finds(monkeypatch):
    pytest.importorskip("nnunetv2")
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    [code] = [code for _, language, code in BLOCKS if language == "bash"]
    first, second = code.splitlines()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # its python is this one
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1]), "PATH": path}
    asked = f"{first}; echo $nnUNet_extTrainer"
    folder = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=environment, check=True)
    monkeypatch.setenv("nnUNet_extTrainer", folder.stdout.strip())
    wanted = re.findall(r"nnUNetTrainer\w+", second)
    assert len(wanted) == 2
    for name in wanted:
        assert issubclass(recursive_find_trainer_class_by_name(name), nnUNetTrainer)


def test_what_the_page_says_of_its_words():
    """Both forms are explained before any recipe, and the switches that it names are arguments."""
    text = PAGE.read_text()
    before = text[: text.index("## Plain PyTorch")]
    assert "**lasting merging**" in before
    assert "**forward-only merging**" in before
    for name in re.findall(r"`(include_\w+)=True`", text):
        assert name in inmerge_fast.InMerge.__init__.__kwdefaults__
