"""The PTX machine's arithmetic, one instruction at a time, against Python's integers and exact fractions."""

import math
import struct
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from ptx.parse import NUMPY, UnsupportedError, parse
from ptx.program import Program

LANES = 32
FLOATS = {"f16": 11, "f32": 24, "f64": 53}  # bits of the significand


def bits_of(kind):
    return 1 if kind == "pred" else 8 * np.dtype(NUMPY[kind]).itemsize


def inputs(kind, seed):
    """Bits of values of a type: the edges, and others at random."""
    rng = np.random.default_rng([seed, *kind.encode()])
    bits = bits_of(kind)
    if kind == "pred":
        return rng.integers(0, 2, LANES).astype(bool)
    raw = rng.integers(0, 2**64, LANES, "u8") >> np.uint64(64 - bits)
    edges = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 3]
    if kind in ("f32", "f16", "bf16"):
        one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[kind]
        infinity = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[kind]
        edges = [0, 2 ** (bits - 1), one, one + 1, infinity, infinity + 1, infinity | 2 ** (bits - 1), 1]
        raw[len(edges) : 24] = (rng.integers(-3000, 3000, 24 - len(edges)) + one).astype("u8")  # near 1, so sums matter
    raw[: len(edges)] = rng.permutation(np.array(edges, "u8"))
    return raw.astype(f"u{bits // 8}")


