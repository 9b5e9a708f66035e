"""Bad input: a clear error that names it, and not one bit written anywhere."""

import math
import warnings

import numpy as np
import pytest
import torch
from oracle import assert_is_reference, untouched
from torch import nn

import inmerge_fast
from inmerge_fast import MergePlan
from inmerge_fast.plan import candidates

SAMPLE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


@pytest.mark.parametrize("name", ["alpha", "prob", "threshold"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0000001, -1.5, 7])
def test_shares_out_of_range(name, value):
    conv = nn.Conv2d(2, 4, 3)
    check = untouched(conv)
    with pytest.raises(ValueError, match=rf"{name} must be in \[-?\d, 1\], got {value}"):
        inmerge_fast.merge_(conv, **{name: value})
    check()


@pytest.mark.parametrize("name", ["alpha", "prob"])
def test_negative_shares(name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got -0.1"):
        inmerge_fast.merge_(nn.Conv2d(2, 4, 3), **{name: -0.1})


@pytest.mark.parametrize("name", ["alpha", "prob", "threshold"])
@pytest.mark.parametrize("value", [True, "0.3", None, torch.tensor(0.3), 1j])
def test_shares_of_the_wrong_type(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        inmerge_fast.merge_(nn.Conv2d(2, 4, 3), **{name: value})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1}, ValueError, "step is missing: a seed alone would repeat the same draw at every call"),
        ({"step": 1}, ValueError, "seed is missing"),
        ({"seed": -1, "step": 0}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64, "step": 0}, ValueError, r"seed must be in \[0, 2\*\*64\)"),
        ({"seed": 1, "step": 2**63}, ValueError, r"step must be in \[0, 2\*\*63\)"),
        ({"seed": 1.0, "step": 0}, TypeError, "seed must be an int, got 1.0"),
        ({"seed": True, "step": 0}, TypeError, "seed must be an int, got True"),
        ({"layer": -1}, ValueError, r"layer must be in \[0, 2\*\*31\), got -1"),
        ({"layer": 0.5}, TypeError, "layer must be an int"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got 3"),
        ({"seed": 1, "step": 0, "generator": torch.Generator()}, ValueError, "pass either it or seed and step"),
        ({"dry_run": 1}, TypeError, "dry_run must be a bool, got 1"),
        ({"include_linear": None}, TypeError, "include_linear must be a bool"),
        ({"skip_first": True}, TypeError, "skip_first must be an int"),
        ({"skip_first": -1}, ValueError, "skip_first must not be negative, got -1"),
        ({"skip_first": 1.0}, ValueError, r"skip_first as a share must be in \[0, 1\), got 1.0"),
        ({"skip_first": math.nan}, ValueError, "skip_first as a share"),
        ({"skip_first": "2x"}, ValueError, "^name pattern '2x' matches no candidate layer .*skip_first="),
        ({"skip_first": ["0", 3]}, TypeError, "skip_first must be a name pattern or an iterable of them"),
        ({"exclude": 3}, TypeError, "exclude must be a name pattern or an iterable of them, got 3"),
        ({"exclude": ["0", 3]}, TypeError, "exclude must be a name pattern"),
        ({"exclude": ["0", "layer9.*"]}, ValueError, "'layer9.*' matches no .*; the candidates are: 0, 1"),
        ({"layer": 2}, ValueError, "layer is for single layers; a model numbers its own, got layer=2"),
        ({"skip_first": 2}, ValueError, r"no layer .* merged: skipped 2, among the first 2 \(skip_first=2\): 0, 1"),
        ({"skip_first": 99}, ValueError, "no layer of this Sequential can be merged"),
        ({"exclude": "*"}, ValueError, "excluded by '*': 1"),
    ],
)
def test_other_arguments(arguments, error, message):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))
    check = untouched(model)
    with pytest.raises(error, match=message.replace("'*'", r"'\*'").replace("9.*'", r"9\.\*'")):
        inmerge_fast.merge_(model, **arguments)
    check()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            None,
            "a convolution, a Linear, a weight tensor, an iterable of those, or a model; got NoneType",
        ),
        (3.0, "got float"),
        ("conv1", "got str"),
        ({"a": 1}, r"target\[0\] must be a convolution, a Linear or a weight tensor, got str"),
        ([nn.Conv2d(2, 4, 3), nn.Sequential(nn.Conv2d(2, 4, 3))], r"target\[1\] .* got Sequential; pass models one by"),
    ],
)
def test_targets_of_the_wrong_type(target, message):
    with pytest.raises(TypeError, match=message):
        inmerge_fast.merge_(target)


