"""Arms against their baseline: means, paired differences with intervals, Holm's correction, two-level bootstrap."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inmerge_fast.demo.data import require

LEVEL = 0.95
FEWEST = 3  # pairs for an interval
# How a run was evaluated: as trained, or with batch-norm statistics recomputed for its final weights.
TRAINED, RECOMPUTED = "metrics", "recomputed"
NO_NORM = ("vit_small", "mamba_small")  # networks without batch norm, of runs that do not say how many they have
# Column title and place in a result file of what is compared, all in [0, 1] and shown in percent.
METRICS: dict[str, tuple[str, ...]] = {
    "acc": ("clean", "acc"),
    "AUC": ("clean", "auc"),
    "corrupted acc": ("corrupted", "acc"),
    "corrupted AUC": ("corrupted", "auc"),
    "non-noise AUC": ("not noise", "auc"),
    "noise acc": ("noise", "acc"),
    "noise AUC": ("noise", "auc"),
    "FGSM 8/255 acc": ("attacked", "fgsm 8/255"),
    "PGD 2/255 acc": ("attacked", "pgd 2/255"),
    "ECE": ("clean", "ece"),
    "corrupted ECE": ("corrupted", "ece"),
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


def holm(values: Sequence[float], of: int | None = None) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays NaN.

    Args:
        values: p values.
        of: how many comparisons they belong to, if some of them have not been made; those that are not NaN if None.
    """
    out = [math.nan] * len(values)
    order = sorted((index for index, p in enumerate(values) if not math.isnan(p)), key=lambda index: values[index])
    highest, count = 0.0, len(order) if of is None else of
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (count - place) * values[index]))
        out[index] = highest
    return out


@dataclass(frozen=True)
class Evaluation:
    """What an arm came to, evaluated in one way.

    Attributes:
        n: seeds in it.
        mean: of each metric, in percent.
        sd: of each metric, NaN with one seed.
        difference: to the baseline of the same seed, evaluated in the same way; empty for the baseline.
    """

    n: int
    mean: dict[str, float]
    sd: dict[str, float]
    difference: dict[str, Paired]


@dataclass(frozen=True)
class Row:
    """One arm of a table.

    Attributes:
        label: the arm.
        kind: "baseline", "reseeded", "backbone" or "setting".
        trained: as trained, without the seeds that diverged, which are in none of the numbers that follow.
        recomputed: with batch-norm statistics recomputed for the final weights, of the seeds that have been measured in
            this way; the same as ``trained`` for networks without batch norm.
        diverged: seeds whose training diverged.
        per_step: filters merged per step; NaN for arms that do not merge.
        rank: mean effective rank before and after, as shares of the highest.
        collapsed: seeds whose filters collapsed.
        identical: seeds whose weights are the baseline's, bit for bit.
        merging: the arm's setting, or None.
        has_norm: whether the network has batch norm.
    """

    label: str
    kind: str
    trained: Evaluation
    recomputed: Evaluation
    diverged: int
    per_step: float
    rank: tuple[float, float]
    collapsed: int
    identical: int
    merging: dict[str, Any] | None
    has_norm: bool

    @property
    def n(self) -> int:
        """Seeds that did not diverge."""
        return self.trained.n

    def judged(self, metric: str) -> Paired:
        """The difference that counts: with recomputed statistics, where every seed has been measured so."""
        return (self.recomputed if self.recomputed.n == self.n else self.trained).difference[metric]

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


def has_norm(result: Mapping[str, Any]) -> bool:
    """Whether a run's network has batch norm, so that there is something to recompute."""
    known = result.get("batch_norms")
    return result["recipe"].get("model") not in NO_NORM if known is None else known > 0


def is_controlled(result: Mapping[str, Any]) -> bool:
    """Whether a run was evaluated with statistics that fit its final weights: without batch norm all are."""
    return result.get(RECOMPUTED) is not None or not has_norm(result)


def is_noise(kind: str) -> bool:
    """Whether a kind of corruption is pixel noise."""
    return "noise" in kind


def group_of(metrics: Mapping[str, Any], group: str) -> Mapping[str, float | None]:
    """One group of a run's metrics; "not noise" is the mean over the kinds of corruption that are no pixel noise.

    Noise is 4 of the 13 kinds, and what helps against it alone looks in the mean as if it helped against all.
    """
    if group != "not noise":
        found: Mapping[str, float | None] = metrics[group]
        return found
    kinds = [each for kind, each in metrics.get("by_corruption", {}).items() if not is_noise(kind)]
    values = [level.get("auc") for each in kinds for level in each.values()]
    known = [value for value in values if value is not None]
    return {"auc": float(np.mean(known)) if known and len(known) == len(values) else None}


