"""The PTX machine's memory: values, bounds, order and races, on kernels written by hand."""

import numpy as np
import pytest
from ptx.handwritten import kernel, kinds, run
from ptx.machine import Schedule
from ptx.memory import AccessError

LANES = np.arange(32)
WAYS = ["even", "speeds", "priorities"]
WEAK = (0.05, 0.5)


def at(name, size, register="%rd1"):
    """The address of the thread's own element."""
    return f"mad.wide.u32 {register}, %t, {size}, %{name};"


# ------------------------------------------------------------------------------------------------------------- values


WIDTHS = [("b8", "u1", "rs"), ("b16", "u2", "rs"), ("b32", "u4", "r"), ("b64", "u8", "rd")]
WIDTHS = [(*width, vector) for width in WIDTHS for vector in (1, 2, 4) if int(width[0][1:]) * vector <= 128]


@pytest.mark.parametrize(("kind", "dtype", "register", "vector"), WIDTHS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_and_stores_of_every_width(kind, dtype, register, vector, space):
    size = np.dtype(dtype).itemsize * vector
    source = np.random.default_rng(0).integers(0, 2**63, 32 * vector, "u8").astype(dtype)
    target = np.zeros_like(source)
    registers = ", ".join(f"%{register}{4 + i}" for i in range(vector))
    registers, suffix = (f"{{{registers}}}", f".v{vector}") if vector > 1 else (registers, "")
    body = f"{at('a', size)} {at('b', size, '%rd2')} ld.global{suffix}.{kind} {registers}, [%rd1];"
    if space == "shared":
        body += f"""mad.lo.s32 %r1, %t, {size}, 0; st.shared{suffix}.{kind} [%r1+64], {registers};
            ld.shared{suffix}.{kind} {registers}, [%r1+64];"""
    body += f"st.global{suffix}.{kind} [%rd2], {registers};"
    run(kernel(body, ["a", "b"], shared_bytes=64 + 32 * size), {"a": source, "b": target})
    assert (source == target).all()


def test_scattered_masked_and_shared_places():
    source = np.arange(100, dtype="u4")
    order = np.random.default_rng(0).permutation(100)[:32].astype("u4")
    target = np.zeros(32, "u4")
    run(kernel(f"""{at('o', 4)} ld.global.b32 %r1, [%rd1]; mad.wide.u32 %rd2, %r1, 4, %a; setp.lt.u32 %p1, %r1, 50;
        mov.b32 %r2, 7; @%p1 ld.global.b32 %r2, [%rd2]; {at('b', 4, '%rd3')} setp.ne.s32 %p2, %t, 5;
        @!%p2 bra $SKIP; st.global.b32 [%rd3], %r2; $SKIP: ld.global.b32 %r3, [%a+12];""",
        ["a", "o", "b"]), {"a": source, "o": order, "b": target})  # fmt: skip
    expected = np.where(order < 50, order, 7)
    expected[5] = 0
    assert (target == expected).all()


def test_any_lane_may_win_a_place_in_shared_memory():
    program = kernel(
        "st.shared.b32 [smem], %t; bar.sync 0; ld.shared.b32 %r1, [smem]; st.global.b32 [%a], %r1;",
        ["a"],
        shared_bytes=16,
    )
    winners = set()
    for seed in range(20):
        array = np.zeros(1, "u4")
        run(program, {"a": array}, seed=seed)
        winners.add(int(array[0]))
    assert len(winners) > 5


def test_narrow_and_signed_loads_fill_wider_registers():
    source = np.arange(-16, 16, dtype="i4")
    target = np.zeros(32, "i8")
    run(kernel(f"""{at('a', 4)} ld.global.b32 %r1, [%rd1]; shl.b32 %r2, %t, 2; st.shared.b32 [%r2], %r1;
        ld.shared.s32 %rd2, [%r2]; {at('b', 8, '%rd3')} st.global.b64 [%rd3], %rd2;""", ["a", "b"], shared_bytes=128),
        {"a": source, "b": target})  # fmt: skip
    assert (target == source).all()


def test_accesses_may_span_tensors_and_views_of_one():
    whole = np.arange(64, dtype="u4")
    views = {"a": whole[:40], "again": whole[20:]}
    target = np.zeros(32, "u4")
    run(kernel(f"""{at('a', 8)} ld.global.b32 %r1, [%rd1]; setp.lt.s32 %p1, %t, 16; selp.b64 %rd4, %b, %a, %p1;
        mad.wide.u32 %rd2, %t, 4, %rd4; st.global.b32 [%rd2], %r1;""", ["a", "again", "b"]),
        views | {"b": target})  # fmt: skip
    assert (target[:16] == np.arange(0, 32, 2)).all()
    assert (whole[16:32] == np.arange(32, 64, 2)).all()


@pytest.mark.parametrize(("operation", "kind", "dtype", "function"), [
    ("add", "u32", "u4", np.add), ("max", "s32", "i4", np.maximum), ("min", "s32", "i4", np.minimum),
    ("max", "s64", "i8", np.maximum),
    ("and", "b32", "u4", np.bitwise_and), ("or", "b32", "u4", np.bitwise_or)])  # fmt: skip
@pytest.mark.parametrize("op", ["atom", "red"])
def test_atomics(op, operation, kind, dtype, function):
    values = np.random.default_rng(1).integers(0, 2**63, 64, "u8").astype(dtype)
    total, seen = np.array([5], dtype), np.zeros(64, dtype)
    size, reg = np.dtype(dtype).itemsize, "rd" if dtype == "i8" else "r"
    result = f"%{reg}8, " if op == "atom" else ""
    body = f"""{at("a", size)} ld.global.b{8 * size} %{reg}9, [%rd1];
        {op}.global.gpu.relaxed.{operation}.{kind} {result}[%b], %{reg}9;"""
    if op == "atom":
        body += f"{at('c', size, '%rd2')} st.global.b{8 * size} [%rd2], %{reg}8;"
    machine = run(kernel(body, ["a", "b", "c"], warps=2), {"a": values, "b": total, "c": seen})
    with np.errstate(over="ignore"):
        assert total[0] == function.reduce(np.append(values, np.array([5], dtype)), dtype=dtype)
        if op == "atom" and operation == "add":  # each result is what came before it
            after = seen + values
            assert sorted([*seen, total[0]]) == sorted([5, *after])
    assert not machine.findings


# ------------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(("body", "message"), [
    ("ld.global.b32 %r1, [%a+128];", "out of bounds: 4 bytes"),
    ("ld.global.b32 %r1, [%rd1+4];", "out of bounds: 4 bytes"),
    ("st.global.v2.b32 [%rd3], {%t, %t};", "out of bounds: 8 bytes"),
    ("setp.eq.s32 %p1, %t, 9; @%p1 ld.global.b32 %r1, [%a+-4];", "out of bounds"),
    ("ld.global.b32 %r1, [%a+2];", "misaligned"),
    ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", "misaligned"),
    ("red.global.gpu.relaxed.add.u32 [%rd1+4], %t;", "out of bounds"),
    ("ld.shared.b32 %r1, [64];", "out of bounds"),
    ("ld.shared.b32 %r1, [%r9+1];", "misaligned"),
    ("ld.shared.b32 %r1, [%r9+0];", "never written"),
    ("st.shared.b32 [%r9], %r9; ld.shared.v2.b32 {%r1, %r2}, [%r9];", "never written"),
    ("ld.global.b32 %r1, [%u];", r"u\+0 is read and was never written"),
    ("st.global.b16 [%u], %rs1; ld.global.b32 %r1, [%u];", r"u\+0 is read and was never written"),
    ("red.global.gpu.relaxed.add.u32 [%u], %t;", "was never written"),
    ("st.global.b32 [%a], %t;", "different values"),
])  # fmt: skip
def test_what_is_not_allowed_is_raised(body, message):
    body = body.replace("[64]", "[smem+64]")
    program = kernel(
        f"{at('a', 4)} mad.wide.u32 %rd3, %t, 8, %a; mov.b32 %r9, 8; mov.b16 %rs1, 1; {body}",
        ["a", "u"],
        shared_bytes=64,
    )
    with pytest.raises(AccessError, match=message):
        run(program, {"a": np.zeros(32, "u4"), "u": np.zeros(4, "u4")}, undefined=("u",))


