"""What one call of ``merge_`` sampled, measured and merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class NoEffectWarning(UserWarning):
    """Merging has sampled filter pairs for many calls and merged none of them, or next to none."""


class CollapseWarning(UserWarning):
    """Merging has cost a layer so much of its effective rank that its filters are becoming alike."""


@dataclass(frozen=True)
class LayerStats:
    """One layer's share of a call.

    Attributes:
        name: qualified name of the layer in its model.
        filters: number of filters N.
        sampled: filters whose coin fell, i.e. pairs looked at.
        passed: sampled pairs whose similarity was above the threshold.
        merged: filters rewritten: ``passed``, or 0 in a dry run.
        mean_similarity: mean cosine similarity of the sampled pairs; NaN if there were none. Pairs with a NaN or
            infinite filter have no similarity and do not count here.
        max_similarity: the largest of them; NaN if there were none.
    """

    name: str
    filters: int
    sampled: int
    passed: int
    merged: int
    mean_similarity: float
    max_similarity: float


@dataclass(frozen=True)
class SampledPairs:
    """Per-pair results on the host, ordered by layer and filter, so that what is computed from them is deterministic.

    Attributes:
        counts: pairs sampled in each layer, ``(layers,)``.
        similarity: cosine similarity of each pair, ``(pairs,)``; NaN for a pair with a non-finite filter.
        passed: whether the pair was above the threshold, ``(pairs,)``.
    """

    counts: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]
    passed: npt.NDArray[np.bool_]


class MergeStats:
    """Result of one ``merge_`` call. Reading a number waits for the device; until then nothing does.

    Attributes:
        seed: seed of the draw, whether it was given or drawn, so that the call can be repeated.
        step: step of the draw.
        dry_run: whether nothing was written.
        path: the code that ran, "cpu", "triton" or "eager".
        skipped: ``(name, reason)`` of every candidate layer that was left out.
    """

    def __init__(
        self,
        fetch: Callable[[], SampledPairs],
        names: Sequence[str],
        filters: Sequence[int],
        *,
        skipped: Sequence[tuple[str, str]],
        seed: int,
        step: int,
        dry_run: bool,
        path: str,
    ) -> None:
        self.seed, self.step, self.dry_run, self.path = seed, step, dry_run, path
        self.skipped = tuple(skipped)
        self._fetch, self._names, self._filters = fetch, names, filters
        self._layers: tuple[LayerStats, ...] | None = None
        self._similarity_sum = 0.0
        self._similarity_count = 0

    @property
    def layers(self) -> tuple[LayerStats, ...]:
        """Per-layer numbers in the order of the plan.

        Raises:
            RuntimeError: the device memory that held them has been reused by later calls.
        """
        if self._layers is None:
            self._layers = self._summarise(self._fetch())
        return self._layers

    def prefetch(self) -> None:
        """Begin to copy the numbers to the host without waiting; reading them later waits for that copy only.

        From then on later calls cannot overwrite them.

        Raises:
            RuntimeError: the device memory that held them has been reused by later calls.
        """
        begin = getattr(self._fetch, "prefetch", None)  # the kernels' results have it
        if begin is not None and self._layers is None:
            self._fetch = begin()

    def _summarise(self, pairs: SampledPairs) -> tuple[LayerStats, ...]:
        ends = np.cumsum(pairs.counts)
        layers = []
        for name, filters, start, end in zip(self._names, self._filters, ends - pairs.counts, ends, strict=True):
            similarity = pairs.similarity[start:end]
            similarity = similarity[~np.isnan(similarity)]
            total = math.fsum(similarity)
            self._similarity_sum += total
            self._similarity_count += similarity.size
            passed = int(pairs.passed[start:end].sum())
            layers.append(
                LayerStats(
                    name=name,
                    filters=filters,
                    sampled=int(end - start),
                    passed=passed,
                    merged=0 if self.dry_run else passed,
                    mean_similarity=total / similarity.size if similarity.size else math.nan,
                    max_similarity=float(similarity.max()) if similarity.size else math.nan,
                )
            )
        return tuple(layers)

    @property
    def sampled(self) -> int:
        """Pairs looked at, all layers together."""
        return sum(layer.sampled for layer in self.layers)

    @property
    def passed(self) -> int:
        """Sampled pairs above the threshold, all layers together."""
        return sum(layer.passed for layer in self.layers)

    @property
    def merged(self) -> int:
        """Filters rewritten, all layers together."""
        return sum(layer.merged for layer in self.layers)

    @property
    def mean_similarity(self) -> float:
        """Mean similarity of all sampled pairs; NaN if there were none."""
        _ = self.layers
        return self._similarity_sum / self._similarity_count if self._similarity_count else math.nan

    @property
    def max_similarity(self) -> float:
        """Largest similarity of all sampled pairs; NaN if there were none."""
        return max((s.max_similarity for s in self.layers if not math.isnan(s.max_similarity)), default=math.nan)

    def __getstate__(self) -> dict[str, object]:
        _ = self.layers  # read now: what is saved or copied are the numbers
        return self.__dict__ | {"_fetch": None}

    def __str__(self) -> str:
        rows = [(s.name, s.filters, s.sampled, s.passed, s.merged, s.mean_similarity, s.max_similarity)
                for s in self.layers]  # fmt: skip
        rows.append(("total", sum(self._filters), self.sampled, self.passed, self.merged,
                     self.mean_similarity, self.max_similarity))  # fmt: skip
        width = max(len("layer"), *(len(row[0]) for row in rows))
        lines = [f"{'layer':{width}}  filters  sampled  passed  merged  mean sim.  max sim."]
        lines += [f"{n:{width}}  {f:7d}  {s:7d}  {p:6d}  {m:6d}  {mean:9.4f}  {top:8.4f}"
                  for n, f, s, p, m, mean, top in rows]  # fmt: skip
        lines += describe_skipped(self.skipped)
        if self.dry_run:
            lines.append("dry run: nothing was written")
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = "not read yet" if self._layers is None else f"sampled={self.sampled}, merged={self.merged}"
        return f"MergeStats({state}, seed={self.seed}, step={self.step}, path={self.path!r})"


def describe_skipped(skipped: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each reason, with the layers it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped:
        names.setdefault(reason, []).append(name)
    return [f"skipped {len(group)}, {reason}: {', '.join(group)}" for reason, group in names.items()]
