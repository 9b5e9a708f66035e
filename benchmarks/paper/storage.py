"""Result files: one per recipe, a run in each line (JSON lines), appended when the run is done.

A run's key, ``digits-ordinary/baseline.8e2cca32/test-003``, is the file's name and then the line's ``run``. A killed
command leaves whole lines and at most a cut last one, which no reader takes for a run and the next command removes.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

from .config import OWN


def path_of(out: Path, key: str) -> Path:
    """The file that has the run of a key, or will have it."""
    return out / f"{key.partition('/')[0]}.jsonl"


def append(out: Path, key: str, result: dict[str, Any]) -> None:
    """Write a run: in one call and through to the disk, so that what ends the process after it cannot take it back."""
    path, name = path_of(out, key), key.partition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"run": name} | without_nan(result), sort_keys=True, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:  # one write in append mode: processes do not mix their lines
        file.write(line.encode())
        os.fsync(file.fileno())


def mend(out: Path, key: str) -> None:
    """Remove a cut last line from the file of a run's key, or the next run would be appended to it."""
    path = path_of(out, key)
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def runs_of(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a file by name; of a run that was made twice, the last. No file holds no runs.

    Raises:
        ValueError: a line is not a result; the message gives its number.
    """
    if not path.exists():
        return {}
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=64)
def _read(path: Path, *_: int) -> dict[str, dict[str, Any]]:
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # cut: the run was not finished
        try:
            result = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: cannot be read as a result: {error}; delete it and run again"
            ) from error
        missing = {"run", "recipe", "arm", "seed", "data", "digests", "metrics", "filters"} - set(result)
        if missing:
            raise ValueError(
                f"{path}, line {number}: is not a result: {', '.join(sorted(missing))} missing; delete it and run again"
            )
        for values in (result, result["recipe"]):
            values.setdefault("corruptions", OWN)  # runs from before there was a choice have no word on it
        result["recipe"].setdefault("attack", True)
        found[result["run"]] = result
    return found


def is_stored(out: Path, key: str) -> bool:
    """Whether a run is done."""
    return key.partition("/")[2] in runs_of(path_of(out, key))


def load_result(out: Path, key: str) -> dict[str, Any]:
    """One run's result.

    Raises:
        ValueError: it is not there, or its file cannot be read.
    """
    path, name = path_of(out, key), key.partition("/")[2]
    try:
        return runs_of(path)[name]
    except KeyError as error:
        raise ValueError(f"{path}: has no run {name}") from error


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
