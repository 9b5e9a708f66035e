"""The protocol: a backbone, then arms from that state with the same data in the same order for the same epochs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from inmerge_fast import MergePlan, NoEffectWarning, __version__
from inmerge_fast.demo.train import MOMENTUM, Schedule, epoch_steps

from . import medmnist_c
from .bench import Bench
from .config import OWN, Recipe, Run
from .dataset import SPLITS
from .feed import Feed, parts_of
from .measure import autocast, batch_norms, logits_of, measure, recompute_statistics
from .merging import Merger, treatment
from .metrics import filter_state
from .models import Model, build

RESEED = 1_000_003  # added to the seed of the data order
State = dict[str, torch.Tensor]


def schedules(recipe: Recipe, seed: int, reseed: bool = False) -> tuple[Schedule, Schedule]:
    """Schedules of the backbone and of an arm; a reseeded arm sees the data in another order."""
    before = Schedule(0, recipe.backbone_epochs, recipe.high, recipe.middle, recipe.batch_size, seed)
    order = seed + RESEED if reseed else seed
    return before, Schedule(
        recipe.backbone_epochs, recipe.arm_epochs, recipe.middle, recipe.low, recipe.batch_size, order
    )


def train_backbone(recipe: Recipe, bench: Bench, seed: int) -> State:
    """Weights after the epochs that all arms share."""
    model = build(recipe.model, bench.data, seed, bench.weights)
    _place(model, bench)
    if recipe.backbone_epochs:
        _train(model, recipe, bench, schedules(recipe, seed)[0], None)
    return {key: value.detach().cpu().clone() for key, value in model.net.state_dict().items()}


def backbone_identity(recipe: Recipe, bench: Bench, seed: int) -> dict[str, Any]:
    """Everything that the backbone's weights depend on."""
    values = dataclasses.asdict(recipe)
    for unused in ("name", "arm_epochs", "low", "severities", "corruptions", "attack"):
        del values[unused]
    return values | {"seed": seed, "source": bench.data.source} | environment(bench.device)


def run_arm(
    run: Run, bench: Bench, backbone: State, log: Callable[[str, float, int], None] | None = None
) -> tuple[dict[str, Any], dict[str, npt.NDArray]]:
    """Train and measure one arm.

    Args:
        run: what to do.
        bench: the data.
        backbone: state from :func:`train_backbone` with the same recipe and seed.
        log: called with a name, a value and a step, for example ``SummaryWriter.add_scalar``.

    Returns:
        The result, ready for JSON, and the scores of every evaluation by name with the labels. ``metrics`` are of the
        network as trained, ``recomputed`` of the same with batch-norm statistics recomputed for its final weights
        (None for a network without batch norm), and the scores are of that one.
    """
    recipe, merging = run.recipe, run.arm.merging
    start = time.perf_counter()
    model = build(recipe.model, bench.data, run.seed, bench.weights)
    model.net.load_state_dict(backbone)
    _place(model, bench)
    schedule = schedules(recipe, run.seed, run.arm.reseed)[1]
    linear = (merging is not None and merging.include_linear) or recipe.model in ("vit_small", "mamba_small")
    plan = MergePlan(model.net, skip_first=0.6 if merging is None else merging.skip_first, include_linear=linear)
    before = filter_state(plan)
    per_step = recipe.micro_batches if merging is not None and merging.each_forward else 1
    first, steps = (
        epochs * schedule.batches(len(bench.data.train)) * per_step
        for epochs in (schedule.first_epoch, schedule.epochs)
    )
    merger = treatment(model.net, run.arm, run.seed, first, steps)
    losses: list[float] = []
    if not run.arm.stop:
        losses = _train(model, recipe, bench, schedule, merger, log)
    after = filter_state(plan)
    trained = digest_of(model.net.state_dict())
    metrics, scores = measure(model, recipe, bench, run.split)
    recomputed = None
    if recompute_statistics(model, recipe, bench):
        recomputed, scores = measure(model, recipe, bench, run.split)
    result = {
        "recipe": dataclasses.asdict(recipe),
        "arm": {"label": run.arm.label(), **dataclasses.asdict(run.arm)},
        "seed": run.seed,
        "split": run.split,
        "data": {
            "name": bench.data.name,
            "images": [len(bench.data.split(name)) for name in SPLITS],
            "source": bench.data.source,
            "task": bench.data.task,
        },
        "digests": {
            "backbone": digest_of(backbone),
            "weights": trained,
            "parameters": digest_of(dict(model.net.named_parameters())),
        },
        "metrics": metrics,
        "recomputed": recomputed,
        "batch_norms": len(batch_norms(model.net)),
        "loss": losses,
        "filters": {
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "rank_before": before.mean_rank,
            "rank": after.mean_rank,
            "similarity": after.mean_similarity,
            "collapsed": after.collapsed(before),
        },
        "merging": None if merger is None else merger.summary(),
        "corruptions": OWN if recipe.corruptions == OWN else medmnist_c.version(),
        "environment": environment(bench.device) | {"seconds": round(time.perf_counter() - start, 2)},
    } | ({"plan": run.plan} if run.plan else {})
    return result, scores


