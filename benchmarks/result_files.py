"""The result files of the benchmarks, as tables, plots and targets read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REGIMES = ("all pass", "none passes")


@dataclass(frozen=True)
class Results:
    """One result file.

    Attributes:
        path: where it is, relative to the repository.
        bench: what it is of: merge, scaling, host, training or match.
        environment: what the run said of its machine and versions.
        rows: its measurements.
    """

    path: Path
    bench: str
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

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


def load(folder: Path = RESULTS) -> list[Results]:
    """All result files below ``folder``, GPUs first."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        found.append(Results(shown, path.stem, content["environment"], content["rows"]))
    return sorted(found, key=lambda results: (not results.on_gpu, results.device, results.bench))


def slug(device: str) -> str:
    """A device's name as part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in device).split()).lower()
