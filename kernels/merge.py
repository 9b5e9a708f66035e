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
thread's reads only. Triton places a barrier there by itself, 3.6 and 3.7.1 alike: with BARRIER=False the PTX holds as
many as before. So leaving ours out says nothing of whether one is needed, but in the interpreter's race detector, which
knows no barrier but ours. That one is needed in the compiled kernel is what deleting each barrier from the PTX in turn
shows (``tests/test_ptx_controls.py``). Ours stays, since no version of Triton promises its own.
"""

import triton
import triton.language as tl

from .rows import (
    alignment,
    block_of,
    copy_back,
    count_outcome,
    element_type,
    filter_at,
    geometry_of,
    is_only_kind,
    is_used,
    larger,
    layer_of,
    layer_threshold,
    load_span,
    offsets_at,
    similarity_of,
    span_of,
    store_blend,
    weight_of,
)
from .tables import (
    ACTIVE_ROWS,
    ALPHA,
    ALWAYS,
    BETA,
    COLUMNS,
    DEFERRED_ROWS,
    FINISHED,
    FIRST_ROW,
    KIND,
    PASSED,
    SAMPLED,
    SCRATCH_USED,
    STRIDED,
    WRITE,
)

FLAG = tl.constexpr(1 << 20)  # above any number of readers, so a layer must have fewer filters
NO_SLOT = tl.constexpr(-1)
# Elements of a block in the rarely used code for cycles, no fewer than a program has threads: where several threads
# hold an element, one may load it when another has written it already (without harm: only one of them stores).
CYCLE_BLOCK = tl.constexpr(128)


@triton.jit
def _scratch_row(scratch, slot):
    """Pointer to a place in scratch memory, which is handed out in units of 16 bytes."""
    return scratch + slot.to(tl.int64) * (128 // scratch.dtype.element_ty.primitive_bitwidth)


@triton.jit
def _release(p_counter, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """Say that a row has been read for the last time; returns whether that makes the caller settle it."""
    if BARRIER:
        tl.debug_barrier()
    return tl.atomic_add(p_counter, 1, sem=SEM, scope="gpu") + 1 == FLAG


@triton.jit
def _settle(
    i_row, layer, shares, tables,
    DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr,
):  # fmt: skip
    """Write a row whose counter became FLAG, and then the deferred rows' partners that this releases."""
    weight, scratch, first_row, geometry = layer
    partner_ptr, counter_ptr, slot_ptr = tables
    going = True
    while going:
        p_i = filter_at(weight, i_row - first_row, geometry, DENSE)
        slot = tl.load(slot_ptr + i_row)
        going = False
        if slot != NO_SLOT:  # its own partner was released when the blend went to scratch
            copy_back(p_i, _scratch_row(scratch, slot), geometry, DENSE, BLOCK, SPAN)
            tl.store(counter_ptr + i_row, 0)
        else:
            j_row = tl.load(partner_ptr + i_row)
            p_j = filter_at(weight, j_row - first_row, geometry, DENSE)
            first = load_span(p_i, p_j, 0, geometry, DENSE, BLOCK, SPAN)
            store_blend(p_i, p_i, p_j, first, False, geometry, shares, DENSE, BLOCK, SPAN)
            tl.store(counter_ptr + i_row, 0)
            if tl.load(partner_ptr + j_row) >= 0:
                going = _release(counter_ptr + j_row, BARRIER, SEM)
            i_row = j_row


