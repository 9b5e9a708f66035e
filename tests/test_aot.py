"""What Triton's compilers make of the kernels for GPUs that are not there: registers, loads and stores, arithmetic.

``aot.py`` compiles, in a process of its own. Machine code is a matter of the installed Triton; so are these tests.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from aot import ARCHS, MATCHES, MERGES, RECORD, VARIANTS
from assembly import access, arithmetic, attributed, copy_to_shared, matrix_product, unguarded_releases

every_arch = pytest.mark.parametrize("arch", ARCHS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_merge = pytest.mark.parametrize("variant", MERGES)


@pytest.fixture(scope="module")
def report():
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    script = Path(__file__).with_name("aot.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env | {"OMP_NUM_THREADS": "1"}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@every_arch
@every_variant
def test_nothing_spills(report, arch, variant):
    kernel = report["compiled"][arch][variant]
    assert kernel["stack"] == 0
    # AMD's scalar registers spill into lanes of vector registers, not into memory.
    spills = ["spills"] if arch.startswith("gfx") else ["spill_stores", "spill_loads"]
    assert [kernel[name] for name in spills] == [0] * len(spills)


@every_arch
@every_variant
def test_no_kernel_leaves_fusion_to_the_compiler(report, arch, variant):
    assert report["compiled"][arch][variant]["options"]["enable_fp_fusion"] is False


@every_arch
@every_variant
def test_registers_do_not_grow(report, arch, variant):
    record = json.loads(RECORD.read_text())
    if report["triton"] not in record:
        pytest.skip(f"no registers recorded for Triton {report['triton']}; python tests/aot.py --record does it")
    assert report["compiled"][arch][variant]["registers"] <= record[report["triton"]][arch][variant]


def spans_of(kernel, dtypes):
    """For each dtype, elements of a row that a thread takes together, and how many times for a span."""
    block, span = kernel["constants"]["BLOCK"], kernel["constants"]["SPAN"]
    per_thread = block // kernel["threads"]
    return [(per_thread, span) if dtype == "float32" else (2 * per_thread, max(1, span // 2)) for dtype in dtypes]


# Where the code of a span is: the similarity's first and others, a blend's others; the one who settles a row has the
# first and others of a blend of its own.
LOADED, MULTIPLIED, BLENDED = 5, 2, 4


@every_arch
@every_merge
def test_dense_filters_move_16_bytes_at_a_time(report, arch, variant):
    dtypes, strided, _ = MERGES[variant]
    kernel = report["compiled"][arch][variant]
    span = Counter()  # the accesses that read or write a span of one row, by their size in bytes
    for dtype, (elements, blocks) in zip(dtypes, spans_of(kernel, dtypes), strict=True):
        size = elements * (4 if dtype == "float32" else 2)
        assert size == 16
        span[size] += blocks
    for function, loads, stores in [("load_span", 2 * LOADED, 0), ("_store_blend", 0, BLENDED), ("copy_back", 1, 1)]:
        found = kernel["accesses"][function]
        wanted = {f"load {size}": loads * n for size, n in span.items() if loads}
        wanted |= {f"store {size}": stores * n for size, n in span.items() if stores}
        if not strided:
            assert found.keys() == wanted.keys(), function
        assert all(found[name] >= n for name, n in wanted.items()), (function, found, wanted)


@every_arch
@pytest.mark.parametrize("variant", MATCHES)
def test_tiles_are_multiplied_by_tensor_cores_from_16_byte_copies(report, arch, variant):
    dtype, strided, _ = MATCHES[variant]
    kernel = report["compiled"][arch][variant]
    instructions = kernel["matrix_products"]
    words = {"float32": r"tf32|f32_32x32x2_f32", "bfloat16": r"bf16|kind::f16"}
    count = sum(n for name, n in instructions.items() if re.search(words[dtype], name))
    # Three TF32 products for one of float32; AMD's matrix units multiply float32 itself.
    assert count >= (3 if dtype == "float32" and not arch.startswith("gfx") else 1), instructions
    assert kernel["warnings"] == []  # above all, that products are made to wait for each other
    if not arch.startswith("gfx"):  # there 512 threads have only 8 bytes each of a 16-bit tile
        # A strided filter's elements come one at a time; those of 2 bytes no copy can take, they go through registers.
        assert set(kernel["copies"]) == ({"16"} if not strided else {"4"} if dtype == "float32" else set())


@every_arch
def test_tiles_are_loaded_for_products_alone(report, arch):
    """Norms from the same tiles made the pipeline on Hopper too short (``kernels/match.py``)."""
    arithmetic = report["compiled"][arch]["similar bfloat16"]["arithmetic"]
    assert "_best_of_tile" in arithmetic
    assert "_tile" not in arithmetic


@every_arch
@every_merge
def test_dots_are_fused_and_blends_are_not(report, arch, variant):
    dtypes, _, _ = MERGES[variant]
    kernel = report["compiled"][arch][variant]
    per_thread = sum(elements * blocks for elements, blocks in spans_of(kernel, dtypes))
    fused = {name: count["fma"] for name, count in kernel["arithmetic"].items() if "fma" in count}
    # AMD's root and quotient are calculated by multiply-adds in the open.
    assert set(fused) - ({"cosine"} if arch.startswith("gfx") else set()) == {"_add_products"}
    # AMD's compiler leaves the first of a dot's terms as a product.
    first = sum(elements for elements, _ in spans_of(kernel, dtypes)) if arch.startswith("gfx") else 0
    assert fused["_add_products"] >= 3 * (MULTIPLIED * per_thread - first)
    blend = kernel["arithmetic"]["_store_blend"]
    assert blend["mul"] >= BLENDED * 2 * per_thread
    assert blend["add"] >= BLENDED * per_thread


@every_arch
@every_merge
def test_releases_are_behind_a_barrier(report, arch, variant):
    dtypes, strided, _ = MERGES[variant]
    kernel = report["compiled"][arch][variant]
    # For every kind of layer: of the row itself, of its partner, of a settled row's partner. And at the end.
    assert kernel["releases"] >= 3 * len(dtypes) * (1 + strided) + 1
    if kernel["threads"] > 64 or not arch.startswith("gfx"):
        assert kernel["unguarded_releases"] == []  # a wavefront of AMD's waits for itself, and gets no barrier


@every_arch
@pytest.mark.parametrize("variant", ["draw", "draw only", "draw from memory"])
def test_seed_and_step_are_passed_as_64_bits(report, arch, variant):
    bits = report["compiled"][arch][variant]["parameter_bits"]
    assert (bits["seed"], bits["step"], bits["coin_threshold"], bits["rows"]) == (64, 64, 32, 32)


@pytest.mark.parametrize(
    "kernel",
    ["_draw_kernel", "_draw_kernel only", "_list_kernel", "_match_kernel", "_count_kernel", "_merge_kernel"],
)
def test_all_launches_of_a_plan_mean_the_same_kernel(report, kernel):
    assert len(report["specialisations"][kernel]) == 1, "\n".join(report["specialisations"][kernel])


def test_record_is_complete():
    for version, archs in json.loads(RECORD.read_text()).items():
        assert {arch: set(variants) for arch, variants in archs.items()} == {arch: set(VARIANTS) for arch in ARCHS}, (
            version
        )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("	@%p8 ld.global.v4.b32 { %r42, %r43, %r44, %r45 }, [ %rd53 + 0 ];", ("load", 16)),
        ("	ld.global.b32 { %r27 }, [ %rd31 + 0 ];", ("load", 4)),
        ("	@%p35 ld.global.gpu.acquire.b32 %r135, [ %rd65 + 0 ];", ("load", 4)),
        ("	ld.global.nc.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];", ("load", 16)),
        ("	@%p1 st.global.b16 [ %rd531 + 0 ], { %rs160 };", ("store", 2)),
        ("	@%p36 atom.global.gpu.acq_rel.add.u32 %r188, [ %rd65 + 0 ], %r187;", ("atomic", 4)),
        ("	ld.shared.b32 	%r103, [global_smem];", None),
        ("	ld.param.b64 	%rd21, [_draw_kernel_param_0];", None),
        ("	global_load_dwordx4 v[0:3], v[0:1], off", ("load", 16)),
        ("	global_load_dword v47, v42, s[22:23]", ("load", 4)),
        ("	global_load_short_d16_hi v1, v[2:3], off", ("load", 2)),
        ("	scratch_store_dword off, v40, s32", ("store", 4)),
        ("	s_load_dwordx2 s[4:5], s[0:1], 0x0", None),
    ],
)
def test_accesses_are_recognised(line, expected):
    assert access(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("	fma.rn.f32 	%r358, %r48, %r56, %r358;", ("fma", 1)),
        ("	fma.rn.f32x2 	%rd1, %rd2, %rd3, %rd4;", ("fma", 2)),
        ("	mul.rn.f32 	%r1, %r2, %r3;", ("mul", 1)),
        ("	mul.wide.s32 	%rd1, %r2, 4;", None),
        ("	v_fmac_f32_e32 v1, v2, v3", ("fma", 1)),
        ("	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", ("fma", 2)),
        ("	v_fma_mixlo_f16 v1, v2, v3, v4", ("fma", 1)),
        ("	v_pk_mul_f32 v[0:1], v[2:3], v[4:5]", ("mul", 2)),
        ("	v_mul_lo_u32 v1, v2, v3", None),
    ],
)
def test_arithmetic_is_recognised(line, expected):
    assert arithmetic(line) == expected


WGMMA = "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32"


@pytest.mark.parametrize(
    ("line", "size", "product"),
    [
        ("	cp.async.cg.shared.global [ %r126 + 0 ], [ %rd37 + 0 ], 0x10, %r127;", 16, None),
        ("	cp.async.wait_group 	0;", None, None),
        ("	wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {%r1}, 0;", None, WGMMA),
        ("	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]", None, "v_mfma_f32_32x32x8_bf16"),
    ],
)  # fmt: skip
def test_copies_and_matrix_products_are_recognised(line, size, product):
    assert (copy_to_shared(line), matrix_product(line)) == (size, product)


RELEASE = "\tatom.global.gpu.acq_rel.add.u32 %r188, [ %rd65 + 0 ], %r187;"
STORE = "\tst.global.b32 [ %rd81 + 0 ], { %r182 };"


def test_releases_without_a_barrier_are_found():
    barrier = "\tbar.sync 0;"
    assert unguarded_releases("\n".join([STORE, barrier, RELEASE])) == (1, [])
    assert unguarded_releases("\n".join([barrier, STORE, RELEASE])) == (1, [RELEASE.strip()])
    assert unguarded_releases("\n".join([barrier, "$L__BB0_21:", RELEASE])) == (1, [RELEASE.strip()])
    assert unguarded_releases(RELEASE) == (1, [RELEASE.strip()])
    assert unguarded_releases(RELEASE.replace("acq_rel", "relaxed")) == (0, [])


def test_lines_are_attributed_to_functions(tmp_path):
    source = tmp_path / "some.py"
    source.write_text("def f():\n    pass\n\n\n@g\ndef h():\n    pass\n")
    places = ["\t.loc\t1 7 3", "a", "\t.loc 1 2 0 // other.py:6", "b", "\t.loc 2 7 1", "c", "\t.loc 1 0 0", "d"]
    asm = "\n".join([*places, '\t.file\t1 "/x/some.py"', '\t.file 2 "/x" "other.py"'])
    assert list(attributed(asm, tmp_path))[:4] == [("h", "a"), ("f", "b"), ("", "c"), ("", "d")]


def test_lines_of_inline_assembly_are_attributed_to_where_it_begins(tmp_path):
    source = tmp_path / "some.py"
    source.write_text("def f():\n    pass\n\n\n@g\ndef h():\n    pass\n")
    inline = ["// begin inline asm", ".loc 1 2 7", "a", ".loc 1 3 7", "b", ".loc 1 7 7", "c", "// end inline asm"]
    asm = "\n".join([*inline, ".loc 1 7 1", "d", *inline, '.file 1 "/x/some.py"'])
    found = ["".join(line) for line in attributed(asm, tmp_path)]
    assert found[:-1] == ["fa", "fb", "fc", "hd", "fa", "fb", "fc"]
