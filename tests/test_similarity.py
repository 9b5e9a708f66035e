"""``similarity``: summaries against the full matrix, thresholds against what ``merge_`` then merges."""

import math

import numpy as np
import pytest
import torch
from oracle import PairOracle
from test_match import adversarial
from torch import nn

import inmerge_fast
from inmerge_fast.inspection.similarity import similarity
from inmerge_fast.layer_similarity import RESOLUTION
from inmerge_fast.paths import pairs


def off_diagonal(matrix):
    matrix = matrix.clone().double().cpu()
    matrix.fill_diagonal_(math.nan)
    return matrix[~matrix.isnan()]


TARGETS = {
    "plain": lambda: nn.Conv2d(5, 40, 3),
    "grouped": lambda: nn.Conv2d(6, 30, 3, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(4, 12, 3, groups=2),
    "bfloat16": lambda: nn.Conv1d(7, 21, 3).bfloat16(),
    "channels_last": lambda: nn.Conv2d(5, 17, 3).to(memory_format=torch.channels_last),
    "double": lambda: nn.Linear(9, 33).double(),
    "special values": lambda: nn.Parameter(adversarial(60, 11, 5)),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("block", [1 << 21, 100])
def test_summaries_are_those_of_the_full_matrix(full_device, kind, block, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK_PAIRS", block)
    target = TARGETS[kind]()
    layout = {"groups": getattr(target, "groups", 1), "transposed": getattr(target, "transposed", False)}
    weight = target if isinstance(target, torch.Tensor) else target.weight
    oracle = PairOracle(weight, **layout)
    target = nn.Parameter(target.to(full_device)) if isinstance(target, torch.Tensor) else target.to(full_device)
    found = similarity(target)
    (layer,) = found.layers
    matrix = found.matrix()

    filters, size = len(oracle.similarity), oracle.size
    expected = torch.tensor(oracle.similarity)
    group = torch.arange(filters) // size
    finite = torch.tensor(oracle.finite)
    expected[(group[:, None] != group) | ~finite[:, None] | ~finite] = math.nan
    torch.testing.assert_close(matrix.cpu(), expected, rtol=0, atol=1e-12, equal_nan=True)

    values = off_diagonal(expected)
    assert (layer.filters, layer.groups) == (filters, filters // size)
    assert layer.elements == weight.numel() // filters
    assert (layer.finite, layer.pairs) == (int(finite.sum()), values.numel())
    assert layer.zero == int((expected.diagonal() == 0).sum())
    assert layer.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert layer.std == pytest.approx(values.std(correction=0).item(), rel=1e-6)
    assert layer.max == pytest.approx(values.max().item(), abs=1e-12)
    assert layer.pair_counts.sum() == layer.pairs
    for share in (0.01, 0.1, 0.5, 0.95, 1.0):
        exact = np.quantile(values.numpy(), share, method="inverted_cdf")
        assert exact - 1e-9 <= layer.quantile(share) <= min(exact + RESOLUTION, 1.0) + 1e-9
    units = torch.nan_to_num(expected)
    sigma = torch.linalg.eigvalsh(units).clamp(min=0).sqrt()
    share = sigma / sigma.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert layer.effective_rank == pytest.approx(entropy.exp().item(), rel=1e-4)


@pytest.mark.parametrize("partner", ["random", "nearest", "similar"])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5])
def test_merging_at_the_threshold_for_a_rate_has_that_rate(partner, rate):
    conv = nn.Conv2d(8, 200, 3)
    layer = similarity(conv).layers[0]
    threshold = layer.threshold_for_rate(rate, partner)
    calls = [
        inmerge_fast.merge_(conv, threshold=threshold, partner=partner, prob=1.0, seed=1, step=step, dry_run=True)
        for step in range(40 if partner == "random" else 1)
    ]
    merged = sum(call.passed for call in calls) / sum(call.sampled for call in calls)
    assert merged == pytest.approx(layer.share_above(threshold, partner), abs=0.012 if partner == "random" else 1e-12)
    assert layer.share_above(threshold, partner) <= rate
    if rate:
        assert layer.share_above(threshold - RESOLUTION, partner) > rate
        assert merged > rate / 2


def test_share_above_counts_pairs_at_four_decimals_exactly():
    conv = nn.Conv2d(3, 64, 3)
    found = similarity(conv)
    values, nearest = off_diagonal(found.matrix()), found.matrix().fill_diagonal_(-2).amax(1)
    for threshold in (-1.0, -0.1234, 0.0, 0.1, 0.3, 0.4321, 1.0):
        assert found.layers[0].share_above(threshold) == (values > threshold).double().mean().item()
        assert found.layers[0].share_above(threshold, "nearest") == (nearest > threshold).double().mean().item()


def test_duplicates_and_dead_filters_are_seen():
    weight = torch.randn(20, 50)
    weight[1:6] = weight[0]
    weight[10:13] = 0.0
    layer = similarity(weight).layers[0]
    assert layer.zero == 3
    assert layer.max == pytest.approx(1.0)
    assert layer.share_above(0.999) == pytest.approx(6 * 5 / (20 * 19))
    assert layer.threshold_for_rate(0.01) == 1.0  # 8 % of the pairs are duplicates: only 1 stops them all
    assert layer.effective_rank < similarity(torch.randn(20, 50)).layers[0].effective_rank - 5
    assert math.isnan(similarity(weight, effective_rank=False).layers[0].effective_rank)


def test_models_tables_and_names():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 3)), nn.Conv2d(16, 16, 3, groups=16))
    found = similarity(model)
    assert [layer.name for layer in found.layers] == ["0", "1.0"]
    assert found["1.0"].filters == 16
    assert found.skipped[0][0] == "2"
    text = str(found)
    assert "1.0" in text
    assert "skipped 1" in text
    assert found.threshold_for_rate(0.1).keys() == {"0", "1.0"}
    assert [layer.name for layer in similarity(model, skip_first=1).layers] == ["1.0"]
    plan = inmerge_fast.MergePlan(model, skip_first=1)
    assert [layer.name for layer in similarity(plan).layers] == ["1.0"]
    with pytest.raises(ValueError, match="are set where a MergePlan is built"):
        similarity(plan, skip_first=1)
    with pytest.raises(KeyError, match="no layer 'x'; there are '0', '1.0'"):
        found["x"]
    with pytest.raises(ValueError, match="one of the 2 layers"):
        found.matrix()


