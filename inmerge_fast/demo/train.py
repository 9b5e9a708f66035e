"""The demo's net and its training loop, with merging before, or during, the passes of every training step."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from .. import CollapseWarning, MergeStats, NoEffectWarning, merge_, merged
from .data import ImageSet, require

WIDTHS = (16, 16, 32, 32, 64, 64, 128, 128)
POOLED = (2, 4, 6)  # convolutions that a pooling follows
# Convolution, normalisation, pooling and average of the net, by the dimensions of its images.
MODULES: dict[int, tuple[Any, Any, Any, Any]] = {
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
}
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
EVAL_BATCH = 100  # of volumes, 500 take twice as long: the activations do not fit in the caches
DRY_RUNS = 32
NOTICES = (NoEffectWarning, CollapseWarning)  # what merge_ says of the settings; the report repeats it


@dataclass(frozen=True)
class MergeSetting:
    """Arguments of ``merge_`` that an arm uses at every step; of ``merged`` if merging does not last."""

    alpha: float
    prob: float
    threshold: float
    lasting: bool = True

    def __str__(self) -> str:
        return f"alpha={self.alpha:g}, prob={self.prob:g}, threshold={self.threshold:.4g}"


@dataclass
class LayerCount:
    """One layer's sampled pairs and merged filters over a whole training, and the largest similarity sampled."""

    filters: int
    sampled: int = 0
    merged: int = 0
    max_similarity: float = -math.inf


@dataclass
class History:
    """What a training did.

    Attributes:
        loss: mean training loss of each epoch.
        accuracy: share of test images judged right after each epoch; in a multi-label set, share of their labels. NaN
            if an output of the net was not finite.
        merged: filters merged in each epoch.
        layers: counts by layer, empty without merging.
        merge_ms: median time that merging takes at a step, NaN without merging.
        rest_ms: time that each training step takes beside that.
        calls: merging steps made.
        notices: what ``merge_`` warned of: no effect, or a layer that collapses.
        right: int64 ``(test images,)``, how many labels of each image were judged right at the end.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)
    layers: dict[str, LayerCount] = field(default_factory=dict)
    merge_ms: float = math.nan
    rest_ms: list[float] = field(default_factory=list)
    calls: int = 0
    notices: list[Warning] = field(default_factory=list)
    right: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's loss or an output after it was not finite."""
        return not (math.isfinite(self.loss[-1]) and math.isfinite(self.accuracy[-1]))

    def count(self, stats: MergeStats) -> None:
        """Add one call of ``merge_`` to the last epoch."""
        self.calls += 1
        self.merged[-1] += stats.merged
        for layer in stats.layers:
            total = self.layers.setdefault(layer.name, LayerCount(layer.filters))
            total.sampled += layer.sampled
            total.merged += layer.merged
            if layer.max_similarity > total.max_similarity:  # false for the NaN of a layer without samples
                total.max_similarity = layer.max_similarity


@dataclass(frozen=True)
class Similarities:
    """Similarities in a net, from dry runs in which every filter looks at one partner.

    Attributes:
        mean: mean of all pairs.
        largest: the largest of each run, by layer.
    """

    mean: float
    largest: dict[str, list[float]]


def measure_similarities(net: nn.Module, seed: int) -> Similarities:
    """Sample the similarities in ``net``, without changing it."""
    means: list[float] = []
    largest: dict[str, list[float]] = {}
    for step in range(DRY_RUNS):
        stats = merge_(net, prob=1.0, dry_run=True, seed=seed, step=step)
        means.append(stats.mean_similarity)
        for layer in stats.layers:
            largest.setdefault(layer.name, []).append(layer.max_similarity)
    return Similarities(fmean(means), largest)


