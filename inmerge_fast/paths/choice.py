"""Which path the layers of a plan take, and why."""

from __future__ import annotations

import os

from ..plan.rows import Rows
from .cpu import CpuPath
from .eager import EagerPath
from .path import Path
from .triton.path import TritonPath


class Paths:
    """The paths of one plan. Which one a call takes is asked at every call, since environment variables count.

    Args:
        rows: the plan's filters.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._kind = rows.device.type
        self._eager: dict[str, EagerPath] = {}
        self.triton, self._cpu = TritonPath(rows), CpuPath(rows)

    def choose(self) -> Path:
        """The path of a call that is made now."""
        if _is_set("INMERGE_FORCE_EAGER"):
            return self._eager_because("INMERGE_FORCE_EAGER is set")
        fast: TritonPath | CpuPath
        if self._kind == "cuda" or (self._kind == "cpu" and _is_set("INMERGE_INTERPRET")):
            fast = self.triton
        elif self._kind == "cpu":
            fast = self._cpu
        else:
            return self._eager_because(f"device {self._rows.device}")
        refusal = fast.refusal
        return self._eager_because(refusal) if refusal else fast

    def follow(self) -> None:
        """What is queued next comes after all calls so far, which may have been on another stream."""
        self.triton.follow()

    def release(self) -> None:
        """Free what merges that are undone keep for the next one; where none comes, it would stay with the plan."""
        self.triton.release()
        self._cpu.release()

    def _eager_because(self, reason: str) -> EagerPath:
        path = self._eager.get(reason)
        if path is None:
            path = self._eager[reason] = EagerPath(self._rows, reason)
        return path


def _is_set(variable: str) -> bool:
    # Asked itself, os.environ raises an exception and catches it where a variable is missing, 0.9 us.
    inside = getattr(os.environ, "_data", None)
    if inside is None:  # tests may put a dict in its place
        return os.environ.get(variable, "0") not in ("", "0")
    value = inside.get(os.environ.encodekey(variable))
    return value is not None and os.environ.decodevalue(value) not in ("", "0")
