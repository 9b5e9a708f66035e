"""How the merge kernel takes its rows: blocks, warps, registers and programs by the length of the filters."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import bench_tuning
from inmerge_fast import MergePlan
from inmerge_fast.kernels.merge import CYCLE_BLOCK
from inmerge_fast.kernels.rows import block_of, span_of
from inmerge_fast.kernels.tables import BFLOAT16, FLOAT32, STRIDED
from inmerge_fast.paths.triton import handle
from inmerge_fast.paths.triton.launch import Launcher

LENGTHS = (6, 256, 257, 2048, 2049, 2**31 - 2**13)
DTYPES = ("HAS_FLOAT32", "HAS_BFLOAT16", "HAS_FLOAT16")
TARGETS = {"cuda": 32, "hip": 64}  # and the threads of a warp


def constants_of(elements, target="cuda", dtypes=DTYPES[:1], strided=False):
    has = {name: name in dtypes for name in DTYPES} | {"HAS_STRIDED": strided}
    return has | handle.merge_shape(elements, target)


@pytest.mark.parametrize(("elements", "block", "warps", "programs"), [
    (6, 128, 1, (23, 21)), (256, 128, 1, (23, 21)), (256.5, 256, 2, (14, 12)), (2048, 256, 2, (14, 12)),
    (2048.5, 512, 4, (16, 14)), (1e9, 512, 4, (16, 14)),
])  # fmt: skip
def test_long_filters_get_more_warps_and_fewer_programs(elements, block, warps, programs, monkeypatch):
    """Up to Triton 3.7, and since 3.8, whose code takes more registers."""
    constants = constants_of(elements)
    assert constants["BLOCK"] == block
    assert handle.merge_options(constants, "cuda")["num_warps"] == warps
    for more, wanted in zip((0, 8), programs, strict=True):
        monkeypatch.setattr(handle, "MORE_REGISTERS", more)
        assert handle.merge_programs(constants, "cuda") == wanted


def test_the_mean_length_decides():
    def block(*shapes):
        weights = [torch.zeros(shape) for shape in shapes]
        plan = MergePlan(weights)
        return Launcher(plan.layers, plan.weights(), plan.rows.start)._constants["BLOCK"]

    assert [block((64, 64)), block((2, 4608)), block((64, 64), (2, 4608)), block((64, 64), (8, 4608))] == [
        128, 512, 128, 256
    ]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("elements", LENGTHS)
def test_each_thread_has_16_bytes_of_its_own(elements, target):
    """Of dense filters, and of no block two threads the same element: one would read what the other has written."""
    constants = constants_of(elements, target)
    threads = TARGETS[target] * handle.merge_options(constants, target)["num_warps"]
    shape = [constants[name] for name in ("BLOCK", "STRIDED_BLOCK")]
    assert block_of(FLOAT32.value, *shape) * 4 == block_of(BFLOAT16.value, *shape) * 2 == threads * 16
    for code in (FLOAT32.value, BFLOAT16.value):
        assert block_of(STRIDED.value + code, *shape) >= threads
        assert span_of(code, constants["SPAN"]) >= 1
        assert span_of(STRIDED.value + code, constants["SPAN"]) == 1
    assert CYCLE_BLOCK.value >= threads


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES[2:], DTYPES[1:], DTYPES])
def test_programs_are_what_registers_hold_and_twice_that_for_long_filters(dtypes, strided):
    for elements in LENGTHS:
        constants = constants_of(elements, dtypes=dtypes, strided=strided)
        options = handle.merge_options(constants, "cuda")
        resident = 2**16 // (options["maxnreg"] * 32 * options["num_warps"])
        assert handle.merge_programs(constants, "cuda") == min(resident * (1 + (elements > 2048)), 32)


def test_tuning_sweeps_what_was_chosen():
    """Or a GPU's measurements would not say whether it was right."""
    for elements, shape in handle.MERGE_SHAPES:
        constants = constants_of(elements)
        warps = handle.merge_options(constants, "cuda")["num_warps"]
        assert (shape["BLOCK"], warps, shape["SPAN"]) in {(block, w, span) for block, w, span, _ in bench_tuning.SHAPES}
    assert set(handle.MERGE_REGISTERS["float32", False]) <= set(bench_tuning.MAXNREG)
    assert handle.STRIDED_BLOCK in bench_tuning.STRIDED_BLOCKS
    limits = [elements for elements, _ in handle.MERGE_SHAPES[:-1]]
    assert {*limits, *(2 * limit for limit in limits)} <= set(bench_tuning.LENGTHS)
    swept = {name for choice in bench_tuning.choices(strided=False, quick=False) for name in choice}
    swept |= {name for choice in bench_tuning.choices(strided=True, quick=False) for name in choice}
    assert swept == set(bench_tuning.CHOICE)
