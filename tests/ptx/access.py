"""Loads, stores and atomics, in global and shared memory. Importing this module adds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import LANE
from .clocks import BOTH, FIRST, OTHERS
from .memory import EVERY_BIT, Access, AccessError, Index, touch
from .ordering import is_written
from .parse import NUMPY, SINK, Instr
from .steps import NOBODY, Step, step_for
from .translate import size_of

if TYPE_CHECKING:
    from .machine import Machine, Warp
    from .program import Program

VECTORS = {"v2": 2, "v4": 4, "v8": 8}


class MemoryStep(Step):
    """Loads and stores of each lane's ``count`` elements: what they have in common."""

    is_shared, loads = False, False
    scopes: tuple[str, ...] = ()

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        _, *mods, kind = self.mods
        self.size, self.dtype = size_of(kind), NUMPY[kind]
        self.count, self.order = 1, None
        for mod in mods:
            if mod in VECTORS:
                self.count = VECTORS[mod]
            elif mod in ("relaxed", "acquire") and self.loads and not self.is_shared:
                self.order = mod
            elif mod not in ("gpu", "sys") or self.is_shared:
                raise self.fail(f"modifier {mod}")
        registers, place = instr.args if self.loads else instr.args[::-1]
        self.registers = registers if isinstance(registers, list) else [registers]
        if len(self.registers) != self.count:
            raise self.fail()
        self.at = self.address(place, "u32" if self.is_shared else "u64")
        self.values = [] if self.loads else [self.getter(reg, kind) for reg in self.registers]

    def run(self, machine: Machine, w: Warp) -> bool:
        lanes = w.lanes(self.guard)
        if lanes is NOBODY:
            w.pc += 1
            return False
        addresses = self.at(w)
        if lanes is not None:
            addresses = addresses[lanes]
        if machine.profile:
            machine.profile.access(w, addresses, self.size * self.count, self.is_shared)
        (self.load if self.loads else self.store)(machine, w, addresses, lanes)
        w.pc += 1
        return True

    def load(self, machine: Machine, w: Warp, addresses: np.ndarray, lanes: np.ndarray | None) -> None:
        """Set the registers of the lanes that take part."""
        raise NotImplementedError

    def store(self, machine: Machine, w: Warp, addresses: np.ndarray, lanes: np.ndarray | None) -> None:
        """Store the registers of the lanes that take part."""
        raise NotImplementedError

    def set_registers(self, w: Warp, values: np.ndarray, lanes: np.ndarray | None) -> None:
        """Values of shape (lanes or 1, count)."""
        for k, register in enumerate(self.registers):
            w.write(register, values[:, k].copy().view(self.dtype), lanes)

    def stored(self, w: Warp, lanes: np.ndarray | None) -> np.ndarray:
        """What the lanes that take part store, of shape (lanes, count)."""
        columns = [value(w).view(f"u{self.size}") for value in self.values]
        values = columns[0][:, None] if self.count == 1 else np.stack(columns, 1)
        return values if lanes is None else values[lanes]


@step_for("ld.global", "st.global")
class Global(MemoryStep):
    """``ld.global`` and ``st.global``."""

    def __init__(self, program: Program, instr: Instr) -> None:
        self.loads = instr.op == "ld"
        super().__init__(program, instr)

    def load(self, machine: Machine, w: Warp, addresses: np.ndarray, lanes: np.ndarray | None) -> None:
        whole = None
        for access, which in machine.memory.touch(addresses, self.size, self.count, self.instr):
            values = self._load(machine, w, access, who_of(w.who(lanes), which)).reshape(-1, self.count)
            if isinstance(which, slice):
                self.set_registers(w, values, lanes)
                return
            whole = np.empty((addresses.size, self.count), values.dtype) if whole is None else whole
            whole[which] = values
        self.set_registers(w, whole, lanes)

    def _load(self, machine: Machine, w: Warp, access: Access, who: int) -> np.ndarray:
        memory = machine.ordering
        if self.order is None:
            if machine.clocks:
                machine.clocks.plain(w.number, who, access, w.pc, False)
            values, written = memory.load(w, access)
        else:
            memory.begin_ordered(w, access)
            if machine.clocks:
                for row in range(access.lanes):
                    lane = FIRST if who != OTHERS and row == 0 else OTHERS
                    machine.clocks.atomic(w.number, lane, access.part(np.array([row])), w.pc, self.order, False)
            now = access.region.now
            values, written = access.region.load(now, access), now.written and now.written[self.size][access.index]
            memory.end_ordered(w, access)
            if self.order == "acquire":
                memory.acquire(w)
        if not is_written(written, self.size):
            place = access.place(int(np.flatnonzero(written != EVERY_BIT[self.size])[0]))
            raise AccessError(f"{self.instr}: {access.region.name_of(place)} is read and was never written")
        return values

    def store(self, machine: Machine, w: Warp, addresses: np.ndarray, lanes: np.ndarray | None) -> None:
        values, numbers = self.stored(w, lanes), LANE if lanes is None else LANE[lanes]
        for access, which in machine.memory.touch(addresses, self.size, self.count, self.instr):
            if machine.clocks:
                machine.clocks.plain(w.number, who_of(w.who(lanes), which), access, w.pc, True)
            own = values[which]
            if access.lanes < len(own):
                if (own != own[0]).any():
                    raise AccessError(f"{self.instr}: lanes store different values to one place")
                own = own[:1]
            machine.ordering.store(w, access, own.ravel(), numbers[which][: len(own)])


