"""What the launcher must survive without a GPU to try it on: interruptions and large numbers."""

import numpy as np
import pytest
import torch
from oracle import bits

from inmerge_fast import MergePlan, draw, merge_, reference_merge

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

from interpreter import apply_fixes, bounds, traffic  # noqa: E402
from test_kernel_details import CALL  # noqa: E402
from test_kernels import (  # noqa: E402
    ALPHA,
    alike,
    assert_merged_and_clean,
    cycle,
    give_partners,
    launcher_of,
    tensors_of,
)

from inmerge_fast.effect import similarity_of  # noqa: E402
from inmerge_fast.kernels import tables  # noqa: E402
from inmerge_fast.paths.triton import layer_table  # noqa: E402
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD  # noqa: E402
from inmerge_fast.paths.triton.handle import Handle  # noqa: E402
from inmerge_fast.paths.triton.slots import KEPT_CALLS, SLOTS  # noqa: E402

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


# ------------------------------------------------------------------------------------------------------- interruptions


# Before which launch, or right after it was queued.
CUT_SHORT = [
    *(("random", when, launch) for when, launch in (("before", 0), ("after", 0), ("before", 1))),
    *(("nearest", "before", launch) for launch in range(5)),
]


@pytest.mark.filterwarnings("ignore:step goes back")  # from the call that is cut short
@pytest.mark.parametrize("calls_before", [1, 2, 3, 4])
@pytest.mark.parametrize(("partner", "when", "launch"), CUT_SHORT)
def test_a_call_that_is_cut_short_leaves_nothing_for_the_next_one(monkeypatch, partner, when, launch, calls_before):
    """Ctrl-C while the merge kernel compiles comes between the count and the merge: rows counted, and never merged."""
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    call = {"prob": 1.0, "threshold": -1.0, "alpha": 0.75, "seed": 1, "partner": partner}
    weight, twin = alike(9, 20), alike(9, 20)
    plan = MergePlan(weight)
    for step in range(calls_before):
        merge_(plan, step=step, **call)
    original, launched, after = Handle.launch, [], range(calls_before, calls_before + 6)

    def interrupted(self, *arguments):
        if len(launched) == launch and when == "before":
            raise KeyboardInterrupt
        original(self, *arguments)
        if len(launched) == launch:
            raise KeyboardInterrupt
        launched.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(Handle, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_(plan, step=9, **call)
    launcher = plan.paths.triton.launcher([weight])
    everything = [
        *tensors_of(launcher, [weight]).values(),
        *(launcher.matcher.tensors() if partner != "random" else []),
    ]
    with bounds(*everything):
        for step in after:
            assert merge_(plan, step=step, **call).merged == 9
            assert not launcher.slot_of(launcher.calls).state.any()
    for step in (*range(calls_before), *after):
        merge_(twin, step=step, **call)
    assert torch.equal(weight, twin)


def test_statistics_of_the_last_calls_stay_whatever_is_drawn_ahead():
    weights = [alike(9, 20)]
    launcher = launcher_of(weights)
    calls = []
    for step in range(3 * SLOTS):
        calls.append(launcher.run(1, step, prob=0.5, alpha=ALPHA, threshold=-1.0, dry_run=True))
        kept = range(max(0, step + 1 - KEPT_CALLS), step + 1)
        assert [int(calls[k].fetch().counts[0]) for k in kept] == [draw(1, k, 0, 9, 0.5)[0].sum() for k in kept]
    assert launcher._drawn.end - launcher._drawn.first == DRAW_AHEAD
    with pytest.raises(RuntimeError, match="statistics of this call are gone"):
        calls[-SLOTS].fetch()


def test_an_interrupt_between_new_scratch_and_its_tables_leaves_no_table_of_the_old(monkeypatch):
    launcher = launcher_of([alike(64, 300)])
    launcher.reserve_scratch(0.3)
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_merge_tables", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            launcher.reserve_scratch(1.0)
    launcher.reserve_scratch(1.0)
    assert all(merge[9] is launcher.scratch for merge in launcher._tables)


def test_a_draw_ahead_serves_the_call_of_its_number_only():
    """Where an interrupt has made a call that left no trace but its number, the outcome lies in another slot."""
    weights = [alike(40, 6)]
    launcher = launcher_of(weights)
    numbers = {"prob": 0.5, "alpha": ALPHA, "threshold": -1.0, "dry_run": False}
    for step in range(SLOTS):  # old outcomes in every slot
        launcher.run(2, step**2, **numbers | {"prob": 1.0})
    for step in range(3):
        launcher.run(3, step, **numbers)
    assert launcher._drawn.end == launcher.calls + DRAW_AHEAD
    launcher.calls += 1
    assert launcher.run(3, 3, **numbers).fetch().counts.tolist() == [draw(3, 3, 0, 40, 0.5)[0].sum()]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(1, step, 0.5) for step in range(11)], [1, 1, 4, 0, 0, 0, 4, 0, 0, 0, 4]),
        ([(1, 3 * step, 0.5) for step in range(7)], [1, 1, 4, 0, 0, 0, 4]),
        ([(1, 50 - step, 0.5) for step in range(7)], [1, 1, 4, 0, 0, 0, 4]),
        ([(1, 4, 0.5)] * 7, [1, 1, 4, 0, 0, 0, 4]),
        ([(1, step, 0.5) for step in (0, 1, 2, 9, 10, 11, 12)], [1, 1, 4, 1, 1, 4, 0]),
        ([(1, 2**63 - 6 + step, 0.5) for step in range(6)], [1, 1, 4, 0, 0, 0]),
        ([(1, 2**63 - 5 + step, 0.5) for step in range(5)], [1] * 5),  # a fourth step there is not
        ([(1, 4 - step, 0.5) for step in range(5)], [1] * 5),
        ([(1, step, 0.5 + step / 64) for step in range(6)], [1] * 6),
        ([(1, 0, 0.5), (1, 1, 0.5), (1, 2, 0.5), (1, 3, 0.25), (1, 4, 0.25)], [1, 1, 4, 1, 1]),
        ([(1, 0, 0.5), (1, 1, 0.5), (1, 2, 0.5), (2, 3, 0.5), (2, 4, 0.5)], [1, 1, 4, 1, 1]),
        ([(seed, 0, 0.5) for seed in range(6)], [1] * 6),
        ([(seed, 7 * seed, 0.5) for seed in (1, 1, 2, 2, 3)], [1] * 5),
    ],
)
def test_draws_are_made_ahead_where_steps_follow_each_other_evenly(monkeypatch, calls, expected):
    weights = [alike(40, 6), alike(30, 9)]
    launcher, made = launcher_of(weights), []
    original = launcher._draw.launch

    def launch(grid, stream, tensors, numbers):
        made[-1] += numbers[-1]
        original(grid, stream, tensors, numbers)

    monkeypatch.setattr(launcher._draw, "launch", launch)
    for seed, step, prob in calls:
        made.append(0)
        before = [weight.clone() for weight in weights]
        launcher.run(seed, step, prob=prob, alpha=ALPHA, threshold=-1.0, dry_run=False)
        for layer, (old, new) in enumerate(zip(before, weights, strict=True)):
            coin, partner = draw(seed, step, layer, len(old), prob)
            expected_weight = reference_merge(old, coin, partner, alpha=ALPHA, threshold=-1.0).weight
            assert torch.equal(bits(new), bits(expected_weight))
    assert made == expected


