"""Whole networks: which layers a plan finds, which numbers a merge changes, and that the network still runs.

The expected numbers are those of torchvision's models, and for the U-Net those of the layers in its paper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from benchmarks.nets import densenet121, r3d_18, resnet18, resnet50, unet, vgg19
from benchmarks.nets_mobile import convnext_tiny, efficientnet_b0
from inmerge_fast import MergePlan, draw, merge_, reference_merge
from inmerge_fast.plan.heads import HEAD

CLASSES = 10


@dataclass(frozen=True)
class Net:
    """Facts about a network; ``deep`` is what lies after its first ten convolutions, the ones the paper skips."""

    build: Callable[..., nn.Module]
    parameters: int
    convs: int
    megabytes: float  # of float32 convolution weights
    deep: int
    deep_megabytes: float
    deep_rows: int  # filters of all deep layers together
    deep_filters: tuple[int, int]  # fewest and most per layer
    deep_elements: tuple[int, int]  # fewest and most per filter
    skipped_share: int  # layers that skip_first=0.6 leaves out
    depthwise: int = 0
    deep_depthwise: int = 0
    head: str | None = None  # a convolution with one filter per class
    input_shape: tuple[int, ...] = (2, 3, 32, 32)
    output_shape: tuple[int, ...] = (2, CLASSES)


NETS = {
    "vgg19": Net(vgg19, 143_667_240, 16, 80.1, 6, 56.6, 3072, (512, 512), (4608, 4608), 10),
    "resnet18": Net(resnet18, 11_689_512, 20, 44.7, 10, 41.9, 3840, (256, 512), (128, 4608), 12),
    "resnet50": Net(resnet50, 25_557_032, 53, 93.8, 43, 93.0, 25344, (128, 2048), (64, 4608), 32),
    "densenet121": Net(densenet121, 7_978_856, 120, 27.5, 110, 26.5, 9408, (32, 512), (128, 1152), 72),
    "efficientnet_b0": Net(
        efficientnet_b0, 5_288_548, 81, 15.8, 71, 15.8, 29912, (6, 1280), (6, 1152), 49, depthwise=16, deep_depthwise=14
    ),
    "convnext_tiny": Net(
        convnext_tiny, 28_589_128, 22, 7.5, 12, 5.8, 6144, (384, 768), (49, 1536), 13, depthwise=18, deep_depthwise=11
    ),
    "unet": Net(
        unet,
        31_030_658,
        23,
        124.1,
        13,
        48.7,
        2882,
        (2, 512),
        (64, 9216),
        14,
        head="head",
        input_shape=(2, 1, 32, 32),
        output_shape=(2, CLASSES, 32, 32),
    ),
    "r3d_18": Net(
        r3d_18, 33_371_472, 20, 132.6, 10, 124.5, 3840, (256, 512), (128, 13824), 12, input_shape=(2, 3, 8, 32, 32)
    ),
}
every_net = pytest.mark.parametrize("net", [pytest.param(net, id=name) for name, net in NETS.items()])


def small_headed(net):
    """The network as most tests use it: VGG19's own classifier would be 86 % of its parameters."""
    build = partial(net.build, hidden=16) if net.build is vgg19 else net.build
    return build(classes=CLASSES)


def without_values(net):
    """The network with memory that nothing has written to, for what depends on shapes only."""
    with torch.device("meta"):
        model = small_headed(net)
    return model.to_empty(device="cpu")


def convolutions(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d))
    }


def as_rows(weight, conv):
    """One filter per row. No transposed convolution here has groups."""
    return (weight.transpose(0, 1) if conv.transposed else weight).flatten(1)


@every_net
def test_shapes_are_those_of_the_real_network(net):
    with torch.device("meta"):
        model = net.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == net.parameters

    convs = list(convolutions(model).values())
    rows = [as_rows(conv.weight, conv).shape for conv in convs]
    megabytes = [4e-6 * filters * elements for filters, elements in rows]
    assert len(convs) == net.convs
    assert round(sum(megabytes), 1) == net.megabytes
    assert sum(conv.groups > 1 for conv in convs) == net.depthwise

    deep_filters, deep_elements = zip(*rows[10:], strict=True)
    assert len(rows[10:]) == net.deep
    assert round(sum(megabytes[10:]), 1) == net.deep_megabytes
    assert sum(deep_filters) == net.deep_rows
    assert (min(deep_filters), max(deep_filters)) == net.deep_filters
    assert (min(deep_elements), max(deep_elements)) == net.deep_elements
    assert sum(conv.groups > 1 for conv in convs[10:]) == net.deep_depthwise


