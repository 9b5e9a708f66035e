"""The match kernels in Triton's interpreter: several tiles, every order, watched, and how exact tf32x3 is."""

import numpy as np
import pytest
import torch
from oracle import MATCH_BAND, MATCH_BAND_16_BITS, PairOracle
from test_match import adversarial
from torch import nn

from inmerge_fast import MergePlan, draw

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interleave import interleaved, permuted  # noqa: E402
from interpreter import apply_fixes, bounds, traffic  # noqa: E402
from test_kernels import partners_of as drawn_partners  # noqa: E402
from test_kernels import tensors_of  # noqa: E402

from inmerge_fast.paths.triton.launch import Launcher  # noqa: E402
from inmerge_fast.paths.triton.launch_match import work_items  # noqa: E402
from inmerge_fast.reference import filter_of  # noqa: E402

RULES = ["nearest", "similar"]
SMALL = {"ROWS": 16, "TILE": 16, "DEPTH": 16}  # the smallest that tl.dot takes
CALL = {"prob": 0.6, "alpha": 0.75, "threshold": 0.2, "dry_run": True}


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


@pytest.fixture
def _programs_share_rows(monkeypatch):
    """Every program compares one tile, so that several find pairs for the same row: short filters would share one."""
    monkeypatch.setattr("inmerge_fast.paths.triton.launch_match.TILES_OF_ELEMENTS", 1)


def launcher_of(targets):
    plan = MergePlan(targets)
    return Launcher(plan.layers, plan.weights(), plan.rows.start)


def partners_of(launcher, rule, seed=5, step=6, match=SMALL, **call):
    launcher.run(seed, step, partner=rule, match=match, **CALL | call)
    return drawn_partners(launcher).numpy().copy()


def assert_brute_force(launcher, targets, partners, rule, *, seed=5, step=6, threshold=CALL["threshold"]):
    for layer, target in enumerate(targets):
        conv = isinstance(target, nn.Module)
        layout = {"groups": target.groups, "transposed": target.transposed} if conv else {}
        pairs = PairOracle(target.weight if conv else target, **layout)
        first, end = launcher.slots.row_start[layer : layer + 2]
        coin, _ = draw(seed, step, layer, end - first, CALL["prob"], groups=layout.get("groups", 1))
        for i, row in enumerate(partners[first:end]):
            if not coin[i]:
                assert row == -1
                continue
            choices = pairs.choices(i, rule, seed=seed, step=step, layer=layer, threshold=threshold, band=MATCH_BAND)
            assert (row - first if row >= 0 else -1) in choices, (layer, i, row - first, choices)


def mixed_targets(seed):
    convs = [
        nn.Conv2d(4, 40, 3, groups=2), nn.ConvTranspose2d(4, 20, 3, groups=2), nn.ConvTranspose1d(3, 18, 2).half(),
        nn.Conv2d(4, 17, 3).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    with torch.no_grad():
        for conv in convs:
            shape = conv.weight.shape
            conv.weight.copy_(adversarial(shape[0], shape[1:].numel(), seed).view(shape))
    tensors = [adversarial(50, 33, seed), adversarial(23, 40, seed + 1).bfloat16(), adversarial(2, 7, seed + 2)]
    return [*convs, *tensors]


@pytest.mark.usefixtures("_programs_share_rows")
@pytest.mark.parametrize("rule", RULES)
def test_several_tiles_of_every_kind_match_brute_force_in_any_order(rule):
    targets = mixed_targets(1)
    launcher = launcher_of(targets)
    found = []
    for order in range(2):
        with permuted(order):
            found.append(partners_of(launcher, rule))
    assert_brute_force(launcher, targets, found[0], rule)
    assert (found[0] == found[1]).all()
    assert (found[0] >= 0).sum() > 60


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("match", [{"ROWS": 16, "TILE": 32, "DEPTH": 32}, {"ROWS": 32, "TILE": 16, "DEPTH": 16}, {}])
def test_partners_do_not_depend_on_the_tiles(rule, match):
    weight = torch.randn(45, 37) + torch.randn(1, 37)  # no duplicates: every choice is decided
    launcher = launcher_of([weight])
    assert partners_of(launcher, rule, match=match).tolist() == partners_of(launcher, rule).tolist()


@pytest.mark.usefixtures("_programs_share_rows")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(2))
def test_no_interleaving_races(rule, seed):
    weights = [adversarial(20, 18, seed), adversarial(17, 12, seed).bfloat16()]
    launcher = launcher_of(weights)
    expected = partners_of(launcher, rule, threshold=0.0)
    launcher = launcher_of(weights)
    partners_of(launcher, rule, threshold=0.0, prob=1.0)  # what an earlier call leaves behind
    matcher = launcher.matcher
    named = tensors_of(launcher, [])
    named |= {"list": matcher.list, "best": matcher.best, "inverse_norm": matcher.inverse_norm}
    with interleaved(seed, tensors=named) as schedule:
        assert partners_of(launcher, rule, threshold=0.0).tolist() == expected.tolist()
    assert not schedule.races, schedule.races[:3]