# -------------------------------------------------------------------------------------------------------------- order


LOOK = "ld.global.gpu.acquire.b32 %r4, [%flag];"
LOOK_ATOMICALLY = "atom.global.gpu.acquire.add.u32 %r4, [%flag], %r6;"


def message(flag_order="acq_rel", barrier="bar.sync 0;", look=LOOK, warps=2):
    """CTA 0 stores 64 words and says so; CTA 1 looks, and copies them if it was told."""
    return kernel(f"""
        {at('data', 4)} setp.ne.s32 %p1, %c, 0; @%p1 bra $READ;
        add.s32 %r1, %t, 100; st.global.b32 [%rd1], %r1;
        {barrier} setp.ne.s32 %p2, %t, 0; mov.b32 %r2, 1;
        @!%p2 atom.global.gpu.{flag_order}.add.u32 %r3, [%flag], %r2;
        bra $END;
        $READ: setp.eq.s32 %p2, %t, 0; mov.b32 %r4, 0;
        mov.b32 %r6, 0; @%p2 {look}
        @%p2 st.shared.b32 [smem], %r4; bar.sync 0; ld.shared.b32 %r4, [smem]; setp.eq.s32 %p3, %r4, 0; @%p3 bra $END;
        ld.global.b32 %r5, [%rd1]; {at('out', 4, '%rd2')} st.global.b32 [%rd2], %r5;
        $END:""", ["data", "flag", "out"], warps=warps, shared_bytes=16)  # fmt: skip