def number(raw, kind):
    """The value that bits mean."""
    if kind == "pred":
        return bool(raw)
    raw, bits = int(raw), bits_of(kind)
    if kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", raw << 16))[0]
    if kind in FLOATS:
        code = {16: "<e", 32: "<f", 64: "<d"}[bits]
        return struct.unpack(code, raw.to_bytes(bits // 8, "little"))[0]
    return raw - 2**bits if kind[0] == "s" and raw >> (bits - 1) else raw


def rounded(x, kind):
    """An exact fraction to the nearest number of a type, ties to even, as bits without a sign."""
    digits, exponent_bits, bits = {"f32": (24, 8, 32), "f16": (11, 5, 16), "bf16": (8, 8, 16)}[kind]
    lowest = 3 - 2 ** (exponent_bits - 1) - digits  # exponent of the smallest subnormal
    size, exponent = abs(x), lowest
    while size >= Fraction(2) ** (exponent + digits):
        exponent += 1
    significand = round(size / Fraction(2) ** exponent)  # to even, as Python does
    if significand == 2**digits:
        significand, exponent = significand // 2, exponent + 1
    raw = significand if significand < 2 ** (digits - 1) else significand + ((exponent - lowest) << (digits - 1))
    return min(raw, (2**exponent_bits - 1) << (digits - 1)) | ((x < 0) << (bits - 1))  # what is too large is infinite


def float_bits(exact, plain, kind="f32"):
    """Bits of a result: ``exact`` computes fractions, ``plain`` says what NaN, infinity and zero make."""
    try:
        x = exact()
    except (OverflowError, ValueError, ZeroDivisionError):
        x = None
    if x:
        return rounded(x, kind)
    with np.errstate(all="ignore"):
        value = np.float32(plain())
    return int(value.view("u4"))


def same(got, expected, kind):
    if kind in ("f32", "f16", "bf16", "tf32"):
        kind = "f32" if kind == "tf32" else kind
        got_nan, expected_nan = math.isnan(number(got, kind)), math.isnan(number(expected, kind))
        return (got_nan and expected_nan) or int(got) == int(expected)
    return int(got) == int(expected) % 2 ** bits_of(kind)


def execute(text, registers, predicates=()):
    """Run one instruction; registers by name and as arrays of 32, changed in place."""
    source = f""".visible .entry k(.param .u64 a) .reqntid 32 {{
        .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<8>; .reg .b64 %rd<8>; {text}; ret; }}"""
    program = Program(source)
    names = {"p": "p", "rs": "h", "r": "r", "rd": "d"}
    warp = SimpleNamespace(p=[None] * 8, h=[None] * 8, r=[None] * 8, d=[None] * 8, pc=0, full=True, special={})
    for name, values in registers.items():
        bank = names[name.rstrip("0123456789")]
        getattr(warp, bank)[int(name[-1])] = values.copy()
    with np.errstate(all="ignore"):
        program.steps[0].run(None, warp)
    return lambda name: getattr(warp, names[name.rstrip("0123456789")])[int(name[-1])]


def register(kind, index):
    return {1: "p", 8: "rs", 16: "rs", 32: "r", 64: "rd"}[bits_of(kind)] + str(index)


def f32(value):
    return np.float32(value)


def to_zero(a, b):
    return int(Fraction(a, b)) if b else -1


def ordered(test):
    return lambda a, b: not math.isnan(a) and not math.isnan(b) and test(a, b)


def unordered(test):
    return lambda a, b: math.isnan(a) or math.isnan(b) or test(a, b)


def float_arithmetic(exact, plain):
    return lambda *args: float_bits(lambda: exact(*map(Fraction, args)), lambda: plain(*map(f32, args)))


def convert(kind):
    """float32 to 16 bits."""

    def to(value):
        if math.isnan(value):
            return 0x7FFF
        if math.isinf(value) or value == 0:
            return (int(f32(value).view("u4")) >> 16) if kind == "bf16" else int(np.float16(value).view("u2"))
        return rounded(Fraction(value), kind)

    return to


def to_tf32(value):
    """The nearest number with 10 bits behind the point, ties away from zero."""
    raw = int(f32(value).view("u4"))
    return raw if math.isinf(value) else ((raw + 0x1000) >> 13) << 13


ADD = float_arithmetic(lambda a, b: a + b, lambda a, b: a + b)
SUB = float_arithmetic(lambda a, b: a - b, lambda a, b: a - b)
MUL = float_arithmetic(lambda a, b: a * b, lambda a, b: a * b)
FMA = float_arithmetic(lambda a, b, c: a * b + c, lambda a, b, c: a * b + c)

# Form, types of the sources, type of the result, what it computes of numbers: an integer, or the bits of a float.
PLAIN = [
    *((f"add.{k}", [k, k], k, lambda a, b: a + b) for k in ("s16", "s32", "s64", "u32")),
    *((f"sub.{k}", [k, k], k, lambda a, b: a - b) for k in ("s32", "s64")),
    *((f"mul.lo.{k}", [k, k], k, lambda a, b: a * b) for k in ("s16", "s32", "s64", "u32")),
    *((f"mul.hi.{k}", [k, k], k, lambda a, b, k=k: a * b >> bits_of(k)) for k in ("s32", "u32", "u64", "s64")),
    *((f"mul.wide.{k}", [k, k], k[0] + str(2 * bits_of(k)), lambda a, b: a * b) for k in ("s16", "u16", "s32", "u32")),
    *((f"mad.lo.{k}", [k, k, k], k, lambda a, b, c: a * b + c) for k in ("s32", "s64")),
    *((f"mad.wide.{k}", [k, k, k[0] + "64"], k[0] + "64", lambda a, b, c: a * b + c) for k in ("s32", "u32")),
    *((f"div.{k}", [k, k], k, to_zero) for k in ("s16", "s32", "u16", "u32")),
    *((f"rem.{k}", [k, k], k, lambda a, b: a - to_zero(a, b) * b) for k in ("s32", "u32")),
    *((f"neg.{k}", [k], k, lambda a: -a) for k in ("s32", "s64")),
    *((f"max.{k}", [k, k], k, max) for k in ("s32", "u32", "s64")),
    *((f"min.{k}", [k, k], k, min) for k in ("s32", "u32", "s64")),
    *((f"and.{k}", [k, k], k, lambda a, b: a & b) for k in ("pred", "b16", "b32", "b64")),
    *((f"or.{k}", [k, k], k, lambda a, b: a | b) for k in ("pred", "b16", "b32", "b64")),
    *((f"xor.{k}", [k, k], k, lambda a, b: a ^ b) for k in ("pred", "b16", "b32", "b64")),
    *((f"not.{k}", [k], k, lambda a: ~a) for k in ("b16", "b32", "b64")),
    ("not.pred", ["pred"], "pred", lambda a: not a),
    *((f"mov.{k}", [k], k, lambda a: a) for k in ("pred", "b16", "u16", "b32", "u32", "b64", "u64")),
    ("mov.f32", ["f32"], "f32", lambda a: int(f32(a).view("u4"))),
    ("selp.f32", ["f32", "f32", "pred"], "f32", lambda a, b, c: int(f32(a if c else b).view("u4"))),
    *((f"selp.{k}", [k, k, "pred"], k, lambda a, b, c: a if c else b) for k in ("b16", "b32", "b64", "s32", "u32")),
    ("popc.b32", ["b32"], "u32", lambda a: a.bit_count()),
    *((f"shl.{k}", [k, "u32"], k, lambda a, n: a << min(n, 64)) for k in ("b16", "b32", "b64")),
    *((f"shr.{k}", [k, "u32"], k, lambda a, n: a >> min(n, 64)) for k in ("u16", "u32", "u64", "s16", "s32", "s64")),
    *((f"setp.{name}.{k}", [k, k], "pred", test) for k in ("s16", "s32", "s64", "u32", "u64") for name, test in [
        ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b), ("lt", lambda a, b: a < b),
        ("le", lambda a, b: a <= b), ("gt", lambda a, b: a > b), ("ge", lambda a, b: a >= b)]),
    *((f"setp.{name}.{k}", [k, k], "pred", test) for k in ("b16", "b32", "b64") for name, test in [
        ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b)]),
    ("setp.lt.and.s32", ["s32", "s32", "pred"], "pred", lambda a, b, c: a < b and c),
    ("setp.eq.or.s32", ["s32", "s32", "pred"], "pred", lambda a, b, c: a == b or c),
    *((f"setp.{name}.f32", ["f32", "f32"], "pred", test) for name, test in [
        ("eq", ordered(lambda a, b: a == b)), ("ne", ordered(lambda a, b: a != b)), ("lt", ordered(lambda a, b: a < b)),
        ("le", ordered(lambda a, b: a <= b)), ("gt", ordered(lambda a, b: a > b)), ("ge", ordered(lambda a, b: a >= b)),
        ("num", ordered(lambda a, b: True)), ("nan", unordered(lambda a, b: False)),
        ("neu", lambda a, b: a != b), ("equ", unordered(lambda a, b: a == b)),
        ("ltu", unordered(lambda a, b: a < b)), ("gtu", unordered(lambda a, b: a > b)),
        ("leu", unordered(lambda a, b: a <= b)), ("geu", unordered(lambda a, b: a >= b))]),
    *((f"cvt.{to}.{of}", [of], to, lambda a: a) for to, of in [
        ("s64", "s32"), ("u64", "u32"), ("u32", "u64"), ("u16", "u32"), ("u32", "u16"), ("s32", "s16"),
        ("s64", "s16")]),
    *((f"cvt.rn.f32.{k}", [k], "f32", lambda a: rounded(Fraction(a), "f32")) for k in ("s32", "u32", "s64")),
    ("cvt.rn.bf16.f32", ["f32"], "b16", convert("bf16")), ("cvt.rn.f16.f32", ["f32"], "b16", convert("f16")),
    ("cvt.f32.bf16", ["bf16"], "f32", lambda a: int(f32(a).view("u4"))),
    ("cvt.f32.f16", ["f16"], "f32", lambda a: int(f32(a).view("u4"))),
    ("cvt.rna.tf32.f32", ["f32"], "tf32", to_tf32),
    ("cvt.rn.bf16x2.f32", ["f32", "f32"], "b32", lambda a, b: convert("bf16")(a) << 16 | convert("bf16")(b)),
    ("cvt.rn.f16x2.f32", ["f32", "f32"], "b32", lambda a, b: convert("f16")(a) << 16 | convert("f16")(b)),
    ("add.f32", ["f32", "f32"], "f32", ADD), ("add.rn.f32", ["f32", "f32"], "f32", ADD),
    ("sub.f32", ["f32", "f32"], "f32", SUB), ("sub.rn.f32", ["f32", "f32"], "f32", SUB),
    ("mul.f32", ["f32", "f32"], "f32", MUL), ("mul.rn.f32", ["f32", "f32"], "f32", MUL),
    ("fma.rn.f32", ["f32", "f32", "f32"], "f32", FMA),
    ("fma.rn.f32.bf16", ["bf16", "bf16", "f32"], "f32", FMA), ("fma.rn.f32.f16", ["f16", "f16", "f32"], "f32", FMA),
    ("div.rn.f32", ["f32", "f32"], "f32", float_arithmetic(lambda a, b: a / b, lambda a, b: a / b)),
    ("max.f32", ["f32", "f32"], "f32", lambda a, b: int(np.fmax(f32(a), f32(b)).view("u4"))),
    ("min.f32", ["f32", "f32"], "f32", lambda a, b: int(np.fmin(f32(a), f32(b)).view("u4"))),
    ("neg.f32", ["f32"], "f32", lambda a: int((-f32(a)).view("u4"))),
]  # fmt: skip


