"""The CPU kernel against the definition: draws, values to the bit, decisions, layouts, order of reads and writes."""

import json
import math
from pathlib import Path

import cpu_kernel
import numpy as np
import pytest
import torch
from cpu_kernel import DTYPES, layer_of, run, similar_filters
from oracle import BAND, assert_is_reference, assert_same_bits, bits
from torch import nn

from inmerge_fast import MergePlan, draw, native, reference_merge
from inmerge_fast.draw import MAX_LAYER, MAX_SEED, MAX_STEP
from inmerge_fast.paths import cpu
from inmerge_fast.rank_cost import NEVER

CALL = {"seed": 5, "step": 3}
# The blends of the fast paths, which compute in float32 below float64.
REFERENCE = {dtype: {"compute_dtype": torch.float64} if dtype == torch.float64 else {} for dtype in DTYPES}
GOLDEN = json.loads((Path(__file__).parent / "golden_draws.json").read_text())


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    return cpu_kernel.use(monkeypatch)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def code(request, kernel):
    """Every instruction set of the build."""
    if request.param not in kernel.code_names:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


# The draw.


def drawn(filters, groups, code, seed, step, layer, prob):
    """Coins and partners as the kernel draws them: filters of one element, each of which becomes its partner."""
    index = np.arange(filters)
    weight = torch.from_numpy(index).float().add_(1)[:, None]
    pairs = run(
        ([weight], [layer_of(weight, groups=groups, layer_id=layer)]),
        code=code, seed=seed, step=step, prob=prob, alpha=0.0, thresholds=-1.0,
    )  # fmt: skip
    place = weight[:, 0].long().numpy() - 1
    coin = place != index
    assert pairs.counts.tolist() == [coin.sum()]
    return coin, place


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['seed']}-{case['step']}-{case['filters']}")
def test_draws_are_the_golden_ones(case, code):
    arguments = {name: case[name] for name in ("seed", "step", "layer", "prob")}
    coin, partner = drawn(case["filters"], case["groups"], code, **arguments)
    known = len(case["coin"])
    assert coin[:known].tolist() == [bool(c) for c in case["coin"]]
    assert coin.sum() == case.get("coins_total", sum(case["coin"]))
    expected = np.array(case["partner"])
    assert (partner[:known] == np.where(coin[:known], expected, np.arange(known))).all()


def test_any_draw_is_the_definitions(code):
    rng = np.random.default_rng(0)
    for _ in range(50):
        groups = int(rng.integers(1, 4))
        filters = groups * int(rng.integers(2, 200))
        seed, step = int(rng.integers(MAX_SEED, endpoint=True, dtype=np.uint64)), int(rng.integers(MAX_STEP))
        layer, prob = int(rng.integers(MAX_LAYER)), float(rng.choice([0.0, 1e-7, 0.3, 1 - 2**-24, 1.0]))
        coin, partner = draw(seed, step, layer, filters, prob, groups=groups)
        expected = np.where(coin, partner, np.arange(filters))
        found, place = drawn(filters, groups, code, seed, step, layer, prob)
        assert (found == coin).all()
        assert (place == expected).all()


def test_a_draw_of_many_filters_uses_all_bits(code):
    """The lower word of the partner's fraction decides for one filter of 4096 here, and among few for hardly any."""
    top = {"seed": MAX_SEED, "step": MAX_STEP, "layer": MAX_LAYER}
    _, partner = draw(**top, filters=2**20, prob=1.0)
    found, place = drawn(2**20, 1, code, **top, prob=1.0)
    assert found.all()
    assert (place == partner).all()


# Values and decisions.


