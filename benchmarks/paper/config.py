"""What a run is: a recipe, an arm and a seed. Their values decide everything, so they are the run's key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from inmerge_fast import NoiseThreshold, QuantileThreshold, RankBudget
from inmerge_fast.thresholds import Threshold

OWN = "own"


@dataclass(frozen=True)
class Recipe:
    """Everything that the arms of a comparison have in common.

    Attributes:
        name: short name for result files and tables.
        data: as for :func:`benchmarks.paper.data.load`.
        size: side of the images, None for the data set's own.
        model: as for :func:`benchmarks.paper.models.build`.
        weights: name and MD5 of the file with pre-trained weights, or None.
        optimizer: "sgd" (momentum 0.9) or "adam".
        backbone_epochs: epochs before the arms part, without merging.
        arm_epochs: epochs of every arm.
        high: learning rate at the start of the backbone.
        middle: where the backbone ends and the arms start; cosine in between.
        low: where the arms end.
        weight_decay: L2 penalty of the optimizer.
        batch_size: images per step.
        micro_batches: parts of a batch whose gradients are accumulated.
        flip: random horizontal flips.
        bf16: autocast to bfloat16.
        severities: of the corruptions, 1 to 5.
        corruptions: "own", those of ``robustness.py``, or "medmnistc", those of that package.
        limit: use this many images of every part, evenly spaced, or None for all.
        attack: whether networks are attacked, too, which takes as long as a third of all other measuring.
    """

    name: str
    data: str
    model: str
    size: int | None = None
    weights: str | None = None
    optimizer: str = "sgd"
    backbone_epochs: int = 10
    arm_epochs: int = 4
    high: float = 0.05
    middle: float = 0.01
    low: float = 0.0001
    weight_decay: float = 5e-4
    batch_size: int = 64
    micro_batches: int = 1
    flip: bool = False
    bf16: bool = False
    severities: tuple[int, ...] = (3, 5)
    corruptions: str = OWN
    limit: int | None = None
    attack: bool = True


@dataclass(frozen=True)
class Merging:
    """How an arm merges.

    Attributes:
        alpha: share of itself that a merged filter keeps.
        prob: probability that a filter looks at a partner.
        threshold: fixed similarity threshold, ignored with ``z``, ``quantile`` or ``budget``.
        z: threshold of z / sqrt(D) in each layer, D its fan-in; None for the fixed one.
        quantile: share of the sampled filters that shall pass (``QuantileThreshold``), or None.
        budget: share of its rank that merging may cost a layer over the arm (``RankBudget``, recommended), or None.
        partner: "random", "similar" or "nearest".
        skip_first: first layers left out, as in ``merge_``: a share, or a number of them (the paper: 10).
        include_linear: whether ``Linear`` layers take part.
        start: share of the arm's steps before merging starts.
        decay: whether ``prob`` falls to 0 (cosine) over the arm.
        each_forward: merge before every forward pass, as the published code does, not once per optimizer step.
        in_validation: merge before every forward pass of a validation after each epoch too, as the published code does.
        lasting: whether merging stays in the weights, as published; else it lasts for a forward and backward pass.
        as_noise: with ``lasting=False``, move every merged filter as far, but in a random direction.
        same_angle: with ``as_noise``, turn it by as much, too, and give it the norm that merging would.
    """

    alpha: float = 0.8
    prob: float = 0.3
    threshold: float = 0.3
    z: float | None = None
    partner: str = "random"
    skip_first: float = 0.6
    include_linear: bool = False
    start: float = 0.0
    decay: bool = False
    each_forward: bool = False
    in_validation: bool = False
    lasting: bool = True
    as_noise: bool = False
    quantile: float | None = None
    budget: float | None = None
    same_angle: bool = False

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.z, self.quantile, self.budget)) > 1:
            raise ValueError(f"z, quantile and budget are three kinds of threshold: give one, got {self}")
        if self.same_angle and not self.as_noise:
            raise ValueError(f"same_angle is for as_noise, got {self}")
        if self.budget is not None and (self.in_validation or not self.lasting):
            raise ValueError(f"budget is for merging that lasts, and in training alone, got {self}")

    def limit(self) -> Threshold:
        """The threshold, as the library takes it."""
        if self.budget is not None:
            return RankBudget(self.budget)
        if self.quantile is not None:
            return QuantileThreshold(self.quantile)
        return self.threshold if self.z is None else NoiseThreshold(self.z)

    def label(self) -> str:
        """The setting in a few words, without what is at its default and usually so."""
        if not self.lasting:
            return self._forward_label()
        words = [self._threshold_label(), f"alpha {self.alpha:g}", f"p {self.prob:g}"]
        if self.partner != "random":
            words.append(self.partner)
        if self.skip_first != Merging.skip_first:
            words.append(f"skip {self.skip_first:g}")
        words += [word for word, on in (("Linear", self.include_linear), ("decaying p", self.decay),
                  ("each forward", self.each_forward), ("in validation", self.in_validation)) if on]  # fmt: skip
        if self.start:
            words.append(f"from {100 * self.start:g} % on")
        return ", ".join(words)

    def _threshold_label(self) -> str:
        if self.budget is not None:
            return f"RankBudget {self.budget:g}"
        if self.quantile is not None:
            return f"quantile {self.quantile:g}"
        return f"tau {self.threshold:g}" if self.z is None else f"z {self.z:g}"

    def _forward_label(self) -> str:
        noise = "noise at the angle of " if self.same_angle else "noise like " if self.as_noise else ""
        words = [f"{noise}forward-only merging"]
        words += [f"alpha {self.alpha:g}", f"p {self.prob:g}"]
        if (self.z, self.quantile) != (None, None) or self.threshold > -1:
            words.append(self._threshold_label())
        words += [self.partner] * (self.partner != "random") + ["Linear"] * self.include_linear
        words += [f"skip {self.skip_first:g}"] * (self.skip_first > 0)
        return ", ".join(words) + (f", from {100 * self.start:g} % on" if self.start else "")


PAPER = Merging()
RECOMMENDED = Merging(budget=RankBudget.loss)
FORWARD = Merging(alpha=0.5, prob=0.5, threshold=-1.0, skip_first=0.0, lasting=False)  # the library's defaults


@dataclass(frozen=True)
class Arm:
    """A way to continue from the backbone.

    Attributes:
        merging: how to merge; None for a baseline.
        reseed: train in another data order: the noise floor.
        stop: do not train any further: what the epochs of the arms alone bring.
        dropout: probability of Dropout2d behind the layers that merge, or behind all convolutions.
        dropconnect: probability that a weight of a convolution is dropped for a step.
    """

    merging: Merging | None = None
    reseed: bool = False
    stop: bool = False
    dropout: float = 0.0
    dropconnect: float = 0.0

    def label(self) -> str:
        """Name of the arm in tables."""
        words = [] if self.merging is None else [self.merging.label()]
        words += [f"Dropout2d {self.dropout:g}"] * (self.dropout > 0)
        words += [f"DropConnect {self.dropconnect:g}"] * (self.dropconnect > 0)
        if words:
            return " + ".join(words)
        return "backbone" if self.stop else "baseline, reseeded" if self.reseed else "baseline"


BASELINE, RESEEDED, BACKBONE = Arm(), Arm(reseed=True), Arm(stop=True)


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        recipe: what it has in common with other arms.
        arm: the arm.
        seed: the seed.
        split: what it is measured on: "val" to choose settings, "test" to report them.
        keep_scores: keep the scores of every image.
        plan: digest of the plan that it is a part of, for its result.
    """

    recipe: Recipe
    arm: Arm
    seed: int
    split: str = "test"
    keep_scores: bool = field(default=False, compare=False)
    plan: str = field(default="", compare=False)

    def key(self) -> str:
        """Names the run: its recipe, which is its result file, its arm, what it is measured on, and its seed."""
        kind = self.arm.label().replace(" %", "pc").replace(", ", "_").replace(" ", "-")
        key = digest({"recipe": chosen(self.recipe), "arm": chosen(self.arm)})
        return f"{self.recipe.name}/{kind}.{key}/{self.split}-{self.seed:03d}"


def chosen(values: Any) -> dict[str, Any]:
    """Fields that are not at their default, so that a new option does not rename old runs."""
    out = {}
    for one in dataclasses.fields(values):
        value = getattr(values, one.name)
        if value != one.default:
            out[one.name] = chosen(value) if dataclasses.is_dataclass(value) else value
    return out


def digest(values: Any) -> str:
    """Eight hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