@step_for("ld.shared", "st.shared", "st.shared::cta", "ld.shared::cta")
class Shared(MemoryStep):
    """``ld.shared`` and ``st.shared``."""

    is_shared = True

    def __init__(self, program: Program, instr: Instr) -> None:
        self.loads = instr.op == "ld"
        super().__init__(program, instr)

    def load(self, machine: Machine, w: Warp, addresses: np.ndarray, lanes: np.ndarray | None) -> None:
        access = shared_access(machine, w, addresses, self.size, self.count, self.instr)
        values = read_shared(machine, w, access, w.who(lanes), self.instr)
        self.set_registers(w, values.reshape(-1, self.count), lanes)

    def store(self, machine: Machine, w: Warp, addresses: np.ndarray, lanes: np.ndarray | None) -> None:
        access = shared_access(machine, w, addresses, self.size, self.count, self.instr)
        values = self.stored(w, lanes)
        if access.lanes < len(values):
            # Any lane may win. They hold copies of one number, which differ in the last bit where the compiler fuses a
            # multiplication with the first addition of a sum over lanes: each has another lane's product rounded.
            winner = machine.rng.randrange(len(values))
            values = values[winner : winner + 1]
        write_shared(machine, w, access, values.ravel(), w.who(lanes), self.instr)


def who_of(who: int, which: Index) -> int:
    """Whether a part of the lanes that make an access includes the first one."""
    if isinstance(which, slice) or who == OTHERS:
        return who
    return OTHERS if which[0] else FIRST if len(which) == 1 else BOTH


def shared_access(machine: Machine, w: Warp, addresses: np.ndarray, size: int, count: int, instr: Instr) -> Access:
    """The access of lanes to shared memory."""
    try:
        access = touch(w.cta.shared, addresses, size, count)
    except AccessError as error:
        raise AccessError(f"{instr}: shared memory, {error}") from None
    if access is None:
        at = addresses.tolist()[:4]
        raise AccessError(
            f"{instr}: out of bounds, {size * count} bytes at {at} of {w.cta.shared.end} of shared memory"
        )
    return access


def read_shared(
    machine: Machine, w: Warp, access: Access, who: int, instr: Instr, step: int | None = None
) -> np.ndarray:
    """Values in shared memory; ``step`` is the instruction's own if the warp is elsewhere by now."""
    w.cta.pending.check_read(machine, w, access, instr)
    if machine.clocks:
        machine.clocks.plain(w.number, who, access, w.pc if step is None else step, False, is_shared=True)
    now = access.region.now
    if not is_written(now.written[access.size][access.index], access.size):
        raise AccessError(f"{instr}: shared memory is read and was never written")
    return now.value[access.size][access.index]


def write_shared(
    machine: Machine, w: Warp, access: Access, values: np.ndarray, who: int, instr: Instr, step: int | None = None
) -> None:
    """Change shared memory."""
    w.cta.pending.check_write(machine, w, access, instr)
    if machine.clocks:

        def changes_nothing() -> bool:
            now = access.region.now
            is_same = np.array_equal(now.value[access.size][access.index], values)
            return is_same and is_written(now.written[access.size][access.index], access.size)

        at = w.pc if step is None else step
        machine.clocks.plain(w.number, who, access, at, True, is_shared=True, changes_nothing=changes_nothing)
    access.region.store(access, values)


# ------------------------------------------------------------------------------------------------------------ atomics

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda old, x: old + x, "max": max, "min": min, "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "exch": lambda _, x: x,
}  # fmt: skip


@step_for("atom.global", "red.global")
class Atomic(Step):
    """``atom.global`` and ``red.global`` on integers."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        _, scope, self.order, name, kind = self.mods
        known = scope in ("gpu", "sys") and self.order in ("relaxed", "acquire", "release", "acq_rel")
        if not known or name not in OPERATIONS or kind[0] == "f":
            raise self.fail()
        self.operation, self.size, self.dtype = OPERATIONS[name], size_of(kind), NUMPY[kind]
        self.result = instr.args[0] if instr.op == "atom" else SINK
        place, source = instr.args[instr.op == "atom" :]
        self.at, self.source = self.address(place, "u64"), self.getter(source, kind)

    def run(self, machine: Machine, w: Warp) -> bool:
        lanes = w.lanes(self.guard)
        if lanes is NOBODY:
            w.pc += 1
            return False
        numbers = LANE if lanes is None else LANE[lanes]
        addresses, operands = self.at(w)[numbers], self.source(w)[numbers]
        if machine.profile:
            machine.profile.access(w, addresses, self.size, False)
        if self.order in ("release", "acq_rel"):
            machine.ordering.release(w, numbers)
        results = np.empty(numbers.size, self.dtype)
        for k in machine.rng.sample(range(numbers.size), numbers.size):
            results[k] = self._one(machine, w, addresses[k : k + 1], int(operands[k]), OTHERS if numbers[k] else FIRST)
        if self.order in ("acquire", "acq_rel"):
            machine.ordering.acquire(w)
        w.write(self.result, results, lanes)
        w.pc += 1
        return True

    def _one(self, machine: Machine, w: Warp, address: np.ndarray, operand: int, who: int) -> np.integer:
        ((access, _),) = machine.memory.touch(address, self.size, 1, self.instr)
        region = access.region
        machine.ordering.begin_ordered(w, access)
        if machine.clocks:
            machine.clocks.atomic(w.number, who, access, w.pc, self.order, True)
        now = region.now
        if not is_written(now.written and now.written[self.size][access.index], self.size):
            raise AccessError(f"{self.instr}: {region.name_of(access.place(0))} was never written")
        (old,) = region.load(now, access).view(self.dtype)
        new = self.operation(int(old), operand) & int(EVERY_BIT[self.size])
        machine.ordering.change(access, np.array([new], f"u{self.size}"))
        machine.ordering.end_ordered(w, access)
        return old
