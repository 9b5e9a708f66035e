"""Compiles the kernels for GPUs that are not there and prints, as JSON, what the compilers made of them.

Run it as a script, in a process of its own: interpreted and compiled kernels cannot share one. With ``--record`` it
also writes the numbers of registers to ``aot_registers.json``, for the installed version of Triton.

What is compiled comes from real launches: the launcher runs on CPU tensors while Triton believes that the GPU in
question is there, and its launches are caught before anything is compiled. So types, alignments, constants and options
are those that a user's GPU would get.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from assembly import (
    access,
    arithmetic,
    attributed,
    copy_to_shared,
    matrix_product,
    parameter_bits,
    unguarded_releases,
)

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("aot_registers.json")
SHORT, ELEMENTS, LONG = 128, 1024, 4608  # of a filter: a warp for each, two, four (merge_shape)
DTYPES = ["float32", "bfloat16", "float16"]
ARCHS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Dtypes of the merge kernel's layers, whether some layers have strided filters, and the filters' length.
MERGES = {
    "merge float32": (DTYPES[:1], False, ELEMENTS),
    "merge bfloat16": (DTYPES[1:2], False, ELEMENTS),
    "merge float16": (DTYPES[2:], False, ELEMENTS),
    "merge all": (DTYPES, False, ELEMENTS),
    "merge float32 strided": (DTYPES[:1], True, ELEMENTS),
    "merge all strided": (DTYPES, True, ELEMENTS),
    "merge bfloat16 strided": (DTYPES[1:2], True, ELEMENTS),
    "merge short float32": (DTYPES[:1], False, SHORT),
    "merge short bfloat16": (DTYPES[1:2], False, SHORT),
    "merge short float32 strided": (DTYPES[:1], True, SHORT),
    "merge short all strided": (DTYPES, True, SHORT),
    "merge long float32": (DTYPES[:1], False, LONG),
    "merge long bfloat16": (DTYPES[1:2], False, LONG),
    "merge long float32 strided": (DTYPES[:1], True, LONG),
    "merge long all": (DTYPES, False, LONG),
    "merge long all strided": (DTYPES, True, LONG),
}
FROM_MEMORY = ["draw from memory", "merge all from memory", "merge all strided from memory"]
# Dtype and layout of the match kernel's layers, and the partner rule: it is compiled for each kind apart.
MATCHES = {
    "nearest float32": ("float32", False, "nearest"),
    "similar float32": ("float32", False, "similar"),
    "similar bfloat16": ("bfloat16", False, "similar"),
    "similar float32 strided": ("float32", True, "similar"),
    "similar bfloat16 strided": ("bfloat16", True, "similar"),
}
LISTS = {"list": (DTYPES[:1], False), "list all strided": (DTYPES, True)}
# The layers of the three kernels of forward-only merging, as of the merge kernel.
FORWARD_PARTS = ["save", "blend", "restore"]
FORWARDS = {
    f"{part} {name}": MERGES[f"merge {name}"]
    for name in ("short float32", "all strided", "long bfloat16")
    for part in FORWARD_PARTS
}
VARIANTS = [
    "draw",
    "draw only",
    "prepare",
    *FROM_MEMORY,
    *LISTS,
    "count",
    "count matched",
    *MERGES,
    *MATCHES,
    *FORWARDS,
]


class AbsentGpu:
    """Stands in for Triton's driver."""

    target: Any = None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps its kernels by device

    def get_current_stream(self, _device: str) -> int:
        return 0


