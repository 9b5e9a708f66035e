"""``merge_``: in-model merging of a target's filters, in place."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .draw import MAX_LAYER, MAX_SEED, MAX_STEP, check_flag, check_share, check_word, coin_threshold
from .dynamo import outside_dynamo
from .merge_plan import MergePlan
from .paths.match import PartnerRule, check_partner_rule
from .paths.path import Call
from .plan.filters import check_outside_transforms, mark_written
from .plan.plan import DEFAULT_SKIP_FIRST, Target, check_selection
from .stats import MergeStats
from .thresholds import NoiseThreshold, QuantileThreshold, Threshold, by_layer, check_for_one_call, quantile_threshold


@outside_dynamo
def merge_(
    target: Target | MergePlan,
    *,
    alpha: float = 0.8,
    prob: float = 0.3,
    threshold: Threshold = 0.3,
    partner: PartnerRule = "random",
    skip_first: float | str | Sequence[str] = DEFAULT_SKIP_FIRST,
    exclude: str | Sequence[str] = (),
    include_linear: bool = False,
    include_frozen: bool = False,
    include_heads: bool = False,
    seed: int | None = None,
    step: int | None = None,
    layer: int = 0,
    generator: torch.Generator | None = None,
    dry_run: bool = False,
) -> MergeStats:
    r"""Merge similar filters of ``target`` in place: one step of in-model merging (arXiv 2502.20516, eq. (1)-(4)).

    Each filter :math:`K_i` looks, with probability ``prob``, at one other filter :math:`K_j` of its layer: a random
    one, unless ``partner`` says otherwise. If their cosine similarity is above ``threshold``,
    :math:`K_i \leftarrow \alpha K_i + (1 - \alpha) K_j`. Partners are read as they were before the call. Biases,
    normalisation layers and optimizer state are not touched.

    Call it between training steps, never between a forward pass and its backward pass: backward then raises wherever
    autograd saved the weight, but activation checkpointing recomputes with the merged weight and cannot notice.

    Args:
        target: a convolution (``Conv1d``-``Conv3d``, ``ConvTranspose1d``-``3d``), a ``Linear`` (its rows), a weight
            tensor of shape ``(N, ...)`` (its filters along dim 0), an iterable of those, a whole model (its
            convolutions in module order, a shared weight once), or a :class:`MergePlan`. Weights are float32,
            bfloat16, float16 (computed in float32) or float64, contiguous or channels_last, on one device.
        alpha: share of itself that a merged filter keeps, in [0, 1].
        prob: probability that a filter looks at a partner, in [0, 1].
        threshold: cosine similarity that a pair must exceed, in [-1, 1]; at exactly -1 every sampled pair of finite
            filters merges. Filters with NaN or Inf never merge and are never read. Or one for each layer: a dict by
            name (:meth:`inmerge_fast.Similarity.threshold_for_rate`), :class:`inmerge_fast.NoiseThreshold` or
            :class:`inmerge_fast.QuantileThreshold`. The paper's 0.3 merges nothing in most networks and collapses
            others: both are noticed, with a warning.
        partner: which other filter of its group a filter looks at: ``"random"``, any, as published; ``"similar"``, a
            random one among those above ``threshold``; ``"nearest"``, the most similar one (the lowest index on ties).
            The last two compare all pairs first. Similarities closer than 5e-6 to each other or to the threshold
            may be told apart differently on different devices.
        skip_first: how many of a model's first candidate layers (depthwise ones included) to leave out: an int that
            many, a float in [0, 1) that share of them, but never all, and not counting frozen ones. 0.6 is 10 of
            VGG19's 16, as in the paper; 10 reproduces the paper elsewhere. Or name patterns of the layers to leave out,
            and no others.
        exclude: name pattern or patterns (``fnmatch``, e.g. ``"*.downsample.0"``) of a model's layers to leave out.
        include_linear: whether a model's ``Linear`` layers take part too.
        include_frozen: whether a model's layers whose weights require no gradient take part too. Teachers, perceptual
            losses and the like are left alone by default; layers and tensors that are given themselves are meant.
        include_heads: whether a model's heads take part too: convolutions whose outputs no layer reads, one filter for
            each class or anchor. They are told by the widths of the layers, and in doubt a layer is none.
        seed: seed of the draw, ``0 <= seed < 2**64``; given together with ``step``. The same pair gives the same
            decisions on every device, dtype and rank. Without it a seed is drawn from ``generator``.
        step: counter of the draw, ``0 <= step < 2**63``: the optimizer steps of the whole run. One that starts anew
            with every epoch repeats its draws in each, of which a warning tells.
        layer: for a single layer with ``seed`` and ``step``: its id in the draw, ``0 <= layer < 2**31``. Layers merged
            one by one need different ids, or same-shaped ones share their draw::

                for index, conv in enumerate(convs):
                    inmerge_fast.merge_(conv, seed=0, step=step, layer=index)

        generator: CPU generator for the seed; the default one, which ``torch.manual_seed`` governs, if None.
        dry_run: draw, measure and count, but write nothing.

    Returns:
        What was sampled, measured and merged, read from the device only when looked at.

    Raises:
        TypeError: an argument or a weight has the wrong type.
        ValueError: an argument is out of range, no layer can be merged (all are frozen, ...), or a weight cannot be
            rewritten in place (parametrised, sharded, not dense, ...). Nothing has been written to any layer then.

    Example::

        for epoch in range(epochs):
            for x, y in loader:
                inmerge_fast.merge_(model, threshold=0.1, seed=0, step=step)
                loss(model(x), y).backward()
                optimizer.step()
                step += 1
    """
    check_outside_transforms()
    check_arguments(
        alpha, prob, threshold, partner, layer, (seed, step, generator),
        include_linear=include_linear, include_frozen=include_frozen, include_heads=include_heads, dry_run=dry_run,
    )  # fmt: skip
    plan, weights = plan_for(target, skip_first, exclude, include_linear, include_frozen, include_heads, layer)
    if seed is None or step is None:
        seed, step = drawn_seed(generator), 0
    elif not dry_run:
        plan.history.notice_draw(seed, step)
    thresholds = thresholds_of(threshold, plan, weights, partner)
    call = Call(int(seed), int(step), float(prob), float(alpha), thresholds, partner, dry_run)
    stats = merge_plan_(plan, weights, call)
    if plan.effect.calls >= plan.history.next_look and not dry_run:
        plan.history.look(plan.layers, weights, call, plan.effect.calls, plan.totals)
    return stats


def merge_plan_(plan: MergePlan, weights: list[torch.Tensor], call: Call) -> MergeStats:
    """Merge a plan's ``weights`` (:meth:`MergePlan.current_weights`) on the path that the plan takes now."""
    path = plan.paths.choose()
    outcome = path.merge(weights, call)
    if not call.dry_run:
        if coin_threshold(call.prob) > 0:
            outcome.count_in(plan.effect)
        mark_written(weights)
    return plan.stats(outcome, call, path.name)