def messages(program, seeds=60, weak=WEAK, warps=2):
    """How often a message came, how often it was wrong, and the kinds of races."""
    came, wrong, found = 0, 0, set()
    for seed in range(seeds):
        data, flag, out = np.zeros(32 * warps, "u4"), np.zeros(1, "u4"), np.ones(32 * warps, "u4")
        settings = Schedule(seed, WAYS[seed % 3], weak=weak)
        found |= kinds(run(program, {"data": data, "flag": flag, "out": out}, ctas=2, schedule=settings))
        assert (data == np.arange(32 * warps) + 100).all(), "all stores have arrived at the end"
        came += bool((out != 1).any())
        wrong += bool((out != 1).any()) and bool((out != data).any())
    return came, wrong, found


def test_a_release_and_an_acquire_pass_a_message_on():
    came, wrong, found = messages(message())
    assert 10 < came < 60
    assert (wrong, found) == (0, set())
    for other in (message("release"), message(look=LOOK_ATOMICALLY)):
        came, wrong, found = messages(other)
        assert 10 < came < 60
        assert (wrong, found) == (0, set())


RELAXED = [look.replace("acquire", "relaxed") for look in (LOOK, LOOK_ATOMICALLY)]


@pytest.mark.parametrize("broken", [
    {"flag_order": "relaxed"}, {"flag_order": "acquire"}, {"barrier": ""}, {"look": RELAXED[0]}, {"look": RELAXED[1]},
    {"look": LOOK.replace("gpu.acquire.", "")}], ids=str)  # fmt: skip
def test_a_message_without_them_races_and_comes_out_wrong(broken):
    came, wrong, found = messages(message(**broken), 100)
    assert came > 5
    assert wrong > 0
    assert "W-R" in found
    came, wrong, found = messages(message(**broken), 200, weak=None)
    assert came > 10
    assert "W-R" in found, "the detector does not depend on what memory does"
    assert (wrong > 0) == ("barrier" in broken)