@pytest.mark.parametrize("elements", [1, 9, 31, 32, 33, 64, 100, 4095, 4096, 4129, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_of_filter_gives_the_references_bits(code, dtype, elements):
    for prob, threshold, alpha in ((1.0, -1.0, 0.8), (0.7, 0.5, 1 / 3), (0.3, 0.0, 0.5), (1.0, 1.0, 0.8)):
        weight = similar_filters(20, elements, dtype=dtype)
        before = weight.clone()
        pairs = run(weight, code=code, prob=prob, thresholds=threshold, alpha=alpha)
        sampled, passed = assert_is_reference(
            before, weight, layer=0, prob=prob, alpha=alpha, threshold=threshold, **CALL
        )  # fmt: skip
        assert pairs.counts.tolist() == [sampled]
        assert passed in (None, pairs.passed.sum())
        assert_similarities(before, pairs, prob)


def assert_similarities(before, pairs, prob):
    coin, partner = draw(**CALL, layer=0, filters=len(before), prob=prob)
    exact = reference_merge(before, coin, partner, threshold=NEVER, compute_dtype=torch.float64).similarity[coin]
    assert pairs.similarity.dtype == np.float64
    np.testing.assert_allclose(pairs.similarity, exact.numpy(), rtol=0, atol=BAND)
    if before.dtype == torch.float64:
        np.testing.assert_allclose(pairs.similarity, exact.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_rounded_as_by_pytorch(code, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.float().abs() < 1e15)]
    for alpha in (1.0, 0.8, 0.3, 0.999):
        before = torch.stack([every, every[torch.randperm(len(every))]])
        weight = before.clone()
        run(weight, code=code, prob=1.0, thresholds=-1.0, alpha=alpha)
        expected = reference_merge(before, np.ones(2, bool), np.array([1, 0]), alpha=alpha, threshold=-1.0)
        assert_same_bits(weight, expected.weight)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_at_its_ends(code, dtype, alpha):
    weight = similar_filters(24, 70, dtype=dtype)
    before = weight.clone()
    run(weight, code=code, prob=0.6, thresholds=-1.0, alpha=alpha)
    assert_is_reference(before, weight, layer=0, prob=0.6, alpha=alpha, threshold=-1.0, **CALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float32_similarities_are_compared_with_a_float32_threshold(code, dtype):
    weight = similar_filters(2, 40, dtype=dtype, special=False)
    similarity = run(weight, code=code, prob=1.0, thresholds=NEVER).largest
    assert (similarity == float(np.float32(similarity))) == (dtype == torch.float32)
    below = float(np.nextafter(similarity, -1.0))
    assert run(weight, code=code, prob=1.0, thresholds=below).passed.sum() == (0 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_subnormal_values_count_whatever_the_thread_does_with_them(code, dtype, flush):
    scale = torch.finfo(dtype).smallest_normal / 8
    before = similar_filters(24, 50, dtype=torch.float64, special=False).mul(scale).to(dtype)
    assert (before != 0).float().mean() > 0.8
    coin, partner = draw(**CALL, layer=0, filters=24, prob=1.0)
    expected = reference_merge(before, coin, partner, threshold=-1.0, **REFERENCE[dtype])
    weight = before.clone()
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot set subnormals to zero")
    try:
        pairs = run(weight, code=code, prob=1.0, thresholds=-1.0)
        flushes = (torch.tensor([scale], dtype=dtype) * 1.5).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert flushes == flush, "the caller's setting is left as it was"
    assert_same_bits(weight, expected.weight)
    assert pairs.passed.all()


def test_dry_run_writes_nothing(code):
    weight = similar_filters(40, 100)
    before = weight.clone()
    dry = run(weight, code=code, dry_run=True)
    assert_same_bits(weight, before)
    wet = run(weight, code=code)
    assert not torch.equal(bits(weight), bits(before))
    assert cpu_kernel.bytes_of(dry) == cpu_kernel.bytes_of(wet)


def test_totals():
    weight = similar_filters(60, 100)
    pairs = run(weight, prob=0.8)
    assert pairs.passed_total == pairs.passed.sum() > 0
    assert pairs.largest == np.nanmax(pairs.similarity)
    assert np.isnan(pairs.similarity).any()
    nobody = run(torch.full((4, 5), math.nan), prob=1.0)
    assert (nobody.passed_total, nobody.largest, nobody.counts.tolist()) == (0, -math.inf, [4])
    nothing = run(weight, prob=0.0)
    assert (nothing.passed_total, nothing.largest, nothing.similarity.size) == (0, -math.inf, 0)


# Layouts.


class Layers(nn.Module):
    """Dense, grouped, transposed and channels_last layers of all dtypes, of one draw."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 64, 3)
        self.b = nn.ConvTranspose2d(64, 32, 4, groups=4)
        self.c = nn.Conv2d(32, 64, 3, groups=8).to(memory_format=torch.channels_last)
        self.d = nn.ConvTranspose3d(16, 24, 3)
        self.e = nn.Conv1d(5, 40, 7).bfloat16()
        self.f = nn.ConvTranspose1d(20, 24, 5, groups=2).half()
        self.g = nn.Conv2d(16, 32, 1).double()
        self.h = nn.ConvTranspose2d(64, 32, 4, groups=4).to(memory_format=torch.channels_last)
        self.i = nn.ConvTranspose2d(6, 20, 1).double()
        self.j = nn.ConvTranspose2d(16, 24, (2, 3)).bfloat16()
        with torch.no_grad():
            for weight in (p for p in self.parameters() if p.dim() > 1):
                weight.add_(weight.float().std())


@pytest.mark.parametrize("threshold", [-1.0, 0.45])
@pytest.mark.parametrize("prob", [0.3, 1.0])
def test_every_layout_gives_the_references_bits(code, prob, threshold):
    model = Layers()
    before = {name: conv.weight.detach().clone() for name, conv in model.named_children()}
    plan = MergePlan(model, skip_first=0)
    assert [layer.layout.is_dense for layer in plan.layers].count(False) >= 5
    merger = cpu.CpuMerge(plan.layers, plan.weights(), plan.rows.start, code=code)
    pairs = merger.run(**CALL, prob=prob, alpha=0.8, thresholds=threshold, dry_run=False)
    assert len(pairs.counts) == len(before) == 10
    for layer, (name, conv) in enumerate(model.named_children()):
        sampled, _ = assert_is_reference(
            before[name], conv.weight, layer=layer, prob=prob, alpha=0.8, threshold=threshold, groups=conv.groups,
            transposed=conv.transposed, **CALL,
        )  # fmt: skip
        assert pairs.counts[layer] == sampled
    assert 0 < pairs.passed_total <= len(pairs.passed)


@pytest.mark.parametrize("offset", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_may_start_at_any_byte(code, dtype, offset):
    before = similar_filters(24, 45, dtype=dtype)
    buffer = bytearray(offset + before.numel() * before.element_size() + 1)
    weight = torch.frombuffer(buffer, dtype=dtype, count=before.numel(), offset=offset).view_as(before)
    weight.copy_(before)
    pairs = run(([weight], [layer_of(weight)]), code=code, prob=0.8, thresholds=0.3)
    assert_is_reference(before, weight.clone(), layer=0, prob=0.8, alpha=0.8, threshold=0.3, **CALL)
    assert pairs.passed_total > 0
    assert not any(buffer[:offset])
    assert not buffer[-1]


def test_a_threshold_for_each_layer(code):
    thresholds = [0.5, NEVER, -1.0, 1.0, 0.2]
    weights = [similar_filters(24, 100, dtype=DTYPES[k % 4], seed=k) for k in range(5)]
    before = [weight.clone() for weight in weights]
    pairs = run(weights, code=code, prob=0.6, thresholds=thresholds)
    passed = np.split(pairs.passed, np.cumsum(pairs.counts)[:-1])
    assert passed[0].any()
    assert not passed[1].any()
    for layer, (old, new, threshold) in enumerate(zip(before, weights, thresholds, strict=True)):
        if threshold == NEVER:
            assert_same_bits(new, old)
        else:
            assert_is_reference(old, new, layer=layer, prob=0.6, alpha=0.8, threshold=threshold, **CALL)


# Given partners, and the order of reads and writes.


def check_given(before, coin, partner, code, threshold=-1.0, alpha=0.8):
    weight = before.clone()
    pairs = run(weight, code=code, given=(coin, partner), thresholds=threshold, alpha=alpha)
    found = coin & (partner >= 0)
    expected = reference_merge(
        before, found, np.where(found, partner, 0), threshold=threshold, alpha=alpha, **REFERENCE[before.dtype]
    )
    assert_same_bits(weight, expected.weight)
    assert pairs.counts.tolist() == [coin.sum()]
    assert (pairs.passed == expected.merged.numpy()[coin]).all()
    assert (np.isnan(pairs.similarity) == expected.similarity.isnan().numpy()[coin]).all()
    return pairs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_circles_and_all_that_leads_into_them(code, dtype):
    rng = np.random.default_rng(1)
    for _ in range(60):
        filters = int(rng.integers(2, 30))
        before = similar_filters(filters, 20, dtype=dtype, special=bool(rng.integers(2)), seed=int(rng.integers(99)))
        permuted = np.roll(np.arange(filters), -1)  # one circle of all
        anyone = (np.arange(filters) + rng.integers(1, filters, filters)) % filters
        circles = rng.permutation(filters)
        circles = np.where(circles == np.arange(filters), (circles + 1) % filters, circles)
        for partner in (permuted, anyone, circles):
            for share in (0.5, 0.9, 1.0):
                check_given(before, rng.random(filters) < share, partner, code, threshold=rng.choice([-1.0, 0.45]))


def test_a_circle_whose_first_filter_does_not_merge(code):
    """Nothing is kept then, and the filter that closes the circle reads it where it lies."""
    before = torch.eye(4)
    before[3] += 10 * before[2]  # 2 and 3 are alike, so of the circle 0-1-2-3-0 only 2 merges
    for turn in range(4):
        partner = (np.arange(4) + 1) % 4
        pairs = check_given(before.roll(turn, 0), np.ones(4, bool), partner, code, threshold=0.5)
        assert pairs.passed_total == 1


def test_a_filter_without_a_partner(code):
    before = similar_filters(40, 60)
    rng = np.random.default_rng(2)
    partner = (np.arange(40) + rng.integers(1, 40, 40)) % 40
    partner[rng.random(40) < 0.4] = -1
    coin = rng.random(40) < 0.8
    pairs = check_given(before, coin, partner, code)
    assert np.isnan(pairs.similarity[partner[coin] < 0]).all()
    assert not pairs.passed[partner[coin] < 0].any()
    assert (partner[coin] < 0).any()
    assert pairs.passed.any()
    alone = check_given(before, np.ones(40, bool), np.full(40, -1), code)
    assert (alone.passed_total, alone.largest) == (0, -math.inf)


def test_given_partners_in_groups_of_several_layers(code):
    rng = np.random.default_rng(3)
    weights = [similar_filters(24, 30, seed=1), similar_filters(36, 50, seed=2, dtype=torch.bfloat16)]
    before = [weight.clone() for weight in weights]
    layers = [layer_of(weights[0], groups=4), layer_of(weights[1], groups=3)]
    coin, partner = rng.random(60) < 0.7, np.concatenate([np.roll(np.arange(n), 1) for n in (24, 36)])
    pairs = run((weights, layers), code=code, given=(coin, partner), thresholds=-1.0)
    for old, new, at in zip(before, weights, (slice(0, 24), slice(24, 60)), strict=True):
        assert_same_bits(new, reference_merge(old, coin[at], partner[at], threshold=-1.0).weight)
    assert pairs.counts.tolist() == [coin[:24].sum(), coin[24:].sum()]


# Inputs that do not fit.


@pytest.mark.parametrize(
    ("coin", "partner"),
    [
        (np.ones(4, bool), np.array([1, 2, 4, 0])),
        (np.ones(4, bool), np.array([1, 2, -2, 0])),
        (np.ones(4, bool), np.array([1, 2, 2, 0])),
        (np.ones(3, bool), np.array([1, 2, 0])),
        (np.ones(4, bool), np.array([1, 2, 0])),
    ],
    ids=["past the end", "before the start", "itself", "too few", "fewer partners than coins"],
)
def test_given_partners_must_be_other_filters(coin, partner):
    weight = similar_filters(4, 30, special=False)
    before = weight.clone()
    with pytest.raises(ValueError, match="partner"):
        run(weight, given=(coin, partner), thresholds=-1.0)
    assert_same_bits(weight, before)


def test_a_partner_is_not_looked_at_where_the_coin_did_not_fall():
    weight = similar_filters(4, 30, special=False)
    run(weight, given=(np.array([True, False, False, False]), np.array([1, 99, -7, 3])), thresholds=-1.0)


def test_thresholds_must_fit_the_layers():
    with pytest.raises(ValueError, match="thresholds has 16 bytes instead of 8"):
        run(similar_filters(4, 30), thresholds=[0.1, 0.2])


def test_a_layer_that_cannot_be_is_refused(kernel):
    weight = similar_filters(4, 30)
    for change in ({"run": 7}, {"group_size": 3}, {"group_size": 1}, {"elements": 0}, {"filters": 2**31}):
        layer = layer_of(weight)
        for name, value in change.items():
            object.__setattr__(layer.layout, name, value)
        with pytest.raises(ValueError, match="layers"):
            run(([weight], [layer]))
    with pytest.raises(ValueError, match="bytes"):
        kernel.merge(bytes(87), bytes(8), None, None, 0, 0, 0, 0.5, False, 1, None)
    with pytest.raises(ValueError, match="no code 'neon512'"):
        run(weight, code="neon512")


# Whether it can be used.


def test_a_build_from_another_version_is_not_used(monkeypatch, kernel):
    monkeypatch.setattr(kernel, "version", native.VERSION + 1)
    assert f"{native.VERSION + 1} instead of {native.VERSION}" in cpu.unavailable()
    with pytest.raises(RuntimeError, match="another version"):
        run(similar_filters(4, 30))


def test_reasons_why_it_is_unavailable(monkeypatch):
    monkeypatch.setitem(native.sys.modules, "inmerge_fast._cpu", None)
    assert "not built" in cpu.unavailable()
    monkeypatch.setattr(native.sysconfig, "get_config_var", lambda name: 1)
    assert "free-threaded" in cpu.unavailable()
    monkeypatch.setattr(native.sys.implementation, "name", "pypy")
    assert "pypy" in cpu.unavailable()
