"""The launcher over a CUDA driver that does nothing: handles, grids, argument widths. The interpreter never runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import stub

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or stub.compiler() is None, reason="builds a stub of libcuda with gcc"
)


@pytest.fixture(scope="module")
def on_stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    environment = stub.environment_over_stub(folder) | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "launch_on_stub.py"), "6"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
