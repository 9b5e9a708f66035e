"""Translates what no other warp can observe to Python: arithmetic, moves, shuffles, parameters.

A register is a NumPy array of 32 lanes, unsigned of its width, in the list of its bank: ``h`` of 16 bits, ``r`` of 32,
``d`` of 64, ``p`` of predicates. An instruction becomes assignments to these, and a run of instructions one Python
function. What is not known, an opcode, a modifier or an operand, raises :class:`UnsupportedError` here, before anything
is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import arithmetic
from .arithmetic import LANE, LANES
from .parse import NUMPY, SINK, Imm, Instr, Name, Not, Operand, Reg, UnsupportedError

UNSIGNED = {"h": "u2", "r": "u4", "d": "u8"}
WIDER = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}
ORDER = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
OPPOSITE = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
LOGIC = {"and": "&", "or": "|", "xor": "^"}
WHOLE_WARP = ("shfl", "redux", "vote")  # meaningless unless all lanes take part
Assignments = list[tuple[str, str]]  # register and expression


def size_of(kind: str) -> int:
    """Bytes of a type."""
    return np.dtype(NUMPY[kind]).itemsize


def is_float(kind: str) -> bool:
    """Whether a type is one of floating point."""
    return "f" in kind


class Translator:
    """Assignments for instructions, and Python functions for runs of them.

    Args:
        shared: where the arrays in shared memory begin, by name.
    """

    def __init__(self, shared: dict[str, int]) -> None:
        self.shared = shared
        self.constants: list[np.ndarray] = []
        self._known: dict[tuple[str, bytes], str] = {}
        names = ("bf16", "f16", "tf32", "fma", "quotient", "mul_hi", "count_bits", "shift", "permute", "shuffle",
                 "reduce_warp")  # fmt: skip
        self._scope = {name: getattr(arithmetic, name) for name in names}
        self._scope |= {"np": np, "where": np.where, "c": self.constants}

    def assignments(self, i: Instr) -> Assignments | None:
        """What an instruction assigns, or None if it is not one of these."""
        method = getattr(self, f"_{i.op}", None)
        if method is None or (i.form.startswith("ld.") and not i.form.startswith("ld.param")):
            return None
        try:
            return method(i, *i.args)
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise UnsupportedError(f"{i}: {error!r}") from error

    def function(self, instrs: Sequence[Instr], masked: bool) -> Callable[..., None]:
        """Runs instructions, for all lanes or for those in a mask: ``run(warp, p, h, r, d, mask)``."""
        lines = []
        for i in instrs:
            conditions = ["m"] if masked else []
            if i.guard is not None:
                conditions.append(("~" if i.negated else "") + f"p[{i.guard.index}]")
            if i.op in WHOLE_WARP and conditions:
                lines.append(f"raise RuntimeError({f'{i}: not by all lanes'!r})")
                continue
            for target, expression in self.assignments(i):
                if conditions:
                    expression = f"where({' & '.join(conditions)}, {expression}, {target})"
                lines.append(f"{target} = {expression}")
        return self._compiled("def run(w, p, h, r, d, m):\n " + "\n ".join(lines or ["pass"]), instrs[0])["run"]

    def getter(self, operand: Operand, kind: str) -> Callable[[Any], np.ndarray]:
        """Reads an operand of a warp."""
        expression = self.value(operand, kind)
        body = f"def get(w):\n p, h, r, d = w.p, w.h, w.r, w.d\n return {expression}"
        return self._compiled(body, operand)["get"]

    def _compiled(self, source: str, what: object) -> dict[str, Any]:
        scope = dict(self._scope)
        exec(compile(source, f"<{what}>", "exec"), scope)
        return scope

    # ------------------------------------------------------------------------------------------------------- operands

    def array(self, array: np.ndarray) -> str:
        """The expression for a constant array."""
        key = (array.dtype.str, array.tobytes())
        if key not in self._known:
            self._known[key] = f"c[{len(self.constants)}]"
            array.setflags(write=False)
            self.constants.append(array)
        return self._known[key]

    def number(self, value: int | np.floating, dtype: str) -> str:
        """The expression for a number in all lanes."""
        if not isinstance(value, int):
            return self.array(np.full(LANES, value).view(dtype))
        size = np.dtype(dtype).itemsize
        return self.array(np.full(LANES, value & (2 ** (8 * size) - 1), f"u{size}").view(dtype))

    def value(self, o: Operand, kind: str) -> str:
        """The expression for an operand, as an array of a type."""
        if kind == "pred":
            if isinstance(o, Imm):
                return self.array(np.full(LANES, bool(o.value)))
            return f"~p[{o.operand.index}]" if isinstance(o, Not) else f"p[{o.index}]"
        if kind == "f32x2":  # as 64 elements
            return self.value(o, "b64") + ".view('f4')"
        dtype = NUMPY[kind]
        if isinstance(o, Imm):
            return self.number(o.value, dtype)
        if isinstance(o, Name) and o.text in self.shared:
            return self.number(self.shared[o.text], dtype)
        if isinstance(o, Name) and o.text in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid"):
            return f"w.special[{o.text!r}].{'view' if size_of(kind) == 4 else 'astype'}({dtype!r})"
        if isinstance(o, Reg) and o.bank in UNSIGNED:
            word, own = f"{o.bank}[{o.index}]", UNSIGNED[o.bank]
            if np.dtype(own).itemsize == size_of(kind):
                return word if own == dtype else f"{word}.view({dtype!r})"
            if np.dtype(own).itemsize > size_of(kind) and dtype[0] in "ui":
                return f"{word}.astype({dtype!r})"  # the lower bits
        raise UnsupportedError(f"operand {o} as {kind}")

    def store(self, o: Operand, expression: str, kind: str) -> Assignments:
        """The assignment of an expression of a type to a register."""
        if o == SINK:
            return []
        if kind == "pred":
            return [(f"p[{o.index}]", expression)]
        own, dtype = UNSIGNED[o.bank], NUMPY[kind]
        if kind == "f32x2":
            expression = f"({expression}).view('u8')"
        elif np.dtype(own).itemsize != size_of(kind):  # integers are extended by their sign, if they have one
            expression = f"({expression}).astype({own!r})"
        elif dtype != own:
            expression = f"({expression}).view({own!r})"
        return [(f"{o.bank}[{o.index}]", expression)]

    # --------------------------------------------------------------------------------------------------- instructions

    def _plain(self, i: Instr, form: str, d: Operand, *sources: Operand, allowed: tuple[str, ...] = ()) -> Assignments:
        """Instructions whose operands are all of the type that comes last."""
        *mods, kind = i.mods
        if unknown := set(mods) - set(allowed):
            raise UnsupportedError(f"{i}: modifiers {unknown}")
        return self.store(d, form.format(*(self.value(s, kind) for s in sources)), kind)

    def _add(self, i, d, a, b):
        return self._plain(i, "{} + {}", d, a, b, allowed=("rn",))

    def _sub(self, i, d, a, b):
        return self._plain(i, "{} - {}", d, a, b, allowed=("rn",))

    def _neg(self, i, d, a):
        return self._plain(i, "-({})", d, a)

    def _sqrt(self, i, d, a):
        if i.form not in ("sqrt.rn.f32", "sqrt.rn.f64"):
            raise UnsupportedError(f"{i}: an approximate root")
        return self._plain(i, "np.sqrt({})", d, a, allowed=("rn",))

    def _popc(self, i, d, a):
        return self.store(d, f"count_bits({self.value(a, i.mods[0])})", "u32")

    def _max(self, i, d, a, b):
        function = {"max": "maximum", "min": "minimum"}[i.op] if not is_float(i.mods[-1]) else f"f{i.op}"
        return self._plain(i, f"np.{function}({{}}, {{}})", d, a, b)

    _min = _max

    def _div(self, i, d, a, b):
        if is_float(i.mods[-1]):
            if "rn" not in i.mods:
                raise UnsupportedError(f"{i}: an approximate division")
            return self._plain(i, "{} / {}", d, a, b, allowed=("rn",))
        return self._integer_division(i, "quotient({}, {})", d, a, b)

    def _rem(self, i, d, a, b):
        return self._integer_division(i, "{0} - quotient({0}, {1}) * {1}", d, a, b)

    def _integer_division(self, i, form, d, a, b):
        if size_of(i.mods[-1]) > 4:
            raise UnsupportedError(f"{i}: a division of 64 bits")
        return self._plain(i, form, d, a, b)

    def _fma(self, i, d, a, b, c):
        if i.mods in (["rn", "f32", "bf16"], ["rn", "f32", "f16"]):  # 16-bit factors, a float32 sum
            x, y = (self._as_float32(s, i.mods[2]) for s in (a, b))
            return self.store(d, f"fma({x}, {y}, {self.value(c, 'f32')})", "f32")
        if i.mods[-1] not in ("f32", "f32x2"):
            raise UnsupportedError(str(i))
        return self._plain(i, "fma({}, {}, {})", d, a, b, c, allowed=("rn",))

    def _as_float32(self, o: Operand, kind: str) -> str:
        if kind == "bf16":
            return f"({self.value(o, 'b16')}.astype('u4') << {self.number(16, 'u4')}).view('f4')"
        return f"{self.value(o, 'f16')}.astype('f4')"

    def _mul(self, i, d, a, b, *c):
        *mods, kind = i.mods
        if is_float(kind) and not c:
            return self._plain(i, "{} * {}", d, a, b, allowed=("rn",))
        x, y = self.value(a, kind), self.value(b, kind)
        if mods == ["lo"]:
            return self._plain(i, "{} * {}" + " + {}" * len(c), d, a, b, *c, allowed=("lo",))
        if mods == ["hi"] and not c:
            return self.store(d, f"mul_hi({x}, {y})", kind)
        if mods == ["wide"]:
            wide = WIDER[kind]
            plus = "".join(f" + {self.value(each, wide)}" for each in c)
            return self.store(d, f"{x}.astype({NUMPY[wide]!r}) * {y}{plus}", wide)
        raise UnsupportedError(str(i))

    _mad = _mul

    def _and(self, i, d, *sources):
        if i.mods != ["pred"] and (len(i.mods) != 1 or i.mods[0][0] != "b"):
            raise UnsupportedError(str(i))
        return self._plain(i, "~{}" if i.op == "not" else f" {LOGIC[i.op]} ".join("{}" for _ in sources), d, *sources)

    _or = _xor = _not = _and

    def _shl(self, i, d, a, n):
        (kind,) = i.mods
        kind = kind.replace("b", "u")
        if isinstance(n, Imm) and n.value < 8 * size_of(kind):
            symbol = "<<" if i.op == "shl" else ">>"
            return self.store(d, f"{self.value(a, kind)} {symbol} {self.number(n.value, NUMPY[kind])}", kind)
        return self.store(d, f"shift({self.value(a, kind)}, {self.value(n, 'u32')}, {i.op == 'shl'})", kind)

    _shr = _shl

    def _bfe(self, i, d, a, first, length):
        if i.mods not in (["s32"], ["u32"]) or first.value + length.value > 32:
            raise UnsupportedError(str(i))
        left, right = self.number(32 - first.value - length.value, "u4"), 32 - length.value
        dtype = NUMPY[i.mods[0]]
        up = f"({self.value(a, 'u32')} << {left}).view({dtype!r})"
        return self.store(d, f"{up} >> {self.number(right, dtype)}", i.mods[0])

    def _prmt(self, i, d, a, b, selector):
        if i.mods != ["b32"] or not 0 <= selector.value <= 0x7777 or selector.value & 0x8888:  # 8 to 15 copy a sign
            raise UnsupportedError(str(i))
        return self.store(d, f"permute({self.value(a, 'b32')}, {self.value(b, 'b32')}, {selector.value})", "b32")

    def _setp(self, i, d, a, b, *c):
        comparison, *logic, kind = i.mods
        x, y = self.value(a, kind), self.value(b, kind)
        if is_float(kind):  # ordered comparisons are false of NaN, those that end in u are true
            forms = {"ne": f"({x} < {y}) | ({x} > {y})", "neu": f"{x} != {y}", "num": f"({x} == {x}) & ({y} == {y})",
                     "nan": f"({x} != {x}) | ({y} != {y})", "equ": f"~(({x} < {y}) | ({x} > {y}))"}  # fmt: skip
            forms |= {name: f"{x} {ORDER[name]} {y}" for name in ("eq", *OPPOSITE)}
            forms |= {f"{name}u": f"~({x} {opposite} {y})" for name, opposite in OPPOSITE.items()}
            result = forms[comparison]
        else:
            result = f"{x} {'!=' if comparison == 'ne' else ORDER[comparison]} {y}"
        if logic or c:
            (operation,), (other,) = logic, c
            result = f"({result}) {LOGIC[operation]} {self.value(other, 'pred')}"
        return self.store(d, result, "pred")

    def _selp(self, i, d, a, b, c):
        (kind,) = i.mods
        return self.store(d, f"where({self.value(c, 'pred')}, {self.value(a, kind)}, {self.value(b, kind)})", kind)

    def _mov(self, i, d, a):
        (kind,) = i.mods
        if not isinstance(d, list) and not isinstance(a, list):
            return self.store(d, self.value(a, kind), kind)
        parts = d if isinstance(d, list) else a
        bits = 8 * size_of(kind) // len(parts)
        part, whole = f"u{bits}", NUMPY[kind]
        shifts = [self.number(bits * k, whole) for k in range(len(parts))]
        if isinstance(d, list):  # unpack
            word = self.value(a, kind)
            each = [f"({word} >> {by}).astype({NUMPY[part]!r})" for by in shifts]
            return [x for reg, value in zip(d, each, strict=True) for x in self.store(reg, value, part)]
        packed = [f"({self.value(reg, part)}.astype({whole!r}) << {by})" for reg, by in zip(a, shifts, strict=True)]
        return self.store(d, " | ".join(packed), kind)

    def _cvt(self, i, d, a, *b):
        *mods, to, of = i.mods
        if to in ("bf16x2", "f16x2") and mods == ["rn"] and of == "f32":  # the first operand goes to the upper half
            (low,) = b
            high, low = (f"{to[:-2]}({self.value(o, of)})" for o in (a, low))
            return self.store(d, f"({high}.astype('u4') << {self.number(16, 'u4')}) | {low}", to)
        x = self.value(a, of)
        if b:
            raise UnsupportedError(str(i))
        if mods == ["rn"] and of == "f32" and to in ("bf16", "f16"):
            return self.store(d, f"{to}({x})", "b16")
        if mods == ["rna"] and (to, of) == ("tf32", "f32"):
            return self.store(d, f"tf32({x})", "b32")
        if not mods and to == "f32" and of in ("bf16", "f16"):
            return self.store(d, self._as_float32(a, of), to)
        plain = not mods and not is_float(to) and not is_float(of)
        if plain or (mods == ["rn"] and to in ("f32", "f64") and not is_float(of)):
            return self.store(d, f"{x}.astype({NUMPY[to]!r})", to)
        raise UnsupportedError(str(i))

    def _ld(self, i, d, a):
        """Parameters; other memory is not for here."""
        _, kind = i.mods
        return self.store(d, f"w.cta.machine.param({a.base.text!r}, {a.offset}, {NUMPY[kind]!r})", kind)

    def _shfl(self, i, d, a, b, c, members):
        if i.mods[0] != "sync" or i.mods[2:] != ["b32"] or members.value & 0xFFFFFFFF != 0xFFFFFFFF:
            raise UnsupportedError(str(i))
        x, mode = self.value(a, "b32"), i.mods[1]
        if isinstance(b, Imm) and isinstance(c, Imm):
            source = arithmetic.shuffle_sources(mode, np.full(LANES, b.value), np.full(LANES, c.value))
            return self.store(d, f"{x}[{self.array(source)}]", "b32")
        return self.store(d, f"shuffle({mode!r}, {x}, {self.value(b, 'u32')}, {self.value(c, 'u32')})", "b32")

    def _redux(self, i, d, a, members):
        sync, operation, kind = i.mods
        if sync != "sync" or operation not in arithmetic.REDUCTIONS:
            raise UnsupportedError(str(i))
        return self.store(d, f"reduce_warp({operation!r}, {self.value(a, kind)}, {self.value(members, 'b32')})", kind)

    def _vote(self, i, d, a, members):
        if i.mods != ["sync", "ballot", "b32"] or members.value & 0xFFFFFFFF != 0xFFFFFFFF:
            raise UnsupportedError(str(i))
        bits = f"np.packbits({self.value(a, 'pred')}, bitorder='little').view('u4')"
        return self.store(d, f"np.repeat({bits}, {len(LANE)})", "b32")
