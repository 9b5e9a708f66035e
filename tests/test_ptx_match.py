"""The kernels of the partner rules as compiled: lists, norms, asynchronous copies, products, the best pairs.

A number that fails is seen again with ``python -m tests.ptx match --only NUMBER``.
"""

import pytest

pytest.importorskip("triton")

from ptx import cases
from ptx.machine import Schedule

SCHEDULES = 3


CASES = [(name, "sm_90", rule) for name in cases.MATCHES for rule in ("nearest", "similar")]
CASES += [(name, "sm_80", ("nearest", "similar")[k % 2]) for k, name in enumerate(cases.MATCHES) if name != "all"]


@pytest.mark.parametrize(("name", "arch", "rule"), CASES)
def test_partners_are_those_of_brute_force(name, arch, rule):
    rows = 0
    for number in range(1 if name == "all" else SCHEDULES):
        outcome = cases.match(number, arch, rule, name)
        assert outcome.is_fine, f"number {number}: {outcome}"
        rows += outcome.rows
    assert rows > 20


@pytest.mark.parametrize("rule", ["nearest", "similar"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_what_a_product_in_flight_reads_is_not_overwritten(rule, name):
    """On Hopper copies refilled what a product still read: wrong at its latest legal timing, which it has here."""
    outcome = cases.match(0, "sm_90", rule, name, Schedule(0, "serial"))
    assert outcome.is_fine, outcome
