"""``InMerge`` beside torch.compile, AMP and EMA: nothing is recompiled, nothing is lost."""

import pytest
import torch
from oracle import assert_same_bits
from test_training import SETTINGS, batches, loss_of, net, optimizer_of

from inmerge_fast import InMerge

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # Dynamo asks the input of a compiled part for its gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["model", "part", "in place"])
def test_nothing_is_recompiled_and_the_merge_is_seen(what):
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    names = InMerge(model, **SETTINGS).plan.names
    compiled = model
    if what == "model":
        compiled = torch.compile(model, backend="aot_eager")
    elif what == "part":
        model[3] = torch.compile(model[3], backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    optimizer = optimizer_of("sgd", model)
    merger = InMerge(compiled, **SETTINGS, guard=None).attach(optimizer)
    assert merger.plan.names == names, "without _orig_mod."
    plain_optimizer, plain = optimizer_of("sgd", twin), InMerge(twin, **SETTINGS, guard=None)
    data = batches(14)  # more than Dynamo's limit of 8 recompilations

    def step(x):
        loss_of(compiled, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(twin, x).backward()
        plain_optimizer.step()
        plain.step()
        plain_optimizer.zero_grad()

    step(data[0])
    step(data[1])  # by now the momentum exists
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in data[2:]:
            step(x)
    assert merger.step_count == 14
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name.replace("3.", "3._orig_mod.") if what == "part" else name], value
        )


def test_called_inside_a_compiled_function_it_breaks_the_graph_and_merges():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    merger, plain = InMerge(model, **SETTINGS), InMerge(twin, **SETTINGS)
    x = batches(1)[0]

    @torch.compile(backend="aot_eager")
    def step(x):
        merger.step()
        return loss_of(model, x)

    with torch.no_grad():
        for _ in range(3):
            loss = step(x)
            plain.step()
            torch.testing.assert_close(loss, loss_of(twin, x))
    assert merger.step_count == 3
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(own, other)
