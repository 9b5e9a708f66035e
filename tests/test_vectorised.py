"""The vectorised oracle of the GPU tests is the reference, and it notices what is wrong."""

import math

import pytest
import torch
from oracle import assert_same_bits
from torch import nn
from vectorised import assert_merged, expect, integers, layout_of, rows_of, threshold_in_a_gap

from inmerge_fast import draw, merge_, reference_merge

CONVS = {
    "conv2d": lambda: nn.Conv2d(5, 12, 3),
    "conv3d": lambda: nn.Conv3d(2, 9, (1, 2, 3)),
    "grouped": lambda: nn.Conv2d(6, 12, 3, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(5, 7, 3),
    "grouped transposed": lambda: nn.ConvTranspose1d(6, 12, 4, groups=3),
    "linear": lambda: nn.Linear(10, 8),
}
CALL = {"seed": 3, "step": 2, "prob": 0.7}


def conv_of(name, dtype, *, special=False, channels_last=False):
    conv = CONVS[name]().to(dtype)
    with torch.no_grad():
        conv.weight.add_(0.6 * conv.weight.std())  # so that some are similar
        if special:
            conv.weight[:4] = torch.tensor([0.0, math.nan, math.inf, 2e19]).view(4, *[1] * (conv.weight.dim() - 1))
    return conv.to(memory_format=torch.channels_last) if channels_last else conv


def drawn(conv):
    layout = layout_of(conv)
    filters = conv.weight.shape[1] * layout["groups"] if layout["transposed"] else len(conv.weight)
    return draw(CALL["seed"], CALL["step"], 0, filters, CALL["prob"], groups=layout["groups"])


KINDS = [(name, dtype, False) for name in CONVS for dtype in (torch.float32, torch.bfloat16, torch.float16)]
KINDS += [(name, dtype, True) for name in ("conv2d", "grouped") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype", "special"), KINDS)
def test_the_vectorised_oracle_is_the_reference(name, dtype, special):
    conv = conv_of(name, dtype, special=special, channels_last=name == "conv2d")
    weight, layout = conv.weight.detach(), layout_of(conv)
    coin, partner = drawn(conv)
    similarity = expect(weight, coin, partner, alpha=0.8, threshold=-1.0, **layout).similarity
    for threshold in (-1.0, 0.0, threshold_in_a_gap(similarity)):
        arguments = {"alpha": 0.8, "threshold": threshold, **layout}
        found = expect(weight, coin, partner, **arguments)
        exact = reference_merge(weight, coin, partner, compute_dtype=torch.float64, **arguments)
        assert torch.equal(found.passed, exact.merged)
        assert torch.equal(found.coin, torch.from_numpy(coin))
        assert not found.in_band.any()
        torch.testing.assert_close(found.similarity, exact.similarity, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert_same_bits(found.new, rows_of(reference_merge(weight, coin, partner, **arguments).weight, **layout))
    assert 0 < found.passed.sum() < found.coin.sum()


@pytest.mark.parametrize("name", CONVS)
def test_it_takes_a_right_merge_and_no_wrong_one(name):
    conv = conv_of(name, torch.float32)
    layout, before = layout_of(conv), conv.weight.detach().clone()
    coin, partner = drawn(conv)
    similarity = expect(before, coin, partner, alpha=0.8, threshold=-1.0, **layout).similarity
    call = CALL | {"alpha": 0.8, "threshold": threshold_in_a_gap(similarity)}
    stats = merge_(conv, **call)
    expected = assert_merged(before, conv.weight, layer=0, **call, **layout)
    assert (stats.sampled, stats.passed) == (expected.coin.sum(), expected.passed.sum())
    after = conv.weight.detach().clone()
    for element in range(0, after.numel(), 7):
        wrong = after.clone()
        integers(wrong).view(-1)[element] ^= 1
        with pytest.raises(AssertionError, match="1 of .* filters are wrong"):
            assert_merged(before, wrong, layer=0, **call, **layout)
    with pytest.raises(AssertionError, match="filters are wrong"):
        assert_merged(before, before, layer=0, **call, **layout)


def test_a_close_call_may_go_either_way_but_only_those_two():
    before = torch.tensor([[3.0, 4.0], [3.0, 4.0], [4.0, -3.0]])
    partner = draw(1, 0, 0, 3, 1.0)[1]
    call = {"seed": 1, "step": 0, "layer": 0, "prob": 1.0, "alpha": 0.75, "threshold": 5e-7}
    expected = expect(before, [True] * 3, partner, alpha=0.75, threshold=5e-7)
    close = expected.in_band.nonzero().flatten().tolist()
    assert close
    for index in close:
        for value, right in ((expected.old[index], True), (expected.blended[index], True), (torch.ones(2), False)):
            after = expected.new.clone()
            after[index] = value
            if right:
                assert_merged(before, after, **call)
            else:
                with pytest.raises(AssertionError, match="1 of 3 filters are wrong"):
                    assert_merged(before, after, **call)
