"""The snippets of the README's section on forward-only merging, as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast.lease import lease_of

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Forward-only merging$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
WHOLE, BLOCK = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture
def names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    loader = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "inmerge_fast": inmerge_fast, "torch": torch, "model": model, "optimizer": optimizer, "loader": loader,
        "criterion": nn.CrossEntropyLoss(), "x": loader[0][0], "y": loader[0][1], "step": 0,
    }  # fmt: skip


def test_attached(names):
    exec(WHOLE, names)
    assert names["merger"].step_count == 3
    assert names["merger"].summary().merged > 0
    assert lease_of(names["model"][0].weight) is None
    seen = torch.cat([names["model"][0](x) for x, _ in names["loader"]])
    torch.testing.assert_close(names["model"][1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_block(names):
    before = names["model"][2].weight.detach().clone()
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.0)
    exec(BLOCK, names)
    assert torch.equal(names["model"][2].weight, before)
    assert names["model"][2].weight.grad is not None
