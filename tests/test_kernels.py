"""The kernels in Triton's interpreter, with tables that no random draw would make, in every order, watched."""

import numpy as np
import pytest
import torch
from oracle import bits
from torch import nn

from inmerge_fast import MergePlan, draw, reference_merge

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interleave import interleaved, permuted  # noqa: E402
from interpreter import apply_fixes, bounds, traffic  # noqa: E402

from inmerge_fast.kernels import tables  # noqa: E402
from inmerge_fast.kernels.draw import _draw_kernel  # noqa: E402
from inmerge_fast.paths.triton.handle import Handle  # noqa: E402
from inmerge_fast.paths.triton.launch import Launcher  # noqa: E402
from inmerge_fast.paths.triton.slots import KEPT_CALLS, SLOTS  # noqa: E402

ALPHA = 0.75
NO_SCRATCH, LITTLE_SCRATCH = 0, 12  # in units of 16 bytes


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


def launcher_of(weights):
    plan = MergePlan(weights)
    return Launcher(plan.layers, plan.weights(), plan.rows.start)


def tensors_of(launcher, weights):
    holders = {**vars(launcher), **vars(launcher.slots), **vars(launcher.running)}
    held = {name: value for name, value in holders.items() if isinstance(value, torch.Tensor) and value.numel()}
    return held | {f"weight{index}": weight for index, weight in enumerate(weights)}


def partners_of(launcher):
    """Partners of all rows in the latest call, or in the slot that tests fill by hand while there was none."""
    return launcher.slot_of(max(launcher.calls, 0)).partner[: launcher.rows]


def give_partners(launcher, partners):
    """Put partners where ``merge_drawn(0, ...)`` finds them."""
    slot = launcher.slot_of(0)
    slot.partner[: launcher.rows] = torch.as_tensor(partners)
    slot.readers.zero_()
    slot.outcome[: launcher.rows] = (slot.partner[: launcher.rows] >= 0).to(torch.int8)


