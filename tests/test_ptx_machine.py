"""The PTX machine's warps, barriers, schedules and counts, on kernels written by hand."""

import numpy as np
import pytest
from ptx.between import Touched
from ptx.handwritten import kernel, kinds, run
from ptx.machine import Machine, Schedule, StuckError
from ptx.memory import Memory
from ptx.parse import parse
from ptx.profile import Profile, passes, sectors
from ptx.program import Program

OWN = "mad.wide.u32 %rd1, %t, 4, %a;"
WAYS = ["even", "speeds", "priorities", "turns", "serial"]


def out(body, *, warps=1, ctas=1, **settings):
    """What a kernel leaves in an array with a word per thread of a CTA."""
    array = np.zeros(32 * warps, "u4")
    machine = run(kernel(body, ["a"], warps=warps, shared_bytes=256), {"a": array}, ctas=ctas, **settings)
    assert not machine.findings
    return array


# ----------------------------------------------------------------------------------------------------------- branches


def test_lanes_part_and_meet_again():
    """The Collatz sequence of each thread's number: lanes leave the loop one by one."""

    def steps(n):
        count = 0
        while n > 1:
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    got = out(f"""{OWN} add.s32 %r1, %t, 1; mov.b32 %r2, 0;
        $LOOP: setp.le.s32 %p1, %r1, 1; @%p1 bra $DONE; and.b32 %r3, %r1, 1; setp.eq.s32 %p2, %r3, 0; @%p2 bra $EVEN;
        mul.lo.s32 %r1, %r1, 3; add.s32 %r1, %r1, 1; bra.uni $NEXT;
        $EVEN: shr.u32 %r1, %r1, 1;
        $NEXT: add.s32 %r2, %r2, 1; bra $LOOP;
        $DONE: bar.sync 0; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; shfl.sync.bfly.b32 %r2, %r3, 1, 31, -1;
        st.global.b32 [%rd1], %r2;""", warps=2)  # fmt: skip
    assert got.tolist() == [steps(n + 1) for n in range(64)]


def test_lanes_may_end_apart():
    got = out(
        f"{OWN} st.global.b32 [%rd1], %t; setp.lt.s32 %p1, %t, 7; @!%p1 bra $REST; ret;"
        "$REST: add.s32 %r1, %t, 100; st.global.b32 [%rd1], %r1;"
    )
    assert got.tolist() == [n if n < 7 else n + 100 for n in range(32)]


def test_branches_by_table():
    body = f"""{OWN} shr.u32 %r1, %t, 5; $TABLE: .branchtargets $ZERO, $ONE, $TWO; brx.idx %r1, $TABLE;
        $ZERO: mov.b32 %r2, 10; bra $END; $ONE: mov.b32 %r2, 11; bra $END; $TWO: mov.b32 %r2, 12;
        $END: st.global.b32 [%rd1], %r2;"""
    assert out(body, warps=3).tolist() == [10] * 32 + [11] * 32 + [12] * 32
    with pytest.raises(NotImplementedError, match="diverges"):
        out(body.replace("shr.u32 %r1, %t, 5", "and.b32 %r1, %t, 1"))


def test_registers_begin_with_anything_and_names_end_with_their_braces():
    seen = {tuple(out(f"{OWN} st.global.b32 [%rd1], %r9;", seed=seed).tolist()) for seed in range(3)}
    assert len(seen) == 3
    assert (out(f"{OWN} mov.b32 %r1, 1; {{ .reg .b32 %r1; mov.b32 %r1, 2; }} st.global.b32 [%rd1], %r1;") == 1).all()


def test_parameters_are_what_was_passed():
    text = """.visible .entry k(.param .u64 a, .param .u32 b, .param .f32 c, .param .u64 d) .reqntid 32 {
        .reg .b32 %r<4>; .reg .b64 %rd<6>; .reg .pred %p<2>; mov.u32 %r0, %tid.x; setp.eq.s32 %p0, %r0, 0;
        ld.param.b64 %rd0, [a]; ld.param.s32 %rd1, [b]; ld.param.b32 %r1, [b]; ld.param.b32 %r2, [c];
        ld.param.b64 %rd2, [d]; ld.param.b32 %r3, [d+4]; @%p0 st.global.b64 [%rd0], %rd1;
        @%p0 st.global.v2.b32 [%rd0+8], {%r1, %r2}; @%p0 st.global.b64 [%rd0+16], %rd2;
        @%p0 st.global.b32 [%rd0+24], %r3; ret; }"""
    array = np.zeros(4, "u8")
    memory = Memory([("a", array.ctypes.data, array.ctypes.data + 32, True)])
    Machine(Program(text), memory, [array.ctypes.data, -5, 0.1, 2**64 - 3], (1, 1), Schedule()).run()
    memory.write_back()
    assert array[0] == 2**64 - 5
    assert array.view("u4")[2] == 2**32 - 5
    assert array.view("f4")[3] == np.float32(0.1)
    assert (array[2], array[3]) == (2**64 - 3, 2**32 - 1)


