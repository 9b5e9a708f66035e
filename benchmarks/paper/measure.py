"""What a trained arm is measured on, as trained and with batch-norm statistics recomputed for its final weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from . import robustness
from .bench import Bench
from .config import OWN, Recipe
from .dataset import Split
from .metrics import accuracy, auc, calibration_error, class_aucs
from .models import Model

EVAL_BATCH = 128
KINDS = ("acc", "auc", "ece")


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The precision that a recipe computes in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bf16)


def batch_norms(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers whose statistics :func:`recompute_statistics` computes."""
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


def recompute_statistics(model: Model, recipe: Recipe, bench: Bench) -> bool:
    """Compute the batch-norm statistics anew for the weights as they are, by one pass over the training images.

    Whatever changes weights or activations in training leaves statistics of the changed network behind, and running
    variances that are too small imitate robustness: scaled by 0.85 they raise corrupted accuracy without any merging.

    Returns:
        Whether the network has batch norm; without it nothing was done.
    """
    if not batch_norms(model.net):
        return False
    images = bench.data.train.images
    # Mixed, because the variance of a batch is that within it: in a file sorted by class it would be too small.
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    with autocast(recipe, bench.device):
        update_bn(
            (bench.prepare(model, images[part].to(bench.device).float() / 255) for part in order.split(EVAL_BATCH)),
            model.net,
        )
    return True


@torch.no_grad()
def logits_of(model: Model, recipe: Recipe, bench: Bench, images: torch.Tensor) -> torch.Tensor:
    """Logits ``(N, classes)`` of uint8 images in evaluation mode."""
    model.net.eval()
    out = []
    for chunk in images.split(EVAL_BATCH):
        with autocast(recipe, bench.device):
            out.append(model.net(bench.prepare(model, chunk.to(bench.device).float() / 255)).float())
    return torch.cat(out)


def measure(model: Model, recipe: Recipe, bench: Bench, split: str) -> tuple[dict[str, Any], dict[str, npt.NDArray]]:
    """Metrics of a network as it is, and the scores behind them; all NaN where scores are not finite: it diverged."""
    part = bench.data.split(split)
    labels = part.labels.numpy()
    scores: dict[str, npt.NDArray] = {"labels": labels}

    def measured(name: str, images: torch.Tensor) -> dict[str, float]:
        found = bench.probabilities(logits_of(model, recipe, bench, images)).cpu().numpy()
        scores[name] = found
        values = accuracy(labels, found), auc(labels, found), calibration_error(labels, found)
        return dict(zip(KINDS, values, strict=True))

    metrics: dict[str, Any] = {"clean": measured("clean", part.images)}
    metrics["class_auc"] = dict(zip(bench.data.labels, class_aucs(labels, scores["clean"]), strict=True))
    corrupted = {
        name: {
            str(level): measured(f"{name}-{level}", bench.copies(split, recipe.corruptions, name, level))
            for level in recipe.severities
        }
        for name in bench.corruptions(recipe.corruptions)
    }
    noise = {
        f"{sigma:g}": measured(f"noise-{sigma:g}", bench.copies(split, OWN, "noise", sigma))
        for sigma in robustness.NOISE_SIGMAS
    }
    flat = [values for by_level in corrupted.values() for values in by_level.values()]
    metrics |= {
        "corrupted": {key: float(np.mean([values[key] for values in flat])) for key in KINDS},
        "by_corruption": corrupted,
        "noise": {key: float(np.mean([values[key] for values in noise.values()])) for key in KINDS},
        "by_noise": noise,
        "attacked": _attacked(model, bench, part) if recipe.attack else dict.fromkeys(robustness.ATTACKS),
    }
    return metrics, scores


def _attacked(model: Model, bench: Bench, part: Split) -> dict[str, float]:
    """Accuracy on attacked images, in float32: gradients of bfloat16 would make the attack weaker."""
    count = min(len(part), robustness.ATTACKED)
    right: dict[str, list[npt.NDArray]] = {}
    model.net.eval()
    for images, labels in zip(
        part.images[:count].split(EVAL_BATCH), part.labels[:count].split(EVAL_BATCH), strict=True
    ):
        unit, truth = images.to(bench.device).float() / 255, labels.to(bench.device)

        def loss_of(x: torch.Tensor, truth: torch.Tensor = truth) -> torch.Tensor:
            return bench.loss(model.net(bench.prepare(model, x)), truth)

        for name, (epsilon, steps) in robustness.ATTACKS.items():
            changed = robustness.attack(loss_of, unit, epsilon, steps)
            with torch.no_grad():
                scores = bench.probabilities(model.net(bench.prepare(model, changed)))
            right.setdefault(name, []).append(scores.cpu().numpy())
    truth = part.labels[:count].numpy()
    return {name: accuracy(truth, np.concatenate(chunks)) for name, chunks in right.items()}
