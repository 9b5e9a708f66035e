"""``merge_`` beside and inside torch.compile: a clean graph break, and never a lost write."""

import copy
import subprocess
import sys

import pytest
import torch
from oracle import assert_is_reference
from torch import nn

import inmerge_fast
from inmerge_fast import MergePlan
from inmerge_fast.dynamo import outside_dynamo

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


def test_where_nothing_is_compiled_dynamo_is_not_even_imported():
    """Importing it takes 2 s, and going through it 3.5 us per call."""
    code = (
        "import sys, torch, inmerge_fast; conv = torch.nn.Conv2d(3, 8, 3)\n"
        "inmerge_fast.merge_(conv, seed=0, step=0); inmerge_fast.InMerge(conv, seed=0).step()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_guard_itself_is_not_compiled():
    model = net()

    @torch.compile(backend="eager")
    def step(x):
        inmerge_fast.merge_(model, skip_first=0, seed=0, step=0)
        return model(x)

    step(torch.randn(1, 3, 12, 12))
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    assert entries(step._torchdynamo_orig_callable.__code__), "the function was compiled"
    for function in (inmerge_fast.merge_, inmerge_fast.merge_.__wrapped__):
        assert not entries(function.__code__)


@pytest.mark.parametrize("missing", ["get_eval_frame_callback", "set_code_exec_strategy", "_FrameExecStrategy"])
def test_without_pytorchs_private_functions_its_own_guard_is_taken(missing, monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.eval_frame, missing)
    guarded = outside_dynamo(lambda x: (x + 1, torch.compiler.is_compiling()))
    monkeypatch.undo()
    assert guarded(torch.zeros(1)) == (torch.ones(1), False)
    total, compiling = torch.compile(lambda x: guarded(x * 2), backend="eager")(torch.ones(1))
    assert (total.item(), compiling) == (3.0, False)


def test_fullgraph_says_why_it_cannot():
    model = net()

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        inmerge_fast.merge_(model, seed=0, step=0)
        return model(x)

    with pytest.raises(Exception, match="merge_"):
        step(torch.randn(1, 3, 12, 12))
