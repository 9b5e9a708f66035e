"""Runs the launch path over Triton's real launcher and a CUDA driver that does nothing; prints JSON.

A script of its own: it needs compiled kernels, the stub in place of libcuda, and a process that never interpreted.
"""

import ctypes
import json
import os
import struct
import sys
import time

import torch
from stub import StubDriver
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver

import inmerge_fast
from inmerge_fast.draw import coin_threshold
from inmerge_fast.paths.triton.draw_ahead import DRAW_AHEAD
from inmerge_fast.paths.triton.launch import Launcher
from inmerge_fast.paths.triton.slots import SLOTS

SEED, STEP = 2**63 + 5, 2**40 + 1
DRAW_PARAMETERS, COUNT_PARAMETERS, MERGE_PARAMETERS, PREPARE_PARAMETERS = 15, 8, 21, 7  # all but the constants


class Operators(TorchDispatchMode):
    """The operators that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Record(ctypes.Structure):
    _fields_ = (("grid", ctypes.c_uint * 3), ("function", ctypes.c_void_p), ("parameters", ctypes.c_uint64 * 32))


def main():
    stub = ctypes.CDLL("libcuda.so.1")
    launches = ctypes.c_int.in_dll(stub, "stub_launches")
    remembered = (ctypes.c_int * 16).in_dll(stub, "stub_parameters")
    records = (Record * 64).in_dll(stub, "stub_records")
    driver.set_active(StubDriver())

    weights = [torch.randn(64, 4608) for _ in range(int(sys.argv[1]))]
    plan = inmerge_fast.MergePlan(weights)
    launcher = Launcher(plan.layers, plan.weights(), plan.rows.start)
    settings = {"prob": 0.3, "alpha": 0.8, "threshold": 0.25, "dry_run": False}

    def recorded(call, *arguments, **keywords):
        """The records of the launches of a call."""
        before = launches.value
        call(*arguments, **keywords)
        return [Record.from_buffer_copy(records[i % 64]) for i in range(before, launches.value)]

    def run(seed, step, **keywords):
        return recorded(launcher.run, seed, step, **settings, **keywords)

    run(0, 0)  # compiles and loads the functions in this order
    remembered[1], remembered[2] = DRAW_PARAMETERS, MERGE_PARAMETERS
    handles = (launcher._draw, launcher._merge_handle({}))
    compiled = [handle._compiled for handle in handles]
    draw, merge = run(SEED, STEP)
    call = launcher.calls
    small_draw = run(3, 4)[0]
    calls = [run(3, 4 + 2**40 * k) for k in range(1, 7)] + [run(4, 8)]
    several = calls[1][0]
    prepared = {"prob": 0.3, "alpha": 0.8, "threshold": 0.25, "write": True}
    launcher.prepare(0, 0, **prepared)  # compiles
    launcher.run_from_memory()
    remembered[3], remembered[5] = PREPARE_PARAMETERS, COUNT_PARAMETERS
    (prepare,) = recorded(launcher.prepare, SEED, STEP, **prepared)
    from_memory, launcher_calls = recorded(launcher.run_from_memory), launcher.calls
    times = []
    for step in range(2000):
        start = time.perf_counter()
        launcher.run(1, step, **settings)
        times.append(time.perf_counter() - start)

    # A whole call of merge_, as on a GPU: no operator of PyTorch, so nothing is allocated, copied or waited for.
    os.environ["INMERGE_INTERPRET"] = (
        "1"  # makes the plan take the kernels for CPU tensors; they are compiled ones here
    )
    assert plan.path == "triton"
    inmerge_fast.merge_(plan, seed=1, step=0)
    with Operators() as operators:
        before = launches.value
        for step in range(20):
            inmerge_fast.merge_(plan, seed=1, step=step, dry_run=step % 2 == 0, prob=(0.1, 0.3)[step % 2])
        merge_launches = launches.value - before
        in_merge = list(operators.seen)
        torch.zeros(1).item()

    def low(word):
        return word & 0xFFFFFFFF

    def as_float(word):
        return struct.unpack("<f", struct.pack("<I", low(word)))[0]

    count = from_memory[1]
    functions = {draw.function: "draw", count.function: "count", merge.function: "merge"}

    def kernel_of(record):
        return functions[record.function]

    print(json.dumps({
        "grids": [list(record.grid) for record in (draw, merge)],
        "expected_grids": [[launcher._row_blocks, DRAW_AHEAD, 1], [launcher.programs, 1, 1]],
        "same_handles": [handle._compiled for handle in handles] == compiled,
        "functions": len({record.function for record in (draw, count, merge)}),
        "pointers": [
            draw.parameters[0] == launcher.layer_table.data_ptr(),
            draw.parameters[6] == launcher.slots.state.data_ptr(),
            count.parameters[0] == launcher.slot_of(launcher_calls).partner.data_ptr(),
            merge.parameters[4] == launcher.slot_of(call).active.data_ptr(),
            merge.parameters[8] == launcher.slot_of(call).state.data_ptr(),
        ],
        "seed_step": [draw.parameters[8], draw.parameters[9]] == [SEED, STEP],
        "small_seed_step": [small_draw.parameters[8], small_draw.parameters[9]] == [3, 4],
        "coin_threshold": low(draw.parameters[11]) == coin_threshold(0.3),
        "rows": low(draw.parameters[12]) == launcher.rows,
        "slot_draws": [low(word) for word in draw.parameters[13:15]] == [call % SLOTS, 1],
        "capacity": low(merge.parameters[15]) == launcher.scratch.numel() // 16,
        "alpha_beta_threshold": [as_float(word) for word in merge.parameters[16:19]],
        "write_programs": [low(word) for word in merge.parameters[19:21]] == [1, launcher.programs],
        "launches": [[kernel_of(record) for record in records] for records in calls],
        "ahead": [several.parameters[i] for i in (8, 9, 10)] == [3, 4 + 2 * 2**40, 2**40]
        and low(several.parameters[14]) == DRAW_AHEAD,
        "prepared": [prepare.parameters[i] for i in (1, 2)] == [SEED, STEP]
        and low(prepare.parameters[3]) == coin_threshold(0.3)
        and [as_float(prepare.parameters[i]) for i in (4, 5)] == [as_float(merge.parameters[i]) for i in (16, 17)]
        and low(prepare.parameters[6]) == 1,
        "from_memory": [functions.get(record.function) for record in from_memory] == [None, "count", None],
        "merge_launches": merge_launches,
        "operators_in_merge": in_merge,
        "operators_after": operators.seen[len(in_merge):],
        "host_us": sorted(times)[len(times) // 2] * 1e6,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
