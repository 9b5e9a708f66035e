"""Whatever device the caller has made the default one: tensors of ours say where they are."""

import ast
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

from inmerge_fast import DictLogger, InMerge, MergePlan, NoiseThreshold, QuantileThreshold, merge_, similarity
from inmerge_fast.effect import NO_EFFECT_CALLS

ROOT = Path(__file__).parents[1]
CONSTRUCTORS = {function.__name__ for function in _device_constructors()}


def net():
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 9, 3, groups=3), nn.Conv2d(9, 20, 1), nn.Linear(6, 7))


def everything(device, default):
    """All that a user may call under a default device, and what comes of it."""
    torch.manual_seed(0)
    model = net().to(device)
    found = []
    with torch.device(default):
        plan = MergePlan(model, skip_first=0, include_linear=True)
        for step, partner in enumerate(("random", "similar", "nearest")):
            stats = merge_(plan, seed=1, step=step, prob=0.7, threshold=0.05, partner=partner)
            stats.prefetch()
            found += [str(stats), stats.path]
        merge_(model[0].weight, prob=1.0, threshold=-1.0)  # draws its seed
        for threshold in (NoiseThreshold(0.1), QuantileThreshold(0.5), 0.1):
            log = DictLogger()
            merger = InMerge(model, threshold=threshold, loggers=[log], observe_every=1, skip_first=0)
            for _ in range(3):
                merger.step()
            merger.flush()
            found += [log.rows, merger.effective_rank()]
            InMerge(model, threshold=threshold, skip_first=0).load_state_dict(merger.state_dict())
        found.append(str(similarity(model)))
        alone = nn.Linear(4, 2, device=device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(NO_EFFECT_CALLS + 3):
                merge_(alone, seed=1, step=step, threshold=1.0)
        found.append(len(caught))
    return [*found, *(np.asarray(weight.detach().cpu()).tobytes() for weight in model.parameters())]


def test_calls_do_not_take_to_the_default_device(device):
    assert everything(device, "meta") == everything(device, "cpu")


@pytest.mark.gpu
def test_tensors_of_the_cpu_stay_there_where_the_gpu_is_the_default_device():
    torch.set_default_device("cuda")
    try:
        model = net().cpu()
        assert merge_(model, seed=1, step=0, prob=1.0, threshold=-1.0, skip_first=0).merged > 0
    finally:
        torch.set_default_device(None)


def makes_a_tensor(node):
    """Whether a syntax node calls one of the functions of ``torch`` that take to the default device."""
    called = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(called, ast.Attribute)
        and isinstance(called.value, ast.Name)
        and (called.value.id == "torch" and called.attr in CONSTRUCTORS)
    )


def test_every_tensor_that_is_made_says_where():
    """Also in calls that no test makes."""
    made = []
    for path in sorted((ROOT / "inmerge_fast").rglob("*.py")):
        calls = filter(makes_a_tensor, ast.walk(ast.parse(path.read_text())))
        made += [(f"{path.relative_to(ROOT)}:{call.lineno}", {word.arg for word in call.keywords}) for call in calls]
    assert len(made) > 10
    assert [place for place, words in made if "device" not in words] == []
