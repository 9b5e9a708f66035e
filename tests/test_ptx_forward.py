"""Merging for a forward pass and back as compiled, under adversarial schedules and weak memory."""

import pytest

pytest.importorskip("triton")

from ptx import cases

PLANS = [*((name, "sm_90") for name in cases.PLANS), ("bfloat16", "sm_80"), ("float32", "sm_100")]
SCHEDULES = 4


@pytest.mark.parametrize(("name", "arch"), PLANS)
def test_plans_are_merged_as_the_reference_does_and_restored_without_races(name, arch):
    rows = 0
    for number in range(SCHEDULES):
        outcome = cases.merge_for_now(number, arch, name)
        assert outcome.is_fine, f"number {number}: {outcome}"
        rows += outcome.rows
    assert rows > 4 * SCHEDULES


def test_partners_that_are_read_where_they_lie_are_noticed():
    outcomes = [cases.merge_for_now(number, "sm_90", "float32", naive=True) for number in range(6)]
    assert any("at weight" in str(finding) for outcome in outcomes for finding in outcome.findings)
    assert any(outcome.wrong for outcome in outcomes)
