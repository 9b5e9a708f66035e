"""What could let an optimizer, a file or an evaluation see the weights of forward-only merging, and must not."""

import copy
import gc
import pickle

import pytest
import torch
from oracle import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from inmerge_fast import InMerge, NoEffectWarning, lease, merged
from inmerge_fast.lease import Lease, lease_of

DRAW = {"seed": 3, "step": 0}


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))


def loss_of(model):
    return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().mean()


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_restored(model, before):
    for own, expected in zip(model.parameters(), before, strict=True):
        assert_same_bits(own.detach(), expected)


def sgd(weights, rate=0.0):
    return torch.optim.SGD(weights, rate)


def attach():
    """A model that is merged, what it was, its optimizer, which changes nothing, and its InMerge."""
    model = make()
    before, optimizer = weights_of(model), sgd(model.parameters())
    merger = InMerge(model, lasting=False, seed=3).attach(optimizer)
    loss_of(model).backward()
    assert not torch.equal(model[2].weight, before[2])
    return model, before, optimizer, merger


@pytest.mark.parametrize("make_optimizer", [sgd, torch.optim.LBFGS])
def test_a_step_inside_the_block_is_refused_before_it_writes(make_optimizer):
    model = make()
    before, optimizer = weights_of(model), make_optimizer(model.parameters())
    step = optimizer.step if make_optimizer is sgd else lambda: optimizer.step(lambda: loss_of(model))
    with merged(model, **DRAW):
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match=r"^0 is merged .* that holds it is about to step"):
            step()
    assert_restored(model, before)


def test_a_step_of_other_weights_inside_the_block_is_taken():
    model, other = make(), nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    with merged(model, **DRAW):
        was = other.weight.detach().clone()
        sgd(other.parameters(), 1.0).step()
        assert lease_of(model[0].weight)
    assert not torch.equal(other.weight, was)


def test_averages_in_mid_step_are_of_the_weights_as_they_were():
    """Of a network that a second one's loss has called after its own step, for example."""
    model, before, _, merger = attach()
    average = AveragedModel(model)
    average.update_parameters(model)
    assert_restored(average.module, before)
    merger.detach()
    with (
        merged(model, **DRAW),
        pytest.raises(RuntimeError, match=r"0 is merged .* about to average .* after the merged"),
    ):
        average.update_parameters(model)
    assert_restored(average.module, before)
    average.update_parameters(model)


def test_a_block_in_the_same_block_is_refused_and_the_outer_one_goes_on():
    model = make()
    before, merger = weights_of(model), InMerge(model, lasting=False, seed=3)
    with merger.merged():
        with pytest.raises(RuntimeError, match=r"in a merged\(\) block already"), merger.merged():
            pass
        assert not torch.equal(model[2].weight, before[2])
    assert merger.step_count == 1
    assert_restored(model, before)
    with merger.merged():
        pass
    assert merger.step_count == 2


def test_an_interrupt_before_it_is_restored_leaves_that_to_the_step(monkeypatch):
    model, before, optimizer, merger = attach()

    def interrupted(self):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Lease, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        optimizer.step()
    optimizer.step()
    assert_restored(model, before)
    del error
    merger.detach()


def test_an_optimizer_that_it_is_not_attached_to_steps_from_the_weights_as_they_were():
    model, before, optimizer, merger = attach()
    sgd(model[:1].parameters()).step()
    assert_restored(model, before)
    optimizer.step()
    assert merger.step_count == 1


def test_hooks_before_a_step_see_the_weights_as_they_were():
    model = make()
    before, optimizer, seen = weights_of(model), sgd(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weights_of(model)))
    InMerge(model, lasting=False).attach(optimizer)
    loss_of(model).backward()
    optimizer.step()
    for own, expected in zip(seen[0], before, strict=True):
        assert_same_bits(own, expected)