@triton.jit
def _merge_row(
    row, layer, shares, limit, write, capacity, tables, deferred_ptr, state_ptr, similarity_ptr, outcome_ptr,
    DENSE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    BARRIER: tl.constexpr, SEM: tl.constexpr, NAIVE: tl.constexpr,
):  # fmt: skip
    """One active row; returns its similarity, whether it is finite, and whether it passed."""
    i_row, j_row, readers, partner_is_active = row
    weight, scratch, first_row, geometry = layer
    _partner_ptr, counter_ptr, slot_ptr = tables
    p_i = filter_at(weight, i_row - first_row, geometry, DENSE)
    p_j = filter_at(weight, j_row - first_row, geometry, DENSE)
    similarity, finite, first = similarity_of(p_i, p_j, geometry, DENSE, BLOCK, SPAN)
    passed = finite & ((similarity > limit) | (limit == ALWAYS))  # NaN compares false
    tl.store(similarity_ptr + i_row, tl.where(finite, similarity, float("nan")))
    tl.store(outcome_ptr + i_row, tl.where(passed, PASSED, SAMPLED).to(tl.int8))

    merges = passed & (write != 0)
    at_once = readers == 0
    if NAIVE:
        at_once = readers >= 0
    if not at_once:
        # A plain acquire load: are all readers through already?
        at_once = tl.atomic_add(counter_ptr + i_row, 0, sem="acquire", scope="gpu") == readers
        if at_once:
            tl.store(counter_ptr + i_row, 0)
    to_scratch = merges & (not at_once)
    deferred = merges & False
    slot = 0
    if to_scratch:
        units = tl.cdiv(geometry[0], 128 // scratch.dtype.element_ty.primitive_bitwidth)
        slot = tl.atomic_add(state_ptr + SCRATCH_USED, units, sem="relaxed", scope="gpu")
        deferred = slot + units > capacity
    if merges & (not deferred):  # one copy of the code for both places
        p_out = tl.where(to_scratch, _scratch_row(scratch, slot), p_i)
        store_blend(p_out, p_i, p_j, first, to_scratch, geometry, shares, DENSE, BLOCK, SPAN)
    settle_own = merges & False
    settle_partner = merges & False
    if not at_once:
        change = -readers
        if merges:
            change += FLAG
            tl.store(slot_ptr + i_row, tl.where(deferred, NO_SLOT, slot))
            if deferred:
                place = tl.atomic_add(state_ptr + DEFERRED_ROWS, 1, sem="relaxed", scope="gpu")
                tl.store(deferred_ptr + place, i_row)
        if BARRIER:
            tl.debug_barrier()
        settle_own = tl.atomic_add(counter_ptr + i_row, change, sem=SEM, scope="gpu") + change == FLAG
    if not NAIVE:
        if partner_is_active & (not deferred):
            settle_partner = _release(counter_ptr + j_row, BARRIER, SEM)
    for k in range(0, 2):  # not unrolled: one copy of the code for both rows
        i_settle = tl.where(k == 0, i_row, j_row)
        if ((k == 0) & settle_own) | ((k == 1) & settle_partner):
            _settle(i_settle, layer, shares, tables, DENSE, BLOCK, SPAN, BARRIER, SEM)
    return similarity, finite, passed


@triton.jit
def _write_cycle(
    i_row, weight, first_row, geometry, shares, partner_ptr, counter_ptr, DENSE: tl.constexpr, BLOCK: tl.constexpr
):
    """Merge a cycle of deferred rows: each reads the next, the last one reads what the first one was.

    The caller comes here because the counter of row i is not zero, which every warp finds out for itself: without the
    barrier one that is late finds the zero that another has stored already, and leaves its columns unmerged.
    """
    alpha, beta = shares
    for o_block in range(0, geometry[0], BLOCK):
        o, m = offsets_at(o_block, geometry, DENSE, BLOCK)
        b_first = tl.load(filter_at(weight, i_row - first_row, geometry, DENSE) + o, mask=m, other=0.0).to(tl.float32)
        b_this = b_first
        this = i_row
        after = tl.load(partner_ptr + this)
        while after != i_row:
            b_after = tl.load(filter_at(weight, after - first_row, geometry, DENSE) + o, mask=m, other=0.0).to(
                tl.float32
            )
            new = (alpha * b_this + beta * b_after).to(weight.dtype.element_ty)
            tl.store(filter_at(weight, this - first_row, geometry, DENSE) + o, new, mask=m)
            b_this = b_after
            this = after
            after = tl.load(partner_ptr + this)
        new = (alpha * b_this + beta * b_first).to(weight.dtype.element_ty)
        tl.store(filter_at(weight, this - first_row, geometry, DENSE) + o, new, mask=m)
    this = tl.load(partner_ptr + i_row)
    tl.debug_barrier()
    tl.store(counter_ptr + i_row, 0)
    while this != i_row:
        tl.store(counter_ptr + this, 0)
        this = tl.load(partner_ptr + this)


@triton.jit
def _float_in_memory(pointer):
    return tl.load(pointer).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["capacity", "write", "programs"])
