"""The interpreted kernels on a machine with a GPU, where they need a process of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.gpu
def test_the_interpreted_tests_pass_without_the_gpu():
    """Triton decides at import whether it interprets. Without a GPU the main process runs these tests (conftest.py)."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-m", "interpreted", "-q", "-p", "no:cacheprovider", "tests"]
    command += ["-n", "4"] if importlib.util.find_spec("xdist") else []  # two minutes in one process
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 100, done.stdout