def value_of(result: Mapping[str, Any], metric: str, evaluation: str = TRAINED) -> float:
    """A metric of one result, in percent; NaN where it could not be measured or was not.

    Args:
        result: from a result file.
        metric: of :data:`METRICS`.
        evaluation: :data:`TRAINED` or :data:`RECOMPUTED`, which is the same without batch norm.
    """
    group, key = METRICS[metric]
    found = result.get(evaluation) or (None if has_norm(result) else result[TRAINED])
    value = None if found is None else group_of(found, group).get(key)
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
        for kind in ("trained", "recomputed"):
            chosen = [getattr(row, kind).difference for row in rows if row.kind == "setting"]
            # Of settings whose statistics were not recomputed, too: to have looked at few of them again is no gain.
            of = max(sum(not math.isnan(row.trained.difference[metric].p) for row in rows if row.kind == "setting"),
                     sum(not math.isnan(difference[metric].p) for difference in chosen))  # fmt: skip
            adjusted = holm([difference[metric].p for difference in chosen], of)
            for difference, p in zip(chosen, adjusted, strict=True):
                difference[metric] = dataclasses.replace(difference[metric], p_holm=p)
    return rows


def _row(results: Sequence[Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], is_base: bool) -> Row:
    arm = results[0]["arm"]
    treated = arm["merging"] or arm.get("dropout") or arm.get("dropconnect")
    kind = "backbone" if arm["stop"] else "reseeded" if arm["reseed"] else "setting" if treated else "baseline"
    for result in results:
        _check_pair(result, base)
    measured = [result for result in results if not has_diverged(result)]
    pairs = [(result, base[result["seed"]]) for result in measured if not has_diverged(base[result["seed"]])]
    merging = [result["merging"] for result in measured if result["merging"] is not None]
    return Row(
        label=arm["label"],
        kind=kind,
        trained=_evaluated(measured, pairs, TRAINED, is_base),
        recomputed=_evaluated(
            [result for result in measured if is_controlled(result)],
            [pair for pair in pairs if all(map(is_controlled, pair))],
            RECOMPUTED,
            is_base,
        ),
        diverged=len(results) - len(measured),
        per_step=_mean([one["per_step"] for one in merging]),
        rank=(
            _mean([result["filters"]["rank_before"] for result in measured]),
            _mean([result["filters"]["rank"] for result in measured]),
        ),
        collapsed=sum(result["filters"]["collapsed"] for result in measured),
        identical=sum(one["digests"]["weights"] == other["digests"]["weights"] for one, other in pairs),
        merging=arm["merging"],
        has_norm=has_norm(results[0]),
    )


def _check_pair(result: Mapping[str, Any], base: Mapping[int, Mapping[str, Any]]) -> None:
    label, partner = result["arm"]["label"], base.get(result["seed"])
    if partner is None:
        raise ValueError(f"{label}: seed {result['seed']} has no baseline")
    for what, one, other in (
        ("backbone", result["digests"]["backbone"], partner["digests"]["backbone"]),
        ("data", result["data"], partner["data"]),
        ("recipe", result["recipe"], partner["recipe"]),
        ("source of corruptions", result["corruptions"], partner["corruptions"]),
    ):
        if one != other:
            raise ValueError(f"{label}, seed {result['seed']}: another {what} than the baseline's")


def _evaluated(
    measured: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    evaluation: str,
    is_base: bool,
) -> Evaluation:
    values = {metric: [value_of(result, metric, evaluation) for result in measured] for metric in METRICS}
    differences = {
        metric: [value_of(one, metric, evaluation) - value_of(other, metric, evaluation) for one, other in pairs]
        for metric in METRICS
    }
    return Evaluation(
        n=len(measured),
        mean={metric: _mean(each) for metric, each in values.items()},
        sd={metric: float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for metric, each in values.items()},
        # Not measured in every seed, as in runs from before there was a calibration error, is not measured.
        difference={} if is_base else {
            metric: paired([] if any(map(math.isnan, each)) else each) for metric, each in differences.items()
        },
    )  # fmt: skip


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
