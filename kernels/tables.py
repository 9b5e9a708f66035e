"""What the kernels and the host agree on: columns of the layer table, state words, codes.

The *layer table* is int64 ``(layers, COLUMNS)``. A *row* is a filter; rows of all layers are numbered through, and
``row_layer`` (int32, ``(rows,)``) says which layer a row belongs to. The other tables have one entry per row.
"""

import triton.language as tl

# Layer table.
BASE = tl.constexpr(0)  # address of the weight
ELEMENTS = tl.constexpr(1)  # D, elements per filter
GROUP_SIZE = tl.constexpr(2)  # filters per group
FIRST_ROW = tl.constexpr(3)
LAYER_ID = tl.constexpr(4)  # the layer's word in the draw
KIND = tl.constexpr(5)  # dtype code, plus STRIDED if its filters are strided or not 16-byte aligned
GROUP_STRIDE = tl.constexpr(6)  # strides as in inmerge_fast.plan.filters.FilterLayout, in elements
FILTER_STRIDE = tl.constexpr(7)
RUN = tl.constexpr(8)
OUTER_STRIDE = tl.constexpr(9)
INNER_STRIDE = tl.constexpr(10)
THRESHOLD = tl.constexpr(11)  # the layer's own threshold, the bits of a float32
COLUMNS = tl.constexpr(12)

# Thresholds with a meaning of their own; all others are similarities, in [-1, 1].
ALWAYS = tl.constexpr(-2.0)  # every sampled pair of finite filters passes: what -1 means to the user
FROM_TABLE = tl.constexpr(3.0)  # as an argument: each layer has its own

# Numbers of a call that may lie in device memory, int64 ``(CALL_WORDS,)``, floats as their float32 bits.
SEED = tl.constexpr(0)
STEP = tl.constexpr(1)
COIN_THRESHOLD = tl.constexpr(2)
ALPHA = tl.constexpr(3)
BETA = tl.constexpr(4)
WRITE = tl.constexpr(5)
CALL_WORDS = tl.constexpr(6)

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
STRIDED = tl.constexpr(4)

# Work items of the match, int32.
WORK_LAYER = tl.constexpr(0)
WORK_GROUP_ROW = tl.constexpr(1)  # the group's first row
WORK_RANK = tl.constexpr(2)  # first place in the group's list of sampled filters
WORK_COLUMN = tl.constexpr(3)  # first filter of the group to compare with
WORK_COLUMN_END = tl.constexpr(4)
WORK_COLUMNS = tl.constexpr(5)

# A pair packed into 64 bits: the upper half ranks it, the lower half is the partner's row, xor FURTHEST_ROW.
NO_PAIR = tl.constexpr(-(2**63))  # below every pair
FURTHEST_ROW = tl.constexpr(2**31 - 1)

# State words of a slot, int32: zero before a draw counts and after the merge.
ACTIVE_ROWS = tl.constexpr(0)  # length of the list of active rows
SCRATCH_USED = tl.constexpr(1)  # in units of 16 bytes
FINISHED = tl.constexpr(2)  # programs of the merge launch that are through
DEFERRED_ROWS = tl.constexpr(3)  # length of the list of rows that found no scratch
STATE_WORDS = tl.constexpr(4)

# Running counts of each row, int32 ``(rows, ROW_COUNTS)``, over all calls that may write; never reset by a kernel. The
# merge adds to both at once, as the halves of 64 bits.
TIMES_SAMPLED = tl.constexpr(0)
TIMES_PASSED = tl.constexpr(1)
ROW_COUNTS = tl.constexpr(2)

# Outcome of a row, int8.
NOT_SAMPLED = tl.constexpr(0)
SAMPLED = tl.constexpr(1)
PASSED = tl.constexpr(2)
