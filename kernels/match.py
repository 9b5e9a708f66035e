"""Partners by similarity: every sampled filter against all others of its group, for all layers of a kind at once.

``_list_kernel`` lists the sampled filters of each group, so that the 70 % of filters whose coin did not fall (at prob
0.3) cost nothing, and measures every filter's norm once. ``_match_kernel`` computes tiles of similarities as matrix
products and keeps of each row one 64-bit word, the best pair so far: the upper half ranks the pair, the lower half is
``2**31 - 1 - j``, so that the largest word has the lowest j among equal ranks. No similarity is ever in memory, and
since the maximum of integers depends on no order, neither does the result. ``kernels/count.py`` makes partners of the
words.

- ``"nearest"`` ranks a pair by its similarity.
- ``"similar"`` ranks the pairs above the threshold at random (``inmerge_fast/draw.py`` has the contract), so that the
  largest is any one of them: one pass, and no list of who qualifies.

Numbers: float32 filters are multiplied as three TF32 products each (``tf32x3``), which Triton sums in blocks of DEPTH
elements on the tensor cores and from block to block in float32; 16-bit filters are multiplied exactly and summed on the
tensor cores, which truncate. Expected error of a similarity, from an emulation (tests/test_match_kernels.py) and not
yet measured on a GPU: 8e-7 and 7e-6 for 4,608 elements; one TF32 product alone would be off by 4e-5 to 3e-4. The tests
allow 5e-6 and 3e-5. The merge kernel measures the chosen pair again, to 4e-7, and decides.

A tile of weights is loaded for ``tl.dot`` and for nothing else. When the norms were summed from the same tiles, Triton
3.6 and 3.7 gave their pipeline on Hopper one stage too few: the copy of a tile to come overwrote one that a matrix
product in flight still read, and at the latest legal timing half of the nearest partners of 16-bit filters were wrong.

Hazards: weights, partners and lists are only read; ``best`` is written by atomics alone.
"""

import triton
import triton.language as tl

from .rows import (
    MIN_NORM,
    alignment,
    filter_at,
    geometry_of,
    is_used,
    key_of,
    layer_threshold,
    offsets_at,
    weight_of,
)
from .tables import (
    ALWAYS,
    COLUMNS,
    FIRST_ROW,
    FURTHEST_ROW,
    GROUP_SIZE,
    KIND,
    LAYER_ID,
    NO_PAIR,
    SEED,
    STEP,
    STRIDED,
    WORK_COLUMN,
    WORK_COLUMN_END,
    WORK_COLUMNS,
    WORK_GROUP_ROW,
    WORK_LAYER,
    WORK_RANK,
)

NO_KEY = tl.constexpr(-(2**31))  # below every key


@triton.jit
def _list(group, partner_ptr, list_ptr, best_ptr, similarity_ptr, BLOCK: tl.constexpr):
    """The places of a group's sampled filters, in order, and what these start from."""
    first = tl.load(group)
    size = tl.load(group + 1)
    listed = size * 0
    for o_block in range(0, size, BLOCK):
        place = o_block + tl.arange(0, BLOCK)
        i_row = first + place
        m_sampled = tl.load(partner_ptr + i_row, mask=place < size, other=-1) >= 0
        rank = listed + tl.cumsum(m_sampled.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + first + rank, place, mask=m_sampled)
        tl.store(best_ptr + i_row, NO_PAIR, mask=m_sampled)
        tl.store(similarity_ptr + i_row, float("nan"), mask=m_sampled)
        listed += tl.sum(m_sampled.to(tl.int32), axis=0)
    for o_block in range(0, size, BLOCK):
        rank = o_block + tl.arange(0, BLOCK)
        tl.store(list_ptr + first + rank, -1, mask=(rank >= listed) & (rank < size))


@triton.jit
def _inverse_norms(weight, i_filter, m_i, geometry, DENSE: tl.constexpr, DEPTH: tl.constexpr):
    """One over the norm of some filters, in float32; 0 for those that are not finite."""
    p_i = filter_at(weight, i_filter, geometry, DENSE)
    squares = tl.zeros([i_filter.shape[0], DEPTH], tl.float32)
    for o_block in range(0, geometry[0], DEPTH):
        o, m = offsets_at(o_block, geometry, DENSE, DEPTH)
        b_i = tl.load(p_i[:, None] + o[None, :], mask=m_i[:, None] & m[None, :], other=0.0).to(tl.float32)
        squares = tl.fma(b_i, b_i, squares)
    squares = tl.sum(squares, axis=1)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), MIN_NORM))
    return tl.where(squares < float("inf"), inverse, 0.0)  # false for NaN


