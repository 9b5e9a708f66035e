"""CHANGELOG, CITATION and CONTRIBUTING say what the package says, and name files that there are."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import inmerge_fast

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_newest_entry_of_the_changelog_is_this_version():
    versions = re.findall(r"^## (\S+) \((\d{4}-\d{2}-\d{2})(?:\)|, )", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0][0] == inmerge_fast.__version__
    assert versions == sorted(versions, reverse=True), "newest first"
    cited = re.search(r"^version: (\S+)\ndate-released: (\S+)$", read("CITATION.cff"), re.MULTILINE)
    assert cited.groups() == versions[0]


def test_the_citation_is_that_of_the_readme():
    citation, readme = read("CITATION.cff"), read("README.md")
    families = re.findall(r"family-names: (\S+)", citation)
    assert families == re.findall(r"(\w+), \w+", re.search(r"author *= *\{(.*)\}", readme)[1])
    title = re.search(r"^  title: (.*)$", citation, re.MULTILINE)[1]
    assert f"{{{title}}}" in readme


def test_the_citation_is_valid():
    tool = shutil.which("cffconvert")
    if tool is None:
        pytest.skip("needs cffconvert")
    subprocess.run([tool, "--validate"], cwd=ROOT, check=True, timeout=60)


def test_files_that_contributing_names_exist():
    named = re.findall(r"`(?:bash |python )?([\w/.*-]+)(?: [^`]*)?`", read("CONTRIBUTING.md"))
    paths = [name for name in named if re.search(r"/|\.(?:toml|txt|md)$", name)]
    assert len(paths) > 15
    missing = [path for path in paths if not any(any(base.glob(path)) for base in (ROOT, ROOT / "inmerge_fast"))]
    assert not missing
