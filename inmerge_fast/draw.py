"""The random draw: which filters look at a partner, and at which one.

Every decision is a pure function of ``(seed, step, layer, filter)``, computed by the counter-based generator
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so it is the same on every
device, for every dtype and world size, and whichever other layers take part. ``kernels/draw.py`` is the same draw in
Triton, bit for bit.

The contract: key = seed (64 bit), counter = (filter, layer, step's low word, step's high word), output words r0..r3;

- coin = ``(r0 >> 8) < coin_threshold(prob)``, exact at prob 0 and 1 and within 2**-25 of prob in between;
- with n filters per group, the partner's place in its group is ``k = floor((n - 1) * (r1 * 2**32 + r2) / 2**64)``,
  plus 1 if ``k`` is at or past the filter's own place, so that it is uniform over the others (bias below n / 2**64);
- for ``partner="similar"``, every other filter j of the group has a 31-bit priority for this filter: the first output
  word of Philox4x32-10 with key = ``r2 * 2**32 + r1`` and counter = (j, 0, 0, 0), shifted right by 1. The partner is
  the one of highest priority among those above the threshold, the lowest j on ties, so it is uniform over them
  (bias below n / 2**31) in whatever order they are looked at, and stays the same while no other one qualifies.
"""

from __future__ import annotations

import numbers

import numpy as np
import numpy.typing as npt

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10

MAX_SEED = 2**64 - 1
MAX_STEP = 2**63 - 1
MAX_LAYER = 2**31 - 1


def philox4x32(
    key: int | npt.NDArray[np.uint64], c0: npt.ArrayLike, c1: npt.ArrayLike, c2: npt.ArrayLike, c3: npt.ArrayLike
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Philox4x32-10 of the counters ``(c0, c1, c2, c3)`` under a 64-bit ``key``.

    Args:
        key: the key, ``0 <= key < 2**64``, or an array of keys that broadcasts against the counters.
        c0: first counter word, as are ``c1``, ``c2``, ``c3``: integers or integer arrays in ``[0, 2**32)`` that
            broadcast against each other.

    Returns:
        The four output words as uint64 arrays of the broadcast shape, each value below 2**32.
    """
    # In uint64 throughout: NumPy 1 makes float64 of a uint64 and a Python integer.
    key = np.asarray(key, np.uint64)
    k0, k1 = key & _MASK, key >> _SHIFT
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) for c in (c0, c1, c2, c3)))
    for _ in range(_ROUNDS):
        product0 = x0 * _MULTIPLIERS[0]  # 32 x 32 bits: exact in 64
        product1 = x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> _SHIFT) ^ x1 ^ k0,
            product1 & _MASK,
            (product0 >> _SHIFT) ^ x3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def coin_threshold(prob: float) -> int:
    """``prob`` as the integer in [0, 2**24] that 24 random bits are compared with, on the CPU and in the kernel."""
    return round(prob * 2**24)


def draw_filters(
    seed: int,
    step: int,
    layer: npt.ArrayLike,
    filter_index: npt.ArrayLike,
    group_size: npt.ArrayLike,
    prob: float,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """The draw of any set of filters, of one layer or of a whole model at once.

    Args:
        seed: 64-bit seed.
        step: 63-bit step.
        layer: layer id of each filter, int or int array.
        filter_index: index of each filter in its layer, int array of shape ``(rows,)``.
        group_size: number of filters per group of each filter's layer, int or int array, at least 2.
        prob: probability of the coin, in [0, 1].

    Returns:
        coin: bool array ``(rows,)``, True where the filter looks at its partner.
        partner: int64 array ``(rows,)``, index of the partner in the filter's layer (in the same group, never itself).
            It is drawn for every filter, whatever its coin.
    """
    row = np.asarray(filter_index, dtype=np.int64)
    size = np.asarray(group_size, dtype=np.int64)
    r0, r1, r2, _ = philox4x32(seed, row, layer, step & 0xFFFFFFFF, step >> 32)
    coin = (r0 >> np.uint64(8)) < np.uint64(coin_threshold(prob))
    others = (size - 1).astype(np.uint64)
    place = ((r1 * others + ((r2 * others) >> _SHIFT)) >> _SHIFT).astype(np.int64)
    own_place = row % size
    partner = row - own_place + place + (place >= own_place)
    return coin, partner


def priority_keys(seed: int, step: int, layer: npt.ArrayLike, filter_index: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Each filter's 64-bit key for :func:`priorities`; arguments as in :func:`draw_filters`."""
    _, r1, r2, _ = philox4x32(seed, filter_index, layer, step & 0xFFFFFFFF, step >> 32)
    return (r2 << _SHIFT) | r1


def priorities(key: npt.NDArray[np.uint64], other: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Priorities of candidates as partners under ``partner="similar"``; the highest is taken.

    Args:
        key: keys of the filters that look for a partner, from :func:`priority_keys`.
        other: indices of the candidates in the same layer; broadcasts against ``key``.

    Returns:
        int64 array of the broadcast shape, each value in ``[0, 2**31)``.
    """
    word, _, _, _ = philox4x32(key, other, 0, 0, 0)
    return (word >> np.uint64(1)).astype(np.int64)


def draw(
    seed: int, step: int, layer: int, filters: int, prob: float, *, groups: int = 1
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Coins and partners of one layer, as :func:`inmerge_fast.merge_` draws them.

    Args:
        seed: ``0 <= seed < 2**64``.
        step: ``0 <= step < 2**63``.
        layer: the layer's id, ``0 <= layer < 2**31``: its place among all candidate layers of the model.
        filters: number of filters N of the layer, a multiple of ``groups`` with at least 2 filters per group.
        prob: probability that a filter looks at its partner, in [0, 1].
        groups: number of groups; partners come from the filter's own group.

    Returns:
        coin: bool array ``(filters,)``.
        partner: int64 array ``(filters,)`` of indices in ``[0, filters)``; ``partner[i] != i``.

    Raises:
        TypeError: an argument is not a number of the right kind.
        ValueError: an argument is out of its range.

    Example::

        coin, partner = inmerge_fast.draw(seed=1, step=0, layer=0, filters=8, prob=0.5)
    """
    for name, value, top in (("seed", seed, MAX_SEED), ("step", step, MAX_STEP), ("layer", layer, MAX_LAYER)):
        check_word(name, value, top)
    check_word("filters", filters, 2**31 - 1)
    check_word("groups", groups, 2**31 - 1)
    if isinstance(prob, bool) or not isinstance(prob, numbers.Real):
        raise TypeError(f"prob must be a number, got {prob!r}")
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    if groups < 1 or filters % groups or filters // groups < 2:
        raise ValueError(f"filters must be a multiple of groups with at least 2 per group, got {filters} and {groups}")
    return draw_filters(int(seed), int(step), layer, np.arange(filters), filters // groups, float(prob))


def check_share(name: str, value: object, *, low: float = 0.0) -> None:
    """Check a number that must lie in ``[low, 1]``.

    Raises:
        TypeError: not a number.
        ValueError: out of range, or NaN.
    """
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= 1.0:  # type: ignore[operator]  # NaN fails too
        raise ValueError(f"{name} must be in [{low:g}, 1], got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Check a switch.

    Raises:
        TypeError: not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_word(name: str, value: object, top: int) -> None:
    """Check an unsigned integer argument.

    Raises:
        TypeError: not an integer.
        ValueError: not in ``[0, top]``.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 0 <= value <= top:  # type: ignore[operator]
        raise ValueError(f"{name} must be in [0, 2**{(top + 1).bit_length() - 1}), got {value!r}")
