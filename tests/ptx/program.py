"""A kernel, ready to run: instructions as steps, and where each label leads."""

from __future__ import annotations

import copy

from . import access, copies, matrix  # noqa: F401  (they add their instructions)
from .arithmetic import LANES
from .parse import Instr, UnsupportedError, parse
from .steps import STEPS, Alu, Barrier, Step
from .translate import Translator


class Program:
    """PTX, translated.

    Args:
        text: one kernel.
        shared_bytes: shared memory of a CTA, which the launch decides and not the text.

    Raises:
        UnsupportedError: an instruction is not known, whether or not it would ever be executed.
    """

    def __init__(self, text: str, shared_bytes: int = 0) -> None:
        self.kernel = parse(text)
        self.shared_bytes, self.warps = shared_bytes, self.kernel.threads // LANES
        self.shared = dict.fromkeys(self.kernel.shared, 0)
        self.translator = Translator(self.shared)
        self.steps: list[Step | Alu] = []
        used = {label for i in self.kernel.instrs if i.op == "bra" for (label,) in i.args}
        used |= {label for table in self.kernel.tables.values() for label in table}
        missing = used - self.kernel.labels.keys()
        if missing:
            raise UnsupportedError(f"branches to {missing}")
        targets = {self.kernel.labels[label] for label in used}
        first_of: dict[int, int] = {}  # the step that begins with an instruction
        run: list[Instr] = []
        for number, instr in enumerate([*self.kernel.instrs, None]):
            is_plain = instr is not None and self.translator.assignments(instr) is not None
            if run and (not is_plain or number in targets):
                self.steps.append(Alu(self, run))
                run = []
            if instr is None:
                break
            if not run:
                first_of[number] = len(self.steps)
            if is_plain:
                run.append(instr)
            else:
                self.steps.append(self._step(instr))
        self.places = {label: first_of[self.kernel.labels[label]] for label in used}

    def _step(self, instr: Instr) -> Step:
        parts = instr.form.split(".")
        for form in (".".join(parts[:2]), parts[0]):
            if form in STEPS:
                return STEPS[form](self, instr)
        raise UnsupportedError(str(instr))

    def instrs_of(self, step: int) -> list[Instr]:
        """The instructions of a step."""
        one = self.steps[step]
        return one.instrs if isinstance(one, Alu) else [one.instr]

    def barriers(self) -> list[int]:
        """The steps that are barriers of the CTA."""
        return [number for number, step in enumerate(self.steps) if isinstance(step, Barrier)]

    def without(self, step: int) -> Program:
        """The program with one instruction deleted, to see it missed."""
        other = copy.copy(self)
        other.steps = list(self.steps)
        other.steps[step] = _Deleted(self, self.steps[step].instr)
        return other


class _Deleted(Step):
    def run(self, machine: object, w: object) -> bool:
        w.pc += 1
        return False
