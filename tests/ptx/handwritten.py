"""Small kernels written by hand, to test the machine itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine import Machine, Schedule
from .memory import Memory
from .profile import Profile
from .program import Program

REGISTERS = ".reg .pred %p<16>; .reg .b16 %rs<16>; .reg .b32 %r<64>; .reg .b64 %rd<32>;"


def kernel(body: str, names: list[str], *, warps: int = 1, shared_bytes: int = 0) -> Program:
    """A kernel whose parameters are addresses, in registers of their names; ``%t`` is the thread, ``%c`` the CTA."""
    params = ", ".join(f".param .u64 k_param_{i}" for i in range(len(names)))
    loads = " ".join(f"ld.param.b64 %{name}, [k_param_{i}];" for i, name in enumerate(names))
    declared = f".reg .b64 {', '.join('%' + name for name in names)};" if names else ""
    return Program(
        f""".extern .shared .align 16 .b8 smem[];
        .visible .entry k({params or ".param .u64 k_param_0"}) .reqntid {32 * warps} {{
        {REGISTERS} .reg .b32 %t, %c; {declared} mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; {loads}
        {body} ret; }}""",
        shared_bytes,
    )


def run(
    program: Program, arrays: dict[str, np.ndarray], *, ctas: int = 1, undefined: tuple[str, ...] = (),
    schedule: Schedule | None = None, profile: Profile | None = None, **settings: Any,
) -> Machine:  # fmt: skip
    """Run it on arrays, which are changed in place."""
    spans = [
        (name, array.ctypes.data, array.ctypes.data + array.nbytes, name not in undefined)
        for name, array in arrays.items()
    ]
    memory = Memory(spans)
    arguments = [array.ctypes.data for array in arrays.values()] or [0]
    machine = Machine(program, memory, arguments, (ctas, 1), schedule or Schedule(**settings), profile)
    machine.run()
    memory.write_back()
    return machine


def kinds(machine: Machine) -> set[str]:
    """Of what was found."""
    return {finding.kind for finding in machine.findings.values()}
