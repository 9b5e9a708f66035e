"""Packaging: the top-level ``kernels/`` is importable as ``inmerge_fast.kernels``, and only as that.

It has to be, from every kind of install and from the bare checkout, while ``import kernels`` belongs to Hugging Face's
package of that name. Who can promise what:

- installs of every kind: away from the checkout there is no top-level ``kernels`` of ours;
- in the checkout (``python -c``, ``python -m``): it exists as a namespace folder, which loses to any regular package,
  earlier or later on the path.

Nothing here sees the environment that runs the tests, where the package may be installed: every install goes into a
virtual environment of its own, which borrows the third-party packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from cpu_kernel import require_compiler, why_not_built
from packaging.requirements import Requirement

import inmerge_fast

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"demo", "plots", "paper", "tensorboard", "lightning", "huggingface", "ignite", "nnunet", "docs", "test"}
FOLDERS = ["inmerge_fast", "kernels", "tests", "benchmarks", "docs", "examples"]  # a wheel has the first two alone
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.so", "*.npz")  # by earlier builds and runs; git ignores them
CPU_KERNEL = set() if why_not_built() else {"inmerge_fast/_cpu.abi3.so"}
MODES = ["regular", "default", "strict", "compat"]  # the last three are setuptools' editable modes

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CLEAN_ENV = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "PIP_", "MYPY", "TRITON_INTERPRET"))
} | {
    "OMP_NUM_THREADS": "1",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INDEX": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # the tests compare folders, and the packages are borrowed
}

PROBE = """
import importlib.util, json
import inmerge_fast, inmerge_fast.kernels.draw as draw
spec = importlib.util.find_spec("kernels")
top_level = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
print(json.dumps({"package": inmerge_fast.__file__, "kernel": draw.__file__, "top_level": top_level}))
"""


def run(python: Path | str, *args: str | Path, cwd: Path, **env: str | Path) -> str:
    done = subprocess.run(
        [python, *args],
        cwd=cwd,
        env=CLEAN_ENV | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{python} {args} in {cwd} returned {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """What a clone holds, as far as packaging reads it: without caches and without what earlier builds left."""
    target.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, target)
    for name in filter(lambda name: (ROOT / name).exists(), FOLDERS):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=LEFT_BEHIND)
    shutil.rmtree(target / "benchmarks/paper/results/checkpoints", ignore_errors=True)
    return target


def make_python(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """The interpreter of a new virtual environment that has the running one's packages, less ours and ``without``."""
    borrowed = folder / "borrowed"
    borrowed.mkdir(parents=True)
    hidden = ("inmerge_fast", "__editable__", *without)
    for folder_of_packages in (Path(entry) for entry in sys.path if any(Path(entry).glob("*.dist-info"))):
        for path in folder_of_packages.iterdir():
            if not path.name.startswith(hidden) and not (borrowed / path.name).is_symlink():
                (borrowed / path.name).symlink_to(path)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    [site_packages] = folder.glob("venv/lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "venv" / "bin" / "python"


def build(kind: str, source: Path, target: Path) -> Path:
    code = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, target, cwd=source)
    [built] = target.iterdir()
    return built


def package_files(checkout: Path) -> set[str]:
    kernels = {f"inmerge_fast/{p.relative_to(checkout).as_posix()}" for p in (checkout / "kernels").rglob("*.*")}
    return kernels | {p.relative_to(checkout).as_posix() for p in (checkout / "inmerge_fast").rglob("*.*")}


