"""Every snippet of the README's section on training runs as it stands there."""

import re
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_training import net
from torch import nn
from torch.distributed.fsdp import fully_shard

import inmerge_fast

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Training with InMerge$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def snippet(mark):
    [found] = [text for text in SNIPPETS if mark in text]
    return found


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a training script has before the snippet."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential()
    model.features = net()
    model.body = nn.Module()
    model.body.downsample = nn.Sequential(nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 1))
    model.forward = model.features.forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "inmerge_fast": inmerge_fast, "torch": torch, "model": model, "optimizer": optimizer,
        "loader": [(torch.randn(4, 3, 9, 9), torch.arange(4))] * 3, "criterion": nn.CrossEntropyLoss(),
        "epochs": 2, "path": tmp_path / "state.pt", "fully_shard": fully_shard,
    }  # fmt: skip


def test_there_is_no_snippet_that_no_test_runs():
    marks = [
        ".preview()", "steps_per_epoch", "QuantileThreshold", "load_state_dict", "plot_merges",
        "integrations.lightning", "integrations.huggingface", "integrations.ignite", "fabric.setup", "fully_shard",
        "torch.cuda.graph",
    ]  # fmt: skip
    assert sorted(map(snippet, marks)) == sorted(SNIPPETS)


def test_the_plain_loop(names, capsys):
    exec(snippet(".preview()"), names)
    assert names["merger"].step_count == 6
    shown = capsys.readouterr().out
    assert "merges expected at step 0" in shown
    assert "6 optimizer steps: " in shown


def test_the_first_snippet_counts_the_steps_of_all_epochs(names):
    text = re.search(r"^```python\n(import inmerge_fast\n.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
    seen = []
    names["inmerge_fast"] = types.SimpleNamespace(merge_=lambda model, **how: seen.append(how["step"]))
    exec(text.replace("import inmerge_fast\n", ""), names)
    assert seen == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("mark", ["steps_per_epoch", "QuantileThreshold"])
def test_recipes(names, mark):
    merger = eval(snippet(mark).strip(), names)
    merger.step()
    assert merger.step_count == 1
    if mark == "steps_per_epoch":
        assert merger.plan.names == ["features.3", "features.5"]


def test_saving_and_resuming(names):
    names["merger"] = inmerge_fast.InMerge(names["model"])
    names["merger"].step()
    exec(snippet("load_state_dict"), names)
    assert names["merger"].step_count == 1


def test_looking_at_it(names, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    exec(snippet("plot_merges"), names)
    assert (tmp_path / "merges.png").exists()
    assert "body.downsample.1" in capsys.readouterr().out


def test_lightning(names, tmp_path):
    names["lightning"] = pytest.importorskip("lightning")
    exec(snippet("integrations.lightning"), names)
    for trainer, count in (("trainer", 1), ("trainer_of_a_gan", 2)):
        assert sum(isinstance(c, names["InMergeCallback"]) for c in names[trainer].callbacks) == count


def test_fabric(names):
    names["lightning"] = pytest.importorskip("lightning")
    exec(snippet("fabric.setup"), names)
    device = names["fabric"].device
    names["model"](torch.randn(4, 3, 9, 9, device=device)).sum().backward()
    names["optimizer"].step()
    assert names["merger"].step_count == 1


def test_huggingface(names):
    names["transformers"] = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    exec(snippet("integrations.huggingface"), names)
    assert any(isinstance(c, names["InMergeCallback"]) for c in names["trainer"].callback_handler.callbacks)


def test_ignite_and_monai(names):
    engine = pytest.importorskip("ignite.engine")
    names["monai"] = pytest.importorskip("monai", reason="no MONAI")
    pytest.importorskip("monai.engines")
    model, optimizer, data = names["model"], names["optimizer"], [torch.randn(4, 3, 9, 9)]
    names |= {
        "trainer": engine.create_supervised_trainer(
            model, optimizer, lambda out, _: out.sum(), prepare_batch=lambda batch, **_: (batch, batch)
        ),
        "loader": [{"image": x, "label": x} for x in data],
        "loss": lambda out, _: out.sum(),
        "device": "cpu",
    }
    exec(snippet("integrations.ignite"), names)
    names["trainer"].run(data)
    assert names["handler"].merger.step_count == 1
    names["monai_trainer"].run()


def test_fully_shard(names):
    names["model"] = net()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        names["fully_shard"] = lambda model: fully_shard(model, mesh=mesh)  # without a GPU it must be told where
        exec(snippet("fully_shard"), names)
    finally:
        dist.destroy_process_group()
    assert names["merger"].step_count == 1


@pytest.mark.gpu
def test_cuda_graphs(names):
    names["model"].cuda()
    exec(snippet("torch.cuda.graph"), names)
    assert names["merger"].step_count == 10
