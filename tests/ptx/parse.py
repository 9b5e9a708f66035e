"""Reads PTX as Triton emits it: one kernel, its parameters, registers, labels and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

NUMPY = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "tf32": "u4", "f16x2": "u4", "bf16x2": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "f32x2": "f4",
}  # fmt: skip
BANKS = {1: "h", 2: "h", 4: "r", 8: "d"}  # registers by their bytes; predicates are in bank "p"


class UnsupportedError(NotImplementedError):
    """The kernel contains what this machine does not know."""


class Reg(NamedTuple):
    """A register: its bank and its place there."""

    bank: str
    index: int


class Imm(NamedTuple):
    """A number: integers as written, floats as NumPy's."""

    value: int | np.float32 | np.float64


class Name(NamedTuple):
    """A label, a special register, a variable, or ``_`` for a result that nobody wants."""

    text: str


class Address(NamedTuple):
    """``[base + offset]``."""

    base: Reg | Name
    offset: int


class Not(NamedTuple):
    """``!%p``."""

    operand: Reg


Operand = Reg | Imm | Name | Address | Not | list  # a list is a vector, or a pair that is packed or unpacked
SINK = Name("_")
WITHOUT_RESULT = {"st", "red", "bar", "barrier", "bra", "brx", "ret", "cp", "fence", "stmatrix"}


@dataclass(frozen=True)
class Instr:
    """An instruction.

    Attributes:
        form: the opcode with its modifiers, ``"ld.global.b32"``.
        args: operands, in order.
        guard: the predicate it is executed under, if any; ``negated`` if under its opposite.
        text: as written.
        place: file and line of the source that it comes from.
    """

    form: str
    args: tuple[Operand, ...]
    guard: Reg | None
    negated: bool
    text: str
    place: tuple[str, int]

    @property
    def op(self) -> str:
        """``"ld"``."""
        return self.form.split(".")[0]

    @property
    def mods(self) -> list[str]:
        """``["global", "b32"]``."""
        return self.form.split(".")[1:]

    def __str__(self) -> str:
        return f"`{self.text}` ({self.place[0]}:{self.place[1]})"

    def writes(self) -> list[Reg]:
        """The registers that it sets."""
        return [] if self.op in WITHOUT_RESULT or not self.args else list(_registers(self.args[0]))

    def reads(self) -> list[Reg]:
        """The registers that it needs, the guard and those that it may leave as they were included."""
        found = [reg for arg in self.args[bool(self.writes()) :] for reg in _registers(arg)]
        return found if self.guard is None else [*found, self.guard, *self.writes()]


def _registers(operand: Operand) -> Iterator[Reg]:
    if isinstance(operand, Reg):
        yield operand
    elif isinstance(operand, list):
        for part in operand:
            yield from _registers(part)
    elif isinstance(operand, (Address, Not)):
        yield from _registers(operand[0])


@dataclass
class Kernel:
    """A kernel as written.

    Attributes:
        params: name and bytes of each parameter.
        threads: of a CTA.
        shared: names of the arrays in shared memory.
        labels: the number of the instruction after each.
        tables: the labels that a ``brx.idx`` may go to, by the table's own label.
        banks: how many registers there are of each kind.
    """

    name: str
    params: list[tuple[str, int]]
    threads: int
    shared: list[str]
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    banks: dict[str, int] = field(default_factory=lambda: dict.fromkeys("phrd", 0))


