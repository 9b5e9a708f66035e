"""What others can observe, or what decides where a warp goes on: here branches and barriers.

Each class is an instruction, made once when the kernel is loaded. ``run(machine, warp)`` does it and says whether
another warp could tell, which is where the scheduler may go on with another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import LANES
from .parse import NUMPY, Address, Imm, Instr, Name, UnsupportedError

if TYPE_CHECKING:
    from .machine import Machine, Warp
    from .program import Program

EVERY_LANE = np.ones(LANES, bool)
NOBODY = np.zeros(LANES, bool)
STEPS: dict[str, type[Step]] = {}  # by the first parts of an instruction's form


def step_for(*forms: str) -> Callable[[type], type]:
    """Registers a class for the instructions that begin so."""

    def register(cls: type) -> type:
        STEPS.update(dict.fromkeys(forms, cls))
        return cls

    return register


class Step:
    """An instruction."""

    def __init__(self, program: Program, instr: Instr) -> None:
        self.program, self.instr = program, instr
        self.mods = instr.mods
        self.guard: Callable[[Warp], np.ndarray] | None = None
        if instr.guard is not None:
            index = instr.guard.index
            self.guard = (lambda w: ~w.p[index]) if instr.negated else (lambda w: w.p[index])

    def fail(self, why: str = "") -> UnsupportedError:
        return UnsupportedError(f"{self.instr} {why}")

    def getter(self, operand: Any, kind: str) -> Callable[[Warp], np.ndarray]:
        """Reads an operand."""
        return self.program.translator.getter(operand, kind)

    def address(self, operand: Address, kind: str) -> Callable[[Warp], np.ndarray]:
        """Computes an address."""
        if isinstance(operand.base, Name):
            return self.getter(Imm(self.program.shared[operand.base.text] + operand.offset), kind)
        base = self.getter(operand.base, kind)
        offset = np.array([operand.offset], "i8").view("u8").astype(NUMPY[kind])[0]
        return (lambda w: base(w) + offset) if operand.offset else base

    def whole_warp(self, w: Warp) -> None:
        """Raises unless all lanes take part."""
        if self.guard is not None or not w.full:
            raise RuntimeError(f"{self.instr}: not by all lanes")

    def run(self, machine: Machine, w: Warp) -> bool:
        raise NotImplementedError


class Alu:
    """A run of instructions that nobody else can observe; compiled when it is first run."""

    def __init__(self, program: Program, instrs: list[Instr]) -> None:
        self.program, self.instrs, self.instr = program, instrs, instrs[0]
        self.whole: Callable[..., None] | None = None
        self.masked: Callable[..., None] | None = None

    def run(self, machine: Machine, w: Warp) -> bool:
        if w.full:
            if self.whole is None:
                self.whole = self.program.translator.function(self.instrs, masked=False)
            self.whole(w, w.p, w.h, w.r, w.d, None)
        else:
            if self.masked is None:
                self.masked = self.program.translator.function(self.instrs, masked=True)
            self.masked(w, w.p, w.h, w.r, w.d, w.mask)
        w.pc += 1
        return False


# ----------------------------------------------------------------------------------------------------------- branches


@step_for("bra", "brx")
class Branch(Step):
    """``bra`` and ``brx.idx``."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        if instr.form == "brx.idx" and instr.guard is None:
            self.index = self.getter(instr.args[0], "u32")
            self.table = program.kernel.tables[instr.args[1].text]
        elif instr.form in ("bra", "bra.uni"):
            self.index, self.table = None, [instr.args[0].text]
        else:
            raise self.fail()

    def run(self, machine: Machine, w: Warp) -> bool:
        places = self.program.places
        if self.index is not None:
            index = self.index(w)[w.mask]
            if (index != index[0]).any():
                raise self.fail("diverges")
            w.pc = places[self.table[index[0]]]
            return False
        lanes = w.lanes(self.guard)
        if lanes is None or (not w.full and lanes.tobytes() == w.mask.tobytes()):
            w.pc = places[self.table[0]]
        elif lanes is NOBODY:
            w.pc += 1
        else:
            w.leave(places[self.table[0]], lanes)
            w.pc += 1
        return False


@step_for("ret")
class Return(Step):
    """The end, for the lanes that come here."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        if instr.guard is not None or instr.form != "ret":
            raise self.fail()

    def run(self, machine: Machine, w: Warp) -> bool:
        w.exit()
        return w.done


# ----------------------------------------------------------------------------------------------------------- barriers


@step_for("bar.sync")
class Barrier(Step):
    """``bar.sync``, of all threads of the CTA or of as many warps as it says."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        if len(self.mods) != 1 or not all(isinstance(arg, Imm) for arg in instr.args):
            raise self.fail()
        self.barrier = instr.args[0].value
        self.warps = instr.args[1].value // LANES if len(instr.args) > 1 else program.warps

    def run(self, machine: Machine, w: Warp) -> bool:
        self.whole_warp(w)
        w.pc += 1
        w.waits_at = self
        return True


@step_for("bar.warp")
class WarpBarrier(Step):
    """``bar.warp.sync``, which orders the memory accesses of a warp's lanes."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        if instr.form != "bar.warp.sync" or instr.args not in ((Imm(-1),), (Imm(2**32 - 1),)):
            raise self.fail()

    def run(self, machine: Machine, w: Warp) -> bool:
        self.whole_warp(w)
        machine.meet([w])
        w.pc += 1
        return True


@step_for("fence.proxy")
class ProxyFence(Step):
    """Orders ordinary stores to shared memory before wgmma's reads; here they are in order anyway."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        if instr.form != "fence.proxy.async.shared::cta":
            raise self.fail()

    def run(self, machine: Machine, w: Warp) -> bool:
        w.pc += 1
        return False
