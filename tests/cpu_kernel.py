"""Builds of the CPU kernel for its tests, and calls of it, of plans' layers and of others."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import inmerge_fast
from inmerge_fast.paths import cpu
from inmerge_fast.plan.filters import FilterLayout

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_folder = tempfile.TemporaryDirectory(prefix="cpu_kernel_")


@functools.cache
def why_not_built(name=None):
    """Why the C compiler ``name``, setup.py's by default, builds no extension here; empty if it does."""
    name = name or os.environ.get("CC", "cc").split()[0]
    if sysconfig.get_config_var("Py_GIL_DISABLED") or sys.implementation.name != "cpython":
        return "this Python has no limited C API"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers are not installed"
    command = shutil.which(name)
    if command is None or subprocess.run([command, "--version"], capture_output=True).returncode:
        return f"no C compiler {name}"
    return ""


def require_compiler(name=None):
    """Skip the test where nothing can be built."""
    if reason := why_not_built(name):
        pytest.skip(reason)


@functools.cache
def build():
    """Path of the extension as setup.py builds it now; one that lies in the checkout may be older."""
    require_compiler()
    target = Path(_folder.name) / "setup"
    command = ["setup.py", "-q", "build_ext", "--build-lib", target / "lib", "--build-temp", target / "temp"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    built = list(target.glob("lib/inmerge_fast/_cpu*"))
    assert built, done.stderr
    return built[0]


@functools.cache
def build_variant(compiler, *flags):
    """Path of the extension as another compiler or other flags build it."""
    require_compiler(compiler)
    path = Path(_folder.name) / f"{'_'.join([compiler, *flags]).replace('/', '_')}.so"
    command = [compiler, "-std=c99", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags]
    files = [f"-I{sysconfig.get_paths()['include']}", *sorted(SOURCES.glob("*.c")), "-o", path, "-lm"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


@functools.cache
def build_library(source):
    """Path of a C file of this folder as a shared library."""
    require_compiler()
    compiler = os.environ.get("CC", "cc").split()[0]
    path = Path(_folder.name) / f"{source}.so"
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", Path(__file__).parent / source, "-o", path], check=True)
    return path


def load(path):
    """The extension module at ``path``."""
    spec = importlib.util.spec_from_file_location("inmerge_fast._cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(monkeypatch, path=None):
    """Make ``inmerge_fast`` use the build at ``path``, setup.py's if None; returns the module."""
    module = load(path or build())
    monkeypatch.setitem(sys.modules, "inmerge_fast._cpu", module)
    assert cpu.unavailable() == ""
    return module


def run(target, *, code=None, seed=5, step=3, prob=0.5, alpha=0.8, thresholds=0.5, dry_run=False, given=None):
    """One call of the kernel on what ``MergePlan`` takes, or on ``(weights, layers)``."""
    if isinstance(target, tuple):
        weights, layers = target
        row_start = np.cumsum([0, *(layer.layout.filters for layer in layers)])
    else:
        plan = inmerge_fast.MergePlan(target)
        weights, layers, row_start = plan.weights(), plan.layers, plan.rows.start
    merger = cpu.CpuMerge(layers, weights, row_start, code=code)
    return merger.run(seed, step, prob=prob, alpha=alpha, thresholds=thresholds, dry_run=dry_run, given=given)


def layer_of(weight, *, groups=1, layer_id=0):
    """A layer with its filters along dim 0, for what a plan has no target of."""
    filters, elements = weight.shape[0], weight[0].numel()
    size = filters // groups
    layout = FilterLayout(filters, elements, size, size * elements, elements, elements, elements, 1)
    return SimpleNamespace(layout=layout, dtype=weight.dtype, layer_id=layer_id)


def similar_filters(*shape, dtype=torch.float32, special=True, seed=0):
    """A weight with similarities on both sides of 0.5, and filters of zeros, NaN, Inf, huge and subnormal values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) + torch.randn(1, *shape[1:], generator=generator)
    weight = weight.to(dtype)
    if special:
        subnormal, huge = torch.finfo(dtype).smallest_normal / 4, min(2e19, torch.finfo(dtype).max)
        for filter_, value in zip(weight, (0.0, np.nan, np.inf, huge, subnormal), strict=False):
            filter_.fill_(value)
        weight[5 % len(weight)].view(-1)[-1] = -np.inf
        weight[6 % len(weight)] *= subnormal
    return weight


def bytes_of(pairs):
    """Everything that a call has returned, to be compared."""
    arrays = (pairs.counts, pairs.similarity, pairs.passed)
    return (*(array.tobytes() for array in arrays), pairs.passed_total, pairs.largest)