def wheel_contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_checkout(folder / "checkout"), folder / "dist")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", copy_checkout(folder / "checkout"), folder / "dist")) as archive:
        # The filter is the default from 3.14 on, and unknown to 3.10 and 3.11 before their security releases.
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    [unpacked] = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter in whose environment the package is not installed."""
    return make_python(tmp_path_factory.mktemp("bare"))


@dataclass
class Install:
    folder: Path  # holds all of the below
    python: Path
    checkout: Path
    elsewhere: Path


def require_pip() -> None:
    """Skip without pip, without importing it: setuptools would take this for a process of pip, and compiling fails."""
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip")


def test_torch_still_compiles_after_the_look_for_pip():
    require_pip()
    assert "pip" not in sys.modules, "torch.compile fails in processes that have imported it"


@pytest.fixture(scope="module")
def installs(tmp_path_factory, wheel):
    """Makes the install of a mode, once for all tests."""
    require_pip()
    made: dict[str, Install] = {}

    def get(mode: str) -> Install:
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            install = Install(folder, make_python(folder), copy_checkout(folder / "checkout"), folder / "elsewhere")
            install.elsewhere.mkdir()
            what: list[str | Path] = [wheel] if mode == "regular" else ["-e", install.checkout]
            if mode in ("strict", "compat"):
                what += ["--config-settings", f"editable_mode={mode}"]
            pip = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-compile"]
            run(install.python, *pip, *what, cwd=install.elsewhere)
            made[mode] = install
        return made[mode]

    return get


# What is built.


def test_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    contents = wheel_contents(wheel)
    files = {name for name in contents if ".dist-info/" not in name}
    assert files == package_files(checkout) | CPU_KERNEL
    assert "inmerge_fast/kernels/cpu/module.c" in files
    assert {"inmerge_fast/__init__.py", "inmerge_fast/py.typed", "inmerge_fast/kernels/draw.py"} <= files
    assert contents["inmerge_fast/kernels/draw.py"] == (checkout / "kernels" / "draw.py").read_bytes()
    [top_level] = [text for name, text in contents.items() if name.endswith(".dist-info/top_level.txt")]
    assert top_level.split() == [b"inmerge_fast"]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)


def test_wheel_metadata(wheel):
    assert re.search("-cp310-abi3-[a-z0-9_]+[.]whl$", wheel.name), "one wheel for every Python from 3.10 on"
    [text] = [text for name, text in wheel_contents(wheel).items() if name.endswith(".dist-info/METADATA")]
    metadata: Message = Parser().parsestr(text.decode())
    assert metadata["Name"] == "inmerge_fast"
    assert metadata["Version"] == inmerge_fast.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert description.startswith("# inmerge_fast\n")
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links, "what leads somewhere from anywhere stays"
    assert all(link.startswith("https://") for link in links), "an index of packages has no file of this repository"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS

    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]

    def needed(platform: str, extra: str = "") -> set[str]:
        target = {"sys_platform": platform, "extra": extra}
        return {r.name for r in requirements if r.marker is None or r.marker.evaluate(target)}

    assert needed("linux") == {"torch", "triton", "numpy"}
    assert needed("darwin") == needed("win32") == {"torch", "numpy"}
    assert {"pytest", "mypy", "setuptools"} <= needed("linux", "test")


def test_sdist_holds_the_kernels_as_files_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    kernels = sdist / "kernels"
    assert (kernels / "draw.py").is_file()
    assert not (kernels / "draw.py").is_symlink()
    assert not kernels.is_symlink()
    assert not (kernels / "__init__.py").exists()
    from_sdist = wheel_contents(build("wheel", sdist, tmp_path / "dist"))
    assert from_sdist == wheel_contents(wheel)


def test_sdist_holds_what_its_tests_need(sdist, checkout, bare_python):
    missing = [
        path.relative_to(checkout)
        for path in checkout.rglob("*")
        if path.is_file() and not (sdist / path.relative_to(checkout)).exists()
    ]
    assert not missing
    assert os.readlink(sdist / "inmerge_fast" / "kernels") == "../kernels"
    command = ["-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:benchmark", "tests"]
    assert "test_draw.py::" in run(bare_python, *command, cwd=sdist)  # fails if one file cannot be imported


# The link, and the name that is not ours.


def test_kernels_is_no_regular_package():
    # With an __init__.py, even an empty one, `import kernels` in the checkout would shadow Hugging Face's package, and
    # importing transformers there would fail.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_link_is_relative():
    link = ROOT / "inmerge_fast" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert link.resolve() == ROOT / "kernels"


def test_link_is_a_link_in_git():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert run(git, "ls-files", "--stage", "inmerge_fast/kernels", cwd=ROOT).startswith("120000 ")


@needs_triton
def test_a_regular_package_named_kernels_wins_in_the_checkout(bare_python, checkout, tmp_path):
    fake = tmp_path / "kernels" / "__init__.py"
    fake.parent.mkdir()
    fake.touch()
    code = "import sys, inmerge_fast.kernels.draw as ours, kernels; print(sys.path[0], kernels.__file__, ours.__file__)"
    output = run(bare_python, "-c", code, cwd=checkout, PYTHONPATH=tmp_path)
    # The checkout comes first on the path (as ''), and loses all the same.
    assert output == f" {fake} {checkout / 'inmerge_fast' / 'kernels' / 'draw.py'}\n"


# The CPU kernel, with a compiler and without.

MERGE = """
import inmerge_fast, torch
from inmerge_fast.paths import cpu
conv = torch.nn.Conv2d(3, 8, 3)
expected = inmerge_fast.reference_merge(conv.weight.detach(), *inmerge_fast.draw(0, 0, 0, 8, 1.0), threshold=-1.0)
inmerge_fast.merge_(conv, prob=1.0, threshold=-1.0, seed=0, step=0)
assert expected.merged.all()
torch.testing.assert_close(conv.weight.detach(), expected.weight)
print(cpu.unavailable())
"""


@pytest.mark.parametrize("mode", MODES)
def test_installed_cpu_kernel_can_be_used(installs, mode):
    require_compiler()
    install = installs(mode)
    assert run(install.python, "-c", MERGE, cwd=install.elsewhere) == "\n"


def test_install_without_a_compiler_works(tmp_path):
    require_pip()
    python, source = make_python(tmp_path), copy_checkout(tmp_path / "checkout")
    pip = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-compile"]
    run(python, *pip, source, cwd=tmp_path, CC="/bin/false")
    assert "it was not built" in run(python, "-c", MERGE, cwd=tmp_path)
    run(python, *pip, "-e", source, cwd=tmp_path, CC="/bin/false")
    assert "it was not built" in run(python, "-c", MERGE, cwd=tmp_path)


# Installed and not installed.


@needs_triton
@pytest.mark.parametrize("mode", MODES)
def test_kernels_import_from_everywhere(installs, mode, tmp_path):
    install = installs(mode)
    (tmp_path / "probe.py").write_text(PROBE)
    with ThreadPoolExecutor() as pool:  # each start imports torch, 2 s
        elsewhere = pool.submit(run, install.python, "-c", PROBE, cwd=install.elsewhere)
        in_checkout = pool.submit(run, install.python, "-m", "probe", cwd=install.checkout, PYTHONPATH=tmp_path)
    away, here = json.loads(elsewhere.result()), json.loads(in_checkout.result())

    source = install.checkout / "kernels" / "draw.py"
    assert Path(here["package"]) == install.checkout / "inmerge_fast" / "__init__.py"
    assert Path(here["kernel"]).resolve() == source
    # A strict install links to the single files of the checkout, so its path is another one.
    assert Path(away["kernel"]).samefile(source) == (mode != "regular")
    assert Path(away["kernel"]).read_bytes() == source.read_bytes()
    assert not any(entry and Path(entry).is_relative_to(install.folder) for entry in away["top_level"])


@needs_triton
def test_kernels_import_from_a_checkout_on_pythonpath(bare_python, checkout, tmp_path):
    found = json.loads(run(bare_python, "-c", PROBE, cwd=tmp_path, PYTHONPATH=checkout))
    assert Path(found["package"]) == checkout / "inmerge_fast" / "__init__.py"
    assert Path(found["kernel"]) == checkout / "inmerge_fast" / "kernels" / "draw.py"


@needs_triton
def test_installed_kernel_runs(installs):
    install = installs("regular")
    code = """
