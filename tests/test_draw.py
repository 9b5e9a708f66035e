"""The draw: its generator, its contract, and its two twins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast.draw import coin_threshold, draw, philox4x32

stats = pytest.importorskip("scipy.stats")

GOLDEN = json.loads((Path(__file__).parent / "golden_draws.json").read_text())
SEEDS = (0, 1, 2**31, 2**32, 2**63 - 1, 2**63 + 1, 2**64 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers_of_random123(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(key, *counter)) == expected


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"seed{c['seed']}-step{c['step']}-N{c['filters']}")
def test_golden_draws(case):
    coin, partner = draw(
        case["seed"], case["step"], case["layer"], case["filters"], case["prob"], groups=case["groups"]
    )
    shown = len(case["coin"])
    assert coin[:shown].astype(int).tolist() == case["coin"]
    assert partner[:shown].tolist() == case["partner"]
    assert coin.sum() == case.get("coins_total", coin.sum())


def draw_on_kernel(layers, seed, step, prob, block=64):
    """Partners of all rows as ``kernels/draw.py`` draws them; ``layers`` are (layer id, filters, groups)."""
    from interpreter import apply_fixes

    from inmerge_fast.kernels import tables
    from inmerge_fast.kernels.draw import _draw_kernel

    apply_fixes()
    table = torch.zeros(len(layers), tables.COLUMNS.value, dtype=torch.int64)
    first_rows = np.cumsum([0] + [filters for _, filters, _ in layers])
    for line, (layer_id, filters, groups), first_row in zip(table, layers, first_rows, strict=False):
        line[tables.LAYER_ID.value], line[tables.FIRST_ROW.value] = layer_id, int(first_row)
        line[tables.GROUP_SIZE.value] = filters // groups
    rows = int(first_rows[-1])
    slots, pitch = 3, -(-rows // 16) * 16
    row_layer = torch.repeat_interleave(
        torch.arange(len(layers), dtype=torch.int32), torch.tensor([filters for _, filters, _ in layers])
    )
    partner, readers, active = (torch.full((slots, pitch), -7, dtype=torch.int32) for _ in range(3))
    outcome, state = torch.full((slots, pitch), -7, dtype=torch.int8), torch.full((slots, 4), -7, dtype=torch.int32)
    _draw_kernel[(-(-rows // block), 1)](
        table, row_layer, partner, readers, active, outcome, state, torch.zeros(2, dtype=torch.int64),
        seed, step, 0, coin_threshold(prob), rows, 1, 1, BLOCK=block, SLOTS=slots, IN_MEMORY=False, COUNT=False,
    )  # fmt: skip
    written = torch.zeros(slots, pitch, dtype=torch.bool)
    written[1, :rows] = True
    for buffer in (partner, readers, outcome):
        assert (buffer[~written] == -7).all(), "wrote past the last row, or to another slot"
    assert not readers[written].any()
    assert (active == -7).all()
    assert state.tolist() == [[-7] * 4, [0] * 4, [-7] * 4]
    assert torch.equal(outcome[written] == tables.SAMPLED.value, partner[written] >= 0)
    return partner[written].numpy(), first_rows


@pytest.mark.interpreted
@pytest.mark.parametrize(("step", "stride"), [(0, 1), (2**32 - 2, 1), (7, 1000), (2**62, -(2**60)), (9, 0)])
@pytest.mark.parametrize(("first_slot", "draws"), [(0, 1), (2, 3), (9, 4)])
def test_triton_twin_draws_and_counts_for_several_calls(step, stride, first_slot, draws):
    """Into slots one after the other, and zeroes as many after them as the grid has; nothing else is written."""
    pytest.importorskip("triton")
    from interpreter import apply_fixes

    from inmerge_fast.kernels import tables
    from inmerge_fast.kernels.draw import _draw_kernel

    apply_fixes()
    layers, rows, slots, ahead, prob = [(5, 40, 1), (2, 30, 3)], 70, 11, 4, 0.5
    table = torch.zeros(2, tables.COLUMNS.value, dtype=torch.int64)
    for line, (layer_id, filters, groups), first_row in zip(table, layers, (0, 40), strict=True):
        line[tables.LAYER_ID.value], line[tables.FIRST_ROW.value] = layer_id, first_row
        line[tables.GROUP_SIZE.value] = filters // groups
    row_layer = torch.tensor([0] * 40 + [1] * 30, dtype=torch.int32)
    drawn = [(first_slot + k) % slots for k in range(draws)]
    zeroed = [(first_slot + draws + k) % slots for k in range(ahead)]
    partner, readers, active = (torch.full((slots, 80), -7, dtype=torch.int32) for _ in range(3))
    outcome, state = torch.full((slots, 80), -7, dtype=torch.int8), torch.full((slots, 4), -7, dtype=torch.int32)
    readers[drawn, :rows], state[drawn] = 0, 0
    _draw_kernel[(2, ahead)](
        table, row_layer, partner, readers, active, outcome, state, torch.zeros(2, dtype=torch.int64),
        3, step, stride, coin_threshold(prob), rows, first_slot, draws, BLOCK=64, SLOTS=slots, IN_MEMORY=False,
        COUNT=True,
    )  # fmt: skip
    for k, slot in enumerate(drawn):
        expected = []
        for (layer_id, filters, groups), first_row in zip(layers, (0, 40), strict=True):
            coin, chosen = draw(3, step + k * stride, layer_id, filters, prob, groups=groups)
            expected += np.where(coin, first_row + chosen, -1).tolist()
        sampled = [row for row in range(rows) if expected[row] >= 0]
        assert partner[slot, :rows].tolist() == expected
        assert readers[slot, :rows].tolist() == [expected.count(row) for row in range(rows)]
        assert state[slot].tolist() == [len(sampled), 0, 0, 0]
        assert sorted(active[slot, : len(sampled)].tolist()) == sampled
        assert (active[slot, len(sampled) :] == -7).all()
        assert (outcome[slot, :rows] == tables.SAMPLED.value).nonzero()[:, 0].tolist() == sampled
    assert not readers[zeroed, :rows].any()
    assert not state[zeroed].any()
    others = [slot for slot in range(slots) if slot not in drawn]
    untouched = [slot for slot in others if slot not in zeroed]
    for buffer, where in (
        (partner, others),
        (active, others),
        (outcome, others),
        (readers, untouched),
        (state, untouched),
    ):
        assert (buffer[where] == -7).all()
    assert all((buffer[:, rows:] == -7).all() for buffer in (partner, readers, active, outcome))


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", [0, 5, 2**31, 2**32 - 1, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_triton_twin_is_bit_identical(seed, step, prob):
    pytest.importorskip("triton")
    layers = [(0, 2, 1), (3, 33, 1), (2**31 - 1, 300, 1), (1, 12, 3), (7, 64, 32)]
    partners, first_rows = draw_on_kernel(layers, seed, step, prob)
    for (layer_id, filters, groups), first_row in zip(layers, first_rows, strict=False):
        coin, partner = draw(seed, step, layer_id, filters, prob, groups=groups)
        expected = np.where(coin, first_row + partner, -1)
        np.testing.assert_array_equal(partners[first_row : first_row + filters], expected)


@pytest.mark.interpreted
def test_triton_twin_compares_the_coin_exactly():
    pytest.importorskip("triton")
    bits = int(philox4x32(1, 3, 0, 0, 0)[0]) >> 8
    for threshold, falls in ((bits, False), (bits + 1, True)):
        partners, _ = draw_on_kernel([(0, 9, 1)], 1, 0, threshold / 2**24)
        assert bool(partners[3] >= 0) == falls


@pytest.mark.interpreted
def test_triton_twin_carries_into_the_top_word():
    """The carry of the 96-bit product is rare: about 128 of 2**20 filters have one."""
    pytest.importorskip("triton")
    filters = 2**20
    partners, _ = draw_on_kernel([(0, filters, 1)], 1, 0, 1.0, block=2**16)
    np.testing.assert_array_equal(partners, draw(1, 0, 0, filters, 1.0)[1])


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_partner_is_the_64_bit_fraction_in_exact_arithmetic(seed, groups):
    filters = 35
    size = filters // groups
    step, layer = 2**40 + 3, 7
    _, partner = draw(seed, step, layer, filters, 0.5, groups=groups)
    _, r1, r2, _ = philox4x32(seed, np.arange(filters), layer, step & 0xFFFFFFFF, step >> 32)
    for i in range(filters):
        fraction = (int(r1[i]) << 32) | int(r2[i])
        place = fraction * (size - 1) >> 64
        place += place >= i % size
        assert partner[i] == i // size * size + place


@pytest.mark.parametrize(("filters", "groups"), [(2, 1), (7, 1), (512, 1), (24, 4), (24, 12)])
def test_partner_is_another_filter_of_the_same_group(filters, groups):
    own = np.arange(filters)
    size = filters // groups
    for step in range(50):
        _, partner = draw(3, step, 0, filters, 0.5, groups=groups)
        assert (partner != own).all()
        assert (partner // size == own // size).all()
        assert partner.min() >= 0


@pytest.mark.parametrize("prob", [2**-24, 0.1, 0.3, 0.5, 0.999])
def test_coin_rate_is_binomial(prob):
    coins = np.concatenate([draw(11, step, 0, 4096, prob)[0] for step in range(64)])
    result = stats.binomtest(int(coins.sum()), coins.size, coin_threshold(prob) / 2**24)
    assert result.pvalue > 1e-4


def test_coin_is_exact_at_0_and_1():
    for step in range(20):
        assert not draw(5, step, 0, 512, 0.0)[0].any()
        assert draw(5, step, 0, 512, 1.0)[0].all()


def test_partners_are_uniform_for_every_filter():
    filters, steps = 9, 4000
    counts = np.zeros((filters, filters), int)
    for step in range(steps):
        counts[np.arange(filters), draw(23, step, 4, filters, 0.5)[1]] += 1
    for i in range(filters):
        assert stats.chisquare(np.delete(counts[i], i)).pvalue > 1e-4


def test_coin_and_partner_are_independent():
    table = np.zeros((2, 4), int)
    for step in range(2000):
        coin, partner = draw(31, step, 0, 5, 0.5)
        np.add.at(table, (coin.astype(int), (partner - np.arange(5)) % 5 - 1), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": 1 + 2**32}, {"step": 1}, {"step": 2**32}, {"layer": 1}])
def test_every_word_of_the_key_and_counter_matters(change):
    base = {"seed": 1, "step": 0, "layer": 0}
    before = draw(**base, filters=256, prob=0.5)
    after = draw(**(base | change), filters=256, prob=0.5)
    assert (before[0] != after[0]).any()
    assert (before[1] != after[1]).any()


def test_leaving_layers_out_does_not_reshuffle_the_others(device):
    def merged_weights(**choice):
        torch.manual_seed(4)
        model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(5)), nn.Linear(8, 8)).to(device)
        inmerge_fast.merge_(model, threshold=-1.0, prob=0.6, seed=9, step=2, **choice)
        return [module.weight.detach() for module in model]

    everything = merged_weights(skip_first=0)
    for choice in ({"skip_first": 3}, {"skip_first": 0, "exclude": ["0", "2"]}, {"skip_first": 0.5}):
        for name, (all_in, some_out) in enumerate(zip(everything, merged_weights(**choice), strict=True)):
            if name >= 3:
                assert torch.equal(all_in, some_out)
    with_linear = merged_weights(skip_first=0, include_linear=True)
    assert all(torch.equal(a, b) for a, b in zip(everything[:5], with_linear[:5], strict=True))
    assert not torch.equal(everything[5], with_linear[5])


def test_decisions_do_not_depend_on_the_dtype(device):
    decisions = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        conv = nn.Conv2d(4, 32, 3).to(device, dtype)
        before = conv.weight.detach().clone()
        inmerge_fast.merge_(conv, threshold=-1.0, prob=0.4, alpha=0.0, seed=77, step=5)
        decisions.append((conv.weight != before).flatten(1).any(1).tolist())
    coin, _ = draw(77, 5, 0, 32, 0.4)
    assert all(decision == coin.tolist() for decision in decisions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, "seed must be in"),
        ({"step": 2**63}, r"step must be in \[0, 2\*\*63\)"),
        ({"layer": 2**31}, r"layer must be in \[0, 2\*\*31\)"),
        ({"prob": 1.5}, r"prob must be in \[0, 1\], got 1.5"),
        ({"prob": float("nan")}, "prob must be in"),
        ({"filters": 1}, "at least 2 per group, got 1 and 1"),
        ({"filters": 9, "groups": 2}, "multiple of groups"),
    ],
)
def test_draw_checks_its_arguments(arguments, message):
    good = {"seed": 0, "step": 0, "layer": 0, "filters": 8, "prob": 0.5}
    with pytest.raises(ValueError, match=message):
        draw(**(good | arguments))


def test_the_coin_compares_24_bits_with_the_rounded_threshold():
    """Its rate could not show that: an off-by-one changes one coin in 2**24."""
    words = (philox4x32(7, np.arange(32), 0, 3, 0)[0] >> np.uint64(8)).tolist()
    for i, word in enumerate(words):
        for share, expected in ((word, False), (word + 0.4, False), (word + 0.6, True), (word + 1, True)):
            assert draw(7, 3, 0, 32, share / 2**24)[0][i] == expected


def test_every_bit_of_seed_step_and_layer_matters():
    base = {"seed": 0, "step": 0, "layer": 0}
    changes = [{name: 2**bit} for name, bits in (("seed", 64), ("step", 63), ("layer", 31)) for bit in range(bits)]
    draws = {draw(**(base | change), filters=64, prob=0.5)[1].tobytes() for change in [{}, *changes]}
    assert len(draws) == 1 + 64 + 63 + 31


def test_partner_carries_into_the_top_word():
    """The CPU side of the Triton test above, in Python's exact integers, for the filters next to a carry."""
    filters = 2**20
    _, partner = draw(1, 0, 0, filters, 0.3)
    _, r1, r2, _ = philox4x32(1, np.arange(filters), 0, 0, 0)
    near = np.flatnonzero((r1 * np.uint64(filters - 1) & np.uint64(2**32 - 1)) >= 2**32 - 2**20)
    carries = 0
    for i in near.tolist():
        place = ((int(r1[i]) << 32) | int(r2[i])) * (filters - 1) >> 64
        carries += place != int(r1[i]) * (filters - 1) >> 32
        assert partner[i] == place + (place >= i)
    assert carries > 50


@pytest.mark.parametrize(
    ("arguments", "message"), [({"prob": -0.1}, "prob must be in"), ({"groups": 0}, "got 8 and 0")]
)
def test_draw_checks_the_lower_ends_too(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**({"seed": 0, "step": 0, "layer": 0, "filters": 8, "prob": 0.5} | arguments))