@pytest.mark.parametrize(("form", "sources", "result", "compute"), PLAIN, ids=[case[0] for case in PLAIN])
def test_arithmetic(form, sources, result, compute):
    names = [register(kind, 1 + i) for i, kind in enumerate(sources)]
    target = register(result, 0)
    for seed in range(6):
        values = [inputs(kind, seed + 10 * i) for i, kind in enumerate(sources)]
        if form.startswith("sh"):
            values[1] %= np.uint32(70)  # beyond the width, too
        got = execute(
            f"{form} %{target}, {', '.join('%' + name for name in names)}", dict(zip(names, values, strict=True))
        )(target)
        for lane in range(LANES):
            operands = [number(value[lane], kind) for value, kind in zip(values, sources, strict=True)]
            expected = compute(*operands)
            assert same(got[lane], expected, result), (operands, hex(int(got[lane])), hex(int(expected)))


def test_square_root_is_the_nearest():
    for seed in range(6):
        raw = inputs("f32", seed) & np.uint32(0x7FFFFFFF)
        got = execute("sqrt.rn.f32 %r0, %r1", {"r1": raw})("r0").view("f4")
        for x, root in zip(raw.view("f4"), got, strict=True):
            if np.isfinite(x):
                low, high = (Fraction(float(root)) + Fraction(float(np.spacing(root))) * k / 2 for k in (-1, 1))
                assert max(low, 0) ** 2 <= Fraction(float(x)) <= high**2
            else:
                assert np.isnan(x) == np.isnan(root)