def _merge_kernel(
    layer_ptr, row_layer_ptr, partner_ptr, readers_ptr, active_ptr, counter_ptr, slot_ptr, deferred_ptr, state_ptr,
    scratch_ptr, similarity_ptr, outcome_ptr, times_ptr, largest_ptr, call_ptr, capacity, alpha, beta, threshold, write,
    programs,
    HAS_FLOAT32: tl.constexpr, HAS_BFLOAT16: tl.constexpr, HAS_FLOAT16: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_STRIDED: tl.constexpr, IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
    BARRIER: tl.constexpr, SEM: tl.constexpr, NAIVE: tl.constexpr,
):  # fmt: skip
    """Merge all active rows of all layers.

    ``write`` is 0 in a dry run; ``capacity`` is the size of scratch in units of 16 bytes. With IN_MEMORY alpha, beta
    and write are read from ``call`` (``kernels/prepare.py``); a threshold of FROM_TABLE is the layer's own. ``times``
    are the rows' running counts, and ``largest`` is the largest similarity so far, as an integer that sorts like it:
    both grow in calls that may write.
    BARRIER, SEM and NAIVE exist for the tests, which break the protocol and watch the race detectors notice; BARRIER
    changes nothing in compiled code, see above.

    Grid: ``(programs,)``, any number; each takes every ``programs``-th entry of the list of active rows.
    All its threads take BLOCK elements of a row together, 16 bytes each, and SPAN blocks of both rows at a time; of
    strided filters STRIDED_BLOCK elements.
    Moves, of the weights: every row that is active or read, once in, and every row that merges once out; plus the
    blend's second read of both its rows beyond their first span (from cache as far as it lasts), and once more in and
    out through scratch for merged rows that have readers (8 % of all rows at prob 0.3).
    """
    if IN_MEMORY:
        alpha = _float_in_memory(call_ptr + ALPHA)
        beta = _float_in_memory(call_ptr + BETA)
        write = tl.load(call_ptr + WRITE).to(tl.int32)
    pid = tl.program_id(0)
    largest_here = pid * 0 - 2147483647 - 1
    active_rows = tl.load(state_ptr + ACTIVE_ROWS)
    tables = partner_ptr, counter_ptr, slot_ptr
    for t in range(pid, active_rows, programs):
        i_row = tl.load(active_ptr + t)
        # What does not need another load is loaded before the first one is waited for.
        i_layer = tl.load(row_layer_ptr + i_row)
        j_row = tl.load(partner_ptr + i_row)
        readers = tl.load(readers_ptr + i_row)
        table = layer_ptr + i_layer.to(tl.int64) * COLUMNS
        row = i_row, j_row, readers, tl.load(partner_ptr + j_row) >= 0
        first_row = tl.load(table + FIRST_ROW).to(tl.int32)
        kind = tl.load(table + KIND).to(tl.int32)
        limit = layer_threshold(table, threshold)
        similarity = tl.full([], 0.0, tl.float32)
        finite = kind < 0
        passed = kind < 0
        for CODE in tl.static_range(0, 8):
            if is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED):
                if is_only_kind(HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, HAS_DENSE, HAS_STRIDED) or kind == CODE:
                    scratch = scratch_ptr.to(tl.pointer_type(element_type(CODE)))
                    layer = weight_of(table, CODE), scratch, first_row, geometry_of(table, alignment(CODE))
                    similarity, finite, passed = _merge_row(
                        row, layer, (alpha, beta), limit, write, capacity, tables,
                        deferred_ptr, state_ptr, similarity_ptr, outcome_ptr,
                        CODE < STRIDED, block_of(CODE, BLOCK, STRIDED_BLOCK), span_of(CODE, SPAN), BARRIER, SEM, NAIVE,
                    )  # fmt: skip
        if write != 0:  # behind the releases
            count_outcome(times_ptr, i_row, passed)
        largest_here = larger(largest_here, similarity, finite)
    if write != 0:
        if largest_here > -2147483647 - 1:  # all programs meet at this word: those without a row leave it alone
            tl.atomic_max(largest_ptr, largest_here, sem="relaxed", scope="gpu")

    tl.debug_barrier()
    if tl.atomic_add(state_ptr + FINISHED, 1, sem="acq_rel", scope="gpu") == programs - 1:
        deferred_rows = tl.load(state_ptr + DEFERRED_ROWS)
        for k in range(0, deferred_rows):
            i_row = tl.load(deferred_ptr + k)
            if tl.load(counter_ptr + i_row) != 0:  # a cycle: nobody could settle it
                table, first_row, kind = layer_of(layer_ptr, row_layer_ptr, i_row)
                for CODE in tl.static_range(STRIDED, 8):
                    if is_used(CODE, HAS_FLOAT32, HAS_BFLOAT16, HAS_FLOAT16, True, True):
                        if (kind | STRIDED) == CODE:
                            _write_cycle(i_row, weight_of(table, CODE), first_row, geometry_of(table, 1), (alpha, beta),
                                         partner_ptr, counter_ptr, False, CYCLE_BLOCK)  # fmt: skip
            tl.debug_barrier()
        # Every warp has read the length of that list before one resets it; the loop's own barrier takes a row in it.
        tl.debug_barrier()
        tl.store(state_ptr + ACTIVE_ROWS, 0)
        tl.store(state_ptr + SCRATCH_USED, 0)
        tl.store(state_ptr + FINISHED, 0)
        tl.store(state_ptr + DEFERRED_ROWS, 0)
