"""torch.compile of what a PyTorch user would write: its forms, and which of them is the fastest here."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

import inmerge_fast
from benchmarks.providers import (
    Call,
    Draws,
    Provider,
    merge_dense_,
    merge_sampled_,
    none_pass,
    prepare_sampled,
    rows_of,
    similarity_of,
    uniform_of,
    write_,
)
from benchmarks.timing import wall_seconds
from benchmarks.work import Settings

DENSE_LAYERS = 12  # compiling all layers of a deeper network as one graph takes minutes, and is not the fastest form
FORM_TRIALS = 5
RECOMPILE_LIMIT = 64  # one graph per shape of layer until the sizes are dynamic; 8, the default, is not enough


def why_not(device: torch.device) -> str:
    """Why torch.compile cannot work here; empty if it can."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on the CPU"
    return ""


def start_afresh(device: torch.device) -> None:
    """Forget what was compiled for another model: it is of no use, and counts towards a limit.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    if reason := why_not(device):
        raise RuntimeError(reason)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT


def forms_for(plan: inmerge_fast.MergePlan) -> list[Provider]:
    """All forms and modes that may be the fastest for these layers, the likeliest first.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    start_afresh(plan.device)
    sampled = [_compiled_sampled(whole=True), _compiled_sampled(whole=False)]
    if len(plan.layers) > DENSE_LAYERS:
        return sampled
    dense = [_compiled_dense("default")]
    return [_compiled_dense("reduce-overhead"), *dense, *sampled] if plan.device.type == "cuda" else sampled + dense


def fastest(forms: Sequence[Provider], plan: inmerge_fast.MergePlan, settings: Settings) -> Provider:
    """The form with the least median of a few trials, of which the first may compile."""

    def trial(form: Provider) -> float:
        call = form.prepare(plan, settings, None)
        return statistics.median(
            wall_seconds(functools.partial(call, step), plan.device) for step in range(FORM_TRIALS)
        )

    return min(forms, key=trial)


def _dense_model_(
    rows: list[torch.Tensor], uniforms: torch.Tensor, alpha: float, prob: float, threshold: torch.Tensor
) -> None:
    for row, uniform in zip(rows, uniforms.split([len(row) for row in rows], dim=1), strict=True):
        merge_dense_(row, uniform, alpha, prob, threshold)


def _compiled_dense(mode: str) -> Provider:
    """The whole model as one graph.

    It reads its weights, random numbers and threshold where they lie, so that it is compiled once for a plan and CUDA
    graphs need not copy them. The call that was prepared last sets the threshold of all.
    """
    merge_model_ = torch.compile(_dense_model_, mode=mode, dynamic=False, fullgraph=True)

    @functools.lru_cache(maxsize=1)
    def inputs_of(plan: inmerge_fast.MergePlan) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        rows = rows_of(plan)
        uniforms = torch.empty(2, sum(map(len, rows)), device=plan.device)
        threshold = torch.empty((), device=plan.device)
        for tensor in (*rows, uniforms, threshold):
            torch._dynamo.mark_static_address(tensor)
        return rows, uniforms, threshold

    def prepare(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
        rows, uniforms, threshold = inputs_of(plan)
        threshold.fill_(settings.threshold)
        recorded = None if draws is None else torch.cat([uniform_of(*draw) for draw in draws], 1).to(plan.device)

        def call(_: int) -> None:
            if recorded is None:
                uniforms.uniform_()
            else:
                uniforms.copy_(recorded)
            merge_model_(rows, uniforms, settings.alpha, settings.prob, threshold)

        return call

    return Provider("compile", prepare, form=f"dense, {mode}", queues=True)


def _compiled_sampled(*, whole: bool) -> Provider:
    """The sampled form, layer by layer: all of it, or only the similarities, so that the write can be left out.

    CUDA graphs are of no use: they would be recorded anew for every number of sampled filters.
    """
    compiled = torch.compile(merge_sampled_ if whole else _similarity_of_pairs, fullgraph=True)

    def merge_layer_(
        rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor, alpha: float, threshold: torch.Tensor
    ) -> None:
        for tensor in (index, partner):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if whole:
            compiled(rows, index, partner, alpha, threshold)
            return
        passed = compiled(rows, index, partner) > threshold
        if not none_pass(passed):
            write_(rows, index, rows[index].float(), rows[partner].float(), passed, alpha)

    def prepare(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
        # As a tensor, the threshold needs no graph of its own.
        settings = replace(settings, threshold=torch.tensor(settings.threshold, device=plan.device))
        return prepare_sampled(plan, settings, draws, merge_layer_)

    return Provider("compile", prepare, form="sampled, default" if whole else "sampled, similarities only")


def _similarity_of_pairs(rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    return similarity_of(rows[index].float(), rows[partner].float())
