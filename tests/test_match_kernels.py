"""The match kernels in Triton's interpreter: several tiles, every order, watched, and how exact tf32x3 is."""

import numpy as np
import pytest
import torch
from oracle import BAND, PairOracle
from test_match import adversarial
from torch import nn

from inmerge_fast import MergePlan, draw
from inmerge_fast.kernels import tables

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interleave import interleaved, permuted  # noqa: E402
from interpreter import apply_fixes, bounds, traffic  # noqa: E402

from inmerge_fast.launch import Launcher  # noqa: E402
from inmerge_fast.launch_match import work_items  # noqa: E402

RULES = ["nearest", "similar"]
SMALL = {"ROWS": 16, "TILE": 16, "DEPTH": 16}  # the smallest that tl.dot takes
CALL = {"prob": 0.6, "alpha": 0.75, "threshold": 0.2, "dry_run": True}


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


def launcher_of(targets):
    plan = MergePlan(targets)
    return Launcher(plan.layers, plan.weights(), plan.row_start)


def partners_of(launcher, rule, seed=5, step=6, match=SMALL, **call):
    launcher.run(seed, step, partner=rule, match=match, **CALL | call)
    return launcher.partner.numpy().copy()


def assert_brute_force(launcher, targets, partners, rule, *, seed=5, step=6, threshold=CALL["threshold"]):
    for layer, target in enumerate(targets):
        conv = isinstance(target, nn.Module)
        layout = {"groups": target.groups, "transposed": target.transposed} if conv else {}
        pairs = PairOracle(target.weight if conv else target, **layout)
        first, end = launcher.row_start[layer : layer + 2]
        coin, _ = draw(seed, step, layer, end - first, CALL["prob"], groups=layout.get("groups", 1))
        for i, row in enumerate(partners[first:end]):
            if not coin[i]:
                assert row == -1
                continue
            choices = pairs.choices(i, rule, seed=seed, step=step, layer=layer, threshold=threshold, band=BAND)
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(2))
def test_no_interleaving_races(rule, seed):
    weights = [adversarial(20, 18, seed), adversarial(17, 12, seed).bfloat16()]
    launcher = launcher_of(weights)
    expected = partners_of(launcher, rule, threshold=0.0)
    launcher = launcher_of(weights)
    partners_of(launcher, rule, threshold=0.0, prob=1.0)  # what an earlier call leaves behind
    matcher = launcher.matcher
    named = {name: value for name, value in vars(launcher).items() if isinstance(value, torch.Tensor)}
    named |= {"list": matcher.list, "best": matcher.best}
    with interleaved(seed, tensors=named) as schedule:
        assert partners_of(launcher, rule, threshold=0.0).tolist() == expected.tolist()
    assert not schedule.races, schedule.races[:3]


@pytest.mark.parametrize("rule", RULES)
def test_every_access_is_in_bounds(rule):
    targets = mixed_targets(3)
    launcher = launcher_of(targets)
    partners_of(launcher, rule)  # builds the buffers
    held = [target.weight.detach() if isinstance(target, nn.Module) else target for target in targets]
    own = [value for value in vars(launcher).values() if isinstance(value, torch.Tensor)]
    with bounds(*held, *own, *launcher.matcher.tensors()):
        for prob in (0.0, 0.4, 1.0):
            partners_of(launcher, rule, prob=prob, match=SMALL)


def test_work_is_what_the_sampled_filters_need():
    """A program whose list has ended loads nothing of the weights; the others what the docstring says."""
    filters, elements = 64, 32
    weight = torch.randn(filters, elements)
    launcher = launcher_of([weight])
    for prob in (0.0, 0.3, 1.0):
        coin, _ = draw(5, 6, 0, filters, prob)
        partners_of(launcher, "nearest", prob=prob, threshold=1.0)
        with traffic(weight=[weight], best=[launcher.matcher.best]) as moved:
            partners_of(launcher, "nearest", prob=prob, threshold=1.0)
        row_tiles, column_tiles = -(-int(coin.sum()) // 16), filters // 16
        rows_loaded = column_tiles * int(coin.sum()) + row_tiles * filters
        merged_rows = 2 * int(coin.sum())  # the merge kernel's own
        assert moved["weight"].bytes_loaded == 4 * elements * (rows_loaded + merged_rows)
        assert moved["best"].atomics == int(coin.sum())  # one program takes all the columns of these short filters


def test_work_items_cover_every_pair_once():
    plan = MergePlan([nn.Conv2d(4, 66, 3, groups=2), torch.randn(100, 5000), torch.randn(2, 3)])
    items = work_items(plan.layers, plan.row_start, 16, 32)
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
    launcher.similarity.fill_(0.5)
    results = launcher.run(1, 2, partner=rule, match=SMALL, **CALL | {"threshold": 0.9}).fetch()
    assert results.counts[0] == draw(1, 2, 0, 20, CALL["prob"])[0].sum()
    assert np.isnan(results.similarity).all()
    assert not results.passed.any()
    assert launcher.state[tables.ACTIVE_ROWS.value] == 0


@pytest.mark.parametrize("seed", [2**31, 2**32 + 1, 2**63 + 5, 2**64 - 1])
def test_seed_and_step_of_any_size_and_in_device_memory(seed):
    step = 2**40 + 1
    weight = adversarial(30, 12, 4)
    launcher = launcher_of([weight])
    given = partners_of(launcher, "similar", seed, step, threshold=0.0)
    assert_brute_force(launcher, [weight], given, "similar", seed=seed, step=step, threshold=0.0)
    launcher.seed_step.copy_(torch.tensor([seed - 2**64 if seed >= 2**63 else seed, step]))
    assert partners_of(launcher, "similar", None, 0, threshold=0.0).tolist() == given.tolist()


def tf32(values):
    """Rounded to TF32's ten explicit bits of mantissa, as tensor cores read float32 words: truncated."""
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def dots_in_tf32x3(rows, depth=8):
    """What ``tf32x3`` computes: two TF32 words per value, three products, summed in float32 chunk by chunk."""
    big = tf32(rows)
    small = tf32(rows - big)
    total = torch.zeros(len(rows), len(rows))
    for start in range(0, rows.shape[1], depth):
        b, s = big[:, start : start + depth], small[:, start : start + depth]
        # The products inside one instruction are exact; each instruction rounds once into the accumulator.
        for left, right in ((s, b), (b, s), (b, b)):
            total = (total.double() + left.double() @ right.double().T).float()
    return total


@pytest.mark.parametrize("common", [0.0, 1.0, 5.0], ids=["unlike", "alike", "all positive"])
@pytest.mark.parametrize("elements", [49, 4608])
def test_emulated_tf32x3_keeps_to_the_band(elements, common):
    torch.manual_seed(elements)
    rows = torch.randn(96, elements) + common
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    norms = norms[:, None] * norms
    error = ((dots_in_tf32x3(rows).double() - exact) / norms).abs().max().item()
    once = ((tf32(rows).double() @ tf32(rows).double().T - exact) / norms).abs().max().item()
    print(f"D={elements} mean {common}: tf32x3 {error:.1e}, tf32 {once:.1e}")
    assert error < 4 * BAND
    assert once > 20 * BAND or common == 0.0  # why one TF32 product is not enough