def test_empty_iterable():
    with pytest.raises(ValueError, match="empty iterable"):
        inmerge_fast.merge_([])


@pytest.mark.parametrize("arguments", [{"skip_first": 3}, {"exclude": "0"}])
def test_layer_choice_is_for_models(arguments):
    for target in (nn.Conv2d(2, 4, 3), [nn.Conv2d(2, 4, 3)], torch.randn(3, 4)):
        with pytest.raises(ValueError, match="choose among the layers of a model"):
            inmerge_fast.merge_(target, **arguments)


def test_layer_ids_are_for_single_layers():
    with pytest.raises(ValueError, match="an iterable numbers its own, got layer=1"):
        inmerge_fast.merge_([nn.Conv2d(2, 4, 3)], layer=1)


BAD_WEIGHTS = {
    "int8": (lambda: torch.ones(4, 9, dtype=torch.int8), TypeError, "dtype torch.int8; float32, bfloat16"),
    "bool": (lambda: torch.ones(4, 9, dtype=torch.bool), TypeError, "dtype torch.bool"),
    "complex64": (lambda: torch.ones(4, 9, dtype=torch.complex64), TypeError, "dtype torch.complex64"),
    "float8": (lambda: torch.ones(4, 9).to(torch.float8_e4m3fn), TypeError, "dtype torch.float8_e4m3fn"),
    "nested": (lambda: _quiet(lambda: torch.nested.nested_tensor([torch.ones(2, 3)] * 2)), TypeError, "layout nested"),
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, "layout torch.sparse_coo"),
    "sparse_csr": (lambda: _quiet(lambda: torch.eye(4).to_sparse_csr()), TypeError, "layout torch.sparse_csr"),
    "mkldnn": (lambda: torch.ones(4, 9).to_mkldnn(), TypeError, "layout torch._mkldnn"),
    "quantised": (
        lambda: _quiet(lambda: torch.quantize_per_tensor(torch.ones(4, 9), 0.1, 0, torch.qint8)), TypeError, "qint8",
    ),
    "meta": (lambda: torch.ones(4, 9, device="meta"), ValueError, "on the meta device and has no data"),
    "vector": (lambda: torch.ones(4), ValueError, r"at least 2 dimensions \(filters, ...\), got shape \(4,\)"),
    "no elements": (lambda: torch.ones(4, 0), ValueError, r"shape \(4, 0\) has no elements"),
    "one filter": (lambda: torch.ones(1, 9), ValueError, "has a single filter"),
    "expanded": (lambda: torch.ones(1, 9).expand(4, 9), ValueError, r"strides \(0, 1\); it must be dense"),
    "overlapping": (lambda: torch.ones(12).as_strided((4, 9), (1, 1)), ValueError, r"strides \(1, 1\)"),
    "sliced columns": (lambda: torch.ones(4, 9)[:, :5], ValueError, r"strides \(9, 1\)"),
    "every other row": (lambda: torch.ones(8, 9)[::2], ValueError, r"strides \(18, 1\)"),
    "transposed": (lambda: torch.ones(9, 4).t(), ValueError, r"strides \(1, 4\)"),
    "computed": (lambda: torch.ones(4, 9, requires_grad=True) * 2, ValueError, "it has a grad_fn"),
    "negative view": (lambda: torch.randn(4, 9, dtype=torch.complex64).conj().imag, ValueError, "dense"),
}  # fmt: skip


def _quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_cannot_be_merged(kind):
    make, error, message = BAD_WEIGHTS[kind]
    good, bad = torch.randn(4, 9), make()
    before = good.clone()
    with pytest.raises(error, match=message):
        inmerge_fast.merge_(bad, **SAMPLE_ALL)
    with pytest.raises((error, ValueError)) if kind != "one filter" else warnings.catch_warnings():
        inmerge_fast.merge_([good, bad], **SAMPLE_ALL)
    if kind != "one filter":
        assert torch.equal(good, before), "the good layer was written although the call raised"


