"""Arms against their baseline: means, paired differences with intervals, Holm's correction, two-level bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inmerge_fast.demo.data import require

LEVEL = 0.95
FEWEST = 3  # pairs for an interval
# Column title and place in a result file of what is compared, all in [0, 1] and shown in percent.
METRICS: dict[str, tuple[str, ...]] = {
    "acc": ("clean", "acc"),
    "AUC": ("clean", "auc"),
    "corrupted acc": ("corrupted", "acc"),
    "corrupted AUC": ("corrupted", "auc"),
    "noise acc": ("noise", "acc"),
    "noise AUC": ("noise", "auc"),
    "FGSM 8/255 acc": ("attacked", "fgsm 8/255"),
    "PGD 2/255 acc": ("attacked", "pgd 2/255"),
}


@dataclass(frozen=True)
class Paired:
    """Mean of paired differences, in percentage points, with Student's interval and p.

    Attributes:
        mean: of the differences.
        sd: their standard deviation; NaN for one pair.
        low: lower end of the interval; NaN for fewer than three pairs, or if all differences are the same.
        high: upper end.
        p: two-sided p of a mean of 0; 1 if all differences are 0, NaN where there is no interval.
        n: pairs.
        p_holm: p after Holm's correction over the settings of the table; NaN outside of it.
    """

    mean: float
    sd: float
    low: float
    high: float
    p: float
    n: int
    p_holm: float = math.nan


def paired(differences: Sequence[float]) -> Paired:
    """Summarise differences; all NaN if there are none."""
    values = np.asarray(differences, dtype=float)
    n, mean = len(values), float(values.mean()) if len(values) else math.nan
    sd = float(values.std(ddof=1)) if n > 1 else math.nan
    if n > 1 and not values.any():
        return Paired(0.0, 0.0, 0.0, 0.0, 1.0, n)
    # Accuracies come in steps of an image: two or three seeds can agree on one by chance, and a spread of 0 would make
    # of it a p of 0.
    if n < FEWEST or sd < 1e-9:  # differences of shares are equal but for rounding
        return Paired(mean, sd, math.nan, math.nan, math.nan, n)
    t = require("scipy.stats", "scikit-learn").t
    error = sd / math.sqrt(n)
    share = 0.5 + LEVEL / 2
    quantile = float(t.ppf(share, n - 1))
    # One step of Newton's method: SciPy 1.11's quantile is off by 3e-10, which a limit near 0 shows in digit 6.
    quantile -= float((t.cdf(quantile, n - 1) - share) / t.pdf(quantile, n - 1))
    half = quantile * error
    return Paired(mean, sd, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, n - 1)), n)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays NaN and does not count."""
    out = [math.nan] * len(values)
    order = sorted((index for index, p in enumerate(values) if not math.isnan(p)), key=lambda index: values[index])
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * values[index]))
        out[index] = highest
    return out


@dataclass(frozen=True)
class Row:
    """One arm of a table.

    Attributes:
        label: the arm.
        kind: "baseline", "reseeded", "backbone" or "setting".
        n: seeds, without those that diverged, which are in none of the numbers that follow.
        diverged: seeds whose training diverged.
        mean: of each metric, in percent.
        sd: of each metric, NaN with one seed.
        difference: to the baseline of the same seed, empty for the baseline.
        per_step: filters merged per step; NaN for arms that do not merge.
        rank: mean effective rank before and after, as shares of the highest.
        collapsed: seeds whose filters collapsed.
        identical: seeds whose weights are the baseline's, bit for bit.
        merging: the arm's setting, or None.
    """

    label: str
    kind: str
    n: int
    diverged: int
    mean: dict[str, float]
    sd: dict[str, float]
    difference: dict[str, Paired]
    per_step: float
    rank: tuple[float, float]
    collapsed: int
    identical: int
    merging: dict[str, Any] | None

    @property
    def title(self) -> str:
        """The label, and how many seeds diverged if any did."""
        return (
            f"{self.label} (diverged: {self.diverged} of {self.diverged + self.n} seeds)"
            if self.diverged
            else self.label
        )


def has_diverged(result: Mapping[str, Any]) -> bool:
    """Whether a run has no scores, or ended with a loss that is not finite: no number is made of it.

    Runs from before accuracies of such scores were NaN have a number there; their loss tells.
    """
    last = [result["metrics"]["clean"]["acc"], *result.get("loss", [])[-1:]]
    return any(value is None or not math.isfinite(value) for value in last)


