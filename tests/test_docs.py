"""README.md and docs/: short enough, in order, without dead links, words explained, and true to the source tree."""

from __future__ import annotations

import importlib.util
import inspect
import posixpath
import re
import subprocess
import sys

import pytest
import torch
from pages import BLOCK, PAGES, ROOT, name_of, text_of

import inmerge_fast
from benchmarks import published_weights
from benchmarks.whole_runs import table
from inmerge_fast import effect
from inmerge_fast.layer_similarity import RESOLUTION
from inmerge_fast.training.agreement import CHECK_EVERY

MOST_LINES, MOST_WORDS = 130, 900
FURTHER = ["benchmarks/README.md", "benchmarks/paper/README.md", "examples/README.md"]
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


def default(function, name):
    return inspect.signature(function).parameters[name].default


def percent(value):
    return f"{100 * value:g} %"


def claims():
    """Numbers of the prose beside what they are of: the page, a sentence with a gap, what belongs there."""
    from inmerge_fast.paths.triton.launch import SCRATCH_SHARE
    from inmerge_fast.paths.triton.layer_table import MAX_BYTES

    budget, guard = inmerge_fast.RankBudget().loss, inmerge_fast.CollapseGuard().loss
    merge_, merged, run = inmerge_fast.merge_, inmerge_fast.merged, inmerge_fast.InMerge
    [tests] = re.findall(r"All of `correct` ran, (\d+) tests", text_of("benchmarks/NOTES.md"))
    return [
        ("README.md", "spends about {} of each layer's", percent(budget)),
        ("README.md", "GPUs: {} tests on one NVIDIA H200", tests),
        ("docs/design.md", "ran on one NVIDIA H200 in 2026: {} tests", tests),
        ("docs/thresholds.md", "may cost each layer {} of its", percent(budget)),
        ("docs/thresholds.md", "cost it more than {} of its rank", percent(guard)),
        ("docs/thresholds.md", "after {} calls in which", f"{effect.NO_EFFECT_CALLS}"),
        ("docs/thresholds.md", "less than one of {} sampled pairs", f"{1 / effect.NO_EFFECT_RATE:,.0f}"),
        ("docs/thresholds.md", "the paper's τ = {} is", f"{default(merge_, 'threshold'):g}"),
        ("docs/thresholds.md", "is {} standard deviations away", f"{0.3 * 4608**0.5:.0f}"),
        ("docs/thresholds.md", "histograms with bins of {}.", f"{RESOLUTION:.0e}".replace("e-0", "e-")),
        ("docs/training.md", "merge the same layers every {} steps", f"{CHECK_EVERY}"),
        ("docs/training.md", "half of their filters, any partner, α = {}.", f"{default(merged, 'alpha')}"),
        ("docs/index.md", "a merged filter keeps, {} unless", f"{default(merge_, 'alpha')}"),
        ("docs/index.md", "is chosen in a step, {} unless", f"{default(merge_, 'prob')}"),
        ("docs/layers.md", "the first {} left out", percent(default(merge_, "skip_first"))),
        ("docs/layers.md", "more than {} GiB of weights", f"{MAX_BYTES >> 30}"),
        ("docs/layers.md", "On a GPU {} of the merged layers' bytes", percent(SCRATCH_SHARE)),
        ("benchmarks/README.md", "on a GPU {} of the merged layers' bytes", percent(SCRATCH_SHARE)),
        ("docs/training.md", "of every {} step, without making", {10: "tenth"}[default(run, "observe_every")]),
    ]  # fmt: skip


def test_numbers_of_the_prose_are_those_of_the_code():
    pytest.importorskip("triton")
    assert default(inmerge_fast.merged, "prob") == 0.5, "half of their filters"
    for page, sentence, number in claims():
        assert sentence.format(number) in " ".join(text_of(page).split()), f"{page}: {sentence.format(number)}"


def test_gains_of_lasting_merging_come_with_collapsed_filters():
    """As long as the front page says so."""
    assert "raised accuracy or AUC [without collapsing filters](benchmarks/paper/RESULTS.md)" in text_of("README.md")
    answer = text_of("benchmarks/paper/RESULTS.md")
    assert "; none of them without collapsed filters." in answer or "**0 gains" in answer


def test_the_table_of_settings_is_of_the_committed_runs():
    text = text_of("docs/thresholds.md")
    assert table.updated(text, table.guide_section(ROOT / "benchmarks/whole_runs/runs.jsonl")) == text


def test_the_table_of_published_networks_is_of_the_committed_file():
    assert published_weights.updated(text_of("docs/inspect.md")) == text_of("docs/inspect.md")


@pytest.mark.interpreted
def test_a_gpu_keeps_as_many_bytes_per_filter_as_the_pages_say(monkeypatch):
    pytest.importorskip("triton")
    from interpreter import apply_fixes
    from test_kernels import launcher_of, tensors_of

    apply_fixes()
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    kept = []
    for count in (1000, 9000):
        weights = [torch.randn(count, 4)]
        launcher = launcher_of(weights)
        for step in range(2):
            launcher.run(0, step, prob=0.001, alpha=0.8, threshold=0.3, dry_run=False)
        kept.append(sum(tensor.nbytes for name, tensor in tensors_of(launcher, []).items() if name != "scratch"))
    for page in ("docs/layers.md", "benchmarks/README.md"):
        [said] = re.findall(r"plus (\d+) bytes per filter", " ".join(text_of(page).split()))
        assert int(said) == pytest.approx((kept[1] - kept[0]) / 8000, rel=0.02)


def test_the_api_page_has_every_public_name_and_its_first_line():
    text = text_of("docs/api.md")
    found = re.findall(r"^### (\w+)\n\n(.+)\n\n<!-- api: inmerge_fast\.(\w+) -->$", text, re.MULTILINE)
    assert sorted(name for name, _, _ in found) == sorted(inmerge_fast.__all__)
    for name, line, marked in found:
        assert name == marked
        doc = inspect.getdoc(getattr(inmerge_fast, name)).split("\n\n")[0].replace("\n", " ").replace("``", "`")
        assert line == re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", doc)


def test_every_page_is_in_the_navigation():
    """As the site's build demands, which not every environment has."""
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").glob("*.md")]
    pages += [page.relative_to(ROOT) for page in (ROOT / "benchmarks").rglob("*.md") if page.parent.name != "results"]
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert {page.as_posix() for page in pages} <= {*named}
    assert len(named) == len({*named})


def test_the_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'inmerge_fast[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Returns" in (tmp_path / "api.html").read_text(encoding="utf-8")