import torch
import inmerge_fast

weight = torch.randn(12, 40)
other = weight.clone()
arguments = dict(prob=0.5, threshold=0.0, seed=2**63 + 1, step=2**40 + 3)
stats = inmerge_fast.merge_(weight, **arguments)
assert stats.path == "triton", stats.path
expected = inmerge_fast.reference_merge(other, *inmerge_fast.draw(2**63 + 1, 2**40 + 3, 0, 12, 0.5), threshold=0.0)
assert torch.equal(weight, expected.weight)
assert 0 < stats.merged < stats.sampled
"""
    run(install.python, "-c", code, cwd=install.elsewhere, TRITON_INTERPRET="1", INMERGE_INTERPRET="1")


@pytest.mark.parametrize("mode", ["regular", "default"])
def test_the_command_is_installed(installs, mode):
    install = installs(mode)
    command = install.python.parent / "inmerge-fast"
    version = f"inmerge_fast {inmerge_fast.__version__}, torch {torch.__version__}\n"
    with ThreadPoolExecutor() as pool:
        by_name = pool.submit(run, command, "--version", cwd=install.elsewhere)
        as_module = pool.submit(run, install.python, "-m", "inmerge_fast", "--version", cwd=install.elsewhere)
    assert by_name.result() == as_module.result() == version
    assert run(command, "inspect", "--help", cwd=install.elsewhere).startswith("usage: inmerge-fast inspect")


# What an import costs, and what it can do without.


def test_import_is_light(bare_python, checkout, tmp_path):
    code = """