def test_where_instructions_come_from_is_remembered():
    kernel = parse(""".visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .f32 k_param_1)
        .reqntid 128 {
        .reg .b32 %r<2>;
        .loc 2 17 5 // b.py:17:5
        mov.b32 %r0, %r1; /* a comment */
        .loc 1 3 1, function_name $L, inlined_at 2 9 1
        $L: ret; }
        .file 1 "/x/a.py"
        .file 2 "/x" "y/b.py" """)
    assert [instr.place for instr in kernel.instrs] == [("b.py", 17), ("a.py", 3)]
    assert (kernel.name, kernel.params, kernel.threads) == ("k", [("k_param_0", 8), ("k_param_1", 4)], 128)
    assert kernel.labels == {"$L": 1}


# ----------------------------------------------------------------------------------------------------------- barriers


def test_a_barrier_joins_all_warps():
    body = f"""{OWN} shl.b32 %r1, %t, 2; mov.b32 %r2, smem; sub.s32 %r3, %r2, %r1; st.shared.b32 [%r1], %t; {{}}
        ld.shared.b32 %r4, [%r3+252]; st.global.b32 [%rd1], %r4;"""
    for seed in range(12):
        assert out(body.format("bar.sync 0;"), warps=2, seed=seed, how=WAYS[seed % 5]).tolist() == list(
            range(63, -1, -1)
        )
    outcomes = set()
    for seed in range(12):
        try:
            array = np.zeros(64, "u4")
            machine = run(kernel(body.format(""), ["a"], warps=2, shared_bytes=256), {"a": array}, seed=seed)
            outcomes |= kinds(machine)
        except RuntimeError as error:
            outcomes.add(str(error).split(": ")[-1])
    assert outcomes == {"shared memory is read and was never written", "R-W", "W-R"} - ({"R-W"} - outcomes)


@pytest.mark.parametrize(("body", "message"), [
    ("setp.lt.s32 %p1, %t, 32; @%p1 bra $END; bar.sync 0; $END:", "not all warps come to"),
    ("setp.lt.s32 %p1, %t, 32; @%p1 bra $ONE; bar.sync 0; bra $END; $ONE: bar.sync 1; $END:", "not all warps come to"),
    ("setp.lt.s32 %p1, %t, 5; @%p1 bra $END; bar.sync 0; $END:", "not by all lanes"),
    ("setp.lt.s32 %p1, %t, 5; @%p1 bar.sync 0;", "not by all lanes"),
    ("setp.lt.s32 %p1, %t, 5; @%p1 bar.warp.sync -1;", "not by all lanes"),
    ("setp.lt.s32 %p1, %t, 5; @%p1 shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;", "not by all lanes"),
    ("$LOOP: ld.global.gpu.relaxed.b32 %r1, [%a]; setp.eq.s32 %p1, %r1, 0; @%p1 bra $LOOP;", "no end after 500 steps"),
])  # fmt: skip
def test_barriers_that_not_all_come_to(body, message):
    for how in WAYS:
        with pytest.raises((StuckError, RuntimeError), match=message):
            out(body, warps=2, how=how, max_steps=500)


def test_warps_that_meet_at_different_barriers_are_reported():
    program = kernel(
        "setp.lt.s32 %p1, %t, 32; @%p1 bra $ONE; bar.sync 0; bra $END; $ONE: bar.sync 0; $END:", ["a"], warps=2
    )
    machine = run(program, {"a": np.zeros(1, "u4")})
    assert kinds(machine) == {"barrier"}
    (finding,) = machine.findings.values()
    assert str(finding).count("bar.sync 0") == 2


