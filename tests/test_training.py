"""``InMerge`` in a training run: the same weights as a loop over the reference, whatever surrounds it."""

import copy

import pytest
import torch
from oracle import assert_same_bits, untouched
from torch import nn

import inmerge_fast
from inmerge_fast import InMerge, draw, reference_merge

SETTINGS = {"alpha": 0.75, "prob": 0.4, "threshold": 0.05, "skip_first": 1}


def net(**conv):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, **conv), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, **conv), nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2, **conv), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 9, 9, generator=generator) for _ in range(steps)]


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 4)


def train(model, optimizer, data, after_step=lambda step: None):
    for step, x in enumerate(data):
        loss_of(model, x).backward()
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
    return model


def reference_step(model, step, *, alpha, prob, threshold, skip_first, seed=0):
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for layer, conv in enumerate(convs[skip_first:], skip_first):
        coin, partner = draw(seed, step, layer, conv.out_channels, prob, groups=conv.groups)
        merged = reference_merge(
            conv.weight, coin, partner, alpha=alpha, threshold=threshold, groups=conv.groups
        ).weight
        with torch.no_grad():
            conv.weight.copy_(merged)


def optimizer_of(kind, model):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=0.01)


def assert_same_state(model, other):
    for name, value in model.state_dict().items():
        assert_same_bits(value, other.state_dict()[name], name)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_200_steps_are_bit_equal_to_a_loop_over_the_reference(kind):
    """SGD with momentum and Adam; the published place, before the forward, is the same loop shifted by one."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    data = batches(200)
    merger = InMerge(model, **SETTINGS, guard=None)
    merged = 0

    def step(_):
        nonlocal merged
        merged += merger.step().merged

    train(model, optimizer_of(kind, model), data, step)
    train(twin, optimizer_of(kind, twin), data, lambda step: reference_step(twin, step, **SETTINGS))
    assert merged > 100
    assert merger.step_count == 200
    assert_same_state(model, twin)


def test_attached_it_steps_with_the_optimizer():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    data = batches(20)
    optimizer = optimizer_of("adam", model)
    merger = InMerge(model, **SETTINGS, guard=None).attach(optimizer)
    train(model, optimizer, data)
    by_hand = InMerge(twin, **SETTINGS, guard=None)
    train(twin, optimizer_of("adam", twin), data, lambda _: by_hand.step())
    assert_same_state(model, twin)
    with pytest.raises(RuntimeError, match="detach"):
        merger.step()
    with pytest.raises(RuntimeError, match="attached already"):
        merger.attach(optimizer)
    merger.detach()
    assert merger.step() is not None
    optimizer.step()
    assert merger.step_count == 21


def test_with_gradient_accumulation_it_follows_optimizer_steps():
    model = net()
    optimizer = optimizer_of("sgd", model)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    for micro_step, x in enumerate(batches(12)):
        loss_of(model, x).backward()
        if micro_step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert merger.step_count == 3


def test_attach_wants_an_optimizer_of_these_weights():
    model = net()
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        InMerge(model).attach(model)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    with pytest.raises(ValueError, match="holds none of the weights that are merged"):
        InMerge(model).attach(torch.optim.SGD(masters, lr=0.1))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_merged_and_not_counted(fused):
    """A fused optimizer fires its hook even then; the verdict comes with it as ``found_inf``."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    merger = InMerge(model, prob=1.0, threshold=-1.0).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(merger.step_count))
    for x, counted in zip(batches(3), [1, 1, 2], strict=True):
        loss = loss_of(model, x)
        if len(fired) == 1 and counted == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        check = untouched(model) if counted == merger.step_count else None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert merger.step_count == counted
        if check:
            check()
    assert fired == ([1, 1, 2] if fused else [1, 2])


def test_in_evaluation_mode_nothing_is_merged_or_counted():
    model = net().eval()
    merger = InMerge(model, prob=1.0, threshold=-1.0)
    check = untouched(model)
    assert merger.step() is None
    check()
    assert merger.step_count == 0
    model.train()
    assert merger.step().merged > 0
    assert merger.step_count == 1


def test_a_training_run_in_evaluation_mode_is_pointed_out():
    merger = InMerge(net().eval())
    for _ in range(99):
        merger.step()
    with pytest.warns(inmerge_fast.NoEffectWarning, match="all of them in evaluation mode"):
        merger.step()


