"""Run the kernels' PTX under many schedules, delete their barriers, or count.

``python -m tests.ptx plans --schedules 10000 --arch sm_90 --arch sm_100`` and the like, with whatever Triton is
installed. Cases are numbered; one that failed is seen again with ``--only NUMBER``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # here; kernels are compiled by a process of its own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' own modules

import torch
import triton

from . import barriers, cases, counts

ARCHS = ("sm_80", "sm_90", "sm_100")
DTYPES = ((cases.FLOAT32,), (cases.BFLOAT16,), (cases.FLOAT16,), (cases.FLOAT32, cases.BFLOAT16))
RULES = ("nearest", "similar")


def one_plan(number: int, arch: str) -> cases.Outcome:
    return cases.random_plan(number, arch)


def one_table(number: int, arch: str) -> cases.Outcome:
    return cases.merge_table(number, arch, dtypes=DTYPES[number % len(DTYPES)])


def one_match(number: int, arch: str) -> cases.Outcome:
    names = list(cases.MATCHES)
    return cases.match(number, arch, RULES[number % 2], names[number // 2 % len(names)])


CASES: dict[str, Callable[[int, str], cases.Outcome]] = {"plans": one_plan, "tables": one_table, "match": one_match}
BARRIERS = {
    "merge, dense": ("_merge_kernel", barriers.merge_case), "draw": ("_draw_kernel", barriers.plan_case),
    "merge, strided": ("_merge_kernel", lambda arch: barriers.merge_case(arch, elements=387)),
    "count": ("_count_kernel", barriers.merge_case), "list": ("_list_kernel", barriers.match_case),
    "match, float32": ("_match_kernel", barriers.match_case),
    "match, bfloat16": ("_match_kernel", lambda arch: barriers.match_case(arch, name="bfloat16")),
}  # fmt: skip


def run_cases(options: argparse.Namespace) -> int:
    """Run numbered cases and sum up what was seen; returns how many failed."""
    start, rows, steps, failed = time.process_time(), 0, 0, 0
    seen: Counter[str] = Counter()
    numbers = [options.only] if options.only is not None else range(options.first, options.first + options.schedules)
    for done, number in enumerate(numbers, 1):
        for arch in options.arch:
            outcome = CASES[options.command](number, arch)
            rows, steps, failed = rows + outcome.rows, steps + outcome.steps, failed + (not outcome.is_fine)
            if not outcome.is_fine:
                print(f"{options.command} --only {number} --arch {arch}: {outcome}", flush=True)
            seen.update(f"{finding.kind} {finding.region}" for finding in outcome.findings)
        if done % 500 == 0 or done == len(numbers):
            seconds = time.process_time() - start
            count = done * len(options.arch)
            print(f"{count} schedules, {rows} active rows, {steps} observable steps, {seconds:.0f} s of CPU: ", end="")
            print(f"{failed} failed", dict(seen) or "", flush=True)
    return failed


def show_barriers(options: argparse.Namespace) -> None:
    """Which deletions no schedule notices, and whether one should have: one by one, and all of these at once."""
    for arch in options.arch:
        for name, (kernel, case) in BARRIERS.items():
            if arch == "sm_100" and kernel in ("_list_kernel", "_match_kernel"):
                continue  # the match needs tcgen05 there
            run = case(arch)
            found = barriers.deletions(kernel, run, options.schedules)
            unnoticed = [deletion for deletion in found if not deletion.noticed_by]
            names = ", ".join(f"{each.name} ({each.orders or 'needless'})" for each in unnoticed) or "none"
            print(f"{arch} {name}: {len(found)} barriers, unnoticed: {names}", flush=True)
            if len(unnoticed) > 1:
                program = barriers.touched_by(kernel, run, 1).original
                without = barriers.without_all(program, [deletion.step for deletion in unnoticed])
                print(f"  all of these: {barriers.noticed(kernel, without, run, options.schedules)[0]}")


def show_counts(options: argparse.Namespace) -> None:
    if options.record:
        counts.record()
        return
    for arch in options.arch:
        for name in counts.ARCHS[arch]:
            for kernel, values in counts.count(arch, name).items():
                print(f"{arch} {name}, {kernel}:", ", ".join(f"{value} {what}" for what, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=[*CASES, "barriers", "counts"])
    parser.add_argument(
        "--arch", action="append", choices=ARCHS, help="may be given again; all that can run by default"
    )
    parser.add_argument("--schedules", type=int, default=100, help="how many cases, or tries per barrier")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--record", action="store_true", help=f"write the counts to {counts.RECORD.name}")
    options = parser.parse_args()
    options.arch = options.arch or list(ARCHS[:2] if options.command == "match" else ARCHS)
    torch.set_num_threads(1)
    print(f"triton {triton.__version__}, {', '.join(options.arch)}", flush=True)
    if options.command in CASES:
        sys.exit(run_cases(options) > 0)
    (show_barriers if options.command == "barriers" else show_counts)(options)


if __name__ == "__main__":
    main()
