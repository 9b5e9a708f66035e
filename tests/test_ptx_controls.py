"""Merge kernels that are broken on purpose must be noticed, or a green run of the others would say nothing."""

import pytest

pytest.importorskip("triton")

import triton
from ptx import barriers, cases
from ptx.launch import program_of
from ptx.machine import Schedule

ARCH = "sm_90"
SCHEDULES = 12


def outcomes(*, text=None, weak=cases.WEAK[1], **settings):
    """Merges in which many rows read one, and in which each reads the next; ``text`` changes the PTX."""

    def mutate(kernel, program, compiled):
        return program_of(text(compiled.ptx), compiled.shared_bytes) if text and kernel == "_merge_kernel" else program

    return [
        cases.merge_table(
            number, ARCH, table=("star", "cycle")[number % 2], capacity=10_000, elements=256, mutate=mutate, repeats=1,
            schedule=Schedule(number, cases.WAYS[number % 3], None, weak),
            **{"BLOCK": 256, "SPAN": 4, "programs": 8} | settings,
        )
        for number in range(SCHEDULES)
    ]  # fmt: skip


def kinds(results):
    return {f"{finding.kind} {finding.region}" for outcome in results for finding in outcome.findings}


def replaced(old, new):
    def change(ptx):
        assert old in ptx
        return ptx.replace(old, new)

    return change


def test_the_protocol_as_it_is_passes_in_these_schedules():
    for outcome in outcomes():
        assert outcome.is_fine, outcome


def test_relaxed_atomics_are_noticed():
    results = outcomes(SEM="relaxed")
    assert "W-R scratch_ptr" in kinds(results)
    assert "R-W weight0" in kinds(results)
    assert sum(bool(outcome.wrong) for outcome in results) > 3
    coherent = outcomes(SEM="relaxed", weak=None)
    assert all(outcome.findings for outcome in coherent), "races in every schedule, whatever memory does"
    assert not any(outcome.wrong for outcome in coherent), "and nothing wrong where it is coherent"


@pytest.mark.parametrize(("old", "new", "races"), [
    (".acq_rel.", ".release.", {"W-R scratch_ptr", "R-W weight0"}),
    (".acq_rel.", ".acquire.", {"W-R scratch_ptr", "R-W weight0"}),
    (".acquire.b32", ".relaxed.b32", {"R-W weight0"}),
], ids=["no acquire at the releases", "no release", "no acquire at the first look"])  # fmt: skip
def test_a_missing_half_of_an_order_is_noticed(old, new, races):
    found = kinds(outcomes(text=replaced(old, new)))
    assert races <= found


def test_a_naive_merge_in_place_is_noticed():
    results = outcomes(NAIVE=True, weak=None)
    assert {"R-W weight0", "W-R weight0"} <= kinds(results)
    assert sum(bool(outcome.wrong) for outcome in results) > 3


def test_leaving_out_our_own_barriers_proves_nothing():
    """Triton puts a barrier before a release by itself, 3.6 too: what BARRIER leaves out is there all the same.

    So a green run without BARRIER is no sign that none is needed, and a red one cannot be had. What proves the need is
    :func:`test_each_barrier_deleted_from_the_ptx_is_missed`.
    """
    found = []

    def count(kernel, program, compiled):
        if kernel == "_merge_kernel":
            found.append(len(program.barriers()))
        return program

    for barrier in (True, False):
        outcome = cases.merge_table(
            0, ARCH, elements=256, capacity=10_000, schedule=Schedule(0), mutate=count, repeats=1, BARRIER=barrier
        )
        assert outcome.is_fine, outcome
    assert found[0] == found[1]


CASES = {
    "dense": ("_merge_kernel", barriers.merge_case(ARCH), SCHEDULES),
    "strided": ("_merge_kernel", barriers.merge_case(ARCH, elements=387), SCHEDULES),
    "count": ("_count_kernel", barriers.merge_case(ARCH), 3),
    "draw": ("_draw_kernel", barriers.plan_case(ARCH), 4),
}
IS_NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
# Of a sum over warps: before their parts are written, when they are, and, up to Triton 3.7, when one thread's sum of
# them is. Since 3.8 every warp adds all parts.
OF_A_SUM = 2 if IS_NEW else 3
# Of count_rows: three to hand partners and coins over to the threads that count, two of the running sum, two that give
# all warps the list's old length.
OF_COUNTS = 7 + OF_A_SUM

# Before the first look at a row's counter, which shares its word of shared memory with the first of the three sums.
# Since 3.8 each of those has a place and a barrier of its own, so that two others order that one; Triton looks at all
# three places as one, of which the last has just been read.
NEEDLESS = {"dense": {"_merge_row 1"}, "strided": {"_merge_row 1"}} if IS_NEW else {}


@pytest.mark.parametrize("name", CASES)
def test_each_barrier_deleted_from_the_ptx_is_missed(name):
    kernel, run, schedules = CASES[name]
    found = barriers.deletions(kernel, run, schedules)
    if name in ("count", "draw"):
        assert len(found) == OF_COUNTS
    else:
        assert len(found) >= 20
    # That a needless barrier is no loss is no guess: what only it orders is nothing. All others are noticed.
    assert {each.name for each in found if not each.noticed_by} <= NEEDLESS.get(name, set())
    assert [each.name for each in found if bool(each.orders) != bool(each.noticed_by)] == []
