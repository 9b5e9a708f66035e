"""Every way of finding the nearest partner that is timed, one definition each, and the check that all find it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

import inmerge_fast
from benchmarks.ceilings import tf32
from benchmarks.compiled import start_afresh
from benchmarks.providers import MIN_NORM, rows_of
from benchmarks.work import SEED
from inmerge_fast.paths.match import match_layer
from inmerge_fast.paths.pairs import filters_of

# Two similarities this close are the same to a search: float32 sums in any order, and one TF32 product.
CLOSE = 1e-5
Search = Callable[[], list[torch.Tensor]]  # the nearest other filter of every filter, by layer


def _nearest(rows: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(rows.float(), dim=1, eps=MIN_NORM)
    return torch.mm(unit, unit.T).fill_diagonal_(-2.0).argmax(1)


def eager(plan: inmerge_fast.MergePlan) -> Search:
    """Matrix product and argmax, layer by layer."""
    rows = rows_of(plan)
    return lambda: [_nearest(row) for row in rows]


def compiled(plan: inmerge_fast.MergePlan) -> Search:
    """torch.compile of :func:`eager`'s layer.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    start_afresh(plan.device)
    rows, nearest = rows_of(plan), torch.compile(_nearest, fullgraph=True)
    return lambda: [nearest(row) for row in rows]


def gemm(plan: inmerge_fast.MergePlan) -> Callable[[], object]:
    """The matrix products of all layers alone."""
    rows = [row.float() if row.device.type == "cpu" else row for row in rows_of(plan)]

    def call() -> None:
        with tf32(True):
            for row in rows:
                torch.mm(row, row.T)

    return call


def match(plan: inmerge_fast.MergePlan, prob: float) -> Callable[[int], object]:
    """Draw and search of this package, without the merge; takes the step."""
    if plan.path == "triton":
        launcher = plan.paths.triton.launcher(plan.weights())
        return lambda step: launcher.find_partners(SEED, step, prob=prob, partner="nearest", threshold=0.0)

    def call(step: int) -> list[torch.Tensor]:
        coin, _ = plan.draw(SEED, step, prob)
        found = []
        for layer, weight, first, end in zip(
            plan.layers, plan.weights(), plan.rows.start, plan.rows.start[1:], strict=False
        ):
            sampled = coin[first:end].nonzero()[0]
            partners = match_layer(
                weight, layer.layout, sampled, "nearest", threshold=0.0, seed=SEED, step=step, layer=layer.layer_id
            )
            found.append(torch.from_numpy(partners))
        return found

    return call


def check(plan: inmerge_fast.MergePlan, name: str, search: Search) -> None:
    """Raise unless a search finds filters as similar as the nearest one in float64.

    Raises:
        AssertionError: it does not.
    """
    for layer, weight, found in zip(plan.layers, plan.weights(), search(), strict=True):
        (units,) = filters_of(weight, layer.layout, exact=True).units()
        similarity = (units @ units.T).fill_diagonal_(-2.0)
        own = similarity.gather(1, found[:, None].to(similarity.device).long())[:, 0]
        off = (similarity.amax(1) - own).max().item()
        assert off <= CLOSE, f"{name}, layer {layer.name}: off by {off:.1e}"


def found_by_match(plan: inmerge_fast.MergePlan) -> Search:
    """What :func:`match` finds for every filter."""
    call = match(plan, 1.0)

    def search() -> list[torch.Tensor]:
        found = call(0)
        if isinstance(found, list):
            return found
        rows = plan.paths.triton.launcher(plan.weights()).found_partners()
        return [rows[a:b] - a for a, b in zip(plan.rows.start[:-1].tolist(), plan.rows.start[1:].tolist(), strict=True)]

    return search
