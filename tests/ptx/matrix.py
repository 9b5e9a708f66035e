"""Matrix units: ``ldmatrix``, ``stmatrix``, ``mma.sync`` and ``wgmma``. Importing this module adds them.

Products are exact and summed in float64, then cut to float32 towards zero. Real tensor cores cut every addend, which
nobody has specified, so sums are a little more exact here. A ``wgmma`` reads its operands, registers and shared memory,
when it is waited for, the latest moment that is allowed; shared memory that is written before is reported by itself.
Not modelled: proxies and their fences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .access import read_shared, shared_access, write_shared
from .arithmetic import LANE
from .clocks import OTHERS
from .memory import Access
from .parse import Imm, Instr, Reg
from .steps import Step, step_for

if TYPE_CHECKING:
    from .machine import Machine, Warp
    from .program import Program

GROUP, PLACE = LANE // 4, LANE % 4


def toward_zero(x: np.ndarray) -> np.ndarray:
    """float64 to float32, cut."""
    y = x.astype("f4")
    return np.where(np.abs(y.astype("f8")) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def decode(words: np.ndarray, kind: str) -> np.ndarray:
    """32-bit words as float64: one tf32 number each, or two of 16 bits, in an axis of their own."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view("f4").astype("f8")[..., None]
    halves = np.ascontiguousarray(words)[..., None].view("u2")
    if kind == "bf16":
        return (halves.astype("u4") << np.uint32(16)).view("f4").astype("f8")
    return halves.view("f2").astype("f8")


