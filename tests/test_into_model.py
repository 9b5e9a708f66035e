"""Weights of files in models: every wrapping and age of a state dict fits or is refused with keys and shapes."""

import copy
import os
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from benchmarks import nets
from inmerge_fast.checkpoints.into_model import head_of, load_into


class Net(nn.Module):
    """A body with batch norm and a head, as most."""

    def __init__(self, classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)


@pytest.fixture
def theirs():
    torch.manual_seed(1)
    net = Net()
    net.norm.running_mean.uniform_()
    net.norm.num_batches_tracked += 5
    return net


def prefixed(state, prefix):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def without_counters(state):
    """As PyTorch 0.4.0 saved it: no counters, and nothing that says how old it is."""
    return {key: value for key, value in state.items() if "num_batches_tracked" not in key}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(4, 1, 3, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
WRAPPINGS = {
    "a state dict": lambda state: state,
    "a plain dict": dict,
    "a checkpoint": lambda state: {"epoch": 3, "state_dict": state, "optimizer": OPTIMIZER},
    "a checkpoint of another kind": lambda state: {"model": state, "optim": OPTIMIZER, "best": 0.9},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": OPTIMIZER},
    "nested twice": lambda state: {"checkpoint": {"model": {"state_dict": state}}},
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled in DataParallel": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "DataParallel, compiled": lambda state: {"state_dict": prefixed(state, "_orig_mod.module.")},
    "an attribute of a LightningModule": lambda state: {"state_dict": prefixed(state, "net.")},
    "a backbone": lambda state: prefixed(state, "backbone."),
    "an encoder in DataParallel": lambda state: prefixed(state, "module.encoder."),
    "a part beside others": lambda state: prefixed(state, "model.") | {"loss.weight": torch.ones(7)},
    "before num_batches_tracked": without_counters,
    "half precision": lambda state: {key: one.half() if one.is_floating_point() else one for key, one in state.items()},
    "two networks": lambda state: {"model": state, "ema": {key: one * 0 for key, one in state.items()}},
    "a copy beside it": lambda state: state | {f"ema.{key}": one * 0 for key, one in state.items()},
    "after a network that does not fit": lambda state: {"model": {"a.weight": torch.ones(9, 9, 3, 3)}, "net": state},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_every_wrapping_fits(tmp_path, theirs, kind):
    path = tmp_path / "weights.pt"
    torch.save(WRAPPINGS[kind](theirs.state_dict()), path)
    net = Net()
    found = load_into(net, path, head=head_of(net, 3))
    assert found.head
    for key, value in net.state_dict().items():
        if key == "norm.num_batches_tracked" and kind.startswith("before"):
            continue
        expected = theirs.state_dict()[key]
        assert torch.equal(value, expected.half().to(expected.dtype) if kind.startswith("half") else expected), key
    assert str(path) in found.text
    assert f"{9 - kind.startswith('before')} tensors loaded" in found.text


def test_what_was_chosen_is_said(tmp_path, theirs):
    path, state = tmp_path / "weights.pt", theirs.state_dict()
    torch.save({"model": prefixed(state, "net.") | {"loss.weight": torch.ones(7)}, "ema": state}, path)
    text = load_into(Net(), path, head=("fc",)).text
    assert "entry 'model', keys after 'net.': 9 tensors loaded; 1 tensors beside it left out: loss.weight" in text
    assert text.endswith("'ema' would fit, too")


def test_numbers_as_keys(tmp_path):
    """Layers of a Sequential, and their numbers as integers where a dict of dicts was saved."""
    theirs, net = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2))
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    load_into(net, tmp_path / "a.pt", head=("2",))
    assert torch.equal(net[0].weight, theirs[0].weight)
    torch.save(
        {0: {"weight": theirs[2].weight.data * 0 + torch.ones(3, 4), "bias": theirs[2].bias.data}}, tmp_path / "b.pt"
    )
    with pytest.raises(ValueError, match=r"b\.pt.*does not fit this model"):
        load_into(net, tmp_path / "b.pt", head=("2",))


def test_safetensors(tmp_path, theirs):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(prefixed(theirs.state_dict(), "module."), tmp_path / "a.safetensors")
    net = Net()
    load_into(net, tmp_path / "a.safetensors", head=("fc",))
    assert torch.equal(net.conv.weight, theirs.conv.weight)


def test_old_keys_of_densenets(tmp_path):
    """As torchvision's files of 2017 have them, from before names of modules could hold no dots."""
    torch.manual_seed(0)
    net, theirs = (nets.densenet121(2) for _ in range(2))
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
           for key, value in without_counters(theirs.state_dict()).items()}  # fmt: skip
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(prefixed(old, "module."), tmp_path / "densenet.pth")
    load_into(net, tmp_path / "densenet.pth", head=head_of(net, 2))
    for (key, one), other in zip(net.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), key


