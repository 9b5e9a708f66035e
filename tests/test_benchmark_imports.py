"""The benchmarks start where another package of their folder's name, or of the tests', is installed: some wheels do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if not path.name.startswith(("test_", "__"))
)


def run(folder, *arguments):
    variables = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def foreign(tmp_path):
    """A folder as of a wheel that ships its tests and benchmarks as top-level packages."""
    for name in ("benchmarks", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    return tmp_path


def test_every_module_finds_what_is_ours(foreign):
    pytest.importorskip("matplotlib")
    pytest.importorskip("triton")
    assert "benchmarks.bench_host" in MODULES
    assert "benchmarks.paper.models" in MODULES
    code = (
        "import importlib\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(name)\n"
        "import tests\n"
        f"assert tests.__file__.startswith({str(foreign)!r}), tests\n"
        "from benchmarks.bench_host import _stub\n"
        f"assert _stub().HERE.samefile({str(ROOT / 'tests')!r})\n"
    )
    done = run(foreign, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_papers_command_starts(foreign):
    pytest.importorskip("sklearn")
    done = run(foreign, "-m", "benchmarks.paper", "--help")
    assert done.returncode == 0, done.stderr
    assert "table-medmnist" in done.stdout
