"""The experiments by name: which runs each is made of."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import BACKBONE, BASELINE, FORWARD, OWN, PAPER, RECOMMENDED, RESEEDED, Arm, Merging, Recipe, Run, digest
from .own import is_own
from .xrays import is_xrays

THRESHOLDS = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.5)
Z_VALUES = (2.0, 3.0, 4.0, 6.0)
ALPHAS, PROBS = (0.5, 0.8, 0.95), (0.05, 0.3, 0.5)
SKIPS = (0.0, 0.25, 0.5, 0.6, 0.75)  # share of the convolutions left out
PAPER_SKIP = 10  # convolutions that the paper leaves out, of a network that has more
# What somebody who fine-tunes a trained network would ask for, by name.
FINE_TUNE_ARMS: dict[str, Arm] = {
    "paper": Arm(dataclasses.replace(PAPER, skip_first=PAPER_SKIP)),
    "recommended": Arm(RECOMMENDED),
    "quantile": Arm(Merging(quantile=0.02)),
    "noise": Arm(Merging(z=4.0)),
    "forward-only": Arm(FORWARD),
    "equal-norm-noise": Arm(dataclasses.replace(FORWARD, as_noise=True)),
    "equal-angle-noise": Arm(dataclasses.replace(FORWARD, as_noise=True, same_angle=True)),
    "dropconnect": Arm(dropconnect=0.2),
    "dropout": Arm(dropout=0.2),
    "forward-only+dropout": Arm(FORWARD, dropout=0.1),
}
# Options that change the runs and have no word of their own in the name of a recipe.
SWITCHES = ("weights", "bf16", "each_forward", "in_validation", "micro_batches", "lr", "limit")


@dataclass(frozen=True)
class Options:
    """What the command line says; None stands for a default that depends on the experiment and the data.

    Attributes:
        data: see :func:`benchmarks.paper.data.load`.
        size: side of the images.
        model: name of the network.
        weights: name and MD5 of the file with its pre-trained weights.
        seeds: number of seeds, from 0.
        backbone_epochs: epochs before the arms.
        arm_epochs: epochs of every arm.
        batch_size: images per step.
        lr: learning rate at the start, where all others of the schedule follow in proportion.
        limit: images of every part.
        arms: names of :data:`FINE_TUNE_ARMS` for ``fine-tune``; all if empty.
        bf16: autocast to bfloat16.
        each_forward: merge before every forward pass.
        in_validation: merge in validation, too.
        micro_batches: parts of a batch whose gradients are accumulated.
        corruptions: whose, see :class:`Recipe`.
        quick: tiny runs that show that everything works and say nothing else.
    """

    data: str = "digits"
    size: int | None = None
    model: str | None = None
    weights: str | None = None
    seeds: int | None = None
    backbone_epochs: int | None = None
    arm_epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    limit: int | None = None
    arms: tuple[str, ...] = ()
    bf16: bool = False
    each_forward: bool = False
    in_validation: bool = False
    micro_batches: int = 1
    corruptions: str = OWN
    quick: bool = False


@dataclass(frozen=True)
class Experiment:
    """Runs to do and how to show them.

    Attributes:
        name: of its tables and figures.
        title: heading of the table.
        groups: arms of each recipe; the first of them is the baseline of the others.
        seeds: seeds of every arm.
        figure: kind of the figure: "bars", "line", "heat" or none.
    """

    name: str
    title: str
    groups: tuple[tuple[Recipe, tuple[Arm, ...]], ...]
    seeds: tuple[int, ...]
    figure: str = "bars"
    split: str = "test"
    keep_scores: bool = field(default=False, compare=False)

    def runs(self) -> list[Run]:
        """All runs, recipe after recipe and seed after seed."""
        return [
            Run(recipe, arm, seed, self.split, self.keep_scores)
            for recipe, arms in self.groups
            for seed in self.seeds
            for arm in arms
        ]


def recipes(options: Options) -> tuple[Recipe, Recipe]:
    """The two recipes of a data set: an ordinary one, and one with so much weight decay that the paper's tau acts."""
    name = options.data.partition(":")[2] if is_own(options.data) else Path(options.data).stem
    if is_xrays(options.data):
        name = options.data.replace(":", "-")
    name += f"_{options.size}" if options.size else ""
    digits = name == "digits"
    values: dict[str, object] = {
        "data": options.data, "size": options.size, "model": options.model or "vgg8", "weights": options.weights,
        "backbone_epochs": 16 if digits else 8, "arm_epochs": 6 if digits else 3, "batch_size": 32 if digits else 64,
        "flip": not digits, "bf16": options.bf16, "micro_batches": options.micro_batches,
        "corruptions": options.corruptions,
    }  # fmt: skip
    if options.limit is not None:
        values["limit"] = options.limit
    if options.quick:
        values |= {"backbone_epochs": 1, "arm_epochs": 1, "severities": (3,), "limit": 96}
    changed: dict[str, object] = {
        key: getattr(options, key) for key in SWITCHES if getattr(options, key) != getattr(Options, key)
    }
    for key in ("backbone_epochs", "arm_epochs", "batch_size"):
        if getattr(options, key) not in (None, values[key]):
            changed[key] = values[key] = getattr(options, key)
    suffix = "" if values["model"] == "vgg8" else f"-{re.sub(r'[:.]', '_', str(values['model']))}"
    suffix += "" if options.corruptions == OWN else f"-{options.corruptions}"
    suffix += "-quick" if options.quick else ""
    suffix += f"-{digest(changed)}" if changed else ""  # or its tables would take the place of the usual ones
    ordinary = Recipe(name=f"{name}{suffix}-ordinary", high=0.05, middle=0.005, weight_decay=5e-4, **values)  # type: ignore[arg-type]
    strong = Recipe(name=f"{name}{suffix}-strong-decay", high=0.1, middle=0.01, weight_decay=5e-3, **values)  # type: ignore[arg-type]
    return at_rate(ordinary, options.lr), at_rate(strong, options.lr)


