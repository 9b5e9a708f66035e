"""The GPU run's benchmarks from beginning to end on a pretended GPU (``pretended_gpu.py``): no code meets one first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import stub

from benchmarks import report, result_files

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or stub.compiler() is None or shutil.which("bash") is None,
    reason="builds a stub of libcuda with gcc, and needs bash",
)


PARTS = ("speed", "more", "forward-only")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the parts with benchmarks bring home, quick, and what they have printed."""
    folder = tmp_path_factory.mktemp("pretended")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/pretended_gpu.py" "$@"\n')
    python.chmod(0o755)
    variables = stub.environment_over_stub(folder) | {"PRETENDED_GPU": "1", "PYTHON": sys.executable}
    variables = {name: value for name, value in variables.items() if not name.startswith("PYTEST_")}
    line = ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), str(folder / "home"), "--quick", *PARTS]
    done = subprocess.run([*line, "--python", str(python)], env=variables, capture_output=True, text=True, timeout=900)
    return folder / "home", done.stdout + done.stderr


def test_all_steps_pass_but_torch_compile_which_cannot_be_pretended(home):
    folder, printed = home
    summary = (folder / "summary.txt").read_text()
    assert summary.endswith("2 of the steps above did not pass\n"), printed
    for line in summary.splitlines()[:-1]:
        if line.startswith(("compile", "forward-compile")):
            assert "failed with status 1" in line, printed
        else:
            assert " passed: " in line or line.startswith("nsight"), printed


def test_every_figure_of_a_gpu_is_there(home):
    """Columns that are measured on a GPU alone; the figures themselves mean nothing."""
    columns = {
        "merge": {"device_us", "host_us", "kernels_us", "floor_us"},
        "merge-published": {"wall_us", "merge_us"},
        "match": {"device_us", "kernels_us"},
        "scaling": {"device_us"},
        "forward": {"device_us", "host_us", "kernels_us", "floor_us", "merge_us"},
        "training-forward": {"merge_device_us", "peak_added_bytes", "kept_bytes", "share_percent"},
        "training": {"merge_device_us", "peak_added_bytes", "kept_bytes", "share_percent"},
        "host": {"host_us", "launches"},
        "tuning": {"device_us", "floor_us", "work"},
    }
    found = {results.path.stem: results for results in result_files.load(home[0] / "results")}
    assert set(found) == {*columns, "merge-compile", "forward-compile"}
    for name, wanted in columns.items():
        results = found[name]
        assert results.on_gpu
        assert results.complete
        assert not results.failures
        ours = ("merge_", "match", "published", "merged")
        rows = [row for row in results.rows if row.get("provider", "merge_") in ours]
        assert rows
        if name == "match":
            rows = [row for row in rows if row["provider"] == "match"]
        assert all(wanted <= set(row) for row in rows), name
    assert {row["driver"] for row in found["host"].rows} == {"cuda"}
    assert {row.get("maxnreg") for row in found["tuning"].rows} >= {None, 64, 72, 80}
    for name, forms in (("merge", {"dense, reduce-overhead", "sampled, default"}), ("forward", {"dense, default"})):
        failed = found[f"{name}-compile"]
        assert (failed.rows, failed.complete) == ([], True)
        assert {failure["form"] for failure in failed.failures} >= forms


def test_all_of_it_can_be_reported(home):
    found = result_files.load(home[0] / "results")
    text = report.render(found)
    assert text.count("- not measured: ConvNeXt-T, float32, compile, ") == 6
    assert "## On a GPU: Pretended GPU" in text
    assert "CUDA driver that does nothing" not in text.split("### Targets")[0]
    assert os.environ.get("PRETENDED_GPU") is None
