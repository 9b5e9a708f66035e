"""A process of its own that compiles kernels for GPUs that are not there, as far as PTX.

Where there is no GPU the tests' own process interprets Triton's kernels, and interpreted and compiled kernels cannot
share one. So this file is run as a script, which answers requests; :func:`ptx_of` asks it.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Request:
    """What a launch would compile: the kernel by name, and arguments as far as Triton looks at them.

    Attributes:
        tensors: of each its dtype's name and its address.
    """

    module: str
    kernel: str
    arch: str
    tensors: tuple[tuple[str, int], ...]
    numbers: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Compiled:
    """PTX, and what its launch needs to know."""

    ptx: str
    shared_bytes: int
    parameters: tuple[str, ...]  # names, in order; Triton's own come after them
    triton: str


class CompilationError(RuntimeError):
    """Triton could not compile a kernel; its own words."""


_process: subprocess.Popen[bytes] | None = None


@cache
def ptx_of(request: Request) -> Compiled:
    """Compile, or remember."""
    global _process
    if _process is None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        _process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        atexit.register(_stop)
    pickle.dump(vars(request), _process.stdin)
    _process.stdin.flush()
    answer = pickle.load(_process.stdout)
    if isinstance(answer, str):
        raise CompilationError(answer)
    return Compiled(**answer)


def _stop() -> None:
    """Closing its input ends it; its cache goes with it."""
    _process.stdin.close()
    _process.wait()


class AbsentGpu:
    """Stands in for Triton's driver."""

    target: Any = None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps its kernels by device

    def get_current_stream(self, _device: object = None) -> int:
        return 0


class Tensor:
    """What Triton looks at of a tensor."""

    def __init__(self, dtype: str, address: int) -> None:
        import torch

        self.dtype, self._address = getattr(torch, dtype), address

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 2**31  # nothing that a compiler could use


def compile_one(request: dict[str, Any], gpu: AbsentGpu) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    gpu.target = GPUTarget("cuda", int(request["arch"].removeprefix("sm_")), 32)
    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    tensors = [Tensor(*tensor) for tensor in request["tensors"]]
    keywords = dict(request["constants"]) | dict(request["options"])
    compiled = kernel.warmup(*tensors, *request["numbers"], grid=(1,), **keywords)
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    return {
        "ptx": compiled.asm["ptx"], "shared_bytes": compiled.metadata.shared, "parameters": tuple(names),
        "triton": triton.__version__,
    }  # fmt: skip


def serve(requests: Any, answers: Any) -> None:
    """Answer requests until there are no more."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    gpu = AbsentGpu()
    driver.set_active(gpu)
    CUDABackend.make_cubin = lambda *_: b""  # PTX is enough
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: Any = compile_one(request, gpu)
        except Exception as error:
            answer = f"{request['kernel']} for {request['arch']}: {type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a compiler prints must not come between the answers
    with tempfile.TemporaryDirectory() as cache:  # what lacks machine code may not be found by others
        os.environ["TRITON_CACHE_DIR"] = cache
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
