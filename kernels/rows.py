"""How filters lie in memory, and what is calculated from two of them: block by block, each thread 16 bytes at a time.

A *kind* is a dtype, dense or strided. Every function here is compiled for one kind; ``CODE`` is its number
(``kernels/tables.py``), and BLOCK is how many of its elements all threads of a program take together.
"""

import triton
import triton.language as tl

from .tables import (
    BASE,
    COLUMNS,
    ELEMENTS,
    FILTER_STRIDE,
    FIRST_ROW,
    FLOAT32,
    FROM_TABLE,
    GROUP_SIZE,
    GROUP_STRIDE,
    INNER_STRIDE,
    KIND,
    OUTER_STRIDE,
    ROW_COUNTS,
    RUN,
    STRIDED,
    THRESHOLD,
    TIMES_PASSED,
)

MIN_NORM = tl.constexpr(1e-8)


@triton.constexpr_function
def element_type(code):
    """The dtype of a kind."""
    return (tl.float32, tl.bfloat16, tl.float16)[code % 4]


@triton.constexpr_function
def alignment(code):
    """16 bytes in elements where filters are dense and aligned, else 1."""
    return (4, 8, 8, 1, 1, 1, 1)[code]


@triton.constexpr_function
def block_of(code, block, strided_block):
    """Elements that a program takes together: BLOCK of float32, twice as many of 16 bits, fewer of strided filters."""
    return min(block, strided_block) if code >= STRIDED else block if code == FLOAT32 else 2 * block


