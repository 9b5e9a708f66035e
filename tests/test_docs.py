"""README.md and docs/: short enough, in order, without dead links, words explained, and true to the source tree."""

from __future__ import annotations

import importlib.util
import inspect
import posixpath
import re
import subprocess
import sys

import pytest
from pages import BLOCK, PAGES, ROOT, name_of, text_of

import inmerge_fast

MOST_LINES, MOST_WORDS = 130, 900
FURTHER = ["benchmarks/README.md", "benchmarks/paper/README.md"]
EVERYWHERE = [*map(name_of, PAGES), *FURTHER]
LINK = re.compile(r"\[(?:[^][]|\[[^]]*\])*\]\(([^)\s]+)\)")
ORDER = [
    "Install", "Quick start", "Will it act on my network?", "Works with", "What it costs", "Does it help?", "Limits",
    "Try it, test it", "Where to read on", "Citation and licence",
]  # fmt: skip
# Words of ours, and how each may appear where a page first uses it: emphasised, which is where it is explained, or in a
# link to where it is.
OUR_WORDS = {
    "draw": r"\bdraws?\b", "coin": r"\bcoins?\b", "arm": r"\barms?\b", "floor": r"\bfloors?\b",
    "reader": r"\breaders?\b", "provider": r"\bproviders?\b", "sampled": r"\bsampled\b", "rank": r"\branks?\b",
}  # fmt: skip


def prose(name):
    """A page without code and comments."""
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", BLOCK.sub("", text_of(name)), flags=re.DOTALL)


def headings(text):
    return re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)


def anchor(heading):
    """As code hosts and the site make them."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def test_the_readme_is_short_and_in_order():
    text = text_of("README.md")
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS
    assert headings(text)[1:] == ORDER


@pytest.mark.parametrize("name", EVERYWHERE)
def test_links_lead_somewhere(name):
    links = [link for link in LINK.findall(text_of(name)) if "://" not in link]
    for link in links:
        target, _, wanted = link.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name
        assert (ROOT / path).exists(), f"{name}: {link}"
        if wanted:
            assert wanted in map(anchor, headings(text_of(path))), f"{name}: {link}"


def test_pages_can_be_reached():
    """Every page from the README, and from the start page of the docs."""
    for name in ("README.md", "docs/index.md"):
        links = {
            posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for link in LINK.findall(text_of(name))
        }
        assert {each for each in EVERYWHERE if each not in ("README.md", "docs/index.md")} <= links, name


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("word", OUR_WORDS)
def test_our_words_are_explained_where_a_page_first_uses_them(name, word):
    text = prose(name)
    first = re.search(OUR_WORDS[word], text, re.IGNORECASE)
    if first is None:
        return
    paragraph = text[text.rfind("\n\n", 0, first.start()) + 2 : (text + "\n\n").index("\n\n", first.start())]
    explained = name == "docs/index.md" or re.search(rf"\*[^*\n]*{OUR_WORDS[word]}[^*\n]*\*", paragraph, re.IGNORECASE)
    assert explained or "index.md#words" in text[: first.start()] + paragraph, (
        f"{name} uses {word!r}: {text[first.start() - 60 : first.end() + 60]!r}"
    )


def test_the_words_page_has_them():
    text = text_of("docs/index.md")
    for word in ("draw", "arm", "floor", "provider", "sampled", "rank", "partner", "collapse", "plan"):
        assert re.search(rf"^- \*\*(?:[^*]*, )?{word}\b", text, re.MULTILINE), word


def test_the_map_of_the_source_is_of_this_source():
    text = text_of("docs/design.md")
    named = {path for path in re.findall(r"`([\w/<>.]+)`", text) if "/" in path}
    for path in named:
        assert list(ROOT.glob(path.replace("<name>", "*"))), path
    for room in (ROOT / "inmerge_fast").iterdir():
        if room.is_dir() and room.name not in ("kernels", "__pycache__"):
            assert f"inmerge_fast/{room.name}/" in named, room


def test_the_api_page_has_every_public_name_and_its_first_line():
    text = text_of("docs/api.md")
    found = re.findall(r"^### (\w+)\n\n(.+)\n\n<!-- api: inmerge_fast\.(\w+) -->$", text, re.MULTILINE)
    assert sorted(name for name, _, _ in found) == sorted(inmerge_fast.__all__)
    for name, line, marked in found:
        assert name == marked
        doc = inspect.getdoc(getattr(inmerge_fast, name)).split("\n\n")[0].replace("\n", " ").replace("``", "`")
        assert line == re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", doc)


def test_the_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'inmerge_fast[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Returns" in (tmp_path / "api.html").read_text(encoding="utf-8")
