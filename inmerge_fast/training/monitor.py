"""Reads what merging did, some steps later, so that nothing waits for the device, and passes it on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

from ..stats import LayerStats, MergeStats

Row: TypeAlias = dict[str, Any]
Logger: TypeAlias = Callable[[Row], object]


@dataclass
class Observation:
    """One observed step: its settings, and what was merged, which may still be on its way from the device."""

    step: int
    alpha: float
    prob: float
    thresholds: dict[str, float]
    stats: MergeStats | tuple[LayerStats, ...]
    logged: bool = False

    @property
    def layers(self) -> tuple[LayerStats, ...]:
        """Per-layer numbers; waits for them if they have not arrived."""
        if isinstance(self.stats, MergeStats):
            self.stats = self.stats.layers
        return self.stats

    def row(self) -> Row:
        """The observation as loggers get it: plain numbers, totals first, then by layer."""
        layers = self.layers
        measured = [s for s in layers if not math.isnan(s.mean_similarity)]
        pairs = sum(s.sampled for s in measured)
        total = math.fsum(s.mean_similarity * s.sampled for s in measured)
        return {
            "step": self.step,
            "alpha": self.alpha,
            "prob": self.prob,
            "sampled": sum(s.sampled for s in layers),
            "passed": sum(s.passed for s in layers),
            "merged": sum(s.merged for s in layers),
            "mean_similarity": total / pairs if pairs else math.nan,
            "max_similarity": max((s.max_similarity for s in measured), default=math.nan),
            "layers": {
                s.name: {
                    "filters": s.filters,
                    "sampled": s.sampled,
                    "passed": s.passed,
                    "merged": s.merged,
                    "mean_similarity": s.mean_similarity,
                    "max_similarity": s.max_similarity,
                    "threshold": self.thresholds[s.name],
                }
                for s in layers
            },
        }

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return vars(self) | {"stats": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Observation:
        """From a checkpoint."""
        return cls(**plain | {"stats": tuple(LayerStats(**layer) for layer in plain["stats"])})


class Monitor:
    """Passes each observation on when the next one is made, by when it has long been copied.

    That is a fixed delay rather than "when the copy has arrived", which would differ from rank to rank.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        self.pending: list[Observation] = []

    def observe(self, observation: Observation) -> None:
        """Take in an observation; its numbers start on their way to the host."""
        if isinstance(observation.stats, MergeStats):
            observation.stats.prefetch()
        self.pending.append(observation)

    def log_due(self) -> None:
        """Log the observations before this one."""
        self.flush()
        self.pending = []

    def flush(self) -> None:
        """Log what has not been logged, and wait for it if it must be."""
        for observation in self.pending:
            if not observation.logged:
                row = observation.row()
                for log in self.loggers:
                    log(row)
                observation.logged = True


def flat(row: Row, prefix: str = "inmerge") -> dict[str, float]:
    """A row's numbers by tag, ``inmerge/merged`` or ``inmerge/layer4.0.conv1/merged``, without those that are NaN."""
    groups = [(prefix, row), *((f"{prefix}/{name}", layer) for name, layer in row["layers"].items())]
    return {
        f"{tag}/{name}": value
        for tag, numbers in groups
        for name, value in numbers.items()
        if name not in ("step", "layers", "filters") and not math.isnan(value)
    }


class DictLogger:
    """Keeps every row in memory, and writes them to a JSON file if asked to.

    Attributes:
        rows: one dict per observed step: ``step``, ``alpha``, ``prob``, the totals ``sampled``, ``passed``, ``merged``,
            ``mean_similarity`` and ``max_similarity``, and under ``layers`` the same by layer, with its ``threshold``.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)

    def save(self, path: str) -> None:
        """Write the rows to a JSON file (a similarity that there is not is ``NaN``)."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.rows, file, indent=1)


class SummaryWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log a number."""


class TensorBoardLogger:
    """Writes every row to TensorBoard: ``inmerge/merged``, ``inmerge/layer4.0.conv1/merged`` and so on.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        prefix: first part of the tags.
    """

    def __init__(self, writer: SummaryWriter, prefix: str = "inmerge") -> None:
        self._writer, self._prefix = writer, prefix

    def __call__(self, row: Row) -> None:
        """Write a row."""
        for tag, value in flat(row, self._prefix).items():
            self._writer.add_scalar(tag, value, row["step"])