def several_ranks(group: Any = None) -> bool:
    """Whether this process is one of several in ``group``."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(group) > 1
    )


def thresholds_of(
    threshold: Threshold, plan: MergePlan, weights: Sequence[torch.Tensor], partner: PartnerRule
) -> float | list[float]:
    """One for all layers, or one for each."""
    if isinstance(threshold, Mapping):
        return by_layer(threshold, plan)
    if isinstance(threshold, NoiseThreshold):
        return [threshold.of(layer.layout.elements) for layer in plan.layers]
    if not isinstance(threshold, QuantileThreshold):
        return float(threshold)  # type: ignore[arg-type]  # a budget was refused
    if several_ranks():
        raise ValueError(
            "threshold=QuantileThreshold() measures the weights, and with more than one torch.distributed rank all "
            "must agree about what was measured: use InMerge, which sees to it, or give all ranks the dict that one "
            f"of them gets from similarity(model).threshold_for_rate({threshold.rate})"
        )
    rate = threshold.rate
    return [
        quantile_threshold(layer.name, weight, layer, rate, partner)
        for layer, weight in zip(plan.layers, weights, strict=True)
    ]


def check_arguments(
    alpha: object, prob: object, threshold: object, partner: object, layer: object,
    randomness: tuple[object, object, object], **flags: object,
) -> None:  # fmt: skip
    """Check the arguments of one merge, lasting or not.

    Args:
        alpha: see :func:`merge_`, as are prob, threshold, partner and layer.
        prob: probability that a filter looks at a partner.
        threshold: what the similarity must exceed.
        partner: the partner rule.
        layer: id of a single layer.
        randomness: seed, step and generator.
        **flags: the switches by name.

    Raises:
        TypeError: one of them has the wrong type.
        ValueError: one of them is out of range, or they do not go together.
    """
    check_share("alpha", alpha)
    check_share("prob", prob)
    check_for_one_call(threshold)
    check_partner_rule(partner)
    for name, flag in flags.items():
        check_flag(name, flag)
    check_word("layer", layer, MAX_LAYER)
    _check_randomness(*randomness)


def _check_randomness(seed: object, step: object, generator: object) -> None:
    """Check what the draw comes from: seed and step, or a generator on a single rank.

    Raises:
        TypeError: one of them has the wrong type.
        ValueError: they do not go together, or ranks would draw differently.
    """
    if (seed is None) != (step is None):
        missing = "step" if step is None else "seed"
        raise ValueError(
            f"seed and step belong together, but {missing} is missing: a seed alone would repeat the same draw at "
            "every call; pass the training step, or neither"
        )
    if seed is not None:
        check_word("seed", seed, MAX_SEED)
        check_word("step", step, MAX_STEP)
        if generator is not None:
            raise ValueError("generator draws a seed where none is given; pass either it or seed and step")
        return
    if several_ranks():
        raise ValueError(
            "seed is None with more than one torch.distributed rank: every rank would draw its own and the replicas "
            "would drift apart; pass the same seed and step on every rank"
        )
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
        if generator.device.type != "cpu":
            raise ValueError(f"generator must be a CPU generator (decisions are drawn there), got {generator.device}")


def drawn_seed(generator: torch.Generator | None) -> int:
    """A seed of 64 bits."""
    high, low = torch.randint(0, 2**32, (2,), generator=generator, device="cpu").tolist()
    return (high << 32) | low


# The latest plans, by the identity of their targets and the arguments that chose the layers. An entry goes when one of
# its targets dies. Limited, because targets that differ at every call would fill the memory with plans; but above the
# number of layers that a loop over single layers goes through, or every call would plan anew (ResNet-152 has 155).
_plans: OrderedDict[tuple[Any, ...], tuple[MergePlan, tuple[weakref.ref[Any], ...]]] = OrderedDict()
MAX_CACHED_PLANS = 512


def plan_for(
    target: Target | MergePlan, skip: float | str | Sequence[str], exclude: str | Sequence[str], include_linear: bool,
    include_frozen: bool, include_heads: bool, layer: int, *, unset: float = DEFAULT_SKIP_FIRST, kind: str = "lasting",
) -> tuple[MergePlan, list[torch.Tensor]]:  # fmt: skip
    """The plan of a target, an older one if it still holds, and its weights.

    Args:
        target: the target.
        skip: the argument ``skip_first``.
        exclude: name patterns.
        include_linear: whether ``Linear`` layers take part.
        include_frozen: whether weights that require no gradient take part.
        include_heads: whether heads take part.
        layer: id of a single layer.
        unset: what ``skip`` is where the user has said nothing.
        kind: plans of another kind are others, as they count what was done with them.
    """
    skip_first, patterns = check_selection(skip, exclude)
    if isinstance(target, MergePlan):
        chosen = (skip_first, patterns, include_linear, include_frozen, include_heads, layer)
        if chosen != (unset, (), False, False, False, 0):
            raise ValueError(
                "skip_first, exclude, include_linear, include_frozen, include_heads and layer are set where a "
                "MergePlan is built"
            )
        weights = target.current_weights()
        if weights is None:
            raise ValueError(
                "the plan is out of date: a module or weight of its target was replaced, converted, (un)frozen, "
                "added or removed; build a new MergePlan, or pass the target itself"
            )
        return target, weights
    if isinstance(target, (nn.Module, torch.Tensor)):
        owners: tuple[Any, ...] = (target,)
    elif isinstance(target, Iterable) and not isinstance(target, (str, bytes)):
        target = owners = tuple(target)  # an iterator could be read only once
    else:
        owners = ()
    key = (
        kind,
        type(target),
        tuple(map(id, owners)),
        type(skip_first),
        skip_first,
        patterns,
        include_linear,
        include_frozen,
        include_heads,
        layer,
    )
    entry = _plans.get(key)
    if entry is not None:
        weights = entry[0].current_weights()
        if weights is not None:
            try:  # noqa: SIM105, a context would take 0.3 us
                _plans.move_to_end(key)
            except KeyError:  # another thread has just put it out
                pass
            return entry[0], weights
    plan = MergePlan(
        target, skip_first=skip_first, exclude=patterns, include_linear=include_linear, include_frozen=include_frozen,
        include_heads=include_heads, layer=layer,
    )  # fmt: skip

    def forget(_: object) -> None:
        _plans.pop(key, None)

    _plans[key] = (plan, tuple(weakref.ref(owner, forget) for owner in owners))
    if len(_plans) > MAX_CACHED_PLANS:
        _plans.popitem(last=False)
    return plan, plan.weights()
