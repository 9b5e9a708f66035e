"""Every way of merging that is timed, one definition each, and the check that all of them do the same.

``published`` is the paper's published code, written afresh from its description. ``eager`` and ``eager sampled`` are
what a PyTorch user would write. ``compile`` is torch.compile of those two. ``merge_`` is this package.

All take filters that are not grouped and lie row by row, as in all benchmarked networks.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

import inmerge_fast
from benchmarks.work import REGIMES, SEED, Settings

Draws = Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]]  # coin and partner of every filter, by layer
Call = Callable[[int], object]  # one merge of the whole plan; takes the step
MIN_NORM = 1e-8  # as in F.cosine_similarity


@dataclass(frozen=True)
class Provider:
    """A way of merging.

    Attributes:
        name: how result files call it.
        prepare: ``prepare(plan, settings, draws)`` gives the call to time, which draws for itself; with recorded
            ``draws`` it uses those instead, at every step.
        form: which of several forms this is.
        dtypes: names of the dtypes that it merges correctly.
        queues: whether a call queues a few launches and never waits, so that its device time can be told from the
            host's.
        exact: whether its result equals the reference to the bit; rounding may differ elsewhere, see :func:`check`.
    """

    name: str
    prepare: Callable[[inmerge_fast.MergePlan, Settings, Draws | None], Call]
    form: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    queues: bool = False
    exact: bool = False


def rows_of(plan: inmerge_fast.MergePlan) -> list[torch.Tensor]:
    """The weights as matrices of one filter per row; writes reach the weights.

    Raises:
        ValueError: the plan has filters that only ``merge_`` knows how to reach.
    """
    for layer in plan.layers:
        if not layer.layout.is_dense or layer.layout.group_size != layer.layout.filters:
            raise ValueError(f"{layer.name}: grouped and transposed layers are merge_'s alone and cannot be compared")
    return [layer.layout.rows(w.detach()) for layer, w in zip(plan.layers, plan.weights(), strict=True)]


# --- the published loop


def _published_partner(i: int, filters: int, prob: float) -> int | None:
    if random.random() >= prob:
        return None
    return random.choice([k for k in range(filters) if k != i])


def _prepare_published(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    """The loop over pairs: a list of candidates per draw, ``.item()`` per pair, a copy of every weight."""
    weights, alpha, prob, threshold = plan.weights(), settings.alpha, settings.prob, settings.threshold
    tables = [[int(j) if c else None for c, j in zip(*draw, strict=True)] for draw in draws] if draws else None

    @torch.no_grad()
    def call(_: int) -> None:
        for layer, weight in enumerate(weights):
            merged = weight.clone()
            filters = weight.shape[0]
            for i in range(filters):
                j = tables[layer][i] if tables else _published_partner(i, filters, prob)
                if j is None:
                    continue
                if F.cosine_similarity(weight[i].reshape(-1), weight[j].reshape(-1), dim=0).item() > threshold:
                    merged[i] = alpha * weight[i] + (1 - alpha) * weight[j]
            weight.data.copy_(merged)

    return call


# --- vectorised PyTorch
#
# A layer's draw comes from two uniform numbers per filter, so that recorded draws take the same way as fresh ones.


def _partner(uniform: torch.Tensor, index: torch.Tensor, filters: int) -> torch.Tensor:
    place = (uniform * (filters - 1)).long()
    return place + (place >= index)


def _uniform(coin: npt.NDArray[np.bool_], partner: npt.NDArray[np.int64]) -> torch.Tensor:
    """Numbers that give this draw, ``(2, filters)``."""
    place = partner - (partner > np.arange(partner.size))
    return torch.from_numpy(np.stack([np.where(coin, 0.0, 1.0), (place + 0.5) / (partner.size - 1)])).float()


def _uniforms(rows: Sequence[torch.Tensor], draws: Draws | None) -> Callable[[int], torch.Tensor]:
    """The uniform numbers of each layer: fresh ones, or those that give the recorded draws."""
    if draws is None:
        return lambda layer: torch.rand(2, len(rows[layer]), device=rows[layer].device)
    recorded = [_uniform(*draw).to(row.device) for draw, row in zip(draws, rows, strict=True)]
    return recorded.__getitem__


def _dense_(
    rows: torch.Tensor, uniform: torch.Tensor, alpha: float, prob: float, threshold: float | torch.Tensor
) -> None:
    """Measure and blend every filter, then keep what was sampled and passed."""
    own = rows.float()  # measured in bfloat16, 2 % of the decisions near the threshold would be wrong
    other = own[_partner(uniform[1], torch.arange(len(rows), device=rows.device), len(rows))]
    passed = (uniform[0] < prob) & (F.cosine_similarity(own, other, dim=1) > threshold)
    rows.copy_(torch.where(passed[:, None], alpha * own + (1 - alpha) * other, own))


def _sample(uniform: torch.Tensor, prob: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the sampled filters and of their partners; on a GPU the host waits for their number."""
    index = (uniform[0] < prob).nonzero()[:, 0]
    return index, _partner(uniform[1, index], index, uniform.shape[1])


