"""What commands write into pages, between two lines that stay."""

from __future__ import annotations


def updated(page: str, begin: str, end: str, section: str) -> str:
    """The page with another section between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the lines {begin!r} and {end!r} once each; it begins {page[:40]!r}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{section.rstrip()}\n\n{end}{rest.split(end)[1]}"
