"""The random draw on the GPU: Philox4x32-10, bit-identical with ``inmerge_fast/draw.py``, which states the contract."""

import triton
import triton.language as tl

from .count import count_rows
from .tables import (
    COIN_THRESHOLD,
    COLUMNS,
    FIRST_ROW,
    GROUP_SIZE,
    LAYER_ID,
    NOT_SAMPLED,
    SAMPLED,
    SEED,
    STATE_WORDS,
    STEP,
)


@triton.jit
def philox_partner(seed, step_lo, step_hi, layer, i_filter, group_size, coin_threshold):
    """Coin and partner (index within the layer) of filters ``i_filter`` of one layer, or of layers given per filter.

    ``seed`` is the 64-bit key, ``step_lo`` and ``step_hi`` are the 32-bit words of the step, all else is int32. Of a
    group of n filters the partner is ``floor(fraction * (n - 1))``, stepped over the filter itself, with the 64-bit
    fraction ``r1 * 2**32 + r2``: a 96-bit product of which only the top word is wanted.
    """
    r0, r1, r2, _r3 = tl.philox(seed, i_filter, layer, step_lo, step_hi)
    coin = (r0 >> 8).to(tl.int32) < coin_threshold
    others = (group_size - 1).to(tl.uint32)
    # Wrap-around is wanted here; plain * and + are overflow-checked in debug mode.
    middle = tl.mul(r1, others, sanitize_overflow=False)
    total = tl.add(middle, tl.umulhi(r2, others), sanitize_overflow=False)
    place = (tl.umulhi(r1, others) + (total < middle).to(tl.uint32)).to(tl.int32)
    own_place = i_filter % group_size
    partner = i_filter - own_place + place + (place >= own_place).to(tl.int32)
    return coin, partner


@triton.jit(do_not_specialize=["seed", "step", "stride", "coin_threshold", "rows", "first_slot", "draws"])
def _draw_kernel(
    layer_ptr,
    row_layer_ptr,
    partner_ptr,
    readers_ptr,
    active_ptr,
    outcome_ptr,
    state_ptr,
    call_ptr,
    seed: tl.uint64,  # annotated: an unannotated int takes the width of its value, and a seed of 2**31 another kernel
    step: tl.int64,
    stride: tl.int64,
    coin_threshold,
    rows,
    first_slot,
    draws,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Partners of all rows of all layers, for ``draws`` calls: row numbers, or -1 where the coin says no.

    Also ``outcome``, SAMPLED or not. Draw k is of step ``step + k * stride`` and goes to slot ``(first_slot + k) %
    SLOTS``; a slot has a line in each of ``partner``, ``readers``, ``active`` and ``outcome``, ``rows`` entries padded
    to a multiple of 16, and its own state words.

    With COUNT, what ``kernels/count.py`` does as well. The slots' ``readers`` and state must be zero then, and those of
    the ``grid[1]`` slots after the drawn ones are zeroed for draws to come. Without, each draw zeroes its own, for a
    count that is a launch of its own.

    With IN_MEMORY the seed, the step and the coin's threshold are read from ``call`` (``kernels/prepare.py``), so that
    a CUDA graph can be replayed with others.

    Grid: ``(cdiv(rows, BLOCK), at least draws)``, with COUNT at most ``SLOTS - draws`` of the second. Per draw it loads
    4 bytes per row and the layer table (from cache) and stores 5 bytes per row; COUNT stores 4 more, and adds 4, per
    active row. Per slot that is zeroed it stores 4 bytes per row and the state words. No hazard: every entry is written
    by one program and read by none, what is counted apart (:func:`count_rows`). That is why slots are zeroed a launch
    ahead: a row's zero and what others add to it would race in one.
    """
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = i_row < rows
    i_draw = tl.program_id(1)
    pitch = (rows.to(tl.int64) + 15) // 16 * 16
    slot = (first_slot + i_draw) % SLOTS
    clean_slot = (slot + draws) % SLOTS if COUNT else slot
    tl.store(readers_ptr + clean_slot * pitch + i_row, 0, mask=m_row)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + clean_slot * STATE_WORDS + tl.arange(0, STATE_WORDS), 0)
    if i_draw < draws:
        table = layer_ptr + tl.load(row_layer_ptr + i_row, mask=m_row, other=0).to(tl.int64) * COLUMNS
        layer_id = tl.load(table + LAYER_ID, mask=m_row, other=0).to(tl.int32)
        group_size = tl.load(table + GROUP_SIZE, mask=m_row, other=2).to(tl.int32)
        first_row = tl.load(table + FIRST_ROW, mask=m_row, other=0).to(tl.int32)
        if IN_MEMORY:
            seed = tl.load(call_ptr + SEED).to(tl.uint64)
            step = tl.load(call_ptr + STEP)
            coin_threshold = tl.load(call_ptr + COIN_THRESHOLD).to(tl.int32)
        # The interpreter ignores the annotations, and >> 32 of 32 bits is undefined.
        step = step.to(tl.int64) + stride.to(tl.int64) * i_draw
        step_lo = step.to(tl.int32)
        step_hi = (step >> 32).to(tl.int32)
        coin, partner = philox_partner(seed, step_lo, step_hi, layer_id, i_row - first_row, group_size, coin_threshold)
        partner = tl.where(coin & m_row, first_row + partner, -1)
        line = slot * pitch
        tl.store(partner_ptr + line + i_row, partner, mask=m_row)
        tl.store(outcome_ptr + line + i_row, tl.where(coin, SAMPLED, NOT_SAMPLED).to(tl.int8), mask=m_row)
        if COUNT:
            count_rows(i_row, partner, readers_ptr + line, active_ptr + line, state_ptr + slot * STATE_WORDS)
