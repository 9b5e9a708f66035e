"""Every way of forward-only merging that is timed: merge, and put back what was there, without a threshold.

``eager`` and ``eager sampled`` are what a PyTorch user would write, ``compile`` is torch.compile of those two, and
``merged`` is this package. Each is a call in two parts, since a forward and a backward pass lie between them. The
others measure no similarity, which nothing here asks for; ``merged`` does, for its statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

import inmerge_fast
from benchmarks import compiled
from benchmarks.providers import (
    Call,
    Draws,
    Provider,
    partner_of,
    rows_of,
    sample,
    uniform_of,
    uniforms_of,
)
from benchmarks.timing import InParts
from benchmarks.work import SEED, Settings

Kept = list[tuple[torch.Tensor, ...]]  # of each layer, for its restore


def _merge_dense_(rows: torch.Tensor, uniform: torch.Tensor, alpha: float, prob: float) -> torch.Tensor:
    """Blend every filter, keep what was sampled; returns the rows as they were."""
    old = rows.clone()
    own, other = rows.float(), rows[partner_of(uniform[1], torch.arange(len(rows), device=rows.device), len(rows))]
    rows.copy_(torch.where((uniform[0] < prob)[:, None], alpha * own + (1 - alpha) * other.float(), own))
    return old


def _merge_sampled_(rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor, alpha: float) -> torch.Tensor:
    """Blend the sampled filters only; returns those as they were."""
    old = rows.index_select(0, index)
    blend = old.float().lerp(rows.index_select(0, partner).float(), 1 - alpha)
    rows.index_copy_(0, index, blend.to(rows.dtype))
    return old


def _prepare_eager(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    rows, kept = rows_of(plan), []
    uniforms = uniforms_of(rows, draws)

    def merge(_: int) -> None:
        kept[:] = [_merge_dense_(row, uniforms(layer), settings.alpha, settings.prob) for layer, row in enumerate(rows)]

    def restore(_: int) -> None:
        for row, old in zip(rows, kept, strict=True):
            row.copy_(old)

    return InParts(merge, restore)


def _prepare_sampled(
    plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None, merge_layer_=_merge_sampled_
) -> Call:
    rows: list[torch.Tensor] = rows_of(plan)
    kept: Kept = []
    uniforms = uniforms_of(rows, draws)

    def merge(_: int) -> None:
        kept.clear()
        for layer, row in enumerate(rows):
            index, partner = sample(uniforms(layer), settings.prob)
            kept.append((index, merge_layer_(row, index, partner, settings.alpha)))

    def restore(_: int) -> None:
        for row, (index, old) in zip(rows, kept, strict=True):
            row.index_copy_(0, index, old)

    return InParts(merge, restore)


def _prepare_merged(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    arguments = {"threshold": settings.threshold, "prob": settings.prob, "alpha": settings.alpha, "seed": SEED}
    blocks: list[inmerge_fast.merged] = []

    def merge(step: int) -> None:
        blocks.append(inmerge_fast.merged(plan, step=0 if draws is not None else step, **arguments))
        blocks[0].__enter__()

    def restore(_: int) -> None:
        blocks.pop().__exit__(None, None, None)

    return InParts(merge, restore)


EAGER = Provider("eager", _prepare_eager)
SAMPLED = Provider("eager sampled", _prepare_sampled)
MERGED = Provider("merged", _prepare_merged, queues=True, exact=True)


def forms_for(plan: inmerge_fast.MergePlan) -> list[Provider]:
    """All forms of torch.compile that may be the fastest for these layers.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    compiled.start_afresh(plan.device)
    sampled = [_compiled_sampled()]
    return sampled if len(plan.layers) > compiled.DENSE_LAYERS else [*sampled, _compiled_dense()]


def _merge_model_(
    rows: Sequence[torch.Tensor], uniforms: torch.Tensor, alpha: float, prob: float
) -> list[torch.Tensor]:
    of_layers = uniforms.split([len(row) for row in rows], dim=1)
    return [_merge_dense_(row, uniform, alpha, prob) for row, uniform in zip(rows, of_layers, strict=True)]


def _put_back_(rows: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> None:
    for row, was in zip(rows, old, strict=True):
        row.copy_(was)


def _compiled_dense() -> Provider:
    """The whole model as one graph, and its restore as another."""
    merge_model_ = torch.compile(_merge_model_, dynamic=False, fullgraph=True)
    put_back_ = torch.compile(_put_back_, dynamic=False, fullgraph=True)

    def prepare(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
        rows, kept = rows_of(plan), []
        uniforms = torch.empty(2, sum(map(len, rows)), device=plan.device)
        recorded = None if draws is None else torch.cat([uniform_of(*draw) for draw in draws], 1).to(plan.device)

        def merge(_: int) -> None:
            if recorded is None:
                uniforms.uniform_()
            else:
                uniforms.copy_(recorded)
            kept[:] = merge_model_(rows, uniforms, settings.alpha, settings.prob)

        return InParts(merge, lambda _: put_back_(rows, kept))

    return Provider("compile", prepare, form="dense, default", queues=True)


def _compiled_sampled() -> Provider:
    merge_ = torch.compile(_merge_sampled_, fullgraph=True)

    def merge_layer_(rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor, alpha: float) -> torch.Tensor:
        for tensor in (index, partner):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return merge_(rows, index, partner, alpha)

    return Provider("compile", functools.partial(_prepare_sampled, merge_layer_=merge_layer_), form="sampled, default")