def test_an_update_by_hand_is_noticed_at_the_next_forward_pass():
    model, before, *_ = attach()
    with torch.no_grad():
        model[0].weight.sub_(1)
    with pytest.raises(RuntimeError, match="^0: the weight was written to"):
        loss_of(model)
    assert_same_bits(model[2].weight.detach(), before[2])


def test_without_its_optimizer_it_lets_the_model_go():
    model, before, optimizer, _merger = attach()
    del optimizer
    gc.collect()
    with pytest.warns(NoEffectWarning, match="attached to is gone, and nothing is merged any more"):
        loss_of(model)
    assert_restored(model, before)
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("error")
def test_a_cell_of_a_notebook_can_be_run_again():
    model = make()
    for _ in range(2):
        optimizer = sgd(model.parameters())
        gc.collect()  # the last one is gone now, but its merger is not
        merger = InMerge(model, lasting=False).attach(optimizer)
        loss_of(model).backward()
        optimizer.step()
        loss_of(model).backward()
    assert merger.step_count == 1
    assert len(model._forward_pre_hooks) == 1


def test_a_block_that_is_never_left_restores_when_nobody_holds_it():
    model = make()
    before = weights_of(model)
    context = merged(model, **DRAW)
    context.__enter__()
    del context
    assert_restored(model, before)
    assert lease_of(model[0].weight) is None
    model[0].weight.data = model[0].weight.data.clone()
    loss_of(model)