def test_fused_products_are_rounded_once():
    """Where a float64 sum lies halfway between two float32 numbers and the exact one does not, and with subnormals."""
    a, b, c = (np.ones(LANES, "f4") for _ in range(3))
    a[0], b[0], c[0] = 1 + 2**-12, 1 + 2**-12, 2.0**-80  # the exact product of the first two is a tie
    a[1], b[1], c[1] = 1 + 2**-12, 1 + 2**-12, -(2.0**-80)
    a[2], b[2], c[2] = 2.0**-75, 2.0**-75, 2.0**-149
    a[3], b[3], c[3] = 2.0**-75, -(2.0**-75), 2.0**-149
    a[4], b[4], c[4] = 2.0**-75, 2.0**-76, 2.0**-126
    got = execute("fma.rn.f32 %r0, %r1, %r2, %r3", {"r1": a.view("u4"), "r2": b.view("u4"), "r3": c.view("u4")})("r0")
    for lane in range(5):
        exact = Fraction(float(a[lane])) * Fraction(float(b[lane])) + Fraction(float(c[lane]))
        assert int(got[lane]) == rounded(exact, "f32"), lane
    twice = (a.astype("f8") * b + c).astype("f4").view("u4")
    assert (got[:5] != twice[:5]).any(), "rounding twice would have passed, too"


@pytest.mark.parametrize(
    "form", ["add.rn.f32x2", "add.f32x2", "sub.f32x2", "mul.rn.f32x2", "mul.f32x2", "fma.rn.f32x2"]
)
def test_pairs_of_floats(form):
    operation = form.replace(".f32x2", ".f32")
    count = 3 if form.startswith("fma") else 2
    halves = [[inputs("f32", 7 * k + half) for k in range(count)] for half in (0, 1)]
    pairs = [low.astype("u8") | high.astype("u8") << np.uint64(32) for low, high in zip(*halves, strict=True)]
    names = ["rd1", "rd2", "rd3"][:count]
    got = execute(f"{form} %rd0, {', '.join('%' + n for n in names)}", dict(zip(names, pairs, strict=True)))("rd0")
    for half in (0, 1):
        singles = dict(zip(["r1", "r2", "r3"], halves[half], strict=False))
        alone = execute(f"{operation} %r0, {', '.join('%' + n for n in singles)}", singles)("r0")
        part = (got >> np.uint64(32 * half)).astype("u4")
        assert all(same(x, y, "f32") for x, y in zip(part, alone, strict=True))


@pytest.mark.parametrize("first", [0, 3, 8, 31])
@pytest.mark.parametrize("length", [1, 8, 24])
def test_bit_fields(first, length):
    if first + length > 32:
        with pytest.raises(UnsupportedError):
            execute(f"bfe.u32 %r0, %r1, {first}, {length}", {"r1": inputs("u32", 0)})
        return
    raw = inputs("u32", 0)
    unsigned = execute(f"bfe.u32 %r0, %r1, {first}, {length}", {"r1": raw})("r0")
    signed = execute(f"bfe.s32 %r0, %r1, {first}, {length}", {"r1": raw})("r0")
    for x, u, s in zip(raw.tolist(), unsigned.tolist(), signed.tolist(), strict=True):
        field = x >> first & (2**length - 1)
        assert u == field
        assert s == (field - (field >> (length - 1) << length)) % 2**32