def test_a_release_covers_its_own_lane_and_what_a_barrier_joined():
    """One warp: lanes other than the one that releases have not been waited for."""
    came, wrong, found = messages(message(barrier="", warps=1), warps=1)
    assert came > 10
    assert wrong > 0
    assert "W-R" in found
    came, wrong, found = messages(message(barrier="bar.warp.sync -1;", warps=1), warps=1)
    assert came > 10
    assert (wrong, found) == (0, set())


def test_a_load_never_goes_back_in_time():
    """Two loads of one word by one CTA, while another one counts it up."""
    program = kernel("""
        setp.ne.s32 %p1, %c, 0; @%p1 bra $READ;
        mov.b32 %r1, 0; setp.eq.s32 %p2, %t, 0;
        $LOOP: add.s32 %r1, %r1, 1; @%p2 st.global.b32 [%word], %r1; setp.lt.s32 %p3, %r1, 6; @%p3 bra $LOOP; bra $END;
        $READ: mov.b32 %r2, 0; mov.b32 %r3, 0;
        $AGAIN: ld.global.b32 %r4, [%word]; max.s32 %r2, %r2, %r4; setp.eq.s32 %p4, %r2, %r4; @%p4 bra $FINE;
        mov.b32 %r9, 1; st.global.b32 [%bad], %r9; $FINE: add.s32 %r3, %r3, 1; setp.lt.s32 %p3, %r3, 6; @%p3 bra $AGAIN;
        $END:""", ["word", "bad"])  # fmt: skip
    last = set()
    for seed in range(60):
        word, bad = np.zeros(1, "u4"), np.zeros(1, "u4")
        run(program, {"word": word, "bad": bad}, ctas=2, seed=seed, how=WAYS[seed % 3], weak=(0.3, 0.5))
        assert not bad.any()
        last.add(int(word[0]))
    assert last == {6}, "stores to one place stay in order"


def test_a_plain_load_is_no_older_than_an_ordered_one_before_it():
    program = kernel("""setp.eq.s32 %p1, %t, 0; mov.b32 %r1, 1; setp.ne.s32 %p2, %c, 0; @%p2 bra $READ;
        @%p1 red.global.gpu.relaxed.add.u32 [%a], %r1; bra $END;
        $READ: @%p1 ld.global.gpu.relaxed.b32 %r2, [%a]; @%p1 ld.global.b32 %r3, [%a];
        @%p1 st.global.v2.b32 [%out], {%r2, %r3}; $END:""", ["a", "out"])  # fmt: skip
    seen = set()
    for seed in range(80):
        a, out = np.zeros(1, "u4"), np.zeros(2, "u4")
        run(program, {"a": a, "out": out}, ctas=2, seed=seed, weak=(0.5, 1.0))
        seen.add(tuple(out.tolist()))
    assert seen == {(0, 0), (1, 1)}


def test_an_atomic_sees_what_its_own_thread_has_stored():
    program = kernel("""setp.eq.s32 %p1, %t, 0; mov.b32 %r1, 5; @%p1 st.global.b32 [%a], %r1;
        @%p1 atom.global.gpu.relaxed.add.u32 %r2, [%a], %r1; @%p1 st.global.b32 [%b], %r2;""", ["a", "b"])  # fmt: skip
    for seed in range(20):
        a, b = np.zeros(1, "u4"), np.zeros(1, "u4")
        run(program, {"a": a, "b": b}, seed=seed, weak=(0.0, 1.0))
        assert (a[0], b[0]) == (10, 5)


def test_stores_to_one_place_stay_in_order_across_a_barrier():
    """The second one may leave its warp's buffer before the first one leaves the CTA's."""
    program = kernel(
        """setp.eq.s32 %p1, %t, 0; mov.b32 %r1, 1; mov.b32 %r2, 2; @%p1 st.global.b32 [%a], %r1;
        bar.sync 0; @%p1 st.global.b32 [%a], %r2; ld.global.b32 %r3, [%b]; ld.global.b32 %r3, [%b+4];""",
        ["a", "b"],
    )
    for seed in range(80):
        a = np.zeros(1, "u4")
        run(program, {"a": a, "b": np.zeros(2, "u4")}, seed=seed, weak=(0.5, 0.5))
        assert a[0] == 2


