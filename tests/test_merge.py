"""``merge_`` against the reference: random configurations, and the cases that must be exact."""

import inspect
import math
import os
from fractions import Fraction

import conftest
import numpy as np
import pytest
import torch
from oracle import assert_is_reference, assert_same_bits, bits, tally
from torch import nn

import inmerge_fast
from inmerge_fast import draw, reference_merge

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
# 10,000 configurations over the tests below, on the CPU and on a GPU; interpreted kernels take milliseconds a program.
# A GPU run has minutes (benchmarks/run_gpu.sh), and almost each configuration a kernel of its own to compile.
EXAMPLES_SHARE = int(os.environ.get("INMERGE_EXAMPLES_SHARE", "1"))
MODULE_EXAMPLES, TENSOR_EXAMPLES, MODEL_EXAMPLES = (count // EXAMPLES_SHARE for count in (6000, 3000, 1000))
INTERPRETED_SHARE = 50


@st.composite
def settings_of_a_call(draw_from):
    return {
        "prob": draw_from(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])),
        "alpha": draw_from(st.sampled_from([0.0, 0.5, 0.8, 1.0]) | st.floats(0, 1)),
        "seed": draw_from(st.integers(0, 2**64 - 1)),
        "step": draw_from(st.integers(0, 2**63 - 1)),
    }