HEADS = {
    "another number of classes": (
        lambda state: Net(7).state_dict(),
        "another number of classes: fc.weight (7, 4), here",
    ),
    "none": (lambda state: {key: one for key, one in state.items() if "fc" not in key}, "at random, the file has none"),
    "half of one": (
        lambda state: {key: one for key, one in state.items() if key != "fc.bias"},
        "another one: fc.weight",
    ),
    "a deeper one": (
        lambda state: {key.replace("fc.", "fc.0."): one for key, one in state.items()},
        "one: fc.0.weight",
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_another_head_is_left_out_and_said(tmp_path, theirs, kind):
    change, words = HEADS[kind]
    torch.save(change(theirs.state_dict()), tmp_path / "weights.pt")
    net = Net()
    before = copy.deepcopy(net.fc.state_dict())
    found = load_into(net, tmp_path / "weights.pt", head=head_of(net, 3))
    assert not found.head
    assert words in found.text
    assert "7 tensors loaded" in found.text
    assert all(torch.equal(value, before[key]) for key, value in net.fc.state_dict().items())


def changed(**values):
    def change(state):
        return {**state, **{key.replace("_", ".", 1): value for key, value in values.items() if value is not None}}

    return change


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, and files have them
        return torch.nested.nested_tensor([torch.ones(3, 3), torch.ones(2, 3)])


WRONG = {
    "another shape": (changed(conv_weight=torch.ones(4, 3, 3, 3)),
                      "1 tensors have another shape: conv.weight (4, 3, 3, 3) instead of (4, 1, 3, 3)"),
    "a missing tensor": (lambda state: {key: one for key, one in state.items() if key != "conv.bias"},
                         "1 of 9 tensors are missing: conv.bias"),
    "one too many": (changed(conv_scale=torch.ones(4)), "1 tensors are not in the model: conv.scale"),
    "nothing that fits": (lambda state: prefixed(state, "my_"), "none of its 9 tensors has a name of the model's; in "
                          "the file my_conv.weight, my_conv.bias, my_norm.weight, ..., in the model conv.weight"),
    "integers": (changed(conv_weight=torch.ones(4, 1, 3, 3, dtype=torch.int8)), "floating-point numbers: conv.weight "),
    "no values": (changed(conv_weight=torch.empty(4, 1, 3, 3, device="meta")),
                  "1 tensors are no plain floating-point numbers: conv.weight on the meta device, without values"),
    "a nested tensor": (lambda state: changed(conv_weight=nested())(state),
                        "1 tensors are no plain floating-point numbers: conv.weight nested"),
    "a sparse tensor": (changed(conv_weight=torch.ones(4, 1, 3, 3).to_sparse()),
                        "1 tensors are no plain floating-point numbers: conv.weight sparse_coo"),
    "NaN": (changed(conv_weight=torch.full((4, 1, 3, 3), float("nan"))), "1 tensors hold NaN or infinity: conv.weight"),
    "NaN in the head": (changed(fc_bias=torch.full((3,), float("inf"))), "the head: 1 tensors hold NaN or infinity: "),
    "a head of another width": (changed(fc_weight=torch.ones(7, 5), fc_bias=torch.ones(7)),
                                "the head: 2 tensors have another shape: fc.weight (7, 5) instead of (3, 4)"),
    "two networks of equal rank": (lambda state: prefixed(state, "encoder_q.") | prefixed(state, "encoder_k."),
                                   "2 networks with the model's keys, after 'encoder_q.', 'encoder_k.': choose one"),
    "an empty file of weights": (lambda state: {"epoch": 3}, "no state dict in it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, theirs, kind):
    change, words = WRONG[kind]
    torch.save(change(theirs.state_dict()), tmp_path / "weights.pt")
    net = Net()
    before = copy.deepcopy(net.state_dict())
    head = () if kind == "a missing tensor" else head_of(net, 3)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_into(net, tmp_path / "weights.pt", head=head)
    assert str(tmp_path / "weights.pt") in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_an_entry_or_a_prefix_chooses(tmp_path, theirs):
    path, state = tmp_path / "weights.pt", theirs.state_dict()
    second = {key: one + 1 for key, one in state.items()}
    torch.save({"model": state, "ema": second}, path)
    net = Net()
    load_into(net, path, entry="ema")
    assert torch.equal(net.conv.weight, second["conv.weight"])
    torch.save(prefixed(state, "encoder_q.") | prefixed(second, "encoder_k."), path)
    load_into(net, path, entry="encoder_q")
    assert torch.equal(net.conv.weight, state["conv.weight"])
    load_into(net, path, entry="encoder_k")
    assert torch.equal(net.conv.weight, second["conv.weight"])
    with pytest.raises(ValueError, match="there is no entry 'encoder'"):
        load_into(net, path, entry="encoder")


def test_load_state_dict_has_the_last_word(tmp_path, theirs):
    """A module may refuse what has the right names and shapes."""

    class Strict(Net):
        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
            errors.append("made for another version")

    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    net = Strict()
    before = net.conv.weight.clone()
    with pytest.raises(ValueError, match="does not fit this model: .*made for another version"):
        load_into(net, tmp_path / "weights.pt")
    assert torch.equal(net.conv.weight, before)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nets.vgg(11, 5), "classifier.6"),
        (lambda: nets.resnet18(5), "fc"),
        (lambda: nets.densenet121(5), "classifier"),
    ],
)
def test_heads_are_found(make, expected):
    with torch.device("meta"):
        assert head_of(make(), 5) == (expected,)


def test_timm_says_what_its_head_is():
    net = Net()
    net.pretrained_cfg = {"classifier": ("head", "head_dist")}
    assert head_of(net, 3) == ("head", "head_dist")


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=re.escape(os.fspath(tmp_path / "none.pt"))):
        load_into(Net(), tmp_path / "none.pt")
