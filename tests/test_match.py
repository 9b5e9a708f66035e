"""Partner rules against float64 brute force, on every path."""

import math
import os

import numpy as np
import pytest
import torch
from oracle import MATCH_BAND, PairOracle, assert_is_matched, assert_same_bits
from torch import nn

import inmerge_fast
from inmerge_fast import draw, reference_merge, reference_partners
from inmerge_fast.draw import priorities, priority_keys
from inmerge_fast.paths.match import match_layer
from inmerge_fast.paths.pairs import filters_of
from inmerge_fast.plan.filters import filter_layout

RULES = ["nearest", "similar"]
CALL = {"seed": 2**63 + 11, "step": 2**40 + 3, "prob": 0.6, "alpha": 0.75}


def adversarial(filters, elements, seed=0):
    """Filters with duplicates, opposites, zeros, NaN, Inf and overflowing norms among alike and unlike ones."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((filters, elements)) + rng.random((filters, 1)) * rng.standard_normal((1, elements))
    for i in range(1, filters):
        kind = rng.integers(0, 24)
        if kind == 0:
            rows[i] = rows[i - 1]
        elif kind == 1:
            rows[i] = -rows[i - 1]
        elif kind == 2:
            rows[i] = 0
        elif kind in (3, 4, 5):
            rows[i, 0] = [math.nan, math.inf, -math.inf][kind - 3]
        elif kind in (6, 7, 8):
            rows[i] *= [1e-6, 3e18, 1e25][kind - 6]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_models_of_all_kinds_of_layers_match_brute_force(device, rule, seed):
    """Groups, transposed and unaligned filters and all dtypes in one call; every row's outcome is checked."""
    interpreted = bool(os.environ.get("INMERGE_INTERPRET"))
    if interpreted and seed >= 2:
        pytest.skip("interpreted kernels take milliseconds a program")
    rng = np.random.default_rng(seed)
    layers = [
        (nn.Conv2d(3, 18, 3, groups=3), torch.float32),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.float32),
        (nn.Conv1d(5, 20, 1), torch.bfloat16),
        (nn.Conv2d(8, 9, 3), torch.float16),
        (nn.Conv2d(4, 33, 2).to(memory_format=torch.channels_last), torch.float32),
    ]
    if not interpreted:
        layers.append((nn.Conv3d(2, 7, 2), torch.float64))
    convs = []
    for conv, dtype in layers:
        shape = conv.weight.shape
        with torch.no_grad():
            conv.weight.copy_(adversarial(shape[0], shape[1:].numel(), int(rng.integers(2**31))).view(shape))
        convs.append(conv.to(device, dtype))
    before = [conv.weight.detach().clone(memory_format=torch.preserve_format) for conv in convs]
    threshold = [-1.0, 0.0, 0.2, 0.5, -0.3, 0.9][seed]
    groups = inmerge_fast.MergePlan(convs)
    dtypes = {torch.float64} & {layer.dtype for layer in groups.layers}
    calls = [convs] if not dtypes or device.type == "cpu" else [convs[:-1], convs[-1:]]
    sampled = ambiguous = 0
    for targets in calls:
        stats = inmerge_fast.merge_(targets, partner=rule, threshold=threshold, **CALL)
        for layer, conv in enumerate(targets):
            old = before[convs.index(conv)]
            counts = assert_is_matched(
                old, conv.weight, rule, layer=layer, threshold=threshold, groups=conv.groups,
                transposed=conv.transposed, **CALL,
            )  # fmt: skip
            assert stats.layers[layer].sampled == counts[0]
            sampled, ambiguous = sampled + counts[0], ambiguous + counts[1]
    assert sampled > 30
    assert ambiguous <= 0.15 * sampled  # the duplicates; a wider band would test nothing


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("filters", "elements"), [(2, 1), (2, 7), (3, 9), (64, 49), (257, 31), (2048, 65)])
def test_eager_choices_are_the_brute_force_ones(rule, filters, elements):
    weight = adversarial(filters, elements, seed=filters)
    pairs = PairOracle(weight)
    sampled = np.arange(0, filters, max(1, filters // 64))
    for threshold in (-1.0, 0.1):
        chosen = match_layer(
            weight, filter_layout(weight, "w"), sampled, rule, threshold=threshold, seed=5, step=6, layer=7
        )
        for i, j in zip(sampled.tolist(), chosen.tolist(), strict=True):
            choices = pairs.choices(i, rule, seed=5, step=6, layer=7, threshold=threshold, band=MATCH_BAND)
            assert j in choices, (i, choices)


@pytest.mark.parametrize("rule", RULES)
def test_the_reference_and_the_eager_path_choose_alike(rule):
    weight = adversarial(40, 23, seed=3)
    coin, _ = draw(1, 2, 3, 40, 0.8)
    expected = reference_partners(weight, coin, rule, threshold=0.1, seed=1, step=2, layer=3)
    sampled = np.flatnonzero(coin)
    chosen = match_layer(
        weight, filter_layout(weight, "w"), sampled, rule, threshold=0.1, seed=1, step=2, layer=3
    )  # fmt: skip
    same = chosen == expected[sampled]
    for i, a, b in zip(sampled[~same], chosen[~same], expected[sampled][~same], strict=True):
        assert torch.equal(weight[a], weight[b]), f"filter {i}: {a} and {b} are no duplicates"
    assert same.mean() > 0.8
    assert (expected[~coin] == -1).all()


def test_ties_go_to_the_lowest_index(device):
    weight = torch.zeros(6, 4)
    weight[:, 0] = 1.0  # 0, 1, 3 and 5 are the same filter; its powers of two make every path's arithmetic exact
    weight[2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    weight[4] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    weight[[0, 1, 3, 5]] *= torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None]
    before = weight.clone()
    inmerge_fast.merge_(weight := weight.to(device), partner="nearest", prob=1.0, alpha=0.5, seed=0, step=0)
    nearest = [1, 0, 4, 0, 2, 0]
    assert_same_bits(weight, 0.5 * before + 0.5 * before[nearest])


def test_similar_is_uniform_over_the_filters_above_the_threshold():
    stats = pytest.importorskip("scipy.stats")
    group, lone = [0, 3, 5, 6, 9], [1, 2, 4, 7, 8]
    weight = torch.eye(10)
    weight[group] = torch.ones(5, 10) + 0.1 * torch.eye(10)[group]
    layout = filter_layout(weight, "w")
    counts = np.zeros((10, 10), int)
    for step in range(2000):
        chosen = match_layer(weight, layout, np.arange(10), "similar", threshold=0.9, seed=4, step=step, layer=0)
        assert (chosen[lone] == -1).all()
        counts[group, chosen[group]] += 1
    for i in group:
        assert counts[i].sum() == 2000
        assert stats.chisquare(counts[i][[j for j in group if j != i]]).pvalue > 1e-4
    # Whom one filter takes says nothing about whom another takes.
    pair = [
        match_layer(weight, layout, np.array([0, 3]), "similar", threshold=0.9, seed=5, step=step, layer=0)
        for step in range(2000)
    ]
    table = np.zeros((10, 10), int)
    np.add.at(table, tuple(np.array(pair).T), 1)
    assert stats.chi2_contingency(table[[3, 5, 6, 9]][:, [0, 5, 6, 9]]).pvalue > 1e-4


def test_a_choice_does_not_change_while_no_other_filter_qualifies():
    """The draw contract: the priority of a pair depends on nothing but the draw, whoever else is in the layer."""
    key = priority_keys(1, 2, 3, np.array([4]))
    assert priorities(key, 5).tolist() == priorities(key, np.arange(10))[5:6].tolist()
    assert priorities(priority_keys(2**64 - 1, 2**63 - 1, 2**31 - 1, 7), np.array([0, 1, 2047])).tolist() == [
        395947200,
        572115201,
        1756234508,
    ]


@pytest.mark.parametrize("rule", RULES)
def test_prob_zero_and_a_threshold_of_one_change_nothing(device, rule):
    weight = adversarial(12, 9, seed=1).to(device)
    before = weight.clone()
    assert inmerge_fast.merge_(weight, partner=rule, prob=0.0, threshold=-1.0, seed=0, step=0).sampled == 0
    stats = inmerge_fast.merge_(torch.eye(6, device=device), partner=rule, prob=1.0, threshold=0.5, seed=0, step=0)
    assert (stats.sampled, stats.passed) == (6, 0)
    assert_same_bits(weight, before)
    assert math.isnan(stats.mean_similarity) if rule == "similar" else stats.max_similarity == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_filters_that_are_not_finite_neither_choose_nor_are_chosen(device, rule):
    weight = torch.ones(4, 3)
    weight[1, 0], weight[2, 0] = math.nan, 1e25
    before = weight.clone()
    weight = weight.to(device)
    stats = inmerge_fast.merge_(weight, partner=rule, prob=1.0, threshold=-1.0, alpha=0.5, seed=0, step=0)
    assert (stats.sampled, stats.passed) == (4, 2)
    assert_same_bits(weight, before)
    only = torch.tensor([[1.0, 2.0], [math.inf, 0.0]], device=device)
    assert inmerge_fast.merge_(only, partner=rule, prob=1.0, threshold=-1.0, seed=0, step=0).passed == 0


def test_the_same_filters_are_sampled_under_every_rule(device):
    weights = [adversarial(24, 10).to(device) for _ in range(3)]
    rows = []
    for weight, rule in zip(weights, ["random", *RULES], strict=True):
        before = weight.cpu().clone()
        inmerge_fast.merge_(weight, partner=rule, threshold=-1.0, **CALL)
        changed = (weight.cpu() != before) & ~before.isnan()
        rows.append(set(changed.any(1).nonzero().flatten().tolist()))
    coin, _ = draw(CALL["seed"], CALL["step"], 0, 24, CALL["prob"])
    assert all(found <= set(np.flatnonzero(coin).tolist()) for found in rows)


def test_random_is_the_default_and_unchanged():
    weight, twin = (adversarial(30, 12, seed=2) for _ in range(2))
    before = weight.clone()
    inmerge_fast.merge_(weight, threshold=0.1, **CALL)
    inmerge_fast.merge_(twin, threshold=0.1, partner="random", **CALL)
    assert_same_bits(weight, twin)
    coin, partner = draw(CALL["seed"], CALL["step"], 0, 30, CALL["prob"])
    assert_same_bits(weight, reference_merge(before, coin, partner, alpha=CALL["alpha"], threshold=0.1).weight)


@pytest.mark.parametrize(
    ("partner", "error", "message"),
    [("closest", ValueError, "must be one of 'random', 'similar', 'nearest', got 'closest'"), (None, TypeError, "str")],
)
def test_unknown_rules_raise_before_anything_is_written(partner, error, message):
    weight = torch.ones(4, 3)
    with pytest.raises(error, match=message):
        inmerge_fast.merge_(weight, partner=partner, threshold=-1.0)
    assert torch.equal(weight, torch.ones(4, 3))


@pytest.mark.parametrize("setting", ["autocast", "medium precision"])
def test_choices_do_not_depend_on_matmul_settings(setting):
    """bfloat16 products would confuse filters whose similarities differ by less than 4e-3."""
    torch.manual_seed(1)
    weight = torch.randn(64, 600) + 3 * torch.randn(1, 600)
    layout = filter_layout(weight, "w")
    call = {"threshold": 0.89, "seed": 1, "step": 0, "layer": 0}
    expected = [match_layer(weight, layout, np.arange(64), rule, **call) for rule in RULES]
    try:
        torch.set_float32_matmul_precision("medium" if setting == "medium precision" else "highest")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            found = [match_layer(weight, layout, np.arange(64), rule, **call) for rule in RULES]
    finally:
        torch.set_float32_matmul_precision("highest")
    for rule, a, b in zip(RULES, expected, found, strict=True):
        assert a.tolist() == b.tolist(), rule


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_is_multiplied_in_float64_where_less_than_float32_is_allowed(precision):
    """Whatever this CPU would make of the permission."""
    weight = torch.randn(4, 3)
    try:
        torch.set_float32_matmul_precision(precision)
        allowed_less = torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32")
        values = filters_of(weight, filter_layout(weight, "w"), exact=False).values
    finally:
        torch.set_float32_matmul_precision("highest")
    assert values.dtype == (torch.float64 if allowed_less else torch.float32)
    assert allowed_less or precision != "medium"
    if precision == "highest":
        assert values.data_ptr() == weight.data_ptr()  # no copy