def value_of(result: Mapping[str, Any], metric: str) -> float:
    """A metric of one result, in percent; NaN where it could not be measured."""
    group, key = METRICS[metric]
    value = result["metrics"][group][key]
    return math.nan if value is None else 100 * value


def compare(arms: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Rows of a table.

    Args:
        arms: results of each arm, one per seed; the first arm is the baseline. Arms without results are left out.

    Raises:
        ValueError: an arm started from another backbone than the baseline of its seed, or saw other data: they cannot
            be compared.
    """
    base = {result["seed"]: result for result in arms[0]}
    rows = []
    for results in arms:
        if results:
            rows.append(_row(results, base, is_base=results is arms[0]))
    for metric in METRICS:
        chosen = [row for row in rows if row.kind == "setting"]
        adjusted = holm([row.difference[metric].p for row in chosen])
        for row, p in zip(chosen, adjusted, strict=True):
            one = row.difference[metric]
            row.difference[metric] = Paired(one.mean, one.sd, one.low, one.high, one.p, one.n, p)
    return rows


def _row(results: Sequence[Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], is_base: bool) -> Row:
    arm = results[0]["arm"]
    treated = arm["merging"] or arm.get("dropout") or arm.get("dropconnect")
    kind = "backbone" if arm["stop"] else "reseeded" if arm["reseed"] else "setting" if treated else "baseline"
    measured = [result for result in results if not has_diverged(result)]
    values = {metric: [value_of(result, metric) for result in measured] for metric in METRICS}
    differences: dict[str, list[float]] = {metric: [] for metric in METRICS}
    identical = 0
    for result in results:
        partner = base.get(result["seed"])
        if partner is None:
            raise ValueError(f"{arm['label']}: seed {result['seed']} has no baseline")
        for what, one, other in (
            ("backbone", result["digests"]["backbone"], partner["digests"]["backbone"]),
            ("data", result["data"], partner["data"]),
            ("recipe", result["recipe"], partner["recipe"]),
            ("source of corruptions", result["corruptions"], partner["corruptions"]),
        ):
            if one != other:
                raise ValueError(f"{arm['label']}, seed {result['seed']}: another {what} than the baseline's")
        if has_diverged(result) or has_diverged(partner):
            continue
        identical += result["digests"]["weights"] == partner["digests"]["weights"]
        for metric in METRICS:
            differences[metric].append(value_of(result, metric) - value_of(partner, metric))
    merging = [result["merging"] for result in measured if result["merging"] is not None]
    return Row(
        label=arm["label"],
        kind=kind,
        n=len(measured),
        diverged=len(results) - len(measured),
        mean={metric: _mean(each) for metric, each in values.items()},
        sd={metric: float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for metric, each in values.items()},
        difference={} if is_base else {metric: paired(each) for metric, each in differences.items()},
        per_step=_mean([one["per_step"] for one in merging]),
        rank=(
            _mean([result["filters"]["rank_before"] for result in measured]),
            _mean([result["filters"]["rank"] for result in measured]),
        ),
        collapsed=sum(result["filters"]["collapsed"] for result in measured),
        identical=identical,
        merging=arm["merging"],
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def two_level_bootstrap(
    labels: npt.NDArray,
    pairs: Sequence[tuple[Sequence[npt.NDArray], Sequence[npt.NDArray]]],
    metric: Callable[[npt.NDArray, npt.NDArray], float],
    *,
    repeats: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Interval of a mean paired difference over seeds *and* images, since all seeds share the test images.

    Every repeat draws seeds and images with replacement, the same images for all drawn seeds and both arms.

    Args:
        labels: of the images.
        pairs: for every seed the scores of both arms, ``(N, K)`` for each of several corruptions, over which the metric
            is averaged.
        metric: of labels and scores.
        repeats: of the bootstrap.
        seed: of its draws.

    Returns:
        Mean difference (second minus first), lower and upper end of the percentile interval.
    """
    rng = np.random.default_rng(seed)

    def difference(pair: tuple[Sequence[npt.NDArray], Sequence[npt.NDArray]], images: npt.NDArray) -> float:
        first, second = (np.mean([metric(labels[images], scores[images]) for scores in arm]) for arm in pair)
        return float(second - first)

    everything = np.arange(len(labels))
    mean = float(np.mean([difference(pair, everything) for pair in pairs]))
    drawn = []
    for _ in range(repeats):
        images = rng.integers(len(labels), size=len(labels))
        seeds = rng.integers(len(pairs), size=len(pairs))
        counts = np.bincount(seeds, minlength=len(pairs))
        values = [count * difference(pairs[index], images) for index, count in enumerate(counts) if count]
        drawn.append(sum(values) / len(pairs))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)