@triton.jit(do_not_specialize=["groups"])
def _list_kernel(
    layer_ptr, group_ptr, block_ptr, partner_ptr, list_ptr, best_ptr, similarity_ptr, inverse_norm_ptr, groups,
    HAS_FLOAT32: tl.constexpr, HAS_BFLOAT16: tl.constexpr, HAS_FLOAT16: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_STRIDED: tl.constexpr,
    BLOCK: tl.constexpr, FILTERS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """List the places of each group's sampled filters, in order; the rest of the group's part of the list is -1.

    Also sets what a sampled filter starts from: no pair in ``best``, and no similarity, which stays if none is found.
    And ``inverse_norm`` of all filters, sampled or not: float32, one over the norm, 0 for those that are not finite.

    Grid: ``(groups + blocks,)``; ``group`` (int32, ``(groups, 2)``) has each one's first row and size, ``block``
    (int32, ``(blocks, 3)``) the layer and the first and last row of up to FILTERS filters, to be measured DEPTH
    elements at a time. Moves 24 bytes per row, and loads the weights once.
    """
    pid = tl.program_id(0)
    if pid < groups:
        _list(group_ptr + 2 * pid, partner_ptr, list_ptr, best_ptr, similarity_ptr, BLOCK)
    else:
        block = block_ptr + 3 * (pid - groups)
        table = layer_ptr + tl.load(block).to(tl.int64) * COLUMNS
        i_row = tl.load(block + 1) + tl.arange(0, FILTERS)
        m_i = i_row <= tl.load(block + 2)
        i_filter = tl.where(m_i, i_row - tl.load(table + FIRST_ROW).to(tl.int32), 0)
        kind = tl.load(table + KIND).to(tl.int32)
        for CODE in tl.static_range(0, 8):
            if is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED):
                if kind == CODE:
                    inverse = _inverse_norms(
                        weight_of(table, CODE), i_filter, m_i, geometry_of(table, alignment(CODE)), CODE < STRIDED,
                        DEPTH // 2 if CODE >= STRIDED else DEPTH,
                    )  # fmt: skip
                    tl.store(inverse_norm_ptr + i_row, inverse, mask=m_i)