def test_a_bad_layer_in_a_model_stops_the_call_before_anything_is_written():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=torch.int32), requires_grad=False)
    check = untouched(model)
    with pytest.raises(TypeError, match=r"^1: the weight has dtype torch.int32"):
        inmerge_fast.merge_(model, skip_first=0, include_frozen=True, **SAMPLE_ALL)
    check()
    assert inmerge_fast.merge_(model, skip_first=0, include_frozen=True, exclude="1", **SAMPLE_ALL).merged == 4
    stats = inmerge_fast.merge_(model, skip_first=0, **SAMPLE_ALL)  # what cannot be trained is frozen
    assert stats.merged == 4
    assert dict(stats.skipped)["1"].startswith("frozen")


@pytest.mark.parametrize("transposed", [False, True])
def test_lazy_modules_want_a_forward_pass_first(transposed):
    conv = nn.LazyConvTranspose2d(4, 3) if transposed else nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match="lazy module is not initialised; run one forward pass first"):
        inmerge_fast.merge_(nn.Sequential(conv))
    conv(torch.randn(1, 3, 8, 8))
    assert inmerge_fast.merge_(conv, **SAMPLE_ALL).merged == 4


def test_no_convolution_lists_what_was_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no convolution found .* it has 2 Linear, 1 ReLU; .*include_linear=True"):
        inmerge_fast.merge_(model)
    assert inmerge_fast.merge_(model, include_linear=True, **SAMPLE_ALL).merged == 4


def test_nothing_to_pair():
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    with pytest.raises(ValueError, match="no layer of this Conv2d can be merged: skipped 1, one filter per group"):
        inmerge_fast.merge_(depthwise)
    with pytest.raises(ValueError, match="has a single filter"):
        inmerge_fast.merge_(nn.Conv2d(6, 1, 3))
    plan = MergePlan(nn.Sequential(nn.Conv2d(3, 6, 1), depthwise, nn.Conv2d(6, 6, 1)), skip_first=1)
    assert [layer.layer_id for layer in plan.layers] == [2]
    assert ("1", "one filter per group, nothing to pair it with") in plan.skipped


@pytest.mark.gpu
def test_weights_on_several_devices():
    with pytest.raises(ValueError, match=r"on cuda:0, but .* is on cpu; call merge_ once per device"):
        inmerge_fast.merge_([torch.randn(4, 9), torch.randn(4, 9, device="cuda")])


def test_weights_on_several_devices_without_another_device(monkeypatch):
    """The check itself, on a layer that says to be elsewhere: the only other device here, meta, is refused earlier."""
    good, elsewhere = torch.randn(4, 9), torch.randn(3, 9)
    before = good.clone()

    class Layer(candidates.MergeLayer):
        def __init__(self, candidate, weight, layout):
            super().__init__(candidate, weight, layout)
            if weight is elsewhere:
                self.device = torch.device("cuda:0")

    monkeypatch.setattr(candidates, "MergeLayer", Layer)
    with pytest.raises(
        ValueError, match=r"1: Tensor: .* on cuda:0, but 0: Tensor is on cpu; call merge_ once per device"
    ):
        inmerge_fast.merge_([good, elsewhere], **SAMPLE_ALL)
    assert torch.equal(good, before)


def test_overlapping_weights():
    memory = torch.randn(6, 9)
    with pytest.raises(ValueError, match="shares memory with that of 0: Tensor; merge only one"):
        inmerge_fast.merge_([memory[:4], memory[2:]], **SAMPLE_ALL)
    assert inmerge_fast.merge_([memory[:3], memory[3:]], **SAMPLE_ALL).merged == 6


