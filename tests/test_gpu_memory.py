"""Merges under NVIDIA's memory checkers: no access outside a tensor's memory, and no read of what nobody wrote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHECKED = """
import sys, torch, inmerge_fast
weights = [torch.arange(n * d).view(n, d).sin().to("cuda", t) for n, d, t in
           [(9, 20, torch.float32), (33, 7, torch.bfloat16), (8, 1025, torch.float32), (40, 64, torch.float16)]]
plan = inmerge_fast.MergePlan(weights)
assert plan.path == "triton"
launcher = plan.paths.triton.launcher(weights)
broken = sys.argv[1] == "broken"
if broken:
    launcher.layer_table[2, 1] += 2**20  # D of the third layer: reads far past its end
for step in range(3):
    for prob, threshold, overrides in ((1.0, -1.0, {}), (0.3, 0.1, {}), (1.0, -1.0, {"capacity": 0})):
        launcher.run(1, step, prob=prob, alpha=0.75, threshold=threshold, dry_run=broken, **overrides)
torch.cuda.synchronize()
print("checked")
"""


def checker():
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=path)


def run_checked(tool, variant):
    """A few merges under a memory checker, with every tensor in an allocation of its own."""
    command = [checker(), "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    # PyTorch asks the driver for what it may not have, and goes on: that is no error of these kernels.
    command += ["--report-api-errors", "no"]
    command += [sys.executable, "-c", CHECKED, variant]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or runtime")
    return done.returncode, output


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(checker() is None, reason="compute-sanitizer is not installed"),
]


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_memory_checkers_find_nothing(tool):
    status, output = run_checked(tool, "sound")
    assert status == 0, output[-4000:]
    assert "checked" in output


def test_memory_checker_notices_a_wrong_table():
    status, output = run_checked("memcheck", "broken")
    assert status != 0
    assert "Invalid __global__ read" in output, output[-4000:]
