"""Thresholds that follow the layer, beside the paper's fixed one.

In most deep layers no two filters are as similar as the paper's 0.3: the cosine of two random filters of D elements
has a standard deviation of ``1 / sqrt(D)``, which is 0.015 at D = 4608. So a threshold is better given in those units
(:class:`NoiseThreshold`), or as the share of a layer's pairs that shall be above it (:class:`QuantileThreshold`). Both
say how many filters merge now, and neither what that does to a layer over a run: training alone can take a third of its
pairs above 4 / sqrt(D). What merging may cost a layer over the run is :class:`RankBudget`'s to keep.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .draw import check_share
from .layer_similarity import summarise_layer
from .paths.match import PartnerRule
from .plan.candidates import MergeLayer
from .plan.plan import LayerPlan
from .rank_cost import NEVER

# Of the sampled filters that a RankBudget lets merge, however cheap it is. At 0.05 a fine-tuned EfficientNet-Lite0 kept
# its rank and lost 5 points of accuracy (benchmarks/whole_runs, four seeds).
MOST_SHARE = 0.01


@dataclass(frozen=True)
class NoiseThreshold:
    """``z / sqrt(D)`` for a layer whose filters have D elements: ``z`` standard deviations of random filters.

    Filters that were trained are not random: in our trials a layer lost up to 97 % of its effective rank at z = 4 over
    a whole run, and another one merged next to nothing. Below 2 every merge makes the next one likelier, until the
    filters of a layer are all alike.

    Attributes:
        z: number of standard deviations. The threshold is limited to [-1, 1].
    """

    z: float

    def __post_init__(self) -> None:
        if isinstance(self.z, bool) or not isinstance(self.z, numbers.Real):
            raise TypeError(f"z must be a number, got {self.z!r}")
        if not math.isfinite(self.z):
            raise ValueError(f"z must be finite, got {self.z!r}")

    def of(self, elements: int) -> float:
        """The threshold of a layer with ``elements`` elements per filter."""
        return min(max(float(self.z) / math.sqrt(elements), -1.0), 1.0)


@dataclass(frozen=True)
class QuantileThreshold:
    """The similarity that a share ``rate`` of the sampled filters of a layer exceed, taken from its own pairs.

    Every ``every`` steps all pairs of every layer are compared (a matrix product per layer, and the host waits for it);
    with probability p about ``p * rate`` of a layer's filters are then merged per step, to the end of the run: the
    threshold falls with the similarities that it lets rise. The thresholds are rounded up to a multiple of 1e-4.

    Attributes:
        rate: wanted share of the sampled filters, in [0, 1].
        every: optimizer steps after which the thresholds are computed anew. :func:`inmerge_fast.merge_`, which
            remembers nothing from call to call, computes them at every call.
    """

    rate: float
    every: int = 100

    def __post_init__(self) -> None:
        check_share("rate", self.rate)
        check_count("every", self.every)


@dataclass(frozen=True)
class RankBudget:
    """The lowest threshold at which merging costs each layer no more than a share of its effective rank over the run.

    A layer's budget is spent evenly over the steps that merge. Now and then all pairs of the layer are compared (a
    matrix product and some eigenvalues per layer, and the host waits for them): that tells what a merge costs at which
    threshold (:class:`inmerge_fast.rank_cost.RankCost`), and so the threshold until the next time. What was spent is
    counted: merges that have happened times what one costs. So it follows the layer, its training and any other
    recipe: schedules, groups, partner rules, steps that were skipped. A layer that has nothing left is not merged, nor
    is one whose most similar pair would cost more than there is to spend so far.

    Only :class:`inmerge_fast.InMerge` knows a run, so only there does it mean anything.

    Attributes:
        loss: share of a layer's effective rank that merging may cost, in (0, 1). What a layer lacks in the end beside
            the same run without merging was up to 1.7 times that in our trials.
        steps: optimizer steps from ``start`` on that the budget is for; None for as many as there are until ``stop``.
        every: optimizer steps after which a layer is measured anew; None for ever longer times, from 16 merging steps
            to a 32nd of all. A layer that has merged an eighth of its filters is measured sooner.
    """

    loss: float = 0.04
    steps: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        check_share("loss", self.loss)
        if not 0.0 < self.loss < 1.0:
            raise ValueError(f"loss must be above 0 and below 1, got {self.loss!r}")
        for name, value in (("steps", self.steps), ("every", self.every)):
            if value is not None:
                check_count(name, value)

    @property
    def budget(self) -> float:
        """The logarithm of effective rank that a layer may lose."""
        return -math.log1p(-self.loss)


Threshold: TypeAlias = "float | Mapping[str, float] | NoiseThreshold | QuantileThreshold | RankBudget"
FOLLOWING = {kind.__name__: kind for kind in (NoiseThreshold, QuantileThreshold, RankBudget)}


def check_count(name: str, value: object) -> None:
    """Check a positive integer argument.

    Raises:
        TypeError: not an integer.
        ValueError: less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_for_one_call(threshold: object) -> None:
    """Check the argument ``threshold`` of :func:`inmerge_fast.merge_`.

    Raises:
        TypeError: it is no threshold, or one that only a run can follow.
        ValueError: a number is outside [-1, 1].
    """
    if isinstance(threshold, Mapping):
        check_by_layer(threshold)
    elif isinstance(threshold, RankBudget):
        raise TypeError(
            "threshold=RankBudget() has to know the steps of a run, of which merge_ makes one at a time: use "
            "InMerge(model, threshold=RankBudget(), stop=...)"
        )
    elif not isinstance(threshold, (NoiseThreshold, QuantileThreshold)):
        check_share("threshold", threshold, low=-1.0)


def check_by_layer(values: Mapping[str, float]) -> dict[str, float]:
    """Check thresholds by name of the layer.

    Raises:
        TypeError: a threshold is not a number.
        ValueError: one is outside [-1, 1], or there are none.
    """
    if not values:
        raise ValueError("threshold is an empty dict; give one for each layer, by its name in the plan")
    for name, value in values.items():
        check_share(f"threshold of layer {name!r}", value, low=-1.0)
    return dict(values)


def by_layer(values: Mapping[str, float], plan: LayerPlan) -> list[float]:
    """The thresholds of the layers of ``plan``, in its order; there may be others, of layers that it leaves out.

    Raises:
        ValueError: a layer of the plan has none, or one has a name that is no layer's.
    """
    missing = [name for name in plan.names if name not in values]
    if missing:
        raise ValueError(
            f"threshold has no value for layer {missing[0]!r} ({len(missing)} of {len(plan.names)} layers have none; "
            f"it has {_some(values)}); give each layer one, or leave layers out with exclude="
        )
    if len(values) > len(plan.names):
        known = {*plan.names, *(name for name, _ in plan.skipped)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"threshold has a value for {unknown[0]!r}, which is no layer; they are {_some(known)}")
    return [float(values[name]) for name in plan.names]


def _some(names: Iterable[str]) -> str:
    every = [repr(name) for name in names]
    return ", ".join(every[:6]) + (f" and {len(every) - 6} others" if len(every) > 6 else "")


def quantile_threshold(name: str, weight: torch.Tensor, layer: MergeLayer, rate: float, partner: PartnerRule) -> float:
    """The threshold of :class:`QuantileThreshold` for one layer, from its whole weight; ``NEVER`` where no pair is."""
    summary = summarise_layer(name, weight, layer.layout, False)
    return summary.threshold_for_rate(rate, partner) if summary.pairs else NEVER