def alike(filters, elements, dtype=torch.float32, seed=0):
    """Filters of which some pairs are more similar than 0.3 and some are not."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, elements, generator=generator)
    return (common + 1.5 * torch.randn(filters, elements, generator=generator)).to(dtype)


def chain(n, _):
    return [*range(1, n), -1]


def cycle(n, _):
    return [(i + 1) % n for i in range(n)]


def star(n, _):
    return [1] + [0] * (n - 1)


def everyone_reads_an_inactive_row(n, _):
    return [-1] + [0] * (n - 1)


def everyone_reads_a_row_that_reads_on(n, _):
    return [1, 2, -1] + [0] * (n - 3)


def two_cycles_with_tails(n, _):
    return [1, 0] + [3, 4, 2] + [i % 5 for i in range(n - 5)]


def nobody(n, _):
    return [-1] * n


def anyhow(n, rng):
    partner = (np.arange(n) + rng.integers(1, n, n)) % n
    return np.where(rng.random(n) < 0.8, partner, -1).tolist()


TABLES = [
    chain, cycle, star, everyone_reads_an_inactive_row, everyone_reads_a_row_that_reads_on, two_cycles_with_tails,
    nobody, anyhow,
]  # fmt: skip


def merge_with_table(launcher, weights, partners, *, threshold=-1.0, **overrides):
    """Merge with given partners (one list per weight) and return what the reference makes of them."""
    expected, rows = [], []
    for weight, partner, first_row in zip(weights, partners, launcher.slots.row_start, strict=False):
        partner = np.array(partner)
        expected.append(reference_merge(weight, partner >= 0, partner, alpha=ALPHA, threshold=threshold).weight)
        rows.append(np.where(partner >= 0, partner + first_row, -1))
    give_partners(launcher, np.concatenate(rows))
    launcher.reserve_scratch(1.0)
    launcher.merge_drawn(0, alpha=ALPHA, threshold=threshold, dry_run=False, **overrides)
    return expected


def assert_merged_and_clean(launcher, weights, expected):
    for index, (weight, wanted) in enumerate(zip(weights, expected, strict=True)):
        assert torch.equal(bits(weight), bits(wanted)), f"weight {index}"
    assert not launcher.counter.any(), "counters must come back to zero"
    assert not launcher.slots.state.any(), "state words must come back to zero"


@pytest.mark.parametrize("capacity", [NO_SCRATCH, LITTLE_SCRATCH, None])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_any_table_merges_simultaneously_whatever_the_scratch(table, capacity):
    rng = np.random.default_rng(0)
    weights = [alike(9, 20), alike(7, 33, torch.bfloat16), alike(8, 24, torch.float16)]
    launcher = launcher_of(weights)
    overrides = {} if capacity is None else {"capacity": capacity}
    for repeat in range(3):
        with permuted(repeat):
            partners = [table(len(weight), rng) for weight in weights]
            shape = {"BLOCK": 16, "SPAN": (1, 2, 5)[repeat], "programs": 5}
            expected = merge_with_table(launcher, weights, partners, **shape, **overrides)
        assert_merged_and_clean(launcher, weights, expected)


SCHEDULES = 4  # of each of the 8 tables, for 3 sizes of scratch: 96 in all, and 8 with two layers and a threshold


@pytest.mark.parametrize("capacity", [NO_SCRATCH, 5, 1000])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_no_interleaving_races(table, capacity):
    """With no barriers but the kernel's own: what passes here passes with those that Triton emits, too."""
    rng = np.random.default_rng(1)
    for seed in range(SCHEDULES):
        weights = [alike(7, 12, seed=seed)]
        launcher = launcher_of(weights)
        with interleaved(seed, tensors=tensors_of(launcher, weights), resident=[None, 3][seed % 2]) as schedule:
            for _ in range(2):
                partners = [table(len(weight), rng) for weight in weights]
                shape = {"BLOCK": 8, "SPAN": 1 + seed // 2, "programs": 7}  # two blocks: read again, or kept
                expected = merge_with_table(launcher, weights, partners, **shape, capacity=capacity)
                assert_merged_and_clean(launcher, weights, expected)
        assert not schedule.races, schedule.races[:3]


@pytest.mark.parametrize("seed", range(8))
def test_no_interleaving_races_between_layers_and_at_a_threshold(seed):
    rng = np.random.default_rng(seed)
    weights = [alike(6, 12, seed=seed), alike(5, 9, torch.bfloat16, seed=seed)]
    launcher = launcher_of(weights)
    with interleaved(seed, tensors=tensors_of(launcher, weights)) as schedule:
        partners = [anyhow(len(weight), rng) for weight in weights]
        shape = {"BLOCK": 8, "SPAN": 1 + seed % 2, "programs": 4}
        expected = merge_with_table(launcher, weights, partners, threshold=0.3, **shape, capacity=2)
    assert_merged_and_clean(launcher, weights, expected)
    assert not schedule.races, schedule.races[:3]


@pytest.mark.parametrize("one_slot", [False, True], ids=["as it is", "broken: one slot"])
def test_the_draw_that_counts_does_not_race(one_slot):
    """Two blocks of rows per draw, drawn one by one and several ahead; in one slot zeros and counts would race."""
    races = 0
    for seed in range(4):
        weights = [alike(300, 4, seed=seed)]
        launcher = launcher_of(weights)
        if one_slot:
            constants = {"BLOCK": 256, "SLOTS": 1, "IN_MEMORY": False, "COUNT": True}
            launcher._draw = Handle(_draw_kernel, constants, {})
        launcher.reserve_scratch(0.1)
        with interleaved(seed, tensors=tensors_of(launcher, weights), resident=[None, 3][seed % 2]) as schedule:
            for step in (0, 1, 2, 3, 9):  # 3 finds its draw made, of the two after it one is made in vain
                before = weights[0].clone()
                launcher.run(1, step, prob=0.1, alpha=ALPHA, threshold=-1.0, dry_run=False, programs=4)
                if one_slot:
                    continue
                coin, partner = draw(1, step, 0, 300, 0.1)
                expected = reference_merge(before, coin, partner, alpha=ALPHA, threshold=-1.0).weight
                assert torch.equal(bits(weights[0]), bits(expected))
        races += len(schedule.races)
    assert (races > 0) == one_slot


def races_of(breakage, *, barrier_before_release=False):
    """Races and wrong weights over ten schedules of a protocol that is broken on purpose.

    What they say of BARRIER holds for the source alone: in compiled code Triton's own barrier is there all the same,
    and ``test_ptx_controls.py`` deletes each from the PTX.
    """
    races, wrong = 0, 0
    for seed in range(10):
        weights = [alike(8, 16, seed=seed)]
        launcher = launcher_of(weights)
        tensors = tensors_of(launcher, weights)
        with interleaved(seed, tensors=tensors, barrier_before_release=barrier_before_release) as schedule:
            partners = [cycle(8, None) if seed % 2 else star(8, None)]
            shape = {"BLOCK": 8, "SPAN": 1 + seed // 5, "programs": 8}
            expected = merge_with_table(launcher, weights, partners, **shape, **breakage)
        races += len(schedule.races)
        wrong += not torch.equal(bits(weights[0]), bits(expected[0]))
    return races, wrong


def test_negative_controls_are_noticed():
    assert races_of({})[0] == 0
    assert races_of({"SEM": "relaxed"})[0] > 0
    races, wrong = races_of({"NAIVE": True})
    assert races > 0
    assert wrong > 0
    assert races_of({"BARRIER": False})[0] > 0
    assert races_of({"BARRIER": False}, barrier_before_release=True)[0] == 0


@pytest.mark.parametrize(
    "overrides",
    [{"BLOCK": b, "SPAN": s, "programs": p} for b, s in ((8, 1), (8, 4), (64, 2)) for p in (1, 3, 40)],
    ids=str,
)
def test_results_do_not_depend_on_blocks_programs_or_order(overrides):
    results = []
    for order in range(2):
        torch.manual_seed(3)
        weights = [alike(20, 45), alike(13, 32, torch.bfloat16)]
        launcher = launcher_of(weights)
        with permuted(order):
            outcome = launcher.run(5, 6, prob=0.7, alpha=ALPHA, threshold=0.3, dry_run=False, **overrides).fetch()
        results.append([*weights, torch.from_numpy(outcome.passed)])
    expected = alike(20, 45)
    coin, partner = draw(5, 6, 0, 20, 0.7)
    expected = reference_merge(expected, coin, partner, alpha=ALPHA, threshold=0.3).weight
    assert torch.equal(bits(results[0][0]), bits(expected))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_order_of_the_active_list_does_not_matter():
    weights = [alike(300, 16)]  # more rows than one block of the count kernel, whose programs race for places
    launcher = launcher_of(weights)
    lists = []
    for order in (0, 4):
        weights[0].copy_(alike(300, 16))
        with permuted(order):
            expected = merge_with_table(launcher, weights, [anyhow(300, np.random.default_rng(7))], BLOCK=16)
        assert_merged_and_clean(launcher, weights, expected)
        lists.append(launcher.slot_of(0).active.clone())
    active = int((partners_of(launcher) >= 0).sum())
    assert not torch.equal(lists[0][:active], lists[1][:active])
    assert torch.equal(lists[0][:active].sort().values, lists[1][:active].sort().values)


@pytest.mark.parametrize("capacity", [NO_SCRATCH, LITTLE_SCRATCH, None])
def test_every_access_is_in_bounds(capacity):
    weights = [
        alike(9, 20), alike(3, 7, torch.bfloat16), alike(5, 1), alike(2, 1025), nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose1d(3, 5, 2).half(),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    overrides = {} if capacity is None else {"capacity": capacity}
    launcher = launcher_of(weights)
    launcher.reserve_scratch(1.0)
    held = [weight if isinstance(weight, torch.Tensor) else weight.weight.detach() for weight in weights]
    with bounds(*tensors_of(launcher, held).values()):
        for step, shape in enumerate(({}, {"BLOCK": 8, "SPAN": 4}, {"BLOCK": 16, "SPAN": 1})):
            launcher.run(1, step, prob=1.0, alpha=ALPHA, threshold=-1.0, dry_run=False, **shape, **overrides)


@pytest.mark.parametrize(
    "shape", [{}, {"BLOCK": 8, "SPAN": 1}, {"BLOCK": 8, "SPAN": 4}, {"BLOCK": 16, "SPAN": 3}], ids=str
)
@pytest.mark.parametrize("threshold", [-1.0, 1.0], ids=["all pass", "none passes"])
def test_traffic_is_what_the_docstring_says(threshold, shape):
    filters, elements = 64, 48
    weight = alike(filters, elements)
    launcher = launcher_of([weight])
    launcher.reserve_scratch(0.3)
    coin, partner = draw(2, 3, 0, filters, 0.3)
    with traffic(weight=[weight], scratch=[launcher.scratch]) as moved:
        launcher.run(2, 3, prob=0.3, alpha=ALPHA, threshold=threshold, dry_run=False, programs=10, **shape)
    row = 4 * elements
    again = 4 * max(0, elements - shape.get("BLOCK", 128) * shape.get("SPAN", 3))  # what the first span leaves
    active, merged = int(coin.sum()), int(coin.sum()) if threshold == -1 else 0
    through_scratch = moved["scratch"].bytes_stored // row
    assert moved["weight"].bytes_loaded == 2 * (row * active + again * merged)  # similarity, then blend
    assert moved["weight"].bytes_stored == row * merged
    assert moved["scratch"].bytes_loaded == moved["scratch"].bytes_stored == row * through_scratch
    merged_with_readers = len(set(partner[coin]) & set(np.flatnonzero(coin)))
    assert through_scratch <= (merged_with_readers if merged else 0)
    unique_reads = row * len(set(partner[coin]) | set(np.flatnonzero(coin)))
    floor = unique_reads + row * merged
    assert moved["weight"].bytes_loaded + moved["weight"].bytes_stored >= floor


def test_scratch_is_a_small_share_of_the_weights():
    weights = [torch.empty(512, 4608) for _ in range(6)]
    launcher = launcher_of(weights)
    for prob in (0.1, 0.3):
        launcher.reserve_scratch(prob)
        assert launcher.scratch.numel() <= 0.15 * launcher.bytes
    layers = {id(layer): draw(1, 2, layer, 512, 0.3) for layer in range(6)}
    needed = sum(len(set(partner[coin]) & set(np.flatnonzero(coin))) for coin, partner in layers.values())
    assert needed * 4608 * 4 <= launcher.scratch.numel(), "an ordinary draw must fit"


def test_statistics_of_reused_slots_raise_instead_of_showing_another_call():
    weight = alike(9, 20)  # the launcher does not keep it alive
    launcher = launcher_of([weight])
    first = launcher.run(1, 0, prob=1.0, alpha=ALPHA, threshold=-1.0, dry_run=True)
    for step in range(1, KEPT_CALLS):
        launcher.run(1, step, prob=1.0, alpha=ALPHA, threshold=-1.0, dry_run=True)
        assert first.fetch().counts.tolist() == [9]
    for step in range(KEPT_CALLS, SLOTS + 1):
        launcher.run(1, step, prob=1.0, alpha=ALPHA, threshold=-1.0, dry_run=True)
    with pytest.raises(
        RuntimeError, match=f"statistics of this call are gone: the plan keeps those of its last {KEPT_CALLS}"
    ):
        first.fetch()


def test_kinds_of_layers_are_told_apart():
    weights = [alike(4, 8), alike(4, 9), alike(4, 8, torch.bfloat16), alike(4, 12, torch.float16), alike(5, 8)[1:]]
    unaligned = torch.randn(33)[1:].view(4, 8)
    launcher = launcher_of([*weights, unaligned])
    kinds = launcher.layer_table[:, tables.KIND.value].tolist()
    strided = tables.STRIDED.value
    assert kinds == [0, strided, 1, 2 + strided, 0, strided]


def test_seed_and_step_may_live_in_device_memory():
    weights, twins = [alike(9, 20)], [alike(9, 20)]
    launcher, twin = launcher_of(weights), launcher_of(twins)
    for seed, step in ((2**63 + 5, 2**40 + 1), (3, 0)):
        launcher.prepare(seed, step, prob=0.7, alpha=ALPHA, threshold=-1.0, write=True)
        launcher.run_from_memory()
        twin.run(seed, step, prob=0.7, alpha=ALPHA, threshold=-1.0, dry_run=False)
        assert torch.equal(partners_of(launcher), partners_of(twin))
        assert torch.equal(weights[0], twins[0])