def test_nothing_merging_is_pointed_out_with_a_threshold_that_would_act():
    merger = InMerge(net(), threshold=0.999)
    with pytest.warns(inmerge_fast.NoEffectWarning, match=r"largest similarity seen was 0\.\d+. A threshold of"):
        [merger.step() for _ in range(120)]  # a step whose coins all fail does not count


def test_start_stop_and_every():
    model = net()
    merger = InMerge(model, prob=1.0, threshold=-1.0, start=3, stop=10, every=3)
    merged_at = [step for step in range(14) if (stats := merger.step()) is not None and stats.merged]
    assert merged_at == [3, 6, 9]
    assert merger.step_count == 14


def test_the_papers_protocol_in_epochs():
    merger = InMerge(net(), start=30, stop=40, steps_per_epoch=7)
    merger.step_count = 30 * 7 - 1
    assert merger.step() is None
    assert merger.step().step == 30 * 7
    merger.step_count = 40 * 7
    assert merger.step() is None


def test_the_draw_is_that_of_merge_and_is_not_reshuffled_by_start_or_every():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    merger = InMerge(model, every=2, start=1, seed=9, **SETTINGS)
    for step in range(6):
        merger.step()
        if step % 2:
            inmerge_fast.merge_(twin, seed=9, step=step, **SETTINGS)
    assert_same_state(model, twin)


def test_moved_and_replaced_parameters_are_noticed():
    model = net()
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=2)
    merger.step()

    def merges():
        before = model[5].weight.detach().clone()
        stats = merger.step()
        return stats.merged == 12 and not torch.equal(model[5].weight, before)

    first = merger.plan
    assert merges()
    assert merger.plan is first, "no new plan where nothing has changed"
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert merges()
    model.to(torch.bfloat16).to(torch.float32)
    assert merges()
    model[5].weight.data = torch.randn(12, 4, 3, 3)
    assert merges()
    model[5].weight = nn.Parameter(torch.randn(12, 4, 3, 3))
    assert merges()
    model.to(memory_format=torch.channels_last)
    assert merges()
    assert merger.plan is not first


def test_no_module_is_walked_per_step(monkeypatch):
    merger = InMerge(net(), **SETTINGS)
    merger.step()

    def walk(*_, **__):
        raise AssertionError("walked the modules")

    monkeypatch.setattr(nn.Module, "named_modules", walk)
    monkeypatch.setattr(nn.Module, "modules", walk)
    monkeypatch.setattr(nn.Module, "parameters", walk)
    merger.step()


def test_frozen_weights_take_part_only_if_asked():
    model = net()
    model[3].weight.requires_grad_(False)
    merger = InMerge(model, skip_first=0)
    assert merger.plan.names == ["0", "5"]
    assert ("3", "frozen (requires_grad is False)") in merger.plan.skipped
    assert InMerge(model, skip_first=0, include_frozen=True).plan.names == ["0", "3", "5"]


def test_freezing_and_unfreezing_are_noticed_and_do_not_reshuffle_the_draw():
    model = net()
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=0)
    assert [s.name for s in merger.step().layers] == ["0", "3", "5"]
    model[0].weight.requires_grad_(False)
    assert [s.name for s in merger.step().layers] == ["3", "5"]
    assert [layer.layer_id for layer in merger.plan.layers] == [1, 2]
    model[0].weight.requires_grad_(True)
    assert [s.name for s in merger.step().layers] == ["0", "3", "5"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert merger.step() is None
    assert merger.step_count == 4


def test_tied_weights_are_merged_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=0)
    assert merger.step().merged == 4
    assert merger.plan.skipped == (("1", "shares its weight with 0 and goes with it"),)


def test_layers_can_be_left_out_by_name():
    assert InMerge(net(), skip_first="0").plan.names == ["3", "5"]
    assert InMerge(net(), skip_first=["0", "3"]).plan.names == ["5"]
    assert InMerge(net(), skip_first=["0"], exclude="5").plan.names == ["3"]
    with pytest.raises(ValueError, match="matches no candidate layer"):
        InMerge(net(), skip_first="layer1.*")


