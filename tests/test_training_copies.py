"""Copies of models: those that hold an InMerge, and averages of weights, which are not to be merged."""

import copy
import io
import pickle

import pytest
import torch
from oracle import assert_same_bits, untouched
from test_training import batches, loss_of, net, optimizer_of
from torch import nn

from inmerge_fast import CollapseGuard, DictLogger, InMerge, NoiseThreshold, QuantileThreshold, RankBudget, linear

SETTINGS = {"prob": 0.8, "skip_first": 0}
RECIPES = {
    "number": {"threshold": 0.0, "guard": None, "seed": 5},
    "schedules": {"threshold": linear(0.1, -0.2, end=30), "alpha": linear(0.9, 0.5, end=30), "every": 2, "start": 1},
    "noise": {"threshold": NoiseThreshold(0.5), "guard": CollapseGuard(0.05)},
    "quantile": {"threshold": QuantileThreshold(0.3, every=7)},
    "budget": {"threshold": RankBudget(0.5, every=5), "stop": 60},
    "by layer": {"threshold": {"0": 0.0, "3": -0.1, "5": 0.1}},
}


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def steps(model, optimizer, merger, data):
    for x in data:
        loss_of(model, x).backward()
        optimizer.step()
        if not merger.attached:
            merger.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::inmerge_fast.CollapseWarning")
@pytest.mark.parametrize("by", [copy.deepcopy, saved], ids=["deep copy", "torch.save"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_copy_of_a_model_with_its_inmerge_goes_on_as_the_original(name, by):
    """Bit for bit; and neither disturbs the other."""
    torch.manual_seed(0)
    model = net()
    log = DictLogger()
    merger = model.merger = InMerge(model, loggers=[log], **SETTINGS, **RECIPES[name])
    optimizer = optimizer_of("sgd", model)
    merger.attach(optimizer)
    data = batches(40)
    steps(model, optimizer, merger, data[:20])
    twin = by(model)
    rows = len(log.rows)
    assert not twin.merger.attached
    assert merger.attached
    assert twin.merger.step_count == 20
    other = optimizer_of("sgd", twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check = untouched(model)
    steps(twin, other, twin.merger, data[20:])
    check()
    assert len(log.rows) == rows
    again = by(twin).merger
    steps(model, optimizer, merger, data[20:])
    for key, value in model.state_dict().items():
        assert_same_bits(twin.state_dict()[key], value, key)
    states = [one.state_dict() for one in (merger, twin.merger, again)]
    for state in states:
        del state["pending"]
    assert states[0] == states[1] == states[2]
    assert twin.merger.plan.layers[0].weight is twin[0].weight
    assert merger.plan.layers[0].weight is model[0].weight


def test_a_copy_that_is_never_used_plans_nothing(monkeypatch):
    model = net()
    model.merger = InMerge(model, **SETTINGS)
    model.merger.step()
    monkeypatch.setattr("inmerge_fast.training.run.MergePlan", None)
    average = torch.optim.swa_utils.AveragedModel(model)
    twice = pickle.loads(pickle.dumps(copy.deepcopy(average)))
    assert twice.module.merger.step_count == 1


def test_a_copy_whose_layers_are_not_there_yet_goes_on_when_they_are():
    model = net()
    merger = InMerge(model, threshold=-1.0, **SETTINGS)
    merger.step()
    twin = copy.deepcopy(merger)
    layers = [twin._run.model.pop(0) for _ in range(9)]
    with pytest.raises(ValueError, match="no convolution found"):
        twin.step()
    assert twin.step_count == 1
    for layer in layers:
        twin._run.model.append(layer)
    assert twin.step().merged > 0
    assert twin.step_count == 2


def test_a_shallow_copy_merges_the_same_model_by_itself():
    model = net()
    merger = InMerge(model, threshold=-1.0, **SETTINGS).attach(optimizer := optimizer_of("sgd", model))
    other = copy.copy(merger)
    optimizer.step()
    assert (merger.step_count, other.step_count) == (1, 0)
    with pytest.warns(UserWarning, match="another InMerge was attached .* and has been detached"):
        other.step()
    assert (merger.step_count, other.step_count, merger.attached) == (1, 1, False)
    assert other.plan.layers[0].weight is model[0].weight


def test_a_holder_of_an_inmerge_is_copied_with_the_model():
    class Callback:
        def __init__(self, model):
            self.merger = InMerge(model, threshold=-1.0, **SETTINGS)

    model = net()
    callback = Callback(model)
    twin, copied = copy.deepcopy((model, callback))
    check = untouched(model)
    assert copied.merger.step().merged > 0
    check()
    assert copied.merger.plan.layers[0].weight is twin[0].weight
    assert copy.deepcopy(callback).merger.step().merged > 0  # with a model of its own
    check()


def test_what_cannot_be_copied_says_so():
    model = net()
    merger = InMerge(model, prob=lambda step: 0.5)
    assert copy.deepcopy(merger).step() is not None
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(merger)
    grouped = InMerge(model, process_group=(group := object()))
    assert copy.deepcopy(grouped)._run.group is group
    with pytest.raises(TypeError, match=r"process_group belongs to this process.*save its state_dict\(\)"):
        pickle.dumps(grouped)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        copy.deepcopy(merger)._run.nonsense  # noqa: B018


# ------------------------------------------------------------------------------------------------------------- averages


class ModelEmaV9(nn.Module):
    """As timm has them."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, model):
        pass


class SchemaNet(nn.Sequential):
    """No average, though it has the letters in its name and a method of that name."""

    def update(self):
        pass


def assert_refused(average):
    with pytest.raises(ValueError, match="merge the model that is trained, and its average follows"):
        InMerge(average)


def test_averages_of_weights_are_refused():
    model = net()
    assert_refused(ModelEmaV9(model))
    assert_refused(torch.compile(ModelEmaV9(model), backend="eager"))
    assert_refused(torch.optim.swa_utils.AveragedModel(model))
    assert_refused(type("Mine", (torch.optim.swa_utils.AveragedModel,), {})(model))
    assert InMerge(SchemaNet(*net()), skip_first=0).step() is not None


def test_timms_averages():
    reason = "timm needs torchvision; ModelEmaV9 stands in for its classes, but not for their names"
    timm = pytest.importorskip("timm.utils", reason=reason)
    for kind in (timm.ModelEma, timm.ModelEmaV2, timm.ModelEmaV3):
        assert_refused(kind(net()))


def test_ema_pytorchs_averages():
    ema = pytest.importorskip("ema_pytorch", reason="ema-pytorch is no dependency; only names could be imitated")
    model = net()
    assert_refused(ema.EMA(model))
    assert_refused(ema.EMA(model, include_online_model=False))
    assert_refused(pytest.importorskip("ema_pytorch.post_hoc_ema").KarrasEMA(model))
    merger = InMerge(model, threshold=-1.0, **SETTINGS)
    average = ema.EMA(model, beta=0.5, update_every=1, update_after_step=0)
    average.update()
    merger.step()
    average.update()
    assert not torch.equal(average.ema_model[0].weight, model[0].weight)
