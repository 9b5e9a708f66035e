"""``merge_`` beside and inside torch.compile: a clean graph break, and never a lost write."""

import copy

import pytest
import torch
from oracle import assert_is_reference
from torch import nn

import inmerge_fast
from inmerge_fast import MergePlan

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_merge_inside_the_compiled_region_is_not_lost(full_device, backend):
    """Inductor loses a partial in-place write to a weight that is traced into the graph."""
    model = net().to(full_device)
    x = torch.randn(2, 3, 12, 12, device=full_device)
    results = []

    def step(index):
        stats = inmerge_fast.merge_(model, skip_first=0, prob=0.5, threshold=-1.0, seed=3, step=index)
        results.append(stats.merged)
        return model(x).square().mean()

    compiled = torch.compile(step, backend=backend)
    for index in range(12):  # more than Dynamo's limit of 8 recompilations
        before = [model[i].weight.detach().clone() for i in (0, 2)]
        loss = compiled(index)
        for layer, (i, old) in enumerate(zip((0, 2), before, strict=True)):
            assert_is_reference(
                old, model[i].weight, seed=3, step=index, layer=layer, prob=0.5, alpha=0.8, threshold=-1.0
            )
        torch.testing.assert_close(loss, model(x).square().mean(), rtol=1e-5, atol=1e-6)
        loss.backward()
        assert model[0].weight.grad is not None
        model.zero_grad()
    assert len(results) == 12
    assert sum(results) > 0


def test_a_merge_between_steps_is_seen_by_the_compiled_model_without_recompiling(full_device):
    model = net().to(full_device)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 3, 12, 12, device=full_device)
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            inmerge_fast.merge_(compiled, skip_first=0, prob=1.0, threshold=-1.0, seed=3, step=step)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
            compiled(x).sum().backward()


def test_names_do_not_show_the_compile_wrapper():
    compiled = torch.compile(net(), backend="eager")
    plan = MergePlan(compiled, skip_first=0, exclude="0")
    assert [layer.name for layer in plan.layers] == ["2"]


def test_a_merge_between_compiled_forward_and_backward_never_gives_a_wrong_gradient(full_device):
    """It raises, or the graph had saved its own copy and the gradient is that of the forward that ran."""
    model = net().to(full_device)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 12, 12, device=full_device)
    loss = torch.compile(model, backend="inductor")(x).square().sum()
    inmerge_fast.merge_(model, skip_first=0, prob=1.0, threshold=-1.0, seed=3, step=0)
    twin(x).square().sum().backward()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_fullgraph_says_why_it_cannot():
    model = net()

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        inmerge_fast.merge_(model, seed=0, step=0)
        return model(x)

    with pytest.raises(Exception, match="merge_"):
        step(torch.randn(1, 3, 12, 12))
