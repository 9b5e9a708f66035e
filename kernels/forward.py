"""Merging for one forward and backward pass, and back: three launches, each of which writes what it does not read.

*save* copies the active rows to packed memory. *blend* then reads active rows from there (as partners; a row's own
program reads it where it lies), and all others from the weights, which nobody writes meanwhile, and writes the active
rows that merge. *restore* copies those back, to the bit. The boundary between two kernels is the whole protocol: no
row waits for another, so none of the counters of ``kernels/merge.py`` is needed, nor an order of rows.

A row's place in packed memory is handed out by one relaxed addition; there is enough of it for all rows but with a
probability of 1e-15 a call, in which a row that finds none is measured and left as it is.
"""

import triton
import triton.language as tl

from .rows import (
    add_three,
    alignment,
    block_of,
    copy_back,
    cosine,
    count_outcome,
    element_type,
    filter_at,
    geometry_of,
    is_only_kind,
    is_used,
    larger,
    layer_of,
    layer_threshold,
    offsets_at,
    weight_of,
)
from .tables import (
    ACTIVE_ROWS,
    ALWAYS,
    COLUMNS,
    FIRST_ROW,
    KIND,
    PASSED,
    SAMPLED,
    SCRATCH_USED,
    STRIDED,
)

NO_PLACE = tl.constexpr(-1)