def test_a_shortcut_comes_after_the_convolutions_it_bypasses():
    names = list(convolutions(without_values(NETS["resnet50"])))
    assert names[:5] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0"]
    assert names[9] == "layer1.2.conv2"


@every_net
def test_plan_finds_every_convolution(net):
    model = without_values(net)
    plan = MergePlan(model, skip_first=0)
    assert len(plan.layers) + len(plan.skipped) == net.convs
    assert plan.heads == (() if net.head is None else (net.head,))
    skipped = dict(plan.skipped)
    assert [skipped.pop(name) for name in plan.heads] == [HEAD] * len(plan.heads)
    assert len(skipped) == net.depthwise
    assert set(skipped.values()) <= {"one filter per group, nothing to pair it with"}

    convs = convolutions(model)
    bodies = [name for name, conv in convs.items() if conv.groups == 1 and name != net.head]
    assert [layer.name for layer in plan.layers] == bodies
    for layer in plan.layers:
        rows = as_rows(convs[layer.name].weight, convs[layer.name])
        assert (layer.layout.filters, layer.layout.elements) == tuple(rows.shape)
        assert layer.layer_id == list(convs).index(layer.name)  # depthwise layers take an id in the draw too


@every_net
@pytest.mark.parametrize("skip_first", [0, 0.0, 10, 0.6])
def test_skip_first_counts_convolutions_in_module_order(net, skip_first):
    model = without_values(net)
    plan = MergePlan(model, skip_first=skip_first, include_heads=True)
    skipped = net.skipped_share if skip_first == 0.6 else int(skip_first)
    shallow = [name for name, reason in plan.skipped if reason.startswith("among the first")]
    assert shallow == list(convolutions(model))[:skipped]
    assert len(plan.layers) + len(plan.skipped) == net.convs
    if skip_first == 10:
        assert len(plan.layers) == net.deep - net.deep_depthwise


def test_skip_first_is_the_papers_ten_layers_of_vgg19():
    by_default = MergePlan(without_values(NETS["vgg19"]))
    assert [layer.name for layer in by_default.layers] == [f"features.{i}" for i in (23, 25, 28, 30, 32, 34)]
    assert sum(layer.layout.filters for layer in by_default.layers) == 3072


@pytest.mark.parametrize("skip_first", [0.95, 0.99, 1 - 2**-53])
def test_skip_first_as_a_share_never_skips_all(skip_first):
    plan = MergePlan(without_values(NETS["resnet18"]), skip_first=skip_first)
    assert [layer.name for layer in plan.layers] == ["layer4.1.conv2"]


@pytest.mark.parametrize("skip_first", [20, 1000])
def test_skip_first_as_a_number_can_skip_all_and_then_raises(skip_first):
    with pytest.raises(ValueError, match=r"no layer of this ResNet can be merged: skipped 20, among the first 20 "):
        MergePlan(without_values(NETS["resnet18"]), skip_first=skip_first)


@every_net
def test_merge_changes_every_filter_and_nothing_else(net, full_device):
    model = small_headed(net).to(full_device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stats = merge_(model, prob=1.0, threshold=-1.0, skip_first=0, include_heads=True, seed=1, step=0)
    after = model.state_dict()

    filters = 0
    for layer_id, (name, conv) in enumerate(convolutions(model).items()):
        if conv.groups > 1:
            continue
        old, new = before.pop(f"{name}.weight").cpu(), after.pop(f"{name}.weight").cpu()
        changed = (as_rows(new, conv) != as_rows(old, conv)).any(1)
        assert changed.all(), f"{name}: filters {(~changed).nonzero().flatten().tolist()} did not change"
        coin, partner = draw(1, 0, layer_id, len(changed), 1.0)
        expected = reference_merge(old, coin, partner, threshold=-1.0, transposed=conv.transposed).weight
        assert_same_bits(new, expected, f"{name} is not what the reference gives")
        filters += len(changed)
    assert stats.merged == filters

    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} is no filter and changed"


@every_net
@torch.no_grad()
def test_forward_pass_before_and_after_a_merge(net, full_device):
    # In training mode: fresh batch-norm statistics in eval mode let a random EfficientNet's signal fade to nothing.
    model = small_headed(net).to(full_device)
    x = torch.randn(net.input_shape, device=full_device)
    outputs = []
    for merged in (False, True):
        if merged:
            merge_(model, threshold=-1.0, skip_first=0, seed=1, step=0)
        torch.manual_seed(2)  # the same dropout in both passes
        outputs.append(model(x))
        assert outputs[-1].shape == net.output_shape
        assert outputs[-1].isfinite().all()
    assert not torch.equal(*outputs)
