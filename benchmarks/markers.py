"""What commands write into README.md, between two lines that stay."""

from __future__ import annotations


def updated(readme: str, begin: str, end: str, section: str) -> str:
    """The README with another section between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must have the lines {begin!r} and {end!r} once each")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n\n{section.rstrip()}\n\n{end}{rest.split(end)[1]}"