def test_a_barrier_of_some_warps_only():
    got = out(
        f"""{OWN} setp.lt.s32 %p1, %t, 32; @%p1 bra $END; bar.sync 1, 64; $END: st.global.b32 [%rd1], %t;""", warps=3
    )
    assert got.tolist() == list(range(96))


def test_a_deleted_barrier_is_missed():
    body = """setp.eq.s32 %p1, %t, 0; mov.b32 %r1, 1; @%p1 st.shared.b32 [smem], %r1;
        bar.sync 0; ld.shared.b32 %r2, [smem]; bar.sync 0;"""
    program = kernel(body, [], warps=2, shared_bytes=16)
    first, second = program.barriers()
    for deleted, missed in ((first, True), (second, False)):
        seen = set()
        for seed in range(10):
            try:
                seen |= kinds(run(program.without(deleted), {}, seed=seed))
            except RuntimeError:
                seen.add("never written")
        assert bool(seen) == missed
    assert program.barriers() == [first, second]


PUT, GET = "st.shared.b32 [%r1], %t;", "ld.shared.b32 %r4, [%r3+252];"  # own word, another thread's
ADD = "atom.global.gpu.acq_rel.add.u32 %r5, [%a+256], 1;"
NEVER = "setp.eq.s32 %p1, %t, %t; @%p1 bra $END;"


@pytest.mark.parametrize(("body", "needed"), [
    (f"{PUT} bar.sync 0; {GET}", [True]),
    (f"{GET} bar.sync 0; {PUT}", [True]),
    (f"{PUT} bar.sync 0; bar.sync 0; {GET}", [False, False]),
    (f"{PUT} bar.sync 0; bar.sync 1, 32; {GET}", [True, False]),
    (f"{PUT} bar.sync 0; {GET} bar.sync 0; st.shared.b32 [%r1+256], %t;", [True, False]),
    (f"{PUT} bar.sync 0; {GET} bar.sync 0; st.shared.b8 [%r1+255], %rs1;", [True, True]),
    (f"st.shared.b8 [%r1+255], %rs1; bar.sync 0; {GET}", [True]),
    (f"{GET} bar.sync 0; {GET}", [False]),
    (f"{PUT} setp.lt.s32 %p1, %a0, 1; @%p1 bra $ON; bar.sync 0; $ON: bar.sync 0; {GET}", [False, True]),
    (f"{PUT} bar.sync 0; setp.lt.s32 %p1, %a0, 1; @%p1 bra $ON; bar.sync 0; $ON: {GET}", [True, False]),
    (f"$LOOP: {PUT} bar.sync 0; {GET} add.s32 %a0, %a0, 1; setp.lt.s32 %p1, %a0, 3; @%p1 bra $LOOP;", [True]),
    (f"$LOOP: bar.sync 0; {PUT} bar.sync 0; {GET} add.s32 %a0, %a0, 1; setp.lt.s32 %p1, %a0, 3; @%p1 bra $LOOP;",
     [True, True]),
    (f"{PUT} bar.sync 0; {NEVER} {GET} $END:", [True]),
    (f"{PUT} bar.sync 0; {NEVER} ld.global.b32 %r5, [%rd1]; $END:", [False]),
    (f"st.global.b32 [%rd1], %t; bar.sync 0; {ADD}", [True]),
    (f"st.global.b32 [%rd1], %t; bar.sync 0; {ADD.replace('acq_rel', 'acquire')}", [False]),
    (f"{ADD} bar.sync 0; ld.global.b32 %r5, [%rd1];", [True]),
    (f"{ADD.replace('acq_rel', 'release')} bar.sync 0; ld.global.b32 %r5, [%rd1];", [False]),
    (f"{ADD} bar.sync 0; {PUT}", [False]),
])  # fmt: skip
def test_what_a_barrier_stands_between_alone(body, needed):
    """Paths count whether or not they were taken; of accesses that none came to all bytes of their kind of memory."""
    start = f"{OWN} shl.b32 %r1, %t, 2; mov.b32 %r2, smem; sub.s32 %r3, %r2, %r1; mov.b32 %a0, 0; {PUT}"
    program = kernel(f".reg .b32 %a0; {start} bar.sync 0; bar.sync 0; {body}", ["a"], warps=2, shared_bytes=512)
    touched = Touched(program)
    run(touched.program, {"a": np.zeros(80, "u4")})
    assert [bool(touched.only_by(step)) for step in program.barriers()[2:]] == needed


