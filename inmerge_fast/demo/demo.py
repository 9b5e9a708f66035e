"""The demo: one small CNN, trained on from one state without merging, and with both forms of it."""

from __future__ import annotations

import copy
import dataclasses
import platform
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from .. import MergePlan, __version__
from ..checkpoints.into_model import load_into
from ..forward_only import ALPHA, PROB, THRESHOLD
from .corruptions import corruptions_of
from .data import ImageSet, load_digits, load_npz, require
from .report import TEXT_WIDTH, Arm, Outcome, print_paragraph, report
from .train import (
    DRY_RUNS,
    MOMENTUM,
    WEIGHT_DECAY,
    WIDTHS,
    MergeSetting,
    Schedule,
    Similarities,
    build_net,
    evaluate,
    measure_similarities,
    train,
)

PAPER = MergeSetting(alpha=0.8, prob=0.3, threshold=0.3)
FORWARD_ONLY = MergeSetting(ALPHA, PROB, THRESHOLD, lasting=False)
NEXT_STEPS = (
    ("the same with images of your own, in MedMNIST format", "python -m inmerge_fast --data FILE.npz"),
    ("would merging act on a network of yours?", "python -m inmerge_fast inspect CHECKPOINT"),
    ("arm d, forward-only merging, in a training loop", "InMerge(model, lasting=False, seed=0).attach(optimizer)"),
    (
        "merging that lasts, with a threshold that it chooses itself",
        "InMerge(model, threshold=RankBudget(), stop=steps_of_the_run, seed=0).attach(optimizer)",
    ),
)
# SGD's learning rate: the backbone ends where the arms start.
HIGH, MIDDLE, LOW = 0.05, 0.005, 0.0005


@dataclass(frozen=True)
class Options:
    """Options of the demo; None stands for a default that depends on the data and on ``quick``."""

    data: str | None = None
    epochs: int | None = None
    backbone_epochs: int | None = None
    threshold: float | None = None
    alpha: float = PAPER.alpha
    prob: float = PAPER.prob
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 32
    quick: bool = False
    save: str | None = None
    resume: str | None = None

    def epoch_counts(self) -> tuple[int, int]:
        """Backbone epochs, and epochs of each arm.

        With as many images as ``load_data`` allows, the arms take at least 100 steps, after which ``merge_`` warns if
        it has had no effect; of volumes ``quick`` takes too few for that.
        """
        if self.data is None:
            backbone, arm = (4, 5) if self.quick else (20, 12)
        else:
            backbone, arm = (3, 4) if self.quick else (8, 5)
        return self.backbone_epochs or backbone, self.epochs or arm


def load_data(options: Options) -> ImageSet:
    """Load and check the images or volumes.

    Raises:
        ValueError: the file given is not one that the demo can use.
        SystemExit: a package of the extra ``demo`` is missing.
    """
    require("tqdm", "tqdm")  # before the minutes of work that would be lost
    if options.save is not None and not Path(options.save).absolute().parent.is_dir():
        raise ValueError(f"--save: there is no folder {Path(options.save).absolute().parent}")
    if options.data is None:
        return load_digits()
    limits = (900, 500) if options.quick else (2000, 2000)
    return load_npz(options.data, max_train=limits[0], max_test=limits[1], seed=options.seed)


def run(options: Options, data: ImageSet) -> None:
    """Train the backbone and the four arms, and print what happened."""
    device = torch.device(options.device)
    data = dataclasses.replace(
        data, **{key: getattr(data, key).to(device) for key in ("train_x", "train_y", "test_x", "test_y")}
    )
    backbone_epochs, arm_epochs = options.epoch_counts()
    before = Schedule(0, backbone_epochs, HIGH, MIDDLE, options.batch_size, options.seed)
    after = Schedule(backbone_epochs, arm_epochs, MIDDLE, LOW, options.batch_size, options.seed)

    backbone = build_net(data.train_x.shape[1], data.classes, options.seed, data.dims).to(device)
    _print_setup(options, data, backbone, before, after)
    if options.resume is not None:
        _resume(backbone, options.resume, data)
    else:
        history = train(backbone, data, before, None, "backbone")
        print(
            f"\nBackbone, trained without merging; epochs: {backbone_epochs}, training loss {history.loss[-1]:.4f}, "
            f"test {data.measure} {100 * history.accuracy[-1]:.2f} %"
        )
        if history.diverged:
            raise SystemExit(
                "The backbone's training has diverged: there is nothing to go on from, try another --seed."
            )
    threshold = _choose_threshold(options, measure_similarities(backbone, options.seed))
    own = MergeSetting(options.alpha, options.prob, threshold)
    arms = [
        Arm("a", "no merging", None),
        Arm("b", "paper's setting", PAPER),
        Arm("c", "read-off threshold" if options.threshold is None else "--threshold", own),
        Arm("d", "forward-only merging", FORWARD_ONLY),
    ]
    print()
    print_paragraph(
        "Four arms, which is what trainings that are compared are called, go on from this backbone, each with the same "
        f"data in the same order; epochs: {arm_epochs}"
    )
    for arm in arms:
        print(f"  {arm.key}  {arm.title}{'' if arm.setting is None else _what_it_does(arm.setting)}")
    print(flush=True)
    corruptions = corruptions_of(data)
    outcomes = []
    for arm in arms:
        net = copy.deepcopy(backbone)
        history = train(net, data, after, arm.setting, f"arm {arm.key}")
        corrupted = {name: evaluate(net, images) for name, images in corruptions.items()}
        outcomes.append(Outcome(arm, net, history, measure_similarities(net, options.seed), corrupted))
    report(outcomes, data, NEXT_STEPS)
    if options.save is not None:
        torch.save(outcomes[2].net.state_dict(), options.save)
        print(
            f"\nThe network of arm c is in {options.save}; to look at it: python -m inmerge_fast inspect {options.save}"
        )