@triton.constexpr_function
def span_of(code, span):
    """Blocks of two rows that are in registers together: half as many of 16 bits, whose blocks are twice as long."""
    return 1 if code >= STRIDED else span if code == FLOAT32 else max(1, span // 2)


@triton.constexpr_function
def is_used(code, has_float32, has_bfloat16, has_float16, has_dense, has_strided):
    """Whether this model has layers of this kind; unused kinds are not compiled."""
    return (has_float32, has_bfloat16, has_float16, False)[code % 4] and (has_strided if code >= STRIDED else has_dense)


@triton.constexpr_function
def is_only_kind(*has):
    """Whether all layers are of one kind, so that none needs to be asked."""
    return sum(is_used(code, *has) for code in range(8)) == 1


@triton.jit
def layer_of(layer_ptr, row_layer_ptr, i_row):
    """A row's layer: its line of the table, its first row, and the number of its kind."""
    table = layer_ptr + tl.load(row_layer_ptr + i_row).to(tl.int64) * COLUMNS
    return table, tl.load(table + FIRST_ROW).to(tl.int32), tl.load(table + KIND).to(tl.int32)


@triton.jit
def count_outcome(times_ptr, i_row, passed):
    """Add to a row's running counts, both in one addition; nothing reads its result or waits for it."""
    p_times = (times_ptr + i_row.to(tl.int64) * ROW_COUNTS).to(tl.pointer_type(tl.int64))
    times = 1 + (passed.to(tl.int64) << 32 * TIMES_PASSED)  # TIMES_SAMPLED, 0, is the lower half
    tl.atomic_add(p_times, times, sem="relaxed", scope="gpu")


@triton.jit
def key_of(similarity):
    """An integer that sorts like the float."""
    bits = similarity.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def larger(largest, similarity, finite):
    """The larger of a key and a similarity, as a key; the first one if the other is not finite."""
    return tl.where(finite, tl.maximum(largest, key_of(similarity)), largest)


@triton.jit
def weight_of(table, CODE: tl.constexpr):
    """Pointer to a layer's weight."""
    pointer = tl.load(table + BASE).to(tl.pointer_type(element_type(CODE)))
    return tl.multiple_of(pointer, 16 if CODE < STRIDED else 1)


@triton.jit
def geometry_of(table, ALIGN: tl.constexpr):
    """A layer's numbers as the functions below take them; ALIGN is what all of them are multiples of.

    With ALIGN = 16 bytes' worth of elements the compiler emits 16-byte loads and stores. It needs both this hint and
    the one on the weight's address.
    """
    d = tl.multiple_of(tl.load(table + ELEMENTS).to(tl.int32), ALIGN)
    group_size = tl.load(table + GROUP_SIZE).to(tl.int32)
    group_stride, filter_stride = tl.load(table + GROUP_STRIDE), tl.load(table + FILTER_STRIDE)
    run = tl.load(table + RUN).to(tl.int32)
    return d, group_size, group_stride, filter_stride, run, tl.load(table + OUTER_STRIDE), tl.load(table + INNER_STRIDE)


@triton.jit
def layer_threshold(table, threshold):
    """The threshold of a layer: the call's, or with FROM_TABLE the layer's own."""
    own = tl.load(table + THRESHOLD, mask=threshold == FROM_TABLE, other=0)
    return tl.where(threshold == FROM_TABLE, own.to(tl.int32).to(tl.float32, bitcast=True), threshold)


@triton.jit
def filter_at(weight, i_filter, geometry, DENSE: tl.constexpr):
    """Pointer to the first element of a filter."""
    d, group_size, group_stride, filter_stride, _run, _outer, _inner = geometry
    if DENSE:
        o_filter = i_filter.to(tl.int64) * d
    else:
        o_filter = (i_filter // group_size).to(tl.int64) * group_stride + (i_filter % group_size) * filter_stride
    return weight + o_filter


@triton.jit
def offsets_at(o_block, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a block of elements from their filter's first one, and which of them exist."""
    d, _group_size, _group_stride, _filter_stride, run, outer, inner = geometry
    o_element = o_block + tl.arange(0, BLOCK)
    m_element = o_element < d
    if DENSE:
        o_memory = o_element
    else:
        o_memory = (o_element // run) * outer + (o_element % run) * inner
    return o_memory, m_element


@triton.jit
def load_span(p_i, p_j, o_span, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """SPAN blocks of two rows from ``o_span`` on, which is before their end; zero beyond it.

    No load waits for another, and blocks that do not exist are passed over.
    """
    span = ()
    for k in tl.static_range(SPAN):
        b_i = tl.zeros([BLOCK], p_i.dtype.element_ty)
        b_j = b_i
        if k == 0 or o_span + k * BLOCK < geometry[0]:
            o, m = offsets_at(o_span + k * BLOCK, geometry, DENSE, BLOCK)
            b_i, b_j = tl.load(p_i + o, mask=m, other=0.0), tl.load(p_j + o, mask=m, other=0.0)
        span += ((b_i, b_j),)
    return span


@triton.jit
def _add_products(sums, span, o_span, geometry, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """``w_i w_j``, ``w_i**2`` and ``w_j**2`` of a span added to their sums, by place in the block."""
    dot, square_i, square_j = sums
    for k in tl.static_range(SPAN):
        if k == 0 or o_span + k * BLOCK < geometry[0]:
            b_i, b_j = span[k][0].to(tl.float32), span[k][1].to(tl.float32)
            dot = tl.fma(b_i, b_j, dot)
            square_i = tl.fma(b_i, b_i, square_i)
            square_j = tl.fma(b_j, b_j, square_j)
    return dot, square_i, square_j


@triton.jit
def add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def cosine(dot, norm_i, norm_j):
    """Cosine similarity from the three sums, in float32, and whether both squared norms are finite."""
    finite = (norm_i < float("inf")) & (norm_j < float("inf"))  # false for NaN
    norms = tl.maximum(tl.sqrt_rn(norm_i), MIN_NORM) * tl.maximum(tl.sqrt_rn(norm_j), MIN_NORM)
    return tl.div_rn(dot, norms), finite


@triton.jit
def similarity_of(p_i, p_j, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Cosine similarity in float32, whether both squared norms are finite, and the first span of both rows.

    That span is loaded last, so that a blend finds it in registers.
    """
    zeros = tl.zeros([BLOCK], tl.float32)
    sums = (zeros, zeros, zeros)
    for o_span in range(SPAN * BLOCK, geometry[0], SPAN * BLOCK):
        span = load_span(p_i, p_j, o_span, geometry, DENSE, BLOCK, SPAN)
        sums = _add_products(sums, span, o_span, geometry, BLOCK, SPAN)
    first = load_span(p_i, p_j, 0, geometry, DENSE, BLOCK, SPAN)
    sums = _add_products(sums, first, 0, geometry, BLOCK, SPAN)
    dot, norm_i, norm_j = tl.reduce(sums, 0, add_three)  # one after the other they would be three times as long
    similarity, finite = cosine(dot, norm_i, norm_j)
    return similarity, finite, first


@triton.jit
def _store_blend(
    p_out, span, o_span, packed, geometry, shares, DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr
):
    alpha, beta = shares
    for k in tl.static_range(SPAN):
        if k == 0 or o_span + k * BLOCK < geometry[0]:
            o, m = offsets_at(o_span + k * BLOCK, geometry, DENSE, BLOCK)
            if not DENSE:
                o = tl.where(packed, o_span + k * BLOCK + tl.arange(0, BLOCK), o)
            new = alpha * span[k][0].to(tl.float32) + beta * span[k][1].to(tl.float32)
            tl.store(p_out + o, new.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def store_blend(
    p_out, p_i, p_j, first, packed, geometry, shares, DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr
):
    """``alpha w_i + beta w_j``, to a row or, ``packed``, to scratch; ``first`` is the first span of both."""
    _store_blend(p_out, first, 0, packed, geometry, shares, DENSE, BLOCK, SPAN)
    for o_span in range(SPAN * BLOCK, geometry[0], SPAN * BLOCK):
        span = load_span(p_i, p_j, o_span, geometry, DENSE, BLOCK, SPAN)
        _store_blend(p_out, span, o_span, packed, geometry, shares, DENSE, BLOCK, SPAN)


@triton.jit
def copy_back(p_i, p_scratch, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """A blend from scratch, where it is packed, to its row."""
    for o_span in range(0, geometry[0], SPAN * BLOCK):
        span = ()
        for k in tl.static_range(SPAN):
            packed = o_span + k * BLOCK + tl.arange(0, BLOCK)
            span += (tl.load(p_scratch + packed, mask=packed < geometry[0]),)
        for k in tl.static_range(SPAN):
            o, m = offsets_at(o_span + k * BLOCK, geometry, DENSE, BLOCK)
            tl.store(p_i + o, span[k], mask=m)
