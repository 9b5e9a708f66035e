"""The race detector, driven by hand."""

import numpy as np
import pytest

pytest.importorskip("triton")
interpreter = pytest.importorskip("interpreter")
races = pytest.importorskip("races")

pytestmark = pytest.mark.interpreted


class Programs:
    """Drives the detector by hand. Addresses are in bytes."""

    def __init__(self, programs=4, barrier_before_release=False):
        self.detector = races.RaceDetector(programs, barrier_before_release=barrier_before_release, tensors={})

    def do(self, program, op, *addresses, size=4, order=None):
        addresses = np.array(addresses, np.uint64)
        self.detector.access(program, interpreter.Access(op, addresses, size, addresses.size == 1, order))

    def pass_on(self, program, address, order="acq_rel"):
        self.detector.barrier(program)
        self.do(program, "atomic", address, order=order)

    @property
    def found(self):
        return [(race.kind, race.address, race.elements, race.earlier, race.later) for race in self.detector.races]


def test_order_is_transitive_and_goes_through_relaxed_atomics():
    programs = Programs()
    programs.do(0, "store", 64, 68)
    programs.pass_on(0, 0)
    programs.pass_on(1, 0)
    programs.pass_on(1, 8)
    programs.pass_on(2, 8, "relaxed")  # learns nothing, but keeps what 1 published
    programs.pass_on(3, 8)
    programs.do(3, "load", 64, 68)
    assert programs.found == []
    programs.do(2, "load", 68)
    assert programs.found == [("W-R", 68, 1, 0, 2)]


def test_plain_store_ends_what_a_word_published():
    programs = Programs()
    programs.do(0, "store", 64)
    programs.pass_on(0, 0)
    programs.pass_on(1, 0)
    programs.do(1, "store", 0)
    programs.pass_on(2, 0)
    programs.do(2, "load", 64)
    assert [race[0] for race in programs.found] == ["W-A", "W-R"]


def test_what_follows_a_release_is_not_published():
    programs = Programs()
    programs.pass_on(0, 0)
    programs.do(0, "store", 64)
    programs.pass_on(1, 0)
    programs.do(1, "store", 64)
    assert programs.found == [("W-W", 64, 1, 0, 1)]


def test_accesses_of_different_sizes_overlap():
    programs = Programs()
    programs.do(0, "store", 64, 72)
    programs.do(1, "load", 66, 68, 74, size=2)
    assert programs.found == [("W-R", 66, 2, 0, 1)]
    programs.do(2, "atomic", 96, order="relaxed")
    programs.do(3, "load", 99, size=1)
    assert programs.found[1:] == [("A-R", 99, 1, 2, 3)]


@pytest.mark.parametrize("stride", [4, 400, 2**33])
def test_scattered_and_large_memory(stride):
    programs = Programs()
    addresses = np.arange(20_000 if stride == 4 else 500) * stride + 2**40
    programs.do(0, "store", *addresses)
    programs.do(1, "load", *addresses[::2])
    assert programs.found == [("W-R", 2**40, len(addresses) // 2, 0, 1)]