# ---------------------------------------------------------------------------------------------------------- schedules

SIGN_IN = """mov.b32 %r1, 1; setp.eq.s32 %p1, %t, 0; @!%p1 bra $END;
    atom.global.gpu.relaxed.add.u32 %r2, [%a+512], %r1; atom.global.gpu.relaxed.max.u32 %r5, [%a+516], %r2;
    atom.global.gpu.relaxed.add.u32 %r3, [%a+520], %r1; mad.wide.u32 %rd1, %r3, 4, %a; st.global.b32 [%rd1], %c;
    mov.b32 %r4, -1; red.global.gpu.relaxed.add.u32 [%a+512], %r4; $END:"""


def sign_in(**settings):
    """The order in which eight CTAs come by, and how many others were there at most."""
    array = np.zeros(256, "u4")
    run(kernel(SIGN_IN, ["a"]), {"a": array}, ctas=8, **settings)
    assert array[130] == 8
    return array[:8].tolist(), int(array[129])


@pytest.mark.parametrize("how", WAYS)
def test_every_cta_runs_once_and_a_seed_repeats_itself(how):
    orders, peaks = set(), []
    for seed in range(20):
        order, peak = sign_in(seed=seed, how=how)
        assert sorted(order) == list(range(8))
        assert (order, peak) == sign_in(seed=seed, how=how)
        orders.add(tuple(order))
        peaks.append(peak)
        assert sign_in(seed=seed, how=how, resident=2)[1] <= 1
    if how in ("turns", "serial"):
        assert orders == {tuple(range(8))}
        assert max(peaks) == (7 if how == "turns" else 0)
    else:
        assert len(orders) > 5
        assert len({tuple(sign_in(seed=seed, how=how, resident=1)[0]) for seed in range(9)}) > 5, "random at the start"
        assert max(peaks) > (0 if how == "priorities" else 2)  # which change once in fifty steps


def test_a_way_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="how must be even, speeds, priorities, turns or serial, not 'odd'"):
        sign_in(how="odd")


def test_every_interleaving_of_two_short_warps_is_found():
    """Three stores against three stores to one word: any of them may be the last before each load."""
    body = """setp.eq.s32 %p1, %c, 0; setp.eq.s32 %p2, %t, 0; @!%p2 bra $END; @%p1 bra $ONE;
        ld.global.gpu.relaxed.b32 %r1, [%a]; ld.global.gpu.relaxed.b32 %r2, [%a]; mad.lo.s32 %r3, %r1, 4, %r2;
        st.global.b32 [%a+4], %r3; bra $END;
        $ONE: mov.b32 %r1, 1; red.global.gpu.relaxed.add.u32 [%a], %r1; red.global.gpu.relaxed.add.u32 [%a], %r1;
        red.global.gpu.relaxed.add.u32 [%a], %r1;
        $END:"""
    program, seen = kernel(body, ["a"]), set()
    for seed in range(400):
        array = np.zeros(2, "u4")
        run(program, {"a": array}, ctas=2, schedule=Schedule(seed))
        seen.add(divmod(int(array[1]), 4))
    assert seen == {(first, second) for first in range(4) for second in range(first, 4)}


# ------------------------------------------------------------------------------------------------------------- counts


def test_sectors_and_passes():
    lanes = np.arange(32, dtype="u8")
    assert sectors(lanes * np.uint64(4) + np.uint64(256)) == 4
    assert sectors(lanes * np.uint64(4) + np.uint64(272)) == 5
    assert sectors(lanes * np.uint64(16)) == 16
    assert sectors(lanes * np.uint64(0)) == 1
    assert sectors(lanes * np.uint64(64)) == 32
    assert passes(lanes * np.uint64(4), 4) == 1
    assert passes(lanes * np.uint64(8), 4) == 2
    assert passes(lanes * np.uint64(128), 4) == 32
    assert passes(lanes * np.uint64(0), 4) == 1
    assert passes(lanes * np.uint64(16), 16) == 4
    assert passes(lanes * np.uint64(8), 8) == 2
    assert passes(lanes * np.uint64(144), 16) == 4, "rows of 128 bytes, padded by 16"
    assert passes(lanes * np.uint64(128), 16) == 32
    assert passes(np.where(lanes < 8, lanes * np.uint64(128), 0), 16) == 11, "eight lanes at a time"