def _place(model: Model, bench: Bench) -> None:
    # channels_last: an epoch of PneumoniaMNIST takes vgg8 3.6 s of one core, and 4.5 s without.
    layout = torch.channels_last if bench.data.dims == 2 else torch.contiguous_format
    model.net.to(bench.device, memory_format=layout)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "inmerge_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def digest_of(state: State) -> str:
    """Sixteen hex digits that differ if any bit of a state does."""
    total = hashlib.sha256()
    for key, value in sorted(state.items()):
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _train(
    model: Model,
    recipe: Recipe,
    bench: Bench,
    schedule: Schedule,
    merger: Merger | None,
    log: Callable[[str, float, int], None] | None = None,
) -> list[float]:
    """Train in place; the mean loss of each epoch."""
    net, train = model.net, bench.data.train
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if recipe.batch_size % (ranks * recipe.micro_batches):
        raise ValueError(
            f"batch_size {recipe.batch_size} must be a multiple of {ranks} ranks x {recipe.micro_batches} parts"
        )
    whole = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    optimizer = _optimizer(recipe, net)
    if merger is not None:
        merger.attach(optimizer)
    feed, labels = Feed(train.images, bench.device, bench.room), train.labels.to(bench.device)

    def loss_at(indices: torch.Tensor, step: int) -> torch.Tensor:
        mine = indices[rank::ranks]  # on the host, and copied without waiting for the step before
        unit = feed(mine).float() / 255
        if recipe.flip:
            # Decided by image, not by place: ranks and parts of a batch do not change who is flipped.
            coins = np.random.default_rng([schedule.seed, step, 1]).random(len(train)) < 0.5
            chosen = torch.from_numpy(coins[mine.numpy()]).to(bench.device, non_blocking=True)
            unit = torch.where(chosen.view(-1, *[1] * (unit.ndim - 1)), unit.flip(-1), unit)
        with autocast(recipe, bench.device):
            logits = whole(bench.prepare(model, unit))
        return bench.loss(logits, labels[mine.to(bench.device, non_blocking=True)])

    losses: list[float] = []
    with warnings.catch_warnings(), contextlib.closing(feed):
        warnings.simplefilter("ignore", NoEffectWarning)  # every result counts its merges
        for epoch in range(schedule.epochs):
            net.train()
            feed.begin(list(parts_of(schedule, epoch, len(train), recipe.micro_batches, rank, ranks)))
            torch.manual_seed(schedule.seed * 1000 + schedule.first_epoch + epoch)  # dropout
            total = [
                step.loss
                for step in epoch_steps(
                    schedule, epoch, len(train), optimizer, loss_at, merger, device=torch.device("cpu"),
                    micro_batches=recipe.micro_batches,
                    merge_each_forward=merger is not None and merger.each_forward,
                )
            ]  # fmt: skip
            losses.append(float(torch.stack(total).mean()))
            if merger is not None and merger.in_validation:
                _validate_merging(model, recipe, bench, merger)
            if log is not None:
                log("loss", losses[-1], epoch)
                if merger is not None:
                    log("merges", merger.merged, epoch)
    if merger is not None:
        merger.detach()
    if not math.isfinite(losses[-1]):
        warnings.warn(f"the loss of {recipe.name} is {losses[-1]} in the last epoch", stacklevel=2)
    return losses


def _optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), lr=recipe.high, momentum=MOMENTUM, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), lr=recipe.high, weight_decay=recipe.weight_decay)
    raise ValueError(f"optimizer must be sgd or adam, got {recipe.optimizer!r}")


def _validate_merging(model: Model, recipe: Recipe, bench: Bench, merger: Merger) -> None:
    """The published code's validation: it merges before every forward pass there too."""
    for images in bench.data.val.images.split(recipe.batch_size):
        model.net.train()  # InMerge does nothing in evaluation mode, and rightly so
        merger.validate()
        logits_of(model, recipe, bench, images)
