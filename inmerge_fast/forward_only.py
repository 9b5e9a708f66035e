"""``merged``: in-model merging for one forward and backward pass, undone before the optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .dynamo import outside_dynamo
from .lease import Lease
from .merge import check_arguments, drawn_seed, plan_for, thresholds_of
from .merge_plan import MergePlan
from .paths.match import PartnerRule
from .paths.path import Call
from .plan.filters import check_outside_transforms
from .plan.plan import Target
from .stats import MergeStats
from .thresholds import Threshold

# Not the paper's setting: half of all filters, half of the way, all layers.
ALPHA, PROB, THRESHOLD, SKIP_FIRST = 0.5, 0.5, -1.0, 0


class merged:  # noqa: N801, it is used like a function
    r"""Merge filters of ``target`` for one forward and backward pass: **forward-only merging**.

    Each filter :math:`K_i` looks, with probability ``prob``, at one other filter :math:`K_j` of its layer, and inside
    the ``with`` block is :math:`\alpha K_i + (1 - \alpha) K_j` instead, as :func:`inmerge_fast.merge_` would make it.
    At the end of the block every filter gets its old bits back, also after an exception. So the gradient is the one at
    the merged weights, and the optimizer applies it to the weights as they were::

        for x, y in loader:
            with inmerge_fast.merged(model, seed=0, step=step):
                loss(model(x), y).backward()  # forward and backward, all micro-batches of the step
            optimizer.step()                  # outside
            optimizer.zero_grad()
            step += 1

    Unlike ``merge_``, nothing of the merge stays in the weights, and filters cannot grow alike by it. The defaults are
    not the paper's: every convolution, half of its filters, any partner.

    Batch-norm statistics are those of the merged network: before evaluating, compute them anew with
    ``torch.optim.swa_utils.update_bn(loader, model)``, for which nothing is merged. A network without batch norm needs
    nothing.

    What sees which weights: inside the block forward, backward, activation checkpointing and whoever reads the
    parameters themselves see merged weights, so average weights (EMA) outside. ``state_dict()`` and ``copy.deepcopy``
    of the model give the weights as they were; pickling the model raises. That goes for the modules of ``target``: one
    outside that shares a weight with it, or owns one that was given as a bare tensor, is not known, so save it outside.
    An optimizer that holds a merged weight is refused its step, and an ``AveragedModel`` its update; a backward pass
    after the block raises, because its forward pass saw other weights. Writes through ``weight.data`` leave no trace
    that PyTorch could be asked for, and are lost for merged filters.

    The context manager is to be used once, and gives :class:`inmerge_fast.MergeStats`.

    Args:
        target: see :func:`inmerge_fast.merge_`, as are partner, exclude, include_linear, seed, step, layer and
            generator.
        alpha: share of itself that a merged filter keeps, in [0, 1].
        prob: probability that a filter looks at a partner, in [0, 1].
        threshold: cosine similarity that a pair must exceed, in [-1, 1]; see there. At -1, the default, all do.
        partner: the partner rule.
        skip_first: how many of a model's first candidate layers to leave out; see there. None by default.
        exclude: name patterns of layers to leave out.
        include_linear: whether ``Linear`` layers take part too.
        include_frozen: whether weights that require no gradient take part too.
        include_heads: whether heads take part too, see :func:`inmerge_fast.merge_`.
        seed: seed of the draw.
        step: the optimizer step: the same filters and partners for the same seed and step.
        layer: id of a single layer in the draw.
        generator: CPU generator for the seed, where none is given.

    Raises:
        TypeError: an argument or a weight has the wrong type.
        ValueError: an argument is out of range, no layer can be merged, or a weight cannot be rewritten in place.
        RuntimeError: on entry, a weight is merged for a forward pass already, or a CUDA graph is being captured; at the
            end, a weight was written to, moved or replaced inside the block: it is named and left as it is.

    Source: the interpolation is arXiv 2502.20516, eq. (1)-(4); that it does not last is ours.
    """

    def __init__(
        self,
        target: Target | MergePlan,
        *,
        alpha: float = ALPHA,
        prob: float = PROB,
        threshold: Threshold = THRESHOLD,
        partner: PartnerRule = "random",
        skip_first: float | str | Sequence[str] = SKIP_FIRST,
        exclude: str | Sequence[str] = (),
        include_linear: bool = False,
        include_frozen: bool = False,
        include_heads: bool = False,
        seed: int | None = None,
        step: int | None = None,
        layer: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._randomness = seed, step, generator
        check_arguments(
            alpha, prob, threshold, partner, layer, self._randomness,
            include_linear=include_linear, include_frozen=include_frozen, include_heads=include_heads,
        )  # fmt: skip
        self._target, self._alpha, self._prob, self._partner = target, float(alpha), float(prob), partner
        self._threshold = threshold
        self._selection = skip_first, exclude, include_linear, include_frozen, include_heads, layer
        self._lease: Lease | None = None

    @outside_dynamo
    def __enter__(self) -> MergeStats:
        if self._lease is not None:
            raise RuntimeError("this merged() was used already; make a new one for each step, with its own step")
        check_outside_transforms()
        plan, weights = plan_for(self._target, *self._selection, unset=SKIP_FIRST, kind="forward-only")
        seed, step, generator = self._randomness
        if seed is None or step is None:
            seed, step = drawn_seed(generator), 0
        thresholds = thresholds_of(self._threshold, plan, weights, self._partner)
        call = Call(int(seed), int(step), self._prob, self._alpha, thresholds, self._partner)
        self._lease = Lease(plan, weights, call)
        return self._lease.merge()

    @outside_dynamo
    def __exit__(self, *_: object) -> Literal[False]:
        assert self._lease is not None
        self._lease.restore()
        return False
