"""What the kernels execute and move per row, counted from their PTX, does not grow unnoticed."""

import pytest

pytest.importorskip("triton")

import triton
from ptx import counts

CASES = [
    *(("sm_90", name) for name in ("float32 x 64", "float32 x 4608", "float32 x 147, unaligned")),
    ("sm_90", "bfloat16 x 576, similar"), ("sm_80", "bfloat16 x 4608"), ("sm_100", "float32 x 576"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_counts_do_not_grow(arch, name):
    if triton.__version__ not in counts.versions():
        pytest.skip(f"no counts recorded for Triton {triton.__version__}; python -m tests.ptx counts --record does it")
    assert not counts.risen(arch, name), "python -m tests.ptx counts --record takes them over"


def test_the_record_is_complete():
    kernels = {"random": {"rows", "draw", "merge"}, "rule": {"rows", "draw", "list", "match", "count", "merge"}}
    for archs in counts.versions().values():
        assert {arch: set(found) for arch, found in archs.items()} == {
            a: set(names) for a, names in counts.ARCHS.items()
        }
        for cases in archs.values():
            for name, found in cases.items():
                assert set(found) == kernels["rule" if name in counts.MATCHES else "random"]