# ------------------------------------------------------------------------------------------------- memory and addresses


@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (16, 64), (64, 64), (40, 300), (128, 1024), (512, 4608)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_at_most_15_percent_for_small_layers_too(shape, dtype):
    launcher = launcher_of([torch.empty(shape, dtype=dtype)])
    launcher.reserve_scratch(0.3)
    assert launcher.scratch.numel() <= max(0.15 * launcher.bytes, 16)  # one unit: there is no smaller one
    assert launcher.scratch.numel() >= 0.12 * launcher.bytes - 1


def test_a_schedule_of_prob_allocates_scratch_a_few_times_at_most():
    launcher, seen = launcher_of([torch.empty(512, 1152)]), []
    for prob in np.linspace(0, 1, 1001):
        launcher.reserve_scratch(float(prob))
        seen.append(launcher.scratch)
    assert all(scratch is seen[0] for scratch in seen[:301]), "up to 0.3 once"
    assert len({id(scratch) for scratch in seen}) <= 8
    launcher.reserve_scratch(0.3)
    assert launcher.scratch is seen[-1]


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 719), ("MAX_ELEMENTS", 19)])
def test_what_32_bits_cannot_count_raises(monkeypatch, limit, value):
    weights = [alike(9, 20)]
    monkeypatch.setattr(layer_table, limit, value + 1)
    launcher_of(weights)
    monkeypatch.setattr(layer_table, limit, value)
    with pytest.raises(ValueError, match="720 bytes and up to 20 elements per filter.*INMERGE_FORCE_EAGER=1"):
        launcher_of(weights)


def test_limits_are_within_31_bits():
    assert layer_table.MAX_ELEMENTS + 1024 <= 2**31
    assert layer_table.MAX_BYTES / 16 * 2 <= 2**31