def split(text: str) -> list[str]:
    """Operands: split at the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


class _Scopes:
    """Registers by name; those declared inside braces are forgotten behind them."""

    def __init__(self, banks: dict[str, int]) -> None:
        self.banks = banks
        self.inner: list[dict[str, Reg]] = [{}]

    def declare(self, declaration: str) -> None:
        """``.reg .b32 %r<9>`` or ``.reg .pred p, q``."""
        kind, names = declaration.split(None, 2)[1:]
        bank = "p" if kind == ".pred" else BANKS[np.dtype(NUMPY[kind[1:]]).itemsize]
        for name in split(names):
            base, _, count = name.partition("<")
            for each in [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]:
                self.inner[-1][each] = Reg(bank, self.banks[bank])
                self.banks[bank] += 1

    def operand(self, word: str) -> Operand:
        if word.startswith("{"):
            return [self.operand(part) for part in split(word[1:-1])]
        if word.startswith("["):
            base, _, offset = re.sub(r"\s", "", word[1:-1]).partition("+")
            return Address(self.operand(base), int(offset or "0", 0))
        if word.startswith("!"):
            return Not(self.operand(word[1:]))
        for scope in reversed(self.inner):
            if word in scope:
                return scope[word]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", word):
            return Imm(np.array([int(word[2:], 16)], "u4").view("f4")[0])
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", word):
            return Imm(np.array([int(word[2:], 16)], "u8").view("f8")[0])
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", word):
            return Imm(int(word.rstrip("U"), 0))
        if re.fullmatch(r"[%$\w.]+", word):
            return Name(word)
        raise UnsupportedError(f"operand {word!r}")


# Statements end with ";" but for directives, labels, and the braces of scopes, which are not those of vector operands.
TOKEN = re.compile(
    r"\s*(?:(?P<directive>\.(?:loc|file|pragma|section)\b)(?P<rest>[^\n]*)\n|(?P<label>[$\w%]+):(?!:)"
    r"|(?P<brace>[{}])|(?P<statement>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);)"
)


def parse(text: str) -> Kernel:
    """The one kernel of a module.

    Raises:
        UnsupportedError: there is something here that Triton did not emit when this was written.
    """
    files = {number: names[-1] for number, *names in _files(text)}
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    header = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{(.*)", text, re.S)
    if not header or len(re.findall(r"\.(?:entry|func)\s", text)) != 1:
        raise UnsupportedError("a module without exactly one function")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", header[3])
    if threads is None or int(threads[1]) % 32:
        raise UnsupportedError("a kernel that does not say of how many whole warps its CTAs are")
    shared = re.findall(r"\.shared\s[^;]*?(\w+)\[\d*\]", text)
    if len(shared) > 1:
        raise UnsupportedError(f"several arrays in shared memory: {shared}")
    params = re.findall(r"\.param\s+\.(\w+)\s(?:[^,]*\s)?(\w+)(?:,|\s*$)", header[2])
    kernel = Kernel(
        header[1], [(name, np.dtype(NUMPY[kind]).itemsize) for kind, name in params], int(threads[1]), shared
    )
    scopes, place = _Scopes(kernel.banks), ("?", 0)
    at, body = 0, header[4]
    while scopes.inner:
        token = TOKEN.match(body, at)
        if not token:
            raise UnsupportedError(f"cannot parse: {body[at : at + 80]!r}")
        at = token.end()
        if token["directive"] == ".loc":
            number, line = token["rest"].split()[:2]
            place = (files.get(number, "?").rsplit("/", 1)[-1], int(line))
        elif token["brace"] == "{":
            scopes.inner.append({})
        elif token["brace"]:
            scopes.inner.pop()
        elif token["label"]:
            targets = re.compile(r"\s*\.branchtargets([^;]*);").match(body, at)
            if targets:
                at = targets.end()
                kernel.tables[token["label"]] = split(targets[1])
            else:
                kernel.labels[token["label"]] = len(kernel.instrs)
        elif token["statement"] is not None and (statement := " ".join(token["statement"].split())):
            if statement.startswith(".reg "):
                scopes.declare(statement)
            else:
                kernel.instrs.append(_instruction(statement, scopes, place))
    return kernel


def _files(text: str) -> Iterator[list[str]]:
    for number, rest in re.findall(r"\.file\s+(\d+)([^\n]*)", text):
        yield [number, *re.findall(r'"([^"]*)"', rest)]


def _instruction(statement: str, scopes: _Scopes, place: tuple[str, int]) -> Instr:
    guard, text = re.fullmatch(r"(?:@(!?\S+)\s+)?(.*)", statement).groups()
    form, _, args = text.partition(" ")
    return Instr(
        form, tuple(scopes.operand(arg) for arg in split(args)), scopes.operand(guard.lstrip("!")) if guard else None,
        bool(guard) and guard.startswith("!"), text, place,
    )  # fmt: skip