@dataclass(frozen=True)
class Schedule:
    """Epochs ``first_epoch`` to ``first_epoch + epochs`` of a run; the learning rate falls from high to low (cosine).

    Data order and draws depend on the seed and the epoch alone, so trainings with the same schedule share them.
    """

    first_epoch: int
    epochs: int
    high: float
    low: float
    batch_size: int
    seed: int

    def rate(self, progress: float) -> float:
        """Learning rate at a share of the way."""
        return self.low + (self.high - self.low) * 0.5 * (1 + math.cos(math.pi * progress))

    def batches(self, images: int) -> int:
        """Steps per epoch. A last batch that is not full is left out; the order is a new one in every epoch."""
        return max(1, images // self.batch_size)

    def order(self, epoch: int, images: int) -> torch.Tensor:
        """Indices of the images in one of its epochs, int64 ``(images,)`` on the host."""
        return torch.from_numpy(np.random.default_rng([self.seed, self.first_epoch + epoch]).permutation(images))


def build_net(channels: int, classes: int, seed: int, dims: int = 2) -> nn.Sequential:
    """A VGG-like net of eight 3x3 or, with three dimensions, 3x3x3 convolutions with batch norm."""
    torch.manual_seed(seed)
    Conv, Norm, Pool, Average = MODULES[dims]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, width in enumerate(WIDTHS, start=1):
        conv = Conv(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        layers[f"conv{index}"], layers[f"bn{index}"], layers[f"relu{index}"] = conv, Norm(width), nn.ReLU()
        if index in POOLED:
            layers[f"pool{index}"] = Pool(2)
        channels = width
    layers["average"], layers["flatten"] = Average(1), nn.Flatten()
    layers["head"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


def train(net: nn.Module, data: ImageSet, schedule: Schedule, setting: MergeSetting | None, label: str) -> History:
    """Train ``net`` in place, merging at every step if there is a setting, and test it after every epoch.

    Before each test batch norm's statistics are computed anew, in every arm.
    """
    history = History()
    with warnings.catch_warnings(record=True) as caught:
        for category in NOTICES:
            warnings.simplefilter("always", category)
        _run_epochs(net, data, schedule, setting, label, history)
    for warning in caught:
        if isinstance(warning.message, NOTICES):
            history.notices.append(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return history


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        loss: mean loss of its images, a scalar on the device.
        merged: what each call of ``merge`` in it returned, or ``lend``.
        merge_seconds: time of the first of them; of ``lend`` to merge and to restore.
        seconds: time of the whole step.
    """

    loss: torch.Tensor
    merged: list[MergeStats]
    merge_seconds: float
    seconds: float


def epoch_steps(
    schedule: Schedule,
    epoch: int,
    images: int,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[torch.Tensor, int], torch.Tensor],
    merge: Callable[[int], MergeStats | None] | None,
    *,
    device: torch.device,
    micro_batches: int = 1,
    merge_each_forward: bool = False,
    lend: Callable[[int], AbstractContextManager[MergeStats]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Step]:
    """Train through one epoch of a schedule, merging before the forward pass.

    Args:
        schedule: order of the images, learning rates and number of steps.
        epoch: which of the schedule's epochs, from 0.
        images: number of training images.
        optimizer: its learning rate is set before every step.
        loss_at: computes the mean loss of the images at some indices ``(n,)`` int64; the second argument is the step.
        merge: called with a counter that grows from call to call; None trains without merging.
        device: device of the indices.
        micro_batches: parts of a batch whose gradients are accumulated before the step.
        merge_each_forward: merge before the forward pass of every part, not once per step.
        lend: gives a block of merged weights for the passes of the step of that number.
        clock: gives the time in seconds.

    Yields:
        Each step, after it was made.
    """
    number, batches, size = schedule.first_epoch + epoch, schedule.batches(images), schedule.batch_size
    shuffled = schedule.order(epoch, images).to(device)
    for batch in range(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate((epoch * batches + batch) / (schedule.epochs * batches))
        step, start = number * batches + batch, clock()
        counted: list[MergeStats] = []
        merge_seconds, losses = math.nan, []
        chosen = shuffled[batch * size : (batch + 1) * size]
        optimizer.zero_grad()
        with ExitStack() as lease:
            if lend is not None:
                counted.append(lease.enter_context(lend(step)))
                merge_seconds = clock() - start
            for part, indices in enumerate(chosen.tensor_split(micro_batches)):
                if merge is not None and (part == 0 or merge_each_forward):
                    stats = merge(step * micro_batches + part if merge_each_forward else step)
                    counted += [stats] if stats is not None else []
                    merge_seconds = clock() - start if part == 0 else merge_seconds
                loss = loss_at(indices, step) * (len(indices) / len(chosen))
                loss.backward()
                losses.append(loss.detach())
            passed = clock()
        if lend is not None:
            merge_seconds += clock() - passed
        optimizer.step()
        yield Step(sum(losses[1:], losses[0]), counted, merge_seconds, clock() - start)


def _run_epochs(
    net: nn.Module, data: ImageSet, schedule: Schedule, setting: MergeSetting | None, label: str, history: History
) -> None:
    device = data.train_x.device
    loss_of: Callable[..., torch.Tensor] = nn.functional.cross_entropy
    if data.multi_label:
        loss_of = nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.SGD(net.parameters(), lr=schedule.high, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def loss_at(indices: torch.Tensor, _: int) -> torch.Tensor:
        return loss_of(net(data.train_x[indices]), data.train_y[indices])

    numbers = {name: getattr(setting, name) for name in ("alpha", "prob", "threshold")} if setting is not None else {}

    def merge(step: int) -> MergeStats:
        return merge_(net, **numbers, seed=schedule.seed, step=step)

    def lend(step: int) -> AbstractContextManager[MergeStats]:
        return merged(net, **numbers, seed=schedule.seed, step=step)

    lasting, lent = setting is not None and setting.lasting, setting is not None and not setting.lasting
    merge_times = []
    images = len(data.train_x)
    # A log file gets a line every 10 seconds instead of ten a second.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    total = schedule.epochs * schedule.batches(images)
    with require("tqdm", "tqdm").tqdm(total=total, desc=label, unit=" steps", mininterval=interval) as bar:
        for epoch in range(schedule.epochs):
            history.merged.append(0)
            losses = []
            net.train()
            for step in epoch_steps(
                schedule, epoch, images, optimizer, loss_at, merge if lasting else None,
                device=device, lend=lend if lent else None, clock=lambda: _now(device),
            ):  # fmt: skip
                history.rest_ms.append(1000 * (step.seconds - (step.merge_seconds if setting is not None else 0.0)))
                losses.append(step.loss.item())
                for stats in step.merged:
                    merge_times.append(step.merge_seconds)
                    history.count(stats)
                bar.update()
            # Those of all images, by the weights as they are: forward-only merging leaves those of the merged net.
            update_bn(data.train_x.split(EVAL_BATCH), net)
            history.right = evaluate(net, data)
            history.loss.append(sum(losses) / len(losses))
            judged = bool((history.right >= 0).all())
            history.accuracy.append(history.right.float().mean().item() / data.labels_each if judged else math.nan)
            bar.set_postfix_str(f"loss {history.loss[-1]:.4f}, test {100 * history.accuracy[-1]:.2f} %", refresh=False)
    if merge_times:  # the median: the first call of an arm finds the layers and, on a GPU, compiles
        history.merge_ms = 1000 * median(merge_times)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def evaluate(net: nn.Module, data: ImageSet) -> torch.Tensor:
    """How many labels of each test image the net judges right, int64 ``(test images,)`` on the CPU.

    An image for which an output is not finite has -1: the largest of NaN, or its sign, is no judgement. In a
    multi-label set the net predicts a label if its probability is above 0.5, that is, if its logit is above 0.
    """
    net.eval()
    right = []
    for x, y in zip(data.test_x.split(EVAL_BATCH), data.test_y.split(EVAL_BATCH), strict=True):
        output = net(x)
        counts = ((output > 0) == (y > 0)).sum(1) if data.multi_label else (output.argmax(1) == y).long()
        right.append(torch.where(output.isfinite().flatten(1).all(1), counts, -1))
    return torch.cat(right).cpu()