def _similarity(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    norms = own.norm(dim=1).clamp(min=MIN_NORM) * other.norm(dim=1).clamp(min=MIN_NORM)
    return (own * other).sum(1) / norms


def _write_(
    rows: torch.Tensor, index: torch.Tensor, own: torch.Tensor, other: torch.Tensor, passed: torch.Tensor, alpha: float
) -> None:
    """Write the sampled filters: blended, or as they were where they did not pass."""
    share = torch.where(passed, 1 - alpha, 0.0)
    rows.index_copy_(0, index, own.lerp_(other, share[:, None]).to(rows.dtype))


def _sampled_(
    rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor, alpha: float, threshold: float | torch.Tensor
) -> None:
    """Gather, measure and write the sampled filters only."""
    own, other = rows.index_select(0, index).float(), rows.index_select(0, partner).float()
    passed = _similarity(own, other) > threshold
    if not torch.compiler.is_compiling() and _none(passed):
        return
    _write_(rows, index, own, other, passed, alpha)


def _none(passed: torch.Tensor) -> bool:
    """Whether nothing passed, the usual case, is known at once: a GPU takes longer to say so than to write."""
    return passed.device.type == "cpu" and not passed.any()


def _prepare_eager(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    rows = rows_of(plan)
    uniforms = _uniforms(rows, draws)

    def call(_: int) -> None:
        for layer, row in enumerate(rows):
            _dense_(row, uniforms(layer), settings.alpha, settings.prob, settings.threshold)

    return call


def _prepare_sampled(
    plan: inmerge_fast.MergePlan,
    settings: Settings,
    draws: Draws | None,
    merge_layer_: Callable[..., None] = _sampled_,
) -> Call:
    rows = rows_of(plan)
    uniforms = _uniforms(rows, draws)

    def call(_: int) -> None:
        for layer, row in enumerate(rows):
            merge_layer_(row, *_sample(uniforms(layer), settings.prob), settings.alpha, settings.threshold)

    return call


# --- torch.compile


def _dense_model_(
    rows: list[torch.Tensor], uniforms: torch.Tensor, alpha: float, prob: float, threshold: torch.Tensor
) -> None:
    for row, uniform in zip(rows, uniforms.split([len(row) for row in rows], dim=1), strict=True):
        _dense_(row, uniform, alpha, prob, threshold)


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
        recorded = None if draws is None else torch.cat([_uniform(*draw) for draw in draws], 1).to(plan.device)

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
    compiled = torch.compile(_sampled_ if whole else _similarity_of_pairs, fullgraph=True)

    def merge_layer_(
        rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor, alpha: float, threshold: torch.Tensor
    ) -> None:
        for tensor in (index, partner):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if whole:
            compiled(rows, index, partner, alpha, threshold)
            return
        passed = compiled(rows, index, partner) > threshold
        if not _none(passed):
            _write_(rows, index, rows[index].float(), rows[partner].float(), passed, alpha)

    def prepare(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
        # As a tensor, the threshold needs no graph of its own.
        settings = replace(settings, threshold=torch.tensor(settings.threshold, device=plan.device))
        return _prepare_sampled(plan, settings, draws, merge_layer_)

    return Provider("compile", prepare, form="sampled, default" if whole else "sampled, similarities only")


def _similarity_of_pairs(rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    return _similarity(rows[index].float(), rows[partner].float())


def compiled_forms(device: torch.device) -> list[Provider]:
    """All forms and modes of torch.compile that may be the fastest on this device, the likeliest first.

    Build them anew for each model, after ``torch._dynamo.reset()``: what was compiled for another model is of no use.
    """
    dense = [_compiled_dense("default")]
    sampled = [_compiled_sampled(whole=True), _compiled_sampled(whole=False)]
    return [_compiled_dense("reduce-overhead"), *dense, *sampled] if device.type == "cuda" else sampled + dense


def why_not_compile(device: torch.device) -> str:
    """Why torch.compile cannot work here; empty if it can."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on the CPU"
    return ""


# --- this package


def _prepare_merge(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    arguments = {"threshold": settings.threshold, "prob": settings.prob, "alpha": settings.alpha, "seed": SEED}
    if draws is not None:  # they are merge_'s own of step 0
        return lambda _: inmerge_fast.merge_(plan, step=0, **arguments)
    return lambda step: inmerge_fast.merge_(plan, step=step, **arguments)


# In bfloat16 the published loop decides up to 2 % of pairs near the threshold wrongly, so it is timed in float32 only.
PUBLISHED = Provider("published", _prepare_published, dtypes=("float32",))
EAGER = Provider("eager", _prepare_eager)
SAMPLED = Provider("eager sampled", _prepare_sampled)
MERGE = Provider("merge_", _prepare_merge, queues=True, exact=True)


# --- the check


@torch.no_grad()
def check(providers: Sequence[Provider], plan: inmerge_fast.MergePlan, prob: float = 0.3) -> None:
    """Raise unless every provider does with recorded draws what :func:`inmerge_fast.reference_merge` does.

    Where all pass, where none does, and at a threshold in the widest gap between the similarities in the middle: far
    enough from each (1e-6, 7 times the largest error of a float32 cosine) that rounding cannot change a decision.
    Unmerged filters must keep their bits. Merged ones may differ from the reference by the rounding of a blend computed
    in another order (2 units of float32 at the filters' largest element), and by one unit of the weight's dtype where
    that tips its rounding; those of an ``exact`` provider may not. The weights are left as they were.

    Raises:
        AssertionError: a provider differs.
    """
    weights = plan.weights()
    old = [weight.detach().clone() for weight in weights]
    on_host = [weight.cpu() for weight in old]
    draws = [
        inmerge_fast.draw(SEED, 0, layer.layer_id, layer.layout.filters, prob)
        for layer in plan.layers
    ]  # fmt: skip
    references = [
        inmerge_fast.reference_merge(weight, *draw, threshold=REGIMES["all pass"])
        for weight, draw in zip(on_host, draws, strict=True)
    ]
    similarities = torch.cat([reference.similarity for reference in references])
    for threshold in (*REGIMES.values(), threshold_in_gap(similarities[~similarities.isnan()].numpy())):
        settings = Settings(threshold, prob)
        references = [
            inmerge_fast.reference_merge(weight, *draw, alpha=settings.alpha, threshold=threshold)
            for weight, draw in zip(on_host, draws, strict=True)
        ]
        for provider in providers:
            provider.prepare(plan, settings, draws)(0)
            what = f"{provider.name} {provider.form}".strip()
            for layer, weight, before, draw, reference in zip(
                plan.layers, weights, on_host, draws, references, strict=True
            ):
                _compare(
                    f"{what}, layer {layer.name}, threshold {threshold:g}",
                    weight.detach().cpu(), before, draw[1], reference, exact=provider.exact,
                )  # fmt: skip
            for weight, before in zip(weights, old, strict=True):
                weight.copy_(before)


def threshold_in_gap(similarities: npt.NDArray[np.floating]) -> float:
    """The middle of the widest gap between the similarities in the middle half.

    Raises:
        ValueError: there is no gap that rounding could not bridge.
    """
    ordered = np.sort(similarities.astype(np.float64))
    middle = ordered[len(ordered) // 4 : -(len(ordered) // 4) or None]
    gaps = np.diff(middle)
    if gaps.size == 0 or gaps.max() <= 2e-6:
        raise ValueError(f"no threshold tells the {len(ordered)} similarities of this draw apart")
    return float(middle[gaps.argmax()] + gaps.max() / 2)


def _compare(
    what: str,
    new: torch.Tensor,
    old: torch.Tensor,
    partner: npt.NDArray[np.int64],
    reference: inmerge_fast.ReferenceResult,
    *,
    exact: bool,
) -> None:
    """Raise if ``new`` is not the reference's result of ``old``."""
    expected, merged = reference.weight, reference.merged
    if exact or not merged.any():
        same = torch.equal(new, expected)
        assert same, f"{what}: {int((new != expected).flatten(1).any(1).sum())} filters differ from the reference"
        return
    assert torch.equal(new[~merged], old[~merged]), f"{what}: changed a filter that must not change"
    largest = old.flatten(1).float().abs().amax(1)
    scale = torch.maximum(largest, largest[torch.from_numpy(partner)])[merged][:, None]
    wanted = expected[merged].flatten(1).float()
    unit = torch.finfo(torch.float32).eps
    allowed = 2 * unit * scale + torch.finfo(new.dtype).eps * wanted.abs()
    wrong = ((new[merged].flatten(1).float() - wanted).abs() > allowed).any(1)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {len(wrong)} merged filters are wrong"