@cache
def _operand_places(words: int, rows: int, per_word: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each number in the registers that hold a matrix of ``rows`` (16 or 8) by 32 bytes."""
    k = np.arange(words)[:, None, None]
    row, half = (GROUP[:, None] + 8 * (k % 2), k // 2) if rows == 16 else (GROUP[:, None] + 0 * k, k)
    column = (PLACE[:, None] + 4 * half) * per_word + np.arange(per_word)
    return np.broadcast_to(row, column.shape), column


def operand(words: list[np.ndarray], kind: str, rows: int) -> np.ndarray:
    """A matrix of ``rows`` by 32 bytes from the registers of a warp, as float64."""
    numbers = decode(np.stack(words), kind)
    matrix = np.empty((rows, 8 * numbers.shape[-1]))
    matrix[_operand_places(len(words), rows, numbers.shape[-1])] = numbers
    return matrix


@cache
def _sum_places(words: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each register that holds a 16 x N matrix of sums."""
    k = np.arange(words)[:, None]
    return GROUP + 8 * (k % 4 // 2), 8 * (k // 4) + 2 * PLACE + k % 2


def sums(words: list[np.ndarray]) -> np.ndarray:
    """A 16 x N matrix of float32 from the registers of a warp."""
    matrix = np.empty((16, 2 * len(words)))
    matrix[_sum_places(len(words))] = np.stack(words).view("f4")
    return matrix


def set_sums(w: Warp, registers: list[Reg], matrix: np.ndarray) -> None:
    """A 16 x N matrix of float32 to the registers of a warp."""
    values = matrix[_sum_places(len(registers))].astype("f4").view("u4")
    for register, value in zip(registers, values, strict=True):
        w.write(register, value.copy(), None)


@step_for("ldmatrix", "stmatrix")
class Matrices(Step):
    """``ldmatrix`` and ``stmatrix``: 8 x 8 matrices of 16-bit elements, whose rows the lanes point at."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        registers, place = instr.args if instr.op == "ldmatrix" else instr.args[::-1]
        self.transposed = "trans" in self.mods and instr.op == "ldmatrix"
        expected = ["sync", "aligned", "m8n8", f"x{len(registers)}", *["trans"] * self.transposed, "shared", "b16"]
        if self.mods != expected:
            raise self.fail()
        self.at, self.registers = self.address(place, "u32"), registers
        self.values = [self.getter(reg, "b32") for reg in registers] if instr.op == "stmatrix" else []

    def run(self, machine: Machine, w: Warp) -> bool:
        self.whole_warp(w)
        addresses = self.at(w)[: 8 * len(self.registers)]
        if machine.profile:
            machine.profile.access(w, addresses, 16, True)
        access = shared_access(machine, w, addresses, 4, 4, self.instr)
        if access.lanes < addresses.size and self.values:
            raise self.fail("stores all rows to one place")
        if self.values:
            write_shared(machine, w, access, np.concatenate([value(w) for value in self.values]), OTHERS, self.instr)
        else:
            words = read_shared(machine, w, access, OTHERS, self.instr)
            if access.lanes < addresses.size:  # all rows are one
                words = np.tile(words, addresses.size)
            if self.transposed:
                words = np.ascontiguousarray(words.view("u2").reshape(-1, 8, 8).transpose(0, 2, 1)).view("u4")
            for register, values in zip(self.registers, words.reshape(-1, 32), strict=True):
                w.write(register, values.copy(), None)
        w.pc += 1
        return True


@step_for("mma")
class Mma(Step):
    """``mma.sync`` of 16 x 8 sums."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        form = r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(tf32|bf16|f16)\.\2\.f32"
        match = re.fullmatch(form, instr.form)
        if not match or (match[1] == "8") != (match[2] == "tf32"):
            raise self.fail()
        self.kind = match[2]
        self.operands = [[self.getter(reg, "b32") for reg in part] for part in instr.args[1:]]

    def run(self, machine: Machine, w: Warp) -> bool:
        self.whole_warp(w)
        a, b, c = ([get(w) for get in part] for part in self.operands)
        product = operand(a, self.kind, 16) @ operand(b, self.kind, 8).T
        set_sums(w, self.instr.args[0], toward_zero(sums(c) + product))
        w.pc += 1
        return False


# -------------------------------------------------------------------------------------------------------------- wgmma


SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by the highest bits of a descriptor


def fields_of(descriptor: int) -> tuple[int, int, int, int]:
    """Start, leading and stride offset, and swizzle of a matrix in shared memory, in bytes."""
    start, lead, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return start, lead, stride, SWIZZLES[descriptor >> 62]


@lru_cache(maxsize=4096)
def described(descriptor: int, first_row: int, rows: int) -> np.ndarray:
    """Where rows of 32 bytes of a matrix lie in shared memory: the numbers of their words."""
    start, lead, stride, swizzle = fields_of(descriptor)
    row, byte = np.arange(first_row, first_row + rows), np.arange(0, 32, 4)
    width = swizzle or 16
    at = start + (row // 8 * stride + row % 8 * width)[:, None] + byte // width * lead + byte % width
    return _words(at, swizzle)


@lru_cache(maxsize=4096)
def described_transposed(descriptor: int, first_row: int, rows: int) -> np.ndarray:
    """The same of a matrix of 16-bit numbers that lies there by columns: words of two rows, column by column.

    CUTLASS writes these layouts down as "MN-major" (``cute/atom/mma_traits_sm90_gmma.hpp``): as wide as the swizzle,
    eight columns at a time; what is beyond is ``lead`` bytes away along the rows and ``stride`` along the columns, and
    the other way round without a swizzle.
    """
    start, lead, stride, swizzle = fields_of(descriptor)
    column, byte = np.arange(16)[:, None], 2 * np.arange(first_row, first_row + rows, 2)
    width = swizzle or 16
    along_rows, along_columns = (lead, stride) if swizzle else (stride, lead)
    at = start + byte // width * along_rows + byte % width + column // 8 * along_columns + column % 8 * width
    return _words(at, swizzle)


def _words(at: np.ndarray, swizzle: int) -> np.ndarray:
    """The words at some bytes: a swizzle turns bits 4 to 6 of an address by bits 7 to 9, as many as it is wide."""
    if swizzle:
        at = at ^ ((at >> 7 & (swizzle // 16 - 1)) << 4)
    return (at // 4).ravel()


@dataclass(eq=False)
class Product:
    """A product in flight."""

    instr: Instr
    step: int
    multiply: WarpgroupMma
    a: int | None
    b: int
    keeps_sums: bool


@step_for("wgmma")
class WarpgroupMma(Step):
    """``wgmma.mma_async`` and what orders it. Each warp of four computes its 16 of 64 rows."""

    def __init__(self, program: Program, instr: Instr) -> None:
        super().__init__(program, instr)
        self.what = self.mods[0]
        if self.what == "mma_async":
            form = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(tf32|bf16|f16)\.\3"
            match = re.fullmatch(form, instr.form)
            if not match or (match[2] == "8") != (match[3] == "tf32"):
                raise self.fail()
            self.columns, self.kind = int(match[1]), match[3]
            self.sums, a, b, keeps_sums, *factors = instr.args
            signs, transposed = factors[:2], factors[2:]
            if any(sign != Imm(1) for sign in signs) or any(each not in (Imm(0), Imm(1)) for each in transposed):
                raise self.fail("changes a sign")
            self.transposed = [each == Imm(1) for each in transposed] or [False]  # both operands, or the second alone
            self.a = [self.getter(reg, "b32") for reg in a] if isinstance(a, list) else self.getter(a, "b64")
            self.b, self.keeps_sums = self.getter(b, "b64"), self.getter(keeps_sums, "pred")
            self.old = [self.getter(reg, "b32") for reg in self.sums]
        elif self.what == "wait_group":
            (self.still_pending,) = (arg.value for arg in instr.args)
        elif self.what not in ("fence", "commit_group"):
            raise self.fail()

    def run(self, machine: Machine, w: Warp) -> bool:
        self.whole_warp(w)
        if self.what == "mma_async":
            self._issue(machine, w)
        elif self.what == "commit_group":
            w.products.append([])
        elif self.what == "wait_group":
            done = w.products[: max(0, len(w.products) - 1 - self.still_pending)]
            del w.products[: len(done)]
            for product in (product for group in done for product in group):
                product.multiply.finish(machine, w, product)
        w.pc += 1
        return self.what in ("mma_async", "wait_group")

    def _issue(self, machine: Machine, w: Warp) -> None:
        a = None if isinstance(self.a, list) else int(self.a(w)[0])
        product = Product(self.instr, w.pc, self, a, int(self.b(w)[0]), bool(self.keeps_sums(w)[0]))
        if any(descriptor >> 49 & 7 for descriptor in (a or 0, product.b)):
            raise self.fail("has a base offset")
        w.products[-1].append(product)
        parts = self._parts(w, product)
        w.cta.pending.begin(product, self.instr, np.unique(np.concatenate(parts)), writes=False)
        for numbers in parts:
            self._read(machine, w, numbers, product)

    def _parts(self, w: Warp, product: Product) -> list[np.ndarray]:
        """Where the operands in shared memory lie: the second, and the first if it is there."""
        places = [described_transposed if each else described for each in self.transposed]
        parts = [places[-1](product.b, 0, self.columns)]
        if product.a is not None:
            parts.append(places[0](product.a, 16 * (w.index % 4), 16))
        return parts

    def _matrix(self, words: np.ndarray, rows: int, transposed: bool) -> np.ndarray:
        numbers = decode(words, self.kind)
        return numbers.reshape(16, rows).T if transposed else numbers.reshape(rows, -1)

    def _read(self, machine: Machine, w: Warp, numbers: np.ndarray, product: Product) -> np.ndarray:
        if int(numbers.max()) * 4 + 4 > w.cta.shared.end:
            raise self.fail("reads beyond shared memory")
        access = Access(w.cta.shared, 4, numbers, 1)
        return read_shared(machine, w, access, OTHERS, self.instr, product.step)

    def finish(self, machine: Machine, w: Warp, product: Product) -> None:
        """Multiply, with what is in registers and shared memory now."""
        w.cta.pending.end(product)
        b, *a = (self._read(machine, w, numbers, product) for numbers in self._parts(w, product))
        right = self._matrix(b, self.columns, self.transposed[-1])
        in_registers = None if a else [get(w) for get in self.a]
        left = self._matrix(a[0], 16, self.transposed[0]) if a else operand(in_registers, self.kind, 16)
        old = sums([get(w) for get in self.old]) if product.keeps_sums else 0
        set_sums(w, self.sums, toward_zero(old + left @ right.T))