@pytest.mark.parametrize("rule", RULES)
def test_every_access_is_in_bounds(rule):
    targets = mixed_targets(3)
    launcher = launcher_of(targets)
    partners_of(launcher, rule)  # builds the buffers
    held = [target.weight.detach() if isinstance(target, nn.Module) else target for target in targets]
    own = list(tensors_of(launcher, []).values())
    with bounds(*held, *own, *launcher.matcher.tensors()):
        for prob in (0.0, 0.4, 1.0):
            partners_of(launcher, rule, prob=prob, match=SMALL)


def test_norms_are_measured_once_for_every_filter_sampled_or_not():
    """One over the norm, with 1e-8 for the smallest norm, and 0 for filters that are not finite."""
    targets = mixed_targets(2)
    targets[-1][0] = 0
    launcher = launcher_of(targets)
    launcher.matcher.inverse_norm.fill_(torch.nan)
    partners_of(launcher, "nearest", prob=0.1)
    measured = launcher.matcher.inverse_norm.split(np.diff(launcher.row_start).tolist())
    for target, found in zip(targets, measured, strict=True):
        conv = isinstance(target, nn.Module)
        layout = {"groups": target.groups, "transposed": target.transposed} if conv else {}
        weight = (target.weight.detach() if conv else target).double()
        norms = torch.stack([filter_of(weight, k, **layout).norm() for k in range(len(found))])
        usable = norms.square().float().isfinite()
        expected = torch.where(usable, 1 / norms.clamp(min=1e-8), 0.0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert 20 < (launcher.matcher.inverse_norm == 0).sum() < launcher.rows - 20
    assert (launcher.matcher.inverse_norm == 1e8).any()


def test_work_is_what_the_sampled_filters_need():
    """A program whose list has ended loads nothing of the weights; the others what the docstrings say."""
    filters, elements = 64, 32
    weight = torch.randn(filters, elements)
    launcher = launcher_of([weight])
    for prob in (0.0, 0.3, 1.0):
        coin, _ = draw(5, 6, 0, filters, prob)
        partners_of(launcher, "nearest", prob=prob, threshold=1.0)
        with traffic(weight=[weight], best=[launcher.matcher.best]) as moved:
            partners_of(launcher, "nearest", prob=prob, threshold=1.0)
        row_tiles, column_tiles = -(-int(coin.sum()) // 16), filters // 16
        rows_loaded = row_tiles * column_tiles * (16 + 16)  # where the list has ended, its first filter again
        merged_rows = 2 * int(coin.sum())  # the merge kernel's own
        assert moved["weight"].bytes_loaded == 4 * elements * (filters + rows_loaded + merged_rows)
        assert moved["best"].atomics == int(coin.sum())  # one program takes all the columns of these short filters


def test_work_items_cover_every_pair_once():
    plan = MergePlan([nn.Conv2d(4, 66, 3, groups=2), torch.randn(100, 5000), torch.randn(2, 3)])
    items = work_items(plan.layers, plan.rows.start, range(3), 16, 32)
    covered = np.zeros((168, 168), int)
    sizes = {index: layer.layout.group_size for index, layer in enumerate(plan.layers)}
    lengths = []
    for layer, group_row, rank, column, end in items.tolist():
        stop = min(rank + 16, sizes[layer])
        covered[group_row + rank : group_row + stop, group_row + column : group_row + end] += 1
        lengths.append(-(-(end - column) // 32) * plan.layers[layer].layout.elements)
    expected = np.zeros_like(covered)
    for first, size in ((0, 33), (33, 33), (66, 100), (166, 2)):
        expected[first : first + size, first : first + size] = 1
    assert (covered == expected).all()
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_partner_report_no_similarity(rule):
    """Also where an earlier call in the same result slot had one."""
    weight = torch.eye(20) if rule == "similar" else torch.full((20, 4), float("inf"))
    launcher = launcher_of([weight])
    launcher.slots.similarity.fill_(0.5)
    results = launcher.run(1, 2, partner=rule, match=SMALL, **CALL | {"threshold": 0.9}).fetch()
    assert results.counts[0] == draw(1, 2, 0, 20, CALL["prob"])[0].sum()
    assert np.isnan(results.similarity).all()
    assert not results.passed.any()
    assert not launcher.slots.state.any()


@pytest.mark.parametrize("seed", [2**31, 2**32 + 1, 2**63 + 5, 2**64 - 1])
def test_seed_and_step_of_any_size_and_in_device_memory(seed):
    step = 2**40 + 1
    weight = adversarial(30, 12, 4)
    launcher = launcher_of([weight])
    given = partners_of(launcher, "similar", seed, step, threshold=0.0)
    assert_brute_force(launcher, [weight], given, "similar", seed=seed, step=step, threshold=0.0)
    launcher.prepare(seed, step, prob=CALL["prob"], alpha=0.5, threshold=0.0, write=False)
    launcher.run_from_memory(partner="similar", match=SMALL)
    assert drawn_partners(launcher).tolist() == given.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_every_layer_has_its_own_threshold(rule):
    """2 admits nothing, -1 everything; "nearest" looks at the same partners and leaves the decision to the merge."""
    weights = [adversarial(20, 10, seed) for seed in range(3)]
    launcher = launcher_of(weights)
    results = launcher.run(5, 6, partner=rule, match=SMALL, **CALL | {"threshold": (2.0, 0.1, -1.0)}).fetch()
    partners = drawn_partners(launcher).numpy()
    for layer, threshold in enumerate((2.0, 0.1, -1.0)):
        alone = launcher_of([*(torch.zeros(2, 3) for _ in range(layer)), weights[layer]])  # the same layer id
        expected = partners_of(alone, rule, threshold=threshold)[2 * layer :]
        shift = 20 * layer - 2 * layer
        assert partners[20 * layer : 20 * layer + 20].tolist() == [j + shift if j >= 0 else -1 for j in expected]
    passed = np.split(results.passed, results.counts.cumsum()[:-1])
    assert [part.any() for part in passed] == [False, True, True]


def to_tf32(values):
    """Rounded to ten explicit bits of mantissa, half away from zero, as ``cvt.rna.tf32`` does."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(values):
    """float64 to float32 towards zero: what tensor cores do when they add products to a float32 accumulator."""
    rounded = values.float()
    too_far = rounded.double().abs() > values.abs()
    return torch.where(too_far, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def chained(total, pairs, depth):
    """Matrix products one instruction after the other, each of ``depth`` elements and truncated into the total."""
    for left, right in pairs:
        for k in range(0, left.shape[1], depth):
            total = truncated(total.double() + left[:, k : k + depth].double() @ right[:, k : k + depth].double().T)
    return total


def dots_in_tf32x3(rows, block=32):
    """What Triton makes of ``tf32x3``: two words per value, three products per block, blocks added in float32."""
    big = to_tf32(rows)
    small = to_tf32(rows - big)
    zero = torch.zeros(len(rows), len(rows))
    total = zero
    for k in range(0, rows.shape[1], block):
        b, s = big[:, k : k + block], small[:, k : k + block]
        total = total + chained(zero, [(s, b), (b, s), (b, b)], depth=8)
    return total


def error_of(dots, rows):
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    return ((dots.double() - exact) / (norms[:, None] * norms)).abs().max().item()


@pytest.mark.parametrize("common", [0.0, 1.0, 5.0], ids=["unlike", "alike", "nearly the same"])
@pytest.mark.parametrize("elements", [49, 576, 4608])
def test_emulated_tensor_cores_keep_to_the_stated_bands(elements, common):
    """``kernels/match.py`` states what to expect of a GPU; test_gpu_match.py measures it on one."""
    torch.manual_seed(elements)
    rows = torch.randn(96, elements) + common
    three = error_of(dots_in_tf32x3(rows), rows)
    one = error_of(chained(torch.zeros(96, 96), [(to_tf32(rows), to_tf32(rows))], depth=8), rows)
    half = rows.bfloat16().float()
    sixteen_bits = error_of(chained(torch.zeros(96, 96), [(half, half)], depth=16), half)
    print(f"D={elements} mean {common}: tf32x3 {three:.1e}, one tf32 product {one:.1e}, 16 bits {sixteen_bits:.1e}")
    assert three <= 2e-6
    assert sixteen_bits <= 2e-5 < MATCH_BAND_16_BITS
    assert one > 5 * MATCH_BAND  # why one TF32 product is not enough
