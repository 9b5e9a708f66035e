"""A progress bar for what takes seconds, without another package."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

QUIET = 0.5  # seconds before the bar appears
WIDTH = 24


class Bar:
    """A bar on standard error, where that is a terminal; it is wiped away at the end.

    Args:
        what: what is done.
        total: number of parts.
        shown: whether to show it at all.
    """

    def __init__(self, what: str, total: int, *, shown: bool) -> None:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self._appears = time.monotonic() + QUIET
        self._drawn = False

    def show(self, part: str) -> None:
        """Begin the next part."""
        if self._shown and time.monotonic() >= self._appears:
            full = WIDTH * self._done // self._total
            line = f"{self._what} [{'#' * full}{'.' * (WIDTH - full)}] {self._done}/{self._total} {part}"
            columns = shutil.get_terminal_size().columns
            print(f"\r\033[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)
            self._drawn = True
        self._done += 1

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