def at_rate(recipe: Recipe, rate: float | None) -> Recipe:
    """A recipe whose schedule starts at another learning rate, and is scaled with it; as it is for None."""
    if rate is None:
        return recipe
    factor = rate / recipe.high
    return dataclasses.replace(recipe, high=rate, middle=recipe.middle * factor, low=recipe.low * factor)


def _seeds(options: Options, default: int) -> tuple[int, ...]:
    return tuple(range(options.seeds or (2 if options.quick else default)))


def arms_of(options: Options, settings: Sequence[Merging]) -> tuple[Arm, ...]:
    """An arm for each setting, with the switches of the command line."""
    return tuple(
        Arm(dataclasses.replace(setting, each_forward=options.each_forward, in_validation=options.in_validation))
        for setting in settings
    )


def table_medmnist(options: Options) -> Experiment:
    """The paper's MedMNIST table: its setting against the baseline, with the noise floor and a threshold that acts."""
    arms = (BASELINE, RESEEDED, BACKBONE, *arms_of(options, [PAPER, Merging(z=3.0)]))
    groups = tuple((recipe, arms) for recipe in recipes(options))
    return Experiment("table-medmnist", "Baseline and InMerge", groups, _seeds(options, 8))


def table_chestxray14(options: Options) -> Experiment:
    """The paper's ChestX-ray14 table: AUROC of every finding, beside the eleven published rows."""
    if options.model is None:
        options = dataclasses.replace(options, model="vgg8" if options.quick else "vgg19")
    recipe = recipes(options)[0]
    if not options.quick:  # as published: SGD, lr 0.1, weight decay 1e-4, batch 324, 30 epochs and 10 with merging
        recipe = dataclasses.replace(
            recipe, high=0.1, middle=0.01, low=0.001, weight_decay=1e-4, batch_size=options.batch_size or 324,
            backbone_epochs=options.backbone_epochs or 30, arm_epochs=options.arm_epochs or 10,
        )  # fmt: skip
        recipe = at_rate(recipe, options.lr)
    arms = (BASELINE, RESEEDED, *arms_of(options, [PAPER]))
    return Experiment("table-chestxray14", "ChestX-ray14", ((recipe, arms),), _seeds(options, 3))


def sweep_weight_probability(options: Options) -> Experiment:
    """Figure 2 of the paper: merge weight alpha times merge probability p."""
    alphas, probs = ((0.5, 0.8), (0.1, 0.3)) if options.quick else (ALPHAS, PROBS)
    settings = [Merging(alpha=alpha, prob=prob) for alpha, prob in itertools.product(alphas, probs)]
    arms = (BASELINE, RESEEDED, *arms_of(options, settings))
    title = "Merge weight and probability"
    return Experiment("sweep-weight-probability", title, ((recipes(options)[1], arms),), _seeds(options, 3), "heat")