@pytest.mark.parametrize("capacity", [0, 1000])
def test_addresses_beyond_2_to_the_31_elements(capacity):
    """The filters of a large weight from number 70,000 on: where it begins there is nothing, and nobody looks."""
    filters, elements, far = 5, 2**15, 70_000
    assert far * elements > 2**31
    weights = [alike(filters, elements)]
    launcher = launcher_of(weights)
    launcher.layer_table[0, tables.BASE.value] -= far * elements * 4
    launcher.layer_table[0, tables.FIRST_ROW.value] -= far
    launcher.reserve_scratch(1.0)
    partner = np.array(cycle(filters, None))
    give_partners(launcher, partner)
    expected = reference_merge(weights[0], partner >= 0, partner, **CALL).weight
    with bounds(*tensors_of(launcher, weights).values()):
        launcher.merge_drawn(0, **CALL, dry_run=False, BLOCK=2**13, programs=2, capacity=capacity * 8)
    assert_merged_and_clean(launcher, weights, [expected])


@pytest.mark.parametrize("counts", [True, False], ids=["counting", "apart"])
def test_traffic_of_the_draw_and_the_count_is_what_their_docstrings_say(counts):
    weights = [alike(300, 4), alike(45, 4)]
    launcher = launcher_of(weights)
    launcher.reserve_scratch(0.5)
    rows, blocks, tables_, slots = launcher.rows, launcher._row_blocks, launcher._draw_tables, launcher.slots
    draws, handle, zeroed = (3, launcher._draw, DRAW_AHEAD) if counts else (1, launcher._draw_only, 1)
    readers = {"counted": [slots.readers[:draws]], "zeroed": [slots.readers[draws:]]} if counts else {}
    with traffic(
        partner=[slots.partner], outcome=[slots.outcome], index=[launcher.row_layer], active=[slots.active],
        state=[slots.state], **readers or {"zeroed": [slots.readers]},
    ) as drawing:  # fmt: skip
        handle.launch((blocks, zeroed), 0, tables_, (1, 0, 1, 2**23, rows, 0, draws))
    active = [int((slots.partner[slot] > -1)[:rows].sum()) for slot in range(draws)]
    assert all(0 < number < rows for number in active)
    assert drawing["partner"].bytes_stored == 4 * rows * draws
    assert drawing["outcome"].bytes_stored == rows * draws
    assert drawing["index"].bytes_loaded == 4 * rows * draws
    assert drawing["zeroed"].bytes_stored == 4 * rows * zeroed
    assert drawing["state"].bytes_stored == 16 * zeroed
    stored = 5 * rows * draws + (4 * rows + 16) * zeroed
    if counts:
        assert drawing["active"].bytes_stored == 4 * sum(active)
        assert drawing["counted"].bytes_stored == 0
        assert drawing.bytes_stored == stored + 4 * sum(active)
        assert drawing.atomics == sum(active) + blocks * draws
        return
    assert drawing.bytes_stored == stored
    with traffic(partner=[slots.partner], active=[slots.active]) as counting:
        launcher._count.launch((blocks, 1), 0, launcher._counted(0, False), (rows, 1))
    assert counting["partner"].bytes_loaded == counting.bytes_loaded == 4 * rows
    assert counting["active"].bytes_stored == counting.bytes_stored == 4 * active[0]
    assert counting.atomics == active[0] + blocks


def interrupted(holder, name, number, *, after):
    """A patch with which the ``number``-th call of a method is interrupted, before it does anything or ``after``."""
    original, calls = getattr(holder, name), []

    def method(self, *arguments):
        calls.append(1)
        if len(calls) != number:
            return original(self, *arguments)
        if after:
            original(self, *arguments)
        raise KeyboardInterrupt

    return holder, name, method


DRAW, MERGE, MEMSET, SECOND_MEMSET = (
    (Handle, "launch", 1),
    (Handle, "launch", 2),
    *((torch.Tensor, "zero_", k) for k in (1, 2)),
)
KINDS = {
    "plain": {}, "dry run": {"dry_run": True}, "nearest": {"partner": "nearest"}, "search": {"search": True, "jump": 0},
    "from memory": {"memory": True}, "elsewhere": {"jump": 1000}, "before the draw": {"cut": DRAW},
    "after the draw": {"cut": DRAW, "after": True}, "before the merge": {"cut": MERGE},
    "elsewhere, before the draw": {"cut": DRAW, "aside": 1000}, "memset": {"cut": MEMSET, "after": True, "aside": 1000},
    "both memsets": {"cut": SECOND_MEMSET, "after": True, "aside": 1000},
}  # fmt: skip