def test_a_layer_is_not_pickled_while_it_is_merged():
    layer = nn.Conv2d(3, 8, 3)
    before, optimizer = weights_of(layer), sgd(layer.parameters())
    InMerge(layer, lasting=False).attach(optimizer)
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="this Conv2d is merged for a forward pass, and would be saved so"):
        pickle.dumps(layer)
    assert_restored(copy.deepcopy(layer), before)
    optimizer.step()
    assert_restored(pickle.loads(pickle.dumps(layer)), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model_sees_the_same_weights_twice(reentrant):
    model, seen = make(), []
    before = weights_of(model)
    model[2].register_forward_hook(lambda layer, *_: seen.append(layer.weight.detach().clone()))
    InMerge(model, lasting=False, seed=3).attach(optimizer := sgd(model.parameters()))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    optimizer.step()
    first, again = seen
    assert_same_bits(first, again)
    assert not torch.equal(first, before[2])


def test_a_part_of_the_model_is_evaluated_in_the_middle_of_a_step():
    model, before, optimizer, _merger = attach()
    merged_weight = model[2].weight.detach().clone()
    part = model[:3]
    part(torch.randn(1, 3, 8, 8)).sum().backward()  # in training mode it is part of the step
    assert_same_bits(model[2].weight.detach(), merged_weight)
    with torch.no_grad():
        part.eval()(torch.randn(1, 3, 8, 8))
    assert_restored(model, before)
    loss_of(model.train()).backward()
    assert_same_bits(model[2].weight.detach(), merged_weight)
    assert len(copy.deepcopy(model)[2]._forward_pre_hooks) == 1
    optimizer.step()
    assert_restored(model, before)
    assert not any(layer._forward_pre_hooks for layer in model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_that_is_held_in_evaluation_mode_trains_all_the_same(reentrant):
    """As a backbone whose batch norm is not to move, checkpointed or not."""

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            first, rest = (nn.Sequential(*layers) for layers in (list(self)[:3], list(self)[3:]))
            return rest(checkpoint(first, x, use_reentrant=reentrant))

    model, seen = Checkpointed(*make()), []
    before = weights_of(model)
    model[2].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    InMerge(model, lasting=False, seed=3).attach(optimizer := sgd(model.parameters()))
    for layer in list(model)[:3]:
        layer.eval()
    for _ in range(2):  # micro-batches
        model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    optimizer.step()
    assert len(seen) == 4
    for weight in seen[1:]:
        assert_same_bits(weight, seen[0])
    assert not torch.equal(seen[0], before[2])
    assert_restored(model, before)


def test_weights_lent_to_the_model_are_not_restored_over_and_its_own_are():
    model, before, *_ = attach()
    others = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    model.eval()
    with pytest.raises(RuntimeError, match="^0, 2: the weight was written to, moved or replaced"):
        torch.func.functional_call(model, others, (torch.randn(2, 3, 8, 8),))
    assert_restored(model, before)


def test_what_is_loaded_in_the_middle_of_a_step_is_loaded():
    model, before, *_ = attach()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    loss_of(model.eval())
    assert_restored(model, [weight + 1 for weight in before])


def test_a_compiled_model_is_evaluated_as_it_is_without_the_compiler():
    model = make()
    before, compiled = weights_of(model), torch.compile(model, backend="eager", fullgraph=True)
    InMerge(compiled, lasting=False).attach(optimizer := sgd(model.parameters()))
    for _ in range(2):
        loss_of(compiled).backward()
        assert not torch.equal(model[2].weight, before[2])
        optimizer.step()
        assert_restored(model, before)
    loss_of(compiled).backward()
    model.eval()
    with torch.no_grad():
        loss_of(model)
    assert_restored(model, before)


def test_what_a_run_measures_of_its_layers_is_of_the_weights_as_they_were():
    model, _, optimizer, merger = attach()
    merged_ranks = merger.effective_rank()
    assert lease_of(model[0].weight)
    optimizer.step()
    assert merged_ranks == merger.effective_rank()


@pytest.mark.parametrize("moment", ["merge", "restore"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_handler_may_save_at_any_moment(moment, when, monkeypatch):
    """Handlers run in the midst of a merge, as a cluster's that is about to end the job."""
    model = make()
    before, saved = weights_of(model), []

    def saving(write):
        def surrounded():
            if when == "after":
                write()
            saved.extend(value.clone() for value in model.state_dict().values())
            if when == "before":
                write()

        return surrounded

    context = merged(model, **DRAW)
    if moment == "restore":
        context.__enter__()
        monkeypatch.setattr(
            lease, "mark_written", lambda weights, real=lease.mark_written: saving(lambda: real(weights))()
        )
        context.__exit__(None, None, None)
    else:
        monkeypatch.setattr(
            lease, "mark_written", lambda weights, real=lease.mark_written: saving(lambda: real(weights))()
        )
        context.__enter__()
        monkeypatch.undo()
        context.__exit__(None, None, None)
    for own, expected in zip(saved, before, strict=True):
        assert_same_bits(own, expected)
    assert_restored(model, before)


class SaysItIsOnAGpu(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return True if function == torch.Tensor.is_cuda.__get__ else function(*arguments, **(keywords or {}))


def test_a_capture_is_refused_before_anything_is_written(monkeypatch):
    """Every replay would repeat one draw; the same on a GPU is in test_forward_only.py."""
    model = make()
    before, optimizer = weights_of(model), sgd(model.parameters())
    merger = InMerge(model, lasting=False).attach(optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for begin in (merged(model, **DRAW).__enter__, lambda: loss_of(model)):
        with SaysItIsOnAGpu(), pytest.raises(RuntimeError, match="graph is being captured: .* capture without it"):
            begin()
        assert lease_of(model[0].weight) is None
    monkeypatch.undo()
    assert_restored(model, before)
    loss_of(model)
    assert lease_of(model[0].weight) is not None
    merger.detach()


def test_an_interrupt_after_all_is_restored_is_not_taken_for_a_lost_update(monkeypatch):
    model, real = make(), lease.mark_written
    before, calls = weights_of(model), []

    def interrupted(weights):
        real(weights)
        calls.append(weights)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lease, "mark_written", interrupted)
    with pytest.raises(KeyboardInterrupt), merged(model, **DRAW):
        pass
    assert_restored(model, before)
    assert lease_of(model[0].weight) is None
