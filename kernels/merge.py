"""In-model merging of a whole model in one pass over its weights, in place and simultaneous.

For every active row i with partner j (paper, eq. (2) and (3))::

    similarity = w_i . w_j / (max(|w_i|, 1e-8) max(|w_j|, 1e-8))
    w_i <- alpha w_i + beta w_j      where similarity > threshold; beta = 1 - alpha, rounded on its own

The hazard: w_i may be overwritten only when every active row that reads it has read it, and no program may wait for
another. The rule is *the last reader out writes*. Each row has a counter, zero between launches:

- A reader of row i adds 1 when it needs ``w_i`` no more, whatever its own outcome; only if row i is active, because the
  counter of an inactive row would never come back to zero (and an inactive row is never written).
- Row i itself, if it has readers, adds ``FLAG - readers`` if it merges and ``-readers`` if not. So the counter becomes
  FLAG exactly once, when all are through and a merge is due, and whoever makes it so *settles* the row: writes it and
  stores 0. If no merge is due the counter comes back to 0 by itself.
- Row i writes at once if it has no readers, or if it sees that all of them are through already. Otherwise it leaves its
  blend in scratch memory for the one who settles it, and releases its partner.
- If scratch is used up, row i is *deferred*: it keeps its partner unreleased, so that ``w_j`` stays as it is, and
  whoever settles row i blends it from ``w_i`` and ``w_j``, then releases j, which may settle j, and so on. What this
  can never settle is a cycle of deferred rows, each waiting for the one before it: the last program to finish writes
  those, walking each cycle in column blocks with the one overwritten block in registers. So scratch is for speed, never
  for correctness.

Every release is an ``acq_rel`` atomic behind a barrier: it orders the reads before it against the write of whoever
settles the row, which may be another program. The atomic is one thread's, so without the barrier it would order that
thread's reads only; Triton 3.6 promises none of its own there, 3.7 does.
"""

import triton
import triton.language as tl

from .tables import (
    ACTIVE_ROWS,
    ALPHA,
    ALWAYS,
    BASE,
    BETA,
    COLUMNS,
    DEFERRED_ROWS,
    ELEMENTS,
    FILTER_STRIDE,
    FINISHED,
    FIRST_ROW,
    FROM_TABLE,
    GROUP_SIZE,
    GROUP_STRIDE,
    INNER_STRIDE,
    KIND,
    LARGEST_KEY,
    OUTER_STRIDE,
    PASSED,
    PASSED_TOTAL,
    RUN,
    SAMPLED,
    SCRATCH_UNITS,
    SCRATCH_USED,
    STRIDED,
    THRESHOLD,
    WRITE,
)

FLAG = tl.constexpr(1 << 20)  # above any number of readers, so a layer must have fewer filters
NO_SLOT = tl.constexpr(-1)
MIN_NORM = tl.constexpr(1e-8)
# Rarely used code works on smaller blocks, or it would cost the rest of the kernel 60 registers.
STRIDED_BLOCK = tl.constexpr(256)
CYCLE_BLOCK = tl.constexpr(128)