@pytest.mark.parametrize("selector", ["0x3340U", "0x7531", "0x0246"])
def test_bytes_are_chosen_from_two_words(selector):
    a, b = inputs("b32", 0), inputs("b32", 1)
    got = execute(f"prmt.b32 %r0, %r1, %r2, {selector}", {"r1": a, "r2": b})("r0")
    digits = int(selector.rstrip("U"), 16)
    for x, y, word in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        eight = x | y << 32
        assert word == sum((eight >> 8 * (digits >> 4 * k & 15) & 255) << 8 * k for k in range(4))


def test_shifts_by_numbers():
    raw = inputs("b32", 0)
    for by in (0, 1, 31, 32, 40):
        left = execute(f"shl.b32 %r0, %r1, {by}", {"r1": raw})("r0")
        arithmetic = execute(f"shr.s32 %r0, %r1, {by}", {"r1": raw})("r0")
        assert left.tolist() == [(x << by) % 2**32 for x in raw.tolist()]
        assert arithmetic.tolist() == [(number(x, "s32") >> by) % 2**32 for x in raw]


def test_packing_and_unpacking():
    low, high, wide = inputs("b16", 0), inputs("b16", 1), inputs("b64", 2)
    assert (
        execute("mov.b32 %r0, {%rs1, %rs2}", {"rs1": low, "rs2": high})("r0") == low + high * np.uint32(2**16)
    ).all()
    words = execute("mov.b64 %rd0, {%r1, %r2}", {"r1": wide.astype("u4"), "r2": (wide >> np.uint64(32)).astype("u4")})
    assert (words("rd0") == wide).all()
    halves = execute("mov.b32 {%rs1, %rs2}, %r1", {"r1": low + high * np.uint32(2**16)})
    assert (halves("rs1") == low).all()
    assert (halves("rs2") == high).all()
    upper = execute("mov.b64 {_, %r2}, %rd1", {"rd1": wide})("r2")
    assert (upper == wide >> np.uint64(32)).all()


def test_numbers_as_operands():
    one = np.ones(LANES, "u4")
    assert (execute("add.s32 %r0, %r1, -3", {"r1": one})("r0") == 2**32 - 2).all()
    assert (execute("mov.b32 %r0, 0f3F800000", {})("r0") == 0x3F800000).all()
    assert (execute("mov.b64 %rd0, 0x100000000", {})("rd0") == 2**32).all()
    assert (execute("selp.b32 %r0, 1, 2, %p1", {"p1": np.zeros(LANES, bool)})("r0") == 2).all()
    assert execute("and.pred %p0, %p1, !%p2", {"p1": one > 0, "p2": one < 0})("p0").all()
    assert (execute("mov.pred %p0, -1", {})("p0")).all()


SHUFFLES = [("bfly", 16, 31), ("bfly", 5, 31), ("up", 3, 0), ("down", 3, 31), ("idx", 7, 31), ("bfly", 3, 0x1807),
            ("idx", 2, 0x181F), ("up", 2, 0x1800), ("down", 2, 0x1807)]  # fmt: skip


@pytest.mark.parametrize(("mode", "by", "clamp"), SHUFFLES)
@pytest.mark.parametrize("is_constant", [True, False])
def test_shuffles(mode, by, clamp, is_constant):
    values = inputs("b32", 0)
    operands = {"r1": values, "r2": np.full(LANES, by, "u4"), "r3": np.full(LANES, clamp, "u4")}
    b, c = (by, clamp) if is_constant else ("%r2", "%r3")
    got = execute(f"shfl.sync.{mode}.b32 %r0, %r1, {b}, {c}, -1", operands)("r0")
    mask, end = clamp >> 8 & 31, clamp & 31
    for lane in range(LANES):
        lowest = lane & mask
        highest = lowest | (end & ~mask)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~mask)}[mode]
        is_there = source >= highest if mode == "up" else source <= highest
        assert got[lane] == values[source if is_there else lane]


@pytest.mark.parametrize(("form", "compute"), [
    ("redux.sync.add.s32", sum), ("redux.sync.max.s32", max), ("redux.sync.min.s32", min)])  # fmt: skip
