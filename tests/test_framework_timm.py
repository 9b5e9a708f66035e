"""timm, the real one, as its ``train.py`` puts it together, with one line more: the same bits as a plain loop."""

import math

import pytest
import torch
import torchvision_ops
from oracle import assert_same_bits

torchvision_ops.declare()
timm = pytest.importorskip("timm", reason="timm is not installed: tests/frameworks.sh")

from timm.loss import LabelSmoothingCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler  # noqa: E402

from inmerge_fast import InMerge  # noqa: E402

EPOCHS, UPDATES, ACCUMULATE, LR, DECAY = 2, 2, 2, 0.1, 0.9
RECIPES = {
    "lasting": {"threshold": -1.0, "prob": 0.5, "guard": None, "seed": 3},
    "forward-only": {"lasting": False, "seed": 3},
}
both = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def model_of(name="resnet10t"):
    torch.manual_seed(0)
    return timm.create_model(name, in_chans=1, num_classes=3)


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES * ACCUMULATE):
        yield torch.randn(2, 1, 32, 32, generator=generator), torch.randint(0, 3, (2,), generator=generator)


def as_train_py(recipe, epochs=range(EPOCHS), start=None):
    """What ``train.py`` does on a CPU: scaler, accumulation, scheduler, EMA; ``start`` is a checkpoint's content."""
    model = model_of()
    optimizer = create_optimizer_v2(model, opt="momentum", lr=LR, momentum=0.9, weight_decay=0.0)
    merger = InMerge(model, **recipe).attach(optimizer)  # the line
    scaler, loss_of = NativeScaler(device="cpu"), LabelSmoothingCrossEntropy(0.1)
    ema = ModelEmaV3(model, decay=DECAY)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, updates_per_epoch=UPDATES)
    if start is not None:
        for part, state in zip((model, optimizer, merger, scaler, ema.module), start, strict=True):
            part.load_state_dict(state)
        scheduler.step(epochs[0])
    updates = epochs[0] * UPDATES
    for epoch in epochs:
        model.train()
        for index, (x, y) in enumerate(batches()):
            need_update = index % ACCUMULATE == ACCUMULATE - 1
            loss = loss_of(model(x), y) / ACCUMULATE
            scaler(loss, optimizer, clip_grad=None, parameters=model.parameters(), need_update=need_update)
            if need_update:
                updates += 1
                optimizer.zero_grad()
                ema.update(model, step=updates)
        scheduler.step(epoch + 1)
    merger.detach()
    states = [part.state_dict() for part in (model, optimizer, merger, scaler, ema.module)]
    return model, ema.module, merger, states


def plain(recipe):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    merger = InMerge(model, **recipe)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    by_hand = recipe.get("lasting", True)
    loss_of = LabelSmoothingCrossEntropy(0.1)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 0.5 * LR * (1.0 + math.cos(math.pi * epoch / EPOCHS))
        data = list(batches())
        for update in range(UPDATES):
            micro = data[update * ACCUMULATE : (update + 1) * ACCUMULATE]
            if by_hand:
                for x, y in micro:
                    (loss_of(model(x), y) / ACCUMULATE).backward()
            else:
                with merger.merged():
                    for x, y in micro:
                        (loss_of(model(x), y) / ACCUMULATE).backward()
            optimizer.step()
            if by_hand:
                merger.step()
            optimizer.zero_grad()
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1.0 if merger.step_count == 1 else 1 - DECAY)  # as timm begins
                else:
                    average[name].copy_(value)
    return model, average, merger


@both
def test_with_one_line_it_gives_the_weights_of_a_plain_loop(recipe):
    model, ema, merger, _ = as_train_py(recipe)
    expected, average, by_hand = plain(recipe)
    assert merger.step_count == by_hand.step_count == EPOCHS * UPDATES
    assert merger.summary().merged == by_hand.summary().merged > 0
    for name, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
        assert_same_bits(ema.state_dict()[name], average[name], f"average of {name}")


@both
def test_resumes_to_the_bit(recipe):
    whole, average, merger, _ = as_train_py(recipe)
    *_, half = as_train_py(recipe, range(1))
    model, ema, resumed, _ = as_train_py(recipe, range(1, EPOCHS), half)
    assert resumed.step_count == merger.step_count
    for name, value in whole.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
        assert_same_bits(ema.state_dict()[name], average.state_dict()[name], f"average of {name}")


def test_a_step_that_the_scaler_skips_is_not_merged():
    model = model_of()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=LR)
    merger = InMerge(model, **RECIPES["lasting"]).attach(optimizer)
    scaler = NativeScaler(device="cpu")
    [(x, y), *_] = list(batches())
    for factor, counted in ((float("inf"), 0), (1.0, 1)):
        before = {name: value.clone() for name, value in model.named_parameters()}
        scaler(LabelSmoothingCrossEntropy()(model(x), y) * factor, optimizer, parameters=model.parameters())
        optimizer.zero_grad()
        assert merger.step_count == counted
        same = all(torch.equal(before[name], value) for name, value in model.named_parameters())
        assert same == (counted == 0)


def test_the_average_cannot_be_merged():
    with pytest.raises(ValueError, match="ModelEmaV3, an average of weights"):
        InMerge(ModelEmaV3(model_of()))
