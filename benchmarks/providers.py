"""Every way of merging that is timed, one definition each.

``published`` is the paper's published code, written afresh from its description. ``eager`` and ``eager sampled`` are
what a PyTorch user would write; ``benchmarks/compiled.py`` has torch.compile of those two. ``merge_`` is this package.
``benchmarks/check.py`` holds each of them against the reference.

All take filters that are not grouped and lie row by row, as in all benchmarked networks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

import inmerge_fast
from benchmarks.work import DTYPES, SEED, Settings

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
        exact: whether its result equals the reference to the bit; rounding may differ elsewhere.
        threads: how many it may use on a CPU, where that is not up to the run.
    """

    name: str
    prepare: Callable[[inmerge_fast.MergePlan, Settings, Draws | None], Call]
    form: str = ""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    queues: bool = False
    exact: bool = False
    threads: int | None = None


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


def partner_of(uniform: torch.Tensor, index: torch.Tensor, filters: int) -> torch.Tensor:
    """The filter that each of ``index`` looks at: another one."""
    place = (uniform * (filters - 1)).long()
    return place + (place >= index)


def uniform_of(coin: npt.NDArray[np.bool_], partner: npt.NDArray[np.int64]) -> torch.Tensor:
    """Numbers that give this draw, ``(2, filters)``."""
    place = partner - (partner > np.arange(partner.size))
    return torch.from_numpy(np.stack([np.where(coin, 0.0, 1.0), (place + 0.5) / (partner.size - 1)])).float()


def uniforms_of(rows: Sequence[torch.Tensor], draws: Draws | None) -> Callable[[int], torch.Tensor]:
    """The uniform numbers of each layer: fresh ones, or those that give the recorded draws."""
    if draws is None:
        return lambda layer: torch.rand(2, len(rows[layer]), device=rows[layer].device)
    recorded = [uniform_of(*draw).to(row.device) for draw, row in zip(draws, rows, strict=True)]
    return recorded.__getitem__


def merge_dense_(
    rows: torch.Tensor, uniform: torch.Tensor, alpha: float, prob: float, threshold: float | torch.Tensor
) -> None:
    """Measure and blend every filter, then keep what was sampled and passed."""
    own = rows.float()  # measured in bfloat16, 2 % of the decisions near the threshold would be wrong
    other = own[partner_of(uniform[1], torch.arange(len(rows), device=rows.device), len(rows))]
    passed = (uniform[0] < prob) & (F.cosine_similarity(own, other, dim=1) > threshold)
    rows.copy_(torch.where(passed[:, None], alpha * own + (1 - alpha) * other, own))


def sample(uniform: torch.Tensor, prob: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the sampled filters and of their partners; on a GPU the host waits for their number."""
    index = (uniform[0] < prob).nonzero()[:, 0]
    return index, partner_of(uniform[1, index], index, uniform.shape[1])


def similarity_of(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each row with that of the other matrix."""
    norms = own.norm(dim=1).clamp(min=MIN_NORM) * other.norm(dim=1).clamp(min=MIN_NORM)
    return (own * other).sum(1) / norms


def write_(
    rows: torch.Tensor, index: torch.Tensor, own: torch.Tensor, other: torch.Tensor, passed: torch.Tensor, alpha: float
) -> None:
    """Write the sampled filters: blended, or as they were where they did not pass."""
    share = torch.where(passed, 1 - alpha, 0.0)
    rows.index_copy_(0, index, own.lerp_(other, share[:, None]).to(rows.dtype))


def merge_sampled_(
    rows: torch.Tensor, index: torch.Tensor, partner: torch.Tensor, alpha: float, threshold: float | torch.Tensor
) -> None:
    """Gather, measure and write the sampled filters only."""
    own, other = rows.index_select(0, index).float(), rows.index_select(0, partner).float()
    passed = similarity_of(own, other) > threshold
    if not torch.compiler.is_compiling() and none_pass(passed):
        return
    write_(rows, index, own, other, passed, alpha)


def none_pass(passed: torch.Tensor) -> bool:
    """Whether nothing passed, the usual case, is known at once: a GPU takes longer to say so than to write."""
    return passed.device.type == "cpu" and not passed.any()


def _prepare_eager(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    rows = rows_of(plan)
    uniforms = uniforms_of(rows, draws)

    def call(_: int) -> None:
        for layer, row in enumerate(rows):
            merge_dense_(row, uniforms(layer), settings.alpha, settings.prob, settings.threshold)

    return call


def prepare_sampled(
    plan: inmerge_fast.MergePlan,
    settings: Settings,
    draws: Draws | None,
    merge_layer_: Callable[..., None] = merge_sampled_,
) -> Call:
    """The sampled form, layer by layer, each merged by ``merge_layer_``."""
    rows = rows_of(plan)
    uniforms = uniforms_of(rows, draws)

    def call(_: int) -> None:
        for layer, row in enumerate(rows):
            merge_layer_(row, *sample(uniforms(layer), settings.prob), settings.alpha, settings.threshold)

    return call


# --- this package


def _prepare_merge(plan: inmerge_fast.MergePlan, settings: Settings, draws: Draws | None) -> Call:
    arguments = {"threshold": settings.threshold, "prob": settings.prob, "alpha": settings.alpha, "seed": SEED}
    if draws is not None:  # they are merge_'s own of step 0
        return lambda _: inmerge_fast.merge_(plan, step=0, **arguments)
    return lambda step: inmerge_fast.merge_(plan, step=step, **arguments)


# In bfloat16 the published loop decides up to 2 % of pairs near the threshold wrongly, so it is timed in float32 only.
PUBLISHED = Provider("published", _prepare_published, dtypes=("float32",))
EAGER = Provider("eager", _prepare_eager)
SAMPLED = Provider("eager sampled", prepare_sampled)
MERGE = Provider("merge_", _prepare_merge, queues=True, exact=True)
