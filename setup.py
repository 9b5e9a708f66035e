"""Maps the top-level ``kernels/`` folder to ``inmerge_fast.kernels``; all other metadata is in pyproject.toml.

Together with the relative link ``inmerge_fast/kernels -> ../kernels`` this is importable from a regular install,
every kind of editable install and the bare checkout. ``kernels/`` must never get an ``__init__.py``: a regular
package of that name on ``sys.path`` would shadow Hugging Face's ``kernels`` (tests/test_packaging.py).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["inmerge_fast", "inmerge_fast.*"]), "inmerge_fast.kernels"],
    package_dir={"inmerge_fast.kernels": "kernels"},
    package_data={"inmerge_fast": ["py.typed"]},
)