@pytest.mark.parametrize(
    "weight",
    [torch._neg_view(torch.ones(4, 9)), torch.ones(36).as_strided((4, 3, 3), (9, 1, 1))],
    ids=["negated view", "overlapping inside a filter"],
)
def test_weights_with_the_usual_filter_stride_that_are_not_dense(weight):
    with pytest.raises(ValueError, match="it must be dense with its filters outermost"):
        inmerge_fast.merge_(weight, **SAMPLE_ALL)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(4, 4, 3, 2).transpose(2, 3),
        lambda: torch.ones(4, 8, 2, 3)[:, :4],
        lambda: torch.ones(4, 8, 2, 3)[:, ::2],
        lambda: torch.ones(1, 4, 2, 3).expand(4, 4, 2, 3),
        lambda: torch.ones(4, 4, 1, 1).expand(4, 4, 2, 3),
    ],
    ids=["permuted kernel", "sliced filters", "every other filter", "expanded channels", "expanded kernel"],
)
def test_transposed_convolutions_that_are_not_dense(make):
    conv = nn.ConvTranspose2d(4, 4, (2, 3))
    conv.weight.data = make()
    with pytest.raises(ValueError, match="it must be dense with its filters outermost"):
        inmerge_fast.merge_(conv, **SAMPLE_ALL)


@pytest.mark.parametrize(
    ("conv", "lay_out"),
    [
        (nn.Conv2d(9, 4, 1), lambda w: w.as_strided((4, 9, 1, 1), (9, 1, 100, 7))),
        (nn.Conv2d(4, 4, (2, 3)), lambda w: w.transpose(2, 3).contiguous().transpose(2, 3)),
        (nn.ConvTranspose2d(4, 4, (1, 3)), lambda w: w.as_strided((4, 4, 1, 3), (12, 3, 100, 1))),
        (nn.ConvTranspose2d(4, 4, 3), lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)),
        (nn.ConvTranspose2d(3, 6, 3, groups=3), lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)),
    ],
)
def test_unusual_strides_of_dense_weights(conv, lay_out):
    """Strides of size-1 dimensions mean nothing; dimensions 0 and 1 of a transposed convolution may be swapped."""
    conv.weight.data = lay_out(conv.weight.data)
    before, stride = conv.weight.detach().clone(), conv.weight.stride()
    inmerge_fast.merge_(conv, **SAMPLE_ALL)
    assert conv.weight.stride() == stride
    layout = {"groups": conv.groups, "transposed": conv.transposed}
    assert_is_reference(before, conv.weight, layer=0, alpha=0.8, **layout, **SAMPLE_ALL)


def test_a_single_filter_is_skipped_whatever_its_stride():
    weights = [torch.randn(4, 9), torch.randn(2, 9)[::2]]
    assert weights[1].stride() == (18, 1)
    assert MergePlan(weights).skipped == (("1: Tensor", "has a single filter"),)


def test_generators_of_another_device():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"generator must be a CPU generator \(decisions are drawn there\), got cuda"):
        inmerge_fast.merge_(nn.Conv2d(2, 4, 3), generator=Elsewhere())


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_the_weight(groups):
    conv = nn.Conv2d(2, 4, 3)
    conv.groups = groups
    with pytest.raises(ValueError, match=f"cannot be divided into groups={groups}"):
        inmerge_fast.merge_(conv, **SAMPLE_ALL)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_freed_storage_and_forward_mode_duals_raise_before_any_layer_is_written():
    good = torch.randn(4, 9)
    before = good.clone()
    freed = torch.randn(4, 9)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has been freed or resized"):
        inmerge_fast.merge_([good, freed], **SAMPLE_ALL)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(4, 9), torch.ones(4, 9))
        with pytest.raises(ValueError, match="forward-mode tangent"):
            inmerge_fast.merge_([good, dual], **SAMPLE_ALL)
    assert torch.equal(good, before)


def test_numpy_numbers_are_numbers():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))
    wanted = inmerge_fast.merge_(model, skip_first=1, prob=0.5, seed=200, step=3, dry_run=True)
    for integer in (np.int16, np.uint32, np.int64):
        stats = inmerge_fast.merge_(
            model, skip_first=integer(1), prob=np.float16(0.5), seed=integer(200), step=integer(3), dry_run=True
        )
        assert stats.layers == wanted.layers


@pytest.mark.parametrize("target", ["", b"", "conv1", b"conv1"])
def test_a_string_is_no_iterable_of_layers(target):
    with pytest.raises(TypeError, match=f"an iterable of those, or a model; got {type(target).__name__}"):
        inmerge_fast.merge_(target)


def test_skipping_no_layer_is_fine_for_every_target():
    for target in (nn.Conv2d(2, 4, 3), [nn.Conv2d(2, 4, 3)], torch.randn(4, 9)):
        assert inmerge_fast.merge_(target, skip_first=0, **SAMPLE_ALL).merged == 4
