"""Draw, count, prepare and merge as compiled, under adversarial schedules and weak memory.

A number that fails is seen again with ``python -m tests.ptx plans --only NUMBER``, or ``tables``.
"""

import pytest

pytest.importorskip("triton")

from ptx import cases
from ptx.cases import BFLOAT16, DTYPES, FLOAT32
from ptx.machine import Schedule

from benchmarks import bench_tuning
from inmerge_fast.paths.triton.handle import MERGE_SHAPES

# Every plan on Hopper; elsewhere one each, where sm_100 adds floats in pairs.
PLANS = [*((name, "sm_90") for name in cases.PLANS), ("bfloat16", "sm_80"), ("float32", "sm_100")]
SCHEDULES = 8
FROM_MEMORY = "short"  # as in a CUDA graph, some of the calls: kernels of their own


@pytest.mark.parametrize(("name", "arch"), PLANS)
def test_plans_merge_as_the_reference_does_and_without_races(name, arch):
    rows = 0
    for number in range(SCHEDULES):
        outcome = cases.random_plan(number, arch, name, from_memory=None if name == FROM_MEMORY else False)
        assert outcome.is_fine, f"number {number}: {outcome}"
        rows += outcome.rows
    assert rows > 4 * SCHEDULES


@pytest.mark.parametrize(("dtypes", "arch"), [
    ((FLOAT32,), "sm_90"), ((FLOAT32,), "sm_80"), ((FLOAT32,), "sm_100"), ((BFLOAT16,), "sm_90"),
    ((FLOAT32, BFLOAT16), "sm_90")])  # fmt: skip
@pytest.mark.parametrize("table", ["chain", "cycle", "star", "read by all", "two cycles with tails", "anyhow"])
def test_any_table_merges_without_races_whatever_the_scratch(dtypes, arch, table):
    for number in range(SCHEDULES // 3 + 1):
        outcome = cases.merge_table(number, arch, table=table, dtypes=dtypes)
        assert outcome.is_fine, f"number {number}: {outcome}"
        assert outcome.rows > 0


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_rows_of_any_length_merge_in_every_shape(shape):
    """Of less than a block, of a span and of several, with scratch for all rows, for few and for none."""
    span = shape["BLOCK"] * shape["SPAN"]
    for number, elements in enumerate((20, span, 2 * span + 132)):
        outcome = cases.merge_table(
            number, "sm_90", table="two cycles with tails", elements=elements, capacity=(10_000, 0, 40)[number],
            repeats=1, **shape,
        )  # fmt: skip
        assert outcome.is_fine, f"{elements} elements: {outcome}"


def test_all_shapes_on_offer_are_among_them():
    offered = [(shape["BLOCK"], shape["SPAN"]) for _, shape in MERGE_SHAPES]
    assert set(offered) <= {(shape["BLOCK"], shape["SPAN"]) for shape in cases.SHAPES}
    assert {span for _, _, span, _ in bench_tuning.SHAPES} <= {shape["SPAN"] for shape in cases.SHAPES}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_cycle_that_found_no_scratch_is_merged_by_all_warps(arch):
    """A warp that came late to ``_write_cycle`` saw the counter that the first one had reset, and left its columns."""
    for number in range(12):
        outcome = cases.merge_table(
            number, arch, table="cycle", elements=2048, capacity=0, schedule=Schedule(number, "priorities"), repeats=1,
            programs=4, BLOCK=512, SPAN=3,
        )  # fmt: skip
        assert outcome.is_fine, f"number {number}: {outcome}"


def test_all_dtypes_are_in_some_plan():
    used = set()
    for name in cases.PLANS:
        for target, _ in cases.PLANS[name](cases.random.Random(0)):
            used.add(getattr(target, "weight", target).dtype)
    assert used == set(DTYPES)
