"""Which of a kernel's barriers are needed: each deleted from the PTX in turn, and whether any schedule notices."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import cases
from .between import Touched
from .cases import Outcome
from .machine import Schedule
from .program import Program
from .project import KERNELS

Run = Callable[[int, Callable[..., Any] | None], Outcome]  # a case by its number, with a mutation


@dataclass(frozen=True)
class Deletion:
    """A barrier that was deleted.

    Attributes:
        step: of the program.
        name: the function that it comes from, and which of its barriers it is, as they stand in the PTX.
        noticed_by: what was reported first, or None.
        runs: schedules that were tried.
        orders: two accesses that no other barrier orders and that must be, or None: see :mod:`.between`.
    """

    step: int
    name: str
    noticed_by: str | None
    runs: int
    orders: str | None


@cache
def _functions(file: str) -> dict[int, str]:
    """The function that each line of a kernel's file belongs to."""
    path = Path(KERNELS) / file
    if not path.exists():  # Triton's own
        return {}
    tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {line: top.name for top in tops for line in range(top.lineno, top.end_lineno + 1)}


def names(program: Program) -> dict[int, str]:
    """The barriers of a program, by step."""
    seen: Counter[str] = Counter()
    found = {}
    for step in program.barriers():
        file, line = program.steps[step].instr.place
        function = _functions(file).get(line, file)
        seen[function] += 1
        found[step] = f"{function} {seen[function]}"
    return found


def deletions(kernel: str, run: Run, schedules: int) -> list[Deletion]:
    """Delete every barrier of a kernel in turn, and run cases until one notices.

    Raises:
        AssertionError: the kernel as it is does not pass, so nothing could be said.
    """
    touched = touched_by(kernel, run, schedules)
    found = []
    for step, name in names(touched.original).items():
        noticed_by, runs = noticed(kernel, touched.original.without(step), run, schedules)
        found.append(Deletion(step, name, noticed_by, runs, touched.only_by(step)))
    return found


def touched_by(kernel: str, run: Run, schedules: int) -> Touched:
    """What the program that the cases use touches; it must be one, and pass as it is."""
    programs: dict[Program, Touched] = {}

    def watch(name: str, program: Program, _compiled: Any) -> Program:
        if name != kernel:
            return program
        if program not in programs:
            programs[program] = Touched(program)
        return programs[program].program

    for number in range(schedules):
        outcome = run(number, watch)
        assert outcome.is_fine, f"as it is, number {number}: {outcome}"
    (touched,) = programs.values()
    return touched


def noticed(kernel: str, changed: Program, run: Run, schedules: int) -> tuple[str | None, int]:
    """What the cases say about a changed program, and how many it took."""

    def mutate(name: str, other: Program, _compiled: Any) -> Program:
        return changed if name == kernel else other

    for number in range(schedules):
        outcome = run(number, mutate)
        if not outcome.is_fine:
            first = [f"{finding.kind} {finding.region}" for finding in outcome.findings]
            return outcome.wrong or first[0], number + 1
    return None, schedules


def without_all(program: Program, steps: Iterable[int]) -> Program:
    """A program without several of its instructions."""
    for step in steps:
        program = program.without(step)
    return program


TABLES = ("cycle", "star", "two cycles with tails", "anyhow")
SHAPE = {"BLOCK": 256, "SPAN": 2}  # of the merge: two warps, and rows of more than a span
CAPACITIES = (10_000, 0, 40)  # units of scratch: all that there is, none, little


def merge_case(arch: str, **settings: Any) -> Run:
    """Merges with tables of partners; every second one with more rows than programs, so that programs take several."""

    def run(number: int, mutate: Callable[..., Any] | None) -> Outcome:
        schedule = Schedule(number, cases.WAYS[number % 3], None, [None, cases.WEAK[1]][number // 2 % 2])
        return cases.merge_table(
            number, arch, table=TABLES[number % 4], capacity=CAPACITIES[number % 3], schedule=schedule, mutate=mutate,
            repeats=1, **SHAPE | {"elements": 640, "programs": (8, 3)[number % 2]} | settings,
        )  # fmt: skip

    return run


def plan_case(arch: str) -> Run:
    """Calls that draw, some of them ahead."""

    def run(number: int, mutate: Callable[..., Any] | None) -> Outcome:
        return cases.random_plan(number, arch, "float32", from_memory=False, mutate=mutate)

    return run


def match_case(arch: str, rule: str = "similar", name: str = "float32") -> Run:
    """Calls with a partner rule."""

    def run(number: int, mutate: Callable[..., Any] | None) -> Outcome:
        return cases.match(number, arch, rule, name, mutate=mutate)

    return run