def test_reductions_of_a_warp(form, compute):
    values, everybody = inputs("s32", 0), np.full(LANES, 2**32 - 1, "u4")
    got = execute(f"{form} %r0, %r1, %r2", {"r1": values, "r2": everybody})("r0")
    assert (got == compute(number(x, "s32") for x in values) % 2**32).all()
    with pytest.raises(RuntimeError, match="some of the lanes"):
        execute(f"{form} %r0, %r1, %r2", {"r1": values, "r2": everybody - np.uint32(1)})


def test_votes():
    flags = inputs("pred", 0)
    got = execute("vote.sync.ballot.b32 %r0, %p1, -1", {"p1": flags})("r0")
    assert (got == sum(1 << lane for lane in range(LANES) if flags[lane])).all()


def test_predicates_and_masks_keep_what_was_there():
    flags, a, b = inputs("pred", 0), inputs("b32", 0), inputs("b32", 1)
    for text, chosen in (("@%p1", flags), ("@!%p1", ~flags)):
        got = execute(f"{text} mov.b32 %r0, %r1", {"p1": flags, "r0": a, "r1": b})("r0")
        assert (got == np.where(chosen, b, a)).all()
    (instr, _) = parse(""".entry k(.param .u64 a) .reqntid 32 { .reg .b32 %r<2>; mov.b32 %r0, %r1; ret; }""").instrs
    assert instr.writes() != instr.reads()


UNKNOWN = [
    "add.sat.s32 %r0, %r1, %r2", "add.rz.f32 %r0, %r1, %r2", "fma.rz.f32 %r0, %r1, %r2, %r3",
    "div.full.f32 %r0, %r1, %r2",
    "sqrt.approx.f32 %r0, %r1", "mul.hi.f32 %r0, %r1, %r2", "div.s64 %rd0, %rd1, %rd2",
    "lop3.b32 %r0, %r1, %r2, %r3, 7",
    "cvt.rz.bf16.f32 %rs0, %r1", "cvt.rn.bf16x2.f32 %r0, %r1", "cvt.rzi.s32.f32 %r0, %r1", "add.s64 %rd0, %r1, %rd2",
    "shfl.sync.bfly.b32 %r0, %r1, 1, 31, 15", "setp.foo.s32 %p0, %r1, %r2", "and.s32 %r0, %r1, %r2",
    "ld.const.b32 %r0, [%rd1]", "ld.volatile.global.b32 %r0, [%rd1]", "ld.global.nc.b32 %r0, [%rd1]",
    "ld.global.v2.b32 %r0, [%rd1]",
    "st.global.release.gpu.b32 [%rd1], %r0", "atom.global.cta.acq_rel.add.u32 %r0, [%rd1], %r2",
    "atom.global.gpu.acq_rel.add.f32 %r0, [%rd1], %r2", "atom.global.gpu.acq_rel.cas.b32 %r0, [%rd1], %r2, %r3",
    "fence.acq_rel.gpu", "membar.gl", "bar.arrive 0, 64", "bar.sync %r1", "@%p1 ret.uni",
    "mbarrier.init.shared::cta.b64 [%r1], 1",
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6}, {%r0,%r1,%r2,%r3}",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0,%r1,%r2,%r3}, %rd1, %rd2, %p1, 1, 1, 1, 2",
    "prmt.b32 %r0, %r1, %r2, %r3", "prmt.b32 %r0, %r1, %r2, 0x3348", "prmt.b32.f4e %r0, %r1, %r2, 1",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0,%r1,%r2,%r3}, %rd1, %rd2, %p1, -1, 1, 0, 0",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%r1]", "cp.async.bulk.shared.global [%r1], [%rd1], 16, [%r2]",
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32", "mov.b32 %r0, %clock",
]  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_is_refused_before_anything_runs(text):
    source = f""".visible .entry k(.param .u64 a) .reqntid 32 {{
        .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<8>; .reg .b64 %rd<8>; bra $END; {text}; $END: ret; }}"""
    with pytest.raises(UnsupportedError):
        Program(source)


@pytest.mark.parametrize("source", [
    "", ".entry a() .reqntid 32 { ret; } .entry b() .reqntid 32 { ret; }", ".entry a() { ret; }",
    ".entry a() .reqntid 33 { ret; }",
    ".shared .b8 x[16]; .shared .b8 y[16]; .entry a() .reqntid 32 { ret; }",
    ".entry a() .reqntid 32 { bra $GONE; ret; }",
    ".entry a() .reqntid 32 { ret }",
])  # fmt: skip
def test_modules_of_another_kind_are_refused(source):
    with pytest.raises(UnsupportedError):
        Program(source)
