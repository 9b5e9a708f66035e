"""Maps the top-level ``kernels/`` folder to ``inmerge_fast.kernels`` and builds the CPU kernel that it holds.

All other metadata is in pyproject.toml.

Together with the relative link ``inmerge_fast/kernels -> ../kernels`` this is importable from a regular install,
every kind of editable install and the bare checkout. ``kernels/`` must never get an ``__init__.py``: a regular
package of that name on ``sys.path`` would shadow Hugging Face's ``kernels`` (tests/test_packaging.py).

The CPU kernel is optional: where it cannot be built, the plain PyTorch path runs.
"""

import re
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

# A product and a sum contracted into one operation would change results. Debugging information would name this folder,
# and no two builds would be the same.
COMPILE, LINK = ["-std=c99", "-O3", "-ffp-contract=off", "-g0"], []
if sys.platform == "win32":
    COMPILE = ["/O2", "/fp:precise", "/std:c11"]
elif sys.platform == "linux":  # the libgomp that torch has loaded is the one that is used
    COMPILE, LINK = [*COMPILE, "-fopenmp"], ["-fopenmp"]


def page_for_an_index():
    """README.md for an index of packages, which has no other file: without pictures and links into the repository."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\((?!https:)[^)]*\)\n\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https:)[^)]*\)", r"\1", text)


class SourceDistribution(sdist):
    """What a checkout holds."""

    def make_release_tree(self, base_dir, files):
        """Add the link ``inmerge_fast/kernels``, which setuptools leaves out: the tests run where it is unpacked."""
        super().make_release_tree(base_dir, files)
        link = Path(base_dir, "inmerge_fast", "kernels")
        if not link.exists():
            link.symlink_to("../kernels", target_is_directory=True)


class EditableInstall(editable_wheel):
    """``pip install -e .`` puts a folder on the path in which the package stands alone.

    With packages in two folders setuptools would install an import hook instead, which mypy, pyright and editors do not
    run: they would not find the package. The checkout itself on the path would offer ``kernels`` and ``tests`` to every
    process. So the folder holds a link to the package, and as it is all that packages are looked for in, setuptools
    names it in a ``.pth`` file.
    """

    FOLDER = Path(".editable")

    def finalize_options(self):
        """Make the folder; where there can be no links, the import hook has to do."""
        link = self.FOLDER / "inmerge_fast"
        try:
            self.FOLDER.mkdir(exist_ok=True)
            if not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to("../inmerge_fast", target_is_directory=True)
            if not (link / "kernels" / "cpu").is_dir():
                raise NotADirectoryError("Git has written the link inmerge_fast/kernels as a file")
        except OSError as error:
            print(f"mypy, pyright and editors will not find this editable install: {error}", file=sys.stderr)
        else:
            self.distribution.package_dir = {"": str(self.FOLDER)}
        super().finalize_options()


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
    long_description=page_for_an_index(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["inmerge_fast", "inmerge_fast.*"]), "inmerge_fast.kernels"],
    package_dir={"inmerge_fast.kernels": "kernels"},
    package_data={"inmerge_fast": ["py.typed"], "inmerge_fast.kernels": ["cpu/*.c", "cpu/*.h"]},
    cmdclass={"sdist": SourceDistribution, "editable_wheel": EditableInstall},
    ext_modules=[cpu_kernel] if has_limited_api else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if has_limited_api else {},
)
