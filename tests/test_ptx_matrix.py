"""The PTX machine's matrix units and asynchronous copies, against NumPy's products."""

import numpy as np
import pytest
from ptx.handwritten import kernel, kinds, run
from ptx.memory import AccessError

KINDS = {"tf32": ("f4", 8), "bf16": ("f4", 16), "f16": ("f2", 16)}  # NumPy's type of the inputs, depth


def numbers(rows, kind, seed):
    """Whole numbers that are exact in any of the types, as float64 and as 32-bit words of a row each."""
    dtype, depth = KINDS[kind]
    values = np.random.default_rng(seed).integers(-8, 8, (rows, depth)).astype("f8")
    words = values.astype(dtype)
    if kind == "bf16":
        words = (words.view("u4") >> 16).astype("u2")
    return values, np.ascontiguousarray(words).view("u4")


def repeat(count, text):
    """A line of PTX ``count`` times; ``text(k)`` is the k-th."""
    return "\n".join(map(text, range(count)))


def registers(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def fragments(words, rows):
    """What each lane holds of a matrix of 8 words per row: by the tables of the PTX manual."""
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    parts = [(0, 0), (8, 0), (0, 4), (8, 4)] if rows == 16 else [(0, 0), (0, 4)]
    return [words[group + row, place + column] for row, column in parts]


def mma(kind):
    """One product of registers that lie one after the other in memory: the factors', and the sums before it."""
    return kernel(f"""mad.wide.u32 %rd1, %t, 4, %a; mad.wide.u32 %rd2, %t, 4, %b;
        {repeat(10, lambda k: f"ld.global.b32 %r{k + 8}, [%rd1+{128 * k}];")}
        mma.sync.aligned.m16n8k{KINDS[kind][1]}.row.col.f32.{kind}.{kind}.f32
        {registers(20, 4)}, {registers(8, 4)}, {registers(12, 2)}, {registers(14, 4)};
        {repeat(4, lambda k: f"st.global.b32 [%rd2+{128 * k}], %r{k + 20};")}""", ["a", "b"])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_mma(kind):
    (a, a_words), (b, b_words) = numbers(16, kind, 0), numbers(8, kind, 1)
    c = np.random.default_rng(2).integers(-99, 99, (16, 8)).astype("f4")
    lane = np.arange(32)
    where = [(lane // 4 + 8 * (k // 2), 2 * (lane % 4) + k % 2) for k in range(4)]
    held = [*fragments(a_words, 16), *fragments(b_words, 8), *(c[place].view("u4") for place in where)]
    source, target = np.concatenate(held), np.zeros((4, 32), "u4")
    run(mma(kind), {"a": source, "b": target})
    expected = a @ b.T + c
    for k, place in enumerate(where):
        assert (target[k].view("f4") == expected[place]).all()


def test_sums_are_cut_towards_zero():
    ones = np.zeros((4, 32), "u4")
    a, c = np.zeros((10, 32), "f4"), 1 + 2.0**-23
    a[0, ::4], a[4], a[6:] = 2.0**-24, 1, c  # the exact sum lies halfway, and rounding to even would go up
    run(mma("tf32"), {"a": a, "b": ones})
    assert (ones[:2].view("f4") == np.float32(c)).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    matrices = np.arange(count * 64, dtype="u2").reshape(count, 8, 8)
    target = np.zeros((count, 32), "u4")
    fill = repeat(count, lambda k: f"""ld.global.b32 %r2, [%rd1+{4 * k}]; mad.lo.s32 %r3, %t, {4 * count}, {4 * k};
        st.shared.b32 [%r3], %r2;""")  # fmt: skip
    program = kernel(f"""mad.wide.u32 %rd1, %t, {4 * count}, %a; mad.wide.u32 %rd2, %t, 4, %b; {fill} bar.sync 0;
        and.b32 %r4, %t, {8 * count - 1}; shl.b32 %r4, %r4, 4;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(8, count)}, [%r4];
        {repeat(count, lambda k: f"st.global.b32 [%rd2+{128 * k}], %r{8 + k};")}""",
        ["a", "b"], shared_bytes=512)  # fmt: skip
    run(program, {"a": matrices, "b": target})
    for k, matrix in enumerate(matrices):
        rows = matrix.T if trans else matrix
        assert (target[k].view("u2").reshape(8, 8) == rows).all()


def test_ldmatrix_of_one_row_again_and_again():
    row, target = np.arange(4, dtype="u4"), np.zeros(32, "u4")
    program = kernel("""and.b32 %r1, %t, 3; mad.wide.u32 %rd1, %r1, 4, %a; ld.global.b32 %r2, [%rd1];
        shl.b32 %r1, %r1, 2; st.shared.b32 [%r1], %r2; bar.sync 0; mov.b32 %r4, 0;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r4];
        mad.wide.u32 %rd2, %t, 4, %b; st.global.b32 [%rd2], %r8;""", ["a", "b"], shared_bytes=16)  # fmt: skip
    run(program, {"a": row, "b": target})
    assert (target.reshape(8, 4) == row).all()


def test_stmatrix_undoes_ldmatrix():
    matrices, target = np.arange(128, dtype="u4"), np.zeros(128, "u4")
    fill = repeat(4, lambda k: f"ld.global.b32 %r2, [%rd1+{128 * k}]; st.shared.b32 [%r1+{128 * k}], %r2;")
    copy = repeat(4, lambda k: f"ld.shared.b32 %r2, [%r1+{128 * k}]; st.global.b32 [%rd2+{128 * k}], %r2;")
    program = kernel(f"""mad.wide.u32 %rd1, %t, 4, %a; shl.b32 %r1, %t, 2; mad.wide.u32 %rd2, %t, 4, %b;
        {fill} bar.sync 0; shl.b32 %r4, %t, 4;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers(8, 4)}, [%r4]; bar.sync 0; xor.b32 %r5, %r4, 16;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {registers(8, 4)}; bar.sync 0; {copy}""",
        ["a", "b"], shared_bytes=512)  # fmt: skip
    run(program, {"a": matrices, "b": target})
    assert (target.reshape(16, 2, 4) == matrices.reshape(16, 2, 4)[:, ::-1]).all()


# -------------------------------------------------------------------------------------------------------------- wgmma


def place_of(row, word, swizzle):
    """Where a word of a matrix with rows of 8 words lies, in bytes, and the descriptor's fields for it."""
    if swizzle == 0:  # blocks of 8 rows by 16 bytes, one after the other
        return row // 8 * 256 + word // 4 * 128 + row % 8 * 16 + word % 4 * 4
    byte = row * swizzle + 4 * word  # rows of as many bytes as are swizzled, 16 of them at a time
    return byte ^ (byte >> 7 & (swizzle // 16 - 1)) << 4


def place_transposed(row, column, swizzle, rows):
    """Where a 16-bit number of a matrix lies that is kept by columns: blocks of 8 columns, as wide as the swizzle."""
    width = (swizzle or 16) // 2
    block = row // width + (rows // width) * (column // 8)
    byte = block * 16 * width + column % 8 * 2 * width + row % width * 2
    return byte ^ (byte >> 7 & (swizzle // 16 - 1)) << 4 if swizzle else byte


def descriptor(start, swizzle, rows=None):
    """With ``rows`` that of a matrix that is kept by columns."""
    lead, stride = (128, 256) if swizzle == 0 else (16, 8 * swizzle)
    if rows is not None:
        block = 8 * (swizzle or 16)
        blocks = block * max(1, 2 * rows // (swizzle or 16))
        lead, stride = (block, blocks) if swizzle else (blocks, block)
    return start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | {0: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62


def signed(word):
    return word - 2**64 if word >> 63 else word


def wgmma(
    kind, swizzle, columns, *, a_from_registers=False, between="", wait="wgmma.wait_group.sync.aligned 0;", keeps="0",
    transposed=(0, 0),
):  # fmt: skip
    """One product of 64 by ``columns`` sums; the kernel, its inputs, and what it should give."""
    (a, a_words), (b, b_words) = numbers(64, kind, 3), numbers(columns, kind, 4)
    start = 64 * max(swizzle, 32)  # of the second operand
    image = np.zeros(2 * start // 4 * 2, "u4")
    for words, base, by_columns in ((a_words, 0, transposed[0]), (b_words, start, transposed[1])):
        for row in range(len(words)):
            for word in range(0 if by_columns else 8):
                image[(base + place_of(row, word, swizzle)) // 4] = words[row, word]
            for column, number in enumerate(words[row].view("u2") if by_columns else ()):
                image.view("u2")[(base + place_transposed(row, column, swizzle, len(words))) // 2] = number
    count = columns // 2
    a_at, b_at = (
        signed(descriptor(place, swizzle, rows if by_columns else None))
        for place, rows, by_columns in zip((0, start), (64, columns), transposed, strict=True)
    )
    sums = registers(16, count)
    first = f"%rd4, %rd5, {keeps}"
    loads = ""
    if a_from_registers:
        first = f"{registers(8, 4)}, %rd5, {keeps}"
        loads = repeat(4, lambda k: f"ld.global.b32 %r{8 + k}, [%rd3+{512 * k}];")
    by_columns = transposed[1:] if a_from_registers else transposed
    tail = ", 1, 1" + "".join(f", {each}" for each in (() if kind == "tf32" else by_columns))
    fill = repeat(image.size // 128, lambda k: f"""ld.global.b32 %r2, [%rd1+{512 * k}];
        st.shared.b32 [%r1+{512 * k}], %r2;""")  # fmt: skip
    body = f"""mad.wide.u32 %rd1, %t, 4, %a; mad.wide.u32 %rd2, %t, {4 * count}, %b; mad.wide.u32 %rd3, %t, 4, %f;
        shl.b32 %r1, %t, 2; {loads} {fill}
        {repeat(count, lambda k: f"mov.b32 %r{16 + k}, 0f42280000;")}
        fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd4, {a_at}; mov.b64 %rd5, {b_at};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{columns}k{KINDS[kind][1]}.f32.{kind}.{kind} {sums}, {first}{tail};
        wgmma.commit_group.sync.aligned; {between} {wait}
        {repeat(count, lambda k: f"st.global.b32 [%rd2+{4 * k}], %r{16 + k};")}"""
    program = kernel(body, ["a", "b", "f"], warps=4, shared_bytes=image.nbytes)
    held = [fragments(a_words[16 * warp : 16 * warp + 16], 16) for warp in range(4)]
    arrays = {"a": image, "b": np.zeros((128, count), "f4"), "f": np.stack(held, 1).reshape(4, 128)}
    return program, arrays, a @ b.T + (42 if keeps != "0" else 0)


def matrix_of(got, columns):
    """The 64 x N matrix that 128 threads hold."""
    matrix = np.zeros((64, columns))
    thread = np.arange(128)
    for k in range(columns // 2):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (k % 4 // 2)
        matrix[row, 8 * (k // 4) + 2 * (thread % 4) + k % 2] = got[:, k]
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("columns", [8, 32])
def test_wgmma(kind, swizzle, columns):
    program, arrays, expected = wgmma(kind, swizzle, columns, keeps="0" if columns == 8 else "-1")
    assert not run(program, arrays).findings
    assert (matrix_of(arrays["b"], columns) == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_wgmma_with_the_first_operand_in_registers(kind):
    program, arrays, expected = wgmma(kind, 64, 16, a_from_registers=True)
    assert not run(program, arrays).findings
    assert (matrix_of(arrays["b"], 16) == expected).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("transposed", [(1, 1), (0, 1), (1, 0)])
def test_wgmma_of_operands_that_lie_by_columns(kind, swizzle, transposed):
    program, arrays, expected = wgmma(kind, swizzle, 64, transposed=transposed)
    assert not run(program, arrays).findings
    assert (matrix_of(arrays["b"], 64) == expected).all()


def test_products_come_when_they_are_waited_for_and_shared_memory_may_not_change_before():
    program, arrays, expected = wgmma("bf16", 32, 8, wait="")
    run(program, arrays)
    assert (arrays["b"] == 42).all(), "not waited for: the sums are what they were"
    program, arrays, _ = wgmma("bf16", 32, 8, wait="wgmma.wait_group.sync.aligned 1;")
    run(program, arrays)
    assert (arrays["b"] == 42).all(), "of two groups, the latest may be pending"
    write = "mov.b32 %r3, 0; setp.eq.s32 %p1, %t, 127; @%p1 st.shared.b32 [smem+{}], %r3;"
    program, arrays, expected = wgmma("bf16", 32, 8, between=write.format(2048))
    assert "in flight" in kinds(run(program, arrays))
    program, arrays, _ = wgmma("bf16", 32, 8, wait=f"wgmma.wait_group.sync.aligned 0; bar.sync 0; {write.format(2048)}")
    assert not run(program, arrays).findings
    assert (matrix_of(arrays["b"], 8) == expected).all()


def test_wgmma_of_memory_never_written():
    program, arrays, _ = wgmma("bf16", 32, 8)
    first = next(number for number, step in enumerate(program.steps) if step.instr.op == "st")
    with pytest.raises(AccessError, match="shared memory is read and was never written"):
        run(program.without(first), arrays)


# ------------------------------------------------------------------------------------------------------------- copies

COPY = "cp.async.{}.shared.global [%r1], [%rd1], {}{};"


@pytest.mark.parametrize(("form", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_copies_arrive_when_they_are_waited_for(form, size):
    source, target = np.arange(8 * size, dtype="u4"), np.zeros(8 * size, "u4")
    words = size // 4
    copy = f"setp.lt.s32 %p1, %t, 20; selp.b32 %r2, {size}, 0, %p1; {COPY.format(form, size, ', %r2')}"
    back = repeat(words, lambda k: f"ld.shared.b32 %r3, [%r1+{4 * k}]; st.global.b32 [%rd2+{4 * k}], %r3;")
    program = kernel(f"""mad.wide.u32 %rd1, %t, {size}, %a; mad.wide.u32 %rd2, %t, {size}, %b;
        mul.lo.s32 %r1, %t, {size};
        {copy} cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
        {back}""", ["a", "b"], shared_bytes=32 * size)  # fmt: skip
    assert not run(program, {"a": source, "b": target}).findings
    assert (target == np.where(np.arange(8 * size) < 20 * words, source, 0)).all()


def test_copies_in_flight_may_not_be_looked_at():
    setup = "mad.wide.u32 %rd1, %t, 16, %a; shl.b32 %r1, %t, 4; mov.b32 %r2, 0; st.shared.b32 [%r1], %r2; bar.sync 0;"
    copy = COPY.format("cg", "16", "") + "cp.async.commit_group;"
    look = "ld.shared.b32 %r3, [%r1];"
    cases = {
        f"{copy} cp.async.wait_group 0; bar.sync 0; {look}": set(),
        f"{copy} {look} cp.async.wait_group 0;": {"in flight"},
        f"{copy} {copy} cp.async.wait_group 1; {look} cp.async.wait_group 0;": {"in flight"},
        f"{copy} st.shared.b32 [%r1], %r2; cp.async.wait_group 0;": {"in flight"},
        f"{copy} cp.async.wait_group 0; xor.b32 %r1, %r1, 512; {look}": {"W-R"},  # another warp's copy, not waited for
    }
    for body, expected in cases.items():
        found = set()
        for seed in range(8):
            program = kernel(setup + body, ["a"], warps=2, shared_bytes=1024)
            found |= kinds(run(program, {"a": np.arange(256, dtype="u4")}, seed=seed))
        assert expected <= found, body
        assert bool(expected) == bool(found), body


@pytest.mark.parametrize(("address", "message"), [("%rd1+16", "out of bounds"), ("%rd1+8", "misaligned")])
def test_copies_must_be_in_bounds(address, message):
    program = kernel(
        f"mad.wide.u32 %rd1, %t, 16, %a; shl.b32 %r1, %t, 4; cp.async.cg.shared.global [%r1], [{address}], 16;",
        ["a"],
        shared_bytes=512,
    )
    with pytest.raises(AccessError, match=message):
        run(program, {"a": np.zeros(128, "u4")})
