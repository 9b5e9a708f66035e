"""Compiled kernels and their arguments. The only file that touches Triton's launcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.runtime.driver import driver


def check_not_capturing(device: torch.device, what: str) -> None:
    """Raise where a CUDA graph is being captured, which can take launches along and nothing else.

    Raises:
        RuntimeError: it is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first merge_ of a plan {what}, which a CUDA graph cannot capture; call merge_ once before capturing"
        )


def raw_stream(device: torch.device) -> int:
    """The handle of the current stream, as launches take it; PyTorch's own function makes an object for it first."""
    stream: int = driver.active.get_current_stream(device.index)
    return stream


class Arguments(tuple[torch.Tensor, ...]):
    """Tensors that are passed to a kernel again and again, with their addresses looked up once."""

    pointers: tuple[int, ...]

    def __new__(cls, *tensors: torch.Tensor) -> Arguments:
        """Look the addresses up; the tensors must keep them."""
        self = super().__new__(cls, tensors)
        self.pointers = tuple(tensor.data_ptr() for tensor in tensors)
        return self


class Handle:
    """A kernel with its constants and options fixed, compiled at the first launch.

    Triton's own ``kernel[grid](...)`` looks every argument over again at each call, 22 us; a compiled kernel's launcher
    takes 2 to 3 us. It serves the types and alignments of the first launch only, which a :class:`Launcher` keeps: fixed
    tables, 32-bit counts, 64-bit seed and step.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        # For every kernel, because Triton's default depends on its version. Were multiplication and addition fused by
        # the compiler, the blend would be rounded once less than the reference's; sums of products say tl.fma.
        self._kernel, self._constants, self._options = kernel, constants, {"enable_fp_fusion": False} | options
        self._values = tuple(constants.values())
        self._compiled: Any = None
        self._run: Any = None
        self._fixed: tuple[Any, ...] = ()

    def launch(self, grid: tuple[int, int], stream: int, tensors: Arguments, numbers: tuple[Any, ...]) -> None:
        """Launch a ``grid`` of programs on ``stream`` with the kernel's arguments in order: tables, then numbers."""
        if self._run is None:
            if not isinstance(self._kernel, triton.JITFunction):  # interpreted
                self._kernel[grid](*tensors, *numbers, **self._constants)
                return
            self._compile(tensors, numbers)
        run: Any = self._run
        run(*grid, 1, stream, *self._fixed, *tensors.pointers, *numbers, *self._values)

    def compile(self, tensors: Arguments, numbers: tuple[Any, ...]) -> None:
        """Compile for launches with such arguments, unless that is done, without launching anything."""
        if self._run is None and isinstance(self._kernel, triton.JITFunction):
            self._compile(tensors, numbers)

    def _compile(self, tensors: Arguments, numbers: tuple[Any, ...]) -> None:
        check_not_capturing(tensors[0].device, "compiles its kernels")
        compiled = self._kernel.warmup(*tensors, *numbers, grid=(1,), **self._constants, **self._options)
        compiled._init_handles()
        self._compiled, self._run = compiled, compiled.run
        self._fixed = (compiled.function, compiled.packed_metadata, None, None, None)


# How the merge kernel takes its rows, by the mean length of a filter up to so many elements: BLOCK elements of float32
# together, four by each thread, and SPAN blocks of both rows in registers. What a row costs whatever its length is paid
# by every warp, so short rows get one each. All numbers are from counts (NOTES.md); bench_tuning tries others on a GPU.
MERGE_SHAPES = (
    (256, {"BLOCK": 128, "SPAN": 3}),
    (2048, {"BLOCK": 256, "SPAN": 4}),
    (float("inf"), {"BLOCK": 512, "SPAN": 3}),
)
# Registers of a thread for 1, 2 and 4 warps, by dtypes and whether there are strided filters: the fewest with which
# ptxas (Triton 3.7.1) spills nothing on sm_80, 90 and 100, from memory or not. Left to itself it spills a few words to
# get down to 64 or 96.
MERGE_REGISTERS = {
    ("float32", False): (88, 72, 64), ("16 bits", False): (72, 80, 64), ("several", False): (96, 120, 104),
    ("float32", True): (96, 96, 88), ("16 bits", True): (112, 120, 88), ("several", True): (128, 136, 128),
}  # fmt: skip
# Triton 3.8's code takes up to 8 more: with as many as 3.7 it spills up to 56 bytes.
MORE_REGISTERS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 0
STRIDED_BLOCK = 256  # elements of strided filters, whose addresses take registers
REGISTERS_PER_SM, PROGRAMS_PER_SM = 2**16, 32  # what a multiprocessor holds at a time


def merge_shape(elements: float, target: str) -> dict[str, int]:
    """BLOCK, SPAN and STRIDED_BLOCK of the merge kernel for filters of so many ``elements`` on average."""
    shape = next(shape for limit, shape in MERGE_SHAPES if elements <= limit)
    # AMD's warps have 64 threads: the shortest block would leave each 8 bytes.
    return shape | {"BLOCK": max(shape["BLOCK"], 256 if target == "hip" else 0), "STRIDED_BLOCK": STRIDED_BLOCK}


def merge_programs(constants: Mapping[str, Any], target: str) -> int:
    """Programs of the merge kernel with these constants, for each multiprocessor.

    What its registers hold at a time, so that all run from the beginning to the end: with twice as many DenseNet-121
    took 22.0 us on an H200 instead of 19.7, ResNet-50 41.4 instead of 40.0. But twice as many where four warps share a
    row: others begin where one comes to an end, which spreads rows of unlike lengths (3D ResNet-18: 51.4 us, not 54.8).
    """
    options = merge_options(constants, target)
    if target == "hip":
        return PROGRAMS_PER_SM // int(options["num_warps"])
    resident = REGISTERS_PER_SM // (options["maxnreg"] * 32 * options["num_warps"])
    return min(PROGRAMS_PER_SM, int(resident) * (2 if options["num_warps"] > 2 else 1))


def merge_options(constants: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Compiler options of the merge kernel with these constants for ``target`` ("cuda" or "hip")."""
    if target == "hip":
        return {"num_warps": max(1, constants["BLOCK"] // 256)}
    warps = max(1, constants["BLOCK"] // 128)
    dtypes = [name for name in ("HAS_FLOAT32", "HAS_BFLOAT16", "HAS_FLOAT16") if constants[name]]
    kinds = "several" if len(dtypes) > 1 else "float32" if constants["HAS_FLOAT32"] else "16 bits"
    registers = MERGE_REGISTERS[kinds, bool(constants["HAS_STRIDED"])]
    fewest = registers[min(warps.bit_length(), len(registers)) - 1]
    return {"num_warps": warps, "maxnreg": fewest + MORE_REGISTERS}