def sequences():
    """Names of kinds of calls, one list after the other."""
    # After three plain calls there are draws for three more.
    yield [name for first in KINDS for second in KINDS for name in (*("plain",) * 3, first, second)]
    for before in (("plain",) * 12, (*("plain",) * 3, "elsewhere")):
        yield [name for apart in range(1, SLOTS + 2) for name in (*before, *("nearest",) * apart, "plain")]
    for seed in range(2):  # runs of a kind, up to more than there are slots
        rng = np.random.default_rng(seed)
        yield [name for _ in range(25) for name in [str(rng.choice(list(KINDS)))] * rng.integers(1, SLOTS + 3)]


@pytest.mark.parametrize("names", list(sequences()), ids=["pairs", "gaps", "gaps after a memset", "runs 0", "runs 1"])
def test_every_call_merges_its_own_draw_and_old_statistics_are_theirs_or_gone(names):
    """Draws that are made ahead and not used, calls that are cut short anywhere, and calls that count apart."""
    weights = [alike(12, 6), alike(9, 9)]
    launcher, step, kept = launcher_of(weights), 0, {}
    call = {"prob": 0.5, "alpha": ALPHA, "threshold": -1.0}
    for name in names:
        how = {"partner": "random", "dry_run": False, "jump": 1, "cut": None} | KINDS[name]
        step += how["jump"]
        before = [weight.clone() for weight in weights]
        numbers, arguments = (7, step + how.get("aside", 0)), {k: how[k] for k in ("dry_run", "partner")}
        with pytest.MonkeyPatch.context() as patch:
            if how["cut"]:
                patch.setattr(*interrupted(*how["cut"], after="after" in how))
            try:
                if how.get("search"):
                    launcher.find_partners(*numbers, prob=0.5, partner="nearest", threshold=0.3)
                elif how.get("memory"):
                    launcher.prepare(*numbers, write=True, **call)
                    results = launcher.run_from_memory()
                else:
                    results = launcher.run(*numbers, **arguments, **call)
            except KeyboardInterrupt:
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)  # it may have merged
                continue
        if how.get("search"):
            continue
        draws = [draw(*numbers, layer, len(old), 0.5) for layer, old in enumerate(before)]
        kept[launcher.calls] = (results, [int(coin.sum()) for coin, _ in draws])
        for number, (old_results, counts) in kept.items():
            try:
                assert old_results.fetch().counts.tolist() == counts, f"{name}, step {step}, call {number}"
            except RuntimeError:
                assert number <= launcher.calls - KEPT_CALLS
        if how["partner"] == "random":
            for old, new, (coin, partner) in zip(before, weights, draws, strict=True):
                expected = reference_merge(old, coin, partner, alpha=ALPHA, threshold=-1.0).weight
                assert torch.equal(bits(new), bits(old if how["dry_run"] else expected)), f"{name}, step {step}"
        assert not launcher.slot_of(launcher.calls).state.any(), f"{name}, step {step}"
        assert not launcher.counter.any(), f"{name}, step {step}"


def test_a_call_number_that_was_skipped_makes_no_stride_of_more_than_64_bits():
    launcher = launcher_of([alike(12, 6)])
    numbers = {"prob": 0.5, "alpha": ALPHA, "threshold": -1.0, "dry_run": True}
    launcher.run(7, 0, **numbers)
    launcher.run(7, 2**63 - 1, **numbers)
    launcher.calls += 1  # an interrupt right after it was counted
    assert launcher.run(7, 0, **numbers).fetch().counts[0] == draw(7, 0, 0, 12, 0.5)[0].sum()


def test_the_largest_similarity_of_all_may_be_negative():
    weights = [torch.tensor([[1.0, 0.0], [-0.6, 0.8]]), torch.tensor([[1.0, 0.0], [-0.28, 0.96]])]
    launcher = launcher_of(weights)
    launcher.run(1, 0, prob=1.0, alpha=ALPHA, threshold=0.5, dry_run=False)
    assert similarity_of(int(launcher.running.largest)) == pytest.approx(-0.28)


def test_more_than_1024_filters_and_the_largest_words():
    weights = [alike(1100, 8)]
    before = weights[0].clone()
    launcher = launcher_of(weights)
    seed, step = 2**64 - 1, 2**63 - 1
    launcher.run(seed, step, prob=0.05, alpha=ALPHA, threshold=0.3, dry_run=False)
    coin, partner = draw(seed, step, 0, 1100, 0.05)
    expected = reference_merge(before, coin, partner, alpha=ALPHA, threshold=0.3)
    assert torch.equal(bits(weights[0]), bits(expected.weight))
    assert 0 < expected.merged.sum() < coin.sum()
