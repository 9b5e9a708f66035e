"""The result files of the benchmarks: how they are written, point by point, and how tables and plots read them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REGIMES = ("all pass", "none passes")


class ResultFile:
    """``<root>/<device>/<name>.json``, written anew and whole after every point.

    So whatever ends a run, a limit, a crash or a machine that is taken back, what was measured until then is there, in
    a file that can be read.

    Args:
        root: folder of all results.
        name: of the benchmark; of several passes of one, each in a file of its own, ``merge-published``.
        environment: what the run says of its machine and versions, the ``device`` among it.
        settings: what all rows have in common.
    """

    def __init__(
        self, root: Path, name: str, environment: Mapping[str, object], settings: Mapping[str, object]
    ) -> None:
        self.rows: list[dict[str, object]] = []
        self.failures: list[dict[str, object]] = []
        self._about = {"environment": dict(environment), "settings": dict(settings)}
        device = re.sub(r"\((R|TM)\)", "", str(environment["device"]))
        self.path = root / re.sub(r"[^\w.]+", "-", device).strip("-") / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, object]) -> None:
        """Take a row in and write the file.

        Raises:
            ValueError: one of its numbers is not finite; the file stays as it was.
        """
        json.dumps(row, allow_nan=False)
        self.rows.append(row)
        self.write()

    def extend(self, row: dict[str, object], values: Mapping[str, object]) -> None:
        """Add columns to a row and write the file.

        Raises:
            ValueError: one of the numbers is not finite; the row and the file stay as they were.
        """
        json.dumps(values, allow_nan=False)
        row |= values
        self.write()

    def write(self, *, complete: bool = False) -> None:
        """Write the file whole."""
        content = {**self._about, "complete": complete, "failures": self.failures, "rows": self.rows}
        beside = self.path.with_suffix(".json.new")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(beside, self.path)  # atomic: a run that is killed leaves no half a file

    @contextlib.contextmanager
    def attempt(self, **what: object) -> Iterator[None]:
        """Record what fails inside, with its error, instead of passing it on: the rest is measured all the same."""
        try:
            yield
        except Exception as error:
            self.fail(error, **what)

    def fail(self, error: Exception, **what: object) -> None:
        """Record an error of what is described, and print its traceback."""
        traceback.print_exception(error, file=sys.stderr)
        said = str(error).strip().split("\n")[0][:300]
        self.failures.append({**what, "error": f"{type(error).__name__}: {said}".removesuffix(": ")})
        self.write()

    def finish(self) -> int:
        """Write that the run came to its end, and print it; returns the exit status, 1 if something failed."""
        self.write(complete=True)
        print("written to", self.path)
        for failure in self.failures:
            print("FAILED:", failure)
        return int(bool(self.failures))


@dataclass(frozen=True)
class Results:
    """One result file, or the files of all passes of a benchmark.

    Attributes:
        path: where it is, relative to the repository.
        bench: what it is of: merge, scaling, host, training or match.
        environment: what the run said of its machine and versions.
        rows: its measurements.
        failures: what could not be measured, each with its ``error``.
        complete: whether the run came to its end.
    """

    path: Path
    bench: str
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, Any]] = ()
    complete: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU did the work."""
        return "cuda" in self.environment

    @property
    def device(self) -> str:
        """Name of the device."""
        return str(self.environment["device"])

    def pick(self, **wanted: object) -> list[Mapping[str, Any]]:
        """The rows that have these values."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def value(self, column: str, **wanted: object) -> float | None:
        """A number of the one row that has these values; None if there is no such row or number."""
        rows = self.pick(**wanted)
        assert len(rows) <= 1, f"{self.path}: {len(rows)} rows have {wanted}"
        return rows[0].get(column) if rows else None

    def over_merge(self, row: Mapping[str, Any]) -> float | None:
        """Wall time of a row of ``bench_merge`` over that of ``merge_`` in the same rounds; None where that is missing.

        A pass of its own times ``merge_`` beside it and keeps its time in the row.
        """
        same = {key: row[key] for key in ("net", "dtype", "regime")}
        ours = row.get("merge_us") or self.value("wall_us", provider="merge_", **same)
        return row["wall_us"] / ours if ours else None


def load(folder: Path = RESULTS) -> list[Results]:
    """All result files below ``folder``, GPUs first, passes behind their benchmark."""
    found = []
    for path in sorted(folder.glob("*/*.json"), key=lambda path: (path.parent, path.stem)):
        content = json.loads(path.read_text())
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        bench = path.stem.partition("-")[0]
        found.append(
            Results(
                shown, bench, content["environment"], content["rows"], content.get("failures", ()),
                content.get("complete", True),
            )
        )  # fmt: skip
    return sorted(found, key=lambda results: (not results.on_gpu, results.device, results.bench))


def joined(passes: Sequence[Results]) -> Results:
    """The files of all passes of one benchmark on one device as one, under the name of the first."""
    first = passes[0]
    rows, failures = ([item for results in passes for item in getattr(results, name)] for name in ("rows", "failures"))
    return Results(first.path, first.bench, first.environment, rows, failures, all(each.complete for each in passes))


def by_device(found: Sequence[Results]) -> dict[str, dict[str, list[Results]]]:
    """Result files by device and benchmark, the passes of one in a list."""
    devices: dict[str, dict[str, list[Results]]] = {}
    for results in found:
        devices.setdefault(results.device, {}).setdefault(results.bench, []).append(results)
    return devices


def slug(device: str) -> str:
    """A device's name as part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in device).split()).lower()