class Launches:
    """Catches the launches of Triton kernels: what would be compiled, as Triton's hook for caches tells it."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.gpu = AbsentGpu()
        self.caught: list[tuple[Any, dict[str, Any]]] = []
        driver.set_active(self.gpu)
        knobs.runtime.jit_cache_hook = self._catch
        real_run = JITFunction.run

        def run(*args: Any, **kwargs: Any) -> mock.Mock:
            real_run(*args, **kwargs)
            return mock.Mock()  # the launcher goes on as if it had a compiled kernel

        JITFunction.run = run

    def _catch(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        self.caught.append((fn.jit_function, compile))
        return True  # nothing is left to do: Triton neither compiles nor launches

    @contextlib.contextmanager
    def on(self, arch: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
        import torch
        from triton.backends.compiler import GPUTarget

        is_hip = arch.startswith("gfx")
        self.gpu.target = GPUTarget("hip", arch, 64) if is_hip else GPUTarget("cuda", int(arch[3:]), 32)
        self.caught = []
        with mock.patch.object(torch.version, "hip", "6.4" if is_hip else None):
            yield self.caught


def launcher_of(dtypes: list[str], strided: bool, elements: int = ELEMENTS, filters: int = 16) -> Any:
    import torch

    from inmerge_fast import MergePlan
    from inmerge_fast.paths.triton.launch import Launcher

    # A row that is not a multiple of 16 bytes takes the same way as strided filters.
    sizes = [elements, elements - 1] if strided else [elements]
    weights = [torch.zeros(filters, size, dtype=getattr(torch, dtype)) for dtype in dtypes for size in sizes]
    plan = MergePlan(weights)
    return Launcher(plan.layers, plan.weights(), plan.rows.start)


def merge_for_now(launcher: Any, seed: int = 3, step: int = 5, prob: float = 0.5, alpha: float = 0.5) -> None:
    from inmerge_fast.paths.path import Call
    from inmerge_fast.paths.triton.for_now import Keeper

    keeper = Keeper(launcher)
    keeper.merge(Call(seed, step, prob, alpha, 0.1))
    keeper.restore()


def specialisations(launches: Launches) -> dict[str, list[str]]:
    """For each kernel, the different versions that launches of one plan ask for; there should be one.

    A launcher may keep the kernel that its first launch compiled, so all launches must mean the same one.
    """
    from inmerge_fast.paths.triton.slots import SLOTS  # imports Triton

    found: dict[str, list[str]] = {}

    def note(caught: list[tuple[Any, dict[str, Any]]], **names: str) -> None:
        """The versions of the kernels in ``names``, under these; of all, under their own, if there are none."""
        for kernel, compiled in caught:
            own = kernel.fn.__name__
            if names and own not in names:
                continue
            version = str([compiled["signature"], compiled["constants"], compiled["configs"]])
            versions = found.setdefault(names.get(own, own), [])
            if version not in versions:
                versions.append(version)

    cases = [
        {"seed": 0, "step": 0, "prob": 0.3, "alpha": 0.7, "threshold": 0.5, "dry_run": False},
        {"seed": 1, "step": 1, "prob": 1.0, "alpha": 1.0, "threshold": -1.0, "dry_run": False},
        {"seed": 16, "step": 16, "prob": 0.0, "alpha": 0.0, "threshold": 0.0, "dry_run": True},
        {"seed": 2**31, "step": 2**31, "prob": 0.5, "alpha": 0.5, "threshold": 1.0, "dry_run": True},
        {"seed": 2**64 - 1, "step": 2**63 - 1, "prob": 2**-24, "alpha": 0.3, "threshold": 0.1, "dry_run": False},
    ]
    for filters in (7, 16):  # 7: result slots that are not multiples of 16 bytes, unless padded
        for slot in range(SLOTS):
            for case in cases:
                with launches.on("sm_90") as caught:
                    launcher = launcher_of(["float32"], False, filters=filters)
                    launcher.calls = slot - 1
                    launcher.run(**case)
                note(caught)
                with launches.on("sm_90") as caught:  # as after the capture of a graph
                    launcher = launcher_of(["float32"], False, filters=filters)
                    launcher.calls, launcher._has_captured = slot - 1, True
                    launcher.run(**case)
                note(
                    caught, _draw_kernel="_draw_kernel only", _count_kernel="_count_kernel",
                    _merge_kernel="_merge_kernel",
                )  # fmt: skip
                if case["seed"] not in (1, 2**64 - 1):
                    continue  # a rule's own kernels see seed, step and threshold, and the slot
                with launches.on("sm_90") as caught:
                    launcher = launcher_of(["float32"], False, filters=filters)
                    launcher.calls = slot - 1
                    launcher.run(**case, partner="similar")
                note(caught, _list_kernel="_list_kernel", _match_kernel="_match_kernel")
    return found


def numbers(text: str, **patterns: str) -> dict[str, int]:
    return {name: int(re.search(pattern, text)[1]) for name, pattern in patterns.items()}


def compile_kernel(launches: Launches, kernel: Any, launch: dict[str, Any]) -> dict[str, Any]:
    """Compile what a launch asked for, and describe the result."""
    import triton
    from triton.compiler import ASTSource

    target = launches.gpu.target
    options = json.loads(launch["specialization_data"])["options"]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    source = ASTSource(kernel, launch["signature"], launch["constants"], launch["configs"][0])
    with contextlib.redirect_stdout(io.StringIO()) as log:  # ptxas's own words, see main
        compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        asm = compiled.asm["ptx"]
        resources = numbers(
            log.getvalue(), registers=r"Used (\d+) registers", stack=r"(\d+) bytes stack frame",
            spill_stores=r"(\d+) bytes spill stores", spill_loads=r"(\d+) bytes spill loads",
        )  # fmt: skip
    else:
        asm = compiled.asm["amdgcn"]
        resources = numbers(
            asm, registers=r"\.vgpr_count:\s+(\d+)", stack=r"\.private_segment_fixed_size:\s+(\d+)",
            spills=r"\.vgpr_spill_count:\s+(\d+)", scalar_spills=r"\.sgpr_spill_count:\s+(\d+)",
        )  # fmt: skip
    accesses: dict[str, Counter[str]] = {}
    maths: dict[str, Counter[str]] = {}
    for function, line in attributed(asm, Path(inspect.getsourcefile(kernel.fn)).parent):
        if found := access(line):
            accesses.setdefault(function, Counter())[f"{found[0]} {found[1]}"] += 1
        if found := arithmetic(line):
            maths.setdefault(function, Counter())[found[0]] += found[1]
    releases, unguarded = unguarded_releases(asm)
    return resources | {
        "warnings": re.findall(r"\(C\d+\) .*", log.getvalue()),
        "options": {name: options.get(name) for name in ("enable_fp_fusion", "maxnreg", "num_warps")},
        "constants": {
            name: launch["constants"].get((index,))
            for index, name in enumerate(kernel.arg_names)
            if name in ("BLOCK", "SPAN")
        },
        "threads": options["num_warps"] * target.warp_size,
        "accesses": accesses,
        "arithmetic": maths,
        "copies": Counter(filter(None, map(copy_to_shared, asm.splitlines()))),
        "matrix_products": Counter(filter(None, map(matrix_product, asm.splitlines()))),
        "releases": releases,
        "unguarded_releases": unguarded,
        "parameter_bits": parameter_bits(asm, launch["signature"]),
    }


def compile_all(launches: Launches, arch: str) -> dict[str, Any]:
    call = {"step": 5, "prob": 0.3, "alpha": 0.7, "threshold": 0.1, "dry_run": False}
    result = {}
    for name, (dtypes, strided, elements) in MERGES.items():
        with launches.on(arch) as caught:
            launcher = launcher_of(dtypes, strided, elements)
            launcher.run(seed=3, **call)
            launcher.prepare(3, 5, prob=0.3, alpha=0.7, threshold=0.1, write=True)
            launcher.run_from_memory()
        for kernel, launch in caught:
            kind = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            variant = name if kind == "merge" else kind
            if kind in ("draw", "merge") and launch["constants"].get((kernel.arg_names.index("IN_MEMORY"),)):
                variant += " from memory"
            if variant not in result and variant in VARIANTS:
                result[variant] = compile_kernel(launches, kernel, launch)
    for name, (dtypes, strided) in LISTS.items():
        with launches.on(arch) as caught:
            launcher_of(dtypes, strided).run(seed=3, partner="similar", **call)
        for kernel, launch in caught:
            kind = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            variant = {"list": name, "draw": "draw only", "count": "count matched"}.get(kind)
            if variant and variant not in result:
                result[variant] = compile_kernel(launches, kernel, launch)
    for name, layers in FORWARDS.items():
        if name not in result:
            with launches.on(arch) as caught:
                merge_for_now(launcher_of(*layers))
            for kernel, launch in caught:
                kind = kernel.fn.__name__.strip("_").removesuffix("_kernel")
                if kind in FORWARD_PARTS:
                    result[kind + name[name.index(" ") :]] = compile_kernel(launches, kernel, launch)
    for name, (dtype, strided, rule) in MATCHES.items():
        with launches.on(arch) as caught:
            launcher_of([dtype], strided).run(seed=3, partner=rule, **call)
        # Of a strided plan's two, the second.
        kernel, launch = [one for one in caught if one[0].fn.__name__ == "_match_kernel"][-1]
        result[name] = compile_kernel(launches, kernel, launch)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write the numbers of registers to {RECORD.name}")
    parser.add_argument("--arch", choices=ARCHS, action="append", help="only this one; may be given again")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing compiled earlier may be used
        os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
        sys.path.insert(0, str(ROOT))
        import triton

        launches = Launches()
        compiled = {arch: compile_all(launches, arch) for arch in arguments.arch or ARCHS}
        report = {
            "triton": triton.__version__,
            "compiled": compiled,
            "specialisations": specialisations(launches),
        }
    if arguments.record:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        registers = {
            arch: {variant: kernel["registers"] for variant, kernel in kernels.items()}
            for arch, kernels in compiled.items()
        }
        record[triton.__version__] = record.get(triton.__version__, {}) | registers
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
