"""The extension module in C (``kernels/cpu/``), where it can be used."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from types import ModuleType

VERSION = 6  # of kernels/cpu/module.c that this package can call


def load() -> ModuleType | str:
    """The extension module, or why it cannot be used."""
    if sys.implementation.name != "cpython":
        return f"{sys.implementation.name} is not CPython, whose C API it is built with"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a free-threaded Python has no limited C API, which it is built with"
    try:
        kernel = importlib.import_module("inmerge_fast._cpu")
    except ModuleNotFoundError:
        return "it was not built; where there is a C compiler, pip install builds it"
    except ImportError as error:
        return f"it cannot be loaded: {error}"
    found = getattr(kernel, "version", None)
    if found != VERSION:
        return f"it was built from another version of this package, {found} instead of {VERSION}; run pip install again"
    return kernel