def test_layers_given_one_by_one_are_all_meant():
    model = net()
    model[3].weight.requires_grad_(False)
    merger = InMerge([model[0], model[3]], prob=1.0, threshold=-1.0)
    first = merger.plan
    assert merger.step().merged == merger.step().merged == 14
    assert merger.plan is first
    model[3].eval()
    assert merger.step() is None
    assert InMerge(model[5], prob=1.0, threshold=-1.0).step().merged == 12
    with pytest.raises(ValueError, match="choose among the layers of a model"):
        InMerge([model[0]], exclude="0")


def test_master_weights_of_a_half_precision_model():
    """The optimizer steps float32 copies; those are merged, and the model gets them rounded."""
    model = net().to(torch.bfloat16)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    masters = [conv.weight.detach().float().requires_grad_() for conv in convs]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    merger = InMerge(masters[1:], prob=1.0, threshold=-1.0).attach(optimizer)
    before = [m.detach().clone() for m in masters]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer.step()
    assert merger.step_count == 1
    assert torch.equal(masters[0], before[0])
    assert not torch.equal(masters[1], before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_weight_dtypes(dtype):
    model = net().to(dtype)
    assert InMerge(model, prob=1.0, threshold=-1.0).step().merged > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_next_forward_sees_the_merge(dtype):
    """Autocast keeps low-precision copies of weights until its region ends; a merge inside it drops them."""
    model = net().eval()
    x = batches(1)[0]
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=0)
    with torch.autocast("cpu", dtype=dtype):
        model(x)
        model.train()
        merger.step()
        model.eval()
        inside = model(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(inside, model(x))


def test_an_average_of_the_weights_is_not_the_thing_to_merge():
    model = net()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with pytest.raises(ValueError, match="merge the model that is trained"):
        InMerge(ema)
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=0)
    before = ema.module[0].weight.clone()
    ema.update_parameters(model)
    merger.step()
    ema.update_parameters(model)
    assert torch.allclose(ema.module[0].weight, 0.5 * before + 0.5 * model[0].weight.detach())


def test_gradient_checkpointing_recomputes_with_the_weights_of_the_forward():
    """A merge after ``optimizer.step()`` lies between backward and forward, so recomputation never sees it."""
    from torch.utils.checkpoint import checkpoint

    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    for module in (*model, *twin):
        module.eval()  # recomputation would update the running statistics of batch norm twice
    data = batches(5)
    for target, run in ((model, lambda x: checkpoint(model, x, use_reentrant=False)), (twin, twin)):
        target.training = True
        optimizer, merger = optimizer_of("sgd", target), InMerge(target, **SETTINGS)
        for x in data:
            nn.functional.cross_entropy(run(x), torch.arange(4)).backward()
            optimizer.step()
            merger.step()
            optimizer.zero_grad()
    assert_same_state(model, twin)


def test_inside_a_functional_transform_it_raises():
    merger = InMerge(net())
    with pytest.raises(ValueError, match="inside a torch.func transform"):
        torch.func.vmap(lambda x: (merger.step(), x)[1])(torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"prob": "x"}, TypeError, "prob must be a number"),
        ({"threshold": -1.5}, ValueError, r"threshold must be in \[-1, 1\]"),
        ({"partner": "other"}, ValueError, "partner"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"start": 2, "stop": 2}, ValueError, "stop must be after start"),
        ({"start": -1}, ValueError, "start must not be negative"),
        ({"start": 0.5}, TypeError, "epochs need steps_per_epoch"),
        ({"stop": True}, TypeError, "stop must be an int"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 1.0}, TypeError, "every must be an int"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1"),
        ({"observe_every": 0}, ValueError, "observe_every must be at least 1"),
        ({"guard": "warn"}, TypeError, "guard must be a CollapseGuard or None"),
        ({"loggers": ["x"]}, TypeError, "loggers must be callable"),
        ({"include_frozen": 1}, TypeError, "include_frozen must be a bool"),
        ({"skip_first": 1.0}, ValueError, "skip_first as a share"),
    ],
)  # fmt: skip
def test_bad_arguments_raise_at_construction(arguments, error, match):
    with pytest.raises(error, match=match):
        InMerge(net(), **arguments)


def test_a_copy_of_the_model_is_another_model():
    model = net()
    merger = InMerge(model, prob=1.0, threshold=-1.0, skip_first=0)
    twin = copy.deepcopy(model)
    check = untouched(twin)
    merger.step()
    check()
