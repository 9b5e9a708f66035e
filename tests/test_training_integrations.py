"""What the callbacks share, and the frameworks that need none."""

import copy
import inspect
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from test_training import loss_of, net
from torch import nn
from trainers import ACCUMULATE, BUDGET, DATA, RECIPE, assert_as_plain, plain_loop

import inmerge_fast
from inmerge_fast import InMerge
from inmerge_fast.training.arguments import InMergeArguments

ROOT = Path(__file__).parents[1]
FRAMEWORKS = [("lightning", "lightning"), ("huggingface", "transformers")]


@pytest.fixture(params=FRAMEWORKS, ids=[name for name, _ in FRAMEWORKS])
def callback_class(request):
    name, needed = request.param
    pytest.importorskip(needed)
    return __import__(f"inmerge_fast.integrations.{name}", fromlist=["InMergeCallback"]).InMergeCallback


# ------------------------------------------------------------------------------------------------------------ arguments


def test_the_arguments_by_name_are_those_of_inmerge():
    own = {name: kind for name, kind in InMerge.__init__.__annotations__.items() if name not in ("model", "return")}
    by_name = InMergeArguments.__annotations__.items()
    assert {name: getattr(kind, "__forward_arg__", kind) for name, kind in by_name} == own
    assert not InMergeArguments.__required_keys__
    assert inspect.signature(InMerge).parameters.keys() == {"model", *own}


def test_a_typo_surfaces_where_it_is_written(callback_class):
    with pytest.raises(TypeError, match=r"unexpected argument 'treshold'; did you mean 'threshold'\?"):
        callback_class(treshold=0.3)
    with pytest.raises(TypeError, match=r"unexpected argument 'qqq'; it takes alpha, prob, threshold, "):
        callback_class(qqq=1)
    assert set(typing.get_type_hints(callback_class.__init__)) >= {"target", "keep", "recipe"}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prob": 2}, ValueError, "prob must"),
        ({"threshold": "high"}, TypeError, "threshold must"),
        ({"seed": -1}, ValueError, "seed must"),
        ({"every": 0}, ValueError, "every must"),
        ({"start": 3, "stop": 2}, ValueError, "stop must be after start"),
        ({"start": 1.5}, TypeError, "start must be an int"),
        ({"skip_first": 1.5}, ValueError, "skip_first"),
        ({"include_linear": 1}, TypeError, "include_linear must be a bool"),
        ({"guard": 0.1}, TypeError, "guard must be"),
        ({"loggers": [3]}, TypeError, "loggers must be callable"),
        ({"observe_every": 0}, ValueError, "observe_every must"),
        ({"partner": "furthest"}, ValueError, "partner must"),
        ({"target": 3}, TypeError, "target must be the name of a part"),
        ({"keep": ["tau"]}, ValueError, "keep must name arguments"),
    ],
)
def test_a_wrong_value_surfaces_where_it_is_written(callback_class, wrong, error, message):
    with pytest.raises(error, match=message):
        callback_class(**wrong)


def test_a_framework_that_is_missing_broken_too_old_or_too_new_says_what_to_install(monkeypatch, tmp_path):
    from inmerge_fast.integrations import common

    monkeypatch.setitem(common.OLDEST, "torch", ("9.5", "some"))
    message = r"torch >= 9.5 is needed, and [\d.]+\S* is installed: pip install 'inmerge_fast\[some\]'"
    with pytest.raises(ImportError, match=message):
        common.require("torch", "torch")
    monkeypatch.setitem(common.OLDEST, "nowhere", ("1", "some"))
    with pytest.raises(
        ImportError, match=r"nowhere >= 1 is needed and cannot be imported \(No module named 'no_such'\)"
    ):
        common.require("nowhere", "no_such")
    common.require("nowhere", "torch")  # no distribution tells its release
    # Too new: what is used is not there any more. A package of its own that it misses is another matter.
    monkeypatch.setitem(common.OLDEST, "torch", ("1.5", "some"))
    message = (
        r"torch [\d.]+\S* has no torch\.{} \(.*\), which torch 1\.5 has: it is too new.*pip install 'torch>=1\.5,<"
    )
    for name, said in (
        ("torch:NoSuch", "NoSuch"),
        ("torch.nn:Module.gone", r"nn\.Module\.gone"),
        ("torch.gone:A", r"gone\.A"),
    ):
        with pytest.raises(ImportError, match=message.format(said)):
            common.require("torch", "torch:Tensor", name)
    (tmp_path / "half_there").mkdir()
    (tmp_path / "half_there" / "__init__.py").write_text("")
    (tmp_path / "half_there" / "part.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"nowhere >= 1 is needed and cannot be imported .*no_such_dependency.*\[some\]"
    ):
        common.require("nowhere", "half_there.part:Thing")
    monkeypatch.setitem(common.OLDEST, "torch", ("2.9", "some"))  # which is older than 2.10
    monkeypatch.setattr(common.importlib.metadata, "version", lambda _: "2.10.0a0+git")
    common.require("torch", "torch")


