"""What Triton builds with a C compiler before it can launch a compiled kernel."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.runtime import build
from triton.runtime.driver import driver

BUILDS_BY_SIGNATURE = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@functools.cache
def why_unlaunchable() -> str:
    """Why Triton cannot launch kernels on this machine, in a few words; empty if it can.

    It launches them through a module in C, built at first use and kept in its cache: a machine needs a compiler once.
    Triton 3.6 builds another one for each kernel's types, some of them late in a run, when a partner rule is first
    used; so there the compiler itself is tried, once in a process, which takes 0.1 s.
    """
    if triton.knobs.runtime.interpret:
        return ""
    try:
        _ = driver.active
        if BUILDS_BY_SIGNATURE:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "probe.c")
                source.write_text("#include <Python.h>\n")
                build._build("probe", str(source), folder, [], [], [], [])
    except Exception as error:  # whatever the driver, the compiler and the loader raise
        if isinstance(error, subprocess.CalledProcessError):
            what = f"{error.cmd[0]} ended with status {error.returncode}"
        else:
            what = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return (
            f"Triton cannot build what launches kernels: {what}; install a C compiler and Python's headers, or set CC"
        )
    return ""