def sweep_layers(options: Options) -> Experiment:
    """Figure 3a: how many of the first convolutions are left out."""
    settings = [Merging(skip_first=skip) for skip in ((0.0, 0.6) if options.quick else SKIPS)]
    arms = (BASELINE, RESEEDED, *arms_of(options, settings))
    return Experiment("sweep-layers", "Layers left out", ((recipes(options)[1], arms),), _seeds(options, 3), "line")


def sweep_threshold(options: Options) -> Experiment:
    """Figure 3b: the similarity threshold, fixed and as z / sqrt(D)."""
    fixed, scaled = ((-1.0, 0.3), (3.0,)) if options.quick else (THRESHOLDS, Z_VALUES)
    settings = [Merging(threshold=value) for value in fixed] + [Merging(z=value) for value in scaled]
    arms = (BASELINE, RESEEDED, *arms_of(options, settings))
    return Experiment(
        "sweep-threshold", "Similarity threshold", ((recipes(options)[1], arms),), _seeds(options, 3), "line"
    )


def partner_rules(options: Options) -> Experiment:
    """Which filter is the partner: a random one (the paper), one above the threshold, the most similar one."""
    z_values = (4.0,) if options.quick else (3.0, 5.0)
    settings = [Merging(z=z, partner=rule) for z in z_values for rule in ("random", "similar", "nearest")]
    arms = (BASELINE, RESEEDED, *arms_of(options, settings))
    return Experiment("partner-rules", "Partner rules", ((recipes(options)[1], arms),), _seeds(options, 3))


def transformer(options: Options) -> Experiment:
    """Future work of the paper: rows of a vision transformer's Linear layers."""
    return _sequence(options, "transformer", "Vision transformer, rows of its Linear layers", "vit_small")


def mamba(options: Options) -> Experiment:
    """Future work of the paper: the projections of Mamba blocks."""
    return _sequence(options, "mamba", "Mamba, rows of its projections", "mamba_small")


def _switched(arm: Arm, options: Options) -> Arm:
    """An arm with the switches of the command line, which are about merging that lasts."""
    return arm if arm.merging is None or not arm.merging.lasting else arms_of(options, [arm.merging])[0]


def fine_tune(options: Options) -> Experiment:
    """A network that has been trained before: the paper's setting, what is recommended, and controls.

    Short and with small steps: two epochs, then two in every arm, at a fifth of the learning rate of random weights.
    """
    unknown = sorted(set(options.arms) - set(FINE_TUNE_ARMS))
    if unknown:
        raise ValueError(f"arms must be of {', '.join(FINE_TUNE_ARMS)}, got {', '.join(unknown)}")
    values: dict[str, Any] = {} if options.quick else {
        "backbone_epochs": options.backbone_epochs or 2, "arm_epochs": options.arm_epochs or 2,
        "batch_size": options.batch_size or 16,
    }  # fmt: skip
    usual = recipes(dataclasses.replace(options, model=options.model or "efficientnet_lite0"))[0]
    recipe = dataclasses.replace(
        at_rate(usual, options.lr or 0.01), name=f"{usual.name.removesuffix('-ordinary')}-fine-tune", severities=(4,),
        attack=False, **values,
    )  # fmt: skip
    arms = tuple(
        _switched(arm, options) for name, arm in FINE_TUNE_ARMS.items() if name in options.arms or not options.arms
    )
    return Experiment("fine-tune", "Fine-tuning", ((recipe, (BASELINE, RESEEDED, *arms)),), _seeds(options, 8))


def _sequence(options: Options, name: str, title: str, model: str) -> Experiment:
    recipe = recipes(dataclasses.replace(options, model=options.model or model))[0]
    # SGD at these rates does not train them.
    recipe = dataclasses.replace(recipe, optimizer="adam", high=1e-3, middle=1e-4, low=1e-5, weight_decay=0.0)
    recipe = at_rate(recipe, options.lr)
    settings = [Merging(include_linear=True), Merging(z=4.0, include_linear=True), Merging(z=2.0, include_linear=True)]
    arms = (BASELINE, RESEEDED, *arms_of(options, settings[: 2 if options.quick else 3]))
    return Experiment(name, title, ((recipe, arms),), _seeds(options, 3))


EXPERIMENTS: dict[str, Callable[[Options], Experiment]] = {
    "table-medmnist": table_medmnist,
    "table-chestxray14": table_chestxray14,
    "sweep-weight-probability": sweep_weight_probability,
    "sweep-layers": sweep_layers,
    "sweep-threshold": sweep_threshold,
    "partner-rules": partner_rules,
    "transformer": transformer,
    "mamba": mamba,
    "fine-tune": fine_tune,
}