def test_state_dicts_are_told_by_their_keys():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 3), nn.Linear(4, 6))
    found = similarity(model.state_dict())
    assert [layer.name for layer in found.layers] == ["0.weight"]
    assert found.skipped[0][0] == "2.weight"
    assert found.matrix("0.weight").shape == (8, 8)
    assert [layer.name for layer in similarity(model.state_dict(), include_linear=True).layers][-1] == "3.weight"
    with pytest.raises(ValueError, match="no floating-point tensor of 3 dimensions"):
        similarity({"a": torch.ones(3), "b": 1})


def test_matrices_are_of_the_weights_as_they_are_now_and_nothing_changes():
    conv = nn.Conv2d(3, 8, 3)
    before = conv.weight.detach().clone()
    found = similarity(conv)
    assert torch.equal(conv.weight, before)
    with torch.no_grad():
        conv.weight[1] = conv.weight[0]
    assert found.matrix()[0, 1].item() == pytest.approx(1.0)
    assert not found.matrix().requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer.threshold_for_rate(1.5), r"rate must be in \[0, 1\], got 1.5"),
        (lambda layer: layer.share_above(-2), r"threshold must be in \[-1, 1\], got -2"),
        (lambda layer: layer.quantile(math.nan), "share must be in"),
        (lambda layer: layer.share_above(0.5, "closest"), "partner must be one of"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(similarity(nn.Conv2d(3, 8, 3)).layers[0])


def test_layers_without_a_finite_pair_say_so():
    layer = similarity(torch.full((4, 3), math.inf)).layers[0]
    assert (layer.pairs, layer.finite) == (0, 0)
    assert math.isnan(layer.mean)
    with pytest.raises(ValueError, match="fewer than two filters of a group are finite"):
        layer.quantile(0.5)
    assert "nan" in str(similarity(torch.full((4, 3), math.inf)))
