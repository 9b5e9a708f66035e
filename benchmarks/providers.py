"""What ``merge_`` is timed against: the paper's published way of merging, written afresh from its description."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import torch
from torch.nn import functional as F

import inmerge_fast


@torch.no_grad()
def published(weights: Sequence[torch.Tensor], *, alpha: float, prob: float, threshold: float) -> None:
    """The loop over pairs: a list of candidates per draw, ``.item()`` per pair, a copy of every weight."""
    for weight in weights:
        merged = weight.clone()
        filters = weight.shape[0]
        for i in range(filters):
            if random.random() >= prob:
                continue
            j = random.choice([k for k in range(filters) if k != i])
            if F.cosine_similarity(weight[i].reshape(-1), weight[j].reshape(-1), dim=0).item() > threshold:
                merged[i] = alpha * weight[i] + (1 - alpha) * weight[j]
        weight.data.copy_(merged)


def eager(plan: inmerge_fast.MergePlan, **arguments: float) -> None:
    """``merge_`` without its kernels."""
    os.environ["INMERGE_FORCE_EAGER"] = "1"
    try:
        inmerge_fast.merge_(plan, **arguments)
    finally:
        del os.environ["INMERGE_FORCE_EAGER"]
