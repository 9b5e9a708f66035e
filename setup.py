"""Maps the top-level ``kernels/`` folder to ``inmerge_fast.kernels``, and builds the CPU kernel.

All other metadata is in pyproject.toml.

Together with the relative link ``inmerge_fast/kernels -> ../kernels`` this is importable from a regular install,
every kind of editable install and the bare checkout. ``kernels/`` must never get an ``__init__.py``: a regular
package of that name on ``sys.path`` would shadow Hugging Face's ``kernels`` (tests/test_packaging.py).

The CPU kernel is optional: where it cannot be built, the plain PyTorch path runs.
"""

import sys
import sysconfig
from glob import glob

from setuptools import Extension, find_packages, setup

# No flag may let a compiler change a result: contracting a product and a sum is what -O3 does beyond the standard.
COMPILE, LINK = ["-std=c99", "-O3", "-ffp-contract=off"], []
if sys.platform == "win32":
    COMPILE = ["/O2", "/fp:precise", "/std:c11"]
elif sys.platform == "linux":  # the libgomp that torch has loaded is the one that is used
    COMPILE, LINK = [*COMPILE, "-fopenmp"], ["-fopenmp"]

# The limited API, and so one wheel for all versions, exists for CPython with a GIL only.
has_limited_api = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")

cpu_kernel = Extension(
    "inmerge_fast._cpu",
    sorted(glob("kernels/cpu/*.c")),
    depends=sorted(glob("kernels/cpu/*.h")),
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    libraries=[] if sys.platform == "win32" else ["m"],
    py_limited_api=True,
    optional=True,
)

setup(
    packages=[*find_packages(include=["inmerge_fast", "inmerge_fast.*"]), "inmerge_fast.kernels"],
    package_dir={"inmerge_fast.kernels": "kernels"},
    package_data={"inmerge_fast": ["py.typed"], "inmerge_fast.kernels": ["cpu/*.c", "cpu/*.h"]},
    ext_modules=[cpu_kernel] if has_limited_api else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if has_limited_api else {},
)