def _what_it_does(setting: MergeSetting) -> str:
    if setting.lasting:
        return f": merge_ at every step, for good, with {setting}"
    return f": merged() around the passes of every step, undone then, with {setting}"


def _resume(net: nn.Module, path: str, data: ImageSet) -> None:
    """Load a backbone instead of training one.

    Raises:
        SystemExit: the file cannot be read, or does not fit the net, its head included.
    """
    try:
        text = load_into(net, path).text
    except ValueError as error:
        raise SystemExit(f"--resume: {error}") from error
    right = evaluate(net, data)
    if (right < 0).any():
        raise SystemExit(f"--resume: {path}: the outputs of this network are not finite: its training has diverged")
    print(f"\nBackbone: {text}; test {data.measure} {100 * right.float().mean().item() / data.labels_each:.2f} %")


def _print_setup(options: Options, data: ImageSet, net: nn.Module, before: Schedule, after: Schedule) -> None:
    device, kind = options.device, torch.device(options.device).type
    if kind == "cuda":
        device += f" ({torch.cuda.get_device_name(device)})"
    elif kind == "cpu":
        device += f" ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"
    parameters, kernel = sum(p.numel() for p in net.parameters()), "x".join("3" * data.dims)
    print(
        "In-model merging while a small CNN trains: before every training step, filters of a convolution that are\n"
        "similar to a randomly chosen partner move towards it, for good (arXiv 2502.20516) or for that step only.\n"
    )
    rows = [
        ("data", f"{data.name}: {data.details}"),
        ("net", f"VGG-like, {kernel} convolutions {'-'.join(map(str, WIDTHS))}, batch norm, {parameters:,} parameters"),
        (
            "training",
            f"SGD, momentum {MOMENTUM:g}, weight decay {WEIGHT_DECAY:g}, batch {options.batch_size}, "
            f"{before.batches(len(data.train_x))} steps per epoch; learning rate {before.high:g} to {before.low:g} "
            f"in the backbone, {after.high:g} to {after.low:g} in the arms",
        ),
        ("device", device),
        ("versions", f"inmerge_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("seed", str(options.seed)),
    ]
    for name, text in rows:
        print(textwrap.fill(text, TEXT_WIDTH, initial_indent=f"{name:9} ", subsequent_indent=" " * 10))
    print(f"\nMergePlan of the net:\n{textwrap.indent(str(MergePlan(net)), '  ')}\n", flush=True)


def _choose_threshold(options: Options, similarities: Similarities) -> float:
    """Print the similarities of the backbone; returns the threshold of arm c.

    Half of the draws that look at every filter once hold a pair above the median of their largest similarities. Pairs
    above it come at a rate of about log 2 per draw, hence with probability p at p log 2 per step: some in every epoch.
    """
    print(
        f"\nSimilarities in the backbone: the largest one found by each of {DRY_RUNS} dry runs of merge_, which write\n"
        "nothing, and in which every filter looks at one partner:\n"
    )
    print("               lowest   median  highest")
    tops = [max(run) for run in zip(*similarities.largest.values(), strict=True)]
    for name, values in [*similarities.largest.items(), ("all layers", tops)]:
        print(f"  {name:10}  {min(values):7.4f}  {median(values):7.4f}  {max(values):7.4f}")
    print()
    if options.threshold is not None:
        print(f"Threshold of arm c: {options.threshold:.4g}, as given by --threshold.")
        return options.threshold
    # merge_ takes thresholds up to 1, and rounding can put a similarity above it.
    chosen = min(median(tops), 1.0)
    print_paragraph(
        f"Threshold of arm c: {chosen:.4g}, the median over all layers. It is read off this backbone and is a rule of "
        "this demo, not of the paper: half of the runs hold a pair above it, so that merging acts now and then and "
        "leaves most filters alone."
    )
    return chosen
