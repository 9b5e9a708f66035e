"""Arithmetic of PTX that NumPy does not have, on arrays of a warp's 32 lanes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

LANES = 32
LANE = np.arange(LANES)
NAN16 = np.uint16(0x7FFF)  # what conversions to 16 bits make of any NaN


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to the nearest, ties to even."""
    word = x.view("u4")
    half = ((word >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return np.where(np.isnan(x), NAN16, ((word + half) >> np.uint32(16)).astype("u2"))


def f16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of float16, to the nearest, ties to even."""
    return np.where(np.isnan(x), NAN16, x.astype("f2").view("u2"))


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest tf32, ties away from zero."""
    word = x.view("u4")
    return np.where(np.isfinite(x), (word + np.uint32(0x1000)) & np.uint32(0xFFFFE000), word)


TIE, BELOW_FLOAT32 = np.uint64(1 << 28), np.uint64((1 << 29) - 1)
SMALL = 2.0**-125  # below twice the smallest normal float32 the ties are elsewhere


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` of float32, rounded once.

    In float64 the product is exact and the sum is rounded; where that is halfway between two float32 numbers, or the
    result is so small that float32 has fewer bits, exact fractions decide.
    """
    wide = a.astype("f8") * b + c
    result = wide.astype("f4")
    unsure = ((wide.view("u8") & BELOW_FLOAT32) == TIE) | ((np.abs(wide) < SMALL) & (wide != 0))
    if b"\1" in unsure.tobytes():
        for k in np.flatnonzero(unsure & np.isfinite(wide)):
            exact = Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(float(c[k]))
            result[k] = _nearest_float32(exact)
    return result


def _nearest_float32(x: Fraction) -> np.float32:
    """``x`` to the nearest, ties to even."""
    size = abs(x)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length() - 24, -149)
    while size >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return np.float32(np.ldexp(float(round(x / Fraction(2) ** exponent)), exponent))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division towards zero, of 16 or 32 bits; of a division by zero all bits are set.

    Exact, since the quotient of two 32-bit numbers differs from a whole number by 2**-32 or not at all.
    """
    zero = b == 0
    result = np.trunc(a.astype("f8") / np.where(zero, b.dtype.type(1), b)).astype("i8").astype(a.dtype)
    return np.where(zero, ~np.zeros_like(a), result)


def mul_hi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of a 64-bit product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = f"{a.dtype.kind}8"
        return ((a.astype(wide) * b.astype(wide)) >> np.array(bits, wide)).astype(a.dtype)
    return np.array([(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)], "u8").view(a.dtype)


def count_bits(a: np.ndarray) -> np.ndarray:
    """How many bits of each word are set, uint32; NumPy has a function for it since 2.0 only."""
    return np.unpackbits(a[..., None].view("u1"), axis=-1).sum(axis=-1, dtype="u4")


def shift(a: np.ndarray, n: np.ndarray, left: bool) -> np.ndarray:
    """Shifts by more than the width give what is left: zeros, or the sign."""
    bits = a.dtype.itemsize * 8
    by = np.minimum(n, np.uint32(bits - 1)).astype(a.dtype)
    shifted = a << by if left else a >> by
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))


def permute(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """Four of the eight bytes of two words, each named by four bits of ``selector``."""
    eight = np.stack([a, b], axis=-1).view("u1")
    chosen = eight[..., [selector >> 4 * k & 7 for k in range(4)]]
    return np.ascontiguousarray(chosen).view("u4")[..., 0]


def shuffle_sources(mode: str, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The lane that each lane of ``shfl.sync`` takes its value from."""
    segment, clamp, by = (c.astype(int) >> 8) & 31, c.astype(int) & 31, b.astype(int) & 31
    lowest = LANE & segment
    limit = lowest | (clamp & ~segment)
    source = {"up": LANE - by, "down": LANE + by, "bfly": LANE ^ by, "idx": lowest | (by & ~segment)}[mode]
    return np.where(source >= limit if mode == "up" else source <= limit, source, LANE)


def shuffle(mode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``shfl.sync`` of all lanes."""
    return a[shuffle_sources(mode, b, c)]


REDUCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or}


def reduce_warp(operation: str, a: np.ndarray, members: np.ndarray) -> np.ndarray:
    """``redux.sync`` of all lanes."""
    if (members != 0xFFFFFFFF).any():
        raise RuntimeError("redux.sync by some of the lanes only")
    return np.full(LANES, REDUCTIONS[operation].reduce(a, dtype=a.dtype))
