"""The pages that people read, and their code blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Snippet:
    """A Python block of a page; all but the first of a page run after that first one, and after nothing else."""

    page: str
    first: str  # code of the page's first block, empty for that block itself
    code: str
    line: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(name: str) -> list[Snippet]:
    text = text_of(name)
    found = [match for match in BLOCK.finditer(text) if match[1] == "python"]
    lines = [text.count("\n", 0, match.start()) + 1 for match in found]
    return [
        Snippet(name, found[0][2] if place else "", match[2], line)
        for place, (match, line) in enumerate(zip(found, lines, strict=True))
    ]


def snippet(name: str, mark: str) -> Snippet:
    """The one block of a page that has ``mark`` in it."""
    [found] = [each for each in snippets(name) if mark in each.code]
    return found