@triton.jit
def _filter(weight, i_filter, geometry, DENSE: tl.constexpr):
    """Pointer to the first element of a filter."""
    d, group_size, group_stride, filter_stride, _run, _outer, _inner = geometry
    if DENSE:
        o_filter = i_filter.to(tl.int64) * d
    else:
        o_filter = (i_filter // group_size).to(tl.int64) * group_stride + (i_filter % group_size) * filter_stride
    return weight + o_filter


@triton.jit
def _offsets(o_block, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
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
def _similarity(p_i, p_j, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine similarity in float32, and whether both squared norms are finite."""
    dot = tl.zeros([BLOCK], tl.float32)
    square_i = tl.zeros([BLOCK], tl.float32)
    square_j = tl.zeros([BLOCK], tl.float32)
    for o_block in range(0, geometry[0], BLOCK):
        o, m = _offsets(o_block, geometry, DENSE, BLOCK)
        b_i = tl.load(p_i + o, mask=m, other=0.0).to(tl.float32)
        b_j = tl.load(p_j + o, mask=m, other=0.0).to(tl.float32)
        dot = tl.fma(b_i, b_j, dot)
        square_i = tl.fma(b_i, b_i, square_i)
        square_j = tl.fma(b_j, b_j, square_j)
    norm_i = tl.sum(square_i, axis=0)
    norm_j = tl.sum(square_j, axis=0)
    finite = (norm_i < float("inf")) & (norm_j < float("inf"))  # false for NaN
    norms = tl.maximum(tl.sqrt_rn(norm_i), MIN_NORM) * tl.maximum(tl.sqrt_rn(norm_j), MIN_NORM)
    return tl.div_rn(tl.sum(dot, axis=0), norms), finite


@triton.jit
def _blend(p_out, p_i, p_j, geometry, alpha, beta, TO_SCRATCH: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """``alpha w_i + beta w_j``, to row i itself or, packed, to scratch."""
    for o_block in range(0, geometry[0], BLOCK):
        o, m = _offsets(o_block, geometry, DENSE, BLOCK)
        b_i = tl.load(p_i + o, mask=m, other=0.0).to(tl.float32)
        b_j = tl.load(p_j + o, mask=m, other=0.0).to(tl.float32)
        if TO_SCRATCH:
            o = o_block + tl.arange(0, BLOCK)
        tl.store(p_out + o, (alpha * b_i + beta * b_j).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _scratch_row(scratch, slot):
    """Pointer to a place in scratch memory, which is handed out in units of 16 bytes."""
    return scratch + slot.to(tl.int64) * (128 // scratch.dtype.element_ty.primitive_bitwidth)


@triton.jit
def _copy_back(p_i, p_scratch, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """A blend from scratch, where it is packed, to its row."""
    for o_block in range(0, geometry[0], BLOCK):
        o, m = _offsets(o_block, geometry, DENSE, BLOCK)
        packed = o_block + tl.arange(0, BLOCK)
        tl.store(p_i + o, tl.load(p_scratch + packed, mask=m), mask=m)


@triton.jit
def _release(p_counter, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """Say that a row has been read for the last time; returns whether that makes the caller settle it."""
    if BARRIER:
        tl.debug_barrier()
    return tl.atomic_add(p_counter, 1, sem=SEM, scope="gpu") + 1 == FLAG


@triton.jit
def _settle(
    i_row, weight, scratch, first_row, geometry, alpha, beta, partner_ptr, counter_ptr, slot_ptr,
    DENSE: tl.constexpr, BLOCK: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr,
):  # fmt: skip
    """Write a row whose counter became FLAG, and then the deferred rows' partners that this releases."""
    going = True
    while going:
        p_i = _filter(weight, i_row - first_row, geometry, DENSE)
        slot = tl.load(slot_ptr + i_row)
        going = False
        if slot != NO_SLOT:  # its own partner was released when the blend went to scratch
            _copy_back(p_i, _scratch_row(scratch, slot), geometry, DENSE, BLOCK)
            tl.store(counter_ptr + i_row, 0)
        else:
            j_row = tl.load(partner_ptr + i_row)
            p_j = _filter(weight, j_row - first_row, geometry, DENSE)
            _blend(p_i, p_i, p_j, geometry, alpha, beta, False, DENSE, BLOCK)
            tl.store(counter_ptr + i_row, 0)
            if tl.load(partner_ptr + j_row) >= 0:
                going = _release(counter_ptr + j_row, BARRIER, SEM)
            i_row = j_row


@triton.jit
def _merge_row(
    i_row, weight, scratch, first_row, units, geometry, alpha, beta, limit, write, capacity,
    partner_ptr, readers_ptr, counter_ptr, slot_ptr, deferred_ptr, state_ptr, similarity_ptr, outcome_ptr,
    DENSE: tl.constexpr, BLOCK: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr, NAIVE: tl.constexpr,
):  # fmt: skip
    """One active row; returns its similarity, whether it is finite, and whether it passed."""
    j_row = tl.load(partner_ptr + i_row)
    readers = tl.load(readers_ptr + i_row)
    partner_is_active = tl.load(partner_ptr + j_row) >= 0
    p_i = _filter(weight, i_row - first_row, geometry, DENSE)
    p_j = _filter(weight, j_row - first_row, geometry, DENSE)
    similarity, finite = _similarity(p_i, p_j, geometry, DENSE, BLOCK)
    passed = finite & ((similarity > limit) | (limit == ALWAYS))  # NaN compares false
    tl.store(similarity_ptr + i_row, tl.where(finite, similarity, float("nan")))
    tl.store(outcome_ptr + i_row, tl.where(passed, PASSED, SAMPLED).to(tl.int8))

    merges = passed & (write != 0)
    deferred = merges & False
    settle_own = merges & False
    settle_partner = merges & False
    at_once = readers == 0
    if NAIVE:
        at_once = readers >= 0
    if not at_once:
        # A plain acquire load: are all readers through already?
        at_once = tl.atomic_add(counter_ptr + i_row, 0, sem="acquire", scope="gpu") == readers
        if at_once:
            tl.store(counter_ptr + i_row, 0)
    if at_once:
        if merges:
            _blend(p_i, p_i, p_j, geometry, alpha, beta, False, DENSE, BLOCK)
    else:
        change = -readers
        if merges:
            change += FLAG
            slot = tl.atomic_add(state_ptr + SCRATCH_USED, units, sem="relaxed", scope="gpu")
            deferred = slot + units > capacity
            if deferred:
                tl.store(slot_ptr + i_row, NO_SLOT)
                place = tl.atomic_add(state_ptr + DEFERRED_ROWS, 1, sem="relaxed", scope="gpu")
                tl.store(deferred_ptr + place, i_row)
            else:
                _blend(_scratch_row(scratch, slot), p_i, p_j, geometry, alpha, beta, True, DENSE, BLOCK)
                tl.store(slot_ptr + i_row, slot)
        if BARRIER:
            tl.debug_barrier()
        settle_own = tl.atomic_add(counter_ptr + i_row, change, sem=SEM, scope="gpu") + change == FLAG
    if not NAIVE:
        if partner_is_active & (not deferred):
            settle_partner = _release(counter_ptr + j_row, BARRIER, SEM)
    for k in range(0, 2):  # not unrolled: one copy of the code for both rows
        i_settle = tl.where(k == 0, i_row, j_row)
        if ((k == 0) & settle_own) | ((k == 1) & settle_partner):
            _settle(i_settle, weight, scratch, first_row, geometry, alpha, beta, partner_ptr, counter_ptr, slot_ptr,
                    DENSE, BLOCK, BARRIER, SEM)  # fmt: skip
    return similarity, finite, passed


@triton.jit
def _write_cycle(
    i_row, weight, first_row, geometry, alpha, beta, partner_ptr, counter_ptr, DENSE: tl.constexpr, BLOCK: tl.constexpr
):
    """Merge a cycle of deferred rows: each reads the next, the last one reads what the first one was.

    The caller comes here because the counter of row i is not zero, which every warp finds out for itself: without the
    barrier one that is late finds the zero that another has stored already, and leaves its columns unmerged.
    """
    for o_block in range(0, geometry[0], BLOCK):
        o, m = _offsets(o_block, geometry, DENSE, BLOCK)
        b_first = tl.load(_filter(weight, i_row - first_row, geometry, DENSE) + o, mask=m, other=0.0).to(tl.float32)
        b_this = b_first
        this = i_row
        after = tl.load(partner_ptr + this)
        while after != i_row:
            b_after = tl.load(_filter(weight, after - first_row, geometry, DENSE) + o, mask=m, other=0.0).to(tl.float32)
            new = (alpha * b_this + beta * b_after).to(weight.dtype.element_ty)
            tl.store(_filter(weight, this - first_row, geometry, DENSE) + o, new, mask=m)
            b_this = b_after
            this = after
            after = tl.load(partner_ptr + this)
        new = (alpha * b_this + beta * b_first).to(weight.dtype.element_ty)
        tl.store(_filter(weight, this - first_row, geometry, DENSE) + o, new, mask=m)
    this = tl.load(partner_ptr + i_row)
    tl.debug_barrier()
    tl.store(counter_ptr + i_row, 0)
    while this != i_row:
        tl.store(counter_ptr + this, 0)
        this = tl.load(partner_ptr + this)


@triton.constexpr_function
def _element_type(code):
    return (tl.float32, tl.bfloat16, tl.float16)[code % 4]


@triton.constexpr_function
def _alignment(code):
    """16 bytes in elements where filters are dense and aligned, else 1."""
    return (4, 8, 8, 1, 1, 1, 1)[code]


@triton.constexpr_function
def _block(code, block):
    return min(block, STRIDED_BLOCK) if code >= STRIDED else block


@triton.constexpr_function
def _is_used(code, has_float32, has_bfloat16, has_float16, has_dense, has_strided):
    """Whether this model has layers of this kind; unused kinds are not compiled."""
    return (has_float32, has_bfloat16, has_float16, False)[code % 4] and (has_strided if code >= STRIDED else has_dense)


@triton.jit
def _weight(table, CODE: tl.constexpr):
    pointer = tl.load(table + BASE).to(tl.pointer_type(_element_type(CODE)))
    return tl.multiple_of(pointer, 16 if CODE < STRIDED else 1)


@triton.jit
def _geometry(table, ALIGN: tl.constexpr):
    """A layer's numbers as :func:`_filter` and :func:`_offsets` take them; ALIGN is what all of them are multiples of.

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
def _float_in_memory(pointer):
    return tl.load(pointer).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["capacity", "write", "programs"])
def _merge_kernel(
    layer_ptr, row_layer_ptr, partner_ptr, readers_ptr, active_ptr, counter_ptr, slot_ptr, deferred_ptr, state_ptr,
    scratch_ptr, similarity_ptr, outcome_ptr, totals_ptr, call_ptr, capacity, alpha, beta, threshold, write, programs,
    HAS_FLOAT32: tl.constexpr, HAS_BFLOAT16: tl.constexpr, HAS_FLOAT16: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_STRIDED: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
    BARRIER: tl.constexpr, SEM: tl.constexpr, NAIVE: tl.constexpr,
):  # fmt: skip
    """Merge all active rows of all layers.

    ``write`` is 0 in a dry run; ``capacity`` is the size of scratch in units of 16 bytes. With IN_MEMORY alpha, beta
    and write are read from ``call`` (``kernels/prepare.py``); a threshold of FROM_TABLE is the layer's own.
    BARRIER, SEM and NAIVE exist for the tests, which break the protocol and watch the race detector notice.

    Grid: ``(programs,)``, any number; each takes every ``programs``-th entry of the list of active rows.
    Moves, of the weights: every row that is active or read, once in, and every row that merges once out; plus the
    blend's second read of both its rows (from cache as far as it lasts), and once more in and out through scratch for
    merged rows that have readers (8 % of all rows at prob 0.3).
    """
    if IN_MEMORY:
        alpha = _float_in_memory(call_ptr + ALPHA)
        beta = _float_in_memory(call_ptr + BETA)
        write = tl.load(call_ptr + WRITE).to(tl.int32)
    pid = tl.program_id(0)
    passed_here = pid * 0
    largest_here = pid * 0 - 2147483647 - 1
    active_rows = tl.load(state_ptr + ACTIVE_ROWS)
    for t in range(pid, active_rows, programs):
        i_row = tl.load(active_ptr + t)
        table = layer_ptr + tl.load(row_layer_ptr + i_row).to(tl.int64) * COLUMNS
        first_row = tl.load(table + FIRST_ROW).to(tl.int32)
        units = tl.load(table + SCRATCH_UNITS).to(tl.int32)
        kind = tl.load(table + KIND).to(tl.int32)
        limit = layer_threshold(table, threshold)
        similarity = tl.full([], 0.0, tl.float32)
        finite = kind < 0
        passed = kind < 0
        for CODE in tl.static_range(0, 8):
            if _is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED):
                if kind == CODE:
                    similarity, finite, passed = _merge_row(
                        i_row, _weight(table, CODE), scratch_ptr.to(tl.pointer_type(_element_type(CODE))), first_row,
                        units, _geometry(table, _alignment(CODE)), alpha, beta, limit, write, capacity,
                        partner_ptr, readers_ptr, counter_ptr, slot_ptr, deferred_ptr, state_ptr, similarity_ptr,
                        outcome_ptr, CODE < STRIDED, _block(CODE, BLOCK), BARRIER, SEM, NAIVE,
                    )  # fmt: skip
        passed_here += passed.to(tl.int32)
        bits = similarity.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # sorts like the float
        largest_here = tl.where(finite, tl.maximum(largest_here, key), largest_here)
    if write != 0:
        tl.atomic_add(totals_ptr + PASSED_TOTAL, passed_here, sem="relaxed", scope="gpu")
        tl.atomic_max(totals_ptr + LARGEST_KEY, largest_here, sem="relaxed", scope="gpu")

    tl.debug_barrier()
    if tl.atomic_add(state_ptr + FINISHED, 1, sem="acq_rel", scope="gpu") == programs - 1:
        deferred_rows = tl.load(state_ptr + DEFERRED_ROWS)
        for k in range(0, deferred_rows):
            i_row = tl.load(deferred_ptr + k)
            if tl.load(counter_ptr + i_row) != 0:  # a cycle: nobody could settle it
                table = layer_ptr + tl.load(row_layer_ptr + i_row).to(tl.int64) * COLUMNS
                first_row = tl.load(table + FIRST_ROW).to(tl.int32)
                kind = tl.load(table + KIND).to(tl.int32)
                for CODE in tl.static_range(STRIDED, 8):
                    if _is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, True, True):
                        if (kind | STRIDED) == CODE:
                            _write_cycle(i_row, _weight(table, CODE), first_row, _geometry(table, 1), alpha, beta,
                                         partner_ptr, counter_ptr, False, CYCLE_BLOCK)  # fmt: skip
            tl.debug_barrier()
        # Every warp has read the length of that list before one resets it; the loop's own barrier takes a row in it.
        tl.debug_barrier()
        tl.store(state_ptr + ACTIVE_ROWS, 0)
        tl.store(state_ptr + SCRATCH_USED, 0)
        tl.store(state_ptr + FINISHED, 0)
        tl.store(state_ptr + DEFERRED_ROWS, 0)