@triton.jit
def _philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10 of uint32 counters, with keys that broadcast to them.

    Triton's own unrolls its ten rounds, and interleaving them for a whole tile took 1,900 bytes of stack per thread.
    """
    for _ in range(0, 10):
        product = tl.umulhi(c2, tl.full([], 0xCD9E8D57, tl.uint32)) ^ c1 ^ k0
        c1 = tl.mul(c2, tl.full([], 0xCD9E8D57, tl.uint32), sanitize_overflow=False)
        c2 = tl.umulhi(c0, tl.full([], 0xD2511F53, tl.uint32)) ^ c3 ^ k1
        c3 = tl.mul(c0, tl.full([], 0xD2511F53, tl.uint32), sanitize_overflow=False)
        c0 = product
        k0 = tl.add(k0, tl.full([], 0x9E3779B9, tl.uint32), sanitize_overflow=False)
        k1 = tl.add(k1, tl.full([], 0xBB67AE85, tl.uint32), sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _priority(table, seed, step, i_filter, j_filter):
    """Priorities of pairs: the first word of (j, 0, 0, 0), the key being words 1 and 2 of row i's draw.

    That is drawn here again (as in ``kernels/draw.py``): kept from the start, it would take registers from products.
    """
    zero = tl.zeros_like(i_filter).to(tl.uint32)
    layer_id = tl.load(table + LAYER_ID)
    _r0, k0, k1, _r3 = _philox(
        zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32),
        i_filter.to(tl.uint32), zero + layer_id.to(tl.uint32),
        zero + step.to(tl.uint32), zero + (step >> 32).to(tl.uint32),
    )  # fmt: skip
    zero = tl.zeros([i_filter.shape[0], j_filter.shape[0]], tl.uint32)
    key, _r1, _r2, _r3 = _philox(k0[:, None], k1[:, None], zero + j_filter.to(tl.uint32)[None, :], zero, zero, zero)
    return (key >> 1).to(tl.int32)


@triton.jit
def _tile(weight, i_filter, j_filter, geometry, DENSE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """Dot products of a tile of pairs, in float32."""
    p_i = filter_at(weight, i_filter, geometry, DENSE)
    p_j = filter_at(weight, j_filter, geometry, DENSE)
    dots = tl.zeros([i_filter.shape[0], j_filter.shape[0]], tl.float32)
    for o_block in range(0, geometry[0], DEPTH):
        o, m = offsets_at(o_block, geometry, DENSE, DEPTH)
        b_i = tl.load(p_i[:, None] + o[None, :], mask=m[None, :], other=0.0)
        b_j = tl.load(p_j[:, None] + o[None, :], mask=m[None, :], other=0.0)
        dots = tl.dot(b_i, tl.trans(b_j), dots, input_precision=PRECISION)
    return dots


@triton.jit
def _best_of_tile(
    dots, inverse_i, inverse_j, place, column, table, seed, step, i_filter, j_filter, j_row, limit,
    SIMILAR: tl.constexpr,
):  # fmt: skip
    """The best pair of every row of a tile, packed; an inverse norm of 0 says that there is no such filter."""
    allowed = (inverse_i > 0)[:, None] & (inverse_j > 0)[None, :] & (place[:, None] != column[None, :])
    similarity = dots * inverse_i[:, None] * inverse_j[None, :]
    if SIMILAR:
        allowed &= (similarity > limit) | (limit == ALWAYS)
        key = tl.full(dots.shape, NO_KEY, tl.int32)
        # Flat, because Triton 3.7's compiler for sm_100 fails on a reduction of a reduction of 16-bit products here.
        any_allowed = tl.max(tl.reshape(allowed.to(tl.int32), [dots.shape[0] * dots.shape[1]]), axis=0)
        if any_allowed > 0:  # seldom: above the usual thresholds are few, and ranks cost as much as 500 elements
            key = _priority(table, seed, step, i_filter, j_filter)
    else:
        key = key_of(similarity + 0.0)  # -0 becomes 0
    key = tl.where(allowed, key, NO_KEY)
    best = tl.max(key, axis=1)
    j_best = tl.min(tl.where(key == best[:, None], j_row[None, :], FURTHEST_ROW), axis=1)
    packed = (best.to(tl.int64) << 32) | (j_best ^ FURTHEST_ROW).to(tl.int64)
    return tl.where(best > NO_KEY, packed, NO_PAIR)


@triton.jit(do_not_specialize=["seed", "step"])
def _match_kernel(
    layer_ptr, work_ptr, list_ptr, inverse_norm_ptr, best_ptr, call_ptr, seed: tl.uint64, step: tl.int64, threshold,
    CODE: tl.constexpr, SIMILAR: tl.constexpr, IN_MEMORY: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compare ROWS sampled filters of a group with some of its filters, and keep each one's best pair in ``best``.

    Lists and norms are those of ``_list_kernel``. All layers are of the kind CODE: with a loop for each kind in one
    kernel Triton moved the sums out of their registers before the last product was through, which ptxas answers by
    letting one product at a time run (its C7514).

    Grid: ``(items,)``; an item of ``work`` (int32) says which group, from which place in its list, and which columns,
    TILE at a time. Items beyond the end of the list do nothing.
    Computes 2 ROWS TILE D flops per tile, three times over for float32; loads (ROWS + TILE) D elements for them.
    """
    item = work_ptr + tl.program_id(0) * WORK_COLUMNS
    group_row = tl.load(item + WORK_GROUP_ROW)
    rank = tl.load(item + WORK_RANK) + tl.arange(0, ROWS)
    table = layer_ptr + tl.load(item + WORK_LAYER).to(tl.int64) * COLUMNS
    group_size = tl.load(table + GROUP_SIZE).to(tl.int32)
    place = tl.load(list_ptr + group_row + rank, mask=rank < group_size, other=-1)
    m_i = place >= 0
    if tl.max(place, axis=0) >= 0:
        first_filter = group_row - tl.load(table + FIRST_ROW).to(tl.int32)
        # Where the list or the group has ended, its first filter stands in; an inverse norm of 0 keeps it out of the
        # result. Masks in the loop of products would be 3 % of its instructions, and spill.
        i_filter = first_filter + tl.where(m_i, place, 0)
        if IN_MEMORY:
            seed = tl.load(call_ptr + SEED).to(tl.uint64)
            step = tl.load(call_ptr + STEP)
        step = step.to(tl.int64)  # the interpreter ignores the annotation
        limit = layer_threshold(table, threshold)
        weight, geometry = weight_of(table, CODE), geometry_of(table, alignment(CODE))
        top = tl.full([ROWS], NO_PAIR, tl.int64)
        for o_column in range(tl.load(item + WORK_COLUMN), tl.load(item + WORK_COLUMN_END), TILE):
            column = o_column + tl.arange(0, TILE)
            m_j = column < group_size
            j_filter = first_filter + tl.where(m_j, column, 0)
            dots = _tile(weight, i_filter, j_filter, geometry, CODE < STRIDED, DEPTH, PRECISION)
            inverse_i = tl.load(inverse_norm_ptr + group_row + place, mask=m_i, other=0.0)
            inverse_j = tl.load(inverse_norm_ptr + group_row + column, mask=m_j, other=0.0)
            best = _best_of_tile(
                dots, inverse_i, inverse_j, place, column, table, seed, step, i_filter, j_filter, group_row + column,
                limit, SIMILAR,
            )  # fmt: skip
            top = tl.maximum(top, best)
        tl.atomic_max(best_ptr + group_row + tl.where(m_i, place, 0), top, mask=top > NO_PAIR, sem="relaxed")
