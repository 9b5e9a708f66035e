"""The launcher over a CUDA driver that does nothing: handles, grids, argument widths. The interpreter never runs it."""

import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("triton")
import stub

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or stub.compiler() is None, reason="builds a stub of libcuda with gcc"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return stub.environment_over_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def on_stub(environment):
    return stub.run("launch_on_stub.py", "6", env=environment)


def test_one_call_is_two_launches(on_stub):
    assert on_stub["grids"] == on_stub["expected_grids"]
    assert on_stub["functions"] == 3, "of draw, count and merge, the count being apart in graphs only"


def test_nothing_is_compiled_again_for_other_seeds_steps_and_slots(on_stub):
    assert on_stub["same_handles"]


def test_arguments_arrive_whole(on_stub):
    assert all(on_stub["pointers"])
    assert on_stub["seed_step"], "a seed of 2**63 + 5 and a step of 2**40 + 1 must cross the launcher as 64 bits"
    assert on_stub["small_seed_step"], "and small ones through the same handle"
    assert on_stub["coin_threshold"]
    assert on_stub["rows"]
    assert on_stub["slot_draws"]
    assert on_stub["capacity"]
    assert on_stub["alpha_beta_threshold"] == [float(np.float32(x)) for x in (0.8, 1.0 - 0.8, 0.25)]
    assert on_stub["write_programs"]


def test_a_call_that_was_drawn_ahead_is_one_launch(on_stub):
    drawing, drawn = ["draw", "merge"], ["merge"]
    assert on_stub["launches"] == [drawing, drawing, drawn, drawn, drawn, drawing, drawing]
    assert on_stub["ahead"]


def test_numbers_of_a_call_reach_device_memory_whole(on_stub):
    assert on_stub["prepared"]
    assert on_stub["from_memory"]


def test_after_the_first_call_nothing_is_allocated_copied_or_waited_for(on_stub):
    assert on_stub["merge_launches"] == 20 * 2
    assert on_stub["operators_in_merge"] == []
    assert on_stub["operators_after"], "operators would be noticed"


def test_a_call_costs_the_host_little(on_stub):
    """22 us a launch is what Triton's own dispatch takes; the bound only says that handles are used. Usually 10 us."""
    print(f"\nhost time of draw and merge, without the driver: {on_stub['host_us']:.1f} us")
    assert on_stub["host_us"] < 44


# ---------------------------------------------------------------------------------------------------------- no compiler


WITHOUT_COMPILER = {
    "none": ({"PATH": ""}, "Failed to find C compiler"),
    "gone": ({"CC": "/nowhere/cc"}, "No such file or directory: '/nowhere/cc'"),
    "fails": ({"CC": shutil.which("false")}, "false ended with status 1;"),
}


@pytest.mark.parametrize("case", WITHOUT_COMPILER)
def test_without_a_compiler_the_plan_is_eager_and_says_why_before_the_first_call(environment, tmp_path, case):
    changed, why = WITHOUT_COMPILER[case]
    env = {name: value for name, value in environment.items() if name != "CC"}
    seen = stub.run("compiler_on_stub.py", env=env | {"TRITON_CACHE_DIR": str(tmp_path)} | changed)
    assert seen["path"] == "eager"
    assert seen["ran"] == ["eager"]
    assert "path: eager (Triton cannot build what launches kernels: " in seen["printed"]
    assert why in seen["printed"]
    assert "install a C compiler and Python's headers, or set CC)" in seen["printed"]


def test_a_machine_that_has_built_the_launcher_needs_no_compiler(environment, on_stub):
    """Where there is one launcher for all kernels. Else the kernels that were never launched would need one late."""
    from inmerge_fast.paths.triton.build import BUILDS_BY_SIGNATURE

    seen = stub.run("compiler_on_stub.py", env=environment | {"CC": shutil.which("false")})
    assert seen["ran"] == ["eager" if BUILDS_BY_SIGNATURE else "triton"]