@triton.jit
def _packed_row(packed, place, CODE: tl.constexpr):
    """Pointer to a row in packed memory, which is handed out in units of 16 bytes."""
    pointer = packed.to(tl.pointer_type(element_type(CODE)))
    return pointer + place.to(tl.int64) * (128 // element_type(CODE).primitive_bitwidth)


@triton.jit
def _save_row(p_i, p_packed, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    for o_block in range(0, geometry[0], BLOCK):
        o, m = offsets_at(o_block, geometry, DENSE, BLOCK)
        tl.store(p_packed + o_block + tl.arange(0, BLOCK), tl.load(p_i + o, mask=m), mask=m)


@triton.jit(do_not_specialize=["capacity", "programs"])
def _save_kernel(
    layer_ptr, row_layer_ptr, active_ptr, state_ptr, place_ptr, packed_ptr, capacity, programs,
    HAS_FLOAT32: tl.constexpr, HAS_BFLOAT16: tl.constexpr, HAS_FLOAT16: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_STRIDED: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the active rows to packed memory, and their places to ``place`` (int32, ``(rows,)``), NO_PLACE before.

    ``capacity`` is the size of packed memory in units of 16 bytes.

    Grid: ``(programs,)``, any number. Moves every active row in and out once. No hazard: a row is written to a place of
    its own, and read by nobody in this launch but the program that has it.
    """
    active_rows = tl.load(state_ptr + ACTIVE_ROWS)
    for t in range(tl.program_id(0), active_rows, programs):
        i_row = tl.load(active_ptr + t)
        table, first_row, kind = layer_of(layer_ptr, row_layer_ptr, i_row)
        for CODE in tl.static_range(0, 8):
            if is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED):
                if is_only_kind(HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED) or kind == CODE:
                    geometry = geometry_of(table, alignment(CODE))
                    units = tl.cdiv(geometry[0], 128 // element_type(CODE).primitive_bitwidth)
                    place = tl.atomic_add(state_ptr + SCRATCH_USED, units, sem="relaxed", scope="gpu")
                    if place + units <= capacity:
                        tl.store(place_ptr + i_row, place)
                        p_i = filter_at(weight_of(table, CODE), i_row - first_row, geometry, CODE < STRIDED)
                        _save_row(p_i, _packed_row(packed_ptr, place, CODE), geometry, CODE < STRIDED,
                                  block_of(CODE, BLOCK, STRIDED_BLOCK))  # fmt: skip


@triton.jit
def _pair_of_blocks(p_i, p_j, packed, o_block, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row and of its partner, which may be packed; zero beyond their end."""
    o, m = offsets_at(o_block, geometry, DENSE, BLOCK)
    o_j = o
    if not DENSE:
        o_j = tl.where(packed, o_block + tl.arange(0, BLOCK), o)
    b_i, b_j = tl.load(p_i + o, mask=m, other=0.0), tl.load(p_j + o_j, mask=m, other=0.0)
    return o, m, b_i.to(tl.float32), b_j.to(tl.float32)


@triton.jit
def _blend_row(p_i, p_j, packed, geometry, shares, limit, may_write, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """One active row; returns its similarity, whether it is finite, and whether it passed."""
    alpha, beta = shares
    zeros = tl.zeros([BLOCK], tl.float32)
    dot, square_i, square_j = zeros, zeros, zeros
    for o_block in range(0, geometry[0], BLOCK):
        _o, _m, b_i, b_j = _pair_of_blocks(p_i, p_j, packed, o_block, geometry, DENSE, BLOCK)
        dot = tl.fma(b_i, b_j, dot)
        square_i = tl.fma(b_i, b_i, square_i)
        square_j = tl.fma(b_j, b_j, square_j)
    dot, square_i, square_j = tl.reduce((dot, square_i, square_j), 0, add_three)
    similarity, finite = cosine(dot, square_i, square_j)
    passed = finite & ((similarity > limit) | (limit == ALWAYS)) & may_write
    if passed:
        for o_block in range(0, geometry[0], BLOCK):
            o, m, b_i, b_j = _pair_of_blocks(p_i, p_j, packed, o_block, geometry, DENSE, BLOCK)
            tl.store(p_i + o, (alpha * b_i + beta * b_j).to(p_i.dtype.element_ty), mask=m)
    return similarity, finite, passed


@triton.jit(do_not_specialize=["programs"])
def _blend_kernel(
    layer_ptr, row_layer_ptr, partner_ptr, active_ptr, state_ptr, similarity_ptr, outcome_ptr, times_ptr, largest_ptr,
    place_ptr, merged_ptr, packed_ptr, alpha, beta, threshold, programs,
    HAS_FLOAT32: tl.constexpr, HAS_BFLOAT16: tl.constexpr, HAS_FLOAT16: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_STRIDED: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
    NAIVE: tl.constexpr,
):  # fmt: skip
    """Measure the active rows, and write those that merge, which ``merged`` (int8, ``(rows,)``) then says.

    Grid: ``(programs,)``, any number. Moves every active row and its partner in once, those that merge twice (from
    cache as far as it lasts) and out once. No hazard: a weight is written by its row's program alone, after it was read
    there; all others read that row from packed memory. NAIVE, for the tests, has them read it where it lies.
    """
    largest_here = tl.program_id(0) * 0 - 2147483647 - 1
    active_rows = tl.load(state_ptr + ACTIVE_ROWS)
    for t in range(tl.program_id(0), active_rows, programs):
        i_row = tl.load(active_ptr + t)
        i_layer = tl.load(row_layer_ptr + i_row)
        j_row = tl.load(partner_ptr + i_row)
        table = layer_ptr + i_layer.to(tl.int64) * COLUMNS
        own_place, place = tl.load(place_ptr + i_row), tl.load(place_ptr + j_row)
        packed = place != NO_PLACE
        if NAIVE:
            packed = place < NO_PLACE
        first_row = tl.load(table + FIRST_ROW).to(tl.int32)
        kind = tl.load(table + KIND).to(tl.int32)
        limit = layer_threshold(table, threshold)
        similarity = tl.full([], 0.0, tl.float32)
        finite = kind < 0
        passed = kind < 0
        for CODE in tl.static_range(0, 8):
            if is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED):
                if is_only_kind(HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED) or kind == CODE:
                    weight, geometry = weight_of(table, CODE), geometry_of(table, alignment(CODE))
                    p_i = filter_at(weight, i_row - first_row, geometry, CODE < STRIDED)
                    p_j = filter_at(weight, j_row - first_row, geometry, CODE < STRIDED)
                    p_j = tl.where(packed, _packed_row(packed_ptr, place, CODE), p_j)
                    similarity, finite, passed = _blend_row(
                        p_i, p_j, packed, geometry, (alpha, beta), limit, own_place != NO_PLACE, CODE < STRIDED,
                        block_of(CODE, BLOCK, STRIDED_BLOCK),
                    )  # fmt: skip
        tl.store(similarity_ptr + i_row, tl.where(finite, similarity, float("nan")))
        tl.store(outcome_ptr + i_row, tl.where(passed, PASSED, SAMPLED).to(tl.int8))
        tl.store(merged_ptr + i_row, passed.to(tl.int8))
        count_outcome(times_ptr, i_row, passed)
        largest_here = larger(largest_here, similarity, finite)
    if largest_here > -2147483647 - 1:
        tl.atomic_max(largest_ptr, largest_here, sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=["rows", "programs"])
def _restore_kernel(
    layer_ptr, row_layer_ptr, place_ptr, merged_ptr, packed_ptr, rows, programs,
    HAS_FLOAT32: tl.constexpr, HAS_BFLOAT16: tl.constexpr, HAS_FLOAT16: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_STRIDED: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the rows that have merged back from packed memory, and forget all places.

    It asks every row whether it has merged, 5 bytes each, and not the list of active rows: other calls of the plan may
    have reused that since.

    Grid: ``(programs,)``, any number. Moves every merged row in and out once. No hazard: a row, its place and its mark
    are read and written by one program, which has read them in all its threads before one of them resets them.
    """
    for i_row in range(tl.program_id(0), rows, programs):
        place = tl.load(place_ptr + i_row)
        if place != NO_PLACE:
            merged = tl.load(merged_ptr + i_row) != 0
            if merged:
                table, first_row, kind = layer_of(layer_ptr, row_layer_ptr, i_row)
                for CODE in tl.static_range(0, 8):
                    if is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED):
                        if is_only_kind(HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED) or kind == CODE:
                            geometry = geometry_of(table, alignment(CODE))
                            p_i = filter_at(weight_of(table, CODE), i_row - first_row, geometry, CODE < STRIDED)
                            copy_back(p_i, _packed_row(packed_ptr, place, CODE), geometry, CODE < STRIDED,
                                      block_of(CODE, BLOCK, STRIDED_BLOCK), 1)  # fmt: skip
            tl.debug_barrier()
            tl.store(place_ptr + i_row, NO_PLACE)
            tl.store(merged_ptr + i_row, 0)