def test_stores_to_different_places_may_arrive_in_any_order():
    program = kernel("""
        setp.ne.s32 %p1, %c, 0; setp.eq.s32 %p2, %t, 0; mov.b32 %r1, 1; @%p1 bra $READ;
        @%p2 st.global.b32 [%a], %r1; @%p2 st.global.b32 [%b], %r1; bra $END;
        $READ: @%p2 ld.global.b32 %r2, [%b]; @%p2 ld.global.b32 %r3, [%a]; @%p2 st.global.b32 [%out], %r2;
        @%p2 st.global.b32 [%out+4], %r3;
        $END:""", ["a", "b", "out"])  # fmt: skip
    seen = {None: set(), (0.3, 0.0): set()}
    for weak, found in seen.items():
        for seed in range(150):
            a, b, out = np.zeros(1, "u4"), np.zeros(1, "u4"), np.zeros(2, "u4")
            run(program, {"a": a, "b": b, "out": out}, ctas=2, seed=seed, weak=weak)
            found.add(tuple(out.tolist()))
    assert seen[None] == {(0, 0), (0, 1), (1, 1)}
    assert seen[0.3, 0.0] == {(0, 0), (0, 1), (1, 1), (1, 0)}


# -------------------------------------------------------------------------------------------------------------- races


def race_kinds(body, *, warps=2, ctas=1, shared_bytes=64, seeds=12):
    """The kinds of races in some schedules, and in how many of them there were some."""
    found, count = set(), 0
    program = kernel(f"""setp.eq.s32 %p1, %t, 0; setp.eq.s32 %p2, %t, 32; setp.eq.s32 %p3, %t, 5;
        mov.b32 %r1, 1; mov.b16 %rs1, 1; {body}""",
                     ["a"], warps=warps, shared_bytes=shared_bytes)  # fmt: skip
    for seed in range(seeds):
        machine = run(program, {"a": np.zeros(64, "u4")}, ctas=ctas, seed=seed, how=WAYS[seed % 3])
        found |= kinds(machine)
        count += bool(machine.findings)
    return found, count


LOAD, STORE, ADD = "ld.global.b32 %r2, [%a];", "st.global.b32 [%a], %r1;", "red.global.gpu.relaxed.add.u32 [%a], %r1;"


@pytest.mark.parametrize(("one", "other", "expected"), [
    (LOAD, LOAD, set()), (ADD, ADD, set()), (LOAD, STORE, {"R-W", "W-R"}), (STORE, STORE, {"W-W"}),
    (LOAD, ADD, {"R-A", "A-R"}), (STORE, ADD, {"W-A", "A-W"}),
    ("ld.global.gpu.relaxed.b32 %r2, [%a];", ADD, set()), ("ld.global.gpu.relaxed.b32 %r2, [%a];", LOAD, set()),
    ("ld.global.gpu.relaxed.b32 %r2, [%a];", STORE, {"A-W", "W-A"}),
    ("st.global.b16 [%a+2], %rs1;", LOAD, {"R-W", "W-R"}), ("st.global.b16 [%a+4], %rs1;", LOAD, set()),
    ("st.shared.b32 [smem], %r1;", "st.shared.b8 [smem+3], %rs1;", {"W-W"}),
    ("st.shared.b32 [smem], %r1;", "st.shared.b32 [smem+4], %r1;", set()),
])  # fmt: skip
def test_two_warps_race_unless_a_barrier_comes_between(one, other, expected):
    def under(predicate, text):
        return f"@{predicate} {text}"

    found, count = race_kinds(under("%p1", one) + under("%p2", other))
    assert found == expected
    assert count == (12 if expected else 0), "in every schedule"
    assert race_kinds(under("%p1", one) + "bar.sync 0;" + under("%p2", other)) == (set(), 0)