def values(shape, dtype, seed, special):
    """Random filters, some of them alike, so that thresholds have something to decide, and some of them special."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[1:], generator=generator)
    weight = torch.randn(shape, generator=generator)
    share = torch.rand(shape[0], generator=generator).view(-1, *[1] * (len(shape) - 1))
    weight = share * common + (1 - share) * weight
    if special:
        kinds = [0.0, math.nan, math.inf, -math.inf, 1e-6, 3e18, 1e25, "twin", "opposite"]
        for row in range(shape[0]):
            pick = int(torch.randint(0, 24, (), generator=generator))
            kind = kinds[pick] if pick < len(kinds) else None
            if kind == "twin":
                weight[row] = weight[row - 1]
            elif kind == "opposite":
                weight[row] = -weight[row - 1]
            elif kind in (1e-6, 3e18, 1e25):
                weight[row] *= kind
            elif kind == 0.0:
                weight[row] = 0.0
            elif kind is not None:
                weight[row].view(-1)[0] = kind
    return weight.to(dtype)


def threshold_for(weight, call, choice, **layout):
    """A fixed threshold, or one in the widest gap between the similarities that this very call will see."""
    if choice is not None:
        return choice
    filters = weight.shape[1] * layout["groups"] if layout["transposed"] else weight.shape[0]
    coin, partner = draw(
        call["seed"], call["step"], call.get("layer", 0), filters, call["prob"], groups=layout["groups"]
    )
    seen = reference_merge(weight, coin, partner, compute_dtype=torch.float64, **layout).similarity
    seen = seen[~seen.isnan()].sort().values
    if len(seen) < 2 or seen.diff().max() < 1e-4:
        return 0.1
    widest = int(seen.diff().argmax())
    return float(((seen[widest] + seen[widest + 1]) / 2).clamp(-0.99, 0.99))


THRESHOLDS = st.sampled_from([None, None, -1.0, 0.0, 0.3]) | st.floats(-0.99, 0.99)


MODULES = given(
    dims=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    size=st.integers(2, 6),
    channels=st.integers(1, 4),
    kernel=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    special=st.booleans(),
    threshold=THRESHOLDS,
    layer=st.integers(0, 2**31 - 1),
    dry_run=st.integers(0, 9).map(lambda n: n == 0),
    call=settings_of_a_call(),
    weight_seed=st.integers(0, 2**32),
)


def _module_is_reference(
    device, dims, transposed, groups, size, channels, kernel, dtype, channels_last, special, threshold, layer, dry_run,
    call, weight_seed,
):  # fmt: skip
    inputs, outputs = channels * groups, size * groups
    conv = CONVS[dims][transposed](inputs, outputs, kernel, groups=groups, bias=True)
    with torch.no_grad():
        conv.weight.copy_(values(tuple(conv.weight.shape), torch.float32, weight_seed, special))
    conv = conv.to(device, dtype)
    if channels_last and dims > 1:
        conv = conv.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    before = conv.weight.detach().clone(memory_format=torch.preserve_format)
    bias, pointer, version = conv.bias.detach().clone(), conv.weight.data_ptr(), conv.weight._version
    layout = {"groups": groups, "transposed": transposed}
    threshold = threshold_for(before.cpu(), call | {"layer": layer}, threshold, **layout)

    stats = inmerge_fast.merge_(conv, threshold=threshold, layer=layer, dry_run=dry_run, **call)

    sampled, passed = assert_is_reference(
        before, conv.weight, threshold=threshold, layer=layer, dry_run=dry_run, **layout, **call
    )
    assert stats.sampled == sampled
    if passed is not None:
        assert stats.passed == passed
        assert stats.merged == (0 if dry_run else passed)
    assert conv.weight.data_ptr() == pointer
    assert conv.weight.stride() == before.stride()
    assert (conv.weight._version > version) is not dry_run
    assert_same_bits(conv.bias, bias)
    return stats


TENSORS = given(
    filters=st.integers(2, 24),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    special=st.booleans(),
    threshold=THRESHOLDS,
    call=settings_of_a_call(),
    weight_seed=st.integers(0, 2**32),
)


def _tensor_is_reference(device, filters, shape, dtype, special, threshold, call, weight_seed):
    if math.prod(shape) == 1:
        shape = [*shape, 2]  # filters of one element have similarity 1 or -1: tested exactly below
    before = values((filters, *shape), dtype, weight_seed, special)
    weight = before.clone().to(device)
    threshold = threshold_for(before, call, threshold, groups=1, transposed=False)
    stats = inmerge_fast.merge_(weight, threshold=threshold, **call)
    assert_is_reference(before, weight, threshold=threshold, layer=0, **call)
    return stats


MODELS = given(
    widths=st.lists(st.tuples(st.integers(2, 9), st.sampled_from(DTYPES)), min_size=1, max_size=4),
    skip_first=st.integers(0, 2) | st.floats(0, 0.99),
    threshold=st.sampled_from([-1.0, 0.0, 0.2]),
    call=settings_of_a_call(),
    weight_seed=st.integers(0, 2**32),
)


def _model_is_reference(device, widths, skip_first, threshold, call, weight_seed):
    model = nn.Sequential(*(nn.Conv2d(2, width, 2).to(dtype) for width, dtype in widths)).to(device)
    if isinstance(skip_first, int):
        skip_first = min(skip_first, len(widths) - 1)
    with torch.no_grad():
        for index, conv in enumerate(model):
            conv.weight.copy_(values(tuple(conv.weight.shape), torch.float32, weight_seed + index, False))
    before = [conv.weight.detach().clone() for conv in model]
    stats = inmerge_fast.merge_(model, skip_first=skip_first, include_heads=True, threshold=threshold, **call)
    skipped = len(widths) - len(stats.layers)
    for index, conv in enumerate(model):
        if index < skipped:
            assert_same_bits(conv.weight, before[index])
        else:
            assert_is_reference(before[index], conv.weight, layer=index, threshold=threshold, **call)
    return stats


@pytest.mark.parametrize(
    ("check", "configurations", "examples"),
    [
        (_module_is_reference, MODULES, MODULE_EXAMPLES),
        (_tensor_is_reference, TENSORS, TENSOR_EXAMPLES),
        (_model_is_reference, MODELS, MODEL_EXAMPLES),
    ],
    ids=["modules", "tensors", "models"],
)
def test_random_configurations_equal_the_reference(device, check, configurations, examples):
    interpreted = bool(os.environ.get("INMERGE_INTERPRET"))

    @settings(max_examples=examples // INTERPRETED_SHARE if interpreted else examples)
    @configurations
    def one(**configuration):
        has_float64 = "torch.float64" in repr(configuration)
        assume(not (interpreted and has_float64))  # so that 200 configurations do run on the kernels
        stats = check(device, **configuration)
        if not interpreted and device.type == "cpu":
            expected = "cpu" if conftest.CPU_KERNEL and not os.environ.get("INMERGE_FORCE_EAGER") else "eager"
        else:
            widths = configuration.get("widths")  # of a model's layers, the first of which may be skipped
            is_float64 = "torch.float64" in repr(widths[-len(stats.layers) :]) if widths else has_float64
            expected = "eager" if is_float64 else "triton"
        assert stats.path == expected

    one()


def test_the_band_was_hardly_used():
    """Runs after the tests above: they would pass vacuously if many pairs lay in the band, or none merged."""
    if not tally.pairs:
        pytest.skip("the property tests did not run in this process")
    assert tally.pairs > 10_000
    assert tally.in_band < 0.01 * tally.pairs
    assert 0.2 < tally.passed / tally.pairs < 0.8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.3, 0.999])
def test_filters_of_one_element_merge_by_their_sign(device, dtype, threshold):
    before = torch.tensor([2.0, -1.0, 0.5, 4.0, -3.0, 0.0, 8.0], dtype=dtype)[:, None]
    weight = before.clone().to(device)
    stats = inmerge_fast.merge_(weight, threshold=threshold, prob=1.0, alpha=0.5, seed=3, step=1)
    _, partner = draw(3, 1, 0, 7, 1.0)
    sign = before.sign().squeeze(1)
    similarity = (sign * sign[partner]).double()
    merged = torch.ones(7, dtype=torch.bool) if threshold == -1 else similarity > threshold
    expected = torch.where(merged[:, None], (0.5 * before + 0.5 * before[partner]), before)
    assert_same_bits(weight, expected)
    assert stats.merged == merged.sum()
    assert stats.max_similarity == pytest.approx(similarity.max().item(), abs=1e-6)


def test_duplicated_filters_merge_below_one_and_stay_what_they_are(device):
    weight = torch.randn(1, 36).repeat(16, 1).to(device)
    before = weight.clone()
    stats = inmerge_fast.merge_(weight, threshold=0.999, prob=1.0, alpha=0.5, seed=1, step=0)
    assert stats.merged == 16
    assert_same_bits(weight, before)  # 0.5 x + 0.5 x is x exactly


def test_antiparallel_filters_merge_at_threshold_minus_one_only(device):
    row = torch.randn(1, 36)
    before = torch.cat([row, -row]).to(device)
    for threshold, expected in ((-1.0, 2), (-0.999, 0)):
        weight = before.clone()
        stats = inmerge_fast.merge_(weight, threshold=threshold, prob=1.0, alpha=0.75, seed=1, step=0)
        assert stats.merged == expected
        assert torch.equal(weight, 0.75 * before + 0.25 * before.flip(0) if expected else before)


def test_the_comparison_is_strict(device):
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    assert inmerge_fast.merge_(weight, threshold=0.0, prob=1.0, seed=1, step=0).merged == 0
    weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]], device=device)  # similarity exactly 1 in any order
    assert inmerge_fast.merge_(weight, threshold=1.0, prob=1.0, seed=1, step=0).merged == 0


def test_zero_filters_have_similarity_zero(device):
    weight = torch.zeros(4, 9, device=device)
    weight[0] = 1.0
    stats = inmerge_fast.merge_(weight.clone(), threshold=0.0, prob=1.0, seed=1, step=0)
    assert (stats.sampled, stats.merged, stats.max_similarity, stats.mean_similarity) == (4, 0, 0.0, 0.0)
    assert inmerge_fast.merge_(weight.clone(), threshold=-0.01, prob=1.0, seed=1, step=0).merged == 4


@pytest.mark.parametrize("norms", [(6.8e-5, 6.8e-5), (1e-9, 1.0), (1e-9, 1e-9)])
def test_each_norm_is_clamped_not_their_product(device, norms):
    direction = torch.full((1, 16), 0.25)
    weight = torch.cat([direction * norm for norm in norms]).to(device)
    stats = inmerge_fast.merge_(weight, threshold=0.0, prob=1.0, seed=1, step=0, dry_run=True)
    expected = (norms[0] / max(norms[0], 1e-8)) * (norms[1] / max(norms[1], 1e-8))
    assert stats.max_similarity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e19])
@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.3])
def test_non_finite_filters_never_merge_and_harm_no_other(device, bad, threshold):
    """2e19 is finite, but its square is not."""
    before = torch.rand(6, 10) + 0.5
    before[2, 3] = bad
    _, partner = draw(6, 0, 0, 6, 1.0)
    assert 2 in partner
    weight = before.clone().to(device)
    stats = inmerge_fast.merge_(weight, threshold=threshold, prob=1.0, seed=6, step=0)
    touched = (partner == 2) | (np.arange(6) == 2)
    assert_same_bits(weight[torch.from_numpy(touched)], before[torch.from_numpy(touched)])
    assert stats.sampled == 6
    assert stats.merged == 6 - touched.sum()
    assert (bits(weight) != bits(before)).any(1).sum() == stats.merged
    assert not math.isnan(stats.mean_similarity)


def test_partners_are_read_as_they_were_before_the_call(device):
    """A chain of merges in which every filter is read after, before or while it is rewritten."""
    before = torch.randn(64, 32)
    weight = before.clone().to(device)
    inmerge_fast.merge_(weight, threshold=-1.0, prob=1.0, alpha=0.25, seed=8, step=0)
    _, partner = draw(8, 0, 0, 64, 1.0)
    assert_same_bits(weight, 0.25 * before + 0.75 * before[partner])


def test_alpha_one_and_prob_zero_change_nothing(device):
    before = torch.randn(8, 9)
    for arguments in ({"alpha": 1.0, "prob": 1.0}, {"alpha": 0.5, "prob": 0.0}):
        weight = before.clone().to(device)
        inmerge_fast.merge_(weight, threshold=-1.0, seed=1, step=0, **arguments)
        assert torch.equal(weight.cpu(), before)


def test_the_paper_on_vgg19s_deep_layers_equals_a_loop_over_the_definition():
    """Equations (2) and (3) written out once more, independently of the reference."""
    weight = torch.randn(20, 6, 3, 3)
    coin, partner = draw(2, 7, 0, 20, 0.5)
    expected = weight.clone()
    for i in range(20):
        if coin[i]:
            cosine = torch.nn.functional.cosine_similarity(
                weight[i].flatten().double(), weight[partner[i]].flatten().double(), dim=0
            )
            if cosine > 0.02:
                expected[i] = 0.8 * weight[i] + 0.2 * weight[partner[i]]
    result = reference_merge(weight, coin, partner, alpha=0.8, threshold=0.02)
    torch.testing.assert_close(result.weight, expected, rtol=1e-6, atol=1e-7)
    assert 0 < result.merged.sum() < coin.sum()
    inmerge_fast.merge_(weight, alpha=0.8, prob=0.5, threshold=0.02, seed=2, step=7)
    assert_same_bits(weight, result.weight)


def test_transposed_convolution_mixes_output_channels(device):
    """Merging filter i with j is mixing output channel i with j, for transposed and grouped convolutions too."""
    conv = nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False, stride=2).to(device)
    x = torch.randn(1, 6, 5, 5, device=device)
    before = conv(x)
    inmerge_fast.merge_(conv, threshold=-1.0, prob=1.0, alpha=0.75, seed=4, step=0)
    _, partner = draw(4, 0, 0, 8, 1.0, groups=2)
    torch.testing.assert_close(conv(x), 0.75 * before + 0.25 * before[:, partner], rtol=1e-4, atol=1e-5)


def test_linear_rows_are_filters(device):
    linear = nn.Linear(10, 6).to(device)
    before = linear.weight.detach().clone()
    inmerge_fast.merge_(linear, threshold=-1.0, prob=1.0, seed=4, step=0)
    assert_is_reference(before, linear.weight, seed=4, step=0, layer=0, prob=1.0, alpha=0.8, threshold=-1.0)


def test_the_defaults_are_the_papers():
    for function in (inmerge_fast.merge_, reference_merge):
        parameters = inspect.signature(function).parameters
        assert (parameters["alpha"].default, parameters["threshold"].default) == (0.8, 0.3)
    assert inspect.signature(inmerge_fast.merge_).parameters["prob"].default == 0.3


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_layers_of_different_dtypes_do_not_share_their_precision(device, dtypes):
    before = [torch.randn(16, 9, dtype=dtype) for dtype in dtypes]
    weights = [weight.clone().to(device) for weight in before]
    call = {"prob": 1.0, "threshold": -1.0, "alpha": 0.3, "seed": 1, "step": 0}
    for _ in range(2):  # the second call finds the first one's memory
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
        inmerge_fast.merge_(weights, **call)
        for layer, (weight, old) in enumerate(zip(weights, before, strict=True)):
            assert_is_reference(old, weight, layer=layer, **call)


def test_arguments_may_be_any_real_numbers_and_integers():
    before = torch.randn(8, 9)
    weight, expected = before.clone(), before.clone()
    inmerge_fast.merge_(expected, alpha=0.75, prob=0.5, threshold=-0.25, seed=3, step=2, layer=1)
    inmerge_fast.merge_(
        weight,
        alpha=Fraction(3, 4),
        prob=np.float32(0.5),
        threshold=Fraction(-1, 4),
        seed=np.int64(3),
        step=np.int64(2),
        layer=np.int64(1),
    )
    assert_same_bits(weight, expected)
    assert not torch.equal(weight, before)


def test_threshold_minus_one_is_special_at_exactly_minus_one(device):
    before = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], device=device)  # similarity exactly -1 in any order
    for threshold, merged in ((-1.0, 2), (-1.0 + 1e-6, 0)):
        assert inmerge_fast.merge_(before.clone(), threshold=threshold, prob=1.0, seed=1, step=0).merged == merged


def test_the_references_comparison_is_strict_and_its_input_stays():
    coin, partner = draw(1, 0, 0, 2, 1.0)
    for rows, threshold in (([[1.0, 0.0], [0.0, 1.0]], 0.0), ([[3.0, 4.0], [3.0, 4.0]], 1.0)):
        weight = torch.tensor(rows)
        assert not reference_merge(weight, coin, partner, threshold=threshold).merged.any()
        assert reference_merge(weight, coin, partner, threshold=threshold - 0.01).merged.all()
        assert torch.equal(weight, torch.tensor(rows))
