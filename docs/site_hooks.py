"""What makes a site of pages that are written for a code host (``mkdocs.yml`` names this file).

Pages link to each other by paths in the repository. In the site, those outside docs/ are copied in at the same path
below its root, links to them lead there, and links to source files, which are not in it, are shown as what they say.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?!\w+:|#)([^)\s]+)\)")
API = re.compile(r"^### \w+\n\n.*?\n\n<!-- api: (\S+) -->$", re.MULTILINE | re.DOTALL)
MATH = re.compile(r":math:`([^`]*)`")
ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/**/*.md", "benchmarks/**/*.svg"]


def repository_path(page: str) -> str:
    """Where the source of a page of the site lies in the repository."""
    return f"docs/{page}" if (ROOT / "docs" / page).exists() else page


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them, and docstrings where the API page has a mark for one."""
    here = posixpath.dirname(repository_path(page.file.src_uri))

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        target, _, anchor = target.partition("#")
        wanted = posixpath.normpath(posixpath.join(here, target))
        if not (ROOT / wanted).exists():
            return found[0]  # mkdocs says so, and `--strict` makes it an error
        inside = wanted.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            return f"`{text}`" if "/" in text and "`" not in text else text
        target = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
        return f"{picture}[{text}]({target}{'#' + anchor if anchor else ''})"

    return API.sub(r"::: \1", LINK.sub(link, markdown))


class Docstrings(griffe.Extension):
    """Shows roles as code, ``:class:`~module.Name``` and ``:math:``, and two colons before a block as one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every class, function and attribute."""
        if obj.docstring:
            text = MATH.sub(
                lambda found: f"`{found[1]}`".replace("\\leftarrow", "←").replace("\\alpha", "α"), obj.docstring.value
            )
            obj.docstring.value = re.sub(r"::$", ":", ROLE.sub(r"`\1`", text), flags=re.MULTILINE)
