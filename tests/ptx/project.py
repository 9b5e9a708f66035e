"""All that this folder takes from the project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import inmerge_fast.kernels.merge
from inmerge_fast import MergePlan, reference_merge
from inmerge_fast.paths.triton.handle import Handle
from inmerge_fast.paths.triton.launch import Launcher

__all__ = ["KERNELS", "RESULTS", "Handle", "Launcher", "launcher_of", "reference_merge"]

KERNELS = str(Path(inmerge_fast.kernels.merge.__file__).parent)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def launcher_of(targets: Sequence[torch.Tensor | nn.Module]) -> tuple[Launcher, list[torch.Tensor]]:
    """A launcher, and the weights that it merges."""
    plan = MergePlan(list(targets))
    weights = [target if isinstance(target, torch.Tensor) else target.weight.detach() for target in targets]
    return Launcher(plan.layers, plan.weights(), plan.rows.start), weights