def test_two_ctas_race_whatever_barriers_there_are():
    other = """setp.ne.s32 %p4, %c, 0; @%p4 bra $TWO; st.global.b32 [%a], %r1; bar.sync 0; bra $END;
        $TWO: bar.sync 0; ld.global.b32 %r2, [%a]; $END:"""
    assert race_kinds(other, ctas=2)[1] == 12
    assert race_kinds("st.shared.b32 [smem], %r1; ", ctas=3) == (set(), 0), "each CTA has its own shared memory"


def test_lanes_of_one_warp_race_where_only_the_first_one_is_known_to_come():
    assert race_kinds(f"@%p1 {STORE} {LOAD}", warps=1)[0] == {"W-R"}
    assert race_kinds(f"{LOAD} @%p1 {STORE}", warps=1)[0] == {"R-W"}
    assert race_kinds(f"@%p1 {STORE} @%p1 {LOAD}", warps=1) == (set(), 0)
    assert race_kinds(f"@%p1 {STORE} bar.warp.sync -1; {LOAD}", warps=1) == (set(), 0)
    own = "mad.wide.u32 %rd1, %t, 4, %a; st.global.b32 [%rd1], %t;"
    assert race_kinds(f"{own} @%p1 {LOAD}", warps=1) == (set(), 0), "its own element"
    assert race_kinds(f"{own} @%p1 ld.global.b32 %r2, [%a+20];", warps=1)[0] == {"W-R"}
    assert race_kinds(f"@%p1 {STORE} ld.global.b32 %r2, [%a+4]; @%p3 {LOAD}", warps=1)[0] == {"W-R"}


def test_order_is_transitive_and_ends_with_a_plain_store():
    take = "@%p1 atom.global.gpu.{}.add.u32 %r3, [%a+{}], %r1;"
    turns = f"""setp.eq.s32 %p4, %c, 0; @!%p4 bra $NEXT; @%p1 st.global.b32 [%a], %r1; mov.b32 %r1, 100;
        {take.format("acq_rel", 64)} bra $END;
        $NEXT: {take.format("acq_rel", 64)} @%p1 setp.lt.s32 %p5, %r3, 100; @%p5 bra $END; {take.format("{}", 64)}"""
    chain = turns + "@%p1 ld.global.b32 %r4, [%a]; $END:"
    assert race_kinds(chain.format("relaxed"), warps=1, ctas=3, seeds=40) == (set(), 0)
    program = kernel("""setp.eq.s32 %p1, %t, 0; mov.b32 %r1, 1; setp.eq.s32 %p2, %c, 0; @!%p2 bra $NEXT;
        @%p1 st.global.b32 [%a], %r1; @%p1 atom.global.gpu.release.add.u32 %r2, [%a+64], %r1;
        @%p1 st.global.b32 [%a+64], %r1; bra $END;
        $NEXT: @%p1 atom.global.gpu.acquire.add.u32 %r2, [%a+64], %r1; @%p1 ld.global.b32 %r3, [%a];
        $END:""", ["a"])  # fmt: skip
    machine = run(program, {"a": np.zeros(64, "u4")}, ctas=2, how="serial")
    assert kinds(machine) == {"W-A", "W-R"}, "what a plain store overwrites, no acquire sees"


def test_compilers_may_store_copies_of_a_value_from_several_warps():
    same = "mov.b32 %r2, 3; @%p4 st.shared.b32 [smem], %r2;"
    setup = "and.b32 %r3, %t, 31; setp.eq.s32 %p4, %r3, 0;"
    assert race_kinds(f"{setup} {same} bar.sync 0; ld.shared.b32 %r4, [smem];") == (set(), 0)
    assert race_kinds(f"{setup} @%p4 st.shared.b32 [smem], %t;")[0] == {"W-W"}
    assert race_kinds("@%p1 st.shared.b32 [smem], %r1; @%p2 st.shared.b32 [smem], %r1;")[0] == {"W-W"}
    assert race_kinds(f"{setup} {same} ld.shared.b32 %r4, [smem];", seeds=30)[0] >= {"R-W"}