def test_the_oldest_releases_are_those_that_pip_is_told():
    from inmerge_fast.integrations.common import OLDEST

    declared = (ROOT / "pyproject.toml").read_text()
    for distribution, (oldest, extra) in OLDEST.items():
        if distribution != "pytorch-lightning":  # the same code; the extra installs the other name
            line = next(line for line in declared.splitlines() if line.startswith(f"{extra} = "))
            assert f'"{distribution}>={oldest}"' in line


def test_only_lightning_has_several_optimizers():
    pytest.importorskip("lightning")
    from inmerge_fast.integrations.lightning import InMergeCallback

    for wrong in (-1, 0.0, True):
        with pytest.raises(TypeError, match="optimizer must be the index"):
            InMergeCallback(optimizer=wrong)


SNIPPET = """
import inmerge_fast
from inmerge_fast.integrations.{name} import InMergeCallback

InMergeCallback(threshold=inmerge_fast.RankBudget(), prob=0.3, skip_first=["a"], target="net", loggers=[print])
InMergeCallback(treshold=0.3)
InMergeCallback(partner=3)
InMergeCallback(keep=0)
"""


def test_a_type_checker_sees_the_arguments(tmp_path):
    pytest.importorskip("mypy")
    for name, _ in FRAMEWORKS:
        (tmp_path / f"uses_{name}.py").write_text(SNIPPET.format(name=name))
    files = [tmp_path / f"uses_{name}.py" for name, _ in FRAMEWORKS]
    command = [sys.executable, "-m", "mypy", *files]  # with the project's settings
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if "uses_" in line and ": error:" in line]
    assert len(errors) == 3 * len(files), done.stdout + done.stderr
    for file in files:
        found = "\n".join(line for line in errors if f"{file.name}:" in line)
        assert 'Unexpected keyword argument "treshold" for "InMergeCallback"' in found, done.stdout
        assert 'Argument "partner" to "InMergeCallback" has incompatible type "Literal[3]"' in found, done.stdout
        assert 'Argument "keep" to "InMergeCallback" has incompatible type "int"' in found, done.stdout


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_the_arguments_and_no_run(callback_class, how):
    callback = callback_class(**RECIPE, target="net", keep=["alpha"])
    callback.merger = InMerge(plain_loop()[0])
    twin = how(callback)
    assert twin.merger is None
    assert callback.merger is not None
    assert twin._blueprint.recipe == callback._blueprint.recipe == RECIPE
    assert twin._blueprint.label == "net"


def test_parts_are_named():
    from inmerge_fast.integrations.common import Blueprint

    model = nn.ModuleDict({"generator": nn.Sequential(nn.Conv2d(3, 8, 3)), "critic": nn.Conv2d(3, 8, 3)})
    assert Blueprint(None, (), RECIPE).part(model) == (model, "inmerge")
    assert Blueprint("generator", (), RECIPE).part(model) == (model["generator"], "inmerge/generator")
    assert Blueprint(lambda m: m["critic"], (), RECIPE).part(model) == (model["critic"], "inmerge/critic")
    with pytest.raises(
        ValueError, match=r"target='critics' is no part of the model, whose parts are generator, critic"
    ):
        Blueprint("critics", (), RECIPE).part(model)
    with pytest.raises(ValueError, match=r"target must return a module, a part of the model, and returned 3"):
        Blueprint(lambda _: 3, (), RECIPE).part(model)


def test_each_run_has_a_guard_of_its_own():
    from inmerge_fast.integrations.common import Blueprint

    guard = inmerge_fast.CollapseGuard(loss=0.2)
    blueprint = Blueprint(None, (), {**BUDGET, "stop": 5, "guard": guard})
    mergers = [blueprint.merger(plain_loop()[0], 10, None, []) for _ in range(2)]
    guards = [merger._run.guard for merger in mergers]
    assert guards[0].loss == guards[1].loss == 0.2
    guards[0]._warned.add("3")
    assert guards[1].state_dict() == guard.state_dict() == {"warned": []}


# ------------------------------------------------------------------------------------------------ without a callback


@pytest.mark.filterwarnings("ignore")
def test_fabric_gives_the_same_weights_as_a_plain_loop():
    """The README's two lines."""
    lightning = pytest.importorskip("lightning")
    fabric, plain = lightning.Fabric(accelerator="cpu", devices=1), plain_loop()
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    merger = InMerge(model, **RECIPE).attach(optimizer)
    for index, x in enumerate(DATA):
        accumulating = index % ACCUMULATE != ACCUMULATE - 1
        with fabric.no_backward_sync(model, enabled=accumulating):
            fabric.backward(loss_of(model, x) / ACCUMULATE)
        if not accumulating:
            optimizer.step()
            optimizer.zero_grad()
    assert_as_plain(model.module, merger, plain)