import sys
import inmerge_fast
import torch
heavy = ["triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "inmerge_fast.kernels"]
heavy += ["matplotlib", "lightning", "transformers", "tensorboard"]
print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized())
"""
    assert run(bare_python, "-c", code, cwd=tmp_path, PYTHONPATH=checkout) == "[] False\n"


def test_merge_works_without_triton(checkout, tmp_path):
    python = make_python(tmp_path, without=("triton",))
    code = """
import importlib.util
import inmerge_fast
import torch

assert importlib.util.find_spec("triton") is None
conv = torch.nn.Conv2d(3, 8, 3)
expected = inmerge_fast.reference_merge(conv.weight.detach(), *inmerge_fast.draw(0, 0, 0, 8, 1.0), threshold=-1.0)
inmerge_fast.merge_(conv, prob=1.0, threshold=-1.0, seed=0, step=0)
assert expected.merged.all()
torch.testing.assert_close(conv.weight.detach(), expected.weight)
"""
    run(python, "-c", code, cwd=tmp_path, PYTHONPATH=checkout)


# Types.


def test_package_type_checks():
    pytest.importorskip("mypy")
    run(sys.executable, "-m", "mypy", cwd=ROOT)


SCRIPT = """import inmerge_fast
inmerge_fast.merge_([], prob=0.5, partner="nearest")
inmerge_fast.merge_([], prob="half")
inmerge_fast.merge_([], partner="closest")
inmerge_fast.InMerge([], loggers=[print], alpha=lambda step: 0.9 ** step, guard=None)
inmerge_fast.InMerge([], alpha=lambda step: "0.9")
inmerge_fast.CollapseGuard(action="halt")
"""
WRONG_LINES = {3, 4, 6, 7}


def check_types(command: list[str | Path], install: Install) -> str:
    """What a type checker says of SCRIPT; it finds errors, and so returns 1."""
    (install.elsewhere / "script.py").write_text(SCRIPT)
    done = subprocess.run(command, cwd=install.elsewhere, env=CLEAN_ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_mypy_sees_the_types(installs, mode):
    pytest.importorskip("mypy")
    install = installs(mode)
    # Reading all of PyTorch takes 15 s; merge_ keeps its types with the one module that its decorator comes from.
    (install.elsewhere / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n[mypy-torch._compile]\nfollow_imports = normal\n"
    )
    arguments: list[str | Path] = ["--config-file", "mypy.ini", "--python-executable", install.python, "script.py"]
    said = check_types([sys.executable, "-m", "mypy", *arguments], install)
    errors = re.findall(r"script\.py:(\d+): error: .*\[([a-z-]+)\]", said)
    assert {int(line) for line, _ in errors} == WRONG_LINES, said
    assert {kind for _, kind in errors} <= {"arg-type", "return-value"}, said


@pytest.mark.parametrize("mode", MODES)
def test_pyright_and_editors_see_the_types(installs, mode):
    # Editors resolve imports as pyright does: without running Python. basedpyright is the same with Node.js in the
    # package, where pyright fetches it; neither is among the requirements for tests, for 60 MB of Node.js.
    pyright = shutil.which("basedpyright") or shutil.which("pyright")
    if pyright is None:
        pytest.skip("needs pyright or basedpyright")
    install = installs(mode)
    said = json.loads(check_types([pyright, "--pythonpath", install.python, "--outputjson", "script.py"], install))
    errors = [d for d in said["generalDiagnostics"] if d["severity"] == "error"]
    assert {d["range"]["start"]["line"] + 1 for d in errors} == WRONG_LINES, errors
    assert {d["rule"] for d in errors} <= {"reportArgumentType", "reportReturnType"}, errors
