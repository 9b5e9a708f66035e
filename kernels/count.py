"""From partners to readers: how many active rows read each row, and the list of active rows."""

import triton
import triton.language as tl

from .tables import ACTIVE_ROWS, FURTHEST_ROW, NO_PAIR, ROW_COUNTS, TIMES_SAMPLED


@triton.jit
def count_rows(i_row, partner, readers_ptr, active_ptr, state_ptr):
    """Count a block of rows as readers of their partners, and add its active rows to the list.

    A row is active if its partner is not -1. The list's order depends on which program comes first, so nothing may
    depend on it. All writes to shared words are atomic; relaxed order is enough, the kernel boundary publishes them.
    """
    m_active = partner >= 0
    tl.atomic_add(readers_ptr + partner, 1, mask=m_active, sem="relaxed")
    place = tl.cumsum(m_active.to(tl.int32), axis=0)
    found = tl.sum(m_active.to(tl.int32), axis=0)
    start = tl.atomic_add(state_ptr + ACTIVE_ROWS, found, sem="relaxed")
    tl.store(active_ptr + start + place - 1, i_row, mask=m_active)


@triton.jit(do_not_specialize=["rows", "write"])
def _count_kernel(
    partner_ptr, readers_ptr, active_ptr, state_ptr, best_ptr, times_ptr, rows, write,
    BLOCK: tl.constexpr, MATCHED: tl.constexpr,
):  # fmt: skip
    """Count the active readers of every row and compact the active rows into a list, where the draw has not done it.

    ``readers`` must be zero (a draw before it zeroes it), as must the list's length in ``state``.

    With MATCHED, the partners of sampled rows are first replaced by those that ``kernels/match.py`` left in ``best``
    (int64, ``(rows,)``), -1 where it found none. Such a row is sampled all the same, which no merge will count, so it
    is counted here in ``times`` unless ``write`` is 0. Without MATCHED, ``best`` and ``times`` are not looked at.

    Grid: ``(cdiv(rows, BLOCK),)``. Loads 4 bytes per row; stores 4 and adds 4 per active row; MATCHED, 8 more in
    per sampled row and 4 out per row. Hazards: see :func:`count_rows`.
    """
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partner = tl.load(partner_ptr + i_row, mask=i_row < rows, other=-1)
    if MATCHED:
        best = tl.load(best_ptr + i_row, mask=partner >= 0, other=NO_PAIR)
        m_alone = (partner >= 0) & (best == NO_PAIR) & (write != 0)
        tl.atomic_add(times_ptr + i_row.to(tl.int64) * ROW_COUNTS + TIMES_SAMPLED, 1, mask=m_alone, sem="relaxed")
        partner = tl.where(best == NO_PAIR, -1, (best & FURTHEST_ROW).to(tl.int32) ^ FURTHEST_ROW)
        tl.store(partner_ptr + i_row, partner, mask=i_row < rows)
    count_rows(i_row, partner, readers_ptr, active_ptr, state_ptr)