def aligned(words):
    """An array that begins with a sector."""
    whole = np.zeros(words + 8, "u4")
    return whole[-whole.ctypes.data % 32 // 4 :][:words]


def test_profiles_count_what_was_executed():
    program = kernel(f"""{OWN} mov.b32 %r1, 0; $LOOP: ld.global.b32 %r2, [%rd1]; add.s32 %r1, %r1, 1; bar.sync 0;
        setp.lt.s32 %p1, %r1, 3; @%p1 bra $LOOP; setp.lt.s32 %p2, %t, 4;
        @%p2 st.global.b32 [%rd1], %r1;""", ["a"], warps=2)  # fmt: skip
    profile = Profile(program)
    run(program, {"a": aligned(64)}, ctas=5, profile=profile)
    counts = profile.instructions()
    assert (counts["ld"] - 10, counts["add"], counts["bar"], counts["bra"]) == (30, 30, 30, 30)  # and a parameter each
    assert counts["st"] == 10, "by both warps, if by no lane of one"
    assert profile.barriers() == 15
    assert vars(profile.memory("ld.global")) == {"requests": 30, "lanes": 960, "bytes": 3840, "parts": 120}
    assert vars(profile.memory("st.global")) == {"requests": 5, "lanes": 20, "bytes": 80, "parts": 5}
    assert profile.memory("atom").requests == 0


def test_a_chain_of_loads_goes_through_barriers():
    """One warp goes on with what it has loaded, and the other waits for it."""
    program = kernel("""setp.ge.s32 %p1, %t, 32; @%p1 bra $MEET; ld.global.b32 %r1, [%a]; setp.eq.s32 %p2, %r1, 7;
        @%p2 bra $MEET; $MEET: bar.sync 0; @%p1 ld.global.b32 %r1, [%a];""", ["a"], warps=2)  # fmt: skip
    profile = Profile(program)
    run(program, {"a": np.zeros(8, "u8")}, profile=profile)
    assert profile.chain == 2


@pytest.mark.parametrize(("body", "loads"), [
    ("", 0),
    ("ld.global.b64 %rd1, [%a]; ld.global.b64 %rd2, [%a+8]; ld.global.b64 %rd3, [%a+16];", 1),
    ("ld.global.b64 %rd1, [%a]; add.s64 %rd2, %rd1, %a; ld.global.b64 %rd3, [%rd2]; ld.global.b64 %rd4, [%a];", 2),
    ("ld.global.b32 %r1, [%a]; setp.eq.s32 %p1, %r1, 0; @%p1 ld.global.b32 %r2, [%a];"
     "setp.eq.s32 %p2, %r2, 0; @%p2 ld.global.b32 %r2, [%a];", 3),
    ("ld.global.b32 %r1, [%a]; setp.eq.s32 %p1, %r1, 1; @%p1 ld.global.b32 %r2, [%a];", 1),
    ("ld.global.b32 %r1, [%a]; setp.eq.s32 %p1, %r1, 1; @%p1 bra $END; ld.global.b32 %r2, [%a]; $END:", 2),
    ("ld.global.gpu.acquire.b32 %r1, [%a]; ld.global.b32 %r2, [%a];", 2),
    ("mov.b32 %r1, 0; atom.global.gpu.relaxed.add.u32 %r2, [%a], %r1;"
     "atom.global.gpu.relaxed.add.u32 %r3, [%a], %r2;", 2),
    ("mov.b32 %r1, 0; red.global.gpu.relaxed.add.u32 [%a], %r1; red.global.gpu.relaxed.add.u32 [%a], %r1;", 0),
    ("ld.global.b32 %r1, [%a]; st.shared.b32 [smem], %r1; bar.sync 0;"
     "ld.shared.b32 %r2, [smem]; setp.eq.s32 %p1, %r2, 0; @%p1 ld.global.b32 %r2, [%a];", 2),
    ("ld.global.b32 %r1, [%a]; st.shared.b32 [smem], %r1; bar.sync 0;"
     "setp.eq.s32 %p1, %r9, 0; @%p1 ld.global.b32 %r2, [%a];", 1),
])  # fmt: skip
def test_chains_of_loads(body, loads):
    program = kernel(f"mov.b32 %r9, 0; {body}", ["a"], shared_bytes=16)
    profile = Profile(program)
    run(program, {"a": np.zeros(8, "u8")}, profile=profile)
    assert profile.chain == loads
