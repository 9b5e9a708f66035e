"""The two paths that need no GPU, the CPU's kernel and eager PyTorch: the reference's bits in every layout and type."""

import conftest
import numpy as np
import pytest
import torch
from oracle import assert_is_reference, assert_same_bits
from torch import nn

from inmerge_fast import draw, merge_, reference_merge

CALL = {"seed": 5, "step": 3}
SPECIAL = [0.0, np.nan, np.inf, 2e19, 1e-30]


@pytest.fixture(params=["cpu", "eager"])
def path(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
    elif not conftest.CPU_KERNEL:
        pytest.skip("the CPU kernel is not built here")
    return request.param


def similar_filters(*shape, dtype=torch.float32, special=True):
    """A weight with similarities on both sides of 0.5, and filters of zeros, NaN, Inf, huge and tiny values."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) + torch.randn(1, *shape[1:], generator=generator)
    if special:
        values = torch.tensor(SPECIAL).view(-1, *[1] * (len(shape) - 1))
        weight[: len(SPECIAL)] = values
    return weight.to(dtype)


LAYOUTS = {
    "short": lambda w: nn.Parameter(w(24, 3, 3, 3)),
    "one element": lambda w: nn.Parameter(w(24, 1)),
    "long": lambda w: nn.Parameter(w(24, 2500)),
    "just long": lambda w: nn.Parameter(w(24, 2048)),
    "channels_last": lambda w: nn.Parameter(w(24, 300, 3, 3).contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.0])
@pytest.mark.parametrize("prob", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_references_bits(path, layout, dtype, prob, threshold):
    weight = LAYOUTS[layout](lambda *shape: similar_filters(*shape, dtype=dtype))
    before = weight.detach().clone()
    stats = merge_(weight, prob=prob, threshold=threshold, **CALL)
    sampled, passed = assert_is_reference(
        before, weight, layer=0, prob=prob, alpha=0.8, threshold=threshold, **CALL
    )  # fmt: skip
    assert stats.path == path
    assert stats.sampled == sampled
    assert passed in (None, stats.passed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_strided_filters_give_the_references_bits(path, groups, dtype):
    conv = nn.ConvTranspose2d(9, 12, 3, groups=groups).to(dtype)
    with torch.no_grad():
        conv.weight.add_(conv.weight.std())
    before = conv.weight.detach().clone()
    assert merge_(conv, prob=0.7, threshold=0.4, **CALL).merged > 0
    assert_is_reference(
        before, conv.weight, layer=0, prob=0.7, alpha=0.8, threshold=0.4, groups=groups, transposed=True, **CALL
    )  # fmt: skip


def test_layers_of_several_dtypes_in_one_call(path):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float64)
    weights = [similar_filters(24, 700 * (k + 1), dtype=dtype) for k, dtype in enumerate(dtypes)]
    before = [weight.clone() for weight in weights]
    assert merge_(weights, prob=0.6, threshold=0.5, **CALL).merged > 0
    for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
        assert_is_reference(old, new, layer=layer, prob=0.6, alpha=0.8, threshold=0.5, **CALL)


@pytest.mark.parametrize("beside", [torch.float32, torch.float64], ids=["", "beside float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_threshold_within_float32_rounding_of_a_similarity(path, dtype, beside):
    """Float32 similarities are compared with the threshold as a float32, float64 ones with all its digits."""
    weights = [similar_filters(2, 40, dtype=kind, special=False) for kind in (dtype, beside)]
    similarity = merge_(weights, prob=1.0, threshold=-1.0, dry_run=True, **CALL).layers[0].max_similarity
    assert (similarity == float(np.float32(similarity))) == (dtype == torch.float32)
    below = float(np.nextafter(similarity, -1.0))
    layer = merge_(weights, prob=1.0, threshold=below, dry_run=True, **CALL).layers[0]
    assert layer.passed == (0 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("elements", [20, 3000])
def test_numpys_error_handling_is_the_users_business(path, elements):
    weight = similar_filters(24, elements)
    before = weight.clone()
    with np.errstate(all="raise"):
        merge_(weight, prob=1.0, threshold=0.5, **CALL)
    assert_is_reference(before, weight, layer=0, prob=1.0, alpha=0.8, threshold=0.5, **CALL)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_bit(path, threads):
    before = similar_filters(64, 3000)
    coin, partner = draw(5, 3, 0, 64, 0.5)
    expected = reference_merge(before, coin, partner, threshold=0.5).weight
    weight = before.clone()
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        merge_(weight, prob=0.5, threshold=0.5, **CALL)
    finally:
        torch.set_num_threads(kept)
    assert_same_bits(weight, expected)


@pytest.mark.parametrize("elements", [20, 3000])
def test_the_storage_of_a_merged_weight_can_still_be_resized(path, elements):
    """``Tensor.numpy()`` would end that, and FSDP frees weights so."""
    weight = similar_filters(24, elements)
    merge_(weight, prob=1.0, threshold=-1.0, **CALL)
    assert weight.untyped_storage().resizable()
